"""Interventions: does the model do what its attribution graph says?

A feature is set to a value in the model itself. What the MLP wrote stays, the transcoder's error
included, and only the change of the feature's activation times its decoder row is added.

    unconstrained  everything above is computed anew: what a graph has to predict
    constrained    attention patterns, what norms divide by and all other features are held; the
                   change of a logit is then the edge (tested), so this checks the arithmetic only

A graph of high scores can be wrong: with skip transcoders of large gain, edges have come out a
hundred times larger than anything that interventions did. `linear_gain` shows that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel
from lens_utils.patching import TOKENS, Hooks
from lens_utils.replacement import check, held_names, skipped
from lens_utils.sparse import Transcoder

NOT_CAUSAL = 10.0  # `linear_gain` from which a graph's edges are far from what interventions do


class Change(NamedTuple):
    """A feature set to a value: 0 takes it away, a multiple of its activation steers."""

    layer: int
    pos: int
    index: int
    value: float = 0.0


@torch.no_grad()
def intervene(
    model: LoadedModel,
    transcoders: Mapping[int, Transcoder],
    ids: Sequence[int],
    sets: Sequence[Sequence[Change]],
    constrained: bool = False,
    tokens: int = TOKENS,
) -> Float[Tensor, "set d_vocab"]:
    """Logits at the last token, before any softcap, with every set of features changed in turn.

    An empty set is the model itself. What is added is the difference to the feature's activation
    then and there, times its decoder row; errors stay. constrained: attention patterns, what norms
    divide by and all other features are held. tokens: how many a forward pass may hold. Raises
    BadInput for features that are not there.
    """
    check(model, transcoders)
    for change in {change for one in sets for change in one}:
        there = transcoders.get(change.layer)
        if there is None or not (0 <= change.index < there.n_features and
                                 0 <= change.pos < len(ids)):  # fmt: skip
            raise BadInput(f"no feature {change.index} in layer {change.layer} at position "
                           f"{change.pos} of {len(ids)}")  # fmt: skip
    prompt = torch.tensor(ids, device=model.device)[None]
    held = record(model, prompt, held_names(model)) if constrained else {}
    found: list[Tensor] = []

    def keep(x: Tensor, hook: object) -> None:
        found.append(x[:, -1].float() if x.dtype != torch.float64 else x[:, -1])

    most = max(1, tokens // len(ids))
    for part in (sets[at : at + most] for at in range(0, len(sets), most)):
        hooks = [] if not constrained else _holding(transcoders, held)
        hooks = [*hooks, *_adding(transcoders, part, held), ("unembed.hook_out", keep)]
        model.bridge.run_with_hooks(
            prompt.expand(len(part), -1), fwd_hooks=hooks, use_cache=False, logits_to_keep=1
        )
    return torch.cat(found)


def _adding(
    transcoders: Mapping[int, Transcoder],
    sets: Sequence[Sequence[Change]],
    held: Mapping[str, Float[Tensor, "1 ..."]],
) -> Hooks:
    """Hooks that add every row's own changes to what the MLPs write."""
    hooks: list[tuple[str, Callable]] = []
    changes = [(row, change) for row, one in enumerate(sets) for change in one]
    for layer in sorted({change.layer for _, change in changes}):
        here = [(row, change) for row, change in changes if change.layer == layer]
        rows, places = torch.tensor([[row, change.pos] for row, change in here]).T
        index = torch.tensor([change.index for _, change in here])
        values = torch.tensor([change.value for _, change in here], dtype=torch.float64)
        name, read = f"blocks.{layer}.mlp.hook_in", {}

        def keep(x: Tensor, hook: object, name: str = name, read: dict = read) -> None:
            read["x"] = held[name].expand_as(x) if held else x

        def write(y: Tensor, hook: object, read: dict = read, t: Transcoder = transcoders[layer],
                  at: tuple = (rows, places), index: Tensor = index,
                  values: Tensor = values) -> Tensor:  # fmt: skip
            active, which = t.encode(read.pop("x")[at].to(t.W_enc))
            now = (active * (which == index.to(which)[:, None])).sum(1)
            added = (values.to(now) - now)[:, None] * t.W_dec[index]
            return y.index_put(at, added.to(y), accumulate=True)

        hooks += [(name, keep), (f"blocks.{layer}.mlp.hook_out", write)]
    return hooks


def _holding(
    transcoders: Mapping[int, Transcoder], held: Mapping[str, Float[Tensor, "1 ..."]]
) -> Hooks:
    """Hooks that hold patterns, scales and MLPs; skip connections still see what changes."""
    hooks: list[tuple[str, Callable]] = []
    for name, values in held.items():
        if name.endswith(("hook_pattern", "hook_scale")):
            # A copy: TransformerLens takes the same tensor object for "unchanged".
            hooks.append((name, lambda x, hook, v=values: v.expand_as(x).clone()))
        elif name.endswith("mlp.hook_out"):
            t = transcoders.get(int(name.split(".")[1]))
            before, read = held[name.replace("hook_out", "hook_in")], {}

            def keep(x: Tensor, hook: object, read: dict = read) -> None:
                read["x"] = x

            def write(y: Tensor, hook: object, read: dict = read, t: Transcoder | None = t,
                      before: Tensor = before, values: Tensor = values) -> Tensor:  # fmt: skip
                x, y = read.pop("x"), values.expand_as(y)
                return y.clone() if t is None else y + skipped(t, x - before)

            hooks += [(name.replace("hook_out", "hook_in"), keep), (name, write)]
    return hooks


def changes(
    logits: Float[Tensor, "set d_vocab"],
    clean: Float[Tensor, " d_vocab"],
    ids: Int[Tensor, " logit"],
) -> Float[Tensor, "set logit"]:
    """How far interventions move some logits, less the mean of all logits: in an edge's terms."""
    moved = logits - clean
    return (moved - moved.mean(1, keepdim=True))[:, ids]


def linear_gain(direct: Float[Tensor, "*edge"], measured: Float[Tensor, "*effect"]) -> float:
    """The largest direct edge into a logit over the largest measured effect of taking one away.

    Beyond `NOT_CAUSAL` the graph's numbers are not those of the model: linear maps between frozen
    norms have multiplied what in the model is put right on the way.
    """
    return float(direct.abs().max() / measured.abs().max().clamp_min(1e-12))
