"""020 · Attribution graphs

By which features does a model get from a prompt to its next token, and does the model itself do
what such a graph says? Every prompt is taken apart into transcoder features, errors and tokens; its
graph is pruned, scored beside shuffled transcoders, and exported for the viewers of others and as a
page of its own. Then features are taken away and steered in the model itself: measured against
predicted effects are the gate that a graph has to pass to be called causal.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("018_transcoders", "019_feature_atlas")


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    transcoders: str = "trained"
    """trained or tuned, for 018's sets of this model; or a folder of transcoders."""
    max_prompts: int = 0
    """Prompts to trace; 0 is all (a quick run takes 3)."""
    max_features: int = 1000
    """Features of a graph: those with the most influence (a quick run takes 200)."""
    budget: float = 4.0
    """GiB that a graph may take."""
    nodes: float = 0.8
    """Share of the influence that pruning keeps in nodes."""
    edges: float = 0.98
    """Share of the influence that pruning keeps in edges."""
    interventions: int = 20
    """Features of a prompt to take away: those with the largest predicted effects, and as many
    matched ones (a quick run takes 5)."""
    threshold: float = 0.0
    """Correlation that the gate asks for; 0 is 0.8 for a maze organism and 0.7 for others."""


def main(cfg: Config, run: Run) -> None:
    import traced_graphs as traced  # these need torch and pandas: --help does not wait for them
    import traced_prompts as prompts
    import traced_tables as tables

    # 1. Places in prompts whose next token is explained; screened by the model's own answer.
    found = run.stage("screened.csv", lambda: prompts.screened(cfg, run))
    chosen = run.stage("prompts.csv", lambda: prompts.chosen(found, cfg.max_prompts, cfg.quick))
    # 2. Every prompt's graph, and what its features do when they are taken away or steered.
    session = traced.Session(cfg, run)
    rows = chosen.to_dict("records")
    effects = run.chunks("interventions.csv", rows, 1, session.trace)
    graphs = [run.stage(f"graphs/{row['id']}.json", lambda r=row: session.export(r))
              for row in rows]  # fmt: skip
    scores = run.stage("scores.csv", lambda: tables.scores(chosen, graphs))
    # 3. The gate: predicted against measured.
    threshold = prompts.threshold(cfg, run)
    gate = run.stage("gate.json", lambda: tables.gate(effects, threshold, cfg.seed))
    layers = run.stage("by_layer.csv", lambda: tables.by_layer(effects, cfg.seed))
    groups = run.stage("groups.csv", lambda: tables.groups(scores, effects, cfg.seed))
    # 4. Pages, and the summary.
    for row, graph in zip(rows, graphs, strict=True):
        run.stage(f"views/{row['id']}.html", lambda r=row, g=graph: session.page(r, g))
    run.stage(
        "summary.json",
        lambda: tables.summarise(found, scores, effects, gate, layers, groups, cfg.seed),
    )


if __name__ == "__main__":
    launch(Config, main)
