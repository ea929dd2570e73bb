"""Concepts per token: against scikit-learn, SciPy, explicit loops and plain models."""

import importlib
import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHS
from scipy import stats
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import roc_auc_score

from lens_utils import concepts, provenance
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec


@pytest.fixture
def made():
    """Tokens of 6 cells in 40 mazes: unit 1 carries concept 0, unit 2 is the cell, unit 4 dead."""
    generator = torch.Generator().manual_seed(1)
    stratum = torch.arange(6).repeat(40)
    cluster = torch.arange(40).repeat_interleave(6)
    rate = torch.tensor([0.2, 0.5, 0.8, 0.5, 0.3, 0.6])[stratum]
    y = torch.rand(240, 2, generator=generator) < rate[:, None]
    x = torch.randn(240, 5, generator=generator)
    x[:, 1] += 1.5 * y[:, 0]
    x[:, 2] = stratum + 0.01 * x[:, 2]
    x[:, 4] = 3
    return x, y, stratum, cluster


def dummies(stratum):
    return np.eye(int(stratum.max()) + 1)[stratum.numpy()]


def test_difference_is_regression_with_a_constant_for_every_cell(made):
    x, y, stratum, cluster = made
    found = concepts.contrast(x, y, stratum, cluster)
    for concept, unit in itertools.product(range(2), range(5)):
        features = np.column_stack([y[:, concept].numpy(), dummies(stratum)])
        fit = LinearRegression(fit_intercept=False).fit(features, x[:, unit].numpy())
        assert float(found.difference[concept, unit]) == pytest.approx(fit.coef_[0], abs=1e-4)
        left = x[:, unit].numpy() - fit.predict(features)
        spread = np.sqrt((left**2).sum() / (240 - 6 - 1))
        if unit != 4:
            assert float(found.d[concept, unit]) == pytest.approx(fit.coef_[0] / spread, rel=1e-2)
    assert found.d[:, 4].tolist() == [0, 0] and found.p[:, 4].tolist() == [1, 1]
    # The cell's own identity is no concept, although labels are commoner in some cells.
    assert found.p[0, 1] < 1e-6 and found.d[0, 1] > 1 and abs(float(found.d[0, 2])) < 0.5


def test_p_is_clustered_and_uniform_without_a_concept():
    """Standard errors by hand; under the null, with noise shared within mazes, p is uniform."""
    generator = torch.Generator().manual_seed(0)
    stratum, cluster = torch.arange(5).repeat(30), torch.arange(30).repeat_interleave(5)
    shared = torch.randn(30, 400, generator=generator)[cluster]
    x = shared + 0.3 * torch.randn(150, 400, generator=generator)
    y = (torch.rand(30, 1, generator=generator) < 0.5)[cluster]  # of whole mazes: the hard case
    found = concepts.contrast(x, y, stratum, cluster)
    assert stats.kstest(found.p[0].numpy(), "uniform").pvalue > 0.001
    a, b = concepts.within(x, stratum)[:, 7], concepts.within(y.float(), stratum)[:, 0]
    slope = (a * b).sum() / b.square().sum()
    each = torch.stack([(b * (a - slope * b))[cluster == m].sum() for m in range(30)])
    se = (each.square().sum() * 30 / 29).sqrt() / b.square().sum()
    p = 2 * stats.t.sf(abs(float(slope / se)), 29)
    assert float(found.p[0, 7]) == pytest.approx(p, rel=1e-3)


def test_directions_against_scikit_learn(made):
    x, y, stratum, _ = made
    x = x[:, :4]
    mean, fitted = concepts.directions(x, y, stratum, ridge=0.5)
    a, b = concepts.within(x, stratum), concepts.within(y.float(), stratum)
    penalty = 0.5 * float(a.square().sum(0).mean())
    fit = Ridge(alpha=penalty, fit_intercept=False).fit(a.numpy(), b.numpy())
    np.testing.assert_allclose(fitted.numpy(), fit.coef_, rtol=1e-3, atol=1e-5)
    found = concepts.contrast(x, y, stratum, torch.arange(240))
    torch.testing.assert_close(mean, found.difference)


def test_auroc_counts_pairs_of_one_cell(made):
    x, y, stratum, cluster = made
    found = concepts.auroc(x.numpy(), y.numpy(), stratum.numpy())
    for concept, unit in itertools.product(range(2), range(5)):
        wins = pairs = 0
        for cell in range(6):
            here = stratum == cell
            for a, b in itertools.product(
                x[here & y[:, concept], unit], x[here & ~y[:, concept], unit]
            ):
                wins += float(a > b) + 0.5 * float(a == b)
                pairs += 1
        assert found[concept, unit] == pytest.approx(wins / pairs)
    assert found[0, 4] == 0.5
    one = np.zeros(240, dtype=int)
    plain = concepts.auroc(x.numpy()[:, :2], y.numpy(), one)
    assert plain[0, 1] == pytest.approx(roc_auc_score(y[:, 0].numpy(), x[:, 1].numpy()))
    low, high = concepts.auroc_interval(
        x[:, 1].numpy(), y[:, 0].numpy(), stratum.numpy(), cluster.numpy()
    )
    assert low < found[0, 1] < high and 0.03 < high - low < 0.2
    nothing = np.zeros((240, 1), bool)
    assert np.isnan(concepts.auroc(x.numpy()[:, :1], nothing, stratum.numpy())).all()


def test_auroc_interval_resamples_mazes():
    """Against mazes drawn and laid side by side; and every maze twice: as many as before."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=120), rng.random(120) < 0.5
    cell, maze = np.arange(120) % 4, np.arange(120) // 4
    once = concepts.auroc_interval(x, y, cell, maze)
    drawn = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(maze == m) for m in rng.integers(30, size=30)])
        drawn.append(concepts.auroc(x[rows, None], y[rows, None], cell[rows])[0, 0])
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert once[1] - once[0] == pytest.approx(high - low, rel=0.2)
    assert concepts.auroc_interval(np.ones(120), y, cell, maze) == (0.5, 0.5)
    twice = concepts.auroc_interval(
        np.tile(x, 2), np.tile(y, 2), np.concatenate([cell, cell + 4]), np.tile(maze, 2)
    )
    assert once[1] - once[0] == pytest.approx(twice[1] - twice[0], rel=0.15)


def test_shuffled_labels_stay_in_their_cells(made):
    _, y, stratum, _ = made
    mixed = concepts.shuffled(y, stratum, seed=3)
    assert not torch.equal(mixed, y)
    for cell in range(6):
        here = stratum == cell
        assert sorted(mixed[here].tolist()) == sorted(y[here].tolist())
    assert torch.equal(mixed, concepts.shuffled(y, stratum, seed=3))
    assert not torch.equal(mixed, concepts.shuffled(y, stratum, seed=4))


def test_sets_hold_planted_neurons_and_only_those(made):
    x, y, stratum, cluster = made
    found = concepts.contrast(x, y, stratum, cluster)
    d, p = found.d[None].numpy(), found.p[None].numpy()
    assert concepts.neuron_sets(d, p)[0].tolist() == [[False, True, False, False, False],
                                                      [False] * 5]  # fmt: skip
    assert not concepts.neuron_sets(d, p, floor=5.0).any()
    # Many neurons without a concept: the rate of false discoveries is held over all layers.
    rng = np.random.default_rng(0)
    null = rng.random((6, 2, 500))
    assert concepts.neuron_sets(np.ones_like(null), null).mean() < 0.001
    assert (null < 0.05).mean() > 0.04


def downs(plain):
    """The down projections of a plain model's MLPs, whatever it calls them."""
    ends = ("down_proj", "dense_4h_to_h", "mlp.c_proj")
    return [m for n, m in plain.named_modules() if n.endswith(ends) and "vision" not in n]


@pytest.mark.parametrize("arch", ARCHS)
def test_neurons_at_tokens_read_and_silenced(arch, tiny):
    """Rows of three lengths, padded, against a plain model one row at a time; then two neurons set
    to their stratum's value at some tokens, against the same edit before the down projection."""
    model, plain = wrap(tiny(arch), None, ModelSpec(arch, arch)), tiny(arch)
    rows = [[5, 9, 3, 7], [8, 6], [4, 4, 12, 30, 31]]
    at = [[3, 0], [1], [4, 1, 2]]
    name = "blocks.1.mlp.hook_post"
    found = concepts.at_tokens(model, rows, at, [name], batch_size=2)[name]
    held = []
    handle = downs(plain)[1].register_forward_pre_hook(lambda m, args: held.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            plain(torch.tensor([row]))
    handle.remove()
    expected = torch.cat([held[i][p] for i, p in enumerate(at)])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)

    ids = torch.tensor([rows[0]])
    stratum = torch.tensor([[-1, 1, 0, -1]])
    values = torch.tensor([[0.5, -1.0], [2.0, 3.0]])
    write = concepts.silence(torch.tensor([4, 11]), values, stratum)

    def edit(module, args):
        x = args[0].clone()
        x[0, 1, [4, 11]], x[0, 2, [4, 11]] = values[1], values[0]
        return (x,)

    downs(plain)[1].register_forward_pre_hook(edit)
    with torch.no_grad():
        edited = model.bridge.run_with_hooks(ids, fwd_hooks=[(name, write)])
        torch.testing.assert_close(edited, plain(ids).logits, atol=3e-4, rtol=1e-3)


def test_virtual_weights_by_hand(tiny):
    """RMSNorm's gain on what is read; Gemma's second norm on what is written; GPT-2's centring."""
    model, plain = wrap(tiny("qwen3"), None, ModelSpec("q", "q")), tiny("qwen3")
    write = plain.model.layers[0].mlp.down_proj.weight[:, [3, 7]].T
    norm = plain.model.layers[2].post_attention_layernorm.weight
    for reader, module in (("gate", "gate_proj"), ("in", "up_proj")):
        read = getattr(plain.model.layers[2].mlp, module).weight[[1, 2, 40]] * norm
        expected = torch.nn.functional.cosine_similarity(write[:, None], read[None], dim=-1)
        found = concepts.virtual(model, (0, [3, 7]), (2, [1, 2, 40]), reader)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    model, plain = wrap(tiny("gemma2"), None, ModelSpec("g", "g")), tiny("gemma2")
    first, second = plain.model.layers[0], plain.model.layers[1]
    write = first.mlp.down_proj.weight[:, [3]].T * (1 + first.post_feedforward_layernorm.weight)
    read = second.mlp.gate_proj.weight[[1, 2]] * (1 + second.pre_feedforward_layernorm.weight)
    expected = torch.nn.functional.cosine_similarity(write[:, None], read[None], dim=-1)
    found = concepts.virtual(model, (0, [3]), (1, [1, 2]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    model, plain = wrap(tiny("gpt2"), None, ModelSpec("p", "p")), tiny("gpt2")
    write = plain.transformer.h[0].mlp.c_proj.weight[[3]]
    block = plain.transformer.h[1]
    read = block.mlp.c_fc.weight[:, [1, 2]].T * block.ln_2.weight
    read = read - read.mean(-1, keepdim=True)
    expected = torch.nn.functional.cosine_similarity(write[:, None], read[None], dim=-1)
    found = concepts.virtual(model, (0, [3]), (1, [1, 2]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_beyond_is_a_prediction_interval():
    rng = np.random.default_rng(0)
    null = rng.normal(2.0, 3.0, size=(2000, 20))
    t, p = concepts.beyond(rng.normal(2.0, 3.0, size=2000), null)
    assert stats.kstest(p, "uniform").pvalue > 0.001
    by_hand = (20.0 - null[0].mean()) / (null[0].std(ddof=1) * np.sqrt(21 / 20))
    far, small = concepts.beyond(np.array([20.0]), null[:1])
    assert far[0] == pytest.approx(by_hand)
    assert far[0] > 4 and small[0] < 0.001
    assert np.isnan(concepts.beyond(np.array([1.0]), np.ones((1, 5)))[0]).all()


def test_bad_input_is_one_line(made, tiny):
    x, y, stratum, cluster = made
    with pytest.raises(BadInput, match="one label"):
        concepts.contrast(x, torch.ones_like(y), stratum, cluster)
    with pytest.raises(BadInput, match="one label"):
        concepts.directions(x, torch.zeros_like(y), stratum)
    model = wrap(tiny("llama"), None, ModelSpec("l", "l"))
    with pytest.raises(BadInput, match="outside its prompt"):
        concepts.at_tokens(model, [[1, 2]], [[2]], ["hook_embed"])


# The tables of 015, on made-up readings whose answer is known


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(provenance.EXPERIMENTS / "015_concept_circuits"))
    return importlib.import_module("concept_tables")


def test_edges_beyond_random_sets_are_kept_and_only_those(tables):
    rng, rows = np.random.default_rng(0), []
    for target, draw in itertools.product(range(30), range(-1, 20)):
        lost = 0.5 if target == 3 and draw == -1 else 0.02 * rng.normal()
        rows.append({"source": "solution", "layer": 1, "target": f"t{target}", "target_layer": 2,
                     "draw": draw, "clean": 2.0, "lost": lost, "mazes": 5})  # fmt: skip
    found = tables.edges(pd.DataFrame(rows)).set_index("target")
    assert found.index[found.kept].tolist() == ["t3"]
    assert found.share["t3"] == pytest.approx(0.25) and found.draws["t3"] == 20
    assert not len(tables.edges(pd.DataFrame(columns=["draw"])))


def test_sets_are_of_open_cells_concepts_and_capped(tables):
    """Planted: 6 neurons for `solution` in layer 1, of 40; at most a tenth is taken."""
    d = torch.zeros(2, 2, 8, 40)
    p = torch.ones(2, 2, 8, 40)
    at = list(concepts_in_order(tables)).index("solution")
    d[1, 0, at, [3, 5, 7, 9, 11, 13]] = torch.tensor([0.6, -2.0, 0.9, 1.0, 1.2, 0.7])
    p[1, 0, at, [3, 5, 7, 9, 11, 13]] = 1e-9
    d[:, :, 0], p[:, :, 0] = 3.0, 1e-9  # walls: trivial, in no set
    cfg = SimpleNamespace(effect_floor=0.5, largest_set=0.1)
    (found,) = tables.sets({"d": d, "p": p}, cfg)
    assert (found["layer"], found["concept"], found["all"]) == (1, "solution", 6)
    assert found["neurons"] == [5, 11, 9, 7] and found["signs"] == [-1, 1, 1, 1]


def concepts_in_order(tables):
    return tables.CONCEPTS
