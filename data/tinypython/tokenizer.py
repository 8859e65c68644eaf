"""Tokenizers: our 2048 tokens, of which 2047 are BPE's (paper A.6), and the published ones.

- `.tiktoken`: ours, as data/tinypython/train_tokenizer.py writes it.
- A directory with `encoder.json` and `vocab.bpe`: as the authors' store has it.
- `tokenizer.json`, or a directory that holds one: as the hub has it, a byte-level BPE.

Never uses the network. The files are read here and not by tiktoken.load, which keeps copies in a
cache that is keyed by path alone: after a retraining it would silently go on giving the old
vocabulary.
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
EOT_ID = 2047  # in our own files; of the others `tokenizer.eot_token` tells it
DEFAULT = Path(__file__).with_name("tokenizer.tiktoken")

Ids = dict[str, int]      # special token -> id
Ranks = dict[bytes, int]  # token that BPE makes -> id


def load_tokenizer(path: str | os.PathLike = DEFAULT) -> tiktoken.Encoding:
    """The tokenizer of a file or directory of one of the three kinds above.

    ValueError, in one line, where a file is missing or malformed, or needs what tiktoken has not.
    """
    path = Path(path)
    try:
        if path.suffix == ".json" or hub_file(path).exists() and path.is_dir():
            pattern, ranks, special = read_hub(hub_file(path))
        else:
            pattern = PATTERN
            ranks, special = read_gpt2(path) if path.is_dir() else read_tiktoken(path)
        check_ids(ranks, special)
        return tiktoken.Encoding(
            "tinypython", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    except FileNotFoundError as error:
        raise ValueError(f"no tokenizer at {path}: {error.filename} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError):
            reason = f"it lacks {reason}"
        raise ValueError(f"cannot read the tokenizer {path}: {reason}") from None


def hub_file(path: Path) -> Path:
    return path / "tokenizer.json" if path.is_dir() else path


def tokenizer_in(directory: str | os.PathLike) -> str | None:
    """The directory, if it holds a tokenizer beside whatever else: what `load_tokenizer` takes."""
    folder = Path(directory)
    published = ((folder / "tokenizer.json",), (folder / "encoder.json", folder / "vocab.bpe"))
    whole = any(all(file.exists() for file in files) for files in published)
    return str(directory) if whole else None


def tokenizer_for(model_dir: str, path: str) -> str:
    """What a model of that directory is used with: `path`, unless that is our default and the
    directory holds the model's own."""
    if os.path.abspath(path) != str(DEFAULT):
        return path
    return tokenizer_in(model_dir) or path


def tokenizer_hash(path: str | os.PathLike = DEFAULT) -> str:
    """sha256 of the file or, of the store's directory, of its two files."""
    path = Path(path)
    files = [hub_file(path)]
    if not files[0].exists():
        files = [path / "encoder.json", path / "vocab.bpe"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def check_ids(ranks: Ranks, special: Ids) -> None:
    """ValueError where two tokens share an id, or some text has no tokens."""
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) < len(ids) or any(type(i) is not int or i < 0 for i in ids):
        raise ValueError("its ids are not distinct whole numbers from 0 on")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("some single byte has no token, so it cannot encode every text")


def read_tiktoken(file: Path) -> tuple[Ranks, Ids]:
    """Lines of `base64(token) rank`; EOT is in none of them."""
    ranks = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks, {EOT: EOT_ID}


def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling: a printable byte is itself, the others follow from chr(256) on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable}
    byte.update({chr(256 + i): b for i, b in enumerate(others)})
    return byte


def read_gpt2(directory: Path) -> tuple[Ranks, Ids]:
    """`encoder.json`: {token: id}; `vocab.bpe`: the merges, one a line, in their order."""
    vocabulary = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    # "#version: 0.2", or "# BPE Encoder v3"; a merge of the token # is possible, but never first
    lines = lines[1:] if lines and lines[0].startswith("#") else lines
    return split_vocabulary(vocabulary, [line.split(" ") for line in lines if line], {})


def read_hub(file: Path) -> tuple[str, Ranks, Ids]:
    """`tokenizer.json`, as the package `tokenizers` writes it: pattern, tokens, special tokens."""
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise ValueError("it is no byte-level BPE")
    if content.get("normalizer"):
        raise ValueError("it changes the text before it encodes it (a normalizer)")
    merges = []
    for merge in model["merges"]:  # "a b" or, of late, ["a", "b"]
        merges.append(merge.split(" ") if isinstance(merge, str) else merge)
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    ranks, special = split_vocabulary(model["vocab"], merges, added)
    return pattern_of(content.get("pre_tokenizer")), ranks, special


def pattern_of(pre_tokenizer: dict | None) -> str:
    """By which a `tokenizer.json` cuts text before it merges; the published one if it names none.

    ValueError where it cuts in another way than by a regular expression.
    """
    # The default of "ByteLevel" would be GPT-2's pattern, which cuts `")` from its newline. No
    # model of this format was trained so, and a file that names no pattern means the published one.
    pre_tokenizer = pre_tokenizer or {"type": "ByteLevel"}
    patterns = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] != "ByteLevel" or step.get("add_prefix_space"):
            raise ValueError(f"its pre_tokenizer does what this reader cannot: {step}")
    if len(patterns) > 1:
        raise ValueError("its pre_tokenizer cuts text by two patterns, one after the other")
    return patterns[0] if patterns else PATTERN


def split_vocabulary(vocabulary: Ids, merges: list, added: Ids) -> tuple[Ranks, Ids]:
    """What BPE makes, by its bytes, and the special tokens: those `added`, and any that is neither
    a byte nor made by a merge. ValueError where merges and ids do not go together."""
    byte = byte_of_character()
    made = [left + right for left, right in merges]
    absent = [token for token in made if token not in vocabulary]
    if absent:
        raise ValueError(f"a merge gives {absent[0]!r}, which has no id")
    ids = [vocabulary[token] for token in made]
    if ids != sorted(ids):  # tiktoken merges the pair of lowest id first
        raise ValueError("the merges are not in the order of their tokens' ids")

    mergeable = {*made, *byte}
    ranks = {}
    special = dict(added)
    for token, rank in vocabulary.items():
        if token in mergeable and token not in added:
            ranks[bytes(byte[character] for character in token)] = rank
        else:
            special.setdefault(token, rank)
    return ranks, special
