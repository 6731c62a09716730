"""DeepFool, Carlini-Wagner and universal perturbations: their promises, parity with foolbox, their cost in passes."""

import math
import warnings
from dataclasses import replace

import foolbox
import pytest
import torch
from torch import nn

from afgstudy.attacks.carlini import CarliniWagner, to_image, to_w
from afgstudy.attacks.deepfool import DeepFool
from afgstudy.attacks.gradient import norms
from afgstudy.attacks.universal import FittedUniversal, UniversalPerturbation, project_perturbation
from afgstudy.examples import digits_example
from afgstudy.models import count_passes

QUICK = CarliniWagner(steps=40, search_steps=4, step_size=0.05, initial_c=0.1)
MINIMAL = [DeepFool(), DeepFool("linf"), QUICK]
EVERY = [*MINIMAL, FittedUniversal(torch.full((1, 28, 28), 0.1), 0.1, "linf")]


@pytest.fixture(scope="module")
def trained():
    "A network, and digits with as many exact zeros as MNIST has."
    model, test = digits_example()
    x = test.images(slice(0, 60))
    x = torch.where(x < 0.35, torch.zeros_like(x), x)
    assert (x == 0).float().mean() > 0.5
    y = test.y[:60].clone()
    y[7] = (y[7] + 1) % 10  # at least one image is wrong before any attack
    return model, x, y


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("attack", EVERY, ids=lambda a: a.name)
def test_stays_in_range_and_leaves_its_input_alone(attack, trained):
    model, x, y = trained
    before = x.clone(), y.clone()
    x_adv = attack(model, x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert torch.equal(x_adv, attack(model, x, y))
    empty = attack(model, x[:0], y[:0])
    assert empty.shape == (0, 1, 28, 28)


@pytest.mark.parametrize("attack", MINIMAL, ids=lambda a: a.name)
def test_images_that_are_wrong_already_come_back_bit_for_bit(attack, trained):
    model, x, y = trained
    wrong = answers(model, x) != y
    assert wrong[7] and not wrong.all()
    x_adv = attack(model, x, y)
    assert torch.equal(x_adv[wrong], x[wrong])
    assert (norms(x_adv - x)[~wrong] > 0).float().mean() > 0.9
    assert (answers(model, x_adv) != y).float().mean() > 0.9
    assert torch.equal(attack(model, x[wrong], y[wrong]), x[wrong])


@pytest.mark.parametrize(
    "attack",
    [
        DeepFool(),
        DeepFool("linf"),
        QUICK,
        CarliniWagner(steps=160, search_steps=2, step_size=0.1, initial_c=1e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("every", [1, 8])
def test_an_image_never_depends_on_its_batch(attack, every, trained, monkeypatch):
    "Also when finished images are held still and leave every eighth step only, as on a GPU."
    monkeypatch.setattr("afgstudy.attacks.deepfool.may_look", lambda step, device: step % every == 0)
    model, x, y = trained
    double, x, y = model.double(), x[:8].double(), y[:8]
    try:
        together = attack(double, x, y)
        order = torch.tensor([7, 3, 0, 1, 2, 6, 5, 4])
        assert torch.allclose(attack(double, x[order], y[order]), together[order], rtol=0, atol=1e-9)
        monkeypatch.undo()
        alone = torch.cat([attack(double, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    finally:
        model.float()
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)


class Watched(nn.Module):
    "Every kind of state a module has; refuses to be called unless it is frozen."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 5)
        )

    def forward(self, x):
        assert not any(p.requires_grad for p in self.parameters()), (
            "gradients of parameters would be computed"
        )
        assert not self.body[3].training
        return self.body(x)


@pytest.mark.parametrize(
    "what", [*MINIMAL, UniversalPerturbation(eps=0.2, passes=2)], ids=lambda a: type(a).__name__
)
def test_the_model_comes_out_as_it_went_in(what):
    torch.manual_seed(0)
    model = Watched().train()
    model.body[1].eval()
    model.body[0].weight.requires_grad_(False)
    model.body[5].bias.grad = torch.ones(5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 5
    with torch.inference_mode():
        what.fit(model, [x]) if isinstance(what, UniversalPerturbation) else what(model, x, y)
    assert [m.training for m in model.body] == [True, False, True, True, True, True] and model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert torch.equal(model.body[5].bias.grad, torch.ones(5))
    assert all(p.grad is None for p in list(model.parameters())[:-1])
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("attack", MINIMAL, ids=lambda a: a.name)
def test_works_under_any_gradient_mode(attack, outer, trained):
    model, x, y = trained
    expected = attack(model, x[:3], y[:3])
    with outer():
        assert torch.equal(attack(model, x[:3].clone(), y[:3].clone()), expected)


class Breaks(nn.Module):
    "Gives NaN for all but the images it was made with."

    def __init__(self, model, calls):
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, x):
        self.calls -= 1
        return self.model(x) * (1.0 if self.calls >= 0 else math.nan)


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("what", [*MINIMAL, UniversalPerturbation(eps=0.2)], ids=lambda a: type(a).__name__)
def test_nan_logits_raise_whenever_they_appear(what, calls, trained):
    model, x, y = trained
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        if isinstance(what, UniversalPerturbation):
            what.fit(Breaks(model, calls), [x[:4]])
        else:
            what(Breaks(model, calls), x[:4], y[:4])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeepFool("l1"), lambda: DeepFool(steps=0), lambda: DeepFool(candidates=1),
        lambda: DeepFool(overshoot=-0.1), lambda: DeepFool(growth=0.5),
        lambda: CarliniWagner(steps=0), lambda: CarliniWagner(search_steps=0), lambda: CarliniWagner(confidence=-1),
        lambda: CarliniWagner(step_size=0), lambda: CarliniWagner(initial_c=0),
        lambda: UniversalPerturbation(eps=8), lambda: UniversalPerturbation(norm="l0"),
        lambda: UniversalPerturbation(target_rate=0),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match=r"must be|larger than"):
        make()


def test_one_class_is_not_enough():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    for attack in MINIMAL:
        with pytest.raises(ValueError, match="at least 2 classes"):
            attack(model, torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))


# DeepFool


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_is_exact_on_a_linear_model(norm):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).double()
    x = 0.5 + 0.01 * torch.rand(20, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        f = model(x)
        y, w = f.argmax(1), model[1].weight
        w_k = w[None] - w[y][:, None]
        size = w_k.norm(dim=2) if norm == "l2" else w_k.abs().sum(2)
        d = ((f - f.gather(1, y[:, None])).abs() / size).scatter(1, y[:, None], math.inf).amin(1)
    assert d.max() < 0.4  # far from the ends of [0, 1]
    x_adv = DeepFool(norm, candidates=None)(model, x, y)
    assert torch.allclose(norms(x_adv - x, norm), 1.02 * (d + 1e-4), rtol=1e-6)
    assert (answers(model, x_adv) != y).all()


def test_deepfool_considers_the_likeliest_classes_only():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
    model[1].weight.data = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.5, 4.0]])
    x, y = torch.tensor([0.8, 0.0]).view(1, 1, 1, 2), torch.tensor([0])
    near = DeepFool(candidates=None)(model, x, y)
    assert answers(model, near) == 2 and norms(near - x) < 0.2
    assert torch.equal(near, DeepFool(candidates=99)(model, x, y))
    assert answers(model, DeepFool(candidates=2, steps=5)(model, x, y)) == 0, (
        "class 1 lies beyond the range of the image"
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_does_not_stall_where_clipping_eats_most_of_each_step(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 2, bias=False))
    weight = torch.linspace(0.5, 1.5, 100)
    weight[
        :90
    ] *= -1  # from class 0 to class 1: nine tenths of the pixels want to fall, and all of those are 0
    model[1].weight.data = torch.stack([-weight, weight])
    x = torch.cat([torch.zeros(90), torch.full((10,), 0.1)]).view(1, 1, 10, 10)
    model[1].bias = nn.Parameter(torch.tensor([10.0, 0.0]))
    y = torch.zeros(1, dtype=torch.int64)
    assert answers(model, x) == 0
    x_adv = DeepFool(norm, steps=80)(model, x, y)
    assert answers(model, x_adv) == 1
    best = ((10 - 2 * (weight[90:] * 0.1).sum()) / 2) / (
        weight[90:].norm() if norm == "l2" else weight[90:].sum()
    )
    assert norms(x_adv - x, norm) < 1.03 * best


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_has_foolbox_s_success_and_norms(norm, trained):
    compare_deepfool(norm, *trained)


def compare_deepfool(norm, model, x, y):
    right = answers(model, x) == y
    x, y = x[right], y[right]
    kind = foolbox.attacks.L2DeepFoolAttack if norm == "l2" else foolbox.attacks.LinfDeepFoolAttack
    with count_passes(model) as ours:
        x_adv = DeepFool(norm)(model, x, y)
    reference = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    with count_passes(model) as theirs:
        x_fool = kind(steps=50).run(reference, x, foolbox.criteria.Misclassification(y))
    assert (answers(model, x_adv) != y).float().mean() > 0.95
    mean, expected = norms(x_adv - x, norm).mean().item(), norms(x_fool - x, norm).mean().item()
    assert mean == pytest.approx(expected, rel=0.03)
    assert ours.forward_rows < theirs.forward_rows / 5
    assert ours.backward_rows < theirs.backward_rows


def test_deepfool_pays_for_an_image_until_it_is_fooled(trained):
    model, x, y = trained
    own = []
    for i in range(24):
        with count_passes(model) as passes:
            DeepFool()(model, x[i : i + 1], y[i : i + 1])
        own.append((passes.forward_rows, passes.backward_rows))
    forward, backward = map(sum, zip(*own, strict=True))
    assert own[7] == (1, 0), "an image that is wrong already costs one look"
    assert all(9 <= b <= 9 * (f - 1) for f, b in own[:7]), (
        "one look more than steps, at most nine class differences a step"
    )
    with count_passes(model) as passes:
        DeepFool()(model, x[:24], y[:24])
    assert forward <= passes.forward_rows <= 2 * forward
    assert backward <= passes.backward_rows <= 9 * forward
    for candidates in (3, 10):
        with count_passes(model) as all_classes:
            DeepFool(candidates=candidates, growth=math.inf)(model, x[8:9], y[8:9])
        assert all_classes.backward_rows == (candidates - 1) * (all_classes.forward_rows - 1)
    with count_passes(model) as all_classes:
        DeepFool(growth=math.inf)(model, x[:24], y[:24])
    assert passes.backward_rows < 0.75 * all_classes.backward_rows


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_skips_no_class_that_matters(norm, trained):
    model, x, y = trained
    model.double()
    try:
        x, y = x[:40].double(), y[:40]
        assert torch.allclose(
            DeepFool(norm)(model, x, y), DeepFool(norm, growth=math.inf)(model, x, y), rtol=0, atol=1e-12
        )
    finally:
        model.float()


# Carlini and Wagner


def test_the_change_of_variable():
    x = torch.linspace(0, 1, 101)
    assert torch.allclose(to_image(to_w(x)), x, atol=1e-6)
    assert to_w(x).isfinite().all()
    assert torch.allclose(to_image(to_w(x)), (to_w(x).double().tanh().float() + 1) / 2, atol=1e-6)


def compare_carlini(model, x, y, steps, rounds):
    right = answers(model, x) == y
    x, y = x[right], y[right]
    settings = dict(steps=steps, abort_early=True)
    x_adv = CarliniWagner(search_steps=rounds, step_size=0.05, initial_c=1.0, **settings)(model, x, y)
    kind = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=rounds, stepsize=0.05, initial_const=1.0, **settings
    )
    reference = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    x_fool = kind.run(reference, x, foolbox.criteria.Misclassification(y))
    success = (answers(model, x_fool) != y) & (
        x_fool.flatten(1).amax(1) > 0
    )  # foolbox gives a black image where it fails
    assert success.float().mean() > 0.9
    assert (answers(model, x_adv) != y)[success].float().mean() > 0.9
    assert norms(x_adv - x)[success].mean() <= 1.1 * norms(x_fool - x)[success].mean()


def test_carlini_has_foolbox_s_success_and_norms(trained):
    model, x, y = trained
    compare_carlini(model, x[:24], y[:24], steps=80, rounds=5)


@pytest.mark.parametrize("targeted", [False, True])
def test_carlini_with_confidence_and_targets(targeted, trained):
    model, x, y = trained
    x, y = x[8:16], y[8:16]
    label = (answers(model, x) + 3) % 10 if targeted else y
    attack = CarliniWagner(steps=80, search_steps=3, step_size=0.1, initial_c=10.0, targeted=targeted)
    plain, sure = (
        attack(model, x, label),
        CarliniWagner(**{**vars(attack), "confidence": 3.0})(model, x, label),
    )
    with torch.no_grad():
        logits = model(sure)
    found = norms(sure - x) > 0
    assert found.float().mean() >= 0.75
    others = logits.scatter(1, label[:, None], -math.inf).amax(1)
    margin = (others - logits.gather(1, label[:, None]).squeeze(1)) * (-1 if targeted else 1)
    assert (margin[found] >= 3 - 1e-3).all(), "an image is handed out only if the margin is reached"
    assert ((answers(model, plain) == label) == targeted)[found].float().mean() > 0.5
    assert norms(sure - x)[found].mean() > norms(plain - x)[found].mean()
    done = attack(model, plain[found], label[found])
    assert torch.equal(done, plain[found]), "what is a success already comes back as it is"


def test_carlini_s_margin_does_not_care_where_zero_is(trained):
    "A margin that multiplies by the one-hot finds class y itself when all logits are negative."
    model, x, y = trained

    class Shifted(nn.Module):
        def forward(self, images):
            return model(images) - 1000.0

    model.double()
    try:
        x, y = x[:4].double(), y[:4]
        assert torch.allclose(QUICK(Shifted(), x, y), QUICK(model, x, y), rtol=0, atol=1e-6)
    finally:
        model.float()


def test_carlini_keeps_an_image_it_cannot_fool():
    class Constant(nn.Module):
        def forward(self, images):
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2) + 0 * images.flatten(1)[:, :2]

    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(QUICK(Constant(), x, torch.zeros(3, dtype=torch.int64)), x)


def test_carlini_says_where_its_steps_cannot_reach():
    "The network listens to one black pixel, from grey upwards: steps of 0.01 do not bring it there, steps of 0.2 do."

    class Listens(nn.Module):
        def forward(self, images):
            pixel = images[:, 0, 0, 0]
            return torch.stack([torch.full_like(pixel, 0.5), pixel], 1)

    x, y = torch.full((2, 1, 2, 2), 0.6), torch.zeros(2, dtype=torch.int64)
    x[:, 0, 0, 0] = 0
    short = CarliniWagner(steps=100, search_steps=3, initial_c=1e4)
    with pytest.warns(UserWarning, match="nothing for 2 of 2 images, and its 100 steps of 0.01 move w by at most 1,"):
        assert torch.equal(short(Listens(), x, y), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = replace(short, step_size=0.2)(Listens(), x, y)
        CarliniWagner(steps=2, search_steps=1)(Listens(), x[:, :, 1:, 1:], y)  # nothing black in it
    assert (found[:, 0, 0, 0] > 0.5).all()


def test_carlini_costs_one_forward_and_at_most_one_backward_row_a_step(trained):
    model, x, y = trained
    right = answers(model, x) == y
    n, todo = len(x), int(right.sum())
    full = CarliniWagner(steps=30, search_steps=2, step_size=0.05, initial_c=0.1, abort_early=False)
    with count_passes(model) as passes:
        full(model, x, y)
    assert n + 60 * todo <= passes.forward_rows <= n + 66 * todo, (
        "the rest are images whose margin was misjudged"
    )
    assert 30 * todo < passes.backward_rows < 60 * todo, "no backward pass where the hinge is flat"
    patient = dict(steps=300, search_steps=1, step_size=0.1, initial_c=1e-3)  # c so small that little happens
    with count_passes(model) as passes:
        CarliniWagner(**patient)(model, x[:8], y[:8])
    assert passes.backward_rows < 0.7 * 300 * 7, "images that stopped getting better leave the round"
    assert passes.forward_rows < 0.75 * 300 * 7


# Universal perturbations


@pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 3.0)])
def test_universal_is_one_perturbation_inside_its_ball(norm, eps, trained):
    model, x, y = trained
    setting = UniversalPerturbation(eps=eps, norm=norm, passes=3, target_rate=1.0)
    with count_passes(model) as passes:
        fitted = setting.fit(model, x.split(15), seeded())
    v = fitted.perturbation.double()
    assert (v.abs().max() if norm == "linf" else v.norm()) <= eps * (1 + 1e-6)
    assert torch.equal(fitted(model, x, y), (x + fitted.perturbation).clamp(0, 1))
    assert torch.equal(fitted(model, x, y), fitted(model, x, (y + 1) % 10)), "labels play no part"
    assert len(fitted.fooling_rates) == 3 and fitted.fooling_rate == max(fitted.fooling_rates)
    changed = (answers(model, fitted(model, x, y)) != answers(model, x)).float().mean().item()
    assert changed == pytest.approx(fitted.fooling_rate, abs=0.1)  # 60 at once round otherwise than 15
    again = setting.fit(model, [(x[i : i + 15], y[i : i + 15]) for i in range(0, 60, 15)], seeded())
    assert (
        torch.equal(again.perturbation, fitted.perturbation) and again.fooling_rates == fitted.fooling_rates
    )
    noise = (
        torch.randn(v.shape, generator=seeded()).sign() * eps
        if norm == "linf"
        else torch.randn(v.shape, generator=seeded())
    )
    noise = project_perturbation(noise, eps, norm)
    assert changed > 2 * (answers(model, (x + noise).clamp(0, 1)) != answers(model, x)).float().mean()
    assert changed > 0.2 and passes.forward_rows > 60


def test_universal_with_batches_of_one_is_the_paper_s_algorithm(trained):
    model, x, _ = trained
    model.double()
    try:
        x = x[:12].double()
        fitted = UniversalPerturbation(eps=0.2, passes=1, target_rate=1.0).fit(model, x.split(1))
        v, before = torch.zeros_like(x[0]), answers(model, x)
        for image, label in zip(x.split(1), before.split(1), strict=True):
            at = (image + v).clamp(0, 1)
            if answers(model, at) == label:
                change = DeepFool()(model, at, label) - at
                v = (v + change[0]).clamp(-0.2, 0.2)
    finally:
        model.float()
    assert torch.allclose(fitted.perturbation, v, rtol=0, atol=1e-12)


def test_universal_stops_at_its_rate_and_takes_an_iterator(trained):
    model, x, y = trained
    setting = UniversalPerturbation(eps=0.3, passes=8, target_rate=0.2)
    fitted = setting.fit(model, iter(x.split(20)), seeded())
    assert (
        len(fitted.fooling_rates) < 8
        and fitted.fooling_rates[-1] >= 0.2
        and max(fitted.fooling_rates[:-1], default=0) < 0.2
    )
    with pytest.raises(ValueError, match="no images"):
        setting.fit(model, iter(()))
    with pytest.raises(ValueError, match="fitted for images"):
        fitted(model, torch.rand(1, 1, 14, 14), y[:1])
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        setting.fit(model, [2 * x])


# Real data


@pytest.fixture(scope="module")
def mnist(real_data):
    "A small network after one pass through 20,000 real digits, and 100 test digits."
    from torchvision.datasets import MNIST

    def split(train, n):
        data = MNIST(real_data, train=train)
        return data.data[:n, None].float() / 255, data.targets[:n]

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    x, y = split(True, 20_000)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for rows in torch.randperm(len(x)).split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    model.eval()
    x, y = split(False, 100)
    assert (answers(model, x) == y).float().mean() > 0.93 and (x == 0).float().mean() > 0.7
    return model, x, y


@pytest.mark.real
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_on_real_digits(norm, mnist):
    compare_deepfool(norm, *mnist)


@pytest.mark.real
def test_carlini_on_real_digits(mnist):
    model, x, y = mnist
    compare_carlini(model, x[:24], y[:24], steps=100, rounds=5)
