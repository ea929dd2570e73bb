"""Models small enough for every test: the same architectures as the real ones, random weights.

`from conftest import ARCHS` to go through them all. lens_utils is imported inside the fixtures,
because the shape checker has to be there first.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers, processors

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GQA = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = GQA | {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
NEOX = COMMON | {"rotary_pct": 0.5, "tie_word_embeddings": False}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**GQA, sliding_window=4),
    "qwen2": lambda: hf.Qwen2Config(**{k: v for k, v in GQA.items() if k != "head_dim"}),
    "qwen3": lambda: hf.Qwen3Config(**GQA),
    "gemma2": lambda: hf.Gemma2Config(
        **SLIDING, attn_logit_softcapping=1.0, final_logit_softcapping=2.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**SLIDING),
    "gemma3-multimodal": lambda: hf.Gemma3Config(
        text_config=SLIDING,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=61,
        eoi_token_index=62,
    ),
    "neox-parallel": lambda: hf.GPTNeoXConfig(**NEOX, use_parallel_residual=True),
    "neox-sequential": lambda: hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2
    ),
}
ARCHS = tuple(CONFIGS)
WORDS = "x the a cat dog sat ran on to mat hat red big and of in is it was he she they"


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], hf.PreTrainedModel]:
    """tiny(arch): a plain Hugging Face model. Called twice, it gives two models of equal weights.

    All parameters are random, so that a forgotten bias or norm gain shows.
    """

    def build(arch: str) -> hf.PreTrainedModel:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(CONFIGS[arch](), dtype=torch.float32)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory) -> Callable[..., hf.PreTrainedTokenizerBase]:
    """make_tokenizer(adds_bos, chat): one token a word, 64 in all; <s> is 1, </s> is 2."""

    def make(adds_bos: bool = True, chat: bool = False) -> hf.PreTrainedTokenizerBase:
        specials = ["<unk>", "<s>", "</s>"]
        words = [*WORDS.split(), *(f"w{n}" for n in range(61))][:61]
        vocabulary = {word: n for n, word in enumerate(specials + words)}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        if adds_bos:
            core.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        made = hf.PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        if chat:
            made.chat_template = (
                "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"
                "{% if add_generation_prompt %}<s> it is{% endif %}"
            )
        folder = tmp_path_factory.mktemp("tokenizer")
        made.save_pretrained(folder)
        return hf.AutoTokenizer.from_pretrained(folder)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> hf.PreTrainedTokenizerBase:
    """A small tokenizer that adds its BOS."""
    return make_tokenizer()


@pytest.fixture
def saved(tiny, tokenizer, tmp_path) -> Callable[[str], Path]:
    """saved(arch): such a model as a folder on disk, with its tokenizer."""

    def save(arch: str) -> Path:
        folder = tmp_path / arch
        tiny(arch).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def smol():
    """The embedded real model; fetched when it is not on this machine."""
    from lens_utils import weights
    from lens_utils.models import load_model
    from lens_utils.registry import SMOL

    if not weights.present(SMOL):
        weights.fetch(SMOL)
    return load_model("smol", device="cpu")


@pytest.fixture(scope="session")
def organism():
    """The trained maze organism."""
    from lens_utils.models import load_model

    return load_model("maze-organism", device="cpu")


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory, request):
    """quick_run("001_layers_and_logits"): its Results at the quick size on the embedded model.

    Run once per session, after what it reads from others, into a folder that the session's
    processes share.
    """
    from lens_utils import provenance, weights
    from lens_utils.__main__ import load, reads
    from lens_utils.experiment import Results, execute
    from lens_utils.registry import SMOL

    session = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # not the environment: tests run ./lab test too
        session = session.parent
    outputs, finished = session / "quick_outputs", {}
    outputs.mkdir(exist_ok=True)

    def run(name: str) -> Results:
        if name not in finished:
            folder = provenance.EXPERIMENTS / name
            for upstream in sorted(reads(folder)):
                run(upstream)
            if not weights.present(SMOL):
                weights.fetch(SMOL)
            module = load(folder)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LAB_OUTPUTS", str(outputs))
                with FileLock(outputs / f".{name}.lock"):  # a second process finds it finished
                    done = execute(module.Config, module.main, folder / "run.py", ["--quick"])
            finished[name] = Results(done.folder)
        return finished[name]

    return run
