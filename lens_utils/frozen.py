"""The linear model of one prompt, and the edges of its attribution graph.

Attention patterns and what norms divide by are held at what they were in one forward pass, and
every MLP is the features of its transcoder plus the error that the transcoder makes (`replacement`
takes a model apart like that). What is left is linear from feature to feature, so the
pre-activation of every feature, and every logit, is a sum:

    value(target) = sum over sources of edge(source -> target) + bias(target)

Sources are active features, error nodes (one per layer and position) and token embeddings; the
bias is what all constants (b_dec, b_enc, biases of attention and norms) add together. Nothing is
left over, and the tests hold it to that.

1. An edge is the vector that a source writes, dotted with the gradient of the target there. That
   gradient is carried down from the target by hand: through W_O, back along the pattern, through
   W_V, past skip connections. No autograd: targets of all layers go down in one batch, each joins
   at its own layer, and only positions that it can see are computed.
2. Rows (targets) are computed only for the features that matter: repeatedly those with the largest
   influence on the logits, by the rows that are there already.

Source: Ameisen et al. 2025, "Circuit Tracing" (transformer-circuits.pub); the greedy choice of rows
is that of the circuit-tracer library.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lens_utils.attribution_graph import Graph, partial_influence
from lens_utils.errors import BadInput

ROWS = 512  # targets of one walk
NEAR = 1.2  # positions of one walk differ at most by this factor: later ones compute less in vain
UPDATE = 2048  # rows between two rankings of the features that are left


class Block(NamedTuple):
    """A frozen block: linear maps on the residual stream, with the norms' gains in them."""

    pattern: Float[Tensor, "head query key"]
    """Divided by what the norms before and behind attention divide by."""
    W_O: Float[Tensor, "head d_head d_model"]
    W_V: Float[Tensor, "kv_head d_head d_model"]
    skip: Float[Tensor, "d_model d_model"] | None = None
    """Of a skip transcoder, stream written x stream read."""
    skip_scale: Float[Tensor, " pos"] | None = None
    """What the norms around the MLP multiply it by."""
    before_attention: Float[Tensor, "pos d_model"] | None = None
    """Of a norm that responds (`norm_response`): the direction in the stream that it holds back."""
    before_mlp: Float[Tensor, "pos d_model"] | None = None


@dataclass(frozen=True)
class Frozen:
    """The linear model of one prompt: what is written, what is read, and what lies between."""

    ids: Int[Tensor, " pos"]
    blocks: tuple[Block, ...]
    parallel: bool
    """Whether the MLP reads what attention reads (GPT-NeoX)."""
    features: Int[Tensor, "feature 3"]
    """Layer, position and index of every active feature, sorted."""
    activations: Float[Tensor, " feature"]
    encoders: Float[Tensor, "feature d_model"]
    """What a feature's pre-activation reads in the stream before its MLP."""
    decoders: Float[Tensor, "feature d_model"]
    """What a feature writes into the stream, its activation in it."""
    errors: Float[Tensor, "layer pos d_model"]
    embed: Float[Tensor, "pos d_model"]
    unembed: Float[Tensor, "logit d_model"]
    """What a logit, less the mean of all logits, reads in the last position's final stream."""
    logit_ids: Int[Tensor, " logit"]
    logit_probs: Float[Tensor, " logit"]
    bias: Float[Tensor, " target"]
    """What constants add to every feature's pre-activation, then to every logit."""
    values: Float[Tensor, " target"]
    """The same targets' values in the model: pre-activations, and logits less their mean."""

    @property
    def n_sources(self) -> int:
        """Features, errors and embeddings."""
        return len(self.features) + (len(self.blocks) + 1) * len(self.ids)


# Edges


@torch.no_grad()
def edges(frozen: Frozen, targets: Int[Tensor, " row"]) -> Float[Tensor, "row source"]:
    """Every source's edge into some targets: features by their number, logits behind them.

    Sources are features, errors (layer by layer) and tokens.
    """
    n_features, last = len(frozen.features), len(frozen.ids) - 1
    logits = torch.tensor([[len(frozen.blocks), last, 0]]).expand(len(frozen.unembed), 3)
    places = torch.cat([frozen.features, logits.to(frozen.features)])[targets]
    found = frozen.embed.new_zeros(len(targets), frozen.n_sources)
    for part in _alike(places):
        which = targets[part]
        read = frozen.embed.new_empty(len(part), frozen.embed.shape[1])
        logit = which >= n_features
        read[~logit] = frozen.encoders[which[~logit]]
        read[logit] = frozen.unembed[which[logit] - n_features]
        found[part] = _walk(frozen, places[part], read)
    return found


def _alike(places: Int[Tensor, "row 3"]) -> Iterator[Int[Tensor, " part"]]:
    """Targets that go down together: of near positions, and in each part the highest first."""
    layer, pos = places[:, 0].tolist(), places[:, 1].tolist()
    order = sorted(range(len(places)), key=lambda i: (pos[i], -layer[i]))
    start = 0
    for at in range(1, len(order) + 1):
        ended = at == len(order) or pos[order[at]] + 1 > NEAR * (pos[order[start]] + 1)
        if ended or at - start == ROWS:
            yield torch.tensor(sorted(order[start:at], key=lambda i: -layer[i]))
            start = at


def _walk(
    frozen: Frozen, places: Int[Tensor, "row 3"], read: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row source"]:
    """Carry what targets read down to the embedding, and meet every source on the way."""
    layers, positions = places[:, 0].contiguous(), places[:, 1]
    n_pos, seen = len(frozen.ids), int(positions.max()) + 1
    n_features, n_layers = len(frozen.features), len(frozen.blocks)
    found = read.new_zeros(len(places), frozen.n_sources)
    to_errors, to_tokens = found[:, n_features:].split([n_layers * n_pos, n_pos], dim=1)
    gradient = read.new_zeros(len(places), seen, read.shape[1])
    gradient[torch.arange(len(places)), positions] = read
    # Features are sorted by layer and position: those of one place lie side by side.
    per_place = torch.bincount(frozen.features[:, 0] * n_pos + frozen.features[:, 1],
                               minlength=n_layers * n_pos)  # fmt: skip
    starts = [0, *per_place.cumsum(0).tolist()]
    for layer in range(n_layers - 1, -1, -1):
        above = gradient[: int((layers > layer).sum())]
        reading = above if frozen.parallel else gradient[: int((layers >= layer).sum())]
        if not len(reading):
            continue
        block, n = frozen.blocks[layer], len(above)
        for pos in range(seen):
            here = slice(*starts[layer * n_pos + pos : layer * n_pos + pos + 2])
            found[:n, here] = above[:, pos] @ frozen.decoders[here].T
        first = layer * n_pos
        to_errors[:n, first : first + seen] = torch.linalg.vecdot(
            above, frozen.errors[layer, :seen]
        )
        by_skip = torch.zeros(())
        if block.skip is not None:
            by_skip = (above * block.skip_scale[:seen, None]) @ block.skip
            by_skip = held_back(by_skip, block.before_mlp)
        if frozen.parallel:
            reading += _attended(block, reading) + by_skip
        else:
            above += by_skip
            reading += _attended(block, reading)
    to_tokens[:, :seen] = torch.linalg.vecdot(gradient, frozen.embed[:seen])
    return found


def _attended(
    block: Block, gradient: Float[Tensor, "row query d_model"]
) -> Float[Tensor, "row key d_model"]:
    """The gradient behind attention, taken back to what attention read."""
    seen, n_kv = gradient.shape[1], len(block.W_V)
    by_head = einsum(
        gradient, block.W_O, "row query d_model, head d_head d_model -> row query head d_head"
    )
    by_value = einsum(
        by_head.unflatten(2, (n_kv, -1)),  # heads that share a kv_head are neighbours
        block.pattern[:, :seen, :seen].unflatten(0, (n_kv, -1)),
        "row query kv_head group d_head, kv_head group query key -> row key kv_head d_head",
    )
    read = einsum(by_value, block.W_V, "row key kv_head d_head, kv_head d_head d_model -> "
                                       "row key d_model")  # fmt: skip
    return held_back(read, block.before_attention)


def held_back(
    gradient: Float[Tensor, "... d_model"], along: Float[Tensor, "... d_model"] | None
) -> Float[Tensor, "... d_model"]:
    """A gradient without its part along what its norm divides out, where that norm responds.

    along: of the gradient's positions, from the first; longer ones are cut.
    """
    if along is None:
        return gradient
    along = along[: gradient.shape[-2]]
    return gradient - torch.linalg.vecdot(gradient, along)[..., None] * along


# The graph


def forecast(n_rows: int, n_sources: int, itemsize: int = 4) -> int:
    """Bytes that the rows of a graph take, with the copy that ranking needs."""
    return 2 * n_rows * n_sources * itemsize


@torch.no_grad()
def build(
    frozen: Frozen,
    max_features: int = 1500,
    budget: int = 4 * 2**30,
    update: int = UPDATE,
    tick: Callable[[int], object] = lambda rows: None,
) -> Graph:
    """The graph of the logits and the `max_features` features of most influence on them.

    update: rows between two rankings; tick is told after each how many were computed. Raises
    BadInput beyond a budget in bytes.
    """
    n_active, n_logits = len(frozen.features), len(frozen.unembed)
    n_rows = min(max_features, n_active) + n_logits
    needed = forecast(n_rows, frozen.n_sources, frozen.embed.itemsize)
    if needed > budget:
        raise BadInput(
            f"a graph of {n_rows} rows x {frozen.n_sources} sources needs "
            f"{needed / 2**30:.1f} GiB, more than {budget / 2**30:.1f}: lower max_features "
            f"({max_features}), shorten the prompt ({len(frozen.ids)} tokens) or use transcoders "
            "with fewer active features"
        )
    device = frozen.embed.device
    rows = frozen.embed.new_empty(n_rows, frozen.n_sources)
    rows[:n_logits] = edges(frozen, n_active + torch.arange(n_logits, device=device))
    tick(n_logits)
    chosen = torch.arange(0, device=device)
    while len(chosen) + n_logits < n_rows:
        more = torch.arange(n_active, device=device)
        if n_rows < n_active + n_logits:
            done = len(chosen) + n_logits
            rank = partial_influence(rows[:done], frozen.logit_probs, chosen)[:n_active]
            rank[chosen] = -1
            more = rank.argsort(descending=True, stable=True)[: min(update, n_rows - done)]
        at = n_logits + len(chosen)
        rows[at : at + len(more)] = edges(frozen, more)
        chosen = torch.cat([chosen, more])
        tick(len(more))
    return _packed(frozen, rows, chosen)


def _packed(
    frozen: Frozen, rows: Float[Tensor, "row source"], chosen: Int[Tensor, " feature"]
) -> Graph:
    n_active, n_logits = len(frozen.features), len(frozen.unembed)
    kept, order = chosen.sort()
    others = torch.arange(n_active, frozen.n_sources, device=kept.device)
    columns = torch.cat([kept, others])
    n_nodes = len(columns) + n_logits
    matrix = rows.new_zeros(n_nodes, n_nodes)
    matrix[: len(kept), : len(columns)] = rows[n_logits:][order][:, columns]
    matrix[len(columns) :, : len(columns)] = rows[:n_logits][:, columns]
    left = torch.ones(frozen.n_sources, dtype=torch.bool, device=kept.device)
    left[columns] = False
    omitted = rows[:, left].sum(1)

    def on_nodes(of_features: Tensor, of_logits: Tensor) -> Tensor:
        between = of_logits.new_zeros(len(others))
        return torch.cat([of_features, between, of_logits])

    return Graph(
        frozen.ids, len(frozen.blocks), frozen.features[kept], frozen.activations[kept],
        frozen.logit_ids, frozen.logit_probs, matrix,
        on_nodes(frozen.bias[kept], frozen.bias[n_active:]),
        on_nodes(omitted[n_logits:][order], omitted[:n_logits]),
        on_nodes(frozen.values[kept], frozen.values[n_active:]),
    )  # fmt: skip
