"""The rule by which experiment 003 names heads for retrieval, on tables made by hand."""

import pandas as pd
import pytest

from lens_utils import provenance


@pytest.fixture
def rule(monkeypatch):
    monkeypatch.syspath_prepend(provenance.EXPERIMENTS / "003_logit_attribution")
    import retrieval_tables

    return retrieval_tables


def evidence(**changed):
    """Tables of six heads, of which the first passes every step; `changed` spoils it."""
    sizes = [1.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    rows = []
    for template in ("one", "two"):
        for head, size in enumerate(sizes):
            row = {"layer": 3, "head": head, "task": "t", "template": template, "n": 9,
                   "attention_entity": 0.5, "attention_low": 0.4, "attention_high": 0.6,
                   "uniform": 0.2}  # fmt: skip
            for before in ("", "shuffled_", "untrained_"):
                value = size if not before else size / 100
                for name, times in (("low", 0.5), ("high", 2)):
                    row |= {f"{before}{part}{name}": times * value for part in ("", "entity_")}
                row |= {f"{before}dla": value, f"{before}dla_entity": value}
            rows.append(row)
    heads = pd.DataFrame(rows)
    read = heads[["layer", "head", "task", "template"]].assign(
        source="prompt", answer_percentile=0.9, answer_percentile_low=0.8, entity_percentile=0.5,
        answer_percentile_high=1.0, answer_top5=0.5, entity_top5=0.5, over_function=0.9,
        over_random=0.9, own_over_others=0.5,
    )  # fmt: skip
    for name, value in changed.items():
        table = heads if name in heads else read
        table.loc[(table["head"] == 0) & (table.template == "two"), name] = value
    return heads, read, read


def named(rule, **changed):
    found = rule.retrieval(*evidence(**changed))
    return rule.names(found[found.named & (found.direction == "attributed")])


def test_a_head_is_named_by_all_four_steps_in_the_other_wording(rule):
    assert named(rule) == "L3H0, L3H1, L3H2, L3H3, L3H4"  # five candidates of six heads
    for spoilt in ({"entity_low": -0.1}, {"answer_percentile_low": 0.49}, {"attention_low": 0.2}):
        assert named(rule, **spoilt) == "L3H1, L3H2, L3H3, L3H4"
    tried = rule.tried(evidence()[0], seed=0)
    assert set(tried[tried.role == "candidate"]["head"]) == set(range(5))
    assert set(tried[tried.role == "control"]["head"]) == {5}
