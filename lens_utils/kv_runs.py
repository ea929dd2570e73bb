"""One analysed run of K/V masks, as its folder holds it: tables in, pictures and pages out.

Everything that people look at is drawn from the files of the folder and nothing else, so that a
figure, the report and a comparison cannot disagree, and all of them can be made again without the
model. A file or a column that is missing is an error here, never a zero further on.
"""

import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from jaxtyping import Float
from numpy import ndarray
from plotly.offline import get_plotlyjs

from lens_utils import console, files
from lens_utils.errors import BadInput

METRICS = (
    "name", "model", "dataset", "corpus", "target_sparsity", "steps", "lr", "method", "objective",
    "fill", "units", "keep_first", "seeds", "n_layers", "n_units", "n_kept", "n_tokens",
    "n_examples", "full", "empty", "per_seed", "mean", "baselines", "stability", "minimality",
    "controls", "verdict",
)  # fmt: skip
COLUMNS = {
    "history.csv": ("seed", "step", "train_loss", "val_kl", "target_sparsity", "sparsity",
                    "temperature", "reg_loss", "lr"),
    "layers.csv": ("seed", "layer", "part", "total", "kept", "sparsity", "mean_importance",
                   "std_importance"),
    "frontier.csv": ("sparsity", "ranking", "seed", "kl", "faithfulness", "loss_degradation"),
    "groups.csv": ("layer", "part", "kv_head", "kept", "kl_without", "rise"),
    "units.csv": ("part", "layer", "kv_head", "channel", "score", "measured_kl", "sample"),
}  # fmt: skip
MASKS = "final_masks.safetensors"
OLD_MASKS = "final_masks.pt"  # of the first plan: no tables beside it that can be trusted
NAMES = re.compile(r"(?P<at>(?:blocks|transformer\.h)\.(?P<layer>\d+)\.attn)\.[kv]_mask")


class LayerMask(NamedTuple):
    """What one layer keeps of K and of V (1 kept, 0 replaced), and the scores it was cut by."""

    at: str  # blocks.3.attn, or transformer.h.3.attn in GPT-2's layout
    mask: Mapping[str, Float[ndarray, "kv_head d_head"]]
    score: Mapping[str, Float[ndarray, "kv_head d_head"]]


def read(folder: Path, name: str) -> Any:
    """metrics.json as a dict, or one of the tables (COLUMNS) as a frame.

    Raises BadInput naming the file that is missing, unreadable or lacks something.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise BadInput(f"{folder} is no analysed run: there is no {name} in it")
    try:
        held = files.read(path)
    except ValueError as error:  # of JSON and of pandas
        raise BadInput(f"{path} is damaged: analyse the model again") from error
    if name == "metrics.json":
        missing = set(METRICS) - set(held if isinstance(held, dict) else ())
    else:
        missing = set(COLUMNS[name]) - set(held.columns)
    if missing:
        raise BadInput(f"{path} lacks {', '.join(sorted(missing))}: analyse the model again")
    return held


def read_masks(folder: Path) -> dict[int, LayerMask]:
    """The masks of the run's first seed by layer, in numeric order. Raises BadInput as `read`.

    Where there is only a final_masks.pt, that is read (`old_masks`).
    """
    path = Path(folder) / MASKS
    if not path.is_file() and path.with_name(OLD_MASKS).is_file():
        return old_masks(path.with_name(OLD_MASKS))
    if not path.is_file():
        raise BadInput(f"{folder} is no analysed run: there is no {MASKS} in it")
    try:
        held = {key: tensor.float().numpy() for key, tensor in files.read(path).items()}
        found = {int(m["layer"]): m["at"] for key in held if (m := NAMES.fullmatch(key))}
        layers = {
            layer: LayerMask(found[layer], *(
                {part: held[f"{found[layer]}.{part.lower()}_{kind}"] for part in "KV"}
                for kind in ("mask", "score")
            )) for layer in sorted(found)
        }  # fmt: skip
    except Exception as error:  # safetensors raises its own type
        raise BadInput(f"{path} is damaged: analyse the model again") from error
    if not layers:
        raise BadInput(f"{path} holds no masks: no blocks.0.attn.k_mask in it")
    return layers


def old_masks(path: Path) -> dict[int, LayerMask]:
    """Masks as the first plan kept them: by layer name, one [head, d_head] tensor for K and V both,
    importance = sigmoid of the logits. Nothing but tensors is read (`weights_only`).

    Raises BadInput for a file of another kind, or with code in it.
    """
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        found = {}
        for name, layer in held.items():
            mask, score = (layer[key].float().numpy() for key in ("mask", "importance"))
            at = int(re.findall(r"\d+", name)[0])
            found[at] = LayerMask(name, dict.fromkeys("KV", mask), dict.fromkeys("KV", score))
    except Exception as error:  # pickle, torch and a missing key each raise their own
        raise BadInput(f"{path} holds no masks that can be read without running code") from error
    return dict(sorted(found.items()))


def number(value: Real | None, form: str = ".3f") -> str:
    """A number as pages show it; what was not measured is said in words, never as nan or None."""
    if value is None or not math.isfinite(value):
        return "not measured"
    return format(value, form)


def spread(estimate: Mapping[str, Any] | None, form: str = ".3f", unit: str = "") -> str:
    """A mean with its sd over seeds, where there are several."""
    if estimate is None or number(estimate["value"]) == "not measured":
        return "not measured"
    text = f"{number(estimate['value'], form)}{unit}"
    if estimate.get("sd") is None or not math.isfinite(estimate["sd"]):
        return text
    return f"{text} (sd {number(estimate['sd'], form.lstrip('+'))} over {estimate['n']} seeds)"


def page_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A table as lines of markdown."""
    header = list(header)
    cells = [[str(cell).replace("|", "&#124;") for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def draw(figures: Mapping[str, go.Figure], folder: Path) -> list[Path]:
    """Write the figures as <name>.png into the folder, with one start of the browser.

    Where there is no browser they are written as HTML, and a line says so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    default = pio.templates["lab"].layout
    try:
        with tempfile.TemporaryDirectory(prefix=".drawing-", dir=folder) as beside:
            drawn = [Path(beside) / f"{name}.png" for name in figures]
            pio.write_images(
                fig=list(figures.values()),
                file=drawn,
                width=[fig.layout.width or default.width for fig in figures.values()],
                height=[fig.layout.height or default.height for fig in figures.values()],
                scale=1.5,
            )
            lost = [path.stem for path in drawn if not path.exists()]
            if lost:  # the export keeps a figure's error to itself
                raise RuntimeError(f"not drawn: {', '.join(lost)}")
            return [path.replace(folder / path.name) for path in drawn]
    except Exception as error:  # kaleido raises plain and own types when it finds no browser
        if "chrome" not in str(error).lower() and "browser" not in str(error).lower():
            raise
    console.say(f"no browser for PNG (Debian: apt install chromium); {folder} gets HTML figures")
    files.write_bytes(folder / "plotly.min.js", get_plotlyjs().encode())
    pages = []
    for name, fig in figures.items():
        pages.append(folder / f"{name}.html")
        files.write_bytes(pages[-1], fig.to_html(include_plotlyjs="plotly.min.js").encode())
    return pages


def over_seeds(frame: pd.DataFrame, by: list[str], columns: list[str]) -> pd.DataFrame:
    """Mean, sd (missing for one seed) and n over seeds: columns x, x_sd and n_seeds."""
    groups = frame.groupby(by, sort=False, observed=True)
    means, sds = groups[columns].mean(), groups[columns].std().add_suffix("_sd")
    counts = groups["seed"].nunique().rename("n_seeds")
    return pd.concat([means, sds, counts], axis=1).reset_index()


def ranks(scores: Iterable[Float[ndarray, "_ _"]]) -> list[Float[ndarray, "_ _"]]:
    """Every score's rank among all of them, from 0 (least) to 1; equal scores, equal ranks."""
    scores = list(scores)
    flat = pd.Series(np.concatenate([s.ravel() for s in scores])).rank().to_numpy()
    shares = (flat - 1) / max(len(flat) - 1, 1)
    cuts = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(shares, cuts), scores, strict=True)]


def pooled_sd(sd_a: Real, n_a: Real, sd_b: Real, n_b: Real) -> float:
    """sqrt(((n_a - 1) sd_a^2 + (n_b - 1) sd_b^2)/(n_a + n_b - 2)); nan for two single values."""
    free = n_a + n_b - 2
    squares = sum((n - 1) * s**2 for s, n in ((sd_a, n_a), (sd_b, n_b)) if n > 1)
    return math.sqrt(squares / free) if free else math.nan
