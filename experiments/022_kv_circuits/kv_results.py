"""From measurements of 022 to its tables and numbers. No model is needed here."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from lens_utils import kv_learn, stats
from lens_utils.kv_units import Units

KEY = ["dataset", "sparsity", "ranking", "seed"]
NUMBERS = ("sparsity", "kl", "ce", "perplexity", "bits_per_byte", "faithfulness",
           "loss_degradation", "top1", "ce_recovered", "completeness", "initial_kl")  # fmt: skip


def frontier(
    baselines: pd.DataFrame, masks: pd.DataFrame, about: dict[str, dict[str, Any]]
) -> pd.DataFrame:
    """One row per data set, sparsity, ranking and seed: the held-out numbers of `kv_masks`, the KL
    with its interval over documents (or whatever a task's items share)."""
    rows = []
    test = pd.concat([baselines[baselines.split == "test"], masks], ignore_index=True)
    for key, found in test.groupby(KEY, sort=False):
        name, full = key[0], about[key[0]]
        total = found[["kl", "ce", "agree", "tokens"]].sum()
        kl = stats.mean_ci((found.kl / found.tokens).to_numpy(), found.group.to_numpy())
        ce = total.ce / total.tokens
        row = dict(zip(KEY, key, strict=True)) | {
            "kl": total.kl / total.tokens, "kl_low": kl["low"], "kl_high": kl["high"],
            "n": kl["n"], "ce": ce,
            "faithfulness": 1 - total.kl / total.tokens / full["empty_kl"],
            "loss_degradation": 100 * (ce - full["ce"]) / full["ce"],
            "top1": total.agree / total.tokens,
            "ce_recovered": (full["empty_ce"] - ce) / (full["empty_ce"] - full["ce"]),
            "perplexity": math.exp(min(ce, 50)),
        }  # fmt: skip
        if full["bytes_per_token"]:
            row["bits_per_byte"] = ce / math.log(2) / full["bytes_per_token"]
        if "logit_diff" in found and name in about and full.get("logit_diff"):
            row["logit_diff_ratio"] = found.logit_diff.mean() / full["logit_diff"]
        row["initial"] = found.initial.iloc[0] if ranking_is_learned(key[2]) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def ranking_is_learned(ranking: str) -> bool:
    """Whether a row of the frontier is a learned mask or its complement."""
    return ranking in ("learned", "complement")


def histories(jobs: Sequence[Any], learned: dict[str, Tensor]) -> pd.DataFrame:
    """How every mask was learned, one row per measurement."""
    frames = []
    for number, job in enumerate(jobs):
        frame = pd.DataFrame(learned["history"][number].numpy(), columns=list(kv_learn.COLUMNS))
        place = {"dataset": job.dataset, "mask_sparsity": job.sparsity, "seed": job.seed}
        frames.append(frame.assign(**place))
    return pd.concat(frames, ignore_index=True).astype({"step": int})


def layers(units: Units, jobs: Sequence[Any], learned: dict[str, Tensor]) -> pd.DataFrame:
    """Kept units by layer and part. Importance is the score that the mask was cut from, shifted to
    start at 0 and scaled so that the mean over all units is 1."""
    table, frames = units.table(), []
    for number, job in enumerate(jobs):
        score = learned["scores"][number].double()
        score = score - score.min()
        held = table.assign(
            kept=learned["mask"][number].numpy(), importance=(score / score.mean()).numpy()
        )
        by = held.groupby(["layer", "part"])
        frame = by.kept.agg(total="size", kept="sum").reset_index()
        frame["sparsity"] = 1 - frame.kept / frame.total
        frame["mean_importance"] = by.importance.mean().to_numpy()
        frame["std_importance"] = by.importance.std(ddof=0).to_numpy()
        frames.append(frame.assign(dataset=job.dataset, mask_sparsity=job.sparsity, seed=job.seed))
    return pd.concat(frames, ignore_index=True).astype({"kept": int})


def overlaps(units: Units, jobs: Sequence[Any], learned: dict[str, Tensor]) -> pd.DataFrame:
    """Jaccard overlap of every two masks of one size, of two seeds or of two data sets, against
    what two random masks of this size share."""
    rows = []
    for (a, one), (b, other) in combinations(enumerate(jobs), 2):
        same_seed = one.seed == other.seed == 0
        between = "data sets" if one.dataset != other.dataset else "seeds"
        if one.sparsity != other.sparsity or (between == "data sets" and not same_seed):
            continue
        first, second = learned["mask"][a].bool(), learned["mask"][b].bool()
        size, n = int(first.sum()), units.total
        shared = size * int(second.sum()) / n
        rows.append(
            {
                "between": between, "one": one.dataset, "other": other.dataset,
                "seed_one": one.seed, "seed_other": other.seed, "sparsity": one.sparsity,
                "jaccard": int((first & second).sum()) / int((first | second).sum()),
                "expected": shared / (size + int(second.sum()) - shared),
            }
        )  # fmt: skip
    columns = ["between", "one", "other", "seed_one", "seed_other", "sparsity", "jaccard",
               "expected"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def metrics(
    cfg: Any,
    study: Any,
    about: dict[str, dict[str, Any]],
    table: pd.DataFrame,
    masks: pd.DataFrame,
    baselines: pd.DataFrame,
    overlap: pd.DataFrame,
    groups: pd.DataFrame | None,
    controls: pd.DataFrame | None,
) -> dict[str, Any]:
    """Everything that is said of a data set at the target sparsity, in one record for each."""
    n_units, model = study.units.total, study.model
    n_kept = round((1 - cfg.target_sparsity) * n_units)
    common = {
        "model": model.identity, "target_sparsity": cfg.target_sparsity,
        "lr": cfg.lr, "method": cfg.method, "objective": cfg.objective, "fill": cfg.fill,
        "units": {"resolution": cfg.resolution, "k": cfg.keys, "tied": cfg.tied,
                  "basis": cfg.basis},
        "keep_first": cfg.keep_first, "n_layers": model.n_layers, "n_units": n_units,
        "n_kept": n_kept,
    }  # fmt: skip
    found = {}
    for name, told in about.items():
        at = table[(table.dataset == name) & (table.sparsity == cfg.target_sparsity)]
        learned = at[at.ranking == "learned"]
        per_seed = [_seed_record(row, at, told) for _, row in learned.iterrows()]
        plain = {r: _baseline(g) for r, g in at.groupby("ranking") if not ranking_is_learned(r)}
        record = common | {
            "name": cfg.variant, "dataset": name, "steps": study.recipe(name).steps,
            "corpus": told["corpus"],
            "n_tokens": told["tokens"], "n_examples": told["rows"]["test"],
            "seeds": learned.seed.tolist(),
            "full": {"ce": told["ce"], "perplexity": math.exp(told["ce"]),
                     "bits_per_byte": _bits(told["ce"], told)},
            "empty": {"ce": told["empty_ce"], "kl": told["empty_kl"]},
            "per_seed": per_seed, "mean": _means(per_seed, learned), "baselines": plain,
            "stability": _stability(overlap, name, cfg.target_sparsity),
            "minimality": _minimality(groups, name), "controls": _controls(controls, name),
        }  # fmt: skip
        record["against_ranking"] = _against(masks, baselines, name, cfg.target_sparsity)
        found[name] = record | {"verdict": verdict(record)}
    return found


def _bits(ce: float, told: dict[str, Any]) -> float | None:
    per_token = told["bytes_per_token"]
    return ce / math.log(2) / per_token if per_token else None


def _seed_record(row: pd.Series, at: pd.DataFrame, told: dict[str, Any]) -> dict[str, Any]:
    complement = at[(at.ranking == "complement") & (at.seed == row.seed)].iloc[0]
    initial = at[at.ranking == row.initial].iloc[0]
    kept = ("seed", "kl", "kl_low", "kl_high", "ce", "perplexity", "faithfulness",
            "loss_degradation", "top1", "ce_recovered", "sparsity")  # fmt: skip
    return {k: row[k] for k in kept} | {
        "bits_per_byte": _bits(row.ce, told),
        "completeness": 1 - complement.faithfulness,
        "initial_ranking": row.initial,
        "initial_kl": initial.kl,
    }


def _means(per_seed: list[dict[str, Any]], learned: pd.DataFrame) -> dict[str, Any]:
    """Mean over seeds, their standard deviation, and for one seed the interval over documents."""
    out = {}
    for key in NUMBERS:
        values = [r[key] for r in per_seed if r[key] is not None]
        if values:
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            value = float(np.mean(values))
            out[key] = {"value": value, "sd": sd, "n": len(values)}
    out["kl"] |= {"low": float(learned.kl_low.mean()), "high": float(learned.kl_high.mean())}
    return out


def _baseline(rows: pd.DataFrame) -> dict[str, Any]:
    sd = float(rows.kl.std()) if len(rows) > 1 else None
    return {
        "kl": {"value": float(rows.kl.mean()), "sd": sd, "n": len(rows)},
        "faithfulness": {"value": float(rows.faithfulness.mean())},
    }


def _stability(overlap: pd.DataFrame, name: str, sparsity: float) -> dict[str, Any] | None:
    pairs = overlap[(overlap.between == "seeds") & (overlap.one == name)
                    & (overlap.sparsity == sparsity)]  # fmt: skip
    if pairs.empty:
        return None
    return {"jaccard": float(pairs.jaccard.mean()), "expected": float(pairs.expected.mean()),
            "pairs": len(pairs)}  # fmt: skip


def _minimality(groups: pd.DataFrame | None, name: str) -> dict[str, Any] | None:
    if groups is None:
        return None
    rise = groups[groups.dataset == name].rise
    return {"share_below_1pct": float((rise < 0.01).mean()), "groups": len(rise)}


def _controls(controls: pd.DataFrame | None, name: str) -> dict[str, Any] | None:
    if controls is None:
        return None
    held = controls[controls.dataset == name].drop(columns="dataset")
    return {row.pop("control"): row for row in held.to_dict("records")} or None


def _against(
    masks: pd.DataFrame, baselines: pd.DataFrame, name: str, sparsity: float
) -> dict[str, float | int]:
    """Mean KL that learning saves on test against the ranking it began with, over documents."""
    held = masks[(masks.dataset == name) & (masks.sparsity == sparsity)
                 & (masks.ranking == "learned")]  # fmt: skip
    start = baselines[(baselines.dataset == name) & (baselines.sparsity == sparsity)
                      & (baselines.ranking == held.initial.iloc[0])
                      & (baselines.split == "test")].set_index("row")  # fmt: skip
    own = held.groupby("row")[["kl", "tokens"]].sum()
    saved = (start.kl / start.tokens - own.kl / own.tokens).reindex(own.index)
    return dict(stats.mean_ci(saved.to_numpy(), start.group.reindex(own.index).to_numpy()))


def verdict(record: dict[str, Any]) -> str:
    """One line on whether the mask is more than any mask of this size would be.

    The model has to need its keys and values here at all. Then three conditions: three standard
    deviations below random masks, better than the ranking it began with (interval over documents),
    and a greater gain over random masks, as a share of the distance to make up, than with nonsense
    targets or untrained weights.
    """
    n = f"{record['n_kept']:,} of {record['n_units']:,} units"
    kl, random = record["mean"]["kl"]["value"], record["baselines"]["random"]["kl"]
    fails = []
    if record["full"]["ce"] >= record["empty"]["ce"]:
        fails.append("the model does as well without keys and values")
    if random["sd"] is None or kl > random["value"] - 3 * random["sd"]:
        fails.append("it does not beat random masks by three standard deviations")
    if record["against_ranking"]["low"] <= 0:
        fails.append("it does not beat the ranking it began with")
    gains = {k: c["share"] - c["random_share"] for k, c in (record["controls"] or {}).items()}
    for kind, what in (("shuffled", "nonsense targets"), ("random_weights", "untrained weights")):
        if kind in gains and gains[kind] >= gains["model"]:
            fails.append(f"with {what} the gain over random masks is as great")
    if fails:
        return f"no evidence of a sparse circuit at this size ({n}): {'; '.join(fails)}"
    value = record["mean"]["faithfulness"]["value"]
    return (f"{n} keep {100 * value:.0f} % of what K and V do here, more than random masks, the "
            "best ranking and the controls")  # fmt: skip


def summarise(
    cfg: Any,
    found: dict[str, Any],
    table: pd.DataFrame,
    matrix: pd.DataFrame,
    overlap: pd.DataFrame,
    by_layer: pd.DataFrame,
    units: pd.DataFrame | None,
) -> dict[str, Any]:
    """The numbers that the findings rest on."""
    at, out = f"{100 * cfg.target_sparsity:g} % off", {}
    for name, record in found.items():
        for _, row in table[(table.dataset == name) & (table.ranking == "learned")].iterrows():
            if row.seed == 0:
                empty = record["empty"]["kl"]
                out[f"{name}: faithfulness, {100 * row.sparsity:g} % off"] = stats.Estimate(
                    value=row.faithfulness, low=1 - row.kl_high / empty,
                    high=1 - row.kl_low / empty, n=int(row.n),
                )  # fmt: skip
        out[f"{name}: random masks, {at}"] = record["baselines"]["random"]["faithfulness"]["value"]
        out[f"{name}: saved by learning, nats"] = record["against_ranking"]
        mean = record["mean"]
        out[f"{name}: loss degradation, {at}, %"] = mean["loss_degradation"]["value"]
        out[f"{name}: completeness, {at}"] = mean["completeness"]["value"]
        if record["stability"]:
            out[f"{name}: overlap of two seeds"] = record["stability"]["jaccard"]
        for kind in ("shuffled", "random_weights") if record["controls"] else ():
            out[f"{name}: share made up, {kind}"] = record["controls"][kind]["share"]
        kept = by_layer[(by_layer.dataset == name) & (by_layer.seed == 0)
                        & (by_layer.mask_sparsity == cfg.target_sparsity)]  # fmt: skip
        if (kept.part == "V").any():
            out[f"{name}: V among the kept"] = kept[kept.part == "V"].kept.sum() / kept.kept.sum()
    for row in matrix.itertuples():
        if row.tested != row.mask:
            estimate = stats.Estimate(value=row.faithfulness, low=row.low, high=row.high, n=row.n)
            out[f"{row.tested} under the mask of {row.mask}"] = estimate
    chance = overlap[overlap.between == "seeds"].expected
    if len(chance):
        out["overlap of two random masks"] = float(chance.iloc[0])
    if units is not None:
        out["rank correlation of Fisher with single removals"] = float(
            units.score.corr(units.measured_kl, method="spearman")
        )
    return out


def final_masks(
    units: Units, mask: Tensor, scores: Tensor, prefix: str = "blocks.{}.attn"
) -> dict[str, Tensor]:
    """A mask and its scores by layer, each [kv_head, d_head]."""
    out = {}
    for kind, values in (("mask", mask), ("score", scores)):
        k, v = units.spread(values.float())
        for layer in range(len(k)):
            out[f"{prefix.format(layer)}.k_{kind}"] = k[layer].clone()
            out[f"{prefix.format(layer)}.v_{kind}"] = v[layer].clone()
    return out
