"""PhiID of all pairs of heads: what does it cost beside the reference library's loop over pairs?

Series as long as those of experiment 005 (60 prompts x 100 steps, here coupled noise), CPU seconds
of one thread, best of the repeats:
    sts + rtr, 16 atoms     by minimum mutual information
    ccs                     common change in surprisal
    phyid                   the loop it replaces, where that package is there: time per pair and
                            prompt, and the largest difference from ours
Claims: sts + rtr of 270 heads in 0.25 s (>= 150,000 pairs/s) and of 1,152 heads in 5 s and 200 MiB
above the series; 16 atoms of 270 heads in 0.5 s; ccs of 270 heads in 3 s.
The matrix products that no exact method can go without are timed too: they say how fast the
machine was.

    .venv/bin/python benchmarks/phiid_pairs.py
    PYTHONPATH=<folder with phyid> .venv/bin/python benchmarks/phiid_pairs.py
"""

import importlib.util
import resource
import time
from collections.abc import Callable

import numpy as np
import torch

from lens_utils import phiid
from lens_utils.phiid_lattice import ATOMS

PROMPTS, STEPS = 60, 100


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def series(heads: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(PROMPTS, heads, STEPS, generator=source, dtype=torch.float64)
    slow = torch.nn.functional.avg_pool1d(noise, 5, stride=1, padding=2)  # a memory of five steps
    return slow + slow.mean(1, keepdim=True)


def products(z: torch.Tensor) -> None:
    """Four products of all windows with all windows, of which the upper triangles are needed."""
    for prompt in z[..., 1:]:
        for _ in range(4):
            prompt @ prompt.T


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def line(name: str, took: float, heads: int, claim: str) -> None:
    rate = heads * (heads - 1) / 2 / took
    print(f"{name:32} {took:8.3f} s {rate:12,.0f} pairs/s   claim: {claim}", flush=True)


def library(z: torch.Tensor, ours: list[np.ndarray], pairs: int = 40) -> float:
    """Its loop on some pairs of the first prompt: seconds for all, and how far ours is from it."""
    from phyid.calculate import calc_PhiID

    chosen = [(i, j) for i in range(z.shape[1]) for j in range(i)][:: z.shape[1] ** 2 // 2 // pairs]
    found, one = [], z[0].numpy()

    def loop() -> None:
        found[:] = [calc_PhiID(one[i], one[j], 1)[0] for i, j in chosen]

    each = seconds(loop, 3) / len(chosen)
    off = max(
        abs(float(np.mean(atoms[name])) - ours[k][i, j])
        for (i, j), atoms in zip(chosen, found, strict=True)
        for k, name in enumerate(("sts", "rtr"))
    )
    heads = z.shape[1]
    whole = each * PROMPTS * heads * (heads - 1) / 2
    print(f"phyid: {each * 1e3:.2f} ms per pair and prompt, {whole:,.0f} s for {heads} heads; "
          f"largest difference {off:.0e}")  # fmt: skip
    return whole


def main() -> None:
    torch.set_num_threads(1)
    many, few = series(1152), series(270)
    asked = {"sts + rtr": {}, "16 atoms": {"asked": ATOMS}, "ccs": {"redundancy": "ccs"}}
    first = {k: seconds(lambda o=o: phiid.decompose(few[:1], **o), 1) for k, o in asked.items()}
    phiid.decompose(few)
    before = peak()
    took = seconds(lambda: phiid.decompose(many), 2)
    grown = peak() - before
    line("sts + rtr, 1,152 heads", took, 1152, "<= 5 s")
    print(f"memory above the series: {grown:.0f} MiB (claim: <= 200)")
    quick = seconds(lambda: phiid.decompose(few), 8)
    line("sts + rtr, 270 heads", quick, 270, "<= 0.25 s")
    bare = seconds(lambda: products(few))
    flops = 4 * PROMPTS * 2 * 270**2 * (STEPS - 1)
    print(f"four full matrix products {bare:15.3f} s, {flops / bare / 1e9:.0f} GFLOP/s")
    line("16 atoms, 270 heads", seconds(lambda: phiid.decompose(few, asked=ATOMS)), 270, "<= 0.5 s")
    line("surrogates, 270 heads", seconds(lambda: phiid.surrogate(few), 3), 270, "none")
    ccs = seconds(lambda: phiid.decompose(few, redundancy="ccs"), 3)
    line("ccs, 270 heads", ccs, 270, "<= 3 s")
    print(f"1,152 heads from this: {ccs * (1152 / 270) ** 2:.0f} s")
    print("first use, compiled: " + ", ".join(f"{k} {v:.1f} s" for k, v in first.items()))
    if importlib.util.find_spec("phyid"):
        one = phiid.decompose(few[:1])
        each = library(few, [one["sts"], one["rtr"]])
        print(
            f"phyid takes {each / quick:,.0f} times as long as sts + rtr, {each / ccs:,.0f} as ccs"
        )
    else:
        print("phyid is not installed: no comparison with it")


if __name__ == "__main__":
    main()
