"""How much prepared data repeat themselves.

    python -m tools.repeats --data=data/tinypython --tokens=10_000_000,100_000_000,500_000_000

Of the first so many tokens of train: the share of lines (with something in them) that have come
before, and of runs of 32 tokens. Both are counted on a fair sample that is the same for equal text:
those whose hash is a multiple of a number, so that memory stays bounded.
"""
from dataclasses import dataclass

from config import as_script, die, parse

import numpy as np

from data.tinypython.tokenizer import DEFAULT, load_tokenizer
from tokens import read_data

RUN = 32  # tokens
PIECE = 1 << 21  # tokens that are looked at together
SAMPLE = 16  # one hash of so many is counted
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, and without a pattern in its bits


@dataclass
class RepeatsConfig:
    data: str = "data/tinypython"
    tokens: tuple = (10_000_000.0, 100_000_000.0)  # lengths to report on
    tokenizer: str = str(DEFAULT)
    every: bool = False  # count all hashes and not a sample


class Counter:
    """Of hashes that come piece by piece: how many, and how many have come before."""

    def __init__(self, sample: int):
        self.sample = np.uint64(sample)
        self.known = np.empty(0, np.uint64)  # sorted
        self.fresh = []  # still to be sorted in
        self.n_fresh = 0
        self.total = 0

    def add(self, hashes: np.ndarray) -> None:
        hashes = hashes[mixed(hashes) % self.sample == 0]
        self.total += len(hashes)
        self.fresh.append(hashes)
        self.n_fresh += len(hashes)
        if self.n_fresh > len(self.known):  # seldom, because each time all are sorted
            self.sort_in()

    def sort_in(self) -> None:
        self.known = np.union1d(self.known, np.concatenate([*self.fresh, self.known[:0]]))
        self.fresh = []
        self.n_fresh = 0

    @property
    def share(self) -> float:
        """Of all, those that were not the first of their kind."""
        self.sort_in()
        return 1 - len(self.known) / max(1, self.total)


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Other hashes of the same, whose low bits are as good as any."""
    return (hashes * FACTOR) >> np.uint64(32)


def runs(ids: np.ndarray) -> np.ndarray:
    """A hash of each run of RUN tokens, (n - RUN + 1,) uint64: a polynomial in the token ids."""
    n = len(ids) - RUN + 1
    hashes = np.zeros(max(0, n), np.uint64)
    for i in range(RUN):
        hashes = hashes * FACTOR + ids[i : i + len(hashes)].astype(np.uint64) + np.uint64(1)
    return hashes


def lines(ids: np.ndarray, ends: np.ndarray, blank: np.ndarray) -> tuple[np.ndarray, int]:
    """A hash of each whole line of the ids that is not blank, and where the last one ends.

    ends: (vocab,) whether a token ends a line; blank: whether it is nothing but space.
    """
    after = np.flatnonzero(ends[ids]) + 1
    if not len(after):
        return np.empty(0, np.uint64), 0
    starts = np.concatenate([[0], after[:-1]])
    position = np.arange(after[-1]) - np.repeat(starts, after - starts)
    # FACTOR to the power of the place in its line: equal lines get equal sums
    powers = np.full(int(position.max()) + 1, FACTOR)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    terms = (ids[: after[-1]].astype(np.uint64) + np.uint64(1)) * powers[position]
    hashes = np.add.reduceat(terms, starts)
    something = np.add.reduceat((~blank[ids[: after[-1]]]).astype(np.int64), starts) > 0
    return hashes[something], int(after[-1])


def kinds_of_token(tokenizer_path: str, vocab: int, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """(vocab,) bool: tokens that end a line, and tokens that are nothing but space."""
    tokenizer = load_tokenizer(tokenizer_path)
    ends = np.zeros(vocab, bool)
    blank = np.zeros(vocab, bool)
    for i in range(vocab):
        try:
            text = tokenizer.decode_single_token_bytes(i)
        except KeyError:  # an id that no token has
            continue
        ends[i] = b"\n" in text or i == eot
        blank[i] = not text.strip() or i == eot
    return ends, blank


def main(argv: list[str]) -> int:
    cfg = parse(RepeatsConfig, argv)
    try:
        ids, _, meta = read_data(cfg.data, 1)
        ends, blank = kinds_of_token(cfg.tokenizer, meta["vocab_size"], meta.get("eot", 0))
    except ValueError as e:
        die(e)
    sample = 1 if cfg.every else SAMPLE
    of_lines, of_runs = Counter(sample), Counter(sample)
    print(f"{'tokens':>14}  lines that have come before  runs of {RUN} tokens")
    run_at = line_at = 0
    for length in sorted(int(n) for n in cfg.tokens):
        stop = min(length, len(ids))
        while len(found := runs(ids[run_at : min(stop, run_at + PIECE)])):
            of_runs.add(found)
            run_at += len(found)
        while line_at < stop:
            found, used = lines(ids[line_at : min(stop, line_at + PIECE)], ends, blank)
            of_lines.add(found)
            line_at += used
            if used == 0:  # the rest of this length is less than a line
                break
        print(f"{stop:>14,}  {of_lines.share:>27.1%}  {of_runs.share:>18.2%}", flush=True)
        if stop < length:
            break
    return 0


if __name__ == "__main__":
    as_script(main)
