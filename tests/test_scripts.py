"""How every script starts and ends: signals, closed pipes, terminals that know only ASCII."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import GPT, GPTConfig
from tools import bench_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train.py", "bridge.py", "tasks.py", "prune.py", "validate.py", "steer.py", "view.py", "data/tinypython/prepare.py",
           "data/tinypython/train_tokenizer.py", "-m tools.bench", "-m tools.bench_memory", "-m tools.bench_model", "-m tools.figures", "-m tools.hard_concrete", "-m tools.inspect", "-m tools.planted", "-m tools.planted_cards", "-m tools.program",
           "-m tools.published", "-m tools.refute", "-m tools.repeats", "-m tools.tune"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_into_a_closed_pipe_is_silent(script):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *script.split(), "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, env=ENV)
    os.close(writer)
    assert done.stderr == b"" and done.returncode in (0, 141)  # argparse hides it


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    GPT(GPTConfig(vocab_size=2048, block_size=64, n_layer=1, n_head=1, d_head=8, d_model=8, tied_unembed=False)).save(str(folder))
    return str(folder)


def test_a_table_into_a_closed_pipe_is_silent(model):
    done = subprocess.run(["bash", "-c", f"set -o pipefail; '{sys.executable}' tasks.py --model={model} --pairs=3 | head -n 1"],
                          cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 141 and not done.stderr and done.stdout.count("\n") == 1


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_script_with_one_line(model, number, status):
    process = subprocess.Popen([sys.executable, "tasks.py", f"--model={model}", "--pairs=3000"], cwd=ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()  # it is at work
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and err == "tasks.py: stopped; what was finished is kept\n"


def test_a_signal_that_nohup_ignores_stays_ignored(model):
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); import config; print(config.stop_signals())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{[signal.SIGINT, signal.SIGTERM]}\n"


WORKERS = """
import os, sys, time
sys.path.insert(0, ROOT)
from config import as_script
from processes import in_processes

def work(item):
    os.write(1, b"at work\\n")  # at once: two of them share the pipe
    time.sleep(60)

def main(argv):
    in_processes(work, range(20), 2)
    return 0

if __name__ == "__main__":
    as_script(main)
"""


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number, to_all", [  # to all: as a terminal's Ctrl-C and a cluster's scheduler do
    (signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True),
    (signal.SIGHUP, False), (signal.SIGKILL, False)])
def test_no_worker_outlives_its_script(tmp_path, number, to_all):
    (tmp_path / "workers.py").write_text(WORKERS.replace("ROOT", repr(str(ROOT))))
    process = subprocess.Popen([sys.executable, str(tmp_path / "workers.py")], env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert [process.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
    workers = children_of(process.pid)
    assert len(workers) >= 2
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(timeout=20)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.time() + 10
    while time.time() < deadline and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    err = process.stderr.read()
    assert "Traceback" not in err and (number == signal.SIGKILL or err.count("\n") == 1)


def test_an_ascii_terminal_shows_what_it_can():
    code = "import config; config.as_script(lambda argv: print('a – b') or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=ENV | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == b"a \\u2013 b\n" and not done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_a_script_works_without_a_stream(closed):
    done = subprocess.run(["bash", "-c", f"'{sys.executable}' -c \"import config; config.as_script(lambda argv: print('x') or 0)\" {closed}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_too_little_memory_is_one_line(model):
    code = f"import sys, torch, config; config.as_script(lambda argv: torch.empty(2**50).shape[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "out of memory" in done.stderr and "4503599627370496 bytes" in done.stderr


def test_an_error_of_another_kind_keeps_its_traceback():
    code = "import config; config.as_script(lambda argv: exec('raise RuntimeError(1)'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_what_pruning_a_saved_model_takes_is_measured_piece_by_piece(model, capsys):
    assert bench_model.main([f"--model={model}", "--mean_tokens=512", "--steps=2"]) == 0
    out = capsys.readouterr().out
    for piece in ("load  ", "first forward pass, 32 prompts of", "means over 512 tokens, 64 at a time",
                  "before the first step", "a step of mask learning (2 of them)", "a trial: one node left out",
                  "peak memory"):
        (line,) = [line for line in out.splitlines() if line.startswith(piece)]
        float(line.split()[-2])  # a number; of differences of short times it can be below 0


def test_without_a_model_there_is_nothing_to_measure(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_model.main([])
    assert stop.value.code == 2 and "--model is missing" in capsys.readouterr().err
