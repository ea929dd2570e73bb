"""Edges against TransformerLens' split inputs, exact patching, and circuits built by hand."""

import sys

import pytest
import torch
from circuits import (
    INDUCTION_HEAD,
    PREVIOUS_HEAD,
    REVERSE_HEADS,
    REVERSE_MLPS,
    idle_heads,
    induction_model,
    reverse_model,
    reverse_pairs,
)
from conftest import ARCHS
from small_pairs import exchanged, of, random_batch, softened
from split_inputs import at_output, plain_run
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)

from lens_utils import circuits, edges, pairs, patching, sweeps
from lens_utils.cache import record
from lens_utils.edges import Node, edge_scores, graph, path_patch
from lens_utils.errors import BadInput
from lens_utils.gradients import PLAIN, attribute, midpoints
from lens_utils.lens import hook
from lens_utils.models import wrap
from lens_utils.patching import Site
from lens_utils.registry import ModelSpec

SANDWICH = ("gemma2", "gemma3", "gemma3-multimodal")
BEFORE, AFTER = Node("head", *PREVIOUS_HEAD), Node("head", *INDUCTION_HEAD)
KEYS = {
    (Node("embed"), Node("v", *PREVIOUS_HEAD)),
    (BEFORE, Node("k", *INDUCTION_HEAD)),
    (AFTER, Node("logits")),
}
VALUES = {(Node("embed"), Node("v", *INDUCTION_HEAD)), (AFTER, Node("logits"))}


def named(model, found):
    """The edges that are not exactly zero, or are kept."""
    nodes = graph(model)
    return {(nodes.senders[s], nodes.receivers[r]) for s, r in found.nonzero().tolist()}


def toy_batch(model, what):
    return pairs.batch(model, exchanged(pairs.induction(model, 4), what))


# By another route


def some_edges(model):
    nodes = graph(model)
    kv_head = nodes.n_kv_heads - 1
    found = [
        (Node("embed"), Node("q", 1, 2)),
        (Node("head", 0, 1), Node("k", 1, kv_head)),
        (Node("mlp", 0), Node("v", 2, 0)),
        (Node("mlp", 1), Node("mlp_in", 2)),
        (Node("head", 2, 3), Node("logits")),
    ]
    return found + ([] if nodes.parallel else [(Node("head", 1, 3), Node("mlp_in", 1))])


@pytest.mark.parametrize("arch", ARCHS)
def test_edges_against_inputs_split_by_transformer_lens(tiny, arch):
    """An edge's score is the slope, and path patching the whole step, of opening it alone."""
    model = of(tiny, arch)
    batch, nodes = random_batch(model, 2, 6), graph(model)
    scores, seen = edge_scores(model, batch), 0
    base = sweeps.baselines(model, batch)[1]
    for sender, receiver in some_edges(model):
        s, r = nodes.senders.index(sender), nodes.receivers.index(receiver)
        step = 0.005 * at_output(model, batch, sender, share=True)
        up, down = plain_run(model, batch, receiver, torch.cat([step, -step]), 2)
        slope = (up - down) / 0.01
        torch.testing.assert_close(scores[:, s, r], slope, atol=5e-3, rtol=0.02)
        whole = at_output(model, batch, sender, share=False)
        expected = plain_run(model, batch, receiver, whole)[0] - base
        found = path_patch(model, batch, receiver)[:, s]
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
        seen += bool((slope.abs() > 0.01).any())
    assert seen >= 3


@pytest.mark.parametrize("arch", ["gpt2", "neox-parallel", "neox-sequential"])
def test_all_edges_agree_with_transformer_lens(tiny, arch):
    """Where it can: one kv_head per head, no norm behind attention."""
    model = of(tiny, arch)
    batch, nodes = random_batch(model, 1), graph(model)
    answer, foil = batch.answer.item(), batch.foil.item()
    other = of(tiny, arch).bridge.requires_grad_(True)
    theirs = attribution_patch(
        other, batch.clean, batch.corrupt, lambda z: z[0, -1, answer] - z[0, -1, foil],
        EdgeAttributionConfig("edge"),
    ).edge_scores  # fmt: skip
    parts = {"attn_head_out": "head", "mlp_out": "mlp", "q_input": "q", "k_input": "k",
             "v_input": "v"}  # fmt: skip
    expected = torch.zeros(nodes.exists.shape)
    for (sender, receiver), score in theirs.items():
        s, r = (
            Node(parts.get(n.kind, n.kind), None if n.kind == "logits" else n.layer, n.head)
            for n in (sender, receiver)
        )
        expected[nodes.senders.index(s), nodes.receivers.index(r)] += score
    assert len(theirs) == 7 * int(nodes.exists.sum())
    torch.testing.assert_close(edge_scores(model, batch)[0], expected, atol=3e-5, rtol=1e-3)


# Sums


@pytest.mark.parametrize("arch", [*ARCHS, "induction", "reverse"])
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(tiny, arch):
    model = reverse_model() if arch == "reverse" else of(tiny, arch)
    batch = pairs.batch(model, reverse_pairs()) if arch == "reverse" else random_batch(model)
    exists = graph(model).exists
    clean, corrupt = sweeps.baselines(model, batch)
    found = circuits.evaluate(model, batch, torch.stack([exists, exists & False]))
    torch.testing.assert_close(found, torch.stack([clean, corrupt]), atol=1e-4, rtol=0)
    written, _ = edges.writes(model, batch)
    last = hook(model.n_layers)
    final = record(model, batch.clean, [last])[last]
    torch.testing.assert_close(written.sum(0), final, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "neox-parallel"])
def test_edges_out_of_a_sender_sum_to_its_node(tiny, arch):
    """And, for the embedding and with many points, to the logit difference."""
    model = of(tiny, arch)
    batch, nodes = random_batch(model), graph(model)
    scores, node = edge_scores(model, batch).sum(2), attribute(model, batch)
    senders = {s: i for i, s in enumerate(nodes.senders)}
    torch.testing.assert_close(scores[:, 0], node["resid_pre"][:, 0].sum(1), atol=1e-5, rtol=1e-4)
    for layer in range(model.n_layers):
        mlp = node["mlp_out"][:, layer].sum(1)
        torch.testing.assert_close(
            scores[:, senders[Node("mlp", layer)]], mlp, atol=1e-5, rtol=1e-4
        )
        heads = scores[:, nodes.heads(layer)]
        if arch == "gemma3":  # shares of what is added, so only all heads together are a node
            heads, own = heads.sum(1), node["attn_out"][:, layer].sum(1)
        else:
            own = node["z"][:, layer].sum(1)
        torch.testing.assert_close(heads, own, atol=1e-5, rtol=1e-4)
    clean, corrupt = sweeps.baselines(model, batch)
    integrated = edge_scores(model, batch, midpoints(24)).sum(2)[:, 0]
    torch.testing.assert_close(integrated, clean - corrupt, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "neox-parallel", "gpt2"])
def test_circuits_agree_with_exact_patching(tiny, arch):
    """Close all edges into a part, or out of one, or a single edge, in an otherwise clean run."""
    model = of(tiny, arch)
    batch, nodes = random_batch(model), graph(model)
    kv_head = nodes.n_kv_heads - 1
    kept, units = [], []
    for node in (Node("q", 1, 2), Node("k", 1, kv_head), Node("v", 2, 0), Node("mlp_in", 1)):
        closed = nodes.exists.clone()
        closed[:, nodes.receivers.index(node)] = False
        part = "mlp_out" if node.part == "mlp_in" else node.part
        kept.append(closed)
        units.append((Site(part, node.layer, None if node.head is None else (node.head,)),))
    for node in (Node("mlp", 0), *(() if arch in SANDWICH else (Node("head", 1, 3),))):
        closed = nodes.exists.clone()
        closed[nodes.senders.index(node)] = False
        kept.append(closed)
        unit = Site("mlp_out", 0) if node.part == "mlp" else Site("z", 1, (3,))
        units.append((unit,))
    found = circuits.evaluate(model, batch, torch.stack(kept), tokens=50)
    expected = patching.run(model, batch, units, "noise")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    clean, corrupt = sweeps.baselines(model, batch)
    assert ((expected - clean).abs() > 0.01).any(1).all()
    receiver = Node("k", 2, kv_head)
    below = nodes.below(receiver)
    single = nodes.exists.repeat(below, 1, 1)
    single[range(below), range(below), nodes.receivers.index(receiver)] = False
    found = circuits.evaluate(model, batch, single) - clean
    expected = -path_patch(model, batch.swapped(), receiver, tokens=50).T
    exact = [s.part != "head" or arch not in SANDWICH for s in nodes.senders[:below]]
    torch.testing.assert_close(found[exact], expected[exact], atol=1e-4, rtol=1e-4)


# Known circuits


@pytest.mark.parametrize(("what", "true"), [("keys", KEYS), ("values", VALUES)])
def test_attribution_names_exactly_the_edges_that_were_built(what, true):
    model = softened()
    batch = toy_batch(model, what)
    for at in (PLAIN, midpoints(5)):
        assert named(model, edge_scores(model, batch, at).abs().sum(0) > 1e-5) == true
    scores = edge_scores(induction_model(), batch, midpoints(5))
    senders = graph(model).senders
    for head in idle_heads():
        assert not scores[:, senders.index(Node("head", *head))].any()


def test_plain_scores_miss_the_composition_behind_a_saturated_softmax():
    """L0H1 -> key of L1H2: nothing by gradients in the corrupted run, all by path patching."""
    model = induction_model()
    batch, nodes = toy_batch(model, "keys"), graph(model)
    s, r = nodes.senders.index(BEFORE), nodes.receivers.index(Node("k", *INDUCTION_HEAD))
    assert edge_scores(model, batch)[:, s, r].abs().max() < 1e-3
    assert (edge_scores(model, batch, midpoints(5))[:, s, r] > 10).all()
    exact = path_patch(model, batch, Node("k", *INDUCTION_HEAD))
    torch.testing.assert_close(exact[:, s], torch.full((4,), 20.0), atol=1e-3, rtol=0)


def test_path_patching_names_exactly_the_edges_that_were_built():
    for what, true in (("keys", KEYS), ("values", VALUES)):
        model = induction_model()
        batch, nodes, found = toy_batch(model, what), graph(induction_model()), set()
        for receiver in nodes.receivers:
            effect = path_patch(model, batch, receiver).abs()
            found |= {(nodes.senders[s], receiver) for s in (effect > 1e-3).all(0).nonzero()}
            for head in idle_heads():
                assert not effect[:, nodes.senders.index(Node("head", *head)) :][:, :1].any()
        assert found == true


def test_direct_paths_to_a_plain_readout_sum_to_the_logit_difference():
    """Without a final norm the readout is linear."""
    for model, made in (
        (induction_model(0.5), exchanged(pairs.induction(induction_model(), 4), "keys")),
        (reverse_model(), reverse_pairs()),
    ):
        batch = pairs.batch(model, made)
        clean, corrupt = sweeps.baselines(model, batch)
        direct = path_patch(model, batch, Node("logits"))
        torch.testing.assert_close(direct.sum(1), clean - corrupt, atol=1e-4, rtol=1e-4)


def test_the_built_edges_alone_are_faithful():
    model = induction_model(0.001)  # idle heads write a little: there is something to be left out
    batch, nodes = toy_batch(model, "keys"), graph(model)
    scores = edge_scores(model, batch, midpoints(20)).mean(0)
    assert named(model, circuits.strongest(nodes, scores, 3)) == KEYS
    sizes = [0, 1, 2, 3, 10, int(nodes.exists.sum())]
    kept = torch.stack([circuits.strongest(nodes, scores, n) for n in sizes])
    assert kept.sum((1, 2)).tolist() == sizes
    clean, corrupt = sweeps.baselines(model, batch)
    share = (circuits.evaluate(model, batch, kept) - corrupt) / (clean - corrupt)
    assert share[:3].abs().max() < 0.02  # any one of the three missing, and nothing comes
    assert (share[3:] - 1).abs().max() < 0.05
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(scores.shape, generator=generator) for _ in range(10)]
    random = torch.stack([circuits.strongest(nodes, s, 3) for s in drawn])
    control = (circuits.evaluate(model, batch, random) - corrupt) / (clean - corrupt)
    assert control.abs().max() < 0.1


def test_dead_parts_of_a_compiled_program_have_no_edges():
    model = reverse_model()
    batch, nodes = pairs.batch(model, reverse_pairs()), graph(model)
    scores = edge_scores(model, batch, midpoints(8)).abs().sum(0)
    for s, sender in enumerate(nodes.senders):
        dead = {"head": (sender.layer, 0) not in REVERSE_HEADS,
                "mlp": sender.layer not in REVERSE_MLPS, "embed": False}  # fmt: skip
        if dead[sender.part]:
            assert not scores[s].any()
    clean, corrupt = sweeps.baselines(model, batch)
    true = {(Node("embed"), Node("v", 3, 0)), (Node("head", 3, 0), Node("logits"))}
    assert named(model, circuits.strongest(nodes, scores, 2)) == true
    found = circuits.evaluate(model, batch, circuits.strongest(nodes, scores, 2)[None])[0]
    torch.testing.assert_close(found, clean, atol=1e-3, rtol=1e-3)


# Half precision, tidiness, bad input


def test_bfloat16(tiny):
    """All edges kept is the clean run to 0.05 nats; scores correlate with float32's above 0.98."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap(tiny("gemma3").to(dtype), None, ModelSpec("gemma3", "gemma3"))
        batch = random_batch(model)
        found.append(edge_scores(model, batch).flatten())
        clean, _ = sweeps.baselines(model, batch)
        kept = circuits.evaluate(model, batch, graph(model).exists[None])[0]
        assert (kept - clean).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
        assert path_patch(model, batch, Node("q", 1, 0)).isfinite().all()
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.98


def test_nothing_is_left_behind(tiny, monkeypatch):
    model = of(tiny, "gemma3")
    bridge, batch, nodes = model.bridge, random_batch(model), graph(model)
    before = {name: p.clone() for name, p in bridge.named_parameters()}
    switches = {k: v for k, v in vars(bridge.cfg).items() if k.startswith("use_")}

    def failing(*args, **kwargs):
        raise RuntimeError("stop here")

    edge_scores(model, batch)
    for module, name in (("edges", "project"), ("circuits", "project"), ("edges", "_pulled")):
        monkeypatch.setattr(sys.modules[f"lens_utils.{module}"], name, failing)
    for call in (
        lambda: path_patch(model, batch, Node("q", 1, 0)),
        lambda: circuits.evaluate(model, batch, nodes.exists[None]),
        lambda: edge_scores(model, batch),
    ):
        with pytest.raises(RuntimeError, match="stop here"):
            call()
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_dict.values())
    assert not any("forward" in block.__dict__ for block in bridge.blocks)
    assert {k: v for k, v in vars(bridge.cfg).items() if k.startswith("use_")} == switches
    assert all(not p.requires_grad and p.grad is None for p in bridge.parameters())
    assert all(torch.equal(p, before[name]) for name, p in bridge.named_parameters())


def test_bad_input_is_one_line(tiny):
    model = of(tiny, "llama")
    batch, nodes = random_batch(model), graph(model)
    with pytest.raises(BadInput, match="llama has no receiver L9H0.q"):
        path_patch(model, batch, Node("q", 9, 0))
    with pytest.raises(BadInput, match="edges of a graph that has"):
        circuits.strongest(nodes, torch.zeros(nodes.exists.shape), 10_000)
    with pytest.raises(BadInput, match="edges that llama does not have"):
        circuits.evaluate(model, batch, torch.ones_like(nodes.exists)[None])
    with pytest.raises(BadInput, match="points lie between"):
        edge_scores(model, batch, (2.0,))
    assert str(Node("k", 3, 1)) == "L3KV1.k" and str(Node("mlp_in", 2)) == "MLP2"
