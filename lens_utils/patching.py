"""Activation patching: what changes at the output when one part of a run is replaced?

Two prompts of one length differ in one thing and in their answer (`pairs`). A forward pass of one
is run again, and somewhere in it an activation is replaced:

    denoise       the corrupted run, with the clean run's activation: what suffices for the answer
    noise         the clean run, with the corrupted run's activation: what is needed for it
    zero          the clean run, with zeros
    mean          the clean run, with the mean of the batch's clean prompts at the same position
    mean_corrupt  the same with the corrupted prompts
    resample      the clean run, with another pair's clean activation

(Heimersheim & Nanda 2024, arXiv:2404.15255; Zhang & Nanda 2024, arXiv:2309.16042.) What is replaced
is data: a unit is a tuple of sites, replaced together, and cuts, edges of attention that are
removed (Geva et al. 2023, arXiv:2304.14767). All runs are of the model itself; no lens takes part.

Cheap by two means. Many units run at once, as rows of one forward pass (rows are units x pairs).
And what lies below the first edit is not run again: TransformerLens' `start_at_layer` alone saves
nothing, because it runs the lower blocks on something it throws away, so here they are switched
off; the pass ends at the last block, and two columns of W_U do for the unembedding.

`hook_resid_mid` of TransformerLens is the input of the MLP branch only: writing there leaves the
residual as it was. Here resid_mid is written through the attention's output, which is set to
whatever makes resid_pre + attn_out the wanted residual.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.sources.native.model import NativeModel

from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.lens import Readout
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch

Kind = Literal["denoise", "noise", "zero", "mean", "mean_corrupt", "resample"]
Hooks = Sequence[tuple[str, Callable]]

# Hook, and its axes behind the batch, without the last one. Within a block in the order in which
# they are computed; the pos of a pattern is the query's.
COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "resid_pre": ("hook_resid_pre", ("pos",)),
    "q": ("attn.hook_q", ("pos", "head")),
    "k": ("attn.hook_k", ("pos", "kv_head")),
    "v": ("attn.hook_v", ("pos", "kv_head")),
    "pattern": ("attn.hook_pattern", ("head", "pos")),
    "z": ("attn.hook_z", ("pos", "head")),
    "attn_out": ("hook_attn_out", ("pos",)),
    "resid_mid": ("hook_attn_out", ("pos",)),
    "mlp_out": ("hook_mlp_out", ("pos",)),
    "resid_post": ("hook_resid_post", ("pos",)),
}
TOKENS = 2048  # of all rows of one forward pass


class Site(NamedTuple):
    """An activation to be replaced: of some heads at some positions, or (None) of all."""

    component: str
    layer: int
    heads: tuple[int, ...] | None = None
    """kv_heads for k and v."""
    positions: tuple[int, ...] | None = None


class Cut(NamedTuple):
    """Attention to be removed, from queries at some positions to keys at others.

    What is left of the pattern is scaled up to one, as if those scores had been -inf; a query whose
    other weights are all zero in floating point attends nowhere.
    """

    layer: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: tuple[int, ...] | None = None


Unit = tuple[Site | Cut, ...]


# The core: the upper part of the model, with hooks


@contextlib.contextmanager
def skipping(bridge: TransformerBridge, layer: int) -> Iterator[None]:
    """Blocks below `layer` hand on what they are given, until the context is left.

    With `start_at_layer=layer` nothing changes but the time it takes.
    """
    native = isinstance(bridge.original_model, NativeModel)  # its blocks return tuples

    def hand_on(hidden_states: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if native else hidden_states

    skipped = list(bridge.blocks[:layer])
    try:
        for block in skipped:
            # Plain assignment would reach through to the wrapped block.
            object.__setattr__(block, "forward", hand_on)
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


def resume(
    model: LoadedModel, resid: Float[Tensor, "row pos d_model"], layer: int, hooks: Hooks = ()
) -> Float[Tensor, "row d_model"]:
    """The final residual at the last position, from what block `layer` reads, with hooks.

    Only the blocks from `layer` on are run, and neither ln_final nor the unembedding. Gradients
    flow unless they are switched off outside. Hooks are (name, function(tensor, hook)) and gone
    afterwards, also after an exception.
    """

    return _resume(model, resid, layer, hooks, slice(-1, None))[:, 0]


def resume_all(
    model: LoadedModel, resid: Float[Tensor, "row pos d_model"], layer: int, hooks: Hooks = ()
) -> Float[Tensor, "row pos d_model"]:
    """`resume`, at every position."""
    return _resume(model, resid, layer, hooks, slice(None))


def _resume(
    model: LoadedModel,
    resid: Float[Tensor, "row pos d_model"],
    layer: int,
    hooks: Hooks,
    positions: slice,
) -> Float[Tensor, "row kept d_model"]:
    def stop(x: Tensor, hook: object) -> None:
        raise StopAtLayerException(x[:, positions])  # caught by the bridge, which returns it

    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    with skipping(model.bridge, layer):
        return model.bridge.run_with_hooks(
            resid, start_at_layer=layer, fwd_hooks=[*hooks, (last, stop)], use_cache=False
        )


@torch.no_grad()
def run(
    model: LoadedModel,
    batch: Batch,
    units: Sequence[Unit],
    kind: Kind = "denoise",
    seed: int = 0,
    tokens: int = TOKENS,
) -> Float[Tensor, "unit pair"]:
    """Logit difference answer - foil, in nats, of every pair under every unit.

    tokens: how many a forward pass may hold over all its rows. Raises BadInput for what the model
    does not have, for foils that are the answer and for prompts of two lengths.
    """
    check(model, batch, units)
    n_pairs, n_pos = batch.clean.shape
    readout = Readout(model.bridge)
    starts = [min((edit.layer for edit in unit), default=0) for unit in units]
    base = batch.corrupt if kind == "denoise" else batch.clean
    resid = record(model, base, [_resid_pre(layer) for layer in sorted(set(starts))])
    source = sources(model, batch, {e[:2] for u in units for e in u if isinstance(e, Site)}, kind,
                     seed)  # fmt: skip
    most = max(1, tokens // (n_pairs * n_pos))
    found = torch.empty(len(units), n_pairs, device=base.device)
    for layer in sorted(set(starts)):
        these = [i for i, start in enumerate(starts) if start == layer]
        for part in (these[at : at + most] for at in range(0, len(these), most)):
            rows = resid[_resid_pre(layer)].repeat(len(part), 1, 1)
            hooks = edits(model, batch, [units[i] for i in part], source)
            final = resume(model, rows, layer, hooks).unflatten(0, (len(part), n_pairs))
            found[part] = readout.logit_diff(final, batch.answer, batch.foil).to(found.device)
    return found


def sources(
    model: LoadedModel, batch: Batch, places: set[tuple[str, int]], kind: Kind, seed: int = 0
) -> dict[tuple[str, int], Float[Tensor, "pair ..."]]:
    """What replaces the activations at some (component, layer), for every pair.

    Raises BadInput where a mean or another pair is wanted of a single pair.
    """
    n_pairs = len(batch.clean)
    if n_pairs < 2 and kind in ("mean", "mean_corrupt", "resample"):
        raise BadInput(f"{kind} needs at least two pairs of one wording in a batch")
    ids = batch.corrupt if kind in ("noise", "mean_corrupt") else batch.clean
    names = {_hook(*place) for place in places}
    names |= {_resid_pre(layer) for component, layer in places if component == "resid_mid"}
    held = record(model, ids, sorted(names)) if names else {}
    order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one round through all pairs: nobody gets their own
    found = {}
    for component, layer in places:
        values = held[_hook(component, layer)]
        if component == "resid_mid":
            values = held[_resid_pre(layer)] + values
        match kind:
            case "zero":
                values = torch.zeros_like(values)
            case "mean" | "mean_corrupt":
                values = values.mean(0, keepdim=True).expand_as(values)
            case "resample":
                values = values[other.to(values.device)]
        found[component, layer] = values
    return found


def edits(
    model: LoadedModel,
    batch: Batch,
    units: Sequence[Unit],
    source: dict[tuple[str, int], Float[Tensor, "pair ..."]],
) -> list[tuple[str, Callable]]:
    """Hooks that give every row its own intervention; rows are units x pairs.

    In every place one x = where(chosen[row], source, x).
    """
    n_pos, n_heads = batch.clean.shape[1], model.bridge.cfg.n_heads
    sizes = axis_sizes(model, n_pos)
    chosen: dict[tuple[str, int], Tensor] = {}
    removed: dict[int, Tensor] = {}
    for row, unit in enumerate(units):
        for edit in unit:
            if isinstance(edit, Cut):
                shape = (len(units), n_heads, n_pos, n_pos)
                edges = removed.setdefault(edit.layer, torch.zeros(shape, dtype=torch.bool))
                which = (edit.heads, n_heads), (edit.queries, n_pos), (edit.keys, n_pos)
                edges[row] |= _outer(which)
            else:
                axes = COMPONENTS[edit.component][1]
                shape = (len(units), *(sizes[axis] for axis in axes))
                place = chosen.setdefault(edit[:2], torch.zeros(shape, dtype=torch.bool))
                which = [(edit.positions if a == "pos" else edit.heads, sizes[a]) for a in axes]
                place[row] |= _outer(which)
    hooks: list[tuple[str, Callable]] = []
    for component, layer in sorted(chosen, key=lambda place: list(COMPONENTS).index(place[0])):
        here = chosen[component, layer][:, None, ..., None].to(batch.clean.device)
        values = source[component, layer]
        if component == "resid_mid":
            hooks += _through_attn_out(layer, here, values)
        else:
            hooks.append((_hook(component, layer), _write(here, values)))
    for layer, edges in removed.items():
        hooks.append((_hook("pattern", layer), _cut(edges[:, None].to(batch.clean.device))))
    return hooks


def _write(
    chosen: Bool[Tensor, "unit 1 ..."], values: Float[Tensor, "pair ..."]
) -> Callable[..., Tensor]:
    def write(x: Tensor, hook: object) -> Tensor:
        rows = x.unflatten(0, (len(chosen), len(values)))
        return torch.where(chosen.to(x.device), values.to(x.device), rows).flatten(0, 1)

    return write


def _through_attn_out(
    layer: int, chosen: Bool[Tensor, "unit 1 pos 1"], values: Float[Tensor, "pair pos d_model"]
) -> list[tuple[str, Callable]]:
    """resid_mid = resid_pre + attn_out: set attn_out to what resid_pre, now, leaves to be added."""
    held: dict[str, Tensor] = {}

    def hold(x: Tensor, hook: object) -> None:
        held["resid_pre"] = x

    def write(x: Tensor, hook: object) -> Tensor:
        rows, before = (y.unflatten(0, (len(chosen), len(values))) for y in (x, held["resid_pre"]))
        return torch.where(chosen.to(x.device), values.to(x.device) - before, rows).flatten(0, 1)

    return [(_resid_pre(layer), hold), (_hook("resid_mid", layer), write)]


def _cut(removed: Bool[Tensor, "unit 1 head pos pos"]) -> Callable[..., Tensor]:
    touched = removed.any(-1, keepdim=True)

    def cut(x: Tensor, hook: object) -> Tensor:
        rows = x.unflatten(0, (len(removed), -1))
        left = rows.float().masked_fill(removed.to(x.device), 0)
        left = left / left.sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
        return torch.where(touched.to(x.device), left.to(x.dtype), rows).flatten(0, 1)

    return cut


def _outer(which: Sequence[tuple[tuple[int, ...] | None, int]]) -> Bool[Tensor, "..."]:
    """True where every index is among the chosen ones of its axis (None: all of them)."""
    along = []
    for indices, size in which:
        one = torch.zeros(size, dtype=torch.bool)
        one[list(range(size) if indices is None else indices)] = True
        along.append(one)
    return torch.stack(torch.meshgrid(*along, indexing="ij")).all(0)


def _hook(component: str, layer: int) -> str:
    return f"blocks.{layer}.{COMPONENTS[component][0]}"


def _resid_pre(layer: int) -> str:
    return _hook("resid_pre", layer)


# Bad input


def axis_sizes(model: LoadedModel, n_pos: int) -> dict[str, int]:
    """How long the axes of the components are."""
    cfg = model.bridge.cfg
    return {"pos": n_pos, "head": cfg.n_heads, "kv_head": cfg.n_key_value_heads or cfg.n_heads}


def check(model: LoadedModel, batch: Batch, units: Sequence[Unit]) -> None:
    """Raises BadInput, in one line, for a batch or a unit that cannot be run."""
    if batch.clean.shape != batch.corrupt.shape:
        raise BadInput(f"clean prompts of {batch.clean.shape[1]} tokens, corrupted ones of "
                       f"{batch.corrupt.shape[1]}: patching needs one length")  # fmt: skip
    same = (batch.answer == batch.foil).nonzero().flatten().tolist()
    if same:
        raise BadInput(f"pair {batch.pairs[same[0]].id} has its answer as foil: the logit "
                       "difference would always be zero")  # fmt: skip
    sizes = axis_sizes(model, batch.clean.shape[1])
    for edit in {edit for unit in units for edit in unit}:
        if isinstance(edit, Site):
            axes = component_axes(model, edit.component)
            heads = axes[-1] if axes[-1] != "pos" else axes[0]
            if edit.heads is not None and heads == "pos":
                raise BadInput(f"{edit.component} has no heads")
            asked = {heads: edit.heads, "pos": edit.positions}
        else:
            asked = {"head": edit.heads, "pos": (*edit.queries, *edit.keys)}
            if not edit.queries or not edit.keys:
                raise BadInput("a cut needs at least one query and one key position")
        if not 0 <= edit.layer < model.n_layers:
            raise BadInput(f"layer {edit.layer} of {model.name}, whose blocks are 0 to "
                           f"{model.n_layers - 1}")  # fmt: skip
        for axis, indices in asked.items():
            outside = [i for i in indices or () if not 0 <= i < sizes[axis]]
            if outside:
                raise BadInput(f"{axis} {outside[0]} is not there: 0 to {sizes[axis] - 1} are")


def component_axes(model: LoadedModel, component: str) -> tuple[str, ...]:
    """The axes of a component behind the batch. Raises BadInput where the model has none such."""
    if component not in COMPONENTS:
        raise BadInput(f"no component {component!r}; there are {', '.join(COMPONENTS)}")
    if component == "resid_mid" and model.bridge.cfg.parallel_attn_mlp:
        raise BadInput(f"{model.name} has no resid_mid: its blocks run attention and MLP side by "
                       "side")  # fmt: skip
    if _hook(component, 0) not in model.bridge.hook_dict:
        raise BadInput(f"{model.name} has no {component}")
    return COMPONENTS[component][1]
