"""The measurement of experiment 000: questions put to a model, its answers graded.

A question is put in every form that the model has:

    chat    the model's own chat template; the answer ends with its end-of-turn token
    text    two examples before it, "Question: ... Answer: ..."; the answer ends with its line
"""

import random
import re
import time
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray
from scipy.stats import bootstrap, mannwhitneyu
from sklearn.metrics import roc_auc_score

from lens_utils import generate
from lens_utils.models import LoadedModel
from lens_utils.prompts import Prompt
from lens_utils.stats import RESAMPLES, Estimate, mean_ci

TOP = 5
CONTROLS = ("words shuffled", "untrained twin")
UNTIL = {"chat": "", "text": "\n"}
# What could tell right answers from wrong ones; the last is the rival that costs nothing.
SIGNS = {
    "p_new": "probability of the first new word",
    "p_mean": "mean token probability",
    "shortness": "shortness",
}


class Put(NamedTuple):
    """A question under one condition."""

    question: Prompt
    condition: Literal["asked", "words shuffled", "untrained twin"]


def choose(questions: list[Prompt], cfg) -> list[Prompt]:
    """The questions of this run: all, or the first of each family."""
    most = cfg.per_family or (2 if cfg.quick else None)
    families = dict.fromkeys(q.family for q in questions)
    return [q for f in families for q in [q for q in questions if q.family == f][:most]]


def shuffled(text: str, seed: int) -> str:
    """The words of a question in an order of their own, its question mark last."""
    words = text.rstrip("?").split()
    rng = random.Random(f"{seed} {text}")
    order = words
    while order == words:
        order = rng.sample(words, len(words))
    return " ".join(order) + "?"


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
            max_new_tokens=cfg.answer_tokens,
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


def words(text: str) -> str:
    """Words and numbers, lower case, no accents, one space around each."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    found = re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", plain.casefold())
    return f" {' '.join(w.replace(',', '') for w in found)} "


def is_right(said: str, gold: str) -> bool:
    """Whether one of the accepted answers, apart by |, is among the words that were said."""
    return any(words(accepted) in words(said) for accepted in gold.split("|"))


def grade(steps: Sequence[pd.DataFrame], questions: Sequence[Prompt]) -> pd.DataFrame:
    """One row per answer: what was said, whether it is right, how sure the model was of it.

    p_new is of the first token whose word the question does not hold (of the first word at all
    when there is none): where an answer that begins by repeating the question gets to the point.
    p_mean is the mean over tokens. The token that ends the answer counts for neither.
    right_by_another: by the gold of the next question of the family, which is what the kind of
    answer alone would give.
    """
    by_id = {q.id: q for q in questions}
    another = {}
    for family in dict.fromkeys(q.family for q in questions):
        kin = [q for q in questions if q.family == family]
        another |= {q.id: kin[(i + 1) % len(kin)].answer for i, q in enumerate(kin)}
    rows = []
    for (name, condition, form), steps_of in pd.concat(steps).groupby(
        ["question", "condition", "form"], sort=False
    ):
        said, question = "".join(steps_of.text), by_id[name]
        said = (said.split("\n")[0] if form == "text" else said).strip()
        kept = steps_of[~steps_of.closes]
        content = kept[kept.token.map(words).str.strip() != ""]
        new = content[[words(token) not in words(question.text) for token in content.token]]
        first = pd.concat([new, content]).head(1)
        rows.append(
            {
                "question": name,
                "family": question.family,
                "condition": condition,
                "form": form,
                "put": steps_of.put.iloc[0],
                "gold": question.answer,
                "answer": visible(said),
                "right": is_right(said, question.answer),
                "right_by_another": is_right(said, another[name]),
                "new": "".join(first.token.map(visible)),
                "p_new": first.p.mean(),
                "p_mean": kept.p.mean(),
                "entropy_new_bits": first.entropy_bits.mean(),
                "tokens": len(kept),
                "ended": bool(steps_of.closes.any()),
            }
        )
    return pd.DataFrame(rows).sort_values(["form", "condition"], kind="stable")


def visible(text: str) -> str:
    """Text on one line: line breaks and control characters as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_steps(asked: pd.DataFrame, questions: Sequence[Prompt]) -> pd.DataFrame:
    """Every token of the answers to two questions of each family, with what else was likely."""
    families = pd.DataFrame([(q.id, q.family) for q in questions], columns=["question", "family"])
    first = families.groupby("family").head(2).question
    table = asked[asked.question.isin(first) & (asked.condition == "asked")]
    table = table.drop(columns="condition")
    for column in ("token", "text", *(f"top{k}" for k in range(1, TOP + 1))):
        table[column] = table[column].map(visible)
    return table


def speed(
    cfg,
    model: LoadedModel,
    questions: Sequence[Prompt],
    examples: Sequence[Prompt],
    asked: pd.DataFrame,
) -> dict[str, float]:
    """The openings of two answers, streamed: are they the batch's, and how fast do they come?"""
    most = cfg.answer_tokens // 2
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


def summarise(answers: pd.DataFrame, seed: int) -> dict[str, Estimate | int]:
    """Shares with bootstrap intervals over questions, and what the model's confidence is worth."""
    found: dict[str, Estimate | int] = {"questions": answers.question.nunique()}
    answers = answers.assign(shortness=-answers.tokens)
    for form in dict.fromkeys(answers.form):
        conditions = {c: t for c, t in answers[answers.form == form].groupby("condition")}
        asked = conditions["asked"]
        shares = {
            "right answers": asked.right,
            **{f"right answers, {c}": conditions[c].right for c in CONTROLS if c in conditions},
            "right by another question's answer": asked.right_by_another,
            "answers that end by themselves": asked.ended,
        }
        for label, values in shares.items():
            found[f"{form}: {label}"] = mean_ci(values.to_numpy(), seed=seed)
        families = asked.family.to_numpy()
        for column, name in SIGNS.items():
            known = asked[column].notna().to_numpy()
            p, right = asked[column].to_numpy(dtype=float)[known], asked.right.to_numpy()[known]
            if min(right.sum(), (~right).sum()) < 2:
                continue  # nothing to tell apart
            label = f"{form}: AUROC for right answers, {name}"
            found[label] = auroc(p, right, seed)
            if column == "shortness":
                continue
            found[f"{label}, labels shuffled"] = null_auroc(p, right, np.zeros(len(p)), seed)
            within = null_auroc(p, right, families[known], seed)
            found[f"{label}, labels shuffled within families"] = within
    return found


def auroc(p: Float[ndarray, " answer"], right: Bool[ndarray, " answer"], seed: int) -> Estimate:
    """The probability that a right answer has the higher p; bootstrap over right and over wrong."""

    def area(of_right, of_wrong, axis=-1):
        test = mannwhitneyu(of_right, of_wrong, axis=axis, method="asymptotic")
        return test.statistic / (of_right.shape[axis] * of_wrong.shape[axis])

    interval = bootstrap(
        (p[right], p[~right]),
        area,
        n_resamples=RESAMPLES,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    value = float(roc_auc_score(right, p))
    return Estimate(value=value, low=float(interval.low), high=float(interval.high), n=len(p))


def null_auroc(
    p: Float[ndarray, " answer"],
    right: Bool[ndarray, " answer"],
    groups: Shaped[ndarray, " answer"],
    seed: int,
) -> Estimate:
    """The mean AUROC when right and wrong are shuffled within groups, and where 95 % of them lie.

    With one group it is 0.5. Within families it is what knowing the family alone would give: some
    are easier than others, and the model may be surer of them as a whole.
    """
    rng = np.random.default_rng(seed)
    at = np.argsort(groups, kind="stable")
    null = []
    for _ in range(1000):
        dealt = np.empty_like(right)
        dealt[at] = right[np.lexsort((rng.random(len(p)), groups))]
        null.append(roc_auc_score(dealt, p))
    low, high = np.percentile(null, [2.5, 97.5])
    return Estimate(value=float(np.mean(null)), low=float(low), high=float(high), n=len(p))
