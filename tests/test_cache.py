"""Streamed activations against single-prompt forward passes."""

import pytest
import torch
from conftest import ARCHS

from lens_utils import cache
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

ROWS = [[1, 5, 9, 13, 17, 21, 2], [1, 30, 7], [1, 8, 8, 2, 40]]
NAMES = ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ARCHS)
def test_padding_gives_the_single_prompt_numbers(arch, side, tiny):
    model = wrap(tiny(arch), None, ModelSpec(arch, arch))
    parts = list(cache.stream(model, ROWS, NAMES, batch_size=2, side=side))
    for name in NAMES:
        together = torch.cat([part.values[name] for part in parts])
        single = []
        for row in ROWS:
            _, kept = model.bridge.run_with_cache(torch.tensor([row]), names_filter=[name])
            single.append(kept[name][0])
        torch.testing.assert_close(together, torch.cat(single), atol=1e-4, rtol=1e-4)
    assert torch.cat([part.ids for part in parts]).tolist() == sum(ROWS, [])
    assert torch.cat([part.row for part in parts]).tolist() == [0] * 7 + [1] * 3 + [2] * 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_positions(side, tiny):
    model = wrap(tiny("qwen3"), None, ModelSpec("qwen3", "qwen3"))
    every = list(cache.stream(model, ROWS, NAMES, batch_size=3, side=side))[0]
    last = list(cache.stream(model, ROWS, NAMES, batch_size=3, side=side, positions="last"))[0]
    assert last.ids.tolist() == [row[-1] for row in ROWS]
    for name in NAMES:
        assert torch.equal(last.values[name], every.values[name][[6, 9, 14]])


def test_shards_give_back_what_was_streamed(tiny, tmp_path):
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    kept = list(cache.stream(model, ROWS, NAMES, batch_size=1))
    paths = cache.to_shards(tmp_path, cache.stream(model, ROWS, NAMES, batch_size=1), 2000)
    assert len(paths) > 1
    read = list(cache.from_shards(tmp_path))
    for name in NAMES:
        whole = torch.cat([part.values[name] for part in kept])
        assert torch.equal(torch.cat([part.values[name] for part in read]), whole)
    assert torch.cat([part.ids for part in read]).tolist() == sum(ROWS, [])


def test_memory_is_one_batch(tiny):
    """The stream is lazy: nothing is computed before, or beyond, what is asked for."""
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    calls = []
    handle = model.bridge.original_model.register_forward_hook(lambda *_: calls.append(1))
    stream = cache.stream(model, ROWS * 10, NAMES, batch_size=3)
    assert not calls
    next(stream)
    assert len(calls) == 1
    handle.remove()


@pytest.mark.parametrize("name", ["blocks.9.hook_resid_post", "blocks.0.attn.hook_pattern"])
def test_unknown_or_unfit_hooks_are_refused(name, tiny):
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    with pytest.raises(BadInput, match=name):
        next(cache.stream(model, ROWS, [name]))
