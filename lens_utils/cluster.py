"""SLURM: the shards of a run as a job array, and the merge that assembles them.

The jobs are the same commands that run without a cluster: shard i is `./lab run NNN --shard i/n`,
the merge is `./lab run NNN`, which also finishes what a shard that was stopped left undone.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lens_utils import files, provenance, registry, weights
from lens_utils.errors import BadInput, Failure
from lens_utils.settings import BaseConfig

Reads = Callable[[Path], set[str]]


def divide(flags: Sequence[str]) -> tuple[list[str], list[str], int]:
    """The experiment's flags, sbatch's flags (what stands behind --) and the number of --shards."""
    at = list(flags).index("--") if "--" in flags else len(flags)
    own, sbatch = list(flags[:at]), list(flags[at + 1 :])
    own = [word for flag in own for word in (
        flag.split("=", 1) if flag.startswith("--shards=") else [flag])]  # fmt: skip
    if "--shards" not in own:
        return own, sbatch, 1
    at = own.index("--shards")
    value = own[at + 1] if at + 1 < len(own) else ""
    if not value.isdecimal() or int(value) < 1:
        raise BadInput(f"--shards {value}: give the number of array tasks, such as 8")
    return own[:at] + own[at + 2 :], sbatch, int(value)


def submit(
    jobs: Sequence[tuple[Path, BaseConfig]],
    reads: Reads,
    own: Sequence[str],
    sbatch: Sequence[str],
    shards: int,
) -> Iterator[str]:
    """Write the submission script and, where there is sbatch, run it; yields what happened.

    Raises BadInput for what would fail in the queue: each array task would see --fresh or --shard,
    and compute nodes have no internet to fetch a model.
    """
    for _, cfg in jobs:
        if cfg.shard:
            raise BadInput("submit makes the shards itself: give --shards N")
        if cfg.fresh:
            raise BadInput("--fresh would start over in every job: delete the run's folder first")
        weights.locate(registry.resolve(cfg.model))
    chosen = [experiment for experiment, _ in jobs]
    name = "-".join([*(e.name[:3] for e in chosen), jobs[0][1].variant])
    path = provenance.outputs() / "slurm" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.sh"
    files.write_bytes(path, script(chosen, reads, own, sbatch, shards).encode())
    yield f"wrote {provenance.shown(path)}"
    if shutil.which("sbatch") is None:
        yield f"there is no sbatch here: on a login node, run bash {shlex.quote(str(path))}"
        return
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    yield from done.stdout.strip().splitlines()
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise Failure(f"sbatch refused: {reason} (the script is {provenance.shown(path)})")


def script(
    chosen: Sequence[Path], reads: Reads, own: Sequence[str], sbatch: Sequence[str], shards: int
) -> str:
    """The text of the submission script."""
    job = provenance.ROOT / "slurm" / "run.sh"
    logs = provenance.outputs() / "slurm" / "%x-%j.out"
    base = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", f"--chdir={provenance.ROOT}",
            f"--output={logs}"]  # fmt: skip
    names = {e.name for e in chosen}
    lines = ["#!/bin/bash", "# Written by ./lab submit. Array of shards, then the merge.",
             "set -euo pipefail"]  # fmt: skip
    for e in chosen:
        number = e.name[:3]
        # Quoted but for the job ids, which the shell fills in.
        before = [f"${{merge_{up[:3]}}}" for up in sorted(reads(e) & names)]
        after = f" --dependency=afterok:{':'.join(before)}" if before else ""
        command = shlex.join([str(job), number, *own])
        common = shlex.join([*base, f"--job-name=lab-{number}", *sbatch])
        if shards > 1:
            lines.append(f"array_{number}=$({common}{after} --array=0-{shards - 1} {command})")
            after = f" --dependency=afterany:${{array_{number}}}"
        lines.append(f"merge_{number}=$({common}{after} {command})")
        array = f"array ${{array_{number}}}, then " if shards > 1 else ""
        lines.append(f'echo "{e.name}: {array}job ${{merge_{number}}}"')
    return "\n".join(lines) + "\n"
