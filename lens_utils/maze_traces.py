"""What the model organism thinks: search written out, every word with its phase.

A trace is a walk in words that a 5x5 maze's cell tokens can carry:

- solve: a depth-first walk in reading order; from a dead end `back` and the cell returned to, one
  step at a time; `found` at the goal.
- recognize: each cell of the path with `ok` or `bad`, up to the first bad one; then `valid` or
  `invalid`.
- generate: the old solution, `new`, then the new one, which must be as long; `found`.
- recall: nothing but `found`.

Phases: explore (a step or a check), backtrack (`back` and its cell), conclude (the rest).
"""

from collections.abc import Sequence

from lens_utils.mazes import Cell, Maze, around, solve

PHASES = ("explore", "backtrack", "conclude")


def _word(cell: Cell) -> str:
    return f"({cell[0]},{cell[1]})"


def search(maze: Maze) -> list[str]:
    """The depth-first walk from the player to the goal."""
    words, stack, seen = [_word(maze.start)], [maze.start], {maze.start}
    while stack[-1] != maze.goal:
        ahead = [cell for cell in maze.neighbours(stack[-1]) if cell not in seen]
        if ahead:
            stack.append(ahead[0])
            seen.add(ahead[0])
        else:
            stack.pop()
            words.append("back")
        words.append(_word(stack[-1]))
    return [*words, "found"]


def check(maze: Maze, path: Sequence[Cell]) -> list[str]:
    """A path checked cell by cell."""
    words, near = [], around(maze.size, maze.moves)
    for i, cell in enumerate(path):
        allowed = near[path[i - 1]] if i else (maze.start,)
        ends_well = i < len(path) - 1 or cell == maze.goal
        fits = cell in maze.open and cell in allowed and ends_well
        words += [_word(cell), "ok" if fits else "bad"]
        if not fits:
            return [*words, "invalid"]
    return [*words, "valid"]


def plan(maze: Maze, new: Sequence[Cell]) -> list[str]:
    """The old solution, then the new one."""
    return [*map(_word, solve(maze)), "new", *map(_word, new), "found"]


def phases(words: Sequence[str]) -> list[str]:
    """The phase of every word of a trace, generated or gold."""
    found = []
    for i, word in enumerate(words):
        if word == "back" or (i and words[i - 1] == "back"):
            found.append("backtrack")
        elif word in ("found", "valid", "invalid"):
            found.append("conclude")
        else:
            found.append("explore")
    return found
