"""The tutorial notebook: clean, and executed once with small settings."""

import ast
import json
import re

from lens_utils import provenance

NOTEBOOK = provenance.NOTEBOOKS / "from_prompt_to_circuit.ipynb"
SMALL = {"tokens": 15_000, "passes": 10, "n_features": 256, "held_out_tokens": 500}


def cells() -> list[dict]:
    held = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in held]


def test_the_tutorial_is_clean_and_portable():
    """No outputs, one cell of parameters, prose before every step, no device of its own."""
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert not [c for c in code if c["outputs"] or c["execution_count"] is not None]
    assert sum("parameters" in c["metadata"].get("tags", ()) for c in code) == 1
    kinds = [cell["cell_type"] for cell in cells()]
    steps = [i for i, cell in enumerate(cells()) if re.match(r"## \d\. ", cell["source"])]
    assert len(steps) == 6 and all(kinds[i + 1] == "code" for i in steps)
    for cell in code:
        assert "cuda" not in cell["source"] and "/home/" not in cell["source"]
        ast.parse(cell["source"])


def test_the_tutorial_runs(tmp_path, capsys):
    """With few tokens: sums are exact, transcoders beat nothing, interventions are as predicted."""
    page = tmp_path / "circuit.html"
    space: dict = {"display": lambda *_: None}
    for number, cell in enumerate(cells()):
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], f"tutorial, cell {number}", "exec"), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            space |= SMALL | {"page_file": str(page)}
    said = capsys.readouterr().out
    by_transcoders, by_nothing = re.findall(r"([+-][\d.]+) nats", said)
    assert 0 < float(by_transcoders) < 0.5 * float(by_nothing)
    assert float(re.search(r"its sum: (\S+)", said)[1]) < 1e-3
    assert len(space["kept"]) > 20 and space["table"]
    held, responding = space["fig"].data
    assert responding.name.startswith("norms respond") and space["found"].r > 0.6
    assert "<svg" not in page.read_text() and "From prompt to circuit" in page.read_text()
