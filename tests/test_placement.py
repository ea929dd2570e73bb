"""Where a model goes and in which dtype; what does not fit is refused or not used."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lens_utils import models
from lens_utils.errors import BadInput, Failure
from lens_utils.models import agree, load_model, wrap
from lens_utils.registry import ModelSpec

SPEC = ModelSpec("tiny", "tiny")
IDS = torch.tensor([[1, 9, 4, 33, 17, 5, 58, 21, 9, 40]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_loaded_as_asked(dtype, saved):
    folder, asked = saved("llama"), getattr(torch, dtype)
    model = load_model(str(folder), device="cpu", dtype=dtype)
    assert {p.dtype for p in model.bridge.parameters()} == {asked}
    assert model.identity["dtype"] == dtype
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=asked, attn_implementation="eager")
    torch.testing.assert_close(model.bridge(IDS), plain(IDS).logits, atol=1e-3, rtol=0)


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
    torch.testing.assert_close(model.bridge(IDS), tiny("llama")(IDS).logits, atol=1e-5, rtol=0)
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
    torch.testing.assert_close(model.bridge(IDS), tiny("llama")(IDS).logits, atol=1e-5, rtol=0)
    with pytest.raises(Failure, match="--device cpu"):
        load_model(folder, device="mps")
