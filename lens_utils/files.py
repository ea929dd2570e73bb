"""Files, by suffix: every table, array and JSON of the lab is read and written here.

A file is written beside its place and then renamed, so a reader sees the old one or the whole new
one, also after kill -9 and with several writers. What cannot be written raises Failure.

A CSV holds no types: floats come back bit for bit, "NA" and "null" as text, but an empty text as
NaN and a column of nothing but digits as numbers. Parquet holds them.
"""

import contextlib
import csv
import hashlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lens_utils.errors import Failure


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A neighbour of `path` that does not outlive the block; no *.suffix takes it for a result."""
    beside = path.with_name(f".writing-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to; it takes the name when the block succeeds."""
    with _beside(path) as beside:
        yield beside
        beside.replace(path)


def write(path: Path, value: Any) -> None:
    """Write a JSON value, text, a frame (csv, parquet) or a dict of arrays (npz, safetensors)."""
    with replacing(path) as beside:
        _save(beside, path.suffix, value)


def write_digested(path: Path, value: Any) -> None:
    """Write under the name of `path` and the digest of its bytes, for `find_digested`."""
    with _beside(path) as beside:
        _save(beside, path.suffix, value)
        beside.replace(path.with_stem(f"{path.stem}-{sha256(beside)[:16]}"))


def find_digested(path: Path) -> tuple[Path | None, list[Path]]:
    """What `write_digested` wrote for `path`, if it is there whole; and damaged copies of it."""
    there = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
    whole = [p for p in there if p.stem == f"{path.stem}-{sha256(p)[:16]}"]
    return whole[0] if whole else None, [p for p in there if p not in whole]


def _save(path: Path, suffix: str, value: Any) -> None:
    match suffix:
        case ".json":
            text = json.dumps(value, indent=1, ensure_ascii=False, default=_plain)
            path.write_text(text + "\n", encoding="utf-8")
        case ".md" | ".txt" | ".html":
            path.write_text(value, encoding="utf-8")
        case ".csv":
            # Text is quoted: a bare "\r", which is a token of many models, would end the row.
            value.to_csv(path, index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        case ".parquet":
            value.to_parquet(path, index=False)
        case ".npz":
            import numpy as np

            with path.open("wb") as file:  # given a name, savez would add a suffix to it
                np.savez(file, **value)
        case ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            try:
                save_file({k: v.contiguous() for k, v in value.items()}, path)
            except SafetensorError as error:  # its own type, also for a full disk
                raise OSError(str(error)) from error
        case _:
            raise ValueError(f"no format for the suffix {suffix!r}")


def write_bytes(path: Path, value: bytes) -> None:
    """Write bytes as they are: a page, a script."""
    with replacing(path) as beside:
        beside.write_bytes(value)


def read(path: Path) -> Any:
    """What `write` wrote."""
    match path.suffix:
        case ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        case ".md" | ".txt" | ".html":
            return path.read_text(encoding="utf-8")
        case ".csv":
            import pandas as pd

            return pd.read_csv(path, keep_default_na=False, na_values=[""])
        case ".parquet":
            import pandas as pd

            return pd.read_parquet(path)
        case ".npz":
            import numpy as np

            with np.load(path) as arrays:  # allow_pickle is off by default
                return dict(arrays)
        case ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        case _:
            raise ValueError(f"{path.name}: no format for the suffix {path.suffix!r}")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """NumPy and torch scalars and paths as JSON has them."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"no JSON for a {type(value).__name__}: {value!r}")
