"""019 · Feature atlas

What do the features of a set of transcoders stand for, and how well can that be said? One pass
over diverse text gathers how often, how strongly and where each feature fires. Labels are made
without a language model, from facts about the tokens, and tested on text that they were not made
from, beside labels of other features; if asked for, a local model judges them and an endpoint
writes others. For the parts of a reasoning trace the best features are looked for, against parts
moved along the text.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("018_transcoders",)


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    transcoders: str = "trained"
    """trained or tuned, for the sets of 018, or a folder in one of three formats."""
    text: str = "auto"
    """mazes for a maze organism, else corpora by name, such as wiki+reasoning+code."""
    tokens: int = 200_000
    """Of text, half of it to make labels from and half to test them on (a quick run takes
    12,000)."""
    length: int = 128
    """Tokens of a window of text."""
    layers: str = "all"
    """all, or numbers with commas (a quick run takes the middle one)."""
    pool: int = 12_000
    """Tokens of either half at which everything that fires is kept."""
    scored: int = 100
    """Features of each layer that are tested by detection, fuzzing and intruders."""
    judge: str = ""
    """A local model that judges labels by its logits, such as smol."""
    judged: int = 12
    """Features of each layer that it judges."""
    explainer: str = ""
    """A model of the `llm` package that writes labels too: `llm models` lists them."""
    explained: int = 20
    """Features of each layer that it is asked about."""
    budget: int = 200_000
    """Tokens that it may cost at most, by the estimate that is made first."""
    price: str = ""
    """Of a million tokens, in and out, such as 0.15,0.60: the estimate then says what it costs."""


def main(cfg: Config, run: Run) -> None:
    import atlas_labels as labels  # needs torch: --help does not wait for it
    import atlas_pass as gather
    import atlas_tables as tables

    # 1. Text with the parts of its tokens, on two sides; one pass over it for all layers.
    corpus = gather.Corpus(cfg, run)
    run.stage("text.json", corpus.said)
    layers = corpus.layers
    held = run.stage("gathered.safetensors", corpus.gather)
    # 2. Every feature in figures, and a label from facts about tokens, tested on the other side.
    atlas = labels.Atlas(cfg, corpus, held)
    stats = run.stage("features.parquet", lambda: tables.features(corpus, held))
    made = run.chunks("labels.csv", layers, 1, partial(atlas.label, stats))
    # 3. Tests of these labels; features of the parts of a trace.
    scores = run.chunks("scores.csv", layers, 1, partial(atlas.score, made))
    draws = run.chunks("span_draws.csv", layers, 1, atlas.spans)
    spans = run.stage("spans.csv", lambda: tables.spans(draws, made))
    # 4. Other judges and explainers, if asked for.
    judged = run.stage("judged.csv", lambda: atlas.judge(run, made, layers))
    written = run.stage("written.csv", lambda: atlas.write(run, made, layers))
    # 5. The atlas: a database, tables, a page for each layer.
    run.stage("atlas.json", lambda: tables.atlas(run, corpus, held, stats, made, written))
    run.stage(
        "summary.json",
        lambda: tables.summarise(corpus, stats, made, scores, spans, judged, written),
    )


if __name__ == "__main__":
    launch(Config, main)
