// The graph of a circuit, or of several over each other: where everything stands, and its markup.
//
// Pure functions: they read no document and keep no state. view.py puts this file into view.html;
// another page has it by a mark @@GRAPH@@ in a script of its template (`page` in view.py).
//
//   const layout = Graph.layout([circuit]);
//   place.innerHTML = Graph.svg(layout, {label: 'Circuit: 20 nodes, 17 edges'});
//   style.textContent = Graph.style;      // in terms of the page's colours, listed above it
//
// Graph.layout(circuits): one or several, as circuit.json has them. Read of each:
//   nodes {site: [channel]}, edges [[site, channel, site, channel, weight]], answers [text],
//   embedding and unembedding [[token id, token, channel, weight]], model {n_layer, d_head}.
// Several need the same `model` sizes. They are laid out as one, so nothing moves when one of them
// is shown alone. The layout is
//   nodes    Map id -> {id, site, channel, layer, part, kind, head or null, what, in, out, of};
//            id is "0.attn.q.17", `in` and `out` are edges, and here as below `of` says in which
//            circuits it is, as places in the list, and `weights` has its weight in each of those
//   edges    [{from, to, weights, of}], the strongest first
//   links    [{from, to, channel, weights, of}]: the residual stream from a write or the tokens to
//            a read or a logit. `weights`: of the unembedding, empty elsewhere
//   stacks   Map channel -> {id: "token.17", of, tokens}: the strongest first of each circuit
//   answers  [{id: "logit.0", text, of, rows}]; moreAnswers: how many had no room
//   marks    Map id -> {x, y, h} of nodes, tokens, logits; `way.` of lines: the middle, half height
//   lines    [{from, to, cls: 'edge' or 'rail', links, d, weights, of}] as drawn: links that run
//            together share a line. d is a path
//   linksAt  Map id of a mark -> the edges and links that end at it
//   linesOf  Map edge or link -> the places in `lines` of those that draw it
//   bands, boxes, width, height, and strongest: the largest |weight| of an edge
//
// Graph.svg(layout, {label, only, badge}) -> text. only: the place of the one circuit to show,
//   else all, with the weights of the first that has it. badge(of) -> a letter or '' for what is
//   in these circuits; it becomes a letter on nodes and a class `only-LETTER` (or `shared`), and
//   without it edges have the colour of their sign. Marks have data-id; lines, each drawn twice
//   (the wide one, `.hit`, for the pointer), have data-line, the place in layout.lines.
//
// Also: Graph.weight(thing, only), and what pages need beside: esc, visible, clip, sign, groupBy,
// strongestFirst.

const Graph = (() => {
'use strict';

// ---- text: whatever a token or a name holds is shown, never run

const esc = s => String(s).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const marked = s => s.replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/ /g, '·');
const visible = s => esc(marked(s));
const clip = (s, n) => visible(s.length > n ? s.slice(0, n - 1) + '…' : s);
const sign = w => w < 0 ? 'neg' : 'pos';

function groupBy(list, key) {      // Map: key -> members, both in the order of the list
  const groups = new Map();
  for (const x of list) {
    const k = key(x);
    if (groups.has(k)) groups.get(k).push(x);
    else groups.set(k, [x]);
  }
  return groups;
}
const strongestFirst = (list, weight) =>
  [...list].sort((a, b) => Math.abs(weight(b)) - Math.abs(weight(a)));

// ---- what there is, in any of the circuits

const KIND = {act_in: 'residual read', resid_delta: 'residual write', q: 'query', k: 'key',
  v: 'value', post_act: 'neuron', final_resid: 'residual stream'};
const FINAL = 'final_resid';       // published circuits name channels of the stream at its end, too

function makeNode(site, channel, model) {
  const [layer, part, kind] = site === FINAL ? [model.n_layer, '', FINAL] : site.split('.');
  const head = 'qkv'.includes(kind) ? Math.floor(channel / model.d_head) : null;
  const place = `layer ${layer} ${part === 'attn' ? 'attention' : 'MLP'}`;
  const what = `${KIND[kind]}${head === null ? '' : ` of head ${head}`}, ` +
    (part ? place : 'after the last layer');
  return {id: `${site}.${channel}`, site, channel, layer: +layer, part, kind, head, what,
    in: [], out: [], of: []};
}
// What `map` has under the key, made by `make` where it has nothing yet.
function known(map, key, make) {
  if (!map.has(key)) map.set(key, make());
  return map.get(key);
}
function allNodes(circuits) {
  const nodes = new Map();
  circuits.forEach(({nodes: sites, model}, k) => {
    for (const [site, channels] of Object.entries(sites))
      for (const channel of channels)
        known(nodes, `${site}.${channel}`, () => makeNode(site, channel, model)).of.push(k);
  });
  return nodes;
}

const weight = (thing, only) => only === undefined ? thing.weights[thing.of[0]]
  : thing.weights[only];
const most = thing => Math.max(...thing.of.map(k => Math.abs(thing.weights[k])));

function allEdges(circuits, nodes) {
  const edges = new Map();
  circuits.forEach((circuit, k) => {
    for (const [site, channel, toSite, toChannel, w] of circuit.edges) {
      const from = `${site}.${channel}`;
      const to = `${toSite}.${toChannel}`;
      const edge = known(edges, `${from}|${to}`, () => ({from, to, weights: [], of: []}));
      edge.weights[k] = w;
      edge.of.push(k);
    }
  });
  const list = strongestFirst(edges.values(), most);
  for (const e of list) {
    nodes.get(e.from).out.push(e);
    nodes.get(e.to).in.push(e);
  }
  return list;
}

const isRead = n => n.kind === 'act_in' || n.kind === FINAL;

// The tokens that fill each channel that is read.
function allStacks(circuits, nodes) {
  const stacks = new Map();
  circuits.forEach((circuit, k) => {
    const reads = [...nodes.values()].filter(n => isRead(n) && n.of.includes(k));
    const channels = new Set(reads.map(n => n.channel));
    const tokens = circuit.embedding.filter(e => channels.has(e[2]));
    for (const [channel, entries] of groupBy(strongestFirst(tokens, e => e[3]), e => e[2])) {
      const id = `token.${channel}`;
      const stack = known(stacks, channel, () => ({id, of: [], tokens: []}));
      stack.tokens[k] = entries;
      stack.of.push(k);
    }
  });
  return stacks;
}

// A row has room for a dozen answers: of more, those on which the circuits' channels weigh most.
function allAnswers(circuits) {
  const found = new Map();
  circuits.forEach((circuit, k) => {
    const rows = groupBy(circuit.unembedding, e => e[1]);
    for (const text of new Set(circuit.answers)) {
      const answer = known(found, text, () => ({text, of: [], rows: []}));
      answer.rows[k] = rows.get(text) || [];
      answer.of.push(k);
    }
  });
  const all = [...found.values()];
  const largest = a => Math.max(0, ...a.rows.flat().map(e => Math.abs(e[3])));
  const answers = all.length <= 12 ? all : strongestFirst(all, largest).slice(0, 12);
  answers.forEach((answer, i) => answer.id = `logit.${i}`);
  return {answers, moreAnswers: all.length - answers.length};
}

// The residual stream: drawn, not counted. Each circuit has its own: what one of them writes, the
// other does not read.
function allLinks(circuits, nodes, stacks, answers) {
  const links = new Map();
  function add(k, from, to, channel, w) {
    const link = known(links, `${from}|${to}`, () => ({from, to, channel, weights: [], of: []}));
    if (w !== undefined) link.weights[k] = w;
    if (!link.of.includes(k)) link.of.push(k);
  }
  const depth = n => 2 * n.layer + (n.part === 'mlp');
  circuits.forEach((circuit, k) => {
    const own = [...nodes.values()].filter(n => n.of.includes(k));
    const finals = own.filter(n => n.kind === FINAL);
    const writes = own.filter(n => n.kind === 'resid_delta');
    const written = groupBy(writes, n => n.channel);
    for (const read of [...own.filter(n => n.kind === 'act_in'), ...finals]) {
      const stack = stacks.get(read.channel);
      if (stack?.of.includes(k)) add(k, stack.id, read.id, read.channel);
      for (const w of written.get(read.channel) || [])
        if (depth(w) < depth(read)) add(k, w.id, read.id, read.channel);
    }
    const last = groupBy(finals.length ? finals : writes, n => n.channel);
    for (const answer of answers)
      for (const [, , channel, w] of answer.rows[k] || [])
        for (const n of last.get(channel) || []) add(k, n.id, answer.id, channel, w);
  });
  return [...links.values()];
}

// ---- rows from the bottom up
// A unit is what is placed as one: a node, a head, the tokens of a channel, a waypoint of a link.

const single = (id, w) => ({w, items: [id]});

function headUnit(head, members) { // its channels in groups of queries, keys and values
  const groups = ['q', 'k', 'v'].map(k => members.filter(n => n.kind === k)).filter(g => g.length);
  const w = members.length * 40 + groups.length * 20 + 8;
  return {head, groups, w, items: members.map(n => n.id)};
}

// rows, and of each mark {row, unit, dx}: dx is its place within the unit.
function makeRows(nodes, stacks, answers, nLayer, stackW) {
  const rows = [];
  const at = new Map();
  function addRow(band, label, units) {
    if (!units.length) return;
    rows.push({band, label, units: []});
    for (const unit of units) addUnit(rows, at, rows.length - 1, unit);
  }
  const places = groupBy(nodes.values(), n => `${n.layer}.${n.part}`);

  addRow('tokens', '', [...stacks.values()].map(stack => single(stack.id, stackW)));
  for (let layer = 0; layer < nLayer; layer++) {
    for (const [part, name] of [['attn', 'attention'], ['mlp', 'MLP']]) {
      const own = places.get(`${layer}.${part}`) || [];
      const singles = kind => own.filter(n => n.kind === kind).map(n => single(n.id, 36));
      const heads = groupBy(own.filter(n => n.head !== null), n => n.head);
      const band = `layer ${layer} · ${name}`;
      addRow(band, 'read', singles('act_in'));
      addRow(band, 'heads', [...heads].map(([head, members]) => headUnit(head, members)));
      addRow(band, 'neurons', singles('post_act'));
      addRow(band, 'write', singles('resid_delta'));
    }
  }
  addRow('last stream', 'final', (places.get(`${nLayer}.`) || []).map(n => single(n.id, 36)));
  addRow('logits', '', answers.map(a => single(a.id, 96)));
  return {rows, at};
}
function addUnit(rows, at, row, unit) {
  rows[row].units.push(unit);
  for (const id of unit.items) at.set(id, {row, unit, dx: 0});
}

// Links of one channel share a waypoint in each row that they pass, so they are drawn as one line.
function makeSegments(links, rows, at) {
  const segments = new Map();
  for (const link of links) {
    const last = at.get(link.to).row;
    let from = link.from;
    for (let row = at.get(from).row + 1; row <= last; row++) {
      const to = row === last ? link.to : `way.${row}.${link.channel}`;
      if (!at.has(to)) addUnit(rows, at, row, single(to, 8));
      const segment = known(segments, `${from}|${to}`, () => ({from, to, weights: [], links: []}));
      segment.links.push(link);
      if (row === last) Object.assign(segment.weights, link.weights);
      from = to;
    }
  }
  for (const segment of segments.values())
    segment.of = [...new Set(segment.links.flatMap(link => link.of))].sort((a, b) => a - b);
  return [...segments.values()];
}

// ---- layout: sort each row by the mean of its neighbours, place it by least squares, and again

function neighboursOf(at, edges, segments) {
  const near = new Map([...at.keys()].map(id => [id, []]));
  function pull(from, to, weight) {
    near.get(from).push([at.get(to), weight]);
    near.get(to).push([at.get(from), weight]);
  }
  for (const e of edges) pull(e.from, e.to, 1);
  for (const s of segments)        // a long link should rather be straight than its ends near
    pull(s.from, s.to, /way/.test(s.from + s.to) ? 3 : 1.5);
  return near;
}

const gap = u => u.head === undefined ? 8 : 18;
const total = units => units.reduce((sum, u) => sum + u.w + gap(u), 0);

// The nearest positions to what the units want that keep order, gaps and reach. Units that want to
// overlap are pooled and moved as one to the mean of what they want (pool adjacent violators).
function place(units, reach) {
  const pools = [];
  let start = 0;
  for (const u of units) {
    const middle = start + u.w / 2;
    pools.push({sum: u.want - start - u.w / 2, n: 1, members: [[u, middle]]});
    start += u.w + gap(u);
    while (pools.length > 1) {
      const right = pools.at(-1);
      const left = pools.at(-2);
      if (left.sum / left.n <= right.sum / right.n) break;
      pools.pop();
      left.sum += right.sum;
      left.n += right.n;
      left.members.push(...right.members);
    }
  }
  for (const p of pools)
    for (const [u, offset] of p.members)
      u.x = Math.min(Math.max(p.sum / p.n, -reach), reach - start) + offset;
}

function settle(rows, at, near) {
  const reach = Math.max(300, ...rows.map(r => total(r.units))) / 2;

  // Where the neighbours of `ids` below (dir -1), above (1) or both (0) want the unit u.
  function wanted(u, ids, dir) {
    let sum = 0;
    let weight = 0;
    for (const id of ids) {
      const own = at.get(id);
      for (const [other, w] of near.get(id)) {
        if (dir * (other.row - own.row) < 0) continue;
        sum += w * (other.unit.x + other.dx - own.dx);
        weight += w;
      }
    }
    return weight ? sum / weight : u.x;
  }
  function arrange(u) {            // the channels of a head, each group in the order of the pull
    const target = new Map();
    for (const id of u.items) target.set(id, wanted(u, [id], 0) + at.get(id).dx);
    let x = 6 - u.w / 2;
    for (const group of u.groups) {
      group.sort((a, b) => target.get(a.id) - target.get(b.id));
      x += 20;
      for (const n of group) {
        at.get(n.id).dx = x + 18;
        x += 40;
      }
    }
  }

  for (const {units} of rows) {
    for (const u of units) u.want = -total(units) / 2;
    place(units, reach);
  }
  for (let sweep = 0; sweep < 30; sweep++) {
    const last = sweep > 21;       // the last sweeps keep the order and only straighten
    const upward = sweep % 2 === 0;
    const dir = last ? 0 : upward ? -1 : 1;
    for (const {units} of upward ? rows : [...rows].reverse()) {
      for (const u of units) {
        if (u.groups && !last) arrange(u);
        u.want = wanted(u, u.items, dir);
      }
      if (!last) units.sort((a, b) => a.want - b.want);
      place(units, reach);
    }
  }
}

// ---- from the order and the places in it to points

const GUTTER = 132;                // the names of bands and rows stand left of the graph

function stackBands(rows, stackH) { // y grows downwards, so start from the logits
  const bands = [];
  let height = 0;
  for (const row of [...rows].reverse()) {
    const tokens = row.band === 'tokens';
    if (bands.at(-1)?.name !== row.band) {
      height += bands.length ? 22 : 0;
      bands.push({name: row.band, top: height, rows: []});
    }
    bands.at(-1).rows.push(row);
    row.y = height + (tokens ? 14 : 26);
    height += tokens ? (stackH + 1) * 17 + 8 : row.label === 'heads' ? 62 : 56;
    bands.at(-1).bottom = height - 4;
  }
  return {bands, height};
}

function makeLine(thing, cls, links, marks) {
  const a = marks.get(thing.from);
  const b = marks.get(thing.to);
  const middle = (a.y - a.h + b.y + b.h) / 2;
  const start = `${a.x.toFixed(1)} ${a.y - a.h}`;
  const end = `${b.x.toFixed(1)} ${b.y + b.h}`;
  const d = `M${start}C${a.x.toFixed(1)} ${middle} ${b.x.toFixed(1)} ${middle} ${end}`;
  return {...thing, cls, d, links};
}

function layout(circuits) {
  const nodes = allNodes(circuits);
  const edges = allEdges(circuits, nodes);
  const stacks = allStacks(circuits, nodes);
  const {answers, moreAnswers} = allAnswers(circuits);
  const links = allLinks(circuits, nodes, stacks, answers);

  const small = stacks.size > 12;  // more stacks than that need narrow ones
  const stackW = small ? 46 : 74;
  const lengths = [...stacks.values()].flatMap(s => s.tokens.map(entries => entries.length));
  const stackH = Math.min(small ? 3 : 5, Math.max(0, ...lengths));

  const {rows, at} = makeRows(nodes, stacks, answers, circuits[0].model.n_layer, stackW);
  const segments = makeSegments(links, rows, at);
  settle(rows, at, neighboursOf(at, edges, segments));

  const units = rows.flatMap(r => r.units);
  const shift = GUTTER + 14 - Math.min(...units.map(u => u.x - u.w / 2));
  const width = Math.max(440, Math.max(...units.map(u => u.x + u.w / 2)) + shift + 18);
  const {bands, height} = stackBands(rows, stackH);
  const marks = new Map();
  for (const [id, {row, unit, dx}] of at)
    marks.set(id, {x: unit.x + dx + shift, y: rows[row].y, h: id.startsWith('way') ? 0 : 11});
  const boxes = rows.flatMap(row => row.units.filter(u => u.groups).map(
    u => ({...u, left: u.x + shift - u.w / 2, y: row.y})));

  const strongest = Math.max(1e-9, ...edges.map(most));
  const many = edges.length > 300;
  const lines = [
    ...segments.map(s => makeLine(s, 'rail', s.links, marks)),
    ...edges.map(e => makeLine(e, 'edge', [e], marks)).reverse(),
  ];                               // the strongest edges come last, on top

  const linksAt = new Map([...marks.keys()].map(id => [id, []]));
  for (const link of [...edges, ...links]) {
    linksAt.get(link.from).push(link);
    linksAt.get(link.to).push(link);
  }
  const linesOf = new Map();
  lines.forEach((line, i) => {
    for (const link of line.links) known(linesOf, link, () => []).push(i);
  });
  return {nodes, edges, links, stacks, answers, moreAnswers, marks, lines, linksAt, linesOf,
    bands, boxes, width, height, strongest, many, small, stackW, stackH};
}

// ---- drawing

const text = (x, y, s, cls = '') => `<text x="${x}" y="${y}" class="${cls}">${s}</text>`;
const rect = (x, y, w, h, r, cls = '') =>
  `<rect x="${x}" y="${y}" width="${w}" height="${h}" rx="${r}" class="${cls}"/>`;
function drawMark(id, cls, label, inner) {
  const role = cls.startsWith('node') ? 'role="button" aria-pressed="false"' : 'role="img"';
  return `<g class="${cls}" data-id="${id}" tabindex="0" ${role} aria-label="${esc(label)}">` +
    `${inner}</g>`;
}

function drawBand(band, width) {
  const [name, part] = band.name.split(' · ');
  const labels = band.rows.map(r => text(GUTTER - 14, r.y + 4, r.label, 'row')).join('');
  if (!part) return text(12, band.top + 30, name, 'title') + labels;
  return rect(0, band.top, width, band.bottom - band.top, 9, 'band') +
    text(12, band.top + 37, part) + text(12, band.top + 21, name, 'title') + labels;
}
function drawNode(n, {x, y}, shown, letter) {
  const round = n.head !== null || n.kind === 'post_act' ? 11 : 4;
  const edges = [n.in, n.out].map(list => list.filter(shown).length);
  const label = `${n.id}, ${n.what}, ${edges[0]} edges in, ${edges[1]} out`;
  const badge = letter ? `<circle class="badge" cx="${x + 17}" cy="${y - 10}" r="6"/>` +
    text(x + 17, y - 7, letter, 'letter') : '';
  const cls = letter === undefined ? 'node' : `node ${letter ? `only-${letter}` : 'shared'}`;
  return drawMark(n.id, cls, letter ? `${label}, only in ${letter}` : label,
    rect(x - 18, y - 11, 36, 22, round) + text(x, y + 4, n.channel) + badge);
}
function drawStack(channel, stack, L, only) {
  const {x, y} = L.marks.get(stack.id);
  const name = text(x, y + 3, (L.small ? '' : 'channel ') + channel, 'soft');
  const entries = stack.tokens[only ?? stack.of[0]];
  const tokens = entries.slice(0, L.stackH).map((e, i) =>
    rect(x - L.stackW / 2, y + 11 + 17 * i, L.stackW, 15, 3, sign(e[3])) +
    text(x, y + 22.5 + 17 * i, clip(e[1], L.small ? 6 : 10)));
  return drawMark(stack.id, 'end', `token embedding of channel ${channel}`,
    name + tokens.join(''));
}
function drawAnswer(answer, {x, y}) {
  return drawMark(answer.id, 'end', `logit of ${answer.text}`,
    rect(x - 46, y - 15, 92, 26, 6) + text(x, y + 2.5, clip(answer.text, 11)));
}
function drawBox(box, marks, shown) {
  const ofEach = box.groups.map(group => group.filter(shown)).filter(group => group.length);
  if (!ofEach.length) return ['', ''];
  const letters = ofEach.map(([n]) =>   // of a group, left of its first channel
    text(marks.get(n.id).x - 32, box.y + 4, n.kind.toUpperCase(), 'title'));
  return [rect(box.left, box.y - 18, box.w, 36, 9, 'head'),
    text(box.left + 3, box.y - 22, `head ${box.head}`, 'name') + letters.join('')];
}
function lineClass(line, only, badge) {
  if (line.cls === 'edge' && badge) {
    const letter = badge(line.of);
    return `edge ${letter ? `only-${letter}` : 'shared'}`;
  }
  const w = weight(line, only);
  return w === undefined ? line.cls : `${line.cls} ${sign(w)}`;
}

function lineWidth(line, only, {strongest, many}) {
  if (line.cls === 'rail') return 1.1;
  return .8 + (many ? 2.4 : 4.2) * Math.abs(weight(line, only)) / strongest;
}

function svg(L, {label = 'Circuit', only, badge} = {}) {
  const shown = thing => only === undefined || thing.of.includes(only);
  const paths = [];
  const hits = [];
  L.lines.forEach((line, i) => {
    if (!shown(line)) return;
    const width = lineWidth(line, only, L).toFixed(2);
    paths.push(`<path class="${lineClass(line, only, badge)}" d="${line.d}" ` +
      `stroke-width="${width}" data-line="${i}"/>`);
    hits.push(`<path class="hit" d="${line.d}" data-line="${i}"/>`);
  });
  const boxes = L.boxes.map(box => drawBox(box, L.marks, shown));

  const ends = {};                 // id -> markup, of all that can be focused
  for (const n of [...L.nodes.values()].filter(shown))
    ends[n.id] = drawNode(n, L.marks.get(n.id), shown, badge?.(n.of));
  for (const [channel, stack] of [...L.stacks].filter(([, stack]) => shown(stack)))
    ends[stack.id] = drawStack(channel, stack, L, only);
  for (const answer of L.answers.filter(shown))
    ends[answer.id] = drawAnswer(answer, L.marks.get(answer.id));
  const spot = id => L.marks.get(id);   // focus goes from the tokens up, along each row
  const inOrder = Object.keys(ends).sort(
    (a, b) => spot(b).y - spot(a).y || spot(a).x - spot(b).x);

  const drawn = [
    ...L.bands.map(band => drawBand(band, L.width)),
    ...boxes.map(([box]) => box),
    ...paths,
    ...boxes.map(([, names]) => names),   // above the lines, which would hide them
    ...hits,
    ...inOrder.map(id => ends[id]),
  ];
  return `<svg viewBox="0 0 ${L.width} ${L.height}"
    class="graph${L.many ? ' many' : ''}" role="group" aria-label="${esc(label)}"
    style="width:min(100%, ${1.25 * L.width}px); min-width:${.55 * L.width}px"
    >${drawn.join('')}</svg>`;
}

// The page has to say what --card, --ink, --soft, --line, --band, --head, --rim, --rail, --pos,
// --neg (colours), --mono and --sans (families of type) are. `.focus` on the svg dims all that is
// not `.on`; `.picked` is the selected node.
const style = `
.graph { display: block; margin: 0 auto; }
.graph text { font: 11px var(--sans); fill: var(--soft); }
.graph .title { font-weight: 600; fill: var(--ink); }
.graph .row { text-anchor: end; }
.graph .name { paint-order: stroke; stroke: var(--band); stroke-width: 4px; }
.band { fill: var(--band); }
.head { fill: var(--head); }
.edge { fill: none; stroke-linecap: round; opacity: .85; }
.rail { fill: none; stroke: var(--rail); stroke-dasharray: 3 3.5; }
.many .edge { opacity: .4; }
.many .rail { opacity: .5; }
path.pos { stroke: var(--pos); }
path.neg { stroke: var(--neg); }
.hit { fill: none; stroke: transparent; stroke-width: 9; pointer-events: stroke; }
.node, .end { outline: none; }
.node { cursor: pointer; }
.node rect { fill: var(--card); stroke: var(--rim); }
.graph :is(.node, .end) text { text-anchor: middle; fill: var(--ink); font-family: var(--mono);
  pointer-events: none; }
:is(.node, .end):is(:hover, :focus-visible) rect { stroke: var(--ink); stroke-width: 1.6; }
.node.picked rect { fill: var(--ink); stroke: var(--ink); }
.graph .node.picked text { fill: var(--card); }
.end rect { fill: var(--card); stroke: var(--line); }
.end rect:is(.pos, .neg) { fill-opacity: .2; stroke: none; }
.end rect.pos { fill: var(--pos); }
.end rect.neg { fill: var(--neg); }
.graph .end text.soft { fill: var(--soft); font-family: var(--sans); }
.graph:not(.many) :is(g, path) { transition: opacity .12s; }
.focus :is(.edge, .rail).on { opacity: 1; }
.focus :is(.edge, .rail):not(.on) { opacity: .09; }
.focus :is(.node, .end):not(.on) { opacity: .25; }
`;

return {layout, svg, style, weight, esc, visible, clip, sign, groupBy, strongestFirst};
})();
