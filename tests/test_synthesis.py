"""Synthesis: statistics against SciPy and enumeration, verdicts on made-up numbers."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

import lens_utils.synthesis as synthesis  # the module itself: a test changes a number in it
from lens_utils.stats import Estimate
from lens_utils.synthesis import Curve


def curve(*values: float, wide: float = 0.0) -> Curve:
    value = np.array(values, dtype=float)
    return Curve(value, value - wide, value + wide)


def wave(n_layers: int, at: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """One smooth bump on a circle of layers."""
    angle = 2 * np.pi * (np.arange(n_layers) - at) / n_layers
    return np.exp(np.cos(angle)) + noise * np.random.default_rng(seed).standard_normal(n_layers)


# Curves


def test_correlations_are_scipys_of_the_turned_curves():
    curves = np.random.default_rng(0).integers(0, 6, size=(3, 8)).astype(float)  # with ties
    found = synthesis.correlations(curves)
    for one, other, by in itertools.product(range(3), range(3), range(8)):
        wanted = scipy_stats.spearmanr(curves[one], np.roll(curves[other], by)).statistic
        assert found[one, other, by] == pytest.approx(wanted)


@pytest.mark.parametrize("n_curves", [2, 3])
def test_the_p_of_agreement_is_the_share_of_all_turns(n_curves):
    curves = np.random.default_rng(1).standard_normal((n_curves, 6))
    curves[1] += 2 * curves[0]
    pairs = list(itertools.combinations(range(n_curves), 2))

    def alike(some: np.ndarray) -> float:
        return np.mean([scipy_stats.spearmanr(some[a], some[b]).statistic for a, b in pairs])

    every = [
        alike(np.stack([np.roll(c, by) for c, by in zip(curves, turns, strict=True)]))
        for turns in itertools.product(range(6), repeat=n_curves)
    ]
    found = synthesis.agreement(curves)
    assert found.rho == pytest.approx(alike(curves))
    assert found.p == pytest.approx(np.mean(np.array(every) >= found.rho - 1e-9))
    assert found.floor == pytest.approx(6 ** -(n_curves - 1))


def test_agreement_by_random_turns_is_near_the_exact_one(monkeypatch):
    curves = np.stack([wave(12, at, 0.6, seed) for seed, at in enumerate((2, 3, 5))])
    exact = synthesis.agreement(curves)
    monkeypatch.setattr(synthesis, "MOST_TURNS", 100)
    rough = synthesis.agreement(curves, seed=3)
    assert rough.rho == exact.rho and rough.floor == 1 / 100
    assert rough.p == pytest.approx(exact.p, abs=0.12) and rough.p >= 1 / 100


@pytest.mark.parametrize("n_curves", [2, 3])
def test_the_shift_null_is_calibrated_on_smooth_curves(n_curves):
    """Bumps in random places agree significantly no more often than the level says."""
    rng, times = np.random.default_rng(2), 300
    p = []
    for n in range(times):
        places = rng.uniform(0, 12, n_curves)
        curves = np.stack([wave(12, at, 0.3, 10 * n + k) for k, at in enumerate(places)])
        p.append(synthesis.agreement(curves).p)
    for level in (0.1, 0.3, 0.6):
        spread = math.sqrt(level * (1 - level) / times)
        assert np.mean(np.array(p) <= level) <= level + 3 * spread
        assert np.mean(np.array(p) <= level) >= level - 1 / 12 - 3 * spread, "nor much less often"


def test_smooth_curves_fool_the_test_that_ignores_smoothness():
    """Why the null turns curves: SciPy's own p calls bumps in random places alike far too often."""
    rng, naive = np.random.default_rng(3), []
    for _ in range(200):
        one, other = (wave(24, at) for at in rng.uniform(0, 24, 2))
        naive.append(scipy_stats.spearmanr(one, other, alternative="greater").pvalue < 0.05)
    assert np.mean(naive) > 0.2


def test_curves_without_ranks_have_no_agreement():
    flat = np.stack([wave(6, 2), np.ones(6)])
    assert math.isnan(synthesis.agreement(flat).p)
    assert math.isnan(synthesis.agreement(flat[:1]).p)
    missing = np.stack([wave(6, 2), np.full(6, np.nan)])
    assert math.isnan(synthesis.agreement(missing).rho)


# Lists


@pytest.mark.parametrize(("n", "a", "b"), [(40, 5, 5), (40, 5, 8), (6, 3, 3), (10, 2, 9)])
def test_the_overlap_of_two_lists_is_hypergeometric(n, a, b):
    for shared in range(min(a, b) + 1):
        one, other = list(range(a)), list(range(a - shared, a - shared + b))
        if other[-1] >= n:
            continue
        found = synthesis.overlap([one, other], n)
        assert len(found.shared) == shared
        assert found.p == pytest.approx(scipy_stats.hypergeom.sf(shared - 1, n, a, b))
        assert found.expected == pytest.approx(a * b / n)
        assert found.floor == pytest.approx(scipy_stats.hypergeom.sf(min(a, b) - 1, n, a, b))


def test_the_overlap_of_three_lists_by_enumeration():
    n, sizes = 6, (3, 2, 4)
    drawn = [
        len(set.intersection(*map(set, lists)))
        for lists in itertools.product(*(itertools.combinations(range(n), k) for k in sizes))
    ]
    found = synthesis.overlap([[0, 1, 2], [1, 5], [1, 2, 3, 4]], n)
    assert found.shared == [1]
    assert found.p == pytest.approx(np.mean(np.array(drawn) >= 1))
    assert found.floor == pytest.approx(np.mean(np.array(drawn) >= 2))
    assert found.expected == pytest.approx(np.mean(drawn))


def test_lists_are_never_more_than_half_of_the_layers():
    assert [synthesis.longest(n) for n in (1, 6, 9, 10, 40)] == [1, 3, 4, 5, 5]


# Depth


def test_depth_is_the_centre_of_mass():
    assert synthesis.centre(np.array([0.0, 0, 3, 0])) == pytest.approx(62.5)
    assert synthesis.centre(np.ones(7)) == pytest.approx(50)
    assert synthesis.centre(np.array([1.0, -5, 0, 1])) == pytest.approx(50), "no negative mass"
    both = synthesis.centre(np.array([[1.0, 0], [0, 0]]))
    assert both[0] == pytest.approx(25) and math.isnan(both[1])


def test_depth_has_an_interval_as_wide_as_the_curves():
    sure, unsure = (synthesis.depth(curve(4, 2, 1, 1, wide=w)) for w in (0, 0.5))
    assert sure["low"] == sure["value"] == sure["high"] and sure["n"] == 4
    assert unsure["low"] < unsure["value"] == sure["value"] < unsure["high"]
    # One uncertain layer against a certain one: the normal's quantiles, moved through the centre.
    one = Curve(np.array([1.0, 1.0]), np.array([1.0, 0.8]), np.array([1.0, 1.2]))
    found = synthesis.depth(one)
    wanted = [100 * (0.25 + 0.75 * b) / (1 + b) for b in (0.8, 1.2)]
    assert [found["low"], found["high"]] == pytest.approx(wanted, abs=0.3)
    assert synthesis.depth(curve(0, -1, 0))["n"] == 0


def test_deeper_is_a_mean_over_methods_and_changes_sign():
    early, late = curve(3, 1, 0, 0, wide=0.2), curve(0, 0, 1, 3, wide=0.2)
    there = synthesis.deeper([late, late], [early, early])
    back = synthesis.deeper([early, early], [late, late])
    assert there["value"] == pytest.approx(62.5) == -back["value"] and there["n"] == 2
    assert synthesis.by_interval(there) == "supported"
    assert synthesis.by_interval(back) == "contradicted"
    vague = curve(1, 1, 1, 1.2, wide=0.9)
    assert synthesis.by_interval(synthesis.deeper([vague], [curve(1, 1, 1, 1)])) == "not supported"
    assert synthesis.by_interval(synthesis.deeper([], [])) == "not testable"


def test_intervals_of_depth_hold_what_they_say():
    """Noisy measurements of one curve: nineteen of twenty intervals hold its depth."""
    rng, truth, wide = np.random.default_rng(4), np.array([1.0, 2, 6, 5, 3, 1]), 0.4
    wanted = float(synthesis.centre(truth))
    held = 0
    for n in range(200):
        value = truth + wide * rng.standard_normal(6)
        found = synthesis.depth(Curve(value, value - 1.96 * wide, value + 1.96 * wide), n)
        held += found["low"] <= wanted <= found["high"]
    assert 0.89 <= held / 200 <= 0.99


@pytest.mark.parametrize("truth", [np.zeros(6), np.array([1, 0.2, 0, 0, 0, 0])])
def test_curves_of_one_ability_are_rarely_told_apart(truth):
    """Two noisy measurements of one curve, also of nothing: their gap is seldom above zero."""
    rng, wide, times, told = np.random.default_rng(5), 0.2, 200, 0
    for n in range(times):
        one, other = (truth + wide * rng.standard_normal(6) for _ in range(2))
        curves = [Curve(v, v - 1.96 * wide, v + 1.96 * wide) for v in (one, other)]
        told += synthesis.by_interval(synthesis.deeper(curves[:1], curves[1:], n)) == "supported"
    assert told / times <= 0.025 + 3 * math.sqrt(0.025 / times)


# Verdicts


def test_verdicts_of_a_test():
    assert synthesis.by_p(0.01, 0.001) == "supported"
    assert synthesis.by_p(0.05, 0.05) == "supported"
    assert synthesis.by_p(0.2, 0.001) == "not supported"
    assert synthesis.by_p(0.01, 0.001, alike=-0.5) == "not supported"
    assert synthesis.by_p(1 / 6, 1 / 6) == "not testable", "six layers and two methods"
    assert synthesis.by_p(math.nan, 0.01) == "not testable"


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0.1, 0.5, "supported"), (-0.1, 0.5, "not supported"), (-0.5, -0.1, "contradicted"),
     (0.0, 0.5, "not supported")],
)  # fmt: skip
def test_verdicts_of_an_interval(low, high, wanted):
    found = synthesis.claim("x", "Thinking helps", Estimate(value=0.2, low=low, high=high, n=9))
    assert found.verdict == wanted
    assert found.sentence == f"Thinking helps: {wanted} (0.2 [{low:.3g}, {high:.3g}], n 9)."


def test_a_claim_of_several_parts_needs_them_all():
    assert synthesis.all_of(["supported", "supported"]) == "supported"
    assert synthesis.all_of(["supported", "not supported"]) == "not supported"
    assert synthesis.all_of(["not supported", "not testable"]) == "not testable"
    assert synthesis.all_of(["contradicted", "not testable"]) == "contradicted"
    assert synthesis.all_of([]) == "not testable"


def test_checkpoints():
    inside = synthesis.checkpoint("a", 5, (5, 8), "layers", "few")
    assert inside["status"] == "PASS" and inside["band"] == "5 to 8" and inside["value"] == 5
    assert synthesis.checkpoint("a", 8.1, (5, 8))["status"] == "OUT OF BAND"
    assert synthesis.checkpoint("a", 4.9, (5, 8))["status"] == "OUT OF BAND"
    above = synthesis.checkpoint("a", 2400, (2400, math.inf))
    assert above["status"] == "PASS" and above["band"] == "at least 2400"
    for missing in (None, math.nan):
        assert synthesis.checkpoint("a", missing, (0, 1))["status"] == "NOT TESTABLE"


# Pages


def test_a_report_is_written_as_markdown_and_as_text():
    table = pd.DataFrame({"name": ["a|b", "long name"], "value": [0.123456, math.nan]})
    sections = {"One": ["**Bold** words.", table], "Two": ["More."]}
    md, txt = (write("Title", sections) for write in (synthesis.page, synthesis.plain))
    assert md.startswith("# Title\n\n## One\n\n**Bold** words.\n\n| name | value |\n| --- | --- |")
    assert "| a&#124;b | 0.123 |\n| long name | none |" in md and md.endswith("## Two\n\nMore.\n")
    assert txt.startswith("Title\n=====\n\nOne\n---\n\nBold words.\n\nname       value\n")
    assert "a|b        0.123\nlong name  none\n\nTwo" in txt
