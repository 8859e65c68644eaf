"""fast/cuda.py: in Triton's interpreter it does what the plain functions do; each kernel compiles for three
generations of GPUs and keeps its values in registers; where there is a GPU, the same is tried on it.

Triton comes with the CUDA builds of PyTorch; elsewhere `pip install triton` lets these tests run.
"""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fast
import ops

CODE = """
import math, sys, torch, fast, ops
from fast import cuda
print("seed", sys.argv[1], file=sys.stderr)
torch.manual_seed(int(sys.argv[1]))
fast._cpu = lambda: None  # so `ops` does all in plain PyTorch, except where `fast.abstopk` is replaced
plain = fast.abstopk

def of_cuda(x, k, masked=True):  # what a CUDA tensor gets
    return tuple(z.view(x.shape) for z in cuda.abstopk(fast._rows(x), k))

for dtype in (torch.float32, torch.bfloat16):
    for shape in ((5, 7), (2, 2, 40)):
        x = torch.randn(shape).to(dtype)
        odd = x.masked_fill(torch.rand(shape) < 0.2, math.inf).masked_fill(torch.rand(shape) < 0.2, 0.0)
        for x in (x, (2 * x).round(), odd, x.mT.contiguous().mT, x[..., : shape[-1] // 2 + 1]):
            for k in {1, x.shape[-1] // 2 + 1, x.shape[-1] - 1, x.shape[-1]} - {0}:
                fast.abstopk = plain
                want, leaf, grad = ops.topk_mask(x, k), x.clone().requires_grad_(), torch.randn(x.shape).to(dtype)
                fast.abstopk = of_cuda
                y = ops.abstopk(leaf, k)
                y.backward(grad)
                assert torch.equal(ops.topk_mask(x, k), want), (dtype, shape, k)
                assert torch.equal(y, torch.where(want, x, 0)) and torch.equal(leaf.grad, torch.where(want, grad, 0)), (dtype, shape, k)

fast.abstopk = plain  # and the plain projection
for shape in ((1, 7), (9, 40)):
    x = torch.randn(shape)
    odd = x.masked_fill(torch.rand(shape) < 0.2, math.inf).masked_fill(torch.rand(shape) < 0.3, 0.0)
    for w in (x, (2 * x).round(), odd, torch.zeros(shape)):
        for k in {1, w.numel() // 3, w.numel()}:
            got, want = w.clone(), w.clone()
            cuda.keep_largest_(got, k, block=64)
            ops.keep_largest_(want, k)
            assert torch.equal(got.view(torch.int32), want.view(torch.int32)), (shape, k)
            if k >= 2 * len(w):
                got, want, top = w.clone(), w.clone(), ops.topk_mask(w.abs(), 2) & (w != 0)
                cuda.keep_largest_(got, k, top, block=64)
                ops.keep_largest_(want, k, 2, 0)
                assert torch.equal(got.view(torch.int32), want.view(torch.int32)), (shape, k, "protected")
print("same")
"""


def test_the_triton_kernels_in_their_interpreter_do_what_the_plain_functions_do():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", CODE, str(random.randrange(10**6))], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.stdout == "same\n", done.stderr


# --- compiled, without a GPU ---------------------------------------------------------------------

CAPABILITIES = (80, 90, 100)  # A100, H100, B200


def compiled(kernel, types: str, constants: dict, capability: int, warps: int, tmp_path) -> tuple[bytes, int]:
    """The cubin of a kernel, and how many of its instructions put a register into memory. types: of its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split())) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    cubin = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["cubin"]
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    assert f"sm_{capability}" in listing and "EXIT" in listing
    return cubin, listing.count(" STL")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [64, 1024, 4096, 8192, 16384])
def test_abstopk_compiles_and_keeps_its_rows_in_registers(width, dtype, capability, tmp_path):
    pytest.importorskip("triton")
    from fast import cuda
    rows, warps = cuda.shape_of(width)
    constants = dict(BITS=32 if dtype == "fp32" else 16, ROWS=rows, WIDTH=width)
    cubin, spilt = compiled(cuda._abstopk, f"*{dtype} *{dtype} *i1 i32 i32 i32 i32", constants, capability, warps, tmp_path)
    # The widest rows of an H100 put a dozen of a thread's 250 registers aside; twice the warps, which need none of that,
    # were slower there (docs/speed.md).
    assert cubin.startswith(b"\x7fELF") and spilt <= (16 if width >= 8192 else 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_projections_kernels_compile_and_spill_nothing(capability, tmp_path):
    pytest.importorskip("triton")
    from fast import cuda
    for protected in (False, True):
        given = dict(PROTECTED=protected, BLOCK=4096)
        for kernel, types, constants in (
            (cuda._count_digits, "*fp32 *i1 i32 *i32 *i32", given | {"SHIFT": 8}),
            (cuda._next_digit, "*i32 *i32", {}),
            (cuda._count_ties, "*fp32 *i1 i32 *i32 *i32", given),
            (cuda._zero_the_rest, "*fp32 *i1 i32 *i32 *i32", given),
        ):
            cubin, spilt = compiled(kernel, types, constants, capability, 4, tmp_path)
            assert cubin.startswith(b"\x7fELF") and spilt == 0, kernel


# --- on a GPU --------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [7, 1024, 8192, 16384])
def test_abstopk_on_a_gpu_keeps_what_the_plain_one_keeps(n, dtype, monkeypatch):
    x = torch.randn(33, n, device="cuda").to(dtype)
    for x in (x, (2 * x).round()):  # without ties and with them
        k = n // 4
        got, mask = fast.abstopk(x, k)
        monkeypatch.setattr(ops, "fast", None)
        assert torch.equal(mask, ops.topk_mask(x, k)) and torch.equal(got, torch.where(mask, x, 0))
        monkeypatch.undo()


@on_gpu
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_projection_on_a_gpu_keeps_what_the_plain_one_keeps(axis, monkeypatch):
    w = torch.randn(300, 500, device="cuda")
    for w in (w, (2 * w).round()):
        j = 0 if axis is None else 4
        got, want = w.clone(), w.clone()
        ops.keep_largest_(got, 30_000, j, axis)
        monkeypatch.setattr(ops, "fast", None)
        ops.keep_largest_(want, 30_000, j, axis)
        monkeypatch.undo()
        assert torch.equal(got, want)
