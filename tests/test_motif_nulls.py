"""Nulls of circuits: what they keep, whether they mix, and whether what they say is true."""

import itertools

import networkx as nx
import numpy as np
import pytest
from scipy import stats
from test_motifs import chain, circuit

from lens_utils import motif_nulls, motifs
from lens_utils.errors import BadInput

EDGES_MOVE = motif_nulls.SWAPS


def first(one: motifs.Circuit, null: str, seed=0, rounds=10.0) -> motif_nulls.Null:
    return next(motif_nulls.nulls(one, null, 1, rounds, seed))


def between(weights: np.ndarray, place: np.ndarray, sign: int) -> np.ndarray:
    """Edges of a sign from each place to each place."""
    member = np.eye(place.max() + 1)[place]
    return member.T @ (np.sign(weights) == sign) @ member


def cells(one: motifs.Circuit) -> np.ndarray:
    return 10 * (one.layer + 1) + one.pos


def lopsided(seed=0) -> motifs.Circuit:
    """Signs and climbs as in real graphs: signs lean by layer, the last layer cannot be reached
    from the layer below at an earlier position."""
    one = circuit(nodes=40, density=0.35, seed=seed)
    climb = np.where(one.layer == one.layer.max(), 2, 1)
    weights = np.where(one.layer[:, None] == one.layer.max(), np.abs(one.weights), one.weights)
    weights *= motifs.Circuit(np.zeros_like(weights), one.layer, one.pos, climb).possible
    return motifs.Circuit(weights, one.layer, one.pos, climb)


# What nulls keep


@pytest.mark.parametrize("null", EDGES_MOVE)
def test_swaps_keep_degrees_and_signs_and_causality(null):
    one = lopsided()
    for found in motif_nulls.nulls(one, null, 5):
        new = found.circuit.weights
        for sign, axis in itertools.product((1, -1), (0, 1)):
            kept = (np.sign(new) == sign).sum(axis) == (np.sign(one.weights) == sign).sum(axis)
            assert kept.all()
        assert np.array_equal(np.sort(new[new != 0]), np.sort(one.weights[one.weights != 0]))
        rise = one.layer[:, None] - one.layer  # written out anew: nothing of the library's own rule
        later = one.pos[:, None] - one.pos
        edges = new != 0
        assert (rise[edges] > 0).all() and (later[edges] >= 0).all()
        to_last = edges & (one.layer == one.layer.max())[:, None] & (later > 0)
        assert to_last.any() and (rise[to_last] >= 2).all()
        assert found.moved > 0.1 and 0 < found.accepted <= found.attempts == 10 * edges.sum()
        old = np.argwhere(one.weights)
        gone = [np.sign(new[t, s]) != np.sign(one.weights[t, s]) for t, s in old]
        assert found.moved == pytest.approx(np.mean(gone))


def test_each_null_keeps_the_numbers_that_it_names():
    one = lopsided()
    places = {"cells": cells(one), "layers": one.layer + 1}
    for null, (name, place), sign in itertools.product(EDGES_MOVE, places.items(), (1, -1)):
        new = first(one, null).circuit.weights
        same = (between(new, place, sign) == between(one.weights, place, sign)).all()
        keeps = EDGES_MOVE.index(null) <= EDGES_MOVE.index(name)
        assert same == keeps, (null, name)


def test_freer_nulls_move_more():
    one = circuit(nodes=60, density=0.3, layers=5, positions=4)
    moved = [first(one, null, rounds=30).moved for null in EDGES_MOVE]
    assert moved[0] < moved[1] and moved[0] < moved[2]


@pytest.mark.parametrize("null", ["signs", "weights"])
def test_edges_that_stay_get_other_signs_or_weights(null):
    one = lopsided()
    found = first(one, null)
    new, there = found.circuit.weights, one.weights != 0
    assert np.array_equal(new != 0, there) and found.attempts == 0
    if null == "signs":
        assert np.array_equal(np.abs(new), np.abs(one.weights))
        for sign in (1, -1):
            assert (between(new, one.layer + 1, sign)
                    == between(one.weights, one.layer + 1, sign)).all()  # fmt: skip
        assert 0.2 < found.moved < 0.6
    else:
        assert np.array_equal(np.sort(new[there]), np.sort(one.weights[there]))
        assert found.moved > 0.9
    assert found.moved == (new != one.weights)[there].mean()


def test_seeds():
    one = circuit()
    for null in motif_nulls.NULLS:
        a, b, c = (first(one, null, seed).circuit.weights for seed in (1, 1, 2))
        assert np.array_equal(a, b) and not np.array_equal(a, c)


# Mixing


@pytest.mark.parametrize("null", EDGES_MOVE)
def test_more_swaps_move_more_until_they_have_mixed(null):
    table = motif_nulls.mixing(circuit(nodes=50, density=0.3), null, (0.1, 0.5, 20, 200))
    moved = table["moved"].to_numpy()
    assert moved[0] < moved[1] < moved[2] and moved[3] == pytest.approx(moved[2], abs=0.1)
    edges = (circuit(nodes=50, density=0.3).weights != 0).sum()
    assert table["attempts"].tolist() == [round(r * edges) for r in (0.1, 0.5, 20, 200)]


def test_all_graphs_of_the_same_degrees_are_equally_likely():
    """Three sources, three targets, two edges each: 6 bipartite graphs, drawn as often as chance
    allows (chi-squared), however the swaps are proposed."""
    edges = {(0, 3), (0, 4), (1, 4), (1, 5), (2, 5), (2, 3)}
    weights = np.zeros((6, 6))
    for s, t in edges:
        weights[t, s] = 1.0
    one = motifs.Circuit(weights, np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, int))
    drawn = [found.circuit.weights.tobytes() for found in motif_nulls.nulls(one, "cells", 900, 6)]
    _, counts = np.unique(drawn, return_counts=True)
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3


# What they say


def planted(seed=0) -> motifs.Circuit:
    """A sparse random circuit with loops put into it: a chain's ends joined, thirty times."""
    one = circuit(nodes=90, density=0.03, seed=seed, layers=8, positions=3)
    rng = np.random.default_rng(seed)
    weights = one.weights.copy()
    chains = np.argwhere(one.possible[:, :, None] & one.possible[None])  # target, middle, source
    for t, m, s in rng.choice(chains, 30, replace=False):
        weights[m, s], weights[t, m], weights[t, s] = 1.0, -2.0, 3.0  # I1
    return motifs.Circuit(weights, one.layer, one.pos)


def test_planted_loops_are_found():
    for null in ("layers", "causal"):
        table = motif_nulls.enrichment(planted(), null, 60).set_index("motif")
        assert (table["moved"] > 0.4).all() and (table["count"] == 60).all()
        for name in ("030T", "I1"):
            row = table.loc[name]
            assert row["p"] == pytest.approx(2 / 61) and row["z"] > 4
            assert 1 < row["low"] < row["ratio"] < row["high"] and row["ratio"] > 1.3
        assert table.loc["I1", "ratio"] > table.loc[["C2", "C4", "I2"], "ratio"].max()


@pytest.mark.parametrize("rounds", [0.3, 5])
def test_what_is_random_is_not_found(rounds):
    """z of circuits that are nulls themselves is about N(0, 1), p uniform, even before mixing."""
    z, p = [], []
    for seed in range(25):
        one = circuit(nodes=40, density=0.3, seed=seed)
        random = first(one, "causal", seed + 100, rounds=40).circuit
        table = motif_nulls.enrichment(random, "causal", 40, rounds, seed=seed).set_index("motif")
        z.append(table.loc["030T", "z"])
        p.append(table.loc["030T", "p"])
    assert abs(np.mean(z)) < 0.6 and 0.65 < np.std(z) < 1.45
    assert np.mean(np.array(p) < 0.2) < 0.45 and np.median(p) > 0.2


def test_table_of_enrichment_by_hand():
    found = np.array([5.0, 2.0, 3.0, 0.5])
    drawn = np.array([[1.0, 2, 3, 1], [2, 2, 4, 2], [3, 2, 3, 3]])
    table = motif_nulls._against(found, drawn)
    assert table["expected"].tolist() == pytest.approx([2, 2, 10 / 3, 2])
    assert table["ratio"].tolist() == pytest.approx([2.5, 1, 0.9, 0.25])
    assert table["z"].tolist()[::3] == [3.0, -1.5] and np.isnan(table["z"][1])
    assert table["p"].tolist() == pytest.approx([0.5, np.nan, 1.0, 0.5], nan_ok=True)
    assert table["q"].tolist() == pytest.approx([0.75, np.nan, 1.0, 0.75], nan_ok=True)
    assert table.loc[0, ["low", "high"]].tolist() == pytest.approx([5 / 2.95, 5 / 1.05])


def test_motifs_that_a_null_keeps_say_nothing():
    table = motif_nulls.enrichment(circuit(nodes=40), "signs", 10).set_index("motif")
    fixed = table.loc[["030T", "cascade"]]
    assert (fixed["ratio"] == 1).all() and fixed[["z", "p", "q"]].isna().all(axis=None)
    assert table.loc["C1", ["z", "p", "q"]].notna().all()


def test_a_statistic_of_ones_own():
    """Weights shuffled before the graph is cut: is it the strong edges that form loops?"""
    one = chain({(0, 1): 9.0, (1, 2): 9.0, (0, 2): 9.0, **{(3, t): 0.1 for t in range(4, 30)}}, 30)

    def strong(c: motifs.Circuit) -> dict[str, float]:
        return {"strong loops": motifs.census(c.strongest(0.12).weights)["030T"]}

    (row,) = motif_nulls.enrichment(one, "weights", 50, statistic=strong).to_dict("records")
    assert (row["motif"], row["found"]) == ("strong loops", 1) and row["expected"] < 0.2


def test_bad_requests_are_refused():
    with pytest.raises(BadInput, match="no null 'er'"):
        first(circuit(), "er")
    with pytest.raises(BadInput, match="1 edges cannot be shuffled"):
        first(chain({(0, 1): 1.0}, 3), "causal")
    with pytest.raises(BadInput, match="2 or more nulls"):
        motif_nulls.enrichment(circuit(), "causal", 1)
    with pytest.raises(BadInput, match="2 or more prompts"):
        motif_nulls.compare(np.eye(2), np.array(["a", "b"]), np.array([0, 0]))


# Profiles


def test_profile_by_hand():
    found = motif_nulls.profile(np.array([[3.0, np.nan, -4.0], [np.nan, 0, 0], [0, np.inf, 0]]))
    assert found.tolist() == [[0.6, 0, -0.8], [0, 0, 0], [0, 1, 0]]


def test_one_profile_of_degrees_and_loops_is_always_the_same():
    """Why the profile is of signed loops: the four triads under nulls of equal degrees."""
    one = circuit(nodes=40, density=0.3)
    table = motif_nulls.enrichment(
        one, "causal", 20, statistic=lambda c: motifs.census(c.weights)
    ).set_index("motif")
    z = table.loc[["021D", "021U", "021C", "030T"], "z"].to_numpy()
    assert np.abs(motif_nulls.profile(z)).tolist() == pytest.approx([0.5] * 4)


def noisy(directions: np.ndarray, prompts: int, seed=0, noise=0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = np.repeat(directions, prompts, 0)
    return drawn + noise * rng.standard_normal(drawn.shape)


@pytest.mark.parametrize("paired", [True, False])
def test_groups_that_differ_and_groups_that_do_not(paired):
    directions = np.eye(8)[[0, 0, 1]]
    profiles = motif_nulls.profile(noisy(directions, 12, seed=2))
    group = np.repeat(["base", "reasoning", "small"], 12)
    prompt = np.tile(np.arange(12), 3) + (0 if paired else 100) * np.repeat(np.arange(3), 12)
    table = motif_nulls.compare(profiles, group, prompt, draws=2000).set_index(["one", "other"])
    same, other = table.loc[("base", "reasoning")], table.loc[("base", "small")]
    assert same["p"] > 0.05 and same["cosine"] > 0.8
    assert other["p"] < 0.005 and other["q"] >= other["p"] and abs(other["cosine"]) < 0.5
    assert (table["low"] < table["cosine"]).all() and (table["cosine"] < table["high"]).all()
    assert (table["paired"] == paired).all() and (table["n"] == (12 if paired else 24)).all()
    means = [profiles[group == g].mean(0) for g in ("base", "small")]
    a, b = means
    assert other["cosine"] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert other["distance"] == pytest.approx(np.linalg.norm(a - b))


@pytest.mark.parametrize("paired", [True, False])
def test_p_of_equal_groups_is_uniform(paired):
    group, prompt = np.repeat(["a", "b"], 8), np.arange(16) % (8 if paired else 16)
    p = [
        motif_nulls.compare(noisy(np.eye(4)[[0, 0]], 8, seed), group, prompt, 200)["p"][0]
        for seed in range(100)
    ]
    assert [np.mean(np.array(p) <= level) for level in (0.1, 0.5, 0.9)] == pytest.approx(
        [0.1, 0.5, 0.9], abs=0.13
    )


def test_graphs_of_one_prompt_are_not_independent():
    """Every graph ten times over is no more evidence; only shared prompts are compared."""
    profiles = noisy(np.eye(4)[[0, 1]], 5, noise=1.0)
    group, prompt = np.repeat(["a", "b"], 5), np.tile(np.arange(5), 2)
    once = motif_nulls.compare(profiles, group, prompt, 1000)
    tenfold = motif_nulls.compare(
        np.tile(profiles, (10, 1)), np.tile(group, 10), np.tile(prompt, 10), 1000
    )
    assert tenfold["p"][0] == once["p"][0] and tenfold["low"][0] == pytest.approx(once["low"][0])
    assert once["p"][0] >= 2 / 2**5 * 0.7  # of 32 flips, two are as extreme as the groups
    alone = np.concatenate([profiles, 100 * np.ones((1, 4))])
    more = motif_nulls.compare(alone, np.r_[group, ["a"]], np.r_[prompt, 9], 1000)
    assert more["cosine"][0] == pytest.approx(once["cosine"][0]) and more["n"][0] == 5


def test_prompts_that_both_groups_have_are_compared_with_themselves():
    """However much prompts differ, a group is its own equal; among other prompts it is not."""
    profiles = noisy(np.eye(4)[[0]], 6, noise=2.0)
    twice, group = np.tile(profiles, (2, 1)), np.repeat(["a", "b"], 6)
    paired = motif_nulls.compare(twice, group, np.arange(12) % 6, 500).loc[0]
    assert paired[["cosine", "low", "high", "p"]].tolist() == pytest.approx([1, 1, 1, 1])
    other = motif_nulls.compare(twice, group, np.arange(12), 500).loc[0]
    assert other["low"] < 0.9


def test_swaps_reach_what_networkx_calls_a_dag():
    for null in EDGES_MOVE:
        edges = (first(circuit(), null).circuit.weights != 0).T.astype(int)
        assert nx.is_directed_acyclic_graph(nx.from_numpy_array(edges, create_using=nx.DiGraph))
