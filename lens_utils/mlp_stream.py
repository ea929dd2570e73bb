"""What MLPs read and write, batch after batch: one pass over text feeds all layers' transcoders.

Nothing is stored. Left out are the first positions of every row, the sinks (there the residual
stream is a hundred times longer than elsewhere, and pooled figures would be about them alone), and
start and end tokens in the middle, which are sinks as well. Behind the highest layer asked for the
forward pass is broken off.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel
from lens_utils.text_rows import Row

TOKENS = 2048  # of one batch, about


@dataclass(frozen=True)
class Batch:
    """The kept tokens of some rows, in reading order."""

    ids: Int[Tensor, " token"]
    row: Int[Tensor, " token"]
    """Which row each is from, counted over the whole pass."""
    pos: Int[Tensor, " token"]
    mlp: dict[int, tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]]
    """By layer: what its MLP reads (behind the norm), and what it writes."""


def batches(rows: Sequence[Row], tokens: int = TOKENS) -> list[tuple[int, int]]:
    """Spans of rows that hold about so many tokens each; every row is in one."""
    spans, start, total = [], 0, 0
    for at, row in enumerate(rows):
        total += len(row.ids)
        if total >= tokens:
            spans.append((start, at + 1))
            start, total = at + 1, 0
    return spans if start == len(rows) else [*spans, (start, len(rows))]


def kept(
    model: LoadedModel, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"], sinks: int = 1
) -> Bool[Tensor, "row pos"]:
    """Which tokens count: no padding, no first position, no token that texts begin with."""
    wanted = mask.bool()
    wanted[:, :sinks] = False
    for token in model.bos:
        wanted &= ids != token
    return wanted


@torch.no_grad()
def activations(
    model: LoadedModel, rows: Sequence[Row], start: int, layers: Sequence[int], sinks: int = 1
) -> Batch:
    """MLP inputs and outputs of some layers for these rows, the first of which is number `start`.

    Raises BadInput for layers that the model lacks.
    """
    if wrong := [layer for layer in layers if not 0 <= layer < model.n_layers]:
        raise BadInput(f"{model.name} has layers 0 to {model.n_layers - 1}, not {wrong[0]}")
    ids, mask = model.batch([row.ids for row in rows])
    taken = kept(model, ids, mask, sinks)
    held: dict[str, Tensor] = {}
    last = f"blocks.{max(layers)}.mlp.hook_out"

    def keep(x: Tensor, hook: object, name: str) -> None:
        held[name] = x[taken.to(x.device)]
        if name == last:
            raise StopAtLayerException(x)  # the bridge catches it: what follows is not needed

    names = [f"blocks.{layer}.mlp.hook_{end}" for layer in layers for end in ("in", "out")]
    hooks = [(name, lambda x, hook, name=name: keep(x, hook, name)) for name in names]
    model.bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=hooks, use_cache=False)
    row, pos = taken.nonzero(as_tuple=True)
    found = {layer: (held[f"blocks.{layer}.mlp.hook_in"], held[f"blocks.{layer}.mlp.hook_out"])
             for layer in layers}  # fmt: skip
    return Batch(ids[taken], row + start, pos, found)


def stream(
    model: LoadedModel,
    rows: Sequence[Row],
    layers: Sequence[int],
    tokens: int = TOKENS,
    sinks: int = 1,
    skip: int = 0,
) -> Iterator[Batch]:
    """`activations` of all rows, about `tokens` at a time; the first `skip` batches are left out.

    A batch without a kept token is not handed on.
    """
    for start, end in batches(rows, tokens)[skip:]:
        batch = activations(model, rows[start:end], start, layers, sinks)
        if len(batch.ids):
            yield batch


def shuffled(
    held: Sequence[Batch], passes: int, size: int, seed: int
) -> Iterator[dict[int, tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]]]:
    """What a few batches hold, by layer, several times over: `size` tokens at a time, mixed anew in
    each pass.

    A forward pass costs more than a step of one layer, so each of its tokens is learned from more
    than once. Tokens that do not fill a batch are left out of that pass.
    """
    layers = list(held[0].mlp) if held else []
    joined = {n: tuple(torch.cat([b.mlp[n][end] for b in held]) for end in (0, 1)) for n in layers}
    total = sum(len(batch.ids) for batch in held)
    source = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        order = torch.randperm(total, generator=source)
        size = min(size, total)
        for part in order[: total // size * size].split(size):
            yield {n: (x[part.to(x.device)], y[part.to(y.device)])
                   for n, (x, y) in joined.items()}  # fmt: skip
