"""Look inside a model: activations of any site on your prompts; what turns a circuit's nodes on.

    python -m tools.inspect --model=out/demo --prompts=prompts.txt --sites=0.attn.q,1.mlp.post_act
    python -m tools.inspect --model=out/demo --prompts=prompts.jsonl --sites='*.resid_mid' \\
        --positions=last --out=stream.npz
    python -m tools.inspect --circuit=out/demo/single_double_quote/circuit.json

With --prompts, one .npz (default: activations.npz in the model's directory), to numpy.load:
- a key per site, (prompts, T, width) float32; --sites takes names of the table in model.py, globs
  and `all`, that is the residual stream too. Prompts differ in length: T is that of the longest,
  and behind the end of a shorter one is NaN, so that a mean which forgets that is noticed.
- `ids` (prompts, T), -1 behind the end; `tokens` (prompts, T), their texts; `lengths` (prompts,).
- `positions` (prompts, P): of --positions=all|last|0,5,-1 (negative: from each prompt's end), and
  with these activations are (prompts, P, width).

The prompts are a text file, one a line, where \\n, \\t and \\\\ stand for a newline, a tab and a
backslash; or a .jsonl file whose lines are {"prompt": TEXT}, {"prompts": [TEXT, ...]} as task files
have them, or bare; each TEXT may be a list of token ids.

With --circuit, over --tokens of a data file, for every node of the circuit in the whole model: its
mean, the share of tokens on which it is on (not zero: AbsTopK), and examples of tokens that turn it
on, from the highest to the lowest, with what stands around them. They go into circuit.nodes.json
beside circuit.json, and view.py shows them. Memory does not grow with --tokens.
"""
import fnmatch
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, nearest, one_of, parse, write_atomic

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from circuit_file import circuit_of, read_circuit
from data.tinypython.tokenizer import tokenizer_for, tokenizer_hash
from model import GPT, device_of, record
from model_files import weights_hash
from tasks import load_model, prompt_ids
from tokens import check_tokenizer, random_windows, window_of
from view import NODES_FORMAT, nodes_path

PROMPTS_A_BATCH = 8  # few: a large model's activations take 100 MB a layer for so many
BEFORE = 16          # tokens of context in an example
AFTER = 8
SHOWN = 5            # of the highest and of the lowest examples
ROOM = 3 * SHOWN     # as many are kept until the end, for some may show the same text
SAMPLE = 256         # random tokens on which a node is on, to take quantiles from
QUANTILES = (0.99, 0.9, 0.5, 0.1, 0.01)  # of a node's values where it is on, one example each


@dataclass
class InspectConfig:
    model: str = ""                 # a directory in the published format; "" = the circuit's
    prompts: str = ""               # a file: write activations on these
    sites: str = "all"
    positions: str = "all"
    out: str = ""                   # "" = MODEL/activations.npz
    circuit: str = ""               # or a circuit.json: write what turns its nodes on
    data: str = "data/tinypython"   # for that: train.bin or val.bin of this folder
    part: str = one_of("train", "val")
    tokens: int = bounded(65536, at_least=1)
    window: int = bounded(0, at_least=0)  # tokens at a time; 0 = as many as in training
    seed: int = bounded(0, at_least=0)
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("cpu", "cuda")


# --- prompts ---------------------------------------------------------------------------------

def unescaped(line: str) -> str:
    r"""A line of text with \n, \t and \\ as what they stand for; ValueError for other escapes."""
    known = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}

    def meaning(escape: re.Match) -> str:
        if escape[0] not in known:
            raise ValueError(f"{escape[0]} is not one of \\n, \\t and \\\\ (a backslash)")
        return known[escape[0]]

    return re.sub(r"\\.?", meaning, line)


def prompts_of_line(line: str, is_json: bool) -> list:
    """The prompts of one line, texts or lists of ids; none of an empty one. ValueError where it is
    not as it should be."""
    if not line.strip():
        return []
    if not is_json:
        return [unescaped(line)]
    held = json.loads(line)
    if not isinstance(held, dict):
        return [held]
    if isinstance(held.get("prompts"), list):
        return held["prompts"]
    if "prompt" in held:
        return [held["prompt"]]
    raise ValueError('it has neither a "prompt" nor a list of "prompts"')


def read_prompts(path: str, tokenizer, block_size: int) -> list[list[int]]:
    """Token ids of each prompt of a file. ValueError that names the line where one is unusable."""
    found = []
    try:
        with open(path, "rb") as f:
            lines = f.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # a mark of Windows editors
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from e
    for n, line in enumerate(lines, 1):
        try:
            for prompt in prompts_of_line(line.decode().rstrip("\r"), path.endswith(".jsonl")):
                listed = isinstance(prompt, list) and all(type(i) is int for i in prompt)
                if not (listed or isinstance(prompt, str)):
                    raise ValueError("a prompt is a text or a list of token ids")
                found.append(prompt_ids(prompt, tokenizer, block_size))
        except (ValueError, RecursionError) as e:  # of JSON and of UTF-8, too
            raise ValueError(f"{path}, line {n}: {' '.join(str(e).split())}") from e
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


# --- activations on prompts ------------------------------------------------------------------

@torch.no_grad()
def all_sites(model: GPT) -> dict[str, int]:
    """Every site of the table in model.py -> its width, in forward order."""
    seen = {}
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.lm_head.weight.device)
    model.run(model.embed(one), nodes=record(seen))
    return {site: x.shape[-1] for site, x in seen.items()}


def chosen_sites(model: GPT, wanted: str) -> dict[str, int]:
    """The sites that a comma list of names and globs means, with their widths; `all` is all."""
    known = all_sites(model)
    chosen = set()
    for pattern in wanted.split(","):
        hits = fnmatch.filter(known, "*" if pattern == "all" else pattern)
        if not hits:
            raise ValueError(f"the model has no site '{pattern}'; the nearest is "
                             f"'{nearest(pattern, known)}' (the table of sites is in model.py)")
        chosen.update(hits)
    return {site: width for site, width in known.items() if site in chosen}


def chosen_positions(wanted: str, lengths: list[int]) -> list[list[int]]:
    """The positions of each prompt that `all`, `last` or a comma list means, from 0 on. ValueError
    where a prompt is too short for one."""
    if wanted == "all":
        return [list(range(n)) for n in lengths]
    try:
        asked = [-1] if wanted == "last" else [int(text) for text in wanted.split(",")]
    except ValueError:
        raise ValueError(f"positions are all, last or such as 0,5,-1, not '{wanted}'") from None
    for i, n in enumerate(lengths):
        for position in asked:
            if not -n <= position < n:
                raise ValueError(f"prompt {i + 1} has {n} tokens, so no position {position}")
    return [[position % n for position in asked] for n in lengths]


def check_room(n_bytes: int, out: str) -> None:
    """ValueError, with sizes, where memory or the disk has no room for the file `out`."""
    room = {f"on the disk of {out}": shutil.disk_usage(os.path.dirname(out) or ".").free}
    if os.path.exists("/proc/meminfo"):  # Linux; elsewhere nobody says
        with open("/proc/meminfo", encoding="ascii") as f:
            entries = dict(line.split(":") for line in f)
        # in kB; the model needs some of it as it runs
        room["in memory"] = 0.8 * 1024 * int(entries["MemAvailable"].split()[0])
    for where, free in room.items():
        if n_bytes > free:
            raise ValueError(f"the activations take {n_bytes / 1e9:.2f} GB, and {where} there is "
                             f"room for {free / 1e9:.2f}; choose fewer sites, or --positions=last")


@torch.no_grad()
def activations(model: GPT, prompts: list[list[int]], sites: dict[str, int],
                positions: list[list[int]]) -> dict[str, np.ndarray]:
    """Each site's activations, (prompts, P, width) float32; NaN where a prompt has fewer than P
    positions."""
    most = max(map(len, positions))
    found = {site: np.full((len(prompts), most, width), np.nan, dtype=np.float32)
             for site, width in sites.items()}
    for start in range(0, len(prompts), PROMPTS_A_BATCH):
        batch = prompts[start : start + PROMPTS_A_BATCH]
        longest = max(map(len, batch))
        # padded on the right, where a causal model never looks
        rows = [ids + [0] * (longest - len(ids)) for ids in batch]
        idx = torch.tensor(rows, device=model.lm_head.weight.device)

        def keep(site: str, x: Tensor) -> Tensor:
            if site in found:
                for i, at in enumerate(positions[start : start + len(batch)], start):
                    found[site][i, : len(at)] = x[i - start, at].float().cpu().numpy()
            return x

        model.run(model.embed(idx), nodes=keep)
    return found


def write_activations(cfg: InspectConfig) -> str:
    """Run the prompts, write the .npz; returns what to print. ValueError or OSError, in one line
    and with nothing written, where that cannot be done."""
    model, tokenizer = load_model(cfg.model, cfg.tokenizer, device_of(cfg.device))
    prompts = read_prompts(cfg.prompts, tokenizer, model.config.block_size)
    sites = chosen_sites(model, cfg.sites)
    lengths = [len(ids) for ids in prompts]
    positions = chosen_positions(cfg.positions, lengths)
    out = cfg.out or os.path.join(cfg.model, "activations.npz")
    most = max(map(len, positions))
    n_bytes = 4 * len(prompts) * most * sum(sites.values())
    check_room(n_bytes, out)
    longest = max(lengths)
    arrays = {
        "ids": np.array([ids + [-1] * (longest - len(ids)) for ids in prompts]),
        "tokens": np.array([[tokenizer.decode([i]) for i in ids] + [""] * (longest - len(ids))
                            for ids in prompts]),
        "lengths": np.array(lengths),
        "positions": np.array([at + [-1] * (most - len(at)) for at in positions]),
        **activations(model, prompts, sites, positions),
    }
    write_atomic(out, partial(np.savez, **arrays))
    return (f"{len(prompts)} prompts, {most} positions, {len(sites)} sites, "
            f"{n_bytes / 1e6:.1f} MB\n{out}")


# --- what turns the nodes of a circuit on ----------------------------------------------------

class Best:
    """For each of n nodes, the `room` tokens of highest score so far, with what is around them."""
    def __init__(self, n: int, room: int):
        width = BEFORE + 1 + AFTER
        self.room = room
        self.score = torch.empty(n, 0)
        self.ids = torch.empty(n, 0, width, dtype=torch.int64)   # -1 outside the window
        self.values = torch.empty(n, 0, width)                   # (n, found so far, context)

    def offer(self, score: Tensor, row: Tensor, position: Tensor, ids: Tensor, x: Tensor) -> None:
        """score, row, position (n, m): m tokens for each node, -inf where one is not to be had.

        ids (B, T + context) and x (n, B, T + context): padded, so that a context always fits.
        """
        n = len(score)
        score, best = score.topk(min(self.room, score.shape[1]))
        node = torch.arange(n)[:, None, None]
        row = row.expand(n, -1).gather(1, best)[..., None]
        place = position.expand(n, -1).gather(1, best)[..., None]
        place = place + torch.arange(BEFORE + 1 + AFTER)  # padded by BEFORE, so they begin there
        scores = torch.cat([self.score, score], 1)
        self.score, best = scores.topk(min(self.room, scores.shape[1]))
        best = best[..., None].expand(-1, -1, place.shape[2])
        self.ids = torch.cat([self.ids, ids[row, place]], 1).gather(1, best)
        self.values = torch.cat([self.values, x[node, row, place]], 1).gather(1, best)

    def of(self, node: int) -> list[tuple[list[int], list[float]]]:
        """(ids, values) of the contexts of one node, the highest score first."""
        n = int((self.score[node] > -math.inf).sum())
        return list(zip(self.ids[node, :n].tolist(), self.values[node, :n].tolist()))


class Watch:
    """What one site's nodes do over a data file; bounded in size, however many tokens there are."""
    def __init__(self, channels: list[int]):
        n = len(channels)
        self.channels = channels
        self.sum = torch.zeros(n, dtype=torch.float64)
        self.on = torch.zeros(n, dtype=torch.int64)
        self.n_tokens = 0
        self.highest = Best(n, ROOM)
        self.lowest = Best(n, ROOM)
        self.sample = Best(n, SAMPLE)

    def see(self, x: Tensor, ids: Tensor, draw: Tensor) -> None:
        """x (B, T, width): the site's activations; ids (B, T); draw (B, T): random numbers."""
        B, T = ids.shape
        x = x[..., self.channels].float().cpu().permute(2, 0, 1)  # (n, B, T)
        on = x != 0
        self.sum += x.double().sum((1, 2))
        self.on += on.sum((1, 2))
        self.n_tokens += B * T

        padded = F.pad(ids, (BEFORE, AFTER), value=-1)
        values = F.pad(x, (BEFORE, AFTER))
        rows = torch.arange(B)[None]
        never = torch.tensor(-math.inf)
        for best, sign in ((self.highest, 1), (self.lowest, -1)):
            # one a window: a line of a program often has several of them, much alike
            score, position = torch.where(on, sign * x, never).max(2)
            best.offer(score, rows, position, padded, values)
        flat = torch.arange(B * T)[None]
        drawn = torch.where(on, draw, never).flatten(1)
        self.sample.offer(drawn, flat // T, flat % T, padded, values)


def example(quantile: float, ids: list[int], values: list[float], tokenizer) -> dict:
    """A context as the file has it: only what lies in the window, and where the token is in it."""
    inside = [i for i, token in enumerate(ids) if token >= 0]
    return {
        "quantile": quantile,
        "tokens": [tokenizer.decode([ids[i]]) for i in inside],
        "activations": [float(f"{values[i]:.4g}") for i in inside],
        "at": inside.index(BEFORE),
    }


def description(watch: Watch, i: int, tokenizer) -> dict:
    """One node of the file: mean, share on, and examples from the highest to the lowest."""
    def distinct(best: Best) -> list:
        found = {}  # windows may overlap, and programs repeat themselves
        for ids, values in best.of(i):
            found.setdefault(tuple(ids), (ids, values))
        return list(found.values())[:SHOWN]

    examples = [example(1, *found, tokenizer) for found in distinct(watch.highest)]
    sample = sorted(watch.sample.of(i), key=lambda found: found[1][BEFORE])
    for quantile in QUANTILES if sample else ():
        found = sample[round(quantile * (len(sample) - 1))]
        examples.append(example(quantile, *found, tokenizer))
    examples += [example(0, *found, tokenizer) for found in reversed(distinct(watch.lowest))]
    return {
        "channel": watch.channels[i],
        "mean": round(watch.sum[i].item() / watch.n_tokens, 6),
        "on": watch.on[i].item() / watch.n_tokens,
        "examples": examples,
    }


@torch.no_grad()
def describe(model: GPT, tokenizer, nodes: dict[str, list[int]], path: str, tokens: int,
             window: int, seed: int) -> dict:
    """{site: a description of each of its channels} over about `tokens` tokens of a data file.
    ValueError where that is no data for this model."""
    watches = {site: Watch(channels) for site, channels in nodes.items()}
    generator = torch.Generator().manual_seed(seed)
    device = model.lm_head.weight.device
    for ids in random_windows(path, model.config.vocab_size, window, tokens, seed, device):
        draw = torch.rand(ids.shape, generator=generator)  # one token's chance is its number's

        def see(site: str, x: Tensor) -> Tensor:
            if site in watches:
                watches[site].see(x, ids.cpu(), draw)
            return x

        model.run(model.embed(ids), nodes=see)
    return {site: [description(watch, i, tokenizer) for i in range(len(watch.channels))]
            for site, watch in watches.items()}


def write_nodes(circuit_path: str, sha256: str, source: dict, nodes: dict) -> str:
    """Write what view.py's `read_nodes` reads, beside the circuit; returns the path."""
    out = str(nodes_path(circuit_path))
    content = {"format": NODES_FORMAT, "model": sha256, **source, "nodes": nodes}
    write_atomic(out, json.dumps(content, separators=(",", ":")).encode())
    return out


def write_descriptions(cfg: InspectConfig) -> str:
    """Describe the nodes of a circuit file, beside it; returns what to print. Errors as above."""
    content = read_circuit(cfg.circuit)
    folder = cfg.model or content["model"]["dir"]
    model, tokenizer = load_model(folder, cfg.tokenizer, device_of(cfg.device))
    if weights_hash(folder) != content["model"]["sha256"]:
        raise ValueError(f"the weights in {folder} are not those of {cfg.circuit}; "
                         "give --model=DIR, or prune the task again")
    circuit_of(content, model)  # that its names and weights are the model's
    check_tokenizer(cfg.data, tokenizer_hash(tokenizer_for(folder, cfg.tokenizer)))
    path = os.path.join(cfg.data, f"{cfg.part}.bin")
    window = window_of(folder, model.config.block_size, cfg.window)
    nodes = describe(model, tokenizer, content["nodes"], path, cfg.tokens, window, cfg.seed)
    source = {"data": path, "tokens": cfg.tokens, "window": window, "seed": cfg.seed}
    out = write_nodes(cfg.circuit, content["model"]["sha256"], source, nodes)
    return (f"{content['n_nodes']} nodes over {cfg.tokens} tokens of {path}\n{out}\n"
            f"now python view.py {cfg.circuit} shows them")


# --- the command -----------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg = parse(InspectConfig, argv)
    try:
        if bool(cfg.prompts) == bool(cfg.circuit):
            raise ValueError("give either --prompts=FILE and --model=DIR, or --circuit=FILE")
        if cfg.prompts and not cfg.model:
            raise ValueError("say which model with --model=DIR")
        print(write_activations(cfg) if cfg.prompts else write_descriptions(cfg))
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
