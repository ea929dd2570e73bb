"""What the tests of experiment 008 share: its modules, a table of scores, a few words to ask."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from lens_utils import provenance
from lens_utils.__main__ import load
from lens_utils.prompts import Prompt
from lens_utils.registry import ModelSpec

SOURCE = provenance.EXPERIMENTS / "008_math_perturbation" / "run.py"
RUN = load(SOURCE.parent)

import noise_benchmark as bench  # noqa: E402, F401  (`load` makes them importable)
import noise_plan as plan  # noqa: E402, F401
import noise_scores as measure  # noqa: E402, F401
import noise_tables as table  # noqa: E402, F401

SPEC = ModelSpec("tiny", "tiny")
WORDS = [
    Prompt(f"{set}-{family}-{n}", text, answer, set=set, family=family)
    for family, set, lines in (
        ("animals", "shots", [("the cat", " ran"), ("a dog", " sat")]),
        ("animals", "items", [("the dog", " ran"), ("a cat", " sat"), ("the red dog", " ran")]),
        ("things", "shots", [("the hat", " is red")]),
        ("things", "items", [("the mat", " is big"), ("a hat", " is red")]),
        ("worked", "worked", [("w1 w2", " w3")]),
    )
    for n, (text, answer) in enumerate(lines)
]


def settings(**changed) -> SimpleNamespace:
    """The settings of experiment 008."""
    return SimpleNamespace(**vars(RUN.Config(**changed)))


def made_up(n_layers: int = 3, n_heads: int = 4) -> pd.DataFrame:
    """A table as 005 writes it; the score rises with the layer."""
    at = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    scores = pd.DataFrame(at, columns=["layer", "head"])
    rng = np.random.default_rng(0)
    return scores.assign(value_diff=scores.layer + 0.5 * rng.random(len(at)), balance=0.5)
