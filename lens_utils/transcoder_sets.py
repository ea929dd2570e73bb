"""Transcoders for an experiment: those that 018 made for the same model, or a folder's.

018 keeps a set as a folder of one file a layer (circuit-tracer's format) and records the digest of
every file in a stage of its own, so that who reads a set knows that it is the one recorded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lens_utils import files, provenance
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.sparse import Transcoder
from lens_utils.sparse_files import load_transcoders, save_config

MAKER = "018_transcoders"
SETS = ("trained", "tuned")


def record(folder: Path, model: LoadedModel, layers: Sequence[int], k: int) -> dict[str, Any]:
    """Make a set of the layers that lie in a folder; what a stage records of it."""
    save_config(folder, model.identity.get("source", model.name), layers, k=k)
    digests = {f"layer_{n}.safetensors": files.sha256(folder / f"layer_{n}.safetensors")
               for n in layers}  # fmt: skip
    return {"folder": folder.name, "k": k, "layers": list(layers), "files": digests}


def load(run: Run, source: str = "trained", model: str = "") -> dict[int, Transcoder]:
    """Transcoders by layer, on the run's model's device.

    source: trained or tuned, for 018's sets of this run's model (or the one named), or a folder in
    one of the three formats of `sparse_files`. Raises BadInput where there is none, where a file is
    not the recorded one, and for a folder of another model.
    """
    loaded = run.model(other=model) if model else run.model()
    width = loaded.bridge.cfg.d_model
    if source not in SETS:
        folder = Path(source).expanduser()
        if not folder.exists():
            raise BadInput(
                f"no transcoders {source!r}: {', '.join(SETS)} (of {MAKER}), or a folder"
            )
        found = load_transcoders(folder, width)
    else:
        held = run.upstream(MAKER, f"{source}.json", model)
        folder = run.upstream_folder(MAKER, f"{source}.json", model) / source
        for name, digest in held["files"].items():
            path = folder / name
            if not path.exists() or files.sha256(path) != digest:
                raise BadInput(f"{provenance.shown(path)} is not what {MAKER} recorded: "
                               f"run {MAKER[:3]} again with --fresh")  # fmt: skip
        found = load_transcoders(folder, width, held["layers"])
    if beyond := [layer for layer in found if layer >= loaded.n_layers]:
        raise BadInput(f"{folder} has a transcoder for layer {beyond[0]}; {loaded.name} has "
                       f"{loaded.n_layers} layers: these are another model's")  # fmt: skip
    return {layer: t.to(loaded.device) for layer, t in found.items()}
