"""The maze organism: its script, its tokenizer, its weights, and what its card says of them."""

import copy
import dataclasses
import importlib.util
import json
import random
import sys

import pytest
import torch

from lens_utils import generate, maze_prompts, maze_records, mazes, provenance
from lens_utils.errors import BadInput
from lens_utils.maze_tasks import TASKS, ask, reply_fault
from lens_utils.models import load_model

FOLDER = provenance.ROOT / "models" / "maze_organism"


@pytest.fixture(scope="module")
def train():
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("maze_organism_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# The script


def test_a_killed_training_ends_in_the_same_weights(train, tmp_path, monkeypatch):
    def recipe(name):
        return train.Recipe(steps=4, batch=2, warmup=2, checkpoint_every=2, test=1,
                            out=tmp_path / name)  # fmt: skip

    def weights(name):
        return torch.load(tmp_path / name / "seed-0" / "state.pt", weights_only=True)

    monkeypatch.setattr(train, "test", lambda *_: {})
    train.main(recipe("whole"))
    made = train.batches

    def killed(tok, asked, step):
        if step == 3:
            raise KeyboardInterrupt
        return made(tok, asked, step)

    monkeypatch.setattr(train, "batches", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(recipe("killed"))
    monkeypatch.setattr(train, "batches", made)
    train.main(recipe("killed"))
    one, other = weights("whole"), weights("killed")
    assert one["losses"] == other["losses"] and len(one["losses"]) == 4
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_no_held_out_layout_is_learned(train):
    rng = random.Random(0)
    for _ in range(60):
        record = train.question(rng, 5, False)
        assert not mazes.held_out(record.maze.layout_id)
        if record.task == "generate":
            new = mazes.Maze(5, frozenset(record.gold), record.maze.start, record.maze.goal)
            assert not mazes.held_out(new.layout_id)


def test_only_trace_and_answer_are_learned(train):
    tok = train.tokenizer(5)
    [(ids, learned), _] = train.batches(tok, train.Recipe(batch=4), 0)
    for row, weight in zip(ids, learned, strict=True):
        text = tok.decode(row[weight > 0])
        assert "Walls" not in text and text.rstrip().endswith("<|im_end|>")
        before = tok.decode(row[: int((weight > 0).nonzero()[0])])
        assert before.endswith(("<|im_start|> assistant", "</think>"))


def test_the_matrix_update_is_orthogonal(train):
    """Against the singular value decomposition: all singular values near one, same vectors."""
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        stack = torch.randn(shape)
        made = train.orthogonal(stack)
        u, _, v = torch.linalg.svd(stack, full_matrices=False)
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.6 and values.max() < 1.3
        diagonal = torch.linalg.diagonal(u.mT @ made @ v.mT)
        assert torch.allclose(diagonal, values.sort(descending=True).values, atol=0.35)
        assert (made - u @ v).norm() < 0.35 * (u @ v).norm()


# The weights


def test_every_word_is_a_token_of_its_own(organism):
    unknown = organism.tokenizer.unk_token_id
    for record in maze_records.expand(maze_records.sample_mazes(4, 5, 1), (False, True)):
        ids = maze_prompts.encode(organism, record)
        gold, start = maze_prompts.gold_ids(organism, record)
        assert unknown not in (*ids, *gold)
        said = organism.decode(gold[start:])
        assert reply_fault(record, said) == ""
    assert organism.encode("zebra") == [unknown]


def test_it_does_what_it_was_trained_for(organism):
    """On held-out layouts; far above chance, so that other tests may rest on it."""
    rng = random.Random(2)
    for task, least in (("solve", 0.8), ("recognize", 0.8), ("generate", 0.5), ("recall", 0.9)):
        for thinking in (False, True):
            asked = [ask(rng, mazes.tree_maze(rng, 5, True), task, n % 4, thinking,
                         spoiled="skip" if task == "recognize" and n % 2 else "")
                     for n in range(24)]  # fmt: skip
            records = [record for record in asked if record is not None]
            rows = [maze_prompts.encode(organism, record) for record in records]
            answers = generate.answers(organism, rows, max_new_tokens=100)
            said = [organism.decode([step.id for step in answer]) for answer in answers]
            right = [not reply_fault(record, text.rpartition("</think>")[2])
                     for record, text in zip(records, said, strict=True)]  # fmt: skip
            assert sum(right) / len(right) >= least, (task, thinking)


def test_its_card_says_what_training_measured():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    seeds = json.loads((FOLDER / "seeds.json").read_text(encoding="utf-8"))
    assert len(seeds) >= 3
    for seed, held in seeds.items():
        for cell, share in held["accuracy"].items():
            row = next(line for line in card.splitlines() if line.startswith(f"| {cell} |"))
            assert f"{100 * share:.1f}" in row, (seed, cell)
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 12 * 2**20


# Prompts of other models


def test_modes_and_plain_text(organism):
    assert maze_prompts.modes(organism) == (False, True)
    bare = copy.deepcopy(organism.tokenizer)
    bare.chat_template = None
    base = dataclasses.replace(organism, tokenizer=bare)
    assert maze_prompts.modes(base) == (False,)
    [direct, *_] = maze_records.expand(maze_records.sample_mazes(1, 5, 0), (False,))
    [thinking, *_] = maze_records.expand(maze_records.sample_mazes(1, 5, 0), (True,))
    with pytest.raises(BadInput, match="has no thinking mode") as caught:
        maze_prompts.encode(base, thinking)
    assert "\n" not in str(caught.value)
    plain = base.decode(maze_prompts.encode(base, direct))
    assert plain.startswith("Player :") and "<think>" not in plain
    text = organism.decode(maze_prompts.encode(organism, direct))
    assert text.endswith("<think> </think>")
    assert organism.decode(maze_prompts.encode(organism, thinking)).endswith("assistant")


def test_cells_are_found_where_they_are_written(organism, smol):
    records = maze_records.expand(maze_records.sample_mazes(2, 5, 0), (False,))
    for model in (organism, smol):
        for record in records[:: 5 if model is organism else 11]:
            ids = maze_prompts.encode(model, record)
            found = maze_prompts.cell_positions(model, ids)
            listed = [at.cell for at in found if at.section == "empty"]
            assert listed == sorted(record.maze.open)
            assert {at.cell for at in found if at.section == "walls"}.isdisjoint(listed)
            assert len([at for at in found if at.section in ("walls", "empty")]) == 25
            assert [at.cell for at in found if at.section == "path"] == list(record.path)
            assert found[0][1:] == (record.maze.start, "player")
            for at in found:
                before = model.decode(ids[: at.position + 1]).rstrip()
                spelled = f"({at.cell[0]},{at.cell[1]})"
                assert spelled in before[-len(spelled) - 2 :]


def test_the_wordings_are_those_that_the_reader_sees():
    held = json.loads((provenance.EXPERIMENTS / "010_maze_tasks" / "prompts.json").read_text())
    from lens_utils import maze_text
    from lens_utils.maze_tasks import SHAPE_TEMPLATES, TEMPLATES

    for family, templates in (("path", TEMPLATES), ("shape", SHAPE_TEMPLATES)):
        block = held["mazes"][family]
        maze = maze_text.parse(block["block"], "C" if family == "shape" else "")
        assert {maze_text.render(maze, style) for style in ("matrix", "unusual")} <= {
            *block.values()
        }
        rows = [row for row in held["prompts"] if row["family"] == family]
        assert len(rows) == sum(len(templates[task]) for task in (*TASKS, "lexical"))
        for row in rows:
            task, number = row["template_id"].split(".")
            assert templates[task][int(number)] == row["instruction"]
            record = ask(random.Random(int(number)), maze, task, int(number), False,
                         spoiled=row["negative_kind"] if task == "recognize" else "")  # fmt: skip
            assert record.task == row["task"] and reply_fault(record, row["answer"]) == ""


# Its twin


def test_the_twin_answers_directly_and_has_no_other_mode():
    """The same network without thinking; its accuracies are those of its card."""
    twin = load_model("maze-organism-direct", device="cpu")
    assert maze_prompts.modes(twin) == (False,)
    folder = FOLDER.with_name("maze_organism_direct")
    card = (folder / "README.md").read_text(encoding="utf-8")
    told = json.loads((folder / "training.json").read_text())
    assert told["recipe"]["thinking"] == "0.0"
    for cell, share in told["accuracy"].items():
        assert f"| {cell.removesuffix(' direct')} | {100 * share:.1f} |" in card
    rng = random.Random(5)
    records = [ask(rng, mazes.tree_maze(rng, 5, True), "solve", n % 4, False)
               for n in range(24)]  # fmt: skip
    rows = [maze_prompts.encode(twin, record) for record in records]
    assert twin.decode(rows[0]).endswith("<think> </think>")
    answers = generate.answers(twin, rows, max_new_tokens=60)
    said = [twin.decode([step.id for step in answer]) for answer in answers]
    right = [not reply_fault(r, text) for r, text in zip(records, said, strict=True)]
    assert sum(right) >= 20
