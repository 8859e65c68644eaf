"""tasks.py: pairs differ only where the behaviour is decided, never leak between splits, and stand in ordinary code."""
import ast
import math
import os
import random
import re

import pytest
import torch
import torch.nn.functional as F

from data.tinypython.filler import FILES
from data.tinypython.tokenizer import DEFAULT, EOT_ID, load_tokenizer, tokenizer_hash
from model import GPT, GPTConfig
from tasks import TASKS, Pairs, Task, last_logits, load_model, load_pairs, main, task_loss

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


def refused(argv: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and err.count("\n") == 1


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
