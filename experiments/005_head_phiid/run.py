"""005 · Head PhiID

Which heads do their work together with other heads, and which alike? While a model goes on with a
prompt, every head's output has a length at every step. Integrated information decomposition (PhiID)
of each pair of these series gives its synergy (sts) and its redundancy (rtr). Do middle layers hold
the synergy, as published, and does that survive the nulls?
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lens_utils import prompts
from lens_utils.experiment import BaseConfig, Run, launch

if TYPE_CHECKING:
    import head_texts
    from torch import Tensor


@dataclass(frozen=True)
class Config(BaseConfig):
    template: Literal["text", "chat"] = "text"
    """Put the prompts as plain text, or in the model's chat template."""
    temperature: float = 0.0
    """0 always takes the likeliest token; above it, tokens are drawn."""
    steps: int = 0
    """Length of every series in tokens; 0 is 100 (a quick run takes 24)."""
    tau: int = 1
    """Steps between past and future."""
    atoms: str = ""
    """Atoms to keep of every pair beside sts and rtr, such as rts,xts; or all (sixteen)."""
    nodes: Literal["heads", "experts"] = "heads"
    """Whose outputs are measured; experts are those of a mixture model."""
    per_category: int = 0
    """Use only the first so many prompts of each category; 0 is all (a quick run takes two)."""
    checkpoints: str = ""
    """Training checkpoints as a series: revisions such as step1,step512,step143000, or folders."""


def main(cfg: Config, run: Run) -> None:
    import head_pairs as pair  # these need torch and pandas: --help does not wait for them
    import head_tables as table
    import head_texts as text

    atoms = pair.asked(cfg.atoms)
    asked = text.choose(prompts.load(__file__), cfg)
    families = [p.family for p in asked]
    session = text.Session(cfg, run, asked)
    if cfg.checkpoints:
        run.stage("checkpoints.json", session.checkpoints)
    # 1. Texts of one length, and the length of every head's output at every step.
    run.stage("asked.json", session.asked)
    nodes = run.stage("nodes.csv", lambda: session.nodes)
    conditions = run.stage("conditions.json", session.conditions)
    measured = {name: written(run, session, name) for name in conditions if name != "replayed"}
    own = measured["own"]["tokens"]
    measured["replayed"] = written(run, session, "replayed", own)
    texts = run.stage("texts.csv", lambda: text.describe(asked, measured, run.model()))
    # 2. Synergy and redundancy of all pairs of heads, and of heads that can share nothing.
    series = {name: found["norms"] for name, found in measured.items()}
    found = {}
    for name, norms in series.items():
        for measure in pair.measures(name, cfg.quick):
            found[name, measure] = run.stage(
                f"pairs_{name}_{measure}.safetensors",
                lambda x=norms, m=measure: pair.pairs(x, families, cfg.tau, m, run.track, atoms),
            )
    described = run.stage("described.csv", lambda: pair.describe(series, found, cfg.tau))
    noise = run.stage("noise.json", lambda: pair.floor(series["own"], cfg.tau, cfg.seed))
    # 3. Scores of heads, their course over the layers, and how far both can be trusted.
    layer, resamples = nodes.layer.to_numpy(), 200 if cfg.quick else 1000
    memory = pair.memory(series["own"].numpy(), cfg.tau)
    atoms = table.gather(found, memory["own"])
    run.stage("scores.csv", lambda: table.score_table(nodes, atoms, memory["lag"]))
    run.stage("profiles.csv", lambda: table.curves(atoms, families, layer, resamples, cfg.seed))
    shapes = run.stage(
        "shapes.csv", lambda: table.shapes(atoms, families, layer, resamples, cfg.seed)
    )
    reliable = run.stage("reliability.csv", lambda: table.reliability(atoms, families, cfg.seed))
    alike = run.stage("agreement.csv", lambda: table.agreement(atoms, layer))
    run.stage(
        "treatments.csv",
        lambda: pair.treatments(series["own"], layer, cfg.tau, cfg.quick, run.track),
    )
    # 4. The same at checkpoints of the training, each reading its own text and the model's.
    if cfg.checkpoints:
        names = session.checkpoint_names()
        parts = run.chunks(
            "checkpoints.safetensors",
            names,
            1,
            lambda part: pair.at_checkpoint(session.at_checkpoint(part[0], own), families, cfg.tau),
        )
        run.stage(
            "checkpoints.csv",
            lambda: table.by_checkpoint(parts, names, layer, resamples, cfg.seed),
        )
    run.stage(
        "summary.json",
        lambda: table.summarise(described, shapes, reliable, alike, texts, noise, nodes),
    )


def written(run: Run, session: head_texts.Session, name: str, own: Tensor | None = None) -> dict:
    """The stage of one condition, twenty prompts at a time."""
    every = range(len(session.prompts))
    return run.chunks(
        f"series_{name}.safetensors", every, 20, lambda at: session.measure(name, at, own)
    )


if __name__ == "__main__":
    launch(Config, main)
