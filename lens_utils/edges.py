"""Edges: through which direct connections does the difference between two prompts travel?

The residual stream is a sum, so what any part of the model reads is the sum of what parts below it
wrote. That makes a graph. Senders write: the embedding, every head, every MLP. Receivers read: the
query of every head, the key and the value of every kv_head, every MLP, and the readout (logits).
An edge is what one sender alone adds to the input of one receiver. Senders are numbered upwards
through the model, so that every receiver reads the first so many of them; where heads and MLP of a
block stand side by side (GPT-NeoX), its MLP does not read its heads.

Edge attribution patching scores all edges from one backward pass (Syed et al. 2023,
arXiv:2310.10348; with integrated gradients, Hanna et al. 2024, arXiv:2403.17806):

    score(sender -> receiver) = (sender's clean - corrupted write) . gradient at receiver's input

The gradient at a receiver's own input is that of its queries, say, pulled back through its
projection and norm; gradients in the stream itself would mix all receivers.

Path patching does it in earnest, one receiver at a time (Goldowsky-Dill et al. 2023,
arXiv:2304.05969): its input changes by what one sender would write differently, everything in
between frozen; it is computed anew and patched into a corrupted run that then goes on freely.

Behind a norm after attention (Gemma 2 and 3) a head's write is its share at the scale of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from lens_utils.attribution import Norm
from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.gradients import PLAIN, backward, line
from lens_utils.lens import Readout, hook
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch
from lens_utils.patching import TOKENS, check, resume


class Node(NamedTuple):
    """A sender (embed, head, mlp) or a receiver (q, k, v, mlp_in, logits)."""

    part: str
    layer: int | None = None
    head: int | None = None
    """Of k and v, the kv_head."""

    def __str__(self) -> str:
        match self.part:
            case "head":
                return f"L{self.layer}H{self.head}"
            case "q":
                return f"L{self.layer}H{self.head}.q"
            case "k" | "v":
                return f"L{self.layer}KV{self.head}.{self.part}"
            case "mlp" | "mlp_in":
                return f"MLP{self.layer}"
        return self.part


@dataclass(frozen=True)
class Graph:
    """All senders and receivers of a model, in the order in which they are computed."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool
    parallel: bool

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        found = [Node("embed")]
        for layer in range(self.n_layers):
            found += [Node("head", layer, head) for head in range(self.n_heads)]
            found += [Node("mlp", layer)] * self.has_mlp
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        found = []
        for layer in range(self.n_layers):
            for part, size in self.projections.items():
                found += [Node(part, layer, head) for head in range(size)]
            found += [Node("mlp_in", layer)] * self.has_mlp
        return (*found, Node("logits"))

    @cached_property
    def projections(self) -> dict[str, int]:
        """How many of each a layer has."""
        return {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}

    def heads(self, layer: int) -> slice:
        """A layer's heads among the senders."""
        first = 1 + layer * (self.n_heads + self.has_mlp)
        return slice(first, first + self.n_heads)

    def reads(self, part: str, layer: int) -> slice:
        """All receivers of a part and layer."""
        first = self.receivers.index(Node(part, layer, None if part == "mlp_in" else 0))
        return slice(first, first + self.projections.get(part, 1))

    def below(self, receiver: Node) -> int:
        """How many of the senders a receiver can read."""
        if receiver.part == "logits":
            return len(self.senders)
        heads = self.heads(receiver.layer)
        behind_heads = receiver.part == "mlp_in" and not self.parallel
        return heads.stop if behind_heads else heads.start

    @cached_property
    def exists(self) -> Bool[Tensor, "sender receiver"]:
        """Which edges there are."""
        below = torch.tensor([self.below(receiver) for receiver in self.receivers])
        return torch.arange(len(self.senders))[:, None] < below


def graph(model: LoadedModel) -> Graph:
    """The senders and receivers of a model."""
    cfg = model.bridge.cfg
    has_mlp = "blocks.0.hook_mlp_out" in model.bridge.hook_dict
    return Graph(
        cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, has_mlp,
        bool(cfg.parallel_attn_mlp),
    )  # fmt: skip


# What is written


class Writer:
    """Splits what attention adds to the stream into the shares of its heads."""

    def __init__(self, model: LoadedModel) -> None:
        like = torch.zeros(1, model.bridge.cfg.d_model, device=model.device)
        self.W_O: list[Float[Tensor, "head d_head d_model"]] = []
        self.norms: list[Norm] = []
        for block in model.bridge.blocks:
            self.W_O.append(block.attn.W_O.float())
            # At a head's own scale a norm behind attention is linear, and shares add up.
            self.norms.append(Norm(getattr(block, "ln1_post", None), like.to(self.W_O[-1])))

    @staticmethod
    def names(model: LoadedModel, layer: int) -> list[str]:
        """The hooks of a layer that `shares` wants: z, attn_out and, where there is one, scale."""
        normed = hasattr(model.bridge.blocks[layer], "ln1_post")
        parts = ("attn.hook_z", "hook_attn_out", *(["ln1_post.hook_scale"] if normed else []))
        return [f"blocks.{layer}.{part}" for part in parts]

    def shares(
        self, layer: int, held: Sequence[Float[Tensor, "row pos ..."]]
    ) -> Float[Tensor, "head row pos d_model"]:
        """Every head's write, float32. What is no head's (a bias) is dealt out equally."""
        z, attn_out, *scale = held
        own = einsum(
            z.float(),
            self.W_O[layer],
            "row pos head d_head, head d_head d_model -> head row pos d_model",
        )
        own = self.norms[layer].push(own) / (scale[0].float() if scale else 1)
        return own + (attn_out.float() - own.sum(0)) / len(own)


@torch.no_grad()
def writes(
    model: LoadedModel, batch: Batch
) -> tuple[Float[Tensor, "sender pair pos d_model"], Float[Tensor, "sender pair pos d_model"]]:
    """What every sender writes in the clean and in the corrupted run, float32.

    The senders' sum is the final residual.
    """
    writer, found = Writer(model), []
    mlps = graph(model).has_mlp
    for ids in (batch.clean, batch.corrupt):
        layers = [Writer.names(model, layer) for layer in range(model.n_layers)]
        outs = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers) if mlps]
        held = record(model, ids, [hook(0), *outs, *(name for names in layers for name in names)])
        parts = [held[hook(0)].float()[None]]
        for layer, names in enumerate(layers):
            parts.append(writer.shares(layer, [held[name] for name in names]).to(model.device))
            parts += [held[out].float()[None].to(model.device) for out in outs[layer : layer + 1]]
        found.append(torch.cat(parts))
    return found[0], found[1]


# Edge attribution


def edge_scores(
    model: LoadedModel, batch: Batch, at: Sequence[float] = PLAIN
) -> Float[Tensor, "pair sender receiver"]:
    """First-order effect, in nats, of every edge going from corrupted to clean; summed over pos.

    Senders and receivers as in `graph(model)`; zero where there is no edge. `at` as in
    `gradients.attribute`: PLAIN is EAP, `midpoints()` EAP-IG. All edges out of the embedding sum to
    the logit difference, with enough points. Raises BadInput for points outside 0 .. 1.
    """
    check(model, batch, [])
    nodes, readout = graph(model), Readout(model.bridge)
    dtype = model.bridge.blocks[0].attn.W_Q.dtype
    clean, corrupt = writes(model, batch)
    difference = clean - corrupt
    names = {
        (part, layer): f"blocks.{layer}.{where}"
        for layer in range(model.n_layers)
        for part, where in _inputs(nodes).items()
    } | {("logits", None): hook(model.n_layers)}
    shape = (len(batch.clean), len(nodes.senders), len(nodes.receivers))
    scores = torch.zeros(shape, device=model.device)
    for embedding in line(clean[0].to(dtype), corrupt[0].to(dtype), at):
        values, gradients = backward(model, readout, batch, embedding, list(names.values()))
        for (part, layer), name in names.items():
            if part == "resid_pre":
                continue
            into = gradients[name][None]
            where = slice(-1, None) if layer is None else nodes.reads(part, layer)
            if part in nodes.projections:
                into = _pulled(model, part, layer, values[names["resid_pre", layer]], into[0])
            below = nodes.below(nodes.receivers[where][0])
            scores[:, :below, where] += einsum(
                difference[:below],
                into.to(difference),
                "sender pair pos d_model, receiver pair pos d_model -> pair sender receiver",
            ) / len(at)
    return scores


def _inputs(nodes: Graph) -> dict[str, str]:
    """Receivers of a block, and where their gradient is taken. ln2.hook_in is the MLP's alone."""
    own = {"resid_pre": "hook_resid_pre", **{p: f"attn.hook_{p}" for p in nodes.projections}}
    return own | ({"mlp_in": "ln2.hook_in"} if nodes.has_mlp else {})


def _pulled(
    model: LoadedModel,
    part: str,
    layer: int,
    resid: Float[Tensor, "pair pos d_model"],
    gradient: Float[Tensor, "pair pos head d_head"],
) -> Float[Tensor, "head pair pos d_model"]:
    """Gradients of queries, keys or values as gradients of the residual each of them reads."""
    block = model.bridge.blocks[layer]
    weight = getattr(block.attn, f"W_{part.upper()}")
    normed = einsum(
        gradient.to(weight),
        weight,
        "pair pos head d_head, head d_model d_head -> head pair pos d_model",
    )
    with torch.enable_grad():
        own = resid.detach().expand_as(normed).clone().requires_grad_()
        (found,) = torch.autograd.grad(block.ln1(own), own, normed)
    return found.float()


def project(
    model: LoadedModel,
    part: str,
    layer: int,
    resid: Float[Tensor, "head row pos d_model"],
    heads: slice = slice(None),
) -> Float[Tensor, "row pos head d_head"]:
    """Queries, keys or values as a block makes them, each head from a residual of its own."""
    block = model.bridge.blocks[layer]
    weight = getattr(block.attn, f"W_{part.upper()}")[heads]
    bias = getattr(block.attn, f"b_{part.upper()}", None)
    made = einsum(
        block.ln1(resid.to(weight)),
        weight,
        "head row pos d_model, head d_model d_head -> row pos head d_head",
    )
    return made if bias is None else made + bias[heads]


# Path patching


@torch.no_grad()
def path_patch(
    model: LoadedModel, batch: Batch, receiver: Node, tokens: int = TOKENS
) -> Float[Tensor, "pair sender"]:
    """Change of the logit difference, in nats, when a sender is clean for this one receiver.

    Senders are the first `graph(model).below(receiver)`. The rest of the model reads the corrupted
    run, up to the receiver. Raises BadInput for a receiver that the model does not have.
    """
    nodes, readout, n_pairs = graph(model), Readout(model.bridge), len(batch.clean)
    check(model, batch, [])
    if receiver not in nodes.receivers:
        raise BadInput(f"{model.name} has no receiver {receiver}")
    moved = _moves(model, batch, nodes, nodes.below(receiver))
    last = hook(model.n_layers)
    final = record(model, batch.corrupt, [last])[last][:, -1].float()
    corrupt = readout.logit_diff(final, batch.answer, batch.foil)
    if receiver.part == "logits":
        return (readout.logit_diff(final + moved[:, :, -1], batch.answer, batch.foil) - corrupt).T
    part, layer, head = receiver
    name = f"blocks.{layer}.{_inputs(nodes)[part]}"
    start = f"blocks.{layer}.hook_resid_pre"
    held = record(model, batch.corrupt, [start, name])
    most = max(1, tokens // batch.clean.numel())
    found = []
    for senders in moved.split(most):

        def read(x: Tensor, hook: object, senders: Tensor = senders) -> Tensor:
            if part == "mlp_in":
                return (held[name] + senders).flatten(0, 1).to(x)
            resid = (held[start] + senders).flatten(0, 1)[None]
            x = x.clone()
            x[:, :, head : head + 1] = project(model, part, layer, resid, slice(head, head + 1))
            return x

        rows = held[start].repeat(len(senders), 1, 1)
        final = resume(model, rows, layer, [(name, read)]).unflatten(0, (len(senders), n_pairs))
        found.append(readout.logit_diff(final, batch.answer, batch.foil) - corrupt)
    return torch.cat(found).T


def _moves(
    model: LoadedModel, batch: Batch, nodes: Graph, below: int
) -> Float[Tensor, "sender pair pos d_model"]:
    """How the stream moves at once when one sender is clean and all others are corrupted.

    Of the first senders, float32. A head's norm behind attention, where there is one, is computed
    anew with that head replaced.
    """
    clean, corrupt = writes(model, batch)
    moved = (clean - corrupt)[:below]
    normed = [layer for layer, block in enumerate(model.bridge.blocks)
              if hasattr(block, "ln1_post") and nodes.heads(layer).start < below]  # fmt: skip
    z, out = ({layer: f"blocks.{layer}.attn.{part}" for layer in normed}
              for part in ("hook_z", "hook_out"))  # fmt: skip
    if normed:
        names = [*z.values(), *out.values()]
        there, here = (record(model, ids, names) for ids in (batch.clean, batch.corrupt))
    for layer in normed:
        block = model.bridge.blocks[layer]
        own = einsum(
            (there[z[layer]] - here[z[layer]]).float(),
            block.attn.W_O.float(),
            "pair pos head d_head, head d_head d_model -> head pair pos d_model",
        )
        before = here[out[layer]].float()
        moved[nodes.heads(layer)] = block.ln1_post(before + own) - block.ln1_post(before)
    return moved
