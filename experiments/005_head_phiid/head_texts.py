"""What experiment 005 measures with models at hand: texts of one length, and their head norms.

Conditions, each on the same prompts:

    own         the model goes on with the prompts, in the template that was asked for
    shuffled    the words of each prompt in another order
    sampled     tokens drawn at temperature 0.7 (where `own` is greedy)
    chat, text  the other template, for a model that has one
    untrained   a model of the same shape that has learned nothing goes on with the prompts
    replayed    that model reads the tokens that `own` wrote
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from lens_utils import generate, series, weights
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel, load_model
from lens_utils.prompts import Prompt, shuffled
from lens_utils.registry import resolve

SAMPLED = 0.7
QUICK = {"per_category": 2, "steps": 24}


def choose(prompts: list[Prompt], cfg) -> list[Prompt]:
    """The prompts of this run: all, or the first of each category."""
    most = cfg.per_category or (QUICK["per_category"] if cfg.quick else None)
    families = dict.fromkeys(p.family for p in prompts)
    return [p for f in families for p in [p for p in prompts if p.family == f][:most]]


def n_steps(cfg) -> int:
    """Steps of every series. Raises BadInput when they are too few for tau."""
    steps = cfg.steps or (QUICK["steps"] if cfg.quick else 100)
    if cfg.tau < 1:
        raise BadInput(f"--tau {cfg.tau}: at least 1")
    if steps < cfg.tau + 5:
        raise BadInput(f"--steps {steps} is too short for --tau {cfg.tau}: at least {cfg.tau + 5}")
    return steps


class Session:
    """The models, loaded when the first missing stage needs them."""

    def __init__(self, cfg, run: Run, prompts: list[Prompt]) -> None:
        self.cfg, self.run, self.prompts, self.steps = cfg, run, prompts, n_steps(cfg)

    def conditions(self) -> list[str]:
        """Those of this run; a quick one leaves out the repetitions of `own`."""
        found = ["own", "shuffled"]
        if not self.cfg.quick:
            found += ["sampled"] if self.cfg.temperature == 0 else []
            found += [self._other()] if self.run.model().has_chat else []
        return [*found, "untrained", "replayed"]

    def _other(self) -> str:
        return "text" if self.cfg.template == "chat" else "chat"

    def rows(self, model: LoadedModel, condition: str) -> list[list[int]]:
        """Token ids of the prompts under a condition."""
        template = condition if condition in ("chat", "text") else self.cfg.template
        texts = [p.text for p in self.prompts]
        if condition == "shuffled":
            texts = [shuffled(text, self.cfg.seed) for text in texts]
        if template == "chat":
            rows = [model.encode_chat([{"role": "user", "content": text}]) for text in texts]
        else:
            rows = [model.encode(text) for text in texts]
        if (longest := max(map(len, rows)) + self.steps) > model.n_ctx:
            raise BadInput(f"the longest prompt and --steps {self.steps} take {longest} tokens, "
                           f"more than the context of {model.name}, {model.n_ctx}")  # fmt: skip
        return rows

    def asked(self) -> list[dict]:
        """The prompts as the model reads them: what 007 goes on from."""
        rows = self.rows(self.run.model(), "own")
        return [
            {"id": p.id, "family": p.family, "text": p.text, "ids": row}
            for p, row in zip(self.prompts, rows, strict=True)
        ]

    @property
    def nodes(self) -> pd.DataFrame:
        """layer and head of every series."""
        find = series.heads if self.cfg.nodes == "heads" else series.experts
        return find(self.run.model())

    def measure(self, condition: str, at: Sequence[int], own: Tensor | None = None) -> dict:
        """tokens [prompt, step] and norms [prompt, head, step] of some of the prompts."""
        model = self.run.model(random_init=condition in ("untrained", "replayed"))
        rows = [self.rows(model, condition)[i] for i in at]
        if condition == "replayed":
            assert own is not None
            tokens = own[list(at)]
        else:
            heat = SAMPLED if condition == "sampled" else self.cfg.temperature
            seed = self.cfg.seed + at[0]  # another one for each batch
            tokens = generate.continuations(model, rows, self.steps, temperature=heat, seed=seed)
        return {"tokens": tokens, "norms": self._norms(model, rows, tokens)}

    def _norms(self, model: LoadedModel, rows: list[list[int]], tokens: Tensor) -> Tensor:
        whole = [[*row, *text[:-1]] for row, text in zip(rows, tokens.tolist(), strict=True)]
        measure = series.head_norms if self.cfg.nodes == "heads" else series.expert_norms
        return measure(model, whole, self.steps)

    # Training checkpoints

    def checkpoint_names(self) -> list[str]:
        """Models of --checkpoints: revisions of the run's model, or folders."""
        names = [entry.strip() for entry in self.cfg.checkpoints.split(",") if entry.strip()]
        return [n if "/" in n or "@" in n else f"{self.cfg.model}@{n}" for n in names]

    def checkpoints(self) -> list[dict]:
        """Which weights they are. Raises BadInput naming all that are not on this machine."""
        found, missing = [], []
        for name in self.checkpoint_names():
            spec = resolve(name)
            try:
                found.append({"checkpoint": name} | weights.identity(spec, weights.locate(spec)))
            except BadInput:
                missing.append(name)
        if missing:
            raise BadInput(f"{len(missing)} checkpoints are not on this machine: where there is "
                           f"internet, run ./lab fetch {' '.join(missing)}")  # fmt: skip
        return found

    def at_checkpoint(self, name: str, own: Tensor) -> dict[str, Tensor]:
        """Its norms [prompt, head, step], of text it writes and of the run's model's text."""
        model = load_model(name, self.cfg.device, self.cfg.dtype)
        rows = self.rows(model, "own")
        written = generate.continuations(
            model, rows, self.steps, temperature=self.cfg.temperature, seed=self.cfg.seed
        )
        found = {
            how: self._norms(model, rows, tokens)
            for how, tokens in (("written", written), ("replayed", own))
        }
        if found["written"].shape[1] != len(self.nodes):
            raise BadInput(f"checkpoint {name} has {found['written'].shape[1]} {self.cfg.nodes}, "
                           f"{self.cfg.model} has {len(self.nodes)}")  # fmt: skip
        return found


def describe(
    prompts: Sequence[Prompt], measured: dict[str, dict[str, Tensor]], model: LoadedModel
) -> pd.DataFrame:
    """One row per prompt and condition: its text, whether it goes in circles, whether it is right.

    right: a gold answer occurs in the text; NaN where there is none to look for.
    """
    frames = []
    for condition, found in measured.items():
        if condition == "replayed":
            continue
        texts = [model.decode(ids) for ids in found["tokens"].tolist()]
        about = {
            "id": [p.id for p in prompts],
            "family": [p.family for p in prompts],
            "condition": condition,
            "right": [right(p, t) for p, t in zip(prompts, texts, strict=True)],
        }
        frame = pd.concat([pd.DataFrame(about), series.loops(found["tokens"].numpy())], axis=1)
        frames.append(frame.assign(text=[repr(text)[1:-1] for text in texts]))
    return pd.concat(frames, ignore_index=True)


def right(prompt: Prompt, text: str) -> float:
    """1 where one of the gold answers (apart by |) occurs as it is, from a word's beginning on."""
    if not prompt.answer or prompt.family == "speech":  # a list of tags can be put in many ways
        return np.nan
    golds = "|".join(map(re.escape, prompt.answer.split("|")))
    end = r"(?!\w)" if prompt.family == "number" else ""
    return float(bool(re.search(rf"(?<!\w)(?:{golds}){end}", text, re.I)))
