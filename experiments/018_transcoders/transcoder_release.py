"""The folder to publish: weights, configuration, metrics, and a card that says what they are.

It is circuit-tracer's set format as it stands, so that other tools load it. Uploading it is another
step (`scripts/upload_transcoders.py`), which is asked for.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_utils import files, provenance
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.registry import SPECS

CARD = """---
library_name: circuit-tracer
tags: [transcoder, interpretability, sparse]
base_model: {source}
license: other
license_name: {licence_name}
---
# TopK transcoders of {name}

Each replaces one MLP of {source}: {n_features} features, {k} of them active at a token, decoder
rows of norm 1. They read the MLP's input (behind the norm) and write its output. Made by
experiment 018, commit {commit}.

| | |
|---|---|
| model | {source}, revision {revision}, sha256 {sha} |
| trained on | {tokens:,} tokens of {text} |
| recipe | Adam, learning rate {lr:g}, {steps} batches, skip connection: {skip} |
| licence | weights are derived from the model's: {licence} |

`layer_N.safetensors` holds W_enc (feature, d_model), b_enc, W_dec (feature, d_model), b_dec.
`config.yaml` names model and hooks. circuit-tracer 0.5.0 ignores `activation: topk` and takes such
a set for ReLU: wrap each layer in its TopK there.{tuned}

## Measured on held-out text

{table}

First positions (a text's first token) are left as they are. What a set explains of one text says
nothing about other text: the corpus above is all that it has seen.
"""


def write(
    run: Run, model: LoadedModel, text: Mapping[str, Any], summary: Mapping[str, Any]
) -> Path:
    """The release folder of a finished run; written anew each time, weights as hard links."""
    folder = run.folder / "release"
    for name in ("trained", "tuned"):
        for path in sorted((run.folder / name).glob("*")):
            place = folder / ("" if name == "trained" else name) / path.name
            _link(path, place)
    files.write(folder / "metrics.json", dict(summary))
    files.write(folder / "README.md", _card(run, model, text, summary))
    return folder


def _link(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(path, place)
    except OSError:  # another file system, or one without links
        files.write_bytes(place, path.read_bytes())


def _card(run: Run, model: LoadedModel, text: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    recipe, identity = text["recipe"], model.identity
    spec = SPECS.get(run.cfg.model)
    licence = spec.licence if spec else "see the model's own card"
    rows = ["| measure | value | 95 % interval | n |", "|---|---|---|---|"]
    for label, value in summary.items():
        shown, interval, n = value, "", ""
        interval = (
            "" if not isinstance(value, dict) else f"{value['low']:.4g} to {value['high']:.4g}"
        )
        n = "" if not isinstance(value, dict) else value["n"]
        rows.append(f"| {label} | {shown} | {interval} | {n} |")
    tuned = "\n`tuned/` is the same set, tuned end to end on KL with all MLPs replaced."
    return CARD.format(
        name=model.name, source=identity.get("source", model.name), licence=licence,
        licence_name=licence.partition(" (")[0].lower().replace(" ", "-"),
        n_features=recipe["n_features"], k=recipe["k"],
        commit=provenance.commit() or "unknown",
        revision=identity.get("revision", "unknown"), sha=str(identity.get("sha256", ""))[:16],
        tokens=text["tokens"], text=", ".join(text["text"]), lr=recipe["lr"],
        steps=recipe["steps"], skip=recipe["skip"], table="\n".join(rows),
        tuned=tuned if (run.folder / "tuned").exists() else "",
    )  # fmt: skip
