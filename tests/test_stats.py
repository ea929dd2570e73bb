"""Intervals and tests against closed forms."""

import numpy as np
import pytest

from lens_utils import corpus, stats


def test_bootstrap_interval_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(0).normal(2, 3, 4000)
    found = stats.mean_ci(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert found["high"] == pytest.approx(values.mean() + error, abs=0.15 * error)
    assert found["n"] == 4000


def test_clusters_widen_the_interval():
    """Ten copies of each sample are no more evidence than one."""
    values = np.random.default_rng(0).normal(size=30)
    clusters = np.repeat(np.arange(30), 10)
    once, copied = stats.mean_ci(values), stats.mean_ci(np.repeat(values, 10), clusters)
    assert copied == once
    naive = stats.mean_ci(np.repeat(values, 10))
    assert naive["high"] - naive["low"] < 0.5 * (once["high"] - once["low"])


def test_missing_and_constant_values():
    assert stats.mean_ci(np.array([1.0, np.nan, 3.0]))["n"] == 2
    assert stats.mean_ci(np.array([np.nan]))["n"] == 0
    assert stats.mean_ci(np.ones(5)) == {"value": 1, "low": 1, "high": 1, "n": 5}


def test_bands_are_the_intervals_of_each_point():
    table = np.random.default_rng(0).normal(size=(200, 3)) * [1, 2, 4]
    mean, low, high = stats.bands(table)
    error = 1.96 * table.std(0) / np.sqrt(200)
    np.testing.assert_allclose(mean, table.mean(0))
    np.testing.assert_allclose(high - mean, error, rtol=0.2)
    np.testing.assert_allclose(mean - low, error, rtol=0.2)


def test_sign_flips_exactly():
    """Of the 2^5 sign patterns only two have a mean as large as five equal signs."""
    assert stats.sign_flip_p(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 32)
    assert stats.sign_flip_p(np.array([1.0, -1.0, 2.0, -2.0])) == pytest.approx(1)


def test_text_is_english_and_its_parts_are_disjoint():
    docs = corpus.docstrings(20_000)
    assert corpus.digest(docs) == corpus.digest(corpus.docstrings(20_000))
    assert sum(len(doc.text) for doc in docs) >= 20_000
    letters = sum(c.isalpha() or c.isspace() for doc in docs for c in doc.text)
    assert letters > 0.9 * sum(len(doc.text) for doc in docs)
    parts = {split: [d for d in docs if d.split == split] for split in ("fit", "test")}
    assert parts["fit"] and parts["test"]
    # Neither a file nor a copied paragraph is on both sides.
    for what in (lambda d: {d.id.partition(":")[0]}, lambda d: set(d.text.split("\n\n"))):
        fit, test = (set().union(*map(what, parts[split])) for split in ("fit", "test"))
        assert not fit & test
