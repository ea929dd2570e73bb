"""Experiment 009: courses on planted answers, twins without heads, tables side by side."""

import numpy as np
import pandas as pd
import pytest
import torch

from lens_utils import files, provenance
from lens_utils.__main__ import load
from lens_utils.errors import BadInput

FOLDER = provenance.EXPERIMENTS / "009_model_comparison"
RUN = load(FOLDER)
import compare_profiles as course  # noqa: E402  (beside run.py, on the path once it is loaded)
import compare_tables as table  # noqa: E402
import compare_twins as twin  # noqa: E402


def planted(network: str, heights, heads: int = 6, noisy: float = 0.05, seed: int = 0):
    """A network whose synergy has these heights over its layers, in each of 40 prompts."""
    rng = np.random.default_rng(seed)
    layer = np.repeat(np.arange(len(heights)), heads)
    sts = np.asarray(heights, float)[layer] + noisy * rng.standard_normal((40, len(layer)))
    pairs = {"sts_heads": torch.tensor(sts), "rtr_heads": torch.zeros(sts.shape).double()}
    return course.course(network, "mmi", pairs, layer, 0)


UP = np.sin(np.linspace(0.1, np.pi - 0.1, 12))
FEW = np.sin(np.linspace(0.1, np.pi - 0.1, 7))


def test_networks_of_different_depth_with_one_course_are_alike():
    one, other, turned = planted("a", UP), planted("b", FEW, seed=1), planted("c", -UP, seed=2)
    found = course.likeness([one, other, turned], [], 0).set_index(["one", "other"])
    same, reverse = found.loc[("a", "b")], found.loc[("a", "c")]
    assert same.value > 0.95 and same.low > 0.9 and same.p_shuffled < 0.01
    assert reverse.value < -0.95 and reverse.p_shuffled < 0.01
    assert ((found.low <= found.value) & (found.value <= found.high)).all()


def test_unrelated_courses_are_not_alike():
    p = [
        course.likeness(
            [planted("a", UP), planted("b", 0 * UP, noisy=1.0, seed=k)], [], k
        ).p_shuffled[0]
        for k in range(1, 9)
    ]
    assert np.median(p) > 0.1


def test_a_published_course_is_that_of_a_network_with_its_ranks():
    heights = UP + 0.02 * np.arange(12)  # no ties
    ranks = np.argsort(np.argsort(heights)).tolist()
    model = {"model": "P", "layers": 12, "rank_of_layers": ranks}
    one = planted("a", heights, noisy=0.001)
    found = course.likeness([one], [model], 0).iloc[0]
    assert found.value == pytest.approx(1, abs=1e-6) and found.other == "P (published)"


def table_of_005() -> pd.DataFrame:
    """Rows as 005 has them, of which some are about a model's courses."""
    conditions = ("own", "shuffled", "replayed")
    keys = [(c, m, s, f) for c in conditions for m in ("mmi", "surrogate", "ccs")
            for s in ("value_diff", "rank_diff") for f in ("all", "number")]  # fmt: skip
    frame = pd.DataFrame(keys, columns=["condition", "measure", "score", "family"])
    return frame.assign(hump=np.arange(len(frame)) / 100, low=-1.0, high=1.0, n=60,
                        p_shuffled=0.5, peak_layer=3)  # fmt: skip


def test_rows_of_005_are_those_of_a_model_and_its_twin():
    nodes = pd.DataFrame({"layer": np.repeat(np.arange(7), 2), "head": [0, 1] * 7})
    table_ = table_of_005()
    found = course.shapes(table_, nodes, "a")
    named = list(zip(found.network, found.measure, strict=True))
    assert named == [(n, m) for n in ("a", "a, untrained") for m in ("mmi", "ccs")]
    same = table_[(table_.score == "value_diff") & (table_.family == "all")]
    own = same[(same.condition == "own") & (same.measure == "ccs")].hump.iloc[0]
    assert found.value[found.network == "a"].iloc[1] == own
    assert (
        found.peak_depth_pct.eq(50).all() and found.layers.eq(7).all() and found.heads.eq(14).all()
    )


def test_published_courses_stand_beside_those_of_005():
    model = {"model": "P", "layers": 3, "rank_of_layers": [0, 2, 1]}
    rows = pd.DataFrame({"network": "a", "measure": "mmi", "mode": ["raw", "percentile", "minmax"],
                         "depth_pct": 0.0, "mean": 0.1, "low": 0.0, "high": 0.2})  # fmt: skip
    found = course.curves([rows], [model])
    assert found["mode"].tolist() == ["raw", "percentile"] + 3 * ["percentile"]
    published = found[found.network == "P (published)"]
    assert published["mean"].tolist() == [0, 1, 0.5]
    assert published.depth_pct.tolist() == [0, 50, 100]


def test_published_courses_are_permutations_with_a_peak_in_the_middle():
    models = table.published()
    assert len(models) == 4
    for model in models:
        assert sorted(model["rank_of_layers"]) == list(range(model["layers"]))
        peak = np.argmax(model["rank_of_layers"]) / (model["layers"] - 1)
        assert 0.1 < peak < 0.6


# Twins


class OneTwin:
    """A run that has one untrained model."""

    def __init__(self, model) -> None:
        self.held = model

    def model(self, random_init: bool, other: str):
        assert random_init and other == "toy"
        return self.held


@pytest.fixture
def toy(saved):
    from lens_utils.models import load_model

    return load_model(str(saved("llama")), "cpu")


def reading(toy, sts) -> twin.Reading:
    ids = list(range(3, 23))
    return twin.Reading("toy", "t", ids, 8, np.asarray(sts, float), 0 * np.asarray(sts, float))


def test_heads_of_a_twin_go_in_the_order_of_its_score(toy):
    """The divergence of each point is that of the heads which the score names."""
    from lens_utils import divergence, lens

    sts = np.random.default_rng(1).permutation(12)
    found = twin.without_heads(OneTwin(toy), reading(toy, sts), True, 0)
    assert set(found.kind) == {*(table.HIGH, table.LOW), "random"} and len(found) == 4 * 3
    readout = lens.Readout(toy.bridge)
    full = divergence.full(toy, readout, torch.tensor(range(3, 23)), 8)
    for kind, order in ((table.HIGH, np.argsort(-sts)), (table.LOW, np.argsort(sts))):
        rows = found[found.kind == kind].set_index("share").kl
        for share in twin.SHARES:
            heads = order[: max(1, round(share * 12))].tolist()
            sets = divergence.sets(heads, [len(heads)], 3, 4)
            expected = divergence.divergence(toy, readout, full, sets).mean()
            assert rows[share] == pytest.approx(float(expected), rel=1e-4)


def test_readings_are_the_last_text_of_every_category():
    asked = [{"id": f"{f}-{n}", "family": f, "ids": [n, n]} for f in "abc" for n in range(2)]
    tokens = [[10 * k + t for t in range(60)] for k in range(6)]
    pairs = {f"{atom}_heads": torch.ones(6, 4).double() for atom in ("sts", "rtr")}
    found = twin.readings("toy", asked, tokens, pairs, False)
    assert [r.text for r in found] == ["a-1", "b-1", "c-1"]
    assert found[0].ids == [1, 1, *range(10, 10 + twin.STEPS - 1)] and found[0].steps == twin.STEPS
    assert len(twin.readings("toy", asked, tokens, pairs, True)) == 2


# Tables


def points(of_high: float) -> pd.DataFrame:
    """A twin in which the score's order costs so many times what random orders cost."""
    rows = []
    for text in range(5):
        for order, times in ((table.HIGH, of_high), (table.LOW, 1.0), ("random 0", 1.0),
                             ("random 1", 1.0)):  # fmt: skip
            kind = "random" if "random" in order else order
            rows += [{"order": order, "share": share, "kind": kind, "network": "toy, untrained",
                      "text": text, "kl": times * share * (1 + text)}
                     for share in twin.SHARES]  # fmt: skip
    return pd.DataFrame(rows)


def test_areas_of_twins_are_ratios_to_random_orders():
    held = {"curves": {}, "areas": {}}
    found = table.ablation(held, points(3.0), 0)
    area = found[found.what == "area against random"].set_index("kind")
    ratio = area.loc[table.HIGH]
    assert ratio.value == pytest.approx(3) and ratio.low <= 3 <= ratio.high
    assert area.value[table.LOW] == pytest.approx(1)
    kl = found[(found.what == "kl") & (found.kind == table.HIGH)].set_index("share").value
    assert kl[0.25] == pytest.approx(3 * 0.25 * 3)


def test_models_to_compare(tmp_path):
    class There:
        def models_of(self, experiment):
            return ["a", "smol"]

    cfg = RUN.Config()
    assert table.chosen(cfg, There()) == ["smol", "a"]
    assert table.chosen(RUN.Config(models="a"), There()) == ["smol", "a"]
    with pytest.raises(BadInput, match="none of b: ./lab run 005 --model b"):
        table.chosen(RUN.Config(models="a, b"), There())
    assert files.read(FOLDER / "published.json")["about"]
