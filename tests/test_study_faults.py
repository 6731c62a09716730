"""What goes wrong at night: dead kernels, full disks, kills, Ctrl-C, damaged files, two of everything."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import nbformat
import pytest
import torch

from afgstudy.store import MANIFEST, TENSORS, DiskFull, Store
from afgstudy.study import execute, planning

pytest_plugins = ["study_sandbox"]
CHECKOUT = Path(__file__).parents[1]

# Says who it is and sleeps until a file called `go` is there.
WAITS = """
import os, time
from pathlib import Path
Path("kernel").write_text(str(os.getpid()))
while not Path("go").exists():
    time.sleep(0.05)
"""


def until(condition, seconds: float = 60):
    "Wait for something to become true, and return it."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def alive(pid: int) -> bool:
    "Whether a process is running (a zombie is not)."
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def start(*arguments: str) -> subprocess.Popen:
    "`afgstudy ...` as a process of its own."
    code = "from afgstudy.study.cli import main; main(prog_name='afgstudy')"
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"  # `&` ignores it
    environment = dict(os.environ)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, **pipes)


def leftovers(folder: Path) -> list[Path]:
    "Part files and folders."
    return [p for p in folder.rglob("*") if ".part" in p.name or p.name.endswith(".old")]


# --- runs that fail ---


def test_a_kernel_that_dies_fails_alone(sandbox):
    sandbox.write("a/dies", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)", sandbox.LIGHT)
    sandbox.write("b/fails", "print('before')\n1 / seed", sandbox.LIGHT)
    sandbox.write("c/good", sandbox.LIGHT)
    said = sandbox("run --all", status=1)
    assert (
        "the kernel died in cell 5 of 6" in said
        and "ZeroDivisionError: division by zero (cell 4 of 5)" in said
    )
    assert "1 done, 2 failed" in said and sandbox.executed() == 1
    [folder] = [p for p in (sandbox.runs / "smoke" / "b" / "fails").iterdir() if p.is_dir()]
    assert {p.name for p in folder.iterdir()} == {"failed.ipynb", "error.txt", "log.txt"}
    assert "Traceback" in (folder / "error.txt").read_text()
    outputs = [o for c in nbformat.read(folder / "failed.ipynb", 4).cells for o in c.get("outputs", [])]
    assert outputs[0]["text"] == "before\n" and outputs[1]["ename"] == "ZeroDivisionError"
    assert [line.split()[2] for line in sandbox("status").splitlines()[1:]] == ["failed", "failed", "done"]
    assert leftovers(sandbox.runs) == []


def test_a_failed_repetition_keeps_the_earlier_result_until_one_succeeds(sandbox):
    sandbox.write("toy", sandbox.LIGHT, "assert not Path('fail').exists(), 'as asked'")
    sandbox("run toy")
    Path("fail").touch()
    assert "AssertionError: as asked" in sandbox("run toy --force", status=1)
    job = planning.plan(["toy"])[0]
    assert (job.folder / "record.json").exists() and (job.folder / "failed.ipynb").exists()
    assert planning.state_of(job).name == "failed"
    Path("fail").unlink()
    sandbox("run toy")
    assert not (job.folder / "error.txt").exists() and planning.state_of(job).name == "done"


def test_a_notebook_without_a_record_has_failed_and_so_has_a_slow_one(sandbox):
    sandbox.write("a/silent", "seed")
    sandbox.write("b/slow", WAITS)
    jobs = planning.plan(["a/silent"]) + planning.plan(["b/slow"], timeout=until_started())
    outcomes = execute.execute_all(jobs)
    assert [o.state for o in outcomes] == ["failed", "failed"]
    assert "left no record" in outcomes[0].message and "timed out after" in outcomes[1].message
    if Path("kernel").exists():
        until(lambda: not alive(int(Path("kernel").read_text())), 10)


def until_started() -> float:
    "A timeout that a worker's start does not reach on a busy machine, or does: both must end well."
    return 4.0


def test_a_missing_dataset_fails_its_run_and_no_other(sandbox):
    sandbox.write("toy", sandbox.LIGHT, parameters='dataset: str = "nothing"  # a set\nseed: int = 0  # s')

    def missing(name: str) -> str:
        raise FileNotFoundError(f"dataset {name!r} is not in data/sets: afgstudy data get {name}")

    [outcome] = execute.execute_all(planning.plan(fingerprint=missing))
    assert outcome.state == "failed" and "afgstudy data get nothing" in outcome.message
    assert sandbox.executed() == 0


# --- interruptions ---


def interrupted(sandbox):  # -> process, pid of the kernel
    "A run of a quick experiment and one that waits, after a first Ctrl-C in the second."
    sandbox.write("a/quick", sandbox.LIGHT)
    sandbox.write("b/waits", WAITS, sandbox.LIGHT)
    process = start("run", "--all")
    kernel = int(until(lambda: Path("kernel").exists() and Path("kernel").read_text()))
    process.send_signal(signal.SIGINT)
    return process, kernel


def test_ctrl_c_leaves_what_is_finished_and_nothing_half_done(sandbox):
    process, kernel = interrupted(sandbox)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 130, said
    assert "1 done, 1 interrupted" in said and "Traceback" not in said
    until(lambda: not alive(kernel), 60)
    assert leftovers(sandbox.runs) == [] and sandbox.executed() == 1
    assert [line.split()[2] for line in sandbox("status").splitlines()[1:]] == ["done", "never"]
    Path("go").touch()
    assert "1 done, 1 finished earlier" in sandbox("run --all") and sandbox.executed() == 2


def test_a_second_ctrl_c_is_as_harmless_as_the_first(sandbox):
    process, kernel = interrupted(sandbox)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=90)[0]
    assert process.returncode in (130, -signal.SIGINT), said
    assert "Traceback" not in said
    until(lambda: not alive(kernel), 60)
    assert [line.split()[2] for line in sandbox("status").splitlines()[1:]] == ["done", "never"]
    Path("go").touch()
    assert "1 done, 1 finished earlier" in sandbox("run --all") and sandbox.executed() == 2
    assert leftovers(sandbox.runs) == []


def test_kill_9_of_the_runner_takes_its_kernels_along_and_a_new_one_goes_on(sandbox):
    sandbox.write("toy", WAITS, sandbox.LIGHT)
    process = start("run", "toy")
    kernel = int(until(lambda: Path("kernel").exists() and Path("kernel").read_text()))
    assert sandbox("status").splitlines()[1].split()[2] == "running"
    process.kill()
    process.wait()
    until(lambda: not alive(kernel), 10)
    job = planning.plan(["toy"])[0]
    assert job.parts and planning.state_of(job).name == "never"  # half-written does not count
    Path("go").touch()
    sandbox("run toy")
    assert sandbox.executed() == 1 and leftovers(sandbox.runs) == []


def test_a_worker_that_is_killed_is_a_failed_run(sandbox):
    sandbox.write("toy", WAITS)
    [job] = planning.plan(["toy"])
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(execute.run, job)
        kernel = int(until(lambda: Path("kernel").exists() and Path("kernel").read_text()))
        worker = int(Path(f"/proc/{kernel}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(worker, signal.SIGKILL)
        outcome = future.result(30)
    assert outcome.state == "failed" and "SIGKILL" in outcome.message
    until(lambda: not alive(kernel), 15)  # ipykernel looks for its parent


def test_two_runners_of_the_same_run_do_it_once(sandbox):
    sandbox.write("toy", sandbox.LIGHT)
    [job] = planning.plan(["toy"])
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        outcomes = list(pool.map(execute.run, [job, job]))
    assert sorted(o.state for o in outcomes) == ["done", "present"] and sandbox.executed() == 1


# --- the store ---


def test_two_processes_build_an_artifact_once(tmp_path):
    code = """
    import sys, time
    from pathlib import Path
    import torch
    from afgstudy.store import Store
    root = Path(sys.argv[1])

    def build(scratch):
        with open(root / "built", "a") as file:
            print("once", file=file)
        time.sleep(1)
        return {"x": torch.arange(3)}

    (root / f"ready{sys.argv[2]}").touch()
    while not (root / "go").exists():
        time.sleep(0.01)
    assert Store(root / "store").get("model", {"a": 1}, build).tensors["x"].tolist() == [0, 1, 2]
    """
    command = [sys.executable, "-c", dedent(code), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stderr=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    until(lambda: all((tmp_path / f"ready{i}").exists() for i in (0, 1)))
    (tmp_path / "go").touch()
    said = [p.communicate(timeout=60)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert (tmp_path / "built").read_text() == "once\n"
    assert sum("waiting for another process that builds model/" in s for s in said) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / TENSORS),
        lambda folder: os.truncate(folder / TENSORS, 100),
        lambda folder: (folder / TENSORS).unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"kind": "mod'),
        lambda folder: (folder / MANIFEST).write_text("{}"),
    ],
    ids=["bit", "truncated", "no tensors", "no manifest", "half a manifest", "empty manifest"],
)
def test_a_damaged_artifact_is_noticed_said_and_rebuilt(tmp_path, damage):
    built = []

    def build(scratch: Path) -> dict:
        built.append(1)
        return {"x": torch.arange(1000.0)}

    store = Store(tmp_path)
    first = store.get("model", {"a": 1}, build)
    damage(first.path)
    with pytest.warns(UserWarning, match="is damaged, moved to .*damaged-1 and built again"):
        again = store.get("model", {"a": 1}, build)
    assert (first.path.parent / f".{first.path.name}.damaged-1").is_dir()  # moved aside, not deleted
    assert len(built) == 2 and again.tensors["x"].equal(torch.arange(1000.0)) and again.key == first.key
    store.get("model", {"a": 1}, build)
    assert len(built) == 2 and leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_read_error_is_an_error_and_no_damage(tmp_path, monkeypatch, number):
    store, sound = Store(tmp_path), {"x": torch.arange(10.0)}
    first = store.get("model", {"a": 1}, lambda scratch: sound)

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("afgstudy.store.file_checksum", fails)
        with pytest.raises(OSError, match=os.strerror(number)):
            store.get("model", {"a": 1}, lambda scratch: pytest.fail("built again"))
    again = store.get("model", {"a": 1}, lambda scratch: pytest.fail("built again"))
    assert again.tensors["x"].equal(sound["x"]) and list(first.path.parent.glob(".*damaged*")) == []


def test_killed_while_building_the_scratch_folder_survives(tmp_path):
    code = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from afgstudy.store import Store

    def build(scratch):
        checkpoint = scratch / "checkpoint"
        if not checkpoint.exists():
            checkpoint.write_text("epoch 3")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": torch.tensor([int(checkpoint.read_text()[-1])])}

    print(Store(sys.argv[1]).get("model", {"a": 1}, build).tensors["x"].item())
    """
    command = [sys.executable, "-c", dedent(code), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == -signal.SIGKILL and first.stdout == ""
    assert second.returncode == 0 and second.stdout == "3\n", second.stderr
    assert list(tmp_path.rglob("checkpoint")) == []


def test_an_error_while_building_leaves_no_artifact(tmp_path):
    store = Store(tmp_path)

    def build(scratch: Path) -> dict:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.get("model", {"a": 1}, build)
    with pytest.raises(TypeError, match="build gave list for 'curve'"):
        store.get("model", {"a": 1}, lambda scratch: {"curve": [1, 2]})
    assert store.ls() == [] and leftovers(tmp_path) == []


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 1 MB: a real one where this user may mount it, else None."
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def check_full(store: Store, path: Path) -> None:
    "Ask for an artifact that does not fit."
    with pytest.raises(DiskFull) as error:
        store.get("model", {"large": True}, lambda scratch: {"x": torch.zeros(500_000)})
    assert error.value.errno == errno.ENOSPC and str(path) in str(error.value)
    assert "needs 2,0" in str(error.value) and "afgstudy store rm" in str(error.value)
    assert leftovers(path) == []
    kept = store.get("model", {"small": True}, lambda scratch: pytest.fail("built again"))
    assert kept.tensors["x"].tolist() == [0.0] * 100


def test_a_full_disk_is_an_error_with_path_and_bytes(tmp_path, small_disk, monkeypatch):
    path = small_disk or tmp_path / "store"
    store = Store(path)
    store.get("model", {"small": True}, lambda scratch: {"x": torch.zeros(100)})
    if small_disk:
        check_full(store, path)  # seen before writing
        plenty = type("usage", (), {"free": 1 << 40})
        monkeypatch.setattr("afgstudy.store.shutil.disk_usage", lambda path: plenty)
        check_full(store, path)  # met while writing
    else:
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr("safetensors.torch.save_file", lambda *args: (_ for _ in ()).throw(full))
        check_full(store, path)


def test_a_disk_that_fills_while_building(tmp_path):
    def build(scratch: Path) -> dict:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="the disk is full"):
        Store(tmp_path).get("model", {"a": 1}, build)


def test_a_run_on_a_full_disk_fails_and_keeps_what_is_finished(sandbox, small_disk, monkeypatch):
    if not small_disk:
        pytest.skip("this user may not mount a disk of 1 MB")
    monkeypatch.setenv("AFGSTUDY_RUNS", str(small_disk))
    sandbox.write("a/first", sandbox.LIGHT)
    sandbox.write("b/second", sandbox.LIGHT)
    assert "1 done" in sandbox("run a/first")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as e:
            assert e.errno == errno.ENOSPC
    said = sandbox("run --all", status=1)
    assert "finished earlier" in said and "No space left on device" in said
    filler.unlink()
    assert "1 done, 1 finished earlier" in sandbox("run --all") and sandbox.executed() == 2
    assert leftovers(small_disk) == []


def test_records_are_whole_or_absent(tmp_path, monkeypatch):
    from afgstudy.keys import write_whole

    target = tmp_path / "record.json"
    write_whole(target, json.dumps({"rows": 1}))
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"No space left on device: .*record.json"):
        write_whole(target, json.dumps({"rows": 2}))
    assert json.loads(target.read_text()) == {"rows": 1} and [p.name for p in tmp_path.iterdir()] == [
        "record.json"
    ]


def test_threads_of_the_test_itself_are_gone():
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
