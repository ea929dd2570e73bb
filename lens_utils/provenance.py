"""Where results come from: the repository's folders, its code's digest, versions, the commit."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
NOTEBOOKS = ROOT / "notebooks"
PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "pandas", "scipy", "scikit-learn")


def outputs() -> Path:
    """Where runs are kept: $LAB_OUTPUTS, or outputs/ in the repository."""
    return Path(os.environ.get("LAB_OUTPUTS") or ROOT / "outputs").expanduser().absolute()


def cache() -> Path:
    """Where converted models are kept: $LAB_CACHE, or lens-lab in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LAB_CACHE") or base / "lens-lab").expanduser().absolute()


def shown(path: Path) -> str:
    """A path as a user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def code_sha(experiment: Path) -> str:
    """Digest of the code a run depends on: the experiment's own and the library's."""
    digest = hashlib.sha256()
    for path in sorted([*experiment.glob("*.py"), *(ROOT / "lens_utils").glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, object]:
    """Versions, commit, command and time of a run, for its manifest."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = importlib.metadata.version(name)
    program = Path(sys.argv[0]).resolve()
    typed = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else program.name
    typed = "./lab" if program.name == "__main__.py" else typed
    return {
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}",
        "git": commit(),
        "command": shlex.join([typed, *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit, with + when code or prompts differ from it; empty outside git."""
    git = ["git", "-C", str(ROOT)]
    status = [*git, "status", "--porcelain", "--", "*.py", "*/prompts.json"]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run(status, capture_output=True, text=True)
    except OSError:
        return ""
    if head.returncode:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
