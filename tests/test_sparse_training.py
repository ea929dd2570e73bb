"""The fused step against autograd on a dense transcoder, and the state around it."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from lens_utils.errors import BadInput, Failure
from lens_utils.sparse import Scales, Transcoder, initial
from lens_utils.sparse_training import (
    BETAS,
    EPS,
    Moments,
    Recipe,
    Trainer,
    clip_gain,
    dead_after,
    forward,
    gain,
    gradients,
    mean_baseline,
    ridge,
)

D_IN, D_OUT, N, K = 12, 10, 48, 4
RECIPE = Recipe(n_features=N, k=K, steps=40, lr=3e-3, dead_after=300, seed=1)


def activations(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a few directions at a time, and a small MLP's outputs, off centre and scale."""
    source = torch.Generator().manual_seed(7)
    basis = torch.randn(30, D_IN, generator=source)
    hidden, out = (torch.randn(*s, generator=source) for s in ((D_IN, 40), (40, D_OUT)))
    source.manual_seed(seed)
    on = torch.rand(tokens, 30, generator=source) < 0.1
    x = 3 + (on * torch.rand(tokens, 30, generator=source)) @ basis
    return x, 0.2 * torch.relu((x - 3) @ hidden) @ out - 1


def parameters(t: Transcoder) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in t.named_parameters()}


def dense_loss(p, x, y, k, dead=(), aux=0.0):
    """FVU and the dead features' loss, with dense activations: no code of the lab."""
    pre = torch.relu(x @ p["W_enc"].T + p["b_enc"])
    kept = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
    yhat = (pre * kept) @ p["W_dec"] + p["b_dec"]
    if "W_skip" in p:
        yhat = yhat + x @ p["W_skip"].T
    variance = (y - y.mean(0)).square().sum()
    fvu = (yhat - y).square().sum() / variance
    if not len(dead):
        return fvu, fvu
    residual = (y - yhat).detach()
    explained = pre[:, dead] @ p["W_dec"][dead]
    share = min(1.0, len(dead) / (y.shape[1] // 2))
    return fvu, fvu + aux * share * (explained - residual).square().sum() / variance


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dead", [[], [3, 17], [0, 1, 2, 5, 8, 13, 21]])
def test_gradients_equal_autograd(skip, dead):
    x, y = activations(200)
    scales = Scales.of(x, y)
    x, y = scales.inward(x), scales.outward(y)
    t = initial(D_IN, D_OUT, N, K, seed=0, skip=skip)
    source = torch.Generator().manual_seed(2)
    for name in ("b_enc", "b_dec", *(["W_skip"] if skip else [])):
        p = getattr(t, name)
        p.copy_(0.1 * torch.randn(p.shape, generator=source))
    p = parameters(t)
    fvu, loss = dense_loss(p, x, y, K, dead, aux=0.5)
    loss.backward()
    batch = forward(t, x, y)
    assert_close(batch.fvu, fvu.detach())
    found = dict(gradients(t, x, batch, torch.tensor(dead, dtype=torch.long), 0.5))
    assert found.keys() == p.keys()
    for name, gradient in found.items():
        error = (gradient - p[name].grad).norm() / p[name].grad.norm()
        assert error < 1e-5, name


def reference(recipe: Recipe, trainer: Trainer, batches: list) -> tuple[dict, list[float]]:
    """The same training by autograd, dense activations and torch.optim.Adam."""
    p = parameters(trainer.weights)
    adam = torch.optim.Adam(list(p.values()), betas=BETAS, eps=EPS)
    silent, curve = torch.zeros(recipe.n_features), []
    for step, (x, y) in enumerate(batches):
        x, y = trainer.scales.inward(x), trainer.scales.outward(y)
        dead = (silent >= recipe.dead_after).nonzero().flatten()
        few = max(1, y.shape[1] // 2)
        dead = dead.roll(-(step + 1) * few)[:few]
        fvu, loss = dense_loss(p, x, y, recipe.k, dead, recipe.aux)
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W, g = p["W_dec"], p["W_dec"].grad
            g -= (g * W).sum(1, keepdim=True) * W
            adam.param_groups[0]["lr"] = recipe.rate(step)
            adam.step()
            W /= W.norm(dim=1, keepdim=True)
        curve.append(float(fvu.detach()))
        silent += len(x)  # who fired is the trainer's to say: it was asked before its step
        silent[trainer_fired(trainer, x)] = 0
        trainer.step(*batches[step])
    return p, curve


def trainer_fired(trainer: Trainer, scaled: torch.Tensor) -> torch.Tensor:
    values, indices = trainer.weights.encode(scaled)
    return indices[values > 0].unique()


def test_training_follows_autograd_and_reaches_its_error():
    """Weights stay together for a while, and the FVU to the end, which is far below the start's."""
    batches = [activations(128, seed) for seed in range(40)]
    trainer = Trainer.start(RECIPE, *activations(500, 99))
    p, curve = reference(RECIPE, trainer, batches)
    ours = Trainer.start(RECIPE, *activations(500, 99))
    fvu = [ours.step(x, y)["fvu"] for x, y in batches]
    assert_close(torch.tensor(fvu), torch.tensor(curve), rtol=0.02, atol=0)
    assert curve[-1] < 0.6 * curve[0]
    for name, weight in ours.weights.named_parameters():
        assert_close(weight.detach(), p[name].detach(), rtol=0.02, atol=2e-3)


def test_decoder_rows_have_norm_1_after_every_step():
    trainer = Trainer.start(RECIPE, *activations(500))
    for seed in range(6):
        trainer.step(*activations(64, seed))
        assert_close(trainer.weights.W_dec.norm(dim=1), torch.ones(N))
    assert_close(trainer.transcoder().W_dec.norm(dim=1), torch.ones(N))


def test_the_transcoder_explains_raw_activations_as_the_loss_says():
    trainer = Trainer.start(RECIPE, *activations(500))
    for seed in range(20):
        trainer.step(*activations(128, seed))
    x, y = activations(300, 77)
    said = float(forward(trainer.weights, trainer.scales.inward(x), trainer.scales.outward(y)).fvu)
    left = (trainer.transcoder()(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert_close(float(left), said, rtol=1e-4, atol=0)


def test_dead_features_are_counted_by_tokens():
    """Features shut off by their bias are dead after two batches of 128 tokens, not before."""
    trainer = Trainer.start(replace(RECIPE, dead_after=256), *activations(500))
    trainer.weights.b_enc[:20] = -9.0
    seen = [trainer.step(*activations(128, seed))["dead"] for seed in range(3)]
    assert seen[0] == seen[1] == 0 and seen[2] >= 20 / N
    assert trainer.dead()[:20].all() and not trainer.dead().all()


def test_what_fired_is_not_silent():
    trainer = Trainer.start(RECIPE, *activations(500))
    x, y = activations(64)
    fired = trainer_fired(trainer, trainer.scales.inward(x))
    trainer.step(x, y)
    assert set((trainer.silent == 0).nonzero().flatten().tolist()) == set(fired.tolist())
    assert set(trainer.silent.unique().tolist()) <= {0, 64}


@pytest.mark.parametrize("skip", ["none", "ridge"])
def test_a_resumed_training_gives_the_same_weights_bit_for_bit(tmp_path, skip):
    recipe = replace(RECIPE, skip=skip, dead_after=100)
    whole, killed = (Trainer.start(recipe, *activations(500)) for _ in range(2))
    for seed in range(8):
        whole.step(*activations(64, seed))
    for seed in range(5):
        killed.step(*activations(64, seed))
    killed.save(tmp_path / "layer_3")
    killed.step(*activations(64, 5))  # lost
    again = Trainer.load(tmp_path / "layer_3", recipe)
    assert again.taken == 5
    for seed in range(5, 8):
        again.step(*activations(64, seed))
    for name, weight in whole.transcoder().named_parameters():
        assert torch.equal(weight, getattr(again.transcoder(), name)), name
    assert torch.equal(whole.silent, again.silent)


@pytest.mark.parametrize("where", ["x", "y"])
def test_a_loss_that_is_no_number_leaves_the_last_good_state(where):
    trainer = Trainer.start(RECIPE, *activations(500))
    trainer.step(*activations(64))
    before = {n: p.clone() for n, p in trainer.weights.named_parameters()}
    x, y = activations(64)
    (x if where == "x" else y)[3, 2] = float("nan")
    with pytest.raises(Failure, match="loss of step 1 is nan") as error:
        trainer.step(x, y)
    assert "\n" not in str(error.value)
    assert trainer.taken == 1
    assert all(torch.equal(p, before[n]) for n, p in trainer.weights.named_parameters())


def test_other_recipes_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "layer_0"
    with pytest.raises(BadInput, match="no training to go on with"):
        Trainer.load(path)
    trainer = Trainer.start(RECIPE, *activations(500))
    trainer.save(path)
    with pytest.raises(BadInput, match="another lr"):
        Trainer.load(path, replace(RECIPE, lr=1.0))
    assert json.loads(path.with_suffix(".json").read_text())["k"] == K
    path.with_suffix(".safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(BadInput, match="no training to go on with"):
        Trainer.load(path)


def test_the_rate_rises_stays_and_falls():
    recipe = replace(RECIPE, steps=100, lr=2.0, warm_up=0.1, decay=0.2)
    rates = [recipe.rate(step) for step in (0, 4, 9, 50, 80, 90, 99, 150)]
    assert_close(rates, [0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.1, 0.0])
    assert dead_after(1_000_000) == 50_000 and dead_after(10**9) == 10_000_000


def test_linear_baselines_from_sums_over_batches():
    """Against least squares with a column of ones, and the mean, on all tokens at once."""
    x, y = activations(400)
    sums = Moments.of(x[:150], y[:150]) + Moments.of(x[150:], y[150:])
    ones = torch.cat([x, torch.ones(400, 1)], dim=1).double()
    fitted = torch.linalg.lstsq(ones, y.double()).solution.T
    best = ridge(sums, 0.0)
    assert_close(best.W_skip.double(), fitted[:, :-1], atol=1e-3, rtol=1e-3)
    assert_close(best(x), (ones @ fitted.T).float(), atol=1e-3, rtol=1e-3)
    assert ridge(sums, 10.0).W_skip.norm() < 0.5 * best.W_skip.norm()
    assert_close(mean_baseline(sums)(x), y.mean(0).expand(400, -1))


def test_the_gain_of_the_skip_connection_is_held():
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(weight)
    assert_close(torch.linalg.svdvals(clip_gain(weight, 1.5)), values.clamp(max=1.5))
    assert_close(gain(weight, 100), values[0])
    recipe = replace(RECIPE, skip="ridge", max_gain=0.3, lr=0.05)
    trainer = Trainer.start(recipe, *activations(500))
    for seed in range(6):
        assert torch.linalg.svdvals(trainer.weights.W_skip)[0] < 0.3 * 1.05
        trainer.step(*activations(64, seed))
    assert trainer.weights.W_skip.norm() > 0.3
