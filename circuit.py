"""What a circuit is: some nodes and edges of a model, the model run on those alone, and the file.

- `ablate(gates, constants)`: a node function that holds the other nodes at constants (paper A.5);
  `inverse`: these nodes.
- `without_edges`: a model less some weights, whose mean contribution moves into the biases.
- `drop_unconnected`, `edges_of`, `count`: paths, edges and sizes (paper 2.2, Fig. 12).
- `content_of`: a circuit measured on held-out pairs and described, as its file has it.
- `read_circuit`, `write_circuit`, `circuit_of`: the one reader and writer of circuit.json.

How circuits are found is in prune.py, how far to trust them in validate.py.
"""
import copy
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import nearest, write_atomic
from model import GPT, SITES, weights_hash
from ops import gated
from tasks import Pairs, Task, calibrated, loss_of, margins, unembed_last

Nodes = dict[str, Tensor]  # site -> one value per channel: a bool mask, a gate or a constant
# (from site, to site) -> bool (to channels, from channels): which weights are kept
Edges = dict[tuple[str, str], Tensor]


@dataclass
class Circuit:
    """Nodes and edges, the calibration of the answer logits, and the loss on the fitted pairs."""
    mask: Nodes
    edges: Edges
    scale: float
    shift: float
    loss: float  # nats
    before: tuple[int, int] | None = None  # its size before single parts were left out

    @property
    def size(self) -> tuple[int, int]:
        """Nodes and edges; an edge counts where both its nodes are in the circuit."""
        between = [kept[self.mask[b]][:, self.mask[a]] for (a, b), kept in self.edges.items()]
        return count(self.mask), sum(int(kept.sum()) for kept in between)


def count(mask: Nodes) -> int:
    return sum(int(m.sum()) for m in mask.values())


# --- running a model with nodes replaced -----------------------------------------------------

def ablate(gates: Nodes, constants: Nodes):
    """A node function: gate * x + (1 - gate) * constant at every site of `gates` (paper A.5).

    Mean ablation: the constants are each node's mean over the data, `prune.node_means`.
    """
    def node(site: str, x: Tensor) -> Tensor:
        return gated(x, gates[site], constants[site]) if site in gates else x
    return node


def inverse(mask: Nodes, constants: Nodes):
    """A node function that ablates the nodes of `mask` and no others (paper 2.2)."""
    return ablate({site: ~m for site, m in mask.items()}, constants)


def finish(model: GPT, h: Tensor, pairs: Pairs, nodes=None) -> Tensor:
    """The stream before the last sublayer (2n, T, d_model) -> the last tokens' logits (2n, vocab).

    The last sublayer is an MLP, which looks at no other token: it runs there alone. So `nodes` must
    not depend on the position.
    """
    last = model.sublayers[-1]
    if model.config.d_pos_emb is not None:  # positions are read by their place in the sequence
        return unembed_last(model, last(h, nodes), pairs)
    rows = torch.arange(len(h), device=h.device)
    h = last(h[rows, pairs.last].unsqueeze(1), nodes)
    return model.unembed(h, pairs.ids[rows, pairs.last].unsqueeze(1)).squeeze(1)


# --- edges -----------------------------------------------------------------------------------

def weights_between(model: GPT) -> list[tuple[str, str, Tensor, Tensor | None]]:
    """(from site, to site, weight (to, from), bias (to)) of every matrix between two nodes.

    Views, not copies: what is written into them is written into the model.
    """
    found = []
    for i, block in enumerate(model.transformer.h):
        qkv = block.attn.c_attn  # one matrix for three sites
        biases = (None, None, None) if qkv.bias is None else qkv.bias.detach().chunk(3)
        for z, weight, bias in zip("qkv", qkv.weight.detach().chunk(3), biases):
            found.append((f"{i}.attn.act_in", f"{i}.attn.{z}", weight, bias))
        for a, b, linear in (
            ("attn.v", "attn.resid_delta", block.attn.c_proj),
            ("mlp.act_in", "mlp.post_act", block.mlp.c_fc),
            ("mlp.post_act", "mlp.resid_delta", block.mlp.c_proj),
        ):
            bias = None if linear.bias is None else linear.bias.detach()
            found.append((f"{i}.{a}", f"{i}.{b}", linear.weight.detach(), bias))
    return found


def all_edges(model: GPT) -> Edges:
    """Every nonzero weight between two nodes."""
    return {(a, b): weight != 0 for a, b, weight, _ in weights_between(model)}


def edges_of(model: GPT, mask: Nodes, edges: Edges | None = None) -> list[list]:
    """[site, channel, site, channel, weight] of every nonzero weight between two nodes of the
    circuit (of these, `edges`)."""
    edges = all_edges(model) if edges is None else edges
    found = []
    for a, b, weight, _ in weights_between(model):
        inner = edges[a, b] & mask[b][:, None] & mask[a]
        for i, j in inner.nonzero().tolist():
            # six decimals: `circuit_of` must know the weight again
            found.append([a, j, b, i, round(weight[i, j].item(), 6)])
    return found


def cuttable(model: GPT) -> GPT:
    """A copy of `model` that has biases, for `cut_`."""
    model = copy.deepcopy(model)
    for module in model.transformer.h.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            # a cut moves the mean of what it takes away into the bias of its target
            zeros = module.weight.new_zeros(module.out_features)
            module.bias = nn.Parameter(zeros, requires_grad=False)
    return model


def cut_(model: GPT, whole: GPT, mask: Nodes, edges: Edges, constants: Nodes) -> GPT:
    """Make `model` (a `cuttable` copy) the model `whole` less the weights between two nodes of
    `mask` that `edges` does not keep. Each then contributes weight * constant, as if its source
    were ablated for this one target (of a value behind a sink, as if no attention went to it)."""
    for (_, _, w, bias), (a, b, w0, bias0) in zip(weights_between(model), weights_between(whole)):
        gone = w0 * (mask[b][:, None] & mask[a] & ~edges[a, b])
        torch.sub(w0, gone, out=w)  # from `whole` each time, so that an earlier cut leaves no trace
        bias.copy_(gone @ constants[a] + (0 if bias0 is None else bias0))
    return model


def without_edges(model: GPT, circuit: Circuit, constants: Nodes) -> GPT:
    """The model in which the circuit runs: a copy of `model` less the edges that were removed."""
    return cut_(cuttable(model), model, circuit.mask, circuit.edges, constants)


def alone(model: GPT, circuit: Circuit, constants: Nodes) -> Callable[[Pairs], Tensor]:
    """The `margins` of the circuit alone, not calibrated, as a function of pairs."""
    reduced = without_edges(model, circuit, constants)  # once, however many pairs come
    return partial(margins, reduced, nodes=ablate(circuit.mask, constants))


# --- paths -----------------------------------------------------------------------------------

def drop_unconnected(model: GPT, mask: Nodes, answers: tuple[int, int],
                     edges: Edges | None = None) -> Nodes:
    """The nodes of `mask` that lie on a path from the tokens to the logits of the two answers.

    Steps of a path: embedding -> read of a channel that it fills; the nonzero weights between nodes
    (of these, `edges`); write -> any later read of the same channel; write -> an answer's
    unembedding entry; and a query or key -> the values of its head.
    """
    incoming = defaultdict(list)  # site -> the sites before it, with the edges from there
    outgoing = defaultdict(list)  # site -> the sites after it, with the edges to there
    for (a, b), kept in (all_edges(model) if edges is None else edges).items():
        kept = kept.float()  # products of zeros and ones count paths
        incoming[b].append((a, kept))
        outgoing[a].append((b, kept))
    return _needed(model, _reached(model, mask, incoming), answers, outgoing)


def _heads(model: GPT, channels: Tensor) -> Tensor:
    """Channels (H * d_head,) -> the same, true throughout a head that has any."""
    c = model.config
    return channels.view(c.n_head, c.d_head).any(1).repeat_interleave(c.d_head)


def _reached(model: GPT, mask: Nodes, incoming: dict) -> Nodes:
    """The nodes of `mask` that the tokens reach: forward, site by site."""
    filled = (model.transformer.wte.weight != 0).any(0)  # channels of the stream
    if model.config.d_pos_emb is None:
        filled = filled | (model.transformer.wpe.weight != 0).any(0)
    live = {}
    for site in model.sites:
        if site.endswith("act_in"):
            # positions are channels behind those of the stream, where they are not added to it
            n_positions = len(mask[site]) - len(filled)
            live[site] = mask[site] & F.pad(filled, (0, n_positions), value=True)
            continue
        arrive = sum(kept @ live[a].float() for a, kept in incoming[site])
        live[site] = mask[site] & (arrive > 0)
        if site.endswith("attn.v"):
            # a constant value moves too where queries or keys steer its attention
            queries_or_keys = live[site[:-1] + "q"] | live[site[:-1] + "k"]
            live[site] = live[site] | (mask[site] & _heads(model, queries_or_keys))
        if site.endswith("resid_delta"):
            filled = filled | live[site]  # for all later reads
    return live


def _needed(model: GPT, live: Nodes, answers: tuple[int, int], outgoing: dict) -> Nodes:
    """The nodes of `live` that the answers need: backward, site by site."""
    keep = {}
    read = (model.lm_head.weight[list(answers)] != 0).any(0)  # channels of the stream
    for site in reversed(model.sites):
        if site.endswith("resid_delta"):  # a write, wanted where anything later reads its channel
            wanted = read
        elif site.endswith((".q", ".k")):  # of a head that moves a value; its `v` came before
            wanted = _heads(model, keep[site[:-1] + "v"])
        else:
            wanted = sum(keep[b].float() @ kept for b, kept in outgoing[site]) > 0
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
    aim: float          # nats: where the search stopped on its own pairs, a little below the target
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

    shape = ("n_layer", "d_model", "n_head", "d_head", "d_mlp")
    minimal = {"certified": circuit.before is not None}
    if circuit.before:  # minimise.py tried every part in vain, on those pairs and to that loss
        minimal["training_pairs"] = settings["fit_pairs"]
        minimal["target"] = found.aim
        minimal["necessity"] = settings["necessity"]
        minimal["nodes_before"], minimal["edges_before"] = circuit.before
    return {
        "format": FORMAT,
        "model": {"dir": found.model_dir, "sha256": weights_hash(found.model_dir),
                  **{key: getattr(model.config, key) for key in shape}},
        "task": found.task.name, "task_description": found.task.description,
        "answers": list(found.task.answers),
        "target_loss": found.target_loss,
        "loss": circuit.loss,  # on the pairs that it was fitted to
        "loss_heldout": loss_of(kept), "unpruned_loss": loss_of(unpruned),
        "ablation": settings["ablation"],
        "logit_scale": circuit.scale, "logit_shift": circuit.shift,
        # sites without a node are left out
        "nodes": {s: m.nonzero().flatten().tolist() for s, m in circuit.mask.items() if m.any()},
        "edges": edges,
        **stream_ends(model, circuit.mask, found.heldout, found.tokenizer),
        # what ablated nodes are held at, at every site, by whatever ablation
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


def stream_ends(model: GPT, mask: Nodes, pairs: Pairs, tokenizer) -> dict:
    """Where the circuit's channels start and end: [token id, text, channel, weight] of the
    embedding (channels that it reads, tokens of the task, largest first) and of both answers'
    unembedding."""
    def entries(matrix: Tensor, ids: Tensor, kind: str, most: int) -> list[list]:
        # a read can also have channels of positions, behind those of the stream
        masks = [m[: model.config.d_model] for site, m in mask.items() if site.endswith(kind)]
        found = []
        for channel in torch.stack(masks).any(0).nonzero().flatten().tolist():
            column = matrix.detach()[ids, channel]
            for i in column.abs().argsort(descending=True)[:most].tolist():
                if column[i] != 0:
                    token, weight = int(ids[i]), round(column[i].item(), 6)
                    found.append([token, tokenizer.decode([token]), channel, weight])
        return found

    wte, head = model.transformer.wte.weight, model.lm_head.weight
    return {
        "embedding": entries(wte, pairs.ids.unique(), "act_in", 12),  # a page has room for a dozen
        "unembedding": entries(head, pairs.answer[:2], "resid_delta", 2),
    }


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

FORMAT = "sparse-circuit-1"  # to be changed with what the keys below mean
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
    two_texts = len(c["answers"]) == 2 and all(isinstance(a, str) for a in c["answers"])
    _need(two_texts, "'answers' is not two strings")
    for site, mean in c["means"].items():  # of every site, also of those without a node
        _need(isinstance(mean, list) and all(isinstance(x, NUMBER) for x in mean),
              f"'means.{site}' is not a list of numbers")
    _check_graph(c)
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
        if not (place in SITES and layer.isdecimal() and int(layer) < c["model"]["n_layer"]):
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
    for site in model.sites:
        width = model.config.site_width(site)
        mean = content["means"].get(site, ())
        _need(len(mean) == width and None not in mean, "the circuit's means do not fit the "
              "model's sites: it is of another model, or was edited")
        mask[site] = torch.zeros(width, dtype=torch.bool, device=device)
        constants[site] = torch.tensor(mean, device=device)
    for site, channels in content["nodes"].items():
        _need(site in mask, f"the model lacks the site '{site}': the circuit is of another model")
        mask[site][channels] = True

    edges = {key: torch.zeros_like(kept) for key, kept in all_edges(model).items()}
    # the weights name the model: they are looked up one by one, as far as the file's decimals go
    weights = {(a, b): weight for a, b, weight, _ in weights_between(model)}
    for a, j, b, i, weight in content["edges"]:
        if (a, b) not in edges or weights[a, b][i, j] == 0 \
                or not abs(weights[a, b][i, j].item() - weight) <= 1e-5:
            raise ValueError(f"the model has no weight {weight} from {a}.{j} to {b}.{i}: the "
                             "circuit is of another model, or was edited")
        edges[a, b][i, j] = True
    scale, shift, loss = content["logit_scale"], content["logit_shift"], content["loss"]
    return Circuit(mask, edges, scale, shift, loss), constants
