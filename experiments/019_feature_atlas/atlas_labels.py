"""Labels of experiment 019, and what they are worth."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from atlas_pass import PHASES, Corpus, of_layer

from lens_utils import feature_endpoint as endpoint
from lens_utils import feature_facts, feature_labels, feature_scores, feature_spans
from lens_utils.console import say
from lens_utils.experiment import Run
from lens_utils.feature_judges import judges
from lens_utils.feature_labels import Fires, Pool, Rules
from lens_utils.feature_stats import AFTER, BEFORE

QUICK_SCORED, QUICK_DRAWS, DRAWS = 16, 19, 99
SOURCE = "rule"


class Atlas:
    """What was gathered, with the text it was gathered from."""

    def __init__(self, cfg, corpus: Corpus, held: dict[str, torch.Tensor]) -> None:
        self.cfg, self.corpus, self.held = cfg, corpus, held

    @cached_property
    def kinds(self) -> list[feature_facts.Kind]:
        return feature_facts.facts(self.corpus.tokens)

    def n_features(self, layer: int) -> int:
        return len(self.held[f"{layer}/count"])

    def fires(self, layer: int) -> Fires:
        """The samples for fitting and for testing."""
        own = of_layer(self.held, layer)
        token = torch.cat([own["fit/token"], own["test/token"]], dim=1)
        value = torch.cat([own["fit/value"], own["test/value"]], dim=1)
        feature, place = (token >= 0).nonzero(as_tuple=True)
        return Fires(feature.numpy(), token[feature, place].numpy(),
                     value[feature, place].double().numpy())  # fmt: skip

    def pool(self, layer: int) -> Pool:
        own = of_layer(self.held, layer)
        fires = Fires(*(own[f"pool/{name}"].numpy() for name in ("feature", "token")),
                      own["pool/value"].double().numpy())  # fmt: skip
        return Pool(own["pool/seen"].numpy(), fires)

    def label(self, stats: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
        """One label of every feature, with how well it tells on held-out rows."""
        parts = []
        for layer in layers:
            found = feature_labels.explain(
                self.corpus.tokens, self.kinds, self.fires(layer), self.pool(layer),
                self.n_features(layer), self.cfg.seed,
            )  # fmt: skip
            own = stats[stats.layer == layer]
            found["label"] = np.where(own.n_fired.to_numpy() == 0, "dead feature", found.label)
            found.insert(0, "layer", layer)
            found["density"], found["max"] = own.density.to_numpy(), own["max"].to_numpy()
            found["source"] = SOURCE
            parts.append(found)
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def _rules(self) -> dict[int, Rules]:
        return {}

    def rules(self, layer: int) -> Rules:
        """The labels as rules: fitted again, which is quick, rather than kept on disk."""
        if layer not in self._rules:
            fit = ~self.corpus.tokens.held
            fires, pool = self.fires(layer), self.pool(layer)
            n = self.n_features(layer)
            strong = feature_labels.strongest(fires.where(fit[fires.token]), n)
            self._rules[layer] = feature_labels.fit(self.kinds, strong, pool.where(fit), n)
        return self._rules[layer]

    def chosen(self, layer: int, made: pd.DataFrame, n: int) -> list[int]:
        """Features with a label, drawn at random."""
        known = made[(made.layer == layer) & made.accuracy.notna()].feature.to_numpy()
        rng = np.random.default_rng([self.cfg.seed, layer])
        return sorted(rng.permutation(known)[:n].tolist())

    def score(self, made: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
        """Detection, fuzzing and intruders on held-out rows, for features drawn at random."""
        tokens, rows = self.corpus.tokens, []
        n_scored = QUICK_SCORED if self.cfg.quick else self.cfg.scored
        for layer in layers:
            rng, n = np.random.default_rng([self.cfg.seed, layer]), self.n_features(layer)
            pool, features = self.pool(layer).where(tokens.held), self.chosen(layer, made, n_scored)
            cut = feature_scores.windows(pool, tokens)
            detect, fuzz = feature_scores.by_rule(self.rules(layer), self.kinds)
            trials = feature_scores.detection(pool.fires, cut, features, n, rng)
            marked = {f: feature_scores.fuzzing(trial, rng) for f, trial in trials.items()}
            scores = {"detection": feature_scores.scored(trials, detect, rng),
                      "fuzzing": feature_scores.scored(marked, fuzz, rng)}  # fmt: skip
            odd = feature_scores.intruders(pool.fires, features, n, rng)
            mixed = feature_scores.strangers(odd, rng)
            for name, of in scores.items():
                rows += [(layer, f, name, own, other) for f, (own, other) in of.items()]
            rows += [(layer, f, "intruder", feature_scores.spot(self.kinds, odd[f]).mean(),
                      feature_scores.spot(self.kinds, mixed[f]).mean()) for f in odd]  # fmt: skip
        return pd.DataFrame(rows, columns=["layer", "feature", "test", "score", "shuffled"])

    def spans(self, layers: Sequence[int]) -> pd.DataFrame:
        """The best features of the parts of a trace, and of parts moved along the text."""
        names, codes = self.corpus.spans.get("part", ([], np.zeros(0, dtype=int)))
        trace = [n for n, name in enumerate(names) if name in PHASES]
        if not trace:
            return pd.DataFrame({"layer": pd.Series(dtype=int)})
        place = np.full(len(names) + 1, -1)
        place[trace] = np.arange(len(trace))
        tokens, parts = self.corpus.tokens, []
        for layer in layers:
            found = feature_spans.best_of_each(
                self.pool(layer), tokens.held, tokens.row, place[codes],
                [names[n] for n in trace], self.n_features(layer),
                QUICK_DRAWS if self.cfg.quick else DRAWS, self.cfg.seed,
            )  # fmt: skip
            parts.append(found.assign(layer=layer))
        return pd.concat(parts, ignore_index=True)

    def judge(self, run: Run, made: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
        """Detection, fuzzing and surprisal by a local model, for a few features of each layer."""
        if not self.cfg.judge:
            return pd.DataFrame({"layer": pd.Series(dtype=int)})
        tokens, rows, model = self.corpus.tokens, [], run.model(other=self.cfg.judge)
        for layer in run.track(layers, "judged"):
            rng, n = np.random.default_rng([self.cfg.seed, layer]), self.n_features(layer)
            pool, features = self.pool(layer).where(tokens.held), self.chosen(
                layer, made, self.cfg.judged)  # fmt: skip
            labels = dict(zip(features, made[made.layer == layer].set_index("feature")
                              .label[features], strict=True))  # fmt: skip
            cut = feature_scores.windows(pool, tokens)
            trials = feature_scores.detection(pool.fires, cut, features, n, rng)
            marked = {f: feature_scores.fuzzing(trial, rng) for f, trial in trials.items()}
            for name, judge in judges(model, labels, tokens.pieces, tokens.ids).items():
                of = marked if name == "fuzzing" else trials
                found = feature_scores.scored(of, judge, rng)
                rows += [(layer, f, name, own, other) for f, (own, other) in found.items()]
        return pd.DataFrame(rows, columns=["layer", "feature", "test", "score", "shuffled"])

    def prompts(self, layer: int, features: Sequence[int]) -> dict[int, str]:
        """The question about each of these features, from examples on the fitting side."""
        own, tokens, found = of_layer(self.held, layer), self.corpus.tokens, {}
        offsets = np.arange(-BEFORE, AFTER + 1)
        for feature in features:
            examples = []
            for sample in ("top", "spread"):
                places = own[f"{sample}/token"][feature].numpy()
                for at, values in zip(
                    places, own[f"{sample}/around"][feature].numpy(), strict=True
                ):
                    if at < 0 or tokens.held[at]:
                        continue
                    inside = at + offsets
                    known = (inside >= 0) & (inside < len(tokens.ids))
                    known[known] = tokens.row[inside[known]] == tokens.row[at]
                    pieces = [tokens.pieces[int(i)] for i in tokens.ids[inside[known]]]
                    examples.append((pieces, values[known].astype(float).tolist()))
            if examples:
                found[feature] = endpoint.prompt(examples, float(own["top/value"][feature, 0]))
        return found

    def write(self, run: Run, made: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
        """Labels by a model of the `llm` package, if one is named; what it costs is said first."""
        if not self.cfg.explainer:
            return pd.DataFrame({"layer": pd.Series(dtype=int)})
        asked = {(layer, f): text for layer in layers for f, text in self.prompts(
            layer, self.chosen(layer, made, self.cfg.explained)).items()}  # fmt: skip
        cost = endpoint.estimate(list(asked.values()), self.cfg.price)
        say(f"{self.cfg.explainer}: " + ", ".join(f"{n:,} {what}" for what, n in cost.items()))
        labels = endpoint.ask_all(
            self.cfg.explainer, dict(enumerate(asked.values())), run.folder / "answers",
            self.cfg.budget,
        )  # fmt: skip
        return pd.DataFrame({
            "layer": [layer for layer, _ in asked], "feature": [f for _, f in asked],
            "label": [labels[n] for n in range(len(asked))], "source": "llm",
            "model_name": self.cfg.explainer, "prompt_version": endpoint.VERSION,
        })  # fmt: skip
