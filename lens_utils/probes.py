"""Linear probes, thousands at once: L2-regularised logistic regression on the model's device.

A probe asks whether a yes-or-no label can be read from states by a plane. One question (a label,
some rows to train on) is put to many sets of states (layers, positions), and many questions are
put to the same states, so all of them are solved together:

    minimise  Σ_train log(1 + exp(-s (w·x̂ + b)))  +  penalty/2 |w|²       s = ±1, x̂ standardised

with mean and standard deviation of x̂ taken from the problem's own training rows. It is scikit-
learn's objective behind a StandardScaler, with penalty = 1/C. Training rows are a mask: the states
lie in memory once, whatever the number of folds, and one matrix product serves all problems.

The solver is L-BFGS (Nocedal & Wright 2006, algorithm 7.5) with a memory per problem. It starts
each direction from the states' inverse covariance, which residual streams need: a few directions
hold most of their variance. Steps are found on the logits alone, without a further product. A
problem is over when no entry of its mean gradient is above `tolerance`; the largest is returned.
"""

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_utils.errors import BadInput, Failure

MEMORY = 12  # pairs of steps and gradients that stand for the curvature
MOST = 400  # steps
TOLERANCE = 1e-4


class Probes(NamedTuple):
    """Fitted probes: logits of raw states x are x · weights + bias."""

    weights: Float[Tensor, "group problem feature"]
    """In units of the raw features."""
    bias: Float[Tensor, "group problem"]
    scaled: Float[Tensor, "group problem feature"]
    """The same per standard deviation of each feature: what is penalised, and compared."""
    gradient: Float[Tensor, "group problem"]
    """Largest entry of the mean loss's gradient at the end."""
    steps: int

    def logits(
        self, states: Float[Tensor, "group sample feature"]
    ) -> Float[Tensor, "group problem sample"]:
        """Log-odds of the label for every row, trained on or not."""
        found = einsum(
            self.weights, states.float(),
            "group problem feature, group sample feature -> group problem sample",
        )  # fmt: skip
        return found + self.bias[..., None]
