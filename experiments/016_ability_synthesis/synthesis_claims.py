"""The claims of the study, each with the verdict that its numbers give."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from synthesis_inputs import ABILITIES, Held
from synthesis_tables import BY_GAIN, TOGETHER, estimate, first

from lens_utils import synthesis
from lens_utils.stats import Estimate
from lens_utils.synthesis import Finding, Verdict

LAYERS = "Convergent critical layers"
HIERARCHY = "Hierarchical specialisation"
THINKING = "Impact of thinking"
CONCEPTS = "Concepts and circuits"
SECTIONS = (LAYERS, HIERARCHY, THINKING, CONCEPTS)


def findings(
    abilities: list[str],
    gates: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    held: Held,
) -> pd.DataFrame:
    """Every claim; one about an ability at chance is not testable, whatever its numbers say."""
    closed = {a: closed_because(gates, a) for a in ABILITIES if a not in abilities}
    found = [
        *_agreement(closed, tables["agreement"]),
        *_overlap(closed, tables["overlap"]),
        *_depth(closed, tables["gaps"]),
        *_needs(closed, held.tables["head pairs"]),
        *_dissociated(closed, held.tables),
        *_thinking(closed, tables["modes"]),
        *_traces(closed, tables["traces"]),
        *_concepts(closed, held.tables),
    ]
    return pd.DataFrame(
        [
            {
                "section": f.section,
                "claim": f.claim[0].upper() + f.claim[1:],
                "verdict": f.verdict,
                "because": f.because,
            }
            for f in found
        ]
    )


def closed_because(gates: pd.DataFrame, ability: str) -> str:
    """Why nothing is claimed of an ability."""
    rows = gates[gates.ability == ability]
    if rows.empty:
        return "it was not asked"
    said = [
        f"{r.mode} {r.accuracy:.2f} [{r.low:.2f}, {r.high:.2f}] against chance {r.chance:.2f}"
        for r in rows.itertuples()
    ]
    return f"not above chance: {'; '.join(said)}"


def _gated(closed: Mapping[str, str], section: str, said: str, *needed: str) -> Finding | None:
    """The finding that the gate makes, where one of the abilities is at chance."""
    for ability in needed:
        if ability in closed:
            return synthesis.untestable(section, said, f"{ability} is {closed[ability]}")
    return None


def _agreement(closed: Mapping[str, str], table: pd.DataFrame) -> Iterator[Finding]:
    for ability in ABILITIES:
        for methods, said in (
            (TOGETHER, f"The methods agree on how much each layer has to do with {ability}"),
            (BY_GAIN, f"They agree on {ability} when probes count by what each layer adds"),
        ):
            if gate := _gated(closed, LAYERS, said, ability):
                yield gate
                continue
            row = first(table, ability=ability, methods=methods)
            if row is None or math.isnan(row.rho):
                reason = "fewer than two methods have a curve that varies over depth"
                yield synthesis.untestable(LAYERS, said, reason)
                continue
            because = (
                f"mean rank correlation {row.rho:.2f} over {row.n_methods} curves, circular "
                f"shifts p {row.p:.3f}, q over abilities {row.q:.3f}, the smallest possible p is "
                f"{row.floor:.3f}"
            )
            yield Finding(LAYERS, said, synthesis.by_p(row.q, row.floor, row.rho), because)


def _overlap(closed: Mapping[str, str], table: pd.DataFrame) -> Iterator[Finding]:
    for ability in ABILITIES:
        said = f"The methods list the same best layers for {ability}"
        if gate := _gated(closed, LAYERS, said, ability):
            yield gate
            continue
        row = first(table, ability=ability, methods=TOGETHER)
        if row is None:
            yield synthesis.untestable(LAYERS, said, "fewer than two methods list a layer")
            continue
        because = (
            f"{row.n_methods} lists of {row.lengths.replace(' ', ', ')} share {row.shared} "
            f"({row.layers}), by chance {row.expected:.1f}; hypergeometric p {row.p:.3f}, "
            f"the smallest possible is {row.floor:.3f}"
        )
        yield Finding(LAYERS, said, synthesis.by_p(row.q, row.floor), because)


def _depth(closed: Mapping[str, str], table: pd.DataFrame) -> Iterator[Finding]:
    parts: list[Verdict] = []
    for shallow, deep in (("recognize", "generate"), ("generate", "solve")):
        said = f"{deep} lies deeper than {shallow}"
        row = first(table, shallow=shallow, deep=deep, methods=TOGETHER)
        if gate := _gated(closed, HIERARCHY, said, shallow, deep):
            found = gate
        elif row is None or row.n == 0:
            found = synthesis.untestable(HIERARCHY, said, "no method has both curves")
        else:
            found = _over_methods(said, row, table)
        parts.append(found.verdict)
        yield found
    said = "The abilities follow each other in depth: recognize, generate, solve"
    yield Finding(HIERARCHY, said, synthesis.all_of(parts), "of the two steps: " + ", ".join(parts))


def _over_methods(said: str, row: Any, table: pd.DataFrame) -> Finding:
    """The claim about the mean over methods, which no single method may contradict."""
    found = synthesis.claim(HIERARCHY, said, estimate(row), "points of depth")
    each = table[(table.shallow == row.shallow) & (table.deep == row.deep)]
    each = each[each.methods != TOGETHER]
    verdicts = [synthesis.by_interval(estimate(r)) for r in each.itertuples()]
    because = f"{found.because}; by method " + ", ".join(
        f"{r.methods} {r.value:.1f}" for r in each.itertuples()
    )
    split = {"supported", "contradicted"} <= set(verdicts)
    return Finding(HIERARCHY, said, "not supported" if split else found.verdict, because)


def _needs(closed: Mapping[str, str], pairs: pd.DataFrame | None) -> Iterator[Finding]:
    """012: the heads that the lower ability needs most, taken from the upper one."""
    for lower, upper in (("recognize", "generate"), ("recognize", "solve"), ("generate", "solve")):
        said = f"{upper} needs the heads that {lower} needs, and not the reverse"
        if gate := _gated(closed, HIERARCHY, said, lower, upper):
            yield gate
            continue
        row = first(pairs, lower=lower, upper=upper, choice="needed")
        if row is None:
            yield synthesis.untestable(HIERARCHY, said, "012 has no such pair")
            continue
        verdict: Verdict = "supported" if row.hierarchy else "not supported"
        if row.asymmetry_high < 0:
            verdict = "contradicted"
        because = (
            f"asymmetry {row.asymmetry:.2f} [{row.asymmetry_low:.2f}, "
            f"{row.asymmetry_high:.2f}], against random heads of the same layers "
            f"p {row.cross_p:.3f}, n {row.n}"
        )
        yield Finding(HIERARCHY, said, verdict, because)


def _dissociated(
    closed: Mapping[str, str], tables: Mapping[str, pd.DataFrame | None]
) -> Iterator[Finding]:
    """Double dissociations: heads (012) and specialised neurons (011)."""
    heads, neurons = tables["head pairs"], tables["neuron pairs"]
    for one, other in (("recognize", "generate"), ("recognize", "solve"), ("generate", "solve")):
        for what in ("heads", "neurons"):
            said = f"{one} and {other} rest on {what} of their own"
            if gate := _gated(closed, HIERARCHY, said, one, other):
                yield gate
                continue
            if what == "heads":
                row = first(heads, lower=one, upper=other, choice="own")
                ends = ("own_lower_low", "own_lower_high", "own_upper_low", "own_upper_high")
            else:
                row = first(neurons, a=one, b=other, ablation="mean")
                ends = ("low_a", "high_a", "low_b", "high_b")
            if row is None:
                reason = f"{'012' if what == 'heads' else '011'} has no such pair"
                yield synthesis.untestable(HIERARCHY, said, reason)
                continue
            low, high, low_other, high_other = (float(getattr(row, end)) for end in ends)
            parts: list[Verdict] = [
                "supported" if lo > 0 else "contradicted" if hi < 0 else "not supported"
                for lo, hi in ((low, high), (low_other, high_other))
            ]
            because = (
                f"nats that its own set costs more than the other's: {one} [{low:.3g}, "
                f"{high:.3g}], {other} [{low_other:.3g}, {high_other:.3g}]"
            )
            yield Finding(HIERARCHY, said, synthesis.all_of(parts), because)


def _thinking(closed: Mapping[str, str], modes: pd.DataFrame) -> Iterator[Finding]:
    for ability in ABILITIES:
        said = f"Thinking makes {ability} more often right"
        row = first(modes, ability=ability, measure="thinking less direct")
        if gate := _gated(closed, THINKING, said, ability):
            yield gate
        elif row is None:
            yield synthesis.untestable(THINKING, said, "the model has one mode only")
        else:
            yield synthesis.claim(THINKING, said, estimate(row), "points, paired by maze")


def _traces(closed: Mapping[str, str], traces: pd.DataFrame) -> Iterator[Finding]:
    """014: answers to traces that were put into the model's mouth, paired by maze."""
    for ability in ABILITIES:
        for condition, measure, said, unit in (
            ("empty", "right", f"Without its trace {ability} is less often right", "points lost"),
            (
                "other maze's trace",
                "follows",
                f"Most answers to {ability} follow the trace of another maze",
                "points above half",
            ),
        ):
            row = first(traces, ability=ability, condition=condition, measure=measure)
            if gate := _gated(closed, THINKING, said, ability):
                yield gate
            elif row is None:
                reason = "014 has no such answers: it needs a thinking mode above chance"
                yield synthesis.untestable(THINKING, said, reason)
            else:
                yield synthesis.claim(THINKING, said, estimate(row), unit)


def _concepts(
    closed: Mapping[str, str], tables: Mapping[str, pd.DataFrame | None]
) -> Iterator[Finding]:
    """015: concepts of cells, the edges between their neurons, and what answers need of them."""
    concepts, edges, behaviour = (tables[n] for n in ("concepts", "edges", "behaviour"))
    if concepts is None:
        said = "Concepts of cells are represented beyond the input"
        yield synthesis.untestable(CONCEPTS, said, "015 stopped at the gate")
        return
    for row in concepts[~concepts.trivial].itertuples():
        concept = row.concept.replace("_", " ")
        said = f"{concept} can be read beyond an untrained model and a bag of tokens"
        null = max(row.untrained, row.bag)
        above = Estimate(
            value=row.auroc - null, low=row.low - null, high=row.high - null, n=int(row.n)
        )
        yield synthesis.claim(CONCEPTS, said, above, f"AUROC above {null:.2f}")
        lost = first(behaviour, concept=row.concept, task="solve")
        said = f"Answers to solve need the neurons of {concept} more than random ones"
        if gate := _gated(closed, CONCEPTS, said, "solve"):
            yield gate
            continue
        if lost is None:
            yield synthesis.untestable(CONCEPTS, said, "015 found no such neurons or answers")
            continue
        cost = Estimate(
            value=lost.excess_value, low=lost.excess_low, high=lost.excess_high, n=int(lost.n)
        )
        found = synthesis.claim(CONCEPTS, said, cost, "nats")
        because = f"{found.because}; p {lost.p:.3f} among {lost.sets} random sets"
        alone = found.verdict == "supported" and lost.p > synthesis.LEVEL
        yield Finding(CONCEPTS, said, "not supported" if alone else found.verdict, because)
    said = "Concepts' neurons move those of later layers more than random sets do"
    if edges is None or edges.empty:
        yield synthesis.untestable(CONCEPTS, said, "015 asked no edge")
    else:
        kept = int(edges.kept.sum())
        because = f"{kept} of {len(edges)} causal edges kept at q < 0.05"
        yield Finding(CONCEPTS, said, "supported" if kept else "not supported", because)
