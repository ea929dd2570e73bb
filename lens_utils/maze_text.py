"""Mazes and paths as text, and back: three formats, cells as (row,column).

coord_list names player, goal, walls and open cells, the player and the goal first: at every open
cell a causal model can then know whether it lies on the way. matrix and unusual draw the grid
with a symbol per cell; unusual has the same content with other symbols, a control of wording.
"""

import re
from collections.abc import Iterable

from lens_utils.errors import BadInput
from lens_utils.mazes import Cell, Maze

FORMATS = ("coord_list", "matrix", "unusual")
SYMBOLS = {"matrix": "10", "unusual": "@*"}  # wall, open; P and G in both
CELL = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")


def cells_text(cells: Iterable[Cell]) -> str:
    """Cells in a row: "(0,1) (0,2)"."""
    return " ".join(f"({r},{c})" for r, c in cells)


def cells_in(text: str) -> list[Cell]:
    """All cells named in a text, in order."""
    return [(int(r), int(c)) for r, c in CELL.findall(text)]


def render(maze: Maze, style: str = "coord_list") -> str:
    """The maze as a block of text. Raises BadInput for an unknown format."""
    grid = [(r, c) for r in range(maze.size) for c in range(maze.size)]
    if style == "coord_list":
        return (
            f"Player: {cells_text([maze.start])}\nGoal: {cells_text([maze.goal])}\n"
            f"Walls: {cells_text(cell for cell in grid if cell not in maze.open)}\n"
            f"Empty: {cells_text(cell for cell in grid if cell in maze.open)}"
        )
    if style not in SYMBOLS:
        raise BadInput(f"no maze format {style!r}: take one of {', '.join(FORMATS)}")
    wall, free = SYMBOLS[style]
    marks = {maze.start: "P", maze.goal: "G"}
    signs = [marks.get(cell, free if cell in maze.open else wall) for cell in grid]
    rows = [signs[at : at + maze.size] for at in range(0, len(signs), maze.size)]
    return "\n".join(" ".join(row) for row in rows)


def parse(text: str, shape: str = "") -> Maze:
    """The maze of a block in any of the formats, whatever stands around it.

    Player and goal need not stand among the empty cells. Raises BadInput for a block that is not
    a square grid with one player and one goal.
    """
    listed = re.search(r"(?i)walls?\s*:", text)
    return _from_lists(text, shape) if listed else _from_grid(text, shape)


def _from_lists(text: str, shape: str) -> Maze:
    found: dict[str, list[Cell]] = {}
    for name in ("player", "goal", "walls", "empty"):
        match = re.search(
            rf"(?i)\b{name}(?: position)?\s*:((?:\s*,?\s*\(\s*\d+\s*,\s*\d+\s*\))*)", text
        )
        found[name] = cells_in(match[1]) if match else []
    if len(found["player"]) != 1 or len(found["goal"]) != 1:
        raise BadInput("a maze needs one player and one goal: 'Player: (r,c)' and 'Goal: (r,c)'")
    (start,), (goal,) = found["player"], found["goal"]
    cells = {*found["empty"], start, goal}
    n_cells = len(cells) + len(found["walls"])
    size = round(n_cells**0.5)
    every = {(r, c) for r in range(size) for c in range(size)}
    if size * size != n_cells or cells | set(found["walls"]) != every:
        raise BadInput(f"walls and empty cells are no square grid: {n_cells} cells are named")
    return Maze(size, frozenset(cells), start, goal, shape)


def _from_grid(text: str, shape: str) -> Maze:
    signs = {"1": "#", "0": ".", "@": "#", "*": ".", "P": "P", "G": "G"}
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line and all(sign in signs for sign in line)]
    size = len(rows)
    if size < 2 or any(len(row) != size for row in rows):
        raise BadInput("no maze found: rows of 1 0 P G or @ * P G, as many as columns, or lists "
                       "of cells behind 'Walls:' and 'Empty:'")  # fmt: skip
    at = {(r, c): signs[sign] for r, row in enumerate(rows) for c, sign in enumerate(row)}
    marks = {mark: [cell for cell, sign in at.items() if sign == mark] for mark in "PG"}
    if any(len(cells) != 1 for cells in marks.values()):
        raise BadInput("a maze needs one player P and one goal G")
    opened = frozenset(cell for cell, sign in at.items() if sign != "#")
    return Maze(size, opened, marks["P"][0], marks["G"][0], shape)
