"""What experiment 003 makes of its attributions: tables by layer, head, source and share."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd
from attribution_readings import CLASSES, spread
from numpy import ndarray

ENTITY = CLASSES.index("entity")
BOTH = "both"  # wordings of a task together
NAMED = ["layer", "head"]


def wordings(asked: pd.DataFrame, both: bool = True) -> Iterator[tuple[str, str, ndarray, ndarray]]:
    """Task, wording, rows and groups: every wording, and with `both` a task's wordings together."""
    for (task, template), rows in asked.groupby(["task", "template"], sort=False):
        yield task, template, np.array(rows.index), rows.group.to_numpy()
    for task, rows in asked.groupby("task", sort=False) if both else ():
        yield task, BOTH, np.array(rows.index), rows.group.to_numpy()


def components(asked: pd.DataFrame, held: dict[str, dict]) -> pd.DataFrame:
    """Attention and MLP of every layer, embedding (layer -1) and constant, in nats."""
    frames = []
    for source, parts in held.items():
        attn = parts["heads"].sum(-1) + parts["attn_bias"]
        kinds = {"attn": attn, "mlp": parts["mlp"], "embed": parts["embed"][:, None],
                 "constant": parts["constant"][:, None]}  # fmt: skip
        for task, template, rows, groups in wordings(asked):
            for kind, values in kinds.items():
                mean, low, high, n = spread(values[rows].numpy(), groups)
                layer = np.arange(len(mean)) if len(mean) > 1 else [-1]
                place = {"direction": source, "task": task, "template": template}
                band = {"component": kind, "layer": layer, "mean": mean, "low": low, "high": high}
                frames.append(pd.DataFrame(place | band | {"n": n}))
    return pd.concat(frames, ignore_index=True)


def heads(asked: pd.DataFrame, held: dict[str, dict]) -> pd.DataFrame:
    """One row per head, task and wording: its contribution, and the part from the entity.

    Both also towards another pair's answer (`shuffled_`; not where a task has two answers) and in
    the untrained model (`untrained_`). attention_entity is the last token's attention to the
    entity, `uniform` what it would be if every position got the same.
    """
    frames = []
    for task, template, rows, groups in wordings(asked, both=False):
        of = asked.loc[rows]
        grid = np.indices(held["attributed"]["heads"].shape[1:]).reshape(2, -1)
        table = {"layer": grid[0], "head": grid[1], "task": task, "template": template}
        for source, parts in held.items():
            before = "" if source == "attributed" else f"{source}_"
            measures = {"dla": parts["heads"], "dla_entity": parts["by_class"][..., ENTITY]}
            if source == "attributed":
                measures["attention_entity"] = parts["attention"][..., ENTITY]
            for name, values in measures.items():
                mean, low, high, n = spread(values[rows].numpy(), groups)
                if source == "shuffled" and of.answers.iloc[0] < 4:
                    mean, low, high = (np.full_like(mean, np.nan) for _ in range(3))
                short = {"dla": "", "dla_entity": "entity_", "attention_entity": "attention_"}[name]
                table |= {f"{before}{name}": mean.ravel(), f"{before}{short}low": low.ravel(),
                          f"{before}{short}high": high.ravel(), "n": n}  # fmt: skip
        uniform = (of.entity_tokens / of.tokens).mean()
        frames.append(pd.DataFrame(table | {"uniform": uniform}))
    return pd.concat(frames, ignore_index=True)


def sources(asked: pd.DataFrame, held: dict[str, dict]) -> pd.DataFrame:
    """What attention brings from each class of position, by layer (-1: all layers), in nats."""
    by_class = held["attributed"]["by_class"].sum(2)  # pair, layer, class
    frames = []
    for task, template, rows, groups in wordings(asked):
        values = by_class[rows].numpy()
        values = np.concatenate([values, values.sum(1, keepdims=True)], axis=1)
        mean, low, high, n = spread(values, groups)
        layers = [*range(values.shape[1] - 1), -1]
        for i, name in enumerate(CLASSES):
            if values[:, :, i].any():
                place = {"task": task, "template": template, "source": name, "layer": layers}
                band = {"mean": mean[:, i], "low": low[:, i], "high": high[:, i], "n": n}
                frames.append(pd.DataFrame(place | band))
    return pd.concat(frames, ignore_index=True)


def shares(asked: pd.DataFrame, held: dict[str, dict]) -> pd.DataFrame:
    """MLPs against attention: signed sums over layers in nats, and the absolute share of MLPs.

    mlp_share = sum |mlp| / (sum |attn| + sum |mlp|) over layers, per pair. A finer cut of attention
    (heads instead of layers) has a larger absolute sum: heads_abs and layers_abs show how much.
    """
    frames = []
    for source, parts in held.items():
        attn, mlp = parts["heads"].sum(-1) + parts["attn_bias"], parts["mlp"]
        by_layer, by_mlp = attn.abs().sum(1), mlp.abs().sum(1)
        kinds = {
            "logit_diff": parts["logit_diff"], "attn": attn.sum(1), "mlp": mlp.sum(1),
            "mlp_minus_attn": mlp.sum(1) - attn.sum(1), "embed": parts["embed"],
            "constant": parts["constant"], "mlp_share": by_mlp / (by_layer + by_mlp),
            "layers_abs": by_layer, "heads_abs": parts["heads"].abs().sum((1, 2)),
            "mlp_abs": by_mlp, "from_entity": parts["by_class"][..., ENTITY].sum((1, 2)),
        }  # fmt: skip
        for task, template, rows, groups in wordings(asked):
            for kind, values in kinds.items():
                mean, low, high, n = spread(values[rows].numpy()[:, None], groups)
                place = {"direction": source, "task": task, "template": template, "quantity": kind}
                frames.append(place | {"mean": mean[0], "low": low[0], "high": high[0], "n": n})
    return pd.DataFrame(frames)


def agreement(asked: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How alike two maps of head contributions are: wordings, tasks, and the nulls.

    Spearman correlation over all heads, and how many of the ten largest are shared. Heads are no
    independent sample, so there is no interval; the nulls are what to compare with.
    """
    wide = table.set_index(["task", "template", *NAMED]).sort_index()
    kinds = list(wordings(asked, both=False))
    rows = []
    for (task, one, *_), (other_task, other, *_) in combinations(kinds, 2):
        kind = "wordings" if task == other_task else "tasks"
        a, b = wide.dla[task, one], wide.dla[other_task, other]
        rows.append(_alike(kind, f"{task} {one}", f"{other_task} {other}", a, b))
    for task, one, *_ in kinds:
        for null in ("shuffled", "untrained"):
            a, b = wide.dla[task, one], wide[f"{null}_dla"][task, one]
            if not b.isna().any():
                rows.append(_alike(null, f"{task} {one}", f"{task} {one}", a, b))
    return pd.DataFrame(rows)


def _alike(kind: str, one: str, other: str, a: pd.Series, b: pd.Series) -> dict[str, object]:
    top = len(set(a.nlargest(10).index) & set(b.nlargest(10).index))
    rank = a.corr(b, method="spearman")
    return {"kind": kind, "one": one, "other": other, "spearman": rank, "shared_top10": top}


def strongest_mlps(asked: pd.DataFrame, parts: dict) -> pd.DataFrame:
    """The three MLPs of each task that add most, on the half of the pairs where one may choose."""
    rows = []
    for task, members in asked[asked.half == 0].groupby("task", sort=False):
        mean = parts["mlp"][np.array(members.index)].mean(0)
        rows += [{"task": task, "layer": int(layer)} for layer in mean.topk(3).indices]
    return pd.DataFrame(rows)
