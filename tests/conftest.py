"""The project is a directory of scripts: put it on the path, and give tests a fresh, printed seed."""
import os
import random
import signal
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# `nohup make test &` has these two ignored, and the scripts that tests start and interrupt would
# inherit that. A signal that is caught is the default one again in a child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser):
    parser.addoption("--share", metavar="DIR", type=Path,
                     help="run only those files of tests that no other pytest with this DIR has begun")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Two processes of `make test` take the files of tests in turn, as each has time."""
    share = item.config.getoption("--share")
    if share is None or mine(item.path.name, share):
        return None  # the others' turn to say how it is run
    return True  # it has been


@cache  # asked for every test of a file; the first answer counts
def mine(name: str, share: Path) -> bool:
    """Whether this process is the first to begin a file of tests."""
    try:
        (share / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.fixture
def seed() -> int:
    """Seeds torch afresh; pytest prints the seed of a test that fails, and `SEED=n pytest` repeats it."""
    import torch

    n = int(os.environ.get("SEED", random.SystemRandom().randrange(2**31)))
    print(f"SEED={n}")
    torch.manual_seed(n)
    return n
