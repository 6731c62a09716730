"""Every objective and every defence on a pretend accelerator: trained there, in the steps that the CPU would take."""

import pretend
import pytest
import torch

from afgstudy.aalp.objective import choose, methods
from afgstudy.attacks import FGSM, PGD
from afgstudy.cafd import (
    CAFD,
    JPEG,
    ClassActivationAttack,
    Denoiser,
    PurifierRecipe,
    TotalVariation,
    fit_purifier,
)
from afgstudy.data import load
from afgstudy.device import default_device
from afgstudy.models import create
from afgstudy.training import TRADES, Madry, Recipe, Standard, fit

OBJECTIVES = choose(list(methods())) | {"Standard": Standard(), "TRADES": TRADES(), "Madry": Madry()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_on_the_device_as_on_the_cpu(name):
    attack, recipe = PGD(eps=0.1, step_size=0.05, steps=2), Recipe(epochs=1, batch_size=16, lr=0.01)
    losses = []
    for device in ("cpu", default_device()):
        data = load("digits", "train", n=32, device=device)
        model = create("lenet5", classes=10, channels=1, size=data.shape[-1], seed=0).to(device)
        result = fit(model, data, OBJECTIVES[name], attack, recipe)
        losses.append([row["loss"] for row in result.history])
    assert default_device().type == "npu" and next(model.parameters()).device.type == "npu"
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_a_training_is_read_only_by_the_checks_of_its_attack(name):
    "Guided Dropout and the weights of pairs read nothing: what grows with the batches is two reads for each attack."
    found = {}
    for batches in (2, 4):
        data = load("digits", "train", n=16 * batches, device=default_device())
        model = create("lenet5", classes=10, channels=1, size=data.shape[-1], seed=0).to(default_device())
        with pretend.reads() as reads:
            fit(model, data, OBJECTIVES[name], PGD(eps=0.1, step_size=0.05, steps=7), Recipe(epochs=1, batch_size=16))
        found[batches] = sum(reads.values())
    assert found[4] - found[2] <= (2 * 2 if OBJECTIVES[name].needs_attack else 0), found


def test_cafd_is_trained_attacked_and_answers_on_the_device():
    answers = []
    for device in (torch.device("cpu"), default_device()):
        data = load("digits", "train", n=16, device=device)
        target = (
            create("pooled_cnn", classes=10, channels=1, size=data.shape[-1], width=4, seed=0)
            .eval()
            .to(device)
        )
        x, y = data.images(), data.y
        hit = ClassActivationAttack(eps=0.1, steps=2)(target, x, y, torch.Generator().manual_seed(0))
        denoiser = Denoiser(data.shape[0], 0.25, 0.9, 0)
        history = fit_purifier(
            denoiser,
            target,
            data,
            hit,
            recipe=PurifierRecipe(epochs=1, batch_size=8, discriminator_width=1 / 8),
        )
        defence = CAFD(target, denoiser)
        found = FGSM(0.05)(defence.straight, x, y)
        answers.append((history[-1], defence(x).label.cpu(), hit.cpu(), found.cpu()))
    here, there = answers
    assert torch.allclose(there[2], here[2], atol=1e-3)
    assert there[0].keys() == here[0].keys() and there[3].shape == x.shape


def test_baselines_answer_on_the_device_and_jpeg_reads_once_a_batch():
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for change, most in ((JPEG(75), 1), (TotalVariation(), 0)):
        with pretend.reads() as found:
            there = change(x.to("npu"))
        assert sum(found.values()) <= most, dict(found)
        assert torch.allclose(there.cpu(), change(x), atol=1e-5)
