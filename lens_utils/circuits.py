"""Circuits of edges: how much of the clean answer do they bring back, in a model that runs?

A score of edges is a guess. Here it is put to the test by real forward passes of the corrupted
prompt in which only some edges are open. Every receiver reads what it reads in the corrupted run,
plus, from each sender it has an open edge to, what that sender now writes differently:

    input = corrupted input + sum over open edges of (sender's write - its corrupted write)

and senders are computed anew on the way up. All edges open is the clean run, none the corrupted
one. Faithfulness is the share of the clean - corrupted logit difference that comes back (Hanna et
al. 2024, arXiv:2403.17806; Conmy et al. 2023, arXiv:2304.14997).
"""

from collections.abc import Callable

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from lens_utils.cache import record
from lens_utils.edges import Graph, Writer, graph, project, writes
from lens_utils.errors import BadInput
from lens_utils.lens import Readout, hook
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch
from lens_utils.patching import check, resume

TOKENS = 512  # of all rows of one forward pass: every sender's write is held for each


def strongest(
    nodes: Graph, scores: Float[Tensor, "sender receiver"], n: int
) -> Bool[Tensor, "sender receiver"]:
    """The n edges of largest absolute score. Raises BadInput for more than there are."""
    exists = nodes.exists.to(scores.device)
    if not 0 <= n <= int(exists.sum()):
        raise BadInput(f"{n} edges of a graph that has {int(exists.sum())}")
    size = scores.abs().masked_fill(~exists, -1).flatten()
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept[size.topk(n).indices] = True
    return kept.unflatten(0, scores.shape)


@torch.no_grad()
def evaluate(
    model: LoadedModel,
    batch: Batch,
    kept: Bool[Tensor, "circuit sender receiver"],
    tokens: int = TOKENS,
) -> Float[Tensor, "circuit pair"]:
    """Logit difference answer - foil, in nats, of every pair with these edges open and no others.

    Circuits are run as rows, so many that a pass holds at most `tokens`. Raises BadInput for edges
    that the model does not have.
    """
    check(model, batch, [])
    nodes, readout = graph(model), Readout(model.bridge)
    if kept.shape[1:] != nodes.exists.shape or (kept & ~nodes.exists.to(kept.device)).any():
        raise BadInput(f"these circuits have edges that {model.name} does not have")
    base = _Corrupted(model, batch)
    most = max(1, tokens // batch.clean.numel())
    finals = [base.run(some.to(model.device).float()) for some in kept.split(most)]
    return readout.logit_diff(torch.cat(finals), batch.answer, batch.foil)


class _Corrupted:
    """A batch's corrupted run, ready to be run again with some edges open."""

    def __init__(self, model: LoadedModel, batch: Batch) -> None:
        self.model, self.nodes, self.writer = model, graph(model), Writer(model)
        clean, self.written = writes(model, batch)
        self.embedding = (clean - self.written)[:1]
        self.inputs = ["hook_resid_pre", *(["ln2.hook_in"] if self.nodes.has_mlp else [])]
        names = [f"blocks.{i}.{name}" for name in self.inputs for i in range(model.n_layers)]
        self.held = record(model, batch.corrupt, [*names, hook(model.n_layers)])

    def run(
        self, kept: Float[Tensor, "circuit sender receiver"]
    ) -> Float[Tensor, "circuit pair d"]:
        """The final residual at the last position."""
        nodes, n_layers = self.nodes, self.model.n_layers
        changed = self.written.new_zeros(len(nodes.senders), len(kept), *self.written.shape[1:])
        changed[:1] = self.embedding[:, None]

        def into(where: slice, name: str) -> Tensor:
            """What some receivers read, [receiver, row, pos, d_model]."""
            below = nodes.below(nodes.receivers[where][0])
            opened = einsum(
                kept[:, :below, where],
                changed[:below],
                "circuit sender receiver, sender circuit pair pos d_model "
                "-> receiver circuit pair pos d_model",
            )
            return (self.held[name].float() + opened).flatten(1, 2)

        hooks: list[tuple[str, Callable]] = []
        for layer in range(n_layers):
            hooks += self._attention(layer, changed, into)
            if nodes.has_mlp:
                hooks += self._mlp(layer, changed, into)
        last = hook(n_layers)
        hooks.append((last, lambda x, hook: into(slice(-1, None), last)[0].to(x)))
        start = self.held[hook(0)].repeat(len(kept), 1, 1)
        return resume(self.model, start, 0, hooks).unflatten(0, (len(kept), -1))

    def _attention(self, layer: int, changed: Tensor, into: Callable) -> list[tuple[str, Callable]]:
        """Queries, keys and values from inputs of their own; what the heads then write."""
        start, heads = f"blocks.{layer}.hook_resid_pre", self.nodes.heads(layer)
        names = Writer.names(self.model, layer)
        held: dict[str, Tensor] = {}

        def read(x: Tensor, hook: object, part: str) -> Tensor:
            own = into(self.nodes.reads(part, layer), start)
            return project(self.model, part, layer, own).to(x)

        def hold(x: Tensor, hook: object, name: str) -> None:
            held[name] = x
            if len(held) == len(names):  # the last of them has come
                shares = self.writer.shares(layer, [held[name] for name in names])
                now = shares.unflatten(1, changed.shape[1:3])
                changed[heads] = now - self.written[heads][:, None]
                held.clear()

        reading = [
            (f"blocks.{layer}.attn.hook_{part}", lambda x, hook, part=part: read(x, hook, part))
            for part in self.nodes.projections
        ]
        return reading + [(name, lambda x, hook, name=name: hold(x, hook, name)) for name in names]

    def _mlp(self, layer: int, changed: Tensor, into: Callable) -> list[tuple[str, Callable]]:
        """The MLP from an input of its own (ln2.hook_in is nobody else's); what it then writes."""
        reads, at = f"blocks.{layer}.ln2.hook_in", self.nodes.heads(layer).stop

        def read(x: Tensor, hook: object) -> Tensor:
            return into(self.nodes.reads("mlp_in", layer), reads)[0].to(x)

        def hold(x: Tensor, hook: object) -> None:
            changed[at] = x.float().unflatten(0, changed.shape[1:3]) - self.written[at]

        return [(reads, read), (f"blocks.{layer}.hook_mlp_out", hold)]
