"""Runs that are killed, stopped, damaged, divided into shards, or at work twice at once."""

import json
import signal
from collections.abc import Callable

import pandas as pd
import pytest
import toys
from toys import EVERYTHING, TABLES, Config, Program, code_and_line

from lens_utils import files
from lens_utils.console import guarded
from lens_utils.errors import BadInput, Unfinished
from lens_utils.experiment import Results, Run


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Callable[..., Run]:
    return toys.experiment(tmp_path, monkeypatch)


@pytest.fixture
def program(tmp_path) -> Program:
    return toys.program(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """The tables of a run that nothing happened to."""
    toy = toys.program(tmp_path_factory.mktemp("undisturbed"))
    progress = "999 squares.csv:   0%|          | 0/6 [00:00<?, ?it/s]\n"
    assert toy.run() == (0, progress), "to a log go lines, no bar that is drawn over itself"
    assert toy.computed() == EVERYTHING
    return toy.tables()


def test_a_killed_run_is_taken_up_again(program, undisturbed):
    """Only what is missing is computed, and the tables are the same bytes."""
    assert program.stop("part 4", signal.SIGKILL)[0] == -signal.SIGKILL
    assert program.computed() == ["first", "part 0", "part 2", "part 4"]
    assert program.run()[0] == 0
    assert program.computed() == ["part 4", "part 6", "part 8", "part 10", "summary"]
    assert program.tables() == undisturbed
    program.here()
    assert program.computed() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so(program, signum, undisturbed):
    """Ctrl-C, and the signal that a cluster sends at the time limit."""
    code, said = program.stop("part 2", signum)
    assert code == 130
    assert said.splitlines()[-1] == "lab: stopped; the same command goes on where it was"
    assert "Traceback" not in said and not program.leftovers()
    program.here()
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
    program.here()
    assert ("is damaged" in capsys.readouterr().err) == (damage != "gone")
    assert program.computed() == ["part 2", "part 6", "part 8", "part 10", "summary"]
    assert program.tables() == undisturbed


def test_shards_in_any_order_equal_one_run(program, undisturbed, capsys):
    """A shard that leaves parts to others ends well; the last one assembles."""
    for shard in ("2/3", "0/3"):
        assert guarded(lambda s=shard: program.here("--shard", s)) == 0
        assert "this shard is done" in capsys.readouterr().err
        assert not (program.folder / "squares.csv").exists()
    program.computed()
    program.here("--shard", "1/3")
    assert program.computed() == ["part 2", "part 8", "summary"]
    assert program.tables() == undisturbed


def test_shards_at_once_equal_one_run(program, undisturbed):
    """Whoever finds all parts assembles; a stage before them is computed by one shard only."""
    started = [program.start("--shard", f"{i}/2") for i in range(2)]
    for process in started:
        assert process.wait(timeout=60) == 0, process.communicate()
    program.here()
    assert program.tables() == undisturbed
    assert sorted(program.computed()) == sorted(EVERYTHING)


def test_a_second_run_waits_for_a_stage(program, undisturbed):
    """It is not computed twice; and whoever waits goes on when the first one is killed."""
    first = program.until_waiting(program.start(wait="first"))
    second = program.start()
    assert "another process is at first.csv; waiting for it" in second.stderr.readline()
    assert program.computed() == ["first"]
    first.kill()
    assert second.wait(timeout=60) == 0, second.communicate()
    assert program.computed() == EVERYTHING and program.tables() == undisturbed


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


def test_a_folder_that_cannot_be_made_is_one_line(program, capsys):
    program.outputs.write_text("in the way")
    code, line = code_and_line(lambda: program.here(), capsys)
    assert code == 1 and str(program.outputs) in line


def test_a_bug_keeps_its_traceback(program):
    """Also one about files, which is no error of the disk."""
    with pytest.raises(FileNotFoundError, match="no such file"):
        program.here("--wrong")
