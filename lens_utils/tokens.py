"""What a tokenizer decides: the ids before plain text (BOS), and those that end an answer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lens_utils.errors import BadInput

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, or None when there is none in it. Raises BadInput."""
    if not any((folder / name).exists() for name in FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers' Rust knows nothing narrower
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{folder} has no readable tokenizer: {reason}") from error


def bos_ids(tokenizer: PreTrainedTokenizerBase | None, policy: str) -> tuple[int, ...]:
    """The ids that precede plain text under a policy (`ModelSpec.bos`)."""
    if tokenizer is None or policy == "none":
        return ()
    if policy != "as its tokenizer":
        return (tokenizer.convert_tokens_to_ids(policy),)
    bare, whole = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    return tuple(whole[: whole.index(bare[0])]) if bare else ()


def end_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Tokens after which an answer is over: the model's own and the chat formats' ends of turn."""
    found: set[int | None] = set()
    for owner in (hf.generation_config, hf.config.get_text_config(), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list) else [ids])
    if tokenizer is not None:
        vocabulary = tokenizer.get_added_vocab()
        found |= {vocabulary[token] for token in ENDS if token in vocabulary}
    return frozenset(found - {None})
