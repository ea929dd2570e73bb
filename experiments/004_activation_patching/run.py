"""004 · Activation patching

Which activations carry a fact from the word that names it to the place where it is said? One part
of a run is replaced by that of a run with another answer, or taken away: the residual stream, the
attention, the MLPs, every head, its inputs, and attention between classes of tokens. Are the heads
found in this way those that 002 sees reading the entity and 003 credits with the answer? And how
few edges between heads and MLPs keep the answer?
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("002_attention_patterns", "003_logit_attribution")


@dataclass(frozen=True)
class Config(BaseConfig):
    pairs: int = 8
    """Pairs of each capital wording for the sweeps over layers and positions (quick: 2)."""
    head_pairs: int = 6
    """Pairs of each capital wording for the sweeps over heads; the heads they choose are tested on
    other pairs (quick: 2)."""
    other_pairs: int = 4
    """Pairs of every other task for either sweep (quick: 2)."""
    more_pairs: int = 16
    """Pairs of each wording, at most, for everything that is not a sweep (quick: 2)."""
    induction: int = 24
    """Pairs of repeated random tokens; has to be what 002 has."""


def main(cfg: Config, run: Run) -> None:
    import circuit_readings as circuit  # these need torch and pandas: --help does not wait for them
    import circuit_tables
    import patch_circuits as wired
    import patch_readings as read
    import patch_summary
    import patch_tables as table

    screened = run.upstream("002_attention_patterns", "pairs.csv")
    attended = run.upstream("002_attention_patterns", "heads.csv")
    attributed = run.upstream("003_logit_attribution", "heads.csv")
    session = read.Session(cfg, run, screened)
    tokens = run.stage("tokens.csv", session.tokens)
    # 1. One part replaced, by layer and position; every head replaced or taken away.
    residual = run.chunks("residual.parquet", session.residual_jobs(), 1, session.sweep)
    positions = run.stage("positions.csv", lambda: table.by_position(residual, tokens))
    moved = run.stage("crossings.csv", lambda: table.crossings(residual, tokens))
    swept = run.chunks("head_sweep.parquet", session.head_jobs(), 1, session.sweep)
    heads = run.stage("heads.csv", lambda: table.by_head(swept))
    blank = run.stage("untrained.parquet", session.sweep_untrained)
    twin = run.stage("untrained.csv", lambda: table.untrained(blank, swept))
    # 2. The strongest heads on pairs that had no part in choosing them: alone, by their inputs,
    # and together against random sets.
    top = run.stage("top_heads.csv", lambda: table.top_heads(swept))
    inputs = run.chunks("inputs.parquet", session.wordings(), 1, session.inputs(top))
    alone = run.stage("confirmed.csv", lambda: table.confirmed(inputs))
    groups = run.chunks("sets.parquet", session.wordings(), 1, session.sets(top))
    sets = run.stage("sets.csv", lambda: table.set_effects(groups))
    # 3. Attention between classes of tokens removed, in windows of layers.
    removed = run.chunks("knockout.parquet", session.wordings(), 1, session.knockout)
    cuts = run.stage("knockout.csv", lambda: table.cut_effects(removed))
    # 4. What gradients guess against what patching finds; edges between heads and MLPs, one at a
    # time, and the fewest that keep the answer, chosen on some pairs and run on others.
    guesses = run.chunks("guesses.parquet", circuit.guessed(session), 1,
                         circuit.guesses(session, swept))  # fmt: skip
    run.stage("guessed_nodes.csv", lambda: wired.nodes(guesses))
    fits = run.stage("guess_fits.csv", lambda: wired.fits(guesses, cfg.seed))
    run.stage("misses.csv", lambda: circuit_tables.misses(guesses))
    receivers = [w for w in circuit.PATHS if w in session.wordings()]
    paths = run.chunks("paths.parquet", receivers, 1, circuit.paths(session, top))
    routes = run.stage("routes.csv", lambda: wired.routes(paths))
    wordings = circuit.wired(session)
    scores = run.chunks("edge_scores.safetensors", wordings, 1, circuit.edge_scores(session))
    run.stage("edges.csv", lambda: circuit.strongest_edges(session, scores))
    kept = run.chunks("circuits.parquet", wordings, 1, circuit.faithfulness(session, scores))
    circuits = run.stage("circuits.csv", lambda: wired.circuits(kept))
    needed = run.stage("needed.csv", lambda: circuit_tables.needed(kept, cfg.seed))
    # 5. The three experiments on one table: do they name the same heads?
    joint = run.stage("joint.csv", lambda: table.joint(swept, attended, attributed))
    related = run.stage("correlations.csv", lambda: table.correlations(joint, cfg.seed))
    tables = {
        "tokens": tokens, "positions": positions, "crossings": moved, "heads": heads,
        "untrained": twin, "top_heads": top, "confirmed": alone, "sets": sets, "knockout": cuts,
        "guess_fits": fits, "routes": routes, "circuits": circuits, "needed": needed,
        "correlations": related,
    }  # fmt: skip
    run.stage("summary.json", lambda: patch_summary.summarise(tables, cfg.seed))


if __name__ == "__main__":
    launch(Config, main)
