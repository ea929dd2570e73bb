"""Held-out text: what transcoders leave unexplained, what their features are called, what it costs
to put them in an MLP's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sweep_training import baselines, transcoders, unit

from lens_utils import mlp_stream, stats, text_rows
from lens_utils.experiment import Run
from lens_utils.faithfulness import faithfulness
from lens_utils.feature_facts import facts, make_tokens
from lens_utils.feature_labels import all_fires, explain
from lens_utils.models import LoadedModel
from lens_utils.sparse import Transcoder
from lens_utils.sparse_training import gain
from lens_utils.text_rows import Row

ALL = "all pilot layers"
DENSE = 0.1  # a feature that is active at more tokens is dense
CLEAR = 0.75  # held-out balanced accuracy from which a label says something


def everything(
    run: Run, model: LoadedModel, plan: dict[str, Any]
) -> dict[str, dict[int, Transcoder]]:
    """All configurations and baselines, by layer."""
    found = {name: transcoders(run, name, plan, model) for name in plan["configurations"]}
    return found | baselines(run, plan, model)


class _Counts:
    """Sums over held-out tokens of one transcoder."""

    def __init__(self, t: Transcoder, mean: torch.Tensor) -> None:
        self.t, self.mean = t, mean
        self.fired = torch.zeros(t.n_features, dtype=torch.long, device=mean.device)
        self.errors: list[torch.Tensor] = []
        self.sizes: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        values, indices = self.t.encode(x)
        made = self.t.decode(values, indices)
        if self.t.W_skip is not None:
            made += x @ self.t.W_skip.T
        self.fired += torch.bincount(indices[values > 0], minlength=self.t.n_features)
        self.errors.append((y - made).square().sum(1).cpu())
        self.sizes.append((y - self.mean).square().sum(1).cpu())

    def line(self) -> dict[str, Any]:
        error, size = torch.cat(self.errors), torch.cat(self.sizes)
        density = self.fired.cpu() / len(error)
        some = len(density) > 0
        return {
            "held_out": len(error), "fvu": float(error.sum() / size.sum()),
            "fvu_median": float((error / size).median()), "l0": float(density.sum()),
            "dead": float((density == 0).float().mean()) if some else np.nan,
            "dense": float((density > DENSE).float().mean()) if some else np.nan,
        }  # fmt: skip


@torch.no_grad()
def features(
    run: Run, model: LoadedModel, rows: Sequence[Row], plan: dict[str, Any]
) -> pd.DataFrame:
    """Per layer and configuration: FVU around the training text's mean, of all tokens together and
    of the median one; L0; shares of features never active and of dense ones; gain of W_skip."""
    held = everything(run, model, plan)
    counts = {(layer, name): _Counts(t, held["mean"][layer].b_dec)
              for name, by_layer in held.items() for layer, t in by_layer.items()}  # fmt: skip
    stream = mlp_stream.stream(model, rows, plan["layers"])
    for batch in run.track(stream, "batches of held-out text"):
        for layer, (x, y) in batch.mlp.items():
            for name in held:
                counts[layer, name].add(x.float(), y.float())
    lines = []
    for (layer, name), counted in counts.items():
        skip = counted.t.W_skip
        lines.append(
            {"layer": layer, "name": name, "features": counted.t.n_features}
            | counted.line()
            | {"gain": np.nan if skip is None else float(gain(skip, 50)),
               "gain_scaled": np.nan if skip is None else float(gain(skip, 50)) / unit(run, layer)}
        )  # fmt: skip
    return pd.DataFrame(lines)


@torch.no_grad()
def labels(
    run: Run,
    model: LoadedModel,
    fit: Sequence[Row],
    test: Sequence[Row],
    plan: dict[str, Any],
    tokens: int,
) -> pd.DataFrame:
    """Per layer and configuration, how well features can be told by one fact about the token:
    held-out balanced accuracy of their labels, and of other features' labels (the control)."""
    sides = text_rows.first(fit, tokens), text_rows.first(test, tokens)
    rows = [*sides[0], *sides[1]]
    spans = {"label": [row.labels for row in rows]} if all(row.labels for row in rows) else {}
    held = [False] * len(sides[0]) + [True] * len(sides[1])
    text = make_tokens([row.ids for row in rows], held, model.decode, spans)
    kinds, starts = facts(text), np.cumsum([0, *(len(row.ids) for row in rows)])
    batches = list(mlp_stream.stream(model, rows, plan["layers"]))
    place = np.concatenate([starts[b.row.cpu()] + b.pos.cpu().numpy() for b in batches])
    lines = []
    for name in run.track(list(plan["configurations"]), "labels"):
        for layer, t in transcoders(run, name, plan, model).items():
            codes = [t.encode(b.mlp[layer][0].float()) for b in batches]
            values, indices = (torch.cat(part).cpu().numpy() for part in zip(*codes, strict=True))
            pool = all_fires(values, indices, place)
            found = explain(text, kinds, pool.fires, pool, t.n_features, plan["seed"])
            known = found[found["accuracy"].notna()]
            lines.append(
                {"layer": layer, "name": name, "labelled": len(known) / len(found),
                 "shuffled": known["shuffled"].mean(),
                 "clear": (known["accuracy"] >= CLEAR).mean()}
                | stats.mean_ci(known["accuracy"].to_numpy(), seed=plan["seed"])
            )  # fmt: skip
    return pd.DataFrame(lines)


def conditions(
    run: Run, model: LoadedModel, plan: dict[str, Any]
) -> dict[str, dict[int, Transcoder]]:
    """One pilot layer replaced, or all of them, by every configuration and baseline."""
    held = everything(run, model, plan)
    found = {condition(layer, name): {layer: t}
             for name, by_layer in held.items() for layer, t in by_layer.items()}  # fmt: skip
    several = len(plan["layers"]) > 1
    return found | {condition(ALL, n): by_layer for n, by_layer in held.items() if several}


def condition(layer: int | str, name: str) -> str:
    """Name of a replacement."""
    return f"{layer}: {name}"


def judge(
    model: LoadedModel, replaced: Mapping[str, Mapping[int, Transcoder]], rows: Sequence[Row]
) -> pd.DataFrame:
    """`faithfulness` of rows, some at a time."""
    spans = mlp_stream.batches(rows, mlp_stream.TOKENS // 2)
    return pd.concat([faithfulness(model, rows[start:end], replaced) for start, end in spans],
                     ignore_index=True)  # fmt: skip
