"""Where a finished run is shown besides its own folder: nowhere, or Weights & Biases.

The files of the run folder are the results; a tracker only gets copies of them. `start("off")`
is the default and never imports wandb. "offline" writes the run beside the results, for a later
`wandb sync`; nothing leaves the machine. "online" sends it, and happens only when that very word
was given: neither a login nor WANDB_MODE in the environment turns tracking on or off.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lens_utils.errors import BadInput, Failure

MODES = ("off", "offline", "online")
PROJECT = "lens-lab"


class Tracker:
    """What a finished folder is sent through. This one sends nothing."""

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step; steps never go back."""

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """A whole table."""

    def image(self, name: str, path: Path) -> None:
        """A PNG on disk."""

    def artifact(self, path: Path, name: str) -> None:
        """A file kept under a name and versioned there, such as the masks."""

    def close(self) -> None:
        """The end; nothing is sent after it."""


class Wandb(Tracker):
    """One run of Weights & Biases, held as an object: two in one process do not mix."""

    def __init__(
        self, mode: str, folder: Path, project: str, name: str, config: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        import wandb

        self._wandb = wandb
        # Of this machine only what was asked for: no git state, code, host or package list.
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, disable_code=True,
            disable_job_creation=True, x_disable_stats=True, x_disable_machine_info=True,
            x_save_requirements=False,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                mode=mode, dir=folder, project=project, name=name, config=dict(config),
                settings=settings,
            )  # fmt: skip
        except wandb.errors.UsageError as error:
            raise BadInput(f"Weights & Biases: {_line(error)} (or take --wandb offline)") from error
        except wandb.errors.Error as error:
            raise Failure(f"Weights & Biases: {_line(error)}") from error

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._run.log(dict(values), step=step)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        self._run.log({name: self._wandb.Table(dataframe=frame)})

    def image(self, name: str, path: Path) -> None:
        try:
            self._run.log({name: self._wandb.Image(str(path))})
        except self._wandb.errors.Error as error:  # wandb measures images with pillow
            raise Failure(f"Weights & Biases: {_line(error)}") from error

    def artifact(self, path: Path, name: str) -> None:
        held = self._wandb.Artifact(name, type="model")
        # As it lies there: a mutable file would be copied into the user's home first.
        held.add_file(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(held)

    def close(self) -> None:
        self._run.finish()


def start(
    mode: str,
    folder: Path,
    name: str,
    project: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tracker:
    """A tracker for the results in `folder`; offline runs are kept in folder/wandb.

    Raises BadInput for an unknown mode and for "online" without a login, Failure when the
    service cannot be reached.
    """
    if mode not in MODES:
        raise BadInput(f"no such way of tracking: {mode}; take one of {', '.join(MODES)}")
    if mode == "off":
        return Tracker()
    return Wandb(mode, Path(folder), project or PROJECT, name, config or {})


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
