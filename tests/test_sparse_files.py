"""Transcoders to disk and back, in three formats; what the other libraries say is on record."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transcoder_libraries import CASES, RECORD, D, K, N, drawn, inputs

from lens_utils.errors import BadInput
from lens_utils.sparse import Transcoder
from lens_utils.sparse_files import load_one, load_transcoders, save_set, save_sparsify


def same(one: Transcoder, other: Transcoder) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    alike = mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    return alike and one.k == other.k and torch.equal(one(inputs()), other(inputs()))


@pytest.mark.parametrize("kind", [{}, {"skip": True}, {"k": None}, {"k": None, "jump": True}])
def test_a_set_comes_back_as_it_was(tmp_path, kind):
    made = {layer: drawn(layer, **kind) for layer in (0, 2, 11)}
    save_set(tmp_path, made, "someone/model")
    found = load_transcoders(tmp_path, D, model_name="someone/model")
    assert found.keys() == made.keys()
    assert all(same(found[layer], made[layer]) for layer in made)
    assert load_transcoders(tmp_path, layers=[11]).keys() == {11}


def test_a_set_has_the_names_circuit_tracer_reads(tmp_path):
    one = drawn(0, k=None, jump=True, skip=True)
    save_set(tmp_path, {0: one}, "someone/model", scan="mine")
    held = load_file(tmp_path / "layer_0.safetensors")
    assert {n: tuple(t.shape) for n, t in held.items()} == {
        "W_enc": (N, D), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "W_skip": (D, D),
        "activation_function.threshold": (N,)}  # fmt: skip
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config.items() >= {"model_kind": "transcoder_set", "model_name": "someone/model",
                              "feature_input_hook": "mlp.hook_in", "scan": "mine",
                              "feature_output_hook": "mlp.hook_out"}.items()  # fmt: skip


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_folders_come_back_as_they_were(tmp_path, skip):
    made = {layer: drawn(layer, skip=skip) for layer in (2, 10)}
    save_sparsify(tmp_path, made)
    found = load_transcoders(tmp_path, D)
    assert found.keys() == made.keys()
    assert all(same(found[layer], made[layer]) for layer in made)
    assert same(load_one(tmp_path / "layers.2.mlp"), made[2])
    held = load_file(tmp_path / "layers.2.mlp" / "sae.safetensors")
    assert held.keys() - {"W_skip"} == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}


def test_a_folder_of_saelens_is_transposed(tmp_path):
    """Written by hand as SAELens writes; the record holds its own word."""
    one = drawn(0, k=None, jump=True)
    tensors = {name: p.clone() for name, p in one.named_parameters()}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "jumprelu_transcoder", "metadata": {"hook_name": "blocks.7.ln2.x"}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert same(load_transcoders(tmp_path, D)[7], one)


@pytest.mark.parametrize("library", CASES)
def test_other_libraries_agree(library, tmp_path):
    pytest.importorskip(library)
    assert max(CASES[library](tmp_path).values()) < 1e-5


def test_other_libraries_agreed_when_they_were_asked():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record.keys() == CASES.keys()
    for library, said in record.items():
        found = said["largest differences"]
        assert len(found) >= 4 and max(found.values()) < 1e-5, library


def a_set(folder, **kind):
    save_set(folder, {0: drawn(0, **kind), 1: drawn(1, **kind)}, "someone/model")


def retensored(name, change):
    def spoil(folder):
        path = folder / "layer_1.safetensors"
        tensors = load_file(path)
        tensors[name] = change(tensors.pop(name)) if name in tensors else change(None)
        save_file({n: t for n, t in tensors.items() if t is not None}, path)

    return spoil


def rewritten(file, text):
    return lambda folder: (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "layer_1.safetensors").unlink(), "no transcoder for layer 1"),
        (rewritten("layer_1.safetensors", "no tensors"), "cannot be read"),
        (rewritten("config.yaml", "[not: closed"), "cannot be read"),
        (rewritten("config.yaml", "just text"), "holds no settings"),
        (rewritten("config.yaml", "activation: topk"), "says topk but not k"),
        (rewritten("config.yaml", "{activation: topk, k: 25}"), "k = 25 of 24 features"),
        (rewritten("config.yaml", "activation: softmax"), "no activation 'softmax'"),
        (retensored("b_dec", lambda t: None), "has no b_dec"),
        (retensored("b_enc", lambda t: t[1:]), "b_enc is"),
        (retensored("W_dec", lambda t: t[0]), "have to be matrices"),
        (retensored("more", lambda t: torch.zeros(1)), "holds more"),
    ],
)
def test_a_damaged_set_is_refused_in_one_line(tmp_path, spoil, said):
    a_set(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=said) as error:
        load_transcoders(tmp_path, D, layers=[0, 1])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "cannot be read"),
        ('{"transcode": false, "k": 4}', "autoencoder, not a transcoder"),
        ('{"transcode": true, "activation": "groupmax"}', "'groupmax' cannot be read"),
        ('{"transcode": true, "k": 99}', "k = 99 of 24"),
    ],
)
def test_a_strange_sparsify_folder_is_refused(tmp_path, config, said):
    save_sparsify(tmp_path, {0: drawn(0)})
    (tmp_path / "layers.0.mlp" / "cfg.json").write_text(config)
    with pytest.raises(BadInput, match=said):
        load_transcoders(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "topk"}, "'topk', which is no transcoder"),
        ({"architecture": "transcoder", "normalize_activations": "layer_norm"}, "layer_norm"),
        ({"architecture": "transcoder"}, "cannot be read"),
    ],
)
def test_a_strange_folder_of_saelens_is_refused(tmp_path, config, said):
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=said):
        load_one(tmp_path)


def test_another_models_transcoders_are_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no transcoders"):
        load_transcoders(tmp_path)
    a_set(tmp_path)
    with pytest.raises(BadInput, match="of someone/model, not of other/model"):
        load_transcoders(tmp_path, model_name="other/model")
    with pytest.raises(BadInput, match="maps 6 dimensions to 6; the model has 8"):
        load_transcoders(tmp_path, d_model=8)


def test_what_a_format_has_not_is_not_written(tmp_path):
    with pytest.raises(BadInput, match="one activation and one k"):
        save_set(tmp_path, {0: drawn(0), 1: drawn(1, k=K + 1)}, "m")
    with pytest.raises(BadInput, match="not relu from 6 to 6"):
        save_sparsify(tmp_path, {0: drawn(0, k=None)})
    assert not list(tmp_path.iterdir())
