"""What each node of a circuit does, put to the test: the numbers that could refute what is said.

    python -m tools.refute --circuit=out/demo/single_double_quote/circuit.json

For every node, on held-out pairs, in the circuit alone:
- *held*: its loss (nats, calibrated as in the file) and the share of prompts answered right, with
  this node at its mean as well; and the whole model's loss with this node alone at its mean. Where
  neither changes, the node does nothing that matters, whatever its examples look like.
- *mirrored*: the share of prompts whose answer turns with the node on the other side of its mean,
  and the share that then get the first answer. A node that says which answer it is turns all, or
  those of one answer; one that only says "here" breaks them.
- *exchanged*: the share whose answer turns with the values that the node has in the pair's other
  prompt, token by token (counted from the start as far as the two are the same, and behind that
  from the end). What carries the difference between the two turns the answers; what is the same in
  both cannot.

For every head: where it looks from the last token, and with --look_from, a token's text, also from
where that stands last; and where it would look without each node that runs before it, where that
moves a tenth of its attention or more.

What it prints goes into refute.json beside circuit.json.
"""
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, parse, write_atomic

import torch
from torch import Tensor

from circuit import Nodes, ablate, heads_of, held_at, inverse
from circuit_file import read_circuit
from case import Case, CaseConfig, case_of
from model import NodeFn, device_of, record
from tasks import (Pairs, answer_id, batches_of, calibrated, last_logits, loss_of, margin_of,
                   margins)
from tools.inspect import unescaped

LOOKED_AT = 4    # tokens that a head is said to look at
LOOK_PAIRS = 128  # pairs over which that is a mean
MOVED = 0.1      # share of attention that goes elsewhere: less is not shown
AT_A_TIME = 32   # pairs in a pass
SINK = "the sink"
# keys of a node's numbers, as they are printed
NUMBERS = ("held", "held_right", "held_in_model", "mirrored_turned", "mirrored_first",
           "exchanged_turned")


@dataclass
class RefuteConfig(CaseConfig):
    pairs: int = bounded(512, at_least=1)  # held-out pairs
    look_from: str = ""             # a token, in which \\n stands for a newline


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


def counterparts(pairs: Pairs) -> Tensor:
    """(2n, T): of each token of a prompt, where it stands in the pair's other prompt; -1 where that
    has none. From the start as far as the two are the same, behind that from the end; the last
    token's is the last one."""
    rows, width = pairs.ids.shape
    place = torch.arange(width, device=pairs.ids.device).expand(rows, width)
    other_ids, other_last = (x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
                             for x in (pairs.ids, pairs.last))
    same_so_far = (pairs.ids == other_ids).cumprod(1).bool()
    from_end = place + (other_last - pairs.last).unsqueeze(1)
    met = from_end >= same_so_far.sum(1, keepdim=True)  # or else it stands in what is the same
    inside = place <= pairs.last.unsqueeze(1)
    found = torch.where(same_so_far, place, torch.where(met & inside, from_end, -1))
    return torch.where(place == pairs.last.unsqueeze(1), other_last.unsqueeze(1), found)


def exchanged(nodes: NodeFn, site: str, channel: int, where: Tensor) -> NodeFn:
    """A node function that gives one node the values of the pair's other prompt, after `nodes`.
    where: the `counterparts` of the prompts that the model is run on."""
    def node(at: str, x: Tensor) -> Tensor:
        x = nodes(at, x)
        if at != held_at(site):
            return x
        own = x[..., channel]
        other = own.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        x = x.clone()
        x[..., channel] = torch.where(where >= 0, other.gather(1, where.clamp(min=0)), own)
        return x
    return node


def right(margin: Tensor) -> float:
    """Share of prompts whose right answer has the larger logit."""
    return share(margin > 0)


def share(chosen: Tensor) -> float:
    return chosen.float().mean().item()


def of_node(case: Case, pairs: Pairs, whole: Tensor, site: str, channel: int) -> dict:
    """The numbers of one node. whole: the circuit's margins."""
    circuit = case.circuit

    def of_circuit(margin: Tensor) -> Tensor:
        return calibrated(margin, circuit.scale, circuit.shift)

    def gated(gate: float) -> Tensor:
        nodes = ablate(with_gate(circuit.mask, site, channel, gate), case.constants)
        return of_circuit(margins(case.reduced, pairs, nodes))

    def from_other(part: Pairs) -> Tensor:
        nodes = exchanged(case.nodes, site, channel, counterparts(part))
        return margin_of(last_logits(case.reduced, part, nodes), part)

    only = {s: torch.zeros_like(kept) for s, kept in circuit.mask.items()}
    only[site][channel] = True
    held = gated(0.0)
    mirrored = gated(-1.0)
    other = of_circuit(torch.cat([from_other(part) for part in batches_of(pairs, AT_A_TIME)]))
    # of the margins of right answers, those of first answers are in even rows
    first = torch.cat([mirrored[::2] > 0, mirrored[1::2] <= 0])
    return {
        "site": site, "channel": channel,
        "held": loss_of(held), "held_right": right(held),
        "held_in_model": loss_of(margins(case.model, pairs, inverse(only, case.constants))),
        "mirrored_turned": share((mirrored > 0) != (whole > 0)), "mirrored_first": share(first),
        "exchanged_turned": share((other > 0) != (whole > 0)),
    }


# --- where a head looks ------------------------------------------------------------------------

def in_turn(first: NodeFn, second: NodeFn) -> NodeFn:
    def node(site: str, x: Tensor) -> Tensor:
        return second(site, first(site, x))
    return node


def places_of(pairs: Pairs, token: int | None) -> Tensor:
    """(2n,): where each prompt has a token last, -1 where it has none; None: its last token."""
    if token is None:
        return pairs.last
    place = torch.arange(pairs.ids.shape[1], device=pairs.ids.device)
    there = (pairs.ids == token) & (place <= pairs.last.unsqueeze(1))
    return torch.where(there, place, -1).max(1).values


def attention(case: Case, pairs: Pairs, nodes: NodeFn,
              token: int | None = None) -> list[dict[str, float]]:
    """Of each of the circuit's `heads_of`: {text of a token: share of its attention from the last
    token, or from where `token` stands last, the mean over the prompts that have it}; the sink has
    a name of its own."""
    heads = heads_of(case.model, case.circuit.mask)
    shares = [Counter() for _ in heads]
    n = 0
    for part in batches_of(pairs, AT_A_TIME):
        seen = {}
        case.reduced.run(case.reduced.embed(part.ids), nodes=in_turn(nodes, record(seen)))
        place = places_of(part, token)
        there = place >= 0
        n += int(there.sum())
        prompts = [ids for ids, has in zip(part.prompts(), there.tolist()) if has]
        for (layer, head, sink), of_head in zip(heads, shares):
            for ids, row in zip(prompts, looks_of(case, seen, layer, head, place)[there].tolist()):
                for seen_token, share in zip(ids, row):
                    of_head[seen_token] += share
                if sink is not None:
                    of_head[SINK] += row[-1]
    return [by_text(of_head, n, case) for of_head in shares]


def looks_of(case: Case, seen: dict[str, Tensor], layer: int, head: int, place: Tensor) -> Tensor:
    """Attention (2n, T) of a head from one place of each prompt to every token, and, where there
    is a sink, to that as a last column. seen: queries and keys, as `record` keeps them."""
    d_head = case.model.config.d_head
    channels = slice(head * d_head, (head + 1) * d_head)
    q = seen[f"{layer}.attn.q"][..., channels]
    k = seen[f"{layer}.attn.k"][..., channels]
    rows = torch.arange(len(q), device=q.device)
    scores = (k @ q[rows, place].unsqueeze(-1)).squeeze(-1) / math.sqrt(d_head)
    behind = torch.arange(scores.shape[1], device=q.device) > place.unsqueeze(1)
    scores = scores.masked_fill(behind, -math.inf)
    sinks = case.model.transformer.h[layer].attn.attn_imp
    if sinks is not None:
        sink = sinks.sink_logit[head].expand(len(scores), 1)
        scores = torch.cat([scores, sink], 1)
    return scores.softmax(-1)


def by_text(totals: Counter, n: int, case: Case) -> dict[str, float]:
    """The means of n totals, by the texts of their tokens; parts of characters share one."""
    found = Counter()
    for key, total in totals.items():
        found[key if key == SINK else repr(case.tokenizer.decode([key]))] += total / n
    return dict(found)


def of_heads(case: Case, pairs: Pairs, token: int | None) -> list[dict]:
    """Of every head of the circuit: where it looks, and where without each node before it. token:
    as for `attention`."""
    mask = case.circuit.mask
    order = list(mask)  # sites as the model runs them
    found = []
    for (layer, head, _), looks in zip(heads_of(case.model, mask),
                                       attention(case, pairs, case.nodes, token)):
        found.append({"layer": layer, "head": head, "looks": looks, "without": []})
    for site, channel in nodes_of(mask):
        before = [order.index(site) <= order.index(f"{head['layer']}.attn.k") for head in found]
        if not any(before):
            continue
        # one run shows where all heads look
        held = ablate(with_gate(mask, site, channel, 0.0), case.constants)
        for head, is_before, looks in zip(found, before, attention(case, pairs, held, token)):
            if is_before:
                whole = head["looks"]
                moved = sum(abs(looks[text] - whole[text]) for text in whole) / 2
                head["without"].append({"site": site, "channel": channel, "moved": moved,
                                        "looks": looks})
    return found


# --- the command -------------------------------------------------------------------------------

def most_of(shares: dict[str, float]) -> str:
    """The tokens with the largest shares of a head's attention."""
    most = sorted(shares.items(), key=lambda entry: -entry[1])[:LOOKED_AT]
    return ", ".join(f"{text} {share:.2f}" for text, share in most)


def text_of(found: dict) -> str:
    """Two tables, as Markdown."""
    lines = [f"{found['task']}: alone {found['loss']:.3f} nats, {found['right']:.3f} right; the "
             f"whole model {found['loss_of_model']:.3f} nats; {found['pairs']} held-out pairs",
             "", "| node | held: nats | right | in the whole model: nats | mirrored: turned "
             "| first answer | exchanged: turned |", "|---|---|---|---|---|---|---|"]
    for node in found["nodes"]:
        numbers = [node[key] for key in NUMBERS]
        lines.append(f"| {node['site']}.{node['channel']} | "
                     f"{' | '.join(f'{x:.3f}' for x in numbers)} |")
    for start, heads in found["heads"].items():
        place = repr(start) if start else "the last token"
        lines += ["", f"| head | without | moved | looks from {place} at |", "|---|---|---|---|"]
        for head in heads:
            name = f"{head['layer']}.{head['head']}"
            lines.append(f"| {name} | – | – | {most_of(head['looks'])} |")
            for held in head["without"]:
                if held["moved"] >= MOVED:
                    lines.append(f"| {name} | {held['site']}.{held['channel']} "
                                 f"| {held['moved']:.2f} | {most_of(held['looks'])} |")
    return "\n".join(lines)


def token_of(text: str, case: Case, pairs: Pairs) -> int:
    """The id of --look_from. ValueError where it is no token of the prompts."""
    token = answer_id(text, case.tokenizer)
    if (places_of(pairs, token) < 0).all():
        raise ValueError(f"no prompt has the token {text!r} of --look_from")
    return token


@torch.no_grad()
def refute(cfg: RefuteConfig) -> dict:
    """All numbers of one circuit. ValueError or OSError, in one line, where they are not to be
    had."""
    content = read_circuit(cfg.circuit)
    case = case_of(cfg, content)
    pairs = case.heldout.first(cfg.pairs)
    looking = pairs.first(LOOK_PAIRS)
    starts = {"": None}
    if cfg.look_from:
        text = unescaped(cfg.look_from)
        starts[text] = token_of(text, case, looking)
    whole = calibrated(margins(case.reduced, pairs, case.nodes), case.circuit.scale,
                       case.circuit.shift)
    return {
        "task": content["task"], "pairs": len(pairs), "loss": loss_of(whole), "right": right(whole),
        "loss_of_model": loss_of(margins(case.model, pairs)),
        "nodes": [of_node(case, pairs, whole, *node) for node in nodes_of(case.circuit.mask)],
        "heads": {start: of_heads(case, looking, token) for start, token in starts.items()},
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
