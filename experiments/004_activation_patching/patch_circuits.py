"""What experiment 004 makes of gradient scores, paths and circuits: tables from tables."""

import numpy as np
import pandas as pd
from numpy import ndarray
from patch_tables import RESAMPLES, averaged, spearman

PLACES = ("task", "template", "component", "layer", "head")


def nodes(guesses: pd.DataFrame) -> pd.DataFrame:
    """Mean over pairs of what patching a node restores, in nats: guessed and exact."""
    values = ["plain", "integrated", "exact"]
    return guesses.groupby(list(PLACES), sort=False, as_index=False)[values].mean()


def fits(guesses: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Correlation over nodes of guessed and exact mean effects, and slope of guess on truth.

    95 % bootstrap intervals over groups of pairs; nodes: how many, n: how many groups.
    """
    rows = []
    for (task, template, component), one in guesses.groupby(["task", "template", "component"],
                                                            sort=False):  # fmt: skip
        tables = {
            name: one.pivot_table(index="group", columns=["layer", "head"], values=name).to_numpy(
                float
            )
            for name in ("plain", "integrated", "exact")
        }
        n = len(tables["exact"])
        rng = np.random.default_rng(seed)
        picks = rng.integers(n, size=(RESAMPLES, n))
        weights = np.stack([np.bincount(p, minlength=n) for p in picks]) / n
        for guess in ("plain", "integrated"):
            drawn = [weights @ tables[name] for name in (guess, "exact")]
            whole = [tables[name].mean(0, keepdims=True) for name in (guess, "exact")]
            row = {"task": task, "template": template, "component": component, "guess": guess}
            for name, measure in (("r", pearson), ("rho", spearman), ("slope", slope)):
                low, high = np.percentile(measure(*drawn), [2.5, 97.5])
                value = measure(*whole)[0]
                # Of two groups a resample can be the sample itself, but for its last digit.
                row |= {
                    name: value,
                    f"{name}_low": min(low, value),
                    f"{name}_high": max(high, value),
                }
            rows.append(row | {"nodes": tables["exact"].shape[1], "n": n})
    return pd.DataFrame(rows)


def pearson(x: ndarray, y: ndarray) -> ndarray:
    """Correlation of every row."""
    one, other = (z - z.mean(1, keepdims=True) for z in (x, y))
    return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))


def slope(guess: ndarray, exact: ndarray) -> ndarray:
    """How much of a true effect the guess shows, by least squares through the origin."""
    return (guess * exact).sum(1) / (exact**2).sum(1)


def routes(paths: pd.DataFrame) -> pd.DataFrame:
    """Share of clean - corrupt that single edges restore, the strongest twelve of each receiver."""
    frames = []
    for _, one in paths.groupby(["task", "template", "receiver", "part"], sort=False):
        table = averaged(one, ["task", "template", "receiver", "part"], ["sender"])
        frames.append(table.loc[table["mean"].abs().nlargest(12).index])
    return pd.concat(frames, ignore_index=True)


def circuits(kept: pd.DataFrame) -> pd.DataFrame:
    """Share of clean - corrupt that circuits of so many edges keep, on held-out pairs."""
    share = (kept.logit_diff - kept.corrupt) / (kept.clean - kept.corrupt)
    table = averaged(kept.assign(effect=share), ["task", "template", "order"], ["edges", "of"])
    return table.assign(kept_pct=100 * table.edges / table.of)
