"""The four papers' parts on a pretend accelerator: the answers of the CPU, and no read by the host inside a loop."""

import pretend
import pytest
import torch
from torch import nn

from afgstudy.afg.attacker import FeatureAdversary, StandInAttack, guides, imitate
from afgstudy.afg.drawing import Visualiser, redirected_relu, visualise
from afgstudy.afg.genome import Genome
from afgstudy.afg.recognition import cheap_features, second_network, train_second
from afgstudy.afg.separation import equal_norm_noise, separability, small_vgg
from afgstudy.attacks.harmless import Harmless
from afgstudy.training import Recipe
from afgstudy.two_stream.attacks import AdaptiveAttack, SumOfTypes, TypeOne, TypeTwo
from afgstudy.two_stream.defence import TwoStream
from afgstudy.two_stream.labels import identity_map


def on_both(make):
    "What `make()` gives, on the CPU and on the accelerator."
    return make().eval(), make().eval().to("npu")


def images(n: int, size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


# --- two-stream ---


def two_streams() -> TwoStream:
    torch.manual_seed(0)
    high, low = (
        nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.Softplus(), nn.Flatten(), nn.Linear(6 * n * n, 4)).double()
        for n in (7, 3)
    )
    return TwoStream(high, low, identity_map(list("abcd")), p1=0.05, p2=0.05, high_size=16, low_size=8)


@pytest.mark.parametrize(
    "attack",
    [
        TypeOne(),
        TypeTwo(),
        TypeOne(against="class"),
        AdaptiveAttack(0.05, 0.01, steps=16, targets=1),
        SumOfTypes(),
    ],
    ids=lambda attack: attack.name,
)
def test_two_streams_are_attacked_and_answer_as_on_the_cpu(attack):
    here, there = on_both(two_streams)
    x = images(8, 16, torch.float64)
    y = here(x).label
    expected, found = attack(here, x, y), attack(there, x.to("npu"), y.to("npu"))
    assert found.device.type == "npu" and torch.allclose(found.cpu(), expected, rtol=0, atol=1e-9)
    for a, b in zip(here(x), there(x.to("npu")), strict=True):
        assert torch.allclose(a.double(), b.cpu().double(), atol=1e-9)


def test_the_adaptive_attack_looks_at_every_eighth_step():
    "Three looks in sixteen steps, five reads around them; what the label map says is never read."
    _, there = on_both(two_streams)
    x = images(8, 16, torch.float64).to("npu")
    y = there(x).label
    with pretend.reads() as found:
        AdaptiveAttack(0.001, 0.0001, steps=16, targets=1)(there, x, y)
    assert 3 <= sum(found.values()) <= 8, dict(found)
    with pretend.reads() as found:
        there.evidence(*there.both(x))
        there.logits(x)
        there.categorised(x)
    assert not found


def test_images_beyond_the_range_are_refused_on_the_device_too():
    _, there = on_both(two_streams)
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
        there(3 * images(2, 16, torch.float64).to("npu"))


# --- AFG ---


def vgg() -> nn.Module:
    return small_vgg(widths=(6, 6, 8, 8, 10, 12), seed=3)


def test_a_genome_is_drawn_on_the_device_without_a_read():
    (here, there), x = on_both(vgg), images(2, 32)
    drawing = Visualiser.small(16, steps=4)
    genome = Genome(("relu2", "relu4"), drawing=drawing)
    assert (genome(there, x.to("npu")).cpu().int() - genome(here, x).int()).abs().max() <= 1
    directions = {"relu4": torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0))}
    expected = visualise(here, directions, drawing)["relu4"]
    with pretend.reads() as found:
        pictures = visualise(there, {k: v.to("npu") for k, v in directions.items()}, drawing)["relu4"]
    assert not found and torch.allclose(pictures.cpu(), expected, atol=1e-3)


def test_a_redirected_relu_gives_the_gradient_of_the_cpu_without_a_read():
    inputs = torch.tensor([[-1.0, -2.0], [3.0, -1.0]])  # all of the first image is blocked
    gradients = []
    for device in ("cpu", "npu"):
        x = inputs.to(device).requires_grad_()
        with redirected_relu(), pretend.reads() as found:
            gradients += torch.autograd.grad(-x.relu().sum(), x)
        assert not found
    assert torch.equal(gradients[1].cpu(), gradients[0]) and (gradients[0][0] == -1).all()


def test_attackers_of_afg_walk_as_on_the_cpu():
    (here, there), x = on_both(vgg), images(6, 32)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    layers, partner = ("relu2", "relu4"), guides(torch.tensor([0, 1, 2, 0, 1, 2]))
    assert torch.equal(guides(y.to("npu")).cpu(), partner)
    pooled = cheap_features(here, x, layers)["pooled"]
    classes = here(x[:1]).shape[1]
    scores = torch.randn(6, 2 * classes, generator=torch.Generator().manual_seed(1))
    match, pull = FeatureAdversary(layers, eps=0.05, steps=4), StandInAttack(eps=0.05, steps=4)
    results = []
    for model, device in ((here, "cpu"), (there, "npu")):
        at, goal = x.to(device), y[partner].to(device)
        stand_in = imitate(model, layers, pooled, scores)  # both are on the CPU, as a defence's scores are
        with pretend.reads() as found:
            matched = match(model, at, at[partner], goal)
            pulled = pull(model, stand_in, at, goal)
        assert not found
        results.append((matched.cpu(), pulled.cpu()))
    for a, b in zip(*results, strict=True):
        assert (a != b).float().mean() < 0.01 and (a - x).abs().max() > 0.01  # a sign may turn on a rounding


def test_noise_of_equal_norm_takes_a_generator_of_the_cpu():
    x, g = images(4, 32), torch.Generator
    hit = (x + 0.02).clamp(0, 1)
    expected = equal_norm_noise(x, hit, g().manual_seed(1))
    found = equal_norm_noise(x.to("npu"), hit.to("npu"), g().manual_seed(1))
    assert torch.allclose(found.cpu(), expected, atol=1e-6)
    for kind in ("noise", "blur", "jpeg"):
        y = torch.zeros(4, dtype=torch.long)
        there = Harmless(kind)(vgg().to("npu"), x.to("npu"), y.to("npu"), g().manual_seed(1))
        assert torch.allclose(there.cpu(), Harmless(kind)(vgg(), x, y, g().manual_seed(1)), atol=1e-5)


def test_separability_is_read_once_a_layer():
    (here, there), x = on_both(vgg), images(6, 32)
    pairs, layers = [(x[:3], x[3:]), (x[3:], x[:3])], ["relu1", "relu4"]
    expected = separability(here, pairs, layers)
    with pretend.reads() as found:
        table = separability(there, [(a.to("npu"), b.to("npu")) for a, b in pairs], layers)
    assert sum(found.values()) == 4 * len(layers)  # two means and two errors
    numbers = [torch.tensor(t.drop(columns="layer").to_numpy(dtype=float)) for t in (table, expected)]
    assert torch.allclose(*numbers, rtol=1e-5)


def test_a_second_network_learns_with_one_read_an_epoch():
    x = (255 * images(24, 32)[:, :2]).to(torch.uint8)
    target = torch.nn.functional.one_hot(torch.arange(24) % 2, 2).float()
    with pretend.reads() as found:
        fitted = train_second(second_network("narrow", 2, 2, 32), x, target, Recipe(epochs=2, batch_size=4))
    assert next(fitted.score.parameters()).device.type == "npu"
    assert len(fitted.history) == 2 and sum(found.values()) <= 3, dict(found)
    assert fitted(x).device.type == "cpu" and fitted(x).shape == (24, 2)


def test_a_record_takes_a_number_from_any_device():
    from afgstudy.study.experiment import text_of

    assert text_of(torch.tensor(2.5, device="npu")) == text_of(torch.tensor(2.5)) == "2.50"
