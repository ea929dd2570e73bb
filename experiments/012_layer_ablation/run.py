"""012 · Layer ablation

Which layers does a model need to solve a maze, to judge a path, to draw a new maze, with and
without thinking? What a layer adds to the residual stream is replaced, in whole or in part, and
the right answer is scored as it stands. Layers are chosen on one half of the mazes and tested on
the other. And do the abilities need different parts: does taking away what one ability needs most
hurt it more than the others, and more than random parts of the same layers?
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
    """Mazes to ask about, half of them to choose layers on; 0 is 24 (a quick run takes 4). With
    thinking, every other one of them."""
    key_layers: str = ""
    """Only these layers, such as 1,2; empty is all."""
    ablation_ratios: str = ""
    """Shares of a contribution's dimensions to replace; 0.5 and 1 are always among them. Empty is
    0,0.25,0.5,0.75,1 (a quick run takes 0,0.5,1)."""
    mask_seeds: int = 3
    """Orders in which dimensions go, for ratios between 0 and 1 (a quick run takes one)."""
    random_sets: int = 20
    """Random sets of heads beside every set that an ability needs (a quick run takes 3)."""
    greedy_mazes: int = 4
    """Mazes of the second half whose answers are also written under ablation and verified
    (a quick run takes 1, without thinking)."""
    longest: int = 1024
    """Questions whose prompt and reply are longer than so many tokens are left out, and counted."""


def main(cfg: Config, run: Run) -> None:
    import contribution_readings as read  # these need torch and pandas: --help does not wait
    import contribution_tables as table

    gate = run.upstream("010_maze_tasks", "gate.json")
    if not any(read.passing(gate)):  # nothing that could drop: no claim
        run.stage("summary.json", lambda: table.closed(gate))
        return
    held = run.upstream("010_maze_tasks", "records.json")
    replies = run.upstream("010_maze_tasks", "replies.csv")
    # 1. Questions past the gate, each with the text that is scored; mazes are halved by the split.
    session = read.Session(cfg, run)
    asked = run.stage("asked.json", lambda: session.ask(held, replies, gate))
    questions = asked["questions"]
    choosing = [q for q in questions if q["half"] == "choose"]
    testing = [q for q in questions if q["half"] == "test"]
    # 2. Every layer, part, share and kind of ablation, under teacher forcing.
    scan = run.chunks("scan.parquet", questions, 64, lambda part: session.scan(part, questions))
    # 3. The same by writing: answers under ablation, verified.
    few = session.few(testing)
    greedy = run.chunks("greedy.csv", few, 64, lambda part: session.write(part, held, questions))
    # 4. Every head alone, on the first half; then the sets that abilities need most, against
    #    random ones of the same layers, on the second. Without thinking.
    first, second = session.direct(choosing), session.direct(testing)
    alone = run.chunks("heads.parquet", first, 64, lambda p: session.heads(p, questions))
    sets = run.stage("sets.json", lambda: table.head_sets(alone, session.shape, cfg))
    without = run.chunks("sets.parquet", second, 64, lambda p: session.sets(p, sets, questions))
    # 5. From here on tables only.
    drops = run.stage("drops.csv", lambda: table.drops(scan))
    layers = run.stage("critical.csv", lambda: table.critical(scan))
    written = run.stage("written.csv", lambda: table.written(greedy))
    crossed = run.stage("dissociation.csv", lambda: table.crossed(without))
    pairs = run.stage("pairs.csv", lambda: table.pairs(without, crossed))
    run.stage("heads.csv", lambda: table.heads(alone))
    run.stage(
        "ablation_results.json",
        lambda: table.results(scan, drops, layers, replies, held, session.n_layers, cfg.model),
    )
    run.stage(
        "summary.json",
        lambda: table.summarise(asked, scan, drops, layers, greedy, written, crossed, pairs),
    )


if __name__ == "__main__":
    launch(Config, main)
