"""What experiment 011 measures with the model at hand."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from domain_samples import Contrast, contrasts, draws, halves, tokens

from lens_utils import dape, maze_prompts, maze_records, neuron_sets
from lens_utils.dape import Tally
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel

SHUFFLES, QUICK_SHUFFLES = 499, 99
RESAMPLES, QUICK_RESAMPLES = 100, 20
ROOM = 2**33  # bytes for the counts of all draws
SETS, QUICK_SETS = 20, 4  # random sets for every chosen one
TESTED, QUICK_TESTED = 32, 5  # mazes of the second half
LARGEST = 48  # neurons of a set
VARIED, QUICK_VARIED = 800, 64  # questions of the other definitions
VARIANTS = ("product", "attribution")


class Session:
    """The model, the questions with their replies, and everything that is compared."""

    def __init__(self, cfg, run: Run, records: list[dict], chosen: pd.DataFrame, passes) -> None:
        self.cfg, self.run, self.chosen, self.passes = cfg, run, chosen, passes
        self.records = {r["id"]: r for r in records}

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def _said(self) -> tuple[list[list[int]], dict[str, list[dape.Span]]]:
        return tokens(self.model, self.records, self.chosen)

    @cached_property
    def contrasts(self) -> list[Contrast]:
        resamples = QUICK_RESAMPLES if self.cfg.quick else RESAMPLES
        one = contrasts(self.chosen, self.passes, self.cfg, 1, resamples)
        per_draw = sum(len(c.domains) for c in one) * self.model.n_layers
        fit = ROOM // (4 * per_draw * self.model.bridge.cfg.d_mlp)
        wanted = self.cfg.permutations or (QUICK_SHUFFLES if self.cfg.quick else SHUFFLES)
        return contrasts(self.chosen, self.passes, self.cfg, max(19, min(wanted, fit)), resamples)

    def counts(self) -> dict[str, torch.Tensor]:
        """Counts and tokens of every draw of every contrast, in one pass: primary definition."""
        rows, spans = self._said
        found = dape.tally(
            self.model, rows, spans, draws(self.contrasts, self.chosen, self.cfg.seed)
        )
        out = {}
        for contrast in self.contrasts:
            held = found[contrast.name]
            out[f"{contrast.name}/counts"], out[f"{contrast.name}/tokens"] = (
                held.counts,
                held.tokens,
            )
        return out

    def variants(self) -> dict[str, torch.Tensor]:
        """Rates under the other definitions of active, of the first contrast. [domain, layer, ...]

        On the first so many questions; attribution, which needs gradients, on direct ones.
        """
        rows, spans = self._said
        first = self.contrasts[0]
        out = {}
        for score in VARIANTS:
            inside = first.label >= 0
            if score == "attribution" and "direct" in self.passes:
                inside = inside & (self.chosen["mode"] == "direct").to_numpy()
            taken = np.flatnonzero(inside)[: QUICK_VARIED if self.cfg.quick else VARIED]
            some = [rows[i] for i in taken]
            of = {name: [held[i] for i in taken] for name, held in spans.items()}
            above = dape.thresholds(self.model, some, of["task"], self.cfg.activation_threshold,
                                    score, of["answer"])  # fmt: skip
            maze = self.chosen.maze_id.to_numpy(str)[taken]
            drawn = dape.draws(first.label[taken], first.group[taken], maze, "task")
            held = dape.tally(self.model, some, of, {"": drawn}, score, above, of["answer"])[""]
            out[score] = dape.rates(held.counts[0], held.tokens[0])
        return out

    def rates(self, counts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """Rates of a contrast of one domain. [layer, neuron]"""
        held = tallied(counts, name)
        return dape.rates(held.counts[0], held.tokens[0])[0]

    # The causal check

    def sets(self, select: torch.Tensor, rate: torch.Tensor) -> list[dict]:
        """The chosen set of every ability, and random ones that are matched with it.

        select: [ability, layer, neuron], chosen on the first half of the mazes. rate: mean over
        the domains, there.
        """
        barred, n = select.any(0), QUICK_SETS if self.cfg.quick else SETS
        found: list[dict] = [{"set": "none", "random": -1, "neurons": []}]
        for number, ability in enumerate(next(iter(self.passes.values()))):
            if not select[number].any():
                continue
            try:
                drawn = neuron_sets.matched(select[number], rate, barred, n, self.cfg.seed)
            except BadInput:  # more than half of a layer: nothing to compare with
                continue
            for random, gone in [(-1, select[number]), *enumerate(drawn)]:
                places = [[layer, k] for layer, k in gone.nonzero().tolist()]
                found.append({"set": ability, "random": random, "neurons": places})
        return found

    @cached_property
    def _tested(self) -> tuple[pd.DataFrame, np.ndarray, neuron_sets.Asked]:
        """Direct questions of the second half with a right answer: about them, its tokens."""
        direct = self.chosen[(self.chosen["mode"] == "direct") & ~halves(self.chosen)]
        mazes = direct.maze_id.drop_duplicates().head(QUICK_TESTED if self.cfg.quick else TESTED)
        direct = direct[direct.maze_id.isin(mazes)]
        # One question of each task and kind is enough: mazes are what is resampled.
        direct = direct.groupby(["maze_id", "task", "negative_kind"], sort=False).head(1)
        rows, answers, begin = [], [], []
        _, spans = self._said
        for at, row in direct.iterrows():
            record = maze_records.from_dict(self.records[row.id])
            asked = maze_prompts.encode(self.model, record)
            right, start = maze_prompts.gold_ids(self.model, record)
            rows.append(asked + right)
            answers.append((len(asked) + start, len(rows[-1])))
            begin.append(spans["task"][at][0])
        length = np.array([end - start for start, end in answers])
        about = direct[["id", "maze_id", "task"]].reset_index(drop=True)
        return about, length, neuron_sets.Asked(self.model, rows, answers, begin)

    @cached_property
    def _means(self) -> torch.Tensor:
        """Neurons' mean values behind the maze, on the first half of the mazes."""
        rows, spans = self._said
        inside = np.flatnonzero(
            (halves(self.chosen) & (self.chosen["mode"] == "direct")).to_numpy()
        )
        inside = inside[: 48 if self.cfg.quick else 400]
        return neuron_sets.means(
            self.model, [rows[i] for i in inside], [spans["task"][i] for i in inside]
        )

    def without(self, some: Sequence[dict]) -> pd.DataFrame:
        """Log-probability of the right answer per token (nats) without a set, of every question.

        A set without neurons is the model as it is.
        """
        frames = []
        about, length, asked = self._tested
        for one in some:
            gone = torch.zeros(self.model.n_layers, self.model.bridge.cfg.d_mlp, dtype=torch.bool)
            for layer, neuron in one["neurons"]:
                gone[layer, neuron] = True
            for ablation in ("mean", "zero"):
                values = self._means if ablation == "mean" else None
                logp = asked.logp(gone, values)
                frames.append(about.assign(set=one["set"], random=one["random"], ablation=ablation,
                                           logp=logp.numpy() / length))  # fmt: skip
        return pd.concat(frames, ignore_index=True)


def tallied(counts: dict[str, torch.Tensor], name: str) -> Tally:
    """A contrast's counts as they were kept."""
    return Tally(counts[f"{name}/counts"], counts[f"{name}/tokens"])
