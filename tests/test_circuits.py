"""The models with known circuits do what they were made for, and only in their named parts."""

import itertools

import pytest
import torch
from circuits import (
    REVERSE,
    REVERSE_HEADS,
    REVERSE_MLPS,
    idle_heads,
    induction_model,
    reverse_model,
    reverse_pairs,
)

from lens_utils import pairs


def test_the_compiled_program_reverses_every_word():
    model = reverse_model()
    words = list(itertools.product([0, 1, 3, 5], repeat=4))  # a, b, c, d as the program counts
    ids = torch.tensor([[*model.bos, *word] for word in words])
    columns = {0: 0, 1: 1, 3: 2, 5: 3}
    expected = torch.tensor([[columns[x] for x in reversed(word)] for word in words])
    logits = model.bridge(ids)[:, 1:]
    assert logits.argmax(-1).equal(expected)
    table = pairs.screen(model, reverse_pairs())
    assert table.known.all() and (table.answer_rank == 1).all()


def test_nothing_is_written_outside_the_compiled_circuit():
    model = reverse_model()
    for layer, block in enumerate(model.bridge.blocks):
        writes = bool(block.attn.W_O.any())
        assert writes == ((layer, 0) in REVERSE_HEADS)
        assert bool(block.mlp.W_out.any()) == (layer in REVERSE_MLPS)
    assert REVERSE.stat().st_size < 100_000


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_hand_built_model_completes_repetitions(noise):
    model = induction_model(noise)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        half = torch.randperm(14, generator=generator)[:8] + 2
        ids = torch.cat([torch.tensor([0]), half, half])[None]
        predicted = model.bridge(ids)[0].argmax(-1)
        assert predicted[9:-1].equal(half[1:])
    for layer, head in idle_heads():
        assert bool(model.bridge.blocks[layer].attn.W_O[head].any()) == bool(noise)
