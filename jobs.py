"""A training run as processes and files: what train.py and bridge.py share beside the loop.

- `Run`: what one process works with; `Job`: what is trained.
- Processes: they meet, agree to stop, and none waits for one that has gone.
- A run is a directory: the published model files, train.toml, log.jsonl, state.pt (to resume), and
  a copy of the model each `keep_every` steps.
- `Saver` writes while training goes on; each file is the old one or the new one, never half of it.
"""
import glob
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import NoReturn

from config import die, remove_leftovers, sole_user, stop_signals, to_toml, write_atomic

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from optim import L0AdamW
from tokens import Tokens, fingerprint

# Settings that a resumed run must share with its checkpoint: they shape the weights ...
SHAPING = (
    "n_layer", "d_model", "n_head", "d_head", "d_mlp", "block_size", "sink", "positions",
    "d_pos_emb", "bigram", "bridge_afrac", "tokenizer_hash",
)
# ... and those that it may change and still be the same run.
FREE = ("resume", "plan", "out_dir", "log_interval", "eval_interval", "eval_tokens",
        "save_interval", "keep_every")
# torchrun kills what is still there so long after its SIGTERM; we speak before that.
PATIENCE = 20  # seconds


@dataclass
class Run:
    """What one process of a training run works with."""
    cfg: object         # a TrainConfig, or bridge.py's
    rank: int
    world: int          # number of processes
    device: str
    train: Tokens
    val: Tokens
    meta: dict
    # (vocab, vocab), log P(next | current) counted on the training data; None if that is too large
    bigram: Tensor | None

    def say(self, text: str) -> None:
        if self.rank != 0:
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` has had enough; the run, and its log, go on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @property
    def log_path(self) -> str:
        return os.path.join(self.cfg.out_dir, "log.jsonl")


@dataclass
class Job:
    """What the loop trains, as train.py and bridge.py put it together.

    net(x, y) gives what `describe` reads (None, if that is to log nothing more) and the loss to
    minimise. Of the modules that learn, "model" is a GPT, kept in the published format; another is
    kept as NAME.pt.
    """
    net: nn.Module
    modules: dict[str, nn.Module]
    optimizer: L0AdamW
    evaluate: Callable[[], dict]   # what an evaluation adds to log.jsonl
    text: Callable[[dict], str]    # the same for the screen
    describe: Callable[[object], dict] | None = None  # net's first output, for log.jsonl


def script_of(cfg) -> str:
    """The script that a config belongs to, as it follows `python`: what a message tells the user
    to start again."""
    module = sys.modules[type(cfg).__module__]
    name = module.__spec__.name if module.__spec__ else ""  # None of a file that was started
    if name.startswith("tools."):
        return f"-m {name}"
    return os.path.basename(module.__file__)


# --- processes -------------------------------------------------------------------------------

def meet(backend: str) -> None:
    """Wait for the other processes of this run; one line where that fails."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as e:  # RuntimeError: also what torch.distributed raises
        reason = str(e).splitlines()[0]
        die(f"the {os.environ['WORLD_SIZE']} processes of this run cannot meet ({reason}); start "
            "them by torchrun, or take RANK and WORLD_SIZE out of the environment")


def end_with(parent: int) -> None:
    """A process whose torchrun was killed ends as well, or it would keep a new start out."""
    while os.getppid() == parent:
        time.sleep(1)
    if not dist.is_initialized():
        os._exit(128 + signal.SIGTERM)  # it waits for the others, deaf to signals
    os.kill(os.getpid(), signal.SIGTERM)  # the step is finished and saved


class Signals:
    """What asked this process to end. A step is never broken off: the loop looks between steps."""

    def __init__(self):
        self.caught = []                   # their numbers
        self.answered = threading.Event()  # the processes have agreed to stop

    def remember(self, number, frame) -> None:
        self.caught.append(number)


def catch_signals() -> Signals:
    """From now on Ctrl-C, SIGTERM and SIGHUP are only remembered."""
    signals = Signals()
    for sig in stop_signals():
        signal.signal(sig, signals.remember)
    if dist.is_initialized() and "TORCHELASTIC_RUN_ID" in os.environ:
        listen_while_waiting(signals)
    return signals


def listen_while_waiting(signals: Signals) -> None:
    """Among several processes, one that waits for the answer of another runs no Python, and so
    hears no signal. A thread hears it, and ends the process before torchrun kills it mutely."""
    hears, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        os.read(hears, 1)  # the number of a signal
        if not signals.answered.wait(PATIENCE):
            end_without_others("did not answer for so long after a signal that "
                               "this one ends, too")

    threading.Thread(target=listen, daemon=True).start()


def end_without_others(what: str) -> NoReturn:
    """Another process is gone or stuck: one line, and out, without the usual farewells, which
    would wait for it."""
    who = f"{os.path.basename(sys.argv[0])}, rank {os.environ.get('RANK', 0)}"
    print(f"{who}: another process of this run {what}; its own message says why. "
          "The last checkpoint is kept", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def others_may_die() -> Iterator[None]:
    """Turns the errors of communication, dozens of lines, into one."""
    try:
        yield
    except RuntimeError as e:
        lost = isinstance(e, dist.DistBackendError) or "gloo" in str(e)
        if not (dist.is_initialized() and lost):
            raise
        end_without_others("has ended")


def agree_to_stop(run: Run, signals: Signals) -> int:
    """The signal that any process has caught, 0 for none: all of them stop at the same step."""
    stop = torch.tensor(signals.caught[0] if signals.caught else 0)
    if run.world > 1:
        stop = stop.to(run.device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    if stop:
        signals.answered.set()
    return int(stop)


def leave(code: int) -> NoReturn:
    """End this process. Of several, all wait for each other and then go at once: while Python takes
    itself down, a thread of gloo's may still be there, and would abort a run that is finished."""
    if dist.is_initialized():
        if code < 128:  # a signal may have reached this process alone
            with others_may_die():
                dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# --- saving ----------------------------------------------------------------------------------

class Saver:
    """Writes the checkpoints of a run while its training goes on.

    What is to be written is copied, which takes a fraction of a second a gigabyte, and a thread
    writes the copy. Used in a `with`: at its end all is written. What goes wrong, such as a full
    disk, ends the run by `check`, at the latest before the next checkpoint or at the end; the old
    files stay.
    """

    def __init__(self, run: Run, job: Job):
        self.run = run
        self.job = job
        self.data = fingerprint(run.train)
        self.thread = None
        self.step = 0  # of what the thread writes
        self.error = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._join()
        if kind is None:
            self.check()

    def save(self, step: int) -> None:
        """All that a run resumes from, and its model."""
        self.wait()
        state = {
            "step": step,
            "config": asdict(self.run.cfg),
            "optimizer": self.job.optimizer.state_dict(),
            "data": self.data,
        }
        for name, module in self.job.modules.items():
            state[name] = module.state_dict()
        self._begin(step, partial(self._write_state, copy_of(state)))

    def keep(self, step: int) -> None:
        """A copy of the model as it is now, in a directory of its own that loads as any run."""
        self.wait()
        state = copy_of(self.job.modules["model"].state_dict())
        self._begin(step, partial(self._write_kept, state, step))

    def wait(self) -> None:
        """Until what was begun is written."""
        self._join()
        self.check()

    def check(self) -> None:
        """Exit, in one line, where the last checkpoint could not be written."""
        if isinstance(self.error, OSError):
            reason = self.error.strerror or self.error
            die(f"the checkpoint of step {self.step} could not be saved ({reason}); "
                f"the one before it in {self.run.cfg.out_dir} is kept")
        if self.error is not None:
            raise self.error

    def _begin(self, step: int, write: Callable[[], None]) -> None:
        def work() -> None:
            try:
                write()
            except BaseException as e:  # raised again where the loop sees it
                self.error = e

        self.step = step
        self.thread = threading.Thread(target=work)
        self.thread.start()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write_state(self, state: dict) -> None:
        out_dir = self.run.cfg.out_dir
        write_atomic(os.path.join(out_dir, "state.pt"), partial(torch.save, state))
        save_modules(self.run.cfg, self.job, state)

    def _write_kept(self, state: dict, step: int) -> None:
        folder = os.path.join(self.run.cfg.out_dir, f"step_{step:06}")
        os.makedirs(folder, exist_ok=True)
        # the tokenizer's hash and the window of training, for whoever loads it
        write_atomic(os.path.join(folder, "train.toml"), to_toml(self.run.cfg).encode())
        self.job.modules["model"].save(folder, state=state)


def save_modules(cfg, job: Job, state: dict) -> None:
    """The files that others read: `state` {name of a module: its state dict}."""
    for name, module in job.modules.items():
        if name == "model":
            module.save(cfg.out_dir, state=state[name])
        else:
            path = os.path.join(cfg.out_dir, f"{name}.pt")
            write_atomic(path, partial(torch.save, state[name]))


def copy_of(value):
    """The same, each tensor copied to the CPU's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_of(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_of(x) for x in value)
    return value


# --- resuming --------------------------------------------------------------------------------

def load_state(run: Run, names: Iterable[str]) -> dict | None:
    """The state to go on from, or None to start anew. Exits if it is not a state of this run.

    names: of the modules that it must hold.
    """
    cfg = run.cfg
    path = os.path.join(cfg.out_dir, "state.pt")
    if not os.path.exists(path):
        return None
    if not cfg.resume:
        die(f"{cfg.out_dir} already holds a run; go on with --resume=true, or in another --out_dir")
    kinds = {"step": int, "config": dict, "optimizer": dict, **dict.fromkeys(names, dict)}
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        whole = all(isinstance(state.get(key), kind) for key, kind in kinds.items())
    except Exception:  # torch.load raises many kinds on a truncated or foreign file
        whole = False
    if not whole:
        die(f"{path} is truncated or not a checkpoint of {script_of(cfg)}; remove it to start anew")

    # Another shape cannot go on with these weights. Another learning rate, say, can, and may be
    # wanted; but then it is no longer the run that never stopped.
    new = asdict(cfg)
    old = {"tokenizer_hash": cfg.tokenizer_hash} | state["config"]  # older runs do not have it
    for key in SHAPING:
        if key in new and old.get(key) != new[key]:
            die(f"cannot resume: {path} has {key} {old.get(key)}, this run {new[key]}; "
                "use the same, or another --out_dir")
    changed = [key for key in new if key not in FREE and old.get(key) != new[key]]
    changes = [f"{key} {old.get(key)} -> {new[key]}" for key in changed]
    data = fingerprint(run.train)
    if state.get("data", data) != data:  # older checkpoints have none
        changes.append(f"the tokens in {cfg.data_dir}/train.bin")
    if changes:
        run.say("note: changed since the checkpoint, so not the same run any more: "
                + ", ".join(changes))
    return state


def restore(run: Run, job: Job) -> int:
    """Put modules and optimizer where the checkpoint left them. Returns the steps done, or 0."""
    state = load_state(run, job.modules)
    if state is None:
        return 0
    # the tensors of `state` are copied from, not kept: they are gone when this function returns
    groups = job.optimizer.param_groups
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    try:
        for name, module in job.modules.items():
            if name == "model":
                module.load_weights(state[name])
            else:
                module.load_state_dict(state[name])
        job.optimizer.load_state_dict(state["optimizer"])
        # moments from the checkpoint, settings from this run's config
        for group, fresh in zip(job.optimizer.param_groups, settings):
            group.update(fresh)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        die(f"{run.cfg.out_dir}/state.pt does not fit this model ({reason}); it may be of an older "
            "version: start anew in another --out_dir")
    run.say(f"resuming {run.cfg.out_dir} at step {state['step']}")
    return state["step"]


def trim_log(path: str, step: int) -> None:
    """Drop what was logged after the checkpoint, and lines that a kill or a crash left broken."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, "rb") as f:
        for line in f:
            try:
                logged = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):  # cut off, blank, zeros, not UTF-8
                continue
            if logged and line.endswith(b"\n"):
                kept.append(line)
    write_atomic(path, b"".join(kept))


@contextmanager
def own_directory(run: Run) -> Iterator[None]:
    """Meanwhile no other run can use this one's directory: the two would spoil each other's."""
    out_dir = run.cfg.out_dir
    with ExitStack() as stack:
        try:
            if run.rank == 0:
                stack.enter_context(sole_user(out_dir))
        except BlockingIOError:
            die(f"another process trains in {out_dir}; wait for it, or give another --out_dir")
        except OSError as e:
            die(f"cannot write to out_dir '{out_dir}': {e.strerror}")
        yield


def prepare_directory(run: Run, start: int) -> None:
    """The run directory with its config, and a log that ends where this run begins."""
    cfg = run.cfg
    try:
        remove_leftovers(cfg.out_dir)
        for kept in glob.glob(os.path.join(glob.escape(cfg.out_dir), "step_*", "")):
            remove_leftovers(kept)
            step = os.path.basename(os.path.dirname(kept)).removeprefix("step_")
            # of a run before this one, or a step that will come once more
            if step.isdecimal() and int(step) > start:
                shutil.rmtree(kept)
        write_atomic(os.path.join(cfg.out_dir, "train.toml"), to_toml(cfg).encode())
        trim_log(run.log_path, start)
    except OSError as e:
        die(f"cannot write to out_dir '{cfg.out_dir}': {e.strerror}")


def say_how_to_go_on(run: Run, done: int) -> None:
    command = "python" if run.world == 1 else f"torchrun --nproc_per_node={run.world}"
    config = shlex.quote(f"--config={run.cfg.out_dir}/train.toml")
    run.say(f"stopped after step {done}, all saved; go on with: "
            f"{command} {script_of(run.cfg)} {config} --resume=true")
