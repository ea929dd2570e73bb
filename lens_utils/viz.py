"""Figures from tables: one look for all notebooks, and `keep` to put them on disk.

Colours are Okabe and Ito's, told apart by colour-blind readers. A title states the finding; axes
carry their units.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from jaxtyping import Float
from numpy import ndarray
from plotly.offline import get_plotlyjs

from lens_utils import files

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
AXIS = {"gridcolor": "#E8E8E8", "linecolor": "#444", "ticks": "outside", "zeroline": False}

pio.templates["lab"] = go.layout.Template(
    layout={
        "font": {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 17}},
        "colorway": COLOURS,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": AXIS,
        "yaxis": AXIS,
        "margin": {"l": 75, "r": 25, "t": 75, "b": 60},
        "legend": {"bgcolor": "rgba(255,255,255,0.8)"},
        "width": 1000,
        "height": 520,
    }
)
pio.templates.default = "lab"


def add_band(
    fig: go.Figure,
    frame: pd.DataFrame,
    name: str,
    colour: str,
    x: str = "depth_pct",
    dash: str = "solid",
    showlegend: bool = True,
    **place: int,
) -> None:
    """A mean curve with its interval: columns mean, low and high of `frame` against x."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    across = pd.concat([frame[x], frame[x][::-1]])
    around = pd.concat([frame.high, frame.low[::-1]])
    shade = {"fill": "toself", "fillcolor": f"rgba({r},{g},{b},0.18)", "line": {"width": 0}}
    fig.add_scatter(x=across, y=around, hoverinfo="skip", showlegend=False, legendgroup=name,
                    **shade, **place)  # fmt: skip
    fig.add_scatter(x=frame[x], y=frame["mean"], name=name, legendgroup=name, mode="lines",
                    showlegend=showlegend, line={"color": colour, "width": 2.5, "dash": dash},
                    **place)  # fmt: skip


def add_estimates(
    fig: go.Figure, estimates: Mapping[str, Mapping[str, float]], name: str, colour: str
) -> None:
    """Bars of estimates (value, low, high), one per label, with their intervals."""
    found = pd.DataFrame(estimates).T
    fig.add_bar(
        x=list(estimates),
        y=found.value,
        name=name,
        marker_color=colour,
        error_y={"symmetric": False, "array": found.high - found.value,
                 "arrayminus": found.value - found.low},
    )  # fmt: skip


def add_matrix(
    fig: go.Figure,
    matrix: Float[ndarray, "row row"],
    labels: list[str],
    low: float | int,
    high: float | int,
    unit: str,
    colours: str = "Viridis",
    bar: Mapping[str, float] | None = None,
    **place: int,
) -> None:
    """A square matrix, one byte per cell: 1.8 MB of page for 1,152 heads instead of 20.

    Values are shown from `low` to `high` in 255 shades; where there is none, the middle one is.
    """
    share = np.clip((np.asarray(matrix, float) - low) / (high - low), 0, 1)
    shades = np.nan_to_num(share * 254, nan=127).round().astype(np.uint8)
    ticks = np.linspace(0, 254, 5)
    texts = [f"{low + (high - low) * t / 254:.3g}" for t in ticks]
    fig.add_heatmap(
        z=shades, x=labels, y=labels, zmin=0, zmax=254, colorscale=colours,
        colorbar={"title": unit, "tickvals": ticks, "ticktext": texts, "thickness": 12,
                  **(bar or {})},
        hovertemplate="%{y} with %{x}: shade %{z} of 254<extra></extra>", **place,
    )  # fmt: skip
    fig.update_xaxes(showgrid=False, **place)
    fig.update_yaxes(autorange="reversed", showgrid=False, **place)


def token_table(
    p: pd.DataFrame, tokens: pd.DataFrame, framed: pd.DataFrame, title: str
) -> go.Figure:
    """Tokens shaded by their probability, some of them framed; three tables of one shape."""
    fig = go.Figure(
        go.Heatmap(
            z=p,
            x=[f"top {rank}" for rank in p.columns],
            y=list(p.index),
            colorscale=[[0, "#F7FBFF"], [0.5, "#6BAED6"], [1, "#08519C"]],
            zmin=0,
            zmax=1,
            colorbar={"title": "probability"},
            hovertemplate="%{y}, %{x}: p = %{z:.6f}<extra></extra>",
        )
    )
    for i in range(p.shape[0]):
        for j in range(p.shape[1]):
            value = p.iloc[i, j]
            label = f"{shown(tokens.iloc[i, j])} <i>{value:.2f}</i>"
            colour = "white" if value > 0.45 else "#222"
            fig.add_annotation(x=j, y=i, text=label, showarrow=False,
                               font={"size": 12, "color": colour})  # fmt: skip
            if framed.iloc[i, j]:
                fig.add_shape(type="rect", x0=j - 0.5, x1=j + 0.5, y0=i - 0.5, y1=i + 0.5,
                              line={"color": RED, "width": 2.5})  # fmt: skip
    fig.update_yaxes(autorange="reversed", showgrid=False, type="category")
    fig.update_xaxes(side="top", showgrid=False)
    fig.update_layout(title=title, height=150 + 27 * len(p), margin={"l": 130, "t": 100})
    return fig


def shown(token: str, longest: int = 14) -> str:
    """A token as a reader sees it: spaces marked, line breaks named, HTML harmless."""
    text = token.replace("\n", "⏎").replace("\t", "⇥")
    text = "·" + text[1:] if text.startswith(" ") else text
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def log_ticks(fig: go.Figure, top: float | int, **place: int) -> None:
    """Label a y axis of log10 ranks with the ranks, best on top."""
    powers = list(range(math.ceil(top) + 1))
    labels = ["1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]
    fig.update_yaxes(tickvals=powers, ticktext=labels[: len(powers)], autorange="reversed", **place)


def keep(figures: Mapping[str, go.Figure], run_dir: str | Path) -> str:
    """Write figures to run_dir/figures: HTML always, PNG (and PDF of full runs) with a browser.

    All images go through one browser start. Returns one line that says what was written.
    """
    folder = Path(run_dir) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(run_dir).parent.parent / "plotly.min.js"
    if not script.exists():
        files.write_bytes(script, get_plotlyjs().encode())
    for name, fig in figures.items():
        html = fig.to_html(include_plotlyjs="../../../plotly.min.js", full_html=True)
        files.write_bytes(folder / f"{name}.html", html.encode())
    quick = files.read(Path(run_dir) / "manifest.json")["quick"]
    formats = ("png",) if quick else ("png", "pdf")
    jobs = [(fig, folder / f"{name}.{kind}") for kind in formats for name, fig in figures.items()]
    for _, path in jobs:
        path.unlink(missing_ok=True)  # an old image must not stand for one that fails
    written = f"{len(figures)} figures in {folder}: HTML"
    default = pio.templates["lab"].layout
    try:
        # The export does not look at the figures' own sizes.
        pio.write_images(
            fig=[fig for fig, _ in jobs],
            file=[path for _, path in jobs],
            width=[fig.layout.width or default.width for fig, _ in jobs],
            height=[fig.layout.height or default.height for fig, _ in jobs],
            scale=1.5,
        )
        if lost := [path.name for _, path in jobs if not path.exists()]:
            raise RuntimeError(f"not drawn: {', '.join(lost)}")  # the export keeps errors quiet
    except Exception as error:  # kaleido raises plain and own types when it finds no browser
        if "chrome" not in str(error).lower() and "browser" not in str(error).lower():
            raise
        return f"{written}. For PNG install Chrome or Chromium (Debian: apt install chromium)"
    return f"{written}, {', '.join(kind.upper() for kind in formats)}"
