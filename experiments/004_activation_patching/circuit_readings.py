"""Which edges carry the answer? Gradient scores, path patching and circuits of edges."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pandas as pd
import patch_readings as read
import torch
from torch import Tensor

from lens_utils import circuits, edges, gradients, pairs, sweeps
from lens_utils.edges import Node
from lens_utils.errors import BadInput
from lens_utils.pairs import Batch, Pair

Wording = tuple[str, str]  # task, template
IOI, RANDOM = ("ioi", "store"), ("induction", "random")
EXCHANGED = ("induction", "exchanged")
CIRCUITS = (read.CITY, IOI, RANDOM, EXCHANGED)
# Shares of all edges that are kept, and by whose order.
SHARES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SCORES = ("EAP", "EAP-IG")
CONTROLS = ("random edges", "EAP-IG shuffled")
PATHS = (read.CITY, IOI)
LISTED = 40  # strongest edges of a wording that are listed


def guessed(session: read.Session) -> list[Wording]:
    """The wordings whose heads were swept by denoising."""
    jobs = [job for job in session.head_jobs() if job.kind == "denoise"]
    return [(job.task, job.template) for job in jobs]


def guesses(
    session: read.Session, swept: pd.DataFrame
) -> Callable[[Sequence[Wording]], pd.DataFrame]:
    """For `run.chunks` over `guessed(session)`: attribution patching and the truth.

    One row per pair and node (component z with its head, or mlp_out with head -1), at all positions
    at once; columns plain, integrated and exact, in nats of logit difference restored. The pairs
    are those of the head sweep, whose rows (head_sweep.parquet) are the truth for heads.
    """
    exact = swept[(swept.kind == "denoise") & (swept.component == "z")]
    exact = exact.assign(exact=exact.logit_diff - exact.corrupt)[["id", "layer", "head", "exact"]]

    def measure(wordings: Sequence[Wording]) -> pd.DataFrame:
        frames = []
        for wording in wordings:
            some = [p for p in session.of(*wording) if p.id in set(exact.id)]
            for batch in pairs.batches(session.model, some, 8):
                mlps = sweeps.sweep(session.model, batch, "mlp_out", "denoise", [])
                restored = mlps.logit_diff - mlps.corrupt[:, None]
                heads, layers = _guessed(session, batch)
                truth = _rows(batch, layers[0], {"exact": restored, **layers[1]})
                frames += [_rows(batch, *heads).merge(exact, on=["id", "layer", "head"]), truth]
        return pd.concat(frames, ignore_index=True)

    return measure


def _guessed(session: read.Session, batch: Batch) -> list[tuple[pd.DataFrame, dict[str, Tensor]]]:
    """Places of heads and of MLPs, and their scores over all positions."""
    found = {"plain": gradients.PLAIN, "integrated": gradients.midpoints()}
    scores = {name: gradients.attribute(session.model, batch, at, ("z", "mlp_out"))
              for name, at in found.items()}  # fmt: skip
    parts = []
    for node in ("z", "mlp_out"):
        values = {name: of[node].sum(2) for name, of in scores.items()}
        index = itertools.product(*map(range, values["plain"].shape[1:]))
        places = pd.DataFrame(index, columns=["layer", "head"][: values["plain"].ndim - 1])
        parts.append((places.reindex(columns=["layer", "head"], fill_value=-1)
                      .assign(component=node), values))  # fmt: skip
    return parts


def paths(session: read.Session, top: pd.DataFrame) -> Callable[[Sequence[Wording]], pd.DataFrame]:
    """For `run.chunks` over PATHS: what reaches the strongest head, and the output, directly.

    Path patching into the queries, the key and the value of the first head of `top`
    (top_heads.csv), and into the final residual. One row per pair, receiver and sender; effect is
    the share of clean - corrupt that this edge alone restores. Receivers also carry `part`.
    """

    def measure(wordings: Sequence[Wording]) -> pd.DataFrame:
        model = session.model
        nodes, frames = edges.graph(model), []
        for wording in wordings:
            layer, head = read.strongest(top, wording)[0]
            kv_head = head * nodes.n_kv_heads // nodes.n_heads
            receivers = [Node("v", layer, kv_head), Node("logits")]
            if not session.cfg.quick:
                receivers[:0] = [Node("q", layer, head), Node("k", layer, kv_head)]
            some = session.held_out(wording)[: 1 if session.cfg.quick else 4]
            for batch in pairs.batches(model, some, 4):
                clean, corrupt = sweeps.baselines(model, batch)
                for receiver in receivers:
                    moved = edges.path_patch(model, batch, receiver)
                    effect = moved / (clean - corrupt)[:, None]
                    below = nodes.senders[: moved.shape[1]]
                    places = pd.DataFrame([_sender(s) for s in below])
                    frame = _rows(batch, places, {"effect": effect, "nats": moved})
                    frames.append(frame.assign(receiver=str(receiver), part=receiver.part))
        return pd.concat(frames, ignore_index=True)

    return measure


def edge_scores(session: read.Session) -> Callable[[Sequence[Wording]], dict[str, Tensor]]:
    """For `run.chunks(..., size 1)` over `wired(session)`: mean scores of all edges.

    EAP and EAP-IG, [wording, sender, receiver], in nats, over the pairs to choose by.
    """

    def measure(wordings: Sequence[Wording]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in SCORES}
        for wording in wordings:
            for name, at in zip(SCORES, (gradients.PLAIN, gradients.midpoints()), strict=True):
                parts = [
                    edges.edge_scores(session.model, batch, at)
                    for batch in pairs.batches(session.model, _halves(session, wording)[0], 6)
                ]
                found[name].append(torch.cat(parts).mean(0).cpu())
        return {name: torch.stack(scores) for name, scores in found.items()}

    return measure


def wired(session: read.Session) -> list[Wording]:
    """The wordings whose circuits are looked for."""
    return list(CIRCUITS[:1] if session.cfg.quick else CIRCUITS)


def faithfulness(
    session: read.Session, scores: dict[str, Tensor]
) -> Callable[[Sequence[Wording]], pd.DataFrame]:
    """For `run.chunks(..., size 1)` over `wired(session)`: circuits, run on held-out pairs.

    One row per pair, order (EAP, EAP-IG, random edges, EAP-IG shuffled: the scores of every
    receiver dealt anew among its senders) and number of edges kept; logit_diff, clean and corrupt
    in nats.
    """

    def measure(wordings: Sequence[Wording]) -> pd.DataFrame:
        nodes, frames = edges.graph(session.model), []
        total = int(nodes.exists.sum())
        sizes = sorted({max(1, round(share * total)) for share in SHARES})
        if session.cfg.quick:
            sizes = sizes[3:-1:3]
        for wording in wordings:
            at = wired(session).index(wording)
            orders = {name: scores[name][at] for name in SCORES}
            orders |= _controls(nodes, orders["EAP-IG"], session.cfg.seed)
            kept = [circuits.strongest(nodes, s, n) for s in orders.values() for n in sizes]
            index = itertools.product(orders, sizes)
            places = pd.DataFrame(index, columns=["order", "edges"]).assign(of=total)
            for batch in pairs.batches(session.model, _halves(session, wording)[1], 6):
                found = circuits.evaluate(session.model, batch, torch.stack(kept)).T
                clean, corrupt = sweeps.baselines(session.model, batch)
                values = {"logit_diff": found, "clean": clean[:, None].expand_as(found),
                          "corrupt": corrupt[:, None].expand_as(found)}  # fmt: skip
                frames.append(_rows(batch, places, values))
        return pd.concat(frames, ignore_index=True)

    return measure


def strongest_edges(session: read.Session, scores: dict[str, Tensor]) -> pd.DataFrame:
    """The strongest edges of each wording by EAP-IG, with either score, in nats."""
    nodes, frames = edges.graph(session.model), []
    for at, (task, template) in enumerate(wired(session)):
        size = scores["EAP-IG"][at].abs().masked_fill(~nodes.exists, 0)
        best = size.flatten().topk(LISTED).indices.tolist()
        for rank, (sender, receiver) in enumerate(divmod(i, size.shape[1]) for i in best):
            frames.append(
                {"task": task, "template": template, "rank": rank + 1,
                 "sender": str(nodes.senders[sender]), "receiver": str(nodes.receivers[receiver]),
                 **{name: scores[name][at, sender, receiver].item() for name in SCORES}}
            )  # fmt: skip
    return pd.DataFrame(frames)


def _controls(nodes: edges.Graph, scores: Tensor, seed: int) -> dict[str, Tensor]:
    """Orders that know nothing, or only how much each receiver matters."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = scores.clone()
    for at, receiver in enumerate(nodes.receivers):
        below = nodes.below(receiver)
        shuffled[:below, at] = scores[:below, at][torch.randperm(below, generator=generator)]
    values = torch.rand(scores.shape, generator=generator), shuffled
    return dict(zip(CONTROLS, values, strict=True))


def exchanged(some: Sequence[Pair]) -> list[Pair]:
    """Induction pairs whose corrupted prompts end like the clean ones.

    "a b .. c d .. a" becomes "c b .. a d .. a": what is asked stays, and what preceded the two
    candidates changes, which only a head that looks back one token can tell.
    """
    made = []
    for p in some:
        ids = list(p.clean)
        here, there = ids.index(p.answer) - 1, ids.index(p.foil) - 1
        ids[here], ids[there] = ids[there], ids[here]
        named = dataclasses.replace(p, template=EXCHANGED[1], corrupt=tuple(ids))
        made.append(named)
    return made


def _of(session: read.Session, wording: Wording) -> list[Pair]:
    """The known pairs of a wording, here also of exchanged induction. Raises BadInput below two."""
    if wording != EXCHANGED:
        return session.of(*wording)
    made = exchanged(session.of(*RANDOM))
    found = [p for p, k in zip(made, pairs.screen(session.model, made).known, strict=True) if k]
    if len(found) < 2:
        raise BadInput(f"{session.model.name} knows {len(found)} pairs of exchanged induction")
    return found


def _halves(session: read.Session, wording: Wording) -> tuple[list[Pair], list[Pair]]:
    """Pairs to choose edges by, and pairs to judge the choice on: no group is in both."""
    some = _of(session, wording)
    n = 1 if session.cfg.quick else 6
    groups = list(dict.fromkeys(p.group for p in some))
    chosen = [p for p in some if p.group in groups[::2]]
    return chosen[:n], [p for p in some if p.group in groups[1::2]][:n]


def _sender(node: Node) -> dict[str, object]:
    none = {"layer": -1, "head": -1} if node.part == "embed" else {}
    head = -1 if node.head is None else node.head
    return {"sender": str(node), "kind": node.part, "layer": node.layer, "head": head} | none


def _rows(batch: Batch, places: pd.DataFrame, values: dict[str, Tensor]) -> pd.DataFrame:
    """One row per place and pair; values are [pair, *place]."""
    n = len(batch.pairs)
    about = pd.DataFrame([{k: getattr(p, k) for k in ("id", "group", "task", "template")}
                          for p in batch.pairs])  # fmt: skip
    tiled = pd.concat([about] * len(places), ignore_index=True)
    repeated = places.loc[places.index.repeat(n)].reset_index(drop=True)
    measured = {k: v.flatten(1).T.flatten().float().cpu().numpy() for k, v in values.items()}
    return pd.concat([tiled, repeated, pd.DataFrame(measured)], axis=1)
