"""What experiment 015 measures with the model at hand: activations at cells, and silenced sets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens_utils import concepts as con
from lens_utils import layer_ablation as ablate
from lens_utils import lens, maze_prompts, maze_tasks, mazes, neuron_sets, patching
from lens_utils.cache import record
from lens_utils.experiment import Run
from lens_utils.maze_records import from_dict
from lens_utils.maze_text import cells_in, cells_text
from lens_utils.models import LoadedModel

FITTED, QUICK_FITTED = 300, 60
EDGES, QUICK_EDGES = 24, 8
QUICK_SETS = 3
QUESTIONS, QUICK_QUESTIONS = 12, 3  # mazes whose answers are scored
BYTES = 2**29  # of the activations held at once
EVERYWHERE = ("wall", "path")  # asked of all cells; the others of open ones
KINDS = ("post", "gate")
VIRTUAL_DRAWS = 200
ALL = "all neurons"


def passing(gate: dict[str, Any]) -> list[str]:
    """Abilities that are past the gate in some mode."""
    return [a for a in maze_tasks.ABILITIES
            if any(cell["passes"] for cell in gate.get(a, {}).values())]  # fmt: skip


def tokens(drawn: Sequence[dict]) -> pd.DataFrame:
    """One row for every cell's token: maze, position, cell, list, and which concepts hold."""
    rows = []
    for n, one in enumerate(drawn):
        maze = _maze(one)
        held = mazes.concepts(maze)
        for position, cell, section in one["cells"]:
            at = (cell // maze.size, cell % maze.size)
            about = {"maze": n, "split": one["split"], "position": position, "cell": cell}
            true = {c: c in held[at] for c in mazes.CONCEPTS}
            rows.append(about | {"section": section} | true)
    return pd.DataFrame(rows)


def _maze(one: dict) -> mazes.Maze:
    return mazes.Maze(one["size"], frozenset(cells_in(one["open"])), *cells_in(one["start"]),
                      *cells_in(one["goal"]))  # fmt: skip


def _scopes(tokens: pd.DataFrame) -> Iterator[tuple[list[str], np.ndarray]]:
    """Concepts, and the tokens they are asked of: all cells, or those in the list of open ones."""
    yield list(EVERYWHERE), np.ones(len(tokens), bool)
    rest = [c for c in mazes.CONCEPTS if c not in EVERYWHERE]
    yield rest, (tokens.section == "empty").to_numpy()


def from_input(drawn: Sequence[dict], tokens: pd.DataFrame) -> pd.DataFrame:
    """What a linear function of the maze itself reads, without any model.

    bag: ridge on which cells are open, where player and goal are, the same for every cell's token.
    looked up: another one for every cell. It may know which bits are this cell's neighbours.
    """
    features = []
    for one in drawn:
        maze = _maze(one)
        grid = [(r, c) for r in range(maze.size) for c in range(maze.size)]
        features.append([float(x) for where in (maze.open, {maze.start}, {maze.goal})
                         for x in (cell in where for cell in grid)])  # fmt: skip
    x = torch.tensor(features)[torch.tensor(tokens.maze.to_numpy())]
    found = []
    for names, scope in _scopes(tokens):
        x_, y, cell, _, train = _tensors(x, tokens, names, scope)
        scores = {"bag": x_ @ con.directions(x_[train], y[train], cell[train])[1].T}
        own = torch.zeros(len(x_), len(names))
        for one in cell.unique():
            here = cell == one
            for k in range(len(names)):
                fit = here & train
                if 0 < int(y[fit, k].sum()) < int(fit.sum()):
                    alone = torch.zeros(int(fit.sum()), dtype=torch.long)
                    w = con.directions(x_[fit], y[fit, k : k + 1], alone)[1]
                    own[here, k] = x_[here] @ w[0]
        scores["looked up"] = own
        for name, score in scores.items():
            found += _judged(score, y, cell, _ids(tokens, scope), ~train, names, method=name)
    return pd.DataFrame(found)


def _tensors(x: Tensor, tokens: pd.DataFrame, names: list[str], scope: np.ndarray):
    """Values, labels, cells, mazes, and who is fitted on, of the tokens in scope; on x's device."""
    rows, taken = tokens[scope], torch.from_numpy(np.flatnonzero(scope)).to(x.device)
    y = torch.tensor(rows[names].to_numpy(bool)).to(x.device)
    cell = torch.tensor(rows.cell.to_numpy()).to(x.device)
    maze = torch.tensor(rows.maze.to_numpy()).to(x.device)
    train = torch.tensor((rows.split == "train").to_numpy()).to(x.device)
    return x[taken], y, cell, maze, train


def _ids(tokens: pd.DataFrame, scope: np.ndarray) -> np.ndarray:
    return tokens.maze.to_numpy()[scope]


def _judged(score, y, cell, maze, test, names, interval=True, **about: Any) -> list[dict]:
    """Held-out AUROC of one score per concept, with its interval where one is asked for."""
    kept = test.cpu().numpy()
    score, y, cell = (v.cpu().numpy()[kept] for v in (score, y, cell))
    maze, found = maze[kept], []
    for k, name in enumerate(names):
        x = score[:, k].astype(float)
        value = con.auroc(x[:, None], y[:, k : k + 1], cell)[0, 0]
        low = high = np.nan
        if interval:
            low, high = con.auroc_interval(x, y[:, k], cell, maze)
            low, high = min(low, value), max(high, value)
        found.append(about | {"concept": name, "auroc": value, "low": low, "high": high,
                              "n": len(np.unique(maze))})  # fmt: skip
    return found


class Session:
    """The model, and sizes."""

    def __init__(self, cfg, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self.n_sets = QUICK_SETS if cfg.quick else cfg.random_sets

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @property
    def n_layers(self) -> int:
        return self.model.n_layers

    def at_once(self, tokens: pd.DataFrame, axis: str) -> int:
        """How many layers' activations are held together."""
        wide = getattr(self.model.bridge.cfg, axis) * (2 if axis == "d_mlp" else 1)
        return max(1, BYTES // (4 * wide * len(tokens)))

    def draw(self) -> list[dict]:
        """Mazes of both sides, and their prompts up to the last cell; every cell's place."""
        rng = random.Random(f"concepts {self.cfg.seed}")
        n = self.cfg.max_samples or (QUICK_FITTED if self.cfg.quick else FITTED)
        found, seen = [], set()
        while len(found) < n + n // 2:
            test = len(found) >= n
            maze = mazes.tree_maze(rng, 5, test)
            if maze.layout_id in seen:
                continue
            seen.add(maze.layout_id)
            asked = maze_tasks.ask(rng, maze, "solve", 0, False)
            ids = maze_prompts.encode(self.model, asked)
            cells = [[at.position, at.cell[0] * maze.size + at.cell[1], at.section]
                     for at in maze_prompts.cell_positions(self.model, ids)
                     if at.section in ("walls", "empty")]  # fmt: skip
            found.append({"maze_id": maze.maze_id, "split": "test" if test else "train",
                          "size": maze.size, "open": cells_text(sorted(maze.open)),
                          "start": cells_text([maze.start]), "goal": cells_text([maze.goal]),
                          "ids": ids[: cells[-1][0] + 1], "cells": cells})  # fmt: skip
        return found

    def _at_cells(self, drawn, names: list[str], trained: bool) -> dict[str, Tensor]:
        model = self.model if trained else self.run.model(random_init=True)
        rows, at = [one["ids"] for one in drawn], [[c[0] for c in one["cells"]] for one in drawn]
        return con.at_tokens(model, rows, at, names)

    def directions(
        self, depths: Sequence[int], drawn, tokens: pd.DataFrame, trained: bool = True
    ) -> pd.DataFrame:
        """Held-out AUROC of both directions of every concept; trained: also of shuffled labels."""
        held = self._at_cells(drawn, [lens.hook(depth) for depth in depths], trained)
        found = []
        for depth in depths:
            for names, scope in _scopes(tokens):
                x, y, cell, _, train = _tensors(held[lens.hook(depth)], tokens, names, scope)
                mixed = con.shuffled(y, cell, self.cfg.seed)
                for labels, z in (("true", y), ("shuffled", mixed))[: 2 if trained else 1]:
                    both = con.directions(x[train], z[train], cell[train])
                    for method, w in zip(("difference", "ridge"), both, strict=True):
                        found += _judged(
                            x @ w.T, y if labels == "true" else z, cell, _ids(tokens, scope),
                            ~train, names, depth=depth, method=method, labels=labels,
                            interval=trained and labels == "true" and method == "ridge",
                        )  # fmt: skip
        return pd.DataFrame(found)

    def neurons(
        self, layers: Sequence[int], drawn, tokens: pd.DataFrame, trained: bool = True
    ) -> dict[str, Tensor]:
        """Contrasts of every neuron, [layer, kind, concept, neuron]; more of the trained ones.

        rate, mean (of every cell) and sd are of the open cells' tokens of the fitted mazes.
        """
        hooks = {"post": "mlp.hook_post", "gate": "mlp.hook_pre"}
        names = {(layer, kind): ablate.hook(layer, hooks[kind])
                 for layer in layers for kind in KINDS[: 2 if trained else 1]}  # fmt: skip
        held = self._at_cells(drawn, list(names.values()), trained)
        found: dict[str, list[Tensor]] = {}
        for layer in layers:
            rows: dict[str, list[Tensor]] = {}
            for kind in KINDS[: 2 if trained else 1]:
                parts: dict[str, list[Tensor]] = {}
                for concepts, scope in _scopes(tokens):
                    x, y, cell, maze, train = _tensors(held[names[layer, kind]], tokens,
                                                       concepts, scope)  # fmt: skip
                    fit = con.contrast(x[train], y[train], cell[train], maze[train])
                    new = {"d": fit.d, "p": fit.p}
                    if trained:
                        mixed = con.shuffled(y, cell, self.cfg.seed + 1)[train]
                        null = con.contrast(x[train], mixed, cell[train], maze[train])
                        area = con.auroc(*(v[~train].cpu().numpy() for v in (x, y, cell)))
                        new |= {"shuffled_d": null.d, "shuffled_p": null.p,
                                "auroc": torch.from_numpy(area).float()}  # fmt: skip
                    for key, value in new.items():
                        parts.setdefault(key, []).append(value.cpu().float())
                    if trained and kind == "post" and "dead_end" in concepts:
                        rows["mean"] = [con.means(x[train], cell[train], 25).cpu()]
                        rows["sd"] = [con.within(x[train], cell[train]).std(0).cpu()]
                    if trained and kind == "gate" and "dead_end" in concepts:
                        rows["rate"] = [(x[train] > 0).float().mean(0).cpu()]
                for key, value in parts.items():
                    rows.setdefault(key, []).append(torch.cat(value))
            for key, value in rows.items():
                whole = value[0] if key in ("mean", "sd", "rate") else torch.stack(value)
                found.setdefault(key, []).append(whole)
        return {key: torch.stack(value) for key, value in found.items()}

    # What joins the sets

    def virtual(self, sets: Sequence[dict]) -> pd.DataFrame:
        """Mean signed cosine between sets of successive layers, against random neurons."""
        rng = np.random.default_rng(self.cfg.seed)
        d_mlp = self.model.bridge.cfg.d_mlp
        found = []
        for source in sets:
            for target in [t for t in sets if t["layer"] == source["layer"] + 1]:
                sign = np.outer(source["signs"], target["signs"])
                pool = [rng.permutation(d_mlp)[: min(d_mlp, 256)].tolist() for _ in range(2)]
                pool[0], pool[1] = source["neurons"] + pool[0], target["neurons"] + pool[1]
                cosines = con.virtual(self.model, (source["layer"], pool[0]),
                                      (target["layer"], pool[1])).cpu().numpy()  # fmt: skip
                n, m = sign.shape
                null = [(sign * cosines[np.ix_(n + rng.permutation(len(pool[0]) - n)[:n],
                                               m + rng.permutation(len(pool[1]) - m)[:m])]).mean()
                        for _ in range(VIRTUAL_DRAWS)]  # fmt: skip
                found.append({"source": source["concept"], "layer": source["layer"],
                              "target": target["concept"], "target_layer": target["layer"],
                              "cosine": float((sign * cosines[:n, :m]).mean()),
                              "random": float(np.mean(null)),
                              "random_sd": float(np.std(null, ddof=1)),
                              "sizes": f"{n} x {m}", "draws": VIRTUAL_DRAWS})  # fmt: skip
        return _tested(pd.DataFrame(found), "cosine")

    def causal(
        self, sets: Sequence[dict], held: dict[str, Tensor], drawn, tokens: pd.DataFrame
    ) -> pd.DataFrame:
        """Contrast of every later set, as it is and with a source silenced at the open cells.

        In standard deviations within cells; draw -1 is the source, the others are random sets.
        """
        n = self.cfg.edge_mazes or (QUICK_EDGES if self.cfg.quick else EDGES)
        chosen = [i for i, one in enumerate(drawn) if one["split"] == "test"][:n]
        rows = tokens[tokens.maze.isin(chosen) & (tokens.section == "empty")]
        given, _ = self.model.batch([drawn[i]["ids"] for i in chosen])
        place = torch.full(given.shape, -1, device=given.device)
        line = {maze: at for at, maze in enumerate(chosen)}
        for maze, position, cell in rows[["maze", "position", "cell"]].itertuples(index=False):
            place[line[maze], position] = cell
        names = [ablate.hook(layer, "hook_resid_pre") for layer in range(self.n_layers)]
        resid = record(self.model, given, names)
        cell = place[place >= 0].cpu()
        rows = rows.assign(line=rows.maze.map(line)).sort_values(["line", "position"])
        labels = {name: con.within(torch.tensor(rows[name].to_numpy(float))[:, None], cell)
                  for name in {s["concept"] for s in sets}}  # fmt: skip

        def contrasts(layer: int, hooks: list) -> np.ndarray:
            seen: dict[int, Tensor] = {}
            for later in {t["layer"] for t in sets if t["layer"] > layer}:
                see = lambda x, hook, at=later: seen.update({at: x[place >= 0]})  # noqa: E731
                hooks = [*hooks, (ablate.hook(later, "mlp.hook_post"), see)]
            patching.resume(self.model, resid[names[layer]], layer, hooks)
            values = []
            for t in [t for t in sets if t["layer"] > layer]:
                at = torch.tensor(t["neurons"])
                weight = torch.tensor(t["signs"]) / held["sd"][t["layer"], at].clamp_min(1e-6)
                x = seen[t["layer"]][:, at].cpu().double() @ weight.double()[:, None] / len(at)
                y = labels[t["concept"]]
                values.append(float((y * x).sum() / y.square().sum()))
            return np.array(values)

        found = []
        with torch.no_grad():
            sources = [s for s in sets if any(t["layer"] > s["layer"] for t in sets)]
            for source in self.run.track(sources, "causal edges"):
                layer = source["layer"]
                clean = contrasts(layer, [])
                for draw, neurons in enumerate([source["neurons"], *self._random(source, held)]):
                    cut = self._silenced(layer, neurons, held, place)
                    after = contrasts(layer, [cut])
                    for t, was, now in zip([t for t in sets if t["layer"] > layer], clean, after,
                                           strict=True):  # fmt: skip
                        found.append({"source": source["concept"], "layer": layer,
                                      "target": t["concept"], "target_layer": t["layer"],
                                      "draw": draw - 1, "clean": was, "lost": was - now,
                                      "mazes": len(chosen)})  # fmt: skip
        columns = ["source", "layer", "target", "target_layer", "draw", "clean", "lost", "mazes"]
        return pd.DataFrame(found, columns=columns)

    def _random(self, source: dict, held: dict[str, Tensor]) -> list[list[int]]:
        chosen = torch.zeros(held["rate"].shape, dtype=torch.bool)
        chosen[source["layer"], source["neurons"]] = True
        drawn = neuron_sets.matched(chosen, held["rate"], torch.zeros_like(chosen), self.n_sets,
                                    self.cfg.seed)  # fmt: skip
        return [one[source["layer"]].nonzero().flatten().tolist() for one in drawn]

    def _silenced(self, layer: int, neurons: list[int], held, place: Tensor):
        at = torch.tensor(neurons)
        write = con.silence(at, held["mean"][layer][:, at], place)
        return ablate.hook(layer, "mlp.hook_post"), write

    def answers(self, sets, held, records: Sequence[dict], gate: dict) -> pd.DataFrame:
        """What right answers lose, direct, with a concept's sets silenced in all layers.

        The concept "all neurons" is the most that silencing at these tokens can do: every neuron.
        """
        wanted = [a for a in (*maze_tasks.ABILITIES, "recall") if a != "generate"
                  and gate.get(a, {}).get("direct", {}).get("passes")]  # fmt: skip
        asked = [h for h in records if h["task"] in wanted and h["split"] == "test"
                 and not h["enable_thinking"] and h["negative_kind"] != "lexical"]  # fmt: skip
        n = QUICK_QUESTIONS if self.cfg.quick else QUESTIONS
        kept = list(dict.fromkeys(h["maze_id"] for h in asked))[:n]
        asked = [h for h in asked if h["maze_id"] in kept]
        if not asked or not sets:
            return pd.DataFrame(columns=["concept", "draw", "maze_id", "task", "lost"])
        prompts, targets, starts = [], [], []
        for h in asked:
            record_ = from_dict(h)
            prompts.append(maze_prompts.encode(self.model, record_))
            target, start = maze_prompts.gold_ids(self.model, record_)
            targets.append(target)
            starts.append(start)
        given = ablate.texts(self.model, prompts, targets, starts)
        place = torch.full(given.ids.shape, -1, device=given.ids.device)
        for i, h in enumerate(asked):
            size = h["maze_metadata"]["size"]
            for at in maze_prompts.cell_positions(self.model, prompts[i]):
                if at.section == "empty":
                    place[i, at.position] = at.cell[0] * size + at.cell[1]
        resid, readout = ablate.residuals(self.model, given), lens.Readout(self.model.bridge)

        def scored(hooks: list) -> Tensor:
            scores = ablate.score(self.model, readout, given, resid, hooks)
            return ablate.mean_over(scores.logp, given, "answer").cpu()

        base, found = scored([]), []

        def lose(concept: str, draw: int, gone: list) -> list[dict]:
            hooks = [self._silenced(layer, neurons, held, place) for layer, neurons in gone]
            lost = (base - scored(hooks)).tolist()
            about = {"concept": concept, "draw": draw}
            return [about | {"maze_id": h["maze_id"], "task": h["task"], "lost": x}
                    for h, x in zip(asked, lost, strict=True)]  # fmt: skip

        for concept in dict.fromkeys(s["concept"] for s in sets):
            own = [s for s in sets if s["concept"] == concept]
            draws = list(zip(*(self._random(s, held) for s in own), strict=True))
            for draw, chosen in enumerate([[s["neurons"] for s in own], *draws]):
                gone = [(s["layer"], at) for s, at in zip(own, chosen, strict=True)]
                found += lose(concept, draw - 1, gone)
        every = list(range(self.model.bridge.cfg.d_mlp))
        found += lose(ALL, -1, [(layer, every) for layer in range(self.n_layers)])
        return pd.DataFrame(found)


def _tested(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """t, p and q of a value against the mean and standard deviation of its random draws."""
    from scipy import stats as sp

    if not len(table):
        return table
    n = table.draws.to_numpy()
    t = (table[value] - table.random) / table.random_sd.clip(lower=1e-12) / np.sqrt(1 + 1 / n)
    p = 2 * sp.t.sf(np.abs(t), n - 1)
    return table.assign(t=t, p=p, q=sp.false_discovery_control(p))
