"""Streamed tokens are those of Hugging Face's own generation, and their numbers the model's."""

import pytest
import torch
from conftest import ARCHS
from transformers import AutoModelForCausalLM

from lens_utils import weights
from lens_utils.errors import BadInput
from lens_utils.generate import answers, continuations, sampler, stream
from lens_utils.models import LoadedModel, wrap
from lens_utils.registry import SMOL, ModelSpec

SPEC = ModelSpec("tiny", "tiny")
IDS = [1, 9, 4, 33, 17, 5, 58, 21, 9, 40]  # longer than the sliding windows
ROWS = [IDS, [7, 8, 40], [50, 3, 3, 12, 6], [60]]
CHAT = [{"role": "user", "content": "Name three colors of the rainbow."}]
BYTES = "naïve 日本 🚀"


def ids_of(steps) -> list[int]:
    return [step.id for step in steps]


def by_hugging_face(hf, ids: list[int], n: int, **settings) -> list[int]:
    out = hf.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=n, do_sample=False, pad_token_id=0, **settings,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def saying(model: LoadedModel, script: list[int]):
    """A context in which the model says exactly these ids: a hook on its output at every step."""
    left = iter(script)

    def force(logits, hook):
        forced = torch.zeros_like(logits)
        forced[..., next(left)] = 30.0
        return forced

    return model.bridge.hooks(fwd_hooks=[("unembed.hook_out", force)])


# The tokens


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_is_hugging_face_greedy(arch, tiny):
    model = wrap(tiny(arch), None, SPEC)
    expected = by_hugging_face(tiny(arch), IDS, 12, eos_token_id=list(model.ends) or None)
    assert ids_of(stream(model, IDS, max_new_tokens=12)) == expected


def test_greedy_is_hugging_face_greedy_on_smol(smol):
    ids = smol.encode_chat(CHAT)
    hf = AutoModelForCausalLM.from_pretrained(weights.locate(SMOL), dtype=torch.float32)
    expected = by_hugging_face(hf, ids, 8, eos_token_id=list(smol.ends))
    assert ids_of(stream(smol, ids, max_new_tokens=8)) == expected


@pytest.mark.parametrize("arch", ["llama", "gemma3", "neox-parallel", "gpt2"])
def test_prompts_run_together_are_answered_as_alone(arch, tiny):
    model = wrap(tiny(arch), None, SPEC)
    together = answers(model, ROWS, max_new_tokens=8)
    for row, found in zip(ROWS, together, strict=True):
        alone = list(stream(model, row, max_new_tokens=8))
        assert ids_of(found) == ids_of(alone)
        assert [s.p for s in found] == pytest.approx([s.p for s in alone], abs=1e-5)
        assert [s.text for s in found] == [s.text for s in alone]


def test_rows_that_end_leave_the_others_alone(tiny):
    model = wrap(tiny("gpt2"), None, SPEC)
    whole = [ids_of(stream(model, row, max_new_tokens=12)) for row in ROWS]
    ends = frozenset({whole[0][2], whole[2][5]})
    short = LoadedModel(**{**vars(model), "ends": ends})
    for row, found in zip(ROWS, answers(short, ROWS, max_new_tokens=12), strict=True):
        expected = whole[ROWS.index(row)]
        at = next((i for i, token in enumerate(expected) if token in ends), len(expected) - 1)
        assert ids_of(found) == expected[: at + 1]
        if expected[at] in ends:
            assert found[-1].text == ""


# The numbers


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_numbers_are_those_of_a_full_forward(arch, temperature, tiny):
    model, plain = wrap(tiny(arch), None, SPEC), tiny(arch)
    steps = list(stream(model, IDS, max_new_tokens=8, temperature=temperature, top_p=0.7))
    whole = torch.tensor([[*IDS, *ids_of(steps)]])
    p = plain(whole).logits[0, len(IDS) - 1 : -1].softmax(-1)
    for step, row in zip(steps, p, strict=True):
        assert step.p == pytest.approx(row[step.id].item(), abs=1e-5)
        entropy = torch.distributions.Categorical(probs=row).entropy() / torch.log(
            torch.tensor(2.0)
        )
        assert step.entropy_bits == pytest.approx(entropy.item(), abs=1e-4)
        best = row.topk(5)
        assert [i for i, _ in step.top] == best.indices.tolist()
        assert [q for _, q in step.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_numbers_are_those_of_a_full_forward_on_smol(smol):
    ids = smol.encode("The capital of France is")
    steps = list(stream(smol, ids, max_new_tokens=4))
    logits = smol.bridge(torch.tensor([[*ids, *ids_of(steps)]]))[0, len(ids) - 1 : -1]
    p = logits.float().softmax(-1)
    expected = [row[s.id].item() for row, s in zip(p, steps, strict=True)]
    assert [s.p for s in steps] == pytest.approx(expected, abs=1e-5)


# Drawing


def test_a_seed_means_the_same_text(tiny):
    model = wrap(tiny("llama"), None, SPEC)
    draws = [
        ids_of(stream(model, IDS, max_new_tokens=20, temperature=1.0, seed=seed))
        for seed in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_batch_draws_as_one_prompt_alone_does(tiny):
    """One row has the draws of `stream`; several have their own; a narrow nucleus is greedy."""
    model = wrap(tiny("llama"), None, SPEC)
    settings = {"max_new_tokens": 8, "temperature": 1.5, "seed": 3}
    [alone] = answers(model, ROWS[:1], **settings)
    assert ids_of(alone) == ids_of(stream(model, ROWS[0], **settings))
    [other] = answers(model, ROWS[:1], **settings | {"seed": 4})
    assert ids_of(other) != ids_of(alone)
    narrow = answers(model, ROWS, **settings, top_p=1e-6)
    assert [*map(ids_of, narrow)] == [*map(ids_of, answers(model, ROWS, max_new_tokens=8))]


def test_drawing_leaves_the_global_generator_alone(tiny):
    model = wrap(tiny("llama"), None, SPEC)
    before = torch.get_rng_state()
    list(stream(model, IDS, max_new_tokens=3, temperature=1.0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("settings", [{"top_p": 1e-6}, {"temperature": 1e-3}, {"temperature": 0.0}])
def test_cold_or_narrow_draws_are_greedy(settings, tiny):
    model = wrap(tiny("llama"), None, SPEC)
    settings = {"temperature": 1.0} | settings
    found = ids_of(stream(model, IDS, max_new_tokens=20, **settings))
    assert found == ids_of(stream(model, IDS, max_new_tokens=20))


def test_draws_follow_the_tempered_nucleus():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().repeat(40_000, 1) / 2  # at temperature 0.5 these are p
    counts = torch.bincount(sampler(0.5, 0.9, seed=0)(logits), minlength=4) / 40_000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95  # 0.5 + 0.3 falls short of 0.9
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    assert counts[3] == 0


# Where it ends


def test_the_context_is_the_end(tiny):
    model = wrap(tiny("gpt2"), None, SPEC)
    assert model.n_ctx == 64 and not model.ends & set(range(3, 64))
    assert len(list(stream(model, [5] * 60, max_new_tokens=20))) == 4
    both = answers(model, [[5] * 60, [5] * 50], max_new_tokens=10)
    assert [len(a) for a in both] == [4, 10]
    with pytest.raises(BadInput, match="64 tokens leave no room .* tiny, 64"):
        next(stream(model, [5] * 64))


def test_until_ends_an_answer_and_is_its_last_text(smol):
    script = smol.encode(" Paris\n\nQuestion", bos=False)
    with saying(smol, script):
        steps = list(stream(smol, smol.encode("The capital"), max_new_tokens=9, until="\n"))
    assert steps[0].text == " Paris" and steps[-1].text.startswith("\n")
    assert "Question" not in "".join(s.text for s in steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
        ({"max_new_tokens": 0}, "max-new-tokens"),
    ],
)
def test_settings_that_choose_nothing_are_refused(settings, message, tiny):
    model = wrap(tiny("llama"), None, SPEC)
    with pytest.raises(BadInput, match=message):
        next(stream(model, IDS, **settings))
    with pytest.raises(BadInput, match="no text"):
        next(stream(model, []))


# The text


def test_a_character_of_several_tokens_comes_whole(smol):
    script = smol.encode(BYTES, bos=False)
    assert any("\ufffd" in smol.decode([i]) for i in script)  # it is split
    with saying(smol, [*script, min(smol.ends)]):
        steps = list(stream(smol, smol.encode("So"), max_new_tokens=60))
    assert ids_of(steps)[:-1] == script and steps[-1].id in smol.ends
    assert "".join(s.text for s in steps) == BYTES
    assert not any("\ufffd" in s.text for s in steps)


def test_a_character_cut_off_by_the_limit_is_shown_as_cut(smol):
    script = smol.encode("👩", bos=False)
    assert len(script) > 1
    with saying(smol, script):
        steps = list(stream(smol, smol.encode("So"), max_new_tokens=len(script) - 1))
    assert "".join(s.text for s in steps) == smol.decode(script[:-1])


def test_without_a_tokenizer_ids_stand_for_text(tiny):
    model = wrap(tiny("llama"), None, SPEC)
    steps = list(stream(model, IDS, max_new_tokens=3))
    assert "".join(s.text for s in steps) == "".join(f"<{s.id}>" for s in steps)


def test_hooks_act_on_every_step(tiny):
    model = wrap(tiny("llama"), None, SPEC)
    seen = []

    def count(x, hook):
        seen.append(x.shape[1])
        return x

    with model.bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", count)]):
        list(stream(model, IDS, max_new_tokens=4))
    assert seen == [len(IDS), 1, 1, 1]  # the prompt once, then only the new token


# Of one length


@pytest.mark.parametrize("arch", ARCHS)
def test_continuations_are_hugging_face_greedy_without_its_ends(arch, tiny):
    model, plain = wrap(tiny(arch), None, SPEC), tiny(arch)
    free = continuations(model, ROWS, 12).tolist()
    ends = {free[0][1], free[2][4]}  # tokens that the model would choose
    model = LoadedModel(**{**vars(model), "ends": frozenset(ends)})
    found = continuations(model, ROWS, 12)
    assert found.shape == (len(ROWS), 12) and not ends & set(found.flatten().tolist())
    for row, text in zip(ROWS, found.tolist(), strict=True):
        expected = by_hugging_face(plain, row, 12, bad_words_ids=[[i] for i in ends],
                                   eos_token_id=None)  # fmt: skip
        assert text == expected


def test_sampled_continuations_follow_their_seed(tiny):
    model = wrap(tiny("llama"), None, SPEC)
    draw = lambda seed: continuations(model, ROWS, 12, temperature=1.0, seed=seed).tolist()  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    cold = continuations(model, ROWS, 12, temperature=0.01).tolist()
    assert cold == continuations(model, ROWS, 12).tolist()


@pytest.mark.parametrize(
    ("rows", "n", "settings", "said"),
    [
        (ROWS, 0, {}, "at least 1"),
        ([], 3, {}, "no text"),
        ([[1], []], 3, {}, "no text"),
        (ROWS, 55, {}, "10 \\+ 55 tokens are more than the context"),
        (ROWS, 3, {"temperature": -1.0}, "temperature -1.0"),
    ],
)
def test_continuations_that_cannot_be_are_refused(rows, n, settings, said, tiny):
    with pytest.raises(BadInput, match=said):
        continuations(wrap(tiny("llama"), None, SPEC), rows, n, **settings)
