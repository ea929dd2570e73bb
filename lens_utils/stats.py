"""Intervals and tests, on arrays: thin names over SciPy, with the lab's defaults fixed once."""

from typing import TypedDict

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from scipy import stats

RESAMPLES = 10_000


class Estimate(TypedDict):
    """A mean with its 95 % interval and its n, as summary.json and the findings show it."""

    value: float
    low: float
    high: float
    n: int


def mean_ci(
    values: Shaped[ndarray, " sample"],
    clusters: Shaped[ndarray, " sample"] | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean with a 95 % percentile bootstrap interval over samples, or over whole clusters.

    With `clusters`, the clusters' means are resampled: samples of one cluster (a country asked
    about in two ways) are not independent. NaN values are left out; n counts what is resampled.
    """
    values = np.asarray(values, dtype=float)
    kept = ~np.isnan(values)
    values = values[kept]
    if clusters is not None:
        labels = np.asarray(clusters)[kept]
        values = np.array([values[labels == label].mean() for label in np.unique(labels)])
    if len(values) == 0:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    mean = float(values.mean())
    if len(values) == 1 or np.ptp(values) == 0:
        return Estimate(value=mean, low=mean, high=mean, n=len(values))
    rng = np.random.default_rng(seed)
    resampled = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng
    )
    interval = resampled.confidence_interval
    return Estimate(value=mean, low=float(interval.low), high=float(interval.high), n=len(values))


def bands(
    table: Float[ndarray, "sample point"], seed: int = 0
) -> tuple[Float[ndarray, " point"], Float[ndarray, " point"], Float[ndarray, " point"]]:
    """Mean curve and its pointwise 95 % bootstrap band, resampling whole rows."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(table), size=(1000, len(table)))
    # Row weights turn the resampling into one matrix product.
    weights = np.stack([np.bincount(p, minlength=len(table)) for p in picks]) / len(table)
    low, high = np.percentile(weights @ table, [2.5, 97.5], axis=0)
    return table.mean(0), low, high


def sign_flip_p(differences: Float[ndarray, " pair"], seed: int = 0) -> float:
    """Two-sided p of a zero mean of paired differences, by flipping their signs.

    Exact up to 13 pairs, else 10,000 random flips (SciPy's permutation_test on samples).
    """
    return float(
        stats.permutation_test(
            (np.asarray(differences, dtype=float),),
            np.mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(seed),
        ).pvalue
    )
