"""The measurement of experiment 000: questions put to a model, one at a time or together.

A question is put in every form that the model has:

    chat    the model's own chat template; the answer ends with its end-of-turn token
    text    two examples before it, "Question: ... Answer: ..."; the answer ends with its line
"""

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import pandas as pd

from lens_utils import generate
from lens_utils.models import LoadedModel
from lens_utils.prompts import Prompt, shuffled

TOP = 5
UNTIL = {"chat": "", "text": "\n"}


class Put(NamedTuple):
    """A question under one condition."""

    question: Prompt
    condition: Literal["asked", "words shuffled", "untrained twin"]


def choose(questions: list[Prompt], cfg) -> list[Prompt]:
    """The questions of this run: all, or the first of each family."""
    most = cfg.per_family or (1 if cfg.quick else None)
    families = dict.fromkeys(q.family for q in questions)
    return [q for f in families for q in [q for q in questions if q.family == f][:most]]


def n_tokens(cfg) -> int:
    """Longest answer of this run."""
    return max(1, cfg.answer_tokens // (2 if cfg.quick else 1))


def forms(model: LoadedModel, text: str, examples: Sequence[Prompt]) -> dict[str, list[int]]:
    """Token ids of a question, by form."""
    shots = "".join(f"Question: {e.text}\nAnswer: {e.answer}\n\n" for e in examples)
    found = {"text": model.encode(f"{shots}Question: {text}\nAnswer:")}
    if model.has_chat:
        found = {"chat": model.encode_chat([{"role": "user", "content": text}])} | found
    return found


def answer(cfg, model: LoadedModel, put: Sequence[Put], examples: Sequence[Prompt]) -> pd.DataFrame:
    """The greedy answers, one row per token: what was chosen, and the model's top tokens.

    An untrained model is asked in one form only: it cannot tell them apart.
    """
    rows = []
    text = [shuffled(p.question.text, cfg.seed) if p.condition == "words shuffled" else
            p.question.text for p in put]  # fmt: skip
    encoded = [forms(model, t, examples) for t in text]
    for form in list(encoded[0])[: 1 if put[0].condition == "untrained twin" else None]:
        until = UNTIL[form]
        found = generate.answers(
            model,
            [e[form] for e in encoded],
            max_new_tokens=n_tokens(cfg),
            top_k_shown=TOP,
            until=until,
        )
        for p, asked, steps in zip(put, text, found, strict=True):
            for n, step in enumerate(steps):
                closes = step.id in model.ends or bool(until and until in step.text)
                row = {"question": p.question.id, "condition": p.condition, "form": form,
                       "put": asked, "step": n, "id": step.id, "token": model.decode([step.id]),
                       "text": step.text, "p": step.p, "entropy_bits": step.entropy_bits,
                       "closes": closes}  # fmt: skip
                for k, (token, p_token) in enumerate(step.top, start=1):
                    row |= {f"top{k}": model.decode([token]), f"p{k}": p_token}
                rows.append(row)
    return pd.DataFrame(rows)


def speed(
    cfg,
    model: LoadedModel,
    questions: Sequence[Prompt],
    examples: Sequence[Prompt],
    asked: pd.DataFrame,
) -> dict[str, float]:
    """The openings of two answers, streamed: are they the batch's, and how fast do they come?"""
    most = max(2, n_tokens(cfg) // 3)
    waited, streamed, tokens, same = 0.0, 0.0, 0, 0
    for question in questions[:: len(questions) // 2][:2]:
        form, ids = next(iter(forms(model, question.text, examples).items()))
        start = time.perf_counter()
        steps = generate.stream(model, ids, max_new_tokens=most, top_k_shown=TOP, until=UNTIL[form])
        found = [next(steps)]
        first = time.perf_counter()
        found += steps
        waited, streamed = waited + first - start, streamed + time.perf_counter() - first
        tokens += len(found) - 1
        batch = asked[(asked.question == question.id) & (asked.condition == "asked")]
        same += [s.id for s in found] == batch.id[batch.form == form].tolist()[:most]
    return {
        "seconds to the first token": waited / 2,
        "tokens per second after it": tokens / streamed,
        "streamed answers equal to the batch's": same / 2,
    }
