"""014 · Thinking traces

What do neurons do while a model thinks, and does its answer rest on what it thought? Traces are
parsed into exploring, stepping back and concluding; a neuron is compared between two places at the
same cell of the same sample. Then traces are cut, emptied, swapped with another maze's or given a
wrong end: does the answer survive, does it follow the trace, or the maze?
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
    """Thinking questions of 010 to use, as whole mazes; 0 is all (a quick run uses one wording)."""
    permutations: int = 0
    """Sign flips of the mazes' differences; 0 is 999 (a quick run takes 199)."""
    answer_tokens: int = 160
    """Longest answer to a trace that was put into the model's mouth."""
    batch: int = 64
    """Traces that are answered together."""


def main(cfg: Config, run: Run) -> None:
    import trace_readings as read  # these need torch and pandas: --help does not wait for them
    import trace_tables as table

    # 1. Abilities above chance with thinking.
    gate = run.upstream("010_maze_tasks", "gate.json")
    run.stage("gate.json", lambda: gate)
    abilities = table.passing(gate)
    if not abilities:
        run.stage("summary.json", lambda: table.gated(gate))
        return
    records = run.upstream("010_maze_tasks", "records.json")
    replies = run.upstream("010_maze_tasks", "replies.csv")
    # 2. The traces that 010 had the model write, parsed; unfinished ones are counted and left out.
    traces = run.stage(
        "traces.csv", lambda: table.parse(records, replies, abilities, cfg.max_samples, cfg.quick)
    )
    session = read.Session(cfg, run, records, traces[traces.finished])
    # 3. The same cell in two places: on one half of the mazes, confirmed on the other; and in the
    #    same network untrained, where only position and context can make a difference.
    places = run.stage("places.safetensors", session.places)
    neurons = run.stage("neurons.csv", lambda: table.neurons(places))
    contrasts = run.stage("contrasts.csv", lambda: table.contrasts(places, neurons))
    layers = run.stage("layers.csv", lambda: table.layers(places, neurons))
    # 4. Traces that are put into the model's mouth, and what it answers.
    asked = run.stage("asked.json", session.asked)
    answered = run.chunks("answers.csv", asked, cfg.batch, session.answer)
    faithful = run.stage("faithfulness.csv", lambda: table.faithfulness(answered, cfg.seed))
    # 5. What others read, and the summary.
    run.stage("trace_results.json", lambda: table.results(cfg.model, faithful, layers, contrasts))
    run.stage("summary.json", lambda: table.summarise(traces, contrasts, answered, faithful))


if __name__ == "__main__":
    launch(Config, main)
