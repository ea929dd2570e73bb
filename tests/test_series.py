"""Head norms against what Hugging Face's own model feeds its output projection, step by step."""

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import ARCHS, COMMON

from lens_utils import generate, series
from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel, wrap
from lens_utils.registry import ModelSpec

SPEC = ModelSpec("tiny", "tiny")
ROWS = [[1, 5, 9, 13, 17, 21, 2], [1, 30, 7], [1, 8, 8, 2, 40]]
STEPS = 12
PROJECTION = ("o_proj", "attention.dense", "attn.c_proj")
MIXTURES = {
    "deepseek-v2": lambda: hf.DeepseekV2Config(
        **COMMON, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=1,
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **COMMON, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
}  # fmt: skip


def by_hugging_face(plain, row: list[int], chosen: list[int], n_heads: int) -> torch.Tensor:
    """[head, step]: the input of every output projection, one token at a time over its cache."""
    seen: list[list[torch.Tensor]] = []
    projections = [m for n, m in plain.named_modules() if n.endswith(PROJECTION)]

    def note(module, inputs):
        seen[-1].append(inputs[0][0, -1].double().unflatten(0, (n_heads, -1)).norm(dim=-1))

    handles = [m.register_forward_pre_hook(note) for m in projections]
    cache, ids = None, torch.tensor([row])
    with torch.no_grad():
        for token in chosen:
            seen.append([])
            out = plain(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, torch.tensor([[token]])
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(step) for step in seen], dim=1)


def written(model: LoadedModel) -> tuple[torch.Tensor, list[list[int]]]:
    """What the model goes on with, and the rows to measure: all but the last token."""
    tokens = generate.continuations(model, ROWS, STEPS)
    return tokens, [[*row, *text[:-1]] for row, text in zip(ROWS, tokens.tolist(), strict=True)]


@pytest.mark.parametrize("arch", ARCHS)
def test_one_whole_pass_gives_the_stepwise_norms_of_hugging_face(arch, tiny):
    """Teacher-forced and padded here, one row and one token at a time there."""
    model, plain = wrap(tiny(arch), None, SPEC), tiny(arch)
    tokens, rows = written(model)
    norms = series.head_norms(model, rows, STEPS, batch_size=2)
    assert norms.shape == (3, 12, STEPS) and norms.dtype == torch.float64
    for row, text, found in zip(ROWS, tokens.tolist(), norms, strict=True):
        expected = by_hugging_face(plain, row, text, 4)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert norms.std(dim=2).min() > 1e-4  # heads that stand still would be equal anyhow


def test_rows_measured_together_and_alone_are_the_same(tiny):
    model = wrap(tiny("gemma3"), None, SPEC)
    _, rows = written(model)
    together = series.head_norms(model, rows, STEPS)
    alone = torch.cat([series.head_norms(model, [row], STEPS) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_heads_are_named_layer_by_layer(tiny):
    """A head whose output is set to zero is the one that is named."""
    model = wrap(tiny("qwen3"), None, SPEC)
    names = series.heads(model)

    def silence(z, hook):
        z = z.clone()
        z[:, :, 3] = 0
        return z

    with model.bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_z", silence)]):
        norms = series.head_norms(model, [[1, 5, 9]], 2)
    [at] = torch.nonzero((norms == 0).all(dim=2)[0])[:, 0].tolist()
    assert names.iloc[at].to_dict() == {"layer": 1, "head": 3}
    assert len(names) == norms.shape[1]


@pytest.mark.parametrize("arch", MIXTURES)
def test_heads_of_mixtures_are_split_where_they_are(arch):
    torch.manual_seed(0)
    plain = hf.AutoModelForCausalLM.from_config(MIXTURES[arch]()).eval()
    bridged = hf.AutoModelForCausalLM.from_config(plain.config).eval()
    bridged.load_state_dict(plain.state_dict())
    model = wrap(bridged, None, SPEC)
    found = series.head_norms(model, [[*ROWS[0], 5, 6]], 3)[0]
    expected = by_hugging_face(plain, ROWS[0], [5, 6, 7], 4)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_are_what_the_router_sends_to_them(arch):
    torch.manual_seed(0)
    plain = hf.AutoModelForCausalLM.from_config(MIXTURES[arch]()).eval()
    for parameter in plain.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    layers = [i for i, b in enumerate(plain.model.layers) if hasattr(b.mlp, "experts")]
    seen = {}
    for layer in layers:
        plain.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda m, inputs, layer=layer: seen.setdefault(layer, inputs)
        )
    row = ROWS[0]
    with torch.no_grad():
        plain(torch.tensor([row]))
    expected = torch.zeros(len(layers) * 8, len(row), dtype=torch.float64)
    for i, layer in enumerate(layers):  # one token and one expert at a time, written out
        x, chosen, weight = seen[layer]
        experts = plain.model.layers[layer].mlp.experts
        for token in range(len(row)):
            for expert, share in zip(chosen[token].tolist(), weight[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up) * share
                expected[8 * i + expert, token] = out.double().norm().detach()
    bridged = hf.AutoModelForCausalLM.from_config(plain.config).eval()
    bridged.load_state_dict(plain.state_dict())
    model = wrap(bridged, None, SPEC)
    found = series.expert_norms(model, [row, row[2:]], 4)
    torch.testing.assert_close(found[0], expected[:, -4:], atol=2e-5, rtol=2e-5)
    assert (found > 0).sum(dim=1).eq(2 * len(layers)).all()
    assert series.experts(model).layer.unique().tolist() == layers
    again = series.expert_norms(model, [row], 4)  # the hooks are gone: no doubling
    torch.testing.assert_close(again[0], found[0], atol=2e-5, rtol=2e-5)


def test_a_model_without_experts_is_refused(tiny):
    with pytest.raises(BadInput, match="tiny has no experts"):
        series.expert_norms(wrap(tiny("llama"), None, SPEC), ROWS, 2)


@pytest.mark.parametrize(
    ("rows", "steps", "said"),
    [([[1, 2]], 3, "3 steps need 3 tokens, a row has 2"), ([[1] * 65], 3, "65 tokens are more")],
)
def test_rows_that_do_not_fit_are_refused(rows, steps, said, tiny):
    with pytest.raises(BadInput, match=said):
        series.head_norms(wrap(tiny("llama"), None, SPEC), rows, steps)


def test_loops():
    circling = [7, 8, 9] * 8
    late = [*range(100, 112), *([4, 5] * 6)]
    free = list(range(24))
    found = series.loops(np.array([circling, late, free, [3] * 24]))
    assert found.distinct.tolist() == [3, 14, 24, 1]
    assert found.period.tolist() == [3, 2, 0, 1]
    assert found.repeated.tolist() == pytest.approx([1 - 3 / 21, 1 - 14 / 21, 0, 1 - 1 / 21])
