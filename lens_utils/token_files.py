"""Token ids from a file, as training scripts keep them: nanoGPT's val.bin, or a .npy array.

Such a file has no documents to split by. Its splits are therefore contiguous blocks, 80, 10 and 10
per cent, and between two blocks a row's length is left out, so that no sentence is in both.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer
from numpy import ndarray

from lens_utils.errors import BadInput

SHARES = {"fit": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


def read(
    path: Path, width: int, d_vocab: int, most: int = 4096
) -> dict[str, Int[ndarray, "row pos"]]:
    """Rows of `width` token ids of each split; of more than `most`, that many evenly spread ones.

    path: .bin (uint16, no header) or .npy (integers). Raises BadInput for what is neither, is too
    short for a row of every split, or has ids that the model has not.
    """
    ids = _open(path).reshape(-1)
    found = {}
    for split, (begin, end) in SHARES.items():
        first = int(begin * len(ids)) + (width if begin else 0)
        block = ids[first : int(end * len(ids))]
        n_rows = len(block) // width
        if n_rows == 0:
            raise BadInput(f"{path.name} has {len(ids):,} tokens, too few for rows of {width} in "
                           f"its {split} split (a tenth of it)")  # fmt: skip
        rows = block[: n_rows * width].reshape(n_rows, width)
        chosen = np.linspace(0, n_rows - 1, min(most, n_rows)).round().astype(int)
        found[split] = rows[chosen].astype(np.int64)
    low = min(int(rows.min()) for rows in found.values())
    high = max(int(rows.max()) for rows in found.values())
    if low < 0 or high >= d_vocab:
        raise BadInput(f"{path.name} has the token {high if high >= d_vocab else low}, but the "
                       f"model's are 0 to {d_vocab - 1}: another tokenizer's file")  # fmt: skip
    return found


def _open(path: Path) -> Integer[ndarray, "..."]:
    try:
        if path.suffix == ".npy":
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".bin":
            ids = np.memmap(path, dtype=np.uint16, mode="r")
        else:
            raise BadInput(f"{path.name} is no token file: .bin (uint16) or .npy")
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{path.name} is not a readable token file: {reason}") from None
    if not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(f"{path.name} holds {ids.dtype}, not integers")
    return ids
