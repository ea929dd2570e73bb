"""016 · Ability synthesis

Do neurons, ablated layers and probes point at the same layers for solving a maze, judging a path
and drawing a maze, do the three abilities lie at different depths, and what does thinking change?
Everything is computed from the tables of 010 to 015; every sentence of the report follows from
numbers and can say that a claim is not supported, or not testable on this model.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = (
    "010_maze_tasks",
    "011_domain_neurons",
    "012_layer_ablation",
    "013_linear_probes",
    "014_thinking_traces",
    "015_concept_circuits",
)


@dataclass(frozen=True)
class Config(BaseConfig):
    model: str = "maze-organism"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    top: int = 5
    """Layers in a method's list of best ones; never more than half of the model's."""


def main(cfg: Config, run: Run) -> None:
    import synthesis_checks as checkpoints  # these need pandas: --help does not wait for them
    import synthesis_claims as claims
    import synthesis_inputs as inputs
    import synthesis_report as report
    import synthesis_tables as table

    # 1. Abilities above chance; where there is none, nothing is claimed.
    gate = run.upstream("010_maze_tasks", "gate.json")
    gates = run.stage("gate.csv", lambda: inputs.gate_table(gate))
    abilities = inputs.passing(gate)
    if not abilities:
        run.stage("summary.json", lambda: report.gated(gates))
        return
    # 2. What the other experiments found, in tables of one form.
    held = inputs.gather(run)
    run.stage("measured.csv", held.measured)
    curves = run.stage("curves.csv", held.curves)
    lists = run.stage("lists.csv", lambda: held.lists(cfg.top))
    accuracy = run.stage("accuracy.csv", held.accuracy)
    run.stage("turns.csv", lambda: table.turns(curves))
    # 3. Do the methods agree on layers, at what depth does each ability lie, and what does
    #    thinking change, paired by maze?
    tables = {
        name: run.stage(f"{name}.csv", compute)
        for name, compute in {
            "agreement": lambda: table.agreement(curves, cfg.seed),
            "overlap": lambda: table.overlap(lists),
            "depths": lambda: table.depths(curves, cfg.seed),
            "gaps": lambda: table.gaps(curves, cfg.seed),
            "modes": lambda: table.modes(accuracy, cfg.seed),
            "traces": lambda: table.traces(held.tables["answers"], cfg.seed),
        }.items()
    }
    # 4. Claims and checkpoints, from these numbers only.
    findings = run.stage("findings.csv", lambda: claims.findings(abilities, gates, tables, held))
    checks = run.stage("checkpoints.csv", lambda: checkpoints.table(held, tables["overlap"]))
    # 5. The report, for programs and for readers.
    run.stage(
        "synthesis_results.json",
        lambda: report.results(cfg.model, abilities, curves, lists, findings, tables),
    )
    pages = report.sections(cfg.model, gates, findings, checks, tables)
    run.stage("SYNTHESIS_REPORT.md", lambda: report.markdown(pages))
    run.stage("SYNTHESIS_REPORT.txt", lambda: report.text(pages))
    run.stage("summary.json", lambda: report.summarise(tables, findings, checks))


if __name__ == "__main__":
    launch(Config, main)
