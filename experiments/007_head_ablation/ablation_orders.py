"""The orders in which experiment 007 takes heads away: tables in, numbers of heads out, no model.

Head h of layer l is number l n_heads + h.

    <score>, high first   by a column of 005; `low first` from the other end
    alone, high first     by what each head does alone, measured on other texts than the orders
    random                any heads
    random, layers of ... random heads of the same layers: after k heads, as many of every layer are
                          gone as in value_diff's order. What is left is not a matter of depth
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from lens_utils.divergence import count
from lens_utils.errors import BadInput

DEFAULT = ("value_diff", "rank_diff", "value_diff_excess", "value_diff_ccs")
QUICK = 2  # of them
POINTS, QUICK_POINTS = "0.05,0.1,0.15,0.2,0.25,0.3,0.4", "0.1,0.25"
MOST = 0.4  # of all heads, for points every so many
TURNS = 3  # a random order is run on every third text: more orders cost as little as more texts
LAYERS = "value_diff"  # whose layers the second kind of random orders keeps
CONTROL = 0.25  # share at which the other ablations are measured, of these orders
CONTROLLED = (f"{LAYERS}, high first", f"{LAYERS}, low first", "alone, high first", "random")


@dataclass(frozen=True)
class Plan:
    """What is asked of a run. Raises BadInput when it cannot be made sense of."""

    cfg: object

    def __post_init__(self) -> None:
        if self.cfg.random_orders < 2:
            raise BadInput(f"--random-orders {self.cfg.random_orders}: at least 2")
        if not self.every:
            shares(self.cfg.points)
        assert self.scores and self.common

    @cached_property
    def scores(self) -> list[str]:
        """Columns of 005 to order heads by."""
        if not self.cfg.scores:
            return list(DEFAULT[:QUICK] if self.cfg.quick else DEFAULT)
        return list(dict.fromkeys(s.strip() for s in self.cfg.scores.split(",") if s.strip()))

    @property
    def every(self) -> int:
        """Heads between two points, 0 where shares are given."""
        first, _, n = self.cfg.points.partition(" ")
        if first != "every":
            return 0
        if not n.isdecimal() or int(n) == 0:
            raise BadInput(f"--points {self.cfg.points!r}: write shares, or such as 'every 5'")
        return int(n)

    @cached_property
    def common(self) -> list[float]:
        """Shares at which everything is measured."""
        found = shares(self.cfg.random_points)
        if not found:
            raise BadInput("--random-points needs at least one share, such as 0.1,0.25")
        return found[:-1] if self.cfg.quick and len(found) > 1 else found

    def counts(self, size: int, ordered: bool) -> dict[int, float]:
        """Numbers of heads to take away and the shares they stand for; with `ordered`, of a score's
        order, which has points of its own beside the common ones."""
        found = {count(share, size): share for share in self.common}
        if ordered and self.every:
            steps = range(self.every, int(MOST * size) + 1, self.every)
            found = {k: k / size for k in steps} | found
        elif ordered:
            given = self.cfg.points or (QUICK_POINTS if self.cfg.quick else POINTS)
            found = {count(share, size): share for share in shares(given)} | found
        return dict(sorted(found.items()))

    def orders(self, heads: pd.DataFrame) -> list[dict]:
        """Every order: name, kind, turn (None: run on all texts) and its heads."""
        rng = np.random.default_rng(self.cfg.seed)
        named = {f"{score}": heads[score].to_numpy(float) for score in self.scores}
        named["alone"] = heads["alone"].to_numpy(float)
        found = []
        for name, values in named.items():
            for end, sign in (("high", 1), ("low", -1)):
                of_heads = ranked(sign * values, rng)
                found.append({"order": f"{name}, {end} first", "kind": f"{name}, {end} first",
                              "turn": None, "heads": of_heads})  # fmt: skip
        layer, n = heads.layer.to_numpy(), self.cfg.random_orders
        drawn = [("random", [rng.permutation(len(heads)).tolist() for _ in range(n)])]
        for end, sign in (("high", 1), ("low", -1)):
            like = ranked(sign * heads[LAYERS].to_numpy(float), rng)
            kept = [in_layers(like, layer, rng) for _ in range(n // 2)]
            drawn.append((f"random, layers of {LAYERS}, {end} first", kept))
        for kind, orders in drawn:
            found += [
                {"order": f"{kind} {j}", "kind": kind, "turn": j % TURNS, "heads": of_heads}
                for j, of_heads in enumerate(orders)
            ]
        return found


def shares(text: str) -> list[float]:
    """Shares in a setting, in order. Raises BadInput for what is no number or outside (0, 1]."""
    try:
        found = sorted({float(part) for part in text.split(",")}) if text else []
    except ValueError:
        raise BadInput(f"{text!r}: write shares of all heads, such as 0.1,0.25") from None
    for share in found:
        count(share, 1)
    return found


def heads(scores: pd.DataFrame, single: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """One row per head: 005's scores, and `alone`, the mean divergence (nats) without it.

    Raises BadInput for a column that 005 does not have, and for scores of other heads than these.
    """
    if odd := [c for c in [*columns, LAYERS] if c not in scores or c in ("layer", "head")]:
        have = ", ".join(c for c in scores.columns if c not in ("layer", "head"))
        raise BadInput(f"scores.csv of 005 has no column {odd[0]!r}; there are {have}")
    alone = single.groupby(["layer", "head"], as_index=False).kl.mean()
    alone = alone.rename(columns={"kl": "alone"})
    one, other = ([*map(tuple, t[["layer", "head"]].to_numpy())] for t in (scores, alone))
    if sorted(one) != other:
        raise BadInput(f"005 has scores of {len(one)} heads up to layer {max(one)[0]}, this model "
                       f"{len(other)} heads up to layer {max(other)[0]}: they are of another model "
                       "or of experts")  # fmt: skip
    return alone.merge(scores, on=["layer", "head"]).sort_values(["layer", "head"])


def ranked(values: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Heads from the highest value down. Ties are drawn, not left to depth; NaN comes last."""
    shuffled = rng.permutation(len(values))
    return shuffled[np.argsort(-values[shuffled], kind="stable")].tolist()


def in_layers(order: list[int], layer: np.ndarray, rng: np.random.Generator) -> list[int]:
    """A random order with the same layer in every place."""
    left = {at: rng.permutation(np.flatnonzero(layer == at)).tolist() for at in np.unique(layer)}
    return [left[layer[head]].pop() for head in order]
