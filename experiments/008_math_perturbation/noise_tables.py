"""What experiment 008 makes of its measurements: tables from tables, no model.

Two questions are kept apart. Would other items show the difference, with these heads and this
noise? Intervals and tests over items answer it: each item's mean over draws, the same items in both
conditions. Is this set of heads unlike other sets? That is a question about draws: a core's mean
against the spread of random sets.
"""

import numpy as np
import pandas as pd
from noise_plan import ARMS, MATCHED
from scipy import stats as scipy_stats

from lens_utils import stats

ALL = "all tasks"
MEASURES = {"right": "accuracy", "logp": "log-probability"}
PAIRS = (
    ("synergistic", "random"),
    ("redundant", "random"),
    ("synergistic", "redundant"),
    *MATCHED.items(),
)


def pick_sigma(cfg, pilot: pd.DataFrame) -> dict[str, float | str]:
    """The sigma of the findings: the setting, or where random noise leaves nearest half."""
    tasks = pilot[pilot.family != "text"]
    accuracy = tasks.groupby(["arm", "sigma"]).right.mean()
    kept = accuracy["random"] / accuracy["baseline"].iloc[0]
    if cfg.sigma:
        return {"sigma": cfg.sigma, "why": "the setting --sigma"}
    best = (kept - 0.5).abs().idxmin()
    return {"sigma": float(best), "why": "random noise leaves nearest half of the accuracy",
            **{f"accuracy kept at {s:g}": float(k) for s, k in kept.items()}}  # fmt: skip


def there(measured: pd.DataFrame) -> list[str]:
    """The measures that a table has: of worked solutions there is no log-probability."""
    return [column for column in MEASURES if column in measured]


def with_all(measured: pd.DataFrame) -> pd.DataFrame:
    """The measurements, and those of all tasks together once more as a family of their own."""
    tasks = measured[measured.family != "text"]
    return pd.concat([measured, tasks.assign(family=ALL)], ignore_index=True)


def by_draw(measured: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and mean log-probability of every condition, one row per family."""
    keys = ["arm", "sigma", "draw", "family"]
    means = with_all(measured).groupby(keys, sort=False)[there(measured)].mean()
    return means.rename(columns=MEASURES).reset_index()


def by_item(measured: pd.DataFrame) -> pd.DataFrame:
    """Every item's means over draws: [item, measure], by arm, sigma and family."""
    keys = ["arm", "sigma", "family", "item"]
    return with_all(measured).groupby(keys, sort=False)[there(measured)].mean().reset_index()


def by_arm(measured: pd.DataFrame) -> pd.DataFrame:
    """Means with 95 % intervals over items, and the spread over draws."""
    draws = by_draw(measured).set_index(["arm", "sigma", "family"]).sort_index()
    rows = []
    for (arm, sigma, family), some in by_item(measured).groupby(
        ["arm", "sigma", "family"], sort=False
    ):
        for column in there(measured):
            measure = MEASURES[column]
            over = draws.loc[[(arm, sigma, family)], measure]
            found = stats.mean_ci(some[column].to_numpy())
            rows.append({"arm": arm, "sigma": sigma, "family": family, "measure": measure,
                         **found, "draws": len(over),
                         "sd_draws": float(over.std()) if len(over) > 1 else 0.0})  # fmt: skip
    return pd.DataFrame(rows)


def contrasts(measured: pd.DataFrame) -> pd.DataFrame:
    """One arm minus another: paired over items, and a core against the spread of random draws."""
    items = by_item(measured).set_index(["arm", "sigma", "family"]).sort_index()
    draws = by_draw(measured).set_index(["arm", "sigma", "family"]).sort_index()
    rows = []
    for sigma in sorted(measured.sigma[measured.sigma > 0].unique()):
        for family in [*measured.family.unique(), ALL]:
            for one, other in PAIRS:
                both = [items.loc[[(a, sigma, family)]].set_index("item") for a in (one, other)]
                for column in there(measured):
                    measure = MEASURES[column]
                    differ = both[0][column] - both[1][column]
                    if differ.isna().all():  # there is no accuracy on text
                        continue
                    spread = [draws.loc[[(a, sigma, family)], measure] for a in (one, other)]
                    rows.append({"sigma": sigma, "family": family, "one": one, "other": other,
                                 "measure": measure,
                                 **stats.mean_ci(differ.to_numpy()),
                                 "p_items": stats.sign_flip_p(differ.to_numpy()),
                                 **against_draws(*spread)})  # fmt: skip
    return pd.DataFrame(rows)


def against_draws(one: pd.Series, other: pd.Series) -> dict[str, float]:
    """Is the mean of `one` a likely value for one more draw of `other`?

    A t test of one new observation against n draws. It is cautious: the draws differ in noise and
    heads, while the mean of `one` has most of the noise averaged out.
    """
    n, gap = len(other), float(one.mean() - other.mean())
    t = gap / (float(other.std()) * np.sqrt(1 + 1 / n)) if other.std() > 0 else np.nan
    return {"p_draws": float(2 * scipy_stats.t.sf(abs(t), n - 1)), "draws": n,
            "share_below": float((other.to_numpy() < one.mean()).mean())}  # fmt: skip


def summarise(
    sigma: float,
    about: dict,
    scores: pd.Series,
    heads: pd.DataFrame,
    arms: pd.DataFrame,
    versus: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings, at the sigma they rest on."""
    size = len(heads[heads.arm == "synergistic"])
    out: dict[str, object] = {
        "heads with noise": f"{size} of {len(scores)}",
        "heads without a score, in neither core": int(scores.isna().sum()),
        "sigma, in standard deviations of the parameter": sigma,
        "items, the same in every condition": about["items"],
    }
    arms, versus = (
        arms.set_index(["arm", "sigma", "family", "measure"]),
        versus[versus.sigma == sigma],
    )
    for family in arms.index.unique("family").drop("text"):
        out[f"accuracy without noise, {family}"] = estimate(
            arms.loc[("baseline", 0, family, "accuracy")]
        )
    for measure in MEASURES.values():
        for arm in ("baseline", *ARMS):
            row = arms.loc[(arm, sigma if arm in ARMS else 0, ALL, measure)]
            out[f"{measure}, {ALL}, {arm}"] = estimate(row)
    row = arms.loc[("random", sigma, ALL, "accuracy")]
    out["standard deviation of the accuracy over random draws"] = row.sd_draws
    for arm in ("baseline", *ARMS):
        row = arms.loc[(arm, sigma if arm in ARMS else 0, "text", "log-probability")]
        out[f"loss on text (nats per token), {arm}"] = stats.Estimate(
            value=-row.value, low=-row.high, high=-row.low, n=int(row.n)
        )
    for row in versus[versus.family == ALL].itertuples():
        label = f"{row.measure}, {row.one} minus {row.other}"
        out[label] = estimate(row)
        out[f"p over items: {label}"] = row.p_items
        if row.other != "redundant":
            out[f"p against {row.draws} draws of heads: {label}"] = row.p_draws
    for one, other in (("synergistic", "random"), ("redundant", "random")):
        chosen = versus[(versus.one == one) & (versus.other == other)]
        for row in chosen[
            (chosen.measure == "log-probability") & (chosen.family != ALL)
        ].itertuples():
            out[f"log-probability, {one} minus {other}, {row.family}"] = estimate(row)
    for core, matched in MATCHED.items():
        shared = heads[heads.arm == matched][f"in_{core}"].mean()
        out[f"share of the {core} core in {matched}"] = float(shared)
    for s in arms.index.unique("sigma").drop(0):
        kept = arms.loc[("random", s, ALL, "accuracy")].value
        out[f"accuracy, {ALL}, random, at sigma {s:g}"] = kept
        for core in ("synergistic", "redundant"):
            out[f"accuracy, {ALL}, {core}, at sigma {s:g}"] = arms.loc[
                (core, s, ALL, "accuracy")
            ].value
    again = arms.loc[("baseline", 0, ALL, "log-probability")]
    out["spread of the log-probability over the first and the last pass, both without noise"] = (
        again.sd_draws
    )
    return out


def of_benchmark(arms: pd.DataFrame, versus: pd.DataFrame) -> dict[str, object]:
    """The same for worked solutions: accuracy, and who differs from whom."""
    out: dict[str, object] = {}
    for row in arms[arms.family == ALL].itertuples():
        out[f"accuracy on the benchmark, {row.arm}"] = estimate(row)
    for row in versus[versus.family == ALL].itertuples():
        out[f"accuracy on the benchmark, {row.one} minus {row.other}"] = estimate(row)
        out[f"p over problems: {row.one} minus {row.other}"] = row.p_items
    return out


def estimate(row: "pd.Series | object") -> stats.Estimate:
    """A row with an interval, as the findings show it."""
    return stats.Estimate(value=row.value, low=row.low, high=row.high, n=int(row.n))
