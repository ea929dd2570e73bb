"""Gaussian information between the pasts and futures of all pairs of heads, from correlations.

For Gaussian series every mutual information is -1/2 ln of a share of variance that is left over:
I(x, y; a) = -1/2 ln(variance of a that x and y do not explain). No determinant is taken:

1. Six correlations per pair, four of them matrix products over all pairs at once.
2. y is freed of x (h, what x leaves of it) and b of a (k). In the bases x, h and a, k every
   unexplained share is one minus squares: a_xy = 1 - r(x,a)^2 - r(h,a)^2.
3. `left` of all four follows from regressing k on x, h and what they left of a.

Step 2 divides by v = 1 - r(x,y)^2 and w = 1 - r(a,b)^2, so rounding grows as 1 / min(v, w), where
plain determinants lose 1 / (v w). Pairs below `CLOSE` are taken again from the series themselves
(`from_series`, Gram-Schmidt twice), where it grows as 1 / sqrt. Below `SAME` what tells two series
apart is the rounding of float32 activations, and nothing can be said of them.

`moments` is written for tensors and numbers alike (`fused`): on a CPU, what minimum mutual
information needs of a pair comes from one compiled loop, elsewhere from array operations.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_utils import fused
from lens_utils.phiid_lattice import Information

CLOSE = 1e-8
SAME = 1e-12


class Windows(NamedTuple):
    """Past and future of each head's series: centred, of norm 1."""

    past: Float[Tensor, "head sample"]
    future: Float[Tensor, "head sample"]


class Correlations(NamedTuple):
    """Of every head on the left with every head on the right; xa and yb are a head's own."""

    xy: Float[Tensor, "left right"]
    ab: Float[Tensor, "left right"]
    xa: Float[Tensor, "left 1"]
    xb: Float[Tensor, "left right"]
    ya: Float[Tensor, "left right"]
    yb: Float[Tensor, "1 right"]


class Shares(NamedTuple):
    """Variance left unexplained: a_xy is that of the future a, given the pasts x and y."""

    a_x: Float[Tensor, "*#pair"]
    b_x: Float[Tensor, "*#pair"]
    a_y: Float[Tensor, "*#pair"]
    b_y: Float[Tensor, "*#pair"]
    a_xy: Float[Tensor, "*#pair"]
    b_xy: Float[Tensor, "*#pair"]
    x_ab: Float[Tensor, "*#pair"]
    y_ab: Float[Tensor, "*#pair"]
    left: Float[Tensor, "*#pair"]
    """Of the generalised variance of a and b given x and y: det / (v w)."""


class Moments(NamedTuple):
    """What is known of each pair: covariances, then shares of variance left unexplained.

    h is what x leaves of y, k is what a leaves of b. Shapes broadcast to one value per pair.
    """

    xy: Float[Tensor, "*#pair"]
    ab: Float[Tensor, "*#pair"]
    xa: Float[Tensor, "*#pair"]
    xb: Float[Tensor, "*#pair"]
    ya: Float[Tensor, "*#pair"]
    yb: Float[Tensor, "*#pair"]
    ha: Float[Tensor, "*#pair"]
    hb: Float[Tensor, "*#pair"]
    xk: Float[Tensor, "*#pair"]
    yk: Float[Tensor, "*#pair"]
    hk: Float[Tensor, "*#pair"]
    v: Float[Tensor, "*#pair"]
    """Variance of h, the share of y that x does not explain."""
    w: Float[Tensor, "*#pair"]
    """Variance of k, the share of b that a does not explain."""
    a_x: Float[Tensor, "*#pair"]
    b_x: Float[Tensor, "*#pair"]
    a_y: Float[Tensor, "*#pair"]
    b_y: Float[Tensor, "*#pair"]
    a_xy: Float[Tensor, "*#pair"]
    b_xy: Float[Tensor, "*#pair"]
    x_ab: Float[Tensor, "*#pair"]
    y_ab: Float[Tensor, "*#pair"]
    left: Float[Tensor, "*#pair"]


def correlations(left: Windows, right: Windows) -> Correlations:
    """Of every head on the left with every head on the right.

    A head with itself has no moments: what follows from its correlations is NaN or infinite.
    """
    return Correlations(
        xy=left.past @ right.past.T,
        ab=left.future @ right.future.T,
        xa=(left.past * left.future).sum(1)[:, None],
        xb=left.past @ right.future.T,
        ya=left.future @ right.past.T,
        yb=(right.past * right.future).sum(1)[None],
    )


def moments(xy, ab, xa, xb, ya, yb) -> Moments:
    """What the six correlations of a pair say of it; of numbers and of tensors."""
    v, w = 1 - xy * xy, 1 - ab * ab
    ha, hb = ya - xy * xa, yb - xy * xb
    xk, yk = xb - ab * xa, yb - ab * ya
    hk = hb - ab * ha
    a_x, b_x, a_y, b_y = 1 - xa * xa, 1 - xb * xb, 1 - ya * ya, 1 - yb * yb
    a_xy, x_ab = a_x - ha * ha / v, a_x - xk * xk / w
    # k regressed on x, h and what they leave of a (with which k shares `more`).
    more = xa * xk + ha * hk / v
    left = a_xy * (1 - (xk * xk + hk * hk / v) / w) - more * more / w
    b_xy, y_ab = b_x - hb * hb / v, a_y - yk * yk / w
    return Moments(
        xy, ab, xa, xb, ya, yb, ha, hb, xk, yk, hk, v, w, a_x, b_x, a_y, b_y, a_xy, b_xy, x_ab,
        y_ab, left,
    )  # fmt: skip


def shares(m: Moments) -> Shares:
    """Those of the moments."""
    return Shares(*(getattr(m, name) for name in Shares._fields))


@functools.cache
def compiled(direct: bool) -> Callable:
    """`moments` of all pairs as machine code. It keeps `margin` and the shares that vary by pair,
    or (direct) the two that `sts_and_rtr` needs."""
    fused.inlined(moments, margin, weighed)

    def two(xy, ab, xa, xb, ya, yb, least, out):
        for i in range(xy.shape[0]):
            for j in range(xy.shape[1]):
                m = moments(xy[i, j], ab[i, j], xa[i, 0], xb[i, j], ya[i, j], yb[0, j])
                least[i, j] = margin(m)
                out[0, i, j], out[1, i, j] = weighed(m)

    def seven(xy, ab, xa, xb, ya, yb, least, out):
        for i in range(xy.shape[0]):
            for j in range(xy.shape[1]):
                m = moments(xy[i, j], ab[i, j], xa[i, 0], xb[i, j], ya[i, j], yb[0, j])
                least[i, j] = margin(m)
                out[0, i, j], out[1, i, j], out[2, i, j] = m.b_x, m.a_y, m.left
                out[3, i, j], out[4, i, j], out[5, i, j], out[6, i, j] = (
                    m.a_xy,
                    m.b_xy,
                    m.x_ab,
                    m.y_ab,
                )

    return fused.loop(two if direct else seven)


def at_once(
    c: Correlations, direct: bool
) -> tuple[Shares | tuple[Tensor, Tensor], Float[Tensor, "left right"]]:
    """The shares of all pairs, or (direct) those `weighed`, and `margin`, by the compiled loop."""
    least, out = torch.empty_like(c.xy), c.xy.new_empty(2 if direct else 7, *c.xy.shape)
    compiled(direct)(*(z.numpy() for z in (*c, least, out)))
    if direct:
        return (out[0], out[1]), least
    b_x, a_y, left, a_xy, b_xy, x_ab, y_ab = out
    return Shares(1 - c.xa**2, b_x, a_y, 1 - c.yb**2, a_xy, b_xy, x_ab, y_ab, left), least


def from_series(
    x: Float[Tensor, "pair sample"],
    y: Float[Tensor, "pair sample"],
    a: Float[Tensor, "pair sample"],
    b: Float[Tensor, "pair sample"],
) -> Moments:
    """The same of listed pairs from residuals of their series, where correlations cancel out."""

    def product(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum(1, keepdim=True)

    def rest(target: Tensor, *basis: Tensor) -> tuple[Tensor, Tensor]:
        """What an orthogonal basis leaves of a series: its variance, and itself."""
        units = [b * product(b, b).clamp(min=1e-300).rsqrt() for b in basis]
        for unit in units * 2:  # the second round removes what rounding left of the first
            target = target - product(target, unit) * unit
        return product(target, target), target

    (v, h), (w, k) = rest(y, x), rest(b, a)
    a_xy, free = rest(a, x, h)
    found = Moments(
        xy=product(x, y), ab=product(a, b), xa=product(x, a), xb=product(x, b), ya=product(y, a),
        yb=product(y, b), ha=product(h, a), hb=product(h, b), xk=product(x, k), yk=product(y, k),
        hk=product(h, k), v=v, w=w, a_x=rest(a, x)[0], b_x=rest(b, x)[0], a_y=rest(a, y)[0],
        b_y=rest(b, y)[0], a_xy=a_xy, b_xy=rest(b, x, h)[0], x_ab=rest(x, a, k)[0],
        y_ab=rest(y, a, k)[0], left=a_xy * rest(k, x, h, free)[0] / w,
    )  # fmt: skip
    return Moments(*(value.squeeze(1) for value in found))


def margin(m):
    """The smallest share that rounding has to leave intact; NaN where nothing is left of it.

    Of numbers and of tensors.
    """
    return torch.minimum(torch.minimum(m.v, m.w), m.left)


def mended(
    m: Moments, least: Float[Tensor, "left right"], left: Windows, right: Windows
) -> tuple[Moments, Float[Tensor, "left right"], Bool[Tensor, "left right"]]:
    """Moments and margins with the close pairs taken from their series; which pairs are lost.

    Lost pairs (equal series, or a future that follows exactly) get the moments of noise.
    """
    close = ~(least >= CLOSE)
    rows, columns = close.nonzero(as_tuple=True)
    lost = torch.zeros_like(close)
    fields = [field.expand(close.shape).clone() for field in m]
    least = least.clone()
    for part in torch.arange(len(rows), device=rows.device).split(4096):
        i, j = rows[part], columns[part]
        better = from_series(left.past[i], right.past[j], left.future[i], right.future[j])
        gone = ~(margin(better) >= SAME)
        lost[i, j] = gone
        least[i, j] = margin(better).masked_fill(gone, 1)
        for name, field, value in zip(Moments._fields, fields, better, strict=True):
            noise = float(len(name) != 2)  # names of two letters are covariances
            field[i, j] = torch.where(gone, noise, value)
    return Moments(*fields), least, lost


def information(s: Shares) -> Information:
    """All nine mutual informations, in nats."""
    return Information(*(share.log().mul_(-0.5) for share in s))


def weighed(s):
    """Two shares that hold sts and rtr under minimum mutual information; of numbers and tensors.

    Minima of informations are maxima of shares, and a sum of logarithms is that of a product.
    """
    of_a, of_b = torch.maximum(s.a_x, s.a_y), torch.maximum(s.b_x, s.b_y)
    most = torch.maximum(of_a, of_b)
    over = torch.minimum(s.a_xy, s.b_xy) * torch.minimum(s.x_ab, s.y_ab) * of_a * of_b
    under = torch.minimum(s.a_x, s.b_x) * torch.minimum(s.a_y, s.b_y) * most * s.left
    return over / under, most


def sts_and_rtr(
    ratio: Float[Tensor, "*pair"], most: Float[Tensor, "*pair"]
) -> tuple[Float[Tensor, "*pair"], Float[Tensor, "*pair"]]:
    """These two atoms in nats from what is `weighed`, with two logarithms instead of nine."""
    return ratio.log().mul_(0.5), most.log().mul_(-0.5)
