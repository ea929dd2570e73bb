"""Detection, fuzzing and intruders on planted features, whose right answers are known."""

import numpy as np
import pytest

from lens_utils import feature_facts, feature_labels, feature_scores
from lens_utils.feature_scores import WIDTH, WINDOWS

WORDS = ["<s>", *"0123456789", "cat", " the", "house", ".", "running", " dog", "a", "b", "c", "d"]
ROWS, LENGTH, F = 80, 49, 6


@pytest.fixture(scope="module")
def planted():
    """Features on one word, on another, after a word, and three without a rule."""
    rng = np.random.default_rng(3)
    ids = rng.choice(len(WORDS), (ROWS, LENGTH), p=_rates()).tolist()
    tokens = feature_facts.make_tokens(ids, [n % 2 == 1 for n in range(ROWS)],
                                       lambda ids: "".join(WORDS[i] for i in ids))  # fmt: skip
    text = np.array([WORDS[i] for i in tokens.ids])
    rules = [text == "house", text == "cat", (np.roll(text, 1) == " dog") & (tokens.pos > 0)]
    noise = rng.random((len(text), 3)) < 0.02
    on = np.concatenate([np.stack(rules, 1), noise], axis=1)
    values = np.where(on, rng.uniform(1, 2, on.shape), 0)
    pool = feature_labels.all_fires(values, np.broadcast_to(np.arange(F), on.shape))
    kinds = feature_facts.facts(tokens)
    fit = pool.where(~tokens.held)
    rules = feature_labels.fit(kinds, feature_labels.strongest(fit.fires, F), fit, F)
    return tokens, kinds, pool.where(tokens.held), rules, on


def _rates():
    rates = np.ones(len(WORDS))
    rates[[WORDS.index(word) for word in ("house", "cat", " dog")]] = 0.4
    return rates / rates.sum()


def trials(planted):
    tokens, _, pool, _, _ = planted
    cut = feature_scores.windows(pool, tokens)
    return feature_scores.detection(pool.fires, cut, range(F), F, np.random.default_rng(0))


def test_windows_lie_within_rows(planted):
    tokens, _, pool, *_ = planted
    cut = feature_scores.windows(pool, tokens)
    assert cut.shape == (ROWS // 2 * 2, WIDTH)
    assert (tokens.row[cut] == tokens.row[cut[:, :1]]).all() and (tokens.pos[cut] > 0).all()
    assert tokens.held[cut].all() and len(np.unique(cut)) == cut.size


def test_positive_windows_have_the_feature_and_negative_ones_do_not(planted):
    *_, on = planted
    for feature, trial in trials(planted).items():
        fires = on[trial.token, feature]
        assert fires[trial.positive].any(1).all() and not fires[~trial.positive].any()
        assert (trial.marked == fires).all()
        assert trial.positive.sum() == (~trial.positive).sum() <= WINDOWS


def test_planted_labels_are_detected_and_noise_is_not(planted):
    tokens, kinds, pool, rules, _ = planted
    found, rng = trials(planted), np.random.default_rng(1)
    detect, fuzz = feature_scores.by_rule(rules, kinds)
    detected = feature_scores.scored(found, detect, rng)
    marked = {f: feature_scores.fuzzing(trial, rng) for f, trial in found.items()}
    fuzzed = feature_scores.scored(marked, fuzz, rng)
    for feature in (0, 1, 2):
        assert detected[feature][0] == 1 and fuzzed[feature][0] == 1
    assert np.mean([detected[f][0] for f in (3, 4, 5)]) < 0.75
    assert abs(np.mean([other for _, other in detected.values()]) - 0.5) < 0.15
    assert abs(np.mean([other for _, other in fuzzed.values()]) - 0.5) < 0.15


def test_fuzzing_marks_as_many_places_elsewhere(planted):
    for trial in trials(planted).values():
        made = feature_scores.fuzzing(trial, np.random.default_rng(0))
        right, wrong = made.marked[made.positive], made.marked[~made.positive]
        assert (right.sum(1) == wrong.sum(1)).all() and not (right & wrong).any()
        assert (made.token[made.positive] == made.token[~made.positive]).all()


def test_intruders_are_spotted_where_a_feature_is_about_one_thing(planted):
    tokens, kinds, pool, _, on = planted
    rng = np.random.default_rng(0)
    found = feature_scores.intruders(pool.fires, range(F), F, rng, n=20)
    for feature, token in found.items():
        assert on[token[:, :-1], feature].all() and not on[token[:, -1], feature].any()
    for feature in (0, 1):
        assert feature_scores.spot(kinds, found[feature]).mean() > 0.8
    mixed = feature_scores.strangers(found, rng)
    assert np.mean([feature_scores.spot(kinds, token).mean() for token in mixed.values()]) < 0.35


def test_a_judge_that_knows_nothing_scores_half(planted):
    same = feature_scores.scored(
        trials(planted), lambda trial, feature: np.zeros(len(trial.token)), np.random.default_rng(0)
    )
    assert set(same.values()) == {(0.5, 0.5)}
