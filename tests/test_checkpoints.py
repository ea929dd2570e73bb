"""A GPT-2 layout file computes what the code that trained it computed."""

import argparse
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from lens_utils.checkpoints import load_gpt2
from lens_utils.errors import BadInput
from lens_utils.models import check_trained, load_model

HEADS, LAYERS, D_MODEL, D_VOCAB, N_CTX = 4, 2, 32, 40, 24
IDS = torch.randint(D_VOCAB, (2, N_CTX), generator=torch.Generator().manual_seed(0))
ARGS = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": D_MODEL, "vocab_size": D_VOCAB}


def nano_state(bias: bool = True, tied_kv: bool = False) -> dict[str, torch.Tensor]:
    """A state dict as nanoGPT saves it, with random weights."""
    generator = torch.Generator().manual_seed(1)
    d = D_MODEL
    shapes = {"wte.weight": (D_VOCAB, d), "wpe.weight": (N_CTX, d), "ln_f.weight": (d,)}
    for i in range(LAYERS):
        shapes |= {
            f"h.{i}.ln_1.weight": (d,),
            f"h.{i}.attn.c_attn.weight": ((2 if tied_kv else 3) * d, d),
            f"h.{i}.attn.c_proj.weight": (d, d),
            f"h.{i}.ln_2.weight": (d,),
            f"h.{i}.mlp.c_fc.weight": (4 * d, d),
            f"h.{i}.mlp.c_proj.weight": (d, 4 * d),
        }
    if bias:
        shapes |= {
            name.replace("weight", "bias"): shape[:1]
            for name, shape in shapes.items()
            if not name.startswith("w")
        }
    state = {
        f"transformer.{name}": 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def nano_forward(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """What nanoGPT computes: an independent reference, with the same names for the same steps."""

    def w(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return state[f"transformer.{name}.weight"], state.get(f"transformer.{name}.bias")

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (D_MODEL,), *w(name), eps=1e-5)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(LAYERS):
        parts = F.linear(norm(x, f"h.{i}.ln_1"), *w(f"h.{i}.attn.c_attn")).split(D_MODEL, dim=-1)
        q, k, v = parts if len(parts) == 3 else (*parts, parts[1])
        z = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        x = x + F.linear(z.transpose(1, 2).flatten(2), *w(f"h.{i}.attn.c_proj"))
        hidden = F.gelu(F.linear(norm(x, f"h.{i}.ln_2"), *w(f"h.{i}.mlp.c_fc")))
        x = x + F.linear(hidden, *w(f"h.{i}.mlp.c_proj"))
    return F.linear(norm(x, "ln_f"), state["lm_head.weight"])


def assert_computes(path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(load_gpt2(path)(IDS).logits, expected, atol=1e-5, rtol=0)
    model = load_model(str(path), device="cpu")
    torch.testing.assert_close(model.bridge(IDS), expected, atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="has no tokenizer"):
        model.encode("x")


@pytest.mark.parametrize("tied_kv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_nanogpt_checkpoint(bias, tied_kv, tmp_path):
    state = nano_state(bias, tied_kv)
    expected = nano_forward(state, IDS)
    mask = torch.ones(1, 1, N_CTX, N_CTX).tril()
    stored = {f"_orig_mod.{name}": x for name, x in state.items()}
    stored |= {f"_orig_mod.transformer.h.{i}.attn.bias": mask for i in range(LAYERS)}
    torch.save({"model": stored, "model_args": ARGS, "iter_num": 3}, tmp_path / "ckpt.pt")
    assert_computes(tmp_path / "ckpt.pt", expected)


def test_an_untied_head_stays_untied(tmp_path):
    state = nano_state() | {"lm_head.weight": torch.randn(D_VOCAB, D_MODEL)}
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    assert_computes(tmp_path / "ckpt.pt", nano_forward(state, IDS))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_hugging_face_state_dict_with_a_file_beside_it(suffix, tmp_path):
    config = GPT2Config(
        vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_positions=N_CTX,
        initializer_range=0.3,
    )  # fmt: skip
    plain = GPT2LMHeadModel(config).eval()
    state = {name: x.clone() for name, x in plain.state_dict().items()}
    path = tmp_path / f"gpt{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    with pytest.raises(BadInput, match=r"write gpt\.json beside it"):
        load_gpt2(path)
    path.with_suffix(".json").write_text('{"n_head": 4}')
    with pytest.raises(BadInput, match="activation None: say gelu, gelu_new"):
        load_gpt2(path)
    path.with_suffix(".json").write_text('{"n_head": 4, "activation": "gelu_new"}')
    assert_computes(path, plain(IDS).logits)


def test_a_tokenizer_beside_it_is_used(tmp_path, make_tokenizer):
    (tmp_path / "tokenizer.json").write_text(make_tokenizer().backend_tokenizer.to_str())
    table = torch.randn(64, D_MODEL)  # as many rows as it has tokens
    state = nano_state() | {"transformer.wte.weight": table, "lm_head.weight": table}
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    assert load_model(str(tmp_path / "ckpt.pt"), device="cpu").encode("the cat") == [1, 4, 6]


def test_it_is_cast_and_it_has_an_untrained_twin(tmp_path):
    torch.save({"model": nano_state(), "model_args": ARGS}, tmp_path / "ckpt.pt")
    half = load_model(str(tmp_path / "ckpt.pt"), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.bridge.parameters()} == {torch.bfloat16}
    twin = load_model(str(tmp_path / "ckpt.pt"), device="cpu", init_seed=0)
    assert not torch.allclose(twin.bridge(IDS), nano_forward(nano_state(), IDS), atol=0.1)


@pytest.mark.parametrize(
    "value, said",
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3, 7: torch.ones(2)}, r"no h\.0\.attn\.c_attn\.weight in it"),
        ({"model": nano_state(), "model_args": ARGS | {"n_head": 5}}, "5 heads do not divide"),
        ({"model": nano_state(), "model_args": ARGS | {"n_head": 0}}, "0 heads do not divide"),
        ({"model": nano_state(), "model_args": {}}, "does not say its number of heads"),
        ({"model": nano_state(), "config": {"n_head": 4, "activation": "swish"}}, "'swish'"),
    ],
)
def test_what_is_refused(value, said, tmp_path):
    torch.save(value, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match=said):
        load_gpt2(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("lost", ["h.1.mlp.c_proj.weight", "h.0.ln_2.weight", "ln_f.weight"])
def test_no_missing_tensor_is_made_up(lost, tmp_path):
    state = nano_state()
    del state[f"transformer.{lost}"]
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match=lost):
        load_gpt2(tmp_path / "ckpt.pt")


def test_no_tensor_is_ignored(tmp_path):
    state = nano_state() | {"transformer.h.0.attn.extra.weight": torch.ones(3)}
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match=r"h\.0\.attn\.extra\.weight"):
        load_gpt2(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("content", ["[1]", "not json"])
def test_an_unreadable_file_beside_it(content, tmp_path):
    torch.save({"model": nano_state(), "model_args": ARGS}, tmp_path / "ckpt.pt")
    (tmp_path / "ckpt.json").write_text(content)
    with pytest.raises(BadInput, match=r"ckpt\.json is not a JSON object"):
        load_gpt2(tmp_path / "ckpt.pt")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"model": Evil(f"touch {tmp_path / 'ran'}")}, tmp_path / "evil.pt")
    with pytest.raises(BadInput, match="never run"):
        load_gpt2(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_truncated_file(suffix, kept, tmp_path):
    path = tmp_path / f"ckpt{suffix}"
    state = {name: x.clone() for name, x in nano_state().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    path.with_suffix(".json").write_text(json.dumps({"n_head": 4, "activation": "gelu"}))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BadInput) as error:
        load_gpt2(path)
    assert "\n" not in str(error.value)


def test_keys_that_are_values_are_said(tmp_path):
    for name, tied in (("plain.pt", False), ("tied.pt", True)):
        torch.save({"model": nano_state(tied_kv=tied), "model_args": ARGS}, tmp_path / name)
        model = load_model(str(tmp_path / name), device="cpu")
        assert model.identity.get("attention") == ("tied K/V" if tied else None)
        # Its null model is drawn within the same architecture.
        twin = load_model(str(tmp_path / name), device="cpu", init_seed=0)
        assert twin.identity.get("attention") == model.identity.get("attention")
        assert twin.identity["weights"].startswith("raw, untrained")
        caught = twin.bridge.run_with_cache(IDS)[1]
        k, v = (caught[f"blocks.1.attn.hook_{part}"] for part in "kv")
        assert torch.allclose(k.flatten(2), v.flatten(2)) == tied


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_heads_and_activation_can_be_given(suffix, tmp_path):
    state = {name: x.clone() for name, x in nano_state().items()}
    path = tmp_path / f"bare{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    with pytest.raises(BadInput, match="does not say its number of heads: give n_head"):
        load_model(str(path), device="cpu")
    with pytest.raises(BadInput, match="activation None: say gelu"):
        load_model(str(path), device="cpu", n_head=HEADS)
    with pytest.raises(BadInput, match="5 heads do not divide d_model 32"):
        load_model(str(path), device="cpu", n_head=5, activation="gelu")
    model = load_model(str(path), device="cpu", n_head=HEADS, activation="gelu")
    torch.testing.assert_close(model.bridge(IDS), nano_forward(state, IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("key, name", [("model_args", "n_head"), ("config", "num_attention_heads")])
def test_what_a_file_says_of_itself_is_not_overruled(key, name, tmp_path):
    said = {name: HEADS, "activation_function": "gelu"}
    torch.save({"model": nano_state(), key: said}, tmp_path / "ckpt.pt")
    assert load_gpt2(tmp_path / "ckpt.pt", n_head=HEADS).config.n_head == HEADS
    with pytest.raises(BadInput, match=r"ckpt\.pt says n_head 4 itself, not 8"):
        load_gpt2(tmp_path / "ckpt.pt", n_head=8)
    with pytest.raises(BadInput, match="says activation 'gelu' itself, not 'relu'"):
        load_gpt2(tmp_path / "ckpt.pt", activation="relu")


def test_a_folder_takes_no_heads(saved):
    with pytest.raises(BadInput, match="says its n_head and activation itself"):
        load_model(str(saved("gpt2")), device="cpu", n_head=4)


def test_a_training_script_s_settings_are_read(tmp_path):
    """argparse.Namespace beside the weights: names and values, but nothing that runs."""
    settings = argparse.Namespace(n_head=HEADS, activation="gelu", lr=1e-3)
    torch.save({"model": nano_state(), "config": settings}, tmp_path / "ckpt.pt")
    assert_computes(tmp_path / "ckpt.pt", nano_forward(nano_state(), IDS))
    settings.lr = Evil(f"touch {tmp_path / 'ran'}")
    torch.save({"model": nano_state(), "config": settings}, tmp_path / "evil.pt")
    with pytest.raises(BadInput, match="never run"):
        load_gpt2(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_vocabulary_may_be_padded_but_not_cut(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()  # 64 tokens
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    state = nano_state()
    for d_vocab, fits in ((70, True), (64, True), (63, False)):
        table = torch.randn(d_vocab, D_MODEL)
        state |= {"transformer.wte.weight": table, "lm_head.weight": table}
        torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
        if fits:
            assert load_model(str(tmp_path / "ckpt.pt"), device="cpu").bridge.cfg.d_vocab == d_vocab
        else:
            with pytest.raises(BadInput, match="has 64 tokens, the model 63"):
                load_model(str(tmp_path / "ckpt.pt"), device="cpu")


def test_a_model_that_knows_nothing_of_its_text(tmp_path):
    """By hand: a model that always expects token 3 with p, and all others alike."""
    state = {name: torch.zeros_like(x) for name, x in nano_state().items()}
    state["transformer.ln_f.bias"][0] = 1.0
    state["transformer.wte.weight"][3, 0] = state["lm_head.weight"][3, 0] = 2.0
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    model = load_model(str(tmp_path / "ckpt.pt"), device="cpu")
    total = math.exp(2) + D_VOCAB - 1
    rows = torch.tensor([[0, 3, 3], [1, 3, 3]])
    assert check_trained(model, rows) == pytest.approx(math.log(total) - 2, abs=1e-5)
    rows[:, 1] = 5  # half of what comes is 3: the mean counts
    assert check_trained(model, rows) == pytest.approx(math.log(total) - 1, abs=1e-5)
    chance = rf"predicts this text no better than chance \({math.log(total):.2f} nats a token"
    with pytest.raises(BadInput, match=chance):
        check_trained(model, torch.tensor([[3, 5, 7]]))
    state["transformer.ln_f.bias"][0] = float("nan")
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="no better than chance"):
        check_trained(load_model(str(tmp_path / "ckpt.pt"), device="cpu"), rows)
