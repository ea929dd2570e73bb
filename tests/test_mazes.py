"""Mazes against networkx, and verifiers against everything that is not right."""

import itertools
import random

import networkx as nx
import pytest

from lens_utils import maze_shapes, maze_text, mazes
from lens_utils.errors import BadInput
from lens_utils.mazes import SHAPES, SPOILS, Maze

N = 150


def graph(maze: Maze) -> nx.Graph:
    """The maze as networkx sees it: built from the grid, not from our neighbours."""
    whole = nx.grid_2d_graph(maze.size, maze.size)
    if len(maze.moves) == 8:
        whole.add_edges_from(
            ((r, c), (r + 1, c + d))
            for r, c, d in itertools.product(range(maze.size - 1), range(maze.size), (-1, 1))
            if 0 <= c + d < maze.size
        )
    return whole.subgraph(maze.open)


@pytest.fixture(scope="module")
def trees() -> list[Maze]:
    rng = random.Random(1)
    return [mazes.tree_maze(rng, 5) for _ in range(N)]


@pytest.fixture(scope="module")
def shaped() -> list[Maze]:
    rng = random.Random(2)
    return [maze_shapes.shape_maze(rng, SHAPES[n % 6], 5 + n % 3) for n in range(60)]


# Growing and solving


def test_grown_mazes_are_trees_of_the_promised_size(trees):
    for maze in trees:
        assert nx.is_tree(graph(maze))
        assert 9 <= len(maze.open) <= 14
        assert mazes.is_tree(5, maze.open)


def test_is_tree_agrees_with_networkx_on_any_cells():
    rng, found = random.Random(3), {True: 0, False: 0}
    grid = list(itertools.product(range(4), range(4)))
    for _ in range(400):
        cells = rng.sample(grid, rng.randint(1, 8))
        expected = nx.is_tree(nx.grid_2d_graph(4, 4).subgraph(cells))
        assert mazes.is_tree(4, cells) == expected
        found[expected] += 1
    assert min(found.values()) > 20
    assert not mazes.is_tree(4, [])


def test_the_solution_is_the_only_simple_path(trees):
    for maze in trees:
        [only] = nx.all_simple_paths(graph(maze), maze.start, maze.goal)
        assert mazes.solve(maze) == only


def test_shape_mazes_are_solved_as_shortly_as_by_networkx(shaped):
    for maze in shaped:
        path = mazes.solve(maze)
        assert len(path) - 1 == nx.shortest_path_length(graph(maze), maze.start, maze.goal)
        assert not mazes.path_fault(maze, path)


def test_start_and_goal_are_drawn_evenly_over_lengths(trees):
    """Pairs drawn evenly would be mostly close ones: in these trees 55 % are within 3 steps."""
    steps = [len(mazes.solve(maze)) - 1 for maze in trees]
    assert min(steps) == 2 and sum(n <= 3 for n in steps) / len(steps) < 0.4


def test_a_maze_without_a_way_is_refused():
    maze = Maze(3, frozenset({(0, 0), (2, 2)}), (0, 0), (2, 2))
    with pytest.raises(BadInput, match="no way from the player to the goal"):
        mazes.solve(maze)
    with pytest.raises(BadInput, match="take 3 or more"):
        mazes.tree_maze(random.Random(0), 2)


def test_the_shapes_are_those_of_the_study():
    """Its 82 layouts on 5 x 5 cells and 466 on 7 x 7, counted from its own generator."""
    counts = {name: len(maze_shapes.shape_layouts(name, 5)) for name in SHAPES}
    assert counts == {"square": 14, "cross": 10, "spiral": 8, "triangle": 23, "C": 22, "Z": 5}
    assert sum(len(maze_shapes.shape_layouts(name, 7)) for name in SHAPES) == 466
    layouts = [cells for name in SHAPES for cells in maze_shapes.shape_layouts(name, 7)]
    assert len(set(layouts)) == len(layouts)


def test_a_random_walk_touches_itself_nowhere():
    rng = random.Random(4)
    for _ in range(100):
        path = mazes.walk(rng, 5, (0, 0), (2, 2), 8)
        assert len(path) == 9 and path[-1] == (2, 2)
        assert nx.is_path(nx.grid_2d_graph(5, 5), path)
        assert nx.is_tree(nx.grid_2d_graph(5, 5).subgraph(path))
    with pytest.raises(BadInput, match="take another length"):
        mazes.walk(rng, 5, (0, 0), (2, 2), 5)


# Splits


def test_no_layout_is_on_both_sides():
    rng = random.Random(5)
    sides = [{mazes.tree_maze(rng, 5, side).layout_id for _ in range(N)} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert all(mazes.held_out(layout) for layout in sides[1])


def test_the_split_is_the_same_everywhere():
    """By a hash of its own: these were computed with hashlib in another process."""
    import hashlib

    for layout in ("5x00a1b2c", "5x1ffffff", "7x0000000000001"):
        share = int(hashlib.sha256(layout.encode()).hexdigest()[:8], 16) / 2**32
        assert mazes.held_out(layout, 0.5) == (share < 0.5)


def test_a_layout_is_known_by_its_cells_only(trees):
    maze = trees[0]
    moved = Maze(5, maze.open, maze.goal, maze.start)
    assert moved.layout_id == maze.layout_id and moved.maze_id != maze.maze_id
    assert len({m.layout_id for m in trees}) == len({m.open for m in trees})


# Verifying


@pytest.mark.parametrize("kind", SPOILS)
def test_every_negative_fails_for_its_reason(trees, kind):
    rng, n = random.Random(6), 0
    expected = {"wall": "wall", "skip": "skip", "wronggoal": "goal"}[kind]
    for maze in trees:
        path = mazes.spoil(rng, maze, kind)
        if path is not None:
            n += 1
            assert mazes.path_fault(maze, path) == expected
            if kind == "wall":  # every step still looks allowed
                assert nx.is_path(nx.grid_2d_graph(5, 5), path)
                assert len(path) == len(mazes.solve(maze))
            if kind == "wronggoal":
                assert nx.is_path(graph(maze), path)
    assert n > N / 2


def test_path_faults_by_hand():
    maze = Maze(3, frozenset({(0, 0), (0, 1), (0, 2), (1, 2)}), (0, 0), (1, 2))
    right = [(0, 0), (0, 1), (0, 2), (1, 2)]
    assert mazes.path_fault(maze, right) == ""
    assert mazes.path_fault(maze, []) == "empty"
    assert mazes.path_fault(maze, right[1:]) == "start"
    assert mazes.path_fault(maze, right[:-1]) == "goal"
    assert mazes.path_fault(maze, [(0, 0), (1, 0), (1, 1), (1, 2)]) == "wall"
    assert mazes.path_fault(maze, [(0, 0), (0, 1), (1, 2)]) == "skip"
    assert mazes.path_fault(maze, [(0, 0), (0, 1), (0, 0), *right[1:]]) == "repeat"


def test_generated_mazes_hold_and_their_spoiled_versions_do_not(trees):
    rng = random.Random(7)
    for maze in trees[:60]:
        path, further = mazes.another(rng, maze)
        new = Maze(5, frozenset((*path, *further)), maze.start, maze.goal)
        assert nx.is_tree(graph(new))
        assert nx.shortest_path_length(graph(new), maze.start, maze.goal) == len(path) - 1
        assert mazes.generated_fault(maze, path, further) == ""
        if len(new.open) == 9:  # more only where the solution itself is long
            assert mazes.generated_fault(maze, path, further[:-1]) == "number of cells"
        assert mazes.generated_fault(maze, path[1:], further) == "start or goal"
        assert mazes.generated_fault(maze, path, [*further, further[-1]]) == "repeat"
        assert mazes.generated_fault(maze, path, [*further[:-1], (5, 0)]) == "outside"
        assert mazes.generated_fault(maze, [], further) == "empty"
        lone = next(c for c in itertools.product(range(5), range(5))
                    if c not in new.open and not set(mazes.around(5)[c]) & new.open)  # fmt: skip
        assert mazes.generated_fault(maze, path, [*further[:-1], lone]) == "no tree"


def test_the_same_maze_again_is_no_new_maze(trees):
    for maze in trees:
        path = mazes.solve(maze)
        further = [cell for cell in maze.open if cell not in path]
        assert mazes.generated_fault(maze, path, further) == "same maze"


def test_echoing_a_shape_maze_is_no_answer(shaped):
    for maze in shaped:
        assert maze_shapes.shape_fault(maze, maze) == "same maze"
        others = {name for name in SHAPES if name != maze.shape}
        name = sorted(others)[0]
        other = maze_shapes.shape_maze(random.Random(8), name, maze.size)
        assert maze_shapes.shape_fault(maze, other) == "shape"


# Concepts


def test_concepts_are_what_networkx_counts(trees):
    for maze in trees[:50]:
        seen, open_graph = mazes.concepts(maze), graph(maze)
        way = set(nx.shortest_path(open_graph, maze.start, maze.goal))
        assert len(seen) == 25
        for cell, names in seen.items():
            assert ("wall" in names) == (cell not in maze.open) == ("path" not in names)
            if cell in maze.open:
                degree = open_graph.degree[cell]
                assert ("dead_end" in names) == (degree == 1)
                assert ("junction" in names) == (degree >= 3)
                rows = {r for r, _ in open_graph[cell]} | {cell[0]}
                columns = {c for _, c in open_graph[cell]} | {cell[1]}
                bent = degree == 2 and len(rows) == 2 and len(columns) == 2
                assert ("turn" in names) == bent
                assert ("solution" in names) == (cell in way)
        assert "start" in seen[maze.start] and "goal" in seen[maze.goal]
        assert sum("start" in names for names in seen.values()) == 1


# Text


@pytest.mark.parametrize("style", maze_text.FORMATS)
def test_what_is_rendered_is_parsed(trees, shaped, style):
    for maze in (*trees[:40], *shaped):
        noise = f"Here it is:\n{maze_text.render(maze, style)}\nSolve the maze."
        assert maze_text.parse(noise, maze.shape) == maze


def test_the_formats_say_the_same_in_other_signs(trees):
    matrix, unusual = (maze_text.render(trees[0], style) for style in ("matrix", "unusual"))
    assert matrix.translate(str.maketrans("10", "@*")) == unusual
    with pytest.raises(BadInput, match="no maze format"):
        maze_text.render(trees[0], "ascii")


def test_the_player_and_the_goal_come_before_the_cells(trees):
    text = maze_text.render(trees[0])
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "Player",
        "Goal",
        "Walls",
        "Empty",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a maze", "no maze found"),
        ("1 0\nP G\n0 0", "no maze found"),
        ("1 0 0\nP G 0\n0 G 0", "one player P and one goal G"),
        ("Walls: (0,0)\nEmpty: (0,1)", "one player and one goal"),
        ("Player: (0,1)\nGoal: (1,1)\nWalls: (0,0)\nEmpty: (0,1)", "no square grid"),
    ],
)
def test_what_is_no_maze_is_refused(text, message):
    with pytest.raises(BadInput, match=message):
        maze_text.parse(text)


def test_other_peoples_spelling_is_read():
    text = "Walls: (0, 0), (1, 1)\nEmpty: (0, 1), (1, 0)\nPlayer position: (0, 1)\nGoal: (1, 0)"
    assert maze_text.parse(text) == Maze(2, frozenset({(0, 1), (1, 0)}), (0, 1), (1, 0))
