"""The binary next-token tasks whose circuits we look for (paper Table 1).

- A task draws pairs of prompts that differ only where the behaviour is decided. The right token of
  one prompt is the wrong token of the other.
- `load_pairs(task, tokenizer, n, split)`: token ids, deterministic by seed; no pair is in both the
  `train` and the `heldout` split.
- `task_loss`: cross-entropy over the two candidate tokens at the last position, in nats.
- `python tasks.py` prints two pairs of each task, a bar between tokens; with `--model=DIR`, the loss (nats) and
  the accuracy of a whole model on each.

Add a task: write a function that returns the two prompts, and name it in `TASKS`.
"""
import hashlib
import random
import sys
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from config import die, nearest, parse
from data.tinypython.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Task:
    name: str
    description: str
    answers: tuple[str, str]  # right tokens of the first and of the second prompt
    prompts: Callable[[random.Random], tuple[str, str]]
    local: bool = False  # decided within the last eight tokens, where their bare presence may tell the answer


@dataclass
class Pairs:
    """n pairs as 2n prompts: rows 2i and 2i+1 are a pair. Shorter prompts are padded on the right,
    where a causal model never looks; `last` is the position of each prompt's last token."""
    ids: Tensor     # (2n, T) int64
    last: Tensor    # (2n,)
    answer: Tensor  # (2n,) right token
    wrong: Tensor   # (2n,)

    def __len__(self) -> int:
        return len(self.ids) // 2

    def take(self, pairs: Tensor) -> "Pairs":
        """The given pairs (m,), cut to the longest of their prompts."""
        rows = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
        last = self.last[rows]
        return Pairs(self.ids[rows, : int(last.max()) + 1], last, self.answer[rows], self.wrong[rows])

    def to(self, device) -> "Pairs":
        return Pairs(self.ids.to(device), self.last.to(device), self.answer.to(device), self.wrong.to(device))


def task_loss(logits: Tensor, pairs: Pairs) -> Tensor:
    """logits (2n, vocab) at the last positions -> mean cross-entropy over the two candidates, in nats.

    A coin flip is ln 2 = 0.693. The mean is over both prompts of every pair (paper A.5).
    """
    rows = torch.arange(len(logits), device=logits.device)
    return F.softplus(logits[rows, pairs.wrong] - logits[rows, pairs.answer]).mean()


def load_pairs(task: Task, tokenizer, n: int, split: str, block_size: int, seed: int = 0) -> Pairs:
    """n distinct pairs of the `train` or `heldout` split, each prompt at most block_size tokens.

    tokenizer: a tiktoken.Encoding, or anything with `encode_ordinary`. ValueError if it does not
    have the task's answers as single tokens, or if the task cannot give n pairs of that length.
    """
    answers = [tokenizer.encode_ordinary(a) for a in task.answers]
    for text, ids in zip(task.answers, answers):
        if len(ids) != 1:
            raise ValueError(f"task {task.name} needs {text!r} as a single token; this tokenizer splits it into {len(ids)}")
    (first,), (second,) = answers
    rng = random.Random(f"{task.name} {split} {seed}")
    seen, rows = set(), []
    for _ in range(40 * n + 1000):
        if len(seen) == n:
            break
        pair = task.prompts(rng)
        digest = hashlib.sha256("\0".join(pair).encode()).digest()
        if digest in seen or split != ("heldout" if digest[0] < 64 else "train"):  # a quarter is held out
            continue
        encoded = [tokenizer.encode_ordinary(p) for p in pair]
        if max(map(len, encoded)) <= block_size:
            seen.add(digest)
            rows += zip(encoded, (first, second), (second, first))
    if len(seen) < n:
        raise ValueError(f"task {task.name} gave only {len(seen)} of {n} {split} pairs of at most {block_size} tokens")
    width = max(len(ids) for ids, _, _ in rows)
    return Pairs(torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in rows]),
                 *(torch.tensor(column) for column in zip(*((len(ids) - 1, a, w) for ids, a, w in rows))))


# --- ordinary code for the prompts to stand in -----------------------------------------------

NOUNS = """account answer batch block book box buffer button cache card cell city client color column config count
customer data day device document email entry event field file folder game graph group header image index input item
job key label layer letter level limit line list map match message model month name node note number object offset
option order page param parent part path pattern payment person picture player point port price product project query
queue record region report request result room route row rule sample score section sensor server session shape signal
size sound source stage state station step store stream string student table tag target task team test text ticket
time title token total tree type unit user value vector version view weight width window word worker year""".split()
VERBS = """add build check clean close collect compare copy count create delete draw fetch filter find format get group
join list load log make mark merge move open parse pick plot print process read remove render report reset run save
scan search select send set show skip sort split start stop store sum test trim update use validate write""".split()
ADJECTIVES = """active bad big blue bright closed cold dark done empty extra fast final first free full good green hidden
high invalid large last late local long lost low main missing new next old open plain private public quick ready red
second short simple slow small strong total unknown valid warm wrong""".split()

VARIABLES = """a age b c color count d data email end first height index info item k key label last left length level limit
line message n name node number offset path price result right row score size source speed start state step target text
title total user value weight width word x y""".split()
GROWN = "acc body buffer chars collected current found history known out output pending seen summary unique used visited".split()
FILES = [pair.split("/") for pair in """in_path/out_path in_file/out_file infile/outfile reader/writer read_path/write_path
source_path/target_path config_path/log_path""".split()]  # to read / to write


def words(r: random.Random, low: int = 1, high: int = 6) -> str:
    return " ".join(r.choice(r.choice((NOUNS, VERBS, ADJECTIVES))) for _ in range(r.randint(low, high)))


def number(r: random.Random) -> str:
    return str(r.randint(0, 99) if r.random() < 0.9 else r.randint(100, 999))


def line(r: random.Random) -> str:
    """One line of code that has nothing to do with the task; strings come in both quote styles."""
    a, b, q = r.choice(VARIABLES), r.choice(VARIABLES), r.choice("'\"")
    return r.choice((
        lambda: f"{a} = {number(r)}",
        lambda: f"{a} = {b} + {number(r)}",
        lambda: f"{a} = {r.choice(VERBS)}_{r.choice(NOUNS)}({b})",
        lambda: f"{a} = {q}{words(r, 1, 2)}{q}",
        lambda: f"{a}.{r.choice(VERBS)}({b})",
        lambda: f"{r.choice(('print', 'log', 'send', 'show'))}({q}{words(r)}{q})",
        lambda: f"# {words(r, 2)}",
        lambda: f"{a} = [{number(r)}, {number(r)}]",
        lambda: f"if {a}:\n    {b} = {number(r)}",
        lambda: f"if {a} > {number(r)}:\n    return {b}",
    ))()


def indented(text: str, by: int = 4) -> str:
    return "".join(" " * by + row + "\n" for row in text.split("\n"))


def function(r: random.Random, *, low: int = 0, high: int = 4) -> str:
    """A function header and a few lines of its body, ending with a newline."""
    params = ", ".join(r.sample(VARIABLES, r.randint(0, 3)))
    text = f"def {r.choice(VERBS)}_{r.choice(NOUNS)}({params}):\n"
    if r.random() < 0.2:
        text += f'    """{words(r, 2).capitalize()}."""\n'
    return text + "".join(indented(line(r)) for _ in range(r.randint(low, high)))


def finished(r: random.Random) -> str:
    """A whole function, and blank lines after it."""
    return function(r, high=3) + f"    return {r.choice(VARIABLES)}\n" + "\n" * r.randint(1, 2)


def assignment(r: random.Random) -> str:
    return f"{r.choice(VARIABLES)} = {r.choice((number(r), r.choice(VARIABLES)))}"


def own_word(shared: str, choices: list[str]) -> str:
    """For a word that only one prompt of a pair has: the rest decides it, so that no two pairs have a prompt in common."""
    return random.Random(shared).choice(choices)


def condition(r: random.Random, *, long: bool = False) -> str:
    """A condition that ends in a name or a number; a long one has at least seven tokens."""
    a, b = r.choice(VARIABLES), r.choice(VARIABLES)
    short = (lambda: a, lambda: f"not {a}", lambda: f"{a} > {number(r)}", lambda: f"{a} == {b}", lambda: f"{a} in {b}")
    longer = (lambda: f"len({r.choice(NOUNS)}s) {r.choice(('>', '<', '=='))} {number(r)}", lambda: f"{a} % {number(r)} == {number(r)}")
    return r.choice(longer if long else short + longer)()


# --- the tasks -------------------------------------------------------------------------------

def single_double_quote(r):
    before = function(r)
    call = r.choice(("print", "log", "send", "show", "warn", "write", f"{r.choice(NOUNS)}.append",
                     f"{r.choice(VERBS)}_{r.choice(NOUNS)}", "raise ValueError"))
    text = words(r)
    return f"{before}    {call}('{text}", f'{before}    {call}("{text}'


def bracket_counting(r):
    before = function(r)
    element = r.choice((number, number, lambda r: r.choice(VARIABLES)))
    row = ", ".join(element(r) for _ in range(r.randint(1, 6)))
    start = f"{before}    {r.choice(VARIABLES)} = "
    return f"{start}[{row}", f"{start}[[{row}"


def set_or_string_fixedvarname(r):
    before, between = function(r, high=2), "".join(indented(line(r)) for _ in range(r.randint(0, 2)))
    item, items = r.choice(VARIABLES), r.choice(NOUNS) + "s"
    loop = f"    for {item} in {items}:\n" + (indented(line(r), 8) if r.random() < 0.4 else "")
    return tuple(f"{before}    current = {start}\n{between}{loop}        current" for start in ("set()", '""'))


def set_or_string(r):
    name, other = r.sample(GROWN, 2)
    item = r.choice(VARIABLES)
    start, growth = r.choice((("set()", f".add({item})"), ('""', f" += {item}"), ("[]", f".append({item})"), ("0", " += 1")))
    lines = [f"    {other} = {start}\n"] * (r.random() < 0.5)  # another variable, of any of these types
    growths = [f"        {other}{growth}\n"] * (len(lines) and r.random() < 0.5)
    before, place, between = function(r, high=2), r.randint(0, len(lines)), [indented(line(r))] * r.randint(0, 1)
    loop = f"    for {item} in {r.choice(NOUNS)}s:\n"
    return tuple("".join((before, *lines[:place], f"    {name} = {value}\n", *lines[place:], *between, loop, *growths, f"        {name}"))
                 for value in ("set()", '""'))


def final_kwarg(r):
    *plain, decided, last = r.sample(VARIABLES, r.randint(4, 5))
    start = f"{finished(r)}def {r.choice(VERBS)}_{r.choice(NOUNS)}({', '.join(plain)}, {decided}"
    return f"{start}=None, {last}", f"{start}, {last}"


def class_init(r):
    others = r.sample([v for v in VARIABLES if v not in ("name", "value")], r.randint(0, 3))
    params = ", ".join(["self", *others, *r.choice((("name", "value"), ("value", "name")))])
    start = f"{finished(r)}class {r.choice(NOUNS).capitalize()}:\n    def __init__({params}):\n"
    start += "".join(f"        self.{x} = {x}\n" for x in others)
    return f"{start}        self.name =", f"{start}        self.value ="


def with_as(r):
    before, q = function(r), r.choice("'\"")
    path, mode = r.choice((("config_path", "r"), ("read_path", "r"), ("csv_path", "r"), ("log_file", "r"),
                           ("output_file", "w"), ("output_path", "w"), ("write_path", "w"), ("log_path", "w")))
    call = f"open({path}, {q}{mode}{q})"
    return f"{before}    with {call}", f"{before}    {own_word(before + call, ['f', 'f', 'f', 'file', 'handle', 'fp'])} = {call}"


def bracket_brace(r):
    element = r.choice((number, lambda r: r.choice(VARIABLES)))
    items = [element(r) for _ in range(2 * r.randint(1, 2) + 1)]
    index, noun = number(r), r.choice(NOUNS)
    remark = r.choice((f"{noun}s[{index}", f"see [{index}] for the {noun}", f"a {{{noun}}}", f"{noun}: {{{index}"))
    start = f"{function(r)}{f'    # {remark}{chr(10)}' * (r.random() < 0.3)}    {r.choice(VARIABLES)} = "
    entries = "".join(f"{key}: {value}, " for key, value in zip(items[::2], items[1::2]))
    return f"{start}{{{entries}{items[-1]}", f"{start}[{', '.join(items)}"


def with_open(r):
    read, write = r.choice(FILES)
    start, end = f"{function(r)}    {r.choice(('with ', 'f = ', 'file = '))}open(", r.choice((", '", ', "'))
    return start + read + end, start + write + end


def for_while(r):
    before, name = function(r), r.choice(VARIABLES)
    return f"{before}    for {name}", f"{before}    while {name}"


def else_elif(r):
    start = f"{function(r, high=3)}    if {condition(r)}:\n{indented(line(r), 8)}        {assignment(r)}\n"
    return f"{start}    else", f"{start}    elif"


def fstring_brace(r):
    before, call = function(r), r.choice(("print", "print", "print", "log", f"{r.choice(NOUNS)}s.append"))
    q, text = r.choice("'\""), f"the {words(r, 6, 8)} is"
    return f"{before}    {call}(f{q}{text}", f"{before}    {call}({q}{text}"


def if_ternary(r):
    start, test = f"{function(r)}    {assignment(r)}", condition(r, long=True)
    return f"{start}\n    if {test}", f"{start} if {test}"


def var_swap(r):
    before = function(r)
    return f"{before}    x, y = y,", f"{before}    y, x = x,"


def indent_for(r):
    before = f"{function(r, high=3)}    if {condition(r)}:\n{indented(line(r), 8)}        {assignment(r)}\n"
    items = r.choice(NOUNS) + "s"
    loop = r.choice((f"for i, {r.choice(VARIABLES)} in enumerate({items}):\n", f"for i in range(len({items})):\n",
                     f"for key, value in {items}.items():\n"))
    return f"{before}    {loop}", f"{before}        {loop}"


def lambda_func(r):
    before, name = function(r), r.choice("xyabncdkmvwpst")
    return f"{before}    {own_word(before + name, VERBS)} = lambda {name}", f"{before}    def {name}"


def if_equals(r):
    before, name = function(r), r.choice(VARIABLES)
    return f"{before}    if {name}", f"{before}    {name}"


def enumerate_range(r):
    before, i = function(r), r.choice("iiiijk")
    return f"{before}    for {i}, {own_word(before + i, VARIABLES)} in", f"{before}    for {i} in"


def var_if(r):
    before, name, value = function(r), r.choice(VARIABLES), r.choice(("True", "False"))
    return f"{before}    if {name} == {value}", f"{before}    {name} = {value}"


def while_return_true(r):
    before = function(r)
    return f"{before}    while True", f"{before}    return True"


TASKS = {task.name: task for task in (
    Task("single_double_quote", "close a string with the quote that opened it", ("')\n", "\")\n"), single_double_quote, local=True),
    Task("bracket_counting", "close a list by its nesting depth", ("]\n", "]]\n"), bracket_counting, local=True),
    Task("set_or_string", "add to a set, or append to a string, by how the variable was initialised", (".add", " +="), set_or_string),
    Task("set_or_string_fixedvarname", "add to a set, or append to a string, by how `current` was initialised",
         (".add", " +="), set_or_string_fixedvarname),
    Task("final_kwarg", "a parameter after one with a default needs a default, else the signature may end",
         ("=None", "):\n"), final_kwarg, local=True),
    Task("class_init", "in __init__, copy the parameter that the attribute is named after", (" name", " value"), class_init, local=True),
    Task("with_as", "name the file after `with open(...)`; an assignment goes on otherwise", (" as", " if"), with_as),
    Task("bracket_brace", "a value follows a key of a dict, a comma an element of a list", (":", ","), bracket_brace, local=True),
    Task("with_open", "open a file to read or to write, by the name of its variable", ("r", "w"), with_open, local=True),
    Task("for_while", "a for loop needs `in`, a while loop's condition may end", (" in", ":\n"), for_while, local=True),
    Task("else_elif", "a colon ends `else`, a condition follows `elif`", (":\n", " not"), else_elif, local=True),
    Task("fstring_brace", "a brace opens a value in an f-string, a plain string has words", (" {", " not"), fstring_brace),
    Task("if_ternary", "end the condition of an if statement, or go on to the else of an expression", (":\n", " else"), if_ternary),
    Task("var_swap", "`x, y = y, x` and `y, x = x, y`", (" x", " y"), var_swap, local=True),
    Task("indent_for", "indent the body of a for loop by one level more than the loop", (" " * 7, " " * 11), indent_for),
    Task("lambda_func", "a colon after a lambda's parameter, a bracket after a function's name", (":", "("), lambda_func, local=True),
    Task("if_equals", "compare in a condition, assign in a statement", (" ==", " ="), if_equals, local=True),
    Task("enumerate_range", "two loop variables enumerate, one counts", (" enumerate", " range"), enumerate_range, local=True),
    Task("var_if", "a colon ends the condition of an if, a newline an assignment", (":\n", "\n"), var_if, local=True),
    Task("while_return_true", "a colon after `while True`, a newline after `return True`", (":\n", "\n"), while_return_true, local=True),
)}


# --- the command -----------------------------------------------------------------------------

@dataclass
class TasksConfig:
    task: str = "all"
    model: str = ""     # a directory in the published format: print its loss; "" = print pairs
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    pairs: int = 500    # held-out pairs for the loss
    seed: int = 0


def main(argv: list[str]) -> int:
    cfg = parse(TasksConfig, argv)
    if cfg.task != "all" and cfg.task not in TASKS:
        die(f"unknown task '{cfg.task}'; the nearest is '{nearest(cfg.task, TASKS)}', and --task=all shows all of: {', '.join(TASKS)}")
    if cfg.pairs < 1:
        die(f"pairs must be at least 1, not {cfg.pairs}")
    tasks = [TASKS[cfg.task]] if cfg.task != "all" else TASKS.values()
    try:
        if cfg.model:
            return score(cfg, tasks)
        tokenizer = load_tokenizer(cfg.tokenizer)
        for task in tasks:
            pairs = load_pairs(task, tokenizer, 2, "train", 256, cfg.seed)
            print(f"\n\n=== {task.name}: {task.description}{' (the last tokens tell)' * task.local}")
            for ids, last, answer in zip(pairs.ids.tolist(), pairs.last.tolist(), pairs.answer.tolist()):
                tokens = [tokenizer.decode([t]) for t in ids[: last + 1]]
                print("-" * 60 + "\n" + "|".join(tokens).replace("\n|", "\n") + f"|   -> {tokenizer.decode([answer])!r}")
    except (ValueError, OSError) as e:
        die(str(e))
    return 0


def score(cfg: TasksConfig, tasks) -> int:
    """Print the loss and the share of right answers of a model, task by task."""
    from circuit import load, margins  # it stands above this file

    model, tokenizer = load(cfg.model, cfg.tokenizer)
    print(f"{'task':28}  loss (nats)  accuracy")
    for task in tasks:
        pairs = load_pairs(task, tokenizer, cfg.pairs, "heldout", model.config.block_size, cfg.seed)
        margin = margins(model, pairs)
        print(f"{task.name:28} {F.softplus(-margin).mean():12.3f} {(margin > 0).float().mean():9.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
