"""Compare two or more analysed runs of K/V masks (experiment 022).

    .venv/bin/python scripts/compare_mechint_variants.py --v0 DIR --v1 DIR --output DIR
    .venv/bin/python scripts/compare_mechint_variants.py --variant plain=DIR --variant tied=DIR \
        --variant wide=DIR --baseline plain --output DIR

A DIR is the folder of one analysed run. The baseline is the first variant unless it is named.
"""

import argparse
import sys
from pathlib import Path

from lens_utils import console, kv_variants
from lens_utils.errors import BadInput


def chosen(args: argparse.Namespace) -> dict[str, Path]:
    """The folders by name, in the order of the command."""
    pairs = [(name, folder) for name, folder in (("V0", args.v0), ("V1", args.v1)) if folder]
    for said in args.variant:
        name, equals, folder = said.partition("=")
        if not (name and equals and folder):
            raise BadInput(f"--variant {said}: write it as NAME=DIR")
        pairs.append((name, folder))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise BadInput(f"two variants of one name: {', '.join(names)}")
    return {name: Path(folder) for name, folder in pairs}


def main() -> None:
    about = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about.add_argument("--v0", metavar="DIR", help="the run called V0")
    about.add_argument("--v1", metavar="DIR", help="the run called V1")
    about.add_argument("--variant", metavar="NAME=DIR", action="append", default=[],
                       help="a run by a name of its own; may be given again")  # fmt: skip
    about.add_argument("--baseline", metavar="NAME", help="the variant the others are held against")
    about.add_argument("--output", metavar="DIR", default="variant_comparison")
    about.add_argument("--wandb", choices=("off", "offline", "online"), default="off")
    about.add_argument("--no-wandb", action="store_const", const="off", dest="wandb")
    about.add_argument("--project", metavar="NAME", help="the project's name at Weights & Biases")
    args = about.parse_args()
    table = kv_variants.compare_variants(
        chosen(args), args.output, args.project, args.wandb, args.baseline
    )
    shown = table[["variant", "loss_degradation", "faithfulness", "sparsity"]]
    print(shown.to_string(index=False, float_format="{:.4f}".format))
    print(f"written to {args.output}")


if __name__ == "__main__":
    sys.exit(console.guarded(main))
