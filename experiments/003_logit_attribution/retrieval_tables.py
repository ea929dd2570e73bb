"""Which heads experiment 003 names for retrieval, by a rule, and the summary.

The rule, fixed before any head was looked at. A head is named for a task when, of what it writes
into the last token towards answer - foil, the part that it takes from the entity's position is

1. among the five largest of the model in the task's first wording, with its interval above 0,
2. among the ten largest in the other wording, with its interval above 0,

and when in the other wording

3. it says the right answer when it reads the entity alone (OV, the residual of the prompt): the
   answer's percentile among the answers of the task has its interval above 0.5, which is chance,
4. the last token attends to the entity more than uniform attention would, interval included.

The same rule is applied to attribution towards another pair's answer (steps 1 to 4), and to the
untrained model (steps 1 and 2): how many heads does it name where there is nothing to name?
"""

import numpy as np
import pandas as pd

from lens_utils import stats
from lens_utils.stats import Estimate

FIRST, SECOND, CONTROLS = 5, 10, 3
FACTS = ("capital", "opposite")
DIRECTIONS = {
    "attributed": "the model",
    "shuffled": "towards another pair's answer",
    "untrained": "the untrained model",
}
QUANTITIES = {
    "logit_diff": "logit difference (nats)",
    "attn": "attention, all layers (nats)",
    "mlp": "MLPs, all layers (nats)",
    "from_entity": "attention to the entity, all heads (nats)",
    "mlp_share": "share of MLPs in the absolute sum",
}
OV = {
    ("prompt", "answer_percentile"): "OV, percentile of the answer",
    ("alone", "answer_percentile"): "OV of the bare entity, percentile of the answer",
    ("prompt", "entity_percentile"): "OV, percentile of the entity",
    ("prompt", "answer_top5"): "OV, answer among five of the vocabulary",
    ("prompt", "entity_top5"): "OV, entity among five of the vocabulary",
}
QK = {
    ("prompt", "over_function"): "QK, entities over function words (AUROC)",
    ("prompt", "over_random"): "QK, entities over random words (AUROC)",
    ("alone", "over_random"): "QK of bare words, entities over random words (AUROC)",
    ("prompt", "own_over_others"): "QK, its own entity over others (AUROC)",
}


def two_wordings(heads: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """The wording to choose on and the wording to confirm on, of every task that has two."""
    found = heads.groupby("task", sort=False).template.unique()
    return {task: tuple(names) for task, names in found.items() if len(names) == 2}


def tried(heads: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The heads that are read in full: the candidates of step 1, and random others beside them.

    For every candidate three other heads of its layer (of the neighbouring ones where a layer has
    no three others), drawn without looking.
    """
    rng, rows = np.random.default_rng(seed), []
    for task, (first, _) in two_wordings(heads).items():
        one = heads[(heads.task == task) & (heads.template == first)]
        top = one.nlargest(FIRST, "dla_entity")
        rest = one[one.layer.isin(top.layer) & ~one.index.isin(top.index)]
        drawn = rest.sample(min(CONTROLS * FIRST, len(rest)), random_state=rng)
        for role, chosen in (("candidate", top), ("control", drawn)):
            rows += [{"task": task, "layer": r.layer, "head": r.head, "role": role}
                     for r in chosen.itertuples()]  # fmt: skip
    return pd.DataFrame(rows)


def retrieval(heads: pd.DataFrame, ov: pd.DataFrame, qk: pd.DataFrame) -> pd.DataFrame:
    """Every candidate of step 1 with its evidence and whether it is named; and the two nulls."""
    frames = []
    at = ["layer", "head"]
    for task, wordings in two_wordings(heads).items():
        one, other = (
            heads[(heads.task == task) & (heads.template == t)].set_index(at) for t in wordings
        )
        said = ov[(ov.task == task) & (ov.template == wordings[1]) & (ov.source == "prompt")]
        found = qk[(qk.task == task) & (qk.template == wordings[1]) & (qk.source == "prompt")]
        for direction in ("attributed", "shuffled", "untrained"):
            before = "" if direction == "attributed" else f"{direction}_"
            if one[f"{before}dla_entity"].isna().any():
                continue  # a task with two answers has no other pair's answer
            measures = ("dla", "low", "high", "dla_entity", "entity_low", "entity_high")
            columns = {f"{before}{name}": name for name in measures}
            a, b = (t[list(columns)].rename(columns=columns).assign(n=t.n) for t in (one, other))
            top = a.nlargest(FIRST, "dla_entity").join(b, rsuffix="_other")
            rank = b.dla_entity.rank(ascending=False)
            top = top.assign(
                rank=np.arange(1, FIRST + 1), rank_other=rank[top.index].astype(int),
                step_1=top.entity_low > 0,
                step_2=(rank[top.index] <= SECOND) & (top.entity_low_other > 0),
            )  # fmt: skip
            named = top.step_1 & top.step_2
            if direction != "untrained":
                columns = ["answer_percentile", "answer_percentile_low", "answer_percentile_high",
                           "entity_percentile", "answer_top5", "entity_top5"]  # fmt: skip
                top = top.join(said.set_index(at)[columns])
                columns = ["attention_entity", "attention_low", "attention_high", "uniform"]
                top = top.join(other[columns])
                looks = ["over_function", "over_random", "own_over_others"]
                top = top.join(found.set_index(at)[looks])
                top = top.assign(step_3=top.answer_percentile_low > 0.5,
                                 step_4=top.attention_low > top.uniform)  # fmt: skip
                named = named & top.step_3 & top.step_4
            frames.append(
                top.reset_index().assign(
                    task=task, direction=direction, chosen_on=wordings[0],
                    confirmed_on=wordings[1], named=named.to_numpy(),
                )
            )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def names(table: pd.DataFrame) -> str:
    """Heads as L23H4, in the table's order."""
    return ", ".join(f"L{r.layer}H{r.head}" for r in table.itertuples()) or "none"


def summarise(
    exact: dict, asked: pd.DataFrame, layers: pd.DataFrame, heads: pd.DataFrame,
    sources: pd.DataFrame, shares: pd.DataFrame, agree: pd.DataFrame, cells: pd.DataFrame,
    ov: pd.DataFrame, qk: pd.DataFrame, found: pd.DataFrame,
) -> dict[str, object]:  # fmt: skip
    """The few numbers of the findings; intervals are 95 % bootstraps over groups (countries)."""
    out: dict[str, object] = {
        "pairs attributed": exact["pairs"],
        "largest gap, sum of components against the model's own logit difference (nats)": exact[
            "largest_gap_sum"
        ],
        "largest gap, positions against their head (nats)": exact["largest_gap_sources"],
    }
    if "folded_gap_heads" in exact:
        out["largest gap, heads on folded against raw weights (nats)"] = exact["folded_gap_heads"]
    of = shares[shares.template == "both"].set_index(["direction", "task", "quantity"]).sort_index()
    tasks = list(asked.task.unique())
    for task in tasks:
        for quantity, label in QUANTITIES.items():
            out[f"{task}: {label}"] = _estimate(of.loc["attributed", task, quantity])
        whole = layers[(layers.direction == "attributed") & (layers.task == task)
                       & (layers.template == "both")]  # fmt: skip
        for kind, label in (("attn", "attention"), ("mlp", "MLP")) if task in FACTS else ():
            top = whole[whole.component == kind].nlargest(1, "mean").iloc[0]
            out[f"{task}: {label} layer that adds most"] = int(top.layer)
            out[f"{task}: what it adds, {label} (nats)"] = _estimate(top)
    null = shares[(shares.direction == "untrained") & (shares.template == "both")]
    values = null[null.quantity == "mlp_share"]["mean"].to_numpy()
    out["share of MLPs in the absolute sum, untrained model, over tasks"] = stats.mean_ci(values)
    for task in found.task.unique():
        mine = found[(found.task == task) & (found.direction == "attributed")]
        out[f"{task}: heads named"] = names(mine[mine.named])
        if task in FACTS:
            top = mine.iloc[0]
            out[f"{task}: head with most from the entity"] = names(mine.head(1))
            out[f"{task}: what it adds in the other wording (nats)"] = Estimate(
                value=top.dla_other, low=top.low_other, high=top.high_other, n=int(top.n)
            )
            out[f"{task}: the part of it from the entity (nats)"] = Estimate(
                value=top.dla_entity_other, low=top.entity_low_other, high=top.entity_high_other,
                n=int(top.n),
            )  # fmt: skip
    for direction, label in DIRECTIONS.items():
        of_direction = found[found.direction == direction]
        steps = of_direction.step_1 & of_direction.step_2
        out[f"candidates that pass steps 1 and 2, {label}"] = f"{steps.sum()} of {len(steps)}"
        if direction != "untrained":
            out[f"candidates named, {label}"] = f"{of_direction.named.sum()} of {len(steps)}"
        before = "" if direction == "attributed" else f"{direction}_"
        largest = heads[f"{before}dla_entity"].max()
        out[f"largest mean contribution of a head from the entity, {label} (nats)"] = largest
    for kind in ("wordings", "tasks", "shuffled", "untrained"):
        some = agree[agree.kind == kind]
        out[f"head maps, mean Spearman correlation, {kind}"] = some.spearman.mean()
        out[f"head maps, shared among the ten largest, {kind}"] = some.shared_top10.mean()
    out |= _readings(ov, qk, found)
    sums = cells[cells.neuron == -1].set_index(["task", "kind"])
    for task in FACTS:
        top = sums.loc[(task, "top")]
        many = ((cells.task == task) & (cells.kind == "top") & (cells.neuron >= 0)).sum()
        label = f"{task}: {many} neurons of the three strongest MLPs, where chosen (nats)"
        out[label] = float(top.chosen_on)
        again = top[["same_mean", "same_low", "same_high", "same_n"]]
        out[f"{task}: the same neurons, same words in the other wording (nats)"] = _estimate(
            again.rename(lambda name: name.removeprefix("same_"))
        )
        out[f"{task}: the same neurons, other words (nats)"] = _estimate(top)
        out[f"{task}: as many random neurons, other words (nats)"] = _estimate(
            sums.loc[(task, "random")]
        )
        out[f"{task}: the three MLPs in all, other words (nats)"] = _estimate(
            sums.loc[(task, "all")]
        )
    return out


def _readings(ov: pd.DataFrame, qk: pd.DataFrame, found: pd.DataFrame) -> dict[str, object]:
    """OV and QK of the named heads against the random heads beside them; intervals over heads."""
    out: dict[str, object] = {}
    named = found[found.named & (found.direction == "attributed")]
    keys = ["task", "layer", "head"]
    for task in FACTS:
        wording = found[found.task == task].confirmed_on.iloc[0]
        mine = named[named.task == task][keys]
        for table, columns in ((ov, OV), (qk, QK)):
            rows = table[(table.task == task) & (table.template == wording)]
            for (source, column), label in columns.items():
                some = rows[rows.source == source]
                for who, those in (
                    ("named", some.merge(mine, on=keys)),
                    ("random", some[some.role == "control"]),
                ):
                    out[f"{task}: {label}, {who} heads"] = stats.mean_ci(
                        those[column].to_numpy(float)
                    )
    return out


def _estimate(row: pd.Series) -> Estimate:
    return Estimate(value=row["mean"], low=row["low"], high=row["high"], n=int(row["n"]))
