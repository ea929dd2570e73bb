"""Experiment 014 and lens_utils.traces: places of cells, sign flips, traces cut and turned."""

import random
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHS
from test_dape import ROWS, by_hooks, load

from lens_utils import maze_prompts, maze_tasks, maze_traces, mazes, provenance, traces
from lens_utils.errors import BadInput

sys.path.insert(0, str(provenance.EXPERIMENTS / "014_thinking_traces"))

import trace_tables as table

PAIRS = [[([1], [3])], [([0, 2], [4]), ([1], [5, 6])], [], [([3], [0])]]
CLUSTER = np.array([0, 1, 1, 2])


def record(task: str, seed: int = 0, spoiled: str = "") -> maze_tasks.Record:
    rng = random.Random(seed)
    found = None
    while found is None:
        found = maze_tasks.ask(rng, mazes.tree_maze(rng), task, 0, True, spoiled=spoiled)
    return found


def gold(question: maze_tasks.Record) -> str:
    return " ".join(maze_prompts.trace(question))


# Places


def test_what_was_said_is_prompt_trace_and_answer(organism):
    question = record("solve")
    ids, start, answer = traces.said(organism, question, gold(question), question.answer)
    assert ids[:start] == maze_prompts.encode(organism, question)
    assert ids == ids[:start] + maze_prompts.gold_ids(organism, question)[0]
    assert organism.decode(ids[answer:]) == question.answer
    direct = replace(question, thinking=False)
    ids, start, answer = traces.said(organism, direct, "", question.answer)
    assert start == answer and organism.decode(ids[answer:]) == question.answer


def test_an_empty_trace_is_what_direct_mode_writes(organism):
    question = record("solve")
    closed = organism.encode(traces.thought_text(""), bos=False)
    direct = maze_prompts.encode(organism, replace(question, thinking=False))
    assert maze_prompts.encode(organism, question) + closed == direct


@pytest.mark.parametrize("seed", range(4))
def test_mentions_are_the_words_of_trace_and_answer(organism, seed):
    """One token a word: the word's number is its position."""
    question = record("solve", seed)
    words = gold(question).split()
    what = traces.said(organism, question, " ".join(words), question.answer)
    found = traces.mentions(organism, what)
    cells = [(i, w) for i, w in enumerate(words) if w.startswith("(")]
    phases = maze_traces.phases(words)
    inside = [m for m in found if m.region == "thinking"]
    assert [m.position - what.start - 1 for m in inside] == [i for i, _ in cells]
    assert [f"({m.cell[0]},{m.cell[1]})" for m in inside] == [w for _, w in cells]
    assert [m.phase for m in inside] == [phases[i] for i, _ in cells]
    behind = [m for m in found if m.region == "answer"]
    assert [m.cell for m in behind] == list(question.gold) and behind[0].position == what.answer
    for m in found:
        assert organism.decode([what.ids[m.position]]) == f"({m.cell[0]},{m.cell[1]})"


def test_the_same_cell_in_two_places():
    at = [traces.Mention(p, c, r, f) for p, c, r, f in (
        (1, (0, 0), "thinking", "explore"), (2, (0, 1), "thinking", "explore"),
        (4, (0, 0), "thinking", "backtrack"), (7, (0, 0), "answer", "answer"),
        (8, (3, 3), "answer", "answer"))]  # fmt: skip
    assert traces.same_cells(at, "thinking", "answer") == [([1, 4], [7])]
    assert traces.same_cells(at, "backtrack", "explore") == [([4], [1])]
    assert traces.same_cells(at, "conclude", "explore") == []


# Paired differences


@pytest.mark.parametrize("arch", ARCHS)
def test_differences_are_those_of_plain_hooks(tiny, arch):
    hf = tiny(arch)
    gaps, higher, n_pairs = {}, 0, 0
    for i, row in enumerate(ROWS):
        values = by_hooks(hf, row)[1]
        each = [(values[:, a].mean(1), values[:, b].mean(1)) for a, b in PAIRS[i]]
        if each:
            gaps[i] = np.mean([one - other for one, other in each], axis=0)
            higher = higher + sum(one > other for one, other in each)
            n_pairs += len(each)
    found = traces.paired(load(tiny(arch)), ROWS, PAIRS, CLUSTER, 40)
    assert (found.n_samples, found.n_pairs) == (3, 4) == (len(gaps), n_pairs)
    np.testing.assert_allclose(found.total[0], sum(gaps.values()), atol=2e-4)
    np.testing.assert_allclose(found.squares, sum(g**2 for g in gaps.values()), atol=2e-3)
    np.testing.assert_allclose(found.higher, higher, atol=0.5001 if arch == "gpt2" else 0)
    # Every draw is a sum with one sign per cluster; sample 1 is cluster 1's only one with pairs.
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    possible = np.tensordot(signs, np.stack([gaps[0], gaps[1], gaps[3]]), 1)
    for draw in found.total[1:]:
        assert min(np.abs(possible - draw.numpy()).max((1, 2))) < 1e-3
    assert len({tuple(d.flatten()[:5].tolist()) for d in found.total}) > 4


def test_effect_and_p_by_hand():
    """Differences 1, 1, 1, 3 of one neuron: mean 1.5, standard deviation of them 0.866."""
    d = np.array([1.0, 1.0, 1.0, 3.0])
    signs = np.array(np.meshgrid(*[[1, -1]] * 4)).reshape(4, -1).T
    signs = signs[np.argsort(-signs.sum(1), kind="stable")]
    total = torch.from_numpy(signs @ d).float()[:, None, None]
    squares = torch.tensor([[float((d**2).sum())]])
    found = traces.Paired(total, squares, torch.tensor([[3.5]]), 4, 5)
    assert float(traces.effect(found)) == pytest.approx(d.mean() / d.std())
    assert float(traces.flip_p(found)) == pytest.approx(2 / 16), "all signs alike"
    assert float(traces.auroc(found)) == pytest.approx(0.7)


def test_a_difference_that_is_nowhere_is_not_found():
    """Signs of differences at random: p is uniform over neurons."""
    from scipy.stats import kstest

    rng = np.random.default_rng(0)
    d = rng.normal(size=(30, 500))
    signs = np.vstack([np.ones(30), rng.integers(0, 2, (199, 30)) * 2 - 1])
    total = torch.from_numpy(signs @ d).float()[:, None]
    found = traces.Paired(total, torch.from_numpy((d**2).sum(0)).float()[None],
                          torch.zeros(1, 500), 30, 30)  # fmt: skip
    assert kstest(traces.flip_p(found).numpy().ravel(), "uniform").pvalue > 0.01


def test_nothing_to_compare_is_one_line(tiny):
    with pytest.raises(BadInput, match="no cell is named in both places"):
        traces.paired(load(tiny("qwen3")), ROWS, [[]] * 4, CLUSTER)


# Traces put into the model's mouth


def test_a_cut_trace_keeps_its_first_words():
    assert traces.cut("a b c d", 0.5) == "a b" and traces.cut("a b c d", 1.0) == "a b c d"
    assert traces.cut("a b c d", 0.0) == ""
    with pytest.raises(BadInput, match=r"1\.5"):
        traces.cut("a b", 1.5)


@pytest.mark.parametrize("seed", range(5))
def test_a_turned_end_is_wrong_and_nothing_else_is(seed):
    for spoiled in ("", "skip"):
        question = record("recognize", seed, spoiled)
        thought = gold(question)
        turned = traces.falsify(question, thought)
        assert turned.split()[:-1] == thought.split()[:-1]
        assert {turned.split()[-1], thought.split()[-1]} == {"valid", "invalid"}
    question = record("solve", seed)
    thought, turned = gold(question).split(), traces.falsify(question, gold(question)).split()
    changed = [i for i in range(len(thought)) if thought[i] != turned[i]]
    assert changed == [len(thought) - 2] and len(thought) == len(turned)
    assert traces.falsify(question, "nothing to turn") == "nothing to turn"


def test_what_follows_a_trace():
    question, other = record("solve", 1), record("solve", 2)
    swapped = "other maze's trace"
    assert table.follows(swapped, question, other, gold(other), other.answer)
    assert not table.follows(swapped, question, other, gold(other), question.answer)
    turned = traces.falsify(question, gold(question))
    end = turned.split()[-2]
    wrong = f"{question.answer.rsplit(' ', 1)[0]} {end}"
    assert table.follows("end turned", question, None, turned, wrong)
    assert not table.follows("end turned", question, None, turned, question.answer)
    judged = record("recognize", 1)
    assert table.follows("end turned", judged, None, "(0,0) ok invalid", "No")
    assert not table.follows("end turned", judged, None, "(0,0) ok invalid", "Yes")
    assert not table.follows("cut at 50%", judged, None, "(0,0) ok invalid", "No")
    drawn, another = record("generate", 1), record("generate", 2)
    assert table.follows(swapped, drawn, another, gold(another), another.answer)
    assert not table.follows(swapped, drawn, another, gold(another), drawn.answer)


# Tables


def asked() -> tuple[list[dict], pd.DataFrame]:
    records = [
        {"id": n, "maze_id": f"m{n // 6}", "task": task, "template_id": f"{task}.0",
         "negative_kind": "", "enable_thinking": thinking}
        for n, (task, thinking) in enumerate(
            [(t, k) for k in (True, False) for t in maze_tasks.ABILITIES] * 4)
    ]  # fmt: skip
    thoughts = ["(0,0) (0,1) back (0,0) (1,0) found", "(0,0) ok valid", "", "Let me see: (0,0)"]
    replies = pd.DataFrame({
        "id": range(24), "thought": [thoughts[n % 4] or None for n in range(24)],
        "reply": "Yes", "correct": True, "truncated": [n == 1 for n in range(24)],
    })  # fmt: skip
    return records, replies


def test_traces_are_parsed_and_unfinished_ones_counted():
    frame = table.parse(*asked(), maze_tasks.ABILITIES, 0, False)
    assert len(frame) == 12 and not frame.thought.isna().any()
    row = frame.set_index("id").loc[0]
    assert (row.explore, row.backtrack, row.conclude, row.words) == (3, 2, 1, 6)
    assert row.labelled and row.finished
    by_id = frame.set_index("id")
    assert not by_id.loc[1].finished, "cut off"
    assert not by_id.loc[2].finished, "empty"
    assert not by_id.labelled[by_id.thought.str.startswith("Let")].any()
    assert set(table.parse(*asked(), ("solve",), 0, False).task) == {"solve"}


def test_the_gate_is_that_of_thinking():
    cell = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "n": 9}
    gate = {"solve": {"direct": cell | {"passes": True}, "thinking": cell | {"passes": False}},
            "generate": {"thinking": cell | {"passes": True}}, "recognize": {}}  # fmt: skip
    assert table.passing(gate) == ("generate",)
    assert "no ability" in table.gated(gate)["verdict"]
    assert "no thinking mode" in table.gated({"solve": {"direct": cell}})["verdict"]


def test_shares_of_answers_and_their_intervals():
    rows = [
        {"condition": c, "task": "solve", "id": 10 * m + k, "maze_id": f"m{m}", "reply": "",
         "right": c == "own trace" or (c == "empty" and m % 2 == 0), "as_before": c == "own trace",
         "follows": c == "other maze's trace" and m < 5}
        for c in ("own trace", "empty", "other maze's trace") for m in range(20) for k in range(2)
    ]  # fmt: skip
    at = table.faithfulness(pd.DataFrame(rows), 0).set_index(["condition", "task"])
    own, empty, foreign = (at.loc[(c, "all")] for c in ("own trace", "empty", "other maze's trace"))
    assert (own.right, own.right_low, own.as_before) == (1, 1, 1) and own.mazes == 20
    assert empty.right == 0.5 and 0.25 <= empty.right_low < 0.5 < empty.right_high <= 0.75
    assert foreign.follows == 0.25 and foreign.neither == 0.75 and foreign.right == 0


def test_neurons_are_confirmed_on_held_out_mazes():
    """Two neurons differ on the first half; one of them turns round on the second."""
    p, d = torch.full((2, 40), 0.6), torch.zeros(2, 40)
    p[0, 3] = p[1, 4] = 0.001
    d[0, 3], d[1, 4] = 2.0, 1.0
    held = torch.full((2, 40), 0.5)
    held[0, 3], held[1, 4] = 0.9, 0.2
    places = {}
    for half, n in (("first", [10, 30]), ("second", [8, 20])):
        key = f"thinking - answer/trained/{half}"
        places |= {f"{key}/p": p, f"{key}/d": d, f"{key}/auroc": held, f"{key}/n": torch.tensor(n)}
    found = table.neurons(places)
    assert found[["layer", "neuron", "confirmed"]].values.tolist() == [[0, 3, True], [1, 4, False]]
    row = table.contrasts(places, found).iloc[0]
    assert (row.significant, row.confirmed, row.held_out_pairs) == (2, 1, 20)
    assert row.best_auroc == pytest.approx(0.9)
    assert table.layers(places, found).confirmed.tolist() == [1, 0]
