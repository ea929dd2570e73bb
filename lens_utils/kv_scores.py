"""Rankings of K and V units without learning: which ones to keep, most important first.

With m the gates of all units and f_m the masked model, over sequences x:

    taylor     E_x |d CE / d m|  at m = 1                                 (Michel et al. 2019)
    fisher     E_x (d log p(y) / d m)^2  at m = 1, y drawn from the model (its own labels, not
               the text's: otherwise it is the empirical Fisher)
    ig         - mean over alpha of d KL(f || f_m) / d m  at m = alpha    (integrated gradients)
    magnitude  standard deviation of the channel, of values times the norm of the weights that read
               it; ranked within each layer and part ("magnitude"), or over the whole model
               ("magnitude_global": depth makes values larger, so it keeps the last layers only)
    random     a seeded permutation: the control

Gradients are of whole sequences, every row with gates of its own, so one backward pass gives one
gradient per row. No ranking wins everywhere, and they are not nested over sparsities: the
validation split decides (`kv_learn`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_utils.kv_masks import Examples, Masked, Moments, kl
from lens_utils.kv_units import Units

GRADIENTS = ("fisher", "taylor", "ig")
RANKINGS = (*GRADIENTS, "magnitude", "magnitude_global")
ALPHAS = (0.2, 0.5, 0.8)


def gradient_scores(
    masked: Masked,
    examples: Examples,
    seed: int = 0,
    alphas: Sequence[float] = ALPHAS,
    batch_size: int = 8,
    positions: int = 32,
) -> dict[str, Float[Tensor, " unit"]]:
    """fisher, taylor and ig: of the unit's mean over examples.

    positions: at most so many counted predictions per row, drawn at random, go into a gradient.
    """
    n_units = masked.units.total
    total = {name: torch.zeros(n_units) for name in GRADIENTS}
    generator = torch.Generator().manual_seed(seed)
    for batch in examples.batches(batch_size):
        row, pos = drawn(batch.counted, positions, generator)
        target = batch.target[row, pos].to(masked.model.device)
        share = (1 / torch.bincount(row, minlength=len(batch)).clamp(min=1))[row].to(target.device)
        gates = torch.ones(len(batch), n_units, device=target.device, requires_grad=True)
        logits = masked.readout.read(masked.resid(batch.ids, gates)[row, pos])
        log_probs = logits.log_softmax(-1)
        labels = _draw(log_probs.detach(), generator)
        own = log_probs.gather(1, labels[:, None])[:, 0].sum()
        (score,) = torch.autograd.grad(own, gates, retain_graph=True)
        total["fisher"] += score.square().sum(0).cpu()
        loss = -(log_probs.gather(1, target[:, None])[:, 0] * share).sum()
        (slope,) = torch.autograd.grad(loss, gates)
        total["taylor"] += slope.abs().sum(0).cpu()
        teacher = logits.detach()
        for alpha in alphas:
            partly = torch.full_like(gates, alpha, requires_grad=True)
            student = masked.readout.read(masked.resid(batch.ids, partly)[row, pos])
            (slope,) = torch.autograd.grad((kl(teacher, student) * share).sum(), partly)
            total["ig"] -= slope.sum(0).cpu() / len(alphas)
    return {name: summed / len(examples) for name, summed in total.items()}


def drawn(
    counted: Bool[Tensor, "row pos"], positions: int, generator: torch.Generator
) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Row and position of at most `positions` counted predictions of each row, at random."""
    order = torch.rand(counted.shape, generator=generator).masked_fill(~counted, 2.0)
    kth = order.sort(dim=1).values[:, min(positions, counted.shape[1]) - 1]
    return torch.nonzero(counted & (order <= kth[:, None]), as_tuple=True)


def _draw(
    log_probs: Float[Tensor, "token d_vocab"], generator: torch.Generator
) -> Int[Tensor, " token"]:
    """One label per prediction from the model's own distribution."""
    uniform = torch.rand(len(log_probs), 1, generator=generator).to(log_probs.device)
    labels = torch.searchsorted(log_probs.exp().cumsum(-1), uniform)[:, 0]
    return labels.clamp(max=log_probs.shape[1] - 1)


@torch.no_grad()
def magnitude_scores(masked: Masked, spread: Moments) -> dict[str, Float[Tensor, " unit"]]:
    """magnitude (rank within layer and part, 0 to 1) and magnitude_global.

    In query resolution each query head has its kv_head's spread.
    """
    model, units = masked.model, masked.units
    per_head = units.k.shape[1] // spread.std.k.shape[3]
    k_std, v_std = (x[:, 0, 0].repeat_interleave(per_head, dim=1) for x in spread.std)
    n_heads = model.bridge.cfg.n_heads
    heads = units.k.shape[1]
    norms = [
        model.bridge.blocks[layer].attn.W_O.float().norm(dim=-1)  # head d_head
        .view(heads, n_heads // heads, -1).square().mean(1).sqrt()
        for layer in range(model.n_layers)
    ]  # fmt: skip
    v_std = v_std * torch.stack(norms).to(v_std.device)
    plain = units.gather(k_std, v_std).cpu()
    within = torch.zeros_like(plain)
    table = units.table()
    for _, members in table.groupby(["layer", "part"]):
        at = torch.tensor(members.unit.tolist())
        within[at] = ranks(plain[at])
    return {"magnitude": within, "magnitude_global": plain}


def random_scores(units: Units, seed: int) -> Float[Tensor, " unit"]:
    """A random order of the units."""
    return torch.randperm(units.total, generator=torch.Generator().manual_seed(seed)).float()


def ranks(scores: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """Ranks from 0 (lowest) to 1; ties in the order of the units."""
    order = scores.argsort(stable=True).argsort()
    return order.float() / max(len(scores) - 1, 1)


def top(scores: Float[Tensor, " unit"], kept: int) -> Float[Tensor, " unit"]:
    """The mask, 0 or 1, of exactly the `kept` highest scores; ties go to the first units."""
    order = scores.argsort(descending=True, stable=True)
    mask = torch.zeros_like(scores)
    mask[order[:kept]] = 1
    return mask


def n_kept(units: Units, sparsity: float) -> int:
    """Units that stay at a sparsity, to the nearest one."""
    return round((1 - sparsity) * units.total)
