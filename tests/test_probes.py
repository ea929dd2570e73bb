"""Batched probes against scikit-learn, their scores against closed forms and hand computations."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ARCHS
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lens_utils import probe_readings, probe_scores, probes
from lens_utils.errors import BadInput, Failure
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec


@pytest.fixture(scope="module")
def problems():
    """Two groups of anisotropic states far from zero; labels from easy to noise; masked rows."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=source)

    spread = torch.logspace(1, -2, 12)
    states = (
        20 * normal(2, 1, 12) + (normal(2, 240, 12) * spread) @ torch.linalg.qr(normal(12, 12)).Q
    )
    score = states[0] @ normal(12)
    easy = score > score.median()
    hard = (score + 3 * score.std() * normal(240)) > score.median()
    rare = score > score.quantile(0.9)
    labels = torch.stack([easy, hard, rare, normal(240) > 0])
    taken = torch.stack([torch.arange(240) % 3 != k for k in range(4)])  # one holds out nothing
    return states, labels, taken


@pytest.mark.parametrize("penalty", [0.5, 1.0, 30.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_probes_are_those_of_scikit_learn(problems, penalty, weighted):
    states, labels, taken = problems
    weight = probes.balanced(labels, taken) if weighted else taken.float()
    found = probes.fit(states, labels, weight, penalty, tolerance=1e-6)
    logits = found.logits(states)
    assert float(found.gradient.max()) <= 1e-6
    for g, p in np.ndindex(2, 4):
        x, y, w = states[g].numpy(), labels[p].numpy(), weight[p].numpy()
        rows = w > 0
        scaler = StandardScaler().fit(x[rows], sample_weight=w[rows])
        model = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)
        model.fit(scaler.transform(x[rows]), y[rows], sample_weight=w[rows])
        expected = model.decision_function(scaler.transform(x))
        np.testing.assert_allclose(logits[g, p], expected, atol=3e-2 * np.abs(expected).max())
        np.testing.assert_allclose(
            found.scaled[g, p], model.coef_[0], atol=3e-2 * np.abs(model.coef_).max()
        )

        def objective(z, v):
            loss = np.logaddexp(0, np.where(y, -z, z)) @ w  # noqa: B023
            return loss + penalty / 2 * (v**2).sum()

        ours = objective(logits[g, p].double().numpy(), found.scaled[g, p].double().numpy())
        assert ours == pytest.approx(objective(expected, model.coef_[0]), rel=1e-5)


def test_held_out_rows_have_no_say(problems):
    states, labels, taken = problems
    changed = states.clone()
    changed[:, ~taken[0]] += 100
    some = slice(0, 1)
    one = probes.fit(states, labels[some], taken[some].float())
    other = probes.fit(changed, labels[some], taken[some].float())
    torch.testing.assert_close(one.logits(states), other.logits(states), rtol=0.02, atol=0.02)


def test_a_problem_is_solved_alike_alone_and_among_others(problems, monkeypatch):
    states, labels, taken = problems
    weight = taken.float()
    together = probes.fit(states, labels, weight, tolerance=1e-6)
    monkeypatch.setitem(probes.FLOATS, "cpu", 1)  # one group and one problem at a time
    alone = probes.fit(states, labels, weight, tolerance=1e-6)
    torch.testing.assert_close(together.scaled, alone.scaled, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(together.bias, alone.bias, rtol=1e-2, atol=2e-2)


def test_more_features_than_rows_and_constant_features():
    source = torch.Generator().manual_seed(1)
    states = torch.randn(1, 40, 90, generator=source)
    states[..., 3] = 7.0
    labels = states[0, :, 0] > 0
    found = probes.fit(states, labels[None], torch.ones(1, 40))
    assert ((found.logits(states)[0, 0] > 0) == labels).all()
    assert float(found.weights[0, 0, 3]) == 0


def test_nothing_to_read_gives_no_direction():
    labels = torch.tensor([True, False] * 10)[None]
    found = probes.fit(torch.full((1, 20, 4), 3.3), labels, torch.ones(1, 20))
    assert float(found.scaled.abs().max()) == 0
    assert float(found.logits(torch.full((1, 20, 4), 3.3)).abs().max()) < 1e-3


def test_one_class_is_refused_and_known_beforehand(problems):
    states, labels, _ = problems
    weight = torch.stack([labels[0], ~labels[0], torch.ones(240, dtype=torch.bool)]).float()
    same = labels[[0, 0, 0]]
    assert probes.learnable(same, weight).tolist() == [False, False, True]
    with pytest.raises(BadInput, match="both classes"):
        probes.fit(states, same, weight)


def test_no_convergence_is_said(problems, monkeypatch):
    states, labels, taken = problems
    monkeypatch.setattr(sys.modules["lens_utils.probes"], "MOST", 2)
    with pytest.raises(Failure, match="did not converge in 2 steps"):
        probes.fit(states, labels, taken.float())
    with pytest.raises(BadInput, match="finite"):
        probes.fit(states * float("nan"), labels, taken.float())


def test_balanced_weights_are_scikit_learns():
    labels = torch.tensor([[True, False, False, False, True, True]])
    taken = torch.tensor([[True, True, True, True, False, False]])
    found = probes.balanced(labels, taken)[0]
    from sklearn.utils.class_weight import compute_sample_weight

    expected = compute_sample_weight("balanced", labels[0, :4].numpy())
    np.testing.assert_allclose(found, [*expected, 0, 0])


def test_folds_keep_mazes_together_and_are_even():
    groups = np.repeat([f"m{i}" for i in range(10)], 3)
    found = probes.folds(groups, 4)
    assert all(len(set(found[groups == g])) == 1 for g in groups)
    assert sorted(np.bincount(found) // 3) == [2, 2, 3, 3]
    assert (probes.folds(groups, 4, seed=1) != found).any()
    with pytest.raises(BadInput, match="10 mazes cannot be divided into 11 folds"):
        probes.folds(groups, 11)


def test_online_blocks_double():
    assert probes.online_blocks(30) == [(0, 4), (4, 8), (8, 16), (16, 30)]
    assert probes.online_blocks(16) == [(0, 4), (4, 8), (8, 16)]
    assert probes.online_blocks(3)[0] == (0, 4)


# Scores


@pytest.fixture(scope="module")
def predictions():
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.25
    logits = np.round(2 * labels - 1 + 2 * rng.normal(size=300), 1)  # with ties
    return labels, logits


def test_standard_scores_are_scikit_learns(predictions):
    labels, logits = predictions
    weight = probe_scores.balance(labels, np.ones(300, dtype=bool))
    said, found = logits > 0, probe_scores.standard(labels, logits)
    expected = {
        "accuracy": metrics.balanced_accuracy_score(labels, said),
        "precision": metrics.precision_score(labels, said, sample_weight=weight),
        "recall": metrics.recall_score(labels, said),
        "f1": metrics.f1_score(labels, said, sample_weight=weight),
        "auc": metrics.roc_auc_score(labels, logits),
        "n": 300,
    }
    assert found == pytest.approx(expected)
    holes = np.concatenate([logits, [np.nan, np.nan]])
    assert probe_scores.standard(np.concatenate([labels, [True, False]]), holes) == found
    assert math.isnan(probe_scores.standard(labels[labels], logits[labels])["auc"])


def test_intervals_resample_whole_clusters():
    """Rows of a cluster are copies: the interval must not shrink with their number."""
    rng = np.random.default_rng(3)
    labels, right = np.arange(60) % 2 == 0, (rng.random(60) < 0.7).astype(float)
    maze = np.arange(60) // 2
    one = probe_scores.intervals(labels, right[None], maze)
    many = probe_scores.intervals(np.repeat(labels, 9), np.repeat(right, 9)[None],
                                  np.repeat(maze, 9))  # fmt: skip
    np.testing.assert_allclose(one, many)
    low, high = probe_scores.interval(one)
    spread = math.sqrt(np.mean([right[labels].var() / 30, right[~labels].var() / 30]) / 2)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * spread, rel=0.2)
    holes = np.where(np.arange(60) < 20, np.nan, right)
    assert np.mean(probe_scores.intervals(labels, holes[None], maze)) == pytest.approx(
        (right[20:][labels[20:]].mean() + right[20:][~labels[20:]].mean()) / 2, abs=0.02
    )


def test_confidence_by_hand():
    labels = np.array([True, True, False, False])
    p = np.array([0.9, 0.4, 0.2, 0.2])
    found = probe_scores.confidence(labels, np.log(p / (1 - p)))
    assert found == pytest.approx({
        "confidence": (0.9 + 0.6 + 0.8 + 0.8) / 4,
        "true_class": (0.9 + 0.4 + 0.8 + 0.8) / 4,
        "when_right": (0.9 + 0.8 + 0.8) / 3,
        "when_wrong": 0.6,
        "ece": (0.1 + 0.6 + 2 * 0.2) / 4,
        "brier": (0.01 + 0.36 + 0.04 + 0.04) / 4,
    })  # fmt: skip


def test_a_calibrated_probe_has_no_calibration_error():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=100_000)
    labels = rng.random(100_000) < 1 / (1 + np.exp(-logits))
    assert probe_scores.confidence(labels, logits)["ece"] < 0.01
    assert probe_scores.confidence(labels, 3 * logits)["ece"] > 0.05, "too sure of itself"
    table = probe_scores.reliability(labels, logits)
    assert table.share.sum() == pytest.approx(1)
    assert (table.confidence - table.accuracy).abs().max() < 0.02


def test_bits_are_minus_log2():
    found = probe_scores.bits(np.array([True, False, True]), np.array([0.0, math.log(3), 800.0]))
    np.testing.assert_allclose(found, [1, 2, 0], atol=1e-12)


def test_saturation_and_top():
    curve = np.array([0.5, 0.7, 0.705, 0.9, 0.895])
    assert (probe_scores.saturation(curve), probe_scores.near_top(curve)) == (1, 3)
    assert probe_scores.saturation(np.array([0.5, 0.6, 0.7])) == 2, "it never stops"
    assert probe_scores.ranked([0.5, 0.9, 0.9, 0.7]) == [1, 2, 3, 0]


def test_components_count_the_planes_of_variation():
    rng = np.random.default_rng(0)
    circle = np.linspace(0, 2 * math.pi, 9)[:8]
    basis = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    flat = np.stack([np.cos(circle), np.sin(circle)], 1) @ basis * np.arange(1, 9)[:, None]
    n, explained, places = probe_scores.components(flat)
    assert n == 2 and explained[:2].sum() == pytest.approx(1), "lengths do not count"
    np.testing.assert_allclose(np.linalg.norm(places[:, :2], axis=1), 1, atol=1e-9)
    from sklearn.decomposition import PCA

    noise = rng.normal(size=(8, 20))
    unit = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    pca = PCA().fit(unit)
    n, explained, _ = probe_scores.components(noise)
    np.testing.assert_allclose(explained, pca.explained_variance_ratio_, atol=1e-12)
    assert n == np.flatnonzero(pca.explained_variance_ratio_.cumsum() >= 0.8)[0] + 1


def test_cosines_and_no_direction():
    weights = np.array([[1.0, 0], [1, 1], [0, 0]])
    found = probe_scores.cosines(weights)
    np.testing.assert_allclose(found[0, :2], [1, math.sqrt(0.5)])
    assert np.isnan(found[2]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe_scores.cosines(weights)


def test_courses_of_errors():
    right = np.array([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [0, 1, 0, 1, 1]]) == 1
    found = {name: rows.tolist() for name, rows in probe_scores.transitions(right, 2).items()}
    assert found == {
        "always_wrong": [0],
        "early_wrong_late_right": [1],
        "early_right_late_wrong": [2],
        "always_right": [3],
    }


def test_dealt_labels_stay_nested_and_belong_to_types():
    rng = np.random.default_rng(0)
    types = np.repeat([f"t{i}" for i in range(8)], 5)
    level = np.repeat(np.arange(8) // 2, 5)
    labels = np.stack([level > 0, level > 1, level > 2])
    dealt = probe_scores.permuted(labels, types, rng)
    assert (dealt[2] <= dealt[1]).all() and (dealt[1] <= dealt[0]).all()
    assert (dealt.sum(1) == labels.sum(1)).all() and (dealt != labels).any()
    assert all(len(set(dealt[1][types == t])) == 1 for t in types)


# States


LENGTHS = (5, 9, 3)


def plain(hf, rows, places):
    """Block outputs and MLP down-projection inputs of a plain model, one prompt at a time."""
    blocks = next(m for m in hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    ends = ("down_proj", "dense_4h_to_h", "mlp.c_proj")
    down = [m for name, m in hf.named_modules() if name.endswith(ends) and "vision" not in name]
    held, means, neurons = {}, [], []
    handles = [block.register_forward_hook(
        lambda m, a, out, n=n: held.update({n: out[0] if isinstance(out, tuple) else out})
    ) for n, block in enumerate(blocks)]  # fmt: skip
    handles.append(blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: held.update({-1: args[0] if args else kwargs["hidden_states"]}),
        with_kwargs=True,
    ))  # fmt: skip
    handles += [m.register_forward_pre_hook(lambda m, args, n=n: held.update({f"mlp{n}": args[0]}))
                for n, m in enumerate(down)]  # fmt: skip
    with torch.no_grad():
        for ids, where in zip(rows, places, strict=True):
            hf(torch.tensor([ids]))
            residual = torch.stack([held[n].reshape(len(ids), -1) for n in range(-1, 3)])
            means.append({name: residual[:, list(at)].mean(1) for name, at in where.items()})
            neurons.append(torch.stack([held[f"mlp{n}"].reshape(len(ids), -1)[-1]
                                        for n in range(3)]))  # fmt: skip
    for handle in handles:
        handle.remove()
    return means, torch.stack(neurons)


@pytest.mark.parametrize("arch", ARCHS)
def test_site_means_and_neurons_are_those_of_plain_hooks(arch, tiny):
    rows = [list(range(3 + n, 3 + 2 * n)) for n in LENGTHS]
    places = [{"last": [n - 1], "span": range(1, n)} for n in LENGTHS]
    means, neurons = plain(tiny(arch), rows, places)
    model = wrap(tiny(arch), None, ModelSpec(arch, arch))
    found = probe_readings.site_means(model, rows, places, range(4), tokens_at_once=18)
    for i, one in enumerate(means):
        for name, expected in one.items():
            torch.testing.assert_close(found[name][i], expected, rtol=1e-4, atol=1e-4)
    chosen = [(2, 5), (0, 1), (2, 40), (1, 0)]
    values = probe_readings.neurons_at_last(model, rows, chosen, tokens_at_once=18)
    expected = torch.stack([neurons[:, layer, n] for layer, n in chosen], 1)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_sites_and_neurons_that_are_not_there(tiny):
    model = wrap(tiny("qwen3"), None, ModelSpec("qwen3", "qwen3"))
    found = probe_readings.site_means(model, [[3, 4], [5]], [{"a": []}, {"a": [0]}], [0, 3])
    assert found["a"][0].isnan().all() and found["a"][1].isfinite().all()
    with pytest.raises(BadInput, match="outside its prompt of 2 tokens"):
        probe_readings.site_means(model, [[3, 4]], [{"a": [2]}], [0])
    with pytest.raises(BadInput, match="no neuron 48 in layer 0"):
        probe_readings.neurons_at_last(model, [[3]], [(0, 48)])


def test_batches_hold_every_row_once_and_keep_to_the_limit():
    lengths = [7, 100, 3, 3, 50, 8]
    found = probe_readings.batches(lengths, 24)
    assert sorted(sum(found, [])) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 24 for b in found)
    assert len(found) == 4
