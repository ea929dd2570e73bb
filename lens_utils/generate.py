"""Answers, one token at a time, with what the model thought of each.

1. The model reads the prompt once and then each new token, over a key/value cache.
2. A token is chosen: the likeliest at temperature 0, else a draw after temperature and top-p
   (Hugging Face's own processors, in its order). Draws come from a CPU generator, so that a seed
   means the same draws on every device.
3. A `Step` tells the token and the model's own distribution it came from, before temperature and
   top-p and over the whole vocabulary, so that probabilities compare across settings.

It is over after one of `LoadedModel.ends` (that token is the last step), after `until` has been
written, at `max_new_tokens`, or where the context is full. Calls go through the bridge: hooks set
around `stream` act on every step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

BITS = 1 / math.log(2)
COLDEST = 1e-3  # below it logits / temperature leaves float32; 0 is what is meant


class Step(NamedTuple):
    """One generated token."""

    id: int
    text: str
    """What became readable with it: nothing at an end token, or amid a character."""
    p: float
    """Its probability at temperature 1."""
    entropy_bits: float
    """Of the distribution it came from."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids and their probabilities, best first."""


class _Growing:
    """The text of an answer as its tokens come."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.ids: list[int] = []
        self.text = ""

    def add(self, ids: Sequence[int], last: bool) -> str:
        """What the ids add to the text. Characters with bytes still to come wait for them."""
        self.ids += ids
        # An unfinished character decodes to U+FFFD at the end.
        text = self.model.decode(self.ids)
        piece = (text if last else text.rstrip("\ufffd"))[len(self.text) :]
        self.text += piece
        return piece


def stream(
    model: LoadedModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_k_shown: int = 5,
    until: str = "",
) -> Iterator[Step]:
    """The steps of one answer, as they come.

    until: text after which the answer is over, such as a line break for a base model.
    Raises BadInput for settings that choose no token, and for a prompt that fills the context.
    """
    choose = _chooser(temperature, top_p, seed)
    for (step,) in _steps(model, [ids], max_new_tokens, choose, top_k_shown, until):
        assert step is not None
        yield step


def answers(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_k_shown: int = 5,
    until: str = "",
) -> list[list[Step]]:
    """The answers to several prompts, which are run together (padded on the left).

    With a temperature, a row's draws depend on the rows beside it. Raises BadInput as `stream`.
    """
    choose = _chooser(temperature, top_p, seed)
    found: list[list[Step]] = [[] for _ in rows]
    for steps in _steps(model, rows, max_new_tokens, choose, top_k_shown, until):
        for answer, step in zip(found, steps, strict=True):
            if step is not None:
                answer.append(step)
    return found


@torch.no_grad()
def continuations(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Int[Tensor, "batch step"]:
    """Exactly n_tokens for each prompt, run together: `LoadedModel.ends` are never chosen.

    With a temperature, a row's draws depend on its place in the batch. Raises BadInput as
    `stream` does, and where prompt and text would not fit the context.
    """
    choose = _chooser(temperature, top_p, seed)
    _check_room(model, rows, n_tokens)
    if (longest := max(map(len, rows))) + n_tokens > model.n_ctx:
        raise BadInput(f"{longest} + {n_tokens} tokens are more than the context of {model.name}, "
                       f"{model.n_ctx}")  # fmt: skip
    d_vocab = model.bridge.cfg.d_vocab  # a tiny model's config can name an end beyond it
    banned = torch.tensor([i for i in model.ends if i < d_vocab], dtype=torch.long)
    reader = _Reader(model, rows)
    chosen = []
    for _ in range(n_tokens):
        logits = reader.logits()
        logits[:, banned] = -math.inf
        chosen.append(choose(logits))
        reader.add(chosen[-1])
    return torch.stack(chosen, dim=1)


def _chooser(
    temperature: float, top_p: float, seed: int
) -> Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]]:
    if not (temperature == 0 or COLDEST <= temperature < math.inf):
        raise BadInput(f"temperature {temperature}: 0 is greedy, otherwise {COLDEST} or more")
    if not 0 < top_p <= 1:
        raise BadInput(f"top-p {top_p}: a share above 0, up to 1")
    return sampler(temperature, top_p, seed) if temperature else greedy


def greedy(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
    """The likeliest token of each row."""
    return logits.argmax(-1)


def sampler(
    temperature: float, top_p: float, seed: int
) -> Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]]:
    """A function that draws a token for each row, from the likeliest whose share reaches top_p."""
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        p = warp(torch.empty(len(logits), 0, dtype=torch.long), logits).softmax(-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    return draw


def _check_room(model: LoadedModel, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise BadInput(f"max-new-tokens {max_new_tokens}: at least 1")
    if not rows or not all(rows):
        raise BadInput("there is no text to go on from")
    if (longest := max(map(len, rows))) >= model.n_ctx:
        raise BadInput(f"{longest} tokens leave no room for an answer in the context of "
                       f"{model.name}, {model.n_ctx}")  # fmt: skip


class _Reader:
    """Rows of tokens, padded on the left, that a model reads one token after the other."""

    def __init__(self, model: LoadedModel, rows: Sequence[Sequence[int]]) -> None:
        self.bridge = model.bridge
        self.ids, self.mask = model.batch(rows, "left")
        # Not every architecture derives positions from the mask once there is a cache.
        self.position = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.cache = None

    def logits(self) -> Float[Tensor, "batch d_vocab"]:
        """What follows each row, float32 on the CPU."""
        logits, self.cache = self.bridge(
            self.ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            return_type="logits_and_cache",
        )
        return logits[:, -1].float().cpu()

    def add(self, chosen: Int[Tensor, " batch"]) -> None:
        """The tokens that the rows go on with."""
        self.ids = chosen[:, None].to(self.mask.device)
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)
        self.position = self.position[:, -1:] + 1

    def select(self, going: list[int]) -> None:
        """Only these rows go on."""
        keep = torch.tensor(going, device=self.mask.device)
        self.cache.batch_select_indices(keep)
        self.mask, self.position = self.mask[keep], self.position[keep]


@torch.no_grad()
def _steps(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]],
    top_k: int,
    until: str,
) -> Iterator[list[Step | None]]:
    """One list per token: the step of every row, None for rows that are over."""
    _check_room(model, rows, max_new_tokens)
    reader = _Reader(model, rows)
    texts = {row: _Growing(model) for row in range(len(rows))}  # of the rows that go on
    for n in range(1, max_new_tokens + 1):
        logits = reader.logits()
        p = logits.softmax(-1)
        entropy = torch.special.entr(p).sum(-1) * BITS
        top = p.topk(min(top_k, p.shape[1]))
        chosen = choose(logits)
        steps: list[Step | None] = [None] * len(rows)
        going = []
        for i, (row, text) in enumerate(list(texts.items())):
            token = int(chosen[i])
            ended = token in model.ends
            full = n == max_new_tokens or len(rows[row]) + n == model.n_ctx
            piece = text.add([] if ended else [token], ended or full)
            best = tuple(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True))
            steps[row] = Step(token, piece, float(p[i, token]), float(entropy[i]), best)
            if ended or full or (until and until in text.text):
                del texts[row]
            else:
                going.append(i)
        yield steps
        if not going:
            return
        if len(going) < len(chosen):
            reader.select(going)
            chosen = chosen[going]
        reader.add(chosen)
