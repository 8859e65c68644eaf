"""The one reader of prepared data: token ids (uint16) of train and val, and meta.json.

- A side is one file, `train.bin`, or shards that are read as one: `train.0000.bin`, ...
- `read_data`: both sides and what meta.json says of them, checked against each other.
- `inputs_and_targets`: windows for training and evaluation.
- `random_windows`: a sample of the data, for means and for other references; `window_of`: how long
  its windows should be for a model.
- `bigram_log_probs`: what the next token is if only the current one is known.

Nothing here reads all of the data where prepare.py made them: what takes a full scan (the largest
id, the bigram counts) it has left beside them. What is wrong with a file is a ValueError of one
line that says how to get a good one.
"""
import hashlib
import json
import os
from collections.abc import Iterator

from config import read_toml

import numpy as np
import torch
from torch import Tensor

# Above so many tokens the counted bigram table takes gigabytes: evaluation then does without.
LARGEST_TABLE = 8192
PREPARE = "run python data/tinypython/prepare.py"
PUBLISHED_WINDOW = 256  # what the published models were trained on, whatever they could take
WINDOWS_A_BATCH = 32  # of `random_windows`: few enough for a large model on a laptop
PIECE = 1 << 24  # tokens at a time where all are looked at: they may not fit in memory


class Tokens:
    """Token ids of one file or of several, as one sequence (n,): mapped into memory, not read until
    they are used. len() and slices, which are arrays of uint16."""

    def __init__(self, files: list[np.ndarray]):
        self.files = files
        self.ends = np.cumsum([len(ids) for ids in files])  # of each file, in the whole

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, step = wanted.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read without gaps")
        pieces = []
        i = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            first = self.ends[i] - len(self.files[i])
            pieces.append(self.files[i][start - first : stop - first])
            start = min(stop, int(self.ends[i]))
            i += 1
        if len(pieces) == 1:  # as nearly always
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, "<u2")


def map_file(path: str) -> np.ndarray:
    """The token ids of one file, (n,) uint16. ValueError where it is missing, empty or cut off."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing; {PREPARE}")
    size = os.path.getsize(path)
    if size == 0:
        raise ValueError(f"{path} is empty; {PREPARE}")
    if size % 2:
        raise ValueError(f"{path} has an odd size ({size} bytes), so it is cut off; {PREPARE}")
    return np.memmap(path, dtype="<u2", mode="r")


def read_tokens(path: str, vocab_size: int, meta: dict | None = None) -> Tokens:
    """The token ids of a file or, where `meta` lists shards of that name, of those.

    ValueError where one is missing, empty, cut off or another than the one that `meta` describes,
    or holds an id past the vocabulary.
    """
    folder, name = os.path.split(path)
    side = name.removesuffix(".bin")
    shards = _listed(meta, side, folder)
    if not shards:
        ids = Tokens([map_file(path)])
        _check_ids(path, largest_id(ids), vocab_size)
        return ids

    files = []
    for shard in shards:
        shard_path = os.path.join(folder, shard["file"])
        ids = map_file(shard_path)
        if len(ids) != shard["tokens"]:
            raise ValueError(f"{shard_path} holds {len(ids)} uint16 tokens, but meta.json says "
                             f"{shard['tokens']}; {PREPARE}")
        if fingerprint(ids) != shard["fingerprint"]:
            raise ValueError(f"{shard_path} is not the file that meta.json describes, but of other "
                             f"data; {PREPARE}")
        _check_ids(shard_path, shard["largest_id"], vocab_size)
        files.append(ids)
    return Tokens(files)


def _listed(meta: dict | None, side: str, folder: str) -> list[dict]:
    """What meta.json says of the shards of a side; nothing of a single file."""
    try:
        shards = ((meta or {}).get("shards") or {}).get(side, [])
        return [{"file": str(shard["file"]), "tokens": int(shard["tokens"]),
                 "fingerprint": str(shard["fingerprint"]), "largest_id": int(shard["largest_id"])}
                for shard in shards]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{folder}/meta.json is unusable ({type(e).__name__}); {PREPARE}") from e


def _check_ids(path: str, largest: int, vocab_size: int) -> None:
    # embedding such an id would end in a crash far from here
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token id {largest}, past the vocabulary of {vocab_size}; "
                         "prepare the data again")


def largest_id(ids) -> int:
    """The largest of all ids, by a look at every one of them."""
    return max(int(ids[i : i + PIECE].max()) for i in range(0, len(ids), PIECE))


def read_data(folder: str, block_size: int) -> tuple[Tokens, Tokens, dict]:
    """The tokens of train and of val, and the content of meta.json.

    Of meta.json are used: `vocab_size`, and `val_parts`, {name: (first token, end)} in val.
    ValueError where a file is unusable, or where a part has no window of block_size + 1 tokens.
    """
    meta = _read_meta(os.path.join(folder, "meta.json"))
    train = read_tokens(os.path.join(folder, "train.bin"), meta["vocab_size"], meta)
    val = read_tokens(os.path.join(folder, "val.bin"), meta["vocab_size"], meta)
    _check_count(folder, "train", len(train), meta)
    _check_count(folder, "val", len(val), meta)

    _check_length("train.bin", len(train), block_size)
    for part, (start, end) in meta["val_parts"].items():
        name = f"val.bin part '{part}'"
        if not 0 <= start <= end <= len(val):
            raise ValueError(
                f"{name} should be tokens {start} to {end}, but the file holds {len(val)}; "
                "prepare the data again"
            )
        _check_length(name, end - start, block_size)
    return train, val, meta


def read_side(path: str, vocab_size: int) -> Tokens:
    """The tokens of one file, or of its shards. ValueError as of `read_tokens`, and where it is
    shorter than the meta.json beside it says."""
    folder, name = os.path.split(path)
    meta_path = os.path.join(folder, "meta.json")
    meta = None
    if name in ("train.bin", "val.bin") and os.path.exists(meta_path):
        meta = _read_meta(meta_path)
    data = read_tokens(path, vocab_size, meta)
    if meta is not None:
        _check_count(folder, name.removesuffix(".bin"), len(data), meta)
    return data


def vocab_of(folder: str) -> int:
    """The number of tokens that the data of `folder` know. ValueError where there are none."""
    return _read_meta(os.path.join(folder, "meta.json"))["vocab_size"]


def _read_meta(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        vocab_size = int(meta["vocab_size"])
        val_parts = {str(name): (int(a), int(b)) for name, (a, b) in meta["val_parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        # absent, not JSON, a key missing, a value of another kind: the remedy is the same
        raise ValueError(f"{path} is missing or unusable ({type(e).__name__}); {PREPARE}") from e
    return meta | {"vocab_size": vocab_size, "val_parts": val_parts}


def _check_count(folder: str, side: str, n_tokens: int, meta: dict) -> None:
    """A file that was cut off, or written with integers of another width, has another length."""
    counts = meta.get("tokens")
    if counts is None:  # data that another program prepared
        return
    try:
        expected = sum(part[side] for part in counts.values())
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{folder}/meta.json is unusable ({type(e).__name__}); {PREPARE}") from e
    if n_tokens != expected:
        raise ValueError(f"{folder}/{side}.bin holds {n_tokens} uint16 tokens, but meta.json says "
                         f"{expected}; {PREPARE}")


def tokenizer_of(model_dir: str) -> str:
    """The hash of the tokenizer of the data that a run was trained on; "" where nothing says so, as
    beside a published model."""
    path = os.path.join(model_dir, "train.toml")
    return read_toml(path).get("tokenizer_hash", "") if os.path.exists(path) else ""


def check_tokenizer(folder: str, tokenizer_hash: str) -> None:
    """ValueError where meta.json says that the data of `folder` have the ids of another tokenizer:
    with as many tokens, they would be read without complaint. Without one, nobody knows."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            prepared_with = json.load(f).get("tokenizer_hash", "")
    except (OSError, ValueError, AttributeError):
        return
    if prepared_with not in ("", tokenizer_hash):
        raise ValueError(f"{folder} was prepared with another tokenizer than the model's; "
                         f"{PREPARE} --out=FOLDER --tokenizer=TOKENIZER and give --data=FOLDER")


def fingerprint(ids: Tokens | np.ndarray) -> str:
    """Tells data from other data without reading all of it: its length and 256 pieces."""
    starts = np.linspace(0, max(0, len(ids) - 2048), 256).astype(np.int64)
    digest = hashlib.sha256(str(len(ids)).encode())
    for start in starts:
        digest.update(ids[start : start + 2048].tobytes())
    return digest.hexdigest()


def _check_length(name: str, n_tokens: int, block_size: int) -> None:
    """A window is block_size inputs and, shifted by one, as many targets."""
    if n_tokens <= block_size:
        raise ValueError(
            f"block_size {block_size} needs more than the {n_tokens} tokens of {name}; "
            "lower it or prepare more data"
        )


def inputs_and_targets(
    data: Tokens, starts: np.ndarray, block_size: int, device: str
) -> tuple[Tensor, Tensor]:
    """Windows of `data` at `starts` (B,), and the same shifted by one: each (B, T) int64."""
    # one token more than a window, for the last target
    rows = np.stack([data[s : s + block_size + 1] for s in starts])
    rows = torch.from_numpy(rows.astype(np.int64)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def random_windows(
    path: str, vocab_size: int, block_size: int, n_tokens: int, seed: int, device: str = "cpu"
) -> Iterator[Tensor]:
    """About `n_tokens` tokens of a file, or of its shards, as batches of ids, (up to 32,
    block_size) int64.

    Windows start anywhere and may overlap. ValueError as of `read_side`, and where the file is
    shorter than a window.
    """
    data = read_side(path, vocab_size)
    if len(data) < block_size:
        raise ValueError(
            f"{path} has {len(data)} tokens, fewer than one block of {block_size}; "
            "prepare the data again"
        )
    # all places are drawn at once, so that a sample does not depend on how it is batched
    n_windows = max(1, n_tokens // block_size)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(data) - block_size + 1, n_windows)
    for i in range(0, n_windows, WINDOWS_A_BATCH):
        rows = np.stack([data[s : s + block_size] for s in starts[i : i + WINDOWS_A_BATCH]])
        yield torch.from_numpy(rows.astype(np.int64)).to(device)


def window_of(model_dir: str, block_size: int, asked: int = 0) -> int:
    """Tokens of one window of data for a model of that block_size: as many as `asked` or, of 0, as
    it saw in training: by the train.toml of its directory or, without one, at most 256 (the
    published models take 1,024 tokens, but past the 256 of their training they are worse).

    ValueError where more is asked than the model takes, or train.toml is damaged.
    """
    if asked > block_size:
        raise ValueError(f"window {asked} exceeds the model's block_size {block_size}")
    if asked:
        return asked
    run = os.path.join(model_dir, "train.toml")
    if not os.path.exists(run):
        return min(PUBLISHED_WINDOW, block_size)
    trained = read_toml(run).get("block_size", block_size)
    if type(trained) is not int or trained < 1:
        raise ValueError(f"{run} has block_size = {trained!r}, which is no number of tokens")
    return min(trained, block_size)


def count_bigrams(ids, vocab: int) -> np.ndarray:
    """(vocab, vocab) int64: how often each token follows each other one."""
    counts = np.zeros(vocab * vocab, dtype=np.int64)
    for i in range(0, len(ids) - 1, PIECE):
        piece = ids[i : i + PIECE + 1].astype(np.int64)
        counts += np.bincount(piece[:-1] * vocab + piece[1:], minlength=vocab * vocab)
    return counts.reshape(vocab, vocab)


def read_bigrams(folder: str, meta: dict, n: int) -> np.ndarray | None:
    """`count_bigrams` of the n tokens of train as prepare.py left it, or None where it left none.

    ValueError where the file is not the one that belongs to these data.
    """
    if "bigrams" not in meta:
        return None
    path = os.path.join(folder, str(meta["bigrams"]))
    vocab = meta["vocab_size"]
    try:
        counts = np.load(path)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{path} is missing or unusable ({type(e).__name__}); {PREPARE}") from e
    if counts.shape != (vocab, vocab) or counts.sum() != n - 1:
        raise ValueError(f"{path} is not of the data beside it; {PREPARE}")
    return counts


def bigram_log_probs(train: Tokens, vocab: int, counts: np.ndarray | None = None) -> Tensor:
    """(vocab, vocab): log P(next | current) as counted in `train`, smoothed by the unigram.

    counts: those of `count_bigrams`, if they are known already.
    """
    if counts is None:
        counts = count_bigrams(train, vocab)
    counts = torch.from_numpy(counts).float()
    unigram = (counts.sum(0) + 1) / (counts.sum() + vocab)
    strength = 4.0  # pseudo-counts a row: a pair that was never seen is rare, not impossible
    smoothed = (counts + strength * unigram) / (counts.sum(1, keepdim=True) + strength)
    return smoothed.log()
