"""What experiment 011 makes of its counts: tables from counts, no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from domain_samples import Contrast
from scipy.stats import spearmanr
from torch import Tensor

from lens_utils import dape
from lens_utils.dape import Tally

Q = 0.05
RATE = 0.05  # a specialist is active at one token in twenty of its domain, or more
RATES = (0.02, 0.1, 0.2)  # other minimum rates, for comparison
BINS = np.linspace(0.5, 1.0, 51)  # of DAPE as a share of ln N


@dataclass(frozen=True)
class Found:
    """Everything that is said about the neurons in one contrast; axes layer, neuron."""

    contrast: Contrast
    rate: Tensor
    """domain, layer, neuron."""
    entropies: Tensor
    """draw, layer, neuron: DAPE in nats."""
    q: Tensor
    special: Tensor
    """q < 0.05, DAPE at or below the floor, at or above the minimum rate in some domain."""
    lape: Tensor
    """LAPE's own selection: above its bar, the lowest so many percent."""
    main: Tensor
    """Number of the domain with the highest rate."""
    drawn: Tensor
    """draw, domain, layer: specialised neurons in every draw, by their main domain."""

    @property
    def share(self) -> Tensor:
        """DAPE as a share of its maximum, ln N."""
        return self.entropies[0] / np.log(len(self.contrast.domains))


def find(contrast: Contrast, tally: Tally, percent: float) -> Found:
    """The measures and tests of one contrast of two or more domains."""
    n_domains = len(contrast.domains)
    entropies, floor = dape.all_dapes(tally), dape.uneven(n_domains)
    shuffled = entropies[: 1 + contrast.n_shuffles]
    q = (
        dape.q_values(dape.p_values(shuffled))
        if contrast.n_shuffles
        else torch.ones_like(shuffled[0])
    )
    rate = dape.rates(tally.counts[0], tally.tokens[0])
    of_domain = torch.arange(n_domains)[:, None, None]
    drawn = []
    for n, (counts, tokens) in enumerate(zip(tally.counts, tally.tokens, strict=True)):
        now = dape.rates(counts, tokens)
        passes = (entropies[n] <= floor) & (now >= RATE).any(0)
        if n == 0 or 1 + contrast.n_shuffles <= n < 1 + contrast.n_shuffles + contrast.n_resamples:
            passes &= q < Q  # shuffled draws and halves have no test of their own
        drawn.append(((now.argmax(0) == of_domain) & passes).sum(-1))
    special = (q < Q) & (entropies[0] <= floor) & (rate >= RATE).any(0)
    return Found(contrast, rate, entropies, q, special, dape.lape(rate, percent),
                 rate.argmax(0), torch.stack(drawn))  # fmt: skip


def contrasts(found: Sequence[Found], chosen: pd.DataFrame) -> pd.DataFrame:
    """One row per contrast: how many neurons are specialised, how many by chance, how reliably.

    by_chance: neurons that pass minimum rate and floor under shuffled labels, mean over shuffles.
    lape_bar: LAPE's minimum rate, that 95 % of all rates lie below; specialised_lape: with it
    instead of ours.
    """
    rows = []
    for f in found:
        c = f.contrast
        inside = chosen[c.label >= 0]
        one, other = (e.flatten().numpy() for e in f.entropies[-2:])
        floor = dape.uneven(len(c.domains))
        low = [(e <= floor) & f.special for e in f.entropies[-2:]]
        either = (low[0] | low[1]).sum()
        chance = f.drawn[1 : 1 + c.n_shuffles].sum((1, 2)).double()
        bar, highest = dape.bar(f.rate), f.rate.amax(0)
        uneven = (f.q < Q) & (f.entropies[0] <= floor)
        rows.append({
            "contrast": c.name, "tokens": c.region, "domains": len(c.domains),
            "max_dape": np.log(len(c.domains)), "samples": len(inside),
            "mazes": inside.maze_id.nunique(), "shuffles": c.n_shuffles,
            "neurons": f.q.numel(), "above_rate": int((highest >= RATE).sum()),
            "lape_bar": bar, "specialised_lape": int((uneven & (highest > bar)).sum()),
            **{f"specialised_{rate}": int((uneven & (highest >= rate)).sum()) for rate in RATES},
            "median_share": float(f.share.median()), "lowest_share": float(f.share.min()),
            "significant": int((f.q < Q).sum()), "specialised": int(f.special.sum()),
            "specialised_percent": 100 * float(f.special.double().mean()),
            "by_chance": float(chance.mean()) if c.n_shuffles else np.nan,
            "most_by_chance": float(chance.max()) if c.n_shuffles else np.nan,
            "lape": int(f.lape.sum()), "lape_significant": int((f.lape & (f.q < Q)).sum()),
            "rho_halves": _rho(one, other),
            "kept_in_both_halves": float((low[0] & low[1]).sum() / either) if either else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


def neurons(found: Sequence[Found], recall: Tensor) -> pd.DataFrame:
    """The specialised neurons of every contrast, lowest DAPE first; recall: rates there."""
    frames = []
    for f in found:
        at = f.special.nonzero()
        index = tuple(at.T)
        rates = pd.DataFrame(
            f.rate[(slice(None), *index)].T.numpy(), columns=list(f.contrast.domains)
        )
        above = _more_than_even(f)[(slice(None), *index)].T.numpy()
        frame = pd.DataFrame({
            "contrast": f.contrast.name, "layer": at[:, 0].numpy(), "neuron": at[:, 1].numpy(),
            "dape": f.entropies[0][index].numpy(), "share_of_max": f.share[index].numpy(),
            "q": f.q[index].numpy(),
            "main": [f.contrast.domains[n] for n in f.main[index].tolist()],
            "domains": ["; ".join(np.array(f.contrast.domains)[row]) for row in above],
            "rate": rates.max(1), "next_rate": np.sort(rates.to_numpy(), 1)[:, -2],
            "recall_rate": recall[index].numpy(),
        })  # fmt: skip
        frames.append(frame.sort_values("dape", kind="stable"))
    return pd.concat(frames, ignore_index=True)


def layers(found: Sequence[Found]) -> pd.DataFrame:
    """Specialised neurons of every domain in every layer, as a share of the layer (percent).

    Intervals, where mazes were resampled: 95 % of the resamples, the value always inside.
    """
    rows = []
    for f in found:
        width = f.q.shape[1]
        first = 1 + f.contrast.n_shuffles
        again = f.drawn[first : first + f.contrast.n_resamples]
        for d, name in enumerate(f.contrast.domains):
            for layer in range(len(f.q)):
                value = int(f.drawn[0, d, layer])
                low, high = (
                    np.percentile(again[:, d, layer], [2.5, 97.5]) if len(again) else (np.nan,) * 2
                )
                rows.append({
                    "contrast": f.contrast.name, "domain": name, "layer": layer, "count": value,
                    "percent": 100 * value / width,
                    "low": 100 * min(low, value) / width, "high": 100 * max(high, value) / width,
                })  # fmt: skip
    return pd.DataFrame(rows)


def distribution(found: Sequence[Found]) -> pd.DataFrame:
    """Histograms of DAPE as a share of ln N, of neurons above the minimum rate, by main domain; and
    of the same neurons with labels shuffled once."""
    rows = []
    for f in found:
        expressed = (f.rate >= RATE).any(0)
        top = np.log(len(f.contrast.domains))
        versions = [
            (name, f.entropies[0], f.main == d) for d, name in enumerate(f.contrast.domains)
        ]
        if f.contrast.n_shuffles:
            versions.append(("shuffled labels", f.entropies[1], torch.ones_like(expressed)))
        for name, entropy, which in versions:
            values = (entropy / top)[expressed & which].clamp(BINS[0], 1).numpy()
            number, _ = np.histogram(values, BINS)
            rows.append(pd.DataFrame({
                "contrast": f.contrast.name, "domain": name, "low": BINS[:-1], "high": BINS[1:],
                "neurons": number, "all": len(values),
            }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def memberships(found: Sequence[Found]) -> pd.DataFrame:
    """Which combinations of sets the specialised neurons are in: one row per combination.

    A neuron is in the set of every domain that has more than an even share of its activity.
    """
    sets = {}
    for f in found:
        for d, name in enumerate(f.contrast.domains):
            mode = f.contrast.name.removeprefix("abilities").strip(", ")
            sets[f"{name}, {mode}" if mode else name] = f.special & _more_than_even(f)[d]
    table = pd.DataFrame({name: inside.flatten().numpy() for name, inside in sets.items()})
    table = table[table.any(axis=1)]
    counted = table.value_counts().rename("neurons").reset_index()
    return (
        counted if len(counted) else pd.DataFrame({**dict.fromkeys(sets, [False]), "neurons": [0]})
    )


def _more_than_even(f: Found) -> Tensor:
    """Whether a domain has more than 1/N of a neuron's rates. [domain, layer, neuron]"""
    return f.rate > f.rate.mean(0)


def sensitivity(
    found: dict[str, Found], variants: dict[str, Tensor], percent: float
) -> pd.DataFrame:
    """How the other definitions of active agree with the primary one, on LAPE's selection.

    Attribution, which is measured on direct questions, is compared with the primary one there.
    by_chance: the overlap (Jaccard) of two random selections of these sizes.
    """
    rows = []
    for name, rate in variants.items():
        first = found["abilities"]
        if name == "attribution":
            first = found.get("abilities, direct", first)
        gate = first.entropies[0]
        other, chosen = dape.dape(rate), dape.lape(rate, percent)
        a, b, size = int(first.lape.sum()), int(chosen.sum()), chosen.numel()
        common = a * b / size
        per_layer = [x.sum(1).double().numpy() for x in (first.lape, chosen)]
        rows.append({
            "definition": name, "median_share": float((other / np.log(len(rate))).median()),
            "rho": _rho(gate.flatten().numpy(), other.flatten().numpy()),
            "selected": b, "in_both": int((first.lape & chosen).sum()),
            "overlap": float((first.lape & chosen).sum() / (first.lape | chosen).sum()),
            "by_chance": common / (a + b - common), "rho_layers": _rho(*per_layer),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _rho(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho; NaN where one of them is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)
