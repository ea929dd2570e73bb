"""./lab new: a working experiment to start from, written from the templates beside this file."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lens_utils import files, provenance
from lens_utils.errors import BadInput

TEMPLATES = Path(__file__).with_suffix("")


def write(name: str, experiments: Sequence[Path]) -> Iterator[Path]:
    """Write the experiment, its notebook and its test; the paths written.

    Raises BadInput for a name that is not NNN_words, or a number that is taken.
    """
    if not re.fullmatch(r"\d{3}_[a-z][a-z0-9_]*", name):
        raise BadInput(f"{name!r}: an experiment is named NNN_words, such as 023_demo")
    if taken := [e.name for e in experiments if e.name[:3] == name[:3]]:
        raise BadInput(f"the number {name[:3]} is taken by {taken[0]}")
    folder = provenance.EXPERIMENTS / name
    targets = {
        "run.py.txt": folder / "run.py",
        "prompts.json": folder / "prompts.json",
        "analyses.md": folder / "analyses.md",
        "notebook.ipynb": provenance.NOTEBOOKS / f"{name}.ipynb",
        "test.py.txt": provenance.ROOT / "tests" / f"test_{name}.py",
    }
    title = name[4:].replace("_", " ").capitalize()
    for template, target in targets.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        for mark, value in (("{{name}}", name), ("{{number}}", name[:3]), ("{{title}}", title)):
            text = text.replace(mark, value)
        files.write_bytes(target, text.encode())
        yield target
