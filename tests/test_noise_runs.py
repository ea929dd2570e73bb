r"""Experiment 008 as a run: whole, in shards, and with a benchmark of worked problems."""

import json
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from noise_runs import RUN, SOURCE, SPEC, WORDS, bench, made_up, measure, plan, settings

from lens_utils import stats
from lens_utils.corpus import Doc
from lens_utils.errors import BadInput, Unfinished
from lens_utils.experiment import Results, Run, execute
from lens_utils.models import wrap


@pytest.fixture
def lab(saved, tmp_path, monkeypatch):
    """lab(*flags): run experiment 008 on a tiny model, with made-up scores; its Run."""
    folder = saved("qwen3")
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(Run, "upstream", lambda self, experiment, name: made_up())
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    monkeypatch.setattr(plan, "QUICK_SIGMAS", (0.5, 1.0))  # one at which arms are only swept
    monkeypatch.setattr(
        RUN.prompts, "load", lambda _, set=None: [p for p in WORDS if set in (None, p.set)]
    )
    docs = [Doc("x.py:0", "the cat sat on w3 w4 " * 8), Doc("x.py:1", "ran to it w5 w6 " * 10)]
    monkeypatch.setattr(measure.Session, "docs", property(lambda self: docs), raising=True)

    def run(*flags):
        args = ["--model", str(folder), "--device", "cpu", "--quick", "--sigma", "0.5"]
        args += map(str, flags)
        return execute(RUN.Config, RUN.main, SOURCE, args)

    return run


def read(run, name: str):
    return Results(run.folder).read(name)


def test_a_run_is_whole_and_the_weights_come_back(lab):
    run = lab()
    measured = read(run, "measured.parquet")
    passes = measured.groupby(["arm", "sigma", "draw"], sort=False)
    # Two things and two texts; five arms twice at one sigma, three once at the other.
    assert len(passes) == 2 + 5 * 2 + 3 and set(passes.size()) == {4}
    base = measured[measured.arm == "baseline"]
    first, last = (base[base.draw == n].reset_index(drop=True) for n in (0, 1))
    pd.testing.assert_series_equal(first.logp, last.logp)
    for _, some in measured[measured.arm != "baseline"].groupby(["arm", "sigma", "draw"]):
        assert (some.logp.to_numpy() != first.logp.to_numpy()).any()
    core = measured[(measured.arm == "synergistic") & (measured.sigma == 0.5)]
    assert core.groupby("item").logp.nunique().eq(2).all(), "every draw is noise of its own"
    summary = read(run, "summary.json")
    assert 15 <= len(summary) <= 30, "what the findings quote, no more"
    again = [v for label, v in summary.items() if "first and last pass" in label]
    assert again == [0] and summary["heads with noise"] == "3 of 12"
    assert read(run, "sigma.json")["sigma"] == 0.5
    heads = read(run, "heads.csv")
    assert Counter(heads.arm) == {arm: 3 if arm in plan.CORES else 6 for arm in plan.ARMS}
    assert heads[heads.arm == "synergistic"].in_synergistic.all()
    assert "solved.csv" not in Results(run.folder).manifest["stages"]


def test_a_score_table_of_another_model_is_refused(lab, monkeypatch):
    monkeypatch.setattr(Run, "upstream", lambda self, experiment, name: made_up(3, 5))
    with pytest.raises(BadInput, match="15 heads.*12"):
        lab()


def test_runs_that_say_nothing_are_refused(lab):
    with pytest.raises(BadInput, match="--per-family 0"):
        lab("--per-family", 0)
    with pytest.raises(BadInput, match="answers nothing right.*--sigma"):
        lab("--sigma", 0, "--tag", "pilot")


def test_shards_make_the_same_table(lab):
    whole = read(lab("--tag", "whole"), "measured.parquet")
    with pytest.raises(Unfinished):
        lab("--shard", "0/2")
    again = read(lab("--shard", "1/2"), "measured.parquet")
    pd.testing.assert_frame_equal(whole, again)


# A benchmark


SCHEMAS = [
    {"problem": "w1 w2", "level": "Level 2", "type": "Algebra", "solution": r"so \boxed{\frac24}"},
    {"problem": "w3", "solution": "x", "answer": "7", "subject": "Geometry", "level": 5,
     "unique_id": "test/geometry/1.json"},
    {"question": "w4 w5 w6", "answer": "1/4+1/4=<<1/4+1/4=0.5>>\n#### 0.5"},
    {"problem": "w7", "answer": "3", "id": "own"},
]  # fmt: skip


@pytest.fixture
def benchmark(tmp_path):
    """Four problems in the schemas of MATH, of MATH-500, of GSM8K and of one's own."""
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, SCHEMAS)))
    return path


def test_problems_of_every_schema_are_judged(lab, tmp_path, monkeypatch):
    """Every answer is a half without noise and in draw 1 of the noise, 13 in the others."""
    said, real = [], bench.perturb.noisy_heads

    def noisy(model, heads, sigma, seed, *more):
        said.append("1/2" if not heads or seed == 1 else "13")
        return real(model, heads, sigma, seed, *more)

    def write(model, rows, **more):
        text = rf"so \boxed{{{said[-1]}}}" + "\n\nProblem: w8\nSolution: \\boxed{1}"
        return [[SimpleNamespace(text=text)] for _ in rows]

    monkeypatch.setattr(bench.perturb, "noisy_heads", noisy)
    monkeypatch.setattr(bench.generate, "answers", write)
    path = tmp_path / "own.json"
    path.write_text(json.dumps(SCHEMAS))
    run = lab("--benchmark", path, "--batch", 3)
    solved = read(run, "solutions.parquet")
    assert solved.groupby("item", sort=False).gold.first().to_dict() == {
        "own-0": r"\frac24", "test/geometry/1.json": "7", "own-2": "0.5", "own": "3"
    }  # fmt: skip
    assert len(solved) == 4 * (1 + 5 * 2)
    half = (solved.sigma == 0) | (solved.draw == 1)
    assert (solved.right == (half & solved.item.isin(["own-0", "own-2"]))).all()
    assert solved[solved.arm == "random"].level.tolist() == [2, 5, pd.NA, pd.NA] * 2
    said = solved.groupby(["arm", "draw"]).logp.mean()  # the gold answer, under noise, too
    assert (said.drop("baseline") != said["baseline", 0]).all()
    assert said["synergistic", 0] != said["synergistic", 1]
    arms = read(run, "solved.csv").set_index(["arm", "family", "measure"])
    assert arms.loc[("baseline", "Algebra", "accuracy")].value == 1
    assert arms.loc[("redundant", "Algebra", "accuracy")].value == 0.5
    summary = read(run, "summary.json")
    assert summary["accuracy on the benchmark, baseline"]["value"] == 0.5
    assert summary["accuracy on the benchmark, synergistic"]["value"] == 0.25
    assert summary["log-probability on the benchmark, synergistic minus random"]["n"] == 4


def test_a_killed_benchmark_goes_on_where_it_was(lab, benchmark, monkeypatch):
    """Each problem of each condition is worked on once, a part of a batch at a time."""
    asked, killed, real = Counter(), [], bench.attempt

    def attempt(cfg, model, part, worked):
        if sum(asked.values()) >= 6 and not killed:
            killed.append(1)
            raise KeyboardInterrupt
        asked.update((c.arm, c.draw, p.id) for c, p in part)
        return real(cfg, model, part, worked)

    monkeypatch.setattr(bench, "attempt", attempt)
    benchmark.write_text("\n".join(map(json.dumps, SCHEMAS[1:3])))
    flags = ("--benchmark", benchmark, "--batch", 3, "--max-new-tokens", 4)
    with pytest.raises(KeyboardInterrupt):
        lab(*flags)
    assert sum(asked.values()) == 6
    run = lab(*flags)
    solved = read(run, "solutions.parquet")
    assert len(solved) == len(asked) == 2 * (1 + 5 * 2) and set(asked.values()) == {1}
    assert solved.tokens.between(1, 4).all() and not solved.right.any()
    monkeypatch.setattr(bench, "attempt", real)
    whole = lab(*flags, "--tag", "whole")
    pd.testing.assert_frame_equal(solved, read(whole, "solutions.parquet"))


def test_problems_that_changed_under_a_run_are_refused(lab, benchmark, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    flags = ("--benchmark", benchmark, "--max-new-tokens", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bench, "attempt", stop)
        lab(*flags)
    benchmark.write_text(benchmark.read_text().replace("w7", "w9"))
    with pytest.raises(BadInput, match="changed since this run began.*--fresh"):
        lab(*flags)


def test_a_solution_is_graded_by_its_last_box(tiny, make_tokenizer, monkeypatch):
    """A base model goes on with problems of its own; a chat model stops, and may say "Problem:"."""
    chat = wrap(tiny("llama"), make_tokenizer(chat=True), SPEC)
    base = wrap(tiny("llama"), make_tokenizer(), SPEC)
    texts = [r"so \boxed{1}, no \boxed{\frac{2}{4}}", r"\boxed{3}" + "\n\nProblem: x \\boxed{0.5}"]
    until = []

    def write(model, rows, **more):
        until.append(more["until"])
        return [[SimpleNamespace(text=t)] for t in texts]

    monkeypatch.setattr(bench.generate, "answers", write)
    asked = [bench.Problem(str(n), "w1", "1/2", "", "", None) for n in range(2)]
    work = [(plan.Condition("random", 0.5, 1, ((0, 1),)), problem) for problem in asked]
    for model, right, given in ((chat, [1, 1], "0.5"), (base, [1, 0], "3")):
        found = bench.attempt(settings(), model, work, WORDS[-1:])
        assert found.right.tolist() == right and found.judge.tolist() == ["number", "number"]
        assert found.given.tolist() == [r"\frac{2}{4}", given]
    assert until == ["", "\nProblem:"]
    assert chat.decode(bench.put(chat, asked[0], [])).count("w1") == 1
    text = base.decode(bench.put(base, asked[0], WORDS[-1:]))
    assert text.index("w3") < text.rindex("w1")


@pytest.mark.parametrize("chat", [True, False])
def test_the_gold_answer_is_said_right_behind_the_question(chat, tiny, make_tokenizer, monkeypatch):
    model = wrap(tiny("qwen3"), make_tokenizer(chat=chat), SPEC)
    asked = [bench.Problem(str(n), f"w{n}", f"w{n + 5}", "", "", None) for n in range(2)]
    silent = lambda model, rows, **more: [[] for _ in rows]  # noqa: E731
    monkeypatch.setattr(bench.generate, "answers", silent)
    work = [(plan.Condition("baseline", 0.0, 0, ()), problem) for problem in asked]
    found = bench.attempt(settings(), model, work, WORDS[-1:])
    for problem, logp in zip(asked, found.logp, strict=True):
        ids = bench.put(model, problem, WORDS[-1:])
        said = model.encode(f"The final answer is $\\boxed{{{problem.answer}}}$.", bos=False)
        with torch.no_grad():
            lp = model.bridge(torch.tensor([[*ids, *said]]))[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = lp.gather(1, torch.tensor(said)[:, None]).sum().item()
        assert logp == pytest.approx(expected, abs=1e-4)
        assert f"w{problem.answer}"[1:] in model.decode(said)


def test_a_base_model_needs_worked_problems(tiny, make_tokenizer):
    model = wrap(tiny("llama"), make_tokenizer(), SPEC)
    with pytest.raises(BadInput, match="no worked problems"):
        bench.put(model, bench.Problem("a", "w1", "1", "", "", None), [])
