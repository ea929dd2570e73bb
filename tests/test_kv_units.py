"""Units of K and V: rotary pairs by hand, every entry in one unit, bad input in one line."""

import pytest
import torch
from conftest import ARCHS
from kv_models import native, of
from toys import code_and_line

from lens_utils import kv_units
from lens_utils.errors import BadInput
from lens_utils.kv_units import make_units, rotary_partners, units_of

HALVES = [4, 5, 6, 7, 0, 1, 2, 3]
ADJACENT = [1, 0, 3, 2, 5, 4, 7, 6]
NEOX = [2, 3, 0, 1, 4, 5, 6, 7]  # half of the channels turn, in halves


@pytest.mark.parametrize("arch", ARCHS)
def test_rotary_pairs_of_every_architecture(tiny, arch):
    want = NEOX if arch.startswith("neox") else list(range(8)) if arch == "gpt2" else HALVES
    assert rotary_partners(of(tiny, arch)).tolist() == want


@pytest.mark.parametrize("turned", [None, 4])
def test_adjacent_pairs_are_those_that_the_model_itself_turns(turned):
    model = native(turned)
    want = ADJACENT if turned is None else [1, 0, 3, 2, 4, 5, 6, 7]
    assert rotary_partners(model).tolist() == want
    rotary = next(m for m in model.bridge.original_model.modules() if hasattr(m, "apply_rope"))
    unit = torch.eye(8)[None, :, None].expand(1, 8, 2, 8)  # [row, head, pos, d_head]: e_i
    _, k = rotary.apply_rope(unit, unit)
    for i, row in enumerate(k[0, :, 1]):  # at position 1
        assert set(row.nonzero().flatten().tolist()) == {i, want[i]}


def test_a_pair_that_one_of_the_two_shows_is_a_pair(tiny, monkeypatch):
    """In bfloat16 two neighbouring sines may be one number: the pair shows from one side only."""
    seen = torch.eye(8, dtype=torch.bool)
    seen[range(4, 8), range(4)] = True
    monkeypatch.setattr("lens_utils.kv_units._joined", lambda model, rows: seen[rows])
    assert rotary_partners(of(tiny, "llama")).tolist() == HALVES


def test_models_without_clear_pairs_are_refused_in_one_line(tiny, monkeypatch, capsys):
    model = of(tiny, "llama")
    short = kv_units.LoadedModel("short", model.bridge, None, (), frozenset(), 8)
    code, line = code_and_line(lambda: rotary_partners(short), capsys)
    assert code and "--keys single" in line and "8" in line
    tangled = torch.ones(8, 8, dtype=torch.bool)
    monkeypatch.setattr("lens_utils.kv_units._joined", lambda model, rows: tangled[rows])
    with pytest.raises(BadInput, match="with 7 others"):
        rotary_partners(model)


SHAPES = {  # by (resolution, keys, tied): units of one layer of 2 kv_heads (4 heads) of 8 channels
    ("kv", "pairs", False): 2 * (4 + 8),
    ("kv", "single", False): 2 * (8 + 8),
    ("kv", "pairs", True): 2 * 4,
    ("kv", "single", True): 2 * 8,
    ("query", "pairs", False): 4 * (4 + 8),
    ("head", "pairs", False): 2 * 2,
    ("head", "single", True): 2,
}


@pytest.mark.parametrize(("kind", "n"), SHAPES.items(), ids=str)
def test_every_entry_has_a_unit_and_every_unit_its_entries(tiny, kind, n):
    resolution, keys, tied = kind
    units = units_of(of(tiny, "llama"), resolution, keys, tied)
    heads = 4 if resolution == "query" else 2
    assert units.total == 3 * n and units.k.shape == units.v.shape == (3, heads, 8)
    members = {}  # unit: the entries that it has, by layer, head and part
    for part, place in (("K", units.k), ("V", units.v)):
        for layer in range(3):
            for head in range(heads):
                for channel in range(8):
                    unit = int(place[layer, head, channel])
                    members.setdefault(unit, []).append((layer, head, part, channel))
    assert sorted(members) == list(range(units.total))
    for entries in members.values():
        assert len({entry[:2] for entry in entries}) == 1  # of one head
        k, v = ([c for *_, p, c in entries if p == part] for part in "KV")
        if resolution == "head":
            whole = list(range(8))
            assert (k, v) in ((whole, whole),) if tied else (k, v) in ((whole, []), ([], whole))
        elif keys == "pairs":
            i = (k or v)[0]
            pair = [i, HALVES[i]]
            assert (k, v) in ((pair, pair),) if tied else (k, v) in ((pair, []), ([], [i]))
        else:
            assert sorted((len(k), len(v))) == ([1, 1] if tied else [0, 1])
            assert not tied or k == v
    table = units.table()
    assert table.unit.tolist() == list(range(units.total))
    for row in table.itertuples():
        entries = members[row.unit]
        parts = sorted({p for *_, p, _ in entries})
        assert row.part == "".join(parts)
        assert (row.layer, row.head, row.channel) in {(a, b, c) for a, b, _, c in entries}
        assert row.channel == min(c for *_, c in entries)


def test_spread_and_gather_are_adjoint():
    """A value per unit put on its entries, and entries summed to units: transposes."""
    units = make_units(2, 3, torch.tensor(NEOX))
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(5, units.total, generator=generator)
    k, v = torch.randn(2, 2, 3, 8, generator=generator)
    spread = units.spread(gates)
    assert spread[0].shape == spread[1].shape == (5, 2, 3, 8)
    left = (spread[0] * k).sum((1, 2, 3)) + (spread[1] * v).sum((1, 2, 3))
    torch.testing.assert_close(left, gates @ units.gather(k, v))
    assert (units.gather(torch.ones_like(k), torch.ones_like(v)).sum()) == 2 * 2 * 3 * 8
    pairs = units.gather(torch.ones_like(k), torch.zeros_like(v))
    assert sorted(pairs.unique().tolist()) == [0, 1, 2]


def test_units_of_a_model_of_the_embedded_ones_shape():
    """30 layers of 3 KV heads of 64 channels."""
    partner = torch.arange(64) ^ 32
    assert make_units(30, 3, partner).total == 30 * 3 * (32 + 64)
