"""The few numbers of experiment 004 that its findings show."""

import numpy as np
import pandas as pd

from lens_utils import stats

CITY, GOVERNMENT = ("capital", "city"), ("capital", "government")


def summarise(tables: dict[str, pd.DataFrame], seed: int) -> dict[str, object]:
    """Numbers by label, from the tables of this run.

    Intervals are 95 % bootstraps over countries (names, words), for correlations over heads.
    """
    out: dict[str, object] = {}
    tokens, positions, moved = (tables[name] for name in ("tokens", "positions", "crossings"))
    heads, top, confirmed = (tables[name] for name in ("heads", "top_heads", "confirmed"))
    sets, cuts, twin = (tables[name] for name in ("sets", "knockout", "untrained"))
    fits, routes, needed = (tables[name] for name in ("guess_fits", "routes", "needed"))
    circuits, related = (tables[name] for name in ("circuits", "correlations"))
    for (_, template), some in ((w, of(moved, w)) for w in (CITY, GOVERNMENT)):
        for column, said in (
            ("entity_until", "the entity restores half up to block"),
            ("last_from", "the last position restores half from block"),
        ):
            if len(some):
                values, groups = some[column].to_numpy(float), some.group.to_numpy()
                out[f"{said}, capital {template}"] = stats.mean_ci(values, groups, seed)
    last = tokens[(tokens.task == "capital") & (tokens.template == "city")].pos.max()
    attn = of(positions, CITY)
    attn = attn[(attn.component == "attn_out") & (attn.kind == "denoise") & (attn.pos == last)]
    best = attn.nlargest(2, "mean")
    out["strongest attention layer at the last position"] = int(best.layer.iloc[0])
    out["share it restores"] = estimate(best.iloc[0])
    out["share the second strongest restores"] = estimate(best.iloc[1])
    for wording in (CITY, GOVERNMENT):
        chosen = of(top, CITY)
        held = of(confirmed, wording)
        for rank in (1, 2, 3):
            layer, head = chosen[chosen["rank"] == rank][["layer", "head"]].iloc[0]
            here = held[(held.layer == layer) & (held["head"] == head) & (held.part == "z")]
            label = f"capital {wording[1]}, share restored by head number {rank}"
            out[f"{label} (held-out pairs)"] = estimate(here.iloc[0])
    out["the three strongest heads, capital city"] = ", ".join(
        f"L{row.layer}H{row.head}" for row in of(top, CITY).head(3).itertuples()
    )
    for kind, said in (("noise", "share lost by noising it"), ("zero", "nats lost by zeroing it"),
                       ("mean", "nats lost with its mean"),
                       ("resample", "nats lost with another pair's")):  # fmt: skip
        first = of(top, CITY).iloc[0]
        here = of(heads, CITY)
        here = here[(here.kind == kind) & (here.layer == first.layer)
                    & (here["head"] == first["head"])]  # fmt: skip
        if len(here):
            out[f"strongest head, {said}"] = estimate(here.iloc[0])
    for kind, said in (("denoise", "share restored"), ("mean", "nats lost with means")):
        for wording in (CITY, GOVERNMENT):
            some = of(sets, wording)
            for size in (3, 8):
                for which in ("strongest", "random"):
                    here = some[(some.kind == kind) & (some.heads == size) & (some.set == which)]
                    if len(here):
                        label = f"{size} {which} heads together, {said}, capital {wording[1]}"
                        out[f"{label} (held-out pairs)"] = estimate(here.iloc[0])
    for wording in (CITY, GOVERNMENT):
        some = of(cuts, wording)
        for edge, window in (("entity to last", "40-85 %"), ("entity to last", "below 40 %"),
                             ("relation to last", "40-85 %"), ("bos to last", "40-85 %"),
                             ("other to last", "40-85 %"), ("entity to between", "40-85 %"),
                             ("entity to all later", "40-85 %"),
                             ("entity to last", "all layers"),
                             ("entity to between", "all layers"),
                             ("entity to all later", "all layers")):  # fmt: skip
            here = some[(some.edge == edge) & (some.window == window)]
            if len(here):
                label = f"cut {edge}, {window}, share of the logit difference lost"
                out[f"{label}, capital {wording[1]}"] = estimate(here.iloc[0])
        slid = some[(some.edge == "entity to last") & (some.window == "sliding")]
        if len(slid):
            most = slid.loc[slid["mean"].idxmax()]
            label = f"window in which cutting entity to last costs most, capital {wording[1]}"
            out[label] = f"{most['first']}-{most['last']}"
            out[f"{label}, share lost"] = estimate(most)
    for task in dict.fromkeys(top.task):
        if task != "capital":
            here = confirmed[(confirmed.task == task) & (confirmed.part == "z")]
            first = top[top.task == task].iloc[0]
            here = here[(here.layer == first.layer) & (here["head"] == first["head"])]
            label = f"{task}: share restored by its strongest head"
            out[f"{task}: strongest head"] = f"L{first.layer}H{first['head']}"
            out[f"{label} (held-out pairs)"] = estimate(here.iloc[0])
    for row in of(fits, CITY).itertuples():
        part = "heads" if row.component == "z" else "MLPs"
        label = f"attribution patching ({row.guess}) against exact patching, {part}, capital city"
        out[f"{label}, correlation"] = stats.Estimate(value=row.r, low=row.r_low, high=row.r_high,
                                                      n=row.n)  # fmt: skip
        out[f"{label}, slope"] = stats.Estimate(value=row.slope, low=row.slope_low,
                                                high=row.slope_high, n=row.n)  # fmt: skip
    for part, said in (("v", "values of the strongest head"), ("logits", "output")):
        here = of(routes, CITY)
        here = here[here.part == part]
        if len(here):
            best = here.loc[here["mean"].idxmax()]
            out[f"strongest edge into the {said}, capital city"] = best.sender
            out[f"share it restores alone, into the {said}"] = estimate(best)
    for row in needed[needed.order.isin(["EAP", "EAP-IG", "EAP-IG shuffled"])].itertuples():
        label = f"edges needed to keep 80 %, {row.task} {row.template}, by {row.order}"
        out[f"{label} (of {row.of:,})"] = stats.Estimate(
            value=row.edges, low=row.low, high=min(row.high, row.of), n=row.n
        ) if np.isfinite(row.edges) else "more than were tried"  # fmt: skip
    for order in ("EAP-IG", "EAP-IG shuffled", "random edges"):
        here = of(circuits, CITY)
        here = here[(here.order == order) & (here.kept_pct.between(1.5, 2.5))]
        if len(here):
            label = f"share kept by 2 % of the edges, capital city, {order} (held-out pairs)"
            out[label] = estimate(here.iloc[0])
    for row in related.itertuples():
        label = f"rank correlation of {row.first} and {row.second}, {row.heads}"
        out[label] = stats.Estimate(value=row.rho, low=row.low, high=row.high, n=row.n)
    for row in twin.itertuples():
        out[f"largest change by one head, {row.model} model (nats)"] = float(row.largest_nats)
        out[f"clean minus corrupt, {row.model} model (nats)"] = float(row.gap_nats)
    return out


def of(table: pd.DataFrame, wording: tuple[str, str]) -> pd.DataFrame:
    """The rows of one wording."""
    return table[(table.task == wording[0]) & (table.template == wording[1])]


def estimate(row: pd.Series) -> stats.Estimate:
    """A row of an aggregated table as summary.json has it."""
    value = {k: float(np.float64(row[k])) for k in ("mean", "low", "high")}
    return stats.Estimate(
        value=value["mean"], low=value["low"], high=value["high"], n=int(row["n"])
    )
