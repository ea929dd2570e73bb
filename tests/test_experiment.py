"""The experiment contract: what a run keeps, loads and refuses."""

import dataclasses
import types
from collections.abc import Callable

import pandas as pd
import pytest
import toys
from toys import Config, code_and_line

from lens_utils import files
from lens_utils.errors import BadInput
from lens_utils.experiment import Results, Run, execute


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Callable[..., Run]:
    return toys.experiment(tmp_path, monkeypatch)


class Calls(list):
    """Stages that note when they are computed."""

    def stage(self, run: Run, name: str, value: object) -> object:
        return run.stage(name, lambda: self.append(name) or value)


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


def test_a_run_that_is_refused_before_its_first_result_leaves_no_folder(toy):
    def refused(cfg: Config, run: Run) -> None:
        folders.append(run.folder)
        raise BadInput("no such model")

    folders: list = []
    with pytest.raises(BadInput, match="no such model"):
        toy(refused)
    assert not folders[0].exists()
    folder = toy(lambda cfg, run: run.stage("a.json", dict)).folder
    with pytest.raises(BadInput, match="no such model"):
        toy(refused)
    assert files.read(folder / "a.json") == {}, "what there was is kept"


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


def test_a_finished_run_is_not_entered_again(toy, tmp_path):
    """Unless a stage is damaged, the code is another, or what it read has changed."""
    entered = []
    other = tmp_path / "005_other" / "run.py"
    other.parent.mkdir()
    other.write_text("")

    def maker(cfg: Config, run: Run) -> None:
        run.stage("scores.json", lambda: cfg.tau)

    def main(cfg: Config, run: Run) -> None:
        entered.append(run)
        run.stage("read.json", lambda: run.upstream("005_other", "scores.json"))
        run.stage("summary.json", lambda: {"x": 1})

    execute(Config, maker, other, [])
    run = toy(main)
    toy(main)
    assert len(entered) == 1
    (run.folder / "read.json").write_text("7")
    toy(main)
    assert len(entered) == 2 and files.read(run.folder / "read.json") == 1
    execute(Config, maker, other, ["--fresh", "--tau", "2"])
    toy(main)
    assert len(entered) == 3
    (tmp_path / "999_toy" / "run.py").write_text("# another digest")
    toy(main)
    assert len(entered) == 4


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


def test_upstream_of_other_models(toy, tmp_path, capsys):
    """A comparison reads the runs of several models at its own size, and notices their changes."""
    other = tmp_path / "005_other" / "run.py"
    other.parent.mkdir()
    other.write_text("")
    entered = []

    def maker(cfg: Config, run: Run) -> None:
        run.stage("scores.json", lambda: cfg.tau)
        run.stage("summary.json", lambda: {})

    def reader(cfg: Config, run: Run) -> None:
        entered.append(run)
        names = run.models_of("005_other")
        run.stage(
            "read.json", lambda: {n: run.upstream("005_other", "scores.json", n) for n in names}
        )
        run.stage("summary.json", lambda: {})

    execute(Config, maker, other, [])
    execute(Config, maker, other, ["--model", "org/b", "--tau", "2"])
    execute(Config, maker, other, ["--quick", "--model", "c"])
    execute(Config, maker, other, ["--tag", "t", "--model", "d"])
    run = toy(reader)
    assert files.read(run.folder / "read.json") == {"org/b": 2, "smol": 1}
    toy(reader)
    assert len(entered) == 1
    execute(Config, maker, other, ["--model", "org/b", "--tau", "3", "--fresh"])
    toy(reader)
    assert len(entered) == 2

    def asker(cfg: Config, run: Run) -> None:
        run.upstream("005_other", "scores.json", "org/e")

    code, line = code_and_line(lambda: toy(asker, "--tag", "x"), capsys)
    assert code == 2 and "./lab run 005 --model org/e" in line


def test_other_weights_under_the_same_name_are_refused(toy, monkeypatch, capsys):
    """Such as a folder that was trained on, or a hub's main branch that moved."""
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


# The manifest


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
    for damage in ("", "null", '{"stages": {}}'):
        (run.folder / "manifest.json").write_text(damage)
        code, line = code_and_line(lambda: toy(main), capsys)
        assert code == 2 and "manifest.json is damaged" in line and "--fresh" in line
    toy(main, "--fresh")


def test_peers_are_finished_runs_of_the_same_size(toy):
    def main(cfg: Config, run: Run) -> None:
        if cfg.tag != "open":
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
