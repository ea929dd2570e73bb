"""What the masks are learned and tested on: documents, or a task's answers.

Three splits that share nothing: documents by document, tasks by what fills their templates (other
names, other nouns, other sums, other random tokens). A row is a prompt with its right answer, as
this model's tokenizer cuts it; only the answer's prediction counts. Of documents every token
counts but the first two.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lens_utils import corpora
from lens_utils.errors import BadInput
from lens_utils.kv_masks import Examples
from lens_utils.models import LoadedModel

TASKS = ("ioi", "induction", "agreement", "arithmetic")
SPLITS = ("fit", "validation", "test")
WORDS = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


class Data(NamedTuple):
    """The three splits and what they are, for the manifest."""

    splits: dict[str, Examples]
    about: dict[str, Any]
    bytes_per_token: float | None
    """Of the test split's counted text; None for tasks."""


class Item(NamedTuple):
    """A prompt, the right answer, a wrong one, and the part of the content that splits go by."""

    text: str
    answer: str
    foil: str
    content: str


def task_items(name: str) -> Iterator[Item]:
    """All items of a task, from the templates in prompts.json."""
    words = WORDS[name]
    if name == "ioi":
        for text, place, (one, two), thing in itertools.product(
            words["texts"], words["places"], itertools.permutations(words["names"], 2),
            words["objects"],
        ):  # fmt: skip
            for subject, other in ((one, two), (two, one)):
                filled = text.format(one=one, two=two, place=place, subject=subject, object=thing)
                yield Item(filled, f" {other}", f" {subject}", "-".join(sorted((one, two))))
    elif name == "agreement":
        for text, noun, attractor in itertools.product(
            words["texts"], words["nouns"], words["nouns"]
        ):
            for number, other in itertools.product((0, 1), repeat=2):
                if noun != attractor:
                    filled = text.format(noun=noun[number], attractor=attractor[other])
                    answers = words["answers"]
                    yield Item(filled, answers[number], answers[1 - number], noun[0])
    elif name == "arithmetic":
        form, largest = words["text"], words["largest"]
        shown = "\n".join(form.format(a=a, b=b) + str(a + b) for a, b in words["shots"])
        for a, b in itertools.product(range(largest + 1), repeat=2):
            if a + b <= largest and [a, b] not in words["shots"]:
                foil = str(a + b + 1) if a + b < largest else str(a + b - 1)
                yield Item(f"{shown}\n{form.format(a=a, b=b)}", str(a + b), foil, f"{a}+{b}")


def split_of(content: str) -> str:
    """fit, validation or test, by a digest: about 60, 15 and 25 per cent of the contents."""
    share = int(hashlib.sha256(content.encode()).hexdigest(), 16) % 100
    return "fit" if share < 60 else "validation" if share < 75 else "test"


def of_task(model: LoadedModel, name: str, n: dict[str, int], seed: int) -> Data:
    """Examples of a task. Raises BadInput when this tokenizer leaves a split without any."""
    if name == "induction":
        return _induction(model, n, seed)
    by_split: dict[str, list[tuple[list[int], int, str]]] = {split: [] for split in SPLITS}
    items = list(task_items(name))
    random.Random(seed).shuffle(items)
    for item in items:
        held = by_split[split_of(item.content)]
        if len(held) < n[split_of(item.content)]:
            right = model.encode(item.text + item.answer)
            wrong = model.encode(item.text + item.foil)
            if right[:-1] == wrong[:-1] and right[-1] != wrong[-1]:  # one token each
                held.append((right, wrong[-1], item.content))
    splits = {}
    for split, held in by_split.items():
        if not held:
            raise BadInput(f"{name}: no answers of one token for {model.name}: choose another task")
        width = max(len(ids) for ids, *_ in held)
        ids = torch.zeros(len(held), width - 1, dtype=torch.long)
        target, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (right, _, _) in enumerate(held):
            ids[row, : len(right) - 1] = torch.tensor(right[:-1])
            target[row, len(right) - 2], counted[row, len(right) - 2] = right[-1], True
        names = sorted({content for *_, content in held})
        group = torch.tensor([names.index(content) for *_, content in held])
        splits[split] = Examples(ids, target, counted, group, torch.tensor([w for _, w, _ in held]))
    return Data(splits, {"source": f"task {name}", "fallback": ""}, None)


def _induction(model: LoadedModel, n: dict[str, int], seed: int) -> Data:
    """Random tokens twice; the second time each can be known from the first."""
    length = min(WORDS["induction"]["length"], (model.n_ctx - 2) // 2)
    d_vocab = model.bridge.cfg.d_vocab
    splits = {}
    for number, split in enumerate(SPLITS):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        drawn = torch.randint(d_vocab // 8, d_vocab, (n[split], length), generator=generator)
        bos = torch.tensor([model.bos]).long().expand(n[split], -1)
        whole = torch.cat([bos, drawn, drawn], dim=1)
        counted = torch.zeros_like(whole[:, 1:], dtype=torch.bool)
        counted[:, -(length - 1) :] = True  # from the second token of the repetition on
        splits[split] = Examples(whole[:, :-1], whole[:, 1:], counted, torch.arange(n[split]))
    return Data(splits, {"source": "task induction", "fallback": ""}, None)


def of_documents(model: LoadedModel, name: str, n: dict[str, int], length: int, seed: int) -> Data:
    """The openings of documents, `length` tokens of each. Raises BadInput when there are none."""
    text = corpora.load(name, characters=max(500_000, 40 * length * sum(n.values())))
    docs = list(text.docs)
    random.Random(seed).shuffle(docs)
    rows: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    for doc in docs:
        held = rows[doc.split]
        if len(held) < n[doc.split]:
            ids = model.encode(doc.text[: 16 * length], longest=length + 1)
            if len(ids) == length + 1:
                held.append(ids)
    if empty := [split for split, held in rows.items() if not held]:
        raise BadInput(f"{name}: no documents of {length} tokens for {empty[0]}: lower --length")
    splits = {split: of_rows(held) for split, held in rows.items()}
    test = rows["test"]
    n_bytes = sum(len(model.decode(ids[2:]).encode()) for ids in test)
    about = text.manifest() | {"said": text.said}
    return Data(splits, about, n_bytes / sum(len(ids) - 2 for ids in test))


def of_rows(rows: list[list[int]]) -> Examples:
    """Rows of token ids of one length, of which every prediction but the first counts."""
    whole = torch.tensor(rows)
    counted = torch.ones_like(whole[:, 1:], dtype=torch.bool)
    counted[:, 0] = False  # what follows the start of a text is nobody's business
    return Examples(whole[:, :-1], whole[:, 1:], counted, torch.arange(len(rows)))
