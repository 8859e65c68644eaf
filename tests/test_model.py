"""model.py: the published format in and out, every node where it should be, and a chain that is the forward pass."""
import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from config import write_atomic
from model import GPT, GPTConfig, read_config, record
from model_files import weights_hash

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


# --- the published formats ---------------------------------------------------------------------

PUBLISHED = ["published_format/sink_bigram", "published_format/concat_positions", "hub_format/sink_bigram"]


def write(folder, config, state):
    folder.mkdir(exist_ok=True)
    (folder / "beeg_config.json").write_text(json.dumps(config))
    torch.save(state, folder / "final_model.pt")
    return str(folder)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_fixture_gives_the_authors_logits_loss_and_every_site(name, flash):
    if name.startswith("hub"):
        pytest.importorskip("safetensors")
    model = GPT.load(str(FIXTURES / name))
    model.config.flash = flash
    expected, seen = torch.load(FIXTURES / name / "expected.pt", weights_only=True), {}
    with torch.no_grad():
        logits, loss = model(expected["idx"], expected["targets"], nodes=record(seen))
    close(logits, expected["logits"])
    close(loss, expected["loss"])
    assert seen.keys() == expected["nodes"].keys()
    for site, want in expected["nodes"].items():
        close(seen[site], want, rtol=0, atol=1e-5, msg=lambda m: f"{site}: {m}")


def test_load_names_every_weight_that_a_file_lacks(tmp_path):
    model = build()
    state = {n: p for n, p in model.state_dict().items() if "c_attn.bias" not in n}
    with pytest.raises(ValueError) as e:
        GPT.load(write(tmp_path, asdict(model.config), state))
    assert str(e.value).count("c_attn.bias") == 2
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


# as the published configs of sparse and of dense models are written; sizes of our own
SPARSE = dict(
    block_size=64, vocab_size=32, n_layer=2, n_head=4, d_head=4, d_model=16, dropout=0.0, bias=True, ln_bias=True,
    rms_norm=True, residual_activation_type="identity", activation_type="gelu", afrac=0.25,
    afrac_loctypes="attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v", afrac_approx=False, enable_sparse_kernels=False,
    ignore_dw_grad=False, debug_nans=False, tied_unembed=False, bigram_table_rank=None, tokenizer_name="tinypython_2k",
    pfrac=0.125, expansion_factor=1, expansion_factor_mlp=1, debug_exact_topk=True, grad_checkpointing=True,
    sparse_matmul_impl="cuda", d_mlp=64, flash=True, enable_bigram_table=True, learnable_bigram_table=True,
    d_pos_emb=None, sink=True, rtopk=False, n_embd=None)
DENSE = {k: v for k, v in SPARSE.items() if k not in ("afrac_loctypes", "afrac_approx", "tokenizer_name", "sink", "rtopk")}
DENSE |= dict(afrac=None, pfrac=16)
HUB = SPARSE | dict(
    architectures=["CircuitGPTForCausalLM"], auto_map={"AutoConfig": "config.CircuitGPTConfig"}, model_type="circuitgpt",
    dtype="float32", transformers_version="4.49.0", bos_token_id=None, eos_token_id=31, is_decoder=True, use_cache=False,
    max_position_embeddings=64, hidden_size=16, num_hidden_layers=2, _name_or_path="x", unembed_rank=None, mup=False,
    mup_width_multiplier=None, enable_fp8_linear=False, scale_invariance=False, afrac_ste=True, afrac_ste_only_non_neurons=False)


@pytest.mark.parametrize("raw", [SPARSE, DENSE, HUB], ids=["sparse", "dense", "hub"])
def test_published_configs_are_read(raw):
    config = asdict(read_config(raw))
    assert config == {**asdict(GPTConfig()), **{k: v for k, v in raw.items() if k in config}}


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_a_key_that_is_off_passes_whatever_it_is(value):
    assert read_config(SPARSE | dict(spam=value, rtopk=value, mup=value)) == read_config(SPARSE)


@pytest.mark.parametrize("key, value", [("rtopk", True), ("afrac_approx", True), ("mup", True), ("mup_width_multiplier", 8.0),
                                        ("scale_invariance", True), ("enable_fp8_linear", True), ("unembed_rank", 64),
                                        ("bigram_table_rank", 64), ("use_tied_aux_matrix", True)])
def test_what_would_change_the_forward_pass_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"^{key}: no published code"):
        read_config(HUB | {key: value})


@pytest.mark.parametrize("key, value", [("afrac_ste", True), ("learning_rate", 0.01), ("max_steps", 9), ("weight_decay", 0.1),
                                        ("wandb_run", "x"), ("_attn_implementation", "eager"), ("num_beams", 1)])
def test_training_and_other_programs_are_no_concern_of_a_forward_pass(key, value):
    assert read_config(HUB | {key: value}) == read_config(HUB)


def test_unknown_config_keys_are_refused_by_name(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="n_haed.*spam"):
        GPT.load(write(tmp_path, {**asdict(model.config), "spam": 1, "n_haed": 2}, model.state_dict()))


def test_old_config_keys_are_understood():
    old = dict(n_embd=24, n_head=3, n_mlp=40, n_layer=1, use_tied_aux_matrix=False, pfrac=None, expansion_factor=1)
    for raw in (old, old | dict(d_model=None), old | dict(d_model=24)):
        config = read_config(raw)
        assert (config.d_model, config.d_mlp, config.d_head) == (24, 40, 8)
    with pytest.raises(ValueError, match="d_model"):
        read_config(old | dict(d_model=48))


@pytest.mark.parametrize("raw", [dict(d_model=None), dict(d_model=None, n_embd=None), dict(n_embd=None)])
def test_a_width_that_is_null_under_each_of_its_names_is_an_error(raw):
    with pytest.raises(ValueError, match="d_model is null"):
        read_config(raw)


def test_nulls_are_as_if_they_were_not_there():
    raw = dict.fromkeys(["dropout", "flash", "sink", "d_head", "d_mlp", "tokenizer_name", "afrac_loctypes"])
    assert read_config(raw) == GPTConfig()


@pytest.mark.parametrize("key, value", [("flash", 1), ("n_layer", 2.0), ("n_layer", True), ("d_mlp", "4"), ("afrac", "a")])
def test_a_value_of_another_type_is_an_error_that_names_its_key(key, value):
    with pytest.raises(ValueError, match=key):
        read_config({key: value})


def test_absent_widths_follow_from_d_model():
    config = read_config(dict(d_model=48, n_head=4, n_layer=1))
    assert (config.d_head, config.d_mlp) == (12, 192)


@pytest.mark.parametrize("wrong", [dict(d_head=0), dict(n_layer=0), dict(afrac=0.0), dict(afrac=0.01), dict(afrac=1.5),
                                   dict(activation_type="silu"), dict(residual_activation_type="gelu"),
                                   dict(afrac_loctypes="attn_in,attn_z")], ids=str)
def test_a_config_that_makes_no_model_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(USUAL, **wrong)


@pytest.fixture(params=["store", "hub"])
def layout(request):
    if request.param == "hub":
        pytest.importorskip("safetensors")
    return request.param


WEIGHTS = {"store": "final_model.pt", "hub": "model.safetensors"}


@CONFIGS
def test_save_and_load_are_bitwise_inverse(config, layout, tmp_path):
    model = build(config)
    model.save(str(tmp_path), layout)
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


def test_the_hubs_layout_is_as_the_hub_has_it(tmp_path):
    safe = pytest.importorskip("safetensors.torch")
    build().save(str(tmp_path), "hub")
    theirs = FIXTURES / "hub_format" / "sink_bigram"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    names = lambda folder: {n.replace(".h.0.", ".h.1.") for n in safe.load_file(folder / "model.safetensors")}
    assert names(tmp_path) == {n for n in names(theirs) if "ln_p" not in n}  # ours has no positions beside the reads
    with safe.safe_open(tmp_path / "model.safetensors", "pt") as ours, safe.safe_open(theirs / "model.safetensors", "pt") as f:
        assert ours.metadata() == f.metadata()
    want = json.loads((theirs / "config.json").read_text())
    for key in ("architectures", "model_type", "dtype"):
        assert json.loads((tmp_path / "config.json").read_text())[key] == want[key]
    with pytest.raises(ValueError, match="store or hub"):
        build().save(str(tmp_path), "onnx")


def test_the_hubs_layout_without_safetensors_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not there
    for do in (lambda: GPT.load(str(FIXTURES / "hub_format" / "sink_bigram")), lambda: build().save(str(tmp_path), "hub")):
        with pytest.raises(ValueError, match="pip install -r requirements-extra.txt") as e:
            do()
        assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_of_links_and_several_files_is_one_model(tmp_path):
    safe = pytest.importorskip("safetensors.torch")
    model = build()
    model.save(str(tmp_path / "whole"), "hub")
    state = safe.load_file(tmp_path / "whole" / "model.safetensors")
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir(), blobs.mkdir()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for i, (name, part) in enumerate(parts.items()):
        safe.save_file(part, blobs / str(i))
        (snapshot / name).symlink_to(blobs / str(i))
    (snapshot / "config.json").symlink_to(tmp_path / "whole" / "config.json")
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    idx = tokens(model)
    assert torch.equal(GPT.load(str(snapshot))(idx)[0], model(idx)[0])
    before = weights_hash(str(snapshot))
    (blobs / "1").write_bytes((blobs / "0").read_bytes())
    assert weights_hash(str(snapshot)) != before
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        GPT.load(str(snapshot))


def test_the_hash_is_that_of_the_weights_file(layout, tmp_path):
    build().save(str(tmp_path), layout)
    assert weights_hash(str(tmp_path)) == hashlib.sha256((tmp_path / WEIGHTS[layout]).read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_floats(dtype, layout, tmp_path):
    model = build()
    model.load_weights({n: p.to(dtype) for n, p in model.state_dict().items()})  # what that precision can hold
    model.save(str(tmp_path), layout)
    if layout == "hub":
        safe = pytest.importorskip("safetensors.torch")
        state = safe.load_file(tmp_path / WEIGHTS[layout])
        safe.save_file({n: p.to(dtype) for n, p in state.items()}, tmp_path / WEIGHTS[layout])
    else:
        torch.save({n: p.to(dtype) for n, p in model.state_dict().items()}, tmp_path / WEIGHTS[layout])
    again, idx = GPT.load(str(tmp_path)), tokens(model)
    assert {p.dtype for p in again.state_dict().values()} == {torch.float32}
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_weights_of_another_layout_in_memory_are_made_plain(tmp_path):
    model = build()
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous().T
    again = GPT.load(write(tmp_path, asdict(model.config), state))
    assert again.lm_head.weight.is_contiguous() and torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_file_of_an_old_pytorch_is_read(tmp_path):
    model = build()
    model.save(str(tmp_path))
    torch.save(model.state_dict(), tmp_path / "final_model.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(GPT.load(str(tmp_path)).bigram_table, model.bigram_table)


def test_one_of_two_tied_tensors_is_enough(tmp_path):
    model = build(EVERY_OPTION)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        state = model.state_dict()
        del state[name]
        again = GPT.load(write(tmp_path, asdict(model.config), state))
        assert torch.equal(again.transformer.wte.weight, model.lm_head.weight)
        assert again.lm_head.weight is again.transformer.wte.weight


def test_a_loaded_model_can_be_trained_and_its_file_stays_as_it_is(layout, tmp_path):
    build().save(str(tmp_path), layout)
    before = weights_hash(str(tmp_path))
    model, other = GPT.load(str(tmp_path)), GPT.load(str(tmp_path))
    assert all(p.requires_grad for p in model.parameters())
    model(tokens(model), tokens(model))[1].backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert weights_hash(str(tmp_path)) == before


def test_a_loaded_model_outlives_its_file(layout, tmp_path):
    build().save(str(tmp_path), layout)
    model = GPT.load(str(tmp_path))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    again = GPT.load(str(tmp_path))
    build().save(str(tmp_path), layout)
    assert all(torch.equal(p, before[n]) for n, p in again.state_dict().items())
    (tmp_path / WEIGHTS[layout]).unlink()
    assert all(torch.equal(p, before[n]) for n, p in again.state_dict().items())


def test_load_weights_copies(tmp_path):
    model, state = build(), build().state_dict()
    model.load_weights(state)
    kept = model.lm_head.weight.clone()
    state["lm_head.weight"].zero_()
    assert torch.equal(model.lm_head.weight, kept) and kept.any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_loading_reads_no_weights_before_they_are_used(tmp_path):
    build(vocab_size=4000).save(str(tmp_path))  # a bigram table of 64 MB
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from model import GPT
GPT.load({str(FIXTURES / "published_format" / "sink_bigram")!r})  # whatever comes with the first
pages = lambda: int(open("/proc/self/statm").read().split()[1])  # resident, of mostly 4 KB
before = pages()
model = GPT.load({str(tmp_path)!r})
print(pages() - before)
assert model.bigram_table.sum() != 0
print(pages() - before)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded, used = map(int, out.split())
    assert loaded < used / 3


def test_truncated_weights_are_one_line(layout, tmp_path, seed):
    build().save(str(tmp_path), layout)
    whole = (tmp_path / WEIGHTS[layout]).read_bytes()
    for size in (0, 1, 10, random.Random(seed).randrange(11, len(whole)), len(whole) // 2, len(whole) - 1):
        (tmp_path / WEIGHTS[layout]).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=WEIGHTS[layout]) as e:
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


def test_sinusoidal_positions_are_not_trained_and_tell_every_position_apart(tmp_path):
    model = GPT(EVERY_OPTION)
    model.save(str(tmp_path))
    assert not model.transformer.wpe.weight.requires_grad
    assert not GPT.load(str(tmp_path)).transformer.wpe.weight.requires_grad
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
