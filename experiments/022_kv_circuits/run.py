"""022 · K/V circuits

How few key and value channels does a behaviour need? Channels are replaced by their means, and
masks of exactly the asked size are ranked by gradients or learned so that the model's predictions
stay: of text, and of two tasks. Everything is measured hard and on held-out examples, against the
model itself, random masks, nonsense targets and untrained weights. Findings: analyses.md beside
this file.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from lens_utils.errors import BadInput
from lens_utils.experiment import BaseConfig, Run, launch


@dataclass(frozen=True)
class Config(BaseConfig):
    datasets: str = "docstrings,induction,agreement"
    """Corpora (wiki, sotu, docstrings, code, pydoc, reasoning, a text file) and tasks (ioi,
    induction, agreement, arithmetic), divided by commas."""
    tokens: str = ""
    """A file of token ids (.npy, or .bin of uint16 as nanoGPT writes it), instead of a corpus."""
    n_head: int = 0
    """Heads of a checkpoint that does not say it; 0 asks the checkpoint."""
    activation: str = ""
    """Its GELU (gelu, gelu_new, relu), where it does not say it either."""
    target_sparsity: float = 0.8
    """Share of units switched off in the masks that are looked at closely; always a sparsity."""
    sparsities: str = "0.5,0.8,0.95"
    """The sweep."""
    steps: int = 100
    """Of learning a mask."""
    lr: float = 0.01
    """Adam's learning rate; scores lie between 0 and 1."""
    method: Literal["topk", "hard_concrete", "continuous", "original"] = "topk"
    """How masks are learned (lens_utils/kv_learn.py)."""
    objective: Literal["kl", "lm"] = "kl"
    """Stay close to the model, or (historical) to the text."""
    fill: Literal["mean", "zero", "resample", "learned"] = "mean"
    """What takes the place of a channel that is off."""
    resolution: Literal["kv", "query", "head"] = "kv"
    """Units of KV heads, of query heads, or one gate per KV head."""
    keys: Literal["pairs", "single"] = "pairs"
    """Key channels by rotary pairs, or one by one."""
    tied: bool = False
    """One gate for the key and the value channel of a number, for models with K = V."""
    basis: Literal["raw", "pca"] = "raw"
    """Value channels as they are, or principal components of each KV head."""
    keep_first: bool = False
    """Leave the first position unmasked."""
    seeds: int = 3
    """Masks learned at the target sparsity; elsewhere one."""
    examples: int = 160
    """Rows of the fit split."""
    length: Annotated[int, "Tokens of a document."] = 64
    controls: bool = True
    """Measure nonsense targets, untrained weights, single groups and single units, too."""

    @property
    def names(self) -> list[str]:
        """The data sets; a quick run has the first and the last. Raises BadInput without any."""
        names = ["tokens"] if self.tokens else [n for n in self.datasets.split(",") if n]
        if not names:
            raise BadInput("--datasets is empty: name a corpus or a task")
        return [names[0], names[-1]] if self.quick and len(names) > 2 else names

    @property
    def sweep(self) -> list[float]:
        """Sparsities in order, the target among them. Raises BadInput outside (0, 1)."""
        try:
            sweep = sorted({self.target_sparsity, *map(float, filter(None, self.sweep_of))})
        except ValueError:
            raise BadInput(f"--sparsities {self.sparsities}: write numbers as 0.5,0.8") from None
        if wrong := [s for s in sweep if not 0 < s < 1]:
            raise BadInput(f"sparsity {wrong[0]:g}: the share switched off lies between 0 and 1")
        return sweep

    @property
    def sweep_of(self) -> list[str]:
        """The sweep as it was written; a quick run has the target only."""
        return [] if self.quick else self.sparsities.split(",")


def main(cfg: Config, run: Run) -> None:
    names, _ = cfg.names, cfg.sweep  # a wrong number stops here, not after an hour
    import kv_results as results
    from kv_study import CONTROLS, Study

    study = Study(cfg, run)
    about = run.stage("examples.json", lambda: {name: study.describe(name) for name in names})
    scores = run.chunks("rankings.safetensors", names, 1, study.rank)["scores"]
    plain = run.chunks("baselines.parquet", names, 1, lambda n: study.baselines(n[0], scores))
    jobs = study.jobs(plain)
    learned = run.chunks("learned.safetensors", jobs, 1, lambda j: study.learn(j[0], scores))
    masks = run.stage("masks.parquet", lambda: study.measure(jobs, learned))
    matrix = run.stage("matrix.csv", lambda: study.matrix(jobs, learned))
    run.stage("history.csv", lambda: results.histories(jobs, learned))
    table = run.stage("frontier.csv", lambda: results.frontier(plain, masks, about))
    layers = run.stage("layers.csv", lambda: results.layers(study.units, jobs, learned))
    overlap = run.stage("overlap.csv", lambda: results.overlaps(study.units, jobs, learned))
    groups = units = controls = None
    if cfg.controls:
        groups = run.stage("groups.csv", lambda: study.without_groups(jobs, learned))
        units = run.stage("units.csv", lambda: study.single_units(scores))
        some = [(n, k) for n in names[: 1 if cfg.quick else None] for k in ("model", *CONTROLS)]
        controls = run.chunks(
            "controls.csv", some, 1, lambda c: study.controls(*c[0], jobs, learned, scores)
        )
    found = run.stage(
        "metrics.json",
        lambda: results.metrics(cfg, study, about, table, masks, plain, overlap, groups, controls),
    )
    run.stage(
        "summary.json",
        lambda: results.summarise(cfg, found, table, matrix, overlap, layers, units),
    )


if __name__ == "__main__":
    launch(Config, main)
