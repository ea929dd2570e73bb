"""What replaced MLPs cost, against a Hugging Face model whose MLPs are replaced by plain hooks."""

import numpy as np
import pytest
import torch

from lens_utils.faithfulness import constant, faithfulness, increase, ratio, recovered
from lens_utils.models import wrap
from lens_utils.registry import ModelSpec
from lens_utils.text_rows import Row

ROWS = [Row([1, 5, 9, 20, 31, 8], "a", "toy", "test"), Row([1, 7, 8, 40], "b", "toy", "test"),
        Row([3, 30, 6, 12, 13, 14, 15], "c", "toy", "test",
            ["question"] * 4 + ["explore", "answer", "mark"])]  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "gemma3", "neox-parallel"])
def test_a_zeroed_mlp_costs_what_it_costs_by_hand(tiny, arch):
    hf = tiny(arch)
    model = wrap(tiny(arch), None, ModelSpec(arch, arch))
    d_model = model.bridge.cfg.d_model
    zero = {1: constant(torch.zeros(d_model))}
    found = faithfulness(model, ROWS, {"zero 1": zero, "nothing": {}})
    mlp = [m for name, m in hf.named_modules() if name.endswith(".mlp")][1]

    def silence(module, args, y):
        return torch.cat([y[:, :1], torch.zeros_like(y[:, 1:])], 1)

    for i, row in enumerate(ROWS):
        ids = torch.tensor([row.ids])
        asked = range(4, 7) if row.labels else range(2, len(row.ids))
        clean = hf(ids).logits.detach()[0].log_softmax(-1)
        handle = mlp.register_forward_hook(silence)
        after = hf(ids).logits.detach()[0].log_softmax(-1)
        handle.remove()
        for name, logits in (("original", clean), ("zero 1", after), ("nothing", clean)):
            line = found[(found.condition == name) & (found.doc == row.doc)].iloc[0]
            ce = -sum(float(logits[t - 1, row.ids[t]]) for t in asked)
            assert line.tokens == len(asked), i
            assert line.ce == pytest.approx(ce, rel=1e-4)
            kl = sum(float((clean[t - 1].exp() * (clean - logits)[t - 1]).sum()) for t in asked)
            assert line.kl == pytest.approx(kl, abs=1e-4)
            same = sum(bool(clean[t - 1].argmax() == logits[t - 1].argmax()) for t in asked)
            assert line.same == same
    assert increase(found, "nothing")["value"] == 0
    assert increase(found, "zero 1", "kl")["value"] > 0.001


def test_the_mlp_itself_in_its_place_costs_nothing(tiny):
    """A linear MLP is a transcoder without features: its skip connection says it all."""
    hf = tiny("gpt2")
    for block in hf.transformer.h:
        block.mlp.act = torch.nn.Identity()
    model = wrap(hf, None, ModelSpec("gpt2", "gpt2"))
    mlp = hf.transformer.h[0].mlp
    with torch.no_grad():
        W_skip = (mlp.c_fc.weight @ mlp.c_proj.weight).T
        b_dec = mlp.c_fc.bias @ mlp.c_proj.weight + mlp.c_proj.bias
    whole, half = constant(b_dec, W_skip), constant(b_dec, W_skip / 2)
    zero = constant(torch.zeros_like(b_dec))
    found = faithfulness(model, ROWS, {"whole": {0: whole}, "half": {0: half}, "zero": {0: zero}})
    assert abs(increase(found, "whole")["value"]) < 1e-5
    assert recovered(found, "whole", "zero")["value"] == pytest.approx(1, abs=1e-3)
    assert abs(increase(found, "half", "kl")["value"]) > 1e-4


def test_a_ratio_resamples_documents():
    above, below = np.array([1.0, 3.0, 4.0, 0.0]), np.array([2.0, 2.0, 4.0, 8.0])
    found = ratio(above, below, ["a", "a", "b", "c"])
    assert found["value"] == pytest.approx(0.5) and found["n"] == 3
    assert found["low"] == 0 and found["high"] == 1  # three times c, three times a or b
    alone = ratio(above, below, ["a"] * 4)
    assert alone["low"] == alone["high"] == alone["value"]
