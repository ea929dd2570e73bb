"""Graph measures of a matrix of heads: affordable at 1,152 nodes, with a null?

CPU seconds of one thread on a synthetic matrix with layers, full and at its strongest tenth; beside
it, networkx' Louvain on the tenth (on the full graph it takes minutes of patience).
Claim: all measures of a graph of 1,152 nodes in 5 s, and Louvain as good as networkx'.

    .venv/bin/python benchmarks/graph_metrics.py
"""

import time

import networkx as nx
import numpy as np

from lens_utils import graphs


def matrix(nodes: int, layers: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    depth = np.arange(nodes) * layers // nodes
    near = np.exp(-np.abs(depth[:, None] - depth[None]) / 6)
    found = near * rng.gamma(2, size=(nodes, nodes)) / 40
    return np.triu(found, 1) + np.triu(found, 1).T


def main() -> None:
    for nodes, layers in ((270, 30), (1152, 36)):
        pairs = matrix(nodes, layers)
        for top in (0.1, None):
            start = time.process_time()
            found = graphs.graph(pairs, top)
            values = graphs.measures(found)
            took = time.process_time() - start
            print(f"{nodes} nodes, {found.edges:,} edges: {took:.2f} s (claim: <= 5 at 1,152); "
                  + ", ".join(f"{k} {v:.3g}" for k, v in values.items()), flush=True)  # fmt: skip
            if top is None and nodes > 500:
                continue
            start = time.process_time()
            net = nx.from_numpy_array(found.weights)
            built = time.process_time()
            sets = nx.community.louvain_communities(net, seed=0)
            took = time.process_time() - built
            print(f"    networkx: {built - start:.2f} s to build, Louvain {took:.2f} s, "
                  f"modularity {nx.community.modularity(net, sets):.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
