"""Direct logit attribution: what every component adds to answer - foil, exactly, on raw weights.

The residual stream is a sum: the embedding, every head, every attention bias, every MLP. ln_final
divides it by a number and scales its dimensions; with the number held at what it was in this
forward, that is linear, so the logit difference is a sum over components too (Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits"; Wang et al. 2022, arXiv:2211.00593):

    contribution of c = (c [- mean(c), LayerNorm]) * gain / scale · (W_U[answer] - W_U[foil])

1. The direction W_U[answer] - W_U[foil] is pulled back through ln_final into the stream, once per
   pair: a contribution is then a dot product with it. The biases of ln_final and of the unembedding
   make one constant row.
2. Where a block norms a branch's output before adding it (Gemma 2 and 3), the direction is pulled
   back through that norm as well, at that norm's own scale.
3. Heads: the direction is projected through W_O first and then meets z, or pattern * v for every
   source position. Nothing of size [head, pos, d_model] is made.

Gains are found from what a norm does, not from its parameters: Gemma stores w for a gain of 1 + w.
The difference is taken before any softcap; `capped` is what the softcap makes of it.

It is direct only: what a head does to the output by way of later heads is not in its number, and
neither is what it does to the scale.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.lens import hook
from lens_utils.models import LoadedModel
from lens_utils.pairs import Batch


class Norm:
    """A norm taken apart: gain * (x [- mean]) / scale + bias. An absent norm does nothing."""

    def __init__(self, component: nn.Module | None, like: Float[Tensor, "*axes d_model"]) -> None:
        inner = getattr(component, "original_component", component)
        self.plain = inner is None or isinstance(inner, nn.Identity)
        self.centred = isinstance(inner, nn.LayerNorm)
        self.gain: Float[Tensor, " d_model"] = torch.ones_like(like[0])
        self.bias: Float[Tensor, " d_model"] = torch.zeros_like(like[0])
        if not self.plain:
            # A copy: calling the bridge's module would fire its hooks. The probe is so long that
            # eps vanishes beside it.
            norm = copy.deepcopy(inner).to(like)
            probe = torch.full_like(self.gain, 1e3)
            probe[1::2] *= -1
            unit = self._centre(probe)
            there, back = norm(probe), norm(-probe)
            self.gain = (there - back) / 2 / (unit / unit.square().mean().sqrt())
            self.bias = (there + back) / 2

    def pull(
        self, direction: Float[Tensor, "pair d_model"], scale: Float[Tensor, "pair 1"] | None
    ) -> Float[Tensor, "pair d_model"]:
        """The direction on the norm's input that a direction on its output is, at a scale."""
        # Centring is a symmetric projection: to centre the direction is to centre what meets it.
        return self._centre(self.gain * direction) / (1 if scale is None else scale)

    def push(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """What the norm makes of a small part x of its input, up to its scale."""
        return self.gain * self._centre(x)

    def _centre(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True)
class Attribution:
    """What every component adds to the logit difference answer - foil at the last token, in nats.

    embed, heads, attn_bias, mlp and constant sum to logit_diff; sources sum to heads.
    """

    embed: Float[Tensor, " pair"]
    """The stream before the first block, with positions where they are added."""
    heads: Float[Tensor, "pair layer head"]
    sources: Float[Tensor, "pair layer head pos"]
    """A head's contribution by the position that it comes from."""
    attn_bias: Float[Tensor, "pair layer"]
    """b_O. Biases of values are in the heads: attention passes on all of them."""
    mlp: Float[Tensor, "pair layer"]
    """With its bias."""
    constant: Float[Tensor, " pair"]
    """The bias of ln_final through W_U, and the unembedding's own."""
    attention: Float[Tensor, "pair layer head pos"]
    """The last token's pattern."""
    logit_diff: Float[Tensor, " pair"]
    """The model's own, before any softcap."""
    capped: Float[Tensor, " pair"]
    """The same behind the softcap; without one, the same."""

    @property
    def attn(self) -> Float[Tensor, "pair layer"]:
        """Attention as a whole, with its bias."""
        return self.heads.sum(-1) + self.attn_bias

    @property
    def total(self) -> Float[Tensor, " pair"]:
        """The sum of all components."""
        return self.embed + self.attn.sum(-1) + self.mlp.sum(-1) + self.constant

    @property
    def mlp_share(self) -> Float[Tensor, " pair"]:
        """The MLPs' part of sum |attn| + sum |mlp|, both summed over layers, signs dropped."""
        attn, mlp = self.attn.abs().sum(-1), self.mlp.abs().sum(-1)
        return mlp / (attn + mlp)

    def part(self, name: str) -> Float[Tensor, " pair"]:
        """One component: embed, constant, L3H2, "L3 attn", "L3 attn bias" or "L3 mlp".

        Raises BadInput for one that the model does not have.
        """
        layers, heads = self.heads.shape[1:]
        parts = {"embed": self.embed, "constant": self.constant}
        for layer in range(layers):
            parts |= {f"L{layer}H{h}": self.heads[:, layer, h] for h in range(heads)}
            parts |= {
                f"L{layer} {kind}": values[:, layer]
                for kind, values in
                (("attn", self.attn), ("attn bias", self.attn_bias), ("mlp", self.mlp))
            }  # fmt: skip
        if name not in parts:
            raise BadInput(
                f"no component {name!r}: there are embed, constant, and in layers 0 to "
                f"{layers - 1} such as L0H{heads - 1}, L0 attn, L0 attn bias, L0 mlp"
            )
        return parts[name]


@torch.no_grad()
def attribute(model: LoadedModel, batch: Batch) -> Attribution:
    """Attribute answer - foil behind the clean prompts to every component, from one forward.

    Another pair's answer and foil in the batch attribute this prompt to another direction. Raises
    BadInput when answer and foil are the same.
    """
    bridge, n_layers = model.bridge, model.n_layers
    asked, constant = _asked(model, batch)
    names = [hook(0), "unembed.hook_out"]
    for layer in range(n_layers):
        names += [f"blocks.{layer}.attn.{name}" for name in ("hook_z", "hook_v", "hook_pattern")]
        names += [f"blocks.{layer}.hook_mlp_out"] if _has_mlp(model, layer) else []
    names = [*names, *_scales(model)]
    held = record(model, batch.clean, names)
    stream, constant = _into_stream(model, asked, constant, held)

    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("heads", "sources", "attn_bias", "mlp", "attention")
    }
    for layer in range(n_layers):
        z, v, pattern = (
            held[f"blocks.{layer}.attn.{name}"].to(stream)
            for name in ("hook_z", "hook_v", "hook_pattern")
        )
        attn = bridge.blocks[layer].attn
        way, bias = _into_branch(model, layer, "ln1_post", stream, held)
        toward = einsum(
            attn.W_O.to(stream), way, "head d_head d_model, pair d_model -> pair head d_head"
        )
        # Heads that share a kv_head are neighbours.
        grouped = toward.unflatten(1, (v.shape[2], -1))
        by_value = einsum(
            v,
            grouped,
            "pair pos kv_head d_head, pair kv_head group d_head -> pair kv_head group pos",
        )
        parts["heads"].append((z[:, -1] * toward).sum(-1))
        parts["sources"].append(by_value.flatten(1, 2) * pattern[:, :, -1])
        parts["attention"].append(pattern[:, :, -1])
        parts["attn_bias"].append(bias if attn.b_O is None else bias + way @ attn.b_O.to(stream))
        written = held.get(f"blocks.{layer}.hook_mlp_out")
        parts["mlp"].append(
            torch.zeros_like(constant) if written is None else _dot(written[:, -1], stream)
        )
    logits = held["unembed.hook_out"][:, -1].float()
    cap = float(bridge.cfg.output_logits_soft_cap or -1)
    both = logits.gather(1, torch.stack([batch.answer, batch.foil], 1))
    behind = cap * torch.tanh(both / cap) if cap > 0 else both
    return Attribution(
        embed=_dot(held[hook(0)][:, -1], stream),
        constant=constant,
        logit_diff=both[:, 0] - both[:, 1],
        capped=behind[:, 0] - behind[:, 1],
        **{name: torch.stack(values, dim=1) for name, values in parts.items()},
    )


@torch.no_grad()
def neurons(
    model: LoadedModel, batch: Batch, layers: Sequence[int]
) -> dict[int, tuple[Float[Tensor, "pair neuron"], Float[Tensor, " pair"]]]:
    """What every neuron of these layers' MLPs adds to answer - foil, and what their biases add.

    Together they are the MLP's contribution. Raises BadInput for a layer without an MLP.
    """
    for layer in layers:
        if not 0 <= layer < model.n_layers or not _has_mlp(model, layer):
            raise BadInput(f"{model.name} has no MLP in layer {layer}: its layers are 0 to "
                           f"{model.n_layers - 1}")  # fmt: skip
    asked, constant = _asked(model, batch)
    post = {layer: f"blocks.{layer}.mlp.hook_post" for layer in layers}
    held = record(model, batch.clean, [*post.values(), *_scales(model)])
    stream, _ = _into_stream(model, asked, constant, held)
    found = {}
    for layer, name in post.items():
        way, bias = _into_branch(model, layer, "ln2_post", stream, held)
        mlp = model.bridge.blocks[layer].mlp
        b_out = getattr(mlp, "b_out", None)
        values = held[name][:, -1].to(stream) * (way @ mlp.W_out.to(stream).T)
        found[layer] = values, bias if b_out is None else bias + way @ b_out.to(stream)
    return found


# Steps


def _asked(
    model: LoadedModel, batch: Batch
) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, " pair"]]:
    """W_U[answer] - W_U[foil] in float32, and the same of the unembedding's bias."""
    same = batch.answer == batch.foil
    if same.any():
        raise BadInput(f"{batch.pairs[int(same.nonzero()[0])].id}: answer and foil are the same "
                       "token: there is no difference to attribute")  # fmt: skip
    W_U, b_U = model.bridge.W_U, getattr(model.bridge.unembed, "b_U", None)
    asked = (W_U[:, batch.answer].float() - W_U[:, batch.foil].float()).T
    if b_U is None:
        return asked, torch.zeros_like(asked[:, 0])
    return asked, b_U[batch.answer].float() - b_U[batch.foil].float()


def _scales(model: LoadedModel) -> list[str]:
    """The hooks that hold what norms divide by, of those between a component and the logits."""
    places = ["ln_final", *(f"blocks.{layer}.{norm}" for layer in range(model.n_layers)
                            for norm in ("ln1_post", "ln2_post"))]  # fmt: skip
    return [n for place in places if (n := f"{place}.hook_scale") in model.bridge.hook_dict]


def _into_stream(
    model: LoadedModel,
    asked: Float[Tensor, "pair d_model"],
    constant: Float[Tensor, " pair"],
    held: Mapping[str, Float[Tensor, "pair ..."]],
) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, " pair"]]:
    """The asked direction on the residual stream, and what holds whatever the stream is."""
    norm = Norm(model.bridge.ln_final, asked)
    return norm.pull(asked, _scale(held, "ln_final", asked)), constant + asked @ norm.bias


def _into_branch(
    model: LoadedModel,
    layer: int,
    name: str,
    stream: Float[Tensor, "pair d_model"],
    held: Mapping[str, Float[Tensor, "pair ..."]],
) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, " pair"]]:
    """The direction on a branch's own output, before the norm that some models put behind it."""
    norm = Norm(_branch_norm(model, layer, name), stream)
    scale = _scale(held, f"blocks.{layer}.{name}", stream)
    return norm.pull(stream, scale), stream @ norm.bias


def _branch_norm(model: LoadedModel, layer: int, name: str) -> nn.Module | None:
    return getattr(model.bridge.blocks[layer], name, None)


def _scale(
    held: Mapping[str, Float[Tensor, "pair ..."]], place: str, like: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "pair 1"] | None:
    found = held.get(f"{place}.hook_scale")
    return None if found is None else found[:, -1].to(like)


def _has_mlp(model: LoadedModel, layer: int) -> bool:
    return hasattr(model.bridge.blocks[layer], "mlp")


def _dot(
    x: Float[Tensor, "pair d_model"], direction: Float[Tensor, "pair d_model"]
) -> Float[Tensor, " pair"]:
    return torch.linalg.vecdot(x.to(direction), direction)
