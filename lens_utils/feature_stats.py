"""What a transcoder's features do over a corpus, gathered in one pass and in bounded memory.

Of every feature: how often it fires, how strongly (mean, standard deviation, maximum, a histogram
on a logarithmic scale), at which positions and in which spans; its strongest examples and an equal
sample of all its fires, both with its values at the tokens around. Nothing grows with the corpus
but the complete codes of a pool of tokens that is chosen beforehand. All is kept on the CPU, where
there is float64: codes are small.

An equal sample of a stream: every fire draws a random number, and those with the largest are kept.
The strongest are kept in the same way, by value. `Best` does both for all features at once.

Axes: token (kept tokens of a batch), active (features of a token), fire (entries with a value
above 0), feature, place (kept examples of a feature), offset (tokens around an example).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

BEFORE, AFTER = 15, 8
"""Tokens around an example whose values are kept."""
OFFSETS = BEFORE + 1 + AFTER
LOWEST, BINS = -8, 32
"""The histogram: bin b holds values from 2**(LOWEST + b/2), the first and last what lies beyond."""
SIZES = {"top": 8, "spread": 16, "fit": 64, "test": 64}
"""Examples kept of each feature: the strongest, an equal sample, and samples for labels."""
SHOWN = ("top", "spread")
"""Those whose surroundings are kept."""


class Best:
    """The `size` entries with the largest keys of every feature, in descending order."""

    def __init__(self, n_features: int, size: int, around: bool) -> None:
        shape = (n_features, size)
        self.key = torch.full(shape, float("-inf"))
        self.token, self.value = torch.full(shape, -1), torch.zeros(shape)
        self.around = torch.zeros(*shape, OFFSETS, dtype=torch.float16) if around else None

    def wanted(
        self, feature: Int[Tensor, " fire"], key: Float[Tensor, " fire"]
    ) -> Int[Tensor, " some"]:
        """Which fires would be kept: places in the arguments, by feature and descending key."""
        size = self.key.shape[1]
        some = (key > self.key[feature, -1]).nonzero()[:, 0]
        some = some[key[some].argsort(descending=True, stable=True)]
        some = some[feature[some].argsort(stable=True)]
        return some[_rank(feature[some]) < size]

    def add(
        self,
        feature: Int[Tensor, " fire"],
        key: Float[Tensor, " fire"],
        token: Int[Tensor, " fire"],
        value: Float[Tensor, " fire"],
        around: Float[Tensor, "fire offset"] | None = None,
    ) -> None:
        """Take in fires as `wanted` orders them."""
        if not len(feature):
            return
        size = self.key.shape[1]
        touched, at = feature.unique_consecutive(return_inverse=True)
        new = at, _rank(feature)
        keys, order = _beside(self.key, touched, new, key, float("-inf")).topk(size, dim=1)
        tokens = _beside(self.token, touched, new, token, -1.0)
        values = _beside(self.value, touched, new, value)
        self.token[touched], self.value[touched] = tokens.gather(1, order), values.gather(1, order)
        if self.around is not None and around is not None:
            wide = order[:, :, None].expand(-1, -1, OFFSETS)
            self.around[touched] = _beside(self.around, touched, new, around).gather(1, wide)
        self.key[touched] = keys


class Collector:
    """Gathers one layer's statistics, batch after batch; `result` has them all."""

    def __init__(
        self,
        n_features: int,
        groups: Mapping[str, int],
        pool: Int[Tensor, " pool"],
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """groups: how many spans each family has. pool: tokens whose codes are kept whole, in
        ascending order."""
        self.n = n_features
        self.pool, self.tokens = pool, 0
        self.random = torch.Generator().manual_seed(seed)
        zeros = lambda *shape: torch.zeros(n_features, *shape, dtype=torch.float64)  # noqa: E731
        names = ("count", "total", "squares", "position")
        self.sums = {name: zeros() for name in names}
        self.histogram = zeros(BINS)
        self.spans = {family: zeros(size) for family, size in groups.items()}
        self.best = {name: Best(n_features, size, name in SHOWN)
                     for name, size in (sizes or SIZES).items()}  # fmt: skip
        self.seen: list[Tensor] = []
        self.whole: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(
        self,
        values: Float[Tensor, "token active"],
        indices: Int[Tensor, "token active"],
        token: Int[Tensor, " token"],
        row: Int[Tensor, " token"],
        pos: Int[Tensor, " token"],
        held: Bool[Tensor, " token"],
        spans: Mapping[str, Int[Tensor, " token"]],
    ) -> None:
        """Take in the codes of whole rows.

        token: number in the corpus, ascending; held: whether its row is for testing; spans: codes
        by family, -1 for none.
        """
        self.tokens += len(token)
        values, indices = values.float().cpu(), indices.cpu()
        at, active = (values > 0).nonzero(as_tuple=True)
        feature, value = indices[at, active].long(), values[at, active].float()
        tallied = (None, value.double(), value.double() ** 2, pos[at].double())
        for name, what in zip(self.sums, tallied, strict=True):
            self.sums[name] += torch.bincount(feature, what, minlength=self.n)
        self._tally(self.histogram, feature, bins(value))
        for family, codes in spans.items():
            self._tally(self.spans[family], feature, codes[at])
        chance = torch.rand(len(value), generator=self.random)
        keys = {"top": value, "spread": chance,
                "fit": chance.masked_fill(held[at], float("-inf")),
                "test": chance.masked_fill(~held[at], float("-inf"))}  # fmt: skip
        dense = values.new_zeros(len(values), self.n).scatter_(1, indices.long(), values)
        for name, best in self.best.items():
            some = best.wanted(feature, keys[name])
            around = None
            if best.around is not None:
                around = surroundings(dense, token, row, at[some], feature[some])
            best.add(feature[some], keys[name][some], token[at[some]], value[some], around)
        inside = torch.isin(token, self.pool)
        chosen = inside[at]
        self.seen.append(token[inside])
        self.whole.append((feature[chosen], token[at[chosen]], value[chosen]))

    def _tally(
        self,
        table: Float[Tensor, "feature cell"],
        feature: Int[Tensor, " fire"],
        cell: Int[Tensor, " fire"],
    ) -> None:
        known = cell >= 0
        flat = feature[known] * table.shape[1] + cell[known]
        table += torch.bincount(flat, minlength=table.numel()).view_as(table)

    def result(self) -> dict[str, Tensor]:
        """Everything: sums, histogram, span/<family>, <sample>/token, /value and /around; the
        pool's tokens that came by as pool/seen, its fires as pool/feature, /token and /value."""
        found = {**self.sums, "histogram": self.histogram}
        found |= {f"span/{family}": table for family, table in self.spans.items()}
        for name, best in self.best.items():
            found |= {f"{name}/token": best.token, f"{name}/value": best.value}
            if best.around is not None:
                found[f"{name}/around"] = best.around
        parts = [torch.cat(tensors) for tensors in zip(*self.whole, strict=True)]
        found |= dict(zip(("pool/feature", "pool/token", "pool/value"), parts, strict=True))
        return found | {"pool/seen": torch.cat(self.seen)}


def surroundings(
    dense: Float[Tensor, "token feature"],
    token: Int[Tensor, " token"],
    row: Int[Tensor, " token"],
    at: Int[Tensor, " fire"],
    feature: Int[Tensor, " fire"],
) -> Float[Tensor, "fire offset"]:
    """The feature's values from BEFORE tokens before each fire to AFTER behind, 0 beyond its row.

    dense: a batch's activations; at: places of the fires in the batch.
    """
    wanted = token[at][:, None] + torch.arange(-BEFORE, AFTER + 1)
    place = torch.searchsorted(token, wanted).clamp(max=len(token) - 1)
    there = (token[place] == wanted) & (row[place] == row[at][:, None])
    return dense[place, feature[:, None]] * there


def bins(value: Float[Tensor, " fire"]) -> Int[Tensor, " fire"]:
    """The histogram's bin of each value."""
    return ((value.log2() - LOWEST) * 2).floor().long().clamp(0, BINS - 1)


def edges() -> Float[Tensor, " edge"]:
    """The histogram's lower edges: of the first bin in name only."""
    return 2.0 ** (LOWEST + torch.arange(BINS) / 2)


def logit_effects(
    W_dec: Float[Tensor, "feature d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    n: int = 8,
    part: int = 256,
) -> tuple[Float[Tensor, "feature two_n"], Int[Tensor, "feature two_n"]]:
    """The n most promoted tokens of each feature and the n most suppressed (the last one first).

    W_dec W_U less its mean over the vocabulary: what a unit of the feature adds to the logits if
    nothing but the final norm lies between, up to that norm.
    """
    found = []
    for rows in W_dec.split(part):
        effect = rows.float() @ W_U.float()
        effect = effect - effect.mean(1, keepdim=True)
        high, low = effect.topk(n), effect.topk(n, largest=False)
        found.append([torch.cat([high[i], low[i]], dim=1) for i in (0, 1)])
    effects, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return effects.cpu(), ids.cpu()


def _beside(
    held: Shaped[Tensor, "feature place ..."],
    touched: Int[Tensor, " some"],
    at: tuple[Tensor, Tensor],
    entries: Shaped[Tensor, "fire ..."],
    nothing: float = 0.0,
) -> Shaped[Tensor, "some two_places ..."]:
    """What is held of some features, and entries put at `at` of as many places beside it."""
    table = torch.full_like(held[touched], nothing)
    table[at] = entries.to(held.dtype)
    return torch.cat([held[touched], table], dim=1)


def _rank(ordered: Int[Tensor, " fire"]) -> Int[Tensor, " fire"]:
    """Place of every entry among those of its own feature, from 0; features are in order."""
    _, times = ordered.unique_consecutive(return_counts=True)
    starts = times.cumsum(0) - times
    return torch.arange(len(ordered)) - starts.repeat_interleave(times)


def choose_pool(
    row: Int[Tensor, " token"], held: Bool[Tensor, " token"], size: int, seed: int
) -> Int[Tensor, " pool"]:
    """Whole rows, drawn at random, of about `size` tokens on either side; their tokens, ascending.

    row and held: of every token of the corpus. Whole rows, so that a window of them is known whole.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(int(row.max()) + 1, dtype=torch.bool)
    length = torch.bincount(row)
    for side in (~held, held):
        rows = row[side].unique()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        chosen[rows[length[rows].cumsum(0) - length[rows] < size]] = True
    return chosen[row].nonzero()[:, 0]
