"""The sixteen atoms of integrated information decomposition, from what two heads tell each other.

Two heads have a past (x of the first, y of the second) and a future (a and b). The past tells
about the future in sixteen ways: source and target each may be what both heads hold alike (r),
what only the first holds (x), what only the second holds (y), or what only the two together show
(s, synergy). `xts` is what the first head alone knew and only both together know a step later;
`sts` is information that stays in the pair as a whole, `rtr` what stays in both heads alike.

1. Information is cumulative: I(x; a) is everything that x holds about a, be it shared or not. Nine
   mutual informations and seven redundancies fill a table of sources r, x, y, xy against targets
   r, a, b, ab.
2. In that order one matrix undoes the accumulation on each side: atoms = U table U^T. The map is
   linear, so means over time or prompts may be taken before or after it.
3. Only the redundancy is a choice. `mmi` (here) calls the smaller of two informations shared;
   `phiid_ccs` counts only what both say alike at the same moment.

Mediano et al., arXiv:2109.13186; names and order of the atoms as in the `phyid` package.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SIDES = "rxys"
ATOMS = tuple(f"{source}t{target}" for source in SIDES for target in SIDES)
UNDO = torch.tensor(
    [[1, 0, 0, 0], [-1, 1, 0, 0], [-1, 0, 1, 0], [1, -1, -1, 1]], dtype=torch.float64
)


class Information(NamedTuple):
    """Mutual informations: `xyb` is I(x, y; b), between the pasts of both and one future."""

    xa: Float[Tensor, "*pair"]
    xb: Float[Tensor, "*pair"]
    ya: Float[Tensor, "*pair"]
    yb: Float[Tensor, "*pair"]
    xya: Float[Tensor, "*pair"]
    xyb: Float[Tensor, "*pair"]
    xab: Float[Tensor, "*pair"]
    yab: Float[Tensor, "*pair"]
    xyab: Float[Tensor, "*pair"]


class Redundancy(NamedTuple):
    """What two sources tell alike: `ab_x` is that of the futures a and b about the past x.

    `rtr` is what both pasts tell alike about both futures: the double redundancy.
    """

    rtr: Float[Tensor, "*pair"]
    xy_a: Float[Tensor, "*pair"]
    xy_b: Float[Tensor, "*pair"]
    xy_ab: Float[Tensor, "*pair"]
    ab_x: Float[Tensor, "*pair"]
    ab_y: Float[Tensor, "*pair"]
    ab_xy: Float[Tensor, "*pair"]


def mmi(i: Information) -> Redundancy:
    """Minimum mutual information: two sources share as much as the poorer one holds.

    Of two independent series it calls the smaller self-information shared, which gives them a
    large `sts`: compare with a surrogate before reading synergy into it.
    """
    return Redundancy(
        rtr=torch.minimum(torch.minimum(i.xa, i.xb), torch.minimum(i.ya, i.yb)),
        xy_a=torch.minimum(i.xa, i.ya),
        xy_b=torch.minimum(i.xb, i.yb),
        xy_ab=torch.minimum(i.xab, i.yab),
        ab_x=torch.minimum(i.xa, i.xb),
        ab_y=torch.minimum(i.ya, i.yb),
        ab_xy=torch.minimum(i.xya, i.xyb),
    )


def atoms(i: Information, r: Redundancy, asked: Sequence[str]) -> Float[Tensor, "asked ..."]:
    """The asked atoms, in the unit of the informations."""
    table = [r.rtr, r.xy_a, r.xy_b, r.xy_ab, r.ab_x, i.xa, i.xb, i.xab,
             r.ab_y, i.ya, i.yb, i.yab, r.ab_xy, i.xya, i.xyb, i.xyab]  # fmt: skip
    table = torch.stack(torch.broadcast_tensors(*table))
    undo = torch.kron(UNDO, UNDO)[[ATOMS.index(name) for name in asked]]
    return torch.tensordot(undo.to(table.device), table, dims=1)


def swapped(atom: str) -> str:
    """The atom's name when the two heads change places: xts becomes yts."""
    return atom.translate(str.maketrans("xy", "yx"))
