"""Every experiment: its quick run on the embedded model, its notebook and its figures."""

import json
import math
import os

import pytest

from lens_utils import files, notebook, provenance, viz
from lens_utils.__main__ import experiments

NAMES = [experiment.name for experiment in experiments()]


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_is_finished_and_says_where_it_comes_from(quick_run, name):
    results = quick_run(name)
    assert results.finished
    assert results.variant == f"{results.manifest['settings']['model']}-quick"
    summary = results.read("summary.json")
    assert summary, "the few numbers that the findings show"
    for label, value in summary.items():
        if isinstance(value, dict):
            assert value.keys() == {"value", "low", "high", "n"}, label
            assert value["n"] == 0 or value["low"] <= value["value"] <= value["high"], label
        else:
            assert isinstance(value, str | int | float), label
            assert not (isinstance(value, float) and math.isinf(value)), label
    manifest = results.manifest
    assert manifest["experiment"] == name and manifest["settings"]["quick"] is True
    for stage, record in manifest["stages"].items():
        path = results.folder / stage
        assert (files.sha256(path), path.stat().st_size) == (record["sha256"], record["bytes"])
    prompts = provenance.EXPERIMENTS / name / "prompts.json"
    assert manifest["settings"]["prompts.json"] == files.sha256(prompts)[:12]
    for model in manifest["models"].values():
        assert {"source", "revision", "sha256", "dtype", "device", "bos", "weights"} <= model.keys()
    if token := os.environ.get("HF_TOKEN"):
        assert token not in json.dumps(manifest)


# From the last one: two processes that begin at both ends do not wait for each other's runs.
@pytest.mark.parametrize("name", NAMES[::-1])
def test_the_notebook_draws_every_figure(quick_run, name, monkeypatch):
    """Its cells, run in this process and without images: a kernel and a browser for each notebook
    would cost ten times as much."""
    results, pictures = quick_run(name), []

    def draw(file, **_):  # a browser for every notebook would take minutes
        pictures.extend(file)
        for path in file:
            path.touch()

    monkeypatch.setattr(viz.pio, "write_images", draw)
    source = (provenance.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    space: dict[str, object] = {"display": lambda *_: None}  # as a kernel has it
    for number, cell in enumerate(json.loads(source)["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            space["run_dir"] = str(results.folder)
    pages = sorted((results.folder / "figures").glob("*.html"))
    assert pages and sorted(pictures) == [page.with_suffix(".png") for page in pages]
    for page in pages:
        assert "../../../plotly.min.js" in page.read_text(), "shared, not copied into each page"
    assert (results.folder.parent.parent / "plotly.min.js").exists()


def test_figures_are_drawn_as_a_user_draws_them(quick_run):
    """The whole way, for one experiment: papermill, a kernel, HTML, and PNG where there is a
    browser; CI has one."""
    results = quick_run("001_layers_and_logits")
    said = notebook.draw(results)
    pages = sorted((results.folder / "figures").glob("*.html"))
    assert pages and f"{len(pages)} figures drawn" in said
    executed = json.loads((results.folder / "figures.ipynb").read_text())
    assert all(c.get("execution_count") for c in executed["cells"] if c["cell_type"] == "code")
    assert notebook.draw(results) == "figures are up to date"
    if not notebook.browser():
        assert os.environ.get("CI") != "true", "CI needs Chrome or Chromium"
        assert notebook.HINT in said
        pytest.skip("no Chrome or Chromium here: PNG export not tested")
    for page in pages:
        assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG"), page.stem
