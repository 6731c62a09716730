"""Engines: who runs the jobs. Those of Ray and Dask are real, on 127.0.0.1; without the package they are skipped."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from afgstudy import engines
from afgstudy.keys import StudyError
from afgstudy.study import execute, planning

pytest_plugins = ["study_sandbox"]
# Three rows by a generator that the seed starts; says which process it ran in.
COUNTS = """
import json, os, random
from pathlib import Path
rows = [random.Random(f"{seed} {k}").random() for k in range(3)]
Path(os.environ["AFGSTUDY_RUN_DIR"], "record.json").write_text(json.dumps({"seed": seed, "rows": rows}))
"""


# --- the interface ---


def test_an_engine_is_asked_for_by_name_and_others_add_theirs(monkeypatch):
    class Mine:
        def __init__(self, jobs, address):
            self.jobs, self.address = jobs, address

    class Found:
        name = "mine"

        def load(self):
            return Mine

    class Missing:
        name = "ray"

        def load(self):
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(engines.metadata, "entry_points", lambda group: [Found(), Missing()])
    mine = engines.engine("mine", jobs=3, address="somewhere")
    assert (mine.jobs, mine.address) == (3, "somewhere")
    with pytest.raises(StudyError, match="did you mean 'mine'"):
        engines.engine("mina")
    with pytest.raises(StudyError, match=r"needs ray: pip install 'afgstudy\[ray\]'"):
        engines.engine("ray")


def test_four_tasks_on_two_gpus_never_share_one(monkeypatch):
    monkeypatch.setenv("AFGSTUDY_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert engines.gpus() == ["4", "7"]
    local, busy, seen, both = engines.Local(jobs=4), set(), [], threading.Barrier(2)

    def task(_):
        mine = engines.own_gpus.get()
        assert mine not in busy
        busy.add(mine)
        both.wait(60)  # two at a time, and no more: four would need four GPUs
        seen.append(mine)
        busy.discard(mine)

    futures = [local.submit(task, None, engines.Resources(gpus=1)) for _ in range(4)]
    for future in futures:
        future.result(60)
    local.close()
    assert sorted(seen) == ["4", "4", "7", "7"]


def test_a_worker_sees_only_its_own_gpu(sandbox, monkeypatch):
    sandbox.write("toy", COUNTS)
    [job] = planning.plan(["toy"])
    token = engines.own_gpus.set("7")
    try:
        assert execute.environment(job)["CUDA_VISIBLE_DEVICES"] == "7"
    finally:
        engines.own_gpus.reset(token)


def test_plan_lists_jobs_that_any_scheduler_can_run(sandbox):
    sandbox.write("a/one", COUNTS)
    sandbox.write("b/two", COUNTS)
    jobs = json.loads(sandbox("plan --json -p seed=3"))
    assert [j["experiment"] for j in jobs] == ["a/one", "b/two"] and jobs[0]["parameters"] == {"seed": 3}
    assert jobs[0]["resources"] == {"gpus": 0, "cpus": 1, "memory": 0} and jobs[0]["state"] == "never"
    program, *command = jobs[0]["command"]
    assert program == "afgstudy"
    sandbox(" ".join(command))
    assert [j["state"] for j in json.loads(sandbox("plan --json -p seed=3"))] == ["done", "never"]


# --- orders ---


def test_a_worker_with_other_code_or_data_refuses_and_names_it(sandbox, monkeypatch):
    settings = 'dataset: str = "digits"\nseed: int = 0'
    sandbox.write("toy", "from afgstudy.stats import proportion", COUNTS, parameters=settings)
    [job] = planning.plan(["toy"])
    order = execute.order_of(job)
    for name, change in {
        "modules afgstudy.stats": {"modules": job.needs["modules"] | {"afgstudy.stats": "0"}},
        "data digits": {"data": {"digits": "0"}},
        "device": {"device": "cuda"},
    }.items():
        outcome = execute.fulfil(replace(order, needs=order.needs | change))
        assert outcome.state == "failed" and outcome.message.endswith(f"different are: {name}")
    sandbox.write("toy", COUNTS, "1", parameters=settings)
    assert "the notebook's code" in execute.fulfil(order).message
    sandbox.write("toy", COUNTS, parameters="seeds: int = 0")
    assert "no parameter 'dataset'" in execute.fulfil(order).message
    assert not (sandbox.runs / "smoke").exists()


def test_what_a_far_run_left_arrives_here_failures_too(sandbox, monkeypatch):
    sandbox.write("a/good", COUNTS)
    sandbox.write("b/bad", "1 / seed", COUNTS)
    jobs = planning.plan()
    monkeypatch.setenv("AFGSTUDY_RUNS", str(sandbox.root / "far"))
    far = [execute.fulfil(execute.order_of(job)) for job in jobs]
    assert [o.state for o in far] == ["done", "failed"] and not (sandbox.runs / "smoke").exists()
    monkeypatch.delenv("AFGSTUDY_RUNS")
    near = [execute.receive(job, outcome) for job, outcome in zip(jobs, far, strict=True)]
    assert [planning.state_of(o.job).name for o in near] == ["done", "failed"]
    assert {p.name for p in jobs[1].folder.iterdir()} == {"failed.ipynb", "error.txt", "log.txt"}
    assert execute.run(jobs[0]).state == "present"


# --- warm workers ---


def test_runs_are_forked_from_one_process_and_share_nothing(sandbox):
    says = """
    import os, sys
    import wave
    already = getattr(wave, "touched", None)
    wave.touched = seed
    with open("seen", "a") as file:
        print("afgstudy.stats" in sys.modules, already, os.environ["AFGSTUDY_RUN_DIR"], os.getcwd(), file=file)
    """
    for name in ("a", "b"):
        sandbox.write(f"toy/{name}", "def never():\n    import afgstudy.stats", says, COUNTS)
    assert "2 done" in sandbox("run --all")
    lines = [line.split() for line in Path("seen").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["True", "None"]] * 2  # imported before the fork; nothing left behind
    assert lines[0][2] != lines[1][2] and {line[3] for line in lines} == {str(sandbox.root)}
    assert not execute._stocks


def test_without_forks_the_records_are_the_same(sandbox, monkeypatch):
    sandbox.write("toy", COUNTS)
    sandbox("run toy")
    [job] = planning.plan(["toy"])
    warm = (job.folder / "record.json").read_text()
    monkeypatch.setenv("AFGSTUDY_WARM", "0")
    sandbox("run toy --force")
    assert (job.folder / "record.json").read_text() == warm


# --- Ray and Dask ---

CLUSTERS = ["ray", "dask"]


@pytest.fixture
def cluster(request, sandbox, monkeypatch):
    "An engine with workers of its own, whose runs go to another folder than the driver's."
    pytest.importorskip({"ray": "ray", "dask": "distributed"}[request.param])
    monkeypatch.setenv("AFGSTUDY_EXPERIMENTS", str(sandbox.folder))
    monkeypatch.setenv("AFGSTUDY_RUNS", str(sandbox.root / "far"))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    made = {"ray": engines.RayEngine, "dask": engines.DaskEngine}[request.param](jobs=2)
    monkeypatch.delenv("AFGSTUDY_RUNS")
    yield made
    made.close()


@pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)
def test_a_cluster_gives_the_records_of_a_serial_run(sandbox, cluster):
    for name in ("a/one", "a/two"):
        sandbox.write(name, COUNTS)
    sandbox.write("b/bad", "1 / seed", COUNTS)
    serial = execute.execute_all(planning.plan(runs=sandbox.root / "serial"))
    far = execute.execute_all(planning.plan(), engine=cluster)
    assert [o.state for o in far] == [o.state for o in serial] == ["done", "done", "failed"]
    for one, other in zip(serial[:2], far[:2], strict=True):
        assert str(other.job.folder).startswith(str(sandbox.runs))
        assert (one.job.folder / "record.json").read_bytes() == (other.job.folder / "record.json").read_bytes()
    assert "ZeroDivisionError: division by zero" in far[2].message
