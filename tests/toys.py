"""Toy experiments to test the contract on, in this process or as programs of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lens_utils.__main__ import load
from lens_utils.console import guarded
from lens_utils.experiment import BaseConfig, Run, execute

PROGRAM = '''"""999 · Toy: squares, in parts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lens_utils.experiment import BaseConfig, Run, launch


@dataclass(frozen=True)
class Config(BaseConfig):
    tau: float = 1.0
    """A setting."""
    wrong: bool = False
    """A bug."""


def main(cfg: Config, run: Run) -> None:
    import pandas as pd

    first = run.stage("first.csv", lambda: noted("first", pd.DataFrame({"x": [cfg.tau / 3]})))

    def squares(items):
        noted(f"part {items[0]}")
        return pd.DataFrame({"i": list(items), "y": [i * i / 7 * first.x[0] for i in items]})

    table = run.chunks("squares.csv", range(11), 2, squares)
    if cfg.wrong:
        open("no such file")
    run.stage("summary.json", lambda: noted("summary", {"sum": table.y.sum()}))


def noted(what, value=None):
    """Log it, and fail or wait where the test asks for that."""
    with open(os.environ["TOY_LOG"], "a") as log:
        log.write(what + "\\n")
    if os.environ.get("TOY_FAIL") == what:
        raise RuntimeError(what)
    waiting = Path(os.environ["TOY_LOG"] + ".waiting")
    if os.environ.get("TOY_WAIT") == what and not waiting.exists():
        waiting.touch()
        time.sleep(60)
    return value


if __name__ == "__main__":
    launch(Config, main)
'''
EVERYTHING = ["first", *(f"part {i}" for i in range(0, 11, 2)), "summary"]
TABLES = ("first.csv", "squares.csv", "summary.json")


@dataclass
class Program:
    """A toy experiment as a program, and what it has computed so far."""

    source: Path
    log: Path
    outputs: Path

    @property
    def folder(self) -> Path:
        return self.outputs / "999_toy" / "smol"

    def env(self, **more: str) -> dict[str, str]:
        return {"TOY_LOG": str(self.log), "LAB_OUTPUTS": str(self.outputs), **more}

    def here(self, *args: str, fail: str = "") -> None:
        """Run it in this process."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env(TOY_FAIL=fail).items():
                patch.setenv(name, value)
            toy = load(self.source.parent)
            execute(toy.Config, toy.main, self.source, list(args))

    def start(self, *args: str, wait: str = "") -> subprocess.Popen:
        env = os.environ | self.env(TOY_WAIT=wait)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, str(self.source), *args]
        # Tests started in the background inherit a Ctrl-C that is ignored.
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        return subprocess.Popen(command, env=env, preexec_fn=heed, **pipes)

    def run(self, *args: str) -> tuple[int, str]:
        """Run it as a program; its exit code and stderr."""
        process = self.start(*args)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def until_waiting(self, process: subprocess.Popen) -> subprocess.Popen:
        """Until it is in the middle of the piece of work it was started with."""
        while not Path(f"{self.log}.waiting").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    def stop(self, at: str, signum: int) -> tuple[int, str]:
        """Start it and send a signal in the middle of a piece of work."""
        process = self.until_waiting(self.start(wait=at))
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def computed(self) -> list[str]:
        """What was computed since this was last asked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def tables(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in TABLES}

    def part(self, n: int) -> Path:
        return sorted((self.folder / "parts" / "squares.csv").iterdir())[n]

    def leftovers(self) -> list[Path]:
        return [p for p in self.outputs.rglob(".*") if not p.name.endswith(".lock")]


@dataclass(frozen=True)
class Config(BaseConfig):
    tau: int = 1
    """A setting."""
    sizes: tuple[int, ...] = (1, 2)
    """A setting that JSON has no type for."""


def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """toy(main, *args): run `main` as an experiment in this process."""
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    source = tmp_path / "999_toy" / "run.py"
    source.parent.mkdir()
    source.write_text("# digested only")
    return lambda main, *args: execute(Config, main, source, list(args))


def program(folder: Path) -> Program:
    """A run.py of its own under `folder`."""
    source = folder / "999_toy" / "run.py"
    source.parent.mkdir()
    source.write_text(PROGRAM)
    return Program(source, folder / "log", folder / "outputs")


def code_and_line(run: Callable, capsys) -> tuple[int, str]:
    """Exit code and the one line a user sees."""
    capsys.readouterr()
    code = guarded(run)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]
