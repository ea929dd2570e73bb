"""How far a model is from itself when transcoders stand in for its MLPs.

Every text is run once as it is; then once for each set of replaced MLPs, from the lowest replaced
layer on, since nothing below has changed. Per text three sums over its predicted tokens:

    cross-entropy of the text's own next token (its increase is what the replacement costs, nats)
    KL(original || replaced), in nats
    how often both find the same token likeliest

A small increase alone says nothing: an MLP whose removal costs little can be replaced by anything.
So it is read beside what zeroing the MLP costs, what its mean output costs, and what the best
linear map costs (`recovered`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from lens_utils.lens import Readout, hook
from lens_utils.mlp_stream import kept
from lens_utils.models import LoadedModel
from lens_utils.patching import resume_all
from lens_utils.replacement import check, replacing
from lens_utils.sparse import Transcoder
from lens_utils.stats import Estimate
from lens_utils.text_rows import Row, asked_for

CHUNK = 512  # predicted tokens whose logits are held at a time
DRAWS = 2000


@torch.no_grad()
def faithfulness(
    model: LoadedModel,
    rows: Sequence[Row],
    conditions: Mapping[str, Mapping[int, Transcoder]],
    sinks: int = 1,
) -> pd.DataFrame:
    """One line per text and condition: doc, source, condition, tokens, and sums of ce, kl, same.

    rows: of one batch. conditions: by name, the transcoders that replace MLPs; position < `sinks`
    are left as they are. ce is that of the replaced model; the condition "original" is the model.
    Raises BadInput for transcoders that do not fit.
    """
    for replaced in conditions.values():
        check(model, replaced)
    readout = Readout(model.bridge)
    ids, mask = model.batch([row.ids for row in rows])
    places = predicted(model, rows, ids, mask, sinks)
    lowest = sorted({min(replaced) for replaced in conditions.values() if replaced})
    held = _clean(model, ids, lowest)
    clean = held[hook(model.n_layers)][:, :-1][places]
    truth = ids[:, 1:][places]
    place = places.nonzero()[:, 0]
    found = [_described(rows, "original", place, *_compared(readout, clean, clean, truth))]
    for name, replaced in conditions.items():
        start = min(replaced, default=None)
        final = clean
        if start is not None:
            hooks = replacing(replaced, sinks)
            final = resume_all(model, held[hook(start)], start, hooks)[:, :-1][places]
        found.append(_described(rows, name, place, *_compared(readout, clean, final, truth)))
    return pd.concat(found, ignore_index=True)


def predicted(
    model: LoadedModel,
    rows: Sequence[Row],
    ids: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    sinks: int = 1,
) -> Bool[Tensor, "row before"]:
    """From which positions a next token is predicted that is worth predicting."""
    wanted = torch.zeros_like(mask, dtype=torch.bool)
    for i, row in enumerate(rows):
        wanted[i, : len(row.ids)] = torch.tensor(asked_for(row), device=mask.device)
    return kept(model, ids, mask, sinks)[:, :-1] & mask[:, 1:].bool() & wanted[:, 1:]


def _clean(
    model: LoadedModel, ids: Int[Tensor, "row pos"], starts: Sequence[int]
) -> dict[str, Float[Tensor, "row pos d_model"]]:
    """The residual stream in front of some blocks, and the final one."""
    names = {hook(layer) for layer in (*starts, model.n_layers)}
    held: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: object, name: str) -> None:
        held[name] = x

    hooks = [(name, lambda x, hook, name=name: keep(x, hook, name)) for name in names]
    model.bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)
    return held


def _compared(
    readout: Readout,
    clean: Float[Tensor, "token d_model"],
    final: Float[Tensor, "token d_model"],
    truth: Int[Tensor, " token"],
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"], Bool[Tensor, " token"]]:
    """Of every token: cross-entropy and KL of the replaced model, and whether the likeliest is."""
    parts = []
    for at in range(0, len(truth), CHUNK):
        here = slice(at, at + CHUNK)
        before = readout.read(clean[here]).log_softmax(-1)
        after = readout.read(final[here]).log_softmax(-1)
        parts.append((
            -after.gather(1, truth[here, None])[:, 0],
            (before.exp() * (before - after)).sum(-1),
            before.argmax(-1) == after.argmax(-1),
        ))  # fmt: skip
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _described(
    rows: Sequence[Row],
    condition: str,
    place: Int[Tensor, " token"],
    ce: Float[Tensor, " token"],
    kl: Float[Tensor, " token"],
    same: Bool[Tensor, " token"],
) -> pd.DataFrame:
    place = place.cpu()

    def total(x: Tensor) -> ndarray:
        return (
            torch.zeros(len(rows), dtype=torch.double)
            .index_add_(0, place, x.double().cpu())
            .numpy()
        )

    frame = pd.DataFrame({
        "doc": [row.doc for row in rows], "source": [row.source for row in rows],
        "condition": condition, "tokens": torch.bincount(place, minlength=len(rows)),
        "ce": total(ce), "kl": total(kl), "same": total(same),
    })  # fmt: skip
    return frame[frame["tokens"] > 0]


# What the sums say


def ratio(
    above: Shaped[ndarray, " text"],
    below: Shaped[ndarray, " text"],
    docs: Sequence[str],
    seed: int = 0,
) -> Estimate:
    """sum(above) / sum(below) with a 95 % percentile bootstrap interval over whole documents."""
    frame = pd.DataFrame({"above": above, "below": below}).groupby(np.asarray(docs)).sum()
    a, b = frame["above"].to_numpy(float), frame["below"].to_numpy(float)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=DRAWS)
    drawn = (weights @ a) / np.where(weights @ b == 0, np.nan, weights @ b)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    value = float(a.sum() / b.sum())
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=len(a))


def increase(frame: pd.DataFrame, condition: str, measure: str = "ce") -> Estimate:
    """Mean per token of ce above the original's (nats), of kl (nats), or of same (a share)."""
    here = frame[frame["condition"] == condition]
    above = here[measure].to_numpy()
    if measure == "ce":
        above = above - frame[frame["condition"] == "original"]["ce"].to_numpy()
    return ratio(above, here["tokens"].to_numpy(), here["doc"].tolist())


def recovered(frame: pd.DataFrame, condition: str, ablated: str) -> Estimate:
    """(CE_ablated - CE) / (CE_ablated - CE_original): 1 is the original, 0 no better than ablated.

    With ablated = the linear baseline, it is the share of that baseline's gap that is closed.
    """
    ce = {name: frame[frame["condition"] == name]["ce"].to_numpy()
          for name in (condition, ablated, "original")}  # fmt: skip
    docs = frame[frame["condition"] == condition]["doc"].tolist()
    return ratio(ce[ablated] - ce[condition], ce[ablated] - ce["original"], docs)


def constant(
    written: Float[Tensor, " d_out"], W_skip: Float[Tensor, "d_out d_in"] | None = None
) -> Transcoder:
    """A transcoder without features: the same output whatever the input, and a linear map of it."""
    empty, width = written.new_zeros(0), len(written) if W_skip is None else W_skip.shape[1]
    return Transcoder(written.new_zeros(0, width), empty, written.new_zeros(0, len(written)),
                      written, W_skip)  # fmt: skip
