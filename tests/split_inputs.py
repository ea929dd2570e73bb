"""Edges by another route: TransformerLens' inputs of single heads (set_use_split_qkv_input)."""

import contextlib

import torch

from lens_utils.cache import record
from lens_utils.lens import Readout, hook


@contextlib.contextmanager
def split(bridge):
    switches = [bridge.set_use_split_qkv_input, bridge.set_use_hook_mlp_in]
    switches = switches if hasattr(bridge.blocks[0], "mlp") else switches[:1]
    for switch in switches:
        switch(True)
    yield
    for switch in switches:
        switch(False)


def at_input(model, receiver, added):
    """A hook that adds to what one receiver reads; rows are as they come."""

    def add(x, hook):
        x = x.clone()
        x[:, :, receiver.head] += added
        return x

    match receiver.part:
        case "logits":
            return hook(model.n_layers), lambda x, hook: x + added
        case "mlp_in":
            return f"blocks.{receiver.layer}.hook_mlp_in", lambda x, hook: x + added
    return f"blocks.{receiver.layer}.attn.hook_{receiver.part}_input", add


def at_output(model, batch, sender, share):
    """How a sender's write differs: its share at the run's scale, or what its change alone does."""
    if sender.part == "embed":
        name = hook(0)
    elif sender.part == "mlp":
        name = f"blocks.{sender.layer}.hook_mlp_out"
    elif share:
        name = f"blocks.{sender.layer}.attn.hook_z"
        attn, norm = model.bridge.blocks[sender.layer].attn, f"blocks.{sender.layer}.ln1_post"
        found = []
        for ids in (batch.clean, batch.corrupt):
            names = [name] + [f"{norm}.hook_scale"] * hasattr(
                model.bridge.blocks[sender.layer], "ln1_post"
            )
            held = record(model, ids, names)
            own = held[name][:, :, sender.head] @ attn.W_O[sender.head]
            if len(names) == 2:
                gain = 1 + model.bridge.blocks[sender.layer].ln1_post.weight
                own = own * gain / held[names[1]]
            found.append(own)
        return found[0] - found[1]
    else:
        z, name = f"blocks.{sender.layer}.attn.hook_z", f"blocks.{sender.layer}.hook_attn_out"
        clean, held = record(model, batch.clean, [z])[z], {}

        def replace(x, hook):
            x = x.clone()
            x[:, :, sender.head] = clean[:, :, sender.head]
            return x

        def keep(x, hook):
            held["x"] = x

        with torch.no_grad():
            model.bridge.run_with_hooks(batch.corrupt, fwd_hooks=[(z, replace), (name, keep)])
        return held["x"] - record(model, batch.corrupt, [name])[name]
    clean, corrupt = (record(model, ids, [name])[name] for ids in (batch.clean, batch.corrupt))
    return clean - corrupt


def plain_run(model, batch, receiver, added, times=1):
    """Logit differences of corrupted prompts with something added to one receiver's input."""
    readout, last, held = Readout(model.bridge), hook(model.n_layers), {}

    def keep(x, hook):
        held["x"] = x[:, -1]

    hooks = [at_input(model, receiver, added), (last, keep)]
    with torch.no_grad(), split(model.bridge):
        model.bridge.run_with_hooks(batch.corrupt.repeat(times, 1), fwd_hooks=hooks)
    return readout.logit_diff(held["x"].unflatten(0, (times, -1)), batch.answer, batch.foil)
