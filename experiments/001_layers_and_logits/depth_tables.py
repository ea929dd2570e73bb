"""What experiment 001 makes of its readouts: tables from tables, no model."""

import numpy as np
import pandas as pd

from lens_utils import lens, stats

THRESHOLDS = (0.70, 0.80, 0.90, 0.95)
GRID = np.arange(0, 101, 10)


def landmarks(readout: pd.DataFrame) -> pd.DataFrame:
    """Per prompt and lens, in percent of depth: where the answer, or a copy, first stands on top.

    L_semantic: first depth with the answer at rank 1; L_semantic_stable: from where it stays;
    L_copy: first depth at which a token of the prompt is on top, more surely than a threshold.
    """
    rows = []
    for (prompt, name), one in readout.groupby(["id", "lens"], sort=False):
        one = one.sort_values("depth")
        at = one.depth.tolist()
        marks = {
            "L_semantic": lens.first_depth(one.answer_rank.tolist(), at),
            "L_semantic_stable": lens.first_depth(one.answer_rank.tolist(), at, stable=True),
        }
        columns = (one.p_top1.tolist(), one.margin.tolist(), one.top1_in_prompt.tolist(), at)
        for threshold in THRESHOLDS:
            marks[f"L_copy_{threshold:.2f}"] = lens.copy_depth(*columns, threshold)
        first = one.iloc[0]
        scale = 100 / max(at)
        rows.append(
            {"id": prompt, "lens": name, "set": first["set"], "family": first.family}
            | {key: None if depth is None else depth * scale for key, depth in marks.items()}
        )
    return pd.DataFrame(rows)


def direction(readout: pd.DataFrame) -> pd.DataFrame:
    """The model's own output on both directions of each pair: p, rank and log-odds (nats)."""
    rows = last(readout)
    rows = rows[rows.set == "direction"]
    p = rows.p_answer.clip(1e-12, 1 - 1e-7)
    return rows[["id", "group", "direction", "template", "p_answer", "answer_rank"]].assign(
        log_odds=np.log(p) - np.log1p(-p)
    )


def last(readout: pd.DataFrame) -> pd.DataFrame:
    """The model's own output: the norm lens at the last depth."""
    return readout[(readout.lens == "norm") & (readout.depth == readout.depth.max())]


def facts_by_depth(readout: pd.DataFrame, name: str, column: str) -> pd.DataFrame:
    """One row per fact, one column per depth in percent."""
    rows = readout[(readout.set == "facts") & (readout.lens == name)]
    return rows.pivot(index="id", columns="depth_pct", values=column)


def curves(readout: pd.DataFrame, null: pd.DataFrame) -> pd.DataFrame:
    """Mean over facts with a 95 % bootstrap band, by lens, metric and depth."""
    both = pd.concat([readout, null], ignore_index=True)
    both["log10_rank"] = np.log10(both.answer_rank)
    both["log10_wrong_rank"] = np.log10(both.wrong_rank)
    metrics = ("p_answer", "log10_rank", "log10_wrong_rank", "entropy_bits", "p_top1", "kl_bits",
               "kl_reverse_bits", "agrees", "cosine", "overlap")  # fmt: skip
    frames = []
    for name in both.lens.unique():
        for metric in metrics:
            table = facts_by_depth(both, name, metric)
            mean, low, high = stats.bands(table.to_numpy(float))
            place = {"lens": name, "metric": metric, "depth_pct": table.columns}
            band = {"mean": mean, "low": low, "high": high, "n": len(table)}
            frames.append(pd.DataFrame(place | band))
    return pd.concat(frames, ignore_index=True)


def by_depth(readout: pd.DataFrame) -> pd.DataFrame:
    """log10 rank and KL on a common grid of depths, to compare models of different depth.

    Interpolated linearly per fact, then averaged with a bootstrap band.
    """
    readout = readout.assign(log10_rank=np.log10(readout.answer_rank))
    frames = []
    for name in ("norm", "ridge"):
        for metric in ("log10_rank", "kl_bits"):
            table = facts_by_depth(readout, name, metric)
            at = table.columns.to_numpy(float)
            grid = np.stack([np.interp(GRID, at, row) for row in table.to_numpy(float)])
            mean, low, high = stats.bands(grid)
            place = {"lens": name, "metric": metric, "depth_pct": GRID}
            band = {"mean": mean, "low": low, "high": high, "n": len(grid)}
            frames.append(pd.DataFrame(place | band))
    return pd.concat(frames, ignore_index=True)


def summarise(
    exact: dict,
    readout: pd.DataFrame,
    null: pd.DataFrame,
    text: pd.DataFrame,
    marks: pd.DataFrame,
    bias: pd.DataFrame,
    heat: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings; intervals are 95 % bootstraps over facts or countries."""
    final = last(readout)
    facts = final[final.set == "facts"]
    of_facts = marks[marks.set == "facts"].set_index("lens")
    ci = stats.mean_ci
    out: dict[str, object] = {
        "facts asked": len(facts),
        "answers on top at the output": ci((facts.answer_rank == 1).to_numpy()),
        "p(answer) at the output": ci(facts.p_answer.to_numpy()),
        "largest gap, readout at the last depth against the model, 8 facts, in probability": exact[
            "largest_gap_p"
        ],
        "the same in log-probability (nats)": exact["largest_gap_logp"],
    }
    for name in ("norm", "ridge"):
        one = of_facts.loc[name]
        out[f"mean depth from which the answer stays on top, {name} lens (%)"] = ci(
            one.L_semantic_stable.to_numpy(float)
        )
    stable = of_facts.L_semantic_stable
    out["norm minus ridge, per fact (% of depth)"] = ci(
        stable.loc["norm"].to_numpy(float) - stable.loc["ridge"].to_numpy(float)
    )
    for family, rows in of_facts.loc["ridge"].groupby("family", sort=False):
        out[f"mean depth from which it stays on top, {family} facts, ridge lens (%)"] = ci(
            rows.L_semantic_stable.to_numpy(float)
        )
    out["answers that stay on top only at the very output, norm lens"] = ci(
        (stable.loc["norm"] == 100).to_numpy()
    )
    ridge = facts_by_depth(readout, "ridge", "answer_rank").eq(1).astype(float)
    if len(ridge.columns) == readout.depth.max() + 1:  # a gain is one block's only if all are read
        gains = ridge.diff(axis=1)
        most = gains.mean().idxmax()
        out["block that brings most answers on top, ridge lens"] = ridge.columns.get_loc(most) - 1
        out["answers it brings on top (share of facts)"] = ci(gains[most].to_numpy())
    copied = of_facts.loc["norm"]["L_copy_0.95"].notna().to_numpy()
    out["facts with a copy phase (L_copy at 0.95)"] = ci(copied)
    middle = nearest(readout, 50)
    for name, column in (
        ("norm", "answer_rank"),
        ("ridge", "answer_rank"),
        ("ridge", "wrong_rank"),
    ):
        whose = "answer" if column == "answer_rank" else "wrong answer"
        ranks = at(readout, name, nearest(readout, 80))[column]
        out[f"median rank of the {whose} at 80 % depth, {name} lens"] = float(ranks.median())
    ranks = at(null, "untrained", nearest(null, 80)).answer_rank
    out["median rank of the answer at 80 % depth, untrained model"] = float(ranks.median())
    for name in ("raw", "norm", "ridge"):
        tops = at(readout, name, middle).p_top1.to_numpy()
        out[f"probability of the top token at 50 % depth, {name} lens"] = ci(tops)
    deep = nearest(readout, 80)
    for name in ("norm", "ridge"):
        row = text[(text.lens == name) & (text.depth == deep)].iloc[0]
        out[f"KL from the model to the {name} lens, test text at 80 % depth (bits)"] = estimate(row)
    floor = text[text.lens == "mean prediction"].iloc[0]
    out["KL from the model to its mean prediction, test text (bits)"] = estimate(floor)
    for way in ("forward", "reverse"):
        rows = bias[bias.direction == way]
        label = "country to capital" if way == "forward" else "capital to country"
        out[f"p(answer), {label}"] = ci(rows.p_answer.to_numpy(), rows.group.to_numpy())
    pairs = bias.pivot_table(index="group", columns="direction", values="log_odds")
    gap = (pairs.forward - pairs.reverse).dropna().to_numpy()
    out["forward minus reverse, log-odds (nats)"] = ci(gap)
    out["p of no directional bias (sign flips)"] = stats.sign_flip_p(gap)
    wordings = bias.groupby(["direction", "template"]).log_odds.mean()
    spread = wordings.groupby("direction").agg(lambda x: x.max() - x.min())
    out["log-odds between wordings of one direction, at most (nats)"] = float(spread.max())
    formats = final[final.set == "formats"]
    for name, rows in formats.groupby("format", sort=False):
        out[f"p(answer), format {name}"] = ci(rows.p_answer.to_numpy(), rows.group.to_numpy())
    for t, rows in heat.groupby("temperature"):
        out[f"p(answer) at temperature {t:g}"] = ci(rows.p_answer.to_numpy())
    out["prompts left out (no chat template, or an answer of several tokens)"] = len(
        exact["left_out"]
    )
    return out


def estimate(row: pd.Series) -> stats.Estimate:
    """A row with an interval, as the findings show it."""
    return stats.Estimate(value=row.value, low=row.low, high=row.high, n=int(row.n))


def nearest(readout: pd.DataFrame, percent: float) -> int:
    """The depth nearest to a percentage of the model's."""
    at = readout.drop_duplicates("depth")
    return int(at.depth.iloc[(at.depth_pct - percent).abs().argmin()])


def at(readout: pd.DataFrame, name: str, depth: int) -> pd.DataFrame:
    """The facts' rows of one lens at one depth."""
    rows = readout[(readout.set == "facts") & (readout.lens == name)]
    return rows[rows.depth == depth]
