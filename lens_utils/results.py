"""What a run left behind: its manifest and its stages, to be read by notebooks and reports."""

from pathlib import Path
from typing import Any

from lens_utils import files, provenance
from lens_utils.errors import BadInput

KEYS = {"settings", "quick", "tag", "code", "models", "upstream", "stages"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder, {} where there is none. Raises BadInput for a damaged one."""
    path = folder / "manifest.json"
    try:
        manifest = files.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not manifest.keys() >= KEYS:
        raise BadInput(f"{provenance.shown(path)} is damaged: start over with --fresh")
    return manifest


class Results:
    """A finished run, to read: what notebooks and reports work on."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir).resolve()
        self.manifest = read_manifest(self.folder)
        if not self.manifest:
            raise BadInput(f"{run_dir} is no run: there is no manifest.json in it")

    @property
    def variant(self) -> str:
        """The run folder's name, such as smol-quick."""
        return self.folder.name

    @property
    def model(self) -> dict[str, Any]:
        """What the manifest says of the run's model; empty for a run that loads none."""
        return next(iter(self.manifest["models"].values()), {})

    @property
    def finished(self) -> bool:
        """Whether summary.json, every experiment's last stage, is recorded."""
        return "summary.json" in self.manifest["stages"]

    def read(self, name: str) -> Any:
        """One of the run's stages. Raises BadInput when it is not there as it was written."""
        path, record = self.folder / name, self.manifest["stages"].get(name)
        if record is None or not path.exists() or files.sha256(path) != record["sha256"]:
            raise BadInput(f"{provenance.shown(path)} is missing or damaged: ./lab run "
                           f"{self.folder.parent.name[:3]} computes it again")  # fmt: skip
        return files.read(path)

    def peers(self) -> "list[Results]":
        """This run first, then the finished runs of other models at the same size."""
        alike = [r for r in runs(self.folder.parent) if r.finished and r.folder != self.folder
                 and r.manifest["quick"] == self.manifest["quick"]
                 and not r.manifest["tag"]]  # fmt: skip
        return [self, *alike]


def runs(experiment: Path) -> list[Results]:
    """The runs under an experiment's outputs, finished or not, by name."""
    return [Results(path.parent) for path in sorted(experiment.glob("*/manifest.json"))]
