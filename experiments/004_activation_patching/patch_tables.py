"""What experiment 004 makes of its sweeps: tables from tables, no model."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy import stats as scipy_stats

from lens_utils import stats

TOP = 8  # strongest heads of a wording
CITY, GOVERNMENT = ("capital", "city"), ("capital", "government")
MEASURES = ("attention", "attribution", "patching", "ablation")
# Two ways to the same end: do they agree?
VARIANTS = (("patching", "noising"), ("ablation", "zero"), ("ablation", "resample"))
RESAMPLES = 1000


def averaged(frame: pd.DataFrame, within: Sequence[str], places: Sequence[str]) -> pd.DataFrame:
    """Mean effect with its 95 % bootstrap band over groups of pairs, one row per place."""
    frames = []
    for key, one in frame.groupby(list(within), sort=False):
        table = one.pivot_table(index="group", columns=list(places), values="effect")
        mean, low, high = stats.bands(table.to_numpy(float))
        names = table.columns.to_frame(index=False)
        values = {"mean": mean, "low": low, "high": high, "n": len(table)}
        frames.append(
            names.assign(**dict(zip(within, key, strict=True)), **values)[
                [*within, *places, *values]
            ]
        )
    return pd.concat(frames, ignore_index=True)


def by_position(residual: pd.DataFrame, tokens: pd.DataFrame) -> pd.DataFrame:
    """Effects by layer and position, beside the position's class and token."""
    within = ["task", "template", "component", "kind"]
    table = averaged(
        residual.drop(columns="kind_of_token", errors="ignore"), within, ["layer", "pos"]
    )
    named = tokens.rename(columns={"kind": "class"})[["task", "template", "pos", "class", "token"]]
    return table.merge(named, on=["task", "template", "pos"], how="left")


def by_head(heads: pd.DataFrame) -> pd.DataFrame:
    """Effects by head: shares of clean - corrupt for denoise and noise, nats for ablations."""
    return averaged(heads, ["task", "template", "kind"], ["layer", "head"])


def top_heads(heads: pd.DataFrame) -> pd.DataFrame:
    """The heads of each wording that restore most (denoising), strongest first."""
    table = by_head(heads[heads.kind == "denoise"])
    frames = []
    for _, one in table.groupby(["task", "template"], sort=False):
        best = one[one["mean"] > 0].nlargest(TOP, "mean")
        frames.append(best.assign(rank=range(1, len(best) + 1)))
    return pd.concat(frames, ignore_index=True)


def confirmed(inputs: pd.DataFrame) -> pd.DataFrame:
    """The strongest heads, and each of their inputs, on pairs that had no part in the choice."""
    return averaged(inputs, ["task", "template"], ["layer", "head", "part"])


def set_effects(sets: pd.DataFrame) -> pd.DataFrame:
    """The strongest heads together and the mean of random sets, on those pairs."""
    kinds = sets.assign(set=sets.set.str.split().str[0])
    return averaged(kinds, ["task", "template", "kind"], ["heads", "set"])


def cut_effects(knockout: pd.DataFrame) -> pd.DataFrame:
    """What a knock-out takes away, as a share of the clean logit difference."""
    lost = knockout.assign(effect=knockout.effect / knockout.clean)
    return averaged(lost, ["task", "template", "edge", "window"], ["first", "last"])


def untrained(twin: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """Largest mean change of the logit difference by one head, in nats, and the gap there was."""
    rows = []
    trained = heads[
        (heads.task == "capital") & (heads.template == "city") & (heads.kind == "denoise")
    ]
    for name, frame in (("trained", trained), ("untrained", twin)):
        moved = (frame.logit_diff - frame.corrupt).groupby([frame.layer, frame["head"]]).mean()
        gap = (frame.clean - frame.corrupt).groupby(frame.id).first()
        rows.append({"model": name, "largest_nats": moved.abs().max(), "gap_nats": gap.abs().mean(),
                     "n": len(gap)})  # fmt: skip
    return pd.DataFrame(rows)


# Where the answer moves to the last position


def crossings(residual: pd.DataFrame, tokens: pd.DataFrame) -> pd.DataFrame:
    """Per pair: until which block the entity's position restores half of the logit difference, and
    from which block on the last position does (resid_pre, denoising); NaN where it never does."""
    some = residual[(residual.component == "resid_pre") & (residual.kind == "denoise")]
    rows = []
    for (task, template, pair), one in some.groupby(["task", "template", "id"], sort=False):
        kinds = tokens[(tokens.task == task) & (tokens.template == template)].set_index("pos").kind
        wide = one.pivot(index="layer", columns="pos", values="effect") >= 0.5
        entity = [pos for pos in wide if kinds[pos] == "entity"]
        holds = wide.index[wide[entity].any(axis=1)] if entity else []
        arrived = wide.index[wide[max(kinds.index)][::-1].cummin()[::-1]]
        rows.append({"task": task, "template": template, "id": pair, "group": one.group.iloc[0],
                     "entity_until": max(holds, default=np.nan),
                     "last_from": min(arrived, default=np.nan)})  # fmt: skip
    return pd.DataFrame(rows)


# The joint table


def joint(heads: pd.DataFrame, attended: pd.DataFrame, attributed: pd.DataFrame) -> pd.DataFrame:
    """What 002, 003 and this experiment say of every head that was swept, on capital prompts.

    attention: of the last token to the entity (share); attribution: to the logit difference (nats);
    patching: share restored by its clean output; ablation: nats lost with its mean output.
    """
    ours = by_head(heads[heads.task == "capital"])
    frames = []
    for wording in (CITY, GOVERNMENT):
        task, template = wording
        here = [f[(f.task == task) & (f.template == template)].set_index(["layer", "head"])
                for f in (attended, attributed)]  # fmt: skip
        table = pd.DataFrame({
            "attention": here[0].entity, "attention_normed": here[0].entity_normed,
            "attribution": here[1].dla, "attribution_entity": here[1].dla_entity,
        })  # fmt: skip
        mine = ours[ours.template == template]
        for name, kind in (("patching", "denoise"), ("noising", "noise"), ("ablation", "mean"),
                           ("zero", "zero"), ("resample", "resample")):  # fmt: skip
            values = mine[mine.kind == kind].set_index(["layer", "head"])
            if len(values):
                table[name] = values["mean"]
        if "patching" in table:
            frames.append(table.reset_index().assign(template=template))
    both = pd.concat(frames, ignore_index=True)
    means = both.groupby(["layer", "head"], as_index=False).mean(numeric_only=True)
    return means.dropna(subset="patching", ignore_index=True)


def correlations(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Spearman's rank correlations of the four measures, over all heads and over the strongest.

    kind: measures, or variants of one of them.
    Strongest: the tenth of the heads with the largest absolute patching effect. 95 % bootstrap
    interval over heads; p: how often shuffled heads correlate as much. shared: heads among the ten
    strongest of both, `chance` how many there would be.
    """
    strong = table.loc[table.patching.abs().nlargest(max(10, len(table) // 10)).index]
    rows = []
    asked = [("measures", a, b) for a, b in itertools.combinations(MEASURES, 2)]
    asked += [("variants", a, b) for a, b in VARIANTS if b in table]
    for (name, one), (kind, a, b) in itertools.product(
        (("all heads", table), ("strongest heads", strong)), asked
    ):
        x, y = one[a].to_numpy(), one[b].to_numpy()
        rho = float(spearman(x[None], y[None])[0])
        rng = np.random.default_rng(seed)
        picks = rng.integers(len(x), size=(RESAMPLES, len(x)))
        drawn = spearman(x[picks], y[picks])
        null = spearman(x[None], rng.permuted(np.tile(y, (RESAMPLES, 1)), axis=1))
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        top = [set(one[m].nlargest(10).index) for m in (a, b)]
        rows.append({
            "heads": name, "kind": kind, "first": a, "second": b,
            "rho": rho, "low": low, "high": high,
            "p": (1 + (np.abs(null) >= abs(rho)).sum()) / (1 + RESAMPLES), "n": len(x),
            "shared": len(top[0] & top[1]), "chance": 100 / len(x),
        })  # fmt: skip
    return pd.DataFrame(rows)


def spearman(x: ndarray, y: ndarray) -> ndarray:
    """Rank correlation of every row; ties share their ranks."""
    ranks = [scipy_stats.rankdata(z, axis=1) for z in (x, y)]
    one, other = (r - r.mean(1, keepdims=True) for r in ranks)
    norm = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    return (one * other).sum(1) / norm
