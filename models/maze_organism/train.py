"""Train the maze organism: a small Qwen3 that solves, judges and draws mazes, with or without
thinking. From the repository: .venv/bin/python models/maze_organism/train.py --seed 0

Every step draws new mazes from (seed, step), so a killed run goes on where its last checkpoint is
and ends in the same weights. Layouts of the held-out side are never shown. The loss is on the
answer and the trace only. Matrices are trained by Muon, the rest by AdamW.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lens_utils import files, generate, maze_prompts, models  # noqa: E402
from lens_utils import maze_tasks as tasks  # noqa: E402
from lens_utils.maze_text import cells_text  # noqa: E402
from lens_utils.mazes import SPOILS, tree_maze  # noqa: E402
from lens_utils.registry import ModelSpec  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
DIRECT = TEMPLATE.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}", ""
).replace("{% endif %}{% endif %}", "{% endif %}")  # of the twin: it has no other mode
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
SHARE = {"solve": 0.2, "recognize": 0.35, "generate": 0.35, "recall": 0.05, "lexical": 0.05}
THINKING = 0.4  # share of questions; the traces are longer and are learned sooner
WEIGHTS = {"Yes": 5.0, "No": 5.0, "bad": 2.0}  # one token decides what many only prepare


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), in float32 and for all matrices of one shape
    at once: torch.optim.Muon works in bfloat16, which costs ten times as much on most CPUs.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[torch.Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), alike in shapes.items():
                updates = []
                for p in alike:
                    held = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    held.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(held, group["momentum"]))  # Nesterov's
                made = orthogonal(torch.stack(updates))
                scale = 0.2 * max(rows, columns) ** 0.5  # as large as an update of AdamW
                for p, update in zip(alike, made, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(group["lr"] * scale * update)


def orthogonal(stack: torch.Tensor) -> torch.Tensor:
    """Matrices with all singular values near one: five Newton-Schulz steps of order five."""
    wide = stack.shape[1] <= stack.shape[2]
    x = stack if wide else stack.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


@dataclass
class Recipe:
    """How the organism is trained."""

    seed: int = 0
    thinking: float = THINKING
    """Share of questions with thinking; 0 makes the twin that never learned to think."""
    steps: int = 2800
    batch: int = 48
    lr_matrices: float = 6e-3
    lr_rest: float = 3e-3
    warmup: int = 100
    size: int = 5
    out: Path = Path("outputs/maze_organism")
    device: str = "cpu"
    checkpoint_every: int = 100
    test: int = 300
    """Held-out questions per task and mode at the end."""


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token per word and per cell "(r,c)"."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    pattern = r"\(\d+,\d+\)|[A-Za-z_]+|\d+|[^\sA-Za-z0-9]"
    texts = [text for texts in tasks.TEMPLATES.values() for text in texts]
    texts += ["Player: Goal: Walls: Empty: Path: user assistant system Yes No"]  # and the traces'
    texts += ["back found ok bad valid invalid new"]
    splitter = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    words = {w for text in texts for w, _ in splitter.pre_tokenize_str(text)}
    cells = [cells_text([(r, c)]) for r in range(size) for c in range(size)]
    vocabulary = [*SPECIAL, "<unk>", *cells, *sorted(words)]
    fast = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    fast.pre_tokenizer = splitter
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )  # fmt: skip
    wrapped.chat_template = TEMPLATE
    return wrapped


def build(tok: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """The untrained organism."""
    config = Qwen3Config(
        vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def question(rng: random.Random, size: int, test: bool, thinking: float = THINKING) -> tasks.Record:
    """A random question."""
    while True:
        maze = tree_maze(rng, size, test)
        [task] = rng.choices(list(SHARE), list(SHARE.values()))
        spoiled = rng.choice(SPOILS) if task == "recognize" and rng.random() < 0.5 else ""
        template = rng.randrange(len(tasks.TEMPLATES[task]))
        record = tasks.ask(
            rng, maze, task, template, rng.random() < thinking, spoiled=spoiled, test=test
        )
        if record is not None:
            return record


def encode(tok: PreTrainedTokenizerFast, record: tasks.Record) -> tuple[list[int], int]:
    """Token ids of prompt, trace and answer, and how many belong to the prompt."""
    asked = tok.apply_chat_template(
        [{"role": "user", "content": record.prompt}],
        tokenize=False, add_generation_prompt=True, enable_thinking=record.thinking,
    )  # fmt: skip
    thought = f"<think> {' '.join(maze_prompts.trace(record))} </think> " if record.thinking else ""
    before = tok.encode(asked)
    return before + tok.encode(f"{thought}{record.answer}<|im_end|>"), len(before)


def batches(tok, recipe: Recipe, step: int):
    """The step's questions as two batches of like lengths: ids, and weights of what is learned."""
    rng = random.Random(f"{recipe.seed}-{step}")
    rows = [
        encode(tok, question(rng, recipe.size, False, recipe.thinking)) for _ in range(recipe.batch)
    ]
    rows.sort(key=lambda row: len(row[0]))
    weight = torch.ones(len(tok))
    for word, factor in WEIGHTS.items():
        weight[tok.convert_tokens_to_ids(word)] = factor
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        ids = torch.full((len(part), max(len(row) for row, _ in part)), tok.pad_token_id)
        learned = torch.zeros(ids.shape)
        for i, (row, n_prompt) in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            learned[i, n_prompt : len(row)] = weight[row[n_prompt:]]
        yield ids.to(recipe.device), learned.to(recipe.device)


def test(model, tok, recipe: Recipe) -> dict[str, float]:
    """Share of right greedy answers per task and mode, on held-out layouts."""
    rng = random.Random("test")
    loaded = models.wrap(model, tok, ModelSpec("maze-organism", str(ROOT)), recipe.device)
    found = {}
    for task in SHARE:
        for thinking in (False, True)[: 2 if recipe.thinking else 1]:
            records = []
            while len(records) < recipe.test:
                spoiled = SPOILS[len(records) // 2 % 3] if len(records) % 2 else ""
                template = len(records) % len(tasks.TEMPLATES[task])
                record = tasks.ask(rng, tree_maze(rng, recipe.size, True), task, template, thinking,
                                   spoiled=spoiled if task == "recognize" else "")  # fmt: skip
                if record is not None:
                    records.append(record)
            rows = [encode(tok, record) for record in records]
            prompts = [row[:n] for row, n in rows]
            steps = [
                answer
                for at in range(0, len(prompts), 100)
                for answer in generate.answers(loaded, prompts[at : at + 100], max_new_tokens=120)
            ]
            said = [tok.decode([step.id for step in answer]) for answer in steps]
            replies = [text.rpartition("</think>")[2] if thinking else text for text in said]
            right = [
                not tasks.reply_fault(r, text) for r, text in zip(records, replies, strict=True)
            ]
            found[f"{task} {'thinking' if thinking else 'direct'}"] = sum(right) / len(right)
    return found


def main(recipe: Recipe) -> None:
    folder = recipe.out / f"seed-{recipe.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizer(recipe.size)
    model = build(tok, recipe.seed).to(recipe.device)
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    optimizers = (
        Muon(inner, recipe.lr_matrices),
        torch.optim.AdamW(rest, lr=recipe.lr_rest, betas=(0.9, 0.98), weight_decay=0.0),
    )  # fmt: skip
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda n: min(1, (n + 1) / recipe.warmup) * max(0.01, 1 - n / recipe.steps),
        )
        for optimizer in optimizers
    ]
    state = folder / "state.pt"
    losses: list[float] = []
    if state.exists():
        held = torch.load(state, weights_only=True)
        model.load_state_dict(held["model"])
        for owner, kept in zip((*optimizers, *schedulers), held["others"], strict=True):
            owner.load_state_dict(kept)
        losses = held["losses"]
    progress = tqdm(range(len(losses), recipe.steps), initial=len(losses), total=recipe.steps)
    for step in progress:
        parts = list(batches(tok, recipe, step))
        whole = sum(float(learned.sum()) for _, learned in parts)
        total = 0.0
        for ids, learned in parts:
            logits = model(ids).logits[:, :-1]
            each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (each * learned[:, 1:].flatten()).sum() / whole
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for owner in (*optimizers, *schedulers):
            owner.step()
        model.zero_grad()
        losses.append(total)
        if len(losses) % recipe.checkpoint_every == 0 or len(losses) == recipe.steps:
            progress.set_postfix(loss=sum(losses[-50:]) / len(losses[-50:]))
            others = [owner.state_dict() for owner in (*optimizers, *schedulers)]
            held = {"model": model.state_dict(), "others": others, "losses": losses}
            beside = state.with_suffix(".writing")
            torch.save(held, beside)
            beside.replace(state)
    model.save_pretrained(folder)
    if not recipe.thinking:
        tok.chat_template = DIRECT
    tok.save_pretrained(folder)
    files.write(folder / "training.json", {
        "recipe": {k: str(v) for k, v in vars(recipe).items()}, "losses": losses,
        "accuracy": test(model, tok, recipe),
    })  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Recipe))
