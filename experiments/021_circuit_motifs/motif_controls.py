"""Controls of 021: nulls that stand for circuits, groups that are none, edges not scaled."""

from __future__ import annotations

import numpy as np
import pandas as pd
from motif_graphs import Graph
from motif_tables import PROFILE, contrasts, measure, nulls, one_thread, who

from lens_utils import motif_nulls
from lens_utils.motifs import LOOPS


@one_thread
def nulls_of_nulls(graphs: list[Graph], edges: int, count: int, seed: int) -> pd.DataFrame:
    """A null of each graph in the graph's place: z should be about N(0, 1), p < 0.05 in 5 %."""
    rows = []
    for graph in graphs:
        circuit = graph.cut(edges).circuit
        for null in motif_nulls.SWAPS:
            random = next(motif_nulls.nulls(circuit, null, 1, seed=seed + 1)).circuit
            table = motif_nulls.enrichment(random, null, count, statistic=measure, seed=seed + 2)
            kept = table[table["motif"].isin(["030T", "coherent", *LOOPS])]
            rows.append(kept[["motif", "null", "z", "p", "moved"]].assign(**who(graph)))
    return pd.concat(rows, ignore_index=True)


def unscaled(graphs: list[Graph], edges: int, count: int, seed: int) -> pd.DataFrame:
    """The strongest edges as they were exported, not as shares of their targets' input."""
    return nulls([graph.unscaled() for graph in graphs], edges, count, seed, (PROFILE,))


def shuffled(table: pd.DataFrame, times: int, draws: int, seed: int) -> pd.DataFrame:
    """The same comparisons with names of places and groups dealt out anew within each model.

    A row per shuffle: how many comparisons there were, and how many had p < 0.05 (5 % by chance).
    """
    rng, rows = np.random.default_rng(seed), []
    table = table[table["null"] == PROFILE]
    for number in range(times):
        dealt = table.copy()
        for _, own in table.groupby("model"):
            for kind in ("where", "group"):
                dealt.loc[own.index, kind] = rng.permutation(own[kind].to_numpy())
        # The names are shuffled over graphs, so that graphs are what is compared.
        dealt["item"] = dealt["model"] + dealt["id"]
        found = contrasts(dealt.assign(model="all"), draws, seed + number)
        below = int((found["p"] < 0.05).sum())
        rows.append({"shuffle": number, "pairs": len(found), "below": below})
    return pd.DataFrame(rows)
