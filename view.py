"""Circuit file -> one self-contained HTML page.

    python view.py out/demo/single_double_quote/circuit.json [--out=FILE]

Notable features:
- The whole circuit as a graph from the tokens up to the two answer logits, one mark per node; counted edges are
  solid (blue +, orange -, width |weight|), the residual stream that joins a write to the later reads of its channel
  is dashed and grey, the channels of one attention head share a box (paper, sections 2.1 and 3.1).
- Rows are ordered by barycenter and placed by least squares, so that most links run straight up.
- Hover or focus a node or an edge to see its numbers and neighbours; click a node to colour the tokens of the
  held-out prompts by its activation. Works from the keyboard, in light and in dark, without a network.
- Bad input is one line on stderr and exit status 2, and nothing is written.
"""

import argparse
import html
import json
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

FORMAT = "sparse-circuit-1"
SITE = re.compile(r"\d+\.(attn\.(act_in|q|k|v|resid_delta)|mlp\.(act_in|post_act|resid_delta))")
NUMBER = (int, float, type(None))
CIRCUIT = dict(
    format=str, model=dict, task=str, task_description=str, answers=list, target_loss=NUMBER, loss=NUMBER, loss_heldout=NUMBER,
    unpruned_loss=NUMBER, ablation=str, logit_scale=NUMBER, logit_shift=NUMBER, nodes=dict, edges=list, embedding=list,
    unembedding=list, means=dict, n_nodes=int, n_edges=int, validation=dict, examples=list, seed=NUMBER, settings=dict)
MODEL = dict(dir=str, sha256=str, n_layer=int, d_model=int, n_head=int, d_head=int, d_mlp=int)
EXAMPLE = dict(tokens=list, answer=str, wrong=str, p_answer=NUMBER, p_answer_unpruned=NUMBER, activations=dict)


class BadInput(Exception):
    """What is wrong with the input and what to do, in one line."""


def need(ok: bool, message: str) -> None:
    if not ok:
        raise BadInput(message)


def need_keys(x: object, types: dict, where: str = "") -> None:
    need(isinstance(x, dict), f"{where or 'the file'} holds no JSON object")
    for key, kind in types.items():
        need(key in x, f"no key '{where}{key}'")
        need(isinstance(x[key], kind), f"'{where}{key}' has the wrong type")


def check(c: object) -> None:
    """All that the page relies on; what is wrong first is a BadInput, or a TypeError and such where lists go astray."""
    need_keys(c, CIRCUIT)
    need(c["format"] == FORMAT, f"format is {c['format']!r}, this page reads {FORMAT!r}")
    need_keys(c["model"], MODEL, "model.")
    need(len(c["answers"]) == 2 and all(isinstance(a, str) for a in c["answers"]), "'answers' is not two strings")
    nodes = [(site, channel) for site, channels in c["nodes"].items() for channel in channels]
    for site, channel in nodes:
        need(bool(SITE.fullmatch(site)) and int(site.split(".")[0]) < c["model"]["n_layer"], f"unknown site '{site}'")
        need(type(channel) is int and 0 <= channel < len(c["means"].get(site, ())), f"'means' lacks {site}.{channel}")
    known = set(nodes)
    for edge in c["edges"]:
        need(len(edge) == 5 and type(edge[4]) in (int, float), f"edge {edge} is not [site, channel, site, channel, weight]")
        for site, channel in (edge[:2], edge[2:4]):
            need((site, channel) in known and channel is not True, f"edge {edge}: {site}.{channel} is not in 'nodes'")
    for key, count in (("n_nodes", len(known)), ("n_nodes", len(nodes)), ("n_edges", len(c["edges"]))):
        need(c[key] == count, f"'{key}' is {c[key]}, but the file lists {count}")
    for e in c["embedding"] + c["unembedding"]:
        need(len(e) == 4 and isinstance(e[1], str) and type(e[2]) is int and type(e[3]) in (int, float),
             f"embedding entry {e} is not [token id, token, channel, weight]")
    for i, ex in enumerate(c["examples"]):
        need_keys(ex, EXAMPLE, f"examples[{i}].")
        for site, acts in ex["activations"].items():
            need(len(acts) == len(c["nodes"].get(site, ())) and
                 all(len(row) == len(ex["tokens"]) and all(isinstance(x, NUMBER) for x in row) for row in acts),
                 f"examples[{i}].activations['{site}'] is not one row per node and one value per token")


def read_circuit(path: Path) -> dict:
    """Read and check a circuit; NaN, infinities and 1e999 become null, which the page shows as a dash."""
    def finite(text: str) -> float | None:
        return x if math.isfinite(x := float(text)) else None
    try:
        c = json.loads(path.read_text("utf-8"), parse_constant=finite, parse_float=finite)
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}; give the circuit.json that prune.py wrote") from e
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path} is not JSON, perhaps truncated ({str(e)[:80]}); run prune.py again") from e
    try:
        check(c)
    except (BadInput, TypeError, AttributeError, ValueError, LookupError) as e:
        raise BadInput(f"{path} is not a circuit that this page can show: {e}; run prune.py again") from e
    return c


def render(c: dict, command: str) -> str:
    """The page; of the means it keeps only the nodes'."""
    short = dict(c, command=command)
    short["means"] = {site: [c["means"][site][channel] for channel in channels] for site, channels in c["nodes"].items()}
    data = json.dumps(short, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(f"{c['task']} · circuit"), "STYLE": STYLE, "DATA": data, "SCRIPT": SCRIPT}
    return re.sub("@@([A-Z]+)@@", lambda m: parts[m[1]], PAGE)  # one pass: what is filled in is not searched again


def summary(c: dict) -> str:
    """One line: sizes and losses."""
    def nats(x: object) -> str:
        return f"{x:.3f}" if isinstance(x, (int, float)) else "-"
    task = " ".join(c["task"].encode("ascii", "replace").decode().split())  # whatever the terminal can print
    return (f"{task}: {c['n_nodes']} nodes, {c['n_edges']} edges; loss {nats(c['loss_heldout'])} nats held out "
            f"(target {nats(c['target_loss'])}, unpruned model {nats(c['unpruned_loss'])}); necessity {nats(c['validation'].get('necessity'))}")


def write(path: Path, text: str) -> None:
    tmp = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        tmp.write_text(text, "utf-8", errors="replace")
        os.replace(tmp, path)
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror}; choose another place with --out=FILE") from e
    finally:
        with suppress(OSError):  # gone after os.replace
            tmp.unlink()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("view.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, f"{message}; usage: python view.py CIRCUIT.json [--out=FILE]")
    parser.add_argument("circuit", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the circuit, ending in .html")
    try:
        args = parser.parse_args(argv)
        circuit, out = read_circuit(args.circuit), args.out or args.circuit.with_suffix(".html")
        need(out.resolve() != args.circuit.resolve(), f"{out} is the circuit itself; choose another --out=FILE")
        write(out, render(circuit, f"python view.py {args.circuit}"))
    except BadInput as e:
        print("view.py:", str(e).replace("\n", " "), file=sys.stderr)
        return 2
    print(summary(circuit))
    print(out)
    return 0


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@TITLE@@</title><style>@@STYLE@@</style></head>
<body><noscript>This page draws the circuit with JavaScript, which is switched off.</noscript>
<header><p class="kicker">Circuit of a weight-sparse transformer</p><h1 id="task"></h1><p id="what"></p><dl id="tiles"></dl></header>
<main><section class="card" aria-label="The circuit as a graph"><div id="key" class="key"></div><div id="canvas"></div></section>
  <aside aria-label="The selected node"><section id="node" class="card" aria-live="polite"></section>
    <section id="prompts" class="card" aria-label="Held-out prompts"></section></aside></main>
<section class="card tables" id="tables"></section><footer id="foot"></footer><div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="circuit">@@DATA@@</script>
<script>@@SCRIPT@@</script></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --bg: #f7f7f5; --card: #fff; --ink: #1d2025; --soft: #646a73; --line: #e3e3df;
  --band: #f4f4f1; --head: #e6e9f2; --rim: #8b929c; --rail: #a9adb4; --pos: #2a78d0; --neg: #dd7416;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --card: #1c1f23; --ink: #e7e8ea; --soft: #979da6;
  --line: #2d3137; --band: #22262b; --head: #303746; --rim: #6d747e; --rail: #666c75; --pos: #5fa5f2; --neg: #f0943f; } }
* { box-sizing: border-box; } .soft, #what, footer { color: var(--soft); } .pos { color: var(--pos); } .neg { color: var(--neg); }
body { margin: 0 auto; padding: 32px 28px 40px; max-width: 1720px; background: var(--bg); font: 14px/1.5 var(--sans);
  color: var(--ink); }
h1 { margin: 2px 0 4px; font: 620 28px/1.2 var(--sans); letter-spacing: -.015em; } footer p { margin: 2px 0; }
h2 { margin: 0; font-size: 13px; font-weight: 600; } code, .mono, .num { font: 12px var(--mono); } b { font: 600 12px var(--mono); }
.tok { font: 12px/1.5 var(--mono); padding: 1px 6px; border-radius: 5px; background: var(--band); color: var(--ink);
  white-space: pre; box-shadow: inset 0 0 0 1px var(--line); }
.kicker { margin: 0; color: var(--soft); font-size: 12px; letter-spacing: .04em; } #what { margin: 0; max-width: 80ch; }
#tiles { display: flex; flex-wrap: wrap; gap: 14px 44px; margin: 22px 0 24px; } #tiles dt { font-size: 12px; color: var(--soft); }
#tiles div { display: flex; flex-direction: column-reverse; } #tiles dd { margin: 0; font: 560 30px/1.15 var(--sans); }
main, .tables { display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); gap: 18px; align-items: start; }
main.wide { grid-template-columns: minmax(0, 1fr); } .wide aside { position: static; max-height: none; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
aside { display: grid; gap: 18px; position: sticky; top: 16px; max-height: calc(100vh - 32px); overflow: auto; }
.key, .scale { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 12px; color: var(--soft); align-items: center; }
.key svg { vertical-align: -2px; margin-right: 6px; } #canvas { overflow-x: auto; margin-top: 12px; }
#canvas svg { display: block; margin: 0 auto; } svg text { font: 11px var(--sans); fill: var(--soft); } .row { text-anchor: end; }
svg .title { font-weight: 600; fill: var(--ink); } .band { fill: var(--band); } .head { fill: var(--head); }
.name { paint-order: stroke; stroke: var(--band); stroke-width: 4px; } .edge { fill: none; stroke-linecap: round; opacity: .85; }
.rail { fill: none; stroke: var(--rail); stroke-dasharray: 3 3.5; } .many .edge { opacity: .4; } .many .rail { opacity: .5; }
path:is(.pos, .neg) { stroke: currentColor; } .hit { fill: none; stroke: transparent; stroke-width: 9; pointer-events: stroke; }
.node, .end { outline: none; } .node { cursor: pointer; } .node rect { fill: var(--card); stroke: var(--rim); }
.node text, .end text { text-anchor: middle; fill: var(--ink); font-family: var(--mono); pointer-events: none; }
:is(.node, .end):is(:hover, :focus-visible) rect { stroke: var(--ink); stroke-width: 1.6; }
.node.picked rect { fill: var(--ink); stroke: var(--ink); } .node.picked text { fill: var(--card); }
.end rect { fill: var(--card); stroke: var(--line); } .end text.soft { fill: var(--soft); font-family: var(--sans); }
.end rect:is(.pos, .neg) { fill: color-mix(in srgb, currentColor 20%, var(--card)); stroke: none; }
svg g, svg path { transition: opacity .12s; } .focus :is(.edge, .rail).on { opacity: 1; }
.focus :is(.edge, .rail):not(.on) { opacity: .09; } .focus :is(.node, .end):not(.on) { opacity: .25; }
#tip { position: fixed; z-index: 9; pointer-events: none; max-width: 440px; padding: 8px 12px; border-radius: 8px;
  background: var(--card); border: 1px solid var(--line); box-shadow: 0 6px 24px rgb(0 0 0 / .16); font-size: 12px; }
#node b { font-size: 16px; } aside p, #tip p { margin: 2px 0 8px; color: var(--soft); }
.io { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 28px; } .io h2 { color: var(--soft); font-weight: 500; }
ul { margin: 2px 0 0; padding: 0; list-style: none; font-size: 12px; } #node ul { max-height: 150px; overflow: auto; }
li { display: flex; justify-content: space-between; gap: 14px; padding: 1px 4px 1px 0; } #tip h2, .io h2 { font-size: 12px; }
button { color: inherit; background: none; border: 0; padding: 0; cursor: pointer; } button:hover { text-decoration: underline; }
.scale { margin: 4px 0 14px; gap: 4px 8px; } .scale i { width: 120px; height: 9px; border-radius: 5px; background: linear-gradient(
  90deg, color-mix(in srgb, var(--neg) 70%, transparent), transparent, color-mix(in srgb, var(--pos) 70%, transparent)); }
.pairs { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px; }
.pairs > div { display: flex; flex-direction: column; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
pre { flex: 1; margin: 0; padding: 10px 12px; font: 12px/1.62 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { border-radius: 3px; padding: 1px 0; } pre .differs { box-shadow: inset 0 -1.5px 0 var(--ink); }
pre em { font-style: normal; opacity: .35; } .verdict .tok { background: var(--card); } .verdict { display: flex; flex-wrap: wrap;
  gap: 2px 10px; padding: 7px 12px; font-size: 12px; border-top: 1px solid var(--line); background: var(--band); }
.tables { margin-top: 18px; gap: 8px 40px; } .tables details:first-child { grid-row: 1 / span 3; }
summary { cursor: pointer; font-weight: 600; font-size: 13px; } .scroll { max-height: 420px; overflow: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: 12.5px; } th, td { padding: 3px 26px 3px 0; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 500; color: var(--soft); position: sticky; top: 0; background: var(--card); }
footer { margin: 18px 4px 0; font-size: 12px; overflow-wrap: anywhere; }
@media (max-width: 1060px) { main, .tables { grid-template-columns: minmax(0, 1fr); }
  aside { position: static; max-height: none; } .tables details:first-child { grid-row: auto; } }
@media (max-width: 640px) { .pairs, .io { grid-template-columns: minmax(0, 1fr); } body { padding: 20px 14px; } }
"""

SCRIPT = r"""'use strict'; const C = JSON.parse(document.getElementById('circuit').textContent), $ = id => document.getElementById(id);
const esc = s => String(s).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const fmt = x => x == null ? '–' : typeof x !== 'number' ? esc(x) : String(
  x && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? x.toExponential(2) : +x.toPrecision(4)).replace('-', '−');
const sign = w => w < 0 ? 'neg' : 'pos', num = w => `<span class="num ${sign(w)}">${w > 0 ? '+' : ''}${fmt(w)}</span>`;
const show = s => esc(s.replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/ /g, '·')), tok = s => `<span class="tok">${show(s)}</span>`;
const clip = (s, n) => show(s.length > n ? s.slice(0, n - 1) + '…' : s);
const go = id => `<button class="mono" data-go="${id}">${id}</button>`;
const group = (list, key) => list.reduce((m, x) => m.set(key(x), [...(m.get(key(x)) || []), x]), new Map());
const byWeight = (list, w) => [...list].sort((a, b) => Math.abs(w(b)) - Math.abs(w(a)));
// ---- nodes and edges
const KIND = {act_in: 'residual read', resid_delta: 'residual write', q: 'query', k: 'key', v: 'value', post_act: 'neuron'};
const list = Object.entries(C.nodes).flatMap(([site, channels]) => channels.map((c, i) => {
  const [layer, part, kind] = site.split('.'), head = 'qkv'.includes(kind) ? Math.floor(c / C.model.d_head) : null;
  return {id: `${site}.${c}`, site, c, i, part, kind, head, layer: +layer, mean: C.means[site][i], in: [], out: [],
    what: `${KIND[kind]}${head === null ? '' : ` of head ${head}`}, layer ${layer} ${part === 'attn' ? 'attention' : 'MLP'}`};
}));
const nodes = new Map(list.map(n => [n.id, n]));
const edges = byWeight(C.edges, e => e[4]).map(([s, c, t, d, w]) => ({from: `${s}.${c}`, to: `${t}.${d}`, w}));
for (const e of edges) { nodes.get(e.from).out.push(e); nodes.get(e.to).in.push(e); }
// ---- rows from the bottom up; a unit is what is placed as one: a node, a head, a token stack, a waypoint
const rows = [], at = new Map(), single = (id, w) => ({w, items: [id]});   // at: id -> {row, unit, dx}, later also x, y, h
const add = (r, u) => { rows[r].units.push(u); u.items.forEach(id => at.set(id, {row: r, unit: u, dx: 0})); };
const addRow = (band, label, units) => {
  if (units.length) { rows.push({band, label, units: []}); for (const u of units) add(rows.length - 1, u); }
};
const reads = list.filter(n => n.kind === 'act_in'), writes = list.filter(n => n.kind === 'resid_delta');
const stacks = group(byWeight(C.embedding.filter(e => reads.some(n => n.c === e[2])), e => e[3]), e => e[2]);
const small = stacks.size > 12, stackW = small ? 46 : 74, stackH = Math.min(small ? 3 : 5, Math.max(0, ...[...stacks.values()].map(s => s.length)));
addRow('tokens', '', [...stacks.keys()].map(c => single(`token.${c}`, stackW)));
for (let L = 0; L < C.model.n_layer; L++) for (const part of ['attn', 'mlp']) {
  const own = list.filter(n => n.layer === L && n.part === part), name = part === 'attn' ? 'attention' : 'MLP';
  const plain = kind => own.filter(n => n.kind === kind).map(n => single(n.id, 36));
  const heads = [...group(own.filter(n => n.head !== null), n => n.head)].map(([head, ns]) => {
    const groups = ['q', 'k', 'v'].map(k => ns.filter(n => n.kind === k)).filter(g => g.length);
    return {head, groups, w: ns.length * 40 + groups.length * 20 + 8, items: ns.map(n => n.id)};
  });
  for (const [label, units] of [['read', plain('act_in')], ['heads', heads], ['neurons', plain('post_act')], ['write', plain('resid_delta')]])
    addRow(`layer ${L} · ${name}`, label, units);
}
addRow('logits', '', C.answers.map((a, i) => single(`logit.${i}`, 96)));
// ---- the residual stream: drawn, not counted. Links of one channel share a waypoint in each row that they pass.
const stream = [], segments = new Map(), answerRows = i => C.unembedding.filter(e => e[1] === C.answers[i]);
for (const n of reads) {
  if (stacks.has(n.c)) stream.push({from: `token.${n.c}`, to: n.id, c: n.c});
  for (const w of writes) if (w.c === n.c && at.get(w.id).row < at.get(n.id).row) stream.push({from: w.id, to: n.id, c: n.c});
}
for (const w of writes) for (const i of [0, 1]) for (const e of answerRows(i))
  if (e[2] === w.c) stream.push({from: w.id, to: `logit.${i}`, c: w.c, w: e[3]});
for (const s of stream) {
  const end = at.get(s.to).row;
  for (let r = at.get(s.from).row + 1, a = s.from, b; r <= end; r++, a = b) {
    b = r === end ? s.to : `way.${r}.${s.c}`; if (!at.has(b)) add(r, single(b, 8));
    const key = `${a}|${b}`; if (!segments.has(key)) segments.set(key, {from: a, to: b, c: s.c, w: r === end ? s.w : undefined, links: []});
    segments.get(key).links.push(s);
  }
}
// ---- layout: sweep up and down; sort each row by the mean of its neighbours, then place it by least squares
const near = new Map([...at.keys()].map(id => [id, []]));
for (const {from, to, links} of [...edges, ...segments.values()]) {
  const weight = !links ? 1 : /way/.test(from + to) ? 3 : 1.5;
  near.get(from).push([to, weight]); near.get(to).push([from, weight]);
}
const xOf = id => at.get(id).unit.x + at.get(id).dx;
function want(u, ids, dir) {       // where the neighbours of ids below (dir -1), above (1) or both (0) pull the unit u
  let sum = 0, weight = 0;
  for (const id of ids) for (const [b, w] of near.get(id)) if (dir * (at.get(b).row - at.get(id).row) >= 0)
    { sum += w * (xOf(b) - at.get(id).dx); weight += w; }
  return weight ? sum / weight : u.x;
}
function arrange(u) {              // the channels of a head: groups Q, K, V, each in the order of where it is pulled
  const pull = n => want(u, [n.id], 0) + at.get(n.id).dx; let x = 6 - u.w / 2;
  for (const g of u.groups) { g.sort((a, b) => pull(a) - pull(b)); x += 20; for (const n of g) { at.get(n.id).dx = x + 18; x += 40; } }
}
const gap = u => u.head === undefined ? 8 : 18, total = units => units.reduce((s, u) => s + u.w + gap(u), 0);
const reach = Math.max(300, ...rows.map(r => total(r.units))) / 2;
function place(units) {            // pool adjacent violators: the nearest positions that keep order, gaps and reach
  const pools = []; let s = 0;
  for (const u of units) {
    pools.push({sum: u.want - s - u.w / 2, n: 1, us: [[u, s + u.w / 2]]}); s += u.w + gap(u);
    for (let p, q; pools.length > 1 && (q = pools.at(-1), p = pools.at(-2), p.sum / p.n > q.sum / q.n);)
      { pools.pop(); p.sum += q.sum; p.n += q.n; p.us.push(...q.us); }
  }
  for (const p of pools) for (const [u, off] of p.us) u.x = Math.min(Math.max(p.sum / p.n, -reach), reach - s) + off;
}
for (const row of rows) { row.units.forEach(u => { u.want = -total(row.units) / 2; }); place(row.units); }
for (let sweep = 0; sweep < 30; sweep++) {
  const settle = sweep > 21, dir = settle ? 0 : sweep % 2 ? 1 : -1;
  for (const row of sweep % 2 ? [...rows].reverse() : rows) {
    for (const u of row.units) { if (u.groups && !settle) arrange(u); u.want = want(u, u.items, dir); }
    if (!settle) row.units.sort((a, b) => a.want - b.want);
    place(row.units);
  }
}
const units = rows.flatMap(r => r.units), gutter = 132, bands = [];
const shift = gutter + 14 - Math.min(...units.map(u => u.x - u.w / 2));
const W = Math.max(440, Math.max(...units.map(u => u.x + u.w / 2)) + shift + 18);
let H = 0;                         // y grows downwards, so start from the logits
for (const row of [...rows].reverse()) {
  if (bands.at(-1)?.name !== row.band) { H += bands.length ? 22 : 0; bands.push({name: row.band, top: H, rows: []}); }
  row.y = H + (row.band === 'tokens' ? 14 : 26); bands.at(-1).rows.push(row);
  H += row.band === 'tokens' ? (stackH + 1) * 17 + 8 : row.label === 'heads' ? 62 : 56;
  bands.at(-1).bottom = H - 4;
}
for (const [id, p] of at) Object.assign(p, {x: xOf(id) + shift, y: rows[p.row].y, h: id.startsWith('way') ? 0 : 11});
// ---- drawing
const maxW = Math.max(1e-9, ...edges.map(e => Math.abs(e.w))), many = edges.length > 300;
const lines = [...[...segments.values()].map(s => ({...s, cls: 'rail' + (s.w === undefined ? '' : ' ' + sign(s.w))})),
  ...edges.map(e => ({...e, links: [e], cls: 'edge ' + sign(e.w)})).reverse()];   // the strongest on top
for (const l of lines) {
  const a = at.get(l.from), b = at.get(l.to), m = (a.y - a.h + b.y + b.h) / 2;
  l.d = `M${a.x.toFixed(1)} ${a.y - a.h}C${a.x.toFixed(1)} ${m} ${b.x.toFixed(1)} ${m} ${b.x.toFixed(1)} ${b.y + b.h}`;
  l.width = l.cls.startsWith('rail') ? 1.1 : .8 + (many ? 2.4 : 4.2) * Math.abs(l.w) / maxW;
}
const text = (x, y, s, cls = '') => `<text x="${x}" y="${y}" class="${cls}">${s}</text>`;
const rect = (x, y, w, h, r, cls = '') => `<rect x="${x}" y="${y}" width="${w}" height="${h}" rx="${r}" class="${cls}"/>`;
const mark = (id, cls, label, inner) => `<g class="${cls}" data-id="${id}" tabindex="0" aria-label="${esc(label)}"${
  cls === 'node' ? ' role="button" aria-pressed="false"' : ''}>${inner}</g>`;
let svg = '', names = '';
for (const b of bands) {
  const [name, part] = b.name.split(' · ');
  svg += (part ? rect(0, b.top, W, b.bottom - b.top, 9, 'band') + text(12, b.top + 37, part) : '') +
    text(12, b.top + (part ? 21 : 30), name, 'title') + b.rows.map(r => text(gutter - 14, r.y + 4, r.label, 'row')).join('');
}
for (const [r, u] of rows.flatMap(r => r.units.map(u => [r, u]))) if (u.groups) {
  const x = u.x + shift - u.w / 2;
  svg += rect(x, r.y - 18, u.w, 36, 9, 'head'); names += text(x + 3, r.y - 22, `head ${u.head}`, 'name');
  for (const [n] of u.groups) names += text(at.get(n.id).x - 32, r.y + 4, n.kind.toUpperCase(), 'title');
}
for (const l of lines) svg += `<path class="${l.cls}" d="${l.d}" stroke-width="${l.width.toFixed(2)}"/>`;
svg += names + lines.map((l, i) => `<path class="hit" d="${l.d}" data-line="${i}"/>`).join('');
for (const n of list) {
  const {x, y} = at.get(n.id), round = n.head !== null || n.kind === 'post_act' ? 11 : 4;
  svg += mark(n.id, 'node', `${n.id}, ${n.what}, ${n.in.length} edges in, ${n.out.length} out`,
    rect(x - 18, y - 11, 36, 22, round) + text(x, y + 4, n.c));
}
for (const [c, entries] of stacks) {
  const id = `token.${c}`, {x, y} = at.get(id);
  svg += mark(id, 'end', `token embedding of channel ${c}`, text(x, y + 3, (small ? '' : 'channel ') + c, 'soft') +
    entries.slice(0, stackH).map((e, i) => rect(x - stackW / 2, y + 11 + 17 * i, stackW, 15, 3, sign(e[3])) +
      text(x, y + 22.5 + 17 * i, clip(e[1], small ? 6 : 10))).join(''));
}
C.answers.forEach((a, i) => { const {x, y} = at.get(`logit.${i}`);
  svg += mark(`logit.${i}`, 'end', 'logit of ' + a, rect(x - 46, y - 15, 92, 26, 6) + text(x, y + 2.5, clip(a, 11))); });
$('canvas').innerHTML = `<svg viewBox="0 0 ${W} ${H}" role="group" class="${many ? 'many' : ''}" style="width:min(100%, ${
  1.25 * W}px); min-width:${.55 * W}px" aria-label="Circuit: ${C.n_nodes} nodes, ${C.n_edges} edges">${svg}</svg>`;
document.querySelector('main').classList.toggle('wide', W > 1200);   // the prompts then go below
$('key').innerHTML = [['<path class="edge pos" stroke-width="3" d="M2 6H24"/>', 'positive weight'],
  ['<path class="edge neg" stroke-width="3" d="M2 6H24"/>', `negative weight (widest ${fmt(maxW)})`],
  ['<path class="rail" d="M0 6H26"/>', 'residual stream, not counted'], [rect(0, 0, 24, 12, 4, 'head'), 'attention head']]
  .map(([a, b]) => `<span><svg width="26" height="12" aria-hidden="true">${a}</svg>${b}</span>`).join('');
// ---- hover and focus
const canvas = $('canvas').firstChild, tip = $('tip'), paths = [...canvas.querySelectorAll('.edge, .rail')];
const marks = new Map([...canvas.querySelectorAll('[data-id]')].map(g => [g.dataset.id, g]));
function light(test, ids) {        // the lines that pass the test, the marks at their ends and ids; dim the rest
  const on = new Set(ids), hits = lines.map(l => l.links.filter(test));
  hits.forEach((h, i) => { paths[i].classList.toggle('on', h.length > 0); for (const k of h) on.add(k.from).add(k.to); });
  canvas.classList.add('focus'); marks.forEach((g, id) => g.classList.toggle('on', on.has(id)));
}
function card(id, limit, label) {  // the numbers and neighbours of a mark, in the tooltip and in the panel
  const n = nodes.get(id), [what, i] = id.split('.');
  const side = (title, pairs) => `<div><h2>${title}</h2><ul>${pairs.slice(0, limit).map(([a, b]) => `<li>${a}${b}</li>`).join('') ||
    '<li class="soft">nothing</li>'}${pairs.length > limit ? `<li class="soft">and ${pairs.length - limit} more</li>` : ''}</ul></div>`;
  const ends = (es, end) => [...es.map(e => [label(e[end]), num(e.w)]), ...stream.filter(s => s[end === 'to' ? 'from' : 'to'] === id)
    .map(s => [nodes.has(s[end]) ? label(s[end]) : s[end].startsWith('token') ? 'token embedding' : tok(C.answers[s[end].slice(6)]),
      s.w === undefined ? '<span class="soft">stream</span>' : num(s.w)])];
  const looks = n && 'qk'.includes(n.kind) ? [[`where head ${n.head} looks`, '']] : [];
  if (n) return `<b>${id}</b><p>${n.what} · mean ${fmt(n.mean)}</p><div class="io">${side('reads from', ends(n.in, 'from'))}${
    side('acts on', [...ends(n.out, 'to'), ...looks])}</div>`;
  return what === 'token' ? `<b>channel ${i}</b>` + side('token embedding, strongest first', stacks.get(+i).map(e => [tok(e[1]), num(e[3])]))
    : `<b>${show(C.answers[i])}</b>` + side('unembedding', byWeight(answerRows(i), e => e[3]).map(e => [`channel ${e[2]}`, num(e[3])]));
}
function showTip(inner, x, y) {
  tip.innerHTML = inner; tip.hidden = false; const beside = (v, size, all) => Math.max(8, Math.min(v + 15, all - size - 8)) + 'px';
  Object.assign(tip.style, {left: beside(x, tip.offsetWidth, innerWidth), top: beside(y, tip.offsetHeight, innerHeight)});
}
function hoverMark(id, x, y) {     // q and k of a head act on its v, so they stay lit together
  const n = nodes.get(id), mate = m => m.id === id || (n && n.head !== null && m.layer === n.layer && m.head === n.head);
  light(k => k.from === id || k.to === id, [id, ...list.filter(mate).map(m => m.id)]);
  showTip(card(id, 7, k => `<code>${k}</code>`), x, y);
}
const clear = () => { tip.hidden = true; canvas.classList.remove('focus'); };
document.addEventListener('pointermove', ev => {
  const g = ev.target.closest('.node, .end'), t = ev.target.closest('[data-tip]'), l = lines[ev.target.dataset.line];
  if (g) return hoverMark(g.dataset.id, ev.clientX, ev.clientY);
  if (!l) clear(); else light(k => l.links.includes(k), []);
  if (t) showTip(`<code>${esc(t.dataset.tip)}</code>`, ev.clientX, ev.clientY);
  if (l) showTip(`<b>${l.cls.startsWith('edge') ? `${l.from} → ${l.to}` : `residual channel ${l.c}`}</b>${
    l.w === undefined ? '' : `<div>weight ${num(l.w)}</div>`}`, ev.clientX, ev.clientY);
});
canvas.addEventListener('focusin', ev => { const g = ev.target.closest('[data-id]'), r = g?.getBoundingClientRect();
  if (g?.matches(':focus-visible')) hoverMark(g.dataset.id, r.right, r.top); });
canvas.addEventListener('focusout', clear);
// ---- header, prompts, tables
const pct = p => p == null ? '–' : (100 * p).toFixed(p > .9995 || p < .0005 ? 2 : 1) + '%', V = C.validation;
$('task').textContent = C.task; $('what').innerHTML = `${esc(C.task_description)} &nbsp; ${C.answers.map(tok).join(' or ')}`;
$('tiles').innerHTML = [['nodes', C.n_nodes], ['edges', C.n_edges], ['loss on held-out pairs, nats', C.loss_heldout],
  ['target loss', C.target_loss], ['loss of the unpruned model', C.unpruned_loss], ['loss without the circuit (necessity)', V.necessity]]
  .map(([k, v]) => `<div><dt>${k}</dt><dd>${fmt(v)}</dd></div>`).join('');
$('prompts').innerHTML = '<h2>Held-out prompts</h2><div class="scale" id="scale"></div><div class="pairs">' + C.examples.map((ex, e) => {
  const other = (C.examples[e ^ 1] || ex).tokens, same = other.length === ex.tokens.length;
  return `<div><pre>${ex.tokens.map((t, i) => `<span${same && t !== other[i] ? ' class="differs"' : ''}>${
    esc(t).replace(/\n/g, '<em>⏎</em>\n')}</span>`).join('')}</pre><div class="verdict"><span>${tok(ex.answer)} <strong>${
    pct(ex.p_answer)}</strong></span><span class="soft">unpruned ${pct(ex.p_answer_unpruned)}</span><span class="soft">instead of ${
    tok(ex.wrong)}</span></div></div>`;
}).join('') + '</div>';
const flat = (x, name) => x !== null && typeof x === 'object' ?
  Object.entries(x).flatMap(([k, v]) => flat(v, name ? `${name}.${k}` : k)) : [[esc(name), fmt(x)]];
const table = (title, head, body, open = '') => `<details${open}><summary>${title}</summary><div class="scroll"><table><tr>${
  head.map(h => `<th scope="col">${h}</th>`).join('')}</tr>${body.map(r => `<tr><td>${r.join('</td><td>')}</td></tr>`).join('')}</table></div></details>`;
$('tables').innerHTML = table('Validation', ['measure', 'value'], flat({loss_training: C.loss, loss_heldout: C.loss_heldout,
    unpruned_loss: C.unpruned_loss, ...V}, '').map(([k, v]) => [`<code>${k}</code>`, `<span class="num">${v}</span>`]), ' open') +
  table(`All nodes (${C.n_nodes})`, ['node', 'what', 'mean', 'edges in', 'edges out'],
    list.map(n => [go(n.id), n.what, fmt(n.mean), n.in.length, n.out.length])) +
  table(`All edges (${C.n_edges})`, ['from', 'to', 'weight'], edges.map(e => [go(e.from), go(e.to), num(e.w)]));
$('foot').innerHTML = [flat({model: C.model}, ''), flat({ablation: C.ablation, seed: C.seed, logit_scale: C.logit_scale,
  logit_shift: C.logit_shift, ...C.settings}, '')].map(rows => `<p>${rows.map(([k, v]) => `${k} <code>${v}</code>`).join(' · ')}</p>`)
  .join('') + `<p><code>${esc(C.command)}</code></p>`;
// ---- selection: the tokens take the colour of the selected node's activation
const cells = [...$('prompts').querySelectorAll('pre')].map(p => [...p.children]);
const actsOf = n => C.examples.map(ex => ex.activations[n.site]?.[n.i] || []), topOf = acts => Math.max(0, ...acts.flat().map(Math.abs));
function select(id) {
  const n = nodes.get(id), acts = actsOf(n), top = topOf(acts) || 1;
  for (const m of list) { const g = marks.get(m.id); g.classList.toggle('picked', m === n); g.setAttribute('aria-pressed', m === n); }
  $('node').innerHTML = card(id, Infinity, k => nodes.has(k) ? go(k) : k);
  $('scale').innerHTML = `<span>activation of <code>${id}</code></span><span class="num">${fmt(-top)}</span><i></i><span class="num">+${fmt(top)}</span>`;
  cells.forEach((spans, e) => spans.forEach((span, t) => { const a = acts[e][t]; span.dataset.tip = `${id} = ${fmt(a)}`;
    span.style.background = a ? `color-mix(in srgb, var(--${sign(a)}) ${(5 + 65 * Math.abs(a) / top).toFixed(1)}%, transparent)` : ''; }));
}
document.addEventListener('click', ev => { const g = ev.target.closest('.node, [data-go]'); if (g) select(g.dataset.id || g.dataset.go); });
canvas.addEventListener('keydown', ev => { const g = ev.target.closest('.node');
  if (g && [' ', 'Enter'].includes(ev.key)) { ev.preventDefault(); select(g.dataset.id); } });
const contrast = n => {            // how much the two prompts of a pair differ, relative to the node's range
  const acts = actsOf(n), spans = acts.flatMap((a, e) => e % 2 ? [Math.max, Math.min].map(f => f(0, ...a) - f(0, ...acts[e - 1])) : []);
  return spans.reduce((s, x) => s + Math.abs(x), 0) / (topOf(acts) || 1);
};
const scores = new Map(list.map(n => [n, contrast(n)])), first = byWeight(list, n => scores.get(n))[0];
if (first) select(first.id);
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
