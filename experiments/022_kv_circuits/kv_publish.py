"""One data set of a finished run of 022 as the folder that its users know.

The lab's tables hold all data sets of a run and all sizes of masks; the folder holds one data set
and the target sparsity, under the file names of `lens_utils/kv_runs.py`, which draws and compares.
"""

from pathlib import Path

import pandas as pd
from kv_results import final_masks

from lens_utils import files, kv_runs
from lens_utils.errors import BadInput
from lens_utils.kv_units import Units
from lens_utils.results import Results


def publish(results: Results, units: Units, dataset: str, folder: Path, name: str) -> None:
    """Write the tables, the masks and metrics.json of one data set into `folder`; `name` is what
    figures call it.

    Raises BadInput when the run has no such data set.
    """
    found = files.read(results.folder / "metrics.json")
    if dataset not in found:
        raise BadInput(f"{results.folder.name} has no data set {dataset!r}: {', '.join(found)}")
    metrics = found[dataset]
    at = metrics["target_sparsity"]
    for table_name in ("history.csv", "layers.csv"):
        table = files.read(results.folder / table_name)
        table = table[(table.dataset == dataset) & (table.mask_sparsity == at)]
        files.write(folder / table_name, table.drop(columns=["dataset", "mask_sparsity"]))
    table = files.read(results.folder / "frontier.csv")
    table = table[(table.dataset == dataset) & (table.ranking != "complement")]
    files.write(folder / "frontier.csv", table.drop(columns="dataset"))
    for table_name in ("groups.csv", "units.csv"):
        path = results.folder / table_name
        table = pd.DataFrame(columns=list(kv_runs.COLUMNS[table_name]))
        if path.exists():
            held = files.read(path).rename(columns={"head": "kv_head"})
            table = held[held.dataset == dataset].drop(columns="dataset")
        files.write(folder / table_name, table)
    learned = files.read(results.folder / "learned.safetensors")
    shipped = jobs_of(results).index((dataset, at, 0))
    layout = "transformer.h.{}.attn" if metrics["model"]["architecture"].startswith("GPT2") else (
        "blocks.{}.attn"
    )  # fmt: skip
    masks = final_masks(units, learned["mask"][shipped], learned["scores"][shipped], layout)
    files.write(folder / kv_runs.MASKS, masks)
    files.write(folder / "config.json", results.manifest)
    files.write(folder / "metrics.json", metrics | {"name": name})


def jobs_of(results: Results) -> list[tuple[str, float, int]]:
    """The learned masks of a run in order: data set, sparsity, seed."""
    held = files.read(results.folder / "history.csv")
    columns = ["dataset", "mask_sparsity", "seed"]
    return list(held[columns].drop_duplicates().itertuples(index=False, name=None))
