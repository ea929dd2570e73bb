"""Linear probes, thousands at once: L2-regularised logistic regression on the states' device.

A probe asks whether a yes-or-no label can be read from states by a plane. One question (a label,
some rows to train on) is put to many sets of states (layers, positions), and many questions are
put to the same states, so all of them are solved together:

    minimise  Σ weight · log(1 + exp(-s (w·x̂ + b)))  +  penalty/2 |w|²      s = ±1, x̂ standardised

Mean and standard deviation in x̂ are those of the problem's own training rows. It is scikit-learn's
objective behind a StandardScaler, with penalty = 1/C. Rows of weight 0 are held out: the states lie
in memory once, whatever the number of folds, and one matrix product serves all problems.

The solver is L-BFGS (Nocedal & Wright 2006, algorithm 7.5) with a memory for every problem. It
takes the states' inverse covariance as its first idea of the curvature, because a few directions
hold most of a residual stream's variance; without it, it needs four times the steps. The length of
a step is found on the logits alone. A problem is over when no entry of its mean loss's gradient is
above the tolerance, and then costs nothing more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from lens_utils.errors import BadInput, Failure

MEMORY = 12  # pairs of steps and gradients that stand for the curvature
MOST = 500  # steps; the hardest problems seen took 60
CURVATURE = 0.1  # p(1 - p) of a typical row: at most 0.25, near 0 for rows that are settled
CONSTANT = 1e-3  # of a feature's spread over all rows; less among training rows is rounding
CROWDED = 0.7  # of the problems still at work; below it the others leave the arrays
FLOATS = {"cpu": 2**21, "other": 2**30}  # held at once: about a CPU's cache, 4 GB of a GPU


class Probes(NamedTuple):
    """Fitted probes: the log-odds of raw states x are x · weights + bias."""

    weights: Float[Tensor, "group problem feature"]
    """In units of the raw features."""
    bias: Float[Tensor, "group problem"]
    scaled: Float[Tensor, "group problem feature"]
    """Per standard deviation of each feature: what is penalised, and what can be compared."""
    gradient: Float[Tensor, "group problem"]
    """Largest entry of the mean loss's gradient at the end: below the tolerance."""

    def logits(
        self, states: Float[Tensor, "group sample feature"]
    ) -> Float[Tensor, "group problem sample"]:
        """Log-odds of the label for every row, trained on or not."""
        found = einsum(
            self.weights, states.float(),
            "group problem feature, group sample feature -> group problem sample",
        )  # fmt: skip
        return found + self.bias[..., None]


def fit(
    states: Float[Tensor, "group sample feature"],
    labels: Bool[Tensor, "problem sample"],
    weight: Float[Tensor, "problem sample"],
    penalty: float = 1.0,
    tolerance: float = 1e-4,
) -> Probes:
    """Every problem on every group of states. Computed in float32.

    weight: how much each row counts in the loss and in the standardisation; 0 holds it out.
    Raises BadInput for training rows of one class and states that are no numbers, and Failure if a
    problem does not converge.
    """
    if not bool((learnable(labels, weight)).all()):
        raise BadInput("a probe needs training rows of both classes: leave such problems out")
    if not bool(states.isfinite().all()):
        raise BadInput("states to probe have to be finite numbers")
    labels, weight = labels.to(states.device), weight.to(states.device).float()
    at_once = FLOATS["cpu" if states.device.type == "cpu" else "other"]
    _, n_samples, n_features = states.shape
    each = 6 * n_samples + 2 * (MEMORY + 3) * n_features
    n_problems = max(1, min(len(labels), at_once // each))
    n_groups = max(1, at_once // (n_problems * each + 4 * n_features**2))
    groups = []
    for some in states.split(n_groups):
        solver = _Solver(some.float(), penalty)
        parts = zip(labels.split(n_problems), weight.split(n_problems), strict=True)
        solved = [solver.solve(y, w, tolerance) for y, w in parts]
        groups.append(Probes(*(torch.cat(field, 1) for field in zip(*solved, strict=True))))
    return Probes(*(torch.cat(field) for field in zip(*groups, strict=True)))


class _Solver:
    """Some groups of states, whitened once for all problems on them.

    A problem's unknowns are the weights of its own standardised features and the bias, last.
    """

    def __init__(self, states: Float[Tensor, "group sample feature"], penalty: float) -> None:
        self.penalty = penalty
        self.centre = states.mean(1, keepdim=True)
        spread = states.std(1, keepdim=True, correction=0)
        self.spread = torch.where(spread > 1e-5 * self.centre.abs(), spread, 1)
        self.x = (states - self.centre) / self.spread
        self.covariance = self.x.mT @ self.x / states.shape[1]

    def solve(
        self,
        labels: Bool[Tensor, "problem sample"],
        weight: Float[Tensor, "problem sample"],
        tolerance: float,
    ) -> Probes:
        """L-BFGS on all problems at once; one that is over stands still."""
        self._rows(labels, weight)
        total = weight.sum(1)
        eye = torch.eye(self.x.shape[2], device=self.x.device)
        guess = CURVATURE * total.mean() * self.covariance + self.penalty * eye
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(guess))
        shape = (len(self.x), len(labels), self.x.shape[2] + 1)
        whole, at = self.x.new_zeros(shape), self.x.new_zeros(shape)
        z = self.x.new_zeros(*shape[:2], self.x.shape[1])
        gradient = self._gradient(at, z)
        ends = self.x.new_zeros(shape[:2])
        left = torch.arange(len(labels), device=self.x.device)
        memory: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(MOST):
            worst = gradient.abs().amax(-1) / self.total
            ends[:, left], whole[:, left] = worst, at
            live = worst > tolerance
            keep = live.any(0)
            if not keep.any():
                break
            if keep.float().mean() < CROWDED:
                left, at, z = left[keep], at[:, keep], z[:, keep]
                gradient, live = gradient[:, keep], live[:, keep]
                memory = [(s[:, keep], y[:, keep], r[:, keep]) for s, y, r in memory]
                self._rows(labels[left], weight[left], [self.mean[:, keep], self.scale[:, keep]])
            way = -self._direction(gradient, memory) * live[..., None]
            z_way = self._product(way)
            length = self._length(at, z, way, z_way, gradient, live)
            step = length[..., None] * way
            at, z = at + step, z + length[..., None] * z_way
            after = self._gradient(at, z)
            change = after - gradient
            curve = (step * change).sum(-1)  # positive: the objective is strictly convex
            rho = torch.where(curve > 1e-12, 1 / curve.clamp_min(1e-12), 0)
            memory = [*memory, (step, change, rho)][-MEMORY:]
            gradient = after
        else:
            raise Failure(f"a probe did not converge in {MOST} steps: the gradient is still "
                          f"{float(worst.max()):.1e}; a higher penalty helps")  # fmt: skip
        self._rows(labels, weight)
        scaled, bias = whole[..., :-1], whole[..., -1]
        weights = scaled / self.scale
        bias = bias - (self.mean * weights).sum(-1)
        weights = weights / self.spread
        return Probes(weights, bias - (weights * self.centre).sum(-1), scaled, ends)

    def _rows(
        self,
        labels: Bool[Tensor, "problem sample"],
        weight: Float[Tensor, "problem sample"],
        known: Sequence[Tensor] = (),
    ) -> None:
        """The problems now at work: their rows and, unless known, their standardisation."""
        self.y, self.weight, self.total = labels.float(), weight, weight.sum(1)
        if not known:
            share = (weight / self.total[:, None]).expand(len(self.x), -1, -1)
            mean = share @ self.x
            variance = share @ self.x.square() - mean.square()
            scale = variance.clamp_min(0).sqrt()
            known = (mean, torch.where(scale > CONSTANT, scale, 1))
        self.mean, self.scale = known

    def _product(self, at: Tensor) -> Tensor:
        """Logits of all rows; `at` may be a direction."""
        weights = at[..., :-1] / self.scale
        offset = at[..., -1] - (self.mean * weights).sum(-1)
        return weights @ self.x.mT + offset[..., None]

    def _gradient(self, at: Tensor, z: Tensor) -> Tensor:
        rest = (z.sigmoid() - self.y) * self.weight
        total = rest.sum(-1, keepdim=True)
        slopes = (rest @ self.x - self.mean * total) / self.scale + self.penalty * at[..., :-1]
        return torch.cat([slopes, total], -1)

    def _whiten(self, gradient: Tensor) -> Tensor:
        bias = gradient[..., -1:] / (CURVATURE * self.total[:, None])
        return torch.cat([gradient[..., :-1] @ self.inverse, bias], -1)

    def _direction(self, gradient: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """The two loops of L-BFGS: the inverse curvature, as far as it is known, of a gradient."""
        found, shares = gradient, []
        for step, change, rho in reversed(memory):
            shares.append(rho * (step * found).sum(-1))
            found = found - shares[-1][..., None] * change
        found = self._whiten(found)
        if memory:
            step, change, rho = memory[-1]
            ratio = (step * change).sum(-1) / (change * self._whiten(change)).sum(-1)
            found = found * torch.where(rho > 0, ratio, 1)[..., None]
        for (step, change, rho), share in zip(memory, reversed(shares), strict=True):
            found = found + (share - rho * (change * found).sum(-1))[..., None] * step
        return found

    def _length(
        self, at: Tensor, z: Tensor, way: Tensor, z_way: Tensor, gradient: Tensor, live: Tensor
    ) -> Tensor:
        """How far to go: at most one, shortened by the secant while the slope there is uphill.

        A convex function has fallen wherever its slope is still down; slopes, unlike differences
        of values, keep their sign in float32.
        """
        down = (gradient * way).sum(-1).abs()
        pulled = self.penalty * (at[..., :-1] * way[..., :-1]).sum(-1)
        bent = self.penalty * way[..., :-1].square().sum(-1)
        rows = z_way * self.weight
        length = torch.ones_like(down)
        for _ in range(20):
            slope = (((z + length[..., None] * z_way).sigmoid() - self.y) * rows).sum(-1)
            slope = slope + pulled + length * bent
            over = (slope > 0.5 * down) & live
            if not over.any():
                break
            shorter = (down / (down + slope)).clamp_min(0.1)
            length = torch.where(over, length * shorter, length)
        return length


# What to train on


def learnable(
    labels: Bool[Tensor, "problem sample"], weight: Float[Tensor, "problem sample"]
) -> Bool[Tensor, " problem"]:
    """Whether a problem's training rows are of both classes."""
    taken = weight > 0
    return (labels & taken).any(1) & (~labels & taken).any(1)


def balanced(
    labels: Bool[Tensor, "problem sample"], taken: Bool[Tensor, "problem sample"]
) -> Float[Tensor, "problem sample"]:
    """Weights under which both classes count alike and a row counts 1 on average.

    scikit-learn's class_weight="balanced". Chance is then 0.5 for every label.
    """
    yes, no = labels & taken, ~labels & taken
    half = taken.sum(1, keepdim=True) / 2
    return yes * half / yes.sum(1, keepdim=True).clamp_min(1) + no * half / no.sum(
        1, keepdim=True
    ).clamp_min(1)


def folds(groups: Shaped[ndarray, " sample"], k: int, seed: int = 0) -> Int[ndarray, " sample"]:
    """A fold 0 .. k - 1 for every row; rows of one group share theirs, folds have as many groups.

    Raises BadInput for fewer groups than folds.
    """
    names, number = np.unique(groups, return_inverse=True)
    if not 2 <= k <= len(names):
        raise BadInput(f"{len(names)} mazes cannot be divided into {k} folds: ask for 2 to "
                       f"{len(names)}")  # fmt: skip
    place = np.random.default_rng(seed).permutation(len(names)) % k
    return place[number]


def online_blocks(n_groups: int, first: int = 4) -> list[tuple[int, int]]:
    """Blocks (start, stop) of groups for the online code: each is as long as all before it.

    A probe fitted on the groups before `start` codes those from start to stop (Voita & Titov 2020,
    arXiv:2003.12298). The first block has nobody to code it and costs one bit a row.
    """
    edges = [0, first]
    while edges[-1] < n_groups:
        edges.append(min(2 * edges[-1], n_groups))
    return list(zip(edges, edges[1:], strict=False))
