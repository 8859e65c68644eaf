"""The memory of a training step, as plan.py predicts it and as it is, at three sizes.

    python -m tools.bench_memory                                  # five minutes and 9 GB, on a CPU
    python -m tools.bench_memory --device=cuda --dtype=bfloat16

What PyTorch has allocated at the peak, with and without checkpointing. On a CPU the process can
hold up to twice as much, because glibc keeps for later what was freed.
"""
from dataclasses import dataclass

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, parse

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from jobs import Job, Run
from model import GPT, device_of
from plan import memory
from tokens import Tokens
from train import TrainConfig, model_config, new_model, optimizer_of, train_step

VOCAB = 2048  # as in data/tinypython
STEPS = 2  # from the second on the optimizer's moments are there
# layers, width, sequences of 256 tokens
SIZES = ((4, 512, 32), (8, 1024, 16), (8, 2048, 4))


@dataclass
class MemoryConfig:
    device: str = one_of("auto", "cpu", "cuda")
    dtype: str = one_of("float32", "bfloat16")
    sizes: int = bounded(len(SIZES), at_least=1, at_most=len(SIZES))  # the first so many of three


def settings(cfg: MemoryConfig, size: tuple[int, int, int], checkpointing: bool) -> TrainConfig:
    layers, width, rows = size
    return TrainConfig(n_layer=layers, d_model=width, block_size=256, batch_size=rows,
                       device=device_of(cfg.device), dtype=cfg.dtype, density=1 / 64,
                       embed_density=1 / 16, grad_checkpointing=checkpointing)


def predicted(train: TrainConfig) -> int:
    """Bytes, by plan.py."""
    with torch.device("meta"):
        model = GPT(model_config(train, VOCAB))
    model.transformer.wpe.weight.requires_grad_(False)
    return memory(train, model, train.batch_size, train.grad_checkpointing).peak


def measured(train: TrainConfig) -> int:
    """Bytes, by a few steps on random tokens."""
    if train.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        take_steps(train)
        return torch.cuda.max_memory_allocated()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        take_steps(train)
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=order)
    return int(np.cumsum([e.nbytes() for e in events]).max())


def order(event) -> int:
    return event.start_ns()


def take_steps(train: TrainConfig) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 100_000).astype("<u2")
    tokens = Tokens([ids])
    table = torch.zeros(VOCAB, VOCAB, device=train.device)  # what evaluation compares with
    run = Run(train, 0, 1, train.device, tokens, tokens, {"vocab_size": VOCAB}, table)
    model = new_model(run)
    job = Job(model, {"model": model}, optimizer_of(train, model), evaluate=dict, text=str)
    for step in range(STEPS):
        train_step(run, job, model, step)


def main(argv: list[str]) -> int:
    cfg = parse(MemoryConfig, argv)
    try:
        device_of(cfg.device)
    except ValueError as e:
        die(e)
    print("layers x width  sequences  checkpointing  predicted  measured  ratio")
    for size in SIZES[: cfg.sizes]:
        layers, width, rows = size
        for checkpointing in (False, True):
            train = settings(cfg, size, checkpointing)
            want = predicted(train) / 1e9
            got = measured(train) / 1e9
            print(f"{f'{layers} x {width}':<14}  {rows:>9}  {'on' if checkpointing else 'off':>13}"
                  f"  {want:>6.3f} GB {got:>6.3f} GB  {want / got:>5.2f}", flush=True)
    return 0


if __name__ == "__main__":
    as_script(main)
