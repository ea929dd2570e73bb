"""Gradient scores against finite differences, exact patching and TransformerLens' own."""

import pytest
import torch
from circuits import (
    INDUCTION_HEAD,
    PREVIOUS_HEAD,
    REVERSE_HEADS,
    REVERSE_MLPS,
    idle_heads,
    induction_model,
    reverse_model,
    reverse_pairs,
)
from conftest import ARCHS
from small_pairs import exchanged, of, random_batch, softened
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

from lens_utils import gradients, pairs, patching
from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.gradients import NODES, PLAIN, attribute, midpoints
from lens_utils.lens import Readout, hook
from lens_utils.models import wrap
from lens_utils.patching import COMPONENTS, Site
from lens_utils.registry import ModelSpec

EVERY = (*ARCHS, "induction")


def uncapped(model, logits):
    """The model's own logits at the last position, before its softcap."""
    cap = float(model.bridge.cfg.output_logits_soft_cap or -1)
    last = logits[:, -1]
    return cap * torch.atanh(last / cap) if cap > 0 else last


def logit_diff(model, batch, ids, hooks=()):
    with torch.no_grad():
        logits = uncapped(model, model.bridge.run_with_hooks(ids, fwd_hooks=list(hooks)))
    times = len(ids) // len(batch.answer)
    answer, foil = (tokens.repeat(times)[:, None] for tokens in (batch.answer, batch.foil))
    return (logits.gather(1, answer) - logits.gather(1, foil))[:, 0]


@pytest.mark.parametrize("arch", EVERY)
def test_scores_are_the_derivative_of_patching(tiny, arch):
    """Move a head, or a whole component, a little towards and away from its clean value."""
    model = of(tiny, arch)
    batch = random_batch(model)
    if arch == "induction":
        batch = pairs.batch(model, exchanged(pairs.induction(model, 3), "keys"))
    scores = attribute(model, batch)
    assert scores.keys() == set(NODES) - ({"mlp_out"} if arch == "induction" else set())
    names = {
        (n, i): f"blocks.{i}.{COMPONENTS[n][0]}" for n in scores for i in range(model.n_layers)
    }
    clean, corrupt = (
        record(model, ids, list(names.values())) for ids in (batch.clean, batch.corrupt)
    )
    checked = set()
    for (node, layer), name in names.items():
        heads = (slice(None), 1) if clean[name].ndim == 4 else ()
        step = 0.005 * (clean[name] - corrupt[name])

        both = torch.cat([step, -step])

        def move(x, hook, heads=heads, step=both):
            x = x.clone()
            x[:, *heads] += step[:, *heads]
            return x

        towards, away = logit_diff(model, batch, batch.corrupt.repeat(2, 1), [(name, move)]).chunk(
            2
        )
        slope = (towards - away) / 0.01
        found = scores[node][:, layer, :, *heads[1:]].sum(1)
        torch.testing.assert_close(found, slope, atol=6e-3, rtol=0.02)
        if (slope.abs() > 0.01).any():
            checked.add(node)
    # It is not zeros that agree. (L0H1 is told by positions where to look; L1H1 does nothing.)
    assert checked == (set(scores) - {"q", "k"} if arch == "induction" else set(NODES))


@pytest.mark.parametrize("arch", EVERY)
def test_integrated_scores_of_the_embedding_sum_to_the_logit_difference(tiny, arch):
    model = of(tiny, arch)
    batch = random_batch(model, 2)
    gap = logit_diff(model, batch, batch.clean) - logit_diff(model, batch, batch.corrupt)
    scores = attribute(model, batch, midpoints(12), ["resid_pre"])["resid_pre"]
    torch.testing.assert_close(scores[:, 0].sum(1), gap, atol=0.04, rtol=0.02)
    if arch != "induction":  # and one point does not do: the models are not linear
        plain = attribute(model, batch, PLAIN, ["resid_pre"])["resid_pre"]
        assert (plain[:, 0].sum(1) - gap).abs().max() > 0.1


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "neox-parallel", "gpt2"])
def test_nodes_agree_with_transformer_lens(tiny, arch):
    model = of(tiny, arch)
    batch = random_batch(model, 1)
    answer, foil = batch.answer.item(), batch.foil.item()
    other = of(tiny, arch).bridge.requires_grad_(True)
    expected = attribution_patch(
        other, batch.clean, batch.corrupt, lambda z: z[0, -1, answer] - z[0, -1, foil]
    ).node_scores
    found = attribute(model, batch)
    compared = 0
    for node, score in expected.items():
        match node.kind:
            case "attn_head_out":
                own = found["z"][0, node.layer, node.position, node.head]
            case "mlp_out":
                own = found["mlp_out"][0, node.layer, node.position]
            case "embed":
                own = found["resid_pre"][0, 0, node.position]
        assert own.item() == pytest.approx(score, abs=2e-4), node
        compared += 1
    assert compared == 7 * (1 + 3 * 4 + 3)


def test_where_the_model_is_linear_the_guess_is_exact(tiny):
    """Exchanged values: the patterns stay, and all that moves goes through W_V, W_O and W_U."""
    model = softened(0.2)
    batch = pairs.batch(model, exchanged(pairs.induction(model, 4), "values"))
    exact = patching.run(
        model, batch, [(Site(c, *INDUCTION_HEAD[:1], INDUCTION_HEAD[1:]),) for c in ("v", "z")]
    )
    base = logit_diff(model, batch, batch.corrupt)
    scores = attribute(model, batch)
    for row, node in zip(exact, ("v", "z"), strict=True):
        guess = scores[node][:, INDUCTION_HEAD[0], :, INDUCTION_HEAD[1]].sum(1)
        assert (guess.abs() > 1).all()
        torch.testing.assert_close(guess, row - base, atol=1e-4, rtol=1e-5)


def test_plain_gradients_miss_what_a_saturated_softmax_hides():
    """Exchanged keys: L0H1 decides where L1H2 looks, and the softmax there is a choice.

    Exact patching moves the answer to its clean value; the gradient in the corrupted run is zero;
    the integrated form finds the head, and with many points also how much hangs on it.
    """
    model = induction_model()
    batch = pairs.batch(model, exchanged(pairs.induction(model, 4), "keys"))
    layer, head = PREVIOUS_HEAD
    exact = patching.run(model, batch, [(Site("z", layer, (head,)),)])[0]
    gap = exact - logit_diff(model, batch, batch.corrupt)
    torch.testing.assert_close(gap, torch.full_like(gap, 20.0), atol=1e-3, rtol=0)

    def total(at):
        return attribute(model, batch, at, ["z"])["z"][:, layer, :, head].sum(1)

    assert total(PLAIN).abs().max() < 1e-3
    assert (total(midpoints(5)) > 10).all()
    torch.testing.assert_close(total(midpoints(60)), gap, atol=0.5, rtol=0)


def test_idle_heads_score_exactly_zero():
    for model in (induction_model(), softened()):
        for what in ("keys", "values"):
            batch = pairs.batch(model, exchanged(pairs.induction(model, 4), what))
            scores = attribute(model, batch, midpoints(3))
            for layer, head in idle_heads():
                for node in ("q", "k", "v", "z"):
                    assert not scores[node][:, layer, :, head].any()


def test_dead_parts_of_a_compiled_program_score_exactly_zero():
    model = reverse_model()
    batch = pairs.batch(model, reverse_pairs())
    scores = attribute(model, batch, midpoints(8))
    for layer in range(model.n_layers):
        if (layer, 0) not in REVERSE_HEADS:
            assert not any(scores[node][:, layer].any() for node in ("q", "k", "v", "z"))
        if layer not in REVERSE_MLPS:
            assert not scores["mlp_out"][:, layer].any()
    # The token travels through L3H0's values alone.
    gap = logit_diff(model, batch, batch.clean) - logit_diff(model, batch, batch.corrupt)
    torch.testing.assert_close(scores["v"][:, 3, 1, 0], gap, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("arch", ["gemma3", "neox-parallel"])
def test_pairs_do_not_see_each_other(tiny, arch):
    model = of(tiny, arch)
    batch = random_batch(model, 3)
    together = attribute(model, batch, midpoints(2))
    for i in range(3):
        alone = attribute(model, pairs.batch(model, batch.pairs[i : i + 1]), midpoints(2))
        for node, scores in alone.items():
            torch.testing.assert_close(together[node][i], scores[0], atol=1e-5, rtol=1e-4)


def test_bfloat16_keeps_the_order(tiny):
    """Half precision: rank correlation with float32 above 0.95, largest error within 15 %."""
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap(tiny("llama").to(dtype), None, ModelSpec("llama", "llama"))
        scores.append(attribute(model, random_batch(model), nodes=["z"])["z"])
    assert all(s.dtype == torch.float32 for s in scores)
    one, other = (s.flatten() for s in scores)
    ranks = torch.stack([s.argsort().argsort().float() for s in (one, other)])
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    assert (one - other).abs().max() < 0.15 * one.abs().max()


def test_nothing_is_left_behind(tiny):
    model = of(tiny, "gemma2")
    bridge, batch = model.bridge, random_batch(model)
    before = {name: p.clone() for name, p in bridge.named_parameters()}
    with torch.no_grad():  # what a caller switched off does not matter
        attribute(model, batch)
    assert all(not p.requires_grad and p.grad is None for p in bridge.parameters())
    assert all(torch.equal(p, before[name]) for name, p in bridge.named_parameters())
    readout = Readout(bridge)
    x = record(model, batch.corrupt, [hook(0)])[hook(0)]
    with pytest.raises(RuntimeError):
        gradients.backward(model, readout, batch, x[..., :-1], [hook(0)])
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_dict.values())
    assert not any("forward" in block.__dict__ for block in bridge.blocks)


def test_bad_input_is_one_line(tiny):
    model = of(tiny, "llama")
    batch = random_batch(model)
    with pytest.raises(BadInput, match="gradients score resid_pre, .* of llama, not 'pattern'"):
        attribute(model, batch, nodes=["pattern"])
    with pytest.raises(BadInput, match="induction, not 'mlp_out'"):
        attribute(softened(), random_batch(softened()), nodes=["mlp_out"])
    for at in ((), (1.5,)):
        with pytest.raises(BadInput, match="points lie between 0"):
            attribute(model, batch, at)
    with pytest.raises(BadInput, match="0 steps"):
        midpoints(0)
