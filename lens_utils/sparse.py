"""Transcoders: an MLP's output as a sum of a few of many features of its input.

A transcoder reads what the MLP reads and writes what the MLP writes (Dunefsky, Chlenski and Nanda
2024, "Transcoders find interpretable LLM feature circuits"):

    pre = W_enc x + b_enc        one number for each feature
    z   = the k largest of pre where they are positive, all others 0   (TopK; Gao et al. 2024)
    y   = sum over active i of z_i W_dec[i] + b_dec (+ W_skip x)

Of thousands of features, k are active. So what is handed on are the k values and their indices,
and to decode is to gather k rows of W_dec; no matrix of all activations is ever kept. ReLU
(whatever is positive) and JumpReLU (whatever exceeds its own threshold) are here to read other
people's transcoders; a token then has as many values as the batch's busiest, filled up with zeros.

The rows of W_dec have norm 1, so a value is the length of what its feature writes and "the k
largest" compares features by that. Transcoders are trained on inputs and outputs of mean 0 and
root mean square 1; `fold` moves this into the weights, without a trace.

Axes: token, feature, active (features of one token), d_in and d_out (d_model of the MLP's input
and output).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from lens_utils.errors import BadInput

HELD = 2**22
"""Numbers that an intermediate result may hold: 16 MB, about a CPU's last cache."""


class Transcoder(nn.Module):
    """A transcoder of one layer: TopK with `k`, JumpReLU with a `threshold`, ReLU with neither.

    Its parameters ask for no gradient until `requires_grad_()` says so; `encode`, `decode` and the
    call itself can be differentiated. Raises BadInput for shapes that do not fit together.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " n"],
        W_dec: Float[Tensor, "rows d_out"],
        b_dec: Float[Tensor, " m"],
        W_skip: Float[Tensor, "out into"] | None = None,
        k: int | None = None,
        threshold: Float[Tensor, " t"] | None = None,
    ) -> None:
        super().__init__()
        n, d_in = W_enc.shape
        fits = {"b_enc": (b_enc, (n,)), "W_dec": (W_dec, (n, len(b_dec))),
                "W_skip": (W_skip, (len(b_dec), d_in)), "threshold": (threshold, (n,))}  # fmt: skip
        for name, (tensor, shape) in fits.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise BadInput(f"{name} is {tuple(tensor.shape)}, but beside W_enc {n, d_in} and "
                               f"b_dec {len(b_dec)} it has to be {shape}")  # fmt: skip
        if k is not None and threshold is not None:
            raise BadInput("a transcoder has either k (TopK) or thresholds (JumpReLU), not both")
        if k is not None and not 1 <= k <= n:
            raise BadInput(f"k = {k} of {n} features: give a k from 1 to {n}, or more features")
        self.k = k
        named = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec,
                 "W_skip": W_skip, "threshold": threshold}  # fmt: skip
        for name, x in named.items():
            self.register_parameter(name, None if x is None else nn.Parameter(x.detach(), False))

    @property
    def activation(self) -> str:
        """topk, jumprelu or relu."""
        return "topk" if self.k else "relu" if self.threshold is None else "jumprelu"

    @property
    def n_features(self) -> int:
        """Size of the dictionary."""
        return len(self.W_enc)

    def preactivations(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token feature"]:
        """W_enc x + b_enc: dense, so for few tokens at a time."""
        return F.linear(x, self.W_enc, self.b_enc)

    def encode(
        self, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token active"], Int[Tensor, "token active"]]:
        """Values (not negative) and indices of the active features, in no order.

        Exactly k a token, of which those are 0 whose pre-activation is not positive; for ReLU and
        JumpReLU as many as the busiest token has. A value of 0 is no activation.
        """
        parts = [self._active(self.preactivations(rows)) for rows in _chunks(x, self.n_features)]
        width = max((values.shape[1] for values, _ in parts), default=self.k or 0)
        if not parts:
            return x.new_zeros(0, width), torch.zeros(0, width, dtype=torch.long, device=x.device)
        filled = [[F.pad(t, (0, width - t.shape[1])) for t in part] for part in parts]
        values, indices = (torch.cat(tensors) for tensors in zip(*filled, strict=True))
        return values, indices

    def decode(
        self, values: Float[Tensor, "token active"], indices: Int[Tensor, "token active"]
    ) -> Float[Tensor, "token d_out"]:
        """What these features write, and b_dec; without the skip connection."""
        return gather(self.W_dec, indices, values) + self.b_dec

    def forward(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
        """The MLP's output as the transcoder has it."""
        y = self.decode(*self.encode(x))
        return y if self.W_skip is None else y + F.linear(x, self.W_skip)

    def _active(
        self, pre: Float[Tensor, "token feature"]
    ) -> tuple[Float[Tensor, "token active"], Int[Tensor, "token active"]]:
        if self.k:
            values, indices = pre.topk(self.k, sorted=False)
            return values.relu(), indices
        on: Bool[Tensor, "token feature"] = pre > (0 if self.threshold is None else self.threshold)
        pre = pre.relu() * on
        return pre.topk(int(on.sum(1).max()), sorted=False)


def _chunks(x: Shaped[Tensor, "token d"], each: int) -> tuple[Shaped[Tensor, "part d"], ...]:
    """Rows of x in parts, of which `each` numbers a row make no more than HELD."""
    return x.split(max(1, HELD // max(each, 1))) if len(x) else ()


# Sums and dot products of few rows out of many


def gather(
    rows: Float[Tensor, "feature d"],
    indices: Int[Tensor, "token active"],
    weights: Float[Tensor, "token active"],
    portable: bool | None = None,
) -> Float[Tensor, "token d"]:
    """sum_a weights[t, a] rows[indices[t, a]] for every token t.

    embedding_bag, or (portable; by itself on MPS, whose embedding_bag has been wrong without a
    word) gathered rows and an einsum, some tokens at a time.
    """
    if not indices.numel():
        return rows.new_zeros(len(indices), rows.shape[1])
    if not (_on_mps(rows) if portable is None else portable):
        return F.embedding_bag(indices, rows, per_sample_weights=weights, mode="sum")
    size = indices.shape[1] * rows.shape[1]
    parts = zip(_chunks(indices, size), _chunks(weights, size), strict=True)
    return torch.cat([einsum(rows[i], w, "token active d, token active -> token d")
                      for i, w in parts])  # fmt: skip


def row_dots(
    rows: Float[Tensor, "feature d"],
    indices: Int[Tensor, "token active"],
    vectors: Float[Tensor, "token d"],
    portable: bool | None = None,
) -> Float[Tensor, "token active"]:
    """rows[indices[t, a]] . vectors[t]: the gradient of `gather` in its weights."""
    if not (_on_mps(rows) if portable is None else portable):
        with torch.enable_grad():  # no graph but this one sum; the kernel has no public name
            weights = vectors.new_zeros(indices.shape, requires_grad=True)
            summed = gather(rows.detach(), indices, weights, portable=False)
        return torch.autograd.grad(summed, weights, vectors)[0]
    size = indices.shape[1] * rows.shape[1]
    parts = zip(_chunks(indices, size), _chunks(vectors, size), strict=True)
    return torch.cat([einsum(rows[i], v, "token active d, token d -> token active")
                      for i, v in parts])  # fmt: skip


def by_feature(
    indices: Int[Tensor, "token active"], n_features: int
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " feature"]]:
    """All (token, active) pairs in the order of their features, and where each feature begins."""
    ordered = indices.flatten().int().sort()
    every = torch.arange(n_features, dtype=torch.int32, device=indices.device)
    return ordered.indices, torch.searchsorted(ordered.values, every)


def scatter(
    vectors: Float[Tensor, "token d"],
    indices: Int[Tensor, "token active"],
    weights: Float[Tensor, "token active"],
    n_features: int,
    order: tuple[Int[Tensor, " pair"], Int[Tensor, " feature"]] | None = None,
    portable: bool | None = None,
) -> Float[Tensor, "feature d"]:
    """sum of weights[t, a] vectors[t] over all (t, a) with indices[t, a] = f: gather's transpose.

    With the pairs in the order of their features (`by_feature`), each feature's sum is one bag
    of tokens, and the result is written once, row after row.
    """
    if _on_mps(vectors) if portable is None else portable:
        summed, size = vectors.new_zeros(n_features, vectors.shape[1]), indices.shape[1]
        size *= vectors.shape[1]
        parts = zip(*(_chunks(t, size) for t in (vectors, indices, weights)), strict=True)
        for v, i, w in parts:
            summed.index_add_(0, i.flatten(), (w[..., None] * v[:, None]).flatten(0, 1))
        return summed
    pairs, starts = by_feature(indices, n_features) if order is None else order
    tokens = torch.div(pairs, indices.shape[1], rounding_mode="floor")
    per_sample = weights.flatten()[pairs]
    return F.embedding_bag(tokens, vectors, starts, per_sample_weights=per_sample, mode="sum")


def _on_mps(tensor: Float[Tensor, "..."]) -> bool:
    return tensor.device.type == "mps"


# Scales


@dataclass(frozen=True)
class Scales:
    """Means of a layer's inputs and outputs, and the root mean squares around them."""

    x_mean: Float[Tensor, " d_in"]
    x_rms: float
    y_mean: Float[Tensor, " d_out"]
    y_rms: float

    @classmethod
    def of(cls, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> "Scales":
        """Measured on a batch. Raises BadInput where one of the two does not vary, or is NaN."""
        means = x.float().mean(0), y.float().mean(0)
        rms = [float((t - m).square().mean().sqrt()) for t, m in zip((x, y), means, strict=True)]
        if not all(0 < r < float("inf") for r in rms):
            raise BadInput(f"inputs vary by {rms[0]:.3g}, outputs by {rms[1]:.3g}: a transcoder "
                           "needs finite activations of more than one token")  # fmt: skip
        return cls(means[0], rms[0], means[1], rms[1])

    def inward(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        """Inputs as a transcoder is trained on them, in float32."""
        return (x.float() - self.x_mean).div_(self.x_rms)

    def outward(self, y: Float[Tensor, "token d_out"]) -> Float[Tensor, "token d_out"]:
        """Outputs as a transcoder is trained on them, in float32."""
        return (y.float() - self.y_mean).div_(self.y_rms)


def fold(transcoder: Transcoder, scales: Scales) -> Transcoder:
    """The transcoder of raw inputs and outputs that equals this one of scaled ones.

    With x' = (x - mean)/rms, and y likewise: y = rms_y T(x') + mean_y. The factor rms_y goes into
    the encoder rather than the decoder (it is the same for all features, so none changes its
    place among the k largest), and rows of W_dec keep their norms.
    """
    t, s = transcoder, scales
    gain = s.y_rms / s.x_rms
    mean = s.x_mean.to(t.W_enc.dtype)
    b_dec = s.y_rms * t.b_dec + s.y_mean.to(mean.dtype)
    skip = None if t.W_skip is None else gain * t.W_skip
    return Transcoder(
        gain * t.W_enc,
        s.y_rms * t.b_enc - gain * (t.W_enc @ mean),
        t.W_dec.clone(),
        b_dec if skip is None else b_dec - skip @ mean,
        skip,
        t.k,
        None if t.threshold is None else s.y_rms * t.threshold,
    )


# Beginnings


def unit_rows(rows: Float[Tensor, "feature d"]) -> Float[Tensor, "feature d"]:
    """Each row divided by its norm."""
    return F.normalize(rows, dim=1)


def initial(
    d_in: int,
    d_out: int,
    n_features: int,
    k: int,
    seed: int,
    linear: Float[Tensor, "d_out d_in"] | None = None,
    skip: bool = False,
) -> Transcoder:
    """An untrained TopK transcoder for scaled activations; drawn on the CPU.

    W_enc uniform within 1/sqrt(d_in), torch's default for a linear layer; biases and W_skip 0.
    Rows of W_dec are unit vectors: random directions or, with `linear`, a linear map from input to
    output, what that map makes of the feature's encoder row. Raises BadInput for k out of range.
    """
    source = torch.Generator().manual_seed(seed)
    W_enc = (2 * torch.rand(n_features, d_in, generator=source) - 1) / d_in**0.5
    random = torch.randn(n_features, d_out, generator=source)
    W_dec = unit_rows(random if linear is None else W_enc @ linear.cpu().float().T)
    W_skip = torch.zeros(d_out, d_in) if skip else None
    return Transcoder(W_enc, torch.zeros(n_features), W_dec, torch.zeros(d_out), W_skip, k)
