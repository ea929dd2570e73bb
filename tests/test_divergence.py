"""Ablation against plain Hugging Face models whose heads are taken away one forward at a time."""

import math

import pytest
import torch
from circuits import idle_heads, induction_model
from conftest import ARCHS
from scipy.special import rel_entr

from lens_utils import divergence
from lens_utils.errors import BadInput
from lens_utils.lens import Readout
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

STEPS, HEADS = 5, 4
IDS = torch.tensor([3, 17, 9, 40, 22, 5, 31, 8])
OTHERS = [torch.tensor(ids) for ids in ([7, 7, 50, 2, 11, 33], [1, 60, 44, 13, 28, 6, 19, 4, 12])]


def loaded(tiny, arch, dtype=torch.float32):
    return wrap(tiny(arch).to(dtype), None, ModelSpec(arch, arch))


def projections(hf):
    """The modules behind the heads, layer by layer: their input is z."""
    ends = ("o_proj", "attention.dense", "attn.c_proj")
    return [m for name, m in hf.named_modules() if name.endswith(ends) and "vision" not in name]


def heads_of(hf, ids):
    """z [layer, pos, head, d_head] of a plain model."""
    held = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: held.append(args[0][0]))
        for module in projections(hf)
    ]
    with torch.no_grad():
        hf(ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack([z.unflatten(-1, (HEADS, -1)) for z in held])


def plain(hf, gone, values=None):
    """log p at the steps, with heads taken away in one forward pass of their own."""

    def replace(layer):
        def hook(_, args):
            z = args[0].unflatten(-1, (HEADS, -1)).clone()
            for head in gone[layer].nonzero()[:, 0]:
                z[:, :, head] = 0 if values is None else values[layer][:, head]
            return (z.flatten(-2),)

        return hook

    found = projections(hf)
    assert len(found) == 3
    handles = [m.register_forward_pre_hook(replace(layer)) for layer, m in enumerate(found)]
    with torch.no_grad():
        logits = hf(IDS[None]).logits[0, -STEPS:]
    for handle in handles:
        handle.remove()
    return logits.log_softmax(-1).double()


def kl(hf, gone, values=None):
    none = torch.zeros_like(gone)
    p, q = plain(hf, none).exp().numpy(), plain(hf, gone, values).exp().numpy()
    return torch.from_numpy(rel_entr(p, q).sum(-1)).float()


def some_sets():
    """None, all, one head each, and random ones, in no order; one of them twice."""
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.2, 0.5, 0.8] * 2)[:, None, None]
    random = torch.rand(6, 3, HEADS, generator=generator) < share
    single = torch.eye(3 * HEADS, dtype=torch.bool).unflatten(1, (3, HEADS))
    held = torch.cat([random, torch.ones_like(random[:1]), single, torch.zeros_like(random[:1])])
    return torch.cat([held, held[3:4]])


def measured(model, sets, values=None, tokens=divergence.TOKENS):
    readout = Readout(model.bridge)
    against = divergence.full(model, readout, IDS, STEPS)
    return divergence.divergence(model, readout, against, sets, values, tokens)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_is_a_run_of_its_own(tiny, arch):
    """With all rows in one pass, and with three in each."""
    hf, sets = tiny(arch), some_sets()
    expected = torch.stack([kl(hf, gone) for gone in sets])
    model = loaded(tiny, arch)
    assert expected[:-2].mean() > 0.01, "the heads matter"
    for tokens in (10_000, 3 * len(IDS)):
        found = measured(model, sets, tokens=tokens)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
        none = found[~sets.flatten(1).any(1)]
        assert none.abs().max() < 1e-6
        assert torch.equal(found[3], found[-1])


@pytest.mark.parametrize("arch", ARCHS)
def test_all_heads_away_is_the_model_without_output_weights(tiny, arch):
    """An own route: W_O is zero. Biases stay, they are no head's."""
    hf = tiny(arch)
    with torch.no_grad():
        p = hf(IDS[None]).logits[0, -STEPS:].double().softmax(-1)
        for module in projections(hf):
            module.weight.zero_()
        q = hf(IDS[None]).logits[0, -STEPS:].double().softmax(-1)
    expected = torch.from_numpy(rel_entr(p.numpy(), q.numpy()).sum(-1)).float()
    everything = torch.ones(1, 3, HEADS, dtype=torch.bool)
    found = measured(loaded(tiny, arch), everything)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["mean", "resample"])
@pytest.mark.parametrize("arch", ARCHS)
def test_what_heads_are_replaced_by(tiny, arch, kind):
    """The mean over the last steps of all texts, or another text's output at the same place."""
    hf, model, sets = tiny(arch), loaded(tiny, arch), some_sets()[:9]
    held = [heads_of(hf, ids) for ids in OTHERS]
    if kind == "mean":
        pool = torch.cat([z[:, -STEPS:] for z in held], dim=1)
        values = torch.stack([pool[:, i] for i in range(2 * STEPS)]).mean(0)[:, None]
    else:  # 6 tokens stretched to 8
        values = torch.stack([held[0][:, at] for at in (0, 1, 1, 2, 3, 4, 4, 5)], dim=1)
    values = values.expand(-1, len(IDS), -1, -1)
    expected = torch.stack([kl(hf, gone, values) for gone in sets])
    texts = [divergence.outputs(model, ids) for ids in OTHERS]
    given = divergence.replacement(kind, texts, len(IDS), STEPS)
    found = measured(model, sets, given)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    assert (found - measured(model, sets)).abs().max() > 1e-3, "not the same as zero"


def test_zero_needs_no_values():
    assert divergence.replacement("zero", [], 8, 5) is None


def test_what_rows_share_is_computed_once(tiny):
    """Every layer sees as many rows as there are different sets up to it, in one pass."""
    model, sets = loaded(tiny, "llama"), some_sets()[:-1]
    readout = Readout(model.bridge)
    against = divergence.full(model, readout, IDS, STEPS)

    def rows_in_layers(sets):
        seen = [0, 0, 0]
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, layer=layer: seen.__setitem__(layer, seen[layer] + len(args[0]))
            )
            for layer, module in enumerate(projections(model.bridge.original_model))
        ]
        divergence.divergence(model, readout, against, sets)
        for handle in handles:
            handle.remove()
        return seen

    different = [len({tuple(s[: n + 1].flatten().tolist()) for s in sets}) for n in range(3)]
    assert rows_in_layers(sets) == different and different[0] < different[1] < different[2]
    last = torch.zeros(4, 3, HEADS, dtype=torch.bool)
    last[:, 2] = torch.eye(HEADS, dtype=torch.bool)
    assert rows_in_layers(last) == [0, 0, 4], "nothing below the lowest head"
    assert rows_in_layers(last.roll(1, dims=1)) == [4, 4, 4]


def test_the_model_is_as_before(tiny):
    model = loaded(tiny, "gemma3")
    before = model.bridge(IDS[None])
    measured(model, some_sets())
    assert torch.equal(model.bridge(IDS[None]), before)


def test_a_known_circuit():
    """Idle heads cost nothing, alone or together; the two that matter cost nearly everything."""
    model = induction_model()
    ids = torch.tensor([0, 5, 9, 3, 7, 5, 9, 3])
    readout = Readout(model.bridge)
    against = divergence.full(model, readout, ids, 3)  # each has come before
    order = [layer * 3 + head for layer, head in idle_heads()]
    sets = torch.cat(
        [
            divergence.sets(order, range(5), 2, 3),
            divergence.sets([1], [1], 2, 3),
            divergence.sets([5], [1], 2, 3),
        ]
    )
    found = divergence.divergence(model, readout, against, sets)
    assert found[:5].abs().max() < 1e-6
    torch.testing.assert_close(found[6], torch.full((3,), math.log(16)), atol=0.02, rtol=0)
    assert found[5].min() > 1


def test_kl_is_the_textbooks():
    """Also of bfloat16 logits, and of one that is far from likely."""
    generator = torch.Generator().manual_seed(0)
    one, other = 4 * torch.randn(2, 6, 11, generator=generator)
    other[0, 3] = -80
    p, q = (x.double().softmax(-1).numpy() for x in (one, other))
    expected = torch.from_numpy(rel_entr(p, q).sum(-1)).float()
    torch.testing.assert_close(divergence.kl(one.log_softmax(-1), other), expected)
    torch.testing.assert_close(
        divergence.kl(one.log_softmax(-1), other), torch.nn.functional.kl_div(
            other.log_softmax(-1), one.softmax(-1), reduction="none").sum(-1)
    )  # fmt: skip
    half = other.bfloat16()
    found = divergence.kl(one.log_softmax(-1), half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, divergence.kl(one.log_softmax(-1), half.float()))


def test_a_bfloat16_model(tiny):
    """Measured in float32; nothing taken away is no difference, everything is about the same."""
    model, sets = loaded(tiny, "llama", torch.bfloat16), some_sets()
    found, exact = measured(model, sets), measured(loaded(tiny, "llama"), sets)
    assert found.dtype == torch.float32
    assert found[~sets.flatten(1).any(1)].abs().max() < 1e-6
    torch.testing.assert_close(found.mean(1), exact.mean(1), atol=0.05, rtol=0.1)


def test_sets_are_nested():
    found = divergence.sets([5, 0, 3], [0, 1, 3, 2], 2, 3)
    assert [set(s.flatten().nonzero()[:, 0].tolist()) for s in found] == [
        set(), {5}, {5, 0, 3}, {5, 0},
    ]  # fmt: skip
    assert found[1, 1, 2], "head 5 of three a layer is L1H2"


def test_a_share_is_a_number_of_heads():
    assert [divergence.count(share, 72) for share in (0.001, 0.05, 0.25, 1.0)] == [1, 4, 18, 72]


def test_bad_input_is_one_line(tiny):
    model = loaded(tiny, "llama")
    readout = Readout(model.bridge)
    against = divergence.full(model, readout, IDS, STEPS)
    one = torch.zeros(1, 2, HEADS, dtype=torch.bool)
    wrong = [
        (lambda: divergence.count(0.0, 72), "share of 0 of the heads"),
        (lambda: divergence.count(1.2, 72), "share of 1.2 of the heads"),
        (lambda: divergence.count(float("nan"), 72), "share of nan"),
        (lambda: divergence.sets([0, 0], [1], 2, 3), "at most once"),
        (lambda: divergence.sets([6], [1], 2, 3), "below 6"),
        (lambda: divergence.sets([0, 1], [3], 2, 3), "3 heads of an order of 2"),
        (lambda: divergence.full(model, readout, IDS, 9), "9 steps of a text of 8 tokens"),
        (lambda: divergence.divergence(model, readout, against, one), "2 layers of 4 heads; llama"),
        (lambda: divergence.replacement("mean", [], 8, 5), "another text"),
    ]
    for call, said in wrong:
        with pytest.raises(BadInput, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
