"""Heads as time series: how large is each head's output at every step of a text?

While a model writes, attention head h of layer l puts out one vector z per step. Its length ||z||,
before W_O mixes the heads, is that head's activity, and its course over the steps is what
integrated information is computed from (`phiid`).

1. The text is generated first (`generate.continuations`), without measuring anything.
2. Prompt and text then go through the model once, whole. Step 0 is the last token of the prompt,
   which decides the first token of the text; the last token of the text decides nothing that is
   kept and is left out. A causal model computes the same numbers as step by step, only faster.

Rows are padded on the left, so that the last `steps` columns are the steps of every row.

In a mixture model the experts' outputs can stand for the heads: an expert that is not chosen at a
step has put out nothing, 0.

A model that writes in circles gives periodic series, whatever its heads do: `loops` tells.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel


@torch.no_grad()
def head_norms(
    model: LoadedModel, rows: Sequence[Sequence[int]], steps: int, batch_size: int = 20
) -> Float[Tensor, "prompt head step"]:
    """||z|| of every query head over the last `steps` tokens of each row, float64 on the CPU.

    The head axis runs over all layers, layer by layer (`heads` names its entries). Raises BadInput
    for rows that are shorter, or longer than the context.
    """
    parts = [
        _heads_of(model, ids, mask, steps) for ids, mask in _batches(model, rows, steps, batch_size)
    ]
    return torch.cat(parts).transpose(1, 2).contiguous()


def _heads_of(model: LoadedModel, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """[prompt, step, head] of one batch."""
    norms: list[Tensor] = []

    def keep(z: Tensor, hook: object) -> Tensor:
        # Not every architecture's hook splits the heads where they are: MLA's does not.
        split = z[:, -steps:].flatten(2).unflatten(2, (model.bridge.cfg.n_heads, -1))
        norms.append(split.to("cpu", torch.float64).norm(dim=-1))
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", keep) for layer in range(model.n_layers)]
    model.bridge.run_with_hooks(
        ids, attention_mask=mask, fwd_hooks=hooks, use_cache=False, logits_to_keep=1
    )
    return torch.cat(norms, dim=2)


@torch.no_grad()
def expert_norms(
    model: LoadedModel, rows: Sequence[Sequence[int]], steps: int, batch_size: int = 20
) -> Float[Tensor, "prompt expert step"]:
    """The length of what every expert adds to the stream, 0 where the router left it out.

    As `head_norms`; the expert axis runs over the layers that have experts (`experts`). Raises
    BadInput for a model without experts, or with experts that are not one module per layer.
    """
    modules = _expert_modules(model)
    parts = [
        _experts_of(model, list(modules.values()), ids, mask, steps)
        for ids, mask in _batches(model, rows, steps, batch_size)
    ]
    return torch.cat(parts).transpose(1, 2).contiguous()


def _experts_of(
    model: LoadedModel, modules: list[nn.Module], ids: Tensor, mask: Tensor, steps: int
) -> Tensor:
    """[prompt, step, expert] of one batch."""
    norms: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        x, chosen, weight = inputs
        found = torch.zeros(len(x), module.num_experts, dtype=torch.float64)
        for slot in range(chosen.shape[1]):  # one expert per token at a time
            at = slice(slot, slot + 1)
            out = type(module).forward(module, x, chosen[:, at], weight[:, at])
            length = out.to("cpu", torch.float64).norm(dim=-1, keepdim=True)
            found.scatter_(1, chosen[:, at].cpu(), length)
        norms.append(found.unflatten(0, tuple(ids.shape))[:, -steps:])

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        model.bridge(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(norms, dim=2)


def heads(model: LoadedModel) -> pd.DataFrame:
    """layer and head of every entry of `head_norms`' head axis."""
    return _named({layer: model.bridge.cfg.n_heads for layer in range(model.n_layers)})


def experts(model: LoadedModel) -> pd.DataFrame:
    """layer and head (the expert's number) of every entry of `expert_norms`' expert axis."""
    return _named({at: m.num_experts for at, m in _expert_modules(model).items()})


def _named(sizes: dict[int, int]) -> pd.DataFrame:
    pairs = [(layer, head) for layer, size in sizes.items() for head in range(size)]
    return pd.DataFrame(pairs, columns=["layer", "head"])


def _batches(model: LoadedModel, rows: Sequence[Sequence[int]], steps: int, size: int):
    """Ids and masks of rows that are long enough and fit the context, padded on the left."""
    if short := next((row for row in rows if len(row) < steps), None):
        raise BadInput(f"{steps} steps need {steps} tokens, a row has {len(short)}")
    if (longest := max(map(len, rows))) > model.n_ctx:
        raise BadInput(f"{longest} tokens are more than the context of {model.name}, {model.n_ctx}")
    for start in range(0, len(rows), size):
        yield model.batch(rows[start : start + size], "left")


def _expert_modules(model: LoadedModel) -> dict[int, nn.Module]:
    """The module that holds a layer's experts, by layer."""
    found = {}
    for layer, block in enumerate(model.bridge.blocks):
        for module in block.modules():
            if hasattr(module, "num_experts") and hasattr(module, "gate_up_proj"):
                found[layer] = module
    if not found:
        raise BadInput(f"{model.name} has no experts that can be told apart: measure its heads")
    return found


def loops(tokens: Int[ndarray, "prompt step"], n: int = 4) -> pd.DataFrame:
    """How far each text goes in circles; one row per text.

    distinct: number of different tokens. repeated: share of its n-grams that came before in it.
    period: of its last half, the smallest number of steps after which it repeats exactly; 0
    where it does not repeat within half of that.
    """
    rows = []
    for text in tokens.tolist():
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        tail = np.array(text[len(text) // 2 :])
        periods = (p for p in range(1, len(tail) // 2 + 1) if (tail[p:] == tail[:-p]).all())
        rows.append(
            {
                "distinct": len(set(text)),
                "repeated": 1 - len(set(grams)) / len(grams) if grams else 0.0,
                "period": next(periods, 0),
            }
        )
    return pd.DataFrame(rows)
