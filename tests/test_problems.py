"""Benchmarks: three schemas of MATH and GSM8K become one, fetched once and then read offline."""

import json

import pytest

from lens_utils import __main__ as lab
from lens_utils import problems
from lens_utils.errors import BadInput, Failure
from lens_utils.problems import Problem, problem

HENDRYCKS = {"problem": "1+1?", "level": "Level 3", "type": "Algebra", "solution": r"\boxed{2}"}
MATH_500 = {"problem": "1+1?", "solution": "two", "answer": "2", "subject": "Algebra",
            "level": 3, "unique_id": "test/algebra/1.json"}  # fmt: skip
GSM8K = {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}


def test_the_schemas_say_the_same():
    one = Problem("x", "1+1?", "2", r"\boxed{2}", "Algebra", 3)
    assert problem(HENDRYCKS, "x") == one
    other = problem(MATH_500, "x")
    assert other == Problem("test/algebra/1.json", "1+1?", "2", "two", "Algebra", 3)
    assert problem(GSM8K, "x") == Problem("x", "1+1?", "2", GSM8K["answer"], "", None)
    assert problem(HENDRYCKS | {"level": "Level ?"}, "x").level is None
    assert problem(MATH_500 | {"answer": 0}, "x").answer == "0"


@pytest.mark.parametrize(
    "row",
    [{"problem": "1+1?", "solution": "no box"}, {"question": "1+1?", "answer": "2"}, {"x": "y"},
     {"question": "1+1?"}, {"problem": "", "answer": "2"}],
)  # fmt: skip
def test_a_row_without_an_answer_is_refused(row):
    with pytest.raises(BadInput, match="needs a problem, and an answer"):
        problem(row, "x")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with a few rows, and a cache of this test's own."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    asked = []

    def load_dataset(hub_id, config, split):
        asked.append((hub_id, config, split))
        if hub_id == "openai/gsm8k":
            raise ConnectionError(f"Couldn't reach '{hub_id}' on the Hub (OfflineModeIsEnabled)\n")
        return [HENDRYCKS | {"problem": config}, HENDRYCKS]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_fetched_once_and_read_from_then_on(hub):
    with pytest.raises(BadInput, match="./lab fetch math brings it"):
        problems.load("math")
    assert lab.fetch(["math"]) == 0
    assert [a[1] for a in hub] == list(problems.SOURCES["math"].configs)
    assert {a[::2] for a in hub} == {("EleutherAI/hendrycks_math", "test")}
    found = problems.load("math")
    assert len(found) == 14 and len(hub) == 7 and len({p.id for p in found}) == 14
    assert found[2].problem == "counting_and_probability" and found[1].answer == "2"


def test_without_a_connection_it_is_one_line(hub):
    with pytest.raises(Failure, match="did not give openai/gsm8k: Couldn't reach") as failed:
        lab.fetch(["gsm8k"])
    assert "\n" not in str(failed.value) and not problems.kept("gsm8k").exists()


def test_own_files(tmp_path):
    lines = tmp_path / "own.jsonl"
    lines.write_text(json.dumps(HENDRYCKS) + "\n\n" + json.dumps(GSM8K) + "\n")
    assert [p.id for p in problems.load(str(lines))] == ["own-0", "own-1"]
    whole = tmp_path / "own.json"
    whole.write_text(json.dumps([MATH_500]))
    assert problems.load(str(whole))[0].answer == "2"


@pytest.mark.parametrize(("name", "text"), [("x.json", "{"), ("x.jsonl", "3\n"), ("x.json", "[1]")])
def test_files_that_hold_no_problems(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match="no list of problems"):
        problems.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("rows", "says"), [([], "holds no problems"), ([MATH_500, MATH_500], "2 problems have the id")]
)
def test_problems_that_cannot_be_told_apart_or_are_not_there(rows, says, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(BadInput, match=says):
        problems.load(str(tmp_path / "x.json"))


@pytest.mark.parametrize("name", ["math501", "nowhere.jsonl", "README.md"])
def test_unknown_benchmarks(name):
    with pytest.raises(BadInput, match="no benchmark .*math-500"):
        problems.load(name)
