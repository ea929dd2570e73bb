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


def content(path: Path, layer: int, examples: int = 16) -> dict[str, Any]:
    """What the page shows, as JSON has it. Raises BadInput for a file that is no atlas, or lacks
    the layer."""
    features = feature_store.read(path, "features", layer)
    if not len(features):
        raise BadInput(f"{path} has no features of layer {layer}")
    labels = feature_store.read(path, "explanations", layer)
    tokens = feature_store.read(path, "tokens").set_index(["sequence_id", "token_idx"])
    shown = feature_store.read(path, "examples", layer)
    text = tokens.decoded_token
    rows = {int(s): (list(part), int(part.index[0][1])) for s, part in text.groupby(level=0)}
    words: dict[str, int] = {}
    held = {f: part.head(examples) for f, part in shown.groupby("feature_id")}
    written = {f: part.to_dict("records") for f, part in labels.groupby("feature_id")}
    listed = []
    for feature in features.to_dict("records"):
        said = written.get(feature["feature_id"], [])
        first = said[0] if said else {}
        own = held.get(feature["feature_id"], shown.head(0)).itertuples()
        listed.append({
            "id": feature["feature_id"],
            "labels": [[s["source"], s["label"]] for s in said],
            **{key: _number(feature.get(key)) for key in ("density", "mean", "max")},
            **{key: _number(first.get(key)) for key in ("accuracy", "shuffled")},
            "promotes": json.loads(feature.get("promotes") or "[]"),
            "suppresses": json.loads(feature.get("suppresses") or "[]"),
            "histogram": json.loads(feature.get("histogram") or "[]"),
            "examples": [_example(e, rows[e.sequence_id], words) for e in own],
        })  # fmt: skip
    layers = feature_store.about(path).get("layers", [layer])
    return {"layer": layer, "layers": layers, "about": feature_store.about(path),
            "words": list(words), "features": listed}  # fmt: skip


def _example(example: Any, row: tuple[list[str], int], words: dict[str, int]) -> list:
    """[sample, place of the peak, ids of words, values]."""
    values = json.loads(example.around)
    texts, first = row
    start = example.token_idx - BEFORE - first
    places = [n for n in range(BEFORE + 1 + AFTER) if 0 <= start + n < len(texts)]
    ids = [words.setdefault(texts[start + n], len(words)) for n in places]
    return [example.sample, places.index(BEFORE), ids, [values[n] for n in places]]


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(f"{float(value):.4g}")


def _inert(value: Any) -> str:
    """JSON that can stand in a script element, whatever the texts in it are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
