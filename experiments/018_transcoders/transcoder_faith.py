"""What the transcoders of 018 are worth on held-out text: features, faithfulness, generations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transcoder_pass import baselines

from lens_utils import mlp_stream, stats
from lens_utils.experiment import Run
from lens_utils.faithfulness import faithfulness, increase, recovered
from lens_utils.models import LoadedModel
from lens_utils.replacement import replacing
from lens_utils.sparse import Transcoder
from lens_utils.sparse_files import load_transcoders
from lens_utils.text_rows import QUESTION, Row

DENSE = 0.1  # a feature that is active at more tokens is dense
KINDS = ("trained", "linear", "mean", "zero")
GIVEN, WRITTEN, TEXTS, ANSWERS = 24, 20, 8, 60  # tokens, tokens, windows, maze questions
ALONE = ("solve direct", "recognize direct", "recall direct")  # with one right answer


def loaded(run: Run, model: LoadedModel, layers: Sequence[int], name: str = "trained") -> dict:
    """The set by layer, on the model's device."""
    held = load_transcoders(run.folder / name, model.bridge.cfg.d_model, layers)
    return {layer: t.to(model.device) for layer, t in held.items()}


# Features


@torch.no_grad()
def features(
    run: Run, model: LoadedModel, rows: Sequence[Row], layers: Sequence[int]
) -> pd.DataFrame:
    """Per layer: FVU around the training text's mean, of all and the median token's; L0; shares of
    features that were never active, and that are dense."""
    transcoders = loaded(run, model, layers)
    means = {n: baselines(run.folder, n)["mean"].b_dec.to(model.device) for n in layers}
    fired = {n: torch.zeros(t.n_features, dtype=torch.long, device=model.device)
             for n, t in transcoders.items()}  # fmt: skip
    errors: dict[int, list[torch.Tensor]] = {n: [] for n in layers}
    sizes: dict[int, list[torch.Tensor]] = {n: [] for n in layers}
    n_batches = len(mlp_stream.batches(rows))
    stream = mlp_stream.stream(model, rows, layers)
    for _ in run.track(range(n_batches), "held-out text"):
        batch = next(stream, None)
        if batch is None:
            break
        for n, (x, y) in batch.mlp.items():
            t, y = transcoders[n], y.float()
            values, indices = t.encode(x.float())
            made = t.decode(values, indices)
            if t.W_skip is not None:
                made += x.float() @ t.W_skip.T
            fired[n] += torch.bincount(indices[values > 0], minlength=t.n_features)
            errors[n].append((y - made).square().sum(1).cpu())
            sizes[n].append((y - means[n]).square().sum(1).cpu())
    lines = []
    for n in layers:
        error, size = torch.cat(errors[n]), torch.cat(sizes[n])
        density = fired[n].cpu() / len(error)
        lines.append({
            "layer": n, "tokens": len(error), "fvu": float(error.sum() / size.sum()),
            "fvu_median": float((error / size).median()), "l0": float(density.sum()),
            "dead": float((density == 0).float().mean()),
            "dense": float((density > DENSE).float().mean()),
        })  # fmt: skip
    return pd.DataFrame(lines)


# Faithfulness


def conditions(
    run: Run, model: LoadedModel, layers: Sequence[int]
) -> dict[str, dict[int, Transcoder]]:
    """Every replacement that is judged: each layer alone, all of them, and the lowest ones."""
    trained = loaded(run, model, layers)
    other = {n: {kind: t.to(model.device) for kind, t in baselines(run.folder, n).items()}
             for n in layers}  # fmt: skip
    by_kind = {kind: {n: other[n][kind] for n in layers} for kind in KINDS[1:]}
    by_kind = {"trained": trained} | by_kind
    found = {f"{kind} {n}": {n: held[n]} for kind, held in by_kind.items() for n in layers}
    found |= {f"{kind} all": held for kind, held in by_kind.items()}
    shuffled = {n: _shuffled(t, n) for n, t in trained.items()}
    found["shuffled all"] = shuffled
    for share in (0.25, 0.5, 0.75):
        lowest = layers[: max(1, round(share * len(layers)))]
        found[f"trained to {lowest[-1]}"] = {n: trained[n] for n in lowest}
    return found


def _shuffled(transcoder: Transcoder, seed: int) -> Transcoder:
    """A control: every feature writes what another one should."""
    t = transcoder
    order = torch.randperm(t.n_features, generator=torch.Generator().manual_seed(seed))
    return Transcoder(t.W_enc, t.b_enc, t.W_dec[order.to(t.W_dec.device)], t.b_dec, t.W_skip, t.k)


def judge(
    model: LoadedModel, replaced: Mapping[str, Mapping[int, Transcoder]], rows: Sequence[Row]
) -> pd.DataFrame:
    """`faithfulness` of rows, some at a time."""
    spans = mlp_stream.batches(rows, mlp_stream.TOKENS // 2)
    return pd.concat(
        [faithfulness(model, rows[start:end], replaced) for start, end in spans],
        ignore_index=True,
    )


def joined(found: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """The same texts, with further replacements."""
    return pd.concat([found, more[more["condition"] != "original"]], ignore_index=True)


def by_layer(found: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
    """One line per layer and measure: what its transcoder costs, and beside what else would."""
    lines = []
    for n in layers:
        own = f"trained {n}"
        measured = {
            "ce increase": increase(found, own),
            "kl": increase(found, own, "kl"),
            "agreement": increase(found, own, "same"),
            **{f"ce increase, {kind}": increase(found, f"{kind} {n}") for kind in KINDS[1:]},
            **{f"recovered, {kind}": recovered(found, own, f"{kind} {n}") for kind in KINDS[1:]},
        }
        lines += [{"layer": n, "measure": name, **value} for name, value in measured.items()]
    return pd.DataFrame(lines)


def together(found: pd.DataFrame) -> pd.DataFrame:
    """All MLPs replaced at once, by whatever is judged: CE increase and KL (nats), agreement."""
    names = [name for name in found["condition"].unique()
             if name.endswith(" all") or " to " in name]  # fmt: skip
    return pd.DataFrame([
        {"condition": name, "measure": measure, **increase(found, name, column)}
        for name in names
        for measure, column in (("ce increase", "ce"), ("kl", "kl"), ("agreement", "same"))
    ])  # fmt: skip


# Generations


@torch.no_grad()
def complete(
    model: LoadedModel, prompts: Sequence[Sequence[int]], n: int, hooks: Sequence = ()
) -> list[list[int]]:
    """Greedy continuations, every token with a whole forward pass: the first positions are left
    alone, and a key/value cache would hide which those are."""
    ids, _ = model.batch(prompts)
    ids = torch.cat([ids, ids.new_zeros(len(ids), n)], 1)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
    every = torch.arange(len(ids), device=ids.device)
    for _ in range(n):
        seen = ids[:, : int(ends.max())]
        logits = model.bridge.run_with_hooks(seen, fwd_hooks=list(hooks), use_cache=False)
        ids[every, ends] = logits[every, ends - 1].argmax(-1)
        ends += 1
    return [row[len(prompt) : len(prompt) + n].tolist()
            for row, prompt in zip(ids, prompts, strict=True)]  # fmt: skip


def generations(
    run: Run, model: LoadedModel, rows: Sequence[Row], sets: Mapping[str, dict[int, Transcoder]]
) -> list[dict[str, Any]]:
    """What the original and the replaced models write; for mazes also whether it is right."""
    asked = [row for row in rows if row.source in ALONE][:ANSWERS]
    if asked:
        starts = [max(i for i, label in enumerate(r.labels) if label in QUESTION) + 1
                  for r in asked]  # fmt: skip
        prompts = [row.ids[:at] for row, at in zip(asked, starts, strict=True)]
        golds = [row.ids[at:] for row, at in zip(asked, starts, strict=True)]
    else:
        asked = [row for row in rows if len(row.ids) > GIVEN + WRITTEN][:TEXTS]
        prompts, golds = [row.ids[:GIVEN] for row in asked], [[] for _ in asked]
    longest = max(map(len, golds), default=0) or WRITTEN
    written = {"original": complete(model, prompts, longest)}
    for name, held in run.track(sets.items(), "generations"):
        written[name] = complete(model, prompts, longest, replacing(held))
    lines = []
    for i, (row, prompt, gold) in enumerate(zip(asked, prompts, golds, strict=True)):
        own = {name: ids[i][: len(gold) or None] for name, ids in written.items()}
        lines.append({
            "source": row.source,
            "prompt": model.decode(prompt),
            "texts": {name: model.decode(ids) for name, ids in own.items()},
            "right": {name: ids == gold for name, ids in own.items()} if gold else {},
            "same tokens": {name: _same(ids, own["original"]) for name, ids in own.items()},
        })  # fmt: skip
    return lines


def _same(ids: Sequence[int], others: Sequence[int]) -> float:
    """Share of places at which two continuations have the same token."""
    return sum(a == b for a, b in zip(ids, others, strict=True)) / len(ids)


# Summary


def summarise(
    text: Mapping[str, Any],
    counted: pd.DataFrame,
    single: pd.DataFrame,
    joint: pd.DataFrame,
    replies: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The numbers that the findings quote."""
    recipe = text["recipe"]
    found: dict[str, Any] = {
        "features per layer": recipe["n_features"],
        "active per token (k)": recipe["k"],
        "tokens trained on": text["tokens"],
        "held-out tokens, features": int(counted["tokens"].min()),
        "FVU, mean of layers": round(float(counted["fvu"].mean()), 4),
        "FVU, worst layer": round(float(counted["fvu"].max()), 4),
        "FVU of the median token, mean of layers": round(float(counted["fvu_median"].mean()), 4),
        "L0, mean of layers": round(float(counted["l0"].mean()), 2),
        "dead, mean of layers": round(float(counted["dead"].mean()), 4),
        "dead, worst layer": round(float(counted["dead"].max()), 4),
    }

    def over_layers(label: str, measure: str, best: Callable) -> None:
        here = single[single["measure"] == measure]
        worst = here.loc[best(here["value"])]
        found[label], found[f"{label}: layer"] = estimate(worst), int(worst["layer"])

    over_layers("largest CE increase of one layer, nats", "ce increase", pd.Series.idxmax)
    for kind in ("zero", "mean", "linear"):
        over_layers(
            f"least recovered of a layer against {kind}", f"recovered, {kind}", pd.Series.idxmin
        )
    names = {"trained all": "transcoders", "tuned all": "transcoders, tuned",
             "linear all": "linear", "mean all": "mean", "zero all": "zero",
             "shuffled all": "shuffled decoders"}  # fmt: skip
    for condition, label in names.items():
        here = joint[(joint["condition"] == condition) & (joint["measure"] == "ce increase")]
        if len(here):
            found[f"all MLPs replaced, CE increase, nats: {label}"] = estimate(here.iloc[0])
    for condition in ("trained all", "tuned all"):
        for measure in ("kl", "agreement"):
            here = joint[(joint["condition"] == condition) & (joint["measure"] == measure)]
            if len(here):
                label = f"all MLPs replaced, {measure}: {names[condition]}"
                found[label] = estimate(here.iloc[0])
    for name in replies[0]["same tokens"] if replies else ():
        if name != "original":
            same = [reply["same tokens"][name] for reply in replies]
            found[f"generated as the original: {name}"] = stats.mean_ci(np.array(same))
        if replies[0]["right"]:
            right = [float(reply["right"][name]) for reply in replies]
            found[f"questions right: {name}"] = stats.mean_ci(np.array(right))
    return found


def estimate(line: pd.Series) -> stats.Estimate:
    """A line of a table as an estimate."""
    value, low, high = (round(float(line[name]), 4) for name in ("value", "low", "high"))
    return stats.Estimate(value=value, low=low, high=high, n=int(line["n"]))
