"""What a circuit is: some nodes and edges of a model, and the model run on those alone.

- `ablate(gates, constants)`: a node function that holds the other nodes at constants (paper A.5);
  `inverse`: these nodes. What is held where, and what varies: docs/ablation.md.
- `without_edges`: a model less some weights, whose mean contribution moves into the biases;
  `without_topk`: less AbsTopK, for a circuit that is to stand alone.
- `drop_unconnected`, `edges_of`, `count`: paths, edges and sizes (paper 2.2, Fig. 12).

How circuits are found is in find.py, how far to trust them in validate.py; their file is in
circuit_file.py.
"""
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, SITES, NodeFn
from ops import gated
from tasks import Pairs, margins

Nodes = dict[str, Tensor]  # site -> one value per channel: a bool mask, a gate or a constant
# (from site, to site) -> a bool for each nonzero weight between them, in the order of its `Wires`
Edges = dict[tuple[str, str], Tensor]
FINAL = "final_resid"  # the last stream: no node here, but published circuits name channels of it


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
            text += ", at the means or, on a quarter of the pairs, under a varied ablation"
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
    # nodes, edges and loss apart of every circuit that was tried, this one among them
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


def of_map(model: GPT, layer: int, name: str, edges: Edges) -> tuple[list[tuple], Wires]:
    """Of `edges`, those of one linear map of a layer: the ends of each of its parts, and the
    weights, in the rows of its matrix."""
    graph = graph_of(model)
    source, targets = MAPS[name]
    ends = [(f"{layer}.{source}", f"{layer}.{target}") for target in targets]
    parts = []
    first = 0  # the row of the matrix at which a target's channels begin
    for a, b in ends:
        wires = graph.wires[a, b]
        kept = edges[a, b]
        parts.append((wires.source[kept], first + wires.to[kept], wires.weight[kept]))
        first += model.config.site_width(b)
    return ends, Wires(*(torch.cat(column) for column in zip(*parts)))


def without_edges(model: GPT, circuit: Circuit, constants: Nodes) -> GPT:
    """The model in which the circuit runs: `model`, in other modules, less the weights between two
    nodes of the circuit that are no edges of it; each then contributes weight * constant, as if its
    source were ablated for this one target. Less AbsTopK, where the circuit is to stand alone."""
    inside = between(model, circuit.mask)
    cut = {ends: inside[ends] & ~kept for ends, kept in circuit.edges.items()}
    reduced = twin(host(model, circuit.standalone))
    for i, block in enumerate(reduced.transformer.h):
        for name in MAPS:
            ends, gone = of_map(model, i, name, cut)
            if len(gone.to):
                whole = block.get_submodule(name)
                block.set_submodule(name, Cut(whole, gone, constants[ends[0][0]]))
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
            for a, b in wires:
                if a != site:
                    continue
                carries = keep[b][wires[site, b].to]
                if edges is not None:
                    carries = carries & edges[site, b]
                wanted = wanted | _marked(len(wanted), wires[site, b].source, carries)
        keep[site] = live[site] & wanted
        if site.endswith("act_in"):
            read = read | keep[site][: model.config.d_model]
    return {site: keep[site] for site in model.sites}
