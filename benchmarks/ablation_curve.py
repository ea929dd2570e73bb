"""Ablation curves: what does branching cost beside one forward pass per point?

Compared on the same sets of heads, CPU seconds of one thread, log-probabilities of the full model
kept by both:
    ours        many sets in one pass, nothing that two sets share computed twice
    baseline    one forward pass of the same model for each set, with hooks on its heads, logits at
                the steps only, and torch's kl_div
for single heads (every head of every fifth layer), for curves after every head, after every five
heads, and for random orders at three shares. Texts: the length that 007 reads (a prompt and 32
tokens), and a prompt and 100 tokens. What two random sets share is next to nothing, and a long text
fills the core as well alone as in company: there, little is left to be saved.

    .venv/bin/python benchmarks/ablation_curve.py
"""

import time

import torch

from lens_utils import corpus, divergence, lens
from lens_utils.models import LoadedModel, load_model

PROMPT, LENGTHS = 18, (32, 100)
TIMED = 6  # sets of each kind that the baseline runs; they all cost it the same


@torch.no_grad()
def baseline(model: LoadedModel, ids, against, sets):
    found = []
    for gone in sets:
        hooks = [
            (f"blocks.{layer}.attn.hook_z",
             lambda z, hook, here=here: z.masked_fill(here[:, None], 0))
            for layer, here in enumerate(gone) if here.any()
        ]  # fmt: skip
        logits = model.bridge.run_with_hooks(
            ids[None], fwd_hooks=hooks, use_cache=False, logits_to_keep=len(against.logp)
        )
        logq = logits[0].float().log_softmax(-1)
        found.append(torch.nn.functional.kl_div(
            logq, against.logp, log_target=True, reduction="none").sum(-1))  # fmt: skip
    return torch.stack(found)


def seconds(work, *args):
    start = time.process_time()
    found = work(*args)
    return found, time.process_time() - start


def workloads(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    n_layers, n_heads = shape
    size = n_layers * n_heads
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(size, generator=generator).tolist() for _ in range(4)]
    single = torch.eye(size, dtype=torch.bool).unflatten(1, shape)
    some = torch.arange(0, size, 5 * n_heads)[:, None] + torch.arange(n_heads)
    most = int(0.4 * size)
    three = [round(size * share) for share in (0.1, 0.25, 0.4)]
    return {
        "single heads": single[some.flatten()],
        "after every head": divergence.sets(orders[0], range(0, most // 2), *shape),
        "after every 5 heads": divergence.sets(orders[0], range(0, most + 1, 5), *shape),
        "random orders, 3 shares": torch.cat(
            [divergence.sets(order, three, *shape) for order in orders]
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("smol", device="cpu")
    readout = lens.Readout(model.bridge)
    text = model.encode(corpus.docstrings(2000)[0].text)
    shape = (model.n_layers, model.bridge.cfg.n_heads)
    for steps in LENGTHS:
        print(f"a prompt of {PROMPT} tokens and {steps} steps")
        ids = torch.tensor(text[: PROMPT + steps - 1])
        against = divergence.full(model, readout, ids, steps)
        baseline(model, ids, against, torch.zeros(1, *shape, dtype=torch.bool))
        total = [0.0, 0.0, 0]
        for name, sets in workloads(shape).items():
            at = torch.linspace(0, len(sets) - 1, TIMED).long()
            one, slow = seconds(baseline, model, ids, against, sets[at])
            other, fast = seconds(divergence.divergence, model, readout, against, sets)
            gap, most = (float(x.mean(1).abs().max()) for x in (one - other[at], one))
            slow, fast = slow / TIMED, fast / len(sets)
            print(f"{name}: {len(sets)} sets, {fast:.3f} against {slow:.3f} CPU s each, "
                  f"{slow / fast:.2f} times as fast; {gap:.1e} nats apart of at most "
                  f"{most:.2f}")  # fmt: skip
            total = [total[0] + slow * len(sets), total[1] + fast * len(sets), total[2] + len(sets)]
        print(f"together: {total[2]} sets, {total[0] / total[1]:.2f} times as fast")


if __name__ == "__main__":
    main()
