"""Attribution patching: what do all heads and MLPs cost by gradients, and what by patching them?

Compared, on 4 capital pairs of the embedded model at all positions at once, 30 x 9 heads and 30
MLPs, CPU seconds of one thread:
    plain       one backward pass in the corrupted run
    integrated  five, along the line between the embeddings
    engine      exact: `sweeps.sweep`, many nodes a pass, blocks below not run
    loop        exact: one forward of the four pairs for every node, as tutorials do it
Claim: plain costs at most a twentieth of the loop. The engine is itself three to five times
cheaper than the loop, so against it the factor is smaller; both are printed, and how well the
guesses agree with what they save.

    .venv/bin/python benchmarks/attribution_patching.py
"""

import statistics
import time

import torch

from lens_utils import gradients, pairs, prompts, provenance, sweeps
from lens_utils.cache import record
from lens_utils.lens import Readout, hook
from lens_utils.models import load_model
from lens_utils.patching import COMPONENTS

REPEATS = 3
NODES = ("z", "mlp_out")


def by_gradients(model, batch, at):
    scores = gradients.attribute(model, batch, at, NODES)
    return torch.cat([scores[node].sum(2).flatten(1) for node in NODES], dim=1)


def by_engine(model, batch):
    found = []
    for node, over in (("z", ["head"]), ("mlp_out", [])):
        swept = sweeps.sweep(model, batch, node, "denoise", over)
        found.append(swept.logit_diff.flatten(1) - swept.corrupt[:, None])
    return torch.cat(found, dim=1)


@torch.no_grad()
def by_loop(model, batch):
    readout, last, held = Readout(model.bridge), hook(model.n_layers), {}
    names = {node: [f"blocks.{i}.{COMPONENTS[node][0]}" for i in range(model.n_layers)]
             for node in NODES}  # fmt: skip
    clean = record(model, batch.clean, [name for of in names.values() for name in of])

    def keep(x, hook):
        held["x"] = x[:, -1]

    def difference(hooks):
        model.bridge.run_with_hooks(batch.corrupt, fwd_hooks=[*hooks, (last, keep)],
                                    use_cache=False, logits_to_keep=1)  # fmt: skip
        return readout.logit_diff(held["x"], batch.answer, batch.foil)

    found = []
    for name in names["z"]:
        for head in range(model.bridge.cfg.n_heads):

            def write(x, hook, head=head, name=name):
                x = x.clone()
                x[:, :, head] = clean[name][:, :, head]
                return x

            found.append(difference([(name, write)]))
    found += [difference([(name, lambda x, hook, n=name: clean[n])]) for name in names["mlp_out"]]
    return torch.stack(found, dim=1) - difference([])[:, None]


def seconds(work, *args):
    start = time.process_time()
    found = work(*args)
    return time.process_time() - start, found


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("smol", device="cpu")
    run = str(provenance.EXPERIMENTS / "004_activation_patching" / "run.py")
    made, _ = pairs.pairs(model, [p for p in prompts.load(run) if p.template == "city"])
    batch = pairs.batch(model, made[:4])
    ways = {
        "plain": lambda: by_gradients(model, batch, gradients.PLAIN),
        "integrated": lambda: by_gradients(model, batch, gradients.midpoints()),
        "engine": lambda: by_engine(model, batch),
        "loop": lambda: by_loop(model, batch),
    }
    ways["plain"]()  # the first pass of a process is slow
    spent, found = {name: [] for name in ways}, {}
    for repeat in range(REPEATS):  # interleaved, so that a busy machine slows all
        for name, way in ways.items():
            if repeat == 0 or name != "loop":
                taken, found[name] = seconds(way)
                spent[name].append(taken)
    cost = {name: statistics.median(taken) for name, taken in spent.items()}
    print(f"{found['loop'].shape[1]} nodes, {len(batch.pairs)} pairs of {batch.clean.shape[1]} "
          f"tokens, CPU seconds, {REPEATS} repeats (loop: 1)")  # fmt: skip
    for name, taken in cost.items():
        r = torch.corrcoef(torch.stack([found[name].mean(0), found["loop"].mean(0)]))[0, 1]
        print(f"{name:11} {taken:7.2f}   r with the loop {r:.3f}")
    for name in ("plain", "integrated"):
        print(f"{name}: loop / {name} {cost['loop'] / cost[name]:.0f}"
              f"{' (claim: >= 20)' if name == 'plain' else ''}, "
              f"engine / {name} {cost['engine'] / cost[name]:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
