"""PhiID against the reference library's outputs, a slow route by definition, and closed forms."""

import importlib
import itertools
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import digamma

from lens_utils import phiid, phiid_ccs, phiid_gaussian
from lens_utils.errors import BadInput
from lens_utils.phiid_lattice import ATOMS, Information, Redundancy, atoms, mmi, swapped

VECTORS = np.load(Path(__file__).parent / "fixtures" / "phiid_vectors.npz")
CASES = sorted({key.partition("/")[0] for key in VECTORS.files if "/" in key})
LOOSE = {"near_collinear_1e-2", "float32_input"}


@pytest.fixture(params=["arrays", "compiled"])
def engine(request, monkeypatch):
    """Both ways to run the formulas: as on an accelerator, as on a CPU."""
    if request.param == "arrays":
        patch(monkeypatch, "fused", fits=lambda tensor: False)
        patch(monkeypatch, "phiid_ccs", compiled=None)
        patch(monkeypatch, "phiid_gaussian", compiled=None)


def patch(monkeypatch, module, **values):
    """In the module itself: what tests import may stand for it until it is used."""
    for name, value in values.items():
        monkeypatch.setattr(importlib.import_module(f"lens_utils.{module}"), name, value)


def coupled(prompts=3, heads=6, steps=60, seed=0) -> torch.Tensor:
    """Series that drive each other and share noise."""
    rng = np.random.default_rng(seed)
    drive = rng.normal(size=(heads, heads))
    drive *= 0.8 / np.abs(np.linalg.eigvals(drive)).max()
    mix = np.eye(heads) + 0.5 * rng.normal(size=(heads, heads))
    series = np.zeros((prompts, heads, steps))
    for t in range(1, steps):
        series[..., t] = series[..., t - 1] @ drive.T + rng.normal(size=(prompts, heads)) @ mix.T
    return torch.tensor(3 + series)


def autoregressive(rate, steps, rng) -> np.ndarray:
    series = np.zeros(steps)
    for t, noise in enumerate(rng.normal(size=steps - 1), 1):
        series[t] = rate * series[t - 1] + noise
    return series


def of_pair(found, i=0, j=1) -> np.ndarray:
    return np.array([found[name][i, j] for name in ATOMS])


# A slow route: covariances, determinants, and the lattice inverted as it is defined

ANTICHAINS = {"r": [{0}, {1}], "x": [{0}], "y": [{1}], "s": [{0, 1}]}


def below(one: str, other: str) -> bool:
    """Every set of the other holds a set of the one."""
    return all(any(a <= b for a in ANTICHAINS[one]) for b in ANTICHAINS[other])


def by_definition(x, y, a, b) -> np.ndarray:
    """Sixteen atoms (MMI) of four windows, by solving for what every node of the lattice adds."""
    covariance = np.cov(np.stack([x, y, a, b]))

    def entropy(rows):
        return 0.5 * np.linalg.slogdet(covariance[np.ix_(rows, rows)])[1]

    def information(source, target):
        s, t = sorted(source), sorted(2 + k for k in target)
        return entropy(s) + entropy(t) - entropy(s + t)

    nodes = list(itertools.product("rxys", repeat=2))
    held = [
        min(information(s, t) for s in ANTICHAINS[source] for t in ANTICHAINS[target])
        for source, target in nodes
    ]
    order = [[below(p, s) and below(q, t) for p, q in nodes] for s, t in nodes]
    return np.linalg.solve(np.array(order, dtype=float), held)


def windows(series, tau):
    return series[..., :-tau], series[..., tau:]


@pytest.mark.parametrize("tau", [1, 3])
def test_all_pairs_match_the_definition(tau):
    series = coupled()
    found = phiid.decompose(series, tau=tau, asked=ATOMS)
    past, future = windows(series.numpy(), tau)
    for i, j in itertools.permutations(range(6), 2):
        slow = [by_definition(p[i], p[j], f[i], f[j]) for p, f in zip(past, future, strict=True)]
        np.testing.assert_allclose(of_pair(found, i, j), np.mean(slow, 0), atol=1e-12)


@pytest.mark.parametrize("pooling", ["pooled", "concat"])
def test_pooled_windows_end_with_their_prompt(pooling):
    series = coupled() + torch.arange(3)[:, None, None]  # another level in every prompt
    found = phiid.decompose(series, tau=2, pooling=pooling, asked=ATOMS)
    parts = [
        z - z.mean(-1, keepdims=True) * (pooling == "pooled") for z in windows(series.numpy(), 2)
    ]
    past, future = (np.concatenate(list(z), axis=-1) for z in parts)
    slow = by_definition(past[1], past[4], future[1], future[4])
    np.testing.assert_allclose(of_pair(found, 1, 4), slow, atol=1e-12)
    assert found.series == 1 and (found.used[0, 1:] == 1).all()


# The reference library


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
def test_reference_vectors_mmi(case, kind, engine):
    vectors(case, kind, "mmi")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
def test_reference_vectors_ccs(case, kind, engine):
    vectors(case, kind, "ccs")


def vectors(case, kind, redundancy):
    series = torch.tensor(VECTORS[f"{case}/series"])[None]
    options = {"tau": int(VECTORS[f"{case}/tau"]), "kind": kind, "redundancy": redundancy}
    found = phiid.decompose(series, asked=ATOMS, **options)
    wanted = VECTORS[f"{case}/{kind}_{redundancy}"]
    assert tuple(VECTORS["atoms"]) == ATOMS
    tolerance = 1e-8 if case in LOOSE else 1e-10
    np.testing.assert_allclose(of_pair(found), wanted, rtol=0, atol=tolerance)
    assert found.unit == {"gaussian": "nats", "discrete": "bits"}[kind]
    assert found.atoms["sts"].dtype == np.float64
    alone = phiid.decompose(series, **options)  # sts and rtr have a short cut
    for name in ("sts", "rtr"):
        np.testing.assert_allclose(alone[name], found[name], rtol=0, atol=tolerance)


# Pairs that are nearly the same


def to_fifty_digits(x, y, a, b) -> list[list[float]]:
    """The nine pointwise informations, from inverse covariances in 50 digits."""
    with mpmath.workdps(50):
        columns = []
        for series in (x, y, a, b):
            values = [mpmath.mpf(float(v)) for v in series]
            mean = mpmath.fsum(values) / len(values)
            columns.append([v - mean for v in values])
        n = len(columns[0])

        def surprise(rows):
            """Of each moment, without the constant that cancels."""
            covariance = mpmath.matrix(len(rows))
            for k, one in enumerate(rows):
                for m, other in enumerate(rows):
                    covariance[k, m] = mpmath.fdot(columns[one], columns[other]) / (n - 1)
            inverse, constant = covariance**-1, mpmath.log(mpmath.det(covariance)) / 2
            for t in range(n):
                z = mpmath.matrix([columns[row][t] for row in rows])
                yield constant + (z.T * inverse * z)[0] / 2

        sources = {"x": [0], "y": [1], "xy": [0, 1]}
        targets = {"a": [2], "b": [3], "ab": [2, 3]}
        order = ("x a", "x b", "y a", "y b", "xy a", "xy b", "x ab", "y ab", "xy ab")
        found = []
        for name in order:
            s, t = (sources[name.split()[0]], targets[name.split()[1]])
            rows = zip(surprise(s), surprise(t), surprise(s + t), strict=True)
            found.append([float(one + other - both) for one, other, both in rows])
        return found


def nearly(what: str) -> torch.Tensor:
    rng = np.random.default_rng(3)
    x = autoregressive(0.5, 40, rng)
    if what == "same":
        return torch.tensor(np.stack([x, x + 1e-5 * rng.normal(size=40)]))[None]
    y = np.append(rng.normal(), x[:-1] + 1e-5 * rng.normal(size=39))  # follows x by a step
    return torch.tensor(np.stack([x, y]))[None]


@pytest.mark.parametrize("what", ["same", "following"])
def test_close_pairs_are_taken_from_their_series(what, engine):
    series = nearly(what)
    x, y, a, b = (z[k] for z in windows(series[0].numpy(), 1) for k in (0, 1))
    pointwise = [np.array(values) for values in to_fifty_digits(x, y, a, b)]
    i = Information(*(torch.tensor(values.mean()) for values in pointwise))
    r = phiid_ccs.overlaps(*map(torch.tensor, pointwise), 0.0)
    mean = Redundancy(*(values.mean() for values in r))
    for redundancy, shared in (("mmi", mmi(i)), ("ccs", mean)):
        found = phiid.decompose(series, redundancy=redundancy, asked=ATOMS)
        assert (found.close, found.lost) == (1, 0)
        assert 0 < found.least < 1e-9
        np.testing.assert_allclose(of_pair(found), atoms(i, shared, ATOMS).numpy(), atol=1e-9)


def test_moments_from_series_are_those_from_correlations():
    series = coupled(1)
    both, _ = phiid._windows(series, 1, "mean", "gaussian")
    heads = phiid_gaussian.Windows(both.past[0], both.future[0])
    quick = phiid_gaussian.moments(*phiid_gaussian.correlations(heads, heads))
    i, j = torch.triu_indices(6, 6, 1)
    slow = phiid_gaussian.from_series(
        heads.past[i], heads.past[j], heads.future[i], heads.future[j]
    )
    for name, one, other in zip(quick._fields, quick, slow, strict=True):
        np.testing.assert_allclose(one.expand(6, 6)[i, j], other, atol=1e-13, err_msg=name)


# What is known of particular series


@pytest.mark.parametrize("rates", [(0.9, 0.9), (0.9, 0.5)])
def test_independent_memories_are_called_synergy_by_mmi_only(rates):
    rng = np.random.default_rng(0)
    series = torch.tensor(np.stack([autoregressive(rate, 100_000, rng) for rate in rates]))[None]
    smaller = min(-0.5 * np.log(1 - rate**2) for rate in rates)
    found = phiid.decompose(series, asked=ATOMS)
    assert found["sts"][0, 1] == pytest.approx(2 * smaller, rel=0.02)
    assert found["rts"][0, 1] == pytest.approx(smaller, rel=0.02)
    assert abs(found["rtr"][0, 1]) < 1e-3
    assert abs(phiid.decompose(series, redundancy="ccs")["sts"][0, 1]) < 0.03


def test_white_noise_shows_its_bias():
    """Wilks' lambda of two pasts and two futures is a product of two betas; its mean logarithm."""
    for steps, tau in ((100, 1), (50, 5)):
        total = sum(phiid.bias_floor(20, steps, heads=24, tau=tau, asked=ATOMS).values())
        free = steps - tau - 3  # samples, less their mean and the two pasts
        parts = [digamma((free - k) / 2) - digamma((free - k) / 2 + 1) for k in (0, 1)]
        assert total == pytest.approx(-sum(parts) / 2, rel=0.05)
    floor = phiid.bias_floor(20, 100)
    assert floor["sts"] == pytest.approx(0.0034, rel=0.1)
    assert floor["rtr"] == pytest.approx(0.0006, rel=0.1)


def test_exclusive_or_is_found_where_it_is_planted():
    """Bits that tell something only together: about both futures, or about one head's."""
    rng = np.random.default_rng(0)
    steps = 20_000
    x, other = rng.integers(2, size=(2, steps))
    parity = np.cumsum(rng.random(steps) < 0.1) % 2  # stays with probability 0.9
    into = np.append(0, np.cumsum(other) % 2)[:-1]  # into[t + 1] = into[t] xor other[t]
    bits = torch.tensor(np.stack([x, x ^ parity, into, other])[None].astype(float))
    found = phiid.decompose(bits, kind="discrete", asked=ATOMS)
    kept = 1 + 0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)
    planted = {(0, 1): ("sts", kept), (2, 3): ("stx", 1.0)}
    for i, j in itertools.combinations(range(4), 2):
        name, size = planted.get((i, j), ("sts", 0.0))
        for atom in ATOMS:
            assert found[atom][i, j] == pytest.approx(size * (atom == name), abs=0.02), (i, j, atom)


@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
@pytest.mark.parametrize("redundancy", ["mmi", "ccs"])
def test_symmetries(kind, redundancy):
    series = coupled()
    options = {"kind": kind, "redundancy": redundancy, "asked": ATOMS}
    found = phiid.decompose(series, **options)
    back = phiid.decompose(series.flip(1), **options)
    moved = phiid.decompose(series * torch.logspace(-6, 6, 6)[:, None] + 1e3, **options)
    for atom in ATOMS:
        assert np.isnan(np.diag(found[atom])).all() and np.isfinite(found[atom]).sum() == 30
        np.testing.assert_allclose(found[atom], found[swapped(atom)].T, atol=0)
        np.testing.assert_allclose(back[atom][::-1, ::-1], found[atom], atol=1e-12)
        if kind == "gaussian":  # 1e-6 beside 1e3 keeps seven digits
            np.testing.assert_allclose(moved[atom], found[atom], atol=1e-5)


def test_atoms_sum_to_all_the_information():
    series = coupled(1)
    found = phiid.decompose(series, asked=ATOMS)
    past, future = windows(series[0].numpy(), 1)
    covariance = np.cov(np.stack([past[0], past[1], future[0], future[1]]))
    sign, logs = np.linalg.slogdet(np.stack([covariance[:2, :2], covariance[2:, 2:]]))
    total = 0.5 * (logs.sum() - np.linalg.slogdet(covariance)[1])
    assert of_pair(found).sum() == pytest.approx(total, abs=1e-12) and total > 0
    shared = phiid.decompose(series, asked=ATOMS, redundancy="ccs")
    assert of_pair(shared).sum() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("redundancy", ["mmi", "ccs"])
def test_blocks_make_no_difference(monkeypatch, redundancy, engine):
    series = coupled(2, heads=11)
    whole = [f(series, redundancy=redundancy) for f in (phiid.decompose, phiid.surrogate)]
    patch(monkeypatch, "phiid", ROWS=3, COLUMNS=4)
    patch(monkeypatch, "phiid_ccs", CELLS=200)
    parts = [f(series, redundancy=redundancy) for f in (phiid.decompose, phiid.surrogate)]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one["sts"], other["sts"], atol=1e-14)
        np.testing.assert_allclose(one["rtr"], other["rtr"], atol=1e-14)
        assert (one.used == other.used).all()


# The null


def test_surrogates_pair_heads_of_different_prompts():
    series = coupled(3, heads=3)
    found = phiid.surrogate(series, (1, 2), asked=ATOMS)
    past, future = windows(series.numpy(), 1)
    i, j = 0, 2
    both = [
        of
        for p, q in itertools.permutations(range(3), 2)
        for of in (
            by_definition(past[p, i], past[q, j], future[p, i], future[q, j]),
            swap(by_definition(past[p, j], past[q, i], future[p, j], future[q, i])),
        )
    ]
    np.testing.assert_allclose(of_pair(found, i, j), np.mean(both, 0), atol=1e-12)
    assert found.series == 6 and found.used[0, 1] == 12 and np.isnan(np.diag(found["sts"])).all()


def swap(values: np.ndarray) -> np.ndarray:
    return values[[ATOMS.index(swapped(name)) for name in ATOMS]]


def test_surrogates_lose_what_is_shared_and_keep_memory():
    rng = np.random.default_rng(0)
    common = np.stack([autoregressive(0.9, 2000, rng) for _ in range(4)])
    series = torch.tensor(common[:, None] + 0.3 * rng.normal(size=(4, 3, 2000)))
    real, null = phiid.decompose(series), phiid.surrogate(series, (1, 2))
    assert real["rtr"][0, 1] > 0.5 and null["rtr"][0, 1] < 0.02
    assert null["sts"][0, 1] > 1.0


# Series that have no answer


def test_series_without_an_answer_are_left_out_and_counted():
    good = coupled(2, heads=3)
    steps = torch.arange(60.0)
    broken = good[:, :1].clone()
    broken[1, 0, 7] = torch.nan
    bad = [torch.full((60,), 4.2), 0.1 * steps, steps % 2, steps * torch.inf]
    series = torch.cat([good, broken, torch.stack(bad).expand(2, 4, 60), good[:, :1]], 1)
    found, alone = phiid.decompose(series), phiid.decompose(good)
    np.testing.assert_allclose(found["sts"][:3, :3], alone["sts"], atol=1e-14)
    assert found.degenerate.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 0]
    assert np.isnan(found["sts"][4:8]).all() and not found.used[4:8].any()
    # Head 3 is head 0 where it is whole; the last is head 0: a head tells nothing beside its copy.
    first = phiid.decompose(good[:1])
    np.testing.assert_allclose(found["sts"][3, 1:3], first["sts"][0, 1:], atol=1e-14)
    np.testing.assert_allclose(found["sts"][8, 1:3], alone["sts"][0, 1:], atol=1e-14)
    assert found.used[3, :3].tolist() == [0, 1, 1]
    assert np.isnan([found["sts"][0, 8], found["sts"][0, 3], found["sts"][3, 8]]).all()
    assert (found.close, found.lost) == (4, 4)
    assert found.least > 1e-3
    null = phiid.surrogate(series)
    assert np.isfinite(null["sts"][0, 8]) and np.isnan(null["sts"][4:8]).all()
    assert null.used[3].tolist() == [2, 2, 2, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
def test_a_constant_prompt_is_left_out_of_the_mean(kind):
    series = coupled(2)
    flat = series.clone()
    flat[0, 2] = 0.1
    found = phiid.decompose(flat, kind=kind, asked=ATOMS)
    alone = phiid.decompose(series[1:], kind=kind, asked=ATOMS)
    for atom in ATOMS:  # also what the other head of a pair tells by itself
        np.testing.assert_allclose(found[atom][2], alone[atom][2], atol=1e-14)
        np.testing.assert_allclose(found[atom][:, 2], alone[atom][:, 2], atol=1e-14)
    assert found.used[2].tolist() == [1, 1, 0, 1, 1, 1] and found.degenerate[2] == 1


@pytest.mark.parametrize(
    ("series", "options", "says"),
    [
        (torch.ones(2, 3, 20), {}, "constant"),
        (torch.randn(1, 1, 20).expand(1, 2, 20), {}, "the same"),
        (torch.randn(1, 2, 5), {}, "5 steps at lag 1"),
        (torch.randn(1, 2, 20), {"tau": 0}, "lag of at least 1"),
        (torch.randn(1, 2, 20), {"tau": 16}, "20 steps at lag 16"),
        (torch.randn(1, 1, 20), {}, "1 heads"),
        (torch.randn(0, 2, 20), {}, "0 prompts"),
        (torch.randn(1, 2, 20), {"asked": ("stz",)}, "unknown atoms stz"),
    ],
)
def test_what_cannot_be_computed_is_said_in_one_line(series, options, says):
    with pytest.raises(BadInput, match=says) as raised:
        phiid.decompose(series, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shifts", [(), (0,), (1, 3)])
def test_a_prompt_is_no_null_of_itself(shifts):
    with pytest.raises(BadInput, match="two different prompts"):
        phiid.surrogate(torch.randn(3, 2, 20), shifts)
