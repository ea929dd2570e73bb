"""The one pass over text against plain hooks on Hugging Face models."""

import pytest
import torch

from lens_utils import mlp_stream
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec
from lens_utils.text_rows import Row

ROWS = [Row([1, 5, 9, 20, 31], "a", "toy", "fit"), Row([1, 7, 8], "b", "toy", "fit"),
        Row([1, 30, 1, 12, 13, 14, 15], "c", "toy", "fit")]  # fmt: skip


def mlps(hf):
    """The MLPs of a Hugging Face model, whatever it calls them."""
    return [m for name, m in hf.named_modules() if name.endswith(".mlp")]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "neox-parallel"])
def test_inputs_and_outputs_are_those_of_the_mlps(tiny, arch):
    hf = tiny(arch)
    model = wrap(tiny(arch), None, ModelSpec(arch, arch))
    held = []
    for mlp in mlps(hf):
        mlp.register_forward_hook(lambda m, x, y: held.append((x[0].detach(), y.detach())))
    batch = mlp_stream.activations(model, ROWS, 10, [0, 1])
    for row, own in enumerate(ROWS):
        held.clear()
        hf(torch.tensor([own.ids]))
        for layer in (0, 1):
            for found, expected in zip(batch.mlp[layer], held[layer], strict=True):
                here = found[batch.row == row + 10]
                at = batch.pos[batch.row == row + 10]
                torch.testing.assert_close(here, expected[0, at], atol=1e-5, rtol=1e-4)
    assert batch.ids.tolist() == [5, 9, 20, 31, 7, 8, 30, 1, 12, 13, 14, 15]


def test_start_tokens_are_left_out_wherever_they_are(tiny):
    from dataclasses import replace

    model = replace(wrap(tiny("llama"), None, ModelSpec("llama", "llama")), bos=(1,))
    batch = mlp_stream.activations(model, ROWS, 0, [0])
    assert batch.ids.tolist() == [5, 9, 20, 31, 7, 8, 30, 12, 13, 14, 15]
    batch = mlp_stream.activations(model, ROWS, 0, [0], sinks=2)
    assert batch.pos.min() == 2


def test_the_pass_stops_behind_the_last_layer_and_leaves_no_hook(tiny):
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    ids = torch.tensor([[1, 5, 9]])
    before = model.bridge(ids)
    reached = []
    model.bridge.blocks[1].mlp.hook_in.add_hook(lambda x, hook: reached.append(1))
    mlp_stream.activations(model, ROWS, 0, [0])
    assert not reached
    model.bridge.reset_hooks()
    torch.testing.assert_close(model.bridge(ids), before)


def test_every_row_is_in_one_batch():
    rows = [Row([1] * n, str(n), "toy", "fit") for n in (5, 3, 9, 1, 1, 4)]
    spans = mlp_stream.batches(rows, 8)
    assert spans == [(0, 2), (2, 3), (3, 6)]
    assert mlp_stream.batches(rows[:2], 8) == [(0, 2)] and mlp_stream.batches([], 8) == []


def test_a_layer_that_is_not_there_is_named(tiny):
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    with pytest.raises(BadInput, match="not 9"):
        mlp_stream.activations(model, ROWS, 0, [0, 9])
