"""Questions about mazes, the organism's traces, sets of records, and other people's task files."""

import json
import random

import networkx as nx
import pytest

from lens_utils import maze_records, maze_shapes, maze_text, maze_traces, mazes
from lens_utils.errors import BadInput
from lens_utils.maze_tasks import SHAPE_TEMPLATES, TASKS, TEMPLATES, ask, reply_fault
from lens_utils.mazes import SHAPES, SPOILS, Maze


def graph(maze: Maze) -> nx.Graph:
    """A tree maze as networkx sees it."""
    return nx.grid_2d_graph(maze.size, maze.size).subgraph(maze.open)


@pytest.fixture(scope="module")
def trees() -> list[Maze]:
    rng = random.Random(1)
    return [mazes.tree_maze(rng, 5) for _ in range(80)]


@pytest.fixture(scope="module")
def shaped() -> list[Maze]:
    rng = random.Random(2)
    return [maze_shapes.shape_maze(rng, SHAPES[n % 6], 5 + n % 3) for n in range(24)]


# Questions and traces


def test_right_answers_pass_and_others_do_not(trees, shaped):
    rng = random.Random(9)
    for maze in (*trees[:30], *shaped[:12]):
        for task in (*TASKS, "lexical"):
            record = ask(rng, maze, task, 1, False)
            said = f"Well. {record.answer}"
            if task == "generate" or maze.shape:
                said = record.answer
            assert reply_fault(record, said) == "", (task, record.answer)
            assert reply_fault(record, "") == "format"
            if task in ("solve", "recall", "lexical"):
                assert reply_fault(record, "(9,9) (0,0)") != ""
    no = ask(rng, trees[0], "recognize", 0, False, spoiled="skip")
    assert reply_fault(no, "No.") == "" and reply_fault(no, "Yes") == "answer"
    assert reply_fault(no, "Yes and No") == "format"


def test_questions_about_one_maze_share_the_block(trees):
    rng = random.Random(10)
    block = maze_text.render(trees[0])
    for task in (*TASKS, "lexical"):
        for template in range(4):
            assert ask(rng, trees[0], task, template, False).prompt.startswith(block)


def test_a_shown_path_does_not_tell_the_task(trees):
    """Lexical negatives that speak of a path show one too."""
    shown = ask(random.Random(11), trees[0], "lexical", 4, False)
    assert shown.path and shown.task == "recall" and shown.labels["requires_recognize"] == 0


def test_labels_are_nested():
    rng = random.Random(12)
    maze = mazes.tree_maze(rng)
    expected = {"recall": (0, 0, 0), "recognize": (1, 0, 0), "generate": (1, 1, 0),
                "solve": (1, 1, 1)}  # fmt: skip
    for task, labels in expected.items():
        assert tuple(ask(rng, maze, task, 0, False).labels.values()) == labels
    assert all(len(TEMPLATES[task]) >= 4 and len(SHAPE_TEMPLATES[task]) >= 4 for task in TASKS)


def test_the_search_trace_finds_the_goal_and_backtracks_only_from_dead_ends(trees):
    for maze in trees:
        words = maze_traces.search(maze)
        stack: list = []
        seen: list = []
        for i, word in enumerate(words[:-1]):
            if word == "back":
                dead = stack.pop()
                assert set(graph(maze)[dead]) <= set(seen)
                assert words[i + 1] == f"({stack[-1][0]},{stack[-1][1]})"
            else:
                cell = maze_text.cells_in(word)[0]
                if words[i - 1] != "back" or not i:
                    assert not stack or graph(maze).has_edge(stack[-1], cell)
                    stack.append(cell)
                    seen.append(cell)
        assert words[-1] == "found" and stack == mazes.solve(maze)


def test_the_check_trace_stops_at_the_fault(trees):
    rng = random.Random(13)
    for maze in trees[:40]:
        path = mazes.solve(maze)
        words = maze_traces.check(maze, path)
        assert words.count("ok") == len(path) and words[-1] == "valid"
        for kind in SPOILS:
            if wrong := mazes.spoil(rng, maze, kind):
                words = maze_traces.check(maze, wrong)
                assert words.count("bad") == 1 and words[-2:] == ["bad", "invalid"]
                good = maze_text.cells_in(" ".join(words))[:-1]
                assert nx.is_path(graph(maze), good)


def test_phases():
    words = ["(0,0)", "(0,1)", "back", "(0,0)", "(1,0)", "found"]
    assert maze_traces.phases(words) == ["explore", "explore", "backtrack", "backtrack", "explore",
                                         "conclude"]  # fmt: skip


@pytest.fixture(scope="module")
def expanded():
    return maze_records.expand(maze_records.sample_mazes(24, 5, 0), (False, True))


def test_expansion_is_balanced(expanded):
    assert len(expanded) == 24 * 2 * maze_records.PER_MAZE
    for thinking in (False, True):
        for side in (False, True):
            cell = [r for r in expanded if r.thinking == thinking and r.test == side]
            tasks = [r.task for r in cell]
            assert {task: tasks.count(task) for task in TASKS} == {
                "solve": 24, "recognize": 24, "generate": 24, "recall": 72}  # fmt: skip
            answers = [r.answer for r in cell if r.task == "recognize"]
            assert answers.count("Yes") == answers.count("No") == 12
            kinds = [r.negative_kind for r in cell if r.task == "recall"]
            assert kinds.count("lexical") == kinds.count("recall")
            spoiled = [r.negative_kind for r in cell if r.answer == "No"]
            assert {kind: spoiled.count(kind) for kind in SPOILS} == dict.fromkeys(SPOILS, 4)
    wordings = {r.template_id for r in expanded}
    assert len(wordings) == sum(len(TEMPLATES[task]) for task in TEMPLATES)


def test_both_modes_ask_the_same(expanded):
    direct, thinking = ([r.prompt for r in expanded if r.thinking == mode]
                        for mode in (False, True))  # fmt: skip
    assert direct == thinking


def test_layouts_keep_to_their_side_also_in_gold_answers(expanded):
    for record in expanded:
        if record.task == "generate":
            new = Maze(5, frozenset(record.gold), record.maze.start, record.maze.goal)
            assert mazes.held_out(new.layout_id) == record.test


def test_records_survive_json(expanded, shaped):
    more = maze_records.expand(shaped[:6], (False,), "matrix")
    for record in (*expanded, *more):
        held = json.loads(json.dumps(maze_records.as_dict(record)))
        assert maze_records.from_dict(held) == record


# Other people's files


def task_row(**changes) -> dict:
    rng = random.Random(14)
    maze = mazes.tree_maze(rng)
    return {"maze_description": maze_text.render(maze, "matrix"), "question": "Solve the maze.",
            "answer": "x", "enable_thinking": True, "maze_size": 5} | changes  # fmt: skip


def test_a_task_file_of_the_first_plan_is_read():
    [record], dropped = maze_records.from_plan([task_row()], "solve")
    assert record.thinking and record.template_id == "solve.0" and not any(dropped.values())
    assert record.gold == tuple(mazes.solve(record.maze))


def test_paths_in_questions_are_judged():
    rng = random.Random(14)
    maze = mazes.tree_maze(rng)
    wrong = mazes.spoil(rng, maze, "skip")
    rows = [task_row(question=f"Is {maze_text.cells_text(path)} a solution?", answer=said)
            for path, said in ((mazes.solve(maze), "True"), (wrong, "no"))]  # fmt: skip
    found, _ = maze_records.from_plan(rows, "recognize")
    assert [r.answer for r in found] == ["Yes", "No"]
    assert [r.negative_kind for r in found] == ["", "skip"]


def test_unsolvable_and_unreadable_mazes_are_counted():
    rows = [task_row(), task_row(maze_description="P 1 0\n1 1 1\n0 1 G"),
            task_row(maze_description="?")]  # fmt: skip
    found, dropped = maze_records.from_plan(rows, "solve")
    assert len(found) == 1 and dropped == {"unreadable maze": 1, "no solution": 1}


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ({}, "solve", "a list of tasks is wanted"),
        ([], "solve", "a list of tasks is wanted"),
        ([{"question": "?"}], "solve", "task 0 has no maze_description and no answer"),
        ([task_row()], "draw", "no task 'draw'"),
        ([task_row(question="Is (0,0) (0,1) right?", answer="maybe")], "recognize", "Yes or No"),
        ([task_row(maze_description="?")], "solve", "no task is left"),
    ],
)
def test_malformed_task_files_get_one_line(rows, task, message):
    with pytest.raises(BadInput, match=message) as caught:
        maze_records.from_plan(rows, task)
    assert "\n" not in str(caught.value)
