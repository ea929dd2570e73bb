"""The lens against the model's own output, closed forms and a folded copy of the model."""

import math

import pytest
import torch
from conftest import ARCHS

from lens_utils import cache, lens
from lens_utils.errors import BadInput, Failure
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec

IDS = [[1, 5, 9, 13, 17, 21], [1, 30, 7]]


@pytest.fixture(scope="module")
def residuals(tiny):
    """residuals(arch, fold): a tiny model, its readout and the last token's stream by depth."""

    def build(arch: str, fold: bool = False):
        model = wrap(tiny(arch), None, ModelSpec(arch, arch), fold=fold)
        names = [lens.hook(depth) for depth in range(model.n_layers + 1)]
        [part] = cache.stream(model, IDS, names, positions="last")
        stacked = torch.stack([part.values[name] for name in names])
        return model, lens.Readout(model.bridge), stacked

    return build


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_depth_is_the_models_own_output(arch, tiny, residuals):
    """Also through softcaps, norm biases, Gemma's offset gains and parallel blocks."""
    _, readout, resid = residuals(arch)
    plain = tiny(arch)
    own = torch.stack([plain(torch.tensor([ids])).logits[0, -1] for ids in IDS])
    read = readout.read(resid[-1])
    assert (read.softmax(-1) - own.softmax(-1)).abs().max() < 1e-5
    assert (read.log_softmax(-1) - own.log_softmax(-1)).abs().max() < 1e-4


def test_the_last_depth_on_the_real_model(smol):
    rows = [smol.encode("The capital of France is"), smol.encode("She opened the door and")]
    [part] = cache.stream(smol, rows, [lens.hook(smol.n_layers)], positions="last")
    read = lens.Readout(smol.bridge).read(part.values[lens.hook(smol.n_layers)])
    own = torch.stack([smol.bridge(torch.tensor([row]))[0, -1] for row in rows])
    assert (read.softmax(-1) - own.softmax(-1)).abs().max() < 1e-5
    assert (read.log_softmax(-1) - own.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2", "neox-parallel"])
def test_the_next_block_readout_on_folded_weights_is_the_norm_lens(arch, residuals):
    """And the folded model's norm and raw lenses are those of the plain model."""
    _, plain, resid = residuals(arch)
    model, folded, folded_resid = residuals(arch, fold=True)
    norm, raw = plain.read_both(resid)
    for depth in range(model.n_layers + 1):
        read = folded.read_next(folded_resid[depth], depth)
        torch.testing.assert_close(
            read.log_softmax(-1), norm[depth].log_softmax(-1), atol=1e-4, rtol=1e-4
        )
    if plain.centred:
        return  # folding re-centres the stream of LayerNorm models: raw reads another vector
    by_hand = (folded_resid @ folded.W_U).log_softmax(-1)
    torch.testing.assert_close(raw.log_softmax(-1), by_hand, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_the_next_block_readout_is_refused_on_plain_weights(arch, residuals):
    _, readout, resid = residuals(arch)
    with pytest.raises(BadInput, match="--fold"):
        readout.read_next(resid[1], 1)


def test_a_softcap_is_applied_at_every_depth(residuals):
    _, readout, resid = residuals("gemma2")
    assert readout.softcap == 2.0
    uncapped = readout.unembed(readout.normed(resid))
    assert uncapped.abs().max() > 2
    assert readout.read(resid).abs().max() <= 2
    torch.testing.assert_close(readout.read(resid), 2 * torch.tanh(uncapped / 2))


def test_raw_ranks_like_norm_and_grows_with_the_length(residuals):
    _, readout, resid = residuals("llama")
    norm, raw = readout.read_both(resid)
    assert torch.equal(norm.argsort(-1), raw.argsort(-1))
    longer_norm, longer_raw = readout.read_both(10 * resid)
    torch.testing.assert_close(longer_norm, norm, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(longer_raw, 10 * raw, atol=1e-3, rtol=1e-3)


def test_half_precision_is_read_in_float32(tiny):
    """In float16 the squares inside the norm overflow; the readout must not."""
    model = wrap(tiny("llama").half(), None, ModelSpec("llama", "llama"))
    readout = lens.Readout(model.bridge)
    resid = torch.full((1, 32), 400.0, dtype=torch.float16)
    resid[0, 0] = -30_000.0
    assert readout.read(resid).dtype == torch.float32
    assert readout.read(resid).isfinite().all()


def test_reading_by_hand_fires_no_hooks(residuals):
    model, readout, resid = residuals("llama")
    fired = []
    model.bridge.add_hook("ln_final.hook_normalized", lambda x, hook: fired.append(1))
    readout.read(resid)
    model.bridge.reset_hooks()
    assert not fired


def test_ridge_recovers_a_linear_map(residuals):
    """Where the final stream is a linear map of an earlier one, the translator is that map."""
    _, readout, _ = residuals("llama")
    generator = torch.Generator().manual_seed(0)
    early = torch.randn(4000, 32, generator=generator)
    late = early @ torch.randn(32, 32, generator=generator)
    # Equal lengths: ln_final's target is then a linear map of the unit residual.
    early = early / readout.scale(early)
    late = late / readout.scale(late)
    sums = lens.moments(readout, [torch.stack([early, late])])
    [one, same] = sums.translators(1e-6)
    loose = sums.translators(1e6)[0]
    read = readout.translate(late[:100], same)
    torch.testing.assert_close(read, readout.read(late[:100]), atol=1e-2, rtol=1e-2)
    error = (lens.with_one(early) @ one - readout.normed(late)).square().mean()
    shrunk = (lens.with_one(early) @ loose - readout.normed(late)).square().mean()
    assert error < 0.2 * shrunk
    assert sums.n == 4000


def test_scores_of_identical_and_uniform_readouts():
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(3, 128, generator=generator)
    answer = torch.tensor([5, 6, 7])
    same = lens.scores(final, lens.reference(final), answer)
    assert same["kl_bits"].abs().max() == 0 and same["kl_reverse_bits"].abs().max() == 0
    assert same["agrees"].all() and (same["overlap"] == 1).all()
    torch.testing.assert_close(same["cosine"], torch.ones(3))
    flat = lens.scores(torch.zeros(3, 128), lens.reference(final), answer)
    torch.testing.assert_close(flat["entropy_bits"], torch.full((3,), 7.0))
    p = final.softmax(-1)
    own = -(p * p.log()).sum(-1) / math.log(2)
    torch.testing.assert_close(flat["kl_bits"], 7 - own, atol=1e-5, rtol=1e-5)
    assert (flat["answer_rank"] == 1).all()  # ties do not push an answer down
    torch.testing.assert_close(flat["p_top5"], torch.full((3,), 5 / 128))


def test_nan_is_no_perfect_score():
    """Nothing is larger than NaN: its rank would be 1."""
    logits = torch.tensor([[1.0, 2.0, 3.0], [float("nan")] * 3])
    assert lens.rank(logits[:1], torch.tensor([0])).tolist() == [3]
    with pytest.raises(Failure, match="--dtype float32"):
        lens.rank(logits, torch.tensor([0, 0]))


def test_divergences_against_torch():
    generator = torch.Generator().manual_seed(1)
    logits, final = torch.randn(2, 4, 50, generator=generator) * 3
    found = lens.scores(logits, lens.reference(final), torch.zeros(4, dtype=torch.long))
    logq, logp = logits.log_softmax(-1), final.log_softmax(-1)
    forward = torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    backward = torch.nn.functional.kl_div(logp, logq, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found["kl_bits"], forward / math.log(2))
    torch.testing.assert_close(found["kl_reverse_bits"], backward / math.log(2))
    centred = [x - x.mean(-1, keepdim=True) for x in (logits, final)]
    torch.testing.assert_close(found["cosine"], torch.cosine_similarity(*centred))


def test_the_fitted_temperature_is_the_one_that_was_applied():
    final = torch.randn(20, 100, generator=torch.Generator().manual_seed(2)) * 3
    assert lens.fitted_temperature(final * 4, final) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [(30, [0, 5, 10, 15, 20, 25, 29]), (18, [0, 3, 6, 9, 12, 15, 17]), (4, [0, 1, 2, 3])],
)
def test_key_layers(n_layers, expected):
    assert lens.key_layers(n_layers) == expected


def test_depths_of_layers():
    assert lens.depths(4, "all") == [0, 1, 2, 3, 4]
    assert lens.depths(30, "2,0") == [0, 1, 3, 30]
    for wrong in ("30", "1,x", "-1", ""):
        with pytest.raises(BadInput, match="--layers"):
            lens.depths(30, wrong)


def test_depth_zero_holds_learned_positions(tiny, residuals):
    """GPT-2 adds its positions behind the embedding: depth 0 is what block 0 reads."""
    _, _, resid = residuals("gpt2")
    plain = tiny("gpt2")
    ids = IDS[0]
    expected = plain.transformer.wte.weight[ids[-1]] + plain.transformer.wpe.weight[len(ids) - 1]
    torch.testing.assert_close(resid[0, 0], expected)


def test_landmarks():
    at = [0, 1, 2, 3, 4]
    assert lens.first_depth([9, 1, 4, 1, 1], at) == 1
    assert lens.first_depth([9, 1, 4, 1, 1], at, stable=True) == 3
    assert lens.first_depth([9, 2, 4, 3, 2], at) is None
    # Depth 0 reads back its own token by construction, and does not count as a copy.
    columns = ([0.99, 0.5, 0.97, 0.97, 0.1], [0.9, 0.3, 0.05, 0.9, 0.0], [True] * 5, at)
    assert lens.copy_depth(*columns, 0.95) == 3
    assert lens.copy_depth(*columns, 0.4) == 1
    assert lens.copy_depth(columns[0], columns[1], [False] * 5, at, 0.4) is None
