"""011 · Domain neurons

Which MLP neurons serve solving a maze, judging a path or drawing a new maze, and only that? A
neuron's share of active tokens is compared between the abilities, on the same mazes; its entropy
over them (DAPE) is low for a specialist. How many specialists are there beyond shuffled labels,
where do they lie, what does thinking change, and does an ability need its own more than others'?
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("010_maze_tasks",)


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    max_samples: int = 0
    """Questions of 010 to use, as whole mazes; 0 is all."""
    permutations: int = 0
    """Shuffles of the labels; 0 is 499 (a quick run takes 99), fewer where their counts would
    take more than 8 GiB. The smallest p is one over one more than that."""
    domain_specific_percentile: float = 1.0
    """Share of neurons (%) that LAPE's own selection takes, from 1 to 25. The findings do not rest
    on it: how many are specialised is asked of the shuffled labels."""
    activation_threshold: float = 1.0
    """Share of activations (%) that count as active in the two other definitions, pooled over all
    domains in a layer."""
    split_by_mode: bool = True
    """Compare thinking with direct answers too."""
    split_by_correctness: bool = True
    """Compare right with wrong answers too, where there are 20 of each."""


def main(cfg: Config, run: Run) -> None:
    import domain_findings as finding  # these need torch and pandas: --help does not wait for them
    import domain_readings as read
    import domain_samples as sample
    import domain_tables as table

    # 1. Abilities above chance, and the questions with the model's own replies.
    gate = run.upstream("010_maze_tasks", "gate.json")
    run.stage("gate.json", lambda: gate)
    passes = sample.passing(gate)
    if not passes:
        run.stage("summary.json", lambda: finding.gated(gate))
        return
    records = run.upstream("010_maze_tasks", "records.json")
    replies = run.upstream("010_maze_tasks", "replies.csv")
    chosen = sample.choose(records, replies, passes, cfg.max_samples)
    session = read.Session(cfg, run, records, chosen, passes)
    # 2. Active tokens of every neuron per domain, in the data and with shuffled labels: one pass.
    counts = run.stage("counts.safetensors", session.counts)
    found = [
        table.find(c, read.tallied(counts, c.name), cfg.domain_specific_percentile)
        for c in session.contrasts if len(c.domains) > 1
    ]  # fmt: skip
    by_name = {f.contrast.name: f for f in found}
    # 3. How many are specialised, which, where.
    contrasts = run.stage("contrasts.csv", lambda: table.contrasts(found, chosen))
    recall = session.rates(counts, "recall")
    neurons = run.stage("neurons.csv", lambda: table.neurons(found, recall))
    layers = run.stage("layers.csv", lambda: table.layers(found))
    run.stage("distribution.csv", lambda: table.distribution(found))
    by_mode = [
        f for name, f in by_name.items() if name in ("abilities, direct", "abilities, thinking")
    ]
    run.stage("memberships.csv", lambda: table.memberships(by_mode or found[:1]))
    # 4. Other definitions of active.
    rates = run.stage("variants.safetensors", session.variants)
    variants = run.stage(
        "sensitivity.csv",
        lambda: table.sensitivity(by_name, rates, cfg.domain_specific_percentile),
    )
    # 5. Sets chosen on one half of the mazes, taken away on the other, against random sets.
    half = by_name["abilities, first half"]
    sets = run.stage(
        "sets.json",
        lambda: session.sets(finding.selection(half, read.LARGEST), half.rate.mean(0)),
    )
    logp = run.chunks("without.csv", sets, 7, session.without)
    ablated = run.stage("ablation.csv", lambda: finding.ablation(logp))
    double = run.stage("dissociation.csv", lambda: finding.dissociation(logp))
    # 6. What others read, and the summary.
    run.stage("qwen3_dape_results.json", lambda: finding.results(cfg.model, found, layers, neurons))
    run.stage(
        "summary.json",
        lambda: finding.summarise(contrasts, found, variants, ablated, double),
    )


if __name__ == "__main__":
    launch(Config, main)
