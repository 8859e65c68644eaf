"""tools/repeats.py: its shares are those of a plain count."""
import json

import numpy as np
import pytest

from data.tinypython.tokenizer import EOT_ID, load_tokenizer
from tools import repeats


def plain(ids: list[int], tokenizer) -> tuple[float, float]:
    """Shares of lines and of runs that have come before, by sets of tuples."""
    lines, line = [], []
    for i in ids:
        line.append(i)
        if i == EOT_ID or b"\n" in tokenizer.decode_single_token_bytes(i):
            if any(j != EOT_ID and tokenizer.decode_single_token_bytes(j).strip() for j in line):
                lines.append(tuple(line))
            line = []
    runs = [tuple(ids[i : i + 32]) for i in range(len(ids) - 31)]
    return 1 - len(set(lines)) / len(lines), 1 - len(set(runs)) / len(runs)


@pytest.mark.parametrize("piece", [repeats.PIECE, 1000])
def test_the_shares_are_those_of_a_plain_count(tmp_path, capsys, monkeypatch, piece):
    tokenizer = load_tokenizer()
    rng = np.random.default_rng(0)
    text = ["x = 1\n", "\n\n", "def f(a):\n    return a\n", "    print('a')\n", "for i in b:\n", "   ", "y = x\n"]
    documents = [tokenizer.encode_ordinary("".join(rng.choice(text, 12))) + [EOT_ID] for _ in range(60)]
    ids = [i for n in rng.integers(0, 60, 150) for i in documents[n]]  # some come again whole
    np.array(ids, "<u2").tofile(tmp_path / "train.bin")
    np.array(ids[:50], "<u2").tofile(tmp_path / "val.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 2048, "val_parts": {"a": [0, 50]}, "eot": EOT_ID}))
    monkeypatch.setattr(repeats, "PIECE", piece)
    assert repeats.main([f"--data={tmp_path}", "--every", f"--tokens=2000,{10 * len(ids)}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    for n, row in zip((2000, len(ids)), rows, strict=True):
        of_lines, of_runs = plain(ids[:n], tokenizer)
        assert int(row[0].replace(",", "")) == n
        assert float(row[1].rstrip("%")) == pytest.approx(100 * of_lines, abs=0.5)  # a line may be cut in two at n
        assert float(row[2].rstrip("%")) == pytest.approx(100 * of_runs, abs=1.0)
    assert 0.1 < of_runs < 0.99 and of_lines > 0.5


def test_a_sample_comes_near_the_whole(tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, 40, 300_000).astype("<u2")  # chars: many short lines
    ids[200_000:] = ids[:100_000]
    whole, sample = repeats.Counter(1), repeats.Counter(16)
    for counter in (whole, sample):
        counter.add(repeats.runs(ids))
    assert whole.share == pytest.approx(1 / 3, abs=0.001) and sample.share == pytest.approx(whole.share, abs=0.01)
    assert sample.total == pytest.approx(whole.total / 16, rel=0.05)


def test_without_data_it_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        repeats.main([f"--data={tmp_path / 'none'}"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
