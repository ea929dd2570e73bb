"""Norms that respond, against small changes made in the model itself."""

import pytest
import torch
from conftest import ARCHS
from small_transcoders import IDS, random_transcoders

from lens_utils import frozen, norm_response, replacement
from lens_utils.cache import record
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec


def logits_with(model, held, layer, pos, vector, to):
    """Centred logits with a vector added to an MLP's output; patterns and MLPs' outputs held."""
    found = []

    def write(y, hook, name):
        y = held[name].clone()
        if name == f"blocks.{layer}.mlp.hook_out":
            y[0, pos] += vector
        return y

    mlps = [name for name in held if name.endswith("mlp.hook_out")]
    hooks = [(name, lambda y, hook, n=name: write(y, hook, n)) for name in mlps]
    hooks += [(name, lambda x, hook, n=name: held[n].clone()) for name in held if "pattern" in name]
    # Norms behind attention and MLP stay held.
    hooks += [(name, lambda x, hook, n=name: held[n].clone()) for name in held
              if "_post.hook_scale" in name]  # fmt: skip
    hooks += [("unembed.hook_out", lambda x, hook: found.append(x[0, -1]))]
    model.bridge.run_with_hooks(torch.tensor([IDS]), fwd_hooks=hooks, use_cache=False)
    return (found[0] - found[0].mean())[to]


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHS)
def test_edges_into_logits_are_derivatives_with_patterns_held(tiny, arch):
    """Central differences of the model itself, in float64, with no norm before MLPs or attention
    or logits held."""
    model = wrap(tiny(arch).double(), None, ModelSpec(arch, arch))
    transcoders = random_transcoders(model)
    linear = replacement.freeze(model, transcoders, IDS)
    moving = norm_response.respond(model, linear)
    n = len(linear.features)
    rows = frozen.edges(moving, n + torch.arange(len(linear.logit_ids)))[:, :n]
    still = frozen.edges(linear, n + torch.arange(len(linear.logit_ids)))[:, :n]
    held = record(model, torch.tensor([IDS]), replacement.held_names(model))
    atol = 1e-3 * rows.abs().max().item()
    step, differs = 0.02, False  # Hugging Face's norms work in float32, also on float64
    for i in range(0, n, 29):
        layer, pos, index = linear.features[i].tolist()
        vector = transcoders[layer].W_dec[index] * linear.activations[i]
        up, down = (logits_with(model, held, layer, pos, sign * step * vector, linear.logit_ids)
                    for sign in (1, -1))  # fmt: skip
        slope = (up - down) / (2 * step)
        torch.testing.assert_close(rows[:, i], slope, atol=atol, rtol=1e-3)
        differs |= (still[:, i] - slope).abs().max() > 20 * atol
    assert differs


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "neox-parallel"])
def test_the_nodes_stay_and_only_edges_change(tiny, arch):
    model = wrap(tiny(arch), None, ModelSpec(arch, arch))
    linear = replacement.freeze(model, random_transcoders(model, skip=True), IDS)
    graph = frozen.build(linear, 20)
    same = norm_response.same_nodes(graph, linear)
    torch.testing.assert_close(same.edges, graph.edges)
    assert torch.equal(same.features, graph.features)
    other = norm_response.same_nodes(graph, norm_response.respond(model, linear))
    feature = graph.parts["feature"]
    assert (other.edges - graph.edges)[feature, feature].abs().max() > 0.1
    n = len(linear.features)
    rows = frozen.edges(norm_response.respond(model, linear), torch.arange(n))
    place = [linear.features.tolist().index(f) for f in graph.features.tolist()]
    torch.testing.assert_close(other.edges[feature, feature], rows[place][:, place])
