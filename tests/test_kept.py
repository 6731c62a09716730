"""The keeper: what is described alike is made once; what is described otherwise is something else."""

from dataclasses import replace
from functools import partial
from threading import Thread

import pytest
import torch

from afgstudy.attacks import FGSM
from afgstudy.attacks.universal import FittedUniversal
from afgstudy.data import load
from afgstudy.kept import attacked, fitted, judged, make_once, trained
from afgstudy.models import create
from afgstudy.store import NOWHERE, Store
from afgstudy.training import Madry, Recipe

QUICK = Recipe(epochs=1, batch_size=64)


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train", n=60)


class Spy(Store):
    "A store that remembers what it was asked."

    def get(self, kind, spec, build, code=()):
        self.asked = [*getattr(self, "asked", []), (kind, spec, code)]
        return super().get(kind, spec, build, code)


def test_four_threads_that_ask_for_the_same_make_it_once(tmp_path):
    made = []

    def build(scratch):
        made.append(scratch)
        return {"x": torch.arange(3)}

    asks = [Thread(target=make_once, args=("demo", {"n": 3}, build, (), Store(tmp_path))) for _ in range(4)]
    for ask in asks:
        ask.start()
    for ask in asks:
        ask.join()
    assert len(made) == 1


def test_a_call_is_described_by_its_function_and_all_its_arguments(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    calls = [partial(torch.sum, x, dim=0), partial(torch.sum, x, dim=1), partial(torch.sum, x + 1, dim=0)]
    calls.append(partial(torch.mean, x, dim=0))
    keys = {make_once("demo", call, store=NOWHERE).key for call in calls}
    assert len(keys) == len(calls)
    assert make_once("demo", partial(torch.sum, x.clone(), dim=0), store=NOWHERE).key in keys


def test_nowhere_gives_what_a_store_gives_and_leaves_no_file(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("AFGSTUDY_RUNS", str(tmp_path / "runs"))
    kept = trained("lenet5", digits, recipe=QUICK, store=Store(tmp_path / "store"))
    made = trained("lenet5", digits, recipe=QUICK, store=NOWHERE)
    assert made.artifact.key == kept.artifact.key and made.history[0]["loss"] == kept.history[0]["loss"]
    assert all(v.equal(made.model.state_dict()[k]) for k, v in kept.model.state_dict().items())
    assert not (tmp_path / "runs").exists() and NOWHERE.ls() == []
    with pytest.raises(KeyError, match="no artifacts"):
        NOWHERE.remove(made.artifact.key)


def test_the_key_of_a_trained_network_has_these_ingredients(tmp_path, digits):
    "One more or one fewer would void every network that was trained before."
    spy = Spy(tmp_path)
    trained("lenet5", digits, Madry(), FGSM(eps=0.1), QUICK, store=spy)
    ((kind, spec, code),) = spy.asked
    names = "attack data initial keep layers network objective options recipe validation".split()
    assert kind == "model" and sorted(spec) == names
    assert [getattr(c, "__name__", type(c).__name__) for c in code] == ["fit", "Classifier", "Madry", "FGSM"]


def test_a_network_of_ones_own_is_kept_like_one_of_the_registry(tmp_path, digits):
    store = Store(tmp_path)
    new = partial(create, "lenet5", channels=1, size=28, seed=0)
    first = fitted(new(), digits, recipe=QUICK, store=store)
    state = {k: v.clone() for k, v in first.model.state_dict().items()}
    again = fitted(new(), digits, recipe=QUICK, store=store)
    assert first.artifact.key == again.artifact.key and not again.model.training
    assert all(v.equal(state[k]) for k, v in again.model.state_dict().items())
    further = fitted(first.model, digits, recipe=QUICK, store=store)
    assert further.artifact.key != first.artifact.key, "other weights to start from"
    assert len(store.ls()) == 2


def test_attacked_sets_tell_models_data_seeds_and_perturbations_apart(tmp_path, digits):
    model, other = (create("lenet5", channels=1, size=28, seed=s).eval() for s in (0, 1))
    few, store = digits.subset(4), Store(tmp_path)
    universal = [FittedUniversal(torch.full((1, 28, 28), c), 0.1, "linf", ()) for c in (0.05, 0.1)]
    made = [attacked(a, m, d, s, store=store) for a, m, d, s in (
        (FGSM(eps=0.1), model, few, 0), (FGSM(eps=0.1), other, few, 0), (FGSM(eps=0.1), model, digits.subset(5), 0),
        (FGSM(eps=0.1), model, few, 1), (universal[0], model, few, 0), (universal[1], model, few, 0),
    )]  # fmt: skip
    assert len({m.artifact.key for m in made}) == len(made) == len(store.ls())
    again = attacked(replace(FGSM(eps=0.1)), model, few, 0, store=store)
    assert again.x.equal(made[0].x) and again.x.dtype == torch.float32 and again.x.shape == few.images().shape


def test_judging_needs_the_network_only_for_a_new_question(tmp_path, digits):
    from afgstudy.attacks.evaluate import survives

    store = Store(tmp_path)
    net = trained("lenet5", digits, recipe=QUICK, store=store)
    first = judged(survives, net, digits, FGSM(eps=0.1), store=store)
    broken = net._replace(model=None)
    assert judged(survives, broken, digits, FGSM(eps=0.1), store=store).equal(first)
    for question in (dict(attack=FGSM(eps=0.2)), dict(attack=FGSM(eps=0.1), seed=1), dict(attack=None)):
        with pytest.raises((TypeError, AttributeError, ValueError)):
            judged(survives, broken, digits, store=store, **question)
