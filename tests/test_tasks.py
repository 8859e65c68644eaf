"""tasks.py: pairs differ only where the behaviour is decided, never leak between splits, and stand in ordinary code."""
import ast
import csv
import hashlib
import io
import json
import math
import os
import random
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.tinypython.filler import FILES
from data.tinypython.tokenizer import DEFAULT, EOT_ID, load_tokenizer, tokenizer_hash
from model import GPT, GPTConfig
from tasks import (TASKS, Pairs, Task, answer_ids, last_logits, load_model, load_pairs, loss_of, main, margins, task_loss,
                   task_of)

BLOCK = 128
NAMES = """single_double_quote bracket_counting set_or_string set_or_string_fixedvarname final_kwarg class_init with_as
bracket_brace with_open for_while else_elif fstring_brace if_ternary var_swap indent_for lambda_func if_equals
enumerate_range var_if while_return_true""".split()


def as_dict(match: re.Match) -> str:
    items = match[1].split(", ")
    return "= {" + "".join(f"{k}: {v}, " for k, v in zip(items[::2], items[1::2])) + items[-1]


# what makes the second prompt of a pair the first: the deciding place, and nothing else
DECIDED_BY = {
    "single_double_quote": (r'\("([^"\n]*)$', r"('\1"),
    "bracket_counting": (r"\[\[([^\[\n]*)$", r"[\1"),
    "set_or_string": (r'\b(\w+) = ""(\n(?:.*\n)* +\1)$', r"\1 = set()\2"),
    "set_or_string_fixedvarname": (r'(current) = ""(\n(?:.*\n)* +current)$', r"\1 = set()\2"),
    "final_kwarg": (r", (\w+)$", r"=None, \1"),
    "class_init": (r"\.value =$", ".name ="),
    "with_as": (r"    \w+ = (open.*)$", r"    with \1"),
    "bracket_brace": (r"= \[(.*)$", as_dict),
    "with_open": (r"\((\w+)(, .)$", lambda m: f"({next(read for read, write in FILES if write == m[1])}{m[2]}"),
    "for_while": (r"while (\w+)$", r"for \1"),
    "else_elif": (r"elif$", "else"),
    "fstring_brace": (r"\((['\"]the .*)$", r"(f\1"),
    "if_ternary": (r" if (.*)$", r"\n    if \1"),
    "var_swap": (r"y, x = x,$", "x, y = y,"),
    "indent_for": (r"        for (.*\n)$", r"    for \1"),
    "lambda_func": (r"def (\w)$", r"VERB = lambda \1"),
    "if_equals": (r"    (\w+)$", r"    if \1"),
    "enumerate_range": (r"for (\w) in$", r"for \1, NAME in"),
    "var_if": (r"(\w+) = (True|False)$", r"if \1 == \2"),
    "while_return_true": (r"return True$", "while True"),
}
# the first prompt has a word of its own there, which the second has no place for
OWN_WORD = {"lambda_func": (r"\w+ = lambda", "VERB = lambda"), "enumerate_range": (r"(for \w), \w+ in$", r"\1, NAME in")}
# the language writes the two with unequal numbers of tokens
UNEQUAL = {"set_or_string", "set_or_string_fixedvarname", "final_kwarg", "with_as", "fstring_brace", "if_ternary", "lambda_func",
           "if_equals", "enumerate_range", "var_if"}
# decided by tokens so close to the end that they must be among the last eight
LOCAL = """single_double_quote bracket_counting final_kwarg class_init bracket_brace with_open for_while else_elif var_swap
lambda_func if_equals enumerate_range var_if while_return_true""".split()


def quoted(end: str):
    """`end` with the quote that the prompt's last string opened with."""
    return lambda prompt: end.replace("Q", re.findall(r"['\"]", prompt)[-1])


def opened(prompt: str) -> str:
    return prompt[-1] + (") as f:\n        pass\n" if "    with " in prompt.split("\n")[-1] else ")\n")


# how a program goes on after each of the two answers
BODY = "        pass\n"
COMPLETE = {
    "single_double_quote": ("", ""), "bracket_counting": ("", ""),
    "set_or_string": ("(x)\n", " x\n"), "set_or_string_fixedvarname": ("(x)\n", " x\n"),
    "final_kwarg": ("):\n    pass\n", "    pass\n"), "class_init": ("\n", "\n"),
    "with_as": (" f:\n" + BODY, " path else None\n"), "bracket_brace": (" 0}\n", " 0]\n"), "with_open": (opened, opened),
    "for_while": (" x:\n" + BODY, BODY), "else_elif": (BODY, " x:\n" + BODY),
    "fstring_brace": (quoted("name}Q)\n"), quoted(" validQ)\n")), "if_ternary": (BODY, " x\n"), "var_swap": ("\n", "\n"),
    "indent_for": (" x = 1\n", " x = 1\n"), "lambda_func": (" 0\n", "left):\n" + BODY), "if_equals": (" x:\n" + BODY, " x\n"),
    "enumerate_range": ("(x):\n" + BODY, "(x):\n" + BODY), "var_if": (BODY, "    x = 1\n"), "while_return_true": (BODY, "    x = 1\n")}


def last(text: str, kind):
    return max((node for node in ast.walk(ast.parse(text)) if isinstance(node, kind)), key=lambda node: node.lineno)


def fits_type(text: str) -> bool:
    name, growth = re.search(r"(\w+)(\.add| \+=)[^\n]*\n$", text).groups()
    starts = re.findall(rf"^ *{name} = (.*)$", text, re.M)
    assert len(starts) == 1, text
    return starts[0] == {".add": "set()", " +=": '""'}[growth]


def fits_value(text: str) -> bool:
    if "(f" not in text.split("\n")[-2]:
        return "{" not in text.split("\n")[-2]
    return any(isinstance(part, ast.FormattedValue) for part in last(text, ast.JoinedStr).values)


def fits_swap(text: str) -> bool:
    left, right = ([name.id for name in side.elts] for side in (last(text, ast.Assign).targets[0], last(text, ast.Assign).value))
    return left == right[::-1]


def fits_indent(text: str) -> bool:
    loop, body = text.split("\n")[-3:-1]
    return len(body) - len(body.lstrip()) == len(loop) - len(loop.lstrip()) + 4


def fits_mode(text: str) -> bool:
    path, mode = re.findall(r"open\((\w+), .(\w)", text)[-1]
    return path in [read if mode == "r" else write for read, write in FILES]


# where the wrong answer can be valid syntax too: (after the first prompt, after the second), and what then tells that it is wrong
PARSES_TOO = {
    "set_or_string": (True, True, fits_type),
    "set_or_string_fixedvarname": (True, True, fits_type),
    "final_kwarg": (False, True, lambda text: len((args := last(text, ast.FunctionDef).args).defaults) != 1),  # a default, for no reason
    "class_init": (True, True, lambda text: last(text, ast.Assign).targets[0].attr == last(text, ast.Assign).value.id),
    "with_open": (True, True, fits_mode),  # reading what its name says is to be written
    "for_while": (False, True, lambda text: "in" not in text.split("\n")[-3].split() or "for" in text.split("\n")[-3].split()),
    "fstring_brace": (True, True, fits_value),  # an f-string without a value, a name in braces that is printed as it stands
    "var_swap": (True, True, fits_swap),
    "indent_for": (True, False, fits_indent),  # a body that is two levels deeper
    "enumerate_range": (True, True, lambda text: (isinstance((loop := last(text, ast.For)).target, ast.Tuple)) == (loop.iter.func.id == "enumerate")),
}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def drawn(tokenizer):
    """2,000 training pairs and 500 held-out pairs of every task."""
    return {t.name: {split: load_pairs(t, tokenizer, n, split, BLOCK) for split, n in (("train", 2000), ("heldout", 500))}
            for t in TASKS.values()}


def prompts(pairs: Pairs) -> list[tuple[int, ...]]:
    return [tuple(ids[: last + 1]) for ids, last in zip(pairs.ids.tolist(), pairs.last.tolist())]


def as_pairs(pairs: Pairs) -> list[tuple]:
    rows = prompts(pairs)
    return list(zip(rows[::2], rows[1::2]))


def texts(pairs: Pairs, tokenizer) -> list[tuple[str, str]]:
    return [(tokenizer.decode(list(a)), tokenizer.decode(list(b))) for a, b in as_pairs(pairs)]


def complete(task: Task, prompt: str, k: int) -> str:
    """What follows the k-th answer."""
    end = COMPLETE[task.name][k]
    return end(prompt) if callable(end) else end


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def same(a: Pairs, b: Pairs) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("ids", "last", "answer", "wrong"))


# --- drawing ----------------------------------------------------------------------------------

def test_the_twenty_tasks_of_the_paper_exist_under_their_own_names():
    assert list(TASKS) == NAMES and len(NAMES) == 20
    assert all(name == task.name and task.description for name, task in TASKS.items())


@every_task
def test_pairs_are_a_function_of_the_seed_and_the_split(task, tokenizer, drawn):
    for split in ("train", "heldout"):
        a, b = (load_pairs(task, tokenizer, 40, split, BLOCK, seed=3) for _ in range(2))
        assert same(a, b)
        other = load_pairs(task, tokenizer, 40, split, BLOCK, seed=4)
        assert not set(as_pairs(a)) & set(as_pairs(other))


@every_task
def test_pairs_do_not_depend_on_the_state_of_the_global_generators(task, tokenizer):
    random.seed(1), torch.manual_seed(1)
    a = load_pairs(task, tokenizer, 20, "train", BLOCK)
    random.seed(2), torch.manual_seed(2)
    assert same(a, load_pairs(task, tokenizer, 20, "train", BLOCK))


@every_task
def test_two_thousand_distinct_pairs_can_be_drawn(task, drawn):
    assert len(drawn[task.name]["train"]) == 2000
    assert len(set(as_pairs(drawn[task.name]["train"]))) == 2000
    assert len(set(as_pairs(drawn[task.name]["heldout"]))) == 500


@every_task
def test_train_and_heldout_share_no_pair_and_no_prompt_under_any_seed(task, tokenizer, drawn):
    train = drawn[task.name]["train"]
    for heldout in (drawn[task.name]["heldout"], load_pairs(task, tokenizer, 500, "heldout", BLOCK, seed=1)):
        assert not set(as_pairs(train)) & set(as_pairs(heldout))
        assert not set(prompts(train)) & set(prompts(heldout))


@every_task
def test_no_prompt_exceeds_the_block_size(task, tokenizer):
    for block in (40, 64, 256):
        pairs = load_pairs(task, tokenizer, 100, "train", block)
        assert pairs.ids.shape[1] <= block and int(pairs.last.max()) == pairs.ids.shape[1] - 1


@every_task
def test_too_small_a_block_or_too_few_pairs_is_an_error_that_names_the_task(task, tokenizer):
    with pytest.raises(ValueError, match=task.name):
        load_pairs(task, tokenizer, 10, "train", 3)
    few = Task(task.name, "", task.answers, lambda r: (f"a{r.randint(0, 9)}", f"b{r.randint(0, 9)}"))
    with pytest.raises(ValueError, match=task.name):
        load_pairs(few, tokenizer, 101, "train", BLOCK)


# --- pairs ------------------------------------------------------------------------------------

@every_task
def test_prompts_of_a_pair_differ_only_in_the_deciding_place(task, tokenizer, drawn):
    pattern, first = DECIDED_BY[task.name]
    for split in ("train", "heldout"):
        for a, b in texts(drawn[task.name][split], tokenizer):
            own = OWN_WORD.get(task.name, ("$^", ""))
            assert a != b and re.sub(own[0], own[1], re.sub(pattern, first, b)) == re.sub(*own, a), (a, b)


@every_task
def test_prompts_of_a_pair_have_equal_last_tokens_and_counts(task, drawn):
    """What is written with unequal numbers of tokens is listed; elsewhere the number gives nothing away. Only `else` and
    `elif` are themselves the last tokens; elsewhere the bigram table's row is the same for both."""
    for a, b in as_pairs(drawn[task.name]["train"]):
        assert a[-1] == b[-1] or task.name == "else_elif"
        assert len(a) == len(b) or task.name in UNEQUAL


def bags(pairs: Pairs, n: int, window: int = 8) -> torch.Tensor:
    """How often each token stands among the last eight of each prompt (2n, vocab)."""
    rows, last = pairs.ids[: 2 * n], pairs.last[: 2 * n, None]
    places = (last - torch.arange(window)).clamp(min=0)
    there = (last >= torch.arange(window)).float()
    return torch.zeros(2 * n, 2048).scatter_add(1, rows.gather(1, places), there)


@every_task
def test_a_bag_of_the_last_tokens_does_not_tell_the_answer_where_the_task_is_not_local(task, drawn):
    """A logistic regression on 1,500 training pairs gets under 60% of the held-out prompts, and over 60% of the local ones."""
    x, right = bags(drawn[task.name]["train"], 1500), torch.tensor([1.0, 0.0]).repeat(1500)
    seen = x.any(0)
    x, weights = x[:, seen], torch.zeros(int(seen.sum()), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weights, right) + 1e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    guesses = (bags(drawn[task.name]["heldout"], 500)[:, seen] @ weights > 0).view(-1, 2)
    accuracy = (guesses == torch.tensor([True, False])).float().mean().item()
    assert task.local == (task.name in LOCAL) == (accuracy > 0.6), accuracy


@every_task
def test_answers_are_single_tokens_and_swapped_within_a_pair(task, tokenizer, drawn):
    first, second = (tokenizer.encode_ordinary(a) for a in task.answers)
    assert len(first) == len(second) == 1 and first != second
    for pairs in drawn[task.name].values():
        assert pairs.answer.tolist() == (first + second) * len(pairs)
        assert pairs.wrong.tolist() == (second + first) * len(pairs)


@every_task
def test_the_answer_is_the_token_that_the_whole_text_has_there(task, tokenizer, drawn):
    """Encoding prompt, answer and what follows gives the prompt's tokens, then the answer's: no token spans a border."""
    pairs = drawn[task.name]["heldout"]
    for row, (ids, answer) in enumerate(zip(prompts(pairs), pairs.answer.tolist())):
        text = tokenizer.decode([*ids, answer])
        end = complete(task, tokenizer.decode(list(ids)), row % 2)
        assert tokenizer.encode_ordinary(text + end)[: len(ids) + 1] == [*ids, answer]


@every_task
def test_the_right_answer_continues_to_valid_python_and_the_wrong_one_does_not(task, tokenizer, drawn):
    """Or, where both are valid syntax, only the right one does what the prompt's own words and types ask for."""
    too = PARSES_TOO.get(task.name, (False, False, lambda text: True))
    for pair in texts(drawn[task.name]["heldout"], tokenizer):
        for k, prompt in enumerate(pair):
            right, wrong = (prompt + task.answers[i] + complete(task, prompt, i) for i in (k, 1 - k))
            assert parses(right) and too[2](right), right
            assert parses(wrong) == too[k] and not (too[k] and too[2](wrong)), wrong


def test_a_tokenizer_that_splits_an_answer_is_an_error_that_names_it():
    class Bytes:
        def encode_ordinary(self, text):
            return 2 * list(text.encode())

    for task in TASKS.values():
        with pytest.raises(ValueError) as error:
            load_pairs(task, Bytes(), 10, "train", 1000)
        assert repr(task.answers[0]) in str(error.value) and "\n" not in str(error.value)


def test_any_tokenizer_with_single_token_answers_will_do():
    class Letters:
        def encode_ordinary(self, text):
            return [ord(c) for c in text]

    task = Task("toy", "", ("x", "y"), lambda r: (f"a{(n := r.randint(0, 999))}", f"b{n}"))
    pairs, heldout = (load_pairs(task, Letters(), 100, split, 8) for split in ("train", "heldout"))
    assert len(pairs) == 100 and pairs.answer.tolist() == [ord("x"), ord("y")] * 100
    for a, b in as_pairs(pairs):
        assert chr(a[0]) == "a" and chr(b[0]) == "b" and a[1:] == b[1:]
    assert not set(as_pairs(pairs)) & set(as_pairs(heldout))  # of 1,000: by chance, ten would be in both


# --- the context ------------------------------------------------------------------------------

@every_task
def test_context_is_varied_and_not_one_template(task, tokenizer, drawn):
    firsts = [a for a, _ in texts(drawn[task.name]["train"], tokenizer)]
    assert len({t.split("\n")[0] for t in firsts}) > 1000
    words = {w for t in firsts for w in re.findall(r"[a-z]+", t)}
    assert len(words) > 200
    shapes = {re.sub(r"\w+", "w", t) for t in firsts}  # the same text up to its words
    assert len(shapes) > 1000
    lines = [t.count("\n") for t in firsts]
    assert min(lines) < max(lines) - 3 and sum(lines) / len(lines) > 2
    assert EOT_ID not in drawn[task.name]["train"].ids


@every_task
def test_both_quote_styles_stand_in_the_shared_context_of_a_pair(task, tokenizer, drawn):
    shared = []
    for a, b in texts(drawn[task.name]["train"], tokenizer):
        start = len(os.path.commonprefix((a, b)))
        end = len(os.path.commonprefix((a[start:][::-1], b[start:][::-1])))
        shared.append((a[:start] + a[len(a) - end :]).replace('"""', ""))
    single, double = ({i for i, t in enumerate(shared) if q in t} for q in "'\"")
    assert min(len(single), len(double)) > 0.1 * len(shared) and len(single & double) > 0.01 * len(shared)


def test_a_set_or_string_stands_beside_variables_of_the_other_types(tokenizer, drawn):
    """So that what else is in the prompt does not tell: a set beside the string, a string beside the set."""
    found = {start: 0 for start in ("set()", '""', "[]", "0")}
    for a, _ in texts(drawn["set_or_string"]["train"], tokenizer):
        name = a.split()[-1]
        for other, start in re.findall(r'^ +(\w+) = (set\(\)|""|\[\]|0)$', a, re.M):
            found[start] += other != name
    assert min(found.values()) > 100
    assert len({a.split()[-1] for a, _ in texts(drawn["set_or_string"]["train"], tokenizer)}) > 12


def test_brackets_in_comments_stand_before_the_list_or_dict_that_counts(tokenizer, drawn):
    comments = [" ".join(re.findall("#.*", a)) for a, _ in texts(drawn["bracket_brace"]["train"], tokenizer)]
    assert all(sum(bracket in c for c in comments) > 100 for bracket in "[{")


# --- loss and rows ----------------------------------------------------------------------------

def make_pairs(n=6, width=9, vocab=30) -> Pairs:
    answers = torch.stack([torch.randperm(vocab)[:2] for _ in range(n)])
    return Pairs(torch.randint(1, vocab, (2 * n, width)), torch.randint(0, width, (2 * n,)),
                 answers.flatten(), answers.flip(1).flatten())


def test_task_loss_of_equal_logits_is_ln_2(seed):
    assert task_loss(torch.full((12, 30), 1.7), make_pairs()).item() == pytest.approx(math.log(2), abs=1e-6)


def test_task_loss_is_the_mean_cross_entropy_over_the_two_candidates_only(seed):
    pairs, logits = make_pairs(), 3 * torch.randn(12, 30)
    by_hand = []
    for row, a, w in zip(logits.tolist(), pairs.answer.tolist(), pairs.wrong.tolist()):
        by_hand.append(-math.log(math.exp(row[a]) / (math.exp(row[a]) + math.exp(row[w]))))
    assert task_loss(logits, pairs).item() == pytest.approx(sum(by_hand) / 12, rel=1e-5)
    others = torch.ones_like(logits).scatter(1, torch.stack([pairs.answer, pairs.wrong], 1), 0.0)
    assert task_loss(logits + 50 * others, pairs).item() == pytest.approx(sum(by_hand) / 12, rel=1e-5)


def test_task_loss_stays_finite_for_extreme_logits(seed):
    pairs, logits = make_pairs(), torch.zeros(12, 30)
    logits[torch.arange(12), pairs.wrong] = 1000.0
    assert task_loss(logits, pairs).item() == pytest.approx(1000)


def test_take_keeps_the_rows_of_each_pair_aligned_and_cuts_the_padding(tokenizer, drawn):
    pairs = drawn["bracket_counting"]["train"]
    chosen = torch.tensor([7, 3, 1999, 3])
    taken = pairs.take(chosen)
    assert len(taken) == 4 and as_pairs(taken) == [as_pairs(pairs)[i] for i in chosen.tolist()]
    assert taken.ids.shape[1] == int(taken.last.max()) + 1
    rows = [r for i in chosen.tolist() for r in (2 * i, 2 * i + 1)]
    assert torch.equal(taken.answer, pairs.answer[rows]) and torch.equal(taken.wrong, pairs.wrong[rows])


# --- the command ------------------------------------------------------------------------------

def tiny(folder, **options) -> str:
    torch.manual_seed(0)
    config = {"block_size": BLOCK, "vocab_size": 2048} | options
    GPT(GPTConfig(n_layer=1, n_head=1, d_model=8, **config)).save(str(folder))
    return str(folder)


def test_the_command_prints_two_pairs_of_every_task_with_the_tokens_marked(capsys, tokenizer):
    assert main([]) == 0
    blocks = re.split(r"^=== ", capsys.readouterr().out, flags=re.M)[1:]
    assert [block.split(":")[0] for block in blocks] == NAMES
    for block, task in zip(blocks, TASKS.values()):
        pairs = load_pairs(task, tokenizer, 2, "train", 256)
        shown = block.split("-" * 60 + "\n")[1:]
        assert len(shown) == 4
        for text, ids, answer in zip(shown, prompts(pairs), pairs.answer.tolist()):
            marked, said = text.rsplit("   -> ", 1)
            assert ast.literal_eval(said.strip()) == tokenizer.decode([answer])
            assert marked.replace("|", "") == tokenizer.decode(list(ids))
            assert [t for t in re.split(r"\||(?<=\n)(?!\n)", marked) if t] == [tokenizer.decode([t]) for t in ids]


def test_the_command_prints_the_loss_and_accuracy_of_a_model_on_every_task(capsys, tokenizer, tmp_path):
    model_dir = tiny(tmp_path)
    assert main([f"--model={model_dir}", "--pairs=5"]) == 0
    rows = {name: (float(loss), float(share)) for name, loss, share in map(str.split, capsys.readouterr().out.splitlines()[1:])}
    assert list(rows) == NAMES
    model = GPT.load(model_dir).requires_grad_(False)
    for task in TASKS.values():
        pairs = load_pairs(task, tokenizer, 5, "heldout", BLOCK)
        logits = last_logits(model, pairs)
        right = sum(bool(row[a] > row[w]) for row, a, w in zip(logits, pairs.answer, pairs.wrong))
        assert rows[task.name] == pytest.approx((task_loss(logits, pairs).item(), right / 10), abs=6e-4)


def test_the_command_can_be_asked_for_one_task(capsys):
    assert main(["--task=var_if"]) == 0
    assert re.findall("^=== (\\w+)", capsys.readouterr().out, re.M) == ["var_if"]


@pytest.mark.parametrize("argv, says", [
    (["--task=var_fi"], "var_if"), (["--model=nowhere"], "nowhere"), (["--tokenizer=nowhere"], "nowhere"), (["--pairs=0"], "pairs"),
    (["--paris=3"], "pairs"), (["--pairs=many"], "pairs"), (["extra"], "extra")])
def test_bad_input_to_the_command_is_one_line_and_exit_2(argv, says, capsys):
    refused(argv, says, capsys)


@pytest.mark.parametrize("options, says", [({"vocab_size": 100}, "100"), ({"block_size": 4}, "var_swap")])
def test_a_model_that_cannot_take_the_prompts_is_one_line_and_exit_2(options, says, capsys, tmp_path):
    refused([f"--model={tiny(tmp_path, **options)}", "--pairs=1", "--task=var_swap"], says, capsys)


def refused(argv: list[str], says: str, capsys, too: str = "") -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and too in err and err.count("\n") == 1, err


@pytest.mark.parametrize("line, fits", [("", True), ('tokenizer_hash = ""', True), (f'tokenizer_hash = "{tokenizer_hash()}"', True),
                                        ('tokenizer_hash = "abc"', False)])
def test_a_model_trained_on_another_tokenizers_data_is_refused(tmp_path, line, fits):
    GPT(GPTConfig(vocab_size=2048, block_size=8, n_layer=1, n_head=1, d_head=8, d_model=8, tied_unembed=False)).save(str(tmp_path))
    load_model(str(tmp_path), str(DEFAULT))  # a published model says nothing of it
    (tmp_path / "train.toml").write_text(f"seed = 1\n{line}\n")
    if fits:
        load_model(str(tmp_path), str(DEFAULT))
    else:
        with pytest.raises(ValueError, match="another tokenizer"):
            load_model(str(tmp_path), str(DEFAULT))


# --- pairs from a file ------------------------------------------------------------------------

NAMES_ASKED = (" name", " value", " path", " key", " item")


def written_pairs(n=200, task="single_double_quote") -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """n distinct pairs as a built-in task draws them, with its answers."""
    r, found = random.Random(1), {}
    while len(found) < n:
        found[TASKS[task].prompts(r)] = TASKS[task].answers
    return list(found.items())


def many_answers(n=100) -> list:
    """Pairs of different lengths whose answers differ from pair to pair."""
    found = []
    for i in range(n):
        a, b = NAMES_ASKED[i % 5], NAMES_ASKED[(i + 1 + i // 5 % 4) % 5]
        found.append(((f"    x{i} ={a}\n    y =", f"    x{i} = 3 +{b}\n    y ="), (a, b)))
    return found


def as_jsonl(pairs) -> str:
    return "".join(json.dumps({"prompts": p, "answers": a, "source": "anything"}) + "\n" for p, a in pairs)


def as_csv(pairs, newline="\n") -> str:
    """With the columns in another order, and one that nobody asked for."""
    out = io.StringIO(newline="")
    rows = csv.writer(out, lineterminator=newline)
    rows.writerow(["wrong", "clean", "note", "answer", "corrupted"])
    rows.writerows([wrong, clean, "a, b", answer, corrupted] for (clean, corrupted), (answer, wrong) in pairs)
    return out.getvalue()


def write(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def all_of(path, tokenizer, block=BLOCK) -> list[tuple]:
    """Every pair of a file: the two prompts' tokens and the two answers', in any order."""
    found = []
    for split in ("train", "heldout"):
        pairs = load_pairs(task_of(path), tokenizer, 10**6, split, block)
        found += zip(as_pairs(pairs), pairs.answer.view(-1, 2).tolist())
    return sorted(found)


def test_a_file_of_a_built_in_tasks_pairs_is_that_task(tokenizer, tmp_path):
    """The same pairs in the same splits, and the same loss of a model on them, in both formats."""
    task = TASKS["single_double_quote"]
    drawn = {split: load_pairs(task, tokenizer, n, split, BLOCK) for split, n in (("train", 150), ("heldout", 50))}
    pairs = [(pair, task.answers) for split in drawn.values() for pair in texts(split, tokenizer)]
    model = GPT.load(tiny(tmp_path / "model")).requires_grad_(False)
    for name, text in (("a.jsonl", as_jsonl(pairs)), ("a.csv", as_csv(pairs))):
        file = task_of(write(tmp_path / name, text))
        for split, theirs in drawn.items():
            ours = load_pairs(file, tokenizer, 500, split, BLOCK)
            assert sorted(as_pairs(ours)) == sorted(as_pairs(theirs))
            assert ours.answer.tolist() == theirs.answer.tolist() and ours.wrong.tolist() == theirs.wrong.tolist()
            assert loss_of(margins(model, ours)) == pytest.approx(loss_of(margins(model, theirs)), rel=1e-5)


def test_text_and_token_ids_are_the_same_pairs_in_the_same_splits(tokenizer, tmp_path):
    pairs = many_answers()
    encode = tokenizer.encode_ordinary
    ids = [([encode(p) for p in prompts], [encode(a)[0] for a in answers]) for prompts, answers in pairs]
    mixed = [((a, encode(b)), (x, encode(y)[0])) for (a, b), (x, y) in pairs]
    files = [task_of(write(tmp_path / f"{name}.jsonl", as_jsonl(p))) for name, p in (("t", pairs), ("i", ids), ("m", mixed))]
    for split in ("train", "heldout"):
        text, *others = (load_pairs(replace(f, name="one"), tokenizer, 100, split, BLOCK) for f in files)
        assert all(same(text, other) for other in others)


def test_each_pair_has_its_own_answers_and_prompts_of_any_length(tokenizer, tmp_path):
    pairs = many_answers()
    encode = tokenizer.encode_ordinary
    expected = sorted((tuple(tuple(encode(p)) for p in prompts), [encode(a)[0] for a in answers]) for prompts, answers in pairs)
    path = write(tmp_path / "a.jsonl", as_jsonl(pairs))
    assert all_of(path, tokenizer) == expected == all_of(write(tmp_path / "a.csv", as_csv(pairs)), tokenizer)
    train = load_pairs(task_of(path), tokenizer, 1000, "train", BLOCK)
    assert torch.equal(train.wrong, train.answer.view(-1, 2).flip(1).flatten())
    assert answer_ids(train) == sorted(encode(a)[0] for a in NAMES_ASKED)
    assert (train.last[::2] != train.last[1::2]).any()


def test_a_pair_of_a_file_is_in_one_split_whatever_the_seed_and_the_company(tokenizer, tmp_path):
    pairs = many_answers()
    task, less = (task_of(write(tmp_path / n, as_jsonl(p))) for n, p in (("a.jsonl", pairs), ("b.jsonl", pairs[::-1][:70])))
    train, heldout = (set(as_pairs(load_pairs(task, tokenizer, 100, split, BLOCK))) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 100 and not train & heldout and 10 <= len(heldout) <= 40
    for task in (task, less):
        for seed in (1, 2):
            assert set(as_pairs(load_pairs(task, tokenizer, 100, "train", BLOCK, seed))) <= train
            assert set(as_pairs(load_pairs(task, tokenizer, 100, "heldout", BLOCK, seed))) <= heldout


def test_pairs_of_two_answers_are_turned_so_that_the_same_comes_first(tokenizer, tmp_path):
    path = tmp_path / "turned.jsonl"
    pairs = [{"prompts": [f"x = [{i}", f"x = [[{i}"], "answers": ["]\n", "]]\n"]} for i in range(100)]
    path.write_text("\n".join(json.dumps(pair) for pair in pairs))
    straight = load_pairs(task_of(str(path)), tokenizer, 60, "train", 64)
    for pair in pairs[1::2]:
        pair["prompts"].reverse()
        pair["answers"].reverse()
    path.write_text("\n".join(json.dumps(pair) for pair in pairs))
    turned = load_pairs(task_of(str(path)), tokenizer, 100, "train", 64)
    assert turned.answer[::2].unique().tolist() == tokenizer.encode_ordinary("]\n")
    # each prompt still has its own answer
    own = dict(zip(map(tuple, straight.prompts()), straight.answer.tolist()))
    found = dict(zip(map(tuple, turned.prompts()), turned.answer.tolist()))
    assert len(own.keys() & found.keys()) > 60 and all(found[prompt] == own[prompt] for prompt in own.keys() & found.keys())
    # where the answers are not two, nothing is turned
    pairs[0]["answers"] = [" value", " name"]
    path.write_text("\n".join(json.dumps(pair) for pair in pairs))
    assert len(load_pairs(task_of(str(path)), tokenizer, 100, "train", 64).answer[::2].unique()) > 1


def test_a_files_pairs_are_drawn_by_seed_and_fewer_are_the_first_of_more(tokenizer, tmp_path):
    task = task_of(write(tmp_path / "a.jsonl", as_jsonl(written_pairs())))
    few, more, other = (load_pairs(task, tokenizer, n, "train", BLOCK, seed) for n, seed in ((20, 0), (60, 0), (20, 1)))
    assert len(few) == 20 and as_pairs(few) == as_pairs(more)[:20] == as_pairs(more.first(20)) != as_pairs(other)
    assert len(more.first(1000)) == 60


@pytest.mark.parametrize("text", [
    lambda: as_jsonl(many_answers()).replace("\n", "\r\n"), lambda: "\n" + as_jsonl(many_answers()) + "\n  \n",
    lambda: "\ufeff" + as_jsonl(many_answers()), lambda: as_jsonl(many_answers())[:-1],
    lambda: "".join(json.dumps({"answers": a, "prompts": p}, ensure_ascii=False) + "\n" for p, a in many_answers())],
    ids=["windows", "blank lines", "mark of order", "no last newline", "keys in another order"])
def test_jsonl_files_as_people_have_them(text, tokenizer, tmp_path):
    expected = all_of(write(tmp_path / "a.jsonl", as_jsonl(many_answers())), tokenizer)
    assert all_of(write(tmp_path / "b.jsonl", text()), tokenizer) == expected


@pytest.mark.parametrize("text", [
    lambda: as_csv(many_answers(), "\r\n"), lambda: as_csv(many_answers()).replace("\n", "\r\n"), lambda: "\ufeff" + as_csv(many_answers()),
    lambda: as_csv(many_answers()) + "\n,,,,\n\n", lambda: as_csv(many_answers()).replace("clean", " Clean ", 1)],
    ids=["windows rows", "windows texts", "mark of order", "empty rows", "header as typed"])
def test_csv_files_as_people_have_them(text, tokenizer, tmp_path):
    expected = all_of(write(tmp_path / "a.jsonl", as_jsonl(many_answers())), tokenizer)
    assert all_of(write(tmp_path / "b.csv", text()), tokenizer) == expected


def test_a_json_string_may_hold_what_other_programs_take_for_a_line_end(tokenizer, tmp_path):
    pairs = [((f"{a}\u2028\x85 é", f"{b}\u2028 é"), answers) for (a, b), answers in many_answers()]
    raw = "".join(json.dumps({"prompts": p, "answers": a}, ensure_ascii=False) + "\n" for p, a in pairs)
    assert len(all_of(write(tmp_path / "a.jsonl", raw), tokenizer)) == 100


@pytest.mark.parametrize("name, expected", [
    ("quotes.jsonl", "quotes"), ("my quotes, é.JSONL", "my_quotes__é"), ("a.b.csv", "a.b"), ("...jsonl", "pairs"), (".csv.jsonl", "csv"), ("x;y$(z).csv", "x_y__z_")])
def test_a_file_names_its_task(name, expected, tokenizer, tmp_path):
    folder = tmp_path / "my folder"
    folder.mkdir()
    text = as_csv if name.lower().endswith("csv") else as_jsonl
    path = write(folder / name, text(many_answers()))
    folder.chmod(0o555)  # nothing is written beside it
    task = task_of(path)
    folder.chmod(0o755)
    assert task.name == expected and name in task.description and task.file.path == path
    assert task.file.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert os.listdir(folder) == [name] and len(load_pairs(task, tokenizer, 9, "train", BLOCK)) == 9


# --- files that are not as they should be: line 3 of a .jsonl, the second pair of a .csv ----------

GOOD = {"prompts": ["a = ", "b = "], "answers": [" name", " value"]}
BAD_LINES = {
    "not JSON": ('{"prompts": [', "not JSON"), "a digit too many": ("9" * 5000, "not JSON"), "too deep": ("[" * 99999, "not JSON"),
    "not an object": ("[1, 2]", "not an object"), "no prompts": ({"answers": ["x", "y"]}, "'prompts'"), "no answers": ({"prompts": ["x", "y"]}, "'answers'"),
    "three prompts": ({**GOOD, "prompts": ["a", "b", "c"]}, "a list of two"), "one text": ({**GOOD, "prompts": "ab"}, "a list of two"),
    "a number for a prompt": ({**GOOD, "prompts": ["a", 3]}, "neither text nor a list of token ids"),
    "true for an id": ({**GOOD, "prompts": ["a", [True]]}, "neither text nor a list of token ids"),
    "half an id": ({**GOOD, "prompts": ["a", [1.5]]}, "neither text nor a list of token ids"),
    "no answer": ({**GOOD, "answers": [" name", None]}, "neither text nor a token id"),
    "the same answers": ({**GOOD, "answers": [" name", " name"]}, "answers are the same"),
    "the same prompts": ({**GOOD, "prompts": ["a = ", "a = "]}, "prompts are the same"),
    "an empty prompt": ({**GOOD, "prompts": ["", "a"]}, "a prompt is empty"), "no ids": ({**GOOD, "prompts": [[], "a"]}, "a prompt is empty"),
    "an empty answer": ({**GOOD, "answers": ["", " name"]}, "an answer is empty"),
    "a long prompt": ({**GOOD, "prompts": ["a", [5] * 65]}, "65 tokens, and the model takes 64"),
    "an id too high": ({**GOOD, "prompts": [[1, 2048], "a"]}, "token 2048 is outside the vocabulary of 2048"),
    "a negative id": ({**GOOD, "answers": [-1, " name"]}, "token -1 is outside the vocabulary"),
    "an answer of several tokens": ({**GOOD, "answers": [" unquestionable", " name"]}, "' unquestionable' is not a single token"),
    "twice": (json.dumps({"prompts": many_answers()[0][0], "answers": [" key", " item"]}), "the two prompts of line 1"),
    "twice, the other way round": ({"prompts": many_answers()[0][0][::-1], "answers": [" key", " item"]}, "the two prompts of line 1"),
    "half a surrogate pair": ('{"prompts": ["\\ud800", "a"], "answers": [" name", " value"]}', "surrogates"),
}
BAD_ROWS = {
    "too few cells": ("a,b,c", "3 cells"), "too many cells": ("a,b,c,d,e,f", "6 cells"), "an open quote": ('"a,b,n,c,d', "not CSV"),
    "text after a quote": ('"a"b,c,n,d,e', "not CSV"), "the same answers": (' name,a,n, name,b', "answers are the same"),
    "an empty prompt": (" name,,n, value,b", "a prompt is empty"), "a long cell": (f" name,{'x' * 140000},n, value,b", "not CSV"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_of_a_jsonl_is_named(bad, tokenizer, tmp_path, capsys):
    line, says = BAD_LINES[bad]
    lines = as_jsonl(many_answers()).splitlines()
    lines[2:2] = [line if isinstance(line, str) else json.dumps(line)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    model = tiny(tmp_path / "model", block_size=64)
    refused([f"--task={path}", f"--model={model}"], f"{path}, line 3: ", capsys, says)
    with pytest.raises(ValueError, match="line 3: "):  # in whichever split it would be
        load_pairs(task_of(path), tokenizer, 1, "heldout", 64), load_pairs(task_of(path), tokenizer, 1, "train", 64)


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_of_a_csv_is_named_by_its_first_line(bad, tmp_path, capsys):
    row, says = BAD_ROWS[bad]
    header, *rows = as_csv(many_answers()).split("\n")
    # each pair takes three lines, for both its prompts hold a newline: the second begins at the fifth
    path = write(tmp_path / "a.csv", "\n".join([header, *rows[:3], row, *rows[3:]]))
    refused([f"--task={path}"], f"{path}, line 5: ", capsys, says)


@pytest.mark.parametrize("name, text, says", [
    ("a.jsonl", as_jsonl(many_answers()).encode() + b'{"prompts": ["\xff', "line 101: it is not UTF-8"), ("a.jsonl", as_jsonl(many_answers()).encode("utf-16"), "line 1: it is not UTF-8"),
    ("a.csv", as_csv(many_answers()).encode("utf-16"), "line 1: it is not UTF-8"),
    ("a.jsonl", as_jsonl(many_answers(63)), "63 pairs; a task needs at least 64"), ("a.jsonl", "", "0 pairs"), ("a.csv", "", "header"),
    ("a.csv", as_csv(many_answers()).split("\n", 1)[1], "line 1: a header"), ("a.csv", "clean,corrupted,answer\na,b,c\n", "clean, corrupted, answer, wrong"),
    ("a.csv", as_csv(many_answers()).replace(",", ";"), "wrong;clean;note;answer;corrupted"), ("a.csv", "clean,clean,corrupted,answer,wrong\n", "once"),
    ("a.jsonl", "[\n" + as_jsonl(many_answers()), "line 1: it is not JSON"), ("a.json", as_jsonl(many_answers()), "ends in .jsonl or .csv")],
    ids=["not UTF-8", "utf-16", "csv in utf-16", "63 pairs", "empty", "empty csv", "no header", "no wrong", "semicolons", "a column twice", "an array", "json"])
def test_a_file_that_is_none_is_one_line_and_exit_2(name, text, says, tmp_path, capsys):
    refused([f"--task={write(tmp_path / name, text)}"], says, capsys)


def test_a_file_that_is_not_there_is_one_line_and_exit_2(tmp_path, capsys):
    refused([f"--task={tmp_path}/a.jsonl"], f"cannot read the pairs in {tmp_path}/a.jsonl: No such file", capsys)
    refused(["--task=nowhere.csv"], "nowhere.csv", capsys, "No such file")
    (tmp_path / "b.csv").mkdir()
    refused([f"--task={tmp_path}/b.csv"], "b.csv", capsys, "directory")
    refused(["--task=folder/for_while"], "'folder/for_while' is no task", capsys)


def test_the_message_shows_how_the_tokenizer_splits_an_answer(tokenizer, tmp_path):
    pairs = many_answers() + [(("p", "q"), (" unquestionable", " name"))]
    with pytest.raises(ValueError) as error:
        load_pairs(task_of(write(tmp_path / "a.jsonl", as_jsonl(pairs))), tokenizer, 9, "train", BLOCK)
    shown = str(error.value).split("splits it into ")[1]
    assert "".join(map(ast.literal_eval, re.findall("'[^']*'", shown))) == " unquestionable" and shown.count("'") > 2


def test_the_command_prints_two_pairs_of_a_file_and_how_many_it_has(tokenizer, tmp_path, capsys):
    pairs = many_answers() + [((many_answers()[i][0][0], "z ="), (" name", " value")) for i in range(10)]
    path = write(tmp_path / "my pairs.jsonl", as_jsonl(pairs))
    assert main([f"--task={path}"]) == 0
    out = capsys.readouterr().out
    assert "=== my_pairs: pairs from my pairs.jsonl\n" in out and out.count("   -> ") == 4
    train, heldout = (load_pairs(task_of(path), tokenizer, 200, split, BLOCK) for split in ("train", "heldout"))
    assert f"{len(train)} training and {len(heldout)} held-out pairs, 5 distinct answers" in out
    known = sum(prompt in prompts(train) for prompt in prompts(heldout))
    assert known and f"; {known} of the held-out prompts stand in training pairs too" in out


def test_the_command_scores_a_model_on_all_held_out_pairs_of_a_file(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "a.csv", as_csv(many_answers()))
    model_dir = tiny(tmp_path / "model")
    assert main([f"--task={path}", f"--model={model_dir}"]) == 0
    _, row, note = capsys.readouterr().out.splitlines()
    pairs = load_pairs(task_of(path), tokenizer, 500, "heldout", BLOCK)
    model = GPT.load(model_dir).requires_grad_(False)
    assert float(row.split()[1]) == pytest.approx(task_loss(last_logits(model, pairs), pairs).item(), abs=6e-4)
    assert note == f"(on the {len(pairs)} held-out pairs that {path} has)"
    assert main([f"--task={path}", f"--model={model_dir}", "--pairs=5"]) == 0
    assert "(on the" not in capsys.readouterr().out


def test_answer_ids_are_the_distinct_answers(tokenizer):
    assert answer_ids(load_pairs(TASKS["var_swap"], tokenizer, 5, "train", BLOCK)) == sorted(tokenizer.encode_ordinary(a)[0] for a in (" x", " y"))
    assert all(type(i) is int for i in answer_ids(make_pairs())) and answer_ids(make_pairs(200)) == list(range(30))
