"""Information between heads that are merely high or low: each window cut at its own mean.

A head then has four states (past high or low, future high or low), a pair has sixteen, and one
matrix product counts the states of all pairs at once. Informations are plug-in values from these
counts, in bits. What a moment tells depends on the state alone, so that even common change in
surprisal is a sum of sixteen terms. Cutting at the mean is blind to size and safe from outliers;
on short series plug-in values lie above the truth (`phiid.bias_floor` says by how much).
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from lens_utils import phiid_ccs
from lens_utils.phiid_gaussian import Windows
from lens_utils.phiid_lattice import Information, Redundancy, mmi

ZERO = 1e-12  # logarithms that cancel do so to rounding


def joint(left: Windows, right: Windows) -> Float[Tensor, "2 2 2 2 left right"]:
    """Share of the samples in each state (x, y, a, b) of every pair, from centred windows."""

    def states(windows: Windows) -> Tensor:
        past, future = windows.past > 0, windows.future > 0
        each = [(past == p) & (future == f) for p in (False, True) for f in (False, True)]
        return torch.stack(each).to(windows.past.dtype)

    counts = einsum(
        states(left), states(right), "one left sample, other right sample -> one other left right"
    )
    counts = rearrange(counts, "(x a) (y b) left right -> x y a b left right", x=2, y=2)
    return counts / left.past.shape[1]


def pointwise(p: Float[Tensor, "2 2 2 2 left right"]) -> Information:
    """What each state tells, in bits: nine tables that broadcast over x, y, a and b."""

    def log(keep: str) -> Tensor:
        others = [axis for axis, name in enumerate("xyab") if name not in keep]
        share = p.sum(others, keepdim=True) if others else p
        return torch.where(share > 0, share, 1).log2()  # a state that never occurs has no weight

    pairs = (("x", "a"), ("x", "b"), ("y", "a"), ("y", "b"), ("xy", "a"), ("xy", "b"),
             ("x", "ab"), ("y", "ab"), ("xy", "ab"))  # fmt: skip
    return Information(*(log(s + t) - log(s) - log(t) for s, t in pairs))


def tables(left: Windows, right: Windows, redundancy: str) -> tuple[Information, Redundancy]:
    """Informations and redundancies of all heads on the left with all on the right, in bits."""
    p = joint(left, right)
    states = pointwise(p)

    def mean(values: Tensor) -> Tensor:
        return (p * values).sum((0, 1, 2, 3))

    i = Information(*map(mean, states))
    if redundancy == "mmi":
        return i, mmi(i)
    return i, Redundancy(*map(mean, phiid_ccs.overlaps(*states, ZERO)))
