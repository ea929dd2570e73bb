"""Noise in the weights of chosen attention heads: what is lost when a head works badly?

Taking a head out removes what it writes. Noise leaves the head in place and makes it look, and
write, somewhat wrong. It is put where one head's weights are nobody else's:

    W_Q[head]   [d_model, d_head]   the rows of the query projection that are this head's
    W_O[head]   [d_head, d_model]   the columns of the output projection that read this head

Keys and values are shared by several query heads in most models, so they are left alone, and so
are biases. sigma is a standard deviation in units of the weights' own: of the whole parameter
(the layer's W_Q or W_O), or of the head's slice of it. Where queries are normed (Qwen 3, Gemma 3)
the noise in W_Q turns a query and hardly lengthens it.

In TransformerLens `blocks[l].attn.W_Q` is a view on the live weights, whatever the fused layout of
the architecture; its stacked `bridge.W_Q` is a copy, and editing that does nothing.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_utils.errors import BadInput, Failure
from lens_utils.models import LoadedModel


@contextlib.contextmanager
def noisy_heads(
    model: LoadedModel,
    heads: Sequence[tuple[int, int]],
    sigma: float,
    seed: int = 0,
    relative_to: Literal["parameter", "head"] = "parameter",
) -> Iterator[None]:
    """Within the block, W_Q and W_O of these heads (layer, query head) carry Gaussian noise.

    sigma: standard deviation of the noise over that of the whole parameter, or of the head's slice.
    A head's noise depends on the seed and the head's place alone: it is the same in every set of
    heads, at every sigma (scaled) and on every device. The old weights come back bit for bit, also
    after an exception. Do not nest blocks that share a head. Raises BadInput for a sigma below 0,
    and for a head that is unknown or named twice; Failure where they have no weights of their own.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise BadInput(f"sigma {sigma}: the noise has a standard deviation of 0 or more")
    _check(model, heads)
    edits = []  # all measured before the first edit: a parameter holds several heads
    for layer, head in heads:
        attn = model.bridge.blocks[layer].attn
        for part, weight in enumerate(_weights(model, attn)):
            whole = weight if relative_to == "parameter" else weight[head]
            scale = sigma * whole.float().std().item()
            edits.append((_live(attn, weight[head]), scale, (seed, layer, head, part)))
    old = [here.clone() for here, *_ in edits]
    try:
        with torch.no_grad():
            for here, scale, place in edits:
                here.add_((scale * _noise(here.shape, place)).to(here.device, here.dtype))
        yield
    finally:
        with torch.no_grad():
            for (here, *_), values in zip(edits, old, strict=True):
                here.copy_(values)  # taking the noise off again would not give the same bits


def _check(model: LoadedModel, heads: Sequence[tuple[int, int]]) -> None:
    n_layers, n_heads = model.n_layers, model.bridge.cfg.n_heads
    for (layer, head), times in Counter(heads).items():
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise BadInput(f"head {head} of layer {layer}: {model.name} has {n_layers} layers "
                           f"of {n_heads} heads, counted from 0")  # fmt: skip
        if times > 1:
            raise BadInput(f"head {head} of layer {layer} is named {times} times")


def _weights(model: LoadedModel, attn: nn.Module) -> tuple[Tensor, Tensor]:
    try:
        return attn.W_Q, attn.W_O
    except NotImplementedError:
        raise Failure(f"{model.name} compresses its queries (latent attention): its heads have no "
                      "W_Q to put noise in") from None  # fmt: skip


def _live(attn: nn.Module, view: Float[Tensor, "_ _"]) -> Float[Tensor, "_ _"]:
    """The view, if it is one on a parameter: an edit of a copy would go unnoticed."""
    held = {p.untyped_storage().data_ptr() for p in attn.parameters()}
    if view.untyped_storage().data_ptr() not in held:
        raise Failure("the weights of this architecture's heads are copies: noise has no effect")
    return view


def _noise(shape: torch.Size, place: tuple[int, ...]) -> Float[Tensor, "_ _"]:
    """Standard normal numbers that belong to one place; drawn on the CPU in float32."""
    (word,) = np.random.SeedSequence(place).generate_state(1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(word)))
