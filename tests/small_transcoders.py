"""Random transcoders for any model, and a model of two features whose graph is known by hand."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lens_utils.models import LoadedModel, wrap
from lens_utils.registry import ModelSpec
from lens_utils.sparse import Transcoder

IDS = [1, 17, 42, 5, 33, 17, 60]


def random_transcoders(
    model: LoadedModel, skip: bool = False, k: int | None = 5, latents: int = 40
) -> dict[int, Transcoder]:
    """One for every layer but the second, so that there is an MLP without."""
    generator, dtype = torch.Generator().manual_seed(1), model.bridge.W_U.dtype
    d = model.bridge.cfg.d_model

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator).to(dtype)

    return {
        layer: Transcoder(draw(latents, d), draw(latents), draw(latents, d), draw(d),
                          0.5 * draw(d, d) if skip else None, k)
        for layer in range(model.n_layers) if layer != 1
    }  # fmt: skip


def two_features() -> tuple[LoadedModel, dict[int, Transcoder]]:
    """No attention, MLPs that write nothing, two features.

    Dimension t of the embedding is token t. Feature 3 of layer 0 reads dimension 2 and writes
    dimension 8; feature 7 of layer 1 reads dimension 8 and writes dimension 9, which token 5's
    logit reads. What they write is taken back by the error, as the MLPs write nothing.
    """
    config = LlamaConfig(
        vocab_size=6, hidden_size=10, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=10, max_position_embeddings=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 if "norm" in name else 0)
        model.model.embed_tokens.weight[torch.arange(6), torch.arange(6)] = 1
        model.lm_head.weight[5, 9] = 1
    made = {}
    for layer, (feature, reads, writes) in enumerate(((3, 2, 8), (7, 8, 9))):
        W_enc, W_dec = torch.zeros(8, 10), torch.zeros(8, 10)
        W_enc[feature, reads], W_dec[feature, writes] = 2.0, 3.0
        bias = torch.full((8,), -1.0)
        bias[7] = 0.5 if layer else -1.0
        made[layer] = Transcoder(W_enc, bias, W_dec, torch.zeros(10), None, 2)
    return wrap(model, None, ModelSpec("two", "two")), made
