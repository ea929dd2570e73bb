"""Learned masks: exact size, never worse than the start, resumed bit for bit, planted circuits."""

import dataclasses
import math

import pytest
import torch
from circuits import INDUCTION_HEAD, PREVIOUS_HEAD
from kv_models import examples, masked, of
from small_pairs import softened
from test_kv_scores import buried, units_at
from toys import code_and_line

from lens_utils import kv_learn
from lens_utils.errors import BadInput
from lens_utils.kv_learn import METHODS, Gates, Recipe, Targets, learn
from lens_utils.kv_masks import Examples, Fill, fidelity
from lens_utils.kv_scores import gradient_scores, n_kept, random_scores, top

SHORT = Recipe(steps=6, rows=2, positions=4, every=2, lr=0.05)


@pytest.fixture(scope="module")
def setting(tiny):
    """(masked llama, targets of a fit and a validation split, a ranking)."""
    on = masked(of(tiny, "llama"))
    fit, check = (Targets(on, examples(n=n, seed=s)) for n, s in ((6, 1), (3, 2)))
    return on, fit, check, random_scores(on.units, 3)


def using(method, **more):
    return dataclasses.replace(SHORT, method=method, **more)


@pytest.mark.parametrize("method", ["topk", "hard_concrete", "continuous"])
def test_the_asked_size_exactly_and_never_worse_than_the_start(method, setting):
    on, fit, check, start = setting
    for sparsity in (0.5, 0.8, 0.95):
        kept = n_kept(on.units, sparsity)
        found = learn(on, fit, check, start, kept, using(method, steps=4))
        assert found.mask.sum() == kept and set(found.mask.tolist()) == {0, 1}
        assert torch.equal(found.mask, top(found.scores, kept))
        history = dict(zip(kv_learn.COLUMNS, found.history.T.tolist(), strict=True))
        assert history["step"] == [0, 2, 4]
        assert history["sparsity"] == pytest.approx([1 - kept / on.units.total] * 3)
        before = check.distance(on, top(start, kept), SHORT)
        after = check.distance(on, found.mask, SHORT)
        assert history["val_kl"][0] == pytest.approx(before)
        assert after == pytest.approx(min(history["val_kl"])) and after <= before + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_the_same_mask(method, setting):
    """Bit for bit, from whichever state was kept; also learned constants."""
    on, fit, check, start = setting
    kept, states = 60, []
    recipe = using(method, fill="learned" if method == "topk" else "constant")
    whole = learn(on, fit, check, start, kept, recipe, seed=5, keep=states.append)
    assert [int(state["step"]) for state in states] == [2, 4, 6]
    for state in states[:2]:
        again = learn(on, fit, check, start, kept, recipe, seed=5, state=state)
        assert torch.equal(again.mask, whole.mask) and torch.equal(again.scores, whole.scores)
        assert torch.equal(again.history.nan_to_num(), whole.history.nan_to_num())
        assert all(map(torch.equal, again.fill, whole.fill))
    other = learn(on, fit, check, start, kept, recipe, seed=6)
    assert not torch.equal(other.history.nan_to_num(), whole.history.nan_to_num())


def test_original_starts_with_everything_off(setting):
    """The published baseline's error: what it calls unpruned has no K and no V at all."""
    on, fit, check, start = setting
    found = learn(on, fit, check, start, 60, using("original"))
    history = dict(zip(kv_learn.COLUMNS, found.history.T.tolist(), strict=True))
    assert history["sparsity"][0] == 1
    empty = check.distance(on, torch.zeros(on.units.total), SHORT)
    assert history["val_kl"][0] == pytest.approx(empty)
    size = 1 - float(found.mask.mean())  # its own, not the asked one
    assert history["sparsity"][-1] == pytest.approx(size) and 0 < size < 1
    assert found.mask.sum() != 60 and torch.equal(found.mask, (found.scores > 0).float())
    assert history["temperature"][0] == 1 and history["temperature"][-1] == pytest.approx(0.1)


def test_hard_concrete_gates_are_those_of_louizos():
    """Share of gates that are exactly 0, against 1 - sigmoid(log alpha - beta log(0.1 / 1.1))."""
    gates = Gates(Recipe("hard_concrete"), torch.randn(4000), 2000)
    with torch.no_grad():
        gates.scores.fill_(0.3)
    drawn = gates.at(0, torch.Generator().manual_seed(0))
    open_ = 1 / (1 + math.exp(-(0.3 - 2 / 3 * math.log(0.1 / 1.1))))
    assert float((drawn > 0).float().mean()) == pytest.approx(open_, abs=0.02)
    assert (drawn == 1).any() and drawn.min() == 0
    (slope,) = torch.autograd.grad(drawn.sum(), gates.scores)
    inside = (drawn > 0) & (drawn < 1)
    assert (slope[inside] > 0).all() and (slope[~inside] == 0).all()


def test_the_expected_sparsity_reaches_its_target():
    """Without a task, the two multipliers alone bring it there."""
    recipe = Recipe("hard_concrete", steps=400, lr=0.05)
    gates = Gates(recipe, torch.randn(200, generator=torch.Generator().manual_seed(0)), 40)
    down = torch.optim.Adam(gates.parameters, lr=recipe.lr)
    up = torch.optim.Adam([gates.prices], lr=recipe.lr, maximize=True)
    gap = []
    for step in range(recipe.steps):
        down.zero_grad(), up.zero_grad()
        gates.penalty(step).backward()
        down.step(), up.step()
        shut = 1 - torch.sigmoid(gates.scores - 2 / 3 * math.log(1 / 11)).mean()
        gap.append(abs(float(shut.detach()) - 0.8))
    assert gap[0] > 0.6 and sum(gap[-50:]) / 50 < 0.1


def test_topk_passes_gradients_on_to_what_is_off():
    gates = Gates(Recipe("topk"), torch.arange(10.0), 3)
    at = gates.at(0, torch.Generator())
    assert at.tolist() == [0] * 7 + [1] * 3
    weigh = torch.randn(10)
    (slope,) = torch.autograd.grad((at * weigh).sum(), gates.scores)
    assert torch.equal(slope, weigh)


@pytest.mark.parametrize("kept", [0, 72])
def test_sizes_that_leave_nothing_to_learn_are_one_line(kept, setting, capsys):
    on, fit, check, start = setting
    assert on.units.total == 72
    code, line = code_and_line(lambda: learn(on, fit, check, start, kept, SHORT), capsys)
    assert code and "between 0 and 1" in line


def test_a_loss_that_is_not_a_number_is_one_line(setting, capsys):
    on, fit, check, start = setting
    broken = on.with_fill(Fill(*(x * math.nan for x in on.fill)))
    code, line = code_and_line(lambda: learn(broken, fit, check, start, 30, SHORT), capsys)
    assert code and "nan at step 0" in line and "--lr" in line


def test_learned_constants_lower_the_loss(setting):
    """And the mask comes with the constants it was measured with."""
    on, fit, check, start = setting
    plain = learn(on, fit, check, start, 20, using("topk", steps=12))
    own = learn(on, fit, check, start, 20, using("topk", steps=12, fill="learned"))
    assert not torch.equal(own.fill.v, on.fill.v) and torch.equal(plain.fill.v, on.fill.v)
    value = check.distance(on.with_fill(own.fill), own.mask, SHORT)
    assert value == pytest.approx(float(own.history[:, 2].min()), rel=1e-5)
    assert value < check.distance(on, plain.mask, SHORT)


def test_constants_are_those_of_the_best_mask(setting, monkeypatch):
    """The last ones belong to another mask when the best was found before the end."""
    on, fit, check, start = setting
    values = iter([5.0, 1.0, 3.0, 4.0])
    seen = []

    def distance(self, masked, mask, recipe):
        seen.append(Fill(*(x.detach().clone() for x in masked.fill)))
        return next(values)

    monkeypatch.setattr("lens_utils.kv_learn.Targets.distance", distance)
    found = learn(on, fit, check, start, 20, using("topk", fill="learned"))
    assert all(map(torch.equal, found.fill, seen[1]))
    assert not torch.equal(found.fill.v, seen[-1].v)


def test_losses_by_hand(setting):
    """KL to the model or CE on the text, at the counted predictions of the drawn rows."""
    on, fit, _, start = setting
    mask, rows = top(start, 40), torch.tensor([4, 0])
    data = fit.examples.take(rows)
    full, cut = (on.readout.read(on.resid(data.ids, m)) for m in (None, mask))
    full, cut, target = full[:, 1:], cut[:, 1:], data.target[:, 1:]
    kl = torch.nn.functional.kl_div(
        cut.log_softmax(-1), full.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1).mean()  # fmt: skip
    ce = torch.nn.functional.cross_entropy(cut.flatten(0, 1), target.flatten())
    for objective, want in (("kl", kl), ("lm", ce)):
        recipe = dataclasses.replace(SHORT, objective=objective)
        found = fit.loss(on, mask, rows, 99, torch.Generator().manual_seed(0), recipe)
        assert float(found) == pytest.approx(float(want), rel=1e-4)
    partner = torch.tensor([1, 2, 3, 4, 5, 0])
    mixed = Targets(on, fit.examples, partner)
    every = torch.arange(6)
    ours = mixed.loss(on, None, every, 99, torch.Generator().manual_seed(0), SHORT)
    p = on.readout.read(on.resid(fit.examples.ids))[:, 1:].log_softmax(-1)
    want = (p[partner].exp() * (p[partner] - p)).sum(-1).mean()
    assert float(ours) == pytest.approx(float(want), rel=1e-4)


# What is known to be there


def test_dead_units_are_the_ones_that_go(tiny):
    """As many as asked: the rest is the model."""
    model = of(tiny, "llama")
    places = buried(model)
    on = masked(model, examples(n=3))
    dead = units_at(on.units, *places)
    fit, check = (Targets(on, examples(n=4, seed=s)) for s in (1, 2))
    start = gradient_scores(on, fit.examples)["fisher"]
    found = learn(on, fit, check, start, on.units.total - len(dead), SHORT)
    assert (found.mask == 0).nonzero().flatten().tolist() == dead
    assert check.distance(on, found.mask, SHORT) < 1e-6


def induction_rows(n, seed, length=8):
    """Random tokens twice; the second time all but the first can be known."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([torch.randperm(16, generator=generator)[:length] for _ in range(n)])
    whole = torch.cat([once, once], dim=1)
    counted = torch.zeros(n, 2 * length - 1, dtype=torch.bool)
    counted[:, length:] = True
    return Examples(whole[:, :-1], whole[:, 1:], counted, torch.arange(n))


def test_the_hand_built_induction_circuit_is_found():
    """Half of its channels, all in its two heads; without them nothing is left of it."""
    model = softened(0.1)
    on = masked(model, induction_rows(24, 0))
    fit, check, test = (Targets(on, induction_rows(n, s)) for n, s in ((24, 1), (8, 2), (8, 3)))
    table = on.units.table()
    circuit = torch.tensor([
        (row.layer, row.head) in (PREVIOUS_HEAD, INDUCTION_HEAD) for row in table.itertuples()
    ])  # fmt: skip
    kept = 60
    start = random_scores(on.units, 0)
    recipe = Recipe(steps=30, lr=0.05, rows=8, every=15)
    found = learn(on, fit, check, start, kept, recipe)
    share = [float(circuit[m.bool()].float().mean()) for m in (top(start, kept), found.mask)]
    assert share[0] < 0.5
    fisher = learn(on, fit, check, gradient_scores(on, fit.examples)["fisher"], kept, recipe)
    assert circuit[fisher.mask.bool()].all() and share[1] > 0.6
    masks = [fisher.mask, found.mask, top(start, kept), 1 - fisher.mask, torch.zeros(len(table))]
    kls = fidelity(on, test.examples, masks).groupby("mask").kl.sum().tolist()
    assert kls[0] < kls[1] < kls[2] and kls[0] < 0.5 * kls[4] < kls[3]


def test_bad_recipes_do_not_start(setting):
    on, fit, check, start = setting
    with pytest.raises(BadInput, match="two rows"):
        learn(on, Targets(on, examples(n=1)), check, start, 30, using("topk", fill="resample"))
