"""What 016 reads of experiments 010 to 015, brought into tables of one form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lens_utils import synthesis
from lens_utils.errors import BadInput
from lens_utils.experiment import Run

ABILITIES = ("recognize", "generate", "solve")
METHODS = {
    "neurons": "specialised neurons, % of the layer's (011)",
    "ablation": "log-probability lost without half of the layer (012)",
    "probes": "probe accuracy on unseen wordings above chance (013)",
}
CHANCE = {"probes": 0.5}  # both classes count alike


def gate_table(gate: dict[str, dict[str, dict[str, Any]]]) -> pd.DataFrame:
    """One row per task and mode of 010's gate."""
    rows = [{"ability": task, "mode": mode, **cell}
            for task, modes in gate.items() for mode, cell in modes.items()]  # fmt: skip
    return pd.DataFrame(rows)


def passing(gate: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Abilities above chance in some mode."""
    return [a for a in ABILITIES if any(cell["passes"] for cell in gate.get(a, {}).values())]


def if_there(read: Callable[[], Any]) -> Any:
    """An upstream table, or None where its experiment stopped before it."""
    try:
        return read()
    except BadInput:
        return None


@dataclass(frozen=True)
class Held:
    """Everything that is read, as it was written; None for what an experiment did not reach."""

    records: list[dict[str, Any]]
    replies: pd.DataFrame
    files: dict[str, Any]
    """The results file of every method."""
    tables: dict[str, pd.DataFrame | None]
    summaries: dict[str, dict[str, Any]]

    @property
    def n_layers(self) -> int:
        """Of the model; 0 where no method has a curve."""
        lengths = [len(e["curve"]) for f in self.files.values() if f
                   for e in f["abilities"].values()]  # fmt: skip
        return max(lengths, default=0)

    def entries(self, method: str) -> dict[str, dict[str, Any]]:
        """What a method says of every ability."""
        return (self.files[method] or {"abilities": {}})["abilities"]

    def curves(self) -> pd.DataFrame:
        """One row per method, ability and layer; 0 is no part in the ability."""
        rows = []
        for method in METHODS:
            null = CHANCE.get(method, 0.0)
            for ability, entry in self.entries(method).items():
                values = [np.array(entry[k], dtype=float) - null
                          for k in ("curve", "curve_low", "curve_high")]  # fmt: skip
                for layer, (value, low, high) in enumerate(zip(*values, strict=True)):
                    rows.append({"method": method, "ability": ability, "layer": layer,
                                 "depth_pct": 100 * (layer + 0.5) / len(values[0]),
                                 "value": value, "low": low, "high": high})  # fmt: skip
        names = ["method", "ability", "layer", "depth_pct", "value", "low", "high"]
        return pd.DataFrame(rows, columns=names)

    def lists(self, top: int) -> pd.DataFrame:
        """One row per method, ability and listed layer, best first."""
        length = synthesis.longest(self.n_layers, top)
        rows = []
        for method in METHODS:
            for ability, entry in self.entries(method).items():
                for rank, layer in enumerate(entry["top_layers"][:length]):
                    rows.append({"method": method, "ability": ability, "rank": rank + 1,
                                 "layer": layer, "n_layers": self.n_layers})  # fmt: skip
        return pd.DataFrame(rows, columns=["method", "ability", "rank", "layer", "n_layers"])

    def accuracy(self) -> pd.DataFrame:
        """Share of right answers of every maze, by ability and mode; shares of cut answers."""
        about = pd.DataFrame(
            [{"id": r["id"], "maze_id": r["maze_id"], "ability": r["task"],
              "mode": "thinking" if r["enable_thinking"] else "direct"} for r in self.records]
        )  # fmt: skip
        asked = about.merge(self.replies[["id", "correct", "truncated", "n_tokens"]], on="id")
        asked = asked.astype({"correct": float, "truncated": float})
        by = ["ability", "mode", "maze_id"]
        return asked.groupby(by, as_index=False)[["correct", "truncated", "n_tokens"]].mean()

    def measured(self) -> pd.DataFrame:
        """Every number of the summaries of 010 to 015."""
        rows = []
        for experiment, summary in self.summaries.items():
            for label, value in summary.items():
                row = {"experiment": experiment, "label": label, "text": ""}
                if isinstance(value, dict):
                    row |= value
                elif isinstance(value, int | float):
                    row["value"] = value
                else:
                    row["text"] = str(value)
                rows.append(row)
        names = ["experiment", "label", "value", "low", "high", "n", "text"]
        return pd.DataFrame(rows, columns=names)


def gather(run: Run) -> Held:
    """Read 010 to 015. Raises BadInput when one of them was not run."""
    summaries = {
        "010": run.upstream("010_maze_tasks", "summary.json"),
        "011": run.upstream("011_domain_neurons", "summary.json"),
        "012": run.upstream("012_layer_ablation", "summary.json"),
        "013": run.upstream("013_linear_probes", "summary.json"),
        "014": run.upstream("014_thinking_traces", "summary.json"),
        "015": run.upstream("015_concept_circuits", "summary.json"),
    }
    files = {
        "neurons": if_there(lambda: run.upstream("011_domain_neurons", "qwen3_dape_results.json")),
        "ablation": if_there(lambda: run.upstream("012_layer_ablation", "ablation_results.json")),
        "probes": if_there(lambda: run.upstream("013_linear_probes", "probe_results.json")),
    }
    tables = {
        "contrasts": if_there(lambda: run.upstream("011_domain_neurons", "contrasts.csv")),
        "neuron pairs": if_there(lambda: run.upstream("011_domain_neurons", "dissociation.csv")),
        "head pairs": if_there(lambda: run.upstream("012_layer_ablation", "pairs.csv")),
        "places": if_there(lambda: run.upstream("014_thinking_traces", "contrasts.csv")),
        "answers": if_there(lambda: run.upstream("014_thinking_traces", "answers.csv")),
        "concepts": if_there(lambda: run.upstream("015_concept_circuits", "concepts.csv")),
        "edges": if_there(lambda: run.upstream("015_concept_circuits", "edges.csv")),
        "behaviour": if_there(lambda: run.upstream("015_concept_circuits", "behaviour.csv")),
        "transfer": if_there(lambda: run.upstream("013_linear_probes", "transfer.csv")),
    }
    return Held(
        records=run.upstream("010_maze_tasks", "records.json"),
        replies=run.upstream("010_maze_tasks", "replies.csv"),
        files=files,
        tables=tables,
        summaries=summaries,
    )
