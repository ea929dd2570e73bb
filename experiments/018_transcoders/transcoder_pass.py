"""One pass over text that trains the transcoders of many layers, and what a pass leaves behind.

The folder `training/` holds the state (weights, optimiser, who fired when) of every layer, written
anew every SAVE batches of text; a killed run goes on from there to the same weights. `curves.csv`
in it can be looked at while it runs.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from lens_utils import console, files, mlp_stream, text_rows, transcoder_sets
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.faithfulness import constant
from lens_utils.mlp_stream import Batch
from lens_utils.models import LoadedModel
from lens_utils.sparse import Transcoder
from lens_utils.sparse_files import save_layer
from lens_utils.sparse_training import (
    Moments,
    Recipe,
    Trainer,
    dead_after,
    mean_baseline,
    ridge,
)
from lens_utils.text_rows import Row

BATCH = mlp_stream.TOKENS  # of text, about
HELD = 8  # batches of text whose activations are held, and learned from `passes` times
SAVE = 16  # batches of text between two states on disk
MOMENTS = 48  # batches of text that the linear baseline is fitted on


class Sizes(NamedTuple):
    """Tokens of each part."""

    tokens: int
    held_out: int
    judged: int
    tune_tokens: int


QUICK = Sizes(10_000, 2_000, 600, 2_000)


def sizes(cfg: Any) -> Sizes:
    """As asked for, or a quick run's."""
    return QUICK if cfg.quick else Sizes(cfg.tokens, cfg.held_out, cfg.judged, cfg.tune_tokens)


def text(
    cfg: Any, model: LoadedModel, tokens: int, split: str = "fit"
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of one split, and what is to be said of them."""
    return text_rows.load(model, cfg.text, tokens, cfg.length, cfg.seed, split)


def layers(cfg: Any, model: LoadedModel) -> list[int]:
    """The layers asked for. Raises BadInput for what is no layer."""
    if cfg.layers == "all":
        return list(range(model.n_layers))
    try:
        asked = sorted({int(part) for part in cfg.layers.split(",")})
    except ValueError:
        asked = [-1]
    if not 0 <= asked[0] <= asked[-1] < model.n_layers:
        raise BadInput(f"--layers {cfg.layers}: all, or numbers from 0 to {model.n_layers - 1} "
                       "with commas")  # fmt: skip
    return asked


def recipe(cfg: Any, run: Run, model: LoadedModel, rows: Sequence[Row]) -> Recipe:
    """What every layer is trained with: 017's choice, where the command line says nothing else."""
    told = {"expansion": cfg.expansion, "k": cfg.k, "lr": cfg.lr,
            "skip": "" if cfg.skip == "chosen" else cfg.skip}  # fmt: skip
    chosen = {} if all(told.values()) else run.upstream("017_transcoder_sweep", "chosen.json")
    asked = {name: value or chosen[name] for name, value in told.items()}
    return Recipe(
        n_features=asked["expansion"] * model.bridge.cfg.d_model,
        k=asked["k"],
        lr=asked["lr"],
        skip=asked["skip"],
        steps=cfg.passes * (sum(len(row.ids) for row in rows) // cfg.batch),
        dead_after=dead_after(sum(len(row.ids) for row in rows)),
        seed=cfg.seed,
    )


def described(rows: Sequence[Row], said: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The text and the recipe, for the records and the model card."""
    tokens = sum(len(row.ids) for row in rows)
    return {"text": said, "tokens": tokens, "recipe": vars(recipe)}


def record(run: Run, model: LoadedModel, layers: Sequence[int], k: int) -> dict[str, Any]:
    """The set of all shards' layers."""
    return transcoder_sets.record(run.folder / "trained", model, layers, k)


def train(
    run: Run, model: LoadedModel, rows: Sequence[Row], layers: Sequence[int], held: Recipe
) -> pd.DataFrame:
    """Train some layers in one pass; their curves. Transcoders and baselines go to the folder."""
    spans = mlp_stream.batches(rows, BATCH)
    state = State(run.folder / "training", layers, held, str(model.device))
    started, seen = time.perf_counter(), 0
    for at in run.track(range(state.batches, len(spans), HELD), f"text for {len(layers)} layers"):
        batches = []
        for start, end in run.track(spans[at : at + HELD], "forward passes"):
            batches.append(mlp_stream.activations(model, rows[start:end], start, layers))
        if not state.trainers:
            state.begin(batches)
        state.learn(batches, run.cfg.passes, run.cfg.batch)
        seen += sum(len(batch.ids) for batch in batches)
        last = at + HELD >= len(spans)
        if last or state.batches % SAVE == 0:
            state.save()
        speed = seen / (time.perf_counter() - started)
        console.say(f"018: {state.batches} of {len(spans)} batches of text, {speed:,.0f} tokens/s, "
                    f"mean FVU {state.fvu():.3f}")  # fmt: skip
    for layer, trainer in state.trainers.items():
        save_layer(run.folder / "trained", layer, trainer.transcoder())
        sums = state.moments[layer]
        linear = ridge(sums)
        means = {"W_skip": linear.W_skip, "b_dec": linear.b_dec, "mean": mean_baseline(sums).b_dec}
        files.write(run.folder / "baselines" / f"layer_{layer}.safetensors", means)
    return state.curves


class State:
    """Trainers, moments and curves of some layers. On disk as a whole, or as it was before."""

    def __init__(self, folder: Path, layers: Sequence[int], held: Recipe, device: str) -> None:
        self.folder, self.layers, self.recipe = folder / f"from_layer_{layers[0]}", layers, held
        self.trainers: dict[int, Trainer] = {}
        self.moments: dict[int, Moments] = {}
        self.curves = pd.DataFrame()
        self.batches = self.tokens = 0
        progress = self.folder / "progress.json"
        if progress.exists():
            held_there = files.read(progress)
            self.batches, self.tokens = held_there["batches"], held_there["tokens"]
            there = self.folder / str(self.batches)
            for layer in layers:
                self.trainers[layer] = Trainer.load(
                    there / f"layer_{layer}", self._of(layer), device
                )
                sums = files.read(there / f"moments_{layer}.safetensors")
                self.moments[layer] = Moments(**{**sums, "n": int(sums["n"])})
            self.curves = files.read(there / "curves.parquet")

    def _of(self, layer: int) -> Recipe:
        return replace(self.recipe, seed=self.recipe.seed + layer)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Untrained transcoders at the scale of the first batches."""
        for layer in self.layers:
            x, y = (torch.cat([b.mlp[layer][end] for b in batches]) for end in (0, 1))
            self.trainers[layer] = Trainer.start(self._of(layer), x, y)
            self.moments[layer] = Moments.of(x[:0], y[:0])

    def learn(self, batches: Sequence[Batch], passes: int, size: int) -> None:
        """All steps on some batches of text, of every layer."""
        for batch in batches if self.batches < MOMENTS else ():
            for layer, (x, y) in batch.mlp.items():
                self.moments[layer] += Moments.of(x, y)
        self.tokens += sum(len(batch.ids) for batch in batches)
        lines = []
        for part in mlp_stream.shuffled(batches, passes, size, self.recipe.seed + self.batches):
            for layer, trainer in self.trainers.items():
                lines.append({"layer": layer, "steps": trainer.taken, **trainer.step(*part[layer])})
        self.batches += len(batches)
        if lines:
            mean = pd.DataFrame(lines).groupby("layer", as_index=False).mean()
            self.curves = pd.concat([self.curves, mean.assign(tokens=self.tokens)])

    def fvu(self) -> float:
        """Mean over layers, since the last line of the curves."""
        return float(self.curves[self.curves["tokens"] == self.curves["tokens"].max()].fvu.mean())

    def save(self) -> None:
        """Beside the last state, then in its place."""
        there = self.folder / str(self.batches)
        for layer, trainer in self.trainers.items():
            trainer.save(there / f"layer_{layer}")
            sums = {name: torch.as_tensor(v) for name, v in vars(self.moments[layer]).items()}
            files.write(there / f"moments_{layer}.safetensors", sums)
        files.write(there / "curves.parquet", self.curves)
        files.write(self.folder / "curves.csv", self.curves)
        files.write(self.folder / "progress.json", {"batches": self.batches, "tokens": self.tokens})
        for old in self.folder.glob("[0-9]*"):
            if old != there:
                shutil.rmtree(old)


def baselines(folder: Path, layer: int) -> dict[str, Transcoder]:
    """What is put in an MLP's place beside its transcoder: zeros, its mean, the best linear map."""
    held = files.read(folder / "baselines" / f"layer_{layer}.safetensors")
    return {"zero": constant(torch.zeros_like(held["mean"])), "mean": constant(held["mean"]),
            "linear": constant(held["b_dec"], held["W_skip"])}  # fmt: skip
