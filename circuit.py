"""What a circuit is: some nodes and edges of a model, the model run on those alone, and the file.

- `ablate(gates, constants)`: a node function that holds the other nodes at constants (paper A.5);
  `inverse`: these nodes. What is held where, and what varies: docs/ablation.md.
- `without_edges`: a model less some weights, whose mean contribution moves into the biases;
  `without_topk`: less AbsTopK, for a circuit that is to stand alone.
- `drop_unconnected`, `edges_of`, `count`: paths, edges and sizes (paper 2.2, Fig. 12).
- `content_of`: a circuit measured on held-out pairs and described, as its file has it.
- `read_circuit`, `write_circuit`, `circuit_of`: the one reader and writer of circuit.json.

How circuits are found is in prune.py, how far to trust them in validate.py.
"""
import copy
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import nearest, write_atomic
from model import GPT, SITES, NodeFn, weights_hash
from ops import gated
from tasks import Pairs, Task, calibrated, loss_of, margins

Nodes = dict[str, Tensor]  # site -> one value per channel: a bool mask, a gate or a constant
# (from site, to site) -> a bool for each nonzero weight between them, in the order of its `Wires`
Edges = dict[tuple[str, str], Tensor]


@dataclass
class Certificate:
    """That no part of a circuit can go: what minimise.py tried, each time in vain."""
    parts: int        # single nodes and edges, each tried alone; tied, a query with its key
    pairs: int        # training pairs on which the loss was measured
    target: float     # nats that the loss would pass
    necessity: float  # nats that the model would then lose less than; 0 = not asked for
    before: tuple[int, int]  # nodes and edges when minimising began
    varied: bool = False     # the loss was the highest under several ablations (ablations.py)

    @property
    def statement(self) -> str:
        """In words, for a reader who has not seen the code."""
        text = (f"Each of the {self.parts} nodes and edges was left out alone, with what then had "
                f"no path: on {self.pairs} training pairs the loss passed {self.target:.3f} nats")
        if self.varied:
            text += ", at the means or under a varied ablation"
        if self.necessity:
            text += f", or the model lost less than {self.necessity} nats without the rest"
        return f"{text}. Groups of parts were not tried."


@dataclass
class Circuit:
    """Nodes and edges, the calibration of the answer logits, and the loss on the fitted pairs."""
    mask: Nodes
    edges: Edges  # those `between` its nodes
    scale: float
    shift: float
    loss: float  # nats
    certificate: Certificate | None = None
    # on pairs on which it was not found, and the standard error of that; None = there were none
    loss_apart: float | None = None
    error_apart: float | None = None
    # nodes, edges and loss apart of every start's circuit, this one among them
    starts: list[tuple] | None = None
    # run without AbsTopK, in which channels outside the circuit decide whether its nodes are kept
    standalone: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Nodes and edges."""
        return count(self.mask), count(self.edges)


def count(chosen: Nodes | Edges) -> int:
    return sum(int(x.sum()) for x in chosen.values())


# --- running a model with nodes replaced -----------------------------------------------------

def held_at(site: str) -> str:
    """Where the forward pass holds a node of `site` that is not in the circuit: a value where its
    head has gathered it, any other node at its own site.

    A value that was held before the attention would go on moving with it: a sink takes the less the
    more tokens there are, so that the head would count positions without a node or an edge.
    """
    return f"{site[:-1]}y" if site.endswith("attn.v") else site


def where_held(sites: Iterable[str], change: NodeFn) -> NodeFn:
    """A node function: change(site, x) for each node site of `sites`, x being what passes where
    that is held; all else as it is."""
    held = {held_at(site): site for site in sites}

    def node(site: str, x: Tensor) -> Tensor:
        return change(held[site], x) if site in held else x
    return node


def ablate(gates: Nodes, constants: Nodes) -> NodeFn:
    """A node function: gate * x + (1 - gate) * constant for every site of `gates` (paper A.5),
    where `held_at` says.

    Mean ablation: the constants are each node's mean over the data, `prune.node_means`.
    """
    def hold(site: str, x: Tensor) -> Tensor:
        return gated(x, gates[site], constants[site])
    return where_held(gates, hold)


def inverse(mask: Nodes, constants: Nodes):
    """A node function that ablates the nodes of `mask` and no others (paper 2.2)."""
    return ablate({site: ~m for site, m in mask.items()}, constants)


def run_to_last(model: GPT, pairs: Pairs, nodes=None) -> Tensor:
    """The last tokens' logits, (2n, vocab), sooner than `last_logits`: the last sublayer is an MLP,
    which looks at no other token, and runs there alone. So `nodes` must not depend on the position.
    """
    h = model.embed(pairs.ids)
    for sublayer in model.sublayers[:-1]:
        h = sublayer(h, nodes)
    rows = torch.arange(len(h), device=h.device)
    # the last tokens in one row, as if of one prompt, beside the positions that they have in theirs
    h = h[rows, pairs.last].unsqueeze(0)
    wpe = None
    if model.config.d_pos_emb is not None:
        wpe = model.transformer.wpe.weight[pairs.last]
    h = model.transformer.h[-1].feedforward(h, nodes, wpe)
    return model.unembed(h, pairs.ids[rows, pairs.last].unsqueeze(0)).squeeze(0)


# --- edges -----------------------------------------------------------------------------------

# The linear maps of a block: the site that each reads, and those that it fills, side by side.
MAPS = {
    "attn.c_attn": ("attn.act_in", ("attn.q", "attn.k", "attn.v")),
    "attn.c_proj": ("attn.v", ("attn.resid_delta",)),
    "mlp.c_fc": ("mlp.act_in", ("mlp.post_act",)),
    "mlp.c_proj": ("mlp.post_act", ("mlp.resid_delta",)),
}


class Wires(NamedTuple):
    """The nonzero weights from one site to another, n of them, target by target."""
    source: Tensor  # (n,) channels, int64
    to: Tensor      # (n,) channels, int64
    weight: Tensor  # (n,)

    def place(self, source: int, to: int) -> int | None:
        """The number of the weight from one channel to another; None where that is zero."""
        row = torch.tensor([to, to + 1], device=self.to.device)
        first, end = torch.searchsorted(self.to, row).tolist()
        found = (self.source[first:end] == source).nonzero().flatten().tolist()
        return first + found[0] if found else None


class Graph(NamedTuple):
    """What of a model's weights circuits are made of: the nonzeros alone."""
    wires: dict[tuple[str, str], Wires]  # (from site, to site) -> the weights between
    filled: Tensor  # (d_model,) bool: the channels of the stream that the tokens fill


def graph_of(model: GPT) -> Graph:
    """The nonzeros of a model, looked for once: `model.known` keeps them while it is frozen."""
    linears = {}
    for i, block in enumerate(model.transformer.h):
        linears |= {(i, name): block.get_submodule(name).weight for name in MAPS}
    stream = [model.transformer.wte.weight]
    if model.config.d_pos_emb is None:  # positions are added to it
        stream.append(model.transformer.wpe.weight)

    # A weight that is written in place counts up its `_version`; one that learns may not.
    weights = [*linears.values(), *stream]
    state = [(w.data_ptr(), w._version) for w in weights]
    if model.known.get("state") != state or any(w.requires_grad for w in weights):
        wires = {}
        for (i, name), weight in linears.items():
            a, targets = MAPS[name]
            for b, part in zip(targets, weight.detach().chunk(len(targets))):
                wires[f"{i}.{a}", f"{i}.{b}"] = _wires(part)
        filled = torch.stack([(w.detach() != 0).any(0) for w in stream]).any(0)
        # with the weights: as long as they are held nothing else can have their address
        model.known |= {"state": state, "weights": weights, "graph": Graph(wires, filled)}
    return model.known["graph"]


def _wires(weight: Tensor) -> Wires:
    to, source = weight.nonzero(as_tuple=True)  # row by row
    return Wires(source, to, weight[to, source])


def sparse_matrix(wires: Wires, shape: tuple[int, int]) -> Tensor:
    """Weights, target by target, as a sparse matrix (to, from)."""
    entries = torch.stack([wires.to, wires.source])
    return torch.sparse_coo_tensor(entries, wires.weight, shape, check_invariants=False,
                                   is_coalesced=True)


def all_edges(model: GPT) -> Edges:
    """Every nonzero weight between two nodes."""
    return {ends: torch.ones_like(wires.to, dtype=torch.bool)
            for ends, wires in graph_of(model).wires.items()}


def between(model: GPT, mask: Nodes, edges: Edges | None = None) -> Edges:
    """The edges (of these, `edges`) that have both their nodes in `mask`."""
    found = {}
    for (a, b), wires in graph_of(model).wires.items():
        inner = mask[a][wires.source] & mask[b][wires.to]
        found[a, b] = inner if edges is None else inner & edges[a, b]
    return found


def edges_of(model: GPT, mask: Nodes, edges: Edges | None = None) -> list[list]:
    """[site, channel, site, channel, weight] of every nonzero weight between two nodes of the
    circuit (of these, `edges`)."""
    graph = graph_of(model)
    found = []
    for (a, b), kept in between(model, mask, edges).items():
        for j, i, weight in zip(*(part[kept].tolist() for part in graph.wires[a, b])):
            # six decimals: `circuit_of` must know the weight again
            found.append([a, j, b, i, round(weight, 6)])
    return found


def twin(model: GPT) -> GPT:
    """The same model in modules of its own, for others to be put in their place. The tensors are
    those of `model`: nothing may be written into them."""
    shared = [*model.parameters(), *model.buffers()]
    shared += [m.known for m in model.modules() if hasattr(m, "known")]
    return copy.deepcopy(model, {id(x): x for x in shared})


class Cut(nn.Module):
    """A linear map less some of its weights: each contributes weight * constant instead."""

    def __init__(self, whole: nn.Module, gone: Wires, constants: Tensor):
        """gone: the weights that go; constants: those of the site that is read, (in,)."""
        super().__init__()
        self.whole = whole
        self.source, column = gone.source.unique(return_inverse=True)
        self.to, row = gone.to.unique(return_inverse=True)
        self.constants = constants[self.source]
        # of the rows and columns that have any
        shape = len(self.to), len(self.source)
        self.gone = sparse_matrix(Wires(column, row, gone.weight), shape)

    def forward(self, x: Tensor) -> Tensor:
        y = self.whole(x)
        less = self.constants - x[..., self.source]
        less = (self.gone @ less.flatten(0, -2).T).T  # (tokens, rows)
        return y.index_add(-1, self.to, less.view(*x.shape[:-1], -1))


def without_topk(model: GPT) -> GPT:
    """`model`, in other modules, whose nodes no AbsTopK sets to zero.

    With every other node held, all that AbsTopK still does is to ask whether channels outside the
    circuit are larger than those in it. Without it a circuit hangs on nothing that it does not list
    but the norms.
    """
    free = twin(model)
    for block in free.transformer.h:
        block.topk_at = block.topk_at - set(SITES.values())  # one on the stream itself stays
    return free


def host(model: GPT, standalone: bool) -> GPT:
    """What a circuit runs in: the model, or that one without AbsTopK."""
    return without_topk(model) if standalone else model


def without_edges(model: GPT, circuit: Circuit, constants: Nodes) -> GPT:
    """The model in which the circuit runs: `model`, in other modules, less the weights between two
    nodes of the circuit that are no edges of it; each then contributes weight * constant, as if its
    source were ablated for this one target. Less AbsTopK, where the circuit is to stand alone."""
    mask, edges = circuit.mask, circuit.edges
    graph = graph_of(model)
    reduced = twin(host(model, circuit.standalone))
    for i, block in enumerate(reduced.transformer.h):
        for name, (a, targets) in MAPS.items():
            a = f"{i}.{a}"
            gone = []
            first = 0  # the row of the matrix at which this target's channels begin
            for b in (f"{i}.{b}" for b in targets):
                wires = graph.wires[a, b]
                cut = mask[a][wires.source] & mask[b][wires.to] & ~edges[a, b]
                gone.append((wires.source[cut], first + wires.to[cut], wires.weight[cut]))
                first += len(mask[b])
            gone = Wires(*(torch.cat(parts) for parts in zip(*gone)))
            if len(gone.to):
                part, _, linear = name.partition(".")
                module = block.get_submodule(part)
                setattr(module, linear, Cut(getattr(module, linear), gone, constants[a]))
    return reduced


def alone(model: GPT, circuit: Circuit, constants: Nodes) -> Callable[[Pairs], Tensor]:
    """The `margins` of the circuit alone, not calibrated, as a function of pairs."""
    reduced = without_edges(model, circuit, constants)  # once, however many pairs come
    return partial(margins, reduced, nodes=ablate(circuit.mask, constants))


# --- paths -----------------------------------------------------------------------------------

def drop_unconnected(model: GPT, mask: Nodes, answers: Sequence[int],
                     edges: Edges | None = None) -> Nodes:
    """The nodes of `mask` that lie on a path from the tokens to the logits of the answers.

    Steps of a path: embedding -> read of a channel that it fills; the nonzero weights between nodes
    (of these, `edges`); write -> any later read of the same channel; write -> an answer's
    unembedding entry; and a query or key -> the values of its head. Behind a sink a value is a
    start as well: what its head gathers grows with the tokens that it can look at.
    """
    return _needed(model, _reached(model, mask, edges), answers, edges)


def heads_with(model: GPT, channels: Tensor) -> Tensor:
    """Channels (H * d_head,) -> the same, true throughout a head that has any."""
    c = model.config
    return channels.view(c.n_head, c.d_head).any(1).repeat_interleave(c.d_head)


def _marked(n: int, channels: Tensor, which: Tensor) -> Tensor:
    """(n,) bool: the channels that occur in `channels` where `which`, both of one length."""
    # counted, since a scatter has no "or"; and nothing here waits for a CUDA device
    counts = torch.zeros(n, dtype=torch.int32, device=which.device)
    return counts.index_add_(0, channels, which.int()) > 0


def _reached(model: GPT, mask: Nodes, edges: Edges | None) -> Nodes:
    """The nodes of `mask` that the tokens reach: forward, site by site."""
    wires, filled = graph_of(model)
    incoming = {b: a for a, b in wires}  # every site but the reads has one site before it
    live = {}
    for site in model.sites:
        if site.endswith("act_in"):
            # positions are channels behind those of the stream, where they are not added to it
            n_positions = len(mask[site]) - len(filled)
            live[site] = mask[site] & F.pad(filled, (0, n_positions), value=True)
            continue
        a = incoming[site]
        carries = live[a][wires[a, site].source]
        if edges is not None:
            carries = carries & edges[a, site]
        live[site] = mask[site] & _marked(len(mask[site]), wires[a, site].to, carries)
        if site.endswith("attn.v") and model.config.sink:
            # whatever the value is; without a sink, what is gathered of a constant is that constant
            live[site] = mask[site]
        if site.endswith("resid_delta"):
            filled = filled | live[site]  # for all later reads
    return live


def _needed(model: GPT, live: Nodes, answers: Sequence[int], edges: Edges | None) -> Nodes:
    """The nodes of `live` that the answers need: backward, site by site."""
    wires, _ = graph_of(model)
    keep = {}
    read = (model.lm_head.weight[list(answers)] != 0).any(0)  # channels of the stream
    for site in reversed(model.sites):
        if site.endswith("resid_delta"):  # a write, wanted where anything later reads its channel
            wanted = read
        elif site.endswith((".q", ".k")):  # of a head that moves a value; its `v` came before
            wanted = heads_with(model, keep[site[:-1] + "v"])
        else:
            wanted = torch.zeros_like(live[site])
            for b in (b for a, b in wires if a == site):
                carries = keep[b][wires[site, b].to]
                if edges is not None:
                    carries = carries & edges[site, b]
                wanted = wanted | _marked(len(wanted), wires[site, b].source, carries)
        keep[site] = live[site] & wanted
        if site.endswith("act_in"):
            read = read | keep[site][: model.config.d_model]
    return {site: keep[site] for site in model.sites}


# --- from a circuit to its file ----------------------------------------------------------------

@dataclass
class Found:
    """A circuit that pruning found, and what it takes to measure and describe it."""
    model: GPT
    model_dir: str
    task: Task
    tokenizer: object   # with `decode`
    circuit: Circuit
    constants: Nodes
    target_loss: float  # nats
    train: Pairs        # it was found on these
    heldout: Pairs
    settings: dict      # those of prune.py; they go into the file as they are


def content_of(found: Found) -> dict:
    """The content of circuit.json: the circuit, its losses (nats) on held-out pairs, examples."""
    model, circuit, settings = found.model, found.circuit, found.settings
    reduced = without_edges(model, circuit, found.constants)
    edges = edges_of(model, circuit.mask, circuit.edges)
    # sufficiency: the circuit alone; necessity: all but the circuit (paper 2.2)
    kept = margins(reduced, found.heldout, ablate(circuit.mask, found.constants))
    kept = calibrated(kept, circuit.scale, circuit.shift)
    rest = margins(model, found.heldout, inverse(circuit.mask, found.constants))
    unpruned = margins(model, found.heldout)

    answers = answers_of(found)
    file = found.task.file
    shape = ("n_layer", "d_model", "n_head", "d_head", "d_mlp")
    minimal = {"certified": circuit.certificate is not None}
    if circuit.certificate is not None:
        minimal |= asdict(circuit.certificate)
        minimal["statement"] = circuit.certificate.statement
    return {
        "format": FORMAT,
        "model": {"dir": found.model_dir, "sha256": weights_hash(found.model_dir),
                  **{key: getattr(model.config, key) for key in shape}},
        "task": found.task.name, "task_description": found.task.description,
        "task_file": {"path": file.path, "sha256": file.sha256} if file else None,
        "answers": [found.tokenizer.decode([token]) for token in answers],
        "target_loss": found.target_loss,
        "loss": circuit.loss,  # on the pairs that it was fitted to
        "loss_apart": circuit.loss_apart, "error_apart": circuit.error_apart,
        "starts": circuit.starts,
        "loss_heldout": loss_of(kept), "unpruned_loss": loss_of(unpruned),
        "ablation": settings["ablation"],
        "logit_scale": circuit.scale, "logit_shift": circuit.shift,
        # sites without a node are left out
        "nodes": {s: m.nonzero().flatten().tolist() for s, m in circuit.mask.items() if m.any()},
        "edges": edges,
        **stream_ends(model, circuit.mask, found.heldout.ids, answers, found.tokenizer),
        "heads": heads_of(model, circuit.mask),
        # what ablated nodes are held at, at every site, by whatever ablation; of values, `held_at`
        "means": {s: [round(x, 6) for x in c.tolist()] for s, c in found.constants.items()},
        "n_nodes": count(circuit.mask), "n_edges": len(edges),
        "validation": {  # validate.py adds to it
            "sufficiency": loss_of(kept),
            "sufficiency_accuracy": (kept > 0).float().mean().item(),
            "necessity": loss_of(rest),
            "necessity_accuracy": (rest > 0).float().mean().item(),
            "heldout_pairs": len(found.heldout),
            "minimal": minimal,
        },
        "examples": examples(found, reduced, kept, unpruned),
        "seed": settings["seed"], "settings": settings,
    }


def answers_of(found: Found) -> list[int]:
    """Token ids, the most frequent first: two in most tasks, any number with pairs from a file."""
    asked = Counter(found.train.answer.tolist() + found.heldout.answer.tolist())
    return [token for token, _ in asked.most_common()]


def stream_ends(model: GPT, mask: Nodes, ids: Tensor, answers: list[int], tokenizer) -> dict:
    """Where the circuit's channels start and end: [token id, text, channel, weight] of the
    embedding (channels that it reads, tokens of the prompts `ids`, largest first) and of the
    answers' unembedding."""
    def entries(matrix: Tensor, ids: Tensor, kinds: tuple[str, ...], most: int) -> list[list]:
        # a read can also have channels of positions, behind those of the stream
        masks = [m[: model.config.d_model] for site, m in mask.items() if site.endswith(kinds)]
        found = []
        for channel in torch.stack(masks).any(0).nonzero().flatten().tolist():
            column = matrix.detach()[ids, channel]
            for i in column.abs().argsort(descending=True)[:most].tolist():
                if column[i] != 0:
                    token, weight = int(ids[i]), round(column[i].item(), 6)
                    found.append([token, tokenizer.decode([token]), channel, weight])
        return found

    wte, head = model.transformer.wte.weight, model.lm_head.weight
    last = (FINAL,) if FINAL in mask else ("resid_delta",)  # what the answers read
    return {
        # a page has room for a dozen
        "embedding": entries(wte, ids.unique(), ("act_in", FINAL), 12),
        "unembedding": entries(head, torch.tensor(answers, device=ids.device), last, 12),
    }


def heads_of(model: GPT, mask: Nodes) -> list[list]:
    """[layer, head, its sink's logit] of every head with a node, None where there is no sink. With
    the means and the examples' activations, that is what a page draws attention patterns from."""
    c = model.config
    found = []
    for i, block in enumerate(model.transformer.h):
        sinks = block.attn.attn_imp
        held = torch.stack([mask[f"{i}.attn.{z}"] for z in "qkv"]).any(0)
        for head in held.view(c.n_head, c.d_head).any(1).nonzero().flatten().tolist():
            sink = None if sinks is None else round(sinks.sink_logit[head].item(), 6)
            found.append([i, head, sink])
    return found


@torch.no_grad()
def examples(found: Found, reduced: GPT, kept: Tensor, unpruned: Tensor, n: int = 6) -> list[dict]:
    """The first n held-out pairs, with every node's activation at every token in the circuit's run.

    reduced: the model in which it runs. kept, unpruned (2n,): margins of the circuit and of the
    whole model.
    """
    pairs, decode, mask = found.heldout, found.tokenizer.decode, found.circuit.mask
    hold = ablate(mask, found.constants)
    seen = {}

    def node(site: str, x: Tensor) -> Tensor:
        seen[site] = hold(site, x)  # as it is once the nodes outside the circuit are held
        return seen[site]

    out = []
    for i in range(2 * min(n, len(pairs))):
        ids = pairs.ids[i : i + 1, : int(pairs.last[i]) + 1]  # one at a time: without its padding
        reduced.run(reduced.embed(ids), nodes=node)
        activations = {}
        for site, m in mask.items():
            if m.any():  # a row per node, a value per token; four decimals are shown
                rows = seen[site][0][:, m].T.tolist()
                activations[site] = [[round(x, 4) for x in row] for row in rows]
        out.append({
            "tokens": [decode([token]) for token in ids[0].tolist()],
            "answer": decode([int(pairs.answer[i])]),
            "wrong": decode([int(pairs.wrong[i])]),
            "p_answer": kept[i].sigmoid().item(),
            "p_answer_unpruned": unpruned[i].sigmoid().item(),
            "activations": activations,
        })
    return out


# --- its file --------------------------------------------------------------------------------

FORMAT = "sparse-circuit-2"  # to be changed with what the keys below mean; 1 held values themselves
FINAL = "final_resid"  # the last stream: no node here, but published circuits name channels of it
NUMBER = (int, float, type(None))  # None: what JSON has no number for, such as an infinite loss
# Every key that some reader relies on, and its type.
KEYS = dict(
    format=str, model=dict, task=str, task_description=str, answers=list, target_loss=NUMBER,
    loss=NUMBER, loss_heldout=NUMBER, unpruned_loss=NUMBER, ablation=str, logit_scale=NUMBER,
    logit_shift=NUMBER, nodes=dict, edges=list, embedding=list, unembedding=list, means=dict,
    n_nodes=int, n_edges=int, validation=dict, examples=list, seed=NUMBER, settings=dict)
MODEL_KEYS = dict(dir=str, sha256=str, n_layer=int, d_model=int, n_head=int, d_head=int, d_mlp=int)
EXAMPLE_KEYS = dict(
    tokens=list, answer=str, wrong=str, p_answer=NUMBER, p_answer_unpruned=NUMBER, activations=dict)
# What to do about a file that is not as prune.py left it.
AGAIN = "prune the task again: python prune.py --model=DIR --task=TASK"


def write_circuit(path: str, content: dict) -> None:
    """Write a circuit.json, atomically; OSError where that cannot be done."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_atomic(path, json.dumps(content).encode())


def read_circuit(path: str) -> dict:
    """The content of a circuit.json: whole, and consistent in itself.

    NaN, infinities and 1e999 come out as None. ValueError, in one line, where it is truncated or
    edited; OSError where it cannot be read. Whether it fits a model is for `circuit_of` to say.
    """
    def finite(text: str) -> float | None:
        number = float(text)
        return number if math.isfinite(number) else None

    with open(path, "rb") as f:
        raw = f.read()
    try:
        content = json.loads(raw, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as e:
        # RecursionError: brackets too deep; the parser's own words can quote the whole file
        raise ValueError(f"{path} is not JSON, perhaps truncated ({str(e)[:80]}); {AGAIN}") from e
    try:
        _check(content)
    # where a list or an object is something else, the checks themselves go astray
    except (ValueError, TypeError, AttributeError, LookupError) as e:
        why = " ".join(str(e).split())
        raise ValueError(f"{path} is not a circuit file, or was edited: {why}; {AGAIN}") from e
    return content


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _need_keys(x: object, types: dict, where: str = "") -> None:
    _need(isinstance(x, dict), f"{where or 'the file'} holds no JSON object")
    for key, kind in types.items():
        _need(key in x, f"no key '{where}{key}'")
        _need(isinstance(x[key], kind), f"'{where}{key}' has the wrong type")


def _check(c: object) -> None:
    """All that validate.py, steer.py and the page rely on."""
    _need_keys(c, KEYS)
    _need_keys(c["model"], MODEL_KEYS, "model.")
    _need(c["format"] == FORMAT, f"format is {c['format']!r}, not {FORMAT!r}")
    texts = len(c["answers"]) >= 2 and all(isinstance(a, str) for a in c["answers"])
    _need(texts, "'answers' is not a list of strings, at least two")
    if c.get("task_file") is not None:  # of a task that has none, and in older files
        _need_keys(c["task_file"], dict(path=str, sha256=str), "task_file.")
    for site, mean in c["means"].items():  # of every site, also of those without a node
        _need(isinstance(mean, list) and all(isinstance(x, NUMBER) for x in mean),
              f"'means.{site}' is not a list of numbers")
    _check_graph(c)
    minimal = c["validation"].get("minimal", {})
    _need(isinstance(minimal, dict), "'validation.minimal' is no object")
    for key in ("target", "necessity"):
        _need(isinstance(minimal.get(key, 0.0), (int, float)),
              f"'validation.minimal.{key}' is no number")
    controls = c["validation"].get("controls", {})
    _need(isinstance(controls, dict) and all(isinstance(runs, list) for runs in controls.values()),
          "'validation.controls' is not a list of runs for each control")
    for head in c.get("heads", []):  # older files lack them
        kinds = [type(x) for x in head]
        _need(kinds in ([int, int, float], [int, int, type(None)], [int, int, int])
              and 0 <= head[0] < c["model"]["n_layer"] and 0 <= head[1] < c["model"]["n_head"],
              f"head {head} is not [layer, head, logit of the sink]")
    for entry in c["embedding"] + c["unembedding"]:
        kinds = [type(x) for x in entry[1:]]
        _need(len(entry) == 4 and kinds in ([str, int, float], [str, int, int]),
              f"embedding entry {entry} is not [token id, token, channel, weight]")
    for i, example in enumerate(c["examples"]):
        _need_keys(example, EXAMPLE_KEYS, f"examples[{i}].")
        for site, rows in example["activations"].items():
            whole = all(isinstance(x, NUMBER) for row in rows for x in row)
            whole = whole and all(len(row) == len(example["tokens"]) for row in rows)
            whole = whole and len(rows) == len(c["nodes"].get(site, ()))
            _need(whole, f"examples[{i}].activations['{site}'] is not a value per node and token")


def _check_graph(c: dict) -> None:
    """Nodes at known sites, each with a constant; edges between them; their counts."""
    nodes = [(site, channel) for site, channels in c["nodes"].items() for channel in channels]
    for site, channel in nodes:
        layer, _, place = site.partition(".")
        known = place in SITES and layer.isdecimal() and int(layer) < c["model"]["n_layer"]
        if not (known or site == FINAL):
            raise ValueError(f"unknown site '{site}'; the nearest is '{nearest(site, c['means'])}'")
        # type(), because true is an int as well
        _need(type(channel) is int and 0 <= channel < len(c["means"].get(site, ())),
              f"'means' lacks {site}.{channel}")

    there = set(nodes)
    for edge in c["edges"]:
        _need(len(edge) == 5 and type(edge[4]) in (int, float),
              f"edge {edge} is not [site, channel, site, channel, weight]")
        for site, channel in (edge[:2], edge[2:4]):
            _need((site, channel) in there and type(channel) is int,
                  f"edge {edge}: {site}.{channel} is not in 'nodes'")

    # what is listed twice counts once
    for key, listed in (("n_nodes", nodes), ("n_edges", [tuple(edge[:4]) for edge in c["edges"]])):
        _need(c[key] == len(listed) == len(set(listed)),
              f"'{key}' is {c[key]}, but the file lists {len(listed)}, {len(set(listed))} distinct")


def circuit_of(content: dict, model: GPT) -> tuple[Circuit, Nodes]:
    """The circuit of a file's content, and its constants.

    ValueError where its names or weights are not the model's.
    """
    device = model.lm_head.weight.device
    # None is a number that JSON lacks: to be shown as a dash, but nothing to compute with
    for key in ("logit_scale", "logit_shift", "loss", "target_loss"):
        _need(content[key] is not None, f"the circuit's {key} is no number: it was edited")

    mask = {}
    constants = {}
    for site in [*model.sites, *({FINAL} & content["nodes"].keys())]:
        width = model.config.d_model if site == FINAL else model.config.site_width(site)
        mean = content["means"].get(site, ())
        _need(len(mean) == width and None not in mean, "the circuit's means do not fit the "
              "model's sites: it is of another model, or was edited")
        mask[site] = torch.zeros(width, dtype=torch.bool, device=device)
        constants[site] = torch.tensor(mean, device=device)
    for site, channels in content["nodes"].items():
        _need(site in mask, f"the model lacks the site '{site}': the circuit is of another model")
        mask[site][channels] = True

    edges = {ends: torch.zeros_like(every) for ends, every in all_edges(model).items()}
    # the weights name the model: they are looked up one by one, as far as the file's decimals go
    wires = graph_of(model).wires
    for a, j, b, i, weight in content["edges"]:
        place = wires[a, b].place(j, i) if (a, b) in wires else None
        if place is None or not abs(wires[a, b].weight[place].item() - weight) <= 1e-5:
            raise ValueError(f"the model has no weight {weight} from {a}.{j} to {b}.{i}: the "
                             "circuit is of another model, or was edited")
        edges[a, b][place] = True
    scale, shift, loss = content["logit_scale"], content["logit_shift"], content["loss"]
    standalone = content["settings"].get("standalone", False) is True  # older files do not say
    return Circuit(mask, edges, scale, shift, loss, standalone=standalone), constants
