"""Experiment 021 on graphs made by hand: what is planted is found, and what is not is not."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lens_utils import files, motifs, provenance
from lens_utils.__main__ import load
from lens_utils.errors import BadInput
from lens_utils.experiment import Results, execute

SOURCE = provenance.EXPERIMENTS / "021_circuit_motifs" / "run.py"
RUN = load(SOURCE.parent)
RECORDED = Path(__file__).parent / "fixtures" / "circuit_tracer" / "graph.json"
LOOPS = list(motifs.LOOPS)

import motif_controls  # noqa: E402 (load put their folder on the path)
import motif_graphs  # noqa: E402
import motif_tables  # noqa: E402


def exported(nodes: list[tuple[str, str, int]], edges: dict[tuple[int, int], float]) -> dict:
    """A graph file of (kind, layer, position) and weights by (source, target)."""
    kinds = {"f": "cross layer transcoder", "e": "mlp reconstruction error", "t": "embedding",
             "l": "logit"}  # fmt: skip
    made = [{"node_id": f"{i}", "layer": layer, "ctx_idx": pos, "feature_type": kinds[kind],
             "feature": 7, "jsNodeId": f"{i}", "clerp": f"node {i}"}
            for i, (kind, layer, pos) in enumerate(nodes)]  # fmt: skip
    links = [{"source": str(s), "target": str(t), "weight": w} for (s, t), w in edges.items()]
    metadata = {"slug": "made", "scan": "made", "prompt_tokens": ["a", " b"], "prompt": "a b"}
    return {"metadata": metadata, "nodes": made, "links": links}


NODES = [("t", "E", 0), ("f", "0", 0), ("f", "1", 1), ("e", "0", 1), ("l", "2", 1)]
EDGES = {(0, 1): 2.0, (0, 2): 1.0, (1, 2): -2.0, (3, 2): 1.0, (1, 4): 0.5, (2, 4): -1.5}


def random_graph(seed: int, sign: float = 0.5, **about: str) -> motif_graphs.Graph:
    """A graph with edges wherever they can be, of which a share is positive."""
    rng = np.random.default_rng(seed)
    layer, pos = np.sort(rng.integers(-1, 5, 50)), rng.integers(0, 3, 50)
    empty = motifs.Circuit(np.zeros((50, 50)), layer, pos)
    there = empty.possible & (rng.random((50, 50)) < 0.4)
    signs = np.where(rng.random((50, 50)) < sign, 1.0, -1.0)
    weights = rng.random((50, 50)) * signs * there
    nodes = pd.DataFrame({"kind": "feature", "layer": layer, "pos": pos, "index": range(50),
                          "label": ""})  # fmt: skip
    said = {"model": "m", "id": f"g{seed}", "group": "all", "where": "prompt", "item": f"g{seed}"}
    circuit = motifs.Circuit(weights, layer, pos)
    return motif_graphs.Graph(**{**said, **about}, nodes=nodes, circuit=circuit,
                              inputs=np.ones(50), tokens=("a", "b", "c"), errors=0.1)  # fmt: skip


# Reading


def test_edges_are_shares_of_their_targets_input_and_errors_go():
    graph = motif_graphs.read(exported(NODES, EDGES), "made", "m", {"id": "q1-trace"})
    assert graph.nodes["node_id"].tolist() == ["0", "1", "2", "4"]
    expected = np.zeros((4, 4))
    expected[1, 0] = 1.0
    expected[2, 0], expected[2, 1] = 1 / 4, -2 / 4  # the error had a quarter
    expected[3, 1], expected[3, 2] = 0.5 / 2, -1.5 / 2
    np.testing.assert_allclose(graph.circuit.weights, expected)
    assert graph.errors == pytest.approx(1 / 8) and graph.edges == 5
    assert (graph.model, graph.item, graph.where, graph.group) == ("m", "q1", "prompt", "all")
    np.testing.assert_allclose(graph.unscaled().circuit.weights[3], [0, 0.5, -1.5, 0])
    cut = graph.cut(2)
    assert cut.nodes["node_id"].tolist() == ["0", "1", "2", "4"] and cut.edges == 2
    assert graph.cut(1).nodes["node_id"].tolist() == ["0", "1"]
    told = {"id": "q1-trace", "group": "maze", "where": "trace", "pair": "maze 7"}
    again = motif_graphs.read(exported(NODES, EDGES), "made", "m", told)
    assert (again.item, again.where, again.group) == ("maze 7", "trace", "maze")
    names = [motif_graphs.name(node, graph.tokens) for _, node in graph.nodes.iterrows()]
    assert names == ["token a", "L0 node 1 @ a", "L1 node 2 @ b", "node 4"]


def test_what_an_edge_has_to_climb_is_read_off_the_edges():
    """Logits read no earlier position of the layer below; nor do features, in parallel blocks."""
    graph = motif_graphs.read(exported(NODES, EDGES), "made", "m", {"id": "q"})
    assert graph.circuit.climb.tolist() == [1, 1, 1, 2]
    parallel = {(s, t): w for (s, t), w in EDGES.items() if (s, t) != (1, 2)}
    graph = motif_graphs.read(exported(NODES, parallel), "made", "m", {"id": "q"})
    assert graph.circuit.climb.tolist() == [2, 2, 2, 2]


def test_a_graph_that_no_transformer_made_is_refused():
    with pytest.raises(BadInput, match=r"^back.json: 1 edges are causally impossible") as error:
        motif_graphs.read(exported(NODES, {(2, 1): 1.0}), "back.json", "m", {"id": "q"})
    assert "\n" not in str(error.value)


def test_folders_of_anyones_graphs(tmp_path):
    shutil.copy(RECORDED, tmp_path / "one.json")
    files.write(tmp_path / "two.json", exported(NODES, EDGES))
    files.write(tmp_path / "graph-metadata.json", {"graphs": []})
    one, two = motif_graphs.of_folder(tmp_path, "m")
    assert one.model.startswith("custom-") and two.model == "made" and one.edges > 50
    said = pd.DataFrame([{"id": "two", "group": "sums", "where": "answer", "pair": "x"}])
    files.write(tmp_path / "prompts.csv", said)
    [only] = motif_graphs.of_folder(tmp_path, "m")
    assert (only.id, only.group, only.where, only.item) == ("two", "sums", "answer", "x")
    (tmp_path / "prompts.csv").unlink()
    (tmp_path / "three.json").write_text('{"nodes": []}')
    with pytest.raises(BadInput, match=r"three.json is no attribution graph: metadata is missing"):
        list(motif_graphs.of_folder(tmp_path, "m"))
    with pytest.raises(BadInput, match="holds no graphs"):
        list(motif_graphs.of_folder(tmp_path / "empty", "m"))


def test_few_graphs_are_some_of_every_kind():
    graphs = [random_graph(0, where=where, model=model, id=f"{n}") for model in "ab"
              for where, times in (("trace", 5), ("answer", 2)) for n in range(times)]  # fmt: skip
    kept = motif_graphs.few(graphs, 6)
    assert [(g.model, g.where, g.id) for g in kept] == [
        ("a", "trace", "0"), ("a", "trace", "1"), ("a", "answer", "0"), ("a", "answer", "1"),
        ("b", "trace", "0"), ("b", "answer", "0"),
    ]  # fmt: skip
    assert motif_graphs.few(graphs, 99) == graphs


# Tables


def test_how_loops_lie_by_enumeration():
    graph = random_graph(3)
    weights, layer = graph.circuit.weights, graph.circuit.layer
    found = [(np.sign([weights[m, s], weights[t, m], weights[t, s]]), layer[t] - layer[s])
             for s, m, t in itertools.permutations(range(50), 3)
             if weights[m, s] and weights[t, m] and weights[t, s]]  # fmt: skip
    measured = motif_tables.measure(graph.circuit)
    assert measured["030T"] == len(found) > 100
    assert measured["coherent"] == pytest.approx(np.mean([s.prod() > 0 for s, _ in found]))
    rises = np.array([rise for _, rise in found])
    assert measured["span"] == pytest.approx(rises.mean())
    for n in range(2, 6):
        assert measured.get(f"span {n}", 0) == (rises == n).sum()


def held(ratios: dict[str, float], where="prompt", null="layers") -> pd.DataFrame:
    """Nulls' table with found / expected of 030T given by item, 1 for all others."""
    rows = [
        {"model": "m", "id": f"{item}-{where}", "group": "all", "where": where, "item": item,
         "null": null, "motif": motif, "expected": 100.0, "z": 1.0, "moved": 0.4,
         "found": 100.0 * (ratio if motif == "030T" else 1)}
        for item, ratio in ratios.items() for motif in motif_tables.SHOWN
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_enrichment_of_groups_by_hand():
    table = held({"a": 2.0, "b": 4.0, "c": 2.0, "d": 2.0, "e": 2.0, "f": 2.0})
    found = motif_tables.enrichments(table, 0).set_index("motif")
    row = found.loc["030T"]
    exact = np.log2((np.array([200, 400, 200, 200, 200, 200]) + 0.5) / 100.5).mean()
    assert row["log2"] == pytest.approx(exact) and row["low"] < exact < row["high"]
    assert row["n"] == 6 and row["p"] == pytest.approx(2 / 64, abs=0.01)  # of 64 flips, two
    assert (found.drop("030T")["log2"] == 0).all() and found.drop("030T")["p"].isna().all()
    assert found.loc["030T", "q"] == row["p"]
    both = pd.concat([table, held({"a": 0.5, "b": 0.5}, "trace")])
    found = motif_tables.enrichments(both, 0).set_index(["kind", "name", "motif"])["log2"]
    assert found[("where", "prompt", "030T")] == pytest.approx(exact)
    assert found[("where", "trace", "030T")] == pytest.approx(np.log2(50.5 / 100.5))
    # a and b have two graphs each: they count once.
    item = (np.log2(200.5 / 100.5) + np.log2(50.5 / 100.5)) / 2
    other = (np.log2(400.5 / 100.5) + np.log2(50.5 / 100.5)) / 2
    whole = np.mean([item, other, *[np.log2(200.5 / 100.5)] * 4])
    assert found[("all", "all", "030T")] == pytest.approx(whole)
    few = motif_tables.enrichments(held(dict.fromkeys("abcde", 2.0)), 0)
    assert few["p"].isna().all() and few["q"].isna().all()  # of 32 flips, two: never below 0.05


def test_graphs_without_loops_say_nothing_of_how_loops_lie():
    table = held({"a": 0.0, "b": 0.0})
    table.loc[table["motif"].isin(["coherent", "span"]), "found"] = 0.0
    found = motif_tables.enrichments(table, 0).set_index("motif")["log2"]
    assert found[["coherent", "span"]].tolist() == [0, 0] and found["030T"] < -5


def test_groups_that_differ_are_told_apart():
    """Trace and answer of opposite signs; two groups that are alike; one with a single problem."""
    graphs = [random_graph(10 * n + (where == "trace"), 0.5 + 0.0 * n, where=where, item=f"p{n}",
                           id=f"p{n}-{where}", group=("even", "odd")[n % 2] if n else "lone")
              for n in range(9) for where in ("trace", "answer")]  # fmt: skip
    rng = np.random.default_rng(0)
    rows = []
    for graph in graphs:
        z = np.where(np.arange(8) == (0 if graph.where == "trace" else 5), 5.0, 0.0)
        z += rng.standard_normal(8)
        rows += [motif_tables.who(graph) | {"null": "layers", "motif": motif, "z": value}
                 for motif, value in zip(LOOPS, z, strict=True)]  # fmt: skip
    profiles = motif_tables.profiles(pd.DataFrame(rows))
    np.testing.assert_allclose(np.linalg.norm(profiles[LOOPS], axis=1), 1)
    table = motif_tables.contrasts(profiles, 2000, 0).set_index(["kind", "one", "other"])
    assert len(table) == 2  # the lone problem is in no pair
    places, groups = table.iloc[0], table.iloc[1]
    assert table.index[0] == ("where", "answer", "trace") and places["paired"]
    assert places["q"] < 0.02 and places["cosine"] < 0.6 and places["n"] == 9
    assert groups["p"] > 0.05 and groups["q"] >= groups["p"] and groups["cosine"] > 0.8
    dealt = motif_controls.shuffled(profiles, 20, 100, 0)
    assert dealt["pairs"].sum() >= 20 and dealt["below"].sum() / dealt["pairs"].sum() < 0.25


def test_thresholds_beyond_a_graph_are_left_out_and_names_are_given():
    graph = random_graph(1)
    table = motif_tables.sweep([graph], [100, 300, 10_000], 5, 0)
    assert sorted(table["cut"].unique()) == [100, 300]
    at = table.set_index(["cut", "motif"])["found"]
    assert at[(100, "030T")] < at[(300, "030T")]
    loops = motif_tables.loops([graph], 300, 5)
    assert loops["rank"].tolist() == [1, 2, 3, 4, 5] and loops["strength"].is_monotonic_decreasing
    weakest = loops[["to_middle", "onward", "direct"]].abs().min(axis=1)
    np.testing.assert_allclose(weakest, loops["strength"])
    first = loops.iloc[0]
    token = graph.tokens[first["source_pos"]]
    assert first["source"].startswith(f"L{first['source_layer']} #")
    assert first["source"].endswith(f"@ {token}")
    chains = motif_tables.cascades([graph], 300)
    for _, chain in chains.groupby("length"):
        assert (chain["target"].iloc[:-1].tolist()) == chain["source"].iloc[1:].tolist()


def planted(seed: int) -> motif_graphs.Graph:
    """A sparse graph with forty loops put into it."""
    graph, rng = random_graph(seed), np.random.default_rng(seed)
    c = graph.circuit
    weights = np.where(rng.random((50, 50)) < 0.2, c.weights, 0)
    possible = c.possible
    loops = np.argwhere(possible[:, :, None] & possible[None] & possible[:, None])
    for t, m, s in rng.choice(loops, 40, replace=False):
        weights[m, s], weights[t, m], weights[t, s] = 1.0, 1.0, 1.0
    return dataclasses.replace(graph, circuit=motifs.Circuit(weights, c.layer, c.pos))


def test_nulls_in_a_circuits_place_are_not_found():
    graphs = [planted(seed) for seed in range(6)]
    own = motif_tables.nulls(graphs, 250, 39, 0, ("layers",)).set_index("motif")
    assert own.loc["030T", "z"].mean() > 2
    table = motif_controls.nulls_of_nulls(graphs, 250, 39, 0)
    z = table.loc[np.isfinite(table["z"]) & (table["motif"] == "030T"), "z"]
    assert len(z) == 18 and abs(z.mean()) < 0.8 and 0.6 < z.std() < 1.6
    assert (table["p"] <= 0.1).mean() < 0.25


# The whole


def as_run(outputs: Path, model: str, graphs: dict[str, dict], rows: list[dict]) -> None:
    """A finished run of 020, as its manifest says."""
    folder = outputs / "020_attribution_graphs" / f"{model}-quick"
    for name, value in graphs.items():
        files.write(folder / "graphs" / f"{name}.json", value)
    files.write(folder / "prompts.csv", pd.DataFrame(rows))
    files.write(folder / "summary.json", {"done": 1})
    paths = [*folder.glob("graphs/*"), folder / "prompts.csv", folder / "summary.json"]
    stages = {p.relative_to(folder).as_posix(): {"sha256": files.sha256(p)} for p in paths}
    files.write(folder / "manifest.json", {
        "settings": {"model": model, "quick": True, "tag": ""}, "quick": True, "tag": "",
        "code": "", "models": {}, "upstream": {}, "stages": stages,
    })  # fmt: skip


def from_random(seed: int) -> dict:
    c = random_graph(seed).circuit
    nodes = [("t", "E", int(p)) if n < 0 else ("f", str(n), int(p))
             for n, p in zip(c.layer, c.pos, strict=True)]  # fmt: skip
    edges = {(int(s), int(t)): float(c.weights[t, s]) for t, s in np.argwhere(c.weights)}
    return exported(nodes, edges)


def test_a_run_reads_its_own_model_and_others_and_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    rows = [{"id": f"q{n}-{where}", "group": "maze", "where": where, "pair": f"q{n}"}
            for n in range(3) for where in ("trace", "answer")]  # fmt: skip
    for offset, model in enumerate(("mine", "other")):
        graphs = {row["id"]: from_random(100 * offset + n) for n, row in enumerate(rows)}
        as_run(tmp_path / "outputs", model, graphs, rows)
    args = ["--model", "mine", "--quick", "--count", "5", "--edges", "150"]
    run = execute(RUN.Config, RUN.main, SOURCE, args)
    results = Results(run.folder)
    about = results.read("graphs.csv")
    assert about["model"].value_counts().to_dict() == {"mine": 6, "other": 6}
    assert (about["kept"] == 150).all() and about["where"].nunique() == 2
    assert f"020_attribution_graphs/graphs/{about['id'][0]}.json" in str(results.manifest)
    nulls = results.read("nulls.parquet")
    assert set(nulls["null"]) == {"cells", "layers", "causal", "signs", "weights"}
    contrasts = results.read("contrasts.csv")
    pairs = contrasts.loc[contrasts["kind"] == "model", ["one", "other", "paired", "n"]]
    assert pairs.to_numpy().tolist() == [["mine", "other", True, 6]] * 5  # one per null
    summary = json.dumps(results.read("summary.json"))
    assert "Infinity" not in summary and 15 <= len(json.loads(summary)) <= 40
    folder = tmp_path / "outputs" / "020_attribution_graphs" / "mine-quick" / "graphs"
    args += ["--graphs", str(folder), "--tag", "files"]
    again = Results(execute(RUN.Config, RUN.main, SOURCE, args).folder)
    assert set(again.read("graphs.csv")["model"]) == {"made"}
    assert not again.manifest["upstream"]
    with pytest.raises(BadInput, match="020"):
        execute(RUN.Config, RUN.main, SOURCE, ["--model", "none", "--quick"])
