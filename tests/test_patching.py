"""Patching against the models' own logits, plain hooks on Hugging Face, TransformerLens' loops."""

import contextlib

import pytest
import torch
from conftest import ARCHS
from small_pairs import exchanged, of, random_batch
from transformer_lens import patching as theirs
from transformer_lens.hook_points import HookPoint

from lens_utils import pairs, patching, sweeps
from lens_utils.cache import record
from lens_utils.errors import BadInput
from lens_utils.models import wrap
from lens_utils.patching import Cut, Site, resume, run, skipping
from lens_utils.registry import ModelSpec

EVERY = (*ARCHS, "induction")
ATTENTION = {"gpt2": ("c_proj", "attn"), "neox-parallel": ("dense", "attention"),
             "neox-sequential": ("dense", "attention")}  # fmt: skip


def attentions(hf, arch):
    """The attention modules of a plain Hugging Face model, and their output projections."""
    out, inner = ATTENTION.get(arch, ("o_proj", "self_attn"))
    found = [m for name, m in hf.named_modules()
             if name.endswith(f".{inner}") and "vision" not in name]  # fmt: skip
    return found, [getattr(m, out) for m in found]


def difference(hf, ids, batch):
    """Logit differences of a plain Hugging Face model, before its softcap."""
    with torch.no_grad():
        logits = hf(ids).logits[:, -1]
    if cap := getattr(hf.config.get_text_config(), "final_logit_softcapping", None):
        logits = cap * torch.atanh(logits / cap)
    return (logits.gather(1, batch.answer[:, None]) - logits.gather(1, batch.foil[:, None]))[:, 0]


def near(found, expected, atol=2e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# What is replaced is replaced


@pytest.mark.parametrize("arch", ARCHS)
def test_everything_replaced_is_the_other_run(tiny, arch):
    """All heads and MLPs, with equal embeddings at the last position; or the whole residual."""
    model = of(tiny, arch)
    batch, hf = random_batch(model), tiny(arch)
    layers = range(model.n_layers)
    units = [tuple(Site(c, layer) for layer in layers for c in (attention, "mlp_out"))
             for attention in ("z", "attn_out")]  # fmt: skip
    stream = ["resid_pre", "resid_post"] + ["resid_mid"] * (arch != "neox-parallel")
    units += [(Site(c, layer),) for c in stream for layer in layers]
    clean, corrupt = (difference(hf, ids, batch) for ids in (batch.clean, batch.corrupt))
    assert ((clean - corrupt).abs() > 0.01).all()
    for kind, expected in (("denoise", clean), ("noise", corrupt)):
        found = run(model, batch, units, kind)
        near(found, expected.expand_as(found))
    for found, expected in zip(sweeps.baselines(model, batch), (clean, corrupt), strict=True):
        near(found, expected)


@pytest.mark.parametrize("arch", EVERY)
def test_residuals_agree_with_their_neighbours(tiny, arch):
    """Behind attention nothing moves between positions: resid_mid, resid_post and the next
    block's resid_pre of one position are one intervention."""
    model = of(tiny, arch)
    batch = random_batch(model)
    if arch == "induction":
        batch = next(pairs.batches(model, exchanged(pairs.induction(model, 3), "keys"), 3))
    post = sweeps.sweep(model, batch, "resid_post").logit_diff
    pre = sweeps.sweep(model, batch, "resid_pre").logit_diff
    assert (pre - pre[:, :1, :1]).abs().max() > 0.05
    near(post[:, :-1], pre[:, 1:])
    if arch == "neox-parallel":
        with pytest.raises(BadInput, match="side by side"):
            sweeps.sweep(model, batch, "resid_mid")
        return
    near(sweeps.sweep(model, batch, "resid_mid").logit_diff, post)
    parts = [(Site("resid_pre", 1, None, (4,)), Site("resid_mid", 1, None, (4,))),
             (Site("resid_pre", 1, None, (4,)), Site("attn_out", 1, None, (4,)))]  # fmt: skip
    near(*run(model, batch, parts))  # with resid_pre replaced, what is left to add is attn_out


def test_resid_mid_is_not_only_what_the_mlp_reads(tiny):
    """Why not TransformerLens' hook: writing there changes the MLP's input only."""
    model = of(tiny, "llama")
    batch = random_batch(model)
    clean = record(model, batch.clean, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
    last = "blocks.1.hook_resid_post"
    held = []
    keep = (last, lambda x, hook: held.append(x))
    with torch.no_grad():
        hooks = [("blocks.1.hook_resid_mid", lambda x, hook: clean), keep]
        model.bridge.run_with_hooks(batch.corrupt, fwd_hooks=hooks)
    expected = record(model, batch.clean, [last])[last]
    assert (held[0] - expected).abs().max() > 0.1
    resid = record(model, batch.corrupt, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    site = Site("resid_mid", 1)
    source = patching.sources(model, batch, {site[:2]}, "denoise")
    ours = patching.edits(model, batch, [(site,)], source)
    with torch.no_grad():
        resume(model, resid, 0, [*ours, keep])
    near(held[1], expected)


LOOPS = {
    ("resid_pre", ("pos",)): theirs.get_act_patch_resid_pre,
    ("attn_out", ("pos",)): theirs.get_act_patch_attn_out,
    ("mlp_out", ("pos",)): theirs.get_act_patch_mlp_out,
    ("z", ("head",)): theirs.get_act_patch_attn_head_out_all_pos,
    ("z", ("pos", "head")): theirs.get_act_patch_attn_head_out_by_pos,
    ("q", ("head",)): theirs.get_act_patch_attn_head_q_all_pos,
    ("k", ("kv_head",)): theirs.get_act_patch_attn_head_k_all_pos,
    ("v", ("kv_head",)): theirs.get_act_patch_attn_head_v_all_pos,
    ("pattern", ("head",)): theirs.get_act_patch_attn_head_pattern_all_pos,
}


@pytest.mark.parametrize("arch", ["llama", "gemma3", "neox-parallel", "induction"])
def test_the_same_numbers_as_transformer_lens(tiny, arch, monkeypatch):
    """Its sweeps run one forward pass per cell."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    model = of(tiny, arch)
    batch = random_batch(model, n=2, n_pos=5)
    columns = torch.stack([batch.answer, batch.foil], dim=1)

    def metric(logits):
        answer, foil = logits[:, -1].gather(1, columns).unbind(1)
        return (answer - foil).mean()

    for (component, over), loop in LOOPS.items():
        if component == "mlp_out" and arch == "induction":
            continue  # it has none
        ours = sweeps.sweep(model, batch, component, over=over)
        assert ours.axes == ("layer", *sorted(over))  # head and kv_head before pos
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(batch.clean)
            expected = loop(model.bridge, batch.corrupt, cache, metric)
        expected = torch.as_tensor(expected)
        if (component, len(over)) == ("z", 2):
            expected = expected.mT  # theirs: layer, pos, head
        near(ours.logit_diff.mean(0), expected)


def test_swapped_pairs_turn_denoising_into_noising(tiny):
    model = of(tiny, "llama")
    batch = random_batch(model)
    noise = sweeps.sweep(model, batch, "z", "noise", over=["head"])
    swapped = sweeps.sweep(model, batch.swapped(), "z", "denoise", over=["head"])
    near(noise.logit_diff, -swapped.logit_diff)
    near(noise.effect(), swapped.effect(), atol=1e-3)


# Ablations


@pytest.mark.parametrize("arch", ARCHS)
def test_ablations_are_those_of_plain_hooks(tiny, arch):
    """One forward pass of the Hugging Face model per head, its columns of o_proj's input set."""
    model = of(tiny, arch)
    batch, hf = random_batch(model), tiny(arch)
    projections = attentions(hf, arch)[1]
    n_heads = model.bridge.cfg.n_heads
    inputs = {}
    for name in ("clean", "corrupt"):
        held = []
        with contextlib.ExitStack() as stack:
            for module in projections:
                hook = module.register_forward_pre_hook(lambda m, args, h=held: h.append(args[0]))
                stack.callback(hook.remove)
            difference(hf, getattr(batch, name), batch)
        inputs[name] = held
    kinds = {
        "zero": lambda layer: torch.zeros_like(inputs["clean"][layer]),
        "mean": lambda layer: inputs["clean"][layer].mean(0, keepdim=True),
        "mean_corrupt": lambda layer: inputs["corrupt"][layer].mean(0, keepdim=True),
        "noise": lambda layer: inputs["corrupt"][layer],
    }
    heads = (0, 1), (1, 3), (2, 0)
    for kind, replaced in kinds.items():
        found = run(model, batch, [(Site("z", layer, (head,)),) for layer, head in heads], kind)
        for ours, (layer, head) in zip(found, heads, strict=True):
            width = inputs["clean"][layer].shape[-1] // n_heads
            columns = slice(head * width, (head + 1) * width)

            value = replaced(layer)

            def put(module, args, columns=columns, value=value):
                x = args[0].clone()
                x[..., columns] = value[..., columns]
                return (x,)

            handle = projections[layer].register_forward_pre_hook(put)
            near(ours, difference(hf, batch.clean, batch))
            handle.remove()


def test_resampling_takes_another_pair_and_is_seeded(tiny):
    model = of(tiny, "llama")
    batch = random_batch(model, n=4)
    places = {("resid_pre", 1)}
    own = patching.sources(model, batch, places, "noise")["resid_pre", 1]
    assert own.shape == (4, 7, 32)
    clean = record(model, batch.clean, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    orders = set()
    for seed in range(8):
        drawn = patching.sources(model, batch, places, "resample", seed)["resid_pre", 1]
        gaps = (drawn[:, None] - clean[None]).abs().amax((2, 3))
        order = tuple(gaps.argmin(1).tolist())
        assert gaps.min(1).values.max() == 0 and sorted(order) == [0, 1, 2, 3]
        assert all(i != j for i, j in enumerate(order))
        orders.add(order)
    assert len(orders) > 1


# Attention knock-out


@pytest.mark.parametrize("arch", ARCHS)
def test_a_cut_is_a_masked_score(tiny, arch):
    """In the Hugging Face model the same entries of the additive mask are set to -inf."""
    model = of(tiny, arch)
    batch, hf = random_batch(model), tiny(arch)
    hf.set_attn_implementation("eager")
    blocks = attentions(hf, arch)[0]
    queries, keys, layers = (5, 6), (0, 3, 4), (1, 2)
    clean = difference(hf, batch.clean, batch)

    def mask(module, args, kwargs):
        held = kwargs["attention_mask"].clone().expand(len(batch.clean), -1, -1, -1).clone()
        assert held.dtype.is_floating_point
        for query in queries:
            held[:, :, query, list(keys)] = torch.finfo(held.dtype).min
        return args, kwargs | {"attention_mask": held}

    for layer in layers:
        blocks[layer].register_forward_pre_hook(mask, with_kwargs=True)
    found = run(model, batch, [sweeps.cut(layers, queries, keys), ()], "noise")
    near(found[0], difference(hf, batch.clean, batch))
    near(found[1], clean)
    assert (found[0] - found[1]).abs().max() > 0.05


def test_a_cut_can_be_one_head(tiny):
    """The same pattern, made by hand."""
    model = of(tiny, "qwen3")
    batch = random_batch(model)
    name = "blocks.1.attn.hook_pattern"

    def by_hand(x, hook):
        x = x.clone()
        x[:, 2, 6, :3] = 0
        x[:, 2, 6] /= x[:, 2, 6].sum(-1, keepdim=True)
        return x

    resid = record(model, batch.clean, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    with torch.no_grad():
        expected = resume(model, resid, 0, [(name, by_hand)])
        hooks = patching.edits(model, batch, [sweeps.cut([1], [6], [0, 1, 2], [2])], {})
        near(resume(model, resid, 0, hooks), expected)
        assert (resume(model, resid, 0) - expected).abs().max() > 1e-3


# The core


@pytest.mark.parametrize("arch", EVERY)
def test_blocks_below_are_not_run_and_nothing_changes(tiny, arch):
    model = of(tiny, arch)
    bridge, batch = model.bridge, random_batch(model)
    last = f"blocks.{model.n_layers - 1}"
    names = [f"blocks.{n}.hook_resid_pre" for n in range(model.n_layers)]
    held = record(model, batch.clean, [*names, f"{last}.hook_resid_post"])
    for layer, name in enumerate(names):
        calls = []
        handles = [
            block.attn.original_component.register_forward_hook(
                lambda *_, n=n, c=calls: c.append(n)
            )
            for n, block in enumerate(bridge.blocks)
        ]
        handles += [m.register_forward_hook(lambda *_, c=calls: c.append("end"))
                    for m in (bridge.unembed, bridge.ln_final)]  # fmt: skip
        norms = [block.ln1.register_forward_hook(lambda *_, n=n, c=calls: c.append(n))
                 for n, block in enumerate(bridge.blocks)]  # fmt: skip
        with torch.no_grad():
            found = resume(model, held[name], layer)
        for handle in [*handles, *norms]:
            handle.remove()
        assert set(calls) == set(range(layer, model.n_layers))
        assert torch.equal(found, held[f"{last}.hook_resid_post"][:, -1])


def state(model):
    """What an intervention could leave behind."""
    modules = dict(model.bridge.named_modules())
    return {
        "hooks": {n: (len(m.fwd_hooks), len(m.bwd_hooks)) for n, m in modules.items()
                  if isinstance(m, HookPoint)},
        "torch": {n: [len(m._forward_hooks), len(m._forward_pre_hooks)]
                  for n, m in modules.items()},
        "forward": [n for n, m in modules.items() if "forward" in m.__dict__],
        "resume": [vars(b).get("_start_at_layer_idx") for b in model.bridge.blocks],
    }  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "induction"])
def test_everything_is_undone_also_after_an_exception(tiny, arch):
    model = of(tiny, arch)
    batch = random_batch(model)
    with torch.no_grad():
        logits = model.bridge(batch.clean)
    weights = {k: v.clone() for k, v in model.bridge.state_dict().items()}
    top = f"blocks.{model.n_layers - 1}"
    resid = record(model, batch.clean, [f"{top}.hook_resid_pre"])[f"{top}.hook_resid_pre"]
    before = state(model)  # now: run_with_cache makes transformers hang up hooks of its own

    def fail(x, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        resume(model, resid, model.n_layers - 1, [(f"{top}.attn.hook_z", fail)])
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), skipping(model.bridge, 1):
        assert state(model)["forward"]
        raise ZeroDivisionError
    sweeps.sweep(model, batch, "z", "mean", over=["head"])
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.bridge.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.bridge(batch.clean), logits)


def test_rows_do_not_touch_each_other(tiny):
    """One unit and one pair at a time, or all together: batching noise apart, the same."""
    model = of(tiny, "gemma3")
    batch = random_batch(model)
    units = [(Site("z", layer, (head,)),) for layer in range(3) for head in range(4)]
    units += [(Cut(1, (6,), (2,)),), (Site("resid_mid", 0, None, (4,)), Site("k", 2, (0,), (4,)))]
    whole = run(model, batch, units, tokens=10**6)
    near(run(model, batch, units, tokens=1), whole, atol=1e-5)
    alone = [run(model, pairs.batch(model, [p]), units) for p in batch.pairs]
    near(torch.cat(alone, dim=1), whole, atol=1e-5)


def test_half_precision_says_the_same(tiny):
    """bfloat16 keeps three figures: effects of up to a few nats agree within 0.15."""
    model = of(tiny, "llama")
    half = wrap(tiny("llama").bfloat16(), None, ModelSpec("half", "half"))
    for component in ("z", "resid_mid", "pattern"):
        whole, rounded = (
            sweeps.sweep(m, random_batch(m), component).logit_diff for m in (model, half)
        )
        assert whole.std() > 0.2
        near(rounded, whole, atol=0.15)
