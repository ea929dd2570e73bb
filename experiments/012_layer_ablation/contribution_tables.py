"""What experiment 012 makes of its scores: tables from tables, no model. Drops in nats a token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lens_utils import stats, sweeps
from lens_utils.maze_tasks import ABILITIES, HIERARCHY
from lens_utils.stats import Estimate

POINTS = 15  # the first plan's: a layer is critical if half of it costs so many points
SHARE = 8  # one head in so many belongs to the set that an ability needs most
QUICK_SETS = 3
WHAT = ["task", "mode", "half"]
EDIT = ["part", "kind", "where", "layer", "ratio"]
HEADLINE = {"part": "both", "kind": "mean", "where": "everywhere"}


def closed(gate: dict[str, Any]) -> dict[str, Any]:
    """The summary where no ability is above chance."""
    found: dict[str, Any] = {"abilities past the gate": "none"}
    for ability, mode in itertools.product(ABILITIES, ("direct", "thinking")):
        if cell := gate.get(ability, {}).get(mode):
            found[f"{ability} right, {mode}"] = Estimate(
                value=cell["accuracy"], low=cell["low"], high=cell["high"], n=cell["n"]
            )
    return found


def _pick(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows that hold these values."""
    kept = np.ones(len(table), bool)
    for key, value in values.items():
        kept &= (table[key] == value).to_numpy()
    return table[kept]


def _lost(scan: pd.DataFrame) -> pd.DataFrame:
    """What every question loses under every ablation, mean over masks; points are per cent."""
    base = scan[scan.ratio == 0].set_index("id")
    drop = scan.assign(
        logp=base.logp.reindex(scan.id).to_numpy() - scan.logp,
        answer=base.answer.reindex(scan.id).to_numpy() - scan.answer,
        points=100.0 * (base.exact.reindex(scan.id).to_numpy(float) - scan.exact.astype(float)),
    )
    every = ["id", "maze_id", *WHAT, *EDIT]
    return drop.groupby(every, sort=True, as_index=False)[["logp", "answer", "points"]].mean()


def _bands(rows: pd.DataFrame, columns: list[str], value: str) -> pd.DataFrame:
    """Means of a value by some columns with 95 % intervals, whole mazes resampled."""
    table = rows.pivot_table(index="maze_id", columns=columns, values=value, aggfunc="mean")
    table = table.dropna()
    mean, low, high = stats.bands(table.to_numpy(float))
    index = table.columns.to_frame(index=False)
    return index.assign(mean=mean, low=low, high=high, n=len(table))


def drops(scan: pd.DataFrame) -> pd.DataFrame:
    """Drops of log-probability (all of what is scored; the answer alone) and exactness."""
    frames = []
    for what, rows in _lost(scan).groupby(WHAT, sort=True):
        found = _bands(rows, EDIT, "logp")
        for value in ("answer", "points"):
            other = _bands(rows, EDIT, value).rename(
                columns={"mean": value, "low": f"{value}_low", "high": f"{value}_high"}
            )
            found = found.merge(other.drop(columns="n"), on=EDIT)
        frames.append(found.assign(**dict(zip(WHAT, what, strict=True))))
    return pd.concat(frames, ignore_index=True)


def critical(scan: pd.DataFrame) -> pd.DataFrame:
    """Which layers stand out at ratio 0.5, by both definitions.

    critical: what the layer costs a maze, less the mean over layers, is above zero on the half
    that it is chosen on and on the other half (whole 95 % intervals). over_15: the first plan's,
    15 points of exactness on the second half.
    """
    rows = _pick(_lost(scan), **HEADLINE, ratio=0.5)
    frames = []
    for (task, mode), group in rows.groupby(["task", "mode"], sort=True):
        mean = group.groupby(["maze_id", "half"], as_index=False)[["logp"]].mean()
        each = group.merge(mean, on=["maze_id", "half"], suffixes=("", "_mean"))
        each["excess"] = each.logp - each.logp_mean
        columns = []
        for half in ("choose", "test"):
            here = _bands(_pick(each, half=half), ["layer"], "excess").set_index("layer")
            columns.append(here[["mean", "low", "high", "n"]].add_prefix(f"excess_{half}_"))
        test = _pick(each, half="test")
        for value in ("logp", "points"):
            here = _bands(test, ["layer"], value).set_index("layer")
            columns.append(here[["mean", "low", "high"]].add_prefix(f"{value}_"))
        found = pd.concat(columns, axis=1).reset_index()
        found["critical"] = (found.excess_choose_low > 0) & (found.excess_test_low > 0)
        found["over_15"] = found.points_mean >= POINTS
        frames.append(found.assign(task=task, mode=mode))
    return pd.concat(frames, ignore_index=True)


def written(greedy: pd.DataFrame) -> pd.DataFrame:
    """Share of right answers, verified, when they are written under ablation."""
    frames = []
    for (task, mode), rows in greedy.groupby(["task", "mode"], sort=True):
        found = _bands(rows, ["layer", "ratio"], "correct")
        cut = rows.groupby(["layer", "ratio"], as_index=False).truncated.mean()
        frames.append(found.merge(cut, on=["layer", "ratio"]).assign(task=task, mode=mode))
    return pd.concat(frames, ignore_index=True)


# Sets of heads


def heads(alone: pd.DataFrame) -> pd.DataFrame:
    """What every head alone costs, by task and mode."""
    base = alone[alone.layer < 0].set_index("id").logp
    lost = alone.assign(drop=base.reindex(alone.id).to_numpy() - alone.logp)
    lost = lost[lost.layer >= 0]
    return lost.groupby(["task", "mode", "layer", "head"], as_index=False)["drop"].mean()


def head_sets(alone: pd.DataFrame, shape: tuple[int, int], cfg) -> list[dict]:
    """The heads that every ability needs, and as many random sets of the same layers.

    needed: the costliest heads. own: the heads whose share of all that single heads cost this
    ability is highest above their share for the other abilities. Chosen on direct questions,
    unless an ability has thinking ones only.
    """
    table = heads(alone)
    table = table[table.task.isin(ABILITIES)]
    by = {}
    for task in [a for a in ABILITIES if a in set(table.task)]:
        modes = set(table[table.task == task]["mode"])
        rows = _pick(table, task=task, mode="direct" if "direct" in modes else "thinking")
        by[task] = rows.set_index(["layer", "head"])["drop"]
    found = [{"set": "none", "ability": "", "choice": "", "draw": -1, "heads": []}]
    share = {task: d.clip(lower=0) / max(d.clip(lower=0).sum(), 1e-12) for task, d in by.items()}
    size = max(2, shape[0] * shape[1] // SHARE)
    for task in by:
        others = [share[t] for t in by if t != task]
        scores = {"needed": by[task]}
        if others:
            scores["own"] = share[task] - sum(others) / len(others)
        for choice, score in scores.items():
            top = [tuple(map(int, i)) for i in score.sort_values(ascending=False).index[:size]]
            about = {"ability": task, "choice": choice}
            found.append({"set": f"{task}, {choice}", **about, "draw": -1, "heads": top})
            n = QUICK_SETS if cfg.quick else cfg.random_sets
            for draw, drawn in enumerate(sweeps.random_sets(top, *shape, n, cfg.seed)):
                found.append({"set": f"{task}, {choice}, random {draw}", **about, "draw": draw,
                              "heads": drawn})  # fmt: skip
    return found


def _without(without: pd.DataFrame) -> pd.DataFrame:
    """Drop of every question under every set."""
    base = without[without.set == "none"].set_index("id").logp
    lost = without.assign(drop=base.reindex(without.id).to_numpy() - without.logp)
    return lost[lost.set != "none"]


def crossed(without: pd.DataFrame) -> pd.DataFrame:
    """What every set costs every task, against random sets of the same layers.

    p: one-sided, the set's rank among the random ones. excess: paired by maze.
    """
    found = []
    columns = ["ability", "choice", "task", "mode"]
    for key, rows in _without(without).groupby(columns, sort=True):
        by_maze = rows.pivot_table(index="maze_id", columns="draw", values="drop")
        set_, random = by_maze[-1], by_maze.drop(columns=-1)
        cost = stats.mean_ci(set_.to_numpy())
        excess = stats.mean_ci((set_ - random.mean(axis=1)).to_numpy())
        draws = random.mean()
        found.append(
            dict(zip(columns, key, strict=True))
            | {"drop": cost["value"], "low": cost["low"], "high": cost["high"], "n": cost["n"]}
            | {"random": draws.mean(), "random_low": draws.quantile(0.025)}
            | {"random_high": draws.quantile(0.975), "sets": len(draws)}
            | {"p": (1 + (draws >= cost["value"]).sum()) / (1 + len(draws))}
            | {f"excess_{k}": excess[k] for k in ("value", "low", "high")}
        )
    return pd.DataFrame(found)


def pairs(without: pd.DataFrame, crossed: pd.DataFrame) -> pd.DataFrame:
    """Two abilities and the sets of both: a double dissociation, a hierarchy, or neither.

    own_lower, own_upper: what the ability's own set costs it more than the other's set does. Both
    above zero is a double dissociation. asymmetry: share of the upper ability's own cost that the
    lower one's set takes from it, less the same the other way round. The hierarchy (the upper one
    needs what the lower one needs) is supported where the lower one's set costs the upper one more
    than random sets do and the asymmetry lies above zero.
    """
    lost, found = _without(without), []
    lost = lost[lost.draw == -1]
    links = [(low, up) for up, below in HIERARCHY.items() for low in below]
    for (lower, upper), choice, mode in itertools.product(
        links, ("needed", "own"), ("direct", "thinking")
    ):
        rows = lost[(lost.choice == choice) & (lost["mode"] == mode)]
        cost = {
            (of, on): _pick(rows, ability=of, task=on).groupby("maze_id")["drop"].mean()
            for of in (lower, upper)
            for on in (lower, upper)
        }
        together = pd.DataFrame(cost).dropna()
        if len(together) < 2:
            continue
        ll, lu, ul, uu = (
            together[of, on].to_numpy()
            for of, on in itertools.product((lower, upper), (lower, upper))
        )
        rng = np.random.default_rng(0)
        draws = rng.multinomial(len(ll), [1 / len(ll)] * len(ll), size=2000) / len(ll)
        value = lu.mean() / _safe(uu.mean()) - ul.mean() / _safe(ll.mean())
        spread = (draws @ lu) / _safe(draws @ uu) - (draws @ ul) / _safe(draws @ ll)
        low, high = np.percentile(spread, [2.5, 97.5])
        own = {"lower": stats.mean_ci(ll - ul), "upper": stats.mean_ci(uu - lu)}
        against = _pick(crossed, ability=lower, choice=choice, task=upper, mode=mode).iloc[0]
        both = own["lower"]["low"] > 0 and own["upper"]["low"] > 0
        beyond = against.excess_low > 0 and against.p < 0.05
        found.append(
            {"lower": lower, "upper": upper, "choice": choice, "mode": mode, "n": len(ll)}
            | {f"own_{k}_{e}": own[k][e] for k in own for e in ("value", "low", "high")}
            | {"asymmetry": value, "asymmetry_low": low, "asymmetry_high": high}
            | {"cross_p": against.p, "double_dissociation": bool(both)}
            | {"hierarchy": bool(beyond and low > 0)}
        )
    return pd.DataFrame(found)


def _safe(x: Any) -> Any:
    """A cost to divide by: what costs nothing counts as a thousandth of a nat."""
    return np.maximum(x, 1e-3)


# What later scripts and the findings read


def results(
    scan: pd.DataFrame,
    drops: pd.DataFrame,
    layers: pd.DataFrame,
    replies: pd.DataFrame,
    held: Sequence[dict],
    n_layers: int,
    model: str,
) -> dict[str, Any]:
    """ablation_results.json: by ability, in the schema of the study's result files.

    Curves are drops at ratio 0.5 on the second half, in nats a token, direct questions first;
    top_layers are ranked by the first half. Accuracy is exactness: greedy decoding would write
    all of it. The baseline is 010's verified accuracy.
    """
    found: dict[str, Any] = {}
    kind = {h["id"]: (h["task"], "thinking" if h["enable_thinking"] else "direct") for h in held}
    asked = pd.DataFrame([kind[i] for i in replies.id], columns=["task", "mode"])
    asked["correct"] = replies.correct.to_numpy()
    for task in [a for a in ABILITIES if a in set(layers.task)]:
        modes: dict[str, Any] = {}
        for mode in [m for m in ("direct", "thinking")
                     if len(_pick(layers, task=task, mode=m))]:  # fmt: skip
            here = _pick(layers, task=task, mode=mode).set_index("layer")
            rank = here.excess_choose_mean.sort_values(ascending=False).index.tolist()
            right = _pick(asked, task=task, mode=mode).correct
            modes[mode] = {
                "top_layers": rank,
                "key_layers": rank[:5],
                **{name: [float(here[c].get(layer, np.nan)) if layer in here.index else None
                          for layer in range(n_layers)]
                   for name, c in (("curve", "logp_mean"), ("curve_low", "logp_low"),
                                   ("curve_high", "logp_high"))},
                "critical_layers": here.index[here.critical].tolist(),
                "critical_layers_15_points": here.index[here.over_15].tolist(),
                "baseline": {"correct": int(right.sum()), "total": len(right),
                             "accuracy": float(right.mean())},
                "ablation_by_layer": _by_layer(_pick(scan, task=task, mode=mode, half="test"),
                                               _pick(drops, task=task, mode=mode, half="test")),
            }  # fmt: skip
        first = next(iter(modes))
        found[task] = modes[first] | {"mode": first, "modes": modes}
    return {"model": model, "experiment": "012_layer_ablation", "abilities": found}


def _by_layer(scan: pd.DataFrame, drops: pd.DataFrame) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    base = scan[scan.ratio == 0].exact.mean()
    lost = _pick(drops, **HEADLINE).set_index(["layer", "ratio"])["mean"]
    for (layer, ratio), rows in _pick(scan, **HEADLINE).groupby(["layer", "ratio"]):
        if ratio == 0:
            continue
        found.setdefault(f"layer_{layer}", {})[f"ratio_{ratio:g}"] = {
            "accuracy": float(rows.exact.mean()),
            "performance_drop": float(base - rows.exact.mean()),
            "correct": int(rows.exact.sum()),
            "total": len(rows),
            "log_prob_drop": float(lost[layer, ratio]),
        }
    return found


def summarise(
    asked: dict[str, list],
    scan: pd.DataFrame,
    drops: pd.DataFrame,
    layers: pd.DataFrame,
    greedy: pd.DataFrame,
    written: pd.DataFrame,
    crossed: pd.DataFrame,
    pairs: pd.DataFrame,
) -> dict[str, Any]:
    """The numbers that the findings quote."""
    cells = [(a, m) for a in ABILITIES for m in ("direct", "thinking")
             if len(_pick(layers, task=a, mode=m))]  # fmt: skip
    found: dict[str, Any] = {
        "abilities past the gate": ", ".join(f"{a} ({m})" for a, m in cells),
        "questions scored": len(asked["questions"]),
        "questions left out (010's reply was wrong, or too long)": sum(
            asked["left_out"][0].values()
        ),
    }
    test = drops[drops.half == "test"]
    for ability, mode in cells:
        here = _pick(layers, task=ability, mode=mode)
        said = here.layer[here.critical].astype(str)
        found[f"critical layers, {ability}, {mode}"] = ", ".join(said) or "none"
        top = here.loc[here.logp_mean.idxmax()]
        found[f"half of the costliest layer, {ability}, {mode} (nats per token)"] = Estimate(
            value=top.logp_mean, low=top.logp_low, high=top.logp_high, n=int(top.excess_test_n)
        )
    for ability in dict.fromkeys(a for a, _ in cells):
        here = _pick(layers, task=ability)
        here = here[here["mode"] == here["mode"].min()]
        said = here.layer[here.over_15].astype(str)
        found[f"layers by the first plan's 15 points, {ability}"] = ", ".join(said) or "none"
    every = test[(test.ratio == 1) & test.task.isin(ABILITIES) & (test["mode"] == cells[0][1])]
    for part, kind in (("both", "mean"), ("resid", "zero")):
        rows = _pick(every, part=part, kind=kind, where="everywhere")
        name = "the stream zeroed" if part == "resid" else "a contribution replaced by its mean"
        found[f"{name}: median drop over layers and abilities (nats)"] = float(
            rows["mean"].median()
        )
        found[f"{name}: share of layers that cost 15 points or more"] = float(
            (rows.points >= POINTS).mean()
        )
    found["agreement of layers, mean and resample (Spearman)"] = _alike(test, "resample")
    found["agreement of layers, mean and zero (Spearman)"] = _alike(test, "zero")
    found["exact under teacher forcing = right when written (direct, one answer)"] = _same(
        scan, greedy
    )
    for row in pairs[(pairs.choice == "own") & (pairs["mode"] == "direct")].itertuples():
        name = f"{row.lower} and {row.upper}"
        found[f"double dissociation of own heads, {name}, direct"] = _verdict(
            row.double_dissociation
        )
    for row in pairs[(pairs.choice == "needed") & (pairs["mode"] == "direct")].itertuples():
        name = f"{row.upper} needs what {row.lower} needs"
        found[f"hierarchy, {name}, direct"] = _verdict(row.hierarchy)
    return found


def _verdict(holds: bool) -> str:
    return "supported" if holds else "not supported"


def _alike(test: pd.DataFrame, other: str) -> float:
    """Mean rank correlation of layers over abilities and modes, at ratio 1."""
    found = []
    for _, rows in test[(test.part == "both") & (test["where"] == "everywhere")
                        & (test.ratio == 1)].groupby(["task", "mode"]):  # fmt: skip
        table = rows.pivot_table(index="layer", columns="kind", values="mean")
        if len(table) > 2 and other in table:
            found.append(table["mean"].corr(table[other], method="spearman"))
    return float(np.mean(found)) if found else float("nan")


def _same(scan: pd.DataFrame, greedy: pd.DataFrame) -> float:
    """How often both ways to measure agree where they have to."""
    unique = greedy[(greedy["mode"] == "direct") & (greedy.task != "generate")]
    given = _pick(scan, **HEADLINE, seed=0)[["id", "layer", "ratio", "exact"]]
    both = unique.merge(given, on=["id", "layer", "ratio"])
    return float((both.correct.astype(bool) == both.exact.astype(bool)).mean())
