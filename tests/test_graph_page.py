"""The page of a graph: what it shows in a real browser, and that text stays text."""

import json
import re
import shutil
import subprocess

import pytest

from lens_utils import graph_page

EVIL = "</script><img src=x onerror=\"document.title='broken'\"><b>&amp; bold</b>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip


def node(node_id, kind, layer, pos, clerp="", feature=-1, **more):
    return {"node_id": node_id, "feature": feature, "layer": str(layer), "ctx_idx": pos,
            "feature_type": kind, "jsNodeId": node_id, "clerp": clerp, **more}  # fmt: skip


@pytest.fixture
def graph():
    """Two tokens, a feature of each of two layers, an error, one logit; texts that are code."""
    nodes = [
        node("0_5_1", "cross layer transcoder", 0, 1, EVIL, 20, influence=0.4, activation=1.5),
        node("1_3_1", "cross layer transcoder", 1, 1, "second", 13, influence=0.6, activation=2.0),
        node("0_-1_1", "mlp reconstruction error", 0, 1, influence=0.9),
        node("E_7_0", "embedding", "E", 0, feature=0),
        node("E_8_1", "embedding", "E", 1, feature=1),
        node("3_9_1", "logit", 3, 1, f'Output "{EVIL}" (p=0.9)', 9, token_prob=0.9,
             is_target_logit=True),
    ]  # fmt: skip
    links = [("E_8_1", "0_5_1", 2.0), ("E_7_0", "0_5_1", -0.5), ("0_5_1", "1_3_1", 1.5),
             ("0_-1_1", "1_3_1", 0.1), ("1_3_1", "3_9_1", 3.0)]  # fmt: skip
    return {
        "metadata": {"slug": "toy", "scan": "toy", "prompt": "x", "schema_version": 1,
                     "prompt_tokens": ["<b>one</b>", " two"]},
        "qParams": {"supernodes": [[EVIL, "0_5_1", "1_3_1"]], "pinnedIds": []},
        "nodes": nodes,
        "links": [{"source": s, "target": t, "weight": w} for s, t, w in links],
    }  # fmt: skip


def dom(page: str, folder, asked: str = "") -> str:
    """The page's elements after its script ran."""
    if BROWSER is None:
        pytest.skip("no Chrome or Chromium here")
    path = folder / "page.html"
    path.write_text(page)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={folder / 'profile'}", f"file://{path}{asked}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)


def test_a_browser_shows_the_graph_and_text_as_text(graph, tmp_path):
    shown = dom(graph_page.page(graph, f"title {EVIL}"), tmp_path)
    assert shown.count('class="node"') == 6 and shown.count('class="edge"') == 5
    assert "6 nodes, 5 edges" in shown and "layer 1" in shown and "tokens" in shown
    assert "<img" not in shown and "<b>" not in shown and "broken" not in shown.split("onerror")[0]
    assert "&lt;img src=x" in shown and "&lt;b&gt;one&lt;/b&gt;" in shown
    assert "&amp;amp; bold" in shown, "not unescaped on the way"


def test_a_node_that_is_chosen_shows_its_edges(graph, tmp_path):
    shown = dom(graph_page.page(graph), tmp_path, "#node=1_3_1")
    assert shown.count('class="edge"') == 3
    assert "Edges in (2)" in shown and "Edges out (1)" in shown
    assert shown.count('class="node dim"') == 2, "the tokens are no neighbours"
    weights = re.findall(r'class="row"><span>([^<]*)</span>', shown)
    assert weights == ["1.50", "0.100", "3.00"], "the strongest first"


def test_nothing_in_the_data_can_end_the_script(graph):
    page = graph_page.page(graph, EVIL)
    assert page.count("</script>") == 2 and "<img" not in page
    held = re.search(r'id="data">(.*?)</script>', page, re.S).group(1)
    value = json.loads(held)
    assert value["nodes"][0]["label"] == EVIL and value["groups"] == [EVIL]
    assert [n["group"] for n in value["nodes"]] == [0, 0, -1, -1, -1, -1]
    assert page.count("http") == 2, "the name of SVG and of a header; nothing is fetched"
    assert "default-src 'none'" in page


def test_the_largest_edges_travel_and_the_rest_is_counted(graph):
    page = graph_page.page(graph, links=2)
    value = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    assert [abs(w) for *_, w in value["links"]] == [3.0, 2.0] and value["left"] == 3
    assert value["links"][0][:2] == [1, 5], "source, target"
