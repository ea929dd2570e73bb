"""Residual sweep: what does it cost to patch the residual stream at every layer and position?

Compared, on 2 pairs of one wording and resid_pre of the embedded model, CPU seconds of one thread:
    ours        the positions of a layer as rows of one forward pass, which begins at that layer
    baseline    transformer_lens.patching.get_act_patch_resid_pre: one forward pass per cell
Claim: at most half of the baseline, same numbers to 1e-4.

    TQDM_DISABLE=1 .venv/bin/python benchmarks/resid_sweep.py
"""

import statistics
import time

import torch
from transformer_lens.patching import get_act_patch_resid_pre

from lens_utils import pairs, prompts, provenance, sweeps
from lens_utils.models import LoadedModel, load_model
from lens_utils.pairs import Batch

REPEATS, PAIRS = 3, 2


def ours(model: LoadedModel, batch: Batch) -> torch.Tensor:
    return sweeps.sweep(model, batch, "resid_pre").logit_diff.mean(0)


@torch.no_grad()
def baseline(model: LoadedModel, batch: Batch) -> torch.Tensor:
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
    _, cache = model.bridge.run_with_cache(batch.clean, names_filter=names, logits_to_keep=1)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        return (last.gather(1, batch.answer[:, None]) - last.gather(1, batch.foil[:, None])).mean()

    return get_act_patch_resid_pre(model.bridge, batch.corrupt, cache, metric)


def seconds(work, *args) -> tuple[float, torch.Tensor]:
    start = time.process_time()
    found = work(*args)
    return time.process_time() - start, found


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("smol", device="cpu")
    run = str(provenance.EXPERIMENTS / "004_activation_patching" / "run.py")
    made, _ = pairs.pairs(model, [p for p in prompts.load(run, "capital") if p.template == "city"])
    batch = next(pairs.batches(model, made, PAIRS))
    a, b = [], []
    for _ in range(REPEATS):  # interleaved, so that a busy machine slows both
        a.append(seconds(ours, model, batch))
        b.append(seconds(baseline, model, batch))
    ratio = statistics.median(x[0] / y[0] for x, y in zip(a, b, strict=True))
    gap = (a[0][1] - b[0][1]).abs().max()
    print(f"{PAIRS} pairs of {batch.clean.shape[1]} tokens, {model.n_layers} layers: "
          f"ours {min(x[0] for x in a):.1f} s, baseline {min(y[0] for y in b):.1f} s, "
          f"ratio {ratio:.2f} (claim: <= 0.5), largest difference {gap:.1e} nats")  # fmt: skip


if __name__ == "__main__":
    main()
