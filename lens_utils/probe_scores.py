"""What probes' log-odds are worth: accuracy, confidence, code length, flow, directions.

Both classes count alike everywhere, so chance is 0.5 whatever the balance of a label: accuracy is
the mean of the two classes' accuracies, and precision is that of a test with as many of either.

Log-odds are held-out ones; a row that nobody predicted (NaN) is left out.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from einops import einsum
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from scipy.special import expit
from sklearn.metrics import roc_auc_score

DRAWS = 1000
BINS = 10  # of confidence, for calibration


def balance(
    labels: Bool[ndarray, " sample"], known: Bool[ndarray, " sample"]
) -> Float[ndarray, " sample"]:
    """Weights of the rows that are known, half of them on either class; they add to 1."""
    yes, no = labels & known, ~labels & known
    return 0.5 * (yes / max(yes.sum(), 1) + no / max(no.sum(), 1))


def standard(
    labels: Bool[ndarray, " sample"], logits: Float[ndarray, " sample"]
) -> dict[str, float]:
    """accuracy, precision, recall, f1, auc and n; NaN without both classes."""
    known = ~np.isnan(logits)
    y, z = labels[known], logits[known]
    if y.all() or not y.any():
        nothing = dict.fromkeys(("accuracy", "precision", "recall", "f1", "auc"), float("nan"))
        return nothing | {"n": int(known.sum())}
    right, false = float((z[y] > 0).mean()), float((z[~y] > 0).mean())
    return {
        "accuracy": (right + 1 - false) / 2,
        "precision": right / (right + false) if right + false else 0.0,
        "recall": right,
        "f1": 2 * right / (1 + right + false),
        "auc": float(roc_auc_score(y, z)),
        "n": int(known.sum()),
    }


def intervals(
    labels: Bool[ndarray, " sample"],
    right: Float[ndarray, "cell sample"],
    clusters: Shaped[ndarray, " sample"],
    seed: int = 0,
) -> Float[ndarray, "draw cell"]:
    """Accuracies under resampling of whole clusters; percentiles of a column are its interval.

    right: 1 or 0, NaN where nothing was predicted. The same draws serve all cells, so columns can
    be subtracted from each other.
    """
    names, number = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(names), size=(DRAWS, len(names)))
    drawn = np.stack([np.bincount(p, minlength=len(names)) for p in picks]).astype(float)
    member = np.zeros((len(names), len(number)))
    member[number, np.arange(len(number))] = 1
    known = ~np.isnan(right)
    halves = []
    for side in (labels, ~labels):
        hits = member @ (np.nan_to_num(right) * side).T  # clusters x cells
        counts = member @ (known * side).T
        with np.errstate(invalid="ignore", divide="ignore"):
            halves.append((drawn @ hits) / (drawn @ counts))
    return np.asarray((halves[0] + halves[1]) / 2)


def interval(draws: Float[ndarray, "draw cell"]) -> tuple[ndarray, ndarray]:
    """The 95 % percentile interval of every column, low and high."""
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    return low, high


def confidence(
    labels: Bool[ndarray, " sample"], logits: Float[ndarray, " sample"]
) -> dict[str, float]:
    """How sure a probe is, where it is right and where it is wrong, and whether it may be.

    confidence: mean of max(p, 1 - p); true_class: mean p of the true class; ece: mean distance of
    confidence and accuracy over ten equal bins of confidence (Guo et al. 2017); brier: mean
    squared error of p. Rows are weighted so that both classes count alike.
    """
    weight = balance(labels, ~np.isnan(logits))
    p = expit(np.nan_to_num(logits))
    sure, right = np.maximum(p, 1 - p), (p > 0.5) == labels
    place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)

    def mean(values: ndarray, rows: ndarray) -> float:
        total = weight[rows].sum()
        return float((values * weight)[rows].sum() / total) if total else float("nan")

    bins = [place == at for at in range(BINS)]
    gaps = [abs(float(((sure - right) * weight)[rows].sum())) for rows in bins]
    return {
        "confidence": mean(sure, weight > 0),
        "true_class": mean(np.where(labels, p, 1 - p), weight > 0),
        "when_right": mean(sure, right & (weight > 0)),
        "when_wrong": mean(sure, ~right & (weight > 0)),
        "ece": sum(gaps),
        "brier": mean((p - labels) ** 2, weight > 0),
    }


def reliability(
    labels: Bool[ndarray, " sample"], logits: Float[ndarray, " sample"]
) -> pd.DataFrame:
    """Of every bin of confidence: mean confidence, accuracy and share of the rows."""
    weight = balance(labels, ~np.isnan(logits))
    p = expit(np.nan_to_num(logits))
    sure, right = np.maximum(p, 1 - p), (p > 0.5) == labels
    rows = pd.DataFrame({
        "bin": np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1),
        "share": weight, "confidence": sure * weight, "accuracy": right * weight,
    })[weight > 0]  # fmt: skip
    found = rows.groupby("bin").sum()
    found[["confidence", "accuracy"]] = found[["confidence", "accuracy"]].div(found.share, axis=0)
    return found.reset_index()


def bits(
    labels: Bool[ndarray, " sample"], logits: Float[ndarray, "*cell sample"]
) -> Float[ndarray, "*cell sample"]:
    """Code length of every label under the predicted probability: -log2 p(true), in bits."""
    signed = np.where(labels, logits, -logits)
    return np.asarray(np.logaddexp(0, -signed) / np.log(2))


def saturation(curve: Float[ndarray, " layer"], threshold: float = 0.01) -> int:
    """The first step whose gain is below the threshold: where a curve stops to rise."""
    small = np.flatnonzero(np.diff(curve) < threshold)
    return int(small[0]) if len(small) else len(curve) - 1


def near_top(curve: Float[ndarray, " layer"], within: float = 0.01) -> int:
    """The first place within so much of the curve's maximum."""
    return int(np.flatnonzero(curve >= np.nanmax(curve) - within)[0])


def components(
    weights: Float[ndarray, "layer feature"], share: float = 0.8
) -> tuple[int, Float[ndarray, " component"], Float[ndarray, "layer component"]]:
    """PCA of unit weight vectors over layers: PCs for a share of variance, the variance of each
    as a share, and the layers' coordinates."""
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    explained = values**2 / (values**2).sum()
    n = int(np.searchsorted(np.cumsum(explained), share - 1e-9) + 1)
    return n, np.asarray(explained), np.asarray(left * values)


def cosines(weights: Float[ndarray, "*group problem feature"]) -> Float[ndarray, "*group p p"]:
    """Cosine of every pair of directions; NaN with one of no length (nothing could be read)."""
    length = np.linalg.norm(weights, axis=-1, keepdims=True)
    unit = weights / np.where(length > 0, length, np.nan)
    return np.asarray(einsum(unit, unit, "... one feature, ... other feature -> ... one other"))


def transitions(right: Bool[ndarray, "layer sample"], edge: int) -> dict[str, Int[ndarray, " _"]]:
    """Rows by their course over layers, as row numbers.

    always_wrong; early_wrong_late_right: wrong at most of the first `edge` layers and right at
    most of the last `edge`; late_wrong: the other way round.
    """
    early, late = right[:edge].mean(0) > 0.5, right[-edge:].mean(0) > 0.5
    return {
        "always_wrong": np.flatnonzero(~right.any(0)),
        "early_wrong_late_right": np.flatnonzero(~early & late),
        "early_right_late_wrong": np.flatnonzero(early & ~late),
        "always_right": np.flatnonzero(right.all(0)),
    }


def permuted(
    labels: Bool[ndarray, "label sample"],
    types: Shaped[ndarray, " sample"],
    rng: np.random.Generator,
) -> Bool[ndarray, "label sample"]:
    """Labels that are dealt anew to the types of rows, all labels of a type together.

    A type takes the labels of another one, so nesting and, where types are equally frequent, the
    balance stay. With wordings as types this is the control task of Hewitt & Liang (2019,
    arXiv:1909.03368): as learnable by rote, and without meaning. Labels have to be the same in all
    rows of a type.
    """
    names, first, number = np.unique(types, return_index=True, return_inverse=True)
    held = labels[:, first]
    return held[:, rng.permutation(len(names))][:, number]


def ranked(curve: Sequence[float]) -> list[int]:
    """Layers by value, best first; of equal ones the earlier."""
    return np.argsort(-np.asarray(curve), kind="stable").tolist()
