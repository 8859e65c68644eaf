"""What every program of tools/program.py has below its circuit: all from the line of dashes on.

Not run as it stands: TABLES, ANSWERS, CALIBRATION and `circuit` are in the program itself.
"""
# --- the same in every program: norms, attention, words to tokens, the command ----------------

import argparse
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

DATA = np.load(Path(__file__).with_suffix(".npz"))
TOKENS = [bytes.fromhex(text) for text in DATA["vocabulary"]]  # token id -> bytes
IDS = {token: i for i, token in enumerate(TOKENS) if token}
EMBEDDING = DATA["embedding"].astype(np.float64)  # (vocabulary, channels)
BIGRAM = DATA["bigram"].astype(np.float64)        # (vocabulary, answers)
EPS = float(DATA["eps"])
LONGEST = int(DATA["longest"])  # tokens that the model takes
for channel, table in TABLES.items():
    for token, entry in table.items():
        EMBEDDING[IDS[token if isinstance(token, bytes) else token.encode()], channel] = entry

# A letter is what is in a word, but neither a digit nor "_".
WORDS = re.compile(
    r"(?:(?![\r\n])[\W_])?[^\W\d_]+|\d{1,3}| ?(?:(?!\s)[\W_])+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def embed(t):
    """Token ids (T,) -> the stream (T, channels): embeddings, and positions if they are added."""
    stream = EMBEDDING[t]
    return stream + DATA["positions"][: len(t)] if "positions" in DATA else stream


def whole(read, stream, written):
    """The stream (T, channels) as a norm sees it: other writes at their means."""
    x = stream + DATA[f"held.{read}"]
    for channel, values in written.items():
        x[:, channel] = values
    return x


def rms(read, stream, written={}):
    """What the norm before a read divides by, (T,). written: {channel: values}."""
    return np.sqrt(np.mean(whole(read, stream, written) ** 2, axis=1) + EPS)


def own(answer, stream, written):
    """What all channels but those written say for an answer, (T,), before the last norm."""
    x = whole("final", stream, dict.fromkeys(written, 0.0))
    return x @ DATA["unembedding"][answer].astype(np.float64)


def attention(t, scores, sink=-np.inf):
    """Shares (T, T): softmax of the scores over this token and those before it, and the sink."""
    scores = np.where(np.tri(len(t), dtype=bool), scores, -np.inf)
    most = np.maximum(scores.max(axis=1, keepdims=True), sink)
    shares = np.exp(scores - most)
    return shares / (shares.sum(axis=1, keepdims=True) + np.exp(sink - most))


# --- only with --competition: AbsTopK, as the model has it
def largest(y, k):
    """Which are the k largest magnitudes of each row, ties to the lower channel."""
    mask = np.zeros(y.shape, dtype=bool)
    order = np.argsort(-np.abs(y), axis=1, kind="stable")[:, :k]
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def compete(site, y, nodes):
    """What AbsTopK leaves of the circuit's nodes, {channel: values}, among all channels y."""
    for channel, values in nodes.items():
        y[:, channel] = values
    mask = largest(y, int(DATA[f"k.{site}"]))
    return [np.where(mask[:, channel], values, 0.0) for channel, values in nodes.items()]


def kept_of_read(site, read, stream, written, norm, nodes):
    y = whole(read, stream, written) / norm[:, None] * DATA[f"gain.{read}"]
    if f"beside.{read}" in DATA:
        y = np.concatenate([y, DATA[f"beside.{read}"][: len(y)]], axis=1)
    return compete(site, y, nodes)


def kept(site, source, given, nodes, act=np.array):
    """given: what the circuit's nodes of the site `source` pass on; all others there are held."""
    n_tokens = len(next(iter(nodes.values())))
    x = np.tile(DATA[f"mean.{source}"].astype(np.float64), (n_tokens, 1))
    for channel, values in given.items():
        x[:, channel] = values
    return compete(site, act(x @ DATA[f"weight.{site}"].T + DATA[f"bias.{site}"]), nodes)


# --- the same in every program again
def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def tokens_of(text):
    """Token ids of a text: byte pairs merged within each word, the pair of the lowest id first."""
    ids = []
    for word in WORDS.findall(text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            merged = [IDS.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
            i = merged.index(min(merged))
            if merged[i] == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [IDS[part] for part in parts]
    return ids


def logits_of(ids):
    """Token ids -> the answers' logits at the last token, and every variable by its name."""
    logits, variables = circuit(np.array(ids))
    return [float(logit[-1]) for logit in logits], variables


def shown(ids):
    return [TOKENS[i].decode(errors="replace") for i in ids]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", default="-", help="a prompt; - reads it from stdin")
    parser.add_argument("--ids", help="its token ids instead, such as 5,17")
    parser.add_argument("--trace", action="store_true", help="every variable at every token")
    args = parser.parse_args()
    try:
        if args.ids:
            ids = [int(i) for i in args.ids.split(",")]
        else:
            ids = tokens_of(sys.stdin.read() if args.text == "-" else args.text)
        if not 0 < len(ids) <= LONGEST or not all(0 <= i < len(TOKENS) for i in ids):
            raise ValueError(f"a prompt has 1 to {LONGEST} tokens, ids below {len(TOKENS)}")
    except ValueError as e:
        print(f"program.py: {e}", file=sys.stderr)
        sys.exit(2)
    logits, variables = logits_of(ids)
    if args.trace:  # a row for each token, a column for each variable
        one_each = (len(ids),)
        rows = {name: x for name, x in variables.items() if np.shape(x) == one_each and name != "t"}
        print("\t".join(["token", *rows]))
        for i, token in enumerate(shown(ids)):
            print("\t".join([repr(token), *(f"{x[i]:.4g}" for x in rows.values())]))
    for answer, logit in zip(ANSWERS, logits):
        print(f"{answer!r:12} {logit:9.4f}")
    if len(logits) == 2:
        margin = CALIBRATION[0] * (logits[0] - logits[1]) + CALIBRATION[1]
        print(f"P of {ANSWERS[0]!r}, calibrated: {1 / (1 + math.exp(-margin)):.3f}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal shows what it can
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
