"""train.py: exact resume, several processes, kills and signals, the log, evaluation, refusal of bad input.

Tiny models on synthetic tokens. main() runs in this process, save where processes are the point.
"""
import builtins
import errno
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import jobs
import train
from config import sole_user
from model import GPT
from optim import L0AdamW

ROOT = Path(__file__).resolve().parent.parent
VOCAB, BLOCK, BATCH = 64, 16, 4
VAL_PARTS = {"idioms": [0, 20 * BLOCK + 1], "code": [20 * BLOCK + 1, 33 * BLOCK + 2]}  # windows tile each part
TINY = dict(device="cpu", n_layer=1, d_model=16, d_head=8, block_size=BLOCK, batch_size=BATCH, max_steps=12, density=0.2,
            log_interval=1, eval_interval=4, eval_tokens=10_000, save_interval=100)
SPEED = "tokens_per_s"  # the one logged value that no two runs share


@pytest.fixture(autouse=True)
def as_alone(monkeypatch):
    """One process, one thread, and the signal handlers as they were."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for s, handler in handlers:
        signal.signal(s, handler)


def tokens(n: int, factor: int, noise: float, rng) -> np.ndarray:
    """A sequence whose next token is mostly a function of the current one."""
    out = rng.integers(0, VOCAB, n)
    for i in np.flatnonzero(rng.random(n - 1) > noise):
        out[i + 1] = (factor * out[i] + 7) % VOCAB
    return out


def write_data(folder: Path) -> Path:
    """A data folder whose two validation parts differ in how predictable they are."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (a, b), (c, d) = VAL_PARTS.values()
    np.concatenate([tokens(3000, 3, 0.1, rng), tokens(3000, 5, 0.5, rng)]).astype("<u2").tofile(folder / "train.bin")
    np.concatenate([tokens(b - a, 3, 0.1, rng), tokens(d - c, 5, 0.5, rng)]).astype("<u2").tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCAB, "val_parts": VAL_PARTS}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("tokens") / "data")


def argv(data: Path, out: Path, **over) -> list[str]:
    return [f"--{k}={v}" for k, v in (TINY | dict(data_dir=data, out_dir=out) | over).items()]


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def state(out: Path) -> dict:
    return torch.load(out / "state.pt", weights_only=True)


def weights(out: Path) -> dict:
    return torch.load(out / "final_model.pt", weights_only=True)


def same(a, b) -> bool:
    """Equal to the last bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(out: Path, other: Path) -> None:
    a, b = state(out), state(other)
    assert a["step"] == b["step"] and same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
    assert same(weights(out), weights(other)) and same(weights(out), a["model"])
    assert [e | {SPEED: 0} for e in log(out)] == [e | {SPEED: 0} for e in log(other)]


def at_step(monkeypatch, n: int, action) -> None:
    """Call `action` in the n-th optimizer step from now, once."""
    step, count = L0AdamW.step, [0]

    def counted(self, closure=None):
        count[0] += 1
        result = step(self, closure)
        if count[0] == n:
            action()
        return result

    monkeypatch.setattr(train.L0AdamW, "step", counted)


def interrupt(sig=signal.SIGINT):
    return lambda: os.kill(os.getpid(), sig)


class Crash(BaseException):
    """What a power cut looks like from inside the process."""


def crash(*_):
    raise Crash


# --- resume --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """Twelve steps without a stop. Read only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train.main(argv(data, out)) == 0
    torch.set_num_threads(threads)
    for s, handler in handlers:
        signal.signal(s, handler)
    return out


def test_stops_and_resumes_give_bitwise_the_run_that_never_stopped(data, straight, tmp_path, monkeypatch):
    out, done = tmp_path / "run", 0
    for stop in (1, 4, 5, 6, 11):  # the first step, an evaluation, around the end of the anneal, the last but one
        with monkeypatch.context() as m:
            at_step(m, stop - done, interrupt())
            assert train.main(argv(data, out, resume=True)) == 130
        done = stop
        assert state(out)["step"] == stop and same(weights(out), state(out)["model"])
    assert train.main(argv(data, out, resume=True)) == 0
    assert_same_run(out, straight)


def test_steps_lost_in_a_crash_are_repeated_exactly_and_logged_once(data, straight, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for lost, torn in ((2, b'{"step": 2, "tok'), (8, b'{"step": 8'), (3, b"{")):
        with monkeypatch.context() as m:
            at_step(m, lost, crash)
            with pytest.raises(Crash):
                train.main(argv(data, out, resume=True, save_interval=5))
        with open(out / "log.jsonl", "ab") as f:
            f.write(torn)
    assert train.main(argv(data, out, resume=True, save_interval=5)) == 0
    assert [e["step"] for e in log(out)] == list(range(1, 13))
    assert_same_run(out, straight)


def test_the_data_order_depends_on_seed_and_step_alone(data, tmp_path, monkeypatch):
    read, windows = {}, train.inputs_and_targets

    def record(array, starts, *rest):
        if len(array) > 5000:  # the training data
            read.setdefault(run, []).append(list(starts))
        return windows(array, starts, *rest)

    monkeypatch.setattr(train, "inputs_and_targets", record)
    for run, over in (("straight", {}), ("other seed", {"seed": 1}), ("other lr", {"lr": 0.001, "log_interval": 5})):
        train.main(argv(data, tmp_path / run, **over))
    run = "stopped"
    for stop in (3, 4):
        with monkeypatch.context() as m:
            at_step(m, stop, interrupt(signal.SIGTERM))
            assert train.main(argv(data, tmp_path / run, resume=True)) == 143
    train.main(argv(data, tmp_path / run, resume=True))
    assert len(read["straight"]) == 12 and len({tuple(s) for s in read["straight"]}) == 12
    assert read["stopped"] == read["straight"] == read["other lr"]
    assert read["other seed"] != read["straight"]


def test_a_run_killed_between_its_last_two_files_still_ends_with_the_final_weights(data, straight, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        m.setattr(train.GPT, "save", lambda *_, **__: crash())
        with pytest.raises(Crash):
            train.main(argv(data, out))
    assert train.main(argv(data, out, resume=True)) == 0
    assert_same_run(out, straight)


def test_resume_without_a_checkpoint_starts_anew(data, straight, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "train_loss": 9.0}\n{"step": 2, "train')  # killed before the first save
    assert train.main(argv(data, out, resume=True)) == 0
    assert_same_run(out, straight)


def test_resuming_a_finished_run_changes_nothing(data, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    assert train.main(argv(data, out, resume=True)) == 0
    assert_same_run(out, straight)


def test_a_density_changed_at_resume_is_that_of_weights_and_log(data, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    assert train.main(argv(data, out, resume=True, max_steps=16, density=0.1)) == 0
    last = log(out)[-1]
    assert last["density"] == 0.1
    c_fc = weights(out)["transformer.h.0.mlp.c_fc.weight"]
    assert c_fc.count_nonzero() == int(0.1 * c_fc.numel())


@pytest.mark.parametrize("key, value", [("weight_decay", 0.5), ("eps", 0.7), ("beta2", 0.5)])
def test_an_optimizer_setting_changed_at_resume_takes_effect(data, straight, tmp_path, key, value):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    assert train.main(argv(data, out, resume=True, max_steps=13, **{key: value})) == 0
    for group in state(out)["optimizer"]["param_groups"]:
        if key == "weight_decay":
            assert group["decay"] in (0.0, value)
        else:
            assert value in (group["eps"], *group["betas"])


# --- several processes, accumulation -------------------------------------------------------------

TWO = """
import hashlib, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import torch
import torch.distributed as dist
import train

torch.set_num_threads(1)
step, count = train.L0AdamW.step, 0

def checked(self, closure=None):
    global count
    result = step(self, closure)
    count += 1
    raw = b"".join(p.detach().numpy().tobytes() for g in self.param_groups for p in g["params"])
    digests = [None, None]
    dist.all_gather_object(digests, hashlib.sha256(raw).hexdigest())
    assert digests[0] == digests[1], f"weights differ after step {count}"
    if count == 52 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # only one of them hears of it
    return result

train.L0AdamW.step = checked
code = train.main(sys.argv[1:])
with open(f"{sys.argv[1].partition('=')[2]}.{dist.get_rank()}", "w") as f:
    f.write(f"{code} {count}")
train.leave(0)  # as train.py ends, for what it does about gloo's threads
"""


def test_two_processes_have_the_losses_of_one_the_same_weights_and_stop_together(data, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    over = dict(max_steps=60, grad_accum=2, eval_interval=10)
    two, one = tmp_path / "two", tmp_path / "one"
    port = free_port()
    args = argv(data, two, **over)
    args.sort(key=lambda a: not a.startswith("--out_dir"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-addr=127.0.0.1", f"--master-port={port}",
         str(tmp_path / "two.py"), str(ROOT), *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    stopped = [(tmp_path / f"two.{rank}").read_text().split() for rank in (0, 1)]
    assert stopped[0] == stopped[1] and stopped[0][0] == "143"
    steps = state(two)["step"]
    assert str(steps) == stopped[0][1] and steps in (52, 53)
    assert [e["step"] for e in log(two)] == list(range(1, steps + 1))

    assert train.main(argv(data, one, **over)) == 0
    assert train.main(argv(data, two, resume=True, **over)) == 0  # one process goes on with what two have saved
    for a, b in zip(log(one), log(two), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
        assert b["tokens"] == a["tokens"] and b["nonzeros"] == a["nonzeros"]
        if "val_loss" in a:
            for key in ("val_loss", "bigram_loss"):
                assert b[key] == pytest.approx(a[key], abs=1e-5)


SEVERAL = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import torch
import torch.distributed as dist
import train

torch.set_num_threads(1)
step, count = train.L0AdamW.step, 0

def stopped(self, closure=None):
    global count
    count += 1
    if count == 4 and dist.get_rank() == 0 and stopping:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, closure)

train.L0AdamW.step = stopped
meet = train.meet
train.meet = lambda backend: dist.is_initialized() or meet(backend)  # once for all three runs
folder, *rest = sys.argv[1:]
for name, stopping, more in (("straight", False, ""), ("stopped", True, ""), ("stopped", False, "--resume=true")):
    count = 0
    code = train.main([f"--out_dir={folder}/{name}", *rest, *more.split()])
    assert code == (143 if stopping else 0), code
    dist.barrier()
train.leave(0)
"""


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_run_of_several_processes_that_was_stopped_goes_on_to_the_same_bits(data, tmp_path, n):
    (tmp_path / "several.py").write_text(SEVERAL)
    args = [a for a in argv(data, tmp_path, max_steps=8, batch_size=12, d_model=64, n_layer=2) if not a.startswith("--out_dir")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master-addr=127.0.0.1", f"--master-port={free_port()}",
         str(tmp_path / "several.py"), str(ROOT), str(tmp_path), *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arning" not in done.stderr.replace("torch.jit.script_method", "")
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import torch.distributed as dist
import jobs
import train
from config import as_script, die

jobs.PATIENCE = 1
step, count = train.L0AdamW.step, 0

def dies(self, closure=None):
    global count
    count += 1
    if count == 7 and dist.get_rank() == 1:
        if os.environ["HOW"] == "die":
            die("the memory of rank 1 is full")
        os.kill(os.getpid(), getattr(signal, os.environ["HOW"]))
    return step(self, closure)

train.L0AdamW.step = dies
as_script(train.main, train.leave)
"""


@pytest.mark.parametrize("how", ["die", "SIGKILL"])
def test_a_rank_that_dies_ends_the_others_with_its_reason(data, tmp_path, how):
    (tmp_path / "dying.py").write_text(DYING)
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}",
         str(tmp_path / "dying.py"), str(ROOT), *argv(data, out, max_steps=100_000, save_interval=5)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1", "HOW": how})
    assert done.returncode != 0  # and within the timeout, far less than the half hour that a rank would wait
    said = [line for line in done.stderr.splitlines() if line.startswith("dying.py")]
    if how == "die":
        assert "dying.py, rank 1: the memory of rank 1 is full" in said
    assert "dying.py, rank 0: another process of this run has ended" in done.stderr
    assert f'File "{ROOT}/train.py"' not in done.stderr  # the one traceback is torchrun's own
    assert state(out)["step"] == 5  # the last checkpoint is whole
    assert train.main(argv(data, out, max_steps=8, resume=True)) == 0


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_accumulation_gives_the_losses_of_one_pass(data, straight, tmp_path, parts):
    assert train.main(argv(data, tmp_path / "run", grad_accum=parts)) == 0
    for a, b in zip(log(straight), log(tmp_path / "run"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["grad_rms"] == pytest.approx(a["grad_rms"], rel=1e-3)
        assert b["tokens"] == a["tokens"]


def test_a_rank_that_waits_for_one_that_is_stuck_hears_a_signal_all_the_same(data, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    out = tmp_path / "run"
    env = os.environ | {"OMP_NUM_THREADS": "1", "HOW": "SIGSTOP", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, str(tmp_path / "dying.py"), str(ROOT), *argv(data, out, max_steps=100_000)]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    try:
        wait_for_step(ranks[0], out, 6)
        time.sleep(1)  # it waits for the gradients of the other one
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(timeout=20) == 1
        assert "rank 0: another process of this run did not answer" in ranks[0].stderr.read()
    finally:
        for rank in ranks:
            rank.kill()


# --- checkpoints ---------------------------------------------------------------------------------

def test_kept_steps_are_the_models_that_training_went_through(data, tmp_path):
    out = tmp_path / "run"
    assert train.main(argv(data, out, keep_every=5, save_interval=5)) == 0
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["step_000005", "step_000010"]
    for step in (5, 10):
        short = tmp_path / f"to_{step}"
        with pytest.MonkeyPatch.context() as m:
            at_step(m, step, interrupt())
            train.main(argv(data, short))
        assert same(weights(out / f"step_{step:06}"), weights(short))
        assert GPT.load(str(out / f"step_{step:06}")).config == GPT.load(str(out)).config
    assert not same(weights(out / "step_000005"), weights(out / "step_000010"))


def test_steps_of_an_earlier_run_do_not_stay_among_those_of_a_new_one(data, tmp_path):
    out = tmp_path / "run"
    assert train.main(argv(data, out, keep_every=5)) == 0
    (out / "step_by_step").mkdir()  # not one of ours
    (out / "state.pt").unlink()
    assert train.main(argv(data, out, keep_every=4, seed=1, max_steps=4)) == 0
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["step_000004", "step_by_step"]


def test_a_run_that_was_killed_while_it_kept_a_step_keeps_it_when_it_goes_on(data, tmp_path, monkeypatch):
    out, saved = tmp_path / "run", GPT.save
    with monkeypatch.context() as m:
        m.setattr(train.GPT, "save", lambda self, path, **more: crash() if "step_" in path else saved(self, path, **more))
        with pytest.raises(Crash):
            train.main(argv(data, out, keep_every=5, save_interval=5))
    assert not (out / "step_000005" / "final_model.pt").exists()
    assert train.main(argv(data, out, keep_every=5, save_interval=5, resume=True)) == 0
    assert all((out / f"step_{step:06}" / "final_model.pt").exists() for step in (5, 10))


def test_training_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_of_its_step(data, straight, tmp_path, monkeypatch):
    out, write, ninth = tmp_path / "run", jobs.write_atomic, tmp_path / "ninth.pt"
    eleventh = threading.Event()

    def slow(path, content):  # the checkpoint of step 9 is not written before step 11 is done
        if path.endswith("state.pt") and not ninth.exists():
            assert eleventh.wait(timeout=60)
            write(str(ninth), content)
        write(path, content)

    with monkeypatch.context() as m:
        at_step(m, 11, eleventh.set)
        m.setattr(jobs, "write_atomic", slow)
        assert train.main(argv(data, out, save_interval=9)) == 0
    assert_same_run(out, straight)
    with monkeypatch.context() as m:
        at_step(m, 9, interrupt())
        train.main(argv(data, tmp_path / "to_9"))
    a, b = torch.load(ninth, weights_only=True), state(tmp_path / "to_9")
    assert a["step"] == b["step"] == 9 and same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


# --- kills and signals ---------------------------------------------------------------------------

KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import torch
import train

out = sys.argv[1].partition("=")[2]
rng = random.Random(0)

def stamp():
    try:
        return os.stat(out + "/final_model.pt").st_mtime_ns
    except FileNotFoundError:
        return 0

for kill in range(6):
    before = stamp()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        os._exit(train.main(sys.argv[1:]))
    while stamp() == before:  # until it has saved
        time.sleep(0.002)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended by itself"
    time.sleep(0.1 * rng.random())
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    state = torch.load(out + "/state.pt", weights_only=True)
    model = torch.load(out + "/final_model.pt", weights_only=True)
    assert model.keys() == state["model"].keys()
    print(state["step"], flush=True)
"""


def test_a_run_killed_at_random_moments_always_goes_on_to_the_same_end(data, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    over = dict(max_steps=200, eval_interval=50)
    args = argv(data, killed, resume=True, **over | dict(save_interval=1))
    args.sort(key=lambda a: not a.startswith("--out_dir"))
    done = subprocess.run([sys.executable, str(tmp_path / "killer.py"), str(ROOT), *args],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [int(line) for line in done.stdout.split()]
    assert len(steps) == 6 and steps == sorted(set(steps)) and steps[-1] < 200
    GPT.load(str(killed))
    assert train.main(argv(data, killed, resume=True, **over)) == 0
    assert train.main(argv(data, straight, **over)) == 0
    assert [e["step"] for e in log(killed)] == list(range(1, 201))
    assert_same_run(killed, straight)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and f'{{"step": {step},' in (out / "log.jsonl").read_text():
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no step {step}: {process.communicate()}")


def test_sigint_exits_130_sigterm_143_after_saving_and_the_printed_command_resumes(data, tmp_path):
    out = tmp_path / "run"
    command = ["python", "train.py", *argv(data, out, max_steps=100_000, eval_interval=100_000)]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    at = 0
    for sig, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_step(process, out, at + 1)
        process.send_signal(sig)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == code and stderr == ""
        assert [e["step"] for e in log(out)] == list(range(1, state(out)["step"] + 1))  # the step was finished and saved
        assert same(weights(out), state(out)["model"])
        at, (command,) = state(out)["step"], [re.search(r"python .*", line)[0] for line in stdout.splitlines() if "--resume" in line]
        command = shlex.split(command)


def test_the_printed_command_resumes_a_run_whose_name_needs_quotes(data, straight, tmp_path, monkeypatch, capsys):
    out = tmp_path / "my run's $HOME"
    with monkeypatch.context() as m:
        at_step(m, 5, interrupt())
        assert train.main(argv(data, out)) == 130
    command = shlex.split(re.search(r"python .*--resume.*", capsys.readouterr().out)[0])
    assert train.main(command[2:]) == 0
    assert_same_run(out, straight)


def test_a_signal_in_the_last_step_leaves_a_finished_run(data, straight, tmp_path, monkeypatch):
    at_step(monkeypatch, 12, interrupt())
    train.main(argv(data, tmp_path / "run"))
    assert_same_run(tmp_path / "run", straight)


# --- values that are not finite ------------------------------------------------------------------

def finite(state_dict: dict) -> bool:
    return all(t.isfinite().all() for t in state_dict.values())


@pytest.mark.parametrize("lr", ["1e20", "1e30", "1e38", "1e300"])
def test_an_exploding_run_stops_names_the_step_and_keeps_finite_weights(data, tmp_path, capsys, lr):
    out = tmp_path / "run"
    code = train.main(argv(data, out, lr=lr, save_interval=1, max_steps=100, eval_interval=100))
    text = capsys.readouterr()
    entries = log(out) if (out / "log.jsonl").exists() else []
    assert code not in (0, None) and len(entries) < 100
    assert f"step {len(entries) + 1}:" in text.out + text.err
    assert all(math.isfinite(e["train_loss"]) for e in entries)
    if (out / "state.pt").exists():
        assert finite(state(out)["model"]) and finite(weights(out))


def test_a_poisoned_state_stops_at_once_and_is_not_overwritten(data, straight, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    poisoned = state(out)
    poisoned["model"]["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.nan
    torch.save(poisoned, out / "state.pt")
    before = [(out / name).read_bytes() for name in ("state.pt", "final_model.pt", "log.jsonl")]
    assert train.main(argv(data, out, resume=True, max_steps=20, save_interval=1)) not in (0, None)
    text = capsys.readouterr()
    assert "step 13:" in text.out + text.err
    assert [(out / name).read_bytes() for name in ("state.pt", "final_model.pt", "log.jsonl")] == before


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(data, tmp_path, monkeypatch, capsys):
    out, count = tmp_path / "run", [0]

    def poison(self, inputs):
        count[0] += 1
        if count[0] == 6:
            self.lm_head.weight.register_hook(lambda g: g * math.inf)

    def model(config):
        gpt = GPT(config)
        gpt.register_forward_pre_hook(poison)
        return gpt

    monkeypatch.setattr(train, "GPT", model)
    assert train.main(argv(data, out, save_interval=1, eval_interval=100)) not in (0, None)
    text = capsys.readouterr()
    assert "step 6:" in text.out + text.err
    assert state(out)["step"] == 5 and finite(state(out)["model"]) and log(out)[-1]["step"] == 5


# --- the log, sparsity, evaluation ---------------------------------------------------------------

def test_each_log_line_has_every_field(straight):
    always = {"step", "tokens", "train_loss", "density", "lr", "grad_rms", "nonzeros", SPEED}
    at_eval = {"val_loss", "bigram_loss", "dead_neurons"}
    for entry in log(straight):
        assert entry.keys() == always | (at_eval if entry["step"] % 4 == 0 else set())
        assert all(math.isfinite(entry[key]) for key in always)
        assert entry["tokens"] == entry["step"] * BATCH * BLOCK
        if "val_loss" in entry:
            assert entry["val_loss"].keys() == entry["bigram_loss"].keys() == VAL_PARTS.keys()
            assert 0 <= entry["dead_neurons"] <= 1


def test_the_log_is_written_and_evaluated_at_its_intervals(data, tmp_path):
    assert train.main(argv(data, tmp_path / "run", max_steps=14, log_interval=5, eval_interval=6)) == 0
    steps = {e["step"]: "val_loss" in e for e in log(tmp_path / "run")}
    assert steps.items() >= {5: False, 6: True, 10: False, 12: True, 14: True}.items() and set(steps) <= {1, 5, 6, 10, 12, 14}


def test_density_falls_linearly_to_the_target_and_lr_is_the_sharkfin(data, tmp_path):
    out = tmp_path / "run"
    assert train.main(argv(data, out, max_steps=40, density=0.1, anneal_start=0.1, anneal_end=0.5, lr=0.02, warmup=0.1, eval_interval=100)) == 0
    for e in log(out):
        i = e["step"] - 1  # steps are counted from 0, as in the authors' script
        assert e["density"] == pytest.approx(1 - 0.9 * min(1, max(0, (i - 4) / 16)))
        ramp = i / 4 if i < 4 else 1 - (i - 4) / 36
        assert e["lr"] == pytest.approx(0.02 * ramp * math.sqrt(0.1 / e["density"]))


def test_nonzeros_of_log_and_checkpoint_are_the_schedules_budget(data, tmp_path, monkeypatch):
    out, seen, step = tmp_path / "run", {}, L0AdamW.step

    def record(self, closure=None):
        result = step(self, closure)
        seen[len(seen) + 1] = [[p.count_nonzero().item(), p.numel(), p.dim()]
                               for g in self.param_groups if g["target_density"] is not None for p in g["params"]]
        return result

    monkeypatch.setattr(train.L0AdamW, "step", record)
    assert train.main(argv(data, out, max_steps=20, density=0.05, afrac=0.5)) == 0
    for e in log(out):
        tensors = seen[e["step"]]
        assert e["nonzeros"] == sum(nonzeros for nonzeros, _, _ in tensors)
        for nonzeros, n, dim in tensors:
            budget = max(1, int(e["density"] * n))
            assert nonzeros == budget or dim == 1 and nonzeros < budget  # a bias may have had fewer to begin with
    sparse = [w for name, w in weights(out).items()
              if not re.search(r"ln_|sink_logit|bigram|wpe|final_logits", name)]
    assert log(out)[-1]["nonzeros"] == sum(w.count_nonzero().item() for w in sparse)
    assert sum(w.numel() for w in sparse) == sum(n for _, n, _ in seen[1])  # matrices, biases, both embeddings; nothing else


def test_the_dense_baseline_keeps_every_weight_and_learns(data, tmp_path):
    out = tmp_path / "run"
    assert train.main(argv(data, out, density=1, afrac=0, max_steps=40, bigram="none")) == 0
    sparse = [w for name, w in weights(out).items() if not re.search("wpe|final_logits", name)]
    assert all((w != 0).all() for w in sparse)
    assert {e["density"] for e in log(out)} == {1.0} and len({e["nonzeros"] for e in log(out)[1:]}) == 1
    config = json.loads((out / "beeg_config.json").read_text())
    assert config["afrac"] is None
    assert log(out)[-1]["val_loss"]["idioms"] < log(out)[0]["train_loss"]


def tiles(data: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = VAL_PARTS[part]
    part = torch.from_numpy(np.fromfile(data / "val.bin", "<u2")[a:b].astype(np.int64))
    return part[:-1].view(-1, BLOCK), part[1:].view(-1, BLOCK)


def test_the_logged_bigram_loss_is_that_of_the_smoothed_counts(data, straight):
    stream = np.fromfile(data / "train.bin", "<u2").astype(int)
    counts = np.zeros((VOCAB, VOCAB))
    for a, b in zip(stream[:-1], stream[1:]):
        counts[a, b] += 1
    unigram = (counts.sum(0) + 1) / (counts.sum() + VOCAB)
    table = (counts + 4 * unigram) / (counts.sum(1)[:, None] + 4)
    logged = {e["step"]: e["bigram_loss"] for e in log(straight) if "bigram_loss" in e}
    assert set(logged) == {4, 8, 12}
    for part in VAL_PARTS:
        x, y = tiles(data, part)
        want = -np.log(table[x.numpy(), y.numpy()]).mean()
        assert [v[part] for v in logged.values()] == pytest.approx([want] * 3, rel=1e-5)
    assert logged[4]["idioms"] < logged[4]["code"] - 0.5  # the parts are not mixed up


def test_bigram_counts_do_not_depend_on_the_pieces_they_are_counted_in():
    long = np.zeros((1 << 24) + 3, dtype="<u2")
    long[(1 << 24) - 1 :] = [1, 2, 3, 1]  # ... 0 0 1 | 2 3 1 around the border of the first piece
    p = train.bigram_log_probs(long, 4).exp()
    assert torch.allclose(p.sum(1), torch.ones(4), atol=1e-4)
    for a, b in ((1, 2), (2, 3), (3, 1)):
        unigram = {1: 2, 2: 1, 3: 1}[b] + 1
        assert p[a, b].item() == pytest.approx((1 + 4 * unigram / (len(long) + 3)) / 5, rel=1e-4)


def test_a_token_that_never_occurs_still_has_a_finite_bigram_loss():
    p = train.bigram_log_probs(np.array([0, 1, 0, 2, 0, 1], dtype="<u2"), 4).exp()  # 3 is absent
    unigram = torch.tensor([3, 3, 2, 1]) / 9  # 2, 2, 1, 0 followers among 5 pairs, and one more each
    assert torch.allclose(p[3], unigram)
    assert torch.allclose(p[0], (torch.tensor([0, 2, 1, 0]) + 4 * unigram) / 7)


def test_the_logged_validation_losses_and_dead_neurons_are_those_of_the_saved_model(data, straight):
    model, alive, losses = GPT.load(str(straight)), torch.zeros(64, dtype=torch.bool), {}
    entry = log(straight)[-1]

    def watch(site, x):
        if site == "0.mlp.post_act":
            alive.logical_or_((x != 0).flatten(0, 1).any(0))
        return x

    for part in VAL_PARTS:
        with torch.no_grad():
            losses[part] = model(*tiles(data, part), nodes=watch)[1].item()
    assert entry["val_loss"] == pytest.approx(losses, rel=1e-5)
    assert entry["dead_neurons"] == pytest.approx(1 - alive.float().mean().item())


def test_evaluation_of_a_share_of_the_data_takes_no_more_tokens_than_asked(data, tmp_path, monkeypatch):
    read, windows = [], train.inputs_and_targets

    def record(array, starts, *rest):
        if len(array) < 1000:  # the validation data
            read.extend(starts)
        return windows(array, starts, *rest)

    monkeypatch.setattr(train, "inputs_and_targets", record)
    assert train.main(argv(data, tmp_path / "run", eval_tokens=5 * BLOCK, eval_interval=6)) == 0
    assert len(read) == 2 * 2 * 5 and read[:10] == read[10:]  # two evaluations, two parts, the same windows each time
    for (a, b), starts in zip(VAL_PARTS.values(), (read[:5], read[5:10])):
        assert all(a <= s and s + BLOCK + 1 <= b for s in starts) and len(set(starts)) == 5


def test_the_loss_falls_on_learnable_data_and_the_progress_is_printed(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(argv(data, out, max_steps=150, eval_interval=50, log_interval=10, density=0.3, batch_size=16)) == 0
    entries = log(out)
    assert entries[0]["train_loss"] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert entries[-1]["val_loss"]["idioms"] < entries[0]["train_loss"] - 0.5
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == len(entries)
    for line, e in zip(lines, entries):
        assert f"{e['step']}/150" in line and f"{e['train_loss']:.3f}" in line and f"{e['density']:.3f}" in line
        assert re.search(r"lr \d.*tokens/s.*(min|s|h) left", line)


def test_a_model_that_starts_from_the_counted_bigrams_starts_at_their_loss(data, tmp_path):
    assert train.main(argv(data, tmp_path / "run", bigram="counts", max_steps=1)) == 0
    entry = log(tmp_path / "run")[0]
    assert entry["val_loss"] == pytest.approx(entry["bigram_loss"], abs=0.3)


def test_a_run_directory_is_a_published_model_and_its_own_config(data, straight, tmp_path):
    assert {p.name for p in straight.iterdir()} == {"beeg_config.json", "final_model.pt", "train.toml", "log.jsonl", "state.pt"}
    config = GPT.load(str(straight)).config
    assert (config.n_layer, config.d_model, config.d_head, config.n_head, config.block_size, config.vocab_size) == (1, 16, 8, 2, BLOCK, VOCAB)
    assert config.rms_norm and config.sink and config.afrac == 0.25 and config.enable_bigram_table
    again = tmp_path / "again"
    assert train.main([f"--config={straight}/train.toml", f"--out_dir={again}"]) == 0
    assert_same_run(again, straight)


@pytest.mark.parametrize("over", [
    dict(dtype="bfloat16"), dict(grad_rms="normalize"), dict(grad_rms="clip"), dict(positions="added"),
    dict(positions="sinusoids", d_pos_emb=4),
    dict(positions="concat", d_pos_emb=4), dict(bigram="none", sink="false"), dict(grad_checkpointing="true"), dict(n_head=3, d_mlp=24),
], ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_option_trains_saves_and_resumes(data, tmp_path, monkeypatch, over):
    out, step, rms = tmp_path / "run", L0AdamW.step, []

    def record(self, closure=None):
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        n = sum(p.numel() for g in self.param_groups for p in g["params"])
        rms.append(math.sqrt(sum(g.double().pow(2).sum().item() for g in grads if g is not None) / n))
        return step(self, closure)

    monkeypatch.setattr(train.L0AdamW, "step", record)
    assert train.main(argv(data, out, **over)) == 0
    assert train.main(argv(data, out, max_steps=14, resume=True, **over)) == 0
    entries = log(out)
    assert len(entries) == 14 and entries[-1]["train_loss"] < entries[0]["train_loss"] + 0.5
    assert all(w.dtype == torch.float32 for w in weights(out).values())
    for e, used in zip(entries, rms):
        want = min(1.0, e["grad_rms"]) if over.get("grad_rms") == "clip" else e["grad_rms"] / (e["grad_rms"] + 1e-5)
        assert used == pytest.approx(want, rel=1e-4)
    assert GPT.load(str(out)).config.d_pos_emb == over.get("d_pos_emb")


def test_bfloat16_changes_the_losses_a_little(data, straight, tmp_path):
    assert train.main(argv(data, tmp_path / "run", dtype="bfloat16")) == 0
    a, b = ([e["train_loss"] for e in log(out)] for out in (straight, tmp_path / "run"))
    assert a != b and a[:4] == pytest.approx(b[:4], rel=0.02)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_run_compiles_once_and_gives_the_losses_of_a_plain_one(data, straight, tmp_path, monkeypatch):
    import torch._dynamo
    torch._dynamo.reset()  # what other tests compiled, under another number of threads
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)  # density and lr change at every step
    out = tmp_path / "run"
    assert train.main(argv(data, out, compile="true")) == 0
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for a, b in zip(log(straight), log(out), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=2e-3)
    assert weights(out).keys() == weights(straight).keys()


# --- bad input: one line, exit status 2, nothing written -----------------------------------------

def contents(folder: Path) -> dict:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def assert_refused(capsys, folder: Path, args: list[str], *named: str) -> None:
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train.main(args)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1 and err.strip()
    assert not warned  # each is two more lines on stderr
    for name in named:
        assert name in err
    assert contents(folder) == before


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def change_meta(**changes):
    return lambda d: (d / "meta.json").write_text(json.dumps(json.loads((d / "meta.json").read_text()) | changes))


def put_token(name: str, token: int):
    def change(d):
        stream = np.fromfile(d / name, "<u2")
        stream[len(stream) // 2] = token
        stream.tofile(d / name)
    return change


BAD_DATA = {
    "no folder": (lambda d: shutil.rmtree(d), "data"),
    "no meta.json": (lambda d: (d / "meta.json").unlink(), "meta.json"),
    "meta.json cut off": (lambda d: truncate(d / "meta.json", 10), "meta.json"),
    "meta.json without val_parts": (lambda d: (d / "meta.json").write_text('{"vocab_size": 64}'), "meta.json"),
    "meta.json a list": (lambda d: (d / "meta.json").write_text("[1]"), "meta.json"),
    "meta.json with a vocabulary in words": (change_meta(vocab_size="many"), "meta.json"),
    "meta.json with parts that are no ranges": (change_meta(val_parts={"idioms": 3}), "meta.json"),
    "meta.json with a list of parts": (change_meta(val_parts=[[0, 300]]), "meta.json"),
    "no train.bin": (lambda d: (d / "train.bin").unlink(), "train.bin"),
    "empty train.bin": (lambda d: truncate(d / "train.bin", 0), "train.bin"),
    "odd train.bin": (lambda d: truncate(d / "train.bin", 4001), "train.bin"),
    "no val.bin": (lambda d: (d / "val.bin").unlink(), "val.bin"),
    "empty val.bin": (lambda d: truncate(d / "val.bin", 0), "val.bin"),
    "odd val.bin": (lambda d: truncate(d / "val.bin", 401), "val.bin"),
    "val.bin shorter than its parts": (lambda d: truncate(d / "val.bin", 700), "val.bin"),
    "train.bin a folder": (lambda d: ((d / "train.bin").unlink(), (d / "train.bin").mkdir()), "train.bin"),
    "train token past the vocabulary": (put_token("train.bin", VOCAB), "train.bin"),
    "val token past the vocabulary": (put_token("val.bin", 65535), "val.bin"),
    "train shorter than a block": (lambda d: truncate(d / "train.bin", 2 * BLOCK), "block_size"),
    "a val part shorter than a block": (change_meta(val_parts={"idioms": [0, 300], "code": [300, 300 + BLOCK]}), "code"),
    "an empty val part": (change_meta(val_parts={"idioms": [0, 0], "code": [0, 300]}), "idioms"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_data_are_refused(tmp_path, capsys, case):
    spoil, named = BAD_DATA[case]
    spoil(write_data(tmp_path / "data"))
    assert_refused(capsys, tmp_path, argv(tmp_path / "data", tmp_path / "out"), named)


def test_data_of_one_block_and_one_target_are_enough(tmp_path):
    data = write_data(tmp_path / "data")
    truncate(data / "train.bin", 2 * (BLOCK + 1))
    change_meta(val_parts={"idioms": [0, BLOCK + 1], "code": [BLOCK + 1, 2 * (BLOCK + 1)]})(data)
    assert train.main(argv(data, tmp_path / "out", max_steps=2)) == 0


@pytest.mark.parametrize("over, named", [
    (dict(d_head=0), "d_head"), (dict(d_head=-8), "d_head"), (dict(d_head=5), "d_head"), (dict(n_layer=0), "n_layer"),
    (dict(d_model=0), "d_model"), (dict(d_mlp=-1), "d_mlp"), (dict(n_head=-1), "n_head"), (dict(block_size=0), "block_size"),
    (dict(density=0), "density"), (dict(density=1.5), "density"), (dict(density=-0.1), "density"), (dict(density="nan"), "density"),
    (dict(afrac=0.001), "afrac"), (dict(afrac=1.5), "afrac"), (dict(afrac=-0.5), "afrac"), (dict(afrac="nan"), "afrac"),
    (dict(batch_size=0), "batch_size"), (dict(batch_size=4, grad_accum=3), "batch_size"), (dict(grad_accum=0), "grad_accum"),
    (dict(dtype="float16"), "dtype"), (dict(device="tpu"), "device"), (dict(positions="sin"), "positions"),
    (dict(bigram="yes"), "bigram"), (dict(grad_rms="none"), "grad_rms"), (dict(max_steps=0), "max_steps"),
    (dict(lr="nan"), "lr"), (dict(lr=0), "lr"), (dict(lr=-1), "lr"), (dict(lr="inf"), "lr"), (dict(eps=0), "eps"),
    (dict(warmup=-0.1), "warmup"), (dict(weight_decay="nan"), "weight_decay"), (dict(beta1=1), "beta1"), (dict(beta2=-1), "beta2"),
    (dict(anneal_end=0), "anneal_end"), (dict(anneal_end=1.5), "anneal_end"), (dict(anneal_start=0.6), "anneal_start"),
    (dict(anneal_start="nan"), "anneal_start"), (dict(save_interval=0), "save_interval"), (dict(log_interval=0), "log_interval"),
    (dict(eval_interval=-1), "eval_interval"), (dict(eval_tokens=0), "eval_tokens"), (dict(seed=-1), "seed"),
    (dict(positions="concat", d_pos_emb=0), "d_pos_emb"), (dict(positions="sinusoids", d_pos_emb=0), "d_pos_emb"),
    (dict(positions="concat", d_pos_emb=-4), "d_pos_emb"),
    (dict(min_per_neuron=-1), "min_per_neuron"), (dict(out_dir=""), "out_dir"),
    (dict(n_layer="one"), "n_layer"), (dict(lr="fast"), "lr"), (dict(sink="maybe"), "sink"),  # mistyped
    (dict(d_modle=16), "'d_model'"), (dict(learning_rate=0.1), "learning_rate"),  # unknown
], ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={x}" for k, x in v.items()))
def test_impossible_settings_are_refused_by_name(data, tmp_path, capsys, monkeypatch, over, named):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, tmp_path, argv(data, tmp_path / "out", **over), named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_is_refused(data, tmp_path, capsys):
    assert_refused(capsys, tmp_path, argv(data, tmp_path / "out", device="cuda"), "cuda")


@pytest.mark.parametrize("text, named", [
    ("d_modle = 16", "'d_model'"), ('n_layer = "1"', "n_layer"), ("sink = 1", "sink"), ("n_layer = ", "not valid TOML"), (None, "cannot read"),
], ids=["unknown key", "text for a number", "number for a bool", "invalid", "missing"])
def test_a_bad_config_file_is_refused_by_name(data, tmp_path, capsys, text, named):
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_text(text)
    assert_refused(capsys, tmp_path, [f"--config={path}", f"--data_dir={data}", f"--out_dir={tmp_path}/out"], named, "x.toml")


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_an_output_directory_below_a_file_is_refused(data, tmp_path, capsys, below):
    (tmp_path / "file").write_text("precious")
    assert_refused(capsys, tmp_path, argv(data, tmp_path / "file" / below), "file")


@pytest.fixture
def run_copy(straight, tmp_path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


def test_an_existing_run_is_not_overwritten_without_resume(data, run_copy, capsys):
    assert_refused(capsys, run_copy, argv(data, run_copy), "--resume")


@pytest.mark.parametrize("over, named", [
    (dict(n_layer=2), "n_layer"), (dict(d_model=32), "d_model"), (dict(d_head=4), "d_head"), (dict(d_mlp=32), "d_mlp"),
    (dict(block_size=8), "block_size"), (dict(sink="false"), "sink"), (dict(bigram="none"), "bigram"), (dict(n_head=1), "n_head"),
    (dict(positions="concat"), "positions"),
], ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={x}" for k, x in v.items()))
def test_resume_from_another_shape_is_refused(data, run_copy, capsys, over, named):
    assert_refused(capsys, run_copy, argv(data, run_copy, resume=True, **over), named)


def test_resume_with_another_vocabulary_is_refused(run_copy, tmp_path, capsys):
    change_meta(vocab_size=80)(write_data(tmp_path / "data"))
    assert_refused(capsys, run_copy, argv(tmp_path / "data", run_copy, resume=True), "state.pt")


def lose(key: str):
    return lambda s: {k: v for k, v in s.items() if k != key}


@pytest.mark.parametrize("foreign", [
    lambda s: torch.zeros(3), lambda s: [1, 2], lambda s: s["model"], lambda s: s["optimizer"],
    lose("config"), lose("model"), lose("optimizer"), lose("step"),
    lambda s: s | {"config": 3}, lambda s: s | {"model": 3}, lambda s: s | {"optimizer": 3}, lambda s: s | {"step": "x"},
    lambda s: s | {"optimizer": s["optimizer"] | {"state": {}, "param_groups": []}},
    lambda s: s | {"model": {k: v for k, v in s["model"].items() if k != "lm_head.weight"}},
], ids=["tensor", "list", "weights", "optimizer", "no config", "no model", "no optimizer", "no step", "config a number",
        "model a number", "optimizer a number", "step a word", "optimizer of another model", "a weight missing"])
def test_resume_from_a_foreign_file_is_refused(data, run_copy, capsys, foreign):
    torch.save(foreign(state(run_copy)), run_copy / "state.pt")
    assert_refused(capsys, run_copy, argv(data, run_copy, resume=True), "state.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_resume_from_a_truncated_file_is_refused(data, run_copy, capsys, share):
    truncate(run_copy / "state.pt", int(share * (run_copy / "state.pt").stat().st_size))
    assert_refused(capsys, run_copy, argv(data, run_copy, resume=True), "state.pt")


def test_resume_from_a_file_that_is_no_checkpoint_is_refused(data, run_copy, capsys):
    (run_copy / "state.pt").write_bytes(random.Random(0).randbytes(5000))
    assert_refused(capsys, run_copy, argv(data, run_copy, resume=True), "state.pt")


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
import train

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_disk_full_while_saving_keeps_the_old_checkpoint(data, run_copy, tmp_path):
    (tmp_path / "limited.py").write_text(LIMITED)
    kept = ("state.pt", "final_model.pt", "beeg_config.json")
    before = [(run_copy / name).read_bytes() for name in kept]
    limit = (run_copy / "state.pt").stat().st_size // 2  # config and log still fit
    done = subprocess.run([sys.executable, str(tmp_path / "limited.py"), str(ROOT), str(limit),
                           *argv(data, run_copy, resume=True, max_steps=15)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "step 15" in done.stderr
    assert [(run_copy / name).read_bytes() for name in kept] == before
    assert sorted(p.name for p in run_copy.iterdir()) == sorted([*kept, "log.jsonl", "train.toml"])
    assert train.main(argv(data, run_copy, resume=True, max_steps=15)) == 0  # with room again it goes on
    assert [e["step"] for e in log(run_copy)] == list(range(1, 16))


def test_a_disk_full_while_logging_ends_the_run_like_one_while_saving(data, run_copy, capsys, monkeypatch):
    def full(path, mode="r", *rest, **more):
        if "log.jsonl" in str(path) and mode.startswith("a"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return builtins.open(path, mode, *rest, **more)

    before = (run_copy / "state.pt").read_bytes(), (run_copy / "final_model.pt").read_bytes()
    monkeypatch.setattr(train, "open", full, raising=False)
    with pytest.raises(SystemExit) as stop:
        train.main(argv(data, run_copy, resume=True, max_steps=15))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "No space left" in err
    assert ((run_copy / "state.pt").read_bytes(), (run_copy / "final_model.pt").read_bytes()) == before


# --- faults found by use ---------------------------------------------------------------------------

@pytest.mark.parametrize("broken", [b"\x00\x00\x00\n", b"\n", b"caf\xe9\n", b"[1]\n", b'{"step": "two"}\n', b"\x00" * 5000])
def test_a_broken_line_in_the_log_does_not_keep_a_run_from_going_on(data, straight, run_copy, broken):
    lines = (run_copy / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run_copy / "log.jsonl").write_bytes(b"".join([*lines[:3], broken, b"\n" * (broken[-1:] != b"\n"), *lines[3:]]))
    assert train.main(argv(data, run_copy, resume=True)) == 0
    assert_same_run(run_copy, straight)


def test_a_vocabulary_too_large_for_a_bigram_table_is_evaluated_without_one(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LARGEST_TABLE", VOCAB - 1)
    monkeypatch.setattr(train, "bigram_log_probs", None)  # it is not counted
    assert train.main(argv(data, tmp_path / "run", bigram="none")) == 0
    assert "val_loss" in log(tmp_path / "run")[-1] and "bigram_loss" not in log(tmp_path / "run")[-1]
    assert "bigram table" not in capsys.readouterr().out
    assert_refused(capsys, tmp_path, argv(data, tmp_path / "other", bigram="counts"), "bigram")


def test_data_prepared_anew_in_place_are_noticed_at_resume(tmp_path, capsys):
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    assert train.main(argv(data, out)) == 0
    assert train.main(argv(data, out, resume=True, max_steps=12)) == 0
    assert "note" not in capsys.readouterr().out
    stream = np.fromfile(data / "train.bin", "<u2")
    stream[::-1].tofile(data / "train.bin")
    assert train.main(argv(data, out, resume=True, max_steps=12)) == 0
    assert "not the same run any more: the tokens in" in capsys.readouterr().out


def test_files_that_killed_runs_left_are_removed_and_those_of_others_are_not(data, run_copy):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    gone = [run_copy / f".state.pt.{dead.pid}@{host}.abc", run_copy / f".final_model.pt.{dead.pid}@{host}.x_y"]
    kept = [run_copy / f".state.pt.{os.getpid()}@{host}.abc", run_copy / f".state.pt.{dead.pid}@elsewhere.abc", run_copy / ".notes.abc"]
    for path in gone + kept:
        path.write_text("x")
    assert train.main(argv(data, run_copy, resume=True)) == 0
    assert not any(p.exists() for p in gone) and all(p.exists() for p in kept)


def test_training_into_a_closed_pipe_goes_on_to_the_end(data, straight, tmp_path):
    out = tmp_path / "run"
    command = shlex.join([sys.executable, "train.py", *argv(data, out)])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -n 1"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr and done.stdout.count("\n") == 1
    assert_same_run(out, straight)


def test_compiling_without_a_compiler_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    assert_refused(capsys, tmp_path, argv(data, tmp_path / "out", compile=True), "C++ compiler")


def test_each_process_that_fails_says_so_with_its_rank(tmp_path):
    data = write_data(tmp_path / "data")
    (data / "train.bin").unlink()
    done = subprocess.run([sys.executable, "train.py", *argv(data, tmp_path / "out")], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "rank 1" in done.stderr and "train.bin is missing" in done.stderr


def test_a_run_keeps_the_hash_of_its_tokenizer_and_does_not_go_on_with_another(tmp_path, capsys):
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    assert train.main(argv(data, out)) == 0  # data of another program, without a hash
    old = state(out)
    del old["config"]["tokenizer_hash"]  # as runs had it before
    torch.save(old, out / "state.pt")
    change_meta(tokenizer_hash="abc")(data)
    assert train.main(argv(data, out, resume=True)) == 0
    assert 'tokenizer_hash = "abc"' in (out / "train.toml").read_text()
    again = ["--resume=true", f"--config={out}/train.toml"]
    assert train.main(again) == 0
    change_meta(tokenizer_hash="xyz")(data)
    assert_refused(capsys, tmp_path, again, "another tokenizer")


def test_two_runs_cannot_have_one_directory_at_once(data, tmp_path, capsys):
    out = tmp_path / "run"
    with sole_user(str(out)):
        for resume in (False, True):
            assert_refused(capsys, tmp_path, argv(data, out, resume=resume), "another process trains in")
    assert train.main(argv(data, out, max_steps=2)) == 0


def test_a_clock_that_is_set_back_does_not_matter(data, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda clock=iter(range(10**6, 0, -1)): next(clock))
    assert train.main(argv(data, tmp_path / "run", max_steps=3)) == 0
    assert all(entry[SPEED] > 0 for entry in log(tmp_path / "run"))


def test_processes_that_cannot_meet_say_why(data, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "MASTER_ADDR"} | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "train.py", *argv(data, tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "MASTER_ADDR" in done.stderr and "torchrun" in done.stderr and not (tmp_path / "out").exists()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def gone(pids, seconds=30) -> bool:
    deadline = time.time() + seconds
    while time.time() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.1)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ranks_whose_torchrun_was_killed_save_and_end(data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}", "train.py",
               *argv(data, out, max_steps=100_000, eval_interval=100_000, save_interval=100_000)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(process, out, 2)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    process.kill()
    process.wait()
    assert gone(ranks)
    assert state(out)["step"] == log(out)[-1]["step"] >= 2


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_rank_that_waits_for_the_others_ends_when_its_torchrun_was_killed(data, tmp_path):
    command = [sys.executable, "train.py", *argv(data, tmp_path / "run")]
    # it starts the first of two ranks, says its number, and waits to be killed
    parent = f"import subprocess, time; print(subprocess.Popen({command!r}, cwd={str(ROOT)!r}).pid, flush=True); time.sleep(100)"
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "x"}
    process = subprocess.Popen([sys.executable, "-c", parent], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rank = int(process.stdout.readline())
    port = f"{int(env['MASTER_PORT']):04X} "
    deadline = time.time() + 60
    while time.time() < deadline and f":{port}" not in Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text():
        time.sleep(0.1)  # until it listens
    process.kill()
    process.wait()
    assert gone([rank])
