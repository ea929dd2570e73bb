"""Mazes on a block grid: grown, solved, spoiled and verified. Sets of cells, no text, no model.

A maze is a set of open cells with a player's cell (start) and a goal. Two kinds:

- *tree mazes*: the open cells, joined by their four neighbours, form a tree. Between two cells of
  a tree there is one path without repetition, so a maze has one solution and an answer can be
  checked exactly. A tree is grown by adding cells that touch exactly one open cell.
- *shape mazes* (`maze_shapes`): the open cells form one of six shapes. Square, C and spiral are
  walked in four directions; cross, triangle and Z, whose cells touch at corners, in eight.

The same layout never stands on both sides of a split: `held_out` decides by a stable hash.
"""

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lens_utils.errors import BadInput

Cell = tuple[int, int]
FOUR = ((-1, 0), (0, -1), (0, 1), (1, 0))
EIGHT = tuple((r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0))
N_OPEN = (9, 14)  # open cells of a 5x5 tree maze; other sizes in proportion
TRIES = 200
SPOILS = ("wall", "skip", "wronggoal")
SHAPES = ("square", "cross", "spiral", "triangle", "C", "Z")
CONCEPTS = ("wall", "path", "turn", "dead_end", "junction", "solution", "start", "goal")


@dataclass(frozen=True)
class Maze:
    """A grid of size x size: which cells are open, where the player stands, where the goal is."""

    size: int
    open: frozenset[Cell]
    start: Cell
    goal: Cell
    shape: str = ""
    """Name of the shape the open cells form; nothing for a tree maze."""

    @property
    def moves(self) -> tuple[Cell, ...]:
        """The steps that are allowed: eight directions for shapes that are joined at corners."""
        return EIGHT if self.shape in ("cross", "triangle", "Z") else FOUR

    @property
    def layout_id(self) -> str:
        """The layout without player and goal, as a number in hexadecimal."""
        bits = sum(1 << (r * self.size + c) for r, c in self.open)
        return f"{self.size}x{bits:0{-(-(self.size**2) // 4)}x}"

    @property
    def maze_id(self) -> str:
        """Layout, player and goal."""
        (a, b), (c, d) = self.start, self.goal
        return f"{self.layout_id}-{a}.{b}-{c}.{d}"

    def neighbours(self, cell: Cell) -> list[Cell]:
        """The open cells one step away, in reading order."""
        return [near for near in around(self.size, self.moves)[cell] if near in self.open]


@lru_cache
def around(size: int, moves: tuple[Cell, ...] = FOUR) -> dict[Cell, tuple[Cell, ...]]:
    """For every cell of a grid the cells one step away, in reading order."""
    cells = [(r, c) for r in range(size) for c in range(size)]
    inside = set(cells)
    return {
        (r, c): tuple((r + a, c + b) for a, b in moves if (r + a, c + b) in inside)
        for r, c in cells
    }


def held_out(layout_id: str, share: float = 0.2) -> bool:
    """Whether a layout belongs to the test side: the same answer in every process and year."""
    digest = hashlib.sha256(layout_id.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


# Growing


def grow(rng: random.Random, size: int, n_open: int, trunk: Sequence[Cell] = ()) -> list[Cell]:
    """Open cells that form a tree, in the order of growth: each new one touches exactly one.

    trunk: cells to begin with; else one at random. Fewer than n_open where nothing fits any more.
    """
    near = around(size)
    cells = list(trunk) or [(rng.randrange(size), rng.randrange(size))]
    touching = dict.fromkeys(near, 0)
    frontier = []
    for cell in cells:
        for other in near[cell]:
            touching[other] += 1
            frontier.append(other)
    taken = set(cells)
    while frontier and len(cells) < n_open:
        at = rng.randrange(len(frontier))
        frontier[at], frontier[-1] = frontier[-1], frontier[at]
        cell = frontier.pop()
        if touching[cell] == 1 and cell not in taken:
            cells.append(cell)
            taken.add(cell)
            for other in near[cell]:
                touching[other] += 1
                if touching[other] == 1:
                    frontier.append(other)
    return cells


def walk(rng: random.Random, size: int, start: Cell, goal: Cell, steps: int) -> list[Cell]:
    """A random path of so many steps of which no two cells touch but neighbours in the path.

    Such a path is a tree and can be a maze's only solution. Raises BadInput where none exists.
    """
    near = around(size)

    def onward(path: list[Cell]) -> list[Cell] | None:
        cell, left = path[-1], steps - len(path) + 1
        if left == 0:
            return path if cell == goal else None
        for ahead in rng.sample(near[cell], len(near[cell])):
            far = abs(ahead[0] - goal[0]) + abs(ahead[1] - goal[1])
            if far > left - 1 or (far == 0 and left > 1):
                continue
            touched = sum(other in path for other in near[ahead])
            if touched == 1 and ahead not in path and (found := onward([*path, ahead])):
                return found
        return None

    found = onward([start])
    if found is None:
        raise BadInput(f"no path of {steps} steps leads from {start} to {goal} on {size} x {size} "
                       "cells: take another length")  # fmt: skip
    return found


def another(
    rng: random.Random, maze: Maze, test: bool | None = None
) -> tuple[list[Cell], list[Cell]] | None:
    """A new tree maze as `generated_fault` asks: its solution and its further cells as they grow.

    It has the fewest open cells that are allowed. test: only layouts of that side of the split.
    None where none is found: of the longest solutions there are only a few layouts.
    """
    steps = len(solve(maze)) - 1
    for _ in range(TRIES):
        path = walk(rng, maze.size, maze.start, maze.goal, steps)
        cells = grow(rng, maze.size, max(sizes(maze.size)[0], len(path) + 1), path)
        layout = Maze(maze.size, frozenset(cells), maze.start, maze.goal).layout_id
        if test is not None and held_out(layout) != test:
            continue
        if not generated_fault(maze, path, cells[len(path) :]):
            return path, cells[len(path) :]


def sizes(size: int) -> tuple[int, int]:
    """Fewest and most open cells of a tree maze: 9 to 14 of 25, other grids in proportion."""
    low, high = (round(n * size * size / 25) for n in N_OPEN)
    return low, high


def tree_maze(rng: random.Random, size: int = 5, test: bool | None = None) -> Maze:
    """A tree maze whose start and goal are drawn evenly over the path lengths it has (from 2).

    test: only layouts of the test side, or only of the other. Raises BadInput below 3 x 3.
    """
    if size < 3:
        raise BadInput(f"mazes of {size} x {size} cells have no room: take 3 or more")
    low, high = sizes(size)
    while True:
        cells = frozenset(grow(rng, size, rng.randint(low, high)))
        maze = Maze(size, cells, *sorted(cells)[:2])
        if len(cells) < low or (test is not None and held_out(maze.layout_id) != test):
            continue
        by_length: dict[int, list[tuple[Cell, Cell]]] = {}
        for start in sorted(cells):
            for goal, steps in distances(maze, start).items():
                if steps >= 2:
                    by_length.setdefault(steps, []).append((start, goal))
        start, goal = rng.choice(by_length[rng.choice(sorted(by_length))])
        return Maze(size, cells, start, goal)


# Solving


def distances(maze: Maze, start: Cell) -> dict[Cell, int]:
    """Steps from a cell to every open cell that can be reached, nearest first."""
    near, found, queue = around(maze.size, maze.moves), {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        for ahead in near[cell]:
            if ahead in maze.open and ahead not in found:
                found[ahead] = found[cell] + 1
                queue.append(ahead)
    return found


def solve(maze: Maze) -> list[Cell]:
    """A shortest path from start to goal, both included; of a tree maze, the only one.

    Raises BadInput for a maze that has none.
    """
    return list(_solution(maze))


@lru_cache(maxsize=4096)  # every question about a maze needs it
def _solution(maze: Maze) -> tuple[Cell, ...]:
    steps = distances(maze, maze.goal)
    if maze.start not in steps:
        raise BadInput(f"maze {maze.maze_id} has no way from the player to the goal: leave it out")
    path = [maze.start]
    while path[-1] != maze.goal:
        path.append(next(n for n in maze.neighbours(path[-1]) if steps[n] == steps[path[-1]] - 1))
    return tuple(path)


def is_tree(size: int, cells: Iterable[Cell]) -> bool:
    """Whether cells, joined by their four neighbours, are one piece without a loop."""
    cells = frozenset(cells)
    if not cells:
        return False
    first = min(cells)
    maze = Maze(size, cells, first, first)
    edges = sum(len(maze.neighbours(cell)) for cell in cells) // 2
    return edges == len(cells) - 1 and len(distances(maze, first)) == len(cells)


def concepts(maze: Maze) -> dict[Cell, set[str]]:
    """What every cell of the grid is: names of CONCEPTS.

    By its open neighbours an open cell is a dead end (one), a turn (two that are not opposite) or
    a junction (three or more); `solution` is the way from start to goal, both included.
    """
    way = set(solve(maze))
    found = {}
    for cell in around(maze.size):
        if cell not in maze.open:
            found[cell] = {"wall"}
            continue
        near = maze.neighbours(cell)
        names = {"path"}
        if len(near) == 1:
            names.add("dead_end")
        elif len(near) == 2:
            (a, b), (c, d) = near
            if (a + c, b + d) != (2 * cell[0], 2 * cell[1]):
                names.add("turn")
        elif near:
            names.add("junction")
        for name, holds in (("solution", cell in way), ("start", cell == maze.start),
                            ("goal", cell == maze.goal)):  # fmt: skip
            if holds:
                names.add(name)
        found[cell] = names
    return found


# Verifying: nothing when it holds, else what is wrong


def path_fault(maze: Maze, path: Sequence[Cell]) -> str:
    """Why a path is no solution: "empty", "start", "goal", "wall", "skip", "repeat"; "" if it is.

    A solution starts at the player, ends at the goal, goes over open cells by allowed steps and
    enters none twice.
    """
    if not path:
        return "empty"
    if path[0] != maze.start:
        return "start"
    near = around(maze.size, maze.moves)
    for before, cell in zip(path, path[1:], strict=False):
        if cell not in near[before]:
            return "skip"
        if cell not in maze.open:
            return "wall"
    if path[-1] != maze.goal:
        return "goal"
    return "repeat" if len(set(path)) < len(path) else ""


def generated_fault(maze: Maze, path: Sequence[Cell], further: Sequence[Cell]) -> str:
    """Why a new maze, given as its solution and its further open cells, is not what was asked for.

    Asked for: a tree maze with as many open cells as mazes of this size have, the same player and
    goal, a solution of the same length, and not the same layout.
    """
    cells = {*path, *further}
    inside = around(maze.size)
    if not path or any(cell not in inside for cell in cells):
        return "empty" if not path else "outside"
    if len(cells) < len(path) + len(further):
        return "repeat"
    if path[0] != maze.start or path[-1] != maze.goal:
        return "start or goal"
    if len(path) != len(solve(maze)):
        return "length"
    low, high = sizes(maze.size)
    if not low <= len(cells) <= max(high, len(path) + 1):
        return "number of cells"
    if not is_tree(maze.size, cells):
        return "no tree"
    if path_fault(Maze(maze.size, frozenset(cells), maze.start, maze.goal), path):
        return "path"
    return "same maze" if cells == maze.open else ""


# Spoiling: paths that are almost solutions


def spoil(rng: random.Random, maze: Maze, kind: str) -> list[Cell] | None:
    """The solution spoiled in one way, or None where this maze does not allow it.

    wall: one cell is replaced by a wall between the same neighbours, so all steps stay allowed.
    skip: one cell is left out. wronggoal: a valid walk of about the same length to another cell.
    """
    path = solve(maze)
    near = around(maze.size, maze.moves)
    if kind == "wall":
        spots = [
            (i, cell)
            for i in range(1, len(path) - 1)
            for cell in near[path[i - 1]]
            if cell not in maze.open and cell in near[path[i + 1]]
        ]
        if not spots:
            return None
        i, cell = rng.choice(spots)
        return [*path[:i], cell, *path[i + 1 :]]
    if kind == "skip":
        spots = [i for i in range(1, len(path) - 1) if path[i + 1] not in near[path[i - 1]]]
        if not spots:
            return None
        i = rng.choice(spots)
        return path[:i] + path[i + 1 :]
    if kind != "wronggoal":
        raise BadInput(f"no way to spoil a path called {kind!r}: take one of {', '.join(SPOILS)}")
    steps = distances(maze, maze.start)
    far = [c for c, n in steps.items() if n >= 2 and c != maze.goal and abs(n - len(path) + 1) <= 2]
    if not far:
        return None
    return solve(Maze(maze.size, maze.open, maze.start, rng.choice(far), maze.shape))
