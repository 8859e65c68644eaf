"""What tools/formation.py measures of one kept step of a run, and of a control.

- `circuit_at`: the whole model, its bigram table, and the step's circuit, searched for from the
  circuit of a neighbouring step.
- `edges_at`: each edge of the final circuit in the step's model, and that circuit alone in it.
- `control`: the final model pruned with another seed.

Each returns what goes into a file as JSON. Losses are in nats, on held-out pairs.
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuit import MAPS, Circuit, Nodes, alone, edges_of, graph_of, host, without_edges
from circuit_file import circuit_of, stream_ends
from find import SLACKS, WIDE, Ranking, discretise, find, leading_gates, rank
from masks import Gates
from minimise import (MANY_PARTS, WORTHWHILE, leave_out, leave_out_by_gradient, minimise, quiet,
                      total)
from model import GPT
from prune import PruneConfig, constants_of, set_apart
from search import Search
from tasks import (Pairs, Task, answer_ids, calibrate, calibrated, fitting_batches, load_model,
                   load_pairs, loss_of, margin_of, margins, unembed_last)
from tools.planted import as_circuit, parts_found

Parts = tuple[set, set]  # nodes (site, channel), edges (site, channel, site, channel)

# Where the masks of a step begin: gates in the circuit of its neighbour, and the others, so near to
# closed that those which no pair asks for close within a few steps.
WIDE_OPEN = 0.5
AJAR = 0.1
FEW_PARTS = 60  # nodes and edges: circuits of so many are certified to be minimal


@dataclass
class Study:
    """What all steps share: one task in one run, and its final circuit."""
    folders: dict[int, str]  # step -> its model, in their order; the last one is the final
    task: Task
    tokenizer: object
    tokenizer_path: str
    pruning: PruneConfig     # what was asked of the final circuit
    mask_steps: int          # of the other steps
    train: Pairs             # masks are learnt on these
    fit: Pairs               # the first of those: fit_pairs of what the final circuit was asked
    few: Pairs               # fewer: circuits of masks are searched for on these
    heldout: Pairs           # every loss is of these
    cut: Pairs               # the cost of single edges is of these, held out as well
    final: dict              # circuit.json
    nodes: set               # its nodes, (site, channel)
    edges: list              # its edges, (site, channel, site, channel), in their order

    @property
    def target(self) -> float:
        """Nats that circuits are to meet."""
        return self.final["target_loss"]

    def load(self, step: int) -> tuple[GPT, Nodes]:
        """The model of a step, and what its ablated nodes are held at."""
        folder = self.folders[step]
        model, _ = load_model(folder, self.tokenizer_path)
        return model, constants_of(model, replace(self.pruning, model=folder))


def parts_in(circuit: dict) -> Parts:
    """The nodes and edges of a circuit, as files list them."""
    nodes = {(site, i) for site, channels in circuit["nodes"].items() for i in channels}
    return nodes, {tuple(edge[:4]) for edge in circuit["edges"]}


# --- the whole model, and the circuit of a step ------------------------------------------------

@torch.no_grad()
def whole_model(study: Study, model: GPT) -> dict:
    """Losses of the whole model and of its bigram table alone, and the table's share of the mean
    margin: None where the model has no margin to have a share of."""
    pairs = study.heldout
    margin = margins(model, pairs)
    scale, shift = calibrate(margins(model, study.fit))
    table = torch.zeros_like(margin)
    if model.bigram_table is not None:
        rows = torch.arange(len(margin))
        logits = model.bigram_table[pairs.ids[rows, pairs.last]]
        table = margin_of(logits, pairs)
    mean = margin.mean().item()
    return {
        "loss": loss_of(margin),
        "loss_calibrated": loss_of(calibrated(margin, scale, shift)),
        "accuracy": (margin > 0).float().mean().item(),
        "margin": mean,
        "bigram_loss": loss_of(table),
        "bigram_share": table.mean().item() / mean if mean > 0 else None,
    }


def first_bias(gates: Gates, nodes: set) -> Tensor:
    """Where the masks of a step begin, (n_parameters,): wide open at `nodes`, else ajar."""
    by_site = {site: torch.full((width,), AJAR) for site, width in gates.widths.items()}
    for site, channel in nodes:
        by_site[site][channel] = WIDE_OPEN
    bias = torch.full((gates.n_parameters,), AJAR)
    # a query and a key may share a gate, which is as wide as the wider of the two
    return bias.scatter_reduce(0, gates.index, torch.cat(list(by_site.values())), "amax")


def searched(study: Study, model: GPT, constants: Nodes, neighbour: Parts) -> tuple[Circuit, bool]:
    """The circuit of a kept step, and whether it is the neighbour's.

    Where that one meets the target, and is missed as much as was asked, in this step's model, it is
    taken, less what it does not need here: what differs between two steps differs for a reason.
    Else masks are learnt, from its nodes, and made into a circuit much as prune.py does it of a
    single start.
    """
    asked = study.pruning
    inside = host(model, asked.standalone)
    search = Search(inside, constants, study.fit, asked.tie_qk, whole=model)
    necessity = asked.necessity if asked.minimal else 0.0
    aim = SLACKS[0] * study.target
    circuit = fitted(search, *neighbour)
    inherited = search.meets(circuit, study.target, necessity)
    if inherited:
        circuit = made_small(search, circuit, max(aim, circuit.loss), asked)
        return replace(circuit, standalone=asked.standalone), True

    gates = Gates(inside, asked.tie_qk)
    # all gates begin at noise * scale + bias, and here each has a bias of its own
    bias = first_bias(gates, neighbour[0])
    learning = replace(asked, steps=study.mask_steps, init_noise_bias=bias)
    ranking = rank(inside, study.train, constants, gates, learning, quiet)
    for pairs in (study.few, study.fit):  # on all of them only where a few mislead
        searching = Search(inside, constants, pairs, asked.tie_qk, whole=model)
        circuit = leading(searching, gates, ranking, aim, study.target, asked)
        if searching.meets(circuit, study.target, necessity):
            circuit = made_small(searching, circuit, max(aim, circuit.loss), asked)
        certificate = circuit.certificate
        circuit = search.fit(circuit.mask, circuit.edges)
        if search.meets(circuit, study.target, necessity):
            break
    return replace(circuit, certificate=certificate, standalone=asked.standalone), False


def leading(search: Search, gates: Gates, ranking: Ranking, aim: float, target: float,
            asked: PruneConfig) -> Circuit:
    """The circuit of a ranking's leading gates: with room to be made small, or the fewest that do;
    at most `aim` nats, or `target` where it cannot be less."""
    necessity = asked.necessity if asked.minimal else 0.0
    for times in WIDE if asked.minimal else ():
        circuit = leading_gates(search, gates, ranking, times * ranking.n_open)
        if search.meets(circuit, aim, necessity):
            return circuit
    circuit = discretise(search, gates, ranking, aim, necessity)
    if not circuit.loss <= aim:  # nor do all nodes
        circuit = discretise(search, gates, ranking, target, necessity)
    return circuit


def made_small(search: Search, circuit: Circuit, aim: float, asked: PruneConfig) -> Circuit:
    """`minimise`, where that was asked for; but of more than a few parts without the passes in
    which each is tried in vain: they take most of the time, and leave out one in fifty."""
    if not asked.minimal:
        return circuit
    necessity = asked.necessity
    while total(circuit) > MANY_PARTS:
        before = total(circuit)
        circuit = leave_out_by_gradient(search, circuit, aim, necessity)
        if total(circuit) > WORTHWHILE * before:
            break
    if total(circuit) > FEW_PARTS:
        rough = Search(search.model, search.constants, search.quarter, search.tie_qk)
        for s in (search, rough):
            s.start_from(circuit.mask, circuit.edges)
        leave_out(search, rough, aim, quiet, necessity)
        circuit = search.accepted
    if total(circuit) <= FEW_PARTS:
        circuit = minimise(search, circuit, aim, quiet, necessity)
    return circuit


def fitted(search: Search, nodes: set, edges: set) -> Circuit:
    """Nodes, and of these edges those that the model has, as a circuit; less what has no path."""
    wires = graph_of(search.model).wires
    there = [(a, j, b, i) for a, j, b, i in edges if wires[a, b].place(j, i) is not None]
    return search.fit(*as_circuit(search.model, nodes, there))


def described(study: Study, model: GPT, constants: Nodes, circuit: Circuit) -> dict:
    """A circuit: what graph.js reads, its losses, and of the final circuit's edges that are in it
    the nats by which its loss on the fitted pairs rises without each."""
    margin = alone(model, circuit, constants)(study.heldout)
    n_nodes, n_edges = circuit.size
    answers = answer_ids(study.heldout)
    return {
        "nodes": {s: m.nonzero().flatten().tolist() for s, m in circuit.mask.items() if m.any()},
        "edges": edges_of(model, circuit.mask, circuit.edges),
        "n_nodes": n_nodes,
        "n_edges": n_edges,
        "loss": circuit.loss,
        "loss_heldout": loss_of(calibrated(margin, circuit.scale, circuit.shift)),
        "certified": circuit.certificate is not None,
        **stream_ends(model, circuit.mask, study.heldout, answers, study.tokenizer),
        "costs": costs_within(study, model, constants, circuit),
    }


def costs_within(study: Study, model: GPT, constants: Nodes, circuit: Circuit) -> dict[str, float]:
    """{number of an edge of the final circuit: nats by which the loss of `circuit` rises without
    it}, of those that are in both."""
    search = Search(host(model, circuit.standalone), constants, study.fit, study.pruning.tie_qk)
    whole = search.start_from(circuit.mask, circuit.edges)
    found = {}
    for n, (a, j, b, i) in enumerate(study.edges):
        place = graph_of(model).wires[a, b].place(j, i)
        if place is not None and circuit.edges[a, b][place]:
            found[str(n)] = search.fit_without(whole, [(a, b, place)]).loss - whole.loss
    return found


def circuit_at(study: Study, step: int, neighbour: Parts) -> dict:
    """The whole model of a step, and its circuit or `why` there is none. Of the last step: the
    final circuit, as its file has it."""
    model, constants = study.load(step)
    found = {"whole": whole_model(study, model), "circuit": None, "why": "", "inherited": False}
    if step == max(study.folders):
        circuit, constants = circuit_of(study.final, model)
        certified = study.final["validation"].get("minimal", {}).get("certified", False)
        found["circuit"] = described(study, model, constants, circuit) | {"certified": certified}
        return found
    whole = found["whole"]["loss_calibrated"]
    if not whole <= study.target:  # nor is NaN
        return found | {"why": f"the whole model misses the target, at {whole:.3f} nats"}
    circuit, inherited = searched(study, model, constants, neighbour)
    if not circuit.loss <= study.target:
        return found | {"why": f"none was found that meets the target: {circuit.loss:.3f} nats"}
    return found | {"circuit": described(study, model, constants, circuit), "inherited": inherited}


# --- the edges of the final circuit in the model of a step -------------------------------------

def place_in_matrix(model: GPT, edge: tuple) -> tuple[float, int | None, int]:
    """An edge's weight, its rank by magnitude in its matrix (1 the largest; None of a zero), and
    the entries of that. The matrix is what the projection sees: q, k and v are one."""
    a, j, b, i = edge
    layer, read = a.split(".", 1)
    ((name, targets),) = [(name, to) for name, (source, to) in MAPS.items() if source == read]
    matrix = model.transformer.h[int(layer)].get_submodule(name).weight
    width = len(matrix) // len(targets)
    weight = matrix[targets.index(b.split(".", 1)[1]) * width + i, j]
    rank_of = 1 + int((matrix.abs() > weight.abs()).sum()) if weight != 0 else None
    return weight.item(), rank_of, matrix.numel()


@torch.no_grad()
def costs_of_cuts(model: GPT, constants: Nodes, edges: list[tuple], pairs: Pairs) -> list[float]:
    """Nats by which the task loss of the whole model rises where one edge, alone, contributes
    weight * mean. The edges must be nonzero."""
    cut = []
    starts = []  # the sublayer of each, as `GPT.run` counts them: what comes before runs once
    for a, j, b, i in edges:
        mask, none = as_circuit(model, [(a, j), (b, i)], [])
        cut.append(without_edges(model, Circuit(mask, none, 1.0, 0.0, 0.0), constants))
        layer, part = a.split(".")[:2]
        starts.append(2 * int(layer) + (part == "mlp"))

    rise = [0.0] * len(edges)
    for part in fitting_batches(model, pairs):
        streams = [model.embed(part.ids)]  # before each sublayer, and after the last
        for sublayer in model.sublayers:
            streams.append(sublayer(streams[-1]))
        whole = loss_of(margin_of(unembed_last(model, streams[-1], part), part))
        for n, start in enumerate(starts):
            h = cut[n].run(streams[start], start)
            loss = loss_of(margin_of(unembed_last(model, h, part), part))
            rise[n] += (loss - whole) * len(part) / len(pairs)
    return rise


def edges_at(study: Study, step: int) -> dict:
    """The final circuit in the model of a step: its `edges` one by one, its loss `alone`, of those
    edges that are not zero, and that of the whole model `without` its nodes."""
    model, constants = study.load(step)
    places = [place_in_matrix(model, edge) for edge in study.edges]
    there = [edge for edge, (weight, _, _) in zip(study.edges, places) if weight != 0]
    costs = dict(zip(there, costs_of_cuts(model, constants, there, study.cut)))

    inside = host(model, study.pruning.standalone)
    search = Search(inside, constants, study.fit, study.pruning.tie_qk, whole=model)
    circuit = fitted(search, study.nodes, study.edges)
    margin = alone(inside, circuit, constants)(study.heldout)
    found = [{"weight": weight, "rank": rank_of, "entries": n, "cost": costs.get(edge, 0.0)}
             for edge, (weight, rank_of, n) in zip(study.edges, places)]
    return {
        "edges": found,
        "alone": loss_of(calibrated(margin, circuit.scale, circuit.shift)),
        "without": search.loss_without(circuit.mask),
    }


# --- how far two circuits of one model overlap -------------------------------------------------

def jaccard(a: set, b: set) -> float:
    """The share of what either has that both have; 1 where neither has anything."""
    return len(a & b) / len(a | b) if a | b else 1.0


def overlap(a: Parts, final: Parts) -> dict[str, float]:
    """How much a circuit has in common with the final one: the Jaccard index of their nodes and of
    their edges; `held`: the share of the final one's edges that it has."""
    held = len(a[1] & final[1]) / len(final[1]) if final[1] else 1.0
    return {"nodes": jaccard(a[0], final[0]), "edges": jaccard(a[1], final[1]), "held": held}


def control(study: Study, seed: int) -> dict:
    """The final model pruned with another seed, of masks and pairs, as prune.py does it; and its
    overlap with the final circuit."""
    model, constants = study.load(max(study.folders))
    asked = replace(study.pruning, seed=seed)
    n = asked.train_pairs + asked.apart_pairs
    pairs = load_pairs(study.task, study.tokenizer, n, "train", model.config.block_size, seed)
    (circuit,) = find(model, *set_apart(pairs, asked), constants, asked, quiet)
    n_nodes, n_edges = circuit.size
    margin = alone(model, circuit, constants)(study.heldout)
    return {
        "seed": seed,
        "n_nodes": n_nodes,
        "n_edges": n_edges,
        "loss_heldout": loss_of(calibrated(margin, circuit.scale, circuit.shift)),
        "overlap": overlap(parts_found(model, circuit), (study.nodes, set(study.edges))),
    }
