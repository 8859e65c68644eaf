"""tools/formation.py: a run made by hand, of which it is known at which step each edge came and what it does."""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from circuit import Circuit, all_edges
from circuit_file import write_circuit
from config import parse, to_toml
from masks import Gates, first_taus
from model import GPT
from prune import PruneConfig
from tasks import Pairs, load_pairs, loss_of, margins
from test_view import make_circuit, needs_browser
from test_view_browser import seen_on
from tools import formation, formation_result, formation_steps
from toy import (CIRCUIT, TOY, TOY_EDGES, Digits, all_nodes, hand_made, nats, one_thread, plain_margins, random_model,  # noqa: F401
                 toy_circuit, toy_pairs)
import train
from test_train import argv, write_data
from train import TrainConfig
from view import as_data, page

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
ROOT = Path(__file__).resolve().parent.parent
STEPS = (10, 20, 30, 40)
READ, WRITE = ("0.attn.act_in", 0, "0.attn.v", 1), ("0.attn.v", 1, "0.attn.resid_delta", 3)


# --- a run made by hand -----------------------------------------------------------------------

def models() -> dict[int, GPT]:
    """At step 10 nothing is read, at 20 it is read and not written, at 30 it is, and at the end as well."""
    found = {step: hand_made() for step in STEPS}
    for step, read, write in ((10, 0.0, 0.5), (20, 2.0, 0.0), (30, 0.4, 1.5)):
        attn = found[step].transformer.h[0].attn
        attn.c_attn.weight[12 + 1, 0], attn.c_proj.weight[3, 1] = read, write
    found[30].transformer.h[0].attn.c_attn.weight[12, 1] = -0.5  # the one other weight of this matrix
    return found


def made_run(folder: Path) -> Path:
    """A run's directory: four models, settings, a log, a final circuit."""
    folder.mkdir(exist_ok=True)
    settings = TrainConfig(out_dir=str(folder), max_steps=40, density=0.03, lr=0.5, block_size=8, keep_every=10)
    (folder / "train.toml").write_text(to_toml(settings))
    log = [{"step": step, "train_loss": 2.0} for step in range(5, 41, 5)]
    log[3]["val_loss"] = {"idioms": 1.5, "step": 2.5}
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    for step, model in models().items():
        model.save(str(folder / f"step_{step:06d}"))
    _, _, content = toy_circuit(folder, models()[40], minimal=True, heldout_pairs=40, steps=60)
    assert content["edges"] == TOY_EDGES
    write_circuit(str(folder / "toy" / "circuit.json"), content)
    return folder


def patched(monkeypatch) -> None:
    monkeypatch.setattr("tasks.TASKS", {"toy": TOY})
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, measured once: its folder and formation.json."""
    monkeypatch = pytest.MonkeyPatch()
    patched(monkeypatch)
    folder = made_run(tmp_path_factory.mktemp("whole") / "run")
    found = measured(folder)
    monkeypatch.undo()
    return folder, found


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A run that is still to be measured; what `fakes` stand for is not."""
    patched(monkeypatch)
    return made_run(tmp_path / "run")


def command(folder: Path, *args: str) -> list[str]:
    return [f"--run={folder}", "--task=toy", f"--data={folder}", "--jobs=1", "--search_pairs=12", "--mask_steps=60", "--controls=1", *args]


def measured(folder: Path, *args: str) -> dict:
    assert formation.main(command(folder, *args)) == 0
    return json.loads((folder / "toy" / "formation" / "formation.json").read_text())


def fakes(monkeypatch) -> list:
    """In place of what takes time: circuits of known nodes; every call is noted."""
    calls = []

    def circuit_at(study, step, neighbour):
        calls.append((step, neighbour))
        circuit = None
        if step > 10:
            listed = {**CIRCUIT, "0.attn.q": [step // 10]}
            circuit = {"nodes": listed, "edges": TOY_EDGES[: 1 + (step > 20)], "n_nodes": 4, "n_edges": 1 + (step > 20),
                       "loss_heldout": 0.25, "costs": {"0": 0.5}, "embedding": [], "unembedding": []}
        return {"whole": {"loss_calibrated": 1 / step, "bigram_loss": 0.7}, "circuit": circuit, "why": "" if circuit else "none"}

    def edges_at(study, step):
        calls.append(step)
        return {"edges": [{"weight": 1.0, "rank": 1, "entries": 36, "cost": 0.0} for _ in study.edges], "alone": 0.5, "without": 0.6}

    def control(study, seed):
        calls.append(f"seed {seed}")
        return {"seed": seed, "n_nodes": 3, "n_edges": 2, "loss_heldout": 0.2, "overlap": {"nodes": 1.0, "edges": 0.5}}

    for name, fake in (("circuit_at", circuit_at), ("edges_at", edges_at), ("control", control)):
        monkeypatch.setattr(formation, name, fake)
    monkeypatch.setattr(formation, "plot", lambda content, path: None)
    return calls


# --- what is found of each step and edge --------------------------------------------------------

def test_the_steps_of_a_run_made_by_hand(whole):
    folder, found = whole
    rows = {row["step"]: row for row in found["steps"]}
    assert list(rows) == list(STEPS) and found["task"] == "toy" and found["target_loss"] == 0.4
    heldout = load_pairs(TOY, Digits(), 40, "heldout", 8, 0)
    for step, model in models().items():
        assert rows[step]["whole"]["loss"] == pytest.approx(loss_of(margins(model, heldout)), abs=1e-6)
        assert rows[step]["val_loss"] == ({"idioms": 1.5, "step": 2.5} if step == 20 else None)
    assert found["validation"] == [{"step": 20, "val_loss": {"idioms": 1.5, "step": 2.5}}]

    # where the path is open, and only there, is there a circuit: the final one
    for step in (10, 20):
        assert rows[step]["circuit"] is None and "misses the target" in rows[step]["why"]
        assert rows[step]["final_alone"] == pytest.approx(math.log(2), abs=0.01)
        assert rows[step]["overlap"] is None and rows[step]["changes"] is None
    for step in (30, 40):
        assert rows[step]["circuit"]["nodes"] == CIRCUIT and rows[step]["why"] == ""
        assert rows[step]["overlap"] == {"nodes": 1.0, "edges": 1.0, "held": 1.0}
        assert rows[step]["final_alone"] < 0.4 < math.log(2) < rows[step]["without_final"]
        assert rows[step]["circuit"]["loss_heldout"] == pytest.approx(rows[step]["final_alone"], abs=0.01)
        assert rows[step]["circuit"]["certified"] and rows[step]["circuit"]["unembedding"] == [[2, "2", 3, 0.8], [3, "3", 3, -0.8]]
    assert [rows[step]["inherited"] for step in STEPS] == [False, False, True, False]
    assert [edge[4] for edge in rows[30]["circuit"]["edges"]] == [pytest.approx(0.4), 1.5]  # weights of that step
    assert rows[40]["circuit"]["edges"] == TOY_EDGES
    assert rows[30]["changes"] is None
    assert rows[40]["changes"] == {"nodes": {"new": [], "kept": 3, "gone": []}, "edges": {"new": [], "kept": 2, "gone": []}}
    assert found["summary"] == {"anneal_end": 20, "model_solves": 30, "final_alone_first": 30, "final_alone": 30, "overlaps_as_controls": 30}

    # the last one is the circuit that people have, to its loss
    circuit = json.loads((folder / "toy" / "circuit.json").read_text())
    assert rows[40]["circuit"]["loss_heldout"] == pytest.approx(circuit["loss_heldout"], abs=1e-6)
    assert [c["overlap"] for c in found["controls"]] == [{"nodes": 1.0, "edges": 1.0, "held": 1.0}]
    assert found["cold"]["step"] == 20 and "misses the target" in found["cold"]["why"] and found["cold"]["overlap"] is None


def test_the_edges_of_a_run_made_by_hand(whole):
    read, write = whole[1]["edges"]
    assert (tuple(read["edge"]), tuple(write["edge"])) == (READ, WRITE)
    assert read["weight"] == pytest.approx([0, 2, 0.4, 2]) and write["weight"] == [0.5, 0, 1.5, 2]
    # 36 x 6 weights of queries, keys and values in one matrix; of two of them one is 0.5, and at 30 larger
    assert read["rank"] == [None, 1, 2, 1] and read["entries"] == 18 * 6
    assert write["rank"] == [1, None, 1, 1] and write["entries"] == 36
    assert (read["zero_at"], read["nonzero_since"]) == ([10], 20) and (write["zero_at"], write["nonzero_since"]) == ([20], 30)
    # 3 of 108 and 1 of 36 are left in the end
    assert read["leading_since"] == 20 and write["leading_since"] == 30
    for row in (read, write):
        assert row["cost"][:2] == pytest.approx([0, 0], abs=1e-6) and min(row["cost"][2:]) > 0.1
        assert row["mattered_first"] == row["in_circuit_since"] == 30
        assert row["cost_in_circuit"][:2] == [None, None] and min(row["cost_in_circuit"][2:]) > 0.1


def test_cutting_an_edge_alone_is_what_it_is_by_hand():
    model = random_model(n_layer=2, afrac=0.5, keep=0.6, bias=True, d_pos_emb=2)
    means = {site: torch.randn(model.config.site_width(site)) for site in model.sites}
    pairs = toy_pairs(20, "heldout")
    every = all_edges(model)
    edges = []
    for (a, b), kept in every.items():
        wires = formation_steps.graph_of(model).wires[a, b]
        for n in random.sample(range(len(kept)), 3):
            edges.append((a, int(wires.source[n]), b, int(wires.to[n])))
    found = formation_steps.costs_of_cuts(model, means, edges, pairs)
    before = nats(margins(model, pairs))
    for (a, j, b, i), cost in zip(edges, found, strict=True):
        less = {ends: kept.clone() for ends, kept in every.items()}
        less[a, b][formation_steps.graph_of(model).wires[a, b].place(j, i)] = False
        # all nodes are in, so nothing is held but what is cut
        after = nats(plain_margins(model, all_nodes(model), less, means, pairs))
        assert cost == pytest.approx(after - before, abs=1e-5)
    assert max(map(abs, found)) > 1e-3


def test_cuts_of_many_batches_are_those_of_one(monkeypatch):
    model = random_model(n_layer=2)
    means = {site: torch.randn(model.config.site_width(site)) for site in model.sites}
    pairs = toy_pairs(20, "heldout")
    edges = [("1.attn.act_in", 0, "1.attn.v", 1), ("0.mlp.act_in", 2, "0.mlp.post_act", 3)]
    at_once = formation_steps.costs_of_cuts(model, means, edges, pairs)
    monkeypatch.setattr(formation_steps, "fitting_batches", lambda model, pairs: [pairs.take(torch.arange(7)), pairs.take(torch.arange(7, 20))])
    assert formation_steps.costs_of_cuts(model, means, edges, pairs) == pytest.approx(at_once, abs=1e-6)


def test_the_bigram_table_alone_and_its_share_of_the_margin():
    """One prompt in which the table is right by 2 and one in which it is wrong by 1; the rest of the model adds 2 to both.
    No share, where the model has no margin: both prompts end alike."""
    model = random_model(std=0.0, enable_bigram_table=True)
    model.final_logits_bias[2], model.final_logits_bias[3] = 0.0, 0.0
    for token, right, wrong, by in ((4, 2, 3, 1.0), (5, 3, 2, -0.5)):
        model.bigram_table[token, right], model.bigram_table[token, wrong] = by, -by
    model.transformer.ln_f.weight.fill_(1.0)
    model.transformer.wte.weight[4], model.transformer.wte.weight[5] = 1.0, -1.0
    model.lm_head.weight[2, 0], model.lm_head.weight[3, 0] = 1.0, -1.0
    answer = torch.tensor([2, 3])
    told = Pairs(torch.tensor([[0, 4], [0, 5]]), torch.tensor([1, 1]), answer, answer.flip(0))
    found = formation_steps.whole_model(SimpleNamespace(heldout=told, fit=told), model)
    assert found["margin"] == pytest.approx(2.5, abs=1e-3) and found["bigram_share"] == pytest.approx(0.2, abs=1e-3)
    assert found["bigram_loss"] == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2)
    assert found["loss"] == pytest.approx((math.log1p(math.exp(-4)) + math.log1p(math.exp(-1))) / 2, abs=1e-4)
    alike = replace(told, ids=torch.tensor([[0, 4], [1, 4]]))
    found = formation_steps.whole_model(SimpleNamespace(heldout=alike, fit=alike), model)
    assert found["margin"] == pytest.approx(0) and found["bigram_share"] is None
    assert found["bigram_loss"] == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2)


@pytest.mark.parametrize("tie_qk", [False, True])
def test_masks_begin_wide_open_at_the_nodes_of_the_neighbour(tie_qk):
    model = random_model()
    gates = Gates(model, tie_qk)
    nodes = {("0.attn.k", 2), ("0.mlp.post_act", 5), ("0.attn.act_in", 0)}
    learning = PruneConfig(init_noise_bias=formation_steps.first_bias(gates, nodes), init_noise_scale=0.0)
    tau = first_taus(gates, learning, torch.Generator())
    wide = nodes | ({("0.attn.q", 2)} if tie_qk else set())
    for site, values in gates.split(tau[gates.index]).items():
        for channel, value in enumerate(values.tolist()):
            expected = formation_steps.WIDE_OPEN if (site, channel) in wide else formation_steps.AJAR
            assert value == pytest.approx(expected)


@pytest.fixture
def study(toy):
    """What steps share, of the run made by hand."""
    cfg = parse(formation.FormationConfig, command(toy))
    return formation.study_of(cfg, formation.read_run(str(toy))[2], formation.final_circuit(cfg))


def found_at(study, step: int, nodes: dict, edges: list) -> tuple:
    """Nodes and edges of a step's circuit, whether it is certified, and whether it is the neighbour's."""
    neighbour = formation_steps.parts_in({"nodes": nodes, "edges": edges})
    model, constants = study.load(step)
    circuit, inherited = formation_steps.searched(study, model, constants, neighbour)
    assert circuit.loss <= study.target
    return *formation_steps.parts_found(model, circuit), circuit.certificate is not None, inherited


def test_a_step_keeps_the_circuit_of_its_neighbour_less_what_it_does_not_need(study):
    nodes, edges = formation_steps.parts_in({"nodes": CIRCUIT, "edges": TOY_EDGES})
    assert found_at(study, 30, CIRCUIT, TOY_EDGES) == (nodes, edges, True, True)
    # a path that means nothing, and an edge that the step's model lacks
    wide = {"0.attn.act_in": [0, 1], "0.attn.v": [0, 1], "0.attn.resid_delta": [1, 3]}
    more = [*TOY_EDGES, ["0.attn.act_in", 1, "0.attn.v", 0, 0.5], ["0.attn.v", 0, "0.attn.resid_delta", 1, 0.5],
            ["0.attn.act_in", 0, "0.attn.v", 0, 9.0]]
    assert found_at(study, 30, wide, more) == (nodes, edges, True, True)


def test_a_step_whose_neighbour_does_not_do_learns_masks(study, monkeypatch):
    nodes, edges = formation_steps.parts_in({"nodes": CIRCUIT, "edges": TOY_EDGES})
    half = {"0.attn.act_in": [0], "0.attn.v": [1]}
    assert found_at(study, 30, half, TOY_EDGES[:1]) == (nodes, edges, True, False)
    monkeypatch.setattr(formation_steps, "FEW_PARTS", 0)  # as of a large circuit: without the last passes
    assert found_at(study, 30, half, TOY_EDGES[:1])[2:] == (False, False)
    study.pruning.minimal = False
    assert found_at(study, 30, half, TOY_EDGES[:1])[2:] == (False, False)


def test_the_walk_goes_backward_and_hands_on_the_nodes_it_found(toy, monkeypatch):
    calls = fakes(monkeypatch)
    measured(toy)
    nodes = {(site, channels[0]) for site, channels in CIRCUIT.items()}
    *walked, cold = [call for call in calls if isinstance(call, tuple)]
    assert cold == (20, (set(), set()))  # where the last weights go
    assert walked == [(40, (nodes, {READ, WRITE})), (30, (nodes | {("0.attn.q", 4)}, {READ, WRITE})),
                      (20, (nodes | {("0.attn.q", 3)}, {READ, WRITE})), (10, (nodes | {("0.attn.q", 2)}, {READ}))]
    assert [call for call in calls if isinstance(call, int)] == list(STEPS) and "seed 1" in calls


def test_changes_and_overlap_are_between_neighbours_that_have_a_circuit(toy, monkeypatch):
    fakes(monkeypatch)
    found = measured(toy)
    rows = found["steps"]
    assert found["cold"]["overlap"] == {"nodes": 3 / 4, "edges": 0.5, "held": 0.5} and found["cold"]["step"] == 20 and found["cold"]["n_edges"] == 1
    assert [bool(row["circuit"]) for row in rows] == [False, True, True, True]
    assert rows[1]["changes"] is None
    assert rows[2]["changes"] == {"nodes": {"new": [["0.attn.q", 3]], "kept": 3, "gone": [["0.attn.q", 2]]},
                                  "edges": {"new": [list(WRITE)], "kept": 1, "gone": []}}
    assert rows[1]["overlap"] == {"nodes": 3 / 5, "edges": 0.5, "held": 0.5}
    assert rows[3]["overlap"] == {"nodes": 1.0, "edges": 1.0, "held": 1.0}


def test_since_is_for_good():
    since = formation_result.since
    assert since([1, 2, 3], [True, False, True]) == 3 and since([1, 2, 3], [True] * 3) == 1
    assert since([1, 2, 3], [True, True, False]) is None and since([], []) is None
    assert formation_steps.jaccard({1, 2}, {2, 3}) == 1 / 3 and formation_steps.jaccard(set(), set()) == 1


def test_the_schedule_and_the_kept_steps_are_those_of_training(tmp_path):
    """Density and learning rate of the step that made a model, as train.py writes them into its log."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    data = write_data(tmp_path / "data")
    assert train.main(argv(data, tmp_path / "out", keep_every=4)) == 0
    for number, handler in handlers:
        signal.signal(number, handler)
    cfg, log, folders = formation.read_run(str(tmp_path / "out"))
    assert folders == {4: str(tmp_path / "out" / "step_000004"), 8: str(tmp_path / "out" / "step_000008"), 12: str(tmp_path / "out")}
    assert [entry["step"] for entry in log] == list(range(1, 13))
    for entry in log:
        assert formation_result.schedule_at(cfg, entry["step"]) == pytest.approx({"density": entry["density"], "lr": entry["lr"]})
    assert len({entry["density"] for entry in log}) > 3 and len({entry["lr"] for entry in log}) == 12


# --- what is finished is kept -------------------------------------------------------------------

def test_what_is_finished_is_not_done_again(toy, monkeypatch):
    calls = fakes(monkeypatch)
    first = measured(toy)
    done = len(calls)
    assert done == 10 and measured(toy) == first and len(calls) == done
    assert measured(toy, "--matters=0.2")["matters"] == 0.2 and len(calls) == done  # it is for reading only

    # other weights of one step: that step, and no other, for the circuit found there is the same
    models()[10].save(str(toy / "step_000030"))
    measured(toy)
    assert [call[0] if isinstance(call, tuple) else call for call in calls[done:]] == [30, 30]
    damaged = toy / "toy" / "formation" / "parts" / "edges_000020.json"
    damaged.write_text(damaged.read_text()[:-5])
    done = len(calls)
    assert measured(toy) and calls[done:] == [20]
    done = len(calls)
    assert measured(toy, "--mask_steps=61") and [call[0] for call in calls[done:]] == [40, 30, 20, 10, 20]
    done = len(calls)
    assert measured(toy, "--cut_pairs=9", "--mask_steps=61") and calls[done:] == list(STEPS)
    assert measured(toy, "--controls=2") and "seed 2" in calls


SLOW = """
import sys, time
sys.path[:0] = [ROOT, TESTS]
import pytest
import test_formation
from config import as_script
from tools import formation

monkeypatch = pytest.MonkeyPatch()
test_formation.patched(monkeypatch)
test_formation.fakes(monkeypatch)
quick = formation.circuit_at

def circuit_at(study, step, neighbour):
    if step == 20:
        print("waiting", flush=True)
        time.sleep(60)
    return quick(study, step, neighbour)

formation.circuit_at = circuit_at
if __name__ == "__main__":
    as_script(formation.main)
"""


def test_it_stops_at_once_and_keeps_what_is_finished(toy, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW.replace("ROOT", repr(str(ROOT))).replace("TESTS", repr(str(ROOT / "tests"))))
    process = subprocess.Popen([sys.executable, str(script), *command(toy)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "slow.py: stopped; what was finished is kept\n"
    made = toy / "toy" / "formation"
    assert sorted(path.name for path in made.rglob("*.*")) == ["circuit_000030.json", "circuit_000040.json"]


def test_two_processes_find_what_one_does(toy, tmp_path):
    """By the script, since workers begin from what it imports."""
    script = tmp_path / "slow.py"
    text = SLOW.replace("ROOT", repr(str(ROOT))).replace("TESTS", repr(str(ROOT / "tests"))).replace("sleep(60)", "sleep(0)")
    script.write_text(text)
    for jobs in (1, 2):
        args = [*command(toy), f"--jobs={jobs}", f"--out_dir={tmp_path / str(jobs)}"]
        done = subprocess.run([sys.executable, str(script), *args], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and done.stderr == "", done.stderr
    found = [json.loads((tmp_path / jobs / "formation.json").read_text()) for jobs in "12"]
    assert found[0]["steps"] == found[1]["steps"] and found[0]["edges"] == found[1]["edges"]


# --- bad input ------------------------------------------------------------------------------------

def refused(capsys, folder: Path, word: str, *args: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        formation.main(command(folder, *args))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and word in err, err
    assert sorted(folder.rglob("*")) == before


def test_bad_input_is_one_line_and_nothing_is_written(toy, capsys, monkeypatch):
    calls = fakes(monkeypatch)
    refused(capsys, toy, "nowhere is no run", f"--run={toy}/nowhere")
    refused(capsys, toy, "unknown task 'toys'", "--task=toys")
    refused(capsys, toy, "matters must be above 0", "--matters=0")
    log = (toy / "log.jsonl").read_text()
    (toy / "log.jsonl").write_text(log[:-4])
    refused(capsys, toy, "line 8 is damaged")
    (toy / "log.jsonl").write_text("".join(log.splitlines(True)[:-1]))
    refused(capsys, toy, "step 35 of 40")
    (toy / "log.jsonl").write_text(log)

    final = (toy / "toy" / "circuit.json").read_text()
    (toy / "toy" / "circuit.json").write_text(final[:-9])
    refused(capsys, toy, "not JSON")
    (toy / "toy" / "circuit.json").write_text(final)
    weights = (toy / "final_model.pt").read_bytes()
    models()[20].save(str(toy))
    refused(capsys, toy, "other weights")
    (toy / "final_model.pt").write_bytes(weights)
    weights = (toy / "step_000030" / "final_model.pt").read_bytes()
    (toy / "step_000030" / "final_model.pt").write_bytes(weights[:1000])
    monkeypatch.undo()
    patched(monkeypatch)
    for step in (10, 20, 30):
        (toy / f"step_{step:06d}").rename(toy / f"kept_{step}")
    refused(capsys, toy, "kept no step")
    assert calls == []


def test_a_step_that_is_damaged_is_one_line(toy, capsys):
    weights = toy / "step_000030" / "final_model.pt"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stopped:
        formation.main(command(toy))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "step_000030" in err
    assert not (toy / "toy" / "formation" / "formation.json").exists()


def test_several_runs_end_in_a_table_and_are_all_looked_at_first(toy, tmp_path, monkeypatch, capsys):
    calls = fakes(monkeypatch)
    other = made_run(tmp_path / "other")
    assert formation.main(command(toy, f"--run={toy},{other}")) == 0
    *_, table = capsys.readouterr().out.split("\n\n")
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.M))
    assert rows["the whole model meets the target from step"] == "10 | 10 | 10"
    assert rows["the last weights go at step"] == "20 | 20 | 20" and rows["edges of the final circuit"] == "2 | 2 | 2"
    assert rows["their overlap with those of other mask seeds, the least"] == "0.50 | 0.50 | 0.50"
    assert rows["the final circuit alone first meets the target at step"] == "– | – | –"
    assert rows["the same, searched without a neighbour, %"] == "50 | 50 | 50"
    assert (other / "toy" / "formation" / "formation.html").exists()

    (other / "log.jsonl").unlink()
    (toy / "toy" / "formation" / "formation.json").unlink()
    done = len(calls)
    refused(capsys, toy, "no log.jsonl", f"--run={toy},{other}")
    refused(capsys, toy, "out_dir", f"--run={toy},{toy}", f"--out_dir={tmp_path / 'out'}")
    assert len(calls) == done


def test_the_table_has_medians_and_ranges():
    contents = [formed(5), formed(5), formed(5)]
    for k, content in enumerate(contents):
        content |= {"run": f"run{k}", "cold": {"overlap": {"held": 0.25 * k} if k else None}}
        content["summary"] = {**content["summary"], "model_solves": 200 + 100 * k}
    table = formation_result.table_of(contents).splitlines()
    assert table[0] == "| | run0 | run1 | run2 | median (range) |" and table[1] == "|---|---|---|---|---|"
    assert "| the whole model meets the target from step | 200 | 300 | 400 | 300 (200 to 400) |" in table
    assert "| the same, searched without a neighbour, % | – | 25 | 50 | 38 (25 to 50) |" in table
    assert "| density then | 0.01 | 0.00 | 0.00 | 0.00 (0.00 to 0.01) |" in table
    assert "| final edges that it has, % | 25 | 50 | 75 | 50 (25 to 75) |" in table
    zero = 100 * (len(contents[0]["edges"]) - 1) / len(contents[0]["edges"])
    assert f"| final edges that were zero at no kept step, % | {zero:.0f} | {zero:.0f} | {zero:.0f} | {zero:.0f} |" in table


def test_without_a_circuit_the_model_is_pruned_first(toy, monkeypatch):
    fakes(monkeypatch)
    circuit = toy / "toy" / "circuit.json"
    content = json.loads(circuit.read_text())
    circuit.unlink()
    asked = []

    def prune_task(cfg, task):
        asked.append(cfg)
        write_circuit(str(circuit), content)

    monkeypatch.setattr(formation, "prune_task", prune_task)
    measured(toy, "--target_loss=0.3")
    (cfg,) = asked
    assert (cfg.model, cfg.task, cfg.target_loss, cfg.minimal, cfg.necessity) == (str(toy), "toy", (0.3,), True, 0.55)
    measured(toy)
    assert len(asked) == 1


# --- the picture and the page -----------------------------------------------------------------

def formed(n: int = 5) -> dict:
    """What a study may have found: circuits that lose parts from step to step, none at the first."""
    rng = random.Random(3)
    final = make_circuit(per_site=1, edge_share=0.9)
    steps = [100 * (k + 1) for k in range(n)]
    rows = []
    for k, step in enumerate(steps):
        circuit = json.loads(json.dumps(final))
        for site in list(circuit["nodes"]) if k < n - 1 else ():
            extra = sorted(rng.sample(range(200, 250), n - k))
            old = circuit["nodes"][site]
            circuit["nodes"][site] = sorted({*(old if k > 1 or "mlp" in site else ()), *extra})
        there = {(site, c) for site, channels in circuit["nodes"].items() for c in channels}
        circuit["edges"] = [e[:4] + [e[4] / (2 if k == n - 1 else 4)] for e in circuit["edges"] if {tuple(e[:2]), tuple(e[2:4])} <= there]
        if k < n - 1:
            nodes = circuit["nodes"]
            pairs = [("0.attn.act_in", "0.attn.v"), ("0.mlp.act_in", "0.mlp.post_act"), ("1.mlp.post_act", "1.mlp.resid_delta")]
            circuit["edges"] += [[a, c, b, d, 0.5] for a, b in pairs for c, d in zip(nodes[a][-2:], nodes[b][-2:])]
        circuit |= {"n_nodes": len(there), "n_edges": len(circuit["edges"]), "loss_heldout": 0.1, "costs": {}}
        rows.append({"step": step, "density": 1 / step, "lr": 0.01 * k, "val_loss": None, "circuit": circuit if k else None,
                     "why": "" if k else "the whole model misses <the> target", "final_alone": 0.6 - 0.1 * k, "without_final": 0.8,
                     "whole": {"loss_calibrated": 0.5 - 0.1 * k, "bigram_loss": 0.7},
                     "overlap": {"nodes": 0.2 * k, "edges": 0.2 * k, "held": 0.25 * k} if k else None,
                     "changes": None if k < 2 else {
                         "nodes": {"new": sorted(there - before), "kept": len(there & before), "gone": sorted(before - there)},
                         "edges": {"new": final["edges"][:k], "kept": 2, "gone": []}}})
        before = there
    edges = []
    for number, edge in enumerate(final["edges"]):
        zero = number == 1
        edges.append({
            "edge": edge[:4], "entries": 1000, "weight": [0.0 if zero and not k else edge[4] / 2 for k in range(n)],
            "rank": [None if zero and not k else 10 + number for k in range(n)], "cost": [0.02 * k for k in range(n)],
            "cost_in_circuit": [None] + [0.3] * (n - 1), "nonzero_since": steps[zero], "zero_at": steps[:zero], "leading_since": 200,
            "mattered_first": None if number == 2 else 200, "in_circuit_since": 200})
    keys = ("task", "task_description", "answers", "model", "target_loss")
    return {
        **{key: final[key] for key in keys}, "run": "out/demo", "matters": 0.01, "max_steps": steps[-1], "final_density": 0.04,
        "validation": [{"step": 250, "val_loss": {"<i>": 2.0, "code": 4.0}}, {"step": 500, "val_loss": {"<i>": 1.5, "code": 3.5}}],
        "steps": rows, "edges": edges, "controls": [{"overlap": {"nodes": 0.8, "edges": x}} for x in (0.7, 0.9)],
        "summary": {"anneal_end": 250, "model_solves": 200, "final_alone_first": 400, "final_alone": 500, "overlaps_as_controls": 400},
        "settings": {"run": "<b>out", "jobs": 2},
    }


def page_of(content: dict, folder: Path) -> Path:
    path = folder / "formation.html"
    path.write_text(page(formation.PAGE, title="t", data=as_data(content)), "utf-8")
    return path


def test_the_picture_is_a_picture_and_without_matplotlib_a_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "formation.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    formation_result.plot(formed(), str(path))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "pip install -r requirements-extra.txt" in said and not path.exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    formation_result.plot(formed(), str(path))
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 20_000


def test_the_page_needs_no_network_and_runs_no_text(tmp_path):
    content = formed()
    content["task"] = content["answers"][0] = "</script><b>"
    text = page_of(content, tmp_path).read_text()
    assert text.count("</script>") == 3 and not re.search(r"https?://|src=|@import", text)


WALK = """
const slider = document.getElementById('slider');
const classes = () => Object.fromEntries(['here', 'later', 'off'].map(cls => [cls, ids(`.node.${cls}`).sort()]));
const places = () => Object.fromEntries(all('.node rect').map(r => [r.parentNode.dataset.id, r.getAttribute('x') + ' ' + r.getAttribute('y')]));
const state = () => ({...classes(), hash: location.hash, step: text('step'), said: slider.getAttribute('aria-valuetext'), why: text('why'),
  edges: all('path.edge.here').length, ghosts: all('path.edge.later').length, zero: all('path.edge.zero').length,
  widths: all('path.edge.here').map(p => +p.getAttribute('stroke-width')), tiles: text('tiles'),
  fresh: ids('.node.fresh').sort(), places: places(), line: all('.plot .now')[0].getAttribute('transform'),
  column: document.getElementById('column').getAttribute('x'), stops: all('.node[tabindex="0"]').length});
document.getElementById('lasting').checked = true;
document.getElementById('lasting').click();
seen.first = state();
seen.steps = [0, 1, 2, 3, 4].map(k => {
  slider.value = k;
  slider.dispatchEvent(new Event('input'));
  return state();
});
slider.value = 4;
slider.dispatchEvent(new Event('input'));
document.querySelectorAll('.row-hit')[2].dispatchEvent(new MouseEvent('click', {bubbles: true}));
seen.clicked = text('step');
point(document.querySelectorAll('.row-hit')[2]);
seen.tip = text('tip');
seen.lit = all('path.edge.lit').length;
seen.found = text('found');
document.getElementById('lasting').click();
seen.lasting = [4, 3, 1].map(k => {
  slider.value = k;
  slider.dispatchEvent(new Event('input'));
  return state();
});
seen.labels = [slider.labels.length, all('[role=img]').every(el => el.ariaLabel)];
seen.table = all('#tables tr').map(tr => tr.textContent);
"""


def ids_of(circuit: dict) -> set[str]:
    return {f"{site}.{c}" for site, channels in circuit["nodes"].items() for c in channels}


@needs_browser
def test_the_slider_lights_what_is_in_the_circuit_of_a_step_and_moves_nothing(tmp_path):
    content = formed()
    seen = seen_on(page_of(content, tmp_path), WALK)
    final = ids_of(content["steps"][-1]["circuit"])
    every = set.union(*(ids_of(row["circuit"]) for row in content["steps"] if row["circuit"]))
    for row, state in zip(content["steps"], seen["steps"], strict=True):
        own = ids_of(row["circuit"]) if row["circuit"] else set()
        assert (set(state["here"]), set(state["later"]), set(state["off"])) == (own, final - own, every - own - final)
        assert state["stops"] == len(own | final) and state["hash"] == f"#step={row['step']}"
        assert state["step"] == f"step {row['step']} of 500" and f"step {row['step']}," in state["said"]
        edges = {tuple(e[:4]) for e in row["circuit"]["edges"]} if own else set()
        of_final = {tuple(e["edge"]) for e in content["edges"]}
        assert (state["edges"], state["ghosts"]) == (len(edges), len(of_final - edges))
        assert state["places"] == seen["first"]["places"]
        assert set(state["fresh"]) == {f"{site}.{c}" for site, c in (row["changes"] or {"nodes": {"new": ()}})["nodes"]["new"]}
        assert ("misses <the> target" in state["why"]) == (not own)
        assert (f"nodes{len(own)}" in state["tiles"]) == bool(own)
    assert [state["zero"] for state in seen["steps"]] == [1, 0, 0, 0, 0]  # a weight that is not there yet
    assert len({state["line"] for state in seen["steps"]}) == len({state["column"] for state in seen["steps"]}) == 5
    # what stays where only what lasts is drawn: what is in the final circuit, or in two
    each = [ids_of(row["circuit"]) if row["circuit"] else set() for row in content["steps"]]
    stays = {node for node in every if sum(node in own for own in each) > 1} | final
    assert final < stays < every
    for k, state in zip((4, 3, 1), seen["lasting"], strict=True):
        assert set(state["here"]) == each[k] & stays and set(state["here"] + state["later"] + state["off"]) == stays
        hidden = len(each[k] - stays)
        assert state["why"] == (f"{len(each[k] & stays)} of its {len(each[k])} nodes are drawn." if hidden else "")
    assert [w for w in seen["steps"][2]["widths"] if w > 1] and len(set(seen["steps"][2]["widths"])) > 3
    assert max(seen["steps"][4]["widths"]) == pytest.approx(5, abs=0.01)  # the strongest of all steps is in the final one
    assert max(seen["steps"][2]["widths"]) < 4
    assert seen["first"]["step"] == "step 500 of 500"  # it opens with the end
    assert seen["clicked"] == "step 300 of 500" and "step 300" in seen["tip"] and seen["lit"] == 1
    assert "from step 200 on" in seen["found"] and seen["labels"] == [1, True]
    assert len(seen["table"]) == 1 + len(content["edges"]) and "never" in seen["table"][3]


@needs_browser
def test_a_step_can_be_named_in_the_address(tmp_path):
    path = page_of(formed(), tmp_path)
    text = path.read_text().replace("<script>\n'use strict';\nconst F", "<script>\nlocation.hash = '#step=290';\n'use strict';\nconst F")
    path.write_text(text)
    script = "seen.step = text('step'); location.hash = '#step=100'; dispatchEvent(new Event('hashchange')); seen.then = text('step');"
    assert seen_on(path, script) == {"step": "step 300 of 500", "then": "step 100 of 500"}
