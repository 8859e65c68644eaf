"""The page in a browser: two circuits over each other, the program, finding nodes, saving the graph, sizes."""
import copy
import html
import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from test_view import make_circuit, make_program, needs_browser, open_page, pair, save, view

pytestmark = needs_browser

ACT = """<script>
{
const seen = {};
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const point = el => el.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: 5, clientY: 5}));
const press = (el, key, more) =>
  el.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true, ...more}));
const markOf = id => document.querySelector(`[data-id="${id}"]`);
const ids = selector => all(selector).map(el => el.dataset.id || el.dataset.of);
const text = id => document.getElementById(id).textContent;
%s
document.body.dataset.seen = JSON.stringify(seen);
}
</script></body>"""


def seen_on(page: Path, script: str, *flags: str) -> dict:
    """What the script left in `seen` after it acted on the page, which wrote nothing to the console."""
    acted = page.with_name("acted.html")
    acted.write_text(page.read_text("utf-8").replace("</body>", ACT % script), "utf-8")
    dom, console = open_page(acted, page.parent, *flags)
    assert console == []
    return json.loads(html.unescape(re.search(r'data-seen="([^"]+)"', dom)[1]))


def ids_of(circuit: dict) -> set[str]:
    return {f"{site}.{c}" for site, channels in circuit["nodes"].items() for c in channels}


def sibling(circuit: dict) -> dict:
    """As another model may have it: a neuron less, a value more, half of the weights changed."""
    other = copy.deepcopy(circuit)
    other["model"] |= {"sha256": "cd" * 32, "dir": "out/demo1"}
    gone = ["1.mlp.post_act", other["nodes"]["1.mlp.post_act"].pop()]
    other["edges"] = [e for e in other["edges"] if gone not in (e[:2], e[2:4])]
    values = other["nodes"]["0.attn.v"]
    new = next(c for c in range(32, 48) if c not in values)
    values.append(new)
    other["edges"].append(["0.attn.v", new, "0.attn.resid_delta", other["nodes"]["0.attn.resid_delta"][0], 0.75])
    for edge in other["edges"][::2]:
        edge[4] = -edge[4]
    for example in other["examples"]:
        example["activations"]["1.mlp.post_act"].pop()
        example["activations"]["0.attn.v"].append([0.5] * len(example["tokens"]))
        example["tokens"][0] = "of B"
    other["n_edges"] = len(other["edges"])
    return other


SHOWN = """
const drawn = cls => [all(`.node${cls}`).length, all(`#canvas path.edge${cls}`).length];
const places = () => Object.fromEntries(all('.node rect').map(
  r => [r.parentNode.dataset.id, r.getAttribute('x') + ' ' + r.getAttribute('y')]));
const state = () => ({all: drawn(''), shared: drawn('.shared'), a: drawn('.only-A'), b: drawn('.only-B'),
  letters: all('.node .letter').map(t => t.textContent + t.parentNode.dataset.id), places: places(),
  label: all('#canvas svg')[0].getAttribute('aria-label'), pressed: all('#choice [aria-pressed=true]').map(b => b.textContent),
  prompts: text('prompts'), program: text('code'), look: text('look'), picked: ids('.node.picked')});
const buttons = all('#choice button');
seen.states = buttons.map(b => { b.click(); return state(); });
buttons[0].click();
seen.key = text('key');
seen.compared = text('compared');
"""


def test_an_overlay_tells_apart_what_both_have_and_what_one_has(tmp_path):
    a = make_circuit()
    b = sibling(a)
    paths = pair(tmp_path, a, b)
    for path, circuit in zip(paths, (a, b), strict=True):
        path.with_name("program.py").write_text(make_program(circuit) + f"# of {circuit['model']['dir']}\n")
    assert view(*paths).returncode == 0
    seen = seen_on(paths[0].with_name("circuit.over.demo1.html"), SHOWN)
    both, of_a, of_b = seen["states"]

    nodes = [ids_of(a), ids_of(b)]
    edges = [{tuple(e[:4]) for e in c["edges"]} for c in (a, b)]
    only_a = [len(nodes[0] - nodes[1]), len(edges[0] - edges[1])]
    only_b = [len(nodes[1] - nodes[0]), len(edges[1] - edges[0])]
    shared = [len(nodes[0] & nodes[1]), len(edges[0] & edges[1])]
    assert min(only_a + only_b) > 0
    assert (both["shared"], both["a"], both["b"]) == (shared, only_a, only_b)
    assert (of_a["shared"], of_a["a"], of_a["b"]) == (shared, only_a, [0, 0])
    assert (of_b["shared"], of_b["a"], of_b["b"]) == (shared, [0, 0], only_b)
    assert of_b["all"] == [b["n_nodes"], b["n_edges"]]
    assert sorted(both["letters"]) == sorted(
        [f"A{n}" for n in nodes[0] - nodes[1]] + [f"B{n}" for n in nodes[1] - nodes[0]])
    for cls, (n, e) in (("in both", shared), ("only in A", only_a), ("only in B", only_b)):
        assert f"{cls}: {n} nodes, {e} edges" in seen["key"]
    for size in (0, 1):
        assert f"{'nodes' if not size else 'edges'}{shared[size]}{only_a[size]}{only_b[size]}" in seen["compared"]

    # the layout does not jump, and the panels are those of the circuit that is shown
    for one, circuit, letter in ((of_a, a, "A"), (of_b, b, "B")):
        assert set(one["places"]) == ids_of(circuit) and one["places"].items() <= both["places"].items()
        assert one["pressed"] == [letter] and one["label"].startswith(f"Circuit {letter}: {circuit['n_nodes']} nodes")
        assert f"Held-out prompts of {letter}" in one["prompts"] and one["look"].endswith(f"in {letter}")
        assert f"# of {circuit['model']['dir']}" in one["program"]
        assert ("of B" in one["prompts"]) == (letter == "B") and len(one["picked"]) == 1
    assert both["pressed"] == ["A and B"] and "Held-out prompts of A" in both["prompts"]


EACH = """
seen.edges = Object.fromEntries(all('.hit').map(hit => {
  point(hit);
  return [document.querySelector('#tip b').textContent, text('tip')];
}));
seen.panels = Object.fromEntries(all('.node').map(g => {
  press(g, 'Enter');
  point(document.querySelector('#prompts pre span'));
  return [g.dataset.id, [all('#prompts h2')[0].textContent, all('#node b')[0].textContent, text('tip')]];
}));
"""


def test_an_overlay_gives_both_weights_where_they_differ_and_the_panels_of_the_circuit_of_a_node(tmp_path):
    a = make_circuit()
    b = sibling(a)
    paths = pair(tmp_path, a, b)
    assert view(*paths).returncode == 0
    seen = seen_on(paths[0].with_name("circuit.over.demo1.html"), EACH)
    weights = [{f"{e[0]}.{e[1]} → {e[2]}.{e[3]}": e[4] for e in c["edges"]} for c in (a, b)]

    def shown(w: float) -> str:
        return ("+" if w > 0 else "") + f"{w:.4g}".replace("-", "−")

    for edge in weights[0].keys() | weights[1].keys():
        said = re.sub(r"\s", "", seen["edges"][edge].split("weight")[1])
        w = [c.get(edge) for c in weights]
        one = [letter for letter, x in zip("AB", w, strict=True) if x is not None]
        if len(one) == 2:
            assert said == (shown(w[0]) if w[0] == w[1] else f"A{shown(w[0])}B{shown(w[1])}")
        else:
            assert said == shown(w["AB".index(*one)]) and f"{edge} {one[0]}weight" in seen["edges"][edge]
    assert len({w == weights[1].get(e) for e, w in weights[0].items() if e in weights[1]}) == 2
    for id, (heading, name, tip) in seen["panels"].items():
        assert heading.endswith("A" if id in ids_of(a) else "B") and name == id and tip.startswith(f"{id} = ")


def test_an_overlay_says_when_channels_need_not_correspond_and_names_two_tasks(tmp_path):
    a = make_circuit()
    paths = pair(tmp_path, a, a | {"task": "other<b>task", "answers": ["(", "["]})
    assert view(*paths).returncode == 0
    page = paths[0].with_name("circuit.over.demo1.html")
    script = "seen.said = text('compared'); seen.task = text('task'); seen.answers = ids('.end[data-id^=logit]').length;"
    seen = seen_on(page, script)
    assert "need not correspond" not in seen["said"] and "The tasks differ: single_double_quote in A, other<b>task in B" in seen["said"]
    assert seen["task"] == "single_double_quote and other<b>task" and seen["answers"] == 4
    save(a | {"model": a["model"] | {"sha256": "0" * 64}}, paths[1].parent)
    assert view(*paths).returncode == 0
    seen = seen_on(page, script)
    assert "need not correspond" in seen["said"] and "tasks differ" not in seen["said"]


PROGRAM = """
const code = document.getElementById('code');
code.style.maxHeight = '60px';
code.parentNode.style.marginTop = '3000px';   // so far off that showing it would scroll the page
seen.numbers = all('#code div').map(line => line.dataset.n);
seen.stops = all('#code [tabindex]').map(line => line.dataset.of);
seen.lines = {};
seen.nodes = {};
const scrolled = [scrollX, scrollY, document.querySelector('aside').scrollTop];
const lit = () => [ids('.node.on'), all('path.on').length, ids('#code .on')];
const inside = line => line.offsetTop >= code.scrollTop && line.offsetTop < code.scrollTop + code.clientHeight;
for (const line of all('#code [tabindex]')) {
  point(document.body);
  point(line);
  seen.lines[line.dataset.of] = lit();
}
for (const g of all('.node')) {
  point(document.body);
  point(g);
  seen.nodes[g.dataset.id] = [...lit(), inside(document.querySelector('#code .on'))];
}
point(document.body);
seen.after = lit();
seen.clicked = all('#code [tabindex]').map(line => {
  line.click();
  return [line.dataset.of, ids('.node.picked'), all('#code [aria-pressed=true]').map(l => l.dataset.of)];
});
const current = () => [document.activeElement.dataset.of, all('#code [tabindex="0"]').map(l => l.dataset.of)];
seen.walk = ['Home', 'ArrowUp', 'ArrowDown', 'ArrowDown', 'ArrowUp', 'End', 'ArrowDown'].map(key => {
  const from = document.activeElement.closest('#code') ? document.activeElement : all('#code [tabindex]')[3];
  const went = !press(from, key);
  return [...current(), went && inside(document.activeElement), ids('.node.on')];
});
press(document.activeElement, 'Enter');
seen.chosen = ids('.node.picked');
seen.moved = JSON.stringify(scrolled) !== JSON.stringify([scrollX, scrollY, document.querySelector('aside').scrollTop]);
"""


def test_a_line_of_the_program_and_its_node_light_each_other(tmp_path):
    circuit = make_circuit(final=True)
    (tmp_path / "program.py").write_text(make_program(circuit), "utf-8")
    assert view(save(circuit, tmp_path)).returncode == 0
    seen = seen_on(tmp_path / "circuit.html", PROGRAM)
    ids = [f"{site}.{c}" for site, channels in circuit["nodes"].items() for c in channels]
    assert seen["numbers"] == [str(i + 1) for i in range(make_program(circuit).count("\n"))]
    assert seen["stops"] == ids
    for i in ids:
        nodes, paths, lines = seen["lines"][i]
        assert i in nodes and set(lines) == {i}
        assert paths > 0 or not any(i in (f"{e[0]}.{e[1]}", f"{e[2]}.{e[3]}") for e in circuit["edges"])
        assert seen["nodes"][i] == [nodes, paths, lines, True]  # and its line has been scrolled to
    assert {len(lines) for _, _, lines in seen["lines"].values()} == {1, 3}
    assert seen["after"] == [[], 0, []]
    assert seen["clicked"] == [[i, [i], [i]] for i in ids]
    walked = [ids[0], ids[0], ids[1], ids[2], ids[1], ids[-1], ids[-1]]
    for (focused, stop, went, lit), at in zip(seen["walk"], walked, strict=True):
        assert focused == at and stop == [at] and went and at in lit
    assert seen["chosen"] == [ids[-1]] and not seen["moved"]


FIND = """
const query = document.getElementById('query');
const ask = words => {
  query.value = words;
  query.dispatchEvent(new Event('input'));
  return ids('.node.match');
};
document.getElementById('style').textContent += '.graph * { transition: none !important; }';
seen.slash = press(document.body, '/') ? '' : document.activeElement.id;
seen.typed = press(query, '/');           // where one types it is a letter
seen.found = Object.fromEntries(QUERIES.map(words => [words, [ask(words), text('found')]]));
seen.order = ask('attn');
seen.steps = [];
for (const more of [{}, {}, {shiftKey: true}, {shiftKey: true}]) {
  press(query, 'Enter', more);
  seen.steps.push([ids('.node.picked')[0], text('found')]);
}
seen.dimmed = getComputedStyle(all('.node:not(.match, .picked)')[0]).opacity < 1;
press(query, 'Escape');
seen.cleared = [query.value, text('found'), ids('.match'), all('svg.found').length];
seen.label = all('label').filter(l => l.control === query).map(l => l.textContent.trim());
seen.live = document.getElementById('found').ariaLive;
"""


def test_nodes_are_found_by_id_place_kind_and_token(tmp_path):
    circuit = make_circuit(per_site=3, final=True)
    read = next(c for c in circuit["nodes"]["0.attn.act_in"])
    for row in circuit["embedding"]:  # a token of one channel alone
        if row[2] == read:
            row[1] = ' "unheard'
    head = circuit["nodes"]["0.attn.q"][0] // 16
    nodes = [(site, c) for site, channels in circuit["nodes"].items() for c in channels]

    def where(test) -> set[str]:
        return {f"{site}.{c}" for site, c in nodes if test(site, c)}

    def reads(site: str, c: int) -> bool:
        return c == read and site.endswith(("act_in", "final_resid"))

    def numbers(site: str, c: int) -> set[int]:
        layer = set() if site == "final_resid" else {int(site.split(".")[0])}
        return {c} | layer | ({c // 16} if site[-1] in "qkv" else set())

    some = nodes[0][1]
    tail = next(str(c)[1:] for _, c in nodes if re.match("[1-9][1-9]", str(c)))  # 7 of 17
    expected = {
        "0.attn.act_in": where(lambda s, c: s == "0.attn.act_in"),
        "1.MLP": where(lambda s, c: s.startswith("1.mlp")),
        "neuron": where(lambda s, c: s.endswith("post_act")),
        "key": where(lambda s, c: s.endswith("attn.k")),
        f"head {head}": where(lambda s, c: s[-1] in "qkv" and c // 16 == head),
        f"layer 1  head{head}": where(lambda s, c: s[0] == "1" and s[-1] in "qkv" and c // 16 == head),
        f"channel {some}": where(lambda s, c: c == some),
        f"0.attn.act_in.{some}": where(lambda s, c: (s, c) == ("0.attn.act_in", some)),
        tail: where(lambda s, c: int(tail) in numbers(s, c)),
        ' "UNHEARD': where(reads),
        '·"unh': where(reads),
        "[.*": set(),
    }
    assert view(save(circuit, tmp_path)).returncode == 0
    seen = seen_on(tmp_path / "circuit.html", FIND.replace("QUERIES", json.dumps([*expected])))
    for words, nodes_found in expected.items():
        found, said = seen["found"][words]
        assert set(found) == nodes_found, words
        assert said.startswith(f"{len(nodes_found)} of {circuit['n_nodes']} nodes")
    assert [words for words in expected if not expected[words] and words != tail] == ["[.*"]
    assert seen["slash"] == "query" and seen["typed"] and seen["dimmed"]
    order = seen["order"]
    for (picked, said), at in zip(seen["steps"], (0, 1, 0, -1), strict=True):
        assert picked == order[at] and said == f"{at % len(order) + 1} of {len(order)}: {picked}"
    assert seen["cleared"] == ["", "", [], 0] and seen["label"] == ["find a node"] and seen["live"] == "polite"


SAVE = """
seen.plain = standalone();
const blobs = [];
const made = URL.createObjectURL;
URL.createObjectURL = blob => { blobs.push(blob.type); return made(blob); };
const names = [];
HTMLAnchorElement.prototype.click = function () { names.push(this.download); };
document.getElementById('save').click();
seen.saved = [blobs, names];
if (two) {
  choose(1);
  seen.b = standalone();
  document.getElementById('save').click();
}
seen.dark = matchMedia('(prefers-color-scheme: dark)').matches;
document.body.replaceChildren();          // half a surrogate pair is more than --dump-dom can write
"""
SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> tuple[int, int, list[str]]:
    """Nodes, edges and texts of a file that an XML parser takes, after a look at its styles."""
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg" and float(root.get("width")) > 0 and float(root.get("height")) > 0
    assert "var(" not in svg and "<style" not in svg and "color-mix" not in svg and "currentcolor" not in svg.lower()
    assert root.find(f"{SVG}rect").get("fill") == "#fff"
    edges = [p for p in root.iter(f"{SVG}path") if "edge" in p.get("class").split()]
    nodes = [g for g in root.iter(f"{SVG}g") if "node" in g.get("class").split()]
    assert all(re.fullmatch(r"rgb\(\d+, \d+, \d+\)", e.get("stroke")) and e.get("fill") == "none" for e in edges)
    assert not [p for p in root.iter() if "hit" in p.get("class", "").split() or p.get("tabindex")]
    white = [n for n in nodes if n.find(f"{SVG}rect").get("fill") == "rgb(255, 255, 255)"]
    assert len(white) == len(nodes) - 1  # all but the selected one
    return len(nodes), len(edges), [t.text or "" for t in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_saved_graph_is_xml_of_its_own_with_every_node_and_edge(scheme, tmp_path):
    circuit = make_circuit(final=True)
    for row in circuit["embedding"][::2]:
        row[1] = "\x1b\x00\ud800<&"  # some of which no XML may hold
    circuit["task"] = "a/b <c>"
    assert view(save(circuit, tmp_path)).returncode == 0
    flag = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    seen = seen_on(tmp_path / "circuit.html", SAVE, flag)
    assert seen["dark"] == (scheme == "dark")
    nodes, edges, texts = drawn(seen["plain"])
    assert (nodes, edges) == (circuit["n_nodes"], circuit["n_edges"])
    assert {str(c) for channels in circuit["nodes"].values() for c in channels} <= set(texts)
    assert any("\ufffd" in text for text in texts)
    assert seen["saved"] == [["image/svg+xml"], ["a_b_c_.svg"]]


def test_of_two_circuits_the_one_that_is_shown_is_saved(tmp_path):
    a = make_circuit()
    b = sibling(a)
    paths = pair(tmp_path, a, b)
    assert view(*paths).returncode == 0
    seen = seen_on(paths[0].with_name("circuit.over.demo1.html"), SAVE)
    union = len(ids_of(a) | ids_of(b)), len({tuple(e[:4]) for c in (a, b) for e in c["edges"]})
    assert drawn(seen["plain"])[:2] == union
    nodes, edges, texts = drawn(seen["b"])
    assert (nodes, edges) == (b["n_nodes"], b["n_edges"]) and "B" in texts and "A" not in texts
    dashes = {p.get("stroke-dasharray") for p in ET.fromstring(seen["b"]).iter(f"{SVG}path") if "edge" in p.get("class")}
    assert len(dashes) == 2  # of those in both none
    assert seen["saved"][1] == ["single_double_quote.svg", "single_double_quote-B.svg"]


KEYBOARD = """
seen.unnamed = all('button, input, select, [tabindex]').filter(el =>
  !(el.ariaLabel || el.textContent.trim() || el.labels?.length)).map(el => el.outerHTML.slice(0, 80));
seen.pressable = all('[role=button]').filter(el => !el.hasAttribute('aria-pressed')).length;
seen.hidden = all('#choice, #compared, #program, #tiles').map(el => [el.id, getComputedStyle(el).display === 'none']);
const tops = all('.node, .end').map(g => g.getBoundingClientRect());
seen.upward = tops.every((box, i) => !i || box.bottom < tops[i - 1].bottom + 1);
"""


def test_all_that_can_be_pressed_has_a_name_and_focus_goes_up_from_the_tokens(tmp_path):
    circuit = make_circuit()
    paths = pair(tmp_path, circuit, sibling(circuit))
    assert view(paths[0]).returncode == 0
    seen = seen_on(paths[0].with_suffix(".html"), KEYBOARD)
    assert seen["unnamed"] == [] and seen["pressable"] == 0 and seen["upward"]
    assert dict(seen["hidden"]) == {"choice": True, "compared": True, "program": True, "tiles": False}
    paths[0].with_name("program.py").write_text(make_program(circuit))
    assert view(*paths).returncode == 0
    seen = seen_on(paths[0].with_name("circuit.over.demo1.html"), KEYBOARD)
    assert seen["unnamed"] == [] and seen["pressable"] == 0 and seen["upward"]
    assert dict(seen["hidden"]) == {"choice": False, "compared": False, "program": False, "tiles": True}


LARGE = """
const moves = all('.node, .hit').filter((_, i) => i % 20 === 0);
const start = performance.now();
for (const el of moves) {
  point(el);
  document.body.offsetWidth;             // styles and layout are settled, as before each frame
}
seen.hoverMs = (performance.now() - start) / moves.length;
seen.touched = [];
let touched = 0;
for (const name of ['add', 'remove', 'toggle']) {
  const plain = DOMTokenList.prototype[name];
  DOMTokenList.prototype[name] = function (...more) {
    touched += 1;
    return plain.apply(this, more);
  };
}
for (const g of all('.node').slice(0, 100)) {
  touched = 0;
  point(g);
  seen.touched.push([touched, all('.on').length]);
}
seen.layoutMs = +document.documentElement.dataset.layoutMs;
seen.drawn = [all('.node').length, all('#canvas path.edge').length];
"""


def test_a_circuit_of_500_nodes_and_2000_edges_stays_usable(tmp_path):
    circuit = make_circuit(per_site=16, n_layer=4, edge_share=0.3, final=True)
    assert circuit["n_nodes"] >= 500 and circuit["n_edges"] >= 2000
    assert view(save(circuit, tmp_path)).returncode == 0
    seen = seen_on(tmp_path / "circuit.html", LARGE)
    print(f"layout and drawing {seen['layoutMs']} ms, a hover {seen['hoverMs']:.2f} ms")
    assert seen["drawn"] == [circuit["n_nodes"], circuit["n_edges"]]
    assert seen["layoutMs"] > 0
    if os.environ.get("TIMINGS"):  # on a quiet machine: a busy one takes any time
        assert seen["layoutMs"] < 2000
    # a hover touches what it lights and what was lit before, not each of the thousands of lines
    lit = [on for _, on in seen["touched"]]
    for i, (touched, on) in enumerate(seen["touched"][1:], 1):
        assert touched <= lit[i] + lit[i - 1] + 1
