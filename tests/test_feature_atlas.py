"""019 on a tiny model of text: every stage, its files, a judge and an explainer, and bad input."""

import json

import llm
import pandas as pd
import pytest
import torch
from small_transcoders import random_transcoders
from toys import code_and_line

import lens_utils.feature_judges  # as itself, to be patched: not its lazy stand-in
from lens_utils import feature_store, files, provenance
from lens_utils.__main__ import load
from lens_utils.experiment import execute
from lens_utils.models import load_model
from lens_utils.sparse import initial
from lens_utils.sparse_files import save_set

FOLDER = provenance.EXPERIMENTS / "019_feature_atlas"
TEXT = "the cat sat on a mat and it was big red hat she they he ran to dog"


class Fake(llm.Model):
    """Says the same of every feature."""

    model_id, can_stream = "fake", False

    def execute(self, prompt, stream, response, conversation):
        yield '{"label": "<b>words</b>"}'


@pytest.fixture
def atlas(saved, tmp_path, monkeypatch):
    """atlas(*flags): the experiment's run on a tiny Llama, random transcoders and a text file."""
    model = saved("llama")
    transcoders = random_transcoders(load_model(str(model), device="cpu"), k=3, latents=160)
    save_set(tmp_path / "set", {n: t.float() for n, t in transcoders.items()}, "tiny")
    draw, vocabulary = torch.Generator().manual_seed(0), TEXT.split()
    picks = torch.randint(len(vocabulary), (60, 60), generator=draw).tolist()
    (tmp_path / "text").mkdir()
    for n, words in enumerate(picks):
        (tmp_path / "text" / f"{n}.txt").write_text(" ".join(vocabulary[w] for w in words))
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    known = llm.get_model_aliases
    monkeypatch.setattr(llm, "get_model_aliases", lambda: {**known(), "fake": Fake()})
    module = load(FOLDER)
    monkeypatch.setattr("atlas_pass.QUICK_TOKENS", 2000)
    monkeypatch.setattr("atlas_pass.QUICK_POOL", 500)
    given = ["--quick", "--model", str(model), "--text", str(tmp_path / "text"), "--length", "40",
             "--transcoders", str(tmp_path / "set")]  # fmt: skip
    return lambda *flags: execute(module.Config, module.main, FOLDER / "run.py", [*given, *flags])


def test_every_file_of_an_atlas(atlas, monkeypatch):
    lengths = lambda model, *texts: torch.tensor([float(len(text)) for text in texts[-1]])  # noqa: E731
    for name in ("yes_less_no", "losses"):  # the tiny model's context is too short for questions
        monkeypatch.setattr(lens_utils.feature_judges, name, lengths)
    once = atlas()
    run = atlas("--layers", "0,2", "--judge", once.cfg.model, "--judged", "2", "--tag", "more",
                "--explainer", "fake", "--explained", "3")  # fmt: skip
    labels = files.read(run.folder / "labels.csv")
    contract = {"layer", "feature", "label", "accuracy", "shuffled", "auroc", "density", "max",
                "source"}  # fmt: skip
    assert contract <= set(labels.columns) and len(labels) == 320
    assert (labels.groupby("layer").feature.nunique() == 160).all()
    again = labels[labels.layer == 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, files.read(once.folder / "labels.csv"))
    text = files.read(run.folder / "text.json")
    assert {"traces", "harmless prompts", "safety prompts"} <= text["by_source"].keys()
    stats = files.read(run.folder / "features.parquet")
    kept = stats.n_fired.groupby(stats.layer).sum() / (3 * stats.n_fired / stats.density).max()
    assert (kept.between(0.5, 1)).all(), "at most k features fire at a token"
    written = files.read(run.folder / "written.csv")
    assert len(written) == 6 and set(written.label) == {"<b>words</b>"}
    judged = files.read(run.folder / "judged.csv")
    assert set(judged.test) == {"detection", "fuzzing", "surprisal"}
    assert judged.score.between(0, 1).all()
    held = feature_store.read(run.folder / "atlas.sqlite", "explanations")
    assert set(held.source) == {"rule", "llm"} and len(held) == 326
    page = (run.folder / "atlas" / "layer_2.html").read_text(encoding="utf-8")
    assert "<b>words" not in page and "\\u003cb\\u003ewords" in page
    content = json.loads((run.folder / "atlas" / "layer_0.json").read_text())
    assert len(content["features"]) == 160 and content["layers"] == [0, 2]
    _agree(run, content, stats)
    summary = files.read(run.folder / "summary.json")
    assert summary["layers"] == 2 and summary["labels written by fake"] == 6


def _agree(run, content, stats):
    """Examples of the page: the peak is the strongest value, at the token it was found at."""
    top = stats[stats.layer == 0].set_index("feature_id")["max"]
    examples = feature_store.read(run.folder / "atlas.sqlite", "examples", 0)
    tokens = feature_store.read(run.folder / "atlas.sqlite", "tokens")
    words = tokens.set_index(["sequence_id", "token_idx"]).decoded_token
    for feature in content["features"][:10]:
        own = examples[examples.feature_id == feature["id"]]
        for (sample, peak, ids, values), row in zip(feature["examples"], own.itertuples(),
                                                    strict=False):  # fmt: skip
            assert sample == row.sample and values[peak] == pytest.approx(row.strength, abs=2e-2)
            assert content["words"][ids[peak]] == words[row.sequence_id, row.token_idx]
        if feature["examples"]:
            assert feature["examples"][0][3][feature["examples"][0][1]] == pytest.approx(
                top[feature["id"]], rel=1e-2
            )


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("--layers", "1"), "there is no transcoder for layer 1"),
     (("--layers", "two"), "all, or numbers with commas"),
     (("--transcoders", "/nowhere"), "no transcoders '/nowhere'")],
)  # fmt: skip
def test_bad_input_is_one_line(atlas, capsys, flags, said):
    code, line = code_and_line(lambda: atlas(*flags), capsys)
    assert code == 2 and said in line


def test_transcoders_of_another_width_are_refused(atlas, capsys, tmp_path):
    save_set(tmp_path / "wide", {0: initial(8, 8, 16, 2, 0)}, "other")
    code, line = code_and_line(lambda: atlas("--transcoders", str(tmp_path / "wide")), capsys)
    assert code == 2 and "the model has 32" in line
