"A user's defence on trial: what is known of the specimens must be found, and every mistake ends in one sentence."

import copy
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from afgstudy.data import Dataset, load
from afgstudy.defence import Verdict
from afgstudy.judge import DefenceError, Effort, Threat, judge, judged_once, rows_of, subject_of
from afgstudy.judge import specimens as known
from afgstudy.judge.attackers import HARMLESS, Attacker, scaled_to
from afgstudy.judge.turns import AS_GIVEN, RATES, threshold_at
from afgstudy.judge.words import made_by, plan_for, sentence_of, smallest_difference, verdict_of
from afgstudy.store import Store
from afgstudy.study.cli import main

BRIEF = Effort(steps=10, restarts=1, auto_steps=2, queries=20, draws=5, samples=4, votes=3)
THREAT = Threat(0.1)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", "test", n=16)


@pytest.fixture(scope="module")
def held_out() -> Dataset:
    return load("digits", "validation")


def tried(judgement, name):
    return {t.name: t for t in judgement.tries}[name]


def states(judgement) -> dict[str, str]:
    return {c.name: c.state for c in judgement.checks}


@pytest.fixture(scope="module")
def plain(digits):
    return judge(known.undefended(), digits, THREAT, strange=known.strange(), effort=BRIEF, name="plain")


# what is found of the specimens


def test_an_undefended_network_gives_no_check_a_reason_to_fail(plain):
    structural = ["same answer twice", "batch composition", "logits", "gradients are not zero", "weights stay the same"]
    assert {states(plain)[name] for name in [*structural, "gradients of two passes agree"]} == {"pass"}
    assert plain.robust().value < plain.clean().value


def test_the_worst_case_is_the_worst_of_every_image(plain):
    worst = plain.worst()
    for t in plain.tries:
        assert not (worst.right & ~t.outcomes[AS_GIVEN].right).any()
        assert not (t.outcomes[AS_GIVEN].wrong & ~worst.wrong).any()
    total = sum(part.int() for part in worst)
    assert (total == 1).all() and len(rows_of(plain)) == len(plain.tries) + 1


def test_the_curve_never_rises_with_the_radius(plain):
    curve = [held for _, held in sorted(plain.curve.items())]
    assert all(not (later & ~earlier).any() for earlier, later in pairwise(curve))
    assert list(plain.curve)[-1] == 0.5


@pytest.mark.parametrize("make, check", [
    (known.loud, "gradients are not zero"),
    (known.rounded, "gradients are not zero"),
    (known.rounded, "gradients are not noise"),
    (known.resized, "same answer twice"),
    (known.resized, "gradients of two passes agree"),
])  # fmt: skip
def test_masked_gradients_are_caught_by_name(digits, make, check):
    found = judge(make(), digits, THREAT, effort=BRIEF)
    assert states(found)[check] == "fail"
    assert "Not to be relied on" in verdict_of(found) and check in sentence_of(found)


def test_a_declared_stand_in_gives_the_attacks_their_gradient_back(digits):
    declared = judge(known.rounded(), digits, THREAT, effort=BRIEF, not_differentiable={"step": None})
    assert states(declared)["gradients are not zero"] == "pass"
    assert tried(declared, "PGD, margin").outcomes[AS_GIVEN].wrong.any()


def test_declared_randomness_is_averaged_over_and_not_held_against_it(digits):
    found = judge(known.resized(), digits.take(slice(0, 6)), THREAT, effort=BRIEF, randomised=True)
    assert states(found)["same answer twice"] in ("pass", "warn")


def test_an_attacker_who_knows_the_score_gets_past_the_maximum_softmax(digits, held_out):
    found = judge(known.unsure(), digits, Threat(0.2), held_out=held_out, effort=BRIEF)
    assert set(found.settings) == {AS_GIVEN, *RATES}
    aware = tried(found, "PGD, rejection score")
    for setting in RATES:
        assert aware.outcomes[setting].wrong.any()
        assert found.fooled(setting).value >= aware.outcomes[setting].wrong.float().mean().item()
    assert "set to reject at most 5%" in sentence_of(found)


def test_a_detector_that_hides_its_score_is_warned_of(digits, held_out):
    class Silent(known.Unsure):
        score = None

    found = judge(Silent(known.undefended()), digits.take(slice(0, 4)), THREAT, held_out=held_out, effort=BRIEF)
    assert states(found)["rejection was attacked"] == "warn"


def test_two_defences_of_this_study_are_judged_as_they_are(digits, held_out):
    from afgstudy.cafd import CAFD, Denoiser
    from afgstudy.models import create
    from afgstudy.two_stream import EnlargedTwoStream, identity_map

    few = digits.take(slice(0, 4))
    net = create("pooled_cnn", classes=10, channels=1, size=28, width=8, seed=0).eval()
    found = judge(CAFD(net, Denoiser(channels=1, width=0.0625).eval()), few, THREAT, bare=net, effort=BRIEF)
    assert tried(found, "PGD on the bare network") and found.n == 4
    both = EnlargedTwoStream(net, net, identity_map(tuple("0123456789")), high_size=42, low_size=28)
    two = judge(both, few, THREAT, held_out=held_out, score=lambda x: -both.logits(x).amax(1), effort=BRIEF)
    assert set(two.settings) == {AS_GIVEN, *RATES}


def test_a_module_that_a_defence_makes_on_the_way_is_no_changed_weight(digits):
    from afgstudy.cafd import CAFD, Denoiser
    from afgstudy.models import create
    from afgstudy.trials import declared_by

    net = create("pooled_cnn", classes=10, channels=1, size=28, width=8, seed=0).eval()
    cafd = CAFD(net, Denoiser(channels=1, width=0.0625).eval())
    found = judge(cafd, digits.take(slice(0, 4)), THREAT, effort=BRIEF, **declared_by(cafd))
    assert states(found)["weights stay the same"] == "pass"
    assert tried(found, "PGD past the clip") and tried(found, "PGD on the bare network")


def test_attackers_of_a_defence_count_in_the_worst_case_and_inside_the_radius_only(digits):
    def declared(subject, threat, effort):
        near, far = (torch.zeros if k else torch.ones for k in (0, 1))
        return [
            Attacker("far", "white-box", lambda x, y, g: [far(x.shape)]),
            Attacker("near", "white-box", lambda x, y, g: [(x + threat.eps * near(x.shape)).clamp(0, 1)]),
        ]

    few = digits.take(slice(0, 16))
    found = judge(known.undefended(), few, THREAT, effort=BRIEF, attackers=declared)
    assert not tried(found, "far").outcomes[AS_GIVEN].wrong.any()  # beyond the radius nothing counts
    brighter = known.undefended()(few.images().add(THREAT.eps).clamp(0, 1)).argmax(1) != few.y
    assert torch.equal(tried(found, "near").outcomes[AS_GIVEN].wrong, brighter)
    assert (found.worst().wrong | ~brighter).all()
    with pytest.raises(DefenceError, match="two attackers are named 'FGSM'"):
        judge(known.undefended(), few, THREAT, attackers=lambda *_: [Attacker("FGSM", "white-box", None)])


def test_a_trial_that_was_held_is_read_and_another_is_held(digits, tmp_path):
    how = dict(effort=BRIEF, store=Store(tmp_path))
    few, net = digits.take(slice(0, 4)), copy.deepcopy(known.undefended())  # the specimen itself is shared
    first, again = (judged_once(net, few, THREAT, **how) for _ in range(2))
    assert rows_of(first) == rows_of(again) and first.seconds == again.seconds
    assert judged_once(net, few, THREAT, seed=1, **how).seconds != first.seconds
    with torch.no_grad():
        next(net.parameters()).mul_(1.01)
    assert judged_once(net, few, THREAT, **how).seconds != first.seconds


# a trial leaves no trace, and is the same twice


def test_a_trial_leaves_the_model_and_the_generators_as_they_were(digits):
    model = known.undefended()
    model.train()
    flags, state = [p.requires_grad for p in model.parameters()], torch.random.get_rng_state()
    judge(model, digits.take(slice(0, 4)), THREAT, effort=BRIEF)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
    model.eval()


def test_the_same_seed_gives_the_same_judgement(digits, plain):
    again = judge(known.undefended(), digits, THREAT, strange=known.strange(), effort=BRIEF, name="plain")
    assert sentence_of(again) == sentence_of(plain)
    assert all(torch.equal(a.size, b.size) for a, b in zip(again.tries, plain.tries, strict=True))


# bad input


def answers(of):
    return lambda x: of(known.undefended()(x))


@pytest.mark.parametrize("thing, why", [
    ("a name", "cannot be called"),
    (answers(lambda z: (z, z)), "a tuple of 2"),
    (answers(lambda z: z[:, :7]), r"expected floating-point logits \(8, 10\)"),
    (answers(lambda z: z.argmax(1)), r"expected floating-point logits \(8, 10\)"),
    (answers(lambda z: z * torch.nan), "NaN or infinite logits for 8 of 8"),
    (answers(lambda z: z @ torch.ones(3, 3)), "it raised RuntimeError"),
    (answers(lambda z: Verdict(z.argmax(1), z.amax(1), z.amax(1))), "the verdict's flagged is a tensor"),
    (answers(lambda z: Verdict(z.argmax(1), z.amax(1) > 9, z.amax(1) * torch.nan)), "score is NaN"),
    (nn.Linear(4, 4, device="meta"), "weights are on meta, the images on cpu"),
])  # fmt: skip
def test_what_cannot_be_judged_ends_in_one_sentence(digits, thing, why):
    with pytest.raises(DefenceError, match=why):
        judge(thing, digits, THREAT, effort=BRIEF)


def test_images_out_of_range_none_at_all_and_no_radius(digits):
    bright = Dataset("bright", "test", digits.images() * 255, digits.y, digits.classes)
    with pytest.raises(DefenceError, match=r"expected \[0, 1\]"):
        judge(known.undefended(), bright, THREAT)
    with pytest.raises(DefenceError, match="no images"):
        judge(known.undefended(), digits.take(slice(0, 0)), THREAT)
    for eps in (0, 8, -1, float("nan")):
        with pytest.raises(ValueError):
            Threat(eps)


def test_a_rejecter_needs_held_out_images(digits):
    with pytest.raises(DefenceError, match="give held_out"):
        judge(known.unsure(), digits, THREAT, effort=BRIEF)


class Drifting(nn.Module):
    "Changes a buffer at every call."

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.network(x)


class RejectsAll(nn.Module):
    def forward(self, x):
        n = len(x)
        return Verdict(torch.zeros(n).long(), torch.ones(n).bool(), torch.ones(n))


class Centred(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) + 100 * nn.functional.one_hot(torch.tensor(len(x) % 10), 10)


@pytest.mark.parametrize("make, check", [
    (lambda: answers(lambda z: z.softmax(1)), "logits"),
    (lambda: Drifting(known.undefended()), "weights stay the same"),
    (RejectsAll, "answers clean images"),
    (lambda: Centred(known.undefended()), "batch composition"),
    (lambda: lambda x: known.undefended()((x / 255).clamp(0, 1)), "answers clean images"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:the model's answers")
def test_what_makes_the_numbers_worthless_fails_a_check_by_name(digits, held_out, make, check):
    found = judge(make(), digits.take(slice(0, 12)), THREAT, held_out=held_out, effort=BRIEF)
    assert states(found)[check] == "fail", found.checks


def test_pixels_from_0_to_255_are_named(digits):
    found = judge(lambda x: known.undefended()((x / 255).clamp(0, 1)), digits, THREAT, effort=BRIEF)
    (text,) = [c.text for c in found.checks if c.name == "answers clean images"]
    assert "with pixels from 0 to 255" in text


# small pieces


def test_a_threshold_never_rejects_more_than_its_share():
    for scores in (torch.rand(97), torch.zeros(20), torch.tensor([1.0, 1.0, 0.0])):
        for share in (0.0, 0.05, 0.1, 0.5):
            assert (scores > threshold_at(scores, share)).float().mean() <= share


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_harmless_changes_have_the_norm_of_the_threat(digits, norm):
    from afgstudy.attacks.base import ImageNoise
    from afgstudy.attacks.gradient import norms

    threat, x = Threat(0.3, norm), digits.images()
    for change in HARMLESS.values():
        changed = scaled_to(x, change(x, ImageNoise(torch.arange(len(x)))), threat)
        assert (norms(changed - x, norm) <= 0.3 + 1e-5).all() and not torch.equal(changed, x)


def test_more_images_see_smaller_differences():
    assert smallest_difference(torch.arange(400) < 200) < smallest_difference(torch.arange(100) < 50) < 0.2


def test_a_budget_gives_more_images_or_says_what_it_needs(digits):
    subject = subject_of(known.undefended(), digits.images(slice(0, 8)), 10)
    assert plan_for(1e6, subject, digits)[1] == len(digits)
    for minutes in (1e-9, 0.0, float("nan")):
        with pytest.raises(DefenceError, match="minutes"):
            plan_for(minutes, subject, digits)


FILES = {
    "fine": "from afgstudy.judge.specimens import undefended as make",
    "raises": "def make():\n    raise OSError('no weights here')",
    "broken": "def make(:\n",
    "nothing": "def make():\n    pass",
    "other": "def build():\n    return 1",
}


@pytest.mark.parametrize("name, why", [
    ("raises", r"make\(\) raised OSError: no weights here"),
    ("broken", "broken.py cannot be imported: SyntaxError"),
    ("nothing", r"make\(\) returned None"),
    ("other", "other.py has no function 'make'"),
    ("missing", "there is no file 'missing.py'"),
])  # fmt: skip
def test_a_factory_that_does_not_work_is_one_line_on_the_command_line(tmp_path, name, why):
    if name in FILES:
        (tmp_path / f"{name}.py").write_text(FILES[name])
    factory = f"{tmp_path / name}.py:make"
    with pytest.raises(DefenceError, match=why):
        made_by(factory)
    ran = CliRunner().invoke(main, ["judge", factory, "--dataset", "digits", "--eps", "0.1"])
    assert ran.exit_code == 1 and "Traceback" not in ran.output and ran.output.startswith("Error: ")


def test_a_file_is_judged_from_the_command_line_and_leaves_a_record(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILES["fine"])
    monkeypatch.setenv("AFGSTUDY_RUNS", str(tmp_path / "runs"))
    command = ["judge", f"{tmp_path}/mine.py:make", "--dataset", "digits", "--eps", "0.1", "--budget", "0", "-n", "8"]
    ran = CliRunner().invoke(main, command)
    assert ran.exit_code == 0, ran.output
    assert "On 8 test images of digits within L-infinity eps 0.1" in ran.output
    again = CliRunner().invoke(main, command)
    assert "finished earlier" in again.output
    (tmp_path / "mine.py").write_text(FILES["fine"] + "  # another file\n")
    eps = CliRunner().invoke(main, [*command[:5], "8"])
    assert eps.exit_code == 1


def test_a_file_of_weights_is_judged_by_a_function_and_its_path(tmp_path, monkeypatch, digits):
    from safetensors.torch import save_file

    (tmp_path / "theirs.py").write_text(
        "from afgstudy.models import create\n"
        "from safetensors.torch import load_file\n"
        "def load(path):\n"
        "    net = create('lenet5', classes=10, channels=1, size=28, seed=0)\n"
        "    net.load_state_dict(load_file(path))\n"
        "    return net.eval()\n"
    )
    weights = tmp_path / "theirs.safetensors"
    save_file(known.undefended().state_dict(), weights)
    monkeypatch.setenv("AFGSTUDY_RUNS", str(tmp_path / "runs"))
    command = ["judge", f"{tmp_path}/theirs.py:load={weights}", "--dataset", "digits", "--eps", "0.1", "--budget", "0"]
    ran = CliRunner().invoke(main, [*command, "-n", "8"])
    assert ran.exit_code == 0, ran.output
    assert "On 8 test images of digits" in ran.output
    weights.write_bytes(b"no tensors")
    broken = CliRunner().invoke(main, [*command, "-n", "8"])
    assert broken.exit_code == 1 and "raised" in broken.output and "Traceback" not in broken.output


def test_a_file_that_names_its_network_is_judged_by_its_path_alone(tmp_path, monkeypatch):
    from afgstudy.judge.strangers import FOREIGN
    from afgstudy.weights import ADVERTORCH, safetensors_bytes

    theirs = FOREIGN["advertorch_lenet5"]()
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(safetensors_bytes(theirs.state_dict(), ADVERTORCH[0].header))
    monkeypatch.setenv("AFGSTUDY_RUNS", str(tmp_path / "runs"))
    command = ["judge", str(file), "--dataset", "digits", "--eps", "0.1", "--budget", "0", "-n", "8"]
    ran = CliRunner().invoke(main, command)
    assert ran.exit_code == 0, ran.output
    assert "On 8 test images of digits" in ran.output
    smaller = {k: v[:5] if k.startswith("linear2") else v for k, v in theirs.state_dict().items()}
    for content, why in {
        safetensors_bytes(theirs.state_dict(), {}): "does not say which network",
        safetensors_bytes(smaller, ADVERTORCH[0].header): "do not fit",
        b"no tensors": "not a whole safetensors file",
    }.items():
        file.write_bytes(content)
        broken = CliRunner().invoke(main, command)
        assert broken.exit_code == 1 and why in broken.output and "Traceback" not in broken.output, broken.output
    file.unlink()
    assert "theirs.safetensors" in CliRunner().invoke(main, command).output


def test_a_published_defence_is_judged_by_its_name(monkeypatch):
    import afgstudy.hub

    monkeypatch.setattr(afgstudy.hub, "load_defence", {"digits-net": known.undefended()}.__getitem__)
    assert isinstance(made_by("afgstudy.hub:load_defence=digits-net"), nn.Module)
    with pytest.raises(DefenceError, match="KeyError"):
        made_by("afgstudy.hub:load_defence=nothing")
