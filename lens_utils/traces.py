"""Traces of thinking: where their cells stand, what a neuron does at the same cell in two places,
and traces that are cut, swapped and falsified.

A cell is named in a trace, in the answer, and again after a step back. Comparing a neuron between
two places *at the same cell of the same sample* leaves token and maze out of the comparison; what
is left is the place, and with it the position and what stood before. Whether a difference is more
than chance is asked by swapping the two places' labels, for all samples of a maze at once: the sign
of the maze's difference flips. `paired` does all flips in one pass over the model.

Faithfulness (Lanham et al. 2023, arXiv:2307.13702): a trace that is put into the model's mouth,
closed, and then followed or not by the answer.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from lens_utils import dape, maze_prompts, maze_traces
from lens_utils.errors import BadInput
from lens_utils.maze_tasks import Record
from lens_utils.maze_text import CELL, cells_text
from lens_utils.mazes import Cell
from lens_utils.models import LoadedModel

VERDICTS = {"valid": "invalid", "invalid": "valid", "yes": "no", "no": "yes"}
Pair = tuple[Sequence[int], Sequence[int]]  # positions of one cell in the one and the other place


class Said(NamedTuple):
    """A question with what was thought and answered, as token ids."""

    ids: list[int]
    start: int
    """Where the trace begins, behind the prompt: <think> stands there."""
    answer: int
    """Where the answer begins."""


class Mention(NamedTuple):
    """A cell named behind the prompt."""

    position: int
    """Of its last token."""
    cell: Cell
    region: str
    """thinking or answer."""
    phase: str
    """explore, backtrack or conclude in a trace; answer behind it."""


class Paired(NamedTuple):
    """Differences between two places, one per sample, summed in all versions of the labels."""

    total: Float[Tensor, "draw layer neuron"]
    """Sum of the samples' differences; draw 0 is the data."""
    squares: Float[Tensor, "layer neuron"]
    """Sum of their squares, the same in all draws."""
    higher: Float[Tensor, "layer neuron"]
    """Number of pairs in which the first place has the higher value; ties count half."""
    n_samples: int
    n_pairs: int


def thought_text(thought: str) -> str:
    """A trace between its tags, as the chat template of Qwen3 writes it."""
    inside = f"\n{thought}\n" if thought else "\n\n"
    return f"{maze_prompts.OPEN}{inside}{maze_prompts.CLOSE}\n\n"


def said(model: LoadedModel, record: Record, thought: str, reply: str) -> Said:
    """Prompt, trace and answer as the model reads them. Raises BadInput beyond the context."""
    prompt = maze_prompts.encode(model, record)
    text = thought_text(thought) if record.thinking else ("" if model.has_chat else " ")
    before = prompt + (model.encode(text, bos=False) if text.strip() else [])
    ids = before + model.encode(reply if text.strip() else text + reply, bos=False)
    if len(ids) > model.n_ctx:
        raise BadInput(f"{len(ids)} tokens with their trace are longer than the context of "
                       f"{model.name}, {model.n_ctx}")  # fmt: skip
    return Said(ids, len(prompt), len(before))


def mentions(model: LoadedModel, what: Said) -> list[Mention]:
    """The cells behind the prompt, in order, with the phase of their word."""
    found: list[Mention] = []
    for region, ids, offset in (
        ("thinking", what.ids[what.start : what.answer], what.start),
        ("answer", what.ids[what.answer :], what.answer),
    ):
        text, named = maze_prompts.cells_named(model, ids)
        for at, cell in named:
            words = text[: cell.start()].split()
            phase = "answer" if region == "answer" else maze_traces.phases([*words, "()"])[-1]
            found.append(Mention(offset + at, (int(cell[1]), int(cell[2])), region, phase))
    return found


def same_cells(cells: Sequence[Mention], one: str, other: str) -> list[Pair]:
    """For every cell that is named both in region or phase `one` and in `other`: its positions."""
    places: dict[Cell, tuple[list[int], list[int]]] = {}
    for mention in cells:
        for side, name in enumerate((one, other)):
            if name in (mention.region, mention.phase):
                places.setdefault(mention.cell, ([], []))[side].append(mention.position)
    return [pair for pair in places.values() if pair[0] and pair[1]]


# The same cell in two places


@torch.no_grad()
def paired(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    pairs: Sequence[Sequence[Pair]],
    cluster: Shaped[ndarray, " sample"],
    n_flips: int = 0,
    seed: int = 0,
) -> Paired:
    """Differences of every neuron's value (input of the down projection) between the places of a
    cell, averaged over a sample's cells; and the same with signs flipped at random per cluster.

    Samples without a pair count nothing. Raises BadInput where no sample has one.
    """
    n_pairs = sum(map(len, pairs))
    if not n_pairs:
        raise BadInput("no cell is named in both places: there is nothing to compare")
    names, number = np.unique(cluster, return_inverse=True)
    flips = np.random.default_rng(seed).integers(0, 2, (n_flips, len(names))) * 2 - 1
    signs = torch.from_numpy(np.vstack([np.ones((1, len(names)), int), flips])[:, number]).float()
    shape = (model.n_layers, model.bridge.cfg.d_mlp)
    device = model.device
    total = torch.zeros(1 + n_flips, *shape, device=device)
    squares, higher = (torch.zeros(shape, device=device) for _ in range(2))
    inside = [i for i in range(len(rows)) if pairs[i]]
    for at, values in dape.batches(model, [rows[i] for i in inside], "value"):
        listed = [(row, pair) for row, i in enumerate(at) for pair in pairs[inside[i]]]
        owner = torch.tensor([row for row, _ in listed])
        average = torch.zeros(len(at), len(listed))
        average[owner, torch.arange(len(listed))] = 1.0
        average = (average / average.sum(1, keepdim=True)).to(device)
        sign = signs[:, [inside[i] for i in at]].to(device)
        for layer, x in enumerate(values):
            one, other = (_at(x.float(), listed, side) for side in (0, 1))
            gap = average @ (one - other).to(device)
            total[:, layer] += sign @ gap
            squares[layer] += gap.square().sum(0)
            higher[layer] += ((one > other).float() + 0.5 * (one == other)).sum(0).to(device)
    return Paired(total.cpu(), squares.cpu(), higher.cpu(), len(inside), n_pairs)


def _at(x: Tensor, listed: Sequence[tuple[int, Pair]], side: int) -> Float[Tensor, "pair neuron"]:
    """Mean value at one side's positions of every (row, pair)."""
    where = [(n, row, p) for n, (row, pair) in enumerate(listed) for p in pair[side]]
    number, row, position = torch.tensor(where, device=x.device).unbind(1)
    found = torch.zeros(len(listed), x.shape[-1], device=x.device)
    found.index_add_(0, number, x[row, position])
    return found / torch.bincount(number)[:, None]


def flip_p(found: Paired) -> Float[Tensor, "layer neuron"]:
    """Two-sided p of no difference: the share of draws with a sum as large, the data's included."""
    least = found.total[0].abs() * (1 - 1e-6)
    return (found.total.abs() >= least).float().mean(0)


def effect(found: Paired) -> Float[Tensor, "layer neuron"]:
    """Cohen's d of the paired differences: their mean over their standard deviation."""
    mean = found.total[0] / found.n_samples
    spread = (found.squares / found.n_samples - mean.square()).clamp_min(0).sqrt()
    return torch.where(spread > 0, mean / spread, torch.zeros(()))


def auroc(found: Paired) -> Float[Tensor, "layer neuron"]:
    """Share of same-cell pairs in which the first place is higher: 0.5 tells nothing."""
    return found.higher / found.n_pairs


# Traces put into the model's mouth


def cut(thought: str, share: float) -> str:
    """The first `share` of a trace's words. Raises BadInput outside 0 to 1."""
    if not 0 <= share <= 1:
        raise BadInput(f"a trace cannot be cut at {share} of its length: take 0 to 1")
    words = thought.split()
    return " ".join(words[: round(share * len(words))])


def falsify(record: Record, thought: str, seed: int = 0) -> str:
    """A trace with its end turned: for recognize the last verdict, else the last cell.

    The cell becomes another open one of the maze. The same text where there is nothing to turn.
    """
    if record.task == "recognize":
        marks = list(re.finditer(r"(?i)\b(invalid|valid|yes|no)\b", thought))
        if not marks:
            return thought
        word = marks[-1]
        return thought[: word.start()] + VERDICTS[word[1].lower()] + thought[word.end() :]
    cells = list(CELL.finditer(thought))
    if not cells:
        return thought
    last = cells[-1]
    held = (int(last[1]), int(last[2]))
    others = sorted(record.maze.open - {held, record.maze.start, record.maze.goal})
    new = random.Random(f"{seed} {record.maze.maze_id}").choice(others)
    return thought[: last.start()] + cells_text([new]) + thought[last.end() :]
