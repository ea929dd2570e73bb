"""How text becomes tokens: one rule a model, and no other way in."""

import pytest
import torch

from lens_utils.errors import BadInput
from lens_utils.models import load_model, wrap
from lens_utils.registry import ModelSpec
from lens_utils.tokens import bos_ids

SPEC = ModelSpec("tiny", "tiny")
QUESTION = [{"role": "user", "content": "the cat"}]


def test_smol_starts_plain_text_as_its_pretraining_did(smol):
    assert smol.bos == (0,) and smol.identity["bos"] == "<|endoftext|>"
    assert smol.encode("The cat")[0] == 0 and smol.encode("The cat", bos=False)[0] != 0
    assert smol.ends == {0, 2}
    assert smol.bridge.tokenizer is None  # so that no text can bypass the policy


def test_smol_knows_something(smol):
    ids = torch.tensor([smol.encode("The capital of France is")])
    assert smol.decode([smol.bridge(ids)[0, -1].argmax().item()]) == " Paris"


def test_smol_chat_follows_its_template(smol):
    ids = smol.encode_chat([{"role": "user", "content": "Hi"}])
    expected = smol.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == expected and smol.decode(ids).endswith("<|im_start|>assistant\n")


def test_bos_policies(make_tokenizer):
    adds, adds_not = make_tokenizer(adds_bos=True), make_tokenizer(adds_bos=False)
    assert bos_ids(adds, "as its tokenizer") == (1,)
    assert bos_ids(adds_not, "as its tokenizer") == ()
    assert bos_ids(adds, "none") == () and bos_ids(None, "</s>") == ()
    assert bos_ids(adds_not, "</s>") == (2,)


def test_loading_leaves_the_tokenizer_alone(tiny, make_tokenizer):
    model = wrap(tiny("llama"), make_tokenizer(adds_bos=False), SPEC)
    assert model.encode("the cat") == model.tokenizer.encode("the cat")
    assert model.ends == {2}
    assert model.decode(model.encode("the cat")) == "the cat"


def test_a_prompt_beyond_the_context(tiny, make_tokenizer):
    model = wrap(tiny("llama"), make_tokenizer(chat=True), SPEC)
    assert len(model.encode("cat " * 63)) == 64  # BOS is counted
    for encode in (model.encode, lambda text: model.encode_chat([{"role": "u", "content": text}])):
        with pytest.raises(BadInput, match="longer than the context"):
            encode("cat " * 64)


def test_chat_needs_a_template(tiny, make_tokenizer):
    with pytest.raises(BadInput, match="without a chat template"):
        wrap(tiny("llama"), make_tokenizer(), SPEC).encode_chat(QUESTION)
    chat = wrap(tiny("llama"), make_tokenizer(chat=True), SPEC)
    assert chat.decode(chat.encode_chat(QUESTION)) == "<s> the cat </s> <s> it is"


def test_a_folder_without_a_tokenizer_takes_ids_only(tiny, tmp_path):
    tiny("qwen3").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        model.encode("the cat")
    assert model.decode([3, 4]) == "<3><4>" and model.identity["bos"] == "none"


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Odd"}}', '{"version": "1'])
def test_a_broken_tokenizer_is_one_line(content, saved):
    folder = saved("llama")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match="no readable tokenizer") as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_what_a_template_refuses_is_one_line(tiny, make_tokenizer):
    """Gemma's template raises at a system message; Jinja's own error would be a traceback."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    model = wrap(tiny("llama"), tokenizer, ModelSpec("llama", "llama"))
    with pytest.raises(BadInput, match="no system role") as error:
        model.encode_chat([{"role": "system", "content": "the cat"}])
    assert "\n" not in str(error.value)
