"Published defences: what is written is what is loaded, wherever it lies, and nothing else is."

import base64
import functools
import http.server
import json
import shutil
import socketserver
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from afgstudy import hub
from afgstudy.afg.defence import AFG
from afgstudy.afg.drawing import Visualiser
from afgstudy.afg.genome import Genome
from afgstudy.afg.recognition import Fitted, Reader, second_network
from afgstudy.afg.separation import small_vgg
from afgstudy.attacks import PGD
from afgstudy.cafd import CAFD, Denoiser
from afgstudy.data import DownloadError, load
from afgstudy.defence import Undefended
from afgstudy.models import create
from afgstudy.study.cli import main
from afgstudy.two_stream import TwoStream, identity_map
from afgstudy.two_stream.defence import EnlargedTwoStream

ATTACKED = hub.Attacked("AutoAttack", "linf", 8 / 255, 40.0, 31.0, 50.0, 100, ("a warning",), {"apgd-ce": 45.0})
SHAPES = functools.cache(lambda: load("shapes", "test", n=20, size=32))


def settled(network):
    "A network whose batch norms have seen data, so that their statistics are not the initial ones."
    torch.manual_seed(0)
    network.train()
    channels = getattr(network, "channels", None) or network.config["channels"]
    with torch.no_grad():
        network(torch.rand(8, channels, 32, 32))
    return network.eval()


def aalp():
    return settled(create("pooled_cnn", classes=10, size=32, width=6, seed=1))


def cafd():
    target = settled(create("pooled_cnn", classes=10, size=32, width=8, seed=1))
    return CAFD(target, settled(Denoiser(3, width=0.1, seed=2)), bits=8)


def two_stream(kind=TwoStream):
    high = settled(create("resnet9", classes=10, size=64, seed=1)) if kind is EnlargedTwoStream else aalp()
    low = settled(create("pooled_cnn", classes=10, size=32, width=8, seed=2))
    return kind(high, low, identity_map(SHAPES().classes), p1=0.05, p2=0.15, mode="area", aggregate="sum", top=(4, 2))


def enlarged():
    return two_stream(EnlargedTwoStream)


def afg():
    genome = Genome(("relu2", "relu4"), drawing=Visualiser(size=16, steps=2, pad=2), located=True)
    second = second_network("narrow", 2, 20, genome.shape[1], seed=3).eval()
    return AFG(settled(small_vgg(10, 3, seed=1)), genome, Fitted(Reader(second)), threshold=0.4)


KINDS = {"model": aalp, "cafd": cafd, "two_stream": two_stream, "enlarged": enlarged, "afg": afg}


def publish(defence, root: Path, name: str = "a-defence", **changes) -> Path:
    words = dict(title="For a test", recipe={"epochs": 1}, attacked=ATTACKED, root=root) | changes
    return hub.publish_model(name, defence, SHAPES(), **words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_defence_comes_back_as_it_was(kind, tmp_path):
    defence, x = KINDS[kind](), SHAPES().images()
    folder = publish(defence, tmp_path)
    back = hub.defence_in(folder, "cpu")
    before = (defence if kind != "model" else Undefended(defence))(x)
    for given, expected in zip(back(x), before, strict=True):
        assert torch.equal(given, expected)
    if kind == "afg":
        assert back.genome == defence.genome and back.threshold == 0.4
    else:
        expected = defence(x) if kind == "model" else defence.logits(x)
        assert torch.equal(back.logits(x), expected)
    about = hub.about_in(folder)
    right = (before.label == SHAPES().y) & ~before.flagged
    assert about["clean"]["accuracy"] == pytest.approx(100 * right.float().mean().item())
    assert about["attacked"]["flags"] == ["a warning"] and about["attacked"]["eps"] == 8 / 255
    assert about["dataset"]["checksum"] == SHAPES().checksum and hub.check("a-defence", tmp_path) == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-defence", "index.json"]


@pytest.mark.parametrize("kind", ["model", "cafd", "two_stream"])
def test_what_is_loaded_can_be_attacked(kind, tmp_path):
    back, x, y = hub.defence_in(publish(KINDS[kind](), tmp_path), "cpu"), SHAPES().images(), SHAPES().y
    x_adv = PGD(eps=8 / 255, step_size=4 / 255, steps=3)(back.logits, x, y, torch.Generator().manual_seed(0))
    assert 0 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6


def test_two_stream_on_classes_of_the_high_network_is_judged_in_categories():
    defence = two_stream()
    labels = hub.LabelMap("two", ("low", "high"), (0,) * 5 + (1,) * 5, SHAPES().classes)
    pooled = TwoStream(defence.high, create("lenet5", classes=2, size=32, seed=0).eval(), labels)
    given = hub.clean_accuracy(pooled, SHAPES())
    verdict = pooled(SHAPES().images())
    assert given["accuracy"] == pytest.approx(
        100 * ((verdict.label == labels(SHAPES().y)) & ~verdict.flagged).float().mean().item()
    )


def test_half_precision_is_written_as_float32(tmp_path):
    folder = publish(aalp().half().float(), tmp_path)
    kinds = {str(t.dtype) for t in hub.tensors_in((folder / hub.TENSORS).read_bytes()).values()}
    assert kinds <= {"torch.float32", "torch.int64"}


def test_the_same_defence_is_the_same_file(tmp_path):
    first, second = (publish(cafd(), tmp_path / name) for name in ("one", "two"))
    assert (first / hub.TENSORS).read_bytes() == (second / hub.TENSORS).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Upper Case"}, "small letters"),
        ({"name": "../out"}, "small letters"),
        ({"record": "cpu/nothing"}, "no record 'cpu/nothing'"),
        ({"defence": torch.nn.Linear(2, 2)}, "got Linear"),
        ({"defence": Undefended(lambda x: x)}, "only networks that afgstudy made"),
        ({"defence": AFG(small_vgg(10, 3), Genome(("relu2",)), lambda x: x)}, "got function"),
    ],
)
def test_what_cannot_be_published_changes_nothing(changes, message, tmp_path):
    publish(aalp(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    defence = changes.pop("defence", None) or aalp()
    with pytest.raises(hub.ModelError, match=message):
        publish(defence, tmp_path, **changes)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_all_together_stay_small(tmp_path, monkeypatch, project):
    first = hub.about_in(publish(aalp(), tmp_path))["file"]["bytes"]
    monkeypatch.setattr(hub, "LIMIT", 2 * first - 1)
    with pytest.raises(hub.ModelError, match="all together may have"):
        publish(aalp(), tmp_path, "another")
    publish(aalp(), tmp_path)  # in its own place it fits
    monkeypatch.undo()
    published = project / "data" / "models"
    assert sum(p.stat().st_size for p in published.rglob("*") if p.is_file()) < hub.LIMIT


def test_the_index_names_what_is_published(project):
    "Of the defences in the repository: each is whole, is in the index, and names a record that is there."
    published = project / "data" / "models"
    found = hub.here(published)
    if found:
        listed = json.loads((published / hub.INDEX).read_text())["models"]
        assert listed == {name: hub.about_in(folder) for name, folder in found.items()}
    for name, folder in found.items():
        about = hub.about_in(folder)
        hub.defence_in(folder, "cpu")
        assert about["name"] == name and (project / "data" / "results" / about["record"] / "record.json").is_file()


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "description", "other network"])
def test_damage_is_named_and_never_loaded(damage, tmp_path):
    folder = publish(aalp(), tmp_path)
    file, about = folder / hub.TENSORS, hub.about_in(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "bit":
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    elif damage == "description":
        (folder / hub.ABOUT).write_text("[]")
    else:
        about["networks"]["model"] |= {"name": "lenet5", "options": {}}
        (folder / hub.ABOUT).write_text(json.dumps(about))
    with pytest.raises(hub.ModelError, match=r"SHA-256|cannot be read|does not describe|does not fit"):
        hub.defence_in(folder, "cpu")
    assert hub.check("a-defence", tmp_path)


def test_another_clean_accuracy_is_noticed(tmp_path, monkeypatch):
    folder = publish(aalp(), tmp_path)
    about = hub.about_in(folder)
    monkeypatch.setattr(hub, "load", lambda *_, **__: SHAPES())
    assert hub.check("a-defence", tmp_path) == ""
    about["clean"]["accuracy"] = (about["clean"]["accuracy"] + 50) % 100
    (folder / hub.ABOUT).write_text(json.dumps(about))
    assert "published" in hub.check("a-defence", tmp_path)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    "A machine without a checkout, on which nothing is published."
    monkeypatch.setattr(hub, "checkout_folder", lambda: tmp_path / "no checkout")
    monkeypatch.setenv("AFGSTUDY_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("AFGSTUDY_DEVICE", "cpu")
    return tmp_path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        "Says nothing."


@pytest.fixture
def served(machine, monkeypatch):
    "A folder of published defences that a server on this machine has."
    root = machine / "served"
    root.mkdir()
    handler = functools.partial(Quiet, directory=root)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setenv("AFGSTUDY_MODELS", f"http://127.0.0.1:{web.server_address[1]}/")
        yield root
        web.shutdown()


def test_a_defence_is_fetched_once_by_the_index(served, machine):
    defence, x = aalp(), SHAPES().images()
    publish(defence, served)
    assert torch.equal(hub.load_defence("a-defence").logits(x), defence(x))
    shutil.rmtree(served)
    assert torch.equal(hub.load_defence("a-defence").logits(x), defence(x)), "from the folder it was fetched to"
    assert hub.about("a-defence")["recipe"] == {"epochs": 1}
    assert not list((machine / "weights").rglob("*.part"))


def test_a_defence_of_another_content_is_not_fetched(served, machine):
    folder = publish(aalp(), served)
    content = bytearray((folder / hub.TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / hub.TENSORS).write_bytes(content)
    with pytest.raises(DownloadError, match="with SHA-256"):
        hub.load_defence("a-defence")
    with pytest.raises(hub.ModelError, match="did you mean a-defence"):
        hub.load_defence("a-defense")
    assert "a-defence" not in hub.here()


def test_no_server_is_one_line(machine, monkeypatch):
    monkeypatch.setenv("AFGSTUDY_MODELS", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"127.0.0.1:9/index.json, could not be read"):
        hub.load_defence("a-defence")


# ---------------------------------------------------------------- commands


def test_list_and_check(machine):
    publish(aalp(), machine / "weights")
    said = CliRunner().invoke(main, ["models", "list"]).output
    assert "linf 8/255, 1 warnings" in said and "40.0% [31.0, 50.0], n=100" in said and "record: none" in said
    assert CliRunner().invoke(main, ["models", "check"]).output == "a-defence: whole\n"
    (machine / "weights" / "a-defence" / hub.TENSORS).write_bytes(b"")
    said = CliRunner().invoke(main, ["models", "check", "a-defence"])
    assert said.exit_code == 1 and "SHA-256" in said.output


class StandIn(http.server.BaseHTTPRequestHandler):
    "What `huggingface_hub` needs of the Hub to make a repository and commit small files to it."

    committed: dict[str, bytes]
    refuse = False

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://{self.headers['Host']}"
        if self.headers.get("Authorization") != "Bearer a-token" or self.refuse:
            self.answer(401, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{address}/me/defences"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(body)["files"]]
            self.answer(200, {"files": [dict(path=f, uploadMode="regular", shouldIgnore=False) for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{address}/me/defences/commit/1"
            self.answer(200, {"commitUrl": url, "commitOid": "1", "hookOutput": "", "success": True})
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self):
        self.answer(404, {"error": self.path})

    def log_message(self, *args):
        "Says nothing."


@pytest.fixture
def stand_in(monkeypatch):
    "The address of a stand-in for the Hub, and what was committed to it."
    pytest.importorskip("huggingface_hub")
    committed: dict[str, bytes] = {}
    handler = type("Here", (StandIn,), {"committed": committed})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_TOKEN", "a-token")
        yield f"http://127.0.0.1:{web.server_address[1]}", committed, handler
        web.shutdown()


def test_push_sends_the_folder_that_load_defence_reads(machine, stand_in, monkeypatch):
    address, committed, _ = stand_in
    monkeypatch.setattr(hub, "checkout_folder", lambda: machine / "checkout")
    defence, x = aalp(), SHAPES().images()
    publish(defence, machine / "checkout")
    said = CliRunner().invoke(main, ["models", "push", "--repo", "me/defences", "--endpoint", address])
    assert said.exit_code == 0 and said.output.endswith("/me/defences/commit/1\n"), said.output
    assert sorted(committed) == ["README.md", "a-defence/defence.safetensors", "a-defence/model.json", "index.json"]
    assert b"linf 8/255" in committed["README.md"]
    for path, content in committed.items():
        (machine / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (machine / "copy" / path).write_bytes(content)
    shutil.rmtree(machine / "checkout")
    monkeypatch.setenv("AFGSTUDY_MODELS", (machine / "copy").as_uri())
    assert torch.equal(hub.load_defence("a-defence").logits(x), defence(x))


def test_a_push_that_fails_is_one_line(machine, stand_in, monkeypatch):
    address, committed, handler = stand_in
    monkeypatch.setattr(hub, "checkout_folder", lambda: machine / "checkout")
    push = ["models", "push", "--repo", "me/defences", "--endpoint", address]
    said = CliRunner().invoke(main, push)
    assert said.exit_code == 1 and "no published defence in" in said.output
    folder = publish(aalp(), machine / "checkout")
    handler.refuse = True
    said = CliRunner().invoke(main, push)
    assert said.exit_code == 1 and "the push to me/defences failed" in said.output and "Traceback" not in said.output
    said = CliRunner().invoke(main, [*push, "another"])
    assert said.exit_code == 1 and "there are a-defence" in said.output
    (folder / hub.TENSORS).write_bytes(b"")
    handler.refuse = False
    said = CliRunner().invoke(main, push)
    assert said.exit_code == 1 and "a-defence is not pushed" in said.output and not committed
