"""Motifs against networkx, against enumeration, and by hand."""

import itertools
import math
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from safetensors.numpy import load_file

from lens_utils import motifs
from lens_utils.errors import BadInput

TRIADS = ("021D", "021U", "021C", "030T")


def circuit(nodes=24, density=0.5, seed=0, layers=6, positions=3) -> motifs.Circuit:
    """Random weights wherever causality allows an edge."""
    rng = np.random.default_rng(seed)
    layer, pos = rng.integers(-1, layers, nodes), rng.integers(0, positions, nodes)
    empty = motifs.Circuit(np.zeros((nodes, nodes)), layer, pos)
    there = empty.possible & (rng.random((nodes, nodes)) < density)
    return motifs.Circuit(rng.standard_normal((nodes, nodes)) * there, layer, pos)


def chain(edges: dict[tuple[int, int], float], nodes: int) -> motifs.Circuit:
    """Edges (source, target) between nodes that are one layer each, at one position."""
    weights = np.zeros((nodes, nodes))
    for (source, target), weight in edges.items():
        weights[target, source] = weight
    return motifs.Circuit(weights, np.arange(nodes), np.zeros(nodes, int))


def by_networkx(weights: np.ndarray) -> dict[str, int]:
    edges = (weights != 0) & ~np.eye(len(weights), dtype=bool)
    return nx.triadic_census(nx.from_numpy_array(edges.T.astype(int), create_using=nx.DiGraph))


def all_loops(weights: np.ndarray) -> list[tuple[float, int, int, int]]:
    """(strength, source, middle, target) of every loop, found one by one."""
    size = np.abs(weights)
    found = []
    for s, m, t in itertools.permutations(range(len(weights)), 3):
        strength = min(size[m, s], size[t, m], size[t, s])
        if strength > 0:
            found.append((strength, s, m, t))
    return found


# Census


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_census_of_a_circuit_is_that_of_networkx(density, seed):
    weights = circuit(density=density, seed=seed).weights
    expected = by_networkx(weights)
    assert motifs.triads(weights) == expected
    assert expected["030T"] > 0
    found = motifs.census(weights)
    assert {name: found[name] for name in TRIADS} == {name: expected[name] for name in TRIADS}


@pytest.mark.parametrize("density", [0.15, 0.5, 0.85])
def test_census_of_any_digraph_is_that_of_networkx(density):
    """All sixteen triads, with circles and mutual edges; the diagonal is no edge."""
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((22, 22)) * (rng.random((22, 22)) < density)
    assert motifs.triads(weights) == by_networkx(weights)


def test_nothing_in_an_empty_circuit():
    empty = circuit(density=0.0)
    assert motifs.triads(empty.weights)["003"] == math.comb(24, 3)
    assert set(motifs.census(empty.weights).values()) == {0}
    assert motifs.strongest_loops(empty, 3).empty and motifs.strongest_cascades(empty, 3) == []


def test_census_counts_one_of_each_type_by_hand():
    """Eight loops apart from each other, signs from the figure of Mangan & Alon."""
    table = {"C1": "+++", "C2": "-+-", "C3": "+--", "C4": "--+",
             "I1": "+-+", "I2": "---", "I3": "++-", "I4": "-++"}  # fmt: skip
    signs = {"+": 1.0, "-": -1.0}
    for number, (name, (first, second, short)) in enumerate(table.items()):
        x = 3 * number
        edges = {(x, x + 1): signs[first], (x + 1, x + 2): signs[second], (x, x + 2): signs[short]}
        counts = motifs.census(chain(edges, 24).weights)
        assert {k for k, count in counts.items() if count} == {name, "030T"}
        direct, through = signs[short], signs[first] * signs[second]
        assert (direct == through) == name.startswith("C")


def test_signed_loops_by_hand():
    """0 -> 1 -> 2 -> 3 with all shortcuts: four loops, none starting where another ends."""
    edges = {(0, 1): 1.0, (1, 2): -2.0, (2, 3): 3.0, (0, 2): 4.0, (1, 3): -5.0, (0, 3): -6.0}
    counts = motifs.census(chain(edges, 4).weights)
    # 012: + - +, I1. 123: - + -, C2. 013: + - -, C3. 023: + + -, I3.
    assert {k: v for k, v in counts.items() if k in motifs.LOOPS and v} == {
        "C2": 1, "C3": 1, "I1": 1, "I3": 1}  # fmt: skip
    assert (counts["030T"], counts["cascade"]) == (4, 0)


def test_loops_are_all_the_freedom_that_degrees_leave():
    """Two circuits of equal degrees: what 030T gains, 021D, 021U and 021C lose."""
    one = chain({(0, 1): 1, (1, 3): 1, (0, 3): 1, (2, 4): 1}, 5)
    two = chain({(0, 1): 1, (1, 4): 1, (0, 3): 1, (2, 3): 1}, 5)
    for axis in (0, 1):
        assert ((one.weights != 0).sum(axis) == (two.weights != 0).sum(axis)).all()
    before, after = (motifs.census(c.weights) for c in (one, two))
    assert (before["030T"], after["030T"]) == (1, 0)
    assert all(after[name] == before[name] + 1 for name in ("021D", "021U", "021C"))


# Where loops lie


def test_spans_by_hand():
    edges = {(0, 1): 1.0, (1, 2): -1.0, (0, 2): 1.0, (1, 5): 1.0, (0, 5): -1.0}
    table = motifs.spans(chain(edges, 6)).set_index("span")
    assert table.loc[2].to_dict() == dict.fromkeys(motifs.LOOPS, 0) | {"I1": 1}
    assert table.loc[5].to_dict() == dict.fromkeys(motifs.LOOPS, 0) | {"I3": 1}
    assert table.to_numpy().sum() == 2


@pytest.mark.parametrize("top", [1, 7, 60, 10_000])
@pytest.mark.parametrize("levels", [None, 3])  # all weights differ, or most are tied
def test_strongest_loops_are_those_of_enumeration(top, levels):
    one = circuit(density=0.6, seed=3)
    if levels:
        tied = np.sign(one.weights) * np.ceil(np.abs(one.weights) * levels)
        one = motifs.Circuit(tied, one.layer, one.pos)
    expected = sorted(all_loops(one.weights), reverse=True)
    found = motifs.strongest_loops(one, top)
    assert found["strength"].tolist() == [row[0] for row in expected[:top]]
    assert len(found[["source", "middle", "target"]].drop_duplicates()) == len(found)
    assert set(found[["strength", "source", "middle", "target"]].itertuples(index=False, name=None)
               ) <= set(expected)  # fmt: skip
    if top > len(expected):
        types = motifs.census(one.weights)
        assert found["type"].value_counts().to_dict() == {
            k: types[k] for k in motifs.LOOPS if types[k]
        }
        spans = motifs.spans(one).set_index("span").sum(axis=1)
        assert found["span"].value_counts().to_dict() == spans[spans > 0].to_dict()


def test_a_loop_is_described_by_its_nodes():
    weights = np.zeros((4, 4))
    weights[2, 0], weights[3, 2], weights[3, 0] = 2.0, -0.5, 1.0
    one = motifs.Circuit(weights, np.array([0, 0, 3, 4]), np.array([1, 0, 1, 5]))
    (row,) = motifs.strongest_loops(one, 5).to_dict("records")
    assert row == {"source": 0, "middle": 2, "target": 3, "type": "I1", "strength": 0.5,
                   "to_middle": 3, "to_target": 1, "span": 4, "across": 4}  # fmt: skip


def test_cascades_are_those_of_enumeration():
    one = circuit(nodes=14, density=0.7, seed=5, layers=9, positions=1)
    loops = all_loops(one.weights)
    chains = [[loop] for loop in loops]
    found = motifs.strongest_cascades(one, 9)
    counts = motifs.cascades(one.weights, 9)
    for length in range(1, 10):
        assert counts[length - 1] == len(chains)
        if not chains:
            assert len(found) == length - 1 > 1
            break
        best = max(min(loop[0] for loop in row) for row in chains)
        table = found[length - 1]
        assert (len(table), table["strength"].min()) == (length, best)
        assert table["target"].tolist()[:-1] == table["source"].tolist()[1:]
        assert set(table[["strength", "source", "middle", "target"]].itertuples(
            index=False, name=None)) <= set(loops)  # fmt: skip
        chains = [[*row, loop] for row in chains for loop in loops if row[-1][3] == loop[1]]
    assert motifs.census(one.weights)["cascade"] == counts[1]


# Thresholds, places


def test_sweep_keeps_the_strongest_edges():
    one = circuit(density=0.6)
    table = motifs.sweep(one, (0.1, 0.5, 1.0))
    size = np.sort(np.abs(one.weights[one.weights != 0]))[::-1]
    assert table["edges"].tolist() == [round(s * len(size)) for s in (0.1, 0.5, 1.0)]
    assert table["weakest"].tolist() == [size[n - 1] for n in table["edges"]]
    middle = np.where(np.abs(one.weights) >= table["weakest"][1], one.weights, 0)
    assert table["030T"].tolist() == [
        by_networkx(w)["030T"] for w in (one.strongest(0.1).weights, middle, one.weights)
    ]
    tied = motifs.Circuit(np.sign(one.weights), one.layer, one.pos)
    assert (tied.strongest(0.5).weights != 0).sum() == round(0.5 * len(size))
    with pytest.raises(BadInput, match="not in"):
        one.strongest(0.0)


def test_what_is_causally_possible():
    """Embeddings at two positions, features of layers 0 and 1 at both, the logit at the later."""
    layer, pos = np.array([-1, -1, 0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0, 1, 1])
    climb = np.array([1, 1, 1, 1, 1, 1, 2])
    edges = motifs.Circuit(np.zeros((7, 7)), layer, pos, climb).possible
    assert [np.flatnonzero(row).tolist() for row in edges] == [
        [], [], [0], [0, 1], [0, 2], [0, 1, 2, 3], [0, 1, 2, 3, 5]]  # fmt: skip
    parallel = motifs.Circuit(np.zeros((7, 7)), layer, pos, 2).possible
    assert np.flatnonzero(parallel[5]).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("source", "target", "what"), [(1, 0, "layer 1"), (2, 0, "layer 0"), (3, 1, "position 2")]
)
def test_impossible_edges_are_refused(source, target, what):
    layer, pos = np.array([0, 1, 0, 0]), np.array([0, 1, 0, 2])
    weights = np.zeros((4, 4))
    weights[1, 0] = 1.0
    motifs.Circuit(weights, layer, pos)
    weights[target, source] = 1.0
    with pytest.raises(BadInput, match=f"1 edges are causally impossible.*{what}"):
        motifs.Circuit(weights, layer, pos)


def test_bad_circuits_are_refused():
    layer = np.zeros(3, int)
    with pytest.raises(BadInput, match="one of each per node"):
        motifs.Circuit(np.zeros((4, 4)), layer, layer)
    with pytest.raises(BadInput, match="not finite"):
        motifs.Circuit(np.full((3, 3), np.nan), layer, layer)


def test_part_of_a_circuit():
    one = circuit()
    kept = one.layer != 2
    part = one.at(kept)
    assert (part.weights == one.weights[np.ix_(kept, kept)]).all() and 2 not in part.layer
    assert len(part.pos) == len(part.climb) == kept.sum()


@pytest.mark.parametrize("name", ["plain/all", "plain/greedy"])
def test_a_recorded_graph_has_the_edges_that_are_possible(name):
    """All of them, and no other: circuit-tracer's graph of two layers and eight positions."""
    graph = load_file(Path(__file__).parent / "fixtures/circuit_tracer/graphs.safetensors")
    edges, features = graph[f"{name}/adjacency"], graph[f"{name}/features"]
    logits = len(graph[f"{name}/logit_ids"])
    layer = np.r_[features[:, 0], np.repeat([0, 1], 8), np.full(8, -1), np.full(logits, 2)]
    pos = np.r_[features[:, 1], np.tile(np.arange(8), 3), np.full(logits, 7)]
    climb = np.where(layer == 2, 2, 1)
    one = motifs.Circuit(edges, layer, pos, climb)
    entered = np.r_[: len(features), -logits:0]
    constant = one.pos == 0  # circuit-tracer's errors at the first position are 0
    possible = one.possible[entered] & ~(constant & (layer >= 0))
    assert np.array_equal(edges[entered] != 0, possible)
    with pytest.raises(BadInput):
        motifs.Circuit(edges.T.copy(), layer, pos, climb)
