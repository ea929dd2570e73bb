"""015 · Concept circuits

Does a model represent what a maze's cells are (dead end, turn, junction, on the solution, start,
goal) at the tokens that name them? In which directions and neurons, by which connections, and do
answers depend on them? A concept holds of a cell, so it is asked of the cell's token, always
among tokens of the same cell in different mazes, and judged on layouts that nothing was fitted on.
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
    """Mazes to fit on; half as many are held out. 0 is 300 (a quick run takes 60)."""
    edge_mazes: int = 0
    """Held-out mazes on which sets of neurons are silenced; 0 is 24 (a quick run takes 8)."""
    random_sets: int = 20
    """Random sets beside every set of neurons (a quick run takes 3)."""
    effect_floor: float = 0.5
    """Smallest |Cohen's d| of a concept's neuron."""
    largest_set: float = 0.05
    """At most this share of a layer's neurons belongs to a set: those of the largest |d|."""


def main(cfg: Config, run: Run) -> None:
    import concept_readings as read  # these need torch and pandas: --help does not wait for them
    import concept_tables as table

    gate = run.upstream("010_maze_tasks", "gate.json")
    if not read.passing(gate):  # no ability that the concepts could serve
        run.stage("summary.json", lambda: table.closed(gate))
        return
    # 1. Mazes of both sides of the split, and every cell's token with its concepts.
    session = read.Session(cfg, run)
    mazes = run.stage("mazes.json", session.draw)
    tokens = run.stage("tokens.parquet", lambda: read.tokens(mazes))
    # 2. Directions in the stream at every depth: trained, untrained, and from the input alone.
    depths = list(range(session.n_layers + 1))
    size = session.at_once(tokens, "d_model")
    at = lambda trained: lambda part: session.directions(part, mazes, tokens, trained)  # noqa: E731
    found = run.chunks("directions.parquet", depths, size, at(True))
    twin = run.chunks("untrained.parquet", depths, size, at(False))
    given = run.stage("input.csv", lambda: read.from_input(mazes, tokens))
    # 3. Every neuron: contrast, held-out AUROC, and the same with shuffled labels and untrained.
    layers = list(range(session.n_layers))
    size = session.at_once(tokens, "d_mlp")
    of = lambda trained: lambda part: session.neurons(part, mazes, tokens, trained)  # noqa: E731
    held = run.chunks("neurons.safetensors", layers, size, of(True))
    null = run.chunks("neurons_untrained.safetensors", layers, size, of(False))
    counts = run.stage("counts.csv", lambda: table.counts(held, null, cfg))
    sets = run.stage("sets.json", lambda: table.sets(held, cfg))
    # 4. What joins the sets of successive layers: weights, and what silencing one does to others.
    weights = run.stage("virtual.csv", lambda: session.virtual(sets))
    causal = run.stage("causal.parquet", lambda: session.causal(sets, held, mazes, tokens))
    edges = run.stage("edges.csv", lambda: table.edges(causal))
    # 5. And what it does to answers.
    records = run.upstream("010_maze_tasks", "records.json")
    lost = run.stage("answers.parquet", lambda: session.answers(sets, held, records, gate))
    behaviour = run.stage("behaviour.csv", lambda: table.behaviour(lost))
    best = run.stage("concepts.csv", lambda: table.best(found, twin, given, counts))
    run.stage(
        "summary.json", lambda: table.summarise(tokens, best, counts, weights, edges, behaviour)
    )


if __name__ == "__main__":
    launch(Config, main)
