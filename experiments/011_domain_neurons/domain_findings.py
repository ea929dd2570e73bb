"""What experiment 011 says in the end: the causal check, the file others read, the summary."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from domain_tables import Found

from lens_utils import dape, stats
from lens_utils.maze_tasks import ABILITIES
from lens_utils.stats import Estimate

SHOWN = 200  # neurons of an ability in the results file


def selection(half: Found, largest: int) -> torch.Tensor:
    """Of every ability the specialised neurons found on the first half of the mazes, the lowest
    `largest` by DAPE. [ability, layer, neuron]"""
    chosen = torch.zeros(len(half.contrast.domains), half.q.numel(), dtype=torch.bool)
    order = half.entropies[0].flatten().argsort(stable=True)
    for d in range(len(chosen)):
        mine = (half.special & (half.main == d)).flatten()
        chosen[d, order[mine[order]][:largest]] = True
    return chosen.unflatten(1, half.q.shape)


def ablation(logp: pd.DataFrame) -> pd.DataFrame:
    """What every set costs every task (nats per answer token), over what random sets cost.

    excess: drop with the set less the mean drop with its random sets, question by question, with a
    95 % interval over mazes. p: share of random sets that cost as much, the set itself counted.
    """
    base = logp[(logp.set == "none")].set_index(["ablation", "id"]).logp
    rows = logp[logp.set != "none"]
    base_of = base.reindex(pd.MultiIndex.from_frame(rows[["ablation", "id"]])).to_numpy()
    rows = rows.assign(drop=base_of - rows.logp)
    found = []
    for (kind, name, task), held in rows.groupby(["ablation", "set", "task"], sort=False):
        table = held.pivot(index=["maze_id", "id"], columns="random", values="drop")
        others = table.drop(columns=-1)
        gap = (table[-1] - others.mean(1)).to_numpy()
        maze = table.index.get_level_values("maze_id").to_numpy()
        excess = stats.mean_ci(gap, maze)
        drop = stats.mean_ci(table[-1].to_numpy(), maze)["value"]
        each = [stats_mean(others[n].to_numpy(), maze) for n in others]
        found.append({
            "ablation": kind, "set": name, "task": task, "drop": drop,
            "random_drop": float(np.mean(each)), **{k: excess[k] for k in ("value", "low", "high")},
            "mazes": excess["n"], "random_sets": len(each),
            "p": (1 + sum(e >= drop for e in each)) / (1 + len(each)),
        })  # fmt: skip
    return pd.DataFrame(found).rename(columns={"value": "excess"})


def stats_mean(values: np.ndarray, maze: np.ndarray) -> float:
    """Mean over mazes of their means."""
    return float(pd.Series(values).groupby(maze).mean().mean())


def dissociation(logp: pd.DataFrame) -> pd.DataFrame:
    """Of every two abilities: does each lose more without its own neurons than without the other's?

    own_a: on questions of a, the cost of a's set beyond its random sets less that of b's set
    beyond its own; own_b the same on b. Double where both intervals lie above zero.
    """
    rows = logp[logp.set != "none"]
    sets = [name for name in ABILITIES if name in set(rows.set)]
    found = []
    for kind in rows.ablation.unique():
        for i, a in enumerate(sets):
            for b in sets[i + 1 :]:
                one, other = (_own(rows[rows.ablation == kind], x, y) for x, y in ((a, b), (b, a)))
                found.append({
                    "ablation": kind, "a": a, "b": b, "own_a": one["value"], "low_a": one["low"],
                    "high_a": one["high"], "own_b": other["value"], "low_b": other["low"],
                    "high_b": other["high"], "mazes": one["n"],
                    "double": one["low"] > 0 and other["low"] > 0,
                })  # fmt: skip
    columns = ["ablation", "a", "b", "own_a", "low_a", "high_a", "own_b", "low_b", "high_b",
               "mazes", "double"]  # fmt: skip
    return pd.DataFrame(found, columns=columns)


def _own(rows: pd.DataFrame, mine: str, other: str) -> Estimate:
    """On questions of `mine`: excess cost of its set less that of the other's, over mazes."""
    held = rows[rows.task == mine]
    costs = []
    for name in (mine, other):
        table = held[held.set == name].pivot(
            index=["maze_id", "id"], columns="random", values="logp"
        )
        costs.append(table.drop(columns=-1).mean(1) - table[-1])
    gap = costs[0] - costs[1]
    return stats.mean_ci(gap.to_numpy(), gap.index.get_level_values("maze_id").to_numpy())


def results(
    model: str, found: Sequence[Found], layers: pd.DataFrame, neurons: pd.DataFrame
) -> dict[str, object]:
    """qwen3_dape_results.json: what 016 and scripts of the first plan read."""
    first = found[0]
    abilities = {}
    for name in first.contrast.domains:
        at = layers[(layers.contrast == first.contrast.name) & (layers.domain == name)]
        at = at.sort_values("layer")
        order = at.sort_values(["count", "layer"], ascending=[False, True])
        top = order[order["count"] > 0].layer.tolist()
        mine = neurons[(neurons.contrast == first.contrast.name) & (neurons.main == name)]
        abilities[name] = {
            "top_layers": top,
            "key_layers": top[:5],
            "curve": at.percent.tolist(),
            "curve_low": at.low.tolist(),
            "curve_high": at.high.tolist(),
            "counts_per_layer": at["count"].tolist(),
            "neurons": [
                {"layer": r.layer, "neuron": r.neuron, "dape": r.dape, "rate": r.rate, "q": r.q}
                for r in mine.head(SHOWN).itertuples()
            ],
        }
    return {
        "model": model,
        "experiment": "011_domain_neurons",
        "unit": "specialised neurons, percent of a layer's",
        "domains": list(first.contrast.domains),
        "max_dape": float(np.log(len(first.contrast.domains))),
        "floor": dape.uneven(len(first.contrast.domains)),
        "abilities": abilities,
    }


def gated(gate: dict) -> dict[str, object]:
    """The summary where there is nothing to compare: no two abilities above chance."""
    out: dict[str, object] = {
        "verdict": "no two abilities are above chance in one mode: no claim about their neurons"
    }
    for ability in ABILITIES:
        for mode, cell in gate.get(ability, {}).items():
            out[f"accuracy, {ability}, {mode} (chance {cell['chance']:.2f})"] = Estimate(
                value=cell["accuracy"], low=cell["low"], high=cell["high"], n=cell["n"]
            )
    return out


def summarise(
    contrasts: pd.DataFrame,
    found: Sequence[Found],
    variants: pd.DataFrame,
    ablated: pd.DataFrame,
    double: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings."""
    at = contrasts.set_index("contrast")
    first = at.loc["abilities"]
    out: dict[str, object] = {
        "neurons": int(first.neurons),
        "questions": int(first.samples),
        "shuffles of the labels": int(first.shuffles),
        "specialised neurons, three abilities" if first.domains == 3 else
        f"specialised neurons, {int(first.domains)} abilities": int(first.specialised),
        "the same (% of all)": float(first.specialised_percent),
        "as uneven and as active with shuffled labels, mean": float(first.by_chance),
        "the same with LAPE's minimum rate": int(first.specialised_lape),
        "neurons with q < 0.05, whatever the size": int(first.significant),
        "median DAPE (share of ln N)": float(first.median_share),
        "rho of DAPE between halves of the mazes": float(first.rho_halves),
        "specialised neurons as uneven in both halves (share of those in either)": float(
            first.kept_in_both_halves
        ),
        "specialised neurons, the same tokens in all tasks": int(
            at.loc["abilities, same tokens"].specialised
        ),
        "largest departure from ln N on the maze block (share)": float(
            1 - at.loc["abilities, maze block"].lowest_share
        ),
    }  # fmt: skip
    for d, name in enumerate(found[0].contrast.domains):
        mine = found[0].special & (found[0].main == d)
        out[f"specialised neurons, {name}"] = int(mine.sum())
    for row in contrasts[contrasts.contrast.str.startswith(("modes", "correctness"))].itertuples():
        out[f"specialised neurons, {row.contrast}"] = int(row.specialised)
    for row in variants.itertuples():
        out[f"rho of DAPE with the {row.definition} definition"] = float(row.rho)
    own = ablated[(ablated.ablation == "mean") & (ablated.set == ablated.task)]
    for row in own.itertuples():
        out[f"cost to {row.task} of its own set beyond random sets (nats per token)"] = Estimate(
            value=row.excess, low=row.low, high=row.high, n=int(row.mazes)
        )
    mean = double[double.ablation == "mean"]
    out["pairs of abilities doubly dissociated"] = f"{int(mean.double.sum())} of {len(mean)}"
    return out
