"""What experiment 007 makes of its divergences: tables from tables, no model. In nats a token."""

import itertools

import numpy as np
import pandas as pd
from ablation_orders import CONTROL, LAYERS
from scipy.stats import rankdata

from lens_utils import stats
from lens_utils.stats import Estimate

DRAWS = 2000
RANDOM = "random"


def kept(points: pd.DataFrame) -> pd.DataFrame:
    """The points of the run's own ablation, which comes first."""
    return points[points.ablation == points.ablation.iloc[0]]


def curves(points: pd.DataFrame) -> pd.DataFrame:
    """Mean divergence by kind of order and share, with a 95 % band.

    Resampled are texts for a score's order, and orders (means over their texts) for random ones.
    """
    frames = []
    for kind, rows in kept(points)[lambda t: t.kind != "none"].groupby("kind", sort=False):
        unit = "order" if rows.order.nunique() > 1 else "id"
        table = rows.pivot_table(index=unit, columns="share", values="kl")
        mean, low, high = stats.bands(table.to_numpy())
        heads = rows.groupby("share").heads.first()
        frames.append(
            pd.DataFrame({"kind": kind, "share": table.columns, "heads": heads.to_numpy(),
                          "mean": mean, "low": low, "high": high, "n": len(table),
                          "resampled": {"id": "texts", "order": "orders"}[unit]})
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def areas(points: pd.DataFrame, common: list[float], seed: int) -> pd.DataFrame:
    """Area under each kind's curve over that under the random orders', from 0 to the last common
    share (trapezoids over these, 0 at 0).

    Intervals: texts and random orders are resampled together. below: share of the random orders
    whose area is below the score's on the same texts.
    """
    rows = kept(points)
    area = _areas(rows, common)
    frames = []
    for kind, against in itertools.product(area, [RANDOM, *(k for k in area if "layers of" in k)]):
        if kind != against:
            found = ratio(area[kind].to_numpy(), area[against].to_numpy(), seed)
            frames.append(
                {"kind": kind, "against": against, "area": np.nanmean(area[kind])} | found
            )
    return pd.DataFrame(frames)


def _areas(rows: pd.DataFrame, common: list[float]) -> dict[str, pd.DataFrame]:
    """Of every kind: text by order, NaN where an order was not run on a text."""
    shares = np.array([0.0, *common])
    found = {}
    for kind, those in rows[rows.kind != "none"].groupby("kind", sort=False):
        at = those[those.share.isin(common)]
        table = at.pivot_table(index="id", columns=["order", "share"], values="kl", sort=False)
        names = list(dict.fromkeys(at.order))
        columns = {}
        for name in names:
            values = table[name][common].to_numpy()
            values = np.concatenate([np.zeros((len(values), 1)), values], axis=1)
            columns[name] = np.trapezoid(values, shares, axis=1)
        found[kind] = pd.DataFrame(columns, index=table.index).reindex(rows.id.unique())
    return found


def ratio(one: np.ndarray, other: np.ndarray, seed: int) -> dict[str, float]:
    """Mean of one over mean of other, both [text, order]; texts and orders are resampled."""
    rng = np.random.default_rng(seed)
    text = _weights(rng, len(one))
    value = _mean(one, np.ones((1, len(one))), np.ones((1, one.shape[1])))
    value = value / _mean(other, np.ones((1, len(one))), np.ones((1, other.shape[1])))
    drawn = _mean(one, text, _weights(rng, one.shape[1])) / _mean(
        other, text, _weights(rng, other.shape[1])
    )
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    below = np.nan
    if one.shape[1] == 1:
        same = np.where(np.isnan(other), np.nan, one)
        below = float(np.mean(np.nanmean(other, axis=0) < np.nanmean(same, axis=0)))
    return {"value": float(value[0]), "low": low, "high": high, "texts": len(one),
            "orders": other.shape[1], "below": below}  # fmt: skip


def _weights(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n is drawn, [draw, n]."""
    picks = rng.integers(n, size=(DRAWS, n))
    return np.stack([np.bincount(p, minlength=n) for p in picks]).astype(float)


def _mean(table: np.ndarray, text: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Weighted mean over what is there, for every draw."""
    there = ~np.isnan(table)
    total = np.einsum("dt,to,do->d", text, np.where(there, table, 0), order)
    return total / np.einsum("dt,to,do->d", text, there.astype(float), order)


def correlations(heads: pd.DataFrame, scores: list[str], seed: int) -> pd.DataFrame:
    """Spearman's rho of scores with `alone`, over all heads and within layers.

    Within layers: ranks less their layer's mean. Intervals resample whole layers.
    """
    parts = ["sts", "rtr", "sts_ccs", "rtr_ccs", "memory"]
    names = [*scores, *(p for p in parts if p in heads)]
    layer = heads.layer.to_numpy()
    groups = [np.flatnonzero(layer == at) for at in np.unique(layer)]
    rng = np.random.default_rng(seed)
    draws = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
             for _ in range(DRAWS)]  # fmt: skip
    frames = []
    for name in ["layer", *names]:
        one, other = (rankdata(heads[c], nan_policy="omit") for c in (name, "alone"))
        for within in (False, True):
            if within:
                if name == "layer":
                    continue
                one, other = (_less_means(x, groups) for x in (one, other))
            found = [_pearson(one[d], other[d]) for d in draws]
            low, high = np.nanpercentile(found, [2.5, 97.5])
            frames.append({"score": name, "within_layers": within, "value": _pearson(one, other),
                           "low": low, "high": high, "n": len(groups)})  # fmt: skip
    return pd.DataFrame(frames)


def _less_means(values: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    values = values.copy()
    for group in groups:
        values[group] -= np.nanmean(values[group])
    return values


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    there = ~np.isnan(one) & ~np.isnan(other)
    if there.sum() < 3 or np.ptp(one[there]) == 0 or np.ptp(other[there]) == 0:
        return float("nan")
    return float(np.corrcoef(one[there], other[there])[0, 1])


def reliability(single: pd.DataFrame) -> Estimate:
    """Spearman's rho of `alone` between halves of the texts: mean and range over all halvings."""
    table = single.pivot_table(index=["layer", "head"], columns="id", values="kl").to_numpy()
    n = table.shape[1]
    if n < 2:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    found = []
    for half in itertools.combinations(range(n), n // 2):
        rest = [i for i in range(n) if i not in half]
        ranks = (rankdata(table[:, list(part)].mean(1)) for part in (half, rest))
        found.append(_pearson(*ranks))
    return Estimate(value=float(np.mean(found)), low=min(found), high=max(found), n=n)


def ablations(points: pd.DataFrame, share: float) -> pd.DataFrame:
    """The orders that were run with every ablation, at the share where all were."""
    rows = points[(points.share == share) & (points.kind != "none")]
    by = rows.groupby("kind", sort=False).ablation.nunique()
    rows = rows[rows.kind.isin(by[by > 1].index)]
    frames = []
    for (ablation, kind), those in rows.groupby(["ablation", "kind"], sort=False):
        unit = "order" if those.order.nunique() > 1 else "id"
        found = stats.mean_ci(those.groupby(unit).kl.mean().to_numpy())
        frames.append({"ablation": ablation, "kind": kind, "share": share} | found)
    return pd.DataFrame(frames)


def summarise(
    points: pd.DataFrame,
    areas: pd.DataFrame,
    alike: pd.DataFrame,
    kinds: pd.DataFrame,
    single: pd.DataFrame,
    heads: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings."""
    rows = kept(points)
    n_texts = rows.id.nunique()
    out: dict[str, object] = {
        "heads": len(heads),
        "texts, for the orders": n_texts,
        "texts, for single heads": single.id.nunique(),
        "largest divergence with no head gone (nats)": float(
            points[points.kind == "none"].kl.abs().max()
        ),
        "ablation": rows.ablation.iloc[0],
    }
    out["divergence without one head, mean over heads (nats)"] = stats.mean_ci(
        single.kl.to_numpy(), single.id.to_numpy()
    )
    top = heads.sort_values("alone", ascending=False)
    first = top.iloc[0]
    out["head whose loss costs most"] = f"L{int(first['layer'])}H{int(first['head'])}"
    out["divergence without it (nats)"] = float(first.alone)
    tenth = top.alone.head(max(1, len(top) // 10)).sum() / top.alone.sum()
    out["share of the sum over heads that a tenth of them holds"] = float(tenth)
    out["rho of single-head divergences between halves of the texts (range)"] = reliability(single)
    for row in alike.itertuples():
        where = "within layers" if row.within_layers else "over all heads"
        out[f"rho of {row.score} with single-head divergence, {where}"] = _estimate(row, row.n)
    at = rows[rows.share == CONTROL]
    for kind, those in at.groupby("kind", sort=False):
        unit = "order" if those.order.nunique() > 1 else "id"
        out[f"divergence, 25 % gone, {kind} (nats)"] = stats.mean_ci(
            those.groupby(unit).kl.mean().to_numpy()
        )
    for row in areas[areas.against == RANDOM].itertuples():
        out[f"area against random, {row.kind}"] = _estimate(row, row.texts)
    for row in areas[areas.against.str.contains("layers of")].itertuples():
        end = "high" if row.against.endswith("high first") else "low"
        if row.kind == f"{LAYERS}, {end} first":
            out[f"area against random heads of the same layers, {row.kind}"] = _estimate(
                row, row.texts
            )
            out[f"random orders of the same layers below it, {row.kind}"] = float(row.below)
    for row in kinds[kinds.ablation != rows.ablation.iloc[0]].itertuples():
        out[f"divergence, 25 % gone, {row.ablation} ablation, {row.kind} (nats)"] = _estimate(
            row, row.n
        )
    return out


def _estimate(row, n: int) -> Estimate:
    return Estimate(value=float(row.value), low=float(row.low), high=float(row.high), n=int(n))
