"""End-to-end tuning of 018's set on KL, over text that it was trained on; resumable."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch.nn.functional as F

from lens_utils import files, mlp_stream, transcoder_sets
from lens_utils.experiment import Run
from lens_utils.faithfulness import predicted
from lens_utils.models import LoadedModel
from lens_utils.sparse import Transcoder
from lens_utils.sparse_files import save_layer
from lens_utils.sparse_tuning import Tuner, Tuning
from lens_utils.text_rows import Row

TOKENS = 1024  # of one step
SAVE = 20  # steps between two states on disk


def tune(
    run: Run,
    model: LoadedModel,
    rows: Sequence[Row],
    transcoders: dict[int, Transcoder],
    tokens: int,
    lr: float,
) -> pd.DataFrame:
    """Tune a set on so many tokens; KL before every step. The set goes to the folder `tuned`.

    Steps count the positions whose next token is worth predicting (`text_rows.asked_for`).
    """
    spans = mlp_stream.batches(rows, TOKENS)[: -(-tokens // TOKENS)]
    tuner = Tuner(model, Tuning(steps=len(spans), lr=lr), transcoders)
    state, curve_file = run.folder / "tuning" / "state", run.folder / "tuning" / "curve.csv"
    curve: list[dict[str, Any]] = []
    if state.with_suffix(".safetensors").exists():
        tuner.resume(state)
        curve = files.read(curve_file).to_dict("records")[: tuner.taken]
    for number in run.track(range(tuner.taken, len(spans)), "tuning"):
        part = rows[slice(*spans[number])]
        ids, mask = model.batch([row.ids for row in part])
        counted = F.pad(predicted(model, part, ids, mask), (0, 1))
        curve.append({"step": number, "kl": tuner.step(ids, counted)})
        if tuner.taken % SAVE == 0:
            files.write(curve_file, pd.DataFrame(curve))
            tuner.save(state)
    for layer, transcoder in tuner.transcoders().items():
        save_layer(run.folder / "tuned", layer, transcoder)
    return pd.DataFrame(curve)


def record(run: Run, model: LoadedModel, layers: Sequence[int], k: int) -> dict[str, Any]:
    """The tuned set."""
    return transcoder_sets.record(run.folder / "tuned", model, layers, k)
