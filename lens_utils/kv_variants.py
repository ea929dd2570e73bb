"""Analysed runs side by side: which model's K and V can be cut more, and where.

1. The runs must be about the same thing: data set, target sparsity and kind of unit.
2. Layers are numbered, never sorted as text. Models of unequal depth are laid beside each other by
   relative depth: row r of R shows the layer at (r + 1/2)/R of each model's depth, R being the
   deepest model's number of layers, so every layer is shown at least once.
3. A difference is one only beyond twice the pooled sd over seeds,
   sqrt(((n1 - 1) s1^2 + (n2 - 1) s2^2)/(n1 + n2 - 2)); below it two variants are similar, and with
   one seed each nothing is decided.

Numbers come from metrics.json and layers.csv, never from a page.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_utils import files, kv_runs, kv_variant_figures, kv_variant_text, tracking
from lens_utils.errors import BadInput

OVERALL = ("loss_degradation", "faithfulness", "kl", "top1", "sparsity", "bits_per_byte")
SAME = ("dataset", "target_sparsity", "units")
WORTH_SAYING = ("method", "objective", "fill", "keep_first", "steps", "lr")
THIRDS = ("early", "middle", "late")


def compare_variants(
    variant_dirs: Mapping[str, Path | str],
    output_dir: Path | str,
    project_name: str | None = None,
    use_wandb: bool | str = False,
    baseline: str | None = None,
) -> pd.DataFrame:
    """Compare two or more run folders, by name; figures, findings and tables go to output_dir.

    The baseline is the first one unless it is named. `use_wandb` is True or "offline" for a run of
    Weights & Biases kept in output_dir/wandb, "online" to send it. Returns one row per variant,
    baseline first: percentages, nats and bits as in metrics.json, each with its sd over seeds.
    Raises BadInput for fewer than two variants, a folder that is no run, and runs that differ in
    data set, target sparsity or units.
    """
    folders = {name: Path(folder) for name, folder in variant_dirs.items()}
    if len(folders) < 2:
        raise BadInput("a comparison needs two or more variants")
    if baseline is not None and baseline not in folders:
        raise BadInput(f"no variant {baseline} for a baseline; there are {', '.join(folders)}")
    first = baseline or next(iter(folders))
    folders = {first: folders[first]} | folders
    metrics = {name: kv_runs.read(folder, "metrics.json") for name, folder in folders.items()}
    _check_alike(metrics)
    layers = {name: kv_runs.read(folder, "layers.csv") for name, folder in folders.items()}
    for name, frame in layers.items():
        if sorted(frame.layer.unique()) != list(range(metrics[name]["n_layers"])):
            raise BadInput(f"{folders[name]}/layers.csv does not hold the layers of metrics.json")

    output, settings = Path(output_dir), {key: metrics[first][key] for key in SAME}
    mode = use_wandb if isinstance(use_wandb, str) else "offline" if use_wandb else "off"
    tracker = tracking.start(mode, output, "variant_comparison", project_name, settings)
    with contextlib.closing(tracker):
        found = {
            "overall": overall_table(metrics),
            "per_layer": layer_table(layers),
            "groups": group_table(layers),
        }
        text = kv_variant_text.findings(found, metrics, _notes(metrics))
        tables = {name: _records(frame) for name, frame in found.items()}
        files.write(output / "comparison.csv", found["per_layer"])
        files.write(output / "comparison.json", {"baseline": first, **settings, **tables})
        files.write(output / "key_findings.txt", text)
        files.write(output / "variant_comparison.md", kv_variant_text.page(found, metrics, text))
        track(found, kv_runs.draw(kv_variant_figures.figures(found, text), output), tracker)
    return found["overall"]


def track(found: Mapping[str, pd.DataFrame], drawn: list[Path], tracker: tracking.Tracker) -> None:
    """Send a comparison: the tables under comparison/, one row a layer and part, and the images."""
    tracker.table("comparison/per_layer", _wide(found["per_layer"]))
    tracker.table("comparison/overall", found["overall"])
    for path in drawn:
        if path.suffix == ".png":
            tracker.image(f"comparison/{path.stem.removesuffix('_comparison')}", path)


def overall_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per variant: means over seeds with their sd, and the full model's CE (nats)."""
    rows = []
    for name, of in metrics.items():
        row = {"variant": name, "model": of["model"]["name"], "n_layers": of["n_layers"],
               "n_units": of["n_units"], "n_seeds": len(of["seeds"])}  # fmt: skip
        for key in OVERALL:
            held = of["mean"].get(key) or {}
            row |= {key: held.get("value"), f"{key}_sd": held.get("sd")}
        rows.append(row | {"full_ce": of["full"]["ce"]})
    table = pd.DataFrame(rows)
    measured = [*OVERALL, *(f"{key}_sd" for key in OVERALL)]
    return table.astype(dict.fromkeys(measured, float))  # None becomes nan


def layer_table(layers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every variant's layers beside the baseline's (the first), for K, V and both ("KV").

    Sparsity as a share; deltas are variant minus baseline at the same relative depth, with their
    pooled sd over seeds, and `beyond` where they exceed it twice (missing where there is none).
    """
    rows = max(frame.layer.nunique() for frame in layers.values())
    parts = []
    for name, frame in layers.items():
        seeds = kv_runs.over_seeds(_with_both(frame), ["layer", "part"],
                                   ["total", "kept", "sparsity", "mean_importance"])  # fmt: skip
        seeds["total"] = seeds.total.astype(int)
        depth = (np.arange(rows) + 0.5) / rows
        own = np.floor(depth * frame.layer.nunique()).astype(int)
        at = pd.DataFrame({"row": range(rows), "depth_pct": 100 * depth, "layer": own})
        parts.append(at.merge(seeds.drop(columns="total_sd"), on="layer").assign(variant=name))
    table = pd.concat(parts, ignore_index=True)
    return _against_first(table, ["row", "part"], {"sparsity": "sparsity",
                                                   "mean_importance": "importance"})  # fmt: skip


def group_table(layers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Sparsity of the early, middle and late third of every variant's depth, K and V together."""
    parts = []
    for name, frame in layers.items():
        n_layers = frame.layer.nunique()
        third = np.floor((frame.layer + 0.5) / n_layers * 3).astype(int)
        of = frame.assign(group=[THIRDS[t] for t in third])
        sums = of.groupby(["seed", "group"], sort=False)[["kept", "total"]].sum().reset_index()
        sums["sparsity"] = 1 - sums.kept / sums.total
        ends = of.groupby("group").layer.agg(["min", "max"]).reset_index()
        seeds = kv_runs.over_seeds(sums, ["group"], ["sparsity"]).merge(ends, on="group")
        parts.append(seeds.assign(variant=name))
    table = pd.concat(parts, ignore_index=True)
    return _against_first(table, ["group"], {"sparsity": "sparsity"})


def _check_alike(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    for key in SAME:
        held = {name: of[key] for name, of in metrics.items()}
        if any(value != next(iter(held.values())) for value in held.values()):
            said = "; ".join(f"{name}: {value}" for name, value in held.items())
            raise BadInput(f"runs of different {key.replace('_', ' ')} do not compare ({said})")


def _notes(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings that may differ, and whose difference a reader must know."""
    held = {
        key.replace("_", " "): [str(of[key]) for of in metrics.values()] for key in WORTH_SAYING
    }
    held["held-out documents"] = [str(of["corpus"].get("digest")) for of in metrics.values()]
    return [
        f"{key} ({', '.join(f'{n}: {v}' for n, v in zip(metrics, values, strict=True))})"
        for key, values in held.items() if len(set(values)) > 1
    ]  # fmt: skip


def _with_both(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of K and V, and for every seed and layer those of both together."""
    frame = frame.assign(weighted=frame.mean_importance * frame.total)
    both = frame.groupby(["seed", "layer"])[["kept", "total", "weighted"]].sum().reset_index()
    both["part"] = "KV"
    both["sparsity"] = 1 - both.kept / both.total
    both["mean_importance"] = both.weighted / both.total
    return pd.concat([frame, both], ignore_index=True)


def _against_first(table: pd.DataFrame, by: list[str], columns: Mapping[str, str]) -> pd.DataFrame:
    """Differences to the first variant's rows: <name>_delta, its pooled sd and <name>_beyond."""
    first = table[table.variant == table.variant.iloc[0]]
    held = [*by, "n_seeds", *columns, *(f"{c}_sd" for c in columns)]
    table = table.merge(first[held], on=by, how="left", suffixes=("", "_first"))
    for column, name in columns.items():
        delta = table[column] - table[f"{column}_first"]
        sd = pd.Series([
            kv_runs.pooled_sd(*row) for row in table[
                [f"{column}_sd", "n_seeds", f"{column}_sd_first", "n_seeds_first"]
            ].itertuples(index=False)
        ], dtype=float)  # fmt: skip
        table[f"{name}_delta"], table[f"{name}_delta_sd"] = delta, sd
        table[f"{name}_beyond"] = (delta.abs() > 2 * sd + 1e-9).where(sd.notna())
    table = table.drop(columns=[c for c in table if c.endswith("_first")])
    return table[["variant", *table.columns.drop("variant")]]


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row a layer and part: each variant's numbers, and deltas where it is not the baseline."""
    first, *others = table.variant.unique()
    wide = table[table.variant == first][["row", "depth_pct", "part"]]
    known = {"layer": "layer", "sparsity": "sparsity", "mean_importance": "importance",
             "kept": "channels_kept"}  # fmt: skip
    deltas = ["sparsity_delta", "importance_delta"]
    for name in (first, *others):
        of = table[table.variant == name].set_index(["row", "part"])
        own = of[list(known)].rename(columns=known).add_prefix(f"{name}_")
        wide = wide.merge(own.reset_index(), on=["row", "part"])
        if name != first:
            apart = of[deltas].add_prefix("" if len(others) == 1 else f"{name}_")
            wide = wide.merge(apart.reset_index(), on=["row", "part"])
    return wide


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which knows no nan."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
