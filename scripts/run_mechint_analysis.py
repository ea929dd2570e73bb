"""Which key and value channels does a checkpoint need? One analysis, in one folder.

    .venv/bin/python scripts/run_mechint_analysis.py --checkpoint model_v0.pt --steps 500
    .venv/bin/python scripts/run_mechint_analysis.py --visualize-only mechint_analysis_wiki_smol

It runs experiment 022 on one data set (`./lab run 022` is the same with several) and writes the
known files into the output folder: report, figures, tables, masks. A killed run goes on from where
it was. Any other setting of 022 can be added as it is, such as `--resolution head` or `--quick`
(`./lab run 022 --help` lists them).
"""

import argparse
import hashlib
import signal
import sys
from pathlib import Path

from lens_utils import provenance
from lens_utils.console import guarded, say
from lens_utils.errors import BadInput

EXPERIMENT = provenance.EXPERIMENTS / "022_kv_circuits"
PASSED = ("tokens", "target_sparsity", "sparsities", "steps", "lr", "seeds")


def parser() -> argparse.ArgumentParser:
    """The flags its users know."""
    raw = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    add = flags.add_argument
    add("--checkpoint", default="smol", help="HF folder, .safetensors, .pt in nanoGPT or GPT-2 "
        "layout, or a name from ./lab models (default: the embedded model)")  # fmt: skip
    add("--dataset", default="docstrings", help="a corpus, a text file, or a task")
    add("--tokens", default="", help="token ids (.npy, .bin) instead of a data set")
    add("--output-dir", type=Path, help="default: mechint_analysis_<dataset>_<checkpoint>")
    add("--target-sparsity", default="0.95", help="share of units switched off")
    add("--sparsities", default="0.5,0.8", help="others, for the frontier")
    add("--steps", default="500")
    add("--lr", default="0.01")
    add("--seeds", default="1", help="masks learned at the target, for error bars")
    add("--visualize-only", type=Path, metavar="DIR", help="draw a finished folder again")
    add("--wandb", choices=("off", "offline", "online"), default="off")
    add("--no-wandb", action="store_const", dest="wandb", const="off")
    add("--project", help="Weights & Biases project")
    return flags


def analyse(args: argparse.Namespace, others: list[str]) -> Path:
    """Run 022 for one data set and publish it; the folder."""
    sys.path.insert(0, str(EXPERIMENT))
    from run import Config, main  # 022's

    from lens_utils.experiment import execute
    from lens_utils.results import Results

    dataset = "tokens" if args.tokens else args.dataset
    known = {name: getattr(args, name) for name in PASSED}
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in known.items() if value]
    settings += [f"--datasets={dataset}", *(o for o in others if o != "--fresh")]
    # Every choice of settings has a run of its own, so that none is ever refused.
    tag = hashlib.sha256("\0".join(settings).encode()).hexdigest()[:8]
    fresh = ["--fresh"] if "--fresh" in others else []
    asked = [f"--model={args.checkpoint}", *settings, f"--tag=mechint-{tag}", *fresh]
    run = execute(Config, main, EXPERIMENT / "run.py", asked)
    from kv_publish import publish
    from kv_study import Study

    name = Path(args.checkpoint).stem
    folder = args.output_dir or Path(f"mechint_analysis_{dataset}_{name}")
    publish(Results(run.folder), Study(run.cfg, run).units, dataset, folder, name)
    return folder


def work(args: argparse.Namespace, others: list[str]) -> None:
    """Analyse or draw again, then send where it was asked to."""
    from lens_utils import kv_pages, kv_runs, tracking

    if args.visualize_only and others:
        raise BadInput(f"--visualize-only only draws: leave {others[0]} out")
    folder = args.visualize_only or analyse(args, others)
    written = kv_pages.write(folder)
    if kv_pages.is_old(folder):
        say(f"{folder} has masks of the first plan only: {len(written)} maps drawn")
        return
    metrics = kv_runs.read(folder, "metrics.json")
    if args.wandb != "off":
        tracker = tracking.start(args.wandb, folder, metrics["name"], args.project, metrics)
        kv_pages.track(folder, tracker)
        tracker.close()
    say(f"{folder}: {metrics['verdict']}")
    say(f"{len(written)} files drawn, such as {written[0]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    known, rest = parser().parse_known_args()
    raise SystemExit(guarded(lambda: work(known, rest)))
