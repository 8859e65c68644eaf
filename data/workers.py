"""Work that several processes share: results in the order of the work, whatever their number.

- `in_order`: f of each item, a few items ahead of what is asked for, so that memory stays bounded.
- `cores`: how many there are for it.
- `begin_worker`: no process outlives the one that started it.
"""
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context

AHEAD = 4  # items a process that are begun before their results are asked for


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def begin_worker(parent: int) -> None:
    """The first thing that a worker does. parent: the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent answers it
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def worker_pool(workers: int, begin: Callable = begin_worker) -> Iterator[ProcessPoolExecutor]:
    """A pool of so many processes, each of which first calls begin(number of this process).
    Whatever ends this process, none of the others outlives it."""
    # spawned, not forked: a fork would inherit threads that it has not got
    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, begin, (os.getpid(),))
    try:
        yield pool
    except BaseException:  # a signal, say: do not wait for what takes minutes
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in active_children():
            worker.terminate()
        raise
    pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, f: Callable, *args) -> Future:
    """`pool.submit`, which may start a process. Until that has loaded what it needs and ignores
    Ctrl-C, for seconds, a Ctrl-C would end it with a traceback: it is born with it blocked."""
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(f, *args)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(f, *args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_order(pool, f: Callable, items: Iterable, workers: int) -> Iterator:
    """f(item) of each item, in the order of the items. pool: of `worker_pool`, or None to do it
    here."""
    if pool is None:
        yield from map(f, items)
        return
    begun = deque()
    for item in items:
        begun.append(submit(pool, f, item))
        if len(begun) >= AHEAD * workers:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
