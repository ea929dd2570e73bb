r"""Worked answers: the last whole box, and when two ways of writing are one answer."""

import threading
import time

import pytest

from lens_utils.answers import Verdict, cut, gsm8k_answer, judge, last_boxed, number, plain


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"so $\boxed{5}$.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"first \boxed{3}, no: \boxed{4}", "4"),
        (r"\fbox{x}", "x"),
        (r"\boxed 7$", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{9}}", "9"),
        (r"\boxed {12}", "12"),
        (r"\boxed{ a b }", "a b"),
        (r"\boxed{3}, or rather \boxed{\frac{1}{", "3"),
        (r"cut off: \boxed{\frac{1}{2}", None),
        (r"\boxedeq{3}", None),
        ("no box", None),
        (r"\boxed", None),
    ],
)
def test_the_last_box_that_closes(text, held):
    assert last_boxed(text) == held


def test_the_next_problem_is_not_the_answer():
    assert cut("7.\n\nProblem: another\n\\boxed{8}") == "7.\n"
    assert cut("7.\nQuestion: x") == "7." and cut("7.") == "7." and cut("a|b", ("|",)) == "a"
    assert gsm8k_answer("3*4=<<3*4=12>>12\n#### 1,012") == "1,012" and gsm8k_answer("12") is None


EQUAL = [
    ("5", "5.0"), ("1/2", r"\frac{1}{2}"), (r"\dfrac{1}{2}", "0.5"), (r"\frac12", r"\tfrac{1}{2}"),
    ("1,000", "1000"), ("1{,}000", "1000"), (r"\$5", "5"), (r"90^\circ", "90"), ("50\\%", "50"),
    ("x=5", "5"), (r"\text{Monday}", "Monday"), (r"\text{(A)}", "A"), ("(B)", r"\text{B}"),
    ("5 \\text{ cm}", "5"), ("12\\text{cm}^2", "12"), (r"3 \text{ square units}", "3"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\left( 1, 2 \right)", "(1,2)"), ("-3", "-3."),
    (r"\sqrt2", r"\sqrt{2}"), (r"2\,000", "2000"), (".5", "0.5"), ("6/4", "3/2"), ("+7", "7"),
    (r"\frac{2}{4}", "0.5"), ("10 units", "10"), (r"\text{June 20}", "June 20"),
    (r"\emptyset", r"\varnothing"),
]  # fmt: skip
UNEQUAL = [
    ("5", "6"), ("5", "-5"), ("1/2", "1/3"), ("1,2", "12"), ("(1,2)", "(2,1)"),
    ("x", "y"), ("0.333", "1/3"), (r"\sqrt{2}", r"\sqrt{3}"), ("1/0", "1"), ("12", "1 2x"),
    (r"\frac{1}{2}", r"\frac{1}{20}"), ("A", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "given"), EQUAL)
def test_one_answer_written_in_two_ways(gold, given):
    """Decided by text and number alone: exactly, whatever math-verify makes of it."""
    assert judge(gold, given).right and judge(given, gold).right
    assert judge(gold, given).judge in ("text", "number")


@pytest.mark.parametrize(("gold", "given"), UNEQUAL)
def test_two_answers_are_not_taken_for_one(gold, given):
    assert not judge(gold, given).right and not judge(given, gold).right


def test_the_verdict_names_its_judge():
    assert judge("5", None) == judge("5", " ") == Verdict(False, "no answer")
    assert judge("a", "a") == Verdict(True, "text")
    assert judge("2", "3") == Verdict(False, "number")
    assert judge("2", "two") == Verdict(False, "math-verify")
    assert number("1/0") is None and number("x") is None and plain(" $x$. ") == "x"


ALGEBRA = {
    ("2^{10}", "1024"): True, ("2^{10}", "1023"): False, (r"\{1,2\}", r"\{2,1\}"): True,
    (r"2\sqrt{2}", r"\sqrt{8}"): True, ("x^2-1", "(x+1)(x-1)"): True, ("x^2-1", "(x+1)^2"): False,
    (r"(-\infty,2]", r"(-\infty,2)"): False, ("x>3", r"(3,\infty)"): True,
    (r"1\frac12", "1.5"): True,
}  # fmt: skip
LENIENT = {
    ("2516_8", "2516"): True, ("1,2", "(1,2)"): True, ("(1,2)", r"\{1,2\}"): True,
    ("-2,1", "1,-2"): True, ("5", "5m"): True, (r"\cos 60^\circ", r"\frac{1}{2}"): False,
    ("123000", "1.23e5"): False,
}  # fmt: skip


@pytest.mark.parametrize("threaded", [False, True])
def test_what_needs_algebra_goes_to_math_verify(threaded):
    """Also in a thread, where it cannot time itself. LENIENT is what the module warns of."""
    cases, found = ALGEBRA | LENIENT, {}
    thread = threading.Thread(target=lambda: found.update({c: judge(*c) for c in cases}))
    thread.start() if threaded else thread.run()
    thread.join() if threaded else None
    assert found == {pair: Verdict(right, "math-verify") for pair, right in cases.items()}


def test_percent_is_not_its_fraction():
    """math-verify would take 50 % for 50 and for 0.5; here it is 50."""
    assert judge(r"50\%", "50").right and judge("50", r"50\%").right
    assert judge(r"50\%", "0.5") == judge("0.5", r"50\%") == Verdict(False, "number")


def test_two_boxes_are_not_one_set():
    """math-verify joins two boxes that a few words part into the set {11, 12}."""
    text = r"so \boxed{11} but correcting, \boxed{12}"
    assert judge("12", last_boxed(text)) == Verdict(True, "text")
    assert not judge("11", last_boxed(text)).right
    assert not judge(r"\{11,12\}", last_boxed(text)).right


def test_an_answer_that_takes_forever_is_wrong_in_time():
    began = time.perf_counter()
    assert judge("1", "9^{9^{9^{9}}}") == Verdict(False, "math-verify")
    assert time.perf_counter() - began < 20
