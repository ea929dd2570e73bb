"""Text to fit and to test on, from what is on every machine that can run the lab."""

import ast
import hashlib
import importlib.util
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("networkx", "sklearn")


@dataclass(frozen=True)
class Doc:
    """One document: where it is from and its text."""

    id: str
    text: str
    topic: str = ""
    """Its subject, where the source says one."""

    @property
    def split(self) -> str:
        """fit, validation or test, by a digest of the file: its texts are never in two."""
        return {0: "test", 1: "validation"}.get(number(self.id.partition(":")[0]) % 10, "fit")


def docstrings(
    characters: int, packages: tuple[str, ...] = PACKAGES, shortest: int = 300
) -> list[Doc]:
    """About so many characters of English from the docstrings of installed packages.

    A document is one docstring's prose: paragraphs that are sentences, joined. Files are taken in
    the order of a digest of their names, which mixes the packages. The text depends on the
    packages' versions: say its `digest` with every result.
    """
    docs: list[Doc] = []
    seen: set[str] = set()  # paragraphs are copied from one docstring to the next
    total = 0
    for name, path in sources(packages):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError:  # written for a newer Python than this one
            continue
        for node in _documented(tree):
            new = [p for p in _sentences(ast.get_docstring(node) or "") if p not in seen]
            seen.update(new)
            text = "\n\n".join(new)
            if len(text) >= shortest:
                docs.append(Doc(f"{name}:{getattr(node, 'name', '')}", text))
                total += len(text)
        if total >= characters:
            break
    return docs


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """In the order of ast.walk, but without walking through expressions: most of a tree."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
            yield node
        todo.extend(
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        )


def sources(packages: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Name and path of the packages' modules, tests left out, in an order that mixes packages."""
    return sorted(_modules(packages), key=lambda module: number(module[0]))


def _modules(packages: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            for path in Path(folder).rglob("*.py"):
                if "tests" not in path.parts:
                    yield str(path.relative_to(Path(folder).parent)), path


def number(text: str) -> int:
    """A number that depends on nothing but the text: for splits, and for an order that mixes."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _sentences(docstring: str) -> list[str]:
    """The paragraphs that read as English: no lists, tables, signatures or code."""
    paragraphs = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", docstring))
    return [
        p
        for p in paragraphs
        if len(p) > 80
        and p[0].isupper()
        and p.endswith(".")
        and "--" not in p
        and " : " not in p
        and sum(c.isalpha() or c == " " for c in p) > 0.93 * len(p)
    ]


def digest(docs: list[Doc]) -> str:
    """A short name of exactly this text, for the manifest."""
    return hashlib.sha256("\0".join(doc.text for doc in docs).encode()).hexdigest()[:16]
