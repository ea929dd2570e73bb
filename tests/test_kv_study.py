"""Experiment 022: its data, its tables by another way, its verdicts, and a whole tiny run."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS
from kv_models import of
from toys import code_and_line

from lens_utils import files, kv_learn, kv_masks, kv_scores, provenance
from lens_utils.__main__ import load
from lens_utils.errors import BadInput
from lens_utils.experiment import Results, execute
from lens_utils.kv_units import make_units

FOLDER = provenance.EXPERIMENTS / "022_kv_circuits"
RUN = load(FOLDER)
import kv_examples as data  # noqa: E402  (beside run.py, on the path once it is loaded)
import kv_results as results  # noqa: E402
import kv_study  # noqa: E402

SIZES = {"fit": 40, "validation": 12, "test": 12}


class Speller:
    """Stands for a model: a token for each word or mark, numbered as they first come."""

    name, bos, n_ctx = "speller", (0,), 64
    bridge = SimpleNamespace(cfg=SimpleNamespace(d_vocab=400))

    def __init__(self):
        self.words = {"<s>": 0}

    def encode(self, text, longest=None):
        cut = text.replace(".", " .").replace(",", " ,").split()
        return [0, *(self.words.setdefault(word, len(self.words)) for word in cut)][:longest]

    def decode(self, ids):
        names = list(self.words)
        return " ".join(names[i] for i in ids)


# Data


@pytest.mark.parametrize("name", ["ioi", "agreement", "arithmetic"])
def test_splits_of_tasks_share_no_content(name):
    """The pair of names, the noun or the sum that decides the answer is of one split only."""
    held = {split: set() for split in data.SPLITS}
    for item in data.task_items(name):
        held[data.split_of(item.content)].add(item.content)
        assert item.answer != item.foil
    for one, other in itertools.combinations(held.values(), 2):
        assert not one & other
    assert all(len(found) >= 2 for found in held.values())


@pytest.mark.parametrize("name", ["ioi", "agreement", "arithmetic"])
def test_only_the_answer_counts_and_it_is_right(name):
    model = Speller()
    found = data.of_task(model, name, SIZES, seed=0).splits
    prompts = {}
    for split, rows in found.items():
        assert rows.counted.sum(1).tolist() == [1] * len(rows)
        prompts[split] = set()
        for row in range(len(rows)):
            at = int(rows.counted[row].nonzero())
            text = model.decode(rows.ids[row, 1 : at + 1].tolist())
            answer, foil = (model.decode([int(x[row])]) for x in (rows.target[:, at], rows.foil))
            prompts[split].add(text)
            assert int(rows.target[row].sum()) == int(rows.target[row, at])
            if name == "ioi":  # the name that came once
                times = {word: text.split().count(word) for word in (answer, foil)}
                assert times == {answer: 1, foil: 2}, text
            elif name == "agreement":
                nouns = dict(map(tuple, data.WORDS["agreement"]["nouns"]))
                assert answer == ("is" if text.split()[1] in nouns else "are"), text
                assert {answer, foil} == {"is", "are"}
            else:
                a, _, b, _ = text.split()[-4:]
                assert int(answer) == int(a) + int(b) != int(foil)
    for one, other in itertools.combinations(prompts.values(), 2):
        assert not one & other


def test_induction_counts_what_the_first_time_has_shown():
    found = data.of_task(Speller(), "induction", SIZES, seed=0).splits
    for rows in found.values():
        length = data.WORDS["induction"]["length"]
        assert rows.ids.shape[1] == 2 * length and (rows.ids[:, 0] == 0).all()
        assert torch.equal(rows.ids[:, 1 : length + 1][:, 1:], rows.target[:, length + 1 :])
        assert rows.counted.sum(1).unique().tolist() == [length - 1]
        assert not rows.counted[:, : length + 1].any()
        assert torch.equal(rows.target[:, :-1], rows.ids[:, 1:])
    once = [{tuple(r) for r in rows.ids.tolist()} for rows in found.values()]
    assert not once[0] & once[1] and not once[0] & once[2] and not once[1] & once[2]


def test_a_tokenizer_without_the_answers_is_one_line(tiny, tokenizer, capsys):
    """Digits are all unknown here: right and wrong are the same token."""
    from lens_utils.models import wrap
    from lens_utils.registry import ModelSpec

    model = wrap(tiny("llama"), tokenizer, ModelSpec("tiny", "tiny"))
    code, line = code_and_line(lambda: data.of_task(model, "arithmetic", SIZES, 0), capsys)
    assert code and "another task" in line


def documents(n=90, words=30):
    rng = np.random.default_rng(0)
    return ["".join(f" {w}" for w in rng.choice(WORDS.split(), words)) for _ in range(n)]


def test_documents_lie_in_one_split_and_all_but_the_first_prediction_counts(tmp_path):
    for number, text in enumerate(documents()):
        (tmp_path / f"{number}.txt").write_text(text)
    model = Speller()
    found = data.of_documents(model, str(tmp_path), SIZES, 12, seed=0)
    openings = []
    for rows in found.splits.values():
        assert rows.ids.shape[1] == 12 and torch.equal(rows.ids[:, 1:], rows.target[:, :-1])
        assert (~rows.counted).nonzero()[:, 1].eq(0).all() and not rows.counted[:, 0].any()
        openings.append({model.decode(ids[1:]) for ids in rows.ids.tolist()})
    assert not openings[0] & openings[1] and not openings[1] & openings[2]
    test = found.splits["test"]
    whole = torch.cat([test.ids, test.target[:, -1:]], dim=1).tolist()
    text = [model.decode(ids[2:]) for ids in whole]
    per_token = sum(len(t.encode()) for t in text) / sum(len(t.split()) for t in text)
    assert found.bytes_per_token == pytest.approx(per_token)
    with pytest.raises(BadInput, match="--length"):
        data.of_documents(model, str(tmp_path), SIZES, 60, seed=0)


def test_partners_are_others_with_predictions_at_the_same_places():
    counted = torch.zeros(7, 5, dtype=torch.bool)
    counted[[0, 2, 5], 3], counted[[1, 4], 2], counted[[3, 6], 4] = True, True, True
    ids = torch.zeros(7, 5, dtype=torch.long)
    partner = kv_study.partners(kv_masks.Examples(ids, ids, counted, torch.arange(7)))
    assert sorted(partner.tolist()) == list(range(7))
    assert all(partner[i] != i and torch.equal(counted[partner[i]], counted[i]) for i in range(7))


# Settings


@pytest.mark.parametrize(("setting", "said"), [
    ({"target_sparsity": 1.0}, "between 0 and 1"), ({"target_sparsity": 0.0}, "between 0 and 1"),
    ({"sparsities": "0.5,1.2"}, "1.2"), ({"sparsities": "half"}, "0.5,0.8"),
])  # fmt: skip
def test_sparsities_that_are_none_are_one_line(setting, said, capsys):
    code, line = code_and_line(lambda: RUN.Config(**setting).sweep, capsys)
    assert code and said in line


def test_the_sweep_has_the_target_and_a_run_has_data():
    assert RUN.Config(sparsities="0.95,0.5", target_sparsity=0.8).sweep == [0.5, 0.8, 0.95]
    assert RUN.Config(quick=True).sweep == [0.8]
    assert RUN.Config(quick=True).names == ["docstrings", "agreement"]
    with pytest.raises(BadInput, match="--datasets"):
        _ = RUN.Config(datasets="").names


# Tables


def job(dataset, seed=0, sparsity=0.8):
    return kv_study.Job(dataset, sparsity, seed, "fisher")


def random_masks(n, units, kept, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, units.total, generator=generator)
    return torch.stack([kv_scores.top(row, kept) for row in order])


def test_overlap_is_that_of_sets_and_chance_that_of_random_masks():
    units = make_units(6, 3, torch.arange(8) ^ 4)
    jobs = [job("a"), job("a", 1), job("b"), job("b", 1), job("a", sparsity=0.5)]
    masks = torch.cat([random_masks(4, units, 43), random_masks(1, units, 108)])
    found = results.overlaps(units, jobs, {"mask": masks})
    held = [set(m.nonzero().flatten().tolist()) for m in masks]
    assert found[["between", "one", "other"]].to_numpy().tolist() == [
        ["seeds", "a", "a"], ["data sets", "a", "b"], ["seeds", "b", "b"]
    ]  # fmt: skip
    for (one, other), row in zip([(0, 1), (0, 2), (2, 3)], found.itertuples(), strict=True):
        want = len(held[one] & held[other]) / len(held[one] | held[other])
        assert row.jaccard == pytest.approx(want)
    many = random_masks(2000, units, 43, seed=1).bool().view(2, 1000, -1)
    shared = ((many[0] & many[1]).sum(1) / (many[0] | many[1]).sum(1)).mean()
    assert found.expected.unique() == pytest.approx([float(shared)], abs=0.005)


def test_layers_count_what_is_kept():
    units = make_units(3, 2, torch.arange(8) ^ 4)
    masks, scores = random_masks(1, units, 14), torch.randn(1, units.total)
    found = results.layers(units, [job("a")], {"mask": masks, "scores": scores})
    k, v = units.spread(masks[0])
    for row in found.itertuples():  # a pair is two channels
        want = float(k[row.layer].sum() / 2) if row.part == "K" else float(v[row.layer].sum())
        assert row.kept == want and row.total == {"K": 8, "V": 16}[row.part]
        assert row.sparsity == pytest.approx(1 - want / row.total)
    assert found.kept.sum() == 14
    whole = (found.mean_importance * found.total).sum() / units.total
    assert whole == pytest.approx(1, abs=1e-5)


def record(kl=1.0, random=3.0, low=0.2, model=0.6, shuffled=0.1, untrained=0.0):
    """What the verdict reads, of a mask that passes."""
    shares = {"model": model, "shuffled": shuffled, "random_weights": untrained}
    return {
        "n_kept": 14, "n_units": 72, "full": {"ce": 2.0}, "empty": {"ce": 5.0},
        "mean": {"kl": {"value": kl}, "faithfulness": {"value": 0.66}},
        "baselines": {"random": {"kl": {"value": random, "sd": 0.1}}},
        "against_ranking": {"low": low},
        "controls": {k: {"share": s, "random_share": 0.0} for k, s in shares.items()},
    }  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), [
    ({"kl": 2.8}, "random masks by three"), ({"low": 0.0}, "the ranking it began with"),
    ({"low": -0.1}, "the ranking it began with"), ({"shuffled": 0.6}, "nonsense targets"),
    ({"untrained": 0.9}, "untrained weights"),
])  # fmt: skip
def test_the_verdict_says_no_evidence_where_there_is_none(changed, said):
    good = results.verdict(record())
    assert good.startswith("14 of 72 units keep 66 %") and "no evidence" not in good
    bad = results.verdict(record(**changed))
    assert bad.startswith("no evidence of a sparse circuit at this size") and said in bad
    assert bad.count(";") == 0


def test_masks_as_they_are_shipped_have_both_channels_of_a_pair():
    units = make_units(2, 2, torch.arange(8) ^ 4)
    mask, scores = random_masks(1, units, 20)[0], torch.randn(units.total)
    held = results.final_masks(units, mask, scores)
    assert sorted(held)[0] == "blocks.0.attn.k_mask" and len(held) == 8
    assert all(x.shape == (2, 8) for x in held.values())
    k = torch.stack([held[f"blocks.{n}.attn.k_mask"] for n in range(2)])
    assert torch.equal(k[..., :4], k[..., 4:])
    v = sum(held[f"blocks.{n}.attn.v_mask"].sum() for n in range(2))
    assert k.sum() / 2 + v == 20


# A whole run


@pytest.fixture(scope="module")
def finished(tiny, tokenizer, tmp_path_factory):
    """Induction and agreement on a tiny model, small but not --quick."""
    folder = tmp_path_factory.mktemp("kv")
    tiny("llama").save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_OUTPUTS", str(folder / "outputs"))
        for name, size in (("fit", 4), ("validation", 4), ("test", 4)):
            patch.setitem(SIZES, name, size)
        patch.setattr("kv_study.Study.sizes", property(lambda self: dict(SIZES)))
        patch.setitem(data.WORDS["induction"], "length", 6)
        patch.setattr("lens_utils.stats.RESAMPLES", 200)
        patch.setattr("kv_study.RANDOM", 3)
        args = ["--model", str(folder / "m"), "--datasets", "induction,agreement", "--steps", "2",
                "--seeds", "2", "--sparsities", "0.5"]  # fmt: skip
        done = execute(RUN.Config, RUN.main, FOLDER / "run.py", args)
    return Results(done.folder)


def test_the_frontier_is_what_the_rows_say(finished):
    assert finished.finished
    rows = pd.concat([finished.read("baselines.parquet"), finished.read("masks.parquet")])
    rows = rows[rows.split.ne("validation")]
    about = json.loads((finished.folder / "examples.json").read_text())
    table = finished.read("frontier.csv")
    per_size = {"learned": 1, "complement": 1, "random": 3}
    for dataset, sparsity in itertools.product(("induction", "agreement"), (0.5, 0.8)):
        at = table[(table.dataset == dataset) & (table.sparsity == sparsity)]
        want = dict.fromkeys(kv_scores.RANKINGS, 1) | per_size
        for kind in ("learned", "complement"):
            want[kind] = 2 if sparsity == 0.8 else 1
        assert at.ranking.value_counts().to_dict() == want
    for row in table.itertuples():
        of = rows[(rows.dataset == row.dataset) & (rows.sparsity == row.sparsity)
                  & (rows.ranking == row.ranking) & (rows.seed == row.seed)]  # fmt: skip
        tokens, told = of.tokens.sum(), about[row.dataset]
        ce = of.ce.sum() / tokens
        assert row.kl == pytest.approx(of.kl.sum() / tokens)
        assert row.faithfulness == pytest.approx(1 - row.kl / told["empty_kl"])
        assert row.loss_degradation == pytest.approx(100 * (ce / told["ce"] - 1))
        assert row.top1 == pytest.approx(of.agree.sum() / tokens)
        assert row.perplexity == pytest.approx(np.exp(ce))
        assert row.kl_low <= row.kl <= row.kl_high + 1e-9


def test_what_is_reported_is_what_the_tables_say(finished):
    table = finished.read("frontier.csv")
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    summary = json.loads((finished.folder / "summary.json").read_text())
    rows = pd.concat([finished.read("baselines.parquet"), finished.read("masks.parquet")])
    overlap, controls = finished.read("overlap.csv"), finished.read("controls.csv")
    for name, said in metrics.items():
        at = table[(table.dataset == name) & (table.sparsity == 0.8)].set_index("ranking")
        learned, complement = at.loc["learned"], at.loc["complement"]
        for seed in (0, 1):
            held, row = said["per_seed"][seed], learned[learned.seed == seed].iloc[0]
            for key in ("kl", "ce", "faithfulness", "loss_degradation", "top1", "ce_recovered"):
                assert held[key] == pytest.approx(row[key]), key
            other = complement[complement.seed == seed].iloc[0]
            assert held["completeness"] == pytest.approx(1 - other.faithfulness)
            assert held["initial_kl"] == pytest.approx(at.loc[row.initial].kl)
        assert said["mean"]["kl"]["value"] == pytest.approx(learned.kl.mean())
        assert said["mean"]["kl"]["sd"] == pytest.approx(learned.kl.std())
        random = said["baselines"]["random"]["kl"]
        assert random["value"] == pytest.approx(at.loc["random"].kl.mean())
        own = rows[(rows.dataset == name) & (rows.sparsity == 0.8) & rows.split.ne("validation")]
        kl = own.assign(kl=own.kl / own.tokens).groupby(["ranking", "row", "group"]).kl.mean()
        saved = kl[learned.initial.iloc[0]] - kl["learned"]
        by_group = saved.groupby("group").mean().mean()
        assert said["against_ranking"]["value"] == pytest.approx(by_group, abs=1e-9)
        assert summary[f"{name}: saved by learning, nats"]["value"] == pytest.approx(by_group)
        shown = summary[f"{name}: faithfulness, 80 % off"]["value"]
        assert shown == pytest.approx(learned[learned.seed == 0].faithfulness.iloc[0])
        pairs = overlap[(overlap.one == name) & (overlap.between == "seeds")]
        assert said["stability"]["jaccard"] == pytest.approx(pairs.jaccard.mean())
        told = controls[controls.dataset == name].set_index("control")
        assert set(told.index) == {"model", "shuffled", "random_weights"}
        for kind, row in told.iterrows():
            assert said["controls"][kind]["share"] == pytest.approx(
                1 - row.learned_kl / row.empty_kl
            )
        assert said["verdict"] == results.verdict(said)
        assert said["n_kept"] == round(0.2 * said["n_units"]) == 14
    assert "nan" not in json.dumps([metrics, summary]).lower().split()


def test_masks_of_a_run_have_their_sizes_and_begin_where_validation_says(finished):
    learned = files.read(finished.folder / "learned.safetensors")
    sizes = learned["mask"].sum(1).tolist()
    assert sizes == [36, 14, 14] * 2  # two data sets: one seed at 0.5, two at 0.8
    base = finished.read("baselines.parquet")
    held = base[(base.split == "validation") & (base.ranking != "random")]
    kl = held.groupby(["dataset", "sparsity", "ranking"])[["kl", "tokens"]].sum()
    kl = (kl.kl / kl.tokens).unstack("ranking")
    masks = finished.read("masks.parquet")
    for (name, sparsity), rows in masks.groupby(["dataset", "sparsity"]):
        assert set(rows.initial) == {kl.loc[(name, sparsity)].idxmin()}
    history = finished.read("history.csv")
    first = history[history.step == 0].groupby(["dataset", "mask_sparsity"]).val_kl.first()
    assert ((first / kl.min(axis=1) - 1).abs() < 0.1).all()  # means over rows, and over tokens


def test_a_killed_learner_goes_on(finished, tiny, tmp_path, monkeypatch):
    """From the state on disk, to the same mask; nothing of it is left."""
    monkeypatch.setattr("kv_study.Study.sizes", property(lambda self: {"fit": 8, "validation": 4,
                                                                       "test": 4}))  # fmt: skip
    run = SimpleNamespace(folder=tmp_path, model=lambda *a, **k: of(tiny, "llama"))
    monkeypatch.setitem(data.WORDS["induction"], "length", 4)
    cfg = RUN.Config(datasets="induction", steps=26)
    study = kv_study.Study(cfg, run)
    scores = torch.randn(1, len(kv_scores.RANKINGS), study.units.total)
    whole = study.learn(job("induction"), scores)
    write, loss = files.write, kv_learn.Targets.loss
    kept = []

    def interrupted(self, *args):
        if kept and args[0].readout is study.readout and torch.is_grad_enabled():
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr("lens_utils.kv_learn.Targets.loss", interrupted)
    monkeypatch.setattr("lens_utils.files.write", lambda p, s: (kept.append(p), write(p, s)))
    with pytest.raises(KeyboardInterrupt):
        study.learn(job("induction"), scores)
    assert kept[0].exists()
    monkeypatch.undo()
    again = study.learn(job("induction"), scores)
    assert all(torch.equal(again[k].nan_to_num(), whole[k].nan_to_num()) for k in whole)
    assert not list(kept[0].parent.iterdir())


def test_weights_that_know_nothing_are_one_line(finished, tmp_path, monkeypatch, capsys):
    """Random weights lose more than guessing among the tokens does."""
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    ids = np.random.default_rng(0).integers(3, 64, 3000).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    model = finished.manifest["settings"]["model"]
    args = ["--model", model, "--tokens", str(tmp_path / "ids.npy"), "--quick"]
    code, line = code_and_line(
        lambda: execute(RUN.Config, RUN.main, FOLDER / "run.py", args), capsys
    )
    assert code and "weights look random" in line and "4.16" in line
