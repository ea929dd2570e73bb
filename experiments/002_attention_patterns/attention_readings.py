"""What experiment 002 measures with the model at hand: patterns and what they move."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad

from lens_utils import attention, pairs, prompts, stats
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.pairs import Pair

HERE = str(Path(__file__))
SOURCES = ("clean", "corrupt", "random", "untrained")
QUICK = 3  # pairs of each wording in a quick run


class Session:
    """The model and its pairs, loaded when the first missing stage needs them."""

    def __init__(self, cfg, run: Run) -> None:
        self.cfg, self.run = cfg, run

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def made(self) -> tuple[list[Pair], dict[str, str]]:
        """Every pair of this model, and why prompts were left out."""
        made, reasons = pairs.pairs(self.model, prompts.load(HERE))
        return made + pairs.induction(self.model, self.cfg.induction, seed=self.cfg.seed), reasons

    # 1. The pairs

    def screen(self) -> pd.DataFrame:
        """One row per pair: logit differences, probability and rank of the answer, `known`.

        In a quick run of twice as many pairs of each wording as are wanted.
        """
        kinds = [(p.task, p.template) for p in self.made[0]]
        most = 2 * QUICK if self.cfg.quick else len(kinds)
        asked = [p for n, p in enumerate(self.made[0]) if kinds[:n].count(kinds[n]) < most]
        return pairs.screen(self.model, asked)

    def left_out(self) -> dict[str, str]:
        """Prompts this model could not be asked, with the reason."""
        return self.made[1]

    def used(self, screened: pd.DataFrame) -> list[Pair]:
        """The pairs whose answers the model knows; in a quick run the first of each wording."""
        known = screened[screened.known]
        if self.cfg.quick:
            known = known.groupby(["task", "template"], sort=False).head(QUICK)
        return [p for p in self.made[0] if p.id in set(known.id)]

    def tokens(self, used: Sequence[Pair]) -> pd.DataFrame:
        """One row per token of every clean prompt, with its class."""
        rows = []
        for p in used:
            about = {k: getattr(p, k) for k in ("id", "task", "template", "group")}
            about["answer"] = self.model.decode([p.answer])
            for pos, (token, kind) in enumerate(zip(p.clean, p.classes, strict=True)):
                text = self.model.decode([token])
                rows.append({**about, "pos": pos, "token": text, "kind": kind})
        return pd.DataFrame(rows)

    # 2. Attention of the last query

    def reader(self, source: str, used: Sequence[Pair]) -> Callable[[Sequence[Pair]], dict]:
        """What `run.chunks` calls for one of SOURCES, some pairs at a time."""
        width = max(len(p.clean) for p in used)
        order = {p.id: n for n, p in enumerate(self.made[0])}
        return partial(self._read, source, width, order)

    def _read(
        self, source: str, width: int, order: dict[str, int], part: Sequence[Pair]
    ) -> dict[str, Tensor]:
        """`last_query` of some pairs, in their order."""
        model = self.run.model(random_init=True) if source == "untrained" else self.model
        found: dict[str, dict[str, Tensor]] = {}
        for group in pairs.batches(model, part, len(part)):
            ids = group.corrupt if source == "corrupt" else group.clean
            if source == "random":
                rows = [self._random(p, order[p.id]) for p in group.pairs]
                ids = torch.stack(rows).to(model.device)
            read = last_query(model, ids, attention.masks(group.pairs[0].classes), width)
            for row, p in enumerate(group.pairs):
                found[p.id] = {name: values[row] for name, values in read.items()}
        return {name: torch.stack([found[p.id][name] for p in part]) for name in found[part[0].id]}

    def _random(self, p: Pair, order: int) -> Tensor:
        """Random tokens in the places of a prompt, behind its BOS."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.cfg.seed + 1) + order)
        size, n_bos = self.model.bridge.cfg.d_vocab, p.classes.count("bos")
        drawn = torch.randperm(size - size // 8, generator=generator) + size // 8
        return torch.cat([torch.tensor(p.clean[:n_bos]), drawn[: len(p.clean) - n_bos]])

    # 3. Head types

    @torch.no_grad()
    def head_types(self) -> pd.DataFrame:
        """Scores of every head on repeated random tokens, and of the untrained twin's heads."""
        n = self.cfg.repeats // (8 if self.cfg.quick else 1)
        frames = []
        for name, model in (("trained", self.model), ("untrained", self.run.model(True))):
            ids = attention.repeated(model, n, self.cfg.length, self.cfg.seed)
            parts = [attention.record(model, rows, range(model.n_layers)) for rows in ids.split(8)]
            for layer in range(model.n_layers):
                pattern = torch.cat([part[layer].pattern for part in parts])
                for kind, scores in attention.head_types(pattern, self.cfg.length).items():
                    mean, low, high = stats.bands(scores.cpu().double().numpy(), self.cfg.seed)
                    frames.append(
                        pd.DataFrame({"model": name, "layer": layer, "head": range(len(mean)),
                                      "type": kind, "mean": mean, "low": low, "high": high,
                                      "n": n})
                    )  # fmt: skip
        return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def last_query(model: LoadedModel, ids: Tensor, masks: Tensor, width: int) -> dict[str, Tensor]:
    """What the last query of each prompt reads; positions are filled up with zeros to `width`.

    attention [prompt, layer, head, pos], normed (|| a v W_O ||) of the same shape;
    entropy (bits) and evenness [prompt, layer, head];
    entity [prompt, layer, query]: attention to the entity from every query, mean over heads.
    """
    entity, rest = attention.CLASSES.index("entity"), (0, width - ids.shape[1])
    layers = []
    for layer, heads in attention.record(model, ids, range(model.n_layers)).items():
        normed = attention.norm_weighted(
            heads.pattern, heads.v, model.bridge.blocks[layer].attn.W_O
        )
        seen = attention.visible(ids.shape[1], attention.window(model, layer))
        to_entity = attention.mass(heads.pattern, masks)[..., entity]
        layers.append(
            {
                "attention": pad(heads.pattern[:, :, -1], rest),
                "normed": pad(normed[:, :, -1], rest),
                "entropy": attention.entropy_bits(heads.pattern)[:, :, -1],
                "evenness": attention.evenness(heads.pattern, seen)[:, :, -1],
                "entity": pad(to_entity.mean(1), rest),
            }
        )
    return {key: torch.stack([one[key].cpu() for one in layers], dim=1) for key in layers[0]}
