"""A local language model as a judge of labels, by its logits: small ones cannot write, but tell.

Asked whether a window has what a label says, a model of 135 million parameters answers anything;
but its logit of "yes" less that of "no" is higher for windows that do. So windows are ranked by
that difference (AUROC; its zero means nothing). A second judge asks nothing: how much likelier
does the label, said before, make the window than a neutral sentence does?

Axes: prompt (texts that are judged).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from lens_utils.errors import BadInput
from lens_utils.feature_scores import Judge, Trial
from lens_utils.models import LoadedModel

BATCH = 16
CONTAINS = 'Text: "{text}"\n\nIs anything in the text like this: {label}? Answer yes or no.'
FITS = ('Text: "{text}"\n\nSome tokens are marked with << and >>. Are the marked tokens {label}? '
        "Answer yes or no.")  # fmt: skip
ABOUT, NEUTRAL = "The next text has a part that is {label}.\n\n", "The next text is a text.\n\n"


def judges(
    model: LoadedModel, labels: Mapping[int, str], pieces: Mapping[int, str],
    ids: Int[ndarray, " token"],
) -> dict[str, Judge]:  # fmt: skip
    """Judges by name: detection and fuzzing by yes and no, surprisal (of unmarked windows).

    labels: by feature; pieces and ids: the corpus' tokens as text. Raises BadInput for a model
    whose tokenizer has no single token for yes and no.
    """

    def shown(trial: Trial, marks: bool) -> list[str]:
        return ["".join(f"<<{pieces[int(ids[t])]}>>" if marks and on else pieces[int(ids[t])]
                        for t, on in zip(tokens, marked, strict=True))
                for tokens, marked in zip(trial.token, trial.marked, strict=True)]  # fmt: skip

    def asked(form: str, marks: bool) -> Judge:
        def judge(trial: Trial, feature: int) -> Float[ndarray, " window"]:
            prompts = [form.format(text=text, label=labels[feature])
                       for text in shown(trial, marks)]  # fmt: skip
            return yes_less_no(model, prompts).numpy()

        return judge

    def unsurprised(trial: Trial, feature: int) -> Float[ndarray, " window"]:
        texts = shown(trial, False)
        with_label = losses(model, ABOUT.format(label=labels[feature]), texts)
        return (losses(model, NEUTRAL, texts) - with_label).numpy()

    return {"detection": asked(CONTAINS, False), "fuzzing": asked(FITS, True),
            "surprisal": unsurprised}  # fmt: skip


def answer_ids(model: LoadedModel) -> tuple[int, int]:
    """First tokens of the answers yes and no. Raises BadInput if they are one."""
    forms = ("Yes", "No") if model.has_chat else (" yes", " no")
    yes, no = (model.encode(form, bos=False)[:1] for form in forms)
    if not yes or not no or yes == no:
        raise BadInput(f"{model.name} cannot judge: its tokenizer does not tell yes from no")
    return yes[0], no[0]


@torch.no_grad()
def yes_less_no(model: LoadedModel, questions: Sequence[str]) -> Float[Tensor, " prompt"]:
    """Logit of yes less that of no, where the answer would begin."""
    yes, no = answer_ids(model)
    rows = [model.encode_chat([{"role": "user", "content": q}]) if model.has_chat
            else model.encode(f"{q}\nAnswer:") for q in questions]  # fmt: skip
    parts = []
    for start in range(0, len(rows), BATCH):
        ids, mask = model.batch(rows[start : start + BATCH], "left")
        logits = model.bridge(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)[:, -1]
        parts.append((logits[:, yes] - logits[:, no]).float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0)


@torch.no_grad()
def losses(model: LoadedModel, before: str, texts: Sequence[str]) -> Float[Tensor, " prompt"]:
    """Mean cross-entropy of each text's tokens behind the sentence `before`, in nats."""
    head = model.encode(before)
    tails = [model.encode(text, bos=False) for text in texts]
    parts = []
    for start in range(0, len(tails), BATCH):
        batch = tails[start : start + BATCH]
        ids, mask = model.batch([head + tail for tail in batch])
        logits = model.bridge(ids, attention_mask=mask, use_cache=False).float()
        nats = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scored = mask[:, 1:].clone()
        scored[:, : len(head) - 1] = 0
        parts.append(((nats * scored).sum(1) / scored.sum(1).clamp(min=1)).cpu())
    return torch.cat(parts) if parts else torch.zeros(0)
