"""A small study that is killed at any moment ends in the same digits; damage is moved aside; a full disk loses nothing.

With `AFGSTUDY_THOROUGH` (`make test-elsewhere`) it is killed a hundred times, without it ten."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from afgstudy.afg.drawing import Visualiser
from afgstudy.afg.genome import DamagedGenomes, Genome, GenomeSet, build_genomes
from afgstudy.attacks import FGSM
from afgstudy.data import load
from afgstudy.kept import attacked, trained
from afgstudy.keys import state_digest, tensor_digest
from afgstudy.models import layers
from afgstudy.store import TENSORS, DiskFull, Store
from afgstudy.study.experiment import Experiment
from afgstudy.study.records import read_record
from afgstudy.training import Recipe

pytest_plugins = ["study_sandbox"]
KILLS = 100 if os.environ.get("AFGSTUDY_THOROUGH") else 10
DRAWING = Visualiser.small(8, steps=1)
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.rmtree"}


def study(root: Path) -> str:
    "A training with checkpoints, an attacked set, genomes and a record; a digest of all their digits."
    store, images = Store(root / "store"), load("digits", "train", n=40)
    net = trained("lenet5", images, recipe=Recipe(epochs=3, batch_size=20), store=store).model
    x = attacked(FGSM(eps=0.1), net, images.take(slice(0, 6)), store=store).x
    made = build_genomes(root / "genomes", Genome(list(layers(net))[:1], 1, DRAWING), net, x, part_size=2)
    exp = Experiment("toy/kill", {"seed": 0})
    exp.folder = root / "run"
    exp.row("digits", "none", "FGSM", measured=float(x.mean()), n=6)
    exp.save()
    rows = json.dumps(read_record(root / "run")["rows"])
    parts = [state_digest(net), tensor_digest(x), tensor_digest(made.take(range(6))), rows]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def changes(event: str, arguments: tuple) -> bool:
    "Whether an audited event changes something on disk."
    return event in CHANGES or (
        event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
    )


def child(root: Path, answer, dies_at: int | None) -> None:
    "The study in a process of its own, which kills itself at a change of the disk with this number."
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if changes(event, arguments):
            seen += 1
            if seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    sys.addaudithook(count)
    digits = study(root)
    answer.send((digits, seen))


def process(root: Path, dies_at: int | None = None, lives: float | None = None) -> tuple[str, int] | None:
    "Digits and changes of a study; None where it was killed, at a change or after some seconds."
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    running = fork.Process(target=child, args=(root, there, dies_at))
    running.start()
    there.close()
    if lives is not None:
        running.join(lives)
        running.kill()
    running.join(120)
    assert running.exitcode in (0, -signal.SIGKILL), f"exit code {running.exitcode}"
    return here.recv() if running.exitcode == 0 else None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[str, int, float]:
    "Digits, changes and seconds of a study that nobody kills."
    process(tmp_path_factory.mktemp("first"))  # whatever happens once in a process happens here
    start = time.monotonic()
    digits, seen = process(tmp_path_factory.mktemp("undisturbed"))
    return digits, seen, time.monotonic() - start


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_study_that_is_killed_at_any_moment_ends_in_the_same_digits(tmp_path, undisturbed, seed):
    digits, seen, seconds = undisturbed
    drawn = random.Random(seed)
    for again in range(2):  # and once more on the way
        at = drawn.randint(1, max(seen >> again, 1))
        how = {"dies_at": at} if seed % 3 else {"lives": drawn.uniform(0, seconds)}
        process(tmp_path, **how)
    ended, _ = process(tmp_path)
    assert ended == digits, f"after {how}"
    left = [p for p in tmp_path.rglob("*") if ".old" in p.name or "damaged" in p.name]
    assert left == [], "a kill leaves nothing that is taken for damage"


# ---------------------------------------------------------------- damage and errors of the system


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "one bit": flip,
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}
TRANSIENT = [errno.EACCES, errno.EMFILE, errno.EIO]


def network(root: Path):
    return trained(
        "lenet5", load("digits", "train", n=40), recipe=Recipe(epochs=1, batch_size=20), store=Store(root)
    )


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", [TENSORS, "manifest.json"])
def test_a_fitted_network_that_is_damaged_is_moved_aside_and_trained_again(tmp_path, how, file):
    first = network(tmp_path)
    DAMAGE[how](first.artifact.path / file)
    if (how, file) == ("one bit", "manifest.json"):
        flip_a_key(first.artifact.path / file)
    with pytest.warns(UserWarning, match="is damaged, moved to .*damaged-1 and built again"):
        again = network(tmp_path)
    assert state_digest(again.model) == state_digest(first.model)
    assert len(list(first.artifact.path.parent.glob(".*damaged-1"))) == 1


def flip_a_key(path: Path) -> None:
    "Spoil the checksum that a manifest holds: a bit elsewhere in it may be a harmless change of a remark."
    about = json.loads(path.read_text()) if is_json(path) else {"sha256": "0"}
    path.write_text(json.dumps(about | {"sha256": "0" + about["sha256"][1:-1] + "x"}))


def is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except ValueError:
        return False


@pytest.mark.parametrize("number", TRANSIENT)
@pytest.mark.parametrize("kind", ["network", "genomes", "record"])
def test_an_error_of_the_system_is_no_damage(tmp_path, monkeypatch, kind, number):
    "What cannot be read now is said, stays where it is and is read the next time."
    digits = study(tmp_path)
    victim = {
        "network": next((tmp_path / "store" / "model").glob(f"[!.]*/{TENSORS}")),
        "genomes": tmp_path / "genomes" / "manifest.json",
        "record": tmp_path / "run" / "record.json",
    }[kind]
    before, real = victim.read_bytes(), open

    def fails(file, *rest, **named):
        if Path(str(file)) == victim and (not rest or "r" in rest[0]):
            raise OSError(number, os.strerror(number), str(file))
        return real(file, *rest, **named)

    reads = {"network": lambda: study(tmp_path), "genomes": lambda: GenomeSet(victim.parent),
             "record": lambda: read_record(victim.parent)}  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        patch.setattr("io.open", fails)
        with pytest.raises(OSError, match=os.strerror(number)):
            reads[kind]()
    assert victim.read_bytes() == before and not [p for p in tmp_path.rglob("*damaged*")]
    assert study(tmp_path) == digits


@pytest.mark.parametrize("how", ["cut off", "empty", "missing"])
def test_a_damaged_part_of_genomes_is_said_and_only_it_is_drawn_again(tmp_path, how):
    digits = study(tmp_path)
    part, other = (tmp_path / "genomes" / f"part-0000{k}.safetensors" for k in (1, 0))
    untouched = other.stat().st_mtime_ns
    DAMAGE[how](part)
    with pytest.raises((DamagedGenomes, RuntimeError), match="part-00001"):
        GenomeSet(part.parent).take([2])
    if how == "missing":
        assert study(tmp_path) == digits
    else:
        with pytest.warns(UserWarning, match="made again: part-00001"):
            assert study(tmp_path) == digits
    assert other.stat().st_mtime_ns == untouched


# ---------------------------------------------------------------- a full disk


WRITERS = {  # what is replaced by a disk without space, and what was finished before it filled
    "a network": ("safetensors.torch.save_file", DiskFull, ()),
    "a checkpoint": ("afgstudy.training.torch.save", DiskFull, ()),
    "genomes": ("afgstudy.afg.genome.write_whole", OSError, ("model", "attacked")),
    "a record": ("afgstudy.study.experiment.write_whole", OSError, ("model", "attacked", "genomes")),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_said_and_nothing_that_is_finished_is_lost(tmp_path, monkeypatch, writer):
    target, kind, kept = WRITERS[writer]
    digits = study(tmp_path / "whole")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(target, full)
        with pytest.raises(kind, match=r"the disk is full|No space left on device") as error:
            study(tmp_path / "small")
    assert error.value.errno == errno.ENOSPC
    there = {p.parent.name for p in (tmp_path / "small" / "store").glob("*/[!.]*")}
    there |= {"genomes"} if list((tmp_path / "small" / "genomes").glob("part-*.safetensors")) else set()
    assert there == set(kept)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "small").rglob("*.safetensors")}
    assert study(tmp_path / "small") == digits
    assert all(p.stat().st_mtime_ns == changed for p, changed in before.items()), "made again"
    assert not [p for p in (tmp_path / "small").rglob("*.part")]

# ---------------------------------------------------------------- the command itself

STUDY = {
    "a/trains": """
net = trained("lenet5", images, recipe=Recipe(epochs=4, batch_size=10))
found = attacked(FGSM(eps=0.1), net.model, images).x
exp.row("digits", "none", "FGSM", measured=float(found.mean()), n=40)
exp.row("digits", "none", "none", "weights", measured=float(sum(p.sum() for p in net.model.parameters())), unit="")
""",
    "b/draws": """
net = trained("lenet5", images, recipe=Recipe(epochs=4, batch_size=10)).model
made = build_genomes(runs_root() / "genomes", Genome(list(layers(net))[:1], 1, Visualiser.small(8, steps=1)), net,
                     images.images(slice(0, 6)), part_size=2)
exp.row("digits", "none", "none", "genomes", measured=float(made.take(range(6)).float().mean()), unit="", n=6)
""",
    "c/plots": """
fig, ax = plt.subplots(figsize=(2, 1))
ax.plot([0, seed, 3])
exp.figure(fig, "line")
exp.row("digits", "none", "none", "images", measured=len(images), unit="")
""",
}
IMPORTS = """
import matplotlib.pyplot as plt
from afgstudy.afg.drawing import Visualiser
from afgstudy.afg.genome import Genome, build_genomes
from afgstudy.attacks import FGSM
from afgstudy.data import load
from afgstudy.kept import attacked, trained
from afgstudy.keys import runs_root
from afgstudy.models import layers
from afgstudy.study.experiment import begin
from afgstudy.training import Recipe
"""
RUNS_KILLED = 100 if os.environ.get("AFGSTUDY_THOROUGH") else 3


def children(pid: int) -> list[int]:
    "The process and all that it has started, and they."
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [p for child in task.read_text().split() for p in children(int(child))]
    return found


def start_run() -> subprocess.Popen:
    "`afgstudy run --all` as a process of its own."
    code = "from afgstudy.study.cli import main; main(['run', '--all', '--jobs', '2'], prog_name='afgstudy')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **pipes)


def ended(process: subprocess.Popen) -> str:
    "What a run that nobody disturbs says."
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0 and "Traceback" not in said, said
    return said


def digits_of(sandbox) -> dict[str, list]:
    "Every row and figure of the study."
    found = {p.relative_to(sandbox.runs).parts[1:3]: read_record(p.parent) for p in sandbox.runs.rglob("record.json")}
    figures = [p.read_text() for p in sandbox.runs.rglob("*.svg")]
    return {"/".join(k): r["rows"] for k, r in sorted(found.items())} | {"figures": figures}


@pytest.mark.timeout(120 * RUNS_KILLED + 1500)
def test_afgstudy_run_killed_at_random_moments_ends_in_the_same_digits(sandbox):
    "The runner, its stock, a worker or a kernel, killed or interrupted; then the command once more."
    for name, cell in STUDY.items():
        begins = f'exp = begin("{name}", globals())\nimages = load("digits", "train", n=40)'
        sandbox.write(name, IMPORTS, begins, cell, "exp.save()")
    begin = time.monotonic()
    assert "3 done" in ended(start_run())
    seconds, digits = time.monotonic() - begin, digits_of(sandbox)
    assert set(digits) == {*STUDY, "figures"} and len(digits["figures"]) == 1
    shutil.rmtree(sandbox.runs)
    drawn, kills = random.Random(0), 0
    while kills < RUNS_KILLED:
        process = start_run()
        try:
            said = process.communicate(timeout=drawn.uniform(0, seconds))[0]
        except subprocess.TimeoutExpired:
            how = drawn.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            family = children(process.pid)
            victim = drawn.randrange(len(family))
            with suppress(ProcessLookupError):
                os.kill(family[victim], how)
                kills += 1
            print(f"{kills}: {how.name} to process {victim} of {len(family)}", flush=True)
            process.communicate(timeout=120 + 10 * seconds)  # who is not needed may be the victim
        else:  # it came to its end, so it begins anew
            assert process.returncode == 0 and digits_of(sandbox) == digits, said
            print(f"{kills}: the same digits", flush=True)
            shutil.rmtree(sandbox.runs)
    said = ended(start_run())
    assert digits_of(sandbox) == digits, said
    wrong = [p for p in sandbox.runs.rglob("*") if ".part" in p.name or ".old" in p.name or "damaged" in p.name]
    assert wrong == [], said
