"""fast/cuda.py by Triton's interpreter, so that no GPU is needed: what a CUDA tensor gets is what the plain functions give.

Triton comes with the CUDA builds of PyTorch; elsewhere `pip install triton` lets this test run.
"""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

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
