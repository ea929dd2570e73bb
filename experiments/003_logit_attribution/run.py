"""003 · Logit attribution

Which heads and MLPs write the answer into the last token, and from which word do the heads take
it? The logit difference answer - foil is taken apart, exactly, into what every component adds to
it directly; heads that carry a fact are then read for what they copy and what they look for.
Findings: analyses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_utils.experiment import BaseConfig, Run, launch

READS = ("002_attention_patterns",)


@dataclass(frozen=True)
class Config(BaseConfig):
    folded: bool = True
    """Attribute some pairs on folded weights too, and compare; a second copy of the model."""
    neurons: int = 10
    """Neurons chosen in each of the three strongest MLPs of a task."""
    words: int = 4
    """Words of each kind that are put into a slot for heads to find (a quick run takes half)."""


def main(cfg: Config, run: Run) -> None:
    import attribution_readings as read  # these need torch and pandas: --help does not wait
    import attribution_tables as table
    import ov_qk_readings
    import retrieval_tables as named

    known = run.upstream("002_attention_patterns", "pairs.csv")
    session = read.Session(cfg, run, known)
    # 1. Every pair's logit difference, taken apart; the same towards another pair's answer and
    # foil, and in a model that has learned nothing.
    held = {
        source: run.chunks(f"{source}.safetensors", session.pairs, 16, session.attributor(source))
        for source in ("attributed", "shuffled", "untrained")
    }
    asked = run.stage("pairs.csv", lambda: session.about(held["attributed"]))
    exact = run.stage("exact.json", lambda: session.exactness(held["attributed"]))
    # 2. By layer, by head, by where the heads take it from; MLPs against attention.
    layers = run.stage("components.csv", lambda: table.components(asked, held))
    heads = run.stage("heads.csv", lambda: table.heads(asked, held))
    sources = run.stage("sources.csv", lambda: table.sources(asked, held))
    shares = run.stage("shares.csv", lambda: table.shares(asked, held))
    agree = run.stage("agreement.csv", lambda: table.agreement(asked, heads))
    # 3. Neurons of the strongest MLPs, chosen on one half of the pairs, measured on the other.
    strongest = table.strongest_mlps(asked, held["attributed"])
    cells = run.stage("neurons.csv", lambda: session.neurons(asked, strongest))
    # 4. What heads would say of an entity (OV), and which words their query finds (QK).
    reader = ov_qk_readings.Reader(session, named.tried(heads, cfg.seed))
    ov = run.stage("ov.csv", reader.ov)
    qk = run.stage("qk.csv", reader.qk)
    # 5. Heads named for retrieval, by a rule that stands in retrieval_tables.py.
    heads_named = run.stage("retrieval.csv", lambda: named.retrieval(heads, ov, qk))
    run.stage(
        "summary.json",
        lambda: named.summarise(
            exact, asked, layers, heads, sources, shares, agree, cells, ov, qk, heads_named
        ),
    )


if __name__ == "__main__":
    launch(Config, main)
