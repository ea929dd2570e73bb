"""Labels of features: planted ones come back, and every accuracy is what counting by hand gives."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from lens_utils import feature_facts, feature_labels
from lens_utils.errors import BadInput
from lens_utils.feature_labels import Fires, Pool

WORDS = ["<s>", *"0123456789", "cat", " the", " The", "house", ".", "(", "running", "\n", "walking",
         " dog", "a", "b", "c", "d"]  # fmt: skip
N_ROWS, LENGTH = 60, 50


def corpus(seed=0, held=None):
    rng = np.random.default_rng(seed)
    rows = [[0, *rng.integers(1, len(WORDS), LENGTH - 1).tolist()] for _ in range(N_ROWS)]
    held = [n % 2 == 1 for n in range(N_ROWS)] if held is None else held
    half = [["plan" if i < LENGTH // 2 else "check" for i in range(LENGTH)] for _ in rows]
    return feature_facts.make_tokens(
        rows, held, lambda ids: "".join(WORDS[i] for i in ids), {"label": half}
    )


def planted(tokens, seed=0):
    """Codes of ten features, of which seven follow rules and three nothing."""
    rng = np.random.default_rng(seed)
    text = np.array([WORDS[i] for i in tokens.ids])
    before = np.roll(text, 1)
    inside = tokens.pos > 0
    digit = np.array([t.isdigit() for t in text])
    span = np.array(tokens.spans["label"])
    recent = sum(np.roll(text == "cat", n) & (tokens.pos >= n) for n in range(1, 9)) > 0
    rules = [digit, text == "house", inside & (before == "cat"), span == "check",
             np.isin(text, ["running", "walking"]), np.isin(text, ["a", "b"]), recent]  # fmt: skip
    values = np.where(np.stack(rules, 1), rng.uniform(1, 2, (len(text), len(rules))), 0)
    noise = np.where(rng.random((len(text), 3)) < 0.1, rng.uniform(1, 2, (len(text), 3)), 0)
    codes = np.concatenate([values, noise], axis=1)
    return codes, np.broadcast_to(np.arange(10), codes.shape)


@pytest.fixture(scope="module")
def found():
    tokens = corpus()
    kinds = feature_facts.facts(tokens)
    codes, indices = planted(tokens)
    pool = feature_labels.all_fires(codes, indices)
    return tokens, kinds, codes, pool, feature_labels.explain(tokens, kinds, pool.fires, pool, 10)


def test_planted_features_come_back_by_name(found):
    *_, frame = found
    labels = frame.label[:7].tolist()
    assert labels == [
        "on a number", 'on "house"', 'right after "cat"', "in check (label)",
        'on words that end in "ing"', labels[5], 'among the 8 tokens after "cat"',
    ]  # fmt: skip
    assert sorted(labels[5].removeprefix("on ").split(" or ")) == ['"a"', '"b"']
    assert (frame.accuracy[:7] >= 0.95).all() and (frame.auroc[:7] >= 0.95).all()
    assert (frame.recall[:7] == 1).all()


def test_noise_gets_no_label_that_holds(found):
    *_, frame = found
    assert frame.label[7:].str.startswith("unclear").all()
    assert ((frame.accuracy[7:] - 0.5).abs() < 0.08).all()


def test_labels_of_other_features_reach_chance(found):
    *_, frame = found
    assert abs(frame.shuffled.mean() - 0.5) < 0.06
    assert (frame.shuffled[:7] < frame.accuracy[:7] - 0.3).all()


def test_accuracy_is_counted_by_hand(found):
    """Digits: the upper half of the held-out fires, against held-out tokens where it is silent."""
    tokens, kinds, codes, pool, frame = found
    digits = np.array([WORDS[i].isdigit() for i in tokens.ids])
    rng = np.random.default_rng(1)
    noisy = codes.copy()
    noisy[rng.random(len(codes)) < 0.3, 0] = 0  # silent at some digits
    noisy[(rng.random(len(codes)) < 0.1) & ~digits, 0] = 5  # strongest elsewhere
    pool = feature_labels.all_fires(noisy, np.broadcast_to(np.arange(10), codes.shape))
    row = feature_labels.explain(tokens, kinds, pool.fires, pool, 10).iloc[0]
    assert row.label == "on a number"
    value, test = noisy[:, 0], tokens.held
    least = np.sort(value[test & (value > 0)])[::-1][: int(row.n_held)].min()
    counted = test & ((value >= least) | (value == 0))
    expected = balanced_accuracy_score(value[counted] > 0, digits[counted])
    assert row.accuracy == pytest.approx(expected, abs=1e-12)
    assert row.precision == pytest.approx((value[test & digits] > 0).mean(), abs=1e-12)
    assert row.n_held == np.ceil((test & (value > 0)).sum() / 2)
    assert row.auroc == pytest.approx(roc_auc_score(digits[test], value[test]), abs=1e-12)


def test_the_best_set_is_found(found):
    """Against every single value of every kind, tried one by one."""
    tokens, kinds, codes, pool, _ = found
    fit = pool.where(~tokens.held)
    strong = feature_labels.strongest(fit.fires, 10)
    rules = feature_labels.fit(kinds, strong, fit, 10)
    for feature in (0, 1, 2, 6):
        yes = strong.token[strong.feature == feature]
        no = fit.token[codes[fit.token, feature] == 0]
        best = max(
            (0.5 + ((kind.codes[yes] == v).any(1).mean() - (kind.codes[no] == v).any(1).mean()) / 2)
            for kind in kinds for v in range(len(kind.values))
        )  # fmt: skip
        assert rules.fitted[feature] == pytest.approx(best, abs=1e-12)


def test_ties_share_their_rank():
    value = np.array([0, 0, 1, 1, 2, 0, 1, 3.0])
    label = np.array([0, 1, 0, 1, 1, 0, 0, 1], dtype=bool)
    pool = feature_labels.all_fires(value[:, None], np.zeros((8, 1), dtype=int))
    weight, base = feature_labels.ranks(pool.fires, 8, 1)
    total = base[0] * label.sum() + weight[label[pool.fires.token]].sum()
    found = feature_labels.auroc(np.array([total]), np.array([label.sum()]), 8)
    assert found[0] == pytest.approx(roc_auc_score(label, value))


def test_rows_are_whole_on_one_side():
    tokens = corpus(held=[False] * N_ROWS)
    codes, indices = planted(tokens)
    pool = feature_labels.all_fires(codes, indices)
    with pytest.raises(BadInput, match="other rows to test on"):
        feature_labels.explain(tokens, [], pool.fires, pool, 10)
    tokens.held[3] = True
    with pytest.raises(BadInput, match="not both"):
        feature_facts.facts(tokens)


def test_a_feature_that_hardly_fires_has_no_label(found):
    tokens, kinds, codes, _, _ = found
    few = codes.copy()
    few[200:, 0] = 0
    pool = feature_labels.all_fires(few, np.broadcast_to(np.arange(10), few.shape))
    rare = pool.fires.where((pool.fires.feature != 0) | (np.cumsum(pool.fires.feature == 0) < 9))
    row = feature_labels.explain(tokens, kinds, rare, Pool(pool.token, rare), 10).iloc[0]
    assert (row.label, row.kind) == ("too rare", "") and np.isnan(
        [row.accuracy, row.shuffled]
    ).all()


def test_strongest_takes_the_upper_half_of_each():
    fires = Fires(np.array([0, 1, 0, 0, 1, 2]), np.arange(6), np.array([1.0, 5, 3, 2, 4, 0.1]))
    kept = feature_labels.strongest(fires, 3)
    assert set(zip(kept.feature, kept.token, strict=True)) == {(0, 2), (0, 3), (1, 1), (2, 5)}


def test_facts_stay_within_their_row():
    rows, pieces = [[1, 2, 3], [4, 5]], " abcde"
    tokens = feature_facts.make_tokens(rows, [False, True], lambda ids: pieces[ids[0]])
    kinds = {kind.name: kind for kind in feature_facts.facts(tokens)}
    said = lambda name: [kinds[name].values[c] if c >= 0 else "" for c in kinds[name].codes[:, 0]]  # noqa: E731
    assert said("piece -1") == ["", '"a"', '"b"', "", '"d"']
    assert said("piece +1") == ['"b"', '"c"', "", '"e"', ""]
    assert said("three") == ["", "", '"a b c"', "", ""]
    near = kinds["near"]
    assert [{near.values[c] for c in codes if c >= 0} for codes in near.codes] == [
        set(), {'"a"'}, {'"a"', '"b"'}, set(), {'"d"'}]  # fmt: skip


@pytest.mark.parametrize(
    ("piece", "expected"),
    [(" 12", "a number"), ("(0,1)", "text with digits"), ("\n\n", "a line break"), ("<think>",
     "a special token"), (" ", "white space"), ("!", "the end of a sentence"), ("NASA",
     "a word in capitals"), (" Paris", "a capitalised word"), ("ing", "a word in small letters"),
     ("été", "other text"), (" +", "an operator")],
)  # fmt: skip
def test_character_classes(piece, expected):
    assert feature_facts.character_class(piece) == expected
