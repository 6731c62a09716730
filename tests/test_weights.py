"The files of weights that presets start from: downloaded from a server on this machine, converted, checked."

import functools
import hashlib
import http.server
import socketserver
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from afgstudy import weights
from afgstudy.data import DownloadError, check
from afgstudy.data.sources import Download, names_of_imagenet1000
from afgstudy.models import create, find_weights
from afgstudy.study.cli import main


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def served(tmp_path):
    "A folder, the address of a web server that serves it, and the paths it was asked for."
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_address[1]}", asked
        web.shutdown()


def serve(monkeypatch, served, name: str, content: object, **changes) -> None:
    "Let the source of these weights be this content on the server."
    folder, address, _ = served
    known = weights.KNOWN[name]
    file = folder / known.download.file
    torch.save(content, file)
    download = Download((f"{address}/{file.name}",), file.name, sha256=changes.pop("published", sha256(file)))
    monkeypatch.setitem(weights.KNOWN, name, replace(known, download=download, **changes))


def checkpoint(seed: int = 0) -> tuple[torch.nn.Module, dict]:
    network = create("resnet32", classes=10, size=32, seed=seed).network
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    return network, {"state_dict": state, "best_prec1": 92.63}


def converted(network: torch.nn.Module) -> str:
    "The SHA-256 that the file of this network should have."
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    return hashlib.sha256(weights.safetensors_bytes(state, weights.RESNET32.header)).hexdigest()


def test_resnet32_is_downloaded_converted_and_used(served, tmp_path, monkeypatch):
    network, content = checkpoint()
    serve(monkeypatch, served, "resnet32_cifar10", content, sha256=converted(network))
    monkeypatch.setenv("AFGSTUDY_WEIGHTS", str(tmp_path / "weights"))
    said = CliRunner().invoke(main, ["weights", "get", "resnet32_cifar10"])
    file = tmp_path / "weights" / "resnet32_cifar10.safetensors"
    assert said.output == f"{file}\n" and said.exit_code == 0
    model, x = create("resnet32", weights="resnet32_cifar10"), torch.rand(2, 3, 32, 32)
    network.eval()
    assert torch.equal(model.network(x), network(x)) and find_weights("resnet32_cifar10") == file
    assert CliRunner().invoke(main, ["weights", "get", "resnet32_cifar10"]).exit_code == 0
    assert len(served[2]) == 1, "what is there and whole is not downloaded again"
    assert sorted(p.name for p in file.parent.iterdir()) == [".resnet32_cifar10.lock", file.name]


def test_a_damaged_file_is_moved_aside_and_got_again(served, tmp_path, monkeypatch):
    network, content = checkpoint()
    serve(monkeypatch, served, "resnet32_cifar10", content, sha256=converted(network))
    file = weights.get("resnet32_cifar10", tmp_path / "weights")
    file.write_bytes(file.read_bytes()[:1000])
    assert weights.check("resnet32_cifar10", file.parent).startswith("SHA-256 ")
    weights.get("resnet32_cifar10", file.parent)
    assert not weights.check("resnet32_cifar10", file.parent)
    assert file.with_name(f"{file.name}.damaged").stat().st_size == 1000


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (checkpoint()[1], {"published": "0" * 64}, "published 0000"),
        (checkpoint()[1], {}, "the records used 89a628da"),
        ({"state_dict": {"a": 1}}, {}, "holds more than tensors"),
        ([1, 2], {}, "not a checkpoint of tensors"),
        (weights.RESNET32.header, {}, "holds more than tensors"),
    ],
)
def test_only_the_right_source_gets_the_name(served, tmp_path, monkeypatch, content, changes, message):
    serve(monkeypatch, served, "resnet32_cifar10", content, **changes)
    with pytest.raises(DownloadError, match=message):
        weights.get("resnet32_cifar10", tmp_path / "weights")
    assert not list((tmp_path / "weights").glob("*.safetensors")) and not list((tmp_path / "weights").glob(".*.part"))


def test_a_source_with_code_in_it_is_refused(served, tmp_path, monkeypatch):
    "A pickle that would run a command when it is loaded in the ordinary way."

    class Command:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    serve(monkeypatch, served, "resnet32_cifar10", {"state_dict": Command()})
    with pytest.raises(DownloadError, match="not a checkpoint of tensors"):
        weights.get("resnet32_cifar10", tmp_path / "weights")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", [w.name for w in weights.TORCHVISION])
def test_torchvisions_files_become_files_that_create_takes(served, tmp_path, monkeypatch, name):
    import torchvision

    network = weights.KNOWN[name].network.removesuffix("_trunk")
    torch.manual_seed(0)
    options = {"init_weights": False} if network == "inception_v3" else {}
    theirs = torchvision.models.get_model(network, weights=None, **options).eval()
    serve(monkeypatch, served, name, theirs.state_dict())
    file = weights.get(name, tmp_path / "weights")
    ours = create(weights.KNOWN[name].network, weights=file)
    assert not weights.check(name, tmp_path / "weights")
    x = torch.rand(1, 3, ours.config["size"], ours.config["size"])
    if ours.config["name"] == "inception_v3_trunk":
        state = load_file(file)
        assert torch.equal(state["Mixed_7a.branch3x3_1.conv.weight"], theirs.Mixed_7a.branch3x3_1.conv.weight)
        assert not any(k.startswith(("fc.", "Mixed_7b", "AuxLogits")) for k in state)
        assert torch.allclose(ours.normalise(x), x * 2 - 1)
    else:
        assert torch.allclose(ours(x), theirs(ours.normalise(x)), atol=1e-5) and ours(x).shape == (1, 1000)


def test_another_network_of_torchvision_is_refused(served, tmp_path, monkeypatch):
    serve(monkeypatch, served, "squeezenet1_0_torchvision", {"features.0.weight": torch.ones(1)})
    with pytest.raises(DownloadError, match=r"lacks 51 tensors of squeezenet1_0, such as features\.0\.bias"):
        weights.get("squeezenet1_0_torchvision", tmp_path)


def test_what_no_program_makes_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("AFGSTUDY_WEIGHTS", str(tmp_path))
    said = CliRunner().invoke(main, ["weights", "get", "inception_v3_trunk"])
    assert said.exit_code == 1 and "iOS-10-Sampler" in said.output and "5efc0e56" in said.output
    assert "afgstudy weights get inception_v3_trunk_torchvision" in said.output
    monkeypatch.delenv("AFGSTUDY_WEIGHTS")
    said = CliRunner().invoke(main, ["weights", "get", "resnet32_cifar10"])
    assert said.exit_code == 1 and "export AFGSTUDY_WEIGHTS" in said.output


def test_the_list_says_where_each_comes_from_and_what_it_gives(monkeypatch):
    monkeypatch.delenv("AFGSTUDY_WEIGHTS", raising=False)
    said = CliRunner().invoke(main, ["weights", "list", "-v"]).output
    for known in weights.KNOWN.values():
        assert known.source.partition(" ")[0] in said and known.licence in said and known.gives in said
        assert known.sha256 in said and known.conversion in said


def words(value: object) -> list:
    return value if isinstance(value, list) else [value]


def test_every_file_that_a_preset_names_is_listed(project):
    named = set()
    for file in (project / "nbs" / "experiments" / "presets").rglob("*.yaml"):
        for key, value in (yaml.safe_load(file.read_text()) or {}).items():
            if key == "weights" or (key.endswith("_weights") and key != "alp_weights"):
                named |= {v for v in words(value) if isinstance(v, str)}
    assert named - {"", "default", "train"} <= weights.KNOWN.keys()
    assert {"resnet32_cifar10", "squeezenet1_0_imagenet", "inception_v3_trunk"} <= named


def test_the_conversion_gives_the_file_that_the_records_used(real_weights, tmp_path):
    "Byte for byte, from a checkpoint as the source keeps it."
    state = load_file(real_weights / "resnet32_cifar10.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": 92.63}, tmp_path / "a.th")
    tensors = weights.of_checkpoint(tmp_path / "a.th", weights.RESNET32)
    made = weights.safetensors_bytes(tensors, weights.RESNET32.header)
    assert hashlib.sha256(made).hexdigest() == weights.RESNET32.sha256
    assert made == (real_weights / "resnet32_cifar10.safetensors").read_bytes()


def test_the_real_files_are_those_of_the_list(real_weights):
    here = [n for n in weights.KNOWN if (real_weights / f"{n}.safetensors").is_file()]
    assert here and not any(weights.check(name, real_weights) for name in here)


def test_the_photographs_of_imagenet1000_are_named(real_data):
    listed = {line.split("/")[0] for line in names_of_imagenet1000()}
    assert len(listed) == 1000
    found = check("imagenet1000", real_data, images=5).table.set_index("what")
    assert found.found["photographs of the records, by name"] == "1,000"
