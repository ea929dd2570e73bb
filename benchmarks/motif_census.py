"""Motifs of attribution graphs: is counting free, and are a hundred nulls affordable?

CPU seconds of one thread on random circuits as dense as pruned attribution graphs, signed, with
layers and positions. Counting beside networkx (which takes minutes at 1,000 nodes: not asked), with
equal counts; then each null: compiled swaps, census, and what of the edges it moved.
Claims: >= 500 times as fast as networkx at 200 nodes and more; 100 nulls of 1,000 nodes and 100,000
edges with their census in 60 CPU s.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/motif_census.py
"""

import time

import networkx as nx
import numpy as np

from lens_utils import motif_nulls, motifs

NULLS = 10


def circuit(nodes: int, density: float, layers: int = 28, positions: int = 10) -> motifs.Circuit:
    """Random weights on that share of all causally possible pairs."""
    rng = np.random.default_rng(0)
    layer, pos = rng.integers(0, layers, nodes), rng.integers(0, positions, nodes)
    empty = motifs.Circuit(np.zeros((nodes, nodes)), layer, pos)
    there = empty.possible & (rng.random((nodes, nodes)) < density)
    return motifs.Circuit(rng.standard_normal((nodes, nodes)) * there, layer, pos)


def seconds(work, times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def main() -> None:
    for nodes in (208, 400):
        one = circuit(nodes, 0.5)
        edges = (one.weights != 0).T.astype(int)
        net = nx.from_numpy_array(edges, create_using=nx.DiGraph)
        slow = seconds(lambda net=net: nx.triadic_census(net))
        assert nx.triadic_census(net) == motifs.triads(one.weights)
        print(f"{nodes} nodes, {edges.sum():,} edges: networkx {slow:.2f} s", flush=True)
        for name, count in (("triads", motifs.triads), ("with signs", motifs.census)):
            fast = seconds(lambda c=count, w=one.weights: c(w), 20)
            print(f"    {name}: {1000 * fast:.2f} ms, {slow / fast:,.0f} times as fast "
                  "(claim for triads: >= 500)", flush=True)  # fmt: skip
    one = circuit(1000, 0.45)
    edges = (one.weights != 0).sum()
    print(f"1000 nodes, {edges:,} edges")
    for name, work in (
        ("census", lambda: motifs.census(one.weights)),
        ("strongest 1,000 loops", lambda: motifs.strongest_loops(one, 1000)),
        ("strongest cascades of 1 to 8 loops", lambda: motifs.strongest_cascades(one, 8)),
    ):
        print(f"    {name}: {seconds(work):.2f} s", flush=True)
    next(motif_nulls.nulls(circuit(50, 0.5), "cells", 1))  # compiled
    for null in motif_nulls.NULLS:
        start = time.process_time()
        table = motif_nulls.enrichment(one, null, NULLS)
        took = time.process_time() - start
        row = table.iloc[0]
        print(f"    {null}: {100 * took / NULLS:.0f} s per 100 nulls (claim: <= 60), "
              f"{NULLS / took:.1f} nulls/s; {row.moved:.0%} of edges moved, {row.accepted:,} of "
              f"{row.attempts:,} swaps accepted", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
