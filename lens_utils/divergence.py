"""How far does a model's output move when heads are taken away?

A text the full model wrote is read again, token by token as it stands (teacher forcing), with the
outputs z of some heads replaced. At every token of the text, nothing of the prompt,

    KL(full || ablated) = sum over the vocabulary of p_full (log p_full - log p_ablated)    nats

tells what the full model's next-token distribution loses. Replaced by what:

    zero       nothing. The published form; later layers never saw such a stream in training
    mean       the head's own mean output over several texts
    resample   the head's output on another text, at the same relative place

A set of heads is a mask [layer, head]; many sets are the rows of one pass. Rows that are alike up
to some layer are one row up to there: a pass begins with a single row, on the full model's residual
stream, in the first layer in which any of its sets has a head, and it branches where sets begin to
differ. Neither the blocks below nor what rows share is computed twice. What is left is the product
with W_U, which no two sets share; one row's distributions are in memory at a time.

The full model's log-probabilities come from the same kind of pass, once for each text: taking
nothing away gives what rounding between passes of one row and of many leaves, below 1e-6 nats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.lens import Readout
from lens_utils.models import LoadedModel
from lens_utils.patching import skipping

Kind = Literal["zero", "mean", "resample"]
TOKENS = 1024  # of all rows of one forward pass
FEW = 4  # steps whose distributions are compared at once


@dataclass(frozen=True)
class Full:
    """The full model's own run of one text."""

    resid: tuple[Float[Tensor, "1 pos d_model"], ...]
    """What each block reads."""
    logp: Float[Tensor, "step d_vocab"]
    """At the steps, the last positions of the text: float32, natural logarithm."""


def sets(
    order: Sequence[int], counts: Sequence[int], n_layers: int, n_heads: int
) -> Bool[Tensor, "count layer head"]:
    """The first k heads of an order, for every k of `counts`; head h of layer l is l n_heads + h.

    Raises BadInput for heads the model does not have or that come twice, and for counts beyond the
    order.
    """
    size = n_layers * n_heads
    if len(set(order)) < len(order) or not set(order) <= set(range(size)):
        raise BadInput(f"an order of heads names each at most once, as a number below {size}")
    if odd := [k for k in counts if not 0 <= k <= len(order)]:
        raise BadInput(f"{odd[0]} heads of an order of {len(order)}")
    found = torch.zeros(len(counts), size, dtype=torch.bool)
    for row, k in enumerate(counts):
        found[row, list(order[:k])] = True
    return found.unflatten(1, (n_layers, n_heads))


def count(share: float, size: int) -> int:
    """How many of `size` heads a share is, at least one. Raises BadInput outside (0, 1]."""
    if not 0 < share <= 1:
        raise BadInput(f"a share of {share:g} of the heads: above 0, up to 1")
    return max(1, round(share * size))


def full(model: LoadedModel, readout: Readout, ids: Int[Tensor, " pos"], steps: int) -> Full:
    """The full model's run; `steps` last positions are compared.

    Step 0 is the prompt's last token, which decides the first token of the response: a prompt and
    100 generated tokens are given without the last one. Raises BadInput for too few tokens.
    """
    if not 0 < steps <= len(ids):
        raise BadInput(f"{steps} steps of a text of {len(ids)} tokens")
    layers = range(model.n_layers)
    last = _hook(layers[-1], "hook_resid_post")
    held = record(model, ids[None], [*(_hook(n, "hook_resid_pre") for n in layers), last])
    resid = tuple(held[_hook(n, "hook_resid_pre")] for n in layers)
    return Full(resid, readout.read(held[last][0, -steps:]).log_softmax(-1))


@torch.no_grad()
def divergence(
    model: LoadedModel,
    readout: Readout,
    against: Full,
    sets: Bool[Tensor, "set layer head"],
    values: Float[Tensor, "layer at head d_head"] | None = None,
    tokens: int = TOKENS,
) -> Float[Tensor, "set step"]:
    """KL(full || ablated) in nats at every step, for every set of heads taken away together.

    values: what replaces z, one for all positions or one for each (None: zeros). tokens: how many a
    forward pass may hold over all its rows. A set that comes several times is run once. Raises
    BadInput for sets of another model.
    """
    shape = (model.n_layers, model.bridge.cfg.n_heads)
    if sets.shape[1:] != shape:
        raise BadInput(f"sets over {sets.shape[1]} layers of {sets.shape[2]} heads; {model.name} "
                       f"has {shape[0]} of {shape[1]}")  # fmt: skip
    # Sorted, so that what is alike in the lower layers lies in one pass.
    distinct, back = sets.cpu().flatten(1).unique(dim=0, return_inverse=True)
    most = max(1, tokens // against.resid[0].shape[1])
    found = []
    for part in distinct.unflatten(1, shape).split(most):
        resid = _ablated(model, against, part, values)
        # One row at a time: its distributions are the largest thing here.
        found += [kl(against.logp, readout.read(row)).cpu() for row in resid]
    return torch.stack(found)[back]


def kl(
    logp: Float[Tensor, "step d_vocab"], logits: Float[Tensor, "step d_vocab"]
) -> Float[Tensor, " step"]:
    """KL(p || softmax(logits)) in nats, in float32."""
    # A few steps at a time stay in the cache, which is three times as fast as all at once.
    pairs = zip(logp.split(FEW), logits.float().split(FEW), strict=True)
    return torch.cat([(p - q.log_softmax(-1)).mul_(p.exp()).sum(-1) for p, q in pairs])


def _ablated(
    model: LoadedModel,
    against: Full,
    sets: Bool[Tensor, "set layer head"],
    values: Float[Tensor, "layer at head d_head"] | None,
) -> Float[Tensor, "set step d_model"]:
    """The final residual at the steps, in one pass that branches where the sets begin to differ."""
    steps, last = len(against.logp), model.n_layers - 1
    touched = sets.any(dim=2).any(dim=0).tolist()
    start = touched.index(True) if any(touched) else last
    hooks: list[tuple[str, Callable]] = []
    row = torch.zeros(len(sets), dtype=torch.long)  # of every set, in the pass as it is so far
    n_rows = 1
    for layer in range(start, last + 1):
        # A row for each thing that differs: the row it comes from, or the heads taken away here.
        branches = torch.cat([row[:, None], sets[:, layer].long()], dim=1)
        branches, row = branches.unique(dim=0, return_inverse=True)
        parent, gone = branches[:, 0], branches[:, 1:].bool()
        if len(branches) > n_rows:
            hooks.append((_hook(layer, "hook_resid_pre"), _branch(parent)))
            n_rows = len(branches)
        if gone.any():
            value = None if values is None else values[layer]
            hooks.append((_hook(layer, "attn.hook_z"), _replace(gone, value)))

    def stop(x: Tensor, hook: object) -> None:
        raise StopAtLayerException(x[:, -steps:])  # caught by the bridge, which returns it

    hooks.append((_hook(last, "hook_resid_post"), stop))
    with skipping(model.bridge, start):
        final = model.bridge.run_with_hooks(
            against.resid[start], start_at_layer=start, fwd_hooks=hooks, use_cache=False
        )
    return final[row.to(final.device)]


def _branch(parent: Int[Tensor, " row"]) -> Callable[..., Tensor]:
    return lambda x, hook: x[parent.to(x.device)]


def _replace(
    gone: Bool[Tensor, "row head"], value: Float[Tensor, "at head d_head"] | None
) -> Callable[..., Tensor]:
    def replace(z: Tensor, hook: object) -> Tensor:
        put = torch.zeros_like(z[:1]) if value is None else value.to(z.device, z.dtype)
        return torch.where(gone[:, None, :, None].to(z.device), put, z)

    return replace


# What heads are replaced by


def outputs(model: LoadedModel, ids: Int[Tensor, " pos"]) -> Float[Tensor, "layer pos head d_head"]:
    """The outputs z of all heads on one text, on the CPU."""
    names = [_hook(layer, "attn.hook_z") for layer in range(model.n_layers)]
    held = record(model, ids[None], names)
    return torch.stack([held[name][0].cpu() for name in names])


def replacement(
    kind: Kind,
    others: Sequence[Float[Tensor, "layer _ head d_head"]],
    n_pos: int,
    steps: int,
) -> Float[Tensor, "layer pos head d_head"] | None:
    """What replaces z in a text of n_pos tokens, from the heads' outputs on other texts.

    zero: nothing. mean: over the `steps` last positions of all of them, the same everywhere.
    resample: the first one's, stretched to this length, so that first stays first and last last.
    Raises BadInput for another kind, and without another text.
    """
    if kind not in get_args(Kind):
        raise BadInput(f"no ablation {kind!r}; there are {', '.join(get_args(Kind))}")
    if kind == "zero":
        return None
    if not others:
        raise BadInput(f"{kind} ablation needs another text to take the heads' outputs from")
    if kind == "mean":
        return torch.cat([z[:, -steps:] for z in others], dim=1).mean(dim=1, keepdim=True)
    at = torch.linspace(0, others[0].shape[1] - 1, n_pos).round().long()
    return others[0][:, at]


def _hook(layer: int, name: str) -> str:
    return f"blocks.{layer}.{name}"
