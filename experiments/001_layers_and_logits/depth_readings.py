"""What experiment 001 measures with the model at hand: residuals, readouts, temperatures."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from lens_utils import cache, corpus, lens, stats
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.prompts import Encoded, Prompt, derange, encode

QUICK = {"facts": 7, "direction": 8, "formats": 12}
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TEMPERATURES = (0.1, 0.5, 1.0, 2.0)
WINDOW = 128  # tokens of a document that are used


def choose(prompts: list[Prompt], cfg) -> list[Prompt]:
    """The prompts of this run: all, or the first of each set."""
    most = dict(QUICK) if cfg.quick else {}
    if cfg.facts:
        most["facts"] = cfg.facts
    sets = {s: [p for p in prompts if p.set == s] for s in QUICK}
    return [p for s, members in sets.items() for p in members[: most.get(s)]]


class Session:
    """The model and what hangs on it, loaded when the first missing stage needs it."""

    def __init__(self, cfg, run: Run) -> None:
        self.cfg, self.run = cfg, run
        if cfg.lens == "next_ln1" and not cfg.fold:
            raise BadInput("--lens next_ln1 needs --fold: on plain weights the next block's norm "
                           "carries a gain that was learned for that block")  # fmt: skip

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model(fold=self.cfg.fold)

    @cached_property
    def readout(self) -> lens.Readout:
        return lens.Readout(self.model.bridge)

    @cached_property
    def depths(self) -> list[int]:
        return lens.depths(self.model.n_layers, self.cfg.layers)

    @cached_property
    def docs(self) -> list[corpus.Doc]:
        # Five characters a token, long documents cut, and two parts held out.
        return corpus.docstrings(16 * self.cfg.fit_tokens)

    # 1. The stream

    def residuals(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The residual stream at the last token: [prompt, depth, d_model]."""
        return {"resid": self._last(self.model, encode(self.model, prompts)[0])}

    def _last(self, model: LoadedModel, encoded: Sequence[Encoded]) -> Tensor:
        names = [lens.hook(depth) for depth in self.depths]
        rows = [e.ids for e in encoded]
        parts = [
            torch.stack([a.values[name] for name in names], dim=1).float().cpu()
            for a in cache.stream(model, rows, names, positions="last")
        ]
        return torch.cat(parts) if parts else torch.empty(0, len(names), model.bridge.cfg.d_model)

    # 2. The ridge lens

    def text(self, split: str, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Residuals of a part of the text, [depth, token, d_model], and each token's document.

        First positions are left out: they are sinks, a hundred times longer than the others.
        """
        rows, tokens = [], 0
        for doc in self.docs:
            if tokens < most and doc.split == split:
                rows.append(self.model.encode(doc.text)[:WINDOW])
                tokens += len(rows[-1])
        names = [lens.hook(depth) for depth in self.depths]
        batches = cache.stream(self.model, rows, names, batch_size=8)
        for part in self.run.track(batches, f"text to {split}"):
            kept = torch.cat(
                [part.row.new_zeros(1, dtype=torch.bool), part.row[1:] == part.row[:-1]]
            )
            yield torch.stack([part.values[n][kept] for n in names]).float(), part.row[kept]

    def held_out(self, split: str, most: int) -> tuple[Tensor, Tensor]:
        """So many tokens of a part of the text, one in ten, so from many documents."""
        resid, document = zip(*self.text(split, 10 * most), strict=True)
        joined = torch.cat(resid, dim=1)
        at = torch.linspace(0, joined.shape[1] - 1, min(most, joined.shape[1])).long()
        return joined[:, at], torch.cat(document)[at]

    @cached_property
    def validation(self) -> Tensor:
        """Residuals of validation text, [depth, token, d_model]."""
        return self.held_out("validation", 48)[0]

    @torch.no_grad()
    def fit_ridge(self) -> dict[str, Tensor]:
        """Translators [depth, d_model + 1, d_model]; the penalty is chosen on validation text."""
        most = self.cfg.fit_tokens // (8 if self.cfg.quick else 1)
        sums = lens.moments(self.readout, (resid for resid, _ in self.text("fit", most)))
        held = self.validation
        key = lens.depths(self.model.n_layers, "key")
        at = [i for i, depth in enumerate(self.depths) if depth in key]
        final = lens.reference(self.readout.read(held[-1]))
        losses = {}
        # So few tokens have too few different words for the two smallest penalties.
        for penalty in PENALTIES[2:] if self.cfg.quick else PENALTIES:
            fitted = sums.translators(penalty, at).to(held.device)
            kls = [
                self._kl(final, self._ridge(held[i], self.depths[i], a))
                for i, a in zip(at, fitted, strict=True)
            ]
            losses[penalty] = torch.stack(kls).mean().item()
        best = min(losses, key=losses.__getitem__)
        return {
            "translator": sums.translators(best).half(),
            "penalty": torch.tensor(best),
            "tokens": torch.tensor(sums.n),
        }

    def _kl(self, final: lens.Reference, logits: Tensor) -> Tensor:
        """KL(model || lens) in bits per token."""
        zeros = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return lens.scores(logits, final, zeros)["kl_bits"]

    @torch.no_grad()
    def judge_on_text(self, ridge: dict[str, Tensor]) -> pd.DataFrame:
        """KL(model || lens) on test text by depth, beside the mean prediction as the floor.

        Intervals over documents: neighbours in one text are not independent.
        """
        held, document = self.held_out("test", 16 if self.cfg.quick else 128)
        final = lens.reference(self.readout.read(held[-1]))
        other = self.validation
        mean_p = self.readout.read(other[-1]).softmax(-1).mean(0)
        measured = [("mean prediction", -1, (final.plogp - final.p @ mean_p.log()) * lens.BITS)]
        for i, depth in enumerate(self.run.track(self.depths, "depths on text")):
            translator = ridge["translator"][i].float().to(held.device)
            measured.append(("norm", depth, self._kl(final, self.readout.read(held[i]))))
            ridged = self._ridge(held[i], depth, translator)
            measured.append(("ridge", depth, self._kl(final, ridged)))
        rows = []
        for name, depth, kl in measured:
            ci = stats.mean_ci(kl.cpu().numpy(), document.cpu().numpy(), self.cfg.seed)
            percent = 100 * depth / self.model.n_layers if depth >= 0 else float("nan")
            rows.append(
                {"lens": name, "depth": depth, "depth_pct": percent, "tokens": len(kl)} | ci
            )
        return pd.DataFrame(rows)

    # 3. Readouts

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt], residuals: dict, ridge: dict) -> pd.DataFrame:
        """One row per prompt, depth and lens."""
        encoded, _ = encode(self.model, prompts)
        wrong = derange(encoded, self.cfg.seed)
        content = [self._content(e) for e in encoded]
        translators = ridge["translator"].float().to(self.model.device)
        frames = []
        for start in self.run.track(range(0, len(encoded), 32), "readouts"):
            resid = residuals["resid"][start : start + 32].to(self.model.device)
            these = slice(start, start + len(resid))
            final = lens.reference(self.readout.read(resid[:, -1]))
            for i, depth in enumerate(self.depths):
                x = resid[:, i]
                norm, raw = self.readout.read_both(x)
                lenses = {"norm": norm, "raw": raw, "ridge": self._ridge(x, depth, translators[i])}
                if self.cfg.lens == "next_ln1":
                    lenses["next_ln1"] = self.readout.read_next(x, depth)
                for name, logits in lenses.items():
                    frame = self._rows(encoded[these], wrong[these], logits, final, depth, name)
                    frame["resid_rms"] = self.readout.scale(x)[:, 0].cpu().numpy()
                    frame["top1_in_prompt"] = [
                        token in ids for token, ids in zip(frame.top1, content[these], strict=True)
                    ]
                    frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def _rows(
        self, encoded: list[Encoded], wrong: list[int], logits: Tensor, final, depth: int, name: str
    ) -> pd.DataFrame:
        answer = torch.tensor([e.answer_id for e in encoded], device=logits.device)
        other = torch.tensor(wrong, device=logits.device)
        values = lens.scores(logits, final, answer)
        values["wrong_rank"] = lens.rank(logits, other)
        about = [
            {k: getattr(e.prompt, k) for k in ("id", "set", "family", "template", "group", "format",
                                               "direction")} for e in encoded
        ]  # fmt: skip
        place = {"lens": name, "stream": "post" if depth else "embed", "depth": depth,
                 "depth_pct": 100 * depth / self.model.n_layers}  # fmt: skip
        measured = pd.DataFrame({key: value.cpu().numpy() for key, value in values.items()})
        return pd.concat([pd.DataFrame(about).assign(**place), measured], axis=1)

    def _ridge(self, resid: Tensor, depth: int, translator: Tensor) -> Tensor:
        """The ridge lens; at the last depth the map is known, it is ln_final itself."""
        if depth == self.model.n_layers:
            return self.readout.read(resid)
        return self.readout.translate(resid, translator)

    def _content(self, e: Encoded) -> set[int]:
        """Ids of the prompt's words other than the answer: what a copy can be of."""
        words = {i for i in e.ids if any(c.isalnum() for c in self.model.decode([i]))}
        return words - {e.answer_id}

    @torch.no_grad()
    def read_untrained(self, prompts: Sequence[Prompt]) -> pd.DataFrame:
        """The norm lens on the facts in a model of the same shape that has learned nothing."""
        twin = self.run.model(random_init=True)
        readout = lens.Readout(twin.bridge)
        encoded, _ = encode(twin, [p for p in prompts if p.set == "facts"])
        resid = self._last(twin, encoded).to(twin.device)
        final = lens.reference(readout.read(resid[:, -1]))
        wrong = derange(encoded, self.cfg.seed)
        return pd.concat(
            [
                self._rows(encoded, wrong, readout.read(resid[:, i]), final, depth, "untrained")
                for i, depth in enumerate(self.depths)
            ],
            ignore_index=True,
        )

    @torch.no_grad()
    def top_tokens(self, prompts: Sequence[Prompt], residuals: dict, ridge: dict) -> pd.DataFrame:
        """The five likeliest tokens of each fact at each depth, through the chosen lens."""
        encoded, _ = encode(self.model, prompts)
        rows = []
        for i, depth in enumerate(self.depths):
            x = residuals["resid"][:, i].to(self.model.device)
            translator = ridge["translator"][i].float().to(x.device)
            match self.cfg.lens:
                case "ridge":
                    logits = self._ridge(x, depth, translator)
                case "next_ln1":
                    logits = self.readout.read_next(x, depth)
                case name:
                    logits = self.readout.read_both(x)[name == "raw"]
            top = logits.softmax(-1).topk(5)
            for e, probs, ids in zip(
                encoded, top.values.tolist(), top.indices.tolist(), strict=True
            ):
                if e.prompt.set == "facts":
                    rows += [
                        {"id": e.prompt.id, "text": e.prompt.text, "answer": e.prompt.answer,
                         "depth": depth, "rank": r + 1, "token": self.model.decode([token]),
                         "p": p, "is_answer": token == e.answer_id}
                        for r, (p, token) in enumerate(zip(probs, ids, strict=True))
                    ]  # fmt: skip
        return pd.DataFrame(rows)

    @torch.no_grad()
    def compare_with_model(self, prompts: Sequence[Prompt], residuals: dict) -> dict[str, object]:
        """The readout at the last depth against the model's own output, prompt by prompt."""
        encoded, left_out = encode(self.model, prompts)
        gaps = []
        for e, resid in zip(encoded[:8], residuals["resid"], strict=False):
            ids = torch.tensor([e.ids], device=self.model.device)
            own = self.model.bridge(ids)[0, -1].float()
            read = self.readout.read(resid[-1].to(own.device))
            logp = (read.log_softmax(-1) - own.log_softmax(-1)).abs().max().item()
            gaps.append((logp, (read.softmax(-1) - own.softmax(-1)).abs().max().item()))
        return {
            "compared": len(gaps),
            "largest_gap_logp": max(g[0] for g in gaps),
            "largest_gap_p": max(g[1] for g in gaps),
            "left_out": left_out,
            "corpus": f"docstrings of {' and '.join(corpus.PACKAGES)}",
            "corpus_sha": corpus.digest(self.docs),
        }

    # 4. Confidence

    def _facts(self, prompts: Sequence[Prompt], residuals: dict) -> tuple[list[Encoded], Tensor]:
        encoded, _ = encode(self.model, prompts)
        at = [i for i, e in enumerate(encoded) if e.prompt.set == "facts"]
        return [encoded[i] for i in at], residuals["resid"][at].to(self.model.device)

    @torch.no_grad()
    def temperatures(self, prompts: Sequence[Prompt], residuals: dict) -> pd.DataFrame:
        """The model's output at several temperatures, from one forward pass."""
        encoded, resid = self._facts(prompts, residuals)
        logits = self.readout.read(resid[:, -1])
        answer = torch.tensor([e.answer_id for e in encoded], device=logits.device)
        frames = []
        for t in TEMPERATURES:
            values = lens.scores(logits / t, lens.reference(logits / t), answer)
            columns = {
                k: values[k].cpu().numpy() for k in ("p_answer", "answer_rank", "entropy_bits")
            }
            frames.append(
                pd.DataFrame({"id": [e.prompt.id for e in encoded], "temperature": t} | columns)
            )
        return pd.concat(frames, ignore_index=True)

    @torch.no_grad()
    def fit_temperatures(self, prompts: Sequence[Prompt], residuals: dict) -> pd.DataFrame:
        """The temperature that brings the norm lens nearest to the model, by depth.

        Fitted on every other fact, judged on the others.
        """
        _, resid = self._facts(prompts, residuals)
        final = self.readout.read(resid[:, -1])
        rows = []
        for i, depth in enumerate(self.depths):
            logits = self.readout.read(resid[:, i])
            t = lens.fitted_temperature(logits[::2], final[::2])
            judged = lens.reference(final[1::2])
            zeros = torch.zeros(len(judged.p), dtype=torch.long, device=final.device)
            row = {"depth": depth, "depth_pct": 100 * depth / self.model.n_layers, "temperature": t}
            for name, by in (("kl_bits_at_1", 1), ("kl_bits_fitted", t)):
                row[name] = lens.scores(logits[1::2] / by, judged, zeros)["kl_bits"].mean().item()
            rows.append(row)
        return pd.DataFrame(rows)
