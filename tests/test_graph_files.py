"""Graph files against a schema written by hand, circuit-tracer's own file, and an older one."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lens_utils import files, graph_files
from lens_utils.attribution_graph import Graph, prune
from lens_utils.errors import BadInput
from lens_utils.graph_files import cantor, check, export, load, table, uncantor

RECORDED = Path(__file__).parent / "fixtures" / "circuit_tracer"
TEXT, NUMBER = {"type": "string"}, {"type": "number"}
SCHEMA = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt"],
            "properties": {
                "slug": TEXT, "scan": TEXT, "prompt": TEXT,
                "prompt_tokens": {"type": "array", "items": TEXT},
                "transcoder_list": {"type": "array", "items": TEXT},
                "schema_version": {"const": 1},
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "properties": {
                "pinnedIds": {"type": "array", "items": TEXT},
                "supernodes": {"type": "array", "items": {"type": "array", "items": TEXT}},
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId",
                             "clerp"],
                "properties": {
                    "node_id": TEXT, "jsNodeId": TEXT, "clerp": TEXT, "layer": TEXT,
                    "feature": {"type": "integer"}, "ctx_idx": {"type": "integer", "minimum": 0},
                    "feature_type": {"enum": ["cross layer transcoder", "embedding", "logit",
                                              "mlp reconstruction error"]},
                    "token_prob": NUMBER, "is_target_logit": {"type": "boolean"},
                    "run_idx": {"type": "integer"}, "reverse_ctx_idx": {"type": "integer"},
                    "influence": {"type": ["number", "null"]},
                    "activation": {"type": ["number", "null"]},
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "properties": {"source": TEXT, "target": TEXT, "weight": NUMBER},
            },
        },
    },
}  # fmt: skip


def small(n_layers: int = 3) -> Graph:
    """Random edges from below to above; feature 1 of layer 0 at position 1 is there on purpose."""
    features = torch.tensor([[0, 1, 1], [0, 1, 5], [1, 0, 2], [2, 1, 70_000]])
    ids, logits = torch.tensor([3, 9]), torch.tensor([4, 11])
    n = len(features) + n_layers * 2 + 2 + 2
    depth = torch.tensor([0, 0, 1, 2, *(layer for layer in range(n_layers) for _ in ids), -1, -1,
                          n_layers, n_layers])  # fmt: skip
    reads = torch.zeros(n, dtype=torch.bool)
    reads[:4] = reads[-2:] = True
    edges = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    edges *= (depth[None] < depth[:, None]) & reads[:, None]
    rest = torch.randn(n, generator=torch.Generator().manual_seed(1))
    return Graph(ids, n_layers, features, torch.tensor([1.5, 0.1, 2.0, 0.3]), logits,
                 torch.tensor([0.7, 0.1]), edges, rest, 2 * rest, 3 * rest)  # fmt: skip


def exported(graph: Graph, **more) -> dict:
    pruned = prune(graph, 1.0, 1.0)
    return export(graph, pruned, "small", "mine", ["The", " cat"], [" sat", " ran"], **more)


MORE = {
    "labels": {(0, 5): "<b>digits</b>"},
    "supernodes": [["both", "0_1_1", "0_5_1"]],
    "metadata": {"pruning_settings": {"node_threshold": 1}},
}


def test_files_follow_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(files.read(RECORDED / "graph.json"), SCHEMA)  # the schema is theirs too
    jsonschema.validate(exported(small(), **MORE), SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(exported(small(), metadata={"schema_version": 2}), SCHEMA)


def test_an_exported_graph_comes_back(tmp_path):
    graph = small()
    value = exported(graph, **MORE)
    files.write(tmp_path / "small.json", value)
    assert load(tmp_path / "small.json") == value
    nodes, edges = table(load(tmp_path / "small.json"))
    pruned = prune(graph, 1.0, 1.0)
    kept = pruned.nodes
    np.testing.assert_array_equal(edges, graph.edges[kept][:, kept].numpy())  # bit for bit
    found = nodes[nodes.kind == "feature"]
    expected = graph.features.tolist()
    assert found[["layer", "pos", "index"]].values.tolist() == expected
    assert found.activation.tolist() == graph.activations.tolist()
    assert found.label.tolist() == ["", "<b>digits</b>", "", ""]
    logits = nodes[nodes.kind == "logit"]
    assert (
        logits["index"].tolist() == [4, 11] and logits.prob.tolist() == graph.logit_probs.tolist()
    )
    assert (logits.layer == 3).all() and (nodes[nodes.kind == "token"].layer == -1).all()
    assert nodes[nodes.kind == "token"]["index"].tolist() == [3, 9]
    np.testing.assert_allclose(nodes.influence, pruned.cumulative[kept].numpy())
    assert [node["node_id"] for node in value["nodes"] if node["is_target_logit"]] == ["4_4_1"]


def test_pruned_nodes_and_edges_stay_out():
    graph = small()
    pruned = prune(graph, 0.6, 0.7)
    value = export(graph, pruned, "small", "mine", ["The", " cat"], [" sat", " ran"])
    nodes, edges = table(value)
    assert len(nodes) == pruned.nodes.sum() < len(graph.edges)
    assert (edges != 0).sum() == pruned.edges.sum() == len(value["links"])
    assert value["links"] == sorted(value["links"], key=value["links"].index)
    again = export(graph, pruned, "small", "mine", ["The", " cat"], [" sat", " ran"])
    assert json.dumps(value) == json.dumps(again)


def test_circuit_tracers_own_file(tmp_path):
    """Its nodes are those of the recorded graph; nothing of it is lost on the way."""
    text = (RECORDED / "graph.json").read_text()
    value = load(RECORDED / "graph.json")
    files.write(tmp_path / "graph.json", value)
    assert json.loads((tmp_path / "graph.json").read_text()) == json.loads(text)
    nodes, edges = table(value)
    theirs = files.read(RECORDED / "graphs.safetensors")
    theirs = {k.removeprefix("plain/greedy/"): v for k, v in theirs.items() if "plain/greedy" in k}
    kept = theirs["nodes"]
    features = theirs["features"][kept[: len(theirs["features"])]]
    found = nodes[nodes.kind == "feature"][["layer", "index", "pos"]].values
    assert sorted(map(tuple, found)) == sorted(map(tuple, features[:, [0, 2, 1]].tolist()))
    weights = theirs["adjacency"][theirs["edges"]]
    np.testing.assert_allclose(np.sort(edges[edges != 0]), weights.sort().values, rtol=1e-6)
    assert set(nodes.kind) == {"feature", "error", "token", "logit"}
    assert nodes[nodes.kind == "logit"].layer.unique().tolist() == [2]


def test_logits_stay_above_layers_that_were_pruned():
    """A logit two layers above the highest node, as attention may carry an earlier token to it."""
    value = exported(small())
    gone = {n["node_id"] for n in value["nodes"] if n["layer"] == "2"}
    value["nodes"] = [n for n in value["nodes"] if n["node_id"] not in gone]
    value["links"] = [k for k in value["links"] if not gone & {k["source"], k["target"]}]
    nodes, _ = table(value)
    assert nodes[nodes.kind != "logit"].layer.max() == 1
    assert (nodes[nodes.kind == "logit"].layer == 3).all()


def test_an_older_file_has_plain_indices_and_no_version():
    """As the first public graphs were written: logits in the last layer, no schema_version."""
    parts = [("E_5_0", 0, "E", 0, "embedding"), ("3_917_1", 917, "3", 1, "cross layer transcoder"),
             ("err_3_1", -1, "3", 1, "mlp reconstruction error"),
             ("3_42_1", 42, "3", 1, "logit")]  # fmt: skip
    keys = ("node_id", "feature", "layer", "ctx_idx", "feature_type")
    rest = {"jsNodeId": "x", "clerp": None, "token_prob": 0.5}
    nodes = [dict(zip(keys, part, strict=True)) | rest for part in parts]
    links = [{"source": "E_5_0", "target": "3_917_1", "weight": -2},
             {"source": "3_917_1", "target": "3_42_1", "weight": 0.25}]  # fmt: skip
    value = {"metadata": {"slug": "s", "scan": "h", "prompt_tokens": ["a"], "prompt": "a"},
             "nodes": nodes, "links": links}  # fmt: skip
    check(value, "old")
    found, edges = table(value)
    assert found["index"].tolist() == [5, 917, -1, 42]
    assert found.layer.tolist() == [-1, 3, 3, 4]
    assert edges[1, 0] == -2 and edges[3, 1] == 0.25 and np.count_nonzero(edges) == 2


def test_cantor_numbers():
    pairs = [(layer, index) for layer in (0, 1, 29) for index in (0, 1, 8, 131_071)]
    assert [uncantor(cantor(*pair)) for pair in pairs] == pairs
    assert sorted(cantor(a, b) for a in range(4) for b in range(4 - a)) == list(range(10))
    assert cantor(2, 3) == 18  # (2 + 3) * 6 / 2 + 3


def test_whole_graphs_come_back(tmp_path):
    graph = small()
    files.write(tmp_path / "graph.safetensors", graph_files.tensors(graph))
    again = graph_files.from_tensors(files.read(tmp_path / "graph.safetensors"))
    assert again.n_layers == 3 and torch.equal(again.edges, graph.edges)
    assert torch.equal(again.features, graph.features) and torch.equal(again.bias, graph.bias)
    with pytest.raises(BadInput, match="it has no features"):
        graph_files.from_tensors({"ids": graph.ids, "n_layers": torch.tensor(3)})


def test_bad_files_are_told_in_one_line(tmp_path):
    good = exported(small())
    path = tmp_path / "graph.json"

    def broken(change, says):
        value = copy.deepcopy(good)
        change(value)
        path.write_text(json.dumps(value))
        with pytest.raises(BadInput, match=says) as error:
            table(load(path))
        assert "\n" not in str(error.value)

    broken(lambda g: g.pop("links"), "graph.json is no attribution graph: links is missing")
    broken(lambda g: g["metadata"].pop("prompt"), "metadata has no prompt")
    broken(lambda g: g["nodes"][1].pop("feature_type"), "node 0_5_1 has no feature_type")
    broken(lambda g: g["nodes"][1].update(node_id="0_1_1"), "1 ids stand for more than one node")
    broken(lambda g: g["nodes"][0].update(layer="top"), "is in layer top")
    broken(lambda g: g["nodes"][0].update(layer="1"), "in layer 0 by its number, in layer 1 by")
    broken(lambda g: g["links"][0].update(source="0_9_9"), "0_9_9, which is no node")
    broken(lambda g: g["links"][0].update(weight=float("nan")), "weighs nan")
    broken(lambda g: g["qParams"].update(supernodes=[["a", "9"]]), "supernode 'a' contains 9")
    path.write_text("{")
    with pytest.raises(BadInput, match=r"graph.json cannot be read as a graph"):
        load(path)
    with pytest.raises(BadInput, match="supernode 'gone' contains 7_7_7"):
        exported(small(), supernodes=[["gone", "7_7_7"]])
