"""What the command line costs, counted in files read, sources parsed and modules imported; never in seconds."""

import json
import subprocess
import sys

import pytest

from afgstudy import keys
from afgstudy.study import parameters, planning

pytest_plugins = ["study_sandbox"]
CELLS = ("from afgstudy.stats import proportion", "from afgstudy.training import fit")
HEAVY = """torch numpy pandas scipy sklearn matplotlib seaborn foolbox captum statsmodels
nbformat jsonschema papermill jinja2"""


@pytest.mark.parametrize("command", ["list", "status", "run --all --dry-run"])
def test_asking_imports_nothing_heavy(sandbox, command):
    sandbox.write("a/one", *CELLS, parameters="dataset: str = 'digits'\nseed: int = 0")
    sandbox("status")  # the checksum of the digits is known from here on
    asked = "import sys; from afgstudy.study.cli import main; main(sys.argv[1:], standalone_mode=False)"
    asked = f"try:\n    exec({asked!r})\nexcept SystemExit: pass\nprint(*sys.modules, sep=chr(10))"
    whole = [sys.executable, "-c", f"import sys\n{asked}", *command.split()]
    said = subprocess.run(whole, capture_output=True, text=True)
    modules = set(said.stdout.splitlines())
    assert "afgstudy.study.planning" in modules, said.stderr
    assert not modules & set(HEAVY.split())


@pytest.fixture
def fresh(monkeypatch):
    "The memory of a process that has just started, and a counter of the sources it parses."
    parsed = []
    real = keys.ast.parse

    def counted(source, *args, **kwargs):
        parsed.append(source)
        return real(source, *args, **kwargs)

    def forget():
        for name in ("_FACTS", "_kept", "_asked"):
            getattr(keys, name).clear()
        for memory in (keys._text, keys._package, keys._checksum, parameters._notebook, planning._fingerprint):
            memory.cache_clear()
        parsed.clear()

    monkeypatch.setattr(keys, "ast", type("Ast", (), {**vars(keys.ast), "parse": staticmethod(counted)}))
    forget()
    yield forget, parsed
    for name in ("_FACTS", "_kept", "_asked"):
        getattr(keys, name).clear()


def test_every_file_is_read_once_and_every_source_parsed_once(sandbox, fresh):
    _, parsed = fresh
    for name in ("a/one", "a/two", "b/three"):
        sandbox.write(name, *CELLS)
        sandbox.preset("cpu", name, "seed: 1")
    found = list(planning.states())
    assert len(found) == 6
    files = len(planning.plan(["a/one"])[0].needs["modules"])
    assert len(parsed) == len(set(parsed)) and files >= 3
    assert parameters._notebook.cache_info().misses == 3
    assert keys._text.cache_info().currsize == keys._text.cache_info().misses  # none read a second time


def test_a_second_command_parses_only_what_is_new(sandbox, fresh):
    forget, parsed = fresh
    sandbox.write("a/one", *CELLS)
    [first] = planning.plan()
    assert len(parsed) > 5
    forget()
    [second] = planning.plan()
    assert second.key == first.key and parsed == []
    forget()
    sandbox.write("a/one", *CELLS, "total = 1 + 1")
    [third] = planning.plan()
    assert third.key != first.key and parsed == ["total = 1 + 1"]


def test_a_broken_memory_costs_time_and_nothing_else(sandbox, fresh):
    forget, parsed = fresh
    sandbox.write("a/one", *CELLS)
    [first] = planning.plan()
    memory = sandbox.runs / "sources.json"
    known = json.loads(memory.read_text())
    for broken in ("", "[]", '{"made by": 1}', json.dumps({**known, "made by": "another version", "facts": {"x": 3}})):
        forget()
        memory.write_text(broken)
        assert planning.plan()[0].key == first.key and parsed
