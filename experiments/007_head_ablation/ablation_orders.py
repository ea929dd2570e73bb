"""The orders in which experiment 007 takes heads away: tables in, numbers of heads out, no model.

Head h of layer l is number l n_heads + h.

    <score>, high first   by a column of 005; `low first` from the other end
    alone, high first     by what each head does alone, measured on other texts than the orders
    random                any heads
    random, layers of ... random heads of the same layers: after k heads, as many of every layer are
                          gone as in value_diff's order. What is left is not a matter of depth
"""

import numpy as np
import pandas as pd

from lens_utils.divergence import count
from lens_utils.errors import BadInput

DEFAULT = ("value_diff", "rank_diff", "value_diff_excess", "value_diff_ccs", "memory")
QUICK = 2  # of them
POINTS, QUICK_POINTS = "0.05,0.1,0.25,0.4", "0.1,0.25"
MOST = 0.4  # of all heads, for points every so many
TURNS = 4  # a random order is run on every fourth text: more orders cost as little as more texts
LAYERS = "value_diff"  # whose layers the second kind of random orders keeps
RANDOM = "random"
CONTROL = 0.25  # share at which the other ablations are measured, of these orders
CONTROLLED = (f"{LAYERS}, high first", f"{LAYERS}, low first", "alone, high first", RANDOM)


class Plan:
    """What is asked of a run, with 005's scores. Raises BadInput for what cannot be made sense of,
    and for columns that 005 does not have."""

    def __init__(self, cfg, scores: pd.DataFrame) -> None:
        if cfg.random_orders < 2:
            raise BadInput(f"--random-orders {cfg.random_orders}: at least 2")
        self.seed = cfg.seed
        self.n_random = max(2, cfg.random_orders // 2) if cfg.quick else cfg.random_orders
        self.n_like = self.n_random // 2
        default = DEFAULT[:QUICK] if cfg.quick else DEFAULT
        named = [name.strip() for name in cfg.scores.split(",") if name.strip()]
        self.scores = list(dict.fromkeys(named)) or list(default)
        have = [c for c in scores.columns if c not in ("layer", "head")]
        if odd := [c for c in [*self.scores, LAYERS] if c not in have]:
            raise BadInput(f"scores.csv of 005 has no column {odd[0]!r}; there are "
                           f"{', '.join(have)}")  # fmt: skip
        common = shares(cfg.random_points)
        if cfg.quick:
            common = [share for share in common if share <= CONTROL]
        self.common = sorted({*common, CONTROL})
        first, _, n = cfg.points.partition(" ")
        self.every = 0
        if first != "every":
            self.shares = shares(cfg.points or (QUICK_POINTS if cfg.quick else POINTS))
        elif n.isdecimal() and int(n) > 0:
            self.every = int(n)
        else:
            raise BadInput(f"--points {cfg.points!r}: write shares, or such as 'every 5'")

    def counts(self, size: int, scored: bool) -> list[tuple[int, float]]:
        """Numbers of heads to take away with the shares they stand for.

        scored: of the order of a score, which has points of its own beside the common ones.
        """
        found = {(count(share, size), share) for share in self.common}
        if scored and self.every:
            taken = {k for k, _ in found}
            steps = range(self.every, int(MOST * size) + 1, self.every)
            found |= {(k, k / size) for k in steps if k not in taken}
        elif scored:
            found |= {(count(share, size), share) for share in self.shares}
        return sorted(found)

    def orders(self, heads: pd.DataFrame) -> list[dict]:
        """Every order: name, kind, turn (None: run on every text) and its heads."""
        rng = np.random.default_rng(self.seed)
        found = []
        for name in (*self.scores, "alone"):
            for end, sign in (("high", 1), ("low", -1)):
                order = ranked(sign * heads[name].to_numpy(float), rng)
                kind = f"{name}, {end} first"
                found.append({"order": kind, "kind": kind, "turn": None, "heads": order})
        drawn = {RANDOM: [rng.permutation(len(heads)).tolist() for _ in range(self.n_random)]}
        layer = heads.layer.to_numpy()
        for end, sign in (("high", 1), ("low", -1)):
            like = ranked(sign * heads[LAYERS].to_numpy(float), rng)
            drawn[f"random, layers of {LAYERS}, {end} first"] = [
                in_layers(like, layer, rng) for _ in range(self.n_like)
            ]
        found += [
            {"order": f"{kind} {turn}", "kind": kind, "turn": turn, "heads": order}
            for kind, orders in drawn.items()
            for turn, order in enumerate(orders)
        ]
        return found


def due(orders: list[dict], turn: int, turns: int) -> list[dict]:
    """The orders that are run on text number `turn`: of the random ones, every so many."""
    return [o for o in orders if o["turn"] is None or (o["turn"] - turn) % turns == 0]


def shares(text: str) -> list[float]:
    """Shares in a setting, in order. Raises BadInput for what is no number or outside (0, 1]."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise BadInput(f"{text!r}: write shares of all heads, such as 0.1,0.25") from None
    for share in found:
        count(share, 1)
    return found


def check(scores: pd.DataFrame, n_layers: int, n_heads: int) -> None:
    """Raises BadInput for scores of other heads than the model's."""
    found = set(zip(scores["layer"], scores["head"], strict=True))
    if len(scores) != n_layers * n_heads or found != set(np.ndindex(n_layers, n_heads)):
        raise BadInput(f"005 has {len(scores)} scores up to layer {scores.layer.max()}, this model "
                       f"{n_layers} layers of {n_heads} heads: they are of another model, or of "
                       "experts")  # fmt: skip


def heads(scores: pd.DataFrame, single: pd.DataFrame) -> pd.DataFrame:
    """One row per head: 005's scores, and `alone`, the mean divergence (nats) without it."""
    alone = single.groupby(["layer", "head"], as_index=False).kl.mean()
    return alone.rename(columns={"kl": "alone"}).merge(scores, on=["layer", "head"])


def ranked(values: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Heads from the highest value down. Ties are drawn, not left to depth; NaN comes last."""
    shuffled = rng.permutation(len(values))
    return shuffled[np.argsort(-values[shuffled], kind="stable")].tolist()


def in_layers(order: list[int], layer: np.ndarray, rng: np.random.Generator) -> list[int]:
    """A random order with the same layer in every place."""
    left = {at: rng.permutation(np.flatnonzero(layer == at)).tolist() for at in np.unique(layer)}
    return [left[layer[head]].pop() for head in order]
