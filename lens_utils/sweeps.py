"""Systematic interventions: every layer, head and position in turn, sets of heads, attention cuts.

`patching.run` does the work; here are the lists of units that the usual questions need, and what
to make of the answers. Controls are built like what they control for: a random set of heads has as
many heads, in the same layers.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch
from lens_utils.patching import Cut, Kind, Site, Unit, axis_sizes, component_axes, run

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Sweep:
    """Logit differences answer - foil, in nats, of every pair under every intervention."""

    logit_diff: Float[Tensor, "pair ..."]
    axes: tuple[str, ...]
    """What the axes behind `pair` are: layer, head or kv_head, pos; or unit."""
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    kind: Kind

    def effect(self) -> Float[Tensor, "pair ..."]:
        """What the intervention does: 0 nothing, and upwards the more.

        denoise: the share of clean - corrupt that is restored; noise: the share that is lost;
        ablations and cuts: the logit difference that is lost, in nats.
        """
        behind = (slice(None), *[None] * len(self.axes))
        clean, corrupt = self.clean[behind], self.corrupt[behind]
        if self.kind == "denoise":
            return (self.logit_diff - corrupt) / (clean - corrupt)
        lost = clean - self.logit_diff
        return lost / (clean - corrupt) if self.kind == "noise" else lost


def sweep(
    model: LoadedModel,
    batch: Batch,
    component: str,
    kind: Kind = "denoise",
    over: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    seed: int = 0,
) -> Sweep:
    """A component replaced in one place after the other: in each layer, and there `over` its axes.

    over: of head (kv_head for k and v) and pos; None is all that the component has. An axis that is
    left out is replaced as a whole. layers and positions: only there (None: everywhere). The
    result's axes are layer, then head or kv_head, then pos. Raises BadInput.
    """
    has = component_axes(model, component)
    over = has if over is None else tuple(over)
    if odd := [axis for axis in over if axis not in has]:
        raise BadInput(f"{component} has no axis {odd[0]!r}, but {', '.join(has)}")
    size = axis_sizes(model, batch.clean.shape[1])
    at = list(range(model.n_layers)) if layers is None else list(layers)
    everywhere = None if positions is None else tuple(positions)
    headed = [axis for axis in over if axis != "pos"]
    heads = [(h,) for h in range(size[headed[0]])] if headed else [None]
    places = [everywhere]
    if "pos" in over:
        places = [(p,) for p in (range(size["pos"]) if everywhere is None else everywhere)]
    units = [(Site(component, *place),) for place in itertools.product(at, heads, places)]
    found = run(model, batch, units, kind, seed).T
    axes = {"layer": len(at)} | {axis: len(heads) for axis in headed}
    if "pos" in over:
        axes["pos"] = len(places)
    clean, corrupt = baselines(model, batch)
    return Sweep(found.unflatten(1, tuple(axes.values())), tuple(axes), clean, corrupt, kind)


def several(
    model: LoadedModel, batch: Batch, units: Sequence[Unit], kind: Kind, seed: int = 0
) -> Sweep:
    """Units of any make; the result's axis behind `pair` is unit. Raises BadInput."""
    found = run(model, batch, units, kind, seed).T
    return Sweep(found, ("unit",), *baselines(model, batch), kind)


def baselines(
    model: LoadedModel, batch: Batch
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Logit differences of the clean and of the corrupted prompts, without any intervention."""
    return run(model, batch, [()], "noise")[0], run(model, batch, [()], "denoise")[0]


# Sets of heads


def together(heads: Sequence[Head], positions: Sequence[int] | None = None) -> Unit:
    """A set of heads as one unit: their outputs z, before W_O."""
    where = None if positions is None else tuple(positions)
    layers = sorted({layer for layer, _ in heads})
    return tuple(
        Site("z", layer, tuple(h for at, h in heads if at == layer), where) for layer in layers
    )


def random_sets(
    heads: Sequence[Head], n_layers: int, n_heads: int, n: int, seed: int = 0
) -> list[list[Head]]:
    """n random sets of as many other heads, each in the layer of the head it stands for.

    Where a layer has no head left, from the nearest layer that has. Raises BadInput for a set of
    more than half of the model's heads.
    """
    if 2 * len(heads) > n_layers * n_heads:
        raise BadInput(f"{len(heads)} of {n_layers * n_heads} heads leave too few for a random set")
    rng = random.Random(seed)
    sets = []
    for _ in range(n):
        free = [head for head in itertools.product(range(n_layers), range(n_heads))]
        free = [head for head in free if head not in set(heads)]
        drawn = []
        for layer, _ in heads:
            nearest = min(abs(at - layer) for at, _ in free)
            drawn.append(rng.choice([head for head in free if abs(head[0] - layer) == nearest]))
            free.remove(drawn[-1])
        sets.append(drawn)
    return sets


# Attention knock-out


def window(n_layers: int, first: int, behind: int) -> range:
    """Layers first .. behind - 1. Raises BadInput for none, and for what is not in the model."""
    if not 0 <= first < behind <= n_layers:
        raise BadInput(f"layer window {first} to {behind}: it needs 0 <= first < behind <= "
                       f"{n_layers}, the number of layers")  # fmt: skip
    return range(first, behind)


def sliding(n_layers: int, width: int) -> list[range]:
    """Every window of so many layers, one layer apart. Raises BadInput for a wrong width."""
    window(n_layers, 0, width)
    return [window(n_layers, first, first + width) for first in range(n_layers - width + 1)]


def at(batch: Batch, role: str) -> tuple[int, ...]:
    """Positions of a class of tokens, or of `last`. Raises BadInput where there is none such."""
    classes = batch.pairs[0].classes
    if any(p.classes != classes for p in batch.pairs):
        raise BadInput("the pairs of this batch have their classes in different places")
    if role == "last":
        return (len(classes) - 1,)
    found = tuple(i for i, name in enumerate(classes) if name == role)
    if not found:
        raise BadInput(f"no token is {role!r} in {batch.pairs[0].id}; there are "
                       f"{', '.join(dict.fromkeys(classes))} and last")  # fmt: skip
    return found


def cut(
    layers: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
    heads: Sequence[int] | None = None,
) -> Unit:
    """Attention from the queries to the keys removed in all these layers."""
    some = None if heads is None else tuple(heads)
    return tuple(Cut(layer, tuple(queries), tuple(keys), some) for layer in layers)
