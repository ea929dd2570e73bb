"""Transcoders against their formulas written densely, and the sparse kernels against each other."""

import pytest
import torch
from torch.testing import assert_close

from lens_utils.errors import BadInput
from lens_utils.sparse import (
    Scales,
    Transcoder,
    fold,
    gather,
    initial,
    row_dots,
    scatter,
)


@pytest.fixture
def draw():
    source = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)


def drawn(draw, k=None, threshold=None, skip=True, n=24) -> Transcoder:
    W_skip = draw(5, 6) if skip else None
    return Transcoder(draw(n, 6), draw(n), draw(n, 5), draw(5), W_skip, k, threshold)


def dense(t: Transcoder, x: torch.Tensor) -> torch.Tensor:
    """Activations of all features, by the definition."""
    pre = x @ t.W_enc.T + t.b_enc
    match t.activation:
        case "topk":
            least = pre.sort(dim=1, descending=True).values[:, t.k - 1 : t.k]
            return torch.where((pre >= least) & (pre > 0), pre, 0.0)
        case "relu":
            return torch.where(pre > 0, pre, 0.0)
        case "jumprelu":
            return torch.where(pre > t.threshold, pre, 0.0)


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_is_its_formula(draw, kind, skip, monkeypatch):
    threshold = draw(24).abs() if kind == "jumprelu" else None
    t = drawn(draw, 4 if kind == "topk" else None, threshold, skip)
    x = draw(50, 6)
    assert t.activation == kind
    z = dense(t, x)
    y = z @ t.W_dec + t.b_dec + (x @ t.W_skip.T if skip else 0)
    for held in (2**22, 24 * 7):  # in one piece, and seven tokens at a time
        monkeypatch.setattr("lens_utils.sparse.HELD", held)
        values, indices = t.encode(x)
        assert_close(torch.zeros(50, 24, dtype=x.dtype).scatter_add(1, indices, values), z)
        assert_close(t(x), y)
        assert t(x[:0]).shape == (0, 5)


def test_topk_keeps_exactly_k_and_fewer_only_where_they_are_not_positive(draw):
    t = drawn(draw, k=6)
    t.b_enc -= 3
    x = draw(200, 6)
    values, indices = t.encode(x)
    assert values.shape == indices.shape == (200, 6)
    assert all(len(set(row)) == 6 for row in indices.tolist())
    positive = (t.preactivations(x) > 0).sum(1)
    assert positive.min() < 6 < positive.max()
    assert torch.equal((values > 0).sum(1), positive.clamp(max=6))


def test_without_features_there_are_bias_and_skip(draw):
    t = drawn(draw, n=0)
    x = draw(3, 6)
    assert_close(t(x), x @ t.W_skip.T + t.b_dec)


def test_it_can_be_differentiated(draw):
    t = drawn(draw, k=4)
    x = draw(9, 6).requires_grad_()
    t.requires_grad_()
    names = ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip"]
    ours = torch.autograd.grad(t(x).square().sum(), [x, *(getattr(t, n) for n in names)])
    y = dense(t, x) @ t.W_dec + t.b_dec + x @ t.W_skip.T
    theirs = torch.autograd.grad(y.square().sum(), [x, *(getattr(t, n) for n in names)])
    assert_close(ours, theirs)


@pytest.mark.parametrize("held", [2**22, 60])
def test_portable_kernels_equal_the_fast_ones(draw, held, monkeypatch):
    """Both against dense matrices; some features are never used, some twice by one token."""
    monkeypatch.setattr("lens_utils.sparse.HELD", held)
    rows, vectors, weights = draw(11, 7), draw(20, 7), draw(20, 3)
    indices = (draw(20, 3).abs() * 4).long().clamp(max=9)
    one = torch.zeros(20, 11, dtype=rows.dtype).scatter_add(1, indices, weights)
    for portable in (True, False):
        assert_close(gather(rows, indices, weights, portable), one @ rows)
        dots = row_dots(rows, indices, vectors, portable)
        assert_close(dots, (vectors @ rows.T).gather(1, indices))
        assert_close(scatter(vectors, indices, weights, 11, portable=portable), one.T @ vectors)


def test_mps_takes_the_portable_path(draw, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("embedding_bag on a device where it is not to be trusted")

    monkeypatch.setattr("lens_utils.sparse._on_mps", lambda tensor: True)
    monkeypatch.setattr("torch.nn.functional.embedding_bag", refuse)
    t = drawn(draw, k=4)
    x = draw(9, 6)
    assert_close(t(x), dense(t, x) @ t.W_dec + t.b_dec + x @ t.W_skip.T)
    row_dots(t.W_dec, t.encode(x)[1], draw(9, 5))
    scatter(x, t.encode(x)[1], t.encode(x)[0], 24)


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("skip", [True, False])
def test_folding_the_scales_changes_nothing(draw, kind, skip):
    threshold = draw(24).abs() if kind == "jumprelu" else None
    t = drawn(draw, 4 if kind == "topk" else None, threshold, skip)
    x, y = 3 + 7 * draw(40, 6), -2 + 0.1 * draw(40, 5)
    scales = Scales.of(x, y)
    for scaled in (scales.inward(x), scales.outward(y)):
        assert_close(scaled.mean(0), torch.zeros_like(scaled[0]), atol=1e-5, rtol=0)
        assert_close(scaled.square().mean(), torch.tensor(1.0))
    exact = (x - scales.x_mean.double()) / scales.x_rms
    folded = fold(t, scales)
    assert_close(folded(x), scales.y_rms * t(exact) + scales.y_mean)
    assert_close(folded.W_dec.norm(dim=1), t.W_dec.norm(dim=1))


def test_a_beginning_has_unit_decoder_rows_and_the_maps_answers(draw):
    linear = draw(5, 6).float()
    t, random = initial(6, 5, 40, 3, 0, linear, skip=True), initial(6, 5, 40, 3, 0)
    for one in (t, random):
        assert_close(one.W_dec.norm(dim=1), torch.ones(40))
        assert one.W_enc.abs().max() <= 6**-0.5
    assert torch.equal(t.W_enc, random.W_enc)
    assert not torch.equal(t.W_enc, initial(6, 5, 40, 3, 1).W_enc)
    asked = t.W_enc @ linear.T
    assert_close((t.W_dec * asked).sum(1), asked.norm(dim=1))
    assert t.W_skip.count_nonzero() == 0 and random.W_skip is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 25}, "k = 25 of 24 features"),
        ({"k": 0}, "k = 0 of 24"),
        ({"k": 3, "threshold": torch.zeros(24)}, "not both"),
        ({"b_dec": torch.zeros(4)}, "W_dec is"),
        ({"b_enc": torch.zeros(4)}, "b_enc is"),
        ({"W_skip": torch.zeros(6, 6)}, "W_skip is"),
        ({"threshold": torch.zeros(6)}, "threshold is"),
    ],
)
def test_bad_input(change, said):
    good = {"W_enc": torch.zeros(24, 6), "b_enc": torch.zeros(24), "W_dec": torch.zeros(24, 5)}
    with pytest.raises(BadInput, match=said) as error:
        Transcoder(**good | {"b_dec": torch.zeros(5)} | change)
    assert "\n" not in str(error.value)


def test_activations_that_do_not_vary_are_refused():
    for x in (torch.ones(4, 3), torch.full((4, 3), float("nan"))):
        with pytest.raises(BadInput, match="finite activations"):
            Scales.of(x, torch.randn(4, 3))
