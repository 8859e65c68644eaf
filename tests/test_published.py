"""tools/published.py: files built as the authors' are become circuits that circuit_file.py, view.py and validate.py take."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import validate
from case import CaseConfig, case_of
from circuit import FINAL, ablate, graph_of
from circuit_file import circuit_of, read_circuit
from model import record
from prune import node_means
from tasks import calibrated, last_logits, loss_of, margin_of, margins
from tools import published
from toy import CIRCUIT, TOY, TOY_EDGES, Digits, kept_of, one_thread, random_model, toy_pairs, toy_setup  # noqa: F401
from view import nodes_path, read_nodes, render

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
WITH_FINAL = {**CIRCUIT, FINAL: [2, 3]}


def viz_of(model, nodes: dict, classes=None, **importances) -> dict:
    """What the authors' viewer would be given of these nodes."""
    pairs = toy_pairs(8, "heldout").prompts()
    first, second = classes or (pairs[0::2], pairs[1::2])
    docs = first + second
    T = max(map(len, docs))
    ids = torch.tensor([doc + [0] * (T - len(doc)) for doc in docs])
    seen = {}
    model(ids, nodes=record(seen))
    matrices = []
    for (a, b), wires in graph_of(model).wires.items():  # all, also those between no nodes
        sources, targets = nodes.get(a, []), nodes.get(b, [])
        matrix = torch.zeros(len(sources), len(targets))
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                place = wires.place(source, target)
                matrix[i, j] = 0 if place is None else wires.weight[place]
        matrices.append([matrix, list(sources), list(targets), (a, b)])
    acts = {s: {c: seen[s][..., c] for c in cs} for s, cs in nodes.items()}
    samples = {s: {torch.tensor(c): {q: ([(ids[0], x[0], torch.tensor(1))], [(ids[1], x[1], torch.tensor(0))])
                                     for q in (0.001, 0.5)} for c, x in of_site.items()} for s, of_site in acts.items()}
    return {
        "circuit_data": {s: torch.tensor(nodes.get(s, []), dtype=torch.int64) for s in (*model.sites, *nodes)},
        "importances": {"loss": torch.tensor(0.02), "interv_loss": 0.3, "task_samples": (ids, acts),
                        "pair_data": matrices, **importances},
        "samples": samples,
    }


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with the toy's model and data; `run` writes a viz_data.pt and converts it."""
    monkeypatch.setattr("tasks.TASKS", {"toy": TOY})
    monkeypatch.setattr(published, "TASKS", {"toy": TOY})
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    model, _, means = toy_setup(tmp_path)

    def run(viz, *args: str) -> dict:
        torch.save(viz, tmp_path / "viz_data.pt")
        options = [f"--viz={tmp_path / 'viz_data.pt'}", f"--model={tmp_path}", f"--data={tmp_path}", "--mean_tokens=2048"]
        assert published.main([*options, *args]) == 0
        return read_circuit(str(tmp_path / "circuit.json"))

    return SimpleNamespace(folder=tmp_path, model=model, means=means, run=run, path=tmp_path / "circuit.json")


def test_nodes_edges_and_halved_losses_are_those_of_the_file(toy):
    content = toy.run(viz_of(toy.model, CIRCUIT), "--task=toy")
    assert content["nodes"] == CIRCUIT and content["edges"] == TOY_EDGES
    assert content["loss"] == 0.15 and content["unpruned_loss"] == pytest.approx(0.01)
    assert content["answers"] == ["2", "3"] and content["task"] == "toy"
    assert content["means"] == {s: [round(x, 6) for x in m.tolist()] for s, m in toy.means.items()}
    assert len(content["examples"]) == 12 and content["heads"] == [[0, 0, None]]  # it has no sink
    assert ["".join(e["tokens"]) for e in content["examples"]] == \
        ["".join(map(str, ids)) for ids in toy_pairs(6, "heldout").prompts()]
    assert "controls" not in content["validation"] and "toy" in render(content, "")


def test_validate_measures_what_the_file_states(toy):
    for nodes in (CIRCUIT, WITH_FINAL):
        content = toy.run(viz_of(toy.model, nodes), "--task=toy")
        cfg = CaseConfig(circuit=str(toy.path), data=str(toy.folder))
        case = case_of(cfg, content)
        card = validate.lines_of(case, content["validation"], lambda text: None)
        assert card["sufficiency"] == pytest.approx(content["loss_heldout"], abs=1e-5)
        assert card["sufficiency"] < card["necessity"]


def test_where_final_resid_is_named_its_other_channels_are_held(toy):
    content = toy.run(viz_of(toy.model, WITH_FINAL), "--task=toy")
    circuit, constants = circuit_of(content, toy.model)
    assert kept_of(circuit.mask) == WITH_FINAL and content["n_nodes"] == 5
    seen = {}
    pairs = toy_pairs(20)
    logits = last_logits(toy.model, pairs, lambda site, x: record(seen)(site, ablate(circuit.mask, constants)(site, x)))
    others = [i for i in range(toy.model.config.d_model) if i not in WITH_FINAL[FINAL]]
    assert (seen[FINAL][..., others] == constants[FINAL][others]).all()
    assert seen[FINAL][..., 3].std() > 0
    # the mean is that of the data, and without final_resid the same circuit is another
    mean = node_means(toy.model, str(toy.folder / "train.bin"), 2048, 0, sites=[FINAL])[FINAL]
    torch.testing.assert_close(constants[FINAL], mean, atol=1e-6, rtol=0)
    del circuit.mask[FINAL]
    assert not torch.allclose(margin_of(logits, pairs), margins(toy.model, pairs, ablate(circuit.mask, constants)))
    # on its page and in its file the answers read from there alone
    assert {channel for _, _, channel, _ in content["unembedding"]} <= {2, 3}
    assert all(len(e["activations"][FINAL]) == 2 for e in content["examples"])


def test_a_task_that_we_do_not_know_is_read_off_the_published_prompts(toy):
    content = toy.run(viz_of(toy.model, CIRCUIT), "--task=closing_things")
    assert content["task"] == "closing_things" and content["answers"] == ["2", "3"]
    assert content["validation"]["heldout_pairs"] == 8
    assert toy.run(viz_of(toy.model, CIRCUIT))["task"] == toy.folder.name  # the folder's


def test_the_folders_of_the_authors_store_name_the_task(toy):
    assert published.name_in("/viz/csp_yolo2/toy_beeg3/prune_v4/k_optim/viz_data.pt") == "toy"
    assert published.name_in("/viz/csp_yolo2/other/prune_v4/64/viz_data.pt") == "64"


@pytest.mark.parametrize("task", ["toy", "unknown"])
def test_the_order_of_the_classes_does_not_matter(toy, task):
    prompts = toy_pairs(8, "heldout").prompts()
    contents = [toy.run(viz_of(toy.model, CIRCUIT, classes), f"--task={task}")
                for classes in ((prompts[0::2], prompts[1::2]), (prompts[1::2], prompts[0::2]))]
    for content in contents:
        assert all(e["p_answer_unpruned"] > 0.5 for e in content["examples"])
    if task == "toy":
        assert contents[0]["examples"] == contents[1]["examples"]


def test_the_authors_means_are_taken_from_their_file(toy, capsys):
    means = {s: torch.randn(1, 1, len(m)) for s, m in toy.means.items()}
    torch.save(means, toy.folder / "means.pt")
    content = toy.run(viz_of(toy.model, CIRCUIT), "--task=toy", f"--means={toy.folder / 'means.pt'}")
    for site, mean in means.items():
        torch.testing.assert_close(torch.tensor(content["means"][site]), mean.flatten(), atol=1e-6, rtol=0)
    with pytest.raises(SystemExit):  # theirs has no final_resid
        toy.run(viz_of(toy.model, WITH_FINAL), "--task=toy", f"--means={toy.folder / 'means.pt'}")
    assert "0 means of final_resid" in capsys.readouterr().err


def test_what_else_such_files_hold_is_understood(toy):
    viz = viz_of(toy.model, CIRCUIT)
    plain = toy.run(viz, "--task=toy")
    matrices = viz["importances"]["pair_data"]
    for entry in matrices:  # a last source that is a bias, with and without a row of its own
        entry[1] = entry[1] + ["bias"]
        if "act_in" not in entry[3][0]:
            entry[0] = torch.cat([entry[0], torch.ones(1, entry[0].shape[1])])
    viz["importances"]["pair_data"] = [matrices[:2], matrices[2:]]  # a list for each process
    viz["importances"]["beeg_model_config"] = {"n_layer": 1}
    viz["circuit_data"]["prune_config"] = {"lr": 1e-3}
    viz["all_loss"] = [[0, 1.0]]
    del viz["samples"]
    assert toy.run(viz, "--task=toy") == plain
    # impacts of cuts, beside the weights in a table of their own: the weights say which edges there are
    viz["importances"]["pair_data_connections"] = matrices
    viz["importances"]["pair_data"] = [[torch.tensor([[0.1]]), [0], [1], ("0.attn.act_in", "0.attn.v")]]
    assert toy.run(viz, "--task=toy") == plain
    viz["importances"] |= {"pair_data": [], "pair_data_connections": []}
    assert toy.run(viz, "--task=toy") == plain  # none listed: all weights between the nodes


def test_an_edge_that_the_file_leaves_out_is_cut_and_said_so(toy, capsys):
    viz = viz_of(toy.model, CIRCUIT)
    for entry in viz["importances"]["pair_data"]:
        if entry[3] == ("0.attn.v", "0.attn.resid_delta"):
            entry[0] = torch.zeros(1, 1)
    content = toy.run(viz, "--task=toy")
    assert content["edges"] == TOY_EDGES[:1]
    assert "the model has 2 weights" in capsys.readouterr().out


def test_samples_become_examples_around_their_token(toy):
    viz = viz_of(toy.model, CIRCUIT)
    content = toy.run(viz, "--task=toy")
    found = read_nodes(nodes_path(toy.path), content)
    ids, acts = viz["importances"]["task_samples"]
    (node,) = found["nodes"]["0.attn.v"]
    assert node["channel"] == 1 and node["on"] is None
    assert node["mean"] == pytest.approx(toy.means["0.attn.v"][1].item(), abs=1e-6)
    assert [e["quantile"] for e in node["examples"]] == [0.999, 0.5, 0.5, 0.001]
    highest, lowest = node["examples"][0], node["examples"][-1]
    assert highest["tokens"] == [str(i) for i in ids[1].tolist()] and (highest["at"], lowest["at"]) == (0, 1)
    assert highest["activations"] == pytest.approx(acts["0.attn.v"][1][1].tolist(), rel=1e-3)


def test_sizes_of_a_larger_circuit(toy, seed):
    model = random_model(n_layer=3, keep=0.3)
    folder = toy.folder / "larger"
    model.save(str(folder))
    nodes = {s: sorted(torch.randperm(6)[:3].tolist()) for s in model.sites[:21]} | {FINAL: [4]}
    viz = viz_of(model, nodes)
    content = toy.run(viz, "--task=toy", f"--model={folder}")
    n_edges = sum(int((m != 0).sum()) for m, *_ in viz["importances"]["pair_data"])
    assert content["n_nodes"] == 64 and content["n_edges"] == n_edges > 10
    assert kept_of(circuit_of(content, model)[0].mask) == nodes
    heads = {(int(s[0]), c // 3) for s, cs in nodes.items() if s[-2:] in (".q", ".k", ".v") for c in cs}
    assert [head[:2] for head in content["heads"]] == [list(head) for head in sorted(heads)]
    for layer, head, sink in content["heads"]:
        assert sink == pytest.approx(model.transformer.h[layer].attn.attn_imp.sink_logit[head].item(), abs=1e-6)


def spoilt(model, how: str) -> object:
    viz = viz_of(model, CIRCUIT)
    nodes, importances = viz["circuit_data"], viz["importances"]
    if how == "no nodes":
        del viz["circuit_data"]
    elif how == "no loss":
        del importances["interv_loss"]
    elif how == "a list":
        return [1, 2]
    elif how == "other site":
        nodes["7.mlp.post_act"] = torch.tensor([1])
    elif how == "other channel":
        nodes["0.attn.q"] = torch.tensor([99])
    elif how == "no weight":
        importances["pair_data"] = [[torch.ones(1, 1), [0], [2], ("0.attn.act_in", "0.attn.v")]]
    elif how == "no matrix of the model":
        importances["pair_data"] = [[torch.ones(1, 1), [0], [2], ("0.attn.v", "0.mlp.act_in")]]
    elif how == "shape":
        importances["pair_data"] = [[torch.ones(2, 3), [0], [1], ("0.attn.act_in", "0.attn.v")]]
    elif how == "odd":
        importances["task_samples"] = (torch.ones(3, 4), {})
    elif how == "long":
        importances["task_samples"] = (torch.ones(2, 40), {})
    elif how == "token":
        importances["task_samples"] = (torch.full((2, 4), 11), {})
    elif how == "not matrices":
        importances["pair_data"] = [3]
    return viz


BAD = {"no nodes": "'circuit_data'", "no loss": "'interv_loss'", "a list": "no dictionary", "other site": "7.mlp.post_act.1",
       "other channel": "0.attn.q.99", "no weight": "0.attn.act_in.0 to 0.attn.v.2", "no matrix of the model": "no weight",
       "shape": "shape (2, 3)", "odd": "3 prompts", "long": "task_samples", "token": "task_samples", "not matrices": "not built"}


@pytest.mark.parametrize("how", BAD)
def test_a_file_that_does_not_fit_is_one_line_and_nothing_is_written(toy, how, capsys):
    with pytest.raises(SystemExit) as stopped:
        toy.run(spoilt(toy.model, how), "--task=toy")
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and BAD[how] in said.err
    assert not toy.path.exists() and not nodes_path(toy.path).exists()


def test_files_that_are_none_are_one_line(toy, capsys):
    (toy.folder / "x.pt").write_bytes(b"PK\x03\x04 nothing")
    for args, word in (([f"--viz={toy.folder / 'x.pt'}", f"--model={toy.folder}"], "x.pt"),
                       ([f"--viz={toy.folder / 'no.pt'}", f"--model={toy.folder}"], "no.pt"),
                       ([f"--viz={toy.folder / 'x.pt'}"], "--model")):
        with pytest.raises(SystemExit) as stopped:
            published.main(args)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and word in said
    assert json.loads((Path(toy.folder) / "beeg_config.json").read_text())["n_layer"] == 1


def test_the_losses_of_the_published_prompts_are_measured_beside_the_published_ones(toy):
    prompts = toy_pairs(5, "train")
    classes = prompts.prompts()[0::2], prompts.prompts()[1::2]
    content = toy.run(viz_of(toy.model, CIRCUIT, classes), "--task=toy")
    was = content["validation"]["published"]
    whole = margins(toy.model, prompts)
    assert ["".join(e["tokens"]) for e in content["examples"]] == ["".join(map(str, ids)) for ids in prompts.prompts()]
    assert was["prompts"] == 10 and was["unpruned_loss_measured"] == pytest.approx(loss_of(whole), abs=1e-6)
    assert was["loss"] == 0.15 and 0 < was["loss_measured"] < 0.69
    # the logits are calibrated: any other scale or shift is worse on the pairs that they were fitted to
    circuit, constants = circuit_of(content, toy.model)
    fit = margins(toy.model, toy_pairs(256), ablate(circuit.mask, constants))
    best = loss_of(calibrated(fit, circuit.scale, circuit.shift))
    for scale, shift in ((1.2, 0), (0.8, 0), (1, 0.2), (1, -0.2)):
        assert loss_of(calibrated(fit, circuit.scale * scale, circuit.shift + shift)) > best
