"""The conversation of experiment 000: streamed to stdout, kept as transcript.json of its run.

Models with a chat template get the conversation in it. Base models go on with the text: what was
typed and what they wrote, line after line.
"""

import contextlib
import dataclasses
import shutil
import sys
from typing import Any

from lens_utils import files, generate
from lens_utils.errors import BadInput
from lens_utils.experiment import Run, say
from lens_utils.generate import Step
from lens_utils.models import LoadedModel

TOP = 5


def talk(cfg, run: Run) -> None:
    """Talk; a conversation in which nothing was said leaves no folder behind."""
    try:
        converse(cfg, run)
    finally:
        if not (run.folder / "transcript.json").exists():
            shutil.rmtree(run.folder)


def converse(cfg, run: Run) -> None:
    """Answer --prompt or what is piped in, else talk until /quit or Ctrl-D."""
    text = cfg.prompt
    if text is None and not sys.stdin.isatty():
        text = sys.stdin.buffer.read().decode(errors="replace").strip()
    if text is not None:
        if not text.strip():
            raise BadInput("there is nothing to answer: the prompt is empty")
        return Conversation(cfg, run).answer(text)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys at the prompt)
    conversation = Conversation(cfg, run)
    say(f"{cfg.model}: /reset forgets, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    while (line := ask()) not in (None, "/quit"):
        try:
            if line == "/reset":
                conversation.reset()
            elif line:
                conversation.answer(line)
        except BadInput as error:
            say(str(error))
        except KeyboardInterrupt:
            say("stopped")


def ask() -> str | None:
    """The next line typed; None at its end (Ctrl-D)."""
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ").strip()
            print("> ", end="", file=sys.stderr, flush=True)  # stdout holds only the model's text
            return input().strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


class Conversation:
    """What was said so far, and the model that says it."""

    def __init__(self, cfg, run: Run) -> None:
        self.cfg, self.path = cfg, run.folder / "transcript.json"
        self.model: LoadedModel = run.model()
        if cfg.system and not self.model.has_chat:
            raise BadInput(f"{cfg.model} is a base model: leave --system out")
        if not self.model.has_chat:
            say(f"{cfg.model} is a base model: it goes on with the text")
        self.turns: list[dict[str, Any]] = []
        self.past: list[list[dict[str, Any]]] = []

    def reset(self) -> None:
        """Begin anew; the transcript keeps what was said."""
        self.past, self.turns = [*self.past, self.turns], []

    def answer(self, text: str) -> None:
        """Stream the answer to `text`; what came is kept also when it is stopped."""
        cfg, asked = self.cfg, {"role": "user", "content": text}
        steps: list[Step] = []
        try:
            for step in generate.stream(
                self.model,
                self.encode([*self.turns, asked]),
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                seed=cfg.seed,
                top_k_shown=TOP,
            ):
                steps.append(step)
                print(step.text, end="", flush=True)
        finally:
            if steps:
                print(flush=True)
                self.turns += [asked, self.turn(steps)]
                self.save()
        if cfg.show_probs:
            print("\n".join(self.lines(steps)), file=sys.stderr, flush=True)

    def encode(self, turns: list[dict[str, Any]]) -> list[int]:
        """Token ids of the conversation, up to the answer to come."""
        if not self.model.has_chat:
            return self.model.encode("\n".join(t["content"] for t in turns))
        said = [{"role": t["role"], "content": t["content"]} for t in turns]
        system = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []
        return self.model.encode_chat(system + said)

    def turn(self, steps: list[Step]) -> dict[str, Any]:
        """An answer as the transcript keeps it."""
        decode = self.model.decode
        tokens = [
            {
                "token": decode([s.id]),
                "id": s.id,
                "p": s.p,
                "entropy_bits": s.entropy_bits,
                "top": [{"token": decode([i]), "id": i, "p": p} for i, p in s.top],
            }
            for s in steps
        ]
        ended = steps[-1].id in self.model.ends
        content = "".join(s.text for s in steps)
        return {"role": "assistant", "content": content, "ended": ended, "tokens": tokens}

    def save(self) -> None:
        record = {
            "model": self.model.identity,
            "settings": dataclasses.asdict(self.cfg),
            "conversations": [*self.past, self.turns],
        }
        files.write(self.path, record)

    def lines(self, steps: list[Step]) -> list[str]:
        """One line per token: its probability, the entropy it came from, the likeliest tokens."""
        decode = self.model.decode
        return [
            f"{decode([s.id])!r:>16} {s.p:.6f} {s.entropy_bits:6.2f} bits | "
            + "  ".join(f"{decode([i])!r} {p:.6f}" for i, p in s.top)
            for s in steps
        ]
