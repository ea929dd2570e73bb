"""What experiment 020 computes for one prompt: its graph, what it predicts, what the model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse.csgraph import connected_components

from lens_utils import (
    attribution_graph,
    frozen,
    graph_files,
    graph_gate,
    graph_page,
    transcoder_sets,
)
from lens_utils.attribution_graph import Graph, Pruned
from lens_utils.errors import BadInput
from lens_utils.interventions import Change, changes, intervene
from lens_utils.norm_response import respond, same_nodes
from lens_utils.replacement import freeze
from lens_utils.sparse import Transcoder

if TYPE_CHECKING:
    from run import Config

    from lens_utils.experiment import Run

QUICK_FEATURES, QUICK_INTERVENTIONS = 200, 5
CONTROL_FEATURES = 500  # of graphs that are only scored
CONSTRAINED = 5  # interventions that are repeated with everything held
FACTORS = {"ablated": 0.0, "nudged": 0.75, "steered": 2.0}  # what an activation is multiplied by
SHOWN = 40  # features of a graph that are grouped and pinned
ALIKE = 0.5  # cosine of decoder rows from which features of a layer are one supernode


@dataclass(frozen=True)
class Traced:
    """One prompt's graph."""

    id: str
    linear: frozen.Frozen
    graph: Graph
    pruned: Pruned


class Session:
    """The model, its transcoders and what the features are called."""

    def __init__(self, cfg: Config, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self._last: Traced | None = None
        quick = cfg.quick
        self.max_features = min(cfg.max_features, QUICK_FEATURES) if quick else cfg.max_features
        self.n = min(cfg.interventions, QUICK_INTERVENTIONS) if quick else cfg.interventions

    @cached_property
    def model(self):
        return self.run.model()

    @cached_property
    def transcoders(self) -> dict[int, Transcoder]:
        if self.cfg.transcoders in transcoder_sets.SETS:  # named in READS; a folder needs no run
            self.run.upstream("018_transcoders", f"{self.cfg.transcoders}.json")
        return transcoder_sets.load(self.run, self.cfg.transcoders)

    @cached_property
    def labels(self) -> dict[tuple[int, int], str]:
        """019's labels, if it has run; they are those of the trained set."""
        if self.cfg.transcoders != "trained":
            return {}
        try:
            table = self.run.upstream("019_feature_atlas", "labels.csv")
        except BadInput:
            return {}
        return {(int(r.layer), int(r.feature)): str(r.label) for r in table.itertuples()
                if isinstance(r.label, str)}  # fmt: skip

    @cached_property
    def shuffled(self) -> dict[int, Transcoder]:
        """The control: what features write, dealt out anew within each layer."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        made = {}
        for layer, t in self.transcoders.items():
            order = torch.randperm(t.n_features, generator=generator).to(t.W_dec.device)
            made[layer] = Transcoder(t.W_enc, t.b_enc, t.W_dec[order], t.b_dec, t.W_skip, t.k,
                                     t.threshold)  # fmt: skip
        return made

    # Graphs

    def of(self, row: dict[str, Any]) -> Traced:
        """The prompt's graph; the last one is kept."""
        if self._last is None or self._last.id != row["id"]:
            linear = freeze(self.model, self.transcoders, _ids(row))
            graph = self._build(linear, self.max_features)
            pruned = attribution_graph.prune(graph, self.cfg.nodes, self.cfg.edges)
            self._last = Traced(row["id"], linear, graph, pruned)
        return self._last

    def _build(self, linear: frozen.Frozen, most: int) -> Graph:
        return frozen.build(linear, most, int(self.cfg.budget * 2**30))

    def export(self, row: dict[str, Any]) -> dict[str, Any]:
        """The pruned graph in Neuronpedia's format, its scores and controls among the metadata."""
        traced, decode = self.of(row), self.model.decode
        graph, pruned = traced.graph, traced.pruned
        groups = self.supernodes(traced)
        control = self._build(freeze(self.model, self.shuffled, _ids(row)), CONTROL_FEATURES)
        metadata = {
            "transcoder_list": [self.cfg.transcoders],
            "group": row["group"], "where": row["where"],
            "scores": _scores(traced.linear, graph, pruned)
            | {f"shuffled_{k}": v for k, v in attribution_graph.scores(control)._asdict().items()},
            "pruning_settings": {"node_threshold": self.cfg.nodes,
                                 "edge_threshold": self.cfg.edges},
            "generation_settings": {"max_feature_nodes": self.max_features},
        }  # fmt: skip
        value = graph_files.export(
            graph, pruned, str(row["id"]), self.model.name,
            [decode([i]) for i in graph.ids.tolist()],
            [decode([i]) for i in graph.logit_ids.tolist()],
            self.labels, groups, metadata,
        )  # fmt: skip
        target = next(node["node_id"] for node in value["nodes"] if node["is_target_logit"])
        value["qParams"]["pinnedIds"] = [i for _, *members in groups for i in members] + [target]
        return value

    def supernodes(self, traced: Traced) -> list[list[str]]:
        """Groups of the most important features: of one label, or writing much the same."""
        graph, pruned = traced.graph, traced.pruned
        kept = pruned.nodes[graph.parts["feature"]].nonzero().flatten()
        rank = pruned.cumulative[kept].argsort()[:SHOWN]
        places = graph.features[kept[rank]].tolist()
        if not places:
            return []
        rows = torch.stack([self.transcoders[layer].W_dec[index] for layer, _, index in places])
        rows = torch.nn.functional.normalize(rows.float(), dim=1)
        names = [self.labels.get((layer, index), "") for layer, _, index in places]
        layer = torch.tensor([place[0] for place in places])
        alike = ((rows @ rows.T).cpu() > ALIKE) & (layer[:, None] == layer)
        same = np.array([[bool(a) and a == b for b in names] for a in names])
        _, group = connected_components(alike.numpy() | same, directed=False)
        found = []
        for g in dict.fromkeys(group.tolist()):
            members = [i for i in range(len(places)) if group[i] == g]
            first_layer, _, index = places[members[0]]
            name = names[members[0]] or f"L{first_layer} feature {index}"
            if len(members) > 1:
                others = len({(places[i][0], places[i][2]) for i in members}) - 1
                name += f" and {others} like it" if others else ""
                found.append([name, *("_".join(map(str, (places[i][0], places[i][2], places[i][1])))
                                      for i in members)])  # fmt: skip
        return found

    def page(self, row: dict[str, Any], value: dict[str, Any]) -> str:
        """The pruned graph as a page of its own."""
        title = f"{self.model.name}: {row['asked']} ({row['id']}), next token {row['said']!r}"
        return graph_page.page(value, title)

    # Interventions

    def trace(self, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
        """Predicted and measured effects on the target's logit, for each prompt's top features.

        held: of the graph itself, whose norms are held; moving: of the same nodes with norms that
        respond. Measured: the feature taken away (ablated), by a quarter (nudged), doubled
        (steered), and taken away with everything held (constrained, for a few).
        """
        return pd.concat([self._effects(row) for row in rows], ignore_index=True)

    def _effects(self, row: dict[str, Any]) -> pd.DataFrame:
        traced = self.of(row)
        self.run.stage(f"graphs/{row['id']}.json", lambda: self.export(row))
        graph = traced.graph
        moving = same_nodes(graph, respond(self.model, traced.linear))
        table = pd.DataFrame(graph.features.tolist(), columns=["layer", "pos", "index"])
        table["activation"] = graph.activations.cpu().numpy().astype(float)
        for name, one in (("held", graph), ("moving", moving)):
            effects = attribution_graph.effects(one)
            table[f"{name}_direct"] = -effects.direct[0].cpu().numpy().astype(float)
            table[f"{name}_total"] = -effects.total[0].cpu().numpy().astype(float)
        tops = {name: np.argsort(-table[f"{name}_total"].abs().to_numpy(), kind="stable")[: self.n]
                for name in ("held", "moving")}  # fmt: skip
        either = np.union1d(tops["held"], tops["moving"])
        others = graph_gate.matched(
            table[["layer", "pos", "index"]].to_numpy(), table.activation.to_numpy(), either,
            self.cfg.seed,
        )  # fmt: skip
        for name, at in {**tops, "matched": others[: self.n]}.items():
            table[f"top_{name}" if name != "matched" else name] = np.isin(table.index, at)
        table = table[table.top_held | table.top_moving | table.matched].reset_index(drop=True)
        places = [tuple(map(int, place)) for place in table[["layer", "pos", "index"]].to_numpy()]
        for name, factor in FACTORS.items():
            sets = [[Change(*at, factor * a)]
                    for at, a in zip(places, table.activation, strict=True)]  # fmt: skip
            table[name] = self._measured(graph, sets)
        few = [[Change(*at)] for at in places[:CONSTRAINED]]
        table["constrained"] = np.nan
        table.loc[: len(few) - 1, "constrained"] = self._measured(graph, few, constrained=True)
        names = [self.labels.get((layer, index), "") for layer, _, index in places]
        return table.assign(label=names, id=row["id"], group=row["group"], where=row["where"])

    def _measured(
        self, graph: Graph, sets: list[list[Change]], constrained: bool = False
    ) -> list[float]:
        logits = intervene(self.model, self.transcoders, graph.ids.tolist(), [[], *sets],
                           constrained)  # fmt: skip
        moved = changes(logits[1:], logits[0], graph.logit_ids[:1])
        return [float(x) for x in moved[:, 0]]


def _ids(row: dict[str, Any]) -> list[int]:
    return [int(i) for i in str(row["ids"]).split()]


def _scores(linear: frozen.Frozen, graph: Graph, pruned: Pruned) -> dict[str, Any]:
    """Scores of a graph, how exact its sums are, and what the target's input consists of."""
    parts, edges = graph.parts, graph.edges
    target = parts["logit"].start
    found = edges.sum(1) + graph.bias + graph.omitted
    sizes = {name: float(edges[target, part].abs().sum()) for name, part in parts.items()}
    sizes["bias"] = abs(float(graph.bias[target]))
    sizes["omitted"] = abs(float(graph.omitted[target]))
    whole = sum(sizes.values())
    return {
        **attribution_graph.scores(graph)._asdict(),
        "inexact": float((found - graph.values).abs().max() / graph.values.abs().max()),
        **{f"{name}_share": sizes[name] / whole
           for name in ("feature", "error", "token", "bias", "omitted")},
        "active": len(linear.features),
        "features": len(graph.features),
        "kept_features": int(pruned.nodes[parts["feature"]].sum()),
        "kept_errors": int(pruned.nodes[parts["error"]].sum()),
        "kept_edges": int(pruned.edges.sum()),
    }  # fmt: skip
