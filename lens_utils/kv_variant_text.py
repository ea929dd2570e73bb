"""A comparison of variants in words: key findings and the page of tables.

Findings keep the form that their readers know, one variant against the baseline at a time; every
difference is said with its uncertainty, or called similar or undecided.
"""

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import pandas as pd

from lens_utils.kv_runs import number, page_table, pooled_sd

NO_ERROR_BAR = "undecided: one seed each, no error bar"
LARGEST = 3


def findings(
    found: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping[str, Any]], notes: list[str]
) -> str:
    """The key findings as plain text: each variant against the baseline, which is the first."""
    first, *others = found["overall"].variant
    of = metrics[first]
    head = f"KEY FINDINGS: {', '.join(others)} against {first}"
    lines = [
        head, "=" * len(head),
        f"{of['dataset']}, target sparsity {100 * of['target_sparsity']:.4g}%, held-out examples, "
        "hard masks. ± is the sd over seeds; similar: below 2 pooled sd.",
    ]  # fmt: skip
    for name in others:
        lines += [
            "",
            f"{name} against {first}",
            *(f"- {said}" for said in _pair(found, first, name)),
        ]
    shared = [*_full_models(found["overall"]), *(f"Settings differ: {note}." for note in notes)]
    if shared:
        lines += ["", "To keep in mind", *(f"- {said}" for said in shared)]
    return "\n".join(lines) + "\n"


def page(
    found: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping[str, Any]], text: str
) -> str:
    """The comparison as markdown: overall numbers, findings, sparsity per layer."""
    overall, layers = found["overall"], found["per_layer"]
    names = list(overall.variant)
    of = metrics[names[0]]
    lines = [
        "# Variant comparison", "",
        f"{of['dataset']}, target sparsity {100 * of['target_sparsity']:.4g}%; the baseline is "
        f"{names[0]}. ± is the sd over seeds.", "", "## Overall", "",
        *page_table(
            ("Variant", "Loss Degradation", "Sparsity Achieved", "Bits/Byte"),
            [(r.variant, pm(r.loss_degradation, r.loss_degradation_sd, "+.2f", "%"),
              number(100 * r.sparsity, ".1f") + "%", pm(r.bits_per_byte, r.bits_per_byte_sd, ".4f"))
             for r in overall.itertuples()],
        ), "",
        *page_table(
            ("Variant", "Model", "Layers", "Seeds", "Full Model's CE", "KL", "Faithfulness",
             "Top-1 Agreement"),
            [(r.variant, r.model, r.n_layers, r.n_seeds, number(r.full_ce, ".4f"),
              pm(r.kl, r.kl_sd), pm(r.faithfulness, r.faithfulness_sd), pm(r.top1, r.top1_sd))
             for r in overall.itertuples()],
        ), "",
        "Loss degradation is relative to each variant's own full model; CE and KL are nats per "
        "token, and faithfulness is 1 - KL(mask)/KL(nothing kept).", "",
        "## Key findings", "", "```", text.rstrip(), "```", "",
        "## Sparsity per layer", "",
    ]  # fmt: skip
    header = ["Layer", *(f"{name} Sparsity" for name in names)]
    header += ["Delta"] if len(names) == 2 else [f"{name} Delta" for name in names[1:]]
    for part, title in (("KV", "K and V together"), ("K", "K"), ("V", "V")):
        rows = layers[layers.part == part]
        lines += [f"### {title}", "", *page_table(header, _layer_rows(rows, names)), ""]
    lines += ["Deltas are points of sparsity; * marks those beyond 2 pooled sd over seeds."]
    if overall.n_layers.nunique() > 1:
        lines += ["", "Depths differ: a row shows the layers at the same relative depth, in the "
                  f"order {' / '.join(names)}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def pm(value: Real, sd: Real, form: str = ".3f", unit: str = "") -> str:
    """A mean and its sd, where it has one."""
    if number(value) == "not measured":
        return number(value)
    text = f"{value:{form}}{unit}"
    return text if math.isnan(sd) else f"{text} ± {sd:{form.lstrip('+')}}"


def less_or_more(points: Real, form: str = ".1f") -> str:
    """A difference in points of sparsity, without a sign."""
    return f"{abs(points):{form}} points {'less' if points < 0 else 'more'} sparse"


def is_similar(delta: Real, sd: Real) -> bool | None:
    """Whether a difference is below twice its pooled sd; None where there is no sd."""
    return None if math.isnan(sd) else bool(abs(delta) <= 2 * sd + 1e-9)


def compared(overall: pd.DataFrame, name: str, key: str) -> tuple[pd.Series, pd.Series, float]:
    """The variant's row, the baseline's, and the pooled sd of a number of theirs."""
    base, of = overall.iloc[0], overall[overall.variant == name].iloc[0]
    return of, base, pooled_sd(of[f"{key}_sd"], of.n_seeds, base[f"{key}_sd"], base.n_seeds)


def _pair(found: Mapping[str, pd.DataFrame], first: str, name: str) -> Iterator[str]:
    yield _degradation(found["overall"], first, name)
    yield _fidelity(found["overall"], first, name)
    groups = found["groups"]
    ends = groups[groups.variant == first].set_index("group")
    for g in groups[(groups.variant == name) & groups.sparsity_delta.notna()].itertuples():
        of = _range(g.min, g.max)
        base = _range(ends.loc[g.group, "min"], ends.loc[g.group, "max"])
        where = of if of == base else f"{of} of {name}, {base} of {first}"
        said = _said(name, g.sparsity_delta, g.sparsity_delta_sd)
        yield f"{g.group.capitalize()} layers ({where}): {said}"
    yield from _largest(found["per_layer"], name)


def _range(low: Real, high: Real) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _said(name: str, delta: Real, sd: Real) -> str:
    """One difference of sparsity with its verdict; shares in, points out."""
    similar = is_similar(delta, sd)
    if similar is None:
        return f"{name} is {less_or_more(100 * delta)} ({NO_ERROR_BAR})"
    if similar:
        return f"similar sparsity ({100 * delta:+.1f} points, pooled sd {100 * sd:.1f})"
    return f"{name} is {less_or_more(100 * delta)} (pooled sd {100 * sd:.1f})"


def _degradation(overall: pd.DataFrame, first: str, name: str) -> str:
    of, base, sd = compared(overall, name, "loss_degradation")
    a, b = of.loss_degradation, base.loss_degradation
    numbers = (f"{pm(a, of.loss_degradation_sd, '+.2f', '%')} vs "
               f"{pm(b, base.loss_degradation_sd, '+.2f', '%')} ({_seeds(of, base)})")  # fmt: skip
    negative = [n for n, value in ((name, a), (first, b)) if value < 0]
    if negative:
        return (f"Loss degradation is negative for {' and '.join(negative)}: unfaithful, not an "
                f"improvement; judge by faithfulness: {numbers}")  # fmt: skip
    similar = is_similar(a - b, sd)
    if similar is None:
        return f"Loss degradation: {numbers}; {NO_ERROR_BAR}"
    if similar:
        return f"Similar loss degradation: {numbers}"
    return f"{name} has {'WORSE' if a > b else 'BETTER'} loss degradation: {numbers}"


def _fidelity(overall: pd.DataFrame, first: str, name: str) -> str:
    of, base, sd = compared(overall, name, "faithfulness")
    numbers = (f"faithfulness {pm(of.faithfulness, of.faithfulness_sd)} vs "
               f"{pm(base.faithfulness, base.faithfulness_sd)}")  # fmt: skip
    delta = of.faithfulness - base.faithfulness
    at = f"at {100 * of.sparsity:.1f}%"
    similar = is_similar(delta, sd)
    if similar is None:
        return f"Predictions kept {at}: {numbers}; {NO_ERROR_BAR}"
    if similar:
        return f"{name} keeps its model's predictions similarly well {at} ({numbers})"
    how = "better" if delta > 0 else "less well"
    return f"{name} keeps its model's predictions {how} than {first} {at} ({numbers})"


def _seeds(of: pd.Series, base: pd.Series) -> str:
    if of.n_seeds == base.n_seeds:
        return f"{of.n_seeds} seeds each" if of.n_seeds > 1 else "one seed each"
    return f"{of.n_seeds} and {base.n_seeds} seeds"


def _largest(layers: pd.DataFrame, name: str) -> Iterator[str]:
    """The layers that differ most, where seeds do not differ as much."""
    of = layers[(layers.variant == name) & (layers.part == "KV")]
    of = of.sort_values("sparsity_delta", key=abs, ascending=False, kind="stable")
    known = of[of.sparsity_delta_sd.notna()]
    chosen = known[known.sparsity_beyond.astype(bool)] if len(known) else of
    chosen = chosen[chosen.sparsity_delta != 0].drop_duplicates("layer")
    said = [f"layer {r.layer} ({100 * r.sparsity_delta:+.1f})"
            for r in chosen.head(LARGEST).itertuples()]  # fmt: skip
    if not said:
        yield "No layer's sparsity differs beyond 2 pooled sd"
    else:
        bars = "" if len(known) else f"; {NO_ERROR_BAR}"
        yield f"Largest differences of sparsity, in points: {', '.join(said)}{bars}"


def _full_models(overall: pd.DataFrame) -> Iterator[str]:
    """Percentages of different baselines do not compare."""
    losses = [number(ce) for ce in overall.full_ce]
    if len(set(losses)) > 1:
        said = ", ".join(f"{n} {ce}" for n, ce in zip(overall.variant, losses, strict=True))
        yield (f"The full models differ in CE ({said} nats): loss degradations are percentages of "
               "different baselines.")  # fmt: skip


def _layer_rows(layers: pd.DataFrame, names: list[str]) -> Iterator[list[str]]:
    for _, row in layers.groupby("row"):
        row = row.set_index("variant").loc[names]
        at = [str(layer) for layer in row.layer]
        cells = [f"{100 * s:.1f}%" for s in row.sparsity]
        deltas = [f"{100 * d:+.1f}" + ("*" if pd.notna(beyond) and beyond else "")
                  for d, beyond in zip(row.sparsity_delta[1:], row.sparsity_beyond[1:],
                                       strict=True)]  # fmt: skip
        yield [at[0] if len(set(at)) == 1 else " / ".join(at), *cells, *deltas]
