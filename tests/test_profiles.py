"""Scores and profiles, on numbers that can be ranked by eye."""

import numpy as np
import pytest

from lens_utils import profiles
from lens_utils.errors import BadInput

STS = np.array([0.10, 0.40, 0.30, 0.40])
RTR = np.array([0.05, 0.10, 0.20, 0.30])
LAYER = np.array([0, 0, 1, 1])


def test_scores_by_hand():
    # differences 0.05 0.30 0.10 0.10; ranks of STS 1 3.5 2 3.5, of RTR 1 2 3 4
    rounded = np.round(STS - RTR, 12)
    assert profiles.head_scores(rounded, np.zeros(4)).tolist() == [1, 4, 2.5, 2.5]
    assert profiles.head_scores(STS, RTR, "rank_diff").tolist() == [0, 1.5, -1, -0.5]
    assert profiles.head_scores(STS, RTR, "balance") == pytest.approx([2 / 3, 0.8, 0.6, 4 / 7])


def test_balance_of_nothing_and_of_less_than_nothing():
    found = profiles.head_scores(np.array([0.0, -0.1, 0.2]), np.array([0.0, 0.1, -0.1]), "balance")
    assert np.isnan(found[0]) and found[1:].tolist() == [0, 1]


def test_heads_without_a_value_are_left_out():
    sts = np.array([0.3, np.nan, 0.1, 0.2])
    for score in profiles.SCORES:
        found = profiles.head_scores(sts, np.zeros(4), score)
        assert np.isnan(found).tolist() == [False, True, False, False]
    ranks = profiles.head_scores(sts, np.zeros(4))
    assert ranks[[0, 2, 3]].tolist() == [3, 1, 2]
    assert profiles.head_shares(ranks)[[0, 2, 3]].tolist() == [1, 0, 0.5]
    assert profiles.layer_profile(ranks, LAYER).tolist() == [3, 1.5]
    empty = profiles.layer_profile(np.array([np.nan, np.nan, 1.0, 2.0]), LAYER)
    assert np.isnan(empty[0]) and empty[1] == 1.5


def test_profiles_by_hand():
    score = np.array([1.0, 3.0, 10.0, 20.0, 4.0, 4.0])
    layer = np.array([2, 2, 5, 5, 7, 7])  # layers need not be consecutive
    assert profiles.layer_profile(score, layer).tolist() == [2, 15, 4]
    assert profiles.layer_profile(score, layer, "percentile").tolist() == [0, 1, 0.5]
    assert profiles.layer_profile(score, layer, "minmax") == pytest.approx([0, 1, 2 / 13])
    flat = profiles.layer_profile(np.ones(6), layer, "minmax")
    assert flat.tolist() == [0, 0, 0]


def test_thirds_and_hump():
    profile = np.array([[0.0, 0.2, 0.8, 1.0, 0.5, 0.3], [1.0, 1.0, 0.0, 0.0, 0.5, 0.5]])
    assert profiles.thirds(profile) == pytest.approx(np.array([[0.1, 0.9, 0.4], [1, 0, 0.5]]))
    assert profiles.hump(profile) == pytest.approx([0.5, -1])


def test_leading_axes_are_rows_of_their_own():
    rng = np.random.default_rng(0)
    sts, rtr, layer = rng.random((5, 12)), rng.random((5, 12)), np.repeat(np.arange(4), 3)
    for score in profiles.SCORES:
        together = profiles.head_scores(sts, rtr, score)
        for i in range(5):
            assert together[i] == pytest.approx(profiles.head_scores(sts[i], rtr[i], score))
        for mode in profiles.MODES:
            many = profiles.layer_profile(together, layer, mode)
            for i in range(5):
                assert many[i] == pytest.approx(profiles.layer_profile(together[i], layer, mode))


def test_unknown_names_are_refused():
    with pytest.raises(BadInput, match="no score 'synergy': there are value_diff"):
        profiles.head_scores(STS, RTR, "synergy")
    with pytest.raises(BadInput, match="no profile mode 'rank'"):
        profiles.layer_profile(STS, LAYER, "rank")
    with pytest.raises(BadInput, match="2 layers"):
        profiles.hump(np.zeros(2))


def test_means_leave_out_what_is_missing():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [8.0, 4.0]])
    assert profiles.over_prompts(values).tolist() == [4, 4]
    weights = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    assert profiles.over_prompts(values, weights)[0, 0] == pytest.approx(5 / 3)
    assert (
        np.isnan(profiles.over_prompts(values, weights)[0, 1])
        and profiles.over_prompts(values, weights)[1, 1] == 4
    )


def test_resampled_profiles_lie_around_the_profile():
    """The spread of a mean over prompts is known: sd / sqrt(n)."""
    rng = np.random.default_rng(0)
    atoms = np.arange(8.0) + rng.standard_normal((400, 8))
    weights = profiles.resamples(400, 2000, 0)
    assert weights.shape == (2000, 400) and (weights.sum(1) == 400).all()
    low, high = profiles.interval(atoms.mean(0), profiles.over_prompts(atoms, weights))
    np.testing.assert_allclose(high - low, 2 * 1.96 / 20, rtol=0.15)
    assert profiles.shares_over_prompts(atoms, 0 * atoms).tolist() == [k / 7 for k in range(8)]
    drawn = profiles.shares_over_prompts(atoms, 0 * atoms, "rank_diff", weights[:3])
    assert drawn.shape == (3, 8)
