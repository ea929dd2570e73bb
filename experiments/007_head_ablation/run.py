"""007 · Head ablation

Do the heads that a model cannot do without have a high synergy? Heads are taken away in several
orders, by the scores of experiment 005 from both ends, by what each head does alone, and at random
with and without the layers of the scores; at every step of the model's own text, how far does its
next-token distribution move? A published study found that synergistic heads go first.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("005_head_phiid",)


@dataclass(frozen=True)
class Config(BaseConfig):
    scores: str = ""
    """Columns of 005's scores.csv to order heads by; empty is value_diff, rank_diff,
    value_diff_excess, value_diff_ccs and memory (a quick run takes the first two)."""
    points: str = ""
    """Shares of all heads to take away in the order of a score, such as 0.1,0.25, or "every 5" for
    a point every 5 heads up to 40 %; empty is 0.05,0.1,0.25,0.4 (a quick run takes 0.1,0.25)."""
    random_points: str = "0.1,0.25,0.4"
    """Shares at which random orders are run too; areas are taken over these. 0.25 is always among
    them (a quick run takes none above it)."""
    random_orders: int = 24
    """How many (a quick run takes half); as many again keep the layers of value_diff's order, half
    of them from each end. Each is run on every fourth text."""
    ablation: Literal["zero", "mean", "resample"] = "zero"
    """What heads are replaced by; the other two are measured at one share (a quick run leaves out
    resample)."""
    per_category: int = 0
    """Texts of each category that orders are run on; 0 is two (a quick run: one of two
    categories). Single heads are measured on one more."""
    steps: int = 0
    """Use the first so many tokens of each text; 0 is 32 (a quick run takes 6): further on, small
    models repeat themselves."""


def main(cfg: Config, run: Run) -> None:
    import ablation_orders as order  # these need torch and pandas: --help does not wait for them
    import ablation_readings as read
    import ablation_tables as table

    asked = run.upstream("005_head_phiid", "asked.json")
    written = run.upstream("005_head_phiid", "series_own.safetensors")
    scores = run.upstream("005_head_phiid", "scores.csv")
    plan = order.Plan(cfg, scores)
    # 1. Texts that 005 had the model write: some for single heads, others for the orders.
    texts = run.stage("texts.json", lambda: read.choose(asked, written["tokens"].tolist(), cfg))
    session = read.Session(cfg, run, texts, scores)
    # 2. Every head alone, and what 005 says of it.
    alone = [t for t in texts if t["use"] == "single"]
    single = run.chunks("single.csv", alone, 1, session.single)
    heads = run.stage("heads.csv", lambda: order.heads(scores, single))
    # 3. Orders, and the divergence as more and more heads go.
    orders = run.stage("orders.json", lambda: plan.orders(heads))
    others = [t for t in texts if t["use"] == "orders"]
    points = run.chunks("points.csv", others, 1, lambda t: session.along(t[0], orders, plan))
    # 4. From here on tables only.
    run.stage("curves.csv", lambda: table.curves(points))
    areas = run.stage("areas.csv", lambda: table.areas(points, plan.common, cfg.seed))
    alike = run.stage("correlations.csv", lambda: table.correlations(heads, plan.scores, cfg.seed))
    kinds = run.stage("ablations.csv", lambda: table.ablations(points, cfg.seed))
    quarters = run.stage("quarters.csv", lambda: table.explained(points, orders, heads))
    run.stage(
        "summary.json",
        lambda: table.summarise(points, areas, alike, kinds, quarters, single, heads),
    )


if __name__ == "__main__":
    launch(Config, main)
