"""017 · Transcoder sweep

How large, how sparse and how long trained does a transcoder have to be? On pilot layers early, in
the middle and late, transcoders of many configurations learn from one pass over the text, and are
compared on held-out text: what it costs to put them in the MLP's place, what of the MLP's output
they leave unexplained, how many features are dead, how many can be named. Beside them: the best
linear map, the mean, nothing at all, and features that nobody trained. 018 takes what is chosen.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils import text_rows
from lens_utils.experiment import BaseConfig, Run, launch


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    text: str = "auto"
    """mazes for a maze organism, else corpora by name, such as wiki+sotu+reasoning+docstrings."""
    length: int = 128
    """Tokens of a window of text."""
    layers: str = ""
    """Pilot layers, such as 2,8,14; empty is an early, a middle and a late one (a quick run: the
    middle one)."""
    expansions: str = "4,8,16"
    """Features per dimension of the model."""
    ks: str = ""
    """Active features of a token; empty is 8,16,32, or 16,32,64 for models of 512 dimensions."""
    lrs: str = "0.0003,0.001,0.003"
    """Adam's learning rates; all but the second are tried at one size only."""
    tokens: int = 0
    """Of text to train on; 0 goes by the model's size (see SIZES in sweep_plan.py)."""
    passes: int = 0
    """How often activations are used while they are held; 0 goes by the model's size."""
    held_out: int = 0
    """Held-out tokens on which features are counted; 0 goes by the model's size."""
    judged: int = 0
    """Held-out tokens on which the model with one MLP replaced is compared with the model."""


def main(cfg: Config, run: Run) -> None:
    import sweep_judge as judge  # needs torch: --help does not wait for it
    import sweep_plan as planning
    import sweep_tables as tables
    import sweep_training as training

    # 1. What is compared, on which layers, on how much text.
    model = run.model()
    size = planning.sizes(cfg, model)
    rows, said = planning.text(cfg, model, size.tokens)
    plan = run.stage("plan.json", lambda: planning.plan(cfg, model, size, rows, said))
    # 2. One pass over the text trains every configuration on every pilot layer.
    sweep = training.Sweep(run, model, rows, plan)
    for name in (*plan["configurations"], training.BASELINES):
        run.stage(f"trained/{training.file(name)}", lambda name=name: sweep.trained()[name])
    # 3. On held-out text: what is left unexplained, who fires; and what features can be called.
    held, _ = planning.text(cfg, model, size.held_out, "test")
    counted = run.stage("features.csv", lambda: judge.features(run, model, held, plan))
    named = run.stage("labels.csv", lambda: judge.labels(run, model, rows, held, plan, size.named))
    # 4. The model with one MLP replaced beside the model, on whole texts.
    replaced = judge.conditions(run, model, plan)
    judged = text_rows.first(held, size.judged)
    found = run.chunks(
        "judged.parquet", judged, 16, lambda part: judge.judge(model, replaced, part)
    )
    # 5. One line per layer and configuration; the frontier, and the choice.
    table = run.stage("configurations.csv", lambda: tables.measured(plan, found, counted, named))
    joint = run.stage("joint.csv", lambda: tables.together(plan, found, table))
    overall = run.stage("overall.csv", lambda: tables.overall(plan, table, joint))
    chosen = run.stage("chosen.json", lambda: tables.choose(plan, overall))
    run.stage("summary.json", lambda: tables.summarise(plan, table, joint, overall, chosen, named))


if __name__ == "__main__":
    launch(Config, main)
