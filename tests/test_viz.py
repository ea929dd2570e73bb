"""Figures whose size or content the shared drawing functions decide."""

import numpy as np
import plotly.graph_objects as go
import pytest

from lens_utils import viz


def test_a_matrix_of_1152_heads_is_a_small_page():
    """One byte a cell: below 2 MB, where plain numbers take ten times that."""
    rng = np.random.default_rng(0)
    matrix = rng.gamma(2.0, 0.02, (1152, 1152))
    labels = [f"L{n // 32}H{n % 32}" for n in range(1152)]
    fig = go.Figure()
    viz.add_matrix(fig, matrix, labels, 0.0, 0.2, "nats")
    page = fig.to_html(include_plotlyjs="plotly.min.js", full_html=True)  # as viz.keep writes it
    assert len(page.encode()) < 2_000_000


def test_shades_of_a_matrix_are_its_values():
    matrix = np.array([[0.0, 0.5], [1.0, np.nan]])
    fig = go.Figure()
    viz.add_matrix(fig, matrix, ["a", "b"], 0.0, 1.0, "nats")
    (heatmap,) = fig.data
    shades = np.asarray(heatmap.z, float)
    assert shades[0, 0] == 0 and shades[1, 0] == 254
    assert shades[0, 1] == pytest.approx(127) and shades[1, 1] == pytest.approx(127)
    assert heatmap.colorbar.title.text == "nats" and heatmap.colorbar.ticktext[-1] == "1"
