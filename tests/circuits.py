"""Models whose circuit is known: one written by hand, one compiled from a program."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from lens_utils.models import LoadedModel
from lens_utils.pairs import Pair

D_VOCAB, N_CTX, D_HEAD, N_HEADS = 16, 24, 24, 3
TOKEN, POSITION = slice(0, 16), slice(16, 40)
PREVIOUS, OUTPUT = slice(40, 56), slice(56, 72)
PREVIOUS_HEAD, INDUCTION_HEAD = (0, 1), (1, 2)
SHARP = 30.0 * D_HEAD**0.5  # scores are divided by sqrt(d_head); softmax becomes a choice


def induction_model(noise: float = 0.0) -> LoadedModel:
    """Two attention-only layers of three heads, of which two and one edge between them matter.

    The residual is [token 16 | position 24 | previous token 16 | output 16]. L0H1 attends to the
    position before and writes its token into `previous token`; L1H2 looks for its own token there
    and copies the token that followed into `output`, which is all that is unembedded. The four
    other heads have only zero weights, or small random output weights with `noise`.
    """
    config = TransformerBridgeConfig(
        n_layers=2, n_heads=N_HEADS, d_head=D_HEAD, d_model=72, n_ctx=N_CTX, d_vocab=D_VOCAB,
        d_vocab_out=D_VOCAB, attn_only=True, normalization_type=None, seed=0,
        positional_embedding_type="standard", attention_dir="causal",
    )  # fmt: skip
    bridge = TransformerBridge.boot_native(config)
    weights = {name: torch.zeros_like(value) for name, value in bridge.state_dict().items()}
    weights["embed.weight"][:, TOKEN] = torch.eye(D_VOCAB)
    weights["pos_embed.weight"][:, POSITION] = torch.eye(N_CTX)
    shift = torch.zeros(D_HEAD, N_CTX)  # query at position i looks for position i - 1
    shift[torch.arange(N_CTX - 1), torch.arange(1, N_CTX)] = SHARP
    _head(weights, *PREVIOUS_HEAD, query=(POSITION, shift), key=(POSITION, torch.eye(N_CTX)),
          read=TOKEN, write=PREVIOUS)  # fmt: skip
    same = torch.eye(D_HEAD, D_VOCAB)
    _head(weights, *INDUCTION_HEAD, query=(TOKEN, SHARP * same), key=(PREVIOUS, same),
          read=TOKEN, write=OUTPUT)  # fmt: skip
    weights["unembed.weight"][:, OUTPUT] = 10 * torch.eye(D_VOCAB)
    if noise:
        generator = torch.Generator().manual_seed(0)
        for layer, head in idle_heads():
            columns = slice(head * D_HEAD, (head + 1) * D_HEAD)
            for part in ("q", "k", "v"):
                weight = weights[f"blocks.{layer}.attn.{part}.weight"]
                weight[columns] = torch.randn(weight[columns].shape, generator=generator)
            weight = weights[f"blocks.{layer}.attn.o.weight"]
            weight[:, columns] = noise * torch.randn(weight[:, columns].shape, generator=generator)
    bridge.load_state_dict(weights)
    bridge.eval().requires_grad_(False)
    return LoadedModel("induction", bridge, None, (0,), frozenset(), N_CTX)


def idle_heads() -> list[tuple[int, int]]:
    """The heads that the circuit does without."""
    heads = {(layer, head) for layer in range(2) for head in range(N_HEADS)}
    return sorted(heads - {PREVIOUS_HEAD, INDUCTION_HEAD})


def _head(
    weights: dict[str, Tensor],
    layer: int,
    head: int,
    query: tuple[slice, Tensor],
    key: tuple[slice, Tensor],
    read: slice,
    write: slice,
) -> None:
    """What a head asks, is found by, copies and writes to; weights as nn.Linear has them."""
    rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
    weights[f"blocks.{layer}.attn.q.weight"][rows, query[0]] = query[1]
    weights[f"blocks.{layer}.attn.k.weight"][rows, key[0]] = key[1]
    weights[f"blocks.{layer}.attn.v.weight"][rows, read] = torch.eye(D_HEAD, D_VOCAB)
    weights[f"blocks.{layer}.attn.o.weight"][write, rows] = torch.eye(D_VOCAB, D_HEAD)


# `reverse`, compiled by Tracr: in these parts, and only these, something is written. Block 0 counts
# the tokens, MLPs 1 and 2 make of it the position to look at, head L3H0 moves the token from there.
REVERSE_HEADS, REVERSE_MLPS = {(0, 0), (3, 0)}, {0, 1, 2}
REVERSE = Path(__file__).parent / "fixtures" / "reverse.safetensors"  # compile_reverse.py made it


def reverse_model() -> LoadedModel:
    """Reads bos and up to five of a, b, c, d; at every position it gives the mirrored token.

    One head per layer, no norms, attention in both directions; output columns are a, b, c, d.
    """
    about, weights = _about_reverse(), load_file(REVERSE)
    config = TransformerBridgeConfig(
        **{k: about[k] for k in ("n_layers", "n_heads", "d_head", "d_mlp")},
        d_model=len(about["labels"]), d_vocab=len(about["inputs"]), seed=0, act_fn="relu",
        d_vocab_out=len(about["outputs"]), n_ctx=len(weights["pos_embed.weight"]),
        normalization_type=None, positional_embedding_type="standard",
        attention_dir="bidirectional",
    )  # fmt: skip
    bridge = TransformerBridge.boot_native(config)
    zero = {name: torch.zeros_like(value) for name, value in bridge.state_dict().items()}
    assert weights.keys() <= zero.keys(), weights.keys() - zero.keys()
    bridge.load_state_dict(zero | weights)
    bridge.eval().requires_grad_(False)
    bos = about["inputs"]["bos"]
    return LoadedModel("reverse", bridge, None, (bos,), frozenset(), config.n_ctx)


def _about_reverse() -> dict:
    with safe_open(REVERSE, "pt") as held:
        return json.loads(held.metadata()["model"])


def reverse_pairs() -> list[Pair]:
    """Words of five letters that differ in the first one, which the last position wants."""
    about = _about_reverse()
    ids, columns = about["inputs"], about["outputs"]
    made = []
    for i, (one, other) in enumerate(["ab", "ca", "bd", "dc"]):
        rest = "abcdabcd"[i : i + 4]
        clean, corrupt = ((ids["bos"], *(ids[x] for x in first + rest)) for first in (one, other))
        classes = ("bos", "entity", *["function"] * 4)
        made.append(Pair(f"{one}{rest}", "reverse", "reverse", one, clean, corrupt,
                         columns[one], columns[other], classes))  # fmt: skip
    return made
