"""What a training run would take, by arithmetic: `python train.py --config=... --plan`.

- Parameters and nonzeros (L0) by tensor, tokens, floating-point operations.
- Memory of a process at its peak, with and without checkpointing, and what fits which card.

Nothing is allocated: the model is made without memory. tools/bench_memory.py compares the
prediction with what a run holds. Paper sections A.1 and A.2.
"""
import re
from dataclasses import dataclass

from model import GPT, GPTConfig
from optim import kind_of, nonzeros_of
from tokens import LARGEST_TABLE

CARDS = (24, 40, 80, 141)  # GB of memory on the usual ones
SPARE = 1.5  # GB of a card that its driver, PyTorch's kernels and fragments take
FLOAT = 4  # bytes


@dataclass
class Memory:
    """Bytes that a process holds at the peak of a step."""
    weights: int      # with what stands beside them: casts, and the counted bigram table
    optimizer: int
    gradients: int    # at their most, when the backward pass ends
    activations: int  # at their most, when it begins
    peak: int         # of all; less than the sum, as activations go while gradients come


# --- weights ---------------------------------------------------------------------------------

def densities(cfg) -> dict[str, float]:
    """{kind of a parameter: the density that it ends with}; a dense one has 1."""
    return {
        "matrix": cfg.density,
        "embedding": cfg.embed_density or cfg.density,
        "bias": cfg.bias_density or cfg.density,
        "dense": 1.0,
    }


def tensors(cfg, model: GPT) -> list[tuple[str, str, int, int]]:
    """(name, shape, parameters, L0) of what is learnt, the same tensor of all layers in one row.
    L0 is 0 where a tensor is dense, which the paper does not count."""
    rows = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = kind_of(name)
        nonzeros = 0 if kind == "dense" else nonzeros_of(p.numel(), densities(cfg)[kind])
        key = re.sub(r"\.h\.\d+\.", ".h.*.", name)
        _, count, total = rows.get(key, ("", 0, 0))
        rows[key] = (" x ".join(map(str, p.shape)), count + p.numel(), total + nonzeros)
    return [(name, *row) for name, row in rows.items()]


def learnt(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- floating-point operations ---------------------------------------------------------------

def flops_a_token(c: GPTConfig) -> int:
    """Of training on one token: two for a weight forward, twice that backward."""
    width = c.n_head * c.d_head
    layer = c.d_read * 3 * width + width * c.d_model + c.d_read * c.d_mlp + c.d_mlp * c.d_model
    # a query looks at half of the window on average; products with keys and with values
    attention = 2 * width * c.block_size // 2
    return 6 * (c.n_layer * (layer + attention) + c.d_model * c.vocab_size)


# --- memory ----------------------------------------------------------------------------------

def saved_by_attention(c: GPTConfig, half: bool) -> int:
    """Bytes a token that attention keeps for its backward pass."""
    size = 2 if half else FLOAT
    width = c.n_head * c.d_head
    stream = FLOAT * c.d_model  # what the norm reads; autocast leaves the stream alone
    read = size * c.d_read
    heads = size * 4 * width    # queries, keys, values, and what the heads gathered
    if half and c.sink:         # of a CUDA device: padded for the sink (ops.sink_attention)
        heads = size * 4 * c.n_head * (8 * (c.d_head // 8) + 8)
    gathered = size * width     # the same with its heads side by side, for c_proj
    masks = c.d_read + 3 * width + c.d_model  # of AbsTopK, a byte each
    return stream + read + heads + gathered + (masks if c.afrac else 0)


def saved_by_mlp(c: GPTConfig, half: bool) -> int:
    """Bytes a token that an MLP keeps for its backward pass."""
    size = 2 if half else FLOAT
    stream = FLOAT * c.d_model
    read = size * c.d_read
    neurons = size * 2 * c.d_mlp  # before and after the activation
    masks = c.d_read + c.d_mlp + c.d_model
    return stream + read + neurons + (masks if c.afrac else 0)


def memory(cfg, model: GPT, rows: int, checkpointing: bool) -> Memory:
    """Of a process with `rows` sequences a micro-step, at its peak.

    The backward pass is walked through, from the logits to the embedding: what was saved goes,
    gradients come.
    """
    c = model.config
    half = cfg.dtype == "bfloat16"
    size = 2 if half else FLOAT
    tokens = rows * c.block_size
    n = learnt(model)
    weights = FLOAT * sum(t.numel() for t in model.state_dict().values())
    if c.vocab_size <= LARGEST_TABLE:  # the counted bigram table that evaluation compares with
        weights += FLOAT * c.vocab_size**2
    optimizer = 2 * FLOAT * n

    block = model.transformer.h[0]
    mlp = sum(p.numel() for p in block.mlp.parameters())
    attention = sum(p.numel() for p in block.attn.parameters())
    if half:  # autocast's copies of the matrices live as long as the graph
        weights += 2 * (c.n_layer * (mlp + attention) + c.d_model * c.vocab_size)
    width = c.n_head * c.d_head
    # (weights, bytes kept for the backward pass, what that pass holds besides), in its order
    walk = []
    for _ in range(c.n_layer):
        walk.append((mlp, tokens * saved_by_mlp(c, half), tokens * size * 2 * c.d_mlp))
        walk.append((attention, tokens * saved_by_attention(c, half), tokens * size * 6 * width))
    kept = FLOAT * c.d_model * tokens  # a sublayer's input is all that checkpointing keeps
    saved = [kept if checkpointing else bytes_kept for _, bytes_kept, _ in walk]

    # The logits of all tokens: as they are, as log-probabilities, and twice as a gradient.
    end = tokens * (4 * FLOAT * c.vocab_size + (FLOAT + size) * c.d_model)
    held = end + sum(saved)
    activations = held
    gradients = FLOAT * c.d_model * c.vocab_size
    if c.enable_bigram_table and c.learnable_bigram_table:
        gradients += FLOAT * c.vocab_size**2
    peak = held
    logits = tokens * FLOAT * c.vocab_size  # whoever called the model still has them
    held = logits + sum(saved) + gradients
    for i, (own, again, working) in enumerate(walk):
        peak = max(peak, held + working + (again if checkpointing else 0))
        held += FLOAT * own - saved[i]
    peak = max(peak, FLOAT * n)
    return Memory(weights, optimizer, FLOAT * n, activations, weights + optimizer + peak)


def rows_that_fit(cfg, model: GPT, bytes_there: float, checkpointing: bool) -> int:
    """The most sequences a micro-step whose peak stays below `bytes_there`; 0 for none."""
    low, high = 0, 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        if memory(cfg, model, middle, checkpointing).peak <= bytes_there:
            low = middle
        else:
            high = middle - 1
    return low


# --- the text --------------------------------------------------------------------------------

def text_of_plan(cfg, model: GPT, world: int) -> str:
    """What `--plan` prints. cfg: a TrainConfig; model: on the meta device; world: processes."""
    rows = tensors(cfg, model)
    n = learnt(model)
    l0 = sum(row[3] for row in rows)
    lines = [f"{'tensor':<38} {'shape':>14} {'parameters':>14} {'L0':>12}"]
    for name, shape, count, nonzeros in rows:
        said = f"{nonzeros:,}" if nonzeros else "dense"
        lines.append(f"{name:<38} {shape:>14} {count:>14,} {said:>12}")
    lines.append(f"{'in all':<38} {'':>14} {n:>14,} {l0:>12,}")

    step_tokens = cfg.batch_size * cfg.block_size
    a_token = flops_a_token(model.config)
    micro = cfg.batch_size // (world * cfg.grad_accum)
    lines += [
        "",
        f"steps        {cfg.max_steps:,} of {step_tokens:,} tokens: "
        f"{cfg.max_steps * step_tokens / 1e9:,.2f}B tokens",
        f"FLOPs        {a_token / 1e9:,.2f}G a token, {a_token * step_tokens / 1e12:,.1f}T a step, "
        f"{a_token * step_tokens * cfg.max_steps:.2e} in all; with checkpointing a third more",
        f"checkpoint   {gigabytes(3 * FLOAT * n)} (state.pt) and {gigabytes(FLOAT * n)} "
        "(final_model.pt)",
        "",
        f"memory of each of {world} process(es), {micro} sequences a micro-step:",
        f"  {'':<22} {'weights':>9} {'optimizer':>10} {'gradients':>10} {'activations':>12} "
        f"{'peak':>9}",
    ]
    for checkpointing in (False, True):
        m = memory(cfg, model, micro, checkpointing)
        name = "with checkpointing" if checkpointing else "without checkpointing"
        lines.append(f"  {name:<22} {gigabytes(m.weights):>9} {gigabytes(m.optimizer):>10} "
                     f"{gigabytes(m.gradients):>10} {gigabytes(m.activations):>12} "
                     f"{gigabytes(m.peak):>9}")
    lines += ["", "sequences a micro-step (batch_size / processes / grad_accum) that fit:"]
    for card in CARDS:
        there = (card - SPARE) * 1e9
        plain = rows_that_fit(cfg, model, there, False)
        checkpointed = rows_that_fit(cfg, model, there, True)
        lines.append(f"  {card:>3} GB: {plain:>6,} without checkpointing, {checkpointed:>6,} with")
    return "\n".join(lines)


def gigabytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB"
