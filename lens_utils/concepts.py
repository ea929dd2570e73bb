"""Concepts at the tokens where they hold: directions, neurons, and what joins them.

"Dead end" is true of a cell, not of a maze, so it is asked of the token that names the cell. The
cell itself must not answer for it (corners are dead ends more often): everything here compares
tokens of the same cell in different mazes. With x an activation, y a label and both less their
mean over the tokens of the same cell (the *stratum*):

    difference  b = sum x y / sum y²        the label's coefficient with a constant for every cell
    Cohen's d   b / s                       s: standard deviation of what b y leaves of x
    p           of t = b / se, se clustered by maze: tokens of one maze are not independent
    direction   the vector b of all dimensions, or ridge regression of y on x in closed form
    AUROC       P(x of a token with the label > x of one without), only among tokens of one cell

What is fitted on some mazes is judged on others. `silence` sets neurons to their cell's mean, at
given tokens: the cell stays, the concept goes. `virtual` is the static counterpart, the cosine of
what one neuron writes with what another reads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats
from torch import Tensor

from lens_utils.attribution import Norm
from lens_utils.cache import stream
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

RESAMPLES = 1000


# Activations


@torch.no_grad()
def at_tokens(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    names: Sequence[str],
    batch_size: int = 32,
) -> dict[str, Float[Tensor, "token ..."]]:
    """Activations at some positions of every row, float32, row after row in the order given.

    Raises BadInput for a hook the model lacks and for positions that are not in their row.
    """
    if any(not 0 <= p < len(row) for row, at in zip(rows, positions, strict=True) for p in at):
        raise BadInput("a position lies outside its prompt")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    first = 0
    for part in stream(model, rows, names, batch_size):
        last = int(part.row[-1]) + 1
        lengths = np.cumsum([0, *(len(row) for row in rows[first:last])])
        taken = [
            start + p for start, at in zip(lengths, positions[first:last], strict=False) for p in at
        ]
        for name, x in part.values.items():
            found[name].append(x[torch.tensor(taken, device=x.device, dtype=torch.long)].float())
        first = last
    return {name: torch.cat(parts) for name, parts in found.items()}


# Contrasts within cells


def within(
    x: Float[Tensor, "token unit"], stratum: Int[Tensor, " token"]
) -> Float[Tensor, "token unit"]:
    """x less its stratum's mean."""
    return x - means(x, stratum)[stratum]


def means(
    x: Float[Tensor, "token unit"], stratum: Int[Tensor, " token"], n: int = 0
) -> Float[Tensor, "stratum unit"]:
    """Mean of every stratum (of n, or as many as there are); zero for an empty one."""
    n = n or int(stratum.max()) + 1
    total = x.new_zeros(n, x.shape[1]).index_add_(0, stratum, x)
    count = torch.bincount(stratum, minlength=n).clamp_min(1)
    return total / count[:, None]


class Contrast(NamedTuple):
    """Label against no label, within strata."""

    difference: Float[Tensor, "concept unit"]
    """In units of x."""
    d: Float[Tensor, "concept unit"]
    p: Float[Tensor, "concept unit"]
    """Two-sided, clustered."""


def contrast(
    x: Float[Tensor, "token unit"],
    y: Bool[Tensor, "token concept"],
    stratum: Int[Tensor, " token"],
    cluster: Int[Tensor, " token"],
) -> Contrast:
    """Difference, Cohen's d and p of every unit for every concept (module docstring).

    A unit that never varies has d 0 and p 1. Raises BadInput for a label that is the same at all
    tokens of every stratum: there is nothing to compare.
    """
    x, y = within(x, stratum), _varying(y, stratum)
    size = y.square().sum(0)[:, None]
    difference = einsum(y, x, "token concept, token unit -> concept unit") / size
    left = (x.square().sum(0) - difference.square() * size).clamp_min(0)
    free = len(x) - len(stratum.unique()) - 1
    spread = (left / free).sqrt()
    n = int(cluster.max()) + 1
    variance = torch.zeros_like(difference)
    for concept in range(y.shape[1]):
        one = y[:, concept, None]
        both = x.new_zeros(n, x.shape[1]).index_add_(0, cluster, one * x)
        own = x.new_zeros(n, 1).index_add_(0, cluster, one.square())
        variance[concept] = (both - own * difference[concept]).square().sum(0)
    clusters = len(cluster.unique())
    se = (variance * clusters / (clusters - 1)).sqrt() / size
    dead = spread < 1e-6 * x.abs().amax().clamp_min(1e-12)
    t = torch.where(dead, 0, difference / se.clamp_min(1e-30)).cpu().double().numpy()
    p = torch.from_numpy(2 * stats.t.sf(np.abs(t), clusters - 1)).to(x)
    return Contrast(difference, torch.where(dead, 0, difference / spread.clamp_min(1e-30)), p)


def _varying(
    y: Bool[Tensor, "token concept"], stratum: Int[Tensor, " token"]
) -> Float[Tensor, "token concept"]:
    """Labels less their stratum's mean. Raises BadInput where nothing is left of one."""
    left = within(y.float(), stratum)
    if (left.abs().amax(0) < 1e-6).any():
        raise BadInput("a concept has one label at all tokens of every cell: take more mazes")
    return left


def directions(
    x: Float[Tensor, "token d_model"],
    y: Bool[Tensor, "token concept"],
    stratum: Int[Tensor, " token"],
    ridge: float = 1e-2,
) -> tuple[Float[Tensor, "concept d_model"], Float[Tensor, "concept d_model"]]:
    """Two directions for every concept: the difference of means, and ridge regression.

    ridge: penalty in units of the mean variance of a dimension, per token. Raises BadInput as
    `contrast`.
    """
    x, y = within(x, stratum), _varying(y, stratum)
    shared = einsum(x, y, "token d_model, token concept -> d_model concept")
    scatter = einsum(x, x, "token d_model, token other -> d_model other")
    scatter += ridge * scatter.diagonal().mean().clamp_min(1e-12) * torch.eye(len(scatter)).to(x)
    return (shared / y.square().sum(0)).T, torch.linalg.solve(scatter, shared).T


def shuffled(
    y: Bool[Tensor, "token concept"], stratum: Int[Tensor, " token"], seed: int
) -> Bool[Tensor, "token concept"]:
    """Labels dealt out anew among the tokens of each stratum: the null of no concept."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    mixed = torch.empty_like(y)
    before = torch.argsort(stratum.cpu(), stable=True)
    after = order[torch.argsort(stratum.cpu()[order], stable=True)]
    mixed[before] = y[after]
    return mixed


# Judging


def auroc(
    x: Float[ndarray, "token unit"],
    y: Bool[ndarray, "token concept"],
    stratum: Int[ndarray, " token"],
) -> Float[ndarray, "concept unit"]:
    """Area under the ROC curve within strata: all pairs of one stratum, ties count half.

    NaN for a concept without such a pair.
    """
    wins = np.zeros((y.shape[1], x.shape[1]))
    pairs = np.zeros((y.shape[1], 1))
    for one in np.unique(stratum):
        here = stratum == one
        label = y[here].astype(float)
        n, other = label.sum(0)[:, None], (1 - label).sum(0)[:, None]
        ranks = stats.rankdata(x[here], axis=0)
        wins += np.where(other > 0, label.T @ ranks - n * (n + 1) / 2, 0)
        pairs += n * other
    return wins / np.where(pairs > 0, pairs, np.nan)


def auroc_interval(
    x: Float[ndarray, " token"],
    y: Bool[ndarray, " token"],
    stratum: Int[ndarray, " token"],
    cluster: Int[ndarray, " token"],
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of `auroc`, resampling whole clusters (1,000 times).

    Pairs won and pairs there are, summed by the clusters of their two tokens, are matrices W and N;
    a resampling with counts c has the AUROC c'Wc / c'Nc.
    """
    names, number = np.unique(cluster, return_inverse=True)
    won, pairs = (np.zeros((len(names), len(names))) for _ in range(2))
    for one in np.unique(stratum):
        yes, no = np.flatnonzero((stratum == one) & y), np.flatnonzero((stratum == one) & ~y)
        place = np.ix_(number[yes], number[no])
        gap = x[yes][:, None] - x[no]
        np.add.at(won, place, (gap > 0) + 0.5 * (gap == 0))
        np.add.at(pairs, place, 1.0)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)
    counts = counts.astype(float)
    share = ((counts @ won) * counts).sum(1) / ((counts @ pairs) * counts).sum(1)
    low, high = np.nanpercentile(share, [2.5, 97.5])
    return float(low), float(high)


def neuron_sets(
    d: Float[ndarray, "layer concept neuron"],
    p: Float[ndarray, "layer concept neuron"],
    floor: float = 0.5,
    level: float = 0.05,
) -> Bool[ndarray, "layer concept neuron"]:
    """Neurons of a concept: |d| of at least `floor`, and q below `level` (Benjamini-Hochberg).

    The false discovery rate is controlled over all neurons of all layers, for each concept.
    """
    q = np.stack([stats.false_discovery_control(p[:, c].ravel()).reshape(p[:, c].shape)
                  for c in range(p.shape[1])], axis=1)  # fmt: skip
    return (np.abs(d) >= floor) & (q < level)


# What joins them


def virtual(
    model: LoadedModel,
    source: tuple[int, Sequence[int]],
    target: tuple[int, Sequence[int]],
    reader: str = "gate",
) -> Float[Tensor, "source target"]:
    """Cosine of what neurons of one layer write with what neurons of a later layer read.

    source, target: a layer and neurons of it. reader: the gate, or `in`; an MLP without a gate has
    only `in`. The norms between them are folded in as their gains (LayerNorm: and the centring).
    """
    (below, writers), (above, readers) = source, target
    block, later = model.bridge.blocks[below], model.bridge.blocks[above]
    weight = getattr(later.mlp, "W_gate", None) if reader == "gate" else None
    weight = later.mlp.W_in if weight is None else weight
    written = block.mlp.W_out[list(writers)].float()
    read = weight[:, list(readers)].T.float().to(written.device)
    written = Norm(getattr(block, "ln2_post", None), written).push(written)
    read = Norm(later.ln2, read).pull(read, None)
    return einsum(
        torch.nn.functional.normalize(written, dim=-1),
        torch.nn.functional.normalize(read, dim=-1),
        "source d_model, target d_model -> source target",
    )


def silence(
    neurons: Int[Tensor, " neuron"],
    values: Float[Tensor, "stratum neuron"],
    stratum: Int[Tensor, "text pos"],
) -> Callable[..., Tensor]:
    """A hook for `mlp.hook_post` that sets neurons to their stratum's value; -1 leaves a token."""
    touched = (stratum >= 0)[..., None]

    def write(x: Tensor, hook: object) -> Tensor:
        put = x.clone()
        new = values.to(x.device, x.dtype)[stratum.clamp_min(0).to(x.device)]
        at = neurons.to(x.device)
        put[..., at] = torch.where(touched.to(x.device), new, x[..., at])
        return put

    return write


def beyond(
    observed: Float[ndarray, " edge"], null: Float[ndarray, "edge draw"]
) -> tuple[Float[ndarray, " edge"], Float[ndarray, " edge"]]:
    """How far each number lies beyond its null's draws: t, and its two-sided p.

    As for one more draw from a normal distribution of unknown mean and variance (n - 1 degrees of
    freedom): with 20 draws, ranks alone could not go below 1/21, and no correction would leave
    anything. NaN where the draws do not vary.
    """
    n = null.shape[1]
    spread = null.std(axis=1, ddof=1)
    t = (observed - null.mean(axis=1)) / np.where(spread > 0, spread, np.nan) / np.sqrt(1 + 1 / n)
    return t, 2 * stats.t.sf(np.abs(t), n - 1)
