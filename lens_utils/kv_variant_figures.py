"""A comparison of variants in pictures, from its tables (kv_variants)."""

import textwrap
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_utils import viz
from lens_utils.kv_variant_text import compared, is_similar, less_or_more

PARTS = {"K": "K", "V": "V"}


def figures(found: Mapping[str, pd.DataFrame], text: str) -> dict[str, go.Figure]:
    """Every figure of a comparison by its known file name."""
    layers = found["per_layer"]
    return {
        "overall_summary": summary(found["overall"]),
        "delta_heatmap": delta_heatmap(layers),
        "key_findings": as_picture(text),
        "sparsity_comparison": profiles(layers, "sparsity", "sparsity (%)", 100,
                                        _most(layers, "sparsity", "least", "sparse", 100, " %")),
        "importance_comparison": profiles(
            layers, "mean_importance", "mean importance<br>(1 = average unit)", 1,
            _most(layers, "mean_importance", "most", "important", 1, "")),
        "channels_comparison": profiles(
            layers, "kept", "units kept", 1, _most(layers, "kept", "most", "kept", 1, " units")),
    }  # fmt: skip


def summary(overall: pd.DataFrame) -> go.Figure:
    """Loss degradation, faithfulness and sparsity of every variant, with the sd over seeds."""
    shown = (("loss_degradation", "loss degradation (%)", 1, "+.1f"),
             ("faithfulness", "faithfulness", 1, ".2f"),
             ("sparsity", "sparsity achieved (%)", 100, ".1f"))  # fmt: skip
    fig = make_subplots(1, 3, subplot_titles=[label for _, label, _, _ in shown],
                        horizontal_spacing=0.08)  # fmt: skip
    colours = [viz.COLOURS[n % len(viz.COLOURS)] for n in range(len(overall))]
    for column, (key, _, scale, form) in enumerate(shown, 1):
        values, bars = scale * overall[key], scale * overall[f"{key}_sd"]
        sds = bars.fillna(0)
        fig.add_bar(
            x=overall.variant, y=values, marker_color=colours, showlegend=False,
            error_y={"array": bars, "visible": bool(bars.any())}, row=1, col=column,
        )  # fmt: skip
        low, high = min(0, (values - sds).min()), max(0, (values + sds).max())
        room = 0.12 * ((high - low) or 1)
        for name, value, sd in zip(overall.variant, values, sds, strict=True):
            up = value >= 0
            fig.add_annotation(
                x=name, y=value + sd if up else value - sd, text=f"{value:{form}}",
                showarrow=False, yanchor="bottom" if up else "top", row=1, col=column,
            )  # fmt: skip
        fig.update_yaxes(range=[low - room * (low < 0), high + room], row=1, col=column)
    fig.update_xaxes(showgrid=False, type="category")
    seeds = "± sd over seeds" if overall.n_seeds.max() > 1 else "one seed, no error bars"
    title = {"text": _summary_title(overall), "subtitle": {"text": seeds}}
    fig.update_layout(title=title, width=1100, margin={"t": 125}, bargap=0.35)
    return fig


def _summary_title(overall: pd.DataFrame) -> str:
    said = []
    for name in overall.variant[1:]:
        of, base, sd = compared(overall, name, "faithfulness")
        delta = of.faithfulness - base.faithfulness
        similar = is_similar(delta, sd)
        if similar is None:
            said.append(f"{name} {delta:+.2f} (one seed)")
        else:
            said.append(f"{name} similar" if similar else f"{name} {delta:+.2f}")
    line = f"Faithfulness against {overall.variant[0]}: {', '.join(said)}"
    return "<br>".join(textwrap.wrap(line, 95))


def delta_heatmap(layers: pd.DataFrame) -> go.Figure:
    """Sparsity minus the baseline's: layers x (variant, part), in points."""
    first, *others = layers.variant.unique()
    of = layers[layers.variant.isin(others) & layers.part.isin(PARTS)].copy()
    of["column"] = of.variant + " " + of.part
    columns = [f"{name} {part}" for name in others for part in PARTS]
    delta = 100 * of.pivot(index="row", columns="column", values="sparsity_delta")[columns]
    of["bold"] = of.sparsity_beyond.fillna(False).astype(bool)
    bold = of.pivot(index="row", columns="column", values="bold")[columns]
    texts = [
        [f"<b>{d:+.1f}</b>" if b else f"{d:+.1f}" for d, b in zip(ds, bs, strict=True)]
        for ds, bs in zip(delta.to_numpy(), bold.to_numpy(), strict=True)
    ]
    largest = float(delta.abs().to_numpy().max())
    label, values = _axis(layers)
    fig = go.Figure(
        go.Heatmap(
            z=delta.to_numpy(), x=columns, y=[str(v) for v in values], text=texts,
            texttemplate="%{text}", colorscale="RdBu_r", zmin=-(largest or 1), zmax=largest or 1,
            colorbar={"title": "points", "thickness": 14},
        )
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False,
                     title={"text": label, "standoff": 12})  # fmt: skip
    fig.update_xaxes(type="category", side="top", showgrid=False, ticks="")
    row = of.loc[of.sparsity_delta.abs().idxmax()]
    said = (f"{row.column} is {less_or_more(100 * row.sparsity_delta)} in layer {row.layer}"
            if largest else "no difference")  # fmt: skip
    bars = of.sparsity_delta_sd.notna().any()
    note = "bold: beyond 2 pooled sd over seeds" if bars else "one seed each: no error bars"
    fig.update_layout(
        title={"text": f"Sparsity against {first}, largest difference:<br>{said}",
               "subtitle": {"text": f"points of sparsity; {note}"}},
        width=max(760, 260 + 110 * len(columns)), height=230 + 26 * max(len(delta), 6),
        margin={"t": 155, "b": 40, "l": 95},
    )  # fmt: skip
    return fig


def profiles(
    layers: pd.DataFrame, column: str, unit: str, scale: float | int, title: str
) -> go.Figure:
    """One quantity over depth, K above V, a line a variant with its sd over seeds."""
    fig = make_subplots(2, 1, shared_xaxes=True, subplot_titles=list(PARTS), vertical_spacing=0.09)
    label, _ = _axis(layers)
    for n, name in enumerate(layers.variant.unique()):
        colour = viz.COLOURS[n % len(viz.COLOURS)]
        for row, part in enumerate(PARTS, 1):
            of = layers[(layers.variant == name) & (layers.part == part)]
            of = of.drop_duplicates("layer").sort_values("layer")
            depth = of.layer if label == "layer" else 100 * (of.layer + 0.5) / len(of)
            sds = scale * of[f"{column}_sd"]
            fig.add_scatter(
                x=depth, y=scale * of[column], mode="lines+markers", name=name,
                legendgroup=name, showlegend=row == 1, line={"color": colour, "width": 1.8},
                error_y={"array": sds, "visible": bool(sds.any()), "thickness": 1.2, "width": 3},
                row=row, col=1,
            )  # fmt: skip
    fig.update_yaxes(title=unit)
    fig.update_xaxes(title=label, row=2)
    if label == "layer":
        last = int(layers.layer.max())
        fig.update_xaxes(dtick=1 if last <= 40 else 5, range=[-0.5, last + 0.5],
                         tickfont={"size": 12})  # fmt: skip
    seeds = "± sd over seeds" if layers.n_seeds.max() > 1 else "one seed, no error bars"
    fig.update_layout(title={"text": title, "subtitle": {"text": seeds}}, height=680, width=1100,
                      margin={"t": 125 + 22 * title.count("<br>"), "b": 75, "l": 90})  # fmt: skip
    return fig


def _axis(layers: pd.DataFrame) -> tuple[str, list[str]]:
    """The name of the depth axis and its rows: layers, or per cent where depths differ."""
    rows = layers[["row", "depth_pct"]].drop_duplicates().sort_values("row")
    if layers.groupby("variant").layer.nunique().nunique() == 1:
        return "layer", [str(row) for row in rows.row]
    return "relative depth (%)", [f"{depth:.1f}" for depth in rows.depth_pct]


def _most(layers: pd.DataFrame, column: str, which: str, word: str, scale: int, unit: str) -> str:
    """Where each variant has its extreme, K or V."""
    said = []
    for name in layers.variant.unique():
        of = layers[(layers.variant == name) & layers.part.isin(PARTS)]
        row = of.loc[of[column].idxmin() if which == "least" else of[column].idxmax()]
        value = f"{scale * row[column]:.3g}"
        where = f"{name}: {row.part} of layer {row.layer} ({value}{unit})"
        said.append(where.replace(" ", "\N{NO-BREAK SPACE}"))
    return "<br>".join(textwrap.wrap(f"{which.capitalize()} {word} in {', '.join(said)}", 95))


def as_picture(text: str) -> go.Figure:
    """The key findings as they are written, wrapped to the page."""
    title, _, *lines = text.rstrip().split("\n")
    wrapped = []
    for line in lines:
        indent = "  " if line.startswith("- ") else ""
        wrapped += textwrap.wrap(line, 112, subsequent_indent=indent) or [""]
    fig = go.Figure()
    harmless = [line.replace("&", "&amp;").replace("<", "&lt;") for line in wrapped]
    body = "<br>".join(line.replace("  ", "&nbsp;&nbsp;") or "&nbsp;" for line in harmless)
    fig.add_annotation(
        x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="top", align="left",
        text=body, showarrow=False, font={"size": 14},
    )  # fmt: skip
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    height = 110 + 19 * len(wrapped)
    fig.update_layout(title=title, height=height, margin={"l": 25, "t": 70, "b": 20})
    return fig
