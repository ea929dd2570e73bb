"""018 · Transcoders

Can all MLPs of a model be rewritten as sparse features, and what is lost? One pass over text trains
the transcoders of all layers, in the configuration that 017 chose. Held out: each layer's and all
layers' replacement beside zeroed MLPs, their mean and the best linear maps; then the set is tuned
end to end, so that the model with all MLPs replaced agrees with itself again.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from lens_utils import text_rows
from lens_utils.experiment import BaseConfig, Run, launch

READS = ("017_transcoder_sweep",)


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    text: str = "auto"
    """mazes for a maze organism, else corpora by name, such as wiki+sotu+reasoning+docstrings."""
    tokens: int = 500_000
    """Of text to train on (a quick run takes 10,000)."""
    length: int = 128
    """Tokens of a window of text."""
    layers: str = "all"
    """all, or numbers with commas."""
    expansion: int = 0
    """Features per dimension of the model; 0 takes what 017 chose, as for the next three."""
    k: int = 0
    """Active features of a token."""
    lr: float = 0.0
    """Adam's learning rate."""
    skip: Literal["chosen", "none", "zero", "ridge"] = "chosen"
    """A linear map beside the features, with its gain held down: from zero, or fitted."""
    passes: int = 4
    """Times that each token's activations are learned from, while they are held."""
    batch: int = 1024
    """Tokens of a step."""
    held_out: int = 100_000
    """Held-out tokens on which features are counted (dead, FVU)."""
    judged: int = 6_000
    """Held-out tokens on which the replaced model is compared with the original."""
    tune_tokens: int = 100_000
    """Tokens of the end-to-end tuning; 0 leaves it out."""
    tune_lr: float = 1e-4
    """Its learning rate."""


def main(cfg: Config, run: Run) -> None:
    import transcoder_faith as faith  # needs torch: --help does not wait for it
    import transcoder_pass as training
    import transcoder_release as release
    import transcoder_tune as tuning

    # 1. Text, and the configuration: 017's choice, or the command line's.
    model, size = run.model(), training.sizes(cfg)
    rows, said = training.text(cfg, model, size.tokens)
    recipe = training.recipe(cfg, run, model, rows)
    text = run.stage("text.json", lambda: training.described(rows, said, recipe))
    # 2. One pass over the text trains all layers; with --shard, every machine some of them.
    layers = training.layers(cfg, model)
    each = -(-len(layers) // cfg.part_of[1])
    run.chunks(
        "curves.parquet", layers, each, lambda part: training.train(run, model, rows, part, recipe)
    )
    run.stage("trained.json", lambda: training.record(run, model, layers, recipe.k))
    # 3. On held-out text: what is active; and what it costs to replace one MLP, or all of them.
    held, _ = training.text(cfg, model, size.held_out, "test")
    judged = text_rows.first(held, size.judged)
    counted = run.stage("features.parquet", lambda: faith.features(run, model, held, layers))
    replaced = faith.conditions(run, model, layers)
    found = run.chunks("judged.parquet", judged, 8, lambda part: faith.judge(model, replaced, part))
    single = run.stage("faithfulness.csv", lambda: faith.by_layer(found, layers))
    # 4. The whole set tuned end to end on KL, and judged on the same text.
    sets = {"trained": faith.loaded(run, model, layers)}
    if size.tune_tokens:
        steps = partial(tuning.tune, run, model, rows, sets["trained"], size.tune_tokens)
        run.stage("tuning.csv", lambda: steps(cfg.tune_lr))
        run.stage("tuned.json", lambda: tuning.record(run, model, layers, recipe.k))
        sets["tuned"] = faith.loaded(run, model, layers, "tuned")
        again = {"tuned all": sets["tuned"]}
        found = run.stage(
            "judged_tuned.parquet", lambda: faith.joined(found, faith.judge(model, again, judged))
        )
    joint = run.stage("replaced.csv", lambda: faith.together(found))
    replies = run.stage("generations.json", lambda: faith.generations(run, model, held, sets))
    # 5. What the findings quote, and a folder to publish (scripts/upload_transcoders.py).
    summary = run.stage(
        "summary.json", lambda: faith.summarise(text, counted, single, joint, replies)
    )
    release.write(run, model, text, summary)


if __name__ == "__main__":
    launch(Config, main)
