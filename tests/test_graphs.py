"""Graphs against networkx, closed forms and hand-made cases."""

import random

import igraph
import networkx as nx
import numpy as np
import pytest

from lens_utils import graphs
from lens_utils.errors import BadInput


def symmetric(n, seed=0, draw=np.random.Generator.random) -> np.ndarray:
    upper = np.triu(draw(np.random.default_rng(seed), (n, n)), 1)
    return upper + upper.T


def blocks(n=30, parts=3, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Weights that are larger within parts."""
    member = np.arange(n) % parts
    matrix = symmetric(n, seed) + (member[:, None] == member)
    np.fill_diagonal(matrix, 0)
    return matrix, member


def ring(n: int) -> np.ndarray:
    return np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0)


# Efficiency


def slow_efficiency(weights: np.ndarray) -> float:
    net = nx.from_numpy_array(np.divide(1, weights, out=np.zeros_like(weights), where=weights > 0))
    paths = dict(nx.all_pairs_dijkstra_path_length(net, weight="weight"))
    inverse = [1 / d for i, row in paths.items() for j, d in row.items() if i != j]
    return sum(inverse) / (len(weights) * (len(weights) - 1))


@pytest.mark.parametrize("top", [None, 0.6, 0.2, 0.05])  # by Floyd-Warshall, by Dijkstra, in pieces
def test_efficiency_is_that_of_networkx(top):
    weights = graphs.graph(symmetric(25), top).weights
    assert graphs.efficiency(weights) == pytest.approx(slow_efficiency(weights), rel=1e-12)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_efficiency_in_closed_form(weight):
    n = 12
    complete = weight * (1 - np.eye(n))
    assert graphs.efficiency(complete) == pytest.approx(weight)
    around = sum(1 / min(k, n - k) for k in range(1, n)) / (n - 1)
    assert graphs.efficiency(weight * ring(n)) == pytest.approx(weight * around)
    pairs = np.zeros((4, 4))
    pairs[0, 1] = pairs[1, 0] = 2 * weight
    pairs[2, 3] = pairs[3, 2] = 4 * weight
    assert graphs.efficiency(pairs) == pytest.approx(weight)  # 2 (2 + 4) of 12


def test_detours_shorten_what_is_far():
    """1 - 1 - 1 beside a direct edge of 0.1: the way round is 2 long instead of 10."""
    weights = np.array([[0, 1, 0.1], [1, 0, 1], [0.1, 1, 0]])
    assert graphs.efficiency(weights) == pytest.approx((1 + 1 + 0.5) / 3)


# Communities


def test_modularity_is_that_of_networkx():
    weights = symmetric(20)
    communities = np.random.default_rng(1).integers(4, size=20)
    sets = [set(np.flatnonzero(communities == c).tolist()) for c in range(4)]
    wanted = nx.community.modularity(nx.from_numpy_array(weights), sets)
    assert graphs.modularity(weights, communities) == pytest.approx(wanted, abs=1e-12)


def test_louvain_finds_planted_communities():
    weights, member = blocks()
    order = np.random.default_rng(0).permutation(30)
    found = graphs.louvain(weights[np.ix_(order, order)])
    assert len({*zip(found, member[order], strict=True)}) == 3 == found.max() + 1


@pytest.mark.parametrize("top", [None, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_louvain_is_as_good_as_networkx(top, seed):
    """Also where merged communities must move on: more levels than one."""
    hidden = np.random.default_rng(seed).normal(size=(80, 5))
    matrix = np.exp(hidden @ hidden.T / 2) * symmetric(80, seed)
    weights = graphs.graph(matrix, top).weights
    net = nx.from_numpy_array(weights)
    theirs = max(
        nx.community.modularity(net, nx.community.louvain_communities(net, seed=s))
        for s in range(3)
    )
    ours = max(graphs.modularity(weights, graphs.louvain(weights, s)) for s in range(3))
    assert ours > theirs - 0.005


def test_louvain_is_repeatable_and_leaves_lone_nodes_alone():
    weights = graphs.graph(symmetric(40), 0.02).weights
    labels = graphs.louvain(weights, 5)
    assert (labels == graphs.louvain(weights, 5)).all()
    alone = np.flatnonzero(weights.sum(0) == 0)
    assert len(alone) > 0 and (np.bincount(labels)[labels[alone]] == 1).all()
    assert sorted(set(labels)) == list(range(labels.max() + 1))


def test_louvain_leaves_no_trace_and_follows_its_seed():
    """Weights without communities: what is found depends on the order of the nodes."""
    weights = symmetric(60)
    by_seed = [graphs.louvain(weights, seed).tolist() for seed in range(6)]
    random.seed(3)
    before = igraph.Graph.Erdos_Renyi(n=20, p=0.5).get_edgelist()
    random.seed(3)
    again = [graphs.louvain(weights, seed).tolist() for seed in range(6)]
    assert igraph.Graph.Erdos_Renyi(n=20, p=0.5).get_edgelist() == before
    assert again == by_seed and len({tuple(labels) for labels in by_seed}) > 1


def test_giant_component():
    weights = np.zeros((6, 6))
    for i, j in ((0, 1), (1, 2), (3, 4)):
        weights[i, j] = weights[j, i] = 1
    assert graphs.giant(weights) == 0.5


# From a matrix to a graph


def test_the_strongest_share_is_kept():
    matrix = symmetric(20)
    np.fill_diagonal(matrix, 9)
    found = graphs.graph(matrix, 0.1)
    upper = matrix[np.triu_indices(20, 1)]
    kept = found.weights[np.triu_indices(20, 1)]
    assert sorted(kept[kept > 0]) == sorted(upper)[-19:]
    assert (found.edges, found.tied, found.clipped, found.missing) == (19, 0, 0, 0)
    assert (found.weights == found.weights.T).all() and not np.diag(found.weights).any()
    assert graphs.graph(matrix, 1.0).edges == graphs.graph(matrix).edges == 190
    assert graphs.graph(matrix, 1e-9).edges == 1


def test_ties_are_cut_in_row_order():
    """All pairs of five heads are equal: the first five of ten stay."""
    found = graphs.graph(np.ones((5, 5)), 0.5)
    assert (found.edges, found.tied) == (5, 5)
    assert list(zip(*np.nonzero(np.triu(found.weights)), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (0, 4), (1, 2),
    ]  # fmt: skip


def test_weights_without_a_length_are_counted():
    matrix = np.array(
        [
            [np.nan, 2, -1, 0],
            [2, np.nan, np.nan, 3],
            [-1, np.nan, np.nan, -0.5],
            [0, 3, -0.5, np.nan],
        ]
    )
    for top in (None, 1.0):
        found = graphs.graph(matrix, top)
        assert (found.edges, found.clipped, found.missing) == (2, 3, 1)
        assert graphs.measures(found)["giant"] == 0.75
        assert graphs.measures(found)["efficiency"] == pytest.approx(2 * (2 + 3 + 6 / 5) / 12)
    assert graphs.graph(matrix, 0.17).weights.max() == 3


@pytest.mark.parametrize("top", [0, -0.1, 1.01, np.nan])
def test_a_share_is_a_share(top):
    with pytest.raises(BadInput, match="not in"):
        graphs.graph(symmetric(5), float(top))


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (np.triu(symmetric(5)), "symmetric"),
        (-symmetric(5), "no pair has a weight above 0"),
        (np.full((5, 5), np.nan), "no pair has a weight above 0"),
        (np.ones((1, 1)), "2 or more nodes"),
        (np.full((3, 3), np.inf), "infinite"),
    ],
)
def test_what_is_no_graph(matrix, says):
    with pytest.raises(BadInput, match=says):
        graphs.graph(matrix)


# The null


def test_structure_stands_out_from_shuffled_weights():
    found = graphs.against_shuffled(blocks()[0], shuffles=20)
    assert found["modularity"].value > found["modularity"].high + 0.1
    assert found["modularity"].low <= found["modularity"].null <= found["modularity"].high
    # Shuffling keeps the weights: a graph of one weight is its own null.
    same = graphs.against_shuffled(np.ones((8, 8)), shuffles=5)
    assert all(m.value == m.null == m.low == m.high for m in same.values())
    assert same["efficiency_per_weight"].value == pytest.approx(1)


@pytest.mark.parametrize("top", [None, 0.2])
def test_random_weights_do_not_stand_out(top):
    inside = [
        m.low <= m.value <= m.high
        for seed in range(10)
        for name, m in graphs.against_shuffled(symmetric(20, seed), top, 40, seed).items()
        if name in ("efficiency", "modularity")
    ]
    assert np.mean(inside) > 0.8


def test_two_shuffles_are_the_least():
    with pytest.raises(BadInput, match="2 or more shuffles"):
        graphs.against_shuffled(symmetric(5), shuffles=1)
