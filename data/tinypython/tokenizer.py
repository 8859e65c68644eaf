"""The 2048-token vocabulary: 2047 BPE tokens and <|endoftext|> (paper A.6). Never uses the network.

The files are read here and not by tiktoken.load, which keeps copies in a cache that is keyed by
path alone: after a retraining it would silently go on giving the old vocabulary.
"""

import base64
import hashlib
import json
import os
from pathlib import Path

import tiktoken

# As published. A run of punctuation takes the newlines after it with it, so that `")` and a newline
# can be a single token: the answer to a task is one token, whatever follows it.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOT = "<|endoftext|>"
EOT_ID = 2047
DEFAULT = Path(__file__).with_name("tokenizer.tiktoken")


def load_tokenizer(path: str | os.PathLike = DEFAULT) -> tiktoken.Encoding:
    """The tokenizer of a `.tiktoken` file (ours) or of a directory (the published one).

    Such a directory holds `encoder.json` and `vocab.bpe` in the style of GPT-2. ValueError, in one
    line, where a file is missing or malformed, or the ids do not fit below EOT.
    """
    path = Path(path)
    try:
        ranks = read_gpt2(path) if path.is_dir() else read_tiktoken(path)
        check_ranks(ranks)
    except FileNotFoundError as error:
        raise ValueError(f"no tokenizer at {path}: {error.filename} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the tokenizer {path}: {reason}") from None
    return tiktoken.Encoding(
        "tinypython", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: EOT_ID}
    )


def tokenizer_hash(path: str | os.PathLike = DEFAULT) -> str:
    """sha256 of the file or, of a published directory, of its two files."""
    path = Path(path)
    files = [path / "encoder.json", path / "vocab.bpe"] if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def check_ranks(ranks: dict[bytes, int]) -> None:
    """ValueError where the ids are not distinct ones below EOT, or some text has no tokens."""
    distinct = len(set(ranks.values())) == len(ranks)
    if not distinct or not all(0 <= rank < EOT_ID for rank in ranks.values()):
        raise ValueError(f"its ids are not distinct numbers below {EOT_ID}")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("some single byte has no token, so it cannot encode every text")


def read_tiktoken(file: Path) -> dict[bytes, int]:
    """Lines of `base64(token) rank`."""
    ranks = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks


def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling: a printable byte is itself, the others follow from chr(256) on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable}
    byte.update({chr(256 + i): b for i, b in enumerate(others)})
    return byte


def read_gpt2(directory: Path) -> dict[bytes, int]:
    """`encoder.json`: {token: id}; `vocab.bpe`: the merges, one a line, in their order."""
    byte = byte_of_character()
    encoder = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    ranks = {}
    for token, rank in encoder.items():
        if token != EOT:
            ranks[bytes(byte[character] for character in token)] = rank

    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    ids = [encoder[merge.replace(" ", "")] for merge in merges]
    if ids != sorted(ids):  # tiktoken merges the pair of lowest id first
        raise ValueError("the merges of vocab.bpe are not in the order of the ids in encoder.json")
    return ranks
