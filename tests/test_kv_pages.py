"""Figures and report of an analysed run: what they show is what its tables hold."""

import re

import numpy as np
import pytest
from kv_tables import build

from lens_utils import files, kv_pages, kv_runs, kv_variant_figures, kv_variants
from lens_utils.errors import BadInput

TABLES = ("metrics.json", "history.csv", "layers.csv", "frontier.csv", "groups.csv", "units.csv",
          "final_masks.safetensors")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve layers, two seeds, GPT-2's names."""
    folder = tmp_path_factory.mktemp("run")
    return build(folder, layers=12, heads=3, channels=16, seeds=(5, 6), prefix="transformer.h")


@pytest.fixture(scope="module")
def figures(run):
    return kv_pages.figures(run)


def change(folder, **new):
    files.write(folder / "metrics.json", files.read(folder / "metrics.json") | new)


def shown(figure, which: int) -> np.ndarray:
    """One heatmap's cells as numbers, nan where there is none."""
    return np.array(figure.data[which].z, dtype=float)


# Figures


def test_figures_have_the_known_names_in_numeric_order(figures):
    layers = [f"transformer_h_{n}_attn_importance" for n in range(12)]
    assert list(figures) == [
        "kv_channel_importance", "sparsity_curves", "faithfulness_frontier", *layers
    ]  # fmt: skip


def test_maps_colour_what_the_mask_keeps_and_grey_the_rest(run, figures):
    held = files.read(run / "final_masks.safetensors")
    titles = [a.text for a in figures["kv_channel_importance"].layout.annotations]
    assert titles == [f"layer {n}" for n in range(12)]
    for layer in (2, 10):  # sorted as text, 10 would stand second
        k, v = (held[f"transformer.h.{layer}.attn.{part}_mask"].numpy() > 0.5 for part in "kv")
        whole = figures["kv_channel_importance"]
        grey, colour = shown(whole, 2 * layer), shown(whole, 2 * layer + 1)
        between = np.zeros((1, 16), bool)  # an empty row
        assert (~np.isnan(colour) == np.concatenate([k, between, v])).all()
        assert (~np.isnan(grey) == np.concatenate([~k, between, ~v])).all()
        own = figures[f"transformer_h_{layer}_attn_importance"]
        assert (~np.isnan(shown(own, 3)) == v).all()
        assert f"{v.sum()} of 48 V" in own.layout.title.text


def test_ranks_by_hand():
    first, second = kv_runs.ranks([np.array([[3.0, 1.0]]), np.array([[1.0, 9.0], [5.0, -2.0]])])
    assert first.tolist() == [[0.6, pytest.approx(0.3)]]  # the two ones share ranks 2 and 3 of 6
    assert second.tolist() == [[pytest.approx(0.3), 1.0], [0.8, 0.0]]


def test_the_frontier_shows_means_and_sd_over_seeds(run, figures):
    table = files.read(run / "frontier.csv")
    fig = figures["faithfulness_frontier"]
    of = table[(table.ranking == "random") & (table.sparsity == 0.9)].faithfulness
    (line,) = (t for t in fig.data if t.name == "random (5 seeds, ± sd)")
    at = int(np.argmin(np.abs(np.array(line.x) - 0.1)))
    assert line.y[at] == pytest.approx(np.mean(of))
    band = fig.data[fig.data.index(line) - 1]
    assert max(band.y[n] for n, x in enumerate(band.x) if np.isclose(x, 0.1)) == pytest.approx(
        np.mean(of) + np.std(of, ddof=1)
    )
    assert {t.name for t in fig.data if t.name} >= {"Fisher", "Taylor", "magnitude, per layer"}
    at_target = table[(table.sparsity == 0.95)].groupby("ranking").faithfulness.mean()
    assert f"learned {at_target['learned']:.2f}, best other ranking (Fisher) " in (
        fig.layout.title.text
    )


def test_curves_join_only_the_steps_that_were_validated(run, figures):
    fig = figures["sparsity_curves"]
    history = files.read(run / "history.csv")
    assert len(fig.data[0].x) == 51 and list(fig.data[1].x) == list(range(0, 501, 50))
    ends = history[history.step == 500].val_kl.mean()
    assert f"to {ends:.2f} nats in 500 steps (mean of 2 seeds)" in fig.layout.title.text
    target = next(t for t in fig.data if t.name == "target")
    assert max(target.y) == 95


# Report


def test_the_report_says_what_the_tables_hold(run):
    text, metrics = kv_pages.report(run), files.read(run / "metrics.json")
    losses = [row["loss_degradation"] for row in metrics["per_seed"]]
    assert (
        f"- Loss degradation: {np.mean(losses):+.2f}% (sd {np.std(losses, ddof=1):.2f} over 2"
        in (text)
    )
    kept, total = metrics["n_kept"], metrics["n_units"]
    assert f"- Sparsity achieved: {100 * (1 - kept / total):.1f}% (target: 95.0%)" in text
    assert f"- Loss: {metrics['full']['ce']:.4f}\n" in text
    for row in metrics["per_seed"]:
        assert f"| {row['seed']} | {row['kl']:.3f} | " in text
    assert metrics["verdict"] in text and "Unfaithful" not in text


def test_the_report_keeps_the_known_sections(run):
    sections = re.findall(r"^## (.+)$", kv_pages.report(run), re.M)
    known = ["Configuration", "Initial (Unpruned)", "Final (Pruned)", "Faithfulness",
             "Per-Layer Analysis", "Definitions"]  # fmt: skip
    assert [s for s in sections if s in known] == known
    assert {"Baselines", "Stability", "Controls"} < set(sections)


def test_layers_of_the_report_are_in_numeric_order_and_count_units(run):
    text, layers = kv_pages.report(run), files.read(run / "layers.csv")
    assert "| Layer | Part | Sparsity | Mean Importance | Channels Kept |" in text
    rows = re.findall(
        r"^\| (\d+) \| ([KV]) \| ([\d.]+)% \| ([\d.]+) \| (\d+)/(\d+) \|$", text, re.M
    )
    assert [(int(row[0]), row[1]) for row in rows] == [(n, p) for n in range(12) for p in "KV"]
    shipped = layers[layers.seed == 5]
    assert [int(row[4]) for row in rows] == list(shipped.kept)
    assert [float(row[3]) for row in rows] == pytest.approx(shipped.mean_importance, abs=5e-4)


def test_what_was_not_measured_is_called_that(tmp_path):
    folder = build(tmp_path, seeds=(0,), controls=False)
    metrics = files.read(folder / "metrics.json")
    metrics["full"]["bits_per_byte"] = metrics["mean"]["bits_per_byte"]["value"] = None
    metrics["mean"]["top1"]["value"] = float("nan")
    change(folder, full=metrics["full"], mean=metrics["mean"], minimality=None)
    text = kv_pages.report(folder)
    assert not re.search(r"\b(nan|none|inf|NaN|None)\b", text)
    assert "- Bits/byte: not measured" in text and "- Top-1 agreement: not measured" in text
    assert (
        "over 1 seeds" not in text
        and "sd" not in text.split("## Definitions")[0].split("## Baselines")[0]
    )
    change(
        folder, stability=None, controls={"shuffled": {"learned_kl": 1.0}, "random_weights": None}
    )
    assert "| shuffled task | 1.000 | not measured | not measured |" in kv_pages.report(folder)


def test_a_mask_better_than_its_model_is_called_unfaithful(tmp_path):
    text = kv_pages.report(build(tmp_path, degradation=-18.59))
    assert "- Loss degradation: -" in text
    assert "**Unfaithful: the loss degradation is negative." in text


def test_a_fallback_of_the_data_is_said(tmp_path):
    folder = build(tmp_path)
    assert "fallback" not in kv_pages.report(folder)
    change(folder, corpus={"source": "docstrings", "digest": "1", "fallback": True})
    assert "**A fallback stands in" in kv_pages.report(folder)


# Files


@pytest.mark.parametrize("name", TABLES)
def test_a_folder_that_is_no_run_names_the_missing_file(tmp_path, name):
    folder = build(tmp_path, layers=2)
    (folder / name).unlink()
    with pytest.raises(BadInput, match=rf"no {re.escape(name)} in it") as raised:
        kv_pages.write(folder)
    assert "\n" not in str(raised.value)
    assert not (folder / kv_pages.REPORT).exists()


@pytest.mark.parametrize(("name", "held", "said"), [
    ("metrics.json", "{", "is damaged"),
    ("metrics.json", '{"name": "V0"}', "lacks .*verdict"),
    ("layers.csv", "seed,layer\n0,0\n", "lacks kept"),
    ("final_masks.safetensors", "x", "is damaged"),
])  # fmt: skip
def test_damaged_tables_are_refused(tmp_path, name, held, said):
    (build(tmp_path, layers=2) / name).write_text(held)
    with pytest.raises(BadInput, match=said):
        kv_pages.write(tmp_path)


def test_masks_of_a_layer_without_its_scores_are_refused(tmp_path):
    path = build(tmp_path, layers=2) / "final_masks.safetensors"
    held = files.read(path)
    del held["blocks.1.attn.v_score"]
    files.write(path, held)
    with pytest.raises(BadInput, match="is damaged"):
        kv_runs.read_masks(tmp_path)


def test_everything_is_drawn_in_one_start_of_the_browser(tmp_path, monkeypatch):
    """A run's and a comparison's figures; the export itself would keep a figure's error silent."""
    from lens_utils import viz

    folder = build(tmp_path / "run", layers=2)
    found = {
        "overall": kv_variants.overall_table(
            {name: files.read(folder / "metrics.json") for name in ("V0", "V1")}
        ),
        "per_layer": kv_variants.layer_table(
            {name: files.read(folder / "layers.csv") for name in ("V0", "V1")}
        ),
    }
    compared = kv_variant_figures.figures(found, "KEY FINDINGS\n=====\nV1 < V0\n")
    starts, export = [], viz.pio.write_images
    monkeypatch.setattr(viz.pio, "write_images", lambda **k: starts.append(1) or export(**k))
    of_run = kv_pages.figures(folder)
    monkeypatch.setattr("lens_utils.kv_pages.figures", lambda _: of_run | compared)
    written = kv_pages.write(folder)
    if any(path.suffix == ".html" for path in written):
        pytest.skip("no browser on this machine")
    assert len(starts) == 1
    assert written[0] == folder / "circuit_analysis_report.md"
    assert len(written) == 1 + 3 + 2 + 6 and set(written) <= set(folder.iterdir())
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[1:])
    assert not list(folder.glob(".*"))


def test_without_a_browser_there_are_pages_and_a_line(figures, tmp_path, monkeypatch, capsys):
    def no_browser(**_):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("lens_utils.viz.pio.write_images", no_browser)
    fig = figures["sparsity_curves"]
    assert kv_runs.draw({"sparsity_curves": fig}, tmp_path) == [tmp_path / "sparsity_curves.html"]
    assert "plotly.min.js" in (tmp_path / "sparsity_curves.html").read_text()
    assert capsys.readouterr().err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"sparsity_curves.html", "plotly.min.js"}


def test_a_figure_that_the_export_lost_is_an_error(figures, tmp_path, monkeypatch):
    monkeypatch.setattr("lens_utils.viz.pio.write_images", lambda **_: None)
    with pytest.raises(RuntimeError, match="not drawn: sparsity_curves"):
        kv_runs.draw({"sparsity_curves": figures["sparsity_curves"]}, tmp_path)
