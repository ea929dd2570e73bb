"""What experiment 008 makes of its measurements: tables from tables, no model.

Three questions are kept apart. Would other items show the difference, with these heads and this
noise? Intervals and `p_items` answer it: each item's mean over draws, the same items in both
conditions. Would other draws, of noise and of random heads, show it on these items? `p_draws`, from
means of draws. And is a core beyond what one random set differs from the next? `p_one_more`.
"""

import numpy as np
import pandas as pd
from noise_plan import ARMS, CORES, MATCHED, SWEPT
from scipy import stats as scipy_stats

from lens_utils import stats
from lens_utils.errors import BadInput

ALL = "all tasks"
MEASURES = {"right": "accuracy", "logp": "log-probability"}
PAIRS = (
    ("synergistic", "random"),
    ("redundant", "random"),
    ("synergistic", "redundant"),
    *MATCHED.items(),
)


def pick_sigma(cfg, pilot: pd.DataFrame) -> dict[str, float | str]:
    """The sigma of the findings: the setting, or where random noise leaves nearest half.

    Raises BadInput for a model without a right answer and no setting.
    """
    if cfg.sigma:
        return {"sigma": cfg.sigma, "why": "the setting --sigma"}
    accuracy = pilot[pilot.family != "text"].groupby(["arm", "sigma"]).right.mean()
    base = accuracy["baseline"].iloc[0]
    if base == 0:
        raise BadInput("without noise the model answers nothing right, so no noise leaves half of "
                       "it: choose one with --sigma, and go by the log-probability")  # fmt: skip
    kept = accuracy["random"] / base
    return {"sigma": float((kept - 0.5).abs().idxmin()),
            "why": "random noise leaves nearest half of the accuracy",
            **{f"accuracy kept at {s:g}": float(k) for s, k in kept.items()}}  # fmt: skip


def with_all(measured: pd.DataFrame) -> pd.DataFrame:
    """The measurements, and those of all tasks together once more as a family of their own."""
    tasks = measured[measured.family != "text"]
    return pd.concat([measured, tasks.assign(family=ALL)], ignore_index=True)


def by_draw(measured: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and mean log-probability of every condition, one row per family."""
    keys = ["arm", "sigma", "draw", "family"]
    means = with_all(measured).groupby(keys, sort=False)[[*MEASURES]].mean()
    return means.rename(columns=MEASURES).reset_index()


def by_item(measured: pd.DataFrame) -> pd.DataFrame:
    """Every item's means over draws: [item, measure], by arm, sigma and family."""
    keys = ["arm", "sigma", "family", "item"]
    return with_all(measured).groupby(keys, sort=False)[[*MEASURES]].mean().reset_index()


def by_arm(measured: pd.DataFrame) -> pd.DataFrame:
    """Means with 95 % intervals over items, and the spread over draws."""
    draws = by_draw(measured).set_index(["arm", "sigma", "family"]).sort_index()
    rows = []
    for (arm, sigma, family), some in by_item(measured).groupby(
        ["arm", "sigma", "family"], sort=False
    ):
        for column, measure in MEASURES.items():
            over = draws.loc[[(arm, sigma, family)], measure]
            found = stats.mean_ci(some[column].to_numpy())
            rows.append({"arm": arm, "sigma": sigma, "family": family, "measure": measure,
                         **found, "draws": len(over),
                         "sd_draws": float(over.std()) if len(over) > 1 else 0.0})  # fmt: skip
    return pd.DataFrame(rows)


def contrasts(measured: pd.DataFrame) -> pd.DataFrame:
    """One arm minus another: paired over items, and over draws."""
    keys = ["sigma", "family", "arm"]
    items = by_item(measured).set_index([*keys, "item"]).sort_index()
    draws = by_draw(measured).set_index(keys).sort_index()
    rows = []
    for (sigma, family), some in draws[draws.index.get_level_values("sigma") > 0].groupby(
        ["sigma", "family"], sort=False
    ):
        there = set(some.index.get_level_values("arm"))
        for one, other in (pair for pair in PAIRS if there.issuperset(pair)):
            for column, measure in MEASURES.items():
                differ = (
                    items.loc[(sigma, family, one), column]
                    - items.loc[(sigma, family, other), column]
                ).to_numpy()
                if np.isnan(differ).all():  # there is no accuracy on text
                    continue
                spread = [draws.loc[[(sigma, family, a)], measure] for a in (one, other)]
                rows.append({"sigma": sigma, "family": family, "one": one, "other": other,
                             "measure": measure, **stats.mean_ci(differ),
                             "p_items": stats.sign_flip_p(differ) if len(differ) > 1 else np.nan,
                             **against_draws(*spread)})  # fmt: skip
    return pd.DataFrame(rows)


def against_draws(one: pd.Series, other: pd.Series) -> dict[str, float]:
    """Are the means of two lots of draws alike (Welch's t test), and is the mean of `one` a likely
    value for one more draw of `other` (a t test of one new observation)?

    The second is cautious: single draws differ in noise and heads, while the mean of `one` has
    most of the noise averaged out. NaN for a single draw, and for draws that do not differ.
    """
    n, gap = len(other), float(one.mean() - other.mean())
    varies = len(one) > 1 and n > 1 and other.std() > 1e-9
    both = (one.mean(), one.std(), len(one), other.mean(), other.std(), n)
    welch = scipy_stats.ttest_ind_from_stats(*both, equal_var=False).pvalue if varies else np.nan
    t = gap / (float(other.std()) * np.sqrt(1 + 1 / n)) if varies else np.nan
    return {"p_draws": float(welch), "p_one_more": float(2 * scipy_stats.t.sf(abs(t), n - 1)),
            "draws": n, "share_below": float((other.to_numpy() < one.mean()).mean())}  # fmt: skip


def summarise(
    sigma: float,
    scores: pd.Series,
    heads: pd.DataFrame,
    arms: pd.DataFrame,
    versus: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings, at the sigma they rest on."""
    by = arms.set_index(["family", "measure", "arm", "sigma"]).sort_index()
    out: dict[str, object] = {
        "heads with noise": f"{(heads.arm == 'synergistic').sum()} of {len(scores)}",
        "sigma, in standard deviations of the weights": sigma,
    }
    for family in arms.family.unique():
        if family != "text":
            out[f"accuracy without noise, {family}"] = estimate(
                by.loc[(family, "accuracy", "baseline", 0)]
            )
    for arm in ARMS:
        out[f"accuracy, {ALL}, noise in {arm} heads"] = estimate(
            by.loc[(ALL, "accuracy", arm, sigma)]
        )
    out["standard deviation of it over random draws"] = by.loc[
        (ALL, "accuracy", "random", sigma)
    ].sd_draws
    found = versus[(versus.sigma == sigma) & (versus.family == ALL) & (versus.other != CORES[1])]
    for row in found[found.measure == "log-probability"].itertuples():
        label = f"log-probability (nats), {row.one} minus {row.other}"
        out[label] = estimate(row)
        out[f"p over draws: {label}"] = row.p_draws
    for arm in ("baseline", *SWEPT):
        row = by.loc[("text", "log-probability", arm, 0 if arm == "baseline" else sigma)]
        out[f"loss on text (nats per token), {arm}"] = stats.Estimate(
            value=-row.value, low=-row.high, high=-row.low, n=int(row.n)
        )
    again = by.loc[(ALL, "log-probability", "baseline", 0)].sd_draws
    out["log-probability without noise, first and last pass, standard deviation"] = again
    return out


def of_benchmark(arms: pd.DataFrame, versus: pd.DataFrame) -> dict[str, object]:
    """The same for worked solutions: accuracy, and who differs from whom."""
    out: dict[str, object] = {}
    for row in arms[(arms.family == ALL) & (arms.measure == "accuracy")].itertuples():
        out[f"accuracy on the benchmark, {row.arm}"] = estimate(row)
    for row in versus[(versus.family == ALL) & (versus.one == CORES[0])].itertuples():
        out[f"{row.measure} on the benchmark, {row.one} minus {row.other}"] = estimate(row)
        out[f"p over problems: {row.measure}, {row.one} minus {row.other}"] = row.p_items
    return out


def estimate(row: "pd.Series | object") -> stats.Estimate:
    """A row with an interval, as the findings show it."""
    return stats.Estimate(value=row.value, low=row.low, high=row.high, n=int(row.n))
