"""What experiment 007 measures with the model at hand: divergences without heads."""

from collections.abc import Sequence
from functools import cached_property

import pandas as pd
import torch
from ablation_orders import CONTROL, CONTROLLED, TURNS, Plan, check, due
from torch import Tensor

from lens_utils import divergence, lens
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel

PER_CATEGORY = 2
STEPS, QUICK_STEPS, QUICK_CATEGORIES = 32, 6, 2
POOL = 6  # texts that heads' mean outputs are taken from


def choose(asked: Sequence[dict], tokens: Sequence[Sequence[int]], cfg) -> list[dict]:
    """The texts of this run: of each category one for single heads, the next ones for the orders.

    A text is the prompt and what the model wrote, without the last token, which decides nothing.
    Raises BadInput when 005 has too few prompts or steps.
    """
    have = len(tokens[0])
    steps = cfg.steps or min(have, QUICK_STEPS if cfg.quick else STEPS)
    if not 0 < steps <= have:
        raise BadInput(f"--steps {cfg.steps}: 005 wrote {have} tokens to each prompt")
    wanted = cfg.per_category or (1 if cfg.quick else PER_CATEGORY)
    families = list(dict.fromkeys(prompt["family"] for prompt in asked))
    single, orders = [], []
    for family in families[: QUICK_CATEGORIES if cfg.quick else None]:
        members = [i for i, prompt in enumerate(asked) if prompt["family"] == family]
        if not 0 < wanted < len(members):
            raise BadInput(f"--per-category {wanted}: 005 has {len(members)} prompts of {family}, "
                           "and one is kept for single heads")  # fmt: skip
        for i in members[: wanted + 1]:
            ids = [*asked[i]["ids"], *tokens[i][: steps - 1]]
            text = {"id": asked[i]["id"], "family": family, "steps": steps, "ids": ids}
            (orders if i != members[0] else single).append(text)
    return [
        *({**text, "use": "single", "turn": -1} for text in single[: 1 if cfg.quick else None]),
        *({**text, "use": "orders", "turn": turn} for turn, text in enumerate(orders)),
    ]


class Session:
    """The model, the texts, and the scores that are to be of this model."""

    def __init__(self, cfg, run: Run, texts: list[dict], scores: pd.DataFrame) -> None:
        self.cfg, self.run, self.texts, self.scores = cfg, run, texts, scores
        self.turns = min(TURNS, sum(text["use"] == "orders" for text in texts))
        self.held: dict[str, Tensor] = {}  # heads' outputs of texts, by id

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def readout(self) -> lens.Readout:
        return lens.Readout(self.model.bridge)

    @property
    def shape(self) -> tuple[int, int]:
        return self.model.n_layers, self.model.bridge.cfg.n_heads

    def single(self, texts: Sequence[dict]) -> pd.DataFrame:
        """Mean divergence over a text without each head alone: one row per head."""
        n_layers, n_heads = self.shape
        check(self.scores, n_layers, n_heads)
        every = torch.eye(n_layers * n_heads, dtype=torch.bool).unflatten(1, self.shape)
        rows = pd.MultiIndex.from_product([range(n_layers), range(n_heads)])
        frame = rows.to_frame(index=False, name=["layer", "head"])
        kl = self._kl(texts[0], every, self.cfg.ablation)
        about = {key: texts[0][key] for key in ("id", "family")}
        return frame.assign(**about, kl=kl)

    def along(self, text: dict, orders: list[dict], plan: Plan) -> pd.DataFrame:
        """Mean divergence over a text at every point of every order that is run on it.

        No head gone and all heads gone are measured like the others. The other ablations are
        measured at one share of a few orders.
        """
        size = self.shape[0] * self.shape[1]
        mine = due(orders, text["turn"], self.turns)
        frames = []
        others = ["zero", "mean"] if self.cfg.quick else ["zero", "mean", "resample"]
        for ablation in dict.fromkeys([self.cfg.ablation, *others]):
            rows = [{"order": "none", "kind": "none", "heads": 0, "share": 0.0},
                    {"order": "all", "kind": "all", "heads": size, "share": 1.0}]  # fmt: skip
            sets = [torch.tensor([False, True])[:, None, None].expand(2, *self.shape)]
            for order in mine:
                counts = plan.counts(size, scored=order["turn"] is None)
                if ablation != self.cfg.ablation:
                    if order["kind"] not in CONTROLLED:
                        continue
                    counts = [(divergence.count(CONTROL, size), CONTROL)]
                about = {key: order[key] for key in ("order", "kind")}
                rows += [about | {"heads": k, "share": share} for k, share in counts]
                sets.append(divergence.sets(order["heads"], [k for k, _ in counts], *self.shape))
            kl = self._kl(text, torch.cat(sets), ablation)
            frames.append(pd.DataFrame(rows).assign(ablation=ablation, kl=kl))
        found = pd.concat(frames, ignore_index=True)
        return found.assign(id=text["id"], family=text["family"])

    def _kl(self, text: dict, sets: Tensor, ablation: str) -> list[float]:
        """Mean over the steps, for every set."""
        ids = torch.tensor(text["ids"], device=self.model.device)
        against = divergence.full(self.model, self.readout, ids, text["steps"])
        others = [] if ablation == "zero" else self._others(text)
        values = divergence.replacement(ablation, others, len(ids), text["steps"])
        found = divergence.divergence(self.model, self.readout, against, sets, values)
        return found.double().mean(1).tolist()

    def _others(self, text: dict) -> list[Tensor]:
        """Heads' outputs on the next texts behind this one, of other categories first."""
        at = next(n for n, t in enumerate(self.texts) if t["id"] == text["id"])
        behind = [*self.texts[at + 1 :], *self.texts[:at]]
        behind.sort(key=lambda t: t["family"] == text["family"])  # stable
        for t in behind[:POOL]:
            if t["id"] not in self.held:
                ids = torch.tensor(t["ids"], device=self.model.device)
                self.held[t["id"]] = divergence.outputs(self.model, ids)
        return [self.held[t["id"]] for t in behind[:POOL]]
