"""What experiment 015 makes of its readings: tables from tables, no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from lens_utils import concepts, stats
from lens_utils.maze_tasks import ABILITIES
from lens_utils.mazes import CONCEPTS
from lens_utils.stats import Estimate

TRIVIAL = ("wall", "path", "start", "goal")
"""Read off the list a cell stands in, or copied from the prompt's first lines."""
SMALLEST = 3  # neurons of a set
POST, GATE = 0, 1


def closed(gate: dict[str, Any]) -> dict[str, Any]:
    """The summary where no ability is above chance."""
    found: dict[str, Any] = {"abilities past the gate": "none"}
    for ability in ABILITIES:
        for mode, cell in gate.get(ability, {}).items():
            found[f"{ability} right, {mode}"] = Estimate(
                value=cell["accuracy"], low=cell["low"], high=cell["high"], n=cell["n"]
            )
    return found


def _chosen(held: dict[str, Any], d: str, p: str, kind: int, floor: float) -> np.ndarray:
    """Neurons [layer, concept, neuron] past the floor and the false discovery rate."""
    return concepts.neuron_sets(held[d][:, kind].numpy(), held[p][:, kind].numpy(), floor)


def counts(held: dict[str, Any], null: dict[str, Any], cfg) -> pd.DataFrame:
    """How many neurons every concept has in every layer, and the best one on held-out mazes."""
    floor = cfg.effect_floor
    post = _chosen(held, "d", "p", POST, floor)
    versions = {
        "neurons": post,
        "by_gate": _chosen(held, "d", "p", GATE, floor),
        "shuffled": _chosen(held, "shuffled_d", "shuffled_p", POST, floor),
        "untrained": _chosen(null, "d", "p", POST, floor),
    }
    area = held["auroc"][:, POST].numpy()
    rows = []
    for layer, k in np.ndindex(post.shape[:2]):
        d = np.where(post[layer, k], np.abs(held["d"][layer, POST, k].numpy()), 0)
        best = int(d.argmax())
        rows.append(
            {"layer": layer, "concept": CONCEPTS[k], "of": post.shape[2]}
            | {name: int(mask[layer, k].sum()) for name, mask in versions.items()}
            | {"best_neuron": best if d.any() else -1, "best_d": d.max()}
            | {"best_auroc": max(area[layer, k, best], 1 - area[layer, k, best])}
        )
    return pd.DataFrame(rows)


def sets(held: dict[str, Any], cfg) -> list[dict]:
    """The sets that connections are asked of: open cells' concepts, the largest |d| first."""
    post = _chosen(held, "d", "p", POST, cfg.effect_floor)
    most = max(SMALLEST, int(cfg.largest_set * post.shape[2]))
    found = []
    for layer, k in np.ndindex(post.shape[:2]):
        if CONCEPTS[k] in ("wall", "path"):
            continue
        d = held["d"][layer, POST, k].numpy()
        d = np.where(post[layer, k], d, 0)
        order = [int(n) for n in np.argsort(-np.abs(d), kind="stable")[:most] if d[n]]
        if len(order) >= SMALLEST:
            found.append({"layer": layer, "concept": CONCEPTS[k], "neurons": order,
                          "signs": [float(np.sign(d[n])) for n in order],
                          "all": int(post[layer, k].sum())})  # fmt: skip
    return found


def edges(causal: pd.DataFrame) -> pd.DataFrame:
    """What silencing a set takes from a later set's contrast, beyond random sets of its layer.

    lost: in standard deviations. share: of the target's contrast. kept: q below 0.05 over all
    edges and more lost than by random sets on average.
    """
    keys = ["source", "layer", "target", "target_layer"]
    columns = [*keys, "clean", "lost", "share", "random", "random_sd", "t", "p", "q", "kept",
               "mazes", "draws"]  # fmt: skip
    if not len(causal):
        return pd.DataFrame(columns=columns)
    table = causal.pivot_table(index=keys, columns="draw", values="lost")
    first = causal[causal.draw == -1].set_index(keys)
    null = table.drop(columns=-1).to_numpy()
    t, p = concepts.beyond(table[-1].to_numpy(), null)
    p = np.nan_to_num(p, nan=1.0)
    q = false_discovery_control(p)
    found = pd.DataFrame(
        {"clean": first.clean.reindex(table.index), "lost": table[-1],
         "random": null.mean(1), "random_sd": null.std(1, ddof=1), "t": t, "p": p, "q": q,
         "mazes": first.mazes.reindex(table.index), "draws": null.shape[1]}
    ).reset_index()  # fmt: skip
    found["share"] = found.lost / found.clean
    found["kept"] = (found.q < 0.05) & (found.t > 0)
    return found[columns]


def behaviour(lost: pd.DataFrame) -> pd.DataFrame:
    """What right answers lose without a concept's sets, against matched random sets.

    All neurons together have no random sets to be compared with: their excess is the loss.
    """
    rows = []
    for (concept, task), group in lost.groupby(["concept", "task"], sort=True):
        by_maze = group.pivot_table(index="maze_id", columns="draw", values="lost")
        own, random = by_maze[-1], by_maze.drop(columns=-1)
        cost, draws = stats.mean_ci(own.to_numpy()), random.mean()
        more = stats.mean_ci((own - (random.mean(axis=1) if len(draws) else 0)).to_numpy())
        rows.append(
            {"concept": concept, "task": task, "lost": cost["value"], "low": cost["low"]}
            | {"high": cost["high"], "n": cost["n"], "random": draws.mean()}
            | {"random_low": draws.quantile(0.025), "random_high": draws.quantile(0.975)}
            | {"sets": len(draws), "p": (1 + (draws >= cost["value"]).sum()) / (1 + len(draws))}
            | {f"excess_{key}": more[key] for key in ("value", "low", "high")}
        )
    columns = ["concept", "task", "lost", "low", "high", "n", "random", "random_low",
               "random_high", "sets", "p", "excess_value", "excess_low", "excess_high"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def best(
    found: pd.DataFrame, twin: pd.DataFrame, given: pd.DataFrame, counts: pd.DataFrame
) -> pd.DataFrame:
    """One row per concept: the depth where ridge reads it best, beside every baseline there.

    The depth is chosen on the very AUROC it is reported with: n_layers + 1 candidates.
    """
    rows = []
    for concept in CONCEPTS:
        true = found[(found.concept == concept) & (found.labels == "true")]
        ridge = true[true.method == "ridge"].set_index("depth")
        depth = int(ridge.auroc.idxmax())
        mixed = found[(found.concept == concept) & (found.labels == "shuffled")
                      & (found.method == "ridge")].set_index("depth")  # fmt: skip
        other = twin[(twin.concept == concept) & (twin.method == "ridge")].set_index("depth")
        mean = true[true.method == "difference"].set_index("depth")
        own = given[given.concept == concept].set_index("method").auroc
        here = counts[counts.concept == concept]
        rows.append(
            {"concept": concept, "trivial": concept in TRIVIAL, "depth": depth}
            | {key: ridge[key][depth] for key in ("auroc", "low", "high", "n")}
            | {"difference": mean.auroc[depth], "embedding": ridge.auroc[0]}
            | {"shuffled": mixed.auroc[depth], "untrained": other.auroc.max()}
            | {"bag": own["bag"], "looked_up": own["looked up"]}
            | {"neurons": int(here.neurons.sum()), "shuffled_neurons": int(here.shuffled.sum())}
            | {"untrained_neurons": int(here.untrained.sum()), "best_neuron": here.best_auroc.max()}
        )
    return pd.DataFrame(rows)


def summarise(
    tokens: pd.DataFrame,
    best: pd.DataFrame,
    counts: pd.DataFrame,
    weights: pd.DataFrame,
    edges: pd.DataFrame,
    behaviour: pd.DataFrame,
) -> dict[str, Any]:
    """The numbers that the findings quote."""
    sides = tokens.groupby("split").maze.nunique()
    found: dict[str, Any] = {"mazes, fitted and held out": f"{sides['train']} and {sides['test']}"}
    for row in best[~best.trivial].itertuples():
        found[f"{row.concept}: held-out AUROC within cells, best depth"] = Estimate(
            value=row.auroc, low=row.low, high=row.high, n=int(row.n)
        )
        found[f"{row.concept}: neurons (shuffled labels; untrained)"] = (
            f"{row.neurons} ({row.shuffled_neurons}; {row.untrained_neurons})"
        )
    hard = best[~best.trivial]
    found["best AUROC of an untrained model, mean of the four"] = float(hard.untrained.mean())
    found["AUROC of a bag of tokens, mean of the four"] = float(hard.bag.mean())
    found["AUROC with shuffled labels, mean of the four"] = float(hard.shuffled.mean())
    if len(weights):
        same = weights[weights.source == weights.target]
        found["pairs of sets of successive layers"] = len(weights)
        found["of them joined by weights beyond random neurons (q < 0.05)"] = int(
            (weights.q < 0.05).sum()
        )
        found["mean signed cosine between sets of one concept"] = float(same.cosine.mean())
    found["causal edges asked, and kept (q < 0.05)"] = f"{len(edges)}, {int(edges.kept.sum())}"
    if len(edges):
        kept = edges[edges.kept]
        same = (kept.source == kept.target).mean() if len(kept) else float("nan")
        found["share of kept edges within one concept"] = float(same)
        found["the same of all edges"] = float((edges.source == edges.target).mean())
    solve = behaviour[behaviour.task == "solve"]
    for row in solve.itertuples():
        name = f"the {row.concept} sets, more than random" if row.sets else row.concept
        found[f"answers to solve lose without {name} (nats)"] = Estimate(
            value=row.excess_value, low=row.excess_low, high=row.excess_high, n=row.n
        )
    return found
