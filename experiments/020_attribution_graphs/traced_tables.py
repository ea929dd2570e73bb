"""Tables of experiment 020: scores, the gate, layers and groups, from its graphs and effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens_utils import graph_gate, stats
from lens_utils.interventions import linear_gain

PREDICTIONS = {"moving": "norms respond", "held": "norms held, as in the graph"}


def scores(chosen: pd.DataFrame, graphs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per prompt: its scores and those of shuffled transcoders."""
    rows = [graph["metadata"]["scores"] for graph in graphs]
    about = chosen[["id", "group", "where", "pair", "asked", "tokens", "p_said", "correct"]]
    return pd.concat([about.reset_index(drop=True), pd.DataFrame(rows)], axis=1)


def _agreement(rows: pd.DataFrame, predicted: str, measured: str, seed: int):
    return graph_gate.agreement(rows[predicted].to_numpy(float), rows[measured].to_numpy(float),
                                rows["id"].to_numpy(str), seed)  # fmt: skip


def gate(effects: pd.DataFrame, threshold: float, seed: int) -> dict[str, Any]:
    """Predicted against measured effects, for both predictions, with their controls and verdicts.

    verdict: of the prediction with responding norms. graph_verdict: of the graph's own edges,
    whose norms are held.
    """
    found: dict[str, Any] = {"threshold": threshold}
    for name in PREDICTIONS:
        rows = effects[effects[f"top_{name}"]]
        predicted = f"{name}_total"
        dealt = graph_gate.dealt_anew(rows[predicted].to_numpy(float), rows["id"].to_numpy(str),
                                      seed)  # fmt: skip
        control = _agreement(rows.assign(dealt=dealt), "dealt", "ablated", seed)
        direct = torch.tensor(effects[f"{name}_direct"].to_numpy(float))
        gain = linear_gain(direct, torch.tensor(rows["ablated"].to_numpy(float)))
        ablated = _agreement(rows, predicted, "ablated", seed)
        rows = rows.assign(reversed=-rows["steered"])
        found[name] = {
            **graph_gate.verdict(ablated, control, gain, threshold),
            "direct_only": _agreement(rows, f"{name}_direct", "ablated", seed)._asdict(),
            "steered": _agreement(rows, predicted, "reversed", seed)._asdict(),
            "nudged": _agreement(rows, predicted, "nudged", seed)._asdict(),
            "matched": _agreement(effects[effects["matched"]], predicted, "ablated",
                                  seed)._asdict(),
            "predicted_std": float(rows[predicted].std()),
            "measured_std": float(rows["ablated"].std()),
        }  # fmt: skip
    top = effects[effects["top_moving"]]
    others = effects[effects["matched"]]
    found["size_of_top"] = float(top["ablated"].abs().mean())
    found["size_of_matched"] = float(others["ablated"].abs().mean())
    held = effects.dropna(subset=["constrained"])
    edge = held["held_direct"].abs().max()
    found["constrained_off_by"] = float((held["constrained"] - held["held_direct"]).abs().max()
                                        / edge)  # fmt: skip
    found["verdict"] = found["moving"]["verdict"]
    found["graph_verdict"] = found["held"]["verdict"]
    return found


def by_layer(effects: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The agreement of each layer's top features, for both predictions."""
    rows = []
    for name in PREDICTIONS:
        for layer, part in effects[effects[f"top_{name}"]].groupby("layer"):
            found = _agreement(part, f"{name}_total", "ablated", seed)
            rows.append({"prediction": name, "layer": int(layer), **found._asdict(),
                         "predicted_std": float(part[f"{name}_total"].std(ddof=0)),
                         "measured_std": float(part["ablated"].std(ddof=0))})  # fmt: skip
    return pd.DataFrame(rows)


def groups(scored: pd.DataFrame, effects: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Scores and agreement of every group of prompts, and of trace and answer."""
    rows = []
    kinds = [("group", "group"), ("where", "where")]
    for kind, column in kinds:
        for value, part in scored.groupby(column, sort=False):
            mine = effects[effects["id"].isin(part["id"]) & effects["top_moving"]]
            found = _agreement(mine, "moving_total", "ablated", seed)
            rows.append({
                "kind": kind, "value": value, "prompts": len(part),
                **{name: float(part[name].mean())
                   for name in ("replacement", "completeness", "shuffled_replacement",
                                "shuffled_completeness", "error_share", "bias_share",
                                "kept_features", "kept_edges", "p_said")},
                "r": found.r, "low": found.low, "high": found.high, "rho": found.rho,
            })  # fmt: skip
    return pd.DataFrame(rows)


def summarise(
    found: pd.DataFrame, scored: pd.DataFrame, effects: pd.DataFrame, gated: dict[str, Any],
    layers: pd.DataFrame, grouped: pd.DataFrame, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The numbers that the findings quote."""

    def mean(column: str, rows: pd.DataFrame = scored) -> stats.Estimate:
        return stats.mean_ci(rows[column].to_numpy(float), None, seed)

    said: dict[str, Any] = {
        "places looked at": len(found),
        "of these known by the model": int(found["correct"].sum()),
        "prompts traced": len(scored),
        "of these failures": int((scored["group"] == "failure").sum()),
        "replacement score": mean("replacement"),
        "completeness score": mean("completeness"),
        "replacement score, shuffled decoders": mean("shuffled_replacement"),
        "completeness score, shuffled decoders": mean("shuffled_completeness"),
        "errors' share of the target's input": mean("error_share"),
        "constants' share of the target's input": mean("bias_share"),
        "features after pruning": mean("kept_features"),
        "edges after pruning": mean("kept_edges"),
        "largest relative error of a sum": float(scored["inexact"].max()),
        "largest relative difference of constrained interventions and edges":
            gated["constrained_off_by"],
    }  # fmt: skip
    for name, words in PREDICTIONS.items():
        of = gated[name]
        for label, one in (
            ("taking away", of),
            ("taking away a quarter", of["nudged"]),
            ("doubling", of["steered"]),
        ):
            said[f"r of predicted and measured, {label}, {words}"] = _estimate(one)
        said[f"median r of a prompt, taking away, {words}"] = of["median"]
        said[f"pooled r, taking away, {words}"] = of["pooled"]
        said[f"Spearman, taking away, {words}"] = of["rho"]
        said[f"same sign, taking away, {words}"] = of["sign"]
        said[f"largest direct edge over largest effect, {words}"] = of["linear_gain"]
        said[f"verdict, {words}"] = of["verdict"]
    said["r, predictions dealt anew within prompts"] = gated["moving"]["control_r"]
    said["effect of matched features over that of the top ones"] = (
        gated["size_of_matched"] / gated["size_of_top"]
    )
    for where in ("trace", "answer"):
        rows = scored[scored["where"] == where]
        if len(rows):
            said[f"replacement score, {where}"] = mean("replacement", rows)
            said[f"features after pruning, {where}"] = mean("kept_features", rows)
    best = layers[layers["prediction"] == "moving"]
    for row in (best.head(1), best.tail(1)):
        said[f"pooled r of layer {int(row.layer.iloc[0])}, norms respond"] = float(
            row.pooled.iloc[0]
        )
    return {label: ("none" if isinstance(v, float) and not np.isfinite(v) else v)
            for label, v in said.items()}  # fmt: skip


def _estimate(found: dict[str, Any]) -> Any:
    """An agreement's r as an estimate over prompts; none where nothing varies."""
    values = [found[key] for key in ("r", "low", "high")]
    if not np.isfinite(values).all() or not values[1] <= values[0] <= values[2]:
        return "none" if not np.isfinite(values[0]) else values[0]
    return stats.Estimate(value=values[0], low=values[1], high=values[2], n=found["n_prompts"])
