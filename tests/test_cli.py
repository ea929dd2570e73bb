"""./lab: what each command says, in which order it works, what it refuses; and the launcher."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import repo_copy
from toys import code_and_line

import lens_utils.__main__ as lab
import lens_utils.provenance as provenance
from lens_utils.errors import BadInput

HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "numpy", "plotly", "papermill")
LAB = ["-m", "lens_utils"]
HELP = {
    "no command": LAB,
    "--help": [*LAB, "--help"],
    "list": [*LAB, "list"],
    "models": [*LAB, "models"],
    **{f"{name} --help": [*LAB, name, "--help"] for name in lab.COMMANDS},
    **{f"run {e.name[:3]} --help": [*LAB, "run", e.name, "-h"] for e in lab.experiments()},
    **{f"{e.name}/run.py": [str(e / "run.py"), "--help"] for e in lab.experiments()},
}


@pytest.mark.parametrize("args", HELP.values(), ids=HELP.keys())
def test_help_comes_at_once(args):
    """Under a second of CPU time, without what takes long to import."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    timed = [sys.executable, "-X", "importtime", *args]
    done = subprocess.run(timed, capture_output=True, text=True, cwd=provenance.ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and done.stdout.strip()
    assert not imported & set(HEAVY)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_every_command_is_in_the_help():
    for name in lab.COMMANDS:
        assert f"./lab {name}" in lab.__doc__


# Choosing experiments

RUN = '''"""{name}

What is it?
"""
from __future__ import annotations
from dataclasses import dataclass
from lens_utils.experiment import BaseConfig, Run, launch

READS = {reads}

@dataclass(frozen=True)
class Config(BaseConfig):
    {name}: int = 1

def main(cfg: Config, run: Run) -> None:
    if cfg.seed == 7 and __name__.endswith("_d"):
        raise KeyboardInterrupt
    for name in READS:
        run.upstream(name, "summary.json")
    run.stage("summary.json", lambda: {{"x": cfg.seed}})
'''
READS = {"001_a": (), "002_b": ("004_d",), "004_d": ("007_e",), "007_e": ()}


@pytest.fixture
def four(tmp_path, monkeypatch) -> Path:
    """A repository of four experiments; 002 reads 004, which reads 007."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr(provenance, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    for name, reads in READS.items():
        folder = tmp_path / "experiments" / name
        folder.mkdir(parents=True)
        (folder / "run.py").write_text(RUN.format(name=name[4:], reads=reads))
    return tmp_path


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([], ["001", "007", "004", "002"]),
        (["004"], ["004"]),
        (["002", "004"], ["004", "002"]),
        (["001-004"], ["001", "004", "002"]),
        (["002_b", "007"], ["002", "007"]),
        (["002", "002"], ["002"]),
    ],
)
def test_experiments_are_chosen_and_ordered_by_what_they_read(four, names, chosen):
    found = [path.name[:3] for path in lab.choose(names)]
    assert sorted(found) == sorted(chosen)
    for reader, source in (("002", "004"), ("004", "007")):
        if {reader, source} <= set(found):
            assert found.index(source) < found.index(reader)


@pytest.mark.parametrize("name", ["003", "7", "abc", "002_x", "004-002", "005-006", "001-", "002_"])
def test_what_is_no_experiment(four, name, capsys):
    code, line = code_and_line(lambda: lab.choose([name]), capsys)
    assert code == 2 and repr(name) in line


def test_run_works_in_order(four, capsys):
    assert lab.run(["001-007", "--model", "m"]) == 0
    said = capsys.readouterr().err
    assert said.index("007_e: ") < said.index("004_d: ") < said.index("002_b: ")
    assert "outputs/004_d/m, has no notebook" in said


def test_run_without_names_is_the_quick_size(four):
    lab.run(["--model", "m"])
    assert sorted(p.parent.name for p in (four / "outputs").glob("*/*/summary.json")) == 4 * [
        "m-quick"
    ]


def test_one_failure_is_the_exit_code(four, capsys):
    """The others run; what reads the missing one says so."""
    (four / "experiments" / "007_e" / "run.py").write_text(
        RUN.format(name="e", reads="('009_gone',)")
    )
    assert lab.run(["--model", "m"]) == 2
    said = capsys.readouterr().err
    assert "./lab run 009 --model m --quick" in said and "./lab run 007" in said
    assert (four / "outputs" / "001_a" / "m-quick" / "summary.json").exists()


def test_a_stop_ends_everything(four):
    assert lab.run(["001-007", "--model", "m", "--seed", "7"]) == 130
    assert (four / "outputs" / "007_e").exists() and not (four / "outputs" / "002_b").exists()


def test_a_flag_that_one_experiment_lacks_stops_before_any_work(four, capsys):
    with pytest.raises(SystemExit) as stopped:
        lab.run(["001", "002", "--model", "m", "--a", "2"])
    assert stopped.value.code == 2 and "--a" in capsys.readouterr().err
    assert not (four / "outputs").exists()


def test_list_shows_questions_and_runs(four, capsys):
    lab.run(["007", "004", "--model", "m"])
    shutil.copytree(four / "outputs" / "007_e", four / "outputs" / "001_a")
    manifest = four / "outputs" / "001_a" / "m" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("summary.json", "x.csv"))
    lab.show([])
    said = capsys.readouterr().out
    assert "004 · " not in said and "What is it?" in said and "reads 007_e" in said
    assert "m: finished 0 h 0 min ago" in said
    assert "m: unfinished, 1 stages and 0 parts on disk" in said


def test_figures_of_no_run(four, capsys):
    assert lab.figures([]) == 0
    assert "no finished run" in capsys.readouterr().err


# Words that are no command


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["frobnicate"], "no command 'frobnicate'"),
        (["frobnicate", "--help"], "no command 'frobnicate'"),
        (["run", "999"], "no experiment '999'"),
        (["fetch"], "say which model"),
        (["fetch", "no-such-model"], "no model 'no-such-model'"),
        (["submit"], "say which experiments"),
        (["new"], "a number and a name"),
        (["new", "demo"], "'demo'"),
        (["new", "001_other"], "001 is taken by 001_layers_and_logits"),
        (["figures", "999"], "no experiment '999'"),
        (["report", "999"], "no experiment '999'"),
    ],
)
def test_what_cannot_be_done_is_one_line(args, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lab", *args])
    assert lab.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_an_unknown_flag_has_no_traceback():
    command = [sys.executable, *LAB, "run", "001", "--frobnicate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--frobnicate" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough():
    command = f"'{sys.executable}' -m lens_utils models | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=provenance.ROOT)
    assert done.stdout.startswith("smol ") and done.stderr == ""


# A new experiment


def test_a_new_experiment_works_untouched(tmp_path):
    """Its quick run, notebook and test pass in a copy of the repository, and so does its layout.

    Without a browser: that is quicker, and then the figures are HTML only.
    """
    copy = repo_copy.copy(tmp_path / "a copy")
    env = repo_copy.environment(BROWSER_PATH="/no/browser", CI="")

    def run(*args: str) -> str:
        done = subprocess.run(["./lab", *args], cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "wrote experiments/023_demo/run.py" in run("new", "023_demo")
    tests = ("test_023_demo.py", "test_experiments.py", "test_layout.py")
    said = run("test", "-q", "-k", "023_demo", *(f"tests/{name}" for name in tests))
    assert "10 passed" in said
    assert "023 · Demo" in run("list")


def test_a_new_name_has_to_be_one(four):
    for name in ("23_demo", "023_Demo", "023-demo", "023_", "../023_demo", "023_demo/x"):
        with pytest.raises(BadInput):
            lab.new([name])
    with pytest.raises(BadInput, match="004 is taken by 004_d"):
        lab.new(["004_demo"])
    lab.new(["023_demo"])
    with pytest.raises(BadInput, match="023 is taken"):
        lab.new(["023_demo"])


# The launcher

PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [ -z "${BREAK:-}" ] ;;
    "-c "*) [ -z "${OLD:-}" ] ;;
    "-m lens_utils") shift 2; printf '<%s>' "$PYTHONPATH" "$@" ;;
esac
"""


@pytest.fixture
def launcher(tmp_path):
    """A folder with ./lab, a stand-in for Python that notes what it is asked, and start()."""
    root, log = tmp_path / "my lab", tmp_path / "log"
    (tmp_path / "bin").mkdir()
    root.mkdir()
    shutil.copy2(provenance.ROOT / "lab", root)
    (root / "requirements.txt").write_text("a==1\n")
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    for version in (11, 12, 13, 14):
        (tmp_path / "bin" / f"python3.{version}").symlink_to(python)

    def start(*args: str, path: Path | str = "./lab", cwd: Path = root, **env: str):
        log.write_text("")
        env = {"LOG": str(log), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **env}
        done = subprocess.run([str(path), *args], cwd=cwd, env=env, capture_output=True, text=True)
        return done, [line for line in log.read_text().splitlines() if line.startswith("-m")]

    return root, start


def test_the_launcher_installs_once(launcher):
    root, start = launcher
    done, asked = start("run", "a b", "--x=*")
    assert done.returncode == 0 and done.stdout == f"<{root}><run><a b><--x=*>"
    assert [a.split()[1] for a in asked] == ["venv", "pip", "pip", "lens_utils"]
    assert "installing" in done.stderr
    done, asked = start("list")
    assert done.stdout == f"<{root}><list>" and done.stderr == ""
    assert [a.split()[1] for a in asked] == ["lens_utils"]
    (root / "requirements.txt").write_text("a==2\n")
    _, asked = start("list")
    assert [a.split()[1] for a in asked] == ["pip", "pip", "lens_utils"]


def test_the_launcher_takes_up_a_failed_installation(launcher):
    root, start = launcher
    done, asked = start("list", BREAK="yes")
    assert done.returncode == 1 and "the installation failed" in done.stderr
    assert not any("lens_utils" in a for a in asked)
    done, asked = start("list")
    assert done.returncode == 0 and [a.split()[1] for a in asked] == ["pip", "pip", "lens_utils"]


def test_the_launcher_makes_a_lost_environment_again(launcher):
    root, start = launcher
    start("list")
    (root / ".venv" / "bin" / "python").unlink()  # as when Python was upgraded away
    done, asked = start("list")
    assert done.returncode == 0
    assert [a.split()[1] for a in asked] == ["venv", "pip", "pip", "lens_utils"]


def test_the_launcher_works_from_anywhere(launcher, tmp_path):
    """From another folder, through a link to a link, with spaces in the path."""
    root, start = launcher
    start("list")
    (tmp_path / "one").symlink_to(root / "lab")
    (root / "sub").mkdir()
    (root / "sub" / "two").symlink_to("../../one")
    for path, cwd in ((root / "lab", tmp_path), ("../one", root), ("sub/two", root)):
        done, asked = start("list", path=path, cwd=cwd)
        assert done.stdout == f"<{root}><list>", done.stderr
        assert len(asked) == 1, "nothing is installed again"


def test_the_launcher_wants_a_recent_python(launcher):
    _, start = launcher
    done, _ = start("list", OLD="yes")
    assert done.returncode == 1 and "no Python 3.11 or newer" in done.stderr


def test_scripts_are_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [provenance.ROOT / "lab", *provenance.ROOT.glob("slurm/*.sh")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
