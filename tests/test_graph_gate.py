"""The gate, on effects whose agreement is known."""

import numpy as np
import pytest
from scipy import stats

from lens_utils import graph_gate


def test_agreement_by_hand():
    """Two prompts: one in perfect agreement at a scale of a hundred, one in perfect discord."""
    predicted = np.array([1.0, 2.0, 4.0, 1.0, 2.0, 4.0])
    measured = np.array([100.0, 200.0, 400.0, -0.5, -1.0, -2.0])
    prompt = np.array(["a", "a", "a", "b", "b", "b"])
    found = graph_gate.agreement(predicted, measured, prompt)
    assert [found.r, found.median, found.rho] == pytest.approx([0, 0, 0])
    assert (found.low, found.high) == (pytest.approx(-1), pytest.approx(1))
    assert found.pooled == pytest.approx(stats.pearsonr(predicted, measured).statistic)
    assert found.sign == 0.5 and (found.n_features, found.n_prompts) == (6, 2)
    assert found.slope == pytest.approx((2100 - 10.5) / 42)


def test_agreement_of_noise_and_of_truth():
    rng = np.random.default_rng(0)
    truth, prompt = rng.normal(size=600), np.repeat(np.arange(30), 20)
    good = graph_gate.agreement(truth, 2 * truth + rng.normal(size=600), prompt)
    assert good.r == pytest.approx(2 / 5**0.5, abs=0.05)
    assert good.low < good.r < good.high < good.low + 0.15
    assert good.slope == pytest.approx(2, abs=0.1)
    anew = graph_gate.dealt_anew(truth, prompt, seed=1)
    assert abs(graph_gate.agreement(anew, truth, prompt).r) < 0.1
    for name in range(30):
        mine = prompt == name
        assert sorted(anew[mine]) == sorted(truth[mine]) and (anew[mine] != truth[mine]).any()


def test_agreement_where_nothing_varies():
    found = graph_gate.agreement(np.ones(4), np.arange(4.0), np.array(["a"] * 4))
    assert np.isnan(found.r) and np.isnan(found.pooled) and found.sign == 0.75


def test_matched_features_are_of_the_layer_and_of_like_activation():
    rng = np.random.default_rng(0)
    places = np.stack([np.repeat(np.arange(3), 40), np.arange(120), np.arange(120)], axis=1)
    activations = rng.uniform(0.1, 10, 120)
    taken = np.array([0, 5, 50, 90, 91])
    found = graph_gate.matched(places, activations, taken)
    assert len(set(found)) == 5 and not set(found) & set(taken)
    assert (places[found, 0] == places[taken, 0]).all()
    # Among the five nearest of some 38 that are drawn evenly over two decades.
    assert np.abs(np.log(activations[found] / activations[taken])).max() < 1
    lonely = graph_gate.matched(places[:2], activations[:2], np.array([0, 1]))
    assert len(lonely) == 0


def test_the_verdict_needs_every_condition():
    rng = np.random.default_rng(0)
    truth, prompt = rng.normal(size=600), np.repeat(np.arange(30), 20)
    measured = truth + 0.2 * rng.normal(size=600)
    good = graph_gate.agreement(truth, measured, prompt)
    chance = graph_gate.agreement(graph_gate.dealt_anew(truth, prompt), measured, prompt)
    assert graph_gate.verdict(good, chance, 1.0, 0.8)["verdict"] == "causal"
    few = graph_gate.agreement(truth[:200], measured[:200], prompt[:200])
    for wrong in ((chance, chance, 1.0, 0.8), (good, good, 1.0, 0.8), (good, chance, 11.0, 0.8),
                  (good, chance, 1.0, 0.99), (few, chance, 1.0, 0.8)):  # fmt: skip
        said = graph_gate.verdict(*wrong)
        assert said["verdict"] == "not causal" and not all(said["conditions"].values())
