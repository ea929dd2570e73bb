"""The generated blocks: drawn from committed numbers, around hand-written text."""

from pathlib import Path

import pytest
import toys
from toys import code_and_line

import lens_utils.provenance as provenance
from lens_utils import files, report
from lens_utils.errors import BadInput
from lens_utils.experiment import Run

PAGE = """# 999 · Toy

**A finding | over
two lines.** By hand.

## Results

<!-- generated: results -->
<!-- end -->

![bars](figures/smol--bars.png) and ![other](figures/org--name--bars.png), by hand.
"""
README = "before\n<!-- generated: experiments -->\nold\n<!-- end -->\nafter\n"
ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A repository of one experiment, and run(summary, *args) to finish a run of it."""
    toy = toys.experiment(tmp_path, monkeypatch)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    page = tmp_path / "999_toy" / "analyses.md"
    page.write_text(PAGE)
    (tmp_path / "README.md").write_text(README)

    def run(summary: dict, *args: str) -> Run:
        done = toy(lambda cfg, run: run.stage("summary.json", lambda: summary), *args)
        files.write_bytes(done.folder / "figures" / "bars.png", f"PNG of {done.cfg.model}".encode())
        return done

    return page.parent, run


def write(experiment: Path) -> list[str]:
    return report.write_all([experiment], [experiment])


def rows(experiment: Path) -> list[list[str]]:
    lines = report.block(experiment).splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_the_block_is_written_between_its_markers(lab):
    experiment, run = lab
    run({"p(answer)": ESTIMATE, "n": 3})
    done = write(experiment)
    assert sorted(done) == ["999_toy/analyses.md", "999_toy/figures/smol--bars.png",
                            "999_toy/results/smol.json", "README.md"]  # fmt: skip
    text = (experiment / "analyses.md").read_text()
    head, tail = PAGE.split("<!-- end -->")
    assert text.startswith(head) and text.endswith(f"<!-- end -->{tail}")
    assert f"\n{report.block(experiment)}\n<!-- end -->" in text
    assert rows(experiment)[2:] == [["p(answer)", "0.5 [0.25, 0.75] (n 12)"], ["n", "3"]]
    readme = (experiment.parent / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert "| A finding &#124; over two lines. |" in readme


def test_again_changes_nothing(lab):
    """Also with NaN, which does not equal itself, and after the same run from another commit."""
    experiment, run = lab
    summary = {"x": float("nan"), "y": {"value": float("nan"), "low": 0, "high": 1, "n": 1}}
    run(summary)
    write(experiment)
    before = {p: p.read_bytes() for p in experiment.parent.rglob("*") if p.is_file()}
    assert write(experiment) == []
    assert {p: p.read_bytes() for p in before} == before
    run(summary, "--fresh")
    assert write(experiment) == []
    run({"x": 1}, "--fresh")
    assert "999_toy/results/smol.json" in write(experiment)


def test_columns_full_runs_first_then_quick_ones(lab):
    experiment, run = lab
    for args in (["--quick"], [], ["--model", "b"], ["--model", "b", "--quick"],
                 ["--tag", "x"], ["--model", "org/name"]):  # fmt: skip
        run({"args": " ".join(args)}, *args)
    write(experiment)
    head, _, row = rows(experiment)
    assert head == ["", "smol", "b", "org--name", "smol (quick)", "b (quick)"]
    assert row[1:4] == ["", "--model b", "--model org/name"]
    shown = {p.name: p.read_text() for p in (experiment / "figures").iterdir()}
    assert shown == {
        "smol--bars.png": "PNG of smol",
        "org--name--bars.png": "PNG of org/name",
    }


def test_numbers_one_run_has_and_another_lacks(lab):
    experiment, run = lab
    run({"a": 1})
    run({"b|c": 2.0}, "--model", "x")
    write(experiment)
    assert rows(experiment)[2:] == [["a", "1", ""], ["b&#124;c", "", "2"]]


def test_unfinished_and_tagged_runs_are_left_out(lab, tmp_path, monkeypatch):
    experiment, run = lab
    run({"a": 1}, "--tag", "x")
    assert write(experiment) == ["999_toy/analyses.md", "README.md"]
    assert "No finished run yet." in (experiment / "analyses.md").read_text()


def test_a_page_without_analyses_is_no_error(lab):
    experiment, run = lab
    run({"a": 1})
    (experiment / "analyses.md").unlink()
    assert "999_toy/results/smol.json" in write(experiment)


@pytest.mark.parametrize("lost", ["<!-- generated: results -->", "<!-- end -->"])
def test_lost_markers_are_one_line(lab, lost, capsys):
    experiment, run = lab
    run({"a": 1})
    page = experiment / "analyses.md"
    page.write_text(PAGE.replace(lost, ""))
    code, line = code_and_line(lambda: write(experiment), capsys)
    assert code == 2 and "analyses.md lost its markers" in line and lost in line
    assert page.read_text() == PAGE.replace(lost, "")


def test_damaged_numbers_are_not_taken_over(lab):
    experiment, run = lab
    done = run({"a": 1})
    (done.folder / "summary.json").write_text('{"a": 2}')
    with pytest.raises(BadInput, match="damaged"):
        write(experiment)


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("nan"), "none"), ({"value": 0, "low": 0, "high": 0, "n": 0}, "none (n 0)"),
     ({"value": float("nan"), "low": 0.0, "high": 1.0, "n": 1}, "none [0, 1] (n 1)"),
     (0, "0"), (-0.0, "0"), (12345, "12,345"), (0.12345, "0.123"), (1.5e-5, "1.5e-05"),
     (99.96, "100"), (1234.5, "1,234"), (float("inf"), "inf"), (True, "True"), ("", ""),
     ("a|b\nc", "a&#124;b c"), (-0.25, "-0.25")],
)  # fmt: skip
def test_numbers_as_a_reader_wants_them(value, text):
    assert report.shown(value) == text


def test_status_and_index_of_what_there_is(lab):
    experiment, run = lab
    assert report.status([experiment]) == "- 999_toy: no finished run"
    run({"a": 1})
    write(experiment)
    assert report.status([experiment]) == "- 999_toy: smol"
    assert "(experiments/999_toy/analyses.md)" in report.index([experiment])
