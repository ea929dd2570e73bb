"""Masks over keys and values: what does the model still say when most channels are constants?

An entry x of K or V whose unit is switched off is replaced by a constant c: its mean over a text,
0, what it is in another text, or a learned value (Li & Janson 2024). A gate m between 0 and 1 mixes
the two, m x + (1 - m) c, so that m has a gradient; every number that is reported comes from gates
of 0 and 1. Keys are masked before rotation (`kv_units` says why that is the same as after it),
values where attention reads them, or in the basis of their principal components.

Per query head (resolution "query") the same is done without touching what other heads share: a
value channel of one head is its channel of z, since attention sums to one, and a key channel is
taken away by the query that would read it, which amounts to a constant of 0.

Fidelity is measured against the model itself. With f the model, f_M the model with only the units M
and f_0 with none (all in nats per predicted token, on held-out examples):

    kl               KL(f || f_M)
    faithfulness     1 - KL(f || f_M) / KL(f || f_0)       1 the model, 0 no better than nothing
    loss degradation 100 (CE(f_M) - CE(f)) / CE(f)         below 0: unlike the model, not better
    ce_recovered     (CE(f_0) - CE(f_M)) / (CE(f_0) - CE(f))
    completeness     1 - faithfulness of all units but M
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from lens_utils.errors import BadInput
from lens_utils.kv_units import Units, key_site
from lens_utils.lens import Readout
from lens_utils.models import LoadedModel

Hooks = list[tuple[str, Callable]]
POSITIONS = 512  # unembedded at a time


@dataclass(frozen=True)
class Examples:
    """Rows of token ids, padded on the right, and the predictions in them that count."""

    ids: Int[Tensor, "row pos"]
    target: Int[Tensor, "row pos"]
    """The token that follows, where `counted`."""
    counted: Bool[Tensor, "row pos"]
    group: Int[Tensor, " row"]
    """What bootstraps resample: rows of one document are not independent."""
    foil: Int[Tensor, " row"] | None = None
    """A wrong answer to each row's one counted prediction, of tasks that have one."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Int[Tensor, " some"] | slice) -> "Examples":
        """Some of the rows."""
        foil = None if self.foil is None else self.foil[rows]
        return Examples(
            self.ids[rows], self.target[rows], self.counted[rows], self.group[rows], foil
        )

    def batches(self, size: int) -> Iterator["Examples"]:
        """The rows in order, `size` at a time."""
        for rows in spans(len(self), size):
            yield self.take(rows)


def spans(n: int, size: int) -> list[slice]:
    """`size` rows at a time; a single last one goes with those before: it has no neighbour."""
    starts = [at for at in range(0, n, size) if at == 0 or n - at > 1]
    return [slice(at, end) for at, end in zip(starts, [*starts[1:], n], strict=True)]


class Fill(NamedTuple):
    """What takes the place of an entry that is off; `row` and `pos` are 1 for constants."""

    k: Float[Tensor, "layer row pos head d_head"]
    v: Float[Tensor, "layer row pos head d_head"]


@dataclass(frozen=True)
class Masked:
    """A model whose K and V can be masked: its units, what fills the gaps, and its readout."""

    model: LoadedModel
    units: Units
    fill: Fill
    readout: Readout
    basis: Float[Tensor, "layer head d_head d_head"] | None = None
    """Directions of V, as columns, that are its channels instead of the model's own."""
    keep_first: bool = False
    """Leave the first position alone: in many models it is where attention rests."""

    def with_fill(self, fill: Fill) -> "Masked":
        """The same with other constants."""
        return replace(self, fill=fill)

    def hooks(self, gates: Float[Tensor, "*row unit"]) -> Hooks:
        """Hooks that apply the gates, one set for all rows or one for each; differentiable.

        Raises BadInput for query heads with a filling by position, or with the first one left
        alone: their q and z hold no single key or value.
        """
        k, v = self.units.spread(gates)
        fill = Fill(*(x.expand(len(k), *x.shape[1:]) if x.shape[0] == 1 else x for x in self.fill))
        query = self.units.resolution == "query"
        if query and (self.keep_first or fill.v.shape[2] > 1):
            raise BadInput("masks of query heads cannot tell positions apart: --keep-first and "
                           "--fill resample need --resolution kv")  # fmt: skip
        site, swapped = key_site(self.model, "q" if query else "k")
        hooks: Hooks = []
        for layer in range(self.model.n_layers):
            k_fill, v_fill = fill.k[layer], fill.v[layer]
            if query:
                k_fill = self._shared(torch.zeros_like(k_fill), -2)
                v_fill = self._shared(v_fill, -2)
            basis = None if self.basis is None else self.basis[layer]
            basis = self._shared(basis, 0) if query and basis is not None else basis
            at_k = _gate(k[..., layer, :, :], k_fill, None, swapped, self.keep_first)
            at_v = _gate(v[..., layer, :, :], v_fill, basis, False, self.keep_first)
            hooks.append((f"blocks.{layer}.{site}", at_k))
            hooks.append((f"blocks.{layer}.attn.hook_{'z' if query else 'v'}", at_v))
        return hooks

    def _shared(self, of_kv_heads: Float[Tensor, "..."], axis: int) -> Float[Tensor, "..."]:
        """What each query head reads of its kv_head, along this axis."""
        repeats = self.model.bridge.cfg.n_heads // of_kv_heads.shape[axis]
        return of_kv_heads.repeat_interleave(repeats, dim=axis)

    def resid(
        self, ids: Int[Tensor, "row pos"], gates: Float[Tensor, "*row unit"] | None = None
    ) -> Float[Tensor, "row pos d_model"]:
        """The last block's residual under a mask (None: the model's own). Gradients flow."""
        last = f"blocks.{self.model.n_layers - 1}.hook_resid_post"

        def stop(x: Tensor, hook: object) -> None:
            raise StopAtLayerException(x)  # no unembedding of positions that do not count

        hooks = [] if gates is None else self.hooks(gates)
        return self.model.bridge.run_with_hooks(
            ids.to(self.model.device), fwd_hooks=[*hooks, (last, stop)], use_cache=False
        )


def _gate(
    gate: Float[Tensor, "*row head d_head"],
    fill: Float[Tensor, "row pos head d_head"],
    basis: Float[Tensor, "head d_head d_head"] | None,
    swapped: bool,
    keep_first: bool,
) -> Callable:
    """A hook: gate x + (1 - gate) fill, in a basis if there is one."""
    gate = gate if gate.ndim == 2 else gate[:, None]

    def apply(x: Tensor, hook: object) -> Tensor:
        entries = x.transpose(1, 2) if swapped else x
        constant = fill.to(entries.device, entries.dtype)
        factor = gate.to(entries.device, entries.dtype)
        if basis is None:  # both ends exact, which constant + factor * (x - constant) is not
            masked = factor * entries + (1 - factor) * constant
        else:
            turned = basis.to(entries.device, entries.dtype)
            rest = einsum(entries - constant, turned, "row pos head channel, head channel axis "
                          "-> row pos head axis")  # fmt: skip
            masked = entries - einsum((1 - factor) * rest, turned, "row pos head axis, "
                                      "head channel axis -> row pos head channel")  # fmt: skip
        if keep_first:
            masked = torch.cat([entries[:, :1], masked[:, 1:]], dim=1)
        return masked.transpose(1, 2) if swapped else masked

    return apply


@torch.no_grad()
def record_kv(model: LoadedModel, ids: Int[Tensor, "row pos"]) -> Fill:
    """K and V of every layer, as they are: K before rotation, [layer, row, pos, head, d_head]."""
    site, swapped = key_site(model)
    names = [f"blocks.{i}.{h}" for i in range(model.n_layers) for h in (site, "attn.hook_v")]
    _, held = model.bridge.run_with_cache(
        ids.to(model.device), names_filter=names, use_cache=False, logits_to_keep=1
    )
    keys = [held[name].transpose(1, 2) if swapped else held[name] for name in names[::2]]
    return Fill(torch.stack(keys), torch.stack([held[name] for name in names[1::2]]))


class Moments(NamedTuple):
    """First and second moments of K and V over the tokens of a text, by layer and kv_head."""

    mean: Fill
    std: Fill
    v_basis: Float[Tensor, "layer head d_head d_head"]
    """Principal axes of V, as columns, the widest first."""


@torch.no_grad()
def moments(model: LoadedModel, examples: Examples, batch_size: int = 16) -> Moments:
    """Moments over all real tokens but each row's first, a sink a hundred times the others' size.

    A row's tokens end at its last counted prediction. Sums are taken in float32.
    """
    n, sums, squares = 0, None, None
    for batch in examples.batches(batch_size):
        taken = _real(batch).to(model.device)
        taken[:, 0] = False
        k, v = (x.float()[:, taken] for x in record_kv(model, batch.ids))
        both = torch.cat([k, v], dim=2)  # layer token head d_head
        second = einsum(both, both, "layer token head one, layer token head two "
                        "-> layer head one two")  # fmt: skip
        sums = both.sum(1) if sums is None else sums + both.sum(1)
        squares = second if squares is None else squares + second
        n += both.shape[1]
    assert sums is not None and squares is not None
    mean = sums / n
    covariance = squares / n - einsum(mean, mean, "layer head one, layer head two "
                                      "-> layer head one two")  # fmt: skip
    std = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    n_heads = mean.shape[1] // 2
    axes = torch.linalg.eigh(covariance[:, n_heads:].double().cpu()).eigenvectors.flip(-1)
    lifted = mean[:, None, None]
    return Moments(
        Fill(lifted[:, :, :, :n_heads], lifted[:, :, :, n_heads:]),
        Fill(std[:, None, None, :n_heads], std[:, None, None, n_heads:]),
        axes.float().to(mean.device),
    )


def _real(examples: Examples) -> Bool[Tensor, "row pos"]:
    """Tokens up to each row's last counted prediction; what follows is padding."""
    return examples.counted.flip(1).cumsum(1).flip(1) > 0


@torch.no_grad()
def resampled(model: LoadedModel, batch: Examples) -> Fill:
    """K and V of a neighbouring row of the batch at the same position: resample ablation.

    Raises BadInput for a batch of one row.
    """
    if len(batch) < 2:
        raise BadInput("--fill resample needs at least two rows to exchange entries")
    return Fill(*(x.roll(1, dims=1) for x in record_kv(model, batch.ids)))


def kl(
    teacher: Float[Tensor, "token d_vocab"], student: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """KL(teacher || student) in nats of two sets of logits."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def fidelity(
    masked: Masked,
    examples: Examples,
    masks: Sequence[Float[Tensor, " unit"] | None],
    batch_size: int = 16,
    resample: bool = False,
) -> pd.DataFrame:
    """What each mask does to the predictions: one row per mask and example.

    Columns: mask (its place in the list; None is the model itself), row, group, and sums over the
    example's counted predictions: tokens, kl, ce (nats), agree (the same likeliest token), and
    with foils logit_diff (nats). resample: fill with the next row's entries.
    """
    readout, frames = masked.readout, []
    start = 0
    for batch in examples.batches(batch_size):
        row, pos = batch.counted.nonzero(as_tuple=True)
        target = batch.target[row, pos]
        own = masked.resid(batch.ids)[row, pos]
        filled = masked.with_fill(resampled(masked.model, batch)) if resample else masked
        resids = [own if m is None else filled.resid(batch.ids, m)[row, pos] for m in masks]
        for at in range(0, len(row), POSITIONS):
            cut = slice(at, at + POSITIONS)
            teacher = readout.read(own[cut])
            for number, resid in enumerate(resids):
                student = readout.read(resid[cut])
                log_probs = student.log_softmax(-1)
                chosen = log_probs.gather(1, target[cut, None].to(log_probs.device))[:, 0]
                sums = {
                    "tokens": torch.ones(len(chosen)),
                    "kl": kl(teacher, student).cpu(),
                    "ce": -chosen.cpu(),
                    "agree": (teacher.argmax(-1) == student.argmax(-1)).cpu(),
                }
                place = {"mask": number, "row": row[cut] + start, "group": batch.group[row[cut]]}
                frames.append(
                    pd.DataFrame({k: np.asarray(v) for k, v in {**place, **sums}.items()})
                )
                if batch.foil is not None:
                    frames[-1]["logit_diff"] = _differences(
                        readout, resid[cut], target[cut], batch.foil[row[cut]]
                    )
        start += len(batch)
    each = pd.concat(frames, ignore_index=True).astype({"kl": float, "ce": float, "agree": float})
    return each.groupby(["mask", "row", "group"], as_index=False).sum()


def _differences(
    readout: Readout,
    resid: Float[Tensor, "token d_model"],
    answer: Int[Tensor, " token"],
    foil: Int[Tensor, " token"],
) -> Float[ndarray, " token"]:
    """Logit of the answer minus logit of the foil."""
    device = resid.device
    return readout.logit_diff(resid, answer.to(device), foil.to(device)).cpu().numpy()
