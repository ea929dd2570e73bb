r"""Is a worked answer right? For mathematics, where one number is written in many ways.

1. `cut` ends a text where the next problem begins: a base model goes on and sets itself another.
2. `last_boxed` takes what stands in the last whole \boxed{...}; nothing, if it never closes.
3. `judge` compares it with the gold answer, and says who judged: the same text after `plain`, or
   the same number; else math-verify, which knows surds, intervals, sets and polynomials.

`plain` and `number` go first because they are exact and strict: where both answers are numbers,
nothing else is asked (0.333 is not 1/3, and 50 % is not 0.5). math-verify is lenient: it does not
see the base in 10_8, takes 1,2 for (1,2) and a set for a tuple, and lists in any order.
"""

import logging
import re
import threading
from fractions import Fraction
from typing import NamedTuple

NEXT_PROBLEM = ("\nProblem:", "\nQuestion:")
UNITS = r"(?:cm|mm|km|m|inch(?:es)?|feet|foot|ft|units?|square units?|degrees?|dollars?|cents?|" \
        r"miles?|hours?|minutes?|seconds?|days?)"  # fmt: skip


class Verdict(NamedTuple):
    """Whether an answer is right, and by whose judgement."""

    right: bool
    judge: str
    """no answer, text, number or math-verify."""


def cut(text: str, stops: tuple[str, ...] = NEXT_PROBLEM) -> str:
    """The text up to the first stop."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed or \fbox that closes holds; None where none does."""
    for found in reversed([*re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text)]):
        if (held := _held(text[found.end() :])) is not None:
            return held
    return None


def _held(rest: str) -> str | None:
    if not rest.startswith("{"):
        bare = re.match(r"[^\s${}]+", rest)  # \boxed 5
        return bare[0].rstrip(".,") if bare else None
    depth = 0
    for at, character in enumerate(rest):
        if character in "{}" and rest[at - 1 : at] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return rest[1:at].strip()
    return None


def gsm8k_answer(solution: str) -> str | None:
    """What follows the last #### of a GSM8K solution."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip() if mark else None


def plain(answer: str) -> str:
    """An answer without what does not change it: spacing, $, units, left and right."""
    text = answer.strip().rstrip(".")
    for pattern, new in (
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|\\?\$|~", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r" \1"),
        (r"\^\s*\{?\\circ\}?|\\%|%", ""),
        (r"\\varnothing", r"\\emptyset"),
        (rf"\s+{UNITS}(?:\^\{{?\d\}}?)?\s*$", ""),  # 5 cm, but not the product 5m
        (r"\s+", ""),
        (r"\{,\}", ","),
        (r"^[A-Za-z]=", ""),
        (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt(\d)", r"\\sqrt{\1}"),
        (r"^\(([A-Za-z])\)$", r"\1"),
    ):
        text = re.sub(pattern, new, text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text


def number(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction; None for anything else."""
    text = plain(answer)
    if ratio := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", text):
        sign, over, under = ratio.groups()
        text = f"{-int(over) if sign else over}/{under}"
    if not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+|\d+/\d+)", text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


def judge(gold: str, given: str | None) -> Verdict:
    """Whether an answer is the gold one. Both are what a box holds, not whole solutions."""
    if given is None or not given.strip():
        return Verdict(False, "no answer")
    if plain(gold) == plain(given):
        return Verdict(True, "text")
    one, other = number(gold), number(given)
    if one is not None and other is not None:
        return Verdict(one == other, "number")
    return Verdict(_verify(gold, given), "math-verify")


def _verify(gold: str, given: str) -> bool:
    from math_verify import parse, verify  # brings SymPy: seconds, and not everyone judges

    # It times itself with a signal, which only the main thread has; and it warns without a limit.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # In a box each: of a whole text it would take several boxes for one set. Gold goes first,
    # the comparison is not symmetric.
    gold_, given_ = (parse(rf"\boxed{{{x}}}", parsing_timeout=limit) for x in (gold, given))
    return bool(verify(gold_, given_, timeout_seconds=limit))
