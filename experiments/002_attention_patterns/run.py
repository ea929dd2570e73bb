"""002 · Attention patterns

Which tokens does the last token read from, in which heads and layers, and is it more than chance?
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch


@dataclass(frozen=True)
class Config(BaseConfig):
    induction: int = 24
    """Pairs of repeated random tokens beside the prompts of prompts.json."""


def main(cfg: Config, run: Run) -> None:
    import attention_readings as read  # these need torch and pandas: --help does not wait for them

    session = read.Session(cfg, run)
    # 1. The pairs that 002, 003 and 004 share, and what the model makes of them.
    run.stage("pairs.csv", session.screen)
    run.stage("left_out.json", session.left_out)


if __name__ == "__main__":
    launch(Config, main)
