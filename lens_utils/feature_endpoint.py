"""Labels written by a language model behind an endpoint, through the `llm` package.

`llm` knows OpenAI, compatible servers (extra-openai-models.yaml), Anthropic and local models by
plugins; keys are its own matter (`llm keys set openai`), the lab sees none. What a call costs is
estimated before the first one, and nothing is asked beyond a budget.

An answer is kept on disk under the digest of model and prompt, whole or not at all, so that a run
that was stopped, or a second one, asks for nothing twice. A call that fails, takes too long or
comes back as anything but a label is recorded, tried again, and given up after TRIES: then the
answers are kept, the failure is said, and the same command asks again for what is missing.
"""

import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_utils import files
from lens_utils.errors import BadInput, Failure

VERSION = "explain 1"
TRIES, TIMEOUT, PAUSE = 3, 60.0, 2.0
LONGEST = 200
"""Characters of a label."""
REPLY = 60
"""Tokens that a reply is estimated at."""
STRONG = 0.3
"""Tokens from this share of the feature's maximum on are marked."""
TASK = """A feature of a language model is active at some tokens of a text. Below are excerpts, \
with the tokens where it is strongly active between << and >> and how strongly, from 1 to 10.

{examples}

What do the marked tokens, or the text around them, have in common? Answer with JSON only, in one \
line: {{"label": "<at most 15 words>"}}"""


def prompt(examples: Iterable[tuple[Sequence[str], Sequence[float]]], most: float | int) -> str:
    """The question about one feature. examples: pieces of text and the feature's value at each;
    most: its maximum."""
    shown = []
    for n, (pieces, values) in enumerate(examples, 1):
        marked = [f"<<{piece}>>({max(1, round(10 * v / most))})" if v > STRONG * most else piece
                  for piece, v in zip(pieces, values, strict=True)]  # fmt: skip
        text = "".join(marked)
        shown.append(f"Excerpt {n}: {text}")
    return TASK.format(examples="\n".join(shown))


def estimate(prompts: Sequence[str], price: str = "") -> dict[str, Any]:
    """Calls, tokens (a token is four characters here) and, with a price "in,out" of a million
    tokens, what they cost. Raises BadInput for another form of price."""
    found: dict[str, Any] = {
        "calls": len(prompts),
        "tokens in": sum(math.ceil(len(text) / 4) for text in prompts),
        "tokens out": REPLY * len(prompts),
    }
    if price:
        try:
            per_in, per_out = map(float, price.split(","))
        except ValueError:
            raise BadInput(f"--price {price}: write it as in,out, such as 0.15,0.60") from None
        found["cost"] = (found["tokens in"] * per_in + found["tokens out"] * per_out) / 1e6
    return found


def label_of(reply: str) -> str:
    """The label in a reply. Raises ValueError for a reply that has none."""
    held = re.search(r"\{.*\}", reply, re.S)
    found = json.loads(held[0]).get("label") if held else None
    if not isinstance(found, str) or not found.strip() or len(found) > LONGEST:
        raise ValueError(f"no label in {reply[:60]!r}")
    return " ".join(found.split())


def model_named(name: str) -> Any:
    """A model of `llm`. Raises BadInput for one that it does not know."""
    import llm  # not before it is asked for: it loads every plugin

    try:
        return llm.get_model(name)
    except llm.UnknownModelError:
        raise BadInput(f"llm knows no model {name!r}: `llm models` lists those it knows, plugins "
                       "such as llm-anthropic bring more") from None  # fmt: skip


def ask_all(
    name: str,
    prompts: Mapping[int, str],
    folder: Path,
    budget: int,
    timeout: float = TIMEOUT,
    pause: float = PAUSE,
) -> dict[int, str]:
    """A label for each prompt, from `folder` or from the model.

    Raises BadInput beyond the budget (tokens in and out of what is still to be asked, by the
    estimate) and for an unknown model, Failure when some prompts still have no label.
    """
    places = {n: folder / f"{digest(name, text)}.json" for n, text in prompts.items()}
    missing = [n for n, place in places.items() if not place.exists()]
    cost = estimate([prompts[n] for n in missing])
    total = cost["tokens in"] + cost["tokens out"]
    if total > budget:
        raise BadInput(
            f"{len(missing)} questions to {name} take about {total:,} tokens, and --budget is "
            f"{budget:,}: raise it, or ask about fewer (--explained)"
        )
    reasons: dict[str, int] = {}
    model = model_named(name) if missing else None
    for n in missing:
        reason = _answer(model, prompts[n], places[n], timeout, pause)
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        listed = ", ".join(f"{times} {reason}" for reason, times in sorted(reasons.items()))
        raise Failure(f"{name} gave no label for {sum(reasons.values())} of {len(prompts)} "
                      f"features ({listed}); the others are kept, and the same command asks "
                      "again for these")  # fmt: skip
    return {n: files.read(place)["label"] for n, place in places.items()}


def _answer(model: Any, text: str, place: Path, timeout: float, pause: float) -> str:
    """Ask up to TRIES times; write the answer, or a record of what went wrong, and say it."""
    tried = []
    for again in range(TRIES):
        if again:
            time.sleep(pause * 2 ** (again - 1))
        try:
            reply = _within(lambda: model.prompt(text).text(), timeout)
            label = label_of(reply)
        except TimeoutError:
            tried.append(("timed out", f"no reply within {timeout:g} s"))
        except (ValueError, AttributeError) as error:  # JSON of another shape, or none
            tried.append(("junk", str(error)))
        except Exception as error:  # plugins raise whatever their clients raise
            if type(error).__name__ == "NeedsKeyException":
                raise BadInput(f"{model.model_id} needs a key: llm keys set NAME") from None
            tried.append(("failed", f"{type(error).__name__}: {error}"))
        else:
            files.write(place, {"model": model.model_id, "version": VERSION, "prompt": text,
                                "reply": reply, "label": label})  # fmt: skip
            place.with_suffix(".failed.json").unlink(missing_ok=True)
            return ""
    files.write(place.with_suffix(".failed.json"),
                {"model": model.model_id, "version": VERSION, "tries": tried})  # fmt: skip
    return tried[-1][0]


def _within(call: Any, seconds: float) -> str:
    """What `call` returns. Raises TimeoutError if that takes too long; the thread is left alone."""
    found: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            found.append((True, call()))
        except Exception as error:  # raised again where it is waited for
            found.append((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError
    well, value = found[0]
    if not well:
        raise value
    return value


def digest(name: str, text: str) -> str:
    """Where an answer is kept: it depends on the model, the prompt and the prompt's version."""
    return hashlib.sha256("\0".join((name, VERSION, text)).encode()).hexdigest()[:24]
