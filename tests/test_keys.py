"""Keys follow the code that is reached, wherever it stands."""

import subprocess
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from afgstudy.attacks import BPDA
from afgstudy.cafd import JPEG
from afgstudy.keys import canonical, code_of, differences, key_of, surroundings
from afgstudy.training import Madry, Recipe, fit

OBJECTIVE = """
from dataclasses import dataclass
from afgstudy.keys import code_of

@dataclass(frozen=True)
class Mine:
    weight: float = {weight}

print(code_of(Mine())["here.Mine"])
"""


def test_a_class_of_a_script_counts_with_its_own_source(tmp_path):
    found = []
    for weight in (1.0, 1.0, 2.0):
        script = tmp_path / "mine.py"
        script.write_text(OBJECTIVE.format(weight=weight))
        found.append(subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout)
    assert found[0] == found[1] != found[2]


def test_a_class_of_a_notebook_counts_with_its_latest_definition():
    cells = [nbformat.v4.new_code_cell(OBJECTIVE.format(weight=w)) for w in (1.0, 1.0, 2.0)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": ""}})
    NotebookClient(notebook).execute()
    first, again, other = ("".join(o.text for o in c.outputs if o.output_type == "stream") for c in cells)
    assert first and first == again != other


def test_every_module_that_a_training_runs_through_is_in_its_key():
    "Traced at run time: whatever function of ours runs must stand in a module the key knows."
    import torch

    from afgstudy.attacks import PGD
    from afgstudy.data import Dataset
    from afgstudy.keys import computes
    from afgstudy.models import create

    ran = set()

    def note(frame, event, arg):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("afgstudy") and computes(name):
            ran.add(name)

    draw = torch.Generator().manual_seed(0)
    images, labels = torch.rand(20, 1, 28, 28, generator=draw), torch.arange(20) % 10
    data = Dataset("noise", "train", images, labels, tuple("0123456789"))
    model, attack = create("lenet5", channels=1, size=28), PGD(eps=0.1, step_size=0.05, steps=2)
    sys.setprofile(note)
    try:
        fit(model, data, Madry(), attack, Recipe(epochs=1, batch_size=10))
    finally:
        sys.setprofile(None)
    assert "afgstudy.training" in ran and "afgstudy.attacks.gradient" in ran
    assert ran <= set(code_of(fit, Madry(), attack, model))


def test_versions_and_assets_are_ingredients_that_can_be_compared():
    here = surroundings(fit)
    assert here["versions"]["torch"] and here["device"]
    other = here | {"versions": here["versions"] | {"torch": "1.0"}}
    assert differences(here, other) == ["versions torch"]
    assert surroundings("afgstudy.two_stream.labels")["assets"]


def test_a_lazy_package_leads_keys_to_the_modules_that_define_its_names():
    "`afgstudy.data` imports at first use; the key must not take all of it for a `Dataset`."
    from afgstudy import data
    from afgstudy.keys import imported_modules

    for name in data.__all__:
        home = data._HOME[name]
        reached = imported_modules([f"from afgstudy.data import {name}"])
        assert f"afgstudy.data.{home}" in reached and "afgstudy.data" not in reached, name
    assert "afgstudy.data.sources" not in imported_modules(["from afgstudy.training import fit"])


def test_a_jpeg_pipeline_is_described_exactly():
    network = torch.nn.Flatten()
    keys = {key_of(torch.nn.Sequential(JPEG(quality), network)) for quality in (75, 75, 50)}
    assert len(keys) == 2
    assert "afgstudy.cafd.baselines" in code_of(torch.nn.Sequential(JPEG(75), network))


class Circle(torch.nn.Module):
    "Holds a step that holds a method of itself."

    def __init__(self):
        super().__init__()
        self.through = BPDA(self.round)

    def round(self, x):
        return x.round()


@pytest.mark.parametrize("model", [Circle(), torch.nn.Sequential(Circle())])
def test_a_module_that_holds_its_own_method_is_refused_by_name(model):
    with pytest.raises(TypeError, match="exact is a method of Circle, which it is a part of: give a f"):
        canonical(model)


def test_the_first_network_of_afg_is_keyed_with_all_the_code_that_makes_it(monkeypatch):
    from afgstudy.afg import protocol

    asked = {}
    monkeypatch.setattr(protocol, "make_once", lambda kind, what, build, code, store: asked.update(code=code_of(*code)))
    monkeypatch.setattr(protocol, "copy_state", lambda model: {})
    with pytest.raises(AttributeError):  # there is no artifact to go on with
        protocol.first_network(protocol.Protocol(n_first=20))
    reached = ("training", "networks", "models", "data.dataset", "afg.separation")  # small networks are built there
    assert {f"afgstudy.{name}" for name in reached} <= asked["code"].keys()
