"""Two-stream: label map, Algorithm 1 against its pseudocode, attacks, Algorithm 2 against its chain."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from afgstudy.attacks import BIM, FGSM, CarliniWagner, DeepFool, PixelAttack
from afgstudy.attacks.harmless import Harmless
from afgstudy.data import Dataset, load
from afgstudy.defence import Defence, Verdict, outcome
from afgstudy.models import count_passes, create
from afgstudy.store import Store
from afgstudy.two_stream import (
    AdaptiveAttack,
    Categorised,
    Evidence,
    ReputationServer,
    ResizeOnly,
    SumOfTypes,
    TwoStream,
    TypeOne,
    TypeTwo,
    decide,
    exact,
    identity_map,
    read_map,
    resize,
    simulate,
    sweep,
)
from afgstudy.two_stream.attacks import succeeds, table_attacks, wrong_categories
from afgstudy.two_stream.defence import (
    at_budget,
    evidence_of,
    exactly,
    frontier,
    high_hits,
    low_hits,
    outcome_among,
)
from afgstudy.two_stream.labels import OTHER, LabelMap, checked_map
from afgstudy.two_stream.networks import CapsuleMargin, make_network, route, squash, trained_network
from afgstudy.two_stream.protocol import (
    WITH_RADIUS,
    Column,
    allowed_for,
    at_share,
    category_images,
    column_for,
    cross_fitted,
    evidence_under,
    high_network,
    low_network,
    on_part,
    shuffle_tiles,
    study_attacks,
    summed,
    thresholds_at,
    under_attacks,
    verdict_rates,
)
from afgstudy.two_stream.reputation import counting, mixed, rates, transition, wrong_answers
from afgstudy.two_stream.views import balanced_views, views

EPS = 8 / 255


class Linear(torch.nn.Module):
    "A network that anyone can compute: logits are weights times pixels."

    def __init__(self, size: int, classes: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(classes, 3 * size * size, generator=generator))

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.T


CATEGORIES = ("a", "b", "c", "d")  # d has no class
SEVEN = LabelMap("seven", CATEGORIES, (0, 1, 1, OTHER, 2, 0, 1), tuple("pqrstuv"))


@pytest.fixture
def pair() -> TwoStream:
    "A defence of two linear networks, 16 and 4 pixels, seven classes and four categories."
    return TwoStream(Linear(16, 7, 0), Linear(4, 4, 1), SEVEN, high_size=16, low_size=4)


def images(n: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- label map ---


def test_the_shipped_map_is_the_papers():
    mapped = read_map()
    counts = mapped.counts()
    assert (
        len(mapped.table) == 1000
        and len(set(mapped.wnids)) == 1000
        and list(mapped.wnids) == sorted(mapped.wnids)
    )
    assert sum(v for k, v in counts.items() if k != "other") == 217
    assert counts == {
        "airplane": 2, "automobile": 10, "bird": 59, "cat": 5, "deer": 0, "dog": 118, "frog": 3, "horse": 1,
        "ship": 12, "truck": 7, "other": 783,
    }  # fmt: skip
    named = {
        "cat": ["n02123045", "n02124075"],
        "dog": ["n02110063", "n02110806"],
        "bird": ["n01582220", "n01601694"],
        "frog": ["n01644373", "n01644900"],
    }
    for category, wnids in named.items():
        for wnid in wnids:
            assert mapped.categories[mapped.table[mapped.wnids.index(wnid)]] == category


def test_the_maps_names_and_order_are_torchvisions():
    from torchvision.models import ResNet50_Weights

    mapped = read_map()
    assert list(mapped.classes) == ResNet50_Weights.DEFAULT.meta["categories"]
    assert (
        mapped.categories[1] == "automobile"
        and mapped.classes[817] == "sports car"
        and mapped.table[817] == 1
    )


@pytest.mark.real
def test_the_maps_order_is_that_of_the_real_images(real_data):
    folders = sorted(p.name for p in (real_data / "imagenet1000").iterdir() if p.is_dir())
    assert folders == list(read_map().wnids)


def test_a_map_of_ones_own_is_read_from_the_same_format(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "# categories: cat dog\nwnid,index,name,category\nn1,1,pug,dog\nn0,0,tabby,cat\nn2,2,tench,other\n"
    )
    mine = read_map(path)
    assert mine.table == (0, 1, OTHER) and mine.classes == ("tabby", "pug", "tench") and mine.name == "mine"
    assert mine(torch.tensor([[2, 1], [0, 0]])).tolist() == [[OTHER, 1], [0, 0]]
    path.write_text("wnid,index,name,category\nn1,0,pug,dog\n")
    with pytest.raises(ValueError, match="needs one line '# categories"):
        read_map(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "misses classes 0"),
        (lambda rows: [*rows, rows[0]], "has class 0 twice"),
        (lambda rows: [rows[0] | {"category": "cow"}, *rows[1:]], "has the category 'cow'"),
        (lambda rows: [rows[0] | {"index": "-1"}, *rows[1:]], "index must be a number"),
    ],
)
def test_a_map_that_does_not_fit(change, message):
    rows = [{"wnid": f"n{i}", "index": str(i), "name": str(i), "category": "cat"} for i in range(3)]
    with pytest.raises(ValueError, match=message):
        checked_map("mine", ["cat"], change(rows))


# --- Algorithm 1 ---


def transcription(high, low, table, p1, p2):
    "The pseudocode of Algorithm 1, one image, loops and all; every best answer (ties), or none for rejected."
    top5 = sorted(range(len(high)), key=lambda k: -high[k])[:5]
    top2 = sorted(range(len(low)), key=lambda k: -low[k])[:2]
    best, answers = -1.0, set()
    for i in top5:
        for j in top2:
            if table[i] == j and high[i] >= p1 and low[j] >= p2:
                product = high[i] * low[j]
                if product > best:
                    best, answers = product, {table[i]}
                elif product == best:
                    answers.add(table[i])
    return answers


probabilities = st.floats(0, 1, width=16)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.1, 6),
    st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0]),
    st.sampled_from([0.0, 0.1, 0.2, 0.5]),
)
def test_algorithm_1_is_its_pseudocode(seed, sharpness, p1, p2):
    generator = torch.Generator().manual_seed(seed)
    high = sharpness * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    low = sharpness * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    verdict = decide(evidence_of(high, low, SEVEN), p1, p2)
    for row in range(6):
        answers = transcription(
            high.softmax(1)[row].tolist(), low.softmax(1)[row].tolist(), SEVEN.table, p1, p2
        )
        assert verdict.flagged[row].item() == (not answers)
        assert not answers or verdict.label[row].item() in answers


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(np.float64, (3, 7), elements=st.sampled_from([0.0, 1.0, 2.0])),
    hnp.arrays(np.float64, (3, 4), elements=st.sampled_from([0.0, 1.0])),
)
def test_algorithm_1_with_ties_answers_a_best_pair(high, low):
    e = evidence_of(torch.from_numpy(high), torch.from_numpy(low), SEVEN)
    verdict = decide(e, 0.05, 0.05)
    for row in range(3):
        pairs = [
            (float(p * q), int(k))
            for p, k in zip(e.high_p[row], e.high_label[row], strict=True)
            for q, m in zip(e.low_p[row], e.low_label[row], strict=True)
            if k == m and p >= 0.05 and q >= 0.05
        ]
        assert verdict.flagged[row].item() == (not pairs)
        if pairs:
            assert verdict.label[row].item() in {k for v, k in pairs if v == max(pairs)[0]}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), probabilities, probabilities, probabilities, probabilities)
def test_higher_thresholds_only_reject_more_and_the_score_does_not_move(seed, a, b, c, d):
    generator = torch.Generator().manual_seed(seed)
    e = evidence_of(
        3 * torch.randn(20, 7, generator=generator), 3 * torch.randn(20, 4, generator=generator), SEVEN
    )
    loose, strict = decide(e, min(a, b), min(c, d)), decide(e, max(a, b), max(c, d))
    assert (strict.flagged | ~loose.flagged).all()
    assert torch.equal(loose.score, strict.score) and (0 <= loose.score).all() and (loose.score <= 1).all()


def test_other_and_empty_categories_never_match():
    high = torch.tensor([[0, 0, 0, 9.0, 0, 0, 0]])  # the one class that is "other"
    for k in range(4):
        low = torch.eye(4)[[k]] * 9
        assert decide(evidence_of(high, low, SEVEN), 0.1, 0.2).flagged.item()
    everything = evidence_of(torch.zeros(1, 7), torch.tensor([[0, 0, 0, 9.0]]), SEVEN)
    assert decide(everything, 0.0, 0.9).flagged.item()  # d has no class


def test_the_sum_adds_up_one_category_and_can_only_accept_more():
    generator = torch.Generator().manual_seed(0)
    high, low = torch.randn(200, 7, generator=generator), 2 * torch.randn(200, 4, generator=generator)
    one, total = evidence_of(high, low, SEVEN), evidence_of(high, low, SEVEN, "sum")
    assert all(torch.equal(a, b) for a, b in zip(summed(one), total, strict=True))
    by_hand = torch.stack(
        [(one.high_label == k[:, None]).float().mul(one.high_p).sum(1) for k in one.high_label.T], 1
    )
    assert torch.allclose(total.high_p, by_hand)
    assert (decide(one, 0.2, 0.2).flagged | ~decide(total, 0.2, 0.2).flagged).all()
    assert decide(one, 0.2, 0.2).flagged.sum() > decide(total, 0.2, 0.2).flagged.sum()


def test_the_sweep_is_the_decision_at_every_threshold():
    generator = torch.Generator().manual_seed(1)
    e = evidence_of(
        2 * torch.randn(50, 7, generator=generator), 2 * torch.randn(50, 4, generator=generator), SEVEN
    )
    y, grid = torch.randint(3, (50,), generator=generator), np.array([0.0, 0.1, 0.4])
    s = sweep(e, exactly(y, 4), grid, grid)
    assert np.allclose(s.right + s.wrong + s.rejected, 1)
    for i, p1 in enumerate(grid):
        for j, p2 in enumerate(grid):
            o = outcome(decide(e, p1, p2), y)
            assert np.allclose(
                [v.float().mean() for v in o], [s.right[i, j], s.wrong[i, j], s.rejected[i, j]]
            )


def test_the_frontier_holds_what_nothing_beats():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 8, 40), random.integers(0, 8, 40)
    best = set(frontier(x, y))
    points = {(x[i], y[i]) for i in best}
    for i in range(40):
        beaten = any(x[k] <= x[i] and y[k] <= y[i] and (x[k], y[k]) != (x[i], y[i]) for k in range(40))
        assert beaten == ((x[i], y[i]) not in points)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
)
def test_a_budget_rejects_the_highest_scores_and_ties_together(scores, share):
    verdict = Verdict(torch.zeros(len(scores)).long(), torch.zeros(len(scores)).bool(), torch.tensor(scores))
    y = torch.arange(len(scores)) % 2
    b = at_budget(verdict, exactly(y, 2), verdict, share)
    assert (b.rejected.astype(int) + b.right + b.wrong == 1).all() and b.rejected.mean() >= share - 1e-9
    kept = [s for s, r in zip(scores, b.rejected, strict=True) if not r]
    gone = [s for s, r in zip(scores, b.rejected, strict=True) if r]
    assert not kept or not gone or max(kept) < min(gone)
    assert not gone or sum(s > min(gone) for s in scores) < max(1, share * len(scores) + 1e-9)
    assert b.accuracy.tolist() == [k == 0 for k, r in zip(y.tolist(), b.rejected, strict=True) if not r]


def test_a_budget_that_makes_no_sense():
    verdict = Verdict(torch.zeros(1).long(), torch.zeros(1).bool(), torch.ones(1))
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"a share in \[0, 1\)"):
            at_budget(verdict, exactly(verdict.label, 2), verdict, share)


# --- the defence as a whole ---


def test_the_defence_is_two_passes_and_one_resize(pair, monkeypatch):
    assert isinstance(pair, Defence)
    x = images(9)
    with count_passes(pair.high) as high, count_passes(pair.low) as low:
        verdict = pair(x)
    assert (high.forward_rows, low.forward_rows, high.backward_rows, low.backward_rows) == (9, 9, 0, 0)
    by_hand = decide(evidence_of(pair.high(x), pair.low(resize(x, 4)), SEVEN), 0.1, 0.2)
    assert torch.equal(verdict.label, by_hand.label) and torch.equal(verdict.flagged, by_hand.flagged)


def test_the_defence_leaves_its_networks_as_they_were():
    high, low = create("resnet9", size=32, width=4, seed=0), create("lenet5", channels=3, size=32, seed=0)
    defence = TwoStream(high.train(), low.eval(), identity_map(list("0123456789")), low_size=32)
    before = {k: v.clone() for k, v in defence.state_dict().items()}
    first, second = defence(images(4, 32)), defence(images(4, 32))
    assert high.training and not low.training and torch.equal(first.score, second.score)
    assert all(torch.equal(v, defence.state_dict()[k]) for k, v in before.items())


def test_an_images_verdict_does_not_depend_on_its_batch(pair):
    x = images(12)
    whole, single = pair(x), [pair(x[i : i + 1]) for i in range(12)]
    assert torch.allclose(whole.score, torch.cat([v.score for v in single]), atol=1e-4)
    assert torch.allclose(pair.logits(x), torch.cat([pair.logits(x[i : i + 1]) for i in range(12)]), atol=1e-4)


def test_categorised_probabilities_are_sums():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = logits.softmax(1), Categorised(lambda x: x, SEVEN)(logits).softmax(1)
    assert torch.allclose(q[:, 1], p[:, [1, 2, 6]].sum(1), atol=1e-8)
    assert torch.allclose(q[:, 4], p[:, 3], atol=1e-8) and (q[:, 3] < 1e-8).all() and q.shape == (5, 5)
    same = Categorised(lambda x: x, identity_map("pqrstuv"))(logits)
    assert torch.allclose(same, logits)


def test_the_score_is_differentiable_down_to_the_pixels(pair):
    x = images(3).double().requires_grad_()
    pair = pair.double()
    assert torch.autograd.gradcheck(lambda z: pair.logits(z)[:, :3].sum(1), x[:1])
    assert pair.logits(x).shape == (3, 4) and torch.isfinite(pair.logits(x)).all()


@pytest.mark.parametrize("aggregate", ["none", "sum"])
def test_without_thresholds_the_answer_is_the_highest_score(aggregate):
    pair = TwoStream(
        Linear(16, 7, 3), Linear(4, 4, 4), SEVEN, 0, 0, aggregate, high_size=16, low_size=4, top=(7, 4)
    )
    x = images(20)
    verdict = pair(x)
    assert torch.equal(verdict.label, pair.logits(x).argmax(1)) and not verdict.flagged.any()
    assert torch.allclose(1 - verdict.score, pair.logits(x).amax(1).exp(), atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bilinear-plain", "bicubic", "area", "nearest"])
def test_a_flat_image_stays_flat_whatever_the_resize(mode):
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(resize(flat, 8, mode), torch.full((1, 3, 8, 8), 0.3), atol=1e-6)
    assert torch.allclose(resize(resize(flat, 8, mode), 32, mode), flat, atol=1e-6)
    assert resize(flat, 32, mode) is flat


def test_a_car_may_be_called_a_truck_and_nothing_else():
    cars = Dataset("cars", "test", torch.zeros(3, 3, 4, 4), torch.ones(3).long(), read_map().categories)
    answers = decide(
        Evidence(
            torch.full((3, 1), 0.9),
            torch.tensor([[1], [9], [8]]),
            torch.ones(3, 1),
            torch.tensor([[1], [9], [8]]),
        )
    )
    said = outcome_among(answers, allowed_for(cars))
    assert said.right.tolist() == [True, True, False] and said.wrong.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(p1=-0.1), "p1 and p2 are probabilities"),
        (dict(p2=1.01), "p1 and p2 are probabilities"),
        (dict(mode="lanczos"), "resize mode must be one of"),
        (dict(aggregate="mean"), "aggregate must be one of"),
        (dict(high_size=None), "say the high network's image size"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    given_settings = dict(high_size=16, low_size=4) | change
    with pytest.raises(ValueError, match=message):
        TwoStream(Linear(16, 7, 0), Linear(4, 4, 1), SEVEN, **given_settings)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 3, 12, 12), r"\[B, C, 16, 16\]"),
        (torch.rand(3, 16, 16), r"\[B, C, 16, 16\]"),
        (255 * torch.rand(2, 3, 16, 16), r"images in \[0, 1\]"),
        (torch.full((1, 3, 16, 16), torch.nan), r"images in \[0, 1\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "floating-point images"),
    ],
)
def test_images_that_do_not_fit(pair, x, message):
    with pytest.raises(ValueError, match=message):
        pair(x)


def test_networks_that_do_not_fit_the_map():
    with pytest.raises(ValueError, match=r"needs 7 logits of the high network, got \(1, 6\)"):
        TwoStream(Linear(16, 6, 0), Linear(4, 4, 1), SEVEN, high_size=16, low_size=4)(images(1))
    with pytest.raises(ValueError, match=r"needs 4 logits of the low network, got \(1, 3\)"):
        TwoStream(Linear(16, 7, 0), Linear(4, 3, 1), SEVEN, high_size=16, low_size=4)(images(1))


# --- attacks ---


def test_type_one_is_the_attack_on_the_network_in_categories(pair):
    x, y = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(TypeOne(FGSM(eps=EPS))(pair, x, y), FGSM(eps=EPS)(pair.categorised, x, y))
    likeliest = torch.tensor(
        [max(SEVEN.members(int(k)), key=lambda c: z[c]) for z, k in zip(pair.high(x), y, strict=True)]
    )
    by_class = TypeOne(FGSM(eps=EPS), against="class")(pair, x, y)
    assert torch.equal(by_class, FGSM(eps=EPS)(pair.high, x, likeliest))


def test_type_two_is_figure_4_and_works_on_whole_batches(pair):
    x, y = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    attack = BIM(eps=EPS, steps=3)
    with count_passes(pair.high) as high, count_passes(pair.low) as low:
        ours = TypeTwo(attack)(pair, x, y)
    assert (high.forward_rows, low.forward_rows, low.backward_rows) == (0, 18, 18)
    for i in range(6):  # one image after the other, as the figure has it
        small = resize(x[i : i + 1], 4)
        bent = attack(pair.low, small, y[i : i + 1])
        assert torch.allclose(
            ours[i : i + 1], (x[i : i + 1] + resize(bent - small, 16)).clamp(0, 1), atol=1e-6
        )


@pytest.mark.parametrize("attack", [FGSM(eps=EPS), DeepFool(steps=5), CarliniWagner(steps=5, search_steps=2)])
def test_an_image_is_attacked_alike_in_any_batch(pair, attack):
    x, y = images(5).double(), torch.tensor([0, 1, 2, 0, 1])
    pair = pair.double()
    for kind in (TypeOne(attack), TypeTwo(attack)):
        whole = kind(pair, x, y, torch.Generator().manual_seed(0))
        parts = [kind(pair, x[i : i + 1], y[i : i + 1]) for i in range(5)]
        assert torch.allclose(whole, torch.cat(parts), atol=1e-9)


def test_pixels_of_the_small_image_become_blocks_of_the_large_one(pair):
    pair = TwoStream(pair.high, pair.low, SEVEN, mode="nearest", high_size=16, low_size=4)
    x, y = images(4), pair.low(resize(images(4), 4, "nearest")).argmax(1)
    bent = TypeTwo(PixelAttack(pixels=1, population=10, steps=2))(
        pair, x, y, torch.Generator().manual_seed(0)
    )
    changed = ((bent - x).abs().amax(1) > 0).flatten(1).sum(1)
    assert (changed <= 16).all() and changed.any()  # one of 4 x 4 pixels is a block of 4 x 4


def test_the_adaptive_attacker_wins_within_the_ball_and_says_nothing_false(pair):
    x = images(20)
    y = pair(x).label
    attack = AdaptiveAttack(eps=EPS, step_size=EPS / 4, steps=8)
    won = attack(pair, x, y)
    assert (won - x).abs().max() <= EPS + 1e-6 and won.min() >= 0 and won.max() <= 1
    naive = TypeOne(BIM(eps=EPS, steps=8))(pair, x, y)
    assert succeeds(pair, won, y).sum() > succeeds(pair, naive, y).sum()
    assert succeeds(pair, won, y).float().mean() > 0.5
    assert torch.equal(attack(pair, x, y), won)


def test_the_adaptive_attacker_leaves_alone_what_is_wrong_already(pair):
    x = images(40)
    verdict = pair(x)
    y = torch.where(verdict.label == 0, 1, 0)
    wrong = succeeds(pair, x, y)
    assert wrong.any()
    assert torch.equal(AdaptiveAttack(eps=EPS, steps=3)(pair, x, y)[wrong], x[wrong])


def test_the_adaptive_attacker_takes_one_pass_a_step(pair):
    x, y = images(4), torch.zeros(4).long()
    attack = AdaptiveAttack(eps=1e-6, step_size=1e-6, steps=3)  # too small to win
    x = x[~succeeds(pair, x, y[: len(x)])]
    y = y[: len(x)]
    assert len(x) and not succeeds(pair, attack(pair, x, y), y).any()
    with count_passes(pair.high) as high:
        attack(pair, x, y)
    targets = wrong_categories(pair, x, y).shape[1]
    assert targets == 2  # b and c: d has no class
    assert high.forward_rows == len(x) * (1 + targets * 4) and high.backward_rows == len(x) * targets * 3


def test_the_sum_keeps_within_the_sum_of_the_radii(pair):
    x = images(20)
    y = pair(x).label
    half = BIM(eps=EPS / 2, step_size=EPS / 8, steps=6, targeted=True)
    both = SumOfTypes(half, half)(pair, x, y)
    assert (both - x).abs().max() <= EPS + 1e-6
    assert succeeds(pair, both, y).sum() > succeeds(pair, x, y).sum()
    with pytest.raises(ValueError, match="must be targeted"):
        SumOfTypes(BIM(eps=EPS), half)


def test_wrong_categories_leave_out_the_right_and_the_empty_one(pair):
    x, y = images(9), torch.arange(9) % 3
    order = wrong_categories(pair, x, y)
    assert order.shape == (9, 2)
    for row, right in zip(order.tolist(), y.tolist(), strict=True):
        assert sorted(row) == sorted({0, 1, 2} - {right})
    scores = pair.logits(x).gather(1, order)
    assert (scores[:, 0] >= scores[:, 1]).all() and wrong_categories(pair, x, y, 1).shape == (9, 1)


def test_attacks_and_defence_take_an_empty_batch(pair):
    nothing, none = images(0), torch.zeros(0).long()
    assert pair(nothing).label.shape == (0,)
    for attack in (TypeOne(), TypeTwo(), ResizeOnly(), AdaptiveAttack(), Harmless("noise")):
        assert attack(pair, nothing, none).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("attack", [TypeOne(), TypeTwo(), AdaptiveAttack()])
def test_attacks_say_what_does_not_fit(pair, attack):
    with pytest.raises(ValueError, match=r"\[B, C, 16, 16\]"):
        attack(pair, images(2, 8), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        attack(pair, 255 * images(2), torch.zeros(2).long())


def test_an_attack_changes_nothing_about_the_defence(pair):
    before = {k: v.clone() for k, v in pair.state_dict().items()}
    x, y = images(3), torch.zeros(3).long()
    for attack in (TypeOne(BIM(eps=EPS)), TypeTwo(BIM(eps=EPS)), AdaptiveAttack(eps=EPS, steps=2)):
        attack(pair, x, y)
        assert all(p.requires_grad and p.grad is None for p in pair.parameters()) and pair.training
    assert all(torch.equal(v, pair.state_dict()[k]) for k, v in before.items())


# --- Algorithm 2 ---


def algorithm_2(verdicts, list_at=3, ceiling=15):
    "The pseudocode of Algorithm 2 for one node: counter and list after each image."
    cc, listed, history = 0, False, []
    for rejected in verdicts:
        cc = min(cc + 1, ceiling) if rejected else max(cc - 1, 0)
        if listed:
            if cc == 0:
                listed = False
        elif cc >= list_at:
            listed = True
        history.append((cc, listed))
    return history


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 5), st.integers(1, 40))), st.integers(1, 6))
def test_algorithm_2_is_its_pseudocode(verdicts, list_at):
    server = ReputationServer(list_at=list_at)
    state = server.start(len(verdicts))
    expected = [algorithm_2(row, list_at) for row in verdicts]
    for t in range(verdicts.shape[1]):
        state, answered = server.receive(state, verdicts[:, t])
        assert list(zip(state.counter.tolist(), state.listed.tolist(), strict=True)) == [
            h[t] for h in expected
        ]
        assert not (answered & (state.listed | verdicts[:, t])).any()


def test_a_node_that_sends_nothing_is_left_as_it_is():
    server = ReputationServer()
    state, _ = server.receive(server.start(3), np.array([True, True, True]))
    after, answered = server.receive(
        state, np.array([True, False, False]), sent=np.array([True, False, True])
    )
    assert after.counter.tolist() == [2, 1, 0] and answered.tolist() == [False, False, True]


@pytest.mark.parametrize("reject", [0.985, 0.464, 0.133, 0.0, 1.0])
def test_the_simulation_agrees_with_the_chain(reject):
    sampled, true = simulate(reject, nodes=1000, images=25, repeats=30, seed=3), exact(reject, 25)
    for points, line in zip(sampled, true, strict=True):
        error = np.sqrt(line * (1 - line) / 30_000)
        assert (np.abs(points.mean(0) - line) <= 5 * error + 1e-12).all()
    assert (np.diff(true.ever) >= -1e-12).all() and (true.now <= true.ever + 1e-12).all()


def test_the_chain_agrees_with_every_history_of_twelve_images():
    q, T = 0.4, 12
    now = ever = 0.0
    for code in range(2**T):
        verdicts = [bool(code >> t & 1) for t in range(T)]
        weight = q ** sum(verdicts) * (1 - q) ** (T - sum(verdicts))
        history = algorithm_2(verdicts)
        now += weight * history[-1][1]
        ever += weight * any(listed for _, listed in history)
    end = exact(q, T)
    assert np.allclose([end.now[-1], end.ever[-1]], [now, ever], atol=1e-12)


def test_the_calculations_behind_the_17_nodes():
    ever = {(q, t): 100 * exact(q, t).ever[-1] for q in (0.133, 0.064) for t in (3, 10, 20)}
    for (q, t), value in {(0.133, 3): 0.235, (0.133, 10): 1.8, (0.133, 20): 4.0, (0.064, 10): 0.21}.items():
        assert abs(ever[q, t] - value) < 0.06, (q, t, ever[q, t])
    assert round(9000 * 50 * ever[0.064, 3] / 100) == 118  # the paper: 17


def test_a_node_that_counts_is_simulated_as_it_is_solved():
    q = counting(0.9, 0.1, up_to=1)
    sampled, true = simulate(q, nodes=2000, images=15, repeats=20, seed=1), exact(q, 15)
    assert np.abs(sampled.ever.mean(0) - true.ever).max() < 0.01
    assert np.allclose(transition(q).sum(1), 1) and rates(0.3, ReputationServer()).shape == (16,)


def test_wrong_answers_against_a_simulation():
    random = np.random.default_rng(0)
    server, got = ReputationServer(), 0
    state, q, w = server.start(40_000), 0.5, 0.3
    for _ in range(12):
        draw = random.random(40_000)
        state, answered = server.receive(state, draw < q)
        got += (answered & (draw >= 1 - w)).sum()
    assert abs(got / 40_000 - wrong_answers(q, 12, w)) < 0.02
    assert mixed(0.5, 0.9, 0.1) == 0.5


def test_the_whole_network_is_simulated_without_a_loop_over_nodes(monkeypatch):
    calls = 0
    receive = ReputationServer.receive

    def counted(self, *args):
        nonlocal calls
        calls += 1
        return receive(self, *args)

    monkeypatch.setattr(ReputationServer, "receive", counted)
    simulate(0.133, nodes=9000, images=20, repeats=50)
    assert calls == 20


# --- networks, bench ---


def test_routing_rewards_agreement_and_lengths_are_probabilities():
    v = squash(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 10)
    assert (v.norm(dim=-1) < 1).all() and torch.allclose(squash(torch.zeros(2, 4)), torch.zeros(2, 4))
    same = torch.ones(1, 8, 1, 4)
    mixed_up = torch.randn(1, 8, 1, 4, generator=torch.Generator().manual_seed(1))
    lengths = route(torch.cat([same, mixed_up], 2)).norm(dim=-1)[0]
    assert lengths[0] > lengths[1]


def test_the_capsule_network_learns(tmp_path):
    data = load("shapes", "train", n=40, size=32)
    from afgstudy.training import Recipe

    model = trained_network("capsnet", data, Recipe(epochs=12, batch_size=20, lr=3e-3), width=8, capsules=2, depth=4)
    objective, fresh = CapsuleMargin(), make_network("capsnet", 10, 3, 32, width=8, capsules=2, depth=4)
    with torch.no_grad():
        after, before = (objective(m, data.images(), data.y).total for m in (model, fresh))
    assert after < 0.8 * before
    x = data.images(slice(0, 2)).requires_grad_()
    assert torch.autograd.grad(model(x).sum(), x)[0].abs().sum() > 0


def test_evidence_is_kept_and_found_again(pair, tmp_path):
    store = Store(tmp_path)
    data = Dataset("made up", "test", images(10), torch.arange(10) % 3, CATEGORIES)
    attack = TypeOne(BIM(eps=EPS, steps=2))
    first = evidence_under(attack, pair, data, store=store)
    with count_passes(pair.high) as passes:
        again = evidence_under(attack, pair, data, store=store)
    assert passes.forward_rows == 0 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, evidence_under(attack, pair, data), strict=True))
    other = TwoStream(pair.high, pair.low, SEVEN, p1=0.3, high_size=16, low_size=4)
    with count_passes(pair.high) as passes:
        evidence_under(attack, other, data, store=store)
    assert passes.forward_rows > 0  # another defence is another artifact


def test_every_row_of_the_study_runs_and_adds_up(pair):
    data = Dataset("made up", "test", images(8), torch.arange(8) % 3, CATEGORIES)
    quick = dict(population=8, generations=1, cw_steps=2, cw_rounds=1)
    b = Column(data, pair, data.take(slice(0, 3)), None)
    attacks = study_attacks(b, EPS, 2, adaptive_steps=2, passes=1, **quick)
    at_another = study_attacks(b, EPS, 2, adaptive_steps=2, passes=1, other_eps=[EPS / 2], **quick)
    assert len(attacks) == 18 and list(at_another) == [*attacks, *(f"{k}, 4/255" for k in WITH_RADIUS)]
    assert at_another["I: I-FGSM, 4/255"].attack.eps == EPS / 2 == at_another["adaptive, 4/255"].eps
    assert list(table_attacks(EPS)) == [k for k in attacks if k[0] == "I" and k != "I: Universal"]
    attacks |= {"II: FGSM, 4/255": at_another["II: FGSM, 4/255"]}
    seen = under_attacks(b, attacks, n_slow=4)
    sizes = {k: len(seen[k].y) for k in ("clean", "II: FGSM", "II: Carlini", "II: FGSM, 4/255")}
    assert len(seen) == 20 and list(sizes.values()) == [8, 8, 4, 4]
    part = on_part(seen["clean"], 4)
    assert torch.equal(part.y, seen["II: Carlini"].y) and torch.equal(part.y, data.subset(4).y)
    assert torch.equal(part.evidence.high_p, evidence_under(None, pair, data.subset(4)).high_p)
    assert on_part(part, 4) is part
    for s in seen.values():
        shares = verdict_rates(s)
        assert abs(sum(shares[k].value for k in ("reject", "right", "wrong")) - 1) < 1e-9
        assert high_hits(s.evidence, s.allowed).shape == low_hits(s.evidence, s.allowed).shape


def test_the_further_training_changes_the_small_network_once_and_is_kept(tmp_path):
    store, how = Store(tmp_path), dict(name="pooled_cnn", n_train=20, epochs=1, width=4)
    first, again = (low_network("shapes", further=24, further_epochs=1, store=store, **how) for _ in range(2))
    plain = low_network("shapes", store=store, **how)
    assert [a.kind for a in store.ls()] == ["model", "model"]
    pairs = [zip(m.parameters(), first.parameters(), strict=True) for m in (again, plain)]
    assert [all(torch.equal(a, b) for a, b in pair) for pair in pairs] == [True, False]


def test_every_category_has_as_many_views():
    data = load("shapes", "train", n=30, size=48)
    even = balanced_views(data, 4)
    assert even.y.bincount(minlength=10)[data.y.unique()].unique().tolist() == [4] and even.shape == (3, 32, 32)
    assert torch.equal(even.x, balanced_views(data, 4).x)


def test_views_of_an_image_are_squares_of_it():
    data = load("shapes", "train", n=3, size=64)
    whole = views(data, 1, zoom=(1, 1), blur=0.0, size=64)
    assert torch.equal(whole.x, data.x)  # the whole image is all that a square of its own size can be
    blurred = views(data, 4, zoom=(1, 1), blur=3.0, size=64)
    rough = [(x[:, :, 1:] - x[:, :, :-1]).abs().sum((1, 2)) for x in blurred.images().split(1)]
    assert len({round(r.sum().item(), 2) for r in rough}) > len(data)  # some are blurred, and some are not


def test_cross_fitting_judges_every_image_by_a_network_that_has_not_seen_it(monkeypatch):
    from afgstudy.training import Recipe
    from afgstudy.two_stream import protocol as module

    shrunk, others = (
        load("shapes", "train", n=10, size=32, seed=1),
        load("shapes", "train", n=5, size=32, seed=2),
    )
    trained_on = []

    def spy(name, data, recipe, store=None, start=None, **options):
        trained_on.append(data)
        return lambda x: x.flatten(1)[:, :10]

    monkeypatch.setattr(module, "trained_network", spy)
    monkeypatch.setattr(module, "balanced_views", lambda data, each, seed: data)
    logits = cross_fitted(lambda: None, shrunk, others, Recipe(epochs=1), folds=3)
    assert torch.equal(logits, shrunk.images().flatten(1)[:, :10])
    left_out = [i for d in trained_on for i in range(10) if not any(torch.equal(shrunk.x[i], x) for x in d.x)]
    assert sorted(left_out) == list(range(10)) and all(len(d) >= 5 + 6 for d in trained_on)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(9, 21))
def test_shuffling_moves_whole_tiles(tiles, size):
    x = torch.arange(2 * 3 * size * size, dtype=torch.float32).view(2, 3, size, size)
    y = shuffle_tiles(x, tiles)
    side = size // tiles
    edge = (size - side * tiles) // 2
    assert torch.equal(y.flatten(1).sort(1).values, x.flatten(1).sort(1).values)

    def cut(z):
        inner = z[0, 0, edge : edge + side * tiles, edge : edge + side * tiles]
        return {tuple(t.flatten().tolist()) for r in inner.split(side) for t in r.split(side, 1)}

    assert cut(y) == cut(x)


def test_images_come_in_categories():
    data = category_images("shapes", 12, size=32)
    assert len(data) == 12 and data.classes[0] == "disc"
    with pytest.raises(ValueError, match="dataset must be"):
        category_images("svhn")


def write_cars(root) -> None:
    "Four photographs of Stanford Cars a split, as the set is laid out."
    import scipy.io
    from PIL import Image

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], dtype=object)
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    fields = [(f, object) for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, where in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(1, 1, 50, 30, np.uint8(i % 2 + 1), f"{i + 1:05d}.jpg") for i in range(4)]
        scipy.io.savemat(base / where, {"annotations": np.array([rows], dtype=fields)})
        (base / f"cars_{part}").mkdir()
        for i in range(4):
            Image.new("RGB", (90, 60), (60 * i, 40, 90)).save(base / f"cars_{part}" / f"{i + 1:05d}.jpg")


def write_aircraft(root) -> None:
    "Four photographs of FGVC-Aircraft a split, as the set is laid out."
    from PIL import Image

    folder = root / "fgvc-aircraft-2013b/data"
    (folder / "images").mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nF/A-18\n")
    for part, first in (("trainval", 0), ("test", 100)):
        lines = [f"{first + i:07d} {('707-320', 'F/A-18')[i % 2]}" for i in range(4)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            Image.new("RGB", (90, 60), (10, 80, 200)).save(folder / "images" / f"{line.split()[0]}.jpg")


@pytest.mark.parametrize(
    ("name", "write", "right"),
    [("cars", write_cars, ["automobile", "truck"]), ("aircraft", write_aircraft, ["airplane"])],
)
def test_the_columns_of_cars_and_aircraft_from_their_files(tmp_path, monkeypatch, name, write, right):
    write(tmp_path)
    monkeypatch.setenv("AFGSTUDY_DATA", str(tmp_path))
    high, low = create("squeezenet1_0", classes=1000, size=64, seed=0), create("resnet32", seed=0)
    b = column_for(name, 0, high, low, n_universal=2)
    assert b.data.shape == (3, 64, 64) and b.data.classes == read_map().categories
    assert (len(b.data), len(b.fit_data), b.fit_data.split) == (4, 2, "train")
    allowed = allowed_for(b.data)
    assert [[b.data.classes[k] for k in row.nonzero()[:, 0]] for row in allowed] == [right] * 4
    assert category_images(name, 3, size=64).y.tolist() == [b.data.classes.index(right[0])] * 3
    seen = under_attacks(b, {"I: FGSM": TypeOne(FGSM(eps=EPS)), "II: FGSM": TypeTwo(FGSM(eps=EPS))})
    for s in seen.values():
        assert len(s.y) == 4 and sum(verdict_rates(s)[k].value for k in ("reject", "right", "wrong")) == 1


@pytest.mark.parametrize(("name", "right"), [("cars_part", 2), ("aircraft_part", 1)])
def test_parts_are_read_from_their_folders(tmp_path, monkeypatch, name, right):
    from PIL import Image

    for i in range(20):
        folder = tmp_path / name / f"model {i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 60), (10 * i, 40, 90)).save(folder / f"{i}.png")
    monkeypatch.setenv("AFGSTUDY_DATA", str(tmp_path))
    test, rest = (category_images(name, size=64, split=split) for split in ("test", "train"))
    assert len(test) > len(rest) > 0 and test.name == name
    assert allowed_for(test).sum(1).tolist() == [right] * len(test)
    assert not any((x == r).all() for x in test.x for r in rest.x), "fitted on what is judged"


def test_thresholds_are_chosen_on_the_other_half(pair):
    data = Dataset("made up", "test", images(12), torch.arange(12) % 3, CATEGORIES)
    b = Column(data, pair, data, None)
    clean = under_attacks(b, {})["clean"]
    for share in (0.0, 0.1, 0.5):
        p1, p2 = thresholds_at(clean, share)
        rejected = decide(clean.evidence, p1, p2).flagged.float().mean()
        assert rejected <= share + 1e-6 or (p1, p2) == (0, 0)
    weak = at_share(b, AdaptiveAttack(eps=EPS, steps=1, targets=1), 0.1)
    assert len(weak.thresholds) == 2 and (pair.p1, pair.p2) == (b.defence.p1, b.defence.p2)
    for said in (weak.clean, weak.attacked):
        assert torch.equal(said.right.int() + said.wrong.int() + said.rejected.int(), torch.ones(12).int())
    with pytest.raises(ValueError, match="two images"):
        at_share(Column(data.take(slice(0, 1)), pair, data, None), AdaptiveAttack(), 0.1)


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_harmless_changes_have_the_norm_that_was_asked_for(pair, kind):
    x = 0.4 + 0.2 * images(3)
    change = (Harmless(kind, l2=0.3)(pair, x, torch.zeros(3).long()) - x).flatten(1).norm(dim=1)
    assert torch.allclose(change, torch.full((3,), 0.3), atol=1e-3)
    with pytest.raises(ValueError, match="l2 must be a number in"):
        Harmless(kind, l2=0.0)


@pytest.mark.real
def test_real_images_in_categories(real_data):
    data = category_images("imagenet1000", 6, size=64)
    assert len(data) == 6 and data.x.dtype == torch.uint8 and data.shape == (3, 64, 64)
    others = category_images("imagenet1000", 3, size=64, mapped=False)
    assert len(others) == 3
    small, large = load("cifar10", "test", n=4), category_images("cifar10", 4, size=64)
    assert torch.equal(small.y, large.y)
    assert (resize(large.images(), 32) - small.images()).abs().mean() < 0.05


@pytest.mark.real
def test_the_order_of_channels_in_memory_changes_no_answer(real_weights):
    plain = create("squeezenet1_0", weights="squeezenet1_0_imagenet")
    stored = high_network("imagenet1000", "squeezenet1_0", "squeezenet1_0_imagenet", 224)
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(plain(x), stored(x), atol=1e-3)


@pytest.mark.real
def test_the_defence_on_real_networks(real_data, real_weights):
    high = create("squeezenet1_0", weights="squeezenet1_0_imagenet")
    low = create("resnet32", weights="resnet32_cifar10")
    defence = TwoStream(high, low, read_map())
    data = category_images("imagenet1000", 12, size=224)
    said = outcome(defence(data.images()), data.y)
    assert said.right.sum() >= 6 and said.wrong.sum() <= 2
    verdict = defence(torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    assert verdict.score.min() > 0.5  # noise is nothing the two agree on


@pytest.mark.real
def test_mobilenet_reads_photographs_with_tensorflows_padding(real_data, real_weights):
    photos = load("imagenette", "test", n=60, size=224, seed=0)
    springer, truck = (photos.classes.index(c) for c in ("English springer", "garbage truck"))
    data = photos.take((photos.y == springer) | (photos.y == truck))
    network = high_network("imagenet1000", "mobilenet_v2_tf", "mobilenet_v2_imagenet", 224)
    with torch.no_grad():
        label = network(data.images()).argmax(1)
    right = label == torch.where(data.y == springer, 217, 569)
    assert len(data) >= 5 and right.float().mean() >= 0.5


@pytest.mark.real
def test_no_photograph_that_is_judged_is_among_those_the_small_network_is_trained_on(real_data):
    judged, trained_on = category_images("imagenet1000"), load("imagenette", "train", size=224)

    def coarse(data: Dataset) -> torch.Tensor:
        return torch.cat([resize(x, 8, "area").flatten(1) for x, _ in data.batches(64)])

    assert torch.cdist(coarse(judged), coarse(trained_on)).min() > 0.5  # copies of another size lie below 0.1


# --- the experiments ---


def experiments() -> list[str]:
    from afgstudy.study.parameters import select

    return list(select(["two_stream/*"]))


@pytest.mark.parametrize("name", experiments())
@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_every_experiment_has_presets_that_fit_it(name, preset):
    from afgstudy.study.parameters import full_parameters

    values = full_parameters(name, preset)
    assert preset == "smoke" or "shapes" not in str(values.get("datasets", values.get("dataset")))
    if name in ("two_stream/table1", "two_stream/table2"):
        assert values == full_parameters("two_stream/table1", preset)  # the two tables share their evidence
        assert len(values["datasets"]) == len(values["counts"])


@pytest.mark.parametrize("name", ["two_stream/table1", "two_stream/table2"])
def test_the_sets_of_the_tables_are_known_to_the_plan(name):
    from afgstudy.data.sources import source_of
    from afgstudy.study.parameters import full_parameters

    for preset in ("cpu", "cpu-cifar10", "paper"):
        assert all(source_of(dataset) for dataset in full_parameters(name, preset)["datasets"])


def test_every_claim_has_its_experiment():
    wanted = "table1 table2 fig1 fig2 fig3_4 fig5 transfer backbones small_imagenet shrunk resize premise"
    assert sorted(experiments()) == sorted(f"two_stream/{name}" for name in wanted.split())


def test_published_numbers_add_up_as_they_are_printed():
    from afgstudy.study.experiment import published

    table = published("two_stream", table=2)
    totals = table.groupby(["dataset", "attack"]).value.sum()
    off = {k: round(v, 1) for k, v in totals.items() if abs(v - 100) > 0.15}
    assert off == {("aircraft", "I: MI-FGSM"): 93.0}  # 92.2 for 99.2?
    assert len(table) == 3 * 3 * 11 and len(published("two_stream", table=1)) == 11 * (3 * 2 + 1)


# --- as an engineer would use it ---


def test_the_example_of_the_index_works():
    program = (
        "import torch\n"
        "from afgstudy.models import create\n"
        "from afgstudy.two_stream import TwoStream, read_map\n"
        "high, low = create('squeezenet1_0', classes=1000, size=224, seed=0), create('resnet32', seed=0)\n"
        "label, flagged, score = TwoStream(high, low, read_map())(torch.rand(1, 3, 224, 224))\n"
        "print(label.shape, flagged.dtype, score.shape)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "torch.Size([1]) torch.bool torch.Size([1])" in ran.stdout, ran.stderr
