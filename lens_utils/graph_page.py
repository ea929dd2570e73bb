"""A pruned attribution graph as one HTML page that needs nothing else: no server, no network.

Columns are the prompt's tokens, rows the layers: tokens at the bottom, logits on top. Circles are
features, diamonds errors; the larger, the more influence. Only the strongest edges are drawn until
a node is clicked: then those into it and out of it, which the panel lists with their weights.
Supernodes share a coloured rim; a click on a name shows the members.

Everything that comes from a model or a file (tokens, labels, names) gets onto the page as text: it
travels as JSON in which no character can end a script, and is shown by textContent alone.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lens_utils import graph_files

LINKS = 6000  # edges that travel with a page: the largest
FAINT = 120  # edges drawn before anything is clicked


def page(value: Mapping[str, Any], title: str = "", links: int = LINKS) -> str:
    """The page of a graph in Neuronpedia's format, ours or another's (`graph_files.load`).

    links: the largest edges are kept, at most so many; the page says how many are left out.
    """
    table = graph_files.table(value)
    groups = value.get("qParams", {}).get("supernodes", [])
    group = {member: number for number, (_, *members) in enumerate(groups) for member in members}
    targets, sources = np.nonzero(table.edges)
    weights = table.edges[targets, sources]
    order = np.argsort(-np.abs(weights), kind="stable")[:links]
    held = {
        "tokens": [str(token) for token in value["metadata"]["prompt_tokens"]],
        "nodes": [
            {
                "id": str(node.node_id), "kind": node.kind, "layer": int(node.layer),
                "pos": int(node.pos), "label": _label(node), "influence": _number(node.influence),
                "activation": _number(node.activation), "group": group.get(node.node_id, -1),
            }
            for node in table.nodes.itertuples()
        ],
        "links": [[int(sources[i]), int(targets[i]), float(f"{weights[i]:.4g}")] for i in order],
        "left": len(weights) - len(order),
        "groups": [str(name) for name, *_ in groups],
    }  # fmt: skip
    title = title or str(value["metadata"]["slug"])
    return (
        PAGE.replace("@TITLE@", html.escape(title))
        .replace("@FAINT@", str(FAINT))
        .replace("@DATA@", _inert(held))
    )


def _inert(value: Any) -> str:
    """JSON that may stand in a script: nothing in it can close one or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _label(node: Any) -> str:
    if node.kind == "feature":
        return node.label or f"feature {node.index}"
    return node.label or node.kind


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body { font: 14px Helvetica, Arial, sans-serif; color: #222; margin: 0; display: flex;
  height: 100vh; }
#left { flex: 1; overflow: auto; padding: 8px 12px; }
#panel { width: 340px; overflow: auto; border-left: 1px solid #ccc; padding: 8px 12px; }
h1 { font-size: 16px; margin: 4px 0 8px; } h2 { font-size: 14px; margin: 12px 0 4px; }
svg text { font-size: 11px; } .node { cursor: pointer; } .dim { opacity: 0.15; }
.row { cursor: pointer; padding: 1px 0; white-space: pre-wrap; } .row:hover { background: #eef; }
.row span { display: inline-block; width: 62px; text-align: right; margin-right: 8px;
  font-variant-numeric: tabular-nums; }
</style></head><body>
<div id="left"><h1>@TITLE@</h1><div id="note"></div><div id="graph"></div></div>
<div id="panel"></div>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";
const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F"];
const FILL = {feature: "#ffffff", error: "#eeeeee", token: "#d9d9d9", logit: "#ffd9b3"};
const make = (kind, attributes, parent, text) => {
  const made = document.createElementNS(NS, kind);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
};
const say = (kind, text, parent, name) => {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) made.className = name;
  parent.appendChild(made);
  return made;
};
const visible = text => text.replace(/\\n/g, "\\u23ce").replace(/^ /, "\\u00b7");

// Places: as wide a column as its fullest layer needs, at most PER side by side, then rows.
const PER = 6, STEP = 16, GAP = 12;
const layers = [...new Set(data.nodes.map(n => n.layer))].sort((a, b) => a - b);
const cells = new Map();
data.nodes.forEach((n, i) => {
  const key = n.layer + " " + n.pos;
  if (!cells.has(key)) cells.set(key, []);
  cells.get(key).push(i);
});
const wide = data.tokens.map((token, pos) => Math.max(visible(token).length * 7, STEP,
  ...layers.map(l => Math.min(PER, (cells.get(l + " " + pos) || []).length) * STEP)));
const left = []; let at = 60;
wide.forEach((w, pos) => { left[pos] = at; at += w + GAP; });
const lines = layers.map(l => Math.max(1, ...data.tokens.map((_, pos) =>
  Math.ceil((cells.get(l + " " + pos) || []).length / PER))));
const top_ = []; let down = 20;
for (let r = layers.length - 1; r >= 0; r--) { top_[r] = down; down += lines[r] * STEP + 22; }
data.nodes.forEach((n, i) => {
  const here = cells.get(n.layer + " " + n.pos), k = here.indexOf(i);
  n.x = left[n.pos] + STEP / 2 + (k % PER) * STEP;
  n.y = top_[layers.indexOf(n.layer)] + STEP / 2 + Math.floor(k / PER) * STEP;
});
const svg = make("svg", {width: at + 20, height: down + 30}, document.getElementById("graph"));
layers.forEach((l, r) => {
  const kinds = new Set(data.nodes.filter(n => n.layer === l).map(n => n.kind));
  const name = kinds.has("token") ? "tokens" : kinds.has("logit") ? "logits" : "layer " + l;
  make("text", {x: 4, y: top_[r] + STEP / 2 + 4, fill: "#666"}, svg, name);
  make("line", {x1: 0, x2: at, y1: top_[r] - 8, y2: top_[r] - 8, stroke: "#eee"}, svg);
});
const curves = make("g", {}, svg), dots = make("g", {}, svg);
data.tokens.forEach((token, pos) =>
  make("text", {x: left[pos], y: down + 12, class: "token"}, svg, visible(token)));
const where = n => n.kind === "logit" ? "" :
  (n.kind === "token" ? "" : "L" + n.layer + " ") + "at " + visible(data.tokens[n.pos] || "");
data.nodes.forEach((n, i) => {
  const size = n.influence === null ? 5 : 3.5 + 3.5 * (1 - n.influence);
  const rim = n.group < 0 ? "#555" : COLOURS[n.group % COLOURS.length];
  const look = {fill: FILL[n.kind] || "#fff", stroke: rim, class: "node",
    "stroke-width": n.group < 0 ? 1 : 2.5, "data-id": n.id};
  const turn = n.kind === "error" ? {transform: "rotate(45 " + n.x + " " + n.y + ")"} : {};
  const box = {x: n.x - size, y: n.y - size, width: 2 * size, height: 2 * size};
  n.dot = n.kind === "feature" ? make("circle", {cx: n.x, cy: n.y, r: size, ...look}, dots)
    : make("rect", {...box, ...turn, ...look}, dots);
  const more = n.activation === null ? "" : ", activation " + n.activation;
  make("title", {}, n.dot, n.label + "\\n" + n.kind + " " + where(n) + more + "\\n" + n.id);
  n.dot.addEventListener("click", event => { event.stopPropagation(); select(i); });
});
svg.addEventListener("click", () => clear());

const largest = Math.max(1e-12, ...data.links.map(l => Math.abs(l[2])));
const draw = (some, faint) => some.forEach(([s, t, w]) => {
  const a = data.nodes[s], b = data.nodes[t], middle = (a.y + b.y) / 2;
  make("path", {d: `M${a.x} ${a.y} C${a.x} ${middle} ${b.x} ${middle} ${b.x} ${b.y}`,
    fill: "none", stroke: w > 0 ? "#0072B2" : "#D55E00", "class": "edge",
    "stroke-width": 0.5 + 3.5 * Math.abs(w) / largest,
    "stroke-opacity": faint ? 0.25 : 0.8}, curves);
});
const panel = document.getElementById("panel");
const row = (i, weight) => {
  const line = say("div", "", panel, "row"), n = data.nodes[i];
  say("span", weight === null ? "" : weight.toPrecision(3), line);
  line.appendChild(document.createTextNode(n.label + " " + where(n)));
  line.addEventListener("click", () => select(i));
};
const only = members => data.nodes.forEach((n, i) => n.dot.classList.toggle("dim",
  members !== null && !members.has(i)));
function clear() {
  curves.replaceChildren(); panel.replaceChildren(); only(null);
  draw(data.links.slice(0, @FAINT@), true);
  say("h2", "Supernodes", panel);
  data.groups.forEach((name, g) => {
    const line = say("div", name, panel, "row group");
    line.style.borderLeft = "4px solid " + COLOURS[g % COLOURS.length];
    line.style.paddingLeft = "6px";
    line.addEventListener("click", () => show(g));
  });
  if (!data.groups.length) say("div", "none", panel);
  say("h2", "Logits", panel);
  data.nodes.forEach((n, i) => { if (n.kind === "logit") row(i, null); });
}
function show(g) {
  clear();
  only(new Set(data.nodes.flatMap((n, i) => n.group === g ? [i] : [])));
  say("h2", data.groups[g], panel);
  data.nodes.forEach((n, i) => { if (n.group === g) row(i, null); });
}
function select(i) {
  curves.replaceChildren(); panel.replaceChildren();
  const into = data.links.filter(l => l[1] === i), out = data.links.filter(l => l[0] === i);
  only(new Set([i, ...into.map(l => l[0]), ...out.map(l => l[1])]));
  draw(into.concat(out), false);
  say("h2", data.nodes[i].label, panel);
  say("div", data.nodes[i].kind + " " + where(data.nodes[i]), panel);
  say("h2", "Edges in (" + into.length + ")", panel);
  into.slice(0, 40).forEach(l => row(l[0], l[2]));
  say("h2", "Edges out (" + out.length + ")", panel);
  out.slice(0, 40).forEach(l => row(l[1], l[2]));
}
document.getElementById("note").textContent = data.nodes.length + " nodes, " +
  data.links.length + " edges" + (data.left ? ", " + data.left + " smaller ones left out" : "") +
  ". Blue raises, orange lowers. Click a node for its edges, the ground for all.";
clear();
const asked = new URLSearchParams(location.hash.slice(1)).get("node");
if (asked !== null) select(Math.max(0, data.nodes.findIndex(n => n.id === asked)));
</script></body></html>
"""
