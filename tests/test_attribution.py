"""Attribution: exact sums, known circuits, and TransformerLens where it is right."""

import dataclasses

import pytest
import torch
from circuits import INDUCTION_HEAD, idle_heads, induction_model
from conftest import ARCHS
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

from lens_utils import attribution, cache, head_reading, pairs
from lens_utils.errors import BadInput
from lens_utils.lens import Readout
from lens_utils.models import wrap
from lens_utils.pairs import Pair
from lens_utils.registry import ModelSpec

COMPONENTS = ("embed", "heads", "attn_bias", "mlp", "constant")
FOLDS_INTO_BIAS = ("qwen2", "neox-parallel", "neox-sequential", "gpt2")  # biases of values, of ln1


@pytest.fixture(scope="module")
def built(tiny, tokenizer):
    """built(arch, fold): a model and a batch of pairs for it."""
    held = {}

    def build(arch, fold=False):
        if (arch, fold) not in held:
            model = wrap(tiny(arch), tokenizer, ModelSpec("tiny", "tiny"), fold=fold)
            held[arch, fold] = model, pairs.batch(model, random_pairs())
        return held[arch, fold]

    return build


def random_pairs(n=3, length=7):
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(n):
        *ids, answer, foil = torch.randperm(55, generator=generator)[: 2 * length + 2].tolist()
        clean, corrupt = tuple(ids[:length]), tuple(ids[length:])
        classes = ("function",) * length
        made.append(Pair(f"p{i}", "t", "w", f"g{i}", clean, corrupt, answer, foil, classes))
    return made


@pytest.fixture(scope="module")
def toy():
    """The hand-built induction model, eight pairs, and their attribution."""
    model = induction_model()
    batch = pairs.batch(model, pairs.induction(model, 8, length=10))
    return model, batch, attribution.attribute(model, batch)


# Exactness


@pytest.mark.parametrize("fold", [False, True], ids=["raw", "folded"])
@pytest.mark.parametrize("arch", ARCHS)
def test_everything_sums_to_the_models_own_logit_difference(built, arch, fold):
    model, batch = built(arch, fold)
    found = attribution.attribute(model, batch)
    logits = model.bridge(batch.clean)[:, -1]
    each = torch.arange(len(logits))
    own = logits[each, batch.answer] - logits[each, batch.foil]
    torch.testing.assert_close(found.capped, own, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.total, found.logit_diff, atol=1e-4, rtol=0)
    last = cache.record(model, batch.clean, ["blocks.2.hook_resid_post"])
    read = Readout(model.bridge).logit_diff(
        last["blocks.2.hook_resid_post"][:, -1], batch.answer, batch.foil
    )
    torch.testing.assert_close(found.total, read, atol=1e-4, rtol=0)
    assert own.abs().min() > 0.01, "nothing is proved by sums of nothing"
    if arch == "gemma2":
        assert (found.logit_diff - found.capped).abs().max() > 0.01
    else:
        assert torch.equal(found.logit_diff, found.capped)


@pytest.mark.parametrize("arch", ARCHS)
def test_parts_sum_to_their_whole(built, arch):
    """Positions to heads, heads and bias to attention, neurons and bias to the MLP."""
    model, batch = built(arch)
    found = attribution.attribute(model, batch)
    assert found.heads.abs().max() > 0.05
    torch.testing.assert_close(found.sources.sum(-1), found.heads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.attention.sum(-1), torch.ones_like(found.heads))
    for layer, (values, bias) in attribution.neurons(model, batch, range(3)).items():
        torch.testing.assert_close(values.sum(-1) + bias, found.mlp[:, layer], atol=1e-4, rtol=0)
        whole = found.heads[:, layer].sum(-1) + found.attn_bias[:, layer]
        torch.testing.assert_close(found.part(f"L{layer} attn"), whole)


@pytest.mark.parametrize("arch", ARCHS)
def test_each_component_is_what_ln_final_makes_of_what_it_wrote(built, arch):
    """The slow way, through the module itself: with the scale held, ln_final is linear.

    ln_final(h) - ln_final(h - c), both at the scale of h, is the contribution of c.
    """
    model, batch = built(arch)
    found = attribution.attribute(model, batch)
    names = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre"]
    names += [f"blocks.{n}.hook_{kind}_out" for n in range(3) for kind in ("attn", "mlp")]
    held = {k: v[:, -1] for k, v in cache.record(model, batch.clean, names).items()}
    readout = Readout(model.bridge)
    h = held["blocks.2.hook_resid_post"]
    direction = (model.bridge.W_U[:, batch.answer] - model.bridge.W_U[:, batch.foil]).T

    def contribution(c):
        # ln_final rescales what it is given; undone, because the scale is to be that of h.
        without = readout.normed(h - c) * readout.scale(h - c) / readout.scale(h)
        offset = readout.normed(torch.zeros_like(h))
        without = without + offset * (1 - readout.scale(h - c) / readout.scale(h))
        return ((readout.normed(h) - without) * direction).sum(-1)

    expected = contribution(held["blocks.0.hook_resid_pre"])
    torch.testing.assert_close(found.embed, expected, atol=1e-4, rtol=0)
    for n in range(3):
        for kind, got in (("attn", found.attn[:, n]), ("mlp", found.mlp[:, n])):
            expected = contribution(held[f"blocks.{n}.hook_{kind}_out"])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_folding_changes_no_number_that_it_should_not(built, arch):
    raw, folded = (attribution.attribute(*built(arch, fold)) for fold in (False, True))
    torch.testing.assert_close(raw.logit_diff, folded.logit_diff, atol=1e-4, rtol=0)
    torch.testing.assert_close(raw.mlp, folded.mlp, atol=1e-4, rtol=0)
    torch.testing.assert_close(raw.embed, folded.embed, atol=1e-4, rtol=0)
    torch.testing.assert_close(raw.attn, folded.attn, atol=1e-4, rtol=0)
    if arch in FOLDS_INTO_BIAS:  # the heads lose what their values' biases gave, attn_bias gains it
        assert (raw.heads - folded.heads).abs().max() > 0.01
    else:
        torch.testing.assert_close(raw.heads, folded.heads, atol=1e-4, rtol=0)
        torch.testing.assert_close(raw.sources, folded.sources, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "neox-sequential"])
def test_against_transformer_lens_on_folded_weights(built, arch):
    """Its own attribution refuses raw weights, and does not know of sandwich norms per head."""
    model, batch = built(arch, True)
    found = attribution.attribute(model, batch)
    theirs = direct_logit_attribution(
        model.bridge, batch.clean, batch.answer, batch.foil, unit="component"
    )
    named = dict(zip(theirs.labels, theirs.attribution, strict=True))
    for layer in range(3):
        for kind in ("attn", "mlp"):
            torch.testing.assert_close(
                found.part(f"L{layer} {kind}"), named[f"{layer}_{kind}_out"], atol=1e-4, rtol=0
            )
    if arch == "gemma3":
        return
    theirs = direct_logit_attribution(
        model.bridge, batch.clean, batch.answer, batch.foil, unit="head"
    )
    named = dict(zip(theirs.labels, theirs.attribution, strict=True))
    for layer in range(3):
        for head in range(4):
            torch.testing.assert_close(
                found.part(f"L{layer}H{head}"), named[f"L{layer}H{head}"], atol=1e-4, rtol=0
            )


def test_gains_are_what_norms_do(built):
    """Gemma stores w of a gain of 1 + w, Llama the gain; LayerNorm has a bias, and centres."""
    for arch, expected in (("llama", 0), ("gemma3", 1), ("neox-sequential", 0)):
        model, batch = built(arch)
        like = torch.zeros(1, 32)
        found = attribution.Norm(model.bridge.ln_final, like)
        stored = model.bridge.ln_final.original_component
        torch.testing.assert_close(found.gain, stored.weight + expected, atol=1e-4, rtol=0)
        bias = getattr(stored, "bias", None)
        torch.testing.assert_close(
            found.bias, torch.zeros(32) if bias is None else bias, atol=1e-4, rtol=0
        )
        assert found.centred == (arch == "neox-sequential")


def test_centring_matters_for_layer_norm(built, monkeypatch):
    model, batch = built("gpt2")
    right = attribution.attribute(model, batch)
    monkeypatch.setattr(attribution.Norm, "_centre", lambda self, x: x)
    wrong = attribution.attribute(model, batch)
    assert (wrong.total - wrong.logit_diff).abs().max() > 0.01
    assert (right.total - right.logit_diff).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_bfloat16_within_its_precision(tiny, tokenizer, built, arch):
    """Sums are float32; what is summed was rounded by the model: to 5 % of what was added up."""
    model = wrap(tiny(arch).bfloat16(), tokenizer, ModelSpec("tiny", "tiny"))
    found = attribution.attribute(model, built(arch)[1])
    size = found.heads.abs().sum((1, 2)) + found.mlp.abs().sum(1) + found.embed.abs()
    assert ((found.total - found.logit_diff).abs() < 0.05 * size).all()
    exact = attribution.attribute(*built(arch))
    assert torch.corrcoef(torch.stack([found.heads.flatten(), exact.heads.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("arch", ARCHS)
def test_pairs_do_not_see_each_other(built, arch):
    model, batch = built(arch)
    together = attribution.attribute(model, batch)
    for i, pair in enumerate(batch.pairs):
        alone = attribution.attribute(model, pairs.batch(model, [pair]))
        for name in (*COMPONENTS, "sources", "logit_diff"):
            one, many = getattr(alone, name)[0], getattr(together, name)[i]
            torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)


def test_the_real_model(smol):
    """GQA of three query heads per kv_head, two rogue dimensions with negative gains."""
    text = "The capital of {} is the city of"
    ids = [tuple(smol.encode(text.format(c))) for c in ("France", "Germany")]
    paris, berlin = (smol.encode(c, bos=False)[0] for c in (" Paris", " Berlin"))
    classes = ("function",) * len(ids[0])
    batch = pairs.batch(smol, [Pair("a", "t", "w", "g", *ids, paris, berlin, classes)])
    found = attribution.attribute(smol, batch)
    assert found.logit_diff.item() > 5
    assert (found.total - found.logit_diff).abs().item() < 1e-4 * 10
    torch.testing.assert_close(found.sources.sum(-1), found.heads, atol=1e-4, rtol=1e-3)
    back = attribution.attribute(smol, batch.swapped())
    assert back.logit_diff.item() > 5 and back.part("L23H4").item() > 0


# The hand-built circuit


def test_only_the_induction_head_is_attributed_anything(toy):
    _, batch, found = toy
    layer, head = INDUCTION_HEAD
    torch.testing.assert_close(found.heads[:, layer, head], torch.full((8,), 10.0))
    others = found.heads.clone()
    others[:, layer, head] = 0
    for value in (others, found.mlp, found.embed, found.constant, found.attn_bias):
        assert value.abs().max() < 1e-5
    for pair, source in zip(batch.pairs, found.sources[:, layer, head], strict=True):
        entity = pair.classes.index("entity")
        assert source[entity] == pytest.approx(10, abs=1e-4)
        assert source.abs().sum() == pytest.approx(10, abs=1e-4)
    assert found.mlp_share.eq(0).all()


def test_another_direction_is_another_question(toy):
    """The control of the experiment: another pair's answer and foil, at the same prompt."""
    model, batch, found = toy
    rolled = dataclasses.replace(batch, answer=batch.answer.roll(1), foil=batch.foil.roll(1))
    shuffled = attribution.attribute(model, rolled)
    assert shuffled.logit_diff.mean() < 0.5 * found.logit_diff.mean()
    torch.testing.assert_close(shuffled.total, shuffled.logit_diff)


def test_the_induction_head_copies_every_token_and_idle_heads_none(toy):
    model, _, _ = toy
    words = torch.arange(1, 16)
    for layer in (0, 1):
        x = head_reading.effective_embedding(model, words)
        said = head_reading.spoken(model, layer, head_reading.values(model, layer, x), words)
        own = said.diagonal(dim1=0, dim2=2).T  # token, head
        ranks = 1 + (said > own[:, :, None]).sum(-1)
        sole = (said == own[:, :, None]).sum(-1) == 1
        for head in range(3):
            copies = bool(((ranks == 1) & sole)[:, head].all())
            assert copies == ((layer, head) == INDUCTION_HEAD)
            if (layer, head) in idle_heads():
                assert not said[:, head].any()


# Reading heads


@pytest.mark.parametrize("arch", ARCHS)
def test_values_and_keys_are_the_models_own(built, arch):
    model, batch = built(arch)
    names = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_v", "blocks.1.attn.hook_k"]
    resid, v, k = (x[:, 2] for x in cache.record(model, batch.clean, names).values())
    torch.testing.assert_close(head_reading.values(model, 1, resid), v, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head_reading.keys(model, 1, resid), k, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["gemma3", "neox-parallel", "gpt2"])
def test_an_effective_embedding_is_the_stream_behind_block_0(built, arch):
    """Of the bare token behind BOS, whatever else is asked for."""
    model, _ = built(arch)
    found = head_reading.effective_embedding(model, torch.tensor([7, 9, 11]))
    assert model.bos == (1,)
    expected = model.bridge(torch.tensor([[1, 9]]), stop_at_layer=1)[0, -1]
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_heads_say_orders_words_as_their_contributions_do(built, arch):
    """A head's contribution from one position to answer - foil, for every word as the answer."""
    model, batch = built(arch)
    held = cache.record(model, batch.clean, ["blocks.2.attn.hook_v"])["blocks.2.attn.hook_v"]
    words = torch.arange(3, 40)
    said = head_reading.spoken(model, 2, held[:1, 3], words)[0]
    asked = [dataclasses.replace(batch.pairs[0], answer=w, foil=50) for w in words.tolist()]
    sources = attribution.attribute(model, pairs.batch(model, asked)).sources
    weighted = sources[:, 2, :, 3].T  # head, word: times attention, less the foil's part
    for head in range(4):
        together = torch.corrcoef(torch.stack([said[head], weighted[head]]))[0, 1]
        if arch == "mistral" or arch.startswith("gemma"):  # a window of four ends before position 3
            assert weighted[head].std() < 1e-6 or together > 0.9999
        else:
            assert together > 0.9999


@pytest.mark.parametrize("arch", ARCHS)
def test_key_scores_are_those_of_a_real_forward(built, arch):
    """With its own query, a prompt's own scores; with another's, the slot's key is still found."""
    model, batch = built(arch)
    layers = (1, 2)
    names = [f"blocks.{n}.attn.hook_{k}" for n in layers for k in ("q", "k", "attn_scores")]
    held = cache.record(model, batch.clean, names)
    queries = {n: held[f"blocks.{n}.attn.hook_q"][:, -1] for n in layers}
    scores = head_reading.key_scores(model, batch.clean, queries, at=4)
    changed = batch.clean.clone()
    changed[:, 5:] = 3  # other words behind the slot: another last token, which is not asked
    elsewhere = head_reading.key_scores(model, changed, queries, at=4)
    given = {n: held[f"blocks.{n}.attn.hook_k"][:, 4] for n in layers}
    other = batch.clean.clone()
    other[:, 4] = 3
    patched = head_reading.key_scores(model, other, queries, at=4, keys=given)
    unlike = head_reading.key_scores(model, other, queries, at=4)
    for n in layers:
        own = held[f"blocks.{n}.attn.hook_attn_scores"][:, :, -1, 4]
        for found in (scores, elsewhere, patched):
            torch.testing.assert_close(found[n], own, atol=1e-4, rtol=1e-4)
        assert (unlike[n] - own).abs().max() > 1e-3


# Refusals


def test_refusals(built, toy):
    model, batch = built("llama")
    same = dataclasses.replace(batch, foil=batch.answer)
    for work in (
        lambda b: attribution.attribute(model, b),
        lambda b: attribution.neurons(model, b, [0]),
    ):
        with pytest.raises(BadInput, match="p0: answer and foil are the same token"):
            work(same)
    for layer in (3, -1):
        with pytest.raises(BadInput, match=f"no MLP in layer {layer}: its layers are 0 to 2"):
            attribution.neurons(model, batch, [layer])
        with pytest.raises(BadInput, match=f"no layer {layer}"):
            head_reading.values(model, layer, torch.zeros(1, 32))
        with pytest.raises(BadInput, match=f"no layer {layer}"):
            head_reading.spoken(model, layer, torch.zeros(1, 2, 8), torch.tensor([1]))
    with pytest.raises(BadInput, match="no MLP in layer 0"):
        attribution.neurons(toy[0], toy[1], [0])
    found = attribution.attribute(model, batch)
    for unknown in ("L3H0", "L0H4", "mlp", "L0H-1"):
        with pytest.raises(BadInput, match="no component"):
            found.part(unknown)
    for at in (-1, 6, 7, -8):
        with pytest.raises(BadInput, match=f"position {at} is not before the last of 7"):
            head_reading.key_scores(model, batch.clean, {}, at)
