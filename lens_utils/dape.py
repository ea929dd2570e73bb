"""Domain activation probability entropy: which MLP neurons work for one domain only?

For neuron k and domain T let P_T(k) be the share of T's tokens at which k is active. Normalised
over the domains, p_T = P_T / sum P, its entropy is

    DAPE(k) = - sum_T p_T ln p_T        0: active in one domain only;  ln N: in all N alike

(Huo et al. 2024, arXiv:2406.11193; the entropy and the filter below are LAPE's, Tang et al. 2024,
arXiv:2402.16438.) Active means that the activation function lets something through: of a gated MLP
the gate, of another the neuron itself, is above zero before the activation function. Rates are
Jeffreys' (count + 1/2) / (tokens + 1), so that a neuron seen active once is no specialist.

Whether a low DAPE is more than chance is asked of the labels: they are shuffled within groups (the
questions about one maze), and the same count is made again. Shuffled labels, resampled clusters and
halves of the data are *draws*: for every draw a sample counts for one domain, so and so often. One
pass over the model serves all draws, because per batch they are one matrix product

    counts[draw, domain, neuron] += (times one-hot(label))[draw, domain, sample] a[sample, neuron]

with a a sample's number of active tokens; no more than one batch's activations are held, however
many samples there are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from scipy import stats
from torch import Tensor

from lens_utils.errors import BadInput
from lens_utils.models import LoadedModel

Score = Literal["gate", "value", "product", "attribution"]
Span = tuple[int, int]  # first position, and the one behind the last
HELD = 2**28  # activations of one batch: tokens x neurons of all layers
MOST = 64  # rows of one batch
BAR = 0.95  # LAPE's: share of all rates that lie below the bar


class Draws(NamedTuple):
    """Which samples count for which domain, in the data (draw 0) and in versions of it."""

    region: str
    """The span of every row whose tokens are counted."""
    label: Int[ndarray, "draw sample"]
    """Number of the domain, -1 for none."""
    times: Int[ndarray, "draw sample"]
    """How often the sample counts."""
    n_domains: int


class Tally(NamedTuple):
    """What was counted."""

    counts: Float[Tensor, "draw domain layer neuron"]
    """Tokens at which a neuron is active."""
    tokens: Float[Tensor, "draw domain"]
    """All tokens."""


# Counting


def tally(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    spans: Mapping[str, Sequence[Span]],
    draws: Mapping[str, Draws],
    score: Score = "gate",
    above: Float[Tensor, " layer"] | None = None,
    answers: Sequence[Span] | None = None,
) -> dict[str, Tally]:
    """Counts of active neurons for every set of draws, in one pass over the rows; on the CPU.

    spans: of every region, one span per row. score: `gate` (the definition above); `product`, the
    absolute input of the down projection, and `attribution`, that times its gradient for the mean
    logit of the tokens in `answers`, are active `above` a threshold per layer. Raises BadInput for
    a model without MLP hooks and for draws of other samples.
    """
    for name, drawn in draws.items():
        if drawn.label.shape[1] != len(rows) or drawn.region not in spans:
            raise BadInput(f"{name}: labels of {drawn.label.shape[1]} samples in region "
                           f"{drawn.region!r}, but there are {len(rows)} rows")  # fmt: skip
    device, shape = model.device, (model.n_layers, model.bridge.cfg.d_mlp)
    counts = {
        name: torch.zeros(*drawn.label.shape[:1], drawn.n_domains, *shape, device=device)
        for name, drawn in draws.items()
    }
    tokens = {name: torch.zeros(held.shape[:2], device=device) for name, held in counts.items()}
    for at, scores in batches(model, rows, score, answers):
        width = scores[0].shape[1]
        regions = torch.stack(
            [mask([spans[name][i] for i in at], width, device) for name in spans], dim=1
        )
        length = dict(zip(spans, regions.sum(2).unbind(1), strict=True))
        weights = {}
        for name, drawn in draws.items():
            inside = np.flatnonzero(drawn.label[0, at] >= 0)
            if len(inside):
                weights[name] = inside, _weights(drawn, np.array(at)[inside], device)
                tokens[name] += weights[name][1] @ length[drawn.region][inside]
        for layer, values in enumerate(scores):
            active = (values > (0 if above is None else above[layer].to(values.device))).float()
            found = (regions.to(active.device) @ active).to(device)
            of_region = dict(zip(spans, found.unbind(1), strict=True))
            for name, (inside, weight) in weights.items():
                counts[name][:, :, layer] += weight @ of_region[draws[name].region][inside]
    return {name: Tally(counts[name].cpu(), tokens[name].cpu()) for name in draws}


def thresholds(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    spans: Sequence[Span],
    percent: float,
    score: Score,
    answers: Sequence[Span] | None = None,
    n_rows: int = 48,
) -> Float[Tensor, " layer"]:
    """The score of each layer that `percent` of all (token, neuron) pairs exceed, whatever the
    domain; from up to n_rows rows, taken evenly. Raises BadInput for a share outside 0 to 100."""
    if not 0 < percent < 100:
        raise BadInput(f"activation-threshold {percent}: percent of activations, above 0 below 100")
    taken = np.unique(np.linspace(0, len(rows) - 1, min(n_rows, len(rows))).round().astype(int))
    some = [rows[i] for i in taken]
    targets = None if answers is None else [answers[i] for i in taken]
    values: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    for at, scores in batches(model, some, score, targets):
        inside = mask([spans[taken[i]] for i in at], scores[0].shape[1], model.device).bool()
        for held, found in zip(values, scores, strict=True):
            chosen = found[inside.to(found.device)].float().flatten()
            held.append(chosen[:: max(1, chosen.numel() // 2**18)].cpu())
    limits = [torch.cat(held)[: 2**23].quantile(1 - percent / 100) for held in values]
    return torch.stack(limits)


def batches(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    score: Score = "gate",
    answers: Sequence[Span] | None = None,
) -> Iterator[tuple[list[int], list[Float[Tensor, "sample pos neuron"]]]]:
    """Scores of every neuron at every position, one list over layers per batch of rows, with the
    rows' numbers. Short rows come first; they are padded on the right. `gate` is the input of the
    activation function, `value` that of the down projection. Raises BadInput."""
    hook = "mlp.hook_pre" if score == "gate" else "mlp.hook_post"
    names = [f"blocks.{layer}.{hook}" for layer in range(model.n_layers)]
    if names[0] not in model.bridge.hook_dict:
        raise BadInput(f"{model.name} has no {hook}: its MLPs have no neurons to count "
                       "(experts are not supported)")  # fmt: skip
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    neurons = model.n_layers * model.bridge.cfg.d_mlp
    start = 0
    while start < len(order):
        at = order[start : start + MOST]
        while len(at) > 1 and len(rows[at[-1]]) * len(at) * neurons > HELD:
            at = at[: len(at) // 2]
        start += len(at)
        ids, real = model.batch([rows[i] for i in at])
        held: dict[str, Tensor] = {}
        if score == "attribution":
            assert answers is not None, "attribution needs to know what it is for"
            yield at, _attribution(model, ids, real, names, [answers[i] for i in at])
            continue
        hooks = [(name, _keeper(held, name)) for name in names]
        with torch.no_grad():
            model.bridge.run_with_hooks(
                ids, attention_mask=real, fwd_hooks=hooks, use_cache=False, logits_to_keep=1
            )
        found = [held[name] for name in names]
        yield at, [x.abs() for x in found] if score == "product" else found


def _keeper(held: dict[str, Tensor], name: str) -> Callable[..., Tensor]:
    def keep(x: Tensor, hook: object) -> Tensor:
        held[name] = x
        return x

    return keep


def _attribution(
    model: LoadedModel, ids: Tensor, real: Tensor, names: Sequence[str], answers: Sequence[Span]
) -> list[Tensor]:
    """|a dy/da| with y the mean logit of each row's answer tokens."""
    held: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def keep(x: Tensor, hook: object) -> Tensor:
            x = x if x.requires_grad else x.detach().requires_grad_()
            x.retain_grad()
            held[name] = x
            return x

        return keep

    with torch.enable_grad():
        logits = model.bridge.run_with_hooks(
            ids, attention_mask=real, fwd_hooks=[(n, watch(n)) for n in names], use_cache=False
        )
        said = logits[:, :-1].float().gather(2, ids[:, 1:, None].to(logits.device))[:, :, 0]
        # The token at position p is said at p - 1.
        where = mask([(a - 1, b - 1) for a, b in answers], said.shape[1], said.device)
        ((said * where).sum(1) / where.sum(1).clamp_min(1)).sum().backward()
    return [(held[n].detach() * held[n].grad).abs() for n in names]


def mask(spans: Sequence[Span], width: int, device: torch.device) -> Float[Tensor, "sample pos"]:
    """One inside each row's span, zero elsewhere."""
    position = torch.arange(width, device=device)
    start, end = torch.tensor(spans, device=device).reshape(-1, 2, 1).unbind(1)
    return ((position >= start) & (position < end)).float()


def _weights(
    drawn: Draws, at: ndarray, device: torch.device
) -> Float[Tensor, "draw domain sample"]:
    label, times = (torch.as_tensor(x[:, at], device=device) for x in (drawn.label, drawn.times))
    domains = torch.arange(drawn.n_domains, device=device)
    return (label[:, None] == domains[:, None]).float() * times[:, None].float()


# The measure


def rates(
    counts: Float[Tensor, "... domain layer neuron"], tokens: Float[Tensor, "... domain"]
) -> Float[Tensor, "... domain layer neuron"]:
    """Share of a domain's tokens at which a neuron is active, by Jeffreys' prior."""
    return (counts + 0.5) / (tokens[..., None, None] + 1)


def dape(rate: Float[Tensor, "... domain layer neuron"]) -> Float[Tensor, "... layer neuron"]:
    """Entropy (nats) of the rates normalised over domains: 0 to ln N."""
    share = rate / rate.sum(-3, keepdim=True)
    return torch.special.entr(share).sum(-3)


def all_dapes(tallied: Tally) -> Float[Tensor, "draw layer neuron"]:
    """DAPE in every draw, one draw in memory at a time."""
    pairs = zip(tallied.counts, tallied.tokens, strict=True)
    return torch.stack([dape(rates(counts, tokens)) for counts, tokens in pairs])


def bar(rate: Float[Tensor, "domain layer neuron"], share: float = BAR) -> float:
    """The rate that `share` of all rates lie below: LAPE's minimum rate of a domain's neuron."""
    return float(np.quantile(rate.numpy(), share))


def uneven(n_domains: int, times: float = 2.0) -> float:
    """DAPE (nats) of a neuron that is active in one domain so many times as often as in each other.

    A floor of effect size: only what is at least as uneven is called specialised.
    """
    shares = np.array([times, *[1.0] * (n_domains - 1)])
    return float(stats.entropy(shares))


def lape(
    rate: Float[Tensor, "domain layer neuron"], percent: float = 1.0, share: float = BAR
) -> Bool[Tensor, "layer neuron"]:
    """LAPE's selection: the lowest `percent` of all neurons by DAPE, among those above the bar in
    some domain. How many there are is its parameter, not a finding. Raises BadInput."""
    if not 0 < percent <= 25:
        raise BadInput(f"domain-specific-percentile {percent}: above 0 and up to 25")
    entropy = dape(rate).masked_fill(~(rate > bar(rate, share)).any(0), math.inf)
    found = min(int((entropy < math.inf).sum()), max(1, round(entropy.numel() * percent / 100)))
    chosen = torch.zeros(entropy.numel(), dtype=torch.bool)
    chosen[entropy.flatten().argsort(stable=True)[:found]] = True
    return chosen.unflatten(0, entropy.shape)


# Draws


def draws(
    label: Int[ndarray, " sample"],
    group: Int[ndarray, " sample"],
    cluster: Shaped[ndarray, " sample"],
    region: str,
    n_shuffles: int = 0,
    n_resamples: int = 0,
    seed: int = 0,
) -> Draws:
    """The data; labels shuffled within groups; clusters resampled; both halves of the clusters.

    In this order: draw 0, then n_shuffles, then n_resamples, then 2. Samples labelled -1 stay out.
    """
    rng, inside = np.random.default_rng(seed), np.flatnonzero(label >= 0)
    n, number = 3 + n_shuffles + n_resamples, np.unique(cluster, return_inverse=True)[1]
    labels = np.tile(label.astype(np.int8), (n, 1))
    times = np.ones((n, len(label)), np.int16)
    base = inside[np.argsort(group[inside], kind="stable")]
    for draw in range(1, 1 + n_shuffles):
        mixed = inside[np.lexsort((rng.random(len(inside)), group[inside]))]
        labels[draw, base] = label[mixed]
    n_clusters = int(number.max()) + 1
    for draw in range(1 + n_shuffles, n - 2):
        drawn = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters))
        times[draw] = drawn[number]
    first = halves(n_clusters)[number]
    times[-2], times[-1] = first, ~first
    return Draws(region, labels, times, int(label.max()) + 1)


def halves(n: int) -> Bool[ndarray, " cluster"]:
    """True for the clusters of the first half: a fixed random half of n."""
    first = np.zeros(n, bool)
    first[np.random.default_rng(n).permutation(n)[: (n + 1) // 2]] = True
    return first


def p_values(
    entropies: Float[Tensor, "draw layer neuron"],
) -> Float[Tensor, "layer neuron"]:
    """Share of shuffled draws with a DAPE as low as in the data, which is draw 0 and counts too."""
    lower = (entropies <= entropies[0] + 1e-6).sum(0)
    return lower / len(entropies)


def q_values(p: Float[Tensor, "layer neuron"]) -> Float[Tensor, "layer neuron"]:
    """Benjamini and Hochberg's false discovery rates over all neurons."""
    found = stats.false_discovery_control(p.double().numpy().ravel())
    return torch.from_numpy(found).reshape(p.shape).float()
