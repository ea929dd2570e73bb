"""009 · Model comparison

What do models have in common in experiments 005 to 008, and is it learned? The courses of synergy
over relative depth, the graphs of pairs, what ablation in the order of the score costs and what
noise costs are put side by side for every model that was measured, for their untrained twins, and
beside published numbers of larger models.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("005_head_phiid", "006_core_graphs", "007_head_ablation", "008_math_perturbation")


@dataclass(frozen=True)
class Config(BaseConfig):
    models: str = ""
    """Models to compare, such as smol,gemma-3-270m; empty is --model and every other one that has a
    finished run of 005 at this size. What 006 to 008 lack of them is left out of the tables."""


def main(cfg: Config, run: Run) -> None:
    import compare_profiles as course  # these need torch and pandas: --help does not wait for them
    import compare_tables as table
    import compare_twins as twin
    import pandas as pd

    published = table.published()
    names = run.stage("models.json", lambda: table.chosen(cfg, run))
    # 1. Courses over relative depth: of every model, of its twin that reads the model's text.
    courses, curves, shapes, readings = [], [], [], []
    for name in names:
        nodes = run.upstream("005_head_phiid", "nodes.csv", name)
        found = run.upstream("005_head_phiid", "profiles.csv", name)
        curves.append(course.of_networks(found, name))
        found = run.upstream("005_head_phiid", "shapes.csv", name)
        shapes.append(course.shapes(found, nodes, name))
        for condition, measure in itertools.product(course.NETWORKS, course.MEASURES):
            stage = f"pairs_{condition}_{measure}.safetensors"
            pairs = run.upstream("005_head_phiid", stage, name)
            network = course.NETWORKS[condition].format(name)
            layer = nodes.layer.to_numpy()
            courses.append(course.course(network, measure, pairs, layer, cfg.seed))
        asked = run.upstream("005_head_phiid", "asked.json", name)
        tokens = run.upstream("005_head_phiid", "series_own.safetensors", name)["tokens"].tolist()
        pairs = run.upstream("005_head_phiid", "pairs_replayed_mmi.safetensors", name)
        readings += twin.readings(name, asked, tokens, pairs, cfg.quick)
    run.stage("curves.csv", lambda: course.curves(curves, published))
    shape = run.stage("shapes.csv", lambda: pd.concat(shapes, ignore_index=True))
    alike = run.stage("likeness.csv", lambda: course.likeness(courses, published, cfg.seed))
    # 2. The twins without some of their heads; the models themselves are in 007.
    points = run.chunks(
        "twins.csv", readings, 1, lambda r: twin.without_heads(run, r[0], cfg.quick, cfg.seed)
    )
    # 3. Side by side.
    held = table.gather(run, names)
    ablation = run.stage("ablation.csv", lambda: table.ablation(held, points, cfg.seed))
    graphs = run.stage("graphs.csv", lambda: table.graphs(held))
    noise = run.stage("noise.csv", lambda: table.noise(held))
    run.stage("table.csv", lambda: table.side_by_side(shape, graphs, ablation, noise, published))
    run.stage("summary.json", lambda: table.summarise(shape, alike, graphs, ablation, noise))


if __name__ == "__main__":
    launch(Config, main)
