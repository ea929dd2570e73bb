"""What experiment 006 measures of a graph, with its interval and its null."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from core_matrices import Matrices, Pairs

from lens_utils import graphs
from lens_utils.errors import BadInput


class Sizes(NamedTuple):
    """How much is drawn at random."""

    shuffles: int
    resamples: int


def sizes(cfg) -> Sizes:
    """Those of this run. Raises BadInput for shares and numbers that make no sense."""
    if not 0 < cfg.top <= 1:
        raise BadInput(f"--top {cfg.top}: a share of all pairs in (0, 1], such as 0.1")
    if not 0 < cfg.core <= 0.5:
        raise BadInput(f"--core {cfg.core}: a share of all heads in (0, 0.5], so that two fit")
    found = Sizes(
        cfg.shuffles or (5 if cfg.quick else 50), cfg.resamples or (3 if cfg.quick else 100)
    )
    for name, value in found._asdict().items():
        if value < 2:
            raise BadInput(f"--{name} {value}: an interval needs at least 2")
    return found


def against_null(
    pairs: Matrices, kind: str, atom: str, edges: str, top: float, size: Sizes, seed: int
) -> pd.DataFrame:
    """One row per measure of one graph.

    value, with the 95 % interval of a bootstrap over categories of prompts; null, the mean over
    graphs of shuffled weights, and the range of 95 % of these. Counts are of pairs of heads. A
    matrix without a weight above 0 is no graph: its rows have counts only.
    """
    one, share = pairs[kind, atom], top if edges == "top" else None
    upper = one.whole[np.triu_indices(len(one.whole), 1)]
    place = {"kind": kind, "atom": atom, "edges": edges, "pairs": len(upper),
             "clipped": int((upper <= 0).sum()), "missing": int(np.isnan(upper).sum())}  # fmt: skip
    if not (upper > 0).any():
        return pd.DataFrame([place | {"measure": "efficiency", "n_edges": 0, "tied": 0}])
    held = graphs.graph(one.whole, share)
    place |= {"n_edges": held.edges, "tied": held.tied, "n": len(one.families)}
    place["mean_weight"] = held.weights.sum() / (2 * len(upper))
    spread = _spread(one, share, size.resamples, seed)
    rows = []
    found = graphs.against_shuffled(one.whole, share, size.shuffles, seed)
    for name, m in found.items():
        rows.append(
            place
            | {"measure": name, "value": m.value, "low": m.value - spread[name],
               "high": m.value + spread[name], "null": m.null, "null_low": m.low,
               "null_high": m.high}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _spread(one: Pairs, share: float | None, resamples: int, seed: int) -> pd.Series:
    """Half of each measure's interval: 1.96 bootstrap standard errors.

    Not the percentiles: a graph of fewer categories is noisier, which by itself moves efficiency
    and modularity, so that resampled values do not lie around the measured one.
    """
    n, rng = len(one.families), np.random.default_rng(seed)
    rows = []
    for _ in range(resamples):
        weights = np.bincount(rng.integers(n, size=n), minlength=n).astype(float)
        matrix = one.weighed(weights)
        if (matrix > 0).any():
            rows.append(graphs.measures(graphs.graph(matrix, share), seed))
    return 1.96 * pd.DataFrame(rows).std(ddof=1)


def communities(pairs: Matrices, scores: pd.DataFrame, top: float, seed: int) -> pd.DataFrame:
    """One row per head and graph: the community that it is in, 0 the largest; NaN without edges."""
    frames = []
    for (kind, atom), one in pairs.items():
        if not (one.whole > 0).any():
            continue
        for edges, share in (("all", None), ("top", top)):
            weights = graphs.graph(one.whole, share).weights
            found = graphs.louvain(weights, seed)
            order = np.argsort(-np.bincount(found), kind="stable")
            place = {"kind": kind, "atom": atom, "edges": edges}
            named = np.argsort(order)[found].astype(float)
            named[weights.sum(0) == 0] = np.nan
            frames.append(scores.iloc[:, :2].assign(**place, community=named))
    return pd.concat(frames, ignore_index=True)
