"""The atlas on disk, read back by sqlite3 itself; its page, opened in a real browser."""

import json
import os
import re
import shutil
import sqlite3
import subprocess

import pandas as pd
import pytest

from lens_utils import feature_page, feature_store
from lens_utils.errors import BadInput
from lens_utils.feature_stats import BEFORE, OFFSETS

EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
WORDS = [" the", " cat", "<b>bold</b>", "\n", " 7", "&amp;"]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """Two layers of three features; feature 1 of layer 2 has a label that is an attack."""
    keys = [(layer, f) for layer in (2, 5) for f in range(3)]
    features = pd.DataFrame(keys, columns=["layer", "feature_id"])
    features["density"], features["n_fired"] = [0.1, 0.2, 0.3] * 2, [10, 20, 0] * 2
    features["mean"], features["max"] = 1.5, 4.0
    features["promotes"] = json.dumps([[" dog", 1.25], ["<i>", 0.5]])
    features["histogram"] = json.dumps([[0.5, 3], [1.0, 7]])
    labels = pd.DataFrame(keys, columns=["layer", "feature_id"])
    labels["label"] = ["on a number", EVIL, "too rare"] * 2
    labels["source"], labels["model_name"], labels["prompt_version"] = "rule", "", "rules 1"
    labels["accuracy"], labels["shuffled"] = [0.95, 0.7, None] * 2, [0.5, 0.45, None] * 2
    tokens = pd.DataFrame({"sequence_id": 4, "token_idx": range(6), "token": range(6),
                           "decoded_token": WORDS})  # fmt: skip
    around = [0.0] * OFFSETS
    around[BEFORE], around[BEFORE + 1] = 4.0, 1.0
    rows = [(layer, f, sample, 0, 4, 2, 4.0, json.dumps(around))
            for layer, f in keys if f < 2 for sample in ("top", "spread")]  # fmt: skip
    examples = pd.DataFrame(rows, columns=feature_store.TABLES["examples"].split())
    path = tmp_path_factory.mktemp("atlas") / "atlas.sqlite"
    tables = {"features": features, "explanations": labels, "examples": examples, "tokens": tokens}
    feature_store.write(path, tables, {"layers": [2, 5]})
    return path, tables


def test_what_was_written_is_there(atlas):
    path, tables = atlas
    for name, table in tables.items():
        read = feature_store.read(path, name)
        pd.testing.assert_frame_equal(read, table, check_dtype=False)
    assert feature_store.about(path) == {"layers": [2, 5]}
    assert set(feature_store.read(path, "features", 5).layer) == {5}


def test_views_in_goodfires_shape(atlas):
    with sqlite3.connect(atlas[0]) as db:
        cursor = db.execute("SELECT * FROM autointerp_2 ORDER BY feature_id")
        assert [c[0] for c in cursor.description] == [
            "feature_id", "label", "quality", "interestingness", "model_name", "prompt_version",
        ]  # fmt: skip
        first = cursor.fetchone()
        assert first[:3] == (0, "on a number", 0.95) and first[3] == pytest.approx(0.45)
        cursor = db.execute("SELECT * FROM activations_5 WHERE feature_id = 1")
        assert [c[0] for c in cursor.description] == [
            "feature_id", "sequence_id", "token_idx", "strength"]  # fmt: skip
        assert cursor.fetchall() == [(1, 4, 2, 4.0)]
        with pytest.raises(sqlite3.IntegrityError):
            db.execute("INSERT INTO features (layer, feature_id) VALUES (2, 0)")


def test_it_is_opened_to_read_only(atlas):
    before = atlas[0].read_bytes()
    refused = pytest.raises(sqlite3.OperationalError, match="readonly")
    with feature_store.opened(atlas[0]) as db, refused:
        db.execute("DELETE FROM features")
    feature_page.page(feature_page.content(atlas[0], 2))
    assert atlas[0].read_bytes() == before and len(list(atlas[0].parent.iterdir())) == 1


def test_a_failed_write_leaves_the_old_atlas(atlas, tmp_path):
    path = tmp_path / "atlas.sqlite"
    shutil.copy(atlas[0], path)
    double = {**atlas[1], "features": pd.concat([atlas[1]["features"]] * 2)}
    with pytest.raises(sqlite3.IntegrityError):
        feature_store.write(path, double, {})
    assert path.read_bytes() == atlas[0].read_bytes() and len(list(tmp_path.iterdir())) == 1


def test_bad_files_and_tables_are_one_line(atlas, tmp_path):
    with pytest.raises(BadInput, match="there is no atlas"):
        feature_store.read(tmp_path / "none.sqlite", "features")
    (tmp_path / "text.sqlite").write_text("not a database, though it is long enough to be one" * 9)
    with pytest.raises(BadInput, match="is no SQLite file"):
        feature_store.read(tmp_path / "text.sqlite", "features")
    sqlite3.connect(tmp_path / "empty.sqlite").execute("CREATE TABLE tokens (a)")
    with pytest.raises(BadInput, match="no table features"):
        feature_store.read(tmp_path / "empty.sqlite", "features")
    with pytest.raises(BadInput, match="not 'users'"):
        feature_store.read(atlas[0], "users")
    with pytest.raises(BadInput, match="no features of layer 3"):
        feature_page.content(atlas[0], 3)
    lacking = {**atlas[1], "tokens": atlas[1]["tokens"].drop(columns="token")}
    with pytest.raises(BadInput, match="needs token in its table tokens"):
        feature_store.write(tmp_path / "new.sqlite", lacking, {})


def test_no_text_ends_the_script(atlas):
    page = feature_page.page(feature_page.content(atlas[0], 2))
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert not re.search("[<>&]", data)
    assert json.loads(data) == json.loads(json.dumps(feature_page.content(atlas[0], 2)))
    frame = page.replace(data, "")
    assert not re.search(r"https?:| src=|@import|url\(", frame), "it needs nothing else"


def browsed(page, fragment: str) -> str:
    """The page's DOM as a browser has it after its script has run."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                 "chrome"))), None)  # fmt: skip
    if found is None:
        assert os.environ.get("CI") != "true", "CI needs Chrome or Chromium"
        pytest.skip("no Chrome or Chromium here: the page is not tested in a browser")
    own = f"--user-data-dir={page.parent / 'profile'}"
    command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", own,
               f"{page.as_uri()}#{fragment}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.fixture(scope="module")
def dom(atlas, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "layer_2.html"
    page.write_text(feature_page.page(feature_page.content(atlas[0], 2)), encoding="utf-8")
    return {fragment: browsed(page, fragment) for fragment in ("f=1", "q=NUMBER")}


def test_a_browser_shows_a_feature_and_its_label_as_text(dom):
    shown = dom["f=1"]
    assert "<title>Features of layer 2</title>" in shown, "a label's script did not run"
    assert "<h2>Layer 2, feature 1</h2>" in shown
    body = shown.split("<body>")[1].split("<script id")[0]
    assert "&lt;/script&gt;&lt;script&gt;document.title" in body
    assert "<img" not in body and "<b>" not in body and "&lt;b&gt;bold&lt;/b&gt;" in body
    assert "dog 1.25" in body
    # Of the two examples: the peak outlined and darkest, its neighbour lighter, the others bare.
    assert body.count('class="example"') == 2 and body.count('class="peak"') == 2
    assert body.count('title="4.00"') == 2 and body.count('title="1.00"') == 2
    assert "3 of 3 features" in body


def test_a_browser_finds_features_by_label(dom):
    listed = dom["q=NUMBER"].split('id="list">')[1].split("</tbody>")[0]
    assert re.findall(r'data-feature="(\d)"', listed) == ["0"]
    assert "on a number" in listed and "1 of 3 features" in dom["q=NUMBER"]
