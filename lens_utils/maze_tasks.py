"""Questions about mazes: records with gold answers, negatives and labels. Text, no model.

Every prompt is a maze block, then (where the question is about one) a path, and the instruction
last: all questions about one maze share the block letter by letter, so that whatever differs at
the block's tokens is not the task. Four paraphrases per task let a probe be tested on wordings it
never saw. Tasks: solve, recognize, generate, and recall, a control that needs none of the three;
its `lexical` templates name an ability without needing it.

Families: `path` (find a path, judge one, draw a maze with a solution of the same length; tree
mazes) and `shape` (find a path, name the shape of the corridors, draw another maze of that shape).
"""

import random
import re
from dataclasses import dataclass

from lens_utils import mazes
from lens_utils.errors import BadInput
from lens_utils.maze_shapes import shape_fault, shape_maze
from lens_utils.maze_text import cells_in, cells_text, parse, render
from lens_utils.mazes import SHAPES, Cell, Maze

ABILITIES = ("recognize", "generate", "solve")
TASKS = (*ABILITIES, "recall")
HIERARCHY = {"recognize": (), "generate": ("recognize",), "solve": ("recognize", "generate")}
TEMPLATES = {
    "solve": (
        "Solve the maze.",
        "Find the path from the player to the goal.",
        "List the cells from the player to the goal.",
        "Walk from the player to the goal.",
    ),
    "recognize": (
        "Is this path a valid solution?",
        "Does this path solve the maze?",
        "Check the path. Is it valid?",
        "Is this a valid way from the player to the goal?",
    ),
    "generate": (
        "Generate a new maze with the same player, goal and solution length.",
        "Create another maze with this player, goal and solution length.",
        "Draw a different maze with the same player, goal and solution length.",
        "Make a new maze. Keep the player, the goal and the solution length.",
    ),
    "recall": (
        "Where is the goal?",
        "Name the goal cell.",
        "Where is the player?",
        "Name the player cell.",
    ),
    "lexical": (
        "Do not solve the maze. Where is the goal?",
        "Do not walk to the goal. Where is the player?",
        "Do not generate a new maze. Name the player cell.",
        "Do not create another maze. Name the goal cell.",
        "Do not check the path. Where is the goal?",
        "Is this path valid? Do not say. Where is the player?",
    ),
}
SHAPE_TEMPLATES = {
    "solve": TEMPLATES["solve"],
    "recognize": tuple(
        f"{question} Answer with one of: {', '.join(SHAPES)}."
        for question in (
            "What shape do the open cells form?",
            "Which shape is drawn by the open cells?",
            "Name the shape of the corridors.",
            "The corridors form a shape. Which one?",
        )
    ),
    "generate": tuple(
        f"{request} Write it in the same format."
        for request in (
            "Generate another maze of the same shape.",
            "Create a new maze whose open cells form the same shape.",
            "Draw a different maze of this shape.",
            "Make a new maze. Keep the shape of the corridors.",
        )
    ),
    "recall": TEMPLATES["recall"],
    "lexical": (
        *TEMPLATES["lexical"][:4],
        "Do not name the shape. Where is the goal?",
        "Which shape is this? Do not say. Where is the player?",
    ),
}


@dataclass(frozen=True)
class Record:
    """One question about one maze in one mode, with everything that splits and tests need."""

    maze: Maze
    family: str
    """path or shape."""
    task: str
    """solve, recognize, generate or recall."""
    template_id: str
    """Task and number of the wording: recall's lexical ones are "lexical.0" and so on."""
    instruction: str
    thinking: bool
    style: str = "coord_list"
    path: tuple[Cell, ...] = ()
    """The path that the prompt shows, for questions about one."""
    negative_kind: str = ""
    """Of a shown path: wall, skip or wronggoal; of a recall prompt: recall or lexical."""
    answer: str = ""
    """A right answer: the only one, except for generate and for shape mazes with loops."""
    gold: tuple[Cell, ...] = ()
    """The cells of a generated maze's solution, then of its further open cells."""

    @property
    def prompt(self) -> str:
        """The whole text of the question."""
        shown = f"\nPath: {cells_text(self.path)}" if self.path else ""
        return f"{render(self.maze, self.style)}{shown}\n{self.instruction}"

    @property
    def labels(self) -> dict[str, int]:
        """requires_recognize, requires_generate and requires_solve, nested as HIERARCHY says."""
        needs = {self.task, *HIERARCHY.get(self.task, ())}
        return {f"requires_{ability}": int(ability in needs) for ability in ABILITIES}

    @property
    def test(self) -> bool:
        """Whether the layout belongs to the held-out side."""
        return mazes.held_out(self.maze.layout_id)


def ask(
    rng: random.Random,
    maze: Maze,
    task: str,
    template: int,
    thinking: bool,
    style: str = "coord_list",
    spoiled: str = "",
    test: bool | None = None,
) -> Record | None:
    """One question about a maze with its gold answer; None where the maze does not allow it.

    task: one of TASKS or lexical (asked as recall). spoiled: for recognize, how the shown path is
    spoiled; "" shows the solution. test: side of the split of a generated gold maze.
    """
    family = "shape" if maze.shape else "path"
    wordings = (SHAPE_TEMPLATES if maze.shape else TEMPLATES)[task]
    instruction = wordings[template]
    given = {
        "maze": maze,
        "family": family,
        "task": "recall" if task == "lexical" else task,
        "template_id": f"{task}.{template}",
        "instruction": instruction,
        "thinking": thinking,
        "style": style,
    }
    if task in ("recall", "lexical"):
        cell = maze.goal if "goal" in instruction.rpartition(". ")[2] else maze.start
        shown = "path" in instruction  # so that a shown path does not tell the task
        path = tuple(mazes.solve(maze)) if shown and rng.random() < 0.5 else ()
        if shown and not path:
            path = tuple(mazes.spoil(rng, maze, "wronggoal") or mazes.solve(maze))
        return Record(**given, path=path, negative_kind=task, answer=cells_text([cell]))
    if task == "solve":
        gold = tuple(mazes.solve(maze))
        return Record(**given, answer=cells_text(gold), gold=gold)
    if task == "recognize":
        if maze.shape:
            return Record(**given, answer=maze.shape)
        path = mazes.spoil(rng, maze, spoiled) if spoiled else mazes.solve(maze)
        if path is None:
            return None
        right = "No" if spoiled else "Yes"
        return Record(**given, path=tuple(path), negative_kind=spoiled, answer=right)
    if maze.shape:
        drawn = (shape_maze(rng, maze.shape, maze.size, test) for _ in range(mazes.TRIES))
        other = next((new for new in drawn if not shape_fault(maze, new)), None)
        if other is None:  # the only layout of its shape on that side
            return None
        return Record(**given, answer=render(other, style))
    if (drawn := mazes.another(rng, maze, test)) is None:
        return None
    path, further = drawn
    answer = f"Path: {cells_text(path)} Empty: {cells_text(further)}"
    return Record(**given, answer=answer, gold=(*path, *further))


def reply_fault(record: Record, reply: str) -> str:
    """What is wrong with a reply: "" when it is right, "format" where nothing can be read from it.

    reply: what follows the thinking. A solution or a generated maze is verified, not compared.
    """
    maze, named = record.maze, cells_in(reply)
    if record.task == "recall":
        return "" if [cells_text(named[:1])] == [record.answer] else ("cell" if named else "format")
    if record.task == "solve":
        return mazes.path_fault(maze, named) if named else "format"
    if record.task == "recognize":
        choices = SHAPES if record.family == "shape" else ("Yes", "No")
        said = [word for word in choices if re.search(rf"(?i:\b{word}\b)", reply)]
        if len(said) != 1:
            return "format"
        return "" if said[0] == record.answer else "answer"
    if record.family == "shape":
        try:
            return shape_fault(maze, parse(reply, maze.shape))
        except BadInput:
            return "format"
    if not (parts := re.search(r"(?is)path\s*:(.*?)empty\s*:(.*)", reply)):
        return "format"
    return mazes.generated_fault(maze, cells_in(parts[1]), cells_in(parts[2]))
