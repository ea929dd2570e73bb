"""Noise in named heads and nowhere else, against edits of a plain Hugging Face model by hand."""

import pytest
import torch
from circuits import INDUCTION_HEAD, PREVIOUS_HEAD, idle_heads, induction_model
from conftest import ARCHS
from einops import einsum

from lens_utils import pairs
from lens_utils.errors import BadInput, Failure
from lens_utils.models import wrap
from lens_utils.perturb import noisy_heads
from lens_utils.registry import ModelSpec

SPEC = ModelSpec("tiny", "tiny")
IDS = torch.tensor([[1, 9, 4, 33, 17, 5, 58, 21, 9, 40]])  # longer than the sliding windows
HEADS = [(0, 1), (1, 3), (1, 2), (2, 0)]


def by_hand(hf, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views on a head's query and output weights in a Hugging Face model, as [rows, columns]."""
    n, d = 4, 8
    rows = slice(head * d, (head + 1) * d)
    if hf.config.model_type == "gpt2":
        attn = hf.transformer.h[layer].attn
        return attn.c_attn.weight[:, rows], attn.c_proj.weight[rows]
    if hf.config.model_type == "gpt_neox":
        attn = hf.gpt_neox.layers[layer].attention
        return attn.query_key_value.weight.view(n, 3, d, -1)[head, 0].T, attn.dense.weight[
            :, rows
        ].T
    text = getattr(hf.model, "language_model", hf.model)
    attn = text.layers[layer].self_attn
    return attn.q_proj.weight[rows].T, attn.o_proj.weight[:, rows].T


@pytest.mark.parametrize("arch", ARCHS)
def test_the_logits_are_those_of_a_model_edited_by_hand(arch, tiny):
    model, plain = wrap(tiny(arch), None, SPEC), tiny(arch)
    clean = model.bridge(IDS)
    with noisy_heads(model, HEADS, 0.5), torch.no_grad():
        for layer, head in HEADS:
            attn = model.bridge.blocks[layer].attn
            for ours, theirs in zip(
                (attn.W_Q[head], attn.W_O[head]), by_hand(plain, layer, head), strict=True
            ):
                assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
                theirs.copy_(ours)
        noisy = model.bridge(IDS)
    torch.testing.assert_close(noisy, plain(IDS).logits, atol=1e-5, rtol=0)
    assert (noisy - clean).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ARCHS)
def test_only_the_named_heads_output_changes(arch, tiny):
    model = wrap(tiny(arch), None, SPEC)
    names = [f"blocks.1.attn.{hook}" for hook in ("hook_q", "hook_k", "hook_v", "hook_z")]
    out = "blocks.1.attn.hook_out"

    def look():
        _, cache = model.bridge.run_with_cache(IDS, names_filter=[*names, out])
        return cache, model.bridge.blocks[1].attn.W_O.clone()

    clean, W_O = look()
    with noisy_heads(model, [(1, 2)], 1.0):
        noisy, W_O_noisy = look()
    others = [0, 1, 3]
    for name in (names[0], names[3]):
        assert torch.equal(clean[name][:, :, others], noisy[name][:, :, others]), name
        assert not torch.equal(clean[name][:, :, 2], noisy[name][:, :, 2]), name
    for name in names[1:3]:  # shared with the other heads of its group
        assert torch.equal(clean[name], noisy[name]), name
    z = names[3]
    own = [
        einsum(c[z][:, :, 2], w[2], "batch pos d_head, d_head d_model -> batch pos d_model")
        for c, w in ((noisy, W_O_noisy), (clean, W_O))
    ]
    torch.testing.assert_close(noisy[out] - clean[out], own[0] - own[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("raises", [False, True])
def test_the_weights_come_back_bit_for_bit(arch, raises, tiny):
    model = wrap(tiny(arch), None, SPEC)
    before = {name: value.clone() for name, value in model.bridge.state_dict().items()}
    try:
        with noisy_heads(model, HEADS, 0.3):
            during = model.bridge.state_dict()
            assert any(not torch.equal(before[name], during[name]) for name in before)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = model.bridge.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_kill_amid_the_edits_brings_them_back_too(tiny, monkeypatch):
    model = wrap(tiny("llama"), None, SPEC)
    before = {name: value.clone() for name, value in model.bridge.state_dict().items()}
    left = [torch.ones(8, 32), torch.ones(32, 8)]  # the third draw raises
    monkeypatch.setattr("lens_utils.perturb._noise", lambda *_: left.pop())
    with pytest.raises(IndexError), noisy_heads(model, HEADS, 0.3):
        pass
    assert not left
    after = model.bridge.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def change(model, heads, layer: int = 1, head: int = 2, **settings) -> list[torch.Tensor]:
    attn = model.bridge.blocks[layer].attn
    clean = [attn.W_Q[head].clone(), attn.W_O[head].clone()]
    with noisy_heads(model, heads, **settings):
        return [new - old for new, old in zip((attn.W_Q[head], attn.W_O[head]), clean, strict=True)]


def close(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ones, others, strict=True))


def test_a_heads_noise_is_its_own(tiny):
    """The same in every set and order of heads, scaled by sigma, another with another seed."""
    model = wrap(tiny("qwen3"), None, SPEC)
    alone = change(model, [(1, 2)], sigma=0.4)
    assert close(alone, change(model, HEADS, sigma=0.4))
    assert close(alone, change(model, HEADS[::-1], sigma=0.4))
    assert close([2 * x for x in alone], change(model, [(1, 2)], sigma=0.8))
    assert not close(alone, change(model, [(1, 2)], sigma=0.4, seed=1))
    other = change(model, HEADS, 1, 3, sigma=0.4)
    assert not close(alone, other)
    assert abs(torch.corrcoef(torch.stack([x.flatten() for x in alone]))[0, 1]) < 0.2
    assert close(change(model, HEADS, sigma=0.0), [torch.zeros(32, 8), torch.zeros(8, 32)])


def test_sigma_is_in_units_of_the_weights(tiny):
    model = wrap(tiny("llama"), None, SPEC)
    attn = model.bridge.blocks[1].attn
    with torch.no_grad():
        attn.W_Q[2].mul_(10)  # now this head's slice is wider than the parameter
        attn.W_O[2].mul_(0.1)
    for relative_to, of in (("parameter", slice(None)), ("head", 2)):
        noise = change(model, HEADS, sigma=0.5, relative_to=relative_to)
        for found, weight in zip(noise, (attn.W_Q, attn.W_O), strict=True):
            expected = 0.5 * weight[of].std().item()
            assert found.std().item() == pytest.approx(expected, rel=0.15)  # 256 numbers
            assert abs(found.mean()) < 0.25 * expected


def test_half_precision_gets_the_same_noise(tiny):
    one = wrap(tiny("gemma3"), None, SPEC)
    half = wrap(tiny("gemma3").to(torch.bfloat16), None, SPEC)
    for full, rounded in zip(
        change(one, HEADS, sigma=0.5), change(half, HEADS, sigma=0.5), strict=True
    ):
        assert torch.allclose(full, rounded.float(), atol=0.02)


def test_only_the_circuit_of_a_hand_built_model_suffers():
    model = induction_model()
    ids = torch.tensor([list(p.clean) for p in pairs.induction(model, 4, length=10)])
    clean = model.bridge(ids)
    with noisy_heads(model, sorted(idle_heads()), 3.0):
        assert torch.equal(model.bridge(ids), clean)  # they read nothing, so they write nothing
    for head in (PREVIOUS_HEAD, INDUCTION_HEAD):
        with noisy_heads(model, [head], 3.0):
            assert not torch.allclose(model.bridge(ids), clean, atol=0.1)


@pytest.mark.parametrize(
    ("heads", "sigma", "says"),
    [
        ([(0, 1)], -0.1, "sigma -0.1"),
        ([(0, 1)], float("nan"), "sigma nan"),
        ([(3, 0)], 0.1, "3 layers of 4 heads"),
        ([(0, 4)], 0.1, "head 4 of layer 0"),
        ([(-1, 0)], 0.1, "layer -1"),
        ([(0, 1), (2, 2), (0, 1)], 0.1, "named 2 times"),
    ],
)
def test_what_cannot_be_is_one_clear_line(heads, sigma, says, tiny):
    model = wrap(tiny("llama"), None, SPEC)
    with pytest.raises(BadInput, match=says), noisy_heads(model, heads, sigma):
        pass


def refuse(self):
    raise NotImplementedError("W_Q is not available on MLA models")


@pytest.mark.parametrize("says", ["copies", "latent attention"])
def test_heads_without_weights_of_their_own_are_refused(says, tiny):
    """An architecture whose accessor copies, and one that TransformerLens gives no W_Q for."""
    model = wrap(tiny("llama"), None, SPEC)
    attn = model.bridge.blocks[0].attn
    kind = type(attn)
    read = refuse if says != "copies" else lambda self: kind.W_Q.fget(self).clone()
    object.__setattr__(attn, "__class__", type("Other", (kind,), {"W_Q": property(read)}))
    with pytest.raises(Failure, match=says), noisy_heads(model, [(0, 1)], 0.5):
        pass
