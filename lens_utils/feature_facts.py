"""Facts about tokens that a label can be made of: what stands here, before, after, where.

A kind of fact gives every token of a corpus a code, or none: the piece two tokens earlier, the
class of characters, the position, the span that somebody labelled. Kinds with several columns say
several things about a token at once (all pieces among the eight before it); all others divide the
tokens into parts, so that counts of several values of one kind may be added.

Axes: token (all tokens of all rows, one after the other), column (codes of one kind).
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from lens_utils.errors import BadInput

NEAR = 8
"""How many tokens before this one count as near."""
CLASSES = (
    ("a special token", r"<[^<>\s]+>"),
    ("a line break", r"\s*\n\s*"),
    ("white space", r"\s*"),
    ("a number", r"\d+"),
    ("text with digits", r".*\d.*"),
    ("an opening bracket or quote", r"[(\[{«“‘]+"),
    ("a closing bracket or quote", r"[)\]}»”’]+"),
    ("an operator", r"[+\-*/=<>%^&|~]+"),
    ("the end of a sentence", r"[.!?]+"),
    ("other punctuation", r"[^\w\s]+"),
    ("a word in capitals", r"[A-Z]{2,}"),
    ("a capitalised word", r"[A-Z].*"),
    ("a word in small letters", r"[a-z]+"),
)
"""Of the piece without the blanks around it; the first that fits."""


@dataclass(frozen=True)
class Tokens:
    """All tokens of a corpus, row after row."""

    ids: Int[ndarray, " token"]
    row: Int[ndarray, " token"]
    """Window or question that it is from, ascending."""
    held: Bool[ndarray, " token"]
    """Whether its row is kept for testing; the same for a whole row."""
    pieces: Mapping[int, str]
    """Text of every id that occurs."""
    spans: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By family (label, source): the name of every token's span, "" for none."""

    @property
    def pos(self) -> Int[ndarray, " token"]:
        """Position within its row, from 0."""
        starts = np.flatnonzero(np.diff(self.row, prepend=-1))
        return np.arange(len(self.row)) - np.repeat(starts, np.diff(starts, append=len(self.row)))

    def check(self) -> None:
        """Raises BadInput for rows out of order, or a row that is both fitted and tested on."""
        if len(self.row) and (np.diff(self.row) < 0).any():
            raise BadInput("tokens have to come row after row")
        inside = np.diff(self.row) == 0
        if (np.diff(self.held.astype(int))[inside] != 0).any():
            raise BadInput("a row is either for fitting or for testing, not both")


@dataclass(frozen=True)
class Kind:
    """One kind of fact."""

    name: str
    codes: Int[ndarray, "token column"]
    """-1: nothing to say."""
    values: list[str]
    """What each code is called."""
    said: str
    """A label's wording, with {} for the values."""
    most: int = 5
    """How many values a label may name."""


def make_tokens(
    rows: Sequence[Sequence[int]],
    held: Sequence[bool],
    decode: Callable[[Sequence[int]], str],
    spans: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> Tokens:
    """Rows of ids as Tokens. held: by row. spans: by family, by row, a name for every token."""
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    lengths = [len(row) for row in rows]
    flat = {family: list(itertools.chain(*of)) for family, of in (spans or {}).items()}
    if wrong := [family for family, names in flat.items() if len(names) != len(ids)]:
        raise BadInput(f"{wrong[0]}: {len(flat[wrong[0]])} names for {len(ids)} tokens")
    return Tokens(
        ids,
        np.repeat(np.arange(len(rows)), lengths),
        np.repeat(np.asarray(held, dtype=bool), lengths),
        {int(i): decode([int(i)]) for i in np.unique(ids)},
        flat,
    )


def character_class(piece: str) -> str:
    """The class of a piece of text."""
    bare = piece.strip(" ") or piece
    found = next((name for name, form in CLASSES if re.fullmatch(form, bare, re.S)), None)
    return found or "other text"


def facts(tokens: Tokens) -> list[Kind]:
    """All kinds of facts about these tokens, the simpler first."""
    tokens.check()
    used, at = np.unique(tokens.ids, return_inverse=True)
    raw = [tokens.pieces[int(i)] for i in used]
    lower = [piece.strip().lower() for piece in raw]
    here = lambda names: _named(names, at)  # noqa: E731
    piece, piece_names = here([p or repr(r)[1:-1] for p, r in zip(lower, raw, strict=True)])
    group, groups = here([character_class(p) for p in raw])
    kinds = [Kind("class", group[:, None], groups, "on {}", 2)]
    kinds.append(Kind("piece", piece[:, None], [_quoted(p) for p in piece_names], "on {}"))
    whole, wholes = here([repr(p)[1:-1] for p in raw])
    kinds.append(Kind("token", whole[:, None], [_quoted(p) for p in wholes], "on exactly {}"))
    for name, cut, said in (("prefix", slice(None, 3), "on words that begin with {}"),
                            ("suffix", slice(-3, None), "on words that end in {}")):  # fmt: skip
        codes, names = here([p[cut] if len(p) > 3 else "" for p in lower])
        kinds.append(Kind(name, codes[:, None], [_quoted(n) for n in names], said))
    shift = lambda codes, by: _shifted(codes, by, tokens.row)  # noqa: E731
    for by, said in ((-1, "right after {}"), (1, "right before {}"),
                     (-2, "two tokens after {}"), (-3, "three tokens after {}")):  # fmt: skip
        quoted = [_quoted(p) for p in piece_names]
        kinds.append(Kind(f"piece {by:+d}", shift(piece, by)[:, None], quoted, said))
    for by, said in ((-1, "right after {}"), (1, "right before {}")):
        kinds.append(Kind(f"class {by:+d}", shift(group, by)[:, None], groups, said, 2))
    for name, places, said in (("pair", (-1, 0), "at the end of {}"),
                               ("pair ahead", (0, 1), "at the beginning of {}"),
                               ("pair before", (-2, -1), "right after {}"),
                               ("three", (-2, -1, 0), "at the end of {}")):  # fmt: skip
        kinds.append(_sequence(name, [shift(piece, by) for by in places], piece_names, said))
    near = np.stack([shift(piece, -by) for by in range(1, NEAR + 1)], axis=1)
    kinds.append(Kind("near", _once(near), [_quoted(p) for p in piece_names],
                      f"among the {NEAR} tokens after {{}}", 1))  # fmt: skip
    doubling = np.log2(np.maximum(tokens.pos, 1)).astype(int)
    ends = [f"position {2**n}" if n == 0 else f"positions {2**n} to {2 ** (n + 1) - 1}"
            for n in range(int(doubling.max(initial=0)) + 1)]  # fmt: skip
    kinds.append(Kind("position", doubling[:, None], ends, "at {}", 2))
    for family, names in tokens.spans.items():
        codes, values = _named(names, np.arange(len(names)))
        kinds.append(Kind(family, codes[:, None], values, f"in {{}} ({family})", 2))
    return kinds


def _quoted(text: str) -> str:
    return f'"{text}"'


def _named(
    names: Sequence[str], at: Int[ndarray, " token"]
) -> tuple[Int[ndarray, " token"], list[str]]:
    """Codes of tokens from a name for every distinct id; "" is no code."""
    distinct, code = np.unique(np.asarray(names, dtype=object).astype(str), return_inverse=True)
    return np.where(distinct[code] == "", -1, code)[at], distinct.tolist()


def _shifted(
    codes: Int[ndarray, " token"], by: int, row: Int[ndarray, " token"]
) -> Int[ndarray, " token"]:
    """The code `by` tokens on, within the same row."""
    at = np.arange(len(codes)) + by
    inside = (at >= 0) & (at < len(codes))
    at = np.clip(at, 0, max(len(codes) - 1, 0))
    return np.where(inside & (row[at] == row), codes[at], -1)


def _sequence(
    name: str, parts: Sequence[Int[ndarray, " token"]], names: Sequence[str], said: str
) -> Kind:
    """Several pieces in a row as one fact."""
    together = np.stack(parts, axis=1)
    distinct, codes = np.unique(together, axis=0, return_inverse=True)
    codes = np.where((together < 0).any(1), -1, codes.reshape(-1))
    values = [_quoted(" ".join(names[c] for c in found)) if (found >= 0).all() else ""
              for found in distinct]  # fmt: skip
    return Kind(name, codes[:, None], values, said, 3)


def _once(codes: Int[ndarray, "token column"]) -> Int[ndarray, "token column"]:
    """Of equal codes of one token, all but one become -1."""
    ordered = np.sort(codes, axis=1)
    again = np.zeros_like(ordered, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return np.where(again, -1, ordered)
