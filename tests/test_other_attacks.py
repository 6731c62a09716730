"""PixelAttack, SpatialTransform, AutoAttack, DDN and the hooks: promises as properties, parity, counts."""

import sys
import warnings
from contextlib import nullcontext

import foolbox
import pyautoattack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from afgstudy.attacks.base import ImageNoise, cross_entropy, input_gradient, margin
from afgstudy.attacks.carlini import CarliniWagner
from afgstudy.attacks.deepfool import DeepFool
from afgstudy.attacks.external import (
    DDN,
    AutoAttack,
    AutoAttackWarning,
    Evaluation,
    Pipeline,
    _Ear,
    build,
    evaluated,
    joined,
)
from afgstudy.attacks.gradient import BIM, FGSM, MIFGSM, PGD
from afgstudy.attacks.pixel import PixelAttack, children, first_generation, log_odds, paint, three_others
from afgstudy.attacks.spatial import SpatialTransform, flow_variation, warp
from afgstudy.attacks.wrappers import BPDA, ExpectationOverTransformation
from afgstudy.data.dataset import Dataset

ULP = 2.0**-23
QUICK_AA = dict(steps=5, queries=20)
PIXEL = PixelAttack(pixels=3, population=16, steps=4)
SPATIAL = SpatialTransform(steps=12, searches=2)
ALL = [
    PIXEL,
    SPATIAL,
    DDN(steps=12),
    AutoAttack(eps=0.1, **QUICK_AA),
    AutoAttack(eps=2.5, norm="l2", **QUICK_AA),
]
TARGETED = [
    PixelAttack(pixels=3, population=16, steps=4, targeted=True),
    SpatialTransform(steps=12, targeted=True),
    DDN(steps=12, targeted=True),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.fixture(scope="module")
def trained():
    "A small network on the handwritten digits at 28 x 28, and 60 test digits."
    pixels, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = nn.functional.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, size=28, mode="bilinear").clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = torch.randperm(len(x))
        x, labels = x[mixed], labels[mixed]
        model = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(400, 10),
        )
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(6):
            for batch in torch.randperm(1500).split(50):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()
                optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    model.eval()
    assert (answers(model, x[1500:]) == labels[1500:]).float().mean() > 0.9
    return model, x[1500:1560], labels[1500:1560]


@pytest.fixture
def double(trained):
    "The same in float64."
    model, x, y = trained
    yield model.double(), x.double(), y
    model.float()


# ---------------------------------------------------------------- promises of all attacks


@settings(max_examples=15, deadline=None)
@given(
    attack=st.sampled_from(ALL + TARGETED),
    seed=st.integers(0, 2**31),
    first=st.integers(0, 50),
    size=st.integers(1, 6),
)
def test_stays_in_range_and_is_reproducible(attack, seed, first, size, trained):
    model, x, y = trained
    x, y = x[first : first + size], y[first : first + size]
    before, state = x.clone(), torch.get_rng_state()
    x_adv = attack(model, x, y, seeded(seed))
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and x_adv.device == x.device
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x_adv, attack(model, x, y, seeded(seed)))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attack", ALL + TARGETED, ids=repr)
def test_a_generator_matters_only_where_there_is_chance(attack, trained):
    model, x, y = trained
    y = (y + 1) % 10 if attack in TARGETED else y
    first, second = (attack(model, x[:12], y[:12], seeded(s)) for s in (0, 1))
    deterministic = isinstance(attack, (SpatialTransform, DDN))
    assert torch.equal(first, second) == deterministic


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_a_misclassified_image_comes_back_unchanged(attack, trained):
    model, x, y = trained
    x, y = x[:8], answers(model, x[:8])
    y[::2] = (y[::2] + 1) % 10
    x_adv = attack(model, x, y, seeded())
    assert torch.equal(x_adv[::2], x[::2])
    assert not torch.equal(x_adv[1::2], x[1::2])


@pytest.mark.parametrize("attack", TARGETED, ids=repr)
def test_an_image_that_is_already_its_target_comes_back_unchanged(attack, trained):
    model, x, y = trained
    x, y = x[:8], answers(model, x[:8])
    y[1::2] = (y[1::2] + 1) % 10
    x_adv = attack(model, x, y, seeded())
    assert torch.equal(x_adv[::2], x[::2])


@pytest.mark.parametrize("attack", ALL, ids=repr)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_comes_out_as_it_went_in(attack, mode):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )
    model = nn.Sequential(*layers).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(4, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)  # dropout in train mode is a randomised defence
        attack(model, x, answers(model, x), seeded(), mode=mode)
    assert [m.training for m in model] == [True, False, True, True, True, True] and model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert torch.equal(model[5].bias.grad, torch.ones(5)) and all(
        p.grad is None for p in list(model.parameters())[:-1]
    )
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_a_network_inside_a_plain_function_gets_no_gradients(attack, trained):
    model, x, y = trained
    expected = attack(model, x[:6], y[:6], seeded())
    assert torch.equal(attack(lambda images: model(images), x[:6], y[:6], seeded()), expected)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("attack", ALL, ids=repr)
@pytest.mark.parametrize("good_calls", [0, 3])
def test_nan_logits_raise_whenever_they_come(attack, good_calls, trained):
    model, x, y = trained
    calls = []

    def ill(images):
        calls.append(len(images))
        return model(images) * (1 if len(calls) <= good_calls else float("nan"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        with pytest.raises(ValueError, match="NaN"):
            attack(ill, x[:4], y[:4], seeded())
    assert len(calls) == good_calls + 1


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_labels_and_images_are_checked(attack, trained):
    model, x, y = trained
    with pytest.raises(ValueError, match="labels run from"):
        attack(model, x[:2], torch.tensor([0, 10]), seeded())
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        attack(model, x[:2] * 3 - 1, y[:2], seeded())
    assert attack(model, x[:0], y[:0]).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_works_inside_inference_mode_and_on_channels_last(attack, trained):
    model, x, _ = trained
    coloured = nn.Sequential(nn.Conv2d(3, 1, 1), model).eval()
    images = x[:3].expand(3, 3, 28, 28).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        x_adv = attack(coloured, images, answers(coloured, images), seeded())
    assert x_adv.shape == images.shape and 0 <= x_adv.min() and x_adv.max() <= 1


SETTINGS = [
    (PixelAttack, dict(pixels=0), "pixels"),
    (PixelAttack, dict(population=3), "population"),
    (PixelAttack, dict(steps=-1), "steps"),
    (PixelAttack, dict(batch_rows=0), "batch_rows"),
    (PixelAttack, dict(factor=0.0), "factor"),
    (PixelAttack, dict(factor=float("nan")), "factor"),
    (SpatialTransform, dict(tau=0.0), "tau"),
    (SpatialTransform, dict(tau=float("nan")), "tau"),
    (SpatialTransform, dict(step_size=-1.0), "step_size"),
    (SpatialTransform, dict(kappa=-0.1), "kappa"),
    (SpatialTransform, dict(steps=0), "steps"),
    (SpatialTransform, dict(searches=0), "searches"),
    (SpatialTransform, dict(patience=-1), "patience"),
    (AutoAttack, dict(eps=8), "8/255"),
    (AutoAttack, dict(eps=float("nan")), "eps"),
    (AutoAttack, dict(norm="Linf"), "norm"),
    (AutoAttack, dict(version="custom"), "version"),
    (AutoAttack, dict(attacks=()), "attacks"),
    (AutoAttack, dict(attacks=("apgd",)), "attacks"),
    (AutoAttack, dict(batch_size=0), "batch_size"),
    (DDN, dict(steps=0), "steps"),
    (DDN, dict(gamma=1.0), "gamma"),
    (DDN, dict(init_eps=-1.0), "init_eps"),
]


@pytest.mark.parametrize(("kind", "wrong", "named"), SETTINGS, ids=str)
def test_bad_settings_are_refused_when_the_attack_is_made(kind, wrong, named):
    with pytest.raises(ValueError, match=named):
        kind(**wrong)


@pytest.mark.parametrize(
    "attack",
    [
        PIXEL,
        TARGETED[0],
        SPATIAL,
        TARGETED[1],
        SpatialTransform(steps=12, searches=3, tau=1.0, patience=2),
        SpatialTransform(steps=12, searches=1, patience=0, kappa=1.0),
    ],
    ids=repr,
)
def test_an_image_never_depends_on_its_batch(attack, double):
    model, x, y = double
    x, y = x[:6], (y[:6] + getattr(attack, "targeted", False)) % 10
    together = attack(model, x, y, seeded())
    one_by_one = seeded()  # the generator gives one seed an image, in order
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], one_by_one) for i in range(6)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)
    assert not torch.equal(together, x)


# ---------------------------------------------------------------- pixels


@settings(max_examples=20, deadline=None)
@given(
    pixels=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    seed=st.integers(0, 999),
)
def test_at_most_k_pixels_change(pixels, channels, height, width, seed):
    x = torch.rand(5, channels, height, width, generator=seeded(seed))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 3))
    x_adv = PixelAttack(pixels=pixels, population=8, steps=3)(linear, x, answers(linear, x), seeded(seed))
    changed = (x_adv != x).any(1).flatten(1).sum(1)
    assert (
        changed.max() <= pixels and changed.min() >= 1
    )  # nobody was misclassified: everybody gets a best candidate
    assert 0 <= x_adv.min() and x_adv.max() <= 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), draw=st.integers(0, 500), population=st.integers(4, 60))
def test_three_different_others(seed, draw, population):
    noise = ImageNoise.draw(3, seeded(seed), torch.device("cpu"))
    picks = torch.stack([*three_others(noise, draw, population), torch.arange(population).expand(3, -1)])
    assert picks.min() >= 0 and picks.max() < population
    assert (picks.sort(0).values.diff(dim=0) > 0).all()


def test_parents_are_uniform_among_the_others():
    noise = ImageNoise.draw(20_000, seeded(), torch.device("cpu"))
    for pick in three_others(noise, 2, 5):
        counts = torch.bincount(pick[:, 2], minlength=5)
        assert counts[2] == 0 and ((counts[[0, 1, 3, 4]] / 20_000 - 0.25).abs() < 0.012).all()


def test_children_are_the_papers_mutation():
    noise = ImageNoise.draw(2, seeded(), torch.device("cpu"))
    parents = first_generation(noise, 9, 2, 3, torch.float64)
    assert parents.shape == (2, 9, 10) and 0 <= parents.min() and parents.max() <= 1
    a, b, c = three_others(noise, 4, 9)
    young = children(parents.clone(), noise, 4, 0.5)
    for i in range(2):
        for j in range(9):
            expected = parents[i, a[i, j]] + 0.5 * (parents[i, b[i, j]] - parents[i, c[i, j]])
            assert torch.allclose(young[i, j], expected.clamp(0, 1))


def test_paint_writes_the_later_of_two_coinciding_pixels_and_keeps_inside():
    candidate = torch.tensor([[0.5, 0.5, 0.2, 0.5, 0.5, 0.9], [1.0, 1.0, 0.4, 0.0, 0.0, 0.6]])
    painted = paint(torch.zeros(2, 1, 4, 6), candidate)
    assert painted[0, 0, 2, 3] == 0.9 and (painted[0] != 0).sum() == 1
    assert painted[1, 0, 3, 5] == 0.4 and painted[1, 0, 0, 0] == 0.6


@settings(max_examples=30, deadline=None)
@given(logits=st.lists(st.floats(-30, 30), min_size=2, max_size=6), scale=st.sampled_from([1, 100]))
def test_log_odds_order_as_the_probability_does(logits, scale):
    z = torch.tensor([logits], dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.int64)
    p = z.softmax(1)[0, 0]
    assert torch.allclose(log_odds(z, y).sigmoid(), p, atol=1e-12)
    assert log_odds(z * scale, y).isfinite().all()


class Scripted:
    "Class 0 for every row, except that image i is fooled in generation `when[i]`. Counts its rows."

    def __init__(self, when, population):
        self.when, self.population, self.rows, self.generation = when, population, [], -1

    def __call__(self, images):
        self.rows.append(len(images))
        logits = torch.tensor([[5.0, 0.0]]).repeat(len(images), 1)
        if self.generation >= 0:
            playing = [i for i, g in enumerate(self.when) if g >= self.generation]
            assert len(images) == len(playing) * self.population
            for place, i in enumerate(playing):
                if self.when[i] == self.generation:
                    logits[place * self.population + 1, 1] = 9.0
        self.generation += 1
        return logits


@settings(max_examples=20, deadline=None)
@given(when=st.lists(st.integers(0, 6), min_size=1, max_size=6), population=st.integers(4, 12))
def test_forward_rows_are_exactly_those_of_the_design(when, population):
    "Clean images once; then `population` rows for every image still in the game in every generation."
    steps = 5  # an image scripted for generation 6 resists to the end
    x, y = torch.full((len(when), 1, 5, 5), 0.5), torch.zeros(len(when), dtype=torch.int64)
    model = Scripted(when, population)
    PixelAttack(population=population, steps=steps, batch_rows=10_000)(model, x, y, seeded())
    assert sum(model.rows) == len(when) + population * sum(1 + min(g, steps) for g in when)
    assert len(model.rows) == 1 + 1 + min(max(when), steps)


def test_rows_in_one_pass_are_limited_and_do_not_matter(double):
    model, x, y = double
    x, y, seen = x[:4], y[:4], []

    def watched(images):
        seen.append(len(images))
        return model(images)

    whole, parts = (
        PixelAttack(pixels=5, population=30, steps=6, batch_rows=rows)(watched, x, y, seeded())
        for rows in (1000, 7)
    )
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)
    assert max(seen) > 100 and seen[-1] <= 7


def test_longer_evolution_is_never_worse(double):
    model, x, y = double
    x, y = x[:6], answers(model, x[:6])
    left = []
    for steps in (0, 2, 5, 10):
        x_adv = PixelAttack(pixels=2, population=20, steps=steps)(model, x, y, seeded())
        left.append(log_odds(model(x_adv), y))
    left = torch.stack(left)
    still = (left > 0).all(0)
    assert still.any() and (left.diff(dim=0)[:, still] <= 1e-9).all() and (left[-1] < left[0]).any()


def test_evolution_finds_the_best_pixel_there_is():
    "All 36 places and 21 greys of a 6 x 6 image against what evolution found."
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        y = answers(network, x)
        network[3].bias[:] = 0

        def confident(images):  # far from every boundary, so that no image leaves early
            return network(images) + 20 * nn.functional.one_hot(y[0], 3)

        keep = y == y[0]
        x, y = x[keep], y[keep]
        places = torch.arange(6, dtype=torch.float64) / 6 + 0.01
        every = torch.cartesian_prod(places, places, torch.linspace(0, 1, 21, dtype=torch.float64))
        lowest = [
            log_odds(confident(paint(i.repeat(len(every), 1, 1, 1), every)), y[:1].expand(len(every))).min()
            for i in x
        ]
        reached = log_odds(confident(PixelAttack(population=100, steps=40)(confident, x, y, seeded())), y)
    assert torch.allclose(reached, torch.stack(lowest), atol=1e-6)


def test_pixels_reach_the_class_they_aim_at():
    "A linear model in which one bright pixel decides."
    weights = torch.eye(4, dtype=torch.float32)

    def model(images):
        return images.flatten(1) @ weights

    x = torch.full((3, 1, 2, 2), 0.1)
    x[:, 0, 0, 0] = 0.9
    target = torch.tensor([1, 2, 3])
    x_adv = PixelAttack(targeted=True, population=40, steps=30)(model, x, target, seeded())
    assert torch.equal(answers(model, x_adv), target)
    assert ((x_adv != x).flatten(1).sum(1) == 1).all()


# ---------------------------------------------------------------- spatial


@settings(max_examples=20, deadline=None)
@given(
    down=st.integers(-3, 3),
    right=st.integers(-3, 3),
    channels=st.sampled_from([1, 3]),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
)
def test_a_constant_flow_shifts_and_repeats_the_border(down, right, channels, height, width):
    x = torch.rand(2, channels, height, width, dtype=torch.float64)
    flow = torch.tensor([down, right], dtype=torch.float64).view(1, 2, 1, 1).expand(2, 2, height, width)
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    assert torch.allclose(warp(x, flow), x[:, :, rows][..., columns], atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_a_bent_image_stays_between_its_extremes(seed, scale, size):
    x = torch.rand(2, 3, *size, generator=seeded(seed))
    bent = warp(x, scale * torch.randn(2, 2, *size, generator=seeded(seed + 1)))
    low, high = (f(x.flatten(2), 2).view(2, 3, 1, 1) for f in (torch.amin, torch.amax))
    assert bent.isfinite().all() and (bent >= low - 1e-5).all() and (bent <= high + 1e-5).all()


def test_warp_is_bilinear_between_pixels_and_its_gradient_is_right():
    x = torch.rand(1, 2, 5, 6, dtype=torch.float64)
    half = torch.zeros(1, 2, 5, 6, dtype=torch.float64)
    half[:, 1] = 0.25
    assert torch.allclose(warp(x, half)[..., :-1], 0.75 * x[..., :-1] + 0.25 * x[..., 1:])
    flow = (0.3 + 0.2 * torch.rand(1, 2, 5, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: warp(x, f), flow)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), height=st.integers(1, 5), width=st.integers(1, 5))
def test_variation_is_the_papers_sum_over_four_neighbours(seed, height, width):
    flow = torch.randn(2, 2, height, width, dtype=torch.float64, generator=seeded(seed))
    expected = torch.zeros(2, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= k < height and 0 <= m < width:
                    expected += (flow[:, :, i, j] - flow[:, :, k, m]).norm(dim=1)
    assert torch.allclose(flow_variation(flow, epsilon=1e-9), expected, atol=1e-6)
    assert torch.allclose(flow_variation(flow), expected, atol=4e-4 * height * width)


def test_variation_has_a_gradient_at_zero():
    still = torch.zeros(1, 2, 4, 4, requires_grad=True)
    flow_variation(still).sum().backward()
    assert torch.equal(still.grad, torch.zeros_like(still))


def test_flows_fool_and_explain_the_images(trained):
    model, x, y = trained
    right = answers(model, x) == y
    x, y, right = x[:24], y[:24], right[:24]
    attack = SpatialTransform(searches=2, steps=60)
    x_adv, flow = attack.with_flow(model, x, y, seeded())
    assert (answers(model, x_adv)[right] != y[right]).float().mean() > 0.9
    assert flow[~right].abs().sum() == 0 and torch.allclose(warp(x, flow).clamp(0, 1)[right], x_adv[right])
    assert flow.abs().max() < 14


def test_more_searches_are_never_worse(trained):
    model, x, y = trained
    x, y = x[:12], answers(model, x[:12])
    fooled, variation = [], []
    for searches in (1, 2, 4):
        x_adv, flow = SpatialTransform(tau=0.3, steps=40, step_size=0.02, searches=searches).with_flow(
            model, x, y
        )
        fooled.append(answers(model, x_adv) != y)
        variation.append(flow_variation(flow))
    assert fooled[0].sum() < fooled[2].sum()
    for before, after in ((0, 1), (1, 2)):
        assert (fooled[after] | ~fooled[before]).float().mean() > 0.8
        assert (variation[after] <= 1.01 * variation[before] + 1e-3)[fooled[before]].float().mean() >= 0.5


def test_kappa_asks_for_a_margin_and_targets_are_reached(trained):
    model, x, y = trained
    x, y = x[:12], answers(model, x[:12])
    x_adv = SpatialTransform(kappa=2.0, tau=0.01, searches=1, steps=60)(model, x, y)
    left = margin(model(x_adv), y)
    assert (left <= -2 + 1e-4).float().mean() > 0.9
    target = (y + 1) % 10
    x_adv = SpatialTransform(targeted=True, tau=0.005, searches=1)(model, x, target)
    assert (answers(model, x_adv) == target).float().mean() > 0.7


def test_an_image_that_is_done_leaves_the_batch(trained):
    model, x, y = trained
    x, y = x[:10], answers(model, x[:10])
    rows = {}
    for patience in (0, 5, 1000):
        seen = []

        def counted(images, seen=seen):
            seen.append(len(images))
            return model(images)

        x_adv = SpatialTransform(tau=0.01, searches=1, patience=patience)(counted, x, y)
        assert (answers(model, x_adv) != y).all() and sorted(seen[1:], reverse=True) == seen[1:]
        rows[patience] = sum(seen)
    assert rows[0] < rows[5] < rows[1000] == 10 * (1 + 101)


# ---------------------------------------------------------------- AutoAttack


def direct(model, x, y, seed, norm, eps, batch_size):
    "pyautoattack as its documentation calls it, but with 100 queries of Square and 20 iterations."
    with torch.random.fork_rng(devices=[]):
        theirs = pyautoattack.AutoAttack(
            model, norm=norm, eps=eps, seed=seed, version="standard", device="cpu"
        )
        theirs.square.n_queries, theirs.fab.n_iter = 100, 20
        for part in (theirs.apgd, theirs.apgd_targeted):  # what APGD makes of n_iter=20 in its constructor
            part.n_iter, part.n_iter_orig, part.n_iter_2, part.n_iter_min, part.size_decr = 20, 20, 4, 1, 1
        return theirs.run_standard_evaluation(x, y, batch_size=batch_size)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.07), ("l2", 1.2)])
def test_autoattack_is_pyautoattack(norm, eps, trained):
    "The same images, bit for bit."
    model, x, y = trained
    x, y = x[:7], y[:7]
    seed = int(ImageNoise.draw(7, seeded(5), x.device).seeds[0])
    ours = AutoAttack(eps=eps, norm=norm, batch_size=5, steps=20, queries=100).evaluate(
        model, x, y, seeded(5)
    )
    theirs, labels = direct(model, x, y, seed, {"linf": "Linf", "l2": "L2"}[norm], eps, 5)
    model.zero_grad(set_to_none=True)
    assert torch.equal(ours.x_adv, theirs) and torch.equal(ours.robust, labels == y)
    robust = ours.robust.float().mean().item()
    assert list(ours.accuracy) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert ours.accuracy["square"] == pytest.approx(robust, abs=1e-4) and robust < ours.accuracy["clean"]
    assert list(ours.accuracy.values()) == sorted(ours.accuracy.values(), reverse=True)
    assert ((answers(model, ours.x_adv) == y) != ours.robust).sum() <= 1  # 7 at once round otherwise than 5


def test_evaluations_of_batches_join_to_that_of_all_images():
    one = Evaluation(torch.zeros(3, 1, 2, 2), torch.ones(3).bool(), {"clean": 1.0, "square": 2 / 3}, ("a", "b"))
    two = Evaluation(torch.ones(1, 1, 2, 2), torch.zeros(1).bool(), {"clean": 1.0, "square": 0.0}, ("b", "c"))
    whole = joined([one, two], torch.tensor([True, True, False, False]))
    assert whole.accuracy == pytest.approx({"clean": 1.0, "square": 0.5}) and whole.flags == ("a", "b", "c")
    assert whole.x_adv.sum() == 4 and whole.robust.tolist() == [True, True, False, False]
    assert whole.among(8).accuracy == pytest.approx({"clean": 0.5, "square": 0.25})


def test_what_autoattack_says_of_a_whole_set_is_kept(trained):
    "Also the flags of later batches: a softmax at the end is noticed in each."
    model, x, y = trained
    data = Dataset("pairs", "test", (255 * x[:10]).round().to(torch.uint8), y[:10], tuple("0123456789"))
    attack = AutoAttack(eps=0.1, steps=3, attacks=("apgd-ce",))
    with pytest.warns(AutoAttackWarning):
        said = evaluated(attack, lambda images: model(images).softmax(1), data, batch_size=4)
    assert list(said.accuracy) == ["clean", "apgd-ce"] and said.robust.shape == (10,)
    assert said.accuracy["apgd-ce"] <= said.accuracy["clean"] and said.flags and len(set(said.flags)) == len(said.flags)
    with pytest.raises(ValueError, match="one image at least"):
        evaluated(attack, model, data.take(slice(0, 0)))


def test_autoattack_is_not_weaker_than_pgd(trained):
    model, x, y = trained
    x_pgd = PGD(eps=0.06, step_size=0.01, steps=20, restarts=2, stop_on_success=True)(model, x, y, seeded())
    x_aa = AutoAttack(eps=0.06, attacks=("apgd-ce",))(model, x, y, seeded())
    assert (answers(model, x_aa) == y).sum() <= (answers(model, x_pgd) == y).sum() + 3 < len(y)


@settings(max_examples=6, deadline=None)
@given(norm=st.sampled_from(["linf", "l2", "l1"]), share=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_autoattack_stays_in_the_ball(norm, share, seed, trained):
    model, x, y = trained
    x, y = x[:5], y[:5]
    eps = share * {"linf": 0.3, "l2": 3.0, "l1": 30.0}[norm]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        x_adv = AutoAttack(eps=eps, norm=norm, steps=8, queries=30)(model, x, y, seeded(seed))
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    distance = torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), ord=order, dim=1)
    slack = {"linf": ULP, "l2": ULP * 28, "l1": ULP * 784}[norm]
    assert (distance <= eps + slack).all() and 0 <= x_adv.min() and x_adv.max() <= 1


def test_autoattack_takes_float64_and_gives_it_back(double):
    model, x, y = double
    x = x * 0.999 + 1e-12  # not representable in float32
    result = AutoAttack(eps=0.06, **QUICK_AA).evaluate(model, x[:8], y[:8], seeded())
    assert result.x_adv.dtype == torch.float64
    assert torch.equal(result.x_adv[result.robust], x[:8][result.robust])
    assert (result.x_adv - x[:8]).abs().max() <= 0.06 + ULP


@pytest.mark.parametrize(
    ("classes", "parts"),
    [(2, ["apgd-ce", "fab-t", "square"]), (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"])],
)
def test_few_classes_get_the_attacks_that_exist_for_them(classes, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    x = torch.rand(6, 1, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = AutoAttack(eps=0.02, **QUICK_AA).evaluate(model, x, answers(model, x), seeded())
    assert list(result.accuracy) == ["clean", *parts]
    assert any(f"the model has {classes}" in flag for flag in result.flags)
    assert [str(w.message) for w in caught] == [f"AutoAttack: {flag}" for flag in result.flags]
    with pytest.raises(ValueError, match="2 classes or more"):
        AutoAttack(eps=0.02)(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), x, torch.zeros(6, dtype=torch.int64)
        )
    if classes == 2:
        with pytest.raises(ValueError, match="can be run"):
            AutoAttack(attacks=("apgd-dlr",))(model, x, answers(model, x))


@pytest.mark.parametrize(("classes", "targets"), [(4, 3), (6, 5), (10, 9), (50, 9)])
def test_there_are_as_many_targets_as_other_classes(classes, targets):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    adversary = build(
        AutoAttack(),
        Pipeline(model),
        torch.rand(2, 1, 4, 4),
        torch.zeros(2, dtype=torch.int64),
        0,
        _Ear(False),
    )
    assert adversary.apgd_targeted.n_target_classes == adversary.fab.n_target_classes == targets
    assert adversary.square.n_queries == 5000 and adversary.apgd.n_iter == adversary.fab.n_iter == 100
    fresh = pyautoattack.AutoAttack(
        model, eps=8 / 255, seed=0
    )  # our way of setting the iterations changes nothing at 100
    for name in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr", "n_restarts", "eot_iter"):
        assert getattr(adversary.apgd, name) == getattr(fresh.apgd, name)


def test_doubts_become_warnings_and_are_forgotten_again(trained):
    model, x, y = trained
    x, y = x[:4], answers(model, x[:4])
    quick = AutoAttack(eps=0.05, attacks=("apgd-ce",), steps=2)

    def dynamic(images):  # optimises at inference time
        with torch.enable_grad():
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(leaf.sum(), leaf)
        return model(images)

    suspects = {
        "probability distribution": lambda images: model(images).softmax(1),
        "randomized": lambda images: model(images + 0.1 * torch.randn_like(images)),
        "dynamic": dynamic,
    }
    for word, suspect in suspects.items():
        with pytest.warns(AutoAttackWarning, match=word):
            result = quick.evaluate(suspect, x, y, seeded())
        assert any(word in flag for flag in result.flags)
    zero = AutoAttack(eps=0.05, attacks=("apgd-dlr",), steps=2)
    with pytest.warns(AutoAttackWarning, match="zero gradient"):
        zero(lambda images: model((images * 4).round() / 4), x, y, seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quick.evaluate(model, x, y, seeded()).flags == ()


def test_autoattack_is_quiet_unless_asked_and_keeps_the_trace_function(trained, capfd):
    model, x, y = trained

    def trace(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        AutoAttack(eps=0.05, **QUICK_AA)(model, x[:3], y[:3], seeded())
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert capfd.readouterr() == ("", "")
    AutoAttack(eps=0.05, verbose=True, **QUICK_AA)(model, x[:3], y[:3], seeded())
    assert "robust accuracy after APGD-CE" in capfd.readouterr().out


def test_a_randomised_defence_is_judged_by_rand_and_reproducibly(trained):
    model, x, y = trained
    calls = []

    def random(images):
        calls.append(len(images))
        return model(images + 0.2 * torch.randn_like(images))

    attack = AutoAttack(eps=0.1, version="rand", steps=2)
    state = torch.get_rng_state()
    first, second = (attack.evaluate(random, x[:5], y[:5], seeded()) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv) and torch.equal(torch.get_rng_state(), state)
    assert list(first.accuracy) == ["clean", "apgd-ce", "apgd-dlr"] and len(calls) > 2 * 20 * 3
    assert attack.name == "AutoAttack-rand (reduced)" and AutoAttack().name == "AutoAttack"


def test_no_images_no_evaluation(trained):
    model, x, y = trained
    result = AutoAttack().evaluate(model, x[:0], y[:0])
    assert result.x_adv.shape == (0, 1, 28, 28) and len(result.robust) == 0


# ---------------------------------------------------------------- DDN


@pytest.mark.parametrize("targeted", [False, True])
def test_ddn_is_foolboxs(targeted, trained):
    model, x, y = trained
    y = (y + 1) % 10 if targeted else y
    ours = DDN(steps=40, targeted=targeted)(model, x, y, seeded())
    criterion = (
        foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    )(y)
    theirs, _, success = foolbox.attacks.DDNAttack(steps=40)(
        foolbox.PyTorchModel(model, (0, 1)), x, criterion, epsilons=None
    )
    model.zero_grad(set_to_none=True)
    assert torch.equal(ours, theirs.clamp(0, 1))
    reached = (answers(model, ours) == y) == targeted
    assert torch.equal(reached, success) and reached.float().mean() > 0.9


def test_ddn_is_smaller_than_the_ball_pgd_needs(trained):
    model, x, y = trained
    right = answers(model, x) == y
    norms = (DDN()(model, x, y) - x).flatten(1).norm(dim=1)[right]
    x_pgd = PGD(eps=float(norms.median()) * 0.7, norm="l2", step_size=0.1, steps=40)(model, x, y, seeded())
    assert (answers(model, x_pgd)[right] == y[right]).float().mean() > 0.5


# ---------------------------------------------------------------- hooks


def four_levels(images):
    return (images * 3).round() / 3


def test_bpda_has_the_steps_value_and_the_stand_ins_gradient():
    x = torch.rand(3, 2, 5, 5, requires_grad=True)
    for smooth, slope in (
        (None, torch.ones_like(x)),
        (torch.square, 2 * x.detach()),
        (four_levels, torch.zeros_like(x)),
    ):
        out = BPDA(four_levels, smooth)(x)
        assert torch.equal(out, four_levels(x.detach()))
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient, slope)
    untouched = BPDA(lambda images: images)
    assert torch.equal(torch.autograd.grad(untouched(x).sum(), x)[0], torch.ones_like(x))
    with torch.no_grad():
        assert not BPDA(four_levels)(x).requires_grad
    with pytest.raises(ValueError, match="stand-in"):
        BPDA(lambda images: images[..., ::2])(x)


def test_bpda_takes_steps_that_are_not_torch(trained):
    model, x, y = trained

    def through_bytes(images):
        array = (images.numpy() * 3).round().astype("uint8")
        return torch.from_numpy(array).to(images.dtype) / 3

    pipeline = nn.Sequential(BPDA(through_bytes), model)
    x_adv = PGD(eps=0.2, step_size=0.02, steps=15)(pipeline, x, y, seeded())
    assert (answers(pipeline, x_adv) == y).float().mean() < 0.5 * (answers(pipeline, x) == y).float().mean()


EVERY = {
    "FGSM": lambda: FGSM(eps=0.2),
    "BIM": lambda: BIM(eps=0.2, step_size=0.02, steps=15),
    "PGD": lambda: PGD(eps=0.2, step_size=0.02, steps=15, random_start=False),
    "MIFGSM": lambda: MIFGSM(eps=0.2, steps=10),
    "SpatialTransform": lambda: SpatialTransform(tau=0.01, searches=1, steps=60),
    "AutoAttack": lambda: AutoAttack(eps=0.2, attacks=("apgd-ce",), steps=15),
    "DDN": lambda: DDN(steps=40),
    "DeepFool": lambda: DeepFool(steps=30),
    "CarliniWagner": lambda: CarliniWagner(steps=40, search_steps=3, step_size=0.1, initial_c=1.0),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_gradient_attack_takes_bpda(name, trained):
    model, x, y = trained
    x, y, attack = x[:20], y[:20], EVERY[name]()
    shattered, wrapped = (
        nn.Sequential(BPDA(four_levels, four_levels), model),
        nn.Sequential(BPDA(four_levels), model),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        blind, informed = (attack(m, x, y, seeded()) for m in (shattered, wrapped))
    clean, blind, informed = (answers(wrapped, i).eq(y).float().mean() for i in (x, blind, informed))
    assert informed < 0.5 * clean
    if name not in ("AutoAttack", "DDN"):  # those go in a random direction where the gradient is zero
        assert blind == clean


@pytest.mark.parametrize("name", EVERY)
def test_every_gradient_attack_takes_expectation(name, trained):
    model, x, y = trained
    x, y, attack = x[:12], y[:12], EVERY[name]()

    def noisy(images):  # one noise for all images, so that an image's answer does not depend on its batch
        return model(images + 0.3 * torch.randn(images.shape[1:]))

    wrapped = ExpectationOverTransformation(noisy, samples=4, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AutoAttackWarning)  # with a seed the wrapped model is a fixed function
        x_adv = attack(wrapped, x, y, seeded())
    assert answers(wrapped, x_adv).eq(y).float().mean() < 0.5 * answers(wrapped, x).eq(y).float().mean()
    assert torch.equal(x_adv, attack(wrapped, x, y, seeded()))


def test_the_averages_are_what_they_say(trained):
    _, x, _ = trained
    x = x[:5].double()
    tables = torch.randn(6, 5, 10, dtype=torch.float64, generator=seeded())

    def answering():
        turn = iter(tables)
        return lambda images: next(turn) + 0 * images.sum()

    with torch.no_grad():
        probability = ExpectationOverTransformation(answering(), 6)(x)
        logits = ExpectationOverTransformation(answering(), 6, "logits")(x)
    assert torch.allclose(probability.exp(), tables.softmax(-1).mean(0)) and torch.allclose(
        logits, tables.mean(0)
    )
    y = torch.arange(5)
    expected = -tables.softmax(-1).mean(0).gather(1, y[:, None]).log().squeeze(1)
    assert torch.allclose(cross_entropy(probability, y), expected)


def test_log_probabilities_do_not_underflow():
    huge = torch.tensor([[0.0, 500.0, 900.0]], requires_grad=True)
    out = ExpectationOverTransformation(lambda z: z, 3)(huge)
    assert torch.allclose(out, torch.tensor([[-900.0, -400.0, 0.0]])) and out.isfinite().all()


def test_more_calls_bring_the_gradient_nearer_to_the_truth(trained):
    model, x, y = trained
    x, y = x[:16], y[:16]

    def dropping(images):
        return model(images * (torch.rand_like(images) < 0.3) / 0.3)

    def gradient(calls, seed):
        return input_gradient(ExpectationOverTransformation(dropping, calls, seed=seed), x, y, cross_entropy)[
            0
        ].flatten(1)

    truth = gradient(300, 0)
    one, eight, many = (nn.functional.cosine_similarity(gradient(k, 1), truth).median() for k in (1, 8, 64))
    assert one + 0.1 < eight and eight + 0.05 < many


@pytest.mark.parametrize("seed", [None, 7])
def test_a_seed_fixes_the_samples_and_leaves_the_global_state(seed):
    wrapped = ExpectationOverTransformation(lambda images: torch.randn(len(images), 3), 2, seed=seed)
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]) if seed is None else nullcontext():
        same = torch.equal(wrapped(torch.zeros(2, 1)), wrapped(torch.zeros(2, 1)))
    assert same == (seed is not None) and torch.equal(torch.get_rng_state(), state)


def test_hooks_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="samples"):
        ExpectationOverTransformation(lambda images: images, 0)
    with pytest.raises(ValueError, match="average"):
        ExpectationOverTransformation(lambda images: images, 4, "median")


def test_hooks_are_modules_that_attacks_freeze_and_restore(trained):
    model, x, y = trained
    stand_in = nn.Conv2d(1, 1, 1)
    pipeline = ExpectationOverTransformation(nn.Sequential(BPDA(four_levels, stand_in), model), 2).train()
    PGD(eps=0.1, steps=2)(pipeline, x[:4], y[:4], seeded())
    assert (
        pipeline.training
        and stand_in.training
        and all(p.requires_grad and p.grad is None for p in pipeline.parameters())
    )
    model.eval()


# --- what a first user gets wrong ------------------------------------------------------------------

QUICK = [
    FGSM(eps=0.1),
    BIM(eps=0.1, steps=2),
    PGD(eps=0.1, steps=2),
    MIFGSM(eps=0.1, steps=2),
    DeepFool(steps=2),
    CarliniWagner(steps=2),
    PixelAttack(pixels=1, population=4, steps=1),
    SpatialTransform(steps=2),
    DDN(steps=2),
    AutoAttack(eps=0.1, steps=2, queries=3),
]
LIBRARIES = (DDN, AutoAttack)  # they look at the answers themselves
NO_GRADIENT = (PixelAttack,)


def six_pixels():
    "A linear model of four classes, images, and the labels it gives them."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    x = torch.rand(3, 1, 6, 6)
    return model, x, answers(model, x)


@pytest.mark.parametrize("attack", QUICK, ids=repr)
def test_first_mistakes_are_refused_by_name(attack):
    model, x, y = six_pixels()
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator or None, got 0"):
        attack(model, x, y, 0)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.float16.*Attack x\.float\(\)"):
        attack(model, x.half(), y)
    if not isinstance(attack, LIBRARIES):
        with pytest.raises(ValueError, match=r"the model must return logits \[3, K\], got tuple"):
            attack(lambda z: (model(z), z), x, y)
    if not isinstance(attack, (*LIBRARIES, *NO_GRADIENT, DeepFool)):
        with pytest.raises(ValueError, match="logits have no gradient with respect to the images"):
            attack(lambda z: model(z).detach(), x, y)


@pytest.mark.parametrize("attack", QUICK, ids=repr)
def test_a_softmax_is_warned_of_and_any_whole_label_is_taken(attack):
    model, x, y = six_pixels()
    with pytest.warns(UserWarning, match="they look like probabilities"):
        attack(lambda z: model(z).softmax(1), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two steps find little
        assert torch.equal(attack(model, x, y.int(), seeded()), attack(model, x, y, seeded()))


def test_a_norm_in_other_letters_is_refused_by_name():
    with pytest.raises(ValueError, match="norm must be 'linf' or 'l2', got 'Linf'"):
        PGD(norm="Linf")
