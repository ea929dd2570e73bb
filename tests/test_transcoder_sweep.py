"""Experiment 017: the grid, one shared pass, held-out figures against plain hooks, the choice."""

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from lens_utils import files, provenance
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec
from lens_utils.sparse_training import Moments, Recipe, Trainer, dead_after, ridge
from lens_utils.text_rows import Row

sys.path.insert(0, str(provenance.EXPERIMENTS / "017_transcoder_sweep"))

import sweep_judge as judge
import sweep_plan as planning
import sweep_tables as tables
import sweep_training as training

LAYERS = [0, 2]


def cfg(**changed: object) -> SimpleNamespace:
    defaults = {"quick": False, "layers": "", "expansions": "1,2,4", "ks": "2,4,8",
                "lrs": "0.001,0.003,0.01", "seed": 0, "tokens": 0, "passes": 0, "held_out": 0,
                "judged": 0}  # fmt: skip
    return SimpleNamespace(**defaults | changed)


@pytest.fixture(scope="module")
def model(tiny):
    return wrap(tiny("llama"), None, ModelSpec("llama", "llama"))


def rows(n: int, seed: int = 0) -> list[Row]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (n, 40), generator=source).tolist()
    return [Row(row, f"doc {i % 7}", "toy", "fit") for i, row in enumerate(ids)]


def plan_of(model, text, **changed):
    size = planning.Sizes(0, 2, 0, 0, 0)
    return planning.plan(cfg(layers="0,2", **changed), model, size, text, {})


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    """A quick sweep of two layers, on disk as its stages are; the run, the plan and the text."""
    text = rows(100)
    plan = plan_of(model, text, quick=True)
    run = SimpleNamespace(folder=tmp_path_factory.mktemp("run"), track=lambda items, what: items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "BATCH", 256)
        trained = training.Sweep(run, model, text, plan).trained()
    for name, state in trained.items():
        files.write(run.folder / "trained" / training.file(name), state)
    return run, plan, text


def test_the_grid_and_what_is_compared_at_its_centre(model):
    plan = plan_of(model, rows(1))
    c = plan["configurations"]
    assert plan["centre"] == "2x k4" and list(c)[0] == "2x k4"
    plain = [o for o in c.values() if o["share"] == 1 and o["lr"] == 0.003
             and o["skip"] == "none" and o["encoder"] == "trained"]  # fmt: skip
    assert {(o["expansion"], o["k"]) for o in plain} == {
        (e, k) for e in (1, 2, 4) for k in (2, 4, 8)
    }
    rest = [n for n, o in c.items() if o not in plain]
    assert sorted(rest) == sorted([
        "2x k4, random encoder", "2x k4, lr 0.001", "2x k4, lr 0.01", "2x k4, 0.25 of the text",
        "2x k4, 0.5 of the text", "2x k4, skip zero", "2x k4, skip ridge",
        "2x k4, skip ridge, gain free"])  # fmt: skip
    assert len({training.file(n) for n in c}) == len(c)
    quick = plan_of(model, rows(1), quick=True)
    assert list(quick["configurations"]) == ["2x k4", "2x k4, random encoder", "1x k2"]


@pytest.mark.parametrize(("wrong", "said"), [
    ({"layers": "0,3"}, "--layers 0,3: numbers from 0 to 2"), ({"layers": "last"}, "--layers last"),
    ({"ks": "2,x"}, "--ks 2,x"), ({"lrs": "-1"}, "--lrs -1"), ({"ks": "40"}, "--ks 40 of 32"),
])  # fmt: skip
def test_wrong_settings_are_one_line(model, wrong, said):
    with pytest.raises(BadInput, match=said) as error:
        planning.plan(cfg(**wrong), model, planning.Sizes(0, 2, 0, 0, 0), rows(1), {})
    assert "\n" not in str(error.value)


def test_pilot_layers_are_early_in_the_middle_and_late():
    def of(n, **changed):
        return planning._layers(cfg(**changed), SimpleNamespace(n_layers=n))

    assert of(30) == [5, 14, 24] and of(30, quick=True) == [14] and of(6) == [1, 2, 4]
    assert of(1) == [0]


def by_hooks(tiny, text):
    """MLP inputs and outputs of every token but each row's first, by plain torch hooks."""
    hf, seen = tiny("llama"), {}
    for layer in LAYERS:
        hf.model.layers[layer].mlp.register_forward_hook(
            lambda mlp, args, y, layer=layer: seen.update({layer: (args[0], y)})
        )
    with torch.no_grad():
        hf(torch.tensor([row.ids for row in text]))
    return {n: tuple(t[:, 1:].flatten(0, 1) for t in xy) for n, xy in seen.items()}


def test_one_pass_trains_as_each_alone(tiny, model, swept):
    """Against a trainer of one configuration on activations of plain hooks."""
    run, plan, text = swept
    name, found = "1x k2", by_hooks(tiny, text)
    transcoder = training.transcoders(run, name, plan, model)[2]
    x, y = found[2]
    tokens = 100 * 40 * 2
    recipe = Recipe(32, 2, tokens // 256, 0.003, dead_after=dead_after(tokens), seed=2)
    trainer = Trainer.start(recipe, x, y)
    source = torch.Generator().manual_seed(0)
    for _ in range(2):
        for part in torch.randperm(len(x), generator=source).tensor_split(len(x) // 256):
            if trainer.taken < recipe.steps:
                trainer.step(x[part], y[part])
    assert trainer.taken > 15
    for n, p in trainer.transcoder().named_parameters():
        assert_close(p, getattr(transcoder, n), rtol=2e-2, atol=2e-3)


def test_baselines_are_those_of_all_tokens(tiny, model, swept):
    run, plan, text = swept
    x, y = by_hooks(tiny, text)[0]
    held = training.baselines(run, plan, model)
    assert_close(held["mean"][0].b_dec, y.mean(0), rtol=1e-4, atol=1e-4)
    assert_close(held["linear"][0](x), ridge(Moments.of(x, y))(x), rtol=1e-3, atol=1e-3)
    assert not held["zero"][0](x).any()


def test_a_random_encoder_stays_random_and_its_decoder_does_not():
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 8, generator=source) for _ in range(2))
    recipe = Recipe(16, 2, steps=5)
    trainer, start = (training.RandomEncoder.start(recipe, x, y) for _ in range(2))
    trainer.step(x, y)
    for name, p in trainer.weights.named_parameters():
        same = torch.equal(p, getattr(start.weights, name))
        assert same == (name in ("W_enc", "b_enc")), name


def test_a_share_of_the_text_is_all_that_is_used(model):
    text = rows(130)
    plan = plan_of(model, text) | {"layers": [1]}
    c = plan["configurations"]
    plan["configurations"] = {n: c[n] for n in ("2x k4", "2x k4, 0.25 of the text")}
    sweep = training.Sweep(SimpleNamespace(track=lambda items, what: items), model, text, plan)
    taken = {}
    begin = sweep._begin
    sweep._begin = lambda *a: taken.setdefault("trainers", begin(*a))
    sweep.trained()
    few, all_ = (taken["trainers"][n].taken for n in ("2x k4, 0.25 of the text", "2x k4"))
    assert (few, all_) == (2, 8)  # 130 x 39 tokens are 4 batches, twice


def test_held_out_figures_against_plain_hooks(tiny, model, swept):
    run, plan, _ = swept
    held = rows(30, seed=5)
    found = judge.features(run, model, held, plan).set_index(["layer", "name"])
    means = training.baselines(run, plan, model)["mean"]
    for layer, (x, y) in by_hooks(tiny, held).items():
        t = training.transcoders(run, "2x k4", plan, model)[layer]
        pre = torch.relu(x @ t.W_enc.T + t.b_enc)
        kept = pre * torch.zeros_like(pre).scatter(1, pre.topk(4).indices, 1.0)
        error = (kept @ t.W_dec + t.b_dec - y).square().sum(1)
        size = (y - means[layer].b_dec).square().sum(1)
        row, on = found.loc[layer, "2x k4"], kept > 0
        assert row["held_out"] == len(x) == 30 * 39
        expected = {"fvu": error.sum() / size.sum(), "fvu_median": (error / size).median(),
                    "l0": on.sum() / len(x), "dead": (~on.any(0)).float().mean(),
                    "dense": (on.float().mean(0) > 0.1).float().mean()}  # fmt: skip
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
        assert found.loc[layer, "mean"]["fvu"] == pytest.approx(1)
        linear = training.baselines(run, plan, model)["linear"][layer].W_skip
        gained = float(torch.linalg.svdvals(linear)[0])
        assert found.loc[layer, "linear"]["gain"] == pytest.approx(gained, rel=0.02)
        x, y = by_hooks(tiny, rows(100))[layer]
        rms = [float((part - part.mean(0)).square().mean().sqrt()) for part in (x, y)]
        scaled = found.loc[layer, "linear"]["gain_scaled"]
        assert scaled == pytest.approx(gained * rms[0] / rms[1], rel=0.05)


def test_features_are_named_where_they_fire(tiny, model, swept, tmp_path):
    """Features planted by least squares: feature i fires on token i."""
    run, plan, text = swept
    x = by_hooks(tiny, text)[0][0]
    ids = torch.tensor([row.ids[1:] for row in text]).flatten()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    wanted = (ids[:, None] == torch.arange(32)).float()
    fitted = torch.linalg.lstsq(ones, wanted).solution.T
    state = {"0.W_enc": fitted[:, :-1], "0.b_enc": fitted[:, -1] - 0.2,
             "0.W_dec": torch.eye(32), "0.b_dec": torch.zeros(32)}  # fmt: skip
    files.write(tmp_path / "trained" / training.file("1x k2"), state)
    here = plan | {"layers": [0], "configurations": {"1x k2": plan["configurations"]["1x k2"]}}
    there = SimpleNamespace(folder=tmp_path, track=run.track)
    [found] = judge.labels(there, model, text, rows(60, seed=9), here, 2400).to_dict("records")
    assert found["value"] > 0.8 and found["clear"] > 0.7 and found["labelled"] > 0.4
    assert 0.4 < found["shuffled"] < 0.6


def test_costs_of_replacing_pilot_layers_and_shares_of_nothing(model, swept):
    run, plan, _ = swept
    held = rows(14, seed=6)
    replaced = judge.conditions(run, model, plan)
    frame = judge.judge(model, replaced, held)
    counted = judge.features(run, model, held, plan)
    names = counted[["layer", "name"]].drop_duplicates()
    named = names.assign(value=0.7, low=0.6, high=0.8, n=9, shuffled=0.5, labelled=0.4, clear=0.3)
    table = tables.measured(plan, frame, counted, named)
    assert len(table) == 2 * (3 + 3)
    joint = tables.together(plan, frame, table).set_index("name")
    own = {n: {0: by[0], 2: by[2]} for n, by in judge.everything(run, model, plan).items()}
    direct = judge.faithfulness(model, held, {"both": own["2x k4"]})
    direct = direct[direct["condition"] == "both"]
    expected = direct.groupby("doc")[["kl", "tokens"]].sum().sum()
    assert joint.loc["2x k4", "kl"] == pytest.approx(expected["kl"] / expected["tokens"], rel=1e-4)
    free = frame.copy()  # where zeroing costs nothing, nothing can be recovered
    free.loc[free["condition"] == "0: zero", "ce"] = free[free["condition"] == "original"][
        "ce"
    ].to_numpy()
    row = tables.measured(plan, free, counted, named).set_index(["layer", "name"]).loc[0, "2x k4"]
    assert np.isnan(row["recovered_zero"]) and row["recovered_zero_n"] == 0
    frame = tables.overall(plan, table, joint.reset_index())
    chosen = tables.choose(plan, frame)
    summary = tables.summarise(plan, table, joint.reset_index(), frame, chosen, named)
    assert chosen["name"] in ("2x k4", "1x k2") and summary["chosen"] == chosen["name"]


def overall(*lines: tuple) -> pd.DataFrame:
    columns = ["name", "features", "k", "lr", "joint_kl", "dead"]
    frame = pd.DataFrame(lines, columns=columns).assign(encoder="trained", skip="none", share=1.0)
    return frame.assign(kl_below_mean=1 - frame["joint_kl"], fvu=frame["joint_kl"])


def test_the_choice_is_the_sparsest_that_costs_little_more():
    plan = {"layers": [1], "d_model": 10, "centre": "2x k4",
            "configurations": {"2x k4": {"expansion": 2, "k": 4, "lr": 0.003}}}  # fmt: skip
    frame = overall(
        ("4x k8", 40, 8, 0.003, 0.100, 0.0),  # the best: 0.125 is still good
        ("2x k4", 20, 4, 0.003, 0.110, 0.0),
        ("2x k4, lr 0.001", 20, 4, 0.001, 0.05, 0.0),  # not a measure for others
        ("1x k4", 10, 4, 0.003, 0.124, 0.0),  # as sparse, and smaller
        ("1x k2", 10, 2, 0.003, 0.126, 0.0),  # not good enough
        ("4x k2", 40, 2, 0.003, 0.101, 0.3),  # too many dead
    )
    found = tables.choose(plan, frame)
    assert (found["name"], found["expansion"], found["k"], found["lr"]) == ("1x k4", 1, 4, 0.001)
    assert found["skip"] == "none" and "1x k4" in found["why"] and "4x k8" in found["why"]
    assert "the end of those tried" in found["why"]
    dead = tables.choose(plan, frame.assign(dead=0.5))
    assert dead["name"] == "4x k2" and "(none has at most 10 % dead features)" in dead["why"]
    smaller = tables.choose(plan, frame[frame["name"] != "1x k4"])
    assert smaller["name"] == "2x k4, lr 0.001"  # trained at the rate that is chosen
    skip = frame.assign(skip=["ridge", "none", "none", "none", "none", "none"])
    assert tables.choose(plan, skip)["name"] == "1x k2"  # nearly as good as 2x k4


def test_the_frontier_by_hand():
    frame = overall(
        ("a", 10, 2, 0.003, 0.5, 0.0), ("b", 20, 2, 0.003, 0.4, 0.0),
        ("c", 20, 4, 0.003, 0.45, 0.0), ("d", 10, 4, 0.003, 0.3, 0.0),
    )  # fmt: skip
    assert tables.frontier(frame, "joint_kl") == ["a", "b", "d"]
    assert tables.frontier(frame[frame["name"] != "d"], "joint_kl") == ["a", "b"]
