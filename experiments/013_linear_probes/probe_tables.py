"""What experiment 013 makes of its probes' log-odds: accuracies, controls, bits, directions.

Tables from arrays, no model. Accuracy is balanced (chance 0.5) and held out everywhere; intervals
resample mazes.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from probe_design import LABELS, REQUIRES, VALID, Design

from lens_utils import probe_scores
from lens_utils.stats import Estimate


class Solved(NamedTuple):
    """One set of rows with its solve: direct, thinking, judge, untrained, words ..."""

    name: str
    groups: pd.DataFrame
    design: Design
    arrays: dict[str, np.ndarray]

    def cell(self, label: str, variant: str, scheme: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels (sample) and held-out log-odds (group, sample) of a cell; empty without it."""
        cells, _ = self.design.cells
        found = (cells.label == label) & (cells.variant == variant) & (cells.scheme == scheme)
        at = np.flatnonzero(found)
        if not len(at):
            return np.zeros(0, dtype=bool), np.zeros((0, 0))
        return self.design.of_cells[at[0]], self.arrays["logits"][:, at[0]]

    def named(self, column: str) -> list[str]:
        cells, _ = self.design.cells
        return list(dict.fromkeys(cells[column]))


def drawn(one: Solved, labels: np.ndarray, logits: np.ndarray, seed: int) -> np.ndarray:
    """Accuracies of every group under resampled mazes: (draw, group)."""
    right = np.where(np.isnan(logits), np.nan, (logits > 0) == labels)
    return probe_scores.intervals(labels, right, one.design.rows.maze.to_numpy(), seed)


def standard_performance(sets: list[Solved], seed: int) -> pd.DataFrame:
    """1. Accuracy, precision, recall, F1 and AUC of every label at every site and depth, with the
    control's and the shuffled labels' accuracies and selectivity (accuracy - control)."""
    frames = []
    for one in sets:
        for label in [name for name in one.named("label") if name in (*LABELS, VALID)]:
            for scheme in ("maze", "template"):
                labels, logits = one.cell(label, "true", scheme)
                if len(labels):
                    frames.append(_performance(one, label, scheme, labels, logits, seed))
    return pd.concat(frames, ignore_index=True)


def _performance(
    one: Solved, label: str, scheme: str, labels: np.ndarray, logits: np.ndarray, seed: int
) -> pd.DataFrame:
    scores = pd.DataFrame([probe_scores.standard(labels, z) for z in logits])
    true = drawn(one, labels, logits, seed)
    low, high = probe_scores.interval(true)
    found = one.groups.assign(set=one.name, label=label, scheme=scheme)
    found = pd.concat([found, scores], axis=1).assign(low=low, high=high)
    found["n_mazes"] = one.design.rows.maze[~np.isnan(logits[0])].nunique()
    variants = [v for v in one.named("variant") if v.startswith("control")]
    controls = [one.cell(label, variant, scheme) for variant in variants]
    controls = [pair for pair in controls if len(pair[0])]
    if controls:
        each = [[probe_scores.standard(y, z)["accuracy"] for z in zs] for y, zs in controls]
        found["control"] = np.mean(each, axis=0)
        gaps = true - np.mean([drawn(one, y, zs, seed) for y, zs in controls], axis=0)
        found["selectivity"] = found.accuracy - found.control
        found["selectivity_low"], found["selectivity_high"] = probe_scores.interval(gaps)
    shuffled, zs = one.cell(label, "shuffled", scheme)
    if len(shuffled):
        found["shuffled"] = [probe_scores.standard(shuffled, z)["accuracy"] for z in zs]
        bounds = probe_scores.interval(drawn(one, shuffled, zs, seed))
        found["shuffled_low"], found["shuffled_high"] = bounds
    return found


def peaks(sets: list[Solved], seed: int) -> pd.DataFrame:
    """Of every label and site the best depth by held-out wordings, found on half of the mazes, and
    its accuracy on the other half."""
    rows = []
    for one in sets:
        maze = one.design.rows.maze.to_numpy()
        names = np.random.default_rng(seed).permutation(np.unique(maze))
        half = np.isin(maze, names[: len(names) // 2])
        for label in [name for name in one.named("label") if name in (*LABELS, VALID)]:
            labels, logits = one.cell(label, "true", "template")
            for site in one.groups.site.unique() if len(labels) else ():
                at = np.flatnonzero(one.groups.site == site)
                zs = logits[at]
                choosing = [probe_scores.standard(labels[half], z[half])["accuracy"] for z in zs]
                if np.isnan(choosing).all():
                    continue
                best = int(np.nanargmax(choosing))
                right = np.where(np.isnan(zs), np.nan, (zs > 0) == labels)[best : best + 1]
                draws = probe_scores.intervals(labels[~half], right[:, ~half], maze[~half], seed)
                low, high = probe_scores.interval(draws)
                value = probe_scores.standard(labels[~half], zs[best, ~half])["accuracy"]
                rows.append({
                    "set": one.name, "site": site, "label": label,
                    "depth": int(one.groups.depth[at[best]]), "accuracy": value,
                    "low": float(low[0]), "high": float(high[0]),
                    "n_mazes": len(names) - len(names) // 2,
                })  # fmt: skip
    return pd.DataFrame(rows)


def code_length(sets: list[Solved]) -> pd.DataFrame:
    """Bits to tell the labels to somebody who has the states, by the online code, and how many
    times shorter that is than one bit a row. Both classes count alike."""
    rows = []
    for one in sets:
        for label in [name for name in one.named("label") if name in (*LABELS, VALID)]:
            for variant in ("true", "shuffled"):
                labels, logits = one.cell(label, variant, "online")
                for group, z in zip(one.groups.itertuples(), logits, strict=len(labels) > 0):
                    coded = ~np.isnan(z)
                    weight = probe_scores.balance(labels, coded) * coded.sum()
                    paid = probe_scores.bits(labels[coded], z[coded]) @ weight[coded]
                    total = float(paid + (~coded).sum())  # the first ones cost a bit each
                    rows.append({
                        "set": one.name, "site": group.site, "depth": group.depth,
                        "label": label, "variant": variant, "bits": total, "n": len(z),
                        "bits_per_row": total / len(z), "compression": len(z) / total,
                    })  # fmt: skip
    return pd.DataFrame(rows)


def directions(sets: list[Solved]) -> pd.DataFrame:
    """Cosines of the nested labels' directions, against labels dealt anew with the same nesting.

    p: share of the deals whose cosine lies as far from the deals' mean. Task labels, which are not
    nested, have no deals.
    """
    rows = []
    for one in sets:
        about = pd.DataFrame(one.design.problems)
        about = about[about.scheme == "all"].reset_index(drop=True)
        if not {*REQUIRES} <= {*about.label}:
            continue
        every = probe_scores.cosines(one.arrays["directions"])
        at = {(row.label, row.variant): i for i, row in enumerate(about.itertuples())}
        deals = [v for v in about.variant.unique() if v.startswith("permuted")]
        for g, group in enumerate(one.groups.itertuples()):
            for i, a in enumerate(LABELS):
                for b in LABELS[:i]:
                    value = float(every[g, at[a, "true"], at[b, "true"]])
                    null = np.array([
                        every[g, at[a, d], at[b, d]] for d in deals
                        if (a, d) in at and (b, d) in at
                    ])  # fmt: skip
                    row = {"set": one.name, "site": group.site, "depth": group.depth,
                           "label": b, "other": a, "cosine": value}  # fmt: skip
                    if len(null) and not np.isnan(value):
                        far = np.abs(null - null.mean()) >= abs(value - null.mean())
                        low, high = np.percentile(null, [2.5, 97.5])
                        row |= {"null": null.mean(), "null_low": low, "null_high": high,
                                "p": (1 + far.sum()) / (1 + len(null)), "n": len(null)}  # fmt: skip
                    rows.append(row)
    return pd.DataFrame(rows)


def crossed(sets: list[Solved]) -> pd.DataFrame:
    """AUC of one label's probe for another label, by held-out wordings: what one probe knows of
    the others."""
    rows = []
    for one in sets:
        for a in [name for name in one.named("label") if name in LABELS]:
            labels, logits = one.cell(a, "true", "template")
            for b in LABELS if len(labels) else ():
                other = one.design.rows[b].to_numpy()
                for group, z in zip(one.groups.itertuples(), logits, strict=True):
                    rows.append({"set": one.name, "site": group.site, "depth": group.depth,
                                 "label": a, "other": b,
                                 "auc": probe_scores.standard(other, z)["auc"]})  # fmt: skip
    return pd.DataFrame(rows)


def left_out(sets: list[Solved]) -> pd.DataFrame:
    """Problems that could not be put, counted by reason."""
    rows = [{"set": one.name} | row for one in sets for row in one.design.left_out]
    columns = ["set", "label", "scheme", "why"]
    table = pd.DataFrame(rows, columns=[*columns, "variant", "fold"])
    return table.groupby(columns).size().rename("n").reset_index()


def estimate(row: Any, value: str = "accuracy", low: str = "low", high: str = "high") -> Estimate:
    """A table's row for the summary."""
    return Estimate(value=float(row[value]), low=float(row[low]), high=float(row[high]),
                    n=int(row["n_mazes"]))  # fmt: skip
