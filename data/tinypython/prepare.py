"""Makes the training data (paper A.6): token ids (uint16) of train and val, and meta.json.

    python data/tinypython/prepare.py [--tokens=6_000_000] [--idioms=0.7] [--workers=0]
                                      [--source=stdlib|installed|packages|FOLDER|FILE.jsonl.zst,...]

- Two parts: idioms (idioms.py, generated) and real code (sources.py: this Python installation, the
  wheels in packages.txt, folders of .py files, .jsonl, .jsonl.gz, .jsonl.zst and .parquet).
- Real code is deduplicated by content; what does not parse, was generated or is mostly a table is
  dropped.
- A document goes to train or val by its hash, so never to both. Each ends with <|endoftext|>.
- Shards of at most 1 GB: train.0000.bin, train.0001.bin, ... The parts are mixed in train and stand
  one behind the other in val: train.py measures the loss on each of them.
- The same options and inputs give the same bytes, whatever the number of processes (`--workers`,
  0 = one a core). Memory does not grow with the number of tokens. Started again after a kill with
  the same options, it goes on where it was.
"""

import json
import os
import platform
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # run as a script, from wherever

from config import as_script, bounded, die, parse, sole_user, write_atomic  # noqa: E402
from data.tinypython.idioms import block  # noqa: E402
from data.tinypython.shards import Growing, Seen, Shards, scan  # noqa: E402
from data.tinypython.sources import (  # noqa: E402
    NAMED, Chunk, check_source, chunks, digest, documents_of)
from data.tinypython.tokenizer import (  # noqa: E402
    DEFAULT, EOT, load_tokenizer, tokenizer_hash)
from data.workers import cores, in_order, worker_pool  # noqa: E402

PARTS = ("idioms", "code")
HEAD = 16  # documents of a part that are shared out together, so that both sides get one
SYNC = 5  # seconds between checkpoints
UNFINISHED = ".unfinished"  # the folder for what is not whole yet


@dataclass
class PrepareConfig:
    out: str = str(HERE)  # folder for the files
    tokens: int = bounded(6_000_000, at_least=1)  # in all
    idioms: float = bounded(0.7, at_least=0, at_most=1)  # their share of the tokens
    source: str = "stdlib"  # of real code: see above; several with commas
    seed: int = 0  # of the idioms
    val: float = bounded(0.02, above=0, below=1)  # share of the documents in val
    tokenizer: str = str(DEFAULT)  # a .tiktoken file, or what a published model has
    wheels: str = str(HERE / "wheels")  # where the packages are kept
    workers: int = bounded(0, at_least=0)  # processes; 0 = as many as there are cores
    shard: int = bounded(500_000_000, at_least=1)  # most tokens of a file


# --- documents, in any process ---------------------------------------------------------------

Document = tuple[str, bytes]  # hash of its text, ids with EOT as uint16

loaded = lru_cache(load_tokenizer)  # a process reads the file once


def encode(tokenizer: str, texts: list[str]) -> list[Document]:
    encoding = loaded(tokenizer)
    end = encoding.eot_token
    documents = []
    for text in texts:
        ids = np.array([*encoding.encode_ordinary(text), end], dtype="<u2")
        documents.append((digest(text), ids.tobytes()))
    return documents


def encode_block(tokenizer: str, seed: int, number: int) -> tuple[list[Document], Counter]:
    """A block of idioms."""
    return encode(tokenizer, block(seed, number)), Counter()


def encode_chunk(tokenizer: str, chunk: Chunk) -> tuple[list[Document], Counter]:
    """A chunk of real code, and how much of it was dropped for what reason."""
    dropped = Counter()
    texts = documents_of(chunk, dropped)
    return encode(tokenizer, texts), dropped


# --- the stream of documents -----------------------------------------------------------------

class Stream:
    """One part's documents, a batch at a time, and what has come of it so far.

    `done`, its numbers in a checkpoint: batches used, documents and tokens a side, and what was
    dropped.
    """

    def __init__(self, batches: Iterator, target: int, done: dict):
        self.batches = batches
        self.target = target
        self.batches_used = done.get("batches", 0)
        self.documents = done.get("documents", {"train": 0, "val": 0})
        self.tokens = done.get("tokens", {"train": 0, "val": 0})
        self.dropped = Counter(done.get("dropped", {}))
        self.ended = False
        # the first documents wait here until they can be shared out; None when that is done
        self.head = None if done else []

    @property
    def total(self) -> int:
        waiting = sum(len(ids) // 2 for _, ids in self.head or ())
        return sum(self.tokens.values()) + waiting

    def numbers(self) -> dict:
        return {"batches": self.batches_used, "documents": self.documents, "tokens": self.tokens,
                "dropped": dict(self.dropped)}

    def next_batch(self, val: float, seen: Seen | None) -> list[tuple[str, bytes]]:
        """(side, ids) of the documents of the next batch, or of the head; nothing at the end."""
        documents, dropped = next(self.batches, (None, Counter()))
        self.dropped += dropped
        if documents is None:
            self.ended = True
            documents = []
        else:
            self.batches_used += 1

        taken = []
        total = self.total
        for key, ids in documents:
            if total >= self.target:
                break
            if seen is not None and not seen.new(key):
                self.dropped["duplicate"] += 1
                continue
            taken.append((key, ids))
            total += len(ids) // 2
        if total >= self.target:
            self.ended = True
        return self.shared_out(taken, val)

    def shared_out(self, documents: list[Document], val: float) -> list[tuple[str, bytes]]:
        """(side, ids) of each, or nothing while the head still waits for more."""
        if self.head is not None:
            documents = self.head + documents
            if len(documents) < HEAD and not self.ended:
                self.head = documents
                return []
            self.head = None
            in_val = head_in_val([key for key, _ in documents], val)
        else:
            in_val = {key for key, _ in documents if rank(key) < val}
        shared = []
        for key, ids in documents:
            side = "val" if key in in_val else "train"
            self.documents[side] += 1
            self.tokens[side] += len(ids) // 2
            shared.append((side, ids))
        return shared


def rank(key: str) -> float:
    """Where a document stands between 0 and 1. A hash is a fair draw that never changes: a document
    stays on its side whatever else comes."""
    return int(key[-13:], 16) / 16**13


def head_in_val(keys: list[str], val: float) -> set[str]:
    """Which of the first documents of a part go to val; of two, one does."""
    ranked = sorted(set(keys), key=rank)
    n = sum(rank(key) < val for key in ranked)
    if len(ranked) > 1:
        n = min(max(n, 1), len(ranked) - 1)
    return set(ranked[:n])


# --- the script ------------------------------------------------------------------------------

def prepare(cfg: PrepareConfig) -> None:
    """Writes the files. ValueError or OSError, in one line, where that is not possible."""
    start = time.monotonic()
    check_source(cfg.source)
    tokenizer = load_tokenizer(cfg.tokenizer)
    if EOT not in tokenizer.special_tokens_set:
        raise ValueError(f"--tokenizer={cfg.tokenizer} has no {EOT}, which ends a document")
    if tokenizer.n_vocab > 1 << 16:
        raise ValueError(f"--tokenizer={cfg.tokenizer} has {tokenizer.n_vocab} tokens, more than "
                         "the 65,536 that the files have room for")
    out = Path(cfg.out)
    folder = out / UNFINISHED
    try:
        with sole_user(str(folder)):
            wanted = identity(cfg)
            done = checkpoint_in(folder, wanted)
            if not (folder / "meta.json").exists():  # all is written, but not yet in its place
                write_parts(cfg, folder, wanted, done)
                describe(cfg, tokenizer, folder)
            publish(folder, out)
    except BlockingIOError:
        raise ValueError(f"another process prepares data in {out}; wait for it") from None
    except (ValueError, OSError):
        forget_beginnings(folder)
        raise
    meta = json.loads((out / "meta.json").read_text())
    total, val = (sum(meta["tokens"][part][side] for part in PARTS) for side in ("train", "val"))
    print(f"{cfg.out}: {total:,} tokens in train ({meta['share']['idioms']:.0%} idioms), "
          f"{val:,} in val; {time.monotonic() - start:.0f} s in all")


def identity(cfg: PrepareConfig) -> dict:
    """What decides the bytes."""
    options = asdict(cfg)
    for free in ("out", "workers", "wheels", "tokenizer"):
        options.pop(free)
    return options | {"tokenizer_hash": tokenizer_hash(cfg.tokenizer),
                      "python": platform.python_version()}


def checkpoint_in(folder: Path, wanted: dict) -> dict:
    """How far a run of the same options came before it was stopped; {}, and an empty folder, where
    there was none."""
    try:
        done = json.loads((folder / "checkpoint.json").read_text())
    except (OSError, ValueError):
        done = {}
    if done.get("options") == wanted:
        tokens = sum(sum(part["tokens"].values()) for part in done["parts"].values())
        print(f"going on after {tokens:,} tokens, which a run of the same options left", flush=True)
        return done
    for file in folder.iterdir():
        file.unlink()
    return {}


def forget_beginnings(folder: Path) -> None:
    """What a later run could not go on with leaves no trace."""
    if folder.is_dir() and not (folder / "checkpoint.json").exists():
        shutil.rmtree(folder)


def write_parts(cfg: PrepareConfig, folder: Path, wanted: dict, done: dict) -> None:
    """All documents, from the checkpoint to the end."""
    n_code = cfg.tokens - round(cfg.tokens * cfg.idioms)
    files = {
        "train": Shards(folder, "train", cfg.shard, done.get("train", 0)),
        **{part: Growing(folder / f"val.{part}", done.get(part, 0)) for part in PARTS},
    }
    seen = Seen(folder / "seen", done.get("seen", 0))
    before = done.get("parts", {})
    workers = cfg.workers or cores()
    try:
        with worker_pool(workers) if workers > 1 else nullcontext() as pool:
            first = before.get("idioms", {}).get("batches", 0)
            work = partial(encode_block, cfg.tokenizer, cfg.seed)
            blocks = in_order(pool, work, count(first), workers)
            first = before.get("code", {}).get("batches", 0)
            pieces = islice(chunks(cfg.source, Path(cfg.wheels)), first, None) if n_code else ()
            pieces = in_order(pool, partial(encode_chunk, cfg.tokenizer), pieces, workers)
            streams = {
                "idioms": Stream(blocks, cfg.tokens - n_code, before.get("idioms", {})),
                "code": Stream(pieces, n_code, before.get("code", {})),
            }
            mix(cfg, streams, files, seen, folder, wanted)
    except BrokenProcessPool:
        raise ValueError("a worker was killed, perhaps for want of memory; run it again with fewer "
                         "--workers: it goes on where it was") from None
    if n_code and not sum(streams["code"].documents.values()):
        raise ValueError(f"--source={cfg.source}: no Python file in it parses; name another or use "
                         "--idioms=1")
    checkpoint(folder, wanted, streams, files, seen)
    report(cfg, streams, n_code)


def mix(cfg: PrepareConfig, streams: dict, files: dict, seen: Seen, folder: Path,
        wanted: dict) -> None:
    """A batch of whichever part is behind its share, until both have ended."""
    start = time.monotonic()
    said = synced = start
    begun = sum(stream.total for stream in streams.values())
    while True:
        open_parts = [p for p in PARTS if not streams[p].ended and streams[p].target > 0]
        if not open_parts:
            break
        part = min(open_parts, key=lambda p: streams[p].total / streams[p].target)
        known = seen if part == "code" else None
        for side, ids in streams[part].next_batch(cfg.val, known):
            files["train" if side == "train" else part].add(ids)

        now = time.monotonic()
        settled = all(streams[p].head is None or streams[p].target == 0 for p in PARTS)
        if settled and now - synced > SYNC:
            checkpoint(folder, wanted, streams, files, seen)
            synced = now
        if now - said > 2:
            said = now
            total = sum(stream.total for stream in streams.values())
            speed = max(total - begun, 1) / (now - start)
            left = max(cfg.tokens - total, 0) / speed
            print(f"{total:,} of {cfg.tokens:,} tokens, {left:.0f} s left", flush=True)


def checkpoint(folder: Path, wanted: dict, streams: dict, files: dict, seen: Seen) -> None:
    """From here a killed run goes on: first the files, then what says how much of them counts."""
    for file in (*files.values(), seen.file):
        file.sync()
    done = {
        "options": wanted,
        "parts": {part: stream.numbers() for part, stream in streams.items()},
        "train": files["train"].tokens,
        **{part: files[part].size for part in PARTS},
        "seen": seen.file.size,
    }
    write_atomic(str(folder / "checkpoint.json"), json.dumps(done).encode())


def report(cfg: PrepareConfig, streams: dict, n_code: int) -> None:
    """What has come, and what was left out."""
    for part, stream in streams.items():
        print(f"{part}: {stream.total:,} tokens in {sum(stream.documents.values()):,} documents")
    code = streams["code"]
    if code.dropped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(code.dropped.items()))
        print(f"code: dropped {reasons}")
    if code.total < n_code:
        total = sum(stream.tokens["train"] for stream in streams.values())
        print(f"{cfg.source} ran out: {code.tokens['train'] / total:.0%} of train is real code, "
              f"not {1 - cfg.idioms:.0%}")


def describe(cfg: PrepareConfig, tokenizer, folder: Path) -> None:
    """val's parts put together, what a full scan finds, and last of all meta.json."""
    done = json.loads((folder / "checkpoint.json").read_text())
    train = Shards(folder, "train", cfg.shard, done["train"]).close()
    val = Shards(folder, "val", cfg.shard)
    val_parts = {}
    for part in PARTS:
        start = val.tokens
        with open(folder / f"val.{part}", "rb") as f:
            while ids := f.read(1 << 24):
                val.add(ids)
        if val.tokens > start:  # with --idioms=0 or 1 there is one part
            val_parts[part] = [start, val.tokens]

    described, bigrams = scan(train, tokenizer.n_vocab)
    of_val, _ = scan(val.close(), tokenizer.n_vocab)
    with open(folder / "bigrams.npy", "wb") as f:
        np.save(f, bigrams)
    tokens = {part: done["parts"][part]["tokens"] for part in PARTS}
    total = sum(tokens[part]["train"] for part in PARTS)
    meta = {
        "documents": {part: done["parts"][part]["documents"] for part in PARTS},
        "tokens": tokens,
        "share": {part: round(tokens[part]["train"] / total, 4) for part in PARTS},
        "val_parts": val_parts,
        "shards": {"train": described, "val": of_val},
        "bigrams": "bigrams.npy",
        "vocab_size": tokenizer.n_vocab,
        "eot": tokenizer.eot_token,
        "tokenizer": Path(cfg.tokenizer).name,
        "tokenizer_hash": tokenizer_hash(cfg.tokenizer),
        "seed": cfg.seed,
        "source": cfg.source if cfg.source in NAMED else Path(cfg.source.split(",")[0]).name,
        "python": platform.python_version(),
        "options": {"tokens": cfg.tokens, "idioms": cfg.idioms, "val": cfg.val},
    }
    write_atomic(str(folder / "meta.json"), (json.dumps(meta, indent=1) + "\n").encode())


def publish(folder: Path, out: Path) -> None:
    """Everything to its place. meta.json vouches for the others: it is the first to go and the last
    to come. After a kill in between, the next run goes on here."""
    meta = json.loads((folder / "meta.json").read_text())
    names = [shard["file"] for side in meta["shards"].values() for shard in side]
    names.append(meta["bigrams"])
    (out / "meta.json").unlink(missing_ok=True)
    for side in ("train", "val"):
        for old in (out / f"{side}.bin", *out.glob(f"{side}.[0-9]*.bin")):
            if old.name not in names:
                old.unlink(missing_ok=True)
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, out / name)
    os.replace(folder / "meta.json", out / "meta.json")
    shutil.rmtree(folder)


def main(argv: list[str]) -> int:
    cfg = parse(PrepareConfig, argv)
    try:
        prepare(cfg)
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        die(" ".join(str(e).split()))
    return 0


if __name__ == "__main__":
    as_script(main)
