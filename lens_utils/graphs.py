"""Weighted graphs of heads: how well is a matrix of pairs connected, and does it fall into parts?

1. A matrix of pairs becomes a graph: of its strongest share of pairs, or of all. A weight of 0 or
   below (CCS and surrogate-subtracted matrices have them) is no connection, as 1 / w would mean
   nothing; such pairs are counted, and so are pairs that are NaN.
2. Efficiency is the mean over pairs of 1 / length of the shortest path, where an edge is 1 / w
   long (Latora & Marchiori, cond-mat/0101396). Twice the weights are twice as efficient, so it is
   given per mean weight too: that part is the shape's.
3. Modularity is the weight within communities beyond what the nodes' strengths alone put there
   (Newman), in the communities that Louvain finds (Blondel et al., arXiv:0803.0476; igraph's, as
   networkx takes far longer on full graphs of 1,152 nodes).
4. The null deals the same weights out to the pairs at random. What a graph has beyond it lies in
   who is connected to whom.
"""

import random
from dataclasses import dataclass

import igraph
import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray
from scipy.sparse import csgraph, csr_array

from lens_utils.errors import BadInput

DENSE = 0.3  # share of pairs from which Floyd-Warshall is quicker than Dijkstra


@dataclass(frozen=True)
class Graph:
    """Symmetric weights, and what was left out on the way to them."""

    weights: Float[ndarray, "node node"]
    """0 where there is no edge."""
    edges: int
    clipped: int
    """Pairs of weight 0 or below, which are never edges."""
    missing: int
    """Pairs that are NaN, which are never edges."""
    tied: int
    """Pairs as strong as the weakest edge that were left out to keep to the share."""


@dataclass(frozen=True)
class Measured:
    """A measure of a graph beside the same of graphs with shuffled weights."""

    value: float
    null: float
    """Mean over shuffles."""
    low: float
    """The null's 2.5th percentile."""
    high: float
    """Its 97.5th."""


def graph(matrix: Float[ndarray, "node node"], top: float | None = None) -> Graph:
    """The strongest share `top` of all pairs as edges, or every pair with a weight.

    Of n pairs, round(top n) become edges, at least one, fewer where fewer have a weight above 0.
    Among equal weights at the edge of the share the first in row order are kept (`tied` counts the
    others). The diagonal is ignored. Raises BadInput for a share outside (0, 1], a matrix that is
    not symmetric or without a single weight.
    """
    weights, missing = _pairs(matrix)
    return _graph(weights, len(matrix), top, missing)


def _pairs(matrix: ndarray) -> tuple[ndarray, int]:
    """Weights above the diagonal, row by row, and how many are NaN."""
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1] or len(matrix) < 2:
        raise BadInput(f"a graph needs a square matrix of 2 or more nodes, not {matrix.shape}")
    if not np.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-12, equal_nan=True):
        raise BadInput("the matrix of a graph must be symmetric: take an atom such as sts or rtr")
    weights = matrix[np.triu_indices(len(matrix), 1)].astype(float)
    if np.isinf(weights).any():
        raise BadInput("a weight of the graph is infinite")
    return weights, int(np.isnan(weights).sum())


def _graph(weights: ndarray, nodes: int, top: float | None, missing: int) -> Graph:
    if top is not None and not 0 < top <= 1:
        raise BadInput(f"top share {top} is not in (0, 1]: 0.1 keeps the strongest tenth of pairs")
    positive = weights > 0  # NaN is not
    if not positive.any():
        raise BadInput("no pair has a weight above 0: there is no graph")
    kept, tied = positive, 0
    if top is not None:
        order = np.argsort(np.where(positive, -weights, np.inf), kind="stable")
        chosen = order[: max(1, round(top * len(weights)))]
        kept = np.zeros_like(positive)
        kept[chosen] = positive[chosen]
        tied = int((positive & ~kept & (weights == weights[kept].min())).sum())
    full = np.zeros((nodes, nodes))
    full[np.triu_indices(nodes, 1)] = np.where(kept, weights, 0.0)
    return Graph(
        weights=full + full.T,
        edges=int(kept.sum()),
        clipped=int((weights <= 0).sum()),
        missing=missing,
        tied=tied,
    )


def efficiency(weights: Float[ndarray, "node node"]) -> float:
    """Weighted global efficiency; 0 between nodes that no path connects. In units of weight."""
    n = len(weights)
    edges = weights > 0
    lengths = np.divide(1.0, weights, out=np.zeros_like(weights, dtype=float), where=edges)
    dense = edges.sum() > DENSE * n * (n - 1)
    paths = csgraph.floyd_warshall(lengths) if dense else csgraph.dijkstra(csr_array(lengths))
    np.fill_diagonal(paths, np.inf)
    return float((1 / paths).sum() / (n * (n - 1)))


def giant(weights: Float[ndarray, "node node"]) -> float:
    """Share of the nodes in the largest connected component."""
    _, labels = csgraph.connected_components(csr_array(weights > 0), directed=False)
    return float(np.bincount(labels).max() / len(weights))


def modularity(
    weights: Float[ndarray, "node node"], communities: Integer[ndarray, " node"]
) -> float:
    """Share of the weight within communities, less what the nodes' strengths would put there."""
    member = np.eye(communities.max() + 1)[communities]
    between = member.T @ weights @ member / weights.sum()
    return float(np.trace(between) - (between.sum(1) ** 2).sum())


def louvain(weights: Float[ndarray, "node node"], seed: int = 0) -> Integer[ndarray, " node"]:
    """A community for each node, 0, 1, ..: greedy for modularity, nodes visited in random order."""
    rows, columns = np.nonzero(np.triu(weights, 1))
    net = igraph.Graph(len(weights), np.column_stack([rows, columns]))
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = net.community_multilevel(weights[rows, columns])
    finally:
        igraph.set_random_number_generator(random)  # as igraph starts out
    return np.array(found.membership)


def measures(g: Graph, seed: int = 0) -> dict[str, float]:
    """Efficiency, the same per mean weight, modularity, communities of two or more, giant share.

    The mean weight is over all pairs of nodes, with or without an edge, as is the efficiency.
    """
    n = len(g.weights)
    found, communities = efficiency(g.weights), louvain(g.weights, seed)
    return {
        "efficiency": found,
        "efficiency_per_weight": found / (g.weights.sum() / (n * (n - 1))),
        "modularity": modularity(g.weights, communities),
        "communities": float((np.bincount(communities) > 1).sum()),
        "giant": giant(g.weights),
    }


def against_shuffled(
    matrix: Float[ndarray, "node node"],
    top: float | None = None,
    shuffles: int = 20,
    seed: int = 0,
) -> dict[str, Measured]:
    """`measures` of `graph(matrix, top)`, each beside its null: the weights dealt out at random.

    Raises BadInput as `graph` does, and for fewer than two shuffles.
    """
    if shuffles < 2:
        raise BadInput(f"an interval needs 2 or more shuffles, not {shuffles}")
    weights, missing = _pairs(matrix)
    rng = np.random.default_rng(seed)
    dealt = [weights, *(rng.permutation(weights) for _ in range(shuffles))]
    rows = [measures(_graph(w, len(matrix), top, missing), seed) for w in dealt]
    found = {}
    for name, value in rows[0].items():
        null = np.array([row[name] for row in rows[1:]])
        low, high = np.percentile(null, [2.5, 97.5])
        found[name] = Measured(value, float(null.mean()), float(low), float(high))
    return found
