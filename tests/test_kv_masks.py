"""K/V masks against plain hooks on Hugging Face models, expanded heads, NumPy and torch."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import ARCHS
from kv_models import examples, hook_plain, masked, mix, native, of, random_mask

from lens_utils import kv_masks
from lens_utils.errors import BadInput
from lens_utils.kv_masks import Fill, fidelity, moments, record_kv, resampled
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

DATA = examples(short=3)
EVERY = (*ARCHS, "native")


@pytest.fixture(scope="module")
def loaded(tiny):
    held = {}

    def load(arch):
        if arch not in held:
            held[arch] = native() if arch == "native" else of(tiny, arch)
        return held[arch]

    return load


def under(masked, gates, names=(), ids=DATA.ids):
    """Activations under a mask, as what comes after our hooks finds them."""
    found = {}

    def keep(x, hook, name):
        found[name] = x.clone()

    hooks = [(name, lambda x, hook, n=name: keep(x, hook, n)) for name in names]
    masked.model.bridge.run_with_hooks(ids, fwd_hooks=[*masked.hooks(gates), *hooks])
    return found


# The ends: everything, nothing


@pytest.mark.parametrize("arch", EVERY)
def test_a_mask_of_ones_is_the_model_exactly(arch, loaded):
    for resolution in ("kv", "query", "head"):
        for fill in ("mean", "zero"):
            on = masked(loaded(arch), DATA, fill, resolution=resolution)
            ones = torch.ones(on.units.total)
            own = on.resid(DATA.ids)
            assert torch.equal(on.resid(DATA.ids, ones), own), (resolution, fill)
            assert not torch.equal(on.resid(DATA.ids, 0 * ones), own)
    on = masked(loaded(arch), DATA, basis=True)
    torch.testing.assert_close(on.resid(DATA.ids, ones := torch.ones(on.units.total)), own)
    swapped = on.with_fill(resampled(on.model, DATA))
    assert torch.equal(dataclasses.replace(swapped, basis=None).resid(DATA.ids, ones), own)
    logits = loaded(arch).bridge(DATA.ids).float()
    torch.testing.assert_close(on.readout.read(own), logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", EVERY)
def test_without_v_attention_says_the_same_everywhere(arch, loaded):
    """Its output is a constant, whatever the pattern; with K alone off it is not."""
    on = masked(loaded(arch), DATA)
    names = [f"blocks.{i}.attn.hook_out" for i in range(on.model.n_layers)]
    parts = on.units.table().part
    for part, constant in (("V", True), ("K", False)):
        found = under(on, torch.tensor((parts != part).to_numpy()).float(), names)
        for out in found.values():
            assert out.abs().max() > 1e-2
            apart = out.flatten(0, 1).max(0).values - out.flatten(0, 1).min(0).values
            assert (apart.max() < 1e-4) == constant
    raw = masked(loaded(arch), DATA, basis=True)  # all axes off is all channels off
    torch.testing.assert_close(
        raw.resid(DATA.ids, torch.zeros(raw.units.total)),
        on.resid(DATA.ids, torch.zeros(on.units.total)), atol=1e-4, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_a_mask_is_plain_hooks_on_hugging_face(arch, loaded, tiny):
    """Any mask, and nothing at all with the patterns that this leaves."""
    on, plain = masked(loaded(arch), DATA), tiny(arch)
    plain.set_attn_implementation("eager")
    gates = {"now": random_mask(on)}

    def edit(x, n, part):
        places = on.units.spread(gates["now"])
        return mix(on.fill[part], places[part])(x, n)

    hook_plain(plain, arch, lambda x, n: edit(x, n, 0), lambda x, n: edit(x, n, 1))
    before = tiny(arch)(DATA.ids).logits
    patterns = [f"blocks.{i}.attn.hook_pattern" for i in range(3)]
    for mask in (random_mask(on), torch.zeros(on.units.total)):
        gates["now"] = mask
        with torch.no_grad():
            out = plain(DATA.ids, output_attentions=True)
        assert (out.logits - before).abs().max() > 0.1
        own = on.readout.read(on.resid(DATA.ids, mask))
        torch.testing.assert_close(own, out.logits, atol=3e-5, rtol=1e-5)
        for own, theirs in zip(under(on, mask, patterns).values(), out.attentions, strict=True):
            torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)


# Rotation


def rotated(on, gates):
    """The same gates on keys that are rotated already, filled with 0."""
    k, v = on.units.spread(gates)
    hooks = []
    for layer in range(on.model.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_rot_k", lambda x, hook, n=layer: x * k[n]))
        hooks.append((f"blocks.{layer}.attn.hook_v", lambda x, hook, n=layer: x * v[n]))
    return hooks


def logits(on, hooks, shift=0):
    positions = torch.arange(DATA.ids.shape[1])[None].expand(len(DATA), -1) + shift
    return on.model.bridge.run_with_hooks(DATA.ids, fwd_hooks=hooks, position_ids=positions)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_pairs_are_the_same_before_and_after_rotation_and_stay_relative(arch, loaded):
    """Single key channels taken away behind rotation are neither."""
    pairs = masked(loaded(arch), DATA, "zero")
    mask = random_mask(pairs)
    before, behind = logits(pairs, pairs.hooks(mask)), logits(pairs, rotated(pairs, mask))
    torch.testing.assert_close(before, behind, atol=2e-5, rtol=1e-5)
    single = masked(loaded(arch), DATA, "zero", keys="single")
    odd = random_mask(single)
    first, then = logits(single, single.hooks(odd)), logits(single, rotated(single, odd))
    assert (first - then).abs().max() > 0.02
    moved = logits(pairs, rotated(pairs, mask), shift=11) - behind
    assert moved.abs().max() < 1e-4
    assert (logits(single, rotated(single, odd), shift=11) - then).abs().max() > 0.01


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "neox-parallel", "native"])
def test_masked_attention_only_knows_how_far_away_a_token_is(arch, loaded):
    """All tokens alike in front of a text, two or nine of them, and the mean key as filling: the
    scores between any two tokens of the text are the same."""
    model = loaded(arch)
    on = masked(model, DATA)
    mask = random_mask(on, share=0.4)
    text = DATA.ids[:1, :6]
    name, scores = "blocks.0.attn.hook_attn_scores", []
    if arch == "native":
        name = "blocks.0.attn.hook_pattern"  # its scores cannot be hooked: ratios of the patterns
    for front in (2, 9):
        ids = torch.cat([torch.full((1, front), 5), text], dim=1)
        found = under(on, mask, [name], ids)[name][0, :, front:, front:]
        found = found.log() if arch == "native" else found
        within = torch.ones(6, 6).tril().bool() & ~torch.ones(6, 6).tril(-4).bool()  # all windows
        found = torch.where(within, found, 0.0)
        scores.append(found - found.diagonal(dim1=-2, dim2=-1)[..., None] * within)
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
    assert scores[0].abs().max() > 0.1


# Heads


def test_a_kv_head_reaches_its_own_query_heads_only(loaded):
    on = masked(loaded("llama"), DATA)
    name = "blocks.0.attn.hook_z"
    full = under(on, torch.ones(on.units.total), [name])[name]
    for part in "KV":
        table = on.units.table()
        gone = (table.layer == 0) & (table.part == part) & (table["head"] == 1)
        moved = under(on, torch.tensor(~gone.to_numpy()).float(), [name])[name] != full
        assert moved.flatten(0, 1).any(0).any(-1).tolist() == [False, False, True, True]


def expanded(plain):
    """The same function with a KV head for each query head."""
    config = plain.config.__class__(**{**plain.config.to_dict(), "num_key_value_heads": 4})
    wide = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = plain.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            each = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0)
            weights[name] = each.flatten(0, 1)
    wide.load_state_dict(weights)
    return wide.eval()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("basis", [False, True], ids=["raw", "pca"])
def test_masks_of_query_heads_are_those_of_expanded_kv_heads(arch, basis, tiny, loaded):
    """Keys with 0 in their place, values with their mean or along the same axes."""
    wide = wrap(expanded(tiny(arch)), None, ModelSpec("wide", "wide"))
    own = masked(loaded(arch), DATA, basis=basis, resolution="query")
    torch.testing.assert_close(own.resid(DATA.ids), wide_resid(wide), atol=1e-5, rtol=1e-5)
    other = masked(wide, DATA)
    assert other.units.total == own.units.total
    zero = torch.zeros_like(other.fill.k)
    axes = own.basis.repeat_interleave(2, dim=1) if basis else None
    other = dataclasses.replace(other, fill=Fill(zero, other.fill.v), basis=axes)
    for mask in (random_mask(own), torch.zeros(own.units.total)):
        found = own.resid(DATA.ids, mask)
        torch.testing.assert_close(found, other.resid(DATA.ids, mask), atol=1e-4, rtol=1e-4)
        assert (found - own.resid(DATA.ids)).abs().max() > 0.1


def wide_resid(wide):
    return masked(wide, DATA).resid(DATA.ids)


def test_what_query_heads_cannot_do_is_refused(loaded):
    """z and q hold nothing of single keys and values: neither the first one, nor those of a
    neighbouring row, can be told from them."""
    on = masked(loaded("llama"), DATA, resolution="query")
    gates = torch.zeros(on.units.total)
    with pytest.raises(BadInput, match="query"):
        on.with_fill(resampled(on.model, DATA)).hooks(gates)
    with pytest.raises(BadInput, match="query"):
        dataclasses.replace(on, keep_first=True).hooks(gates)


# What takes the place


KV = [f"blocks.{i}.attn.hook_{p}" for i in range(3) for p in "kv"]


def test_resampling_puts_the_next_rows_entries(loaded):
    on = masked(loaded("llama"), DATA)
    own = record_kv(on.model, DATA.ids)
    found = under(on.with_fill(resampled(on.model, DATA)), torch.zeros(on.units.total), KV)
    for layer in range(3):
        for part, at in (("k", own.k), ("v", own.v)):
            # (row i + 1, and row 0 for the last is no row of its own: rolled)
            want = torch.stack([at[layer, (i - 1) % len(DATA)] for i in range(len(DATA))])
            assert torch.equal(found[f"blocks.{layer}.attn.hook_{part}"], want)


def test_the_first_position_stays_when_asked(loaded):
    for arch in ("llama", "gemma3"):
        on = masked(loaded(arch), DATA, keep_first=True)
        name = "blocks.0.attn.hook_v"
        found = under(on, torch.zeros(on.units.total), [name])[name]
        own = record_kv(on.model, DATA.ids).v[0]
        assert torch.equal(found[:, 0], own[:, 0])
        torch.testing.assert_close(found[:, 1:], on.fill.v[0].expand_as(own)[:, 1:])
    keys = under(masked(loaded("llama"), DATA, keep_first=True), 0 * random_mask(on), KV)
    assert torch.equal(keys[KV[0]][:, 0], record_kv(loaded("llama"), DATA.ids).k[0, :, 0])


def test_moments_are_those_of_numpy(loaded, tiny):
    """Over all tokens but first ones and padding, from plain hooks."""
    plain, held = tiny("llama"), []
    keep = lambda x, n: held.append(x.numpy()) or x  # noqa: E731
    hook_plain(plain, "llama", keep, keep)
    with torch.no_grad():
        plain(DATA.ids)
    found = moments(loaded("llama"), DATA, batch_size=3)
    for layer in range(3):
        for at, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
            tokens = held[2 * layer + at]
            tokens = np.concatenate([*tokens[:-1, 1:], tokens[-1, 1:-3]])  # token head channel
            np.testing.assert_allclose(mean[layer, 0, 0], tokens.mean(0), atol=1e-5)
            np.testing.assert_allclose(std[layer, 0, 0], tokens.std(0), atol=1e-4)
        for head in range(2):
            axes = found.v_basis[layer, head].double().numpy()
            along = np.cov(tokens[:, head].T, bias=True)
            along = axes.T @ along @ axes
            np.testing.assert_allclose(axes.T @ axes, np.eye(8), atol=1e-5)
            np.testing.assert_allclose(along - np.diag(np.diag(along)), 0, atol=1e-3)
            assert (np.diff(np.diag(along)) <= 1e-6).all()  # the widest first


def test_a_mask_of_axes_keeps_what_lies_along_them(loaded):
    """Values come out as their mean plus their projection on the axes that stay."""
    on = masked(loaded("llama"), DATA, basis=True)
    mask = random_mask(on)
    name = "blocks.0.attn.hook_v"
    found = under(on, mask, [name])[name]
    own, mean = record_kv(on.model, DATA.ids).v[0], on.fill.v[0]
    for head in range(2):
        kept = on.basis[0, head][:, on.units.spread(mask)[1][0, head].bool()]
        want = mean[0, 0, head] + (own[:, :, head] - mean[0, 0, head]) @ (kept @ kept.T)
        torch.testing.assert_close(found[:, :, head], want, atol=1e-5, rtol=1e-4)


# Gradients, and gates of rows


@pytest.mark.parametrize("arch", EVERY)
def test_gradients_are_finite_differences(arch, loaded):
    """Of a random readout, with respect to gates between 0 and 1, one unit or all at once."""
    for resolution in ("kv", "query"):
        on = masked(loaded(arch), DATA, resolution=resolution)
        generator = torch.Generator().manual_seed(0)
        ids, n = DATA.ids[:1], on.units.total
        gates = (0.2 + 0.6 * torch.rand(n, generator=generator)).requires_grad_(True)
        weigh = torch.randn(on.resid(ids).shape, generator=generator) / 10
        (slope,) = torch.autograd.grad((on.resid(ids, gates) * weigh).sum(), gates)
        some = torch.randperm(n, generator=generator)[:6]
        moves = torch.cat([torch.eye(n)[some], torch.randn(2, n, generator=generator) / n**0.5])
        step = 4e-3
        with torch.no_grad():
            both = torch.cat([gates + step * moves, gates - step * moves])
            far = (on.resid(ids.repeat(len(both), 1), both) * weigh).double().sum((1, 2))
        up, down = far.chunk(2)
        want = ((up - down) / (2 * step)).float()
        scale = float(slope.abs().max())
        torch.testing.assert_close(moves @ slope, want, atol=0.02 * scale, rtol=0.03)
        assert (want.abs() > 0.05 * scale).any()


def test_rows_have_gates_of_their_own(loaded):
    on = masked(loaded("gemma3"), DATA)
    gates = torch.stack([random_mask(on, seed) for seed in range(len(DATA))])
    together = on.resid(DATA.ids, gates)
    for row, mask in enumerate(gates):
        alone = on.resid(DATA.ids[row : row + 1], mask)[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


# Fidelity


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_fidelity_is_what_torch_computes(batch_size, loaded, tiny, monkeypatch):
    monkeypatch.setattr("lens_utils.kv_masks.POSITIONS", 5)
    on, plain = masked(loaded("llama"), DATA), tiny("llama")
    mask = random_mask(on, share=0.7)
    k, v = on.units.spread(mask)
    with torch.no_grad():
        own = plain(DATA.ids).logits
        hook_plain(plain, "llama", mix(on.fill.k, k), mix(on.fill.v, v))
        cut = plain(DATA.ids).logits
    found = fidelity(on, DATA, [None, mask], batch_size)
    assert found[["mask", "row"]].to_numpy().tolist() == [[m, r] for m in (0, 1) for r in range(4)]
    for entry in found.itertuples():
        at, says = DATA.counted[entry.row], (own, cut)[entry.mask][entry.row]
        full, says = own[entry.row][at], says[at]
        want = {
            "tokens": at.sum(),
            "kl": torch.nn.functional.kl_div(
                says.log_softmax(-1), full.log_softmax(-1), reduction="sum", log_target=True
            ),
            "ce": torch.nn.functional.cross_entropy(
                says, DATA.target[entry.row][at], reduction="sum"
            ),
            "agree": (says.argmax(-1) == full.argmax(-1)).sum(),
            "logit_diff": (
                says.gather(1, DATA.target[entry.row][at][:, None])[:, 0]
                - says[:, DATA.foil[entry.row]]
            ).sum(),
        }
        for name, value in want.items():
            assert getattr(entry, name) == pytest.approx(float(value), abs=2e-4), name
        assert entry.group == entry.row
    assert found.kl[:4].abs().max() < 1e-5 < 1e-2 < found.kl[4:].min()


def test_resampling_in_fidelity_never_takes_a_row_itself(loaded):
    """A last batch of one row has no neighbour in it."""
    on = masked(loaded("llama"), DATA)
    empty = torch.zeros(on.units.total)
    found = fidelity(on, DATA, [empty], batch_size=3, resample=True)
    assert found.kl.min() > 0.1
    with pytest.raises(BadInput, match="two"):
        fidelity(on, DATA.take(slice(0, 1)), [empty], resample=True)


def test_examples_are_taken_whole():
    part = DATA.take(torch.tensor([3, 1]))
    assert torch.equal(part.ids, DATA.ids[[3, 1]]) and part.foil.tolist() == [
        int(DATA.foil[3]), int(DATA.foil[1])
    ]  # fmt: skip
    assert [len(b) for b in DATA.batches(2)] == [2, 2]
    assert [len(b) for b in DATA.batches(3)] == [4]  # nobody is left alone
    assert kv_masks._real(DATA).sum(1).tolist() == [9, 9, 9, 6]
