"""The experiment contract: what a run keeps, loads, refuses and survives.

`toy` runs any main in this process. `program` is a run.py; what is about signals, exit codes and
several processes runs it as a program of its own, the rest here, which is faster.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lens_utils import files
from lens_utils.__main__ import load
from lens_utils.console import guarded
from lens_utils.errors import BadInput, Failure, Unfinished
from lens_utils.experiment import BaseConfig, Results, Run, execute

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
    if os.environ.get("TOY_WAIT") == what:
        Path(os.environ["TOY_LOG"] + ".waiting").touch()
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

    def here(self, *args: str, fail: str = "") -> int:
        """Run it in this process; its exit code."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env(TOY_FAIL=fail).items():
                patch.setenv(name, value)
            toy = load(self.source.parent)
            return guarded(lambda: execute(toy.Config, toy.main, self.source, list(args)))

    def start(self, *args: str, wait: str = "") -> subprocess.Popen:
        env = os.environ | self.env(TOY_WAIT=wait)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, str(self.source), *args], env=env, **pipes)

    def run(self, *args: str) -> tuple[int, str]:
        """Run it as a program; its exit code and stderr."""
        process = self.start(*args)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def stop(self, at: str, signum: int) -> tuple[int, str]:
        """Start it and send a signal in the middle of a piece of work."""
        process, waiting = self.start(wait=at), Path(f"{self.log}.waiting")
        while not waiting.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        waiting.unlink()
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


@pytest.fixture
def program(tmp_path) -> Program:
    source = tmp_path / "999_toy" / "run.py"
    source.parent.mkdir()
    source.write_text(PROGRAM)
    return Program(source, tmp_path / "log", tmp_path / "outputs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """The tables of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "999_toy"
    folder.mkdir()
    (folder / "run.py").write_text(PROGRAM)
    toy = Program(folder / "run.py", folder / "log", folder / "outputs")
    progress = "999 squares.csv:   0%|          | 0/6 [00:00<?, ?it/s]\n"
    assert toy.run() == (0, progress), "to a log go lines, no bar that is drawn over itself"
    assert toy.computed() == EVERYTHING
    return toy.tables()


@dataclass(frozen=True)
class Config(BaseConfig):
    tau: int = 1
    """A setting."""
    sizes: tuple[int, ...] = (1, 2)
    """A setting that JSON has no type for."""


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Callable[..., Run]:
    """toy(main, *args): run `main` as an experiment in this process."""
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    source = tmp_path / "999_toy" / "run.py"
    source.parent.mkdir()
    source.write_text("# digested only")
    return lambda main, *args: execute(Config, main, source, list(args))


class Calls(list):
    """Stages that note when they are computed."""

    def stage(self, run: Run, name: str, value: object) -> object:
        return run.stage(name, lambda: self.append(name) or value)


def code_and_line(run: Callable, capsys) -> tuple[int, str]:
    """Exit code and the one line a user sees."""
    capsys.readouterr()
    code = guarded(run)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


# Stages


def test_a_stage_is_computed_once_then_loaded(toy):
    calls = Calls()

    def main(cfg: Config, run: Run) -> None:
        found = [calls.stage(run, "a.json", {"x": 1}), calls.stage(run, "b.json", None)]
        assert found == [{"x": 1}, None]

    toy(main)
    assert calls == ["a.json", "b.json"]
    toy(main)
    assert calls == ["a.json", "b.json"], "null is a result, too"


def test_tables_come_back_as_they_were(tmp_path):
    """Floats bit for bit; text that other readers take for a gap, a number's end or a row's."""
    rng = np.random.default_rng(0)
    floats = rng.integers(0, 2**63, 4000).view(np.float64)
    floats = np.concatenate([floats[np.isfinite(floats)], [0.1, 1 / 3, 5e-324, -0.0, np.inf]])
    files.write(tmp_path / "floats.csv", pd.DataFrame({"x": floats}))
    back = files.read(tmp_path / "floats.csv").x.to_numpy()
    assert (back.view(np.int64) == floats.view(np.int64)).all()

    texts = ["NA", "null", "nan", "None", " the", "\n", "\r", "\r\n", "\t", '"', ",", "'", "#",
             "\ufeff", "\u2028", "�", " ", "\\", "True", "1", "日本"]  # fmt: skip
    frame = pd.DataFrame({"text": texts, "n": range(len(texts)), "gap": [np.nan, *texts[1:]]})
    files.write(tmp_path / "texts.csv", frame)
    back = files.read(tmp_path / "texts.csv")
    assert back.text.tolist() == texts and back.n.tolist() == frame.n.tolist()
    assert back.gap.isna().tolist() == frame.gap.isna().tolist()
    first = (tmp_path / "texts.csv").read_bytes()
    files.write(tmp_path / "texts.csv", back)
    assert (tmp_path / "texts.csv").read_bytes() == first


def test_json_refuses_what_it_cannot_hold(tmp_path):
    files.write(tmp_path / "a.json", {"x": np.float64(0.1), "n": np.int64(3), "p": Path("a")})
    assert files.read(tmp_path / "a.json") == {"x": 0.1, "n": 3, "p": "a"}
    with pytest.raises(TypeError, match="set"):
        files.write(tmp_path / "b.json", {"x": {1, 2}})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_damaged_stage_is_computed_again(toy, capsys):
    """Later stages are, too, if it comes out otherwise, and also when a kill comes between."""
    calls, value = Calls(), {"x": 1}

    def main(cfg: Config, run: Run) -> None:
        a = calls.stage(run, "a.json", dict(value))
        run.chunks("b.csv", [1, 2, 3], 2, lambda part: times(part, a["x"]))
        calls.stage(run, "c.json", a)

    def times(part: list[int], factor: int) -> pd.DataFrame:
        calls.append(f"b{part[0]}")
        return pd.DataFrame({"y": [factor * i for i in part]})

    everything = ["a.json", "b1", "b3", "c.json"]
    folder = toy(main).folder
    assert calls == everything
    for damage in (b"", b"x" * 9):
        calls.clear()
        (folder / "a.json").write_bytes(damage)
        toy(main)
        assert calls == ["a.json"], "the same bytes came out: the rest still holds"
    assert "a.json is damaged" in capsys.readouterr().err

    calls.clear()
    value["x"] = 2
    (folder / "a.json").unlink()
    toy(main)
    assert calls == everything, "parts and stages rested on the old value"
    assert files.read(folder / "b.csv").y.tolist() == [2, 4, 6]

    calls.clear()
    value["x"] = 3
    (folder / "a.json").unlink()
    toy(lambda cfg, run: run.stage("a.json", lambda: value))  # and is killed here
    toy(main)
    assert files.read(folder / "b.csv").y.tolist() == [3, 6, 9]
    assert files.read(folder / "c.json") == {"x": 3}


def test_bytes_of_every_format_are_the_same_each_time(tmp_path):
    """A resumed run ends in the same bytes only if writing is a function of the value."""
    import torch

    values = {"a.json": {"x": 0.1}, "a.csv": pd.DataFrame({"x": [0.1]}), "a.md": "é",
              "a.parquet": pd.DataFrame({"x": [0.1], "t": ["é"]}),
              "a.npz": {"x": np.arange(3)},
              "a.safetensors": {"x": torch.ones(2)[None].T, "y": torch.ones(2)}}  # fmt: skip
    for name, value in values.items():
        files.write(tmp_path / name, value)
        first = files.sha256(tmp_path / name)
        time.sleep(0.01)
        files.write(tmp_path / name, value)
        assert files.sha256(tmp_path / name) == first, name
        assert repr(files.read(tmp_path / name)) == repr(value), name


# Settings


def test_changed_settings_are_refused(toy, capsys):
    """Exit code 2 and one line with both values; a tag keeps both, --fresh starts over."""
    calls = Calls()

    def main(cfg: Config, run: Run) -> None:
        calls.stage(run, "a.json", cfg.tau)

    toy(main)
    toy(main)
    code, line = code_and_line(lambda: toy(main, "--tau", "2"), capsys)
    assert code == 2 and "tau 1 -> 2" in line and "--tag" in line and "--fresh" in line
    assert calls == ["a.json"]

    tagged = toy(main, "--tau", "2", "--tag", "two times")
    assert tagged.folder.name == "smol-two times"
    assert files.read(tagged.folder / "a.json") == 2
    plain = toy(main)
    assert files.read(plain.folder / "a.json") == 1

    (plain.folder / "old.txt").touch()
    toy(main, "--tau", "2", "--fresh")
    assert files.read(plain.folder / "a.json") == 2
    assert not (plain.folder / "old.txt").exists()
    assert sorted(p.name for p in plain.folder.parent.iterdir()) == ["smol", "smol-two times"]


def test_a_tag_is_not_mistaken_for_quick(toy, capsys):
    """Both lead to the folder smol-quick; the results are not each other's."""
    toy(lambda cfg, run: run.stage("a.json", lambda: cfg.quick), "--quick")
    code, line = code_and_line(lambda: toy(lambda cfg, run: None, "--tag", "quick"), capsys)
    assert code == 2 and "quick True -> False" in line


def test_settings_may_change_until_something_is_kept(toy):
    """A refused first command does not hold the folder."""

    def refused(cfg: Config, run: Run) -> None:
        raise BadInput("next_ln1 needs --fold")

    with pytest.raises(BadInput):
        toy(refused)
    run = toy(lambda cfg, run: run.stage("a.json", lambda: 1), "--tau", "5")
    assert Results(run.folder).manifest["settings"]["tau"] == 5


def test_parts_count_as_results(toy, capsys):
    """A run killed before its first stage was whole is not gone on with under other settings."""

    def main(cfg: Config, run: Run) -> None:
        run.chunks("a.csv", [1, 2], 1, lambda part: 1 / (part[0] - 2) and pd.DataFrame({"x": part}))

    with pytest.raises(ZeroDivisionError):
        toy(main)
    code, line = code_and_line(lambda: toy(main, "--tau", "2"), capsys)
    assert code == 2 and "tau 1 -> 2" in line
    run = toy(lambda cfg, run: None)
    (run.folder / "manifest.json").unlink()
    toy(lambda cfg, run: None, "--tau", "2")
    assert not (run.folder / "parts").exists(), "parts without a manifest are of unknown settings"


def test_a_run_whose_folder_was_taken_over_stops(toy):
    """It would put its results under another run's settings."""

    def main(cfg: Config, run: Run) -> None:
        toy(lambda cfg, run: run.stage("a.json", lambda: 2), "--tau", "2", "--fresh")
        run.chunks("b.csv", [1], 1, lambda part: pd.DataFrame({"x": part}))

    with pytest.raises(BadInput, match="started over by another process"):
        toy(main)
    assert not list(toy(lambda cfg, run: None, "--tau", "2").folder.rglob("*.parquet"))


@pytest.mark.parametrize("tag", ["../x", "a/b", "/tmp", "a\nb"])
def test_a_tag_stays_in_its_folder(tag):
    with pytest.raises(BadInput, match="--tag"):
        _ = dataclasses.replace(Config(), tag=tag).variant


def test_variants_name_the_run(tmp_path, monkeypatch):
    assert Config(model="org/name", quick=True, tag="x").variant == "org--name-quick-x"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    for model in ("~/mine", f"{tmp_path}/mine/", f"{tmp_path}/mine"):
        assert Config(model=model).variant == "mine"


def test_changed_prompts_are_refused_and_changed_code_is_said(toy, tmp_path, capsys):
    source = tmp_path / "999_toy"

    def main(cfg: Config, run: Run) -> None:
        run.stage("a.json", lambda: 1)

    (source / "prompts.json").write_text("[1]")
    toy(main)
    (source / "helper.py").write_text("x = 1")
    capsys.readouterr()
    toy(main)
    assert "the code changed" in capsys.readouterr().err
    (source / "prompts.json").write_text("[2]")
    code, line = code_and_line(lambda: toy(main), capsys)
    assert code == 2 and "prompts.json" in line


def test_changed_code_is_said_also_where_there_are_only_parts(toy, tmp_path, capsys):
    def main(cfg: Config, run: Run) -> None:
        run.chunks("a.csv", [1, 2], 1, lambda part: 1 / (part[0] - 2) and pd.DataFrame({"x": part}))

    with pytest.raises(ZeroDivisionError):
        toy(main)
    (tmp_path / "999_toy" / "run.py").write_text("# mended")
    with pytest.raises(ZeroDivisionError):
        toy(main)
    assert "the code changed" in capsys.readouterr().err


# Upstream and models


def test_upstream(toy, tmp_path, capsys):
    """One line with the command where it is missing; refused when it changed since."""

    def reader(cfg: Config, run: Run) -> None:
        run.stage("read.json", lambda: run.upstream("005_other", "scores.json"))
        run.upstream("005_other", "scores.json")

    code, line = code_and_line(lambda: toy(reader, "--quick"), capsys)
    assert code == 2 and "./lab run 005 --model smol --quick" in line

    other = tmp_path / "005_other" / "run.py"
    other.parent.mkdir()
    other.write_text("")

    def maker(cfg: Config, run: Run) -> None:
        run.stage("scores.json", lambda: cfg.tau)

    made = execute(Config, maker, other, ["--quick"])
    run = toy(reader, "--quick")
    tagged = toy(reader, "--quick", "--tag", "b")  # reads the untagged one
    assert files.read(run.folder / "read.json") == files.read(tagged.folder / "read.json") == 1
    toy(reader, "--quick")

    execute(Config, maker, other, ["--quick", "--fresh", "--tau", "2"])
    code, line = code_and_line(lambda: toy(reader, "--quick"), capsys)
    assert code == 2 and "005_other/scores.json" in line and "--fresh" in line
    toy(reader, "--quick", "--fresh")
    assert files.read(run.folder / "read.json") == 2

    (made.folder / "scores.json").write_text("3")  # damaged: no record says so
    code, line = code_and_line(lambda: toy(reader, "--quick"), capsys)
    assert code == 2 and "./lab run 005" in line


def test_other_weights_under_the_same_name_are_refused(toy, monkeypatch, capsys):
    """Such as a folder that was trained on, or a hub's main branch that moved."""
    import types

    import lens_utils.models

    weights = {"sha256": "aa"}

    def load(*args: object, **kwargs: object) -> object:
        kind = "folded" if kwargs["fold"] else "raw"
        return types.SimpleNamespace(identity={**weights, "weights": kind})

    monkeypatch.setattr(lens_utils.models, "load_model", load)

    def main(cfg: Config, run: Run) -> None:
        a, b, again = untyped(run)(), untyped(run)(fold=True), untyped(run)()
        assert a is again and (a.identity["weights"], b.identity["weights"]) == ("raw", "folded")
        run.stage("a.json", lambda: 1)

    run = toy(main)
    assert Results(run.folder).model == {"sha256": "aa", "weights": "raw"}
    toy(main)
    weights["sha256"] = "bb"
    code, line = code_and_line(lambda: toy(main), capsys)
    assert code == 2 and "another model" in line and "sha256 aa -> bb" in line


def untyped(run: Run) -> Callable:
    """run.model without the check that it returns a LoadedModel."""
    return lambda **kw: getattr(Run.model, "__wrapped__", Run.model)(run, **kw)


# Parts


def test_a_killed_run_is_taken_up_again(program, undisturbed):
    """Only what is missing is computed, and the tables are the same bytes."""
    assert program.stop("part 4", signal.SIGKILL)[0] == -signal.SIGKILL
    assert program.computed() == ["first", "part 0", "part 2", "part 4"]
    assert program.run()[0] == 0
    assert program.computed() == ["part 4", "part 6", "part 8", "part 10", "summary"]
    assert program.tables() == undisturbed
    assert program.here() == 0 and program.computed() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so(program, signum, undisturbed):
    """Ctrl-C, and the signal that a cluster sends at the time limit."""
    code, said = program.stop("part 2", signum)
    assert code == 130
    assert said.splitlines()[-1] == "lab: stopped; the same command goes on where it was"
    assert "Traceback" not in said and not program.leftovers()
    assert program.here() == 0
    assert program.computed() == ["first", "part 0", "part 2", *EVERYTHING[2:]]
    assert program.tables() == undisturbed


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_damaged_parts_are_computed_again(program, damage, undisturbed, capsys):
    with pytest.raises(RuntimeError):
        program.here(fail="part 6")
    program.computed()
    part = program.part(1)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(bytes(data) if damage == "flipped" else part.read_bytes()[:-20])
    capsys.readouterr()
    assert program.here() == 0
    assert ("is damaged" in capsys.readouterr().err) == (damage != "gone")
    assert program.computed() == ["part 2", "part 6", "part 8", "part 10", "summary"]
    assert program.tables() == undisturbed


def test_shards_in_any_order_equal_one_run(program, undisturbed, capsys):
    """A shard that leaves parts to others ends well; the last one assembles."""
    for shard in ("2/3", "0/3"):
        assert program.here("--shard", shard) == 0
        assert "this shard is done" in capsys.readouterr().err
        assert not (program.folder / "squares.csv").exists()
    program.computed()
    assert program.here("--shard", "1/3") == 0
    assert program.computed() == ["part 2", "part 8", "summary"]
    assert program.tables() == undisturbed


def test_shards_at_once_equal_one_run(program, undisturbed):
    """Whoever finds all parts assembles; a stage before them is computed by one shard only."""
    started = [program.start("--shard", f"{i}/3") for i in range(3)]
    for process in started:
        assert process.wait(timeout=60) == 0, process.communicate()
    program.here()
    assert program.tables() == undisturbed
    assert sorted(program.computed()) == sorted(EVERYTHING)


def test_two_runs_at_once(program, undisturbed):
    """Neither breaks the other's files, and the manifest knows every stage."""
    one, two = program.start(), program.start()
    assert one.wait(timeout=60) == 0 and two.wait(timeout=60) == 0
    assert program.tables() == undisturbed
    manifest = Results(program.folder).manifest
    assert list(manifest["stages"]) == list(TABLES)
    for name, stage in manifest["stages"].items():
        assert stage["sha256"] == files.sha256(program.folder / name)
    assert not program.leftovers()


def test_parts_of_another_size_or_number_are_not_taken(toy):
    """Two parts of ten items are not the same two when they are 6 + 4 and when they are 5 + 5."""
    done = []

    def main(size: int, number: int) -> Callable[[Config, Run], None]:
        def compute(part: range) -> pd.DataFrame:
            done.append(len(part))
            return pd.DataFrame({"x": list(part)})

        return lambda cfg, run: run.chunks("a.csv", range(number), size, compute)

    with pytest.raises(Unfinished):
        toy(main(6, 10), "--shard", "0/2")
    run = toy(main(5, 10))
    assert done == [6, 5, 5]
    assert files.read(run.folder / "a.csv").x.tolist() == list(range(10))


def test_chunks_of_tensors_and_of_nothing(toy):
    import torch

    def main(cfg: Config, run: Run) -> None:
        whole = run.chunks("a.safetensors", [1, 2, 3], 2, lambda part: {"x": torch.tensor(part)})
        assert whole["x"].tolist() == [1, 2, 3]
        run.chunks("b.csv", [], 2, lambda part: None)

    with pytest.raises(BadInput, match=r"b\.csv"):
        toy(main)


@pytest.mark.parametrize("shard", ["9/8", "8/8", "x/y", "3", "-1/8", "1/", "0/0"])
def test_wrong_shards(toy, shard, capsys):
    code, line = code_and_line(lambda: toy(lambda cfg, run: None, f"--shard={shard}"), capsys)
    assert code == 2 and "0 <= i < n" in line


def test_fresh_shards_are_refused(toy, capsys):
    run = toy(lambda cfg, run: run.stage("a.json", lambda: 1))
    code, line = code_and_line(
        lambda: toy(lambda cfg, run: None, "--shard", "0/2", "--fresh"), capsys
    )
    assert code == 2 and "other shards' parts" in line
    assert (run.folder / "a.json").exists()


# The manifest


def test_the_manifest_says_where_results_come_from(program, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert program.run("--seed", "3")[0] == 0
    text = (program.folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["settings"] | {"model": "smol", "seed": 3, "tau": 1.0} == manifest["settings"]
    assert {"python", "torch", "transformers"} <= manifest["versions"].keys()
    assert manifest["command"] == "run.py --seed 3"
    assert {"git", "machine", "started", "code", "models", "upstream"} <= manifest.keys()
    for name, stage in manifest["stages"].items():
        assert stage["sha256"] == files.sha256(program.folder / name)
        assert stage["bytes"] == (program.folder / name).stat().st_size
        assert stage["seconds"] >= 0 and len(stage["code"]) == 16
    assert "secret" not in text and "token" not in text.lower()


def test_results_are_what_was_recorded(toy, tmp_path):
    run = toy(lambda cfg, run: run.stage("a.json", lambda: 1))
    results = Results(run.folder)
    assert results.read("a.json") == 1 and not results.finished and results.variant == "smol"
    (run.folder / "b.json").write_text("1")
    with pytest.raises(BadInput, match="b.json is missing or damaged"):
        results.read("b.json")
    (run.folder / "a.json").write_text("2")
    with pytest.raises(BadInput, match="a.json is missing or damaged"):
        results.read("a.json")
    with pytest.raises(BadInput, match="no manifest.json"):
        Results(tmp_path / "nowhere")


def test_a_damaged_manifest_is_one_line(toy, capsys):
    def main(cfg: Config, run: Run) -> None:
        run.stage("a.json", lambda: 1)

    run = toy(main)
    (run.folder / "manifest.json").write_text("")
    code, line = code_and_line(lambda: toy(main), capsys)
    assert code == 2 and "manifest.json is damaged" in line and "--fresh" in line
    toy(main, "--fresh")


def test_peers_are_finished_runs_of_the_same_size(toy):
    def main(cfg: Config, run: Run) -> None:
        if not cfg.tag == "open":
            run.stage("summary.json", lambda: {})

    for args in (
        [],
        ["--quick"],
        ["--tag", "x"],
        ["--model", "b"],
        ["--model", "c", "--tag", "open"],
    ):
        last = toy(main, *args)
    own = Results(last.folder.with_name("smol"))
    assert [r.variant for r in own.peers()] == ["smol", "b"]


# What the machine refuses


def test_a_folder_that_cannot_be_made_is_one_line(program):
    program.outputs.write_text("in the way")
    code, said = program.run()
    assert code == 1 and len(said.splitlines()) == 1 and str(program.outputs) in said


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except OSError:
        done = None
    if done is None or done.returncode:
        pytest.skip("no right to mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def big(suffix: str) -> object:
    """A value of that format which is larger than the small disk."""
    import torch

    numbers = np.random.default_rng(0).random(100_000)
    frame = pd.DataFrame({"x": numbers})
    return {".json": numbers.tolist(), ".md": "x" * 900_000, ".csv": frame, ".parquet": frame,
            ".npz": {"x": numbers}, ".safetensors": {"x": torch.tensor(numbers)}}[suffix]  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".md", ".csv", ".parquet", ".npz", ".safetensors"])
def test_a_full_disk_is_one_line(toy, small_disk, monkeypatch, suffix, capsys):
    """Whichever library writes; nothing half-written stays, and what was whole does."""
    monkeypatch.setenv("LAB_OUTPUTS", str(small_disk))

    def main(cfg: Config, run: Run) -> None:
        run.stage("a.json", lambda: 1)
        run.stage(f"b{suffix}", lambda: big(suffix))

    code, line = code_and_line(lambda: toy(main), capsys)
    assert code == 1 and "No space left on device" in line and f"b{suffix}" in line
    folder = small_disk / "999_toy" / "smol"
    there = {p.name for p in folder.iterdir() if not p.name.endswith(".lock")}
    assert there == {"a.json", "manifest.json"}
    assert list(Results(folder).manifest["stages"]) == ["a.json"]


def test_a_full_disk_in_the_middle_of_parts(toy, small_disk, monkeypatch, capsys):
    monkeypatch.setenv("LAB_OUTPUTS", str(small_disk))
    numbers = np.random.default_rng(0).random(10_000)

    def main(cfg: Config, run: Run) -> None:
        run.chunks("a.csv", range(3), 1, lambda part: pd.DataFrame({"x": numbers + part[0]}))

    capsys.readouterr()
    assert guarded(lambda: toy(main)) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    parts = list((small_disk / "999_toy" / "smol" / "parts" / "a.csv").iterdir())
    assert 1 <= len(parts) < 3 and not any(p.name.startswith(".") for p in parts)


def test_errors_of_the_disk_and_of_the_code(toy, monkeypatch, capsys):
    """The same without a right to mount; and a bug, also one about files, keeps its traceback."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    run = toy(lambda cfg, run: None)
    with pytest.raises(Failure, match="a.parquet: No space left on device"):
        files.write(run.folder / "a.parquet", pd.DataFrame())
    assert not [p for p in run.folder.iterdir() if p.name.startswith(".writing")]

    def denied() -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    code, line = code_and_line(denied, capsys)
    assert code == 1 and "Permission denied: somewhere" in line
    for bug in (FileNotFoundError(2, "No such file"), KeyError("x"), RuntimeError("x")):
        with pytest.raises(type(bug)):
            guarded(lambda bug=bug: (_ for _ in ()).throw(bug))


def test_a_bug_gives_a_traceback(program):
    code, said = program.run("--wrong")
    assert code == 1 and "Traceback" in said and "no such file" in said
