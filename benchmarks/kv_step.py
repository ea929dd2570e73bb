"""K/V masks: what does a step of learning one cost, and what of it do the bridge's hooks cost?

Compared, on the embedded model, 4 rows of 64 tokens, KL at 16 predictions of each row, CPU seconds
of one thread; a step is a masked forward, the loss, and a backward to the gates:
    ours     lens_utils: hooks on the bridge, the teacher's residuals read out anew
    plain    the same step with forward hooks on k_proj and v_proj of a plain Hugging Face model
    forward  the plain model without masks, logits of all positions, no gradient
Claims: ours costs at most 10 % more than plain, both give the same loss and the same gradients;
at most 1.9 s, or 0.8 s in bfloat16 where the CPU has it.

    .venv/bin/python benchmarks/kv_step.py [--bfloat16]
"""

import statistics
import sys
import time

import torch

from lens_utils import checkpoints, kv_learn, kv_masks, kv_scores, weights
from lens_utils.kv_masks import Examples, Masked
from lens_utils.kv_units import units_of
from lens_utils.lens import Readout
from lens_utils.models import load_model
from lens_utils.registry import SMOL

REPEATS = 7
ROWS, LENGTH, POSITIONS = 4, 64, 16


def random_examples(d_vocab: int) -> Examples:
    """Random tokens cost what others do."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(d_vocab, (ROWS, LENGTH + 1), generator=generator)
    counted = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    return Examples(whole[:, :-1], whole[:, 1:], counted, torch.arange(ROWS))


def hook_plain(hf: torch.nn.Module, masked: Masked, gates: torch.Tensor) -> list:
    """gate x + (1 - gate) fill behind k_proj and v_proj, with the gates of units."""
    handles = []
    for n, layer in enumerate(hf.model.layers):
        for proj, place, fill in (
            (layer.self_attn.k_proj, masked.units.k[n].flatten(), masked.fill.k[n].flatten()),
            (layer.self_attn.v_proj, masked.units.v[n].flatten(), masked.fill.v[n].flatten()),
        ):

            def mix(module, args, out, place=place, fill=fill):
                gate = gates[place].to(out.dtype)
                return gate * out + (1 - gate) * fill.to(out.dtype)

            handles.append(proj.register_forward_hook(mix))
    return handles


def main() -> None:
    torch.set_num_threads(1)
    dtype = "bfloat16" if "--bfloat16" in sys.argv else "float32"
    model = load_model("smol", device="cpu", dtype=dtype)
    # Loaded a second time: the bridge takes over the modules of the first.
    hf = plain_model(dtype)
    examples = random_examples(model.bridge.cfg.d_vocab)
    spread = kv_masks.moments(model, examples)
    masked = Masked(model, units_of(model), spread.mean, Readout(model.bridge))
    targets = kv_learn.Targets(masked, examples)
    recipe = kv_learn.Recipe(positions=POSITIONS)
    mask = kv_scores.top(
        kv_scores.random_scores(masked.units, 0), kv_scores.n_kept(masked.units, 0.8)
    )
    with torch.no_grad():
        teacher = hf.model(examples.ids).last_hidden_state  # behind the last norm
    head = hf.lm_head.weight.float()

    def ours():
        gates = mask.clone().requires_grad_(True)
        rows, generator = torch.arange(ROWS), torch.Generator().manual_seed(1)
        loss = targets.loss(masked, gates, rows, POSITIONS, generator, recipe)
        loss.backward()
        return float(loss.detach()), gates.grad

    def plain():
        gates = mask.clone().requires_grad_(True)
        handles = hook_plain(hf, masked, gates)
        row, pos = kv_scores.drawn(examples.counted, POSITIONS, torch.Generator().manual_seed(1))
        student = hf.model(examples.ids, use_cache=False).last_hidden_state[row, pos].float()
        q = (student @ head.T).log_softmax(-1)
        with torch.no_grad():
            p = (teacher[row, pos].float() @ head.T).log_softmax(-1)
        loss = (p.exp() * (p - q)).sum(-1).mean()
        loss.backward()
        for handle in handles:
            handle.remove()
        return float(loss.detach()), gates.grad

    def forward():
        with torch.no_grad():
            return hf(examples.ids, use_cache=False).logits

    ways = {"ours": ours, "plain": plain, "forward": forward}
    (a, one), (b, other) = ours(), plain()  # the first pass of a process is slow, too
    forward()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):  # interleaved, so that a busy machine slows all
        for name, way in ways.items():
            start = time.process_time()
            way()
            spent[name].append(time.process_time() - start)
    cost = {name: statistics.median(taken) for name, taken in spent.items()}
    ratio = statistics.median(x / y for x, y in zip(spent["ours"], spent["plain"], strict=True))
    apart = float((one - other).norm() / other.norm())
    claim = {"float32": 1.9, "bfloat16": 0.8}[dtype]
    print(f"{dtype}, {ROWS} x {LENGTH} tokens, CPU seconds, median of {REPEATS}: "
          f"ours {cost['ours']:.2f} (claim: <= {claim}), plain {cost['plain']:.2f}, "
          f"forward {cost['forward']:.2f}")  # fmt: skip
    print(f"ours / plain {ratio:.2f} (claim: <= 1.10), "
          f"ours / forward {cost['ours'] / cost['forward']:.2f}")  # fmt: skip
    size = targets.resid.element_size() * targets.resid.nelement() / 1e6
    print(f"losses {a:.4f} and {b:.4f} nats, gradients {100 * apart:.2g} % apart; targets of "
          f"{len(examples)} rows: {size:.1f} MB")  # fmt: skip


def plain_model(dtype: str) -> torch.nn.Module:
    """The embedded model as Hugging Face has it, attending eagerly as the bridge does."""
    hf = checkpoints.load_folder(weights.locate(SMOL), getattr(torch, dtype))
    hf.set_attn_implementation("eager")
    return hf.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
