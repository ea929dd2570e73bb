"""Head series: what do text and head norms of many prompts cost, together and one by one?

Compared, on prompts of 005 and the embedded model, CPU seconds of one thread:
    together    20 prompts generated as one batch (ends banned), then one whole pass for the norms
    one by one  a prompt at a time, hooked at every step: the norms come while it writes
Claim: at least 4 times the rate of one by one, and the same norms.

    .venv/bin/python benchmarks/head_series.py
"""

import time

import torch

from lens_utils import generate, prompts, provenance, series
from lens_utils.models import load_model

PROMPTS, STEPS, ALONE = 20, 50, 3


def together(model, rows):
    """Tokens and norms; the seconds of both halves."""
    start = time.process_time()
    tokens = generate.continuations(model, rows, STEPS)
    middle = time.process_time()
    whole = [[*row, *text[:-1]] for row, text in zip(rows, tokens.tolist(), strict=True)]
    norms = series.head_norms(model, whole, STEPS)
    return tokens, norms, middle - start, time.process_time() - middle


def one_by_one(model, row):
    """The obvious way: every step's head outputs are hooked while the prompt is continued."""
    start = time.process_time()
    seen = []

    def note(z, hook):
        seen.append(z[0, -1].double().norm(dim=-1))
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", note) for layer in range(model.n_layers)]
    with model.bridge.hooks(fwd_hooks=hooks):
        tokens = generate.continuations(model, [row], STEPS)
    n_heads = len(series.heads(model))
    norms = torch.cat(seen).unflatten(0, (STEPS, n_heads)).T
    return tokens[0], norms, time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("smol", device="cpu")
    run = str(provenance.EXPERIMENTS / "005_head_phiid" / "run.py")
    rows = [model.encode(p.text) for p in prompts.load(run)[:: 60 // PROMPTS]]
    one_by_one(model, rows[0][:3])  # warm
    tokens, norms, writing, measuring = together(model, rows)
    seconds = gap = 0.0
    for i in range(ALONE):
        text, alone, took = one_by_one(model, rows[i])
        assert torch.equal(text, tokens[i]), "another text"
        seconds += took
        gap = max(gap, ((alone - norms[i]).abs() / alone).max().item())
    fast = PROMPTS * STEPS / (writing + measuring)
    slow = ALONE * STEPS / seconds
    print(f"{STEPS} steps; {PROMPTS} prompts together, {ALONE} one by one; tokens per CPU second")
    print(f"together     {fast:.0f} (writing {writing:.1f} s, norms {measuring:.1f} s)")
    print(f"one by one   {slow:.0f}\nratio        {fast / slow:.1f} (claim: >= 4)")
    print(f"largest relative difference of a norm: {gap:.1e}")


if __name__ == "__main__":
    main()
