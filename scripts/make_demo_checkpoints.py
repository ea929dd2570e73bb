"""Two small language models to try the lab's checkpoint tools on, made here in minutes.

V0 is a plain GPT; in V1 keys and values are one projection (K = V: c_attn has 2 * d_model rows).
Both are trained on the same rows in the same order: the docstrings of installed packages, in the
BPE tokens of a tokenizer that is trained on the same text. A part of the rows says a stretch
twice, which is what makes induction heads worth having. The files are in nanoGPT's layout
(`model`, `model_args`), tensors and plain numbers only, with the tokenizer beside them:

    python scripts/make_demo_checkpoints.py                       # outputs/checkpoints
    ./lab run 001 --model outputs/checkpoints/model_v0.pt

About a minute each on one core. Training is seeded; the text, and so the weights, depend on the
versions of the packages, which are kept in the files.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lens_utils import corpora, corpus, files, provenance
from lens_utils.console import guarded, say, track

CHARACTERS = 1_500_000
END = "<|endoftext|>"  # id 0: before every row, and between documents
CONTEXT, D_MODEL, HEADS, LAYERS, D_VOCAB = 128, 64, 4, 4, 1536
ROWS, PEAK, WARM_UP = 8, 2e-3, 50
VARIANTS = {"model_v0": False, "model_v1": True}  # whether keys are values
TWICE = 0.25  # share of rows that are one stretch of text said again and again


class Block(nn.Module):
    """One layer, with nanoGPT's names."""

    def __init__(self, tied_kv: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(D_MODEL, bias=False)
        self.attn = nn.ModuleDict(
            {
                "c_attn": nn.Linear(D_MODEL, (2 if tied_kv else 3) * D_MODEL, bias=False),
                "c_proj": nn.Linear(D_MODEL, D_MODEL, bias=False),
            }
        )
        self.ln_2 = nn.LayerNorm(D_MODEL, bias=False)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(D_MODEL, 4 * D_MODEL, bias=False),
                "c_proj": nn.Linear(4 * D_MODEL, D_MODEL, bias=False),
            }
        )

    def forward(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        parts = self.attn["c_attn"](self.ln_1(x)).split(D_MODEL, dim=-1)
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]
        q, k, v = heads if len(heads) == 3 else (*heads, heads[1])
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](z.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """nanoGPT's model: learned positions, exact GELU, no biases, unembedding = embedding."""

    def __init__(self, d_vocab: int, tied_kv: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(d_vocab, D_MODEL),
                "wpe": nn.Embedding(CONTEXT, D_MODEL),
                "h": nn.ModuleList(Block(tied_kv) for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(D_MODEL, bias=False),
            }
        )
        self.lm_head = nn.Linear(D_MODEL, d_vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # larger than GPT-2's 0.02, which is meant for wide and long
                deep = (2 * LAYERS) ** -0.5 if name.endswith("c_proj.weight") else 1
                nn.init.normal_(weight, std=deep * (0.1 if ".h." in name else 0.06))

    def forward(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_vocab"]:
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"].weight[: ids.shape[1]]
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


def learn_tokens(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts; plain text begins with END."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=D_VOCAB,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END)


def batches(stream: Int[Tensor, " token"], steps: int) -> Iterator[Int[Tensor, "row pos"]]:
    """Rows of END and CONTEXT tokens from random places; some say one stretch again and again."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(CONTEXT)
    for _ in range(steps):
        start = torch.randint(len(stream) - CONTEXT, (ROWS, 1), generator=generator)
        length = torch.randint(CONTEXT // 8, CONTEXT // 2, (ROWS, 1), generator=generator)
        twice = torch.rand(ROWS, 1, generator=generator) < TWICE
        rows = stream[start + torch.where(twice, place % length, place)]
        yield F.pad(rows, (1, 0))


def train(name: str, stream: Int[Tensor, " token"], d_vocab: int, steps: int) -> GPT:
    """A model after so many steps; every model sees the same rows."""
    torch.manual_seed(0)
    model = GPT(d_vocab, tied_kv=VARIANTS[name])
    flat = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
    progress = track(list(batches(stream, steps)), f"{name}: training")
    for step, rows in enumerate(progress):
        done = step / steps
        rate = PEAK * min((step + 1) / WARM_UP, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def losses(model: GPT, rows: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos"]:
    """Cross-entropy of every token but the first, in nats."""
    return torch.cat(
        [
            F.cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none")
            for part in rows.split(32)
        ]
    )


def unigram(fit: Int[Tensor, " token"], rows: Int[Tensor, "row pos"], d_vocab: int) -> float:
    """Cross-entropy of a model that knows only how often each token comes, in nats."""
    counts = torch.bincount(fit, minlength=d_vocab) + 1.0
    return float(-(counts / counts.sum()).log()[rows[:, 1:]].mean())


def make(folder: Path, steps: int, characters: int) -> None:
    """Text, tokenizer, the two models, their losses on text that neither has seen."""
    torch.set_num_threads(1)
    docs = corpus.docstrings(characters, corpora.PACKAGES, shortest=100)
    texts = {part: [d.text for d in docs if d.split == part] for part in ("fit", "test")}
    tokenizer = learn_tokens(texts["fit"])
    fit, test = (
        torch.tensor([i for ids in tokenizer(texts[part])["input_ids"] for i in ids])
        for part in ("fit", "test")
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    d_vocab = len(tokenizer)
    held_out = F.pad(test[: len(test) // CONTEXT * CONTEXT].view(-1, CONTEXT), (1, 0))[:128]
    half = held_out[:, 1 : CONTEXT // 2 + 1]
    twice = F.pad(torch.cat([half, half], dim=1), (1, 0))
    say(f"{len(docs)} docstrings, {len(fit):,} tokens to learn from; digest {corpus.digest(docs)}")
    say(f"held-out loss, nats a token: uniform {math.log(d_vocab):.3f} (ln {d_vocab}), "
        f"unigram {unigram(fit, held_out, d_vocab):.3f}")  # fmt: skip
    for name in VARIANTS:
        begun = time.process_time()
        model = train(name, fit, d_vocab, steps)
        first, again = losses(model, twice).chunk(2, dim=1)
        loss = float(losses(model, held_out).mean())
        model_args = {
            "n_layer": LAYERS, "n_head": HEADS, "n_embd": D_MODEL, "block_size": CONTEXT,
            "bias": False, "vocab_size": d_vocab, "dropout": 0.0,
        }  # fmt: skip
        said = {
            "steps": steps,
            "packages": list(corpora.PACKAGES),
            "corpus_sha": corpus.digest(docs),
        }
        saved = {
            "model": model.state_dict(),
            "model_args": model_args,
            "iter_num": steps,
            "best_val_loss": loss,
            "config": said,
        }
        path = folder / f"{name}.pt"
        with files.replacing(path) as beside, beside.open("wb") as file:
            torch.save(saved, file)
        say(f"{name}: {loss:.3f}; a stretch the first time {first.mean():.3f}, the second "
            f"{again.mean():.3f} ({time.process_time() - begun:.0f} CPU seconds)")  # fmt: skip
    say(f"written to {provenance.shown(folder)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=provenance.outputs() / "checkpoints")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each model")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="text to learn from")
    args = parser.parse_args()
    return guarded(lambda: make(args.folder, args.steps, args.characters))


if __name__ == "__main__":
    raise SystemExit(main())
