"""Attacks on a pretend accelerator: the same answers as on the CPU, and few enough reads by the host."""

import math

import pretend
import pytest
import torch
from torch import nn

from afgstudy.attacks import (
    BIM,
    DDN,
    FGSM,
    MIFGSM,
    PGD,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    PixelAttack,
    SpatialTransform,
    UniversalPerturbation,
)
from afgstudy.attacks.external import Pipeline
from afgstudy.device import default_device, describe_device, own_random

STEPS = 20

ATTACKS = {
    "FGSM": FGSM(0.1),
    "BIM": BIM(0.1, steps=STEPS),
    "MI-FGSM": MIFGSM(0.1, steps=STEPS),
    "PGD": PGD(0.1, steps=STEPS),
    "PGD L2": PGD(1.0, "l2", steps=STEPS),
    "PGD stopping": PGD(0.1, steps=STEPS, stop_on_success=True),
    "PGD restarts": PGD(0.05, steps=STEPS, restarts=2),
    "DeepFool": DeepFool(steps=STEPS),
    "DeepFool-Linf": DeepFool("linf", steps=STEPS),
    "CW": CarliniWagner(steps=STEPS, search_steps=9, step_size=0.1, initial_c=1.0),
    "pixel": PixelAttack(population=20, steps=STEPS),
    "spatial": SpatialTransform(steps=STEPS, searches=1),
}


@pytest.fixture(scope="module")
def smooth():
    "A small network in float64, eight images that it knows, and the same on the accelerator."
    torch.manual_seed(0)
    here = (
        nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8 * 144, 10))
        .double()
        .eval()
    )
    x = torch.rand(8, 1, 28, 28, dtype=torch.float64)
    there = (
        nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8 * 144, 10))
        .double()
        .eval()
    )
    there.load_state_dict(here.state_dict())
    with torch.no_grad():
        return here, there.to("npu"), x, here(x).argmax(1)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gives_the_images_of_the_cpu(name, smooth):
    here, there, x, y = smooth
    expected = ATTACKS[name](here, x, y, seeded())
    result = ATTACKS[name](there, x.to("npu"), y.to("npu"), seeded())
    assert result.device.type == "npu"
    assert torch.allclose(result.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_host_reads_at_most_at_every_eighth_step(name, smooth):
    "Five reads to check what goes in and comes out, and two for each look; a round of C&W is a loop of its own."
    _, there, x, y = smooth
    x, y = x.to("npu"), y.to("npu")
    attack = ATTACKS[name]
    rounds = getattr(attack, "search_steps", getattr(attack, "restarts", 1))
    with pretend.reads() as found:
        attack(there, x, y, seeded())
    looks = math.ceil((getattr(attack, "steps", 1) + 1) / 8)
    assert sum(found.values()) <= 5 + rounds * 2 * looks, dict(found)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_wrapped_attacks_and_the_universal_one_run(smooth):
    here, there, x, y = smooth
    here, there = here.float(), there.float()
    x, y = x.float().to("npu"), y.to("npu")
    try:
        for attack in (AutoAttack(0.1, steps=3, queries=5), DDN(steps=3)):
            result = attack(there, x, y, seeded())
            assert result.device == x.device and 0 <= result.min() and result.max() <= 1
        fitted = UniversalPerturbation(0.1, passes=1, deepfool=DeepFool(steps=3)).fit(there, [x[:4], x[4:]])
        assert (fitted(there, x, y) - x).abs().max() <= 0.1 + 1e-6
    finally:
        here.double(), there.double()


def test_what_a_library_calls_is_looked_at_in_every_eighth_pass(smooth):
    _, there, x, _ = smooth
    pipeline = Pipeline(there, torch.float64)
    with pretend.reads() as found, torch.no_grad():
        for _ in range(16):
            pipeline(x.to("npu"))
    assert sum(found.values()) == 2
    broken = Pipeline(lambda images: there(images) * math.nan, torch.float64)
    with pytest.raises(ValueError, match="NaN or infinite logits for 8 of 8"):
        broken(x.to("npu"))


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.arange(1, 8, 2, device=device),
        lambda device: torch.linspace(0, 1, 5, device=device),
        lambda device: torch.hann_window(4, device=device),
        lambda device: torch.ones(1, 3, device=device).squeeze_(0),
        lambda device: torch.ones(4, 3, device=device).topk(2).values,
        lambda device: torch.nn.functional.one_hot(torch.arange(3, device=device), 4),
        lambda device: torch.arange(6, device=device).view(2, 3)[:, [2, 0]],
    ],
)
def test_what_is_made_on_the_device_has_the_shape_it_has_on_the_cpu(make):
    there, here = make("npu"), make("cpu")
    assert there.device.type == "npu" and there.shape == here.shape and torch.equal(there.cpu(), here)


def test_the_device_refuses_what_cuda_refuses_and_counts_reads():
    x = torch.rand(3, 4).to("npu")
    for wrong, message in (
        (lambda: x + torch.rand(3, 4), "same device"),
        (lambda: x.numpy(), "can't convert"),
        (lambda: torch.rand(3, generator=seeded(), device="npu"), "for generator but found 'cpu'"),
        (lambda: torch.zeros(5)[torch.tensor([1], device="npu")], "same device"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=message):
            wrong()
    with pretend.reads() as found:
        _ = x * torch.tensor(2.0) + 1, x.clone(), torch.tensor([1.0], device="npu"), x[torch.tensor([0])]
    assert not found
    with pretend.reads() as found:
        _ = x.sum().item(), x[x > 0.5], x.cpu(), x.tolist(), (x > 1).nonzero(), bool((x > 2).any())
    assert found == {"item": 2, "mask": 1, "copy": 2, "nonzero": 1}


def test_what_is_saved_on_the_device_is_loaded_on_the_cpu(tmp_path):
    torch.save({"weight": torch.ones(3, device="npu")}, tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True)["weight"], torch.ones(3))


def test_a_generator_may_live_on_the_device():
    there, here = torch.Generator("npu").manual_seed(3), torch.Generator().manual_seed(3)
    assert there.device.type == "npu" and here.device.type == "cpu"
    numbers = torch.rand(4, generator=there, device="npu"), torch.rand(4, generator=here)
    assert torch.equal(numbers[0].cpu(), numbers[1])
    assert isinstance(torch.default_generator, torch.Generator)


def test_the_library_takes_any_device_that_torch_has(monkeypatch):
    monkeypatch.setenv("AFGSTUDY_DEVICE", "npu")
    assert default_device().type == "npu" and describe_device()["kind"] == "npu"
    before = torch.npu.get_rng_state()
    with own_random("npu", 3):
        first = torch.rand(4, device="npu")
    with own_random("npu", 3):
        assert torch.equal(first, torch.rand(4, device="npu"))
    assert torch.equal(torch.npu.get_rng_state(), before)
    monkeypatch.setenv("AFGSTUDY_DEVICE", "toaster")
    with pytest.raises(RuntimeError, match="AFGSTUDY_DEVICE=toaster is no device torch knows"):
        default_device()
    monkeypatch.setenv("AFGSTUDY_DEVICE", "xpu")
    with pytest.raises(RuntimeError, match="no usable XPU device"):
        default_device()
