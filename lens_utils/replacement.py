"""The replacement model: a language model whose MLPs are read as transcoder features.

A transcoder (`sparse`) reads what an MLP reads, behind the norm, and writes what it writes:

    mlp(x)  =  sum of activation * W_dec[feature] + b_dec [+ W_skip x]  +  error

Two things are done with it here; `interventions` change features in the model itself.

1. `freeze` takes one prompt apart: the error is kept as a node of its own, attention patterns and
   what norms divide by are held, and what remains is linear (`frozen`). It equals the model on this
   prompt exactly. Gains of norms, also of those behind attention and MLP (Gemma 2 and 3), go into
   the matrices; they are found from what a norm does, since Gemma stores w for a gain of 1 + w.
2. `replacing` puts the transcoders in place of the MLPs, errors and all: how faithful they are.

At the first positions (`sinks`: a text's first token is a hundred times longer than the rest) there
are no features and no errors; what the MLP wrote there counts as constant.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lens_utils.attribution import Norm
from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.frozen import Block, Frozen
from lens_utils.lens import hook
from lens_utils.models import LoadedModel
from lens_utils.sparse import Transcoder

# One prompt, taken apart


@torch.no_grad()
def freeze(
    model: LoadedModel,
    transcoders: Mapping[int, Transcoder],
    ids: Sequence[int],
    sinks: int = 1,
    logit_share: float = 0.95,
    max_logits: int = 10,
) -> Frozen:
    """The linear model of a prompt: its features, errors and constants, and the maps between.

    transcoders: by layer, on the model's device; where there is none, the MLP is all error. Logits:
    the fewest likeliest with a probability of `logit_share` together, at most `max_logits`. Raises
    BadInput for transcoders of another width or layer, and for a prompt with nothing behind the
    sinks.
    """
    check(model, transcoders)
    if len(ids) <= sinks:
        raise BadInput(f"a prompt of {len(ids)} tokens has nothing behind its first {sinks}")
    bridge, tokens = model.bridge, torch.tensor(ids, device=model.device)
    held = {name: x[0] for name, x in record(model, tokens[None], held_names(model)).items()}
    embed = held[hook(0)]
    embed = embed.to(torch.promote_types(embed.dtype, torch.float32))
    held = {name: x.to(embed) for name, x in held.items()}
    parallel = bool(bridge.cfg.parallel_attn_mlp)
    constant, blocks = torch.zeros_like(embed), []
    errors = embed.new_zeros(model.n_layers, *embed.shape)
    # Of every layer: places, activations, encoders, decoders, biases.
    parts = [(tokens.new_zeros(0, 3), embed[0, :0], embed[:0], embed[:0], embed[0, :0])]
    for layer in range(model.n_layers):
        inner = _Inner(model, layer, held)
        by_attention = inner.attention(constant)
        below = constant if parallel else constant + by_attention
        x, written = held[f"blocks.{layer}.mlp.hook_in"], held[f"blocks.{layer}.mlp.hook_out"]
        inert = inner.ln2.push(below) / inner.scale["ln2"] + inner.ln2.bias
        transcoder = transcoders.get(layer)
        error, by_mlp = written, torch.zeros_like(written)
        if transcoder is not None:
            values, index = transcoder.encode(x.to(transcoder.W_enc))
            values[:sinks] = 0
            error = written - transcoder.decode(values, index).to(x) - skipped(transcoder, x)
            by_mlp = transcoder.b_dec.to(x) + skipped(transcoder, inert)
            parts.append(inner.features(transcoder, values.to(x), index, inert))
        by_mlp[:sinks] += error[:sinks]
        errors[layer, sinks:] = inner.behind_mlp(error[sinks:], slice(sinks, None))
        constant = constant + by_attention + inner.behind_mlp(by_mlp) + inner.ln2_post.bias
        blocks.append(inner.block(transcoder))
    features, activations, encoders, decoders, bias = map(torch.cat, zip(*parts, strict=True))
    logit_ids, probs, unembed, logit_bias, logits = _readout(
        model, held, constant[-1:], logit_share, max_logits
    )
    return Frozen(
        tokens, tuple(blocks), parallel, features, activations, encoders, decoders, errors, embed,
        unembed, logit_ids, probs, torch.cat([bias, logit_bias]), torch.cat([activations, logits]),
    )  # fmt: skip


def _readout(
    model: LoadedModel,
    held: Mapping[str, Tensor],
    constant: Float[Tensor, "1 d_model"],
    share: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The likeliest logits: ids, probabilities, directions read, and their bias and value.

    Both less the mean of all logits; constant: what constants add to the final stream.
    """
    logits = held["unembed.hook_out"][-1]
    cap = float(model.bridge.cfg.output_logits_soft_cap or -1)
    capped = cap * torch.tanh(logits / cap) if cap > 0 else logits
    probs, ids = capped.softmax(-1).topk(min(most, len(logits)))
    n = min(int((probs.cumsum(0) < share).sum()) + 1, len(probs))
    probs, ids = probs[:n], ids[:n]
    norm, W_U = Norm(model.bridge.ln_final, constant), model.bridge.W_U.to(constant)
    scale = held.get("ln_final.hook_scale", torch.ones_like(constant[:, :1]))[-1]
    directions = (W_U[:, ids] - W_U.mean(1, keepdim=True)).T
    b_U = getattr(model.bridge.unembed, "b_U", None)
    b_U = torch.zeros_like(logits) if b_U is None else b_U.to(constant)
    inert = norm.push(constant[0]) / scale + norm.bias
    bias = directions @ inert + b_U[ids] - b_U.mean()
    read = norm.pull(directions, None) / scale
    return ids, probs, read, bias, logits[ids] - logits.mean()


def held_names(model: LoadedModel) -> list[str]:
    """The hooks of everything that is held."""
    known = model.bridge.hook_dict
    parts = ("attn.hook_pattern", "ln1.hook_scale", "ln1_post.hook_scale", "ln2.hook_scale",
             "ln2_post.hook_scale", "mlp.hook_in", "mlp.hook_out")  # fmt: skip
    names = [f"blocks.{layer}.{part}" for layer in range(model.n_layers) for part in parts]
    names = [hook(0), *names, "ln_final.hook_scale", "unembed.hook_out"]
    return [name for name in names if name in known]


def skipped(
    transcoder: Transcoder, x: Float[Tensor, "*lead d_model"]
) -> Float[Tensor, "*lead d_model"]:
    """What the skip connection writes; zeros where there is none."""
    W_skip = transcoder.W_skip
    return torch.zeros_like(x) if W_skip is None else x @ W_skip.to(x).T


class _Inner:
    """One block at one prompt: its norms, what they divide by, and its weights."""

    def __init__(self, model: LoadedModel, layer: int, held: Mapping[str, Tensor]) -> None:
        block, like = model.bridge.blocks[layer], held[hook(0)]
        self.layer, self.attn = layer, block.attn
        names, one = ("ln1", "ln1_post", "ln2", "ln2_post"), torch.ones_like(like[:, :1])
        self.ln1, self.ln1_post, self.ln2, self.ln2_post = (
            Norm(getattr(block, name, None), like) for name in names
        )
        self.scale = {name: held.get(f"blocks.{layer}.{name}.hook_scale", one) for name in names}
        self.pattern = held[f"blocks.{layer}.attn.hook_pattern"]
        self.W_O, self.W_V = self.attn.W_O.to(like), self.attn.W_V.to(like)

    def behind_mlp(
        self, x: Float[Tensor, "pos d_model"], where: slice | Tensor = slice(None)
    ) -> Float[Tensor, "pos d_model"]:
        """What an addend of the MLP's output at some positions adds to the stream."""
        return self.ln2_post.push(x) / self.scale["ln2_post"][where]

    def attention(self, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """What attention adds to the stream, patterns and norms held, with all of its biases."""
        x = self.ln1.push(stream) / self.scale["ln1"] + self.ln1.bias
        v = einsum(x, self.W_V, "key d_model, kv_head d_model d_head -> key kv_head d_head")
        if getattr(self.attn, "b_V", None) is not None:
            v = v + self.attn.b_V.to(v)
        pattern = self.pattern.unflatten(0, (v.shape[1], -1))
        z = einsum(pattern, v, "kv_head group query key, key kv_head d_head -> "
                               "query kv_head group d_head").flatten(1, 2)  # fmt: skip
        out = einsum(z, self.W_O, "query head d_head, head d_head d_model -> query d_model")
        if getattr(self.attn, "b_O", None) is not None:
            out = out + self.attn.b_O.to(out)
        return self.ln1_post.push(out) / self.scale["ln1_post"] + self.ln1_post.bias

    def features(
        self,
        transcoder: Transcoder,
        values: Float[Tensor, "pos active"],
        indices: Int[Tensor, "pos active"],
        inert: Float[Tensor, "pos d_model"],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The active features' places, activations, directions read and written, and biases.

        inert: what the MLP would read if there were only constants.
        """
        pos, slot = values.nonzero(as_tuple=True)
        order = (pos * transcoder.n_features + indices[pos, slot]).argsort()
        pos, index, values = pos[order], indices[pos, slot][order], values[pos, slot][order]
        read, written = transcoder.W_enc[index].to(inert), transcoder.W_dec[index].to(inert)
        bias = torch.linalg.vecdot(read, inert[pos]) + transcoder.b_enc[index].to(inert)
        places = torch.stack([torch.full_like(pos, self.layer), pos, index], dim=1)
        encoders = self.ln2.pull(read, self.scale["ln2"][pos])
        return places, values, encoders, self.behind_mlp(written * values[:, None], pos), bias

    def block(self, transcoder: Transcoder | None) -> Block:
        """The block's linear maps on the stream."""
        divided = self.scale["ln1_post"] * self.scale["ln1"].T  # query x key
        reads = self.ln1.pull(self.W_V.transpose(1, 2).flatten(0, 1), None)
        skip, skip_scale = None, None
        if transcoder is not None and transcoder.W_skip is not None:
            unit = torch.eye(reads.shape[1], dtype=reads.dtype, device=reads.device)
            written = self.ln2_post.pull(unit, None) @ transcoder.W_skip.to(unit)
            skip = self.ln2.pull(written, None)
            skip_scale = 1 / (self.scale["ln2"] * self.scale["ln2_post"])[:, 0]
        return Block(
            self.pattern / divided, self.ln1_post.push(self.W_O),
            reads.unflatten(0, (len(self.W_V), -1)), skip, skip_scale,
        )  # fmt: skip


# All MLPs replaced


def replacing(transcoders: Mapping[int, Transcoder], sinks: int = 1) -> list[tuple[str, Callable]]:
    """Hooks that put what the transcoders make in place of their MLPs' outputs.

    Not at the first positions.
    """
    hooks: list[tuple[str, Callable]] = []
    for layer, transcoder in transcoders.items():
        read: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: object, read: dict = read) -> Tensor:
            read["x"] = x[:, sinks:]
            return x[:, :sinks].contiguous()  # the MLP itself is only asked for these

        def write(y: Tensor, hook: object, read: dict = read, t: Transcoder = transcoder) -> Tensor:
            x = read.pop("x").to(t.W_enc)
            made = t(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return torch.cat([y, made.to(y)], dim=1)

        hooks += [(f"blocks.{layer}.mlp.hook_in", keep), (f"blocks.{layer}.mlp.hook_out", write)]
    return hooks


class Fidelity(NamedTuple):
    """A replaced model beside its original, a mean over the predicted tokens of each prompt."""

    ce_increase: Float[Tensor, " batch"]
    """Of the cross-entropy of the text's own next token, in nats."""
    kl: Float[Tensor, " batch"]
    """From the original's distribution to the replaced model's, in nats."""
    agreement: Float[Tensor, " batch"]
    """How often both find the same token likeliest."""


@torch.no_grad()
def fidelity(
    model: LoadedModel,
    transcoders: Mapping[int, Transcoder],
    ids: Int[Tensor, "batch pos"],
    sinks: int = 1,
) -> Fidelity:
    """How far the model with these MLPs replaced is from the model, on texts of one length."""
    check(model, transcoders)
    clean = model.bridge(ids, use_cache=False)[:, :-1].float().log_softmax(-1)
    hooks = replacing(transcoders, sinks)
    found = model.bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False)
    found = found[:, :-1].float().log_softmax(-1)
    truth = ids[:, 1:, None]
    return Fidelity(
        (clean - found).gather(2, truth)[..., 0].mean(1),
        (clean.exp() * (clean - found)).sum(-1).mean(1),
        (clean.argmax(-1) == found.argmax(-1)).float().mean(1),
    )


def check(model: LoadedModel, transcoders: Mapping[int, Transcoder]) -> None:
    """Raises BadInput, in one line, for transcoders that do not fit the model."""
    d_model = model.bridge.cfg.d_model
    for layer, transcoder in transcoders.items():
        if not 0 <= layer < model.n_layers:
            raise BadInput(f"a transcoder for layer {layer} of {model.name}, whose layers are 0 "
                           f"to {model.n_layers - 1}")  # fmt: skip
        width = transcoder.W_enc.shape[1]
        if width != d_model:
            raise BadInput(f"the transcoder of layer {layer} reads {width} dimensions, "
                           f"{model.name} has {d_model}: it belongs to another model")  # fmt: skip
