"""Experiment 018: a killed pass goes on to the same weights, shards make one set, and what others
read is what was recorded."""

import json

import pytest
import torch
from toys import code_and_line

from lens_utils import files, provenance, transcoder_sets
from lens_utils.__main__ import load
from lens_utils.errors import BadInput, Unfinished
from lens_utils.experiment import BaseConfig, Run, execute
from lens_utils.sparse_files import load_transcoders

FOLDER = provenance.EXPERIMENTS / "018_transcoders"
RUN = load(FOLDER)
import transcoder_pass as training  # noqa: E402  (beside run.py, on the path once it is loaded)

ARGS = ["--tokens", "1200", "--held-out", "200", "--judged", "100", "--tune-tokens", "200",
        "--layers", "1,4", "--passes", "2", "--batch", "128", "--expansion", "1", "--k", "4",
        "--lr", "0.002", "--skip", "none"]  # fmt: skip


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Batches of 200 tokens, two at a time, saved each time; runs go to a folder of this test."""
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    for name, value in {"BATCH": 200, "HELD": 2, "SAVE": 2, "MOMENTS": 4}.items():
        monkeypatch.setattr(training, name, value)

    def run(*more: str) -> Run:
        return execute(RUN.Config, RUN.main, FOLDER / "run.py", [*ARGS, *more])

    return run


def weights(run: Run, name: str = "trained") -> dict[str, torch.Tensor]:
    held = load_transcoders(run.folder / name)
    return {f"{layer}.{n}": p for layer, t in held.items() for n, p in t.named_parameters()}


def test_a_killed_pass_goes_on_to_the_same_weights(small, monkeypatch):
    whole = small()
    learn, calls = training.State.learn, []

    def killed(self, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        learn(self, *args)

    monkeypatch.setattr(training.State, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        small("--tag", "killed")
    monkeypatch.setattr(training.State, "learn", learn)
    again = small("--tag", "killed")
    assert len(list((again.folder / "training").glob("*/[0-9]*"))) == 1, "old states are gone"
    for name in ("trained", "tuned"):
        one, other = weights(whole, name), weights(again, name)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert not torch.equal(weights(whole)["1.W_enc"], weights(whole, "tuned")["1.W_enc"])


def test_shards_of_layers_make_one_set_and_others_read_it(small, tmp_path):
    with pytest.raises(Unfinished, match="curves.parquet: this shard is done, 1 of 2 parts"):
        small("--shard", "0/2")
    with pytest.raises(Unfinished, match="judged"):  # the set is whole, its judgement shared out
        small("--shard", "1/2")
    run = small()
    assert files.read(run.folder / "trained.json")["layers"] == [1, 4]
    reader = Run(FOLDER.with_name("020_attribution_graphs") / "run.py",
                 BaseConfig(model="maze-organism"))  # fmt: skip
    found = transcoder_sets.load(reader)
    assert sorted(found) == [1, 4] and found[1].k == 4
    assert found[4].W_dec.norm(dim=1) == pytest.approx(torch.ones(128), abs=1e-5)
    release = run.folder / "release"
    assert (release / "tuned" / "layer_4.safetensors").exists()
    card = (release / "README.md").read_text()
    assert "128 features, 4 of them active" in card and "licence" in card
    assert json.loads((release / "metrics.json").read_text())["active per token (k)"] == 4
    (run.folder / "trained" / "layer_4.safetensors").write_bytes(b"other")
    with pytest.raises(BadInput, match="not what 018_transcoders recorded"):
        transcoder_sets.load(reader)
    with pytest.raises(BadInput, match="no transcoders 'nowhere'"):
        transcoder_sets.load(reader, "nowhere")


def test_bad_layers_are_one_line(small, capsys):
    code, line = code_and_line(lambda: small("--layers", "1,9"), capsys)
    assert code == 2 and "numbers from 0 to 5" in line
