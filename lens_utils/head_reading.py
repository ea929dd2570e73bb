"""What a head copies and what it looks for, apart from where it happens to attend.

A head is two circuits (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
OV: what it would say if it attended to one token alone, W_U · gain · W_O W_V ln1(x). QK: how
strongly the query that it has in a prompt finds a given key. x may be the stream as it is in a
prompt, or a token's effective embedding: the stream behind block 0 when the token stands alone.

Queries and keys pass norms and RoPE in some models, so scores are never rebuilt here: a real
forward is run with the query (and the key) put in place.
"""

from collections.abc import Mapping

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_utils.attribution import Norm
from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.lens import hook
from lens_utils.models import LoadedModel


@torch.no_grad()
def effective_embedding(
    model: LoadedModel, tokens: Int[Tensor, " token"]
) -> Float[Tensor, "token d_model"]:
    """Bare tokens behind BOS, after block 0: what later layers have of a token alone.

    (Wang et al. 2022: the first MLP acts as a second embedding.)
    """
    bos = torch.tensor(model.bos, dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1)
    return record(model, torch.cat([bos, tokens[:, None]], 1), [hook(1)])[hook(1)][:, -1]


@torch.no_grad()
def values(
    model: LoadedModel, layer: int, resid: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token kv_head d_head"]:
    """What a layer's heads would pass on from these residuals: W_V ln1(x), with its bias."""
    return _projected(model, layer, resid, "V")


@torch.no_grad()
def keys(
    model: LoadedModel, layer: int, resid: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token kv_head d_head"]:
    """What a layer's heads would be found by: W_K ln1(x), before any norm of keys and RoPE."""
    return _projected(model, layer, resid, "K")


@torch.no_grad()
def spoken(
    model: LoadedModel,
    layer: int,
    values: Float[Tensor, "token kv_head d_head"],
    words: Int[Tensor, " word"] | None = None,
) -> Float[Tensor, "token head word"]:
    """What each head would say about `words` (or all) if it attended to one of these tokens alone.

    W_U · gain · W_O v, up to a positive factor per head (the norms' scales), so what counts is the
    order of the words: the OV circuit of Elhage et al. 2021.
    """
    block = _block(model, layer)
    W_O = block.attn.W_O.float()
    v = values.float().repeat_interleave(len(W_O) // values.shape[1], dim=1)
    written = einsum(v, W_O, "token head d_head, head d_head d_model -> token head d_model")
    for norm in (getattr(block, "ln1_post", None), model.bridge.ln_final):
        written = Norm(norm, W_O[0]).push(written)
    W_U = model.bridge.W_U
    return written @ (W_U if words is None else W_U[:, words]).to(written)


@torch.no_grad()
def key_scores(
    model: LoadedModel,
    ids: Int[Tensor, "row pos"],
    queries: Mapping[int, Float[Tensor, "row head d_head"]],
    at: int,
    keys: Mapping[int, Float[Tensor, "row kv_head d_head"]] | None = None,
) -> dict[int, Float[Tensor, "row head"]]:
    """How strongly given queries of the last token find position `at`, by layer, before softmax.

    The queries (hook_q of another run) are put in place of the last token's own in a real forward
    of `ids`, so that norms of queries and keys, RoPE and masks are the model's. The keys are those
    of `ids`, or given ones. All layers at once: what the last token reads does not reach `at`
    before it, and given keys need nothing from below. Raises BadInput for a position outside the
    prompt, or the last one.
    """
    if not -ids.shape[1] <= at < ids.shape[1] - 1 or at == -1:
        raise BadInput(f"position {at} is not before the last of {ids.shape[1]} tokens")
    scores: dict[int, Tensor] = {}

    def put(x: Tensor, hook: object, where: int, new: Tensor) -> Tensor:
        x = x.clone()
        x[:, where] = new.to(x)
        return x

    def read(x: Tensor, hook: object, layer: int) -> Tensor:
        scores[layer] = x[:, :, -1, at]
        return x

    hooks = []
    for layer, query in queries.items():
        place = f"blocks.{layer}.attn.hook_"
        hooks.append((place + "q", lambda x, hook, q=query: put(x, hook, -1, q)))
        if keys is not None:
            hooks.append((place + "k", lambda x, hook, k=keys[layer]: put(x, hook, at, k)))
        hooks.append((place + "attn_scores", lambda x, hook, n=layer: read(x, hook, n)))
    model.bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)
    return scores


def _projected(
    model: LoadedModel, layer: int, resid: Float[Tensor, "token d_model"], which: str
) -> Float[Tensor, "token kv_head d_head"]:
    block = _block(model, layer)
    weight, bias = getattr(block.attn, f"W_{which}"), getattr(block.attn, f"b_{which}", None)
    normed = block.ln1(resid)
    made = einsum(
        normed,
        weight.to(normed),
        "token d_model, kv_head d_model d_head -> token kv_head d_head",
    )
    return made if bias is None else made + bias.to(made)


def _block(model: LoadedModel, layer: int) -> nn.Module:
    if not 0 <= layer < model.n_layers:
        raise BadInput(f"{model.name} has no layer {layer}: its layers are 0 to "
                       f"{model.n_layers - 1}")  # fmt: skip
    return model.bridge.blocks[layer]
