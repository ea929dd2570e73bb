"""Draw a run's figures: its experiment's notebook, executed by papermill on the run's folder."""

import hashlib
import json
from pathlib import Path

from lens_utils import files, provenance
from lens_utils.errors import Failure
from lens_utils.experiment import Results

HINT = "for PNG install Chrome or Chromium (Debian: apt install chromium)"


def draw(results: Results) -> str:
    """Execute the notebook unless its figures are of this very run; one line on what happened.

    The executed notebook is figures.ipynb in the run's folder. Raises Failure naming the cell.
    """
    source = provenance.NOTEBOOKS / f"{results.folder.parent.name}.ipynb"
    if not source.exists():
        return "has no notebook"
    note = results.folder / "figures" / "drawn.json"
    stamp = _drawn_from(source, results)
    if note.exists() and files.read(note)["from"] == stamp:
        return "figures are up to date"
    import papermill
    from papermill.exceptions import PapermillExecutionError

    target = results.folder / "figures.ipynb"
    try:
        # Papermill writes the notebook as far as it came also when a cell fails.
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters={"run_dir": str(results.folder)},
            kernel_name="python3",
            language="python",
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],
        )
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        raise Failure(f"notebook {source.name}, cell {error.cell_index}: {error.ename}: "
                      f"{error.evalue} (see {provenance.shown(target)})") from None  # fmt: skip
    files.write(note, {"from": stamp})
    pages = list(note.parent.glob("*.html"))
    done = f"{len(pages)} figures drawn"
    return done if all(p.with_suffix(".png").exists() for p in pages) else f"{done}; {HINT}"


def _drawn_from(source: Path, results: Results) -> str:
    """A digest of all that the figures show and are made with."""
    # They show the runs of other models too, look as viz makes them, and are PNG with a browser.
    drawn_from = [files.sha256(source), files.sha256(provenance.ROOT / "lens_utils" / "viz.py")]
    drawn_from.append("PNG" if browser() else "HTML")
    for run in results.peers():
        drawn_from += [run.variant, *(s["sha256"] for s in run.manifest["stages"].values())]
    return hashlib.sha256(json.dumps(drawn_from).encode()).hexdigest()


def browser() -> bool:
    """Whether there is a browser to make PNG with."""
    from choreographer.browsers.chromium import Chromium

    found = Chromium.find_browser(skip_local=False)
    return found is not None and Path(found).exists()
