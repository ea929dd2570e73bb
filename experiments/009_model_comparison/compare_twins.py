"""What experiment 009 measures itself: heads taken out of an untrained twin, as 007 takes them out.

The twin reads the text that its model wrote; its heads are ordered by its own score (005's
condition `replayed`), from both ends and at random. Nothing has been learned here that the order
could find, so whatever an order costs more than chance comes from the architecture and the score.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lens_utils import divergence, lens, profiles
from lens_utils.experiment import Run

SHARES = (0.1, 0.25, 0.4)
ORDERS, QUICK_ORDERS = 10, 2
STEPS, QUICK_STEPS = 50, 8


class Reading(NamedTuple):
    """A text of one category, as the model wrote it, and how the twin's heads are ordered."""

    model: str
    text: str
    ids: list[int]
    steps: int
    sts: np.ndarray
    """Of every head of the twin, mean over prompts, in nats."""
    rtr: np.ndarray


def readings(
    model: str, asked: Sequence[dict], tokens: Sequence[Sequence[int]], pairs: dict, quick: bool
) -> list[Reading]:
    """The last text of every category (a quick run: of two), its first steps."""
    sts, rtr = (profiles.over_prompts(pairs[f"{atom}_heads"].numpy()) for atom in ("sts", "rtr"))
    last = {prompt["family"]: i for i, prompt in enumerate(asked)}
    chosen = list(last.values())[: 2 if quick else None]
    most = QUICK_STEPS if quick else STEPS
    return [
        Reading(model, asked[i]["id"], [*asked[i]["ids"], *tokens[i][: most - 1]],
                min(most, len(tokens[i])), sts, rtr)
        for i in chosen
    ]  # fmt: skip


def without_heads(run: Run, reading: Reading, quick: bool, seed: int) -> pd.DataFrame:
    """KL(twin || twin without heads), mean over the steps of a text, by order and share."""
    twin = run.model(random_init=True, other=reading.model)
    readout = lens.Readout(twin.bridge)
    shape = twin.n_layers, twin.bridge.cfg.n_heads
    size = shape[0] * shape[1]
    score = profiles.head_scores(reading.sts, reading.rtr)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(size)  # ties fall at random, not by depth
    kinds = {
        "value_diff, high first": shuffled[np.argsort(-score[shuffled], kind="stable")],
        "value_diff, low first": shuffled[np.argsort(score[shuffled], kind="stable")],
    } | {f"random {n}": rng.permutation(size) for n in range(QUICK_ORDERS if quick else ORDERS)}
    counts = [divergence.count(share, size) for share in SHARES]
    sets = [divergence.sets(order.tolist(), counts, *shape) for order in kinds.values()]
    full = divergence.full(twin, readout, torch.tensor(reading.ids), reading.steps)
    kl = divergence.divergence(twin, readout, full, torch.cat(sets)).mean(1)
    rows = pd.MultiIndex.from_product([kinds, SHARES], names=["order", "share"]).to_frame(False)
    kind = rows.order.str.replace(r"random \d+", "random", regex=True)
    return rows.assign(kind=kind, network=f"{reading.model}, untrained", text=reading.text,
                       kl=kl.double().numpy())  # fmt: skip
