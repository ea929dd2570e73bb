"""Integrated information decomposition (PhiID) of all pairs of attention heads at once.

Given one number per head and step (the norm of the head's output), how does the past of two heads
tell about their future: what do both hold, what one alone, what only the two together?

1. Each series gives windows, past = z[:-tau] and future = z[tau:], each centred by itself.
2. Of every pair: nine mutual informations (Gaussian by `phiid_gaussian`, high/low by
   `phiid_discrete`) and seven redundancies (`mmi`, or `ccs` by `phiid_ccs`).
3. `phiid_lattice` turns them into the sixteen atoms; means are taken over the prompts.

Prompts are taken apart ("mean", the published way), or their windows are put end to end, centred
per prompt ("pooled") or not ("concat", where differences in level between prompts count as
memory). No pair of steps ever crosses from one prompt into the next.

What has no answer is NaN and is counted, never 0: a head whose series is constant, not finite or
follows exactly from its own past (period 2, a straight line), and a pair of equal series. Means
are over what is left. `surrogate` pairs heads of different prompts, which cannot share anything:
under MMI most of `sts` is still there (twice the smaller self-information), so look at it first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from lens_utils import phiid_ccs, phiid_discrete, phiid_gaussian
from lens_utils.errors import BadInput
from lens_utils.phiid_gaussian import CLOSE, SAME, Windows
from lens_utils.phiid_lattice import ATOMS, atoms, mmi, swapped

SHORTEST = 5  # four variables need five samples
FLAT = 1e-10  # of the level: below it the spread of a series is rounding
TILE = 2**15 - 1  # pairs at once on a CPU: they stay in its cache, and on one thread
ROWS = 64  # of a tile, at most: half a square on the diagonal is wasted

Redundant = Literal["mmi", "ccs"]
Kind = Literal["gaussian", "discrete"]
Pooling = Literal["mean", "pooled", "concat"]


@dataclass(frozen=True)
class Decomposition:
    """Atoms of all pairs of heads, and what they rest on."""

    atoms: dict[str, Float[ndarray, "head head"]]
    """[first head, second head], mean over series; NaN on the diagonal and where none was fit."""
    used: Int[ndarray, "head head"]
    """Series behind each pair's mean."""
    degenerate: Int[ndarray, " head"]
    """Series of each head that were left out."""
    series: int
    """How many there were: prompts (times shifts), or 1 where they were pooled."""
    unit: str
    """nats, or bits for discrete ones."""
    close: int
    """Pairs x series taken from the series themselves, their correlations being too near to 1."""
    lost: int
    """Of these, left out: the same to rounding, or a future that follows exactly."""
    least: float
    """The smallest share of variance that one head of a pair does not share with the other, among
    the pairs used; NaN for discrete ones."""

    def __getitem__(self, atom: str) -> Float[ndarray, "head head"]:
        return self.atoms[atom]


def decompose(
    series: Float[Tensor, "prompt head step"],
    *,
    tau: int = 1,
    redundancy: Redundant = "mmi",
    kind: Kind = "gaussian",
    pooling: Pooling = "mean",
    asked: Sequence[str] = ("sts", "rtr"),
    device: torch.device | str = "cpu",
) -> Decomposition:
    """Atoms of every pair of heads of the same prompt, in float64 on `device`.

    `asked` names the atoms wanted (`phiid_lattice.ATOMS` for all); sts and rtr alone have a short
    cut under Gaussian MMI. Raises BadInput where nothing can be computed.
    """
    series = series.to(device, torch.float64)
    return _decompose(series, series, True, tau, redundancy, kind, pooling, asked)


def surrogate(
    series: Float[Tensor, "prompt head step"],
    shifts: Sequence[int] = (1,),
    *,
    tau: int = 1,
    redundancy: Redundant = "mmi",
    kind: Kind = "gaussian",
    pooling: Pooling = "mean",
    asked: Sequence[str] = ("sts", "rtr"),
    device: torch.device | str = "cpu",
) -> Decomposition:
    """The null: head i of prompt p with head j of prompt p + shift (around the end), over shifts.

    It keeps each head's own memory and breaks whatever two heads share. Both orders of a pair are
    averaged, so that matrices compare with `decompose`. Raises BadInput, also for a shift of 0.
    """
    if not shifts or any(shift % len(series) == 0 for shift in shifts):
        raise BadInput(
            f"shifts {tuple(shifts)} of {len(series)} prompts pair a prompt with itself; "
            "a surrogate needs two different prompts"
        )
    series = series.to(device, torch.float64)
    others = torch.cat([series.roll(-shift, 0) for shift in shifts])
    series = series.repeat(len(shifts), 1, 1)
    return _decompose(series, others, False, tau, redundancy, kind, pooling, asked)


def bias_floor(
    prompts: int, steps: int, heads: int = 64, seed: int = 0, **options
) -> dict[str, float]:
    """Mean atoms of white noise of this length, by simulation; options as in `decompose`.

    The sum of all atoms is known: 4 / (2 (steps - tau)) nats, to first order, for each prompt.
    """
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(prompts, heads, steps, generator=source, dtype=torch.float64)
    return {atom: float(np.nanmean(m)) for atom, m in decompose(noise, **options).atoms.items()}


class _Tile(NamedTuple):
    values: Sequence[Float[Tensor, "left right"]]
    least: float
    close: int = 0
    lost: Tensor | None = None


def _check(series: Tensor, tau: int, asked: Sequence[str]) -> None:
    prompts, heads, steps = series.shape
    if unknown := set(asked) - set(ATOMS):
        raise BadInput(f"unknown atoms {', '.join(sorted(unknown))}; there are {' '.join(ATOMS)}")
    if not asked or prompts < 1 or heads < 2:
        raise BadInput(f"{prompts} prompts, {heads} heads, {len(asked)} atoms: needs 1, 2 and 1")
    if tau < 1 or steps - tau < SHORTEST:
        raise BadInput(
            f"{steps} steps at lag {tau}: needs a lag of at least 1 and {SHORTEST} steps beyond it"
        )


def _decompose(
    left: Tensor, right: Tensor, same: bool, tau: int, redundancy: Redundant, kind: Kind,
    pooling: Pooling, asked: Sequence[str],
) -> Decomposition:  # fmt: skip
    _check(left, tau, asked)
    names = tuple(dict.fromkeys(n for atom in asked for n in (atom, swapped(atom))))
    one, fit_one = _windows(left, tau, pooling, kind)
    two, fit_two = (one, fit_one) if same else _windows(right, tau, pooling, kind)
    n_series, n_heads = fit_one.shape
    total = left.new_zeros(len(names), n_heads, n_heads)
    missing = left.new_zeros(n_heads, n_heads)
    close, least = 0, torch.inf
    for s in range(n_series):
        i, j = fit_one[s].nonzero().squeeze(1), fit_two[s].nonzero().squeeze(1)
        whole = len(i) == len(j) == n_heads  # slices are quicker than lists
        first, second = (Windows(*(z[s, h] for z in w)) for w, h in ((one, i), (two, j)))
        for rows, columns in _tiles(len(i), len(j), same, left.device.type):
            here = Windows(*(z[rows] for z in first)), Windows(*(z[columns] for z in second))
            tile = _tile(*here, same, redundancy, kind, names)
            place = (rows, columns) if whole else (i[rows, None], j[None, columns])
            for matrix, values in zip(total, tile.values, strict=True):
                matrix[place] += values
            least, close = min(least, tile.least), close + tile.close
            if tile.lost is not None:
                missing[place] += tile.lost
    used = fit_one.double().T @ fit_two.double() - missing
    if same:  # the tiles cover the upper triangle
        total, used = total.triu(1), used.triu(1)
    used = (used + used.T).fill_diagonal_(0)
    if not used.any():
        raise BadInput(
            "no pair of heads can be decomposed: every series is constant, not finite, follows "
            "from its own past, or is the same as the other"
        )
    both = {n: total[k] + total[names.index(swapped(n))].T for k, n in enumerate(names)}
    return Decomposition(
        atoms={n: torch.where(used > 0, both[n] / used, torch.nan).cpu().numpy() for n in asked},
        used=used.long().cpu().numpy(),
        degenerate=(~fit_one).sum(0).cpu().numpy(),
        series=n_series,
        unit="nats" if kind == "gaussian" else "bits",
        close=close,
        lost=int(missing.sum()),
        least=least if kind == "gaussian" else torch.nan,
    )


def _windows(series: Tensor, tau: int, pooling: Pooling, kind: Kind) -> tuple[Windows, Tensor]:
    """Windows [series, head, sample], and which heads of which series are fit for use."""
    units, fit = [], []
    for window in (series[..., :-tau], series[..., tau:]):
        level = window.abs().amax(-1)
        if pooling != "mean":
            level = level.amax(0, keepdim=True)
            window = _centred(window) if pooling == "pooled" else window
            window = rearrange(window, "prompt head step -> 1 head (prompt step)")
        window = _centred(window)
        norm = window.norm(dim=-1)
        fit.append(norm > FLAT * level * window.shape[-1] ** 0.5)
        units.append(window.div_(norm[..., None]))
    past, future = units
    if kind == "gaussian":
        fit.append(1 - (past * future).sum(-1) ** 2 > SAME)
    return Windows(past, future), torch.stack(fit).all(0)


def _centred(series: Tensor) -> Tensor:
    centred = series - series.mean(-1, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)  # of what rounding at a high level left


def _tiles(left: int, right: int, same: bool, device: str) -> Iterator[tuple[slice, slice]]:
    """Blocks of all pairs, or of those on and above the diagonal; one block on an accelerator."""
    step = min(ROWS, max(1, TILE // max(right, 1))) if device == "cpu" else max(left, 1)
    for start in range(0, left, step):
        yield slice(start, min(start + step, left)), slice(start if same else 0, right)


def _tile(
    left: Windows, right: Windows, same: bool, redundancy: Redundant, kind: Kind,
    names: Sequence[str],
) -> _Tile:  # fmt: skip
    """The named atoms of every head on the left with every head on the right."""
    if kind == "discrete":
        return _Tile(atoms(*phiid_discrete.tables(left, right, redundancy), names), torch.inf)
    m = phiid_gaussian.moments(left, right, same)
    close, lost = 0, None
    if not phiid_gaussian.margin(m).min().item() >= CLOSE:
        m, near, lost = phiid_gaussian.mended(m, left, right)
        close = int((near.triu(1) if same else near).sum())
    if redundancy == "mmi" and set(names) <= {"sts", "rtr"}:
        found = dict(zip(("sts", "rtr"), phiid_gaussian.sts_and_rtr(m), strict=True))
        values = [found[name] for name in names]
    else:
        i = phiid_gaussian.information(m)
        r = mmi(i) if redundancy == "mmi" else phiid_ccs.ccs(m, left, right, same)
        values = atoms(i, r, names)
    if lost is not None:
        values = [value.masked_fill(lost, 0) for value in values]
    return _Tile(values, torch.minimum(m.v, m.w).min().item(), close, lost)
