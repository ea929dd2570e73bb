"""What experiment 005 makes of its pairs: scores of heads, profiles over layers, how far they hold.

A measure is a pair of tables, synergy and redundancy of every head in every prompt:

    mmi, ccs    the two redundancy functions
    surrogate   mmi of heads of two different prompts, which share nothing but the time of a step
    excess      mmi - surrogate: what is left for the pair
    memory      what a head's own past tells of its own future, no pair at all; redundancy 0
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from torch import Tensor

from lens_utils import profiles
from lens_utils.stats import Estimate

SCORES = ("value_diff", "rank_diff")
SPLITS = 100


class Atoms(NamedTuple):
    """Of one condition and measure: arrays [prompt, head], in nats."""

    sts: np.ndarray
    rtr: np.ndarray


Measured = dict[tuple[str, str], Atoms]  # by condition and measure


def gather(found: dict[tuple[str, str], dict], memory: np.ndarray) -> Measured:
    """Every measure of every condition, from the stages that hold their pairs."""
    measured = {
        kind: Atoms(*(pairs[f"{atom}_heads"].numpy() for atom in ("sts", "rtr")))
        for kind, pairs in found.items()
    }
    both = zip(measured["own", "mmi"], measured["own", "surrogate"], strict=True)
    measured["own", "excess"] = Atoms(*(one - other for one, other in both))
    measured["own", "memory"] = Atoms(memory, 0 * memory)
    return measured


def score_table(nodes: pd.DataFrame, measured: Measured, lag: np.ndarray) -> pd.DataFrame:
    """One row per head of `own`: atoms and scores by measure. 006 to 009 read it.

    Columns are sts_<measure>, rtr_<measure> (nats) and <score>_<measure>; sts, rtr and the scores
    alone are mmi's. value_diff and rank_diff are ranks, so compare within a table only.
    """
    table = nodes.copy()
    for measure in ("mmi", "ccs", "surrogate", "excess"):
        atoms = measured["own", measure]
        sts, rtr = profiles.over_prompts(atoms.sts), profiles.over_prompts(atoms.rtr)
        columns = {"sts": sts, "rtr": rtr}
        columns |= {score: profiles.head_scores(sts, rtr, score) for score in profiles.SCORES}
        for name, values in columns.items():
            if measure == "mmi":
                table[name] = values
            table[f"{name}_{measure}"] = values
    table["memory"] = profiles.over_prompts(measured["own", "memory"].sts)
    table["lag_correlation"] = profiles.over_prompts(lag)
    table["prompts"] = (~np.isnan(measured["own", "mmi"].sts)).sum(0)
    return table


def _kinds(measured: Measured, families: Sequence[str]) -> list[tuple]:
    """condition, measure, score, category and its prompts: everything that has a profile."""
    every = np.arange(len(families))
    kinds = [
        (condition, measure, score, "all", every)
        for condition, measure in measured
        for score in (SCORES if measure != "memory" else SCORES[:1])
    ]
    kinds += [
        ("own", measure, "value_diff", family, np.flatnonzero(np.array(families) == family))
        for measure in ("mmi", "ccs")
        if ("own", measure) in measured
        for family in dict.fromkeys(families)
    ]
    return kinds


def curves(
    measured: Measured, families: Sequence[str], layer: np.ndarray, resamples: int, seed: int
) -> pd.DataFrame:
    """Profiles over layers with 95 % bootstrap bands over prompts.

    A head's value is its score's rank among the heads, 0 .. 1 (`profiles.head_shares`), so that
    0.5 is an average layer and measures compare.
    """
    at, frames = np.unique(layer), []
    for place, value, drawn in _each(measured, families, resamples, seed):
        for mode in profiles.MODES:
            band = _band(value, drawn, layer, mode)
            depth = {"layer": at, "depth_pct": 100 * at / max(at.max(), 1)}
            frames.append(pd.DataFrame(place | {"mode": mode} | depth | band))
    return pd.concat(frames, ignore_index=True)


def shapes(
    measured: Measured, families: Sequence[str], layer: np.ndarray, resamples: int, seed: int
) -> pd.DataFrame:
    """The shape of each profile in a row, with a 95 % bootstrap interval over prompts.

    early, middle, late: means of the layers' thirds. hump: middle - the higher of the others, > 0
    for an inverted U. p_shuffled: share of random orders of the heads with as high a hump.
    """
    rows = []
    rng = np.random.default_rng(seed)
    for place, value, drawn in _each(measured, families, resamples, seed):
        raw = profiles.layer_profile(value, layer)
        hump = profiles.hump(raw)
        low, high = profiles.interval(hump, profiles.hump(profiles.layer_profile(drawn, layer)))
        mixed = rng.permuted(np.tile(value, (1000, 1)), axis=1)
        null = profiles.hump(profiles.layer_profile(mixed, layer))
        third = dict(zip(("early", "middle", "late"), profiles.thirds(raw), strict=True))
        rows.append(
            place
            | third
            | {"hump": hump, "low": low, "high": high,
               "p_shuffled": (1 + (null >= hump).sum()) / (1 + len(null)),
               "peak_layer": np.unique(layer)[np.nanargmax(raw)]}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _each(
    measured: Measured, families: Sequence[str], resamples: int, seed: int
) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """What it is, the heads' shares [head], and the same of resampled prompts [draw, head]."""
    for condition, measure, score, family, which in _kinds(measured, families):
        atoms = Atoms(*(table[which] for table in measured[condition, measure]))
        place = {"condition": condition, "measure": measure, "score": score, "family": family}
        weights = profiles.resamples(len(which), resamples, seed)
        yield place | {"n": len(which)}, shares(atoms, score), shares(atoms, score, weights)


def _band(value: np.ndarray, drawn: np.ndarray, layer: np.ndarray, mode: str) -> dict:
    middle = profiles.layer_profile(value, layer, mode)
    low, high = profiles.interval(middle, profiles.layer_profile(drawn, layer, mode))
    return {"mean": middle, "low": low, "high": high}


def shares(atoms: Atoms, score: str, weights: np.ndarray | None = None) -> np.ndarray:
    """Ranks of the heads' scores, 0 .. 1: [head], or [draw, head]."""
    return profiles.shares_over_prompts(*atoms, score, weights)


def reliability(measured: Measured, families: Sequence[str], seed: int) -> pd.DataFrame:
    """Spearman correlation of the heads' scores from two random halves of every category.

    Mean over splits, and the range of 95 % of them.
    """
    labels, rng, rows = np.array(families), np.random.default_rng(seed), []
    halves = []
    for _ in range(SPLITS):
        one = np.zeros(len(labels))
        for family in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == family))
            one[members[: len(members) // 2]] = 1
        halves.append(one)
    first = np.stack(halves)
    for (condition, measure), atoms in measured.items():
        for score in SCORES if measure != "memory" else SCORES[:1]:
            sides = [shares(atoms, score, side) for side in (first, 1 - first)]
            r = [spearman(a, b) for a, b in zip(*sides, strict=True)]
            kept = np.array(r)[np.isfinite(r)]
            low, high = np.percentile(kept, [2.5, 97.5]) if len(kept) else (np.nan, np.nan)
            rows.append(
                {"condition": condition, "measure": measure, "score": score,
                 "spearman": kept.mean() if len(kept) else np.nan, "low": low, "high": high,
                 "splits": SPLITS}
            )  # fmt: skip
    return pd.DataFrame(rows)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of what both have a value for."""
    there = ~np.isnan(one) & ~np.isnan(other)
    if there.sum() < 3:
        return float("nan")
    return float(spearmanr(one[there], other[there]).statistic)


def agreement(measured: Measured, layer: np.ndarray) -> pd.DataFrame:
    """How alike two ways of scoring are: Spearman over heads, Pearson over the layers' profiles."""
    kinds = [(c, m, s) for c, m in measured for s in (SCORES if m != "memory" else SCORES[:1])]
    value = {kind: shares(measured[kind[:2]], kind[2]) for kind in kinds}
    rows = []
    for one, other in itertools.combinations(kinds, 2):
        curve = [profiles.layer_profile(value[kind], layer) for kind in (one, other)]
        rows.append(
            {"one": " ".join(one), "other": " ".join(other),
             "spearman_heads": spearman(value[one], value[other]),
             "pearson_layers": float(np.corrcoef(*curve)[0, 1])}
        )  # fmt: skip
    return pd.DataFrame(rows)


def by_checkpoint(
    found: dict[str, Tensor], names: Sequence[str], layer: np.ndarray, resamples: int, seed: int
) -> pd.DataFrame:
    """Profiles (value_diff, mmi) of every training checkpoint, of its own text and of the run's."""
    at, frames = np.unique(layer), []
    for i, name in enumerate(names):
        for how in ("written", "replayed"):
            atoms = Atoms(*(found[f"{atom}_{how}"][i].numpy() for atom in ("sts", "rtr")))
            weights = profiles.resamples(len(atoms.sts), resamples, seed)
            value, drawn = shares(atoms, "value_diff"), shares(atoms, "value_diff", weights)
            place = {"checkpoint": name, "order": i, "text": how, "n": len(atoms.sts)}
            for mode in ("minmax", "raw"):
                depth = {"layer": at, "depth_pct": 100 * at / max(at.max(), 1)}
                band = _band(value, drawn, layer, mode)
                frames.append(pd.DataFrame(place | {"mode": mode} | depth | band))
    return pd.concat(frames, ignore_index=True)


def estimate(row: pd.Series, value: str) -> Estimate:
    """A row with an interval, as the findings show it."""
    return Estimate(value=float(row[value]), low=float(row.low), high=float(row.high), n=int(row.n))


NAMES = {
    "own": "the model's text",
    "shuffled": "shuffled prompts",
    "sampled": "sampled text",
    "chat": "chat template",
    "text": "no template",
    "untrained": "untrained model",
    "replayed": "untrained model reading the model's text",
}


def summarise(
    described: pd.DataFrame,
    shapes: pd.DataFrame,
    reliable: pd.DataFrame,
    alike: pd.DataFrame,
    texts: pd.DataFrame,
    noise: dict[str, float],
    nodes: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings."""
    by = described.set_index(["condition", "measure"]).sort_index()
    own, surrogate = by.loc["own", "mmi"], by.loc["own", "surrogate"]
    out: dict[str, object] = {
        "heads": len(nodes),
        "prompts": int(shapes.n.max()),
        "mean sts of a pair (nats)": own.sts,
        "mean rtr of a pair (nats)": own.rtr,
        "mean sts, heads of different prompts (nats)": surrogate.sts,
        "share of sts that heads of different prompts show too": surrogate.sts / own.sts,
        "mean sts of white noise of this length (nats)": noise["sts"],
        "r over pairs, sts with that of different prompts": own.r_pairs_sts_surrogate,
        "r over pairs, sts with twice the smaller memory": own.r_pairs_sts_memory,
        "r over heads, synergy with redundancy, mmi": own.r_heads_sts_rtr,
        "r over heads, synergy with redundancy, ccs": by.loc["own", "ccs"].r_heads_sts_rtr,
        "mean sts of a pair, ccs (nats)": by.loc["own", "ccs"].sts,
    }
    humps = shapes[shapes.family == "all"].set_index(["condition", "measure", "score"])
    for measure, score in (("mmi", "value_diff"), ("mmi", "rank_diff"), ("ccs", "value_diff"),
                           ("surrogate", "value_diff"), ("excess", "value_diff"),
                           ("memory", "value_diff")):  # fmt: skip
        label = measure if measure == "memory" else f"{measure}, {score}"
        out[f"hump of the profile, {label}"] = estimate(humps.loc[("own", measure, score)], "hump")
    for condition, _, score in humps.xs("mmi", level="measure", drop_level=False).index:
        if condition != "own" and score == "value_diff":
            row = humps.loc[(condition, "mmi", score)]
            out[f"hump, mmi, value_diff, {NAMES[condition]}"] = estimate(row, "hump")
    halves = reliable.set_index(["condition", "measure", "score"])
    for measure, score in (("mmi", "value_diff"), ("mmi", "rank_diff"), ("ccs", "value_diff")):
        row = halves.loc[("own", measure, score)]
        out[f"split-half Spearman over heads, {measure}, {score}"] = row.spearman
    base = alike[alike.one == "own mmi value_diff"].set_index("other").spearman_heads
    for other in ("own memory value_diff", "own mmi rank_diff", "own ccs value_diff",
                  "own excess value_diff", "sampled mmi value_diff"):  # fmt: skip
        if other in base.index:
            out[f"Spearman over heads, own mmi value_diff with {other}"] = base[other]
    for condition in ("own", "untrained", "replayed"):
        row, said = by.loc[condition, "mmi"], NAMES[condition]
        out[f"median lag correlation of heads, {said}"] = row.lag_correlation
        if condition != "own":
            out[f"mean sts, {said} (nats)"] = row.sts
            out[f"pairs x prompts without an answer, {said}"] = int(row.lost_pairs)
    for condition in ("own", "untrained"):
        rows, said = texts[texts.condition == condition], NAMES[condition]
        out[f"different tokens per text, {said}"] = rows.distinct.mean()
        out[f"repeated 4-grams, {said} (share)"] = rows.repeated.mean()
        out[f"texts that end in an exact loop, {said} (share)"] = float((rows.period > 0).mean())
    right = texts[texts.condition == "own"].groupby("family", sort=False).right.mean().dropna()
    for family, share in right.items():
        out[f"gold answer in the text, {family} (share)"] = share
    return out
