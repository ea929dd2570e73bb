"""Sets of MLP neurons taken away: what does the right answer lose, against matched random sets?

A neuron is the input of the down projection (`mlp.hook_post`). Taking it away means to write its
mean, or zero, behind a position of the prompt, and to read the log-probability of the right answer
by teacher forcing. A random set that controls for it has the same number of neurons in every layer,
with about the same rates: what is left is which neurons they are.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_utils import dape
from lens_utils.dape import Span
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

NEAREST = 20  # of these neurons, the nearest in rate, one is drawn


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


@torch.no_grad()
def answer_logp(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    answers: Sequence[Span],
    gone: Bool[Tensor, "layer neuron"] | None = None,
    values: Float[Tensor, "layer neuron"] | None = None,
    begin: Sequence[int] | None = None,
) -> Float[Tensor, " row"]:
    """Log-probability (nats) of the tokens in each row's span, given all before; on the CPU.

    gone: neurons that are set to `values` (nothing: zero) from position `begin` of each row on
    (nothing: from the first). Raises BadInput for an answer without a token before it.
    """
    if any(start < 1 for start, _ in answers):
        raise BadInput("an answer at the first position has nothing to be predicted from")
    found = torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), dape.MOST):
        at = order[start : start + dape.MOST]
        ids, mask = model.batch([rows[i] for i in at])
        behind = dape.mask([(begin[i] if begin else 0, len(rows[i])) for i in at],
                           ids.shape[1], model.device)  # fmt: skip
        hooks = [] if gone is None else _writers(gone, values, behind.bool())
        first = min(answers[i][0] for i in at) - 1
        logits = model.bridge.run_with_hooks(
            ids, attention_mask=mask, fwd_hooks=hooks, use_cache=False,
            logits_to_keep=ids.shape[1] - first,
        )  # fmt: skip
        following = ids[:, first + 1 :].to(logits.device)
        logp = logits[:, :-1].float().log_softmax(-1).gather(2, following[..., None])[..., 0]
        spans = [(answers[i][0] - 1 - first, answers[i][1] - 1 - first) for i in at]
        inside = dape.mask(spans, logp.shape[1], logp.device)
        found[at] = (logp * inside).sum(1).cpu()
    return found


def _writers(
    gone: Bool[Tensor, "layer neuron"],
    values: Float[Tensor, "layer neuron"] | None,
    behind: Bool[Tensor, "row pos"],
) -> list[tuple[str, Callable]]:
    """Hooks that set the neurons of every layer that loses some."""

    def writer(layer: int) -> Callable[..., Tensor]:
        def write(x: Tensor, hook: object) -> Tensor:
            new = torch.zeros_like(gone[layer], dtype=x.dtype) if values is None else values[layer]
            where = behind.to(x.device)[..., None] & gone[layer].to(x.device)
            return torch.where(where, new.to(x.device, x.dtype), x)

        return write

    return [
        (f"blocks.{layer}.mlp.hook_post", writer(layer))
        for layer in range(len(gone))
        if gone[layer].any()
    ]
