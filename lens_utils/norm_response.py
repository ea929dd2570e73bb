"""Norms that respond: the linear model of a prompt with norms differentiated instead of held.

An attribution graph holds what norms divide by (`frozen`): that makes every value an exact sum, and
it is what circuit-tracer's graphs do. It is not what happens when a feature is taken away. A norm
divides its input x by its length, so of a change dx only what is not along x passes on:

    held         d norm(x) = gain * dx / scale
    responding   d norm(x) = gain * (dx - x (x . dx) / |x|^2) / scale

A feature that writes along the stream, or against it, has large edges in the first and next to no
effect in the model. Where predictions for interventions are wanted, `respond` makes the second out
of the first: the same features, other edges, the true derivative with attention patterns held. Its
edges no longer sum to a value (a norm of twice the input is the same), so it ranks and predicts
interventions and does not replace the graph.

Norms that read the stream respond; those behind attention and MLP (Gemma 2 and 3) stay held.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lens_utils.attribution import Norm
from lens_utils.attribution_graph import Graph
from lens_utils.cache import record
from lens_utils.frozen import Frozen, edges, held_back
from lens_utils.models import LoadedModel


@torch.no_grad()
def respond(model: LoadedModel, frozen: Frozen) -> Frozen:
    """The prompt's linear model with norms that respond. frozen: of `replacement.freeze`."""
    parts = [f"blocks.{layer}.{name}" for layer in range(model.n_layers) for name in ("ln1", "ln2")]
    along = _directions(model, frozen, [*parts, "ln_final"])
    blocks = tuple(
        block._replace(
            before_attention=along[f"blocks.{layer}.ln1"], before_mlp=along[f"blocks.{layer}.ln2"]
        )
        for layer, block in enumerate(frozen.blocks)
    )
    at_mlp = torch.stack([along[f"blocks.{layer}.ln2"] for layer in range(model.n_layers)])
    layers, positions, _ = frozen.features.T
    return replace(
        frozen,
        blocks=blocks,
        encoders=held_back(frozen.encoders, at_mlp[layers, positions]),
        unembed=held_back(frozen.unembed, along["ln_final"][-1:].expand_as(frozen.unembed)),
    )


def same_nodes(graph: Graph, frozen: Frozen) -> Graph:
    """A graph's nodes with the edges that another linear model of the prompt has between them.

    bias, omitted and values are those of the graph: sums hold there only.
    """
    place = {tuple(f): i for i, f in enumerate(frozen.features.tolist())}
    features = [place[tuple(f)] for f in graph.features.tolist()]
    n_active = len(frozen.features)
    targets = [*features, *range(n_active, n_active + len(graph.logit_ids))]
    columns = torch.tensor([*features, *range(n_active, frozen.n_sources)], dtype=torch.long)
    rows = edges(frozen, torch.tensor(targets, device=frozen.embed.device))
    parts, matrix = graph.parts, torch.zeros_like(graph.edges)
    into = torch.cat([torch.arange(len(features)), torch.arange(len(matrix))[parts["logit"]]])
    matrix[into, : len(columns)] = rows[:, columns]
    return replace(graph, edges=matrix)


def _directions(
    model: LoadedModel, frozen: Frozen, names: Sequence[str]
) -> dict[str, Float[Tensor, "pos d_model"]]:
    """What each norm divides out: its input, centred where it centres, over its length.

    Over the length with eps in it, as the norm has it; zeros for a norm that is not there.
    """
    known = model.bridge.hook_dict
    there = [name for name in names if f"{name}.hook_scale" in known]
    hooks = [f"{name}.{part}" for name in there for part in ("hook_in", "hook_scale")]
    held = record(model, frozen.ids[None], hooks)
    found = {name: torch.zeros_like(frozen.embed) for name in names}
    for name in there:
        x, scale = (
            held[f"{name}.{part}"][0].to(frozen.embed) for part in ("hook_in", "hook_scale")
        )
        if Norm(model.bridge.get_submodule(name), x).centred:
            x = x - x.mean(-1, keepdim=True)
        found[name] = x / scale / x.shape[-1] ** 0.5
    return found
