"""021 · Circuit motifs

Which small patterns of edges do attribution graphs consist of, more often than the degrees, layers
and positions of their nodes make it anyway? Feed-forward loops with their signs, cascades of them
and the layers they span, against five nulls that contain nothing a transformer could not compute;
and do kinds of prompts, models, and trace against answer differ in them?
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("020_attribution_graphs",)
CUTS = (0.25, 0.5, 1, 2, 4, 8)
"""Numbers of edges of the sweep, as multiples of `edges`."""


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """Whose graphs to read; those of other models that 020 has are compared with it."""
    graphs: str = ""
    """A folder of exported graphs (Neuronpedia, circuit-tracer, older Anthropic ones) to read
    instead; a prompts.csv in it may give id, group, where (prompt, trace, answer) and pair."""
    edges: int = 1000
    """Every graph is cut to this number of edges, its strongest: counts follow their number."""
    count: int = 100
    """Nulls of each kind for each graph; p is never below 2 / (count + 1)."""
    top: int = 10
    """Strongest loops listed of each graph."""
    controls: int = 12
    """Graphs whose nulls are tested as if they were circuits."""


def main(cfg: Config, run: Run) -> None:
    import motif_controls as control  # these need pandas: --help does not wait for them
    import motif_graphs as read
    import motif_summary as summary
    import motif_tables as table

    small = cfg.quick
    edges, count = (min(cfg.edges, 300), 19) if small else (cfg.edges, cfg.count)
    # 1. The graphs: errors left out, edges as shares of their targets' input.
    graphs = read.gather(run, cfg.graphs, cfg.model)
    if small:
        graphs = read.few(graphs, 12)
    about = run.stage("graphs.csv", lambda: read.described(graphs, edges))
    # 2. What every graph has: census, layer spans, strongest loops and cascades.
    census = run.stage("census.csv", lambda: table.censuses(graphs, edges))
    run.stage("spans.csv", lambda: table.spans(graphs, edges))
    loops = run.stage("loops.csv", lambda: table.loops(graphs, edges, cfg.top))
    run.stage("cascades.csv", lambda: table.cascades(graphs, edges))
    # 3. Beside its nulls, and at other thresholds.
    held = run.chunks("nulls.parquet", graphs, 1,
                      lambda part: table.nulls(part, edges, count, cfg.seed))  # fmt: skip
    cuts = [round(edges * times) for times in CUTS[: 4 if small else None]]
    fewer = max(count // 4, 5)
    sweep = run.chunks("sweep.parquet", graphs, 1,
                       lambda part: table.sweep(part, cuts, fewer, cfg.seed))  # fmt: skip
    # 4. What groups of graphs have in common, and where they differ.
    common = run.stage("enrichment.csv", lambda: table.enrichments(held, cfg.seed))
    profiles = run.stage("profiles.csv", lambda: table.profiles(held))
    draws = 1000 if small else 10_000
    differ = run.stage("contrasts.csv", lambda: table.contrasts(profiles, draws, cfg.seed))
    # 5. Controls: nulls in the circuits' place, edges as exported, and groups that are none.
    picked = read.few(graphs, 3 if small else cfg.controls)
    again = run.stage("controls.csv",
                      lambda: control.nulls_of_nulls(picked, edges, count, cfg.seed))  # fmt: skip
    plain = run.stage("unscaled.parquet",
                      lambda: control.unscaled(picked, edges, count, cfg.seed))  # fmt: skip
    times = 5 if small else 100
    dealt = run.stage("shuffled.csv", lambda: control.shuffled(profiles, times, 200, cfg.seed))
    run.stage(
        "summary.json",
        lambda: summary.summarise(about, census, loops, sweep, common, differ, again, plain, dealt),
    )


if __name__ == "__main__":
    launch(Config, main)
