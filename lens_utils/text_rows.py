"""Text for transcoders and features: rows of token ids, each token with a label where one is known.

A row is a window of one document, or one maze question with its answer; it never crosses from one
document to the next. Rows are in one split alone: text by document, mazes by layout (the held-out
layouts, which the organism was never shown, are the test split). The order mixes all sources and
depends on the seed only.

    mazes        questions with right answers and traces; labels: sections of the question, phases
                 of the trace (explore, backtrack, conclude), answer
    a+b+c        corpora by name (`corpora`), as many tokens of each
    auto         mazes for a model whose words are cells, else ENGLISH
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lens_utils import corpora, maze_prompts, maze_tasks, maze_traces
from lens_utils.corpus import Doc, number
from lens_utils.errors import BadInput
from lens_utils.mazes import SPOILS, tree_maze
from lens_utils.models import LoadedModel

ENGLISH = "wiki+sotu+reasoning+docstrings"
SHORTEST = 32  # tokens of a window that is worth a row
SHARES = {"solve": 0.2, "recognize": 0.35, "generate": 0.35, "recall": 0.05, "lexical": 0.05}
"""Of maze questions, as the organism was asked them."""
SECTIONS = ("Player", "Goal", "Walls", "Empty", "Path")
QUESTION = {"question", *(name.lower() for name in SECTIONS)}
LEAST = 2_000_000  # characters of a corpus: a speech is long, and every split needs some
CHARACTERS = 8  # of English a token at most, so that a corpus is long enough


class Row(NamedTuple):
    """Token ids of one window or question."""

    ids: list[int]
    doc: str
    """Document or layout: what is resampled for an interval."""
    source: str
    """Corpus, or task and mode."""
    split: str
    """fit, validation or test."""
    labels: list[str] = []  # noqa: RUF012 (never changed)
    """One per token, or none at all."""


class Rows(NamedTuple):
    """Rows of one split, and what is to be said of them."""

    rows: list[Row]
    said: dict
    """For the run's records: sources, digests, fallbacks."""

    @property
    def tokens(self) -> int:
        """Token ids of all rows together."""
        return sum(len(row.ids) for row in self.rows)


def load(
    model: LoadedModel, text: str, tokens: int, length: int, seed: int, split: str = "fit"
) -> Rows:
    """About so many tokens of one split, mixed; fewer where the text ends.

    length: of a window of text. Raises BadInput for an unknown text, or an empty split.
    """
    if text == "auto":
        text = "mazes" if knows_mazes(model) else ENGLISH
    if text == "mazes":
        found = list(of_mazes(model, tokens, seed, split))
        said = {"mazes": {"questions": len(found), "seed": seed}}
        return Rows(found, said)
    names = text.split("+")
    found, said = [], {}
    for name in names:
        share = tokens // len(names)
        shares = {"fit": 0.8, "validation": 0.1, "test": 0.1}
        wanted = max(LEAST, int(CHARACTERS * share / shares[split]))
        corpus = corpora.load(name, wanted)
        if any(corpus.source == other["source"] for other in said.values()):
            continue  # two that are not here have the same stand-in
        rows = list(windows(model, corpus.split(split), length, share, name))
        said[name] = corpus.manifest() | {"rows": len(rows)}
        found += rows
    if not found:
        raise BadInput(f"no document of {text} has {SHORTEST} tokens: give it more text")
    random.Random(seed).shuffle(found)
    return Rows(found, said)


def first(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Rows up to so many tokens."""
    kept, total = [], 0
    for row in rows:
        if total >= tokens:
            break
        kept.append(row)
        total += len(row.ids)
    return kept


def knows_mazes(model: LoadedModel) -> bool:
    """Whether a cell is one word of the model, as for the maze organisms."""
    return model.tokenizer is not None and len(model.encode("(0,1)", bos=False)) == 1


def windows(
    model: LoadedModel, docs: Sequence[Doc], length: int, tokens: int, source: str
) -> Iterator[Row]:
    """Windows of documents behind the model's start token, up to so many tokens."""
    total, size = 0, length - len(model.bos)
    for doc in docs:
        ids = model.tokenizer.encode(doc.text, add_special_tokens=False)
        for at in range(0, len(ids), size):
            part = ids[at : at + size]
            if len(part) < min(SHORTEST, size) or total >= tokens:
                break
            total += len(part)
            yield Row([*model.bos, *part], doc.id.partition(":")[0], source, doc.split)


def of_mazes(model: LoadedModel, tokens: int, seed: int, split: str = "fit") -> Iterator[Row]:
    """Maze questions with right answers, up to so many tokens, in every mode the model has."""
    rng, total = random.Random(f"{seed}-{split}"), 0
    thinking = maze_prompts.modes(model)
    while total < tokens:
        maze = tree_maze(rng, 5, split == "test")
        if split != "test" and (number(maze.layout_id) % 9 == 0) != (split == "validation"):
            continue
        [task] = rng.choices(list(SHARES), list(SHARES.values()))
        spoiled = rng.choice(SPOILS) if task == "recognize" and rng.random() < 0.5 else ""
        wording = rng.randrange(len(maze_tasks.TEMPLATES[task]))
        record = maze_tasks.ask(rng, maze, task, wording, rng.choice(thinking), spoiled=spoiled,
                                test=split == "test")  # fmt: skip
        if record is None:
            continue
        row = answered(model, record, split)
        total += len(row.ids)
        yield row


def answered(model: LoadedModel, record: maze_tasks.Record, split: str) -> Row:
    """A question and its right answer as the organism was taught them, every token labelled."""
    pieces = asked(model, record)
    if record.thinking:
        words = maze_prompts.trace(record)
        pieces.append((f"{maze_prompts.OPEN}\n", "mark"))
        pieces += zip((f"{word} " for word in words), maze_traces.phases(words), strict=True)
        pieces.append((f"\n{maze_prompts.CLOSE}\n\n", "mark"))
    pieces.append((record.answer if model.has_chat else f" {record.answer}", "answer"))
    if ends := sorted(model.ends & set(model.tokenizer.all_special_ids)):
        pieces.append((model.decode(ends[-1:]), "mark"))
    ids, labels = labelled(model, pieces)
    before = list(() if model.has_chat else model.bos)
    mode = "thinking" if record.thinking else "direct"
    return Row([*before, *ids], record.maze.layout_id, f"{record.task} {mode}", split,
               ["mark"] * len(before) + labels)  # fmt: skip


def asked_for(row: Row) -> list[bool]:
    """Which tokens a model can be asked to predict: all of a text, only the answer to a question.

    The cells of a maze are drawn at random; nothing predicts them.
    """
    if not row.labels:
        return [True] * len(row.ids)
    start = max(i for i, label in enumerate(row.labels) if label in QUESTION) + 1
    return [i >= start for i in range(len(row.ids))]


def asked(model: LoadedModel, record: maze_tasks.Record) -> list[tuple[str, str]]:
    """The question as (text, label), a line at a time: a list of cells by its name."""
    text = f"{record.prompt}\nAnswer:"
    if model.has_chat:
        thinking = record.thinking if maze_prompts.thinks(model) else None
        text = model.chat_text([{"role": "user", "content": record.prompt}], thinking)
    lines = text.splitlines(keepends=True)
    names = [line.partition(":")[0].strip().removeprefix("<|im_start|>user") for line in lines]
    return [(line, name.lower() if name in SECTIONS else "question")
            for line, name in zip(lines, names, strict=True)]  # fmt: skip


def labelled(model: LoadedModel, pieces: Sequence[tuple[str, str]]) -> tuple[list[int], list[str]]:
    """Token ids of the pieces' text in one, and of each the label of the piece it ends in."""
    text, ends, labels = "".join(text for text, _ in pieces), [], [label for _, label in pieces]
    for piece, _ in pieces:
        ends.append((ends[-1] if ends else 0) + len(piece))
    held = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found, at = [], 0
    for start, end in held["offset_mapping"]:
        while ends[at] < max(end, start + 1):
            at += 1
        found.append(labels[at])
    return list(held["input_ids"]), found
