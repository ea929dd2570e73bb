"""Experiment 006 on matrices whose graphs are known, and its drawing at 1,152 nodes."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lens_utils import graphs, provenance
from lens_utils.errors import BadInput

CFG = {"top": 0.1, "core": 0.25, "shuffles": 3, "resamples": 3, "quick": False}
NOTEBOOK = provenance.NOTEBOOKS / "006_core_graphs.ipynb"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(provenance.EXPERIMENTS / "006_core_graphs"))
    names = ("core_matrices", "core_measures", "core_tables")
    return SimpleNamespace(**{n.split("_")[1]: importlib.import_module(n) for n in names})


def symmetric(n, seed=0) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((n, n)), 1)
    found = upper + upper.T
    np.fill_diagonal(found, np.nan)
    return found


def upstream(modules, n=12, families=4, seed=0) -> dict:
    """What 005 holds: four measures, two atoms, a matrix of each category."""
    out = {}
    for k, name in enumerate(modules.matrices.READ):
        held = {}
        for m, atom in enumerate(modules.matrices.ATOMS):
            each = np.stack([symmetric(n, seed + 100 * k + 10 * m + f) for f in range(families)])
            held |= {atom: torch.tensor(each.mean(0)), f"{atom}_by_family": torch.tensor(each)}
        out[name] = held
    return out


def scores(n=12, layers=4) -> pd.DataFrame:
    layer = np.arange(n) * layers // n
    names = ("rank_diff", "value_diff_ccs", "value_diff_surrogate", "value_diff_excess", "memory")
    table = pd.DataFrame({"layer": layer, "head": np.arange(n) % (n // layers)})
    table["value_diff"] = np.arange(n, dtype=float)
    return table.assign(**{name: np.arange(n, dtype=float)[::-1] for name in names})


def sizes(modules, **changes):
    return modules.measures.sizes(SimpleNamespace(**CFG | changes))


# Matrices


def test_matrices_are_those_of_005(modules):
    held = upstream(modules)
    pairs = modules.matrices.gather(held, 12)
    assert set(pairs) == {
        (k, a) for k in ("mmi", "ccs", "surrogate", "replayed", "excess") for a in ("sts", "rtr")
    }
    np.testing.assert_allclose(
        pairs["excess", "rtr"].whole, held["own_mmi"]["rtr"] - held["own_surrogate"]["rtr"]
    )
    one = pairs["ccs", "sts"]
    np.testing.assert_allclose(one.weighed(np.ones(4)), one.whole, atol=1e-12)
    np.testing.assert_allclose(
        one.weighed(np.array([2.0, 0, 1, 0])), (2 * one.families[0] + one.families[2]) / 3
    )


def test_a_category_without_a_pair_is_left_out_of_its_mean(modules):
    one = modules.matrices.gather(upstream(modules), 12)["mmi", "sts"]
    one.families[0, 1, 2] = np.nan
    mean = one.weighed(np.array([5.0, 1, 0, 0]))
    assert mean[1, 2] == one.families[1, 1, 2]
    assert np.isnan(one.weighed(np.array([5.0, 0, 0, 0]))[1, 2])


def test_matrices_of_other_heads_are_refused(modules):
    with pytest.raises(BadInput, match="of 12 heads, its scores of 11") as raised:
        modules.matrices.gather(upstream(modules), 11)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top": 0.0}, "--top 0.0"),
        ({"top": 1.1}, "--top 1.1"),
        ({"core": 0.6}, "--core 0.6"),
        ({"core": -0.1}, "--core"),
        ({"shuffles": 1}, "--shuffles 1"),
        ({"resamples": -2}, "--resamples -2"),
    ],
)
def test_settings_without_sense(modules, changes, says):
    with pytest.raises(BadInput, match=says) as raised:
        sizes(modules, **changes)
    assert "\n" not in str(raised.value)


# Measures


@pytest.mark.parametrize("edges", ["all", "top"])
def test_a_graph_is_measured_beside_its_null(modules, edges):
    pairs = modules.matrices.gather(upstream(modules), 12)
    found = modules.measures.against_null(pairs, "mmi", "sts", edges, 0.2, sizes(modules), 0)
    rows = found.set_index("measure")
    held = graphs.graph(pairs["mmi", "sts"].whole, 0.2 if edges == "top" else None)
    for name, value in graphs.measures(held).items():
        assert rows.value[name] == pytest.approx(value)
    assert (rows.n_edges == (13 if edges == "top" else 66)).all() and (rows.pairs == 66).all()
    assert ((rows.low <= rows.value) & (rows.value <= rows.high)).all()
    assert ((rows.null_low <= rows.null) & (rows.null <= rows.null_high)).all()
    assert rows.high["efficiency"] > rows.low["efficiency"] and (rows.n == 4).all()
    ratio = rows.value["efficiency"] / rows.value["efficiency_per_weight"]
    assert ratio == pytest.approx(rows.mean_weight.iloc[0])


def test_categories_that_agree_leave_no_interval(modules):
    pairs = modules.matrices.gather(upstream(modules), 12)
    one = pairs["mmi", "sts"]
    pairs["mmi", "sts"] = one._replace(families=np.stack([one.whole] * 4))
    found = modules.measures.against_null(pairs, "mmi", "sts", "all", 0.2, sizes(modules), 0)
    np.testing.assert_allclose(found.low, found.high, atol=1e-12)


def test_weights_that_are_no_edges_are_counted(modules):
    pairs = modules.matrices.gather(upstream(modules), 12)
    one = pairs["ccs", "sts"]
    one.whole[:6] = one.whole[:, :6] = -1
    one.whole[0, 1] = one.whole[1, 0] = np.nan
    rows = modules.measures.against_null(pairs, "ccs", "sts", "all", 0.2, sizes(modules), 0)
    assert (rows.n_edges == 15).all() and (rows.clipped == 50).all() and (rows.missing == 1).all()
    one.whole[:] = -1
    none = modules.measures.against_null(pairs, "ccs", "sts", "all", 0.2, sizes(modules), 0)
    assert none.clipped.tolist() == [66] and none.n_edges.tolist() == [0] and "value" not in none


def test_communities_are_named_by_size_and_lone_heads_by_none(modules):
    member = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2])
    held = upstream(modules)
    planted = np.where(member[:, None] == member, 1.0, 0.01)
    held["own_mmi"]["sts"] = torch.tensor(planted)
    pairs = modules.matrices.gather(held, 12)
    found = modules.measures.communities(pairs, scores(), 0.1, 0)
    full = found[(found.kind == "mmi") & (found.atom == "sts") & (found.edges == "all")]
    assert full.community.tolist() == [2] * 3 + [0] * 5 + [1] * 4
    thin = found[(found.kind == "mmi") & (found.atom == "rtr") & (found.edges == "top")]
    strong = graphs.graph(pairs["mmi", "rtr"].whole, 0.1).weights.sum(0) > 0
    assert (thin.community.notna().to_numpy() == strong).all() and not strong.all()


# Tables


def test_cores_are_the_two_ends(modules):
    found = modules.tables.core(np.array([3.0, np.nan, 9, 1, 5, 7, 2, 8, 4]), 0.25)
    assert found.tolist() == [
        "between", "between", "synergistic", "redundant", "between", "between", "redundant",
        "synergistic", "between",
    ]  # fmt: skip
    table = modules.tables.cores(scores(), 0.25)
    assert table.value_diff.tolist() == ["redundant"] * 3 + ["between"] * 6 + ["synergistic"] * 3
    assert table.rank_diff.tolist() == table.value_diff.tolist()[::-1]
    assert table.depth_pct.tolist()[::3] == pytest.approx([0, 100 / 3, 200 / 3, 100])
    shared = modules.tables.core_overlap(scores().assign(memory=np.arange(12.0)), 0.25)
    by = shared.set_index("other")
    assert by.synergistic["memory"] == by.redundant["memory"] == 1
    assert by.synergistic["value_diff_ccs"] == by.redundant["value_diff_ccs"] == 0


def test_communities_that_are_layers_reach_the_ceiling(modules):
    layer = np.repeat(np.arange(4), 10)
    place = {"kind": "mmi", "atom": "sts", "edges": "all"}
    graphs_of = {
        "layers": layer // 2,
        "mixed": np.random.default_rng(0).permutation(layer // 2),
    }
    found = {}
    for name, labels in graphs_of.items():
        members = pd.DataFrame({"community": labels.astype(float)}).assign(**place)
        found[name] = modules.tables.by_layer(members, layer, 40, 0).iloc[0]
    cut, mixed = found["layers"], found["mixed"]
    assert cut.ami == pytest.approx(cut.ceiling) and cut.ami > 0.6 and cut.communities == 2
    assert mixed.ceiling == pytest.approx(cut.ceiling) and abs(mixed.ami) < 0.1
    assert mixed.null_low < 0 < mixed.null_high < 0.2


def test_lone_heads_have_no_layer_to_follow(modules):
    labels = np.append(np.repeat([0.0, 1.0], 10), [np.nan] * 4)
    members = pd.DataFrame({"community": labels, "kind": "ccs", "atom": "rtr", "edges": "top"})
    row = modules.tables.by_layer(members, np.arange(24) // 6, 5, 0).iloc[0]
    assert row.heads == 20


def test_strongest_pairs_repeat_where_the_categories_agree(modules):
    pairs = modules.matrices.gather(upstream(modules, n=30), 30)
    one = pairs["mmi", "sts"]
    pairs["mmi", "sts"] = one._replace(families=np.stack([one.whole] * 4))
    found = modules.tables.reliability(pairs, 0.1).set_index(["kind", "atom"])
    assert found.overlap["mmi", "sts"] == 1
    assert found.low["mmi", "rtr"] < 0.4 and found.splits["mmi", "rtr"] == 3
    assert (found.low <= found.overlap).all() and (found.overlap <= found.high).all()


def test_agreement_of_two_measures(modules):
    pairs = modules.matrices.gather(upstream(modules, n=30), 30)
    pairs["ccs", "sts"] = pairs["mmi", "sts"]._replace(whole=pairs["mmi", "sts"].whole ** 3)
    pairs["surrogate", "sts"] = pairs["mmi", "sts"]._replace(whole=-pairs["mmi", "sts"].whole)
    found = modules.tables.agreement(pairs, 0.1).set_index(["atom", "one", "other"])
    same, opposite = found.loc["sts", "mmi", "ccs"], found.loc["sts", "mmi", "surrogate"]
    assert same.overlap == 1 and same.spearman == pytest.approx(1)
    assert opposite.overlap == 0 and opposite.spearman == pytest.approx(-1)
    assert found.loc["rtr", "mmi", "ccs"].overlap < 0.4


def test_the_strongest_edges_are_listed_in_order(modules):
    pairs = modules.matrices.gather(upstream(modules), 12)
    found = modules.tables.strongest(pairs, 0.1)
    assert found.groupby("atom").size().tolist() == [7, 7] and (found.of == 7).all()
    part = found[found.atom == "rtr"]
    matrix = pairs["mmi", "rtr"].whole
    assert (matrix[part.one, part.other] == part.weight).all() and (part.one < part.other).all()
    upper = np.sort(matrix[np.triu_indices(12, 1)])[::-1]
    assert part.weight.tolist() == upper[:7].tolist()


# Every table of a run, and what the notebook draws of it


def tables(modules, n, families, size, layers) -> dict:
    pairs = modules.matrices.gather(upstream(modules, n, families), n)
    table, measure, which = modules.tables, modules.measures, modules.matrices.graphs_of(pairs)
    found = {
        "graphs.csv": pd.concat(
            [measure.against_null(pairs, *one, 0.1, size, 0) for one in which], ignore_index=True
        ),
        "cores.csv": table.cores(scores(n, layers), 0.25),
        "core_overlap.csv": table.core_overlap(scores(n, layers), 0.25),
        "communities.csv": measure.communities(pairs, scores(n, layers), 0.1, 0),
        "reliability.csv": table.reliability(pairs, 0.1),
        "agreement.csv": table.agreement(pairs, 0.1),
        "strongest.csv": table.strongest(pairs, 0.1),
    }
    at = scores(n, layers).layer.to_numpy()
    found["layers.csv"] = table.by_layer(found["communities.csv"], at, 5, 0)
    return found


def test_the_summary_holds_what_the_findings_quote(modules):
    found = tables(modules, 16, 4, sizes(modules), 4)
    names = ("graphs", "layers", "reliability", "agreement", "cores", "core_overlap")
    out = modules.tables.summarise(*(found[f"{name}.csv"] for name in names))
    assert 15 <= len(out) <= 30 and out["heads"] == 16
    graph = found["graphs.csv"].set_index(["kind", "atom", "edges", "measure"])
    estimate = out["modularity, redundancy, all pairs"]
    assert estimate["value"] == graph.value["mmi", "rtr", "all", "modularity"]
    assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["n"] == 4
    for value in out.values():
        assert isinstance(value, int | float | str) or value["low"] <= value["high"]
    excess = found["agreement.csv"].set_index(["atom", "one", "other"])
    assert (
        out["strongest synergy that heads of different prompts show too"]
        == excess.overlap["sts", "mmi", "surrogate"]
    )


def test_the_drawing_of_1152_heads_is_a_small_page(modules, monkeypatch):
    """All the notebook's cells, on tables made by hand: only the graph is of full size."""
    small = tables(modules, 16, 4, sizes(modules), 4)
    n = 1152
    rows, columns = np.triu_indices(n, 1)
    rng = np.random.default_rng(0)
    drawn = [
        pd.DataFrame({"one": rows[k], "other": columns[k], "weight": -np.sort(-rng.random(5000))})
        .assign(atom=atom, of=66298)
        for atom in ("sts", "rtr")
        for k in [rng.choice(len(rows), 5000, replace=False)]
    ]  # fmt: skip
    small |= {
        "strongest.csv": pd.concat(drawn, ignore_index=True),
        "cores.csv": modules.tables.cores(scores(n, 36), 0.25),
    }
    run = SimpleNamespace(variant="made-up", folder=None, read=small.__getitem__)
    run.peers = lambda: [run]
    kept = {}
    experiment, viz = (importlib.import_module(f"lens_utils.{n}") for n in ("experiment", "viz"))
    monkeypatch.setattr(experiment, "Results", lambda folder: run)
    monkeypatch.setattr(viz, "keep", lambda figures, folder: kept.update(figures))
    held = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), held)
    assert {"graph", "bars-all", "bars-top", "models", "cores", "communities"} == set(kept)
    for name, fig in kept.items():
        page = fig.to_html(include_plotlyjs="../../../plotly.min.js", full_html=True)
        assert len(page) <= 2e6, name
    lines = [trace for trace in kept["graph"].data if trace.mode == "lines"]
    edges = sum(int(np.isnan(np.asarray(trace.x, float)).sum()) for trace in lines)
    assert len(lines) <= 12 and edges == 3000, "few traces, every edge drawn once"
    ends = [a.text for a in kept["graph"].layout.annotations]
    assert any("1,500 strongest of 66,298 edges" in text for text in ends)
