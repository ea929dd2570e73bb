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

from lens_utils import profiles

GRID = np.linspace(0, 100, 21)  # % of depth
DRAWS, SHUFFLES = 500, 1000


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


def curves(courses: list[Course], published: list[dict]) -> pd.DataFrame:
    """Every course with a 95 % band over prompts; published ones as they were read off."""
    frames = []
    for one in courses:
        for mode in ("raw", "percentile"):
            middle = profiles.layer_profile(one.shares, one.layer, mode)
            drawn = profiles.layer_profile(one.drawn, one.layer, mode)
            low, high = profiles.interval(middle, drawn)
            about = {"network": one.network, "measure": one.measure, "mode": mode}
            held = {"depth_pct": depths(one.layer), "mean": middle, "low": low, "high": high}
            frames.append(pd.DataFrame(about | held))
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
    value = float(pearson(on_grid(one, one.shares, mode), theirs))
    low, high = profiles.interval(np.asarray(value), pearson(*sides))
    shuffled = rng.permuted(np.tile(one.shares, (SHUFFLES, 1)), axis=1)
    null = pearson(on_grid(one, shuffled, mode), theirs)
    return {
        "one": one.network, "other": name, "measure": one.measure, "mode": mode, "value": value,
        "low": max(float(low), -1.0), "high": min(float(high), 1.0), "n": one.prompts,
        "p_shuffled": float((1 + (np.abs(null) >= abs(value)).sum()) / (1 + SHUFFLES)),
    }  # fmt: skip


def pearson(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation along the last axis."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (one, other))
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def shapes(courses: list[Course], seed: int) -> pd.DataFrame:
    """Peak and hump of every course; hump > 0 is an inverted U."""
    rows, rng = [], np.random.default_rng(seed)
    for one in courses:
        raw = profiles.layer_profile(one.shares, one.layer)
        hump = float(profiles.hump(raw))
        drawn = profiles.hump(profiles.layer_profile(one.drawn, one.layer))
        low, high = profiles.interval(np.asarray(hump), drawn)
        mixed = rng.permuted(np.tile(one.shares, (SHUFFLES, 1)), axis=1)
        null = profiles.hump(profiles.layer_profile(mixed, one.layer))
        rows.append(
            {"network": one.network, "measure": one.measure, "layers": len(raw),
             "heads": len(one.shares), "peak_depth_pct": depths(one.layer)[int(np.nanargmax(raw))],
             "value": hump, "low": float(low), "high": float(high), "n": one.prompts,
             "p_shuffled": float((1 + (null >= hump).sum()) / (1 + SHUFFLES))}
        )  # fmt: skip
    return pd.DataFrame(rows)
