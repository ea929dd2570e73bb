"""Tables of 021: what graphs have, what their nulls have, and what groups of graphs share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd
from motif_graphs import Graph, name
from scipy.stats import false_discovery_control
from threadpoolctl import threadpool_limits

from lens_utils import motif_nulls, motifs, stats
from lens_utils.motifs import LOOPS, Circuit

WHO = ["model", "id", "group", "where", "item"]
COHERENT = tuple(kind for kind in LOOPS if kind.startswith("C"))
SHOWN = ("030T", *LOOPS, "cascade", "coherent", "span")
PROFILE = "layers"
FLIPS = 10_000
PAIRED, ALONE = 6, 4
"""Fewest problems of a comparison with itself, and of each of two groups: with fewer no p can be
below 0.05, and such rows would only weaken the others."""
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")
"""For matrices of a hundred rows, of which a second thread costs ten times what it gains."""


def who(graph: Graph) -> dict[str, str]:
    return {key: getattr(graph, key) for key in WHO}


def measure(circuit: Circuit) -> dict[str, float]:
    """What is compared with nulls: counts that degrees do not fix, and how loops lie.

    coherent: share of the loops whose chain does what the shortcut does; span: layers that a loop
    climbs, on average; span N: loops that climb N layers.
    """
    counts = motifs.census(circuit.weights)
    found = {kind: float(counts[kind]) for kind in motifs.ALONE}
    loops = max(found["030T"], 1.0)
    edge = (circuit.weights != 0).astype(np.float32)
    over = np.where(edge > 0, edge @ edge, 0).ravel()
    rise = np.maximum(circuit.layer[:, None] - circuit.layer, 0).ravel()
    by_span = np.bincount(rise, over, np.ptp(circuit.layer) + 1)
    found["coherent"] = sum(found[kind] for kind in COHERENT) / loops
    found["span"] = float(by_span @ np.arange(len(by_span))) / loops
    return found | {f"span {n}": count for n, count in enumerate(by_span) if n > 1}


# One graph


@one_thread
def censuses(graphs: list[Graph], edges: int) -> pd.DataFrame:
    """The census of each graph at the common number of edges, and chains of 2 .. 5 loops."""
    rows = []
    for graph in graphs:
        weights = graph.cut(edges).circuit.weights
        chains = motifs.cascades(weights, 5)[1:]
        longer = {f"chains of {n}": count for n, count in enumerate(chains, start=2)}
        rows.append(who(graph) | motifs.census(weights) | longer)
    return pd.DataFrame(rows)


@one_thread
def spans(graphs: list[Graph], edges: int) -> pd.DataFrame:
    """Loops of every type by the layers they climb."""
    return pd.concat([
        motifs.spans(graph.cut(edges).circuit).assign(**who(graph)) for graph in graphs
    ], ignore_index=True)[[*WHO, "span", *LOOPS]]  # fmt: skip


@one_thread
def nulls(
    graphs: list[Graph],
    edges: int,
    count: int,
    seed: int,
    kinds: tuple[str, ...] = motif_nulls.NULLS,
) -> pd.DataFrame:
    """Every graph beside its nulls of every kind: a row per graph, null and statistic."""
    tables = []
    for graph in graphs:
        circuit = graph.cut(edges).circuit
        for null in kinds:
            table = motif_nulls.enrichment(circuit, null, count, statistic=measure, seed=seed)
            tables.append(table.assign(**who(graph)))
    found = pd.concat(tables, ignore_index=True)
    return found[[*WHO, *(column for column in found if column not in WHO)]]


@one_thread
def sweep(graphs: list[Graph], cuts: list[int], count: int, seed: int) -> pd.DataFrame:
    """Loops, and coherent ones, beside nulls at other thresholds; cuts beyond a graph left out."""
    rows = []
    for graph, edges in itertools.product(graphs, cuts):
        if edges > graph.edges:
            continue
        circuit = graph.cut(edges).circuit
        table = motif_nulls.enrichment(circuit, PROFILE, count, statistic=measure, seed=seed)
        table = table.set_index("motif")
        size = np.abs(circuit.weights)
        rows += [
            who(graph) | {"cut": edges, "share": edges / graph.edges,
                          "weakest": size[size > 0].min(), "motif": motif,
                          **table.loc[motif, ["found", "expected", "ratio", "z"]]}
            for motif in ("030T", "coherent", *LOOPS)
        ]  # fmt: skip
    return pd.DataFrame(rows)


@one_thread
def loops(graphs: list[Graph], edges: int, top: int) -> pd.DataFrame:
    """The strongest loops of every graph, by name."""
    tables = []
    for graph in graphs:
        cut = graph.cut(edges)
        table = _named(cut, motifs.strongest_loops(cut.circuit, top))
        table.insert(len(WHO), "rank", range(1, len(table) + 1))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@one_thread
def cascades(graphs: list[Graph], edges: int) -> pd.DataFrame:
    """The strongest cascade of one, two, .. four loops of every graph, a row per loop."""
    tables = []
    for graph in graphs:
        cut = graph.cut(edges)
        for chain in motifs.strongest_cascades(cut.circuit, 4):
            table = _named(cut, chain)
            table.insert(len(WHO), "length", len(table))
            table.insert(len(WHO) + 1, "step", range(1, len(table) + 1))
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=WHO)


def _named(graph: Graph, table: pd.DataFrame) -> pd.DataFrame:
    """Loops with their nodes' names and places, and their three edges."""
    weights = graph.circuit.weights
    said = {key: [value] * len(table) for key, value in who(graph).items()}
    rows = pd.DataFrame(said)
    for role in ("source", "middle", "target"):
        at = table[role].to_numpy()
        rows[role] = [name(graph.nodes.iloc[i], graph.tokens) for i in at]
        rows[f"{role}_layer"] = graph.circuit.layer[at]
        rows[f"{role}_pos"] = graph.circuit.pos[at]
    s, m, t = (table[role].to_numpy() for role in ("source", "middle", "target"))
    rows = rows.assign(to_middle=weights[m, s], onward=weights[t, m], direct=weights[t, s])
    rest = table[["type", "strength", "span", "across"]].reset_index(drop=True)
    return pd.concat([rows, rest], axis=1)


# Groups of graphs


def groups(table: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Of each model: all graphs, those of each kind of place, and of each group of prompts."""
    for model, own in table.groupby("model", sort=False):
        yield {"model": model, "kind": "all", "name": "all"}, own
        for kind in ("where", "group"):
            if own[kind].nunique() > 1:
                for value, part in own.groupby(kind, sort=False):
                    yield {"model": model, "kind": kind, "name": value}, part


def enrichments(held: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Enrichment of each group of graphs: the mean over problems of log2(found / expected).

    With a 95 % bootstrap interval over problems; p by flipping the signs of whole problems (NaN
    below PAIRED of them), q after Benjamini & Hochberg over all rows. Half a loop is added to both
    counts (0.02 to shares), so that none is 0.
    """
    loops = held[held["motif"] == "030T"].set_index([*WHO, "null"])["found"]
    held = held[held["motif"].isin(SHOWN)].set_index([*WHO, "null"])
    held["some"] = loops.reindex(held.index)
    held = held.reset_index()
    add = held["motif"].map({"coherent": 0.02, "span": 0.0}).fillna(0.5)
    ratio = (held["found"] + add) / (held["expected"] + add)
    # Without a loop there is no share and no span: no evidence either way.
    known = held["expected"].gt(0) & (add.eq(0.5) | held["some"].gt(0))
    held = held.assign(log2=np.log2(ratio.where(known, 1.0)))
    rows = []
    for said, part in groups(held):
        for null, own in part.groupby("null", sort=False):
            wide = own.pivot_table(index="item", columns="motif", values="log2")[list(SHOWN)]
            values = wide.to_numpy()
            mean, low, high = stats.bands(values, seed)
            p, z = _flipped(values, seed), own.groupby("motif")["z"].median()
            found = pd.DataFrame({"motif": SHOWN, "log2": mean, "low": low, "high": high, "p": p})
            rows.append(found.assign(**said, null=null, n=len(wide), moved=own["moved"].mean(),
                                     z=found["motif"].map(z)))  # fmt: skip
    table = pd.concat(rows, ignore_index=True)
    table["q"] = _adjusted(table["p"])
    return table[["model", "kind", "name", "null", "motif", "log2", "low", "high", "n", "p", "q",
                  "z", "moved"]]  # fmt: skip


def profiles(held: pd.DataFrame) -> pd.DataFrame:
    """The significance profile of each graph against each null: z of the types, length 1."""
    held = held[held["motif"].isin(list(LOOPS))]
    wide = held.pivot_table(index=[*WHO, "null"], columns="motif", values="z", dropna=False,
                            observed=True, sort=False)[list(LOOPS)]  # fmt: skip
    wide = wide.loc[~wide.index.duplicated()]
    known = held.drop_duplicates([*WHO, "null"]).set_index([*WHO, "null"]).index
    wide = wide.reindex(known)
    table = pd.DataFrame(motif_nulls.profile(wide.to_numpy(float)), columns=list(LOOPS))
    return pd.concat([wide.index.to_frame(index=False), table], axis=1)


def contrasts(table: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Do places, groups of prompts and models differ in their profiles? A row per two and null.

    Graphs of one problem are paired, and of one prompt between models. q is p after Benjamini &
    Hochberg over the rows of a null; pairs with too few problems (PAIRED, ALONE) are left out.
    """
    rows = []
    for null, own in table.groupby("null", sort=False):
        for model, part in own.groupby("model", sort=False):
            rows += [{"null": null, "model": model, "kind": kind} | row
                     for kind in ("where", "group")
                     for row in _pairs(part, kind, "item", draws, seed)]  # fmt: skip
        rows += [{"null": null, "model": "", "kind": "model"} | row
                 for row in _pairs(own, "model", "id", draws, seed)]  # fmt: skip
    columns = ["null", "model", "kind", "one", "other", "cosine", "low", "high", "distance", "p",
               "paired", "n", "q"]  # fmt: skip
    found = pd.DataFrame(rows, columns=columns)
    for _, own in found.groupby("null"):
        found.loc[own.index, "q"] = _adjusted(own["p"])
    return found


def _pairs(part: pd.DataFrame, kind: str, unit: str, draws: int, seed: int) -> Iterator[dict]:
    for pair in itertools.combinations(part[kind].unique(), 2):
        own = part[part[kind].isin(pair)]
        one, other = (set(own.loc[own[kind] == name, unit]) for name in pair)
        if len(one & other) < PAIRED if one & other else min(len(one), len(other)) < ALONE:
            continue
        [row] = motif_nulls.compare(
            own[list(LOOPS)].to_numpy(float), own[kind].to_numpy(str), own[unit].to_numpy(str),
            draws, seed,
        ).to_dict("records")  # fmt: skip
        yield {key: value for key, value in row.items() if key != "q"}


def _flipped(values: np.ndarray, seed: int) -> np.ndarray:
    """Two-sided p of a zero mean of every column, by flipping the signs of whole rows."""
    if len(values) < PAIRED:
        return np.full(values.shape[1], np.nan)
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (FLIPS, len(values)))
    found = np.abs(values.sum(0))
    extreme = (np.abs(signs @ values) >= found * (1 - 1e-9)).sum(0)
    return np.where(found > 0, (1 + extreme) / (1 + FLIPS), np.nan)


def _adjusted(p: pd.Series) -> np.ndarray:
    known, found = p.notna().to_numpy(), np.full(len(p), np.nan)
    if known.any():
        found[known] = false_discovery_control(p[known].to_numpy(float))
    return found
