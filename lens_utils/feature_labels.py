"""Labels for features without a language model: the one fact that best tells where a feature fires.

For every kind of fact (`feature_facts`: the piece here or one before, its class of characters, a
word near by, the position, a labelled span) the best label is found at once for all features. Both
classes count alike (balanced accuracy), so a value v adds to a label

    gain(v) = share of the feature's fires that have v - share of the other tokens that have v,

and as the values of a kind exclude each other, the best set is that of the largest gains (less two
standard errors, for there are thousands of values to choose from). All is chosen on rows for
fitting; the accuracy that is reported is that on other rows, and the control is what labels of
other features reach there.

    kinds = facts(make_tokens(rows, held, model.decode, {"label": ...}))
    frame = explain(tokens, kinds, fires, pool, n_features)

    fires   where features fire: all places, or a sample of them for each feature
    pool    tokens of the text at large, with everything that fires there

Balanced accuracy says where a feature can fire, not that it does: a rare feature can have a common
label. That is what `precision` is for.

`all_fires(values, indices)` makes both of the complete codes of a few thousand tokens: then the
accuracies are exact. A label is about the upper half of a feature's fires: TopK fills every
token's k places, and the weakest of them are noise.

Axes: fire (one feature at one token), pool (tokens of the pool), feature.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray

from lens_utils.errors import BadInput
from lens_utils.feature_facts import Kind, Tokens

GAIN = 0.02
"""A value that adds less is not named."""
COST = 0.01
"""Accuracy that another value has to bring, so that the shorter of two labels wins."""
FEWEST = 5
"""Fires on either side without which there is no label."""
WEAK = 0.6
"""A label that tells less on the rows it was chosen on is called unclear."""
SURE = 2
"""Standard errors that are taken off a gain before values and kinds are compared."""
SHUFFLES = 8


class Fires(NamedTuple):
    """Entry i: feature[i] has the value value[i] > 0 at token[i] of the corpus."""

    feature: Int[ndarray, " fire"]
    token: Int[ndarray, " fire"]
    value: Float[ndarray, " fire"]

    def where(self, chosen: Bool[ndarray, " fire"]) -> "Fires":
        """Some of them."""
        return Fires(self.feature[chosen], self.token[chosen], self.value[chosen])


class Pool(NamedTuple):
    """Tokens of the text at large, and all fires at them."""

    token: Int[ndarray, " pool"]
    fires: Fires

    def where(self, chosen: Bool[ndarray, " token"]) -> "Pool":
        """Those at some of the corpus' tokens."""
        return Pool(self.token[chosen[self.token]], self.fires.where(chosen[self.fires.token]))


class Rules(NamedTuple):
    """A label for every feature: token t has it if one of its codes of that kind is in `codes`."""

    kind: Int[ndarray, " feature"]
    """Number of the kind; -1: no label."""
    codes: Int[ndarray, "feature value"]
    """The values, filled up with -2."""
    fitted: Float[ndarray, " feature"]
    """Balanced accuracy on the rows it was chosen on."""


def all_fires(
    values: Float[ndarray, "token active"],
    indices: Int[ndarray, "token active"],
    token: Int[ndarray, " token"] | None = None,
) -> Pool:
    """A transcoder's complete codes of some tokens of the corpus (the first, if not said which)."""
    token = np.arange(len(values)) if token is None else token
    on = values > 0
    place = np.broadcast_to(token[:, None], values.shape)
    fires = Fires(indices[on].astype(np.int64), place[on], values[on].astype(np.float64))
    return Pool(np.asarray(token), fires)


def explain(
    tokens: Tokens,
    kinds: Sequence[Kind],
    fires: Fires,
    pool: Pool,
    n_features: int,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per feature: feature, label, kind, fitted, accuracy, recall, precision, auroc,
    shuffled, n_fit and n_held (fires that were counted).

    accuracy: balanced, of the label on held-out rows, between the upper half of the feature's
    fires and the pool's tokens where it is silent; recall: its share of these fires; precision: of
    the held-out pool's tokens with the label, the share at which the feature fires at all. auroc:
    of the feature's value, for whether a held-out token of the pool has the label. shuffled: the
    accuracy of labels of other features, drawn anew SHUFFLES times. NaN, and the label "too rare",
    with fewer than FEWEST fires on either side. Raises BadInput where all rows are on one side.
    """
    if not (tokens.held[pool.token].any() and (~tokens.held[pool.token]).any()):
        raise BadInput("labels need rows to fit and other rows to test on, at least one of each")
    sides = [(strongest(fires.where(at[fires.token]), n_features), pool.where(at))
             for at in (~tokens.held, tokens.held)]  # fmt: skip
    n_fit, n_held = (np.bincount(of.feature, minlength=n_features) for of, _ in sides)
    known = (n_fit >= FEWEST) & (n_held >= FEWEST)
    rules = fit(kinds, *sides[0], n_features)
    rules = rules._replace(kind=np.where(known, rules.kind, -1))
    reached, recall = accuracy(rules, kinds, *sides[1])
    rng = np.random.default_rng(seed)
    shuffled = np.full(n_features, np.nan)
    if known.sum() > 1:
        dealt = [accuracy(_dealt(rules, rng), kinds, *sides[1])[0] for _ in range(SHUFFLES)]
        shuffled = np.mean(dealt, axis=0)
    return pd.DataFrame({
        "feature": np.arange(n_features),
        "label": [say(rules, kinds, f) for f in range(n_features)],
        "kind": [kinds[k].name if k >= 0 else "" for k in rules.kind],
        "fitted": np.where(rules.kind >= 0, rules.fitted, np.nan),
        "accuracy": reached,
        "recall": recall,
        "precision": precision(rules, kinds, sides[1][1]),
        "auroc": auroc_of(rules, kinds, sides[1][1]),
        "shuffled": shuffled,
        "n_fit": n_fit,
        "n_held": n_held,
    })  # fmt: skip


def strongest(fires: Fires, n_features: int, share: float = 0.5) -> Fires:
    """The upper part of each feature's fires by value, at least one of each."""
    order = np.lexsort((-fires.value, fires.feature))
    count = np.bincount(fires.feature, minlength=n_features)
    feature = fires.feature[order]
    rank = np.arange(len(order)) - (np.cumsum(count) - count)[feature]
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order] = rank < np.ceil(share * count)[feature]
    return fires.where(chosen)


def fit(kinds: Sequence[Kind], fires: Fires, pool: Pool, n_features: int) -> Rules:
    """For every feature the kind and its values of the largest sure gains."""
    widest = max(kind.most for kind in kinds)
    best = Rules(np.full(n_features, -1), np.full((n_features, widest), -2),
                 np.full(n_features, 0.5))  # fmt: skip
    merit = np.full(n_features, -np.inf)
    for number, kind in enumerate(kinds):
        feature, code, gain, sure = _gains(kind, fires, pool, n_features)
        order = np.lexsort((-sure, feature))
        feature, code, gain, sure = feature[order], code[order], gain[order], sure[order]
        first = np.flatnonzero(np.diff(feature, prepend=-1))
        rank = np.arange(len(feature)) - np.repeat(first, np.diff(first, append=len(feature)))
        named = (rank < kind.most) & ((rank == 0) | (sure >= GAIN))
        feature, code, rank = feature[named], code[named], rank[named]
        length = np.bincount(feature, minlength=n_features)
        reached = 0.5 + np.bincount(feature, gain[named], minlength=n_features) / 2
        worth = np.bincount(feature, sure[named], minlength=n_features) / 2 - COST * (length - 1)
        better = (length > 0) & (worth > merit + 1e-9)
        merit = np.where(better, worth, merit)
        best.kind[better], best.fitted[better] = number, reached[better]
        best.codes[better] = -2
        mine = better[feature]
        best.codes[feature[mine], rank[mine]] = code[mine]
    return best


def accuracy(
    rules: Rules, kinds: Sequence[Kind], fires: Fires, pool: Pool
) -> tuple[Float[ndarray, " feature"], Float[ndarray, " feature"]]:
    """Balanced accuracy of each feature's label, and the share of its fires that have it.

    The other class are the pool's tokens where the feature is silent. NaN without a label or fires.
    """
    n = len(rules.kind)
    count = np.bincount(fires.feature, minlength=n)
    recall = _share(np.bincount(fires.feature[has(rules, kinds, fires)], minlength=n), count)
    on = np.bincount(pool.fires.feature, minlength=n)
    wrong = labelled(rules, kinds, pool) - np.bincount(
        pool.fires.feature[has(rules, kinds, pool.fires)], minlength=n
    )
    reached = (recall + 1 - _share(wrong, len(pool.token) - on)) / 2
    return np.where(rules.kind >= 0, reached, np.nan), np.where(rules.kind >= 0, recall, np.nan)


def has(rules: Rules, kinds: Sequence[Kind], fires: Fires) -> Bool[ndarray, " fire"]:
    """Whether the token of each fire has the label of its feature."""
    found = np.zeros(len(fires.feature), dtype=bool)
    which = rules.kind[fires.feature]
    for number in np.unique(which[which >= 0]):
        mine = np.flatnonzero(which == number)
        codes = kinds[number].codes[fires.token[mine]]
        wanted = rules.codes[fires.feature[mine]]
        found[mine] = (codes[:, :, None] == wanted[:, None, :]).any((1, 2))
    return found


def labelled(rules: Rules, kinds: Sequence[Kind], pool: Pool) -> Int[ndarray, " feature"]:
    """How many of the pool's tokens have each feature's label."""
    found = np.zeros(len(rules.kind), dtype=np.int64)
    for number in np.unique(rules.kind[rules.kind >= 0]):
        mine = np.flatnonzero(rules.kind == number)
        codes = kinds[number].codes[pool.token]
        counts = np.bincount(codes[codes >= 0], minlength=len(kinds[number].values))
        wanted = rules.codes[mine]
        found[mine] = np.where(wanted >= 0, counts[np.maximum(wanted, 0)], 0).sum(1)
    return found


def precision(rules: Rules, kinds: Sequence[Kind], pool: Pool) -> Float[ndarray, " feature"]:
    """Of the pool's tokens with each feature's label, the share at which the feature fires."""
    right = pool.fires.feature[has(rules, kinds, pool.fires)]
    share = _share(np.bincount(right, minlength=len(rules.kind)), labelled(rules, kinds, pool))
    return np.where(rules.kind >= 0, share, np.nan)


def auroc_of(rules: Rules, kinds: Sequence[Kind], pool: Pool) -> Float[ndarray, " feature"]:
    """AUROC of each feature's value (0 where it is silent) for its own label, over the pool."""
    n = len(rules.kind)
    weight, base = ranks(pool.fires, len(pool.token), n)
    yes = has(rules, kinds, pool.fires)
    total = labelled(rules, kinds, pool)
    summed = np.bincount(pool.fires.feature[yes], weight[yes], minlength=n) + base * total
    return np.where(rules.kind >= 0, auroc(summed, total, len(pool.token)), np.nan)


def ranks(
    fires: Fires, n_tokens: int, n_features: int
) -> tuple[Float[ndarray, " fire"], Float[ndarray, " feature"]]:
    """Ranks of each feature's values among n_tokens: of silence, and how far a fire is above it.

    Ranks count from 1, ties share theirs. A feature's rank sum over some tokens is then
    base * tokens + the sum of weights of its fires there, which is a sparse product.
    """
    order = np.lexsort((fires.value, fires.feature))
    feature, value = fires.feature[order], fires.value[order]
    count = np.bincount(fires.feature, minlength=n_features)
    silent = n_tokens - count
    rank = np.arange(len(order)) - (np.cumsum(count) - count)[feature] + 1.0
    new = np.ones(len(order), dtype=bool)
    new[1:] = (feature[1:] != feature[:-1]) | (value[1:] != value[:-1])
    tie = np.cumsum(new) - 1
    shared = np.bincount(tie, rank) / np.maximum(np.bincount(tie), 1) if len(order) else rank
    base = (silent + 1) / 2
    weight = np.empty(len(order))
    weight[order] = silent[feature] + shared[tie] - base[feature] if len(order) else rank
    return weight, base


def auroc(
    rank_sum: Float[ndarray, "*cell"], positives: Shaped[ndarray, "*cell"], n_tokens: int
) -> Float[ndarray, "*cell"]:
    """AUROC from the positives' sum of ranks (Mann and Whitney); NaN without both classes."""
    negatives = n_tokens - positives
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return np.where((positives > 0) & (negatives > 0), found, np.nan)


def say(rules: Rules, kinds: Sequence[Kind], feature: int) -> str:
    """The label in words."""
    number = rules.kind[feature]
    if number < 0:
        return "too rare"
    names = [kinds[number].values[code] for code in rules.codes[feature] if code >= 0]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    text = kinds[number].said.format(listed)
    return text if rules.fitted[feature] >= WEAK else f"unclear; at best {text}"


def _gains(
    kind: Kind, fires: Fires, pool: Pool, n_features: int
) -> tuple[
    Int[ndarray, " pair"], Int[ndarray, " pair"], Float[ndarray, " p"], Float[ndarray, " p"]
]:
    """(feature, code, gain, gain less SURE standard errors) of all pairs that gain anything."""
    n_codes = len(kind.values)
    pairs, times = np.unique(_pairs(kind, fires), return_counts=True)
    pairs, times = pairs[times > 1], times[times > 1]
    feature, code = np.divmod(pairs, n_codes) if n_codes else (pairs, pairs)
    at_large = kind.codes[pool.token]
    everywhere = np.bincount(at_large[at_large >= 0], minlength=n_codes)
    own, own_times = np.unique(_pairs(kind, pool.fires), return_counts=True)
    place = np.minimum(np.searchsorted(own, pairs), max(len(own) - 1, 0))
    at_fires = np.where(own[place] == pairs, own_times[place], 0) if len(own) else 0 * pairs
    n_fires = np.bincount(fires.feature, minlength=n_features)
    silent = len(pool.token) - np.bincount(pool.fires.feature, minlength=n_features)
    here, elsewhere = times / n_fires[feature], _share(everywhere[code] - at_fires, silent[feature])
    gain = here - elsewhere
    error = here * (1 - here) / n_fires[feature] + elsewhere * (1 - elsewhere) / silent[feature]
    kept = gain > 0
    sure = gain[kept] - SURE * np.sqrt(error[kept])
    return feature[kept], code[kept], gain[kept], sure


def _pairs(kind: Kind, fires: Fires) -> Int[ndarray, " pair"]:
    """feature * n_codes + code, for every code of every fire's token."""
    codes = kind.codes[fires.token]
    feature = np.broadcast_to(fires.feature[:, None], codes.shape)
    return (feature * len(kind.values) + codes)[codes >= 0]


def _dealt(rules: Rules, rng: np.random.Generator) -> Rules:
    """Every feature with a label gets another one's."""
    known = np.flatnonzero(rules.kind >= 0)
    order = rng.permutation(known)
    other = np.arange(len(rules.kind))
    other[order] = np.roll(order, 1)  # one ring of all: none keeps its own
    return Rules(rules.kind[other], rules.codes[other], rules.fitted[other])


def _share(part: Shaped[ndarray, "*cell"], whole: Shaped[ndarray, "*cell"] | int) -> ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(whole) > 0, part / whole, np.nan)


def tells(
    rules: Rules, kinds: Sequence[Kind], feature: int, token: Int[ndarray, "*place"]
) -> Bool[ndarray, "*place"]:
    """Whether tokens have the label of one feature."""
    if rules.kind[feature] < 0:
        return np.zeros(token.shape, dtype=bool)
    return np.isin(kinds[rules.kind[feature]].codes[token], rules.codes[feature]).any(-1)
