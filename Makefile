# The commands of this study. They need Python 3.11 to 3.13, make and a package index, and set up the rest themselves.
#
#   make study   install, run every experiment on the embedded data, write the report
#   make test    install, run every library notebook and all tests
#   make test-elsewhere   the same as other processors would compute it: SSE4.1, AVX2 with two threads, this one
#   make gpu     with a GPU: device tests, throughput, the most valuable tables, for MINUTES=10; again goes on from there
#   make docs    build the site into _docs/html
#   make data    download the real sets that can be downloaded without an account
#   make lab     open JupyterLab on the notebooks
#   make clean   remove what was built; the environment, the runs and the data stay

PYTHON ?= python3
JOBS   ?= $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1))")
PRESET ?= smoke
MINUTES ?= 10

BIN := .venv/bin
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# An accelerator written in Python (tests/accelerator), which torch finds on this path.
PRETEND := AFGSTUDY_DEVICE=npu PYTHONPATH=tests/accelerator $(ONE_THREAD)
# Experiments on it: one of each room in every test, all of them elsewhere.
FIVE := aalp/table4 two_stream/fig3_4 cafd/maps afg/table3 summary/yours
TWO_THREADS := OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 AFGSTUDY_TEST_THREADS=2

# What torch and oneDNN are told to leave unused. Older processors than this one are emulated, newer ones cannot be.
SSE41 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(ONE_THREAD)
AVX2  := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(TWO_THREADS)
LIBRARY_NOTEBOOKS := $(BIN)/nbdev_test --skip_folder_re '^[_.]|experiments|benchmarks' --do_print

.DEFAULT_GOAL := help
.PHONY: help study gpu test test-elsewhere test-sse41-notebooks docs data lab setup clean

help:  # the lines at the top of this file
	@sed -n '/^#   make /s/^# *//p' Makefile

study: setup
	@$(BIN)/afgstudy run --all --preset $(PRESET) --jobs $(JOBS)
	@$(BIN)/afgstudy report --preset $(PRESET)

# The most valuable first. What the time does not reach stays as it is; a training goes on where it was ended.
ON_A_GPU := benchmarks/throughput:gpu aalp/table2:paper aalp/table2:paper-cifar10 afg/table2:paper cafd/unseen:paper two_stream/table2:paper

gpu: setup
	@$(BIN)/python -c "from afgstudy.engines import gpus; raise SystemExit(not gpus())" || \
	  { echo "make gpu: torch finds no GPU on this machine that it could use; nothing was run"; exit 2; }
	@end=$$(( $$(date +%s) + 60 * $(MINUTES) )); status=0; \
	$(BIN)/python -m pytest tests/test_cuda.py || status=1; \
	for each in $(ON_A_GPU); do \
	  left=$$(( end - $$(date +%s) )); [ $$left -gt 0 ] || break; \
	  case $$each in benchmarks/*) room=nbs;; *) room=nbs/experiments;; esac; \
	  AFGSTUDY_EXPERIMENTS=$$room $(BIN)/afgstudy run $${each%:*} --preset $${each#*:} --within $$left || status=1; \
	done; exit $$status

test: setup
	$(ONE_THREAD) $(LIBRARY_NOTEBOOKS) --n_workers $(JOBS)
	$(ONE_THREAD) $(BIN)/python -m pytest
	$(PRETEND) $(BIN)/python -m pytest tests/accelerator tests/test_cuda.py
	@runs=$$(mktemp -d); $(PRETEND) AFGSTUDY_RUNS=$$runs $(BIN)/afgstudy run $(FIVE); status=$$?; rm -rf $$runs; exit $$status

test-elsewhere: setup test-sse41-notebooks
	$(SSE41) $(BIN)/python -m pytest
	$(AVX2) $(LIBRARY_NOTEBOOKS) --n_workers 1
	$(AVX2) $(BIN)/python -m pytest
	$(ONE_THREAD) $(LIBRARY_NOTEBOOKS) --n_workers $(JOBS)
	$(ONE_THREAD) AFGSTUDY_THOROUGH=1 $(BIN)/python -m pytest
	@runs=$$(mktemp -d); $(PRETEND) AFGSTUDY_RUNS=$$runs $(BIN)/afgstudy run --all; status=$$?; rm -rf $$runs; exit $$status

test-sse41-notebooks: setup
	$(SSE41) $(LIBRARY_NOTEBOOKS) --n_workers $(JOBS)

docs: setup
	@$(ONE_THREAD) $(BIN)/python docs/stage.py --to _docs/pages
	@$(ONE_THREAD) $(BIN)/python -m sphinx -W --keep-going -q -b html -d _docs/doctrees -c docs _docs/pages _docs/html
	@echo "$(CURDIR)/_docs/html/index.html"

data: setup
	$(BIN)/afgstudy data get mnist cifar10 svhn

lab: setup
	$(BIN)/jupyter lab nbs

clean:
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

setup: .venv/installed

.venv/installed: settings.ini environment.yml setup.py
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11, 5) <= sys.version_info[:3] < (3, 14))" || \
	  { echo "Python 3.11.5 to 3.13 is needed, this is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@sed -n 's/^ *- \([A-Za-z0-9_.-]*==.*\)/\1/p' environment.yml > .venv/constraints.txt
	@echo "Installing into .venv (about 6 GB the first time, most of it torch's CUDA libraries)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e ".[dev]"
	@touch $@
