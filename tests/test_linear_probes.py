"""Experiment 013 on planted states: what is in them is found, where it is, and nothing else."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch

from lens_utils import provenance
from lens_utils.maze_records import as_dict, expand, from_dict, sample_mazes

sys.path.insert(0, str(provenance.EXPERIMENTS / "013_linear_probes"))

import probe_analyses as analyse  # noqa: E402
import probe_design as plan  # noqa: E402
import probe_measure as measure  # noqa: E402
import probe_summary as summary  # noqa: E402
import probe_tables as table  # noqa: E402

N_MAZES, D = 16, 24


@pytest.fixture(scope="module")
def records():
    return expand(sample_mazes(N_MAZES, 5, 0), (False, True))


@pytest.fixture(scope="module")
def rows(records):
    return plan.table([r for r in records if not r.thinking])


@pytest.fixture(scope="module")
def solved(rows):
    """Depth 0: noise. Depth 1: a direction of its own for every wording. Depth 2: one for every
    task, plus noise. At another site there is nothing but the maze."""
    rng = np.random.default_rng(0)

    def codes(names):
        found = {name: rng.normal(size=D) for name in sorted(set(names))}
        return np.stack([found[name] for name in names])

    noise = rng.normal(size=(3, len(rows), D))
    last = noise + np.stack(
        [np.zeros((len(rows), D)), 3 * codes(rows.wording), 3 * codes(rows.task)]
    )
    null = np.stack([codes(rows.maze)] * 3)
    held = {
        name: torch.from_numpy(np.swapaxes(states, 0, 1)).float()
        for name, states in (("last", last), ("null", null))
    }
    design = plan.ability_design(rows, folds=4, seed=0, controls=2, permutations=8)
    arrays = measure.solve(held, design, 1.0, torch.device("cpu"))
    return table.Solved("direct", measure.groups(held, range(3)), design, arrays)


@pytest.fixture(scope="module")
def performance(solved):
    return table.standard_performance([solved], 0)


# The design


def test_nothing_of_a_test_row_is_trained_on(rows):
    design = plan.ability_design(rows, folds=4, seed=0, controls=1, permutations=1)
    maze, wording = rows.maze.to_numpy(), rows.wording.to_numpy()
    seen = {}
    for about, trained, tested in zip(design.problems, design.trained, design.tested, strict=True):
        if about["scheme"] == "all":
            continue
        assert not set(maze[trained]) & set(maze[tested]), about
        if about["scheme"] == "template":
            assert not set(wording[trained]) & set(wording[tested]), about
        if about["scheme"] in ("maze", "template") and about["variant"] == "true":
            key = about["label"], about["scheme"]
            seen[key] = seen.get(key, 0) + tested
    assert len(seen) == 10 and all((count == 1).all() for count in seen.values())
    assert design.left_out == []


def test_one_class_is_left_out_and_counted(rows):
    design = plan.Design(rows[rows.task == "solve"].reset_index(drop=True), 2, 0)
    design.put("requires_solve", design.rows.requires_solve.to_numpy(), "true", ("maze",))
    assert design.problems == []
    assert [one["why"] for one in design.left_out] == ["training rows of one class"] * 2
    one = table.Solved("direct", pd.DataFrame(), design, {})
    assert table.left_out([one]).n.tolist() == [2]


def test_labels_are_nested_and_valid_is_the_answer(records, rows):
    assert (rows.requires_solve <= rows.requires_generate).all()
    assert (rows.requires_generate <= rows.requires_recognize).all()
    assert rows.requires_recognize.mean() == 0.5, "as many negatives"
    judged = plan.judged([as_dict(r) for r in records], 0)
    assert len(judged) == 6 * N_MAZES and all(r.task == "recognize" for r in judged)
    truth = plan.table(judged)[plan.VALID]
    assert truth.mean() == 0.5
    assert truth.tolist() == [r.answer == "Yes" for r in judged]
    assert not [r for r in judged if r.path == () or r.thinking]


def test_controls_belong_to_wordings_or_goals(rows, records):
    design = plan.Design(rows, 2, 0)
    control = design.control("requires_solve", 0)
    assert rows.assign(c=control).groupby("wording").c.nunique().max() == 1
    assert (control != rows.requires_solve).any()
    other = plan.table(plan.judged([as_dict(r) for r in records], 0))
    control = plan.Design(other, 2, 0).control(plan.VALID, 0)
    assert other.assign(c=control).groupby("goal").c.nunique().max() == 1
    assert 0.2 < control.mean() < 0.8


def test_at_most_counts_tasks_and_modes(records):
    held = [as_dict(r) for r in records]
    counts = pd.DataFrame(plan.at_most(held, 3)).groupby(["task", "enable_thinking"]).size()
    assert (counts == 3).all() and len(counts) == 8
    assert plan.at_most(held, 0) == held


def test_sites_are_the_tokens_they_say(organism, records):
    def said(ids, places):
        return [organism.decode([ids[p]]).strip() for p in places]

    asked = [r for r in records if r.task == "recognize" and not r.thinking][0]
    ids, places = measure.sites(organism, measure.Asked(asked), "direct")
    cells = [f"({r},{c})" for r, c in sorted(asked.maze.open)]
    assert said(ids, places["cells"]) == cells and said(ids, places["null"]) == cells[-1:]
    assert places["last"] == [len(ids) - 1]
    ids, places = measure.sites(organism, measure.Asked(asked), "judge")
    assert said(ids, places["path"]) == [f"({r},{c})" for r, c in asked.path]
    thinking = next(r for r in records if r.task == "solve" and r.thinking)
    thought = "(0,1) (1,1) found"
    ids, places = measure.sites(organism, measure.Asked(thinking, thought), "thinking")
    assert said(ids, places["thought"]) == thought.split()
    whole = organism.decode(ids[places["last"][0] + 1 : places["thought"][0]])
    assert whole.split() == ["<think>"], "the span begins behind its tag"


def test_other_questions_about_a_maze_share_the_null_prefix(organism, records):
    """The null is one: up to that token the prompts are the same, letter by letter."""
    asked = [measure.Asked(r) for r in records if not r.thinking][:12]
    prefixes = set()
    for one in asked:
        ids, places = measure.sites(organism, one, "direct")
        prefixes.add(tuple(ids[: places["null"][0] + 1]))
    assert len(prefixes) == 1


# What is found


def value(frame, column="accuracy", **where):
    for name, wanted in where.items():
        frame = frame[frame[name] == wanted]
    assert len(frame) == 1, where
    return float(frame[column].iloc[0])


def test_planted_tasks_are_read_and_planted_wordings_do_not_carry_over(performance):
    for label in plan.LABELS:
        last = performance[(performance.site == "last") & (performance.label == label)]
        assert value(last, depth=2, scheme="template") > 0.9
        assert value(last, depth=1, scheme="maze") > 0.9
        assert value(last, depth=1, scheme="template") < 0.8, "by rote"
        assert abs(value(last, depth=0, scheme="template") - 0.5) < 0.12
        assert value(last, "control", depth=1, scheme="maze") > 0.8, "learnable by rote"
        assert value(last, "selectivity", depth=2, scheme="template") > 0.25
        assert abs(value(last, "shuffled", depth=2, scheme="template") - 0.5) < 0.12
    assert (performance.low <= performance.accuracy).all()
    assert (performance.accuracy <= performance.high).all()


def test_the_null_site_is_at_chance(performance):
    null = performance[performance.site == "null"]
    assert (null.accuracy - 0.5).abs().max() < 0.05


def test_peaks_and_flow_point_to_the_planted_depth(solved):
    found = table.peaks([solved], 0)
    assert set(found[found.site == "last"].depth) == {2}
    flow = analyse.information_flow([solved], 0)
    last = flow[(flow.site == "last") & (flow.label == "requires_generate")]
    assert set(last.near_top) == {2}
    assert last.cumulative.iloc[-1] == pytest.approx(last.gain.sum())


def test_code_lengths_are_short_where_labels_are_readable(solved):
    found = table.code_length([solved])
    solve = found[(found.site == "last") & (found.label == "requires_solve")]
    assert value(solve, "compression", depth=2, variant="true") > 1.5
    assert value(solve, "compression", depth=2, variant="shuffled") < 1
    assert value(solve, "compression", depth=0, variant="true") < 1


def test_transfer_follows_what_tasks_share(solved):
    """Every task has a direction of its own, but recall has one too: away from it is shared."""
    found = analyse.cross_task_generalization([solved], 0)
    last = found[(found.site == "last") & (found.depth == 2)]
    same = value(last, "auc", trained="solve", tested="solve")
    assert same > 0.95
    assert value(last, "auc", trained="recognize+generate", tested="generate") > 0.95
    null = found[found.site == "null"]
    assert (null.auc - 0.5).abs().max() < 0.05
    assert set(found.trained) == {"+".join(names) for names in plan.TRAINED}


def test_cosines_of_nested_labels_have_a_null(solved):
    found = table.directions([solved])
    pair = found[(found.label == "requires_generate") & (found.other == "requires_solve")]
    pair = pair[(pair.site == "last") & (pair.depth == 2)].iloc[0]
    assert pair.n == 8 and pair.null_low <= pair.null <= pair.null_high
    assert 1 / 9 <= pair.p <= 1 and 0.2 < pair.cosine < 0.99


def test_every_analysis_has_its_rows(solved, performance):
    errors = analyse.error_analysis([solved])
    noise = errors[(errors.site == "last") & (errors.label == "requires_solve")]
    assert noise.share.between(0, 1).all() and set(noise.course) == {
        "always_wrong", "early_wrong_late_right", "early_right_late_wrong", "always_right"
    }  # fmt: skip
    wordings = analyse.by_wording([solved])
    one = wordings[(wordings.site == "last") & (wordings.depth == 2)
                   & (wordings.label == "requires_solve")]  # fmt: skip
    assert one.n.sum() == len(solved.design.rows) and one.right.min() > 0.6
    pca = analyse.weight_pca([solved], 0)
    assert (pca[pca.site == "last"].components_80 <= 2).all()
    sure = analyse.confidence_analysis([solved])
    assert sure.confidence.between(0.5, 1).all()
    crossed = table.crossed([solved])
    assert value(crossed, "auc", site="last", depth=2, label="requires_solve",
                 other="requires_solve") > 0.95  # fmt: skip
    assert len(analyse.integration(performance)) > 0
    high = analyse.layer_criticality(performance)
    assert value(high, "high", site="last", depth=2) == 3
    assert value(high, "high", site="null", depth=2) == 0
    assert len(analyse.calibration([solved]))


def test_the_bag_of_words_counts_cells_and_words(records):
    asked = [measure.Asked(r) for r in records[:2]]
    counts = measure.bag_of_words(asked)["words"]
    words = {word for one in asked for word in one.record.prompt.lower().replace("?", " ? ")
             .replace(".", " . ").replace(":", " : ").split()}  # fmt: skip
    assert counts.shape == (2, 1, len(words))
    assert counts[0].sum() >= len(records[0].prompt.split())


def test_dape_sets_are_matched_by_layer():
    neurons = [{"layer": 1, "neuron": n} for n in range(3)] + [{"layer": 2, "neuron": 7}]
    sets = measure.dape_sets({"abilities": {"solve": {"neurons": neurons}}}, (3, 10), 4, 0)
    assert [one["kind"] for one in sets] == ["dape", *["random"] * 4, "all"]
    for one in sets[1:5]:
        layers = [layer for layer, _ in one["neurons"]]
        assert layers.count(1) == 3 and layers.count(2) == 1 and len(layers) == 4
        assert not set(one["neurons"]) & {(1, 0), (1, 1), (1, 2), (2, 7)}
    assert len(sets[-1]["neurons"]) == 30
    assert measure.dape_sets({"abilities": {}}, (3, 10), 4, 0) == []


def test_the_gate_is_asked_first():
    cell = {"accuracy": 0.1, "low": 0.0, "high": 0.2, "chance": 0.1, "n": 9, "passes": False}
    gate = {task: {"direct": cell} for task in ("solve", "recognize", "generate", "recall")}
    assert summary.passing(gate) == []
    found = summary.verdict(gate)
    assert "no probe was fitted" in found["abilities past the gate"]
    gate["solve"]["thinking"] = cell | {"passes": True}
    assert summary.passing(gate) == ["solve"]
    assert len(summary.gate_table(gate)) == 5


def test_finished_thoughts_only(records):
    held = [{"id": i, **as_dict(r)} for i, r in enumerate(records) if r.thinking][:3]
    replies = pd.DataFrame({
        "id": [held[0]["id"], held[1]["id"]], "thought": ["(0,1) found", "(0,1)"],
        "truncated": [False, True],
    })  # fmt: skip
    found, without = measure.thinking(held, replies)
    assert without == 2 and [one.thought for one in found] == ["(0,1) found"]
    assert found[0].record == from_dict(held[0])
