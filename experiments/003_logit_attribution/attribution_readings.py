"""What experiment 003 measures with the model at hand: attribution of pairs, and of neurons."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from torch import Tensor

from lens_utils import attribution, pairs, prompts, stats
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch, Pair

HERE = str(Path(__file__))
CLASSES = ("entity", "relation", "subject", "distractor", "function", "punctuation", "bos")
INDUCTION, QUICK = 24, 3
TOP = 5  # of the whole vocabulary


def spread(values: ndarray, groups: ndarray) -> tuple[ndarray, ndarray, ndarray, int]:
    """Mean over groups of pairs with a 95 % bootstrap band over groups, for any further axes."""
    if len(values) == 0:  # a task of one wording has no other one
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing, nothing, 0
    flat = pd.DataFrame(np.asarray(values, dtype=float).reshape(len(values), -1))
    by_group = flat.groupby(groups).mean().to_numpy()
    band = (part.reshape(values.shape[1:]) for part in stats.bands(by_group))
    return *band, len(by_group)


class Session:
    """The model and the pairs that it knows, loaded when the first missing stage needs them."""

    def __init__(self, cfg, run: Run, screened: pd.DataFrame) -> None:
        self.cfg, self.run, self.screened = cfg, run, screened

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def pairs(self) -> list[Pair]:
        """The pairs of 002 that the model knows; a quick run takes three of each wording."""
        made, _ = pairs.pairs(self.model, prompts.load(HERE))
        made += pairs.induction(self.model, INDUCTION, seed=self.cfg.seed)
        known = set(self.screened.id[self.screened.known])
        wordings: dict[tuple[str, str], list[Pair]] = {}
        for p in made:
            if p.id in known:
                wordings.setdefault((p.task, p.template), []).append(p)
        most = QUICK if self.cfg.quick else None
        return [p for members in wordings.values() for p in members[:most]]

    # 1. Attribution

    def attributor(self, source: str) -> Callable[[Sequence[Pair]], dict[str, Tensor]]:
        """The function that attributes pairs: as they are, shuffled, or in an untrained model."""

        def work(chosen: Sequence[Pair]) -> dict[str, Tensor]:
            untrained = source == "untrained"
            model = self.run.model(random_init=True) if untrained else self.model
            return self._attribute(model, chosen, source == "shuffled")

        return work

    def _attribute(
        self, model: LoadedModel, chosen: Sequence[Pair], shuffled: bool
    ) -> dict[str, Tensor]:
        """Contributions, one row per pair; sources and attention summed by class of position."""
        rows: dict[str, dict[str, Tensor]] = {}
        for batch in pairs.batches(model, chosen, 16):
            found = attribution.attribute(model, self._elsewhere(batch) if shuffled else batch)
            member = torch.tensor(
                [[c == name for c in batch.pairs[0].classes] for name in CLASSES]
            ).to(found.sources)
            values = {
                "embed": found.embed, "heads": found.heads, "attn_bias": found.attn_bias,
                "mlp": found.mlp, "constant": found.constant, "logit_diff": found.logit_diff,
                "capped": found.capped, "total": found.total,
                "by_class": found.sources @ member.T, "attention": found.attention @ member.T,
                "source_gap": (found.sources.sum(-1) - found.heads).abs().amax((1, 2)),
            }  # fmt: skip
            for i, p in enumerate(batch.pairs):
                rows[p.id] = {name: value[i].cpu() for name, value in values.items()}
        return {
            name: torch.stack([rows[p.id][name] for p in chosen]) for name in rows[chosen[0].id]
        }

    def _elsewhere(self, batch: Batch) -> Batch:
        """The same prompts, attributed to the answer and foil of another pair of the wording.

        Of one that shares neither token, where there is one (with two answers there is none).
        """
        rng = np.random.default_rng(self.cfg.seed)
        dealt = []
        for p in batch.pairs:
            alike = [q for q in self.pairs if (q.task, q.template) == (p.task, p.template)]
            apart = [q for q in alike if not {q.answer, q.foil} & {p.answer, p.foil}]
            dealt.append((apart or alike)[rng.integers(len(apart or alike))])
        answer, foil = (
            torch.tensor([getattr(q, name) for q in dealt], device=batch.answer.device)
            for name in ("answer", "foil")
        )
        return dataclasses.replace(batch, answer=answer, foil=foil)

    def about(self, held: dict[str, Tensor]) -> pd.DataFrame:
        """One row per pair: what it is, and its logit difference in four parts."""
        attn = held["heads"].sum((1, 2)) + held["attn_bias"].sum(1)
        table = pd.DataFrame(
            [
                {"id": p.id, "task": p.task, "template": p.template, "group": p.group,
                 "tokens": len(p.clean), "entity_tokens": p.classes.count("entity"),
                 "answers": len({q.answer for q in self.pairs if q.task == p.task})}
                for p in self.pairs
            ]
        ).assign(
            logit_diff=held["logit_diff"], capped=held["capped"], total=held["total"],
            embed=held["embed"], attn=attn, mlp=held["mlp"].sum(1), constant=held["constant"],
        )  # fmt: skip
        # Halves for choosing and measuring: a group (a country) lies in one of them.
        rank = table.groupby("task").group.transform(lambda g: g.rank(method="dense"))
        return table.assign(half=rank.astype(int) % 2)

    def exactness(self, held: dict[str, Tensor]) -> dict[str, object]:
        """Largest gaps of what has to be equal, in nats."""
        gap = (held["total"] - held["logit_diff"]).abs()
        parts = held["heads"].abs().sum((1, 2)) + held["mlp"].abs().sum(1) + held["embed"].abs()
        found = {
            "pairs": len(gap),
            "largest_gap_sum": gap.max().item(),
            "largest_gap_of_what_was_added": (gap / parts).max().item(),
            "largest_gap_sources": held["source_gap"].max().item(),
            "largest_change_by_softcap": (held["logit_diff"] - held["capped"]).abs().max().item(),
        }
        if self.cfg.folded:
            most = 4 if self.cfg.quick else 12
            chosen = self.pairs[:: max(1, len(self.pairs) // most)]
            at = [self.pairs.index(p) for p in chosen]
            folded = self._attribute(self.run.model(fold=True), chosen, shuffled=False)
            for name in ("logit_diff", "heads", "mlp"):
                found[f"folded_gap_{name}"] = (folded[name] - held[name][at]).abs().max().item()
            found["folded_pairs"] = len(chosen)
        return found

    # 3. Neurons

    def neurons(self, asked: pd.DataFrame, strongest: pd.DataFrame) -> pd.DataFrame:
        """The top neurons of each task's strongest MLPs, chosen on one half of the groups.

        Chosen in the first wording; measured on the same groups in the other wording (same_), and
        on the other half in both. Beside them as many random neurons of the same MLPs, and sums
        (neuron -1) of the top ones, of the random ones, and of all, over the MLPs of a task.
        """
        rows, rng = [], np.random.default_rng(self.cfg.seed)
        for task, places in self.run.track(list(strongest.groupby("task", sort=False)), "MLPs"):
            members = [p for p in self.pairs if p.task == task]
            batches = list(pairs.batches(self.model, members, 16))
            about = asked.set_index("id").loc[[p.id for b in batches for p in b.pairs]]
            first, groups = about.template == members[0].template, about.group.to_numpy()
            choosing = (about.half == 0).to_numpy() & first.to_numpy()
            measured = {"": (about.half == 1).to_numpy(),
                        "same_": (about.half == 0).to_numpy() & ~first.to_numpy()}  # fmt: skip
            place: dict[str, object] = {"task": task, "says": ""}
            sums: dict[str, ndarray] = {}

            def rated(values: ndarray, where=measured, groups=groups, choosing=choosing) -> dict:
                found = {"chosen_on": values[choosing].mean(0)}
                for name, rows in where.items():
                    mean, low, high, n = spread(values[rows], groups[rows])
                    found |= {f"{name}mean": mean, f"{name}low": low, f"{name}high": high}
                    found |= {f"{name}n": n}
                return found

            held = [attribution.neurons(self.model, b, places.layer.tolist()) for b in batches]
            for layer in places.layer.tolist():
                values = torch.cat([part[layer][0] for part in held]).cpu().numpy()
                order = np.argsort(-values[choosing].mean(0))
                picked = {
                    "top": order[: self.cfg.neurons],
                    "random": rng.permutation(order[self.cfg.neurons :])[: self.cfg.neurons],
                    "all": order,
                }
                for kind, cells in picked.items():
                    sums[kind] = sums.get(kind, 0) + values[:, cells].sum(1, keepdims=True)
                    if kind != "all":
                        says = [self._says(layer, i) if kind == "top" else "" for i in cells]
                        about_cells = {"layer": layer, "neuron": cells, "kind": kind, "says": says}
                        rows.append(pd.DataFrame(place | about_cells | rated(values[:, cells])))
            for kind, values in sums.items():
                whole = {"layer": -1, "neuron": [-1], "kind": kind}
                rows.append(pd.DataFrame(place | whole | rated(values)))
        return pd.concat(rows, ignore_index=True)

    def _says(self, layer: int, neuron: int | np.integer) -> str:
        """The tokens that a neuron raises most when it is active."""
        bridge = self.model.bridge
        written = bridge.blocks[layer].mlp.W_out[neuron].float()
        for norm in (getattr(bridge.blocks[layer], "ln2_post", None), bridge.ln_final):
            written = attribution.Norm(norm, written[None]).push(written)
        top = (written @ bridge.W_U.float()).topk(TOP).indices
        return " ".join(self.model.decode([i]).strip() for i in top.tolist())
