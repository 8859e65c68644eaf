"""The command line that every script shares: TOML file + `--key=value` -> a typed dataclass.

- `python train.py --config=configs/demo.toml --lr=0.02`: the file first, then the overrides.
- A field's type is that of its default; its bounds stand beside it: `bounded`, `one_of`.
- An unknown key, or a value of the wrong type or out of bounds, is one line and exit status 2.
- `as_script`: how every script starts and ends.
- `write_atomic`: a file is either the old one or the new one, never half of it.
- `sole_user`: a directory is one process's.
"""
import difflib
import inspect
import io
import json
import math
import os
import re
import signal
import socket
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, field, fields
from typing import NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# How a message names the type that a key wants.
TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a number or several",
}

# How long a thread of PyTorch spins while it waits for the others of its parallel loop, in turns,
# before it sleeps. By default libgomp goes on for milliseconds, which leaves a third of the speed
# where another process wants a core; below a thousand turns, threads fall asleep between loops.
# libgomp reads it once, while PyTorch loads: scripts import this file first.
SPIN = "1000"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN)


def die(message: str | Exception) -> NoReturn:
    """Bad input: one line on stderr that says what is wrong and what to do, exit status 2.

    Under torchrun each process that fails says so with its rank: data may be missing on one node.
    """
    if isinstance(message, BrokenPipeError):  # an OSError, but no bad input: for `as_script`
        raise message
    if isinstance(message, OSError) and message.strerror and message.filename:
        message = f"{message.filename}: {message.strerror}"
    who = os.path.basename(sys.argv[0])
    if "RANK" in os.environ:
        who += f", rank {os.environ['RANK']}"
    print(f"{who}: {message}", file=sys.stderr)
    raise SystemExit(2)


def as_script(main: Callable[[list[str]], int], leave: Callable[[int], NoReturn] = sys.exit):
    """The last line of every script: run `main` with the command line, and end as a shell expects.

    Ctrl-C, SIGTERM and a closed terminal are one line and exit status 130, 143 and 129, unless
    `main` sets handlers of its own, as train.py does. A reader that has gone, as in `| head -1`, is
    no error of ours. Nor is too little memory, which is one line as well.
    """
    # both are None where the caller closed them, as `>&-` does
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # others are a notebook's, say
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows what it can
    for sig in stop_signals():
        signal.signal(sig, _stop)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except Stopped as e:
        name = os.path.basename(sys.argv[0])
        print(f"{name}: stopped; what was finished is kept", file=sys.stderr)
        code = 128 + e.signal
    except BrokenPipeError:
        # what is still to be flushed goes nowhere, or Python would complain while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13  # as if by SIGPIPE, which Python ignores
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        die(f"out of memory ({_first_line(e)}); make what is held at once smaller: for training "
            "batch_size (or raise grad_accum) or block_size, else batches, windows or --jobs")
    leave(code)


def _is_out_of_memory(e: Exception) -> bool:
    # PyTorch has a class of its own for CUDA alone
    return isinstance(e, MemoryError) or "out of memory" in str(e) or "can't allocate" in str(e)


def _first_line(e: Exception) -> str:
    text = str(e).splitlines()[0] if str(e) else type(e).__name__
    return text.rpartition("DefaultCPUAllocator: ")[2]


def stop_signals() -> list[int]:
    """Those that ask a process to end, less those that it was started to ignore, as by nohup."""
    known = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [s for s in known if s is not None and signal.getsignal(s) != signal.SIG_IGN]


class Stopped(KeyboardInterrupt):
    """A signal asks for the end: like Ctrl-C no Exception, so that none takes it for its own."""

    def __init__(self, number: int):
        self.signal = number


def _stop(number, frame):
    raise Stopped(number)


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that `name` was probably meant to be."""
    names = list(names)
    initials = "".join(word[:1] for word in name.split("_"))
    if len(initials) > 1 and initials in names:  # learning_rate means lr
        return initials
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


# --- bounds, beside the fields ---------------------------------------------------------------

def bounded(default, *, at_least=None, above=None, at_most=None, below=None):
    """A dataclass field that holds a finite number within bounds; of a tuple, every number."""
    limits = dict(at_least=at_least, above=above, at_most=at_most, below=below)
    return field(default=default, metadata={"limits": limits})


def one_of(default: str, *others: str):
    """A dataclass field that holds one of these words."""
    return field(default=default, metadata={"words": (default, *others)})


def out_of_bounds(cfg) -> str | None:
    """The first field of the dataclass `cfg` that breaks its bounds, in one line, or None."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        # a choice among words
        words = f.metadata.get("words")
        if words is not None and value not in words:
            return f"{f.name} must be {_or(words)}, not {value!r}"

        # a number, or several, within limits
        limits = f.metadata.get("limits")
        if limits is None:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if not _within(number, **limits):
                return f"{f.name} must be {_range(**limits)}, not {number}"
    return None


def _within(number, at_least, above, at_most, below) -> bool:
    # isfinite first: a NaN passes every comparison that is asked the other way round
    return (
        math.isfinite(number)
        and (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (at_most is None or number <= at_most)
        and (below is None or number < below)
    )


def _range(at_least, above, at_most, below) -> str:
    named = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
    said = [f"{name} {limit}" for name, limit in named if limit is not None]
    return " and ".join(said) or "a finite number"


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


# --- from file and command line to the dataclass ---------------------------------------------

def parse(cls, argv: list[str]):
    """Build the dataclass `cls` from `argv`: `--config=FILE.toml` and `--key=value` overrides.

    The type of a field is the type of its default; a tuple holds numbers (`0.5,0.15`). `--key`
    alone sets a bool to true. Exits with status 2, and one line that names the key, on any key or
    value that does not fit.
    """
    types = {f.name: type(f.default) for f in fields(cls)}
    source, overrides = _read_argv(cls, argv, types)
    try:
        values = {} if source is None else read_toml(source)
    except ValueError as e:
        die(e)
    where = dict.fromkeys(values, source)  # for messages: who asked for this value
    for key, text in overrides:
        values[key] = _literal(text, types.get(key, str))
        where[key] = "the command line"

    # file and command line are checked alike, whichever a value comes from
    for key, value in values.items():
        if key not in types:
            meant = nearest(key, types)
            die(f"unknown key '{key}' in {where[key]}; the nearest valid key is '{meant}'")
        values[key] = _as_type(value, types[key])
        if values[key] is None:
            wanted = TYPE_NAMES[types[key]]
            die(f"key '{key}' in {where[key]} must be {wanted}, not {value!r}")
        # of a path that is not UTF-8, which no config that we write could hold
        if isinstance(value, str) and value != value.encode(errors="replace").decode():
            die(f"key '{key}' in {where[key]} is not UTF-8 text: {value!r}")

    cfg = cls(**values)
    complaint = out_of_bounds(cfg)
    if complaint:
        die(complaint)
    return cfg


def _read_argv(cls, argv: list[str], types: dict) -> tuple[str | None, list[tuple[str, str]]]:
    """The name of the config file, if there is one, and the overrides as (key, text)."""
    source = None
    overrides = []
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not key:
            die(f"'{arg}' is not understood; options are --key=value, --config=FILE.toml or --help")
        if key == "help":
            _print_help(cls)
            raise SystemExit(0)
        if key == "config":
            source = os.path.expanduser(text)
            continue
        # --flag alone is an answer; --lr alone is a value that was forgotten
        if not equals and types.get(key, bool) is not bool:
            die(f"key '{key}' in the command line needs a value: --{key}=...")
        overrides.append((key, text if equals else "true"))
    return source, overrides


def _allowed(f: Field) -> str:
    """What a field may hold, for a reader; nothing where that is said by its default."""
    if "words" in f.metadata:
        return _or(f.metadata["words"])
    if any(limit is not None for limit in f.metadata.get("limits", {}).values()):
        return _range(**f.metadata["limits"])
    return ""


def _comments(cls) -> dict[str, str]:
    """What stands behind the fields of a dataclass in its source: {field: comment}."""
    found = {}
    for c in reversed(cls.__mro__[:-1]):  # `object` has no source
        try:
            lines = inspect.getsource(c).splitlines()
        except (OSError, TypeError):  # typed into a console
            continue
        for line in lines:
            behind = re.match(r" {4}(\w+): [^#]*# (.*)", line)
            if behind:
                found[behind[1]] = behind[2]
    return found


def _print_help(cls) -> None:
    print(sys.modules[cls.__module__].__doc__)
    print("Options (and keys of the TOML file), with their defaults:")
    comments = _comments(cls)
    for f in fields(cls):
        default = f.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        elif isinstance(default, bool):  # as it is written
            default = str(default).lower()
        line = f"  --{f.name}={default}"
        comment = comments.get(f.name, "")
        allowed = _allowed(f)
        if comment and allowed:
            comment += f" ({allowed})"
        print(f"{line:35} {comment or allowed}".rstrip())


def read_toml(path: str) -> dict:
    """The content of a TOML file. ValueError, in one line, where it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors put a mark at the front
            return tomllib.loads(f.read())
    except OSError as e:
        raise ValueError(f"cannot read the config file {path!r}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid TOML: {e}") from None


def _literal(text: str, want: type):
    """The command line's text as the type that the key wants; as it is where it is not one."""
    if want is tuple:
        return [_literal(part, float) for part in text.split(",")]
    if want is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if want is str:
        return os.path.expanduser(text)  # no shell does it behind an equals sign
    try:
        return want(text)
    except ValueError:
        return text


def _as_type(value, want: type):
    """A value of TOML as the type that the key wants; None where it is of another type."""
    if want is float and type(value) is int:  # TOML tells 3 from 3.0, people do not
        return float(value)
    if want is tuple:
        numbers = value if type(value) is list else [value]
        if numbers and all(type(x) in (int, float) for x in numbers):
            return tuple(map(float, numbers))
        return None
    return value if type(value) is want else None  # type(), because a bool is an int as well


def to_toml(cfg) -> str:
    """The dataclass as TOML that `parse` reads back."""
    return "".join(f"{f.name} = {_toml_value(getattr(cfg, f.name))}\n" for f in fields(cfg))


def _toml_value(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # TOML's escapes are JSON's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return repr(list(value))
    return repr(value)


# --- files -----------------------------------------------------------------------------------

def write_atomic(path: str, content: bytes | Callable) -> None:
    """Write `content`, bytes or a function of the open file, to a temporary file beside `path`,
    then rename it to `path`.

    Raises OSError when it cannot be written (disk full, no permission); `path` is then untouched.
    """
    folder = os.path.dirname(path) or "."
    # in the same folder, because a rename is atomic only within one file system
    prefix = f".{os.path.basename(path)}.{os.getpid()}@{socket.gethostname()}."
    fd, tmp = tempfile.mkstemp(dir=folder, prefix=prefix)
    try:
        with os.fdopen(fd, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content)
            f.flush()
            # a rename that outlives a power cut must not point at an empty file
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)  # mkstemp makes private files
        os.replace(tmp, path)
    except BaseException as e:  # Ctrl-C too
        if os.path.exists(tmp):
            os.unlink(tmp)
        # torch.save raises a RuntimeError, with what the system said inside
        reason = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(reason, OSError) and reason.errno is not None:
            raise OSError(reason.errno, reason.strerror, path) from e
        if isinstance(e, RuntimeError):
            raise OSError(f"writing {path} failed: {_first_line(e)}") from e
        raise


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files of `write_atomic` whose process was killed on this machine."""
    for name in os.listdir(folder):
        made_by = re.fullmatch(r"\..+\.(\d+)@(.+)\.[^.]+", name)
        if made_by is None or made_by[2] != socket.gethostname():
            continue
        try:
            os.kill(int(made_by[1]), 0)  # signal 0 asks whether it is there
        except ProcessLookupError:
            os.unlink(os.path.join(folder, name))
        except OSError:  # it is there, and another user's
            pass


@contextmanager
def sole_user(folder: str) -> Iterator[None]:
    """Make a directory, and keep other processes that ask for it the same way out meanwhile.

    OSError where it cannot be made, BlockingIOError where another process has it. The system
    releases it when the process ends, however that happens.
    """
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise
    except OSError:  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        os.close(held)
