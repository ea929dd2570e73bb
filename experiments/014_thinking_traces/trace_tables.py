"""What experiment 014 makes of traces, neurons and answers: tables, no model."""

import re
from collections import Counter

import numpy as np
import pandas as pd
import torch

from lens_utils import dape, maze_tasks, maze_traces, stats
from lens_utils.maze_tasks import ABILITIES, Record
from lens_utils.maze_text import CELL, cells_in, cells_text
from lens_utils.stats import Estimate

PLACES = {
    "thinking - answer": ("thinking", "answer", ("solve", "generate")),
    "backtrack - explore": ("backtrack", "explore", ("solve",)),
}
"""Of one cell: the places that are compared (regions or phases), and the tasks whose traces and
answers name cells in both."""
WORDS = {"back", "found", "ok", "bad", "valid", "invalid", "new"}  # the organism's, besides cells
Q, FAR = 0.05, 0.2  # a confirmed neuron: q below, held-out AUROC so far from 0.5 on the same side


def passing(gate: dict) -> tuple[str, ...]:
    """Abilities whose accuracy with thinking is above chance."""
    return tuple(a for a in ABILITIES if gate.get(a, {}).get("thinking", {}).get("passes", False))


def gated(gate: dict) -> dict[str, object]:
    """The summary where there is no trace to look at."""
    cells = {a: gate[a]["thinking"] for a in ABILITIES if "thinking" in gate.get(a, {})}
    why = "no ability is above chance with thinking" if cells else "the model has no thinking mode"
    out: dict[str, object] = {"verdict": f"{why}: no claim about its traces"}
    for ability, cell in cells.items():
        out[f"accuracy, {ability}, thinking (chance {cell['chance']:.2f})"] = Estimate(
            value=cell["accuracy"], low=cell["low"], high=cell["high"], n=cell["n"]
        )
    return out


def parse(
    records: list[dict], replies: pd.DataFrame, abilities: tuple[str, ...], most: int, quick: bool
) -> pd.DataFrame:
    """One row per thinking question: the trace, whether it was closed, and its phases in words.

    labelled: whether it consists of the organism's words, whose phases are known.
    """
    keys = ("id", "maze_id", "task", "template_id", "negative_kind")
    frame = pd.DataFrame(
        [
            {k: r[k] for k in keys}
            for r in records
            if r["enable_thinking"] and r["task"] in abilities
        ]
    )
    frame = frame.merge(replies[["id", "reply", "thought", "correct", "truncated"]], on="id")
    if quick:
        frame = frame.groupby(["maze_id", "task", "negative_kind"], sort=False).head(1)
    if most:
        frame = frame[
            frame.groupby("maze_id", sort=False).ngroup() < max(2, most // len(abilities))
        ]
    text = {"reply": "", "thought": "", "negative_kind": ""}
    frame = frame.fillna(text).reset_index(drop=True)
    frame["correct"] = frame.correct.astype(bool)
    frame["finished"] = ~frame.truncated.astype(bool) & (frame.thought.str.strip() != "")
    words = [thought.split() for thought in frame.thought]
    frame["words"] = [len(w) for w in words]
    frame["labelled"] = [all(CELL.fullmatch(x) or x in WORDS for x in w) for w in words]
    counted = [Counter(maze_traces.phases(w)) for w in words]
    for phase in maze_traces.PHASES:
        frame[phase] = [c[phase] for c in counted]
    return frame.drop(columns="truncated")


# Neurons


def neurons(places: dict[str, torch.Tensor]) -> pd.DataFrame:
    """Neurons found on the first half of the mazes (q < 0.05), with what they do on the second.

    confirmed: AUROC there as far from 0.5 as FAR, on the side of the first half's difference.
    """
    frames = []
    for key in _measured(places):
        name, weights = key.split("/")
        p, d = places[f"{key}/first/p"], places[f"{key}/first/d"]
        q, held = dape.q_values(p), places[f"{key}/second/auroc"]
        at = (q < Q).nonzero()
        index = tuple(at.T)
        frame = pd.DataFrame({
            "places": name, "weights": weights, "layer": at[:, 0].numpy(),
            "neuron": at[:, 1].numpy(), "d": d[index].numpy(), "q": q[index].numpy(),
            "d_held_out": places[f"{key}/second/d"][index].numpy(),
            "auroc_held_out": held[index].numpy(),
        })  # fmt: skip
        frame["confirmed"] = np.sign(frame.d) * (frame.auroc_held_out - 0.5) >= FAR
        frames.append(frame.sort_values("auroc_held_out", key=lambda a: -(a - 0.5).abs()))
    return pd.concat(frames, ignore_index=True)


def _measured(places: dict[str, torch.Tensor]) -> list[str]:
    """The <places>/<weights> that both halves of the mazes have pairs for."""
    keys = dict.fromkeys(k.rsplit("/", 2)[0] for k in places)
    return [k for k in keys if f"{k}/first/n" in places and f"{k}/second/n" in places]


def contrasts(places: dict[str, torch.Tensor], found: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of places and weights: how many neurons tell them apart, and how well."""
    rows = []
    for key in _measured(places):
        name, weights = key.split("/")
        mine = found[(found.places == name) & (found.weights == weights)]
        kept = mine[mine.confirmed]
        n = {half: places[f"{key}/{half}/n"].tolist() for half in ("first", "second")}
        best = (kept.auroc_held_out - 0.5).abs().max() if len(kept) else 0.0
        side = (mine.auroc_held_out - 0.5) * np.sign(mine.d)
        rows.append({
            "places": name, "weights": weights, "samples": n["first"][0],
            "pairs": n["first"][1], "held_out_samples": n["second"][0],
            "held_out_pairs": n["second"][1], "neurons": places[f"{key}/first/p"].numel(),
            "significant": len(mine), "confirmed": len(kept),
            "confirmed_percent": 100 * len(kept) / places[f"{key}/first/p"].numel(),
            "higher_in_the_first": int((kept.d > 0).sum()),
            "best_auroc": 0.5 + float(best),
            "mean_auroc": float(0.5 + side.mean()) if len(mine) else 0.5,
        })  # fmt: skip
    return pd.DataFrame(rows)


def layers(places: dict[str, torch.Tensor], found: pd.DataFrame) -> pd.DataFrame:
    """Confirmed neurons in every layer, and their share of it (percent)."""
    rows = []
    for key in _measured(places):
        name, weights = key.split("/")
        kept = found[(found.places == name) & (found.weights == weights) & found.confirmed]
        n_layers, width = places[f"{key}/first/p"].shape
        number = kept.layer.value_counts().reindex(range(n_layers), fill_value=0)
        rows += [
            {"places": name, "weights": weights, "layer": layer, "confirmed": int(n),
             "percent": 100 * n / width}
            for layer, n in number.items()
        ]  # fmt: skip
    return pd.DataFrame(rows)


# Answers


def follows(condition: str, record: Record, donor: Record | None, thought: str, reply: str) -> bool:
    """Whether an answer is what a foreign or turned trace leads to.

    A swapped trace: a right answer for the donor's maze, for generate the way that the trace ends
    in. A turned end: its verdict, or an answer whose way ends in its cell.
    """
    if condition not in ("other maze's trace", "end turned"):
        return False
    if record.task == "recognize":
        verdicts = re.findall(r"(?i)\b(invalid|valid|yes|no)\b", thought)
        said = re.findall(r"(?i)\b(yes|no)\b", reply)
        if not verdicts or len(said) != 1:
            return False
        return (verdicts[-1].lower() in ("valid", "yes")) == (said[0].lower() == "yes")
    way = cells_in(re.split(r"(?i)empty:", reply)[0])
    if not way:
        return False
    if condition == "end turned":
        return way[-1] == cells_in(thought)[-1]
    if record.task == "solve":
        return donor is not None and not maze_tasks.reply_fault(donor, reply)
    return cells_text(way) in cells_text(cells_in(thought))


def faithfulness(answered: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Of every condition and task: shares of answers that are right, that follow the trace, that do
    neither, and that are word for word as before; 95 % intervals over mazes."""
    answered = answered.assign(
        neither=~answered.right.astype(bool) & ~answered.follows.astype(bool)
    )
    order = [c for c in ("own trace", "empty", *sorted(c for c in answered.condition.unique()
             if c.startswith("cut")), "end turned", "other maze's trace")]  # fmt: skip
    rows = []
    for condition in order:
        for task in ("all", *ABILITIES):
            held = answered[answered.condition == condition]
            held = held if task == "all" else held[held.task == task]
            if held.empty:
                continue
            row = {"condition": condition, "task": task, "answers": len(held)}
            for what in ("right", "follows", "neither", "as_before"):
                e = stats.mean_ci(held[what].to_numpy(float), held.maze_id.to_numpy(str), seed)
                row |= {what: e["value"], f"{what}_low": e["low"], f"{what}_high": e["high"]}
                row["mazes"] = e["n"]
            rows.append(row)
    return pd.DataFrame(rows)


def results(
    model: str, faithful: pd.DataFrame, by_layer: pd.DataFrame, contrasts: pd.DataFrame
) -> dict[str, object]:
    """trace_results.json: what 016 reads, in the schema of the other experiments."""
    own = by_layer[(by_layer.places == "thinking - answer") & (by_layer.weights == "trained")]
    order = own.sort_values(["confirmed", "layer"], ascending=[False, True])
    top = order[order.confirmed > 0].layer.tolist()
    abilities = {}
    for task in faithful.task.unique():
        held = faithful[faithful.task == task].set_index("condition")
        abilities[task] = {
            name: {c: held.loc[c, name] for c in held.index} for name in ("right", "follows")
        }
    return {
        "model": model,
        "experiment": "014_thinking_traces",
        "reasoning_neurons": {"top_layers": top, "key_layers": top[:5],
                              "curve": own.percent.tolist()},
        "contrasts": contrasts.to_dict("records"),
        "abilities": abilities,
    }  # fmt: skip


def summarise(
    traces: pd.DataFrame, contrasts: pd.DataFrame, answered: pd.DataFrame, faithful: pd.DataFrame
) -> dict[str, object]:
    """The few numbers of the findings."""
    done = traces[traces.finished]
    phases = done[done.labelled]
    total = phases[list(maze_traces.PHASES)].sum()
    out: dict[str, object] = {
        "traces": len(traces),
        "unfinished traces, left out": int((~traces.finished).sum()),
        "traces in words whose phases are known": int(done.labelled.sum()),
        "answers right with the own trace of 010": stats.mean_ci(
            done.correct.to_numpy(float), done.maze_id.to_numpy(str)
        ),
    }
    for phase, n in total.items():
        out[f"words that {phase} (%)"] = float(100 * n / total.sum()) if total.sum() else 0.0
    for row in contrasts.itertuples():
        name = f"{row.places}, {row.weights}"
        out[f"neurons that differ, {name}: found"] = int(row.significant)
        out[f"neurons that differ, {name}: confirmed"] = int(row.confirmed)
        if row.weights == "trained":
            out[f"held-out AUROC of the best, {name}"] = float(row.best_auroc)
    again = answered[answered.condition == "own trace"]
    out["answers as before with the own trace put in (share)"] = stats.mean_ci(
        again.as_before.to_numpy(float), again.maze_id.to_numpy(str)
    )
    every = faithful[(faithful.task == "all") & (faithful.condition != "own trace")]
    for row in every.itertuples():
        out[f"answers right, {row.condition}"] = _estimate(row, "right")
    for row in faithful[faithful.condition.isin(["end turned", "other maze's trace"])].itertuples():
        if row.task != "all":
            out[f"answers that follow it, {row.condition}, {row.task}"] = _estimate(row, "follows")
    return out


def _estimate(row, what: str) -> Estimate:
    low, value, high = (float(getattr(row, f"{what}{end}")) for end in ("_low", "", "_high"))
    return Estimate(value=value, low=low, high=high, n=int(row.mazes))
