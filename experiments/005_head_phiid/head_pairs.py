"""From series to information in experiment 005: pairs of heads, their nulls, a head by itself.

Everything is computed prompt by prompt, so that intervals over prompts are possible, and averaged
afterwards. Units are nats.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.signal import detrend
from torch import Tensor

from lens_utils import phiid, profiles
from lens_utils.errors import BadInput
from lens_utils.phiid_lattice import ATOMS


def measures(condition: str, quick: bool) -> tuple[str, ...]:
    """What is computed of a condition; ccs is by far the slowest."""
    if condition == "own":
        return ("mmi", "ccs", "surrogate")
    return ("mmi",) if quick and condition != "replayed" else ("mmi", "ccs")


def asked(atoms: str) -> list[str]:
    """sts, rtr and the atoms of a setting. Raises BadInput for one that does not exist."""
    more = ATOMS if atoms == "all" else [name.strip() for name in atoms.split(",") if name.strip()]
    if odd := [name for name in more if name not in ATOMS]:
        raise BadInput(f"--atoms: there is no atom {odd[0]!r}; there are {' '.join(ATOMS)}, or all")
    return list(dict.fromkeys(["sts", "rtr", *more]))


def pairs(
    norms: Tensor, families: Sequence[str], tau: int, measure: str, track: Callable,
    atoms: Sequence[str] = ("sts", "rtr"),
) -> dict[str, Tensor]:  # fmt: skip
    """Atoms of all pairs, by minimum mutual information (mmi), ccs, or the null.

    sts, rtr [head, head] over all prompts; sts_by_family, rtr_by_family [family, head, head];
    sts_heads, rtr_heads [prompt, head]: each head's mean over its pairs in one prompt.
    surrogate: mmi of heads of two different prompts, the average over `partners`. close and lost
    count pairs x prompts (`phiid.Decomposition`); least is its smallest share of variance
    that decides a pair.
    """
    names = list(dict.fromkeys(families))
    shape = (len(names), norms.shape[1], norms.shape[1])
    total = {atom: np.zeros(shape) for atom in atoms}
    count = np.zeros(shape)
    heads: dict[str, list[np.ndarray]] = {atom: [] for atom in total}
    lost, close, least = 0, 0, np.inf
    for p, family in enumerate(track(families, f"prompts, {measure}")):
        if measure == "surrogate":
            two = [torch.stack([norms[p], norms[other]]) for other in partners(p, len(norms))]
            found = [phiid.surrogate(both, (1,), tau=tau, asked=atoms) for both in two]
        else:
            found = [phiid.decompose(norms[[p]], tau=tau, redundancy=measure, asked=atoms)]
        lost += sum(one.lost for one in found)
        close += sum(one.close for one in found)
        least = min(least, *(one.least for one in found))
        for atom in total:
            matrix = _mean([one[atom] for one in found])
            heads[atom].append(_mean(matrix))
            total[atom][names.index(family)] += np.nan_to_num(matrix)
        count[names.index(family)] += ~np.isnan(matrix)
    out = {"lost": torch.tensor(lost), "close": torch.tensor(close), "least": torch.tensor(least)}
    with np.errstate(invalid="ignore"):
        for atom in total:
            out[atom] = torch.tensor(total[atom].sum(0) / count.sum(0), dtype=torch.float32)
            out[f"{atom}_by_family"] = torch.tensor(total[atom] / count, dtype=torch.float32)
            out[f"{atom}_heads"] = torch.tensor(np.stack(heads[atom]))
    return out


def partners(p: int, n: int) -> list[int]:
    """Two other prompts, mostly of other categories, that prompt p is paired with."""
    shifts = {n // 6 + 1, n // 2 - 1} - {0, n}
    return [(p + shift) % n for shift in sorted(shifts)]


def _mean(values: list[np.ndarray] | np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where there is nothing else."""
    stacked = np.asarray(values)
    there = (~np.isnan(stacked)).sum(0)
    total = np.nansum(stacked, 0)
    return np.divide(total, there, out=np.full(total.shape, np.nan), where=there > 0)


def memory(norms: np.ndarray, tau: int) -> dict[str, np.ndarray]:
    """Of every series [prompt, head]: its correlation with itself tau steps later, and what its
    past tells of its own future (nats, Gaussian). NaN for a series that does not vary."""
    past, future = norms[..., :-tau], norms[..., tau:]
    a = past - past.mean(-1, keepdims=True)
    b = future - future.mean(-1, keepdims=True)
    level = np.abs(norms).max(-1)
    flat = np.minimum(past.std(-1), future.std(-1)) <= phiid.FLAT * level
    with np.errstate(invalid="ignore", divide="ignore"):
        lag = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
        own = -0.5 * np.log1p(-(lag**2))
    return {"lag": np.where(flat, np.nan, lag), "own": np.where(flat, np.nan, own), "flat": flat}


def describe(
    series: dict[str, Tensor], found: dict[tuple[str, str], dict[str, Tensor]], tau: int
) -> pd.DataFrame:
    """One row per condition and measure: its atoms, and how far heads alone explain them."""
    rows = []
    for (condition, measure), pairs_of in found.items():
        kept = memory(series[condition].numpy(), tau)
        upper = np.triu_indices(kept["own"].shape[1], 1)
        sts, rtr = (pairs_of[atom].double().numpy()[upper] for atom in ("sts", "rtr"))
        head_sts, head_rtr = (_mean(pairs_of[f"{a}_heads"].numpy()) for a in ("sts", "rtr"))
        own = _mean(kept["own"])
        twice = _mean([2 * np.minimum(one[:, None], one[None]) for one in kept["own"]])[upper]
        null = found["own", "surrogate"]["sts"].double().numpy()[upper]
        rows.append(
            {
                "condition": condition,
                "measure": measure,
                "sts": np.nanmean(sts),
                "rtr": np.nanmean(rtr),
                "lag_correlation": np.nanmedian(kept["lag"]),
                "memory": np.nanmean(own),
                "twice_smaller_memory": np.nanmean(twice),
                "r_pairs_sts_rtr": correlation(sts, rtr),
                "r_pairs_sts_memory": correlation(sts, twice),
                "r_pairs_sts_surrogate": correlation(sts, null),
                "r_heads_sts_rtr": correlation(head_sts, head_rtr),
                "r_heads_sts_memory": correlation(head_sts, own),
                "r_heads_rtr_memory": correlation(head_rtr, own),
                "flat_series": int(kept["flat"].sum()),
                "series": kept["flat"].size,
                "close_pairs": int(pairs_of["close"]),
                "lost_pairs": int(pairs_of["lost"]),
                "least_own_variance": float(pairs_of["least"]),
            }
        )
    return pd.DataFrame(rows)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's, where both have a value; NaN where one does not vary."""
    there = ~np.isnan(one) & ~np.isnan(other)
    if there.sum() < 3 or np.ptp(one[there]) == 0 or np.ptp(other[there]) == 0:
        return float("nan")
    return float(np.corrcoef(one[there], other[there])[0, 1])


def treatments(
    norms: Tensor, layer: np.ndarray, tau: int, quick: bool, track: Callable
) -> pd.DataFrame:
    """The same (mmi) from series that were treated first: does the profile depend on it?"""
    plain = f"as measured, tau {tau}"
    lags = [lag for lag in sorted({tau, 2, 5}) if norms.shape[-1] >= 4 * lag + 5]
    series: dict[str, tuple[Tensor, dict]] = {
        plain: (norms, {"tau": tau}),
        **{f"as measured, tau {lag}": (norms, {"tau": lag}) for lag in lags},
        "logarithm": (norms.clamp_min(1e-12).log(), {"tau": tau}),
        "linear trend removed": (torch.tensor(detrend(norms.numpy(), axis=-1)), {"tau": tau}),
        "first difference": (norms.diff(dim=-1), {"tau": tau}),
        "pooled over prompts": (norms, {"tau": tau, "pooling": "pooled"}),
        "put end to end": (norms, {"tau": tau, "pooling": "concat"}),
        "high or low": (norms, {"tau": tau, "kind": "discrete"}),
    }
    if quick:
        del series["high or low"]  # the slowest
    rows, differences = [], []
    for name, (values, options) in track(list(series.items()), "treatments"):
        found = phiid.decompose(values, **options)
        sts, rtr = _mean(found["sts"]), _mean(found["rtr"])
        differences.append(sts - rtr)
        row = {"treatment": name, "unit": found.unit, "sts": np.nanmean(sts),
               "rtr": np.nanmean(rtr), "r_heads_sts_rtr": correlation(sts, rtr),
               "r_heads_with_plain": correlation(differences[-1], differences[0])}  # fmt: skip
        for score in ("value_diff", "rank_diff"):
            shares = profiles.head_shares(profiles.head_scores(sts, rtr, score))
            profile = profiles.layer_profile(shares, layer)
            third = zip(("early", "middle", "late"), profiles.thirds(profile), strict=True)
            row |= {f"{score}_{key}": value for key, value in third}
            row[f"{score}_hump"] = profiles.hump(profile)
        rows.append(row)
    return pd.DataFrame(rows)


def at_checkpoint(norms: dict[str, Tensor], families: Sequence[str], tau: int) -> dict[str, Tensor]:
    """sts_<text>, rtr_<text> [1, prompt, head] of one training checkpoint (mmi)."""
    out = {}
    for how, series in norms.items():
        found = pairs(series, families, tau, "mmi", lambda items, what: items)
        out |= {f"{atom}_{how}": found[f"{atom}_heads"][None] for atom in ("sts", "rtr")}
    return out


def floor(norms: Tensor, tau: int, seed: int) -> dict[str, float]:
    """What white noise of the same length shows, in nats: the bias of a short series."""
    prompts, heads, steps = norms.shape
    return phiid.bias_floor(prompts, steps, min(heads, 64), seed, tau=tau)
