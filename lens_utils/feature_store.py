"""The atlas as a database: features, examples, explanations and the text, in one SQLite file.

    features      one row per (layer, feature_id): how often and how strongly it fires, its logits
    explanations  labels: any number per feature, each with the source, the model and the version
                  of the prompt that made it, and its scores
    examples      where it fires: sample (top, spread), rank, sequence_id, token_idx, strength, and
                  as JSON its values at the tokens around
    tokens        the text: sequence_id, token_idx, token, decoded_token, and its spans
    about         what the atlas is of, as JSON by name

For each layer there are views in the shape that Goodfire gave its feature database, which knows
one layer only: autointerp_3(feature_id, label, quality, interestingness, model_name,
prompt_version) and activations_3(feature_id, sequence_id, token_idx, strength).

Written whole or not at all; opened for reading in SQLite's read-only mode.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lens_utils import files
from lens_utils.errors import BadInput

TABLES = {
    "features": "layer feature_id density n_fired mean max",
    "explanations": "layer feature_id label source model_name prompt_version accuracy shuffled",
    "examples": "layer feature_id sample rank sequence_id token_idx strength around",
    "tokens": "sequence_id token_idx token decoded_token",
}
"""Columns that every atlas has; others may follow."""
KEYS = {
    "features": "layer, feature_id",
    "explanations": "layer, feature_id, source",
    "examples": "layer, feature_id, sample, rank",
    "tokens": "sequence_id, token_idx",
}


def write(path: Path, tables: Mapping[str, pd.DataFrame], about: Mapping[str, Any]) -> None:
    """Write an atlas. Raises BadInput for a table that is missing or lacks a column."""
    for name, columns in TABLES.items():
        lacking = [c for c in columns.split() if name not in tables or c not in tables[name]]
        if lacking:
            raise BadInput(f"an atlas needs {lacking[0]} in its table {name}")
    with files.replacing(path) as beside, contextlib.closing(sqlite3.connect(beside)) as held:
        for name in TABLES:
            tables[name].to_sql(name, held, index=False, chunksize=10_000)
            held.execute(f"CREATE UNIQUE INDEX key_{name} ON {name} ({KEYS[name]})")
        held.execute("CREATE INDEX strongest ON examples (layer, feature_id, strength DESC)")
        told = pd.DataFrame([(name, json.dumps(value)) for name, value in about.items()],
                            columns=["name", "value"])  # fmt: skip
        told.to_sql("about", held, index=False)
        for layer in sorted(int(n) for n in tables["features"].layer.unique()):
            held.execute(
                f"CREATE VIEW autointerp_{layer} AS SELECT feature_id, label, accuracy AS quality, "
                "accuracy - shuffled AS interestingness, model_name, prompt_version "
                f"FROM explanations WHERE layer = {layer}"
            )
            held.execute(
                f"CREATE VIEW activations_{layer} AS SELECT DISTINCT feature_id, sequence_id, "
                f"token_idx, strength FROM examples WHERE layer = {layer}"
            )
        held.commit()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """An atlas to read; nothing can be written to it. Raises BadInput for a file that is none."""
    if not path.exists():
        raise BadInput(f"{path}: there is no atlas")
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        try:
            there = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{path} is no SQLite file: {error}") from None
        if missing := [name for name in TABLES if name not in there]:
            raise BadInput(f"{path} is no atlas: it has no table {missing[0]}")
        yield db


def read(path: Path, table: str, layer: int | None = None) -> pd.DataFrame:
    """One of the atlas' tables, or a layer's part of it. Raises BadInput for another name."""
    if table not in TABLES:
        raise BadInput(f"an atlas has {', '.join(TABLES)}, not {table!r}")
    chosen = "" if layer is None else " WHERE layer = ?"
    with opened(path) as db:
        return pd.read_sql(f"SELECT * FROM {table}{chosen} ORDER BY rowid", db,
                           params=() if layer is None else (layer,))  # fmt: skip


def about(path: Path) -> dict[str, Any]:
    """What the atlas says of itself."""
    with opened(path) as db:
        return {name: json.loads(value) for name, value in db.execute("SELECT * FROM about")}
