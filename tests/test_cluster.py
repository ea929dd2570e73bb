"""./lab submit: the script it writes, and what a real cluster of one node makes of it."""

import shlex
import subprocess
import time
from pathlib import Path

import pytest
import repo_copy
import slurm_cluster
import toys
from toys import code_and_line

from lens_utils import __main__ as lab
from lens_utils import cluster, provenance

EXPERIMENTS = [Path("experiments/005_e"), Path("experiments/006_f"), Path("experiments/009_i")]
READS = {"005_e": set(), "006_f": {"005_e", "001_a"}, "009_i": {"006_f", "005_e"}}


def commands(*flags: str, chosen: int = 3) -> dict[str, list[str]]:
    """The sbatch commands of a script as words, by the variable that takes the job's id."""
    own, sbatch, shards = cluster.divide(flags)
    text = cluster.script(EXPERIMENTS[:chosen], lambda e: READS[e.name], own, sbatch, shards)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    lines = [line.partition("=$(") for line in text.splitlines() if "=$(" in line]
    return {name: shlex.split(command[:-1]) for name, _, command in lines}


def test_an_array_of_shards_and_their_merge():
    found = commands("--model", "qwen3-8b", "--shards", "8", chosen=1)
    assert list(found) == ["array_005", "merge_005"]
    array, merge = found.values()
    assert "--array=0-7" in array and not [w for w in merge if "--array" in w]
    # The merge also finishes what a shard that was stopped left undone.
    assert "--dependency=afterany:${array_005}" in merge
    own = [str(provenance.ROOT / "slurm" / "run.sh"), "005", "--model", "qwen3-8b"]
    assert array[-4:] == merge[-4:] == own


def test_experiments_wait_for_what_they_read():
    """Only for those submitted with them: the others are there, or the run says they are not."""
    found = commands("--shards=2")
    assert not [w for w in found["array_005"] if "--dependency" in w]
    assert "--dependency=afterok:${merge_005}" in found["array_006"]
    assert "--dependency=afterok:${merge_005}:${merge_006}" in found["array_009"]
    assert list(commands()) == ["merge_005", "merge_006", "merge_009"]


def test_words_stay_whole_and_sbatch_gets_its_own():
    found = commands(
        "--tag", "two words; $(rm)", "--", "--partition=gpu", "--comment=a b", chosen=1
    )
    merge = found["merge_005"]
    at = merge.index(str(provenance.ROOT / "slurm" / "run.sh"))
    assert merge[at + 1 :] == ["005", "--tag", "two words; $(rm)"]
    assert {"--partition=gpu", "--comment=a b", "--kill-on-invalid-dep=yes"} <= set(merge[:at])


@pytest.mark.parametrize(
    "flags", [["--shards"], ["--shards", "x"], ["--shards", "0"], ["--shards="]]
)
def test_wrong_shards(flags, capsys):
    code, line = code_and_line(lambda: cluster.divide(flags), capsys)
    assert code == 2 and "--shards" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--fresh", "--shards", "2"], "--fresh"), (["--shard", "0/2"], "--shards N"),
     (["--model", "no-such"], "no model 'no-such'"),
     (["--model=org/not-here"], "./lab fetch org/not-here")],
)  # fmt: skip
def test_what_would_fail_in_the_queue_is_said_before(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    code, line = code_and_line(lambda: lab.submit(["001", *flags]), capsys)
    assert code == 2 and said in line
    assert not (tmp_path / "outputs").exists()


def test_without_sbatch_the_script_waits_for_a_login_node(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "out puts"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("lens_utils.weights.locate", lambda spec: None)
    assert lab.submit(["001", "--tag", "a b", "--model=org/x"]) == 0
    said = capsys.readouterr().err
    path = tmp_path / "out puts" / "slurm" / "001-org--x-a_b.sh"
    assert path.exists() and f"run bash {shlex.quote(str(path))}" in said


# A real cluster

FAILS = '''"""997 · Fails"""
from lens_utils.errors import BadInput
from lens_utils.experiment import BaseConfig as Config, launch

def main(cfg, run):
    raise BadInput("always")
'''


@pytest.mark.slurm
@pytest.mark.skipif(not slurm_cluster.possible(), reason="no SLURM here, or not root")
def test_a_real_cluster(tmp_path):
    """Three shards, one stopped in the middle: the merge ends in the bytes of an undivided run.

    And what reads a run that failed does not wait in the queue for ever.
    """
    copy = repo_copy.copy(tmp_path / "a copy")
    toy, waiting = toys.program(tmp_path), tmp_path / "log.waiting"
    texts = {"999_toy": toy.source.read_text(), "997_fails": FAILS,
             "998_reads": FAILS + "READS = ('997_fails',)"}  # fmt: skip
    for name, text in texts.items():
        (copy / "experiments" / name).mkdir()
        (copy / "experiments" / name / "run.py").write_text(text)
    with slurm_cluster.cluster() as env:
        env = repo_copy.environment() | env | toy.env(TOY_WAIT="part 2")
        del env["LAB_OUTPUTS"]

        def run(*command: str) -> str:
            done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        def until(condition, seconds: int) -> None:
            end = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < end, run("squeue")
                time.sleep(0.5)

        said = run("./lab", "submit", "999", "--shards", "3", "--tag", "a b")
        assert "999_toy: array 1, then job 2" in said
        until(waiting.exists, 60)
        run("scancel", "--signal=TERM", "--full", "1_1")
        run("./lab", "submit", "997", "998")
        until(lambda: not run("squeue", "--noheader"), 120)
        waiting.touch()
        run("./lab", "run", "999", "--model", "smol")

    logs = {p.name: p.read_text() for p in (copy / "outputs" / "slurm").glob("*.out")}
    divided, whole = (copy / "outputs" / "999_toy" / name for name in ("smol-a b", "smol"))
    for name in toys.TABLES:
        assert (divided / name).read_bytes() == (whole / name).read_bytes(), logs
    assert sum("stopped; the same command" in text for text in logs.values()) == 1
    # Each part by its own shard, the stopped shard's two by the merge; then the undivided run.
    assert sorted(toy.computed()) == sorted([*toys.EVERYTHING, *toys.EVERYTHING, "part 2"])
    assert any("lab: always" in text for text in logs.values())
    assert not (copy / "outputs" / "998_reads").exists()
