"""End-to-end fine-tuning: a whole set of transcoders, so that the model with them is the model.

Each transcoder of a set was trained alone, on what its MLP reads in the original model. With all
MLPs replaced at once, each reads what the others' errors have made of the stream, which it has
never seen, and errors add up over layers. So the set is trained on, together, on the one thing that
counts (Karvonen 2025, "Revisiting end-to-end sparse autoencoder training: a short finetune is all
you need"):

    loss = KL(p || q), mean over tokens        p: the model's next token, q: the replaced model's

1. The original model gives p, without gradients.
2. The model with all MLPs replaced gives q. Its own weights are frozen; gradients run through
   attention, norms and the transcoders below, down to the first layer.
3. Through a transcoder, gradients are sums over the k active features of a token, as in
   `sparse_training`: no matrix of tokens and features is made on the way back.
4. Adam moves encoders, decoders, biases and skip connections. Rows of W_dec keep their norms.

Parameters of raw activations differ in size from layer to layer. Each one's learning rate is
therefore in the unit that it would have between inputs and outputs of root mean square 1.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.adam import adam

from lens_utils import files
from lens_utils.cache import record
from lens_utils.errors import BadInput, Failure
from lens_utils.models import LoadedModel
from lens_utils.replacement import check, replacing
from lens_utils.sparse import Scales, Transcoder, by_feature, gather, row_dots, scatter
from lens_utils.sparse_training import BETAS, EPS, Recipe

HELD = 2**25
"""Logits that are held at once, 128 MB: rows of a batch go through the model in such parts."""


@dataclass(frozen=True)
class Tuning:
    """How a set is fine-tuned."""

    steps: int = 200
    """Planned steps: the learning rate follows them. More can be taken."""
    lr: float = 2e-4
    warm_up: float = 0.05
    """Share of the steps in which the learning rate rises to lr."""
    decay: float = 0.5
    """Share of the steps, at the end, in which it falls to 0."""
    sinks: int = 1
    """First positions of a text whose MLPs are not replaced and whose tokens do not count."""

    rate = Recipe.rate


class Tunable(Transcoder):
    """A transcoder with gradients by active features; what it computes is the same."""

    def __init__(self, t: Transcoder) -> None:
        super().__init__(*(None if p is None else p.detach().clone() for p in
                           (t.W_enc, t.b_enc, t.W_dec, t.b_dec, t.W_skip)), t.k,
                         None if t.threshold is None else t.threshold.clone())  # fmt: skip
        self.norms = self.W_dec.norm(dim=1, keepdim=True)
        """Of decoder rows: 1 for the lab's own, whatever they are for others'."""

    def forward(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
        """The MLP's output as the transcoder has it."""
        y = _Sparse.apply(x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self)
        return y if self.W_skip is None else y + F.linear(x, self.W_skip)

    def tuned(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name; a threshold is not."""
        return {name: p for name, p in self.named_parameters() if name != "threshold"}


class _Sparse(torch.autograd.Function):
    """Encode and decode. Back: a value's gradient is its decoder row . slope, where it is > 0."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, transcoder):  # noqa: ANN001, ANN205
        values, indices = transcoder.encode(x)
        ctx.save_for_backward(x, W_enc, W_dec, values, indices)
        return transcoder.decode(values, indices)

    @staticmethod
    def backward(ctx, slope):  # noqa: ANN001, ANN205
        x, W_enc, W_dec, values, indices = ctx.saved_tensors
        slope = slope.contiguous()
        dz = row_dots(W_dec, indices, slope).mul_(values > 0)
        n, order = len(W_enc), by_feature(indices, len(W_enc))
        b_enc = dz.new_zeros(n).index_add_(0, indices.flatten(), dz.flatten())
        return (
            gather(W_enc, indices, dz), scatter(x, indices, dz, n, order), b_enc,
            scatter(slope, indices, values, n, order), slope.sum(0), None,
        )  # fmt: skip


def divergence(
    model: LoadedModel,
    transcoders: Mapping[int, Transcoder],
    ids: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None = None,
    sinks: int = 1,
) -> Float[Tensor, " token"]:
    """KL(original || replaced) of the next token in nats, one value for every token but the sinks.

    real: which tokens are no padding, where rows are padded on the right; all without it. Tokens
    are in reading order, row after row. Differentiable in the transcoders and nothing else.
    """
    taken = torch.ones_like(ids, dtype=torch.bool) if real is None else real.clone()
    taken[:, :sinks] = False
    exact = torch.promote_types(model.bridge.W_U.dtype, torch.float32)
    with torch.no_grad():
        clean = model.bridge(ids, use_cache=False)[taken].to(exact).log_softmax(-1)
    hooks = replacing(transcoders, sinks)
    found = model.bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False)[taken]
    found = found.to(exact).log_softmax(-1)
    return F.kl_div(found, clean, reduction="none", log_target=True).sum(-1)


class Tuner:
    """A set in training: weights, optimiser, steps taken. `step` changes it in place.

    The model is only read. Raises BadInput for transcoders that do not fit the model.
    """

    def __init__(
        self, model: LoadedModel, recipe: Tuning, transcoders: Mapping[int, Transcoder]
    ) -> None:
        check(model, transcoders)
        self.model, self.recipe = model, recipe
        self.weights = {layer: Tunable(t) for layer, t in sorted(transcoders.items())}
        self.taken = 0
        """Steps taken."""
        self.units: dict[str, float] = {}
        """Of every parameter, such as 3.W_enc: its learning rate is a multiple of this."""
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self._parameters()
        }

    def transcoders(self) -> dict[int, Transcoder]:
        """Copies of the set as it stands."""
        return {
            layer: Transcoder(*(None if p is None else p.detach().clone() for p in
                                (t.W_enc, t.b_enc, t.W_dec, t.b_dec, t.W_skip)), t.k, t.threshold)
            for layer, t in self.weights.items()
        }  # fmt: skip

    def step(
        self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None = None
    ) -> float:
        """One step on a batch of texts; its KL in nats a token, before the step.

        real: which tokens are no padding (on the right). Raises Failure, with nothing changed, when
        the loss or a gradient is not a finite number.
        """
        if not self.units:
            self.units = self._measure(ids, real)
        taken = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        n = int(taken[:, self.recipe.sinks :].sum())
        if not n:
            raise BadInput(f"no token behind the first {self.recipe.sinks} of each text: give "
                           "longer texts")  # fmt: skip
        rows = max(1, HELD // (ids.shape[1] * self.model.bridge.cfg.d_vocab))
        loss = 0.0
        try:
            for parameter in dict(self._parameters()).values():
                parameter.requires_grad_(True)
            for part, kept in zip(ids.split(rows), taken.split(rows), strict=True):
                with torch.enable_grad():
                    kl = divergence(self.model, self.weights, part, kept, self.recipe.sinks).sum()
                loss += float(kl.detach()) / n
                self._finite(loss)
                (kl / n).backward()
            gradients = {name: p.grad for name, p in self._parameters()}
        finally:
            for _, parameter in self._parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        self._finite(sum(float(g.square().sum()) for g in gradients.values()), "gradient")
        self._update(gradients)
        return loss

    def _finite(self, size: float, what: str = "loss") -> None:
        if not size < float("inf"):
            raise Failure(f"the {what} of fine-tuning step {self.taken} is {size}; the last good "
                          f"state is the one before it: a lower rate than {self.recipe.lr:g} may "
                          "help")  # fmt: skip

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"{layer}.{name}", p) for layer, t in self.weights.items()
                for name, p in t.tuned().items()]  # fmt: skip

    def _measure(
        self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
    ) -> dict[str, float]:
        """What 1 is, of every parameter, where inputs and outputs have a root mean square of 1."""
        names = [f"blocks.{layer}.mlp.hook_{end}" for layer in self.weights
                 for end in ("in", "out")]  # fmt: skip
        held = record(self.model, ids, names)
        taken = torch.ones_like(ids, dtype=torch.bool) if real is None else real.clone()
        taken[:, : self.recipe.sinks] = False
        units = {}
        for layer in self.weights:
            x, y = (held[f"blocks.{layer}.mlp.hook_{end}"][taken] for end in ("in", "out"))
            scales = Scales.of(x, y)
            gain = scales.y_rms / scales.x_rms
            sizes = {"W_enc": gain, "b_enc": scales.y_rms, "W_dec": 1.0, "b_dec": scales.y_rms,
                     "W_skip": gain}  # fmt: skip
            units |= {f"{layer}.{name}": sizes[name] for name in self.weights[layer].tuned()}
        return units

    def _update(self, gradients: Mapping[str, Float[Tensor, "..."]]) -> None:
        rate = self.recipe.rate(self.taken)
        before = torch.tensor(float(self.taken), device=self.model.device)
        self.taken += 1
        for name, weight in self._parameters():
            gradient = gradients[name]
            if name.endswith("W_dec"):
                unit = F.normalize(weight, dim=1)
                gradient = gradient - torch.linalg.vecdot(gradient, unit)[:, None] * unit
            first, second = self.moments[name]
            adam([weight], [gradient], [first], [second], [], [before.to(weight.device).clone()],
                 fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1],
                 lr=rate * self.units[name], weight_decay=0.0, eps=EPS,
                 maximize=False)  # fmt: skip
            if name.endswith("W_dec"):
                norms = self.weights[int(name.partition(".")[0])].norms
                F.normalize(weight, dim=1, out=weight).mul_(norms)

    # To disk and back

    def save(self, path: Path) -> None:
        """Write PATH.safetensors, whole or not at all, beside the recipe in PATH.json."""
        files.write(path.with_suffix(".json"), asdict(self.recipe))
        state = {f"weights.{name}": p.detach() for name, p in self._parameters()}
        for name, (first, second) in self.moments.items():
            state |= {f"first.{name}": first, f"second.{name}": second}
        for name, unit in self.units.items():
            state[f"units.{name}"] = torch.tensor(unit, dtype=torch.float64)
        for layer, t in self.weights.items():
            state[f"norms.{layer}"] = t.norms
        state["taken"] = torch.tensor(self.taken)
        files.write(path.with_suffix(".safetensors"), state)

    def resume(self, path: Path) -> None:
        """Take up what `save` wrote for the same set. Raises BadInput where it is of another."""
        try:
            held = files.read(path.with_suffix(".json"))
            state = files.read(path.with_suffix(".safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            raise BadInput(f"{path} holds no fine-tuning to go on with: {error}") from None
        if changed := [k for k, v in asdict(self.recipe).items() if held.get(k) != v]:
            raise BadInput(f"{path} was fine-tuned with another {', '.join(changed)}: start afresh "
                           "in another folder, or set what it had")  # fmt: skip
        own = {name: p.shape for name, p in self._parameters()}
        if own != {n[8:]: t.shape for n, t in state.items() if n.startswith("weights.")}:
            raise BadInput(f"{path} is of another set of transcoders: start afresh in another "
                           "folder")  # fmt: skip
        for name, weight in self._parameters():
            weight.copy_(state[f"weights.{name}"])
            for kind, moment in zip(("first", "second"), self.moments[name], strict=True):
                moment.copy_(state[f"{kind}.{name}"])
        for layer, t in self.weights.items():
            t.norms.copy_(state[f"norms.{layer}"])
        self.units = {n[6:]: float(t) for n, t in state.items() if n.startswith("units.")}
        self.taken = int(state["taken"])
