"""processes.py: one function of many things, several at a time."""
import os
import signal

import pytest

from processes import in_processes


def die_by_signal(item):
    os.kill(os.getpid(), signal.SIGKILL) if item == 2 else None
    return item


def test_results_come_in_the_order_of_the_items_and_a_failure_is_its_text():
    assert in_processes(abs, [-1, 2, -3], 2) == [1, 2, 3]
    assert in_processes(int, ["1", "x"], 2) == [1, "invalid literal for int() with base 10: 'x'"]


def test_a_killed_process_is_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        in_processes(die_by_signal, [1, 2, 3], 1)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and "--jobs" in err
