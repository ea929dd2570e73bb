"""Findings: the generated blocks of analyses.md, README.md and NOTES.md.

The numbers a finding rests on are committed beside it, results/<run>.json, one file per run; the
block in analyses.md is drawn from these files and nothing else. Hand-written text is never touched.
"""

import math
import re
from pathlib import Path
from typing import Any

from lens_utils import files, provenance
from lens_utils.errors import BadInput
from lens_utils.results import runs

BEGIN, END = "<!-- generated: {} -->", "<!-- end -->"
QUICK = "-quick"


def gather(experiment: Path) -> list[str]:
    """Take over the summaries of finished, untagged runs, and the figures analyses.md shows.

    Returns the files that changed, as paths within the experiment.
    """
    changed = []
    for run in runs(provenance.outputs() / experiment.name):
        if not run.finished or run.manifest["tag"]:
            continue
        target = experiment / "results" / f"{run.variant}.json"
        new = {
            "summary": run.read("summary.json"),
            "settings": run.manifest["settings"],
            "models": run.manifest["models"],
        }
        old = files.read(target) if target.exists() else {}
        if any(old.get(key) != value for key, value in new.items()):
            origin = {key: run.manifest[key] for key in ("git", "versions", "machine", "command")}
            files.write(target, new | {"origin": origin})
            changed.append(f"results/{target.name}")
        for name in links(experiment / "analyses.md"):
            figure = name.removeprefix(f"{run.variant}--")
            source, target = run.folder / "figures" / figure, experiment / "figures" / name
            if figure == name or not source.exists():
                continue
            if not target.exists() or target.read_bytes() != source.read_bytes():
                files.write_bytes(target, source.read_bytes())
                changed.append(f"figures/{name}")
    return changed


def links(page: Path) -> list[str]:
    """The figures a page shows, as figures/<run>--<figure>.png, by file name."""
    if not page.exists():
        return []
    return re.findall(r"\]\(figures/([^)]+)\)", page.read_text(encoding="utf-8"))


def block(experiment: Path) -> str:
    """The results table of an experiment: one row per number, one column per run."""
    held = {path.stem: files.read(path) for path in sorted((experiment / "results").glob("*.json"))}
    if not held:
        return "No finished run yet."
    columns = sorted(held, key=lambda n: (n.endswith(QUICK), n.removesuffix(QUICK) != "smol", n))
    labels = dict.fromkeys(label for name in columns for label in held[name]["summary"])
    lines = ["| | " + " | ".join(c.replace(QUICK, " (quick)") for c in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for label in labels:
        cells = [shown(held[name]["summary"].get(label, "")) for name in columns]
        lines.append(f"| {_cell(label)} | " + " | ".join(cells) + " |")
    lines.append("")
    for name in columns:
        model = next(iter(held[name]["models"].values()), {})
        said = [f"{key} `{model[key]}`" for key in ("dtype", "bos", "weights") if model.get(key)]
        commit = held[name]["origin"]["git"] or "no commit"
        source = f"{model.get('source', '')} {str(model.get('sha256', ''))[:12]}".strip()
        about = [source or "from tables of other experiments", ", ".join(said),
                 f"seed {held[name]['settings']['seed']}", f"code {commit}"]  # fmt: skip
        lines.append(f"- {name.replace(QUICK, ' (quick)')}: {'; '.join(filter(None, about))}")
    lines += ["", "Brackets are 95 % bootstrap intervals, n the number of resampled units."]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A number as a reader wants it: three figures, an interval and its n."""
    if isinstance(value, dict):
        if value["n"] == 0:
            return "none (n 0)"
        interval = f"[{shown(value['low'])}, {shown(value['high'])}]"
        return f"{shown(value['value'])} {interval} (n {value['n']})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _cell(str(value))
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 100):
        return f"{value:,.0f}"
    if math.isnan(value):
        return "none"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1000:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.1e}" if abs(value) < 1 else f"{value:,.0f}"


def _cell(text: str) -> str:
    """Text that does not end a table's cell or line."""
    return " ".join(text.split()).replace("|", "&#124;")


def finding(experiment: Path) -> str:
    """The bold finding at the head of an analyses.md, on one line."""
    page = experiment / "analyses.md"
    if not page.exists():
        return ""
    found = re.search(r"\*\*(.+?)\*\*", page.read_text(encoding="utf-8"), re.S)
    return _cell(found.group(1)) if found else "no finding yet"


def index(experiments: list[Path]) -> str:
    """README's table: experiment, question page, finding."""
    lines = ["| experiment | finding |", "|---|---|"]
    for experiment in experiments:
        number, _, title = experiment.name.partition("_")
        link = f"experiments/{experiment.name}/analyses.md"
        lines.append(f"| [{number} {title.replace('_', ' ')}]({link}) | {finding(experiment)} |")
    return "\n".join(lines)


def status(experiments: list[Path]) -> str:
    """NOTES' list: which runs each experiment's findings rest on."""
    lines = []
    for experiment in experiments:
        runs = [path.stem for path in sorted((experiment / "results").glob("*.json"))]
        lines.append(f"- {experiment.name}: {', '.join(runs) or 'no finished run'}")
    return "\n".join(lines)


def replace(page: Path, name: str, text: str) -> bool:
    """Put text between a page's markers; whether the page changed. Raises BadInput without them."""
    old = page.read_text(encoding="utf-8")
    begin = BEGIN.format(name)
    if begin not in old or END not in old.split(begin, 1)[1]:
        raise BadInput(f"{provenance.shown(page)} lost its markers: put {begin} and {END} back")
    head, rest = old.split(begin, 1)
    tail = rest.split(END, 1)[1]
    new = f"{head}{begin}\n{text}\n{END}{tail}"
    if new != old:
        files.write(page, new)
    return new != old


def write_all(chosen: list[Path], everything: list[Path]) -> list[str]:
    """Gather and rewrite the blocks of the chosen experiments, and the tables of all."""
    done = []
    for experiment in chosen:
        changed, page = gather(experiment), experiment / "analyses.md"
        if page.exists() and replace(page, "results", block(experiment)):
            changed.append(page.name)
        done += [f"{experiment.name}/{name}" for name in changed]
    for page, name, text in (
        (provenance.ROOT / "README.md", "experiments", index(everything)),
        (provenance.ROOT / "NOTES.md", "status", status(everything)),
    ):
        if page.exists() and replace(page, name, text):
            done.append(page.name)
    return done
