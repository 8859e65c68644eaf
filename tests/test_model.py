"""model.py: the published format in and out, every node where it should be, and a chain that is the forward pass."""
import json
import math
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from config import write_atomic
from model import GPT, GPTConfig, read_config, record

pytestmark = pytest.mark.usefixtures("seed")
FIXTURES = Path(__file__).parent / "fixtures"
LAYER_SITES = ["attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta",
               "mlp.act_in", "mlp.post_act", "mlp.resid_delta"]
LOCTYPES = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"
PUBLISHED_KEYS = set("""block_size vocab_size n_layer n_head d_head d_model d_mlp dropout bias ln_bias rms_norm
    residual_activation_type activation_type afrac afrac_loctypes tied_unembed tokenizer_name enable_bigram_table
    learnable_bigram_table d_pos_emb sinusoidal_cat_pos_emb dropout_cat_pos_emb sink flash grad_checkpointing
    debug_nans enable_sparse_kernels use_tied_aux_matrix""".split())

USUAL = GPTConfig(block_size=12, vocab_size=29, n_layer=2, n_head=3, d_head=8, d_model=20, d_mlp=44, rms_norm=True,
                  afrac=0.25, afrac_loctypes=LOCTYPES, tied_unembed=False, grad_checkpointing=False,
                  enable_bigram_table=True, learnable_bigram_table=True, sink=True)
EVERY_OPTION = GPTConfig(
    block_size=12, vocab_size=29, n_layer=2, n_head=3, d_head=8, d_model=20, d_mlp=44, rms_norm=False, ln_bias=True,
    residual_activation_type="relu", activation_type="relu", afrac=0.5,
    afrac_loctypes=LOCTYPES + ",resid_post_attn,resid_post_mlp", debug_nans=True, tied_unembed=True,
    grad_checkpointing=True, enable_bigram_table=True, d_pos_emb=6, sinusoidal_cat_pos_emb=True,
    dropout_cat_pos_emb=True, sink=True)
BARE = replace(USUAL, afrac=None, bias=False, rms_norm=False, ln_bias=False, sink=False, enable_bigram_table=False,
               d_pos_emb=5, activation_type="relu")
CONFIGS = pytest.mark.parametrize("config", [USUAL, EVERY_OPTION, BARE], ids=["usual", "every_option", "bare"])


def build(config=USUAL, **options):
    """A model in eval mode whose weights, gains, tables and buffers are all random and of a size that matters."""
    model = GPT(replace(config, **options)).eval()
    for name, p in model.state_dict().items():  # shares memory with the model
        p.normal_(std=0.3)
        if "ln_" in name and name.endswith("weight"):
            p.add_(1.0)
    return model


def tokens(model, B=2, T=None):
    return torch.randint(0, model.config.vocab_size, (B, T or model.config.block_size))


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **tolerance or dict(rtol=0, atol=1e-5))


# --- the published format ----------------------------------------------------------------------

def raw_fixture(name):
    folder = FIXTURES / name
    return (json.loads((folder / "beeg_config.json").read_text()),
            *(torch.load(folder / f, weights_only=True) for f in ("final_model.pt", "expected.pt")))


def write(folder, config, state):
    folder.mkdir(exist_ok=True)
    (folder / "beeg_config.json").write_text(json.dumps(config))
    torch.save(state, folder / "final_model.pt")
    return str(folder)


def recover_qkv_bias(weight, nodes, layer):
    """The bias that a fixture's file lacks, read off the recorded q, k and v.

    Where AbsTopK kept a channel, it shows itself. A channel that was never kept stayed below the
    smallest kept magnitude everywhere: any bias that leaves it there gives the recorded values.
    """
    product = (nodes[f"{layer}.attn.act_in"] @ weight.T).flatten(0, 1)                     # (B * T, 3 * H * d_head)
    seen = torch.stack([nodes[f"{layer}.attn.{z}"] for z in "qkv"], -2).flatten(0, 1)      # (B * T, 3, H * d_head)
    smallest = seen.abs().where(seen != 0, math.inf).amin(-1, keepdim=True).expand_as(seen).flatten(1)
    low, high = (-smallest - product).amax(0), (smallest - product).amin(0)
    shown = (seen.flatten(1) - product).where(seen.flatten(1) != 0, math.nan).nanmedian(0).values
    assert (low < high)[shown.isnan()].all()
    return torch.where(shown.isnan(), (low + high) / 2, shown)


def recovered_fixture(name, folder):
    """config, state dict and expected values of a fixture, with the weights that its file lacks filled in."""
    config, state, expected = raw_fixture(name)
    for layer in range(config["n_layer"]):
        key = f"transformer.h.{layer}.attn.c_attn"
        state[f"{key}.bias"] = recover_qkv_bias(state[f"{key}.weight"], expected["nodes"], layer)
    if "final_logits_bias" not in state:  # one vector, whatever the position
        with torch.no_grad():
            logits = GPT.load(write(folder, config, state))(expected["idx"])[0]
        state["final_logits_bias"] = (expected["logits"] - logits).mean((0, 1))
    return config, state, expected


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ["sink_bigram", "concat_positions"])
def test_fixture_gives_the_authors_logits_loss_and_every_site(name, flash, tmp_path):
    config, state, expected = recovered_fixture(name, tmp_path)
    model = GPT.load(write(tmp_path, {**config, "flash": flash}, state))
    seen = {}
    with torch.no_grad():
        logits, loss = model(expected["idx"], expected["targets"], nodes=record(seen))
    close(logits, expected["logits"])
    close(loss, expected["loss"])
    assert seen.keys() == expected["nodes"].keys()
    for site, want in expected["nodes"].items():
        close(seen[site], want, rtol=0, atol=1e-5, msg=lambda m: f"{site}: {m}")


@pytest.mark.parametrize("name", ["sink_bigram", "concat_positions"])
def test_load_names_every_weight_that_a_file_lacks(name):
    with pytest.raises(ValueError) as e:
        GPT.load(str(FIXTURES / name))
    assert str(e.value).count("c_attn.bias") == raw_fixture(name)[0]["n_layer"]
    assert "transformer.h.1.attn.c_attn.bias" in str(e.value) and "\n" not in str(e.value)


def test_load_names_weights_that_it_does_not_know_or_that_do_not_fit(tmp_path):
    model = build()
    for state, said in (({**model.state_dict(), "transformer.h.0.attn.extra": torch.ones(2)}, "transformer.h.0.attn.extra"),
                        ({**model.state_dict(), "lm_head.weight": torch.ones(3, 4)}, "lm_head.weight")):
        with pytest.raises(ValueError, match=said):
            GPT.load(write(tmp_path, asdict(model.config), state))


def test_final_logits_bias_is_zeros_where_a_file_has_none(tmp_path):
    model = build()
    state = model.state_dict()
    del state["final_logits_bias"]
    assert not GPT.load(write(tmp_path, asdict(model.config), state)).final_logits_bias.any()


def test_unknown_config_keys_are_refused_by_name(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="n_haed.*spam|spam.*n_haed"):
        GPT.load(write(tmp_path, {**asdict(model.config), "spam": 1, "n_haed": 2}, model.state_dict()))


def test_old_config_keys_are_understood():
    config = read_config(dict(n_embd=24, n_head=3, n_mlp=40, n_layer=1, use_tied_aux_matrix=False, bigram_table_rank=7,
                              pfrac=None, expansion_factor=1))
    assert (config.d_model, config.d_mlp, config.d_head) == (24, 40, 8)


def test_absent_widths_follow_from_d_model():
    config = read_config(dict(d_model=48, n_head=4, n_layer=1))
    assert (config.d_head, config.d_mlp) == (12, 192)


def test_a_tied_aux_matrix_is_refused():
    with pytest.raises(ValueError, match="use_tied_aux_matrix"):
        read_config(dict(use_tied_aux_matrix=True))


@pytest.mark.parametrize("wrong", [dict(d_head=0), dict(n_layer=0), dict(afrac=0.0), dict(afrac=0.01), dict(afrac=1.5),
                                   dict(activation_type="silu"), dict(residual_activation_type="gelu"),
                                   dict(afrac_loctypes="attn_in,attn_z")], ids=str)
def test_a_config_that_makes_no_model_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(USUAL, **wrong)


@CONFIGS
def test_save_and_load_are_bitwise_inverse(config, tmp_path):
    model = build(config)
    model.save(str(tmp_path))
    again = GPT.load(str(tmp_path))
    assert again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
    idx = tokens(model)
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_a_saved_model_has_the_published_names_and_nothing_else(tmp_path):
    build(d_pos_emb=6).save(str(tmp_path))
    state = torch.load(tmp_path / "final_model.pt", weights_only=True)
    block = ["ln_1.weight", "ln_2.weight", "ln_p1.weight", "ln_p2.weight", "attn.attn_imp.sink_logit"]
    block += [f"{m}.{x}" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") for x in ("weight", "bias")]
    assert set(state) == {f"transformer.h.{i}.{x}" for i in range(2) for x in block} | {
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight",
        "final_logits_bias", "bigram_table"}
    assert state["transformer.h.0.attn.c_attn.weight"].shape == (72, 26) and state["bigram_table"].shape == (29, 29)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beeg_config.json", "final_model.pt"]


@CONFIGS
def test_a_saved_config_has_only_published_keys(config, tmp_path):
    build(config).save(str(tmp_path))
    assert set(json.loads((tmp_path / "beeg_config.json").read_text())) <= PUBLISHED_KEYS


def test_truncated_weights_are_one_line(tmp_path, seed):
    build().save(str(tmp_path))
    whole = (tmp_path / "final_model.pt").read_bytes()
    for size in (0, 1, 10, random.Random(seed).randrange(11, len(whole)), len(whole) // 2, len(whole) - 1):
        (tmp_path / "final_model.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="final_model.pt") as e:
            GPT.load(str(tmp_path))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"x"', '{"n_layer": "two"}', '{"n_layer": null}', '{"afrac_loctypes": 3}'])
def test_a_foreign_config_is_one_line_that_names_it(text, tmp_path):
    build().save(str(tmp_path))
    (tmp_path / "beeg_config.json").write_text(text)
    with pytest.raises(ValueError, match="beeg_config.json") as e:
        GPT.load(str(tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("missing", ["beeg_config.json", "final_model.pt"])
def test_a_directory_without_a_model_is_a_value_error(missing, tmp_path):
    build().save(str(tmp_path))
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        GPT.load(str(tmp_path))


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "x"
    write_atomic(str(path), lambda f: f.write(b"old"))

    def half(f):
        f.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(str(path), half)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


# --- the forward pass, written out -------------------------------------------------------------

def written_out(model, idx):
    """Logits by paper sections 2 and 10, from the state dict and the config alone; no dropout."""
    c, w = model.config, {k.removeprefix("transformer."): v for k, v in model.state_dict().items()}
    B, T = idx.shape

    def top(place, x):
        if c.afrac is None or place not in c.afrac_loctypes.split(","):
            return x
        kept = x.abs().argsort(dim=-1, descending=True, stable=True)[..., : int(c.afrac * x.shape[-1])]
        return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))

    def norm(name, x):
        if c.rms_norm:
            return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * w[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def read(block, norms, place, h):
        x = norm(f"{block}.{norms[0]}", h)
        if c.d_pos_emb is not None:
            x = torch.cat([x, norm(f"{block}.{norms[1]}", w["wpe.weight"][:T]).expand(B, -1, -1)], -1)
        return top(place, x)

    def add(h, delta, place):
        h = h + delta
        return top(place, h.clamp(min=0) if c.residual_activation_type == "relu" else h)

    act = {"relu": lambda x: x.clamp(min=0), "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2}[c.activation_type]
    h = w["wte.weight"][idx]
    if c.d_pos_emb is None:
        h = h + w["wpe.weight"][:T]
    for b in (f"h.{i}" for i in range(c.n_layer)):
        qkv = linear(f"{b}.attn.c_attn", read(b, ("ln_1", "ln_p1"), "attn_in", h)).split(c.n_head * c.d_head, -1)
        q, k, v = (top(f"attn_{z}", x).view(B, T, c.n_head, c.d_head).transpose(1, 2) for z, x in zip("qkv", qkv))
        e = (q @ k.mT / math.sqrt(c.d_head)).exp().tril()
        total = e.sum(-1, keepdim=True)
        if c.sink:
            total = total + w[f"{b}.attn.attn_imp.sink_logit"].exp().view(1, -1, 1, 1)
        y = (e @ v / total).transpose(1, 2).reshape(B, T, -1)
        h = add(h, top("attn_out", linear(f"{b}.attn.c_proj", y)), "resid_post_attn")
        x = top("mlp_neuron", act(linear(f"{b}.mlp.c_fc", read(b, ("ln_2", "ln_p2"), "mlp_in", h))))
        h = add(h, top("mlp_out", linear(f"{b}.mlp.c_proj", x)), "resid_post_mlp")
    logits = norm("ln_f", h) @ w["lm_head.weight"].T + w["final_logits_bias"]
    return logits + w["bigram_table"][idx] if c.enable_bigram_table else logits


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("T", [1, 12])
@CONFIGS
def test_logits_equal_a_forward_pass_written_out(config, T, flash):
    model = build(config, flash=flash).double()  # double, so that rounding does not swap two channels' ranks
    idx = tokens(model, T=T)
    close(model(idx)[0], written_out(model, idx), rtol=1e-7, atol=1e-7)


def test_loss_is_the_mean_cross_entropy_in_nats_and_leaves_out_targets_of_minus_1():
    model = build()
    idx, targets = tokens(model), tokens(model)
    logits, loss = model(idx, targets)
    close(loss, -logits.log_softmax(-1).gather(-1, targets[..., None]).mean())
    targets[0], targets[1, 5:] = -1, -1
    want = -logits[1, :5].log_softmax(-1).gather(-1, targets[1, :5, None]).mean()
    close(model(idx, targets)[1], want)
    assert model(idx)[1] is None


def test_a_new_models_loss_is_near_that_of_guessing():
    model = GPT(USUAL)
    assert model(tokens(model), tokens(model))[1].item() == pytest.approx(math.log(29), abs=0.3)


# --- the chain ---------------------------------------------------------------------------------

@CONFIGS
def test_embed_sublayers_unembed_is_the_forward_pass_bitwise(config):
    model = build(config)
    idx = tokens(model)
    assert len(model.sublayers) == 2 * config.n_layer
    streams = [model.embed(idx)]
    for f in model.sublayers:
        streams.append(f(streams[-1]))
    assert torch.equal(model.unembed(streams[-1], idx), model(idx)[0])
    for i, h in enumerate(streams):  # the last one has no sublayer left to run
        assert torch.equal(model.run(h, start=i), streams[-1]), i


def test_sublayers_alternate_attention_and_mlp():
    model = build()
    h = model.embed(tokens(model))
    for i, f in enumerate(model.sublayers):
        seen = {}
        h = f(h, record(seen))
        mine = LAYER_SITES[5:] if i % 2 else LAYER_SITES[:5]
        assert {s for s in seen if s.split(".", 1)[1] in LAYER_SITES} == {f"{i // 2}.{s}" for s in mine}


def test_run_passes_nodes_on():
    model = build()
    seen = {}
    model.run(model.embed(tokens(model)), start=3, nodes=record(seen))
    assert "1.mlp.post_act" in seen and "1.attn.q" not in seen


def test_unembed_adds_the_bigram_row_of_the_current_token_and_the_bias():
    model = build()
    idx = tokens(model)
    h = torch.randn(*idx.shape, 20)
    logits, table, bias = model.unembed(h, idx), model.bigram_table.detach().clone(), model.final_logits_bias.clone()
    model.bigram_table.data.zero_(), model.final_logits_bias.zero_()
    close(logits - model.unembed(h, idx), table[idx] + bias)


def test_positions_are_added_to_the_embedding_or_concatenated_to_each_read():
    idx = tokens(build())
    added = build()
    close(added.embed(idx), added.transformer.wte.weight[idx] + added.transformer.wpe.weight)
    model, seen = build(d_pos_emb=6, afrac=None), {}
    assert torch.equal(model.embed(idx), model.transformer.wte.weight[idx])
    model(idx, nodes=record(seen))
    for site, norm in (("1.attn.act_in", "ln_p1"), ("1.mlp.act_in", "ln_p2")):
        want = getattr(model.transformer.h[1], norm)(model.transformer.wpe.weight)
        assert seen[site].shape[-1] == 26 and torch.equal(seen[site][..., 20:], want.expand(2, -1, -1))


def test_sinusoidal_positions_are_not_trained_and_tell_every_position_apart():
    model = GPT(EVERY_OPTION)
    assert not model.transformer.wpe.weight.requires_grad
    assert torch.pdist(model.transformer.wpe.weight).min() > 1e-3


def test_a_tied_unembedding_is_the_embedding(tmp_path):
    build(EVERY_OPTION).save(str(tmp_path))
    for model in (GPT(EVERY_OPTION), GPT.load(str(tmp_path))):
        assert model.lm_head.weight is model.transformer.wte.weight
    assert GPT(USUAL).lm_head.weight is not GPT(USUAL).transformer.wte.weight


# --- node sites --------------------------------------------------------------------------------

@pytest.mark.parametrize("d_pos_emb", [None, 6])
def test_nodes_sees_all_eight_sites_of_each_layer_with_exactly_k_nonzeros(d_pos_emb):
    model, seen = build(d_pos_emb=d_pos_emb), {}
    model(tokens(model), nodes=record(seen))
    read = 20 + (d_pos_emb or 0)
    widths = dict(zip(LAYER_SITES, (read, 24, 24, 24, 20, read, 44, 20)))
    assert model.sites == [f"{i}.{s}" for i in range(2) for s in LAYER_SITES] and set(model.sites) <= set(seen)
    for site in model.sites:
        width = widths[site.split(".", 1)[1]]
        assert seen[site].shape == (2, 12, width) and model.config.site_width(site) == width, site
        assert ((seen[site] != 0).sum(-1) == int(0.25 * width)).all(), site


@pytest.mark.parametrize("only", LOCTYPES.split(","))
def test_abstopk_acts_where_the_config_says_and_nowhere_else(only):
    model, seen = build(afrac_loctypes=only), {}
    model(tokens(model), nodes=record(seen))
    sparse = {s for s in model.sites if ((seen[s] != 0).sum(-1) <= seen[s].shape[-1] // 4).all()}
    assert sparse == {f"{i}.{LAYER_SITES[LOCTYPES.split(',').index(only)]}" for i in range(2)}


def test_the_stream_itself_is_not_topkd_unless_asked():
    for places, count in ((LOCTYPES, 20), (LOCTYPES + ",resid_post_attn,resid_post_mlp", 5)):
        model = build(afrac_loctypes=places)
        h = model.embed(tokens(model))
        for f in model.sublayers:
            h = f(h)
            assert ((h != 0).sum(-1) == count).all()


def test_identity_nodes_change_nothing_bitwise():
    for config in (USUAL, EVERY_OPTION, BARE):
        model = build(config)
        idx = tokens(model)
        assert torch.equal(model(idx, nodes=lambda site, x: x)[0], model(idx)[0])


@pytest.mark.parametrize("site", [f"{i}.{s}" for i in range(2) for s in LAYER_SITES])
def test_replacing_a_node_changes_what_follows_and_nothing_before(site):
    model, seen, changed = build(afrac=0.75), {}, {}
    idx = tokens(model)
    logits = model(idx, nodes=record(seen))[0]
    after = model(idx, nodes=lambda s, x: record(changed)(s, x + torch.randn_like(x) if s == site else x))[0]
    assert not torch.allclose(after, logits)
    order = lambda s: model.sites.index(s[:-1] + "q" if s[-2:] in (".k", ".v") else s)  # q, k and v stand side by side
    for s in set(model.sites) - {site}:
        assert torch.equal(seen[s], changed[s]) == (order(s) <= order(site)), s


def test_a_replacement_is_used_as_it_is_after_abstopk():
    model, seen = build(sink=False, afrac_loctypes="attn_q,attn_k,attn_v,mlp_neuron"), {}
    idx = tokens(model)

    def ones(site, x):
        x = torch.ones_like(x) if site in ("0.attn.v", "1.mlp.post_act") else x
        return record(seen)(site, x)

    model(idx, nodes=ones)  # the average of ones is ones, and none of them is dropped
    close(seen["0.attn.resid_delta"], model.transformer.h[0].attn.c_proj(torch.ones(2, 12, 24)))
    close(seen["1.mlp.resid_delta"], model.transformer.h[1].mlp.c_proj(torch.ones(2, 12, 44)))


def test_without_writes_the_stream_stays_the_embedding():
    model = build()
    idx = tokens(model)
    logits = model(idx, nodes=lambda s, x: torch.zeros_like(x) if s.endswith("resid_delta") else x)[0]
    assert torch.equal(logits, model.unembed(model.embed(idx), idx))


def test_gradients_reach_what_a_node_function_adds():
    model = build()
    delta = torch.zeros(24, requires_grad=True)
    idx = tokens(model)
    model(idx, idx, nodes=lambda s, x: x + delta if s == "0.attn.v" else x)[1].backward()
    assert delta.grad.abs().min() > 0


# --- attention, generation, training options ---------------------------------------------------

@pytest.mark.parametrize("flash", [True, False])
@CONFIGS
def test_later_tokens_do_not_change_earlier_logits(config, flash):
    model = build(config, flash=flash)
    idx = tokens(model)
    other = idx.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 29
    a, b = model(idx)[0], model(other)[0]
    close(a[:, :7], b[:, :7], rtol=0, atol=1e-6)
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("d_head, T", [(8, 12), (16, 12), (64, 12), (8, 1), (16, 1)])
@pytest.mark.parametrize("sink", [True, False])
def test_flash_and_plain_attention_agree_in_loss_and_all_gradients(sink, d_head, T):
    model = build(d_head=d_head, sink=sink, afrac=None)
    idx, targets = tokens(model, T=T), tokens(model, T=T)
    grads = {}
    for flash in (True, False):
        model.config.flash = flash
        model.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        grads[flash] = dict(loss=loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[True].keys() == grads[False].keys()
    assert any("sink_logit" in n for n in grads[True]) == sink
    for name, g in grads[True].items():
        close(g, grads[False][name], rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_generation_at_temperature_0_is_greedy_on_the_last_block_size_tokens():
    model = build()
    for T in (1, 10, 12, 30):  # also a prompt that is longer than the block
        idx = tokens(model, T=T)
        out, want = model.generate(idx, 6, temperature=0), idx
        for _ in range(6):
            want = torch.cat([want, model(want[:, -12:])[0][:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(out, want) and torch.equal(model.generate(idx, 6, temperature=0.9, top_k=1), want)


def test_generation_samples_in_proportion():
    model = build()
    idx = tokens(model, B=1, T=3)
    p = (model(idx)[0][0, -1] / 0.7).softmax(-1)
    drawn = model.generate(idx.expand(20000, -1), 1, temperature=0.7)[:, -1].bincount(minlength=29) / 20000
    assert (drawn - p).abs().max() < 0.025  # seven standard deviations


def test_too_many_tokens_are_a_value_error():
    model = build()
    for f in (model, model.embed):
        with pytest.raises(ValueError, match="13.*12"):
            f(tokens(model, T=13))


@CONFIGS
def test_grad_checkpointing_recomputes_and_gives_the_same_gradients(config):
    model = build(config).train()
    idx, targets = tokens(model), tokens(model)
    grads, calls = {}, {}
    for on in (True, False):
        model.config.grad_checkpointing, calls[on] = on, []
        model.zero_grad()
        model(idx, targets, nodes=lambda s, x: calls[on].append(s) or x)[1].backward()
        grads[on] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert calls[True].count("0.attn.q") == 2 * calls[False].count("0.attn.q") == 2
    for name, g in grads[True].items():
        close(g, grads[False][name], rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("afrac", [None, 0.25])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_debug_nans_names_the_site(bad, afrac):
    model = build(debug_nans=True, afrac=afrac)
    idx = tokens(model)
    model(idx)
    model.transformer.h[1].mlp.c_fc.bias.data[3] = bad
    with pytest.raises(FloatingPointError, match=r"1\.mlp\.post_act"):
        model(idx)


def test_a_nan_in_a_weight_reaches_the_loss():
    model = build()
    model.transformer.h[1].mlp.c_fc.bias.data[3] = math.nan
    assert not model(tokens(model), tokens(model))[1].isfinite()


def test_the_compiled_model_is_one_graph():
    torch._dynamo.reset()
    model = build(n_layer=1)
    idx = tokens(model)
    close(torch.compile(model, backend="eager", fullgraph=True)(idx)[0], model(idx)[0])


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_model_gives_the_logits_of_the_eager_one():
    torch._dynamo.reset()
    model = build(n_layer=1, afrac_loctypes="mlp_neuron")  # one AbsTopK: most of the time goes to the C++ compiler
    idx = tokens(model)
    with torch.no_grad():
        close(torch.compile(model)(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_cannot_be_extended():
    with pytest.raises(ValueError, match="empty prompt"):
        build().generate(torch.zeros(1, 0, dtype=torch.long), 3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_under_the_prefixes_of_wrappers_are_understood(prefix):
    model, other = build(), build()
    other.load_weights({prefix + name: p for name, p in model.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
