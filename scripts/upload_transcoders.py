"""Publish the release folder of a finished run of experiment 018 on the Hugging Face hub.

    python scripts/upload_transcoders.py --model smol --repo you/smollm2 --dry-run

Nothing else of the lab sends anything out. A dry run says what would be sent, and sends nothing;
the other needs a token (`hf auth login`).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lens_utils import provenance  # noqa: E402
from lens_utils.console import guarded, say  # noqa: E402
from lens_utils.errors import BadInput, Failure  # noqa: E402

NEEDED = ("config.yaml", "README.md", "metrics.json")


@dataclass
class Upload:
    """What to publish, and where."""

    repo: str
    """owner/name on the hub."""
    model: str = "maze-organism"
    """The run's folder in outputs/018_transcoders, such as smol."""
    private: bool = False
    """Make the repository private."""
    dry_run: bool = False
    """Only say what would be sent."""


def main(asked: Upload) -> None:
    """Raises BadInput for a run without a release, and Failure where the hub refuses."""
    folder = provenance.outputs() / "018_transcoders" / asked.model / "release"
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if missing := [name for name in NEEDED if not (folder / name).exists()]:
        raise BadInput(f"{provenance.shown(folder)} has no {missing[0]}: finish the run first "
                       f"(./lab run 018 --model {asked.model})")  # fmt: skip
    if asked.repo.count("/") != 1:
        raise BadInput(f"--repo {asked.repo}: write it as owner/name")
    size = sum(path.stat().st_size for path in found) / 2**20
    say(f"{len(found)} files, {size:,.1f} MB of {provenance.shown(folder)} for {asked.repo}")
    for path in found:
        print(path.relative_to(folder))
    if asked.dry_run:
        say("a dry run: nothing was sent")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(asked.repo, private=asked.private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=asked.repo)
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise Failure(f"the hub took nothing: {str(error).strip().partition(chr(10))[0]}") from None
    say(f"published: https://huggingface.co/{asked.repo}")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(tyro.cli(Upload))))
