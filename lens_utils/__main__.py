"""./lab: the laboratory's commands.

./lab run                      every experiment at its quick size on the embedded model, with
                               figures and findings: the main job
./lab run 001 --model NAME     one experiment, any model, any setting (./lab run 001 --help)
./lab run 001-004 007          several, in the order of what they read from each other
./lab figures [001 ...]        draw the figures of finished runs
./lab report [001 ...]         rewrite the results blocks of analyses.md, README and NOTES
./lab list                     the experiments, their questions and their runs
./lab models                   what can be loaded, and what is on this machine
./lab fetch NAME ...           bring models and benchmarks here (the one command that downloads)
./lab chat [--prompt TEXT]     talk to a model (experiment 000)
./lab submit 001 --shards 8    run on a SLURM cluster: an array of shards and their merge
./lab new 023_name             a working skeleton of an experiment
./lab test [PYTEST ARGS]       the test suite
"""

import ast
import datetime
import graphlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lens_utils import (
    cluster,
    notebook,
    problems,
    provenance,
    registry,
    report,
    skeleton,
    weights,
)
from lens_utils.console import guarded, say
from lens_utils.errors import BadInput
from lens_utils.experiment import execute
from lens_utils.results import Results, runs
from lens_utils.settings import configure


def experiments() -> list[Path]:
    """The experiments' folders, by number."""
    return sorted(p.parent for p in provenance.EXPERIMENTS.glob("[0-9][0-9][0-9]_*/run.py"))


def choose(names: Sequence[str]) -> list[Path]:
    """Experiments named as 005, 001-004 or 005_head_phiid; upstream ones first."""
    every = experiments()
    chosen: set[Path] = set() if names else set(every)
    for name in names:
        span = re.fullmatch(r"(\d{3})-(\d{3})", name)
        first, last = span.groups() if span else (name[:3], name[:3])
        found = [p for p in every if first <= p.name[:3] <= last]
        if not (span or re.fullmatch(r"\d{3}(_\w+)?", name)) or not found:
            raise BadInput(f"no experiment {name!r}: ./lab list shows what there is")
        if not span and len(name) > 3 and name != found[0].name:
            raise BadInput(f"no experiment {name!r}: {name[:3]} is {found[0].name}")
        chosen |= set(found)
    by_name = {p.name: p for p in chosen}
    order = graphlib.TopologicalSorter(
        {
            name: [r for r in sorted(reads(by_name[name])) if r in by_name]
            for name in sorted(by_name)
        }
    )
    return [by_name[name] for name in order.static_order()]


def reads(experiment: Path) -> set[str]:
    """What an experiment reads from others: READS in its run.py, found without running it."""
    for node in ast.parse((experiment / "run.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "READS":
            return set(ast.literal_eval(node.value))
    return set()


def load(experiment: Path) -> ModuleType:
    """An experiment's run.py as a module, with what lies beside it importable."""
    sys.path.insert(0, str(experiment))
    spec = importlib.util.spec_from_file_location(f"run_{experiment.name}", experiment / "run.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Experiments come first, then the flags, as they were typed."""
    at = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    return list(args[:at]), list(args[at:])


def run(args: list[str]) -> int:
    names, flags = split(args)
    chosen = choose(names)
    modules = {experiment: load(experiment) for experiment in chosen}
    if not names and "--quick" not in flags:
        flags = ["--quick", *flags]
    for experiment, module in modules.items():  # a wrong flag stops here, not after an hour
        configure(module.Config, module.main, experiment / "run.py", flags)
    if not names_model(flags):
        embedded()
    codes = [0]
    for experiment, module in modules.items():
        codes.append(guarded(lambda e=experiment, m=module: run_one(e, m, flags)))
        if codes[-1] == 130:
            break
    return max(codes)


def run_one(experiment: Path, module: ModuleType, flags: list[str]) -> None:
    """Measure, draw, report."""
    done = execute(module.Config, module.main, experiment / "run.py", flags)
    results = Results(done.folder)
    if not results.finished:
        return
    drawn = notebook.draw(results)
    pages = report.write_all([experiment], experiments())
    say(f"{experiment.name}: {', '.join([provenance.shown(done.folder), drawn, *pages])}")


def names_model(flags: Sequence[str]) -> bool:
    """Whether a model is asked for, rather than the embedded one."""
    return any(flag == "--model" or flag.startswith("--model=") for flag in flags)


def embedded() -> None:
    """The embedded model, fetched the first time."""
    if not weights.present(registry.SMOL):
        say("fetching the embedded model (about 100 MB, once)")
        weights.fetch(registry.SMOL)


def figures(args: list[str]) -> int:
    found = [r for e in choose(args) for r in runs(provenance.outputs() / e.name) if r.finished]
    if not found:
        say("no finished run to draw: ./lab run makes one")
    for results in found:
        say(f"{provenance.shown(results.folder)}: {notebook.draw(results)}")
    return 0


def findings(args: list[str]) -> int:
    changed = report.write_all(choose(args), experiments())
    say(f"rewritten: {', '.join(changed)}" if changed else "every block is up to date")
    return 0


def show(args: list[str]) -> int:
    for experiment in experiments():
        tree = ast.parse((experiment / "run.py").read_text(encoding="utf-8"))
        title, _, rest = (ast.get_docstring(tree) or experiment.name).partition("\n")
        print(f"{title}\n    {' '.join(rest.split('Findings:')[0].split())}")
        if needs := reads(experiment):
            print(f"    reads {', '.join(sorted(needs))}")
        for results in runs(provenance.outputs() / experiment.name):
            print(f"    · {state(results)}")
        print()
    return 0


def state(results: Results) -> str:
    """One run in a line: finished or how far, and how old."""
    parts = list((results.folder / "parts").glob("*/*of*"))
    latest = max(p.stat().st_mtime for p in [results.folder / "manifest.json", *parts])
    age = datetime.datetime.now() - datetime.datetime.fromtimestamp(latest)
    old = (
        f"{age.days} days" if age.days else f"{age.seconds // 3600} h {age.seconds // 60 % 60} min"
    )
    if results.finished:
        return f"{results.variant}: finished {old} ago"
    done = f"{len(results.manifest['stages'])} stages and {len(parts)} parts on disk"
    return f"{results.variant}: unfinished, {done}, last change {old} ago"


def models(args: list[str]) -> int:
    for spec in registry.SPECS.values():
        where = "here" if weights.present(spec) else "gated" if spec.gated else ""
        print(f"{spec.name:30} {where:6} {spec.source:44} {spec.licence:26} {spec.about}")
    print("\nA hub id (org/name), Hugging Face folder, .gguf file or GPT-2 checkpoint works, too;")
    print("name@revision takes another revision. ./lab fetch NAME brings a model here.")
    print(f"Benchmarks, fetched in the same way: {', '.join(problems.SOURCES)}.")
    return 0


def fetch(args: list[str]) -> int:
    if not args:
        raise BadInput("say which model: ./lab fetch NAME (./lab models lists them)")
    for name in args:
        if name in problems.SOURCES:
            say(f"{name} is in {problems.fetch(name)}")
            continue
        spec = registry.resolve(name)
        if spec.licence and not spec.licence.startswith(("Apache", "MIT")):
            say(f"{spec.name}: using it means accepting its licence, {spec.licence}")
        say(f"{spec.name} is in {weights.fetch(spec)}")
    return 0


def chat(args: list[str]) -> int:
    if not names_model(args) and not asks_help(args):
        embedded()
    module = load(choose(["000"])[0])
    execute(module.Config, module.main, Path(module.__file__), ["--interactive", *args])
    return 0


def submit(args: list[str]) -> int:
    names, flags = split(args)
    if not names:
        raise BadInput("say which experiments: ./lab submit 001 --model NAME --shards 8")
    own, sbatch, shards = cluster.divide(flags)
    jobs = []
    for experiment in choose(names):
        module = load(experiment)
        jobs.append((experiment, configure(module.Config, module.main, experiment / "run.py", own)))
    for line in cluster.submit(jobs, reads, own, sbatch, shards):
        say(line)
    return 0


def new(args: list[str]) -> int:
    if len(args) != 1:
        raise BadInput("give it a number and a name: ./lab new 023_name")
    for path in skeleton.write(args[0], experiments()):
        say(f"wrote {provenance.shown(path)}")
    report.write_all([], experiments())
    say(f"next: ./lab run {args[0][:3]} --quick")
    return 0


def test(args: list[str]) -> int:
    embedded()
    os.chdir(provenance.ROOT)
    if not args:  # the whole suite: a process for each core, of one thread, as threads would spin
        os.environ["OMP_NUM_THREADS"] = "1"
        args = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *args])


COMMANDS = {"run": run, "figures": figures, "report": findings, "list": show, "models": models,
            "fetch": fetch, "chat": chat, "submit": submit, "new": new, "test": test}  # fmt: skip


def asks_help(args: Sequence[str]) -> bool:
    return "-h" in args or "--help" in args


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's time limit, as Ctrl-C
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    name, *args = sys.argv[1:] or ["help"]
    if name not in (*COMMANDS, "-h", "--help", "help"):
        say(f"no command {name!r}: ./lab --help lists them")
        return 2
    # `run 001 --help` and `chat --help` are the experiment's own; the rest is told here.
    own = name == "chat" or (name == "run" and args and not args[0].startswith("-"))
    if name not in COMMANDS or (asks_help(args) and not own):
        return guarded(lambda: print(__doc__))
    codes: list[int] = []
    return guarded(lambda: codes.append(COMMANDS[name](args))) or max(codes, default=0)


if __name__ == "__main__":
    raise SystemExit(main())
