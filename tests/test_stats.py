"Properties of the comparison that is looked at while it grows."

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afgstudy.stats import at_look, look_levels, mean_over_seeds

plans = st.lists(st.integers(2, 60), min_size=1, max_size=3, unique=True).map(sorted)


@settings(deadline=None, max_examples=25)
@given(plans, st.sampled_from([0.01, 0.05, 0.1]))
def test_early_looks_need_more_evidence_and_none_spends_more_than_all(looks, alpha):
    levels = look_levels(looks, alpha)
    assert all(a <= b for a, b in pairwise(levels))
    assert levels[-1] <= alpha + 1e-3
    assert (
        sum(levels) >= alpha - 1e-3
    )  # Bonferroni: the levels together cannot be wrong less often than the union


@settings(deadline=None, max_examples=25)
@given(plans, st.lists(st.floats(-5, 5), min_size=2, max_size=70))
def test_a_look_uses_the_pairs_of_its_plan_and_no_others(looks, differences):
    look = at_look(differences, looks)
    reached = [pairs for pairs in looks if pairs <= len(differences)]
    if not reached:
        assert look is None
        return
    assert look.estimate.n == reached[-1] and look.final == (reached[-1] == looks[-1])
    plain = mean_over_seeds(differences[: reached[-1]])
    assert look.estimate.value == plain.value
    if not look.final:
        assert look.estimate.high >= plain.high  # the price of looking early


def test_a_repeated_interval_keeps_its_promise():
    drawn = np.random.default_rng(3).standard_normal((400, 12))
    looks = [[at_look(row[:n], [5, 8, 12]).estimate for n in (5, 8, 12)] for row in drawn]
    missed = np.mean([any(e.low > 0 or e.high < 0 for e in row) for row in looks])
    assert missed < 0.09  # 5% promised, 400 draws


@pytest.mark.parametrize("looks", [[1, 2], [5, 5], [8, 3]])
def test_a_plan_that_does_not_grow_is_refused(looks):
    with pytest.raises(ValueError, match="growing numbers of pairs"):
        look_levels(looks)
