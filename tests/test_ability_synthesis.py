"""Experiment 016 on made-up results of 010 to 015: what is planted is found, and only that."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lens_utils import provenance
from lens_utils.__main__ import load
from lens_utils.errors import BadInput
from lens_utils.experiment import Results, Run, execute

SOURCE = provenance.EXPERIMENTS / "016_ability_synthesis" / "run.py"
RUN = load(SOURCE.parent)
ABILITIES = ("recognize", "generate", "solve")
LAYERS, MAZES = 12, 20
EARLY_TO_LATE = {"recognize": 2, "generate": 5, "solve": 9}
NAMES = ("qwen3_dape_results.json", "ablation_results.json", "probe_results.json")


def bump(at: int, null: float = 0.0) -> list[float]:
    return (null + np.exp(-0.5 * (np.arange(LAYERS) - at) ** 2)).round(6).tolist()


def results(places: dict[str, int], null: float) -> dict:
    """A method's file: a bump at a layer for each ability, and lists of the layers around it."""
    abilities = {}
    for ability, at in places.items():
        curve = bump(at, null)
        top = np.argsort(-np.array(curve), kind="stable").tolist()
        wide = [0.02] * LAYERS
        abilities[ability] = {
            "curve": curve, "top_layers": top, "key_layers": top[:5], "critical_layers": top[:6],
            "curve_low": np.subtract(curve, wide).tolist(),
            "curve_high": np.add(curve, wide).tolist(),
            "ablation_by_layer": {f"layer_{at}": {"ratio_0.5": {"performance_drop": 0.3},
                                                  "ratio_1": {"performance_drop": 0.9}}},
        }  # fmt: skip
    return {"model": "x", "experiment": "x", "abilities": abilities}


def gate(*passing: str) -> dict:
    cell = {"accuracy": 0.9, "low": 0.8, "high": 1.0, "chance": 0.5, "n": 80}
    return {
        a: {m: cell | {"passes": a in passing} for m in ("direct", "thinking")} for a in ABILITIES
    }


def study(places: dict[str, dict[str, int]], passing: tuple[str, ...] = ABILITIES) -> dict:
    """Upstream tables. Direct answers are right in half of the mazes; thinking ones to solve
    always, to generate never, to recognize as often."""
    rng = np.random.default_rng(0)
    records, replies = [], []
    for maze in range(MAZES):
        for ability in ABILITIES:
            for thinking in (False, True):
                half = (maze + (ability == "recognize") * thinking) % 2 == 0
                right = {"solve": True, "generate": False}.get(ability, half) if thinking else half
                records.append({
                    "id": len(records), "maze_id": f"m{maze}", "task": ability,
                    "enable_thinking": thinking, "requires_recognize": True,
                    "requires_generate": ability != "recognize",
                    "requires_solve": ability == "solve",
                })  # fmt: skip
                replies.append({"id": len(replies), "correct": right, "truncated": False,
                                "n_tokens": int(rng.integers(3, 9))})  # fmt: skip
    # Traces: without one, solve is never right; another maze's is followed by solve alone.
    answers = [
        {"task": a, "maze_id": f"m{m}", "condition": c, "right": c == "own trace" or a != "solve",
         "follows": c != "empty" and a == "solve"}
        for a in ABILITIES for m in range(MAZES)
        for c in ("own trace", "empty", "other maze's trace")
    ]  # fmt: skip
    pairs = [
        {"lower": low, "upper": up, "choice": choice, "mode": "direct", "n": 9,
         "own_lower_low": 0.1, "own_lower_high": 0.4, "own_upper_low": lo, "own_upper_high": 0.5,
         "asymmetry": 0.3, "asymmetry_low": 0.1, "asymmetry_high": 0.5, "cross_p": 0.01,
         "double_dissociation": lo > 0, "hierarchy": lo > 0}
        for choice in ("needed", "own")
        for low, up, lo in (("recognize", "generate", 0.2), ("recognize", "solve", -0.2),
                            ("generate", "solve", 0.2))
    ]  # fmt: skip
    neurons = [{"ablation": "mean", "a": a, "b": b, "low_a": 0.1, "high_a": 0.2, "low_b": -0.3,
                "high_b": -0.1} for a, b in (("recognize", "generate"),)]  # fmt: skip
    files = {
        name: results({a: at for a, at in places[method].items() if a in passing}, null)
        for name, method, null in zip(NAMES, places, (0.0, 0.0, 0.5), strict=True)
    }
    said = {"n": 3, "x": {"value": 1.0, "low": 0.5, "high": 1.5, "n": 4}, "words": "none"}
    return files | {
        "gate.json": gate(*passing), "summary.json": said, "records.json": records,
        "replies.csv": pd.DataFrame(replies), "answers.csv": pd.DataFrame(answers),
        "pairs.csv": pd.DataFrame(pairs), "dissociation.csv": pd.DataFrame(neurons),
        "contrasts.csv": pd.DataFrame(
            {"contrast": ["abilities", "modes, solve"], "specialised_percent": [7.0, 30.0],
             "places": ["thinking - answer"] * 2, "weights": ["trained"] * 2, "confirmed": [4, 5]}
        ),
        "concepts.csv": pd.DataFrame(
            {"concept": ["wall", "turn", "dead_end", "junction"],
             "trivial": [True, False, False, False], "auroc": [1.0, 0.8, 0.6, 0.8],
             "low": [1.0, 0.75, 0.55, 0.65], "high": [1.0, 0.85, 0.65, 0.9], "n": [9] * 4,
             "untrained": [1.0, 0.6, 0.5, 0.7], "bag": [1.0, 0.7, 0.7, 0.5]}
        ),
        "edges.csv": pd.DataFrame({"kept": [True, False, True]}),
        "behaviour.csv": pd.DataFrame(
            {"concept": ["turn", "junction"], "task": ["solve"] * 2, "excess_value": [0.2] * 2,
             "excess_low": [0.1] * 2, "excess_high": [0.5] * 2, "n": [9] * 2, "p": [0.3, 0.05],
             "sets": [20] * 2}
        ),
        "transfer.csv": pd.DataFrame(
            {"trained": ["recognize+generate"] * 2, "tested": ["solve"] * 2,
             "accuracy": [0.7, 0.55]}
        ),
    }  # fmt: skip


METHODS = ("neurons", "ablation", "probes")
AGREED = {method: dict(EARLY_TO_LATE) for method in METHODS}
APART = {m: {a: (at + 4 * n) % LAYERS for a, at in EARLY_TO_LATE.items()}
         for n, m in enumerate(METHODS)}  # fmt: skip


def run_on(tables: dict, folder: Path) -> Results:
    """016 on these upstream tables."""

    def upstream(self, experiment, name, model=""):
        if name not in tables:
            raise BadInput(f"{experiment} has no {name}")
        return tables[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_OUTPUTS", str(folder))
        patch.setattr(Run, "upstream", upstream)
        return Results(execute(RUN.Config, RUN.main, SOURCE, ["--quick", "--fresh"]).folder)


@pytest.fixture(scope="module")
def agreed(tmp_path_factory) -> Results:
    """The run on methods that agree."""
    return run_on(study(AGREED), tmp_path_factory.mktemp("agreed"))


@pytest.fixture
def lab(tmp_path):
    """lab(upstream tables): the Results of 016 on them."""
    return lambda tables: run_on(tables, tmp_path)


def verdicts(found: Results) -> dict[str, str]:
    table = found.read("findings.csv")
    return dict(zip(table.claim, table.verdict, strict=True))


def test_what_is_planted_is_supported(agreed):
    found = agreed
    said = verdicts(found)
    for ability in ABILITIES:
        assert said[f"The methods agree on how much each layer has to do with {ability}"] == (
            "supported"
        )
        assert said[f"The methods list the same best layers for {ability}"] == "supported"
    assert said["Generate lies deeper than recognize"] == "supported"
    assert said["The abilities follow each other in depth: recognize, generate, solve"] == (
        "supported"
    )
    report = found.read("SYNTHESIS_REPORT.md")
    assert "- **Solve lies deeper than generate: supported** (" in report
    assert found.read("SYNTHESIS_REPORT.txt").splitlines()[1].startswith("=====")
    depths = found.read("depths.csv").set_index(["ability", "method"]).value
    assert depths["recognize", "neurons"] < depths["generate", "neurons"]
    # The probes' chance of one half is taken away: their curve is the same bump.
    assert depths["solve", "probes"] == pytest.approx(depths["solve", "ablation"])


def test_what_is_not_there_is_not_supported(lab):
    said = verdicts(lab(study(APART)))
    for ability in ABILITIES:
        assert said[f"The methods agree on how much each layer has to do with {ability}"] == (
            "not supported"
        )
        assert said[f"The methods list the same best layers for {ability}"] == "not supported"


def test_the_reverse_is_contradicted(lab):
    backwards = dict(zip(ABILITIES, (9, 5, 2), strict=True))
    said = verdicts(lab(study({method: backwards for method in METHODS})))
    assert said["Solve lies deeper than generate"] == "contradicted"
    assert said["The abilities follow each other in depth: recognize, generate, solve"] == (
        "contradicted"
    )


def test_methods_that_contradict_each_other_support_nothing(lab):
    mixed = {m: dict(EARLY_TO_LATE) for m in METHODS[:2]}
    mixed["probes"] = dict(zip(ABILITIES, (11, 5, 9), strict=True))
    found = lab(study(mixed))
    assert verdicts(found)["Generate lies deeper than recognize"] == "not supported"
    assert verdicts(found)["Solve lies deeper than generate"] == "supported"
    gaps = found.read("gaps.csv").set_index(["deep", "methods"]).value
    assert gaps["generate", "neurons"] > 0 > gaps["generate", "probes"]


def test_thinking_and_traces(agreed):
    said = verdicts(agreed)
    assert said["Thinking makes solve more often right"] == "supported"
    assert said["Thinking makes generate more often right"] == "contradicted"
    assert said["Thinking makes recognize more often right"] == "not supported"
    assert said["Without its trace solve is less often right"] == "supported"
    assert said["Without its trace generate is less often right"] == "not supported"
    assert said["Most answers to solve follow the trace of another maze"] == "supported"
    assert said["Most answers to generate follow the trace of another maze"] == "contradicted"


def test_dependence_and_dissociation(agreed):
    said = verdicts(agreed)
    assert said["Generate needs the heads that recognize needs, and not the reverse"] == "supported"
    assert said["Solve needs the heads that recognize needs, and not the reverse"] == (
        "not supported"
    )
    assert said["Recognize and generate rest on heads of their own"] == "supported"
    assert said["Recognize and solve rest on heads of their own"] == "not supported"
    assert said["Recognize and generate rest on neurons of their own"] == "contradicted"
    assert said["Generate and solve rest on neurons of their own"] == "not testable"


def test_concepts(agreed):
    said = verdicts(agreed)
    assert said["Turn can be read beyond an untrained model and a bag of tokens"] == "supported"
    assert said["Dead end can be read beyond an untrained model and a bag of tokens"] == (
        "contradicted"
    )
    assert said["Junction can be read beyond an untrained model and a bag of tokens"] == (
        "not supported"
    )
    needed = "Answers to solve need the neurons of {} more than random ones"
    assert said[needed.format("junction")] == "supported"
    assert said[needed.format("turn")] == "not supported", "random sets cost as much"
    assert said[needed.format("dead end")] == "not testable"
    checks = agreed.read("checkpoints.csv").set_index("checkpoint")
    assert checks.value["5 concepts read beyond their baselines"] == 1
    assert checks.value["5 causal edges between concepts' neurons"] == 2


def test_nothing_is_claimed_of_an_ability_at_chance(lab):
    found = lab(study(AGREED, passing=("recognize", "solve")))
    table = found.read("findings.csv")
    about = table[table.claim.str.contains("generate", case=False)]
    assert set(about.verdict) == {"not testable"}
    assert about.because.str.contains("not above chance").sum() >= len(about) - 1
    assert verdicts(found)["The methods list the same best layers for solve"] == "supported"
    checks = found.read("checkpoints.csv").set_index("checkpoint").status
    assert checks["3 critical layers, generate"] == "NOT TESTABLE"


def test_where_every_ability_is_at_chance_the_run_says_so_and_ends(lab):
    found = lab(study(AGREED, passing=()))
    assert found.finished and "nothing to bring together" in found.read("summary.json")["verdict"]
    assert list(found.manifest["stages"]) == ["gate.csv", "summary.json"]


def test_an_experiment_that_stopped_early_is_not_testable_and_one_not_run_is_refused(lab):
    tables = study(AGREED)
    early = {k: v for k, v in tables.items() if k not in (*NAMES[1:], "pairs.csv", "answers.csv")}
    said = verdicts(lab(early))
    assert said["The methods list the same best layers for solve"] == "not testable"
    assert said["Without its trace solve is less often right"] == "not testable"
    with pytest.raises(BadInput, match="has no summary.json"):
        lab({k: v for k, v in tables.items() if k != "summary.json"})


def test_checkpoints_have_the_studys_bands(agreed):
    checks = agreed.read("checkpoints.csv").set_index("checkpoint")
    assert checks.status["2 specialised neurons"] == "PASS"
    assert checks.status["2 neurons that tell the modes apart"] == "OUT OF BAND"
    assert checks.value["3 largest drop at half of a layer, solve"] == pytest.approx(30)
    assert checks.status["3 critical layers, solve"] == "PASS"
    assert checks.value["4 best probe, solve"] == pytest.approx(150)
    assert checks.value["4 transfer, recognize and generate to solve"] == pytest.approx(70)
    assert checks.status["1 questions"] == "OUT OF BAND"
    assert checks.value["6 layers that all methods list, solve"] == 5
    summary = agreed.read("summary.json")
    assert 15 <= len(summary) <= 30
    assert summary["checkpoints PASS"] == int((checks.status == "PASS").sum())


def test_the_results_file_has_the_studys_schema(agreed):
    held = agreed.read("synthesis_results.json")
    assert json.dumps(held, allow_nan=False)
    assert held.keys() >= {"model", "experiment", "abilities"}
    for ability, at in EARLY_TO_LATE.items():
        entry = held["abilities"][ability]
        assert entry["top_layers"][0] == at and entry["key_layers"] == entry["top_layers"][:5]
        assert sum(entry["curve"]) == pytest.approx(1)
        assert set(entry["convergent_layers"]) == set(range(at - 2, at + 3))
