"""Redundancy as common change in surprisal (CCS), which asks every moment by itself.

Minimum mutual information calls something shared because two numbers are both large. CCS looks at
each moment t: how much less surprising did each source make the target there? Only where both
sources, both together and their overlap (i + j - both) agree in sign is the overlap counted.
Independent series then share nothing. The price: the mean over moments has no closed form, and
atoms may be negative.

1. Pointwise information of a Gaussian: -1/2 ln s + t^2 / 2 - e^2 / 2s, where e is what the sources
   leave of the target t, and s its variance (Ince, arXiv:1602.05063; Mediano et al. 2109.13186).
2. Nine of them per moment and pair, seven overlaps, seven tests of sign: `overlaps`, `at_moment`.
3. About 130 operations per sample, and nothing that all pairs could share: on arrays the cost is
   memory traffic, not arithmetic. So a CPU runs the same functions in one compiled loop (`fused`);
   arrays, 15 to 30 times slower there, are left to accelerators.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_utils import fused
from lens_utils.phiid_gaussian import Correlations, Moments, Windows, moments
from lens_utils.phiid_lattice import Redundancy

CELLS = 2**14  # moments x pairs in one array operation: what a core's cache holds


def kept(overlap, low, high, zero):
    """The overlap where it has the sign of all, of which `low` and `high` are the extremes; or 0.

    Written for numbers and for tensors alike, as are the functions below. Values within `zero` of
    0 have no sign.
    """
    positive, negative = torch.minimum(low, overlap) > zero, torch.maximum(high, overlap) < -zero
    return torch.where(positive | negative, overlap, 0.0)


def common(i, j, both, zero):
    """The overlap of two sources at a moment, or 0 where not all agree in sign."""
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    return kept(i + j - both, torch.minimum(low, both), torch.maximum(high, both), zero)


def overlaps(xa, xb, ya, yb, xya, xyb, xab, yab, xyab, zero):
    """The seven redundancies at a moment, in the order of `Redundancy`, from its informations."""
    xy_a = common(xa, ya, xya, zero)
    xy_b = common(xb, yb, xyb, zero)
    xy_ab = common(xab, yab, xyab, zero)
    ab_x = common(xa, xb, xab, zero)
    ab_y = common(ya, yb, yab, zero)
    ab_xy = common(xya, xyb, xyab, zero)
    double = xab + yab + xya + xyb - xyab - xa - xb - ya - yb
    double = double + xy_a + xy_b - xy_ab + ab_x + ab_y - ab_xy
    low = torch.minimum(torch.minimum(xa, xb), torch.minimum(ya, yb))
    high = torch.maximum(torch.maximum(xa, xb), torch.maximum(ya, yb))
    return kept(double, low, high, zero), xy_a, xy_b, xy_ab, ab_x, ab_y, ab_xy


class Regressions(NamedTuple):
    """A pair's coefficients at every moment. `gain_*` is -1/2 ln s and `half_*` is 1 / 2s.

    `ha_v` is the coefficient of h for a: covariance by variance.
    """

    xy: Float[Tensor, "*pair"]
    ab: Float[Tensor, "*pair"]
    xa: Float[Tensor, "*pair"]
    xb: Float[Tensor, "*pair"]
    ya: Float[Tensor, "*pair"]
    yb: Float[Tensor, "*pair"]
    ha_v: Float[Tensor, "*pair"]
    hb_v: Float[Tensor, "*pair"]
    xk: Float[Tensor, "*pair"]
    xk_w: Float[Tensor, "*pair"]
    yk_w: Float[Tensor, "*pair"]
    hk_v: Float[Tensor, "*pair"]
    free: Float[Tensor, "*pair"]
    """Of k on what x and h leave of a."""
    half_w: Float[Tensor, "*pair"]
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


def gain(share):
    """What a target's unexplained share says on average, in nats."""
    return -0.5 * torch.log(share)


def regressions(m) -> Regressions:
    """The coefficients that moments imply."""
    of_k = m.left / m.a_xy  # share of its variance
    free = -(m.xa * m.xk + m.ha * m.hk / m.v) / m.a_xy
    return Regressions(
        m.xy, m.ab, m.xa, m.xb, m.ya, m.yb, m.ha / m.v, m.hb / m.v, m.xk, m.xk / m.w, m.yk / m.w,
        m.hk / m.v, free, 0.5 / m.w,
        gain(m.a_x), gain(m.b_x), gain(m.a_y), gain(m.b_y), gain(m.a_xy), gain(m.b_xy),
        gain(m.x_ab), gain(m.y_ab), gain(of_k),
        0.5 / m.a_x, 0.5 / m.b_x, 0.5 / m.a_y, 0.5 / m.b_y, 0.5 / m.a_xy, 0.5 / m.b_xy,
        0.5 / m.x_ab, 0.5 / m.y_ab, 0.5 / (of_k * m.w),
    )  # fmt: skip


def at_moment(x, y, a, b, r):
    """The seven redundancies of one sample, its values at unit variance, in nats."""
    h, k = y - r.xy * x, b - r.ab * a
    a_x, b_x, a_y, b_y = a - r.xa * x, b - r.xb * x, a - r.ya * y, b - r.yb * y
    a_xy, b_xy = a_x - r.ha_v * h, b_x - r.hb_v * h
    x_ab, y_ab = x - r.xa * a - r.xk_w * k, y - r.ya * a - r.yk_w * k
    k_all = k - r.xk * x - r.hk_v * h - r.free * a_xy
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
        xya + r.gain_k + r.half_w * k * k - r.half_k * k_all * k_all,
        0.0,
    )


@functools.cache
def compiled() -> Callable:
    """Sums of `at_moment` over the moments of all pairs, as machine code."""
    fused.inlined(moments, gain, regressions, kept, common, overlaps, at_moment)

    def total(xy, ab, xa, xb, ya, yb, past, future, past_right, future_right, above, found):
        for i in range(len(past)):
            for j in range(i + 1 if above else 0, len(past_right)):
                m = moments(xy[i, j], ab[i, j], xa[i, 0], xb[i, j], ya[i, j], yb[0, j])
                r = regressions(m)
                x, y, a, b = past[i], past_right[j], future[i], future_right[j]
                s0 = s1 = s2 = s3 = s4 = s5 = s6 = 0.0
                for t in range(len(x)):
                    v = at_moment(x[t], y[t], a[t], b[t], r)
                    s0 += v[0]
                    s1 += v[1]
                    s2 += v[2]
                    s3 += v[3]
                    s4 += v[4]
                    s5 += v[5]
                    s6 += v[6]
                found[0, i, j], found[1, i, j], found[2, i, j] = s0, s1, s2
                found[3, i, j], found[4, i, j], found[5, i, j], found[6, i, j] = s3, s4, s5, s6

    return fused.loop(total)


def ccs(
    c: Correlations,
    left: Windows,
    right: Windows,
    above: bool,
    m: Moments | None = None,
    close: Bool[Tensor, "left right"] | None = None,
) -> Redundancy:
    """Mean over moments of the common change in surprisal of all pairs, in nats.

    With `above` only pairs above the diagonal are computed. The `close` pairs are taken from
    moments, as their correlations do not tell enough; all are, where compiled loops do not run.
    """
    scale = (left.past.shape[1] - 1) ** 0.5  # to unit variance
    left, right = (Windows(*(scale * z for z in windows)) for windows in (left, right))
    found = c.xy.new_zeros(7, *c.xy.shape)
    if fused.fits(c.xy):
        arrays = (*c, *left, *right)
        compiled()(*(z.numpy() for z in arrays), above, found.numpy())
    else:
        m, close = m or moments(*c), torch.ones_like(c.xy, dtype=torch.bool)
        close = close.triu(1) if above else close
    if m is not None and close is not None:
        rows, columns = close.nonzero(as_tuple=True)
        at_once = max(1, CELLS // left.past.shape[1]) if fused.fits(c.xy) else len(rows)
        for i, j in zip(rows.split(at_once), columns.split(at_once), strict=True):
            r = regressions(Moments(*(field.expand(close.shape)[i, j, None] for field in m)))
            values = at_moment(left.past[i], right.past[j], left.future[i], right.future[j], r)
            found[:, i, j] = torch.stack([value.sum(1) for value in values])
    return Redundancy(*found.div_(left.past.shape[1]))
