"""The replacement model against plain Hugging Face hooks, finite differences and a hand-built one.

The linear model's constants are carried forwards and its edges backwards, so that their sum is no
tautology.
"""

import pytest
import torch
from conftest import ARCHS
from small_transcoders import IDS, random_transcoders, two_features

from lens_utils.errors import BadInput
from lens_utils.frozen import edges
from lens_utils.interventions import Change, changes, intervene, linear_gain
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec
from lens_utils.replacement import fidelity, freeze, held_names, replacing
from lens_utils.sparse import Transcoder


def model_of(tiny, arch, dtype=torch.float64):
    return wrap(tiny(arch).to(dtype), None, ModelSpec(arch, arch))


def all_rows(frozen):
    return edges(frozen, torch.arange(len(frozen.values)))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("skip", [False, True])
def test_sources_and_bias_sum_to_every_target(tiny, arch, skip):
    model = model_of(tiny, arch)
    frozen = freeze(model, random_transcoders(model, skip), IDS, sinks=0 if skip else 1)
    found = all_rows(frozen).sum(1) + frozen.bias
    assert len(frozen.features) > 50 and frozen.bias.abs().min() > 1e-6
    torch.testing.assert_close(found, frozen.values, rtol=0, atol=1e-5 * found.abs().max().item())


@pytest.mark.parametrize("name", ["smol", "organism"])
def test_sources_and_bias_sum_to_every_target_of_real_models(name, request):
    model = request.getfixturevalue(name)
    ids = [3, 5, 11, 7, 19]
    frozen = freeze(model, random_transcoders(model, k=4, latents=64), ids)
    some = torch.cat(
        [torch.arange(0, len(frozen.values), 40), torch.tensor([len(frozen.values) - 1])]
    )
    found = edges(frozen, some).sum(1) + frozen.bias[some]
    largest = frozen.values.abs().max().item()
    torch.testing.assert_close(found, frozen.values[some], rtol=0, atol=1e-4 * largest)


def test_the_frozen_model_holds_what_the_model_did(tiny):
    """Features are what W_enc, b_enc and k say of the MLP's input; logits the likeliest."""
    hf, model = tiny("llama"), model_of(tiny, "llama", torch.float32)
    read = {}
    for layer, block in enumerate(hf.model.layers):
        block.mlp.register_forward_hook(
            lambda mlp, args, out, layer=layer: read.update({layer: args[0][0]})
        )
    with torch.no_grad():
        logits = hf(torch.tensor([IDS])).logits[0, -1]
    transcoders = random_transcoders(model)
    frozen = freeze(model, transcoders, IDS)
    expected = {}
    for layer, t in transcoders.items():
        pre = read[layer] @ t.W_enc.T + t.b_enc
        for pos in range(1, len(IDS)):
            for index in pre[pos].argsort(descending=True)[:5].tolist():
                if pre[pos, index] > 0:
                    expected[layer, pos, index] = pre[pos, index].item()
    assert [tuple(f) for f in frozen.features.tolist()] == sorted(expected)
    for place, value in zip(frozen.features.tolist(), frozen.activations.tolist(), strict=True):
        assert value == pytest.approx(expected[tuple(place)], rel=1e-4, abs=1e-5)
    probs = logits.softmax(0).sort(descending=True)
    n = len(frozen.logit_ids)
    assert frozen.logit_ids.tolist() == probs.indices[:n].tolist()
    assert n == 10 or probs.values[: n - 1].sum() < 0.95 <= probs.values[:n].sum()
    assert len(freeze(model, transcoders, IDS, logit_share=0.01).logit_ids) == 1


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "neox-parallel", "gpt2"])
def test_edges_are_finite_differences_of_the_frozen_forward_pass(tiny, arch):
    """Move what a source writes, patterns, norms and MLPs held by hooks, and see targets move."""
    model = model_of(tiny, arch)
    transcoders = random_transcoders(model, skip=True)
    frozen, ids = freeze(model, transcoders, IDS), torch.tensor([IDS])
    held = model.bridge.run_with_cache(ids, names_filter=held_names(model), use_cache=False)[1]
    held = {name: held[name].clone() for name in held_names(model)}

    def targets(name, moved):
        seen, hooks = {}, []
        for held_name, values in held.items():
            if held_name.endswith(("hook_scale", "hook_pattern")):
                hooks.append((held_name, lambda x, hook, v=values: v.clone()))
        for layer in range(model.n_layers):
            inside, out = (f"blocks.{layer}.mlp.hook_{end}" for end in ("in", "out"))

            def read(x, hook, layer=layer):
                seen[layer] = x

            def write(y, hook, layer=layer, inside=inside, out=out):
                t = transcoders.get(layer)
                if t is None:
                    return held[out].clone()
                return held[out] + (seen[layer] - held[inside]) @ t.W_skip.T

            hooks += [(inside, read), (out, write)]
        hooks.append((name, lambda x, hook: x + moved))
        logits = model.bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False)[0, -1]
        pre = [seen[i][0, p] @ transcoders[i].W_enc[f] for i, p, f in frozen.features.tolist()]
        return torch.cat([torch.stack(pre), (logits - logits.mean())[frozen.logit_ids]])

    rows = all_rows(frozen)
    start = targets("blocks.0.hook_resid_pre", 0.0)
    n_features, n_pos = len(frozen.features), len(IDS)
    for pos in (0, 3):
        moved = torch.zeros_like(held["blocks.0.hook_resid_pre"])
        moved[0, pos] = frozen.embed[pos]
        column = n_features + model.n_layers * n_pos + pos
        found = targets("blocks.0.hook_resid_pre", moved) - start
        torch.testing.assert_close(found, rows[:, column], atol=1e-5, rtol=1e-4)
    for source in (3, n_features // 2, n_features - 2):
        layer, pos, index = frozen.features[source].tolist()
        moved = torch.zeros_like(held["blocks.0.hook_resid_pre"])
        moved[0, pos] = frozen.activations[source] * transcoders[layer].W_dec[index]
        found = targets(f"blocks.{layer}.mlp.hook_out", moved) - start
        torch.testing.assert_close(found, rows[:, source], atol=1e-5, rtol=1e-4)
        assert layer == model.n_layers - 1 or found[:n_features].abs().max() > 1e-3


def test_a_model_of_two_features_has_exactly_its_edges():
    model, transcoders = two_features()
    frozen = freeze(model, transcoders, [0, 4, 2])
    assert frozen.features.tolist() == [[0, 2, 3], [1, 1, 7], [1, 2, 7]]
    scale = (0.1 + 1e-6) ** 0.5  # of a one in ten dimensions
    first = 2 / scale - 1
    torch.testing.assert_close(frozen.activations, torch.tensor([first, 0.5, 0.5]))
    rows, errors, tokens = all_rows(frozen), 3, 3 + 6
    expected = torch.zeros_like(rows)
    expected[0, tokens + 2] = 2 / scale
    expected[2, 0] = 2 / scale * 3 * first
    expected[2, errors + 2] = -expected[2, 0]  # the MLP wrote nothing: all of it is error
    for row, token in enumerate(frozen.logit_ids.tolist(), start=3):
        expected[row, 2] = (float(token == 5) - 1 / 6) / scale * 3 * 0.5
        expected[row, errors + 5] = -expected[row, 2]
    torch.testing.assert_close(rows, expected)
    assert frozen.bias[:3].tolist() == [-1, 0.5, 0.5]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "neox-parallel", "gpt2"])
def test_constrained_interventions_are_the_edges(tiny, arch):
    model = model_of(tiny, arch, torch.float32)
    transcoders = random_transcoders(model, skip=True)
    frozen = freeze(model, transcoders, IDS)
    n = len(frozen.features)
    direct = all_rows(frozen)[n:, :n]
    some = list(range(0, n, 9))
    places = [frozen.features[i].tolist() for i in some]
    sets = [[], *([Change(*place)] for place in places)]
    sets += [[Change(*places[0], 3 * frozen.activations[some[0]].item()), Change(*places[-1])]]
    found = intervene(model, transcoders, IDS, sets, constrained=True, tokens=3 * len(IDS))
    effect = changes(found, found[0], frozen.logit_ids)
    atol = 1e-3 * direct[:, some].abs().max().item()
    torch.testing.assert_close(effect[1:-1], -direct[:, some].T, atol=atol, rtol=1e-3)
    both = 2 * direct[:, some[0]] - direct[:, some[-1]]
    torch.testing.assert_close(effect[-1], both, atol=2 * atol, rtol=1e-3)
    free = intervene(model, transcoders, IDS, sets)
    assert (free - found)[1:].abs().max() > 10 * atol  # what is held matters
    torch.testing.assert_close(free[0], found[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_free_interventions_are_those_of_plain_hooks(tiny):
    """Two features of one position, the upper of which the lower moves: it is set all the same."""
    hf, model = tiny("llama"), model_of(tiny, "llama", torch.float32)
    transcoders = random_transcoders(model)
    frozen = freeze(model, transcoders, IDS)
    lower, upper = (next(f for f in frozen.features.tolist() if f[:2] == [layer, 4])
                    for layer in (0, 2))  # fmt: skip
    changes = [Change(*lower, 7.0), Change(*upper, 0.0)]
    for layer, pos, index, value in changes:

        def add(mlp, args, out, t=transcoders[layer], pos=pos, index=index, value=value):
            pre = args[0][0, pos] @ t.W_enc.T + t.b_enc
            top = pre.topk(5).indices.tolist()
            now = pre[index].clamp_min(0) if index in top else 0.0
            out = out.clone()
            out[0, pos] += (value - now) * t.W_dec[index]
            return out

        hf.model.layers[layer].mlp.register_forward_hook(add)
    expected = hf(torch.tensor([IDS])).logits[0, -1]
    found = intervene(model, transcoders, IDS, [[], changes])
    torch.testing.assert_close(found[1], expected, atol=1e-4, rtol=1e-4)
    assert (found[1] - found[0]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_replaced_mlps_against_plain_hooks(tiny, skip):
    hf, model = tiny("llama"), model_of(tiny, "llama", torch.float32)
    transcoders = random_transcoders(model, skip)
    ids = torch.tensor([IDS, IDS[::-1]])
    clean = hf(ids).logits.log_softmax(-1)[:, :-1]
    for layer, t in transcoders.items():

        def replace(mlp, args, out, t=t):
            pre = args[0] @ t.W_enc.T + t.b_enc
            kept = pre.relu() * (pre >= pre.topk(5).values[..., -1:])
            made = kept @ t.W_dec + t.b_dec + (args[0] @ t.W_skip.T if skip else 0)
            return torch.cat([out[:, :1], made[:, 1:]], dim=1)

        hf.model.layers[layer].mlp.register_forward_hook(replace)
    expected = hf(ids).logits
    found = model.bridge.run_with_hooks(ids, fwd_hooks=replacing(transcoders), use_cache=False)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    replaced = expected.log_softmax(-1)[:, :-1]
    said = fidelity(model, transcoders, ids)
    loss = torch.nn.functional.nll_loss
    gaps = [loss(q, row[1:]) - loss(p, row[1:])
            for p, q, row in zip(clean, replaced, ids, strict=True)]  # fmt: skip
    torch.testing.assert_close(said.ce_increase, torch.stack(gaps), atol=1e-4, rtol=1e-4)
    kl = torch.nn.functional.kl_div(replaced, clean, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(said.kl, kl.mean(1), atol=1e-4, rtol=1e-4)
    same = (clean.argmax(-1) == replaced.argmax(-1)).float().mean(1)
    assert said.agreement.tolist() == same.tolist()


def test_linear_gain():
    assert linear_gain(torch.tensor([[1.0, -8.0]]), torch.tensor([0.5, -2.0])) == 4


def test_nothing_is_left_behind(tiny):
    model = model_of(tiny, "gemma3", torch.float32)
    transcoders = random_transcoders(model)
    intervene(model, transcoders, IDS, [[Change(0, 3, 1)]], constrained=True)
    fidelity(model, transcoders, torch.tensor([IDS]))
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


def test_bad_input_is_one_line(tiny):
    model = model_of(tiny, "llama", torch.float32)
    good = random_transcoders(model)
    wide = Transcoder(torch.zeros(8, 9), torch.zeros(8), torch.zeros(8, 9), torch.zeros(9), None, 2)
    for wrong, says in (
        ({0: wide}, "reads 9 dimensions"),
        ({3: good[0]}, "whose layers are 0 to 2"),
    ):
        with pytest.raises(BadInput, match=says):
            freeze(model, wrong, IDS)
    with pytest.raises(BadInput, match="nothing behind its first 1"):
        freeze(model, good, [1])
    for change in (Change(1, 2, 0), Change(0, 2, 40), Change(0, 7, 0)):
        with pytest.raises(BadInput, match=f"no feature {change.index} in layer {change.layer}"):
            intervene(model, good, IDS, [[change]])
