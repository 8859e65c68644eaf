"""kernels.py: AbsTopK keeps exactly k, ties low, and sink attention is softmax with one more logit."""
import math

import pytest
import torch

from kernels import abstopk, sink_attention, topk_mask, topk_mask_numpy

pytestmark = pytest.mark.usefixtures("seed")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SHAPES = [(1,), (7,), (64,), (3, 5), (1, 33), (4, 100), (2, 3, 17), (2, 1, 3, 9)]


def kept(x, k):
    """The obvious reference: a stable sort by falling magnitude, the first k of each row."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for row, out in zip(x.detach().cpu().double().reshape(-1, x.shape[-1]).tolist(), mask.view(-1, x.shape[-1])):
        out[sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]] = True
    return mask.to(x.device)


def check(x, k):
    mask = kept(x, k)
    assert torch.equal(topk_mask(x, k), mask)
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
    for view in (x.transpose(0, 2), x[::2, :, 1::2], x[:, 3], x.unfold(1, 4, 2), x[:1].expand(3, 10, 8)):
        assert not view.is_contiguous()
        check(view, 3)


def test_input_is_left_as_it_was():
    x = torch.randn(3, 11)
    before = x.clone()
    abstopk(x, 2), topk_mask(x, 2)
    assert torch.equal(x, before)


def test_no_rows_in_no_rows_out():
    assert abstopk(torch.randn(0, 5), 2).shape == (0, 5)


@pytest.mark.parametrize("f", [abstopk, topk_mask])
@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_out_of_range_is_a_value_error(f, k):
    with pytest.raises(ValueError, match=str(k)):
        f(torch.randn(2, 5), k)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3000, 100), (700, 3, 100), (3, 70_000)], ids=str)
def test_many_rows_are_the_same_as_each_alone(shape, threads):
    x = torch.randn(shape)
    x[len(x) // 2] = 1.0  # ties, in a block that is not the first
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mask = topk_mask(x, 25)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mask, torch.stack([topk_mask(row, 25) for row in x]))
    assert mask[len(x) // 2, ..., :25].all() and (mask.sum(-1) == 25).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_rows_are_masked_as_tensors_are(dtype):
    for x in (torch.randn(20, 31, dtype=dtype), torch.randint(-2, 3, (20, 31)).to(dtype), torch.randn(31, 20, dtype=dtype).T):
        for k in (1, 8, 30, 31):
            assert torch.equal(torch.from_numpy(topk_mask_numpy(x.numpy(), k)), kept(x, k))


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


# --- attention with a sink ---------------------------------------------------------------------

def qkvs(B=2, H=3, T=9, D=8, device="cpu", dtype=torch.float32):
    q, k, v = (2 * torch.randn(B, H, T, D, device=device, dtype=dtype) for _ in range(3))
    return [z.requires_grad_() for z in (q, k, v, torch.randn(H, device=device, dtype=dtype))]


def plain(q, k, v, sink):
    """exp(s_i) / (exp(sink) + sum_j exp(s_j)) over j <= i, written out in double precision."""
    q, k, v, sink = (z.double() for z in (q, k, v, sink))
    e = ((q @ k.mT) / math.sqrt(q.shape[-1])).exp().tril()
    return e @ v / (e.sum(-1, keepdim=True) + sink.exp().view(1, -1, 1, 1))


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
