"""What experiment 013 asks of its probes: rows, labels, and which rows train and test. No model.

A problem is a label, the rows it is trained on and the rows it is tested on. All questions of the
experiment are such problems on the same states, so one solve answers them:

    maze       train on some mazes, test on others
    template   train on some wordings and some mazes, test on other wordings and other mazes
    online     train on the first mazes, code the labels of the next ones
    transfer   train on some tasks against plain recall, test on all tasks of other mazes
    all        train on everything: directions, to be compared

with variants of a label: true; control (dealt anew to wordings, or to goal cells where the label is
not one of wordings); shuffled (dealt anew to rows); permuted (as control, for directions).
"""

import random
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens_utils import probe_scores, probes
from lens_utils.maze_records import from_dict
from lens_utils.maze_tasks import ABILITIES, Record, ask
from lens_utils.mazes import SPOILS

REQUIRES = tuple(f"requires_{ability}" for ability in ABILITIES)
LABELS = (*REQUIRES, "task_recognize", "task_generate")
"""task_solve is requires_solve, and task_recall is where requires_recognize is not."""
VALID = "valid"
WORDINGS = 4
TRAINED = (("recognize",), ("generate",), ("solve",), ("recognize", "generate"),
           ("recognize", "solve"), ("generate", "solve"))  # fmt: skip


def at_most(held: list[dict], n: int) -> list[dict]:
    """The questions, at most n of each task and mode; 0 is all."""
    counts: dict[tuple, int] = {}
    found = []
    for one in held:
        key = (one["task"], one["enable_thinking"])
        counts[key] = counts.get(key, 0) + 1
        found += [one] if not n or counts[key] <= n else []
    return found


def judged(held: list[dict], seed: int) -> list[Record]:
    """Questions about a path, more than the tasks ask: of every maze the solution in three
    wordings, and a path spoiled in each way. Shape mazes have none."""
    mazes = {one["maze_id"]: from_dict(one) for one in held if one["family"] == "path"}
    rng, found = random.Random(f"judged {seed}"), []
    for n, known in enumerate(mazes.values()):
        for i, kind in enumerate(("", "", "", *SPOILS)):
            number = (n + i) % WORDINGS
            record = ask(rng, known.maze, "recognize", number, False, known.style, kind)
            found += [record] if record is not None else []
    return found


def table(records: list[Record]) -> pd.DataFrame:
    """What splits and tables need to know of every row."""
    return pd.DataFrame({
        "maze": [r.maze.maze_id for r in records],
        "goal": [str(r.maze.goal) for r in records],
        "task": [r.task for r in records],
        "wording": [r.template_id for r in records],
        "number": [wording_number(r.template_id) for r in records],
        "kind": [r.negative_kind for r in records],
        "thinking": [r.thinking for r in records],
        **{label: [bool(r.labels[label]) for r in records] for label in REQUIRES},
        "task_recognize": [r.task == "recognize" for r in records],
        "task_generate": [r.task == "generate" for r in records],
        VALID: [r.task == "recognize" and not r.negative_kind for r in records],
    })  # fmt: skip


def wording_number(template_id: str) -> int:
    """The fold of a wording; other people's wordings are all of fold 0."""
    number = template_id.rpartition(".")[2]
    return int(number) % WORDINGS if number.isdecimal() else 0


@dataclass
class Design:
    """Problems on the rows of one set of states."""

    rows: pd.DataFrame
    folds: int
    seed: int
    problems: list[dict] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)
    """Problems that cannot be put: training rows of one class, or nothing to test on."""
    labels: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    tested: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        maze, number = self.rows.maze.to_numpy(), self.rows.number.to_numpy()
        self.fold = probes.folds(maze, self.folds, self.seed)
        place = pd.Series(maze).map({m: i for i, m in enumerate(pd.unique(maze))}).to_numpy()
        order = np.random.default_rng(self.seed).permutation(place.max() + 1)[place]
        every = np.ones(len(maze), dtype=bool)
        self.schemes = {
            "maze": [(self.fold != k, self.fold == k) for k in range(self.folds)],
            "template": [
                ((number != w) & (self.fold != k), (number == w) & (self.fold == k))
                for w in np.unique(number) for k in range(self.folds)
            ],
            "online": [(order < start, (order >= start) & (order < stop))
                       for start, stop in probes.online_blocks(int(order.max()) + 1)[1:]],
            "all": [(every, every)],
        }  # fmt: skip

    def put(self, label: str, values: np.ndarray, variant: str, schemes: tuple[str, ...]) -> None:
        """A label's problems in these schemes."""
        for scheme in schemes:
            for fold, (trained, tested) in enumerate(self.schemes[scheme]):
                self._add(label, values, variant, scheme, fold, trained, tested)

    def _add(self, label, values, variant, scheme, fold, trained, tested) -> None:
        about = {"label": label, "variant": variant, "scheme": scheme, "fold": fold}
        both = values[trained].any() and not values[trained].all()
        if both and tested.any():
            self.problems.append(about)
            self.labels.append(values)
            self.trained.append(trained)
            self.tested.append(tested)
        else:
            why = "nothing to test on" if both else "training rows of one class"
            self.left_out.append(about | {"why": why})

    def variants(self, label: str, controls: int) -> None:
        """The label with everything it is compared with."""
        values = self.rows[label].to_numpy()
        self.put(label, values, "true", ("maze", "template", "online", "all"))
        rng = np.random.default_rng(self.seed)
        self.put(label, rng.permutation(values), "shuffled", ("template", "online"))
        for draw in range(controls):
            drawn = self.control(label, draw)
            self.put(label, drawn, f"control {draw}", ("maze", "template"))

    def control(self, label: str, draw: int) -> np.ndarray:
        """A label as learnable by rote as the true one, and without its meaning."""
        rng = np.random.default_rng((self.seed, draw))
        if label == VALID:
            goals, number = np.unique(self.rows.goal, return_inverse=True)
            return (rng.permutation(len(goals)) % 2 == 0)[number]
        held = np.stack([self.rows[name].to_numpy() for name in LABELS])
        dealt = probe_scores.permuted(held, self.rows.wording.to_numpy(), rng)
        return dealt[LABELS.index(label)]

    def directions(self, permutations: int) -> None:
        """Nested labels dealt anew to wordings: what directions look like by nesting alone."""
        held = np.stack([self.rows[name].to_numpy() for name in REQUIRES])
        for draw in range(permutations):
            rng = np.random.default_rng((self.seed, 1000 + draw))
            dealt = probe_scores.permuted(held, self.rows.wording.to_numpy(), rng)
            for label, values in zip(REQUIRES, dealt, strict=True):
                self.put(label, values, f"permuted {draw}", ("all",))

    def transfer(self) -> None:
        """Some tasks against plain recall. The test rows' negatives are the lexical ones."""
        task, wording = self.rows.task.to_numpy(), self.rows.wording.to_numpy().astype(str)
        plain, needs = np.char.startswith(wording, "recall"), task != "recall"
        tested = needs | np.char.startswith(wording, "lexical")
        for tasks in TRAINED:
            trained = plain | np.isin(task, tasks)
            for k in range(self.folds):
                self._add("needs", needs, "+".join(tasks), "transfer", k,
                          trained & (self.fold != k), tested & (self.fold == k))  # fmt: skip

    @cached_property
    def cells(self) -> tuple[pd.DataFrame, list[int]]:
        """Label, variant and scheme, folds together, and every problem's cell; -1 for `all`."""
        about = pd.DataFrame(self.problems).drop(columns="fold")
        cells = about[about.scheme != "all"].drop_duplicates().reset_index(drop=True)
        number = {tuple(row): i for i, row in enumerate(cells.itertuples(index=False))}
        return cells, [number.get(tuple(row), -1) for row in about.itertuples(index=False)]

    @cached_property
    def of_cells(self) -> np.ndarray:
        """The labels that each cell's probes are tested on: (cell, sample)."""
        cells, place = self.cells
        return np.stack([self.labels[place.index(cell)] for cell in range(len(cells))])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Labels and weights of all problems; both classes count alike."""
        labels = torch.from_numpy(np.stack(self.labels))
        trained = torch.from_numpy(np.stack(self.trained))
        return labels, probes.balanced(labels, trained)


def ability_design(rows: pd.DataFrame, folds: int, seed: int, controls: int,
                   permutations: int) -> Design:  # fmt: skip
    """Which ability a question asks for."""
    design = Design(rows, folds, seed)
    for label in LABELS:
        design.variants(label, controls)
    design.directions(permutations)
    design.transfer()
    return design


def plain_design(
    rows: pd.DataFrame,
    folds: int,
    seed: int,
    labels: tuple[str, ...],
    schemes: tuple[str, ...] = ("maze", "template"),
) -> Design:
    """The labels themselves and nothing else: for baselines."""
    design = Design(rows, folds, seed)
    for label in labels:
        design.put(label, rows[label].to_numpy(), "true", schemes)
    return design


def valid_design(rows: pd.DataFrame, folds: int, seed: int, controls: int) -> Design:
    """Whether the path that a question shows is a solution."""
    design = Design(rows, folds, seed)
    design.variants(VALID, controls)
    return design
