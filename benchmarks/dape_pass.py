"""DAPE: what does one counting pass cost beside the plain forward passes over the same texts?

The organism reads random rows of cell tokens, as long as 011's questions with their replies. CPU
seconds of one thread, best of three, for
    forward     the bridge's forward passes alone, logits of the last position
    the data    counts of three domains in four regions
    shuffled    the same with 499 shuffled labels, 100 resamples of the mazes and both halves
    eight       eight such contrasts at once, each of half of the rows: about what 011 counts
and the bytes of the counts with half and with all of the rows: they do not depend on it.

    .venv/bin/python benchmarks/dape_pass.py
"""

import time

import numpy as np
import torch

from lens_utils import dape
from lens_utils.models import load_model

ROWS, WIDTH = 512, 110
REGIONS = {"block": (0, 80), "task": (80, WIDTH), "cue": (90, 95), "answer": (95, WIDTH)}


def seconds(work) -> float:
    found = []
    for _ in range(3):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("maze-organism", device="cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 30, (ROWS, WIDTH), generator=generator)
    rows = ids.tolist()
    label, maze = np.arange(ROWS) % 3, np.arange(ROWS) // 6

    @torch.no_grad()
    def forward() -> None:
        for at in range(0, ROWS, dape.MOST):
            batch, mask = model.batch(rows[at : at + dape.MOST])
            model.bridge(batch, attention_mask=mask, use_cache=False, logits_to_keep=1)

    def counting(n: int, times: int = 1, **drawn: int) -> dict[str, dape.Tally]:
        spans = {name: [span] * n for name, span in REGIONS.items()}
        asked = {}
        for k in range(times):
            of = label[:n] if times == 1 else np.where(np.arange(n) % 2 == k % 2, label[:n], -1)
            asked[f"{k}"] = dape.draws(of, maze[:n], maze[:n], "task", **drawn)
        return dape.tally(model, rows[:n], spans, asked)

    plain = seconds(forward)
    shuffled = {"n_shuffles": 499, "n_resamples": 100}
    eight = {"n_shuffles": 499, "times": 8}
    print(f"{ROWS} rows of {WIDTH} tokens; forward {plain:.2f} CPU s")
    for name, drawn in (("the data", {}), ("shuffled", shuffled), ("eight", eight)):
        taken = seconds(lambda drawn=drawn: counting(ROWS, **drawn))
        print(f"{name}: {taken:.2f} CPU s, {taken / plain:.2f} of the forward")
    held = [counting(n, **shuffled)["0"].counts for n in (ROWS // 2, ROWS)]
    sizes = [x.numel() * x.element_size() for x in held]
    print(f"counts: {sizes[0]} bytes for {ROWS // 2} rows, {sizes[1]} for {ROWS}")


if __name__ == "__main__":
    main()
