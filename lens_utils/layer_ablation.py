"""Taking away what a layer adds: what does the right answer's log-probability lose?

A block reads the residual stream and adds to it, first its attention's output, then its MLP's. To
ablate a layer is to replace what it adds, its *contribution*; all that earlier layers wrote stays.
(Setting the stream itself to zero, `resid`, destroys that too: then every layer is indispensable,
whatever it does. It is here to be compared with.) What a contribution is replaced by:

    zero      nothing; later layers never saw such a stream in training
    mean      its mean at the same token over other mazes: what the token alone makes of it stays,
              what it made of this maze goes
    resample  the contribution in another text of the same task and (nearly) the same length

A ratio below one replaces that share of the d_model dimensions: the first ones of a fixed random
order, the same at every position, so that masks of one seed are nested. Teacher forcing scores a
text that is given: prompt, trace, answer. Every position has the role of what is predicted *from*
it, so the prompt's last token already belongs to the answer (or the trace).

Rows are padded on the right and need no mask: a causal model never looks there. What lies below
the first layer that is touched is not run again (`patching.skipping`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from lens_utils.cache import record, stream
from lens_utils.errors import BadInput
from lens_utils.lens import Readout
from lens_utils.models import LoadedModel
from lens_utils.patching import Hooks, skipping

Part = Literal["attn", "mlp", "both", "resid"]
Kind = Literal["zero", "mean", "resample"]
ROLES = ("prompt", "thinking", "answer")
WRITES = {
    "attn": ("hook_attn_out",),
    "mlp": ("hook_mlp_out",),
    "both": ("hook_attn_out", "hook_mlp_out"),
    "resid": ("hook_resid_post",),
}
ROWS = 512  # positions whose logits are in memory at once


class Ablation(NamedTuple):
    """A share of what one layer adds, replaced."""

    layer: int
    part: Part = "both"
    ratio: float = 1.0
    kind: Kind = "mean"
    where: str = "everywhere"
    """Or only at the positions of one of ROLES."""
    seed: int = 0
    """Of the order in which dimensions go."""


@dataclass(frozen=True)
class Texts:
    """Given texts, padded on the right, without their last token, which predicts nothing."""

    ids: Int[Tensor, "text pos"]
    ahead: Int[Tensor, "text pos"]
    """The token that follows."""
    role: Int[Tensor, "text pos"]
    """Number in ROLES of what follows; -1 where nothing does."""


class Scores(NamedTuple):
    """How the model takes every token of trace and answer; 0 and False elsewhere."""

    logp: Float[Tensor, "text pos"]
    """Natural log-probability of the token that follows."""
    hit: Bool[Tensor, "text pos"]
    """Whether it is the likeliest: greedy decoding would write it."""


@dataclass(frozen=True)
class Means:
    """Mean activations by token."""

    index: Int[Tensor, " d_vocab"]
    """Row of a token; row 0, the mean over everything, is that of tokens never met."""
    values: dict[str, Float[Tensor, "row ..."]]
    """By hook name, float32."""

    def at(self, name: str, ids: Int[Tensor, "text pos"]) -> Float[Tensor, "text pos ..."]:
        """The mean at every token."""
        values = self.values[name]
        return values[self.index[ids.to(self.index.device)].to(values.device)]


def hook(layer: int, name: str) -> str:
    """A hook's full name."""
    return f"blocks.{layer}.{name}"


# Texts


def texts(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    starts: Sequence[int],
) -> Texts:
    """Prompts with what is to be scored behind them; `starts`: where in it the answer begins.

    Raises BadInput for empty prompts or targets and for what is longer than the context.
    """
    rows, ahead, roles = [], [], []
    for prompt, target, start in zip(prompts, targets, starts, strict=True):
        if not prompt or not target or not 0 <= start < len(target):
            raise BadInput("a text to be scored needs a prompt and an answer behind it")
        whole = [*prompt, *target]
        if len(whole) - 1 > model.n_ctx:
            raise BadInput(f"a text of {len(whole)} tokens is longer than the context of "
                           f"{model.name}, {model.n_ctx}")  # fmt: skip
        rows.append(whole[:-1])
        ahead.append(whole[1:])
        counts = len(prompt) - 1, start, len(target) - start
        roles.append([role for role, n in enumerate(counts) for _ in range(n)])
    ids, mask = model.batch(rows)
    following, _ = model.batch(ahead)
    role, _ = model.batch(roles)
    return Texts(ids, following, torch.where(mask.bool(), role, -1))


def aligned(mine: Texts, other: Texts) -> Int[Tensor, "text pos"]:
    """For every position the one of the other text (same row) that stands for it.

    Prompts are aligned at their ends, traces and answers at their beginnings; where the other one
    is shorter, its first or last position of that role is taken again.
    """
    found = torch.zeros_like(mine.role)
    for number, role in enumerate(ROLES):
        here, there = mine.role == number, other.role == number
        n_here, n_there = here.sum(1, keepdim=True), there.sum(1, keepdim=True)
        nth = here.long().cumsum(1) - 1
        if role == "prompt":
            nth = nth + n_there - n_here
        first = there.long().argmax(1, keepdim=True)
        nth = torch.minimum(nth, n_there - 1).clamp_min(0)
        found = torch.where(here, first + nth, found)
    return found


# What takes the place of a contribution


def token_means(
    model: LoadedModel, rows: Sequence[Sequence[int]], names: Sequence[str], batch_size: int = 32
) -> Means:
    """Means over all tokens of some texts, token by token. Raises BadInput for unknown hooks."""
    met = sorted({i for row in rows for i in row})
    index = torch.zeros(model.bridge.cfg.d_vocab, dtype=torch.long)
    index[met] = torch.arange(1, len(met) + 1)
    sums: dict[str, Tensor] = {}
    count = torch.zeros(len(met) + 1)
    for part in stream(model, rows, names, batch_size):
        row = index[part.ids.cpu()]
        count.index_add_(0, row, torch.ones(len(row)))
        for name, x in part.values.items():
            if name not in sums:
                shape = (len(met) + 1, *x.shape[1:])
                sums[name] = torch.zeros(shape, device=x.device)
            sums[name].index_add_(0, row.to(x.device), x.float())
    values = {}
    for name, total in sums.items():
        total[0], n = total[1:].sum(0), count.clone()
        n[0] = count[1:].sum()
        values[name] = total / n.to(total.device).view(-1, *[1] * (total.ndim - 1))
    return Means(index, values)


def dims(d_model: int, ratio: float, seed: int) -> Bool[Tensor, " d_model"]:
    """The share of dimensions that goes; of one seed, smaller shares lie in larger ones.

    Raises BadInput for a ratio outside 0 .. 1.
    """
    if not 0 <= ratio <= 1:
        raise BadInput(f"ablation ratio {ratio}: a share from 0 to 1")
    order = torch.randperm(d_model, generator=torch.Generator().manual_seed(seed))
    gone = torch.zeros(d_model, dtype=torch.bool)
    gone[order[: round(ratio * d_model)]] = True
    return gone


Source = Callable[[str], Float[Tensor, "text pos ..."]]
"""What replaces an activation, by hook name."""


def ablating(
    edits: Sequence[Ablation],
    d_model: int,
    source: Source | None,
    role: Int[Tensor, "text pos"] | None = None,
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that replace shares of contributions; x = where(chosen, source, x) in each.

    source: None replaces by zeros. role: of the texts, for edits that are not everywhere. Raises
    BadInput for an unknown part or role.
    """
    found = []
    for edit in edits:
        if edit.part not in WRITES or edit.where not in ("everywhere", *ROLES):
            raise BadInput(f"no ablation of {edit.part!r} at {edit.where!r}: parts are "
                           f"{', '.join(WRITES)}, places {', '.join(ROLES)}")  # fmt: skip
        gone = dims(d_model, edit.ratio, edit.seed)
        if edit.where != "everywhere":
            if role is None:
                raise BadInput(f"where {edit.where!r} is, is only known of given texts")
            gone = (role == ROLES.index(edit.where))[..., None] & gone.to(role.device)
        for name in WRITES[edit.part]:
            found.append((hook(edit.layer, name), _replace(hook(edit.layer, name), gone, source)))
    return found


def without_heads(
    heads: Sequence[tuple[int, int]], n_heads: int, source: Source | None
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that replace the outputs z of some heads (layer, head) at every position."""
    found = []
    for layer in sorted({layer for layer, _ in heads}):
        gone = torch.zeros(n_heads, 1, dtype=torch.bool)
        gone[[head for at, head in heads if at == layer]] = True
        name = hook(layer, "attn.hook_z")
        found.append((name, _replace(name, gone, source)))
    return found


def _replace(name: str, gone: Bool[Tensor, "..."], source: Source | None) -> Callable[..., Tensor]:
    def replace(x: Tensor, hook: object) -> Tensor:
        put = torch.zeros_like(x) if source is None else source(name).to(x.device, x.dtype)
        return torch.where(gone.to(x.device), put, x)

    return replace


def following(model: LoadedModel) -> tuple[tuple[str, Callable], Callable[[], Tensor]]:
    """A hook that sees the token ids of every forward pass, and a function that tells them.

    For means while text is generated: what stands where is known only then.
    """
    held: dict[str, Tensor] = {}

    def see(ids: Tensor, hook: object) -> None:
        held["ids"] = ids

    return ("embed.hook_in", see), lambda: held["ids"]


# Scoring


def residuals(model: LoadedModel, given: Texts) -> list[Float[Tensor, "text pos d_model"]]:
    """What every block reads, without any ablation."""
    names = [hook(layer, "hook_resid_pre") for layer in range(model.n_layers)]
    held = record(model, given.ids, names)
    return [held[name] for name in names]


@torch.no_grad()
def score(
    model: LoadedModel,
    readout: Readout,
    given: Texts,
    resid: Sequence[Float[Tensor, "text pos d_model"]],
    hooks: Hooks = (),
) -> Scores:
    """Log-probabilities of trace and answer as they stand, under some hooks.

    resid: of `residuals`; the pass begins at the first block that a hook is on.
    """
    layers = [int(name.split(".")[1]) for name, _ in hooks]
    start = min(layers, default=model.n_layers - 1)
    taken = given.role > 0

    def stop(x: Tensor, hook: object) -> None:
        raise StopAtLayerException(x[taken.to(x.device)])  # caught by the bridge, which returns it

    last = (hook(model.n_layers - 1, "hook_resid_post"), stop)
    with skipping(model.bridge, start):
        final = model.bridge.run_with_hooks(
            resid[start], start_at_layer=start, fwd_hooks=[*hooks, last], use_cache=False
        )
    ahead = given.ahead[taken]
    logp = torch.zeros(given.ids.shape, device=ahead.device)
    hit = torch.zeros(given.ids.shape, dtype=torch.bool, device=ahead.device)
    parts = [_read(readout, x, y) for x, y in _rows(final, ahead)]
    logp[taken] = torch.cat([part[0] for part in parts]).to(ahead.device)
    hit[taken] = torch.cat([part[1] for part in parts]).to(ahead.device)
    return Scores(logp, hit)


def _rows(final: Tensor, ahead: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(final.split(ROWS), ahead.to(final.device).split(ROWS), strict=True)


def _read(
    readout: Readout, final: Float[Tensor, "row d_model"], ahead: Int[Tensor, " row"]
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    logp = readout.read(final).log_softmax(-1)
    return logp.gather(1, ahead[:, None])[:, 0], logp.argmax(-1) == ahead


def mean_over(values: Float[Tensor, "text pos"], given: Texts, role: str) -> Float[Tensor, " text"]:
    """Mean over a text's positions of one role; NaN where it has none."""
    taken = given.role == ROLES.index(role)
    return (values * taken).sum(1) / torch.where(taken.sum(1) > 0, taken.sum(1), torch.nan)


def exact(scores: Scores, given: Texts) -> Bool[Tensor, " text"]:
    """Whether greedy decoding would write the whole of it: every token is the likeliest."""
    return (scores.hit | (given.role <= 0)).all(1)


def checked(kind: str) -> Kind:
    """The kind of ablation. Raises BadInput for another word."""
    if kind not in get_args(Kind):
        raise BadInput(f"no ablation {kind!r}; there are {', '.join(get_args(Kind))}")
    return kind
