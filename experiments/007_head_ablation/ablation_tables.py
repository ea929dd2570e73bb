"""What experiment 007 makes of its divergences: tables from tables, no model. In nats a token."""

import itertools

import numpy as np
import pandas as pd
from ablation_orders import CONTROL, LAYERS, RANDOM
from einops import einsum
from scipy.stats import rankdata

from lens_utils import stats
from lens_utils.stats import Estimate

DRAWS = 2000
ENDS = ("none", "all")  # no head gone, every head gone: no order's
PARTS = ("sts", "rtr", "sts_ccs", "rtr_ccs")  # of 005's scores, to be compared with `alone`


def own(points: pd.DataFrame) -> pd.DataFrame:
    """The points of the run's own ablation, which comes first, without no head and all heads."""
    return points[(points.ablation == points.ablation.iloc[0]) & ~points.kind.isin(ENDS)]


def curves(points: pd.DataFrame) -> pd.DataFrame:
    """Mean divergence by kind of order and share, with a 95 % band.

    Resampled are texts for a score's order, and orders (means over their texts) for random ones.
    """
    frames = []
    for kind, rows in own(points).groupby("kind", sort=False):
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
    """Area under each kind's curve over that under random orders', and under random orders' that
    keep the layers, from 0 to the last common share (trapezoids over these, 0 at 0).

    Intervals: texts and random orders are resampled together. below: share of the random orders
    whose area is below the score's on the same texts.
    """
    rows = own(points)
    at = rows[rows.share.isin(common)].sort_values("share")
    at = at.groupby(["kind", "order", "id"], sort=False)
    area = at.kl.agg(lambda kl: np.trapezoid([0.0, *kl], [0.0, *common])).rename("area")
    by_kind = tables(area.reset_index(), "area")
    against = [kind for kind in by_kind if kind.startswith(RANDOM)]
    return pd.DataFrame(
        {"kind": kind, "against": other, "area": np.nanmean(by_kind[kind])}
        | ratio(by_kind[kind], by_kind[other], seed)
        for kind, other in itertools.product(by_kind, against)
        if kind != other
    )


def ablations(points: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Of every ablation at one share: mean divergence of an order over that of random orders."""
    frames = []
    for ablation, rows in points[points.share == CONTROL].groupby("ablation", sort=False):
        by_kind = tables(rows, "kl")
        for kind, table in by_kind.items():
            found = ratio(table, by_kind[RANDOM], seed)
            nats = {"nats": np.nanmean(table), "random_nats": np.nanmean(by_kind[RANDOM])}
            frames.append({"ablation": ablation, "kind": kind, "share": CONTROL} | nats | found)
    found = pd.DataFrame(frames)
    everywhere = found.groupby("kind").ablation.transform("nunique") == found.ablation.nunique()
    return found[everywhere & (found.kind != RANDOM)]


def explained(points: pd.DataFrame, orders: list[dict], heads: pd.DataFrame) -> pd.DataFrame:
    """One row per order: what a quarter of the heads costs, and what they cost one by one.

    relative: the cost over the mean cost of the scores' orders, text by text: orders that were run
    on different texts compare. alone: the sum of its heads' single divergences (nats). by_layer:
    the same with each head's layer mean in its place, what random heads of these layers would have.
    whole_layers: those of which no head is left.
    """
    rows = own(points)
    rows = rows[rows.share == CONTROL]
    usual = rows[rows.order == rows.kind].groupby("id").kl.mean()
    rows = rows.assign(relative=rows.kl / rows.id.map(usual))
    found = rows.groupby("order", sort=False).agg(
        kind=("kind", "first"), heads=("heads", "first"), texts=("id", "nunique"),
        kl=("kl", "mean"), relative=("relative", "mean"),
    )  # fmt: skip
    layer_mean = heads.groupby("layer").alone.transform("mean")
    members = {o["order"]: o["heads"] for o in orders}
    for name, values in (("alone", heads.alone), ("by_layer", layer_mean)):
        found[name] = [
            values.to_numpy()[members[order][:n]].sum()
            for order, n in found["heads"].items()
        ]  # fmt: skip
    layer = heads.layer.to_numpy()
    gone = [layer[members[order][:n]].tolist() for order, n in found["heads"].items()]
    found["whole_layers"] = [
        " ".join(str(at) for at in sorted(set(g)) if g.count(at) == (layer == at).sum())
        for g in gone
    ]
    return found.reset_index()


def tables(rows: pd.DataFrame, column: str) -> dict[str, np.ndarray]:
    """Of every kind: text by order, NaN where an order was not run on a text."""
    texts = rows.id.unique()
    return {
        kind: those.pivot(index="id", columns="order", values=column).reindex(texts).to_numpy()
        for kind, those in rows.groupby("kind", sort=False)
    }


def ratio(one: np.ndarray, other: np.ndarray, seed: int) -> dict[str, float]:
    """Mean of one over mean of other, both [text, order]; texts and orders are resampled."""
    rng = np.random.default_rng(seed)
    value = np.nanmean(one) / np.nanmean(other)
    texts = _weights(rng, len(one))
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold none of the orders
        drawn = [_mean(x, texts, _weights(rng, x.shape[1])) for x in (one, other)]
        low, high = np.nanpercentile(drawn[0] / drawn[1], [2.5, 97.5])
    below = np.nan
    if one.shape[1] == 1:
        same = np.where(np.isnan(other), np.nan, one)
        below = np.mean(np.nanmean(other, axis=0) < np.nanmean(same, axis=0))
    return {"value": value, "low": min(low, value), "high": max(high, value),
            "texts": len(one), "orders": other.shape[1], "below": below}  # fmt: skip


def _weights(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n is drawn, [draw, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)


def _mean(table: np.ndarray, text: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Weighted mean over what is there, for every draw."""
    total, count = (
        einsum(text, x, order, "draw text, text order, draw order -> draw")
        for x in (np.nan_to_num(table), (~np.isnan(table)).astype(float))
    )
    return total / count


def correlations(heads: pd.DataFrame, scores: list[str], seed: int) -> pd.DataFrame:
    """Spearman's rho of scores with `alone`, over all heads and within layers.

    Within layers: ranks less their layer's mean. Intervals resample whole layers.
    """
    names = dict.fromkeys(["layer", *scores, *(p for p in PARTS if p in heads)])
    layer = heads.layer.to_numpy()
    drawn = _weights(np.random.default_rng(seed), len(np.unique(layer)))
    rows = []
    for name, within in itertools.product(names, (False, True)):
        if name == "layer" and within:
            continue
        pair = heads[[name, "alone"]].rank()
        if within:
            pair -= pair.groupby(layer).transform("mean")
        value = _pearson(pair.to_numpy(), layer, np.ones((1, drawn.shape[1])))[0]
        low, high = np.nanpercentile(_pearson(pair.to_numpy(), layer, drawn), [2.5, 97.5])
        rows.append({"score": name, "within_layers": within, "value": value, "low": low,
                     "high": high, "n": drawn.shape[1]})  # fmt: skip
    return pd.DataFrame(rows)


def _pearson(pair: np.ndarray, layer: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of two columns, for every draw of layers [draw, layer]; heads without a value are left out.

    From each layer's sums, so that a draw is a few products.
    """
    frame = pd.DataFrame(pair, columns=["x", "y"]).dropna()
    frame -= frame.mean()
    frame = frame.assign(n=1, xx=frame.x**2, yy=frame.y**2, xy=frame.x * frame.y)
    sums = frame.groupby(layer[frame.index]).sum().reindex(np.unique(layer), fill_value=0)
    n, x, y, xx, yy, xy = (weights @ sums[["n", "x", "y", "xx", "yy", "xy"]].to_numpy()).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x**2) * (n * yy - y**2))


def reliability(single: pd.DataFrame) -> Estimate:
    """Spearman's rho of `alone` between halves of the texts: mean and range over all halvings."""
    table = single.pivot(index=["layer", "head"], columns="id", values="kl").to_numpy()
    n = table.shape[1]
    if n < 2:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    found = []
    for half in itertools.combinations(range(n), n // 2):
        rest = [i for i in range(n) if i not in half]
        ranks = (rankdata(table[:, list(part)].mean(1)) for part in (half, rest))
        found.append(np.corrcoef(*ranks)[0, 1])
    return Estimate(value=float(np.mean(found)), low=float(min(found)),
                    high=float(max(found)), n=n)  # fmt: skip


def additive(quarters: pd.DataFrame, seed: int) -> Estimate:
    """Spearman's rho over random orders: cost of a quarter with the sum of its heads' own."""
    drawn = quarters[quarters.kind == RANDOM].reset_index()
    ranks, each = drawn[["relative", "alone"]].rank().to_numpy(), np.arange(len(drawn))
    value = _pearson(ranks, each, np.ones((1, len(drawn))))[0]
    resampled = _pearson(ranks, each, _weights(np.random.default_rng(seed), len(drawn)))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value=float(value), low=float(low), high=float(high), n=len(drawn))


def summarise(
    points: pd.DataFrame,
    areas: pd.DataFrame,
    alike: pd.DataFrame,
    kinds: pd.DataFrame,
    quarters: pd.DataFrame,
    single: pd.DataFrame,
    heads: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings."""
    first, rows = points.ablation.iloc[0], own(points)
    top = heads.sort_values("alone", ascending=False)
    every = points[(points.kind == "all") & (points.ablation == first)]
    tenth = top.alone.head(max(1, len(top) // 10)).sum() / top.alone.sum()
    out: dict[str, object] = {
        "heads": len(heads),
        "largest divergence with no head gone (nats)": float(
            points[points.kind == "none"].kl.abs().max()
        ),
        "divergence with all heads gone (nats)": stats.mean_ci(every.kl.to_numpy()),
        "divergence without one head, mean over heads (nats)": stats.mean_ci(
            single.kl.to_numpy(), single.id.to_numpy()
        ),
        "head whose loss costs most": f"L{top.layer.iloc[0]}H{top['head'].iloc[0]}",
        "divergence without it (nats)": float(top.alone.iloc[0]),
        "share of the sum over heads that a tenth of them holds": float(tenth),
        "rho of single-head divergences between halves of the texts (range)": reliability(single),
    }
    for row in alike[alike.score.isin([LAYERS, "memory", "layer"])].itertuples():
        where = "within layers" if row.within_layers else "over all heads"
        out[f"rho of {row.score} with single-head divergence, {where}"] = _estimate(row, row.n)
    for kind in (f"{LAYERS}, high first", f"{LAYERS}, low first", "alone, high first", RANDOM):
        at = rows[(rows.share == CONTROL) & (rows.kind == kind)]
        each = at.groupby("order" if kind == RANDOM else "id").kl.mean()
        out[f"divergence, 25 % gone, {kind} (nats)"] = stats.mean_ci(each.to_numpy())
    out["rho of the cost of random quarters with the sum of their heads' own"] = additive(
        quarters, 0
    )
    for row in areas[(areas.against == RANDOM) & ~areas.kind.str.startswith(RANDOM)].itertuples():
        if row.kind.endswith("high first") or row.kind.startswith(LAYERS + ","):
            out[f"area against random, {row.kind}"] = _estimate(row, row.texts)
    for row in areas.itertuples():
        if row.against == f"random, layers of {row.kind}":
            out[f"area against random heads of its layers, {row.kind}"] = _estimate(row, row.texts)
    for row in kinds[
        (kinds.ablation != first) & (kinds.kind == f"{LAYERS}, high first")
    ].itertuples():
        out[f"divergence against random, 25 % gone, {row.ablation}, {row.kind}"] = _estimate(
            row, row.texts
        )
    return out


def _estimate(row, n: int) -> Estimate:
    return Estimate(value=float(row.value), low=float(row.low), high=float(row.high), n=int(n))
