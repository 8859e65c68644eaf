"""config.py: typed values from TOML and the command line, one-line refusals, files that are never half written."""
import os
import stat
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass

import pytest

from prune import PruneConfig
from config import bounded, die, one_of, parse, sole_user, to_toml, write_atomic


@dataclass
class Toy:
    steps: int = 10
    rate: float = 0.5
    flag: bool = False
    name: str = "plain"
    out_dir: str = "out"


@dataclass
class Several:
    target: tuple = (0.15,)


def refused(capsys, argv: list[str], cls=Toy) -> str:
    """The one line on stderr with which parse ends the program."""
    with pytest.raises(SystemExit) as stop:
        parse(cls, argv)
    text = capsys.readouterr()
    assert stop.value.code == 2
    assert text.err.count("\n") == 1 and text.err.strip() and not text.out
    return text.err


def toml(tmp_path, text: str | bytes) -> str:
    path = tmp_path / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_defaults_stand_where_nothing_is_given():
    assert parse(Toy, []) == Toy()


def test_values_of_the_command_line_take_the_type_of_the_default():
    cfg = parse(Toy, ["--steps=-3", "--rate=1e-3", "--flag=true", "--name=12"])
    assert cfg == Toy(-3, 0.001, True, "12")
    assert [type(v) for v in asdict(cfg).values()] == [int, float, bool, str, str]


def test_values_of_the_file_are_read(tmp_path):
    path = toml(tmp_path, 'steps = 7\nrate = 2.5\nflag = true\nname = "a b"\n')
    assert parse(Toy, [f"--config={path}"]) == Toy(7, 2.5, True, "a b")


def test_the_command_line_overrides_the_file_wherever_it_stands(tmp_path):
    path = toml(tmp_path, "steps = 7\nrate = 2.5\n")
    assert parse(Toy, ["--steps=8", f"--config={path}"]) == Toy(8, 2.5)
    assert parse(Toy, [f"--config={path}", "--steps=8"]) == Toy(8, 2.5)


def test_the_last_of_two_equal_overrides_counts():
    assert parse(Toy, ["--steps=1", "--steps=2"]).steps == 2


def test_a_whole_number_is_accepted_for_a_float_and_becomes_one(tmp_path):
    path = toml(tmp_path, "rate = 3\n")
    for argv in ([f"--config={path}"], ["--rate=3"]):
        rate = parse(Toy, argv).rate
        assert rate == 3.0 and type(rate) is float


def test_a_flag_without_a_value_is_true():
    assert parse(Toy, ["--flag"]).flag is True


@pytest.mark.parametrize("text, want", [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_true_and_false_are_understood_in_any_case(text, want):
    assert parse(Toy, [f"--flag={text}"]).flag is want


def test_a_value_may_hold_equals_signs_and_spaces():
    assert parse(Toy, ["--name=a=b c=--d"]).name == "a=b c=--d"


@pytest.mark.parametrize("line, key", [
    ('steps = "7"', "steps"), ("steps = 7.0", "steps"), ("steps = true", "steps"), ('rate = "1"', "rate"),
    ("rate = false", "rate"), ("flag = 1", "flag"), ('flag = "true"', "flag"), ("name = 3", "name"),
    ("steps = [1]", "steps"), ("steps = 2024-01-01", "steps"), ("[steps]\na = 1", "steps"),
])
def test_a_mistyped_value_in_the_file_is_refused_with_key_and_file(tmp_path, capsys, line, key):
    path = toml(tmp_path, line)
    error = refused(capsys, [f"--config={path}"])
    assert f"'{key}'" in error and path in error


@pytest.mark.parametrize("arg, key", [
    ("--steps=abc", "steps"), ("--steps=1.5", "steps"), ("--steps=", "steps"), ("--steps", "steps"), ("--rate=fast", "rate"),
    ("--rate", "rate"), ("--flag=1", "flag"), ("--flag=", "flag"),
])
def test_a_mistyped_value_on_the_command_line_is_refused_with_its_key(capsys, arg, key):
    assert f"'{key}'" in refused(capsys, [arg])


def test_text_without_a_value_is_refused(capsys):
    assert "'out_dir'" in refused(capsys, ["--out_dir"])


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_key_and_the_file(tmp_path, capsys):
    path = toml(tmp_path, "step = 7\n")
    error = refused(capsys, [f"--config={path}"])
    assert "'step'" in error and "'steps'" in error and path in error


def test_an_unknown_key_on_the_command_line_is_refused_with_the_nearest_key(capsys):
    error = refused(capsys, ["--outdir=x"])
    assert "'outdir'" in error and "'out_dir'" in error and "command line" in error


def test_a_key_unlike_all_others_still_gets_a_nearest_key(capsys):
    assert any(f"'{k}'" in refused(capsys, ["--zzzz=1"]) for k in asdict(Toy()))


@pytest.mark.parametrize("text", [b"steps = = 3\n", b"steps 3", b"[", b'name = "a', b"\xff\xfe\x00", b"steps = 1\nsteps = 2\n"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path, capsys, text):
    path = toml(tmp_path, text)
    assert path in refused(capsys, [f"--config={path}"])


def test_a_missing_config_file_is_refused_by_name(tmp_path, capsys):
    assert "absent.toml" in refused(capsys, [f"--config={tmp_path}/absent.toml"])


@pytest.mark.parametrize("tail", ["", "{tmp}"])
def test_an_empty_name_or_a_folder_as_config_is_refused(tmp_path, capsys, tail):
    refused(capsys, ["--config=" + tail.format(tmp=tmp_path)])


@pytest.mark.parametrize("arg", ["steps=3", "run.toml", "-steps=3", "--", "--=3"])
def test_an_argument_that_is_no_option_is_refused(capsys, arg):
    assert arg in refused(capsys, [arg])


def test_a_broken_override_is_refused_although_the_file_is_good(tmp_path, capsys):
    path = toml(tmp_path, "steps = 7\n")
    assert "command line" in refused(capsys, [f"--config={path}", "--steps=x"])


def test_help_lists_every_key_and_exits_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Toy, ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{k}={v}" in out for k, v in asdict(Toy(flag="false")).items())


def test_help_shows_what_a_key_means_and_what_it_may_be(capsys):
    with pytest.raises(SystemExit):
        parse(PruneConfig, ["--help"])
    out = capsys.readouterr().out
    assert "--ablation=mean                   what a node outside the circuit is held at (mean or zero)\n" in out
    assert "--tie_qk=false                    one gate for a query channel" in out  # of the class that it extends
    assert "--warmup=0.05                     share of the steps (at least 0 and at most 1)\n" in out and "--seed=0                          at least 0\n" in out


def test_a_path_that_is_not_utf_8_is_one_line(capsys):
    assert "'name'" in refused(capsys, ["--name=/tmp/\udcff"])


def test_die_prints_one_line_on_stderr_and_exits_2(capsys):
    with pytest.raises(SystemExit) as stop:
        die("no such thing")
    text = capsys.readouterr()
    assert stop.value.code == 2 and not text.out
    assert text.err.count("\n") == 1 and "no such thing" in text.err


# --- fields of several numbers --------------------------------------------------------------------

@pytest.mark.parametrize("text, want", [("0.5,0.15", (0.5, 0.15)), ("0.5", (0.5,)), ("1,2,3e-1", (1.0, 2.0, 0.3)), ("-1", (-1.0,))])
def test_numbers_with_commas_on_the_command_line_become_a_tuple_of_floats(text, want):
    got = parse(Several, [f"--target={text}"]).target
    assert got == want and type(got) is tuple and all(type(x) is float for x in got)


@pytest.mark.parametrize("text, want", [("0.5", (0.5,)), ("2", (2.0,)), ("[0.5, 0.15]", (0.5, 0.15)), ("[1, 0.5]", (1.0, 0.5)), ("[\n  0.5,\n]", (0.5,))])
def test_a_number_or_a_list_in_the_file_becomes_a_tuple_of_floats(tmp_path, text, want):
    got = parse(Several, [f"--config={toml(tmp_path, f'target = {text}')}"]).target
    assert got == want and type(got) is tuple and all(type(x) is float for x in got)


def test_several_numbers_of_the_command_line_replace_those_of_the_file(tmp_path):
    assert parse(Several, [f"--config={toml(tmp_path, 'target = [1, 2, 3]')}", "--target=0.5"]).target == (0.5,)
    assert parse(Several, []).target == (0.15,)


@pytest.mark.parametrize("text", ["", "x", "0.5,", ",0.5", "0.5,,1", "0.5 0.1", "0.5;0.1", "[0.5]", "true"])
def test_what_is_no_row_of_numbers_is_refused_on_the_command_line(capsys, text):
    error = refused(capsys, [f"--target={text}"], Several)
    assert "'target' in the command line must be a number or several" in error


@pytest.mark.parametrize("text", ["[]", '"0.5"', '["0.5"]', "true", "[true]", "[0.5, [1]]", "2024-01-01", '{ a = 1 }'])
def test_what_is_no_row_of_numbers_is_refused_in_the_file(tmp_path, capsys, text):
    path = toml(tmp_path, f"target = {text}\n")
    error = refused(capsys, [f"--config={path}"], Several)
    assert "'target'" in error and path in error


def test_several_numbers_without_a_value_are_refused(capsys):
    assert "'target'" in refused(capsys, ["--target"], Several)


@pytest.mark.parametrize("numbers", [(0.15,), (0.5, 0.15, 0.05), (1e-05, 1e22, -0.0), (0.1 + 0.2,), (float("inf"), -1.0)], ids=repr)
def test_toml_of_several_numbers_reads_back_as_the_same(tmp_path, numbers):
    back = parse(Several, [f"--config={toml(tmp_path, to_toml(Several(numbers)))}"])
    assert repr(back) == repr(Several(numbers))


def test_help_shows_several_numbers_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        parse(Several, ["--help"])
    assert "--target=0.15\n" in capsys.readouterr().out


# --- to_toml -------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [
    Toy(), Toy(flag=True), Toy(steps=-1), Toy(steps=10**15),
    *(Toy(rate=r) for r in (1e-05, 1e-300, 1e22, -0.0, 0.1 + 0.2, float("inf"), float("-inf"), 3.0)),
    *(Toy(name=s) for s in ("", "it's", 'say "hi"', "C:\\new\\table", "\\", '\\"', '"""', "a = b # c", "tab\there",
                            "ünï ☃ 🐍", "two\nlines", "cr\r", "bell\x07", "del\x7f", "\x00")),
], ids=lambda c: repr(c)[3:])
def test_toml_of_a_config_reads_back_as_the_same_config(tmp_path, cfg):
    back = parse(Toy, [f"--config={toml(tmp_path, to_toml(cfg))}"])
    assert repr(back) == repr(cfg)  # repr tells 0.0 from -0.0 and True from 1


def test_toml_keeps_a_value_that_is_not_a_number(tmp_path):
    back = parse(Toy, [f"--config={toml(tmp_path, to_toml(Toy(rate=float('nan'))))}"])
    assert back.rate != back.rate


def test_toml_names_every_key_once():
    assert list(tomllib.loads(to_toml(Toy()))) == list(asdict(Toy()))


# --- write_atomic --------------------------------------------------------------------------------

def test_write_atomic_makes_a_new_file_with_exactly_what_was_written(tmp_path):
    write_atomic(str(tmp_path / "a"), lambda f: f.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_write_atomic_replaces_a_longer_file_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"old and long")
    write_atomic(str(tmp_path / "a"), lambda f: f.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_write_atomic_shows_the_old_file_until_the_writer_is_done(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write(f):
        f.write(b"x" * 100_000)
        f.flush()
        assert (tmp_path / "a").read_bytes() == b"old"

    write_atomic(str(tmp_path / "a"), write)
    assert (tmp_path / "a").stat().st_size == 100_000


@pytest.mark.parametrize("error, seen", [(ValueError("x"), ValueError), (OSError(28, "No space left"), OSError),
                                         (KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("write failed"), OSError)])
def test_write_atomic_keeps_the_old_file_and_leaves_no_other_when_the_writer_raises(tmp_path, error, seen):
    (tmp_path / "a").write_bytes(b"old")

    def write(f):
        f.write(b"half")
        raise error

    with pytest.raises(seen):
        write_atomic(str(tmp_path / "a"), write)
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_write_atomic_leaves_nothing_when_the_first_write_raises(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomic(str(tmp_path / "a"), lambda f: 1 / 0)
    assert os.listdir(tmp_path) == []


def test_write_atomic_into_a_missing_folder_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        write_atomic(str(tmp_path / "no" / "a"), lambda f: f.write(b"new"))


def test_write_atomic_takes_a_name_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomic("a", lambda f: f.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"


def test_write_atomic_files_are_readable_by_others(tmp_path):
    write_atomic(str(tmp_path / "a"), lambda f: f.write(b"new"))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


# --- bounds --------------------------------------------------------------------------------------

@dataclass
class Bounded:
    steps: int = bounded(10, at_least=1)
    share: float = bounded(0.5, above=0, at_most=1)
    decay: float = bounded(0.1, at_least=0, below=1)
    rate: float = bounded(1.0, above=0)
    targets: tuple = bounded((0.15,), above=0)
    device: str = one_of("auto", "cpu", "cuda")


def test_bounds_leave_defaults_and_types_as_they_are():
    cfg = parse(Bounded, [])
    assert asdict(cfg) == dict(
        steps=10, share=0.5, decay=0.1, rate=1.0, targets=(0.15,), device="auto")
    assert type(parse(Bounded, ["--share=1"]).share) is float


@pytest.mark.parametrize("arg", ["--steps=1", "--share=1", "--share=1e-9", "--decay=0", "--rate=1e300",
                                 "--targets=0.1,3", "--device=cpu", "--device=cuda"])
def test_a_value_at_its_bound_is_taken(arg):
    parse(Bounded, [arg])


@pytest.mark.parametrize("arg, said", [
    ("--steps=0", "steps must be at least 1, not 0"),
    ("--share=0", "share must be above 0 and at most 1, not 0.0"),
    ("--share=1.1", "share must be above 0 and at most 1, not 1.1"),
    ("--decay=1", "decay must be at least 0 and below 1, not 1.0"),
    ("--decay=-0.1", "decay must be at least 0 and below 1, not -0.1"),
    ("--rate=inf", "rate must be above 0, not inf"), ("--rate=nan", "rate must be above 0, not nan"),
    ("--targets=0.1,0", "targets must be above 0, not 0.0"),
    ("--device=tpu", "device must be auto, cpu or cuda, not 'tpu'"),
])
def test_a_value_out_of_bounds_is_refused_with_its_name_and_bounds(capsys, arg, said):
    assert said in refused(capsys, [arg], Bounded)


def test_the_files_values_have_the_same_bounds(tmp_path, capsys):
    assert "steps must be" in refused(capsys, [f"--config={toml(tmp_path, 'steps = 0')}"], Bounded)


def test_write_atomic_takes_bytes(tmp_path):
    write_atomic(str(tmp_path / "a"), b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_a_long_name_of_a_short_key_is_understood(capsys):
    @dataclass
    class Rates:
        lr: float = 0.1
        eval_interval: int = 3
    assert "'lr'" in refused(capsys, ["--learning_rate=1"], Rates)


def test_a_mark_at_the_front_of_a_config_file_is_skipped(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 3\r\nrate = 2.0\r\n")
    assert parse(Bounded, [f"--config={path}"]).steps == 3


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    @dataclass
    class Paths:
        out_dir: str = "out"

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text("out_dir = 'in the file'")
    assert parse(Paths, ["--out_dir=~/run"]).out_dir == f"{tmp_path}/run"
    assert parse(Paths, ["--config=~/c.toml"]).out_dir == "in the file"
    assert parse(Paths, ["--out_dir=a~b/~"]).out_dir == "a~b/~"


def test_what_torch_says_of_a_full_disk_is_what_the_system_said(tmp_path):
    def write(f):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    with pytest.raises(OSError, match="No space left on device.*/a'"):
        write_atomic(str(tmp_path / "a"), write)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_names_its_file(tmp_path, capsys):
    def write(f):
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit):
        try:
            write_atomic(str(tmp_path / "a"), write)
        except OSError as e:
            die(e)
    assert f"{tmp_path}/a: No space left on device\n" in capsys.readouterr().err


def test_a_directory_has_one_user_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    ask = f"""
import sys; sys.path.insert(0, {os.getcwd()!r})
from config import sole_user
with sole_user({str(folder)!r}): print("mine")
"""
    def another():
        return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)

    with sole_user(str(folder)):
        assert "BlockingIOError" in another().stderr
    assert another().stdout == "mine\n"
    with sole_user(str(folder)):  # this process as well, once it has let go
        pass
    assert os.listdir(folder) == []
