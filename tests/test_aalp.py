"""AALP: mask and weights against slow transcriptions, what a step costs, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from afgstudy.aalp import (
    AALP,
    AdaptiveALP,
    GuidedDropout,
    activation_maps,
    choose,
    concentration,
    contribution,
    contributions,
    feature_contribution,
    guided,
    keep_mask,
    methods,
    pair_up,
    pairs_from,
)
from afgstudy.attacks import PGD
from afgstudy.data import load
from afgstudy.kept import trained
from afgstudy.keys import code_of, state_digest
from afgstudy.models import count_passes, create, penultimate
from afgstudy.store import Store
from afgstudy.training import ALP, TRADES, Madry, Recipe, Standard, adaptive_logit_distance, fit

INNER = PGD(eps=0.1, step_size=0.05, steps=2)


def lenet(seed=0):
    return create("lenet5", classes=10, channels=1, size=28, seed=seed)


@pytest.fixture(scope="module")
def batch():
    digits = load("digits", "train", n=12)
    return digits.images(), digits.y


def generator():
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------------------------ eq. 5, 7 and 8


def slow_contribution(A, gradient):
    return [float(np.mean([abs(A[b][f] * gradient[b][f]) for b in range(len(A))])) for f in range(len(A[0]))]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_contribution_is_the_mean_of_absolute_products(rows, features, seed):
    A, g = torch.randn(2, rows, features, generator=torch.Generator().manual_seed(seed)).double()
    assert contribution(A, g).tolist() == pytest.approx(slow_contribution(A.tolist(), g.tolist()))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=1, max_size=20))
def test_mask_keeps_the_top_half_by_rank(values):
    scores = torch.tensor(values)
    kept = keep_mask(scores).bool()
    assert kept.sum() == -(-len(values) // 2)
    if (~kept).any():
        assert scores[kept].min() >= scores[~kept].max()
    tied = (scores == scores[kept].min()).nonzero().squeeze(1)
    assert kept[tied].tolist() == sorted(kept[tied].tolist(), reverse=True)  # ties by index


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_strict_mask_is_the_printed_inequality(values):
    scores = torch.tensor(values, dtype=torch.float64)
    assert keep_mask(scores, strict=True).bool().tolist() == (np.array(values) > np.median(values)).tolist()


def test_mask_is_that_of_the_unmasked_attacked_images_and_serves_both_halves(batch):
    x, y = batch
    model, seen = lenet(), []
    x_adv = INNER(model, x, y, generator())
    expected = keep_mask(feature_contribution(model, x_adv, y))
    with guided(model, y):
        spy = penultimate(model).register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))
        model(torch.cat([x, x_adv]))
        spy.remove()
    whole = []
    spy = penultimate(model).register_forward_pre_hook(lambda m, i: whole.append(i[0].detach()))
    model(torch.cat([x, x_adv]))
    spy.remove()
    assert torch.allclose(seen[0], whole[0] * expected) and 0 < expected.sum() < len(expected)


def test_the_attack_and_evaluation_see_the_whole_network(batch):
    x, y = batch
    model = lenet()
    outside = INNER(model, x, y, generator())
    with guided(model, y):
        assert torch.equal(INNER(model, x, y, generator()), outside)
        with torch.no_grad():
            assert torch.equal(model(x), lenet()(x))
    assert torch.equal(model(x), lenet()(x))


EVERY = [Standard(), Madry(), Madry(1), ALP(), TRADES(), AdaptiveALP()]


@pytest.mark.parametrize("objective", EVERY)
@pytest.mark.parametrize("network", ["lenet5", "pooled_cnn", "resnet9"])
def test_guided_dropout_goes_around_any_objective_on_any_network(objective, network):
    "Gradients reach the features that are kept and no others."
    small = {"width": 4} if network != "lenet5" else {}
    model = create(network, classes=4, channels=1, size=28, seed=0, **small).train()
    x, y = torch.rand(6, 1, 28, 28, generator=generator()), torch.arange(6) % 4
    seen = []
    spy = penultimate(model).register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    GuidedDropout(objective)(model, x, y, INNER, generator()).total.backward()
    spy.remove()
    gradient = penultimate(model).weight.grad.abs().sum(0)
    features = len(gradient)
    assert (gradient > 0).sum() <= -(-features // 2) and gradient.sum() > 0
    assert torch.isfinite(gradient).all() and len(seen) >= 1


@pytest.mark.parametrize("objective", EVERY)
def test_guided_dropout_leaves_no_trace_and_costs_no_row(objective, batch):
    x, y = batch
    rows = []
    for wrapped in (objective, GuidedDropout(objective)):
        model = lenet()
        with count_passes(model) as passes:
            loss = wrapped(model, x, y, INNER, generator()).total
            loss.backward()
        rows.append((passes.forward_rows, passes.backward_rows))
        assert not penultimate(model)._forward_pre_hooks
    assert rows[0] == rows[1]


def test_rescale_divides_by_the_share_that_stays(batch):
    x, y = batch
    model, seen = lenet(), []
    for rescale in (False, True):
        with guided(model, y, rescale=rescale):
            spy = penultimate(model).register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))
            model(x)
            spy.remove()
    assert torch.allclose(seen[1], 2 * seen[0])


def test_a_network_with_a_frozen_head_is_masked_too(batch):
    x, y = batch
    model = lenet()
    for p in penultimate(model).parameters():
        p.requires_grad_(False)
    assert not torch.equal(GuidedDropout(Standard())(model, x, y).total, Standard()(model, x, y).total)


def test_a_mask_for_each_image_is_the_mask_of_a_batch_of_one(batch):
    "Each image, clean and attacked, gets the mask that its attacked copy would get alone."
    x, y = batch
    model, seen, whole = lenet(), [], []
    x_adv = INNER(model, x, y, generator())
    layer = penultimate(model)
    with guided(model, y, per_image=True):
        spy = layer.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))
        model(torch.cat([x, x_adv]))
        spy.remove()
    spy = layer.register_forward_pre_hook(lambda m, i: whole.append(i[0].detach()))
    model(torch.cat([x, x_adv]))
    spy.remove()
    for i in range(len(x)):
        mask = keep_mask(feature_contribution(model, x_adv[i : i + 1], y[i : i + 1]))
        for row in (i, len(x) + i):
            assert torch.allclose(seen[0][row], whole[0][row] * mask, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.booleans())
def test_masks_of_many_images_are_those_of_each(rows, features, keep, strict):
    scores = torch.rand(rows, features, generator=generator()).double()
    one_by_one = torch.stack([keep_mask(row, keep, strict) for row in scores])
    assert torch.equal(keep_mask(scores, keep, strict), one_by_one)


# ------------------------------------------------------------------------------------------------ eq. 9 and 10


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 10**6))
def test_adaptive_distance_against_a_transcription(rows, classes, seed):
    random = torch.Generator().manual_seed(seed)
    z, z_adv = torch.randn(2, rows, classes, generator=random).double()
    y = torch.randint(classes, (rows,), generator=random)
    slow = []
    for b in range(rows):
        p = np.exp(z[b].numpy()) / np.exp(z[b].numpy()).sum()
        slow.append(p[y[b]] * np.mean((z[b].numpy() - z_adv[b].numpy()) ** 2))
    assert adaptive_logit_distance(z, z_adv, y).tolist() == pytest.approx(slow)
    assert (adaptive_logit_distance(z, z_adv, y) <= (z - z_adv).square().mean(1)).all()
    summed = adaptive_logit_distance(z, z_adv, y, over_classes="sum")
    assert summed.tolist() == pytest.approx([classes * v for v in slow])


def test_gradient_of_the_adaptive_distance_holds_the_weight_constant():
    y = torch.tensor([1, 0, 3])
    z, z_adv = (a.requires_grad_() for a in torch.randn(2, 3, 4, generator=generator()).double())
    weight = z.detach().softmax(1).gather(1, y[:, None]).squeeze(1)
    ours = torch.autograd.grad(adaptive_logit_distance(z, z_adv, y).sum(), (z, z_adv))
    for tensor, gradient in zip((z, z_adv), ours, strict=True):
        for i in range(z.numel()):
            step = torch.zeros(z.numel()).double()
            step[i] = 1e-6
            step = step.view_as(z)
            moved = [(z + s, z_adv) if tensor is z else (z, z_adv + s) for s in (step, -step)]
            up, down = ((weight * (a - b).square().mean(1)).sum().item() for a, b in moved)
            assert gradient.view(-1)[i].item() == pytest.approx((up - down) / 2e-6, abs=1e-8)


def test_steps_cost_what_is_promised(batch):
    "AALP at most 1.15 of ALP; ALP at most 1.1 of Madry's own step and a clean pass; TRADES two clean forwards."
    x, y = batch
    rows = {}
    for name, objective in {"own": Madry(), **methods()}.items():
        model = lenet()
        with count_passes(model) as passes:
            objective(model, x, y, INNER, generator()).total.backward()
        rows[name] = (passes.forward_rows, passes.backward_rows)
    for aalp, alp, own in zip(rows["AALP"], rows["Kannan ALP"], rows["own"], strict=True):
        assert aalp <= 1.15 * alp and alp <= 1.1 * (own + len(x))
    assert rows["TRADES"] == ((INNER.steps + 2 + 1) * len(x), (INNER.steps + 2) * len(x))


def test_trades_sees_the_clean_images_twice_a_step_however_long_its_attack(batch):
    x, y = batch
    for steps in (1, 4):
        model, clean = lenet(), 0

        def count(module, inputs):
            nonlocal clean
            clean += sum(bool((row == image).all()) for row in inputs[0] for image in x)

        handle = model.register_forward_pre_hook(count)
        TRADES()(model, x, y, replace(INNER, steps=steps), generator())
        handle.remove()
        assert clean == 2 * len(x)


def test_the_overall_loss_is_the_sum_of_its_parts(batch):
    x, y = batch
    loss = AALP(3.0)(lenet(), x, y, INNER, generator())
    total = loss.parts["clean"] + loss.parts["adversarial"] + 3 * loss.parts["pairing"]
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)


def test_weight_zero_without_mask_is_adversarial_training(batch):
    x, y = batch
    ours = AdaptiveALP(0.0)(lenet(), x, y, INNER, generator()).total
    assert torch.equal(ours, Madry(clean_weight=1)(lenet(), x, y, INNER, generator()).total)


def test_every_row_of_the_tables_trains_and_each_differently():
    digits, seen = load("digits", "train", n=128), set()
    for objective in methods().values():
        model = lenet()
        fit(model, digits, objective, INNER, Recipe(epochs=1, batch_size=32))
        seen.add(state_digest(model))
    assert len(seen) == len(methods()) == 9


def test_training_is_deterministic():
    digits = load("digits", "train", n=96)
    states = []
    for _ in range(2):
        model = lenet()
        fit(model, digits, AALP(), INNER, Recipe(epochs=2, batch_size=32))
        states.append(state_digest(model))
    assert states[0] == states[1]


def test_weights_by_epoch_are_kept_in_every_memory_format(tmp_path):
    digits, store = load("digits", "train", n=64), Store(tmp_path)
    recipe = Recipe(epochs=2, batch_size=32, channels_last=True)
    course, alone = (trained("lenet5", digits, AALP(), INNER, recipe, store=store, snapshots=s) for s in (True, False))
    assert len(course.snapshots) == 2 and state_digest(course.model) == state_digest(alone.model)


def test_the_key_of_a_training_covers_the_code_of_wrapped_objectives():
    assert {"afgstudy.aalp.dropout", "afgstudy.training"} <= set(code_of(fit, AALP(), INNER))
    assert "afgstudy.aalp.dropout" not in code_of(fit, ALP(), INNER)


# ------------------------------------------------------------------------------------------------ what is measured


def test_contributions_do_not_depend_on_the_batch_size():
    digits, model = load("digits", "test", n=50), lenet()
    whole = contributions(model, digits, INNER)
    assert torch.allclose(whole, contributions(model, digits, INNER, batch_size=7), rtol=1e-3, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=30), st.floats(0.1, 100))
def test_concentration_is_relative(values, factor):
    a, b = (concentration(torch.tensor(values, dtype=torch.float64) * f) for f in (1, factor))
    assert a.gini == pytest.approx(b.gini, abs=1e-9) and a.half == b.half
    slow = np.abs(np.subtract.outer(values, values)).sum() / (2 * len(values) * np.sum(values))
    assert a.gini == pytest.approx(slow, abs=1e-9)


def test_consistent_and_inconsistent_partition_what_is_right_when_clean():
    random = torch.Generator().manual_seed(0)
    clean, attacked = torch.randn(2, 200, 5, generator=random)
    y = torch.randint(5, (200,), generator=random)
    pairs = pairs_from(clean, attacked, y)
    assert torch.equal(pairs.consistent | pairs.inconsistent, clean.argmax(1) == y)
    assert not (pairs.consistent & pairs.inconsistent).any()


def test_pairs_of_a_set_do_not_depend_on_the_batch_size():
    digits, model = load("digits", "test", n=30), lenet()
    a, b = pair_up(model, digits, INNER), pair_up(model, digits, INNER, batch_size=8)
    assert torch.allclose(a.pairing, b.pairing, atol=1e-4) and torch.equal(a.consistent, b.consistent)


def test_maps_lie_between_zero_and_one_and_leave_the_model_alone(batch):
    y = batch[1]
    model = create("resnet9", classes=10, channels=1, size=32, seed=0, width=8)
    before = state_digest(model)
    maps = activation_maps(model, torch.rand(4, 1, 32, 32), y[:4])
    assert maps.shape == (4, 32, 32) and maps.min() >= 0 and maps.max() <= 1
    assert state_digest(model) == before and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


# ------------------------------------------------------------------------------------------------ mistakes


LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: GuidedDropout(Standard())(LINEAR, x, y), "layer with parameters before"),
        (
            lambda x, y: GuidedDropout(Standard())(create("allconv"), torch.rand(2, 3, 32, 32), y[:2]),
            "no linear layer",
        ),
        (lambda x, y: GuidedDropout(Standard())(lenet(), x, y + 10), "classes 0 to 9"),
        (lambda x, y: AALP()(lenet(), x, y - 1, INNER), "labels run from -1"),
        (lambda x, y: adaptive_logit_distance(torch.zeros(2, 3), torch.zeros(2, 3), y[:2] + 3), "classes 0 to 2"),
        (lambda x, y: AALP(-1.0), "weight"),
        (lambda x, y: AALP(float("nan")), "weight"),
        (lambda x, y: GuidedDropout(keep=0.0), "keep"),
        (lambda x, y: GuidedDropout(keep=1.5), "keep"),
        (lambda x, y: AALP()(lenet(), x, y, None), "needs an attack"),
        (lambda x, y: feature_contribution(lenet(), x, y + 10), "classes 0 to 9"),
        (lambda x, y: activation_maps(lenet(), x, y - 10), "classes 0 to 9"),
        (
            lambda x, y: pairs_from(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 4])),
            "classes 0 to 3",
        ),
        (lambda x, y: choose(["AAPL"]), "AALP"),
        (lambda x, y: contribution(torch.zeros(2, 3), torch.zeros(3, 2)), "[2, 3] and [3, 2]"),
        (lambda x, y: concentration(torch.zeros(4)), "not all 0"),
        (lambda x, y: activation_maps(LINEAR, x, y), "convolution"),
    ],
)
def test_mistakes_are_refused_with_what_was_given(call, words, batch):
    with pytest.raises(ValueError) as error:
        call(*batch)
    assert words in str(error.value)


@pytest.mark.parametrize("objective", ["Madry adv", "Kannan ALP", "TRADES", "ALP+GD", "ALP+ASW", "AALP", "ADV+GD"])
def test_an_objective_without_its_attack_stops_before_it_begins(objective):
    digits, model = load("digits", "train", n=32), lenet()
    before = state_digest(model)
    with pytest.raises(ValueError, match="needs an attack"):
        fit(model, digits, methods()[objective], None, Recipe(epochs=1))
    assert state_digest(model) == before


def test_labels_out_of_range_stop_a_training_before_it_begins():
    digits = load("digits", "train", n=32)
    wrong = replace(digits, y=digits.y + 5, classes=tuple("abcdefghijklmno"))
    with pytest.raises(ValueError, match="classes 0 to 9"):
        fit(lenet(), wrong, AALP(), INNER, Recipe(epochs=1))
