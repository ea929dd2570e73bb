"""Named activations of many prompts, streamed: bounded memory, whatever the number of prompts.

Prompts are padded on the left, so that column -1 is every prompt's last token; padding columns are
dropped before anything is handed on, and the attention mask gives each prompt its own positions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_utils import files
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

# Hooks whose second axis is not pos.
OTHER_LAYOUT = ("hook_pattern", "hook_attn_scores", "hook_q_normed", "hook_k_normed")


@dataclass(frozen=True)
class Activations:
    """Activations of some tokens; row i of each tensor belongs to token i."""

    ids: Int[Tensor, " token"]
    row: Int[Tensor, " token"]
    """Which prompt the token is from."""
    values: dict[str, Float[Tensor, "token ..."]]
    """Keyed by the hook names that were asked for."""


@torch.no_grad()
def stream(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    names: Sequence[str],
    batch_size: int = 16,
    positions: Literal["every", "last"] = "every",
    side: Literal["left", "right"] = "left",
) -> Iterator[Activations]:
    """The named activations, one batch of prompts at a time, on the model's device.

    positions: every real token in reading order, or each prompt's last one. Raises BadInput for a
    hook this model lacks, or one without a position axis.
    """
    known = model.bridge.hook_dict
    if unknown := [n for n in names if n not in known or n.endswith(OTHER_LAYOUT)]:
        raise BadInput(f"{model.name} has no hook {unknown[0]} with one row per token")
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, mask = model.batch(batch, side)
        taken = mask.bool()
        if positions == "last":
            last = torch.tensor([len(r) for r in batch], device=ids.device) - 1
            last = last if side == "right" else torch.full_like(last, ids.shape[1] - 1)
            taken = torch.zeros_like(taken).scatter(1, last[:, None], True)
        values: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: object, name: str, taken: Tensor, values: dict) -> Tensor:
            values[name] = x[taken.to(x.device)]
            return x

        hooks = [
            (name, lambda x, hook, name=name, t=taken, v=values: keep(x, hook, name, t, v))
            for name in names
        ]
        model.bridge.run_with_hooks(
            ids, attention_mask=mask, fwd_hooks=hooks, use_cache=False, logits_to_keep=1
        )
        row = torch.arange(start, start + len(batch), device=ids.device)[:, None].expand_as(ids)
        yield Activations(ids[taken], row[taken], {name: values[name] for name in names})


@torch.no_grad()
def record(
    model: LoadedModel, ids: Int[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch ..."]]:
    """The named activations of prompts of one length, in the hooks' own layouts.

    Keyed by the names asked for. Raises BadInput for a hook this model lacks.
    """
    if unknown := [name for name in names if name not in model.bridge.hook_dict]:
        raise BadInput(f"{model.name} has no hook {unknown[0]}")
    _, held = model.bridge.run_with_cache(
        ids, names_filter=list(names), use_cache=False, logits_to_keep=1
    )
    return {name: held[name] for name in names}


def to_shards(
    folder: Path, activations: Iterable[Activations], shard_bytes: int = 256 * 2**20
) -> list[Path]:
    """Write a stream to safetensors shards of about `shard_bytes`; their paths.

    Each holds one tensor per hook, and `ids` and `row` of its tokens.
    """
    paths: list[Path] = []
    held: list[dict[str, Tensor]] = []
    size = 0

    def flush() -> None:
        path = folder / f"{len(paths):05d}.safetensors"
        files.write(path, {key: torch.cat([h[key] for h in held]) for key in held[0]})
        paths.append(path)
        held.clear()

    for part in activations:
        held.append(
            {k: v.cpu() for k, v in {**part.values, "ids": part.ids, "row": part.row}.items()}
        )
        size += sum(v.numel() * v.element_size() for v in held[-1].values())
        if size >= shard_bytes:
            flush()
            size = 0
    if held:
        flush()
    return paths


def from_shards(folder: Path) -> Iterator[Activations]:
    """The shards of a folder, in order, one in memory at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        values = files.read(path)
        yield Activations(values.pop("ids"), values.pop("row"), values)
