"""000 · Basic chat

What does the model say, and how sure is it of each token? `./lab chat` talks to it. A run asks it
simple questions and tests whether its token probabilities tell right answers from wrong ones.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lens_utils import prompts
from lens_utils.experiment import BaseConfig, Run, launch

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Config(BaseConfig):
    interactive: bool = False
    """Talk to the model; `./lab chat` sets it. Text piped in is answered once."""
    prompt: str | None = None
    """Answer this and end."""
    system: str = ""
    """A system message before the conversation; the template's own without it."""
    temperature: float = 0.0
    """0 always takes the likeliest token; above it, tokens are drawn. For talking only."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    max_new_tokens: int = 256
    """Longest answer when talking."""
    show_probs: bool = False
    """After an answer, list the likeliest tokens of each step and their probabilities (stderr)."""
    per_family: int = 0
    """Questions of each family that a run asks; 0 is all ten (a quick run asks one)."""
    answer_tokens: int = 24
    """Longest answer in a run (a quick run takes half)."""

    @property
    def talks(self) -> bool:
        return self.interactive or self.prompt is not None

    @cached_property
    def variant(self) -> str:
        """Every conversation has a folder of its own, so that no two have to agree on settings."""
        name = super().variant
        now = datetime.datetime.now()
        return f"transcripts/{name}-{now:%Y%m%d-%H%M%S-%f}" if self.talks else name


def main(cfg: Config, run: Run) -> None:
    if cfg.talks:
        import chat_session

        return chat_session.talk(cfg, run)

    import chat_answers as ask  # these need torch and pandas: --help does not wait for them
    import chat_tables as table

    examples = prompts.load(__file__, "examples")
    questions = ask.choose(prompts.load(__file__, "questions"), cfg)

    def answer(name: str, put: list[ask.Put], untrained: bool = False) -> pd.DataFrame:
        return run.chunks(
            name, put, 24, lambda part: ask.answer(cfg, run.model(untrained), part, examples)
        )

    # 1. Greedy answers to every question, and to its words in another order, which name the topic
    #    and no more; and a model's that has learned nothing (a quick run asks it every other one).
    put = [ask.Put(q, c) for c in ("asked", "words shuffled") for q in questions]
    asked = answer("asked.parquet", put)
    put = [ask.Put(q, "untrained twin") for q in questions[:: 2 if cfg.quick else 1]]
    null = answer("untrained.parquet", put, untrained=True)
    # 2. Which are right, how sure the model was, and what else it weighed at each step.
    answers = run.stage("answers.csv", lambda: table.grade([asked, null], questions))
    run.stage("steps.csv", lambda: table.first_steps(asked, questions))
    # 3. One answer at a time, as in a conversation: the same tokens, and how fast they come.
    run.stage("speed.json", lambda: ask.speed(cfg, run.model(), questions, examples, asked))
    run.stage("summary.json", lambda: table.summarise(answers, cfg.seed))


if __name__ == "__main__":
    launch(Config, main)
