"""tools/program.py: a program computes what the circuit does, alone, and says what it is made of."""
import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import prune
from circuit import FINAL, Circuit, ablate, all_edges, alone, between, drop_unconnected, graph_of, without_edges
from circuit_file import answers_of
from data.tinypython.tokenizer import load_tokenizer, tokenizer_hash
from case import Case
from measures import standalone
from search import Search
from prune import PruneConfig, constants_of
from tasks import TASKS, load_pairs
from tools import program
from tools.algorithm import Seen, divides, of_head, of_variable, of_write
from tools.listing import COLUMNS, plain_name, statement, total
from tools.planted import PlantedConfig, as_circuit, parts_found, plant, truth_of
from tools.planting import SHAPES, background
from tools.program import (loaded, main, margins_by, names_by_tokens, nodes_of, read_names, spoken, write_down,
                           written)
from toy import (EVERY_SITE, TOY, Digits, all_nodes, one_thread, prompts_as_data, random_edges, random_model, toy_pairs,  # noqa: F401
                 toy_setup)

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
ROOT = Path(__file__).resolve().parent.parent


class Tokens(Digits):
    """Digits, with what the vocabulary in program.npz is read by."""
    special_tokens_set = set()

    def decode_single_token_bytes(self, token):
        return str(token).encode()


def random_case(tmp_path, share=0.6, standalone=True, final=False, **options) -> Case:
    options = {"n_layer": 2, "keep": 0.5, "bias": True, "afrac": 0.5, "afrac_loctypes": EVERY_SITE, **options}
    model, cfg, _ = toy_setup(tmp_path, random_model(**options))
    constants = {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    mask = {s: torch.rand(len(m)) < share for s, m in all_nodes(model).items()}
    edges = random_edges(model)
    mask = drop_unconnected(model, mask, [2, 3], edges)
    if final:
        mask[FINAL] = torch.rand(6) < 0.7
        constants[FINAL] = torch.randn(6)
    circuit = Circuit(mask, edges, 1.3, 0.4, 0.0, standalone=standalone)
    return Case(model, TOY, Tokens(), circuit, constants, cfg, toy_pairs(64), toy_pairs(20, "heldout"), "", 0)


def content_for(case):
    return {"task": "toy", "task_description": "say \\ which", "answers": ["2", "3"], "n_nodes": 1, "n_edges": 1,
            "model": {"dir": "out/toy"}}


OPTIONS = [
    dict(), dict(sink=False), dict(d_pos_emb=3), dict(activation_type="relu", bias=False), dict(enable_bigram_table=True, n_layer=3),
    dict(afrac=None), dict(final=True), dict(final=True, d_pos_emb=2, sink=False), dict(share=0.15), dict(share=1.0)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_program_computes_the_margins_of_the_circuit_standing_alone(tmp_path, options):
    case = random_case(tmp_path, **options)
    free = alone(case.model, replace(case.circuit, standalone=True), case.constants)(case.heldout).double()
    made = write_down(case, content_for(case), {}, 8)
    got = margins_by(loaded(made, tmp_path), case.heldout, answers_of(case))
    torch.testing.assert_close(got, free, atol=2e-4, rtol=1e-4)
    assert free.std() > 1e-3  # it says different things of different prompts
    assert max(map(len, made.text.splitlines())) <= 100


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_competition_it_computes_those_of_the_circuit_in_its_model(tmp_path, options):
    case = random_case(tmp_path, **options)
    in_model = alone(case.model, replace(case.circuit, standalone=False), case.constants)(case.heldout).double()
    made = write_down(case, content_for(case), {}, 8, competing=True)
    got = margins_by(loaded(made, tmp_path), case.heldout, answers_of(case))
    torch.testing.assert_close(got, in_model, atol=2e-4, rtol=1e-4)


# --- real prompts: the twenty tasks, text, an edit, what was planted -------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def case_of_task(task, tokenizer, n=6) -> Case:
    """A random circuit of a small random model on the real prompts of a task."""
    model = background(SHAPES["2x64"], 0)
    pairs, held_out = (load_pairs(TASKS[task], tokenizer, n, split, 128) for split in ("train", "heldout"))
    constants = {s: 0.3 * torch.randn(len(m)) for s, m in all_nodes(model).items()}
    mask = {s: torch.rand(len(m)) < 0.15 for s, m in all_nodes(model).items()}
    mask = drop_unconnected(model, mask, [*pairs.answer[:2].tolist()])
    circuit = Circuit(mask, all_edges(model), 1.3, 0.4, 0.0)
    return Case(model, TASKS[task], tokenizer, circuit, constants, PruneConfig(), pairs, held_out, "", 0)


def described(case) -> dict:
    answers = [case.tokenizer.decode([i]) for i in answers_of(case)]
    return {"task": case.task.name, "task_description": case.task.description, "answers": answers, "n_nodes": 1,
            "n_edges": 1, "model": {"dir": "out/random"}}


@pytest.mark.parametrize("task", TASKS)
def test_every_tasks_prompts_run_through_a_program_with_few_digits_and_come_out_equal(task, tokenizer):
    case = case_of_task(task, tokenizer)
    made = written(case, described(case), {}, competing=False)
    assert made.error < 1e-4 and made.digits <= 8
    assert made.correlation <= 1 and made.losses == standalone(case)


def test_with_one_digit_less_a_program_would_not_be_exact(tmp_path, tokenizer):
    case = case_of_task("single_double_quote", tokenizer)
    made = written(case, described(case), {}, competing=False)
    free = alone(case.model, replace(case.circuit, standalone=True), case.constants)(case.heldout).double()
    if made.digits > min(program.DIGITS):
        less = write_down(case, described(case), {}, made.digits - 1)
        got = margins_by(loaded(less, tmp_path), case.heldout, answers_of(case))
        assert (got - free).abs().max() >= program.EXACT / 2


def test_its_words_are_the_tokenizers(tmp_path, tokenizer):
    case = case_of_task("single_double_quote", tokenizer, 2)
    run = loaded(write_down(case, described(case), {}, 5), tmp_path)
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "model.py", ROOT / "view.html", ROOT / "docs" / "notes.md")]
    texts += ["", "\r\n\r\n x\t\ty  ", "é_ñ 日本 '\"')\n\n", "a1234b__c  \n  ", "\x00 \u2028 x²"[:4]]
    for text in texts:
        assert run["tokens_of"](text) == tokenizer.encode_ordinary(text)


def run_program(folder, *args, stdin=""):
    return subprocess.run([sys.executable, "-I", str(folder / "program.py"), *args], input=stdin, capture_output=True, text=True,
                          cwd=folder, env={"PATH": ""})


def test_a_program_runs_alone_on_text_and_ids_and_traces_every_variable(tmp_path, tokenizer):
    case = case_of_task("single_double_quote", tokenizer, 2)
    made = write_down(case, described(case), {}, 8)
    loaded(made, tmp_path)
    text = "print('a b"
    ids = tokenizer.encode_ordinary(text)
    done = run_program(tmp_path, text)
    assert done.returncode == 0 and not done.stderr
    logits = [float(line.split()[-1]) for line in done.stdout.splitlines()[:2]]
    circuit = replace(case.circuit, standalone=True)
    reduced = without_edges(case.model, circuit, case.constants)
    want = reduced(torch.tensor([ids]), nodes=ablate(circuit.mask, case.constants))[0][0, -1, answers_of(case)]
    assert logits == pytest.approx(want.tolist(), abs=1e-4)
    assert run_program(tmp_path, "-", stdin=text).stdout == run_program(tmp_path, "--ids", ",".join(map(str, ids))).stdout == done.stdout

    rows = [line.split("\t") for line in run_program(tmp_path, text, "--trace").stdout.splitlines()]
    names = {plain_name(s, c) for s, m in circuit.mask.items() for c in m.nonzero().flatten().tolist()}
    assert names <= set(rows[0]) and len(rows) == 1 + len(ids) + 3
    seen = {}
    hold = ablate(circuit.mask, case.constants)

    def keep(site, x):
        seen[site] = hold(site, x)
        return seen[site]

    reduced(torch.tensor([ids]), nodes=keep)
    for site, kept in circuit.mask.items():
        for c in kept.nonzero().flatten().tolist():
            traced = [float(row[rows[0].index(plain_name(site, c))]) for row in rows[1 : 1 + len(ids)]]
            assert traced == pytest.approx(seen[site][0, :, c].tolist(), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("args", [["--ids", "5,99999"], ["--ids", "x"], [""], ["--ids", ",".join(["5"] * 129)]])
def test_what_is_no_prompt_is_refused_in_one_line(tmp_path, tokenizer, args):
    case = case_of_task("single_double_quote", tokenizer, 2)
    loaded(write_down(case, described(case), {}, 3), tmp_path)
    done = run_program(tmp_path, *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("program.py: ")


def test_a_closed_pipe_and_an_ascii_terminal_are_no_errors(tmp_path, tokenizer):
    case = case_of_task("single_double_quote", tokenizer, 2)
    loaded(write_down(case, described(case), {}, 3), tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py"), "a b"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == b"" and done.returncode == 141
    done = subprocess.run(["bash", "-c", f"PYTHONIOENCODING=ascii '{sys.executable}' '{tmp_path}/program.py' 'é' --trace"], capture_output=True)
    assert done.returncode == 0 and b"\\" in done.stdout and not done.stderr


def test_the_same_edit_of_a_weight_in_the_program_and_in_the_model_does_the_same(tmp_path, tokenizer):
    case = case_of_task("bracket_counting", tokenizer)
    made = write_down(case, described(case), {}, 8)
    before = margins_by(loaded(made, tmp_path), case.heldout, answers_of(case))
    # a weight from a read to a neuron: the text of the program has it once, in the neuron's line
    ends = ("1.mlp.act_in", "1.mlp.post_act")
    kept = between(case.model, case.circuit.mask, case.circuit.edges)[ends]
    wires = graph_of(case.model).wires[ends]
    source, to, weight = (x[kept][0].item() for x in wires)
    text, new = f"{abs(weight):.8g} * {plain_name(ends[0], source)}", f"{abs(3 * weight):.8g} * {plain_name(ends[0], source)}"
    line = next(i for i, line in enumerate(made.text.splitlines()) if line.endswith(f"# {ends[1]}.{to}"))
    lines = made.text.splitlines()
    end = next(i for i in range(line, len(lines)) if text in lines[i])
    lines[end] = lines[end].replace(text, new)
    edited = margins_by(loaded(replace(made, text="\n".join(lines)), tmp_path), case.heldout, answers_of(case))

    case.model.transformer.h[1].mlp.c_fc.weight[to, source] *= 3
    want = alone(case.model, replace(case.circuit, standalone=True), case.constants)(case.heldout).double()
    torch.testing.assert_close(edited, want, atol=1e-4, rtol=1e-4)
    assert (edited - before).abs().max() > 1e-3


def test_an_edit_of_a_table_is_an_edit_of_the_embedding(tmp_path, tokenizer):
    case = case_of_task("bracket_counting", tokenizer)
    made = write_down(case, described(case), {}, 8)
    channel, key, entry = re.search(r"^    (\d+): \{(.+?): (-?[\d.e-]+)[,}]", made.text, re.MULTILINE).groups()
    text = made.text.replace(f"{channel}: {{{key}: {entry}", f"{channel}: {{{key}: 2.5", 1)
    edited = margins_by(loaded(replace(made, text=text), tmp_path), case.heldout, answers_of(case))
    (token,) = tokenizer.encode_ordinary(ast.literal_eval(key))
    case.model.transformer.wte.weight[token, int(channel)] = 2.5
    want = alone(case.model, replace(case.circuit, standalone=True), case.constants)(case.heldout).double()
    torch.testing.assert_close(edited, want, atol=1e-4, rtol=1e-4)


def edges_in(text: str) -> dict[tuple, float]:
    """(from node, to node) -> weight, of the marked statements of a program."""
    nodes, found, target = {}, {}, None
    for line in text.splitlines():
        marked = re.match(r" {4}(\w+) = (.*)  # (\d\.\S+)$", line)
        if marked:
            name, added_up, target = marked.groups()
            nodes[name] = target
        elif line.startswith(" " * 8):  # goes on
            added_up = line.strip()
        else:
            target = None
        for sign, weight, source in re.findall(r"(-|\+|^|\() ?([\d.e-]+ \* )?(?:\(L\d_head\d+ @ )?(L\d\w+)", added_up) if target else ():
            if nodes.get(source, target) != target:
                size = float(weight.removesuffix(" * ") or 1)
                found[nodes[source], target] = -size if sign == "-" else size
    return found


@pytest.mark.parametrize("kind", ["quote", "bracket", "types2"])
def test_the_program_of_a_planted_circuit_is_the_planted_one(kind, tmp_path, tokenizer):
    data = prompts_as_data(tmp_path, tokenizer)
    made = plant(PlantedConfig(shapes="2x64", data=data, mean_tokens=4096), "2x64", kind, "single", "far", 0, tokenizer)
    constants = constants_of(made.model, PruneConfig(data=data, mean_tokens=4096))
    nodes, edges = truth_of(made.truths[0], "mean")
    circuit = Search(made.model, constants, made.pairs.first(64)).fit(*as_circuit(made.model, nodes, edges))
    nodes, edges = parts_found(made.model, circuit)  # less what has no path
    heldout = load_pairs(made.task, tokenizer, 16, "heldout", 128)
    case = Case(made.model, made.task, tokenizer, circuit, constants, PruneConfig(), made.pairs, heldout, "", 0)
    text = write_down(case, described(case), {}, 6).text
    wires = graph_of(made.model).wires
    planted = {(f"{a}.{j}", f"{b}.{i}"): wires[a, b].weight[wires[a, b].place(j, i)].item() for a, j, b, i in edges}
    assert len(planted) >= 4 and edges_in(text) == pytest.approx(planted, rel=1e-5)
    assert set(re.findall(r"# (\d\.\S+)$", text, re.MULTILINE)) == {f"{site}.{c}" for site, c in nodes}


# --- names, words, the command -----------------------------------------------------------------------

@pytest.mark.parametrize("terms, constant, digits, text", [
    ([(0.5, "a"), (-1.0, "b")], 0.1, 3, "0.5 * a - b + 0.1"), ([(-0.25, "a")], 0.0, 3, "-0.25 * a"), ([(1.0, "a")], -2.0, 3, "a - 2"),
    ([], 0.0, 3, "0"), ([], -0.5, 3, "-0.5"), ([(1 / 3, "a")], 1e-9, 2, "0.33 * a + 1e-09")])
def test_a_sum_as_text(terms, constant, digits, text):
    assert total(terms, constant, digits) == text


@pytest.mark.parametrize("expression", [
    " + ".join(f"0.123456 * L0_attn_in_{i}" for i in range(12)),
    f"gelu({' - '.join(f'0.5 * L0_mlp_in_{i}' for i in range(9))})",
    f"rms({', '.join(f'stream_{i}' for i in range(14))})", f"(a + b) / norm + {' + '.join('c' * 9 for _ in range(9))}"])
def test_a_long_statement_is_broken_into_lines_that_say_the_same(expression):
    lines = statement("L0_attn_k_7 = ", expression, "0.attn.k.7")
    assert len(lines) > 1 and max(map(len, lines)) <= COLUMNS and lines[0].endswith("(  # 0.attn.k.7")
    whole = ast.parse("\n".join(["if True:", *lines]))
    assert ast.dump(whole.body[0].body[0].value) == ast.dump(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize("token, name", [("('", "open_quote"), (" print", "print"), ("\n    ", "newline"), ("   ", "space"), ("é", "é")])
def test_a_token_as_part_of_a_name(token, name):
    assert spoken(token) == name and f"x_{name}".isidentifier()


def test_names_from_a_file_and_from_tokens_change_no_number(tmp_path, tokenizer):
    case = case_of_task("single_double_quote", tokenizer, 4)
    plain = next(iter(nodes_of(case.circuit)))
    (tmp_path / "names.toml").write_text(f'{plain} = "quote_type"\n')
    names = read_names(str(tmp_path / "names.toml"), set(nodes_of(case.circuit)))
    named = write_down(case, described(case), names, 8)
    by_token = write_down(case, described(case), names_by_tokens(case, described(case)), 8)
    want = margins_by(loaded(write_down(case, described(case), {}, 8), tmp_path), case.heldout, answers_of(case))
    for made in (named, by_token):
        assert torch.equal(margins_by(loaded(made, tmp_path), case.heldout, answers_of(case)), want)
    assert re.search(r"^    quote_type = ", named.text, re.MULTILINE) and not re.search(rf"\b{plain}\b", named.text)


@pytest.mark.parametrize("line, says", [
    ('L9_mlp_neuron_1 = "x"', "no node"), ('{plain} = "2x"', "cannot be"), ('{plain} = "stream"', "cannot be"), ('{plain} = "if"', "cannot be"),
    ('{plain} = "stream_5"', "cannot be"), ('{plain} = 5', "cannot be"), ('{plain} = "{other}"', "two nodes"), ("= =", "no TOML")])
def test_names_that_cannot_be_used_are_refused(line, says, tmp_path, tokenizer):
    plain, other, *_ = nodes_of(case_of_task("single_double_quote", tokenizer, 2).circuit)
    (tmp_path / "names.toml").write_text(line.format(plain=plain, other=other))
    with pytest.raises(ValueError, match=says):
        read_names(str(tmp_path / "names.toml"), {plain, other})


def test_a_model_whose_stream_is_no_plain_sum_has_no_program(tmp_path):
    case = random_case(tmp_path, rms_norm=False)
    with pytest.raises(ValueError, match="RMSNorm"):
        written(case, content_for(case), {}, competing=False)


def seen_of(x, ids, last, first, heads=None) -> Seen:
    position = np.concatenate([np.arange(n) for n in np.diff([-1, *last])])
    return Seen({"x": np.array(x, dtype=float)}, heads or {}, list("abcdef"), np.array(ids), position, np.array(last), np.array(first))


def test_a_rule_speaks_only_where_the_numbers_decide():
    ids, last, first = [0, 1, 2, 0, 2, 1, 0, 3], [3, 7], [True, False]
    assert "at every token" in of_variable("x", seen_of([2.0] * 8, ids, last, first))
    detector = of_variable("x", seen_of([0, 5, 0, 0, 0, 5, 0, 0], ids, last, first))
    assert "detects 'b' +5" in detector and "explains 1.00" in detector
    assert "tells the position" in of_variable("x", seen_of([0, 1, 2, 3, 0, 1, 2, 3], ids, last, first))
    assert of_variable("x", seen_of([0, 5, 3, 1, 7, -5, 2, 0], ids, last, first)) == ""


def test_the_threshold_of_a_write_is_the_best_one_and_a_useless_write_is_passed_over():
    x = np.array([1.0, 5.0, 2.0, 6.0, 5.5, 0.2])
    first = np.array([False, True, False, True, True, True])
    threshold, share, above = divides(x, first)
    assert (threshold, share, above) == (pytest.approx(3.5), pytest.approx(5 / 6), True)
    assert divides(-x, first)[1:] == (pytest.approx(5 / 6), False)
    for flipped in (first, ~first):  # every threshold tried by hand gives no more
        best = max(np.mean((x > cut) == flipped) for cut in np.arange(0, 8, 0.25))
        assert divides(x, flipped)[1] == pytest.approx(max(best, 1 - min(np.mean((x > cut) == flipped) for cut in np.arange(0, 8, 0.25))))
    ids, last = [0] * 6, [0, 1, 2, 3, 4, 5]
    assert "divides 83% of the prompts" in of_write("x", seen_of(x, ids, last, first), ["u", "v"])
    assert of_write("x", seen_of([1.0, 2, 3, 1, 2, 3], ids, last, [True, True, True, False, False, False]), ["u", "v"]) == ""


def test_where_a_head_looks_from_the_last_token():
    shares = np.zeros((2, 7))
    shares[:, 1], shares[:, 3], shares[:, 6] = 0.6, 0.1, 0.3
    seen = seen_of([0.0] * 8, [0, 1, 2, 0, 2, 1, 0, 3], [3, 7], [True, False], {"h": shares})
    assert of_head("h", ["q"], ["k"], seen) == "From the last token h, by q, looks at 'b' 0.60, 'd' 0.10; the sink takes 0.30."
    flat = np.tile(np.array([[0.02] * 6 + [0.0]]), (2, 1))
    assert of_head("h", [], ["k"], seen_of([0.0] * 8, [0] * 8, [3, 7], [True, False], {"h": flat})) == ""


@pytest.mark.parametrize("of_sink, does", [([0.9, 0.6], "counts tokens"), ([0.05, 0.02], "averages")])
def test_a_head_without_queries_and_keys_counts_only_where_the_sink_gives_way(of_sink, does):
    shares = np.zeros((2, 7))
    shares[:, 6] = of_sink
    sentence = of_head("h", [], [], seen_of([0.0] * 8, [0] * 8, [1, 7], [True, False], {"h": shares}))
    assert sentence.endswith(f"the sink takes {of_sink[0]:.2f} of it in short prompts, {of_sink[1]:.2f} in long ones: it {does}.")


def test_the_command_writes_a_program_beside_each_circuit_of_a_run(tmp_path, capsys, monkeypatch, tokenizer):
    """A real file: a planted model, pruned by the command's own settings."""
    data = tmp_path / "data"
    data.mkdir()
    prompts_as_data(data, tokenizer)
    made = plant(PlantedConfig(shapes="2x64", data=str(data), mean_tokens=4096), "2x64", "bracket", "single", "far", 0, tokenizer)
    model = tmp_path / "model"
    made.model.save(str(model))
    prune.main([f"--model={model}", "--task=bracket_counting", f"--data={data}", "--mean_tokens=4096", "--steps=40", "--starts=1",
                "--train_pairs=64", "--fit_pairs=32", "--apart_pairs=0", "--heldout_pairs=16", "--target_loss=0.4"])
    capsys.readouterr()
    folder = model / "bracket_counting"
    assert main([str(model), f"--data={data}", "--algorithm", "--names=tokens"]) == 0
    out = capsys.readouterr().out
    assert "exact (at most" in out and str(folder / "program.py") in out and "\n- " in out
    assert (folder / "algorithm.txt").read_text().count("\n") <= 12
    done = run_program(folder, "x = [[1, 2")
    assert done.returncode == 0 and done.stdout.count("\n") == 3
    for args, says in (([str(tmp_path / "none.json")], "none.json"), ([str(data)], "prune.py writes them"), ([], "usage"),
                       ([str(folder / "circuit.json"), f"--data={data}", "--names=nowhere.toml"], "nowhere.toml")):
        before = (folder / "program.py").read_bytes()
        with pytest.raises(SystemExit) as stop:
            main(args)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and says in err and err.count("\n") == 1
        assert (folder / "program.py").read_bytes() == before
