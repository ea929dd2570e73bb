"""Experiment 000: what it asks, how it grades, what talking prints and keeps."""

import io
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from lens_utils import prompts, provenance
from lens_utils.__main__ import load
from lens_utils.errors import BadInput
from lens_utils.experiment import execute

SOURCE = provenance.EXPERIMENTS / "000_basic_chat" / "run.py"
RUN = load(SOURCE.parent)

import chat_answers as ask  # noqa: E402  (`load` makes it importable)
import chat_session  # noqa: E402
import chat_tables as table  # noqa: E402

QUESTIONS = prompts.load(str(SOURCE), "questions")
EXAMPLES = prompts.load(str(SOURCE), "examples")


@pytest.fixture
def folder(tiny, make_tokenizer, tmp_path):
    """folder(chat): a small model on disk, with a chat template or without."""

    def make(chat: bool):
        where = tmp_path / ("chatty" if chat else "base")
        tiny("llama").save_pretrained(where)
        make_tokenizer(chat=chat).save_pretrained(where)
        return where

    return make


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """lab(*flags): run experiment 000 in this process; its Run."""
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    return lambda *flags: execute(RUN.Config, RUN.main, SOURCE, list(map(str, flags)))


def transcript(run) -> dict:
    return json.loads((run.folder / "transcript.json").read_text(encoding="utf-8"))


def typed(monkeypatch, *lines):
    """Somebody at a terminal types these lines; exceptions among them are raised."""
    left = iter(lines)

    def answer(prompt=""):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


# What is asked


def test_help_is_quick_and_loads_no_torch():
    code = (
        f"import runpy, sys, time; sys.argv = ['run.py', '--help']\n"
        f"try: runpy.run_path({str(SOURCE)!r}, run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules, time.process_time())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch_loaded, seconds = out.stdout.split()[-2:]
    assert torch_loaded == "False" and float(seconds) < 1


def test_questions_are_ten_a_family_and_do_not_hold_their_answers():
    assert set(Counter(q.family for q in QUESTIONS).values()) == {10} and len(QUESTIONS) == 60
    assert len({q.text for q in QUESTIONS}) == 60
    for question in QUESTIONS:
        assert not table.is_right(question.text, question.answer), question.id
        for example in EXAMPLES:
            assert not table.is_right(f"{example.text} {example.answer}", question.answer)
            assert not table.is_right(question.text, example.answer)


def test_answers_of_a_family_differ():
    for i, one in enumerate(QUESTIONS):
        for other in QUESTIONS[i + 1 :]:
            if one.family == other.family:
                accepted = other.answer.split("|")
                assert not any(table.is_right(a, one.answer) for a in accepted), (one, other)


def test_a_quick_run_asks_one_of_each_family():
    quick = ask.choose(QUESTIONS, RUN.Config(quick=True))
    assert set(Counter(q.family for q in quick).values()) == {1} and len(quick) == 6
    assert len(ask.choose(QUESTIONS, RUN.Config())) == 60
    assert len(ask.choose(QUESTIONS, RUN.Config(quick=True, per_family=2))) == 12


def test_shuffling_keeps_the_words_and_changes_their_order():
    for question in QUESTIONS:
        text = ask.shuffled(question.text, seed=0)
        words, others = (t.rstrip("?").split() for t in (question.text, text))
        assert sorted(words) == sorted(others) and words != others
        assert text == ask.shuffled(question.text, seed=0)
    texts = [[ask.shuffled(q.text, seed) for q in QUESTIONS] for seed in (0, 1)]
    assert texts[0] != texts[1]


# How it is graded


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("The capital of France is Paris.", "Paris", True),
        ("PARIS!", "Paris", True),
        ("Parisian", "Paris", False),
        ("7 + 5 = 12.", "12|twelve", True),
        ("Twelve", "12|twelve", True),
        ("120", "12|twelve", False),
        ("12.5", "12|twelve", False),
        ("1,200 or so", "1200", True),
        ("It is twenty-four", "24|twenty-four", True),
        ("Bogotá", "Bogota", True),
        ("the dog's bark", "dog", True),
        ("", "dog", False),
    ],
)
def test_an_answer_is_right_when_it_holds_an_accepted_one(said, gold, right):
    assert table.is_right(said, gold) is right


def test_confidence_is_read_where_the_answer_gets_to_the_point():
    tokens = ["The", " capital", " of", " France", " is", " Paris", ".", "<end>"]
    steps = pd.DataFrame(
        {
            "question": "capitals-1",
            "condition": "asked",
            "form": "chat",
            "put": QUESTIONS[0].text,
            "token": tokens,
            "text": [*tokens[:-1], ""],
            "p": [0.1, 0.9, 0.9, 0.9, 0.9, 0.7, 0.6, 0.5],
            "entropy_bits": [5.0, 1, 1, 1, 1, 2, 3, 4],
            "closes": [False] * 7 + [True],
        }
    )
    (row,) = table.grade([steps], QUESTIONS).to_dict("records")
    assert (row["answer"], row["right"]) == ("The capital of France is Paris.", True)
    assert (row["new"], row["p_new"], row["entropy_new_bits"]) == (" Paris", 0.7, 2)
    assert (row["tokens"], row["ended"]) == (7, True)
    assert row["p_mean"] == pytest.approx((0.1 + 4 * 0.9 + 0.7 + 0.6) / 7)
    assert not row["right_by_another"]
    cut = table.grade([steps[:3].assign(form="text", text=["\n", "Paris", " of"])], QUESTIONS)
    assert (cut.answer[0], cut.right[0], cut.ended[0]) == ("", False, False)  # its line is empty


def test_auroc_of_known_cases():
    right = np.array([True] * 20 + [False] * 20)
    p = np.linspace(1, 0, 40)
    perfect = table.auroc(p, right, seed=0)
    assert perfect == {"value": 1, "low": 1, "high": 1, "n": 40}
    assert table.auroc(-p, right, seed=0)["value"] == 0
    assert table.auroc(np.ones(40), right, seed=0)["value"] == 0.5
    blind = table.auroc(np.tile([0.1, 0.9], 20), right, seed=0)
    assert blind["value"] == 0.5 and blind["low"] < 0.5 < blind["high"]


def test_shuffled_labels_know_nothing_but_the_group():
    right = np.array([True] * 15 + [False] * 5 + [True] * 5 + [False] * 15)
    p = np.linspace(1, 0, 40)
    null = table.null_auroc(p, right, np.zeros(40), seed=0)
    assert null["value"] == pytest.approx(0.5, abs=0.01) and null["low"] < 0.4 < 0.6 < null["high"]
    # The first half is 3/4 right and lies above the second, which is 1/4 right: pairs of a right
    # and a wrong answer are in order always, never, or every other time.
    groups = np.repeat(["easy", "hard"], 20)
    expected = (15 * 15 + 0 * 5 * 5 + 0.5 * 2 * 15 * 5) / 400
    assert table.null_auroc(p, right, groups, seed=0)["value"] == pytest.approx(expected, abs=0.01)
    assert (
        table.null_auroc(p, right, np.arange(40), seed=0)["low"]
        == table.auroc(p, right, 0)["value"]
    )


def test_text_in_tables_stays_on_its_line():
    assert table.visible(" a\n\tb\x00é 🚀") == " a\\n\\tb\\x00é 🚀"


# A run


def test_a_run_asks_in_every_form_and_condition(folder, lab):
    run = lab("--quick", "--per-family", 1, "--answer-tokens", 12, "--model", folder(chat=True))
    answers = pd.read_csv(run.folder / "answers.csv")
    counts = answers.groupby(["condition", "form"]).size().to_dict()
    assert counts == {
        ("asked", "chat"): 6,
        ("asked", "text"): 6,
        ("words shuffled", "chat"): 6,
        ("words shuffled", "text"): 6,
        ("untrained twin", "chat"): 3,
    }
    steps = pd.read_csv(run.folder / "steps.csv", keep_default_na=False)
    assert (steps.p1 >= steps.p2).all() and (steps.p == steps.p1).all()  # greedy
    assert (
        json.loads((run.folder / "speed.json").read_text())["streamed answers equal to the batch's"]
        == 1
    )
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["questions"] == 6
    assert summary["chat: right answers"]["n"] == 6


def test_a_base_model_is_asked_in_text_only(folder, lab):
    flags = ["--quick", "--per-family", 1, "--answer-tokens", 8, "--model", folder(chat=False)]
    answers = pd.read_csv(lab(*flags).folder / "answers.csv")
    assert set(answers.form) == {"text"} and len(answers) == 15


# Talking


def test_one_answer_is_all_of_stdout_and_is_kept(folder, lab, capsys):
    run = lab(
        "--model", folder(chat=True), "--prompt", "the cat", "--max-new-tokens", 5, "--seed", 3
    )
    kept = transcript(run)
    asked, said = kept["conversations"][0]
    assert capsys.readouterr().out == said["content"] + "\n"
    assert asked == {"role": "user", "content": "the cat"}
    assert (
        said["content"].split() == [t["token"] for t in said["tokens"]] and len(said["tokens"]) == 5
    )
    assert said["tokens"][0]["p"] == said["tokens"][0]["top"][0]["p"]
    assert not said["ended"]
    assert kept["settings"]["seed"] == 3 and kept["model"]["architecture"] == "LlamaForCausalLM"
    assert run.folder.parent.name == "transcripts"


def test_conversations_with_other_settings_do_not_get_in_each_others_way(folder, lab):
    model = folder(chat=True)
    one = lab("--model", model, "--prompt", "the cat", "--max-new-tokens", 2)
    other = lab("--model", model, "--prompt", "a dog", "--temperature", 1, "--max-new-tokens", 3)
    assert one.folder != other.folder and transcript(one) != transcript(other)


def test_piped_text_is_answered_once(folder, lab, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\nsat\n")))
    run = lab("--interactive", "--model", folder(chat=True), "--max-new-tokens", 3)
    (asked, _), = transcript(run)["conversations"]  # fmt: skip
    assert asked["content"] == "the cat\nsat"
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--prompt", " "], ["--interactive"]])
def test_nothing_to_answer_is_refused(flags, folder, lab, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(BadInput, match="prompt is empty"):
        lab(*flags, "--model", folder(chat=True))
    assert not list(provenance.outputs().glob("000_basic_chat/transcripts/*"))


def test_probabilities_are_listed_beside_the_text(folder, lab, capsys):
    flags = ["--prompt", "the cat", "--max-new-tokens", 3, "--show-probs"]
    lab("--model", folder(chat=True), *flags)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "bits" in line]
    assert len(lines) == 3 and len(out.splitlines()) == 1
    assert all(len(re.findall(r"\d\.\d{6}\b", line)) == 1 + chat_session.TOP for line in lines)


def test_a_conversation_remembers_until_reset(folder, lab, capsys, monkeypatch):
    typed(monkeypatch, "the cat", "", "a dog", "/reset", "he ran", "/quit", "not read")
    run = lab("--interactive", "--model", folder(chat=True), "--max-new-tokens", 3)
    first, second = transcript(run)["conversations"]
    assert [t["content"] for t in first[::2]] == ["the cat", "a dog"]
    assert [t["content"] for t in second[::2]] == ["he ran"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    # The second question was put with the first exchange before it, the third without any.
    model = run.model()
    said = [{"role": t["role"], "content": t["content"]} for t in first]
    from lens_utils.generate import stream

    for turns, found in (
        (said[:3], first[3]),
        ([{"role": "user", "content": "he ran"}], second[1]),
    ):
        steps = stream(model, model.encode_chat(turns), max_new_tokens=3)
        assert [s.id for s in steps] == [t["id"] for t in found["tokens"]]


def test_a_base_model_goes_on_with_the_text(folder, lab, monkeypatch):
    typed(monkeypatch, "the cat", "a dog")
    run = lab("--interactive", "--model", folder(chat=False), "--max-new-tokens", 3)
    ((_, said, _, more),) = transcript(run)["conversations"]
    from lens_utils.generate import stream

    model = run.model()
    ids = model.encode(f"the cat\n{said['content']}\na dog")
    steps = stream(model, ids, max_new_tokens=3)
    assert [s.id for s in steps] == [t["id"] for t in more["tokens"]]
    with pytest.raises(BadInput, match="base model"):
        lab("--prompt", "a", "--system", "be brief", "--model", folder(chat=False))


def test_ctrl_c_stops_an_answer_and_keeps_what_came(folder, lab, capsys, monkeypatch):
    plain = chat_session.generate.stream

    def stopped(*args, **settings):
        for n, step in enumerate(plain(*args, **settings)):
            if n == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr("lens_utils.generate.stream", stopped)
    typed(monkeypatch, KeyboardInterrupt(), "the cat", "a dog")
    run = lab("--interactive", "--model", folder(chat=True), "--max-new-tokens", 6)
    (turns,) = transcript(run)["conversations"]
    assert [len(t["tokens"]) for t in turns[1::2]] == [2, 2]
    assert capsys.readouterr().err.count("stopped") == 2


def test_a_full_context_is_said_and_the_conversation_goes_on(folder, lab, capsys, monkeypatch):
    typed(monkeypatch, "cat " * 61, "cat " * 90, "the dog")
    run = lab("--interactive", "--model", folder(chat=True), "--max-new-tokens", 3)
    (turns,) = transcript(run)["conversations"]
    assert [t["content"] for t in turns[::2]] == ["the dog"]
    err = capsys.readouterr().err
    assert "leave no room" in err or "longer than the context" in err
