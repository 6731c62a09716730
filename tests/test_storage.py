"""Looking after the store: nothing that is wanted goes, and what travels arrives as it was, or not at all."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from afgstudy.data import load
from afgstudy.kept import trained
from afgstudy.keys import StudyError
from afgstudy.store import TENSORS, DiskFull, Store, locked
from afgstudy.study.cli import main
from afgstudy.study.experiment import Experiment
from afgstudy.study.storage import LIMIT, LIST, check_parcel, export_to, import_from, strays
from afgstudy.training import Recipe


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "An empty project with a folder of runs."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = afgstudy\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFGSTUDY_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def put(n: int, kind: str = "model", size: int = 100, **spec):
    return Store().get(kind, {"n": n, **spec}, lambda scratch: {"x": torch.full((size,), float(n))})


def command(words: str, status: int = 0, **options) -> str:
    ran = CliRunner().invoke(main, ["store", *words.split()], **options)
    assert ran.exit_code == status, (ran.output, ran.exception)
    return ran.output


def record(folder: Path, *artifacts) -> Path:
    folder.mkdir(parents=True)
    named = [{"kind": a.kind, "key": a.key} for a in artifacts]
    (folder / "record.json").write_text(json.dumps({"provenance": {"artifacts": named}}))
    return folder / "record.json"


def scratch_of(digits: str, size: int = 10) -> Path:
    folder = Store().root / "model" / f".{digits * 32}.scratch"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(os.urandom(size))
    return folder


# --- several machines ---

# Builds as a process of another machine, which nobody here can know to be alive, and stands still in the middle.
FAR = """
import os, signal, socket
import torch
socket.gethostname = lambda: "another-machine"
from afgstudy import locks
from afgstudy.store import Store
locks.LEASE = 3.0

def build(scratch):
    (scratch / "checkpoint").write_text("half")
    os.kill(os.getpid(), signal.SIGSTOP)
    (scratch / "checkpoint").write_text("whole")
    return {"x": torch.ones(1)}

print(Store().get("model", {"arch": "shared"}, build).tensors["x"].item())
"""


@pytest.mark.parametrize("then", [signal.SIGKILL, signal.SIGCONT], ids=["dies", "wakes up too late"])
def test_a_builder_on_another_machine_goes_down_and_its_lease_is_taken_over(runs, monkeypatch, then):
    monkeypatch.setenv("AFGSTUDY_LOCKS", "lease")
    monkeypatch.setattr("afgstudy.locks.LEASE", 3.0)
    far = subprocess.Popen([sys.executable, "-c", FAR], stdout=subprocess.PIPE, text=True)
    while "State:\tT" not in Path(f"/proc/{far.pid}/status").read_text():
        time.sleep(0.1)
    if then == signal.SIGKILL:
        far.kill()
    began, left = time.monotonic(), []

    def build(scratch):
        left.append((scratch / "checkpoint").read_text())
        return {"x": torch.zeros(1)}

    assert Store().get("model", {"arch": "shared"}, build).tensors["x"].item() == 0
    assert left == ["half"] and time.monotonic() - began > 1.5  # not before the lease was over
    far.send_signal(then)
    assert far.communicate(timeout=60)[0] == ("0.0\n" if then == signal.SIGCONT else "")
    assert far.returncode == (0 if then == signal.SIGCONT else -signal.SIGKILL)


# --- what nobody needs ---


def test_only_what_no_record_and_no_run_refers_to_goes(runs):
    named, committed, alone = (put(n) for n in range(3))
    about = put(3, "judged", model=named.key)
    record(runs / "smoke" / "toy" / "1", named)
    record(runs.parent / "data" / "results" / "cpu" / "toy", committed)
    unfinished, damaged = scratch_of("a"), alone.path.with_name(f".{alone.path.name}.damaged-1")
    shutil.copytree(alone.path, damaged)
    assert "0 that no record" in command("gc") and "3 more" in command("gc"), "all were used within a day"
    said = command("gc --unused-for 0", input="n\n")
    assert alone.key[:12] in said and "unfinished" in said and "damaged" in said and "Remove them?" in said
    assert alone.path.exists() and unfinished.exists(), "asked, and the answer was no"
    assert "removed 3" in command("gc --unused-for 0 --yes")
    assert not alone.path.exists() and not unfinished.exists() and not damaged.exists()
    assert {a.key for a in Store().ls()} == {named.key, committed.key, about.key}


def test_records_that_name_nothing_are_counted_before_the_question(runs):
    put(0)
    assert "name no artifact" not in command("gc --unused-for 0", input="n\n")
    record(runs / "smoke" / "toy" / "1")
    assert "1 records name no artifact" in command("gc --unused-for 0", input="n\n")


def test_nothing_goes_without_an_answer(runs):
    alone = put(0)
    command("gc --unused-for 0", status=1, input="")
    assert alone.path.exists()


def test_a_record_that_cannot_be_read_is_an_error_and_nothing_goes(runs):
    alone, named = put(0), put(1)
    path = record(runs / "smoke" / "toy" / "1", named)
    for broken in ('{"provenance": ', "[]", '{"provenance": {"artifacts": [{"kind": "model"}]}}'):
        path.write_text(broken)
        assert "is no record" in command("gc --unused-for 0 --yes", status=1)
    assert alone.path.exists() and named.path.exists()


def test_what_an_unfinished_run_uses_stays(runs):
    old, new = put(0), put(1)
    os.utime(old.path, (0, 0))
    for path in old.path.iterdir():
        os.utime(path, (0, 0))
    part = runs / "smoke" / "toy" / ".0123.abcd.part"
    part.mkdir(parents=True)
    (part / "job.json").write_text("{}")
    os.utime(part / "job.json", (time.time() - 60,) * 2)
    assert "removed 1" in command("gc --unused-for 0 --yes")
    assert new.path.exists() and not old.path.exists()


def test_what_was_used_again_while_the_question_was_open_stays(runs):
    from afgstudy.study.storage import clear

    put(0)
    found = strays(Store())
    time.sleep(0.05)
    again = put(0)  # the store notes when it was used
    assert list(clear(found)) == [] and again.path.exists()


def test_what_is_being_built_is_no_stray(runs):
    unfinished = scratch_of("a")
    with locked(unfinished.with_name("a" * 32)):
        assert strays(Store()) == []
    assert [s.path for s in strays(Store())] == [unfinished]


def test_a_record_names_all_that_was_taken_from_the_store(runs):
    before = put(7)
    exp = Experiment("toy/sum", {"seed": 0})
    artifacts = [put(8), put(9, "judged"), put(8)]
    named = [a["key"] for a in exp.record()["provenance"]["artifacts"]]
    assert named == [artifacts[0].key, artifacts[1].key] and before.key not in named


# --- through a folder ---


def test_parcels_arrive_as_they_were(runs, tmp_path):
    one, other = put(0), put(1)
    unfinished = scratch_of("b")
    said = command(f"export {one.key[:12]} {other.key} bbbb")
    assert said.count("exported") == 3 and (tmp_path / "data" / "checkpoints" / "model").is_dir()
    there = Store(tmp_path / "there")
    assert [became for _, became in import_from(tmp_path / "data" / "checkpoints", there)] == ["imported"] * 3
    found = there.get("model", {"n": 0}, lambda scratch: pytest.fail("built again"))
    assert found.tensors["x"].equal(one.tensors["x"]) and found.manifest == one.manifest
    arrived = there.root / "model" / unfinished.name / "checkpoint.pt"
    assert arrived.read_bytes() == (unfinished / "checkpoint.pt").read_bytes()
    assert not list(there.root.rglob(LIST)), "the list stays behind"
    assert "was there already" in command("import")


def test_a_training_that_one_machine_began_another_ends(runs, tmp_path, monkeypatch):
    data, recipe = load("digits", "train", n=60), Recipe(epochs=4, batch_size=20)
    whole = trained("lenet5", data, recipe=recipe, store=Store(tmp_path / "whole"))
    from afgstudy import training

    epochs, real = [], training.write_checkpoint

    def dies(path, state):
        real(path, state)
        epochs.append(len(state["history"]))
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        trained("lenet5", data, recipe=recipe)
    export_to(tmp_path / "usb", [whole.artifact.key], Store())
    there = Store(tmp_path / "there")
    import_from(tmp_path / "usb", there)
    went_on = trained("lenet5", data, recipe=recipe, store=there)
    assert epochs == [1, 2, 3, 4], "the third epoch was the first one there"
    assert all(v.equal(went_on.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILT = {
    "one bit": (lambda p: flip(p / TENSORS), "tensors.safetensors is not what was exported"),
    "cut off": (lambda p: (p / TENSORS).write_bytes(b""), "tensors.safetensors is not what was exported"),
    "manifest": (lambda p: flip(p / "manifest.json"), "manifest.json is not what was exported"),
    "missing": (lambda p: (p / TENSORS).unlink(), "tensors.safetensors is missing"),
    "left over": (lambda p: (p / "more").write_text("x"), "more is not listed"),
    "other key": (lambda p: p.rename(p.with_name("c" * 32)), "it says that it is model/"),
    "a link": (lambda p: (p / "more").symlink_to("/etc/hostname"), "is a link"),
    "list": (lambda p: (p / LIST).write_text("{}"), "is no list of a parcel"),
    "torn list": (lambda p: (p / LIST).write_bytes((p / LIST).read_bytes()[:50]), "is no list of a parcel"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_parcel_is_refused_by_name_and_nothing_is_imported(runs, tmp_path, how):
    spoil, says = SPOILT[how]
    sound, spoilt = put(0), put(1)
    folder = tmp_path / "usb"
    _, parcel = export_to(folder, [sound.key, spoilt.key], Store())
    spoil(folder / parcel.place)
    there = Store(tmp_path / "there")
    with pytest.raises(StudyError, match=says):
        import_from(folder, there)
    assert not there.root.exists()


@pytest.mark.parametrize("name", ["../../../out", "/out", "a/../../out", "..\\out"])
def test_a_list_that_names_files_outside_is_refused(runs, tmp_path, name):
    (parcel,) = export_to(tmp_path / "usb", [put(0).key], Store())
    path = tmp_path / "usb" / parcel.place / LIST
    facts = json.loads(path.read_text())
    facts["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    path.write_text(json.dumps(facts))
    with pytest.raises(StudyError, match="names files outside its folder"):
        import_from(tmp_path / "usb", Store(tmp_path / "there"))


def test_an_artifact_under_another_key_is_refused_even_with_a_fitting_list(runs, tmp_path):
    "Otherwise the weights of one training would come back as those of another."
    (parcel,) = export_to(tmp_path / "usb", [put(0).key], Store())
    old = tmp_path / "usb" / parcel.place
    new = old.rename(old.with_name("d" * 32))
    facts = json.loads((new / LIST).read_text())
    (new / LIST).write_text(json.dumps(facts | {"key": "d" * 32}))
    with pytest.raises(StudyError, match=r"manifest.json describes another artifact"):
        check_parcel(new)


def test_more_than_twenty_megabytes_are_refused_by_name(runs, tmp_path):
    small, large = put(0, size=1_000_000), put(1, size=4_500_000)  # 4 and 18 MB
    folder = tmp_path / "usb"
    export_to(folder, [small.key], Store())
    before = sorted(folder.rglob("*"))
    with pytest.raises(StudyError) as error:
        export_to(folder, [large.key], Store())
    assert f"model/{large.key[:32]} (18.0 MB)" in str(error.value) and "more than the 20.0 MB" in str(error.value)
    assert sorted(folder.rglob("*")) == before, "nothing was copied"
    export_to(folder, [small.key], Store())  # the same again replaces, it does not add
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < LIMIT


def test_a_build_that_runs_does_not_travel(runs, tmp_path):
    unfinished = scratch_of("a")
    with locked(unfinished.with_name("a" * 32)), pytest.raises(StudyError, match="is being built by a process"):
        export_to(tmp_path / "usb", ["aaaa"], Store())
    assert not list((tmp_path / "usb").rglob(LIST))


@pytest.mark.parametrize("seen", ["before", "while writing"])
def test_a_full_disk_leaves_no_half_parcel(runs, tmp_path, monkeypatch, seen):
    one, other, folder = put(0), put(1), tmp_path / "usb"
    export_to(folder, [one.key], Store())
    before = sorted(p for p in folder.rglob("*") if p.is_file())

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        if seen == "before":
            usage = shutil.disk_usage(tmp_path)._replace(free=1000)
            disk.setattr("afgstudy.store.shutil.disk_usage", lambda path: usage)
        else:
            disk.setattr("afgstudy.study.storage.shutil.copyfile", full)
        with pytest.raises(DiskFull, match="the disk is full"):
            export_to(folder, [one.key, other.key], Store())
        assert sorted(p for p in folder.rglob("*") if p.is_file()) == before, "the old parcel is still whole"
        there = Store(tmp_path / "there")
        with pytest.raises(DiskFull):
            import_from(folder, there)
        assert there.ls() == [] and not [p for p in there.root.rglob("*") if p.suffix != ".lock" and p.is_file()]
        assert "the disk is full" in command(f"export {other.key[:12]} --to {folder}", status=1)
    assert [became for _, became in import_from(folder, there)] == ["imported"]


def test_the_list_says_what_an_attacked_set_is(runs):
    from afgstudy.attacks import FGSM
    from afgstudy.kept import attacked
    from afgstudy.models import create

    attacked(FGSM(eps=0.1), create("lenet5", channels=1, size=28, seed=0).eval(), load("digits", "test", n=4), seed=7)
    assert "call=attacked, FGSM, 7, 512" in command("ls")


def test_mistakes_are_one_line(runs, tmp_path):
    one, two = put(0), put(1)
    for words, says in (
        ("export zz", "nothing in the store with a key that begins with 'zz'"),
        ("import", "no parcels in"),
        (f"import {tmp_path}", "no parcels in"),
    ):
        said = command(words, status=1)
        assert says in said and "Traceback" not in said
    with pytest.raises(StudyError, match="nothing in the store"):
        export_to(tmp_path / "usb", [""], Store())
    assert one.key != two.key and command("export", status=2)


def test_committed_parcels_are_whole_and_small(project):
    folder = project / "data" / "checkpoints"
    for path in folder.glob(f"*/*/{LIST}"):
        check_parcel(path.parent)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= LIMIT
