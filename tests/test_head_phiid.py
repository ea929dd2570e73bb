"""Experiment 005: its prompts, its pairs and tables on planted answers, and a whole tiny run."""

import json
import sys

import numpy as np
import pytest
import torch
from toys import code_and_line

from lens_utils import phiid, profiles, prompts, provenance, series
from lens_utils.__main__ import load
from lens_utils.console import guarded
from lens_utils.errors import BadInput
from lens_utils.experiment import Results, execute
from lens_utils.phiid_lattice import ATOMS

FOLDER = provenance.EXPERIMENTS / "005_head_phiid"
RUN = load(FOLDER)
import head_pairs as pair  # noqa: E402  (beside run.py, on the path once it is loaded)
import head_tables as table  # noqa: E402
import head_texts as text  # noqa: E402

ASKED = prompts.load(str(FOLDER / "run.py"))
FAMILIES = [p.family for p in ASKED]
TEMPLATED = ("grammar", "speech")


def quiet(items, what):
    return items


# The prompts


def test_sixty_prompts_in_six_kinds_every_one_of_another_type():
    kinds = list(dict.fromkeys(FAMILIES))
    assert len(kinds) == 6 and [kind for kind in kinds for _ in range(10)] == FAMILIES
    for kind in kinds:
        assert len({p.template for p in ASKED if p.family == kind}) == 10
    for p in ASKED:
        assert bool(p.answer) == (p.family not in ("creative", "social")), p.id
        assert p.text[-1] in ".?" and (p.family != "number" or p.text[-1] == "?")


def test_no_two_prompts_are_nearly_the_same():
    def words(p):
        return set(p.text.lower().partition(": ")[2].split() or p.text.lower().split())

    for i, one in enumerate(ASKED):
        for other in ASKED[i + 1 :]:
            a, b = words(one), words(other)
            assert len(a & b) / len(a | b) < 0.6, (one.id, other.id)
    for kind in TEMPLATED:
        assert len({p.text.partition(": ")[0] for p in ASKED if p.family == kind}) == 1


def test_categories_are_of_like_length(smol):
    lengths = np.array([len(smol.encode(p.text, bos=False)) for p in ASKED]).reshape(6, 10)
    assert lengths.min() >= 10 and lengths.max() <= 30
    assert np.abs(lengths.mean(1) / lengths.mean() - 1).max() < 0.2


def test_shuffled_prompts_have_the_same_words():
    for p in ASKED:
        mixed = prompts.shuffled(p.text, 0)
        assert mixed != p.text and sorted(mixed[:-1].split()) == sorted(p.text[:-1].split())


def test_gold_answers_are_found_and_others_are_not():
    for p in ASKED:
        if p.family in ("creative", "social", "speech"):
            assert np.isnan(text.right(p, "anything"))
            continue
        for gold in p.answer.split("|"):
            assert text.right(p, f"Well, {gold}") == 1, p.id
        assert text.right(p, p.text) == 0 or p.family == "sense", p.id
    number = next(p for p in ASKED if p.answer == "28")
    assert text.right(number, "It is 128 or 280") == 0 and text.right(number, "28.") == 1
    assert text.right(next(p for p in ASKED if "evaporat" in p.answer), "It evaporates") == 1


def test_a_quick_run_takes_the_first_of_each_category():
    quick = text.choose(ASKED, RUN.Config(quick=True))
    assert [p.id for p in quick] == [p.id for i, p in enumerate(ASKED) if i % 10 < 2]
    assert len(text.choose(ASKED, RUN.Config())) == 60


# Pairs


@pytest.fixture(scope="module")
def noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 30, generator=generator, dtype=torch.float64).cumsum(-1)


def test_pairs_are_those_of_each_prompt_averaged(noise):
    families = ["a", "a", "a", "b", "b", "b"]
    for measure in ("mmi", "ccs"):
        found = pair.pairs(noise, families, 1, measure, quiet)
        whole = phiid.decompose(noise, redundancy=measure)
        second = phiid.decompose(noise[3:], redundancy=measure)
        alone = phiid.decompose(noise[[4]], redundancy=measure)
        for atom in ("sts", "rtr"):
            np.testing.assert_allclose(found[atom].numpy(), whole[atom], rtol=1e-6)
            np.testing.assert_allclose(
                found[f"{atom}_by_family"][1].numpy(), second[atom], rtol=1e-6
            )
            row = np.nanmean(alone[atom], 1)
            np.testing.assert_allclose(found[f"{atom}_heads"][4].numpy(), row, rtol=1e-12)


def test_the_null_pairs_different_prompts_only(noise):
    """Two heads that are one and the same share everything, but nothing across prompts."""
    twin = noise.clone()
    twin[:, 1] = twin[:, 0] + 1e-3 * noise[:, 2]
    found = pair.pairs(twin, FAMILIES[::10], 1, "mmi", quiet)
    null = pair.pairs(twin, FAMILIES[::10], 1, "surrogate", quiet)
    assert found["rtr"][0, 1] > 3 * null["rtr"][0, 1]
    for n in (6, 12, 60):
        for p in range(n):
            assert pair.partners(p, n) and p not in pair.partners(p, n)


def test_other_atoms_are_kept_when_asked_for(noise):
    found = pair.pairs(noise, ["a"] * 6, 1, "mmi", quiet, pair.asked("all"))
    whole = sum(found[atom].double().numpy() for atom in ATOMS)
    expected = phiid.decompose(noise, asked=ATOMS)
    np.testing.assert_allclose(whole, sum(expected.atoms.values()), rtol=1e-5)
    assert float(found["least"]) == pytest.approx(expected.least, rel=1e-5)
    assert pair.asked("rts, xts") == ["sts", "rtr", "rts", "xts"]


def test_a_series_that_stands_still_is_counted_and_left_out(noise):
    still = noise.clone()
    still[2, 1] = 5.0
    found = pair.pairs(still, ["a"] * 6, 1, "mmi", quiet)
    heads = found["sts_heads"].numpy()
    assert np.isnan(heads[2, 1]) and np.isnan(heads).sum() == 1
    others = phiid.decompose(still[[0, 1, 3, 4, 5]])
    np.testing.assert_allclose(found["sts"][0, 1], others["sts"][0, 1], rtol=1e-6)
    every = {("own", m): pair.pairs(still, ["a"] * 6, 1, m, quiet) for m in ("mmi", "surrogate")}
    described = pair.describe({"own": still}, every, 1).iloc[0]
    assert described.flat_series == 1 and described.series == 24


def test_memory_is_that_of_an_autoregressive_series():
    rng, a = np.random.default_rng(0), 0.8
    x = np.zeros((1, 1, 20_000))
    for t in range(1, x.shape[-1]):
        x[..., t] = a * x[..., t - 1] + rng.standard_normal()
    found = pair.memory(x, 1)
    assert found["lag"][0, 0] == pytest.approx(a, abs=0.01)
    assert found["own"][0, 0] == pytest.approx(-0.5 * np.log(1 - a * a), abs=0.02)
    assert pair.memory(x, 3)["lag"][0, 0] == pytest.approx(a**3, abs=0.02)
    assert np.isnan(pair.memory(np.ones((1, 1, 9)), 1)["own"]).all()


def test_treatments_do_not_change_what_they_should_not(noise):
    layer = np.array([0, 1, 2, 2])
    found = pair.treatments(noise, layer, 1, True, quiet).set_index("treatment")
    plain = phiid.decompose(noise)
    assert found.sts["as measured, tau 1"] == pytest.approx(np.nanmean(plain["sts"]))
    sloped = noise + torch.linspace(0, 9, 30)  # a trend that is removed again
    again = pair.treatments(sloped, layer, 1, True, quiet).set_index("treatment")
    kept = "linear trend removed"
    assert again.sts[kept] == pytest.approx(found.sts[kept])
    assert again.sts["as measured, tau 1"] != pytest.approx(found.sts["as measured, tau 1"])


# Tables

LAYER = np.repeat(np.arange(9), 6)


def planted(shape, noisy: float = 0.02, n: int = 60) -> table.Atoms:
    """Synergy that follows a shape over nine layers, in every prompt."""
    rng = np.random.default_rng(1)
    sts = np.asarray(shape, float)[LAYER] + noisy * rng.standard_normal((n, len(LAYER)))
    return table.Atoms(sts, np.zeros_like(sts))


def shape_of(atoms: table.Atoms):
    return table.shapes({("own", "mmi"): atoms}, FAMILIES, LAYER, 100, 0).iloc[0]


def test_a_planted_inverted_u_is_found_and_a_u_is_not():
    up = [0, 0, 0.1, 0.2, 0.3, 0.2, 0.1, 0, 0]
    found = shape_of(planted(up))
    assert found.low > 0.2 and found.low < found.hump < found.high
    assert found.p_shuffled < 0.01 and found.peak_layer == 4 and found.middle > found.early
    found = shape_of(planted(-np.array(up)))
    assert found.high < 0 and found.p_shuffled > 0.9
    rising = shape_of(planted(np.arange(9)))
    assert rising.hump < 0 and rising.peak_layer == 8


def test_without_a_shape_there_is_no_hump():
    found = shape_of(planted(np.zeros(9), noisy=1.0))
    assert found.p_shuffled > 0.05 and abs(found.hump) < 0.25


def test_profiles_of_all_and_of_each_category():
    measured = {("own", "mmi"): planted(np.arange(9))}
    found = table.curves(measured, FAMILIES, LAYER, 50, 0)
    diff = found[(found.score == "value_diff") & (found["mode"] == "percentile")]
    assert set(diff.family) == {"all", *FAMILIES}
    one = diff[diff.family == "all"]
    assert one["mean"].tolist() == pytest.approx(np.arange(9) / 8) and one.n.eq(60).all()
    assert diff[diff.family == "creative"].n.eq(10).all()
    assert ((found.low <= found["mean"]) & (found["mean"] <= found.high)).all()


def test_halves_agree_where_prompts_do():
    measured = {
        ("own", "mmi"): planted(np.arange(9)),
        ("shuffled", "mmi"): planted(np.zeros(9), noisy=1.0),
    }
    found = table.reliability(measured, FAMILIES, 0).set_index(["condition", "score"])
    assert found.loc["own", "value_diff"].spearman > 0.95
    assert abs(found.loc["shuffled", "value_diff"].spearman) < 0.3


def test_agreement_of_a_score_with_its_opposite():
    one = planted(np.arange(9))
    measured = {("own", "mmi"): one, ("own", "ccs"): table.Atoms(-one.sts, one.rtr)}
    found = table.agreement(measured, LAYER).set_index(["one", "other"])
    row = found.loc["own mmi value_diff", "own ccs value_diff"]
    assert row.spearman_heads == pytest.approx(-1) and row.pearson_layers == pytest.approx(-1)


# A whole run


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """lab(*args): the experiment on command-line arguments; its Run."""
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    return lambda *args: execute(RUN.Config, RUN.main, FOLDER / "run.py", list(args))


SMALL = ("--steps", "10", "--per-category", "2")


def test_a_run_with_checkpoints_on_two_tiny_models(lab, tiny, saved, tmp_path):
    """The second checkpoint is the run's own model: its profile is the run's."""
    last = saved("llama")
    first = tmp_path / "step0"
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5).add_(0.1)
    other.save_pretrained(first)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (first / name).write_bytes((last / name).read_bytes())
    run = lab("--model", str(last), *SMALL, "--checkpoints", f"{first},{last}")
    results = Results(run.folder)
    assert results.finished
    scores = results.read("scores.csv")
    assert len(scores) == 12 and scores[["layer", "head"]].equals(results.read("nodes.csv"))
    assert (scores.value_diff == scores.value_diff_mmi).all() and (scores.prompts == 12).all()
    norms = results.read("series_own.safetensors")["norms"]
    expected = phiid.decompose(norms)
    head = np.nanmean([np.nanmean(phiid.decompose(x[None])["sts"], 1) for x in norms], 0)
    np.testing.assert_allclose(scores.sts, head)
    pairs = results.read("pairs_own_mmi.safetensors")
    np.testing.assert_allclose(pairs["sts"].numpy(), expected["sts"], rtol=1e-6)
    # what 007 goes on from
    asked = results.read("asked.json")
    tokens = results.read("series_own.safetensors")["tokens"]
    assert [len(asked), *tokens.shape] == [12, 12, 10]
    whole = [[*a["ids"], *t[:-1]] for a, t in zip(asked, tokens.tolist(), strict=True)]
    torch.testing.assert_close(series.head_norms(run.model(), whole, 10), norms)
    replayed = results.read("series_replayed.safetensors")
    assert torch.equal(replayed["tokens"], tokens) and not torch.equal(replayed["norms"], norms)
    # the series of checkpoints
    identities = results.read("checkpoints.json")
    assert [Results(run.folder).model["sha256"]] == [identities[1]["sha256"]]
    assert identities[0]["sha256"] != identities[1]["sha256"]
    curve = results.read("checkpoints.csv")
    profile = results.read("profiles.csv")
    mine = profile[(profile.condition == "own") & (profile.measure == "mmi")
                   & (profile.score == "value_diff") & (profile.family == "all")
                   & (profile["mode"] == "raw")]  # fmt: skip
    for how in ("written", "replayed"):
        one = curve[(curve["mode"] == "raw") & (curve.text == how)]
        np.testing.assert_allclose(one[one.order == 1]["mean"], mine["mean"], atol=1e-6)
        assert np.abs(one[one.order == 0]["mean"].to_numpy() - mine["mean"].to_numpy()).max() > 0.02


def test_chat_and_sampled_conditions_where_there_are_any(lab, saved, make_tokenizer):
    folder = saved("qwen3")
    make_tokenizer(chat=True).save_pretrained(folder)
    run = lab("--model", str(folder), "--steps", "8", "--per-category", "1")
    assert Results(run.folder).read("conditions.json") == [
        "own", "shuffled", "sampled", "chat", "untrained", "replayed"
    ]  # fmt: skip
    texts = Results(run.folder).read("texts.csv")
    assert texts.condition.value_counts().eq(6).all() and "replayed" not in set(texts.condition)


def test_experts_of_a_mixture_can_stand_for_heads(lab, tokenizer, tmp_path):
    from test_series import MIXTURES
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "mixture"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES["qwen3-moe"]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = lab("--model", str(folder), "--nodes", "experts", *SMALL)
    scores = Results(run.folder).read("scores.csv")
    assert len(scores) == 24 and scores.groupby("layer").size().tolist() == [8, 8, 8]
    # an expert that is never chosen does not vary: counted, and no score is made up for it
    assert scores.prompts.min() < 12 and (scores.value_diff.isna() == (scores.prompts == 0)).all()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--steps", "5"), "--steps 5 is too short for --tau 1: at least 6"),
        (("--tau", "0"), "--tau 0: at least 1"),
        (("--steps", "12", "--tau", "8"), "at least 13"),
        (("--atoms", "sts,stz"), "there is no atom 'stz'"),
        (("--nodes", "experts", *SMALL), "has no experts"),
        (("--steps", "60", "--per-category", "1"), "more than the context"),
        (("--checkpoints", "smol@step1"), "smol is one fixed file"),
        (("--template", "chat", *SMALL), "base model without a chat template"),
    ],
)
def test_what_cannot_be_is_one_line(args, said, lab, saved, capsys):
    folder = str(saved("llama"))
    code, line = code_and_line(lambda: lab("--model", folder, *args), capsys)
    assert code == 2 and said in line


def test_checkpoints_that_are_not_here_are_all_named(lab, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = ("--model", "pythia-1b", "--checkpoints", "step1,step512")
    code, line = code_and_line(lambda: lab(*args), capsys)
    assert code == 2 and "2 checkpoints are not on this machine" in line
    assert line.endswith("./lab fetch pythia-1b@step1 pythia-1b@step512")


def test_a_checkpoint_of_another_shape_is_refused(lab, saved, tiny, tokenizer, tmp_path, capsys):
    config = tiny("llama").config
    config.num_hidden_layers, config.layer_types = 2, None
    small = type(tiny("llama"))(config)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    args = ("--model", str(saved("llama")), *SMALL, "--checkpoints", str(tmp_path / "small"))
    code = guarded(lambda: lab(*args))
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "has 8 heads" in line and "has 12" in line


def test_scores_that_do_not_exist_are_refused():
    with pytest.raises(BadInput, match="no score 'synergy'"):
        profiles.head_scores(np.zeros(3), np.zeros(3), "synergy")


def test_the_prompts_file_is_versioned():
    held = json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8"))
    assert "Version" in held["about"] and str(FOLDER) in sys.path
