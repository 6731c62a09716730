"""What a GPU has to give: the CPU's answers, few waits of the host, and the precision that the records promise.

Skipped where torch finds no CUDA device. `make gpu` runs this file first. Most of it also runs on the pretend
accelerator (`AFGSTUDY_DEVICE=npu PYTHONPATH=tests/accelerator`), which `make test` does.
"""

import math
import os
import warnings

import pytest
import torch
from torch import nn

from afgstudy.afg.drawing import Visualiser, visualise
from afgstudy.afg.groups import nmf
from afgstudy.afg.separation import small_vgg
from afgstudy.attacks import BIM, FGSM, MIFGSM, PGD, CarliniWagner, DeepFool, PixelAttack, SpatialTransform
from afgstudy.data import load
from afgstudy.device import LOOK_EVERY, describe_device, full_precision, training_precision
from afgstudy.models import create
from afgstudy.training import Madry, Recipe, fit

PRETEND = os.environ.get("AFGSTUDY_DEVICE") == "npu"
DEVICE = "npu" if PRETEND else "cuda"
pytestmark = pytest.mark.skipif(
    not PRETEND and not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"
)
needs_cuda = pytest.mark.skipif(PRETEND, reason="asks CUDA itself; the pretend accelerator has no such switch")
STEPS = 20
ATTACKS = {
    "FGSM": FGSM(0.1),
    "BIM": BIM(0.1, steps=STEPS),
    "MI-FGSM": MIFGSM(0.1, steps=STEPS),
    "PGD": PGD(0.1, steps=STEPS),
    "PGD L2": PGD(1.0, "l2", steps=STEPS),
    "DeepFool": DeepFool(steps=STEPS),
    "DeepFool-Linf": DeepFool("linf", steps=STEPS),
    "CW": CarliniWagner(steps=STEPS, search_steps=2, step_size=0.1, initial_c=1.0),
    "pixel": PixelAttack(population=20, steps=STEPS),
    "spatial": SpatialTransform(steps=STEPS, searches=1),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def smooth():
    "A small network in float64 on both devices, eight images and the classes it sees in them."
    torch.manual_seed(0)
    layers = lambda: nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.Softplus(), nn.Flatten(), nn.Linear(1152, 10))  # noqa: E731
    here, there = layers().double().eval(), layers().double().eval()
    there.load_state_dict(here.state_dict())
    x = torch.rand(8, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        return here, there.to(DEVICE), x, here(x).argmax(1)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gives_the_images_of_the_cpu(name, smooth):
    here, there, x, y = smooth
    found = ATTACKS[name](there, x.to(DEVICE), y.to(DEVICE), seeded())
    assert found.device.type == DEVICE
    assert torch.allclose(found.cpu(), ATTACKS[name](here, x, y, seeded()), rtol=0, atol=1e-7)


@needs_cuda
@pytest.mark.parametrize("name", ATTACKS)
def test_the_host_waits_at_most_at_every_eighth_step(name, smooth):
    "CUDA itself warns of every wait."
    _, there, x, y = smooth
    x, y, attack = x.to(DEVICE), y.to(DEVICE), ATTACKS[name]
    attack(there, x, y, seeded())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attack(there, x, y, seeded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(w.message) for w in said)
    looks = math.ceil((getattr(attack, "steps", 1) + 1) / LOOK_EVERY)
    assert waits <= 5 + getattr(attack, "search_steps", 1) * 2 * looks


def test_a_training_takes_the_steps_of_the_cpu_and_goes_on_where_it_was_ended(tmp_path):
    attack, recipe = PGD(eps=0.1, step_size=0.05, steps=2), Recipe(epochs=2, batch_size=16, lr=0.01)

    def trained(device: str, epochs: int, **options) -> list[float]:
        data = load("digits", "train", n=32, device=torch.device(device))
        model = create("lenet5", classes=10, channels=1, size=data.shape[-1], seed=0).to(device)

        def stop(epoch: int, model: nn.Module) -> None:
            if epoch + 1 == epochs < recipe.epochs:
                raise KeyboardInterrupt

        return [row["loss"] for row in fit(model, data, Madry(), attack, recipe, after_epoch=stop, **options).history]

    whole = trained(DEVICE, 2)
    with pytest.raises(KeyboardInterrupt):
        trained(DEVICE, 1, checkpoint=tmp_path / "checkpoint.pt")
    assert trained(DEVICE, 2, checkpoint=tmp_path / "checkpoint.pt") == pytest.approx(whole, rel=1e-4)
    assert whole == pytest.approx(trained("cpu", 2), rel=2e-2)  # TF32, where the device has it


def test_pictures_and_factors_are_those_of_the_cpu():
    here, there = (small_vgg(widths=(6, 6, 8, 8, 10, 12), seed=3).eval() for _ in range(2))
    directions = {"relu4": torch.rand(2, 3, 8, generator=seeded())}
    pictures = [
        visualise(model.to(device), {k: v.to(device) for k, v in directions.items()}, Visualiser.small(16, steps=4))
        for model, device in ((here, "cpu"), (there, DEVICE))
    ]
    assert torch.allclose(pictures[1]["relu4"].cpu(), pictures[0]["relu4"], atol=1e-2)
    a = torch.rand(3, 30, 4, generator=seeded()) @ torch.rand(3, 4, 12, generator=seeded())
    for one, other in zip(nmf(a.to(DEVICE), 3), nmf(a, 3), strict=True):
        assert torch.allclose(one.cpu(), other, rtol=1e-2, atol=1e-3)


@needs_cuda
def test_products_are_float32_in_attacks_and_tf32_in_trainings():
    g = torch.Generator(DEVICE).manual_seed(0)
    a, b = torch.rand(2, 512, 512, device=DEVICE, generator=g)
    exact = (a.double() @ b.double()).float()
    with full_precision():
        careful = ((a @ b - exact).abs() / exact).max().item()
    with training_precision():
        quick = ((a @ b - exact).abs() / exact).max().item()
    assert careful < 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < quick < 1e-2
    about = describe_device(torch.device(DEVICE))
    assert about["kind"] == "cuda" and about["name"] and about["tf32"] == "in training only"


@needs_cuda
def test_an_attack_leaves_no_memory_behind(smooth):
    _, there, x, y = smooth
    x, y = x.to(DEVICE), y.to(DEVICE)
    for _ in range(2):  # the first call loads libraries
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        found = PGD(0.1, steps=3)(there, x, y, seeded())
        del found
    assert torch.cuda.memory_allocated() <= before
