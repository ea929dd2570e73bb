"""Pictures of one analysed run of K/V masks.

Channel maps show two things at once: a channel's rank among all channels of the model (its score
is what the mask was cut by), and whether the mask keeps it: kept ones in colour, replaced ones in
grey. Ranks, because scores of different methods have different scales and long tails.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_utils import viz
from lens_utils.kv_runs import LayerMask, number, over_seeds, ranks

RANKINGS = {
    "learned": ("learned", viz.BLUE), "fisher": ("Fisher", viz.ORANGE),
    "ig": ("integrated gradients", viz.GREEN), "taylor": ("Taylor", viz.RED),
    "magnitude": ("magnitude, per layer", viz.PURPLE),
    "magnitude_global": ("magnitude, whole model", viz.SKY), "random": ("random", viz.GREY),
}  # fmt: skip
GREYS = [[0, "#FBFBFB"], [1, "#8C8C8C"]]
KEPT = [[0, "#F2C14E"], [0.5, "#D1495B"], [1, "#3B0F70"]]


def _percent(share: Real, digits: int = 1) -> str:
    """95 % and 97.5 %: no zeros behind the point."""
    return f"{100 * share:.{digits}f}".rstrip("0").rstrip(".") + " %"


def _add_map(fig: go.Figure, layer: LayerMask, rank: dict, parts: str, **place: int) -> None:
    """Heads x channels of K, V or both, one under the other: replaced grey, kept in colour."""
    gap = np.full((1, layer.mask["K"].shape[1]), np.nan)  # an empty row, neither of the two

    def stacked(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([row for array in arrays for row in (array, gap)][:-1])

    kept = stacked([layer.mask[part] for part in parts])
    shown = stacked([rank[layer.at, part] for part in parts])
    heads = [f"{part}{head}" for part in parts for head in range(len(layer.mask[part]))]
    if len(parts) > 1:
        heads.insert(len(layer.mask["K"]), " ")
    for which, axis, said in ((kept <= 0.5, "coloraxis", "replaced"),
                              (kept > 0.5, "coloraxis2", "kept")):  # fmt: skip
        fig.add_heatmap(
            z=np.where(which, shown, np.nan), y=heads, coloraxis=axis, hoverongaps=False,
            hovertemplate=f"{layer.at} %{{y}}, channel %{{x}}: rank %{{z:.3f}}, {said}"
            "<extra></extra>", **place,
        )  # fmt: skip


def _ranked(masks: Mapping[int, LayerMask]) -> dict[tuple[str, str], np.ndarray]:
    keys = [(layer.at, part) for layer in masks.values() for part in "KV"]
    found = ranks(layer.score[part] for layer in masks.values() for part in "KV")
    return dict(zip(keys, found, strict=True))


def _scales(cut: float, length: float) -> dict[str, Any]:
    """The two colour bars beside a map: kept above, replaced below."""
    bar = {"thickness": 14, "len": length, "x": 1.01, "xanchor": "left", "lenmode": "fraction",
           "tickformat": ".3~f", "nticks": 4, "tickfont": {"size": 12},
           "title": {"side": "top", "font": {"size": 12}}}  # fmt: skip
    low, high = ({"y": 0, "yanchor": "bottom"}, {"y": 1, "yanchor": "top"})
    return {
        "coloraxis": {"colorscale": GREYS, "cmin": 0, "cmax": 1,
                      "colorbar": bar | low | {"title_text": "replaced:<br>rank"}},
        "coloraxis2": {"colorscale": KEPT, "cmin": cut, "cmax": 1,
                       "colorbar": bar | high | {"title_text": "kept:<br>rank"}},
    }  # fmt: skip


def _least_kept(masks: Mapping[int, LayerMask], rank: dict) -> float:
    """Where the colours of kept channels begin; below it is only what a rule kept by force."""
    values = [rank[m.at, part][m.mask[part] > 0.5] for m in masks.values() for part in "KV"]
    values = np.concatenate(values)
    return min(float(np.quantile(values, 0.01)), 0.99) if values.size else 0.99


def _across(units: Mapping[str, Any]) -> str:
    """What lies along the channel axis."""
    return "channel" if units.get("basis", "raw") == "raw" else f"{units['basis']} direction"


def importance(masks: Mapping[int, LayerMask], metrics: Mapping[str, Any]) -> go.Figure:
    """Every layer's heads x channels, K above V."""
    columns = next(n for n, most in ((1, 1), (2, 6), (3, 15), (5, 40), (6, 10**6))
                   if len(masks) <= most)  # fmt: skip
    rows = -(-len(masks) // columns)
    rank = _ranked(masks)
    heads = sum(len(m) for m in next(iter(masks.values())).mask.values())
    each = max(70, 16 * heads, 300 // rows - 40)
    height = 170 + rows * (each + 40)
    fig = make_subplots(
        rows, columns, subplot_titles=[f"layer {layer}" for layer in masks],
        horizontal_spacing=0.03 if columns > 1 else 0, vertical_spacing=40 / (rows * (each + 40)),
    )  # fmt: skip
    for n, mask in enumerate(masks.values()):
        place = {"row": n // columns + 1, "col": n % columns + 1}
        _add_map(fig, mask, rank, "KV", **place)
        fig.update_yaxes(showticklabels=place["col"] == 1, **place)
        fig.update_xaxes(showticklabels=n + columns >= len(masks), **place)
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="", tickfont={"size": 10})
    fig.update_xaxes(showgrid=False, tickfont={"size": 10})
    fig.update_annotations(font={"size": 12})
    scales = _scales(_least_kept(masks, rank), min(0.45, 230 / (height - 170)))
    share = {part: np.mean([m.mask[part].mean() for m in masks.values()]) for part in "KV"}
    most = max(masks, key=lambda layer: sum(m.sum() for m in masks[layer].mask.values()))
    across = _across(metrics["units"])
    fig.update_layout(
        title={
            "text": f"{metrics['name']}: the mask keeps {_percent(share['K'])} of K and "
            f"{_percent(share['V'])} of V, most in layer {most}",
            "subtitle": {"text": f"rows: KV heads, columns: {across}s; colour: rank of the score "
                         "among all channels of the model"},
        },
        width=1250 if columns > 1 else 1000, height=height,
        margin={"t": 120, "b": 50, "l": 50, "r": 110}, **scales,
    )  # fmt: skip
    return fig


def layer_maps(masks: Mapping[int, LayerMask], metrics: Mapping[str, Any]) -> dict[str, go.Figure]:
    """One figure a layer, under the layer's own name with dots as underscores."""
    rank, across = _ranked(masks), _across(metrics["units"])
    cut, figures = _least_kept(masks, rank), {}
    for layer, mask in masks.items():
        heads = {part: len(mask.mask[part]) for part in "KV"}
        fig = make_subplots(2, 1, shared_xaxes=True, row_heights=[heads["K"], heads["V"]],
                            vertical_spacing=0.06)  # fmt: skip
        kept = []
        for row, part in enumerate("KV", 1):
            _add_map(fig, mask, rank, part, row=row, col=1)
            kept.append(f"{int(mask.mask[part].sum())} of {mask.mask[part].size} {part}")
        height = 250 + 24 * max(sum(heads.values()), 5)
        fig.update_yaxes(autorange="reversed", showgrid=False, ticks="")
        fig.update_xaxes(showgrid=False)
        fig.update_xaxes(title=across, row=2)
        title = {"text": f"{metrics['name']}, layer {layer}: kept {' and '.join(kept)} {across}s",
                 "subtitle": {"text": "rows: KV heads; colour: rank of the score among all "
                              "channels of the model"}}  # fmt: skip
        margin = {"t": 100, "r": 110}
        fig.update_layout(title=title, height=height, margin=margin, **_scales(cut, 0.46))
        figures[f"{mask.at.replace('.', '_')}_importance"] = fig
    return figures


def curves(history: pd.DataFrame, metrics: Mapping[str, Any]) -> go.Figure:
    """Training loss, validation KL and sparsity against its target, a line a seed."""
    fig = make_subplots(3, 1, shared_xaxes=True, vertical_spacing=0.06)
    seeds = list(history.seed.unique())
    for n, seed in enumerate(seeds):
        of = history[history.seed == seed].sort_values("step")
        checked = of[of.val_kl.notna()]
        line = {"color": viz.COLOURS[n % len(viz.COLOURS)]}
        fig.add_scatter(x=of.step, y=of.train_loss, line=line | {"width": 1.2}, mode="lines",
                        name=f"seed {seed}", legendgroup=str(seed), row=1, col=1)  # fmt: skip
        fig.add_scatter(x=checked.step, y=checked.val_kl, mode="lines+markers", line=line,
                        legendgroup=str(seed), showlegend=False, row=2, col=1)  # fmt: skip
        fig.add_scatter(x=of.step, y=100 * of.sparsity, line=line, mode="lines",
                        legendgroup=str(seed), showlegend=False, row=3, col=1)  # fmt: skip
    first = history[history.seed == seeds[0]].sort_values("step")
    fig.add_scatter(x=first.step, y=100 * first.target_sparsity, mode="lines", name="target",
                    line={"color": "#222", "dash": "dash", "width": 1.5}, row=3, col=1)  # fmt: skip
    fig.update_yaxes(title="training loss", row=1)
    fig.update_yaxes(title="validation KL<br>(nats per token)", row=2)
    fig.update_yaxes(title="sparsity (%)", row=3)
    fig.update_xaxes(title="step", row=3)
    checked = history[history.val_kl.notna()].sort_values("step").groupby("seed").val_kl
    if checked.ngroups:
        began, ended = checked.first().mean(), checked.last().mean()
        said = f"validation KL from {began:.2f} to {ended:.2f} nats"
    else:
        said = "no validation KL"
    steps = int(history.step.max())
    of = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    fig.update_layout(
        title=f"{metrics['name']}: {said} in {steps} steps ({of})",
        height=780, margin={"l": 90, "b": 75},
    )  # fmt: skip
    return fig


def frontier(table: pd.DataFrame, metrics: Mapping[str, Any]) -> go.Figure:
    """Faithfulness of every ranking over the share of units kept, on a log scale.

    Where nothing is kept faithfulness is 0 by definition; that point is not on the scale.
    """
    table = table[table.sparsity < 1]
    rows = over_seeds(table, ["ranking", "sparsity"], ["faithfulness"]).sort_values("sparsity")
    fig = go.Figure()
    fig.add_hline(0, line={"color": "#BBB", "width": 1})
    chosen = [r for r in RANKINGS if r in set(rows.ranking)]
    chosen += sorted(set(rows.ranking) - set(chosen))
    for ranking in chosen:
        label, colour = RANKINGS.get(ranking, (ranking, "#222"))
        of = rows[rows.ranking == ranking].rename(columns={"faithfulness": "mean"})
        n = int(of.n_seeds.max())
        if n > 1:
            of = of.assign(kept=1 - of.sparsity, low=of["mean"] - of.faithfulness_sd.fillna(0),
                           high=of["mean"] + of.faithfulness_sd.fillna(0))  # fmt: skip
            viz.add_band(fig, of, f"{label} ({n} seeds, ± sd)", colour, x="kept")
            fig.data[-2].mode = "lines"
            fig.data[-1].mode = "lines+markers"
        else:
            fig.add_scatter(x=1 - of.sparsity, y=of["mean"], name=label, mode="lines+markers",
                            line={"color": colour, "width": 1.6})  # fmt: skip
    swept = sorted(table.sparsity.unique())
    fig.update_xaxes(type="log", autorange="reversed", title="sparsity (log scale of what is kept)",
                     tickvals=[1 - s for s in swept],
                     ticktext=[_percent(s) for s in swept])  # fmt: skip
    fig.update_yaxes(title="faithfulness (1 = the full model)")
    fig.update_layout(title=_frontier_title(rows, metrics), height=560, margin={"t": 90})
    return fig


def _frontier_title(rows: pd.DataFrame, metrics: Mapping[str, Any]) -> str:
    """What the lines show at the target, or where that was not swept at the nearest sparsity."""
    swept = rows.sparsity.unique()
    at = swept[np.abs(swept - metrics["target_sparsity"]).argmin()]
    found = rows[rows.sparsity == at].set_index("ranking").faithfulness
    said = [f"learned {number(found['learned'], '.2f')}"] if "learned" in found else []
    others = found.drop([r for r in ("learned", "random") if r in found])
    if len(others):
        label = RANKINGS.get(others.idxmax(), (others.idxmax(),))[0]
        said.append(f"best other ranking ({label}) {number(others.max(), '.2f')}")
    if "random" in found:
        said.append(f"random {number(found['random'], '.2f')}")
    return f"{metrics['name']}, faithfulness at {_percent(at)} sparsity:<br>{', '.join(said)}"
