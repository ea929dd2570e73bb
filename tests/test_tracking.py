"""Tracking: nothing unless asked for, and a real offline run of Weights & Biases."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from kv_tables import PNG, build

from lens_utils import files, kv_pages, tracking
from lens_utils.errors import BadInput

OFFLINE = """
import contextlib, json, sys
from pathlib import Path
from lens_utils import kv_pages, tracking
from lens_utils.errors import BadInput

folder = Path(sys.argv[1])
try:
    tracking.start("online", folder, "refused")
except BadInput as error:
    refused = str(error)
with contextlib.closing(tracking.start("offline", folder, "V0", "kv", {"steps": 500})) as tracker:
    kv_pages.track(folder, tracker)

from wandb.proto import wandb_internal_pb2 as proto
(file,) = folder.glob("wandb/offline-run-*/*.wandb")
held, at, whole, records = file.read_bytes(), 7, b"", []  # a LevelDB log behind 7 bytes
while at < len(held):
    left = 32768 - at % 32768
    if left < 7:  # the end of a block is padded
        at += left
        continue
    size, kind = int.from_bytes(held[at + 4 : at + 6], "little"), held[at + 6]
    whole += held[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # full, or the last of several
        records.append(proto.Record.FromString(whole))
        whole = b""
artifacts = [
    [of.artifact.name, of.artifact.type, [entry.path for entry in of.artifact.manifest.contents]]
    for of in records if of.WhichOneof("record_type") == "artifact"
]
runs = [of.run for of in records if of.WhichOneof("record_type") == "run"]
last = {item.key or "/".join(item.nested_key): item.value_json
        for of in records for item in of.history.item}
print(json.dumps([refused, artifacts, [runs[0].project, runs[0].display_name], last]))
"""


class Recorder(tracking.Tracker):
    """Keeps what it is sent."""

    def __init__(self):
        self.steps, self.tables, self.images, self.artifacts = [], {}, {}, []

    def log(self, values, step=None):
        self.steps.append((step, dict(values)))

    def table(self, name, frame):
        self.tables[name] = frame

    def image(self, name, path):
        self.images[name] = path

    def artifact(self, path, name):
        self.artifacts.append((name, path.name))


def run_python(code: str, *arguments: str, home) -> str:
    """The output of a fresh interpreter that knows no login."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment = kept | {"HOME": str(home), "NETRC": str(home / "none"), "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_off_never_imports_wandb(tmp_path):
    folder = build(tmp_path / "run", layers=1)
    code = (
        "import sys; from pathlib import Path; from lens_utils import kv_pages, tracking\n"
        "tracker = tracking.start('off', Path(sys.argv[1]), 'V0')\n"
        "kv_pages.track(sys.argv[1], tracker); tracker.close()\n"
        "print('wandb' in sys.modules)"
    )
    assert run_python(code, str(folder), home=tmp_path).strip() == "False"
    assert not (folder / "wandb").exists()


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(BadInput, match="off, offline, online"):
        tracking.start("on", tmp_path, "V0")


def test_an_offline_run_holds_everything_under_its_known_name(tmp_path):
    """Asked for, it happens although WANDB_MODE says disabled; the user's home stays empty."""
    pytest.importorskip("PIL", reason="wandb measures images with pillow")
    folder, home = build(tmp_path / "run", layers=12, seeds=(0, 1)), tmp_path / "home"
    home.mkdir()
    files.write_bytes(folder / "sparsity_curves.png", PNG)
    printed = run_python(OFFLINE, str(folder), home=home)
    refused, artifacts, project, last = json.loads(printed.splitlines()[-1])
    assert "No API key" in refused and "\n" not in refused
    for name in ("loss", "val_kl", "sparsity", "target_sparsity", "temperature", "reg_loss",
                 "sparsity/blocks.10.attn", "layer_summary", "viz/sparsity_curves"):  # fmt: skip
        assert any(key == f"mechint/{name}" or key.startswith(f"mechint/{name}/") for key in last)
    assert project == ["kv", "V0"]
    assert ["kv_masks", "model", ["final_masks.safetensors"]] in artifacts
    (run,) = folder.glob("wandb/offline-run-*")
    (table,) = run.glob("files/media/table/mechint/layer_summary*.json")
    held, layers = files.read(table), files.read(folder / "layers.csv")
    sent = pd.DataFrame(held["data"], columns=held["columns"])
    assert list(sent.sparsity) == pytest.approx(list(layers.sparsity))
    assert list(run.glob("files/media/images/mechint/viz/sparsity_curves*.png"))
    assert json.loads(last["mechint/sparsity"]) == pytest.approx(0.95, abs=0.01)
    assert not [path for path in home.rglob("*") if path.suffix == ".safetensors"]


def test_a_folder_is_sent_as_its_tables_have_it(tmp_path):
    folder = build(tmp_path, layers=11, seeds=(3, 4), prefix="transformer.h")
    files.write_bytes(folder / "kv_channel_importance.png", PNG)
    recorder = Recorder()
    kv_pages.track(folder, recorder)
    history, layers = files.read(folder / "history.csv"), files.read(folder / "layers.csv")
    steps = [step for step, _ in recorder.steps if step is not None]
    assert steps == sorted(set(history.step))
    at = dict(recorder.steps[1][1])  # step 10: no validation there
    row = history[(history.seed == 3) & (history.step == 10)].iloc[0]
    other = history[(history.seed == 4) & (history.step == 10)].iloc[0]
    assert at["mechint/loss"] == row.train_loss and "mechint/val_kl" not in at
    assert at["mechint/seed_4/loss"] == other.train_loss
    last = recorder.steps[-1][1]
    of = layers[(layers.seed == 3) & (layers.layer == 10)]
    assert last["mechint/sparsity/transformer.h.10.attn"] == 1 - of.kept.sum() / of.total.sum()
    summary = recorder.tables["mechint/layer_summary"]
    assert (summary.n_pruned == layers.total - layers.kept).all()
    assert list(recorder.images) == ["mechint/viz/kv_channel_importance"]
    assert recorder.artifacts == [("kv_masks", "final_masks.safetensors")]
