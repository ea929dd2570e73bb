"""Attribution patching: what would patching do, guessed for every node from one backward pass.

Activation patching writes a node's clean activation into the corrupted run and looks at the logit
difference; one forward per node. To first order the change is

    (clean activation - corrupted activation) . gradient of the logit difference

with the gradient taken in the corrupted run, so one backward pass scores all nodes (Nanda 2023;
Syed et al. 2023, arXiv:2310.10348). The guess fails where the model is not nearly linear between
the two runs: behind a saturated softmax the gradient is zero, however much hangs on the node. The
integrated form takes the mean gradient along the straight line between the two embeddings
(EAP-IG, Hanna et al. 2024, arXiv:2403.17806). For the embedding itself that is exact with many
points: its scores sum to the clean minus the corrupted logit difference.

All pairs of a batch share a backward pass: the gradient of their summed logit differences is each
pair's own, because rows do not see each other. Parameters take no part: they require no gradient.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.lens import Readout, hook
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch
from lens_utils.patching import COMPONENTS, check, resume

NODES = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out")
"""Components of a block that can be scored; resid_pre of block 0 is the embedding."""
PLAIN = (0.0,)
"""Gradients in the corrupted run only."""


def midpoints(steps: int = 5) -> tuple[float, ...]:
    """The middles of so many equal parts of the line from corrupted (0) to clean (1).

    Raises BadInput for less than one.
    """
    if steps < 1:
        raise BadInput(f"{steps} steps: integrated gradients need at least one")
    return tuple((step + 0.5) / steps for step in range(steps))


def attribute(
    model: LoadedModel,
    batch: Batch,
    at: Sequence[float] = PLAIN,
    nodes: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, "pair layer pos ..."]]:
    """First-order effect, in nats of logit difference, of patching each node clean into corrupted.

    Keyed by component: resid_pre, attn_out and mlp_out are [pair, layer, pos]; z (a head's output
    before W_O) and q have a last axis head, k and v a last axis kv_head. q and k are as projected,
    before any norm or rotation of their own. `at` are the points of the line between the two
    embeddings at which gradients are taken: PLAIN, or `midpoints()` for the integrated form. Cost:
    two forwards, and a forward and a backward for each point. Without `nodes`, all of NODES that
    the model has. Raises BadInput for others, and for points outside 0 .. 1.
    """
    check(model, batch, [])
    known = [c for c in NODES if f"blocks.0.{COMPONENTS[c][0]}" in model.bridge.hook_dict]
    nodes = known if nodes is None else nodes
    if unknown := [c for c in nodes if c not in known]:
        raise BadInput(f"gradients score {', '.join(known)} of {model.name}, not {unknown[0]!r}")
    names = {c: [f"blocks.{i}.{COMPONENTS[c][0]}" for i in range(model.n_layers)] for c in nodes}
    every = [name for of in names.values() for name in of]
    start = hook(0)
    clean, corrupt = (record(model, ids, [start, *every]) for ids in (batch.clean, batch.corrupt))
    readout, gradient = Readout(model.bridge), dict[str, Tensor]()
    for embedding in line(clean[start], corrupt[start], at):
        for name, found in backward(model, readout, batch, embedding, every)[1].items():
            before = gradient.get(name)
            gradient[name] = found / len(at) + (0 if before is None else before)
    return {
        c: torch.stack(
            [
                torch.linalg.vecdot((clean[n] - corrupt[n]).float(), gradient[n]).to(model.device)
                for n in of
            ],
            dim=1,
        )
        for c, of in names.items()
    }


def line(
    clean: Float[Tensor, "pair pos d_model"],
    corrupt: Float[Tensor, "pair pos d_model"],
    at: Sequence[float],
) -> list[Float[Tensor, "pair pos d_model"]]:
    """The embeddings at these points. Raises BadInput for points outside 0 .. 1, or none."""
    if not at or not all(0 <= point <= 1 for point in at):
        raise BadInput(f"gradients at {tuple(at)}: points lie between 0 (corrupted) and 1 (clean)")
    return [torch.lerp(corrupt, clean, point) for point in at]


def backward(
    model: LoadedModel,
    readout: Readout,
    batch: Batch,
    embedding: Float[Tensor, "pair pos d_model"],
    names: Sequence[str],
) -> tuple[dict[str, Float[Tensor, "pair ..."]], dict[str, Float[Tensor, "pair ..."]]]:
    """Run from this embedding: the named activations, and their gradients of the logit difference.

    Activations as they are, gradients in float32. The logit difference is read at the last
    position, before any softcap, through two columns of W_U: no pass goes over the vocabulary.
    """
    held: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: object, name: str) -> Tensor:
        # A view of its own: what reads here gets this one and nothing else does. (Hooks of q, k, v
        # and z hand out a view that is not used unless it is returned; ln2.hook_in holds the stream
        # itself, whose gradient would be that of all its readers.)
        held[name] = x.view_as(x)
        return held[name]

    hooks = [(name, lambda x, hook, name=name: keep(x, hook, name)) for name in names]
    with torch.enable_grad():
        final = resume(model, embedding.detach().requires_grad_(), 0, hooks)
        difference = readout.logit_diff(final, batch.answer, batch.foil).sum()
        found = torch.autograd.grad(difference, [held[name] for name in names])
    values = {name: held[name].detach() for name in names}
    return values, {name: g.float() for name, g in zip(names, found, strict=True)}
