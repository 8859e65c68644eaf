"""The project is a directory of scripts: put it on the path, and give tests a fresh, printed seed."""
import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture
def seed() -> int:
    """Seeds torch afresh; pytest prints the seed of a test that fails, and `SEED=n pytest` repeats it."""
    import torch

    n = int(os.environ.get("SEED", random.SystemRandom().randrange(2**31)))
    print(f"SEED={n}")
    torch.manual_seed(n)
    return n
