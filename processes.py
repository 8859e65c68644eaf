"""The same function of many things, in several processes that live no longer than this one.

Circuits are found, measured and compared by it: prune.py and validate.py with --jobs, and tools/.
How such processes begin and end: data/workers.py.
"""
from collections.abc import Callable, Collection
from concurrent.futures.process import BrokenProcessPool
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import die

import torch

from data.workers import begin_worker, cores, submit, worker_pool


def in_processes(f: Callable, items: Collection, jobs: int) -> list:
    """f of each item, `jobs` processes at a time; in place of a ValueError or OSError, its text.

    Exits with one line where the system kills a process. Whatever ends this process, none of the
    others outlives it.
    """
    threads = max(1, cores() // min(jobs, max(1, len(items))))
    try:
        with worker_pool(jobs, partial(_begin_worker, threads)) as pool:
            # not pool.map: what it cancels when a signal ends this process, the pool may fail on
            begun = [submit(pool, result_or_reason, f, item) for item in items]
            return [future.result() for future in begun]
    except BrokenProcessPool:
        die("a process was killed, perhaps for want of memory; what it has written is kept: "
            "run it again with fewer --jobs")


def _begin_worker(threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    begin_worker(parent)


def result_or_reason(f: Callable, item):
    """f(item), or the text of its ValueError or OSError: one item's failure ends no other."""
    try:
        return f(item)
    except BrokenPipeError:  # whoever read what we print has gone: no failure of the item
        raise
    except (ValueError, OSError) as e:
        return str(e)
