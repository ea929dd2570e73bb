"""What experiment 013 does with the model at hand: states at sites, and all probes on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import probe_design as design
import torch
from probe_design import LABELS, VALID, Design
from probe_tables import Solved
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor

from lens_utils import lens, maze_prompts, probe_readings, probe_scores, probes
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.maze_records import from_dict
from lens_utils.maze_tasks import ABILITIES, Record
from lens_utils.models import LoadedModel

PART = 256  # questions whose states are kept together
MOST_NEURONS = 20_000
"""Of larger models, "all" neurons are so many random ones."""
WORDS = r"\(\d+,\d+\)|\w+|[?.:]"
"""A cell, a word or a mark: what the bag of words counts."""


@dataclass(frozen=True)
class Asked:
    """A question with what the model thought about it."""

    record: Record
    thought: str = ""


def direct(held: Sequence[dict]) -> list[Asked]:
    """The questions without thinking."""
    return [Asked(from_dict(one)) for one in held if not one["enable_thinking"]]


def thinking(held: Sequence[dict], replies: pd.DataFrame) -> tuple[list[Asked], int]:
    """The questions with a finished thought, and how many have none."""
    known = replies.set_index("id")
    found, without = [], 0
    for one in held:
        if not one["enable_thinking"]:
            continue
        reply = known.loc[one["id"]] if one["id"] in known.index else None
        if reply is None or reply.truncated or not isinstance(reply.thought, str):
            without += 1
            continue
        found.append(Asked(from_dict(one), reply.thought))
    return found, without


def sites(model: LoadedModel, asked: Asked, wanted: str) -> tuple[list[int], dict[str, list[int]]]:
    """A question's token ids and where its sites are.

    direct: null (the maze's last token: nothing has been asked yet), cells (all open cells) and
    last (the prompt's last token); judge: path (the shown path's cells) and last; thinking: last
    and thought (the span between the tags). A maze in another format than lists of cells has no
    cells: its null is the last token of what it shares with the maze's other questions.
    """
    record = asked.record
    ids = maze_prompts.encode(model, record)
    last = [len(ids) - 1]
    if wanted == "thinking":
        head = model.encode(f"{maze_prompts.OPEN}\n", bos=False)
        whole = model.encode(f"{maze_prompts.OPEN}\n{asked.thought}", bos=False)
        span = range(len(ids) + len(head), len(ids) + len(whole))
        return [*ids, *whole], {"last": last, "thought": list(span)}
    named = maze_prompts.cell_positions(model, ids)
    if wanted == "judge":
        return ids, {"path": [c.position for c in named if c.section == "path"], "last": last}
    cells = [c.position for c in named if c.section == "empty"]
    if not cells:
        raise BadInput(f"013 needs mazes as lists of cells (coord_list), not {record.style}")
    return ids, {"null": cells[-1:], "cells": cells, "last": last}


def bag_of_words(asked: Sequence[Asked]) -> dict[str, Tensor]:
    """How often each word stands in each prompt, as states of one site and depth."""
    counts = CountVectorizer(token_pattern=WORDS, lowercase=True).fit_transform(
        [one.record.prompt for one in asked]
    )
    return {"words": torch.from_numpy(counts.toarray()).float()[:, None]}


# The solve


def groups(held: dict[str, Tensor], depths: Sequence[int]) -> pd.DataFrame:
    """Site and depth of every group of states, in the order of `solve`."""
    return pd.DataFrame([{"site": site, "depth": d} for site in held for d in depths])


def solve(
    held: dict[str, Tensor], plan: Design, penalty: float, device: torch.device
) -> dict[str, np.ndarray]:
    """Every problem of a design on every site and depth, in one batched solve.

    logits: held-out log-odds of every cell (`Design.cells`), NaN where nothing was predicted;
    directions: of the problems of scheme all; gradient: the largest at the end, per group.
    """
    stacked = torch.cat([one.transpose(0, 1) for one in held.values()]).to(device)
    labels, weight = plan.tensors()
    found = probes.fit(stacked, labels.to(device), weight.to(device), penalty)
    cells, place = plan.cells
    logits = np.full((len(stacked), len(cells), len(plan.rows)), np.nan, dtype=np.float32)
    for at, states in enumerate(stacked):
        one = probes.Probes(*(part[at : at + 1] for part in found))
        z = one.logits(states[None])[0].cpu().numpy()
        for n, cell in enumerate(place):
            if cell >= 0:
                logits[at, cell, plan.tested[n]] = z[n, plan.tested[n]]
    whole = np.flatnonzero(np.array(place) < 0)
    return {
        "logits": logits,
        "directions": found.scaled[:, whole].cpu().numpy(),
        "gradient": found.gradient.amax(1).cpu().numpy(),
    }


# DAPE integration


def dape_sets(
    results: dict[str, Any], shape: tuple[int, int], n_random: int, seed: int
) -> list[dict[str, Any]]:
    """Of every ability its DAPE neurons, and random sets with as many neurons in every layer.

    results: 011's qwen3_dape_results.json. Abilities without neurons have no sets.
    """
    rng = np.random.default_rng(seed)
    sets = []
    for ability in ABILITIES:
        neurons = [(n["layer"], n["neuron"]) for n in
                   results["abilities"].get(ability, {}).get("neurons", [])]  # fmt: skip
        if not neurons:
            continue
        sets.append({"ability": ability, "kind": "dape", "neurons": neurons})
        for _ in range(n_random):
            drawn = []
            for layer in range(shape[0]):
                others = np.setdiff1d(np.arange(shape[1]), [n for at, n in neurons if at == layer])
                wanted = min(len(others), sum(at == layer for at, _ in neurons))
                drawn += [(layer, int(n)) for n in rng.choice(others, wanted, replace=False)]
            sets.append({"ability": ability, "kind": "random", "neurons": drawn})
    every = [(layer, n) for layer in range(shape[0]) for n in range(shape[1])]
    if len(every) > MOST_NEURONS:
        every = [every[i] for i in sorted(rng.choice(len(every), MOST_NEURONS, replace=False))]
    return [*sets, {"ability": "", "kind": "all", "neurons": every}] if sets else []


def on_neurons(
    model: LoadedModel, asked: Sequence[Asked], sets: list[dict[str, Any]],
    plans: dict[str, Design], penalty: float,
) -> pd.DataFrame:  # fmt: skip
    """Held-out-wording scores of probes that see only some neurons at the last prompt token.

    plans: of every label; an ability's neurons are asked for that ability's only.
    """
    rows = [maze_prompts.encode(model, one.record) for one in asked]
    union = sorted({neuron for one in sets for neuron in one["neurons"]})
    column = {neuron: i for i, neuron in enumerate(union)}
    values = probe_readings.neurons_at_last(model, rows, union).to(model.device)
    found = []
    for one in sets:
        columns = [column[neuron] for neuron in one["neurons"]]
        held = {"neurons": values[:, None, columns]}
        for label in [f"requires_{one['ability']}"] if one["ability"] else plans:
            plan = plans[label]
            logits = solve(held, plan, penalty, model.device)["logits"][0, 0]
            scores = probe_scores.standard(plan.rows[label].to_numpy(), logits)
            about = {"label": label, "kind": one["kind"], "n_neurons": len(columns)}
            found.append(about | scores)
    return pd.DataFrame(found)


# The run


class Study:
    """The questions of a run by set, their states, and the solves on them."""

    def __init__(self, cfg, run: Run, asked: dict[str, list[Asked]]) -> None:
        self.cfg, self.run, self.asked = cfg, run, asked
        self.folds = 2 if cfg.quick else cfg.folds
        self.model = run.model()
        self.places: dict[tuple[str, Asked], tuple[list[int], dict[str, list[int]]]] = {}
        self.depths = lens.depths(self.model.n_layers, cfg.key_layers.replace(" ", "") or "all")
        self.rows = {
            name: design.table([one.record for one in some]) for name, some in asked.items()
        }

    def states(self, name: str, untrained: bool = False) -> dict[str, Tensor]:
        """Mean residuals of a set: a tensor (row, depth, d_model) for every site."""

        def compute(part: Sequence[Asked]) -> dict[str, Tensor]:
            for one in part:
                if (name, one) not in self.places:
                    self.places[name, one] = sites(self.model, one, name)
            known = [self.places[name, one] for one in part]
            return probe_readings.site_means(
                self.run.model(random_init=untrained),
                [ids for ids, _ in known],
                [where for _, where in known],
                self.depths,
            )

        stage = f"states_{name}{'_untrained' if untrained else ''}.safetensors"
        held = self.run.chunks(stage, self.asked[name], PART, compute)
        if self.cfg.quick:  # one null is enough
            held.pop("cells", None)
        return held

    def solved(self, name: str) -> Solved:
        """A set with everything that is asked of it."""
        cfg, rows = self.cfg, self.rows[name]
        controls = 1 if cfg.quick else cfg.controls
        if name == "judge":
            plan = design.valid_design(rows, self.folds, cfg.seed, controls)
        else:
            deals = 10 if cfg.quick else cfg.permutations
            deals = deals if name == "direct" else 0
            plan = design.ability_design(rows, self.folds, cfg.seed, controls, deals)
        return self._solved(name, self.states(name), plan, self.depths)

    def _solved(
        self, name: str, held: dict[str, Tensor], plan: Design, depths: Sequence[int]
    ) -> Solved:
        arrays = self.run.stage(
            f"fits_{name.replace(' ', '_')}.npz",
            lambda: solve(held, plan, self.cfg.penalty, self.model.device),
        )
        return Solved(name, groups(held, depths), plan, arrays)

    def baselines(self) -> list[Solved]:
        """The bag of words, and the untrained twin's states, on the same rows and folds."""
        found = []
        for name in ("direct", "judge"):
            if name not in self.asked:
                continue
            labels = (VALID,) if name == "judge" else LABELS
            prefix = "judge " if name == "judge" else ""
            plan = design.plain_design(self.rows[name], self.folds, self.cfg.seed, labels)
            words = bag_of_words(self.asked[name])
            found.append(self._solved(f"{prefix}words", words, plan, [0]))
            twin = self.states(name, untrained=True)
            found.append(self._solved(f"{prefix}untrained", twin, plan, self.depths))
        return found

    def on_dape(self) -> pd.DataFrame:
        """Probes on the neurons that 011 found, on random ones and on all; empty without any."""
        sets = []
        if self.cfg.use_dape:
            results = self.run.upstream("011_domain_neurons", "qwen3_dape_results.json")
            shape = self.model.n_layers, self.model.bridge.cfg.d_mlp
            n_random = 3 if self.cfg.quick else self.cfg.random_sets
            sets = dape_sets(results, shape, n_random, self.cfg.seed)
        if not sets:
            return pd.DataFrame(columns=["label", "kind", "n_neurons", "accuracy", "auc"])
        rows, seed = self.rows["direct"], self.cfg.seed
        plans = {label: design.plain_design(rows, self.folds, seed, (label,), ("template",))
                 for label in design.REQUIRES}  # fmt: skip
        return on_neurons(self.model, self.asked["direct"], sets, plans, self.cfg.penalty)

    def counts(self, sets: Sequence[Solved]) -> dict[str, int]:
        """How much was asked."""
        return {
            "questions without thinking": len(self.asked["direct"]),
            "questions about a path": len(self.asked.get("judge", ())),
            "thinking spans": len(self.asked.get("thinking", ())),
            "mazes": int(self.rows["direct"].maze.nunique()),
            "probes fitted": sum(len(s.design.problems) * len(s.groups) for s in sets),
            "probes left out": sum(len(s.design.left_out) * len(s.groups) for s in sets),
        }
