"""What experiment 012 measures with the model at hand: scores of given texts under ablation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from lens_utils import generate, maze_prompts
from lens_utils import layer_ablation as ablate
from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.layer_ablation import Ablation, Texts
from lens_utils.lens import Readout
from lens_utils.maze_records import from_dict
from lens_utils.maze_tasks import ABILITIES, reply_fault
from lens_utils.models import LoadedModel

MAZES, QUICK_MAZES = 24, 4
QUICK_GREEDY = 1
RATIOS, QUICK_RATIOS = "0,0.25,0.5,0.75,1", "0,0.5,1"
TOKENS = 6144  # of one forward pass, padding included
ABOUT = ("id", "maze_id", "half", "task", "mode")
PER_MAZE = {"solve": 1, "generate": 1, "recognize": 2, "recall": 1}  # one valid path, one not


def passing(gate: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Abilities and modes past the gate of 010."""
    for ability in ABILITIES:
        for mode, cell in gate.get(ability, {}).items():
            if cell["passes"]:
                yield ability, mode


class Session:
    """The model, the plan of ablations, and what replaces a contribution."""

    def __init__(self, cfg, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self.ratios = _ratios(cfg.ablation_ratios or (QUICK_RATIOS if cfg.quick else RATIOS))
        self.seeds = 1 if cfg.quick else cfg.mask_seeds
        if self.seeds < 1 or cfg.random_sets < 2:
            raise BadInput("--mask-seeds needs 1 or more, --random-sets 2 or more")
        self._means: ablate.Means | None = None

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def readout(self) -> Readout:
        return Readout(self.model.bridge)

    @property
    def n_layers(self) -> int:
        return self.model.n_layers

    @property
    def shape(self) -> tuple[int, int]:
        return self.model.n_layers, self.model.bridge.cfg.n_heads

    @cached_property
    def layers(self) -> list[int]:
        """The layers to ablate. Raises BadInput for what is no layer of the model."""
        if not self.cfg.key_layers:
            return list(range(self.n_layers))
        parts = [part.strip() for part in self.cfg.key_layers.split(",")]
        if not all(part.isdecimal() and int(part) < self.n_layers for part in parts):
            raise BadInput(f"--key-layers {self.cfg.key_layers}: numbers from 0 to "
                           f"{self.n_layers - 1}, such as 1,2")  # fmt: skip
        return sorted({int(part) for part in parts})

    # Questions

    def ask(self, held: list[dict], replies: pd.DataFrame, gate: dict[str, Any]) -> dict[str, list]:
        """Questions past the gate as token ids, and how many were left out and why.

        Scored is the right answer where there is only one and the model does not think first; else
        what the model itself wrote, where that was right: a trace cannot be wrong, and a drawn
        maze is one of many. Raises BadInput when one half has no mazes.
        """
        wanted = self.cfg.max_samples or (QUICK_MAZES if self.cfg.quick else MAZES)
        asked_about = {(task, mode) for task, mode in passing(gate)}
        if not self.cfg.quick:  # a control
            asked_about |= {("recall", m) for m, c in gate.get("recall", {}).items() if c["passes"]}
        mazes: dict[str, list[str]] = {"train": [], "test": []}
        for h in held:
            if h["maze_id"] not in mazes[h["split"]]:
                mazes[h["split"]].append(h["maze_id"])
        chosen = {m: half for split, half in (("train", "choose"), ("test", "test"))
                  for m in mazes[split][: max(2, wanted // 2)]}  # fmt: skip
        if {*chosen.values()} != {"choose", "test"}:
            raise BadInput("layers are chosen on mazes of one side of the split and tested on the "
                           "other: 010 has mazes of one side only")  # fmt: skip
        # Texts with a trace are longer: where there are direct ones too, every other maze.
        both = any(mode == "direct" for _, mode in asked_about)
        halves = [[m for m in chosen if chosen[m] == half] for half in ("choose", "test")]
        traced = {m for half in halves for m in half[:: 2 if both else 1]}
        by_id = replies.set_index("id")
        found, taken, out = [], {}, {"wrong": 0, "too long": 0}
        for h in held:
            mode = "thinking" if h["enable_thinking"] else "direct"
            key = (h["maze_id"], h["task"], mode)
            if h["maze_id"] not in chosen or key[1:] not in asked_about:
                continue
            if h["id"] not in by_id.index or h["negative_kind"] == "lexical":
                continue
            if h["enable_thinking"] and h["maze_id"] not in traced:
                continue
            if taken.get(key, 0) == PER_MAZE[h["task"]]:
                continue
            taken[key] = taken.get(key, 0) + 1
            prompt, target, start = self._text(h, by_id.loc[h["id"]])
            if not target:
                out["wrong"] += 1
            elif len(prompt) + len(target) > self.cfg.longest:
                out["too long"] += 1
            else:
                about = {"id": h["id"], "maze_id": h["maze_id"], "half": chosen[h["maze_id"]],
                         "task": h["task"], "mode": mode}  # fmt: skip
                found.append(about | {"prompt": prompt, "target": target, "start": start})
        # Texts of like length in a row: little padding.
        found.sort(key=lambda q: (q["mode"], len(q["prompt"]) + len(q["target"])))
        return {"questions": _with_donors(found), "left_out": [out]}

    def _text(self, h: dict, reply: pd.Series) -> tuple[list[int], list[int], int]:
        record = from_dict(h)
        prompt = maze_prompts.encode(self.model, record)
        if h["task"] != "generate" and not record.thinking:
            return prompt, *maze_prompts.gold_ids(self.model, record)
        if not reply["correct"]:
            return prompt, [], 0
        own = dataclasses.replace(record, answer=str(reply["reply"]))
        thought = [str(reply["thought"])] if record.thinking else None
        return prompt, *maze_prompts.gold_ids(self.model, own, thought)

    @staticmethod
    def direct(questions: Sequence[dict]) -> list[dict]:
        """Those without thinking; all, for a model that is past the gate with thinking only."""
        return [q for q in questions if q["mode"] == "direct"] or list(questions)

    def few(self, testing: Sequence[dict]) -> list[dict]:
        """Questions whose answers are also written."""
        n = QUICK_GREEDY if self.cfg.quick else self.cfg.greedy_mazes
        mazes = sorted({q["maze_id"] for q in testing})[:n]
        modes = ("direct",) if self.cfg.quick else ("direct", "thinking")
        return [q for q in testing if q["maze_id"] in mazes and q["mode"] in modes]

    # Ablations

    def plan(self, whole: bool, mode: str) -> list[Ablation]:
        """Every ablation; the first one is none. All layers, unless --key-layers names some.

        whole: with the other kinds of ablation, the parts, and the first plan's method.
        """
        roles = [r for r in ablate.ROLES if r != "thinking" or mode == "thinking"]
        found = [Ablation(self.layers[0], ratio=0.0)]
        for layer in self.layers:
            found += self._shares(self.ratios, layer)
            found += [Ablation(layer, where=role) for role in roles]
            if whole:
                found += [Ablation(layer, kind=kind) for kind in ("zero", "resample")]
                found += [Ablation(layer, part) for part in ("attn", "mlp")]
                found += [Ablation(layer, "resid", ratio, "zero") for ratio in (0.5, 1.0)]
        return found

    def _shares(self, ratios: Sequence[float], layer: int) -> list[Ablation]:
        return [
            Ablation(layer, ratio=ratio, seed=seed)
            for ratio in ratios
            if ratio > 0
            for seed in range(1 if ratio == 1 else self.seeds)
        ]

    def means(self, questions: Sequence[dict]) -> ablate.Means:
        """By token, over the half that layers are chosen on: contributions, and heads' outputs."""
        if self._means is None:
            rows = [q["prompt"] + q["target"] for q in questions if q["half"] == "choose"]
            names = [ablate.hook(layer, name) for layer in range(self.n_layers)
                     for name in (*ablate.WRITES["both"], "attn.hook_z")]  # fmt: skip
            size = max(1, TOKENS // max(map(len, rows)))
            self._means = ablate.token_means(self.model, rows, names, min(size, 64))
        return self._means

    def scan(self, part: Sequence[dict], questions: Sequence[dict]) -> pd.DataFrame:
        """Scores of some questions under every ablation: one row for each."""
        means = self.means(questions)
        by_id = {q["id"]: q for q in questions}
        frames = []
        for batch in _batches(part):
            given = self._given(batch)
            resid = ablate.residuals(self.model, given)
            donors = self._donated(given, [by_id[q["donor"]] for q in batch])
            sources = {"zero": None, "mean": lambda name, g=given: means.at(name, g.ids),
                       "resample": donors.__getitem__}  # fmt: skip
            mode = batch[0]["mode"]
            whole = mode == "direct" or all(q["mode"] == mode for q in questions)
            for edit in self.plan(whole, mode):
                hooks = ablate.ablating([edit], resid[0].shape[-1], sources[edit.kind], given.role)
                frames.append(self._scored(batch, given, resid, hooks, **edit._asdict()))
        return pd.concat(frames, ignore_index=True)

    def heads(self, part: Sequence[dict], questions: Sequence[dict]) -> pd.DataFrame:
        """Scores without each head alone; layer -1 is with all of them."""
        n_layers, n_heads = self.shape
        single = [[(layer, head)] for layer in range(n_layers) for head in range(n_heads)]
        about = [{"layer": layer, "head": head} for [(layer, head)] in single]
        every = [{"layer": -1, "head": -1}, *about]
        return self._without(part, questions, [[], *single], every)

    def sets(
        self, part: Sequence[dict], sets: Sequence[dict], questions: Sequence[dict]
    ) -> pd.DataFrame:
        """Scores without each set of heads; the set `none` is with all of them."""
        gone = [[tuple(head) for head in one["heads"]] for one in sets]
        about = [{key: one[key] for key in ("set", "ability", "choice", "draw")} for one in sets]
        return self._without(part, questions, gone, about)

    def _without(
        self, part: Sequence[dict], questions: Sequence[dict], sets: Sequence, about: Sequence[dict]
    ) -> pd.DataFrame:
        means, frames = self.means(questions), []
        for batch in _batches(part):
            given = self._given(batch)
            resid = ablate.residuals(self.model, given)
            for heads, what in zip(sets, about, strict=True):
                source = lambda name, g=given: means.at(name, g.ids)  # noqa: E731
                hooks = ablate.without_heads(heads, self.shape[1], source)
                frames.append(self._scored(batch, given, resid, hooks, **what))
        return pd.concat(frames, ignore_index=True)

    def _given(self, batch: Sequence[dict]) -> Texts:
        return ablate.texts(self.model, *([q[key] for q in batch]
                                          for key in ("prompt", "target", "start")))  # fmt: skip

    def _donated(self, given: Texts, donors: Sequence[dict]) -> dict[str, torch.Tensor]:
        """What every layer adds in the texts of other mazes, position for position."""
        other = self._given(donors)
        names = [ablate.hook(layer, name) for layer in self.layers
                 for name in ablate.WRITES["both"]]  # fmt: skip
        held = record(self.model, other.ids, names)
        width = max(given.ids.shape[1], other.ids.shape[1])

        def widened(t: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1)

        padded = [Texts(widened(t.ids), widened(t.ahead), widened(t.role)) for t in (given, other)]
        at = ablate.aligned(*padded)[:, : given.ids.shape[1]]
        row = torch.arange(len(at))[:, None]
        return {name: x[row.to(x.device), at.to(x.device)] for name, x in held.items()}

    def _scored(self, batch, given, resid, hooks, **about: Any) -> pd.DataFrame:
        scores = ablate.score(self.model, self.readout, given, resid, hooks)
        taken = (given.role > 0).to(scores.logp.device)
        found = pd.DataFrame([{key: q[key] for key in ABOUT} for q in batch]).assign(**about)
        return found.assign(
            logp=((scores.logp * taken).sum(1) / taken.sum(1)).tolist(),
            answer=ablate.mean_over(scores.logp, given, "answer").tolist(),
            exact=ablate.exact(scores, given).tolist(),
        )

    def write(
        self, part: Sequence[dict], held: Sequence[dict], questions: Sequence[dict]
    ) -> pd.DataFrame:
        """Answers written under ablation, verified: no layer, and each at ratios 0.5 and 1."""
        means, rows = self.means(questions), []
        asked = {q["id"] for q in part}
        records = {h["id"]: from_dict(h) for h in held if h["id"] in asked}
        see, ids = ablate.following(self.model)
        edits = [Ablation(self.layers[0], ratio=0.0)]
        ratios, layers = (0.5, 1.0), self.layers
        if self.cfg.quick:
            ratios, layers = (0.5,), self.layers[:2]
        edits += [Ablation(layer, ratio=ratio) for layer in layers for ratio in ratios]
        d_model = self.model.bridge.cfg.d_model
        for batch in _batches(part):
            room = max(len(q["target"]) for q in batch) + 24
            room = min(room, self.model.n_ctx - max(len(q["prompt"]) for q in batch))
            for edit in edits:
                hooks = ablate.ablating([edit], d_model, lambda name: means.at(name, ids()))
                with self.model.bridge.hooks(fwd_hooks=[see, *hooks]):
                    answers = generate.answers(
                        self.model, [q["prompt"] for q in batch], max_new_tokens=room,
                        until="" if self.model.has_chat else "\n",
                    )  # fmt: skip
                for q, steps in zip(batch, answers, strict=True):
                    text = self.model.decode([s.id for s in steps if s.id not in self.model.ends])
                    _, closed, said = text.rpartition(maze_prompts.CLOSE)
                    ended = bool(closed) or q["mode"] == "direct"
                    right = ended and not reply_fault(records[q["id"]], said)
                    rows.append({key: q[key] for key in ABOUT}
                                | {"layer": edit.layer, "ratio": edit.ratio, "correct": right,
                                   "truncated": len(steps) == room})  # fmt: skip
        return pd.DataFrame(rows)


def _batches(part: Sequence[dict]) -> Iterator[list[dict]]:
    """Questions of one mode, as many as a forward pass may hold."""
    batch: list[dict] = []
    for q in part:
        longest = max(len(p["prompt"]) + len(p["target"]) for p in (*batch, q))
        alike = not batch or q["mode"] == batch[0]["mode"]
        if batch and (not alike or longest * (len(batch) + 1) > TOKENS):
            yield batch
            batch = []
        batch.append(q)
    if batch:
        yield batch


def _with_donors(found: list[dict]) -> list[dict]:
    """Each question with another maze's of its task, mode and about its length.

    A question that has none is left out (one maze alone in its task).
    """
    kept = []
    for i, q in enumerate(found):
        behind = [*found[i + 1 :], *found[:i]]  # the next of its length, not always the same one
        other = [d for d in behind if (d["mode"], d["task"]) == (q["mode"], q["task"])
                 and d["maze_id"] != q["maze_id"]]  # fmt: skip
        if other:
            size = len(q["prompt"]), len(q["target"])
            nearest = min(other, key=lambda d: abs(len(d["prompt"]) - size[0])
                          + abs(len(d["target"]) - size[1]))  # fmt: skip
            kept.append(q | {"donor": nearest["id"]})
    return kept


def _ratios(text: str) -> list[float]:
    """The ratios of a setting with 0.5 and 1. Raises BadInput for what is no share."""
    try:
        found = {0.5, 1.0, *(float(part) for part in text.split(","))}
    except ValueError:
        raise BadInput(f"--ablation-ratios {text}: shares such as 0,0.25,0.5") from None
    if odd := [ratio for ratio in found if not 0 <= ratio <= 1]:
        raise BadInput(f"--ablation-ratios: {odd[0]:g} is no share from 0 to 1")
    return sorted(found)
