"""What experiment 002 makes of its readings: heads, nulls, held-out wordings.

From here on everything is tables and arrays [prompt, layer, head, pos]. Groups (a country in two
wordings, a noun in singular and plural) are averaged before anything is resampled.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy.stats import spearmanr

from lens_utils import stats
from lens_utils.attention import CLASSES, TYPES

MEASURES = (*CLASSES, "previous", "self")
TOP = 10  # heads of each task that are shown with intervals
PICKED = 5  # heads shown prompt by prompt, and chosen on one wording for the other
FOLLOWS = ("ioi", "induction")  # here the corrupted prompt has the same words in the same places


class Asked:
    """The prompts that were read: one row each, and which token is of which class."""

    def __init__(self, tokens: pd.DataFrame, screened: pd.DataFrame) -> None:
        self.tokens = tokens
        first = tokens.groupby("id", sort=False)
        self.prompts = first[["task", "template", "group", "answer"]].first().reset_index()
        known = screened.set_index("id").logit_diff_clean
        self.prompts["logit_diff"] = known.loc[self.prompts.id].to_numpy()
        self.length = first.size().to_numpy()

    @cached_property
    def masks(self) -> ndarray:
        """[prompt, measure, pos]: the classes, then the last token but one and the last."""
        row = {name: i for i, name in enumerate(self.prompts.id)}
        masks = np.zeros((len(self.prompts), len(MEASURES), self.length.max()))
        t = self.tokens
        masks[t.id.map(row), t.kind.map(MEASURES.index), t.pos] = 1
        prompts = np.arange(len(masks))
        masks[prompts, MEASURES.index("previous"), self.length - 2] = 1
        masks[prompts, MEASURES.index("self"), self.length - 1] = 1
        return masks

    @property
    def tasks(self) -> list[str]:
        return list(self.prompts.task.unique())

    def wordings(self) -> Iterator[tuple[tuple[str, str], ndarray]]:
        """Task and template, and their prompts' rows."""
        for name, rows in self.prompts.groupby(["task", "template"], sort=False):
            yield name, rows.index.to_numpy()

    def of(self, task: str, template: str | None = None) -> ndarray:
        """The rows of a task, or of one of its wordings."""
        chosen = self.prompts.task == task
        if template is not None:
            chosen &= self.prompts.template == template
        return np.flatnonzero(chosen)

    def by_group(self, values: ndarray, rows: ndarray) -> ndarray:
        """Means of the values of `rows` over each group: [group, ...]."""
        groups = self.prompts.group.to_numpy()[rows]
        return np.stack([values[groups == name].mean(0) for name in np.unique(groups)])


def numpy(held: dict) -> dict[str, ndarray]:
    return {name: np.asarray(value, dtype=float) for name, value in held.items()}


def to_shares(normed: ndarray) -> ndarray:
    """Parts of the sum over positions; NaN for a head that writes nothing."""
    with np.errstate(invalid="ignore"):
        return normed / normed.sum(-1, keepdims=True)


def entity(asked: Asked, held: dict, rows: ndarray, normed: bool = False) -> ndarray:
    """Mass of the last query on the entity: [prompt, layer, head]."""
    weights = np.asarray(held["normed" if normed else "attention"], dtype=float)[rows]
    weights = to_shares(weights) if normed else weights
    return np.einsum("plhk,pk->plh", weights, asked.masks[rows, MEASURES.index("entity")])


def by_head(values: dict[str, ndarray]) -> pd.DataFrame:
    """Arrays [layer, head] as columns, one row per head."""
    layers, heads = next(iter(values.values())).shape
    at = {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}
    return pd.DataFrame(at | {name: value.ravel() for name, value in values.items()})


# Heads


def heads(asked: Asked, held: dict) -> pd.DataFrame:
    """Per head and wording, means over prompts: mass of the last query on every class, as it is
    and norm-weighted (as a share), and entropy (bits) and evenness. Empty where a class is absent.

    The classes sum to 1; `previous` and `self` overlap with them.
    """
    clean, frames = numpy(held), []
    for (task, template), rows in asked.wordings():
        masks = asked.masks[rows]
        there = masks.sum((0, 2)) > 0
        columns = {}
        for suffix, weights in (
            ("", clean["attention"][rows]),
            ("_normed", to_shares(clean["normed"][rows])),
        ):
            masses = np.einsum("plhk,pck->plhc", weights, masks).mean(0)
            for c, name in enumerate(MEASURES):
                columns[name + suffix] = masses[..., c] if there[c] else masses[..., c] * np.nan
        for name in ("entropy", "evenness"):
            columns[name] = clean[name][rows].mean(0)
        about = {"task": task, "template": template, "n": len(rows)}
        frames.append(by_head(columns).assign(**about))
    table = pd.concat(frames, ignore_index=True)
    first = ["layer", "head", "task", "template", "n"]
    return table[first + [c for c in table if c not in first]]


def nulls(asked: Asked, held: dict, shuffles: int, seed: int) -> pd.DataFrame:
    """Per head and wording: mass on the entity against what position and chance give.

    low, high: 95 % interval of the mean over groups. random, corrupt, untrained: mass in the same
    places of random tokens, of the corrupted prompt (where that has the same words) and in the
    untrained twin. shuffled: with classes dealt anew among the tokens behind BOS. p_shuffled and
    p_random are corrected for looking at all heads (the largest of all heads in each shuffle, or
    in each flip of the signs of clean - random); over_random is that difference.
    """
    frames = []
    for (task, template), rows in asked.wordings():
        rng = np.random.default_rng(seed)
        clean = entity(asked, held["clean"], rows)
        columns = {}
        _, columns["low"], columns["high"] = banded(asked.by_group(clean, rows), seed)
        columns["entity"] = asked.by_group(clean, rows).mean(0)
        for source in ("random", "corrupt", "untrained"):
            other = entity(asked, held[source], rows)
            columns[source] = asked.by_group(other, rows).mean(0)
            if source == "corrupt" and task not in FOLLOWS:
                columns[source] = columns[source] * np.nan
            if source == "random":
                gaps = asked.by_group(clean - other, rows)
                columns["over_random"], columns["over_low"], columns["over_high"] = banded(
                    gaps, seed
                )
                columns["p_random"] = flip_p(gaps, shuffles, rng)
        dealt = shuffled(asked, held["clean"], rows, shuffles, rng)
        columns["shuffled"] = dealt.mean(0)
        columns["p_shuffled"] = largest_p(columns["entity"], dealt)
        about = {"task": task, "template": template, "n": len(np.unique(asked.prompts.group[rows]))}
        frames.append(by_head(columns).assign(**about))
    return pd.concat(frames, ignore_index=True)


def banded(values: ndarray, seed: int) -> tuple[ndarray, ndarray, ndarray]:
    """stats.bands over [group, layer, head]."""
    flat = stats.bands(values.reshape(len(values), -1), seed)
    return tuple(x.reshape(values.shape[1:]) for x in flat)


def shuffled(
    asked: Asked, held: dict, rows: ndarray, times: int, rng: np.random.Generator
) -> ndarray:
    """Mean mass on `entity` with each prompt's classes dealt anew: [shuffle, layer, head]."""
    weights = np.asarray(held["attention"], dtype=float)[rows]
    masks = asked.masks[rows]
    behind_bos = masks[:, : len(CLASSES) - 1].sum(1) > 0
    groups = asked.prompts.group[rows]
    share = 1 / groups.map(groups.value_counts()).to_numpy() / groups.nunique()
    total = np.zeros((times, *weights.shape[1:3]))
    for prompt, (row, free) in enumerate(zip(weights, behind_bos, strict=True)):
        places = np.flatnonzero(free)
        own = np.tile(masks[prompt, MEASURES.index("entity"), places], (times, 1))
        total += share[prompt] * np.einsum(
            "lhk,sk->slh", row[..., places], rng.permuted(own, axis=1)
        )
    return total


def largest_p(found: ndarray, null: ndarray) -> ndarray:
    """P of a null's largest head standing out as far as this one; each in its own null's sd."""
    mean, sd = null.mean(0), null.std(0)
    sd = np.where(sd > 1e-9, sd, np.inf)
    largest = ((null - mean) / sd).max((1, 2))
    z = (found - mean) / sd
    return beyond(largest, z)


def flip_p(gaps: ndarray, times: int, rng: np.random.Generator) -> ndarray:
    """One-sided p of paired differences [group, layer, head], over random signs of whole groups."""
    size = np.sqrt((gaps**2).sum(0))
    scaled = gaps / np.where(size > 1e-9, size, np.inf)
    signs = rng.choice((-1.0, 1.0), size=(times, len(gaps)))
    largest = np.tensordot(signs, scaled, 1).max((1, 2))
    return beyond(largest, scaled.sum(0))


def beyond(null: ndarray, found: ndarray) -> ndarray:
    """Share of a null's draws that reach a value, the value itself counted among them."""
    below = np.searchsorted(np.sort(null), found - 1e-9)
    return (1 + len(null) - below) / (1 + len(null))


def top_heads(asked: Asked, held: dict, nulls: pd.DataFrame, types: pd.DataFrame) -> pd.DataFrame:
    """The heads with most attention to the entity, by task, over both wordings; intervals over
    groups. They are chosen on the prompts they are measured on: see held_out.csv."""
    scores = types[types.model == "trained"].pivot_table(
        index=["layer", "head"], columns="type", values="mean"
    )[list(TYPES)]
    rows_of = []
    for task in asked.tasks:
        rows = asked.of(task)
        clean = entity(asked, held["clean"], rows)
        normed = entity(asked, held["clean"], rows, normed=True)
        random = entity(asked, held["random"], rows)
        mean = asked.by_group(clean, rows).mean(0)
        groups = asked.prompts.group.to_numpy()[rows]
        tested = nulls[nulls.task == task].groupby(["layer", "head"])[["p_random", "p_shuffled"]]
        worst = tested.max()
        for place, flat in enumerate(np.argsort(-mean, axis=None, kind="stable")[:TOP], 1):
            at = np.unravel_index(flat, mean.shape)
            over = stats.mean_ci((clean - random)[:, *at], groups)
            rows_of.append(
                {"task": task, "place": place, "layer": at[0], "head": at[1]}
                | stats.mean_ci(clean[:, *at], groups)
                | {"normed": np.nanmean(normed[:, *at]), "random": random[:, *at].mean(),
                   "over_random": over["value"], "over_low": over["low"],
                   "over_high": over["high"]}
                | worst.loc[at].to_dict() | scores.loc[at].to_dict()
            )  # fmt: skip
    return pd.DataFrame(rows_of)


def by_prompt(asked: Asked, held: dict, top: pd.DataFrame) -> pd.DataFrame:
    """The leading heads of each task, prompt by prompt: attention to the entity, its norm-weighted
    share, and what lies on the same places of the corrupted prompt and of random tokens."""
    frames = []
    for task in asked.tasks:
        rows = asked.of(task)
        about = asked.prompts.loc[rows, ["id", "task", "template", "group", "logit_diff"]]
        columns = {
            "entity": entity(asked, held["clean"], rows),
            "entity_normed": entity(asked, held["clean"], rows, normed=True),
            "corrupt": entity(asked, held["corrupt"], rows),
            "random": entity(asked, held["random"], rows),
        }
        for best in top[top.task == task].head(PICKED).itertuples():
            of_head = {name: x[:, best.layer, best.head] for name, x in columns.items()}
            frames.append(about.assign(layer=best.layer, head=best.head, **of_head))
    return pd.concat(frames, ignore_index=True)


def held_out(asked: Asked, held: dict) -> pd.DataFrame:
    """Heads chosen on one wording of a task, measured on the other, beside all heads' mean.

    rank_correlation: Spearman's, of all heads between the two wordings.
    """
    rows_of = []
    for task in asked.tasks:
        names = asked.prompts[asked.prompts.task == task].template.unique()
        masses = {n: entity(asked, held, asked.of(task, n)) for n in names}
        means = {n: asked.by_group(x, asked.of(task, n)).mean(0) for n, x in masses.items()}
        for one, other in zip(names, names[::-1], strict=True):
            if one == other:
                continue
            rho = spearmanr(means[one].ravel(), means[other].ravel()).statistic
            order = np.argsort(-means[one], axis=None, kind="stable")[:PICKED]
            groups = asked.prompts.group.to_numpy()[asked.of(task, other)]
            for flat in order:
                at = np.unravel_index(flat, means[one].shape)
                rows_of.append(
                    {"task": task, "chosen_on": one, "measured_on": other, "layer": at[0],
                     "head": at[1], "there": means[one][at]}
                    | stats.mean_ci(masses[other][:, *at], groups)
                    | {"place": int((means[other] > means[other][at]).sum()) + 1,
                       "all_heads": means[other].mean(), "rank_correlation": rho}
                )  # fmt: skip
    return pd.DataFrame(rows_of)
