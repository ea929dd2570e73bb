"""Sets of MLP neurons taken away: what does the right answer lose, against matched random sets?

A neuron is the input of the down projection (`mlp.hook_post`). Taking it away means to write its
mean, or zero, behind a position of the prompt, and to read the log-probability of the right answer
by teacher forcing. A random set that controls for it has the same number of neurons in every layer,
with about the same rates: what is left is which neurons they are.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_utils import dape
from lens_utils.dape import Span
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

NEAREST = 20  # of these neurons, the nearest in rate, one is drawn


class _Part(NamedTuple):
    """Rows that are run together, from where neurons are taken away."""

    rows: list[int]
    ids: Tensor
    mask: Tensor
    """Of what stands before as well."""
    position: Tensor
    answers: list[Span]
    """Where the answer's tokens are predicted, counted from the first of `ids`."""
    cache: Any


def matched(
    chosen: Bool[Tensor, "layer neuron"],
    rate: Float[Tensor, "layer neuron"],
    barred: Bool[Tensor, "layer neuron"],
    n: int,
    seed: int = 0,
) -> Bool[Tensor, "set layer neuron"]:
    """n random sets: for each chosen neuron another one of its layer, among the nearest in rate.

    barred: neurons that no random set may hold, besides the chosen ones. Raises BadInput where a
    layer has too few others.
    """
    rng = np.random.default_rng(seed)
    sets = torch.zeros(n, *chosen.shape, dtype=torch.bool)
    values = rate.double().numpy()
    for layer, row in enumerate(chosen.numpy()):
        others = np.flatnonzero(~row & ~barred[layer].numpy())
        wanted = np.flatnonzero(row)
        if len(wanted) > len(others):
            raise BadInput(f"layer {layer}: {len(wanted)} neurons are chosen and {len(others)} are "
                           "left to draw random ones from")  # fmt: skip
        for drawn in sets:
            free = others.copy()
            for neuron in rng.permutation(wanted):
                gap = np.abs(values[layer, free] - values[layer, neuron])
                near = np.argsort(gap, kind="stable")[:NEAREST]
                at = rng.choice(near)
                drawn[layer, free[at]] = True
                free = np.delete(free, at)
    return sets


@torch.no_grad()
def means(
    model: LoadedModel, rows: Sequence[Sequence[int]], spans: Sequence[Span]
) -> Float[Tensor, "layer neuron"]:
    """Every neuron's mean over the tokens of one span per row; on the CPU. Raises BadInput."""
    total = torch.zeros(model.n_layers, model.bridge.cfg.d_mlp, dtype=torch.float64)
    for at, values in dape.batches(model, rows, "value"):
        inside = dape.mask([spans[i] for i in at], values[0].shape[1], model.device)
        for layer, x in enumerate(values):
            total[layer] += (inside.to(x.device).flatten() @ x.float().flatten(0, 1)).cpu()
    return (total / max(1, sum(end - start for start, end in spans))).float()


class Asked:
    """Questions with their right answers, read once up to where neurons are taken away.

    What stands before that is the same whatever is taken away: its keys and values are kept. Rows
    of like length are run together, that part padded on the left, the rest on the right.
    """

    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Span],
        begin: Sequence[int],
    ) -> None:
        """answers: one span per row; begin: the first position at which neurons are taken away.

        Raises BadInput for an answer that begins at or before it.
        """
        if any(start <= first for (start, _), first in zip(answers, begin, strict=True)):
            raise BadInput("neurons have to be taken away before the answer begins")
        self.model, self.n_rows = model, len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        self._parts = [
            self._read([(i, rows[i], answers[i], begin[i]) for i in order[n : n + dape.MOST]])
            for n in range(0, len(order), dape.MOST)
        ]

    @torch.no_grad()
    def _read(self, some: Sequence[tuple[int, Sequence[int], Span, int]]) -> _Part:
        at, cache = [i for i, _, _, _ in some], None
        ids, mask = self.model.batch([row[first:] for _, row, _, first in some])
        before, there = self.model.batch([row[:first] for _, row, _, first in some], "left")
        position = (torch.cat([there, mask], 1).cumsum(1) - 1).clamp_min(0)
        if before.shape[1]:
            _, cache = self.model.bridge(
                before, attention_mask=there, position_ids=position[:, : before.shape[1]],
                use_cache=True, logits_to_keep=1, return_type="logits_and_cache",
            )  # fmt: skip
        spans = [(start - 1 - first, end - 1 - first) for _, _, (start, end), first in some]
        return _Part(
            at, ids, torch.cat([there, mask], 1), position[:, before.shape[1] :], spans, cache
        )

    @torch.no_grad()
    def logp(
        self,
        gone: Bool[Tensor, "layer neuron"] | None = None,
        values: Float[Tensor, "layer neuron"] | None = None,
    ) -> Float[Tensor, " row"]:
        """Log-probability (nats) of each row's answer with the neurons `gone` set to `values`
        (nothing: zero); on the CPU."""
        found = torch.zeros(self.n_rows)
        for part in self._parts:
            hooks = [] if gone is None else _writers(gone, values)
            first = min(start for start, _ in part.answers)
            logits = self.model.bridge.run_with_hooks(
                part.ids, attention_mask=part.mask, position_ids=part.position, fwd_hooks=hooks,
                past_key_values=copy.deepcopy(part.cache), use_cache=part.cache is not None,
                logits_to_keep=part.ids.shape[1] - first,
            )  # fmt: skip
            following = part.ids[:, first + 1 :].to(logits.device)
            logp = logits[:, :-1].float().log_softmax(-1).gather(2, following[..., None])[..., 0]
            spans = [(start - first, end - first) for start, end in part.answers]
            inside = dape.mask(spans, logp.shape[1], logp.device)
            found[part.rows] = (logp * inside).sum(1).cpu()
        return found


def _writers(
    gone: Bool[Tensor, "layer neuron"], values: Float[Tensor, "layer neuron"] | None
) -> list[tuple[str, Callable]]:
    """Hooks that set the neurons of every layer that loses some."""

    def writer(layer: int) -> Callable[..., Tensor]:
        def write(x: Tensor, hook: object) -> Tensor:
            new = torch.zeros(gone.shape[1]) if values is None else values[layer]
            return torch.where(gone[layer].to(x.device), new.to(x.device, x.dtype), x)

        return write

    return [
        (f"blocks.{layer}.mlp.hook_post", writer(layer))
        for layer in range(len(gone))
        if gone[layer].any()
    ]
