r"""MATH or GSM8K under noise: the model works a problem out, and its last \boxed{} is judged.

A chat model gets the problem as a user turn; a base model goes on after three worked problems, and
what follows the next "Problem:" is not its answer any more. Small models solve hardly any of these.
So the log-probability of the gold answer is measured too, said at once and without a solution.
"""

from collections.abc import Sequence
from itertools import groupby

import pandas as pd
from noise_plan import Condition
from noise_scores import Item, score

from lens_utils import answers, files, generate, perturb, problems
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.problems import Problem
from lens_utils.prompts import Prompt

ASK = "{}\n\nReason step by step and put the final answer in \\boxed{{}}."
GOLD = " The final answer is $\\boxed{{{}}}$."
UNTIL = answers.NEXT_PROBLEM[0]
Work = tuple[Condition, Problem]


def solve(
    cfg,
    run: Run,
    worked: Sequence[Prompt],
    conditions: Sequence[Condition],
    sigma: float,
    sha: str | None,
) -> pd.DataFrame | None:
    """One row per condition at `sigma` and problem; None when no benchmark is asked for.

    sha: what the problems' file was when the run began. Raises BadInput when it is another now.
    """
    if not cfg.benchmark:
        return None
    if files.sha256(problems.place(cfg.benchmark)) != sha:
        raise BadInput(f"{cfg.benchmark} changed since this run began: --fresh starts over, "
                       "--tag NAME keeps both")  # fmt: skip
    asked = problems.load(cfg.benchmark)[: (4 if cfg.quick else cfg.problems) or None]
    most = 2 if cfg.quick else cfg.draws
    work = [
        (condition, problem)
        for condition in conditions
        if condition.sigma in (0, sigma) and condition.draw < (1 if not condition.sigma else most)
        for problem in asked
    ]
    return run.chunks(
        "solutions.parquet", work, cfg.batch, lambda part: attempt(cfg, run.model(), part, worked)
    )


def attempt(
    cfg, model: LoadedModel, part: Sequence[Work], worked: Sequence[Prompt]
) -> pd.DataFrame:
    """The solutions to a part of the work, and whether they are right."""
    rows = []
    for condition, members in groupby(part, key=lambda pair: pair[0]):
        asked = [problem for _, problem in members]
        prompted = [put(model, problem, worked) for problem in asked]
        seed = 1000 * cfg.seed + condition.draw
        with perturb.noisy_heads(model, condition.heads, condition.sigma, seed, cfg.relative_to):
            found = generate.answers(
                model,
                prompted,
                max_new_tokens=cfg.max_new_tokens,
                until="" if model.has_chat else UNTIL,
            )
            gold = score(
                model, [with_gold(model, *pair) for pair in zip(asked, prompted, strict=True)]
            )
        for problem, steps, logp in zip(asked, found, gold.logp, strict=True):
            text = "".join(step.text for step in steps)
            text = text if model.has_chat else answers.cut(text)
            given = answers.last_boxed(text)
            verdict = answers.judge(problem.answer, given)
            rows.append({"arm": condition.arm, "sigma": condition.sigma, "draw": condition.draw,
                         "family": problem.kind or "benchmark", "item": problem.id,
                         "level": problem.level, "gold": problem.answer, "given": given or "",
                         "right": float(verdict.right), "judge": verdict.judge, "logp": logp,
                         "tokens": len(steps), "text": text})  # fmt: skip
    return pd.DataFrame(rows).astype({"level": "Int64"})


def with_gold(model: LoadedModel, problem: Problem, prompted: list[int]) -> Item:
    """The gold answer right behind the question."""
    text = GOLD.format(problem.answer)
    said = model.encode(text.lstrip() if model.has_chat else text, bos=False)
    return Item(problem.id, "gold", (*prompted, *said), len(prompted))


def put(model: LoadedModel, problem: Problem, worked: Sequence[Prompt]) -> list[int]:
    """The token ids of a problem: as a user turn, or behind worked problems."""
    if model.has_chat:
        return model.encode_chat([{"role": "user", "content": ASK.format(problem.problem)}])
    if not worked:
        raise BadInput("prompts.json has no worked problems to put before one of the benchmark")
    shots = "".join(f"Problem: {w.text}\nSolution:{w.answer}\n\n" for w in worked)
    return model.encode(f"{shots}Problem: {problem.problem}\nSolution:")
