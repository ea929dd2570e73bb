"""What experiment 008 measures under noise: exact answers to few-shot items, and loss on text.

A prompt is a family's solved examples, one a line, and the line of the item up to its answer. The
answer is right when each of its tokens, with the end of the line, is the likeliest one given those
before it: exactly then greedy decoding writes it. So one forward pass scores it, where generating
takes one per token. What all prompts of a family begin with is read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import pandas as pd
import torch
from noise_plan import Condition, places
from torch import Tensor

from lens_utils import corpus, files, perturb, problems
from lens_utils.errors import BadInput
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.prompts import Prompt

QUICK = {"items": 6, "documents": 2}
ROWS = 48  # items read together
WINDOW = 32  # tokens of a document


@dataclass(frozen=True)
class Item:
    """One item as one model reads it."""

    id: str
    family: str
    ids: tuple[int, ...]
    """Prompt and answer."""
    start: int
    """Where the answer begins."""


def items(model: LoadedModel, records: Sequence[Prompt], most: int) -> list[Item]:
    """The items behind the solved examples of their family, so many of each, evenly spread.

    Raises BadInput where an answer's tokens merge with those before it.
    """
    found = []
    for family in dict.fromkeys(r.family for r in records if r.set == "items"):
        of_family = [r for r in records if r.family == family]
        shots = "".join(f"{r.text}{r.answer}\n" for r in of_family if r.set == "shots")
        every = [r for r in of_family if r.set == "items"]
        n = min(most, len(every))
        for r in (every[i * len(every) // n] for i in range(n)):
            ids = model.encode(shots + r.text)
            whole = model.encode(f"{shots}{r.text}{r.answer}\n")
            if whole[: len(ids)] != ids:
                raise BadInput(f"prompt {r.id!r}: in {model.name} the answer {r.answer!r} merges "
                               "with the end of the text; reword it")  # fmt: skip
            found.append(Item(r.id, family, tuple(whole), len(ids)))
    return found


@torch.no_grad()
def score(model: LoadedModel, asked: Sequence[Item]) -> pd.DataFrame:
    """For each item whether greedy decoding answers it, and the answer's log-probability (nats)."""
    rows = []
    for family in dict.fromkeys(item.family for item in asked):
        members = [item for item in asked if item.family == family]
        for at in range(0, len(members), ROWS):
            some = members[at : at + ROWS]
            for item, logits in zip(some, answer_logits(model, some), strict=True):
                answer = torch.tensor(item.ids[item.start :], device=logits.device)
                logp = logits.log_softmax(-1).gather(1, answer[:, None]).sum().item()
                right = bool((logits.argmax(-1) == answer).all())
                rows.append(
                    {"family": family, "item": item.id, "right": float(right), "logp": logp}
                )
    return pd.DataFrame(rows)


def answer_logits(model: LoadedModel, some: Sequence[Item]) -> Sequence[Tensor]:
    """Per item what the model expects at each token of its answer: [answer token, d_vocab]."""
    columns = zip(*(item.ids for item in some), strict=False)
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    # The token before an answer is read with the item: it is where the answer is expected.
    n = min(alike, *(item.start - 1 for item in some))
    shared = torch.tensor([some[0].ids[:n]], device=model.device)
    _, cache = model.bridge(
        shared, use_cache=True, logits_to_keep=1, return_type="logits_and_cache"
    )
    cache.batch_repeat_interleave(len(some))
    ids, _ = model.batch([item.ids[n:-1] for item in some])  # causal: padding behind does nothing
    position = torch.arange(n, n + ids.shape[1], device=ids.device).expand(len(ids), -1)
    places = [(row, at - 1 - n) for row, item in enumerate(some)
              for at in range(item.start, len(item.ids))]  # fmt: skip
    rows, columns = zip(*places, strict=True)
    logits = model.bridge.run_with_hooks(
        ids,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        # Only these places are read out: the vocabulary is most of a small model.
        fwd_hooks=[("unembed.hook_in", lambda stream, hook: stream[rows, columns][None])],
    )
    return logits[0].float().split([len(item.ids) - item.start for item in some])


@torch.no_grad()
def text_loss(model: LoadedModel, docs: Sequence[corpus.Doc]) -> pd.DataFrame:
    """Mean log-probability per token (nats) of the beginning of each text: minus the loss."""
    ids, _ = model.batch([model.encode(doc.text)[:WINDOW] for doc in docs])
    logp = model.bridge(ids, use_cache=False)[:, :-1].float().log_softmax(-1)
    mean = logp.gather(2, ids[:, 1:, None])[..., 0].mean(1)
    about = {"family": "text", "item": [doc.id for doc in docs], "right": float("nan")}
    return pd.DataFrame(about | {"logp": mean.cpu().numpy()})


class Session:
    """The model and what it is asked, loaded when the first missing part needs it."""

    def __init__(self, cfg, run: Run, records: Sequence[Prompt]) -> None:
        self.cfg, self.run, self.records = cfg, run, records

    @cached_property
    def items(self) -> list[Item]:
        most, asked = self.cfg.per_family, self.records
        if most < 1:
            raise BadInput(f"--per-family {most}: at least 1")
        if self.cfg.quick:  # reading the examples of a family costs most of a small run
            every = [*dict.fromkeys(r.family for r in asked if r.set == "items")]
            most, asked = QUICK["items"], [r for r in asked if r.family in every[1::2]]
        return items(self.run.model(), asked, most)

    def of_this_model(self, scores: pd.DataFrame) -> pd.DataFrame:
        """The scores, one for each head of the model. Raises BadInput for another model's."""
        model = self.run.model()
        heads = [(n, h) for n in range(model.n_layers) for h in range(model.bridge.cfg.n_heads)]
        if sorted(places(scores)) != heads:
            raise BadInput(f"005 scored {len(scores)} heads, not the {len(heads)} of {model.name}: "
                           f"./lab run 005 --model {self.cfg.model} --fresh")  # fmt: skip
        return scores

    def about(self) -> dict[str, object]:
        """What the conditions share."""
        held: dict[str, object] = {
            "items": len(self.items),
            "text": f"docstrings of {' and '.join(corpus.PACKAGES)}",
            "text_sha": corpus.digest(self.docs),
            "documents": len(self.docs),
        }
        if self.cfg.benchmark:
            held["benchmark_sha"] = files.sha256(problems.place(self.cfg.benchmark))
        return held

    @cached_property
    def docs(self) -> list[corpus.Doc]:
        """Held-out texts of at least a window's length."""
        n = QUICK["documents"] if self.cfg.quick else self.cfg.documents
        model = self.run.model()
        test = (doc for doc in corpus.docstrings(400_000, shortest=400) if doc.split == "test")
        return [doc for doc in test if len(model.encode(doc.text)) >= WINDOW][:n]

    def measure(self, conditions: Sequence[Condition]) -> pd.DataFrame:
        """One row per condition and item or text."""
        model, frames = self.run.model(), []
        for c in conditions:
            seed = 1000 * self.cfg.seed + c.draw
            with perturb.noisy_heads(model, c.heads, c.sigma, seed, self.cfg.relative_to):
                found = pd.concat([score(model, self.items), text_loss(model, self.docs)])
            frames.append(found.assign(arm=c.arm, sigma=c.sigma, draw=c.draw))
        return pd.concat(frames, ignore_index=True)
