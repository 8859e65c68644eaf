"""fast/cpu.c: compiled once, switched off by one variable, done without where there is no compiler,
no place for what it compiles to, or no fast/ at all."""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
COMPILER = shutil.which(shlex.split(os.environ.get("CC", "cc"))[0])
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C compiler")

SHOW = ("import torch, fast, ops; "
        "print(ops.abstopk(torch.tensor([3., -1., 2.]), 2).tolist(), fast._cpu() is None)")
IN_C = "[3.0, 0.0, 2.0] False\n"
PLAIN = "[3.0, 0.0, 2.0] True\n"


def run(code, folder=HERE, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
                          env=os.environ | env)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """ops.py and fast/ alone, and nothing compiled."""
    (tmp_path / "code" / "fast").mkdir(parents=True)
    for name in ("ops.py", "fast/__init__.py", "fast/cpu.c"):
        shutil.copy(HERE / name, tmp_path / "code" / name)
    return tmp_path / "code"


def libraries(checkout):
    return {p.name: p.stat().st_mtime_ns for p in (checkout / "fast/__pycache__").glob("*.so*")}


def test_one_variable_switches_to_the_plain_functions():
    done = run(SHOW, PLAIN_KERNELS="1")
    assert done.stdout == PLAIN and not done.stderr


@pytest.mark.parametrize("compiler, reason", [
    ("no-such-compiler", "no C compiler"), ("false", "false fails"), ("'", "No closing quotation")])
def test_without_a_working_compiler_it_says_so_once_and_goes_on(compiler, reason):
    done = run(SHOW + "; ops.topk_mask(torch.randn(9), 2)", CC=compiler)
    assert done.stdout == PLAIN
    assert reason in done.stderr and done.stderr.count("\n") == 1


def test_the_library_is_compiled_once(checkout):
    made = []
    for _ in range(2):
        assert run(SHOW, checkout).returncode == 0
        made.append(libraries(checkout))
    assert made[0] == made[1] and len(made[0]) == bool(COMPILER)
    with open(checkout / "fast/cpu.c", "a") as f:
        f.write("\n")
    assert run(SHOW, checkout).returncode == 0
    changed = libraries(checkout)  # the old one stays: another process may be about to load it
    assert made[0].items() <= changed.items() and len(changed) == 2 * len(made[0])


@needs_compiler
def test_processes_that_compile_at_once_all_get_a_whole_library(checkout):
    many = []
    for _ in range(4):
        many.append(subprocess.Popen([sys.executable, "-c", SHOW], cwd=checkout, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for process in many:
        out, err = process.communicate(timeout=120)
        assert out == IN_C and not err
    assert len(libraries(checkout)) == 1
    assert not list((checkout / "fast/__pycache__").glob("compiling-*"))  # nothing is left behind


@needs_compiler
def test_a_library_that_goes_while_it_is_looked_for_is_done_without(checkout, tmp_path):
    """Whoever empties __pycache__ at the wrong moment: found there, gone when it is loaded."""
    code = ("import fast, pathlib; exists = pathlib.Path.exists\n"
            "def found(path): return '__pycache__' in str(path) or exists(path)\n"
            "pathlib.Path.exists = found\n")
    done = run(code + SHOW, checkout, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.stdout == IN_C and not done.stderr


@needs_compiler
@pytest.mark.parametrize("home", ["none", "under a file", "a file"])
def test_without_a_place_to_keep_the_library_it_is_used_all_the_same(checkout, tmp_path, home):
    """No home and no passwd entry; a checkout and a home that cannot be written, for which paths
    that are files stand here, since root may write anywhere else."""
    (checkout / "fast/__pycache__").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    code = "import os; os.environ.pop('XDG_CACHE_HOME', None); os.environ.pop('HOME', None)\n"
    if home == "none":  # what a user without a passwd entry gets
        code += "def same(path): return path\nos.path.expanduser = same\n"
    else:
        path = tmp_path / "file" / "home" if home == "under a file" else tmp_path / "file"
        code += f"os.environ['HOME'] = {str(path)!r}\n"
    done = run(code + SHOW, checkout, TMPDIR=str(tmp_path / "tmp"))
    assert done.stdout == IN_C and not done.stderr
    assert not list((tmp_path / "tmp").glob("**/*.so"))

    nowhere = "import tempfile; tempfile.tempdir = os.devnull\n"
    done = run(code + nowhere + SHOW, checkout)
    assert done.stdout == PLAIN
    assert done.stderr.startswith("note: cpu.c is not used") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_without_the_folder_all_is_correct(checkout, left):
    shutil.rmtree(checkout / "fast")
    if left == "an empty folder":
        (checkout / "fast").mkdir()
    done = run("import torch, ops; "
               "print(ops.abstopk(torch.tensor([3., -1., 2.]), 2).tolist(), ops.fast)", checkout)
    assert done.stdout == "[3.0, 0.0, 2.0] None\n" and not done.stderr


@needs_compiler
def test_a_compiler_without_openmp_is_named_and_one_with_options_understood(checkout, tmp_path):
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\n'
                      f'exec {COMPILER} "$@"\n')
    script.chmod(0o755)
    done = run(SHOW, checkout, CC=f"{script} -DSOME=1")
    assert done.stdout == IN_C
    assert "one thread" in done.stderr and done.stderr.count("\n") == 1
