"""010: replies are read, verified and counted as they should be; own task files; chance."""

import json
import random
import sys

import numpy as np
import pandas as pd
import pytest

from lens_utils import maze_records, maze_text, mazes, provenance
from lens_utils.errors import BadInput

sys.path.insert(0, str(provenance.EXPERIMENTS / "010_maze_tasks"))
import maze_behaviour as behaviour


def test_walking_by_chance_is_what_a_simulation_reaches():
    rng = random.Random(0)
    drawn = (mazes.tree_maze(rng) for _ in range(100))
    maze = next(m for m in drawn if 0.05 < behaviour.walk_by_chance(m) < 0.4)
    path, reached, n = mazes.solve(maze), 0, 4000
    for _ in range(n):
        walked = [maze.start]
        while walked[-1] != maze.goal:
            ahead = [cell for cell in maze.neighbours(walked[-1]) if cell not in walked]
            if not ahead:
                break
            walked.append(rng.choice(ahead))
        reached += walked == path
    p = behaviour.walk_by_chance(maze)
    assert abs(reached / n - p) < 4 * np.sqrt(p * (1 - p) / n)


def answered(**right) -> pd.DataFrame:
    """Twenty mazes, one question of each task: the share given is right."""
    rows = [
        {"maze_id": maze, "task": task, "mode": "direct", "split": "test", "correct": maze < 20 * p,
         "chance": 0.5 if task == "recognize" else 0.0, "truncated": False}
        for task, p in right.items() for maze in range(20)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_gate_asks_for_more_than_chance():
    table = answered(solve=0.5, recognize=0.6, generate=0.0, recall=1.0)
    passed = behaviour.gate(behaviour.accuracy(table, 0))
    assert {task: cell["direct"]["passes"] for task, cell in passed.items()} == {
        "solve": True, "recognize": False, "generate": False, "recall": True}  # fmt: skip
    assert passed["recognize"]["direct"]["n"] == 20


def test_the_dissociation_score_by_hand():
    table = answered(solve=0.9, recognize=0.5, generate=0.2)
    [row] = behaviour.dissociation(table, 0).to_dict("records")
    assert row["value"] == pytest.approx(90 - (50 + 20) / 2) and row["n"] == 20
    assert row["low"] < row["value"] < row["high"]


def test_like_questions_are_asked_together():
    held = [{"id": n, **maze_records.as_dict(record)} for n, record in enumerate(
        maze_records.expand(maze_records.sample_mazes(4, 5, 0), (False, True)))]  # fmt: skip
    order = [(h["enable_thinking"], h["task"]) for h in behaviour.chosen(held, 3)]
    assert len(order) == 24 and len(set(order)) == 8
    assert order == sorted(order, key=order.index)


def test_gold_answers_are_right_in_both_modes(organism):
    """Through the very reader of replies, thoughts and all; and a cut trace is unfinished."""
    from lens_utils.maze_prompts import gold_ids

    records = maze_records.expand(maze_records.sample_mazes(2, 5, 0), (False, True))
    for n, record in enumerate(records):
        held = {"id": n, **maze_records.as_dict(record)}
        ids, start = gold_ids(organism, record)
        end = next(iter(organism.ends))
        read = behaviour._verified(organism, held, [*ids, end], record.thinking)
        assert read["correct"] and not read["truncated"] and read["n_tokens"] == len(ids) + 1
        assert bool(read["thought"]) == record.thinking
        if record.thinking:
            cut = behaviour._verified(organism, held, ids[: start - 2], True)
            assert cut["truncated"] and cut["fault"] == "format" and cut["reply"] == ""


def test_own_task_files_are_asked(tmp_path, capsys):
    maze = mazes.tree_maze(random.Random(1))
    good = {"maze_description": maze_text.render(maze), "question": "Solve the maze.",
            "answer": "x", "enable_thinking": False}  # fmt: skip
    path = tmp_path / "solve_tasks.json"
    path.write_text(json.dumps([good, good | {"maze_description": "?"}]))
    [record] = behaviour._own(tmp_path)
    assert record.maze == maze and "left out 1 (unreadable maze)" in capsys.readouterr().out
    path.write_text("{")
    with pytest.raises(BadInput, match="is no JSON"):
        behaviour._own(tmp_path)
    with pytest.raises(BadInput, match="has none of recognize_tasks.json"):
        behaviour._own(tmp_path / "nowhere")
