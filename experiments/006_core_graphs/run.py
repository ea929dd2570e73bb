"""006 · Core graphs

Do heads that work together form another kind of network than heads that do alike? The pairs of
experiment 005 are edges, once weighed by synergy and once by redundancy. A published study found
synergy's graph the more efficient and redundancy's the more modular. Is that in who is connected to
whom, or only in the weights, and what do graphs of heads that share nothing look like?
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("005_head_phiid",)


@dataclass(frozen=True)
class Config(BaseConfig):
    top: float = 0.1
    """Share of all pairs that are edges of the thinned graphs."""
    core: float = 0.25
    """Share of all heads in each core: the highest by a score, and the lowest."""
    shuffles: int = 0
    """Graphs of shuffled weights beside each graph; 0 is 50 (a quick run takes 5)."""
    resamples: int = 0
    """Bootstrap draws of categories of prompts; 0 is 100 (a quick run takes 3)."""


def main(cfg: Config, run: Run) -> None:
    import core_matrices as matrices  # these need torch and pandas: --help does not wait for them
    import core_measures as measure
    import core_tables as table

    size = measure.sizes(cfg)
    scores = run.upstream("005_head_phiid", "scores.csv")
    upstream = {
        name: run.upstream("005_head_phiid", f"pairs_{name}.safetensors") for name in matrices.READ
    }
    pairs = matrices.gather(upstream, len(scores))
    layer = scores.layer.to_numpy()
    # 1. The cores: heads of highest and of lowest score, and where they lie.
    cores = run.stage("cores.csv", lambda: table.cores(scores, cfg.core))
    shared = run.stage("core_overlap.csv", lambda: table.core_overlap(scores, cfg.core))
    # 2. Every graph beside graphs of the same weights, dealt out at random.
    found = run.chunks(
        "graphs.csv",
        matrices.graphs_of(pairs),
        1,
        lambda which: measure.against_null(pairs, *which[0], cfg.top, size, cfg.seed),
    )
    # 3. Communities beside layers, and how far the strongest edges can be trusted.
    members = run.stage(
        "communities.csv", lambda: measure.communities(pairs, scores, cfg.top, cfg.seed)
    )
    depth = run.stage("layers.csv", lambda: table.by_layer(members, layer, size.shuffles, cfg.seed))
    halves = run.stage("reliability.csv", lambda: table.reliability(pairs, cfg.top))
    alike = run.stage("agreement.csv", lambda: table.agreement(pairs, cfg.top))
    run.stage("strongest.csv", lambda: table.strongest(pairs, cfg.top))
    run.stage(
        "summary.json",
        lambda: table.summarise(found, depth, halves, alike, cores, shared),
    )


if __name__ == "__main__":
    launch(Config, main)
