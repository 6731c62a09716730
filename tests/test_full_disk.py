"""A full disk in every writer: what is finished stays, nothing half gets a final name, and the error names the file."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socketserver
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError

from afgstudy import hub, models, weights
from afgstudy.afg.drawing import Visualiser
from afgstudy.afg.genome import Genome, build_genomes
from afgstudy.data import Download, DownloadError, load
from afgstudy.data.inventory import fetch, unpack
from afgstudy.keys import file_checksum, put_in_place, write_whole
from afgstudy.models import create, layers
from afgstudy.plots import save_figure
from afgstudy.store import Store
from afgstudy.study import records
from afgstudy.study.cli import main
from afgstudy.study.experiment import Experiment
from afgstudy.study.layout import lay_out
from afgstudy.study.report import report
from afgstudy.study.storage import export_to, import_from
from afgstudy.training import write_checkpoint

NO_SPACE = (errno.ENOSPC, os.strerror(errno.ENOSPC))
CACHES = {".lock", "checksums.json", "fingerprints.json", "sources.json"}  # these may come and go


# ---------------------------------------------------------------- a disk that is full


class Full(io.FileIO):
    "A file on a disk that takes so many bytes more."

    disk: "Disk"

    def write(self, content) -> int:
        content = bytes(content)
        self.disk.left -= len(content)
        if self.disk.left < 0:
            super().write(content[: len(content) // 2])  # the half that did fit
            raise OSError(*NO_SPACE)
        return super().write(content)


@dataclass
class Disk:
    "What fails below a folder: bytes beyond `left`, the n-th rename, every fsync."

    root: Path
    left: float = float("inf")
    renames: float = float("inf")
    syncs: bool = True
    written: int = 0
    renamed: int = 0
    real: dict = field(default_factory=dict)

    def here(self, path) -> bool:
        return isinstance(path, str | Path) and self.root in Path(path).absolute().parents

    def open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not (self.here(file) and set(mode) & set("wax+")):
            return self.real["open"](file, mode, buffering, encoding, errors, newline, closefd, opener)
        kind = type("Full", (Full,), {"disk": self})
        raw = kind(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    def save_file(self, tensors, filename, metadata=None) -> None:
        "As safetensors' own, which writes without Python and names no file."
        content = self.real["save"](tensors, metadata)
        self.left -= len(content)
        if self.left < 0:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        Path(filename).write_bytes(content)

    def rename(self, source, target, **named):
        self.renamed += self.here(target)
        if self.here(target) and self.renamed == self.renames:
            raise OSError(*NO_SPACE, str(source), None, str(target))
        return self.real["replace"](source, target, **named)

    def fsync(self, handle) -> None:
        if not self.syncs:
            raise OSError(*NO_SPACE)


@contextmanager
def full(disk: Disk, monkeypatch):
    "Writes below the folder meet this disk."
    import safetensors.torch

    disk.real = {"open": open, "replace": os.replace, "save": safetensors.torch.save}
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", disk.open)
        patch.setattr("io.open", disk.open)
        patch.setattr("os.replace", disk.rename)
        patch.setattr("os.rename", disk.rename)
        patch.setattr("os.fsync", disk.fsync)
        patch.setattr("safetensors.torch.save_file", disk.save_file)
        patch.setattr("shutil._USE_CP_SENDFILE", False)  # `shutil` copies with it past every file object
        yield


# ---------------------------------------------------------------- the writers


@dataclass
class Writer:
    "Something that writes: called as `write(version)`, below `root`."

    root: Path
    write: Callable[[str], object]
    leaves: tuple[str, ...] = ()  # what it may leave under a name that nobody reads
    unnamed: bool = False  # the error cannot name a file


def number(version: str) -> int:
    return {"old": 0, "new": 1}[version]


def a_small_file(place: Path) -> Writer:
    return Writer(place, lambda v: write_whole(place / "file.json", json.dumps({"version": v})))


def a_folder(place: Path) -> Writer:
    def write(v: str) -> None:
        part = place / ".part"
        try:
            write_whole(part / "one", v)
            write_whole(part / "two", v)
            put_in_place(part, place / "folder")
        finally:
            shutil.rmtree(part, ignore_errors=True)

    return Writer(place, write)


def an_artifact(place: Path) -> Writer:
    return Writer(place, lambda v: Store(place).get("model", {"v": v}, lambda scratch: {"x": torch.ones(50)}),
                  leaves=(".scratch",))  # fmt: skip


def a_checkpoint(place: Path) -> Writer:
    "In the scratch folder of an artifact, as training writes it."

    def build(v: str, scratch: Path) -> dict:
        write_checkpoint(scratch / "checkpoint.pt", {"epoch": v})
        return {"x": torch.ones(3)}

    return Writer(place, lambda v: Store(place).get("model", {"v": v}, functools.partial(build, v)),
                  leaves=(".scratch",))  # fmt: skip


@functools.cache
def network():
    return create("lenet5", channels=1, size=28, seed=0).eval()


def genomes(place: Path) -> Writer:
    encoding = Genome(list(layers(network()))[:1], 1, Visualiser.small(8, steps=1))
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return Writer(place, lambda v: build_genomes(place / v, encoding, network(), x, part_size=2))


def genome_page(place: Path) -> Writer:
    build_genomes(place / "set", Genome(list(layers(network()))[:1], 1, Visualiser.small(8, steps=1)), network(),
                  torch.rand(2, 1, 28, 28))  # fmt: skip
    return Writer(place, lambda v: command(f"genome show {place / 'set'} {number(v)} -o {place / 'page.png'}"))


def a_record(place: Path) -> Writer:
    def write(v: str) -> None:
        exp = Experiment("toy/table", {"seed": 0})
        exp.folder = place / "run"
        exp.row("digits", "none", "FGSM", measured=number(v), n=6)
        exp.save()

    return Writer(place, write)


def a_figure(place: Path) -> Writer:
    def write(v: str) -> None:
        plt.rcParams["svg.hashsalt"] = "the same names in the same drawing"
        fig, ax = plt.subplots(figsize=(1, 1))
        ax.plot([0, 1 + number(v)])
        save_figure(fig, place / "figures" / "line")
        plt.close(fig)

    return Writer(place, write)


def a_run(place: Path, v: str) -> None:
    "What a run of an experiment leaves in the folder of runs."
    exp = Experiment("toy/table", {"seed": 0})
    exp.preset, exp.folder = "cpu", place / "runs" / "cpu" / "toy" / "table" / "ab"
    exp.row("digits", "none", "FGSM", measured=number(v), n=6)
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.plot([0, 1 + number(v)])
    exp.figure(fig, "line")
    plt.close(fig)
    exp.save()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"print({v!r})", id="say")])
    nbformat.write(notebook, exp.folder / "notebook.ipynb")
    write_whole(exp.folder.parent / "latest", "ab\n")


def a_report(place: Path) -> Writer:
    "Of what is committed."

    def write(v: str) -> None:
        rebuilt(place, v)
        with healthy():
            records.publish("toy/table", "cpu", place / "runs")
        report(committed=True, runs=place / "reports")

    return Writer(place / "reports", write)


def rebuilt(place: Path, v: str) -> None:
    "The run of a version, made where the disk is not full."
    with healthy():
        a_run(place, v)


def a_publication(place: Path) -> Writer:
    def write(v: str) -> None:
        rebuilt(place, v)
        records.publish("toy/table", "cpu", place / "runs", place)

    return Writer(place / "data", write)


def prose(place: Path) -> Writer:
    written = place / "nbs" / "experiments" / "toy" / "table.ipynb"
    rebuilt(place, "old")
    records.publish("toy/table", "cpu", place / "runs", place)

    def write(v: str) -> None:
        with healthy():
            written.parent.mkdir(parents=True, exist_ok=True)
            cells = [nbformat.v4.new_code_cell("print('old')", id="say"), nbformat.v4.new_markdown_cell(v, id="said")]
            nbformat.write(nbformat.v4.new_notebook(cells=cells), written)
        records.renew_prose(place)

    return Writer(place / "data", write)


def a_download(place: Path) -> Writer:
    def write(v: str) -> None:
        with healthy():
            archive = place / "server" / v / "numbers.gz"
            archive.parent.mkdir(parents=True, exist_ok=True)
            archive.write_bytes(gzip.compress(v.encode() * 500, mtime=0))
            md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        (place / "sets").mkdir(exist_ok=True)
        wanted = Download((archive.as_uri(), archive.as_uri()), f"{v}/numbers.gz", md5)
        unpack(fetch(wanted, place / "sets"), place / "sets", f"{v}/numbers")

    return Writer(place / "sets", write)


def an_export(place: Path) -> Writer:
    store, build = Store(place / "store"), lambda scratch: {"x": torch.ones(50)}
    keys = {v: store.get("model", {"v": v}, build).key for v in ("old", "new")}
    return Writer(place / "parcels", lambda v: export_to(place / "parcels", [keys[v]], store))


def an_import(place: Path) -> Writer:
    store, build = Store(place / "store"), lambda scratch: {"x": torch.ones(50)}
    for v in ("old", "new"):
        export_to(place / "parcels" / v, [store.get("model", {"v": v}, build).key], store)
    return Writer(place / "other", lambda v: import_from(place / "parcels" / v, Store(place / "other")))


def defence(place: Path, v: str) -> Path:
    "Publish an untrained network."
    attacked = hub.Attacked("PGD", "linf", 0.3, 40.0, 31.0, 50.0, 4)
    made = create("lenet5", channels=1, size=28, seed=number(v)).eval()
    return hub.publish_model("a-defence", made, load("digits", "test", n=4), "For a test", {}, attacked, root=place)


def a_defence(place: Path) -> Writer:
    return Writer(place, functools.partial(defence, place))


def a_fetched_defence(place: Path) -> Writer:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            "Says nothing."

    def write(v: str) -> None:
        os.environ["AFGSTUDY_WEIGHTS"] = str(place / "weights")  # the fixture below takes it away
        with healthy():
            shutil.rmtree(place / "served", ignore_errors=True)
            defence(place / "served", v)
        handler = functools.partial(Quiet, directory=place / "served")
        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as web:
            threading.Thread(target=web.serve_forever, daemon=True).start()
            os.environ["AFGSTUDY_MODELS"] = f"http://127.0.0.1:{web.server_address[1]}"
            try:
                hub.fetched("a-defence")
            finally:
                web.shutdown()

    return Writer(place / "weights", write)


def converted_weights(place: Path) -> Writer:
    "Of a source that is there already; the version decides the file's name."

    def write(v: str) -> None:
        known = weights.RESNET32
        with healthy():
            source = place / "sets" / f"{v}.th"
            source.parent.mkdir(exist_ok=True)
            net = create("resnet32", classes=10, size=32, seed=number(v)).network
            torch.save({f"module.{k}": t for k, t in net.state_dict().items()}, source)
            download = Download((source.as_uri(),), source.name, sha256=file_checksum(source))
            weights.KNOWN[v] = replace(known, name=v, sha256="", download=download)
        try:
            weights.get(v, place / "weights")
        finally:
            weights.KNOWN.pop(v)

    return Writer(place / "weights", write, leaves=(".th",))  # a whole source, which the next attempt takes


def a_file_of_weights(place: Path) -> Writer:
    place.mkdir(exist_ok=True)
    nets = {v: create("lenet5", channels=1, size=28, seed=number(v)) for v in ("old", "new")}
    return Writer(place, lambda v: models.save_weights(nets[v], place / "net.safetensors"), unnamed=True)


def a_study(place: Path) -> Writer:
    source = place / "package"
    for name in ("nbs/experiments/a/b.ipynb", "nbs/experiments/presets/cpu/a/b.yaml", "data/published/a.csv"):
        write_whole(source / name, name)
    return Writer(place / "made", lambda v: lay_out(place / "made" / v, source))


def command(words: str) -> None:
    ran = CliRunner().invoke(main, words.split())
    if ran.exit_code:
        assert isinstance(ran.exception, SystemExit), ran.exception
        raise OSError(*NO_SPACE, ran.output) if os.strerror(errno.ENOSPC) in ran.output else AssertionError(ran.output)


WRITERS = [
    a_small_file, a_folder, an_artifact, a_checkpoint, genomes, genome_page, a_record, a_figure, a_report,
    a_publication, prose, a_download, an_export, an_import, a_defence, a_fetched_defence, converted_weights,
    a_file_of_weights, a_study,
]  # fmt: skip


# ---------------------------------------------------------------- the tests

_disk: list[Disk] = []


@contextmanager
def healthy():
    "What a test prepares is on another disk."
    if not _disk:
        yield
        return
    disk, _disk[0] = _disk[0], None
    before = (disk.left, disk.renames, disk.renamed, disk.syncs)
    disk.left, disk.renames, disk.syncs = float("inf"), float("inf"), True
    try:
        yield
    finally:
        disk.left, disk.renames, disk.renamed, disk.syncs = before
        _disk[0] = disk


def content(root: Path) -> dict[str, bytes]:
    "Every file below a folder that a reader would take for something, and what is in it."
    files = [p for p in root.rglob("*") if p.is_file()] if root.exists() else []
    return {str(p.relative_to(root)): p.read_bytes() for p in files if not any(p.name.endswith(c) for c in CACHES)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty project."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = afgstudy\n")
    monkeypatch.chdir(tmp_path)
    for name in ("AFGSTUDY_RUNS", "AFGSTUDY_EXPERIMENTS", "AFGSTUDY_RUN_DIR", "AFGSTUDY_WEIGHTS", "AFGSTUDY_MODELS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(hub, "checkout_folder", lambda: tmp_path / "no checkout")
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


HOW = {"no byte": {"left": 0}, "half of the bytes": {"left": 0.5}, "first rename": {"renames": 1},
       "second rename": {"renames": 2}, "fsync": {"syncs": False}}  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("make", WRITERS, ids=lambda make: make.__name__)
def test_a_full_disk_loses_nothing_and_says_where(place, monkeypatch, make, how):
    writer = make(place)
    writer.write("old")
    before, faults = content(writer.root), dict(HOW[how])
    needed = bytes_needed(make, place.parent / "measured", monkeypatch)
    if faults.get("left"):
        faults["left"] = needed["bytes"] // 2
    if faults.get("renames", 0) > needed["renames"] or (how == "fsync" and not needed["syncs"]):
        pytest.skip("this writer has no such step")
    disk = Disk(writer.root, **faults)
    _disk[:] = [disk]
    try:
        with full(disk, monkeypatch), pytest.raises((OSError, SafetensorError, DownloadError)) as error:
            writer.write("new")
    finally:
        _disk.clear()
    assert os.strerror(errno.ENOSPC) in str(error.value) or "disk is full" in str(error.value), error.value
    assert writer.unnamed or str(writer.root) in str(error.value), f"which file? {error.value}"
    after = {k: v for k, v in content(writer.root).items() if not any(part in k for part in writer.leaves)}
    whole = content(place.parent / "measured" / writer.root.relative_to(place.parent))
    lost = {k for k, v in before.items() if after.get(k) not in (v, whole.get(k, v))}
    assert not lost, f"lost or changed: {lost}"
    half = {k for k, v in after.items() if k not in before and len(whole.get(k, b"")) != len(v)}
    assert not half, f"half a file, or one that nobody knows: {half}"
    writer.write("new")
    assert content(writer.root) != before


def bytes_needed(make, elsewhere: Path, monkeypatch) -> dict[str, int]:
    "What the second version writes on a disk with room, at another place."
    elsewhere.mkdir()
    (elsewhere / "place").mkdir()
    writer = make(elsewhere / "place")
    writer.write("old")
    disk = Disk(writer.root, left=1 << 40)
    synced = []
    disk.fsync = synced.append
    _disk[:] = [disk]
    with full(disk, monkeypatch):
        writer.write("new")
    _disk.clear()
    return {"bytes": (1 << 40) - disk.left, "renames": disk.renamed, "syncs": len(synced)}


def test_a_notebook_on_a_full_disk_says_which(place, monkeypatch):
    "papermill writes it after every cell, and its error names no file."
    from afgstudy.study.worker import execute_notebook, kernel_manager_class

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1", metadata={"tags": ["parameters"]})])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
    nbformat.write(notebook, place / "toy.ipynb")
    (place / "part").mkdir()
    job = {"experiment": "toy", "notebook": str(place / "toy.ipynb"), "parameters": {}}
    kernels = kernel_manager_class()
    disk = Disk(place / "part", left=100)  # room for `progress.json`
    with full(disk, monkeypatch), pytest.raises(OSError, match=r"No space left on device: .*notebook\.ipynb"):
        execute_notebook(job, place / "part", kernels)
    kernels.kill_all()


def test_a_run_from_another_machine_that_does_not_fit_fails_alone(place, monkeypatch):
    "The others go on; and the earlier result of this one stays."
    from concurrent.futures import Future

    from afgstudy.study.execute import Outcome, _outcome
    from afgstudy.study.planning import Job

    job = Job("toy", "cpu", {}, "toy.ipynb", runs=str(place), key="ab" * 32)
    write_whole(job.folder / "record.json", "{}")
    came: Future = Future()
    came.set_result(Outcome(job, "done", files={"record.json": b"x" * 1000, "run.json": b"{}"}))
    with full(Disk(place, left=500), monkeypatch):
        outcome = _outcome(came, job)
    assert outcome.state == "failed"
    assert "record.json" in outcome.message and os.strerror(errno.ENOSPC) in outcome.message
    assert content(place) == {str((job.folder / "record.json").relative_to(place)): b"{}"}
