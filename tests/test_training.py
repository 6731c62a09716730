"""Training: objectives by finite differences, counted passes, resume after SIGKILL, determinism, refusals."""

import dataclasses
import math
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from afgstudy.attacks.gradient import FGSM, PGD
from afgstudy.data import load
from afgstudy.device import generator_for
from afgstudy.keys import state_digest
from afgstudy.models import count_passes, create
from afgstudy.training import ALP, TRADES, Madry, Recipe, Standard, fit, kl_to, learning_rate

ATTACK = PGD(eps=0.2, step_size=0.05, steps=4)
OBJECTIVES = [Standard(), Madry(), Madry(clean_weight=1), ALP(), ALP(over_classes="sum"), TRADES()]


def lenet(seed=0):
    return create("lenet5", classes=10, channels=1, size=28, seed=seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train", n=320)


@pytest.fixture
def batch(digits):
    return digits.images(slice(0, 8)), digits.y[:8]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradient_of_the_loss_agrees_with_finite_differences(objective, batch, monkeypatch):
    torch.manual_seed(0)
    x, y = batch[0][:, :, ::4, ::4].double(), batch[1]
    model = nn.Sequential(nn.Flatten(), nn.Linear(49, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    x_adv = (x + 0.05).clamp(0, 1)

    class Fixed:  # an attack that does not depend on the weights, so that the loss is smooth in them
        def __call__(self, *args, **kwargs):
            return x_adv

        def maximise(self, *args, **kwargs):
            return x_adv

    def loss():
        return objective(model, x, y, Fixed(), generator_for(0, "noise")).total

    # a finite difference needs float64, also where the library takes `.float()` of the logits
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    weight = model[3].weight
    (gradient,) = torch.autograd.grad(loss(), weight)
    h = 1e-5
    for i, j in ((0, 0), (3, 5), (9, 11)):
        with torch.no_grad():
            weight[i, j] += h
            high = loss().item()
            weight[i, j] -= 2 * h
            low = loss().item()
            weight[i, j] += h
        assert math.isclose((high - low) / (2 * h), gradient[i, j].item(), rel_tol=1e-5, abs_tol=1e-8)


def test_trades_divergence_is_torchs_own(batch):
    p, q = (torch.randn(5, 10, generator=generator_for(i, "z")).double() for i in (0, 1))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert torch.allclose(kl_to(q, p.log_softmax(1)), kl)


@pytest.mark.parametrize(
    "objective, forward, backward",
    [
        (Standard(), 1, 1),
        (Madry(), 4 + 1, 4 + 1),
        (Madry(clean_weight=1), 4 + 2, 4 + 2),
        (ALP(), 4 + 2, 4 + 2),
        (TRADES(), 4 + 3, 4 + 2),
    ],
    ids=lambda v: repr(v) if not isinstance(v, int) else str(v),
)
def test_passes_of_a_step(objective, forward, backward, batch):
    x, y = batch
    model = lenet()
    with count_passes(model) as passes:
        objective(model, x, y, ATTACK, generator_for(0, "noise")).total.backward()
    assert (passes.forward_rows, passes.backward_rows) == (forward * len(x), backward * len(x))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_same_seed_same_weights_and_the_global_random_state_is_left_alone(objective, digits):
    recipe = Recipe(epochs=2, batch_size=64, augment="crop_flip")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    digests = set()
    for _ in range(2):
        fit(model := lenet(), digits, objective, ATTACK, recipe)
        digests.add(state_digest(model))
    assert len(digests) == 1 and torch.equal(before, torch.get_rng_state())
    fit(
        model := lenet(),
        digits,
        objective,
        ATTACK,
        Recipe(epochs=2, batch_size=64, augment="crop_flip", seed=1),
    )
    assert state_digest(model) not in digests


@pytest.mark.parametrize("epochs, warmup", [(12, 0.2), (5, 0.5), (3, 0.0)])
def test_one_cycle_rises_to_its_peak_and_falls_to_nothing(epochs, warmup):
    recipe = Recipe(epochs=epochs, lr=3e-3, schedule="one_cycle", warmup=warmup)
    rates = [learning_rate(recipe, epochs * i / 1000) for i in range(1001)]
    peak = round(1000 * warmup)
    assert rates[peak] == pytest.approx(3e-3) and max(rates) == pytest.approx(3e-3) and rates[-1] == 0
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    steps = [b - a for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False)]
    assert max(steps) == pytest.approx(min(steps))  # in a straight line


@dataclasses.dataclass(frozen=True)
class Recorded(PGD):
    "PGD that writes down the radius and the step it was called with."

    def __call__(self, model, x, y, generator=None, mode="eval"):
        CALLS.append((self.eps, self.step_size))
        return super().__call__(model, x, y, generator, mode)


CALLS = []


def test_the_inner_attack_grows_to_its_radius_and_validation_meets_it_whole(digits):
    CALLS.clear()
    recipe = Recipe(epochs=3, batch_size=64, ramp_epochs=2)  # 320 images: five steps an epoch
    valid = load("digits", "validation", n=20)
    attack = Recorded(eps=0.2, step_size=0.05, steps=2)
    fit(lenet(), digits, Madry(), attack, recipe, valid)
    share = [min(i / 10, 1.0) for i in range(15)]
    per_epoch = [CALLS[e * 6 : e * 6 + 6] for e in range(3)]
    trained_with = [call for calls in per_epoch for call in calls[:5]]
    assert [eps for eps, _ in trained_with] == pytest.approx([0.2 * s for s in share])
    assert [step for _, step in trained_with] == pytest.approx([0.05 * s for s in share])
    assert [calls[5] for calls in per_epoch] == [(0.2, 0.05)] * 3


def test_validation_decides_nothing_unless_the_best_epoch_is_asked_for(digits):
    recipe = Recipe(epochs=2, batch_size=64, schedule="one_cycle", ramp_epochs=1)
    digests = set()
    for valid in (None, load("digits", "validation", n=20)):
        fit(model := lenet(), digits, Madry(), ATTACK, recipe, valid)
        digests.add(state_digest(model))
    assert len(digests) == 1


@pytest.mark.parametrize("torn", [b"", b"no checkpoint", "half"], ids=["empty", "foreign", "half"])
def test_a_torn_checkpoint_is_moved_aside_and_the_training_begins_again(tmp_path, torn):
    path, recipe = tmp_path / "net.pt", Recipe(epochs=2, batch_size=64)
    digits = load("digits", "train", n=128)
    fit(whole := lenet(), digits, recipe=recipe, checkpoint=path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if torn == "half" else torn)
    with pytest.warns(UserWarning, match="net.pt is damaged and now called net.pt.damaged"):
        fit(again := lenet(), digits, recipe=recipe, checkpoint=path)
    assert state_digest(again) == state_digest(whole) and (tmp_path / "net.pt.damaged").is_file()


PROGRAM = textwrap.dedent(
    """
    import sys, torch
    torch.set_num_threads(1)
    from afgstudy.attacks.gradient import PGD
    from afgstudy.data import load
    from afgstudy.models import create
    from afgstudy.keys import state_digest
    from afgstudy.training import ALP, Recipe, fit

    model = create("resnet9", classes=10, channels=1, size=28, width=4, seed=0)  # has batch normalisation
    recipe = Recipe(epochs=4, batch_size=64, optimiser="sgd", lr=0.02, schedule="one_cycle", ramp_epochs=2.5,
                    augment="crop_flip")
    data, valid = load("digits", "train", n=256), load("digits", "validation", n=64)
    fit(model, data, ALP(), PGD(eps=0.1, step_size=0.05, steps=3), recipe, valid, checkpoint=sys.argv[1],
        after_epoch=lambda epoch, _: print("epoch", epoch, flush=True))
    print("digest", state_digest(model), flush=True)
    """
)


def run_to_the_end(checkpoint) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, checkpoint], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("digest ")[1].strip()


def test_killed_with_sigkill_and_restarted_it_ends_in_the_same_weights(tmp_path):
    expected = run_to_the_end(tmp_path / "whole.pt")
    checkpoint = tmp_path / "killed.pt"
    for epoch, pause in ((0, 0.0), (2, 0.15)):  # once right after an epoch, once in the middle of one
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, checkpoint], stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line.startswith(f"epoch {epoch}"):
                break
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert run_to_the_end(checkpoint) == expected


def test_a_truncated_part_file_is_never_taken_for_a_checkpoint(tmp_path, digits):
    recipe = Recipe(epochs=1, batch_size=64)
    (tmp_path / "net.pt.part").write_bytes(b"half a file")
    fit(lenet(), digits, recipe=recipe, checkpoint=tmp_path / "net.pt")
    assert torch.load(tmp_path / "net.pt", weights_only=True)["history"][0]["epoch"] == 0


def test_best_is_chosen_on_the_validation_split(digits):
    valid = load("digits", "validation", n=100)
    model = lenet()
    result = fit(model, digits, Madry(), ATTACK, Recipe(epochs=4, batch_size=64), valid, keep="best")
    robust = [(row["validation robust"], row["validation clean"]) for row in result.history]
    assert robust[result.best_epoch] == max(robust)
    assert all(torch.equal(result.best_state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "precision, channels_last", [("bfloat16", False), ("float32", True), ("bfloat16", True)]
)
def test_mixed_precision_and_channels_last_learn_too(precision, channels_last, digits):
    recipe = Recipe(epochs=3, batch_size=64, precision=precision, channels_last=channels_last)
    history = fit(lenet(), digits, Madry(), FGSM(eps=0.1), recipe).history
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: fit(lenet(), d, Madry()), "needs an attack"),
        (
            lambda d: fit(create("lenet5", classes=3, channels=1, size=28), d),
            "labels of 'digits' run from 0 to 9",
        ),
        (lambda d: fit(lenet(), d, recipe=Recipe(epochs=1, lr=1e30, optimiser="sgd")), "loss is"),
        (lambda d: fit(lenet(), d, keep="best"), "validation set"),
        (lambda d: Recipe(schedule="cosin"), "schedule must be one of"),
        (lambda d: Recipe(epochs=0), "epochs must be > 0"),
        (lambda d: Recipe(warmup=1.0), "warmup is a share"),
        (lambda d: Recipe(ramp_epochs=-1), "ramp_epochs must be >= 0"),
        (
            lambda d: fit(lenet(), d, Madry(), lambda *a, **k: a[1], Recipe(ramp_epochs=1)),
            "ramp_epochs needs an attack",
        ),
        (lambda d: ALP(over_classes="max"), "over_classes must be"),
        (lambda d: ALP(weight=-0.5), "weight weighs a loss"),
        (lambda d: TRADES(beta=float("nan")), "beta weighs a loss"),
    ],
)
def test_mistakes_are_refused_with_what_was_given(call, words, digits):
    with pytest.raises((ValueError, FloatingPointError), match=words):
        call(digits)
