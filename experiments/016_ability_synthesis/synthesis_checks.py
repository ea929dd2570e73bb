"""The study's checkpoints: value, band, and whether the value lies in it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from synthesis_inputs import ABILITIES, Held
from synthesis_tables import TOGETHER, first

from lens_utils import synthesis


def table(held: Held, shared: pd.DataFrame) -> pd.DataFrame:
    """The study's checkpoints with the bands it set beforehand. None of them was tuned to pass."""
    check, rows = synthesis.checkpoint, []
    labels = pd.DataFrame(held.records)
    rows.append(check("1 questions", len(labels), (2400, math.inf), "", "in every mode asked"))
    for ability in ABILITIES:
        share = float(labels[f"requires_{ability}"].astype(float).mean())
        rows.append(
            check(
                f"1 questions that need {ability}",
                100 * share,
                (40, 60),
                "%",
                "labels are nested: recognize <= generate <= solve",
            )
        )
    contrasts = held.tables["contrasts"]
    both = {} if contrasts is None else contrasts.set_index("contrast").specialised_percent
    rows.append(
        check(
            "2 specialised neurons",
            both.get("abilities"),
            (5, 15),
            "%",
            "an outcome of shuffled labels here, not a percentile that was set",
        )
    )
    by_mode = [v for name, v in both.items() if str(name).startswith("modes")]
    rows.append(
        check(
            "2 neurons that tell the modes apart",
            max(by_mode, default=None),
            (10, 20),
            "%",
            "the largest over abilities",
        )
    )
    small = f"the band was written for 40 layers, here are {held.n_layers}"
    for ability in ABILITIES:
        entry = held.entries("neurons").get(ability)
        rows.append(check(f"2 key layers, {ability}", entry and len(entry["key_layers"]), (1, 5)))
    for ability in ABILITIES:
        entry = held.entries("ablation").get(ability)
        n = None if entry is None else len(entry["critical_layers"])
        rows.append(check(f"3 critical layers, {ability}", n, (5, 8), "", small))
        drop = None if entry is None else _largest_drop(entry)
        rows.append(
            check(
                f"3 largest drop at half of a layer, {ability}",
                drop,
                (15, 50),
                "points",
                "share of answers whose every token stays likeliest",
            )
        )
    for ability in ABILITIES:
        entry = held.entries("probes").get(ability)
        best = None if entry is None else 100 * np.nanmax(np.array(entry["curve"], float))
        rows.append(
            check(
                f"4 best probe, {ability}",
                best,
                (65, 85),
                "%",
                "unseen wordings; a low accuracy is no virtue",
            )
        )
    rows.append(
        check(
            "4 transfer, recognize and generate to solve",
            _transfer(held),
            (60, 100),
            "%",
            "the best depth",
        )
    )
    for name, value in advanced(held).items():
        rows.append(check(f"5 {name}", value, (1, math.inf)))
    for ability in ABILITIES:
        row = first(shared, ability=ability, methods=TOGETHER)
        rows.append(
            check(
                f"6 layers that all methods list, {ability}",
                row and row.shared,
                (3, 5),
                "",
                "" if row is None else f"by chance {row.expected:.1f}",
            )
        )
        rows.append(
            check(f"6 agreement of the lists, {ability}", row and row.agreement_pct, (70, 100), "%")
        )
    return pd.DataFrame(rows)


def _largest_drop(entry: Mapping[str, Any]) -> float | None:
    """Of accuracy, in points, over layers at ratio 0.5."""
    drops = [
        ratios["ratio_0.5"]["performance_drop"]
        for ratios in entry["ablation_by_layer"].values()
        if "ratio_0.5" in ratios
    ]
    return 100 * max(drops) if drops else None


def _transfer(held: Held) -> float | None:
    table = held.tables["transfer"]
    if table is None:
        return None
    rows = table[(table.trained == "recognize+generate") & (table.tested == "solve")]
    return 100 * float(rows.accuracy.max()) if len(rows) else None


def advanced(held: Held) -> dict[str, float | None]:
    """Of 014 and 015: how many of what they look for were confirmed on other mazes."""
    row = first(held.tables["places"], places="thinking - answer", weights="trained")
    concepts, edges = held.tables["concepts"], held.tables["edges"]
    read = None
    if concepts is not None:
        hard = concepts[~concepts.trivial]
        read = int((hard.low > hard[["untrained", "bag"]].max(axis=1)).sum())
    return {
        "neurons that tell a trace's cells from the answer's": row and int(row.confirmed),
        "concepts read beyond their baselines": read,
        "causal edges between concepts' neurons": None if edges is None else int(edges.kept.sum()),
    }
