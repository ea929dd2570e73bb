"""Attribution graphs: what of one forward pass leads to its logits, and how much is explained?

A graph (`frozen.build`) holds the linear effect of every feature, error and token of one prompt on
every feature above it and on the logits, attention patterns and norms held (Ameisen et al. 2025,
"Circuit Tracing", transformer-circuits.pub). Here it is read:

1. Influence of a node: the share of the logits' input that comes through it, over all paths, where
   each node's incoming edges count by their share of the sum of their sizes.
2. Pruning keeps the nodes and edges that make up a given share of the influence.
3. Scores say how much of the influence comes from tokens by way of features and not from errors.

Influence drops signs and the bias; it ranks and does not predict. `effects` predicts: what the
linear model says of a logit when a feature is taken away, directly and over all paths. Whether the
model itself agrees is for interventions to say (`replacement`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_utils.errors import BadInput


@dataclass(frozen=True)
class Graph:
    """Nodes: features, errors (layer by layer), tokens, logits. Edges are [target, source]."""

    ids: Int[Tensor, " pos"]
    n_layers: int
    features: Int[Tensor, "feature 3"]
    """Layer, position and index."""
    activations: Float[Tensor, " feature"]
    logit_ids: Int[Tensor, " logit"]
    logit_probs: Float[Tensor, " logit"]
    edges: Float[Tensor, "node node"]
    bias: Float[Tensor, " node"]
    """The bias node's edges: what constants add."""
    omitted: Float[Tensor, " node"]
    """What active features that are not among the nodes add."""
    values: Float[Tensor, " node"]
    """A feature's pre-activation, a logit less the mean of all; otherwise 0. The sum of a node's
    edges, its bias and what is omitted."""

    @property
    def parts(self) -> dict[str, slice]:
        """Where the nodes of each kind are."""
        sizes = {"feature": len(self.features), "error": self.n_layers * len(self.ids),
                 "token": len(self.ids), "logit": len(self.logit_ids)}  # fmt: skip
        found, at = {}, 0
        for part, size in sizes.items():
            found[part] = slice(at, at := at + size)
        return found

    @property
    def weights(self) -> Float[Tensor, " node"]:
        """The logits' probabilities, 0 elsewhere: where influence starts."""
        found = torch.zeros_like(self.bias)
        found[self.parts["logit"]] = self.logit_probs
        return found


# Influence, pruning, scores


def _shares(matrix: Float[Tensor, "row source"]) -> Float[Tensor, "row source"]:
    """Every row's sizes, divided by their sum."""
    sizes = matrix.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)


def influence(
    matrix: Float[Tensor, "node node"], weights: Float[Tensor, " node"]
) -> Float[Tensor, " node"]:
    """How much of the logits' input comes through each node, summed over all paths."""
    shares = _shares(matrix)
    now = weights @ shares
    total = now.clone()
    for _ in range(len(shares)):  # no path is longer
        if not now.any():
            break
        now = now @ shares
        total += now
    return total


def partial_influence(
    rows: Float[Tensor, "row source"],
    probs: Float[Tensor, " logit"],
    chosen: Int[Tensor, " feature"],
) -> Float[Tensor, " source"]:
    """Influence over paths whose targets are all among the rows: logits, then chosen features."""
    shares = _shares(rows)
    now = probs @ shares[: len(probs)]
    total = now.clone()
    for _ in range(len(chosen)):
        if not now[chosen].any():
            break
        now = now[chosen] @ shares[len(probs) :]
        total += now
    return total


class Pruned(NamedTuple):
    """What pruning leaves of a graph."""

    nodes: Bool[Tensor, " node"]
    edges: Bool[Tensor, "node node"]
    cumulative: Float[Tensor, " node"]
    """The share of all influence that lies in a node and those above it: small is important."""


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> Pruned:
    """The fewest nodes, then edges, with these shares of the influence; tokens and logits stay.

    Features without an edge in or out, and errors without one out, are then taken away, until none
    is left. Raises BadInput for shares outside 0 .. 1.
    """
    if not (0 <= nodes <= 1 and 0 <= edges <= 1):
        raise BadInput(f"shares of nodes and edges to keep lie between 0 and 1: {nodes}, {edges}")
    parts, weights = graph.parts, graph.weights
    n_prunable = parts["token"].start
    reached = influence(graph.edges, weights)
    kept = reached >= _threshold(reached, nodes)
    kept[n_prunable:] = True
    left = graph.edges * kept[:, None] * kept
    scores = _shares(left) * (influence(left, weights) + weights)[:, None]
    kept_edges = (scores >= _threshold(scores.flatten(), edges)) & (left != 0)
    before = None
    while before is None or not torch.equal(before, kept):
        before = kept.clone()
        kept[:n_prunable] &= kept_edges[:, :n_prunable].any(0)
        kept[parts["feature"]] &= kept_edges[parts["feature"]].any(1)
        kept_edges &= kept[:, None] & kept
    return Pruned(kept, kept_edges, _cumulative(reached))


def _cumulative(scores: Float[Tensor, " item"]) -> Float[Tensor, " item"]:
    ranked, order = scores.sort(descending=True)
    found = torch.empty_like(scores)
    found[order] = ranked.cumsum(0) / ranked.sum()
    return found


def _threshold(scores: Float[Tensor, " item"], share: float) -> Float[Tensor, ""]:
    """The smallest of the largest scores that together make up a share of the sum."""
    ranked = scores.sort(descending=True).values
    share_so_far = ranked.cumsum(0) / ranked.sum()
    at = int(torch.searchsorted(share_so_far, share))
    return ranked[min(at, len(ranked) - 1)]


class Scores(NamedTuple):
    """How much of a graph is explained by features, 0 .. 1. High is no proof: see `effects`."""

    replacement: float
    """Of the influence that reaches tokens or errors, the tokens' share."""
    completeness: float
    """The share of inputs that are no errors, weighted by the influence of what reads them."""


def scores(graph: Graph) -> Scores:
    """Replacement and completeness of a graph, before pruning."""
    errors, tokens = graph.parts["error"], graph.parts["token"]
    reached = influence(graph.edges, graph.weights)
    by_tokens, by_errors = reached[tokens].sum(), reached[errors].sum()
    explained = 1 - _shares(graph.edges)[:, errors].sum(1)
    weight = reached + graph.weights
    return Scores(
        float(by_tokens / (by_tokens + by_errors)),
        float((explained * weight).sum() / weight.sum()),
    )


# What the linear model predicts


class Effects(NamedTuple):
    """Change of every logit, less the mean of all logits, per share of a feature that is added."""

    direct: Float[Tensor, "logit feature"]
    """With all other features held: the edge."""
    total: Float[Tensor, "logit feature"]
    """With features above following, along all paths between the graph's nodes."""


def effects(graph: Graph) -> Effects:
    """What the graph says of scaling a feature: taking it away is -1 times this.

    An active feature follows its pre-activation one to one; features never switch on or off here.
    """
    feature, logit = graph.parts["feature"], graph.parts["logit"]
    direct = graph.edges[logit, feature]
    # A feature whose pre-activation grows by its own activation grows by one share.
    follows = graph.edges[feature, feature] / graph.activations[:, None]
    unit = torch.eye(len(follows), dtype=follows.dtype, device=follows.device)
    # Features are sorted by layer: the system is triangular.
    total = torch.linalg.solve_triangular(unit - follows, direct, upper=False, left=False)
    return Effects(direct, total)
