"""Motifs of a circuit: which small patterns of edges does an attribution graph consist of?

A circuit is a matrix of signed weights[target, source], as attribution graphs are computed, with a
layer and a position for every node. Edges climb: from a lower layer to a higher one, never to an
earlier position. So there is no circle, and of the sixteen triads (three nodes and their edges,
Davis & Leinhardt 1972) four can have two or more edges:

    021D  a source with two targets        021C  a chain of two edges
    021U  a target with two sources        030T  a feed-forward loop: a chain and its shortcut

Counting needs no search. With E for the matrix of edges, E @ E counts the chains between any two
nodes, so that E * (E @ E) counts the loops over each edge: F. Three things follow.

1. The four are one number. Given the degrees of all nodes, 021D, 021U and 021C are constants minus
   030T. Where nulls keep the degrees, they all tell the same, and a profile of the four is always
   the same vector up to its sign. What can differ is the loops' signs and where they lie.
2. A loop has three signs, so there are eight types (Mangan & Alon, PNAS 100:11980, 2003), coherent
   where the chain does what the shortcut does. They are the census of E split into its signs.
3. A cascade is a chain of loops, each starting where the last one ended: sums of powers of F.

A loop, or a cascade, is as strong as its weakest edge. So the loops stronger than t are just those
of the graph cut at t, and the strongest k are found without a list of all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray

from lens_utils.errors import BadInput

LOOPS = {
    "C1": (1, 1, 1), "C2": (-1, 1, -1), "C3": (1, -1, -1), "C4": (-1, -1, 1),
    "I1": (1, -1, 1), "I2": (-1, -1, -1), "I3": (1, 1, -1), "I4": (-1, 1, 1),
}  # fmt: skip
"""Signs of source to middle, middle to target and source to target; C is coherent."""
TRIADS = ("003", "012", "102", "021D", "021U", "021C", "111D", "111U", "030T", "030C", "201",
          "120D", "120U", "120C", "210", "300")  # fmt: skip
ALONE = ("030T", *LOOPS, "cascade")
"""The counts that degrees do not fix: what is worth comparing with nulls."""


@dataclass(frozen=True)
class Circuit:
    """Signed weights between nodes, and where the nodes are.

    Raises BadInput for sizes that differ, a weight that is not finite, and an edge that no
    computation can have made.
    """

    weights: Float[ndarray, "target source"]
    """0 where there is no edge."""
    layer: Int[ndarray, " node"]
    """-1 for embeddings, the number of layers for logits."""
    pos: Int[ndarray, " node"]
    climb: Int[ndarray, " node"] | int = 1
    """How many layers an edge from an earlier position climbs at least, for each target: 1, as
    attention runs before the MLP reads. 2 for logits, which come after the last MLP without
    attention between, and for all nodes where attention and MLP run in parallel."""

    def __post_init__(self) -> None:
        nodes = len(self.layer)
        if self.weights.shape != (nodes, nodes) or len(self.pos) != nodes:
            raise BadInput(f"{nodes} layers and {len(self.pos)} positions for a matrix of "
                           f"{self.weights.shape}: one of each per node")  # fmt: skip
        if not np.isfinite(self.weights).all():
            raise BadInput("a weight of the circuit is not finite")
        wrong = np.argwhere((self.weights != 0) & ~self.possible)
        if len(wrong):
            t, s = wrong[0]
            raise BadInput(f"{len(wrong)} edges are causally impossible, the first from node {s} "
                           f"(layer {self.layer[s]}, position {self.pos[s]}) to node {t} (layer "
                           f"{self.layer[t]}, position {self.pos[t]})")  # fmt: skip

    @property
    def possible(self) -> Bool[ndarray, "target source"]:
        """Where an edge can be."""
        rise = self.layer[:, None] - self.layer
        later = self.pos[:, None] - self.pos
        climb = np.broadcast_to(self.climb, len(self.layer))[:, None]
        return (rise >= 1) & ((later == 0) | ((later > 0) & (rise >= climb)))

    def at(self, nodes: Shaped[ndarray, " kept"]) -> "Circuit":
        """The circuit of some nodes (indices or a mask), such as all that are not errors."""
        climb = np.broadcast_to(self.climb, len(self.layer))[nodes]
        return Circuit(
            self.weights[nodes][:, nodes], self.layer[nodes], self.pos[nodes], climb.copy()
        )

    def strongest(self, share: float) -> "Circuit":
        """The circuit of the strongest share of its edges, at least one; ties in row order.

        Raises BadInput for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise BadInput(f"share of edges {share} is not in (0, 1]")
        found = np.flatnonzero(self.weights)
        flat = self.weights.ravel()
        order = found[np.argsort(-np.abs(flat[found]), kind="stable")]
        kept = order[: max(1, round(share * len(found)))]
        weights = np.zeros_like(flat)
        weights[kept] = flat[kept]
        return Circuit(weights.reshape(self.weights.shape), self.layer, self.pos, self.climb)


def triads(weights: Float[ndarray, "target source"]) -> dict[str, int]:
    """How many of all threes of nodes are of each of TRIADS, in any directed graph.

    Those with three connected pairs are counted by matrix products. Two edges at a node then are
    part of such a triad or open, so the open ones follow from the degrees; and the number of edges
    gives those with one edge: a triad's digits count its mutual, one-way and absent pairs.
    """
    n, edge = len(weights), (weights != 0) & ~np.eye(len(weights), dtype=bool)
    mutual = edge & edge.T
    one = edge & ~mutual
    e, m = one.astype(np.float32), mutual.astype(np.float32)  # products exact to 2^24

    def total(product: ndarray, where: ndarray) -> float:
        return product.sum(dtype=float, where=where)

    chains = e @ e
    t = dict.fromkeys(TRIADS, 0.0) | {"030T": total(chains, one), "030C": total(chains, one.T) / 3}
    if mutual.any():
        both = m @ m
        t |= {
            "120D": total(e @ e.T, mutual) / 2,
            "120U": total(e.T @ e, mutual) / 2,
            "120C": total(chains, mutual),
            "210": total(both, one),
            "300": total(both, mutual) / 6,
        }
    out, into, pairs = (where.sum(axis, dtype=float) for where, axis in
                        ((one, 0), (one, 1), (mutual, 0)))  # fmt: skip
    t |= {
        "021D": out @ (out - 1) / 2 - t["030T"] - t["120D"],
        "021U": into @ (into - 1) / 2 - t["030T"] - t["120U"],
        "021C": out @ into - t["030T"] - 3 * t["030C"] - t["120C"],
        "111D": into @ pairs - 2 * t["120D"] - t["120C"] - t["210"],
        "111U": out @ pairs - 2 * t["120U"] - t["120C"] - t["210"],
        "201": pairs @ (pairs - 1) / 2 - t["210"] - 3 * t["300"],
    }
    for name, edges, digit in (("012", out.sum(), 1), ("102", pairs.sum() / 2, 0)):
        t[name] = edges * (n - 2) - sum(int(triad[digit]) * count for triad, count in t.items())
    t["003"] = n * (n - 1) * (n - 2) / 6 - sum(t.values())
    return {name: round(count) for name, count in t.items()}


def census(weights: Float[ndarray, "target source"]) -> dict[str, int]:
    """Counts of a circuit without circles: the four triads, the eight types of loops, cascades.

    A "cascade" is two loops, the second starting at the node where the first ended.
    """
    counts = dict.fromkeys(LOOPS, 0.0)
    starts, ends = np.zeros(len(weights)), np.zeros(len(weights))
    for name, over in _loops(weights):
        counts[name] = over.sum(dtype=float)
        starts += over.sum(0, dtype=float)
        ends += over.sum(1, dtype=float)
    loops = sum(counts.values())
    out, into = ((weights != 0).sum(axis, dtype=float) for axis in (0, 1))
    found = {
        "021D": (out * (out - 1)).sum() / 2 - loops,
        "021U": (into * (into - 1)).sum() / 2 - loops,
        "021C": (out * into).sum() - loops,
        "030T": loops,
        **counts,
        "cascade": ends @ starts,
    }
    return {name: round(count) for name, count in found.items()}


def spans(circuit: Circuit) -> pd.DataFrame:
    """How many loops of each type climb how many layers, from their source to their target."""
    rise = np.maximum(circuit.layer[:, None] - circuit.layer, 0).ravel()
    counts = {name: np.bincount(rise, over.ravel()) for name, over in _loops(circuit.weights)}
    table = pd.DataFrame(counts).round().astype(int)[list(LOOPS)].rename_axis("span").reset_index()
    return table[table["span"] > 1].reset_index(drop=True)


def sweep(circuit: Circuit, shares: tuple[float, ...]) -> pd.DataFrame:
    """The census of the strongest shares of the edges: a row for each, with its weakest |weight|.

    Counts follow the number of edges, so that a finding at one threshold is a finding about it.
    """
    rows = []
    for share in shares:
        cut = circuit.strongest(share).weights
        kept = np.abs(cut[cut != 0])
        row = {"share": share, "edges": len(kept), "weakest": kept.min(initial=np.inf)}
        rows.append(row | census(cut))
    return pd.DataFrame(rows)


def strongest_loops(circuit: Circuit, top: int) -> pd.DataFrame:
    """The `top` loops whose weakest edge is strongest; ties in the order of their nodes.

    One row each, strongest first: source, middle, target (nodes), type, strength (in units of
    weight), and the layers climbed to the middle and on to the target (their sum is the span).
    """
    size = np.abs(circuit.weights)
    levels = np.unique(size[size > 0])
    low, high = 0, len(levels)  # the highest level that leaves `top` loops is in [low, high)
    while high - low > 1:
        half = (low + high) // 2
        low, high = (half, high) if _count(size >= levels[half]) >= top else (low, half)
    if not len(levels):
        return _described(circuit, np.zeros((0, 3), int))
    certain = _listed(size > levels[low], top)  # fewer than `top`
    tied = _listed(size >= levels[low], top + len(certain))
    found = np.concatenate([certain, tied[_weakest(size, tied) == levels[low]]])
    strength = _weakest(size, found)
    order = np.argsort(-strength, kind="stable")[:top]
    return _described(circuit, found[order])


def cascades(weights: Float[ndarray, "target source"], longest: int) -> Float[ndarray, " length"]:
    """How many chains of 1, 2, .. `longest` loops there are (1 ends where 2 starts)."""
    over = sum(np.asarray(f, dtype=float) for _, f in _loops(weights))
    counts, ending = [], np.ones(len(weights))
    for _ in range(longest):
        ending = over @ ending
        counts.append(ending.sum())
    return np.array(counts)


def strongest_cascades(circuit: Circuit, longest: int) -> list[pd.DataFrame]:
    """For 1, 2, .. loops, the cascade whose weakest edge is strongest, as rows of loops in order.

    Ends where no longer cascade exists. Rows are as in `strongest_loops`.
    """
    size = np.abs(circuit.weights)
    width, middle = _widest(size)
    nodes = np.arange(len(size))
    reach, steps, found = np.full(len(size), np.inf), [], []
    for _ in range(longest):
        through = np.minimum(width, reach)  # the strongest cascade to t whose last loop starts at s
        before = through.argmax(1)
        reach = through[nodes, before]
        steps.append(before)
        if not reach.max(initial=0) > 0:
            break
        t, loops = int(reach.argmax()), []
        for back in reversed(steps):
            s = int(back[t])
            loops.append((s, middle[t, s], t))
            t = s
        found.append(_described(circuit, np.array(loops[::-1])))
    return found


def _loops(weights: ndarray) -> Iterator[tuple[str, ndarray]]:
    """Each type of loop, with how many of them lie over each edge[target, source]."""
    names = {signs: name for name, signs in LOOPS.items()}
    signed = {sign: np.sign(weights) == sign for sign in (1, -1)}
    edges = {sign: where.astype(np.float32) for sign, where in signed.items()}
    for first in edges:
        for second in edges:
            chains = edges[second] @ edges[first]
            for short in edges:
                yield names[first, second, short], np.where(signed[short], chains, 0)


def _over(edge: Bool[ndarray, "target source"]) -> Float[ndarray, "target source"]:
    e = edge.astype(np.float32)
    return np.where(edge, e @ e, 0)


def _count(edge: Bool[ndarray, "target source"]) -> float:
    return float(_over(edge).sum(dtype=float))


def _listed(edge: Bool[ndarray, "target source"], most: int) -> Int[ndarray, "loop 3"]:
    """Loops as (source, middle, target): all, or those over the first edges that have `most`."""
    over = _over(edge)
    target, source = np.nonzero(over)
    before = np.cumsum(over[target, source], dtype=float) - over[target, source]
    target, source = target[before < most], source[before < most]
    pair, middle = np.nonzero(edge[target] & edge[:, source].T)
    return np.stack([source[pair], middle, target[pair]], 1)


def _weakest(
    size: Float[ndarray, "target source"], loops: Int[ndarray, "loop 3"]
) -> Float[ndarray, " loop"]:
    s, m, t = loops.T
    return np.minimum(np.minimum(size[m, s], size[t, m]), size[t, s])


def _widest(
    size: Float[ndarray, "target source"],
) -> tuple[Float[ndarray, "target source"], Int[ndarray, "target source"]]:
    """The strength of the strongest loop over each edge, 0 without one, and its middle."""
    width, middle = np.zeros_like(size), np.zeros(size.shape, int)
    for t, row in enumerate(size):
        (into,) = np.nonzero(row)
        if len(into):
            chain = np.minimum(row[into, None], size[into])
            best = chain.argmax(0)
            middle[t] = into[best]
            width[t] = np.minimum(row, chain[best, np.arange(len(size))])
    return width, middle


def _described(circuit: Circuit, loops: Int[ndarray, "loop 3"]) -> pd.DataFrame:
    s, m, t = loops.T
    names = {signs: name for name, signs in LOOPS.items()}
    edges = (circuit.weights[m, s], circuit.weights[t, m], circuit.weights[t, s])
    signs = np.sign(np.stack(edges, 1)).astype(int)
    return pd.DataFrame({
        "source": s, "middle": m, "target": t,
        "type": [names[tuple(row)] for row in signs.tolist()],
        "strength": _weakest(np.abs(circuit.weights), loops),
        "to_middle": circuit.layer[m] - circuit.layer[s],
        "to_target": circuit.layer[t] - circuit.layer[m],
        "span": circuit.layer[t] - circuit.layer[s],
        "across": circuit.pos[t] - circuit.pos[s],
    })  # fmt: skip
