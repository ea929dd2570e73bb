"""The tables of experiment 000: answers graded, and what the model's confidence is worth."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray
from scipy.stats import bootstrap, mannwhitneyu, rankdata
from sklearn.metrics import roc_auc_score

from lens_utils.prompts import Prompt
from lens_utils.stats import RESAMPLES, Estimate, mean_ci

CONTROLS = ("words shuffled", "untrained twin")
# What could tell right answers from wrong ones; the last is the rival that costs nothing.
SIGNS = {
    "p_new": "probability of the first new word",
    "p_mean": "mean token probability",
    "shortness": "shortness",
}


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
    for column in ("token", "text", *table.filter(regex=r"^top\d")):
        table[column] = table[column].map(visible)
    return table


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
    dealt = np.empty((RESAMPLES, len(p)), dtype=bool)
    for row in dealt:
        row[at] = right[np.lexsort((rng.random(len(p)), groups))]
    n_right = right.sum()
    above = dealt @ rankdata(p) - n_right * (n_right + 1) / 2  # Mann and Whitney's U
    null = above / (n_right * (len(p) - n_right))
    low, high = np.percentile(null, [2.5, 97.5])
    return Estimate(value=float(null.mean()), low=float(low), high=float(high), n=len(p))
