"""Which features tell labelled spans: backtracking, verification, the steps of a trace.

Of thousands of features some tell any span by chance. So, for every span, the best feature is
chosen on rows for fitting and its AUROC is reported on others; and the same is done again with
labels that are moved along the text (each row's names shifted in a circle, which keeps how long
spans are and how often they come). A span has a feature of its own if the best one beats what the
best of as many features reach with moved labels.

The AUROC of all features for all labels, real and moved, is one sparse product: ranks of the
features' values times indicators of the labels.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse

from lens_utils.feature_labels import Fires, Pool, auroc, ranks

FEWEST = 10
"""Tokens of a span on either side without which nothing is said of it."""


def span_aurocs(
    fires: Fires,
    token: Int[ndarray, " pool"],
    indicator: Bool[ndarray, "pool column"],
    n_features: int,
) -> Float[ndarray, "feature column"]:
    """AUROC of every feature's value (0 where it is silent) for every column, over the pool.

    token: the pool's tokens in ascending order; fires: all fires at them.
    """
    weight, base = ranks(fires, len(token), n_features)
    place = np.searchsorted(token, fires.token)
    table = sparse.csr_matrix((weight, (fires.feature, place)), shape=(n_features, len(token)))
    positives = indicator.sum(0)
    summed = table @ indicator.astype(np.float64) + base[:, None] * positives
    return auroc(summed, np.broadcast_to(positives, summed.shape), len(token))


def moved(
    codes: Int[ndarray, " token"], row: Int[ndarray, " token"], rng: np.random.Generator
) -> Int[ndarray, " token"]:
    """Every row's codes shifted in a circle by a number drawn for the row."""
    _, start, length = np.unique(row, return_index=True, return_counts=True)
    shift = rng.integers(length)
    at = np.arange(len(row))
    n = np.repeat(np.arange(len(start)), length)
    return codes[start[n] + (at - start[n] + shift[n]) % length[n]]


def best_of_each(
    pool: Pool,
    held: Bool[ndarray, " token"],
    row: Int[ndarray, " token"],
    codes: Int[ndarray, " token"],
    names: Sequence[str],
    n_features: int,
    draws: int = 99,
    seed: int = 0,
) -> pd.DataFrame:
    """The best of these features for every span: span, draw, feature, fitted, auroc, n.

    draw 0 are the real labels, all others moved ones (the same for every layer of one seed).
    fitted: AUROC where it was chosen; auroc: of the same feature on held-out tokens; n: held-out
    tokens of the pool in the span. Tokens of code -1 are left out: spans are told from each other,
    not from text of another kind.
    """
    inside = codes >= 0
    number = np.cumsum(inside) - 1
    pool = pool.where(inside)
    pool = Pool(number[pool.token], pool.fires._replace(token=number[pool.fires.token]))
    held, row, codes = held[inside], row[inside], codes[inside]
    rng = np.random.default_rng(seed)
    versions = [codes, *(moved(codes, row, rng) for _ in range(draws))]
    sides = []
    for at in (~held, held):
        part = pool.where(at)
        indicator = np.concatenate(
            [version[part.token][:, None] == np.arange(len(names)) for version in versions], axis=1
        )
        found = span_aurocs(part.fires, part.token, indicator, n_features)
        shape = (draws + 1, len(names))
        sides.append((found.reshape(n_features, *shape), indicator.sum(0).reshape(shape)))
    (fitted, n_fit), (tested, n_test) = sides
    rows = []
    for number, name in enumerate(names):
        if min(n_fit[0, number], n_test[0, number]) < FEWEST:
            continue
        of = np.nan_to_num(fitted[:, :, number], nan=0.5)
        best, every = of.argmax(0), np.arange(draws + 1)
        rows.append(pd.DataFrame({
            "span": name, "draw": every, "feature": best, "fitted": of[best, every],
            "auroc": tested[best, every, number], "n": n_test[:, number],
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def of_all(found: pd.DataFrame) -> pd.DataFrame:
    """The best of all layers: span, layer, feature, fitted, auroc, n, null_fitted, null, null_high,
    p; found: `best_of_each` of every layer, with a column layer.

    null_fitted, null, null_high: means and the largest of moved labels' best features, chosen
    among all layers as well; p: share of draws (and this one) that reach the held-out AUROC.
    """
    if not len(found):
        return found
    best = found.loc[found.groupby(["span", "draw"]).fitted.idxmax()]
    real, null = best[best.draw == 0].set_index("span"), best[best.draw > 0].groupby("span")
    out = real[["layer", "feature", "fitted", "auroc", "n"]].copy()
    out["null_fitted"], out["null"] = null.fitted.mean(), null.auroc.mean()
    out["null_high"] = null.auroc.max()
    reached = {span: int((of.auroc >= out.auroc[span]).sum()) for span, of in null}
    out["p"] = [(1 + reached.get(span, 0)) / (1 + null.size().get(span, 0)) for span in out.index]
    return out.reset_index().sort_values("auroc", ascending=False, ignore_index=True)
