"""Data: the real file formats in small, splits as properties, damage and its messages, the real sets."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import socketserver
import struct
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets as tvd
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2.functional import resize

from afgstudy import data
from afgstudy.data import (
    SOURCES,
    DamagedDataset,
    Dataset,
    DownloadError,
    MissingDataset,
    crop_flip,
    files,
    inventory,
    load,
    loading,
    shapes,
    sources,
    stream,
)

# ---------------------------------------------------------------- small files in the real formats


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def photograph(path: Path, colour: tuple[int, int, int], size=(60, 40)) -> Path:
    "A JPEG of one colour, wider than high."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, quality=95)
    return path


def write_mnist(root: Path, compressed: bool = False) -> dict[str, np.ndarray]:
    "The four idx files of MNIST with 40 + 20 images; as .gz where they are to be downloaded."
    raw, written = root / "MNIST/raw", {}
    raw.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 40), ("t10k", 20)):
        x, y = pixels(n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
        files = {
            f"{part}-images-idx3-ubyte": struct.pack(">4i", 2051, n, 28, 28) + x.tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">2i", 2049, n) + y.tobytes(),
        }
        for name, content in files.items():
            (raw / (name + ".gz" * compressed)).write_bytes(gzip.compress(content) if compressed else content)
        written[part] = x
    return written


def small(monkeypatch, name: str, **changes) -> None:
    "Let the source of a set be that of the small files a test wrote."
    monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], **changes))


def write_svhn(root: Path, monkeypatch, n: int = 30) -> np.ndarray:
    "The two .mat files of SVHN; torchvision is told their MD5 sums in place of the published ones."
    root.mkdir(parents=True, exist_ok=True)
    x = pixels(n, 32, 32, 3)
    for split in ("train", "test"):
        url, file, _ = tvd.SVHN.split_list[split]
        y = np.where(np.arange(n) % 10 == 0, 10, np.arange(n) % 10).astype(
            np.uint8
        )  # the digit 0 is labelled 10
        scipy.io.savemat(root / file, {"X": x.transpose(1, 2, 3, 0), "y": y[:, None]}, do_compression=True)
        monkeypatch.setitem(tvd.SVHN.split_list, split, [url, file, md5(root / file)])
    sums = {file: md5(root / file) for file in SOURCES["svhn"].md5}
    small(monkeypatch, "svhn", md5=sums)
    return x


def write_cifar10(root: Path, monkeypatch, n: int = 20) -> np.ndarray:
    "The seven pickles of CIFAR-10."
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    x = pixels(n, 3, 32, 32)
    sums = {}
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": x.reshape(n, 3072), "labels": [i % 10 for i in range(n)], "batch_label": file}
        (folder / file).write_bytes(pickle.dumps(batch, 2))
        sums[file] = md5(folder / file)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    monkeypatch.setattr(
        tvd.CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(tvd.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(tvd.CIFAR10, "meta", {**tvd.CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    small(monkeypatch, "cifar10", md5={path: md5(root / path) for path in SOURCES["cifar10"].md5})
    return x


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi TT RS Coupe 2012"]


def write_cars(root: Path) -> None:
    "Stanford Cars: MATLAB struct arrays and JPEGs; classes are numbered from 1."
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    fields = [(f, object) for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, annotations in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        rows = [(1, 1, 50, 30, np.uint8(i % 3 + 1), f"{i + 1:05d}.jpg") for i in range(9)]
        scipy.io.savemat(base / annotations, {"annotations": np.array([rows], dtype=fields)})
        for i in range(9):
            photograph(
                base / f"cars_{part}" / f"{i + 1:05d}.jpg", (80 * (i % 3), 40, 0 if part == "train" else 255)
            )


def write_aircraft(root: Path) -> None:
    "FGVC-Aircraft: lists of images and of variants, whose names have spaces and slashes."
    folder = root / "fgvc-aircraft-2013b/data"
    variants = ["707-320", "Cessna 172", "F/A-18"]
    for level, names in (("variants", variants), ("families", ["Boeing 707", "Cessna", "F/A-18"])):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{level}.txt").write_text("\n".join(names) + "\n")
    for part, first in (("trainval", 0), ("test", 100)):
        lines = [(f"{first + i:07d}", i % 3) for i in range(12)]
        (folder / f"images_variant_{part}.txt").write_text("".join(f"{n} {variants[v]}\n" for n, v in lines))
        families = ["Boeing 707", "Cessna", "F/A-18"]
        (folder / f"images_family_{part}.txt").write_text("".join(f"{n} {families[v]}\n" for n, v in lines))
        for name, variant in lines:
            photograph(folder / "images" / f"{name}.jpg", (variant * 100, 10, 10))


SYNSETS = [("n02012849", "crane"), ("n03126707", "crane"), ("n01440764", "tench, Tinca tinca")]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def jpeg(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (50, 70), colour).save(out, "JPEG")
    return out.getvalue()


def write_imagenet_archives(root: Path, monkeypatch) -> None:
    "ILSVRC-2012 as it is handed out: the devkit and two archives of archives, three classes, small."
    folder = root / "imagenet"
    folder.mkdir(parents=True)
    kinds = [(f, object) for f in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
                                   "wordnet_height", "num_train_images")]  # fmt: skip
    leaves = [
        (i + 1, wnid, words, "a thing", 0, np.array([]), 0, 4) for i, (wnid, words) in enumerate(SYNSETS)
    ]
    inner = (4, "n00001740", "entity", "what is", 3, np.array([1, 2, 3]), 1, 0)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([*leaves, inner], dtype=kinds)[:, None]})
    archives = {kind: folder / name for kind, (name, _) in tvd.imagenet.ARCHIVE_META.items()}
    truth = [1, 2, 3, 3, 2, 1]
    with tarfile.open(archives["devkit"], "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        text = "".join(f"{i}\n" for i in truth).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text)
    with tarfile.open(archives["train"], "w") as tar:
        for k, (wnid, _) in enumerate(SYNSETS):
            one = io.BytesIO()
            with tarfile.open(fileobj=one, mode="w") as members:
                for i in range(4):
                    add(members, f"{wnid}_{i}.JPEG", jpeg((k * 100, 0, 0)))
            add(tar, f"{wnid}.tar", one.getvalue())
    with tarfile.open(archives["val"], "w") as tar:
        for i, number in enumerate(truth):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(((number - 1) * 100, 0, 0)))
    sums = {kind: (path.name, md5(path)) for kind, path in archives.items()}
    monkeypatch.setattr(tvd.imagenet, "ARCHIVE_META", sums)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    "An empty data root that every call finds."
    monkeypatch.setenv("AFGSTUDY_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("AFGSTUDY_DEVICE", "cpu")
    return tmp_path / "sets"


# ---------------------------------------------------------------- the readers


def test_mnist_files(root):
    written = write_mnist(root)
    train, held, test = (load("mnist", s) for s in data.SPLITS)
    assert (len(train), len(held), len(test)) == (36, 4, 20) and test.shape == (1, 28, 28)
    assert np.array_equal(test.x[:, 0].numpy(), written["t10k"])
    assert train.classes == tuple("0123456789") and torch.equal(test.y, torch.arange(20) % 10)


def test_svhn_files(root, monkeypatch):
    x = write_svhn(root, monkeypatch)
    test = load("svhn", "test")
    assert np.array_equal(test.x.numpy(), x.transpose(0, 3, 1, 2)) and test.x.is_contiguous()
    assert torch.equal(test.y, torch.arange(30) % 10), "the label 10 of SVHN is the digit 0"
    assert len(load("svhn", "train")) == 27 and len(load("svhn", "validation")) == 3


def test_cifar10_files(root, monkeypatch):
    x = write_cifar10(root, monkeypatch)
    test = load("cifar10", "test")
    assert np.array_equal(test.x.numpy(), x) and test.classes[:2] == ("airplane", "automobile")
    assert (
        len(load("cifar10", validation=0)) == 100 and len(load("cifar10", "validation", validation=10)) == 10
    )
    small = load("cifar10", "test", size=16)
    assert small.shape == (3, 16, 16) and torch.equal(small.x, resize(test.x, [16, 16], antialias=True))


def test_cars_files(root):
    write_cars(root)
    train, test = load("cars", validation=0, size=32), load("cars", "test", size=32)
    assert train.classes == tuple(CARS) and train.counts() == dict.fromkeys(CARS, 3)
    red = train.x[:, 0].float().mean((1, 2))
    assert torch.allclose(red, 80.0 * train.y, atol=3), "every photograph has the label of its annotation"
    assert test.x[:, 2].float().mean() > 250 and train.x[:, 2].float().mean() < 5
    assert data.check("cars").table.set_index("what").verdict["train classes"] == "bad", "3 of 196 classes"


def test_aircraft_files(root):
    write_aircraft(root)
    train, test = load("aircraft", validation=0, size=32), load("aircraft", "test", size=32)
    assert train.classes == ("707-320", "Cessna 172", "F/A-18") and len(train) == len(test) == 12
    assert torch.allclose(train.x[:, 0].float().mean((1, 2)), 100.0 * train.y, atol=3)
    assert load("aircraft", "test", size=32, level="family").classes == ("Boeing 707", "Cessna", "F/A-18")
    with pytest.raises(DamagedDataset, match="manufacturer"):
        load("aircraft", "test", size=32, level="manufacturer")


def test_imagenet_archives_are_unpacked_by_get_and_by_nothing_else(root, monkeypatch):
    write_imagenet_archives(root, monkeypatch)
    with pytest.raises(MissingDataset, match="afgstudy data get imagenet"):
        load("imagenet")
    assert not (root / "imagenet/train").exists()
    report = data.get("imagenet")
    assert not report.ok and "1,281,167" in str(report), "twelve images are not the whole set, and it says so"
    train, test = load("imagenet", validation=0, size=32), load("imagenet", "test", size=32)
    assert train.classes == ("tench", "crane (n02012849)", "crane (n03126707)") and len(train) == 12
    red = {"tench": 200, "crane (n02012849)": 0, "crane (n03126707)": 100}
    for ds in (train, test):
        assert all(abs(x[0].float().mean() - red[ds.classes[y]]) < 4 for x, y in zip(ds.x, ds.y, strict=True))


def write_folder(top: Path, splits: tuple[str, ...], n: int = 10) -> None:
    for split in splits:
        for k, name in enumerate(("ant", "bee", "cat")):
            for i in range(n):
                photograph(top / split / name / f"{i}.jpg", (k * 100, i * 20, 0))


def test_folders(tmp_path):
    write_folder(tmp_path / "flat", (".",))
    parts = [load(f"folder:{tmp_path / 'flat'}", s, size=32, device="cpu") for s in data.SPLITS]
    assert [len(p) for p in parts] == [22, 2, 6] and parts[2].counts() == {"ant": 2, "bee": 2, "cat": 2}
    seen = {(int(y), int(x[1].float().mean().round())) for p in parts for x, y in zip(p.x, p.y, strict=True)}
    assert len(seen) == 30, "three parts of one whole"

    write_folder(tmp_path / "two", ("train", "val"))
    assert [len(load(f"folder:{tmp_path / 'two'}", s, size=32)) for s in data.SPLITS] == [27, 3, 30]
    write_folder(tmp_path / "three", ("train", "val", "test"), 4)
    assert [len(load(f"folder:{tmp_path / 'three'}", s, size=32)) for s in data.SPLITS] == [12, 12, 12]
    photograph(tmp_path / "three/test/dog/0.jpg", (0, 0, 0))
    with pytest.raises(DamagedDataset, match="has the classes ant, bee, cat, dog"):
        load(f"folder:{tmp_path / 'three'}", "test", size=32)


def test_photographs_are_resized_and_cropped_as_torchvision_does(tmp_path):
    from torchvision import transforms

    noise = Image.fromarray(pixels(1, 90, 150, 3)[0])
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        noise.save(tmp_path / split / "a" / "noise.png")
    expected = transforms.Compose(
        [transforms.Resize(48), transforms.CenterCrop(40), transforms.PILToTensor()]
    )(noise)
    assert torch.equal(load(f"folder:{tmp_path}", "test", size=40, resize=48, device="cpu").x[0], expected)
    with pytest.raises(ValueError, match="resize=20 leaves too little"):
        load(f"folder:{tmp_path}", "test", size=40, resize=20)


# ---------------------------------------------------------------- missing and damaged


@pytest.mark.parametrize("name", [s.name for s in data.SOURCES.values() if not s.embedded])
def test_a_missing_set_names_itself_the_folder_and_the_command(name, root):
    with pytest.raises(MissingDataset) as e:
        load(name, "test")
    for needed in (data.source_of(name).title, str(root), f"afgstudy data get {name}", "AFGSTUDY_DATA"):
        assert needed in str(e.value)
    assert isinstance(e.value, FileNotFoundError)
    for call in (data.check, data.fingerprint):
        with pytest.raises(MissingDataset):
            call(name)


def test_a_root_one_folder_too_deep_is_noticed(root, monkeypatch):
    write_mnist(root)
    for wrong in (root / "MNIST", root.parent):
        monkeypatch.setenv("AFGSTUDY_DATA", str(wrong))
        with pytest.raises(MissingDataset, match=re.escape(f"set AFGSTUDY_DATA={root}")):
            load("mnist")


def test_truncated_files_are_named(root, monkeypatch):
    write_mnist(root), write_svhn(root, monkeypatch), write_cifar10(root, monkeypatch)
    for name, split, file in (
        ("mnist", "train", "MNIST/raw/train-images-idx3-ubyte"),
        ("svhn", "test", "test_32x32.mat"),
        ("cifar10", "train", "cifar-10-batches-py/data_batch_3"),
    ):
        path = root / file
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(DamagedDataset) as e:
            load(name, split)
        for needed in (str(path), "published", f"afgstudy data get {name}"):
            assert needed in str(e.value)
        report = data.check(name)
        assert not report.ok and file in str(report) and f"afgstudy data get {name}" in str(report)


def test_an_empty_mnist_file(root):
    write_mnist(root)
    (root / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DamagedDataset, match=r"t10k-labels-idx1-ubyte has 0 bytes"):
        load("mnist", "test")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_photograph_is_named(root, workers):
    write_cars(root)
    victim = root / "stanford_cars/cars_test/00004.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DamagedDataset, match=r"00004.jpg is not a whole image"):
        load("cars", "test", size=32)
    with pytest.raises(DamagedDataset, match=r"00004.jpg is not a whole image"):
        list(stream("cars", "test", size=32, workers=workers).batches(4))
    assert "00004.jpg" in str(data.check("cars"))
    victim.unlink()
    with pytest.raises(DamagedDataset, match=r"00004.jpg is listed by its set and is not there"):
        load("cars", "test", size=32)


def test_wrong_annotations(root):
    write_cars(root)
    (root / "stanford_cars/cars_test_annos_withlabels.mat").write_text("<html>404 Not Found</html>")
    with pytest.raises(
        DamagedDataset, match=r"cannot read .*cars_test_annos_withlabels.mat.*afgstudy data get cars"
    ):
        load("cars", "test")


def test_imagenet1000_wants_a_thousand_folders(root):
    write_folder(root / "imagenet1000", (".",), 1)
    with pytest.raises(DamagedDataset, match="3 class folders, expected 1,000"):
        load("imagenet1000", "test")
    with pytest.raises(ValueError, match="test split only"):
        load("imagenet1000", "train")


def test_too_much_for_memory(root, monkeypatch):
    write_cars(root)
    monkeypatch.setattr(loading, "IN_MEMORY", 1000)
    with pytest.raises(ValueError, match=r"stream\('cars', 'test'\)"):
        load("cars", "test")


# ---------------------------------------------------------------- get


@pytest.fixture
def server(tmp_path):
    "A web server on this machine: the folder it serves and its address."
    folder = tmp_path / "server"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            "Says nothing."

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


def serve_mnist(folder: Path, address: str, monkeypatch) -> None:
    write_mnist(folder, compressed=True)
    raw = folder / "MNIST/raw"
    gone = "http://127.0.0.1:9/"  # a first mirror where nobody listens
    downloads = tuple(
        replace(d, urls=(gone, f"{address}/{d.file}"), md5=md5(folder / d.file))
        for d in SOURCES["mnist"].downloads
    )
    sums = {
        path: hashlib.md5(gzip.decompress((folder / f"{path}.gz").read_bytes())).hexdigest()
        for path in SOURCES["mnist"].md5
    }
    assert raw.is_dir()
    small(monkeypatch, "mnist", train=40, test=20, downloads=downloads, md5=sums)


def test_get_downloads_once_and_mends_what_is_damaged(root, server, monkeypatch):
    "From the second mirror, as the first is not there."
    serve_mnist(*server, monkeypatch)
    assert not data.is_here("mnist") and data.listing().here["mnist"] == "no"
    assert data.get("mnist").ok and data.listing().here["mnist"] == "yes"
    images = root / "MNIST/raw/train-images-idx3-ubyte"
    good, written = images.read_bytes(), images.stat().st_mtime_ns
    assert data.get("mnist").ok and images.stat().st_mtime_ns == written, "what is whole is left alone"

    for length in (1000, 900, 800):
        images.write_bytes(good[:length])
        assert data.get("mnist").ok and images.read_bytes() == good
    assert images.with_name(images.name + ".damaged").read_bytes() == good[:800], "moved aside, not deleted"
    assert len(list(images.parent.glob("*.damaged*"))) == 1, "and only the last one is kept"


def test_get_svhn(root, server, monkeypatch):
    folder, address = server
    write_svhn(folder, monkeypatch)
    downloads = tuple(data.Download((f"{address}/{f}",), f, m) for f, m in SOURCES["svhn"].md5.items())
    small(monkeypatch, "svhn", downloads=downloads)
    report = data.get("svhn")
    assert (root / "train_32x32.mat").is_file() and len(load("svhn", "test")) == 30
    assert report.table.set_index("what").verdict["test_32x32.mat"] == "ok" and not report.ok, (
        "30 of 73,257 images"
    )


def serve_aircraft(folder: Path, address: str, monkeypatch) -> Path:
    write_aircraft(folder)
    archive = folder / "fgvc-aircraft-2013b.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "fgvc-aircraft-2013b", "fgvc-aircraft-2013b")
    [download] = SOURCES["aircraft"].downloads
    here = replace(
        download, urls=(f"{address}/{archive.name}",), md5=md5(archive), size=archive.stat().st_size
    )
    small(monkeypatch, "aircraft", downloads=(here,), train=12, test=12, classes=3)
    return archive


def test_get_aircraft_trusts_no_torn_archive(root, server, monkeypatch):
    archive = serve_aircraft(*server, monkeypatch)
    root.mkdir()
    (root / archive.name).write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    assert data.get("aircraft").ok, "the torn archive of an earlier attempt is not taken for a whole one"
    assert (root / f"{archive.name}.damaged").is_file() and len(load("aircraft", "test", size=32)) == 12

    (root / "fgvc-aircraft-2013b/data/images/0000003.jpg").write_bytes(b"")
    assert data.get("aircraft").ok and (root / "fgvc-aircraft-2013b.damaged").is_dir()
    assert not list(root.glob(".*.part"))


def test_the_archive_of_aircraft_is_pinned(root, server, monkeypatch):
    "An archive with other content is refused, and nothing is left behind."
    serve_aircraft(*server, monkeypatch)
    [download] = SOURCES["aircraft"].downloads
    for wrong in ({"md5": sources.AIRCRAFT.downloads[0].md5}, {"size": 5}):
        small(monkeypatch, "aircraft", downloads=(replace(download, **wrong),))
        with pytest.raises(DownloadError, match=r"published d4acdd|expected 5"):
            data.get("aircraft")
    assert [p.name for p in root.iterdir()] == [".aircraft.lock"]


class Dropping(http.server.BaseHTTPRequestHandler):
    "Promises a file and hangs up in the middle."

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"x" * 5000)

    def log_message(self, *args):
        "Says nothing."


def test_a_dropped_connection_leaves_nothing(root, monkeypatch):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dropping) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}/archive.tar.gz"
        [download] = SOURCES["aircraft"].downloads
        small(monkeypatch, "aircraft", downloads=(replace(download, urls=(url,)),))
        with pytest.raises(DownloadError, match="connection was lost after 5,000 of 100,000 bytes"):
            data.get("aircraft")
        web.shutdown()
    assert [p.name for p in root.iterdir()] == [".aircraft.lock"]


def test_two_at_once_download_once(root, server, monkeypatch):
    "The second waits for the first and finds the set whole."
    serve_mnist(*server, monkeypatch)
    retrieved, real = [], inventory._retrieve

    def slowly(url: str, part: Path, *timeout) -> None:
        real(url, part, *timeout)
        retrieved.append(url)
        time.sleep(0.1)

    monkeypatch.setattr(inventory, "_retrieve", slowly)
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(data.get, ["mnist", "mnist"]))
    assert all(r.ok for r in reports) and len(retrieved) == 4
    with inventory.FileLock(root / ".mnist.lock"), pytest.raises(DownloadError, match="another process"):
        data.get("mnist", wait=0.1)


def test_get_without_a_network(root, monkeypatch):
    gone = "http://127.0.0.1:9/"  # nobody listens there
    for name in ("mnist", "cifar10", "aircraft"):
        here = tuple(replace(d, urls=(gone,)) for d in SOURCES[name].downloads)
        small(monkeypatch, name, downloads=here)
        with pytest.raises(DownloadError, match=rf"could not be brought to .*afgstudy data get {name}"):
            data.get(name)


@pytest.mark.parametrize(("name", "says"), [("cars", "stanford_cars/devkit/cars_meta.mat"),
                                            ("imagenet", "ILSVRC2012_devkit_t12.tar.gz"),
                                            ("imagenet1000", "imagenet1000/WNID")])  # fmt: skip
def test_get_says_what_to_put_where(name, says, root):
    with pytest.raises(DownloadError) as e:
        data.get(name)
    assert f"{root}/" in str(e.value) and says in str(e.value)
    assert not root.exists(), "nothing was written"


def test_get_of_an_embedded_set_gets_nothing(root):
    assert data.get("digits").ok and not root.exists()


# ---------------------------------------------------------------- splits and subsets, as properties

labels = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(torch.tensor)


@given(labels, st.data(), st.integers(0, 3))
@settings(deadline=None)
def test_stratified_is_exact_and_fair(y, pick, seed):
    m = pick.draw(st.integers(0, len(y)))
    chosen = data.stratified(y, m, seed, "test")
    assert int(chosen.sum()) == m and torch.equal(chosen, data.stratified(y, m, seed, "test"))
    for k in y.unique():
        share = m * int((y == k).sum()) / len(y)
        assert abs(int(chosen[y == k].sum()) - share) < 1.0 + 1e-9


@given(st.integers(0, 100), st.floats(0, 0.9))
@settings(deadline=None, max_examples=10)
def test_train_and_validation_part_the_training_set(seed, share):
    whole = load("digits", "train", validation=0, device="cpu")
    train = load("digits", "train", seed=seed, validation=share, device="cpu")
    sizes = [len(train)]
    rows = [image.numpy().tobytes() for image in train.x]
    if share:
        held = load("digits", "validation", seed=seed, validation=share, device="cpu")
        sizes.append(len(held))
        rows += [image.numpy().tobytes() for image in held.x]
    assert sum(sizes) == len(whole) == 1400 and (len(sizes) == 1 or sizes[1] == round(share * 1400))
    assert sorted(rows) == sorted(image.numpy().tobytes() for image in whole.x)


@given(labels, st.data(), st.integers(0, 3))
@settings(deadline=None)
def test_a_smaller_subset_is_part_of_a_larger_one(y, pick, seed):
    n = pick.draw(st.integers(0, len(y)))
    m = pick.draw(st.integers(0, n))
    few, many = (data.subset_indices(y, k, "abcde", seed) for k in (m, n))
    assert len(few) == m and torch.isin(few, many).all() and torch.equal(few, few.unique())
    assert torch.equal(few, data.subset_indices(y, m, "abcde", seed))


@given(labels, st.data(), st.integers(0, 3))
@settings(deadline=None)
def test_balanced_subsets(y, pick, seed):
    counts = torch.bincount(y, minlength=5)
    n = pick.draw(st.integers(0, len(y)))
    enough = 5 * int(counts.min())
    if n > enough:
        try:
            chosen = data.subset_indices(y, n, "abcde", seed, balanced=True)
        except ValueError as e:
            assert "needs" in str(e)
            return
    else:
        chosen = data.subset_indices(y, n, "abcde", seed, balanced=True)
    taken = torch.bincount(y[chosen], minlength=5)
    assert int(taken.sum()) == n and int(taken.max() - taken.min()) <= 1


def test_class_conditional_n():
    ds = load("digits", "train", n=50, balanced=True, device="cpu")
    assert (
        set(ds.counts().values()) == {5}
        and ds.checksum == load("digits", n=50, balanced=True, device="cpu").checksum
    )
    assert set(load("digits", device="cpu").subset(23, balanced=True).counts().values()) == {2, 3}


# ---------------------------------------------------------------- the dataset


@given(
    st.integers(1, 6),
    st.sampled_from([1, 3]),
    st.integers(3, 9),
    st.integers(3, 9),
    st.integers(0, 4),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_crop_flip_cuts_a_window_out_of_every_image(batch, channels, height, width, padding, flip):
    x = torch.arange(1, batch * channels * height * width + 1, dtype=torch.float32).view(
        batch, channels, height, width
    )
    out = crop_flip(padding, flip)(x, torch.Generator().manual_seed(batch + padding))
    assert out.shape == x.shape and out.dtype == x.dtype
    wide = torch.nn.functional.pad(x, (padding,) * 4)
    for one, source in zip(out, wide, strict=True):
        windows = [
            source[:, i : i + height, j : j + width]
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
        ]
        assert any(torch.equal(one, w) or (flip and torch.equal(one, w.flip(2))) for w in windows)


def test_crop_flip_moves_images_independently_and_repeats_itself():
    x = load("digits", n=200, device="cpu").x
    once, again = (crop_flip()(x, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(once, again) and once.dtype == torch.uint8
    same = crop_flip(4, flip=False)(x[:1].expand(200, -1, -1, -1), torch.Generator().manual_seed(7))
    assert len(same.flatten(1).unique(dim=0)) > 60, "81 places for one image"
    ds = load("digits", n=200, device="cpu")
    with pytest.raises(ValueError, match="generator"):
        ds.batches(10, augment=crop_flip())


def test_batches():
    ds = load("digits", "test", device="cpu")
    x, y = (torch.cat(t) for t in zip(*ds.batches(100), strict=True))
    assert torch.equal(x, ds.images()) and torch.equal(y, ds.y) and x.dtype == torch.float32
    assert [len(b) for _, b in ds.batches(100)] == [100, 100, 100, 97]
    assert [len(b) for _, b in ds.batches(100, drop_last=True)] == [100, 100, 100]

    def passes() -> list:
        g = torch.Generator().manual_seed(3)
        return [torch.cat([b for _, b in ds.batches(64, g, crop_flip())]) for _ in range(2)]

    (a, b), (c, d) = passes(), passes()
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b), (
        "a new order in every pass, repeatable"
    )
    before = torch.random.get_rng_state()
    list(ds.batches(64, torch.Generator()))
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator is left alone"
    with pytest.raises(ValueError, match="batch_size"):
        ds.batches(0)


def test_dataset_basics():
    ds = load("digits", "test", device="cpu")
    x, label = ds[3]
    assert x.shape == (1, 28, 28) and 0 <= x.min() and x.max() <= 1 and label == int(ds.y[3])
    assert len(ds[:7]) == len(ds.take([1, 2, 3, 4, 5, 6, 7])) == 7 and len(ds.take([])) == 0
    assert sum(ds.counts().values()) == len(ds) and list(ds.counts()) == list("0123456789")
    copy = pickle.loads(pickle.dumps(ds))
    assert copy.checksum == ds.checksum and len(list(ds)) == len(ds)
    floating = Dataset("f", "test", ds.images(), ds.y, ds.classes)
    assert floating.images([0, 1]).equal(ds.images(slice(2))) and floating.checksum != ds.checksum
    changed = ds.x.clone()
    changed[0, 0, 14, 14] ^= 1
    assert Dataset("f", "test", changed, ds.y, ds.classes).checksum != ds.checksum
    assert Dataset("f", "test", ds.x, ds.y.roll(1), ds.classes).checksum != ds.checksum
    for x, y in (
        (ds.x[0], ds.y),
        (ds.x.double(), ds.y),
        (ds.x, ds.y[1:]),
        (ds.x, ds.y.float()),
        (ds.x, ds.y + 1),
    ):
        with pytest.raises(ValueError):
            Dataset("wrong", "test", x, y, ds.classes)


def test_digits_are_what_they_were():
    train, test = load("digits", validation=0, device="cpu"), load("digits", "test", device="cpu")
    assert len(train) == 1400 and len(test) == 397 and min(test.counts().values()) >= 38
    assert (train.x == 0).float().mean() > 0.5 and train.x.max() == 255, (
        "exact zeros around the strokes, as in MNIST"
    )
    assert load("digits", "test", seed=5, device="cpu").checksum == test.checksum


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    cpu, gpu = load("digits", "test", device="cpu"), load("digits", "test", device="cuda")
    assert (
        gpu.x.is_cuda and gpu.checksum == cpu.checksum and gpu.subset(40).checksum == cpu.subset(40).checksum
    )
    for a, b in zip(
        *(ds.batches(64, torch.Generator().manual_seed(0), crop_flip()) for ds in (cpu, gpu)), strict=True
    ):
        assert torch.equal(a[0], b[0].cpu()) and torch.equal(a[1], b[1].cpu())
    assert len(list(gpu.batches(64, torch.Generator("cuda"), crop_flip()))) == 7


# ---------------------------------------------------------------- streams


def test_streams_do_not_depend_on_workers(tmp_path):
    for split in ("train", "test"):
        x, y = shapes.draw(24, 48, split=split)
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            path = tmp_path / split / shapes.CLASSES[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    name = f"folder:{tmp_path}"
    passes, before = [], torch.random.get_rng_state()
    for workers in (0, 1, 2):
        flow = stream(name, size=32, crop=(0.2, 1), workers=workers, device="cpu", validation=0)
        passes.append(list(flow.batches(7, torch.Generator().manual_seed(5), crop_flip(2), drop_last=True)))
    assert torch.equal(before, torch.random.get_rng_state())
    for other in passes[1:]:
        assert all(
            torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(passes[0], other, strict=True)
        )
    assert len(passes[0]) == 3 and passes[0][0][0].shape == (7, 3, 32, 32)

    flow, whole = (
        stream(name, "test", size=32, workers=0, device="cpu"),
        load(name, "test", size=32, device="cpu"),
    )
    assert torch.equal(torch.cat([x for x, _ in flow.batches(5)]), whole.images()) and torch.equal(
        flow.y, whole.y
    )
    assert torch.equal(flow[4][0], whole[4][0]) and flow.subset(5).counts() == whole.subset(5).counts()
    with pytest.raises(ValueError, match="fits in memory"):
        stream("digits")


# ---------------------------------------------------------------- shapes


def test_an_image_is_the_same_in_any_company():
    many = shapes.draw(60, 40, seed=9)[0]
    assert torch.equal(many[:7], shapes.draw(7, 40, seed=9)[0])
    assert torch.equal(many[33:35], shapes.draw(2, 40, seed=9, start=33)[0])
    assert not torch.equal(many, shapes.draw(60, 40, seed=10)[0])
    assert not torch.equal(many, shapes.draw(60, 40, seed=9, split="test")[0])
    assert len(many.flatten(1).unique(dim=0)) == 60


@pytest.mark.parametrize("size", [32, 50, 64, 96])
def test_one_scene_at_any_resolution(size):
    large = shapes.draw(20, 288, seed=1)[0].float()
    assert (shapes.draw(20, size, seed=1)[0] - resize(large, [size, size], antialias=True)).abs().mean() < 1.0


def test_texture_fades_and_shape_stays_at_32_pixels():
    s, plain = shapes.scenes(50, seed=2), shapes.scenes(50, agreement=0, seed=2)
    core = {}
    for size in (32, 128):
        cover = shapes._object(s, size)[:, 0]
        inside = (cover > 0.999).float()
        difference = (shapes.render(s, size).float() - shapes.render(plain, size).float()).square().mean(1)
        core[size] = float((difference * inside).sum() / inside.sum()) ** 0.5
    assert core[32] < 0.4 * core[128], "most of what tells two textures apart is gone"


def test_the_knob_turns_textures_only():
    a, b = shapes.scenes(2000, agreement=0.7), shapes.scenes(2000, agreement=0.2)
    for scenes, share in ((a, 0.7), (b, 0.2)):
        assert abs((scenes.label == scenes.texture).float().mean() - share) < 0.04
    for name in ("label", "centre", "radius", "turn", "colours", "ground", "strokes"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    wrong = shapes.scenes(4000, agreement=0.0)
    offsets = torch.bincount((wrong.texture - wrong.label) % 10, minlength=10)
    assert offsets[0] == 0 and offsets[1:].min() > 350, "every other texture is equally likely"


def test_objects_are_whole_and_stand_out():
    s = shapes.scenes(150, seed=4)
    cover = shapes._object(s, 64)[:, 0]
    edge = torch.cat([cover[:, [0, -1]].flatten(1), cover[:, :, [0, -1]].flatten(1)], 1)
    assert (edge.amax(1) > 0.5).float().mean() < 0.02, "hardly any object touches the border"
    grey = shapes.render(s, 64).float().mean(1)
    inside = (grey * cover).sum((1, 2)) / cover.sum((1, 2))
    outside = (grey * (1 - cover)).sum((1, 2)) / (1 - cover).sum((1, 2))
    assert ((inside - outside).abs() > 15).float().mean() > 0.97


def test_pixels_of_shapes_are_pinned():
    x, y = shapes.draw(10, 64, seed=0)
    assert torch.equal(y, torch.arange(10))
    expected = torch.tensor(PINNED)
    assert (x[:, :, 32, 32].int() - expected).abs().max() <= 2, (
        "the drawing has changed: so have all numbers made with it"
    )


PINNED = [
    [32, 10, 7],
    [51, 78, 40],
    [63, 65, 96],
    [123, 109, 90],
    [199, 171, 134],
    [20, 24, 9],
    [137, 190, 181],
    [158, 119, 142],
    [106, 77, 58],
    [155, 192, 210],
]


def test_drawing_is_fast():
    shapes.draw(8, 64)
    began = time.process_time()
    shapes.draw(300, 64)
    assert time.process_time() - began < 6, "2,000 images in a few seconds on one core"


def test_load_draws_shapes():
    ds = load("shapes", "validation", n=20, size=32, agreement=1.0, seed=2, device="cpu")
    assert torch.equal(ds.x, shapes.draw(20, 32, 1.0, 2, "validation")[0]) and ds.classes == shapes.CLASSES
    assert ds.checksum != load("shapes", "train", n=20, size=32, agreement=1.0, seed=2, device="cpu").checksum
    for wrong in ({"size": 16}, {"size": 400}, {"agreement": -0.1}):
        with pytest.raises(ValueError):
            load("shapes", n=2, **wrong)


# ---------------------------------------------------------------- names, roots, fingerprints


def test_mistyped_arguments():
    for call, says in (
        (lambda: load("imagenete"), "did you mean 'imagenette'"),
        (lambda: load("digits", "dev"), "one of train, validation, test"),
        (lambda: load("digits", n=10_000), "cannot choose 10,000 of 1,260"),
        (lambda: load("digits", size=0), "size must be"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(TypeError, match="no option 'agrement'; it has agreement"):
        load("shapes", agrement=0.5)


def test_root(monkeypatch, tmp_path, project):
    monkeypatch.delenv("AFGSTUDY_DATA", raising=False)
    assert files.data_root() == project / "data/sets"
    monkeypatch.chdir(tmp_path)
    assert files.data_root() == project / "data/sets", "the current directory plays no part"
    installed = tmp_path / "site-packages/afgstudy/__init__.py"
    monkeypatch.setattr(files.afgstudy, "__file__", str(installed))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert files.data_root() == tmp_path / "share/afgstudy/sets", "an installed wheel has no checkout"
    monkeypatch.setenv("AFGSTUDY_DATA", "~/elsewhere")
    assert files.data_root() == Path.home() / "elsewhere" and files.data_root(tmp_path) == tmp_path


def test_fingerprints(root, monkeypatch):
    write_mnist(root), write_cars(root)
    prints = {name: data.fingerprint(name) for name in ("digits", "shapes", "mnist", "cars")}
    assert len(set(prints.values())) == 4 and all(len(p) == 64 for p in prints.values())
    for file in root.rglob("*"):
        os.utime(file, (1e9, 1e9))
    assert {name: data.fingerprint(name) for name in prints} == prints, "the time of change is not content"
    labels = root / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x03")
    photograph(root / "stanford_cars/cars_train/00001.jpg", (1, 2, 3), size=(300, 300))
    assert data.fingerprint("mnist") != prints["mnist"] and data.fingerprint("cars") != prints["cars"]


def test_listing(root):
    table = data.listing()
    assert list(table.index) == list(data.SOURCES) and set(table.here) == {"embedded", "no"}
    assert table.loc["cifar10", ["train", "test", "classes"]].tolist() == [50_000, 10_000, 10]


# ---------------------------------------------------------------- the real sets


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train", "test", "shape"),
    [("mnist", 60_000, 10_000, (1, 28, 28)), ("cifar10", 50_000, 10_000, (3, 32, 32))],
)
def test_real_arrays(name, train, test, shape, real_data):
    parts = [load(name, s, root=real_data, device="cpu") for s in ("train", "validation")]
    assert [len(p) for p in parts] == [train * 9 // 10, train // 10] and parts[0].shape == shape
    report = data.check(name, root=real_data)
    found = report.table.set_index("what").found
    assert found["train images"] == f"{train:,}" and found["test images"] == f"{test:,}"
    assert report.ok and data.is_here(name, real_data)
    fit, held = (np.array(list(p.counts().values())) / len(p) for p in parts)
    assert np.abs(fit - held).max() < 1e-3, (
        "the classes have the same shares in both parts of the training set"
    )


@pytest.mark.real
def test_real_imagenette(real_data):
    for split, n in (("train", 2500), ("test", 800)):
        flow = stream("imagenette", split, root=real_data, device="cpu", validation=0, workers=0)
        assert len(flow) == n and len(set(flow.counts().values())) == 1
    assert flow.classes[:3] == ("tench", "English springer", "cassette player")
    small = load("imagenette", "test", n=30, size=64, balanced=True, root=real_data, device="cpu")
    assert small.shape == (3, 64, 64) and set(small.counts().values()) == {3}
    assert data.check("imagenette", root=real_data, images=100).ok


@pytest.mark.real
def test_real_imagenet1000(real_data):
    ds = load("imagenet1000", "test", n=40, root=real_data, device="cpu", size=96, resize=110)
    assert ds.shape == (3, 96, 96) and len(ds.classes) == len(set(ds.classes)) == 1000
    flow = stream("imagenet1000", "test", root=real_data, device="cpu")
    assert (
        len(flow) == 1000
        and torch.equal(flow.y, torch.arange(1000))
        and flow.classes[207] == "golden retriever"
    )
    assert "n02099601" in flow.files[207]
