"""Units of keys and values: which channels stand or fall together under a mask.

A mask over what attention reads has one gate per unit. A value channel can be a unit by itself. A
key channel of a rotary model cannot: rotation mixes the two channels of a pair, and taking away
one of them, after rotation, makes a score depend on the absolute position. Taking away a pair
leaves it relative, and does the same before and after rotation. Which channels form a pair differs
(Llama i and i + d/2, GPT-J i and i + 1, GPT-NeoX only in its rotated part, GPT-2 none), so it is
asked of the model: a key of one channel and a query of another, one position apart, have a score
other than 0 only if rotation joins them.

A unit's place is a map from every entry of K and of V to a unit's number. Pairs, single channels,
one gate per head, and keys tied to values are then nothing but other maps, and a mask is spread
over the entries by indexing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.sources.native.model import NativeModel

from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

Resolution = Literal["kv", "query", "head"]
Keys = Literal["pairs", "single"]


@dataclass(frozen=True)
class Units:
    """Which gate governs which entry of K and of V; `head` is the kv_head, or the query head."""

    k: Int[Tensor, "layer head d_head"]
    v: Int[Tensor, "layer head d_head"]
    resolution: Resolution = "kv"

    @property
    def total(self) -> int:
        """Number of units."""
        return int(max(self.k.max(), self.v.max())) + 1

    def spread(
        self, gates: Shaped[Tensor, "*row unit"]
    ) -> tuple[Shaped[Tensor, "*row layer head d_head"], Shaped[Tensor, "*row layer head d_head"]]:
        """A value per unit as a value per entry of K and of V."""
        k, v = self.k.to(gates.device), self.v.to(gates.device)
        return gates[..., k], gates[..., v]

    def gather(
        self,
        k: Float[Tensor, "layer head d_head"],
        v: Float[Tensor, "layer head d_head"],
    ) -> Float[Tensor, " unit"]:
        """A value per entry summed over each unit's entries."""
        total = torch.zeros(self.total, dtype=k.dtype, device=k.device)
        total.index_add_(0, self.k.flatten().to(k.device), k.flatten())
        return total.index_add_(0, self.v.flatten().to(k.device), v.flatten())

    def table(self) -> pd.DataFrame:
        """One row per unit: layer, part (K, V, or KV where tied), head and first channel."""
        rows: dict[int, dict] = {}
        for part, places in (("K", self.k), ("V", self.v)):
            for layer, head, channel in torch.cartesian_prod(
                *(torch.arange(n) for n in places.shape)
            ).tolist():
                unit = int(places[layer, head, channel])
                place = {"part": part, "layer": layer, "head": head, "channel": channel}
                if rows.setdefault(unit, place)["part"] != part:
                    rows[unit]["part"] = "KV"
        return pd.DataFrame([{"unit": u, **rows[u]} for u in sorted(rows)])


def make_units(
    n_layers: int,
    n_heads: int,
    partner: Int[Tensor, " d_head"],
    resolution: Resolution = "kv",
    keys: Keys = "pairs",
    tied: bool = False,
) -> Units:
    """Units of a model of this shape; `partner` is the channel each one is rotated with.

    resolution: "kv" and "query" have channels of each head of that kind, "head" one gate per head
    and part. tied: a key channel and the value channel of the same number share a gate (models
    with K = V, and the original recipe). Raises BadInput for keys that are not "pairs" or "single".
    """
    if keys not in ("pairs", "single"):
        raise BadInput(f"keys {keys!r}: say pairs or single")
    d_head = len(partner)
    single = torch.arange(d_head)
    joined = torch.minimum(single, partner) if keys == "pairs" else single
    if resolution == "head":
        joined = single = torch.zeros_like(single)
    k_of, v_of = joined, joined if tied else single
    k_of = torch.unique(k_of, return_inverse=True)[1]
    v_of = torch.unique(v_of, return_inverse=True)[1]
    n_k, n_v = int(k_of.max()) + 1, 0 if tied else int(v_of.max()) + 1
    head = torch.arange(n_layers * n_heads).view(n_layers, n_heads, 1) * (n_k + n_v)
    k = head + k_of
    return Units(k, k if tied else head + n_k + v_of, resolution)


def units_of(
    model: LoadedModel,
    resolution: Resolution = "kv",
    keys: Keys = "pairs",
    tied: bool = False,
) -> Units:
    """A model's units, its rotary pairs read from the model itself. See `make_units`."""
    cfg = model.bridge.cfg
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    heads = cfg.n_heads if resolution == "query" else kv_heads
    return make_units(cfg.n_layers, heads, rotary_partners(model), resolution, keys, tied)


def key_site(model: LoadedModel, name: str = "k") -> tuple[str, bool]:
    """The hook where keys (or with "q" queries) are as rotation finds them, and whether its layout
    is [batch, head, pos, d_head] instead of [batch, pos, head, d_head].

    Models that norm their queries and keys (Qwen3, Gemma 3) do so before rotation: a channel taken
    away before the norm would change all the others.
    """
    normed = f"attn.hook_{name}_normed"
    if f"blocks.0.{normed}" in model.bridge.hook_dict:
        return normed, True
    return f"attn.hook_{name}", False


@torch.no_grad()
def rotary_partners(model: LoadedModel) -> Int[Tensor, " d_head"]:
    """The channel that each key channel is rotated with; itself where nothing is rotated.

    Row i of the probe has keys e_i, and its query at position s is e_(s-1). The score of s with
    s - 1 is exactly 0 unless rotation by one position joins i and s - 1. Layer 0 speaks for all.
    """
    d_head = model.bridge.cfg.d_head
    single = torch.arange(d_head)
    if isinstance(model.bridge.original_model, NativeModel):  # its scores cannot be hooked
        rotary = model.bridge.cfg.positional_embedding_type == "rotary"
        turned = model.bridge.cfg.rotary_dim or d_head
        return torch.where(single < turned, single ^ 1, single) if rotary else single
    joined = torch.cat([_joined(model, rows.tolist()) for rows in single.split(16)])
    joined |= joined.T.clone()  # bfloat16 may round one of the two scores to 0
    partner = single.clone()
    for i, row in enumerate(joined):
        others = [j for j in row.nonzero().flatten().tolist() if j != i]
        if len(others) > 1:
            raise BadInput(f"{model.name}: rotation joins key channel {i} with {len(others)} "
                           "others, not with one: use --keys single")  # fmt: skip
        partner[i] = others[0] if others else i
    return partner


def _joined(model: LoadedModel, rows: Sequence[int]) -> Bool[Tensor, "row d_head"]:
    """Which channels have a score with each of these key channels, one position later."""
    d_head = model.bridge.cfg.d_head
    length = min(d_head + 1, model.n_ctx)
    if length <= d_head:
        raise BadInput(f"{model.name}: a context of {model.n_ctx} is too short to find the rotary "
                       f"pairs of {d_head} channels: use --keys single")  # fmt: skip
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=model.device)
    found: list[Tensor] = []

    def put(x: Tensor, hook: object, chosen: Tensor, swapped: bool) -> Tensor:
        """chosen is [batch or 1, pos or 1, 1, d_head]."""
        chosen = chosen.to(x.device, x.dtype)
        return (chosen.transpose(1, 2) if swapped else chosen).expand_as(x).clone()

    def read(scores: Tensor, hook: object) -> None:
        found.append(scores[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1))
        raise StopAtLayerException(scores)

    eye = torch.eye(d_head)
    sent = {"k": eye[list(rows)][:, None, None], "q": torch.cat([eye[:1], eye])[None, :, None]}
    hooks = [("blocks.0.attn.hook_attn_scores", read)]
    for name, chosen in sent.items():
        site, swapped = key_site(model, name)
        hooks.append((f"blocks.0.{site}", lambda x, hook, c=chosen, s=swapped: put(x, hook, c, s)))
    model.bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False)
    return (found[0] != 0).cpu()
