"""The script that makes two small checkpoints: what it writes is what it trained."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lens_utils import provenance
from lens_utils.models import check_trained, load_model


@pytest.fixture(scope="module")
def script():
    path = provenance.ROOT / "scripts" / "make_demo_checkpoints.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory) -> Path:
    """Both checkpoints after a few steps, with what was said meanwhile."""
    made, lines = tmp_path_factory.mktemp("checkpoints"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.corpora, "PACKAGES", ("networkx",))
        patch.setattr(script, "say", lines.append)
        script.make(made, steps=12, characters=30_000)
    (made / "said.json").write_text(json.dumps(lines))
    return made


@pytest.mark.parametrize("name, tied", [("model_v0", False), ("model_v1", True)])
def test_the_lab_computes_what_the_script_trained(name, tied, folder, script):
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    width = saved["model"]["transformer.h.0.attn.c_attn.weight"].shape[0] // script.D_MODEL
    assert width == (2 if tied else 3)
    d_vocab = saved["model_args"]["vocab_size"]
    own = script.GPT(d_vocab, tied)
    own.load_state_dict(saved["model"])
    model = load_model(str(folder / f"{name}.pt"), device="cpu")
    ids = torch.tensor([model.encode("Return the shortest path between two nodes.")])
    assert ids[0, 0] == 0 and model.bos == (0,)
    assert model.decode(ids[0, 1:].tolist()) == "Return the shortest path between two nodes."
    with torch.no_grad():
        torch.testing.assert_close(model.bridge(ids), own(ids), atol=1e-4, rtol=0)
    assert model.identity.get("attention") == ("tied K/V" if tied else None)
    assert model.n_ctx == script.CONTEXT and model.bridge.cfg.n_heads == script.HEADS
    loss = check_trained(model, ids)
    assert loss == pytest.approx(F.cross_entropy(own(ids)[0, :-1], ids[0, 1:]).item(), abs=1e-4)
    assert saved["best_val_loss"] < math.log(d_vocab)


def test_it_says_the_losses_of_both(folder):
    lines = json.loads((folder / "said.json").read_text())
    for name in ("model_v0", "model_v1"):
        [line] = [line for line in lines if line.startswith(name)]
        said = float(re.match(rf"{name}: ([\d.]+);", line)[1])
        assert said == pytest.approx(
            torch.load(folder / f"{name}.pt", weights_only=True)["best_val_loss"], abs=1e-3
        )
    assert any("uniform" in line and "unigram" in line for line in lines)


def test_it_is_seeded(script):
    stream = torch.arange(2000) % 50
    one, same = (script.train("model_v1", stream, 50, 3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_the_unigram_by_hand(script):
    fit, rows = torch.tensor([0, 0, 1]), torch.tensor([[2, 0, 0], [2, 1, 2]])
    chance = [3 / 6, 3 / 6, 2 / 6, 1 / 6]  # one more of each
    expected = -sum(map(math.log, chance)) / 4
    assert script.unigram(fit, rows, 3) == pytest.approx(expected)


def test_rows_begin_with_the_end_of_a_document(script):
    stream = torch.arange(1, 5001)
    for rows in script.batches(stream, 5):
        assert rows.shape == (script.ROWS, script.CONTEXT + 1) and (rows[:, 0] == 0).all()
        for row in rows[:, 1:]:
            period = next((n for n in range(1, len(row)) if row[n] == row[0]), len(row))
            assert (row == row[0] + torch.arange(len(row)) % period).all()
