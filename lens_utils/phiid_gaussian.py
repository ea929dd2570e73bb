"""Gaussian information between the pasts and futures of all pairs of heads, from correlations.

For Gaussian series every mutual information is -1/2 ln of a share of variance that is left over:
I(x, y; a) = -1/2 ln(variance of a that x and y do not explain). No determinant is taken:

1. Ten correlations per pair, six of them matrix products over all pairs at once.
2. y is freed of x (h, by its part along x) and b of a (k). In the bases x, h and a, k every
   unexplained share is one minus squares: a_xy = 1 - r(x,a)^2 - r(h,a)^2.
3. `left` of all four follows from regressing k on x, h and what they left of a.

Step 2 divides by v = 1 - r(x,y)^2 and w = 1 - r(a,b)^2, so rounding grows as 1 / min(v, w), where
plain determinants lose 1 / (v w). Pairs below `CLOSE` are taken again from the series themselves
(`from_series`, Gram-Schmidt twice), where it grows as 1 / sqrt. Below `SAME` what tells two series
apart is the rounding of float32 activations, and nothing can be said of them.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_utils.phiid_lattice import Information

CLOSE = 1e-8
SAME = 1e-12


class Windows(NamedTuple):
    """Past and future of each head's series: centred, of norm 1."""

    past: Float[Tensor, "head sample"]
    future: Float[Tensor, "head sample"]


class Moments(NamedTuple):
    """What is known of each pair: correlations, then shares of variance left unexplained.

    h is y freed of x, k is b freed of a, both of norm 1. Shapes broadcast to one value per pair.
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
    """Of y given x."""
    w: Float[Tensor, "*#pair"]
    """Of b given a."""
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


def moments(left: Windows, right: Windows, same: bool) -> Moments:
    """Of every head on the left with every head on the right: shape [left, right].

    With `same` the first head on the right is the first on the left, and so on. A head with
    itself is given as a pair of unrelated series, which leaves it finite; it means nothing.
    """
    xy, ab = left.past @ right.past.T, left.future @ right.future.T
    xb, ya = left.past @ right.future.T, left.future @ right.past.T
    if same:
        for matrix in (xy, ab, xb, ya):
            matrix.fill_diagonal_(0)
    xa = (left.past * left.future).sum(1)[:, None]
    yb = (right.past * right.future).sum(1)[None]
    v, w = 1 - xy * xy, 1 - ab * ab
    root_v, root_w = v.rsqrt(), w.rsqrt()
    # addcmul is one pass over memory where a product and a sum are two.
    ha = torch.addcmul(ya, xy, xa, value=-1).mul_(root_v)
    hb = torch.addcmul(yb, xy, xb, value=-1).mul_(root_v)
    xk = torch.addcmul(xb, ab, xa, value=-1).mul_(root_w)
    yk = torch.addcmul(yb, ab, ya, value=-1).mul_(root_w)
    hk = torch.addcmul(hb, ab, ha, value=-1).mul_(root_w)
    a_x, b_y, b_x, a_y = 1 - xa * xa, 1 - yb * yb, 1 - xb * xb, 1 - ya * ya
    a_xy = torch.addcmul(a_x, ha, ha, value=-1)
    x_ab = torch.addcmul(a_x, xk, xk, value=-1)
    # k regressed on x, h and what they leave of a (with which k shares `more`, up to scale).
    k_xy = (1 - xk * xk).addcmul_(hk, hk, value=-1)
    more = (xa * xk).addcmul_(ha, hk)
    return Moments(
        xy=xy, ab=ab, xa=xa, xb=xb, ya=ya, yb=yb, ha=ha, hb=hb, xk=xk, yk=yk, hk=hk, v=v, w=w,
        a_x=a_x, b_x=b_x, a_y=a_y, b_y=b_y, a_xy=a_xy, x_ab=x_ab,
        b_xy=torch.addcmul(b_x, hb, hb, value=-1),
        y_ab=torch.addcmul(a_y, yk, yk, value=-1),
        left=k_xy.mul_(a_xy).addcmul_(more, more, value=-1),
    )  # fmt: skip


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
        """What an orthonormal basis leaves of a series: its variance, and itself at norm 1."""
        for unit in basis * 2:  # the second round removes what rounding left of the first
            target = target - product(target, unit) * unit
        variance = product(target, target)
        return variance, target * variance.clamp(min=1e-300).rsqrt()

    (v, h), (w, k) = rest(y, x), rest(b, a)
    a_xy, free = rest(a, x, h)
    found = Moments(
        xy=product(x, y), ab=product(a, b), xa=product(x, a), xb=product(x, b), ya=product(y, a),
        yb=product(y, b), ha=product(h, a), hb=product(h, b), xk=product(x, k), yk=product(y, k),
        hk=product(h, k), v=v, w=w, a_x=rest(a, x)[0], b_x=rest(b, x)[0], a_y=rest(a, y)[0],
        b_y=rest(b, y)[0], a_xy=a_xy, b_xy=rest(b, x, h)[0], x_ab=rest(x, a, k)[0],
        y_ab=rest(y, a, k)[0], left=a_xy * rest(k, x, h, free)[0],
    )  # fmt: skip
    return Moments(*(value.squeeze(1) for value in found))


def margin(m: Moments) -> Float[Tensor, "*pair"]:
    """The smallest share that rounding has to leave intact; NaN where nothing is left of it."""
    return torch.minimum(torch.minimum(m.v, m.w), m.left)


def mended(
    m: Moments, left: Windows, right: Windows
) -> tuple[Moments, Bool[Tensor, "row column"], Bool[Tensor, "row column"]]:
    """Moments with the close pairs taken from their series; which were close, which are lost.

    Lost pairs (equal series, or a future that follows exactly) get the moments of noise.
    """
    close = ~(margin(m) >= CLOSE)
    rows, columns = close.nonzero(as_tuple=True)
    lost = torch.zeros_like(close)
    fields = [field.expand(close.shape).clone() for field in m]
    for part in torch.arange(len(rows), device=rows.device).split(4096):
        i, j = rows[part], columns[part]
        better = from_series(left.past[i], right.past[j], left.future[i], right.future[j])
        gone = ~(margin(better) >= SAME)
        lost[i, j] = gone
        for name, field, value in zip(Moments._fields, fields, better, strict=True):
            noise = float(len(name) != 2)  # names of two letters are correlations
            field[i, j] = torch.where(gone, noise, value)
    return Moments(*fields), close, lost


def information(m: Moments) -> Information:
    """All nine mutual informations, in nats."""
    shares = (m.a_x, m.b_x, m.a_y, m.b_y, m.a_xy, m.b_xy, m.x_ab, m.y_ab, m.left)
    return Information(*(share.log().mul_(-0.5) for share in shares))


def sts_and_rtr(m: Moments) -> tuple[Float[Tensor, "*pair"], Float[Tensor, "*pair"]]:
    """These two under minimum mutual information, in nats, with two logarithms instead of nine.

    Minima of informations are maxima of shares, and a sum of logarithms is that of a product.
    """
    of_a, of_b = torch.maximum(m.a_x, m.a_y), torch.maximum(m.b_x, m.b_y)
    most = torch.maximum(of_a, of_b)
    over = torch.minimum(m.a_xy, m.b_xy).mul_(torch.minimum(m.x_ab, m.y_ab)).mul_(of_a).mul_(of_b)
    under = torch.minimum(m.a_x, m.b_x).mul_(torch.minimum(m.a_y, m.b_y)).mul_(most).mul_(m.left)
    return over.div_(under).log_().mul_(0.5), most.log_().mul_(-0.5)
