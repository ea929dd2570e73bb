"""Pairs: of one length, of two answers, with a class for every token."""

import pytest
import torch
from circuits import INDUCTION_HEAD, induction_model

from lens_utils import pairs, provenance
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.prompts import Prompt, encode, filled, load
from lens_utils.registry import ModelSpec


@pytest.fixture(scope="module")
def model(tiny, make_tokenizer):
    return wrap(tiny("llama"), make_tokenizer(adds_bos=False), ModelSpec("tiny", "tiny"))


def prompt(name: str, text: str, answer: str, pool: str = "p", **slots: str) -> Prompt:
    return filled(Prompt(name, text, answer, set="t", template=pool, pool=pool, slots=slots))


CAT_TEXT = "the {relation} of {entity}, is"
CAT = prompt("cat", CAT_TEXT, " mat", relation="hat", entity="cat")
DOG = prompt("dog", CAT_TEXT, " hat", relation="hat", entity="dog")


def test_every_token_has_the_class_of_its_slot(model):
    assert CAT.text == "the hat of cat, is"
    assert CAT.spans == (("relation", 4, 7), ("entity", 11, 14))
    roles = ("function", "relation", "function", "entity", "punctuation", "function")
    assert pairs.classes(model, CAT) == ("bos",) * len(model.bos) + roles


def test_a_pair_knows_answer_and_foil(model):
    one, other = encode(model, [CAT, DOG])[0]
    made = pairs.pair(model, one, other)
    assert (made.answer, made.foil) == (one.answer_id, other.answer_id)
    swapped = pairs.batch(model, [made]).swapped()
    assert swapped.clean.tolist() == [list(other.ids)] and swapped.answer.item() == other.answer_id


def test_partners_come_from_the_pool_and_fit(model):
    long = prompt(
        "long", "the {relation} of {entity}, is", " mat", relation="hat", entity="big cat"
    )
    alone = prompt("alone", "{entity} is", " big", pool="q", entity="he")
    made, out = pairs.pairs(model, [CAT, long, DOG, alone])
    assert [(p.id, p.foil) for p in made] == [("cat", made[1].answer), ("dog", made[0].answer)]
    assert "patching needs pairs of one length" in out["long"] and "no other" in out["alone"]


@pytest.mark.parametrize(
    ("text", "slots", "says"),
    [
        ("the cat is", {"entity": "cat"}, "its span does not occur"),
        ("the {entity} is", {}, "says nothing for {entity}"),
    ],
)
def test_a_slot_that_does_not_occur_is_refused(text, slots, says):
    with pytest.raises(BadInput, match=says):
        filled(Prompt("x", text, "y", slots=slots))


def test_unequal_lengths_equal_answers_and_lonely_prompts_are_refused(model):
    long = prompt("long", CAT_TEXT, " on", relation="hat", entity="big cat")
    one, other, longer = encode(model, [CAT, DOG, long])[0]
    with pytest.raises(BadInput, match="patching needs pairs of one length"):
        pairs.pair(model, one, longer)
    with pytest.raises(BadInput, match="the same answer"):
        pairs.pair(model, one, one)
    with pytest.raises(BadInput, match="no pairs are left for tiny: cat: its pool holds no other"):
        pairs.pairs(model, [CAT])
    short = pairs.pair(model, one, other)
    longest = pairs.Pair("l", "t", "w", "g", (1, 2), (1, 3), 4, 5, ("bos", "entity"))
    with pytest.raises(BadInput, match=f"pairs of 2 and {len(short.clean)} tokens"):
        pairs.batch(model, [short, longest])


def test_an_induction_model_knows_the_induction_pairs():
    """The tokens are drawn as for any model; the hand-built one must get every pair right."""
    toy = induction_model()
    made = pairs.induction(toy, 12, length=10)
    table = pairs.screen(toy, made)
    assert table.known.all() and (table.answer_rank == 1).all()
    assert (table.logit_diff_clean - 10).abs().max() < 1e-3
    for p in made:
        assert p.clean[:-1] == p.corrupt[:-1] and p.clean[-1] != p.corrupt[-1]
        assert [c for c, t in zip(p.classes, p.clean, strict=True) if t == p.answer] == ["entity"]
    untied = toy.bridge.blocks[INDUCTION_HEAD[0]].attn.W_O
    with torch.no_grad():
        untied[INDUCTION_HEAD[1]] *= 0
    assert not pairs.screen(toy, made).known.any()


def test_three_experiments_ask_about_the_same_prompts():
    """002 attends, 003 attributes, 004 patches: their numbers are joined head by head."""
    names = ("002_attention_patterns", "003_logit_attribution", "004_activation_patching")
    files = {(provenance.EXPERIMENTS / name / "prompts.json").resolve() for name in names}
    assert len(files) == 1
    asked = load(str(provenance.EXPERIMENTS / names[2] / "run.py"))
    assert all(p.spans and p.pool and p.group for p in asked)


def test_screening_reads_the_models_own_logits(model):
    made, _ = pairs.pairs(model, [CAT, DOG])
    table = pairs.screen(model, made)
    for row, p in zip(table.itertuples(), made, strict=True):
        logits = model.bridge(torch.tensor([p.clean]))[0, -1]
        assert row.logit_diff_clean == pytest.approx((logits[p.answer] - logits[p.foil]).item())
        assert row.p_answer == pytest.approx(logits.softmax(-1)[p.answer].item(), abs=1e-6)
