"""Experiment 008: exact answers in one pass, who gets noise, and what its tables say."""

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHS
from noise_runs import SOURCE, SPEC, made_up, measure, plan, settings, table
from scipy.stats import t as student

from lens_utils import generate, prompts
from lens_utils.corpus import Doc
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.prompts import Prompt

RECORDS = prompts.load(str(SOURCE))
SHOTS = (1, 9, 4, 33, 17, 5)  # longer than the sliding windows
QUESTIONS = ((58, 21, 9), (7, 8, 40, 3), (50, 3), (60, 12, 6, 2, 11))


# One pass scores an answer


@pytest.mark.parametrize("arch", ARCHS)
def test_exact_in_one_pass_is_exact_by_greedy_decoding(arch, tiny):
    """Right, wrong in its first and wrong in its last token; log-probabilities of a plain pass."""
    model = dataclasses.replace(wrap(tiny(arch), None, SPEC), ends=frozenset())
    asked, expected = [], []
    rows = [SHOTS + q for q in QUESTIONS]
    for row, steps in zip(rows, generate.answers(model, rows, max_new_tokens=3), strict=True):
        said = [step.id for step in steps]
        for answer in (
            said,
            [said[0], said[1], (said[2] + 1) % 64],
            [(said[0] + 1) % 64],
            said[:1],
        ):
            ids = (*row, *answer)
            asked.append(measure.Item(f"{ids}", "f", ids, len(row)))
            expected.append(said[: len(answer)] == answer)
    found = measure.score(model, asked)
    assert found.right.astype(bool).tolist() == expected and 0 < sum(expected) < len(expected)
    plain = tiny(arch)
    for item, logp in zip(asked, found.logp, strict=True):
        lp = plain(torch.tensor([item.ids])).logits[0].float().log_softmax(-1)
        one_by_one = [lp[at - 1, item.ids[at]].item() for at in range(item.start, len(item.ids))]
        assert logp == pytest.approx(sum(one_by_one), abs=1e-4)


def test_items_are_scored_as_the_real_model_writes_them(smol):
    """Few-shot line by line: what greedy decoding writes up to the line break is the answer."""
    asked = measure.items(smol, RECORDS, 2)
    answers = {r.id: r.answer + "\n" for r in RECORDS}
    found = measure.score(smol, asked).set_index("item").right
    rows = [item.ids[: item.start] for item in asked]
    for item, steps in zip(
        asked, generate.answers(smol, rows, max_new_tokens=6, until="\n"), strict=True
    ):
        text = "".join(step.text for step in steps)
        assert (text == answers[item.id]) == bool(found[item.id]), (item.id, text)
    assert 0.4 < found.mean() < 1


def test_families_in_parts_are_scored_as_in_one(tiny, monkeypatch):
    model = wrap(tiny("gemma3"), None, SPEC)
    asked = [
        measure.Item(f"{n}", f"f{n % 2}", (*SHOTS, 7 + n, *q), len(SHOTS) + 2)
        for n, q in enumerate(QUESTIONS)
    ]
    whole = measure.score(model, asked)
    monkeypatch.setattr(measure, "ROWS", 1)
    alone = measure.score(model, asked)
    pd.testing.assert_frame_equal(whole, alone, atol=1e-5)


def test_loss_on_text_is_the_models_own(tiny, tokenizer):
    model = wrap(tiny("llama"), tokenizer, SPEC)
    docs = [Doc("a", " ".join(["the cat sat on w3 w4"] * 9)), Doc("b", "ran to it " * 17)]
    for doc, logp in zip(docs, measure.text_loss(model, docs).logp, strict=True):
        ids = torch.tensor([model.encode(doc.text)[: measure.WINDOW]])
        assert -logp == pytest.approx(model.bridge(ids, return_type="loss").item(), abs=1e-5)


def test_an_answer_that_merges_with_its_text_is_refused(tiny, tokenizer):
    model = wrap(tiny("llama"), tokenizer, SPEC)
    with pytest.raises(BadInput, match="merges"):
        measure.items(model, [Prompt("x", "the c", "at", set="items", family="f")], 1)


def test_items_are_spread_over_their_family(tiny, tokenizer):
    """Families are sorted by what they ask for; the first few would be all of one kind."""
    model = wrap(tiny("llama"), tokenizer, SPEC)
    records = [Prompt(f"i{n}", f"the w{n}", " cat", set="items", family="f") for n in range(9)]
    for most, expected in ((3, [0, 3, 6]), (4, [0, 2, 4, 6]), (9, range(9)), (99, range(9))):
        assert [i.id for i in measure.items(model, records, most)] == [f"i{n}" for n in expected]


def test_every_family_has_examples_that_are_not_asked():
    items = [r for r in RECORDS if r.set == "items"]
    assert set(Counter(r.family for r in items).values()) == {36} and len(items) == 216
    texts = [(r.family, r.text) for r in RECORDS if r.set != "worked"]
    assert len(set(texts)) == len(texts)
    assert {r.family for r in items} == {r.family for r in RECORDS if r.set == "shots"}
    assert all(r"\boxed{" in r.answer for r in RECORDS if r.set == "worked")


# Who gets noise


def test_cores_are_the_two_ends_and_heads_without_a_score_are_in_neither():
    scores = made_up(4, 5)
    scores.loc[[0, 19], "value_diff"] = np.nan
    cores = plan.cores(settings(share=0.2), scores)
    ranked = scores.dropna().sort_values("value_diff")
    for core, expected in (("redundant", ranked[:4]), ("synergistic", ranked[-4:])):
        assert set(cores[core]) == set(zip(expected.layer, expected["head"], strict=True))
    assert not {(0, 0), (3, 4)} & {*cores["redundant"], *cores["synergistic"]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"score": "charm"}, "no score 'charm'.*value_diff, balance"),
        ({"score": "head"}, "no score 'head'"),
        ({"share": 0.0}, "--share 0.0"),
        ({"share": 0.6}, "--share 0.6"),
        ({"share": 0.01}, "too few"),
    ],
)
def test_cores_that_cannot_be(changed, says):
    with pytest.raises(BadInput, match=says):
        plan.cores(settings(**changed), made_up())


def test_every_arm_has_its_draws_at_every_sigma():
    cfg, scores = settings(draws=10, sweep_draws=3), made_up(6, 8)
    found = plan.conditions(cfg, scores, 0.5)
    times = Counter((c.arm, c.sigma) for c in found)
    others = {(arm, s): 3 for arm in plan.SWEPT for s in cfg.sigmas if s != 0.5}
    assert times == {("baseline", 0.0): 2} | {(arm, 0.5): 10 for arm in plan.ARMS} | others
    assert found[0].arm == found[-1].arm == "baseline"
    assert {len(c.heads) for c in found if c.sigma} == {12}
    sets = {}  # a draw's heads are the same at every sigma
    for c in found:
        assert sets.setdefault((c.arm, c.draw), c.heads) == c.heads
    random = [sets["random", draw] for draw in range(10)]
    assert len(set(random)) == 10
    assert len({sets["synergistic", draw] for draw in range(10)}) == 1
    for core, matched in plan.MATCHED.items():
        per_layer = Counter(layer for layer, _ in sets[core, 0])
        for draw in range(10):
            assert Counter(layer for layer, _ in sets[matched, draw]) == per_layer
            assert len(set(sets[matched, draw])) == 12
    pilot = plan.pilot(cfg, scores)
    assert not {c.draw for c in pilot if c.sigma} & {c.draw for c in found}
    assert not {c.heads for c in pilot if c.sigma} & set(random)


def test_random_sets_miss_no_head():
    """Over many draws each head comes up about as often as any other."""
    scores = made_up()
    every = Counter(h for n in range(400) for h in plan.random_heads(scores, 3, (0, n)))
    assert len(every) == 12 and all(70 < times < 130 for times in every.values())
    core = ((0, 1), (0, 2), (2, 3))
    like = Counter(h for n in range(400) for h in plan.random_like(scores, core, (0, n)))
    assert all(160 < like[0, head] < 240 and 70 < like[2, head] < 130 for head in range(4))


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"sigmas": (-0.1,)}, "sigmas"), ({"sigmas": ()}, "sigmas"), ({"sigma": -1.0}, "sigmas")],
)
def test_noise_levels_that_cannot_be(changed, says):
    with pytest.raises(BadInput, match=says):
        plan.sigmas(settings(**changed))
    with pytest.raises(BadInput, match="at least 2"):
        plan.conditions(settings(draws=1), made_up(), 0.5)
    with pytest.raises(BadInput, match="at least 1"):
        plan.conditions(settings(sweep_draws=0), made_up(), 0.5)


# The tables


def synthetic() -> pd.DataFrame:
    """Two families of four items; every arm has a level of its own, items and draws shift it."""
    levels = {"baseline": 0.0, "synergistic": -2.0, "redundant": -0.5, "random": -1.0}
    levels |= {name: -1.5 for name in plan.MATCHED.values()}
    rows = []
    for arm, level in levels.items():
        for draw in range(1 if arm == "baseline" else 3):
            for n in range(8):
                logp = level + 0.1 * n + 0.2 * (draw - 1) * (arm != "baseline")
                rows.append({"arm": arm, "sigma": 0.5 * (arm != "baseline"), "draw": draw,
                             "family": "ab"[n % 2], "item": f"i{n}",
                             "right": float(logp > -1), "logp": logp})  # fmt: skip
            rows.append(rows[-1] | {"family": "text", "item": "d", "right": np.nan, "logp": level})
    return pd.DataFrame(rows)


def test_contrasts_pair_items_and_weigh_draws():
    found = table.contrasts(synthetic()).set_index(["one", "other", "family", "measure"])
    row = found.loc[("synergistic", "random", table.ALL, "log-probability")]
    assert row.value == pytest.approx(-1) and row.n == 8
    assert row.low == pytest.approx(-1) and row.high == pytest.approx(-1)  # no item differs
    assert row.p_items == pytest.approx(2 / 2**8)
    # Three draws 0.2 apart have a standard deviation of 0.2; two such means differ by
    # 0.2 sqrt(2/3), and one more draw from their mean by 0.2 sqrt(4/3).
    assert row.p_draws == pytest.approx(2 * student.sf(1 / (0.2 * np.sqrt(2 / 3)), 4))
    assert row.p_one_more == pytest.approx(2 * student.sf(1 / (0.2 * np.sqrt(4 / 3)), 2))
    assert row.share_below == 0
    matched = plan.MATCHED["synergistic"]
    row = found.loc[("synergistic", matched, "a", "log-probability")]
    assert row.value == pytest.approx(-0.5) and row.n == 4
    assert ("synergistic", "random", "text", "accuracy") not in found.index


def test_one_draw_has_no_spread():
    one = synthetic()
    found = table.contrasts(one[one.draw == 0])
    assert found.p_draws.isna().all() and found.p_one_more.isna().all() and len(found)


def test_arms_are_means_over_items_of_means_over_draws():
    arms = table.by_arm(synthetic()).set_index(["arm", "sigma", "family", "measure"])
    row = arms.loc[("random", 0.5, table.ALL, "log-probability")]
    assert row.value == pytest.approx(-1 + 0.35) and row.sd_draws == pytest.approx(0.2)
    assert row.n == 8 and row.draws == 3 and row.low < row.value < row.high
    base = arms.loc[("baseline", 0.0, table.ALL, "accuracy")]
    assert base.value == 1 and base.sd_draws == 0


def test_sigma_is_where_random_noise_leaves_nearest_half():
    rows = [("baseline", 0.0, 0.8), ("random", 0.3, 0.7), ("random", 0.5, 0.5), ("random", 1.0, 0)]
    pilot = pd.DataFrame(
        [{"arm": a, "sigma": s, "family": "f", "right": r, "logp": 0.0} for a, s, r in rows]
        + [{"arm": "random", "sigma": 1.0, "family": "text", "right": np.nan, "logp": 0.0}]
    )
    found = table.pick_sigma(settings(), pilot)
    assert found["sigma"] == 0.5 and found["accuracy kept at 0.5"] == pytest.approx(0.625)
    assert table.pick_sigma(settings(sigma=0.3), pilot)["sigma"] == 0.3
