"""Attention is read as the model computes it, and a circuit that is known is found."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from circuits import (
    INDUCTION_HEAD,
    PREVIOUS_HEAD,
    REVERSE_HEADS,
    idle_heads,
    induction_model,
    reverse_model,
    reverse_pairs,
)
from conftest import ARCHS
from transformer_lens.head_detector import detect_head

from lens_utils import attention, cache, pairs, provenance, stats
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

sys.path.insert(0, str(provenance.EXPERIMENTS / "002_attention_patterns"))
import attention_tables as table  # noqa: E402
import attention_views as view  # noqa: E402

SPEC = ModelSpec("tiny", "tiny")
IDS = torch.tensor([[1, 9, 4, 33, 17, 5, 58, 21, 9, 40], [2, 7, 7, 30, 12, 3, 60, 8, 8, 41]])
CLASSES = ["bos", *("function", "entity", "punctuation") * 3]
WINDOWS = {
    "mistral": (4, 4, 4),
    "gemma2": (4, None, 4),
    "gemma3": (4, None, 4),
    "gemma3-multimodal": (4, None, 4),
}


@pytest.fixture(scope="module")
def recorded(tiny):
    """recorded(arch): a small model and what its heads do with IDS; each built once."""
    held = {}

    def build(arch):
        if arch not in held:
            model = wrap(tiny(arch), None, SPEC)
            held[arch] = model, attention.record(model, IDS, range(model.n_layers))
        return held[arch]

    return build


@pytest.fixture(scope="module")
def toy():
    return induction_model()


def weights(model, layer):
    return model.bridge.blocks[layer].attn.W_O


# The model's own attention


@pytest.mark.parametrize("arch", ARCHS)
def test_patterns_are_hugging_faces(arch, recorded, tiny):
    _, layers = recorded(arch)
    plain = tiny(arch)
    plain.set_attn_implementation("eager")
    for layer, expected in enumerate(plain(IDS, output_attentions=True).attentions):
        torch.testing.assert_close(layers[layer].pattern, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_query_head_gathers_its_own_values(arch, recorded):
    """z = pattern v, with grouped values repeated; and the layer's heads differ."""
    _, layers = recorded(arch)
    for heads in layers.values():
        gathered = torch.einsum("bhqk,bkhd->bqhd", heads.pattern, heads.v)
        torch.testing.assert_close(gathered, heads.z, atol=1e-5, rtol=0)
        assert heads.z.shape[2] == heads.v.shape[2] == 4
        assert not torch.allclose(heads.v[:, :, 0], heads.v[:, :, 3])


@pytest.mark.parametrize("arch", ARCHS)
def test_what_the_heads_write_sums_to_the_blocks_output(arch, recorded):
    model, layers = recorded(arch)
    names = [f"blocks.{layer}.attn.hook_out" for layer in layers]
    whole = cache.record(model, IDS, names)
    for (layer, heads), name in zip(layers.items(), names, strict=True):
        written = attention.outputs(heads.z, weights(model, layer)).sum(2)
        bias = getattr(model.bridge.blocks[layer].attn, "b_O", None)
        written = written if bias is None else written + bias
        torch.testing.assert_close(written, whole[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ("qwen2", "gemma3", "neox-parallel"))
def test_the_length_of_what_is_written_equals_the_naive_loop(arch, recorded):
    """One vector per head, query and key, made and measured one by one."""
    model, layers = recorded(arch)
    for layer, heads in layers.items():
        found = attention.norm_weighted(heads.pattern, heads.v, weights(model, layer))
        W_O = weights(model, layer)
        for b, h, q in [(0, 0, 9), (1, 3, 5), (0, 2, 3)]:
            for k in range(10):
                vector = heads.pattern[b, h, q, k] * heads.v[b, k, h] @ W_O[h]
                assert found[b, h, q, k].item() == pytest.approx(vector.norm().item(), abs=1e-5)


# Masses


@pytest.mark.parametrize("arch", ("llama", "mistral", "gemma2"))
def test_masses_over_all_classes_sum_to_the_row(arch, recorded):
    model, layers = recorded(arch)
    masks = attention.masks(CLASSES)
    assert masks.sum(0).tolist() == [1] * 10
    for layer, heads in layers.items():
        raw = attention.mass(heads.pattern, masks)
        torch.testing.assert_close(raw.sum(-1), torch.ones_like(raw.sum(-1)), atol=1e-5, rtol=0)
        normed = attention.norm_weighted(heads.pattern, heads.v, weights(model, layer))
        shares = attention.mass(attention.shares(normed), masks).sum(-1)
        torch.testing.assert_close(shares, torch.ones_like(shares), atol=1e-5, rtol=0)


def test_masses_are_those_of_the_named_positions():
    pattern = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]]])
    masks = attention.masks(["bos", "entity", "function"], ("entity", "bos", "function"))
    assert attention.mass(pattern, masks)[0, 0, 2].tolist() == pytest.approx([0.3, 0.2, 0.5])
    assert attention.behind(pattern, 1)[0, 0].tolist() == pytest.approx([0.5, 0.3])
    assert attention.behind(pattern, 0)[0, 0].tolist() == pytest.approx([1, 0.5, 0.5])
    assert attention.behind(pattern, 2)[0, 0].tolist() == pytest.approx([0.2])


def test_a_head_that_writes_nothing_has_no_shares(toy):
    ids = attention.repeated(toy, 2, 8)
    heads = attention.record(toy, ids, [0])[0]
    normed = attention.norm_weighted(heads.pattern, heads.v, weights(toy, 0))
    assert (normed[:, 0] == 0).all() and attention.shares(normed)[:, 0].isnan().all()
    assert attention.shares(normed)[:, PREVIOUS_HEAD[1]].sum(-1).allclose(torch.ones(2, 17))


# Windows and entropy


@pytest.mark.parametrize("arch", ARCHS)
def test_hidden_keys_have_no_mass_and_are_not_counted(arch, recorded):
    """Small random models round nothing to 0: what is 0 in the pattern is hidden."""
    model, layers = recorded(arch)
    for layer, heads in layers.items():
        width = attention.window(model, layer)
        assert width == WINDOWS.get(arch, (None,) * 3)[layer]
        seen = attention.visible(10, width)
        assert ((heads.pattern > 0).sum(-1) == seen).all()
        if width:
            hidden = attention.masks(["entity"] * (10 - width) + ["function"] * width)
            last = attention.mass(heads.pattern, hidden)[:, :, -1]
            assert (last[..., 0] == 0).all() and (last[..., 4] > 0.999).all()
            assert attention.behind(heads.pattern, width).abs().max() == 0


def test_entropy_of_known_rows():
    uniform = torch.ones(4, 4).tril()[None, None]
    uniform = uniform / uniform.sum(-1, keepdim=True)
    bits = attention.entropy_bits(uniform)[0, 0]
    assert bits.tolist() == pytest.approx([0, 1, math.log2(3), 2], abs=1e-6)
    even = attention.evenness(uniform, attention.visible(4))[0, 0]
    assert even[0].isnan() and even[1:].tolist() == pytest.approx([1, 1, 1])
    sharp = torch.eye(4)[None, None]
    assert attention.entropy_bits(sharp).abs().max() == 0
    assert attention.visible(6, 4).tolist() == [1, 2, 3, 4, 4, 4]


# Head types


def test_the_circuit_written_by_hand_is_named(toy):
    """L0H1 looks one token back, L1H2 behind the earlier occurrence, and no other head does."""
    ids = attention.repeated(toy, 6, 10, seed=1)
    layers = attention.record(toy, ids, range(2))
    found = {layer: attention.head_types(h.pattern, 10) for layer, h in layers.items()}
    layer, head = PREVIOUS_HEAD
    assert found[layer]["previous"][:, head].tolist() == pytest.approx([1] * 6, abs=1e-5)
    layer, head = INDUCTION_HEAD
    assert found[layer]["induction"][:, head].tolist() == pytest.approx([1] * 6, abs=1e-5)
    for layer, head in idle_heads():  # without weights: attention to everything alike
        for name in attention.TYPES:
            assert found[layer][name][:, head].max() < 0.1, (layer, head, name)
    assert found[0]["induction"].max() < 0.1 and found[1]["previous"].max() < 0.1


def test_the_known_circuit_attends_to_the_entity(toy):
    """On induction pairs the entity is what followed: all of L1H2's attention, none of L0H1's."""
    group = pairs.batch(toy, [p for p in pairs.induction(toy, 6, 8) if p.id.endswith(tuple("024"))])
    masks = attention.masks(group.pairs[0].classes)
    layers = attention.record(toy, group.clean, range(2))
    entity = [attention.mass(heads.pattern, masks)[:, :, -1, 0] for heads in layers.values()]
    assert entity[1][:, 2].tolist() == pytest.approx([1] * 3, abs=1e-5)
    assert entity[0][:, 1].abs().max() < 1e-5
    assert entity[1][:, :2].max() < 0.2 and entity[0].max() < 0.2


def test_in_a_compiled_program_the_head_that_reverses_reads_the_mirrored_token():
    """L3H0's last query reads the first letter, the entity; unused heads write exactly 0."""
    model = reverse_model()
    group = pairs.batch(model, reverse_pairs())
    masks = attention.masks(group.pairs[0].classes)
    for layer, heads in attention.record(model, group.clean, range(model.n_layers)).items():
        normed = attention.norm_weighted(heads.pattern, heads.v, weights(model, layer))
        if (layer, 0) not in REVERSE_HEADS:
            assert (normed == 0).all()
        if layer == 3:
            last = attention.mass(attention.shares(normed), masks)[:, 0, -1]
            assert last[:, 0].tolist() == pytest.approx([1] * 4, abs=1e-4)


@pytest.mark.parametrize("arch", ("llama", "qwen3", "gpt2", "toy"))
def test_head_types_agree_with_transformer_lens(arch, recorded, toy):
    """detect_head sums over all queries; ours are means over the second half."""
    model = toy if arch == "toy" else recorded(arch)[0]
    length = 9
    ids = attention.repeated(model, 1, length, seed=3)
    n_pos = ids.shape[1]
    # It wants a tokenizer, to add a BOS of its own: here the ids stand for themselves.
    stand_in = SimpleNamespace(
        cfg=model.bridge.cfg, to_tokens=lambda ids: ids, run_with_cache=model.bridge.run_with_cache
    )
    one_back = torch.zeros(n_pos, n_pos)
    one_back[torch.arange(n_pos - length, n_pos), torch.arange(n_pos - length, n_pos) - 1] = 1
    sink = torch.zeros(n_pos, n_pos)
    sink[-length:, 0] = 1
    theirs = {
        "induction": "induction_head",
        "previous": one_back,
        "duplicate": "duplicate_token_head",
        "sink": sink,
    }
    layers = attention.record(model, ids, range(model.n_layers))
    for name, asked in theirs.items():
        expected = detect_head(stand_in, ids, asked) * n_pos / length
        found = [attention.head_types(heads.pattern, length)[name][0] for heads in layers.values()]
        torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=0)


def test_repeated_tokens_are_repeated_and_drawn_per_seed(recorded):
    model, _ = recorded("llama")
    ids = attention.repeated(model, 3, 8, seed=5)
    assert ids.equal(attention.repeated(model, 3, 8, seed=5))
    assert not ids.equal(attention.repeated(model, 3, 8, seed=6))
    assert ids[:, -16:-8].equal(ids[:, -8:]) and not ids[0].equal(ids[1])
    assert all(len(set(row[-8:].tolist())) == 8 for row in ids) and ids[:, -16:].min() >= 8


# Depth, batches, dtypes, bad input


def test_the_band_is_a_share_of_depth():
    assert attention.band(30) == list(range(12, 25)) and attention.band(18) == list(range(7, 15))
    assert attention.band(21) == list(range(8, 18))  # 8 of 20 is 40 %, 17 of 20 is 85 %
    assert attention.band(3) == [1] and attention.band(2) == attention.band(1) == []


@pytest.mark.parametrize("arch", ("llama", "gemma3"))
def test_a_prompt_reads_the_same_alone_and_in_a_batch(arch, recorded):
    model, layers = recorded(arch)
    alone = attention.record(model, IDS[1:], [2])[2]
    for part in ("pattern", "v", "z"):
        both = getattr(layers[2], part)
        torch.testing.assert_close(getattr(alone, part), both[1:], atol=1e-5, rtol=0)


def test_bfloat16_moves_no_mass_by_more_than_rounding(tiny, recorded):
    """Eight bits of mantissa: rows sum to 1 within 2 %, masses of a small model differ by 5 %."""
    _, exact = recorded("llama")
    half = attention.record(wrap(tiny("llama").bfloat16(), None, SPEC), IDS, range(3))
    masks = attention.masks(CLASSES)
    for layer, heads in half.items():
        assert heads.pattern.dtype == heads.v.dtype == torch.float32
        assert (heads.pattern.sum(-1) - 1).abs().max() < 0.02
        found, expected = (attention.mass(x.pattern, masks) for x in (heads, exact[layer]))
        assert (found - expected).abs().max() < 0.05


def test_what_cannot_be_measured_is_said_in_one_line(recorded, toy):
    model, layers = recorded("llama")
    with pytest.raises(BadInput, match="layers 0 to 2, not 3"):
        attention.record(model, IDS, [0, 3])
    with pytest.raises(BadInput, match="'verb' would be left out"):
        attention.masks(["bos", "verb"])
    with pytest.raises(BadInput, match="induction takes 3 to 11"):
        attention.repeated(toy, 1, 12)
    with pytest.raises(BadInput, match="takes 3 to"):
        attention.repeated(toy, 1, 2)
    with pytest.raises(BadInput, match="10 positions do not hold 6 tokens twice"):
        attention.head_types(layers[0].pattern, 6)


# What experiment 002 makes of it


@pytest.fixture(scope="module")
def asked():
    """Twelve prompts of five and six tokens whose entity lies at position 2; and random rows."""
    kinds = ["bos", "function", "entity", "relation", "function", "punctuation"]
    tokens = pd.DataFrame(
        {"id": f"p{i}", "task": "t", "template": "ab"[i % 2], "group": f"g{i // 2}", "answer": "x",
         "pos": pos, "token": "w", "kind": kinds[pos]}
        for i in range(12) for pos in range(5 + i % 2)
    )  # fmt: skip
    screened = pd.DataFrame({"id": [f"p{i}" for i in range(12)], "logit_diff_clean": 1.0})
    made = table.Asked(tokens, screened)
    rows = np.random.default_rng(0).dirichlet([0.5] * 6, size=(12, 2, 3))
    rows[::2, :, :, 5] = 0  # behind the end of the short ones
    rows[:, 1, 2] = 0.05 * rows[:, 1, 2] + 0.95 * np.eye(6)[2]  # L1H2 reads the entity
    rows /= rows.sum(-1, keepdims=True)
    return made, {"attention": rows, "normed": rows}


def test_every_token_is_counted_once_and_the_last_two_again(asked):
    masks = asked[0].masks
    assert (masks[:, : len(attention.CLASSES)].sum(1).sum(1) == asked[0].length).all()
    previous, own = masks[:, -2], masks[:, -1]
    assert previous.argmax(1).tolist() == [3, 4] * 6 and own.argmax(1).tolist() == [4, 5] * 6
    assert previous.sum() == own.sum() == 12


def test_shuffled_classes_give_what_any_token_gets(asked):
    made, held = asked
    rows = np.arange(12)
    dealt = table.shuffled(made, held, rows, 4000, np.random.default_rng(1))
    expected = view.anywhere(made, held, rows, "attention").mean(0)  # all groups are of one size
    assert np.abs(dealt.mean(0) - expected).max() < 4 * dealt.std(0).max() / 4000**0.5
    found = table.entity(made, held, rows).mean(0)
    p = table.largest_p(found, dealt)
    assert p[1, 2] == 1 / 4001 and np.delete(p.ravel(), 5).min() > 0.05


def test_a_head_has_to_beat_the_largest_of_all_heads():
    """Against one head alone the p is that of a plain sign-flip test; other heads only raise it."""
    rng = np.random.default_rng(2)
    gaps = rng.normal(size=(11, 4, 5))
    gaps[:, 2, 3] += 1.6
    alone = table.flip_p(gaps[:, 2:3, 3:4], 20_000, rng)[0, 0]
    assert alone == pytest.approx(stats.sign_flip_p(gaps[:, 2, 3]) / 2, abs=0.003)
    together = table.flip_p(gaps, 20_000, rng)
    assert together[2, 3] > alone and together[2, 3] < 0.05
    assert np.delete(together.ravel(), 13).min() > 0.05
    assert table.beyond(np.array([1.0, 2, 3]), np.array([3.5, 2.0, 0])).tolist() == [0.25, 0.75, 1]


def test_a_head_chosen_on_one_wording_is_found_on_the_other(asked):
    made, held = asked
    found = table.held_out(made, held)
    first = found.groupby("chosen_on").head(1)
    assert set(zip(first.layer, first["head"], first.place, strict=True)) == {(1, 2, 1)}
    assert (first.value > 0.9).all() and set(first.measured_on) == {"a", "b"}
