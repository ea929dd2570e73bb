"""Attribution graphs against circuit-tracer's recorded ones, and against graphs small enough to
work out on paper."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_transcoders import IDS, random_transcoders
from transformers import LlamaConfig, LlamaForCausalLM

from lens_utils import attribution_graph, files, frozen
from lens_utils.attribution_graph import Graph, effects, influence, prune, scores
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec
from lens_utils.replacement import freeze
from lens_utils.sparse import Transcoder

RECORDED = Path(__file__).parent / "fixtures" / "circuit_tracer"


@pytest.fixture(scope="module")
def recorded():
    """The tiny Llama of the recording, its transcoders, and circuit-tracer's graphs of it."""
    weights = files.read(RECORDED / "weights.safetensors")
    facts = files.read(RECORDED / "graphs.json")
    sizes = dict(facts["model"])
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    hf = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=False))
    model = {k.removeprefix("model/"): v for k, v in weights.items() if k.startswith("model/")}
    hf.load_state_dict(model)
    transcoders = {
        kind: {
            layer: Transcoder(
                *(weights[f"{kind}/{layer}/{n}"] for n in ("W_enc", "b_enc", "W_dec", "b_dec")),
                weights.get(f"{kind}/{layer}/W_skip"), facts["k"],
            ) for layer in range(2)
        } for kind in ("plain", "skip")
    }  # fmt: skip
    loaded = wrap(hf, None, ModelSpec("tiny", "tiny"))
    linear = {kind: freeze(loaded, made, facts["ids"]) for kind, made in transcoders.items()}
    return linear, facts["graphs"], files.read(RECORDED / "graphs.safetensors")


@pytest.mark.parametrize("key", ["plain/all", "plain/greedy", "skip/all", "skip/greedy"])
def test_graphs_are_those_of_circuit_tracer(recorded, key):
    linear, facts, theirs = recorded
    theirs = {k.removeprefix(f"{key}/"): v for k, v in theirs.items() if k.startswith(f"{key}/")}
    most = facts[key]["max_features"] or 10_000
    graph = frozen.build(linear[key.split("/")[0]], most, update=facts[key]["update"])
    assert graph.features.tolist() == theirs["features"].tolist()
    assert graph.logit_ids.tolist() == theirs["logit_ids"].tolist()
    torch.testing.assert_close(graph.activations, theirs["activations"], atol=1e-5, rtol=0)
    torch.testing.assert_close(graph.logit_probs, theirs["logit_probs"], atol=1e-5, rtol=0)
    torch.testing.assert_close(graph.edges, theirs["adjacency"], atol=1e-5, rtol=0)
    assert theirs["adjacency"].abs().max() > 0.3
    pruned = prune(graph)
    assert torch.equal(pruned.nodes, theirs["nodes"])
    assert torch.equal(pruned.edges, theirs["edges"])
    torch.testing.assert_close(pruned.cumulative, theirs["cumulative"], atol=1e-4, rtol=0)
    expected = facts[key]["replacement"], facts[key]["completeness"]
    assert scores(graph) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("most", [12, 45, 10_000])
def test_what_is_left_out_of_a_graph_is_counted(tiny, most):
    """At 45 of 60, only features that lead nowhere are left out: the last layer's, early on."""
    model = wrap(tiny("qwen3"), None, ModelSpec("qwen3", "qwen3"))
    linear, told = freeze(model, random_transcoders(model), IDS), []
    n, n_logits = len(linear.features), len(linear.unembed)
    graph = frozen.build(linear, most, update=7, tick=told.append)
    found = graph.edges.sum(1) + graph.bias + graph.omitted
    torch.testing.assert_close(found, graph.values, atol=1e-4, rtol=0)
    assert len(graph.features) == min(most, n) == sum(told[1:])
    there = graph.features.tolist()
    kept = torch.tensor([f in there for f in linear.features.tolist()])
    rows = torch.cat([torch.arange(n)[kept], n + torch.arange(n_logits)])
    left = frozen.edges(linear, rows)[:, :n][:, ~kept].sum(1)
    rest = torch.cat([graph.omitted[graph.parts[part]] for part in ("feature", "logit")])
    torch.testing.assert_close(rest, left, atol=1e-5, rtol=0)
    assert (graph.omitted.abs().max() > 0.01) == (most == 12)
    assert graph.edges[graph.parts["error"]].any() == graph.edges[graph.parts["token"]].any() == 0


def test_rows_do_not_depend_on_how_they_are_dealt_out(tiny, monkeypatch):
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    linear = freeze(model, random_transcoders(model, skip=True), IDS)
    order = torch.randperm(len(linear.values), generator=torch.Generator().manual_seed(0))
    whole = frozen.edges(linear, order)
    one_by_one = torch.cat([frozen.edges(linear, row[None]) for row in order])
    torch.testing.assert_close(whole, one_by_one, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("lens_utils.frozen.ROWS", 3)
    monkeypatch.setattr("lens_utils.frozen.NEAR", 100)
    torch.testing.assert_close(frozen.edges(linear, order), whole, atol=1e-5, rtol=1e-5)


def test_the_greedy_choice_takes_what_matters(tiny):
    """The features chosen in small steps hold more of the influence than others of their number."""
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    linear = freeze(model, random_transcoders(model), IDS)
    whole = frozen.build(linear, 10_000)
    reached = influence(whole.edges, whole.weights)[whole.parts["feature"]]
    chosen = frozen.build(linear, 20, update=4).features.tolist()
    mine = torch.tensor([f in chosen for f in whole.features.tolist()])
    assert mine.sum() == 20 and reached[mine].sum() > 0.9 * reached.sort().values[-20:].sum()


def by_hand() -> Graph:
    """Two tokens, features a and b of layers 0 and 1, one error node each, two logits.

    token 1 -> a (3), token 0 -> a (1), a -> b (-2), error of layer 0 -> b (2), b -> first logit
    (1), token 0 -> first logit (-1), a -> second logit (4).
    """
    a, b, error, tokens, logits = 0, 1, 3, (6, 7), (8, 9)
    edges = torch.zeros(10, 10)
    edges[a, tokens[1]], edges[a, tokens[0]] = 3, 1
    edges[b, a], edges[b, error] = -2, 2
    edges[logits[0], b], edges[logits[0], tokens[0]] = 1, -1
    edges[logits[1], a] = 4
    zeros = torch.zeros(10)
    return Graph(
        torch.tensor([5, 6]), 2, torch.tensor([[0, 1, 11], [1, 1, 12]]), torch.tensor([4.0, 0.5]),
        torch.tensor([7, 8]), torch.tensor([0.6, 0.2]), edges, zeros, zeros, zeros,
    )  # fmt: skip


def test_influence_and_scores_by_hand():
    graph = by_hand()
    found = influence(graph.edges, graph.weights)
    # b gets half of the first logit's 0.6; a half of b's 0.3 and all of the second's 0.2.
    expected = torch.tensor([0.35, 0.3, 0, 0.15, 0, 0, 0.3 + 0.35 / 4, 0.35 * 3 / 4, 0, 0])
    torch.testing.assert_close(found, expected)
    said = scores(graph)
    assert said.replacement == pytest.approx(0.65 / 0.8)
    inputs = {"a": 0.35, "b": 0.3, "logits": 0.8}
    errors, leaves = 0.3 * 0.5, 0.15 + 0.65
    whole = sum(inputs.values()) + leaves
    assert said.completeness == pytest.approx((whole - errors) / whole)


def test_pruning_by_hand():
    graph = by_hand()
    everything = prune(graph, nodes=1.0, edges=1.0)
    assert everything.nodes.tolist() == [True, True, False, True, False, False] + [True] * 4
    assert torch.equal(everything.edges, graph.edges != 0)
    # Ranked: token 0 .3875, a .35, b .3, token 1 .2625, error .15 of 1.45.
    ranked = torch.tensor([0.3875, 0.35, 0.3, 0.2625, 0.15])
    at = [6, 0, 1, 7, 3]
    torch.testing.assert_close(everything.cumulative[at], ranked.cumsum(0) / 1.45)
    some = prune(graph, nodes=0.8, edges=1.0)
    assert some.nodes.tolist() == [True, True] + [False] * 4 + [True] * 4
    # Without the error, b is all a's: token 1 -> a scores .375, a -> b, b -> logit and token 0 ->
    # logit .3, a -> second logit .2, token 0 -> a .125, together 1.6.
    few = prune(graph, nodes=0.8, edges=0.62)
    kept = {(t, s) for t, s in few.edges.nonzero().tolist()}
    assert (0, 7) in kept and (0, 6) not in kept and (9, 0) not in kept
    for wrong in ((1.1, 0.9), (0.5, -0.1)):
        with pytest.raises(BadInput, match="between 0 and 1"):
            prune(graph, *wrong)


def test_nodes_that_lead_nowhere_go():
    """b loses its only edge out, and then a the edge to b, and both are gone."""
    graph = by_hand()
    edges = graph.edges.clone()
    edges[8, 1], edges[9, 0], edges[9, 6] = 1e-3, 0, 1
    left = prune(dataclasses.replace(graph, edges=edges), nodes=1.0, edges=0.99)
    assert left.nodes.tolist() == [False] * 6 + [True] * 4
    assert left.edges.nonzero().tolist() == [[8, 6], [9, 6]]


def test_effects_by_hand():
    found = effects(by_hand())
    assert found.direct.tolist() == [[0, 1], [4, 0]]
    # Doubling a moves b by -2, four times its activation, and the first logit by -4 of b's edge.
    torch.testing.assert_close(found.total, torch.tensor([[-4.0, 1], [4, 0]]))


def test_a_graph_beyond_the_budget_says_what_to_lower(tiny):
    model = wrap(tiny("llama"), None, ModelSpec("llama", "llama"))
    linear = freeze(model, random_transcoders(model), IDS)
    needed = frozen.forecast(20 + len(linear.unembed), linear.n_sources)
    with pytest.raises(BadInput, match=r"lower max_features \(20\), shorten the prompt \(7 tokens"):
        frozen.build(linear, 20, budget=needed - 1)
    assert frozen.build(linear, 20, budget=needed).edges.isfinite().all()


def test_a_circle_is_no_endless_loop():
    """A file's graph may be anything."""
    edges = torch.tensor([[0.0, 1], [1, 0]])
    assert influence(edges, torch.tensor([1.0, 0])).isfinite().all()
    assert attribution_graph.partial_influence(
        edges[:1], torch.tensor([1.0]), torch.arange(0)
    ).tolist() == [0, 1]
