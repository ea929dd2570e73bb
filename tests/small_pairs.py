"""Pairs for the tests of gradients and edges: random ones for any model, telling ones for a toy."""

import dataclasses

import torch
from circuits import INDUCTION_HEAD, PREVIOUS_HEAD, induction_model

from lens_utils import pairs
from lens_utils.models import LoadedModel, wrap
from lens_utils.pairs import Batch, Pair
from lens_utils.registry import ModelSpec


def of(tiny, arch: str) -> LoadedModel:
    """The tiny model of an architecture; "induction" is the hand-built one, attending softly."""
    return softened() if arch == "induction" else wrap(tiny(arch), None, ModelSpec(arch, arch))


def softened(factor: float = 0.05) -> LoadedModel:
    """The induction model with blunt attention: its softmax is not saturated, so gradients flow."""
    model = induction_model()
    for layer, head in (PREVIOUS_HEAD, INDUCTION_HEAD):
        model.bridge.blocks[layer].attn.W_Q[head] *= factor
    return model


def random_batch(model: LoadedModel, n: int = 3, n_pos: int = 7, seed: int = 0) -> Batch:
    """Random prompts that differ in their third and fifth tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        drawn = torch.randperm(model.bridge.cfg.d_vocab - 4, generator=generator)[: n_pos + 4] + 4
        *ids, one, other, answer, foil = drawn.tolist()
        corrupt = ids[:2] + [one] + ids[3:4] + [other] + ids[5:]
        made.append(Pair(f"p{i}", "random", "random", f"g{i}", tuple(ids), tuple(corrupt),
                         answer, foil, ("function",) * n_pos))  # fmt: skip
    return pairs.batch(model, made)


def exchanged(made: list[Pair], what: str) -> list[Pair]:
    """Induction pairs "a b .. c d .. a" whose corrupted prompts end alike and differ before.

    keys: "c b .. a d .. a", so other tokens precede b and d; values: "a d .. c b .. a".
    """
    found = []
    for p in made:
        here = p.clean.index(p.answer) - (what == "keys")
        there = p.clean.index(p.foil) - (what == "keys")
        ids = list(p.clean)
        ids[here], ids[there] = ids[there], ids[here]
        found.append(dataclasses.replace(p, corrupt=tuple(ids)))
    return found
