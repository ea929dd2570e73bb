"""Training transcoders: one fused step on a batch of tokens, and the state around it.

The loss is the fraction of variance unexplained, FVU = sum |y - yhat|^2 / sum |y - mean y|^2, over
a batch. Only k features of a token are active, so all gradients are sums over (token, active)
pairs, written out here rather than left to autograd:

1. encode: one dense product, some tokens at a time, and the k largest of each row;
2. decode: gather k rows of W_dec; the error e = yhat - y, and g = dFVU/dyhat = 2 e / variance;
3. the gradient of each value is its decoder row . g, where the value is positive;
4. sorted by feature, a feature's pairs lie together: its gradients in W_dec and W_enc are then one
   weighted sum of the tokens' g and x (`sparse.scatter`). Sorting serves both.

Next to the weights and Adam's two moments, one gradient of one matrix is all that is held.

A feature that has not been active for `dead_after` tokens is dead. Dead features are given the
residual, held fixed, to explain: loss_aux = |e_dead + e|^2 / variance (AuxK; Gao et al. 2024,
appendix A.2), without b_dec, which yhat already has, and scaled down while they are few.

After each step rows of W_dec are divided by their norms, and what of their gradient is parallel to
them is taken out before it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.adam import adam

from lens_utils import files
from lens_utils.errors import BadInput, Failure
from lens_utils.sparse import (
    Scales,
    Transcoder,
    by_feature,
    fold,
    gather,
    initial,
    row_dots,
    scatter,
)

BETAS, EPS = (0.9, 0.999), 1e-12  # gradients of an FVU are small: 1e-8 would be felt


@dataclass(frozen=True)
class Recipe:
    """How one transcoder is trained."""

    n_features: int
    k: int = 32
    steps: int = 1000
    """Planned steps: the learning rate follows them. More can be taken."""
    lr: float = 1e-3
    warm_up: float = 0.05
    """Share of the steps in which the learning rate rises to lr."""
    decay: float = 0.2
    """Share of the steps, at the end, in which it falls to 0."""
    aux: float = 1 / 32
    """Weight of the dead features' loss; 0 leaves it out."""
    dead_after: int = 20_000
    """Tokens without activity after which a feature is dead: well below what the run will see."""
    decoder: Literal["linear", "random"] = "linear"
    """Decoder rows to begin with: the best linear map's answer to the encoder row, or random."""
    skip: Literal["none", "zero", "ridge"] = "none"
    """A skip connection that begins at zero, or at the best linear map."""
    max_gain: float = 1.0
    """Largest singular value of W_skip, between scaled inputs and outputs: large gains make
    attribution graphs that are wrong about causes."""
    penalty: float = 0.1
    """Of the linear map, in units of the inputs' variance."""
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = (step + 1) / max(1.0, self.warm_up * self.steps)
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * max(0.0, min(1.0, rising, falling))


def dead_after(tokens: int) -> int:
    """A threshold for dead features in a run of so many tokens: a twentieth, at most 10 million.

    The customary 10 million would call nothing dead in a run of one million.
    """
    return min(max(tokens // 20, 5_000), 10_000_000)


@dataclass
class Batch:
    """The forward pass of one batch: what its gradients are made of."""

    values: Float[Tensor, "token active"]
    indices: Int[Tensor, "token active"]
    slope: Float[Tensor, "token d_out"]
    """Gradient of the FVU in the transcoder's output."""
    variance: Float[Tensor, ""]
    fvu: Float[Tensor, ""]


def forward(
    transcoder: Transcoder, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
) -> Batch:
    """Steps 1 and 2: what the transcoder makes of x, and how far that is from y."""
    values, indices = transcoder.encode(x)
    error = gather(transcoder.W_dec, indices, values)
    error += transcoder.b_dec
    if transcoder.W_skip is not None:
        error += F.linear(x, transcoder.W_skip)
    error -= y
    variance = (y - y.mean(0)).square_().sum()
    fvu = error.square().sum() / variance
    return Batch(values, indices, error.mul_(2 / variance), variance, fvu)


def gradients(
    transcoder: Transcoder,
    x: Float[Tensor, "token d_in"],
    batch: Batch,
    dead: Int[Tensor, " dead"] | None = None,
    aux: float = 0.0,
) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """Steps 3 and 4: parameters' names, each with its gradient, made when it is asked for.

    What depends on the weights is worked out before the first, so each parameter may be changed,
    and its gradient dropped, before the next. dead: features that are to explain the residual
    with weight `aux`, as their ReLU activations.
    """
    slope, values, indices = batch.slope, batch.values, batch.indices
    n = transcoder.n_features
    dz = row_dots(transcoder.W_dec, indices, slope).mul_(values > 0)
    extra = {}
    if dead is not None and len(dead) and aux:
        extra = _revival(transcoder, x, batch, dead, aux)
    order = by_feature(indices, n)

    def with_extra(name: str, gradient: Float[Tensor, "..."]) -> tuple[str, Float[Tensor, "..."]]:
        return name, gradient.index_add_(0, dead, extra[name]) if extra else gradient

    yield "b_dec", slope.sum(0)
    if transcoder.W_skip is not None:
        yield "W_skip", slope.T @ x
    b_enc = torch.zeros_like(transcoder.b_enc).index_add_(0, indices.flatten(), dz.flatten())
    yield with_extra("b_enc", b_enc)
    del b_enc
    yield with_extra("W_dec", scatter(slope, indices, values, n, order))
    yield with_extra("W_enc", scatter(x, indices, dz, n, order))


def _revival(
    transcoder: Transcoder,
    x: Float[Tensor, "token d_in"],
    batch: Batch,
    dead: Int[Tensor, " dead"],
    aux: float,
) -> dict[str, Float[Tensor, "dead ..."]]:
    """Gradients of the dead features' loss. They are few, so their activations are dense."""
    W_enc, W_dec = transcoder.W_enc[dead], transcoder.W_dec[dead]
    z = F.linear(x, W_enc, transcoder.b_enc[dead]).relu_()
    weight = aux * min(1.0, len(dead) / (W_dec.shape[1] // 2))
    # slope is 2 e / variance, so this is 2 (z W_dec + e) / variance, weighted.
    slope = torch.addmm(batch.slope, z, W_dec * (2 / batch.variance)).mul_(weight)
    dz = F.linear(slope, W_dec).mul_(z > 0)
    return {"W_dec": z.T @ slope, "W_enc": dz.T @ x, "b_enc": dz.sum(0)}


class Trainer:
    """One transcoder in training: weights, optimiser, who fired when. `step` changes it in place.

    Everything is in float32, on the device of the first batch. For all layers of a model, have one
    Trainer each and one pass over the text; what a step needs beyond its state is freed by its end.
    """

    def __init__(self, recipe: Recipe, weights: Transcoder, scales: Scales) -> None:
        self.recipe = recipe
        self.weights = weights
        """Of scaled inputs and outputs; `transcoder` is for raw ones."""
        self.scales = scales
        self.taken = 0
        """Steps taken."""
        self.silent = torch.zeros(recipe.n_features, dtype=torch.long, device=weights.W_enc.device)
        """Tokens since each feature was last active."""
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p))
            for name, p in weights.named_parameters()
        }

    @classmethod
    def start(
        cls, recipe: Recipe, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
    ) -> "Trainer":
        """A new transcoder; scales and linear map are those of these activations.

        They should be some ten times as many as d_in. Raises BadInput for activations that do not
        vary or are not finite, and for k out of range.
        """
        scales = Scales.of(x, y)
        x, y = scales.inward(x), scales.outward(y)
        linear = ridge(Moments.of(x, y), recipe.penalty).W_skip
        map_ = linear if recipe.decoder == "linear" else None
        weights = initial(x.shape[1], y.shape[1], recipe.n_features, recipe.k, recipe.seed,
                          map_, recipe.skip != "none").to(x.device)  # fmt: skip
        if recipe.skip == "ridge":
            weights.W_skip.copy_(clip_gain(linear, recipe.max_gain))
        return cls(recipe, weights, scales)

    def step(
        self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
    ) -> dict[str, float]:
        """One step on raw activations. Returns fvu (before it), dead (share) and l0.

        Raises Failure, with nothing changed, when the loss is not a finite number.
        """
        x, y = self.scales.inward(x), self.scales.outward(y)
        batch = forward(self.weights, x, y)
        fvu = float(batch.fvu)
        if not fvu < float("inf"):
            raise Failure(f"the loss of step {self.taken} is {fvu}; the last good state is the one "
                          f"before it: a lower rate than {self.recipe.lr:g} may help, or look for "
                          "activations that are not finite")  # fmt: skip
        rate = self.recipe.rate(self.taken)
        self.taken += 1
        dead = self.dead().nonzero().flatten()
        few = max(1, y.shape[1] // 2)  # others get their turn: by order, for the same again
        turn = dead.roll(-self.taken * few)[:few]
        for name, gradient in gradients(self.weights, x, batch, turn, self.recipe.aux):
            self._update(name, gradient, rate)
        on = batch.values > 0
        self.silent += len(x)
        self.silent[batch.indices[on]] = 0
        return {"fvu": fvu, "dead": len(dead) / len(self.silent), "l0": float(on.sum() / len(x))}

    def dead(self) -> Bool[Tensor, " feature"]:
        """Which features have been silent for `dead_after` tokens."""
        return self.silent >= self.recipe.dead_after

    def transcoder(self) -> Transcoder:
        """A copy as it stands, for the model's own activations."""
        return fold(self.weights, self.scales)

    def _update(self, name: str, gradient: Float[Tensor, "..."], rate: float) -> None:
        weight = getattr(self.weights, name)
        if name == "W_dec":
            gradient.addcmul_(weight, torch.linalg.vecdot(gradient, weight)[:, None], value=-1)
        first, second = self.moments[name]
        before = torch.tensor(float(self.taken - 1), device=weight.device)
        adam([weight], [gradient], [first], [second], [], [before], fused=True, amsgrad=False,
             beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=0.0, eps=EPS,
             maximize=False)  # fmt: skip
        if name == "W_dec":
            F.normalize(weight, dim=1, out=weight)
        if name == "W_skip":
            weight.mul_((self.recipe.max_gain / gain(weight)).clamp(max=1.0))

    # To disk and back

    def save(self, path: Path) -> None:
        """Write PATH.safetensors, whole or not at all, beside the recipe in PATH.json."""
        files.write(path.with_suffix(".json"), asdict(self.recipe))
        state = {f"weights.{n}": p.detach() for n, p in self.weights.named_parameters()}
        for name, (first, second) in self.moments.items():
            state |= {f"first.{name}": first, f"second.{name}": second}
        for name, value in vars(self.scales).items():
            state[f"scales.{name}"] = torch.as_tensor(value, dtype=torch.float64)
        state |= {"silent": self.silent, "taken": torch.tensor(self.taken)}
        files.write(path.with_suffix(".safetensors"), state)

    @classmethod
    def load(cls, path: Path, recipe: Recipe | None = None, device: str = "cpu") -> "Trainer":
        """What `save` wrote. Raises BadInput for no such files, and where `recipe` differs."""
        try:
            held = Recipe(**files.read(path.with_suffix(".json")))
            state = files.read(path.with_suffix(".safetensors"))
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise BadInput(f"{path} holds no training to go on with: {error}") from None
        if recipe not in (None, held):
            changed = [k for k, v in asdict(held).items() if asdict(recipe)[k] != v]
            raise BadInput(f"{path} was trained with another {', '.join(changed)}: start afresh in "
                           "another folder, or set what it had")  # fmt: skip
        # Copies: a sum may round otherwise where memory is aligned otherwise, as in a mapped file.
        state = {name: tensor.to(device, copy=True) for name, tensor in state.items()}
        of = {kind: {n.removeprefix(kind): t for n, t in state.items() if n.startswith(kind)}
              for kind in ("weights.", "first.", "second.", "scales.")}  # fmt: skip
        scales = {n: t.float() if t.ndim else float(t) for n, t in of["scales."].items()}
        made = cls(held, Transcoder(**of["weights."], k=held.k), Scales(**scales))
        made.moments = {n: (of["first."][n], of["second."][n]) for n in of["first."]}
        made.silent, made.taken = state["silent"], int(state["taken"])
        return made


# Linear baselines


@dataclass
class Moments:
    """Sums over tokens, gathered batch by batch: all that a linear map needs. float64, CPU."""

    n: int
    x: Float[Tensor, " d_in"]
    y: Float[Tensor, " d_out"]
    xx: Float[Tensor, "d_in d_in"]
    xy: Float[Tensor, "d_in d_out"]

    @classmethod
    def of(cls, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> "Moments":
        """Of one batch."""
        x, y = x.float(), y.float()
        sums = [t.double().cpu() for t in (x.sum(0), y.sum(0), x.T @ x, x.T @ y)]
        return cls(len(x), *sums)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values(),
                                               strict=True)))  # fmt: skip


def ridge(moments: Moments, penalty: float = 1e-3) -> Transcoder:
    """The skip-only baseline: y = W_skip x + b_dec by ridge regression, no features.

    penalty: in units of the inputs' mean variance. b_dec is not penalised.
    """
    m = moments
    mean_x, mean_y = m.x / m.n, m.y / m.n
    xx = m.xx / m.n - torch.outer(mean_x, mean_x)
    xy = m.xy / m.n - torch.outer(mean_x, mean_y)
    size = penalty * xx.diagonal().mean()
    weight = torch.linalg.solve(xx + size * torch.eye(len(xx), dtype=xx.dtype), xy).T
    return _featureless((mean_y - weight @ mean_x).float(), weight.float(), len(xx))


def mean_baseline(moments: Moments) -> Transcoder:
    """The mean output whatever the input, no features: mean ablation as a transcoder."""
    return _featureless((moments.y / moments.n).float(), None, len(moments.x))


def _featureless(
    b_dec: Float[Tensor, " d_out"], W_skip: Float[Tensor, "d_out d_in"] | None, d_in: int
) -> Transcoder:
    empty = torch.zeros(0)
    return Transcoder(torch.zeros(0, d_in), empty, torch.zeros(0, len(b_dec)), b_dec, W_skip)


def clip_gain(weight: Float[Tensor, "d_out d_in"], max_gain: float) -> Float[Tensor, "d_out d_in"]:
    """The matrix with no singular value above max_gain: the nearest such one."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U * S.clamp(max=max_gain) @ Vh


def gain(weight: Float[Tensor, "d_out d_in"], rounds: int = 10) -> Float[Tensor, ""]:
    """The largest singular value, to a few per cent from below, by power iteration."""
    v = torch.ones(weight.shape[1], device=weight.device)
    for _ in range(rounds):
        v = F.normalize(weight.T @ (weight @ v), dim=0)
    return torch.linalg.vector_norm(weight @ v)
