"""Prompts: records in prompts.json beside a run.py, checked before a model sees them.

A record is text and what should follow it. The answer is scored by its first token in this place:
the token that tokenising text + answer adds to the tokens of the text. A text may have slots, such
as "The {relation} of {entity} is": their names say which role a word plays (`spans`).
"""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from lens_utils.errors import BadInput

if TYPE_CHECKING:
    from lens_utils.models import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """One record of prompts.json."""

    id: str
    text: str
    """What the model continues. With `question`, the opening of its answer."""
    answer: str
    """What follows, with its leading space; empty where the record says null: there is none."""
    set: str = "facts"
    """Which part of the experiment it serves."""
    family: str = ""
    """Kind of knowledge; bootstraps and balances go by it."""
    template: str = ""
    """Wording; several per family, so that no result hangs on one."""
    group: str = ""
    """What is the same in several prompts: a fact in several formats, a pair in two directions."""
    format: str = "plain"
    direction: str = ""
    question: str = ""
    """A user turn that goes before, in the model's chat template."""
    pool: str = ""
    """Prompts that differ in what they ask for only; a corrupted partner is one of them."""
    slots: dict[str, str] = field(default_factory=dict)
    """What fills the slots of the text, by role. `text` is the text already filled."""
    spans: tuple[tuple[str, int, int], ...] = ()
    """Role, first and behind-the-last character of every filled slot; made by loading."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as one model reads it."""

    prompt: Prompt
    ids: tuple[int, ...]
    answer_id: int


def load(run_file: str, set: str | None = None) -> list[Prompt]:
    """The prompts beside a run.py, of one set or all. Raises BadInput naming what is malformed."""
    path = Path(run_file).with_name("prompts.json")
    where = f"{path.parent.name}/prompts.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{where} is not there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{where} is not JSON: {error}") from None
    records = raw.get("prompts") if isinstance(raw, dict) else raw
    if not isinstance(records, list) or not records:
        raise BadInput(f"{where} holds no prompts: a list of records with id, text and answer")
    prompts = [_checked(record, where, n) for n, record in enumerate(records)]
    double = [name for name, times in Counter(p.id for p in prompts).items() if times > 1]
    if double:
        raise BadInput(f"{where}: two prompts have the id {double[0]!r}")
    return [p for p in prompts if set is None or p.set == set]


def _checked(record: object, where: str, n: int) -> Prompt:
    known = {f.name for f in dataclasses.fields(Prompt)} - {"spans"}
    if not isinstance(record, dict) or not {"id", "text", "answer"} <= record.keys() <= known:
        odd = record.keys() ^ {"id", "text", "answer"} if isinstance(record, dict) else record
        raise BadInput(f"{where}: record {n} needs id, text and answer and may have "
                       f"{', '.join(sorted(known))}; look at {odd}")  # fmt: skip
    if record["answer"] is None:
        record = record | {"answer": ""}
    elif isinstance(record["answer"], str) and not record["answer"].strip():
        raise BadInput(f"{where}: prompt {record['id']!r} has an empty answer (null: it has none)")
    slots = record.get("slots", {})
    if not isinstance(slots, dict) or not all(
        isinstance(value, str) for value in [*(record | {"slots": ""}).values(), *slots.values()]
    ):
        raise BadInput(f"{where}: record {n} ({record['id']}) has a value that is not text")
    prompt = Prompt(**record)
    if slots:
        prompt = filled(prompt, where)
    if not (prompt.text or prompt.question).strip():
        raise BadInput(f"{where}: prompt {prompt.id!r} has an empty text")
    if prompt.text.endswith(" ") and not prompt.answer[:1].isdigit():
        raise BadInput(f"{where}: prompt {prompt.id!r} ends in a space; begin the answer with it")
    return prompt


def filled(prompt: Prompt, where: str = "prompts") -> Prompt:
    """The prompt with its slots filled in, and where they lie.

    Raises BadInput for a slot that the text lacks, or a slot of the text that nothing fills.
    """
    text, spans, named = "", [], set()
    for before, role, *_ in Formatter().parse(prompt.text):
        text += before
        if role is not None:
            if not prompt.slots.get(role, "").strip():
                raise BadInput(f"{where}: prompt {prompt.id!r} says nothing for {{{role}}}")
            spans.append((role, len(text), len(text) + len(prompt.slots[role])))
            text += prompt.slots[role]
            named.add(role)
    if missing := sorted(prompt.slots.keys() - named):
        raise BadInput(f"{where}: the text of prompt {prompt.id!r} has no {{{missing[0]}}}: "
                       "its span does not occur")  # fmt: skip
    return dataclasses.replace(prompt, text=text, spans=tuple(spans))


def encode(model: "LoadedModel", prompts: Sequence[Prompt]) -> tuple[list[Encoded], list[str]]:
    """Token ids and answer ids, and the ids of prompts this model cannot be asked.

    Left out are chat prompts for a model without a chat template, and answers of several tokens.
    Raises BadInput when a prompt does not fit the context, or its answer changes the text's tokens.
    """
    encoded, left_out = [], []
    for prompt in prompts:
        if prompt.question and not model.has_chat:
            left_out.append(prompt.id)
            continue
        if prompt.question:
            turn = model.encode_chat([{"role": "user", "content": prompt.question}])
            ids = turn + model.encode(prompt.text, bos=False)
            whole = turn + model.encode(prompt.text + prompt.answer, bos=False)
        else:
            ids, whole = model.encode(prompt.text), model.encode(prompt.text + prompt.answer)
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise BadInput(f"prompt {prompt.id!r}: in {model.name} the answer {prompt.answer!r} "
                           "merges with the end of the text; reword it")  # fmt: skip
        if len(whole) > len(ids) + 1:
            left_out.append(prompt.id)
        else:
            encoded.append(Encoded(prompt, tuple(ids), whole[-1]))
    return encoded, left_out


def derange(encoded: Sequence[Encoded], seed: int) -> list[int]:
    """For each prompt another's answer id, of the same set and family: the wrong-answer control.

    A family with one distinct answer borrows from all prompts.
    """
    rng = random.Random(seed)
    dealt = [0] * len(encoded)
    kinds = [(e.prompt.set, e.prompt.family) for e in encoded]
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        answers = {encoded[i].answer_id for i in members}
        pool = sorted(answers if len(answers) > 1 else {e.answer_id for e in encoded})
        for i in members:
            others = [a for a in pool if a != encoded[i].answer_id]
            dealt[i] = rng.choice(others) if others else pool[0]
    return dealt


def shuffled(text: str, seed: int) -> str:
    """The words of a text in an order of their own, its closing mark last: the no-sense control."""
    close = text[-1] if text[-1] in ".?!" else ""
    words = text.removesuffix(close).split()
    if len(set(words)) < 2:
        raise BadInput(f"there is no other order of {text!r}")
    rng = random.Random(f"{seed} {text}")
    order = words
    while order == words:
        order = rng.sample(words, len(words))
    return " ".join(order) + close
