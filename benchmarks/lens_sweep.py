"""Lens sweep: what does reading every depth cost beside the forward passes it needs anyway?

Compared, on 40 prompts x all depths of the embedded model, CPU seconds of one thread:
    ours        residuals streamed in batches, norm readout at every depth, all scores
    baseline    the plain Hugging Face forward of each prompt, plus the bare products with W_U
Claim: at most 1.5 times the baseline, in bounded memory (no prompts x depths x vocabulary tensor).

    .venv/bin/python benchmarks/lens_sweep.py
"""

import resource
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

from lens_utils import cache, lens, prompts, provenance, registry, weights
from lens_utils.models import load_model

REPEATS = 3


@torch.no_grad()
def ours(model, encoded) -> None:
    readout = lens.Readout(model.bridge)
    names = [lens.hook(depth) for depth in range(model.n_layers + 1)]
    done = 0
    for part in cache.stream(model, [e.ids for e in encoded], names, 16, positions="last"):
        size = len(part.ids)
        answer = torch.tensor([e.answer_id for e in encoded[done : done + size]])
        final = lens.reference(readout.read(part.values[names[-1]]))
        for name in names:
            lens.scores(readout.read(part.values[name]), final, answer)
        done += size


@torch.no_grad()
def baseline(hf, encoded) -> None:
    W_U = hf.get_output_embeddings().weight
    for e in encoded:
        hf(torch.tensor([e.ids]), use_cache=False, logits_to_keep=1)
    resid = torch.randn(len(encoded), W_U.shape[1])
    for _ in range(hf.config.num_hidden_layers + 1):
        resid @ W_U.T


def seconds(work, *args) -> float:
    start = time.process_time()
    work(*args)
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("smol", device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(weights.locate(registry.SMOL), dtype="float32").eval()
    run = str(provenance.EXPERIMENTS / "001_layers_and_logits" / "run.py")
    encoded, _ = prompts.encode(model, prompts.load(run, "facts")[:40])
    for work, subject in ((ours, model), (baseline, hf)):
        work(subject, encoded[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    a, b = [], []
    for _ in range(REPEATS):  # interleaved, so that a busy machine slows both
        a.append(seconds(ours, model, encoded))
        b.append(seconds(baseline, hf, encoded))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    whole = len(encoded) * (model.n_layers + 1) * model.bridge.cfg.d_vocab * 4 / 2**20
    ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
    print(f"{len(encoded)} prompts x {model.n_layers + 1} depths, CPU seconds, {REPEATS} repeats")
    print(f"ours      {min(a):.2f}\nbaseline  {min(b):.2f}\nratio     {ratio:.2f} (claim: <= 1.5)")
    print(f"memory grown by {grown:.0f} MiB; the whole tensor would be {whole:.0f} MiB")


if __name__ == "__main__":
    main()
