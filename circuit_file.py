"""circuit.json: a circuit measured and described, and the one reader and writer of its file.

- `content_of`: a circuit that pruning found, with its losses on held-out pairs and examples of what
  its nodes do, as the file has it.
- `write_circuit`, `read_circuit`: the file; what was cut short or edited is refused in one line.
- `circuit_of`: from a file's content back to nodes and edges of a model.

Whatever shows, checks or uses a circuit (view.py, validate.py, steer.py, tools/) starts here.
"""
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from circuit import (FINAL, Circuit, Nodes, ablate, all_edges, count, edges_of, graph_of, heads_of,
                     inverse, without_edges)
from config import nearest, write_atomic
from model import GPT, SITES
from tasks import Pairs, Task, calibrated, loss_of, margins


# --- a circuit, measured and described -----------------------------------------------------------

@dataclass
class Found:
    """A circuit that pruning found, and what it takes to measure and describe it."""
    model: GPT
    model_dir: str
    sha256: str         # of the model's weights, as they were loaded
    data: str | None    # `fingerprint` of the tokens that the means are of; None where unknown
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
        "model": {"dir": found.model_dir, "sha256": found.sha256,
                  **{key: getattr(model.config, key) for key in shape}},
        "data": found.data,
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
        **stream_ends(model, circuit.mask, found.heldout, answers, found.tokenizer),
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


def stream_ends(model: GPT, mask: Nodes, pairs: Pairs, answers: list[int], tokenizer) -> dict:
    """Where the circuit's channels start and end: [token id, text, channel, weight] of the
    embedding (channels that it reads, tokens of the prompts of `pairs`, largest first) and of the
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
    place = torch.arange(pairs.ids.shape[1], device=pairs.ids.device)
    tokens = pairs.ids[place <= pairs.last[:, None]].unique()  # without the padding
    last = (FINAL,) if FINAL in mask else ("resid_delta",)  # what the answers read
    return {
        # a page has room for a dozen
        "embedding": entries(wte, tokens, ("act_in", FINAL), 12),
        "unembedding": entries(head, torch.tensor(answers, device=tokens.device), last, 12),
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

FORMAT = "sparse-circuit-2"  # to be changed with what the keys below mean; 1 held values themselves
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
RUN_KEYS = dict(met=bool, flat=bool, edges=int)  # of one run of a control (controls.py)
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
    for key in ("target", "necessity", "pairs"):
        _need(isinstance(minimal.get(key, 0), (int, float)),
              f"'validation.minimal.{key}' is no number")
    _need(isinstance(c["validation"].get("card", {}), dict), "'validation.card' is no object")
    controls = c["validation"].get("controls", {})
    _need(isinstance(controls, dict) and all(isinstance(runs, list) for runs in controls.values()),
          "'validation.controls' is not a list of runs for each control")
    for key, runs in controls.items():
        for run in runs:
            _need_keys(run, RUN_KEYS, f"validation.controls.{key}.")
    for head in c.get("heads", []):  # older files lack them
        kinds = [type(x) for x in head]
        _need(kinds in ([int, int, float], [int, int, type(None)], [int, int, int])
              and 0 <= head[0] < c["model"]["n_layer"] and 0 <= head[1] < c["model"]["n_head"],
              f"head {head} is not [layer, head, logit of the sink]")
        width = c["model"]["n_head"] * c["model"]["d_head"]
        for site in (f"{head[0]}.attn.q", f"{head[0]}.attn.k"):
            _need(len(c["means"].get(site, ())) == width,
                  f"'means.{site}' has not a number for each of {width} channels")
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
