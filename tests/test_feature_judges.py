"""A model's logits as judgements, against Hugging Face's own forward pass, one text at a time."""

import numpy as np
import pytest
import torch

from lens_utils import feature_judges
from lens_utils.errors import BadInput
from lens_utils.feature_scores import Trial
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

TEXTS = ["the cat sat on the mat", "a big red hat", "she ran to it and they sat"]


@pytest.fixture(scope="module")
def judge(tiny, make_tokenizer):
    return wrap(tiny("llama"), make_tokenizer(), ModelSpec("tiny", "tiny", bos="as its tokenizer"))


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny("llama")


def test_yes_less_no_is_that_of_the_last_position(judge, plain, monkeypatch):
    monkeypatch.setattr("lens_utils.feature_judges.answer_ids", lambda model: (7, 9))
    monkeypatch.setattr("lens_utils.feature_judges.BATCH", 2)
    found = feature_judges.yes_less_no(judge, TEXTS)
    for text, difference in zip(TEXTS, found, strict=True):
        ids = torch.tensor([judge.encode(f"{text}\nAnswer:")])
        with torch.no_grad():
            logits = plain(ids).logits[0, -1]
        assert difference == pytest.approx(float(logits[7] - logits[9]), abs=1e-4)


def test_losses_are_those_of_the_text_alone(judge, plain, monkeypatch):
    monkeypatch.setattr("lens_utils.feature_judges.BATCH", 2)
    found = feature_judges.losses(judge, "the cat is", TEXTS)
    head = len(judge.encode("the cat is"))
    for text, loss in zip(TEXTS, found, strict=True):
        ids = torch.tensor([judge.encode("the cat is") + judge.encode(text, bos=False)])
        with torch.no_grad():
            logits = plain(ids).logits[0, head - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, head:])
        assert loss == pytest.approx(float(expected), abs=1e-4)


def test_a_tokenizer_without_yes_cannot_judge(judge):
    with pytest.raises(BadInput, match="does not tell yes from no"):
        feature_judges.answer_ids(judge)


def test_judges_show_windows_and_marks(judge, monkeypatch):
    asked = []
    note = lambda model, prompts: asked.extend(prompts) or torch.zeros(len(prompts))  # noqa: E731
    monkeypatch.setattr("lens_utils.feature_judges.yes_less_no", note)
    pieces, ids = {0: "a", 1: " cat", 2: " sat"}, np.array([0, 1, 2, 1])
    made = feature_judges.judges(judge, {5: "animals"}, pieces, ids)
    trial = Trial(np.array([[0, 1, 2]]), np.array([[False, True, False]]), np.array([True]))
    assert made["detection"](trial, 5).shape == (1,)
    made["fuzzing"](trial, 5)
    assert 'Text: "a cat sat"' in asked[0] and "animals" in asked[0]
    assert 'Text: "a<< cat>> sat"' in asked[1] and "animals" in asked[1]
