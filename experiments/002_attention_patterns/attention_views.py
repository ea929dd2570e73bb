"""What experiment 002 shows: layers, queries on the way, prompts one can read, and the summary."""

import numpy as np
import pandas as pd
from attention_tables import (
    FOLLOWS,
    MEASURES,
    Asked,
    entity,
    to_shares,
)
from numpy import ndarray
from scipy.stats import spearmanr

from lens_utils import stats
from lens_utils.attention import CLASSES, TYPES, band

SHOWN = 6  # heads of an example
ALPHA = 0.05


def layers(asked: Asked, held: dict) -> pd.DataFrame:
    """Mass on the entity by layer, mean over heads, with intervals over groups; against the nulls.

    `shuffled` is what the same heads give to an entity placed anywhere behind BOS, on average.
    """
    frames = []
    for task in asked.tasks:
        rows = asked.of(task)
        for measure in ("attention", "normed"):
            found = {
                source: entity(asked, held[source], rows, measure == "normed")
                for source in ("clean", "random", "untrained")
            }
            found["shuffled"] = anywhere(asked, held["clean"], rows, measure)
            for source, values in found.items():
                grouped = asked.by_group(values.mean(2), rows)
                mean, low, high = stats.bands(grouped)
                place = {"task": task, "source": source, "measure": measure,
                         "layer": range(len(mean)), "depth_pct": depth_pct(len(mean))}  # fmt: skip
                band_of = {"mean": mean, "low": low, "high": high, "n": len(grouped)}
                frames.append(pd.DataFrame(place | band_of))
    return pd.concat(frames, ignore_index=True)


def anywhere(asked: Asked, held: dict, rows: ndarray, measure: str) -> ndarray:
    """What as many positions as the entity has would get, if they lay anywhere behind BOS."""
    weights = np.asarray(held[measure], dtype=float)[rows]
    weights = weights if measure == "attention" else to_shares(weights)
    masks = asked.masks[rows]
    places = masks[:, : len(CLASSES) - 1].sum(1)  # bos is the last class
    rest = np.einsum("plhk,pk->plh", weights, places)
    share = masks[:, MEASURES.index("entity")].sum(1) / places.sum(1)
    return rest * share[:, None, None]


def depth_pct(n_layers: int) -> ndarray:
    return 100 * np.arange(n_layers) / max(1, n_layers - 1)


def queries(asked: Asked, held: dict) -> pd.DataFrame:
    """Mass on the entity from every query, mean over heads and prompts; one row per layer.

    token: of the wording's first prompt.
    """
    values, frames = np.asarray(held["entity"], dtype=float), []
    for (task, template), rows in asked.wordings():
        mean = values[rows].mean(0)
        first = asked.tokens[asked.tokens.id == asked.prompts.id[rows[0]]]
        frames += [
            pd.DataFrame({"task": task, "template": template, "layer": range(len(mean)),
                          "query": pos, "token": token, "attention": mean[:, pos]})
            for pos, token in zip(first.pos, first.token, strict=True)
        ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


# Prompts one can read


def examples(asked: Asked, held: dict, top: pd.DataFrame) -> pd.DataFrame:
    """What the leading heads of each task read, token by token, in one prompt of its first wording:
    the one with the median logit difference."""
    rows_of = []
    for task in asked.tasks:
        prompts = asked.prompts[asked.prompts.task == task]
        prompts = prompts[prompts.template == prompts.template.iloc[0]].sort_values("logit_diff")
        row = prompts.index[len(prompts) // 2]
        name = prompts.id[row]
        tokens = asked.tokens[asked.tokens.id == name]
        for best in top[top.task == task].head(SHOWN).itertuples():
            attention, normed = (
                np.asarray(held[key], dtype=float)[row, best.layer, best.head]
                for key in ("attention", "normed")
            )
            rows_of += [
                {"task": task, "id": name, "answer": t.answer, "place": best.place,
                 "layer": best.layer, "head": best.head, "pos": t.pos, "token": t.token,
                 "kind": t.kind, "attention": attention[t.pos],
                 "normed": to_shares(normed)[t.pos]}
                for t in tokens.itertuples()
            ]  # fmt: skip
    return pd.DataFrame(rows_of)


# The few numbers


def summarise(
    asked: Asked,
    held: dict,
    nulls: pd.DataFrame,
    types: pd.DataFrame,
    top: pd.DataFrame,
    held_out: pd.DataFrame,
) -> dict[str, object]:
    """The few numbers of the findings; intervals are 95 % bootstraps over groups."""
    n_layers, n_heads = held["clean"]["attention"].shape[1:3]
    inside = np.isin(np.arange(n_layers), band(n_layers))
    out: dict[str, object] = {
        "pairs used": len(asked.prompts),
        "heads": f"{n_layers * n_heads} ({n_layers} layers of {n_heads})",
        "layers of the band (40-85 % of depth)": f"{inside.argmax()} to "
        f"{n_layers - 1 - inside[::-1].argmax()}" if inside.any() else "none",
    }  # fmt: skip
    out |= all_heads(asked, held["clean"])
    out["most attention to the entity of any head of the untrained twin, any wording"] = float(
        nulls.untrained.max()
    )
    for task in asked.tasks:
        out |= of_task(asked, held, nulls, top, held_out, task, inside)
    for kind in TYPES:
        found = types[(types.type == kind) & (types.model == "trained")]
        best = found.loc[found["mean"].idxmax()]
        score = stats.Estimate(value=best["mean"], low=best.low, high=best.high, n=int(best.n))
        untrained = types[(types.type == kind) & (types.model == "untrained")]["mean"].max()
        out[f"{kind} on repeated random tokens: strongest head"] = name(best)
        out[f"{kind}: its score"] = score
        out[f"{kind}: strongest head of the untrained twin"] = float(untrained)
    scores = types[(types.model == "trained") & (types.type == "induction")]
    induced = nulls[nulls.task == "induction"].merge(scores, on=["layer", "head"])
    if len(induced):
        rho = spearmanr(induced["mean"], induced.entity).statistic
        out["induction: rank correlation over heads with the induction score"] = float(rho)
    return out


def name(head: pd.Series) -> str:
    return f"L{int(head['layer'])}H{int(head['head'])}"


def all_heads(asked: Asked, held: dict) -> dict[str, object]:
    """Means over all heads and tasks: attention of the last query to BOS, and how even it is."""
    groups = asked.prompts.group.to_numpy()
    out: dict[str, object] = {}
    mask = asked.masks[:, MEASURES.index("bos")]
    if mask.any():
        for key, label in (("attention", "attention to"), ("normed", "norm-weighted share of")):
            weights = np.asarray(held[key], dtype=float)
            weights = weights if key == "attention" else to_shares(weights)
            mass = np.nanmean(np.einsum("plhk,pk->plh", weights, mask), axis=(1, 2))
            out[f"{label} BOS, all heads, all tasks"] = stats.mean_ci(mass, groups)
    for key, label in (
        ("entropy", "entropy of the last token's attention (bits), all heads, all tasks"),
        ("evenness", "the same as a share of the largest possible"),
    ):
        values = np.asarray(held[key], dtype=float)
        out[label] = stats.mean_ci(np.nanmean(values, axis=(1, 2)), groups)
    return out


def of_task(
    asked: Asked,
    held: dict,
    nulls: pd.DataFrame,
    top: pd.DataFrame,
    held_out: pd.DataFrame,
    task: str,
    inside: ndarray,
) -> dict[str, object]:
    """One task's numbers."""
    rows = asked.of(task)
    groups = asked.prompts.group.to_numpy()[rows]
    clean = entity(asked, held["clean"], rows)
    out: dict[str, object] = {
        f"{task}: attention to the entity, mean over heads": stats.mean_ci(
            clean.mean((1, 2)), groups
        )
    }
    random = entity(asked, held["random"], rows)
    out[f"{task}: the same minus random tokens in the same places"] = stats.mean_ci(
        (clean - random).mean((1, 2)), groups
    )
    if inside.any() and not inside.all():
        for values, label in ((clean, ""), (clean - random, ", random tokens taken off")):
            gap = values[:, inside].mean((1, 2)) - values[:, ~inside].mean((1, 2))
            out[f"{task}: in the band minus outside it{label}"] = stats.mean_ci(gap, groups)
    of_layer = asked.by_group(clean, rows).mean((0, 2))
    out[f"{task}: layer with most of it, mean over heads"] = int(of_layer.argmax())
    best = top[top.task == task].iloc[0]
    at = int(best.layer), int(best["head"])
    out[f"{task}: head with most of it"] = name(best)
    out[f"{task}: attention of that head to the entity"] = stats.Estimate(
        value=best.value, low=best.low, high=best.high, n=int(best.n)
    )
    out[f"{task}: its attention to random tokens in the same place"] = stats.mean_ci(
        random[:, *at], groups
    )
    if task in FOLLOWS:
        corrupt = entity(asked, held["corrupt"], rows)
        out[f"{task}: attention of that head minus the same place when it is not the answer"] = (
            stats.mean_ci((clean - corrupt)[:, *at], groups)
        )
    of_task = nulls[nulls.task == task]
    tested = of_task.groupby(["layer", "head"])[["p_shuffled", "p_random"]].max() < ALPHA
    wordings = of_task.template.nunique()
    where = "in both wordings" if wordings == 2 else "in its wording"
    out[f"{task}: heads above shuffled classes {where}"] = int(tested.p_shuffled.sum())
    out[f"{task}: of them also above random tokens {where}"] = int(tested.all(axis=1).sum())
    found = held_out[held_out.task == task] if len(held_out) else held_out
    if len(found):
        out[f"{task}: five heads of one wording, on the other"] = float(found.value.mean())
        out[f"{task}: rank correlation over heads between the wordings"] = float(
            found.rank_correlation.iloc[0]
        )
    return out
