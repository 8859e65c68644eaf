"""Makes the training data: train.bin, val.bin (token ids, uint16 little-endian) and meta.json (paper A.6).

- Two parts: idioms (idioms.py, generated) and real code (.py files of this Python installation, of a directory,
  or of the wheels in packages.txt, which are read as zip files; nothing is ever imported or run).
- Real code is deduplicated by content; what does not parse, was generated or is mostly a table is dropped.
- A document goes to train or val by its hash, so never to both. Each ends with <|endoftext|>.
- The same options and inputs give the same bytes.

    python data/tinypython/prepare.py [--tokens=6_000_000] [--idioms=0.7] [--source=stdlib|installed|packages|DIR]
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken

from idioms import programs
from tokenizer import DEFAULT, EOT_ID, load_tokenizer

HERE = Path(__file__).resolve().parent
PARTS = ("idioms", "code")
THREADS = 2


# ---------------------------------------------------------------- real code


def tree(root: Path, skip: tuple[str, ...] = ()) -> Iterator[bytes]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for file in sorted(files):
            if file.endswith(".py"):
                try:
                    yield Path(folder, file).read_bytes()
                except OSError:  # a dangling link, a file that we may not read
                    continue


def read_source(source: str, wheels: Path) -> Iterator[bytes]:
    """The .py files of a source, as they are."""
    tests = ("test", "tests", "testing", "idlelib")
    if source in ("stdlib", "installed"):
        paths = sysconfig.get_paths()
        yield from tree(Path(paths["stdlib"]), (*tests, "site-packages", "dist-packages"))
        if source == "installed":
            for site in sorted({paths["purelib"], paths["platlib"]}):
                yield from tree(Path(site), tests)
    elif source == "packages":
        for wheel in download(HERE / "packages.txt", wheels):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".py") and not set(tests) & set(name.split("/")):
                        yield archive.read(name)
    else:
        yield from tree(Path(source))


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()  # as in the names of wheels


def download(requirements: Path, wheels: Path) -> list[Path]:
    """The wheels that a file of `name==version` lines asks for, fetched unless they are there already."""
    lines = requirements.read_text(encoding="utf-8").split("\n")
    pins = [line.strip().partition("==") for line in lines if line.strip() and not line.startswith("#")]
    pins = [(plain(name), version) for name, _, version in pins]

    def present() -> list[Path]:
        found = {(plain(file.name.split("-")[0]), file.name.split("-")[1]): file for file in wheels.glob("*-*.whl")}
        return [found[pin] for pin in pins if pin in found]

    if len(present()) < len(pins):
        print(f"downloading {len(pins)} wheels to {wheels}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        what = ["--only-binary=:all:", "--no-deps", f"--dest={wheels}", f"--requirement={requirements}"]
        done = subprocess.run([*pip, *what], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise ValueError(f"pip cannot download the packages ({said}); try again later or use another --source")
        if len(present()) < len(pins):
            raise ValueError(f"pip left out some wheels of {requirements.name}; empty {wheels} and try again")
    return present()


BY_A_PROGRAM = re.compile(
    r"auto-?(matically )?generated|(file|module|code) (is|was) generated|^\W*generated (by|from|with|using)|"
    r"generated from ['\"]|do not edit", re.IGNORECASE | re.MULTILINE)
DATA_LINE = re.compile(r"""^\s*(['"(\[{})\]]|-?[0-9])(?!"")""", re.MULTILINE)  # an entry of a table; not a docstring


def generated(text: str) -> bool:
    """Whether a program wrote it, or it holds data rather than code."""
    lines = text.splitlines()
    if BY_A_PROGRAM.search("\n".join(lines[:10])):
        return True
    if max(map(len, lines)) > 1000 or len(text) > 200 * len(lines):
        return True
    return len(DATA_LINE.findall(text)) > 0.6 * len(lines)


def parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def real_code(files: Iterable[bytes], dropped: Counter) -> Iterator[str]:
    """The files worth keeping, each content once, in the order of their hashes (so a part of them is a fair sample)."""
    texts = {}
    for raw in files:
        try:
            text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            dropped["unparsable"] += 1
            continue
        if not text.strip():
            dropped["empty"] += 1
        elif digest(text) in texts:
            dropped["duplicate"] += 1
        else:
            texts[digest(text)] = text
    for key in sorted(texts):
        if generated(texts[key]):
            dropped["generated"] += 1
        elif not parses(texts[key]):
            dropped["unparsable"] += 1
        else:
            yield texts[key]


# ---------------------------------------------------------------- tokens


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


Document = tuple[str, np.ndarray]  # hash of its text, ids with EOT


def encode(name: str, texts: Iterable[str], target: int, tokenizer: tiktoken.Encoding) -> list[Document]:
    """One document after another until they hold `target` tokens, or no more come."""
    documents, total, start, said = [], 0, time.time(), time.time()
    texts = iter(texts)
    while total < target and (batch := list(islice(texts, 64))):
        for text, ids in zip(batch, tokenizer.encode_ordinary_batch(batch, num_threads=THREADS)):
            if total < target:
                documents.append((digest(text), np.array([*ids, EOT_ID], dtype="<u2")))
                total += len(ids) + 1
        if time.time() - said > 2:
            said = time.time()
            left = (said - start) * (target / total - 1)
            print(f"{name}: {total:,} of {target:,} tokens, {max(left, 0):.0f} s left", flush=True)
    print(f"{name}: {total:,} tokens in {len(documents):,} documents, {time.time() - start:.0f} s", flush=True)
    return documents


def split(documents: list[Document], val: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Train and val, by the last digits of the hash (the first decided the order). Of two documents each gets one."""
    ranked = sorted((int(key[-13:], 16) / 16**13, key) for key, _ in documents)
    n = sum(rank < val for rank, _ in ranked)
    if val > 0 and len(ranked) > 1:
        n = min(max(n, 1), len(ranked) - 1)
    chosen = {key for _, key in ranked[:n]}
    return [ids for key, ids in documents if key not in chosen], [ids for key, ids in documents if key in chosen]


# ---------------------------------------------------------------- the script


def write_all(out: Path, files: dict[str, bytes]) -> None:
    """Each under a temporary name first, so that a full disk changes nothing. meta.json vouches for the others: it is
    the first to go and the last to come."""
    temporary = {}
    try:
        for name, content in files.items():
            handle, temporary[name] = tempfile.mkstemp(dir=out, prefix=f".{name}.")
            with open(handle, "wb") as f:
                f.write(content)
        (out / "meta.json").unlink(missing_ok=True)
        for name in files:
            os.chmod(temporary[name], 0o644)
            os.replace(temporary.pop(name), out / name)
    finally:
        for name in temporary.values():
            os.unlink(name)


def fingerprint(tokenizer: Path) -> str:
    files = [tokenizer / "encoder.json", tokenizer / "vocab.bpe"] if tokenizer.is_dir() else [tokenizer]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def prepare(options: argparse.Namespace) -> None:
    start = time.time()
    if options.tokens <= 0:
        raise ValueError(f"--tokens={options.tokens}: give a number of tokens above 0")
    if not 0 <= options.idioms <= 1:
        raise ValueError(f"--idioms={options.idioms}: the idioms' share of the tokens lies between 0 and 1")
    if not 0 <= options.val < 1:
        raise ValueError(f"--val={options.val}: the share of documents for val.bin is at least 0 and below 1")
    if options.source not in ("stdlib", "installed", "packages") and not Path(options.source).is_dir():
        raise ValueError(f"--source={options.source}: neither stdlib, installed, packages nor a directory that exists")
    tokenizer = load_tokenizer(options.tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.out).close()  # better to fail now than when all is done

    target = {"idioms": round(options.tokens * options.idioms)}
    target["code"] = options.tokens - target["idioms"]
    dropped = Counter()
    texts = {"idioms": programs(options.seed), "code": real_code(read_source(options.source, options.wheels), dropped)}
    documents = {part: encode(part, texts[part], target[part], tokenizer) for part in PARTS}
    if target["code"] and not documents["code"]:
        raise ValueError(f"--source={options.source}: no Python file in it parses; name another or use --idioms=1")
    if dropped:
        print("code: dropped " + ", ".join(f"{n} {why}" for why, n in sorted(dropped.items())))

    parts = {part: dict(zip(("train", "val"), split(documents[part], options.val))) for part in PARTS}
    tokens = {part: {side: sum(map(len, docs)) for side, docs in sides.items()} for part, sides in parts.items()}
    total = sum(sides["train"] for sides in tokens.values())
    share = {part: round(tokens[part]["train"] / total, 4) for part in PARTS}
    if sum(tokens["code"].values()) < target["code"]:
        print(f"{options.source} ran out: {share['code']:.0%} of train.bin is real code, not {1 - options.idioms:.0%}")
    train = [ids for part in PARTS for ids in parts[part]["train"]]
    val = [ids for part in PARTS for ids in parts[part]["val"]]
    random.Random(options.seed).shuffle(train)
    middle, end = tokens["idioms"]["val"], tokens["idioms"]["val"] + tokens["code"]["val"]
    meta = {
        "documents": {part: {side: len(docs) for side, docs in sides.items()} for part, sides in parts.items()},
        "tokens": tokens,
        "share": share,
        "val_parts": {"idioms": [0, middle], "code": [middle, end]},
        "vocab_size": EOT_ID + 1,
        "eot": EOT_ID,
        "tokenizer": Path(options.tokenizer).name,
        "tokenizer_hash": fingerprint(options.tokenizer),
        "seed": options.seed,
        "source": options.source,
        "python": platform.python_version(),
        "options": {"tokens": options.tokens, "idioms": options.idioms, "val": options.val},
    }
    write_all(options.out, {
        "train.bin": b"".join(ids.tobytes() for ids in train),
        "val.bin": b"".join(ids.tobytes() for ids in val),
        "meta.json": (json.dumps(meta, indent=1) + "\n").encode(),
    })
    print(f"{options.out}: {total:,} tokens in train.bin ({share['idioms']:.0%} idioms), {end:,} in val.bin; "
          f"{time.time() - start:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: stop(message)  # argparse's own takes more than a line
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the three files (default: this one)")
    parser.add_argument("--tokens", type=int, default=6_000_000, help="in all (6_000_000)")
    parser.add_argument("--idioms", type=float, default=0.7, help="share of the tokens that are idioms (0.7)")
    parser.add_argument("--source", default="stdlib", help="of real code: stdlib, installed, packages or a folder")
    parser.add_argument("--seed", type=int, default=0, help="of the idioms and the order of documents (0)")
    parser.add_argument("--val", type=float, default=0.02, help="share of the documents in val.bin (0.02)")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT, help=".tiktoken file or published folder")
    parser.add_argument("--wheels", type=Path, default=HERE / "wheels", help="where packages are kept")
    try:
        prepare(parser.parse_args())
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("interrupted; nothing was written", 130)


def stop(message: str, status: int = 2) -> None:
    print("prepare.py: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
