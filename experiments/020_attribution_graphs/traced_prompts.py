"""The places that experiment 020 explains: of maze questions for an organism, else of texts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch

from lens_utils import generate, maze_prompts, maze_tasks, maze_traces, prompts, text_rows
from lens_utils.errors import BadInput
from lens_utils.maze_tasks import Record
from lens_utils.maze_text import CELL
from lens_utils.mazes import SPOILS, tree_maze

if TYPE_CHECKING:
    from run import Config

    from lens_utils.experiment import Run
    from lens_utils.models import LoadedModel

EACH = 2  # mazes of every kind of question
ASKED = 32  # direct generation questions among which failures are looked for
QUICK, FAILURES = 3, 6
ORGANISM, OTHERS = 0.8, 0.7


class Place(NamedTuple):
    """A prompt up to the token that is to be explained."""

    id: str
    group: str
    where: str
    """prompt (answered at once), trace, or answer (behind a trace)."""
    pair: str
    """What the places of one question have in common."""
    ids: list[int]
    target: int
    """The right next token, or what the model says where it is wrong."""


def threshold(cfg: Config, run: Run) -> float:
    """What the gate asks for: a setting, or what was fixed for this kind of model."""
    return cfg.threshold or (ORGANISM if text_rows.knows_mazes(run.model()) else OTHERS)


def screened(cfg: Config, run: Run) -> pd.DataFrame:
    """All places, each with what the model says there and whether it is right."""
    model = run.model()
    rng = random.Random(cfg.seed)
    if text_rows.knows_mazes(model):
        places = list(of_mazes(model, rng))
        if not cfg.quick:
            places += failures(model, rng)
    else:
        places = of_texts(model)
    if not places:
        raise BadInput(f"{model.name} can be asked none of these prompts: their answers are "
                       "several tokens, or they need a chat template")  # fmt: skip
    return pd.DataFrame([_said(model, place) for place in places])


def _said(model: LoadedModel, place: Place) -> dict[str, Any]:
    ids = torch.tensor([place.ids], device=model.device)
    with torch.no_grad():
        logits = model.bridge(ids, use_cache=False, logits_to_keep=1)[0, -1].float()
    probs = logits.softmax(-1)
    top = int(probs.argmax())
    correct = top == place.target and place.group != "failure"
    return {
        "id": place.id, "group": place.group if correct else "failure", "where": place.where,
        "pair": place.pair, "asked": place.group, "text": model.decode(place.ids),
        "target": model.decode([place.target]), "said": model.decode([top]),
        "p_target": float(probs[place.target]), "p_said": float(probs[top]), "correct": correct,
        "tokens": len(place.ids), "ids": " ".join(map(str, place.ids)),
    }  # fmt: skip


def chosen(found: pd.DataFrame, at_most: int, quick: bool) -> pd.DataFrame:
    """The prompts to trace: all that the model gets right, and as many failures as a group has.

    Fewer are dealt evenly over groups.
    """
    n = at_most or (QUICK if quick else len(found))
    failed = found[found.group == "failure"].head(FAILURES)
    kept = pd.concat([found[found.group != "failure"], failed])
    turn = kept.groupby(["group", "where"], sort=False).cumcount()
    return kept.assign(turn=turn).sort_values("turn", kind="stable").head(n).drop(columns="turn")


# Mazes


def of_mazes(model: LoadedModel, rng: random.Random):
    """Held-out layouts: every task, directly, inside the trace, at its end, and behind it."""
    for task in maze_tasks.TASKS:
        for thinking in maze_prompts.modes(model):
            for n in range(EACH):
                record = _question(rng, task, thinking, n)
                name = f"{task}-{'thinking' if thinking else 'direct'}-{n}"
                yield from _places(model, record, name, thinking)


def _question(rng: random.Random, task: str, thinking: bool, n: int) -> Record:
    for _ in range(50):
        spoiled = SPOILS[n // 2 % len(SPOILS)] if task == "recognize" and n % 2 else ""
        record = maze_tasks.ask(rng, tree_maze(rng, 5, True), task, n % 4, thinking,
                                spoiled=spoiled, test=True)  # fmt: skip
        if record is not None:
            return record
    raise BadInput(f"no maze allows a {task} question")


def _places(model: LoadedModel, record: Record, name: str, thinking: bool):
    row = text_rows.answered(model, record, "test")
    words = {"answer": "answer"}
    if thinking:
        words = dict.fromkeys(maze_traces.PHASES, "trace") | words
    for label, where in words.items():
        at = [t for t, said in enumerate(row.labels)
              if said == label and model.decode([row.ids[t]]).strip()]  # fmt: skip
        if not at or (record.task == "recall" and label == "conclude"):
            continue
        # In the middle of a list of cells, where the next is no copy of player or goal.
        middle = label in ("explore", "answer") and record.task in ("solve", "generate")
        t = at[len(at) // 2] if middle else at[0]
        group = f"{record.task}, thinking" if thinking else record.task
        yield Place(f"{name}-{label}", group, where if thinking else "prompt", name,
                    row.ids[:t], row.ids[t])  # fmt: skip


def failures(model: LoadedModel, rng: random.Random) -> list[Place]:
    """Where mazes that the model draws are wrong: at the end of the path, where it stops or not."""
    records = [_question(rng, "generate", False, n) for n in range(ASKED)]
    asked = [maze_prompts.encode(model, record) for record in records]
    until = "" if model.has_chat else "\n"
    said = generate.answers(model, asked, max_new_tokens=80, temperature=0.0, top_k_shown=1,
                            until=until)  # fmt: skip
    found = []
    for n, (record, before, answer) in enumerate(zip(records, asked, said, strict=True)):
        ids = [step.id for step in answer]
        text = model.decode(ids)
        if not maze_tasks.reply_fault(record, text):
            continue
        ends = [t for t, i in enumerate(ids) if "Empty" in model.decode([i])]
        cells = [t for t, i in enumerate(ids) if CELL.search(model.decode([i]))]
        if ends and cells:
            found.append(Place(f"failure-{n}", "failure", "prompt", f"failure-{n}",
                               before + ids[: ends[0]], ids[ends[0]]))  # fmt: skip
    return found


# Texts


def of_texts(model: LoadedModel) -> list[Place]:
    """The prompts beside run.py whose answer is one token of this model."""
    encoded, _ = prompts.encode(model, prompts.load(__file__))
    return [
        Place(
            id=e.prompt.id,
            group=e.prompt.set,
            where="prompt" if e.prompt.format == "plain" else e.prompt.format,
            pair=e.prompt.group or e.prompt.id,
            ids=list(e.ids),
            target=e.answer_id,
        )
        for e in encoded
    ]
