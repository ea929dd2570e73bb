"""Transcoders of this lab in other libraries, and theirs here: largest differences of the outputs.

The libraries cannot all live in the lab's environment; each is asked in one of its own, and what it
said is committed as tests/fixtures/transcoder_formats.json:

    PYTHONPATH=. OTHER_VENV/bin/python tests/transcoder_libraries.py sparsify   # eai-sparsify 1.3.3
    PYTHONPATH=. OTHER_VENV/bin/python tests/transcoder_libraries.py sae_lens   # 6.54.12
    PYTHONPATH=. OTHER_VENV/bin/python tests/transcoder_libraries.py circuit_tracer   # 0.5.0
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import torch

from lens_utils import sparse_files
from lens_utils.sparse import Transcoder

RECORD = Path(__file__).parent / "fixtures" / "transcoder_formats.json"
PACKAGES = {"sparsify": "eai-sparsify", "sae_lens": "sae-lens", "circuit_tracer": "circuit-tracer"}
D, N, K = 6, 24, 4


def drawn(
    seed: int, k: int | None = K, skip: bool = False, jump: bool = False, d: int = D, n: int = N
) -> Transcoder:
    source = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (n,), (n, d), (d,), *([(d, d)] if skip else [])]
    tensors = [torch.randn(*shape, generator=source) for shape in shapes]
    return Transcoder(*tensors, k=k, threshold=torch.linspace(0.1, 1.0, n) if jump else None)


def inputs() -> torch.Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(99))


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max())


def sparsify(folder: Path) -> dict[str, float]:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    x, found = inputs(), {}
    for skip in (False, True):
        name = "skip topk" if skip else "topk"
        ours = drawn(1, skip=skip)
        sparse_files.save_sparsify(folder / name, {3: ours})
        theirs = SparseCoder.load_many(str(folder / name), local=True)["layers.3.mlp"]
        found[f"ours there, {name}"] = gap(theirs(x, x).sae_out, ours(x))
        config = SparseCoderConfig(num_latents=N, k=K, transcode=True, skip_connection=skip)
        theirs = SparseCoder(D, config)
        for i, p in enumerate(theirs.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        theirs.save_to_disk(folder / f"theirs {name}" / "layers.5.mlp")
        loaded = sparse_files.load_transcoders(folder / f"theirs {name}", D, [5])[5]
        found[f"theirs here, {name}"] = gap(theirs(x, x).sae_out, loaded(x))
    return found


def sae_lens(folder: Path) -> dict[str, float]:
    from sae_lens.saes import transcoder as theirs
    from sae_lens.saes.sae import SAEMetadata

    x, found = inputs(), {}
    for name in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        metadata = SAEMetadata(hook_name="blocks.5.mlp.hook_in")
        config = getattr(theirs, f"{name}Config")(
            D, N, apply_b_dec_to_input=False, d_out=D, metadata=metadata
        )
        made = getattr(theirs, name)(config)
        for i, p in enumerate(made.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        made.save_model(folder / name)
        loaded = sparse_files.load_transcoders(folder / name, D, [5])[5]
        found[f"theirs here, {name}"] = gap(made(x), loaded(x))
    return found


def circuit_tracer(folder: Path) -> dict[str, float]:
    from circuit_tracer.transcoder import single_layer_transcoder as theirs
    from circuit_tracer.transcoder.activation_functions import TopK

    x, found = inputs(), {}
    kinds = {"relu": {"k": None}, "jumprelu": {"k": None, "jump": True}, "topk": {},
             "skip topk": {"skip": True}}  # fmt: skip
    for name, kind in kinds.items():
        ours = {layer: drawn(layer, **kind) for layer in (0, 1)}
        sparse_files.save_set(folder / name, ours, "someone/model")
        paths = {layer: str(folder / name / f"layer_{layer}.safetensors") for layer in ours}
        there = theirs.load_transcoder_set(paths, "scan", *sparse_files.HOOKS,
                                           device=torch.device("cpu"))  # fmt: skip
        for layer, one in ours.items():
            if one.k:  # which its loader does not know: as the module's text says
                there[layer].activation_function = torch.nn.Sequential(torch.nn.ReLU(), TopK(K))
            key = f"ours there, {name}"
            found[key] = max(found.get(key, 0.0), gap(there[layer](x), one(x)))
        again = folder / f"theirs {name}"
        there.to_safetensors(str(again))
        (again / "config.yaml").write_bytes((folder / name / "config.yaml").read_bytes())
        if not any(one.k for one in ours.values()):  # of a set that says no activation
            (again / "config.yaml").write_text("model_kind: transcoder_set\n")
        for layer, one in sparse_files.load_transcoders(again, D).items():
            key = f"theirs here, {name}"
            found[key] = max(found.get(key, 0.0), gap(there[layer](x), one(x)))
    return found


CASES = {"sparsify": sparsify, "sae_lens": sae_lens, "circuit_tracer": circuit_tracer}


def main(library: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = CASES[library](Path(folder))
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    names = (PACKAGES[library], "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    record[library] = {"versions": versions, "largest differences": found}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record[library], indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
