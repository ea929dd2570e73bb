"""Is a motif more frequent than the nodes' degrees, layers and positions make it anyway?

A count means nothing without a null: graphs like the circuit in some respects and random in others.
A null with edges that no computation could make (back in position, or down in layer) finds
feed-forward loops in every causal graph, so none here has any. Least free first:

    cells    each node keeps how many edges of each sign enter and leave it, and each pair of cells
             (layer, position) keeps how many edges run between them
    layers   the same with pairs of layers: edges move between positions
    causal   each node keeps its edges in and out: they move wherever causality lets them
    signs    every edge stays; signs are dealt out anew between each two layers
    weights  every edge stays; weights are dealt out anew over the whole circuit

The first three swap the ends of two edges of one sign, a -> b and c -> d to a -> d and c -> b,
if both new ones are possible and absent. If a and c lie in one cell, or b and d, the cells' edges
keep their numbers: every edge keeps its own pair of cells for good, and only nodes move. To demand
that both pairs share a cell would keep the same numbers and move hardly anything.

How far such a chain of swaps gets is not known beforehand, and in a dense causal graph it may not
be far. Two things follow.

1. Chains do not start at the circuit. It is first swapped into a hub, and each null starts there.
   Swaps are reversible, so under the null the circuit is as likely a walk from the hub as the nulls
   are, and the rank of its count among theirs gives an exact p however little was mixed (Besag &
   Clifford, Biometrika 76:633, 1989).
2. What can be seen depends on how much moved. A z of 30 can be a count 1 % above its nulls that
   moved 2 % of the edges. So each z stands beside the ratio with its interval and the share moved.

A significance profile is the z of the eight types of loops as a vector of length 1 (Milo et al.,
Science 303:1538, 2004): it compares circuits of different sizes.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from numpy import ndarray
from scipy.stats import false_discovery_control

from lens_utils import fused
from lens_utils.errors import BadInput
from lens_utils.motifs import ALONE, Circuit, census

SWAPS = ("cells", "layers", "causal")
NULLS = (*SWAPS, "signs", "weights")
ROUNDS = 10
CHUNK = 1 << 17  # random numbers drawn at once
LARGEST = 100.0
"""An infinite z, of a count that no null differs in, stands in a profile as this."""


class Null(NamedTuple):
    """A circuit like the one given, and how far it is from it."""

    circuit: Circuit
    moved: float
    """Share of the edges that are gone or have another sign (weights: another weight)."""
    attempts: int
    """Swaps tried on the way from the hub; 0 where edges stay."""
    accepted: int


def nulls(
    circuit: Circuit, null: str, count: int, rounds: float | int = ROUNDS, seed: int = 0
) -> Iterator[Null]:
    """`count` random circuits under one of NULLS, each `rounds` attempts per edge from the hub.

    Raises BadInput for an unknown null and for a circuit of fewer than two edges.
    """
    if null not in NULLS:
        raise BadInput(f"no null {null!r}: there are {', '.join(NULLS)}")
    target, source = np.nonzero(circuit.weights)
    weight = circuit.weights[target, source]
    if len(weight) < 2:
        raise BadInput(f"{len(weight)} edges cannot be shuffled: keep more of them")
    rng = np.random.default_rng(seed)
    if null in SWAPS:
        edges = _Edges(circuit, target, source, null)
        edges.swap(rounds, rng)
        for _ in range(count):
            one = edges.copy()
            accepted = one.swap(rounds, rng)
            weights = np.zeros_like(circuit.weights)
            weights[one.ends[:, 0], one.ends[:, 1]] = weight[one.sorted]
            moved = np.sign(weights[target, source]) != np.sign(weight)
            yield Null(_with(circuit, weights), moved.mean(), round(rounds * len(weight)), accepted)
        return
    between = circuit.layer[target] * (np.ptp(circuit.layer) + 1) + circuit.layer[source]
    order = np.argsort(between, kind="stable")
    for _ in range(count):
        if null == "signs":
            dealt = np.empty_like(weight)
            dealt[order] = np.sign(weight)[np.lexsort((rng.random(len(weight)), between))]
            dealt *= np.abs(weight)
        else:
            dealt = rng.permutation(weight)
        weights = np.zeros_like(circuit.weights)
        weights[target, source] = dealt
        yield Null(_with(circuit, weights), (dealt != weight).mean(), 0, 0)


def mixing(
    circuit: Circuit,
    null: str,
    rounds: tuple[float | int, ...] = (1, 3, 10, 30, 100),
    seed: int = 0,
) -> pd.DataFrame:
    """The share of edges moved after these many attempts per edge: has it stopped growing?

    Each row is one null, from a hub as far away as itself; with its attempts and acceptances.
    """
    rows = []
    for n in rounds:
        found = next(nulls(circuit, null, 1, n, seed))
        rows.append({"null": null, "rounds": n, "moved": found.moved,
                     "attempts": found.attempts, "accepted": found.accepted})  # fmt: skip
    return pd.DataFrame(rows)


def enrichment(
    circuit: Circuit,
    null: str,
    count: int = 100,
    rounds: float | int = ROUNDS,
    statistic: Callable[[Circuit], dict[str, float]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Each motif's count beside its nulls: a row per motif.

    found, expected (the nulls' mean) and sd; ratio = found / expected, from low to high: found over
    the nulls' 97.5th and 2.5th percentiles, so that an interval without 1 is a count outside 95 %
    of the nulls; z; p, two-sided, from the rank among the nulls, at least 2 / (count + 1); q, p
    after Benjamini & Hochberg over the motifs. A motif that no null changes has neither z, p nor q.
    Then what the null did, the same in all rows: null, count, moved (mean share of edges), attempts
    and accepted (swaps, of all nulls together).

    `statistic` gives the counts of a circuit; without it they are those that degrees do not fix
    (motifs.ALONE). Raises BadInput as `nulls` does, and for fewer than two nulls.
    """
    if count < 2:
        raise BadInput(f"a null distribution needs 2 or more nulls, not {count}")
    measured = statistic or _alone
    found = measured(circuit)
    drawn, moved, attempts, accepted = [], [], 0, 0
    for one in nulls(circuit, null, count, rounds, seed):
        values = measured(one.circuit)
        drawn.append([values[name] for name in found])
        moved.append(one.moved)
        attempts, accepted = attempts + one.attempts, accepted + one.accepted
    table = _against(np.array(list(found.values()), float), np.array(drawn, float))
    table.insert(0, "motif", list(found))
    return table.assign(null=null, count=count, moved=np.mean(moved), attempts=attempts,
                        accepted=accepted)  # fmt: skip


def profile(z: Float[ndarray, "*lead motif"]) -> Float[ndarray, "*lead motif"]:
    """Significance profile: z as a vector of length 1; all 0 where nothing differs from its null.

    NaN (a motif that no null changes) counts as 0, infinity as LARGEST.
    """
    clean = np.nan_to_num(z, nan=0.0, posinf=LARGEST, neginf=-LARGEST)
    length = np.linalg.norm(clean, axis=-1, keepdims=True)
    return np.divide(clean, length, out=np.zeros_like(clean), where=length > 0)


def compare(
    profiles: Float[ndarray, "graph motif"],
    group: Shaped[ndarray, " graph"],
    prompt: Shaped[ndarray, " graph"],
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Do groups of graphs (models, trace and answer) have the same mean profile? A row per two.

    cosine of the two mean profiles with low and high (95 %, percentiles over resampled prompts; a
    prompt brings all its graphs); distance between them, and p: how often it is as large when the
    groups' names are dealt out at random over prompts. Prompts that both groups have are compared
    with themselves (paired, the others are left out); without any, prompts are shuffled whole. q is
    p after Benjamini & Hochberg over the rows; n is the number of prompts. Noise shortens a cosine:
    below 1 it says nothing without its p. Raises BadInput for a pair of groups with fewer than two
    prompts each.
    """
    rng = np.random.default_rng(seed)
    rows = [_compared(_by_prompt(profiles, group, prompt, pair), pair, draws, rng)
            for pair in itertools.combinations(np.unique(group), 2)]  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(q=false_discovery_control(table["p"]) if len(table) else [])


def _alone(circuit: Circuit) -> dict[str, float]:
    counts = census(circuit.weights)
    return {name: float(counts[name]) for name in ALONE}


def _with(circuit: Circuit, weights: ndarray) -> Circuit:
    return Circuit(weights, circuit.layer, circuit.pos, circuit.climb)


def _against(found: Float[ndarray, " motif"], drawn: Float[ndarray, "null motif"]) -> pd.DataFrame:
    expected, sd = drawn.mean(0), drawn.std(0, ddof=1)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    above, below = (drawn >= found).sum(0), (drawn <= found).sum(0)
    p = np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (len(drawn) + 1))
    varies = (drawn != found).any(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        table = pd.DataFrame({
            "found": found, "expected": expected, "sd": sd, "ratio": found / expected,
            "low": found / high, "high": found / low, "z": (found - expected) / sd,
        })  # fmt: skip
    q = np.full(len(p), np.nan)
    if varies.any():
        q[varies] = false_discovery_control(p[varies])
    return table.assign(p=np.where(varies, p, np.nan), q=q)


class _Edges:
    """Edges of a circuit as pairs of ends that can be swapped, sorted by sign and source's place.

    A kind is a place and a sign. Every edge keeps its source's kind and its target's, so where the
    edges of a kind lie (`leaving` in the list itself, `entering` in `order`) is known for good.
    """

    def __init__(self, circuit: Circuit, target: ndarray, source: ndarray, null: str) -> None:
        places = {
            "cells": np.stack([circuit.layer, circuit.pos]),
            "layers": circuit.layer[None],
            "causal": np.zeros((1, len(circuit.layer)), int),
        }[null]
        self.place = np.unique(places, axis=1, return_inverse=True)[1].astype(np.int32)
        positive = circuit.weights[target, source] > 0
        kinds = 2 * (self.place.max() + 1)
        leaving, entering = (2 * self.place[end] + positive for end in (source, target))
        self.sorted = np.argsort(leaving, kind="stable")
        self.ends = np.stack([target, source], 1)[self.sorted].astype(np.int32)
        self.positive = positive[self.sorted]
        self.order = np.argsort(entering[self.sorted], kind="stable").astype(np.int32)
        self.leaving, self.entering = (
            np.r_[0, np.cumsum(np.bincount(kind, minlength=kinds))] for kind in (leaving, entering)
        )
        self.blocked = ~circuit.possible | (circuit.weights != 0)

    def copy(self) -> "_Edges":
        other = copy.copy(self)
        other.ends, other.blocked = self.ends.copy(), self.blocked.copy()
        return other

    def swap(self, rounds: float | int, rng: np.random.Generator) -> int:
        """Try that many swaps per edge; how many were made."""
        attempts, accepted = round(rounds * len(self.ends)), 0
        for start in range(0, attempts, CHUNK):
            draws = rng.random((min(CHUNK, attempts - start), 2))
            accepted += _swap(self.ends, self.positive, self.place, self.order, self.leaving,
                              self.entering, self.blocked, draws)  # fmt: skip
        return accepted


def _swapping(ends, positive, place, order, leaving, entering, blocked, draws):
    """Swap, in place, the sources of two edges of one kind, or the targets of two of one kind."""
    accepted = 0
    for which, partner in draws:
        draw = int(which * 2 * len(ends))
        i = draw >> 1
        b, a = ends[i]
        if draw & 1:
            kind = 2 * place[a] + positive[i]
            first = leaving[kind]
            j = first + int(partner * (leaving[kind + 1] - first))
        else:
            kind = 2 * place[b] + positive[i]
            first = entering[kind]
            j = order[first + int(partner * (entering[kind + 1] - first))]
        d, c = ends[j]
        if blocked[d, a] or blocked[b, c]:  # also where the two share an end
            continue
        blocked[b, a] = blocked[d, c] = False
        blocked[d, a] = blocked[b, c] = True
        swapped = draw & 1  # 1: the sources, else the targets
        ends[i, swapped], ends[j, swapped] = ends[j, swapped], ends[i, swapped]
        accepted += 1
    return accepted


_swap = fused.loop(_swapping)


def _by_prompt(profiles: ndarray, group: ndarray, prompt: ndarray, pair: tuple) -> list[dict]:
    """Of each of two groups, the mean profile of every prompt, in the same order if paired."""
    found = []
    for name in pair:
        own = group == name
        found.append({p: profiles[own & (prompt == p)].mean(0) for p in np.unique(prompt[own])})
    shared = [p for p in found[0] if p in found[1]]
    if shared:
        found = [{p: one[p] for p in shared} for one in found]
    if min(map(len, found)) < 2:
        raise BadInput(f"{pair[0]} and {pair[1]}: a comparison needs 2 or more prompts in each")
    return found


def _compared(
    means: list[dict], pair: tuple, draws: int, rng: np.random.Generator
) -> dict[str, object]:
    paired = list(means[0]) == list(means[1])
    one, other = (np.stack(list(m.values())) for m in means)
    cosine = _cosine(one.mean(0), other.mean(0))
    picks = rng.multinomial(len(one), np.full(len(one), 1 / len(one)), draws) / len(one)
    again = picks if paired else rng.multinomial(
        len(other), np.full(len(other), 1 / len(other)), draws) / len(other)  # fmt: skip
    low, high = np.nanpercentile(_cosine(picks @ one, again @ other), [2.5, 97.5])
    distance = np.linalg.norm(one.mean(0) - other.mean(0))
    if paired:
        dealt = rng.choice([-1.0, 1.0], (draws, len(one))) / len(one) @ (one - other)
    else:
        both = np.concatenate([one, other])
        share = np.r_[np.full(len(one), 1 / len(one)), np.full(len(other), -1 / len(other))]
        dealt = rng.permuted(np.tile(share, (draws, 1)), axis=1) @ both
    extreme = (np.linalg.norm(dealt, axis=1) >= distance * (1 - 1e-9)).sum()
    return {
        "one": pair[0], "other": pair[1], "cosine": float(cosine), "low": low, "high": high,
        "distance": distance, "p": (1 + extreme) / (1 + draws), "paired": paired,
        "n": len(one) if paired else len(both),
    }  # fmt: skip


def _cosine(
    one: Float[ndarray, "*draw motif"], other: Float[ndarray, "*draw motif"]
) -> Float[ndarray, "*draw"]:
    with np.errstate(invalid="ignore"):
        lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        return np.asarray((one * other).sum(-1) / lengths)
