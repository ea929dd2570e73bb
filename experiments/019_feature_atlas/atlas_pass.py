"""The text of experiment 019, and the one pass over it."""

import random
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lens_utils import (
    feature_facts,
    feature_stats,
    files,
    mlp_stream,
    provenance,
    reasoning_text,
    text_rows,
    transcoder_sets,
)
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.text_rows import Row

QUICK_TOKENS, QUICK_POOL = 12_000, 2_000
DIVERSE = "wiki+reasoning+docstrings+code"
TRACES = 0.2
"""Share of the tokens that rendered traces have in text that is not mazes."""
PHASES = ("explore", "backtrack", "conclude", *reasoning_text.SPANS)
"""Parts of a trace, as the organism's and the rendered ones have them."""


class Corpus:
    """Rows on two sides, their tokens as facts need them, and the transcoders."""

    def __init__(self, cfg, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self.model = run.model()
        self.n_tokens = QUICK_TOKENS if cfg.quick else cfg.tokens
        self.is_mazes = cfg.text == "mazes" or (
            cfg.text == "auto" and text_rows.knows_mazes(self.model)
        )

    @cached_property
    def transcoders(self) -> dict:
        """By layer. A missing set of 018 is said before anything is loaded."""
        if self.cfg.transcoders in transcoder_sets.SETS:
            self.run.upstream("018_transcoders", f"{self.cfg.transcoders}.json")
        return transcoder_sets.load(self.run, self.cfg.transcoders)

    @cached_property
    def layers(self) -> list[int]:
        """Layers of the atlas. Raises BadInput for one without a transcoder."""
        there = sorted(self.transcoders)
        if self.cfg.layers == "all":
            return there[len(there) // 2 :][:1] if self.cfg.quick else there
        try:
            asked = sorted({int(n) for n in self.cfg.layers.split(",")})
        except ValueError:
            raise BadInput(f"--layers {self.cfg.layers}: all, or numbers with commas") from None
        if missing := [layer for layer in asked if layer not in there]:
            raise BadInput(f"there is no transcoder for layer {missing[0]}; there are {there}")
        return asked

    @cached_property
    def _loaded(self) -> tuple[list[Row], dict[str, Any]]:
        rows, said = [], {}
        each = self.n_tokens // 2
        for split in ("fit", "test"):
            share = each if self.is_mazes else int((1 - TRACES) * each)
            text = DIVERSE if self.cfg.text == "auto" and not self.is_mazes else self.cfg.text
            found = text_rows.load(self.model, text, share, self.cfg.length, self.cfg.seed, split)
            rows += found.rows
            said[split] = found.said
            if not self.is_mazes:
                rows += self._traces(each - share, split) + self._prompts(split)
        return rows, said

    def _traces(self, tokens: int, split: str) -> list[Row]:
        rng, rows, total = random.Random(f"{self.cfg.seed} {split}"), [], 0
        while total < tokens:
            pieces = reasoning_text.render(rng, split == "test")
            ids, labels = text_rows.labelled(self.model, pieces)
            bos = self.model.bos
            whole = Row([*bos, *ids], f"trace {split} {len(rows)}", "traces", split,
                        ["mark"] * len(bos) + labels)  # fmt: skip
            fits = self.model.n_ctx
            rows.append(whole._replace(ids=whole.ids[:fits], labels=whole.labels[:fits]))
            total += len(ids)
        return rows

    def _prompts(self, split: str) -> list[Row]:
        place = provenance.EXPERIMENTS / "019_feature_atlas" / "prompts.json"
        asked = [(group, text) for group, of in files.read(place).items() for text in of]
        side = int(split == "test")
        return [Row(self.model.encode(text), f"prompt {n}", f"{group} prompts", split)
                for n, (group, text) in enumerate(asked) if n % 2 == side]  # fmt: skip

    @property
    def rows(self) -> list[Row]:
        return self._loaded[0]

    def said(self) -> dict[str, Any]:
        """What the text is, for the run's records."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.source] = counts.get(row.source, 0) + len(row.ids)
        sides = {split: sum(len(r.ids) for r in self.rows if r.split == split)
                 for split in ("fit", "test")}  # fmt: skip
        docs = len({row.doc for row in self.rows})
        return {"tokens": sides, "rows": len(self.rows), "by_source": counts, "documents": docs,
                "text": self._loaded[1]}  # fmt: skip

    @cached_property
    def tokens(self) -> feature_facts.Tokens:
        rows = self.rows
        spans = {"source": [[row.source] * len(row.ids) for row in rows],
                 "part": [row.labels or [""] * len(row.ids) for row in rows]}  # fmt: skip
        return feature_facts.make_tokens(
            [row.ids for row in rows], [row.split == "test" for row in rows], self.model.decode,
            {family: of for family, of in spans.items() if any(any(names) for names in of)},
        )  # fmt: skip

    @cached_property
    def spans(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """By family: names, and the code of every token; -1 where nothing is known."""
        found = {}
        for family, names in self.tokens.spans.items():
            distinct = sorted(set(names) - {""})
            code = {name: n for n, name in enumerate(distinct)}
            found[family] = distinct, np.array([code.get(name, -1) for name in names])
        return found

    @cached_property
    def pool(self) -> torch.Tensor:
        size = QUICK_POOL if self.cfg.quick else self.cfg.pool
        held, row = torch.tensor(self.tokens.held), torch.tensor(self.tokens.row)
        return feature_stats.choose_pool(row, held, size, self.cfg.seed)

    def gather(self) -> dict[str, torch.Tensor]:
        """What every layer's collector has, under <layer>/..., and the logit effects."""
        starts = torch.tensor(np.r_[0, np.cumsum([len(row.ids) for row in self.rows])])
        held = torch.tensor(self.tokens.held)
        spans = {family: torch.tensor(codes) for family, (_, codes) in self.spans.items()}
        sizes = {family: len(names) for family, (names, _) in self.spans.items()}
        collectors = {
            layer: feature_stats.Collector(t.n_features, sizes, self.pool, self.cfg.seed + layer)
            for layer, t in self.transcoders.items() if layer in self.layers
        }  # fmt: skip
        batches = mlp_stream.batches(self.rows)
        for start, end in self.run.track(batches, "text"):
            part = mlp_stream.activations(self.model, self.rows[start:end], start, self.layers)
            row, pos = part.row.cpu(), part.pos.cpu()
            token = starts[row] + pos
            around = {family: codes[token] for family, codes in spans.items()}
            for layer, collector in collectors.items():
                codes = self.transcoders[layer].encode(part.mlp[layer][0].float())
                collector.add(*codes, token, row, pos, held[token], around)
        found = {}
        for layer, collector in collectors.items():
            effects, ids = feature_stats.logit_effects(
                self.transcoders[layer].W_dec, self.model.bridge.W_U
            )
            own = collector.result() | {"effects": effects, "effect_ids": ids,
                                        "tokens": torch.tensor([collector.tokens])}  # fmt: skip
            found |= {f"{layer}/{name}": tensor for name, tensor in own.items()}
        return found


def of_layer(held: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """One layer's part of `gather`."""
    return {name.partition("/")[2]: tensor for name, tensor in held.items()
            if name.partition("/")[0] == str(layer)}  # fmt: skip
