"""Token files that grow: shards of a limited size, files that are cut back to a checkpoint, and
what a full scan of them finds.

Everything is written in a folder of its own and moved to its place in the end, so that the data of
before stay as they are until the new ones are whole.
"""
import hashlib
import os
from pathlib import Path

import numpy as np

PIECE = 1 << 22  # tokens or entries at a time, where a file is gone through

SEEN_BITS = 1 << 30  # 128 MB, which 10M documents fill to one part in 27
SEEN_BYTES = 8  # of a document's hash that decide


class Growing:
    """A file that is appended to. `at`: bytes that a checkpoint says are in it; what is past them,
    written before a kill, is cut off."""

    def __init__(self, path: Path, at: int = 0):
        self.path = path
        self.file = open(path, "ab")
        self.file.truncate(at)
        self.size = at

    def add(self, content: bytes) -> None:
        self.file.write(content)
        self.size += len(content)

    def sync(self) -> None:
        """From here on what was added outlives a power cut."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()


class Shards:
    """`train.0000.bin`, `train.0001.bin`, ... in a folder, each of at most `limit` tokens (uint16).

    tokens: how many a checkpoint says are in them, all together.
    """

    def __init__(self, folder: Path, side: str, limit: int, tokens: int = 0):
        self.folder = folder
        self.side = side
        self.limit = limit
        self.tokens = tokens
        number = tokens // limit
        for later in self.numbered(number + 1):
            later.unlink()
        self.file = Growing(self.path(number), 2 * (tokens % limit))

    def path(self, number: int) -> Path:
        return self.folder / f"{self.side}.{number:04}.bin"

    def numbered(self, start: int) -> list[Path]:
        return [p for p in sorted(self.folder.glob(f"{self.side}.*.bin"))
                if int(p.name.split(".")[1]) >= start]

    def add(self, ids: bytes) -> None:
        while ids:
            room = 2 * self.limit - self.file.size
            if room == 0:
                self.file.close()
                self.file = Growing(self.path(self.tokens // self.limit))
                continue
            self.file.add(ids[:room])
            self.tokens += len(ids[:room]) // 2
            ids = ids[room:]

    def sync(self) -> None:
        self.file.sync()

    def close(self) -> list[Path]:
        """The files, in their order."""
        self.file.close()
        files = self.numbered(0)
        if files[-1].stat().st_size == 0:  # nothing came after a full one
            files.pop().unlink()
        return files


class Seen:
    """Which documents have come already: a Bloom filter (four bits a document), so that memory does
    not grow with their number. Of a new document it says wrongly that it has come one time in
    500,000 after 10M documents, one in 100 after 100M: that one is lost, and nothing else.

    The hashes are kept in a file as well, from which the filter is made anew after a kill.
    """

    def __init__(self, path: Path, size: int = 0):
        self.file = Growing(path, size)
        self.bits = np.zeros(SEEN_BITS // 8, dtype=np.uint8)
        with open(path, "rb") as f:
            while hashes := f.read(SEEN_BYTES * PIECE):
                self._set(np.frombuffer(hashes, "<u8"))

    def new(self, digest: str) -> bool:
        """Whether a document of that hash, in hexadecimal digits, comes for the first time."""
        raw = bytes.fromhex(digest[: 2 * SEEN_BYTES])
        places = self._places(np.frombuffer(raw, "<u8"))
        if ((self.bits[places >> 3] >> (places & 7)) & 1).all():
            return False
        self._set(np.frombuffer(raw, "<u8"))
        self.file.add(raw)
        return True

    def _set(self, hashes: np.ndarray) -> None:
        places = self._places(hashes)
        np.bitwise_or.at(self.bits, places >> 3, (1 << (places & 7)).astype(np.uint8))

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        """Four bits for each hash, (4 n,): two independent halves of it, added up."""
        first = hashes & np.uint64(0xFFFFFFFF)
        second = (hashes >> np.uint64(32)) | np.uint64(1)
        bits = [(first + np.uint64(i) * second) % np.uint64(SEEN_BITS) for i in range(4)]
        return np.concatenate(bits).astype(np.int64)


# --- what a full scan finds ------------------------------------------------------------------

def scan(files: list[Path], vocab: int) -> tuple[list[dict], np.ndarray]:
    """What meta.json says of each shard, and how often each token follows each other one,
    (vocab, vocab) int64, also across their borders.

    Read, not mapped into memory: pages of a map would count as this process's.
    """
    counts = np.zeros(vocab * vocab, dtype=np.int64)
    described = []
    before = np.empty(0, dtype=np.int64)  # the last token so far
    for path in files:
        largest = 0
        tokens = 0
        with open(path, "rb") as f:
            while len(ids := np.frombuffer(f.read(2 * PIECE), "<u2")):
                largest = max(largest, int(ids.max()))
                tokens += len(ids)
                run = np.concatenate([before, ids])
                counts += np.bincount(run[:-1] * vocab + run[1:], minlength=vocab * vocab)
                before = run[-1:]
        described.append({
            "file": path.name,
            "tokens": tokens,
            "fingerprint": fingerprint_of(path, tokens),
            "largest_id": largest,
        })
    return described, counts.reshape(vocab, vocab)


def fingerprint_of(path: Path, tokens: int) -> str:
    """As `tokens.fingerprint` of the same file."""
    starts = np.linspace(0, max(0, tokens - 2048), 256).astype(np.int64)
    digest = hashlib.sha256(str(tokens).encode())
    with open(path, "rb") as f:
        for start in starts:
            f.seek(2 * int(start))
            digest.update(f.read(2 * 2048))
    return digest.hexdigest()
