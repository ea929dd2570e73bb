"""Rankings of K and V units against slow loops, the path integral, and planted dead channels."""

import numpy as np
import pytest
import torch
from kv_models import examples, hook_plain, masked, of

from lens_utils import kv_masks, kv_scores
from lens_utils.kv_masks import fidelity
from lens_utils.kv_scores import drawn, gradient_scores, magnitude_scores, n_kept, top
from lens_utils.kv_units import make_units

DATA = examples(n=3, short=2)
LABELS = torch.arange(1000) * 7 % 61


def test_gradients_are_those_of_one_example_at_a_time(tiny, monkeypatch):
    """Plain hooks on Hugging Face, one row, one label set and one alpha after the other."""
    on, plain = masked(of(tiny, "llama"), DATA), tiny("llama").requires_grad_(False)
    taken = []

    def labels(log_probs, generator):
        taken.append(LABELS[: len(log_probs)])
        return taken[-1]

    monkeypatch.setattr("lens_utils.kv_scores._draw", labels)
    alphas = (0.25, 0.75)
    found = gradient_scores(on, DATA, 0, alphas, batch_size=2)
    gates = {}

    def edit(part):
        def apply(x, n):
            gate = on.units.spread(gates["now"])[part][n]
            return gate * x + (1 - gate) * on.fill[part][n, 0, 0]

        return apply

    hook_plain(plain, "llama", edit(0), edit(1))

    def logits(row, alpha):
        gates["now"] = torch.full((on.units.total,), alpha, requires_grad=True)
        return plain(DATA.ids[row : row + 1]).logits[0][DATA.counted[row]]

    want = {name: torch.zeros(on.units.total) for name in kv_scores.GRADIENTS}
    # rows 0 to 2 lie in one batch (nobody is left alone), their labels one behind the other
    start = 0
    for row in range(3):
        log_probs = logits(row, 1.0).log_softmax(-1)
        at = torch.arange(len(log_probs))
        own = log_probs[at, LABELS[start : start + len(at)]].sum()
        start += len(at)
        (slope,) = torch.autograd.grad(own, gates["now"], retain_graph=True)
        want["fisher"] += slope**2 / 3
        ce = -log_probs[at, DATA.target[row][DATA.counted[row]]].mean()
        want["taylor"] += torch.autograd.grad(ce, gates["now"])[0].abs() / 3
        for alpha in alphas:
            other = logits(row, alpha).log_softmax(-1)
            p = log_probs.detach()
            kl = (p.exp() * (p - other)).sum(-1).mean()
            want["ig"] -= torch.autograd.grad(kl, gates["now"])[0] / 2 / 3
    assert torch.equal(torch.cat(taken), LABELS[:start])
    for name, scores in want.items():
        scale = float(scores.abs().max())
        torch.testing.assert_close(found[name], scores, atol=2e-4 * scale, rtol=1e-3)
        assert scale > 1e-3


@pytest.mark.parametrize(("arch", "resolution"), [("llama", "kv"), ("gpt2", "kv"),
                                                  ("gemma3", "query")])  # fmt: skip
def test_integrated_gradients_sum_to_what_the_path_costs(arch, resolution, tiny):
    """From the model to nothing at all: KL(f || f_0), within 2 per cent with 12 points."""
    on = masked(of(tiny, arch), DATA, resolution=resolution)
    alphas = [(i + 0.5) / 12 for i in range(12)]
    ig = gradient_scores(on, DATA, alphas=alphas)["ig"]
    empty = fidelity(on, DATA, [torch.zeros(on.units.total)])
    want = (empty.kl / empty.tokens).mean()
    assert float(ig.sum()) == pytest.approx(want, rel=0.02) and want > 0.1


def buried(model, n_k=3, n_v=5):
    """Units without any effect: pairs with zero rows of W_K, channels with zero rows of W_V."""
    dead_k = [(0, 0, 1), (1, 1, 3), (2, 0, 0)][:n_k]  # layer, kv_head, pair
    dead_v = [(0, 1, 2), (1, 0, 5), (2, 1, 7), (2, 0, 0), (0, 0, 3)][:n_v]
    for layer, head, pair in dead_k:
        for channel in (pair, pair + 4):
            model.bridge.blocks[layer].attn.W_K[head, :, channel] = 0
    for layer, head, channel in dead_v:
        model.bridge.blocks[layer].attn.W_V[head, :, channel] = 0
    return dead_k, dead_v


def units_at(units, dead_k, dead_v):
    k = [int(units.k[place]) for place in dead_k]
    return sorted([*k, *(int(units.v[place]) for place in dead_v)])


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_dead_units_have_no_score(arch, tiny):
    model = of(tiny, arch)
    places = buried(model)
    on = masked(model, DATA)
    dead = units_at(on.units, *places)
    scores = gradient_scores(on, DATA) | magnitude_scores(on, kv_masks.moments(model, DATA))
    for name in (*kv_scores.GRADIENTS, "magnitude_global"):
        zero = (scores[name].abs() < 1e-9).nonzero().flatten().tolist()
        assert zero == dead, name
    last = top(-scores["magnitude"], 2)  # ranks within a layer and part: they come first there
    assert set(last.nonzero().flatten().tolist()) <= set(dead)


def test_magnitude_by_hand(tiny):
    """std of a channel, of V times the norm of what its query heads make of it; a pair has both."""
    model = of(tiny, "llama")
    spread = kv_masks.moments(model, DATA)
    for resolution, heads in (("kv", 2), ("query", 4)):
        on = masked(model, DATA, resolution=resolution)
        found = magnitude_scores(on, spread)
        want = np.zeros(on.units.total)
        for layer in range(3):
            w_o = model.bridge.blocks[layer].attn.W_O.numpy()  # [head, d_head, d_model]
            for head in range(heads):
                kv = head if heads == 2 else head // 2
                readers = [2 * kv, 2 * kv + 1] if heads == 2 else [head]
                for c in range(8):
                    want[on.units.k[layer, head, c]] += spread.std.k[layer, 0, 0, kv, c]
                    norm = np.sqrt(np.mean([np.sum(w_o[h, c] ** 2) for h in readers]))
                    want[on.units.v[layer, head, c]] += spread.std.v[layer, 0, 0, kv, c] * norm
        np.testing.assert_allclose(found["magnitude_global"], want, rtol=1e-4)
        table = on.units.table().assign(score=want, rank=found["magnitude"].numpy())
        for _, members in table.groupby(["layer", "part"]):
            share = members.score.rank(method="first").sub(1) / (len(members) - 1)
            np.testing.assert_allclose(members["rank"], share, atol=1e-6)


def test_labels_come_from_the_models_distribution():
    p = torch.tensor([0.5, 0.3, 0.0, 0.2])
    drawn = kv_scores._draw(p.log().expand(20_000, -1), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert share[2] == 0 and (share - p).abs().max() < 0.015


def test_drawn_predictions_are_counted_ones_and_no_more_than_asked():
    counted = torch.rand(6, 30, generator=torch.Generator().manual_seed(1)) < 0.4
    often = torch.zeros(6, 30)
    for seed in range(300):
        row, pos = drawn(counted, 5, torch.Generator().manual_seed(seed))
        assert counted[row, pos].all()
        assert torch.bincount(row, minlength=6).tolist() == counted.sum(1).clamp(max=5).tolist()
        often[row, pos] += 1
    rates = often[0][counted[0]] / 300 / (5 / counted[0].sum())
    assert rates.min() > 0.7 and rates.max() < 1.3  # each as likely as the others
    row, pos = drawn(counted, 99, torch.Generator())
    assert torch.equal(torch.stack([row, pos], 1), counted.nonzero())


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_masks_have_exactly_the_asked_size(sparsity):
    """Also where all scores are alike."""
    units = make_units(3, 2, torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))
    kept = n_kept(units, sparsity)
    assert kept == round((1 - sparsity) * 72) == {0.5: 36, 0.8: 14, 0.95: 4}[sparsity]
    scores = torch.randn(72, generator=torch.Generator().manual_seed(0))
    for order in (scores, torch.zeros(72), kv_scores.random_scores(units, 0), (scores > 0).float()):
        mask = top(order, kept)
        assert mask.sum() == kept and set(mask.tolist()) == {0, 1}
        assert order[mask.bool()].min() >= order[~mask.bool()].max()
    assert top(torch.zeros(72), kept).nonzero().flatten().tolist() == list(range(kept))
    ranks = kv_scores.ranks(scores)
    assert (ranks.min(), ranks.max()) == (0, 1) and torch.equal(ranks.argsort(), scores.argsort())


def test_random_orders_are_permutations_by_seed():
    units = make_units(3, 2, torch.arange(8))
    one, again, other = (kv_scores.random_scores(units, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert sorted(one.tolist()) == list(range(units.total))
