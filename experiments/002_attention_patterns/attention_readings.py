"""What experiment 002 measures with the model at hand: patterns and what they move."""

from functools import cached_property
from pathlib import Path

import pandas as pd

from lens_utils import pairs, prompts
from lens_utils.experiment import Run
from lens_utils.models import LoadedModel
from lens_utils.pairs import Pair

HERE = str(Path(__file__))


class Session:
    """The model and its pairs, loaded when the first missing stage needs them."""

    def __init__(self, cfg, run: Run) -> None:
        self.cfg, self.run = cfg, run

    @cached_property
    def model(self) -> LoadedModel:
        return self.run.model()

    @cached_property
    def made(self) -> tuple[list[Pair], dict[str, str]]:
        """Every pair of this model, and why prompts were left out."""
        made, reasons = pairs.pairs(self.model, prompts.load(HERE))
        return made + pairs.induction(self.model, self.cfg.induction, seed=self.cfg.seed), reasons

    # 1. The pairs

    def screen(self) -> pd.DataFrame:
        """One row per pair: logit differences, probability and rank of the answer, `known`."""
        return pairs.screen(self.model, self.made[0])

    def left_out(self) -> dict[str, str]:
        """Prompts this model could not be asked, with the reason."""
        return self.made[1]
