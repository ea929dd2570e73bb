"""Maze records: how many verified questions does one core make in a second?

Compared, CPU seconds of one thread, for the same mazes:
    ours      mazes grown, questions expanded in both modes, every gold answer verified
    networkx  the same number of gold answers verified with networkx graphs alone
Claim: at least 10,000 verified records a second, growing included.

    .venv/bin/python benchmarks/maze_records.py
"""

import time

import networkx as nx

from lens_utils import maze_records
from lens_utils.maze_tasks import reply_fault

MAZES = 400


def made() -> list:
    """Verified records of fresh mazes."""
    chosen = maze_records.sample_mazes(MAZES, 5, seed=1)
    found = maze_records.expand(chosen, (False, True))
    assert not any(reply_fault(record, record.answer) for record in found)
    return found


def verified_by_networkx(found: list) -> None:
    """The solution of every record's maze, from a graph built for it."""
    for record in found:
        graph = nx.grid_2d_graph(5, 5).subgraph(record.maze.open)
        nx.shortest_path(graph, record.maze.start, record.maze.goal)


def main() -> None:
    start = time.process_time()
    found = made()
    ours = time.process_time() - start
    start = time.process_time()
    verified_by_networkx(found[:1000])
    other = (time.process_time() - start) * len(found) / 1000
    print(f"{len(found)} records in {ours:.2f} s: {len(found) / ours:,.0f} a second (claim 10,000)")
    print(f"networkx needs {other / ours:.1f} times as long for one solution of each")


if __name__ == "__main__":
    main()
