"""CAFD: class activation features, the attack, the denoiser and its losses, training, the defence, the baselines."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, mse_loss

from afgstudy import kept
from afgstudy.attacks import PGD
from afgstudy.attacks.base import ImageNoise
from afgstudy.attacks.evaluate import attacked, survives
from afgstudy.attacks.gradient import random_point
from afgstudy.cafd import (
    CAFD,
    JPEG,
    Aimed,
    ClassActivation,
    ClassActivationAttack,
    Denoiser,
    Discriminator,
    Purification,
    Purified,
    PurifierLoss,
    PurifierRecipe,
    TotalVariation,
    fit_purifier,
    training,
    unseen_attacks,
)
from afgstudy.cafd.attack import scaled
from afgstudy.cafd.baselines import divergence, forward_difference, method_named
from afgstudy.cafd.features import digits_target, feature_layer, map_distance
from afgstudy.cafd.losses import LOSSES, ordinary, relativistic
from afgstudy.cafd.protocol import (
    RUNGS,
    Workshop,
    answers_rightly,
    attacked_in_parts,
    conclusion,
    ladder,
    relative_change,
    split_target,
    survives_adaptive,
    target_recipe,
)
from afgstudy.cafd.training import fitted_purifier, purifier_spec
from afgstudy.data import load
from afgstudy.defence import Defence
from afgstudy.device import generator_for
from afgstudy.keys import state_digest
from afgstudy.models import count_passes, create
from afgstudy.passes import correct
from afgstudy.stats import paired
from afgstudy.store import Store
from afgstudy.study.experiment import look_up, published
from afgstudy.study.parameters import full_parameters
from afgstudy.training import copy_state

EXPERIMENTS = ("unseen", "transfer", "ablation", "adaptive", "epsilon", "maps", "amplification", "ladder")
QUICK = PurifierRecipe(epochs=2, batch_size=20, milestones=(1,), discriminator_width=1 / 8)


@pytest.fixture(scope="module")
def digits():
    "A trained target, 60 training digits and 60 test digits."
    target, train, test = digits_target()
    return target, train.take(slice(0, 60)), test.take(slice(0, 60))


@pytest.fixture(scope="module")
def pairs(digits):
    "The training digits, attacked by CAFA."
    target, train, _ = digits
    return attacked(ClassActivationAttack(eps=0.2, step_size=0.05, steps=4), target, train)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- class activation features ---


@pytest.mark.parametrize(
    ("network", "conv", "cam"),
    [
        ("pooled_cnn", "conv6", "relu6"),
        ("resnet32", "layer3.4.conv2", "layer3"),
        ("resnet50_cifar", "layer3.5.conv3", "layer3"),
        ("wrn28_10", "layer3.3.conv2", "relu"),
        ("vgg19_bn", "features.49", "features"),
        ("resnet18", "layer4.1.conv2", "layer4"),
    ],
)
def test_feature_points_of_the_targets(network, conv, cam):
    model = create(network, seed=0)
    x = torch.zeros(1, 3, 32, 32)
    assert (feature_layer(model, "conv", x), feature_layer(model, "cam", x)) == (conv, cam)
    assert model.training, "watching a pass must not change the mode"


def test_maps_are_captums_grad_cam(digits):
    from captum.attr import LayerGradCam

    target, _, test = digits
    x = test.images(slice(0, 8))
    reading = ClassActivation(target, "cam")(x)
    oracle = LayerGradCam(target, target.network.relu6).attribute(x, reading.logits.argmax(1))
    assert torch.allclose(reading.maps / 49, oracle[:, 0], atol=1e-5)  # Grad-CAM averages over 7 x 7


def test_weights_follow_the_answer_or_the_given_classes(digits):
    target, _, test = digits
    x = test.images(slice(0, 5))
    read, rows = ClassActivation(target), target.network.head.weight
    assert torch.equal(read(x).weights, rows[target(x).argmax(1)])
    wanted = torch.tensor([0, 1, 2, 3, 4])
    assert torch.equal(read(x, wanted).weights, rows[wanted])
    assert torch.equal(read(x).phi.sum(1), read(x).maps)


@pytest.mark.parametrize(
    ("network", "point", "message"),
    [
        ("lenet5", "conv", "head reads 84"),
        ("nin", "cam", "pooling and a linear head"),
        ("pooled_cnn", "relu1", "feature point must be maps"),
        ("pooled_cnn", "relu9", "no layer 'relu9'"),
    ],
)
def test_what_has_no_class_activation_features_says_so(network, point, message):
    model = create(network, channels=1, size=28, seed=0).eval()
    with pytest.raises(ValueError, match=message):
        ClassActivation(model, point)(torch.zeros(1, 1, 28, 28))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        ClassActivation(lambda x: x)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(4, 33), st.integers(4, 33), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_map_distance_is_that_of_enlarged_maps(h, w, tall, wide, seed):
    a, b = rand(2, 3, 4, h, w, seed=seed, dtype=torch.float64)
    large = [interpolate(t, size=(tall, wide), mode="bilinear", align_corners=False) for t in (a, b)]
    slow = (large[0] - large[1]).square().mean((1, 2, 3))
    assert torch.allclose(map_distance(a, b, (tall, wide)), slow, rtol=1e-10)
    assert torch.allclose(map_distance(a, b), (a - b).square().mean((1, 2, 3)))


# --- the attack ---


def slow_cafa(model, x, noise, eps, step, steps, normalise):
    "CAFA written out: enlarged maps, autograd, sign steps, projection."
    layer, head = model.network.conv6, model.network.head.weight
    kept = []
    handle = layer.register_forward_hook(lambda m, i, o: kept.append(o))

    def look(at):
        kept.clear()
        logits = model(at)
        maps = (kept[0] * head[logits.argmax(1)][:, :, None, None]).relu()
        over = (1, 2, 3) if normalise == "image" else (0, 1, 2, 3)
        low, high = maps.amin(over, keepdim=True), maps.amax(over, keepdim=True)
        return interpolate((maps - low) / (high - low), size=x.shape[2:], mode="bilinear")

    reference = look(x).detach()
    at = random_point(x, eps, "linf", noise, 0)
    for _ in range(steps):
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((look(at) - reference).square().mean((1, 2, 3)).sum(), at)
        at = (at + step * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1).detach()
    handle.remove()
    return at


@pytest.mark.parametrize("normalise", ["image", "batch"])
def test_cafa_is_its_slow_transcription(digits, normalise):
    target = create("pooled_cnn", channels=1, size=28, width=8, seed=0)
    target.load_state_dict(digits[0].state_dict())
    target = target.eval().double()
    x = digits[2].images(slice(0, 4)).double()
    attack = ClassActivationAttack(eps=0.2, step_size=0.05, steps=4, normalise=normalise)
    noise = ImageNoise.draw(4, generator_for(0, "slow"), x.device)
    slow = slow_cafa(target, x, noise, 0.2, 0.05, 4, normalise)
    assert torch.allclose(attack(target, x, generator=generator_for(0, "slow")), slow, atol=1e-9)


@given(
    eps=st.floats(0.01, 0.5),
    steps=st.integers(1, 3),
    norm=st.sampled_from(["linf", "l2"]),
    normalise=st.sampled_from(["image", "batch", "none"]),
    point=st.sampled_from(["conv", "cam"]),
)
@settings(max_examples=15, deadline=None)
def test_cafa_stays_in_its_ball_and_leaves_the_model_alone(digits, eps, steps, norm, normalise, point):
    target, _, test = digits
    x, y = test.images(slice(0, 4)), test.y[:4]
    attack = ClassActivationAttack(
        eps=eps, step_size=eps / 2, steps=steps, norm=norm, normalise=normalise, point=point
    )
    before = state_digest(target)
    flags = [(p.requires_grad, p.grad) for p in target.parameters()]
    x_adv = attack(target, x, generator=generator_for(1, "ball"))
    moved = (x_adv - x).flatten(1)
    reach = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert (reach <= eps * (1 + 1e-5) + 1e-6).all() and 0 <= x_adv.min() and x_adv.max() <= 1
    assert torch.equal(x_adv, attack(target, x, y, generator_for(1, "ball"))), "labels do not matter"
    assert state_digest(target) == before and not target.training
    after = [(p.requires_grad, p.grad) for p in target.parameters()]
    assert all(f[0] == a[0] and f[1] is a[1] for f, a in zip(flags, after, strict=True))


def test_an_image_does_not_depend_on_its_batch_mates():
    model = create("pooled_cnn", channels=1, size=28, width=8, seed=0).eval().double()
    x = rand(6, 1, 28, 28, dtype=torch.float64)
    attack = ClassActivationAttack(eps=0.1, step_size=0.03, steps=3)
    noise = ImageNoise.draw(6, generator_for(0), x.device)
    together = attack.perturb(model, x, None, noise)
    alone = torch.cat([attack.perturb(model, x[i : i + 1], None, noise[[i]]) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-12)


def test_at_the_image_itself_there_is_no_gradient(digits):
    target, _, test = digits
    x = test.images(slice(0, 3)).clone().requires_grad_()
    read = ClassActivation(target)
    reference = read(x.detach()).phi.detach()
    (gradient,) = torch.autograd.grad(map_distance(read(x).phi, reference).sum(), x)
    assert not gradient.any()


def test_passes_of_cafa(digits):
    target, _, test = digits
    x = test.images(slice(0, 7))
    with count_passes(target) as passes:
        ClassActivationAttack(eps=0.1, step_size=0.02, steps=5)(target, x)
    assert passes.backward_rows == 7 * 5 and passes.forward_rows == 7 * 6 + 1


def test_cafa_moves_features_further_than_noise_and_errs_without_labels(digits):
    target, _, test = digits
    x, read = test.images(), ClassActivation(target)
    attack = ClassActivationAttack(eps=0.08, step_size=0.02, steps=10)
    x_adv = attacked(attack, target, test)
    noise = random_point(x, 0.08, "linf", ImageNoise.draw(len(x), generator_for(0), x.device), 0)
    with torch.no_grad():
        before, far, near = (attack.compared(read(z)) for z in (x, x_adv, noise))
    assert map_distance(far, before).mean() > 1.5 * map_distance(near, before).mean()
    assert correct(target, x_adv, test.y).float().mean() < correct(target, noise, test.y).float().mean() - 0.2


@pytest.mark.parametrize("settings_", [{"normalise": "x"}, {"steps": 0}, {"eps": 8}, {"norm": "l1"}])
def test_settings_of_cafa_that_cannot_be(settings_):
    with pytest.raises(ValueError):
        ClassActivationAttack(**settings_)


@pytest.mark.parametrize("images", [255 * rand(2, 1, 28, 28), rand(2, 1, 28, 28) - 0.5])
def test_cafa_wants_images_in_range(digits, images):
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        ClassActivationAttack(eps=0.1, step_size=0.05, steps=1)(digits[0], images)


def test_scaled_maps_fill_the_unit_interval():
    maps = 7 * rand(3, 2, 4, 4) - 3
    image = scaled(maps, "image")
    assert torch.allclose(image.amin((1, 2, 3)), torch.zeros(3)) and torch.allclose(
        image.amax((1, 2, 3)), torch.ones(3)
    )
    assert torch.allclose(scaled(7 * maps + 1, "image"), image, atol=1e-5)
    assert torch.equal(scaled(maps, "none"), maps) and not scaled(torch.full((2, 1, 3, 3), 5.0)).any()


def test_aimed_attacks_reach_for_three_or_one(digits):
    target, _, test = digits
    x, y = test.images(slice(0, 20)), test.y[:20]
    inner = PGD(eps=0.2, step_size=0.04, steps=4, targeted=True)
    aim = torch.where(y == 3, 1, 3)
    wanted = inner(target, x, aim, generator_for(0))
    assert torch.equal(Aimed(inner)(target, x, y, generator_for(0)), wanted)
    for wrong in (lambda: Aimed(PGD()), lambda: Aimed(inner, target=1)):
        with pytest.raises(ValueError):
            wrong()


# --- networks ---


@given(st.integers(16, 41), st.integers(16, 41), st.sampled_from([1, 3]))
@settings(max_examples=8, deadline=None)
def test_a_denoiser_keeps_the_form_and_adds_its_noise(height, width, channels):
    net = Denoiser(channels, 1 / 16, seed=0).eval()
    x = rand(2, channels, height, width)
    with torch.no_grad():
        out = net(x)
        assert out.shape == x.shape and torch.equal(out, x + net.noise(x))


def test_the_whole_denoiser_has_hgds_size():
    plan = [(3, 64, 2), (64, 128, 3), (128, 256, 3), (256, 256, 3), (256, 256, 3)]
    plan += [(512, 256, 3), (512, 256, 3), (384, 128, 3), (192, 64, 2)]
    convolutions = sum(9 * (i * o + (n - 1) * o * o) for i, o, n in plan) + 64 * 3
    norms = sum(2 * o * n for _, o, n in plan)
    assert sum(p.numel() for p in Denoiser().parameters()) == convolutions + norms
    strides = [m.stride for block in Denoiser().encoder for m in block if isinstance(m, nn.Conv2d)]
    assert [s for s in strides if s == (2, 2)] == [(2, 2)] * 4
    assert all(m.momentum == 0.9 for m in Denoiser().modules() if isinstance(m, nn.BatchNorm2d))


def test_networks_are_seeded_and_check_their_images():
    before = torch.get_rng_state()
    assert state_digest(Denoiser(1, 1 / 16, seed=1)) == state_digest(Denoiser(1, 1 / 16, seed=1))
    assert state_digest(Denoiser(1, 1 / 16, seed=1)) != state_digest(Denoiser(1, 1 / 16, seed=2))
    assert torch.equal(before, torch.get_rng_state())
    for size, features in ((32, 512), (28, 128), (64, 2048)):
        net = Discriminator(1, size, seed=0)
        assert net.score[0].in_features == features and net(rand(2, 1, size, size)).shape == (2,)
    for wrong in (lambda: Denoiser(1, 1 / 16)(rand(1, 3, 32, 32)), lambda: Discriminator(3, 8)):
        with pytest.raises(ValueError):
            wrong()


# --- losses ---


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_the_games_are_their_formulas(scores, offset):
    real = torch.tensor(scores, dtype=torch.float64)
    fake = real.flip(0) + offset
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = binary_cross_entropy_with_logits
    l_d = (bce(real - fake.mean(), ones) + bce(fake - real.mean(), zeros)) / 2
    l_adv = (bce(real - fake.mean(), zeros) + bce(fake - real.mean(), ones)) / 2
    assert torch.allclose(relativistic(real, fake), l_d) and torch.allclose(
        relativistic(real, fake, False), l_adv
    )
    assert torch.allclose(relativistic(fake, real), l_adv), "swapping targets is swapping sides"
    assert torch.allclose(ordinary(real, fake), (bce(real, ones) + bce(fake, zeros)) / 2)
    assert torch.allclose(ordinary(real, fake, False), bce(fake, ones))


def test_the_loss_of_the_public_code_and_of_the_formula(digits):
    target, _, test = digits
    x = test.images(slice(0, 6))
    read = ClassActivation(target)
    with torch.no_grad():
        seen = read(1 - x), read(x)
    large = [interpolate(r.features, size=(28, 28), mode="bilinear") for r in seen]
    slow = 1e3 * mse_loss(*large) + 1e-3 * mse_loss(seen[0].weights, seen[1].weights)
    assert torch.allclose(PurifierLoss(adversarial=0)(1 - x, x, seen).total, slow, rtol=1e-4)
    phi = [interpolate(r.phi, size=(28, 28), mode="bilinear") for r in seen]
    formula = PurifierLoss(adversarial=0, mode="formula")(1 - x, x, seen)
    assert torch.allclose(formula.total, 1e3 * mse_loss(*phi), rtol=1e-4) and set(formula.parts) == {
        "features"
    }
    hgd = LOSSES["HGD"](1 - x, x, seen)
    assert torch.allclose(hgd.total, (seen[0].logits - seen[1].logits).abs().mean())
    assert torch.allclose(LOSSES["MSE"](1 - x, x).total, mse_loss(1 - x, x))


@pytest.mark.parametrize(
    "settings_",
    [{"features": -1}, {"game": "chess"}, {"mode": "x"}, {"features": 0, "weights": 0, "adversarial": 0}],
)
def test_losses_that_cannot_be(settings_):
    with pytest.raises(ValueError):
        PurifierLoss(**settings_)


def test_the_class_weight_term_teaches_nothing(digits, pairs):
    target, train, _ = digits

    def after(**changes):
        net = Denoiser(1, 1 / 16, seed=0)
        fit_purifier(net, target, train, pairs, PurifierLoss(**changes), QUICK)
        return state_digest(net)

    as_coded = after()
    assert after(weights=0) == as_coded and after(weights=100.0) == as_coded
    assert after(weights=100.0, soft=True) != as_coded


# --- training ---


def test_training_learns_and_leaves_the_target_alone(digits, pairs):
    target, train, _ = digits
    before, flags = state_digest(target), [(p.requires_grad, id(p.grad)) for p in target.parameters()]
    globally = torch.get_rng_state()
    net = Denoiser(1, 1 / 16, seed=0)
    recipe = PurifierRecipe(epochs=6, batch_size=20, milestones=(), lr=3e-3, discriminator_width=1 / 8)
    history = fit_purifier(net, target, train, pairs, LOSSES["without the game"], recipe)
    assert history[-1]["features"] < history[0]["features"] / 3 and not net.training
    assert state_digest(target) == before
    assert [(p.requires_grad, id(p.grad)) for p in target.parameters()] == flags
    assert torch.equal(globally, torch.get_rng_state())


class Crash(Exception):
    pass


@pytest.mark.parametrize("renew", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_training_ends_in_the_same_numbers(digits, pairs, tmp_path, monkeypatch, renew, fresh):
    from afgstudy.cafd import training

    target, train, _ = digits
    images = ClassActivationAttack(eps=0.2, step_size=0.1, steps=1) if fresh else pairs
    recipe = PurifierRecipe(epochs=3, batch_size=30, milestones=(2,), renew=renew, discriminator_width=1 / 8)

    def train_it(file=None):
        net = Denoiser(1, 1 / 16, seed=0)
        return net, fit_purifier(net, target, train, images, PurifierLoss(), recipe, file)

    whole, history = train_it()
    real, calls = training.run_purifier_epoch, []

    def crashing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Crash
        return real(*args)

    monkeypatch.setattr(training, "run_purifier_epoch", crashing)
    with pytest.raises(Crash):
        train_it(tmp_path / "c.pt")
    again, resumed = train_it(tmp_path / "c.pt")
    assert len(calls) == 4 and state_digest(again) == state_digest(whole)
    assert [{**r, "seconds": 0} for r in resumed] == [{**r, "seconds": 0} for r in history]
    with pytest.raises(ValueError, match="another training"):
        fit_purifier(
            Denoiser(1, 1 / 16, seed=5), target, train, images, PurifierLoss(), recipe, tmp_path / "c.pt"
        )


def test_mixed_precision_is_of_the_forward_passes_alone(digits, pairs):
    target, train, _ = digits
    seen = {"float32": [], "bfloat16": []}
    for precision, kinds in seen.items():
        net = Denoiser(1, 1 / 16, seed=0)
        layer = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
        hook = layer.register_forward_hook(partial(lambda kinds, m, x, out: kinds.append(out.dtype), kinds))
        fit_purifier(net, target, train, pairs, PurifierLoss(), replace(QUICK, epochs=1, precision=precision))
        hook.remove()
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert net(train.images(slice(0, 2))).dtype == torch.float32
    assert {k: set(v) for k, v in seen.items()} == {"float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bfloat16', got 'half'"):
        PurifierRecipe(precision="half")


def test_fresh_images_are_not_stored_ones(digits, pairs):
    target, train, _ = digits
    attack = ClassActivationAttack(eps=0.2, step_size=0.05, steps=4)
    ends = []
    for images in (pairs, attack):
        net = Denoiser(1, 1 / 16, seed=0)
        with count_passes(target) as passes:
            fit_purifier(net, target, train, images, LOSSES["MSE"], QUICK)
        ends.append((state_digest(net), passes.backward_rows))
    assert ends[0][0] != ends[1][0]
    assert ends[0][1] == 0 and ends[1][1] == QUICK.epochs * len(train) * attack.steps


@pytest.mark.parametrize(
    ("method", "forward", "backward"), [("CAFD", 2, 1), ("HGD", 2, 1), ("MSE", 0, 0), ("APE-GAN", 0, 0)]
)
def test_what_an_epoch_costs(digits, pairs, method, forward, backward):
    target, train, _ = digits
    loss, recipe = method_named(method, PurifierRecipe(epochs=1, batch_size=20, discriminator_width=1 / 8))
    net = Denoiser(1, 1 / 16, seed=0)
    with count_passes(target) as of_target, count_passes(net) as of_net:
        fit_purifier(net, target, train, pairs, loss, recipe)
    assert (of_net.forward_rows, of_net.backward_rows) == (60, 60)
    found = of_target.forward_rows, of_target.backward_rows  # one image finds the layer
    assert found == (forward * 60 + (forward > 0), backward * 60)


def test_a_loss_that_explodes_is_an_error(digits, pairs):
    target, train, _ = digits
    recipe = PurifierRecipe(epochs=3, batch_size=20, lr=1e30, discriminator_width=1 / 8)
    with pytest.raises(FloatingPointError, match="learning rate"):
        fit_purifier(Denoiser(1, 1 / 16, seed=0), target, train, pairs, LOSSES["MSE"], recipe)


def test_tasks_that_do_not_fit(digits, pairs):
    target, train, _ = digits
    net = Denoiser(1, 1 / 16, seed=0)
    for images, message in (
        (pairs[:5], "of the same images"),
        (pairs * 2, r"outside \[0, 1\]"),
        ("PGD", "a tensor or an attack"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_purifier(net, target, train, images, PurifierLoss(), QUICK)
    with pytest.raises(ValueError, match="made for images"):
        fit_purifier(Denoiser(3, 1 / 16), target, train, pairs, PurifierLoss(), QUICK)
    with pytest.raises(ValueError, match="empty"):
        fit_purifier(net, target, train.take(slice(0, 0)), pairs[:0], PurifierLoss(), QUICK)


def test_the_description_tells_trainings_apart(digits, pairs):
    target, train, _ = digits
    base = dict(loss=PurifierLoss(), recipe=QUICK, attacked_images=pairs)
    others = [
        {"loss": PurifierLoss(mode="formula")},
        {"recipe": PurifierRecipe(epochs=3)},
        {"attacked_images": pairs.flip(0)},
        {"attacked_images": ClassActivationAttack()},
        {"attacked_images": ClassActivationAttack(normalise="batch")},
    ]
    net = Denoiser(1, 1 / 16, seed=0)
    specs = [json.dumps(purifier_spec(net, target, train, **base | o), sort_keys=True) for o in [{}, *others]]
    assert len(set(specs)) == len(specs)


def test_the_store_keeps_purifiers_and_attacked_sets(digits, pairs, tmp_path):
    target, train, test = digits
    store = Store(tmp_path)
    net, artifact = fitted_purifier(target, train, pairs, PurifierLoss(), QUICK, 1 / 16, store=store)
    again, same = fitted_purifier(target, train, pairs, PurifierLoss(), QUICK, 1 / 16, store=store)
    assert artifact.key == same.key and state_digest(net) == state_digest(again) and not net.training
    attack = PGD(eps=0.1, step_size=0.05, steps=2)
    some = test.take(slice(0, 5))
    defence = CAFD(target, net)
    models = (target, defence.pipeline, defence.straight, CAFD(target, net, bits=8).pipeline)
    keys = {kept.attacked(attack, model, some, store=store).artifact.key for model in models}
    assert len(keys) == 4, "what the attacker's gradients pass is part of the key"


# --- the defence ---


def test_the_verdict_is_the_pipelines_answer(digits):
    target, _, test = digits
    x = test.images(slice(0, 9))
    net = Denoiser(1, 1 / 16, seed=0)  # in training mode: the defence evaluates it all the same
    defence = CAFD(target, net)
    assert isinstance(defence, Defence)
    with count_passes(net) as of_net, count_passes(target) as of_target:
        verdict = defence(x)
    assert of_net.forward_rows == of_target.forward_rows == 9 and net.training
    assert torch.equal(verdict.label, target(defence.purify(x)).argmax(1))
    assert not verdict.flagged.any() and not verdict.score.any()
    net.eval()
    with torch.no_grad():
        together, alone = defence.pipeline(x), torch.cat([defence.pipeline(x[i : i + 1]) for i in range(9)])
    assert torch.allclose(together, alone, atol=1e-3), "an image's answer does not depend on its batch"


def test_rounding_and_clip_hide_no_gradient(digits):
    target, _, test = digits
    x = test.images(slice(0, 4)).clone().requires_grad_()
    net = Denoiser(1, 1 / 16, seed=0).eval()
    plain, eight, straight = (
        Purified(net, target),
        Purified(net, target, 8),
        Purified(net, target, straight=True),
    )
    assert torch.equal(plain(x), straight(x))
    levels = 255 * eight.purify(x)
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    for pipeline in (eight.eval(), straight.eval()):
        (gradient,) = torch.autograd.grad(pipeline(x).sum(), x)
        assert gradient.abs().amax((1, 2, 3)).min() > 0
    (through,) = torch.autograd.grad(straight.purify(x).sum(), x)
    (unclipped,) = torch.autograd.grad(net(x).sum(), x)
    assert torch.allclose(through, unclipped)


def test_defences_that_do_not_fit(digits):
    target, _, test = digits
    x = test.images(slice(0, 2))
    good = CAFD(target, Denoiser(1, 1 / 16))
    for wrong, message in (
        (lambda: CAFD(target, Denoiser(3, 1 / 16)), "3 channels, the target takes 1"),
        (lambda: CAFD(create("nin"), Denoiser(3, 1 / 16)), "linear head"),
        (lambda: CAFD(target, nn.Identity()), "use Purification"),
        (lambda: good(2 * x), r"\[0, 1\]"),
        (lambda: good.purify(x - 1), r"\[0, 1\]"),
        (lambda: good((255 * x).byte()), "floating point"),
        (lambda: Purified(good.purifier, target, bits=0), "bits"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_the_public_codes_pipeline_forgets_the_image(digits):
    target, _, test = digits
    x, defence = test.images(slice(0, 4)), CAFD(digits[0], Denoiser(1, 1 / 16, seed=0).eval())
    with torch.no_grad():
        assert torch.allclose(defence.as_coded(x), target(defence.purifier(x) - x), atol=1e-3)
        assert torch.equal(defence.as_coded(x), target(defence.purifier.noise(x)))
    x_adv = PGD(eps=0.1, step_size=0.05, steps=2)(defence.as_coded, x, test.y[:4])
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_an_adaptive_attacker_is_the_worst_of_two(digits):
    target, _, test = digits
    attack = PGD(eps=0.1, step_size=0.05, steps=2)
    defence = CAFD(target, Denoiser(1, 1 / 16, seed=0).eval())
    left = survives_adaptive(attack, defence, test)
    assert left.shape == (60,) and left.dtype == torch.bool
    assert not (left & ~survives(attack, defence.pipeline, test)).any()
    bare, x = Purification(target, nn.Identity()), test.images()
    assert torch.equal(bare.logits(x), target(x)) and survives_adaptive(attack, bare, test).shape == (60,)


# --- baselines and workshop ---


def test_jpeg_is_torchvisions():
    from torchvision.transforms.v2 import JPEG as Theirs

    for channels in (1, 3):
        x = rand(3, channels, 32, 32)
        pixels = (x * 255).round().byte()
        theirs = torch.stack([Theirs(60)(p) for p in pixels]).float() / 255
        assert torch.equal(JPEG(60)(x), theirs)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        JPEG()(rand(1, 2, 32, 32))
    with pytest.raises(ValueError, match="quality"):
        JPEG(101)


@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_divergence_is_minus_the_adjoint(height, width, seed):
    u, p, q = rand(3, 1, 2, height, width, seed=seed, dtype=torch.float64)
    p[:, :, -1], q[:, :, :, -1] = 0, 0
    down, right = forward_difference(u)
    assert torch.allclose((down * p + right * q).sum(), -(u * divergence(p, q)).sum())


def test_total_variation_minimises_its_energy():
    x = rand(2, 1, 12, 12, dtype=torch.float64)

    def energy(u):
        down, right = forward_difference(u)
        return (down.square() + right.square()).sqrt().sum() + (u - x).square().sum() / 0.2

    best = TotalVariation(0.1, 2000)(x)
    assert torch.allclose(best.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-9), "the mean is kept"
    assert energy(TotalVariation(0.1, 30)(x)) < 1.02 * energy(best) < energy(x)
    for k in range(20):  # no small change is better
        nearby = best + 0.01 * (rand(2, 1, 12, 12, seed=k, dtype=torch.float64) - 0.5)
        assert energy(nearby) > energy(best)
    alone = torch.cat([TotalVariation()(x[i : i + 1]) for i in range(2)])
    assert torch.allclose(TotalVariation()(x), alone)


def test_the_line_up():
    suite = unseen_attacks()
    assert (suite["PGD"].eps, suite["PGD"].step_size, suite["PGD"].steps) == (8 / 255, 0.01, 40)
    assert suite["CW-L2"].steps == 100 and suite["DDN"].gamma == 0.05 and suite["stAdv"].searches == 20
    assert suite["AutoAttack"].name == "AutoAttack" and suite["PGD L2"].norm == "l2"
    assert unseen_attacks(thin=10)["AutoAttack"].name == "AutoAttack (reduced)"
    loss, recipe = method_named("APE-GAN", PurifierRecipe())
    assert (recipe.lr, recipe.betas, loss.pixels, loss.adversarial) == (2e-4, (0.5, 0.999), 0.7, 0.3)
    with pytest.raises(ValueError, match="no purifier is called"):
        method_named("CAFE", PurifierRecipe())
    assert split_target("pooled_cnn:12") == ("pooled_cnn", {"width": 12})
    for wrong in (lambda: split_target("pooled_cnn:wide"), lambda: target_recipe("large", 2)):
        with pytest.raises(ValueError):
            wrong()


def test_relative_change_is_that_of_the_activations(digits):
    target, _, test = digits
    x = test.images(slice(0, 4))
    changed = relative_change(target, ["conv1"], x, 1 - x)
    a, b = (target.network.conv1(target.normalise(z)).flatten(1) for z in (x, 1 - x))
    assert torch.allclose(changed[:, 0], (b - a).norm(dim=1) / a.norm(dim=1))


def test_the_workshop_makes_things_once(digits, tmp_path):
    train, test = load("digits", "train", n=120), digits[2]
    recipe = PurifierRecipe(epochs=1, batch_size=20, discriminator_width=1 / 8)

    def work():
        theirs = target_recipe("small", 1)
        shop = Workshop(train, 40, 0.2, 0.1, 2, recipe, 1 / 16, theirs, store=Store(tmp_path))
        target = shop.target("pooled_cnn:4")
        return shop, [shop.defence(target, m)(test.images()).label for m in ("none", "JPEG", "CAFD")]

    first, labels = work()
    built = {p: p.stat().st_mtime_ns for p in Path(tmp_path).rglob("manifest.json")}
    second, same = work()
    assert all(torch.equal(a, b) for a, b in zip(labels, same, strict=True))
    assert {p: p.stat().st_mtime_ns for p in Path(tmp_path).rglob("manifest.json")} == built
    assert (
        sorted(a.kind for a in first.used)
        == sorted(a.kind for a in second.used)
        == ["attacked", "model", "purifier"]
    )


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_verdict_is_the_exact_test_s(only_a, only_b):
    a = torch.arange(100) < only_a
    b = (torch.arange(100) >= 50) & (torch.arange(100) < 50 + only_b)
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    said = conclusion(paired(a, b), "up", "down")
    assert said == (
        "no difference that this n can show" if p >= 0.05 else "up" if only_a > only_b else "down"
    )


def test_other_seeds_are_other_trainings(digits, pairs, tmp_path):
    target, train, _ = digits
    shop = Workshop(
        train, 60, 0.2, 0.05, 4, QUICK, 1 / 16, target_recipe("small", 1), store=Store(tmp_path)
    )
    first, same, other = (shop.denoiser(target, "MSE", pairs, seed=s) for s in (None, QUICK.seed, 1))
    assert state_digest(first) == state_digest(same) != state_digest(other)


def test_large_sets_are_attacked_in_parts_that_are_kept(digits, tmp_path):
    model, _, test = digits
    attack, few, store = PGD(eps=0.1, step_size=0.05, steps=2), test.take(slice(0, 7)), Store(tmp_path)
    attacked_in_parts(attack, model, few.take(slice(0, 3)), part=3, store=store)  # as far as a killed run came
    x, parts = attacked_in_parts(attack, model, few, part=3, store=store)
    assert x.shape == few.images().shape and len(store.ls()) == len({a.key for a in parts}) == 3
    twins = few.take([0, 0])
    same, _ = attacked_in_parts(attack, model, twins, part=1, store=store)
    assert not torch.equal(same[0], same[1])  # each part has random starts of its own


def test_a_training_stops_where_the_validation_loss_is_flat(digits, pairs, monkeypatch):
    model, *_ = digits
    data, images = digits[1], pairs
    losses = iter([1.0, 0.9, 0.899, 0.898, 0.5])
    monkeypatch.setattr(training, "validation_loss", lambda *_: next(losses))
    recipe = PurifierRecipe(epochs=5, batch_size=20, patience=2, discriminator_width=1 / 8)
    history = fit_purifier(Denoiser(1, 1 / 16), model, data, images, recipe=recipe, validation=(data, images))
    assert [row["validation"] for row in history] == [1.0, 0.9, 0.899, 0.898]
    with pytest.raises(ValueError, match="patience=2 needs validation images"):
        fit_purifier(Denoiser(1, 1 / 16), model, data, images, recipe=recipe)


def test_the_ladder_s_rungs_are_attacks_on_what_is_known(digits, tmp_path):
    _, train, test = digits
    recipe = PurifierRecipe(epochs=1, batch_size=20, discriminator_width=1 / 8)
    shop = Workshop(train, 40, 0.1, 0.05, 2, recipe, 1 / 16, target_recipe("small", 1), store=Store(tmp_path))
    target, few, attack = shop.target("pooled_cnn:8"), test.take(slice(0, 20)), PGD(eps=0.1, step_size=0.05, steps=4)
    found = ladder(shop, target, "CAFD", attack, few)
    assert tuple(found) == RUNGS and all(survived.shape == (20,) for survived in found.values())
    defence, other = shop.defence(target, "CAFD"), shop.defence(target, "CAFD:1")
    assert state_digest(defence.purifier) != state_digest(other.purifier)
    by_hand = answers_rightly(defence, attacked(attack, other.pipeline, few), few.y)
    assert torch.equal(found["another denoiser"], by_hand)
    assert tuple(ladder(shop, target, "TV", attack, few)) == (RUNGS[0], RUNGS[3])
    with pytest.raises(ValueError, match="'CAFD:x'"):
        shop.defence(target, "CAFD:x")


# --- the experiments ---


def test_no_published_numbers_are_made_up():
    table = published("cafd")
    assert table.empty
    assert look_up(table, dataset="cifar10, vgg19_bn", method="CAFD", attack="PGD-40") is None


@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_presets_fit_their_experiment(project, monkeypatch, preset, name):
    monkeypatch.chdir(project)
    parameters = full_parameters(f"cafd/{name}", preset, folder=project / "nbs" / "experiments")
    lists = [
        parameters[k]
        for k in ("datasets", "targets", "target_weights", "eps", "n_train", "n_test", "epochs", "lr")
        if "datasets" in parameters
    ]
    assert len({len(v) for v in lists}) <= 1
    with torch.device("meta"):  # the form is enough: no weights
        for network in parameters.get("targets", [parameters.get("target")]):
            create(split_target(network)[0], size=32, **split_target(network)[1])


@pytest.mark.real
def test_cafa_on_real_images(real_data, real_weights):
    model, test = create("resnet32", weights="resnet32_cifar10"), load("cifar10", "test", n=32)
    assert correct(model, test.images(), test.y).float().mean() > 0.8
    attack = ClassActivationAttack(steps=10)
    x_adv = attacked(attack, model, test)
    assert (x_adv - test.images()).abs().max() <= 8 / 255 + 1e-6
    assert correct(model, x_adv, test.y).float().mean() < 0.4
    assert copy_state(model)["network.linear.weight"].shape == (10, 64)


def test_an_experiment_from_end_to_end(project, monkeypatch, tmp_path):
    from click.testing import CliRunner

    from afgstudy.study.cli import main

    monkeypatch.chdir(project)
    monkeypatch.setenv("AFGSTUDY_RUNS", str(tmp_path))
    small = dict(n_target=200, n_train=40, n_test=8, epochs=1, target_epochs=1, cafa_steps=2, pgd_steps=2)
    given = [word for name, value in small.items() for word in ("-p", f"{name}={value}")]
    ran = CliRunner().invoke(main, ["run", "cafd/maps", *given])
    assert ran.exit_code == 0, ran.output
    (record,) = (json.loads(p.read_text()) for p in tmp_path.rglob("record.json"))
    assert len(record["rows"]) == 9 and {r["n"] for r in record["rows"]} == {8}
    assert all(r["published"] is None and r["measured"] is not None for r in record["rows"])
    assert {a["kind"] for a in record["provenance"]["artifacts"]} == {"model", "attacked", "purifier"}
