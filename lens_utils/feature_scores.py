"""Is a label any good? Three tests of it on text that it was not made from.

- Detection: windows in which the feature fires and windows in which it does not, unmarked. Which
  are which, by the label?
- Fuzzing: windows in which it fires, marked where it does, and others, marked elsewhere. Which
  marks are right?
- Intruder: four windows in which the feature fires strongly and a fifth in which another one does.
  Which does not belong? No label is needed: it asks whether the feature is about one thing.

(Bills et al. 2023; Paulo et al. 2024, arXiv:2410.13928.) A judge gives every window a number; the
score is the AUROC, or for intruders the share found. The control gives each feature the label of
another one. Judges here need no language model; `feature_judges` has some that are one.

Axes: window, place (tokens of a window, in order), pool (tokens whose codes are known whole).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from sklearn.metrics import roc_auc_score

from lens_utils.feature_facts import Kind, Tokens
from lens_utils.feature_labels import Fires, Pool, Rules, strongest, tells

WIDTH = 24
"""Tokens of a window."""
WINDOWS = 12
"""Of each class, for one feature."""
FEWEST = 4
BELONG = 4
"""Windows of the feature's own beside an intruder."""


class Trial(NamedTuple):
    """Windows of one feature."""

    token: Int[ndarray, "window place"]
    """Numbers in the corpus."""
    marked: Bool[ndarray, "window place"]
    positive: Bool[ndarray, " window"]


Judge = Callable[[Trial, int], Float[ndarray, " window"]]
"""Scores of a trial's windows under the label of a feature; higher for "yes"."""


def windows(pool: Pool, tokens: Tokens) -> Int[ndarray, "window place"]:
    """The pool's rows cut into windows of WIDTH tokens, the first tokens of rows left out."""
    row = tokens.row[pool.token]
    start = np.flatnonzero(np.diff(row, prepend=-1))
    length = np.diff(start, append=len(row))
    first = [pool.token[s] + at for s, n in zip(start, length, strict=True)
             for at in range(1, n - WIDTH + 1, WIDTH)]  # fmt: skip
    return np.asarray(first, dtype=np.int64)[:, None] + np.arange(WIDTH)


def detection(
    fires: Fires,
    cut: Int[ndarray, "window place"],
    features: Sequence[int],
    n_features: int,
    rng: np.random.Generator,
) -> dict[int, Trial]:
    """By feature: windows with one of its stronger fires, and windows without any.

    fires: all at the pool's tokens; cut: `windows`. Features with fewer than FEWEST of either are
    left out. Marks are where it fires.
    """
    strong, found = strongest(fires, n_features), {}
    place = np.full(int(cut.max(initial=0)) + 1, -1)
    place[cut] = np.arange(len(cut))[:, None]

    def inside(of: Fires) -> tuple[ndarray, ndarray]:
        known = of.token < len(place)
        at = np.where(known, place[np.where(known, of.token, 0)], -1)
        return of.feature[at >= 0], at[at >= 0]

    (all_feature, all_window), (top_feature, top_window) = inside(fires), inside(strong)
    for feature in features:
        yes = np.unique(top_window[top_feature == feature])
        no = np.setdiff1d(np.arange(len(cut)), all_window[all_feature == feature])
        n = min(len(yes), len(no), WINDOWS)
        if n < FEWEST:
            continue
        chosen = np.concatenate([rng.permutation(of)[:n] for of in (yes, no)])
        on = np.isin(cut[chosen], fires.token[fires.feature == feature])
        found[feature] = Trial(cut[chosen], on, np.arange(2 * n) < n)
    return found


def fuzzing(trial: Trial, rng: np.random.Generator) -> Trial:
    """Of a detection trial: its positive windows, and the same marked at as many other places."""
    token, marked = trial.token[trial.positive], trial.marked[trial.positive]
    keep = marked.sum(1) <= WIDTH // 2
    token, marked = token[keep], marked[keep]
    elsewhere = np.zeros_like(marked)
    for n, on in enumerate(marked):
        elsewhere[n, rng.permutation(np.flatnonzero(~on))[: on.sum()]] = True
    return Trial(np.concatenate([token, token]), np.concatenate([marked, elsewhere]),
                 np.arange(2 * len(token)) < len(token))  # fmt: skip


def intruders(
    fires: Fires, features: Sequence[int], n_features: int, rng: np.random.Generator, n: int = 5
) -> dict[int, Int[ndarray, "trial place"]]:
    """By feature: n trials of BELONG tokens where it fires strongly, and one of another's."""
    strong, found = strongest(fires, n_features), {}
    for feature in features:
        own = strong.token[strong.feature == feature]
        silent = ~np.isin(strong.token, fires.token[fires.feature == feature])
        if len(own) < BELONG or not silent.any():
            continue
        found[feature] = np.stack([
            np.append(rng.permutation(own)[:BELONG], rng.choice(strong.token[silent]))
            for _ in range(n)
        ])  # fmt: skip
    return found


def spot(kinds: Sequence[Kind], token: Int[ndarray, "trial place"]) -> Bool[ndarray, " trial"]:
    """Whether the last token of each trial has the fewest facts in common with the others."""
    codes = np.concatenate([kind.codes[token] for kind in kinds], axis=-1)
    same = (codes[:, :, None] == codes[:, None, :]) & (codes[:, :, None] >= 0)
    alike = same.sum(-1) - same.sum(-1) * np.eye(token.shape[1], dtype=int)
    total = alike.sum(-1)
    return (total[:, -1:] < total[:, :-1]).all(1)


def by_rule(rules: Rules, kinds: Sequence[Kind]) -> tuple[Judge, Judge]:
    """Judges of detection and fuzzing: the share of tokens, or of marked ones, with the label."""

    def detect(trial: Trial, feature: int) -> ndarray:
        return tells(rules, kinds, feature, trial.token).mean(1)

    def fuzz(trial: Trial, feature: int) -> ndarray:
        said = tells(rules, kinds, feature, trial.token) & trial.marked
        return said.sum(1) / np.maximum(trial.marked.sum(1), 1)

    return detect, fuzz


def scored(trials: dict[int, Trial], judge: Judge, rng: np.random.Generator) -> dict[int, tuple]:
    """By feature: AUROC of its own label, and of the label of another of these features."""
    features = [f for f, trial in trials.items() if trial.positive.any()]
    order = rng.permutation(len(features))
    other = {features[a]: features[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    return {f: tuple(float(roc_auc_score(trials[f].positive, judge(trials[f], label)))
                     for label in (f, other[f])) for f in features}  # fmt: skip


def strangers(
    trials: dict[int, Int[ndarray, "trial place"]], rng: np.random.Generator
) -> dict[int, Int[ndarray, "trial place"]]:
    """The control of intruders: every token of a trial is of another feature, so none belongs."""
    features = list(trials)
    found = {}
    for feature, token in trials.items():
        others = rng.choice(features, size=token.shape)
        found[feature] = np.array(
            [[rng.choice(trials[f].flatten()) for f in row] for row in others]
        )
    return found
