"""Rows of text: who is in which split, what is worth predicting, and what every token is."""

from dataclasses import replace

import pytest

from lens_utils import maze_traces, text_rows
from lens_utils.corpus import Doc
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec
from lens_utils.text_rows import asked_for, labelled, windows


@pytest.fixture(scope="module")
def mazes(organism):
    return {s: text_rows.load(organism, "auto", 6_000, 128, 0, s).rows
            for s in ("fit", "validation", "test")}  # fmt: skip


def test_no_layout_is_in_two_splits(mazes):
    layouts = [{row.doc for row in rows} for rows in mazes.values()]
    assert not (layouts[0] & layouts[1] or layouts[0] & layouts[2] or layouts[1] & layouts[2])
    assert all(row.split == split for split, rows in mazes.items() for row in rows)
    assert all(sum(len(row.ids) for row in rows) >= 6_000 for rows in mazes.values())


def test_every_token_of_a_maze_question_is_labelled(organism, mazes):
    rows = mazes["fit"]
    assert all(len(row.labels) == len(row.ids) for row in rows)
    for row in rows[:40]:
        words = [organism.decode([i]) for i in row.ids]
        cells = [w for w, label in zip(words, row.labels, strict=True) if label == "walls"]
        assert cells[:2] == ["Walls", ":"] and all(c.startswith("(") for c in cells[2:])
        asked = asked_for(row)
        assert not any(asked[: asked.index(True)]) and all(asked[asked.index(True) :])
        assert row.labels[-1] == "mark" and "answer" in row.labels
    thought = next(row for row in rows if row.source == "solve thinking")
    words = [organism.decode([i]) for i in thought.ids]
    start, end = words.index("<think>") + 1, words.index("</think>")
    assert thought.labels[start:end] == maze_traces.phases(words[start:end])


@pytest.fixture
def speller(tiny, tokenizer):
    return replace(wrap(tiny("llama"), tokenizer, ModelSpec("toy", "toy")), bos=(1,))


def test_labels_follow_characters_whatever_the_tokens_are(speller, tokenizer):
    model = speller
    ids, labels = labelled(model, [("the cat ", "a"), ("sat on ", "b"), ("mat", "c")])
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "cat", "sat", "on", "mat"]
    assert labels == ["a", "a", "b", "b", "c"]


def test_windows_begin_with_the_start_token_and_stay_in_one_document(speller):
    model = speller
    docs = [Doc("a:1", "the cat sat " * 40), Doc("b", "a dog " * 10), Doc("c", "big hat " * 40)]
    rows = list(windows(model, docs, 41, 200, "toy"))
    assert [row.doc for row in rows] == ["a", "a", "a", "c", "c"]
    assert all(row.ids[0] == 1 and len(row.ids) == 41 and row.source == "toy" for row in rows)
    assert len(list(windows(model, docs, 41, 50, "toy"))) == 2
    assert asked_for(rows[0]) == [True] * 41


def test_an_unknown_text_is_refused_in_one_line(organism):
    with pytest.raises(BadInput, match="no corpus 'novels'"):
        text_rows.load(organism, "novels", 100, 64, 0)
