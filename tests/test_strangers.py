"""What may come from a stranger, or from a disk that somebody arranged: names, links, folders, versions, markup.

A hostile record in the report and on the site: see test_site. The thousand malformed inputs: see test_malformed."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from afgstudy import hub, weights
from afgstudy.afg.genome import GenomeSet
from afgstudy.data import DownloadError
from afgstudy.data.inventory import unpack
from afgstudy.keys import StudyError
from afgstudy.models import create
from afgstudy.store import Store
from afgstudy.study.cli import main
from afgstudy.study.experiment import Experiment, published
from afgstudy.study.parameters import full_parameters
from afgstudy.study.storage import LIST, export_to, import_from

pytest_plugins = ["study_sandbox"]
MARKUP = '<script>window.hurt = 1</script><img src=x onerror="hurt()">&amp;'


def test_a_table_in_a_notebook_reads_no_name_as_markup(sandbox):
    exp = Experiment("toy/table", {"seed": 0})
    for method in ("a", MARKUP):
        for attack in ("b", MARKUP):
            exp.row(MARKUP, method, attack, MARKUP, measured=50.0, n=10, unit=MARKUP)
    for table in (exp.table(), exp.table(wide="attack")):
        page = table.to_html()
        assert "<script>" not in page and "<img" not in page and "&lt;script&gt;" in page


LATEST = ["../../../../etc", "/etc", "..", ".", "", "a/b", "ab\ncd", "ab\0", "x" * 5000, "-rf /"]


@pytest.mark.parametrize("text", LATEST, ids=range(len(LATEST)))
def test_latest_names_a_folder_beside_it_or_is_refused(sandbox, text):
    folder = sandbox.runs / "cpu" / "toy" / "table"
    folder.mkdir(parents=True)
    (folder / "latest").write_text(text)
    for command in ("report", "publish toy/table"):
        said = sandbox(command, status=1)
        assert f"{folder}/latest should name a run's folder beside it" in said, said


def test_latest_may_be_no_folder_and_the_run_that_it_names_no_link(sandbox):
    folder = sandbox.runs / "cpu" / "toy" / "table"
    (folder / "latest").mkdir(parents=True)
    assert "latest should name a run's folder beside it, and is a folder" in sandbox("report", status=1)
    (folder / "latest").rmdir()
    (folder / "latest").write_text("ab\n")
    (folder / "ab").symlink_to("/etc")
    assert "ab is a link; a run is kept in a folder of its own" in sandbox("report", status=1)


# ---------------------------------------------------------------- folders where files are expected


def a_preset(place: Path) -> tuple[Path, object]:
    (place / "toy.ipynb").write_text(json.dumps(NOTEBOOK))
    return place / "presets" / "cpu" / "toy.yaml", lambda: full_parameters("toy", "cpu", folder=place)


def a_notebook(place: Path):
    return place / "toy.ipynb", lambda: full_parameters("toy", "smoke", folder=place)


def published_numbers(place: Path):
    return place / "aalp.csv", lambda: published("aalp", folder=place)


def a_manifest_of_genomes(place: Path):
    return place / "manifest.json", lambda: GenomeSet(place)


def a_list_of_a_parcel(place: Path):
    key = Store(place / "store").get("model", {"a": 1}, lambda scratch: {"x": torch.ones(3)}).key
    [parcel] = export_to(place / "parcels", [key], Store(place / "store"))
    return place / "parcels" / parcel.place / LIST, lambda: import_from(place / "parcels", Store(place / "other"))


def a_described_defence(place: Path):
    return place / "a-defence" / hub.ABOUT, lambda: hub.defence_in(place / "a-defence", "cpu")


def tensors_of_a_defence(place: Path):
    about = {"name": "a-defence", "kind": "model", "networks": {}, "file": {"sha256": "0", "bytes": 1}}
    (place / "a-defence").mkdir()
    (place / "a-defence" / hub.ABOUT).write_text(json.dumps(about))
    return place / "a-defence" / hub.TENSORS, lambda: hub.defence_in(place / "a-defence", "cpu")


def pretrained_weights(place: Path):
    path = place / "net.safetensors"
    return path, lambda: create("lenet5", channels=1, size=28, weights=path)


CELL = {"cell_type": "code", "source": "n: int = 3  # images; at least 1", "metadata": {"tags": ["parameters"]}}
NOTEBOOK = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [CELL | {"outputs": []}]}
FILES = [a_preset, a_notebook, published_numbers, a_manifest_of_genomes, a_list_of_a_parcel, a_described_defence,
         tensors_of_a_defence, pretrained_weights]  # fmt: skip


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
def test_a_folder_where_a_file_is_expected_is_refused_by_name(tmp_path, make):
    path, read = make(tmp_path)
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)
    with pytest.raises((StudyError, hub.ModelError, ValueError, OSError)) as error:
        read()
    assert str(path) in str(error.value) or path.stem in str(error.value), error.value


def test_a_folder_where_a_file_is_expected_is_one_line_on_the_command_line(sandbox, monkeypatch):
    sandbox.write("toy")
    (sandbox.folder / "presets" / "cpu" / "toy.yaml").mkdir(parents=True)
    assert "toy.yaml" in sandbox("run toy --preset cpu", status=1)
    monkeypatch.setenv("AFGSTUDY_WEIGHTS", str(sandbox.root))
    (sandbox.root / "resnet32_cifar10.safetensors").mkdir()
    assert weights.check("resnet32_cifar10") != ""
    ran = CliRunner().invoke(main, ["weights", "check", "resnet32_cifar10"])
    assert ran.exit_code == 1 and isinstance(ran.exception, SystemExit), ran.exception


# ---------------------------------------------------------------- names that lead elsewhere, other versions


@pytest.mark.parametrize("name", ["../outside", "/var/outside", "a/../../outside"])
def test_an_archive_unpacks_nothing_outside_its_folder(tmp_path, name):
    content = tmp_path / "content"
    content.write_text("x")
    with tarfile.open(tmp_path / "archive.tar", "w") as tar:
        tar.add(content, name)
    (tmp_path / "root").mkdir()
    with pytest.raises((tarfile.TarError, OSError), match=r"outside|\.set\.part"):  # or the slash is left out
        unpack(tmp_path / "archive.tar", tmp_path / "root", "set/")
    assert not (tmp_path / "outside").exists() and not list((tmp_path / "root").iterdir())


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"format": 2, "models": {}}, "has format 2; this version of afgstudy reads format 1"),
        ({"models": {"../../outside": {"file": {"sha256": "0", "bytes": 1}}}}, "is not an index"),
        ({"models": {"a": {"file": {}}}}, "is not an index"),
        ({"models": 3}, "could not be read"),
        ([], "could not be read"),
    ],
)
def test_a_foreign_index_of_defences_is_refused_by_name(tmp_path, monkeypatch, index, says):
    (tmp_path / hub.INDEX).write_text(json.dumps(index))
    monkeypatch.setenv("AFGSTUDY_MODELS", tmp_path.as_uri())
    with pytest.raises(DownloadError, match=says) as error:
        hub.remote_index()
    assert hub.INDEX in str(error.value)


FOREIGN = [{"format": 2}, {"kind": "../model"}, {"key": "../../x"}, {"files": []}, {"kind": 3}]


@pytest.mark.parametrize("change", FOREIGN)
def test_a_foreign_parcel_is_refused_by_name(tmp_path, change):
    path, read = a_list_of_a_parcel(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StudyError, match=path.parent.name):
        read()
    assert not (tmp_path / "other").exists()
