"""Comparison of analysed runs: deltas, verdicts and files, against hand computation."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from kv_tables import PNG, build

from lens_utils import files, kv_runs, kv_variant_figures, kv_variants, provenance
from lens_utils.errors import BadInput
from lens_utils.tracking import Tracker

SCRIPT = provenance.ROOT / "scripts" / "compare_mechint_variants.py"
PICTURES = {"overall_summary", "delta_heatmap", "key_findings", "sparsity_comparison",
            "importance_comparison", "channels_comparison"}  # fmt: skip
SIZES = {"layers": 4, "heads": 2, "channels": 16}


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures of a comparison, without a browser; real ones are drawn in test_kv_pages."""
    kept = {}

    def draw(figures, folder):
        kept.update(figures)
        for name in figures:
            files.write_bytes(folder / f"{name}.png", PNG)
        return [folder / f"{name}.png" for name in figures]

    monkeypatch.setattr("lens_utils.kv_runs.draw", draw)
    return kept


@pytest.fixture
def pair(tmp_path):
    """Two variants of three seeds; V1 loses more and keeps later layers."""
    return {
        "V0": build(tmp_path / "0", "V0", **SIZES),
        "V1": build(tmp_path / "1", "V1", degradation=26, peak=0.8, draw=1, **SIZES),
    }


def compare(pair, output, **options):
    """What a comparison wrote: its key findings, page and tables."""
    table = kv_variants.compare_variants(pair, output, **options)
    return SimpleNamespace(
        table=table, text=files.read(output / "key_findings.txt"),
        page=files.read(output / "variant_comparison.md"),
        layers=files.read(output / "comparison.csv"), held=files.read(output / "comparison.json"),
    )  # fmt: skip


def tables(folder, **metrics):
    """Change a run's metrics."""
    files.write(folder / "metrics.json", files.read(folder / "metrics.json") | metrics)


def mean_of(folder, key, value, sd):
    held = files.read(folder / "metrics.json")["mean"]
    held[key] |= {"value": value, "sd": sd}
    tables(folder, mean=held)


# Numbers


def test_pooled_sd_by_hand():
    """Of (1, 2, 3) and (4, 8): squares 2 and 8 about their means, 3 degrees of freedom."""
    assert kv_runs.pooled_sd(1.0, 3, math.sqrt(8), 2) == pytest.approx(math.sqrt(10 / 3))
    assert kv_runs.pooled_sd(1.5, 3, math.nan, 1) == 1.5
    assert math.isnan(kv_runs.pooled_sd(math.nan, 1, math.nan, 1))


def test_the_overall_table_is_that_of_the_metrics(pair, tmp_path):
    table = compare(pair, tmp_path / "out").table
    of = files.read(pair["V1"] / "metrics.json")
    row = table[table.variant == "V1"].iloc[0]
    losses = [seed["loss_degradation"] for seed in of["per_seed"]]
    assert row.loss_degradation == pytest.approx(np.mean(losses))
    assert row.loss_degradation_sd == pytest.approx(np.std(losses, ddof=1))
    assert row.full_ce == of["full"]["ce"] and row.n_seeds == 3


def test_deltas_of_layers_are_differences_of_means_over_seeds(pair, tmp_path):
    found = compare(pair, tmp_path / "out").layers
    of = {name: files.read(folder / "layers.csv") for name, folder in pair.items()}
    for layer, part in ((0, "K"), (3, "V")):
        a, b = (of[n][(of[n].layer == layer) & (of[n].part == part)].sparsity for n in ("V0", "V1"))
        row = found[(found.variant == "V1") & (found.row == layer) & (found.part == part)].iloc[0]
        sd = math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)
        assert row.sparsity_delta == pytest.approx(b.mean() - a.mean())
        assert row.sparsity_delta_sd == pytest.approx(sd)
        assert bool(row.sparsity_beyond) == (abs(b.mean() - a.mean()) > 2 * sd)
    both = of["V0"][of["V0"].layer == 2].groupby("seed")[["kept", "total"]].sum()
    row = found[(found.variant == "V0") & (found.row == 2) & (found.part == "KV")].iloc[0]
    assert row.sparsity == pytest.approx((1 - both.kept / both.total).mean())
    assert not row.sparsity_delta


@pytest.mark.parametrize(("n_layers", "ends"), [
    (2, {"early": (0, 0), "late": (1, 1)}),
    (4, {"early": (0, 0), "middle": (1, 2), "late": (3, 3)}),
    (12, {"early": (0, 3), "middle": (4, 7), "late": (8, 11)}),
    (30, {"early": (0, 9), "middle": (10, 19), "late": (20, 29)}),
])  # fmt: skip
def test_groups_are_thirds_of_the_depth(n_layers, ends):
    frame = pd.DataFrame({"seed": 0, "layer": range(n_layers), "part": "K", "total": 10, "kept": 1})
    groups = kv_variants.group_table({"V0": frame})
    assert {g.group: (g.min, g.max) for g in groups.itertuples()} == ends


def test_a_group_weighs_its_layers_by_their_units():
    frame = pd.DataFrame({"seed": 0, "layer": [0, 1, 2, 3], "part": "K", "total": [4, 8, 40, 4],
                          "kept": [1, 8, 0, 4]})  # fmt: skip
    groups = kv_variants.group_table({"V0": frame}).set_index("group").sparsity
    assert groups["middle"] == pytest.approx(1 - 8 / 48)


def test_unequal_depths_are_laid_side_by_side_by_relative_depth(tmp_path):
    pair = {"A": build(tmp_path / "a", layers=2, heads=2, channels=8, target=0.9),
            "B": build(tmp_path / "b", layers=6, heads=3, channels=16, target=0.9)}  # fmt: skip
    done = compare(pair, tmp_path / "out")
    k = done.layers[done.layers.part == "K"]
    assert list(k[k.variant == "A"].layer) == [0, 0, 0, 1, 1, 1]
    assert list(k[k.variant == "B"].layer) == [0, 1, 2, 3, 4, 5]
    assert "Early layers (0-1 of B, 0 of A)" in done.text and "Middle" not in done.text
    assert re.search(r"^\| 1 / 4 \| ", done.page, re.M)


# Words


@pytest.mark.parametrize(("value", "sd", "said"), [
    (26.0, 0.3, "V1 has WORSE loss degradation: +26.00% ± 0.30 vs +20.00% ± 0.40 (3 seeds each)"),
    (14.0, 0.3, "V1 has BETTER loss degradation: +14.00% ± 0.30"),
    (20.7, 0.3, "Similar loss degradation: +20.70%"),  # pooled sd 0.354
    (20.72, 0.3, "V1 has WORSE loss degradation"),
    (-5.0, 0.3, "Loss degradation is negative for V1: unfaithful, not an improvement"),
])  # fmt: skip
def test_a_difference_counts_beyond_two_pooled_sd(pair, tmp_path, value, sd, said):
    mean_of(pair["V0"], "loss_degradation", 20.0, 0.4)
    mean_of(pair["V1"], "loss_degradation", value, sd)
    text = compare(pair, tmp_path / "out").text
    assert f"- {said}" in text
    assert "BETTER" not in text or "BETTER" in said


def test_one_seed_each_decides_nothing(tmp_path):
    pair = {
        n: build(tmp_path / n, n, seeds=(0,), draw=d, **SIZES) for d, n in enumerate(("V0", "V1"))
    }
    done = compare(pair, tmp_path / "out")
    assert not re.search("WORSE|BETTER|Similar|similar sparsity", done.text)
    assert done.text.count("undecided: one seed each, no error bar") >= 5
    assert "±" not in done.page.split("## Overall")[1].split("## Key findings")[0]
    assert not re.search(r"\bnan\b|\bNone\b", done.text + done.page)


def test_the_layers_named_are_beyond_the_seeds_and_in_order(pair, tmp_path):
    done = compare(pair, tmp_path / "out")
    of = done.layers[(done.layers.variant == "V1") & (done.layers.part == "KV")]
    of = of[of.sparsity_beyond.astype(bool)].sort_values("sparsity_delta", key=abs, ascending=False)
    said = ", ".join(f"layer {r.layer} ({100 * r.sparsity_delta:+.1f})"
                     for r in of.head(3).itertuples())  # fmt: skip
    assert len(of) and f"Largest differences of sparsity, in points: {said}\n" in done.text


def test_full_models_of_different_loss_are_said(pair, tmp_path):
    assert "full models differ" not in compare(pair, tmp_path / "a").text
    tables(pair["V1"], full={"ce": 3.2, "perplexity": 24.5, "bits_per_byte": None})
    assert "The full models differ in CE (V0 3.000, V1 3.200 nats)" in compare(
        pair, tmp_path / "b"
    ).text  # fmt: skip


def test_other_settings_that_differ_are_said(pair, tmp_path):
    tables(pair["V1"], fill="zero")
    text = compare(pair, tmp_path / "out").text
    assert "Settings differ: fill (V0: mean, V1: zero)." in text and text.count("Settings") == 1


def test_the_page_has_the_known_tables_in_numeric_order(tmp_path):
    shape = {"layers": 12, "heads": 1, "channels": 8, "target": 0.8}
    pair = {n: build(tmp_path / n, n, draw=d, **shape) for d, n in enumerate(("V0", "V1"))}
    page = compare(pair, tmp_path / "out").page
    assert "| Variant | Loss Degradation | Sparsity Achieved | Bits/Byte |" in page
    assert "| Layer | V0 Sparsity | V1 Sparsity | Delta |" in page
    rows = re.findall(r"^\| (\d+) \| [\d.]+% \| [\d.]+% \| [+-][\d.]+\*? \|$", page, re.M)
    assert rows == [str(n) for n in range(12)] * 3


def test_three_variants_and_a_chosen_baseline(pair, tmp_path):
    three = pair | {"K=V": build(tmp_path / "2", draw=2, **SIZES)}
    done = compare(three, tmp_path / "out", baseline="V1")
    assert list(done.table.variant) == ["V1", "V0", "K=V"] and done.held["baseline"] == "V1"
    assert (
        "| Layer | V1 Sparsity | V0 Sparsity | K=V Sparsity | V0 Delta | K=V Delta |" in done.page
    )
    assert "V0 against V1" in done.text and "K=V against V1" in done.text
    assert "has BETTER loss degradation" in done.text


# Files


def test_every_known_file_is_written_and_figures_are_of_the_tables(pair, tmp_path, drawn):
    output = tmp_path / "out"
    done = compare(pair, output)
    assert {p.name for p in output.iterdir()} == {f"{n}.png" for n in PICTURES} | {
        "key_findings.txt", "variant_comparison.md", "comparison.csv", "comparison.json"
    }  # fmt: skip
    heat = drawn["delta_heatmap"].data[0]
    of = done.layers[done.layers.variant == "V1"]
    delta = 100 * of[of.part == "V"].sparsity_delta
    assert list(heat.x) == ["V1 K", "V1 V"] and np.array(heat.z)[:, 1] == pytest.approx(delta)
    assert heat.zmax == -heat.zmin == np.abs(np.array(heat.z)).max()
    points = drawn["channels_comparison"].data[1]  # V0's V
    v0 = done.layers[(done.layers.variant == "V0") & (done.layers.part == "V")]
    assert list(points.y) == pytest.approx(list(v0.kept))
    assert list(points.error_y.array) == pytest.approx(list(v0.kept_sd))
    json.dumps(done.held, allow_nan=False)


def test_identical_runs_differ_in_nothing(pair, tmp_path, drawn):
    done = compare({"V0": pair["V0"], "V1": pair["V0"]}, tmp_path / "out")
    assert "No layer's sparsity differs" in done.text and "WORSE" not in done.text
    assert drawn["delta_heatmap"].data[0].zmax == 1
    assert "no difference" in drawn["delta_heatmap"].layout.title.text


def test_findings_in_a_picture_are_whole(pair, tmp_path):
    text = compare(pair, tmp_path / "out").text
    picture = kv_variant_figures.as_picture(text).layout
    shown = picture.annotations[0].text.replace("&nbsp;", " ").replace("<br>", " ")
    assert picture.title.text == text.split("\n")[0]
    assert " ".join(shown.split()) == " ".join(" ".join(text.split("\n")[2:]).split())


def test_a_tracker_gets_the_tables_and_images(pair, tmp_path, monkeypatch):
    asked, sent = [], {}

    class Recorder(Tracker):
        def table(self, name, frame):
            sent[name] = frame

        def image(self, name, path):
            sent[name] = path

    monkeypatch.setattr("lens_utils.tracking.start", lambda *a: asked.append(a) or Recorder())
    compare(pair, tmp_path / "out", use_wandb=True, project_name="kv")
    assert asked[0][0] == "offline" and asked[0][3] == "kv"
    wide, layers = sent["comparison/per_layer"], files.read(tmp_path / "out" / "comparison.csv")
    assert {"V0_sparsity", "V1_sparsity", "V1_importance", "V1_channels_kept", "sparsity_delta",
            "importance_delta"} <= set(wide.columns)  # fmt: skip
    assert len(wide) == 4 * 3
    of = layers[layers.variant == "V1"].set_index(["row", "part"]).sparsity_delta
    assert wide.set_index(["row", "part"]).sparsity_delta.to_dict() == pytest.approx(of.to_dict())
    assert {f"comparison/{n.removesuffix('_comparison')}" for n in PICTURES} < sent.keys()


# Bad input


@pytest.mark.parametrize(("change", "said"), [
    ({"dataset": "wikipedia"}, "different dataset .*V0: docstrings; V1: wikipedia"),
    ({"target_sparsity": 0.8}, "different target sparsity"),
    ({"units": {"resolution": "head"}}, "different units"),
    ({"n_layers": 5}, "does not hold the layers"),
])  # fmt: skip
def test_runs_that_do_not_compare_are_refused(pair, tmp_path, change, said):
    tables(pair["V1"], **change)
    with pytest.raises(BadInput, match=said) as raised:
        compare(pair, tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_missing_file_is_an_error_never_a_zero(pair, tmp_path):
    (pair["V1"] / "layers.csv").unlink()
    with pytest.raises(BadInput, match=r"1 is no analysed run: there is no layers.csv"):
        compare(pair, tmp_path / "out")


def test_a_comparison_needs_two_and_a_known_baseline(pair, tmp_path):
    with pytest.raises(BadInput, match="two or more"):
        compare({"V0": pair["V0"]}, tmp_path / "out")
    with pytest.raises(BadInput, match="no variant V2 for a baseline; there are V0, V1"):
        compare(pair, tmp_path / "out", baseline="V2")


@pytest.mark.parametrize("said", [
    ["--v0", "nowhere", "--v1", "nowhere"], ["--variant", "nowhere"],
    ["--v0", "a", "--variant", "V0=b"],
])  # fmt: skip
def test_the_script_says_one_line(said, tmp_path):
    command = [sys.executable, str(SCRIPT), *said, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lab: ") and done.stderr.count("\n") == 1
