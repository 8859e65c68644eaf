"""From a circuit that meets a target loss to one from which no single node or edge can go.

- `minimise`: leaves out nodes and edges, the cheapest first; its last round tries every one of them
  in vain, and is the certificate. The authors removed leftovers by hand (paper A.5).
- `exchange_parts`: where leaving out gets stuck, one part comes back and others go in its place.
- `first_order`: what each part is worth, all at once, where there are too many to try each.
- The result carries a `Certificate`, which says in words what was tried.
"""
import math
import time
from collections.abc import Set
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from circuit import (MAPS, Certificate, Circuit, Edges, Nodes, ablate, between, count,
                     drop_unconnected, graph_of, run_to_last, without_edges)
from edge_masks import leave_out_by_masks
from search import Search, partner, parts_of
from tasks import batches_of, calibrated, margin_of

LEAST_EDGES = 0.5  # what goes without any edge is priced as if half an edge had gone with it
NOISE = 1e-4       # nats per edge: so small a rise is within what calibration leaves undone
# What goes may cost this many times what was promised: prices rise as the circuit gets smaller, and
# asking for all of them again after each step would take longer than a poorer order is worth.
PATIENCE = 1.5
# At most one in so many parts goes at once, so that the dear ones among the rest are asked again in
# a circuit that is not far from the one in which they were priced.
AT_ONCE = 8
# More edges than that are left by node masks in dense models alone, and where a model is to do what
# it never learnt. Prices to first order are wrong about too many of them at once.
MANY_EDGES = 1000
# So many parts are priced by trials within a minute.
MANY_PARTS = 300
WORTHWHILE = 0.9  # another round by gradient, as long as it leaves out a tenth
FINE = 64         # how near to the most that can go together a bisection comes, as a share
STUBBORN = 64     # so many in a row that cannot go: what stands behind them matters more still
AT_A_TIME = 32    # pairs in a pass with gradients
EXCHANGES = 16    # parts that are let back in for a time, those first that help the most
# What bounds the time of exchanges, to a minute or two for a small circuit: parts that may come
# back, and pairs on which circuits are run.
LARGEST_POOL = 3000
EXCHANGE_PAIRS = 256_000


# --- leaving out what is not needed ----------------------------------------------------------

def minimise(search: Search, circuit: Circuit, target: float, say=print,
             necessity: float = 0.0, exchange: bool = True) -> Circuit:
    """Leave out nodes and edges until none can go alone without the loss (nats) passing `target`.

    With `necessity` (nats), no node goes either without which the model could do with less than
    that when it loses the circuit: where a model has two mechanisms for a task, one of them alone
    may meet the target. The circuit must meet both to begin with, or every removal would be refused
    and the certificate would say nothing. exchange: then let parts back in, as long as that leads
    to a smaller one.
    """
    before = circuit.size
    if circuit.size[1] > MANY_EDGES:
        smaller = leave_out_by_masks(search, circuit, target, necessity, say)
        say(f"  {circuit.size[0]} nodes, {circuit.size[1]} edges: by masks over edges to "
            f"{smaller.size[0]} nodes, {smaller.size[1]} edges")
        circuit = smaller
    pool = circuit  # what `exchange_parts` may let back in
    # Where there are many parts, to price each by a trial would take minutes for every round. The
    # gradient prices all at once; what it is wrong about, the passes below mend.
    for leave_out_many, how in ((leave_out_by_gradient, "by gradient"),
                                (leave_out_past_needed, "past what is needed")):
        while total(circuit) > MANY_PARTS:
            smaller = leave_out_many(search, circuit, target, necessity)
            say(f"  {circuit.size[0]} nodes, {circuit.size[1]} edges: {how} to "
                f"{smaller.size[0]} nodes, {smaller.size[1]} edges")
            worthwhile = total(smaller) <= WORTHWHILE * total(circuit)
            circuit = smaller
            if total(pool) > LARGEST_POOL:
                pool = circuit
            if not worthwhile:
                break

    # First pass. A quarter of the pairs gives rough prices in a quarter of the time; what goes is
    # decided on all pairs nonetheless.
    rough = Search(search.model, search.constants, search.quarter, search.tie_qk)
    for s in (search, rough):
        s.start_from(circuit.mask, circuit.edges)
    leave_out(search, rough, target, say, necessity)

    # Second pass. Prices from all pairs, until a round leaves nothing out: then every part was
    # tried, and each alone is needed. That round is the certificate, also where exchanges came
    # before it: after each that was accepted everything is tried again.
    leave_out_all(search, target, say, necessity)
    last = search.pairs_run + rough.pairs_run + EXCHANGE_PAIRS
    while exchange and exchange_parts(search, rough, pool, target, say, necessity, last):
        leave_out_all(search, target, say, necessity)
    tried = len(parts_of(search.accepted, search.tie_qk))
    varied = search.varied is not None
    certificate = Certificate(tried, search.n_pairs, target, necessity, before, varied)
    return replace(search.accepted, certificate=certificate)


def leave_out_all(search: Search, target: float, say, necessity: float) -> None:
    """Leave out what can go of the accepted circuit, until nothing can."""
    while leave_out(search, search, target, say, necessity):
        pass


def leave_out(search: Search, pricer: Search, target: float, say, necessity: float,
              stay: Set = frozenset()) -> bool:
    """Ask `pricer` for the price of each part of the accepted circuit (`price_of`: nats for an edge
    that goes), then leave out what can go.

    Lazily greedy: the cheapest first, several at a time while they cost what they promised. The
    accepted circuit of `search` is then the smaller one. Returns whether anything went. What is to
    `stay` is not tried, but goes where it loses its path.
    """
    before = search.accepted
    clock = time.monotonic()
    limit = target
    # On other pairs the same circuit can have another loss, and what can go may cost more: where
    # hardly anything is left to lose, prices are asked for up to a quarter of the target.
    if pricer is not search:
        limit = pricer.accepted.loss + max(target - before.loss, target / 4)
    queue = priced(pricer, before, limit, stay)
    say(f"  {before.size[0]} nodes, {before.size[1]} edges: {len(queue)} of these can go "
        f"({time.monotonic() - clock:.0f} s)")

    circuit = before
    most = len(queue)  # so many at once: doubled where that went well, halved where not
    while True:
        # a node takes its edges with it, and an edge the nodes that then have no path
        left = set(parts_of(circuit, search.tie_qk))
        queue = sorted(entry for entry in queue if entry[2] in left)
        if not queue:
            return circuit is not before
        n = max(1, min(most, len(queue) // AT_ONCE))
        few = queue[:n]
        queue = queue[n:]
        parts = [part for _, _, part in few]
        trial = search.fit_without(circuit, parts, target)
        price = price_of(trial, circuit)

        # a single part may be dearer than it promised, so long as the next one is no cheaper
        promised = few[-1][0]
        if n == 1 and queue:
            promised = max(promised, queue[0][0])
        goes = price <= NOISE + PATIENCE * max(0.0, promised)
        # only a node can make a circuit less necessary: the model loses all its edges in any case
        is_missed = True
        if goes and necessity > 0 and trial.size[0] < circuit.size[0]:
            is_missed = search.is_needed(trial.mask, necessity)
            goes = is_missed

        if goes:
            circuit = search.accept()
            most *= 2
        elif n > 1:  # one of them is to blame; fewer at once will tell which
            queue = few + queue
            most = n // 2
        elif math.isfinite(price) and is_missed:  # dearer by now than the next one: later again
            queue.append((price, *few[0][1:]))


def priced(pricer: Search, circuit: Circuit, limit: float, stay: Set) -> list[tuple]:
    """(price, its number, part) of each part without which the loss on the pricer's pairs is at
    most `limit`, those that are to `stay` left out; the number decides between equals."""
    found = []
    for number, part in enumerate(parts_of(circuit, pricer.tie_qk)):
        if part in stay:
            continue
        trial = pricer.fit_without(circuit, [part], limit)
        price = price_of(trial, pricer.accepted)
        if math.isfinite(price):
            found.append((price, number, part))
    return found


def quiet(text: str) -> None:
    """In place of the lines that pruning prints."""


# --- letting one part back in ----------------------------------------------------------------

def exchange_parts(search: Search, pricer: Search, pool: Circuit, target: float, say,
                   necessity: float, last: int) -> bool:
    """Let parts of `pool` back into the accepted circuit, one at a time, those first that help the
    most, and leave out what can then go; `pricer` says what helps and what it costs. What is
    smaller is accepted. Returns whether any was. No part comes back once the two searches have run
    circuits on `last` pairs between them."""
    def run() -> int:
        return search.pairs_run + pricer.pairs_run

    if run() >= last:
        return False
    halfway = (run() + last) / 2  # the rest is for the exchanges
    before = search.accepted
    limit = pricer.start_from(before.mask, before.edges).loss
    helpful = []  # (loss with it, part)
    for part in parts_of(pool, search.tie_qk):
        if run() >= halfway:
            break
        larger = with_part(search, before, part, pool)
        trial = None if larger is None else pricer.fit(*larger, limit)
        if trial is not None and trial.loss < limit:
            helpful.append((trial.loss, part))
    helpful.sort(key=lambda entry: entry[0])

    circuit = before
    for _, part in helpful[:EXCHANGES]:
        if run() >= last:
            break
        larger = with_part(search, circuit, part, pool)
        if larger is None:  # an earlier one has brought it along
            continue
        added = search.start_from(*larger)
        pricer.start_from(*larger)
        stay = set(parts_of(added, search.tie_qk)) - set(parts_of(circuit, search.tie_qk))
        leave_out(search, pricer, target, quiet, necessity, stay)
        found = search.accepted
        # The part that came back can make a circuit less necessary, and edges that went do not say.
        if by_edges(found) < by_edges(circuit) and search.meets(found, target, necessity):
            circuit = found
        else:
            search.start_from(circuit.mask, circuit.edges)
    if circuit is not before:
        say(f"  {before.size[0]} nodes, {before.size[1]} edges: exchanged to {circuit.size[0]} "
            f"nodes, {circuit.size[1]} edges")
    return circuit is not before


def with_part(search: Search, circuit: Circuit, part: tuple,
              pool: Circuit) -> tuple[Nodes, Edges] | None:
    """Nodes and edges of a circuit with one part more: a node of `pool` with all edges that this
    has between it and the circuit's nodes, or an edge between two of them. None where the part is
    there, or has no path."""
    model = search.model
    *name, i = part
    mask = dict(circuit.mask)
    edges = dict(circuit.edges)
    if len(name) == 1:
        sites = [name[0]]
        if search.tie_qk and name[0].endswith("attn.q"):
            sites.append(partner(name[0]))
        for site in sites:
            mask[site] = mask[site].clone()
            mask[site][i] |= pool.mask[site][i]
        # less those that had gone from between the nodes that are there
        inside = between(model, circuit.mask)
        for ends, kept in between(model, mask, pool.edges).items():
            edges[ends] = edges[ends] | (kept & ~inside[ends])
    else:
        a, b = name
        wires = graph_of(model).wires[a, b]
        if not (mask[a][wires.source[i]] and mask[b][wires.to[i]]):
            return None
        edges[a, b] = edges[a, b].clone()
        edges[a, b][i] = True

    mask = drop_unconnected(model, mask, search.answers, edges)
    edges = between(model, mask, edges)
    return (mask, edges) if (count(edges), count(mask)) > by_edges(circuit) else None


def by_edges(circuit: Circuit) -> tuple[int, int]:
    """What the smaller of two circuits has less of: edges, or nodes where these are as many."""
    n_nodes, n_edges = circuit.size
    return n_edges, n_nodes


# --- many parts at once ----------------------------------------------------------------------

def first_order(search: Search, circuit: Circuit) -> dict[tuple, float]:
    """Each part -> nats by which the loss rises, to first order, where it is left out: minus
    gradient x (activation - constant), summed over the prompts of a quarter of the pairs."""
    reduced = without_edges(search.model, circuit, search.constants)
    gate = {site: m.float().requires_grad_() for site, m in circuit.mask.items()}
    wires = graph_of(search.model).wires
    effect = {ends: torch.zeros_like(w.weight) for ends, w in wires.items()}
    seen = []  # what each linear map read and gave
    hooks = []
    for i, block in enumerate(reduced.transformer.h):
        for name in MAPS:
            watch = partial(_watch, seen, i, name)
            hooks.append(block.get_submodule(name).register_forward_hook(watch))

    for part in batches_of(search.quarter, AT_A_TIME):
        seen.clear()
        margin = margin_of(run_to_last(reduced, part, ablate(gate, search.constants)), part)
        F.softplus(-calibrated(margin, circuit.scale, circuit.shift)).sum().backward()
        for i, name, x, y in seen:
            a, targets = MAPS[name]
            a = f"{i}.{a}"
            away = (x.detach() - search.constants[a]).flatten(0, -2)  # (tokens, in)
            for b, grad in zip(targets, y.grad.flatten(0, -2).chunk(len(targets), -1)):
                w = wires[a, f"{i}.{b}"]
                together = (grad.T @ away)[w.to, w.source]
                effect[a, f"{i}.{b}"] += together * w.weight
    for hook in hooks:
        hook.remove()

    found = {}
    for part in parts_of(circuit, search.tie_qk):
        if len(part) == 3:
            found[part] = -effect[part[:2]][part[2]].item()
            continue
        site, channel = part
        found[part] = -gate[site].grad[channel].item()
        # a key that is not in the circuit does not go with its query
        if search.tie_qk and site.endswith("attn.q") and circuit.mask[partner(site)][channel]:
            found[part] -= gate[partner(site)].grad[channel].item()
    return found


def _watch(seen: list, layer: int, name: str, module, inputs: tuple, output: Tensor) -> None:
    """Keeps what a linear map reads and gives, and the gradient of the latter."""
    output.retain_grad()
    seen.append((layer, name, inputs[0], output))


def leave_out_by_gradient(search: Search, circuit: Circuit, target: float,
                          necessity: float) -> Circuit:
    """A circuit less as many of its parts as can go together, by `first_order`: the smaller of two
    tries. What the circuit is said to be better without goes first, to make room for what costs
    something; or what matters least, since for a part that all hangs on the gradient may say
    either."""
    rises = first_order(search, circuit)
    tries = []
    for order in (sorted(rises, key=rises.get), least_first(rises)):
        tries.append(without_leading(search, circuit, order, target, necessity))
    return min(tries, key=total)


def leave_out_past_needed(search: Search, circuit: Circuit, target: float,
                          necessity: float) -> Circuit:
    """A circuit less those of its parts that can go, by `first_order` what matters least first. A
    bisection ends at the first part that cannot go, and leaves all that stand behind it; here it is
    kept and passed over. Half of what the loss may still rise is left to the rounds that follow,
    whose prices are better."""
    search.start_from(circuit.mask, circuit.edges)
    limit = (circuit.loss + target) / 2
    order = least_first(first_order(search, circuit))
    n = max(1, len(order) // AT_ONCE)
    kept = 0  # in a row
    while order and kept < STUBBORN:
        n = min(n, len(order))
        trial = search.fit_without(circuit, order[:n], limit)
        # only a node can make a circuit less necessary
        asked = necessity if trial.size[0] < circuit.size[0] else 0.0
        if search.meets(trial, limit, asked):
            circuit = search.accept()
            left = set(parts_of(circuit, search.tie_qk))  # a node takes its edges with it
            order = [part for part in order[n:] if part in left]
            n = 2 * n
            kept = 0
        elif n > 1:  # one of them is to blame; fewer at once will tell which
            n = n // 2
        else:
            order = order[1:]
            kept += 1
    return circuit


def least_first(rises: dict[tuple, float]) -> list[tuple]:
    """The parts that `first_order` looks at, what matters least first."""
    return sorted(rises, key=lambda part: abs(rises[part]))


def total(circuit: Circuit) -> int:
    """Nodes and edges together."""
    return sum(circuit.size)


def without_leading(search: Search, circuit: Circuit, order: list[tuple], target: float,
                    necessity: float) -> Circuit:
    """A circuit less as many leading parts of `order` as can go together, by bisection."""
    low = 0  # so many can go
    high = len(order)
    while high - low > max(1, len(order) // FINE):
        middle = (low + high) // 2
        trial = search.fit_without(circuit, order[:middle], target)
        if search.meets(trial, target, necessity):
            low = middle
            smaller = trial
        else:
            high = middle
    return smaller if low else circuit


def reduce_to(search: Search, circuit: Circuit, n_edges: int) -> Circuit:
    """A circuit of at most `n_edges` edges, whatever its loss: a share of the parts goes at a time,
    by `first_order` what matters least first."""
    while circuit.size[1] > n_edges:
        order = least_first(first_order(search, circuit))
        n = max(1, len(order) // AT_ONCE)
        smaller = search.fit_without(circuit, order[:n])
        while n > 1 and smaller.size[1] < n_edges:  # too far: nodes take their edges with them
            n = n // 2
            smaller = search.fit_without(circuit, order[:n])
        circuit = smaller
    return circuit


def price_of(trial: Circuit, before: Circuit) -> float:
    """Nats that a smaller circuit costs for each edge that goes; inf where it passed its target."""
    rise = trial.loss - before.loss
    edges = max(LEAST_EDGES, before.size[1] - trial.size[1])
    # what lowers the loss comes first, and the sooner the more edges go with it
    return rise / edges if rise > 0 else rise * edges
