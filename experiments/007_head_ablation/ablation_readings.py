"""What experiment 007 measures with the model at hand: divergences without heads."""

from collections.abc import Sequence
from functools import cached_property

import pandas as pd
import torch
from ablation_orders import CONTROL, CONTROLLED, TURNS, Plan
from torch import Tensor

from lens_utils import divergence, lens
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel

PER_CATEGORY = 2
QUICK_STEPS, QUICK_CATEGORIES = 12, 2
POOL = 6  # texts that heads' mean outputs are taken from


def choose(asked: Sequence[dict], tokens: Sequence[Sequence[int]], cfg) -> list[dict]:
    """The texts of this run: of each category one for single heads, the next ones for the orders.

    A text is the prompt and what the model wrote, without the last token, which decides nothing.
    Raises BadInput when 005 has too few prompts or steps.
    """
    steps = cfg.steps or (QUICK_STEPS if cfg.quick else len(tokens[0]))
    if not 0 < steps <= len(tokens[0]):
        raise BadInput(f"--steps {cfg.steps}: 005 wrote {len(tokens[0])} tokens to each prompt")
    wanted = cfg.per_category or (1 if cfg.quick else PER_CATEGORY)
    texts = []
    for family in dict.fromkeys(prompt["family"] for prompt in asked):
        members = [i for i, prompt in enumerate(asked) if prompt["family"] == family]
        if len(members) <= wanted:
            raise BadInput(f"--per-category {wanted} needs one prompt more of each; 005 has "
                           f"{len(members)} of {family}")  # fmt: skip
        for n, i in enumerate(members[: wanted + 1]):
            whole = [*asked[i]["ids"], *tokens[i][: steps - 1]]
            use = "orders" if n else "single"
            texts.append({"id": asked[i]["id"], "family": family, "use": use, "steps": steps,
                          "ids": whole})  # fmt: skip
    if cfg.quick:
        few = [t["family"] for t in texts if t["use"] == "single"][:QUICK_CATEGORIES]
        texts = [t for t in texts if t["family"] in few and (t["use"] == "orders" or t is texts[0])]
    turns = {t["id"]: n % TURNS for n, t in enumerate(t for t in texts if t["use"] == "orders")}
    return [t | {"turn": turns.get(t["id"])} for t in texts]


class Session:
    """The model and the texts."""

    def __init__(self, cfg, run: Run, texts: list[dict]) -> None:
        self.cfg, self.run, self.texts = cfg, run, texts
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
        every = torch.eye(n_layers * n_heads, dtype=torch.bool).unflatten(1, self.shape)
        rows = pd.MultiIndex.from_product([range(n_layers), range(n_heads)])
        frame = rows.to_frame(index=False, name=["layer", "head"])
        kl = self._kl(texts[0], every, self.cfg.ablation)
        about = {key: texts[0][key] for key in ("id", "family")}
        return frame.assign(**about, kl=kl)

    def along(self, text: dict, orders: list[dict], plan: Plan) -> pd.DataFrame:
        """Mean divergence over a text at every point of every order that is run on it.

        One row without any head gone is measured like the others. The other ablations are measured
        at one share of a few orders.
        """
        size = self.shape[0] * self.shape[1]
        mine = [o for o in orders if o["turn"] in (None, text["turn"])]
        frames = []
        for ablation in dict.fromkeys([self.cfg.ablation, "zero", "mean", "resample"]):
            rows = [{"order": "none", "kind": "none", "heads": 0, "share": 0.0}]
            sets = [torch.zeros(1, *self.shape, dtype=torch.bool)]
            for order in mine:
                counts = plan.counts(size, ordered=order["turn"] is None)
                if ablation != self.cfg.ablation:
                    control = {divergence.count(CONTROL, size): CONTROL}
                    counts = control if order["kind"] in CONTROLLED else {}
                about = {key: order[key] for key in ("order", "kind")}
                rows += [about | {"heads": k, "share": share} for k, share in counts.items()]
                sets.append(divergence.sets(order["heads"], list(counts), *self.shape))
            kl = self._kl(text, torch.cat(sets), ablation)
            frames.append(pd.DataFrame(rows).assign(ablation=ablation, kl=kl))
        found = pd.concat(frames, ignore_index=True)
        return found.assign(**{key: text[key] for key in ("id", "family", "turn")})

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
