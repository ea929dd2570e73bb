"""Tables of experiment 019: features in figures, the database and its pages, the summary."""

import json
from typing import Any

import numpy as np
import pandas as pd
import torch
from atlas_pass import Corpus, of_layer

from lens_utils import feature_page, feature_spans, feature_stats, feature_store, files
from lens_utils.experiment import Run
from lens_utils.stats import mean_ci

QUANTILES = (0.1, 0.5, 0.9, 0.99)
LOGITS = 8
DENSE = 0.1
ABOUT = {"piece": "the token", "token": "the token", "prefix": "the token", "suffix": "the token",
         "class": "the token", "position": "the position", "source": "the kind of text",
         "part": "the part"}  # fmt: skip


def features(corpus: Corpus, held: dict[str, torch.Tensor]) -> pd.DataFrame:
    """One row per feature: frequency, values, positions, spans, logits."""
    edges = feature_stats.edges().tolist()
    parts = []
    for layer in corpus.layers:
        own = of_layer(held, layer)
        count, n_tokens = own["count"].numpy(), int(own["tokens"])
        fires = np.maximum(count, 1)
        mean = own["total"].numpy() / fires
        value, fired = own["spread/value"].numpy(), own["spread/token"].numpy() >= 0
        values = np.where(fired, value, np.nan)
        pieces = [[corpus.model.decode([int(i)]) for i in ids] for ids in own["effect_ids"]]
        effects = own["effects"].tolist()
        pairs = [list(zip(p, (round(e, 4) for e in es), strict=True))
                 for p, es in zip(pieces, effects, strict=True)]  # fmt: skip
        with np.errstate(invalid="ignore"), np.testing.suppress_warnings() as quiet:
            quiet.filter(RuntimeWarning)
            quantiles = np.nanquantile(values, QUANTILES, axis=1)
        table = pd.DataFrame({
            "layer": layer,
            "feature_id": np.arange(len(count)),
            "n_fired": count.astype(int),
            "density": count / n_tokens,
            "mean": np.where(count > 0, mean, 0),
            "std": np.sqrt(np.maximum(own["squares"].numpy() / fires - mean**2, 0)),
            "max": own["top/value"][:, 0].numpy(),
            "position": np.where(count > 0, own["position"].numpy() / fires, np.nan),
            **{f"q{round(100 * q)}": row for q, row in zip(QUANTILES, quantiles, strict=True)},
            "promotes": [json.dumps(p[:LOGITS], ensure_ascii=False) for p in pairs],
            "suppresses": [json.dumps(p[LOGITS:], ensure_ascii=False) for p in pairs],
            "histogram": [json.dumps([[round(e, 5), int(n)] for e, n in zip(edges, row, strict=True)
                                      if n]) for row in own["histogram"].tolist()],
        })  # fmt: skip
        for family, (names, codes) in corpus.spans.items():
            tally, size = own[f"span/{family}"].numpy(), np.bincount(codes[codes >= 0])
            rate = tally / np.maximum(size, 1)
            table[f"most_in_{family}"] = np.where(count > 0, np.array(names)[rate.argmax(1)], "")
            table[f"share_in_{family}"] = tally.max(1) / fires
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def spans(draws: pd.DataFrame, made: pd.DataFrame) -> pd.DataFrame:
    """The best feature of each part of a trace over all layers, with its label."""
    best = feature_spans.of_all(draws)
    if not len(best):
        return pd.DataFrame({"span": pd.Series(dtype=str)})
    return best.merge(made[["layer", "feature", "label"]], on=["layer", "feature"], how="left")


def examples(corpus: Corpus, held: dict[str, torch.Tensor], layer: int) -> pd.DataFrame:
    """Examples of every feature: the strongest, and those drawn from all its fires, by value."""
    own, tokens, parts = of_layer(held, layer), corpus.tokens, []
    for sample in feature_stats.SHOWN:
        feature, place = (own[f"{sample}/token"] >= 0).nonzero(as_tuple=True)
        token = own[f"{sample}/token"][feature, place].numpy()
        around = own[f"{sample}/around"][feature, place].float().tolist()
        parts.append(pd.DataFrame({
            "layer": layer, "feature_id": feature.numpy(), "sample": sample,
            "sequence_id": tokens.row[token], "token_idx": tokens.pos[token],
            "strength": own[f"{sample}/value"][feature, place].numpy(),
            "around": [json.dumps([round(v, 3) for v in row]) for row in around],
        }))  # fmt: skip
    table = pd.concat(parts, ignore_index=True)
    table = table.sort_values(["feature_id", "sample", "strength"], ascending=[True, False, False])
    table["rank"] = table.groupby(["feature_id", "sample"]).cumcount()
    # The strongest stand first: "top" behind "spread" in the alphabet, so it is sorted downwards.
    return table.sort_values(["feature_id", "sample", "rank"], ascending=[True, False, True])


def atlas(
    run: Run,
    corpus: Corpus,
    held: dict[str, torch.Tensor],
    stats: pd.DataFrame,
    made: pd.DataFrame,
    written: pd.DataFrame,
) -> dict[str, Any]:
    """Write the database, its JSON and the pages into the run's folder; what was written."""
    tokens = corpus.tokens
    text = pd.DataFrame({
        "sequence_id": tokens.row, "token_idx": tokens.pos, "token": tokens.ids,
        "decoded_token": [tokens.pieces[int(i)] for i in tokens.ids], **dict(tokens.spans),
    })  # fmt: skip
    labels = made.rename(columns={"feature": "feature_id"}).drop(columns=["density", "max"])
    labels = labels.assign(model_name="", prompt_version="rules 1")
    labels["quality"] = labels.accuracy
    if len(written):
        labels = pd.concat([labels, written.rename(columns={"feature": "feature_id"})])
    about = {"model": corpus.model.identity, "layers": corpus.layers, "text": corpus.said(),
             "transcoders": run.cfg.transcoders}  # fmt: skip
    path = run.folder / "atlas.sqlite"
    found = pd.concat([examples(corpus, held, layer) for layer in corpus.layers])
    feature_store.write(
        path, {"features": stats, "explanations": labels, "examples": found, "tokens": text}, about
    )
    pages = []
    for layer in corpus.layers:
        place = run.folder / "atlas" / f"layer_{layer}.html"
        shown = feature_page.content(path, layer)
        compact = json.dumps(shown, ensure_ascii=False, separators=(",", ":"))
        files.write_bytes(place.with_suffix(".json"), compact.encode())
        files.write_bytes(place, feature_page.page(shown).encode())
        pages.append(f"atlas/{place.name}")
    return {"database": path.name, "bytes": path.stat().st_size, "sha256": files.sha256(path),
            "pages": pages, "features": len(stats), "examples": len(found),
            "explanations": len(labels)}  # fmt: skip


def summarise(
    corpus: Corpus,
    stats: pd.DataFrame,
    made: pd.DataFrame,
    scores: pd.DataFrame,
    spans: pd.DataFrame,
    judged: pd.DataFrame,
    written: pd.DataFrame,
) -> dict[str, Any]:
    """What the findings quote."""
    alive = stats[stats.n_fired > 0]
    known = made[made.accuracy.notna()]
    found = {
        "layers": len(corpus.layers),
        "features": len(stats),
        "tokens of text, both halves": sum(corpus.said()["tokens"].values()),
        "features that never fired (%)": 100 * float((stats.n_fired == 0).mean()),
        f"features that fired at more than {DENSE:.0%} of tokens (%)":
            100 * float((stats.density > DENSE).mean()),
        "median density of those that fired (%)": 100 * float(alive.density.median()),
        "features with enough fires for a label (%)": 100 * len(known) / len(made),
        "held-out balanced accuracy of the labels": mean_ci(known.accuracy.to_numpy()),
        "the same, labels of other features": mean_ci(known.shuffled.to_numpy()),
        "held-out AUROC of a feature for its label": mean_ci(known.auroc.to_numpy()),
        "share of tokens with the label at which the feature fires":
            mean_ci(known.precision.to_numpy()),
        "labels of accuracy 0.9 and more (%)": 100 * float((known.accuracy >= 0.9).mean()),
    }  # fmt: skip
    about = known.kind.map(ABOUT).fillna("tokens around")
    for group in ("the token", "tokens around", "the part", "the kind of text", "the position"):
        found[f"labels about {group} (%)"] = 100 * float((about == group).mean())
    for test in ("detection", "fuzzing", "intruder"):
        of = scores[scores.test == test]
        unit = "share found" if test == "intruder" else "AUROC"
        found[f"{test}, by rule ({unit})"] = mean_ci(of.score.to_numpy())
        found[f"{test}, by rule, control ({unit})"] = mean_ci(of.shuffled.to_numpy())
    for row in spans.itertuples():
        found[f"best feature for {row.span}: AUROC"] = float(row.auroc)
        found[f"best feature for {row.span}: AUROC, moved parts"] = float(row.null)
    if len(judged):
        for name, of in judged.groupby("test"):
            found[f"{name} by {corpus.cfg.judge} (AUROC)"] = mean_ci(of.score.to_numpy())
            found[f"{name} by {corpus.cfg.judge}, control (AUROC)"] = mean_ci(
                of.shuffled.to_numpy()
            )
    if len(written):
        found[f"labels written by {corpus.cfg.explainer}"] = int((written.label != "").sum())
    return found
