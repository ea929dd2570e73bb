"""The pages of one analysed run: figures, report, and what a tracker is sent.

All of it comes from the tables of the run's folder (kv_runs), so `write(folder)` makes every page
again long after the model is gone. The report keeps the headings and lines that its readers know;
what stands under them is defined at its end, and what was not measured is called that.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from lens_utils import files, kv_figures, kv_runs
from lens_utils.kv_runs import number, page_table, spread
from lens_utils.tracking import Tracker

REPORT = "circuit_analysis_report.md"
HISTORY = {
    "train_loss": "loss", "val_kl": "val_kl", "sparsity": "sparsity",
    "target_sparsity": "target_sparsity", "temperature": "temperature", "reg_loss": "reg_loss",
}  # fmt: skip
DEFINITIONS = (
    "All numbers are taken on held-out examples with hard masks: a unit is kept as it is or "
    "replaced. A unit is one gate of the mask.",
    "Sparsity: the share of units replaced, 1 - kept/total.",
    "KL: the mean over scored tokens of KL(full model || masked model), nats per token.",
    "Faithfulness: 1 - KL(mask)/KL(nothing kept). 1 is the full model's distribution, 0 is as far "
    "away as the model without any K and V information; it can be negative.",
    "Loss degradation: 100 (CE(mask) - CE(full))/CE(full), against the true full model. A negative "
    "value means that the masked model predicts the text better than the model it should "
    "stand for: it computes something else.",
    "CE recovered: (CE(nothing kept) - CE(mask))/(CE(nothing kept) - CE(full)).",
    "Completeness: 1 - faithfulness of the complement (everything kept but the mask's units).",
    "Importance: the score that the mask was cut by, scaled so that the model's average unit "
    "has 1. It orders units; it is no causal effect by itself.",
    "Stability: Jaccard overlap of the sets kept by two seeds, and what chance would give.",
)


def figures(folder: Path | str) -> dict[str, go.Figure]:
    """Every figure of a run by file name, from its tables; of a folder of the first plan, which
    has no tables, the maps of its masks. Raises BadInput for no run."""
    folder = Path(folder)
    if is_old(folder):
        masks, metrics = kv_runs.read_masks(folder), {"name": folder.name, "units": {}}
        return {"kv_channel_importance": kv_figures.importance(masks, metrics),
                **kv_figures.layer_maps(masks, metrics)}  # fmt: skip
    metrics, masks = kv_runs.read(folder, "metrics.json"), kv_runs.read_masks(folder)
    return {
        "kv_channel_importance": kv_figures.importance(masks, metrics),
        "sparsity_curves": kv_figures.curves(kv_runs.read(folder, "history.csv"), metrics),
        "faithfulness_frontier": kv_figures.frontier(kv_runs.read(folder, "frontier.csv"), metrics),
        **kv_figures.layer_maps(masks, metrics),
    }


def report(folder: Path | str) -> str:
    """The report of a run as markdown, from its tables. Raises BadInput for no run."""
    folder = Path(folder)
    metrics = kv_runs.read(folder, "metrics.json")
    layers = kv_runs.read(folder, "layers.csv")
    lines = [
        f"# K/V circuit analysis: {metrics['name']}", "", f"**{metrics['verdict']}**", "",
        "## Configuration", "", *_configuration(metrics), "",
        "## Initial (Unpruned)", "", *_losses(metrics["full"], "0.00%"), "",
        "## Final (Pruned)", "", *_final(metrics), "",
        "## Faithfulness", "", *_faithfulness(metrics), "",
        "## Baselines", "", *_baselines(metrics, kv_runs.read(folder, "frontier.csv")), "",
        "## Stability", "", *_stability(metrics), "",
        "## Groups and single units", "",
        *_groups(metrics, folder), "", *_units(kv_runs.read(folder, "units.csv")), "",
        "## Controls", "", *_controls(metrics), "",
        "## Per-Layer Analysis", "", *_per_layer(metrics, layers), "",
        "## Definitions", "", *(f"- {text}" for text in DEFINITIONS), "",
    ]  # fmt: skip
    return "\n".join(lines)


def write(folder: Path | str) -> list[Path]:
    """Draw every figure and write the report into the run's folder; returns what was written."""
    folder = Path(folder)
    drawn = figures(folder)
    if is_old(folder):  # its report stays what it was
        return kv_runs.draw(drawn, folder)
    files.write(folder / REPORT, report(folder))
    return [folder / REPORT, *kv_runs.draw(drawn, folder)]


def is_old(folder: Path) -> bool:
    """Whether a folder was written by the first plan: masks in a .pt, and no metrics.json."""
    return (folder / kv_runs.OLD_MASKS).is_file() and not (folder / "metrics.json").is_file()


def track(folder: Path | str, tracker: Tracker) -> None:
    """Send a finished folder: curves, layers, tables, the images that lie there, and the masks.

    The curves of the run's first seed, whose mask is shipped, have the known names; those of other
    seeds stand beside them, as mechint/seed_1/loss. Raises BadInput for no run.
    """
    folder = Path(folder)
    metrics = kv_runs.read(folder, "metrics.json")
    history, layers = kv_runs.read(folder, "history.csv"), kv_runs.read(folder, "layers.csv")
    masks = kv_runs.read_masks(folder)
    first = metrics["seeds"][0]
    for step, rows in history.groupby("step"):
        values = {}
        for row in rows.to_dict("records"):
            place = "mechint" if row["seed"] == first else f"mechint/seed_{row['seed']}"
            values |= {
                f"{place}/{new}": row[old] for old, new in HISTORY.items() if pd.notna(row[old])
            }
        tracker.log(values, step=int(step))
    shipped = layers[layers.seed == first].groupby("layer")[["kept", "total"]].sum()
    last = {f"mechint/sparsity/{masks[layer].at}": 1 - kept / total
            for layer, kept, total in shipped.itertuples()}  # fmt: skip
    last |= {f"mechint/final/{key}": of["value"] for key, of in metrics["mean"].items()
             if of["value"] is not None}  # fmt: skip
    tracker.log(last)
    summary = layers.assign(
        layer_name=layers.layer.map({layer: mask.at for layer, mask in masks.items()}),
        n_pruned=layers.total - layers.kept,
    ).rename(columns={"total": "n_channels", "kept": "n_kept"})
    tracker.table("mechint/layer_summary", summary)
    for name in ("frontier", "groups", "units"):
        tracker.table(f"mechint/{name}", kv_runs.read(folder, f"{name}.csv"))
    for path in sorted(folder.glob("*.png")):
        tracker.image(f"mechint/viz/{path.stem}", path)
    tracker.artifact(folder / kv_runs.MASKS, "kv_masks")


def _configuration(metrics: Mapping[str, Any]) -> Iterator[str]:
    model, corpus, units = metrics["model"], metrics["corpus"], metrics["units"]
    yield f"- Model: {model['name']} (sha256 {str(model.get('sha256', 'unknown'))[:12]})"
    where = f", source {corpus['source']}" if corpus.get("source") else ""
    yield f"- Data set: {metrics['dataset']}{where}"
    if corpus.get("fallback"):
        yield "- **A fallback stands in for the data set that was asked for.**"
    yield (f"- Held out: {metrics['n_examples']:,} examples, {metrics['n_tokens']:,} scored "
           "tokens")  # fmt: skip
    yield f"- Target sparsity: {100 * metrics['target_sparsity']:.1f}%"
    yield f"- Steps: {metrics['steps']}, learning rate {metrics['lr']}"
    yield (f"- Method: {metrics['method']}, objective {metrics['objective']}, "
           f"replaced by {metrics['fill']}")  # fmt: skip
    said = ", ".join(f"{key} {_yes(value)}" for key, value in units.items())
    first = _yes(metrics["keep_first"])
    yield f"- Units: {metrics['n_units']:,} ({said}, first position kept {first})"
    yield f"- Seeds: {', '.join(str(seed) for seed in metrics['seeds'])}"


def _yes(value: Any) -> str:
    return (
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )


def _losses(of: Mapping[str, float | None], sparsity: str) -> Iterator[str]:
    yield f"- Loss: {number(of['ce'], '.4f')}"
    yield f"- Perplexity: {number(of['perplexity'], '.2f')}"
    yield f"- Bits/byte: {number(of['bits_per_byte'], '.4f')}"
    yield f"- Sparsity: {sparsity}"


def _final(metrics: Mapping[str, Any]) -> Iterator[str]:
    of = metrics["mean"]
    yield f"- Loss: {spread(of['ce'], '.4f')}"
    yield f"- Perplexity: {spread(of['perplexity'], '.2f')}"
    yield f"- Bits/byte: {spread(of.get('bits_per_byte'), '.4f')}"
    kept = f"{metrics['n_kept']:,} of {metrics['n_units']:,} units kept"
    yield f"- Sparsity: {number(100 * of['sparsity']['value'], '.2f')}% ({kept})"


def _faithfulness(metrics: Mapping[str, Any]) -> Iterator[str]:
    of = metrics["mean"]
    yield f"- Loss degradation: {spread(of['loss_degradation'], '+.2f', '%')}"
    achieved, target = 100 * of["sparsity"]["value"], 100 * metrics["target_sparsity"]
    yield f"- Sparsity achieved: {number(achieved, '.1f')}% (target: {target:.1f}%)"
    yield f"- Faithfulness: {spread(of['faithfulness'])}"
    yield f"- KL to the full model: {spread(of['kl'])} nats per token"
    yield f"- KL with nothing kept: {number(metrics['empty']['kl'])} nats per token"
    yield f"- Top-1 agreement: {spread(of['top1'])}"
    yield f"- CE recovered: {spread(of['ce_recovered'])}"
    yield f"- Completeness: {spread(of['completeness'])}"
    if (of["loss_degradation"]["value"] or 0) < 0:
        yield ""
        yield ("**Unfaithful: the loss degradation is negative. The masked model predicts the text "
               "better than the full model, so it computes something else; this is no "
               "improvement.**")  # fmt: skip


def _baselines(metrics: Mapping[str, Any], table: pd.DataFrame) -> Iterator[str]:
    yield f"At {100 * metrics['target_sparsity']:.1f}% sparsity:"
    yield ""
    labels = {key: label for key, (label, _) in kv_figures.RANKINGS.items()}
    held = {"learned": metrics["mean"], **metrics["baselines"]}
    rows = [(ranking, held[ranking]) for ranking in dict.fromkeys((*labels, *held))
            if ranking in held]  # fmt: skip
    yield from page_table(
        ("Ranking", "KL (nats per token)", "Faithfulness"),
        [(labels.get(k, k), spread(of["kl"]), spread(of["faithfulness"])) for k, of in rows],
    )
    means = kv_runs.over_seeds(table, ["ranking", "sparsity"], ["faithfulness"])
    wide = means.pivot(index="ranking", columns="sparsity", values="faithfulness")
    wide = wide.loc[[r for r in dict.fromkeys((*labels, *wide.index)) if r in wide.index]]
    yield ""
    yield "Faithfulness over sparsity (mean over seeds):"
    yield ""
    yield from page_table(
        ("Ranking", *(f"{100 * s:.4g}%" for s in wide.columns)),
        [(labels.get(k, k), *(number(v) for v in row)) for k, *row in wide.itertuples()],
    )


def _stability(metrics: Mapping[str, Any]) -> Iterator[str]:
    of = metrics["stability"]
    if of is None:
        yield "Not measured: one seed has nothing to overlap with."
    else:
        yield (f"- Overlap of the kept sets: Jaccard {number(of['jaccard'])} over {of['pairs']} "
               f"pairs of seeds; by chance {number(of['expected'])}")  # fmt: skip
    yield ""
    yield from page_table(
        ("Seed", "KL", "95% interval", "Faithfulness", "Loss degradation", "KL of its ranking"),
        [
            (row["seed"], number(row["kl"]), f"{number(row['kl_low'])} to {number(row['kl_high'])}",
             number(row["faithfulness"]), number(row["loss_degradation"], "+.2f") + "%",
             f"{number(row['initial_kl'])} ({row['initial_ranking']})")
            for row in metrics["per_seed"]
        ],
    )  # fmt: skip


def _groups(metrics: Mapping[str, Any], folder: Path) -> Iterator[str]:
    of = metrics["minimality"]
    if of is None:
        yield "Groups (layer, part, KV head): not measured."
        return
    yield (f"Of {of['groups']} groups (layer, part, KV head) with kept units, "
           f"{number(100 * of['share_below_1pct'], '.1f')}% can go at less than 1% more KL. "
           "The largest:")  # fmt: skip
    yield ""
    most = kv_runs.read(folder, "groups.csv").sort_values("rise", ascending=False).head(10)
    yield from page_table(
        ("Group", "Kept", "KL without it", "Rise"),
        [(f"layer {g.layer}, {g.part}{g.kv_head}", g.kept, number(g.kl_without),
          number(100 * g.rise, "+.1f") + "%") for g in most.itertuples()],
    )  # fmt: skip


def _units(units: pd.DataFrame) -> Iterator[str]:
    measured = units.dropna(subset=["score", "measured_kl"])
    if measured.score.nunique() < 3 or measured.measured_kl.nunique() < 3:
        yield "Single units: not measured."
        return
    rho = measured.score.corr(measured.measured_kl, method="spearman")
    yield (f"Single units: over {len(measured)} of them, score and the KL measured with that unit "
           f"alone replaced have a rank correlation of {number(rho, '+.2f')}.")  # fmt: skip


def _controls(metrics: Mapping[str, Any]) -> Iterator[str]:
    if not metrics["controls"]:
        yield "Not measured."
        return
    said = {"shuffled": "shuffled task", "random_weights": "random weights"}
    yield ("The same search where there is nothing to find; a learned mask far better than a "
           "random one here finds masks, not circuits.")  # fmt: skip
    yield ""
    keys = ("learned_kl", "random_kl", "empty_kl")
    yield from page_table(
        ("Control", "KL learned", "KL random", "KL nothing kept"),
        [(said.get(name, name), *(number(of.get(key)) for key in keys))
         for name, of in metrics["controls"].items() if of],
    )  # fmt: skip


def _per_layer(metrics: Mapping[str, Any], layers: pd.DataFrame) -> Iterator[str]:
    first = metrics["seeds"][0]
    yield f"The shipped mask (seed {first}); channels kept are counted in units of the mask."
    yield ""
    rows = layers[layers.seed == first].sort_values(["layer", "part"])
    yield from page_table(
        ("Layer", "Part", "Sparsity", "Mean Importance", "Channels Kept"),
        [(r.layer, r.part, number(100 * r.sparsity, ".1f") + "%", number(r.mean_importance),
          f"{r.kept}/{r.total}") for r in rows.itertuples()],
    )  # fmt: skip
