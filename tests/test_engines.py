"""Engines: who runs the jobs. Those of Ray and Dask are real, on 127.0.0.1; without the package they are skipped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
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
# Waits until it is told to go on, or to end; says who it is.
WAITS = """
import os, time
with open("began", "a") as file:
    print(os.getpid(), file=file)
while not os.path.exists("go"):
    time.sleep(0.1)
"""
PACKAGES = {"ray": "ray", "dask": "distributed"}


def until(what, patience=60):
    "Wait for something to be so."
    end = time.monotonic() + patience
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def began() -> list[int]:
    "The processes that have begun to wait."
    return [int(pid) for pid in Path("began").read_text().split()] if Path("began").exists() else []


# --- the interface ---


def test_an_engine_is_asked_for_by_name_and_others_add_theirs(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, jobs, address):\n        self.given = jobs, address\n"
    )
    about = tmp_path / "mine-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[afgstudy.engines]\nmine = mine:Mine\nray = nothing:Here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert engines.engine("mine", jobs=3, address="somewhere").given == (3, "somewhere")
    with pytest.raises(StudyError, match="did you mean 'mine'"):
        engines.engine("mina")
    monkeypatch.setitem(sys.modules, "ray", None)
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


# --- a time to end ---


def test_runs_end_when_the_time_is_up_and_that_is_no_failure(sandbox):
    sandbox.write("a/quick", COUNTS)
    sandbox.write("b/slow", WAITS, COUNTS)
    sandbox("run a/quick")
    assert "1 finished earlier, 1 interrupted" in sandbox("run --all -j 2 --within 1")
    assert not list(sandbox.runs.rglob("*.part")) and not any(map(alive, began()))
    sandbox.write("c/bad", "1 / seed", COUNTS)
    assert "1 failed" in sandbox("run c/bad --within 600", status=1)


def test_make_gpu_says_that_there_is_none_and_shares_out_the_time_where_there_is(tmp_path):
    "With commands that stand in for python (is there a GPU? the device tests) and afgstudy (tells what it was asked)."

    def make(has_gpu: bool, seconds: float) -> subprocess.CompletedProcess:
        tells = f'echo $* in $AFGSTUDY_EXPERIMENTS; sleep {seconds}'
        for name, text in {"python": f"echo $2 $3; exit {int(not has_gpu)}", "afgstudy": tells}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        words = ["make", "--no-print-directory", "-o", "setup", "gpu", f"BIN={tmp_path}", "MINUTES=1"]
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}  # of a make above
        return subprocess.run(words, cwd=Path(__file__).parents[1], env=outer, capture_output=True, text=True)

    none = make(has_gpu=False, seconds=0)
    assert none.returncode == 2 and "finds no GPU" in none.stdout and "pytest" not in none.stdout
    there = make(has_gpu=True, seconds=1.1)
    _, tests, *asked = [line.split() for line in there.stdout.splitlines()]
    assert there.returncode == 0 and tests == ["pytest", "tests/test_cuda.py"]
    assert [a[1] for a in asked][:4] == ["benchmarks/throughput", "aalp/table2", "aalp/table2", "afg/table2"]
    assert [a[-1] for a in asked][:2] == ["nbs", "nbs/experiments"]
    left = [int(a[-3]) for a in asked]
    assert 50 < left[0] <= 60 and left == sorted(left, reverse=True) and left[0] > left[-1]


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


# --- shared artifacts ---

# Takes an artifact that is built once; the build ends when somebody says so.
SHARES = """
import os, time, torch
from afgstudy.store import Store

def build(scratch):
    with open("built", "a") as file:
        print(os.getpid(), file=file)
    while not os.path.exists("go"):
        time.sleep(0.1)
    return {"x": torch.zeros(1)}

kept = Store().get("model", {"arch": "shared"}, build)
"""
SAYS_GO = "from pathlib import Path\nPath('go').touch()"


@pytest.mark.parametrize("name", ["local", "dask"])
def test_no_worker_waits_for_what_another_one_builds(sandbox, monkeypatch, name):
    "Two runs want one artifact, whose build ends when a third has run: on two workers, none of which may wait."
    if name != "local":
        pytest.importorskip(PACKAGES[name])
    monkeypatch.setenv("AFGSTUDY_PATIENCE", "0.2")
    for run in ("a/one", "a/two"):
        sandbox.write(run, SHARES, COUNTS)
    sandbox.write("b/other", SAYS_GO, COUNTS)
    said = sandbox(f"run --all -j 2 --timeout 100 --engine {name}")
    assert "3 done" in said and "waiting" not in said
    assert len(Path("built").read_text().split()) == 1 and not list(sandbox.runs.rglob("*.part"))


def test_a_held_run_ends_with_the_others_when_time_is_up(sandbox, monkeypatch):
    monkeypatch.setenv("AFGSTUDY_PATIENCE", "0.2")
    for run in ("a/one", "a/two"):
        sandbox.write(run, SHARES, COUNTS)
    assert "2 interrupted" in sandbox("run --all -j 2 --within 15")
    assert len(Path("built").read_text().split()) == 1 and not list(sandbox.runs.rglob("*.part"))


def test_jobs_that_share_an_artifact_are_ordered_by_what_their_records_say(sandbox):
    "The first of those that share builds it; the others come last, and are told after whom."
    Path("go").touch()
    sandbox.write("a/alone", COUNTS)
    save = "from afgstudy.study.experiment import Experiment, parameters_of\n"
    save += "exp = Experiment('{}', parameters_of(globals()))"
    for run in ("b/figure", "b/table"):
        row = "exp.row('digits', 'none', 'none', measured=1.0, n=1)\nexp.save()"
        sandbox.write(run, save.format(run), SHARES, row)
    told = {j["experiment"]: j["after"] for j in json.loads(sandbox("plan --json"))}
    assert list(told.items()) == [("a/alone", []), ("b/figure", []), ("b/table", [])]  # nothing is known so far
    sandbox("run --all")
    for run in ("a/alone", "b/figure", "b/table"):
        sandbox.write(run, "changed = 1", COUNTS)
    told = {j["experiment"]: j["after"] for j in json.loads(sandbox("plan --json"))}
    assert list(told.items()) == [("b/figure", []), ("a/alone", []), ("b/table", ["b/figure"])]


# --- Ray and Dask ---


def submitted(engine) -> list:
    "The futures of a cluster's tasks."
    return list(engine.refs if isinstance(engine, engines.RayEngine) else engine.remotes)


@pytest.fixture
def cluster(request, sandbox, monkeypatch):
    "An engine with workers of its own, whose runs go to another folder than the driver's."
    pytest.importorskip(PACKAGES[request.param])
    monkeypatch.setenv("AFGSTUDY_EXPERIMENTS", str(sandbox.folder))
    monkeypatch.setenv("AFGSTUDY_RUNS", str(sandbox.root / "far"))
    made = engines.engine(request.param, jobs=2)
    monkeypatch.delenv("AFGSTUDY_RUNS")
    yield made
    made.close()


@pytest.mark.parametrize("cluster", PACKAGES, indirect=True)
def test_a_cluster_gives_the_records_of_a_serial_run(sandbox, cluster):
    "The digits too; a failure stops nobody; logs come back; the driver hears where the runs are."
    settings = 'dataset: str = "digits"\nseed: int = 0'
    sandbox.write("a/one", "import os\nos.write(1, b'hello')", COUNTS, parameters=settings)
    sandbox.write("a/two", WAITS, COUNTS)
    sandbox.write("b/bad", "1 / seed", COUNTS)
    [one, *_] = planning.plan(["a/one"])
    order = execute.order_of(one)
    odd = replace(order, needs=order.needs | {"data": {"digits": "0"}, "modules": {"afgstudy.stats": "0"}})
    refused = cluster.submit(execute.fulfil, odd, engines.Resources()).result(60)
    assert refused.message.endswith("different are: data digits, modules afgstudy.stats")

    heard = []

    def listen():
        "Let a/two go on when it has been heard of."
        try:
            until(lambda: heard.extend(map(cluster.progress, submitted(cluster))) or "a/two 4/5" in heard)
        finally:
            Path("go").touch()

    threading.Thread(target=listen).start()
    far = execute.execute_all(planning.plan(), engine=cluster)
    serial = execute.execute_all(planning.plan(runs=sandbox.root / "serial"))
    assert [o.state for o in far] == [o.state for o in serial] == ["done", "done", "failed"]
    for other, one in zip(far[:2], serial[:2], strict=True):
        assert str(other.job.folder).startswith(str(sandbox.runs))
        assert (one.job.folder / "record.json").read_bytes() == (other.job.folder / "record.json").read_bytes()
    assert "hello" in (far[0].job.folder / "log.txt").read_text()
    assert "ZeroDivisionError: division by zero" in far[2].message
    assert "a/two 4/5" in heard


def command(*words: str) -> subprocess.Popen:
    "The command `afgstudy`, with a process group of its own as a terminal gives it."
    start = [sys.executable, "-c", "from afgstudy.study.cli import main; main()", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(start, start_new_session=True, text=True, **pipes)


@pytest.mark.parametrize("name", PACKAGES)
def test_ctrl_c_ends_the_runs_of_a_cluster_within_ten_seconds(sandbox, name):
    pytest.importorskip(PACKAGES[name])
    sandbox.write("a/quick", COUNTS)
    sandbox.write("b/slow", WAITS, COUNTS)
    driver = command("run", "--all", "--engine", name, "-j", "2")
    [quick] = planning.plan(["a/quick"])
    until(lambda: (planning.finished(quick.folder) and began()) or driver.poll() is not None, 120)
    assert [alive(pid) for pid in began()] == [True], driver.stdout.read()
    time.sleep(1)  # the driver learns of the first
    os.killpg(driver.pid, signal.SIGINT)
    until(lambda: not any(map(alive, began())), 10)
    said, _ = driver.communicate(timeout=30)
    assert driver.returncode == 130 and "1 done, 1 interrupted" in said and "Traceback" not in said
    assert "listen" not in said and not list(sandbox.runs.rglob("*.part"))


def test_two_drivers_with_clusters_of_their_own_do_a_run_once(sandbox):
    pytest.importorskip("distributed")
    sandbox.write("toy", "import time\ntime.sleep(2)", sandbox.LIGHT)
    drivers = [command("run", "toy", "--engine", "dask") for _ in range(2)]
    said = [driver.communicate(timeout=120)[0] for driver in drivers]
    assert [d.returncode for d in drivers] == [0, 0], said
    assert sandbox.executed() == 1


def test_a_node_of_ray_dies_and_the_records_are_those_of_a_serial_run(sandbox, monkeypatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("AFGSTUDY_EXPERIMENTS", str(sandbox.folder))
    for name in ("a", "b"):
        sandbox.write(f"toy/{name}", WAITS, COUNTS)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1)

    def kill_one():
        "When both nodes are at work."
        try:
            until(lambda: len(began()) == 2)
            nodes.remove_node(second, allow_graceful=False)
            until(lambda: sum(map(alive, began())) == 1)
        finally:
            Path("go").touch()

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        far = execute.execute_all(planning.plan(), engine=engines.RayEngine(address=nodes.address))
    finally:
        killer.join()
        nodes.shutdown()
    assert [o.state for o in far] == ["done", "done"] and len(began()) == 3
    serial = execute.execute_all(planning.plan(runs=sandbox.root / "serial"))
    for one, other in zip(serial, far, strict=True):
        assert (one.job.folder / "record.json").read_bytes() == (other.job.folder / "record.json").read_bytes()


def test_workers_of_dask_share_the_gpus_of_this_machine(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setenv("AFGSTUDY_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    dask = engines.engine("dask", jobs=2)
    try:
        for count in (1, 2):  # never more than there are
            futures = [dask.submit(os.getenv, "CUDA_VISIBLE_DEVICES", engines.Resources(gpus=count)) for _ in range(2)]
            assert {f.result(60) for f in futures} <= {"4", "7"}
    finally:
        dask.close()
