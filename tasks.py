"""The binary next-token tasks whose circuits we look for (paper Table 1), and a model on them.

- A task draws pairs of prompts that differ only where the behaviour is decided. The right token of
  one prompt is the wrong token of the other.
- `load_pairs(task, tokenizer, n, split)`: token ids, deterministic by seed; no pair is in both the
  `train` and the `heldout` split.
- `--task=FILE.jsonl` or `FILE.csv`, here and in every other script: pairs of your own, each with
  its own two answers (docs/tasks.md).
- `task_loss`: cross-entropy over the two candidate tokens at the last position, in nats.
- `margins`, `loss_of`, `calibrate`: a model on pairs; the scale and shift that a pruned one needs.
- `python tasks.py` prints two pairs of each task, a bar between tokens; with `--model=DIR`, the
  loss (nats) and the accuracy of a whole model on each.

Add a task: write a function that returns the two prompts, beside those in
data/tinypython/templates.py, and name it in `TASKS`.
"""
import hashlib
import math
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, nearest, parse

import torch
import torch.nn.functional as F
from torch import Tensor

from data.pairs import PairFile, read_pairs
from data.tinypython import templates
from data.tinypython.tokenizer import load_tokenizer, tokenizer_for, tokenizer_hash
from model import GPT
from tokens import tokenizer_of

# Activations of the widest site at a time: more leave the cache, and take longer and more memory.
WIDEST = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Task:
    """Pairs that `prompts` draws, all with the same two answers; or else those of `file`."""
    name: str
    description: str
    answers: tuple[str, ...] = ()  # right tokens of the first and of the second prompt
    prompts: Callable[[random.Random], tuple[str, str]] | None = None
    local: bool = False  # decided by the last eight tokens, whose bare presence may tell the answer
    file: PairFile | None = None


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
        width = int(last.max()) + 1
        return Pairs(self.ids[rows, :width], last, self.answer[rows], self.wrong[rows])

    def first(self, n: int) -> "Pairs":
        """The first n pairs, or all where they are fewer."""
        return self.take(torch.arange(min(n, len(self)), device=self.ids.device))

    def prompts(self) -> list[list[int]]:
        """The token ids of the 2n prompts, without the padding."""
        return [ids[: n + 1] for ids, n in zip(self.ids.tolist(), self.last.tolist())]

    def to(self, device) -> "Pairs":
        return Pairs(*(t.to(device) for t in (self.ids, self.last, self.answer, self.wrong)))


def answer_ids(pairs: Pairs) -> list[int]:
    """The distinct token ids that the pairs ask for, ascending; two, where all ask the same."""
    return torch.cat([pairs.answer, pairs.wrong]).unique().tolist()


def load_pairs(task: Task, tokenizer, n: int, split: str, block_size: int, seed: int = 0) -> Pairs:
    """n distinct pairs of the `train` or `heldout` split, each prompt at most block_size tokens;
    of a file that has fewer in the split, all those.

    tokenizer: a tiktoken.Encoding, or anything with `encode_ordinary`; for files also its `decode`
    and `n_vocab`.
    ValueError if it does not have an answer as a single token, if the task cannot give n pairs of
    that length, or if any line of the file is not as it should be.
    """
    # a generator of its own, so that no other draw anywhere changes the pairs
    rng = random.Random(f"{task.name} {split} {seed}")
    if task.file is None:
        prompts, answers = draw(task, tokenizer, n, split, block_size, rng)
    else:
        prompts, answers = pick(task.file, tokenizer, n, split, block_size, rng)
    width = max(map(len, prompts))
    answer = torch.tensor(answers)  # (n, 2)
    return Pairs(
        ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts]),
        last=torch.tensor([len(ids) - 1 for ids in prompts]),
        answer=answer.flatten(),
        wrong=answer.flip(1).flatten(),
    )


def draw(task: Task, tokenizer, n: int, split: str, block_size: int, rng: random.Random):
    """Token ids of 2n prompts, and n times those of the two answers."""
    answers = []
    for text in task.answers:
        ids = tokenizer.encode_ordinary(text)
        if len(ids) != 1:
            raise ValueError(f"task {task.name} needs {text!r} as a single token; this tokenizer "
                             f"splits it into {len(ids)}")
        answers += ids
    seen = set()
    prompts = []
    for _ in range(40 * n + 1000):  # a task with too few prompts must not be drawn from for ever
        if len(seen) == n:
            break
        pair = task.prompts(rng)
        if pair in seen or split_of(*pair) != split:
            continue
        encoded = [tokenizer.encode_ordinary(p) for p in pair]
        if max(map(len, encoded)) <= block_size:
            seen.add(pair)
            prompts += encoded
    if len(seen) < n:
        raise ValueError(f"task {task.name} gave only {len(seen)} of {n} {split} pairs of at most "
                         f"{block_size} tokens")
    return prompts, [answers] * n


def split_of(first: str, second: str) -> str:
    """`train` or `heldout`: the text alone says which, so that no seed can mix the two."""
    digest = hashlib.sha256(f"{first}\0{second}".encode()).digest()
    return "heldout" if digest[0] < 64 else "train"  # 64 of 256: a quarter


# --- pairs from a file -----------------------------------------------------------------------

def pick(file: PairFile, tokenizer, n: int, split: str, block_size: int, rng: random.Random):
    """Token ids of the prompts of n pairs of the file, and those of each pair's two answers. Where
    all pairs ask for the same two, the answer that stands first in the file comes first in each:
    what calibration shifts is that answer's logit."""
    found = []
    asked = []  # the answers of every line
    seen = {}  # the two prompts, in whatever order -> where they stand
    for line in file.lines:  # all, so that every call finds what is wrong anywhere
        try:
            prompts = [prompt_ids(prompt, tokenizer, block_size) for prompt in line.prompts]
            answers = [answer_id(answer, tokenizer) for answer in line.answers]
            # the same split whether a prompt is written as text or as ids
            texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in line.prompts]
            its_split = split_of(*texts)
            if prompts[0] == prompts[1]:
                raise ValueError("its two prompts are the same")
            if answers[0] == answers[1]:
                raise ValueError("its two answers are the same")
            other = seen.setdefault(frozenset(map(tuple, prompts)), line.number)
            if other != line.number:
                raise ValueError(f"it has the two prompts of line {other}")
        except ValueError as e:
            raise ValueError(f"{file.path}, line {line.number}: {e}") from e
        asked.append(answers)
        if its_split == split:
            found.append((prompts, answers))
    if len(set(map(frozenset, asked))) == 1:
        found = [pair if pair[1] == asked[0] else (pair[0][::-1], asked[0]) for pair in found]
    if not found:
        raise ValueError(f"no pair of {file.path} falls into the {split} split; it needs more")
    rng.shuffle(found)  # a file may be sorted, and the first pairs must be as the rest
    found = found[:n]
    return [ids for prompts, _ in found for ids in prompts], [answers for _, answers in found]


def prompt_ids(prompt: str | list[int], tokenizer, block_size: int) -> list[int]:
    ids = token_ids(prompt, tokenizer)
    if not ids:
        raise ValueError("a prompt is empty")
    if len(ids) > block_size:
        raise ValueError(f"a prompt has {len(ids)} tokens, and the model takes {block_size}")
    return ids


def answer_id(answer: str | int, tokenizer) -> int:
    """The token of an answer. ValueError, which shows how it is split, where it is not one."""
    ids = token_ids(answer if isinstance(answer, str) else [answer], tokenizer)
    if not ids:
        raise ValueError("an answer is empty")
    if len(ids) != 1:
        pieces = " ".join(repr(tokenizer.decode([token])) for token in ids)
        raise ValueError(f"the answer {answer!r} is not a single token: this tokenizer splits it "
                         f"into {pieces}")
    return ids[0]


def token_ids(written: str | list[int], tokenizer) -> list[int]:
    if isinstance(written, str):
        return tokenizer.encode_ordinary(written)
    for token in written:
        if not 0 <= token < tokenizer.n_vocab:
            raise ValueError(f"token {token} is outside the vocabulary of {tokenizer.n_vocab}")
    return written


# --- a model on pairs ------------------------------------------------------------------------

def load_model(model_dir: str, tokenizer_path: str, device: str = "cpu"):
    """A frozen model and a tokenizer, from their paths. A published directory may hold a tokenizer
    of its own, which takes the place of the default.

    ValueError or OSError, in one line, where one is unusable or they do not match.
    """
    model = GPT.load(model_dir, device).requires_grad_(False)
    tokenizer_path = tokenizer_for(model_dir, tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{tokenizer_path} has {tokenizer.n_vocab} tokens, the model {model_dir} "
                         f"has {model.config.vocab_size}; give --tokenizer=FILE")
    if tokenizer_of(model_dir) not in ("", tokenizer_hash(tokenizer_path)):
        raise ValueError(f"{model_dir} was trained on data of another tokenizer than "
                         f"{tokenizer_path}; give --tokenizer=FILE")
    return model, tokenizer


def last_logits(model: GPT, pairs: Pairs, nodes=None) -> Tensor:
    """Logits (2n, vocab) at each prompt's last token; nothing else is unembedded."""
    return unembed_last(model, model.run(model.embed(pairs.ids), nodes=nodes), pairs)


def unembed_last(model: GPT, h: Tensor, pairs: Pairs) -> Tensor:
    """The final stream (2n, T, d_model) -> logits (2n, vocab) at each prompt's last token."""
    rows = torch.arange(len(h), device=h.device)
    h = h[rows, pairs.last].unsqueeze(1)
    return model.unembed(h, pairs.ids[rows, pairs.last].unsqueeze(1)).squeeze(1)


def margin_of(logits: Tensor, pairs: Pairs) -> Tensor:
    """Logits (2n, vocab) -> right minus wrong logit of each prompt (2n,)."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, pairs.answer] - logits[rows, pairs.wrong]


def batches_of(pairs: Pairs, size: int) -> list[Pairs]:
    """The pairs in their order, `size` at a time."""
    order = torch.arange(len(pairs), device=pairs.ids.device)
    return [pairs.take(part) for part in order.split(size)]


def rows_at_once(model: GPT, n_tokens: int) -> int:
    """How many rows of `n_tokens` tokens to run at a time where no gradient is wanted."""
    config = model.config
    widest = max(config.site_width(site) for site in model.sites)
    return max(1, WIDEST[model.lm_head.weight.device.type] // (n_tokens * widest))


def fitting_batches(model: GPT, pairs: Pairs) -> list[Pairs]:
    """The pairs in their order, as many at a time as `rows_at_once` says."""
    tokens_of_a_pair = 2 * pairs.ids.shape[1]
    return batches_of(pairs, rows_at_once(model, tokens_of_a_pair))


@torch.no_grad()
def margins(model: GPT, pairs: Pairs, nodes=None) -> Tensor:
    """Right minus wrong logit of each prompt (2n,)."""
    parts = fitting_batches(model, pairs)
    return torch.cat([margin_of(last_logits(model, part, nodes), part) for part in parts])


def task_loss(logits: Tensor, pairs: Pairs) -> Tensor:
    """Logits (2n, vocab) at the last positions -> mean cross-entropy over the two candidates, nats.

    A coin flip is ln 2 = 0.693. The mean is over both prompts of every pair (paper A.5).
    """
    return F.softplus(-margin_of(logits, pairs)).mean()


def loss_of(margin: Tensor) -> float:
    """Task loss in nats from `margins`."""
    return F.softplus(-margin).mean().item()


def losses_of_pairs(margin: Tensor) -> Tensor:
    """Of each pair, (n,), nats: the mean over its two prompts, whose losses hang together."""
    return F.softplus(-margin).view(-1, 2).mean(1)


# --- calibration: pruning weakens the logits, and tilts them toward one answer -----------------

def calibrated(margin: Tensor, scale, shift) -> Tensor:
    """The margins (2n,) after scaling and shifting (first answer's - second answer's logit)."""
    # prompts of a pair alternate: +shift where the first answer is right, else -shift
    sign = 1.0 - 2.0 * (torch.arange(len(margin), device=margin.device) % 2)
    return scale * margin + shift * sign


# Where prompts are separable the best scale is infinite: a small pull toward 1 keeps it finite.
PULL = 1e-4


def calibrate(margin: Tensor, steps: int = 32) -> tuple[float, float]:
    """The scale and shift that minimise the task loss of margins (2n,).

    The paper takes 16 steps of L-BFGS (A.5). Two numbers and a convex loss are sooner found by
    Newton's method, and to the last digit. The scale is not negative: a model that is always wrong
    has not learned the task.
    """
    margin = margin.detach().double().cpu()
    size = margin.square().mean().sqrt()  # in units of which the search goes on
    if not 0 < size < math.inf:  # nothing to fit, or nothing that can be fitted
        return 1.0, 0.0
    shift_of = calibrated(torch.zeros_like(margin), 0.0, 1.0)
    sides = torch.stack([margin / size, shift_of])  # (2, 2n)
    pull = torch.tensor([PULL / size**2, 0.0], dtype=torch.double)
    aim = torch.tensor([size, 0.0], dtype=torch.double)
    least = 1e-12 * torch.eye(2, dtype=torch.double)  # where the curvature has all but gone

    def loss_at(fit: Tensor) -> float:
        return (F.softplus(-(fit @ sides)).mean() + (pull * (fit - aim) ** 2).sum()).item()

    fit = torch.zeros(2, dtype=torch.double)  # where no answer is sure the curvature is at its best
    loss = loss_at(fit)
    for _ in range(steps):
        wrong = torch.sigmoid(-(fit @ sides))
        slope = 2 * pull * (fit - aim) - (sides @ wrong) / len(margin)
        curvature = (sides * (wrong * (1 - wrong))) @ sides.T / len(margin)
        step = torch.linalg.solve(curvature + 2 * pull.diag() + least, slope)
        tried = loss_at(fit - step)
        while not tried < loss and step.abs().max() > 1e-9:
            step = step / 2  # too far: where answers are sure the loss is flatter
            tried = loss_at(fit - step)
        if step.abs().max() <= 1e-9:
            break
        fit = fit - step
        loss = tried
    scale = (fit[0] / size).item()
    if scale < 0:  # the loss is convex in both: the best allowed scale is 0, its best shift 0
        return 0.0, 0.0
    return scale, fit[1].item()


# --- the tasks -------------------------------------------------------------------------------

TASKS = {task.name: task for task in (
    Task("single_double_quote", "close a string with the quote that opened it",
         ("')\n", "\")\n"), templates.single_double_quote, local=True),
    Task("bracket_counting", "close a list by its nesting depth",
         ("]\n", "]]\n"), templates.bracket_counting, local=True),
    Task("set_or_string",
         "add to a set, or append to a string, by how the variable was initialised",
         (".add", " +="), templates.set_or_string),
    Task("set_or_string_fixedvarname",
         "add to a set, or append to a string, by how `current` was initialised",
         (".add", " +="), templates.set_or_string_fixedvarname),
    Task("final_kwarg",
         "a parameter after one with a default needs a default, else the signature may end",
         ("=None", "):\n"), templates.final_kwarg, local=True),
    Task("class_init", "in __init__, copy the parameter that the attribute is named after",
         (" name", " value"), templates.class_init, local=True),
    Task("with_as", "name the file after `with open(...)`; an assignment goes on otherwise",
         (" as", " if"), templates.with_as),
    Task("bracket_brace", "a value follows a key of a dict, a comma an element of a list",
         (":", ","), templates.bracket_brace, local=True),
    Task("with_open", "open a file to read or to write, by the name of its variable",
         ("r", "w"), templates.with_open, local=True),
    Task("for_while", "a for loop needs `in`, a while loop's condition may end",
         (" in", ":\n"), templates.for_while, local=True),
    Task("else_elif", "a colon ends `else`, a condition follows `elif`",
         (":\n", " not"), templates.else_elif, local=True),
    Task("fstring_brace", "a brace opens a value in an f-string, a plain string has words",
         (" {", " not"), templates.fstring_brace),
    Task("if_ternary",
         "end the condition of an if statement, or go on to the else of an expression",
         (":\n", " else"), templates.if_ternary),
    Task("var_swap", "`x, y = y, x` and `y, x = x, y`",
         (" x", " y"), templates.var_swap, local=True),
    Task("indent_for", "indent the body of a for loop by one level more than the loop",
         (" " * 7, " " * 11), templates.indent_for),
    Task("lambda_func", "a colon after a lambda's parameter, a bracket after a function's name",
         (":", "("), templates.lambda_func, local=True),
    Task("if_equals", "compare in a condition, assign in a statement",
         (" ==", " ="), templates.if_equals, local=True),
    Task("enumerate_range", "two loop variables enumerate, one counts",
         (" enumerate", " range"), templates.enumerate_range, local=True),
    Task("var_if", "a colon ends the condition of an if, a newline an assignment",
         (":\n", "\n"), templates.var_if, local=True),
    Task("while_return_true", "a colon after `while True`, a newline after `return True`",
         (":\n", "\n"), templates.while_return_true, local=True),
)}


def task_of(name: str) -> Task:
    """The task of that name, or of the pairs in that file.

    ValueError that names the nearest task, or the line of the file that is wrong.
    """
    stem, dot, ending = os.path.basename(name).rpartition(".")
    if dot and ending.lower() in ("jsonl", "csv"):
        # a folder's name: no space, and no dot in front, which would hide it
        safe = re.sub(r"[^\w.-]", "_", stem).lstrip(".") or "pairs"
        return Task(safe, f"pairs from {os.path.basename(name)}", file=read_pairs(name))
    if name in TASKS:
        return TASKS[name]
    if dot or os.path.dirname(name):
        raise ValueError(f"'{name}' is no task; a file of pairs ends in .jsonl or .csv")
    raise ValueError(f"unknown task '{name}'; the nearest is '{nearest(name, TASKS)}' "
                     "(python tasks.py shows all)")


# --- the command -----------------------------------------------------------------------------

@dataclass
class TasksConfig:
    task: str = "all"   # or one, or a file of pairs: .jsonl, .csv
    model: str = ""     # a directory in the published format: print its loss; "" = print pairs
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    pairs: int = bounded(500, at_least=1)  # held-out pairs for the loss
    seed: int = bounded(0, at_least=0)


def show(task: Task, tokenizer, seed: int) -> None:
    """Print two pairs of a task, a bar between tokens; of a file also how many it has."""
    hint = " (the last tokens tell)" if task.local else ""
    print(f"\n\n=== {task.name}: {task.description}{hint}")
    if task.file is None:
        pairs = load_pairs(task, tokenizer, 2, "train", 256, seed)
    else:
        n = len(task.file.lines)
        # of any length: there is no model here that could be too short for them
        pairs = load_pairs(task, tokenizer, n, "train", sys.maxsize, seed)
        print(about(pairs, load_pairs(task, tokenizer, n, "heldout", sys.maxsize, seed)))
        pairs = pairs.first(2)
    for ids, answer in zip(pairs.prompts(), pairs.answer.tolist()):
        tokens = [tokenizer.decode([t]) for t in ids]
        print("-" * 60)
        print("|".join(tokens).replace("\n|", "\n") + f"|   -> {tokenizer.decode([answer])!r}")


def about(train: Pairs, heldout: Pairs) -> str:
    """What is to be known of the pairs of a file."""
    text = f"{len(train)} training and {len(heldout)} held-out pairs"
    text += f", {len({*answer_ids(train), *answer_ids(heldout)})} distinct answers"
    seen = set(map(tuple, train.prompts()))
    known = sum(tuple(ids) in seen for ids in heldout.prompts())
    if known:  # pairs are what is kept apart, and one prompt can stand in several
        text += f"; {known} of the held-out prompts stand in training pairs too"
    return text


def score(cfg: TasksConfig, tasks: list[Task]) -> None:
    """Print the loss and the share of right answers of a model, task by task."""
    model, tokenizer = load_model(cfg.model, cfg.tokenizer)
    print(f"{'task':28}  loss (nats)  accuracy")
    for task in tasks:
        block_size = model.config.block_size
        pairs = load_pairs(task, tokenizer, cfg.pairs, "heldout", block_size, cfg.seed)
        margin = margins(model, pairs)
        accuracy = (margin > 0).float().mean()
        print(f"{task.name:28} {loss_of(margin):12.3f} {accuracy:9.3f}", flush=True)
        if len(pairs) < cfg.pairs:
            print(f"(on the {len(pairs)} held-out pairs that {task.file.path} has)")


def main(argv: list[str]) -> int:
    cfg = parse(TasksConfig, argv)
    try:
        tasks = list(TASKS.values()) if cfg.task == "all" else [task_of(cfg.task)]
        if cfg.model:
            score(cfg, tasks)
            return 0
        tokenizer = load_tokenizer(cfg.tokenizer)
        for task in tasks:
            show(task, tokenizer, cfg.seed)
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
