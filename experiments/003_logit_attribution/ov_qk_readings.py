"""What experiment 003 reads in its heads: what they would say (OV), what they look for (QK)."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from attribution_readings import TOP, Session, spread
from torch import Tensor

from lens_utils import cache, head_reading, pairs
from lens_utils.pairs import Batch, Pair

FACTS = ("capital", "opposite")


class Words:
    """The entity and the answer of every pair, and all that the task has of them, as ids."""

    def __init__(self, chosen: Sequence[Pair], task: Sequence[Pair]) -> None:
        self.entity = torch.tensor([p.clean[_last_entity(p)] for p in chosen])
        self.answer = torch.tensor([p.answer for p in chosen])
        self.entities = torch.tensor(sorted({p.clean[_last_entity(p)] for p in task}))
        self.answers = torch.tensor(sorted({p.answer for p in task}))


class Reader:
    """Heads of the session's model, on its pairs. `tried`: the heads that are read in full."""

    def __init__(self, session: Session, tried: pd.DataFrame) -> None:
        self.model, self.pairs = session.model, session.pairs
        self.cfg, self.run, self.tried = session.cfg, session.run, tried

    @torch.no_grad()
    def ov(self) -> pd.DataFrame:
        """What every head would say if it attended to the entity alone, by task and wording.

        Percentile (1: first) of the answer among the answers of the task, and of the entity among
        its entities. For facts, in their last wording and in layers with heads that are tried,
        also the share of entities of which the answer, or the entity itself (the copying score of
        Wang et al. 2022), is among five of the whole vocabulary. The head reads the entity's
        residual in the prompt (`prompt`), or its effective embedding (`alone`).
        """
        frames, asked = [], self._wordings()
        if self.cfg.quick:  # the last wording of each task
            asked = list({task: ((task, t), some) for (task, t), some in asked}.values())
        for (task, template), members in self.run.track(asked, "OV"):
            chosen = [p for b in pairs.batches(self.model, members, 16) for p in b.pairs]
            words = Words(chosen, [p for p in self.pairs if p.task == task])
            held = self._entity_values(members)
            alone = head_reading.effective_embedding(self.model, words.entity.to(self.model.device))
            groups = np.array([p.group for p in chosen])
            full = set(self.tried.layer[self.tried.task == task])
            if task not in FACTS or template != self._wordings([task])[-1][0][1]:
                full = set()
            for layer in range(self.model.n_layers):
                bare = head_reading.values(self.model, layer, alone)
                for source, values in (("prompt", held[layer]), ("alone", bare)):
                    found = self._said(layer, values, words)
                    if layer in full:
                        found |= self._said_of_all(layer, values, words)
                    place = {"layer": layer, "task": task, "template": template, "source": source}
                    frames.append(_averaged(found, groups).assign(**place))
        table = pd.concat(frames, ignore_index=True)
        return table.merge(self.tried, on=["task", "layer", "head"], how="left").fillna(
            {"role": ""}
        )

    def _said(self, layer: int, values: Tensor, words: Words) -> dict[str, Tensor]:
        """Percentiles [pair, head] of the answer among answers and the entity among entities."""
        both = torch.cat([words.answers, words.entities]).to(values.device)
        said = head_reading.spoken(self.model, layer, values, both).cpu()
        answers, entities = said.split([len(words.answers), len(words.entities)], dim=2)
        return {
            "answer_percentile": _percentile(answers, words.answers, words.answer),
            "entity_percentile": _percentile(entities, words.entities, words.entity),
        }

    def _said_of_all(self, layer: int, values: Tensor, words: Words) -> dict[str, Tensor]:
        """Whether answer and entity are among five of the whole vocabulary, [pair, head]."""
        parts = [
            head_reading.spoken(self.model, layer, v).topk(TOP).indices.cpu()
            for v in values.split(4)
        ]
        top = torch.cat(parts)
        return {
            f"{name}_top5": (top == own[:, None, None]).any(-1).float()
            for name, own in (("answer", words.answer), ("entity", words.entity))
        }

    def _entity_values(self, members: list[Pair]) -> dict[int, Tensor]:
        """hook_v at the entity's last token, by layer: [pair, kv_head, d_head]."""
        names = [f"blocks.{n}.attn.hook_v" for n in range(self.model.n_layers)]
        parts: list[list[Tensor]] = [[] for _ in names]
        for batch in pairs.batches(self.model, members, 16):
            at = _last_entity(batch.pairs[0])
            held = cache.record(self.model, batch.clean, names)
            for part, name in zip(parts, names, strict=True):
                part.append(held[name][:, at])
        return {n: torch.cat(part) for n, part in enumerate(parts)}

    @torch.no_grad()
    def qk(self) -> pd.DataFrame:
        """Whether the last token's query finds entities better than other words in their place.

        AUROC of scores before softmax, per prompt: entities of the task (its own one and others)
        against function words, and against random words; and its own one against the others.
        Keys are of the words in the prompt, or of their effective embeddings. Facts only, in their
        last wording, and entities of one token.
        """
        frames = []
        last = {task: (task, members) for (task, _), members in self._wordings(FACTS)}
        for task, members in self.run.track(list(last.values()), "QK"):
            template = members[0].template
            single = [p for p in members if p.classes.count("entity") == 1]
            parts: dict[str, list[Tensor]] = {}
            groups = []
            for batch in pairs.batches(self.model, single, 8):
                groups += [p.group for p in batch.pairs]
                for name, value in self._found(batch).items():
                    parts.setdefault(name, []).append(value)
            for source in ("prompt", "alone"):
                found = {
                    name.removeprefix(f"{source} "): torch.cat(part).flatten(1)
                    for name, part in parts.items()
                    if name.startswith(source)
                }
                frames.append(
                    _averaged(found, np.array(groups)).assign(
                        task=task, template=template, source=source
                    )
                )
        table = pd.concat(frames, ignore_index=True)
        n_heads = self.model.bridge.cfg.n_heads
        table = table.assign(layer=table["head"] // n_heads, head=table["head"] % n_heads)
        return table.merge(self.tried, on=["task", "layer", "head"], how="left").fillna(
            {"role": ""}
        )

    def _found(self, batch: Batch) -> dict[str, Tensor]:
        """AUROCs of one batch, [pair, layer, head], by source of keys and comparison."""
        model, at = self.model, batch.pairs[0].classes.index("entity")
        layers = range(model.n_layers)
        names = [f"blocks.{n}.attn.hook_q" for n in layers]
        queries = {
            n: q[:, -1] for n, q in enumerate(cache.record(model, batch.clean, names).values())
        }
        words = self._fillers(batch, at)
        filled = torch.cat(list(words.values()), 1).to(model.device)  # pair, word
        size = filled.shape[1]
        ids = batch.clean.repeat_interleave(size, dim=0)
        ids[:, at] = filled.flatten()
        queries = {n: q.repeat_interleave(size, dim=0) for n, q in queries.items()}
        bare = head_reading.effective_embedding(model, ids[:, at])
        given = {n: head_reading.keys(model, n, bare) for n in layers}
        held = {}
        for source, keys in (("prompt", None), ("alone", given)):
            found = head_reading.key_scores(model, ids, queries, at, keys)
            scores = torch.stack([found[n] for n in layers], 1).float().cpu()
            scores = scores.unflatten(0, (-1, size)).movedim(1, -1)  # pair, layer, head, word
            parts = scores.split([w.shape[1] for w in words.values()], dim=-1)
            held |= {f"{source} {kind}": part for kind, part in zip(words, parts, strict=True)}
        out = {}
        for source in ("prompt", "alone"):
            own, other, function, random = (
                held[f"{source} {kind}"] for kind in ("own", "other", "function", "random")
            )
            entities = torch.cat([own, other], -1)
            out[f"{source} over_function"] = _auroc(entities, function)
            out[f"{source} over_random"] = _auroc(entities, random)
            out[f"{source} own_over_others"] = _auroc(own, other)
        return out

    def _fillers(self, batch: Batch, at: int) -> dict[str, Tensor]:
        """Words for the slot, by kind: [pair, word]."""
        rng = np.random.default_rng(self.cfg.seed + int(batch.clean.sum()))
        many = max(1, self.cfg.words // (2 if self.cfg.quick else 1))
        task = batch.pairs[0].task
        entities = {p.clean[_last_entity(p)] for p in self.pairs
                    if p.task == task and p.classes.count("entity") == 1}  # fmt: skip
        kinds = {"own": [], "other": [], "function": [], "random": []}
        for p in batch.pairs:
            kinds["own"].append([p.clean[at]])
            others = sorted(entities - {p.clean[at]})
            pools = {"other": others, "function": self.function_words, "random": self.words}
            for kind, pool in pools.items():
                several = len(pool) < many
                kinds[kind].append(rng.choice(pool, many, replace=several).tolist())
        return {kind: torch.tensor(words) for kind, words in kinds.items()}

    @cached_property
    def function_words(self) -> list[int]:
        """Function words of all prompts, as ids."""
        return sorted(
            {
                token
                for p in self.pairs
                if p.task != "induction"
                for token, name in zip(p.clean, p.classes, strict=True)
                if name == "function" and self.model.decode([token]).strip().isalpha()
            }
        )

    @cached_property
    def words(self) -> list[int]:
        """Whole lower-case words of the vocabulary, as ids."""
        texts = ((i, self.model.decode([i])) for i in range(self.model.bridge.cfg.d_vocab))
        return [i for i, t in texts if t[:1] == " " and t[1:].isalpha() and t.isascii()
                and t.islower() and len(t) > 4]  # fmt: skip

    def _with_roles(self, table: pd.DataFrame) -> pd.DataFrame:
        table = table.merge(self.tried, on=["task", "layer", "head"], how="left")
        return table.fillna({"role": ""})

    def _wordings(
        self, tasks: Sequence[str] | None = None
    ) -> list[tuple[tuple[str, str], list[Pair]]]:
        kinds: dict[tuple[str, str], list[Pair]] = {}
        for p in self.pairs:
            if p.task in tasks if tasks else p.task != "induction":
                kinds.setdefault((p.task, p.template), []).append(p)
        return list(kinds.items())


def _last_entity(p: Pair) -> int:
    return len(p.classes) - 1 - p.classes[::-1].index("entity")


def _percentile(said: Tensor, words: Tensor, own: Tensor) -> Tensor:
    """Where a word stands among the words, per row and head: 1 first, 0 last, 0.5 by chance."""
    at = torch.searchsorted(words, own)[:, None, None].expand(-1, said.shape[1], 1)
    value = said.gather(2, at)
    below = (said < value).sum(-1) + ((said == value).sum(-1) - 1) / 2
    return below / max(1, len(words) - 1)


def _auroc(these: Tensor, those: Tensor) -> Tensor:
    """P(a score of these > one of those), ties half, over the last axis."""
    a, b = these[..., :, None], those[..., None, :]
    return ((a > b).float() + (a == b).float() / 2).mean((-1, -2))


def _averaged(found: dict[str, Tensor], groups: np.ndarray) -> pd.DataFrame:
    """Mean over pairs with a band over groups, one row per head."""
    columns: dict[str, np.ndarray] = {}
    for name, values in found.items():
        mean, low, high, n = spread(values.numpy(), groups)
        columns |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    frame = pd.DataFrame(columns)
    return frame.assign(head=frame.index, n=n)
