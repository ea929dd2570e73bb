"""Do several methods point at the same layers? Curves and tables in, verdicts and sentences out.

Each method gives an ability one number per layer: the share of its specialised neurons, the drop
when the layer is taken away, how well a probe reads it there. To call methods convergent because
their lists of best layers share some is too easy: curves over depth are smooth, and short lists in
a shallow model overlap by chance. So here

1. curves are compared by rank correlation, averaged over pairs of methods, and the null turns them
   against each other circularly: every curve keeps its smoothness and loses its place;
2. lists are compared with lists of the same lengths drawn at random: the size of the intersection
   of several such lists is a chain of hypergeometric draws;
3. depth is the centre of mass of a curve, with an interval drawn from the curve's own;
4. every claim is a `Finding` whose verdict follows from its numbers: supported, contradicted, not
   supported, or not testable where the gate failed or where the smallest p that the number of
   layers allows lies above the level.

A model of few layers cannot pass every test: the smallest possible p is always given.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import einops
import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from lens_utils.stats import Estimate

LEVEL = 0.05
DRAWS = 2000
MOST_TURNS = 20_000
Verdict = Literal["supported", "contradicted", "not supported", "not testable"]
Status = Literal["PASS", "OUT OF BAND", "NOT TESTABLE"]


class Curve(NamedTuple):
    """One number per layer with its 95 % interval; 0 means that the layer has no part in it."""

    value: Float[ndarray, " layer"]
    low: Float[ndarray, " layer"]
    high: Float[ndarray, " layer"]


class Agreement(NamedTuple):
    """How alike curves are, and how often curves turned against each other are as alike."""

    rho: float
    """Mean of Spearman's correlations over pairs of curves."""
    p: float
    floor: float
    """The smallest p that this number of layers and curves allows."""


class Overlap(NamedTuple):
    """Layers that are in every list, against lists of the same lengths drawn at random."""

    shared: list[int]
    expected: float
    p: float
    floor: float


@dataclass(frozen=True)
class Finding:
    """A claim, what the numbers make of it, and the numbers."""

    section: str
    claim: str
    verdict: Verdict
    because: str

    @property
    def sentence(self) -> str:
        """As the report says it."""
        return f"{self.claim}: {self.verdict} ({self.because})."


# 1. Curves


def correlations(curves: Float[ndarray, "method layer"]) -> Float[ndarray, "method method turn"]:
    """Spearman's correlation of every two curves, the second turned by 0, 1, ... layers.

    NaN for a curve without variation, which has no ranks.
    """
    ranks = stats.rankdata(curves, axis=1, nan_policy="propagate")
    ranks = ranks - ranks.mean(1, keepdims=True)
    norm = np.linalg.norm(ranks, axis=1, keepdims=True)
    unit = np.divide(ranks, norm, out=np.full(ranks.shape, np.nan), where=norm > 0)
    turned = np.stack([np.roll(unit, by, axis=1) for by in range(curves.shape[1])])
    pattern = "method layer, turn other layer -> method other turn"
    return einops.einsum(unit, turned, pattern)


def agreement(curves: Float[ndarray, "method layer"], seed: int = 0) -> Agreement:
    """Mean rank correlation of two or more curves, with the p of a circular-shift null.

    Exact over all turns of the curves against each other where there are at most MOST_TURNS of
    them, else over as many random ones. NaN where there are not two curves that vary.
    """
    found = correlations(curves)
    n_curves, _, n_layers = found.shape
    if n_curves < 2 or np.isnan(found).any():
        return Agreement(math.nan, math.nan, math.nan)
    if n_layers ** (n_curves - 1) <= MOST_TURNS:
        free = itertools.product(range(n_layers), repeat=n_curves - 1)
        turns = np.array([(0, *by) for by in free])
    else:
        rng = np.random.default_rng(seed)
        turns = rng.integers(n_layers, size=(MOST_TURNS, n_curves))
        turns[0] = 0  # the curves as they are
    pairs = list(itertools.combinations(range(n_curves), 2))
    each = [found[a, b, (turns[:, b] - turns[:, a]) % n_layers] for a, b in pairs]
    rho = np.mean(each, axis=0)
    p = float((rho >= rho[0] - 1e-12).mean())
    return Agreement(float(rho[0]), p, 1 / len(turns))


# 2. Lists of layers


def overlap(lists: Sequence[Sequence[int]], n_layers: int) -> Overlap:
    """Layers in all lists; p is the chance that as many are in lists drawn at random."""
    sets = [set(layers) for layers in lists]
    shared = sorted(set.intersection(*sets))
    sizes = [len(layers) for layers in sets]
    chance = np.zeros(n_layers + 1)  # of every size of the intersection so far
    chance[sizes[0]] = 1
    sizes_before = np.arange(n_layers + 1)
    for size in sizes[1:]:
        one = stats.hypergeom.pmf(sizes_before, n_layers, sizes_before[:, None], size)
        chance = chance @ one
    most = min(sizes)
    p, floor = (float(chance[at:].sum()) for at in (len(shared), most))
    return Overlap(shared, float(chance @ sizes_before), min(p, 1.0), floor)


def longest(n_layers: int, most: int = 5) -> int:
    """Layers in a list of best ones: five, and never more than half of them."""
    return max(1, min(most, n_layers // 2))


# 3. Depth


def centre(values: Float[ndarray, "*draw layer"]) -> Float[ndarray, "*draw"]:
    """Centre of mass over depth in percent; negative values weigh nothing. NaN without any mass.

    0 % is the beginning of the first layer, 100 % the end of the last: a flat curve has 50 %.
    """
    mass = np.clip(values, 0, None)
    n_layers = values.shape[-1]
    depth = 100 * (np.arange(n_layers) + 0.5) / n_layers
    total = mass.sum(-1)
    return np.asarray(np.divide(mass @ depth, total, out=np.full(total.shape, np.nan),
                                where=total > 0))  # fmt: skip


def resampled(curve: Curve, seed: int = 0) -> Float[ndarray, "draw layer"]:
    """Curves that the intervals allow: every layer drawn from a normal of its interval's width.

    The layers are drawn independently, as only their own intervals are known: where their errors
    go together, an interval made from these draws is too wide or too narrow.
    """
    rng = np.random.default_rng(seed)
    wide = np.nan_to_num((curve.high - curve.low) / (2 * stats.norm.ppf(0.975)))
    return curve.value + wide * rng.standard_normal((DRAWS, len(curve.value)))


def estimate(value: float, draws: Float[ndarray, " draw"], n: int) -> Estimate:
    """A value with the 95 % range of its draws; n is what it rests on, 0 where there is no value.

    The interval is widened to the value where noise moved every draw away from it.
    """
    kept = draws[~np.isnan(draws)]
    if math.isnan(value) or len(kept) == 0:
        return Estimate(value=math.nan, low=math.nan, high=math.nan, n=0)
    low, high = np.percentile(kept, [2.5, 97.5])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=n)


def depth(curve: Curve, seed: int = 0) -> Estimate:
    """Centre of mass of a curve, in percent of depth, with its interval; n counts layers.

    Noise in layers that have no part pulls the centre towards the middle. Between two curves of the
    same noise that pull cancels (`deeper`); a single depth is not free of it.
    """
    draws = centre(resampled(curve, seed))
    return estimate(float(centre(curve.value)), draws, len(curve.value))


def deeper(these: Sequence[Curve], those: Sequence[Curve], seed: int = 0) -> Estimate:
    """How much deeper these curves lie than those, in points of depth: a mean over methods.

    The first of these is compared with the first of those, and so on. n counts methods.
    """
    gaps, draws = [], []
    for n, (one, other) in enumerate(zip(these, those, strict=True)):
        gaps.append(float(centre(one.value) - centre(other.value)))
        seeds = (2 * n + 1000 * seed, 2 * n + 1 + 1000 * seed)
        mine, theirs = (centre(resampled(c, s)) for c, s in zip((one, other), seeds, strict=True))
        draws.append(mine - theirs)
    if not gaps:
        return estimate(math.nan, np.zeros(0), 0)
    return estimate(float(np.mean(gaps)), np.mean(draws, axis=0), len(gaps))


# 4. Verdicts


def by_p(p: float, floor: float, alike: float = 1.0) -> Verdict:
    """Of a one-sided test: `alike` is what has to be above 0 for the claim, such as rho."""
    if math.isnan(p) or math.isnan(floor) or floor > LEVEL + 1e-12:
        return "not testable"
    return "supported" if p <= LEVEL + 1e-12 and alike > 0 else "not supported"


def by_interval(found: Mapping[str, float]) -> Verdict:
    """Of an estimate that the claim wants above 0."""
    if found["n"] == 0 or math.isnan(found["value"]):
        return "not testable"
    if found["low"] > 0:
        return "supported"
    return "contradicted" if found["high"] < 0 else "not supported"


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim that needs several: the worst of them decides."""
    order: tuple[Verdict, ...] = ("contradicted", "not testable", "not supported", "supported")
    return min(verdicts, key=order.index) if verdicts else "not testable"


def shown(found: Mapping[str, float], unit: str = "") -> str:
    """An estimate in a sentence."""
    if found["n"] == 0 or math.isnan(found["value"]):
        return "no estimate"
    interval = f"[{found['low']:.3g}, {found['high']:.3g}]"
    return f"{found['value']:.3g}{unit and ' '}{unit} {interval}, n {found['n']:.0f}"


def claim(section: str, said: str, found: Mapping[str, float], unit: str = "") -> Finding:
    """The finding that an estimate is above 0."""
    return Finding(section, said, by_interval(found), shown(found, unit))


def untestable(section: str, said: str, reason: str) -> Finding:
    """The finding that could not be had, and why."""
    return Finding(section, said, "not testable", reason)


def checkpoint(
    name: str,
    value: float | int | None,
    band: tuple[float | int, float | int],
    unit: str = "",
    comment: str = "",
) -> dict[str, object]:
    """One row of the checkpoint table; no value is NOT TESTABLE. The band's ends belong to it."""
    missing = value is None or math.isnan(value)
    status: Status = "NOT TESTABLE"
    if not missing:
        status = "PASS" if band[0] <= value <= band[1] else "OUT OF BAND"
    ends = [("" if math.isinf(end) else f"{end:g}") for end in band]
    said = f"{ends[0]} to {ends[1]}" if all(ends) else f"at least {ends[0]}" if ends[0] else "any"
    return {"checkpoint": name, "value": math.nan if missing else float(value), "band": said,
            "unit": unit, "status": status, "comment": comment}  # fmt: skip


# 5. Pages


Block = str | pd.DataFrame


def page(title: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """Sections of paragraphs and tables as Markdown."""
    parts = [f"# {title}"]
    for name, blocks in sections.items():
        parts.append(f"## {name}")
        parts += [b if isinstance(b, str) else _table(b) for b in blocks]
    return "\n\n".join(parts) + "\n"


def plain(title: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """The same as plain text."""
    parts = [f"{title}\n{'=' * len(title)}"]
    for name, blocks in sections.items():
        parts.append(f"{name}\n{'-' * len(name)}")
        parts += [b.replace("**", "") if isinstance(b, str) else _aligned(b) for b in blocks]
    return "\n\n".join(parts) + "\n"


def _table(frame: pd.DataFrame) -> str:
    rows = [list(map(str, frame.columns)), ["---"] * frame.shape[1]]
    rows += [[_cell(value).replace("|", "&#124;") for value in row] for row in frame.values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _aligned(frame: pd.DataFrame) -> str:
    rows = [list(map(str, frame.columns)), *([_cell(v) for v in row] for row in frame.values)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{v:<{w}}" for v, w in zip(row, wide, strict=True)).rstrip() for row in rows
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "none" if math.isnan(value) else f"{value:.3g}"
    return str(value)
