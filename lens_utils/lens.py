"""The logit lens: what would the model say if it stopped here?

The residual stream is read at depths 0 .. n_layers: depth 0 is what block 0 reads (the embedding,
with positions where they are added), depth l + 1 the output of block l, and depth n_layers what
the model itself reads out. Readouts of a residual h (nostalgebraist 2020; ridge after the affine
"tuned lens" of Belrose et al. 2023, arXiv:2303.08112, here in closed form):

    norm      W_U · ln_final(h)        rescaled as every reader of the stream rescales it
    raw       W_U · ln_final(h) · |h|  the same direction unscaled; |h| is what ln_final divides
                                       by: the rms (RMSNorm) or standard deviation (LayerNorm)
    ridge     W_U · A_depth · h/|h|    A_depth predicts ln_final(h_n) from the text of a corpus
    next_ln1  W_U · ln1(h)             of the next block, only on weights with folded gains

For RMSNorm, raw and norm rank tokens alike; only their confidence differs, and raw confidence is
mostly the length of h. A gain belongs to its own reader: on unfolded weights the next block's ln1
carries a gain that was never learned for W_U, and reading through it destroys the readout. Hence
ln_final at every depth, and next_ln1 is refused where ln1 has a gain. On folded weights all ln1
are alike and next_ln1 equals norm (tested).

A softcap is part of the model's readout and is applied at every depth.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lens_utils.errors import BadInput, Failure

BITS = 1 / math.log(2)


def key_layers(n_layers: int) -> list[int]:
    """Blocks at 0, 1/6, 1/3, 1/2, 2/3, 5/6 of the model, and its last."""
    n = n_layers
    return sorted({0, n // 6, n // 3, n // 2, 2 * n // 3, 5 * n // 6, n - 1})


def depths(n_layers: int, layers: str) -> list[int]:
    """Depths to read for `--layers all | key | 0,5,10`: the embedding, and those blocks' outputs.

    The last depth is always among them. Raises BadInput for a block the model does not have.
    """
    if layers == "all":
        return list(range(n_layers + 1))
    if layers == "key":
        blocks = key_layers(n_layers)
    else:
        parts = [p.strip() for p in layers.split(",")]
        if not all(p.isdecimal() for p in parts):
            raise BadInput(f"--layers {layers}: write all, key, or block numbers such as 0,5,10")
        blocks = sorted({int(p) for p in parts})
        if blocks[-1] >= n_layers:
            raise BadInput(f"--layers {layers}: this model's blocks are 0 to {n_layers - 1}")
    return [0, *sorted({b + 1 for b in blocks} | {n_layers})]


def hook(depth: int) -> str:
    """The hook that holds the residual stream at a depth."""
    return f"blocks.{depth - 1}.hook_resid_post" if depth else "blocks.0.hook_resid_pre"


class Readout:
    """The model's last steps, ln_final and W_U, in float32 whatever the model's dtype.

    Half-precision norms overflow in their squares, and half-precision logits tie at the top.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        # A copy of its own: calling the bridge's module would fire the hooks that hang on it.
        norm = bridge.ln_final.original_component
        self.ln_final: nn.Module = copy.deepcopy(norm).float()
        self.W_U: Float[Tensor, "d_model d_vocab"] = bridge.W_U.float()
        bias = getattr(bridge.unembed, "b_U", None)
        self.b_U: Float[Tensor, " d_vocab"] | None = (
            bias.float() if bias is not None and bool(bias.any()) else None
        )
        norm_bias = getattr(self.ln_final, "bias", None)
        # What the readout adds whatever h is: zero for RMSNorm without an unembedding bias.
        self.constant: Float[Tensor, " d_vocab"] | None = (
            norm_bias @ self.W_U + (0 if self.b_U is None else self.b_U)
            if norm_bias is not None
            else self.b_U
        )
        self.centred = isinstance(self.ln_final, nn.LayerNorm)
        self.plain = isinstance(self.ln_final, nn.Identity)  # hand-built models have no norm
        names = [name for name in ("eps", "variance_epsilon") if hasattr(self.ln_final, name)]
        self.eps = float(getattr(self.ln_final, names[0])) if names else 0.0
        self.softcap = float(bridge.cfg.output_logits_soft_cap or -1)

    def scale(self, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead 1"]:
        """What ln_final divides by: the rms, or for LayerNorm the standard deviation."""
        if self.plain:
            return torch.ones_like(resid[..., :1], dtype=torch.float32)
        return (self._around_mean(resid).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def unit(self, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
        """What ln_final makes of a residual before its gain: what a translator reads."""
        return self._around_mean(resid) / self.scale(resid)

    def _around_mean(self, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
        resid = resid.float()
        return resid - resid.mean(-1, keepdim=True) if self.centred else resid

    def normed(self, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
        """ln_final of a residual, in float32."""
        return self.ln_final(resid.float())

    def logit_diff(
        self,
        resid: Float[Tensor, "*lead batch d_model"],
        answer: Int[Tensor, " batch"],
        foil: Int[Tensor, " batch"],
    ) -> Float[Tensor, "*lead batch"]:
        """Logit of the answer minus logit of the foil, before any softcap, from two columns of W_U.

        A softcap is monotone: it never changes the sign.
        """
        direction = (self.W_U[:, answer] - self.W_U[:, foil]).T
        difference = torch.linalg.vecdot(self.normed(resid), direction)
        return difference if self.b_U is None else difference + self.b_U[answer] - self.b_U[foil]

    def unembed(self, normed: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_vocab"]:
        """Logits before any softcap."""
        logits = normed @ self.W_U
        return logits if self.b_U is None else logits + self.b_U

    def cap(self, logits: Float[Tensor, "*lead d_vocab"]) -> Float[Tensor, "*lead d_vocab"]:
        """The model's softcap, if it has one (TransformerLens writes -1 for none)."""
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap > 0 else logits

    def read(self, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_vocab"]:
        """The norm lens. At the last depth, the model's own logits."""
        return self.cap(self.unembed(self.normed(resid)))

    def read_both(
        self, resid: Float[Tensor, "*lead d_model"]
    ) -> tuple[Float[Tensor, "*lead d_vocab"], Float[Tensor, "*lead d_vocab"]]:
        """The norm and the raw lens, from one product with W_U."""
        logits = self.unembed(self.normed(resid))
        constant = 0 if self.constant is None else self.constant
        raw = (logits - constant) * self.scale(resid) + constant
        return self.cap(logits), self.cap(raw)

    def read_next(
        self, resid: Float[Tensor, "*lead d_model"], depth: int
    ) -> Float[Tensor, "*lead d_vocab"]:
        """The readout through the next block's ln1. Raises BadInput on unfolded weights."""
        if depth == self.bridge.cfg.n_layers:
            return self.read(resid)
        ln1 = self.bridge.blocks[depth].ln1
        probe = torch.randn(4, resid.shape[-1], generator=torch.Generator().manual_seed(0))
        probe = probe.to(resid.device, resid.dtype)
        if not torch.allclose(ln1(probe).float(), self.unit(probe), atol=1e-3):
            raise BadInput(
                "next_ln1 reads through a norm whose gain was learned for its own block: "
                "fold the norms into the weights first (--fold), or use --lens norm"
            )
        return self.cap(self.unembed(ln1(resid).float()))

    def translate(
        self,
        resid: Float[Tensor, "*lead d_model"],
        translator: Float[Tensor, "d_model_1 d_model"],
    ) -> Float[Tensor, "*lead d_vocab"]:
        """The ridge lens: logits of the final normed residual that the translator predicts."""
        return self.cap(self.unembed(with_one(self.unit(resid)) @ translator))


def with_one(x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model_1"]:
    """A column of ones behind x, for the bias of a linear map."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


@dataclass
class Moments:
    """Second moments of depth's unit residuals with themselves and with ln_final(h_n), summed."""

    xx: Float[Tensor, "depth d_model_1 d_model_1"]
    xy: Float[Tensor, "depth d_model_1 d_model"]
    n: int

    def translators(
        self, penalty: float, at: Sequence[int] | None = None
    ) -> Float[Tensor, "depth d_model_1 d_model"]:
        """Ridge regression in closed form, at all depths or those listed.

        The penalty is relative to the mean variance; the bias is not penalised. Solved in float64
        on the CPU.
        """
        solved = []
        for i in range(len(self.xx)) if at is None else at:
            xx, xy = self.xx[i].cpu().double(), self.xy[i].cpu().double()
            weight = torch.full_like(xx.diagonal(), penalty * float(xx.diagonal()[:-1].mean()))
            weight[-1] = 0
            factor = torch.linalg.cholesky(xx + weight.diag())
            solved.append(torch.cholesky_solve(xy, factor).float())
        return torch.stack(solved)


@torch.no_grad()
def moments(readout: Readout, residuals: Iterable[Float[Tensor, "depth token d_model"]]) -> Moments:
    """Sum the moments of a stream of residuals whose last depth is the model's last."""
    total: Moments | None = None
    for resid in residuals:
        x, y = with_one(readout.unit(resid)), readout.normed(resid[-1])
        xx, xy = x.mT @ x, x.mT @ y
        if total is None:
            total = Moments(xx, xy, y.shape[0])
        else:
            total.xx += xx
            total.xy += xy
            total.n += y.shape[0]
    if total is None:
        raise BadInput("the corpus gave no tokens to fit the ridge lens on")
    return total


class Reference(NamedTuple):
    """What every readout of a prompt is compared with: the model's own output."""

    logits: Float[Tensor, "batch d_vocab"]
    logp: Float[Tensor, "batch d_vocab"]
    p: Float[Tensor, "batch d_vocab"]
    plogp: Float[Tensor, " batch"]
    top5: Int[Tensor, "batch 5"]
    mean: Float[Tensor, " batch"]
    norm: Float[Tensor, " batch"]


def reference(final: Float[Tensor, "batch d_vocab"]) -> Reference:
    """The reference for logits of the model's output."""
    logp = final.log_softmax(-1)
    p = logp.exp()
    mean, norm = _centred(final)
    top5 = final.topk(5).indices
    return Reference(final, logp, p, torch.linalg.vecdot(p, logp), top5, mean, norm)


def _centred(
    logits: Float[Tensor, "batch d_vocab"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Mean, and norm around the mean, without a centred copy."""
    mean = logits.mean(1)
    square = torch.linalg.vecdot(logits, logits) - logits.shape[1] * mean**2
    return mean, square.clamp_min(0).sqrt()


def rank(
    logits: Float[Tensor, "batch d_vocab"], token: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """1 + the number of strictly larger logits. Raises Failure for NaN, which nothing exceeds."""
    own = logits.gather(1, token[:, None])
    if own.isnan().any():
        raise Failure("the readout is NaN: this model overflows its dtype, try --dtype float32")
    return (logits > own).sum(1) + 1


@torch.no_grad()
def scores(
    logits: Float[Tensor, "batch d_vocab"], model: Reference, answer: Int[Tensor, " batch"]
) -> dict[str, Shaped[Tensor, " batch"]]:
    """How a readout compares with the model's own output, per prompt.

    p_answer, p_top1, p_top5 and margin (to the runner-up) are probabilities over the whole
    vocabulary; answer_rank is 1 + the number of strictly larger logits; entropy_bits and both
    divergences are in bits: kl_bits = KL(model || lens), kl_reverse_bits = KL(lens || model);
    agrees: same top token; overlap: Jaccard of the five top tokens; cosine: of centred logits.
    """
    logq = logits.log_softmax(-1)
    q = logq.exp()
    qlogq = torch.linalg.vecdot(q, logq)
    top, ids = q.topk(5)
    shared = (ids[:, :, None] == model.top5[:, None, :]).sum((1, 2))
    mean, norm = _centred(logits)
    dot = torch.linalg.vecdot(logits, model.logits) - logits.shape[1] * mean * model.mean
    return {
        "p_answer": q.gather(1, answer[:, None])[:, 0],
        "answer_rank": rank(logits, answer),
        "top1": ids[:, 0],
        "p_top1": top[:, 0],
        "p_top5": top.sum(1),
        "margin": top[:, 0] - top[:, 1],
        "entropy_bits": -qlogq * BITS,
        "kl_bits": (model.plogp - torch.linalg.vecdot(model.p, logq)).clamp_min(0) * BITS,
        "kl_reverse_bits": (qlogq - torch.linalg.vecdot(q, model.logp)).clamp_min(0) * BITS,
        "agrees": ids[:, 0] == model.top5[:, 0],
        "overlap": shared / (10 - shared),
        "cosine": dot / (norm * model.norm),
    }


@torch.no_grad()
def fitted_temperature(
    logits: Float[Tensor, "batch d_vocab"], final: Float[Tensor, "batch d_vocab"]
) -> float:
    """The one temperature T that minimises the mean KL(model || softmax(logits / T)).

    Bounded minimisation over log T, T between 1/16 and 64.
    """
    p = final.softmax(-1)

    def loss(log_t: float) -> float:
        logq = (logits / math.exp(log_t)).log_softmax(-1)
        return -float(torch.linalg.vecdot(p, logq).mean())

    bounds = (math.log(1 / 16), math.log(64))
    return math.exp(minimize_scalar(loss, bounds=bounds, options={"xatol": 0.01}).x)


def first_depth(ranks: Sequence[int], depths: Sequence[int], stable: bool = False) -> int | None:
    """The first depth at which the answer has rank 1; `stable`: and keeps it to the end."""
    first = [rank == 1 for rank in ranks]
    if stable:
        first = [all(first[i:]) for i in range(len(first))]
    return depths[first.index(True)] if True in first else None


def copy_depth(
    p_top1: Sequence[float],
    margin: Sequence[float],
    in_prompt: Sequence[bool],
    depths: Sequence[int],
    threshold: float,
) -> int | None:
    """The first depth after the embedding at which a token of the prompt is on top, surely.

    Its probability is above `threshold` and its margin above 0.10. Depth 0 is left out: with tied
    embeddings it reads back its own token by construction.
    """
    for depth, p, gap, copied in zip(depths, p_top1, margin, in_prompt, strict=True):
        if depth and copied and p > threshold and gap > 0.10:
            return depth
    return None
