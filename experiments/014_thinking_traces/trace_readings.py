"""What experiment 014 measures with the model at hand."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from trace_tables import PLACES, follows

from lens_utils import dape, generate, maze_prompts, maze_records, maze_tasks, traces
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.maze_tasks import Record
from lens_utils.models import LoadedModel

FLIPS, QUICK_FLIPS = 999, 199
CUTS, QUICK_CUTS = (0.25, 0.5, 0.75), (0.5,)


class Session:
    """The model, and the questions with their finished traces."""

    def __init__(self, cfg, run: Run, records: list[dict], chosen: pd.DataFrame) -> None:
        self.cfg, self.run = cfg, run
        self.chosen = chosen.fillna({"reply": ""}).reset_index(drop=True)
        self.held = {r["id"]: r for r in records}

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def records(self) -> list[Record]:
        return [maze_records.from_dict(self.held[i]) for i in self.chosen.id]

    # The same cell in two places

    def places(self) -> dict[str, torch.Tensor]:
        """Statistics of every neuron for every pair of places, trained and untrained.

        Keys are <places>/<weights>/<statistic>; tensors are [layer, neuron], counts [1].
        """
        rows = zip(self.records, self.chosen.itertuples(), strict=True)
        said = [traces.said(self.model, record, row.thought, row.reply) for record, row in rows]
        named = [traces.mentions(self.model, what) for what in said]
        maze = self.chosen.maze_id.to_numpy(str)
        number = np.unique(maze, return_inverse=True)[1]
        first = dape.halves(int(number.max()) + 1)[number]
        n_flips = self.cfg.permutations or (QUICK_FLIPS if self.cfg.quick else FLIPS)
        out = {}
        for name, (one, other, tasks) in PLACES.items():
            allowed = self.chosen.task.isin(tasks) & (self.chosen.labelled | (one == "thinking"))
            pairs = [traces.same_cells(cells, one, other) if ok else []
                     for cells, ok in zip(named, allowed, strict=True)]  # fmt: skip
            for weights in ("trained", "untrained"):
                model = self.run.model(random_init=weights == "untrained")
                for half, inside in (("first", first), ("second", ~first)):
                    at = [i for i in np.flatnonzero(inside) if pairs[i]]
                    if not at:
                        continue
                    found = traces.paired(
                        model, [said[i].ids for i in at], [pairs[i] for i in at], maze[at],
                        n_flips if half == "first" else 0, self.cfg.seed,
                    )  # fmt: skip
                    key = f"{name}/{weights}/{half}"
                    out[f"{key}/d"], out[f"{key}/auroc"] = traces.effect(found), traces.auroc(found)
                    out[f"{key}/p"] = traces.flip_p(found)
                    out[f"{key}/n"] = torch.tensor([found.n_samples, found.n_pairs])
        if not any(key.endswith("second/n") for key in out):
            raise BadInput(f"no trace of {self.model.name} names a cell that its answer names too")
        return out

    # Traces put into the model's mouth

    def asked(self) -> list[dict]:
        """Every question under every condition, of those answered rightly with the own trace."""
        right = np.flatnonzero(self.chosen.correct)
        if not len(right):
            raise BadInput("no thinking question was answered rightly: there is nothing to lose")
        shares = QUICK_CUTS if self.cfg.quick else CUTS
        found = []
        for i in right:
            row, record = self.chosen.iloc[i], self.records[i]
            about = {"id": int(row.id), "maze_id": row.maze_id, "task": row.task, "donor": -1}
            versions = [("own trace", row.thought), ("empty", "")]
            versions += [
                (f"cut at {share:.0%}", traces.cut(row.thought, share)) for share in shares
            ]
            turned = traces.falsify(record, row.thought, self.cfg.seed)
            if turned != row.thought:
                versions.append(("end turned", turned))
            found += [about | {"condition": name, "thought": text} for name, text in versions]
            donor = self._donor(i, right)
            if donor is not None:
                given = {"donor": int(self.chosen.id[donor]), "condition": "other maze's trace"}
                found.append(about | given | {"thought": self.chosen.thought[donor]})
        return sorted(found, key=lambda one: len(one["thought"]))  # alike lengths in a batch

    def _donor(self, i: int, right: Sequence[int]) -> int | None:
        """The next question of the task about another maze whose right answer is wrong here."""
        after = [j for j in right if j > i] + [j for j in right if j < i]
        for j in after:
            row = self.chosen.iloc[j]
            alike = row.task == self.chosen.task[i] and row.maze_id != self.chosen.maze_id[i]
            if alike and maze_tasks.reply_fault(self.records[i], row.reply):
                return int(j)
        return None

    def answer(self, some: Sequence[dict]) -> pd.DataFrame:
        """The greedy answer to each trace, and what it is right about."""
        of = dict(zip(self.chosen.id, self.records, strict=True))
        rows = []
        for one in some:
            closed = self.model.encode(traces.thought_text(one["thought"]), bos=False)
            rows.append(maze_prompts.encode(self.model, of[one["id"]]) + closed)
        steps = generate.answers(
            self.model, rows, max_new_tokens=self.cfg.answer_tokens, top_k_shown=1
        )
        found = []
        replies = dict(zip(self.chosen.id, self.chosen.reply, strict=True))
        for one, answer in zip(some, steps, strict=True):
            reply = "".join(step.text for step in answer).strip()
            record, donor = of[one["id"]], of.get(one["donor"])
            found.append(
                {k: one[k] for k in ("id", "maze_id", "task", "condition")}
                | {"reply": reply, "as_before": reply == replies[one["id"]].strip(),
                   "right": not maze_tasks.reply_fault(record, reply),
                   "follows": follows(one["condition"], record, donor, one["thought"], reply)}
            )  # fmt: skip
        return pd.DataFrame(found)
