"""Experiment 007's orders and tables, on made-up heads whose answer is known."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import test_divergence as plain
import torch
from scipy.stats import spearmanr

from lens_utils import provenance
from lens_utils.errors import BadInput

L, H, SIZE = 6, 5, 30
LAYER = np.repeat(np.arange(L), H)
CFG = {
    "scores": "value_diff", "points": "0.1,0.3", "random_points": "0.2,0.4", "random_orders": 6,
    "ablation": "zero", "per_category": 0, "steps": 0, "quick": False, "seed": 0,
}  # fmt: skip


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(provenance.EXPERIMENTS / "007_head_ablation"))
    names = ("ablation_orders", "ablation_readings", "ablation_tables")
    return SimpleNamespace(**{n.split("_")[1]: importlib.import_module(n) for n in names})


def plan(modules, **changes):
    return modules.orders.Plan(SimpleNamespace(**CFG | changes), scores())


def scores(**columns):
    place = {"layer": LAYER, "head": np.tile(np.arange(H), L)}
    return pd.DataFrame(place | {"value_diff": np.arange(SIZE, 0, -1.0)} | columns)


def single(kl, texts=("s0",)):
    frame = scores()[["layer", "head"]]
    return pd.concat([frame.assign(id=t, family="f", kl=kl) for t in texts], ignore_index=True)


def test_orders_follow_their_score(modules):
    importance = np.random.default_rng(1).permutation(SIZE).astype(float)
    heads = modules.orders.heads(scores(), single(importance, "ab"))
    found = plan(modules).orders(heads)
    by_name = {o["order"]: o for o in found}
    assert by_name["value_diff, high first"]["heads"] == list(range(SIZE))
    assert by_name["value_diff, low first"]["heads"] == list(range(SIZE))[::-1]
    assert by_name["alone, high first"]["heads"] == np.argsort(-importance).tolist()
    kinds = pd.Series([o["kind"] for o in found]).value_counts()
    assert kinds["random"] == 6
    for end in ("high", "low"):
        kind = f"random, layers of value_diff, {end} first"
        assert kinds[kind] == 3
        like = LAYER[by_name[f"value_diff, {end} first"]["heads"]]
        drawn = [o["heads"] for o in found if o["kind"] == kind]
        assert all((LAYER[o] == like).all() for o in drawn)
        assert len({tuple(o) for o in drawn}) == 3
    for order in found:
        assert sorted(order["heads"]) == list(range(SIZE)), order["order"]
        assert (order["turn"] is None) == (order["order"] == order["kind"])


def test_every_random_order_has_its_texts(modules):
    """As many on each text, every order on as many texts; orders of scores are run on all."""
    orders = [{"order": "score", "turn": None}, *({"order": n, "turn": n} for n in range(8))]
    for turns, each in ((4, 2), (2, 4), (1, 8)):
        due = [modules.orders.due(orders, text, turns) for text in range(turns)]
        assert all(len(found) == 1 + each for found in due)
        names = [o["order"] for found in due for o in found]
        assert sorted(n for n in names if n != "score") == list(range(8))


def test_ties_are_drawn_and_unknown_scores_come_last(modules):
    values = np.array([1.0, 2, 2, 2, np.nan, 0])
    drawn = {
        tuple(modules.orders.ranked(values, np.random.default_rng(seed))) for seed in range(40)
    }
    assert {o[:3] for o in drawn} == {
        (1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1),
    }  # fmt: skip
    assert {o[3:] for o in drawn} == {(0, 5, 4)}


def test_points(modules):
    """Shares, or every few heads up to 40 %; the common ones are always among them."""
    assert plan(modules).counts(SIZE, True) == [(3, 0.1), (6, 0.2), (8, 0.25), (9, 0.3), (12, 0.4)]
    assert plan(modules).counts(SIZE, False) == [(6, 0.2), (8, 0.25), (12, 0.4)]
    every = plan(modules, points="every 5").counts(SIZE, True)
    assert every == [(5, 5 / SIZE), (6, 0.2), (8, 0.25), (10, 10 / SIZE), (12, 0.4)]
    every = plan(modules, points="every 4").counts(SIZE, True)
    assert every == [(4, 4 / SIZE), (6, 0.2), (8, 0.25), (12, 0.4)], "each number once"
    assert [k for k, _ in plan(modules, points="every 5").counts(272, True)] == sorted(
        {*range(5, 109, 5), 54, 68, 109}
    )
    assert plan(modules, quick=True).common == [0.2, 0.25]
    assert plan(modules).counts(4, False) == [(1, 0.2), (1, 0.25), (2, 0.4)], "few heads"


def test_texts_for_single_heads_are_none_of_the_orders(modules):
    asked = [
        {"id": f"{f}{i}", "family": f, "ids": [i, 7], "text": ""} for f in "abc" for i in range(4)
    ]
    tokens = [[100 + n, 200 + n, 300 + n] for n in range(12)]
    texts = modules.readings.choose(asked, tokens, SimpleNamespace(**CFG))
    assert [t["id"] for t in texts if t["use"] == "single"] == ["a0", "b0", "c0"]
    assert [t["id"] for t in texts if t["use"] == "orders"] == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert texts[3]["ids"] == [1, 7, 101, 201] and texts[3]["steps"] == 3
    assert [t["turn"] for t in texts if t["use"] == "orders"] == [0, 1, 2, 3, 4, 5]
    cfg = SimpleNamespace(**CFG | {"quick": True, "steps": 2})
    quick = modules.readings.choose(asked, tokens, cfg)
    assert [(t["id"], t["use"]) for t in quick] == [
        ("a0", "single"), ("a1", "orders"), ("b1", "orders"),
    ]  # fmt: skip
    assert quick[0]["ids"] == [0, 7, 100]


def test_a_session_measures_what_it_says(modules, tiny):
    """Against a plain model, one forward for each set, in zeros and in means."""
    model = plain.loaded(tiny, "llama")
    cfg = SimpleNamespace(**CFG | {"points": "0.5", "random_points": "0.25", "random_orders": 4})
    place = {"layer": np.repeat(np.arange(3), 4), "head": np.tile(np.arange(4), 3)}
    scored = pd.DataFrame(place | {"value_diff": np.arange(12.0)})
    read, order = modules.readings, modules.orders
    made = order.Plan(cfg, scored)
    ids = [plain.IDS.tolist(), *(o.tolist() for o in plain.OTHERS)]
    texts = [
        {"id": f"t{n}", "family": f"f{n}", "steps": plain.STEPS, "ids": row, "turn": n - 1,
         "use": "orders" if n else "single"} for n, row in enumerate(ids)
    ]  # fmt: skip
    run = SimpleNamespace(model=lambda: model)
    session = read.Session(cfg, run, texts, scored)
    hf = tiny("llama")

    single = session.single(texts[:1])
    assert list(zip(single.layer, single["head"], strict=True)) == list(np.ndindex(3, 4))
    for row in single.itertuples():
        gone = torch.zeros(3, 4, dtype=torch.bool)
        gone[row.layer, row.head] = True
        assert row.kl == pytest.approx(float(plain.kl(hf, gone).mean()), rel=1e-3, abs=1e-6)
    with pytest.raises(BadInput, match="another model"):
        read.Session(cfg, run, texts, scored[:8]).single(texts[:1])

    orders = made.orders(order.heads(scored, single))
    text = texts[0] | {"turn": 0}
    found = session.along(text, orders, made)
    assert (found.id == "t0").all()
    zero = found[found.ablation == "zero"].set_index(["order", "heads"]).kl
    assert abs(zero["none", 0]) < 1e-6
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert zero["all", 12] == pytest.approx(float(plain.kl(hf, everything).mean()), rel=1e-3)
    for name, k, first in (("value_diff, high first", 6, range(6, 12)),
                           ("value_diff, low first", 3, range(3))):  # fmt: skip
        gone = torch.zeros(12, dtype=torch.bool)
        gone[list(first)] = True
        expected = float(plain.kl(hf, gone.view(3, 4)).mean())
        assert zero[name, k] == pytest.approx(expected, rel=1e-3)
    assert {name for name, k in zero.index if k == 3} >= {"random 0", "random 2"}
    assert ("random 1", 3) not in zero.index, "the other text's"
    assert ("random 0", 6) not in zero.index, "random orders at the common points only"

    mean = found[found.ablation == "mean"].set_index(["order", "heads"]).kl
    assert set(found[found.ablation == "mean"].kind) == {"none", "all", *order.CONTROLLED}
    assert abs(mean["none", 0]) < 1e-6
    pool = torch.cat([plain.heads_of(hf, o)[:, -plain.STEPS :] for o in plain.OTHERS], dim=1)
    values = pool.mean(1, keepdim=True).expand(-1, len(plain.IDS), -1, -1)
    gone = torch.zeros(12, dtype=torch.bool)
    gone[9:] = True
    expected = float(plain.kl(hf, gone.view(3, 4), values).mean())
    assert mean["value_diff, high first", 3] == pytest.approx(expected, rel=1e-3)


def test_bad_settings_are_one_line(modules):
    check = modules.orders.check
    asked = [{"id": f"a{i}", "family": "a", "ids": [1], "text": ""} for i in range(2)]
    choose = lambda **kw: modules.readings.choose(  # noqa: E731
        asked, [[1, 2]] * 2, SimpleNamespace(**CFG | kw)
    )
    wrong = [
        (lambda: plan(modules, points="0.1,1.2"), "share of 1.2"),
        (lambda: plan(modules, points="0,0.5"), "share of 0 of"),
        (lambda: plan(modules, random_points="-0.1"), "share of -0.1"),
        (lambda: plan(modules, points="a half"), "write shares of all heads"),
        (lambda: plan(modules, points="every 0"), "every 5"),
        (lambda: plan(modules, points="every"), "every 5"),
        (lambda: plan(modules, random_orders=1), "at least 2"),
        (lambda: plan(modules, random_points=""), "write shares of all heads"),
        (lambda: plan(modules, scores="synergy"), "no column 'synergy'; there are value_diff"),
        (lambda: plan(modules, scores="layer"), "no column 'layer'"),
        (lambda: check(scores()[:25], L, H), "25 scores up to layer 4, this model 6 layers of 5"),
        (lambda: check(scores(head=np.arange(SIZE)), L, H), "another model"),
        (lambda: check(scores(), L, H + 1), "another model"),
        (lambda: check(pd.concat([scores()] * 2), L, H), "60 scores up to layer 5"),
        (lambda: choose(steps=3), "wrote 2 tokens"),
        (lambda: choose(steps=-1), "wrote 2 tokens"),
        (lambda: choose(), "--per-category 2: 005 has 2 prompts of a"),
        (lambda: choose(per_category=-1), "one is kept for single heads"),
    ]
    for call, said in wrong:
        with pytest.raises(BadInput, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


def made_up(value, texts=6):
    """Points of three orders; value(kind, text, order, share) gives the divergence."""
    rows = []
    for n in range(texts):
        rows.append(("none", "none", 0.0, 0, n, "zero", 1e-9))
        rows.append(("all", "all", 1.0, 30, n, "zero", 9.0))
        for kind, orders in (("score, high first", [0]), ("random", [0, 1, 2, 3])):
            for j in orders:
                if kind == "random" and j % 2 != n % 2:
                    continue
                name = f"{kind} {j}" if kind == "random" else kind
                for share in (0.2, 0.4):
                    kl = value(kind, n, j, share)
                    rows.append((name, kind, share, int(share * 10), n, "zero", kl))
    columns = ["order", "kind", "share", "heads", "id", "ablation", "kl"]
    return pd.DataFrame(rows, columns=columns).assign(family="f", turn=0)


def test_areas_against_random(modules):
    """Three times random at every point and in every text is 3, whatever texts and orders are."""

    def value(kind, n, j, share):
        return (1 + n) * (3 if kind != "random" else 1) * share**2

    found = modules.tables.areas(made_up(value), [0.2, 0.4], seed=0)
    row = found[found.kind == "score, high first"].iloc[0]
    # Trapezoids 0, 0.04, 0.16 at 0, 0.2, 0.4, times 3, times the mean of 1 .. 6.
    assert set(found.kind) == {"score, high first"} and set(found.against) == {"random"}
    assert row.area == pytest.approx(3 * 3.5 * (0.02 * 0.2 + 0.1 * 0.2))
    assert row.value == pytest.approx(3) and row.below == 1
    assert row.low < 3 < row.high or (row.low, row.high) == (pytest.approx(3), pytest.approx(3))
    assert (row.texts, row.orders) == (6, 4)


def test_the_intervals_know_of_orders(modules):
    """One lucky order among the random ones is uncertainty, also where texts are all alike."""

    def value(kind, n, j, share):
        return 1.0 if kind != "random" else (4.0 if j == 0 else 1.0)

    row = modules.tables.areas(made_up(value), [0.2, 0.4], seed=0).iloc[0]
    assert row.value == pytest.approx(1 / 1.75)
    assert row.low < 0.45 and row.high == pytest.approx(1, abs=0.01)
    assert row.below == 0


def test_correlations_within_layers_leave_depth_out(modules):
    """A score that is nothing but depth says nothing within layers."""
    rng = np.random.default_rng(0)
    depth = LAYER + 0.001 * rng.normal(size=SIZE)
    heads = scores(value_diff=depth).assign(alone=np.exp(LAYER + rng.normal(size=SIZE) * 0.3))
    found = modules.tables.correlations(heads, ["value_diff"], 0)
    found = found.set_index(["score", "within_layers"])
    over = found.loc[("value_diff", False)]
    assert over.value == pytest.approx(spearmanr(depth, heads.alone).statistic)
    assert over.value > 0.9 and over.low > 0.7
    assert abs(found.loc[("value_diff", True)].value) < 0.5
    assert ("layer", False) in found.index and ("layer", True) not in found.index
    same = heads.assign(value_diff=heads.alone.rank())
    exact = modules.tables.correlations(same, ["value_diff"], 0)
    assert exact[exact.score == "value_diff"].value.tolist() == pytest.approx([1, 1])


def test_reliability_is_over_all_halvings(modules):
    rng = np.random.default_rng(0)
    importance = rng.normal(size=SIZE)
    assert modules.tables.reliability(single(importance, "abcd"))["value"] == pytest.approx(1)
    noise = pd.concat([single(rng.normal(size=SIZE), [t]) for t in "abcd"])
    assert abs(modules.tables.reliability(noise)["value"]) < 0.4
    assert math.isnan(modules.tables.reliability(single(importance))["value"])


def test_curves_are_means_over_texts_and_orders(modules):
    def value(kind, n, j, share):
        return 10 * share + n if kind != "random" else j

    found = modules.tables.curves(made_up(value)).set_index(["kind", "share"])
    assert set(found.index.get_level_values(0)) == {"score, high first", "random"}
    assert found.loc[("score, high first", 0.2), "mean"] == pytest.approx(2 + 2.5)
    assert found.loc[("random", 0.4), "mean"] == pytest.approx(1.5)
    assert found.loc["random"].resampled.unique() == ["orders"] and found.loc["random"].n.max() == 4
    assert found.loc["score, high first"].n.max() == 6


def test_other_ablations_are_compared_with_random_heads(modules, monkeypatch):
    """At one share, each ablation by itself, only orders that every ablation was run on."""
    monkeypatch.setattr(modules.tables, "CONTROL", 0.2)
    points = made_up(lambda kind, n, j, share: (1 + n) * (1 if kind == "random" else 3) + share)
    other = points[points.kind != "all"].assign(ablation="mean", kl=points.kl * 10)
    twice = other.kind.str.startswith("score")
    other.loc[twice, "kl"] = other.kl / 3
    more = points[points.kind == "score, high first"].assign(kind="alone", order="alone")
    found = modules.tables.ablations(pd.concat([points, more, other]), seed=0)
    found = found.set_index(["ablation", "kind"])
    assert list(found.index) == [("zero", "score, high first"), ("mean", "score, high first")]
    zero, mean = found.value
    assert zero == pytest.approx((3 * 3.5 + 0.2) / (3.5 + 0.2))
    assert mean == pytest.approx(zero / 3)
    assert found.nats.tolist() == pytest.approx([3 * 3.5 + 0.2, 10 * (3 * 3.5 + 0.2) / 3])
    assert found.random_nats.tolist() == pytest.approx([3.7, 37])


def test_what_a_quarter_costs_beside_its_heads(modules, monkeypatch):
    """Costs relative to the text's own, sums over the heads that are gone, and of their layers."""
    monkeypatch.setattr(modules.tables, "CONTROL", 0.2)
    points = made_up(lambda kind, n, j, share: (1 + n) * (2 + j if kind == "random" else 4))
    heads = scores().assign(alone=np.arange(SIZE) / 10)
    names = ["score, high first", *(f"random {j}" for j in range(4))]
    orders = [{"order": name, "heads": [5 * j, 5 * j + 1, 29]} for j, name in enumerate(names)]
    found = modules.tables.explained(points, orders, heads).set_index("order").loc[names]
    assert found.relative.tolist() == pytest.approx([1, 0.5, 0.75, 1, 1.25])
    assert found.texts.tolist() == [6, 3, 3, 3, 3]
    assert found.loc["random 1", "kl"] == pytest.approx(3 * (2 + 4 + 6) / 3)
    assert found["heads"].unique() == [2]
    assert found.alone.tolist() == pytest.approx([0.1, 1.1, 2.1, 3.1, 4.1])
    assert found.by_layer.tolist() == pytest.approx([0.4, 1.4, 2.4, 3.4, 4.4])
    assert (found.whole_layers == "").all()
    two = heads.assign(layer=np.arange(SIZE) // 2)
    found = modules.tables.explained(points, orders, two).set_index("order").loc[names]
    assert found.whole_layers.tolist() == ["0", "", "5", "", "10"]
    rho = modules.tables.additive(found.reset_index(), 0)
    assert (rho["value"], rho["n"]) == (pytest.approx(1), 4)
    falling = found.assign(alone=-found.alone).reset_index()
    assert modules.tables.additive(falling, 0)["value"] == pytest.approx(-1)
