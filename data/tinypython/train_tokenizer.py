"""Trains the vocabulary: 2047 BPE tokens with the published pattern, half on idioms, half on real code.

tokenizer.tiktoken in this directory was made by this script with its defaults under Python 3.11; the same inputs (the
idioms' seed and the standard library of that version) give the same bytes. Takes about half a minute.

    pip install -r requirements-extra.txt
    python data/tinypython/train_tokenizer.py [--out=tokenizer.tiktoken] [--source=stdlib|installed|packages|DIR]
"""

import argparse
import base64
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from idioms import programs
from prepare import HERE, read_source, real_code
from tokenizer import DEFAULT, EOT_ID, PATTERN


def until(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--source", default="stdlib", help="as for prepare.py")
    parser.add_argument("--characters", type=int, default=5_000_000, help="of each part")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        import rustbpe
    except ImportError:
        sys.exit("train_tokenizer.py: rustbpe is not installed: pip install -r requirements-extra.txt")

    code = list(until(real_code(read_source(options.source, HERE / "wheels"), Counter()), options.characters))
    if not code:
        sys.exit(f"train_tokenizer.py: --source={options.source}: no Python file that parses; name another source")
    texts = [*until(programs(options.seed), options.characters), *code]
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size=EOT_ID, pattern=PATTERN)
    ranks = sorted(tokenizer.get_mergeable_ranks(), key=lambda pair: pair[1])
    if len(ranks) != EOT_ID:
        sys.exit(f"train_tokenizer.py: too little text for {EOT_ID} tokens (it gave {len(ranks)}); use a larger source")

    temporary = options.out.with_name(f".{options.out.name}.tmp")
    temporary.write_bytes(b"".join(base64.b64encode(bytes(token)) + b" %d\n" % rank for token, rank in ranks))
    os.replace(temporary, options.out)
    print(f"{options.out}: {len(ranks)} tokens from {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
