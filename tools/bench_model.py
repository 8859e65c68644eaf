"""What it takes to prune a saved model, piece by piece: time of each, memory of all.

    python -m tools.bench_model --model=DIR [--task=single_double_quote]

- Loading, and the first forward pass, in which the pages of a mapped file are read.
- A forward pass over the prompts of 16 pairs, a step of mask learning on them, and what comes
  before the first step.
- Means of all nodes over 65,536 tokens of random ids: their values do not matter to the time.
- A trial of minimising on 64 pairs: one node left out of a circuit of the 300 of largest effect.

Seconds are medians of five where a piece takes less than one. DIR is a run or a published model.
"""
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, parse

import numpy as np
import torch

from circuit import all_edges
from minimise import quiet
from model import GPT
from masks import Gates, attribution, learn_masks
from prune import PruneConfig, node_means
from search import Search, parts_of, without
from tasks import Pairs, load_model, load_pairs, task_of
from tokens import window_of

NODES = 300   # of the circuit that trials start from: about what learned masks leave
TRIALS = 24
REPEATS = 5


@dataclass
class BenchModelConfig:
    model: str = ""  # a directory
    task: str = "single_double_quote"
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    mean_tokens: int = bounded(65536, at_least=1)
    steps: int = bounded(5, at_least=1)  # of mask learning


def seconds(job: Callable[[], object]) -> float:
    """How long it takes; the median of REPEATS where that is less than a second."""
    times = []
    while len(times) < REPEATS and (not times or times[0] < 1):
        clock = time.perf_counter()
        job()
        times.append(time.perf_counter() - clock)
    return statistics.median(times)


def once(job: Callable[[], object]) -> tuple[object, float]:
    """What it returns, and how long its first run takes."""
    clock = time.perf_counter()
    result = job()
    return result, time.perf_counter() - clock


def say(name: str, took: float) -> None:
    print(f"{name:<52} {took:8.3f} s", flush=True)


def means(cfg: BenchModelConfig, model: GPT) -> dict[str, torch.Tensor]:
    """The means of all nodes over random tokens, read from a file as always."""
    window = window_of(cfg.model, model.config.block_size, 0)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=cfg.mean_tokens)
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "train.bin")
        ids.astype("<u2").tofile(path)
        constants, took = once(
            partial(node_means, model, path, cfg.mean_tokens, 0, window=window))
    say(f"means over {cfg.mean_tokens:,} tokens, {window} at a time", took)
    return constants


def mask_learning(cfg: BenchModelConfig, model: GPT, pairs: Pairs, constants: dict) -> None:
    """A step, and all that comes before the first."""
    gates = Gates(model, tie_qk=False)
    settings = PruneConfig(batch_pairs=len(pairs))
    times = []
    for steps in (1, 1, 1 + cfg.steps):  # the first call alone prepares what the others find ready
        settings.steps = steps
        job = partial(learn_masks, model, pairs, constants, gates, settings, quiet)
        times.append(once(job)[1])
    step = (times[2] - times[1]) / cfg.steps
    say("before the first step of mask learning", times[0] - step)
    say(f"a step of mask learning ({cfg.steps} of them)", step)


@torch.no_grad()
def pass_over(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """The stream after all layers, for prompts (B, T)."""
    return model.run(model.embed(ids))


def trials(model: GPT, pairs: Pairs, constants: dict) -> None:
    """Trials of minimising, each of another node."""
    gates = Gates(model, tie_qk=False)
    effect = attribution(model, pairs, constants, gates)
    largest = torch.zeros(len(effect), dtype=torch.bool)
    largest[effect.topk(min(NODES, len(effect))).indices] = True
    search, took = once(partial(Search, model, constants, pairs))
    say(f"a search on {len(pairs)} pairs made ready", took)
    circuit, took = once(partial(search.fit, gates.split(largest), all_edges(model)))
    say(f"its first circuit, {circuit.size[0]} nodes and {circuit.size[1]} edges", took)
    search.accept()
    nodes = [part for part in parts_of(circuit) if len(part) == 2]
    times = []
    for part in nodes[:: max(1, len(nodes) // TRIALS)]:
        times.append(once(partial(search.fit, *without(circuit, part)))[1])
    say(f"a trial: one node left out (median of {len(times)})", statistics.median(times))


def run(cfg: BenchModelConfig) -> None:
    """Every piece in turn, a line each."""
    if not cfg.model:
        raise ValueError("--model is missing: the directory of a run or of a published model")
    task = task_of(cfg.task)
    (model, tokenizer), took = once(partial(load_model, cfg.model, cfg.tokenizer, "cpu"))
    n = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{cfg.model}: {n:,.0f}M parameters; {torch.get_num_threads()} CPU threads, "
          f"torch {torch.__version__}")
    say("load", took)
    pairs = load_pairs(task, tokenizer, 64, "train", model.config.block_size)
    few = pairs.first(16)
    prompts, tokens = few.ids.shape
    forward = partial(pass_over, model, few.ids)
    say(f"first forward pass, {prompts} prompts of {tokens} tokens", once(forward)[1])
    say("a forward pass", seconds(forward))
    constants = means(cfg, model)
    mask_learning(cfg, model, few, constants)
    trials(model, pairs, constants)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    print(f"{'peak memory, the mapped file included':<52} {peak / 1e9:8.2f} GB")


def main(argv: list[str]) -> int:
    cfg = parse(BenchModelConfig, argv)
    try:
        run(cfg)
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
