"""Labels from an endpoint, with a model of `llm` that is made up here: no network."""

import json
import subprocess
import sys
import threading

import llm
import pytest

from lens_utils import feature_endpoint, files
from lens_utils.errors import BadInput, Failure

GOOD = 'Sure! {"label": "words   about\\ncats"}'


class Fake(llm.Model):
    """Answers in turn from a list: text, an exception to raise, or an event to wait for."""

    model_id = "fake"
    can_stream = False

    def __init__(self):
        self.replies, self.asked = [], []

    def execute(self, prompt, stream, response, conversation):
        self.asked.append(prompt.prompt)
        reply = self.replies.pop(0) if self.replies else GOOD
        if isinstance(reply, threading.Event):
            reply.wait(5)
            reply = "too late"
        if isinstance(reply, Exception):
            raise reply
        yield reply


@pytest.fixture
def fake(monkeypatch):
    model = Fake()
    known = llm.get_model_aliases
    monkeypatch.setattr(llm, "get_model_aliases", lambda: {**known(), "fake": model})
    return model


@pytest.fixture
def ask(tmp_path):
    def go(prompts, budget=100_000, timeout=5.0):
        return feature_endpoint.ask_all("fake", prompts, tmp_path / "answers", budget, timeout, 0.0)

    return go


def test_answers_are_kept_and_asked_for_once(fake, ask, tmp_path):
    assert ask({3: "one?", 4: "two?"}) == {3: "words about cats", 4: "words about cats"}
    assert fake.asked == ["one?", "two?"]
    assert ask({9: "two?", 7: "three?"}) == dict.fromkeys((9, 7), "words about cats")
    assert fake.asked == ["one?", "two?", "three?"]
    held = [files.read(path) for path in (tmp_path / "answers").iterdir()]
    assert len(held) == 3
    assert {(h["model"], h["version"], h["reply"]) for h in held} == {
        ("fake", feature_endpoint.VERSION, GOOD)}  # fmt: skip


@pytest.mark.parametrize(
    "junk",
    ["I do not know", "{}", '{"label": ""}', '{"label": 3}', '{"label": "x', "[1]",
     json.dumps({"label": "x" * 300})],
)  # fmt: skip
def test_junk_is_asked_again(fake, ask, junk):
    fake.replies = [junk, GOOD]
    assert ask({0: "one?"}) == {0: "words about cats"}
    assert len(fake.asked) == 2


def test_what_fails_is_recorded_and_asked_again_by_the_next_run(fake, ask, tmp_path):
    never = threading.Event()
    fake.replies = [GOOD, RuntimeError("503"), "junk", never, GOOD]
    with pytest.raises(Failure, match=r"no label for 1 of 3 features \(1 timed out\)"):
        ask({0: "one?", 1: "two?", 2: "three?"}, timeout=0.3)
    never.set()
    kept = sorted(p.name for p in (tmp_path / "answers").iterdir())
    failed = [name for name in kept if name.endswith(".failed.json")]
    assert len(kept) == 3 and len(failed) == 1
    record = files.read(tmp_path / "answers" / failed[0])
    assert [reason for reason, _ in record["tries"]] == ["failed", "junk", "timed out"]
    assert "503" in record["tries"][0][1]
    fake.asked.clear()
    assert len(ask({0: "one?", 1: "two?", 2: "three?"})) == 3
    assert fake.asked == ["two?"]
    assert not list((tmp_path / "answers").glob("*.failed.json"))


def test_nothing_is_asked_beyond_the_budget(fake, ask):
    with pytest.raises(BadInput, match="--budget is 100"):
        ask({0: "x" * 400}, budget=100)
    assert not fake.asked
    ask({0: "x" * 400}, budget=160)
    ask({0: "x" * 400}, budget=0)  # answered before: costs nothing


def test_the_estimate():
    found = feature_endpoint.estimate(["x" * 400, "y" * 401], "0.5,2")
    assert found == {"calls": 2, "tokens in": 201, "tokens out": 120,
                     "cost": pytest.approx((201 * 0.5 + 120 * 2) / 1e6)}  # fmt: skip
    with pytest.raises(BadInput, match="in,out"):
        feature_endpoint.estimate([], "cheap")


def test_an_unknown_model_is_one_line(ask, tmp_path):
    with pytest.raises(BadInput, match="llm knows no model 'no such model'"):
        feature_endpoint.ask_all("no such model", {0: "one?"}, tmp_path, 1000)


def test_the_prompt_marks_and_scales():
    text = feature_endpoint.prompt([([" the", " cat", " sat"], [0.1, 4.0, 2.0])], 4.0)
    assert "Excerpt 1:  the<< cat>>(10)<< sat>>(5)" in text


def test_llm_is_not_loaded_before_it_is_asked():
    code = (
        "import sys, lens_utils.feature_endpoint as f; f.estimate([]); print('llm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
