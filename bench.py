"""Speed figures, as ratios measured in one run.

    python bench.py [--config=configs/demo.toml]     # half a minute on 2 CPU cores

- The projection's share of a training step, and the cost of sparsity: a step against the dense one.
Random tokens; the time of a step does not depend on what they say. Medians of interleaved repetitions.
"""
import statistics
import sys
import time
from dataclasses import replace

import torch

from config import parse
from optim import L0AdamW, clip_rms_, param_groups, project_
from model import GPT
from train import TrainConfig, model_config

VOCAB, REPEATS = 2048, 9


def stepper(cfg: TrainConfig):
    """(one training step without its projection, the projection alone) as two functions."""
    torch.manual_seed(0)
    model = GPT(model_config(cfg, VOCAB))
    groups = param_groups(model, cfg.density)
    optimizer = L0AdamW(groups, lr=cfg.lr)  # the groups' density stays 1, so that step() does not project
    idx = torch.randint(VOCAB, (cfg.batch_size, cfg.block_size))

    def step():
        model(idx, idx)[1].backward()
        clip_rms_([p for g in groups for p in g["params"]], cfg.grad_rms)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def project():
        for g in groups:
            if g["target_density"] is not None:
                for p in g["params"]:
                    project_(p, cfg.density, g["neuron_axis"], cfg.min_per_neuron)

    return step, project


def main(argv: list[str]) -> int:
    cfg = parse(TrainConfig, argv)
    step, project = stepper(cfg)
    dense, _ = stepper(replace(cfg, density=1.0, afrac=0.0))
    times = {"step": [], "project": [], "dense": []}
    for i in range(REPEATS + 2):
        for name, f in (("step", step), ("project", project), ("dense", dense)):
            start = time.perf_counter()
            f()
            if i >= 2:  # warm by then
                times[name].append(time.perf_counter() - start)
    t = {name: statistics.median(ts) for name, ts in times.items()}
    tokens, whole = cfg.batch_size * cfg.block_size, t["step"] + t["project"]
    print(f"{cfg.n_layer} layers, width {cfg.d_model}, {cfg.batch_size} x {cfg.block_size} tokens a step, density {cfg.density}, "
          f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"sparse step {tokens / whole:,.0f} tokens/s, dense step {tokens / t['dense']:,.0f}; ratio {t['dense'] / whole:.2f}")
    print(f"projection: {t['project'] / whole:.1%} of a step")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
