"""The states that probes read: means over chosen tokens at every depth, a few numbers per prompt.

A site is a set of tokens of a prompt (its last one, its cells, its thinking span). The residual
stream is averaged over each site while the model runs, so that memory does not grow with the
length of a thinking trace, and one forward pass serves all sites.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lens_utils import lens
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

Sites = Mapping[str, Sequence[int]]
"""Positions of a prompt's tokens, by site; an empty site gives NaN."""


@torch.no_grad()
def site_means(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    sites: Sequence[Sites],
    depths: Sequence[int],
    tokens_at_once: int = 8192,
) -> dict[str, Float[Tensor, "row depth d_model"]]:
    """Mean residual of each prompt's sites at each depth, in the model's dtype, on the CPU.

    Averaged in float32. Prompts of like length are run together, tokens_at_once at a time with
    their padding. Raises BadInput for a site beyond its prompt and for an empty prompt.
    """
    names = list(sites[0])
    for ids, held in zip(rows, sites, strict=True):
        if not ids or any(not 0 <= p < len(ids) for places in held.values() for p in places):
            raise BadInput(f"a site lies outside its prompt of {len(ids)} tokens")
    d_model, dtype = model.bridge.cfg.d_model, model.bridge.W_E.dtype
    shape = (len(rows), len(names), len(depths), d_model)
    found = torch.full(shape, float("nan"), dtype=dtype)
    for batch in batches([len(ids) for ids in rows], tokens_at_once):
        ids, mask = model.batch([rows[i] for i in batch])
        share = torch.zeros(len(batch), len(names), ids.shape[1], device=ids.device)
        for b, i in enumerate(batch):
            for s, name in enumerate(names):
                places = list(sites[i][name])
                if places:
                    share[b, s, places] = 1 / len(places)
                else:
                    share[b, s] = float("nan")
        pooled: dict[int, Tensor] = {}

        def keep(x: Tensor, hook: object, depth: int, share: Tensor, pooled: dict) -> Tensor:
            pooled[depth] = einsum(
                share.to(x.device), x.float(),
                "batch site pos, batch pos d_model -> batch site d_model",
            ).to(dtype).cpu()  # fmt: skip
            return x

        hooks = [
            (lens.hook(depth), lambda x, hook, d=depth, s=share, p=pooled: keep(x, hook, d, s, p))
            for depth in depths
        ]
        model.bridge.run_with_hooks(
            ids, attention_mask=mask, fwd_hooks=hooks, use_cache=False, logits_to_keep=1
        )
        found[batch] = torch.stack([pooled[depth] for depth in depths], 2)
    return {name: found[:, s] for s, name in enumerate(names)}


def batches(lengths: Sequence[int], tokens_at_once: int) -> list[list[int]]:
    """Row numbers in batches of like length, none of more tokens than asked, padding included
    (but never less than one row)."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and lengths[i] * (len(found[-1]) + 1) <= tokens_at_once:
            found[-1].append(i)
        else:
            found.append([i])
    return found


@torch.no_grad()
def neurons_at_last(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    neurons: Sequence[tuple[int, int]],
    tokens_at_once: int = 8192,
) -> Float[Tensor, "row neuron"]:
    """Outputs of MLP neurons (layer, neuron) at each prompt's last token: what the layer's W_out
    reads. Float32 on the CPU.

    Raises BadInput for a neuron that the model does not have.
    """
    n_layers, d_mlp = model.n_layers, model.bridge.cfg.d_mlp
    for layer, neuron in neurons:
        if not (0 <= layer < n_layers and 0 <= neuron < d_mlp):
            raise BadInput(f"{model.name} has no neuron {neuron} in layer {layer}")
    columns: dict[int, list[int]] = {}
    for column, (layer, _) in enumerate(neurons):
        columns.setdefault(layer, []).append(column)
    found = torch.zeros(len(rows), len(neurons))
    for batch in batches([len(ids) for ids in rows], tokens_at_once):
        ids, mask = model.batch([rows[i] for i in batch])
        last = mask.sum(1) - 1

        def keep(x: Tensor, hook: object, layer: int, last: Tensor, batch: list[int]) -> Tensor:
            where = columns[layer]
            at = x[torch.arange(len(batch), device=x.device), last.to(x.device)]
            taken = at[:, [neurons[column][1] for column in where]].float().cpu()
            found[torch.tensor(batch)[:, None], torch.tensor(where)] = taken
            return x

        hooks = [
            (f"blocks.{layer}.mlp.hook_post",
             lambda x, hook, n=layer, p=last, b=batch: keep(x, hook, n, p, b))
            for layer in columns
        ]  # fmt: skip
        model.bridge.run_with_hooks(
            ids, attention_mask=mask, fwd_hooks=hooks, use_cache=False, logits_to_keep=1
        )
    return found
