"""The atlas as a page to browse: one HTML file for each layer, made from the database alone.

Features can be searched by label and token, sorted by any column, and seen at work: each example
with the feature's value at every token as shade, the histogram of its values, the tokens that it
promotes. The file needs nothing else: no server, no network (its own policy forbids it). Whatever
comes from text or from a label is put on the page as text, never as HTML.

`#q=digits` opens with a search, `#f=12` with a feature; `#sort=accuracy` by a column.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from lens_utils import feature_store
from lens_utils.errors import BadInput
from lens_utils.feature_stats import AFTER, BEFORE


def page(shown: dict[str, Any]) -> str:
    """The page of one layer's `content`."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    title = f"Features of layer {shown['layer']}"
    return template.replace("__TITLE__", title).replace("__DATA__", _inert(shown))


def content(path: Path, layer: int) -> dict[str, Any]:
    """What the page shows, as JSON has it. Raises BadInput for a file that is no atlas, or lacks
    the layer."""
    features = feature_store.read(path, "features", layer)
    if not len(features):
        raise BadInput(f"{path} has no features of layer {layer}")
    # Rows as plain Python: pandas costs a thousand times as much, one row at a time.
    labels = _by_feature(feature_store.read(path, "explanations", layer))
    shown = _by_feature(feature_store.read(path, "examples", layer))
    rows: dict[int, dict[int, str]] = {}
    tokens = feature_store.read(path, "tokens")
    for sequence, at, word in zip(*(tokens[c].tolist() for c in (
            "sequence_id", "token_idx", "decoded_token")), strict=True):  # fmt: skip
        rows.setdefault(sequence, {})[at] = word
    words: dict[str, int] = {}
    listed = []
    for feature in features.to_dict("records"):
        said = labels.get(feature["feature_id"], [])
        first = said[0] if said else {}
        own = shown.get(feature["feature_id"], [])
        listed.append({
            "id": feature["feature_id"],
            "labels": [[s["source"], s["label"]] for s in said],
            **{key: _number(feature.get(key)) for key in ("density", "mean", "max")},
            **{key: _number(first.get(key)) for key in ("accuracy", "shuffled")},
            "promotes": json.loads(feature.get("promotes") or "[]"),
            "suppresses": json.loads(feature.get("suppresses") or "[]"),
            "histogram": json.loads(feature.get("histogram") or "[]"),
            "examples": [_example(e, rows[e["sequence_id"]], words) for e in own],
        })  # fmt: skip
    layers = feature_store.about(path).get("layers", [layer])
    return {"layer": layer, "layers": layers, "about": feature_store.about(path),
            "words": list(words), "features": listed}  # fmt: skip


def _by_feature(table: pd.DataFrame) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        found.setdefault(row["feature_id"], []).append(row)
    return found


def _example(example: dict[str, Any], row: dict[int, str], words: dict[str, int]) -> list:
    """[sample, place of the peak, ids of words, values]."""
    values = json.loads(example["around"])
    start = example["token_idx"] - BEFORE
    places = [n for n in range(BEFORE + 1 + AFTER) if start + n in row]
    ids = [words.setdefault(row[start + n], len(words)) for n in places]
    return [example["sample"], places.index(BEFORE), ids, [values[n] for n in places]]


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(f"{float(value):.4g}")


def _inert(value: Any) -> str:
    """JSON that can stand in a script element, whatever the texts in it are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
