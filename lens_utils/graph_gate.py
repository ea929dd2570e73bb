"""The gate: do the numbers of attribution graphs say what interventions do?

Some features of every prompt are taken away in the model itself, one by one, and the change of the
target's logit is compared with what the graph predicts. A graph speaks of one prompt, so the
correlation is taken within each prompt and averaged over prompts; pooled over all features, one
prompt with effects of ten logits would outweigh thirty with effects of a half. Both are reported.

Two controls go with it: other features, matched for layer and activation, whose effects should be
smaller; and predictions dealt out anew among the features of each prompt, which should predict
nothing. A verdict is "causal" only where every condition holds. The threshold of the correlation is
a setting of the experiment, fixed before it runs: 0.7 for a text model, 0.8 for the maze organism.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from scipy import stats

from lens_utils.interventions import NOT_CAUSAL
from lens_utils.stats import mean_ci

PROMPTS = 20
"""Fewest prompts for a verdict."""


class Agreement(NamedTuple):
    """How far predicted and measured effects agree, over features of several prompts."""

    r: float
    """Mean over prompts of Pearson's correlation within the prompt; low and high are its 95 %
    bootstrap interval over prompts."""
    low: float
    high: float
    rho: float
    """Mean over prompts of Spearman's correlation within the prompt."""
    slope: float
    """Measured logits per logit predicted, by least squares through 0."""
    sign: float
    """Share of the features whose effect has the sign that was predicted."""
    median: float
    """Median over prompts of Pearson's correlation within the prompt."""
    pooled: float
    """Pearson's correlation over all features of all prompts."""
    n_features: int
    n_prompts: int


def agreement(
    predicted: Float[ndarray, " feature"],
    measured: Float[ndarray, " feature"],
    prompt: Shaped[ndarray, " feature"],
    seed: int = 0,
) -> Agreement:
    """Predicted against measured effects, both in logits. NaN where nothing varies."""
    p, m = predicted.astype(float), measured.astype(float)
    mine = [prompt == name for name in np.unique(prompt)]
    within = np.array([_pearson(p[at], m[at]) for at in mine])
    ranked = np.array([_pearson(stats.rankdata(p[at]), stats.rankdata(m[at])) for at in mine])
    r, whole = mean_ci(within, None, seed), float((p * p).sum())
    some = not np.isnan(within).all()
    return Agreement(
        r["value"], r["low"], r["high"],
        float(np.nanmean(ranked)) if some else float("nan"),
        float((p * m).sum() / whole) if whole else float("nan"),
        float((np.sign(p) == np.sign(m)).mean()) if len(p) else float("nan"),
        float(np.nanmedian(within)) if some else float("nan"),
        _pearson(p, m), len(p), len(mine),
    )  # fmt: skip


def _pearson(one: Float[ndarray, " feature"], other: Float[ndarray, " feature"]) -> float:
    """NaN for fewer than three features, and where one of the two does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def matched(
    places: Int[ndarray, "feature 3"],
    activations: Float[ndarray, " feature"],
    taken: Int[ndarray, " top"],
    seed: int = 0,
    near: int = 5,
) -> Int[ndarray, " other"]:
    """For every feature taken another of its layer with about its activation, none twice.

    places: layer, position, index. Drawn among the `near` nearest that are left; a layer that has
    none left gives none.
    """
    rng, free = np.random.default_rng(seed), np.ones(len(places), bool)
    free[taken] = False
    found = []
    for feature in taken:
        left = np.flatnonzero(free & (places[:, 0] == places[feature, 0]))
        if len(left):
            far = np.abs(np.log(activations[left] / activations[feature]))
            one = rng.choice(left[np.argsort(far, kind="stable")[:near]])
            free[one] = False
            found.append(one)
    return np.array(found, dtype=int)


def dealt_anew(
    predicted: Float[ndarray, " feature"], prompt: Shaped[ndarray, " feature"], seed: int = 0
) -> Float[ndarray, " feature"]:
    """The predictions of each prompt, dealt out at random among its features."""
    rng, found = np.random.default_rng(seed), predicted.copy()
    for name in np.unique(prompt):
        mine: Bool[ndarray, " feature"] = prompt == name
        found[mine] = rng.permutation(found[mine])
    return found


def verdict(found: Agreement, control: Agreement, gain: float, threshold: float) -> dict[str, Any]:
    """The conditions, each with its numbers and whether it holds, and the verdict.

    control: of predictions dealt anew. gain: `interventions.linear_gain` over all prompts.
    """
    conditions = {
        f"r of at least {threshold:g}": bool(found.r >= threshold),
        f"at least {PROMPTS} prompts": found.n_prompts >= PROMPTS,
        "r above that of predictions dealt anew": bool(found.low > control.high),
        f"largest direct edge below {NOT_CAUSAL:g} times the largest effect": gain < NOT_CAUSAL,
    }
    return {
        **found._asdict(), "control_r": control.r, "linear_gain": gain, "threshold": threshold,
        "conditions": conditions,
        "verdict": "causal" if all(conditions.values()) else "not causal",
    }  # fmt: skip
