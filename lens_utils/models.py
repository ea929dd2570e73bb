"""Load a model: one bridge, one tokenizer, and the lab's decisions about them.

Decided here and nowhere else: the device, the dtype, the first token of plain text (BOS), which
tokens end an answer, and how text becomes tokens. Everything else takes token ids and masks.
Nothing is downloaded (`weights.fetch` does that), no remote code is run, and weights stay raw:
folding the norms in is asked for explicitly (`fold`), because raw weights are what every
intervention should see.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lens_utils import checkpoints, weights
from lens_utils.errors import BadInput, Failure
from lens_utils.registry import CHECKPOINTS, ModelSpec, resolve
from lens_utils.tokens import bos_ids, end_ids, load_tokenizer

LARGE = 2_000_000_000  # parameters from which auto means bfloat16


@dataclass(frozen=True)
class LoadedModel:
    """A bridge with everything that decides what its numbers mean."""

    name: str
    bridge: TransformerBridge
    """Takes token ids only: it holds no tokenizer that could add a BOS of its own."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where there is none beside the weights: then only token ids work."""
    bos: tuple[int, ...]
    """What precedes plain text; mostly one token id, or nothing."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    n_ctx: int
    """Longest sequence the model was built for."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What the manifest says of the model."""

    @property
    def n_layers(self) -> int:
        return self.bridge.cfg.n_layers

    @property
    def device(self) -> torch.device:
        """Where token ids go; of a model spread over several GPUs, the embedding's."""
        return torch.device(self.bridge.cfg.device)

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str, bos: bool = True, longest: int | None = None) -> list[int]:
        """Token ids of plain text, behind the model's BOS; cut at `longest`, if that is given.

        Raises BadInput without a tokenizer and beyond the context.
        """
        if self.tokenizer is None:
            raise BadInput(f"{self.name} has no tokenizer: put its tokenizer.json beside it")
        ids = list(self.bos if bos else ()) + self.tokenizer.encode(text, add_special_tokens=False)
        ids = ids[:longest]
        if len(ids) > self.n_ctx:
            raise BadInput(f"a prompt of {len(ids)} tokens is longer than the context of "
                           f"{self.name}, {self.n_ctx}: {text[:40]!r}...")  # fmt: skip
        return ids

    def chat_text(self, messages: list[dict[str, str]], thinking: bool | None = None) -> str:
        """A conversation in the model's own template, up to the answer to come.

        thinking: for templates that know `enable_thinking`; None leaves it to the template.
        Raises BadInput for a base model and for roles its template refuses.
        """
        if not self.has_chat:
            raise BadInput(f"{self.name} is a base model without a chat template: use plain text")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                **({} if thinking is None else {"enable_thinking": thinking}),
            )
        except TemplateError as error:  # such as a system message where there may be none
            raise BadInput(f"the chat template of {self.name} refuses this: {error}") from None

    def encode_chat(
        self, messages: list[dict[str, str]], thinking: bool | None = None
    ) -> list[int]:
        """Token ids of `chat_text`. Raises BadInput as it does, and beyond the context."""
        return self.encode(self.chat_text(messages, thinking), bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; numbers in angle brackets without a tokenizer."""
        if self.tokenizer is None:
            return "".join(f"<{i}>" for i in ids)
        return self.tokenizer.decode(list(ids))

    def batch(
        self, rows: Sequence[Sequence[int]], side: str = "right"
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Rows of token ids, padded on one side, and their attention mask."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device)


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    init_seed: int | None = None,
    fold: bool = False,
    n_head: int | None = None,
    activation: str | None = None,
) -> LoadedModel:
    """Load a model by registered name, hub id or path; with `init_seed`, its untrained twin.

    fold: TransformerLens' compatibility mode (norm gains folded into the next weights, the
    unembedding centred); a float32 copy of all weights. n_head and activation are for a GPT-2
    checkpoint that does not say them. Raises BadInput or Failure.
    """
    logging.disable_progress_bar()
    spec, placed = resolve(name), pick_device(device)
    path = weights.locate(spec)
    if path.suffix in CHECKPOINTS:
        hf = checkpoints.load_gpt2(path, n_head, activation)
        hf = hf.to(pick_dtype("gpt2", hf.num_parameters(), dtype))
    elif n_head is not None or activation is not None:
        raise BadInput(f"{name} says its n_head and activation itself: leave them out")
    else:
        model_type, n_params = checkpoints.measure(path)
        chosen = pick_dtype(model_type, n_params, dtype)
        device_map = pick_device_map(placed, n_params * chosen.itemsize)
        hf = checkpoints.load_folder(path, chosen, device_map)
    if init_seed is not None:
        hf = untrained(hf, init_seed)
    if placed == "mps":
        placed = _agreeing(hf, placed, may_fall_back=device == "auto")
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    # Fewer tokens than rows are usual (nanoGPT pads to 50,304). A folder of the hub may have more.
    if path.suffix in CHECKPOINTS and tokenizer and len(tokenizer) > hf.config.vocab_size:
        raise BadInput(f"the tokenizer beside {path.name} has {len(tokenizer)} tokens, the model "
                       f"{hf.config.vocab_size}: it is another model's")  # fmt: skip
    return wrap(hf, tokenizer, spec, placed, path, fold, init_seed)


def wrap(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: ModelSpec,
    device: str = "cpu",
    path: Path | None = None,
    fold: bool = False,
    init_seed: int | None = None,
) -> LoadedModel:
    """A Hugging Face model as a LoadedModel. Its modules are taken over, not copied.

    path and init_seed are for the identity: where the weights were read, and whether they were
    drawn afresh. Raises BadInput for an architecture that TransformerLens does not know.
    """
    architecture = type(hf).__name__
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise BadInput(f"{spec.name}: TransformerLens has no bridge for a {architecture}")
    # Before the bridge: it holds some weights twice, and has others' names for them.
    n_params, tied_kv = hf.num_parameters(), checkpoints.has_tied_kv(hf)
    spread = getattr(hf, "hf_device_map", None)
    hf = hf.eval() if spread else hf.eval().to(device)
    hf.set_attn_implementation("eager")  # fused attention has no scores and patterns to hook
    # Not `boot_transformers`: it builds a second tokenizer that adds a BOS, and for a multimodal
    # model it looks for an image processor and would pip install torchvision.
    bridge = build_bridge_from_module(
        hf, architecture, hf_config=hf.config, device=hf.get_input_embeddings().weight.device
    )
    bridge.cfg.n_devices = len(set(spread.values())) if spread else 1
    if fold:
        bridge.enable_compatibility_mode()
    bridge.eval().requires_grad_(False)  # folding makes new parameters
    bos = bos_ids(tokenizer, spec.bos)
    identity = {
        **weights.identity(spec, path),
        "architecture": architecture,
        "parameters": n_params,
        "layers": bridge.cfg.n_layers,
        "dtype": str(hf.dtype).removeprefix("torch."),
        "device": device,
        "bos": tokenizer.decode(list(bos)) if bos else "none",
        "weights": "folded" if fold else "raw",
    }
    if tied_kv:
        identity["attention"] = "tied K/V"
    if init_seed is not None:
        identity |= {"sha256": "", "weights": f"{identity['weights']}, untrained, seed {init_seed}"}
    n_ctx = hf.config.get_text_config().max_position_embeddings
    return LoadedModel(spec.name, bridge, tokenizer, bos, end_ids(hf, tokenizer), n_ctx, identity)


def untrained(hf: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same architecture with freshly initialised weights: the null model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = AutoModelForCausalLM.from_config(hf.config, dtype=hf.dtype).eval()
    if checkpoints.has_tied_kv(hf):
        checkpoints.tie_kv(twin)
    return twin


@torch.no_grad()
def check_trained(model: LoadedModel, rows: Int[Tensor, "row pos"]) -> float:
    """Cross-entropy of the rows' tokens but the first, in nats; the model's claim to be one.

    A wrong number of heads and weights that were not loaded raise no error, but predict no better
    than a guess. Raises BadInput when the mean is not below ln(d_vocab).
    """
    total = 0.0
    for row in rows.to(model.device):
        logits = model.bridge(row[None, :-1])[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    loss, chance = total / rows[:, 1:].numel(), math.log(model.bridge.cfg.d_vocab)
    if not loss < chance:  # also NaN
        raise BadInput(f"{model.name} predicts this text no better than chance ({loss:.2f} nats a "
                       f"token, ln d_vocab {chance:.2f}): its weights look random, its n_head is "
                       "wrong, or these are not its tokens")  # fmt: skip
    return loss


def pick_device(asked: str) -> str:
    """The device to use. Raises BadInput when the one asked for is not on this machine."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cuda": cuda, "mps": mps, "cpu": True}  # in order of preference
    if asked == "auto":
        return next(name for name, found in there.items() if found)
    if not there.get(asked):
        raise BadInput(f"--device {asked}: this machine has none; try --device auto")
    return asked


def pick_device_map(device: str, n_bytes: int) -> str | None:
    """ "auto" spreads a model over all GPUs; only one that does not fit on the first is spread."""
    if device != "cuda" or torch.cuda.device_count() == 1:
        return None
    free, _ = torch.cuda.mem_get_info(0)
    return "auto" if n_bytes > 0.8 * free else None


def pick_dtype(model_type: str, n_params: int, asked: str) -> torch.dtype:
    """float32 below 2 billion parameters, bfloat16 above; Gemma never in float16.

    Gemma's residual stream passes 65,504, the largest float16: its activations turn to NaN.
    """
    if asked == "auto":
        return torch.float32 if n_params < LARGE else torch.bfloat16
    if asked == "float16" and "gemma" in model_type:
        raise BadInput("Gemma overflows float16 (all NaN): use --dtype bfloat16 or float32")
    return getattr(torch, asked)


def agree(
    one: Float[Tensor, "*lead d_vocab"], other: Float[Tensor, "*lead d_vocab"], nats: float
) -> bool:
    """Whether two sets of logits say the same: nowhere a KL divergence of `nats` or NaN."""
    p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
    return bool(((p.exp() * (p - q)).sum(-1) < nats).all())


@torch.no_grad()
def _agreeing(hf: PreTrainedModel, device: str, may_fall_back: bool) -> str:
    """`device` if one sequence gets the CPU's answer there; else cpu, or Failure if it was named.

    Apple's MPS backend has given silently wrong results in several releases of torch.
    """
    hf.set_attn_implementation("eager")  # what the bridge computes
    ids = torch.arange(3, 19)[None] % hf.config.get_text_config().vocab_size
    expected = hf(ids).logits
    hf.to(device)
    found = hf(ids.to(hf.device)).logits.cpu()
    if agree(expected, found, nats=1e-3 if hf.dtype == torch.float32 else 0.05):
        return device
    if not may_fall_back:
        raise Failure(f"{device} and cpu disagree on this model: use --device cpu")
    warnings.warn(f"{device} and cpu disagree on this model: using cpu", stacklevel=2)
    return "cpu"
