"""Fine-tuning of a set against dense autograd through plain Hugging Face hooks."""

from dataclasses import replace

import pytest
import torch
from conftest import ARCHS
from small_transcoders import random_transcoders
from torch.testing import assert_close

from lens_utils.errors import BadInput, Failure
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec
from lens_utils.replacement import fidelity
from lens_utils.sparse import Transcoder, scatter, unit_rows
from lens_utils.sparse_tuning import Tunable, Tuner, Tuning, divergence

RECIPE = Tuning(steps=12, lr=1e-2)
IDS = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(3))


def model_of(tiny, arch="llama", dtype=torch.float32):
    return wrap(tiny(arch).to(dtype), None, ModelSpec(arch, arch))


def unit_set(model, skip=False):
    """Random transcoders whose decoder rows have norm 1, as the lab's own."""
    found = random_transcoders(model, skip)
    for t in found.values():
        t.W_dec.copy_(unit_rows(t.W_dec))
    return found


def dense_kl(hf, transcoders, ids, sinks, k=5):
    """KL of each token with MLPs replaced by torch hooks and dense activations."""
    with torch.no_grad():
        clean = hf(ids).logits.log_softmax(-1)
    mlps = [m for name, m in hf.named_modules() if name.endswith(".mlp") and "vision" not in name]

    def hook(p):
        def write(mlp, args, y):
            x = args[0]
            pre = torch.relu(x @ p["W_enc"].T + p["b_enc"])
            kept = torch.zeros_like(pre).scatter(-1, pre.topk(k).indices, 1.0)
            made = (pre * kept) @ p["W_dec"] + p["b_dec"]
            made = made + x @ p["W_skip"].T if "W_skip" in p else made
            return torch.cat([y[:, :sinks], made[:, sinks:]], dim=1)

        return write

    handles = [mlps[layer].register_forward_hook(hook(p)) for layer, p in transcoders.items()]
    found = hf(ids).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    return (clean.exp() * (clean - found)).sum(-1)[:, sinks:].flatten()


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_equal_dense_autograd(tiny, arch):
    model = model_of(tiny, arch, torch.float64)
    skip, sinks = arch in ("llama", "gemma3"), 2 if arch == "gpt2" else 1
    plain = random_transcoders(model, skip)
    expected = {
        layer: {n: p.detach().clone().requires_grad_() for n, p in t.named_parameters()}
        for layer, t in plain.items()
    }
    kl = dense_kl(tiny(arch).double(), expected, IDS, sinks)
    kl.mean().backward()
    ours = {layer: Tunable(t).requires_grad_() for layer, t in plain.items()}
    found = divergence(model, ours, IDS, sinks=sinks)
    assert_close(found, kl, rtol=0, atol=2e-5)  # norms are in float32 inside some models
    found.mean().backward()
    for layer, t in ours.items():
        assert t.tuned().keys() == expected[layer].keys()
        for name, p in t.tuned().items():
            reference = expected[layer][name].grad
            assert reference.norm() > 0, "nothing to compare"
            assert (p.grad - reference).norm() / reference.norm() < 1e-4, (layer, name)


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
def test_a_tunable_transcoder_is_the_transcoder(tiny, kind):
    """Values, and gradients in its input, by autograd through the transcoder itself."""
    t = random_transcoders(model_of(tiny))[0]
    k, threshold = (5, None) if kind == "topk" else (None, torch.full((40,), 0.4))
    t = Transcoder(t.W_enc, t.b_enc, t.W_dec, t.b_dec, None, k,
                   threshold if kind == "jumprelu" else None)  # fmt: skip
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    slopes = []
    for one in (t, Tunable(t)):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        assert_close(y, t(x))
        y.square().sum().backward()
        slopes.append(leaf.grad)
    assert_close(slopes[0], slopes[1])


def test_tuning_brings_the_models_together(tiny):
    model = model_of(tiny)
    before = unit_set(model)
    tuner = Tuner(model, RECIPE, before)
    curve = [tuner.step(IDS) for _ in range(12)]
    held = fidelity(model, tuner.transcoders(), IDS).kl.mean()
    assert curve[0] == pytest.approx(float(divergence(model, before, IDS).mean()), rel=1e-5)
    assert curve[-1] < 0.5 * curve[0] and held < 0.5 * fidelity(model, before, IDS).kl.mean()
    for layer, t in tuner.transcoders().items():
        assert_close(t.W_dec.norm(dim=1), torch.ones(len(t.W_dec)))
        for name, p in before[layer].named_parameters():
            assert not torch.equal(p, getattr(t, name)), name
    assert not any(p.requires_grad for p in model.bridge.parameters())


def test_decoder_rows_of_others_keep_their_norms(tiny):
    model = model_of(tiny)
    plain = random_transcoders(model, skip=True)
    tuner = Tuner(model, RECIPE, plain)
    tuner.step(IDS)
    tuner.step(IDS)
    for layer, t in tuner.transcoders().items():
        assert_close(t.W_dec.norm(dim=1), plain[layer].W_dec.norm(dim=1))
        assert not torch.equal(t.W_skip, plain[layer].W_skip)


def test_a_first_step_is_the_rate_in_units_of_the_layers_activations(tiny):
    """Adam's first step is the rate, whatever the gradient; units by plain hooks."""
    model, seen = model_of(tiny), {}
    hf = tiny("llama")
    for layer, block in enumerate(hf.model.layers):
        block.mlp.register_forward_hook(
            lambda mlp, args, y, layer=layer: seen.update({layer: (args[0], y)})
        )
    with torch.no_grad():
        hf(IDS)
    plain = unit_set(model, skip=True)
    tuner = Tuner(model, RECIPE, plain)
    tuner.step(IDS)
    for layer, t in tuner.transcoders().items():
        x, y = (part[:, 1:].flatten(0, 1) for part in seen[layer])
        x_rms, y_rms = ((part - part.mean(0)).square().mean().sqrt() for part in (x, y))
        for name, unit in {"b_dec": y_rms, "W_skip": y_rms / x_rms, "W_enc": y_rms / x_rms}.items():
            moved = (getattr(t, name) - getattr(plain[layer], name)).abs().max()
            assert_close(moved, unit * RECIPE.rate(0), rtol=1e-2, atol=0)


def test_padding_does_not_count(tiny):
    model = model_of(tiny)
    plain = random_transcoders(model)
    apart = torch.cat([divergence(model, plain, IDS[i : i + 1, :n]) for i, n in ((0, 12), (1, 7))])
    real = torch.arange(12) < torch.tensor([[12], [7]])
    assert_close(divergence(model, plain, IDS[:2], real), apart, atol=1e-5, rtol=1e-4)
    one, other = (Tuner(model, RECIPE, plain) for _ in range(2))
    junk = IDS[:2].clone()
    junk[1, 7:] = 5
    assert one.step(IDS[:2], real) == pytest.approx(other.step(junk, real), rel=1e-5)
    with pytest.raises(BadInput, match="no token behind the first 1"):
        one.step(IDS[:, :1])


def test_a_batch_in_parts_is_the_batch(tiny, monkeypatch):
    model = model_of(tiny)
    whole, parts = (Tuner(model, RECIPE, unit_set(model)) for _ in range(2))
    real = torch.arange(12) < torch.tensor([[12], [1], [7]])  # one row with nothing that counts
    first = whole.step(IDS, real)
    monkeypatch.setattr("lens_utils.sparse_tuning.HELD", 1)
    assert parts.step(IDS, real) == pytest.approx(first, rel=1e-5)
    for name, (moment, _) in whole.moments.items():
        assert_close(moment, parts.moments[name][0], rtol=1e-3, atol=1e-8)


def test_a_resumed_tuning_gives_the_same_weights_bit_for_bit(tiny, tmp_path):
    model = model_of(tiny)
    whole, killed = (Tuner(model, RECIPE, unit_set(model, skip=True)) for _ in range(2))
    losses = [whole.step(IDS.roll(n, 1)) for n in range(4)]
    for n in range(2):
        killed.step(IDS.roll(n, 1))
    killed.save(tmp_path / "set")
    killed.step(IDS)  # lost
    again = Tuner(model, RECIPE, unit_set(model, skip=True))
    again.resume(tmp_path / "set")
    assert again.taken == 2
    assert [again.step(IDS.roll(n, 1)) for n in range(2, 4)] == losses[2:]
    for layer, t in whole.transcoders().items():
        for name, p in t.named_parameters():
            assert torch.equal(p, getattr(again.transcoders()[layer], name)), (layer, name)


def test_a_loss_or_gradient_that_is_no_number_leaves_the_last_good_state(tiny, monkeypatch):
    model = model_of(tiny)
    tuner = Tuner(model, RECIPE, unit_set(model))
    tuner.step(IDS)
    before = {n: p.clone() for n, p in tuner._parameters()}
    for name in ("scatter", "divergence"):
        broken = {"scatter": lambda *a: scatter(*a) * float("nan"),  # a gradient only
                  "divergence": lambda *a: torch.full((3,), float("nan"))}[name]  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(f"lens_utils.sparse_tuning.{name}", broken)
            with pytest.raises(Failure, match="of fine-tuning step 1 is nan") as error:
                tuner.step(IDS)
        assert "\n" not in str(error.value)
    assert tuner.taken == 1
    assert all(torch.equal(p, before[n]) for n, p in tuner._parameters())
    assert not any(p.requires_grad or p.grad is not None for _, p in tuner._parameters())


def test_other_sets_recipes_and_damaged_files_are_refused(tiny, tmp_path):
    model, path = model_of(tiny), tmp_path / "set"
    plain = unit_set(model)
    tuner = Tuner(model, RECIPE, plain)
    with pytest.raises(BadInput, match="no fine-tuning to go on with"):
        tuner.resume(path)
    tuner.step(IDS)
    tuner.save(path)
    with pytest.raises(BadInput, match="another lr"):
        Tuner(model, replace(RECIPE, lr=1.0), plain).resume(path)
    with pytest.raises(BadInput, match="another set"):
        Tuner(model, RECIPE, {0: plain[0]}).resume(path)
    with pytest.raises(BadInput, match="belongs to another model"):
        Tuner(model, RECIPE, {0: Transcoder(torch.ones(4, 3), torch.ones(4), torch.ones(4, 3),
                                            torch.ones(3), None, 2)})  # fmt: skip
    path.with_suffix(".safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(BadInput, match="no fine-tuning to go on with"):
        tuner.resume(path)
