"""tools/inspect.py: what is written is what the nodes see, and its examples are the highest and lowest there are."""
import inspect as stdlib_inspect
import json
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from circuit_file import read_circuit, write_circuit
from model import record
from tokens import random_windows
from tools import inspect
from toy import EVERY_SITE, Digits, one_thread, random_model, toy_circuit  # noqa: F401
from view import nodes_path, read_nodes

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
PROMPTS = ["0123", "45678901", "9"]


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())


@pytest.fixture
def saved(tmp_path, digits):
    """A random model in a directory, with prompts beside it."""
    model = random_model(n_layer=2, afrac=0.5, afrac_loctypes=EVERY_SITE, d_pos_emb=2)
    model.save(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return model, tmp_path


def run(folder: Path, *args: str):
    assert inspect.main([f"--model={folder}", f"--prompts={folder / 'prompts.txt'}", *args]) == 0
    return np.load(folder / "activations.npz")


def refused(capsys, word: str, *args: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        inspect.main(list(args))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and word in said.err


def test_every_site_is_what_the_model_sees_of_each_prompt_alone(saved):
    model, folder = saved
    held = run(folder)
    assert held["lengths"].tolist() == [4, 8, 1]
    for i, prompt in enumerate(PROMPTS):
        seen = {}
        ids = [int(c) for c in prompt]
        model(torch.tensor([ids]), nodes=record(seen))
        T = len(ids)
        assert held["ids"][i].tolist() == ids + [-1] * (8 - T)
        assert held["tokens"][i].tolist() == list(prompt) + [""] * (8 - T)
        assert held["positions"][i].tolist() == list(range(T)) + [-1] * (8 - T)
        for site, x in seen.items():
            np.testing.assert_allclose(held[site][i, :T], x[0], atol=1e-6)
            assert np.isnan(held[site][i, T:]).all()
    assert set(held) == {"ids", "tokens", "lengths", "positions", *seen}


def test_sites_and_positions_are_chosen(saved):
    _, folder = saved
    whole = {key: value for key, value in run(folder).items()}
    held = run(folder, "--sites=*.attn.q,final_resid,1.mlp.post_act", "--positions=-1,0")
    assert [key for key in held if "." in key or "resid" in key] == ["0.attn.q", "1.attn.q", "1.mlp.post_act", "final_resid"]
    assert held["positions"].tolist() == [[3, 0], [7, 0], [0, 0]]
    for site in ("1.attn.q", "final_resid"):
        for i, at in enumerate(held["positions"]):
            assert (held[site][i] == whole[site][i, at]).all()
    assert run(folder, "--positions=last")["positions"].tolist() == [[3], [7], [0]]


def test_prompts_are_lines_of_text_or_json(saved):
    class Letters(Digits):
        def encode_ordinary(self, text):
            return ["ab\n\t\\".index(c) for c in text]

    _, folder = saved
    expected = [[0, 2, 1], [4, 0, 3]]
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa\\nb\r\n\n\\\\a\\t")
    lines = ['{"prompt": "a\\nb"}', '', '{"prompts": [[4, 0, 3]], "answers": ["x"]}']
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "c.jsonl").write_text('"a\\nb"\n[4, 0, 3]\n')
    for name in ("a.txt", "b.jsonl", "c.jsonl"):
        assert inspect.read_prompts(str(folder / name), Letters(), 8) == expected


BAD = {
    "01\n0\\d": "line 2: \\d is not",
    "": "holds no prompt",
    "012345678": "line 1",                     # nine tokens
    b"0\n\xff": "line 2",
    '{"prompt": 3}': "a text or a list",
    '{"text": "0"}': "neither",
    '{"prompt": "0"': "line 1",
    '\n{"prompt": [99]}': "line 2",
    '{"prompts": [[true]]}': "a text or a list",
    '{"prompt": ""}': "empty",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_prompt_is_one_line_that_names_it(text, saved, capsys):
    _, folder = saved
    path = folder / ("bad.jsonl" if "{" in str(text) else "bad.txt")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(capsys, BAD[text], f"--model={folder}", f"--prompts={path}")
    assert not (folder / "activations.npz").exists()


def test_other_bad_input_is_one_line(saved, capsys, monkeypatch):
    _, folder = saved
    good = (f"--model={folder}", f"--prompts={folder / 'prompts.txt'}")
    refused(capsys, "'1.attn.q'", *good, "--sites=0.attn.k,1.attn.qq")
    refused(capsys, "prompt 3 has 1 token", *good, "--positions=1")
    refused(capsys, "not 'first'", *good, "--positions=first")
    refused(capsys, "nowhere", *good, f"--out={folder}/nowhere/x.npz")
    refused(capsys, "cannot read", good[0], f"--prompts={folder}")
    refused(capsys, "either", good[0])
    refused(capsys, "either", *good, "--circuit=circuit.json")
    refused(capsys, "--model", good[1])
    full = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(inspect.shutil, "disk_usage", lambda path: full)
    refused(capsys, "room for 0.00", *good)
    assert not (folder / "activations.npz").exists()


def test_the_standard_library_has_its_own_inspect():
    assert stdlib_inspect is not inspect and not stdlib_inspect.__file__.startswith(os.path.dirname(inspect.__file__))


# --- what turns nodes on ----------------------------------------------------------------------

@pytest.fixture
def data(tmp_path):
    np.random.default_rng(0).integers(0, 10, 3000).astype("<u2").tofile(tmp_path / "val.bin")
    return str(tmp_path / "val.bin")


NODES = {"0.attn.act_in": [0, 4], "0.attn.q": [5], "0.mlp.post_act": [1, 2, 3], "0.mlp.resid_delta": [2]}


def test_means_and_shares_and_extremes_are_those_of_all_tokens(data):
    model = random_model(afrac=0.5, afrac_loctypes=EVERY_SITE, bias=True)
    found = inspect.describe(model, Digits(), NODES, data, 2000, 8, 3)

    seen, windows = {}, torch.cat(list(random_windows(data, 10, 8, 2000, 3)))
    model(windows, nodes=record(seen))
    texts = ["".join(map(str, ids)) for ids in windows.tolist()]
    for site, channels in NODES.items():
        assert [node["channel"] for node in found[site]] == channels
        for node in found[site]:
            x = seen[site][..., node["channel"]]
            assert node["mean"] == pytest.approx(x.mean().item(), abs=1e-5)
            assert node["on"] == pytest.approx((x != 0).float().mean().item(), abs=1e-6)
            lit = x[x != 0]
            places = {text for text, row in zip(texts, x) if (row != 0).any()}
            shown = [(e["quantile"], e["activations"][e["at"]]) for e in node["examples"]]
            assert shown == sorted(shown, reverse=True)
            if not places:
                assert not shown
                continue
            assert shown[0] == (1, pytest.approx(lit.max().item(), rel=1e-3))
            assert shown[-1] == (0, pytest.approx(lit.min().item(), rel=1e-3))
            for quantile, value in shown:  # of a sample of 256
                if 0 < quantile < 1:
                    slack = 1e-3 * abs(value)  # four digits; and many values are equal, so small is the model
                    assert (lit < value - slack).float().mean() < quantile + 0.15
                    assert (lit <= value + slack).float().mean() > quantile - 0.15
            for quantile in (0, 1):
                assert sum(q == quantile for q, _ in shown) == min(inspect.SHOWN, len(places))


def test_an_example_is_the_text_and_the_activations_around_its_token(data):
    model = random_model(afrac=0.5, afrac_loctypes=EVERY_SITE, bias=True)
    (node,) = inspect.describe(model, Digits(), {"0.mlp.resid_delta": [2]}, data, 800, 8, 0)["0.mlp.resid_delta"]
    seen, windows = {}, torch.cat(list(random_windows(data, 10, 8, 800, 0)))
    model(windows, nodes=record(seen))
    texts = ["".join(map(str, ids)) for ids in windows.tolist()]
    for example in node["examples"]:
        text = "".join(example["tokens"])  # a whole window of 8 tokens, or as many as fit
        rows = [i for i, window in enumerate(texts) if window.startswith(text)]
        assert rows and 0 <= example["at"] < len(text) >= min(8, example["at"] + 1 + inspect.AFTER)
        x = seen["0.mlp.resid_delta"][rows[0], : len(text), 2]
        np.testing.assert_allclose(example["activations"], x, rtol=1e-3, atol=1e-6)


def test_no_text_is_shown_twice(tmp_path):
    np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], dtype="<u2").tofile(tmp_path / "nine.bin")  # two windows of 8 tokens
    model = random_model()
    (node,) = inspect.describe(model, Digits(), {"0.attn.q": [2]}, str(tmp_path / "nine.bin"), 800, 8, 0)["0.attn.q"]
    for quantile in (0, 1):
        texts = ["".join(e["tokens"]) for e in node["examples"] if e["quantile"] == quantile]
        assert 1 <= len(texts) == len(set(texts)) <= 2


def test_a_node_that_is_never_on_has_no_example(data):
    model = random_model()
    model.transformer.h[0].mlp.c_proj.weight[2] = 0
    (node,) = inspect.describe(model, Digits(), {"0.mlp.resid_delta": [2]}, data, 400, 8, 0)["0.mlp.resid_delta"]
    assert node == {"channel": 2, "mean": 0, "on": 0, "examples": []}


def test_what_is_kept_does_not_grow_with_the_data(data):
    model, watch = random_model(), inspect.Watch([0, 1])
    sizes = []
    for ids in random_windows(data, 10, 8, 20000, 0):
        seen = {}
        model(ids, nodes=record(seen))
        watch.see(seen["0.attn.q"], ids, torch.rand(ids.shape))
        sizes.append(sum(best.values.numel() for best in (watch.highest, watch.lowest, watch.sample)))
    context = inspect.BEFORE + 1 + inspect.AFTER
    assert max(sizes) == sizes[-1] == 2 * context * (2 * inspect.ROOM + inspect.SAMPLE) and len(sizes) > 50


def test_the_command_writes_what_the_page_reads_beside_the_circuit(tmp_path, digits, data, capsys):
    _, _, content = toy_circuit(tmp_path)
    path = str(tmp_path / "circuit.json")
    write_circuit(path, content)
    args = [f"--circuit={path}", f"--data={tmp_path}", "--part=val", "--tokens=500"]
    assert inspect.main(args) == 0
    found = read_nodes(nodes_path(path), read_circuit(path))
    assert {s: [n["channel"] for n in nodes] for s, nodes in found["nodes"].items()} == content["nodes"]
    assert found["window"] == 8 and found["tokens"] == 500

    before = nodes_path(path).read_bytes()
    capsys.readouterr()
    random_model().save(str(tmp_path / "other"))
    refused(capsys, "not those", *args, f"--model={tmp_path / 'other'}")
    refused(capsys, "train.bin", *args[:1], f"--data={tmp_path / 'other'}")
    (tmp_path / "circuit.json").write_text(json.dumps(content)[:-9])
    refused(capsys, "not JSON", *args)
    assert nodes_path(path).read_bytes() == before
