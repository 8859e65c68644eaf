"""Train a weight-sparse GPT (or, with --density=1 --afrac=0, its dense baseline).

- One process:       python train.py --config=configs/demo.toml --key=value ...
- Many, CPU or CUDA: torchrun --nproc_per_node=N train.py --config=configs/demo.toml
- A run is a directory: the published model files, train.toml, log.jsonl, state.pt (to resume).
- What it would take, without taking it: python train.py --config=... --plan
- Data order is a function of (seed, step); a resumed run is bitwise the run that never stopped.
- Ctrl-C, SIGTERM: the step is finished and saved. A loss that is not finite stops the run.
- `begin`, `loop` and what they call is bridge.py's too; what the loop trains is a `Job`.

Paper sections 2.1 and A.2.
"""
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, parse

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jobs import (Job, Run, Saver, agree_to_stop, catch_signals, leave, meet, others_may_die,
                  own_directory, prepare_directory, restore, save_modules, say_how_to_go_on)
from model import GPT, SITES, GPTConfig, device_of
from optim import L0AdamW, density_at, lr_factor_at, param_groups, scale_rms_
from plan import text_of_plan
from tokens import (LARGEST_TABLE, bigram_log_probs, inputs_and_targets, read_bigrams, read_data,
                    vocab_of)


@dataclass
class TrainConfig:
    out_dir: str = "out/train"
    data_dir: str = "data/tinypython"
    resume: bool = False          # go on from out_dir/state.pt where there is one
    plan: bool = False            # print what the run would take, and end
    seed: int = bounded(0, at_least=0)
    device: str = one_of("auto", "cpu", "cuda")
    dtype: str = one_of("float32", "bfloat16")  # autocast, with float32 weights and moments
    compile: bool = False
    # the published family by its two numbers: width 256 * expansion, matrices at
    # pfrac / expansion^2 and embeddings at pfrac / expansion; 0 = by the settings below
    expansion: int = bounded(0, at_least=0)
    pfrac: float = bounded(0.0, at_least=0)
    # model (paper 2.1, A.1)
    n_layer: int = bounded(2, at_least=1)
    d_model: int = bounded(256, at_least=1)
    n_head: int = bounded(0, at_least=0)  # 0 = d_model / d_head
    d_head: int = bounded(16, at_least=1)
    d_mlp: int = bounded(0, at_least=0)   # 0 = 4 * d_model
    block_size: int = bounded(128, at_least=1)  # tokens
    afrac: float = bounded(0.25, at_least=0, at_most=1)  # share that AbsTopK keeps; 0 = off
    afrac_loctypes: str = ",".join(SITES.values())       # where, by the published names
    sink: bool = True
    # concat: d_pos_emb learnt channels beside each read; sinusoids: the same, fixed
    positions: str = one_of("none", "added", "concat", "sinusoids")
    d_pos_emb: int = 16
    # learned from zero; or counted on the data, and then fixed or learned further
    bigram: str = one_of("learned", "none", "counts", "refined")
    grad_checkpointing: bool = False
    # optimizer (paper A.2)
    batch_size: int = bounded(32, at_least=1)  # sequences per step, over all processes
    grad_accum: int = bounded(1, at_least=1)   # micro-steps per step
    max_steps: int = bounded(1000, at_least=1)
    # at the final density; while more is kept it is smaller, by sqrt(density at the end / now)
    lr: float = bounded(0.075, above=0)
    warmup: float = bounded(0.01, at_least=0, below=1)     # fraction of training
    sharkfin: bool = True         # false = without that factor, to see what it does (paper A.2)
    # shares of the weights that are left at the end; 1 = dense
    density: float = bounded(0.02, above=0, at_most=1)     # of the matrices
    embed_density: float = bounded(0.0, at_least=0, at_most=1)  # of embeddings; 0 = density
    bias_density: float = bounded(0.0, at_least=0, at_most=1)   # of biases; 0 = density
    # fractions of training between which they fall from 1
    anneal_start: float = bounded(0.01, at_least=0, at_most=1)
    anneal_end: float = bounded(0.5, at_least=0, at_most=1)
    min_per_neuron: int = bounded(4, at_least=0)  # j: nonzeros that a neuron keeps in any case
    weight_decay: float = bounded(0.1, at_least=0, below=1)  # of matrices and embeddings, times lr
    beta1: float = bounded(0.9, at_least=0, below=1)
    beta2: float = bounded(0.95, at_least=0, below=1)
    eps: float = bounded(0.1, above=0)  # of this size, because gradients have an RMS of 1
    grad_rms: str = one_of("normalize", "clip")  # the gradient's RMS, to 1 or to at most 1
    # reporting
    log_interval: int = bounded(10, at_least=1)  # steps
    eval_interval: int = bounded(250, at_least=1)
    eval_tokens: int = bounded(32768, at_least=1)  # per part of the validation data
    save_interval: int = bounded(250, at_least=1)
    keep_every: int = bounded(0, at_least=0)  # a copy of the model each so many steps; 0 = none
    tokenizer_hash: str = ""  # of the data's tokenizer: filled in, and kept with the run


CPP_COMPILERS = ("g++", "clang++", "c++")  # what torch.compile looks for
COUNTED = ("counts", "refined")  # bigram tables that start from the data's counts
BESIDE = ("concat", "sinusoids")  # positions that stand beside each read
TINYPYTHON_VOCAB = 2048  # of our tokenizer and of the published models

def of_the_family(cfg: TrainConfig) -> TrainConfig:
    """With the widths and densities that `expansion` and `pfrac` stand for, where given."""
    if cfg.expansion == 0 and cfg.pfrac == 0:
        return cfg
    if cfg.expansion == 0 or not 0 < cfg.pfrac <= cfg.expansion:
        die(f"expansion {cfg.expansion} and pfrac {cfg.pfrac} name no model: give both, and pfrac "
            "at most as large as expansion")
    e = cfg.expansion
    meant = dict(d_model=256 * e, n_head=0, d_mlp=0, density=cfg.pfrac / e**2,
                 embed_density=cfg.pfrac / e)
    defaults = TrainConfig()
    for key, value in meant.items():
        given = getattr(cfg, key)
        # a train.toml that a run has written gives both, and they agree
        if given not in (value, getattr(defaults, key)):
            die(f"expansion {e} and pfrac {cfg.pfrac} stand for {key} {value}, but {key} is "
                f"{given}; leave it out, or give no expansion and pfrac")
    return replace(cfg, **meant)


def check_run(cfg: TrainConfig, world: int) -> None:
    """What the bounds of single settings cannot say; ends here before anything is written."""
    if cfg.anneal_start >= cfg.anneal_end:
        die(f"anneal_start {cfg.anneal_start} must lie before anneal_end {cfg.anneal_end}")
    if cfg.n_head == 0 and cfg.d_model % cfg.d_head:
        die(f"d_model {cfg.d_model} is not a multiple of d_head {cfg.d_head}; or give n_head")
    if cfg.batch_size % (world * cfg.grad_accum):
        die(f"batch_size {cfg.batch_size} is not a multiple of {world} processes x "
            f"{cfg.grad_accum} micro-steps")
    if cfg.positions in BESIDE and cfg.d_pos_emb < 1:
        die(f"d_pos_emb must be at least 1 where positions are concatenated, not {cfg.d_pos_emb}")


# --- setting up ------------------------------------------------------------------------------

def begin(cfg: TrainConfig) -> Run:
    """Checks, processes, data: exits with one line where a run cannot start."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_run(cfg, world)
    # before processes meet: where data are missing, none waits for another that has gone
    try:
        device = device_of(cfg.device)
        train, val, meta = read_data(cfg.data_dir, cfg.block_size)
        counts = read_bigrams(cfg.data_dir, meta, len(train))  # None: still to be counted
    except ValueError as e:
        die(e)
    if cfg.bigram in COUNTED and meta["vocab_size"] > LARGEST_TABLE:
        die(f"bigram={cfg.bigram} is for at most {LARGEST_TABLE} tokens, and the data have "
            f"{meta['vocab_size']}; use --bigram=none")
    if cfg.compile and device == "cpu" and not any(map(shutil.which, CPP_COMPILERS)):
        die("compile=true needs a C++ compiler; install g++ or clang++, or use --compile=false")
    hash_of_data = meta.get("tokenizer_hash", "")
    if cfg.tokenizer_hash not in ("", hash_of_data):
        die(f"{cfg.data_dir} was made with another tokenizer than this run's data; "
            "give the right --data_dir, or leave tokenizer_hash out of the config")
    cfg = replace(cfg, tokenizer_hash=hash_of_data)
    if world > 1:
        meet("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # TF32: products round, weights do not
    # every process draws the same first weights
    torch.manual_seed(cfg.seed)
    bigram = None
    if meta["vocab_size"] <= LARGEST_TABLE:
        bigram = bigram_log_probs(train, meta["vocab_size"], counts).to(device)
    return Run(cfg, rank, world, device, train, val, meta, bigram)


def model_config(cfg: TrainConfig, vocab_size: int) -> GPTConfig:
    """The architecture that the settings describe. ValueError where it is impossible.

    Of the format's other options the paper uses none: RMSNorm and an untied unembedding always.
    """
    return GPTConfig(
        block_size=cfg.block_size, vocab_size=vocab_size, n_layer=cfg.n_layer, d_model=cfg.d_model,
        n_head=cfg.n_head or cfg.d_model // cfg.d_head, d_head=cfg.d_head, d_mlp=cfg.d_mlp or None,
        afrac=cfg.afrac or None, afrac_loctypes=cfg.afrac_loctypes,
        d_pos_emb=cfg.d_pos_emb if cfg.positions in BESIDE else None,
        sinusoidal_cat_pos_emb=cfg.positions == "sinusoids",
        enable_bigram_table=cfg.bigram != "none",
        learnable_bigram_table=cfg.bigram in ("learned", "refined"),
        rms_norm=True, tied_unembed=False, sink=cfg.sink, grad_checkpointing=cfg.grad_checkpointing)


def new_model(run: Run) -> GPT:
    """The GPT of the config, from random weights."""
    try:
        config = model_config(run.cfg, run.meta["vocab_size"])
    except ValueError as e:
        die(e)
    model = GPT(config).to(run.device)
    if run.cfg.bigram in COUNTED:
        model.bigram_table.data.copy_(run.bigram)
    if run.cfg.positions == "none":  # the published format always has the table; zeros add nothing
        model.transformer.wpe.weight.requires_grad_(False).zero_()
    return model


def optimizer_of(cfg: TrainConfig, model: GPT, others: Iterable[dict] = (),
                 kind: type[L0AdamW] = L0AdamW) -> L0AdamW:
    """For the model's parameters, and for the `others` groups."""
    groups = param_groups(model, cfg.density, cfg.embed_density, cfg.bias_density, cfg.weight_decay)
    return kind([*groups, *others], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps,
                min_per_neuron=cfg.min_per_neuron)


def autocast(cfg: TrainConfig, device: str):
    # bfloat16 has float32's range, so that no loss has to be scaled; weights stay float32
    if cfg.dtype == "bfloat16":
        return torch.autocast(device, torch.bfloat16)
    return nullcontext()


# --- evaluation ------------------------------------------------------------------------------

def over_parts(f: Callable[[Tensor, Tensor], Tensor], n: int, run: Run) -> dict[str, list[float]]:
    """{part of the validation data: the mean of f(inputs, targets), (n,), over fixed windows}.

    Inputs and targets are (up to 16, T) token ids; the mean is over all processes.
    """
    cfg = run.cfg
    means = {}
    for part, (start, end) in run.meta["val_parts"].items():
        n_windows = max(1, min(cfg.eval_tokens, end - start - 1) // cfg.block_size)
        # evenly spaced, so that every evaluation of every run sees the same tokens
        starts = np.linspace(start, end - cfg.block_size - 1, n_windows).astype(np.int64)
        starts = starts[run.rank :: run.world]
        total = torch.zeros(n + 1, device=run.device)  # the last entry counts windows
        for i in range(0, len(starts), 16):  # few at a time: logits are the largest tensor
            x, y = inputs_and_targets(run.val, starts[i : i + 16], cfg.block_size, run.device)
            with autocast(cfg, run.device):
                values = f(x, y)
            total += len(x) * F.pad(values.float(), (0, 1), value=1.0)
        if run.world > 1:  # sums, so that a process with fewer windows weighs less
            dist.all_reduce(total)
        means[part] = (total[:-1] / total[-1]).tolist()
    return means


@torch.no_grad()
def evaluate(model: GPT, run: Run) -> dict:
    """Validation losses in nats, of the model and of the counted bigram table alone, by part; and
    the share of MLP neurons that no token switches on."""
    c = model.config
    fired = torch.zeros(c.n_layer, c.d_mlp, device=run.device)  # at how many tokens

    def watch(site: str, x: Tensor) -> Tensor:
        if site.endswith("post_act"):
            layer = int(site.split(".")[0])
            fired[layer] += (x != 0).sum((0, 1)).float()
        return x

    def losses(x: Tensor, y: Tensor) -> Tensor:
        own = model(x, y, nodes=watch)[1].float()
        if run.bigram is None:
            return own.unsqueeze(0)
        table = F.cross_entropy(run.bigram[x].flatten(0, 1), y.flatten())
        return torch.stack([own, table])

    model.eval()
    by_part = over_parts(losses, 1 if run.bigram is None else 2, run)
    model.train()
    if run.world > 1:
        dist.all_reduce(fired)
    measured = {"val_loss": {part: losses[0] for part, losses in by_part.items()}}
    if run.bigram is not None:
        measured["bigram_loss"] = {part: losses[1] for part, losses in by_part.items()}
    measured["dead_neurons"] = (fired == 0).float().mean().item()
    return measured


def evaluation_text(measured: dict) -> str:
    """What `evaluate` measured, as a line."""
    tables = measured.get("bigram_loss", {})
    parts = []
    for part, own in measured["val_loss"].items():
        parts.append(f"{part} {own:.3f}")
        if part in tables:
            parts[-1] += f" (bigram table alone {tables[part]:.3f})"
    dead = measured["dead_neurons"]
    return f"  validation, nats per token: {'; '.join(parts)}; dead neurons {dead:.1%}"


# --- the loop --------------------------------------------------------------------------------

def learned(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def sparse_of(optimizer: L0AdamW) -> list[Tensor]:
    """The tensors that the projection keeps sparse."""
    groups = [g for g in optimizer.param_groups if g["target_density"] is not None]
    return [p for group in groups for p in group["params"]]


def say_what_starts(run: Run, job: Job) -> None:
    n_params = sum(p.numel() for m in job.modules.values() for p in learned(m))
    n_sparse = sum(p.numel() for p in sparse_of(job.optimizer))
    run.say(f"{n_params / 1e6:.2f}M parameters, {n_sparse / 1e6:.2f}M of them to be sparse "
            f"(density {run.cfg.density}), {len(run.train) / 1e6:.1f}M training tokens, "
            f"{run.world} process(es) on {run.device}")


def for_this_machine(run: Run, net: nn.Module) -> nn.Module:
    """`net`, compiled where that is asked for, its gradients the mean of all processes."""
    if run.cfg.compile:
        # density and learning rate change from step to step, outside the graph: it is made once
        net = torch.compile(net)
    if run.world > 1:
        ids = [torch.cuda.current_device()] if run.device == "cuda" else None
        net = DistributedDataParallel(net, device_ids=ids)
        settle_buckets(run, net)
    return net


def settle_buckets(run: Run, net: DistributedDataParallel) -> None:
    """One pass whose gradients nobody uses.

    DistributedDataParallel sorts gradients into other buckets after its first backward pass, and
    from then on three processes or more add them up in another order. So the first step of a
    resumed run would round otherwise than the same step of the run that never stopped.
    """
    cfg = run.cfg
    starts = np.zeros(cfg.batch_size // (run.world * cfg.grad_accum), dtype=np.int64)
    x, y = inputs_and_targets(run.train, starts, cfg.block_size, run.device)
    with autocast(cfg, run.device):
        _, loss = net(x, y)
    loss.backward()
    net.zero_grad(set_to_none=True)


def mean_of_step(run: Run, values: list[Tensor]) -> Tensor:
    """The mean over a step's micro-steps, of all processes; values: of this process's."""
    mean = torch.stack(values).mean(0)
    if run.world > 1:
        dist.all_reduce(mean)
        mean /= run.world
    return mean


def forward_backward(run: Run, job: Job, net: nn.Module, step: int) -> tuple[Tensor, object]:
    """Add up the gradients of a step. net: that of `job`, as `for_this_machine` gives it.

    Returns the step's loss (nats) and what `job.describe` reads (None without it), both the mean
    of all micro-steps and processes. A net whose loss is no such mean has a `look_ahead`, without
    gradients: the mean of its look_ahead(x) is then the third argument of net(x, y).
    """
    cfg = run.cfg
    # the step's whole batch is drawn from (seed, step); each process takes its own rows
    rng = np.random.default_rng([cfg.seed, step])
    starts = rng.integers(0, len(run.train) - cfg.block_size, cfg.batch_size)
    per_process = cfg.batch_size // run.world
    starts = starts[run.rank * per_process : (run.rank + 1) * per_process]

    batches = [inputs_and_targets(run.train, micro, cfg.block_size, run.device)
               for micro in starts.reshape(cfg.grad_accum, -1)]
    whole = []  # what the net is to know of the whole step
    if run.world * cfg.grad_accum > 1 and hasattr(job.net, "look_ahead"):
        # autocast of its own: weights that one casts without gradients have none until it ends
        with autocast(cfg, run.device):
            whole = [mean_of_step(run, [job.net.look_ahead(x) for x, _ in batches])]

    # losses stay on the device until the step is done, so that the device need not wait
    losses = []
    noted = []
    for i, (x, y) in enumerate(batches):
        # processes exchange gradients once a step, after its last micro-step
        waits = run.world > 1 and i < cfg.grad_accum - 1
        with autocast(cfg, run.device), net.no_sync() if waits else nullcontext():
            seen, part = net(x, y, *whole)
            (part / cfg.grad_accum).backward()
        losses.append(part.detach())
        if job.describe is not None:  # else let go: the logits are the largest tensor there is
            noted.append(seen)
    loss = mean_of_step(run, losses)
    if job.describe is None:
        return loss, None
    return loss, [mean_of_step(run, values) for values in zip(*noted)]


def report(run: Run, job: Job, entry: dict, evaluating: bool) -> None:
    """Print what a step did and append it to log.jsonl, with an evaluation where it is due."""
    cfg = run.cfg
    tokens_left = cfg.max_steps * cfg.batch_size * cfg.block_size - entry["tokens"]
    minutes_left = tokens_left / max(1, entry["tokens_per_s"]) / 60  # compiling takes minutes
    run.say(f"step {entry['step']}/{cfg.max_steps}  loss {entry['train_loss']:.3f}  "
            f"density {entry['density']:.3f}  lr {entry['lr']:.4f}  "
            f"{entry['tokens_per_s']:,.0f} tokens/s  {minutes_left:.1f} min left")
    if evaluating:
        measured = job.evaluate()
        entry = entry | measured
        run.say(job.text(measured))
    if run.rank != 0:
        return
    try:
        with open(run.log_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
    except OSError as e:
        die(f"cannot write {run.log_path} at step {entry['step']}: {e.strerror}; "
            f"the last checkpoint in {cfg.out_dir} is kept")


def not_finite(run: Run, step: int, what: str) -> int:
    """Say why the run stops; the exit status."""
    run.say(f"step {step}: {what}, so the run stops here. "
            f"The last good checkpoint is kept; try a lower lr than {run.cfg.lr}")
    return 1


def loop(run: Run, job: Job) -> int:
    """Train `job` from its checkpoint, or from the start, to the end. Returns the exit status."""
    cfg = run.cfg
    with own_directory(run):
        start = restore(run, job)
        if run.rank == 0:
            prepare_directory(run, start)
            if start >= cfg.max_steps:  # killed between its last two files: the older model
                save_modules(cfg, job, {name: m.state_dict() for name, m in job.modules.items()})
        with others_may_die(), Saver(run, job) as saver:
            return steps_from(start, run, job, saver)


def densities_at(cfg: TrainConfig, step: int) -> Callable[[float], float]:
    """Of a step, counted from 0: a function from a target density to the one that the step has."""
    return partial(density_at, step, cfg.max_steps, start=cfg.anneal_start, end=cfg.anneal_end)


def learning_rate_at(cfg: TrainConfig, step: int, density: float) -> float:
    """Of a step, counted from 0, at the density that matrices have then."""
    thinning = cfg.density / density if cfg.sharkfin else 1.0
    return cfg.lr * lr_factor_at(step, cfg.max_steps, thinning, cfg.warmup)


def train_step(run: Run, job: Job, net: nn.Module, step: int) -> tuple[dict, object]:
    """One step of training, counted from 0: gradients, their scale, the optimizer.

    Returns what log.jsonl keeps of it, and what `job.describe` reads. Where loss or gradient is
    not finite, the weights are left as they are.
    """
    cfg = run.cfg
    progress = densities_at(cfg, step)
    density = progress(cfg.density)
    lr = learning_rate_at(cfg, step, density)
    job.optimizer.set_schedule(lr, progress)

    loss, seen = forward_backward(run, job, net, step)
    # each module has its own scale of gradients (paper A.2: RMS over all parameters)
    rms = [scale_rms_(learned(m), cfg.grad_rms).item() for m in job.modules.values()]
    measured = {
        "train_loss": loss.item(),
        "density": density,
        "lr": lr,
        "grad_rms": rms[0],  # of the model; bridges have their own
    }
    if all(map(math.isfinite, (measured["train_loss"], *rms))):
        job.optimizer.step()  # Adam, projection, decay: from here on the density holds
    else:
        measured["not_finite"] = True
    job.optimizer.zero_grad(set_to_none=True)
    return measured, seen


def steps_from(start: int, run: Run, job: Job, saver: Saver) -> int:
    """The steps of a run from `start`, counted from 0, to its end. Returns the exit status."""
    cfg = run.cfg
    say_what_starts(run, job)
    net = for_this_machine(run, job.net)
    signals = catch_signals()
    step_tokens = cfg.batch_size * cfg.block_size
    # speed is measured since the last report, by a clock that nobody sets
    clock, clock_step = time.monotonic(), start

    for step in range(start, cfg.max_steps):
        measured, seen = train_step(run, job, net, step)
        done = step + 1
        if "not_finite" in measured:
            return not_finite(run, done, f"loss {measured['train_loss']}, gradient RMS "
                              f"{measured['grad_rms']}: not finite")

        final = done == cfg.max_steps
        stop = agree_to_stop(run, signals)
        saving = done % cfg.save_interval == 0 or final or stop
        keeping = cfg.keep_every > 0 and done % cfg.keep_every == 0
        # what is saved must be sound: the loss was that of the weights before this step
        if (saving or keeping) and not is_sound(job):
            return not_finite(run, done, "weights that are not finite")
        evaluating = done % cfg.eval_interval == 0 or final
        if done % cfg.log_interval == 0 or evaluating or done == 1:
            seconds = time.monotonic() - clock
            entry = {"step": done, "tokens": done * step_tokens} | measured
            entry["nonzeros"] = int(sum(p.count_nonzero() for p in sparse_of(job.optimizer)))
            entry["tokens_per_s"] = round((done - clock_step) * step_tokens / seconds)
            if job.describe is not None:
                entry |= job.describe(seen)
            report(run, job, entry, evaluating)
            clock, clock_step = time.monotonic(), done
        if run.rank == 0:
            saver.check()
            if keeping:  # before the state: a run that resumes from this step has it
                saver.keep(done)
            if saving:
                saver.save(done)
        if stop and not final:
            saver.wait()
            say_how_to_go_on(run, done)
            return 128 + stop
    saver.wait()
    run.say(f"done: {cfg.out_dir}")
    return 0


def is_sound(job: Job) -> bool:
    """Whether every weight is a number."""
    return all(p.isfinite().all() for m in job.modules.values() for p in learned(m))


def print_plan(cfg: TrainConfig) -> int:
    """What the run would take; nothing is allocated and nothing written."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_run(cfg, world)
    try:
        vocab_size = vocab_of(cfg.data_dir)
    except ValueError:
        vocab_size = TINYPYTHON_VOCAB
        print(f"no data in {cfg.data_dir} yet; for a vocabulary of {vocab_size} tokens:\n")
    try:
        with torch.device("meta"):
            model = GPT(model_config(cfg, vocab_size))
    except ValueError as e:
        die(e)
    if cfg.positions == "none":
        model.transformer.wpe.weight.requires_grad_(False)
    print(text_of_plan(cfg, model, world))
    return 0


def main(argv: list[str]) -> int:
    cfg = of_the_family(parse(TrainConfig, argv))
    if cfg.plan:
        return print_plan(cfg)
    run = begin(cfg)
    model = new_model(run)
    job = Job(model, {"model": model}, optimizer_of(run.cfg, model),
              evaluate=partial(evaluate, model, run), text=evaluation_text)
    return loop(run, job)


if __name__ == "__main__":
    as_script(main, leave)
