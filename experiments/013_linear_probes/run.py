"""013 · Linear probes

Which ability does a question about a maze ask for, and is the path it shows a solution: can that be
read from the residual stream by a plane, at which layer and which token, and does it carry over to
wordings, mazes and tasks that the probe has not seen? Every accuracy stands beside what the words
alone, random labels, an untrained model and a token before the question reach.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("010_maze_tasks", "011_domain_neurons")


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    max_samples: int = 0
    """Use so many questions of each task and mode; 0 is all."""
    key_layers: str = ""
    """Blocks to read behind, such as 1,2; empty is all. The embedding and the last are always."""
    folds: int = 3
    """Parts of the mazes; each is held out once (a quick run: 2)."""
    penalty: float = 1.0
    """L2 penalty of the standardised weights: 1/C of scikit-learn."""
    controls: int = 2
    """Control tasks drawn for every label (a quick run: 1)."""
    permutations: int = 40
    """Deals of the labels to wordings, for the cosines of directions (a quick run: 10)."""
    use_thinking_states: bool = True
    """Probe the thinking span too, where the model has a thinking mode."""
    use_dape: bool = True
    """Probe the neurons that 011 found specialised."""
    random_sets: int = 20
    """Random sets of as many neurons (a quick run: 3)."""


def main(cfg: Config, run: Run) -> None:
    import probe_analyses as analyse  # these need torch: --help does not wait for them
    import probe_design as plan
    import probe_measure as measure
    import probe_summary as summary
    import probe_tables as table

    held = plan.at_most(run.upstream("010_maze_tasks", "records.json"), cfg.max_samples)
    replies = run.upstream("010_maze_tasks", "replies.csv")
    gate = run.upstream("010_maze_tasks", "gate.json")
    run.stage("gate.csv", lambda: summary.gate_table(gate))
    passed = summary.passing(gate)
    if not passed:  # nothing to be read from a model that cannot do it
        run.stage("summary.json", lambda: summary.verdict(gate))
        return
    # 1. The questions, and the residual stream at their sites, in one pass each.
    asked = {"direct": measure.direct(held)}
    spans, without = measure.thinking(held, replies) if cfg.use_thinking_states else ([], 0)
    if spans:
        asked["thinking"] = spans
    if judged := plan.judged(held, cfg.seed):
        asked["judge"] = [measure.Asked(record) for record in judged]
    study = measure.Study(cfg, run, asked)
    # 2. All probes of a set in one solve: layers, sites, labels, folds, controls.
    sets = [study.solved(name) for name in asked]
    # 3. Baselines: the words alone, and the same network untrained.
    sets += study.baselines()
    neurons = run.stage("dape.csv", study.on_dape)
    # 4. The analyses, by name.
    tables = {"dape": neurons}
    for name, compute in {
        "performance": lambda: table.standard_performance(sets, cfg.seed),
        "peaks": lambda: table.peaks(sets, cfg.seed),
        "bits": lambda: table.code_length(sets),
        "confidence": lambda: analyse.confidence_analysis(sets),
        "calibration": lambda: analyse.calibration(sets),
        "weight_pca": lambda: analyse.weight_pca(sets, cfg.seed),
        "errors": lambda: analyse.error_analysis(sets),
        "wordings": lambda: analyse.by_wording(sets),
        "transfer": lambda: analyse.cross_task_generalization(sets, cfg.seed),
        "crossed": lambda: table.crossed(sets),
        "cosines": lambda: table.directions(sets),
        "flow": lambda: analyse.information_flow(sets, cfg.seed),
        "integration": lambda: analyse.integration(tables["performance"]),
        "criticality": lambda: analyse.layer_criticality(tables["performance"]),
        "left_out": lambda: table.left_out(sets),
    }.items():
        tables[name] = run.stage(f"{name}.csv", compute)
    # 5. The study's schema, and the numbers of the findings.
    n_layers = study.model.n_layers
    run.stage("probe_results.json", lambda: summary.results(cfg.model, tables, passed, n_layers))
    counts = study.counts(sets) | {"thinking questions without a finished trace": without}
    run.stage("summary.json", lambda: summary.summarise(tables, passed, counts))


if __name__ == "__main__":
    launch(Config, main)
