"""tokens.py: what is read is what is in the file, and an unusable file is one line."""
import json

import numpy as np
import pytest
import torch

from tokens import (Tokens, bigram_log_probs, check_tokenizer, count_bigrams, fingerprint, inputs_and_targets,
                    random_windows, read_bigrams, read_data, read_tokens, window_of)

IDS = np.arange(1000) % 50


def put(path, ids=IDS):
    np.asarray(ids).astype("<u2").tofile(path)
    return str(path)


def folder(path, ids=IDS, **meta):
    put(path / "train.bin", ids)
    put(path / "val.bin", ids)
    meta = {"vocab_size": 50, "val_parts": {"a": [0, 400], "b": [400, 1000]}, **meta}
    (path / "meta.json").write_text(json.dumps(meta))
    return str(path)


def test_the_ids_of_a_file_are_read_as_they_are(tmp_path):
    assert (read_tokens(put(tmp_path / "x.bin"), 50)[:] == IDS).all()


@pytest.mark.parametrize("spoil, said", [
    (lambda p: p.unlink(), "missing"),
    (lambda p: p.write_bytes(b""), "empty"),
    (lambda p: p.write_bytes(b"abc"), "odd size"),
    (lambda p: put(p, [3, 50, 4]), "50"),
])
def test_an_unusable_file_is_one_line_that_names_it(tmp_path, spoil, said):
    path = tmp_path / "x.bin"
    put(path)
    spoil(path)
    with pytest.raises(ValueError, match=said) as e:
        read_tokens(str(path), 50)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_data_come_with_their_parts(tmp_path):
    train, val, meta = read_data(folder(tmp_path, more="kept"), 16)
    assert (train[:] == IDS).all() and (val[:] == IDS).all()
    assert meta["val_parts"] == {"a": (0, 400), "b": (400, 1000)}
    assert meta["vocab_size"] == 50 and meta["more"] == "kept"


def test_a_part_without_room_for_a_window_and_its_target_is_refused(tmp_path):
    where = folder(tmp_path, val_parts={"a": [0, 17]})
    read_data(where, 16)
    with pytest.raises(ValueError, match="block_size 17.*part 'a'"):
        read_data(where, 17)


def test_targets_are_the_next_tokens():
    x, y = inputs_and_targets(IDS, np.array([3, 60]), 5, "cpu")
    assert x.tolist() == [[3, 4, 5, 6, 7], [10, 11, 12, 13, 14]] and (y == (x + 1) % 50).all()
    assert x.dtype == y.dtype == torch.int64


def test_random_windows_are_pieces_of_the_file_that_the_seed_decides(tmp_path):
    path = put(tmp_path / "x.bin")
    first, again, other = (list(random_windows(path, 50, 10, 700, seed)) for seed in (1, 1, 2))
    assert [len(b) for b in first] == [32, 32, 6]  # 70 windows
    for batch in first:
        assert batch.shape[1] == 10 and ((batch[:, 1:] - batch[:, :-1]) % 50 == 1).all()
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])


def test_every_place_of_a_file_can_be_drawn(tmp_path):
    path = put(tmp_path / "x.bin", range(12))
    starts = {int(row[0]) for b in random_windows(path, 12, 10, 1000, 0) for row in b}
    assert starts == {0, 1, 2}


def test_a_file_shorter_than_a_window_is_refused(tmp_path):
    path = put(tmp_path / "x.bin", range(9))
    with pytest.raises(ValueError, match="fewer than one block of 10"):
        next(random_windows(path, 12, 10, 100, 0))


def test_a_file_whose_length_is_not_that_of_the_meta_data_is_refused(tmp_path):
    counts = {"a": {"train": 600, "val": 400}, "b": {"train": 400, "val": 600}}
    where = folder(tmp_path, tokens=counts)
    read_data(where, 16)
    put(tmp_path / "train.bin", IDS[:500])  # cut off
    with pytest.raises(ValueError, match="500 .*1000"):
        read_data(where, 16)
    IDS.astype("<u4").tofile(tmp_path / "train.bin")  # of another type: every second number is a zero
    with pytest.raises(ValueError, match="2000 .*1000"):
        read_data(where, 16)


def test_a_fingerprint_tells_data_apart():
    long = np.arange(3_000_000, dtype="<u2")
    other = long.copy()
    other[1_000_000:1_020_000] = 0
    assert fingerprint(long) == fingerprint(long.copy()) != fingerprint(other)
    assert len({fingerprint(long[:n]) for n in (0, 1, 2047, 2049, 2_999_999)}) == 5


def test_a_window_is_as_long_as_asked_or_as_in_training_or_256(tmp_path):
    assert [window_of(str(tmp_path), size) for size in (8, 256, 1024)] == [8, 256, 256]  # no train.toml
    assert window_of(str(tmp_path), 1024, 512) == 512
    (tmp_path / "train.toml").write_text("block_size = 700\n")
    assert [window_of(str(tmp_path), size) for size in (8, 700, 1024)] == [8, 700, 700]
    assert window_of(str(tmp_path), 1024, 512) == 512
    with pytest.raises(ValueError, match="window 1025 .* block_size 1024"):
        window_of(str(tmp_path), 1024, 1025)


def test_data_of_another_tokenizer_are_refused_where_meta_says_so(tmp_path):
    check_tokenizer(folder(tmp_path), "abc")  # of data that say nothing, nothing is known
    check_tokenizer(folder(tmp_path, tokenizer_hash="abc"), "abc")
    with pytest.raises(ValueError, match="another tokenizer.*--tokenizer"):
        check_tokenizer(folder(tmp_path, tokenizer_hash="xyz"), "abc")
    (tmp_path / "meta.json").unlink()
    check_tokenizer(str(tmp_path), "abc")


def test_a_sample_is_not_drawn_from_a_file_that_was_cut_off(tmp_path):
    counts = {"a": {"train": 1000, "val": 0}}
    path = f"{folder(tmp_path, tokens=counts)}/train.bin"
    next(random_windows(path, 50, 10, 100, 0))
    put(path, IDS[:500])
    with pytest.raises(ValueError, match="holds 500 uint16 tokens, but meta.json says 1000"):
        next(random_windows(path, 50, 10, 100, 0))


# --- shards --------------------------------------------------------------------------------------

def shards(path, cuts=(0, 300, 700, 1000), ids=IDS):
    """A folder whose train is in pieces, as prepare.py describes them."""
    where = folder(path)
    (path / "train.bin").unlink()
    described = []
    for i, (a, b) in enumerate(zip(cuts, cuts[1:])):
        put(path / f"train.{i:04}.bin", ids[a:b])
        described.append({"file": f"train.{i:04}.bin", "tokens": b - a, "fingerprint": fingerprint(ids[a:b].astype("<u2")),
                          "largest_id": int(ids[a:b].max())})
    np.save(path / "bigrams.npy", count_bigrams(ids, 50))
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"shards": {"train": described}, "bigrams": "bigrams.npy"}))
    return where


def test_shards_are_read_as_one(tmp_path):
    train, _, meta = read_data(shards(tmp_path), 16)
    assert len(train) == 1000 and (train[:] == IDS).all()
    for a in range(0, 1000, 7):
        for n in (1, 17, 450):  # inside a shard, across one border, across two
            assert (train[a : a + n] == IDS[a : a + n]).all() and len(train[a : a + n]) == min(n, 1000 - a)
    assert len(train[1000:]) == len(train[5:5]) == 0
    assert fingerprint(train) == fingerprint(IDS.astype("<u2"))
    x, y = inputs_and_targets(train, np.array([290, 690]), 20, "cpu")
    assert (y == (x + 1) % 50).all()
    windows = list(random_windows(f"{tmp_path}/train.bin", 50, 10, 700, 0))  # by the name of the whole
    assert all(((w[:, 1:] - w[:, :-1]) % 50 == 1).all() for w in windows)
    assert (read_bigrams(str(tmp_path), meta, len(train)) == count_bigrams(train, 50)).all()


def test_counts_that_are_there_give_the_same_probabilities(tmp_path):
    train, _, meta = read_data(shards(tmp_path), 16)
    assert torch.equal(bigram_log_probs(train, 50, read_bigrams(str(tmp_path), meta, len(train))), bigram_log_probs(train, 50))


def test_what_prepare_found_is_not_looked_for_again(tmp_path, monkeypatch):
    where = shards(tmp_path)
    monkeypatch.setattr("tokens.count_bigrams", None)
    monkeypatch.setattr("tokens.largest_id", lambda ids: 49 if len(ids) == 1000 else None)  # of val.bin, a single file
    train, _, meta = read_data(where, 16)
    bigram_log_probs(train, 50, read_bigrams(where, meta, len(train)))


def another_seed(path):
    put(path / "train.0001.bin", (IDS[300:700] + 1) % 50)


def past_the_vocabulary(path):
    meta = json.loads((path / "meta.json").read_text())
    meta["shards"]["train"][1]["largest_id"] = 50
    (path / "meta.json").write_text(json.dumps(meta))


def described_badly(path):
    meta = json.loads((path / "meta.json").read_text())
    del meta["shards"]["train"][1]["tokens"]
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("spoil, said", [
    (lambda p: (p / "train.0001.bin").unlink(), "train.0001.bin is missing"),
    (lambda p: put(p / "train.0001.bin", IDS[300:699]), "train.0001.bin holds 399 .* 400"),
    (lambda p: (p / "train.0001.bin").write_bytes(b"abc"), "odd size"),
    (another_seed, "train.0001.bin is not the file that meta.json describes"),
    (lambda p: (p / "train.0001.bin").rename(p / "train.0002.bin"), "train.0001.bin is missing"),
    (past_the_vocabulary, "train.0001.bin holds token id 50"),
    (described_badly, "meta.json is unusable"),
], ids=["missing", "cut", "odd", "another seed", "misnamed", "another tokenizer", "badly described"])
def test_a_shard_that_is_not_what_it_should_be_is_one_line_that_names_it(tmp_path, spoil, said):
    where = shards(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=said) as e:
        read_data(where, 16)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("spoil", [
    lambda p: (p / "bigrams.npy").unlink(), lambda p: (p / "bigrams.npy").write_bytes(b"\x93NUMPY"),
    lambda p: np.save(p / "bigrams.npy", np.zeros((50, 50), np.int64)),
    lambda p: np.save(p / "bigrams.npy", np.zeros((3, 3), np.int64)),
], ids=["missing", "cut", "of other data", "of another vocabulary"])
def test_bigram_counts_that_are_not_of_these_data_are_refused(tmp_path, spoil):
    where = shards(tmp_path)
    spoil(tmp_path)
    train, _, meta = read_data(where, 16)
    with pytest.raises(ValueError, match="bigrams.npy .*prepare.py") as e:
        read_bigrams(where, meta, len(train))
    assert "\n" not in str(e.value)


def test_gaps_are_not_read():
    with pytest.raises(ValueError, match="without gaps"):
        Tokens([IDS])[::2]
