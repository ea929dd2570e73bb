"""Sweeps, sets and cuts on two circuits that are known; controls that match; bad input."""

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
from small_pairs import exchanged, of, random_batch

from lens_utils import pairs, sweeps
from lens_utils.errors import BadInput
from lens_utils.patching import Cut, Site, run


def near(found, expected, atol=2e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# Circuits that are known


@pytest.mark.parametrize("kind", ["denoise", "noise", "zero", "mean", "resample"])
def test_the_induction_circuit_is_found_and_nothing_else(kind):
    toy = induction_model()
    made = exchanged(pairs.induction(toy, 16, length=10), "keys")
    for batch in pairs.batches(toy, made, 16):
        effect = sweeps.sweep(toy, batch, "z", kind, over=["head"]).effect()
        for layer, head in (PREVIOUS_HEAD, INDUCTION_HEAD):
            all_of_it = 1 if kind in ("denoise", "noise") else 10
            share = effect[:, layer, head].mean() / all_of_it
            assert share > (0.4 if kind in ("mean", "resample") else 0.99)
        for layer, head in idle_heads():
            assert (effect[:, layer, head] == 0).all()


def test_the_edge_between_the_two_heads_runs_through_keys():
    """Exchanged keys: K of L1H2. Exchanged values: its V. Another last token: its Q."""
    toy = induction_model()
    drawn = pairs.induction(toy, 12, length=10)
    for what, part, made in (
        ("keys", "k", exchanged(drawn, "keys")),
        ("values", "v", exchanged(drawn, "values")),
        ("queries", "q", drawn),
    ):
        batch = next(pairs.batches(toy, made, 12))
        for component in "qkv":
            axis = "head" if component == "q" else "kv_head"
            effect = sweeps.sweep(toy, batch, component, over=[axis]).effect()
            expected = torch.zeros(2, 3)
            if component == part:
                expected[INDUCTION_HEAD] = 1
            if (what, component) == ("keys", "v"):
                expected[PREVIOUS_HEAD] = 1  # the token that L0H1 moves
            near(effect, expected.expand_as(effect), atol=1e-4)


def test_cutting_the_induction_edge_is_enough():
    toy = induction_model()
    batch = next(pairs.batches(toy, pairs.induction(toy, 8, length=10), 8))
    last, entity, subject = (sweeps.at(batch, role) for role in ("last", "entity", "subject"))
    units = [sweeps.cut([1], last, entity), sweeps.cut([0], last, entity),
             sweeps.cut([1], last, subject[:1]), sweeps.cut([0], entity, subject)]  # fmt: skip
    lost = sweeps.several(toy, batch, units, "zero").effect()
    assert (lost[:, [0, 3]] > 5).all() and (lost[:, [1, 2]] == 0).all()


@pytest.mark.parametrize("kind", ["denoise", "noise", "zero", "mean"])
def test_the_compiled_program_has_no_other_parts(kind):
    model = reverse_model()
    batch = pairs.batch(model, reverse_pairs())
    for component, over, alive in (
        ("z", ["head"], REVERSE_HEADS),
        ("mlp_out", [], {(layer,) for layer in REVERSE_MLPS}),
    ):
        effect = sweeps.sweep(model, batch, component, kind, over=over).effect().abs().amax(0)
        found = {tuple(place) for place in effect.nonzero().tolist()}
        assert found <= alive
        if kind == "zero":  # what L0H0 counts is not needed for these words
            assert found == alive - {(0, 0)}


# Lists of units, and bad input


def test_random_sets_match_in_every_layer():
    heads = [(3, 0), (3, 1), (5, 4)]
    drawn = sweeps.random_sets(heads, 8, 9, n=50, seed=1)
    assert all(sorted(layer for layer, _ in one) == [3, 3, 5] for one in drawn)
    assert not {head for one in drawn for head in one} & set(heads)
    assert all(len(set(one)) == 3 for one in drawn)
    assert len({tuple(sorted(one)) for one in drawn}) > 20
    assert drawn == sweeps.random_sets(heads, 8, 9, 50, 1) != sweeps.random_sets(heads, 8, 9, 50, 2)
    crowded = sweeps.random_sets([(2, 0), (2, 1), (2, 2)], 4, 4, 20)
    assert {tuple(sorted(layer for layer, _ in one)) for one in crowded} <= {(1, 1, 2), (1, 2, 3),
                                                                            (2, 3, 3)}  # fmt: skip
    assert sweeps.together(heads) == (Site("z", 3, (0, 1)), Site("z", 5, (4,)))


def test_a_sweep_can_be_of_some_layers_and_positions(tiny):
    model = of(tiny, "llama")
    batch = random_batch(model)
    whole = sweeps.sweep(model, batch, "z")
    some = sweeps.sweep(model, batch, "z", layers=[0, 2], positions=[4, 6])
    assert whole.axes == some.axes == ("layer", "head", "pos")
    near(some.logit_diff, whole.logit_diff[:, [0, 2]][..., [4, 6]])
    together = sweeps.sweep(model, batch, "z", over=[], layers=[2], positions=[4, 6])
    near(together.logit_diff.T, run(model, batch, [(Site("z", 2, None, (4, 6)),)]))


def test_windows():
    assert sweeps.sliding(4, 3) == [range(0, 3), range(1, 4)]


SITE = (Site("z", 0),)
WRONG = [
    (lambda m, b: sweeps.sweep(m, b, "banana"), "no component 'banana'; there are resid_pre"),
    (lambda m, b: sweeps.sweep(m, b, "k", over=["head"]), "k has no axis 'head', but pos, kv_head"),
    (lambda m, b: sweeps.sweep(m, b, "z", layers=[3]), "layer 3 of llama, whose blocks are 0 to 2"),
    (lambda m, b: run(m, b, [(Site("z", 0, (4,)),)]), "head 4 is not there: 0 to 3 are"),
    (lambda m, b: run(m, b, [(Site("k", 0, (2,)),)]), "kv_head 2 is not there: 0 to 1 are"),
    (lambda m, b: run(m, b, [(Site("z", 0, None, (7,)),)]), "pos 7 is not there: 0 to 6 are"),
    (lambda m, b: run(m, b, [(Site("mlp_out", 0, (1,)),)]), "mlp_out has no heads"),
    (lambda m, b: run(m, b, [(Cut(0, (), (1,)),)]), "at least one query and one key"),
    (lambda m, b: run(m, b, [(Cut(0, (-1,), (1,)),)]), "pos -1 is not there"),
    (lambda m, b: run(m, pairs.batch(m, b.pairs[:1]), [SITE], "mean"), "at least two pairs"),
    (lambda m, b: sweeps.window(3, 2, 2), "layer window 2 to 2: it needs 0 <= first < behind <= 3"),
    (lambda m, b: sweeps.window(3, 2, 1), "layer window 2 to 1"),
    (lambda m, b: sweeps.window(3, 1, 4), "layer window 1 to 4"),
    (lambda m, b: sweeps.sliding(3, 4), "layer window 0 to 4"),
    (lambda m, b: sweeps.at(b, "entity"), "no token is 'entity' in p0; there are function"),
    (lambda m, b: sweeps.random_sets([(0, 0), (0, 1)], 1, 3, 1), "2 of 3 heads leave too few"),
    (lambda m, b: run(m, type(b)(b.pairs, b.clean, b.corrupt, b.answer, b.answer), [SITE]),
     "p0 has its answer as foil"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says[:24] for _, says in WRONG])
def test_bad_input_is_one_line(tiny, wrong, says):
    model = of(tiny, "llama")
    with pytest.raises(BadInput) as error:
        wrong(model, random_batch(model))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_parts_that_a_model_lacks_are_named():
    toy = induction_model()
    batch = next(pairs.batches(toy, pairs.induction(toy, 2, length=10), 2))
    with pytest.raises(BadInput, match="induction has no mlp_out"):
        sweeps.sweep(toy, batch, "mlp_out")
