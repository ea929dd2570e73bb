"""What experiment 009 puts side by side: tables of 005 to 008 in, one table out; no model.

A network is a model, or its untrained twin. Every row says where it comes from, so that a gap is
a measurement that was not made, and no row compares what was measured in different ways.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from compare_twins import SHARES

from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.stats import Estimate

DRAWS = 2000
HIGH, LOW, RANDOM = "value_diff, high first", "value_diff, low first", "random"
ARMS = ("synergistic", "random", "redundant")
Held = dict[str, dict[str, pd.DataFrame]]  # by experiment, by model


def published() -> list[dict]:
    """Numbers read off the figures of arXiv:2601.06851, for larger models."""
    path = Path(__file__).with_name("published.json")
    return json.loads(path.read_text(encoding="utf-8"))["models"]


def chosen(cfg, run: Run) -> list[str]:
    """The models of this run, --model first. Raises BadInput for one without a run of 005."""
    there = run.models_of("005_head_phiid")
    asked = [name.strip() for name in cfg.models.split(",") if name.strip()]
    names = list(dict.fromkeys([cfg.model, *(asked or there)]))
    if missing := [name for name in names if name not in there]:
        quick = " --quick" if cfg.quick else ""
        raise BadInput(f"009 compares runs of 005, and there is none of {', '.join(missing)}: "
                       f"./lab run 005 --model {missing[0]}{quick}")  # fmt: skip
    return names


def gather(run: Run, names: list[str]) -> Held:
    """The tables of 006 to 008 that are there, and of none other."""

    def those(experiment: str) -> list[str]:
        there = run.models_of(experiment)
        return [name for name in names if name in there]

    return {
        "graphs": {n: run.upstream("006_core_graphs", "graphs.csv", n)
                   for n in those("006_core_graphs")},
        "areas": {n: run.upstream("007_head_ablation", "areas.csv", n)
                  for n in those("007_head_ablation")},
        "curves": {n: run.upstream("007_head_ablation", "curves.csv", n)
                   for n in those("007_head_ablation")},
        "arms": {n: run.upstream("008_math_perturbation", "arms.csv", n)
                 for n in those("008_math_perturbation")},
        "contrasts": {n: run.upstream("008_math_perturbation", "contrasts.csv", n)
                      for n in those("008_math_perturbation")},
        "sigma": {n: pd.DataFrame([run.upstream("008_math_perturbation", "sigma.json", n)])
                  for n in those("008_math_perturbation")},
    }  # fmt: skip


def ablation(held: Held, points: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Divergence (nats a token) by order and share, and areas over those of random orders.

    what: kl at a share, or `area against random` (share is then the last one). Models from 007,
    twins from this run's points.
    """
    frames = []
    for name, curves in held["curves"].items():
        rows = curves[curves.kind.isin([HIGH, LOW, RANDOM]) & curves.share.isin(SHARES)]
        rows = rows.rename(columns={"mean": "value"})[
            ["kind", "share", "value", "low", "high", "n"]
        ]
        frames.append(rows.assign(network=name, what="kl"))
        areas = held["areas"][name]
        rows = areas[areas.kind.isin([HIGH, LOW]) & (areas.against == RANDOM)]
        rows = rows.rename(columns={"texts": "n"})[["kind", "value", "low", "high", "n"]]
        frames.append(rows.assign(network=name, what="area against random"))
    for name, rows in points.groupby("network", sort=False):
        frames.append(_twin(rows, seed).assign(network=name))
    return pd.concat(frames, ignore_index=True)


def _twin(points: pd.DataFrame, seed: int) -> pd.DataFrame:
    """As 007 has it: intervals over texts, and over texts and orders where random ones are in."""
    rng = np.random.default_rng(seed)
    cube = {  # text, order, share
        kind: rows.pivot(index="text", columns=["order", "share"], values="kl")
        .sort_index(axis=1).to_numpy().reshape(rows.text.nunique(), -1, len(SHARES))
        for kind, rows in points.groupby("kind", sort=False)
    }  # fmt: skip
    area = {kind: _area(values) for kind, values in cube.items()}
    n = len(area[RANDOM])
    drawn_texts = rng.integers(n, size=(DRAWS, n))
    rows = []
    for kind, values in cube.items():
        means = values.mean(1)[drawn_texts].mean(1)  # draw share
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        rows += [{"kind": kind, "share": share, "value": value, "low": a, "high": b, "n": n,
                  "what": "kl"}
                 for share, value, a, b in zip(SHARES, values.mean((0, 1)), low, high,
                                               strict=True)]  # fmt: skip
    orders = rng.integers(area[RANDOM].shape[1], size=(DRAWS, area[RANDOM].shape[1]))
    for kind in (HIGH, LOW):
        value = area[kind].mean() / area[RANDOM].mean()
        over = [area[RANDOM][np.ix_(t, o)].mean()
                for t, o in zip(drawn_texts, orders, strict=True)]  # fmt: skip
        low, high = np.percentile(area[kind][drawn_texts].mean((1, 2)) / over, [2.5, 97.5])
        rows.append({"kind": kind, "value": value, "low": min(low, value),
                     "high": max(high, value), "n": n, "what": "area against random"})  # fmt: skip
    return pd.DataFrame(rows)


def _area(values: np.ndarray) -> np.ndarray:
    """Area under the curve over the last axis, from 0 heads and 0 nats on."""
    start = np.zeros((*values.shape[:-1], 1))
    return np.trapezoid(np.concatenate([start, values], -1), [0.0, *SHARES], axis=-1)


def graphs(held: Held) -> pd.DataFrame:
    """Measures of the graph of all pairs (mmi), of models and of twins, with their nulls."""
    columns = ["network", "atom", "measure", "value", "low", "high", "n", "null", "null_low",
               "null_high"]  # fmt: skip
    frames = []
    for name, found in held["graphs"].items():
        for kind, network in (("mmi", name), ("replayed", f"{name}, untrained")):
            rows = found[(found.kind == kind) & (found.edges == "all")]
            frames.append(rows.assign(network=network)[columns])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def noise(held: Held) -> pd.DataFrame:
    """Accuracy over all tasks by arm at each model's own sigma, and what differs between arms."""
    frames = []
    for name, arms in held["arms"].items():
        sigma = float(held["sigma"][name].sigma.iloc[0])
        rows = arms[(arms.family == "all tasks") & arms.sigma.isin([0, sigma])]
        rows = rows[rows.arm.isin(["baseline", *ARMS])]
        rows = rows[["arm", "measure", "value", "low", "high", "n"]]
        frames.append(rows.rename(columns={"arm": "what"}).assign(network=name, sigma=sigma))
        versus = held["contrasts"][name]
        rows = versus[(versus.family == "all tasks") & (versus.sigma == sigma)]
        rows = rows[rows.one.isin(ARMS) & rows.other.isin(ARMS)]
        rows = rows.assign(what=rows.one + " minus " + rows.other)
        rows = rows[["what", "measure", "value", "low", "high", "n", "p_items", "p_draws"]]
        frames.append(rows.assign(network=name, sigma=sigma))
    columns = ["network", "sigma", "what", "measure", "value", "low", "high", "n"]
    if not frames:
        return pd.DataFrame(columns=columns)
    found = pd.concat(frames, ignore_index=True)
    return found[columns + [c for c in found if c not in columns]]


def side_by_side(
    shapes: pd.DataFrame,
    graphs: pd.DataFrame,
    ablation: pd.DataFrame,
    noise: pd.DataFrame,
    published: list[dict],
) -> pd.DataFrame:
    """One row per network, one column per measure; a gap where it was not measured."""
    rows: dict[str, dict[str, float]] = {}
    for row in shapes.itertuples():
        mine = rows.setdefault(row.network, {"layers": row.layers, "heads": row.heads})
        mine[f"hump_{row.measure}"] = row.value
        if row.measure == "mmi":
            mine["peak_depth_pct"] = row.peak_depth_pct
    for row in graphs.itertuples():
        rows[row.network][f"{row.measure}_{row.atom}"] = row.value
    names = {HIGH: "synergistic_first", LOW: "redundant_first", RANDOM: "random"}
    for row in ablation.itertuples():
        if row.what == "kl" and row.share == 0.25:
            rows[row.network][f"kl_25_{names[row.kind]}"] = row.value
        if row.what != "kl":
            rows[row.network][f"area_{names[row.kind]}"] = row.value
    for row in noise[
        noise.what.isin(["baseline", *ARMS]) & (noise.measure == "accuracy")
    ].itertuples():
        rows[row.network][f"accuracy_{row.what}"] = row.value
    for model in published:
        accuracy = {f"accuracy_{k}": v / 100 for k, v in model["math_accuracy_percent"].items()}
        rows[f"{model['model']} (published)"] = {
            "layers": model["layers"], "heads": model["nodes"],
            "peak_depth_pct": 100 * np.argmax(model["rank_of_layers"]) / (model["layers"] - 1),
            **{f"{m}_{a}": model[m][name] for m in ("efficiency", "modularity")
               for a, name in (("sts", "synergy"), ("rtr", "redundancy"))},
            "kl_25_synergistic_first": model["kl_at_25_percent"]["synergistic"],
            "kl_25_random": model["kl_at_25_percent"]["random"],
            "area_synergistic_first": model["area_to_40_percent_against_random"], **accuracy,
        }  # fmt: skip
    return pd.DataFrame([{"network": name} | row for name, row in rows.items()])


def summarise(
    shapes: pd.DataFrame,
    alike: pd.DataFrame,
    graphs: pd.DataFrame,
    ablation: pd.DataFrame,
    noise: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings."""
    out: dict[str, object] = {"networks compared": ", ".join(shapes.network.unique())}
    for row in shapes.itertuples():
        if row.measure == "mmi" or "untrained" not in row.network:
            out[f"hump, {row.measure}, {row.network}"] = estimate(row)
    for row in alike[alike.measure == "mmi"].itertuples():
        if "untrained" not in row.one or "untrained" in row.other:
            out[f"r of courses, mmi, {row.one} with {row.other}"] = estimate(row)
    for row in alike[
        (alike.measure == "ccs") & ~alike.other.str.contains("published")
    ].itertuples():
        if "untrained" not in row.one + row.other:
            out[f"r of courses, ccs, {row.one} with {row.other}"] = estimate(row)
    shape = graphs[graphs.measure.isin(["efficiency_per_weight", "modularity"])]
    for row in shape[~shape.network.str.endswith("untrained").astype(bool)].itertuples():
        out[f"{row.measure.replace('_', ' ')}, {row.atom}, {row.network}"] = estimate(row)
    for row in ablation[ablation.what != "kl"].itertuples():
        out[f"ablation, area against random, {row.kind}, {row.network}"] = estimate(row)
    for row in noise[noise.measure == "log-probability"].itertuples():
        if row.what in ("synergistic minus random", "redundant minus random"):
            out[f"noise, log-probability, {row.what}, {row.network}"] = estimate(row)
    return out


def estimate(row: object) -> Estimate:
    """A row with an interval, as the findings show it."""
    return Estimate(value=float(row.value), low=float(row.low), high=float(row.high), n=int(row.n))
