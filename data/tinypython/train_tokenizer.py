"""Trains the vocabulary: 2047 BPE tokens with the published pattern, half on idioms, half on code.

tokenizer.tiktoken in this directory was made by this script with its defaults under Python 3.11,
from an earlier edition of the idioms. The same inputs (the idioms, their seed, and the standard
library of that version) give the same bytes. Takes about half a minute.

    pip install -r requirements-extra.txt
    python data/tinypython/train_tokenizer.py [--out=tokenizer.tiktoken]
                                              [--source=stdlib|installed|packages|FOLDER|FILE]
"""

import base64
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # run as a script, from wherever

from config import as_script, bounded, die, parse, write_atomic  # noqa: E402
from data.tinypython.idioms import programs  # noqa: E402
from data.tinypython.sources import check_source, chunks, documents_of  # noqa: E402
from data.tinypython.tokenizer import DEFAULT, EOT_ID, PATTERN  # noqa: E402


@dataclass
class TokenizerConfig:
    out: str = str(DEFAULT)
    source: str = "stdlib"  # of real code, as for prepare.py
    characters: int = bounded(5_000_000, at_least=1)  # of each part
    seed: int = 0  # of the idioms


def first(texts: Iterable[str], characters: int) -> list[str]:
    """The first of the texts, until they hold so many characters."""
    taken = []
    for text in texts:
        if characters <= 0:
            break
        taken.append(text)
        characters -= len(text)
    return taken


def new_tokenizer():
    """One to be trained. It comes first: better to miss the package now than after the reading."""
    try:
        import rustbpe
    except ImportError:
        die("rustbpe is not installed: pip install -r requirements-extra.txt")
    return rustbpe.Tokenizer()


def train(tokenizer, texts: list[str]) -> list[tuple[bytes, int]]:
    """(token, rank) of every token, by rank. ValueError where there is too little text."""
    tokenizer.train_from_iterator(iter(texts), vocab_size=EOT_ID, pattern=PATTERN)
    ranks = [(bytes(token), rank) for token, rank in tokenizer.get_mergeable_ranks()]
    if len(ranks) != EOT_ID:
        raise ValueError(
            f"too little text for {EOT_ID} tokens (it gave {len(ranks)}); use a larger source"
        )
    return sorted(ranks, key=lambda pair: pair[1])


def main(argv: list[str]) -> int:
    cfg = parse(TokenizerConfig, argv)
    tokenizer = new_tokenizer()

    def write(file) -> None:
        for token, rank in ranks:
            file.write(base64.b64encode(token) + b" %d\n" % rank)

    try:
        check_source(cfg.source)
        work = chunks(cfg.source, HERE / "wheels")
        documents = (text for chunk in work for text in documents_of(chunk, Counter()))
        code = first(documents, cfg.characters)
        if not code:
            raise ValueError(
                f"--source={cfg.source}: no Python file that parses; name another source"
            )
        texts = first(programs(cfg.seed), cfg.characters) + code
        ranks = train(tokenizer, texts)
        write_atomic(cfg.out, write)
    except (ValueError, OSError) as e:
        die(" ".join(str(e).split()))
    print(f"{cfg.out}: {len(ranks)} tokens from {sum(map(len, texts)):,} characters")
    return 0


if __name__ == "__main__":
    as_script(main)
