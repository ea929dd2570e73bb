"""The measurements of 022: what is computed, from one model and the configured data."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from kv_examples import SPLITS, TASKS, Data, of_documents, of_rows, of_task
from torch import Tensor

from lens_utils import files, kv_learn, kv_masks, kv_scores, token_files
from lens_utils.console import say
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.kv_masks import Examples, Fill, Masked
from lens_utils.kv_units import Units, units_of
from lens_utils.lens import Readout
from lens_utils.models import LoadedModel

RANDOM = 5  # random masks of each size
# Nothing to find: the targets of other examples; a model that never learned anything.
CONTROLS = ("shuffled", "random_weights")
SHORT = ("ioi", "agreement")  # tasks of a few tokens
STEP_ROWS = {True: 8, False: 4}


@dataclass(frozen=True)
class Job:
    """One mask to learn."""

    dataset: str
    sparsity: float
    seed: int
    ranking: str
    """The one it starts from: the best on the validation split at this sparsity."""


class Study:
    """The model, its units and the data of one run; everything is loaded when first needed."""

    def __init__(self, cfg: Any, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self._data: dict[str, Data] = {}
        self._masked: dict[str, Masked] = {}
        self._moments: dict[str, kv_masks.Moments] = {}
        self._targets: dict[tuple[str, str], kv_learn.Targets] = {}

    @cached_property
    def model(self) -> LoadedModel:
        return self._load()

    def _load(self, random_init: bool = False) -> LoadedModel:
        told = {"n_head": self.cfg.n_head or None, "activation": self.cfg.activation or None}
        return self.run.model(random_init, **told)

    @cached_property
    def units(self) -> Units:
        cfg = self.cfg
        return units_of(self.model, cfg.resolution, cfg.keys, cfg.tied)

    @cached_property
    def readout(self) -> Readout:
        return Readout(self.model.bridge)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each split."""
        sizes = (8, 4, 4) if self.cfg.quick else (self.cfg.examples, 16, 32)
        return dict(zip(SPLITS, sizes, strict=True))

    def data(self, name: str) -> Data:
        """The splits of a data set, encoded for this model."""
        if name not in self._data:
            cfg, length = self.cfg, min(24 if self.cfg.quick else self.cfg.length, self.model.n_ctx)
            if name == "tokens":
                self._data[name] = self._from_file(length)
            elif name in TASKS:
                self._data[name] = of_task(self.model, name, self.sizes, cfg.seed)
            else:
                self._data[name] = of_documents(self.model, name, self.sizes, length, cfg.seed)
                if self._data[name].about["fallback"]:
                    say(self._data[name].about["said"])
        return self._data[name]

    def _from_file(self, length: int) -> Data:
        path = Path(self.cfg.tokens).expanduser()
        found = token_files.read(path, length + 1, self.model.bridge.cfg.d_vocab)
        splits = {split: of_rows(found[split][:n].tolist()) for split, n in self.sizes.items()}
        about = {"source": path.name, "digest": files.sha256(path)[:16], "fallback": ""}
        return Data(splits, about, None)

    def moments(self, name: str) -> kv_masks.Moments:
        """Means and spreads of K and V over the fit split."""
        if name not in self._moments:
            self._moments[name] = kv_masks.moments(self.model, self.data(name).splits["fit"])
        return self._moments[name]

    def masked(self, name: str) -> Masked:
        """The model under this data set's constants."""
        if name not in self._masked:
            self._masked[name] = self._mask(self.model, self.moments(name), self.readout)
        return self._masked[name]

    def _mask(self, model: LoadedModel, spread: kv_masks.Moments, readout: Readout) -> Masked:
        cfg, fill = self.cfg, spread.mean
        if cfg.fill == "zero":
            fill = Fill(*(torch.zeros_like(x) for x in fill))
        basis = spread.v_basis if cfg.basis == "pca" else None
        return Masked(model, self.units, fill, readout, basis, cfg.keep_first)

    def recipe(self, name: str) -> kv_learn.Recipe:
        """How masks are learned on a data set."""
        cfg = self.cfg
        fill = cfg.fill if cfg.fill in ("resample", "learned") else "constant"
        steps = 2 if cfg.quick else cfg.steps
        return kv_learn.Recipe(
            cfg.method, steps, cfg.lr, rows=STEP_ROWS[name in SHORT], every=2 if cfg.quick else 25,
            objective=cfg.objective, fill=fill,
        )  # fmt: skip

    def targets(self, name: str, split: str) -> kv_learn.Targets:
        """What the model itself says on a split."""
        if (name, split) not in self._targets:
            held = self.data(name).splits[split]
            self._targets[name, split] = kv_learn.Targets(self.masked(name), held)
        return self._targets[name, split]

    def fidelity(
        self, name: str, masks: list[Tensor | None], rows: Examples, masked: Masked | None = None
    ) -> pd.DataFrame:
        """What masks do to the predictions of some examples (`kv_masks.fidelity`)."""
        placed = [None if m is None else m.to(self.model.device) for m in masks]
        return kv_masks.fidelity(
            masked or self.masked(name), rows, placed, resample=self.cfg.fill == "resample"
        )

    # Stages

    def describe(self, name: str) -> dict[str, Any]:
        """The data, and what the model and the model without K and V make of it.

        Raises BadInput for a model that does not do better than guessing among its tokens.
        """
        data = self.data(name)
        test = data.splits["test"]
        found = self.fidelity(name, [None, torch.zeros(self.units.total)], test)
        full, empty = (rows.sum() for _, rows in found.groupby("mask"))
        ce, chance = full.ce / full.tokens, math.log(self.model.bridge.cfg.d_vocab)
        if name not in TASKS and ce >= chance:
            raise BadInput(
                f"{self.model.name} loses {ce:.2f} nats a token on {name}, guessing loses "
                f"{chance:.2f}: its weights look random, or the number of heads is wrong"
            )
        spoken = {"logit_diff": full.logit_diff / len(test)} if "logit_diff" in found else {}
        return {
            "corpus": data.about,
            **spoken,
            "rows": {split: len(x) for split, x in data.splits.items()},
            "tokens": int(full.tokens),
            "bytes_per_token": data.bytes_per_token,
            "ce": ce,
            "empty_ce": empty.ce / full.tokens,
            "empty_kl": empty.kl / full.tokens,
        }

    def rank(self, names: list[str]) -> dict[str, Tensor]:
        """All rankings of one data set, from its fit split."""
        (name,) = names
        fit = self.data(name).splits["fit"].take(slice(0, 8 if self.cfg.quick else 48))
        alphas = (0.5,) if self.cfg.quick else kv_scores.ALPHAS
        found = kv_scores.gradient_scores(self.masked(name), fit, self.cfg.seed, alphas)
        found |= kv_scores.magnitude_scores(self.masked(name), self.moments(name))
        return {"scores": torch.stack([found[r] for r in kv_scores.RANKINGS])[None]}

    def scores(self, name: str, scores: Tensor, ranking: str) -> Tensor:
        """One ranking of one data set out of the stage's tensor."""
        return scores[self.cfg.names.index(name), kv_scores.RANKINGS.index(ranking)]

    def baselines(self, name: str, scores: Tensor) -> pd.DataFrame:
        """Every ranking at every sparsity, on the validation and the test split."""
        random = 2 if self.cfg.quick else RANDOM
        orders = [(r, 0, self.scores(name, scores, r)) for r in kv_scores.RANKINGS]
        orders += [("random", s, kv_scores.random_scores(self.units, s)) for s in range(random)]
        masks, labels = [], []
        for sparsity in self.cfg.sweep:
            for ranking, seed, order in orders:
                masks.append(kv_scores.top(order, kv_scores.n_kept(self.units, sparsity)))
                labels.append({"sparsity": sparsity, "ranking": ranking, "seed": seed})
        frames = []
        for split in ("validation", "test"):
            found = self.fidelity(name, masks, self.data(name).splits[split])
            frames.append(found.join(pd.DataFrame(labels), on="mask").assign(split=split))
        return pd.concat(frames, ignore_index=True).drop(columns="mask").assign(dataset=name)

    def jobs(self, baselines: pd.DataFrame) -> list[Job]:
        """The masks to learn: each from the ranking with the lowest KL on the validation split."""
        held = baselines[(baselines.split == "validation") & (baselines.ranking != "random")]
        kls = held.groupby(["dataset", "sparsity", "ranking"])[["kl", "tokens"]].sum()
        best = (kls.kl / kls.tokens).groupby(["dataset", "sparsity"]).idxmin()
        seeds = 1 if self.cfg.quick else self.cfg.seeds
        return [
            Job(name, sparsity, seed, best[name, sparsity][2])
            for name in self.cfg.names
            for sparsity in self.cfg.sweep
            for seed in range(seeds if sparsity == self.cfg.target_sparsity else 1)
        ]

    def learn(self, job: Job, scores: Tensor) -> dict[str, Tensor]:
        """One learned mask. A killed run goes on from the last state on disk."""
        name, cfg = job.dataset, self.cfg
        place = self.run.folder / "parts" / "learning"
        path = place / f"{name}-{job.sparsity:g}-{job.seed}.safetensors"
        learned = kv_learn.learn(
            self.masked(name),
            self.targets(name, "fit"),
            self.targets(name, "validation"),
            self.scores(name, scores, job.ranking),
            kv_scores.n_kept(self.units, job.sparsity),
            self.recipe(name),
            seed=cfg.seed + job.seed,
            state=files.read(path) if path.exists() else None,
            keep=lambda state: files.write(path, state),
        )
        path.unlink(missing_ok=True)
        found = {"mask": learned.mask, "scores": learned.scores, "history": learned.history}
        if cfg.fill == "learned":
            found |= {"k_fill": learned.fill.k.cpu(), "v_fill": learned.fill.v.cpu()}
        return {key: value[None] for key, value in found.items()}

    def _filled(self, name: str, learned: dict[str, Tensor], number: int) -> Masked:
        masked = self.masked(name)
        if "k_fill" not in learned:
            return masked
        device = self.model.device
        return masked.with_fill(
            Fill(*(learned[key][number].to(device) for key in ("k_fill", "v_fill")))
        )

    def measure(self, jobs: list[Job], learned: dict[str, Tensor]) -> pd.DataFrame:
        """Every learned mask and its complement on the test split."""
        frames = []
        for number, job in enumerate(self.run.track(jobs, "masks")):
            mask = learned["mask"][number]
            found = self.fidelity(
                job.dataset, [mask, 1 - mask], self.data(job.dataset).splits["test"],
                self._filled(job.dataset, learned, number),
            )  # fmt: skip
            kind = found.pop("mask").map({0: "learned", 1: "complement"})
            frames.append(
                found.assign(ranking=kind, dataset=job.dataset, sparsity=job.sparsity,
                             seed=job.seed, initial=job.ranking)
            )  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def _chosen(self, jobs: list[Job]) -> dict[str, int]:
        """The first mask at the target sparsity of each data set, by its place among the jobs."""
        at = self.cfg.target_sparsity
        return {j.dataset: n for n, j in enumerate(jobs) if (j.sparsity, j.seed) == (at, 0)}

    def matrix(self, jobs: list[Job], learned: dict[str, Tensor]) -> pd.DataFrame:
        """Each data set under each data set's mask; constants are those of the data tested."""
        chosen, rows = self._chosen(jobs), []
        for tested in self.cfg.names:
            masks = [learned["mask"][chosen[name]] for name in self.cfg.names]
            found = self.fidelity(
                tested, [torch.zeros_like(masks[0]), *masks], self.data(tested).splits["test"]
            )
            sums = found.groupby(["mask", "group"])[["kl", "tokens"]].sum()
            per_group = (sums.kl / sums.tokens).unstack("mask")
            for number, source in enumerate(self.cfg.names, start=1):
                low, high = _ratio_band(per_group[number], per_group[0])
                value = 1 - per_group[number].mean() / per_group[0].mean()
                rows.append({"tested": tested, "mask": source, "faithfulness": value,
                             "low": low, "high": high, "n": len(per_group)})  # fmt: skip
        return pd.DataFrame(rows)

    def _few(self, name: str) -> Examples:
        """Some of the validation split, for what needs a pass for every group or unit."""
        return self.data(name).splits["validation"].take(slice(0, 2 if self.cfg.quick else 4))

    def without_groups(self, jobs: list[Job], learned: dict[str, Tensor]) -> pd.DataFrame:
        """How far each mask's KL rises when one KV head's kept keys or values go, too."""
        table, frames = self.units.table(), []
        for name, number in self.run.track(list(self._chosen(jobs).items()), "groups"):
            mask = learned["mask"][number]
            kept = table.assign(kept=mask.numpy()).groupby(["layer", "part", "head"])
            sizes = kept.kept.sum().astype(int).rename("kept").reset_index()
            sizes = sizes[sizes.kept > 0][:: 60 if self.cfg.quick else 1].reset_index(drop=True)
            masks = [mask]
            for group in sizes.itertuples():
                without = mask.clone()
                members = kept.get_group((group.layer, group.part, group.head)).unit.tolist()
                without[members] = 0
                masks.append(without)
            found = self.fidelity(name, masks, self._few(name)).groupby("mask")
            kls = (found.kl.sum() / found.tokens.sum()).to_numpy()
            frames.append(sizes.assign(dataset=name, kl_without=kls[1:], rise=kls[1:] / kls[0] - 1))
        return pd.concat(frames, ignore_index=True)

    def single_units(self, scores: Tensor) -> pd.DataFrame:
        """Units taken away one at a time: the best of the Fisher ranking, and random ones."""
        name, n = self.cfg.names[0], 2 if self.cfg.quick else 16
        order = self.scores(name, scores, "fisher")
        rng = np.random.default_rng(self.cfg.seed)
        best = order.argsort(descending=True)[:n].tolist()
        chosen = best + rng.choice(self.units.total, n, replace=False).tolist()
        masks: list[Tensor | None] = []
        for unit in chosen:
            masks.append(torch.ones(self.units.total).index_fill(0, torch.tensor([unit]), 0))
        found = self.fidelity(name, masks, self._few(name)).groupby("mask")
        return self.units.table().iloc[chosen].assign(
            dataset=name, score=order[chosen].numpy(), sample=["top"] * n + ["random"] * n,
            measured_kl=(found.kl.sum() / found.tokens.sum()).to_numpy(),
        )  # fmt: skip

    def controls(
        self,
        name: str,
        kind: str,
        jobs: list[Job],
        learned: dict[str, Tensor],
        scores: Tensor,
    ) -> pd.DataFrame:
        """The same procedure where there is no circuit to find (CONTROLS), or the mask of the model
        beside it. share: how much of the distance of the empty mask is made up."""
        splits, recipe = self.data(name).splits, self.recipe(name)
        kept = kv_scores.n_kept(self.units, self.cfg.target_sparsity)
        number, masked = self._chosen(jobs)[name], self.masked(name)
        start = self.scores(name, scores, jobs[number].ranking)
        if kind == "random_weights":
            twin = self._load(random_init=True)
            masked = self._mask(twin, kv_masks.moments(twin, splits["fit"]), Readout(twin.bridge))
            few = splits["fit"].take(slice(0, 8 if self.cfg.quick else 24))
            start = kv_scores.gradient_scores(masked, few, self.cfg.seed, alphas=())["fisher"]

        def targets(split: str) -> kv_learn.Targets:
            mixed = partners(splits[split]) if kind == "shuffled" else None
            return kv_learn.Targets(masked, splits[split], mixed)

        if kind == "model":
            mask = learned["mask"][number]
        else:
            fit, check = targets("fit"), targets("validation")
            mask = kv_learn.learn(masked, fit, check, start, kept, recipe, self.cfg.seed).mask
        test, random = targets("test"), kv_scores.top(kv_scores.random_scores(self.units, 0), kept)
        kls = [
            test.distance(masked, m.to(self.model.device), recipe)
            for m in (mask, random, torch.zeros_like(random))
        ]
        found = {"dataset": name, "control": kind, "learned_kl": kls[0], "random_kl": kls[1],
                 "empty_kl": kls[2], "share": 1 - kls[0] / kls[2],
                 "random_share": 1 - kls[1] / kls[2]}  # fmt: skip
        return pd.DataFrame([found])


def partners(examples: Examples) -> Tensor:
    """For each row another one whose predictions are counted at the same positions, if any."""
    partner = torch.arange(len(examples))
    patterns = torch.unique(examples.counted, dim=0, return_inverse=True)[1]
    for pattern in patterns.unique():
        rows = (patterns == pattern).nonzero()[:, 0]
        partner[rows] = rows.roll(max(1, len(rows) // 2))
    return partner


def _ratio_band(masked: pd.Series, empty: pd.Series) -> tuple[float, float]:
    """95 % interval of 1 - mean(masked) / mean(empty), resampling groups."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(masked), size=(2000, len(masked)))
    ratios = 1 - masked.to_numpy()[picks].mean(1) / empty.to_numpy()[picks].mean(1)
    return tuple(np.percentile(ratios, [2.5, 97.5]).tolist())
