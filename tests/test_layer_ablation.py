"""Ablating layers' contributions: against plain hooks on Hugging Face models, and by hand."""

import importlib
import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHS

from lens_utils import generate, provenance
from lens_utils import layer_ablation as ablate
from lens_utils.errors import BadInput
from lens_utils.layer_ablation import Ablation
from lens_utils.lens import Readout
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

PROMPTS = [[5, 9, 3, 7, 11], [8, 6, 4], [5, 5, 12, 30, 31, 3]]
TARGETS = [[20, 21, 22], [23, 24, 25, 26, 27], [28, 29]]
STARTS = [0, 3, 1]


@pytest.fixture(scope="module")
def loaded(tiny):
    held = {}

    def load(arch):
        if arch not in held:
            held[arch] = wrap(tiny(arch), None, ModelSpec(arch, arch))
        return held[arch]

    return load


def scored(model, edits=(), source=None, prompts=PROMPTS, targets=TARGETS, starts=STARTS):
    given = ablate.texts(model, prompts, targets, starts)
    hooks = ablate.ablating(edits, model.bridge.cfg.d_model, source, given.role)
    resid = ablate.residuals(model, given)
    return given, ablate.score(model, Readout(model.bridge), given, resid, hooks)


def blocks(plain):
    """The decoder layers of a plain model, whatever it calls them."""
    lists = [m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    return next(
        m for m in lists if "Layer" in type(m[0]).__name__ or "Block" in type(m[0]).__name__
    )


@torch.no_grad()
def by_hand(plain, prompts=PROMPTS, targets=TARGETS):
    """Log-probabilities of every target token, one text at a time."""
    found = []
    for prompt, target in zip(prompts, targets, strict=True):
        logits = plain(torch.tensor([prompt + target])).logits[0].float()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logp[torch.arange(len(target)), target])
    return found


def compare(given, scores, expected):
    for row, want in enumerate(expected):
        torch.testing.assert_close(
            scores.logp[row][given.role[row] > 0], want, atol=3e-4, rtol=1e-4
        )


@pytest.mark.parametrize("arch", ARCHS)
def test_ratio_0_changes_nothing_and_ratio_1_makes_the_block_an_identity(arch, tiny, loaded):
    """Rows of three lengths, padded and without a mask, against one text at a time."""
    model, plain = loaded(arch), tiny(arch)
    given, nothing = scored(model, [Ablation(1, ratio=0.0, kind="zero")])
    compare(given, nothing, by_hand(plain))
    given, gone = scored(model, [Ablation(1, kind="zero")])
    layer = blocks(plain)[1]

    def identity(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = layer.register_forward_hook(identity, with_kwargs=True)
    expected = by_hand(plain)
    handle.remove()
    compare(given, gone, expected)
    assert (nothing.logp - gone.logp).abs().max() > 0.05


@pytest.mark.parametrize("part", ["attn", "mlp", "resid"])
def test_parts_and_shares_by_plain_hooks(part, tiny, loaded):
    """A share of the attention's, the MLP's or the whole block's output, zero on a plain model."""
    model, plain = loaded("qwen3"), tiny("qwen3")
    gone = ablate.dims(32, 0.5, seed=3)
    given, found = scored(model, [Ablation(2, part, 0.5, "zero", seed=3)])
    layer = plain.model.layers[2]
    module = {"attn": layer.self_attn, "mlp": layer.mlp, "resid": layer}[part]

    def cut(module, args, output):
        if isinstance(output, tuple):
            return (output[0].masked_fill(gone, 0), *output[1:])
        return output.masked_fill(gone, 0)

    module.register_forward_hook(cut)
    compare(given, found, by_hand(plain))


def test_roles_are_those_of_the_token_that_follows(loaded):
    model = loaded("qwen3")
    given = ablate.texts(model, PROMPTS, TARGETS, STARTS)
    assert given.role.tolist() == [
        [0, 0, 0, 0, 2, 2, 2],
        [0, 0, 1, 1, 1, 2, 2],
        [0, 0, 0, 0, 0, 1, 2],
    ]
    assert given.ahead[1].tolist() == [6, 4, 23, 24, 25, 26, 27]
    shorter = ablate.texts(model, PROMPTS[1:], TARGETS[1:], STARTS[1:])
    assert (shorter.role == -1).sum() == 0  # both have seven tokens without the last
    alone = ablate.texts(model, PROMPTS[:2], [[20], TARGETS[1]], [0, 3])
    assert alone.role[0].tolist() == [0, 0, 0, 0, 2, -1, -1]


def test_ablation_at_one_role_leaves_the_positions_before_it(loaded):
    """Taken away from the answer's positions on, the trace keeps its probabilities."""
    model = loaded("qwen3")
    given, base = scored(model)
    _, late = scored(model, [Ablation(1, kind="zero", where="answer")])
    _, early = scored(model, [Ablation(1, kind="zero", where="prompt")])
    trace, answer = given.role == 1, given.role == 2
    assert torch.equal(late.logp[trace], base.logp[trace])
    assert (late.logp - base.logp)[answer].abs().min() > 0
    assert (early.logp - base.logp)[given.role > 0].abs().min() > 0
    everywhere = [Ablation(1, kind="zero", where=role) for role in ablate.ROLES]
    _, whole = scored(model, [Ablation(1, kind="zero")])
    _, parts = scored(model, everywhere)
    torch.testing.assert_close(parts.logp, whole.logp)


def test_masks_are_nested_fixed_and_of_the_right_size():
    for seed in range(3):
        masks = [ablate.dims(40, ratio, seed) for ratio in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert [int(m.sum()) for m in masks] == [0, 10, 20, 30, 40]
        assert all(bool((a <= b).all()) for a, b in itertools.pairwise(masks))
        assert torch.equal(masks[2], ablate.dims(40, 0.5, seed))
    assert not torch.equal(ablate.dims(40, 0.5, 0), ablate.dims(40, 0.5, 1))


def test_token_means_by_hand(tiny, loaded):
    """Means of the MLP's output by token, from hidden states of a plain model."""
    model, plain = loaded("qwen3"), tiny("qwen3")
    rows = [[5, 9, 5], [9, 5, 9, 7]]
    name = "blocks.1.hook_mlp_out"
    means = ablate.token_means(model, rows, [name], batch_size=2)
    outputs = []
    plain.model.layers[1].mlp.register_forward_hook(lambda m, i, o: outputs.append(o[0]))
    with torch.no_grad():
        for row in rows:
            plain(torch.tensor([row]))
    flat, ids = torch.cat(outputs), torch.tensor([i for row in rows for i in row])
    for token in (5, 9, 7):
        found = means.at(name, torch.tensor([[token]]))[0, 0]
        torch.testing.assert_close(found, flat[ids == token].mean(0), atol=1e-5, rtol=1e-4)
    never = means.at(name, torch.tensor([[33]]))[0, 0]
    torch.testing.assert_close(never, flat.mean(0), atol=1e-5, rtol=1e-4)


def test_means_in_place_of_a_contribution(tiny, loaded):
    """Scoring with means equals a plain model whose MLP's output is a table of tokens."""
    model, plain = loaded("qwen3"), tiny("qwen3")
    rows = [p + t for p, t in zip(PROMPTS, TARGETS, strict=True)]
    name = "blocks.1.hook_mlp_out"
    means = ablate.token_means(model, rows[:2], [name])
    given = ablate.texts(model, PROMPTS, TARGETS, STARTS)
    _, found = scored(model, [Ablation(1, "mlp")], lambda n: means.at(n, given.ids))
    current = {}
    plain.model.embed_tokens.register_forward_hook(lambda m, i, o: current.update(ids=i[0]))
    plain.model.layers[1].mlp.register_forward_hook(lambda m, i, o: means.at(name, current["ids"]))
    compare(given, found, by_hand(plain))


def test_donors_are_aligned_by_role(loaded):
    model = loaded("qwen3")
    mine = ablate.texts(model, PROMPTS, TARGETS, [0, 3, 1])
    other = ablate.texts(model, [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2]], [[6, 7, 8, 9],
                         [6, 7, 8, 9], [6, 7, 8]], [0, 2, 1])  # fmt: skip
    found = ablate.aligned(mine, other)
    # Prompts end at the same place, answers begin there; what is short is held.
    assert found[0].tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert found[1].tolist() == [2, 3, 4, 5, 5, 6, 7]
    assert found[2].tolist() == [0, 0, 0, 0, 0, 1, 2]
    same = ablate.aligned(mine, mine)
    assert torch.equal(same[mine.role >= 0], torch.arange(7).expand(3, 7)[mine.role >= 0])


def test_heads_taken_away_are_columns_of_z(tiny, loaded):
    model, plain = loaded("qwen3"), tiny("qwen3")
    given = ablate.texts(model, PROMPTS, TARGETS, STARTS)
    hooks = ablate.without_heads([(1, 0), (1, 3), (2, 2)], 4, None)
    resid = ablate.residuals(model, given)
    found = ablate.score(model, Readout(model.bridge), given, resid, hooks)
    for layer, heads in ((1, [0, 3]), (2, [2])):

        def cut(module, args, heads=heads):
            z = args[0].unflatten(-1, (4, -1)).clone()
            z[..., heads, :] = 0
            return (z.flatten(-2),)

        plain.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(cut)
    compare(given, found, by_hand(plain))


def test_exact_is_what_greedy_decoding_would_write(loaded):
    """The target is the model's own greedy text in one row, something else in the other."""
    model = loaded("qwen3")
    own = generate.continuations(model, [PROMPTS[0]], 4)[0].tolist()
    given, scores = scored(model, (), None, [PROMPTS[0]] * 2, [own, [*own[:3], own[3] ^ 1]], [1, 1])
    assert ablate.exact(scores, given).tolist() == [True, False]
    other = own[0] ^ 1
    behind = generate.continuations(model, [[*PROMPTS[0], other]], 3)[0].tolist()
    traced, wrong = scored(model, (), None, [PROMPTS[0]], [[other, *behind]], [1])
    assert not ablate.exact(wrong, traced).any()  # the trace counts too
    mean = ablate.mean_over(scores.logp, given, "answer")
    torch.testing.assert_close(mean[0], scores.logp[0][given.role[0] == 2].mean())
    direct, plain = scored(model, (), None, [PROMPTS[0]], [own], [0])
    assert ablate.mean_over(plain.logp, direct, "thinking").isnan().all()


def test_generation_under_means_is_scoring_under_means(loaded):
    """What is written under an ablation is exact when it is scored under the same ablation."""
    model = loaded("qwen3")
    rows = [p + t for p, t in zip(PROMPTS, TARGETS, strict=True)]
    names = [ablate.hook(1, name) for name in ablate.WRITES["both"]]
    means = ablate.token_means(model, rows, names)
    see, ids = ablate.following(model)
    live = ablate.ablating([Ablation(1)], 32, lambda name: means.at(name, ids()))
    with model.bridge.hooks(fwd_hooks=[see, *live]):
        written = generate.continuations(model, PROMPTS, 5).tolist()
    given = ablate.texts(model, PROMPTS, written, [0, 0, 0])
    _, found = scored(model, [Ablation(1)], lambda n: means.at(n, given.ids), PROMPTS, written,
                      [0, 0, 0])  # fmt: skip
    _, without = scored(model, (), None, PROMPTS, written, [0, 0, 0])
    assert ablate.exact(found, given).all()
    assert not ablate.exact(without, given).all()


def test_bad_input_is_one_line(loaded):
    model = loaded("qwen3")
    with pytest.raises(BadInput, match="share from 0 to 1"):
        ablate.dims(8, 1.5, 0)
    with pytest.raises(BadInput, match="parts are"):
        ablate.ablating([Ablation(0, "heads")], 32, None)
    with pytest.raises(BadInput, match="given texts"):
        ablate.ablating([Ablation(0, where="answer")], 32, None)
    with pytest.raises(BadInput, match="answer behind it"):
        ablate.texts(model, [[1]], [[]], [0])
    with pytest.raises(BadInput, match="context"):
        ablate.texts(model, [[1] * 60], [[2] * 9], [0])
    with pytest.raises(BadInput, match="zero, mean"):
        ablate.checked("noise")


# The tables of 012, on made-up scores whose answer is known


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(provenance.EXPERIMENTS / "012_layer_ablation"))
    return importlib.import_module("contribution_tables")


def made_up(costs, n=20, noise=0.05):
    """Scores of one task in which half of layer k costs costs[k] nats, on both halves."""
    rng, rows = np.random.default_rng(0), []
    for i in range(2 * n):
        half = ("choose", "test")[i % 2]
        about = {"id": i, "maze_id": f"m{i}", "half": half, "task": "solve", "mode": "direct"}
        about |= {"part": "both", "kind": "mean", "where": "everywhere"}
        base = -0.1 + noise * rng.normal()
        whole = about | {"answer": base, "logp": base, "exact": True, "seed": 0}
        rows.append(whole | {"layer": 0, "ratio": 0.0})
        for layer, (seed, ratio) in itertools.product(range(len(costs)), ((0, 0.5), (1, 0.5))):
            drop = costs[layer] + noise * rng.normal()
            gone = {"logp": base - drop, "answer": base - drop, "exact": i % 10 < 8, "seed": seed}
            rows.append(about | gone | {"layer": layer, "ratio": ratio})
    return pd.DataFrame(rows)


def test_critical_layers_stand_out_on_both_halves(tables):
    scan = made_up([2.0, 0.1, 0.1, 0.1])
    found = tables.critical(scan).set_index("layer")
    assert found.critical.tolist() == [True, False, False, False]
    assert found.logp_mean[0] == pytest.approx(2.0, abs=0.1)
    assert found.points_mean[1] == pytest.approx(20) and found.over_15.all()
    # Not critical: what stands out where it is chosen only, and what is like all the others.
    one = scan.copy()
    one.loc[(one.half == "test") & (one.layer == 0) & (one.ratio > 0), "logp"] = -0.12
    assert not tables.critical(one).critical[0]
    assert not tables.critical(made_up([1.0, 1.0, 1.0])).critical.any()
    drops = tables.drops(scan)
    test = drops[(drops.half == "test") & (drops.layer == 0) & (drops.ratio == 0.5)].iloc[0]
    own = scan[(scan.half == "test")]
    base = own[own.ratio == 0].set_index("id").logp
    each = own[(own.ratio == 0.5) & (own.layer == 0)]
    expected = (base.reindex(each.id).to_numpy() - each.logp).mean()
    assert test["mean"] == pytest.approx(expected) and test.low < test["mean"] < test.high


def crossing(costs, random=0.1):
    """Scores without sets of heads: costs[of][on]; random sets cost a little of everything."""
    rng, rows = np.random.default_rng(1), []
    for i, task in itertools.product(range(12), costs):
        about = {"id": f"{i} {task}", "maze_id": f"m{i}", "task": task, "mode": "direct"}
        base = -0.1 + 0.01 * rng.normal()
        rows.append(about | {"set": "none", "ability": "", "choice": "", "draw": -1, "logp": base})
        for of, choice, draw in itertools.product(costs, ("needed", "own"), range(-1, 20)):
            cost = costs[of][task] if draw < 0 else random
            one = {"set": f"{of} {choice} {draw}", "ability": of, "choice": choice, "draw": draw}
            rows.append(about | one | {"logp": base - cost - 0.01 * rng.normal()})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("costs", "double", "hierarchy"),
    [
        # each its own; all alike; solve needs what recognize needs, and not the other way round
        ({"recognize": {"recognize": 2.0, "solve": 0.1},
          "solve": {"recognize": 0.1, "solve": 2.0}}, True, False),
        ({"recognize": {"recognize": 1.0, "solve": 1.0},
          "solve": {"recognize": 1.0, "solve": 1.0}}, False, False),
        ({"recognize": {"recognize": 2.0, "solve": 1.5},
          "solve": {"recognize": 0.1, "solve": 2.0}}, True, True),
    ],
)  # fmt: skip
def test_dissociations_and_hierarchies_as_planted(tables, costs, double, hierarchy):
    without = crossing(costs)
    crossed = tables.crossed(without)
    row = crossed[(crossed.ability == "recognize") & (crossed.choice == "own")
                  & (crossed.task == "solve")].iloc[0]  # fmt: skip
    assert row["drop"] == pytest.approx(costs["recognize"]["solve"], abs=0.02)
    assert row.random == pytest.approx(0.1, abs=0.02) and row.sets == 20
    (pair,) = tables.pairs(without, crossed).query("choice == 'own'").to_dict("records")
    assert (pair["lower"], pair["upper"]) == ("recognize", "solve")
    assert (pair["double_dissociation"], pair["hierarchy"]) == (double, hierarchy)


def test_sets_of_heads_are_those_that_cost_most(tables):
    """Head 2 of layer 1 serves solve only, head 0 of layer 0 both."""
    rows = []
    for task, layer, head in itertools.product(("solve", "recognize"), range(-1, 4), range(4)):
        if layer < 0 and head:
            continue
        cost = 3.0 * ((layer, head) == (0, 0)) + (task == "solve") * ((layer, head) == (1, 2))
        place = {"layer": layer, "head": head if layer >= 0 else -1}
        about = {"id": task, "task": task, "mode": "direct"}
        rows.append(about | place | {"logp": -cost - 0.01 * max(layer, 0)})
    cfg = SimpleNamespace(quick=False, random_sets=20, seed=0)
    found = {one["set"]: one for one in tables.head_sets(pd.DataFrame(rows), (4, 4), cfg)}
    assert found["solve, needed"]["heads"] == [(0, 0), (1, 2)]
    assert found["solve, own"]["heads"][0] == (1, 2)
    assert found["none"]["heads"] == []
    draws = [one for one in found.values() if one["ability"] == "solve" and one["draw"] >= 0]
    assert len(draws) == 40
    assert all(sorted(layer for layer, _ in one["heads"]) == [0, 1] for one in draws
               if one["choice"] == "needed")  # fmt: skip
