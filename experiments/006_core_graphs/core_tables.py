"""What experiment 006 makes of its graphs: cores, layers, reliability, the numbers of the findings.

No graph is measured here, only tables and matrices are compared.
"""

import itertools

import numpy as np
import pandas as pd
from core_matrices import ATOMS, Matrices
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_mutual_info_score

from lens_utils import stats

SCORES = ("value_diff", "rank_diff")
CORES = ("synergistic", "redundant")
SAID = {"sts": "synergy", "rtr": "redundancy"}
MEASURES = {
    "efficiency": "efficiency (nats)",
    "efficiency_per_weight": "efficiency / mean weight",
    "modularity": "modularity",
}


def core(score: np.ndarray, share: float) -> np.ndarray:
    """synergistic for the highest share of heads, redundant for the lowest, else between."""
    n = max(1, round(share * (~np.isnan(score)).sum()))
    order = np.argsort(np.where(np.isnan(score), np.inf, score), kind="stable")
    order = order[: (~np.isnan(score)).sum()]
    found = np.full(len(score), "between", dtype=object)
    found[order[:n]], found[order[-n:]] = "redundant", "synergistic"
    return found


def cores(scores: pd.DataFrame, share: float) -> pd.DataFrame:
    """One row per head: its depth in percent, and the core that it is in by each score."""
    depth = 100 * scores.layer / max(scores.layer.max(), 1)
    found = {score: core(scores[score].to_numpy(float), share) for score in SCORES}
    return scores.iloc[:, :2].assign(depth_pct=depth, **found)


def core_overlap(scores: pd.DataFrame, share: float) -> pd.DataFrame:
    """Share of the cores by value_diff (mmi) that other scores put into the same core."""
    base = core(scores.value_diff.to_numpy(float), share)
    rows = []
    others = ("rank_diff", "value_diff_ccs", "value_diff_surrogate", "value_diff_excess", "memory")
    for other in others:
        found = core(scores[other].to_numpy(float), share)
        shared = {name: float((found[base == name] == name).mean()) for name in CORES}
        rows.append({"other": other, "chance": share} | shared)
    return pd.DataFrame(rows)


def by_layer(members: pd.DataFrame, layer: np.ndarray, shuffles: int, seed: int) -> pd.DataFrame:
    """Do communities follow layers? Adjusted mutual information of the two, one row per graph.

    0 is chance, whatever the sizes. null_low, null_high: 95 % of shuffled memberships. ceiling:
    communities of the same sizes that are cut by depth, the most that as many can reach.
    """
    rows, rng = [], np.random.default_rng(seed)
    for place, part in members.groupby(["kind", "atom", "edges"], sort=False):
        there = part.community.notna().to_numpy()
        found, at = part.community[there].to_numpy(int), layer[there]
        cut = np.empty_like(found)
        cut[np.argsort(at, kind="stable")] = _by_depth(found, at)
        null = [adjusted_mutual_info_score(at, rng.permutation(found)) for _ in range(shuffles)]
        low, high = np.percentile(null, [2.5, 97.5])
        rows.append(
            dict(zip(("kind", "atom", "edges"), place, strict=True))
            | {"communities": int((np.bincount(found) > 1).sum()), "heads": len(found),
               "ami": adjusted_mutual_info_score(at, found), "null_low": low, "null_high": high,
               "ceiling": adjusted_mutual_info_score(at, cut)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _by_depth(found: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The communities' labels as often as they are, those of the shallowest heads first."""
    labels, sizes = np.unique(found, return_counts=True)
    order = np.argsort([at[found == label].mean() for label in labels])
    return np.repeat(labels[order], sizes[order])


def strongest_pairs(matrix: np.ndarray, top: float) -> np.ndarray:
    """Which pairs above the diagonal, row by row, are the strongest share: as numbers, in order."""
    upper = matrix[np.triu_indices(len(matrix), 1)]
    order = np.argsort(np.where(np.isnan(upper), np.inf, -upper), kind="stable")
    return order[: max(1, round(top * len(upper)))]


def _overlap(one: np.ndarray, other: np.ndarray, top: float) -> float:
    """Share of the strongest pairs of one matrix that are among those of the other."""
    first, second = strongest_pairs(one, top), strongest_pairs(other, top)
    return len(np.intersect1d(first, second)) / len(first)


def reliability(pairs: Matrices, top: float) -> pd.DataFrame:
    """Overlap of the strongest pairs of two halves of the categories, over all ways to halve them.

    Mean and range; `top` is what chance gives.
    """
    rows = []
    for (kind, atom), one in pairs.items():
        n = len(one.families)
        halves = [h for h in itertools.combinations(range(n), n // 2) if n % 2 or 0 in h]
        found = []
        for half in halves:
            weights = np.isin(np.arange(n), half).astype(float)
            sides = (one.weighed(side) for side in (weights, 1 - weights))
            found.append(_overlap(*sides, top))
        rows.append(
            {"kind": kind, "atom": atom, "overlap": np.mean(found), "low": min(found),
             "high": max(found), "splits": len(found), "chance": top}
        )  # fmt: skip
    return pd.DataFrame(rows)


def agreement(pairs: Matrices, top: float) -> pd.DataFrame:
    """How alike two measures' graphs are: overlap of the strongest pairs, Spearman over all."""
    rows = []
    for atom in ATOMS:
        kinds = [kind for kind, of in pairs if of == atom]
        for one, other in itertools.combinations(kinds, 2):
            both = [pairs[kind, atom].whole for kind in (one, other)]
            upper = np.triu_indices(len(both[0]), 1)
            rho = spearmanr(*(matrix[upper] for matrix in both), nan_policy="omit").statistic
            rows.append({"atom": atom, "one": one, "other": other, "spearman": float(rho),
                         "overlap": _overlap(*both, top), "chance": top})  # fmt: skip
    return pd.DataFrame(rows)


def strongest(pairs: Matrices, top: float, most: int = 5000) -> pd.DataFrame:
    """The strongest pairs of heads (mmi), strongest first, for the drawing: numbers and weight."""
    frames = []
    for atom in ATOMS:
        matrix = pairs["mmi", atom].whole
        rows, columns = (i[strongest_pairs(matrix, top)] for i in np.triu_indices(len(matrix), 1))
        found = {"atom": atom, "one": rows, "other": columns, "weight": matrix[rows, columns]}
        frames.append(pd.DataFrame(found).assign(of=len(rows)).head(most))
    return pd.concat(frames, ignore_index=True)


def summarise(
    found: pd.DataFrame,
    depth: pd.DataFrame,
    halves: pd.DataFrame,
    alike: pd.DataFrame,
    cores: pd.DataFrame,
    shared: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings."""
    by = found.set_index(["kind", "atom", "edges", "measure"]).sort_index()
    out: dict[str, object] = {"heads": len(cores)}
    for edges, said in (("all", "all pairs"), ("top", "strongest pairs")):
        for measure, named in MEASURES.items():
            if edges == "top" and measure == "efficiency":
                continue  # divided by the mean weight, it says the same
            for atom in ATOMS:
                row = by.loc["mmi", atom, edges, measure]
                out[f"{named}, {SAID[atom]}, {said}"] = stats.Estimate(
                    value=float(row.value), low=float(row.low), high=float(row.high), n=int(row.n)
                )
                if measure != "efficiency" and edges == "all":
                    out[f"{named}, {SAID[atom]}, {said}, shuffled weights"] = float(row.null)
    for kind, said in (("surrogate", "heads of different prompts"), ("excess", "excess")):
        for atom in ATOMS:
            value = by.loc[kind, atom, "all", "modularity"].value
            out[f"modularity, {SAID[atom]}, all pairs, {said}"] = float(value)
    for kind in ("ccs", "excess"):
        row = by.loc[kind, "sts", "all", "efficiency"]
        out[f"pairs without synergy above 0, {kind}"] = float(row.clipped / row.pairs)
    ami = depth.set_index(["kind", "atom", "edges"])
    overlap = halves.set_index(["kind", "atom"]).overlap
    for atom in ATOMS:
        out[f"AMI of communities and layers, {SAID[atom]}"] = float(ami.ami["mmi", atom, "all"])
    for atom in ATOMS:
        said = f"strongest pairs in both halves of the categories, {SAID[atom]}"
        out[said] = float(overlap["mmi", atom])
    same = alike[alike.one == "mmi"].set_index(["atom", "other"]).overlap
    out["strongest synergy that heads of different prompts show too"] = float(
        same["sts", "surrogate"]
    )
    for name in CORES:
        inside = cores.depth_pct[cores.value_diff == name].to_numpy(float)
        out[f"mean depth of the {name} core (%)"] = stats.mean_ci(inside)
    out["synergistic core that is so under CCS too"] = float(
        shared.set_index("other").synergistic["value_diff_ccs"]
    )
    return out
