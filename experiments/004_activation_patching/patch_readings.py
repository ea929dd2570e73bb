"""What experiment 004 measures with the model at hand: the pairs again, one part replaced."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lens_utils import attention, pairs, prompts, sweeps
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch, Pair
from lens_utils.patching import Kind, Site, Unit

HERE = str(Path(__file__))
QUICK = 3  # pairs of each wording in a quick run, of which some stages use fewer
CITY, GOVERNMENT = ("capital", "city"), ("capital", "government")
# One wording of each other task: the shorter one.
BRIEFLY = (("opposite", "plain"), ("ioi", "store"), ("agreement", "near"), ("pronoun", "doctor"),
           ("induction", "random"))  # fmt: skip
STREAM = ("resid_pre", "resid_mid", "attn_out", "mlp_out")
SIZES = (1, 2, 3, 5, 8)  # heads in a set
RANDOM_SETS = 5
INPUTS = ("q", "k", "v", "pattern", "z")


class Job(NamedTuple):
    """One sweep over a model: a part, replaced in one place after the other."""

    task: str
    template: str
    component: str
    kind: Kind
    over: str
    """pos or head"""


class Session:
    """The model and its pairs, loaded when the first missing stage needs them."""

    def __init__(self, cfg, run: Run, screened: pd.DataFrame) -> None:
        self.cfg, self.run = cfg, run
        known = screened[screened.known]
        if cfg.quick:
            known = known.groupby(["task", "template"], sort=False).head(QUICK)
        self.known = list(known.id)

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def pairs(self) -> list[Pair]:
        """The pairs of 002 that the model knows, made again."""
        made, _ = pairs.pairs(self.model, prompts.load(HERE))
        made += pairs.induction(self.model, self.cfg.induction, seed=self.cfg.seed)
        return [p for p in made if p.id in set(self.known)]

    def of(self, task: str, template: str) -> list[Pair]:
        """The known pairs of a wording. Raises BadInput where there are fewer than two."""
        found = [p for p in self.pairs if (p.task, p.template) == (task, template)]
        if len(found) < 2:
            raise BadInput(f"{self.model.name} knows {len(found)} pairs of {task} {template}")
        return found

    def wordings(self) -> list[tuple[str, str]]:
        """Those that are gone through, capitals first; in the quick run only these."""
        return [CITY, GOVERNMENT, *(() if self.cfg.quick else BRIEFLY)]

    def tokens(self) -> pd.DataFrame:
        """One row per position of each wording: its class, and its token where all share one."""
        rows = []
        for task, template in self.wordings():
            some = self.of(task, template)
            for pos, kinds in enumerate(zip(*(p.classes for p in some), strict=True)):
                shared = {p.clean[pos] for p in some}
                kind = kinds[0] if len(set(kinds)) == 1 else "random"
                text = self.model.decode(list(shared)) if len(shared) == 1 else f"[{kind}]"
                changes = any(p.clean[pos] != p.corrupt[pos] for p in some)
                rows.append({"task": task, "template": template, "pos": pos, "kind": kind,
                             "token": text, "changes": changes})  # fmt: skip
        return pd.DataFrame(rows)

    # 1. Sweeps

    def residual_jobs(self) -> list[Job]:
        """Layer x position: all four parts for capitals, the residual for the other tasks."""
        jobs = [Job(*CITY, part, "denoise", "pos") for part in STREAM]
        if self.cfg.quick:
            return jobs[:1] + jobs[2:3]
        jobs += [Job(*CITY, part, "noise", "pos") for part in ("resid_pre", "attn_out")]
        jobs += [Job(*GOVERNMENT, part, "denoise", "pos") for part in STREAM if part != "resid_mid"]
        return jobs + [Job(*wording, "resid_pre", "denoise", "pos") for wording in BRIEFLY]

    def head_jobs(self) -> list[Job]:
        """Every head, at all positions at once."""
        if self.cfg.quick:
            wanted = [(CITY, "denoise"), (CITY, "mean")]
        else:
            wanted = [(CITY, kind) for kind in ("denoise", "noise", "zero", "mean", "resample")]
            wanted += [(GOVERNMENT, "denoise"), (GOVERNMENT, "mean")]
            wanted += [(wording, "denoise") for wording in BRIEFLY]
        return [Job(*wording, "z", kind, "head") for wording, kind in wanted]

    def asked(self, task: str, over: str) -> int:
        """Pairs of a wording that a sweep uses."""
        if self.cfg.quick:
            return 2
        if task != "capital":
            return self.cfg.other_pairs
        return self.cfg.head_pairs if over == "head" else self.cfg.pairs

    def sweep(self, jobs: Iterable[Job]) -> pd.DataFrame:
        """One row per pair and place."""
        step = 2 if self.cfg.quick else 1
        return pd.concat([self._sweep(self.model, job, step) for job in jobs], ignore_index=True)

    def sweep_untrained(self) -> pd.DataFrame:
        """Every head on some capitals in a model of this shape that has learned nothing."""
        twin, job = self.run.model(random_init=True), Job(*CITY, "z", "denoise", "head")
        return self._sweep(twin, job, step=6 if self.cfg.quick else 1)

    def _sweep(self, model: LoadedModel, job: Job, step: int = 1) -> pd.DataFrame:
        n = self.asked(job.task, job.over)
        layers = range(0, model.n_layers, step)
        frames = []
        for batch in pairs.batches(model, self.of(job.task, job.template)[:n], n):
            # Before the first token that differs both runs are one: nothing to replace.
            differs = (batch.clean != batch.corrupt).any(0).nonzero()[0].item()
            at = range(differs, batch.clean.shape[1]) if job.over == "pos" else None
            if len(batch.pairs) < 2 and job.kind in ("mean", "resample"):
                continue
            found = sweeps.sweep(model, batch, job.component, job.kind, [job.over], layers, at,
                                 self.cfg.seed)  # fmt: skip
            places = [layers, at or range(found.logit_diff.shape[2])]
            index = [{"layer": at, job.over: place} for at, place in itertools.product(*places)]
            frames.append(rows(batch, found, index).assign(component=job.component))
        return pd.concat(frames, ignore_index=True)

    # 2. What the sweeps found, on pairs that had no part in it

    def held_out(self, wording: tuple[str, str]) -> list[Pair]:
        """Pairs behind those that the head sweep used; of the second capital wording, any."""
        some = self.of(*wording)
        used = 0 if wording == GOVERNMENT else self.asked(wording[0], "head")
        first = min(used, len(some) - 2)
        return some[first : first + (2 if self.cfg.quick else self.cfg.more_pairs)]

    def _units(
        self, wording: tuple[str, str], units: Sequence[Unit], kind: Kind, about: list[dict]
    ) -> pd.DataFrame:
        frames = []
        for batch in pairs.batches(self.model, self.held_out(wording), 100):
            if len(batch.pairs) > 1 or kind not in ("mean", "resample"):
                found = sweeps.several(self.model, batch, units, kind, self.cfg.seed)
                frames.append(rows(batch, found, about))
        return pd.concat(frames, ignore_index=True)

    def sets(self, top: pd.DataFrame) -> Callable[[Sequence[tuple[str, str]]], pd.DataFrame]:
        """For `run.chunks`: the strongest heads together, against random sets in their layers."""

        def measure(wordings: Sequence[tuple[str, str]]) -> pd.DataFrame:
            cfg = self.model.bridge.cfg
            frames = []
            for wording in wordings:
                heads = strongest(top, wording)
                units, about = [], []
                sizes = SIZES[2::2] if self.cfg.quick else SIZES
                for size in (s for s in sizes if s <= len(heads)):
                    drawn = sweeps.random_sets(heads[:size], cfg.n_layers, cfg.n_heads,
                                               2 if self.cfg.quick else RANDOM_SETS,
                                               self.cfg.seed)  # fmt: skip
                    for n, chosen in enumerate([heads[:size], *drawn]):
                        units.append(sweeps.together(chosen))
                        about.append({"heads": size, "set": f"random {n}" if n else "strongest"})
                kinds: tuple[Kind, ...] = ("denoise", "mean")
                frames += [self._units(wording, units, kind, about) for kind in kinds]
            return pd.concat(frames, ignore_index=True)

        return measure

    def inputs(self, top: pd.DataFrame) -> Callable[[Sequence[tuple[str, str]]], pd.DataFrame]:
        """For `run.chunks`: by which of its inputs a strong head gets what it needs (denoising)."""

        def measure(wordings: Sequence[tuple[str, str]]) -> pd.DataFrame:
            cfg = self.model.bridge.cfg
            group = cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)
            frames = []
            for wording in wordings:
                units, about = [], []
                for (layer, head), part in itertools.product(strongest(top, wording), INPUTS):
                    which = head // group if part in ("k", "v") else head
                    units.append((Site(part, layer, (which,)),))
                    about.append({"layer": layer, "head": head, "part": part})
                frames.append(self._units(wording, units, "denoise", about))
            return pd.concat(frames, ignore_index=True)

        return measure

    # 3. Attention knock-out

    def knockout(self, wordings: Sequence[tuple[str, str]]) -> pd.DataFrame:
        """Attention between classes removed in windows of layers, for capitals all of them."""
        n = self.model.n_layers
        middle = attention.band(n) or range(n)  # none in models of two layers
        named = {"40-85 %": middle, "below 40 %": range(middle[0]), "all layers": range(n)}
        width = max(1, round(n / 6))
        frames = []
        for wording in wordings:
            spans = [(name, layers) for name, layers in named.items() if len(layers)]
            if wording[0] == "capital":
                every = sweeps.sliding(n, width)[:: 10 if self.cfg.quick else 2]
                spans += [("sliding", layers) for layers in every]
            some = self.of(*wording)[: 2 if self.cfg.quick else self.cfg.more_pairs]
            for batch in pairs.batches(self.model, some, 100):
                edges = cuts(batch)
                units, about = [], []
                for (name, layers), (edge, queries, keys) in itertools.product(spans, edges):
                    units.append(sweeps.cut(layers, queries, keys))
                    about.append({"window": name, "first": layers[0], "last": layers[-1],
                                  "edge": edge, "keys": " ".join(map(str, keys))})  # fmt: skip
                found = sweeps.several(self.model, batch, units, "zero")
                frames.append(rows(batch, found, about).assign(kind="knock-out"))
        return pd.concat(frames, ignore_index=True)


def cuts(batch: Batch) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Edges to be removed: name, queries, keys. `other` is every single position of no class."""
    classes = batch.pairs[0].classes
    last = sweeps.at(batch, "last")
    roles = [r for r in ("entity", "relation", "subject", "distractor", "bos")
             if r in classes[:-1]]  # fmt: skip
    before = {role: tuple(p for p in sweeps.at(batch, role) if p < last[0]) for role in roles}
    found = [(f"{role} to last", last, keys) for role, keys in before.items()]
    entity = sweeps.at(batch, "entity")
    between = tuple(range(entity[-1] + 1, last[0]))
    if between and entity[-1] < last[0]:
        found.append(("entity to between", between, entity))
        found.append(("entity to all later", (*between, *last), entity))
    others = [p for p in range(last[0]) if classes[p] in ("function", "punctuation")]
    return found + [("other to last", last, (p,)) for p in others]


def rows(batch: Batch, found: sweeps.Sweep, about: list[dict]) -> pd.DataFrame:
    """One row per unit and pair: what was done, to which pair, and what came of it."""
    places = pd.DataFrame(about)
    n = len(batch.pairs)
    values = {
        "logit_diff": found.logit_diff.flatten(1).T.flatten(),
        "effect": found.effect().flatten(1).T.flatten(),
        "clean": found.clean.repeat(len(places)),
        "corrupt": found.corrupt.repeat(len(places)),
    }
    pair = pd.DataFrame([{k: getattr(p, k) for k in ("id", "group", "task", "template")}
                         for p in batch.pairs])  # fmt: skip
    tiled = pd.concat([pair] * len(places), ignore_index=True)
    repeated = places.loc[places.index.repeat(n)].reset_index(drop=True)
    measured = pd.DataFrame({k: v.float().cpu().numpy() for k, v in values.items()})
    return pd.concat([tiled, repeated, measured], axis=1).assign(kind=found.kind)


def strongest(top: pd.DataFrame, wording: tuple[str, str]) -> list[sweeps.Head]:
    """The heads chosen for a wording, strongest first; for both capitals those of the first."""
    task, template = CITY if wording == GOVERNMENT else wording
    some = top[(top.task == task) & (top.template == template)].sort_values("rank")
    return [(int(row.layer), int(row.head)) for row in some.itertuples()]
