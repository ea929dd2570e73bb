"""Traces: how much faster are many questions answered together than one after the other?

The organism thinks and answers 64 held-out questions, in one batch and singly, CPU seconds of one
thread. The replies are compared.

    .venv/bin/python benchmarks/trace_generation.py
"""

import random
import time

import torch

from lens_utils import generate, maze_prompts, maze_tasks, mazes
from lens_utils.models import load_model

QUESTIONS, MOST = 64, 120


def main() -> None:
    torch.set_num_threads(1)
    model = load_model("maze-organism", device="cpu")
    rng = random.Random(0)
    rows = []
    for n in range(QUESTIONS):
        task = maze_tasks.ABILITIES[n % 3]
        record = maze_tasks.ask(rng, mazes.tree_maze(rng, 5, True), task, n % 4, True, test=True)
        assert record is not None
        rows.append(maze_prompts.encode(model, record))

    def answers(size: int) -> tuple[list[list[int]], float]:
        start = time.process_time()
        said = [
            [step.id for step in answer]
            for at in range(0, QUESTIONS, size)
            for answer in generate.answers(
                model, rows[at : at + size], max_new_tokens=MOST, top_k_shown=1
            )
        ]
        return said, time.process_time() - start

    answers(QUESTIONS)
    (together, fast), (singly, slow) = answers(QUESTIONS), answers(1)
    same = sum(a == b for a, b in zip(together, singly, strict=True))
    n_tokens = sum(map(len, singly))
    print(f"{QUESTIONS} questions, {n_tokens} tokens: {n_tokens / fast:.0f} against "
          f"{n_tokens / slow:.0f} tokens per CPU s, {slow / fast:.1f} times as fast; "
          f"{same} replies are the same")  # fmt: skip


if __name__ == "__main__":
    main()
