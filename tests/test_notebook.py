"""When a run's figures are drawn, and what a user hears of it."""

import json
from pathlib import Path

import papermill
import pytest
import toys
from papermill.exceptions import PapermillExecutionError
from toys import code_and_line

import lens_utils.notebook as notebook  # the module itself, not what stands for it till it is used
import lens_utils.provenance as provenance
from lens_utils import files
from lens_utils.experiment import Results


@pytest.fixture
def results(tmp_path, monkeypatch) -> Results:
    """A finished run of an experiment with a notebook of one cell."""
    toy = toys.experiment(tmp_path, monkeypatch)
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(provenance, "NOTEBOOKS", folder)
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [],
            "execution_count": None, "source": "run_dir = None"}  # fmt: skip
    broken = cell | {"id": "b", "metadata": {}, "source": "1 / 0"}
    page = {"cells": [cell, broken], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    files.write_bytes(folder / "999_toy.ipynb", json.dumps(page).encode())
    return Results(toy(lambda cfg, run: run.stage("summary.json", lambda: cfg.tau)).folder)


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The notebooks that were executed, in place of executing them; each draws one page."""
    times = []

    def execute(source: str, target: str, **_: object) -> None:
        times.append(Path(source).name)
        files.write_bytes(Path(target).with_name("figures") / "a.html", b"")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(notebook, "browser", lambda: False)
    return times


def test_a_failing_cell_is_one_line(results, capsys):
    code, line = code_and_line(lambda: notebook.draw(results), capsys)
    assert code == 1 and "999_toy.ipynb, cell " in line and "ZeroDivisionError" in line
    assert (results.folder / "figures.ipynb").exists()
    assert not (results.folder / "figures" / "drawn.json").exists()


def test_figures_are_drawn_when_they_show_something_else(results, drawn, monkeypatch, tmp_path):
    """Another run to compare with, another notebook, or a browser that was installed since."""
    said = notebook.draw(results)
    assert said == f"1 figures drawn; {notebook.HINT}"
    assert notebook.draw(results) == "figures are up to date" and len(drawn) == 1

    monkeypatch.setattr(notebook, "browser", lambda: True)
    (results.folder / "figures" / "a.png").touch()
    assert notebook.draw(results) == "1 figures drawn"

    def main(cfg: toys.Config, run: toys.Run) -> None:
        run.stage("summary.json", lambda: 2)

    toys.execute(toys.Config, main, tmp_path / "999_toy" / "run.py", ["--model", "b"])
    assert notebook.draw(results) == "1 figures drawn"

    source = tmp_path / "notebooks" / "999_toy.ipynb"
    source.write_text(source.read_text() + "\n")
    assert notebook.draw(results) == "1 figures drawn"
    assert notebook.draw(results) == "figures are up to date" and len(drawn) == 4


def test_a_run_without_notebook(results):
    (provenance.NOTEBOOKS / "999_toy.ipynb").unlink()
    assert notebook.draw(results) == "has no notebook"


def test_a_stop_while_drawing_is_a_stop(results, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise PapermillExecutionError(1, 1, "", "KeyboardInterrupt", "", [])

    monkeypatch.setattr(papermill, "execute_notebook", stopped)
    with pytest.raises(KeyboardInterrupt):
        notebook.draw(results)
