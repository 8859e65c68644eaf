"""processes.py: one function of many things, several at a time."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from processes import in_processes


def die_by_signal(item):
    os.kill(os.getpid(), signal.SIGKILL) if item == 2 else None
    return item


def test_results_come_in_the_order_of_the_items_and_a_failure_is_its_text():
    assert in_processes(abs, [-1, 2, -3], 2) == [1, 2, 3]
    assert in_processes(int, ["1", "x"], 2) == [1, "invalid literal for int() with base 10: 'x'"]


def stop_reading(item):
    raise BrokenPipeError if item == 2 else ValueError("no")


def test_that_nobody_reads_what_is_printed_is_no_items_failure():
    with pytest.raises(BrokenPipeError):
        in_processes(stop_reading, [1, 2], 2)


SLOW_TO_LOAD = """
import sys, time
sys.path.insert(0, {root!r})
import processes
if __name__ == "__mp_main__":  # a worker, before it is asked for anything
    print("loading", flush=True)
    time.sleep(2)
def one(x):
    return x
def main(argv):
    processes.in_processes(one, [1, 2], 2)
    return 0
if __name__ == "__main__":
    from config import as_script
    as_script(main)
"""


def test_ctrl_c_while_processes_are_still_loading_is_one_line(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(SLOW_TO_LOAD.format(root=str(Path(__file__).resolve().parent.parent)))
    run = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout.readline() == "loading\n"
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err and err.count("\n") == 1, err


def test_a_killed_process_is_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        in_processes(die_by_signal, [1, 2, 3], 1)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and "--jobs" in err
