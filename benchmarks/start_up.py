"""Start-up: what a user waits for before anything is computed.

Claims: `./lab list` and every --help under 1 CPU second, without importing torch; a second
`./lab run` with nothing changed under 10 seconds of wall time (run `./lab run` once before).

    .venv/bin/python benchmarks/start_up.py
"""

import os
import subprocess
import sys
import time

from lens_utils import provenance

LAB = [sys.executable, "-m", "lens_utils"]


def cost(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a command and its children."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system
    return cpu - before.children_user - before.children_system, time.perf_counter() - start


def main() -> None:
    experiments = sorted(p.parent.name for p in provenance.EXPERIMENTS.glob("*/run.py"))
    commands = [["list"], ["--help"], ["models"], ["chat", "--help"]]
    commands += [["run", name[:3], "--help"] for name in experiments]
    for command in commands:
        cpu, _ = cost([*LAB, *command])
        print(f"{cpu:6.2f} CPU s   ./lab {' '.join(command)} (claim: < 1)")
    cpu, wall = cost([*LAB, "run"])
    print(f"{cpu:6.2f} CPU s, {wall:.1f} s   ./lab run, again (claim: < 10 s)")


if __name__ == "__main__":
    main()
