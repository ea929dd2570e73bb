"""Sets of maze questions: balanced expansion, records as JSON, and other people's task files.

Expansion asks every maze the same questions in every mode: two of each ability, and as many
negatives on the same maze block, which need none of them (recall, and lexical ones that name an
ability). So each ability's questions and the negatives, both modes and both sides of the split are
balanced, and everything can be paired by maze.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lens_utils import maze_shapes, maze_tasks, mazes
from lens_utils.errors import BadInput
from lens_utils.maze_tasks import ABILITIES, TEMPLATES, Record, ask
from lens_utils.maze_text import cells_in, cells_text, parse
from lens_utils.mazes import SHAPES, SPOILS, Maze

PER_MAZE = 12
"""Questions that `expand` asks about one maze in one mode."""


def sample_mazes(n: int, size: int, seed: int, family: str = "path") -> list[Maze]:
    """n mazes, alternately of the training and of the test side, of n layouts. Raises BadInput.

    All questions can be asked about them. Shape mazes go through the shapes in turn; their
    layouts may repeat, for a small grid has few.
    """
    rng = random.Random(f"mazes {seed}")
    found: dict[str, Maze] = {}
    while len(found) < n:
        test = len(found) % 2 == 1
        if family == "shape":
            shape = SHAPES[len(found) // 2 % len(SHAPES)]
            maze = maze_shapes.shape_maze(rng, shape, size, test)
            found[f"{len(found)}"] = maze
            continue
        maze = mazes.tree_maze(rng, size, test)
        if all(mazes.spoil(rng, maze, kind) for kind in SPOILS) and mazes.another(rng, maze, test):
            found.setdefault(maze.layout_id, maze)
    return list(found.values())


def expand(
    chosen: Sequence[Maze], modes: Sequence[bool], style: str = "coord_list", seed: int = 0
) -> list[Record]:
    """PER_MAZE questions about every maze in every mode: half positives, half negatives.

    Positives: solve and generate in two wordings each; recognize once with the solution and once
    with a path spoiled in one of the ways in turn (shape mazes: in two wordings). Negatives: three
    plain recall questions and three lexical ones, one for each ability. Wordings go through all
    there are, and are the same in both modes.
    """
    found = []
    for n, maze in enumerate(chosen):
        side = mazes.held_out(maze.layout_id) if not maze.shape else None
        a, b = n % 4, (n + 2) % 4
        kind = SPOILS[n // 2 % len(SPOILS)]
        questions = [("solve", a, ""), ("solve", b, ""), ("generate", a, ""), ("generate", b, ""),
                     ("recognize", a, ""), ("recognize", b, kind)]  # fmt: skip
        questions += [("recall", (n + i) % 4, "") for i in range(3)]
        questions += [("lexical", 2 * i + n % 2, "") for i in range(3)]
        rng = random.Random(f"questions {seed} {n}")
        asked = [ask(rng, maze, task, template, False, style, spoiled, side)
                 for task, template, spoiled in questions]  # fmt: skip
        kept = [record for record in asked if record is not None]
        found += [replace(record, thinking=thinking) for thinking in modes for record in kept]
    return found


def as_dict(record: Record) -> dict[str, Any]:
    """A record as JSON: what `from_dict` needs, and what the first plan's scripts read."""
    maze, length = record.maze, len(mazes.solve(record.maze)) - 1
    return {
        "maze_id": maze.maze_id,
        "layout_id": maze.layout_id,
        "split": "test" if record.test else "train",
        "family": record.family,
        "task": record.task,
        "task_type": record.task,
        "template_id": record.template_id,
        "negative_kind": record.negative_kind,
        "enable_thinking": record.thinking,
        "format": record.style,
        "prompt": record.prompt,
        "instruction": record.instruction,
        "path": cells_text(record.path),
        "answer": record.answer,
        "gold": cells_text(record.gold),
        **record.labels,
        "maze_metadata": {
            "size": maze.size,
            "shape": maze.shape,
            "open": cells_text(sorted(maze.open)),
            "start": cells_text([maze.start]),
            "goal": cells_text([maze.goal]),
            "difficulty": min(5, max(1, length // 2)),
            "has_solution": True,
            "solution_length": length,
        },
    }


def from_dict(held: dict[str, Any]) -> Record:
    """The record that `as_dict` wrote."""
    meta = held["maze_metadata"]
    maze = Maze(meta["size"], frozenset(cells_in(meta["open"])), *cells_in(meta["start"]),
                *cells_in(meta["goal"]), meta["shape"])  # fmt: skip
    return Record(
        maze=maze,
        family=held["family"],
        task=held["task"],
        template_id=held["template_id"],
        instruction=held["instruction"],
        thinking=held["enable_thinking"],
        style=held["format"],
        path=tuple(cells_in(held["path"])),
        negative_kind=held["negative_kind"],
        answer=held["answer"],
        gold=tuple(cells_in(held["gold"])),
    )


# Other people's task files


YES_NO = {"true": "Yes", "yes": "Yes", "false": "No", "no": "No"}
FIELDS = ("maze_description", "question", "answer")


def from_plan(rows: Any, task: str, where: str = "") -> tuple[list[Record], dict[str, int]]:
    """Records of a task file in the first plan's schema, and how many rows were left out and why.

    rows: a list of objects with maze_description (any of the text formats), question, answer and
    enable_thinking; maze_shape where the corridors form a shape. task: recognize, generate or
    solve. Left out and counted: mazes that no format reads and those without a way to the goal.
    Raises BadInput for rows without these fields, and for a recognize answer that is neither.
    """
    if task not in ABILITIES:
        raise BadInput(f"no task {task!r}: take one of {', '.join(ABILITIES)}")
    if not isinstance(rows, list) or not rows:
        raise BadInput(f"{where or task}: a list of tasks is wanted, with {', '.join(FIELDS)}")
    found, dropped = [], {"unreadable maze": 0, "no solution": 0}
    for n, row in enumerate(rows):
        name = f"{where or task}, task {n}"
        missing = [key for key in FIELDS if not isinstance(row, dict) or not row.get(key)]
        if missing:
            raise BadInput(f"{name} has no {' and no '.join(missing)}: every task needs them")
        shape = str(row.get("maze_shape") or "")
        if shape not in ("", *SHAPES):
            shape = ""
        try:
            maze = parse(row["maze_description"], shape)
        except BadInput:
            dropped["unreadable maze"] += 1
            continue
        try:
            mazes.solve(maze)
        except BadInput:
            dropped["no solution"] += 1
            continue
        answer, question = str(row["answer"]).strip(), str(row["question"]).strip()
        family = "shape" if task == "recognize" and answer in SHAPES else "path"
        path = tuple(cells_in(question)) if task == "recognize" and family == "path" else ()
        if task == "recognize" and family == "path":
            answer = YES_NO.get(answer.lower(), "")
            if not answer:
                raise BadInput(f"{name}: a path is answered by Yes or No, a shape by one of "
                               f"{', '.join(SHAPES)}, not {row['answer']!r}")  # fmt: skip
        valid = answer == "Yes" or family == "shape"
        found.append(
            Record(
                maze=maze,
                family=family,
                task=task,
                template_id=_template(task, question),
                instruction=question,
                thinking=bool(row.get("enable_thinking", False)),
                path=path,
                negative_kind="" if task != "recognize" or valid else _spoiled(maze, path),
                answer=answer,
                gold=tuple(mazes.solve(maze)) if task == "solve" else (),
            )
        )
    if not found:
        raise BadInput(f"{where or task}: no task is left ({dropped}); mazes are read as rows of "
                       "1 0 P G or as lists of cells behind Walls: and Empty:")  # fmt: skip
    return found, dropped


def _template(task: str, question: str) -> str:
    """The wording's number where it is one of ours, else a name for all others."""
    known = TEMPLATES[task] + maze_tasks.SHAPE_TEMPLATES[task]
    return f"{task}.{known.index(question) % 4}" if question in known else f"{task}.own"


def _spoiled(maze: Maze, path: Sequence[mazes.Cell]) -> str:
    """Which of the three kinds of negative a wrong path is."""
    fault = mazes.path_fault(maze, path)
    return fault if fault in ("wall", "skip") else "wronggoal"
