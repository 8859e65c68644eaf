"""Train a weight-sparse GPT (or, with --density=1 --afrac=0, its dense baseline).

- One process:       python train.py --config=configs/demo.toml --key=value ...
- Many, CPU or CUDA: torchrun --nproc_per_node=N train.py --config=configs/demo.toml
- A run is a directory: the published model files, train.toml, log.jsonl, state.pt (to resume).
- Data order is a function of (seed, step); a resumed run is bitwise the run that never stopped.
- Ctrl-C, SIGTERM: the step is finished and saved. A loss that is not finite stops the run.
- `begin`, `loop` and what they call is bridge.py's too; what the loop trains is a `Job`.

Paper sections 2.1 and A.2.
"""
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import die, parse, to_toml, write_atomic
from model import GPT, SITES, GPTConfig
from optim import L0AdamW, clip_rms_, density_at, lr_factor_at, param_groups


@dataclass
class TrainConfig:
    out_dir: str = "out/train"
    data_dir: str = "data/tinypython"
    resume: bool = False          # go on from out_dir/state.pt where there is one
    seed: int = 0
    device: str = "auto"          # auto | cpu | cuda
    dtype: str = "float32"        # or bfloat16: autocast, with float32 weights and moments
    compile: bool = False
    # model (paper 2.1, A.1)
    n_layer: int = 2
    d_model: int = 256
    n_head: int = 0               # 0 = d_model / d_head
    d_head: int = 16
    d_mlp: int = 0                # 0 = 4 * d_model
    block_size: int = 128         # tokens
    afrac: float = 0.25           # AbsTopK keeps this fraction at every node site; 0 = off
    sink: bool = True
    positions: str = "none"       # none | added | concat (width d_pos_emb)
    d_pos_emb: int = 16
    bigram: str = "learned"       # none | learned (from zero) | counts (fixed, counted on the training data)
    grad_checkpointing: bool = False
    # optimizer (paper A.2)
    batch_size: int = 32          # sequences per step, over all processes
    grad_accum: int = 1           # micro-steps per step
    max_steps: int = 1000
    lr: float = 0.03              # before the schedule's 1/sqrt(density)
    warmup: float = 0.01          # fraction of training
    density: float = 0.02         # fraction of weights kept at the end; 1 = dense
    anneal_start: float = 0.0     # fractions of training between which density falls from 1
    anneal_end: float = 0.5
    min_per_neuron: int = 4       # j: nonzeros that a neuron keeps in any case
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 0.1
    grad_rms: str = "clip"        # clip | normalize: the gradient's RMS, to 1
    # reporting
    log_interval: int = 10        # steps
    eval_interval: int = 250
    eval_tokens: int = 32768      # per part of the validation data
    save_interval: int = 250


@dataclass
class Run:
    """What one process of a training run works with."""
    cfg: TrainConfig
    rank: int
    world: int
    device: str
    train: np.ndarray   # token ids, uint16
    val: np.ndarray
    meta: dict
    bigram: Tensor      # (vocab, vocab), log P(next | current) counted on the training data
    say: Callable


@dataclass
class Job:
    """What `loop` trains, as train.py and bridge.py put it together."""
    net: nn.Module                  # net(x, y) -> (what `describe` reads, the loss to minimise)
    modules: dict[str, nn.Module]   # what learns; "model" is a GPT, kept in the published format, another is kept as NAME.pt
    optimizer: L0AdamW
    evaluate: Callable[[], tuple[dict, str]]  # what an evaluation adds to log.jsonl, and to the screen
    describe: Callable[[object], dict] = lambda seen: {}  # net's first output, in the last micro-step of process 0, for log.jsonl


def check(cfg: TrainConfig, world: int) -> None:
    """Impossible values end here, before anything is written."""
    for name in ("n_layer", "d_model", "d_head", "block_size", "batch_size", "grad_accum", "max_steps",
                 "log_interval", "eval_interval", "eval_tokens", "save_interval"):
        if getattr(cfg, name) < 1:
            die(f"{name} must be at least 1, not {getattr(cfg, name)}")
    for name, allowed in (("device", ("auto", "cpu", "cuda")), ("dtype", ("float32", "bfloat16")),
                          ("positions", ("none", "added", "concat")), ("bigram", ("none", "learned", "counts")),
                          ("grad_rms", ("clip", "normalize"))):
        if getattr(cfg, name) not in allowed:
            die(f"{name} must be one of {', '.join(allowed)}, not '{getattr(cfg, name)}'")
    if not 0 < cfg.density <= 1:
        die(f"density must lie in (0, 1], not {cfg.density}")
    if not 0 <= cfg.anneal_start < cfg.anneal_end <= 1:
        die(f"anneal_start {cfg.anneal_start} and anneal_end {cfg.anneal_end} must be fractions, the first the smaller")
    if cfg.n_head == 0 and cfg.d_model % cfg.d_head:
        die(f"d_model {cfg.d_model} is not a multiple of d_head {cfg.d_head}; change one, or give n_head")
    if cfg.batch_size % (world * cfg.grad_accum):
        die(f"batch_size {cfg.batch_size} is not a multiple of {world} processes x {cfg.grad_accum} micro-steps")
    if cfg.positions == "concat" and cfg.d_pos_emb < 1:
        die(f"d_pos_emb must be at least 1 where positions are concatenated, not {cfg.d_pos_emb}")
    for name in ("seed", "min_per_neuron"):
        if getattr(cfg, name) < 0:
            die(f"{name} must not be negative, but is {getattr(cfg, name)}")
    for name in ("lr", "eps"):
        if not 0 < getattr(cfg, name) < math.inf:
            die(f"{name} must be a positive number, not {getattr(cfg, name)}")
    for name in ("warmup", "weight_decay", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            die(f"{name} must lie in [0, 1), not {getattr(cfg, name)}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        die("device is cuda, but this PyTorch sees no CUDA device; use --device=cpu")


def model_config(cfg: TrainConfig, vocab_size: int) -> GPTConfig:
    try:
        return GPTConfig(
            block_size=cfg.block_size, vocab_size=vocab_size, n_layer=cfg.n_layer, d_model=cfg.d_model,
            n_head=cfg.n_head or cfg.d_model // cfg.d_head, d_head=cfg.d_head, d_mlp=cfg.d_mlp or None,
            rms_norm=True, tied_unembed=False, sink=cfg.sink, grad_checkpointing=cfg.grad_checkpointing,
            afrac=cfg.afrac if cfg.afrac != 0 else None, afrac_loctypes=",".join(SITES.values()),
            d_pos_emb=cfg.d_pos_emb if cfg.positions == "concat" else None,
            enable_bigram_table=cfg.bigram != "none", learnable_bigram_table=cfg.bigram == "learned")
    except ValueError as e:
        die(str(e))


# --- data ------------------------------------------------------------------------------------

def load_data(folder: str, block_size: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """train.bin and val.bin as uint16 arrays, and meta.json. Exits with one line if they are not usable."""
    try:
        with open(os.path.join(folder, "meta.json")) as f:
            meta = json.load(f)
        vocab, parts = int(meta["vocab_size"]), {str(p): (int(a), int(b)) for p, (a, b) in meta["val_parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        die(f"{folder}/meta.json is missing or unusable ({type(e).__name__}); run python data/tinypython/prepare.py")
    arrays = []
    for name in ("train.bin", "val.bin"):
        path = os.path.join(folder, name)
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        if size <= 0 or size % 2:
            what = {-1: "is missing", 0: "is empty"}.get(size, f"has an odd size ({size} bytes), so it is cut off")
            die(f"{path} {what}; run python data/tinypython/prepare.py")
        array = np.memmap(path, dtype="<u2", mode="r")
        if array.max() >= vocab:
            die(f"{path} holds token id {array.max()}, past the vocabulary of {vocab}; prepare the data again")
        arrays.append(array)
    for name, a, b in [("train.bin", 0, len(arrays[0]))] + [(f"val.bin part '{p}'", *ab) for p, ab in parts.items()]:
        if name != "train.bin" and not 0 <= a <= b <= len(arrays[1]):
            die(f"{name} should be tokens {a} to {b}, but the file holds {len(arrays[1])}; prepare the data again")
        if b - a <= block_size:
            die(f"block_size {block_size} needs more than the {b - a} tokens of {name}; lower it or prepare more data")
    return *arrays, meta | {"val_parts": parts}


def windows(data: np.ndarray, starts: np.ndarray, block_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Token windows at `starts` and the same shifted by one: inputs and targets, each (B, T) int64."""
    rows = torch.from_numpy(np.stack([data[s : s + block_size + 1] for s in starts]).astype(np.int64)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def bigram_log_probs(train: np.ndarray, vocab: int) -> Tensor:
    """(vocab, vocab): log P(next | current) counted on the training data, smoothed by the unigram."""
    counts = np.zeros(vocab * vocab, dtype=np.int64)
    for i in range(0, len(train) - 1, 1 << 24):  # in pieces: the data may not fit in memory as int64
        a = train[i : i + (1 << 24) + 1].astype(np.int64)
        counts += np.bincount(a[:-1] * vocab + a[1:], minlength=vocab * vocab)
    counts = torch.from_numpy(counts).view(vocab, vocab).float()
    unigram = (counts.sum(0) + 1) / (counts.sum() + vocab)
    strength = 4.0  # pseudo-counts a row
    return ((counts + strength * unigram) / (counts.sum(1, keepdim=True) + strength)).log()


# --- evaluation and checkpoints --------------------------------------------------------------

def over_parts(f: Callable[[Tensor, Tensor], Tensor], n: int, run: Run) -> dict[str, list[float]]:
    """The mean of `f(inputs, targets)`, (n,), over fixed windows of each part of the validation data, over all processes."""
    cfg, out = run.cfg, {}
    for part, (a, b) in run.meta["val_parts"].items():
        windows_in_part = max(1, min(cfg.eval_tokens, b - a - 1) // cfg.block_size)
        starts = np.linspace(a, b - cfg.block_size - 1, windows_in_part).astype(np.int64)[run.rank :: run.world]
        total = torch.zeros(n + 1, device=run.device)  # the last entry counts windows
        for i in range(0, len(starts), 16):
            x, y = windows(run.val, starts[i : i + 16], cfg.block_size, run.device)
            with autocast(cfg, run.device):
                values = f(x, y)
            total += len(x) * F.pad(values.float(), (0, 1), value=1.0)
        if run.world > 1:
            dist.all_reduce(total)
        out[part] = (total[:-1] / total[-1]).tolist()
    return out


@torch.no_grad()
def evaluate(model: GPT, run: Run) -> tuple[dict, str]:
    """Validation losses in nats, of the model and of the counted bigram table alone, and the share of MLP neurons that
    no token switches on: for log.jsonl, and as a line of text."""
    model.eval()
    alive = {}

    def watch(site, x):
        if site.endswith("post_act"):
            alive[site] = alive.get(site, 0) + (x != 0).sum((0, 1)).float()
        return x

    losses = over_parts(lambda x, y: torch.stack([model(x, y, nodes=watch)[1].float(), F.cross_entropy(run.bigram[x].flatten(0, 1), y.flatten())]), 2, run)
    counts = torch.stack([alive[s] for s in sorted(alive)]) if alive else torch.zeros(model.config.n_layer, model.config.d_mlp, device=run.device)
    if run.world > 1:
        dist.all_reduce(counts)
    dead = (counts == 0).float().mean().item()
    model.train()
    text = "  validation, nats per token: " + "; ".join(f"{p} {own:.3f} (bigram table alone {table:.3f})" for p, (own, table) in losses.items())
    return {"val_loss": {p: own for p, (own, _) in losses.items()}, "bigram_loss": {p: table for p, (_, table) in losses.items()},
            "dead_neurons": dead}, f"{text}; dead neurons {dead:.1%}"


def autocast(cfg: TrainConfig, device: str):
    return torch.autocast(device, torch.bfloat16) if cfg.dtype == "bfloat16" else nullcontext()


def script_of(cfg: TrainConfig) -> str:
    return os.path.basename(sys.modules[type(cfg).__module__].__file__)


def save(cfg: TrainConfig, job: Job, step: int) -> None:
    """The run directory. state.pt comes first and is complete in itself, so a kill between two
    files leaves a run that resumes. On a full disk the old files stay: one line, exit status 2."""
    state = {"step": step, "config": asdict(cfg), "optimizer": job.optimizer.state_dict()}
    try:
        write_atomic(os.path.join(cfg.out_dir, "state.pt"), partial(torch.save, state | {k: m.state_dict() for k, m in job.modules.items()}))
        save_modules(cfg, job)
    except OSError as e:
        die(f"the checkpoint of step {step} could not be saved ({e.strerror or e}); the one before it in {cfg.out_dir} is kept")


def save_modules(cfg: TrainConfig, job: Job) -> None:
    for name, module in job.modules.items():
        if name == "model":
            module.save(cfg.out_dir)
        else:
            write_atomic(os.path.join(cfg.out_dir, f"{name}.pt"), partial(torch.save, module.state_dict()))


def load_state(cfg: TrainConfig, device: str, names: Iterable[str]) -> dict | None:
    """The state to go on from, or None to start anew. Exits if it is not a state of this run.
    names: of the modules that it must hold."""
    path = os.path.join(cfg.out_dir, "state.pt")
    if not os.path.exists(path):
        return None
    if not cfg.resume:
        die(f"{cfg.out_dir} already holds a run; go on with --resume=true, or choose another --out_dir")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        kinds = {"step": int, "config": dict, "optimizer": dict, **dict.fromkeys(names, dict)}
        good = isinstance(state, dict) and all(isinstance(state.get(k), t) for k, t in kinds.items())
    except Exception:  # torch.load raises many kinds on a truncated or foreign file
        good = False
    if not good:
        die(f"{path} is truncated or not a checkpoint of {script_of(cfg)}; remove it to start anew")
    old = state["config"]
    new = asdict(cfg)
    for key in ("n_layer", "d_model", "n_head", "d_head", "d_mlp", "block_size", "sink", "positions", "d_pos_emb", "bigram", "bridge_afrac"):
        if key in new and old.get(key) != new[key]:
            die(f"cannot resume: {path} has {key} {old.get(key)}, this run {new[key]}; use the same, or another --out_dir")
    free = ("resume", "out_dir", "log_interval", "eval_interval", "eval_tokens", "save_interval")
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v and k not in free]
    if changed:
        print(f"note: changed since the checkpoint, so not the same run any more: {', '.join(changed)}")
    return state


def trim_log(path: str, step: int) -> None:
    """Drop what was logged after the checkpoint, and a line that a kill cut off."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomic(path, lambda f: f.write("".join(lines).encode()))


# --- the loop --------------------------------------------------------------------------------

def device_of(cfg: TrainConfig) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device


def begin(cfg: TrainConfig) -> Run:
    """Checks, processes, data: exits with one line where a run cannot start."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, world)
    device = device_of(cfg)
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")
    train, val, meta = load_data(cfg.data_dir, cfg.block_size)
    torch.manual_seed(cfg.seed)
    return Run(cfg, rank, world, device, train, val, meta, bigram_log_probs(train, meta["vocab_size"]).to(device),
               partial(print, flush=True) if rank == 0 else lambda *_: None)


def new_model(run: Run) -> GPT:
    """The GPT of the config, from random weights."""
    model = GPT(model_config(run.cfg, run.meta["vocab_size"])).to(run.device)
    if run.cfg.bigram == "counts":
        model.bigram_table.copy_(run.bigram)
    if run.cfg.positions == "none":  # the published format always has the table; zeros add nothing
        model.transformer.wpe.weight.requires_grad_(False).zero_()
    return model


def optimizer_of(cfg: TrainConfig, model: GPT, others: Iterable[dict] = ()) -> L0AdamW:
    """For the model's parameters, and for the `others` groups."""
    return L0AdamW([*param_groups(model, cfg.density, cfg.weight_decay), *others], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                   eps=cfg.eps, min_per_neuron=cfg.min_per_neuron)


def loop(run: Run, job: Job) -> int:
    """Train `job` from its checkpoint, or from the start, to the end. Returns the exit status."""
    cfg, rank, world, device, say = run.cfg, run.rank, run.world, run.device, run.say
    parts = [[p for p in m.parameters() if p.requires_grad] for m in job.modules.values()]
    params, optimizer = sum(parts, []), job.optimizer
    sparse = [p for g in optimizer.param_groups if g["target_density"] is not None for p in g["params"]]

    start = 0
    if state := load_state(cfg, device, job.modules):
        start = state["step"]
        try:
            for name, module in job.modules.items():
                (module.load_weights if name == "model" else module.load_state_dict)(state[name])
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizer"])
            for group, fresh in zip(optimizer.param_groups, settings):
                group.update(fresh)  # moments from the checkpoint, settings from this run's config
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
            die(f"{cfg.out_dir}/state.pt does not fit this model: {e}")
        say(f"resuming {cfg.out_dir} at step {start}")
    log_path = os.path.join(cfg.out_dir, "log.jsonl")
    if rank == 0:
        try:
            os.makedirs(cfg.out_dir, exist_ok=True)
            write_atomic(os.path.join(cfg.out_dir, "train.toml"), lambda f: f.write(to_toml(cfg).encode()))
            trim_log(log_path, start if state else -1)
        except OSError as e:
            die(f"cannot write to out_dir '{cfg.out_dir}': {e.strerror}")
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {sum(p.numel() for p in sparse) / 1e6:.2f}M of them to be sparse "
        f"(density {cfg.density}), {len(run.train) / 1e6:.1f}M training tokens, {world} process(es) on {device}")

    net = torch.compile(job.net) if cfg.compile else job.net
    if world > 1:
        net = DistributedDataParallel(net, device_ids=[torch.cuda.current_device()] if device == "cuda" else None)
    if start >= cfg.max_steps and rank == 0:
        save_modules(cfg, job)  # a kill between the last two files may have left the older model
    caught = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda number, frame: caught.append(number))

    per_process = cfg.batch_size // world
    micro = per_process // cfg.grad_accum
    clock, clock_step = time.time(), start
    for step in range(start, cfg.max_steps):
        density = density_at(step, cfg.max_steps, cfg.density, cfg.anneal_start, cfg.anneal_end)
        lr = cfg.lr * lr_factor_at(step, cfg.max_steps, density, cfg.warmup)
        optimizer.set_schedule(lr, partial(density_at, step, cfg.max_steps, start=cfg.anneal_start, end=cfg.anneal_end))

        # the step's whole batch is drawn from (seed, step); each process takes its own rows
        starts = np.random.default_rng([cfg.seed, step]).integers(0, len(run.train) - cfg.block_size, cfg.batch_size)
        starts = starts[rank * per_process : (rank + 1) * per_process]
        loss = torch.zeros((), device=device)
        for i in range(cfg.grad_accum):
            x, y = windows(run.train, starts[i * micro : (i + 1) * micro], cfg.block_size, device)
            last = i == cfg.grad_accum - 1
            with autocast(cfg, device), nullcontext() if world == 1 or last else net.no_sync():
                seen, part = net(x, y)
                (part / cfg.grad_accum).backward()
            loss += part.detach() / cfg.grad_accum
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        grad_rms, *others = (clip_rms_(part, cfg.grad_rms).item() for part in parts)
        if not all(map(math.isfinite, (loss.item(), grad_rms, *others))):
            say(f"step {step + 1}: loss {loss.item()}, gradient RMS {grad_rms}: not finite, so the run stops here. "
                f"The last good checkpoint is kept; try a lower lr than {cfg.lr}")
            return 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        stop = torch.tensor(caught[0] if caught else 0)
        if world > 1:  # all processes stop at the same step
            stop = stop.to(device)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        stop, final = int(stop), done == cfg.max_steps
        saving = done % cfg.save_interval == 0 or final or stop
        if saving and not all(bool(p.isfinite().all()) for p in params):
            say(f"step {done}: weights that are not finite, so the run stops here. "
                f"The last good checkpoint is kept; try a lower lr than {cfg.lr}")
            return 1
        evaluating = done % cfg.eval_interval == 0 or final
        if done % cfg.log_interval == 0 or evaluating or done == 1:
            speed = (done - clock_step) * cfg.batch_size * cfg.block_size / (time.time() - clock)
            entry = {"step": done, "tokens": done * cfg.batch_size * cfg.block_size, "train_loss": loss.item(),
                     "density": density, "lr": lr, "grad_rms": grad_rms,
                     "nonzeros": int(sum(p.count_nonzero() for p in sparse)), "tokens_per_s": round(speed), **job.describe(seen)}
            left = (cfg.max_steps - done) * cfg.batch_size * cfg.block_size / speed
            say(f"step {done}/{cfg.max_steps}  loss {loss.item():.3f}  density {density:.3f}  lr {lr:.4f}  "
                f"{speed:,.0f} tokens/s  {left / 60:.1f} min left")
            if evaluating:
                measured, text = job.evaluate()
                entry |= measured
                say(text)
            if rank == 0:
                try:
                    with open(log_path, "a", encoding="utf-8") as f:
                        f.write(json.dumps(entry) + "\n")
                except OSError as e:
                    die(f"cannot write {log_path} at step {done}: {e.strerror}; the last checkpoint in {cfg.out_dir} is kept")
            clock, clock_step = time.time(), done
        if rank == 0 and saving:
            save(cfg, job, done)
        if stop and not final:
            command = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
            say(f"stopped after step {done}, all saved; go on with: {command} {script_of(cfg)} "
                f"{shlex.quote(f'--config={cfg.out_dir}/train.toml')} --resume=true")
            return 128 + stop
    say(f"done: {cfg.out_dir}")
    return 0


def main(argv: list[str]) -> int:
    run = begin(parse(TrainConfig, argv))
    model = new_model(run)
    return loop(run, Job(model, {"model": model}, optimizer_of(run.cfg, model), partial(evaluate, model, run)))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
