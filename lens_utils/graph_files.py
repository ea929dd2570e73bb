"""Attribution graphs as JSON, in the format that Neuronpedia and circuit-tracer's viewer read.

A file holds `metadata` (with the prompt and its tokens), `qParams` (what the viewer shows: pinned
nodes, supernodes), `nodes` and signed `links`. Of its conventions, three matter:

- A node's `feature` is the Cantor pairing of layer and index, one number for both. Older files, of
  Anthropic's first release, have no schema_version and hold the index itself.
- Ids are layer_index_position. Errors get index -1: circuit-tracer 0.5.0 writes 0_layer_position,
  which is also the id of feature `layer` in layer 0. Ids are checked to be unique, here and there.
- `influence` is the cumulative share: small is important.

`export` writes a pruned graph, `table` reads any such file, and what `load` reads is kept as it is,
so that unknown keys survive. Weights are written so that they come back bit for bit.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from torch import Tensor

from lens_utils import files
from lens_utils.attribution_graph import Graph, Pruned
from lens_utils.errors import BadInput

KINDS = {"cross layer transcoder": "feature", "mlp reconstruction error": "error",
         "embedding": "token", "logit": "logit"}  # fmt: skip
TYPES = {kind: name for name, kind in KINDS.items()}
METADATA = ("slug", "scan", "prompt_tokens", "prompt")
NODE = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp")


def cantor(layer: int, index: int) -> int:
    """One number for two: Cantor's pairing."""
    return (layer + index) * (layer + index + 1) // 2 + index


def uncantor(number: int) -> tuple[int, int]:
    """Layer and index of a Cantor number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


# Writing


def export(
    graph: Graph,
    pruned: Pruned,
    slug: str,
    scan: str,
    tokens: Sequence[str],
    logit_tokens: Sequence[str],
    labels: Mapping[tuple[int, int], str] | None = None,
    supernodes: Sequence[Sequence[str]] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A pruned graph as the format's JSON value.

    tokens, logit_tokens: the text of the prompt's tokens and of the logits'. labels: by layer and
    index. supernodes: a label and the ids of its members. metadata: further keys, such as
    pruning_settings. Raises BadInput for a supernode of nodes that are not there.
    """
    nodes = [
        node | {"influence": float(pruned.cumulative[i])}
        for i, node in enumerate(_nodes(graph, logit_tokens, labels or {}))
    ]
    kept = pruned.nodes.nonzero().flatten().tolist()
    target, source = pruned.edges.nonzero(as_tuple=True)
    weights = graph.edges[target, source].tolist()
    value = {
        "metadata": {
            "slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": list(tokens),
            "prompt": "".join(tokens), "schema_version": 1, **(metadata or {}),
        },
        "qParams": {
            "pinnedIds": [], "supernodes": [list(group) for group in supernodes],
            "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": [nodes[i] for i in kept],
        "links": [
            {"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": weight}
            for t, s, weight in zip(target.tolist(), source.tolist(), weights, strict=True)
        ],
    }  # fmt: skip
    check(value, slug)
    return value


def _nodes(
    graph: Graph, logit_tokens: Sequence[str], labels: Mapping[tuple[int, int], str]
) -> list[dict[str, Any]]:
    """All nodes of a graph, in its order."""
    ids, last = graph.ids.tolist(), len(graph.ids) - 1
    found = [
        _node("feature", layer, index, pos, cantor(layer, index),
              clerp=labels.get((layer, index), ""), activation=activation)
        for (layer, pos, index), activation
        in zip(graph.features.tolist(), graph.activations.tolist(), strict=True)
    ]  # fmt: skip
    found += [_node("error", layer, -1, pos, -1)
              for layer in range(graph.n_layers) for pos in range(len(ids))]  # fmt: skip
    found += [_node("token", "E", token, pos, pos) for pos, token in enumerate(ids)]
    logits = zip(graph.logit_ids.tolist(), graph.logit_probs.tolist(), logit_tokens, strict=True)
    found += [
        _node("logit", graph.n_layers + 1, token, last, token, token_prob=prob,
              is_target_logit=rank == 0, clerp=f'Output "{text}" (p={prob:.3f})')
        for rank, (token, prob, text) in enumerate(logits)
    ]  # fmt: skip
    return found


def _node(
    kind: str, layer: int | str, index: int, pos: int, feature: int, **more: Any
) -> dict[str, Any]:
    # The viewer's own id: one for a feature at all its positions.
    js_id = f"{'L' if kind == 'logit' else layer}_{index}-{0 if kind == 'feature' else pos}"
    plain = {"clerp": "", "token_prob": 0.0, "is_target_logit": False, "run_idx": 0,
             "reverse_ctx_idx": 0, "activation": None}  # fmt: skip
    return {
        "node_id": f"{layer}_{index}_{pos}", "feature": feature, "layer": str(layer),
        "ctx_idx": pos, "feature_type": TYPES[kind], "jsNodeId": js_id, **plain, **more,
    }  # fmt: skip


# Reading


def load(path: Path) -> dict[str, Any]:
    """A graph file's JSON value, checked. Raises BadInput naming the file and what is wrong."""
    try:
        value = files.read(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"{path.name} cannot be read as a graph: {reason}") from None
    check(value, path.name)
    return value


def check(value: Any, name: str) -> None:
    """Raises BadInput, in one line, for what is no graph in this format."""

    def wrong(what: str) -> BadInput:
        return BadInput(f"{name} is no attribution graph: {what}")

    if not isinstance(value, dict):
        raise wrong("it is not a JSON object")
    for key, kind in (("metadata", dict), ("nodes", list), ("links", list)):
        if not isinstance(value.get(key), kind):
            raise wrong(f"{key} is missing or no {'object' if kind is dict else 'list'}")
    if missing := [key for key in METADATA if key not in value["metadata"]]:
        raise wrong(f"metadata has no {missing[0]}")
    for node in value["nodes"]:
        if missing := [key for key in NODE if key not in node]:
            raise wrong(f"node {node.get('node_id')} has no {missing[0]}")
        layer = str(node["layer"])
        if layer != "E" and not layer.lstrip("-").isdecimal():
            raise wrong(f"node {node['node_id']} is in layer {layer}")
    times = Counter(node["node_id"] for node in value["nodes"])
    if twice := [node_id for node_id, n in times.items() if n > 1]:
        raise wrong(f"{len(twice)} ids stand for more than one node, such as {twice[0]}")
    for link in value["links"]:
        if lost := [link.get(end) for end in ("source", "target") if link.get(end) not in times]:
            raise wrong(f"a link from or to {lost[0]}, which is no node")
        weight = link.get("weight")
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise wrong(f"the link from {link['source']} weighs {weight}")
    for label, *members in value.get("qParams", {}).get("supernodes", ()):
        if lost := [member for member in members if member not in times]:
            raise wrong(f"supernode {label!r} contains {lost[0]}, which is no node")


class Table(NamedTuple):
    """A graph file as a frame and a matrix."""

    nodes: pd.DataFrame
    """node_id, kind (feature, error, token, logit, or what the file says), layer (-1 for tokens,
    the number of layers for logits), pos, index, influence, activation, prob, label."""
    edges: Float[np.ndarray, "node node"]
    """Target x source, in the order of the nodes."""


def table(value: Mapping[str, Any]) -> Table:
    """Nodes and edges of a graph file of either age.

    index is a feature's own, not its Cantor number; of tokens and logits the token id, where the
    node's id tells it; -1 of errors.
    """
    raw = value["metadata"].get("schema_version") is None
    kinds = [KINDS.get(node["feature_type"], node["feature_type"]) for node in value["nodes"]]
    inside = [int(node["layer"]) for node, kind in zip(value["nodes"], kinds, strict=True)
              if kind not in ("token", "logit")]  # fmt: skip
    # A pruned graph may have nothing of the last layers: newer files say how many there are.
    said = [int(node["layer"]) - 1 for node, kind in zip(value["nodes"], kinds, strict=True)
            if kind == "logit" and not raw]  # fmt: skip
    above = {"token": -1, "logit": max([max(inside, default=-1) + 1, *said])}
    frame = pd.DataFrame([
        {
            "node_id": node["node_id"],
            "kind": kind,
            "layer": above[kind] if kind in above else int(node["layer"]),
            "pos": int(node["ctx_idx"]),
            "index": _index(node, kind, raw),
            "influence": node.get("influence"),
            "activation": node.get("activation"),
            "prob": node.get("token_prob") or 0.0,
            "label": node["clerp"] or "",
        }
        for node, kind in zip(value["nodes"], kinds, strict=True)
    ])  # fmt: skip
    place = {node["node_id"]: i for i, node in enumerate(value["nodes"])}
    edges = np.zeros((len(place), len(place)))
    for link in value["links"]:
        edges[place[link["target"]], place[link["source"]]] += link["weight"]
    return Table(frame, edges)


def _index(node: Mapping[str, Any], kind: str, raw: bool) -> int:
    """A node's index among those of its layer, or its token id."""
    if kind == "error":
        return -1
    if kind in ("token", "logit"):
        token = str(node["node_id"]).split("_")[1:2]
        return int(token[0]) if token and token[0].isdecimal() else int(node["feature"])
    if raw:
        return int(node["feature"])
    layer, index = uncantor(int(node["feature"]))
    if layer != int(node["layer"]):
        raise BadInput(f"node {node['node_id']}: feature {node['feature']} is in layer {layer} by "
                       f"its number, in layer {node['layer']} by its word")  # fmt: skip
    return index


# Whole graphs, before pruning


def tensors(graph: Graph) -> dict[str, Shaped[Tensor, "..."]]:
    """A graph as what a .safetensors file holds."""
    values = {field.name: getattr(graph, field.name) for field in fields(graph)}
    return values | {"n_layers": graph.ids.new_tensor(graph.n_layers)}


def from_tensors(values: Mapping[str, Shaped[Tensor, "..."]]) -> Graph:
    """What `tensors` was made of. Raises BadInput where something is missing."""
    if missing := [field.name for field in fields(Graph) if field.name not in values]:
        raise BadInput(f"not an attribution graph: it has no {missing[0]}")
    return Graph(**{**values, "n_layers": int(values["n_layers"])})
