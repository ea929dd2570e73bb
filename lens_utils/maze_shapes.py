"""Shape mazes: six shapes at every scale, orientation and offset of a grid.

The open cells of a shape maze form a square, a cross, a spiral, a triangle, a C or a Z, as in Hokin
Deng's KnowThat study, whose layouts these are (82 on 5 x 5 cells, 466 on 7 x 7).
"""

import random
from functools import lru_cache

from lens_utils.errors import BadInput
from lens_utils.mazes import SHAPES, Cell, Maze, around, held_out


def outlines(name: str, size: int) -> list[frozenset[Cell]]:
    """A shape at every scale and orientation that fits a grid, in the top left corner."""
    found = []
    for n in range(3, size + 1):
        last = n - 1
        grid = [(r, c) for r in range(n) for c in range(n)]
        if name == "square":
            found.append({(r, c) for r, c in grid if {r, c} & {0, last}})
        elif name == "cross" and n % 2:
            found.append({(r, c) for r, c in grid if r == c or r + c == last})
        elif name == "C":
            found += [
                {(r, c) for r in range(h) for c in range(n) if c == 0 or r in (0, h - 1)}
                for h in (n, n + 1)
                if h <= size
            ]
        elif name == "Z" and n > 3:
            found.append({(r, c) for r, c in grid if r in (0, last) or r + c == last})
        elif name == "triangle":
            if 2 * n - 1 <= size:  # upright, twice as wide as high
                found.append({(r, c) for r in range(n) for c in range(2 * n - 1)
                              if r == last or abs(c - last) == r})  # fmt: skip
            if n > 3:
                found += _turned({(r, c) for r, c in grid if c in (0, r) or r == last}, n)
        elif name == "spiral" and n > 4:
            wound = _spiral(n)
            found += _turned(wound, n) + _turned({(r, last - c) for r, c in wound}, n)
    return [frozenset(cells) for cells in found]


def _turned(cells: set[Cell], n: int) -> list[set[Cell]]:
    """The four orientations of cells in an n x n box."""
    found = [cells]
    for _ in range(3):
        found.append({(c, n - 1 - r) for r, c in found[-1]})
    return found


def _spiral(n: int) -> set[Cell]:
    """Clockwise inwards from the top left, with one wall between the windings."""
    cell, heading = (0, 0), (0, 1)
    cells = {cell}
    while True:
        for turned in (heading, (heading[1], -heading[0])):  # straight on, else to the right
            ahead = (cell[0] + turned[0], cell[1] + turned[1])
            touched = [near for near in around(n).get(ahead, ()) if near in cells]
            if ahead in around(n) and touched == [cell]:
                break
        else:
            return cells
        cell, heading = ahead, turned
        cells.add(cell)


@lru_cache
def shape_layouts(name: str, size: int) -> tuple[frozenset[Cell], ...]:
    """All layouts of a shape on a grid: every scale and orientation at every offset."""
    found = set()
    for outline in outlines(name, size):
        height, width = (max(cell[axis] for cell in outline) + 1 for axis in (0, 1))
        for down in range(size - height + 1):
            for right in range(size - width + 1):
                found.add(frozenset((r + down, c + right) for r, c in outline))
    return tuple(sorted(found, key=sorted))


def shape_maze(rng: random.Random, name: str, size: int = 5, test: bool | None = None) -> Maze:
    """A shape with player and goal on any two of its cells that are two or more apart.

    test: only layouts of the test side, or only of the other (per shape, some on each).
    Raises BadInput for an unknown shape and where a grid has none on that side.
    """
    if name not in SHAPES:
        raise BadInput(f"no shape {name!r}: take one of {', '.join(SHAPES)}")
    layouts = []
    for cells in shape_layouts(name, size):
        first = min(cells)
        if test is None or held_out(Maze(size, cells, first, first).layout_id, 0.5) == test:
            layouts.append(cells)
    if not layouts:
        raise BadInput(f"{size} x {size} cells have no {name} on that side of the split: "
                       "take a larger grid")  # fmt: skip
    cells = rng.choice(layouts)
    while True:
        start, goal = rng.sample(sorted(cells), 2)
        if (start[0] - goal[0]) ** 2 + (start[1] - goal[1]) ** 2 >= 4:
            return Maze(size, cells, start, goal, name)


def shape_fault(maze: Maze, other: Maze) -> str:
    """Why a maze is not another maze of the same size and shape; "" if it is."""
    if other.size != maze.size:
        return "size"
    if other.open == maze.open:
        return "same maze"
    return "" if other.open in shape_layouts(maze.shape, maze.size) else "shape"
