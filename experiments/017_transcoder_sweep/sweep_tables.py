"""One line per configuration, the frontier of what is worth its size, and the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sweep_judge import ALL, condition

from lens_utils.faithfulness import increase, recovered
from lens_utils.stats import Estimate

DEARER = 1.25
"""How many times the KL of the best configuration the chosen one may cost."""
DEAD = 0.10
"""Largest share of dead features of a configuration that can be chosen."""
NONE = Estimate(value=np.nan, low=np.nan, high=np.nan, n=0)
ABLATED = ("zero", "mean", "linear")


def measured(
    plan: dict[str, Any], found: pd.DataFrame, counted: pd.DataFrame, named: pd.DataFrame
) -> pd.DataFrame:
    """Per layer and configuration or baseline: settings, cost of the replacement with intervals
    over documents (nats; shares), features, labels."""
    by_condition = dict(tuple(found.groupby("condition", sort=False)))
    lines = [
        row
        | plan["configurations"].get(row["name"], {"encoder": "none", "skip": "none"})
        | _cost(by_condition, row["layer"], row["name"])
        for row in counted.to_dict("records")
    ]
    labels = named.rename(columns={"value": "accuracy", "low": "accuracy_low",
                                   "high": "accuracy_high", "n": "n_labelled"})  # fmt: skip
    return pd.DataFrame(lines).merge(labels, on=["layer", "name"], how="left")


def together(plan: dict[str, Any], found: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The cost of replacing all pilot layers at once, per configuration or baseline."""
    by_condition = dict(tuple(found.groupby("condition", sort=False)))
    layers = plan["layers"]
    where = ALL if len(layers) > 1 else layers[0]
    return pd.DataFrame([{"name": name, **_cost(by_condition, where, name)}
                         for name in table["name"].unique()])  # fmt: skip


def _cost(by_condition: dict[str, pd.DataFrame], where: int | str, name: str) -> dict[str, float]:
    """CE increase, KL (nats), agreement and what is recovered, each with its interval."""
    own = condition(where, name)
    some = [by_condition["original"], by_condition[own]]
    some += [by_condition[condition(where, kind)] for kind in ABLATED if kind != name]
    part = pd.concat(some, ignore_index=True)
    line = _columns("ce", increase(part, own)) | _columns("kl", increase(part, own, "kl"))
    line |= _columns("agreement", increase(part, own, "same"))
    for kind in ABLATED:
        if kind != name:  # a share of nothing is no number: some MLPs can be left out for free
            other = condition(where, kind)
            lost = increase(part, other)["low"] > 0
            line |= _columns(f"recovered_{kind}", recovered(part, own, other) if lost else NONE)
    return line


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate["value"], f"{name}_low": estimate["low"],
            f"{name}_high": estimate["high"], f"{name}_n": estimate["n"]}  # fmt: skip


def overall(plan: dict[str, Any], table: pd.DataFrame, joint: pd.DataFrame) -> pd.DataFrame:
    """Means over the pilot layers, the worst layer's dead share, what it costs to replace all of
    them at once (joint), and who is on the frontier: nobody else is at most as sparse and as large
    and costs less."""
    measures = ["fvu", "fvu_median", "l0", "ce", "kl", "agreement", "gain", "gain_scaled"]
    measures += ["accuracy", "shuffled", "labelled", *(f"recovered_{kind}" for kind in ABLATED)]
    settings = ["features", "k", "lr", "share", "max_gain", "skip", "encoder"]
    groups = table.groupby("name", sort=False)
    frame = groups[settings].first().join(groups[measures].mean())
    frame["dead"], frame["dense"] = groups["dead"].max(), groups["dense"].max()
    at_once = joint.set_index("name")[["ce", "kl", "agreement"]]
    frame = frame.join(at_once.add_prefix("joint_"))
    for kind in ABLATED:
        frame[f"kl_below_{kind}"] = 1 - frame["joint_kl"] / frame.loc[kind, "joint_kl"]
    frame = frame.reset_index()
    grid = frame[_plain(frame) & (frame["lr"] == plan["configurations"][plan["centre"]]["lr"])]
    for cost in ("joint_kl", "fvu"):
        frame[f"frontier_{cost}"] = frame["name"].isin(frontier(grid, cost))
    return frame


def frontier(grid: pd.DataFrame, cost: str) -> list[str]:
    """Names of configurations that none as sparse and as small undercuts."""
    return [
        row["name"]
        for row in grid.to_dict("records")
        if not (
            (grid["k"] <= row["k"])
            & (grid["features"] <= row["features"])
            & (grid[cost] < row[cost])
        ).any()
    ]


def _plain(frame: pd.DataFrame) -> pd.Series:
    """Trained transcoders without a skip connection that saw the whole text."""
    return (frame["encoder"] == "trained") & (frame["skip"] == "none") & (frame["share"] == 1)


def choose(plan: dict[str, Any], overall: pd.DataFrame) -> dict[str, Any]:
    """The sparsest, then smallest configuration that costs little more than the best one.

    Cost: KL with all pilot layers replaced at once; little: DEARER times. (A share of what is
    recovered would say less: at 90 %, five points are half of the cost.) Only the grid counts, all
    of one learning rate, and of it configurations with few dead features, where there are any. The
    learning rate is the best one at the grid's centre.
    """
    centre = plan["configurations"][plan["centre"]]
    plain = overall[_plain(overall)]
    grid = plain[plain["lr"] == centre["lr"]]
    sound = grid[grid["dead"] <= DEAD]
    held = sound if len(sound) else grid
    best = held.loc[held["joint_kl"].idxmin()]
    enough = held[held["joint_kl"] <= DEARER * best["joint_kl"]]
    found = enough.sort_values(["k", "features"]).iloc[0]
    alike = plain[(plain["features"] == centre["expansion"] * plan["d_model"])
                  & (plain["k"] == centre["k"])]  # fmt: skip
    lr = float(alike.loc[alike["joint_kl"].idxmin(), "lr"])
    rates = sorted(alike["lr"])
    edge = " (the end of those tried)" if len(rates) > 1 and lr in (rates[0], rates[-1]) else ""
    same = plain[(plain["features"] == found["features"]) & (plain["k"] == found["k"])
                 & (plain["lr"] == lr)]["name"]  # fmt: skip
    dead = f"at most {100 * DEAD:.0f} % dead features"
    which = f"with {dead}" if len(sound) else f"(none has {dead})"
    why = (
        f"Of {len(held)} configurations {which} and no skip connection, {found['name']} is the "
        f"sparsest and then smallest whose KL, with layers {', '.join(map(str, plan['layers']))} "
        f"replaced at once, is at most {DEARER:g} times the least: {found['joint_kl']:.3g} nats a "
        f"token, {best['name']} {best['joint_kl']:.3g}. Learning rate: {lr:g} is the best at "
        f"{plan['centre']}{edge}."
    )
    return {"expansion": int(found["features"] / plan["d_model"]), "k": int(found["k"]), "lr": lr,
            "skip": "none", "why": why, "name": next(iter(same), found["name"])}  # fmt: skip


def summarise(
    plan: dict[str, Any],
    table: pd.DataFrame,
    joint: pd.DataFrame,
    overall: pd.DataFrame,
    chosen: dict[str, Any],
    named: pd.DataFrame,
) -> dict[str, Any]:
    """The numbers that the findings quote."""
    configs, name = plan["configurations"], chosen["name"]
    random = next(n for n, c in configs.items() if c["encoder"] == "random")
    best = overall[overall["frontier_joint_kl"].astype(bool)]["name"]
    found: dict[str, Any] = {
        "pilot layers": ", ".join(map(str, plan["layers"])),
        "configurations": len(configs),
        "tokens of text, and times each was used": f"{plan['tokens']:,} x {plan['passes']}",
        "held-out tokens, features": int(table["held_out"].min()),
        "chosen": name,
        "learning rate": chosen["lr"],
        "on the frontier of KL, k and size": "; ".join(best),
    }
    for row in table[table["name"] == name].to_dict("records"):
        at = f"chosen, layer {row['layer']}"
        found[f"{at}: CE increase, nats"] = _estimate(row, "ce")
        found[f"{at}: recovered against zeroing"] = _estimate(row, "recovered_zero")
        found[f"{at}: gap of the linear map closed"] = _estimate(row, "recovered_linear")
        found[f"{at}: FVU"] = float(row["fvu"])
    row = overall.set_index("name").loc[name]
    found["chosen, mean of layers: FVU of the median token"] = float(row["fvu_median"])
    found["chosen, worst layer: dead features"] = float(row["dead"])
    skips = [n for n, c in configs.items() if c["skip"] != "none"]
    rows = joint.set_index("name")
    for other in dict.fromkeys((name, *skips, random, *ABLATED)):
        said = "the linear map" if other == "linear" else other
        found[f"pilot layers at once, KL in nats: {said}"] = _estimate(rows.loc[other], "kl")
    for other in (*skips, "linear"):
        gained = overall.set_index("name").loc[other, "gain_scaled"]
        found[f"gain of the skip connection, scaled: {other}"] = float(gained)
    for other in dict.fromkeys((name, random)):
        of = named[named["name"] == other]
        found[f"label accuracy on held-out tokens: {other}"] = float(of["value"].mean())
        found[f"same, labels of other features: {other}"] = float(of["shuffled"].mean())
    return {label: _rounded(value) for label, value in found.items()}


def _estimate(row: Any, name: str) -> Estimate:
    return Estimate(value=float(row[name]), low=float(row[f"{name}_low"]),
                    high=float(row[f"{name}_high"]), n=int(row[f"{name}_n"]))  # fmt: skip


def _rounded(value: Any) -> Any:
    """Four figures; what cannot be measured is NaN, never infinite."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else float("nan")
    return value
