"""008 · Math perturbation

Do the most synergistic heads matter most? Gaussian noise is added to the query rows and output
columns of a quarter of the heads (the most synergistic, the most redundant, random ones, random
ones of the same layers), and the model is asked for sums, word forms and capitals, always the same
ones. Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lens_utils import prompts
from lens_utils.experiment import BaseConfig, Run, launch

READS = ("005_head_phiid",)


@dataclass(frozen=True)
class Config(BaseConfig):
    score: str = "value_diff"
    """The column of 005's scores.csv that ranks the heads: value_diff, rank_diff, balance ..."""
    share: float = 0.25
    """Share of the heads that get noise."""
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 1.0)
    """Standard deviations of the noise (a quick run takes 0.5)."""
    sigma: float = 0.0
    """The one that the findings rest on; 0 is the one of `sigmas` where random noise, in draws of
    its own, leaves nearest half of the accuracy."""
    relative_to: Literal["parameter", "head"] = "parameter"
    """What sigma is relative to: the std of the whole W_Q or W_O, or of the head's slice."""
    draws: int = 6
    """Draws at that sigma: of the noise, and of the heads where they are random (a quick run takes
    two)."""
    sweep_draws: int = 2
    """Draws at the other sigmas, for the cores and random heads (a quick run takes one)."""
    per_family: int = 16
    """Items of each family, spread over all 36 (a quick run takes six of every second family)."""
    documents: int = 6
    """Held-out texts of 32 tokens, for the loss on plain text (a quick run takes two)."""
    benchmark: str = ""
    """Also let the model work out problems: math-500, math, math-lighteval, gsm8k (after `./lab
    fetch`), or a .json or .jsonl file of problems."""
    problems: int = 100
    """The first so many problems of it; 0 is all."""
    max_new_tokens: int = 1024
    """Longest solution to a problem."""
    batch: int = 16
    """Problems that are worked on together; also what a killed run loses at most."""


def main(cfg: Config, run: Run) -> None:
    import noise_benchmark as bench  # these need torch and pandas: --help does not wait for them
    import noise_plan as plan
    import noise_scores as measure
    import noise_tables as table

    scores = run.upstream("005_head_phiid", "scores.csv")
    session = measure.Session(cfg, run, prompts.load(__file__))
    # 1. How strong must the noise be? Random heads, in draws that are used for nothing else.
    pilot = run.stage(
        "pilot.csv", lambda: session.measure(plan.pilot(cfg, session.of_this_model(scores)))
    )
    sigma = run.stage("sigma.json", lambda: table.pick_sigma(cfg, pilot))["sigma"]
    about = run.stage("about.json", session.about)
    # 2. Every condition, draw and sigma, on the same items. A part is one condition.
    conditions = plan.conditions(cfg, scores, sigma)
    measured = run.chunks("measured.parquet", conditions, 1, session.measure)
    heads = run.stage("heads.csv", lambda: plan.heads(conditions, sigma))
    # 3. If asked for: worked solutions to the problems of a benchmark, in parts of a batch.
    worked, sha = prompts.load(__file__, "worked"), about.get("benchmark_sha")
    solved = bench.solve(cfg, run, worked, conditions, sigma, sha)
    # 4. From here on tables only: accuracy and log-probability, and who differs from whom.
    run.stage("draws.csv", lambda: table.by_draw(measured))
    arms = run.stage("arms.csv", lambda: table.by_arm(measured))
    versus = run.stage("contrasts.csv", lambda: table.contrasts(measured))
    summary = table.summarise(sigma, scores[cfg.score], heads, arms, versus)
    if solved is not None:
        of_arms = run.stage("solved.csv", lambda: table.by_arm(solved))
        against = run.stage("solved_contrasts.csv", lambda: table.contrasts(solved))
        summary |= table.of_benchmark(of_arms, against)
    run.stage("summary.json", lambda: summary)


if __name__ == "__main__":
    launch(Config, main)
