"""Where heads look, and how much they move from there.

A head's pattern says how a query position divides its attention over the positions it can see. A
position can get much of it and give nothing: the first token often holds half of all attention and
a value vector near zero. So the same reading is made twice (Kobayashi et al. 2020, "Attention is
Not Only a Weight"):

    attention        a[query, pos]                       rows sum to 1
    norm-weighted    || a[query, pos] v[pos] W_O ||      the length of what is written; no fixed sum

The second needs no vector per pair of positions: a is a number, so it is a times ||v W_O||.

`query` is the position that looks, `pos` the one looked at, `head` a query head; values of grouped
queries are repeated, so that every query head has its own. All results are in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_utils import cache
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

CLASSES = ("entity", "relation", "subject", "distractor", "function", "punctuation", "bos")
"""The classes that `pairs.classes` gives to the tokens of the shared prompts."""
TYPES = ("induction", "previous", "duplicate", "sink")


@dataclass(frozen=True)
class Heads:
    """What the heads of one layer did with prompts of one length."""

    pattern: Float[Tensor, "batch head query pos"]
    v: Float[Tensor, "batch pos head d_head"]
    z: Float[Tensor, "batch pos head d_head"]
    """What each head has gathered, before W_O: pattern times v."""


@torch.no_grad()
def record(
    model: LoadedModel, ids: Int[Tensor, "batch pos"], layers: Sequence[int]
) -> dict[int, Heads]:
    """Patterns, values and outputs of some layers, from one forward pass.

    Raises BadInput for a layer that the model does not have.
    """
    if outside := [layer for layer in layers if not 0 <= layer < model.n_layers]:
        raise BadInput(f"{model.name} has layers 0 to {model.n_layers - 1}, not {outside[0]}")
    parts = ("pattern", "v", "z")
    held = cache.record(
        model, ids, [f"blocks.{layer}.attn.hook_{part}" for layer in layers for part in parts]
    )
    recorded = {}
    for layer in layers:
        pattern, v, z = (held[f"blocks.{layer}.attn.hook_{part}"].float() for part in parts)
        shared_by = pattern.shape[1] // v.shape[2]  # query heads that read one key/value head
        recorded[layer] = Heads(pattern, v.repeat_interleave(shared_by, dim=2), z)
    return recorded


def outputs(
    z: Float[Tensor, "batch pos head d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "batch pos head d_model"]:
    """What each head writes. Their sum, and b_O once, is the block's `attn.hook_out`."""
    return einsum(
        z, W_O.to(z.dtype), "batch pos head d_head, head d_head d_model -> batch pos head d_model"
    )


def norm_weighted(
    pattern: Float[Tensor, "batch head query pos"],
    v: Float[Tensor, "batch pos head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "batch head query pos"]:
    """||a v W_O||: how long the vector is that a head writes at `query` because of `pos`.

    In units of the attention output as `attn.hook_out` has it. With norms on both sides of a branch
    (Gemma) that is before `ln1_post`, which then scales everything written at one query by one
    number and each channel by its gain: shares within a query stay comparable, lengths of different
    layers do not. b_O comes from no position and is left out; a bias of v is part of v.
    """
    lengths = outputs(v, W_O).norm(dim=-1)
    return einsum(pattern, lengths, "batch head query pos, batch pos head -> batch head query pos")


def shares(
    weights: Float[Tensor, "batch head query pos"],
) -> Float[Tensor, "batch head query pos"]:
    """Weights as parts of their row's sum; NaN for a head that writes nothing at all."""
    return weights / weights.sum(-1, keepdim=True)


# To which tokens


def masks(classes: Sequence[str], names: Sequence[str] = CLASSES) -> Bool[Tensor, "kind pos"]:
    """For each name, the positions of that class. Raises BadInput for a class without a name.

    Every position is in one class, so masses over them sum to the whole row.
    """
    if unnamed := sorted(set(classes) - set(names)):
        raise BadInput(f"tokens of class {unnamed[0]!r} would be left out: measured are "
                       f"{', '.join(names)}")  # fmt: skip
    return torch.tensor([[found == name for found in classes] for name in names])


def mass(
    weights: Float[Tensor, "batch head query pos"], classes: Bool[Tensor, "kind pos"]
) -> Float[Tensor, "batch head query kind"]:
    """How much of each row lies on the positions of each class; the last query is [:, :, -1].

    Keys that a sliding window hides have weight 0, so nothing has to be left out for them.
    """
    return einsum(
        weights, classes.to(weights), "batch head query pos, kind pos -> batch head query kind"
    )


def behind(
    weights: Float[Tensor, "batch head query pos"], steps: int
) -> Float[Tensor, "batch head later"]:
    """The weight on the position `steps` before each query that has one; 0 is the query itself.

    The previous and the own token have a class of their own too: these overlap with `mass`.
    """
    return weights.diagonal(-steps, dim1=-2, dim2=-1)


# How widely


def window(model: LoadedModel, layer: int) -> int | None:
    """How many keys a query of this layer sees, itself included; None if all before it.

    Read from the configuration: a pattern cannot say it, where sharp attention rounds to 0.
    """
    config = getattr(model.bridge.original_model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None  # a model of TransformerLens' own
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def visible(n_pos: int, window: int | None = None) -> Int[Tensor, " query"]:
    """The number of keys that the causal mask leaves each query."""
    counts = torch.arange(1, n_pos + 1)
    return counts if window is None else counts.clamp_max(window)


def entropy_bits(
    pattern: Float[Tensor, "batch head query pos"],
) -> Float[Tensor, "batch head query"]:
    """How widely each query spreads its attention: 0 for one key, k for 2**k keys alike."""
    return torch.special.entr(pattern).sum(-1) / math.log(2)


def evenness(
    pattern: Float[Tensor, "batch head query pos"], seen: Int[Tensor, " query"]
) -> Float[Tensor, "batch head query"]:
    """Entropy as a share of the largest possible over the keys that the query can see.

    NaN for queries that see one key: there is nothing to choose.
    """
    return entropy_bits(pattern) / seen.to(pattern).log2()


# Which kind of head


def repeated(
    model: LoadedModel, n: int, length: int = 24, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """BOS and the same random tokens twice: nothing but repetition can be attended to.

    Drawn without replacement from the upper seven eighths of the vocabulary, for each row anew.
    Raises BadInput for sequences that are too short to tell the types of heads apart, longer than
    the model's context, or longer than the vocabulary.
    """
    size = model.bridge.cfg.d_vocab
    room = min((model.n_ctx - len(model.bos)) // 2, size - size // 8)
    if not 3 <= length <= room:
        raise BadInput(f"{length} random tokens, twice: {model.name} takes 3 to {room}")
    generator = torch.Generator().manual_seed(seed)
    bos = torch.tensor(model.bos, dtype=torch.long)
    rows = []
    for _ in range(n):
        drawn = torch.randperm(size - size // 8, generator=generator)[:length] + size // 8
        rows.append(torch.cat([bos, drawn, drawn]))
    return torch.stack(rows).to(model.device)


def head_types(
    pattern: Float[Tensor, "batch head query pos"], length: int
) -> dict[str, Float[Tensor, "batch head"]]:
    """How far each head is of four known types, on sequences that end in `length` tokens twice.

    Means over the queries of the second half, of the attention to
        induction    the token after the earlier occurrence (Olsson et al. 2022)
        previous     the token before
        duplicate    the earlier occurrence
        sink         position 0: BOS, where the model has one
    What lies further back than a layer's window is 0 by its mask.
    Raises BadInput when the sequences are shorter than two times `length`.
    """
    n_pos = pattern.shape[-1]
    if not 3 <= length <= n_pos // 2:
        raise BadInput(f"{n_pos} positions do not hold {length} tokens twice (at least 3)")
    back = {"induction": length - 1, "previous": 1, "duplicate": length}
    found = {name: behind(pattern, steps)[..., -length:].mean(-1) for name, steps in back.items()}
    return {**found, "sink": pattern[:, :, -length:, 0].mean(-1)}


# At which depth


def band(n_layers: int) -> list[int]:
    """The focus band of the experiments: layers at 40 to 85 % of depth, l / (n_layers - 1).

    Empty for models of one or two layers.
    """
    last = n_layers - 1
    return [n for n in range(n_layers) if last and 40 * last <= 100 * n <= 85 * last]
