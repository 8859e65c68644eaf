"""The command line that every script shares: TOML file + `--key=value` -> a typed dataclass.

- `python train.py --config=configs/demo.toml --lr=0.02`: the file first, then the overrides.
- An unknown key, a value of the wrong type or an unreadable file is one line and exit status 2.
- `write_atomic`: a file is either the old one or the new one, never half of it.
"""
import difflib
import json
import os
import sys
import tempfile
import tomllib
from dataclasses import fields
from typing import Callable, Iterable, NoReturn


def die(message: str) -> NoReturn:
    """Bad input: one line on stderr that says what is wrong and what to do, exit status 2."""
    if os.environ.get("RANK", "0") == "0":  # under torchrun, once
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(2)


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that `name` was probably meant to be."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


def parse(cls, argv: list[str]):
    """Build the dataclass `cls` from `argv`: `--config=FILE.toml` and `--key=value` overrides.

    The type of a field is the type of its default; a tuple holds numbers (`0.5,0.15`). `--key` alone sets a bool to true.
    Exits with status 2, and one line that names the key, on any key or value that does not fit.
    """
    types = {f.name: type(f.default) for f in fields(cls)}
    values, source = {}, None
    overrides = []
    for arg in argv:
        key, eq, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not key:
            die(f"'{arg}' is not understood; options are --key=value, --config=FILE.toml or --help")
        if key == "help":
            print(sys.modules[cls.__module__].__doc__)
            print("Options (and keys of the TOML file), with their defaults:")
            print("\n".join(f"  --{f.name}={','.join(map(str, f.default)) if types[f.name] is tuple else f.default}" for f in fields(cls)))
            raise SystemExit(0)
        if key == "config":
            source = text
        else:
            if not eq and types.get(key, bool) is not bool:
                die(f"key '{key}' in the command line needs a value: --{key}=...")
            overrides.append((key, text if eq else "true"))
    if source is not None:
        try:
            with open(source, "rb") as f:
                values = tomllib.load(f)
        except OSError as e:
            die(f"cannot read the config file {source!r}: {e.strerror}")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            die(f"{source} is not valid TOML: {e}")
    where = dict.fromkeys(values, source)
    for key, text in overrides:
        values[key], where[key] = _literal(text, types.get(key, str)), "the command line"
    for key, value in values.items():
        if key not in types:
            die(f"unknown key '{key}' in {where[key]}; the nearest valid key is '{nearest(key, types)}'")
        want = types[key]
        if want is float and type(value) is int:
            values[key] = float(value)
        elif want is tuple and (numbers := value if type(value) is list else [value]) and all(type(x) in (int, float) for x in numbers):
            values[key] = tuple(map(float, numbers))
        elif type(value) is not want:
            die(f"key '{key}' in {where[key]} must be {_NAMES[want]}, not {value!r}")
    return cls(**values)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a number or several"}


def _literal(text: str, want: type):
    """The command line's text as the type that the key wants; the text itself where it is not one."""
    if want is tuple:
        return [_literal(part, float) for part in text.split(",")]
    if want is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return want(text)
    except ValueError:
        return text


def to_toml(cfg) -> str:
    """The dataclass as TOML that `parse` reads back."""
    def show(v):
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, str):
            return json.dumps(v, ensure_ascii=False).replace("\x7f", "\\u007f")  # else TOML's escapes are JSON's
        return repr(list(v) if isinstance(v, tuple) else v)
    return "".join(f"{f.name} = {show(getattr(cfg, f.name))}\n" for f in fields(cfg))


def write_atomic(path: str, write: Callable) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it to `path`.

    Raises OSError when it cannot be written (disk full, no permission); `path` is then untouched.
    """
    folder = os.path.dirname(path) or "."
    fd, tmp = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(fd, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())  # a rename that outlives a power cut must not point at an empty file
        os.chmod(tmp, 0o644)  # mkstemp makes private files
        os.replace(tmp, path)
    except BaseException as e:
        if os.path.exists(tmp):
            os.unlink(tmp)
        if isinstance(e, RuntimeError):  # torch.save wraps a failed write
            raise OSError(f"writing {path} failed: {str(e).splitlines()[0]}") from e
        raise
