"""One pass over the text trains all configurations of all pilot layers.

The model gives activations a block of batches at a time; every trainer of a layer takes the same
steps on the same tokens, shuffled within the block, and then the block is forgotten. Nothing is
written before the end: a killed training starts over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from sweep_plan import BATCH
from torch import Tensor

from lens_utils import files, mlp_stream
from lens_utils.experiment import Run
from lens_utils.faithfulness import constant
from lens_utils.models import LoadedModel
from lens_utils.sparse import Transcoder
from lens_utils.sparse_training import Moments, Recipe, Trainer, dead_after, mean_baseline, ridge
from lens_utils.text_rows import Row

BLOCK = 8  # batches of text whose activations are held together
BASELINES = "baselines"
Activations = dict[int, tuple[Tensor, Tensor]]


class RandomEncoder(Trainer):
    """Features that nobody trained: random encoder rows, whose decoders alone are learned."""

    def _update(self, name: str, gradient: Float[Tensor, "*shape"], rate: float) -> None:
        if name not in ("W_enc", "b_enc"):
            super()._update(name, gradient, rate)


class Sweep:
    """All configurations in training. `trained` trains when it is first asked."""

    def __init__(
        self, run: Run, model: LoadedModel, rows: Sequence[Row], plan: dict[str, Any]
    ) -> None:
        self.run, self.model, self.rows, self.plan = run, model, rows, plan

    def trained(self) -> dict[str, dict[str, Tensor]]:
        """By configuration, tensors by layer and name, such as 3.W_enc; and the baselines'."""
        return self._trained

    @cached_property
    def _trained(self) -> dict[str, dict[str, Tensor]]:
        layers, trainers, sums = self.plan["layers"], {}, {}
        for number, block in enumerate(self._blocks()):
            for layer, (x, y) in block.items():
                if not number:
                    trainers[layer] = self._begin(layer, x, y)
                    sums[layer] = Moments.of(x[:0], y[:0])
                sums[layer] += Moments.of(x, y)
                self._steps(trainers[layer], x, y, seed=number)
        found = {
            name: {f"{layer}.{n}": p.detach() for layer in layers
                   for n, p in trainers[layer][name].transcoder().named_parameters()}
            for name in self.plan["configurations"]
        }  # fmt: skip
        found[BASELINES] = {}
        for layer in layers:
            linear, scales = ridge(sums[layer]), trainers[layer][self.plan["centre"]].scales
            held = {"mean": mean_baseline(sums[layer]).b_dec, "b_dec": linear.b_dec,
                    "W_skip": linear.W_skip,
                    "rms": torch.tensor([scales.x_rms, scales.y_rms])}  # fmt: skip
            found[BASELINES] |= {f"{layer}.{name}": t.detach() for name, t in held.items()}
        return found

    def _blocks(self) -> Iterator[Activations]:
        """Activations of BLOCK batches at a time."""
        spans, layers = mlp_stream.batches(self.rows), self.plan["layers"]
        held: list[mlp_stream.Batch] = []
        for number, (start, end) in enumerate(self.run.track(spans, "batches of text"), start=1):
            held.append(mlp_stream.activations(self.model, self.rows[start:end], start, layers))
            if len(held) == BLOCK or number == len(spans):
                yield {n: tuple(torch.cat([b.mlp[n][end] for b in held]) for end in (0, 1))
                       for n in layers}  # fmt: skip
                held = []

    def _begin(
        self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
    ) -> dict[str, Trainer]:
        """Untrained transcoders at the scale of the first block."""
        plan, trainers = self.plan, {}
        tokens = plan["tokens"] * plan["passes"]
        for name, c in plan["configurations"].items():
            recipe = Recipe(
                n_features=c["expansion"] * plan["d_model"],
                k=c["k"],
                lr=c["lr"],
                skip=c["skip"],
                max_gain=c["max_gain"],
                steps=max(1, int(c["share"] * tokens / BATCH)),
                dead_after=dead_after(int(c["share"] * tokens)),
                seed=plan["seed"] + layer,
            )
            kind = Trainer if c["encoder"] == "trained" else RandomEncoder
            trainers[name] = kind.start(recipe, x, y)
        return trainers

    def _steps(
        self,
        trainers: dict[str, Trainer],
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"],
        seed: int,
    ) -> None:
        """Steps on the block's tokens in new orders. Those with a share of the text stop there."""
        source = torch.Generator().manual_seed(self.plan["seed"] + seed)
        for _ in range(self.plan["passes"]):
            order = torch.randperm(len(x), generator=source).to(x.device)
            for part in order.tensor_split(max(1, len(x) // BATCH)):
                for trainer in trainers.values():
                    if trainer.taken < trainer.recipe.steps:
                        trainer.step(x[part], y[part])


# What the training left on disk


def file(name: str) -> str:
    """A configuration's file name."""
    return name.replace(",", "").replace(" ", "_") + ".safetensors"


def transcoders(
    run: Run, name: str, plan: dict[str, Any], model: LoadedModel
) -> dict[int, Transcoder]:
    """A configuration's transcoders by layer."""
    state, k = files.read(run.folder / "trained" / file(name)), plan["configurations"][name]["k"]
    return {
        layer: Transcoder(
            **{n.partition(".")[2]: t for n, t in state.items() if n.startswith(f"{layer}.")}, k=k
        ).to(model.device)
        for layer in plan["layers"]
    }


def baselines(
    run: Run, plan: dict[str, Any], model: LoadedModel
) -> dict[str, dict[int, Transcoder]]:
    """zero, mean and linear (the best skip connection alone), by layer."""
    state = files.read(run.folder / "trained" / file(BASELINES))
    state = {name: t.to(model.device) for name, t in state.items()}
    of = {layer: {n: state[f"{layer}.{n}"] for n in ("mean", "b_dec", "W_skip")}
          for layer in plan["layers"]}  # fmt: skip
    return {
        "zero": {n: constant(torch.zeros_like(held["mean"])) for n, held in of.items()},
        "mean": {n: constant(held["mean"]) for n, held in of.items()},
        "linear": {n: constant(held["b_dec"], held["W_skip"]) for n, held in of.items()},
    }


def unit(run: Run, layer: int) -> float:
    """What a gain of 1 between scaled inputs and outputs is between raw ones."""
    x_rms, y_rms = files.read(run.folder / "trained" / file(BASELINES))[f"{layer}.rms"].tolist()
    return y_rms / x_rms
