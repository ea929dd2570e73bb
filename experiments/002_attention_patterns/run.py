"""002 · Attention patterns

Which tokens does the last token of a prompt read from, in which heads and layers, and is it more
than position and chance would give? Attention is measured as it is and weighted by what it moves,
against random tokens in the same places, shuffled classes, and an untrained model.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch


@dataclass(frozen=True)
class Config(BaseConfig):
    induction: int = 24
    """Pairs of repeated random tokens beside the prompts of prompts.json."""
    repeats: int = 32
    """Random sequences, twice in a row, from which heads get their types (quick: an eighth)."""
    length: int = 24
    """Tokens of such a sequence."""
    shuffles: int = 2000
    """Shuffles of the classes, and sign flips, per null distribution."""


def main(cfg: Config, run: Run) -> None:
    import attention_readings as read  # these need torch and pandas: --help does not wait for them
    import attention_tables as table
    import attention_views as view

    session = read.Session(cfg, run)
    # 1. The pairs that 002, 003 and 004 share, what the model makes of them, and their tokens.
    screened = run.stage("pairs.csv", session.screen)
    run.stage("left_out.json", session.left_out)
    used = session.used(screened)
    tokens = run.stage("tokens.csv", lambda: session.tokens(used))
    # 2. Attention of the last query, of every prompt as it is and of what it is compared with:
    # its corrupted partner, random tokens in its places, and a model that has learned nothing.
    held = {
        source: run.chunks(f"{source}.safetensors", used, 16, session.reader(source, used))
        for source in read.SOURCES
    }
    asked = table.Asked(tokens, screened)
    # 3. Heads by the tokens they read from, against the nulls, and on the other wording.
    run.stage("heads.csv", lambda: table.heads(asked, held["clean"]))
    nulls = run.stage("nulls.csv", lambda: table.nulls(asked, held, cfg.shuffles, cfg.seed))
    types = run.stage("head_types.csv", session.head_types)
    top = run.stage("top_heads.csv", lambda: table.top_heads(asked, held, nulls, types))
    run.stage("by_prompt.csv", lambda: table.by_prompt(asked, held, top))
    held_out = run.stage("held_out.csv", lambda: table.held_out(asked, held["clean"]))
    # 4. Layers, and the positions from which the entity is read on the way.
    run.stage("layers.csv", lambda: view.layers(asked, held))
    run.stage("queries.csv", lambda: view.queries(asked, held["clean"]))
    # 5. One prompt of each task that can be read: the one with the median logit difference.
    run.stage("examples.csv", lambda: view.examples(asked, held["clean"], top))
    run.stage(
        "summary.json",
        lambda: view.summarise(asked, held, nulls, types, top, held_out),
    )


if __name__ == "__main__":
    launch(Config, main)
