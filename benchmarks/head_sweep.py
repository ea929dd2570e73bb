"""Head sweep: what does it cost to ablate every head of a model, one after the other?

Compared, on one prompt and all 270 heads of the embedded model, CPU seconds of one thread:
    ours        the heads of a layer as rows of one forward pass, which begins at that layer
    baseline    one forward pass per head with a hook on z, no KV cache, logits of the last token
Claim: at most 0.40 of the baseline at 48 tokens and 0.25 at 12, same numbers to 1e-4.

    .venv/bin/python benchmarks/head_sweep.py
"""

import statistics
import time

import torch

from lens_utils import pairs, sweeps
from lens_utils.models import LoadedModel, load_model
from lens_utils.pairs import Batch

REPEATS = 3
CLAIMS = {12: 0.25, 48: 0.40}


def ours(model: LoadedModel, batch: Batch) -> torch.Tensor:
    return sweeps.sweep(model, batch, "z", "zero", over=["head"]).logit_diff[0]


@torch.no_grad()
def baseline(model: LoadedModel, batch: Batch) -> torch.Tensor:
    cfg = model.bridge.cfg
    found = torch.empty(cfg.n_layers, cfg.n_heads)
    for layer in range(cfg.n_layers):
        for head in range(cfg.n_heads):

            def ablate(z, hook, head=head):
                z = z.clone()
                z[:, :, head] = 0
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", ablate)]
            logits = model.bridge.run_with_hooks(
                batch.clean, fwd_hooks=hooks, use_cache=False, logits_to_keep=1
            )[0, -1]
            found[layer, head] = logits[batch.answer[0]] - logits[batch.foil[0]]
    return found


def seconds(work, *args) -> tuple[float, torch.Tensor]:
    start = time.process_time()
    found = work(*args)
    return time.process_time() - start, found


def random_pair(model: LoadedModel, length: int) -> Batch:
    """A prompt of random tokens and one with another last token: any prompt will do."""
    return pairs.batch(model, pairs.induction(model, 1, length - len(model.bos) - 1))


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("smol", device="cpu")
    for length, claim in CLAIMS.items():
        batch = random_pair(model, length)
        a, b = [], []
        for _ in range(REPEATS):  # interleaved, so that a busy machine slows both
            a.append(seconds(ours, model, batch))
            b.append(seconds(baseline, model, batch))
        ratio = statistics.median(x[0] / y[0] for x, y in zip(a, b, strict=True))
        gap = (a[0][1] - b[0][1]).abs().max()
        print(f"{batch.clean.shape[1]} tokens: ours {min(x[0] for x in a):.1f} s, "
              f"baseline {min(y[0] for y in b):.1f} s, ratio {ratio:.2f} (claim: <= {claim}), "
              f"largest difference {gap:.1e} nats (claim: <= 1e-4)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
