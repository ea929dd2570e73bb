"""Profiles over relative depth in experiment 009: is one network's course that of another?

A network is a model on its own text, or its untrained twin reading that text. A head's value is its
score's rank among the network's heads, a layer's value the mean over its heads. Layers of different
models meet on one grid of relative depths, between whose points courses are straight. Published
courses are given as ranks of layers, and are compared with ours in the same form.
"""

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import pearsonr

from lens_utils import profiles

GRID = np.linspace(0, 100, 21)  # % of depth
DRAWS, SHUFFLES = 500, 1000
NETWORKS = {"own": "{}", "replayed": "{}, untrained"}  # by condition of 005
MEASURES = ("mmi", "ccs")


class Course(NamedTuple):
    """One network under one redundancy function."""

    network: str
    measure: str
    layer: np.ndarray
    """Of every head."""
    shares: np.ndarray
    """Of every head, 0 .. 1."""
    drawn: np.ndarray
    """The same of resampled prompts: [draw, head]."""
    prompts: int


def course(network: str, measure: str, pairs: dict, layer: np.ndarray, seed: int) -> Course:
    """From a stage of pairs of 005. The prompts are the same for all networks, and so are draws."""
    sts, rtr = (pairs[f"{atom}_heads"].numpy() for atom in ("sts", "rtr"))
    weights = profiles.resamples(len(sts), DRAWS, seed)
    value, drawn = (profiles.shares_over_prompts(sts, rtr, weights=w) for w in (None, weights))
    return Course(network, measure, layer, value, drawn, len(sts))


def depths(layer: np.ndarray) -> np.ndarray:
    """Relative depth of each layer, in %: 0 is the first, 100 the last."""
    at = np.unique(layer)
    return 100 * at / max(at.max(), 1)


def on_grid(course: Course, shares: np.ndarray, mode: str) -> np.ndarray:
    """Profiles of any number of score tables [..., head] at the depths of GRID."""
    profile = profiles.layer_profile(shares, course.layer, mode)
    rows = profile.reshape(-1, profile.shape[-1])
    found = np.stack([np.interp(GRID, depths(course.layer), row) for row in rows])
    return found.reshape(*profile.shape[:-1], len(GRID))


def of_networks(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of a table of 005 that are about a model's courses and its twin's."""
    kept = table.condition.isin(NETWORKS) & table.measure.isin(MEASURES)
    rows = table[kept & (table.score == "value_diff") & (table.family == "all")]
    return rows.assign(network=[NETWORKS[c].format(model) for c in rows.condition])


def shapes(table: pd.DataFrame, nodes: pd.DataFrame, model: str) -> pd.DataFrame:
    """Peak and hump (value) of both networks' courses, from shapes.csv of 005."""
    rows = of_networks(table, model).rename(columns={"hump": "value"})
    rows = rows[["network", "measure", "value", "low", "high", "n", "p_shuffled", "peak_layer"]]
    peak = 100 * rows.peak_layer / max(nodes.layer.max(), 1)
    return rows.assign(peak_depth_pct=peak, layers=nodes.layer.nunique(), heads=len(nodes))


def curves(measured: list[pd.DataFrame], published: list[dict]) -> pd.DataFrame:
    """Courses with 95 % bands over prompts from profiles.csv of 005; published ones as read off."""
    columns = ["network", "measure", "mode", "depth_pct", "mean", "low", "high"]
    frames = [rows[rows["mode"] != "minmax"][columns] for rows in measured]
    for model in published:
        at = np.arange(model["layers"])
        value = np.array(model["rank_of_layers"]) / (len(at) - 1)
        about = {"network": f"{model['model']} (published)", "measure": "mmi", "mode": "percentile"}
        held = {"depth_pct": depths(at), "mean": value, "low": np.nan, "high": np.nan}
        frames.append(pd.DataFrame(about | held))
    return pd.concat(frames, ignore_index=True)


def likeness(courses: list[Course], published: list[dict], seed: int) -> pd.DataFrame:
    """Pearson correlation of every two courses of one redundancy function over the grid.

    Intervals resample prompts, the same ones for both. p_shuffled: share of shuffles of the first
    network's heads over its layers that correlate as strongly, whatever the sign.
    """
    rows, rng = [], np.random.default_rng(seed)
    for one, other in itertools.combinations(courses, 2):
        if one.measure == other.measure:
            sides = [on_grid(c, c.drawn, "raw") for c in (one, other)]
            theirs = on_grid(other, other.shares, "raw")
            rows.append(_likeness(one, "raw", theirs, other.network, sides, rng))
    for one, model in itertools.product(courses, published):
        ranks = np.array(model["rank_of_layers"], float)
        theirs = np.interp(GRID, depths(np.arange(len(ranks))), ranks / (len(ranks) - 1))
        drawn = on_grid(one, one.drawn, "percentile")
        sides = [drawn, np.broadcast_to(theirs, drawn.shape)]
        name = f"{model['model']} (published)"
        rows.append(_likeness(one, "percentile", theirs, name, sides, rng))
    return pd.DataFrame(rows)


def _likeness(
    one: Course, mode: str, theirs: np.ndarray, name: str, sides: list[np.ndarray],
    rng: np.random.Generator,
) -> dict:  # fmt: skip
    value = float(pearsonr(on_grid(one, one.shares, mode), theirs).statistic)
    low, high = profiles.interval(np.asarray(value), pearsonr(*sides, axis=-1).statistic)
    shuffled = rng.permuted(np.tile(one.shares, (SHUFFLES, 1)), axis=1)
    null = pearsonr(on_grid(one, shuffled, mode), theirs[None], axis=-1).statistic
    return {
        "one": one.network, "other": name, "measure": one.measure, "mode": mode, "value": value,
        "low": max(float(low), -1.0), "high": min(float(high), 1.0), "n": one.prompts,
        "p_shuffled": float((1 + (np.abs(null) >= abs(value)).sum()) / (1 + SHUFFLES)),
    }  # fmt: skip
