"""FGSM, BIM, PGD, MI-FGSM: the promises every attack makes, as properties, and parity with foolbox."""

import math
import warnings
from dataclasses import replace

import foolbox
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from afgstudy.attacks.base import ImageNoise, margin
from afgstudy.attacks.gradient import BIM, FGSM, MIFGSM, PGD, norms
from afgstudy.examples import digits_example
from afgstudy.models import count_passes

CLASSES = [FGSM, BIM, MIFGSM, PGD]
ULP = 2.0**-23


@pytest.fixture(scope="module")
def trained():
    model, test = digits_example()
    return model, test.images(slice(0, 64)), test.y[:64]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


attacks = st.builds(
    lambda kind, norm, loss, targeted, eps: kind(
        eps=eps if norm == "linf" else 10 * eps,
        norm=norm,
        loss=loss,
        targeted=targeted and loss != "dlr",
        **({} if kind is FGSM else {"steps": 3}),
    ),
    st.sampled_from(CLASSES),
    st.sampled_from(["linf", "l2"]),
    st.sampled_from(["ce", "margin", "dlr"]),
    st.booleans(),
    st.floats(0, 0.3),
)


@settings(max_examples=40, deadline=None)
@given(attack=attacks, seed=st.integers(0, 2**31))
def test_never_leaves_the_ball_or_the_image_range(attack, seed, trained):
    model, x, y = trained
    x_adv = attack(model, x[:8], y[:8], seeded(seed))
    assert x_adv.shape == x[:8].shape and x_adv.dtype == x.dtype
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    distance = norms(x_adv.double() - x[:8].double(), attack.norm)
    slack = ULP if attack.norm == "linf" else ULP * math.sqrt(x[0].numel())
    assert (distance <= attack.eps + slack).all()
    assert torch.equal(x_adv, attack(model, x[:8], y[:8], seeded(seed)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"restarts": 3}, {"stop_on_success": True}, {"restarts": 2, "stop_on_success": True}],
    ids=str,
)
def test_an_image_never_depends_on_its_batch(norm, options, trained):
    model, x, y = trained
    double, x = model.double(), x[:6].double()
    try:
        attack = PGD(
            eps=0.1 if norm == "linf" else 1.0,
            step_size=0.03 if norm == "linf" else 0.3,
            steps=8,
            norm=norm,
            **options,
        )
        together = attack(double, x, y[:6], seeded())
        one_by_one = seeded()  # the generator gives one seed an image, in order
        alone = torch.cat([attack(double, x[i : i + 1], y[i : i + 1], one_by_one) for i in range(6)])
    finally:
        model.float()
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_comes_out_as_it_went_in(kind, mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kind(eps=0.1)(model, torch.rand(4, 1, 8, 8), torch.arange(4), seeded(), mode=mode)
    assert [m.training for m in model] == [True, False, True, True, True, True] and model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert torch.equal(model[5].bias.grad, torch.ones(5)) and all(
        p.grad is None for p in list(model.parameters())[:-1]
    )
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_the_model_is_restored_when_the_attack_fails(trained):
    model, x, _ = trained
    model.train()
    try:
        with pytest.raises(ValueError, match="classes 0 to 9"):
            PGD()(model, x[:2], torch.tensor([3, 12]))
        assert model.training and all(p.requires_grad for p in model.parameters())
    finally:
        model.eval()


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_under_any_gradient_mode(outer, trained):
    model, x, y = trained
    expected = PGD(eps=0.1, random_start=False)(model, x[:4], y[:4])
    with outer():
        result = PGD(eps=0.1, random_start=False)(model, x[:4].clone(), y[:4].clone())
    assert torch.equal(result, expected) and not result.requires_grad


@pytest.mark.parametrize("norm, eps, step_size", [("linf", 0.1, 0.01), ("l2", 1.0, 0.1)])
def test_pgd_without_random_start_is_foolboxs(norm, eps, step_size, trained):
    model, x, y = trained
    peer = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    double = model.double()
    try:
        wrapped = foolbox.PyTorchModel(double, bounds=(0, 1), device="cpu")
        theirs = peer(abs_stepsize=step_size, steps=20, random_start=False)(
            wrapped, x.double(), y, epsilons=eps
        )[0]
        ours = PGD(eps=eps, step_size=step_size, steps=20, norm=norm, random_start=False)(
            double, x.double(), y
        )
        assert (ours - theirs).abs().max() < 1e-6
    finally:
        model.float()
    if norm == "linf":  # in float32 too: the sign forgives the last bits
        theirs = peer(abs_stepsize=step_size, steps=20, random_start=False)(
            foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps
        )[0]
        assert (
            PGD(eps=eps, step_size=step_size, steps=20, random_start=False)(model, x, y) - theirs
        ).abs().max() < 1e-6


def test_fgsm_and_bim_are_foolboxs(trained):
    model, x, y = trained
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    assert torch.equal(
        FGSM(eps=0.1)(model, x, y), foolbox.attacks.LinfFastGradientAttack()(wrapped, x, y, epsilons=0.1)[0]
    )
    theirs = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=0.01, steps=15)(
        wrapped, x, y, epsilons=0.1
    )[0]
    assert (BIM(eps=0.1, step_size=0.01, steps=15)(model, x, y) - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_passes_through_the_model_once_a_step(steps, trained):
    model, x, y = trained
    with count_passes(model) as passes:
        PGD(eps=0.1, steps=steps)(model, x, y)
    assert (passes.forward_rows, passes.backward_rows) == (steps * len(x), steps * len(x))


def test_images_that_are_fooled_leave_the_batch(trained):
    model, x, y = trained
    attack = PGD(eps=0.2, step_size=0.02, steps=40, stop_on_success=True)
    with count_passes(model) as passes:
        x_adv = attack(model, x, y, seeded())
    first = attack.steps_to_success(model, x, y, seeded())
    walked = first[first > 0]  # an image that the model gets wrong from the outset takes no step
    steps = walked.clamp(max=40)
    assert passes.backward_rows == int((steps + (walked < 40)).clamp(max=40).sum())
    assert passes.forward_rows < 0.6 * 40 * len(x)
    assert torch.equal(x_adv[first == 0], x[first == 0])


def test_steps_to_success_reads_every_shorter_walk(trained):
    model, x, y = trained
    longest = PGD(eps=0.08, step_size=0.01, steps=24)
    first = longest.steps_to_success(model, x, y, seeded(3))
    assert 0 < (first <= 24).sum() < len(x), "the radius should leave both kinds of image"
    for k in (1, 5, 12, 24):
        shorter = replace(longest, steps=k).steps_to_success(model, x, y, seeded(3))
        assert torch.equal(first <= k, shorter <= k)
        with torch.no_grad():
            x_k = replace(longest, steps=k, stop_on_success=True)(model, x, y, seeded(3))
            assert torch.equal(model(x_k).argmax(1) != y, first <= k)


def test_restarts_only_ever_help_the_attacker(trained):
    model, x, y = trained
    survivors = []
    for restarts in (1, 2, 5):
        x_adv = PGD(eps=0.08, step_size=0.02, steps=6, restarts=restarts, stop_on_success=True)(
            model, x, y, seeded(1)
        )
        with torch.no_grad():
            survivors.append(set((model(x_adv).argmax(1) == y).nonzero().squeeze(1).tolist()))
    assert survivors[0] >= survivors[1] >= survivors[2]


def test_targeted_reaches_the_target_and_untargeted_lowers_the_margin(trained):
    model, x, y = trained
    target = (y + 3) % 10
    for loss in ("ce", "margin", "dlr"):
        if loss != "dlr":
            x_adv = PGD(eps=0.35, step_size=0.02, steps=60, loss=loss, targeted=True)(
                model, x, target, seeded()
            )
            with torch.no_grad():
                assert (model(x_adv).argmax(1) == target).float().mean() > 0.7, loss
        x_adv = PGD(eps=0.1, step_size=0.02, steps=10, loss=loss)(model, x, y, seeded())
        with torch.no_grad():
            assert margin(model(x_adv), y).mean() < margin(model(x), y).mean(), loss


def test_an_empty_batch_is_an_empty_batch(trained):
    model, x, y = trained
    assert PGD()(model, x[:0], y[:0]).shape == (0, 1, 28, 28)
    assert len(PGD().steps_to_success(model, x[:0], y[:0])) == 0


def nan_after(calls: int):
    "A model whose logits become NaN after some calls."
    count = [0]

    def model(x):
        count[0] += 1
        logits = torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3)), x[:, 0, 0, 0]], dim=1)
        return logits * (math.nan if count[0] > calls else 1)

    return model


@pytest.mark.parametrize("calls", [0, 3])
def test_nan_logits_raise(calls):
    with pytest.raises(ValueError, match="NaN"):
        PGD(steps=5)(nan_after(calls), torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PGD(eps=255), r"did you mean eps=255/255"),
        (lambda: PGD(eps=float("nan")), "eps must be a number"),
        (lambda: PGD(steps=0), "steps must be at least 1"),
        (lambda: PGD(norm="l1"), "norm must be"),
        (lambda: PGD(loss="dlr", targeted=True), "needs the true class"),
        (lambda: PGD(loss="mse"), "loss must be one of"),
        (lambda: PGD(restarts=2, random_start=False), "more than 1 needs random_start=True"),
        (
            lambda: PGD()(lambda x: x.flatten(1), torch.rand(2, 1, 2, 2) * 255, torch.tensor([0, 1])),
            r"expected \[0, 1\]",
        ),
        (lambda: PGD()(lambda x: x.flatten(1), torch.rand(2, 2, 2), torch.tensor([0, 1])), r"\[B, C, H, W\]"),
        (lambda: PGD()(lambda x: x.flatten(1), torch.rand(2, 1, 2, 2), torch.tensor([0.0, 1])), "int64"),
        (
            lambda: PGD()(lambda x: x.flatten(1), torch.rand(2, 1, 2, 2), torch.tensor([0])),
            r"\[2\] of class indices",
        ),
        (lambda: PGD()(lambda x: x, torch.rand(2, 1, 2, 2), torch.tensor([0, 1])), r"logits \[2, K\]"),
        (
            lambda: PGD(loss="dlr")(
                lambda x: x.flatten(1)[:, :2], torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
            ),
            "3 classes",
        ),
    ],
)
def test_mistakes_are_refused_with_what_was_given(call, words):
    with pytest.raises(ValueError, match=f"(?i){words}"):
        call()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**62), draw=st.integers(0, 1000), n=st.integers(1, 5))
def test_noise_belongs_to_the_image(seed, draw, n):
    noise = ImageNoise(torch.arange(seed, seed + n))
    for i in range(n):
        assert torch.equal(
            noise[torch.tensor([i])].uniform(draw, (2, 3)), noise.uniform(draw, (2, 3))[i : i + 1]
        )
    u = noise.uniform(draw, (64,), torch.float64)
    assert (
        (0 <= u).all() and (u < 1).all() and not torch.equal(u, noise.uniform(draw + 1, (64,), torch.float64))
    )
    assert torch.equal(u.float(), noise.uniform(draw, (64,)))


class Tuple(nn.Module):
    def forward(self, x):
        return x.flatten(1), None


@pytest.mark.parametrize(
    "attack", [FGSM(), BIM(), MIFGSM(), PGD(), PGD(stop_on_success=True), PGD(restarts=2)], ids=lambda a: a.name
)
@pytest.mark.parametrize(
    ("model", "generator", "dtype", "message"),
    [
        (nn.Flatten(), 0, torch.float32, "generator must be a torch.Generator or None, got 0"),
        (Tuple(), None, torch.float32, r"must return logits \[2, K\], got tuple"),
        (lambda x: x.flatten(1).detach(), None, torch.float32, "no gradient with respect to the images"),
        (lambda x: torch.ones(len(x), 16).requires_grad_(), None, torch.float32, "no gradient"),
        (nn.Flatten(), None, torch.float16, "x must be float32 or float64, got torch.float16"),
        (nn.Flatten(), None, torch.bfloat16, "x must be float32 or float64, got torch.bfloat16"),
        (None, None, torch.float32, "model must be a function from images to logits, got NoneType"),
    ],
)
def test_what_no_attack_can_work_with_is_named(attack, model, generator, dtype, message):
    x = torch.rand(2, 1, 4, 4).to(dtype)
    x[:, :, 0, 0] = 1  # class 0 wins, so there is something to attack
    with pytest.raises(ValueError, match=message):
        attack(model, x, torch.tensor([0, 0]), generator)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type_are_taken(dtype, trained):
    model, x, y = trained
    for attack in (FGSM(0.1), PGD(0.1, steps=2), PGD(0.1, steps=2, stop_on_success=True)):
        assert torch.equal(attack(model, x[:4], y[:4].to(dtype), seeded()), attack(model, x[:4], y[:4], seeded()))


def test_a_model_that_ends_in_a_softmax_is_warned_of(trained):
    model, x, y = trained
    with pytest.warns(UserWarning, match="look like probabilities"):
        PGD(0.1, steps=2)(nn.Sequential(model, nn.Softmax(1)), x[:4], y[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(0.1, steps=2)(model, x[:4], y[:4])
        PGD(0.1, steps=2)(nn.Sequential(model, nn.LogSoftmax(1)), x[:4], y[:4])


def test_steps_that_cannot_reach_the_edge_are_warned_of_by_name():
    with pytest.warns(UserWarning, match="PGD-10: 10 steps of 0.01 reach 0.1 .*less than eps=0.3"):
        PGD(eps=0.3, step_size=0.01)
    with pytest.warns(UserWarning, match="MI-FGSM-5: 5 steps of 0.01 "):
        MIFGSM(eps=0.3, step_size=0.01, steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, norm in ((BIM, "linf"), (PGD, "l2"), (MIFGSM, "linf")):
            assert kind(eps=0.3, norm=norm, step_size=0.03).stride == 0.03
            assert kind(eps=0.3, norm=norm, steps=7).stride * 7 >= 0.3 * (1 - 1e-9)


@pytest.mark.parametrize("attack", [BIM(eps=0.3), PGD(eps=0.3), PGD(eps=3.0, norm="l2")], ids=repr)
def test_the_default_step_leaves_nothing_of_an_undefended_network(attack, trained):
    "With steps of 2/255 these left it 42%, 32% and 67%."
    model, x, y = trained
    with torch.no_grad():
        assert (model(attack(model, x, y, seeded())).argmax(1) == y).float().mean() < 0.1
