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
    if not (temperature == 0 or COLDEST <= temperature < math.inf):
        raise BadInput(f"temperature {temperature}: 0 is greedy, otherwise {COLDEST} or more")
    if not 0 < top_p <= 1:
        raise BadInput(f"top-p {top_p}: a share above 0, up to 1")
    choose = sampler(temperature, top_p, seed) if temperature else greedy
    for (step,) in _steps(model, [ids], max_new_tokens, choose, top_k_shown, until):
        assert step is not None
        yield step


def answers(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    top_k_shown: int = 5,
    until: str = "",
) -> list[list[Step]]:
    """The greedy answers to several prompts, which are run together (padded on the left).

    Raises BadInput as `stream` does.
    """
    found: list[list[Step]] = [[] for _ in rows]
    for steps in _steps(model, rows, max_new_tokens, greedy, top_k_shown, until):
        for answer, step in zip(found, steps, strict=True):
            if step is not None:
                answer.append(step)
    return found


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
    if max_new_tokens < 1:
        raise BadInput(f"max-new-tokens {max_new_tokens}: at least 1")
    if not all(rows):
        raise BadInput("there is no text to go on from")
    if (longest := max(map(len, rows))) >= model.n_ctx:
        raise BadInput(f"{longest} tokens leave no room for an answer in the context of "
                       f"{model.name}, {model.n_ctx}")  # fmt: skip
    ids, mask = model.batch(rows, "left")
    # Not every architecture derives positions from the mask once there is a cache.
    position = (mask.cumsum(1) - 1).clamp_min(0)
    texts = {row: _Growing(model) for row in range(len(rows))}  # of the rows that go on
    cache = None
    for n in range(1, max_new_tokens + 1):
        logits, cache = model.bridge(
            ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_type="logits_and_cache",
        )
        logits = logits[:, -1].float().cpu()
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
            keep = torch.tensor(going, device=mask.device)
            cache.batch_select_indices(keep)
            chosen, mask, position = chosen[going], mask[keep], position[keep]
        ids = chosen[:, None].to(mask.device)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        position = position[:, -1:] + 1
