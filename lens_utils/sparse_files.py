"""Transcoders on disk, as three libraries have them.

circuit-tracer's set is the lab's own format: `layer_3.safetensors` with W_enc (feature, d_in),
b_enc, W_dec (feature, d_out), b_dec, W_skip (d_out, d_in) where there is one, and for JumpReLU
`activation_function.threshold`; beside them `config.yaml` with the model's name, the hooks, and
`activation: topk` and `k`. circuit-tracer 0.5.0 itself knows no `activation` and takes a TopK set
for ReLU, without a word: there, wrap each layer in its TopK after a ReLU.

sparsify has one folder a layer, `layers.3.mlp`, with `cfg.json` and `sae.safetensors`: the same
tensors, the encoder's called encoder.weight and encoder.bias. SAELens has `cfg.json` and
`sae_weights.safetensors` with W_enc transposed; it is read here, never written.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from lens_utils import files
from lens_utils.errors import BadInput
from lens_utils.sparse import Transcoder

HOOKS = ("mlp.hook_in", "mlp.hook_out")
"""What the transcoders read and write, in TransformerLens' names."""
ENCODER = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
"""sparsify's names."""
THRESHOLD = "activation_function.threshold"
SAELENS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def save_set(
    folder: Path, transcoders: Mapping[int, Transcoder], model_name: str, scan: str = ""
) -> None:
    """Write transcoders by layer in circuit-tracer's format; config.yaml last.

    model_name: hub id of the model. Raises BadInput where k or activation is not one for all.
    """
    kinds = {(t.activation, t.k) for t in transcoders.values()}
    if len(kinds) != 1:
        raise BadInput(f"a set has one activation and one k, not {sorted(map(str, kinds))}")
    ((activation, k),) = kinds
    for layer, transcoder in transcoders.items():
        save_layer(folder, layer, transcoder)
    save_config(folder, model_name, transcoders, activation, k, scan)


def save_layer(folder: Path, layer: int, transcoder: Transcoder) -> None:
    """One layer of a set; `save_config` has to follow the last."""
    held = _tensors(transcoder)
    if "threshold" in held:
        held[THRESHOLD] = held.pop("threshold")
    files.write(folder / f"layer_{layer}.safetensors", held)


def save_config(
    folder: Path,
    model_name: str,
    layers: Iterable[int],
    activation: str = "topk",
    k: int | None = None,
    scan: str = "",
) -> None:
    """What makes a folder of layers a set."""
    config = {
        "model_kind": "transcoder_set",
        "model_name": model_name,
        "feature_input_hook": HOOKS[0],
        "feature_output_hook": HOOKS[1],
        "scan": scan or folder.name,
        "activation": activation,
        **({"k": k} if k else {}),
        "layers": sorted(layers),
    }
    files.write_bytes(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())


def save_sparsify(folder: Path, transcoders: Mapping[int, Transcoder]) -> None:
    """Write transcoders by layer as folders layers.N.mlp, which sparsify loads.

    Raises BadInput for what sparsify has not: ReLU, JumpReLU, outputs of another width.
    """
    for layer, t in transcoders.items():
        d_out, d_in = len(t.b_dec), t.W_enc.shape[1]
        if t.activation != "topk" or d_in != d_out:
            raise BadInput(f"layer {layer}: sparsify has TopK transcoders of one width only, not "
                           f"{t.activation} from {d_in} to {d_out}: use save_set")  # fmt: skip
        place, tensors = folder / f"layers.{layer}.mlp", _tensors(t)
        tensors["encoder.weight"], tensors["encoder.bias"] = (
            tensors.pop("W_enc"),
            tensors.pop("b_enc"),
        )
        files.write(place / "sae.safetensors", tensors)
        config = {
            "activation": "topk",
            "expansion_factor": max(1, t.n_features // d_in),
            "normalize_decoder": True,
            "num_latents": t.n_features,
            "k": t.k,
            "multi_topk": False,
            "skip_connection": t.W_skip is not None,
            "transcode": True,
            "d_in": d_in,
        }
        files.write(place / "cfg.json", config)


def load_transcoders(
    folder: Path,
    d_model: int | None = None,
    layers: Iterable[int] | None = None,
    model_name: str | None = None,
) -> dict[int, Transcoder]:
    """Transcoders by layer from any of the three formats, on the CPU in float32.

    The model's width, layers that have to be there (None: whatever is) and hub id are compared
    with the folder's, in so far as it says; other layers are left unread. Raises BadInput.
    """
    config = _yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else None
    if config is not None:
        places = {int(p.stem.rpartition("_")[2]): p for p in folder.glob("layer_*.safetensors")
                  if p.stem.rpartition("_")[2].isdigit()}  # fmt: skip
    else:
        within = [folder] if (folder / "cfg.json").exists() else sorted(folder.glob("*/"))
        places = {_layer(p): p for p in within if (p / "cfg.json").exists()}
    if not places:
        raise BadInput(f"{folder} holds no transcoders: neither layer_N.safetensors beside a "
                       "config.yaml, nor folders with a cfg.json")  # fmt: skip
    told = (config or {}).get("model_name")
    if model_name and told and told != model_name:
        raise BadInput(f"{folder} holds transcoders of {told}, not of {model_name}")
    wanted = sorted(places) if layers is None else list(layers)
    if missing := [layer for layer in wanted if layer not in places]:
        raise BadInput(f"{folder} has no transcoder for layer {', '.join(map(str, missing))}; it "
                       f"has {', '.join(map(str, sorted(places)))}")  # fmt: skip
    found = {}
    for layer in wanted:
        place = places[layer]
        found[layer] = load_one(place) if config is None else _of_set(place, config)
        d_in, d_out = found[layer].W_enc.shape[1], len(found[layer].b_dec)
        if d_model is not None and (d_in, d_out) != (d_model, d_model):
            raise BadInput(f"{place} maps {d_in} dimensions to {d_out}; the model has {d_model}: "
                           "these are another model's transcoders")  # fmt: skip
    return found


def load_one(folder: Path) -> Transcoder:
    """The transcoder of one folder of sparsify or SAELens. Raises BadInput."""
    config = _json(folder / "cfg.json")
    if (folder / "sae.safetensors").exists():
        return _of_sparsify(folder / "sae.safetensors", config)
    return _of_saelens(folder / "sae_weights.safetensors", config)


def _of_set(path: Path, config: dict[str, Any]) -> Transcoder:
    tensors = _read(path)
    if THRESHOLD in tensors:
        tensors["threshold"] = tensors.pop(THRESHOLD)
    activation = config.get("activation", "jumprelu" if "threshold" in tensors else "relu")
    if activation == "topk" and not isinstance(config.get("k"), int):
        raise BadInput(f"{path.parent / 'config.yaml'} says topk but not k")
    if activation not in ("topk", "relu", "jumprelu"):
        raise BadInput(f"{path.parent / 'config.yaml'}: no activation {activation!r}: topk, relu "
                       "or jumprelu")  # fmt: skip
    return _made(path, tensors, config["k"] if activation == "topk" else None)


def _of_sparsify(path: Path, config: dict[str, Any]) -> Transcoder:
    if not config.get("transcode"):
        raise BadInput(f"{path.parent} is a sparse autoencoder, not a transcoder")
    if config.get("activation", "topk") != "topk":
        raise BadInput(f"{path.parent}: activation {config['activation']!r} cannot be read: topk")
    tensors = _read(path)
    tensors = {ENCODER.get(name, name): tensor for name, tensor in tensors.items()}
    return _made(path, tensors, config.get("k", 32))


def _of_saelens(path: Path, config: dict[str, Any]) -> Transcoder:
    kind = config.get("architecture")
    if kind not in SAELENS:
        raise BadInput(f"{path.parent} is a {kind!r}, which is no transcoder: {', '.join(SAELENS)}")
    if config.get("normalize_activations", "none") not in ("none", None):
        raise BadInput(f"{path.parent} expects normalised activations "
                       f"({config['normalize_activations']}): fold them in first")  # fmt: skip
    tensors = _read(path)
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    return _made(path, tensors, None)


def _made(path: Path, tensors: dict[str, Float[Tensor, "..."]], k: int | None) -> Transcoder:
    parts = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")
    if lacking := [name for name in parts[:4] if name not in tensors]:
        raise BadInput(f"{path} has no {lacking[0]}: not a transcoder's weights")
    if unknown := sorted(tensors.keys() - set(parts)):
        raise BadInput(f"{path} holds {unknown[0]}, which no transcoder of this lab has")
    if any(tensors[name].ndim != 2 for name in ("W_enc", "W_dec")):
        raise BadInput(f"{path}: W_enc and W_dec have to be matrices")
    try:
        return Transcoder(**tensors, k=k)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _tensors(transcoder: Transcoder) -> dict[str, Float[Tensor, "..."]]:
    return {name: p.detach().cpu() for name, p in transcoder.named_parameters()}


def _layer(folder: Path) -> int:
    """layers.3.mlp, or the number in SAELens' hook name; 0 where nothing says."""
    metadata = _json(folder / "cfg.json").get("metadata") or {}
    for text in (folder.name, str(metadata.get("hook_name"))):
        if said := re.search(r"(?:layers?|blocks)[._](\d+)", text):
            return int(said[1])
    return 0


def _read(path: Path) -> dict[str, Float[Tensor, "..."]]:
    try:
        return {name: tensor.float() for name, tensor in files.read(path).items()}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        held = files.read(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    if not isinstance(held, dict):
        raise BadInput(f"{path} holds no settings")
    return held


def _yaml(path: Path) -> dict[str, Any]:
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(held, dict):
        raise BadInput(f"{path} holds no settings")
    return held
