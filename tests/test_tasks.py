"""tasks.py: pairs differ only where the behaviour is decided, never leak between splits, and stand in ordinary code."""
import ast
import math
import random
import re

import pytest
import torch

from data.tinypython.tokenizer import EOT_ID, load_tokenizer
from tasks import TASKS, Pairs, Task, load_pairs, task_loss

BLOCK = 128
# what the two prompts of a pair say differently, and nothing else
DECIDED_BY = {"single_double_quote": {("'", '"')}, "bracket_counting": {("", "[")},
              "set_or_string_fixedvarname": {("set()", '""')}}
COMPLETE = {".add": "(x)\n", " +=": " x\n"}  # what makes a statement of an answer that is only part of one
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


def difference(a, b):
    """What is left of two strings or tuples without their common beginning and common end."""
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    end = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y), min(len(a), len(b)))
    return a[: len(a) - end], b[: len(b) - end]


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def same(a: Pairs, b: Pairs) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("ids", "last", "answer", "wrong"))


# --- drawing ----------------------------------------------------------------------------------

def test_the_first_three_tasks_exist_under_their_own_names():
    assert set(DECIDED_BY) <= set(TASKS)
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
    for split in ("train", "heldout"):
        found = {difference(a, b) for a, b in texts(drawn[task.name][split], tokenizer)}
        assert found == DECIDED_BY.get(task.name, found)
        assert all(a != b and max(len(a), len(b)) < 16 for a, b in found)


@every_task
def test_prompts_of_a_pair_have_equal_last_tokens_and_counts(task, drawn):
    """A set and a string are written with unequal numbers of tokens; elsewhere the number gives nothing away."""
    for a, b in as_pairs(drawn[task.name]["train"]):
        assert a[-1] == b[-1]
        assert len(a) == len(b) or task.name.startswith("set_or_string")
        assert max(map(len, difference(a, b))) <= 2


@every_task
def test_answers_are_single_tokens_and_swapped_within_a_pair(task, tokenizer, drawn):
    first, second = (tokenizer.encode_ordinary(a) for a in task.answers)
    assert len(first) == len(second) == 1 and first != second
    for pairs in drawn[task.name].values():
        assert pairs.answer.tolist() == (first + second) * len(pairs)
        assert pairs.wrong.tolist() == (second + first) * len(pairs)


@every_task
def test_the_answer_is_the_token_that_the_whole_text_has_there(task, tokenizer, drawn):
    """Encoding prompt and answer together gives the prompt's tokens, then the answer's: no token spans the border."""
    pairs = drawn[task.name]["heldout"]
    for ids, answer in zip(prompts(pairs), pairs.answer.tolist()):
        text = tokenizer.decode([*ids, answer])
        assert tokenizer.encode_ordinary(text + COMPLETE.get(tokenizer.decode([answer]), ""))[: len(ids) + 1] == [*ids, answer]


@every_task
def test_the_right_answer_continues_to_valid_python_and_the_wrong_one_does_not(task, tokenizer, drawn):
    pairs = drawn[task.name]["heldout"]
    for ids, answer, wrong in zip(prompts(pairs), pairs.answer.tolist(), pairs.wrong.tolist()):
        right, false = (tokenizer.decode([*ids, t]) + COMPLETE.get(tokenizer.decode([t]), "") for t in (answer, wrong))
        assert parses(right), right
        if "(x)\n" not in (COMPLETE.get(a) for a in task.answers):  # both are valid syntax there; the type decides
            assert not parses(false), false


def test_the_set_or_string_answer_fits_the_value_that_current_holds(tokenizer, drawn):
    for pair in texts(drawn["set_or_string_fixedvarname"]["heldout"], tokenizer):
        for text, start in zip(pair, ("set()", '""')):
            assert re.findall(r"^ *current = (.*)$", text, re.M) == [start]
            assert text.endswith(" current")


def test_a_tokenizer_that_splits_an_answer_is_an_error_that_names_it():
    class Bytes:
        def encode_ordinary(self, text):
            return list(text.encode())

    for task in TASKS.values():
        long = next(a for a in task.answers if len(a) > 1)
        with pytest.raises(ValueError) as error:
            load_pairs(task, Bytes(), 10, "train", 1000)
        assert repr(long) in str(error.value) and "\n" not in str(error.value)


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
        start, length = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(difference(a, b)[0])
        shared.append((a[:start] + a[start + length :]).replace('"""', ""))
    single, double = ({i for i, t in enumerate(shared) if q in t} for q in "'\"")
    assert min(len(single), len(double)) > 0.1 * len(shared) and len(single & double) > 0.01 * len(shared)


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
