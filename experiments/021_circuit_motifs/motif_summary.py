"""The few numbers of 021 that its findings rest on."""

from __future__ import annotations

import motif_tables as table
import pandas as pd
from motif_tables import PROFILE

from lens_utils.motif_nulls import NULLS

Value = dict | float | int | str


def summarise(
    about: pd.DataFrame,
    census: pd.DataFrame,
    loops: pd.DataFrame,
    sweep: pd.DataFrame,
    common: pd.DataFrame,
    differ: pd.DataFrame,
    again: pd.DataFrame,
    plain: pd.DataFrame,
    dealt: pd.DataFrame,
) -> dict[str, Value]:
    """Plain words to numbers; of the run's own model where nothing else is said."""
    model = about["model"].iloc[0]
    own, counts = about[about["model"] == model], census[census["model"] == model]
    mine = common[(common["model"] == model) & (common["kind"] == "all")].set_index(
        ["null", "motif"]
    )
    found: dict[str, Value] = {
        "graphs": len(own),
        "problems": int(own["item"].nunique()),
        "graphs of other models": len(about) - len(own),
        "nodes of a graph, median": float(own["nodes"].median()),
        "edges of a graph, median": float(own["edges"].median()),
        "share of input from errors, median": float(own["errors"].median()),
        "possible edges that a pruned graph has, median": float(own["density"].median()),
        "possible edges that are kept, median": float(own["kept_density"].median()),
        "negative edges, median share": float(own["negative"].median()),
        "feed-forward loops of a graph, median": float(counts["030T"].median()),
    }
    for null in NULLS[:3]:
        found[f"edges moved, {null}"] = float(mine.loc[(null, "030T"), "moved"])
        found[f"loops against {null}, ratio"] = ratio(mine.loc[(null, "030T")])
    for null in (*NULLS[:3], "signs"):
        found[f"coherent share against {null}, ratio"] = ratio(mine.loc[(null, "coherent")])
    found[f"layers climbed against {NULLS[2]}, ratio"] = ratio(mine.loc[(NULLS[2], "span")])
    found[f"cascades against {PROFILE}, ratio"] = ratio(mine.loc[(PROFILE, "cascade")])
    types = mine.loc[PROFILE].loc[[m for m in mine.loc[PROFILE].index if m[0] in "CI"]]
    most, least = types["log2"].idxmax(), types["log2"].idxmin()
    found[f"most enriched type against {PROFILE}"] = most
    found[f"most enriched type against {PROFILE}, ratio"] = ratio(types.loc[most])
    found[f"least enriched type against {PROFILE}"] = least
    found[f"least enriched type against {PROFILE}, ratio"] = ratio(types.loc[least])
    swept = sweep[(sweep["model"] == model) & (sweep["motif"] == "030T")]
    by_cut = swept.groupby("cut")["ratio"].median()
    found["loops' ratio at the fewest and most edges of the sweep"] = (
        f"{by_cut.iloc[0]:.2f} at {by_cut.index[0]}, {by_cut.iloc[-1]:.2f} at {by_cut.index[-1]}"
    )
    found["strongest loop"] = strongest(loops[loops["model"] == model])
    for kind in ("where", "group", "model"):
        rows = differ[(differ["null"] == PROFILE) & (differ["kind"] == kind)]
        rows = rows if kind == "model" else rows[rows["model"] == model]
        what = {"where": "places", "group": "groups of prompts", "model": "models"}[kind]
        found[f"pairs of {what} whose profiles differ (q < 0.05)"] = (
            f"{int((rows['q'] < 0.05).sum())} of {len(rows)}"
        )
        for row in rows.to_dict("records") if kind != "group" else ():
            low, high = min(row["low"], row["cosine"]), max(row["high"], row["cosine"])
            found[f"cosine of profiles, {row['one']} and {row['other']}"] = {
                "value": row["cosine"], "low": low, "high": high, "n": int(row["n"]),
            }  # fmt: skip
    raw = table.enrichments(plain, 0)
    raw = raw[(raw["kind"] == "all") & (raw["model"] == model)].set_index("motif")
    found[f"loops against {PROFILE}, edges not scaled, ratio"] = ratio(raw.loc["030T"])
    found[f"coherent share against {PROFILE}, edges not scaled, ratio"] = ratio(raw.loc["coherent"])
    finite = again[again["z"].abs() < 100]
    found["nulls of nulls: mean z"] = float(finite["z"].mean())
    found["nulls of nulls: sd of z"] = float(finite["z"].std())
    found["nulls of nulls: share with p <= 0.1"] = float((again["p"].dropna() <= 0.1).mean())
    pairs = max(int(dealt["pairs"].sum()), 1)
    found["shuffled names: share with p < 0.05"] = float(dealt["below"].sum() / pairs)
    return found


def ratio(row: pd.Series) -> dict[str, float | int]:
    """A mean log2 ratio as a ratio with its interval."""
    return {"value": float(2 ** row["log2"]), "low": float(2 ** row["low"]),
            "high": float(2 ** row["high"]), "n": int(row["n"])}  # fmt: skip


def strongest(loops: pd.DataFrame) -> str:
    """The loop whose weakest edge is strongest, in words."""
    if not len(loops):
        return "none"
    row = loops.loc[loops["strength"].idxmax()]
    return (f"{row['source']} → {row['middle']} → {row['target']} ({row['type']}, weakest edge "
            f"{row['strength']:.2f})")  # fmt: skip
