"""What experiment 004 still asks of its guesses and circuits: where they fail, how few edges do."""

import numpy as np
import pandas as pd
from numpy import ndarray

RESAMPLES = 1000
ENOUGH = 0.8


def misses(guesses: pd.DataFrame, most: int = 8) -> pd.DataFrame:
    """The nodes of each wording whose effect is guessed worst, by the plain form, in nats.

    Means over pairs; `missed` is guess - exact, for the plain and for the integrated form.
    """
    places = ["task", "template", "component", "layer", "head"]
    table = guesses.groupby(places, sort=False, as_index=False)[["plain", "integrated", "exact"]]
    table = table.mean()
    table["missed"] = table.plain - table.exact
    table["missed_integrated"] = table.integrated - table.exact
    frames = []
    for _, one in table.groupby(["task", "template"], sort=False):
        worst = one.loc[one.missed.abs().nlargest(most).index]
        frames.append(worst.assign(rank=range(1, len(worst) + 1)))
    return pd.concat(frames, ignore_index=True)


def needed(kept: pd.DataFrame, seed: int, enough: float = ENOUGH) -> pd.DataFrame:
    """How many edges, by each order, until a circuit keeps `enough` of clean - corrupt for good.

    Faithfulness is mean restored over mean clean - corrupt; between the numbers tried it is drawn
    straight over log edges. 95 % bootstrap intervals over groups of pairs; n: how many groups.
    """
    rows = []
    for (task, template, order), one in kept.groupby(["task", "template", "order"], sort=False):
        values = one.assign(restored=one.logit_diff - one.corrupt, gap=one.clean - one.corrupt)
        restored = values.pivot_table(index="group", columns="edges", values="restored")
        gap = values.pivot_table(index="group", columns="edges", values="gap").to_numpy()
        sizes, n = restored.columns.to_numpy(float), len(restored)
        picks = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
        weights = np.stack([np.bincount(p, minlength=n) for p in picks])
        drawn = crossing(sizes, (weights @ restored.to_numpy()) / (weights @ gap), enough)
        whole = crossing(sizes, restored.to_numpy().sum(0, keepdims=True) / gap.sum(0), enough)
        low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
        total = int(one.of.iloc[0])
        rows.append({"task": task, "template": template, "order": order, "share": enough,
                     "edges": whole[0], "low": low, "high": high, "of": total,
                     "kept_pct": 100 * whole[0] / total, "n": n})  # fmt: skip
    return pd.DataFrame(rows)


def crossing(sizes: ndarray, curves: ndarray, enough: float) -> ndarray:
    """For every curve [curve, size] the size from which on it stays at or above `enough`.

    The first size where it always is; infinite where it ends below.
    """
    found = []
    for curve in curves:
        below = np.flatnonzero(curve < enough)
        if len(below) == 0:
            found.append(sizes[0])
        elif below[-1] == len(sizes) - 1:
            found.append(np.inf)
        else:
            at = below[-1]
            part = (enough - curve[at]) / (curve[at + 1] - curve[at])
            found.append(np.exp(np.log(sizes[at]) + part * np.log(sizes[at + 1] / sizes[at])))
    return np.array(found)
