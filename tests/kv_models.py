"""For the tests of K/V masks: examples, masked tiny models, and the same by plain hooks."""

import torch
from small_pairs import of
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from lens_utils import kv_masks
from lens_utils.kv_masks import Examples, Fill, Masked
from lens_utils.kv_units import units_of
from lens_utils.lens import Readout
from lens_utils.models import LoadedModel


def examples(d_vocab=64, n=4, length=9, seed=0, short=0) -> Examples:
    """Random rows, all predictions but the first counted; the last row is `short` tokens shorter.

    What follows a short row's end are other random tokens: nothing may look at them.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(3, d_vocab, (n, length + 1), generator=generator)
    counted = torch.ones(n, length, dtype=torch.bool)
    counted[:, 0] = False
    if short:
        counted[-1, -short:] = False
    foil = torch.randint(3, d_vocab, (n,), generator=generator)
    return Examples(whole[:, :-1], whole[:, 1:], counted, torch.arange(n), foil)


HELD: dict = {}  # of a model (which is held, too): computed once, as long as it is not changed


def once(model, what, make):
    """make(), unless this model has it already."""
    if (id(model), what) not in HELD:
        HELD[id(model), what] = model, make()
    return HELD[id(model), what][1]


def masked(model, data=None, fill="mean", basis=False, keep_first=False, **kind) -> Masked:
    """A model with its units, and constants from some examples."""
    data = data or once(model, "examples", lambda: examples(model.bridge.cfg.d_vocab))
    found = once(model, id(data), lambda: kv_masks.moments(model, data))
    units = once(model, str(kind), lambda: units_of(model, **kind))
    readout = once(model, "readout", lambda: Readout(model.bridge))
    constant = found.mean if fill == "mean" else Fill(*(torch.zeros_like(x) for x in found.mean))
    return Masked(model, units, constant, readout, found.v_basis if basis else None, keep_first)


def native(turned: int | None = None, norm: str = "LN") -> LoadedModel:
    """A rotary model that rotates adjacent channels, the first `turned` of 8 (all of them)."""
    config = TransformerBridgeConfig(
        n_layers=2, n_heads=4, n_key_value_heads=2, d_head=8, d_model=32, d_mlp=48, n_ctx=32,
        d_vocab=64, act_fn="gelu", normalization_type=norm, attention_dir="causal", seed=0,
        positional_embedding_type="rotary", rotary_dim=turned,
    )  # fmt: skip
    bridge = TransformerBridge.boot_native(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    bridge.eval().requires_grad_(False)
    return LoadedModel("native", bridge, None, (0,), frozenset(), 32)


def random_mask(masked: Masked, seed=0, share=0.5):
    """Gates of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(masked.units.total, generator=generator) < share).float()


def layers(plain) -> list:
    """The decoder layers of a plain Hugging Face model, whatever it calls them."""
    named = (m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    return list(next(m for m in named if hasattr(m[0], "self_attn") or hasattr(m[0], "attn")
                     or hasattr(m[0], "attention")))  # fmt: skip


def hook_plain(plain, arch, edit_k, edit_v) -> None:
    """Forward hooks on a plain model: edit(x [row, pos, kv_head, d_head], layer) in its place.

    Keys are edited behind their norm where they have one, always before rotation.
    """
    for number, layer in enumerate(layers(plain)):
        if arch == "gpt2":  # c_attn is [q k v], each of four heads of 8

            def joint(module, args, out, n=number):
                q, k, v = (x.unflatten(-1, (4, 8)) for x in out.chunk(3, dim=-1))
                return torch.cat([q, edit_k(k, n), edit_v(v, n)], dim=-2).flatten(-2)

            layer.attn.c_attn.register_forward_hook(joint)
        elif arch.startswith("neox"):  # query_key_value is [q k v] of each head in turn

            def fused(module, args, out, n=number):
                q, k, v = out.unflatten(-1, (4, 3, 8)).unbind(-2)
                return torch.stack([q, edit_k(k, n), edit_v(v, n)], dim=-2).flatten(-3)

            layer.attention.query_key_value.register_forward_hook(fused)
        else:
            attention = layer.self_attn

            def by_head(module, args, out, n=number, edit=None):
                return edit(out.unflatten(-1, (2, 8)), n).flatten(-2)

            def normed(module, args, out, n=number):
                # Some norm [row, head, pos], some [row, pos, head]; two heads, more positions.
                if out.shape[1] == 2:
                    return edit_k(out.transpose(1, 2), n).transpose(1, 2)
                return edit_k(out, n)

            if hasattr(attention, "k_norm"):
                attention.k_norm.register_forward_hook(normed)
            else:
                attention.k_proj.register_forward_hook(
                    lambda *a, n=number, f=by_head: f(*a, n=n, edit=edit_k)
                )
            attention.v_proj.register_forward_hook(
                lambda *a, n=number, f=by_head: f(*a, n=n, edit=edit_v)
            )


def mix(fill, gate):
    """An edit that replaces what is off by constants."""
    return lambda x, n: gate[n] * x + (1 - gate[n]) * fill[n, 0, 0].to(x.dtype)


__all__ = ["examples", "hook_plain", "layers", "masked", "mix", "native", "of", "random_mask"]
