"""Learned masks: gradient descent on which K and V units to keep.

One loop, four ways to have gates that gradients can move. Every step draws rows and positions of
the fit split, and minimises the distance to the model (or, as a historical option, the loss on the
text) plus the way's own penalty. Every so often the mask of exactly the asked size is measured on
the validation split, and the best one so far is the result. Step 0 is the ranking that the run
starts from, so a learned mask is never worse there than its start.

    topk           gates are exactly the top k of the scores from the first step on; backwards they
                   pass the gradient on as it is, also to units that are off (straight-through; as
                   in edge-popup and movement pruning). Always hard, always of the asked size.
    hard_concrete  stretched, noisy gates (Louizos et al. 2018, arXiv:1712.01312), their expected
                   number driven to the target by two multipliers that ascend (Edge Pruning,
                   Bhaskar et al. 2024, arXiv:2406.16778).
    continuous     sigmoid(beta s) with beta growing from 1 to 200 and a price on every open gate
                   (continuous sparsification, Savarese et al. 2020, arXiv:1912.04427). The price
                   does not set the size; the cut at the end does.
    original       the first plan's recipe, to show what it does: gates 1[sigmoid(l/T) > 1/2] from
                   logits that start at 0, so at first everything is off, and nothing that asks for
                   sparsity. Its own mask is the result, of whatever size it has.

Batches are functions of (seed, step): a killed run goes on from its last state and ends the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lens_utils.errors import BadInput
from lens_utils.kv_masks import Examples, Fill, Masked, kl, resampled, spans
from lens_utils.kv_scores import drawn, ranks, top

Method = Literal["topk", "hard_concrete", "continuous", "original"]
METHODS = ("topk", "hard_concrete", "continuous", "original")
COLUMNS = ("step", "train_loss", "val_kl", "target_sparsity", "sparsity", "temperature",
           "reg_loss", "lr")  # fmt: skip
LOW, HIGH, BETA = -0.1, 1.1, 2 / 3  # of the hard concrete distribution


@dataclass(frozen=True)
class Recipe:
    """How a mask is learned."""

    method: Method = "topk"
    steps: int = 500
    lr: float = 0.01
    rows: int = 4
    positions: int = 16
    """Predictions per row that go into the loss."""
    every: int = 25
    """Steps between two measurements on the validation split."""
    objective: Literal["kl", "lm"] = "kl"
    fill: Literal["constant", "learned", "resample"] = "constant"
    price: float = 1.0
    """Weight of the open share of gates, for "continuous"."""


class Learned(NamedTuple):
    """The best mask on the validation split, what it was cut from, and how it went."""

    mask: Float[Tensor, " unit"]
    scores: Float[Tensor, " unit"]
    history: Float[Tensor, "measurement column"]
    """Columns are COLUMNS."""
    fill: Fill


class Gates:
    """Parameters, the gates made of them at a step, a penalty, and scores to cut a mask from."""

    def __init__(self, recipe: Recipe, start: Float[Tensor, " unit"], kept: int) -> None:
        self.recipe, self.kept, self.n = recipe, kept, len(start)
        self.target = 1 - kept / self.n
        # Adam moves a parameter by about lr a step, whatever the gradient's size: the start has to
        # lie within reach. Ranks do, 0 to 1 for top-k and -1 to 1 around the others' thresholds.
        place = ranks(start)
        first = {"topk": place, "original": torch.zeros_like(place)}
        soft = 2 * place - 1
        if recipe.method == "hard_concrete":
            soft = soft + 2.0  # mostly open
        self.scores = first.get(recipe.method, soft).clone().requires_grad_(True)
        self.prices = torch.zeros(2, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves downhill."""
        return [self.scores]

    def temperature(self, step: int) -> float:
        """Of the gates at a step, where they have one."""
        done = step / max(self.recipe.steps, 1)
        match self.recipe.method:
            case "continuous":
                return 1 / 200**done
            case "original":
                return 1 - 0.9 * done
            case _:
                return 1.0

    def at(self, step: int, noise: torch.Generator) -> Float[Tensor, " unit"]:
        """The gates of a training step; differentiable."""
        match self.recipe.method:
            case "topk":
                hard = top(self.scores.detach(), self.kept)
                return hard + (self.scores - self.scores.detach())
            case "hard_concrete":
                u = torch.rand(self.n, generator=noise).clamp(1e-6, 1 - 1e-6)
                s = torch.sigmoid((u.logit() + self.scores) / BETA)
                return (s * (HIGH - LOW) + LOW).clamp(0, 1)
            case "continuous":
                return torch.sigmoid(self.scores / self.temperature(step))
            case _:
                soft = torch.sigmoid(self.scores / self.temperature(step))
                return (soft > 0.5).float() + (soft - soft.detach())

    def penalty(self, step: int) -> Float[Tensor, ""]:
        """What is added to the loss for the mask's size."""
        match self.recipe.method:
            case "hard_concrete":
                open_ = torch.sigmoid(self.scores - BETA * math.log(-LOW / HIGH)).mean()
                # The target grows over the first half: a sudden one destroys the model at once.
                reached = min(1.0, 2 * step / max(self.recipe.steps, 1))
                gap = self.target * reached - (1 - open_)
                return self.prices[0] * gap + self.prices[1] * gap**2
            case "continuous":
                open_ = torch.sigmoid(self.scores / self.temperature(step)).mean()
                return self.recipe.price * open_
            case _:
                return torch.zeros(())

    def mask(self) -> Float[Tensor, " unit"]:
        """The hard mask now: exactly of the asked size, but for "original", which has its own."""
        if self.recipe.method == "original":
            return (self.scores.detach() > 0).float()
        return top(self.scores.detach(), self.kept)


class Targets:
    """What a masked model is to say: the model's own residuals at the end, kept instead of its
    logits (a hundred times smaller), for every example of a split."""

    @torch.no_grad()
    def __init__(
        self, masked: Masked, examples: Examples, partner: Int[Tensor, " row"] | None = None
    ) -> None:
        """partner: take each row's targets from another row (a nonsense task, as a control)."""
        self.examples = examples
        resid = torch.cat([masked.resid(b.ids) for b in examples.batches(16)])
        self.resid = resid if partner is None else resid[partner.to(resid.device)]
        self.target = examples.target if partner is None else examples.target[partner]

    def loss(
        self,
        masked: Masked,
        gates: Float[Tensor, " unit"] | None,
        rows: Int[Tensor, " some"],
        positions: int,
        generator: torch.Generator,
        recipe: Recipe,
    ) -> Float[Tensor, ""]:
        """Mean KL, or CE on the text, over drawn predictions of some rows."""
        batch = self.examples.take(rows)
        row, pos = drawn(batch.counted, positions, generator)
        if recipe.fill == "resample":
            masked = masked.with_fill(resampled(masked.model, batch))
        student = masked.readout.read(masked.resid(batch.ids, gates)[row, pos])
        if recipe.objective == "lm":
            target = self.target[rows][row, pos].to(student.device)
            return torch.nn.functional.cross_entropy(student, target)
        with torch.no_grad():
            teacher = masked.readout.read(self.resid[rows[row].to(self.resid.device), pos])
        return kl(teacher, student).mean()

    @torch.no_grad()
    def distance(self, masked: Masked, mask: Float[Tensor, " unit"], recipe: Recipe) -> float:
        """Mean over all rows of the KL at (at most 64 of) their counted predictions."""
        generator, total = torch.Generator().manual_seed(0), 0.0
        measured = Recipe(objective="kl", fill=recipe.fill)
        for span in spans(len(self.examples), 16):
            rows = torch.arange(len(self.examples))[span]
            one = self.loss(masked, mask, rows, 64, generator, measured)
            total += float(one) * len(rows)
        return total / len(self.examples)


def learn(
    masked: Masked,
    fit: Targets,
    validation: Targets,
    start: Float[Tensor, " unit"],
    kept: int,
    recipe: Recipe,
    seed: int = 0,
    state: dict[str, Shaped[Tensor, "..."]] | None = None,
    keep: Callable[[dict[str, Shaped[Tensor, "..."]]], None] | None = None,
) -> Learned:
    """Learn a mask of exactly `kept` units, from a ranking.

    state: what `keep` was last given, to go on from there. Raises BadInput for a size that keeps
    everything or nothing, and when the loss is not a number.
    """
    if not 0 < kept < len(start):
        raise BadInput(f"a mask that keeps {kept} of {len(start)} units leaves nothing to learn: "
                       "choose a sparsity between 0 and 1")  # fmt: skip
    gates = Gates(recipe, start, kept)
    fill = [x.detach().clone().requires_grad_(recipe.fill == "learned") for x in masked.fill]
    constants = fill if recipe.fill == "learned" else []
    masked = masked.with_fill(Fill(*fill))
    optimiser = torch.optim.Adam([*gates.parameters, *constants], lr=recipe.lr)
    ascent = torch.optim.Adam([gates.prices], lr=recipe.lr, maximize=True)
    moved = [*gates.parameters, gates.prices, *constants]
    best = {"val": torch.tensor(math.inf), **_now(gates, constants)}
    history: list[list[float]] = []
    first, loss, penalty = 0, math.nan, 0.0
    if state:
        first, loss, penalty = int(state["step"]), float(state["loss"]), float(state["penalty"])
        history = state["history"].tolist()
        best = {name: state[f"best {name}"] for name in best}
        with torch.no_grad():
            for number, x in enumerate(moved):
                x.copy_(state[f"moved {number}"])
        for name, adam in (("descent", optimiser), ("ascent", ascent)):
            _restore(adam, state, name)
    for step in range(first, recipe.steps + 1):
        factor = min(1.0, (recipe.steps - step) / max(0.2 * recipe.steps, 1))  # decay at the end
        if step % recipe.every == 0 or step == recipe.steps:
            mask = gates.mask()
            value = validation.distance(masked, mask.to(masked.model.device), recipe)
            size = 1 - float(mask.mean())
            history.append([step, loss, value, gates.target, size, gates.temperature(step),
                            penalty, recipe.lr * factor])  # fmt: skip
            if value < float(best["val"]) or recipe.method == "original":
                best = {"val": torch.tensor(value), **_now(gates, constants)}
            if keep is not None and step:
                exact = {"history": history[:-1], "loss": loss, "penalty": penalty}
                keep({"step": torch.tensor(step),
                      **{k: torch.tensor(v, dtype=torch.float64) for k, v in exact.items()},
                      **{f"best {k}": v for k, v in best.items()},
                      **{f"moved {n}": x.detach().clone() for n, x in enumerate(moved)},
                      **_held(optimiser, "descent"), **_held(ascent, "ascent")})  # fmt: skip
        if step == recipe.steps:
            break
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randperm(len(fit.examples), generator=generator)[: recipe.rows]
        spread = gates.at(step, generator).to(masked.model.device)
        fitted = fit.loss(masked, spread, rows, recipe.positions, generator, recipe)
        price = gates.penalty(step)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * factor
        optimiser.zero_grad()
        ascent.zero_grad()
        (fitted + price.to(fitted.device)).backward()
        loss, penalty = float(fitted.detach()), float(price.detach())
        if not math.isfinite(loss):
            raise BadInput(f"the loss is {loss} at step {step}: lower --lr (now {recipe.lr})")
        optimiser.step()
        if gates.prices.grad is not None:
            ascent.step()
    constant = Fill(best["k"], best["v"]) if constants else Fill(*fill)
    recorded = torch.tensor(history, dtype=torch.float64)
    return Learned(best["mask"], best["scores"], recorded, constant)


def _now(gates: Gates, constants: list[Tensor]) -> dict[str, Tensor]:
    """The hard mask, its scores, and the constants if they are learned: they belong together."""
    held = dict(zip("kv", constants, strict=False)) | {"scores": gates.scores}
    return {"mask": gates.mask()} | {name: x.detach().clone() for name, x in held.items()}


def _held(adam: torch.optim.Adam, name: str) -> dict[str, Tensor]:
    """An optimiser's moments as named tensors."""
    groups = adam.state_dict()["state"]
    return {f"{name} {n} {k}": v.clone() for n, held in groups.items() for k, v in held.items()}


def _restore(adam: torch.optim.Adam, state: dict[str, Tensor], name: str) -> None:
    """Put moments back that `_held` gave."""
    held: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith(f"{name} "):
            _, n, kind = key.split(" ")
            held.setdefault(int(n), {})[kind] = value
    if held:
        adam.load_state_dict({**adam.state_dict(), "state": held})
