"""Reasoning in words, every word with its part: plan, step, backtracking, verification, conclusion.

Arithmetic and equation problems, made up and worked in a <think> trace. In some a wrong result is
written first and taken back at a known place. Corpora of models' own traces say nowhere what a
sentence is for; here it is known by construction, so that a feature for "this is taken back" can be
tested. The fit and test sides use other wordings: a feature that only knows one word ("Wait") does
not pass for backtracking on held-out text.

These are texts to read, not answers of the model that reads them.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

SPANS = ("plan", "step", "backtracking", "verification", "conclusion")
HELD = 2
"""The last so many wordings of each part are for testing."""
WORDINGS = {
    "plan": ("First I work out {what}, then {then}.", "The plan: {what} first, after that {then}.",
             "Let me think. I need {what}, and from it {then}.", "To begin with I look for {what}; "
             "next comes {then}.", "I should start with {what} and go on to {then}."),
    "step": ("{line}.", "So {line}.", "This gives {line}.", "Now {line}.", "We get {line}."),
    "backtracking": ("Wait, that is not right: {wrong} is wrong. Let me do it again.",
                     "Hmm, {wrong} cannot be. I made a mistake there.",
                     "No, I take {wrong} back; that was a slip.",
                     "Actually, {wrong} is an error. Once more.",
                     "Hold on, I miscalculated: not {wrong}. Back to this line."),
    "verification": ("Check: {check}. It agrees.", "To verify, {check}, as it should be.",
                     "Let me check the result: {check}. Good.",
                     "Testing this: {check}, which fits.",
                     "I make sure by going backwards: {check}. Correct."),
    "conclusion": ("So the answer is {answer}.", "Therefore it is {answer}.",
                   "That makes {answer} in the end.", "Hence the result is {answer}.",
                   "Altogether the solution is {answer}."),
}  # fmt: skip


class Problem(NamedTuple):
    """A question, and what a trace says about it."""

    question: str
    what: str
    then: str
    lines: tuple[str, ...]
    results: tuple[int, ...]
    """What each line comes to."""
    check: str
    answer: int


def _shopping(rng: random.Random) -> Problem:
    name, thing = rng.choice(("Ann", "Tom", "Mia", "Leo")), rng.choice(("apples", "pens", "cards"))
    have, bags, each = rng.randint(5, 40), rng.randint(2, 9), rng.randint(3, 12)
    gone = rng.randint(1, have)
    bought, total = bags * each, have + bags * each
    return Problem(
        f"{name} has {have} {thing}, buys {bags} bags of {each} and gives {gone} away. "
        f"How many {thing} are left?",
        f"how many {thing} were bought", "what is left",
        (f"{bags} * {each} = {bought}", f"{have} + {bought} = {total}",
         f"{total} - {gone} = {total - gone}"),
        (bought, total, total - gone),
        f"{total - gone} + {gone} = {total}", total - gone,
    )  # fmt: skip


def _equation(rng: random.Random) -> Problem:
    a, x, b = rng.randint(2, 9), rng.randint(2, 15), rng.randint(1, 30)
    c = a * x + b
    return Problem(
        f"Solve {a}x + {b} = {c} for x.", "the term with x", "x itself",
        (f"{a}x = {c} - {b} = {c - b}", f"x = {c - b} / {a} = {x}"), (c - b, x),
        f"{a} * {x} + {b} = {c}", x,
    )  # fmt: skip


def _product(rng: random.Random) -> Problem:
    a, b = rng.randint(11, 49), rng.randint(11, 49)
    tens, ones = b // 10 * 10, b % 10
    return Problem(
        f"What is {a} times {b}?", f"{a} times {tens}", "the rest",
        (f"{a} * {tens} = {a * tens}", f"{a} * {ones} = {a * ones}",
         f"{a * tens} + {a * ones} = {a * b}"),
        (a * tens, a * ones, a * b), f"{a * b} / {a} = {b}", a * b,
    )  # fmt: skip


KINDS: tuple[Callable[[random.Random], Problem], ...] = (_shopping, _equation, _product)


def render(rng: random.Random, test: bool, mistake: bool | None = None) -> list[tuple[str, str]]:
    """One problem with its trace as (text, part), to be joined as it is.

    Parts: question, mark, SPANS, answer. test: in the wordings kept for testing; mistake: whether
    a wrong result is written and taken back (None: in half of them).
    """
    problem = rng.choice(KINDS)(rng)
    mistake = rng.random() < 0.5 if mistake is None else mistake
    wrong_at = rng.randrange(len(problem.lines)) if mistake else -1

    def said(part: str, **what: str | int) -> tuple[str, str]:
        forms = WORDINGS[part][-HELD:] if test else WORDINGS[part][:-HELD]
        return rng.choice(forms).format(**what) + " ", part

    pieces = [(f"{problem.question}\n", "question"), ("<think>\n", "mark"),
              said("plan", what=problem.what, then=problem.then)]  # fmt: skip
    for n, (line, result) in enumerate(zip(problem.lines, problem.results, strict=True)):
        if n == wrong_at:
            wrong = result + rng.choice((-10, -2, -1, 1, 2, 10))
            start, _, _ = line.rpartition(f"= {result}")
            pieces += [said("step", line=f"{start}= {wrong}"), said("backtracking", wrong=wrong)]
        pieces.append(said("step", line=line))
    pieces += [said("verification", check=problem.check),
               said("conclusion", answer=problem.answer), ("\n</think>\n", "mark"),
               (f"The answer is \\boxed{{{problem.answer}}}.\n", "answer")]  # fmt: skip
    return pieces
