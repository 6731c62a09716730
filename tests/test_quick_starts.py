"""What a new user does in the first hour, as the README and the how-to pages tell it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import nn

from afgstudy.attacks import PGD, AutoAttack
from afgstudy.data import load
from afgstudy.models import create
from afgstudy.training import Recipe, fit
from afgstudy.two_stream import TwoStream, identity_map, resize


@pytest.fixture
def environment(project, tmp_path, monkeypatch) -> dict[str, str]:
    "A user's shell: this checkout's package, runs in a folder of their own, no real data."
    settings = {"PYTHONPATH": str(project), "AFGSTUDY_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AFGSTUDY_DATA", "AFGSTUDY_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    return dict(os.environ)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def test_the_library_in_ten_lines_prints_what_the_readme_shows(project, environment, tmp_path):
    text = (project / "README.md").read_text()
    section = text[text.index("## The library in ten lines") :].partition("\n## ")[0] + "\n"
    program = "\n".join(code_blocks(section, "python"))
    outside = re.sub(r"^```.*?^```$", "", section, flags=re.M | re.S)
    shown = re.findall(r"^ {4}(\S.*)$", outside, flags=re.M)
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    names = [line.split("%")[0].rsplit(maxsplit=1)[0] for line in ran.stdout.splitlines()]
    assert len(names) == 4 and names == [line.split("%")[0].rsplit(maxsplit=1)[0] for line in shown]


def test_papermill_by_hand_with_one_parameter_changed(project, environment, tmp_path):
    notebook = "nbs/experiments/two_stream/fig5.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, str(tmp_path / "out.ipynb"), "-p", "repeats", "5"]
    ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (record,) = (tmp_path / "runs").rglob("record.json")
    said = json.loads(record.read_text())
    assert said["preset"] == "by-hand" and said["provenance"]["parameters"]["repeats"] == 5 and said["rows"]


def test_the_manual_of_an_experiment(project, environment):
    command = [sys.executable, "-m", "papermill", "--help-notebook", "nbs/experiments/aalp/table2.ipynb"]
    ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "L-infinity radius" in ran.stdout and "eps: float" in ran.stdout


class Mine(nn.Module):
    "A user's network: normalisation inside, nothing of ours."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.body((x - 0.15) / 0.3)


def test_a_users_own_model_under_pgd_and_autoattack():
    torch.manual_seed(0)
    model, test = Mine(), load("digits", "test", n=40)
    fit(model, load("digits", "train"), recipe=Recipe(epochs=4, batch_size=64))
    x, y, before = test.images(), test.y, {k: v.clone() for k, v in model.state_dict().items()}
    clean = (model(x).argmax(1) == y).float().mean()
    left = {}
    for attack in (PGD(eps=0.1, step_size=0.02, steps=10), AutoAttack(eps=0.1, steps=5, queries=20)):
        x_adv = attack(model, x, y, torch.Generator().manual_seed(0))
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
        left[attack.name] = (model(x_adv).argmax(1) == y).float().mean()
    assert clean > 0.8 and max(left.values()) < clean - 0.3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_users_own_image_folder_through_two_stream(tmp_path):
    for split, n in (("train", 700), ("test", 100)):
        digits = load("digits", split, n=n)
        for i, (image, label) in enumerate(zip(digits.x, digits.y, strict=True)):
            place = tmp_path / "mine" / split / f"digit {label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{i}.png")
    name, networks = f"folder:{tmp_path / 'mine'}", []
    for size in (42, 28):
        data = load(name, "train", size=size)
        network = create("pooled_cnn", classes=len(data.classes), size=size, width=8, seed=0)
        fit(network, data, recipe=Recipe(epochs=4, batch_size=32, lr=0.01, schedule="cosine"))
        networks.append(network)
    test = load(name, "test", size=42)
    defence = TwoStream(*networks, identity_map(test.classes), high_size=42, low_size=28)
    label, flagged, score = defence(test.images())
    accepted = ~flagged
    assert accepted.float().mean() > 0.5 and (label[accepted] == test.y[accepted]).float().mean() > 0.7
    blurred = resize(resize(test.images(), 4), 42).clamp(0, 1)
    assert defence(blurred).flagged.float().mean() > flagged.float().mean()
    assert score.shape == (100,) and ((0 <= score) & (score <= 1)).all()


@pytest.mark.parametrize("name", ["two_stream/fig5", "aalp/fig5"])
def test_an_experiment_runs_where_jupyterlab_opens_it(project, environment, tmp_path, name):
    path = Path(project, "nbs", "experiments", f"{name}.ipynb")
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}  # JupyterLab starts a kernel in the notebook's folder
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert list((tmp_path / "runs").rglob("record.json"))
