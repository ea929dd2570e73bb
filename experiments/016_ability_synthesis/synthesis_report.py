"""The pages and the machine-readable results of 016: sentences come from findings.csv alone."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from synthesis_claims import SECTIONS
from synthesis_inputs import METHODS
from synthesis_tables import BY_GAIN, TOGETHER, estimate

from lens_utils import synthesis
from lens_utils.stats import Estimate
from lens_utils.synthesis import Block

TITLE = "Solve, recognise, generate: synthesis"
VERDICTS = ("supported", "contradicted", "not supported", "not testable")
STATUSES = ("PASS", "OUT OF BAND", "NOT TESTABLE")
SHOWN = {
    "agreement": ["ability", "methods", "rho", "p", "q", "floor"],
    "overlap": ["ability", "methods", "lengths", "layers", "shared", "expected", "p", "floor"],
    "depths": ["ability", "method", "value", "low", "high"],
    "gaps": ["shallow", "deep", "methods", "value", "low", "high", "n"],
    "modes": ["ability", "measure", "value", "low", "high", "n", "cut_pct"],
    "traces": ["ability", "condition", "measure", "value", "low", "high", "n"],
}


def sections(
    model: str,
    gates: pd.DataFrame,
    findings: pd.DataFrame,
    checks: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, list[Block]]:
    """The report: each section's verdicts, then the numbers behind them."""
    behind = dict(zip(SECTIONS, (("agreement", "overlap", "depths"), ("gaps",),
                                 ("modes", "traces"), ()), strict=True))  # fmt: skip
    counts = _counts(findings.verdict, VERDICTS)
    pages: dict[str, list[Block]] = {
        "What this is": [
            f"Model: {model}. {len(findings)} claims were put to the tables of experiments 010 to "
            f"015: {counts}. Every sentence below follows from its numbers; none is written in "
            "advance. A claim about an ability at chance is not testable, nor is one that no "
            "outcome in a model of this depth could support.",
            "The methods: " + "; ".join(f"{k}: {v}" for k, v in METHODS.items()) + ".",
        ],
        "Behaviour gate": [gates.drop(columns=["n"]).round(3)],
        "Key findings": [_key(findings)],
    }
    for name in SECTIONS:
        rows = findings[findings.section == name]
        blocks: list[Block] = [_said(rows)] if len(rows) else ["Nothing was claimed."]
        for table in behind[name]:
            if len(tables[table]):
                blocks.append(tables[table][SHOWN[table]])
        pages[name] = blocks
    pages["Checkpoints"] = [
        f"The bands were set by the study before any run and moved by nobody: "
        f"{_counts(checks.status, STATUSES)}.",
        checks,
    ]
    pages["What this cannot show"] = [
        "Curves of methods that measure different things (a share of neurons, a loss, what can be "
        "read) need not be alike for the methods to be right. Intervals of depth take the layers' "
        "errors as independent. A small model has few layers, so few verdicts can be had from "
        "their order; the smallest possible p stands beside each."
    ]
    return pages


def _counts(column: pd.Series, order: tuple[str, ...]) -> str:
    return ", ".join(f"{(column == name).sum()} {name}" for name in order)


def _said(rows: pd.DataFrame) -> str:
    return "\n".join(f"- **{r.claim}: {r.verdict}** ({r.because})." for r in rows.itertuples())


def _key(findings: pd.DataFrame) -> str:
    """What was decided either way; what was not is counted in the sections."""
    rows = findings[findings.verdict.isin(["supported", "contradicted"])]
    return _said(rows) if len(rows) else "None of the claims is supported on this model."


def markdown(pages: dict[str, list[Block]]) -> str:
    """SYNTHESIS_REPORT.md."""
    return synthesis.page(TITLE, pages)


def text(pages: dict[str, list[Block]]) -> str:
    """SYNTHESIS_REPORT.txt."""
    return synthesis.plain(TITLE, pages)


def results(
    model: str,
    abilities: list[str],
    curves: pd.DataFrame,
    lists: pd.DataFrame,
    findings: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, Any]:
    """synthesis_results.json, in the schema of the study's result files.

    curve: mean over methods of each method's curve as a share of its own mass.
    """
    found = {}
    for ability in abilities:
        mine = curves[(curves.ability == ability) & curves.value.notna()]
        share = mine.assign(mass=mine.value.clip(lower=0))
        share["mass"] /= share.groupby("method").mass.transform("sum").replace(0, math.nan)
        curve = share.groupby("layer").mass.mean().dropna()
        shared = tables["overlap"]
        shared = shared[(shared.ability == ability) & (shared.methods == TOGETHER)]
        layers = [int(name[1:]) for row in shared.layers for name in row.split() if name != "none"]
        top = curve.sort_values(ascending=False, kind="stable").index.tolist()
        found[ability] = {
            "top_layers": top,
            "key_layers": top[:5],
            "curve": curve.tolist(),
            "convergent_layers": layers,
            "lists": {m: g.layer.tolist()
                      for m, g in lists[lists.ability == ability].groupby("method", sort=False)},
            "depth": _records(tables["depths"], ability),
            "agreement": _records(tables["agreement"], ability),
        }  # fmt: skip
    return {
        "model": model,
        "experiment": "016_ability_synthesis",
        "abilities": found,
        "findings": findings.to_dict("records"),
    }


def _records(table: pd.DataFrame, ability: str) -> list[dict[str, Any]]:
    rows = table[table.ability == ability].drop(columns="ability").to_dict("records")
    return [{k: None if v != v else v for k, v in row.items()} for row in rows]  # NaN is no JSON


def gated(gates: pd.DataFrame) -> dict[str, Any]:
    """The summary where no ability lies above chance."""
    out: dict[str, Any] = {"verdict": "no ability is above chance: nothing to bring together"}
    for r in gates.itertuples():
        out[f"{r.ability} right, {r.mode} (chance {r.chance:.2f})"] = Estimate(
            value=r.accuracy, low=r.low, high=r.high, n=int(r.n)
        )
    return out


def summarise(
    tables: Mapping[str, pd.DataFrame], findings: pd.DataFrame, checks: pd.DataFrame
) -> dict[str, Any]:
    """The few numbers of the findings."""
    out: dict[str, Any] = {f"claims {v}": int((findings.verdict == v).sum()) for v in VERDICTS}
    out |= {f"checkpoints {s}": int((checks.status == s).sum()) for s in STATUSES}
    whole = tables["agreement"][tables["agreement"].methods == TOGETHER]
    for r in whole.itertuples():
        out[f"rank correlation of the methods' curves, {r.ability}"] = float(r.rho)
        out[f"its p by circular shifts, {r.ability}"] = float(r.p)
    gain = tables["agreement"][tables["agreement"].methods == BY_GAIN]
    for r in gain.itertuples():
        out[f"the same, probes by what each layer adds, {r.ability}"] = float(r.rho)
    if len(whole):
        out["smallest p that circular shifts can give"] = float(whole.floor.min())
    for r in tables["overlap"][tables["overlap"].methods == TOGETHER].itertuples():
        out[f"layers that all methods list, {r.ability}"] = r.layers
    for r in tables["gaps"][tables["gaps"].methods == TOGETHER].itertuples():
        out[f"{r.deep} deeper than {r.shallow} (points of depth)"] = estimate(r)
    for r in tables["modes"][tables["modes"].measure == "thinking less direct"].itertuples():
        out[f"thinking less direct, {r.ability} (points)"] = estimate(r)
    return out
