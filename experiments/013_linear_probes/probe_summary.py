"""The results of experiment 013 in the study's schema, and the numbers that its findings quote."""

from typing import Any

import numpy as np
import pandas as pd
from probe_analyses import BAND
from probe_design import REQUIRES, VALID
from probe_tables import estimate

from lens_utils import probe_scores
from lens_utils.maze_tasks import ABILITIES

MAIN = {**{label: ("direct", "last") for label in REQUIRES}, VALID: ("judge", "last")}
"""Where each label is asked for first: the last prompt token, without thinking."""
CURVES = {"recognize": VALID, "generate": "requires_generate", "solve": "requires_solve"}
"""The label that stands for an ability: recognizing is to tell valid paths from others, for which
reading the question's words is not enough."""


def passing(gate: dict[str, Any]) -> list[str]:
    """Abilities above chance in some mode: the only ones that claims are made about."""
    return [a for a in ABILITIES if any(mode["passes"] for mode in gate.get(a, {}).values())]


def gate_table(gate: dict[str, Any]) -> pd.DataFrame:
    """The behaviour gate, one row per task and mode."""
    rows = [{"task": task, "mode": mode} | cell
            for task, modes in gate.items() for mode, cell in modes.items()]  # fmt: skip
    return pd.DataFrame(rows)


def verdict(gate: dict[str, Any]) -> dict[str, Any]:
    """The summary of a model that can do none of it."""
    found: dict[str, Any] = {"abilities past the gate": "none: no probe was fitted"}
    for task, modes in gate.items():
        for mode, cell in modes.items():
            found[f"{task} right, {mode}"] = {key: cell[key] for key in ("low", "high", "n")} | {
                "value": cell["accuracy"]
            }
    return found


def at(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows of a table with these values."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def results(
    name: str, tables: dict[str, pd.DataFrame], passed: list[str], n_layers: int
) -> dict[str, Any]:
    """probe_results.json: of every ability the held-out-wording curve over blocks and its peaks."""
    performance, abilities = tables["performance"], {}
    for ability in passed:
        label = CURVES[ability]
        label = label if label in set(performance.label) else f"requires_{ability}"
        curves = {}
        for key in dict.fromkeys((label, f"requires_{ability}")):
            group, site = MAIN[key]
            curve = at(performance, set=group, site=site, label=key, scheme="template")
            curves[key] = curve.set_index("depth").reindex(range(n_layers + 1))
        curve = curves[label]
        blocks = curve.loc[1:]
        value = blocks.accuracy.fillna(-1).tolist()
        order = [layer for layer in probe_scores.ranked(value) if value[layer] >= 0]
        inside = [layer for layer in order if BAND[0] <= value[layer] <= BAND[1]]
        flow = at(tables["flow"], set=MAIN[label][0], site=MAIN[label][1], label=label)
        abilities[ability] = {
            "label": label,
            "top_layers": order,
            "key_layers": order[:5],
            "peak_layers": order[:5],
            "curve": _plain(blocks.accuracy),
            "curve_low": _plain(blocks.low),
            "curve_high": _plain(blocks.high),
            "auc": _plain(blocks.auc),
            "selectivity": _plain(blocks.selectivity),
            "shuffled": _plain(blocks.shuffled),
            "embedding": _plain(curve.accuracy)[0],
            "requires_curve": _plain(curves[f"requires_{ability}"].accuracy.loc[1:]),
            "saturation_layer": int(flow.saturation.iloc[0]) - 1 if len(flow) else None,
            "layers_in_band": inside,
        }
    return {"model": name, "experiment": "013_linear_probes", "abilities": abilities}


def _plain(column: pd.Series) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in column]


def summarise(
    tables: dict[str, pd.DataFrame], passed: list[str], counts: dict[str, int]
) -> dict[str, Any]:
    """Some thirty numbers. Depth 0 is the embedding; accuracies are balanced, chance 0.5."""
    performance, peaks = tables["performance"], tables["peaks"]
    held_out = at(performance, scheme="template")
    found: dict[str, Any] = {"abilities past the gate": ", ".join(passed), **counts}
    for label, (group, site) in MAIN.items():
        best = at(peaks, set=group, site=site, label=label)
        if not len(best):
            continue
        peak = best.iloc[0]
        found[f"{label}, unseen wordings, best depth on the other half"] = estimate(peak)
        found[f"{label}, that depth"] = int(peak.depth)
        row = at(held_out, set=group, site=site, label=label, depth=peak.depth).iloc[0]
        found[f"{label}, selectivity there"] = estimate(
            row, "selectivity", "selectivity_low", "selectivity_high"
        )
        if label == VALID:
            found |= _baselines(held_out, label, {"words": "judge words",
                                                  "untrained": "judge untrained"})  # fmt: skip
            others = at(peaks, set=group, site="path", label=label)
            found[f"{label} at the path's own cells, best depth"] = estimate(others.iloc[0])
        else:
            found |= _baselines(held_out, label, {"words": "words", "untrained": "untrained"})
    null = at(held_out, set="direct", site="null")
    null = null[null.label.isin(REQUIRES)]
    found["largest accuracy at the null position, any label and depth"] = estimate(
        null.loc[null.accuracy.idxmax()]
    )
    shuffled = at(held_out, set="direct", site="last").shuffled
    found["mean accuracy on shuffled labels, last token"] = float(shuffled.mean())
    last = int(performance.depth.max())
    bits = at(tables["bits"], set="direct", site="last", label="requires_solve", depth=last)
    for row in bits.itertuples():
        found[f"bits per row for requires_solve, {row.variant} labels, last depth"] = (
            row.bits_per_row
        )
    transfer = tables["transfer"]
    best = at(transfer, set="direct", site="last", trained="recognize+generate", tested="solve")
    final = at(best, depth=last)
    if len(final):
        found["trained on recognize and generate, tested on solve, last depth"] = estimate(
            final.iloc[0]
        )
    cosine = at(tables["cosines"], set="direct", site="last", depth=last)
    for a, b in (("requires_recognize", "requires_solve"), ("requires_generate", "requires_solve")):
        for row in at(cosine, label=a, other=b).itertuples():
            found[f"cosine of {a} and {b}, last depth"] = row.cosine
            found[f"cosine of {a} and {b}, p against deals with the same nesting"] = row.p
    thought = at(peaks, set="thinking", site="thought", label="requires_solve")
    if len(thought):
        found["requires_solve in the thinking span, best depth"] = estimate(thought.iloc[0])
    neurons = tables["dape"]
    for label in dict.fromkeys(neurons.label) if len(neurons) else ():
        one = at(neurons, label=label, kind="dape")
        if len(one):
            draws = at(neurons, label=label, kind="random").accuracy
            found[f"{label} on {int(one.n_neurons.iloc[0])} DAPE neurons"] = float(
                one.accuracy.iloc[0]
            )
            found[f"{label} on as many random neurons, mean of {len(draws)}"] = float(draws.mean())
    return found


def _baselines(held_out: pd.DataFrame, label: str, sets: dict[str, str]) -> dict[str, Any]:
    """Accuracy of the bag of words, and the best of the untrained twin at the last token."""
    found = {}
    words = at(held_out, set=sets["words"], label=label)
    if len(words):
        found[f"{label}, bag of words"] = float(words.accuracy.iloc[0])
    twin = at(held_out, set=sets["untrained"], label=label, site="last")
    if len(twin):
        found[f"{label}, untrained model, best depth"] = float(twin.accuracy.max())
    return found
