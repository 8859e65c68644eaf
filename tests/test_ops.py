"""ops.py: AbsTopK keeps exactly k, ties low; a sparse product is the dense one; sink attention is softmax with one more logit.

All of it holds for the plain PyTorch and for fast/cpu.c alike.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import fast
import ops
from fast import SPARSE
from ops import abstopk, keep_largest_, linear, rms_norm, sink_attention, topk_mask

pytestmark = pytest.mark.usefixtures("seed", "path")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SHAPES = [(1,), (7,), (64,), (3, 5), (1, 33), (4, 100), (2, 3, 17), (2, 1, 3, 9)]


@pytest.fixture(params=["c", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(fast, "_cpu", lambda: None)
    elif fast._cpu() is None:
        pytest.skip("no C compiler")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def kept(x, k):
    """The obvious reference: a stable sort by falling magnitude, the first k of each row."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for row, out in zip(x.detach().cpu().double().reshape(-1, x.shape[-1]).tolist(), mask.view(-1, x.shape[-1])):
        out[sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]] = True
    return mask.to(x.device)


def check(x, k):
    mask = kept(x, k)
    assert torch.equal(topk_mask(x, k), mask)
    assert torch.equal(abstopk(x, k), torch.where(mask, x, torch.zeros_like(x)))  # as x lies in memory; a clone may not
    leaf = x.clone().requires_grad_()
    y = abstopk(leaf, k)
    assert y.dtype == x.dtype and torch.equal(y, torch.where(mask, x, torch.zeros_like(x)))
    grad = torch.randn(x.shape, dtype=x.dtype, device=x.device)
    y.backward(grad)
    assert torch.equal(leaf.grad, torch.where(mask, grad, torch.zeros_like(grad)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient_equal_a_stable_sort(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    n = shape[-1]
    for k in {1, (n + 1) // 2, max(1, n // 4), max(1, n - 1), n}:
        check(x, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties_go_to_the_lower_channel(shape, dtype, device):
    x = torch.randint(-2, 3, shape, device=device).to(dtype)  # zeros, and many equal magnitudes of both signs
    for k in range(1, min(shape[-1], 20) + 1):
        check(x, k)


@pytest.mark.parametrize("fill", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9)], ids=str)
def test_a_constant_row_keeps_its_first_k(shape, fill):
    mask = topk_mask(torch.full(shape, fill), 4)
    assert mask[..., :4].all() and not mask[..., 4:].any()


def test_only_tied_rows_among_many_are_touched_by_the_tie_rule():
    x = torch.randn(50, 31)
    x[7], x[23, :20] = 1.0, -0.5
    check(x, 10)


def test_negative_zero_ties_with_zero_and_is_kept_as_it_is():
    x = torch.tensor([-0.0, 0.0, -0.0])
    assert topk_mask(x, 2).tolist() == [True, True, False]
    assert abstopk(torch.tensor([0.0, -0.0, 2.0, 0.0]), 3).signbit().tolist() == [False, True, False, False]


def test_infinities_are_the_largest_and_make_no_nan():
    x = torch.tensor([[1.0, math.inf, -math.inf, 2.0, math.inf], [math.inf, 3.0, 3.0, -math.inf, 0.0]])
    for k in range(1, 6):
        check(x, k)


def test_zeros_fill_the_count_where_nonzeros_are_too_few():
    x = torch.tensor([0.0, 0.0, 5.0, 0.0])
    assert topk_mask(x, 3).tolist() == [True, True, True, False]
    check(x, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_layout_in_memory_does_not_matter(device):
    x = torch.randn(6, 10, 8, device=device)
    for view in (x.transpose(0, 2), x[::2, :, 1::2], x[:, 3], x[..., 2:7], x.unfold(1, 4, 2), x[:1].expand(3, 10, 8)):
        assert not view.is_contiguous()
        check(view, 3)


def test_input_is_left_as_it_was():
    x = torch.randn(3, 11)
    before = x.clone()
    abstopk(x, 2), topk_mask(x, 2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_torch_compile_is_told_of_the_operator_is_true(dtype):
    for x in (torch.randn(4, 6, 8).to(dtype), torch.randn(8, 6).to(dtype).T):
        torch.library.opcheck(torch.ops.circuits.abstopk.default, (x, 3), test_utils=("test_schema", "test_faketensor"))


def test_no_rows_in_no_rows_out():
    assert abstopk(torch.randn(0, 5), 2).shape == (0, 5)


@pytest.mark.parametrize("f", [abstopk, topk_mask])
@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_out_of_range_is_a_value_error(f, k):
    with pytest.raises(ValueError, match=str(k)):
        f(torch.randn(2, 5), k)


@pytest.mark.parametrize("shape", [(3000, 100), (700, 3, 100), (3, 70_000)], ids=str)
def test_many_rows_are_the_same_as_each_alone(shape, threads):
    x = torch.randn(shape)
    x[len(x) // 2] = 1.0  # ties, in a block that is not the first
    mask = topk_mask(x, 25)
    assert torch.equal(mask, torch.stack([topk_mask(row, 25) for row in x]))
    assert mask[len(x) // 2, ..., :25].all() and (mask.sum(-1) == 25).all()


def test_a_row_quite_unlike_the_one_before_is_selected_as_if_alone():
    x = torch.randn(64, 200)
    x[1::4] *= 1e30
    x[2::4] *= 1e-30
    x[3::4, 50:] = 0.0
    assert torch.equal(topk_mask(x, 60), kept(x, 60))
    assert torch.equal(topk_mask(x.flip(0), 60), kept(x.flip(0), 60))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_and_what_is_not_are_exact_to_the_bit(dtype):
    x = torch.randn(5, 40).to(dtype)
    x[:, 3], x[:, 9], x[0], x[1, :30] = math.inf, -math.inf, -0.0, math.nan
    leaf = x.clone().requires_grad_()
    y = abstopk(leaf, 10)
    y.backward(x)  # as a gradient: signs, zeros, infinities and NaN again
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    want = torch.where(topk_mask(x, 10), x, 0)  # no -0 and no inf * 0 among what is dropped
    assert torch.equal(y.detach().view(ints), want.view(ints)) and torch.equal(leaf.grad.view(ints), want.view(ints))


def test_gradients_of_gradients_flow():
    x = torch.randn(3, 9, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: abstopk(x, 4), x) and torch.autograd.gradgradcheck(lambda x: abstopk(x, 4), x)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_nan_is_not_hidden(nan):
    x = torch.randn(4, 16)
    x[2, 5] = nan
    assert not abstopk(x, 4).isfinite().all().item()  # else a broken run would train on


# --- products with a sparse matrix ---------------------------------------------------------------

def sparse(rows, n, share=SPARSE):
    """A random matrix with exactly that share of nonzeros, rounded down."""
    w = torch.zeros(rows * n)
    w[torch.randperm(rows * n)[: int(share * rows * n)]] = 1.0
    return w.view(rows, n) * torch.randn(rows, n)


def check_linear(x, w, b):
    leaves = [z if z is None else z.clone().requires_grad_() for z in (x, w, b)]
    twins = [z if z is None else z.clone().requires_grad_() for z in (x, w, b)]
    y, want = linear(*leaves), F.linear(*twins)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn(want.shape)
    y.backward(grad), want.backward(grad)
    for name, leaf, twin in zip("xwb", leaves, twins):
        if leaf is not None:
            torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-5, atol=1e-5, msg=lambda m: f"gradient of {name}: {m}")


@pytest.mark.parametrize("shape", [(64,), (65,), (3, 70), (2, 3, 32), (500,)], ids=str)
@pytest.mark.parametrize("rows, n", [(40, 60), (33, 17), (16, 128), (1, 300), (300, 1), (129, 65)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_product_and_its_gradients_are_the_dense_ones(shape, rows, n, bias, threads):
    check_linear(torch.randn(*shape, n), sparse(rows, n), torch.randn(rows) if bias else None)


def test_empty_rows_columns_and_matrices_are_fine():
    w = sparse(40, 50)
    w[[0, 3, 39]], w[:, [0, 7, 49]] = 0.0, 0.0
    for w in (w, torch.zeros(40, 50)):
        check_linear(torch.randn(70, 50), w, torch.randn(40))
        for tokens in (0, 1, 31, 33):  # few enough that only a frozen weight's zeros are skipped
            x, b = torch.randn(tokens, 50), torch.randn(40)
            torch.testing.assert_close(linear(x, w, b, {}), F.linear(x, w, b), rtol=1e-5, atol=1e-5)


def test_inputs_that_lie_askew_in_memory_are_fine():
    for x in (torch.randn(50, 90).T, torch.randn(90, 100)[:, ::2], torch.randn(1, 50).expand(90, 50), torch.randn(90, 150).chunk(3, -1)[1]):
        assert not x.is_contiguous()
        check_linear(x, sparse(40, 50), torch.randn(40))
    check_linear(torch.randn(90, 50), sparse(50, 40).T, torch.randn(40))


def test_density_and_for_a_weight_that_learns_the_number_of_tokens_decide(monkeypatch):
    used = []
    monkeypatch.setattr(fast, "_by_tiles", lambda *_: used.append(1))
    for tokens, w, learns, skips in ((7, sparse(40, 50, SPARSE + 0.01), False, False), (7, sparse(40, 50), False, True),
                                     (63, sparse(40, 50), True, False), (64, sparse(40, 50), True, True)):
        x, w = torch.randn(tokens, 50), w.requires_grad_(learns)
        used.clear()
        y = linear(x, w)
        assert bool(used) == (skips and fast._cpu() is not None)
        assert used or torch.equal(y, F.linear(x, w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_autocast_take_the_dense_product(dtype):
    x, w = torch.randn(7, 50), sparse(40, 50)
    assert torch.equal(linear(x.to(dtype), w.to(dtype)), F.linear(x.to(dtype), w.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16


def test_a_frozen_weights_nonzeros_are_looked_for_once_and_again_when_it_changes():
    x, w, known = torch.randn(7, 50), sparse(40, 50), {}
    for _ in range(2):
        torch.testing.assert_close(linear(x, w, None, known), F.linear(x, w), rtol=1e-5, atol=1e-5)
    found = list(known.values())
    linear(x, w, None, known)
    assert all(a is b for a, b in zip(found, known.values()))
    def replace_data():
        w.data = sparse(40, 50)

    def learn():  # a fused optimizer's step changes a weight behind autograd's back
        w.requires_grad_()
        linear(torch.randn(70, 50), w, None, known).sum().backward()
        torch.optim.AdamW([w], lr=1.0, fused=True).step()
        keep_largest_(w, 200)
        w.requires_grad_(False).grad = None

    for change in (lambda: w.mul_(2), lambda: w.copy_(sparse(40, 50)), lambda: torch.sub(w, sparse(40, 50, 0.01), out=w),
                   lambda: keep_largest_(w, 50), lambda: keep_largest_(w, 40, 1, 0), replace_data, replace_data, learn):
        change()
        torch.testing.assert_close(linear(x, w, None, known), F.linear(x, w), rtol=1e-5, atol=1e-5)


def test_autograd_notices_a_projection_between_forward_and_backward():
    x, w = torch.randn(7, 50, requires_grad=True), torch.randn(40, 50)
    y = F.linear(x, w)
    keep_largest_(w, 100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_made_in_inference_mode_are_fine():
    with torch.inference_mode():
        x, w = torch.randn(7, 50), sparse(40, 50)
        torch.testing.assert_close(linear(x, w, None, {}), F.linear(x, w), rtol=1e-5, atol=1e-5)


def test_a_frozen_sparse_product_keeps_nothing_for_the_backward_pass():
    saved, x = [], torch.randn(7, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda z: saved.append(z) or z, lambda z: z):
        linear(x, sparse(40, 50), torch.randn(40))
    assert not any(z.shape == x.shape for z in saved)


# --- the projection of one tensor: test_optim.py has its rules --------------------------------------

@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("shape", [(301, 300), (33, 1000), (70_001, 3)])
def test_a_large_matrix_is_projected_as_the_plain_functions_do(shape, axis, threads, monkeypatch):
    w = torch.randn(shape) * torch.logspace(-3, 0, shape[0 if axis == 0 else 1]).view((-1, 1) if axis == 0 else (1, -1))  # some neurons need protection
    got, want, k, j = w.clone(), w.clone(), int(0.04 * w.numel()), 0 if axis is None else 3 if shape[1 - axis] > 3 else 1
    j = min(j, k // shape[axis]) if axis is not None else 0
    keep_largest_(got, k, j, axis)
    monkeypatch.setattr(fast, "_cpu", lambda: None)
    keep_largest_(want, k, j, axis)
    assert torch.equal(got, want) and got.count_nonzero() == k


@pytest.mark.parametrize("k, j", [(0, 0), (-1, 0), (13, 0), (4, -1), (4, 5)])
def test_counts_that_cannot_be_are_a_value_error(k, j):
    with pytest.raises(ValueError):
        keep_largest_(torch.randn(3, 4), k, j, 0)


# --- gates ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1,), (7,), (3, 70), (2, 3, 32), (0, 4)], ids=str)
def test_a_gate_and_its_gradients_are_as_written_out(shape, threads):
    x, gate, constant = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True), torch.randn(shape[-1])
    y, want = ops.gated(x, gate, constant), gate * x + (1 - gate) * constant
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn(shape)
    for a, b in zip(torch.autograd.grad(y, (x, gate), grad), torch.autograd.grad(want, (x, gate), grad)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_gate_of_any_kind_has_the_gradients_of_its_formula():
    for shapes, dtype in ((((7,), (7,)), torch.float64), (((1,), (7,)), torch.float32), (((7,), (7,)), torch.float32)):
        x, gate, constant = torch.randn(4, 7, dtype=dtype), torch.randn(shapes[0]), torch.randn(shapes[1])
        inputs = [z.requires_grad_() for z in (x, gate, constant)]
        got, want = ops.gated(*inputs), gate * x + (1 - gate) * constant
        assert got.dtype == dtype
        for a, b in zip(*(torch.autograd.grad(z.square().sum(), inputs) for z in (got, want))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_open_gate_and_a_closed_one_are_exact():
    x, constant = 1e6 * torch.randn(5, 40), 1e-6 * torch.randn(40)
    for gate in (torch.rand(40) < 0.5, (torch.rand(40) < 0.5).float(), (torch.rand(40) < 0.5).float().requires_grad_()):
        assert torch.equal(ops.gated(x, gate, constant), torch.where(gate.bool(), x, constant))


def test_a_gate_meets_inputs_that_lie_askew_in_memory():
    gate, constant = torch.randn(8, requires_grad=True), torch.randn(8)
    for x in (torch.randn(8, 5).T, torch.randn(5, 24).chunk(3, -1)[1], torch.randn(1, 8).expand(5, 8)):
        y, want = ops.gated(x, gate, constant), gate * x + (1 - gate) * constant
        a, b = (torch.autograd.grad(z.square().sum(), gate)[0] for z in (y, want))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- norm --------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1,), (7,), (3, 70), (2, 300, 129), (0, 4)], ids=str)
@pytest.mark.parametrize("eps", [None, 0.1])
def test_a_norm_and_its_gradients_are_pytorchs(shape, eps, threads):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    grad = torch.randn(shape)
    y, want = rms_norm(x, weight, eps), F.rms_norm(x.double(), shape[-1:], weight.double(), eps or torch.finfo(x.dtype).eps)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(y, [x, weight], grad), torch.autograd.grad(want, [x, weight], grad.double())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_norm_keeps_zero_where_it_is_and_meets_inputs_that_lie_askew():
    x = torch.randn(8, 5).T
    x[2], x[:, 3] = 0.0, 0.0
    y = rms_norm(x, torch.ones(8))
    assert (y[2] == 0).all() and (y[:, 3] == 0).all()
    torch.testing.assert_close(y, F.rms_norm(x.contiguous(), (8,)))


def test_a_norms_gradient_may_lie_askew_too():
    """The copy of it must live until it has been read: 20 times, as what it would be read as is chance."""
    for _ in range(20):
        x, weight, grad = torch.randn(16, 4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(16, 8)[:, :4]
        got = torch.autograd.grad(rms_norm(x, weight), [x, weight], grad)
        want = torch.autograd.grad(F.rms_norm(x, (4,), weight, torch.finfo(x.dtype).eps), [x, weight], grad)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_of_another_type_keeps_it(dtype):
    x, weight = torch.randn(3, 16).to(dtype), torch.randn(16).to(dtype)
    assert torch.equal(rms_norm(x, weight), F.rms_norm(x, (16,), weight, torch.finfo(dtype).eps))


# --- attention with a sink ---------------------------------------------------------------------

def qkvs(B=2, H=3, T=9, D=8, device="cpu", dtype=torch.float32):
    q, k, v = (2 * torch.randn(B, H, T, D, device=device, dtype=dtype) for _ in range(3))
    return [z.requires_grad_() for z in (q, k, v, torch.randn(H, device=device, dtype=dtype))]


def plain(q, k, v, sink):
    """exp(s_i) / (exp(sink) + sum_j exp(s_j)) over j <= i, written out in double precision."""
    q, k, v, sink = (z.double() for z in (q, k, v, sink))
    e = ((q @ k.mT) / math.sqrt(q.shape[-1])).exp().tril()
    return e @ v / (e.sum(-1, keepdim=True) + sink.exp().view(1, -1, 1, 1))


def plain_of_scores(scores, v, sink):
    """The same by PyTorch's softmax, which no large score overflows."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    sink = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    p = torch.cat([scores.masked_fill(future, -math.inf), sink], -1).softmax(-1)
    return p[..., :-1] @ v


def check_attention(inputs, **options):
    y, want = sink_attention(*inputs, **options), plain(*inputs)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    grad = torch.randn(y.shape, device=y.device)
    got = torch.autograd.grad(y, inputs, grad)
    for name, a, b in zip(("q", "k", "v", "sink"), got, torch.autograd.grad(want, inputs, grad.double())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5, msg=lambda m: f"gradient of {name}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", [1, 2, 37])
@pytest.mark.parametrize("D", [8, 16, 64])
def test_output_and_all_gradients_equal_the_written_out_softmax(D, T, device):
    check_attention(qkvs(T=T, D=D, device=device))


@pytest.mark.parametrize("T", [1, 2, 37])
@pytest.mark.parametrize("D", [8, 16, 64])
def test_the_path_of_other_devices_agrees_too(D, T):
    check_attention(qkvs(T=T, D=D), dropout_p=1e-12)  # any dropout leaves the CPU path; this much drops nothing


@pytest.mark.parametrize("dropout_p", [0.0, 1e-12])
def test_a_sink_of_minus_infinity_is_ordinary_attention(dropout_p):
    q, k, v, _ = qkvs()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = sink_attention(q, k, v, torch.full((3,), -math.inf), dropout_p)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("B, H, T, D", [(3, 5, 40, 16), (1, 1, 17, 8), (5, 2, 8, 24), (2, 3, 9, 12), (2, 2, 20, 128)])
def test_heads_of_any_number_and_width_are_each_as_written_out(B, H, T, D, threads):
    check_attention(qkvs(B=B, H=H, T=T, D=D))


def test_no_sink_is_ordinary_attention_and_so_are_its_gradients():
    q, k, v, _ = qkvs(T=20, D=16)
    got, want = sink_attention(q, k, v, None), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn(got.shape)
    for a, b in zip(torch.autograd.grad(got, [q, k, v], grad), torch.autograd.grad(want, [q, k, v], grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)


def test_logits_far_apart_neither_overflow_nor_vanish():
    q, k, v, sink = (100 * z.detach() for z in qkvs(T=30))
    y = sink_attention(q, k, v, sink)
    want = plain_of_scores((q.double() @ k.double().mT) / math.sqrt(8), v.double(), sink.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-2)


def test_a_nan_in_attention_is_not_hidden_and_stays_in_its_head():
    q, k, v, sink = (z.detach() for z in qkvs(T=20))
    k[1, 2, 5, 3] = math.nan
    y = sink_attention(q, k, v, sink)
    assert y[1, 2, 5:].isnan().all() and not y[1, :2].isnan().any() and not y[0].isnan().any()


@pytest.mark.parametrize("dropout_p", [0.0, 1e-12])
def test_a_large_sink_silences_its_own_head_only(dropout_p):
    q, k, v, sink = (z.detach() for z in qkvs())
    other = sink.clone()
    other[1] = 80.0
    a, b = sink_attention(q, k, v, sink, dropout_p), sink_attention(q, k, v, other, dropout_p)
    assert b[:, 1].abs().max() < 1e-9 and torch.allclose(a[:, [0, 2]], b[:, [0, 2]], atol=1e-6)


def test_inputs_as_the_model_lays_them_out_are_fine():
    B, T, H, D = 2, 11, 3, 8  # views into one (B, T, 3 * H * D) tensor, heads transposed
    parts = torch.randn(B, T, 3 * H * D).chunk(3, dim=-1)
    q, k, v = (z.view(B, T, H, D).transpose(1, 2).requires_grad_() for z in parts)
    check_attention([q, k, v, torch.randn(H, requires_grad=True)])


def test_bfloat16_is_close_to_float32_and_its_gradients_are_too():
    inputs = qkvs(T=20, D=16)
    low = [z.detach().bfloat16().requires_grad_() for z in inputs]
    y = sink_attention(*low)
    assert y.dtype == torch.bfloat16
    got, want = torch.autograd.grad(y.float().square().sum(), low), torch.autograd.grad(plain(*inputs).square().sum(), inputs)
    torch.testing.assert_close(y.double(), plain(*inputs), rtol=0.1, atol=0.1)
    for a, b in zip(got, want):
        assert a.dtype == torch.bfloat16 and (a.float() - b).norm() < 0.05 * b.norm()


def test_attention_saves_nothing_that_grows_with_the_square_of_its_length():
    sizes, T = [], 512
    inputs = qkvs(B=1, H=1, T=T, D=8)
    with torch.autograd.graph.saved_tensors_hooks(lambda z: sizes.append(z.numel()) or z, lambda z: z):
        sink_attention(*inputs)
    assert sizes and max(sizes) <= 2 * T * 8
