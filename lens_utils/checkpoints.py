"""Weights on disk as a Hugging Face model: a folder of the hub, or a GPT-2 layout checkpoint.

A GPT-2 state dict, of nanoGPT or of Hugging Face, does not say how many heads it was trained with,
nor which GELU: a wrong number loads without complaint and computes another function. So both come
from the checkpoint's own `model_args` or `config`, from a JSON file of the same name beside it, or
from the caller; they are never guessed. No file is trusted with more than numbers and plain
settings: no pickled code, no remote code.
"""

import argparse
import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from lens_utils import files
from lens_utils.errors import BadInput

WRAPPINGS = ("model", "model_state_dict", "state_dict")
PREFIXES = ("_orig_mod.", "module.", "transformer.")  # torch.compile, DataParallel, the model
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # nanoGPT: Linear; HF: Conv1D
ALIASES = {"num_attention_heads": "n_head", "activation_function": "activation"}
GELUS = ("gelu", "gelu_new", "relu")


def measure(folder: Path) -> tuple[str, int]:
    """Model type and number of parameters of a Hugging Face folder, from its config alone."""
    with _readable(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return config.model_type, AutoModelForCausalLM.from_config(config).num_parameters()


def load_folder(
    folder: Path, dtype: torch.dtype = torch.float32, device_map: str | None = None
) -> PreTrainedModel:
    """The model of a Hugging Face folder. Raises BadInput when anything is missing from it."""
    with _readable(folder):
        hf, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported instead
        )
    # What it does not find, transformers draws at random, with no more than a warning.
    if wrong := sorted({*report["missing_keys"], *(k for k, *_ in report["mismatched_keys"])}):
        raise BadInput(f"{folder} lacks {len(wrong)} of its model's tensors, such as {wrong[0]}")
    return hf


def load_gpt2(
    path: Path, n_head: int | None = None, activation: str | None = None
) -> GPT2LMHeadModel:
    """The model of a .pt, .pth, .ckpt or .safetensors file, in float32.

    A c_attn of 2 * d_model rows is read as tied keys and values. n_head and activation are for a
    file that does not say them. Raises BadInput when the file is no such checkpoint, holds more
    than tensors, does not say its number of heads, or says another one.
    """
    raw = _tensors_only(path)
    state = next((raw[k] for k in WRAPPINGS if isinstance(raw.get(k), dict)), raw)
    weights = {_bare(name): x.float() for name, x in state.items() if _is_weight(name, x)}
    layers = {name.split(".")[1] for name in weights if name.startswith("h.")}
    if lacking := {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight"} - weights.keys():
        raise BadInput(f"{path.name}: no {min(lacking)} in it, so not the GPT-2 layout "
                       "(a Hugging Face model is named by its folder)")  # fmt: skip
    said = _said(path, raw)
    given = {"n_head": n_head, "activation": activation}
    for setting, value in given.items():
        if value not in (None, said.get(setting, value)):
            raise BadInput(f"{path.name} says {setting} {said[setting]!r} itself, not {value!r}")
    said |= {setting: value for setting, value in given.items() if value is not None}
    d_vocab, d_model = weights["wte.weight"].shape
    head = weights.get("lm_head.weight", weights["wte.weight"])
    config = GPT2Config(
        vocab_size=d_vocab,
        n_positions=weights["wpe.weight"].shape[0],
        n_embd=d_model,
        n_layer=len(layers),
        n_head=_heads(path, said, d_model),
        activation_function=_activation(path, said),
        layer_norm_epsilon=said.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=torch.equal(head, weights["wte.weight"]),
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    found = _as_hugging_face(weights, len(layers), d_model) | {"lm_head.weight": head}
    expected = model.state_dict()
    wrong = {k for k in expected.keys() & found if expected[k].shape != found[k].shape}
    if wrong := sorted(wrong | (expected.keys() ^ found.keys())):
        raise BadInput(f"{path.name}: not the GPT-2 layout at {', '.join(wrong[:3])}")
    model.load_state_dict(found)
    return model.eval()


def has_tied_kv(hf: PreTrainedModel) -> bool:
    """Whether the keys of a GPT-2 are its values, in every layer."""
    if not isinstance(hf, GPT2LMHeadModel):
        return False
    return all(
        torch.equal(key, value)
        for block in hf.transformer.h
        for parts in (block.attn.c_attn.weight, block.attn.c_attn.bias)
        for _, key, value in [parts.chunk(3, dim=-1)]
    )


@torch.no_grad()
def tie_kv(hf: GPT2LMHeadModel) -> None:
    """Make the values of a GPT-2 its keys, in place."""
    for block in hf.transformer.h:
        for parts in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            _, key, value = parts.chunk(3, dim=-1)
            value.copy_(key)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{folder} is no model this lab can load: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _tensors_only(path: Path) -> dict[Any, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts keep their command line beside the weights: names and values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(f"{path.name} is damaged or holds more than tensors, and code in a pickle "
                       "is never run: save its state dict as .safetensors") from None  # fmt: skip
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise BadInput(f"{path.name} is not a readable checkpoint: {_line(error)}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path.name} holds a {type(raw).__name__}, not a state dict")
    return raw


def _is_weight(name: Any, value: Any) -> bool:
    """Every tensor but the causal-mask buffers, which share their name with real biases."""
    if not (isinstance(name, str) and isinstance(value, Tensor)):
        return False
    return value.ndim == 1 or not name.endswith((".attn.bias", ".attn.masked_bias"))


def _bare(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _said(path: Path, raw: dict[Any, Any]) -> dict[str, Any]:
    """What is known of the model beyond its tensors; the file beside it has the last word."""
    said = {}
    kept = {k: vars(v) if isinstance(v, argparse.Namespace) else v for k, v in raw.items()}
    if isinstance(kept.get("model_args"), dict):
        # nanoGPT's GELU is exact; Hugging Face's GPT-2 has the tanh approximation.
        said = {"activation": "gelu", **kept["model_args"]}
    elif isinstance(kept.get("config"), dict):
        said = dict(kept["config"])
    said = {ALIASES.get(k, k): v for k, v in said.items()}
    sidecar = path.with_suffix(".json")
    if not sidecar.exists():
        return said
    try:
        return said | {ALIASES.get(k, k): v for k, v in dict(files.read(sidecar)).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise BadInput(f"{sidecar.name} is not a JSON object: {_line(error)}") from None


def _heads(path: Path, said: dict[str, Any], d_model: int) -> int:
    heads = said.get("n_head")
    if heads is None:
        raise BadInput(
            f"{path.name} does not say its number of heads: give n_head and activation, or write "
            f'{path.stem}.json beside it with {{"n_head": N, "activation": "gelu"}} (d_model '
            f'{d_model}; nanoGPT uses "gelu", Hugging Face GPT-2 "gelu_new")'
        )
    if not isinstance(heads, int) or heads < 1 or d_model % heads:
        raise BadInput(f"{path.name}: {heads!r} heads do not divide d_model {d_model}")
    return heads


def _activation(path: Path, said: dict[str, Any]) -> str:
    name = said.get("activation")
    if name not in GELUS:
        raise BadInput(f"{path.name}: activation {name!r}: say {', '.join(GELUS)} in "
                       f"{path.stem}.json")  # fmt: skip
    return name


def _as_hugging_face(
    weights: dict[str, Float[Tensor, "..."]], n_layers: int, d_model: int
) -> dict[str, Float[Tensor, "..."]]:
    """Conv1D orientation, keys and values untied, missing biases as zeros, HF names."""
    # Only c_attn tells the orientation: c_proj is square. In Conv1D its width is the second axis.
    linear = weights["h.0.attn.c_attn.weight"].shape[1] == d_model
    out = {}
    for name, tensor in weights.items():
        if linear and name.endswith(TRANSPOSED):
            tensor = tensor.T
        if ".c_attn." in name and tensor.shape[-1] == 2 * d_model:
            tensor = torch.cat([tensor, tensor[..., d_model:]], dim=-1)
        out[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    norms = [f"h.{i}.ln_{j}" for i in range(n_layers) for j in (1, 2)] + ["ln_f"]
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for name in norms + [f"h.{i}.{part}" for i in range(n_layers) for part in parts]:
        gain = out.get(f"transformer.{name}.weight")
        if gain is not None:
            out.setdefault(f"transformer.{name}.bias", torch.zeros(gain.shape[-1]))
    return out
