"""optim.py: after every step exactly the budgeted nonzeros, in the right places; schedules and clip as in the paper."""
import copy
import io
import math

import pytest
import torch

from model import GPT, GPTConfig
from optim import L0AdamW, scale_rms_, density_at, lr_factor_at, param_groups, project_

pytestmark = pytest.mark.usefixtures("seed")
SHAPES = [(1,), (7,), (64,), (5, 9), (33, 17), (1, 12), (3, 4, 5), (2, 3, 2, 3)]


def budget(density, n):
    return max(1, int(density * n))


def nonzeros(p):
    return int((p != 0).sum())


def project(p, density, axis=None, j=4):
    """The obvious reference: protect each neuron's j largest nonzeros, then fill up by magnitude, low index first."""
    k, mag = budget(density, p.numel()), p.detach().abs().double()
    order, chosen = sorted(range(p.numel()), key=lambda i: -mag.flatten()[i].item()), []
    if axis is not None:
        room = dict.fromkeys(range(p.shape[axis]), min(j, k // p.shape[axis]))
        for i in order:
            neuron = i // p.shape[1] if axis == 0 else i % p.shape[1]
            if room[neuron] and mag.flatten()[i] > 0:
                room[neuron] -= 1
                chosen.append(i)
    chosen += [i for i in order if i not in set(chosen)][: k - len(chosen)]
    keep = torch.zeros(p.numel(), dtype=torch.bool)
    keep[chosen] = True
    return torch.where(keep.view_as(p), p.detach(), torch.zeros_like(p))


def group(params, density=0.2, axis=None):
    return dict(params=params, target_density=density, density=density, neuron_axis=axis)


def after_projection(p, density, axis=None, **options):
    """`p` after a step that moves nothing (learning rate 0), so that only the projection acts."""
    p = torch.nn.Parameter(p.clone())
    p.grad = torch.zeros_like(p)
    L0AdamW([group([p], density, axis)], lr=0.0, **options).step()
    return p.detach()


def tiny(**options):
    """A model with every kind of tensor, all entries random, and a gradient function."""
    model = GPT(GPTConfig(**{**dict(
        block_size=8, vocab_size=21, n_layer=2, n_head=3, d_head=4, d_model=10, d_mlp=22, rms_norm=True, afrac=0.5,
        tied_unembed=False, grad_checkpointing=False, enable_bigram_table=True, learnable_bigram_table=True,
        sink=True), **options}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def backward(model, seed=None):
    g = torch.Generator().manual_seed(seed) if seed is not None else None
    idx, targets = torch.randint(0, 21, (2, 2, 8), generator=g)
    model.zero_grad()
    model(idx, targets)[1].backward()


def is_dense(name):
    return any(part in name for part in ("ln_", "sink_logit", "bigram_table"))


# --- the projection ----------------------------------------------------------------------------

@pytest.mark.parametrize("density", [0.001, 0.1, 0.37, 0.5, 0.99])
def test_every_step_leaves_exactly_k_nonzeros_in_tensors_of_any_shape(density):
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    opt = L0AdamW([group(params, density)], lr=0.1)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        assert [nonzeros(p) for p in params] == [budget(density, p.numel()) for p in params]


def test_every_matrix_bias_and_embedding_of_a_model_is_exact_after_every_step():
    model = tiny()
    opt = L0AdamW(param_groups(model, 0.1), lr=0.05)
    for step in range(6):
        backward(model)
        density = density_at(step, 6, 0.1)
        opt.set_schedule(0.05, lambda target: density_at(step, 6, target))
        opt.step()
        if step == 0:
            assert density == 1  # the first step leaves all, the sixth as many as the rest of training
        for name, p in model.named_parameters():
            want = p.numel() if is_dense(name) else budget(density, p.numel())
            assert nonzeros(p) == want, name


def test_a_tensor_without_a_gradient_is_projected_too():
    p = torch.nn.Parameter(torch.randn(40))
    L0AdamW([group([p], 0.25)], lr=0.1).step()
    assert nonzeros(p) == 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties_neither_raise_nor_lower_the_count_and_go_to_the_lower_index(shape):
    p = torch.randint(0, 2, shape) * 2.0 - 1.0  # all of one magnitude
    n = p.numel()
    for density in (0.1, 0.5, 0.8):
        after = after_projection(p, density)
        assert nonzeros(after) == budget(density, n)
        assert after.flatten()[: budget(density, n)].all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fewer_nonzeros_only_where_fewer_were_there_before(shape):
    p = torch.randint(-2, 3, shape).float()  # zeros and many ties
    for density in (0.1, 0.4, 0.7, 0.95):
        assert nonzeros(after_projection(p, density)) == min(nonzeros(p), budget(density, p.numel()))


@pytest.mark.parametrize("axis", [0, 1])
def test_ties_within_and_across_neurons_keep_the_count(axis):
    for p in (torch.ones(9, 13), torch.randint(-1, 2, (9, 13)).float()):
        for density in (0.05, 0.3, 0.6, 0.9):
            assert nonzeros(after_projection(p, density, axis)) == min(nonzeros(p), budget(density, 117))


def test_norms_sinks_and_bigram_table_are_never_projected_nor_decayed():
    model = tiny()
    opt = L0AdamW(param_groups(model, 0.01), lr=0.1)
    opt.set_schedule(0.1, lambda target: target)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == is_dense(name), name


def test_a_step_is_adam_then_the_projection_then_decay():
    """Steps the same gradients through torch's Adam, then projects, then decays. Another order would differ."""
    shapes = [((40,), None), ((12, 9), None), ((12, 9), 0), ((12, 9), 1), ((3, 4, 5), None)]
    ours = [torch.nn.Parameter(torch.randn(s, dtype=torch.double)) for s, _ in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    opt = L0AdamW([group([p], 0.3, axis) | {"decay": 0.1} for p, (_, axis) in zip(ours, shapes)], lr=0.3)
    ref = torch.optim.Adam(theirs, lr=0.3, betas=(0.9, 0.95), eps=0.1)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        opt.step(), ref.step()
        for p, q, (_, axis) in zip(ours, theirs, shapes):
            q.data = project(q, 0.3, axis) * (1 - 0.3 * 0.1)
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_each_kind_of_tensor_has_its_density_and_only_matrices_and_embeddings_decay():
    model = tiny(d_pos_emb=None)
    kinds = {"matrix": (0.1, 0.2), "embedding": (0.3, 0.2), "bias": (0.5, 0.0), "dense": (None, 0.0)}
    settings = {}
    for g in param_groups(model, 0.1, 0.3, 0.5, decay=0.2):
        for p in g["params"]:
            settings[id(p)] = g["target_density"], g["decay"]
    for name, p in model.named_parameters():
        kind = "dense" if is_dense(name) else "bias" if name.endswith("bias") else \
            "embedding" if name.endswith(("wte.weight", "lm_head.weight")) else "matrix"
        assert settings.pop(id(p)) == kinds[kind], name
    assert not settings
    assert {g["target_density"] for g in param_groups(model, 0.1)} == {0.1, None}  # 0: as the matrices


def test_the_defaults_are_the_papers():
    opt = L0AdamW([group([torch.nn.Parameter(torch.ones(3))])], lr=0.1)
    g = opt.param_groups[0]
    assert (g["betas"], g["eps"], g["weight_decay"], g["min_per_neuron"]) == ((0.9, 0.95), 0.1, 0, 4)
    assert {g["decay"] for g in param_groups(tiny(), 0.1)} == {0.1, 0.0}


@pytest.mark.parametrize("axis", [0, 1])
def test_each_neuron_keeps_its_largest_j_and_the_total_stays_exact(axis):
    p = torch.randn(30, 20) * torch.logspace(-4, 1, p_size := (30, 20)[axis]).view((-1, 1) if axis == 0 else (1, -1))
    neurons = p if axis == 0 else p.T
    neurons[3] = 0.0        # a neuron with nothing to keep
    neurons[5, 2:] = 0.0    # and one with two nonzeros
    before = torch.tensor([nonzeros(n) for n in neurons])
    after = after_projection(p, 0.3, axis)
    counts = (after != 0).sum(1 - axis)
    assert counts.shape == (p_size,) and (counts >= before.clamp(max=4)).all() and counts.sum() == 180
    assert torch.equal(after, project(p, 0.3, axis))
    assert (after_projection(p, 0.3) != 0).sum(1 - axis).min() == 0  # without a neuron axis some die


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("density, floor", [(0.1, 2), (0.06, 1), (0.04, 0)])
def test_j_is_lowered_where_the_budget_cannot_pay_for_it(density, floor, axis):
    p = torch.randn(20, 20) * torch.logspace(-4, 1, 20).view((-1, 1) if axis == 0 else (1, -1))
    after = after_projection(p, density, axis)
    assert nonzeros(after) == budget(density, 400)
    assert (after != 0).sum(1 - axis).min() == floor
    assert torch.equal(after, project(p, density, axis))


def test_j_can_be_chosen():
    p = torch.randn(20, 20) * torch.logspace(-4, 1, 20).view(-1, 1)
    assert (after_projection(p, 0.5, 0, min_per_neuron=7) != 0).sum(1).min() == 7
    assert torch.equal(after_projection(p, 0.5, 0, min_per_neuron=0), project(p, 0.5))


def mask_of(mag, k):
    """The k largest of each row of `mag`, ties to the lower index and a NaN above infinity, by a full stable sort."""
    rank = mag.double().masked_fill(mag.isinf(), 1e300).masked_fill(mag.isnan(), math.inf)
    return torch.zeros(mag.shape, dtype=torch.bool).scatter(1, rank.sort(dim=1, descending=True, stable=True).indices[:, :k], True)


def plainly(p, density, axis, j):
    """The projection in the fewest words, without a thought for speed."""
    k, mag = budget(density, p.numel()), p.abs()
    if k >= p.numel():
        return p.clone()
    if axis is not None and (j := min(j, k // p.shape[axis], p.shape[1 - axis])):
        rows = mag.movedim(axis, 0)
        mag = mag.masked_fill((mask_of(rows, j) & (rows > 0)).movedim(0, axis), math.inf)
    return torch.where(mask_of(mag.reshape(1, -1), k).view_as(p), p, torch.zeros_like(p))


def bits(p):
    """For comparisons that tell -0 from 0 and take every NaN for the same."""
    return p.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]).masked_fill(p.isnan(), -1)


def some(p, share, value):
    return p.masked_fill(torch.rand_like(p) < share, value)


WEIGHTS = {
    "normal": lambda p: p,
    "few values": lambda p: (2 * p).round(),
    "mostly zero": lambda p: some(p, 0.8, 0.0),
    "all dead": torch.zeros_like,
    "dead neurons": lambda p: p * (torch.rand(p.shape[0]) < 0.5).float().view(-1, *[1] * (p.dim() - 1)) * (torch.rand(p.shape[-1]) < 0.5),
    "scales": lambda p: p * torch.logspace(-4, 1, p.shape[-1]),
    "infinities": lambda p: some(some(p, 0.1, math.inf), 0.1, -math.inf),
    "one NaN": lambda p: p.flatten().index_fill(0, torch.randint(p.numel(), (1,)), -math.nan).view_as(p),
    "many NaN": lambda p: some(p, 0.5, math.nan),
    "all of these": lambda p: some(some((2 * p).round(), 0.2, math.inf), 0.2, -math.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_projection_equals_the_plain_one_to_the_bit(weights, dtype):
    if dtype == torch.float16 and weights in ("many NaN", "all of these"):
        pytest.skip("torch's casts and abs() leave float16 NaNs of several bit patterns, and so an order among them")
    for shape in [(2,), (7,), (300,), (1, 9), (9, 1), (5, 9), (33, 17), (12, 70), (3, 4, 5), (2, 3, 2, 3)]:
        whole = WEIGHTS[weights](torch.randn(shape)).to(dtype)
        wide = WEIGHTS[weights](torch.randn(*shape[:-1], 3 * shape[-1])).to(dtype)
        for p in (whole, wide[..., ::3], whole.T if whole.dim() == 2 else whole.flip(0)):
            for axis in (None, 0, 1) if p.dim() == 2 else (None,):
                for density in (1e-9, 0.04, 0.2, 0.5, 0.93, 1 - 1 / p.numel()):
                    for j in (0, 1, 4, 1000) if axis is not None else (4,):
                        after = torch.empty_strided(p.shape, p.stride(), dtype=dtype).copy_(p)  # as p lies in memory
                        project_(after, density, axis, j)
                        assert torch.equal(bits(after), bits(plainly(p, density, axis, j))), (tuple(p.shape), axis, density, j)


def test_the_projection_alone_is_what_a_step_of_length_0_does():
    model, twin = tiny(), tiny()
    twin.load_state_dict(model.state_dict())
    opt, alone = (L0AdamW(param_groups(m, 0.2), lr=0.0) for m in (model, twin))
    for o in (opt, alone):
        o.set_schedule(0.0, lambda target: target)
    opt.step(), alone.project()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(p, q) and nonzeros(p) == (p.numel() if is_dense(name) else budget(0.2, p.numel())), name


def test_a_models_neurons_are_rows_of_in_projections_and_columns_of_out_projections():
    model = tiny(d_model=20, d_mlp=30, d_head=6)
    opt = L0AdamW(param_groups(model, 0.3), lr=0.0)
    opt.set_schedule(0.0, lambda target: target)
    matrices = {n: p for n, p in model.named_parameters() if n.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))}
    for name, p in matrices.items():
        p.data.mul_(torch.logspace(-5, 0, p.shape["c_proj" in name]).view((1, -1) if "c_proj" in name else (-1, 1)))
    opt.step()
    for name, p in matrices.items():
        assert (p != 0).sum(0 if "c_proj" in name else 1).min() == 4, name


def test_gradients_and_moments_stay_dense():
    p = torch.nn.Parameter(torch.randn(30, 11))
    opt = L0AdamW([group([p], 0.02, axis=0)], lr=0.1)
    for _ in range(3):
        grad = torch.randn_like(p)
        p.grad = grad.clone()
        opt.step()
        assert torch.equal(p.grad, grad)
    assert nonzeros(opt.state[p]["exp_avg"]) == nonzeros(opt.state[p]["exp_avg_sq"]) == p.numel()


def test_a_weight_once_zeroed_can_come_back():
    p = torch.nn.Parameter(torch.tensor([0.5, 0.4]))
    opt = L0AdamW([group([p], 0.5)], lr=1.0)
    p.grad = torch.zeros(2)
    opt.step()
    assert p.tolist() == [0.5, 0.0]
    p.grad = torch.tensor([0.0, -1.0])
    opt.step()
    assert p[0] == 0 and p[1] > 0.5


def test_set_schedule_sets_rates_everywhere_and_densities_where_there_is_a_target():
    opt = L0AdamW(param_groups(tiny(), 0.25), lr=1.0)
    opt.set_schedule(0.125, lambda target: 2 * target)
    for g in opt.param_groups:
        assert g["lr"] == 0.125 and g["density"] == (1.0 if g["target_density"] is None else 0.5)


# --- schedules ---------------------------------------------------------------------------------

def test_density_is_1_for_a_hundredth_falls_linearly_and_rests_at_the_target_from_half_time():
    d = [density_at(s, 1000, 0.02) for s in range(1000)]
    assert d[:11] == [1.0] * 11 and d[11] < 1 and all(x == 0.02 for x in d[500:])
    assert all(a - b == pytest.approx(0.98 / 490, rel=1e-6) for a, b in zip(d[10:499], d[11:500]))


def test_density_falls_between_the_start_and_end_fractions():
    d = [density_at(s, 1000, 0.1, start=0.2, end=0.8) for s in range(1000)]
    assert all(x == 1 for x in d[:201]) and all(x == 0.1 for x in d[800:])
    assert d[500] == pytest.approx(0.55) and d == sorted(d, reverse=True)


def test_density_may_fall_at_once():
    d = [density_at(s, 100, 0.1, start=0.5, end=0.5) for s in range(100)]
    assert d[:50] == [1.0] * 50 and d[50:] == [0.1] * 50
    assert density_at(0, 100, 0.1, start=0.0, end=0.0) == 0.1


def test_a_target_of_1_is_dense_throughout():
    assert {density_at(s, 50, 1.0) for s in range(50)} == {1.0}


def test_learning_rate_is_multiplied_by_exactly_the_root_of_how_much_is_still_to_go():
    for step in (0, 3, 50, 499, 999):
        for density in (1.0, 0.5, 0.02, 0.001):
            assert lr_factor_at(step, 1000, 0.001 / density) == pytest.approx(
                lr_factor_at(step, 1000, 1.0) * math.sqrt(0.001 / density), rel=1e-12)


def test_learning_rate_warms_up_over_1_percent_then_falls_linearly_to_nothing():
    f = [lr_factor_at(s, 1000) for s in range(1000)]
    assert f[:10] == [s / 10 for s in range(10)] and f[10] == max(f) == 1
    assert all(a - b == pytest.approx(1 / 990, rel=1e-6) for a, b in zip(f[10:], f[11:]))
    assert f[-1] == pytest.approx(1 / 990)
    assert [lr_factor_at(s, 10) for s in (0, 5)] == [1, 0.5]  # too short to warm up


def test_schedules_are_pure():
    for f in (lambda s: density_at(s, 77, 0.05), lambda s: lr_factor_at(s, 77, 0.3)):
        forward, back = [f(s) for s in range(77)], [f(s) for s in reversed(range(77))]
        assert forward == back[::-1]


# --- the gradient's RMS ------------------------------------------------------------------------

def with_grads(scale):
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    for p in params:
        p.grad = scale * torch.randn_like(p)
    return params


def rms(params):
    return torch.cat([p.grad.flatten() for p in params]).square().mean().sqrt().item()


@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0, 1e3])
def test_clip_scales_down_to_rms_1_and_never_up(scale):
    params = with_grads(scale)
    before, grads = rms(params), [p.grad.clone() for p in params]
    assert scale_rms_(params, "clip").item() == pytest.approx(before, rel=1e-5)
    if before < 0.99999:
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads))
    else:
        assert rms(params) == pytest.approx(1, rel=2e-5)
        assert all(torch.allclose(p.grad, g / before, rtol=1e-4) for p, g in zip(params, grads))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0, 1e3])
def test_normalize_always_gives_rms_1_over_all_entries(scale):
    params = with_grads(scale)
    before = rms(params)
    assert scale_rms_(params, "normalize").item() == pytest.approx(before, rel=1e-5)
    assert rms(params) == pytest.approx(before / (before + 1e-5), rel=1e-5)


def test_the_rms_is_over_entries_not_over_tensors():
    big, small = torch.nn.Parameter(torch.zeros(9999)), torch.nn.Parameter(torch.zeros(1))
    big.grad, small.grad = torch.zeros(9999), torch.full((1,), 100.0)
    assert scale_rms_([big, small], "clip").item() == pytest.approx(1.0) and small.grad.item() == pytest.approx(100.0, rel=1e-4)


def test_zero_gradients_stay_zero():
    params = with_grads(0.0)
    assert scale_rms_(params, "normalize") == 0 and not any(p.grad.any() for p in params)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_a_gradient_that_is_not_finite_is_reported_and_left_unscaled(mode, bad):
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, bad, 2.0])
    assert not scale_rms_([p], mode).isfinite()
    assert p.grad[0] == 1.0 and p.grad[2] == 2.0


def test_an_unknown_mode_is_a_value_error():
    with pytest.raises(ValueError, match="normalize or clip"):
        scale_rms_(with_grads(1.0), "scale")


# --- resuming, compiling -----------------------------------------------------------------------

def advance(model, opt, steps):
    for step in steps:
        backward(model, seed=step)
        scale_rms_(list(model.parameters()))
        density = density_at(step, 12, 0.05)
        opt.set_schedule(0.05 * lr_factor_at(step, 12, 0.05 / density), lambda target: density_at(step, 12, target))
        opt.step()


def test_a_saved_and_loaded_optimizer_goes_on_bitwise():
    model = tiny()
    opt = L0AdamW(param_groups(model, 0.05), lr=0.05)
    advance(model, opt, range(4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    resumed = L0AdamW(param_groups(twin, 0.9), lr=123.0)  # what the file says must win
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for key in ("density", "target_density", "neuron_axis", "min_per_neuron", "lr", "decay"):
        assert [g[key] for g in resumed.param_groups] == [g[key] for g in opt.param_groups]
    advance(model, opt, range(4, 9))
    advance(twin, resumed, range(4, 9))
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a, b), name


def test_a_density_that_changes_from_step_to_step_recompiles_nothing():
    model = tiny(n_layer=1)
    opt = L0AdamW(param_groups(model, 0.05), lr=0.05)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")  # guards and graphs as with any backend, no C compiler needed
    frames = torch._dynamo.utils.counters["stats"]
    for step in range(8):
        backward(compiled, seed=step)
        opt.set_schedule(0.05, lambda target: density_at(step, 12, target))
        opt.step()
        if step == 0:
            first = frames["unique_graphs"]
    assert frames["unique_graphs"] == first > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        opt.set_schedule(0.05, lambda target: target)
        opt.step()
        backward(compiled)
