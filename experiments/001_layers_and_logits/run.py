"""001 · Layers and logits

At which depth does a fact appear in the residual stream, and how far can a readout be trusted
before the last block? The stream after every block is read through the final norm (the logit
lens), as it lies (raw), and through a linear map fitted on text (ridge).
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lens_utils import prompts
from lens_utils.experiment import BaseConfig, Run, launch

USE_NORM_LENS = True


@dataclass(frozen=True)
class Config(BaseConfig):
    lens: Literal["norm", "raw", "ridge", "next_ln1"] = "norm" if USE_NORM_LENS else "raw"
    """The readout that the token table and the headline show (--norm and --raw for short)."""
    layers: str = "all"
    """all, key (seven depths) or block numbers such as 0,5,10; the embedding always comes first."""
    fold: bool = False
    """Fold the norms' gains into the weights first; next_ln1 is refused without it."""
    fit_tokens: int = 12_000
    """Tokens of text that the ridge lens is fitted on (a quick run takes an eighth)."""
    facts: int = 0
    """Use only the first so many facts; 0 is all (a quick run takes seven)."""

    SHORT: ClassVar[dict[str, str]] = {"--norm": "--lens=norm", "--raw": "--lens=raw"}


def main(cfg: Config, run: Run) -> None:
    import depth_readings as read  # these need torch and pandas: --help does not wait for them
    import depth_tables as table

    asked = read.choose(prompts.load(__file__), cfg)
    session = read.Session(cfg, run)
    # 1. The stream at the last token of every prompt, at every depth, in one pass.
    residuals = run.chunks("residuals.safetensors", asked, 16, session.residuals)
    exact = run.stage("exact.json", lambda: session.compare_with_model(asked, residuals))
    # 2. The translators of the ridge lens, fitted on one part of the text, judged on another.
    ridge = run.stage("ridge.safetensors", session.fit_ridge)
    text = run.stage("text.csv", lambda: session.judge_on_text(ridge))
    # 3. Every readout of every prompt at every depth, and of a model that has learned nothing.
    readout = run.stage("readout.csv", lambda: session.read(asked, residuals, ridge))
    null = run.stage("untrained.csv", lambda: session.read_untrained(asked))
    run.stage("tokens.csv", lambda: session.top_tokens(asked, residuals, ridge))
    # 4. Confidence: temperatures of the output, and the one that fits each depth best.
    heat = run.stage("temperature.csv", lambda: session.temperatures(asked, residuals))
    run.stage("fitted_temperature.csv", lambda: session.fit_temperatures(asked, residuals))
    # 5. From here on tables only: where an answer first stands on top, and what follows.
    marks = run.stage("landmarks.csv", lambda: table.landmarks(readout))
    bias = run.stage("direction.csv", lambda: table.direction(readout))
    run.stage("curves.csv", lambda: table.curves(readout, null))
    run.stage("by_depth.csv", lambda: table.by_depth(readout))
    run.stage(
        "summary.json", lambda: table.summarise(exact, readout, null, text, marks, bias, heat)
    )


if __name__ == "__main__":
    launch(Config, main)
