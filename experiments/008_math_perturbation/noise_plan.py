"""Which heads of experiment 008 get noise, in which conditions and how often."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from lens_utils.errors import BadInput

CORES = ("synergistic", "redundant")
MATCHED = {core: f"random, layers as {core}" for core in CORES}
SWEPT = (*CORES, "random")  # at every sigma; the rest at the one of the findings
ARMS = (*SWEPT, *MATCHED.values())
PILOT = 1_000_000  # a draw of the pilot's own
QUICK_SIGMAS = (0.5,)

Heads = tuple[tuple[int, int], ...]


class Condition(NamedTuple):
    """One pass over all items."""

    arm: str
    sigma: float
    draw: int
    """Seed of the noise, and of the heads where they are random."""
    heads: Heads


def cores(cfg, scores: pd.DataFrame) -> dict[str, Heads]:
    """The heads with the highest and the lowest scores; heads without a score are in neither.

    Raises BadInput for a share that is no share, and a score that the table lacks.
    """
    if cfg.score not in scores or cfg.score in ("layer", "head"):
        there = ", ".join(c for c in scores if c not in ("layer", "head"))
        raise BadInput(f"005 has no score {cfg.score!r} for each head: take one of {there}")
    if not 0 < cfg.share <= 0.5:
        raise BadInput(f"--share {cfg.share}: above 0, up to 0.5; at most half of the heads can be "
                       "the most synergistic while others are the most redundant")  # fmt: skip
    n = round(cfg.share * len(scores))
    ranked = scores.dropna(subset=[cfg.score]).sort_values([cfg.score, "layer", "head"])
    if not 0 < 2 * n <= len(ranked):
        raise BadInput(f"{len(ranked)} of {len(scores)} heads have a {cfg.score}: too few for two "
                       f"sets of {n}")  # fmt: skip
    order = places(ranked)
    return {"synergistic": tuple(sorted(order[-n:])), "redundant": tuple(sorted(order[:n]))}


def places(table: pd.DataFrame) -> list[tuple[int, int]]:
    """(layer, head) of every row."""
    return list(table[["layer", "head"]].astype(int).itertuples(index=False, name=None))


def random_heads(scores: pd.DataFrame, n: int, seed: tuple[int, ...]) -> Heads:
    """So many heads of all, without regard to their scores."""
    every = sorted(places(scores))
    picked = np.random.default_rng(seed).choice(len(every), n, replace=False)
    return tuple(sorted(every[i] for i in picked))


def random_like(scores: pd.DataFrame, core: Heads, seed: tuple[int, ...]) -> Heads:
    """Random heads with as many in each layer as the core has there."""
    rng = np.random.default_rng(seed)
    picked = []
    for layer, n in sorted(pd.Series([layer for layer, _ in core]).value_counts().items()):
        heads = sorted(scores[scores.layer == layer]["head"].astype(int))
        picked += [(int(layer), int(h)) for h in rng.choice(heads, n, replace=False)]
    return tuple(sorted(picked))


def heads_of(cfg, scores: pd.DataFrame, arm: str, draw: int) -> Heads:
    """The heads of one condition: always the same for a core, others with each draw."""
    both = cores(cfg, scores)
    if arm in both:
        return both[arm]
    seed = (cfg.seed, ARMS.index(arm), draw)
    if arm == "random":
        return random_heads(scores, len(both["synergistic"]), seed)
    core = next(core for core, matched in MATCHED.items() if matched == arm)
    return random_like(scores, both[core], seed)


def sigmas(cfg) -> tuple[float, ...]:
    """The noise levels of this run. Raises BadInput for one that is not positive."""
    chosen = QUICK_SIGMAS if cfg.quick else cfg.sigmas
    found = tuple(sorted({*chosen, *([cfg.sigma] if cfg.sigma else [])}))
    if not found or min(found) <= 0:
        raise BadInput(f"--sigmas {found}: standard deviations above 0")
    return found


def pilot(cfg, scores: pd.DataFrame) -> list[Condition]:
    """The baseline, and random noise at every sigma in a draw that is used for nothing else."""
    return [Condition("baseline", 0.0, 0, ())] + [
        Condition("random", sigma, PILOT, heads_of(cfg, scores, "random", PILOT))
        for sigma in sigmas(cfg)
    ]


def conditions(cfg, scores: pd.DataFrame, sigma: float) -> list[Condition]:
    """All of them, between two baselines: the second shows that the weights came back.

    Every arm at `sigma`; at the other noise levels, in fewer draws, the cores and random heads.
    """
    draws, sweep = (2, 1) if cfg.quick else (cfg.draws, cfg.sweep_draws)
    if draws < 2 or sweep < 1:
        raise BadInput(f"--draws {draws} --sweep-draws {sweep}: at least 2 (one says nothing of "
                       "their spread) and at least 1")  # fmt: skip
    noisy = [
        Condition(arm, s, draw, heads_of(cfg, scores, arm, draw))
        for s in sigmas(cfg)
        for arm in (ARMS if s == sigma else SWEPT)
        for draw in range(draws if s == sigma else sweep)
    ]
    ends = [Condition("baseline", 0.0, n, ()) for n in (0, 1)]
    return [ends[0], *noisy, ends[1]]


def heads(conditions: list[Condition], sigma: float) -> pd.DataFrame:
    """One row per head of every condition at `sigma`, and whether the cores have it."""
    rows = [
        {"arm": c.arm, "draw": c.draw, "layer": layer, "head": head}
        for c in conditions
        if c.sigma == sigma
        for layer, head in c.heads
        if c.arm not in CORES or c.draw == 0
    ]
    table = pd.DataFrame(rows)
    for core in CORES:
        held = set(places(table[table.arm == core]))
        table[f"in_{core}"] = [place in held for place in places(table)]
    return table
