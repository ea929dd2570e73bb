"""From curves and lists of layers to the tables of 016."""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
from synthesis_inputs import ABILITIES

from lens_utils import stats, synthesis
from lens_utils.stats import Estimate
from lens_utils.synthesis import Curve

TOGETHER = "all methods"
FOREIGN = ("end turned", "other maze's trace")  # traces that lead to another answer
BY_GAIN = "all methods, probes by what each layer adds"


def estimate(row: Any) -> Estimate:
    """The estimate in a row of a table."""
    return Estimate(value=float(row.value), low=float(row.low), high=float(row.high), n=int(row.n))


def first(table: pd.DataFrame | None, **where: Any) -> Any:
    """The first row with these values, or None."""
    if table is None or table.empty:
        return None
    for name, value in where.items():
        table = table[table[name] == value]
    return next(table.itertuples(), None)


def curve(rows: pd.DataFrame) -> Curve:
    """The curve of one method and ability."""
    rows = rows.sort_values("layer")
    return Curve(*(rows[name].to_numpy(float) for name in ("value", "low", "high")))


def whole(curves: pd.DataFrame) -> dict[str, dict[str, Curve]]:
    """Curves without gaps, by ability and method."""
    found: dict[str, dict[str, Curve]] = {}
    for (ability, method), rows in curves.groupby(["ability", "method"], sort=False):
        if rows.value.notna().all():
            found.setdefault(ability, {})[method] = curve(rows)
    return found


def _gained(values: np.ndarray) -> np.ndarray:
    """What each layer adds; the first one's share is what it has."""
    return np.diff(values, prepend=0.0)


def agreement(curves: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How alike the methods' curves of an ability are: all together and two by two.

    A probe reads what any earlier layer wrote, so its curve is a sum over layers; what each layer
    adds to it stands beside. q: p of all methods, Benjamini and Hochberg over abilities.
    """
    rows = []
    for ability, held in whole(curves).items():
        values = {name: c.value for name, c in held.items()}
        sets = {TOGETHER: list(values.values())}
        if "probes" in values:
            by_gain = values | {"probes": _gained(values["probes"])}
            sets[BY_GAIN] = list(by_gain.values())
        for one, other in itertools.combinations(values, 2):
            sets[f"{one} and {other}"] = [values[one], values[other]]
        for name, some in sets.items():
            found = synthesis.agreement(np.stack(some), seed)
            rows.append({"ability": ability, "methods": name, "n_methods": len(some),
                         **found._asdict()})  # fmt: skip
    names = ["ability", "methods", "n_methods", "rho", "p", "floor"]
    return _with_q(pd.DataFrame(rows, columns=names))


def turns(curves: pd.DataFrame) -> pd.DataFrame:
    """The correlation of every two methods with one of them turned by so many layers."""
    rows = []
    for ability, held in whole(curves).items():
        found = synthesis.correlations(np.stack([c.value for c in held.values()]))
        for (a, one), (b, other) in itertools.combinations(enumerate(held), 2):
            rows += [{"ability": ability, "methods": f"{one} and {other}", "turned": by, "rho": rho}
                     for by, rho in enumerate(found[a, b])]  # fmt: skip
    return pd.DataFrame(rows, columns=["ability", "methods", "turned", "rho"])


def overlap(lists: pd.DataFrame) -> pd.DataFrame:
    """Layers that several methods list for an ability, against random lists of these lengths."""
    rows = []
    for ability, some in lists.groupby("ability", sort=False):
        named = {name: g.layer.tolist() for name, g in some.groupby("method", sort=False)}
        sets = {TOGETHER: list(named.values())} if len(named) > 1 else {}
        for one, other in itertools.combinations(named, 2):
            sets[f"{one} and {other}"] = [named[one], named[other]]
        for name, each in sets.items():
            found = synthesis.overlap(each, int(some.n_layers.iloc[0]))
            rows.append({"ability": ability, "methods": name, "n_methods": len(each),
                         "lengths": " ".join(str(len(e)) for e in each),
                         "shared": len(found.shared), "layers": _listed(found.shared),
                         "expected": found.expected, "p": found.p, "floor": found.floor,
                         "agreement_pct": 100 * len(found.shared) / min(map(len, each)),
                         })  # fmt: skip
    names = ["ability", "methods", "n_methods", "lengths", "shared", "layers", "expected", "p",
             "floor", "agreement_pct"]  # fmt: skip
    return _with_q(pd.DataFrame(rows, columns=names))


def _listed(layers: list[int]) -> str:
    return " ".join(f"L{layer}" for layer in layers) or "none"


def _with_q(table: pd.DataFrame) -> pd.DataFrame:
    """Add q over the abilities, of the rows of all methods."""
    from scipy.stats import false_discovery_control

    table = table.assign(q=math.nan)
    for name in (TOGETHER, BY_GAIN):
        rows = (table.methods == name) & table.p.notna()
        if rows.any():
            table.loc[rows, "q"] = false_discovery_control(table.p[rows])
    return table


def depths(curves: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Centre of mass of every curve, in percent of depth."""
    rows = [
        {"ability": ability, "method": method, **synthesis.depth(one, seed)}
        for ability, held in whole(curves).items()
        for method, one in held.items()
    ]
    return pd.DataFrame(rows, columns=["ability", "method", "value", "low", "high", "n"])


def gaps(curves: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How much deeper the later ability of the hierarchy lies, by method and over methods."""
    rows, held = [], whole(curves)
    for first, second in itertools.combinations([a for a in ABILITIES if a in held], 2):
        both = [m for m in held[first] if m in held[second]]
        for name, some in {TOGETHER: both, **{m: [m] for m in both}}.items():
            found = synthesis.deeper(
                [held[second][m] for m in some], [held[first][m] for m in some], seed
            )
            rows.append({"shallow": first, "deep": second, "methods": name, **found})
    return pd.DataFrame(rows, columns=["shallow", "deep", "methods", "value", "low", "high", "n"])


def modes(accuracy: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Right answers in either mode, and thinking less direct, in points; intervals over mazes."""
    rows = []
    for ability, some in accuracy.groupby("ability", sort=False):
        wide = 100 * some.pivot(index="maze_id", columns="mode", values="correct")
        named = {mode: wide[mode] for mode in wide}
        if {"direct", "thinking"} <= named.keys():
            named["thinking less direct"] = (wide.thinking - wide.direct).dropna()
        for name, values in named.items():
            here = some[some["mode"] == name]
            rows.append({"ability": ability, "measure": name,
                         **stats.mean_ci(values.to_numpy(float), None, seed),
                         "cut_pct": 100 * here.truncated.mean() if len(here) else math.nan,
                         "tokens": here.n_tokens.mean() if len(here) else math.nan})  # fmt: skip
    names = ["ability", "measure", "value", "low", "high", "n", "cut_pct", "tokens"]
    return pd.DataFrame(rows, columns=names)


def traces(answers: pd.DataFrame | None, seed: int) -> pd.DataFrame:
    """What answers to a trace put into the model's mouth have to do with it, in points.

    right: the own trace less this one, paired by maze; follows: share that follows it, less half.
    """
    rows = []
    for ability, some in () if answers is None else answers.groupby("task", sort=False):
        some = some.astype({"right": float, "follows": float})
        wide = some.pivot_table(index="maze_id", columns="condition", values="right")
        for condition, here in some.groupby("condition", sort=False):
            held = {}
            if condition in FOREIGN:
                held["follows"] = 100 * here.groupby("maze_id").follows.mean() - 50
            if "own trace" in wide and condition != "own trace":
                held["right"] = 100 * (wide["own trace"] - wide[condition]).dropna()
            rows += [{"ability": ability, "condition": condition, "measure": name,
                      **stats.mean_ci(values.to_numpy(float), None, seed)}
                     for name, values in held.items()]  # fmt: skip
    return pd.DataFrame(
        rows, columns=["ability", "condition", "measure", "value", "low", "high", "n"]
    )
