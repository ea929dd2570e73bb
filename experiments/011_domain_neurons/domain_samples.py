"""Which questions count for which domain in experiment 011: tables and token ids in, draws out.

Tokens of a question and its reply, by span:

    block   the maze, the same for all questions about it: nothing can differ here
    task    from the instruction to the end of the reply, with the trace where there is one
    cue     the chat template's last tokens before the reply: the same tokens in every question
    answer  the reply behind the trace
"""

import os
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens_utils import dape, maze_records, traces
from lens_utils.errors import BadInput
from lens_utils.maze_tasks import ABILITIES
from lens_utils.models import LoadedModel

MODES = ("direct", "thinking")
FEWEST = 20  # right and wrong replies that a contrast of correctness needs of each
KEYS = ("maze_id", "task", "template_id", "negative_kind", "enable_thinking")


@dataclass(frozen=True)
class Contrast:
    """A comparison of domains."""

    name: str
    domains: tuple[str, ...]
    region: str
    label: np.ndarray
    group: np.ndarray
    """Labels are shuffled within these."""
    n_shuffles: int
    n_resamples: int = 0


def passing(gate: dict) -> dict[str, tuple[str, ...]]:
    """Modes and the abilities whose accuracy in them is above chance, where two or more are.

    With several modes, the abilities that pass in all of them, if there are two; else the mode that
    most abilities pass in.
    """
    found = {
        mode: tuple(a for a in ABILITIES if gate.get(a, {}).get(mode, {}).get("passes", False))
        for mode in MODES
    }
    found = {mode: names for mode, names in found.items() if len(names) > 1}
    common = tuple(a for a in ABILITIES if found and all(a in names for names in found.values()))
    if len(common) > 1:
        return {mode: common for mode in found}
    best = max(found, key=lambda mode: len(found[mode]), default="")
    return {best: found[best]} if best else {}


def choose(
    records: list[dict], replies: pd.DataFrame, passes: dict[str, tuple[str, ...]], most: int
) -> pd.DataFrame:
    """One row per question with its reply; replies that were cut off are left out.

    passes: modes and the abilities compared in them: where a maze has no finished reply of one of
    them in a mode, it is left out of that mode, for the domains are to be about the same mazes.
    most: of so many questions, as whole mazes; 0 is all. Raises BadInput where too few are left.
    """
    frame = pd.DataFrame([{key: r[key] for key in ("id", *KEYS)} for r in records])
    frame = frame.merge(replies[["id", "reply", "thought", "correct", "truncated"]], on="id")
    frame["mode"] = np.where(frame.enable_thinking, "thinking", "direct")
    frame = frame[frame["mode"].isin(list(passes)) & ~frame.truncated.astype(bool)]
    abilities = next(iter(passes.values()))
    there = frame[frame.task.isin(abilities)].groupby(["maze_id", "mode"]).task.nunique()
    place = pd.MultiIndex.from_frame(frame[["maze_id", "mode"]])
    frame = frame[there.reindex(place).to_numpy() == len(abilities)]
    if most:
        per_maze = frame.groupby("maze_id", sort=False).size().cumsum()
        frame = frame[frame.maze_id.isin(per_maze.index[: max(2, int((per_maze <= most).sum()))])]
    if frame.maze_id.nunique() < 4:
        raise BadInput(f"{frame.maze_id.nunique()} mazes with finished replies are too few: ask "
                       "for more with --max-samples")  # fmt: skip
    text = {"reply": "", "thought": "", "negative_kind": "", "template_id": ""}
    return frame.fillna(text).drop(columns=["truncated", "enable_thinking"]).reset_index(drop=True)


def tokens(
    model: LoadedModel, records: dict[int, dict], chosen: pd.DataFrame
) -> tuple[list[list[int]], dict[str, list[dape.Span]]]:
    """Ids of every question with its reply, and its spans."""
    prompts, said, wordings = [], [], []
    for row in chosen.itertuples():
        record = maze_records.from_dict(records[row.id])
        whole = traces.said(model, record, row.thought, row.reply)
        said.append(whole)
        prompts.append(whole.ids[: whole.start])
        wordings.append(len(model.encode(record.instruction, bos=False)))
    shared = {
        key: len(os.path.commonprefix([prompts[i] for i in rows]))
        for key, rows in chosen.groupby(["maze_id", "mode"]).indices.items()
    }
    cue = {
        mode: len(os.path.commonprefix([prompts[i][::-1] for i in rows]))
        for mode, rows in chosen.groupby("mode").indices.items()
    }
    spans: dict[str, list[dape.Span]] = {"block": [], "task": [], "cue": [], "answer": []}
    for row, whole, wording in zip(chosen.itertuples(), said, wordings, strict=True):
        end, behind = len(whole.ids), whole.start - cue[row.mode]
        block = min(shared[row.maze_id, row.mode], behind - wording)
        spans["block"].append((0, block))
        spans["task"].append((behind - wording, end))
        spans["cue"].append((behind, whole.start))
        spans["answer"].append((whole.answer, end))
    return [whole.ids for whole in said], spans


def contrasts(
    chosen: pd.DataFrame, passes: dict[str, tuple[str, ...]], cfg, n_shuffles: int, n_resamples: int
) -> list[Contrast]:
    """Everything that is compared. The first one is what the findings rest on."""
    abilities = next(iter(passes.values()))
    ability = chosen.task.map({name: n for n, name in enumerate(abilities)}).fillna(-1).astype(int)
    in_mode = _codes(chosen, "maze_id", "mode")
    all_of, of_half = ability.to_numpy(), ability.where(halves(chosen), -1).to_numpy()
    recall = np.where(chosen.task == "recall", 0, -1)
    found = [
        Contrast("abilities", abilities, "task", all_of, in_mode, n_shuffles, n_resamples),
        Contrast("abilities, first half", abilities, "task", of_half, in_mode, n_shuffles),
        Contrast("abilities, same tokens", abilities, "cue", all_of, in_mode, n_shuffles),
        Contrast("abilities, maze block", abilities, "block", all_of, in_mode, 0),
        Contrast("recall", ("recall",), "task", recall, in_mode, 0),
    ]
    if cfg.split_by_mode and len(passes) > 1:
        for mode in passes:
            label = ability.where(chosen["mode"] == mode, -1).to_numpy()
            found.append(
                Contrast(f"abilities, {mode}", abilities, "task", label, in_mode, n_shuffles)
            )
        thinking = (chosen["mode"] == "thinking").astype(int)
        label = (2 * ability + thinking).where(ability >= 0, -1).to_numpy()
        names = tuple(f"{a}, {mode}" for a in abilities for mode in MODES)
        maze = _codes(chosen, "maze_id")
        found.append(Contrast("abilities x modes", names, "task", label, maze, n_shuffles))
        pair = _codes(chosen, "maze_id", "task", "template_id", "negative_kind")
        both = pd.Series(pair).map(
            chosen.correct.groupby(pair).agg(lambda c: len(c) == 2 and c.all())
        )
        for name in abilities:
            inside = (chosen.task == name) & both.to_numpy(bool)
            if inside.sum() >= 2 * FEWEST:
                label = np.where(inside, thinking, -1)
                found.append(Contrast(f"modes, {name}", MODES, "answer", label, pair, n_shuffles))
    if cfg.split_by_correctness:
        alike = _codes(chosen, "task", "mode", "negative_kind")
        for name in abilities:
            for mode in passes:
                inside = (chosen.task == name) & (chosen["mode"] == mode)
                right = chosen.correct[inside].astype(bool)
                if min(right.sum(), (~right).sum()) >= FEWEST:
                    label = np.where(inside, np.where(chosen.correct.astype(bool), 0, 1), -1)
                    found.append(Contrast(f"correctness, {name}, {mode}", ("right", "wrong"),
                                          "cue", label, alike, n_shuffles))  # fmt: skip
    return found


def halves(chosen: pd.DataFrame) -> pd.Series:
    """Whether a question's maze belongs to the first half: sets are chosen there, tested behind."""
    number = np.unique(chosen.maze_id, return_inverse=True)[1]
    return pd.Series(dape.halves(int(number.max()) + 1)[number], index=chosen.index)


def draws(found: list[Contrast], chosen: pd.DataFrame, seed: int) -> dict[str, dape.Draws]:
    """The draws of every contrast; mazes are resampled and halved."""
    maze = chosen.maze_id.to_numpy(str)
    return {
        c.name: dape.draws(c.label, c.group, maze, c.region, c.n_shuffles, c.n_resamples, seed)
        for c in found
    }


def _codes(chosen: pd.DataFrame, *columns: str) -> np.ndarray:
    """A number for every combination of values."""
    return chosen.groupby(list(columns), dropna=False).ngroup().to_numpy()
