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

from lens_utils import fused, phiid_ccs, phiid_discrete, phiid_gaussian
from lens_utils.errors import BadInput
from lens_utils.phiid_gaussian import CLOSE, SAME, Windows
from lens_utils.phiid_lattice import ATOMS, Information, Redundancy, atoms, mmi, swapped

SHORTEST = 5  # four variables need five samples
FLAT = 1e-10  # of the level: below it the spread of a series is rounding
ROWS, COLUMNS = 64, 511  # of pairs at once on a CPU: in its cache, and below what torch divides

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
    """The smallest share of variance that decides a pair, among those used: what one head does not
    share with the other, or what both pasts leave of the futures. NaN for discrete ones."""

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
    """A block of pairs of one series: terms of the atoms, as `_terms` has them."""

    terms: Sequence[Float[Tensor, "#left #right"]]
    least: float = torch.inf
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
    direct = kind == "gaussian" and redundancy == "mmi" and set(names) <= {"sts", "rtr"}
    one, fit_one = _windows(left, tau, pooling, kind)
    two, fit_two = (one, fit_one) if same else _windows(right, tau, pooling, kind)
    n_series, n_heads = fit_one.shape
    whole = (fit_one.all(1) & fit_two.all(1)).tolist()
    total = left.new_zeros(len(names), n_heads, n_heads)
    used = fit_one.double().T @ fit_two.double()
    lost, close, least = 0, 0, torch.inf
    for rows, columns in _tiles(n_heads, same, left.device.type):
        diagonal = same and rows.start == columns.start
        sums = left.new_zeros(2 if direct else 16, *used[rows, columns].shape)
        for s in range(n_series):
            here = Windows(*(z[s, rows] for z in one)), Windows(*(z[s, columns] for z in two))
            tile = _tile(*here, diagonal, redundancy, kind, direct)
            terms = tile.terms
            left_out = tile.lost
            if tile.lost is not None:
                used[rows, columns] -= tile.lost.double()
                lost += int(tile.lost.sum())
            if not whole[s]:
                unfit = ~(fit_one[s, rows, None] & fit_two[s, None, columns])
                left_out = unfit if left_out is None else unfit | left_out
            if left_out is not None:
                terms = [term.masked_fill(left_out, 0) for term in terms]
            for held, term in zip(sums, terms, strict=True):
                held += term
            least, close = min(least, tile.least), close + tile.close
        if direct:
            sts_rtr = dict(zip(("sts", "rtr"), sums, strict=True))
            total[:, rows, columns] = torch.stack([sts_rtr[name] for name in names])
        else:
            i, r = Information(*sums[:9]), Redundancy(*sums[9:])
            total[:, rows, columns] = atoms(i, r, names)
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
        lost=lost,
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
    whole = torch.stack(fit).all(0)
    for window in units:
        window.masked_fill_(~whole[..., None], 0)  # tells nothing, and breaks nothing
    return Windows(past, future), whole


def _centred(series: Tensor) -> Tensor:
    centred = series - series.mean(-1, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)  # of what rounding at a high level left


def _tiles(heads: int, same: bool, device: str) -> Iterator[tuple[slice, slice]]:
    """Blocks of all pairs, or of those on and above the diagonal; one block on an accelerator."""
    high, wide = (ROWS, COLUMNS) if device == "cpu" else (heads, heads)
    for row in range(0, heads, high):
        for column in range(row if same else 0, heads, wide):
            yield slice(row, min(row + high, heads)), slice(column, min(column + wide, heads))


def _tile(
    left: Windows, right: Windows, same: bool, redundancy: Redundant, kind: Kind, direct: bool
) -> _Tile:
    """Every head on the left with every head on the right; `same` where the diagonal begins."""
    if kind == "discrete":
        i, r = phiid_discrete.tables(left, right, redundancy)
        return _Tile((*i, *r))
    c = phiid_gaussian.correlations(left, right)
    found, m, close, lost = None, None, None, None
    if fused.fits(left.past):
        found, margin = phiid_gaussian.at_once(c, direct)
    else:
        m = phiid_gaussian.moments(*c)
        margin = phiid_gaussian.margin(m)
    if same:  # the other half of the square is not used
        margin.masked_fill_(torch.ones_like(margin, dtype=torch.bool).tril(), 1)
    if not margin.min().item() >= CLOSE:
        close = ~(margin >= CLOSE)
        m = phiid_gaussian.moments(*c) if m is None else m
        m, margin, lost = phiid_gaussian.mended(m, margin, left, right)
    if m is not None:
        found = phiid_gaussian.weighed(m) if direct else phiid_gaussian.shares(m)
    least, near = margin.min().item(), 0 if close is None else int(close.sum())
    if direct:
        return _Tile(phiid_gaussian.sts_and_rtr(*found), least, near, lost)
    i = phiid_gaussian.information(found)
    r = mmi(i) if redundancy == "mmi" else phiid_ccs.ccs(c, left, right, same, m, close)
    return _Tile((*i, *r), least, near, lost)
