"""Redundancy as common change in surprisal (CCS), which asks every moment by itself.

Minimum mutual information calls something shared because two numbers are both large. CCS looks at
each moment t: how much less surprising did each source make the target there? Only where both
sources, both together and their overlap (i + j - both) agree in sign is the overlap counted.
Independent series then share nothing. The price: the mean over moments has no closed form, and
atoms may be negative.

1. Pointwise information of a Gaussian: -1/2 ln s + t^2 / 2 - e^2 / 2s, where e is what the sources
   leave of the target t, and s its variance (Ince, arXiv:1602.05063; Mediano et al. 2109.13186).
2. Nine of them per moment and pair, seven overlaps, seven tests of sign: `overlaps`, `at_moment`.
3. About 130 operations per sample, and nothing that all pairs could share: the cost is memory
   traffic, not arithmetic. So the same functions are run in two ways. With `numba` (optional:
   `pip install -e ".[fast]"`) they are compiled into one loop that keeps a moment in registers;
   without it, and on accelerators, torch runs them on arrays, 15 to 30 times slower on a CPU.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_utils.phiid_gaussian import Moments, Windows
from lens_utils.phiid_lattice import Redundancy

CELLS = 2**14  # moments x pairs in one array operation: what a core's cache holds


def common(i, j, both, zero):
    """The overlap of two sources at a moment, or 0 where not all agree in sign.

    Written for numbers and for tensors alike, as are the functions below. Values within `zero` of
    0 have no sign.
    """
    overlap = i + j - both
    more = (i > zero) & (j > zero) & (both > zero) & (overlap > zero)
    less = (i < -zero) & (j < -zero) & (both < -zero) & (overlap < -zero)
    return overlap * (more | less)


def overlaps(xa, xb, ya, yb, xya, xyb, xab, yab, xyab, zero):
    """The seven redundancies at a moment, in the order of `Redundancy`, from its informations."""
    xy_a, xy_b, xy_ab = (
        common(xa, ya, xya, zero),
        common(xb, yb, xyb, zero),
        common(xab, yab, xyab, zero),
    )
    ab_x, ab_y, ab_xy = (
        common(xa, xb, xab, zero),
        common(ya, yb, yab, zero),
        common(xya, xyb, xyab, zero),
    )
    double = xab + yab + xya + xyb - xyab - xa - xb - ya - yb
    double = double + xy_a + xy_b - xy_ab + ab_x + ab_y - ab_xy
    more = (xa > zero) & (xb > zero) & (ya > zero) & (yb > zero) & (double > zero)
    less = (xa < -zero) & (xb < -zero) & (ya < -zero) & (yb < -zero) & (double < -zero)
    return double * (more | less), xy_a, xy_b, xy_ab, ab_x, ab_y, ab_xy


class Regressions(NamedTuple):
    """A pair's coefficients at every moment. `gain_*` is -1/2 ln s and `half_*` is 1 / 2s."""

    xy: Float[Tensor, "*pair"]
    ab: Float[Tensor, "*pair"]
    root_v: Float[Tensor, "*pair"]
    root_w: Float[Tensor, "*pair"]
    xa: Float[Tensor, "*pair"]
    xb: Float[Tensor, "*pair"]
    ya: Float[Tensor, "*pair"]
    yb: Float[Tensor, "*pair"]
    ha: Float[Tensor, "*pair"]
    hb: Float[Tensor, "*pair"]
    xk: Float[Tensor, "*pair"]
    yk: Float[Tensor, "*pair"]
    hk: Float[Tensor, "*pair"]
    free: Float[Tensor, "*pair"]
    """Of k on what x and h leave of a."""
    gain_a_x: Float[Tensor, "*pair"]
    gain_b_x: Float[Tensor, "*pair"]
    gain_a_y: Float[Tensor, "*pair"]
    gain_b_y: Float[Tensor, "*pair"]
    gain_a_xy: Float[Tensor, "*pair"]
    gain_b_xy: Float[Tensor, "*pair"]
    gain_x_ab: Float[Tensor, "*pair"]
    gain_y_ab: Float[Tensor, "*pair"]
    gain_k: Float[Tensor, "*pair"]
    half_a_x: Float[Tensor, "*pair"]
    half_b_x: Float[Tensor, "*pair"]
    half_a_y: Float[Tensor, "*pair"]
    half_b_y: Float[Tensor, "*pair"]
    half_a_xy: Float[Tensor, "*pair"]
    half_b_xy: Float[Tensor, "*pair"]
    half_x_ab: Float[Tensor, "*pair"]
    half_y_ab: Float[Tensor, "*pair"]
    half_k: Float[Tensor, "*pair"]


def regressions(m: Moments) -> Regressions:
    """The coefficients that moments imply."""
    shares = {
        n: getattr(m, n) for n in ("a_x", "b_x", "a_y", "b_y", "a_xy", "b_xy", "x_ab", "y_ab")
    }
    shares["k"] = m.left / m.a_xy
    return Regressions(
        xy=m.xy, ab=m.ab, root_v=m.v.rsqrt(), root_w=m.w.rsqrt(), xa=m.xa, xb=m.xb, ya=m.ya,
        yb=m.yb, ha=m.ha, hb=m.hb, xk=m.xk, yk=m.yk, hk=m.hk,
        free=-(m.xa * m.xk + m.ha * m.hk) / m.a_xy,
        **{f"gain_{name}": -0.5 * share.log() for name, share in shares.items()},
        **{f"half_{name}": 0.5 / share for name, share in shares.items()},
    )  # fmt: skip


def at_moment(x, y, a, b, r):
    """The seven redundancies of one sample, its values at unit variance, in nats."""
    h, k = (y - r.xy * x) * r.root_v, (b - r.ab * a) * r.root_w
    a_x, b_x, a_y, b_y = a - r.xa * x, b - r.xb * x, a - r.ya * y, b - r.yb * y
    a_xy, b_xy = a_x - r.ha * h, b_x - r.hb * h
    x_ab, y_ab = x - r.xa * a - r.xk * k, y - r.ya * a - r.yk * k
    k_all = k - r.xk * x - r.hk * h - r.free * a_xy
    of_a, of_b = 0.5 * a * a, 0.5 * b * b
    xya = r.gain_a_xy + of_a - r.half_a_xy * a_xy * a_xy
    return overlaps(
        r.gain_a_x + of_a - r.half_a_x * a_x * a_x,
        r.gain_b_x + of_b - r.half_b_x * b_x * b_x,
        r.gain_a_y + of_a - r.half_a_y * a_y * a_y,
        r.gain_b_y + of_b - r.half_b_y * b_y * b_y,
        xya,
        r.gain_b_xy + of_b - r.half_b_xy * b_xy * b_xy,
        r.gain_x_ab + 0.5 * x * x - r.half_x_ab * x_ab * x_ab,
        r.gain_y_ab + 0.5 * y * y - r.half_y_ab * y_ab * y_ab,
        xya + r.gain_k + 0.5 * k * k - r.half_k * k_all * k_all,
        0.0,
    )


@functools.cache
def compiled() -> Callable:
    """`at_moment`, summed over the moments of listed pairs, as machine code."""
    for function in (common, overlaps, at_moment):
        _jitable(function)

    def total(past, past_right, future, future_right, rows, columns, table, sums):
        for pair in range(len(rows)):
            i, j, r = rows[pair], columns[pair], table[pair]
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = 0.0
            for t in range(past.shape[1]):
                v = at_moment(past[i, t], past_right[j, t], future[i, t], future_right[j, t], r)
                s0 += v[0]
                s1 += v[1]
                s2 += v[2]
                s3 += v[3]
                s4 += v[4]
                s5 += v[5]
                s6 += v[6]
            sums[:, pair] = s0, s1, s2, s3, s4, s5, s6

    # Sums may be taken in any order, so that several moments go through at once.
    return numba.njit(fastmath={"reassoc", "contract", "nsz"})(inspect.unwrap(total))


def _jitable(function: Callable) -> None:
    """Let compiled code call a function; without the checks of shapes around it, if there are."""
    bare = inspect.unwrap(function)
    numba.extending.overload(function, inline="always", strict=False)(lambda *_, **__: bare)


def ccs(m: Moments, left: Windows, right: Windows, same: bool) -> Redundancy:
    """Mean over moments of the common change in surprisal of all pairs, in nats.

    `m` holds the moments of all heads on the left with all on the right; with `same` only pairs
    above the diagonal are computed, and the others are 0.
    """
    (heads, samples), others = left.past.shape, len(right.past)
    every = torch.ones(heads, others, dtype=torch.bool, device=left.past.device)
    rows, columns = (every.triu(1) if same else every).nonzero(as_tuple=True)
    m = Moments(*(field.expand(every.shape)[rows, columns] for field in m))
    scale = (samples - 1) ** 0.5  # to unit variance
    windows = [scale * z for z in (left.past, right.past, left.future, right.future)]
    loop = compiled() if left.past.device.type == "cpu" else None
    means = (_looped(loop, m, windows, rows, columns) if loop
             else _batched(m, windows, rows, columns)) / samples  # fmt: skip
    found = means.new_zeros(7, heads, others)
    found[:, rows, columns] = means
    return Redundancy(*found)


def _looped(
    loop: Callable, m: Moments, windows: list[Tensor], rows: Tensor, columns: Tensor
) -> Tensor:
    table = np.empty(len(rows), dtype=[(name, "f8") for name in Regressions._fields])
    for name, value in regressions(m)._asdict().items():
        table[name] = value.numpy()
    sums = np.empty((7, len(rows)))
    loop(*(z.numpy() for z in (*windows, rows, columns)), table, sums)
    return torch.from_numpy(sums)


def _batched(m: Moments, windows: list[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    past, past_right, future, future_right = windows
    sums = past.new_empty(7, len(rows))
    at_once = max(1, CELLS // past.shape[1]) if past.device.type == "cpu" else len(rows)
    for part in torch.arange(len(rows), device=past.device).split(at_once):
        i, j = rows[part], columns[part]
        r = Regressions(*(value[:, None] for value in regressions(Moments(*(f[part] for f in m)))))
        found = at_moment(past[i], past_right[j], future[i], future_right[j], r)
        sums[:, part] = torch.stack([value.sum(1) for value in found])
    return sums
