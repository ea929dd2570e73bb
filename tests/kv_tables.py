"""An analysed run made up: the tables of one run folder with a planted, known story.

Scores are log-normal around a profile over depth, masks are their exact top-k, and every other
table is computed from these, so that tests know what figures and reports must say.
"""

import base64
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lens_utils import files

RANKINGS = {
    "learned": 1.0, "fisher": 0.8, "ig": 0.75, "taylor": 0.6, "magnitude": 0.45,
    "magnitude_global": 0.4, "random": 0.15,
}  # fmt: skip
SWEEP = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
EMPTY_KL = 4.0
PNG = base64.b64decode(  # one grey pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


def spread(values: list[float]) -> dict[str, float | int | None]:
    """Mean, sd and interval over seeds, as metrics.json holds them."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    mean = float(np.mean(values))
    return {
        "value": mean, "sd": sd, "low": mean - 2 * (sd or 0), "high": mean + 2 * (sd or 0),
        "n": len(values),
    }  # fmt: skip


def build(
    folder: Path,
    name: str = "V0",
    layers: int = 4,
    heads: int = 4,
    channels: int = 32,
    seeds: tuple[int, ...] = (0, 1, 2),
    target: float = 0.95,
    dataset: str = "docstrings",
    prefix: str = "blocks",
    full_ce: float = 3.0,
    degradation: float = 20.0,
    peak: float = 0.4,
    controls: bool = True,
    draw: int = 0,
) -> Path:
    """Write the run into `folder`; `peak` is the relative depth of the most important layers."""
    rng = np.random.default_rng(draw)
    folder.mkdir(parents=True, exist_ok=True)
    half = channels // 2
    depth = (np.arange(layers) + 0.5) / layers
    profile = {"K": np.exp(-6 * (depth - peak) ** 2) * 0.6, "V": np.exp(-6 * (depth - peak) ** 2)}
    base = {  # units: pairs of K channels, single V channels
        "K": rng.lognormal(0, 1, (layers, heads, half)) * profile["K"][:, None, None],
        "V": rng.lognormal(0, 1, (layers, heads, channels)) * profile["V"][:, None, None],
    }
    n_units = base["K"].size + base["V"].size
    n_kept = round((1 - target) * n_units)

    def masked(seed: int) -> tuple[dict, dict]:
        noise = np.random.default_rng((draw, seed))
        scores = {p: s * noise.lognormal(0, 0.3, s.shape) for p, s in base.items()}
        cut = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[-n_kept]
        return scores, {p: s >= cut for p, s in scores.items()}

    rows, held = [], {}
    for seed in seeds:
        scores, masks = held[seed] = masked(seed)
        scale = n_units / sum(s.sum() for s in scores.values())
        for layer in range(layers):
            for part in "KV":
                kept, of = masks[part][layer], scores[part][layer] * scale
                rows.append({
                    "seed": seed, "layer": layer, "part": part, "total": kept.size,
                    "kept": int(kept.sum()), "sparsity": 1 - kept.mean(),
                    "mean_importance": of.mean(), "std_importance": of.std(),
                })  # fmt: skip
    files.write(folder / "layers.csv", pd.DataFrame(rows))

    scores, masks = held[seeds[0]]
    tensors = {}
    for layer in range(layers):
        at = f"{prefix}.{layer}.attn"
        for kind, of in (("mask", masks), ("score", scores)):
            pairs = np.concatenate([of["K"][layer]] * 2, axis=1)  # halves: (i, i + d/2)
            tensors[f"{at}.k_{kind}"] = torch.tensor(pairs, dtype=torch.float32)
            tensors[f"{at}.v_{kind}"] = torch.tensor(of["V"][layer], dtype=torch.float32)
    files.write(folder / "final_masks.safetensors", tensors)

    steps = np.arange(0, 501, 10)
    history = []
    for seed in seeds:
        noise = np.random.default_rng((draw, seed, 1))
        kl = 1.4 + 1.2 * np.exp(-steps / 120)
        schedule = np.minimum(target, target * steps / 200)
        history.append(pd.DataFrame({
            "seed": seed, "step": steps, "train_loss": kl + noise.normal(0, 0.08, len(steps)),
            "val_kl": np.where(steps % 50 == 0, kl + 0.05 * seed + 0.1, np.nan),
            "target_sparsity": schedule, "sparsity": np.round(schedule * n_units) / n_units,
            "temperature": 1 - 0.9 * steps / 500, "reg_loss": 0.0, "lr": 0.01,
        }))  # fmt: skip
    files.write(folder / "history.csv", pd.concat(history))

    def quality(sparsity: float, ranking: str, seed: int) -> dict[str, float]:
        lost = (1 - RANKINGS[ranking] * 0.9) * sparsity + 0.9 * sparsity**12 * 0.5
        wobble = np.random.default_rng((draw, seed, round(sparsity * 100), len(ranking)))
        faithful = 1 - lost * (1 + (0.02 * wobble.normal() if sparsity else 0))
        kl = EMPTY_KL * (1 - faithful)
        worse = degradation * (1 - faithful) / ((1 - 0.9) * target + 0.45 * target**12)
        return {"kl": kl, "kl_low": 0.95 * kl, "kl_high": 1.05 * kl,
                "ce": full_ce * (1 + worse / 100), "faithfulness": faithful,
                "loss_degradation": worse, "top1": 0.2 + 0.8 * max(faithful, 0)}  # fmt: skip

    frontier = pd.DataFrame([
        {"sparsity": s, "ranking": r, "seed": seed} | quality(s, r, seed)
        for s in sorted({*SWEEP, target}) for r in RANKINGS
        for seed in (range(5) if r == "random" else seeds if r == "learned" else (seeds[0],))
    ])  # fmt: skip
    files.write(folder / "frontier.csv", frontier)

    groups = [
        {"layer": layer, "part": part, "kv_head": head, "kept": int(masks[part][layer, head].sum())}
        for layer in range(layers) for part in "KV" for head in range(heads)
        if masks[part][layer, head].any()
    ]  # fmt: skip
    groups = pd.DataFrame(groups)
    groups["rise"] = 0.9 * groups.kept / groups.kept.sum()
    groups["kl_without"] = 1.5 * (1 + groups.rise)
    files.write(folder / "groups.csv", groups)
    score = np.sort(rng.lognormal(0, 1, 40))[::-1]
    units = pd.DataFrame({
        "part": ["K", "V"] * 20, "layer": np.arange(40) % layers, "kv_head": np.arange(40) % heads,
        "channel": np.arange(40) % half, "score": score,
        "measured_kl": 1e-3 * score, "sample": ["top"] * 20 + ["random"] * 20,
    })  # fmt: skip
    files.write(folder / "units.csv", units)

    at_target = frontier[frontier.sparsity == target]
    per_seed = []
    for seed, row in zip(seeds, at_target[at_target.ranking == "learned"].to_dict("records"),
                         strict=True):  # fmt: skip
        per_seed.append({
            key: row[key] for key in ("kl", "kl_low", "kl_high", "ce", "faithfulness",
                                      "loss_degradation", "top1")
        } | {"seed": seed, "sparsity": 1 - n_kept / n_units, "perplexity": float(np.exp(row["ce"])),
             "bits_per_byte": row["ce"] / np.log(2) / 4.5, "ce_recovered": 0.55,
             "completeness": 0.8, "initial_ranking": "fisher",
             "initial_kl": row["kl"] + 0.3})  # fmt: skip
    numeric = [k for k, v in per_seed[0].items() if isinstance(v, float)]
    baselines = {
        ranking: {key: spread(list(of[key])) for key in ("kl", "faithfulness")}
        for ranking, of in at_target.groupby("ranking") if ranking != "learned"
    }  # fmt: skip
    metrics = {
        "name": name,
        "model": {"name": f"{name}.pt", "sha256": "0" * 64, "parameters": 1_000_000,
                  "layers": layers},
        "dataset": dataset,
        "corpus": {"source": "docstrings", "digest": "1" * 16, "documents": 900, "fallback": False},
        "target_sparsity": target, "steps": 500, "lr": 0.01, "method": "topk", "objective": "kl",
        "fill": "mean", "units": {"resolution": "kv", "k": "pairs", "tied": False, "basis": "raw"},
        "keep_first": False, "seeds": list(seeds), "n_layers": layers, "n_units": n_units,
        "n_kept": n_kept, "n_tokens": 16384, "n_examples": 256,
        "full": {"ce": full_ce, "perplexity": float(np.exp(full_ce)),
                 "bits_per_byte": full_ce / np.log(2) / 4.5},
        "empty": {"ce": full_ce + EMPTY_KL, "kl": EMPTY_KL},
        "per_seed": per_seed,
        "mean": {key: spread([row[key] for row in per_seed]) for key in numeric},
        "baselines": baselines,
        "stability": {"jaccard": 0.61, "expected": 0.03, "pairs": 3} if len(seeds) > 1 else None,
        "minimality": {"share_below_1pct": 0.25, "groups": len(groups)},
        "controls": {
            "shuffled": {"learned_kl": 3.2, "random_kl": 3.4, "empty_kl": 4.0},
            "random_weights": {"learned_kl": 0.10, "random_kl": 0.11, "empty_kl": 0.12},
        } if controls else None,
        "verdict": "a sparse circuit: the learned mask keeps more than any ranking, on three seeds",
    }  # fmt: skip
    files.write(folder / "metrics.json", metrics)
    return folder
