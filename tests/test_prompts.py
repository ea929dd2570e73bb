"""Prompts: what is refused, and which token an answer is scored by."""

import json

import pytest

from lens_utils import prompts
from lens_utils.errors import BadInput
from lens_utils.prompts import Prompt


def put(folder, value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / "prompts.json").write_text(text)
    return str(folder / "run.py")


GOOD = {"id": "a", "text": "The sky is", "answer": " blue"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "not JSON"),
        ("[{]", "not JSON"),
        ([], "holds no prompts"),
        ({"prompts": []}, "holds no prompts"),
        ([{"id": "a", "text": "x"}], "record 0"),
        ([GOOD | {"colour": "red"}], "record 0"),
        ([GOOD | {"answer": " "}], "empty answer"),
        ([GOOD | {"text": ""}], "empty text"),
        ([GOOD | {"text": "The sky is "}], "ends in a space"),
        ([GOOD | {"answer": 3}], "not text"),
        ([GOOD, GOOD], "two prompts"),
        (["x"], "record 0"),
    ],
)
def test_malformed_files_are_one_line(tmp_path, value, said):
    with pytest.raises(BadInput, match=said) as error:
        prompts.load(put(tmp_path, value))
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(BadInput, match="not there"):
        prompts.load(str(tmp_path / "run.py"))


def test_sets(tmp_path):
    run = put(tmp_path, {"prompts": [GOOD, GOOD | {"id": "b", "set": "other"}]})
    assert [p.id for p in prompts.load(run)] == ["a", "b"]
    assert [p.id for p in prompts.load(run, "other")] == ["b"]


def test_a_prompt_may_have_no_answer_if_it_says_so(tmp_path):
    [one] = prompts.load(put(tmp_path, [GOOD | {"answer": None}]))
    assert one.answer == ""


def test_shuffled_words_keep_the_mark_at_the_end():
    text = "A path beyond the orchard leads towards the cliffs."
    mixed = prompts.shuffled(text, 3)
    assert mixed != text and mixed[-1] == "." and prompts.shuffled(text, 3) == mixed
    assert sorted(mixed[:-1].split()) == sorted(text[:-1].split())
    assert prompts.shuffled("no mark", 0) == "mark no"
    with pytest.raises(BadInput, match="no other order"):
        prompts.shuffled("one one", 0)


def test_answers_are_scored_by_their_token_in_place(smol):
    [one], left_out = prompts.encode(smol, [Prompt("a", "The capital of France is", " Paris")])
    assert smol.decode([one.answer_id]) == " Paris" and not left_out
    assert one.ids[0] == smol.bos[0] and smol.decode(one.ids[1:]) == "The capital of France is"


def test_answers_of_several_tokens_are_left_out_and_named(smol):
    asked = [Prompt("long", "The capital of Thailand is", " Bangkok-upon-Chao-Phraya")]
    assert prompts.encode(smol, asked) == ([], ["long"])


def test_an_answer_that_merges_with_the_text_is_refused(smol):
    with pytest.raises(BadInput, match="'merged'.*reword"):
        prompts.encode(smol, [Prompt("merged", "The opposite of hot is c", "old")])


def test_chat_prompts_go_through_the_template(smol):
    asked = Prompt("chat", "The capital of France is", " Paris", question="Where is Paris?")
    [one], _ = prompts.encode(smol, [asked])
    text = smol.decode(one.ids)
    assert "<|im_start|>user\nWhere is Paris?<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\nThe capital of France is")
    assert text.count("<|endoftext|>") == 0


def test_no_prompt_keeps_its_own_answer():
    asked = [
        prompts.Encoded(Prompt(str(i), "t", " a", family=f), (1,), answer)
        for i, (f, answer) in enumerate([("x", 5), ("x", 6), ("x", 5), ("y", 7), ("y", 7)])
    ]
    dealt = prompts.derange(asked, seed=0)
    assert all(d != e.answer_id for d, e in zip(dealt, asked, strict=True))
    assert set(dealt[:3]) <= {5, 6}  # within the family
    other = prompts.Encoded(Prompt("o", "t", " a", set="other", family="x"), (1,), 9)
    assert 9 not in prompts.derange([*asked, other], seed=0)[:3]  # and within the set
    assert prompts.derange(asked, seed=0) == dealt
