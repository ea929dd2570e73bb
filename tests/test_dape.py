"""DAPE against hand computation, plain Hugging Face hooks and LAPE's definition; sets ablated."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import ARCHS
from scipy import stats

from lens_utils import dape, neuron_sets
from lens_utils.dape import Draws
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

ROWS = [[5, 9, 11, 7], [3, 8, 2, 40, 41, 6, 17], [30, 31], [12, 5, 5, 60, 9, 22]]
SPANS = [(1, 4), (2, 7), (0, 2), (3, 5)]


def load(hf):
    return wrap(hf, None, ModelSpec("toy", "toy"))


def parts(hf) -> list[tuple]:
    """Of every layer the module whose output is the activation function's input, and the down
    projection, found in the Hugging Face model itself."""
    found = []
    body = getattr(hf, "model", None) or getattr(hf, "gpt_neox", None) or hf.transformer
    body = getattr(body, "language_model", body)
    for block in getattr(body, "layers", None) or body.h:
        mlp = block.mlp
        names = ("gate_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h", "c_fc", "c_proj")
        found.append(tuple(getattr(mlp, n) for n in names if hasattr(mlp, n)))
    return found


@torch.no_grad()
def by_hooks(hf, row: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Activation function's input and down projection's input, [layer, pos, neuron]."""
    pre, post, hooks = [], [], []
    for first, last in parts(hf):
        hooks.append(first.register_forward_hook(lambda m, i, o: pre.append(o[0].clone())))
        hooks.append(last.register_forward_pre_hook(lambda m, i: post.append(i[0][0].clone())))
    hf(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return torch.stack(pre).numpy(), torch.stack(post).numpy()


@pytest.mark.parametrize("arch", ARCHS)
def test_counts_are_those_of_plain_hooks(tiny, arch):
    """Active is gate (or neuron) above zero before the activation function, inside the span."""
    labels = np.array([[0, 1, 0, 1], [1, 1, -1, 0]])
    times = np.array([[1, 1, 1, 1], [2, 1, 7, 3]])
    hf = tiny(arch)
    active = [(by_hooks(hf, row)[0][:, a:b] > 0).sum(1)
              for row, (a, b) in zip(ROWS, SPANS, strict=True)]  # fmt: skip
    draws = {"x": Draws("s", labels, times, 2)}
    found = dape.tally(load(tiny(arch)), ROWS, {"s": SPANS}, draws)["x"]
    for draw in range(2):
        for domain in range(2):
            inside = labels[draw] == domain
            expected = sum(t * a for t, a, i in zip(times[draw], active, inside, strict=True) if i)
            assert np.array_equal(found.counts[draw, domain].numpy(), expected)
            length = sum(t * (b - a) for t, (a, b), i in zip(times[draw], SPANS, inside,
                                                             strict=True) if i)  # fmt: skip
            assert float(found.tokens[draw, domain]) == length
    share = float(found.counts[0].sum() / found.tokens[0].sum() / found.counts[0, 0].numel())
    assert 0.1 < share < 0.9, "neither none nor all"


def test_one_batch_at_a_time_gives_the_same(tiny, monkeypatch):
    draws = {"x": Draws("s", np.array([[0, 1, 0, 1]]), np.ones((1, 4), int), 2)}
    model = load(tiny("qwen3"))
    whole = dape.tally(model, ROWS, {"s": SPANS}, draws)["x"]
    monkeypatch.setattr("lens_utils.dape.HELD", 1)
    assert [len(at) for at, _ in dape.batches(model, ROWS)] == [1, 1, 1, 1]
    alone = dape.tally(model, ROWS, {"s": SPANS}, draws)["x"]
    assert torch.equal(whole.counts, alone.counts)


def test_samples_outside_a_contrast_count_nothing(tiny):
    model = load(tiny("qwen3"))
    some = Draws("s", np.array([[0, -1, 1, -1]]), np.ones((1, 4), int), 2)
    found = dape.tally(model, ROWS, {"s": SPANS}, {"x": some})["x"]
    rows, spans = [ROWS[0], ROWS[2]], [SPANS[0], SPANS[2]]
    both = Draws("s", np.array([[0, 1]]), np.ones((1, 2), int), 2)
    expected = dape.tally(model, rows, {"s": spans}, {"x": both})["x"]
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.tokens, expected.tokens)


def test_attribution_is_activation_times_gradient(tiny):
    """Of the mean logit of the answer's tokens, by autograd on the Hugging Face model."""
    hf = tiny("llama")
    answers = [(2, 4), (4, 7), (1, 2), (5, 6)]
    found = {}
    for at, scores in dape.batches(load(tiny("llama")), ROWS, "attribution", answers):
        for n, i in enumerate(at):
            found[i] = torch.stack([s[n, : len(ROWS[i])] for s in scores])
    for i, (start, end) in enumerate(answers):
        held: list[torch.Tensor] = []
        hooks = [last.register_forward_pre_hook(lambda m, a, held=held: held.append(a[0]))
                 for _, last in parts(hf)]  # fmt: skip
        logits = hf(torch.tensor([ROWS[i]])).logits[0]
        mean = torch.stack([logits[p - 1, ROWS[i][p]] for p in range(start, end)]).mean()
        slopes = torch.autograd.grad(mean, held)
        expected = torch.stack([(x * g).abs()[0] for x, g in zip(held, slopes, strict=True)])
        for h in hooks:
            h.remove()
        torch.testing.assert_close(found[i], expected.detach(), rtol=1e-3, atol=1e-5)


def test_thresholds_are_percentiles_of_the_layer(tiny):
    hf = tiny("qwen3")
    values = [np.abs(by_hooks(hf, row)[1][:, a:b]) for row, (a, b) in zip(ROWS, SPANS, strict=True)]
    pooled = np.concatenate([v.reshape(3, -1) for v in values], axis=1)
    found = dape.thresholds(load(tiny("qwen3")), ROWS, SPANS, 10.0, "product")
    np.testing.assert_allclose(found.numpy(), np.quantile(pooled, 0.9, axis=1), rtol=1e-4)
    draws = {"x": Draws("s", np.zeros((1, 4), int), np.ones((1, 4), int), 1)}
    counted = dape.tally(load(tiny("qwen3")), ROWS, {"s": SPANS}, draws, "product", found)["x"]
    expected = (pooled > found.numpy()[:, None]).sum(1)
    assert np.array_equal(counted.counts[0, 0].sum(-1).numpy(), expected)


# The measure


def test_dape_by_hand():
    """Three tokens of three, one of three, none of eight: (3.5/4, 1.5/4, 0.5/9)."""
    counts = torch.tensor([3.0, 1.0, 0.0])[:, None, None]
    rate = dape.rates(counts, torch.tensor([3.0, 3.0, 8.0]))
    p = np.array([3.5 / 4, 1.5 / 4, 0.5 / 9])
    assert torch.allclose(rate.flatten().double(), torch.from_numpy(p))
    assert float(dape.dape(rate)) == pytest.approx(stats.entropy(p), rel=1e-5)


def test_bounds_zero_and_ln_n():
    n = 6
    even = torch.full((n, 1, 1), 0.3)
    one = torch.zeros(n, 1, 1)
    one[2] = 0.9
    assert float(dape.dape(even)) == pytest.approx(np.log(n), rel=1e-6)
    assert float(dape.dape(one)) == 0
    values = dape.dape(torch.rand(n, 4, 50, generator=torch.Generator().manual_seed(0)))
    assert ((values > 0) & (values < np.log(n))).all()


def test_a_neuron_seen_active_once_is_no_specialist():
    """Without Jeffreys' prior its DAPE would be zero."""
    counts = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    value = dape.dape(dape.rates(counts, torch.full((3,), 500.0)))
    assert float(value) > dape.uneven(3, 4.0)


@pytest.mark.parametrize(("n", "times"), [(3, 2.0), (6, 2.0), (2, 3.0)])
def test_the_floor_is_one_domain_at_so_many_times_the_rate(n, times):
    p = np.array([times] + [1] * (n - 1)) / (times + n - 1)
    assert dape.uneven(n, times) == pytest.approx(-(p * np.log(p)).sum())


def test_lape_selects_as_its_script_does():
    rng = np.random.default_rng(0)
    rate = rng.beta(1, 3, (3, 4, 100))
    found = dape.lape(torch.from_numpy(rate), percent=2.0).numpy()
    limit = np.quantile(rate, 0.95)
    p = rate / rate.sum(0)
    entropy = -(p * np.log(p)).sum(0)
    entropy[~(rate > limit).any(0)] = np.inf
    lowest = np.argsort(entropy.ravel())[:8]
    assert set(np.flatnonzero(found.ravel())) == set(lowest)


# Draws


def drawn(n_shuffles=50, n_resamples=20):
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(20), 6)
    label = np.concatenate([rng.permutation([0, 0, 1, 1, 2, -1]) for _ in range(20)])
    cluster = np.array([f"m{i // 2:02d}" for i in group])
    return dape.draws(label, group, cluster, "s", n_shuffles, n_resamples), label, group, cluster


def test_labels_are_shuffled_within_groups_only():
    found, label, group, _ = drawn()
    assert np.array_equal(found.label[0], label)
    for draw in found.label[1:51]:
        assert ((draw == -1) == (label == -1)).all()
        for g in range(20):
            assert sorted(draw[group == g]) == sorted(label[group == g])
    assert len({tuple(d) for d in found.label[:51]}) == 51
    assert (found.times[:51] == 1).all()
    moved = (found.label[1:51] != label)[:, label >= 0].mean()
    # Of five samples labelled 0 0 1 1 2, one keeps its label with probability (2*2+2*2+1)/25.
    assert moved == pytest.approx(1 - 9 / 25, abs=0.03)


def test_clusters_are_resampled_whole_and_halved():
    found, label, _, cluster = drawn()
    for times in found.times[51:71]:
        per_cluster = [set(times[cluster == c]) for c in np.unique(cluster)]
        assert all(len(held) == 1 for held in per_cluster)
        assert sum(min(held) for held in per_cluster) == len(per_cluster)
    assert (found.label[51:] == label).all()
    one, other = found.times[-2:]
    assert ((one + other) == 1).all() and len(np.unique(cluster[one == 1])) == 5


def test_p_is_uniform_when_labels_mean_nothing():
    """Counts drawn without regard to the label: Kolmogorov and Smirnov find nothing."""
    rng = np.random.default_rng(2)
    n, k = 90, 400
    group, label = np.repeat(np.arange(30), 3), np.tile([0, 1, 2], 30)
    found = dape.draws(label, group, group, "s", 199)
    active = rng.binomial(10, rng.uniform(0.2, 0.8, k), (n, k))
    onehot = (found.label[:200, None] == np.arange(3)[:, None]).astype(float)
    counts = torch.from_numpy(onehot @ active).float()[:, :, None]
    entropies = dape.all_dapes(dape.Tally(counts, torch.full((200, 3), 300.0)))
    p = dape.p_values(entropies).numpy().ravel()
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert float(dape.q_values(torch.from_numpy(p)[None].float()).min()) > 0.05
    # And a neuron that follows the label has the smallest p there is.
    counts[0, :, 0, 0] = torch.tensor([300.0, 0.0, 0.0])
    assert float(dape.p_values(dape.all_dapes(dape.Tally(
        counts, torch.full((200, 3), 300.0))))[0, 0]) == pytest.approx(1 / 200)  # fmt: skip


def test_a_planted_neuron_is_found_and_only_that(tiny):
    """Its gate reads a coordinate that only one domain's tokens have positive."""
    hf = tiny("qwen3")
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.gate_proj.weight[:, 0] = 0
            block.mlp.up_proj.weight[:, 0] = 0
            block.mlp.down_proj.weight[0] = 0
        table = hf.model.embed_tokens.weight
        table[6] = table[5]
        table[5, 0], table[6, 0] = 2.0, -2.0
        first = hf.model.layers[0].mlp
        first.gate_proj.weight[7] = 0
        first.gate_proj.weight[7, 0] = 1
        first.down_proj.weight[:, 7] = 0
        hf.model.layers[0].post_attention_layernorm.weight[0] = 1
    label = np.tile([0, 1, 2], 10)
    rows = [[9, 11, *[5 if d == 1 else 6] * 4] for d in label]
    draws = {"x": dape.draws(label, np.repeat(np.arange(10), 3), np.arange(30), "s", 499)}
    found = dape.tally(load(hf), rows, {"s": [(2, 6)] * 30}, draws)["x"]
    entropies = dape.all_dapes(found)[:500]
    q = dape.q_values(dape.p_values(entropies))
    low = (entropies[0] <= dape.uneven(3)).nonzero().tolist()
    assert low == [[0, 7]]
    p = dape.p_values(entropies)
    assert float(p[0, 7]) == pytest.approx(1 / 500) and (q < 1).any()
    assert int((p < 0.5).sum()) == 1, "nothing else differs at all"


# Bad input


def test_bad_input_is_one_line(tiny):
    model = load(tiny("qwen3"))
    one = Draws("s", np.zeros((1, 3), int), np.ones((1, 3), int), 1)
    with pytest.raises(BadInput, match="labels of 3 samples"):
        dape.tally(model, ROWS, {"s": SPANS}, {"x": one})
    with pytest.raises(BadInput, match="percentile 40"):
        dape.lape(torch.rand(3, 2, 5), percent=40.0)
    with pytest.raises(BadInput, match="activation-threshold 100"):
        dape.thresholds(model, ROWS, SPANS, 100.0, "product")


# Sets taken away


def logp_of(hf, row, start, end) -> float:
    with torch.no_grad():
        logp = hf(torch.tensor([row])).logits[0].log_softmax(-1)
    return sum(float(logp[p - 1, row[p]]) for p in range(start, end))


def without(gone, new, start, module, args):
    """A plain hook: the chosen inputs of the down projection are replaced from a position on."""
    x = args[0].clone()
    x[:, start:, gone] = new[gone]
    return (x,)


ANSWERS = [(2, 4), (4, 7), (1, 2), (5, 6)]


@pytest.mark.parametrize("arch", ARCHS)
def test_answers_without_neurons_are_those_of_plain_hooks(tiny, arch):
    model, hf = load(tiny(arch)), tiny(arch)
    begin = [1, 3, 0, 2]
    asked = neuron_sets.Asked(model, ROWS, ANSWERS, begin)
    plain = asked.logp()
    expected = [logp_of(hf, row, *a) for row, a in zip(ROWS, ANSWERS, strict=True)]
    np.testing.assert_allclose(plain, expected, atol=2e-4)
    width = parts(hf)[0][1].weight.shape
    width = width[0] if arch == "gpt2" else width[1]
    gone = torch.zeros(3, width, dtype=torch.bool)
    gone[0, :9], gone[2, 3:30] = True, True
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    for fill in (None, values):
        new = torch.zeros(3, width) if fill is None else fill
        expected = []
        for row, answer, start in zip(ROWS, ANSWERS, begin, strict=True):
            hooks = [last.register_forward_pre_hook(partial(without, gone[n], new[n], start))
                     for n, (_, last) in enumerate(parts(hf))]  # fmt: skip
            expected.append(logp_of(hf, row, *answer))
            for h in hooks:
                h.remove()
        found = asked.logp(gone, fill)
        np.testing.assert_allclose(found, expected, atol=2e-4)
        assert np.abs(found.numpy() - plain.numpy()).max() > 1e-3
    nothing = torch.zeros_like(gone)
    assert torch.equal(asked.logp(nothing, values), plain)
    with pytest.raises(BadInput, match="before the answer begins"):
        neuron_sets.Asked(model, ROWS, ANSWERS, [1, 4, 0, 2])


def test_means_are_over_the_tokens_of_the_spans(tiny):
    hf = tiny("qwen3")
    held = [by_hooks(hf, row)[1][:, a:b] for row, (a, b) in zip(ROWS, SPANS, strict=True)]
    expected = np.concatenate(held, axis=1).mean(1)
    found = neuron_sets.means(load(tiny("qwen3")), ROWS, SPANS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_random_sets_keep_layers_and_rates_and_avoid_the_chosen():
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(4, 300, generator=generator)
    chosen = torch.zeros(4, 300, dtype=torch.bool)
    chosen[0, rate[0].argsort()[-12:]] = True
    chosen[3, :5] = True
    barred = torch.zeros_like(chosen)
    barred[1:, 200:] = True
    sets = neuron_sets.matched(chosen, rate, barred, 30, seed=1)
    assert sets.shape == (30, 4, 300)
    assert (sets.sum(2) == chosen.sum(1)).all()
    assert not (sets & (chosen | barred)).any()
    assert len({tuple(s.nonzero().flatten().tolist()) for s in sets}) == 30
    for drawn_set in sets:
        assert abs(float(rate[0][drawn_set[0]].mean() - rate[0][chosen[0]].mean())) < 0.12
    with pytest.raises(BadInput, match="160 neurons are chosen and 140 are left"):
        many = torch.zeros_like(chosen)
        many[0, :160] = True
        neuron_sets.matched(many, rate, torch.zeros_like(chosen), 1)
