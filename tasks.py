"""The binary next-token tasks whose circuits we look for (paper Table 1).

- A task draws pairs of prompts that differ only where the behaviour is decided. The right token of
  one prompt is the wrong token of the other.
- `load_pairs(task, tokenizer, n, split)`: token ids, deterministic by seed; no pair is in both the
  `train` and the `heldout` split.
- `task_loss`: cross-entropy over the two candidate tokens at the last position, in nats.

Add a task: write a function that returns the two prompts, and name it in `TASKS`.
"""
import hashlib
import random
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Task:
    name: str
    description: str
    answers: tuple[str, str]  # right tokens of the first and of the second prompt
    prompts: Callable[[random.Random], tuple[str, str]]


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


TASKS = {task.name: task for task in (
    Task("single_double_quote", "close a string with the quote that opened it", ("')\n", "\")\n"), single_double_quote),
    Task("bracket_counting", "close a list by its nesting depth", ("]\n", "]]\n"), bracket_counting),
    Task("set_or_string_fixedvarname", "add to a set, or append to a string, by how `current` was initialised",
         (".add", " +="), set_or_string_fixedvarname),
)}


if __name__ == "__main__":
    for task in TASKS.values():
        print(f"\n{task.name}: {task.description}")
        for prompt, answer in zip(task.prompts(random.Random(0)), task.answers):
            print("-" * 60 + f"\n{prompt}   -> {answer!r}")
