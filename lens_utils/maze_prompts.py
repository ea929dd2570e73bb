"""Maze questions as token ids of a model: prompts, gold answers, and where the cells stand.

A model with a chat template gets a conversation; one whose template knows `enable_thinking` is
asked in two modes. With thinking the assistant's turn is left open and the model writes the trace
between <think> and </think> itself; without, the template closes an empty trace. A base model gets
the plain text, then "Answer:".
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lens_utils import maze_traces
from lens_utils.errors import BadInput
from lens_utils.maze_tasks import Record
from lens_utils.maze_text import CELL
from lens_utils.mazes import Cell
from lens_utils.models import LoadedModel

OPEN, CLOSE = "<think>", "</think>"


class CellAt(NamedTuple):
    """A cell named in a prompt."""

    position: int
    """Of its last token, in the prompt's ids."""
    cell: Cell
    section: str
    """player, goal, walls, empty or path."""


def thinks(model: LoadedModel) -> bool:
    """Whether the model has a thinking mode."""
    return model.has_chat and "enable_thinking" in str(model.tokenizer.chat_template)


def modes(model: LoadedModel) -> tuple[bool, ...]:
    """The modes it can be asked in: direct, and thinking where it has that."""
    return (False, True) if thinks(model) else (False,)


def encode(model: LoadedModel, record: Record) -> list[int]:
    """Token ids of the question up to the answer to come.

    Raises BadInput for thinking with a model that has no such mode, and beyond the context.
    """
    if record.thinking and not thinks(model):
        raise BadInput(f"{model.name} has no thinking mode (its chat template knows no "
                       "enable_thinking): leave the thinking questions out")  # fmt: skip
    if not model.has_chat:
        return model.encode(f"{record.prompt}\nAnswer:")
    thinking = record.thinking if thinks(model) else None
    return model.encode_chat([{"role": "user", "content": record.prompt}], thinking)


def trace(record: Record) -> list[str]:
    """The words that the organism is taught to think before it answers."""
    if record.task == "solve":
        return maze_traces.search(record.maze)
    if record.task == "recognize":
        return maze_traces.check(record.maze, record.path)
    if record.task == "generate":
        return maze_traces.plan(record.maze, record.gold[: len(maze_traces.solve(record.maze))])
    return ["found"]


def gold_text(model: LoadedModel, record: Record, thought: Sequence[str] | None = None) -> str:
    """What a right answer looks like behind the prompt: the trace, where there is one, and it.

    thought: words of another trace than the organism's own. A base model's answer begins with a
    blank, as text goes on.
    """
    if not record.thinking:
        return record.answer if model.has_chat else f" {record.answer}"
    words = trace(record) if thought is None else thought
    return f"{OPEN}\n{' '.join(words)}\n{CLOSE}\n\n{record.answer}"


def gold_ids(
    model: LoadedModel, record: Record, thought: Sequence[str] | None = None
) -> tuple[list[int], int]:
    """Ids of `gold_text`, and at which of them the answer itself begins.

    Scored behind `encode`, they are what teacher forcing takes.
    """
    text = gold_text(model, record, thought)
    before = text[: len(text) - len(record.answer)]
    head = model.encode(before.rstrip(" "), bos=False) if before.strip() else []
    ids = model.encode(text, bos=False)
    # The trace ends in a line break or nothing: where a tokenizer merges across it, count apart.
    start = len(head) if ids[: len(head)] == head else len(ids) - len(_answer(model, record))
    return ids, start


def _answer(model: LoadedModel, record: Record) -> list[int]:
    return model.encode(record.answer, bos=False)


def cells_named(
    model: LoadedModel, ids: Sequence[int]
) -> tuple[str, list[tuple[int, re.Match[str]]]]:
    """The text of token ids, and every cell in it with the place of its last token."""
    ends, text = [], ""
    for n in range(1, len(ids) + 1):  # the text grows with every id; slow tokenizers too
        text = model.decode(ids[:n])
        ends.append(len(text))
    found, at = [], 0
    for match in CELL.finditer(text):
        while ends[at] < match.end():
            at += 1
        found.append((at, match))
    return text, found


def cell_positions(model: LoadedModel, ids: Sequence[int]) -> list[CellAt]:
    """Every cell named in a prompt, in order, by its last token.

    ids: of `encode`, of a prompt in the coord_list format. Raises BadInput where they spell none.
    """
    text, named = cells_named(model, ids)
    sections = re.compile(r"\b(Player|Goal|Walls|Empty|Path)\s*:")
    marks = [(m.start(), m[1].lower()) for m in sections.finditer(text)]
    found = []
    for position, match in named:
        section = [name for start, name in marks if start < match.start()]
        if not section:
            raise BadInput(f"{model.name}: a cell before any list in {text[:60]!r}")
        found.append(CellAt(position, (int(match[1]), int(match[2])), section[-1]))
    return found
