"""Benchmarks of mathematics: MATH in the three schemas it is published in, and GSM8K.

Nothing of them is kept in this repository: MATH is under a claim of copyright. `./lab fetch
math-500` brings a set to this machine, as one JSON file in the cache; everything else reads that
file, or a .json or .jsonl of your own, and works offline.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lens_utils import answers, files, provenance
from lens_utils.errors import BadInput, Failure


class Source(NamedTuple):
    """Where the hub has a benchmark."""

    hub_id: str
    configs: tuple[str, ...]
    licence: str


SOURCES = {
    "math-500": Source("HuggingFaceH4/MATH-500", ("default",), "claimed by AoPS"),
    "math": Source(
        "EleutherAI/hendrycks_math",
        ("algebra", "counting_and_probability", "geometry", "intermediate_algebra",
         "number_theory", "prealgebra", "precalculus"),
        "claimed by AoPS",
    ),
    "math-lighteval": Source("DigitalLearningGmbH/MATH-lighteval", ("default",), "claimed by AoPS"),
    "gsm8k": Source("openai/gsm8k", ("main",), "MIT"),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One problem, whatever schema it came in."""

    id: str
    problem: str
    answer: str
    """The gold answer: what the solution's last box holds."""
    solution: str
    kind: str
    """MATH's type or subject; empty for GSM8K."""
    level: int | None
    """1 to 5; None where MATH says "Level ?"."""


def problem(row: dict[str, Any], name: str) -> Problem:
    """A row of MATH (either schema, or as this module keeps it) or of GSM8K.

    Raises BadInput for a row without problem or answer.
    """
    solution = str(row.get("solution") or "")
    if "question" in row:
        text, solution = row["question"], str(row.get("answer"))
        answer = answers.gsm8k_answer(solution)
    else:
        text, answer = row.get("problem"), row.get("answer")
        answer = answers.last_boxed(solution) if answer in (None, "") else answer
    if not text or answer in (None, ""):
        raise BadInput(f"{name}: a row needs a problem, and an answer or a solution with a box; "
                       f"this one has {', '.join(row)}")  # fmt: skip
    level = re.search(r"\d", str(row.get("level")))
    kind = row.get("type") or row.get("subject") or row.get("kind") or ""
    own = row.get("unique_id") or row.get("id") or name
    return Problem(
        str(own), str(text), str(answer), solution, kind, int(level[0]) if level else None
    )


def load(name: str) -> list[Problem]:
    """A benchmark that `fetch` brought here, or the problems of a .json or .jsonl file.

    Raises BadInput when it is not there, is no such file, or has no or two problems of one id.
    """
    path = place(name)
    try:
        found = [problem(row, f"{path.stem}-{n}") for n, row in enumerate(_rows(path))]
    except BadInput:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{name} is no list of problems: {error}") from None
    if not found:
        raise BadInput(f"{name} holds no problems")
    double, times = Counter(p.id for p in found).most_common(1)[0]
    if times > 1:
        raise BadInput(f"{name}: {times} problems have the id {double!r}")
    return found


def place(name: str) -> Path:
    """The file of a benchmark. Raises BadInput when it is not there."""
    path = kept(name) if name in SOURCES else Path(name).expanduser()
    if name in SOURCES and not path.exists():
        raise BadInput(f"{name} is not on this machine: ./lab fetch {name} brings it")
    if not path.exists() or path.suffix not in (".json", ".jsonl"):
        raise BadInput(f"no benchmark {name!r}: {', '.join(SOURCES)}, or a .json or .jsonl file "
                       "of problems")  # fmt: skip
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def kept(name: str) -> Path:
    """Where a fetched benchmark lies."""
    return provenance.cache() / "problems" / f"{name}.json"


def fetch(name: str) -> Path:
    """Bring the test part of a benchmark to this machine; where it lies. Raises Failure offline."""
    source = SOURCES[name]
    rows = [problem(row, f"{name}-{n}") for n, row in enumerate(_from_hub(source))]
    files.write(kept(name), [dataclasses.asdict(row) for row in rows])
    return kept(name)


def _from_hub(source: Source) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    for config in source.configs:
        try:
            yield from load_dataset(source.hub_id, config, split="test")
        except (OSError, ValueError) as error:  # offline is a ConnectionError, an OSError
            reason = str(error).partition("\n")[0]
            raise Failure(f"the hub did not give {source.hub_id}: {reason}") from None
