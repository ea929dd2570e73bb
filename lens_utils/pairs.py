"""Clean and corrupted prompts: two of one length that differ in one thing and in their answer.

The clean prompt has an answer, the corrupted one another (the foil); the logit difference answer -
foil says which of the two a model is thinking of. A pair is made of two prompts of one pool that
this model's tokenizer cuts into equally many tokens. Every token has a class: the role of the slot
it lies in (entity, relation, subject ...), or bos, punctuation, function. For repeated
random tokens (`induction`) the ids themselves are drawn, for each model its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.lens import Readout, hook, rank
from lens_utils.models import LoadedModel
from lens_utils.prompts import Encoded, Prompt, encode


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted prompt as one model reads them."""

    id: str
    task: str
    template: str
    """The wording: pairs of one template and length have their roles in the same places, and can
    stand in one batch and be averaged by position."""
    group: str
    """What bootstraps resample: a country in two wordings is not two independent samples."""
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    """What follows the clean prompt."""
    foil: int
    """What follows the corrupted one."""
    classes: tuple[str, ...]
    """Class of each token of the clean prompt."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one length as tensors: no padding, no masks."""

    pairs: tuple[Pair, ...]
    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answer: Int[Tensor, " pair"]
    foil: Int[Tensor, " pair"]

    def swapped(self) -> "Batch":
        """The corrupted prompts as the clean ones: noising instead of denoising."""
        return Batch(self.pairs, self.corrupt, self.clean, self.foil, self.answer)


def classes(model: LoadedModel, prompt: Prompt) -> tuple[str, ...]:
    """The class of every token of a plain prompt, BOS included."""
    found = model.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    named = ["bos"] * len(model.bos)
    for start, end in found["offset_mapping"]:
        roles = [r for r, first, behind in prompt.spans if start < behind and first < end]
        wordy = any(c.isalnum() for c in prompt.text[start:end])
        named.append(roles[0] if roles else "function" if wordy else "punctuation")
    return tuple(named)


def pair(model: LoadedModel, clean: Encoded, corrupt: Encoded) -> Pair:
    """Two encoded prompts as a pair.

    Raises BadInput when they differ in length or have the same answer.
    """
    one, other = clean.prompt, corrupt.prompt
    if len(clean.ids) != len(corrupt.ids):
        raise BadInput(f"{one.id} has {len(clean.ids)} tokens in {model.name} and {other.id} has "
                       f"{len(corrupt.ids)}: patching needs pairs of one length")  # fmt: skip
    if clean.answer_id == corrupt.answer_id:
        raise BadInput(f"{one.id} and {other.id} have the same answer {one.answer!r}: the foil "
                       "has to differ")  # fmt: skip
    return Pair(
        one.id, one.set, one.template, one.group, clean.ids, corrupt.ids,
        clean.answer_id, corrupt.answer_id, classes(model, one),
    )  # fmt: skip


def pairs(model: LoadedModel, prompts: Sequence[Prompt]) -> tuple[list[Pair], dict[str, str]]:
    """Every prompt with the next one of its pool that makes a pair with it, and what was left out.

    What was left out comes with its reason. Raises BadInput when no pair is left.
    """
    encoded, several = encode(model, prompts)
    reasons = {name: "its answer has several tokens" for name in several}
    made = []
    for clean in encoded:
        pool = [e for e in encoded if e.prompt.pool == clean.prompt.pool]
        at = pool.index(clean)
        reason = "its pool holds no other prompt"
        for corrupt in pool[at + 1 :] + pool[:at]:
            try:
                made.append(pair(model, clean, corrupt))
                break
            except BadInput as error:
                reason = str(error)
        else:
            reasons[clean.prompt.id] = reason
    if not made:
        first = next(iter(reasons.items()), ("prompts", "there are none"))
        raise BadInput(f"no pairs are left for {model.name}: {first[0]}: {first[1]}")
    return made, reasons


def induction(model: LoadedModel, n: int, length: int = 10, seed: int = 0) -> list[Pair]:
    """Random tokens, then one of them again: what followed it the first time?

    "... a b ... c d ... a" wants b; corrupted, the last token is c and d is wanted. In every other
    pair a comes before c. Tokens are drawn without replacement from the upper seven eighths of the
    vocabulary (special tokens and bytes lie below). Classes: bos, entity (b), subject (both a),
    function (the rest).
    """
    generator = torch.Generator().manual_seed(seed)
    size = model.bridge.cfg.d_vocab
    made = []
    for i in range(n):
        drawn = torch.randperm(size - size // 8, generator=generator)[:length] + size // 8
        first = drawn.tolist()
        here, there = (length // 5, 3 * length // 5)[:: 1 if i % 2 else -1]
        named = ["bos"] * len(model.bos) + ["function"] * length + ["subject"]
        named[len(model.bos) + here : len(model.bos) + here + 2] = "subject", "entity"
        made.append(
            Pair(f"induction-{i:02d}", "induction", "random", f"induction-{i:02d}",
                 (*model.bos, *first, first[here]), (*model.bos, *first, first[there]),
                 first[here + 1], first[there + 1], tuple(named))
        )  # fmt: skip
    return made


@torch.no_grad()
def screen(model: LoadedModel, pairs: Sequence[Pair], batch_size: int = 16) -> pd.DataFrame:
    """What the model makes of every pair, without any intervention; one row per pair.

    logit_diff_clean and logit_diff_corrupt are logit(answer) - logit(foil) behind either prompt;
    p_answer and answer_rank belong to the clean prompt. `known`: the model prefers the answer
    behind the clean prompt and the foil behind the corrupted one.
    """
    readout, last = Readout(model.bridge), hook(model.n_layers)
    frames = []
    for group in batches(model, pairs, batch_size):
        clean, corrupt = (
            record(model, ids, [last])[last][:, -1] for ids in (group.clean, group.corrupt)
        )
        logits = readout.read(clean)
        values = {
            "logit_diff_clean": readout.logit_diff(clean, group.answer, group.foil),
            "logit_diff_corrupt": readout.logit_diff(corrupt, group.answer, group.foil),
            "p_answer": logits.softmax(-1).gather(1, group.answer[:, None])[:, 0],
            "answer_rank": rank(logits, group.answer),
        }
        about = [
            {k: getattr(p, k) for k in ("id", "task", "template", "group")} for p in group.pairs
        ]
        frames.append(pd.DataFrame(about).assign(**{k: v.cpu().numpy() for k, v in values.items()}))
    table = pd.concat(frames, ignore_index=True)
    return table.assign(known=(table.logit_diff_clean > 0) & (table.logit_diff_corrupt < 0))


def batches(model: LoadedModel, pairs: Sequence[Pair], size: int) -> Iterator[Batch]:
    """Pairs of one wording and one sequence of classes together, at most `size` of them."""
    kinds: dict[tuple, list[Pair]] = {}
    for p in pairs:
        kinds.setdefault((p.task, p.template, p.classes), []).append(p)
    for members in kinds.values():
        for start in range(0, len(members), size):
            yield batch(model, members[start : start + size])


def batch(model: LoadedModel, pairs: Sequence[Pair]) -> Batch:
    """Pairs of one length as tensors on the model's device. Raises BadInput for several lengths."""
    lengths = sorted({len(p.clean) for p in pairs} | {len(p.corrupt) for p in pairs})
    if len(lengths) != 1:
        raise BadInput(f"pairs of {' and '.join(map(str, lengths))} tokens in one batch")

    def ids(values: list) -> Tensor:
        return torch.tensor(values, device=model.device)

    return Batch(tuple(pairs), ids([p.clean for p in pairs]), ids([p.corrupt for p in pairs]),
                 ids([p.answer for p in pairs]), ids([p.foil for p in pairs]))  # fmt: skip
