"""One pass in batches, against the same figures from the whole matrix of activations."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lens_utils import feature_labels, feature_spans, feature_stats
from lens_utils.feature_stats import AFTER, BEFORE

F, K, ROWS, LENGTH = 30, 4, 40, 25
N = ROWS * LENGTH


@pytest.fixture(scope="module")
def codes():
    draw = torch.Generator().manual_seed(0)
    pre = torch.randn(N, F, generator=draw) + torch.linspace(-3, 1, F)
    values, indices = pre.topk(K, dim=1)
    return values.relu(), indices


@pytest.fixture(scope="module")
def dense(codes):
    return torch.zeros(N, F).scatter(1, codes[1], codes[0])


def gathered(codes, sizes=None, batch=7):
    token = torch.arange(N)
    row, pos = token // LENGTH, token % LENGTH
    kept, held, span = pos > 0, row % 2 == 1, token % 3 - 1
    pool = feature_stats.choose_pool(row, held, 100, 0)
    found = feature_stats.Collector(F, {"label": 2}, pool, 0, sizes)
    for start in range(0, ROWS, batch):
        at = kept & (row >= start) & (row < start + batch)
        found.add(codes[0][at], codes[1][at], token[at], row[at], pos[at], held[at],
                  {"label": span[at]})  # fmt: skip
    return found, found.result()


def test_sums_are_those_of_the_whole_matrix(codes, dense):
    collector, found = gathered(codes)
    token = torch.arange(N)
    z = dense[token % LENGTH > 0]
    assert collector.tokens == len(z)
    torch.testing.assert_close(found["count"], (z > 0).sum(0).double())
    torch.testing.assert_close(found["total"], z.double().sum(0))
    torch.testing.assert_close(found["squares"], (z.double() ** 2).sum(0))
    pos = (token % LENGTH)[token % LENGTH > 0]
    torch.testing.assert_close(found["position"], ((z > 0) * pos[:, None]).sum(0).double())
    for code in (0, 1):
        inside = (token % 3 - 1 == code)[token % LENGTH > 0]
        torch.testing.assert_close(found["span/label"][:, code], (z[inside] > 0).sum(0).double())
    for feature in (0, 12, 29):
        counted, _ = np.histogram(z[:, feature][z[:, feature] > 0],
                                  [0, *feature_stats.edges()[1:], np.inf])  # fmt: skip
        assert found["histogram"][feature].tolist() == counted.tolist()


def test_the_strongest_are_the_strongest(codes, dense):
    _, found = gathered(codes)
    dense = dense.clone()
    dense[::LENGTH] = 0
    values, tokens = dense.topk(feature_stats.SIZES["top"], dim=0)
    torch.testing.assert_close(found["top/value"], values.T)
    there = values.T > 0
    assert (found["top/token"][there] == tokens.T[there]).all()
    assert (found["top/token"][~there] == -1).all() and (~there).sum() > 0
    for sample in ("spread", "fit"):
        kept, fires = (found[f"{sample}/token"] >= 0).sum(1), (dense > 0).sum(0)
        assert (kept <= fires).all() and (kept[fires == 0] == 0).all()


def test_surroundings_are_the_values_around(codes, dense):
    _, found = gathered(codes)
    dense = dense.clone()
    dense[::LENGTH] = 0  # the first of every row is left out of the stream
    for feature, place in ((f, n) for f in (20, 25, 29) for n in range(8)):
        token = int(found["top/token"][feature, place])
        start, end = token // LENGTH * LENGTH, (token // LENGTH + 1) * LENGTH
        expected = [dense[t, feature] if start <= t < end else 0.0
                    for t in range(token - BEFORE, token + AFTER + 1)]  # fmt: skip
        torch.testing.assert_close(
            found["top/around"][feature, place].float(), torch.tensor(expected), atol=2e-3, rtol=0
        )


def test_samples_are_drawn_from_all_fires_alike(codes, dense):
    """How often each of a feature's fires is kept, over many seeds, whatever the batches."""
    token, kept = torch.arange(N), torch.arange(N) % LENGTH > 0
    times = torch.zeros(N)
    for seed in range(20):
        found = feature_stats.Collector(F, {}, torch.zeros(0, dtype=torch.long), seed,
                                        {"spread": 8, "test": 4})  # fmt: skip
        for part in token[kept].split(500):
            found.add(codes[0][part], codes[1][part], part, part // LENGTH, part % LENGTH,
                      part // LENGTH % 2 == 1, {})  # fmt: skip
        drawn = found.result()
        times[drawn["spread/token"][29]] += 1
        assert (drawn["test/token"][29] // LENGTH % 2 == 1).all()
    fires = ((dense[:, 29] > 0) & kept).nonzero()[:, 0]
    assert times.sum() == times[fires].sum() == 20 * 8
    halves = [float(part.float().mean()) for part in times[fires].chunk(2)]
    assert halves[0] == pytest.approx(halves[1], rel=0.35)


def test_the_pool_has_every_fire_of_its_tokens(codes, dense):
    _, found = gathered(codes)
    row = torch.arange(N) // LENGTH
    pool = feature_stats.choose_pool(row, row % 2 == 1, 100, 0)
    assert len(pool) == 200 and (row[pool] % 2).sum() == 100
    assert (row[pool].unique(return_counts=True)[1] == LENGTH).all()
    rebuilt = torch.zeros(N, F)
    rebuilt[found["pool/token"], found["pool/feature"]] = found["pool/value"]
    expected = torch.zeros(N, F)
    expected[pool] = dense[pool]
    expected[::LENGTH] = 0
    torch.testing.assert_close(rebuilt, expected)


def test_logit_effects(codes):
    draw = torch.Generator().manual_seed(2)
    W_dec, W_U = torch.randn(5, 6, generator=draw), torch.randn(6, 50, generator=draw)
    effects, ids = feature_stats.logit_effects(W_dec, W_U, 3, part=2)
    whole = W_dec @ (W_U - W_U.mean(1, keepdim=True))
    order = whole.argsort(1, descending=True)
    assert ids.tolist() == torch.cat([order[:, :3], order.flip(1)[:, :3]], 1).tolist()
    torch.testing.assert_close(effects, whole.gather(1, ids))


def test_the_feature_of_a_span_is_found_and_moved_labels_have_none():
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(100), 40)
    at = np.tile(np.arange(40), 100)
    start = np.repeat(rng.integers(5, 30, 100), 40)
    codes = np.where((at >= start) & (at < start + 6), 1, 0)
    values = np.where(rng.random((4000, 20)) < 0.2, rng.random((4000, 20)) + 0.1, 0)
    values[:, 7] = np.where((codes == 1) & (rng.random(4000) < 0.9), 1 + rng.random(4000), 0)
    pool = feature_labels.all_fires(values, np.broadcast_to(np.arange(20), values.shape))
    held = row % 2 == 1
    found = feature_spans.best_of_each(pool, held, row, codes, ["other", "back"], 20, 39)
    best = feature_spans.of_all(found.assign(layer=3)).set_index("span").loc["back"]
    assert (best.feature, best.layer, best.p) == (7, 3, 1 / 40)
    assert best.auroc == pytest.approx(roc_auc_score(codes[held] == 1, values[held, 7]))
    assert abs(best.null - 0.5) < 0.05 and best.null_fitted > 0.5
    without = feature_labels.all_fires(np.delete(values, 7, 1), np.broadcast_to(
        np.arange(19), (4000, 19)))  # fmt: skip
    noise = feature_spans.best_of_each(without, held, row, codes, ["other", "back"], 19, 39)
    assert feature_spans.of_all(noise.assign(layer=0)).set_index("span").p["back"] > 0.1


def test_moving_keeps_every_rows_labels():
    row, codes = np.array([0, 0, 0, 1, 1, 2]), np.array([5, 6, 7, 8, 9, 1])
    found = feature_spans.moved(codes, row, np.random.default_rng(1))
    for n in range(3):
        mine, before = found[row == n].tolist(), codes[row == n].tolist()
        assert mine in [before[k:] + before[:k] for k in range(len(before))]
