"""Rendered traces: their arithmetic is right, mistakes are where they are said to be."""

import random
import re

import pytest

from lens_utils import reasoning_text
from lens_utils.reasoning_text import SPANS, WORDINGS


def rendered(n=200, **how):
    rng = random.Random(0)
    return [reasoning_text.render(rng, **how) for _ in range(n)]


def sums(text):
    """Every a (op b) = c of a text without unknowns, as (computed, said)."""
    for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", text):
        yield eval(left), int(right)  # noqa: S307


@pytest.mark.parametrize("test", [False, True])
def test_only_the_step_that_is_taken_back_is_wrong(test):
    for pieces in rendered(test=test, mistake=True):
        parts = [part for _, part in pieces]
        assert parts.count("backtracking") == 1
        back = parts.index("backtracking")
        assert parts[back - 1] == "step"
        for n, (text, _) in enumerate(pieces):
            if n != back:
                assert all((a == b) == (n != back - 1) for a, b in sums(text)), text
        said = re.findall(r"\d+", pieces[back - 1][0])[-1]
        assert said in pieces[back][0], "what is taken back is what was said"


def test_without_a_mistake_nothing_is_taken_back():
    for pieces in rendered(test=False, mistake=False):
        assert not [part for _, part in pieces if part == "backtracking"]
        assert all(a == b for text, _ in pieces for a, b in sums(text))


def test_every_trace_has_its_parts_in_order_and_ends_in_its_answer():
    for pieces in rendered(test=False):
        parts = [part for _, part in pieces]
        assert parts[:3] == ["question", "mark", "plan"]
        assert parts[-4:] == ["verification", "conclusion", "mark", "answer"]
        assert set(parts) <= {"question", "mark", "answer", *SPANS}
        boxed = re.search(r"\\boxed\{(\d+)\}", pieces[-1][0])
        assert boxed and boxed[1] in pieces[-3][0]


def test_test_wordings_are_never_fitted_on():
    forms = {part: [re.split(r"\{\w+\}", form) for form in of] for part, of in WORDINGS.items()}

    def wording(text, part):
        shapes = [".*?".join(map(re.escape, pieces)) for pieces in forms[part]]
        fits = [n for n, shape in enumerate(shapes) if re.fullmatch(shape, text.strip(), re.S)]
        return max(fits, key=lambda n: sum(map(len, forms[part][n])))

    for test in (False, True):
        for pieces in rendered(100, test=test):
            for text, part in pieces:
                if part in forms and part != "step":
                    assert (wording(text, part) >= len(forms[part]) - 2) is test, text
