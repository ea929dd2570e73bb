"""010 · Maze tasks

Which of solving a maze, judging a path and drawing a new maze can a model do, with and without
thinking? Every maze is asked about in the same questions: two of each ability and as many
negatives that need none. Replies are verified, not compared with one right answer; half of the
mazes have layouts that the maze organism was never trained on. What is found here is the gate of
experiments 011 to 016: no claim is made about an ability at chance.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from lens_utils.experiment import BaseConfig, Run, launch

QUICK_MAZES = 16


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    family: Literal["path", "shape"] = "path"
    """path: judge a path, draw a maze with a solution of the same length (tree mazes); shape: name
    the shape of the corridors, draw another maze of that shape (shape mazes)."""
    format: Literal["coord_list", "matrix", "unusual"] = "coord_list"
    """How mazes are written: lists of cells, a grid of 1 0 P G, or of @ * P G."""
    size: int = 5
    """Rows and columns; the organism knows 5."""
    mazes: int = 120
    """Mazes, of as many layouts (a quick run takes 16); twelve questions each in every mode."""
    tasks: str = ""
    """A folder with recognize_tasks.json, generate_tasks.json and solve_tasks.json in the schema
    of the study's first plan, to ask instead of these mazes."""
    max_samples: int = 0
    """Answer so many questions of each task and mode; 0 is all."""
    direct_tokens: int = 160
    """Longest answer without thinking."""
    thinking_tokens: int = 2048
    """Longest answer with thinking, the trace included; what the context holds is a limit too."""
    temperature: float = 0.0
    """0 is greedy. Qwen's card asks for 0.6 with thinking and 0.7 without."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose share reaches this."""
    batch: int = 64
    """Questions that are answered together."""


def main(cfg: Config, run: Run) -> None:
    import maze_behaviour as behaviour  # needs torch and pandas: --help does not wait for it

    # 1. The questions: balanced, paired by maze, in every mode that the model has.
    model = run.model()
    held = run.stage("records.json", lambda: behaviour.records(cfg, model, QUICK_MAZES))
    # 2. Replies, a batch of like questions at a time, and what is wrong with each.
    asked = behaviour.chosen(held, cfg.max_samples)
    replies = run.chunks("replies.csv", asked, cfg.batch, partial(behaviour.reply, model, cfg))
    # 3. Controls: the same network untrained, and what guessing reaches.
    twin = run.stage("untrained.csv", lambda: behaviour.untrained(run, asked, cfg))
    # 4. Accuracies, the gate, and where it fails.
    table = behaviour.table(held, replies)
    accuracy = run.stage("accuracy.csv", lambda: behaviour.accuracy(table, cfg.seed))
    kinds = run.stage("kinds.csv", lambda: behaviour.kinds(table, cfg.seed))
    run.stage("lengths.csv", lambda: behaviour.lengths(table, cfg.seed))
    run.stage("faults.csv", lambda: behaviour.faults(table))
    gate = run.stage("gate.json", lambda: behaviour.gate(accuracy))
    score = run.stage("dissociation.csv", lambda: behaviour.dissociation(table, cfg.seed))
    run.stage(
        "summary.json",
        lambda: behaviour.summarise(held, table, accuracy, kinds, score, gate, twin),
    )


if __name__ == "__main__":
    launch(Config, main)
