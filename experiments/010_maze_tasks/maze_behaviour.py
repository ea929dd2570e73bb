"""What a model replies to maze questions, and tables of how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens_utils import files, generate, maze_prompts, stats
from lens_utils.errors import BadInput
from lens_utils.maze_records import as_dict, expand, from_dict, from_plan, sample_mazes
from lens_utils.maze_tasks import ABILITIES, TASKS, Record, reply_fault
from lens_utils.mazes import SHAPES, Maze, solve

if TYPE_CHECKING:
    from run import Config

    from lens_utils.experiment import Run
    from lens_utils.models import LoadedModel

MARGIN = 0.05
"""How far above chance the interval of an ability's accuracy has to lie to pass the gate."""


# Questions


def records(cfg: Config, model: LoadedModel, quick_mazes: int) -> list[dict[str, Any]]:
    """All questions as JSON, each with its id."""
    modes = maze_prompts.modes(model)
    if cfg.tasks:
        held = [r for r in _own(Path(cfg.tasks).expanduser()) if r.thinking in modes]
    else:
        n = quick_mazes if cfg.quick else cfg.mazes
        mazes = sample_mazes(n, cfg.size, cfg.seed, cfg.family)
        held = expand(mazes, modes, cfg.format, cfg.seed)
    if not held:
        raise BadInput(f"{model.name} has no thinking mode, and all tasks ask for one")
    return [{"id": n, **as_dict(record)} for n, record in enumerate(held)]


def _own(folder: Path) -> list[Record]:
    """The records of a user's task files."""
    paths = {ability: folder / f"{ability}_tasks.json" for ability in ABILITIES}
    there = {ability: path for ability, path in paths.items() if path.exists()}
    if not there:
        raise BadInput(f"{folder} has none of {', '.join(p.name for p in paths.values())}")
    found = []
    for ability, path in there.items():
        try:
            rows = files.read(path)
        except ValueError as error:
            raise BadInput(f"{path} is no JSON: {error}") from None
        kept, dropped = from_plan(rows, ability, path.name)
        if any(dropped.values()):
            left = ", ".join(f"{n} ({why})" for why, n in dropped.items() if n)
            print(f"{path.name}: left out {left}")
        found += kept
    return found


def chosen(held: list[dict[str, Any]], at_most: int) -> list[dict[str, Any]]:
    """The questions to answer: like ones in a row, at most so many of each task and mode."""
    found = []
    for thinking in (False, True):
        for task in TASKS:
            alike = [h for h in held if h["task"] == task and h["enable_thinking"] == thinking]
            found += alike[: at_most or None]
    return found


# Replies


def reply(model: LoadedModel, cfg: Config, part: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The model's replies to a batch of questions, verified."""
    rows = []
    for thinking in (False, True):
        asked = [held for held in part if held["enable_thinking"] == thinking]
        if not asked:
            continue
        prompts = [maze_prompts.encode(model, from_dict(held)) for held in asked]
        answers = generate.answers(
            model,
            prompts,
            max_new_tokens=cfg.thinking_tokens if thinking else cfg.direct_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            seed=cfg.seed + asked[0]["id"],
            top_k_shown=1,
            until="" if model.has_chat else "\n",
        )
        rows += [_verified(model, held, [step.id for step in answer], thinking)
                 for held, answer in zip(asked, answers, strict=True)]  # fmt: skip
    return pd.DataFrame(rows)


def _verified(
    model: LoadedModel, held: dict[str, Any], ids: list[int], thinking: bool
) -> dict[str, Any]:
    ended = bool(ids) and ids[-1] in model.ends
    text = model.decode(ids[:-1] if ended else ids)
    thought, closed, said = text.rpartition(maze_prompts.CLOSE) if thinking else ("", "", text)
    if thinking and not closed:  # nothing but an unfinished trace
        thought, said = text, ""
    fault = reply_fault(from_dict(held), said)
    return {
        "id": held["id"],
        "reply": said.strip(),
        "thought": thought.replace(maze_prompts.OPEN, "").strip(),
        "correct": not fault,
        "fault": fault,
        "truncated": bool(not ended and model.has_chat),
        "n_tokens": len(ids),
    }


def untrained(run: Run, asked: Sequence[dict[str, Any]], cfg: Config) -> pd.DataFrame:
    """The untrained twin's replies to a few direct questions of each task."""
    import dataclasses

    few = [[h for h in asked if h["task"] == task and not h["enable_thinking"]][:16]
           for task in TASKS]  # fmt: skip
    short = dataclasses.replace(cfg, direct_tokens=24)
    return reply(run.model(random_init=True), short, [held for rows in few for held in rows])


# Tables


def table(held: list[dict[str, Any]], replies: pd.DataFrame) -> pd.DataFrame:
    """One row per answered question, with what it was and what guessing would reach."""
    by_id = {h["id"]: h for h in held}
    rows = [
        {key: h[key] for key in ("id", "maze_id", "layout_id", "split", "family", "task",
                                 "template_id", "negative_kind", "answer")}
        | {
            "mode": "thinking" if h["enable_thinking"] else "direct",
            "length": h["maze_metadata"]["solution_length"],
            "chance": guessing(from_dict(h)),
        }
        for h in (by_id[i] for i in replies["id"])
    ]  # fmt: skip
    return pd.DataFrame(rows).merge(replies, on="id")


def guessing(record: Record) -> float:
    """Probability of a right answer without understanding: see the findings for each task."""
    if record.task == "recognize":
        return 1 / len(SHAPES) if record.family == "shape" else 0.5
    if record.task == "recall":
        return 1 / record.maze.size**2
    return walk_by_chance(record.maze) if record.task == "solve" else 0.0


def walk_by_chance(maze: Maze) -> float:
    """Probability that a walk to random open cells, never back, follows the solution."""
    path, p = solve(maze), 1.0
    for i, cell in enumerate(path[:-1]):
        ahead = [near for near in maze.neighbours(cell) if near not in path[:i]]
        p /= max(len(ahead), 1)
    return p


def _shares(groups: Any, names: list[str], seed: int) -> pd.DataFrame:
    rows = []
    for key, group in groups:
        right = group["correct"].to_numpy(float)
        estimate = stats.mean_ci(right, group["maze_id"].to_numpy(), seed)
        rows.append(
            dict(zip(names, key, strict=True))
            | {"accuracy": estimate["value"], "low": estimate["low"], "high": estimate["high"]}
            | {"n_mazes": estimate["n"], "n": len(group), "chance": group["chance"].mean()}
            | {"truncated": group["truncated"].mean()}
        )
    return pd.DataFrame(rows)


def accuracy(answered: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Share of right answers of each task and mode: all mazes, and either side of the split."""
    names = ["task", "mode", "split"]
    whole = answered.assign(split="all")
    both = pd.concat([whole, answered], ignore_index=True)
    return _shares(both.groupby(names, sort=True), names, seed)


def kinds(answered: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Share of right answers by the kind of negative, and by wording."""
    kinds = answered.assign(
        kind=answered["negative_kind"].replace("", np.nan).fillna(
            answered["task"].where(answered["task"] != "recognize", "valid")
        )
    )  # fmt: skip
    names = ["task", "mode", "kind", "template_id"]
    by_kind = kinds.assign(template_id="all")
    by_wording = kinds.assign(kind="all")
    return pd.concat([_shares(part.groupby(names, sort=True), names, seed)
                      for part in (by_kind, by_wording)], ignore_index=True)  # fmt: skip


def lengths(answered: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Share of right answers by the solution's length in steps."""
    names = ["task", "mode", "length"]
    return _shares(answered.groupby(names, sort=True), names, seed)


def faults(answered: pd.DataFrame) -> pd.DataFrame:
    """What is wrong with wrong answers, counted."""
    wrong = answered[~answered["correct"].astype(bool)]
    return wrong.groupby(["task", "mode", "fault"], sort=True).size().rename("n").reset_index()


def gate(accuracies: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Which abilities lie above chance: the only ones that later experiments speak of."""
    found: dict[str, dict[str, Any]] = {}
    for row in accuracies[accuracies["split"] == "all"].to_dict("records"):
        found.setdefault(row["task"], {})[row["mode"]] = {
            key: float(row[key]) for key in ("accuracy", "low", "high", "chance")
        } | {"n": int(row["n"]), "passes": bool(row["low"] > row["chance"] + MARGIN)}
    return found


def dissociation(answered: pd.DataFrame, seed: int) -> pd.DataFrame:
    """solve - (recognize + generate) / 2, in points, by mode; intervals over mazes."""
    rows = []
    for mode, group in answered.groupby("mode", sort=True):
        by_maze = group.pivot_table(
            index="maze_id", columns="task", values="correct", aggfunc="mean"
        )
        if not {*ABILITIES} <= {*by_maze.columns}:
            continue
        score = 100 * (by_maze["solve"] - (by_maze["recognize"] + by_maze["generate"]) / 2)
        rows.append({"mode": mode} | stats.mean_ci(score.to_numpy(float), None, seed))
    return pd.DataFrame(rows, columns=["mode", "value", "low", "high", "n"])


def summarise(
    held: list[dict[str, Any]],
    answered: pd.DataFrame,
    accuracies: pd.DataFrame,
    by_kind: pd.DataFrame,
    score: pd.DataFrame,
    passed: dict[str, dict[str, Any]],
    twin: pd.DataFrame,
) -> dict[str, Any]:
    """The numbers that the findings quote."""
    found: dict[str, Any] = {
        "questions": len(held),
        "questions answered": len(answered),
        "mazes": len({h["maze_id"] for h in held}),
        "layouts on both sides": len(
            {h["layout_id"] for h in held if h["split"] == "train"}
            & {h["layout_id"] for h in held if h["split"] == "test"}
        ),
    }

    def estimate(row: dict[str, Any]) -> stats.Estimate:
        return stats.Estimate(value=row["accuracy"], low=row["low"], high=row["high"],
                              n=int(row["n_mazes"]))  # fmt: skip

    for row in accuracies.to_dict("records"):
        if row["split"] == "test" or (row["split"] == "all" and row["task"] != "recall"):
            where = "unseen layouts" if row["split"] == "test" else "all"
            found[f"{row['task']} right, {row['mode']}, {where}"] = estimate(row)
    for row in by_kind.to_dict("records"):
        if row["task"] == "recognize" and row["template_id"] == "all" and row["mode"] == "direct":
            found[f"recognize right, direct, {row['kind']} paths"] = estimate(row)
    for row in score.to_dict("records"):
        found[f"dissociation score in points, {row['mode']}"] = stats.Estimate(
            **{key: row[key] for key in ("value", "low", "high")}, n=int(row["n"])
        )
    found["unfinished answers"] = int(answered["truncated"].sum())
    found["untrained twin right"] = float(twin["correct"].astype(float).mean())
    found["abilities past the gate"] = ", ".join(
        f"{task} ({mode})" for task in ABILITIES for mode, cell in passed.get(task, {}).items()
        if cell["passes"]
    ) or "none"  # fmt: skip
    return found
