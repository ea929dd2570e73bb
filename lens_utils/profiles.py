"""From the atoms of pairs to scores of heads, and from heads to layers.

A head's synergy and redundancy are the means of its pairs' `sts` and `rtr`. Three ways to weigh
them up:

    value_diff   rank of synergy - redundancy, 1 .. n_heads. It reproduces the published curves of
                 https://arxiv.org/abs/2601.06851. As sts is several times rtr, it mostly ranks sts.
    rank_diff    rank of synergy - rank of redundancy, as that paper's text has it. Two ranks that
                 go together are subtracted: what is left is noisier.
    balance      synergy / (synergy + redundancy), each clipped at 0

A profile is the mean score of each layer's heads: `raw`, scaled to 0 .. 1 (`minmax`), or as the
layer's percentile rank among the layers (`percentile`, which hides how far layers are apart).

Intervals come from resampled prompts: the atoms are averaged anew, and scores and profiles follow.
All functions take leading axes, so that a bootstrap is one call. Heads without a value are NaN and
stay NaN; they are left out of ranks and means.
"""

import warnings

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import rankdata

from lens_utils.errors import BadInput

SCORES = ("value_diff", "rank_diff", "balance")
MODES = ("percentile", "minmax", "raw")


def head_scores(
    sts: Float[ndarray, "*lead head"], rtr: Float[ndarray, "*lead head"], score: str = "value_diff"
) -> Float[ndarray, "*lead head"]:
    """One score per head; higher is more synergistic. Ties share their mean rank.

    Raises BadInput for a score that is none of SCORES.
    """
    match score:
        case "value_diff":
            return _ranks(sts - rtr)
        case "rank_diff":
            return _ranks(sts) - _ranks(rtr)
        case "balance":
            synergy, redundancy = np.clip(sts, 0, None), np.clip(rtr, 0, None)
            total = synergy + redundancy
            return np.divide(synergy, total, out=np.full_like(total, np.nan), where=total > 1e-12)
    raise BadInput(f"no score {score!r}: there are {', '.join(SCORES)}")


def head_shares(score: Float[ndarray, "*lead head"]) -> Float[ndarray, "*lead head"]:
    """The score's rank among the heads, 0 (lowest) .. 1 (highest): comparable across scores."""
    ranks = _ranks(score)
    return (ranks - 1) / np.maximum((~np.isnan(score)).sum(-1, keepdims=True) - 1, 1)


def layer_profile(
    score: Float[ndarray, "*lead head"], layer: Int[ndarray, " head"], mode: str = "raw"
) -> Float[ndarray, "*lead layer"]:
    """The mean score of each layer's heads, in the order of the layers; see the module for modes.

    Raises BadInput for a mode that is none of MODES.
    """
    raw = np.stack([_mean(score[..., layer == at]) for at in np.unique(layer)], -1)
    match mode:
        case "raw":
            return raw
        case "percentile":
            return head_shares(raw)
        case "minmax":
            low, high = (f(raw, -1, keepdims=True) for f in (np.nanmin, np.nanmax))
            return (raw - low) / np.where(high > low, high - low, 1.0)
    raise BadInput(f"no profile mode {mode!r}: there are {', '.join(MODES)}")


def thirds(profile: Float[ndarray, "*lead layer"]) -> Float[ndarray, "*lead third"]:
    """Mean over the early, the middle and the late layers. Raises BadInput below three layers."""
    if profile.shape[-1] < 3:
        raise BadInput(f"{profile.shape[-1]} layers cannot be divided into thirds")
    parts = np.array_split(profile, 3, axis=-1)
    return np.stack([_mean(part) for part in parts], axis=-1)


def hump(profile: Float[ndarray, "*lead layer"]) -> Float[ndarray, "*lead"]:
    """How far the middle third lies above the higher of the outer two; an inverted U is > 0."""
    early, middle, late = np.moveaxis(thirds(profile), -1, 0)
    return np.asarray(middle - np.maximum(early, late))  # also of a single profile


def over_prompts(
    atoms: Float[ndarray, "prompt head"], weights: Float[ndarray, "draw prompt"] | None = None
) -> Float[ndarray, "*draw head"]:
    """Means over prompts without NaN: plain, or one for each row of weights."""
    weights_ = np.ones((1, len(atoms))) if weights is None else weights
    there = weights_ @ (~np.isnan(atoms)).astype(float)
    total = weights_ @ np.nan_to_num(atoms)
    found = np.divide(total, there, out=np.full(total.shape, np.nan), where=there > 0)
    return found[0] if weights is None else found


def resamples(prompts: int, draws: int, seed: int) -> Float[ndarray, "draw prompt"]:
    """Bootstrap weights: how often each prompt was drawn."""
    picks = np.random.default_rng(seed).integers(prompts, size=(draws, prompts))
    return np.stack([np.bincount(p, minlength=prompts) for p in picks]).astype(float)


def shares_over_prompts(
    sts: Float[ndarray, "prompt head"],
    rtr: Float[ndarray, "prompt head"],
    score: str = "value_diff",
    weights: Float[ndarray, "draw prompt"] | None = None,
) -> Float[ndarray, "*draw head"]:
    """`head_shares` of the score of the means over prompts, plain or for each row of weights."""
    means = (over_prompts(atoms, weights) for atoms in (sts, rtr))
    return head_shares(head_scores(*means, score))


def interval(
    value: Float[ndarray, "*point"], drawn: Float[ndarray, "_ ..."]
) -> tuple[Float[ndarray, "*point"], Float[ndarray, "*point"]]:
    """95 % interval, 1.96 bootstrap standard errors around the value.

    Not the percentiles: ranks of resampled means are noisier than the ranks themselves, which
    pulls every resampled profile towards 0.5.
    """
    spread = 1.96 * np.asarray(np.nanstd(drawn, axis=0, ddof=1))
    return np.asarray(value - spread), np.asarray(value + spread)


def _mean(values: Float[ndarray, "*lead item"]) -> Float[ndarray, "*lead"]:
    """Mean of what is there; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(values, -1))


def _ranks(values: Float[ndarray, "*lead head"]) -> Float[ndarray, "*lead head"]:
    # SciPy's own nan_policy goes row by row, 40 times slower; infinity ranks behind everything.
    missing = np.isnan(values)
    return np.where(missing, np.nan, rankdata(np.where(missing, np.inf, values), axis=-1))
