"""Files come back as they were written, whole or not at all, also on a full disk."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import toys
from toys import Config, code_and_line

from lens_utils import files
from lens_utils.console import guarded
from lens_utils.errors import Failure
from lens_utils.experiment import Results, Run


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Callable[..., Run]:
    return toys.experiment(tmp_path, monkeypatch)


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
    x = torch.tensor(numbers)
    return {".json": numbers.tolist(), ".md": "x" * 900_000, ".csv": frame, ".parquet": frame,
            ".npz": {"x": numbers}, ".safetensors": {"x": x}}[suffix]  # fmt: skip


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


def test_a_read_only_disk_is_one_line(toy, small_disk, monkeypatch, capsys):
    monkeypatch.setenv("LAB_OUTPUTS", str(small_disk))
    toy(lambda cfg, run: run.stage("a.json", lambda: 1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for args in ([], ["--tag", "x"], ["--fresh"]):
        code, line = code_and_line(lambda a=args: toy(lambda cfg, run: None, *a), capsys)
        assert code == 1 and "Read-only file system" in line and str(small_disk) in line


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
