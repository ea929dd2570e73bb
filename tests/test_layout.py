"""The layout, held by tests: who imports whom, what lies where, how large it may be."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_utils import provenance, report
from lens_utils.__main__ import experiments, reads

ROOT = provenance.ROOT
LIBRARY = {path.stem: path for path in sorted((ROOT / "lens_utils").glob("*.py"))}
EXPERIMENTS = experiments()
NOTEBOOKS = sorted(provenance.NOTEBOOKS.glob("[0-9]*.ipynb"))  # the tutorial: test_tutorial
LAYERS = (
    # 0: arrays, text and files. No model, no run.
    {"errors", "files", "provenance", "registry", "stats", "corpus", "corpora", "token_files",
     "answers", "problems",
     "profiles", "phiid", "phiid_lattice", "phiid_gaussian", "phiid_ccs", "phiid_discrete",
     "fused", "graphs", "mazes", "maze_shapes", "maze_text", "maze_tasks", "maze_traces",
     "maze_records",
     "attribution_graph", "frozen", "graph_files", "probes", "probe_scores", "synthesis",
     "feature_facts", "feature_labels", "feature_stats", "feature_spans", "feature_scores",
     "feature_store", "feature_page", "reasoning_text",
     "sparse", "sparse_training", "sparse_files", "motifs", "motif_nulls",
     "graph_page"},
    # 1: what touches a model.
    {"weights", "checkpoints", "tokens", "models", "prompts", "pairs", "cache", "lens",
     "attention", "attribution", "head_reading", "patching", "sweeps", "gradients", "edges",
     "circuits", "generate", "maze_prompts", "series", "divergence", "perturb", "layer_ablation",
     "concepts", "probe_readings", "dape", "neuron_sets", "traces",
     "kv_units", "kv_masks", "kv_scores", "kv_learn", "replacement", "interventions",
     "feature_judges",
     "sparse_tuning", "norm_response", "graph_gate", "faithfulness",
     "text_rows", "mlp_stream"},
    # 2: the run, and what is made of it.
    {"feature_endpoint",
     "console", "settings", "results", "experiment", "viz", "notebook", "report", "cluster",
     "skeleton", "tracking", "transcoder_sets", "kv_runs", "kv_figures", "kv_pages",
     "kv_variants", "kv_variant_text", "kv_variant_figures", "__main__"},
)  # fmt: skip
FOR_NOTEBOOKS = {"experiment", "viz"}
SHAPES = {"Float", "Int", "Bool", "Shaped", "Num", "Real", "Integer", "Inexact", "UInt", "Complex"}


def named(paths: list[Path]) -> dict:
    """Arguments for parametrize, shown by file name."""
    return {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(code: ast.AST) -> set[str]:
    """Modules imported anywhere in the code; `from lens_utils import a` is lens_utils.a."""
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or ".")
            if node.module == "lens_utils":
                found |= {f"lens_utils.{alias.name}" for alias in node.names}
    return found


def of_library(code: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imported(code) if name.startswith("lens_utils.")}


def cells(notebook: Path, kind: str = "code") -> list[dict]:
    held = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        cell | {"source": "".join(cell["source"])} for cell in held if cell["cell_type"] == kind
    ]


def layer(module: str) -> int:
    return next(n for n, names in enumerate(LAYERS) if module in names)


# Who imports whom


def test_every_module_has_one_place():
    """A new module is put into LAYERS; a removed one leaves it."""
    assert Counter(name for names in LAYERS for name in names) == Counter(
        LIBRARY.keys() - {"__init__"}
    )


@pytest.mark.parametrize("module", sorted(LIBRARY.keys() - {"__init__"}))
def test_lower_layers_never_import_upward(module):
    upward = {other for other in of_library(tree(LIBRARY[module])) if layer(other) > layer(module)}
    assert not upward
    assert "experiments" not in {name.split(".")[0] for name in imported(tree(LIBRARY[module]))}


def test_no_circle_of_imports():
    graph = {name: of_library(tree(path)) for name, path in LIBRARY.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("experiment", **named(EXPERIMENTS))
def test_experiments_do_not_import_each_other(experiment):
    others = {p.stem for e in EXPERIMENTS if e != experiment for p in e.glob("*.py")} - {"run"}
    for path in experiment.glob("*.py"):
        names = imported(tree(path))
        assert not {name.split(".")[0] for name in names} & (others | {"experiments"}), path.name
        assert of_library(tree(path)) <= LIBRARY.keys(), path.name


def test_modules_beside_run_have_names_of_their_own():
    """All lie on one path, before everything else, when experiments run in one process."""
    names = Counter(p.stem for e in EXPERIMENTS for p in e.glob("*.py") if p.name != "run.py")
    taken = {*LIBRARY, *sys.stdlib_module_names, "lens_utils"}
    assert not [name for name, times in names.items() if times > 1 or name in taken]


@pytest.mark.parametrize("experiment", **named(EXPERIMENTS))
def test_reads_names_every_upstream(experiment):
    """./lab orders runs by READS, without running them."""
    used = set()
    for path in experiment.glob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "upstream":
                used.add(ast.literal_eval(node.args[0]))
    assert used == reads(experiment)
    assert used <= {e.name for e in EXPERIMENTS}


@pytest.mark.parametrize("notebook", **named(NOTEBOOKS))
def test_notebooks_only_read_and_draw(notebook):
    for cell in cells(notebook):
        code = ast.parse(cell["source"])
        assert of_library(code) <= FOR_NOTEBOOKS
        beside = {p.stem for e in EXPERIMENTS for p in e.glob("*.py")}
        assert not imported(code) & beside


# Portable, quiet, small


def sources() -> Iterator[tuple[Path, str]]:
    """All code of the lab, with the notebooks' cells."""
    for path in [*LIBRARY.values(), *(p for e in EXPERIMENTS for p in e.glob("*.py"))]:
        yield path, path.read_text(encoding="utf-8")
    for notebook in NOTEBOOKS:
        yield notebook, "\n".join(cell["source"] for cell in cells(notebook))


@pytest.mark.parametrize(("path", "text"), sources(), ids=lambda x: getattr(x, "name", ""))
def test_no_device_but_through_models(path, text):
    """`settings` lists the choices, `models` makes one; nothing else knows of cuda."""
    allowed = path.parent.name == "lens_utils" and path.stem in ("models", "settings")
    for node in ast.walk(ast.parse(text)):
        literal = isinstance(node, ast.Constant) and re.match(r"cuda\b", str(node.value))
        assert allowed or not (literal or getattr(node, "attr", "") == "cuda"), node.lineno
    assert "/home/" not in text and "/Users/" not in text


@pytest.mark.parametrize("module", sorted(LIBRARY.keys() - {"__main__", "console"}))
def test_the_library_does_not_print(module):
    calls = (n for n in ast.walk(tree(LIBRARY[module])) if isinstance(n, ast.Call))
    assert not [n.lineno for n in calls if getattr(n.func, "id", "") == "print"]


def test_files_stay_small():
    folders = ("lens_utils", "experiments", "tests", "benchmarks")
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= (200 if path.name == "run.py" else 400), (path.relative_to(ROOT), lines)


def test_ruff_has_nothing_to_say():
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "."]
        done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def unshaped(annotation: ast.AST | None) -> Iterator[str]:
    """Tensors and arrays in an annotation that no jaxtyping shape surrounds."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") in SHAPES:
        return
    name = getattr(annotation, "id", getattr(annotation, "attr", ""))
    if name in ("Tensor", "ndarray"):
        yield name
    for child in ast.iter_child_nodes(annotation) if annotation else ():
        yield from unshaped(child)


@pytest.mark.parametrize("module", sorted(LIBRARY))
def test_shapes_live_in_types(module):
    """Every array that a public function takes is annotated with its axes."""
    code = tree(LIBRARY[module])
    owners = [code, *(n for n in code.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    for function in (n for owner in owners for n in owner.body if isinstance(n, ast.FunctionDef)):
        if function.name.startswith("_"):
            continue
        a = function.args
        for argument in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
            found = list(unshaped(argument.annotation)) if argument else []
            assert not found, f"{function.name}({argument.arg})"


def test_public_functions_say_what_they_do():
    for module, path in LIBRARY.items():
        assert ast.get_docstring(tree(path)), module
    for experiment in EXPERIMENTS:
        text = ast.get_docstring(tree(experiment / "run.py")) or ""
        title, _, question = text.partition("\n\n")
        assert title.startswith(f"{experiment.name[:3]} · "), experiment.name
        assert "?" in question and "Findings: analyses.md" in question, experiment.name


# What an experiment consists of


@pytest.mark.parametrize("experiment", **named(EXPERIMENTS))
def test_an_experiment_is_complete(experiment):
    for name in ("run.py", "prompts.json", "analyses.md"):
        assert (experiment / name).exists(), name
    assert (provenance.NOTEBOOKS / f"{experiment.name}.ipynb").exists()
    last = ast.unparse(tree(experiment / "run.py").body[-1])
    assert last == "if __name__ == '__main__':\n    launch(Config, main)"


def test_numbers_and_notebooks_belong_to_one_experiment():
    assert len({e.name[:3] for e in EXPERIMENTS}) == len(EXPERIMENTS)
    assert {n.stem for n in NOTEBOOKS} <= {e.name for e in EXPERIMENTS}


@pytest.mark.parametrize("experiment", **named(EXPERIMENTS))
def test_findings_are_whole(experiment):
    """Their sections, their figures, and numbers that are those of the committed results."""
    page = experiment / "analyses.md"
    text = page.read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", text, re.M)
    assert sections == ["Results", "Evidence", "Controls", "What this cannot show", "Next"]
    assert report.finding(experiment) not in ("", "no finding yet")
    for name in report.links(page):
        assert (experiment / "figures" / name).exists(), name
    for figure in experiment.glob("figures/*"):
        assert figure.name in report.links(page), f"{figure.name} is shown nowhere"
    assert generated(page, "results") == report.block(experiment), "./lab report"


@pytest.mark.parametrize(
    ("name", "block", "made"),
    [("README.md", "experiments", report.index), ("NOTES.md", "status", report.status)],
)
def test_pages_of_all_experiments_are_up_to_date(name, block, made):
    assert generated(ROOT / name, block) == made(EXPERIMENTS), "./lab report"


@pytest.mark.parametrize("page", **named([ROOT / "README.md", ROOT / "NOTES.md"]))
def test_linked_files_exist(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith(("http://", "https://")) or (page.parent / link).exists(), link


def generated(page: Path, name: str) -> str:
    """What stands between a page's markers."""
    text = page.read_text(encoding="utf-8")
    return text.split(f"{report.BEGIN.format(name)}\n")[1].split(f"\n{report.END}")[0]


# Notebooks


@pytest.mark.parametrize("notebook", **named(NOTEBOOKS))
def test_notebooks_are_clean(notebook):
    """No outputs, no counts, and one cell of parameters, which holds only run_dir."""
    code = cells(notebook)
    assert not [c for c in code if c["outputs"] or c["execution_count"] is not None]
    assert "papermill" not in json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    tagged = [c["source"] for c in code if "parameters" in c["metadata"].get("tags", ())]
    assert len(tagged) == 1
    assert re.fullmatch(
        rf'run_dir = "\.\./outputs/{notebook.stem}/(smol|maze-organism)(-quick)?"', tagged[0]
    )
    assert sum(len(c["source"].split()) for c in cells(notebook, "markdown")) > 20, "prose"
