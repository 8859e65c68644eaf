"""coupled.py: each term of the pair's loss against its formula; recomputing changes nothing but what is held."""
import copy

import pytest
import torch
import torch.nn.functional as F

from coupled import Bridges, Coupled, distribution, kl, nmse
from toy import random_model

WEIGHTS = (0.3, 0.5, 0.7, 1.1)



def tokens(rows=3, vocab=10, length=7):
    return torch.randint(vocab, (rows, length))


def plain(n_layer=2, **options):
    """A random model whose norms have gain 1, so that a rotation of its stream can be undone."""
    model = random_model(n_layer=n_layer, **options)
    for block in model.transformer.h:
        block.ln_1.weight.fill_(1.0)
        block.ln_2.weight.fill_(1.0)
    model.transformer.ln_f.weight.fill_(1.0)
    return model


def rotated(model, r):
    """The same function of tokens, with a stream h r in place of h."""
    out = plain(model.config.n_layer)
    out.load_state_dict(model.state_dict())
    for name, p in out.named_parameters():
        if name.endswith("c_proj.weight"):
            p.copy_(r.T @ p)
        elif p.shape[-1] == len(r) and "ln_" not in name:
            p.copy_(p @ r)
    return out


def linear_bridges(n_sites, encoder, decoder):
    """Bridges that multiply rows by the given matrices, and keep all channels."""
    bridges = Bridges(n_sites, *encoder.shape, 1.0).requires_grad_(False)
    for f, g in zip(bridges.encoders, bridges.decoders):
        f.weight.copy_(encoder.T)
        g.weight.copy_(decoder.T)
    return bridges


# --- formulas --------------------------------------------------------------------------------

def test_nmse_is_the_squared_error_over_the_second_moment_of_the_target(seed):
    x = torch.randn(2, 3, 5)
    h = torch.randn(2, 3, 5) + 2
    expected = ((x - h) ** 2).sum() / (h**2).sum()
    assert nmse(x, h).item() == pytest.approx(expected.item(), rel=1e-5)
    assert nmse(torch.zeros_like(h), h).item() == pytest.approx(1.0) and nmse(h, h).item() == 0


def test_kl_is_in_nats_per_token_from_the_dense_model_to_the_other(seed):
    a = torch.randn(2, 3, 5)
    b = torch.randn(2, 3, 5)
    p = a.double().softmax(-1)
    q = b.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert kl(distribution(a), b).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl(distribution(b), a).item() != pytest.approx(kl(distribution(a), b).item(), rel=1e-3)


def test_an_identity_between_two_copies_costs_nothing_at_any_site(seed):
    model = plain(afrac=0.5)
    eye = torch.eye(6)
    x = tokens()
    y = x.roll(-1, 1)
    net = Coupled(model, copy.deepcopy(model), linear_bridges(5, eye, eye), WEIGHTS)
    (loss, terms), whole = net(x, y)
    own = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    assert terms.shape == (5, 4) and terms.abs().max() < 1e-6
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert whole.item() == pytest.approx(own.item(), rel=1e-4)


def test_a_rotated_copy_is_reached_by_the_rotation_and_by_nothing_else(seed):
    model = plain()
    r = torch.linalg.qr(torch.randn(6, 6))[0]
    x = tokens()
    dense = rotated(model, r)
    assert torch.allclose(dense(x)[0], model(x)[0], atol=1e-4)
    # the dense stream is the sparse one times r
    terms = Coupled(model, dense, linear_bridges(5, r.T, r), WEIGHTS)(x, x)[0][1]
    assert terms.abs().max() < 1e-4
    wrong = Coupled(model, dense, linear_bridges(5, r, r.T), WEIGHTS)(x, x)[0][1]
    assert (wrong[:, :2] > 0.05).all() and (wrong[:, 2:] > 1e-3).all()


def test_each_term_is_its_formula_weighed_and_summed_over_sites(seed):
    sparse = random_model(n_layer=2, afrac=0.5)
    dense = random_model(n_layer=2, d_model=8)
    bridges = Bridges(5, 8, 6, 0.5).requires_grad_(False)
    for p in bridges.parameters():
        p.normal_()
    x = tokens()
    y = tokens()
    (own, terms), whole = Coupled(sparse, dense, bridges, WEIGHTS)(x, y)

    def sites(model):
        h = [model.embed(x)]
        for f in model.sublayers:
            h.append(f(h[-1]))
        return h

    target = dense(x)[0].double().log_softmax(-1)
    expected = own.double()
    for i, (s, d) in enumerate(zip(sites(sparse), sites(dense))):
        encoded = d @ bridges.encoders[i].weight.T + bridges.encoders[i].bias
        kept = encoded.abs().topk(3, dim=-1).indices
        encoded = torch.zeros_like(encoded).scatter(-1, kept, encoded.gather(-1, kept))
        decoded = s @ bridges.decoders[i].weight.T + bridges.decoders[i].bias
        by_hand = [((encoded - s) ** 2).sum() / (s**2).sum(),
                   ((decoded - d) ** 2).sum() / (d**2).sum()]
        for model, h in ((sparse, encoded), (dense, decoded)):
            for f in model.sublayers[i:]:
                h = f(h)
            log_p = model.unembed(h, x).double().log_softmax(-1)
            by_hand.append((target.exp() * (target - log_p)).sum(-1).mean())
        assert terms[i].tolist() == pytest.approx([v.item() for v in by_hand], rel=1e-3)
        expected = expected + sum(w * v for w, v in zip(WEIGHTS, by_hand))
    assert whole.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_terms_look_at_the_first_rows_alone(seed):
    sparse = random_model(n_layer=1)
    dense = random_model(n_layer=1, d_model=8)
    bridges = Bridges(3, 8, 6, 0.5)
    x = tokens()
    y = tokens()
    few = Coupled(sparse, dense, bridges, WEIGHTS, rows=2)(x, y)[0]
    alone = Coupled(sparse, dense, bridges, WEIGHTS)(x[:2], y[:2])[0]
    own = sparse(x, y)[1].item()  # the next-token loss is of all rows
    assert few[0].item() == pytest.approx(own, rel=1e-6)
    assert torch.allclose(few[1], alone[1], rtol=1e-5)


# --- the step --------------------------------------------------------------------------------

def learner(n_layer=2, recompute=True, **options):
    torch.manual_seed(0)
    sparse = random_model(n_layer=n_layer, afrac=0.5, **options).requires_grad_(True)
    dense = random_model(n_layer=n_layer, d_model=8)
    bridges = Bridges(2 * n_layer + 1, 8, 6, 0.5)
    return Coupled(sparse, dense, bridges, WEIGHTS, recompute=recompute).train()


def gradients(net, x, y):
    net(x, y)[1].backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_recomputing_gives_the_gradients_of_the_one_big_graph(seed):
    x = tokens()
    y = tokens()
    big = gradients(learner(recompute=False), x, y)
    ours = gradients(learner(recompute=True), x, y)
    assert big.keys() == ours.keys() and not any(name.startswith("dense") for name in ours)
    trained = [n for n, _ in learner().named_parameters() if not n.startswith("dense")]
    assert set(trained) - set(ours) == set()
    for name in big:
        assert torch.allclose(big[name], ours[name], rtol=1e-4, atol=1e-7), name


def held(net, x, y) -> int:
    """Bytes that the step holds for its backward pass when the forward pass ends."""
    seen = {}

    def pack(t):
        seen[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x, y)[1]
    return sum(seen.values())


def test_recomputed_a_step_holds_no_graph_of_a_hybrid_pass(seed):
    x = tokens(8, length=8)
    y = tokens(8, length=8)
    two, four = ([held(learner(n, again), x, y) for again in (True, False)] for n in (2, 4))
    assert four[1] > 2.5 * two[1]  # the big graph grows with sites times layers,
    alone = [held_alone(n, x, y) for n in (2, 4)]
    # recomputed, little more than the sparse model's own pass does
    assert four[0] - two[0] < 1.6 * (alone[1] - alone[0])


def held_alone(n_layer, x, y):
    return held(learner(n_layer).sparse, x, y)
