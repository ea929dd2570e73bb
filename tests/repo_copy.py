"""A copy of the repository that works on its own, for tests that write into it."""

import os
import shutil
import sys
from pathlib import Path

from lens_utils import provenance

CODE = ("lab", "lens_utils", "experiments", "notebooks", "models", "tests", "slurm",
        "pyproject.toml", "requirements.txt", "README.md", "NOTES.md")  # fmt: skip


def copy(target: Path) -> Path:
    """Copy the code to `target`; its ./lab runs on this Python and installs nothing."""
    target.mkdir()
    for name in CODE:
        source = provenance.ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(source, target / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, target / name)
    python = target / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy2(target / "requirements.txt", target / ".venv" / "requirements.txt")
    return target


def environment(**more: str) -> dict[str, str]:
    """This environment without what would lead out of the copy."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LAB_OUTPUTS", "PYTHONPATH")}
    return kept | more
