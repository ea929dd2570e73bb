"""Exported graphs as circuits: whose they are, what an edge weighs, which edges are kept.

An edge weighs the share that it has in everything that is listed as its target's input (errors
included), with its sign: so edges of different layers and models are on one scale. Errors, of which
nothing is known but that they are not features, are then left out.

Raw graphs are saturated: nearly every pair of nodes has an edge. Counts follow the number of edges,
so that all graphs are cut to the same number, their strongest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lens_utils import files, graph_files
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.motifs import Circuit

PLACE = re.compile(r"[-_.](prompt|trace|answer)\b.*$")


@dataclass(frozen=True)
class Graph:
    """One prompt's circuit and where it comes from."""

    model: str
    id: str
    group: str
    where: str
    """What is predicted: a prompt's next token, a step of the trace, the answer."""
    item: str
    """The problem asked about: what is resampled. Graphs of one problem share it."""
    nodes: pd.DataFrame
    """As graph_files.table has them; those of the circuit."""
    circuit: Circuit
    inputs: np.ndarray
    """What each node's edges were divided by: the sum of its input's sizes."""
    tokens: tuple[str, ...]
    errors: float
    """Share of |edges| that came from errors."""

    @property
    def edges(self) -> int:
        return int((self.circuit.weights != 0).sum())

    def cut(self, edges: int) -> Graph:
        """Its strongest edges, and the nodes that have one."""
        kept = self.circuit
        if edges < self.edges:
            kept = kept.strongest(edges / self.edges)
        used = (kept.weights != 0).any(0) | (kept.weights != 0).any(1)
        return replace(self, circuit=kept.at(used), inputs=self.inputs[used],
                       nodes=self.nodes[used].reset_index(drop=True))  # fmt: skip

    def unscaled(self) -> Graph:
        """The same with edges as they were exported."""
        c = self.circuit
        raw = Circuit(c.weights * self.inputs[:, None], c.layer, c.pos, c.climb)
        return replace(self, circuit=raw)


def gather(run: Run, folder: str, own: str) -> list[Graph]:
    """A folder's graphs, or 020's: of this run's model first, then of the others that have them.

    Raises BadInput where there is none, or for a file that holds no graph.
    """
    if folder:
        return list(of_folder(Path(folder).expanduser(), own))
    others = [name for name in run.models_of("020_attribution_graphs") if name != own]
    return [graph for name in [own, *others] for graph in of_run(run, name)]


def of_run(run: Run, model: str) -> Iterator[Graph]:
    """What 020 exported for one model."""
    for row in run.upstream("020_attribution_graphs", "prompts.csv", model).to_dict("records"):
        name = f"graphs/{row['id']}.json"
        value = run.upstream("020_attribution_graphs", name, model)
        yield read(value, name, model, row)


def of_folder(folder: Path, model: str) -> Iterator[Graph]:
    """Anyone's exported graphs; a prompts.csv beside them may name their groups."""
    paths = sorted(folder.glob("*.json"))
    known, said = {}, folder / "prompts.csv"
    if said.exists():
        known = {str(row["id"]): row for row in files.read(said).to_dict("records")}
    paths = [p for p in paths if p.stem in known] if known else paths
    paths = [path for path in paths if path.name != "graph-metadata.json"]  # circuit-tracer's list
    if not paths:
        raise BadInput(f"{folder} holds no graphs: exported ones are files named *.json")
    for path in paths:
        value = graph_files.load(path)
        row = known.get(path.stem, {"id": path.stem})
        yield read(value, path.name, str(value["metadata"]["scan"] or model), row)


def read(value: dict, name: str, model: str, row: dict) -> Graph:
    """A graph file's circuit: edges as shares of their targets' input, without errors."""
    graph_files.check(value, name)
    nodes, edges = graph_files.table(value)
    inputs = np.abs(edges).sum(1, keepdims=True)
    shares = np.divide(edges, inputs, out=np.zeros_like(edges), where=inputs > 0)
    kept = (nodes["kind"] != "error").to_numpy()
    lost = np.abs(edges[:, ~kept]).sum() / max(np.abs(edges).sum(), 1e-30)
    layer, pos = nodes["layer"].to_numpy(), nodes["pos"].to_numpy()
    try:
        circuit = Circuit(shares, layer, pos, climbs(nodes, shares)).at(kept)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
    about = {"group": "all", "where": "prompt", "pair": PLACE.sub("", str(row["id"])), **row}
    return Graph(
        model, str(row["id"]), str(about["group"]), str(about["where"]), str(about["pair"]),
        nodes[kept].reset_index(drop=True), circuit, inputs[kept, 0],
        tuple(value["metadata"]["prompt_tokens"]), float(lost),
    )  # fmt: skip


def climbs(nodes: pd.DataFrame, shares: np.ndarray) -> np.ndarray:
    """How many layers an edge from an earlier position climbs at least, for each target.

    One for features (attention runs before the MLP reads) and two for logits; but two for features
    as well where attention and MLP run side by side. A file does not say which, its edges do.
    """
    layer, pos = nodes["layer"].to_numpy(), nodes["pos"].to_numpy()
    logit = (nodes["kind"] == "logit").to_numpy()
    one_up = (layer[:, None] - layer == 1) & (pos[:, None] > pos) & (shares != 0)
    found = np.full(len(nodes), 2)
    for part in (logit, ~logit):
        if one_up[part].any():
            found[part] = 1
    return found


def few(graphs: list[Graph], most: int) -> list[Graph]:
    """At most so many graphs, from all models, places and groups in turn."""
    by_kind: dict[tuple, list[int]] = {}
    for at, graph in enumerate(graphs):
        by_kind.setdefault((graph.model, graph.where, graph.group), []).append(at)
    turns = sorted((turn, at) for part in by_kind.values() for turn, at in enumerate(part))
    return [graphs[at] for at in sorted(at for _, at in turns[:most])]


def described(graphs: list[Graph], edges: int) -> pd.DataFrame:
    """What each graph is: how large, how dense, how much of it are errors, what is kept."""
    rows = []
    for graph in graphs:
        cut = graph.cut(edges)
        size = np.abs(cut.circuit.weights)
        rows.append({
            "model": graph.model, "id": graph.id, "group": graph.group, "where": graph.where,
            "item": graph.item, "tokens": len(graph.tokens), "nodes": len(graph.nodes),
            "edges": graph.edges, "density": graph.edges / max(graph.circuit.possible.sum(), 1),
            "errors": graph.errors, "kept": cut.edges, "kept_nodes": len(cut.nodes),
            "kept_density": cut.edges / max(cut.circuit.possible.sum(), 1),
            "weakest": size[size > 0].min(initial=1.0),
            "negative": float((cut.circuit.weights < 0).sum() / max(cut.edges, 1)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def name(node: pd.Series, tokens: tuple[str, ...]) -> str:
    """A node as a reader wants it: its label, or its layer and number, and its token."""
    at = tokens[node["pos"]].strip() if node["pos"] < len(tokens) else str(node["pos"])
    if node["kind"] == "token":
        return f"token {at}"
    if node["kind"] == "logit":
        return str(node["label"]) or f"logit {node['index']}"
    what = str(node["label"]) or f"#{node['index']}"
    return f"L{node['layer']} {what} @ {at}"
