"""What each node of a circuit does, put to the test: the numbers that could refute what is said.

    python -m tools.refute --circuit=out/demo/single_double_quote/circuit.json

For every node, on held-out pairs, in the circuit alone:
- *held*: its loss (nats, as calibrated in the file) with this node at its mean as well, and,
  beside it, the whole model's with this node alone at its mean. Where the loss stays, the node does
  nothing that matters, whatever its examples look like.
- *mirrored*: the share of prompts answered right with the node on the other side of its mean. A
  node that says which answer it is turns the answers; one that only says "here" breaks them.
- *exchanged*: the same with the value that the node has in the pair's other prompt, token by token,
  over the pairs whose prompts are as long. What carries the difference between the two turns them;
  what is the same in both does nothing. Fewer right, and the answer followed this node.

For every head: where it looks from the last token, and where it would look without each node that
runs before it, where that moves a tenth of its attention or more.

What it prints goes into refute.json beside circuit.json.
"""
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, parse, write_atomic

import torch
from torch import Tensor

from circuit import Nodes, ablate, held_at, inverse, read_circuit
from measures import Case
from model import NodeFn, device_of, record
from tasks import Pairs, batches_of, calibrated, loss_of, margins
from validate import ValidateConfig, case_of

LOOKED_AT = 4    # tokens that a head is said to look at
LOOK_PAIRS = 128  # pairs over which that is a mean
MOVED = 0.1      # share of attention that goes elsewhere: less is not shown
AT_A_TIME = 32   # pairs whose attention is held at a time
SINK = "the sink"


@dataclass
class RefuteConfig:
    circuit: str = "out/demo/single_double_quote/circuit.json"
    model: str = ""                 # "" = the directory that the circuit names
    task: str = ""                  # a file of pairs that was moved; "" = where the circuit says
    data: str = "data/tinypython"
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("cpu", "cuda")
    pairs: int = bounded(512, at_least=1)  # held-out pairs


# --- one node changed --------------------------------------------------------------------------

def nodes_of(mask: Nodes) -> Iterator[tuple[str, int]]:
    """(site, channel) of every node of a circuit, in the order in which the model runs."""
    for site, kept in mask.items():
        for channel in kept.nonzero().flatten().tolist():
            yield site, channel


def with_gate(mask: Nodes, site: str, channel: int, gate: float) -> Nodes:
    """The gates of a circuit with one of another value: 0 holds the node at its mean, -1 mirrors
    it there."""
    gates = {s: kept.float() for s, kept in mask.items()}
    gates[site][channel] = gate
    return gates


def exchanged(nodes: NodeFn, site: str, channel: int) -> NodeFn:
    """A node function that gives one node the values of the pair's other prompt, after `nodes`.
    Rows 2i and 2i + 1 are a pair, and as long."""
    def node(at: str, x: Tensor) -> Tensor:
        x = nodes(at, x)
        if at != held_at(site):
            return x
        x = x.clone()
        two = x[..., channel].unflatten(0, (-1, 2))  # (pairs, 2, T)
        x[..., channel] = two.flip(1).flatten(0, 1)
        return x
    return node


def as_long(pairs: Pairs) -> Pairs:
    """The pairs whose two prompts have as many tokens."""
    last = pairs.last.unflatten(0, (-1, 2))
    return pairs.take((last[:, 0] == last[:, 1]).nonzero().flatten())


def right(margin: Tensor) -> float:
    """Share of prompts whose right answer has the larger logit."""
    return (margin > 0).float().mean().item()


def of_node(case: Case, pairs: Pairs, same: Pairs, site: str, channel: int) -> dict:
    """The numbers of one node. same: those of the pairs that are `as_long`; where there are none,
    `exchanged` is None."""
    circuit = case.circuit

    def of_circuit(nodes: NodeFn, on: Pairs) -> Tensor:
        margin = margins(case.reduced, on, nodes)
        return calibrated(margin, circuit.scale, circuit.shift)

    held, mirrored = (ablate(with_gate(circuit.mask, site, channel, gate), case.constants)
                      for gate in (0.0, -1.0))
    only = {s: torch.zeros_like(kept) for s, kept in circuit.mask.items()}
    only[site][channel] = True
    found = {
        "site": site, "channel": channel,
        "held": loss_of(of_circuit(held, pairs)),
        "held_in_model": loss_of(margins(case.model, pairs, inverse(only, case.constants))),
        "mirrored": right(of_circuit(mirrored, pairs)),
        "exchanged": None,
    }
    if len(same):
        nodes = exchanged(case.nodes, site, channel)
        found["exchanged"] = right(of_circuit(nodes, same))
    return found


# --- where a head looks ------------------------------------------------------------------------

def in_turn(first: NodeFn, second: NodeFn) -> NodeFn:
    def node(site: str, x: Tensor) -> Tensor:
        return second(site, first(site, x))
    return node


def attention(case: Case, head: int, layer: int, pairs: Pairs, nodes: NodeFn) -> dict[str, float]:
    """{text of a token: share of a head's attention from the last token, the mean over prompts};
    the sink has a name of its own."""
    config = case.model.config
    channels = slice(head * config.d_head, (head + 1) * config.d_head)
    sinks = case.model.transformer.h[layer].attn.attn_imp
    shares = Counter()
    for part in batches_of(pairs, AT_A_TIME):
        seen = {}
        case.reduced.run(case.reduced.embed(part.ids), nodes=in_turn(nodes, record(seen)))
        q = seen[f"{layer}.attn.q"][..., channels]
        k = seen[f"{layer}.attn.k"][..., channels]
        rows = torch.arange(len(q), device=q.device)
        scores = (k @ q[rows, part.last].unsqueeze(-1)).squeeze(-1) / math.sqrt(config.d_head)
        behind = torch.arange(scores.shape[1], device=q.device) > part.last.unsqueeze(1)
        scores = scores.masked_fill(behind, -math.inf)
        if sinks is not None:
            sink = sinks.sink_logit[head].expand(len(scores), 1)
            scores = torch.cat([scores, sink], 1)
        p = scores.softmax(-1)
        for ids, row in zip(part.prompts(), p.tolist()):
            for token, share in zip(ids, row):
                shares[token] += share
            if sinks is not None:
                shares[SINK] += row[-1]
    n = 2 * len(pairs)
    decode = case.tokenizer.decode
    return {key if key == SINK else repr(decode([key])): share / n for key, share in shares.items()}


def heads_of(mask: Nodes, d_head: int) -> Iterator[tuple[int, int]]:
    """(layer, head) of every head that has a value in the circuit."""
    for site, kept in mask.items():
        if site.endswith("attn.v"):
            for head in sorted({c // d_head for c in kept.nonzero().flatten().tolist()}):
                yield int(site.split(".")[0]), head


def of_heads(case: Case, pairs: Pairs) -> list[dict]:
    """Of every head of the circuit: where it looks, and where without each node before it."""
    mask = case.circuit.mask
    order = list(mask)  # sites as the model runs them
    found = []
    for layer, head in heads_of(mask, case.model.config.d_head):
        whole = attention(case, head, layer, pairs, case.nodes)
        without = []
        for site, channel in nodes_of(mask):
            if order.index(site) > order.index(f"{layer}.attn.k"):
                continue
            held = ablate(with_gate(mask, site, channel, 0.0), case.constants)
            looks = attention(case, head, layer, pairs, held)
            moved = sum(abs(looks[token] - whole[token]) for token in whole) / 2
            without.append({"site": site, "channel": channel, "moved": moved, "looks": looks})
        found.append({"layer": layer, "head": head, "looks": whole, "without": without})
    return found


# --- the command -------------------------------------------------------------------------------

def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def most_of(shares: dict[str, float]) -> str:
    """The tokens with the largest shares of a head's attention."""
    most = sorted(shares.items(), key=lambda entry: -entry[1])[:LOOKED_AT]
    return ", ".join(f"{text} {share:.2f}" for text, share in most)


def text_of(found: dict) -> str:
    """Two tables, as Markdown."""
    lines = [f"{found['task']}: alone {found['loss']:.3f} nats, {found['right']:.3f} right; the "
             f"whole model {found['loss_of_model']:.3f} nats; {found['pairs']} held-out pairs, "
             f"{found['as_long']} of them with prompts as long",
             "", "| node | held: nats alone | in the whole model | mirrored: right "
             "| exchanged: right |", "|---|---|---|---|---|"]
    for node in found["nodes"]:
        lines.append(f"| {node['site']}.{node['channel']} | {node['held']:.3f} "
                     f"| {node['held_in_model']:.3f} | {node['mirrored']:.3f} "
                     f"| {number(node['exchanged'])} |")
    lines += ["", "| head | without | moved | looks from the last token at |", "|---|---|---|---|"]
    for head in found["heads"]:
        name = f"{head['layer']}.{head['head']}"
        lines.append(f"| {name} | – | – | {most_of(head['looks'])} |")
        for held in head["without"]:
            if held["moved"] >= MOVED:
                lines.append(f"| {name} | {held['site']}.{held['channel']} | {held['moved']:.2f} "
                             f"| {most_of(held['looks'])} |")
    return "\n".join(lines)


@torch.no_grad()
def refute(cfg: RefuteConfig) -> dict:
    """All numbers of one circuit. ValueError or OSError, in one line, where they are not to be
    had."""
    content = read_circuit(cfg.circuit)
    case = case_of(ValidateConfig(circuit=cfg.circuit, model=cfg.model, task=cfg.task,
                                  data=cfg.data, tokenizer=cfg.tokenizer, device=cfg.device),
                   content)
    pairs = case.heldout.first(cfg.pairs)
    same = as_long(pairs)
    margin = calibrated(margins(case.reduced, pairs, case.nodes), case.circuit.scale,
                        case.circuit.shift)
    return {
        "task": content["task"], "pairs": len(pairs), "as_long": len(same),
        "loss": loss_of(margin), "right": right(margin),
        "loss_of_model": loss_of(margins(case.model, pairs)),
        "nodes": [of_node(case, pairs, same, *node) for node in nodes_of(case.circuit.mask)],
        "heads": of_heads(case, pairs.first(LOOK_PAIRS)),
    }


def main(argv: list[str]) -> int:
    cfg = parse(RefuteConfig, argv)
    try:
        device_of(cfg.device)
        found = refute(cfg)
        path = os.path.join(os.path.dirname(cfg.circuit), "refute.json")
        write_atomic(path, json.dumps(found).encode())
    except (ValueError, OSError) as e:
        die(e)
    print(f"{text_of(found)}\n\n{path}")
    return 0


if __name__ == "__main__":
    as_script(main)
