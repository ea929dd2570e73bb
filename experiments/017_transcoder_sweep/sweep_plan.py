"""What is swept: configurations, pilot layers, and how much text a model can afford."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lens_utils import text_rows
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel
from lens_utils.text_rows import Row

if TYPE_CHECKING:
    from run import Config


class Sizes(NamedTuple):
    """Tokens of each part, and how often activations are used while they are held."""

    tokens: int
    passes: int
    held_out: int
    judged: int
    named: int
    """On either side, that labels are found and tested on."""


SMALL = 10_000_000  # parameters below which text is cheap
SIZES = {  # (small model, quick run)
    (True, True): Sizes(12_000, 2, 3_000, 1_500, 1_500),
    (True, False): Sizes(80_000, 2, 20_000, 1_500, 2_500),
    # SmolLM2, one CPU core: 490 tokens a second up to the middle layer, 240 through all of it, and
    # 19,000 a second through the training of one transcoder of 8 x 576. So text is what costs, and
    # what it gives is used several times; the 20,000 held-out tokens alone are 40 seconds.
    (False, True): Sizes(40_000, 4, 20_000, 1_000, 1_500),
    (False, False): Sizes(100_000, 2, 20_000, 3_000, 4_000),
}
BATCH = 1024
"""Tokens of a training step."""


def sizes(cfg: Config, model: LoadedModel) -> Sizes:
    """As asked for, or by the model's size."""
    held = SIZES[model.identity["parameters"] < SMALL, cfg.quick]
    asked = {name: getattr(cfg, name) for name in held._fields if getattr(cfg, name, 0)}
    return held._replace(**asked)


def text(
    cfg: Config, model: LoadedModel, tokens: int, split: str = "fit"
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of one split, and what is to be said of them."""
    return text_rows.load(model, cfg.text, tokens, cfg.length, cfg.seed, split)


def plan(
    cfg: Config, model: LoadedModel, size: Sizes, rows: Sequence[Row], said: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is decided before the training: layers, configurations, text.

    The grid is expansion x k. Learning rates, shares of the text, skip connections and untrained
    encoders are compared at its centre. A quick run has the centre, the smallest, and the
    untrained.
    """
    d_model = model.bridge.cfg.d_model
    expansions = _numbers(cfg.expansions, "expansions", int)
    ks = _numbers(cfg.ks or ("16,32,64" if d_model >= 512 else "8,16,32"), "ks", int)
    lrs = _numbers(cfg.lrs, "lrs", float)
    if ks[-1] > expansions[0] * d_model:
        raise BadInput(f"--ks {ks[-1]} of {expansions[0] * d_model} features: lower k, or give "
                       "larger --expansions")  # fmt: skip
    centre = {"expansion": _middle(expansions), "k": _middle(ks), "lr": _middle(lrs), "share": 1.0,
              "skip": "none", "max_gain": 1.0, "encoder": "trained"}  # fmt: skip
    others: list[dict[str, Any]] = [{"encoder": "random"}]
    if cfg.quick:
        others += [{"expansion": expansions[0], "k": ks[0]}]
    else:
        others += [{"expansion": e, "k": k} for e in expansions for k in ks]
        others += [{"lr": lr} for lr in lrs] + [{"share": s} for s in (0.25, 0.5)]
        others += [{"skip": "zero"}, {"skip": "ridge"}, {"skip": "ridge", "max_gain": 1e6}]
    found = {_name(c, centre): c for c in [centre, *(centre | other for other in others)]}
    return {"layers": _layers(cfg, model), "centre": _name(centre, centre), "configurations": found,
            "text": said, "tokens": sum(len(row.ids) for row in rows), "passes": size.passes,
            "d_model": d_model, "seed": cfg.seed}  # fmt: skip


def _name(c: dict[str, Any], centre: dict[str, Any]) -> str:
    """Its size, and what else is not as in the centre."""
    said = [f"{c['expansion']}x k{c['k']}"]
    if c["lr"] != centre["lr"]:
        said.append(f"lr {c['lr']:g}")
    if c["share"] != 1:
        said.append(f"{c['share']:g} of the text")
    if c["skip"] != "none":
        said.append(f"skip {c['skip']}" + (", gain free" if c["max_gain"] > 1 else ""))
    if c["encoder"] != "trained":
        said.append("random encoder")
    return ", ".join(said)


def _numbers(text: str, flag: str, kind: type) -> list:
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] <= 0:
        raise BadInput(f"--{flag} {text}: write positive numbers with commas between")
    return found


def _middle(values: list) -> Any:
    return values[len(values) // 2]


def _layers(cfg: Config, model: LoadedModel) -> list[int]:
    """As asked for; else a sixth, half and five sixths of the way, and of a quick run the half."""
    last = model.n_layers - 1
    if cfg.layers:
        found = sorted({int(part) if part.strip().isdecimal() else -1
                        for part in cfg.layers.split(",")})  # fmt: skip
        if not 0 <= found[0] <= found[-1] <= last:
            raise BadInput(f"--layers {cfg.layers}: numbers from 0 to {last} with commas between")
        return found
    return [last // 2] if cfg.quick else sorted({round(last / 6), last // 2, round(5 * last / 6)})
