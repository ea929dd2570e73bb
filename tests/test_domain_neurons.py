"""Experiment 011: domains from questions, tables from counts, and what is concluded from them."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lens_utils import dape, provenance
from lens_utils.errors import BadInput

sys.path.insert(0, str(provenance.EXPERIMENTS / "011_domain_neurons"))

import domain_findings as finding
import domain_samples as sample
import domain_tables as table

ABILITIES = ("recognize", "generate", "solve")
QUESTIONS = [("solve", "a", ""), ("solve", "b", ""), ("generate", "a", ""), ("generate", "b", "")]
QUESTIONS += [("recognize", "a", ""), ("recognize", "b", "wall"), ("recall", "a", "recall")]


class Cfg:
    split_by_mode = True
    split_by_correctness = True
    seed = 0


def gate(**cells: str) -> dict:
    """solve="dt": passes direct and thinking."""
    return {
        ability: {mode: {"accuracy": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "n": 9,
                         "passes": mode[0] in passes} for mode in sample.MODES}
        for ability, passes in cells.items()
    }  # fmt: skip


def questions(n_mazes: int = 12) -> tuple[list[dict], pd.DataFrame]:
    """Records and replies; every fourth reply is wrong, one is cut off."""
    records = [
        {"id": n, "maze_id": f"m{maze:02d}", "task": task, "template_id": f"{task}.{wording}",
         "negative_kind": kind, "enable_thinking": thinking}
        for n, (maze, thinking, (task, wording, kind)) in enumerate(
            (m, t, q) for m in range(n_mazes) for t in (False, True) for q in QUESTIONS)
    ]  # fmt: skip
    replies = pd.DataFrame({"id": range(len(records)), "reply": "(0,1)", "thought": None,
                            "correct": [n % 4 > 0 for n in range(len(records))],
                            "truncated": [n == 3 for n in range(len(records))]})  # fmt: skip
    return records, replies


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"recognize": "dt", "generate": "dt", "solve": "dt"},
         {"direct": ABILITIES, "thinking": ABILITIES}),
        ({"recognize": "d", "generate": "dt", "solve": "dt"},
         {"direct": ("generate", "solve"), "thinking": ("generate", "solve")}),
        ({"recognize": "dt", "generate": "d", "solve": "d"}, {"direct": ABILITIES}),
        ({"recognize": "dt", "generate": "d", "solve": "t"}, {"direct": ("recognize", "generate")}),
        ({"recognize": "d", "generate": "", "solve": "t"}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_only_abilities_above_chance_are_compared(cells, expected):
    assert sample.passing(gate(**cells)) == expected


def test_a_model_without_thinking_has_one_mode():
    cells = {a: {"direct": {"passes": True}} for a in ABILITIES}
    assert sample.passing(cells) == {"direct": ABILITIES}


def chosen(**more) -> tuple[pd.DataFrame, dict]:
    passes = {"direct": ABILITIES, "thinking": ABILITIES}
    return sample.choose(*questions(**more), passes, 0), passes


def test_replies_that_were_cut_off_are_left_out():
    frame, _ = chosen()
    assert 3 not in set(frame.id) and len(frame) == 12 * 14 - 1
    assert (frame.thought == "").all()
    records, replies = questions()
    replies["truncated"] = [r["task"] == "generate" and r["maze_id"] == "m05" for r in records]
    frame = sample.choose(records, replies, {"direct": ABILITIES}, 0)
    assert "m05" not in set(frame.maze_id), "the domains would be about other mazes"
    few = sample.choose(records, replies, {"direct": ABILITIES}, 30)
    assert few.maze_id.nunique() == 4 and len(few) == 28
    with pytest.raises(BadInput, match="2 mazes"):
        sample.choose(records, replies, {"direct": ABILITIES}, 14)


def test_contrasts_are_matched_by_maze_and_mode():
    frame, passes = chosen()
    held = {c.name: c for c in sample.contrasts(frame, passes, Cfg, 7, 3)}
    first = held["abilities"]
    for names in ("abilities", "abilities, same tokens", "abilities, maze block"):
        label = held[names].label
        assert all(frame.task[i] == ABILITIES[d] for i, d in enumerate(label) if d >= 0)
        assert set(frame.task[label < 0]) == {"recall"}
    for group in np.unique(first.group):
        at = frame[first.group == group]
        assert at.maze_id.nunique() == 1 and at["mode"].nunique() == 1
    half = held["abilities, first half"].label >= 0
    assert 0 < frame.maze_id[half].nunique() == 6
    assert not set(frame.maze_id[half]) & set(frame.maze_id[~half & (frame.task != "recall")])
    six = held["abilities x modes"]
    for d, name in enumerate(six.domains):
        at = frame[six.label == d]
        assert {f"{t}, {m}" for t, m in zip(at.task, at["mode"], strict=True)} == {name}
    for name in held:
        assert name.startswith(("abilities", "recall", "modes", "correctness"))


def test_modes_are_compared_where_both_replies_are_right():
    frame, passes = chosen(n_mazes=40)
    held = {c.name: c for c in sample.contrasts(frame, passes, Cfg, 7, 0)}
    modes = held["modes, solve"]
    inside = frame[modes.label >= 0]
    assert inside.correct.all() and set(inside.task) == {"solve"}
    pairs = inside.groupby(modes.group[modes.label >= 0])
    assert (pairs["mode"].nunique() == 2).all() and (pairs.size() == 2).all()
    assert (pairs.template_id.nunique() == 1).all()
    assert (np.where(inside["mode"] == "thinking", 1, 0) == modes.label[modes.label >= 0]).all()
    wrong = held["correctness, generate, direct"]
    inside = frame[wrong.label >= 0]
    assert ((wrong.label[wrong.label >= 0] == 1) == ~inside.correct.astype(bool)).all()
    few, _ = chosen()
    assert not [c for c in sample.contrasts(few, passes, Cfg, 7, 0) if c.name[0] in "mc"]


# Tables


def planted(n_neurons: int = 60, seed: int = 0) -> tuple[sample.Contrast, dape.Tally, pd.DataFrame]:
    """Neurons 0 and 1 of layer 0 are for domain 0, neuron 5 of layer 1 for domain 2; the rest are
    alike in all domains. 20 mazes, three questions of ten tokens each."""
    rng = np.random.default_rng(seed)
    group, label = np.repeat(np.arange(20), 3), np.tile([0, 1, 2], 20)
    p = np.broadcast_to(rng.uniform(0.25, 0.5, (2, n_neurons)), (60, 2, n_neurons)).copy()
    p[:, 0, :2] = np.where(label == 0, 0.95, 0.02)[:, None]
    p[:, 1, 5] = np.where(label == 2, 0.9, 0.05)
    active = torch.from_numpy(rng.binomial(10, p).astype(np.float32))
    drawn = dape.draws(label, group, group, "task", 999, 50)
    n = len(drawn.label)
    counts, tokens = torch.zeros(n, 3, 2, n_neurons), torch.zeros(n, 3)
    for draw in range(n):
        for domain in range(3):
            times = torch.from_numpy(drawn.times[draw] * (drawn.label[draw] == domain)).float()
            counts[draw, domain] = torch.tensordot(times, active, 1)
            tokens[draw, domain] = 10 * times.sum()
    contrast = sample.Contrast("abilities", ABILITIES, "task", label, group, 999, 50)
    frame = pd.DataFrame({"maze_id": group.astype(str)})
    return contrast, dape.Tally(counts, tokens), frame


@pytest.fixture(scope="module")
def found():
    contrast, tally, frame = planted()
    return table.find(contrast, tally, 1.0), frame


def test_planted_neurons_are_found_and_only_those(found):
    f, frame = found
    assert f.special.nonzero().tolist() == [[0, 0], [0, 1], [1, 5]]
    assert f.main[f.special].tolist() == [0, 0, 2]
    row = table.contrasts([f], frame).iloc[0]
    assert row.specialised == 3 and row.mazes == 20 and row.neurons == 120
    assert row.by_chance < 1 and row.kept_in_both_halves == 1.0
    listed = table.neurons([f], torch.zeros(2, 60))
    assert set(listed.main) == {"recognize", "solve"} and (listed.q < 0.05).all()
    assert listed.dape.is_monotonic_increasing and (listed.rate > listed.next_rate).all()
    p = f.rate[:, 1, 5].double().numpy()
    assert listed[listed.layer == 1].dape.iloc[0] == pytest.approx(stats.entropy(p), rel=1e-5)


def test_layers_count_every_specialised_neuron_once(found):
    f, _ = found
    by_layer = table.layers([f]).set_index(["domain", "layer"])
    assert by_layer["count"].sum() == 3
    assert by_layer.loc[("recognize", 0), "count"] == 2
    assert by_layer.loc[("recognize", 0), "percent"] == pytest.approx(100 * 2 / 60)
    assert (by_layer.low <= by_layer.percent).all() and (by_layer.percent <= by_layer.high).all()


def test_histograms_hold_every_neuron_above_the_minimum_rate(found):
    f, _ = found
    shown = table.distribution([f])
    own = shown[shown.domain != "shuffled labels"]
    above = int((f.rate >= table.RATE).any(0).sum())
    assert own.neurons.sum() == above
    assert shown[shown.domain == "shuffled labels"].neurons.sum() == above


def test_memberships_count_combinations(found):
    f, _ = found
    counted = table.memberships([f])
    assert counted.neurons.sum() == 3
    only = counted[counted.recognize & ~counted.solve & ~counted.generate]
    assert only.neurons.tolist() == [2]


def test_shuffled_labels_have_no_specialists():
    """The data are replaced by one of their own shuffles."""
    contrast, tally, _ = planted(seed=3)
    counts, tokens = tally.counts.clone(), tally.tokens.clone()
    counts[0], counts[7] = tally.counts[7], tally.counts[0]
    f = table.find(contrast, dape.Tally(counts, tokens), 1.0)
    assert int(f.special.sum()) == 0


def test_the_same_definition_agrees_with_itself(found):
    f, _ = found
    rows = table.sensitivity({"abilities": f}, {"product": f.rate}, 1.0)
    assert rows.rho.iloc[0] == pytest.approx(1) and rows.overlap.iloc[0] == 1


# The causal check


def logp(costs: dict[tuple[str, str], float], noise: float = 0.01) -> pd.DataFrame:
    """Log-probabilities without sets: `costs` of (set, task), nothing of anything else."""
    rng = np.random.default_rng(0)
    rows = []
    for maze in range(30):
        base = rng.normal(-1, 0.5)
        for n, task in enumerate(ABILITIES):
            about = {"id": 3 * maze + n, "maze_id": f"m{maze}", "task": task, "ablation": "mean"}
            rows.append(about | {"set": "none", "random": -1, "logp": base})
            for name in ABILITIES:
                for random in range(-1, 20):
                    cost = costs.get((name, task), 0.0) if random < 0 else 0.1
                    rows.append(about | {"set": name, "random": random,
                                         "logp": base - cost + rng.normal(0, noise)})  # fmt: skip
    return pd.DataFrame(rows)


def test_costs_are_over_those_of_random_sets():
    held = logp({("solve", "solve"): 0.6, ("solve", "recognize"): 0.1})
    at = finding.ablation(held).set_index(["set", "task"])
    own = at.loc[("solve", "solve")]
    assert own.excess == pytest.approx(0.5, abs=0.02) and own.random_drop == pytest.approx(
        0.1, abs=0.01
    )
    assert own["low"] < own.excess < own["high"] and own.p == pytest.approx(1 / 21)
    assert own.mazes == 30
    assert at.loc[("solve", "recognize")].excess == pytest.approx(0, abs=0.02)
    assert at.loc[("generate", "solve")].excess == pytest.approx(-0.1, abs=0.02)


def test_double_dissociation_needs_both_sides():
    both = {("solve", "solve"): 0.5, ("recognize", "recognize"): 0.4}
    at = finding.dissociation(logp(both)).set_index(["a", "b"])
    assert at.loc[("recognize", "solve")].double
    assert at.loc[("recognize", "solve")].own_a == pytest.approx(0.4, abs=0.02)
    assert at.loc[("recognize", "solve")].own_b == pytest.approx(0.5, abs=0.02)
    # Any damage that hurts the harder task most is no double dissociation.
    harm = {(name, "solve"): 0.5 for name in ABILITIES} | {("solve", "recognize"): 0.3}
    at = finding.dissociation(logp(harm)).set_index(["a", "b"])
    assert not at.double.any()


def test_sets_are_the_lowest_of_each_ability(found):
    f, _ = found
    chosen_sets = finding.selection(f, 1)
    assert chosen_sets.sum((1, 2)).tolist() == [1, 0, 1]
    lowest = f.entropies[0][0, :2].argmin()
    assert chosen_sets[0, 0, lowest] and chosen_sets[2, 1, 5]


def test_the_results_file_has_the_known_schema(found):
    f, frame = found
    held = finding.results("toy", [f], table.layers([f]), table.neurons([f], torch.zeros(2, 60)))
    assert {"model", "experiment", "abilities"} <= held.keys()
    own = held["abilities"]["recognize"]
    assert own["top_layers"] == own["key_layers"] == [0] and own["counts_per_layer"] == [2, 0]
    assert len(own["curve"]) == len(own["curve_low"]) == len(own["curve_high"]) == 2
    assert own["neurons"][0].keys() == {"layer", "neuron", "dape", "rate", "q"}
    assert held["abilities"]["generate"]["top_layers"] == []


def test_where_the_gate_fails_the_summary_says_so():
    said = finding.gated(gate(solve="d", recognize="", generate=""))
    assert "no two abilities" in said["verdict"]
    cell = said["accuracy, solve, direct (chance 0.10)"]
    assert (cell["value"], cell["low"], cell["high"], cell["n"]) == (0.5, 0.4, 0.6, 9)
