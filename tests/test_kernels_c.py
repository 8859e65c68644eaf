"""kernels.c: compiled once, switched off by one variable, done without where there is no compiler."""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
COMPILER = shutil.which(shlex.split(os.environ.get("CC", "cc"))[0])


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=os.environ | env)


SHOW = "import torch, kernels; print(kernels.abstopk(torch.tensor([3., -1., 2.]), 2).tolist(), kernels._c() is None)"


def test_one_variable_switches_to_the_plain_functions():
    done = run(SHOW, PLAIN_KERNELS="1")
    assert done.stdout == "[3.0, 0.0, 2.0] True\n" and not done.stderr


@pytest.mark.parametrize("compiler, reason", [("no-such-compiler", "no C compiler"), ("false", "false fails")])
def test_without_a_working_compiler_it_says_so_once_and_goes_on(compiler, reason):
    done = run(SHOW + "; kernels.topk_mask(torch.randn(9), 2)", CC=compiler)
    assert done.stdout == "[3.0, 0.0, 2.0] True\n"
    assert reason in done.stderr and done.stderr.count("\n") == 1


def test_the_library_is_compiled_once(tmp_path):
    for name in ("kernels.py", "kernels.c"):
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    made = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", SHOW], cwd=tmp_path, check=True, capture_output=True)
        made.append([(p.name, p.stat().st_mtime_ns) for p in (tmp_path / "__pycache__").glob("*.so*")])
    assert made[0] == made[1] and len(made[0]) == bool(COMPILER)
    with open(tmp_path / "kernels.c", "a") as f:
        f.write("\n")
    subprocess.run([sys.executable, "-c", SHOW], cwd=tmp_path, check=True, capture_output=True)
    changed = [p.name for p in (tmp_path / "__pycache__").glob("*.so*")]
    assert len(changed) == len(made[0]) and (not changed or changed[0] != made[0][0][0])  # the new one alone


@pytest.mark.skipif(not COMPILER, reason="no C compiler")
def test_a_compiler_without_openmp_is_named_and_one_with_options_understood(tmp_path):
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec {COMPILER} "$@"\n')
    script.chmod(0o755)
    done = run(SHOW, CC=f"{script} -DSOME=1")
    assert done.stdout == "[3.0, 0.0, 2.0] False\n" and "one thread" in done.stderr and done.stderr.count("\n") == 1
