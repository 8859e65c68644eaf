"""Models with known circuits: random sparse weights, and circuits written into them by hand.

- `background(shape, seed)`: a model of any shape whose weights are random and sparse.
- `Planter`: writes one weight at a time, strong enough that AbsTopK lets it through (it runs the
  model to see how large its source is), and keeps the list of what is planted.
- `quote`, `bracket`, `types`: the paper's three mechanisms (section 3.1), each in several widths
  and at any two layers. The tokens that matter have entries on the planted channels of the
  embedding, and so have many others: the channels do other things as well, or a path through any
  random weight would do as well as the circuit.
- `hint`: a head that solves any of these tasks on some prompts alone, to distract.

The prompts are the project's own tasks in its own vocabulary: even the smallest model (two layers
of 64 channels) has room for 2,048 tokens, so that no made-up task is needed.
"""
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data.tinypython.filler import GROWN
from model import GPT, SITES, GPTConfig, record
from tasks import TASKS, Pairs, Task

Node = tuple[str, int]            # (site, channel)
Edge = tuple[str, int, str, int]  # (from site, channel, to site, channel)


# --- the model that circuits are written into ------------------------------------------------

@dataclass(frozen=True)
class Shape:
    """Sizes of a model and the share of its weights that are not zero."""
    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    d_pos_emb: int
    block_size: int
    density: float             # of every matrix between two nodes
    density_embeddings: float  # of the embedding and of the unembedding

    def config(self) -> GPTConfig:
        return GPTConfig(
            n_layer=self.n_layer, d_model=self.d_model, n_head=self.n_head, d_head=self.d_head,
            d_pos_emb=self.d_pos_emb, block_size=self.block_size, vocab_size=2048, rms_norm=True,
            tied_unembed=False, grad_checkpointing=False, sink=True, enable_bigram_table=True,
            afrac=0.25, afrac_loctypes=",".join(SITES.values()))


SHAPES = {
    "2x64": Shape(2, 64, 8, 8, 8, 128, 1 / 16, 1 / 8),
    "4x128": Shape(4, 128, 16, 8, 8, 128, 1 / 32, 1 / 16),
    "8x256": Shape(8, 256, 16, 16, 16, 128, 1 / 64, 1 / 32),
    # openai/circuit-sparsity: 419M parameters, trained on 256 of its 1,024 positions
    "csp_yolo2": Shape(8, 2048, 128, 16, 32, 1024, 1 / 1024, 1 / 128),
}
KEY = 24.0       # far above what random weights make of a loud token; its query is as small
POSITIONS = 256  # so many positions are told apart by the recency channel


def background(shape: Shape, seed: int) -> GPT:
    """A frozen model of random sparse weights. At density 1/1024 a channel has two of a matrix."""
    torch.manual_seed(seed)
    model = GPT(shape.config()).eval().requires_grad_(False)
    c = model.config
    for name, p in model.named_parameters():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            scatter(p, shape.density_embeddings, 1.0 if "wte" in name else 0.2)
        elif name == "transformer.wpe.weight":
            p.copy_(positions(c))
        elif p.dim() == 2 and name != "bigram_table":
            # a read has a mean square of 1: so what comes out of a matrix is about 0.3 (neurons
            # before GELU 0.5), and what a sublayer writes a fifth of what a token has
            out = 0.5 if "c_fc" in name else 0.3
            if "c_proj" in name:
                out = math.sqrt(shape.density_embeddings)
            scatter(p, shape.density, out / math.sqrt(p.shape[1] * shape.density))
        elif name.endswith("bias"):
            p.normal_(std=0.02)
        elif name.endswith("sink_logit") or name == "bigram_table":
            p.normal_(std=0.3)
    return model


def scatter(p: Tensor, density: float, std: float) -> None:
    """Make p all zeros but a share `density` at random places, of random sign, about `std`."""
    p.zero_()
    n = int(density * p.numel())
    places = torch.randint(p.numel(), (n,))
    sign = torch.randint(2, (n,)) * 2 - 1
    p.view(-1)[places] = std * sign * (0.5 + torch.rand(n))


def positions(c: GPTConfig) -> Tensor:
    """(block_size, d_pos_emb), every row of norm 1: channel 0 rises in a line from 1/2 to 1 over
    the first `POSITIONS` tokens, so that a head can prefer the latest; the others are random."""
    rise = (0.5 + torch.arange(c.block_size) / (2 * POSITIONS)).clamp(max=1.0)
    others = torch.randn(c.block_size, c.d_pos_emb - 1)
    others *= (1 - rise.square()).sqrt()[:, None] / others.norm(dim=1, keepdim=True)
    return torch.cat([rise[:, None], others], dim=1)


# --- writing into it -------------------------------------------------------------------------

@dataclass
class Planter:
    """Writes a circuit into `model`, weight by weight, and keeps its parts.

    `pairs` are prompts of its task, on which the strength of what is there already is measured.
    """
    model: GPT
    tokenizer: object
    pairs: Pairs
    rng: random.Random
    nodes: set[Node] = field(default_factory=set)
    edges: set[Edge] = field(default_factory=set)
    constant: set[Node] = field(default_factory=set)  # what a bias alone makes
    taken: set = field(default_factory=set)           # of channels, heads and neurons
    tokens: set[str] = field(default_factory=set)     # those that matter

    def __post_init__(self):
        # twice a token's other entries together: loud, so that it outlasts the noise of all layers
        self.loud = 2 * self.model.transformer.wte.weight.norm(dim=1).median().item()

    def free(self, kind: str, n: int) -> int:
        """One of n channels of the stream, heads or neurons that nothing is planted in yet."""
        i = self.rng.choice([i for i in range(n) if (kind, i) not in self.taken])
        self.taken.add((kind, i))
        return i

    def channel(self) -> int:
        """One that the tokens leave almost empty."""
        channel = self.free("channel", self.model.config.d_model)
        self.embed(channel, {}, weak=0.1)
        return channel

    def neuron(self, layer: int) -> int:
        return self.free(f"neuron {layer}", self.model.config.d_mlp)

    def head(self, layer: int, queries: int) -> int:
        """The first channel of a free head that asks by so many queries; the others are zeros."""
        c = self.model.config
        first = c.d_head * self.free(f"head {layer}", c.n_head)
        weight, bias = self.matrix(f"{layer}.attn.act_in", f"{layer}.attn.q")
        # a loud token has random keys as loud, which would steer the head
        weight[first + queries : first + c.d_head] = 0.0
        bias[first + queries : first + c.d_head] = 0.0
        return first

    def token(self, text: str) -> int:
        (i,) = self.tokenizer.encode_ordinary(text)
        return i

    def embed(self, channel: int, values: dict[str, float], weak: float = 0.0,
              firing: float = 0.0) -> None:
        """Entries of the embedding: of the given tokens times `loud`; of a tenth of all that do
        not matter about as large (`firing`: times so much), of a quarter small (`weak`)."""
        wte = self.model.transformer.wte.weight
        wte[:, channel] = 0.0
        norm = wte.norm(dim=1)  # relative to what else a token has, for each read is normed
        kind = torch.rand(len(wte))
        entry = torch.rand(len(wte)) * weak * (kind < 0.35)
        entry = torch.where(kind < 0.1, firing * (0.7 + 0.3 * torch.rand(len(wte))), entry)
        entry[[self.token(text) for text in self.tokens]] = 0.0
        wte[:, channel] = norm * entry * (torch.randint(2, (len(wte),)) * 2 - 1)
        for text, value in values.items():
            wte[self.token(text), channel] = value * self.loud

    def seen(self, site: str, channel: int, at: list[str] | None = None) -> float:
        """The mean size of a channel at the tokens `at`; None: at the last token of each prompt."""
        into = {}
        ids = self.pairs.ids
        self.model.run(self.model.embed(ids), nodes=record(into))
        place = torch.arange(ids.shape[1])
        if at is None:
            chosen = place == self.pairs.last[:, None]
        else:
            wanted = torch.tensor([self.token(text) for text in at])
            # what is behind the last token is padding
            chosen = torch.isin(ids, wanted) & (place <= self.pairs.last[:, None])
        return into[site][..., channel][chosen].abs().mean().item()

    def matrix(self, a: str, b: str) -> tuple[Tensor, Tensor]:
        """The weight (to, from) and the bias (to,) between two sites."""
        block = self.model.transformer.h[int(a.split(".")[0])]
        if b.endswith((".q", ".k", ".v")):
            place = "qkv".index(b[-1])
            return block.attn.c_attn.weight.chunk(3)[place], block.attn.c_attn.bias.chunk(3)[place]
        linear = block.attn.c_proj if ".attn." in b else block.mlp.c_proj
        if b.endswith("post_act"):
            linear = block.mlp.c_fc
        return linear.weight, linear.bias

    def edge(self, a: str, j: int, b: str, i: int, strength: float,
             at: list[str] | None = None) -> None:
        """A weight through which a channel that is as large as at the tokens `at` gives
        `strength`."""
        source = a[:-1] + "y" if a.endswith("attn.v") else a  # what the head gathered
        self.write(a, j, b, i, strength / self.seen(source, j, at))

    def write(self, a: str, j: int, b: str, i: int, weight: float) -> None:
        self.matrix(a, b)[0][i, j] = weight
        self.edges.add((a, j, b, i))
        self.nodes |= {(a, j), (b, i)}

    def bias(self, a: str, b: str, i: int, value: float) -> None:
        self.matrix(a, b)[1][i] = value

    def always(self, layer: int, which: str, i: int, value: float) -> None:
        """A query, key or value (`which`) that is the same for every token."""
        a, b = f"{layer}.attn.act_in", f"{layer}.attn.{which}"
        self.matrix(a, b)[0][i] = 0.0  # nothing disturbs it
        self.bias(a, b, i, value)
        self.constant.add((b, i))

    def answer(self, layer: int, value: int, channel: int, second: bool, centre: bool,
               margin: float) -> None:
        """From a head's value to the answers' logits: `margin` apart at its mean. `second`: a large
        channel says the second answer; `centre`: it is put from 0..1 to -1/2..1/2 first."""
        a, b = f"{layer}.attn.v", f"{layer}.attn.resid_delta"
        self.edge(a, value, b, channel, 3 * self.loud)
        if centre:
            # the mean over prompts is half of what the head says of those that it fires on
            self.bias(a, b, channel, -3 * self.loud)
        h = self.model.run(self.model.embed(self.pairs.ids))
        h = self.model.transformer.ln_f(h)[torch.arange(len(h)), self.pairs.last]
        weight = margin / 2 / h[:, channel].abs().mean().item()
        weight = weight if second else -weight
        self.model.lm_head.weight[self.pairs.answer[0], channel] = -weight
        self.model.lm_head.weight[self.pairs.wrong[0], channel] = weight

    def score(self, size: float) -> float:
        """The size of a query and of a key, so that their head's score is `size`."""
        return math.sqrt(size * math.sqrt(self.model.config.d_head))

    def query(self, size: float) -> float:
        """The same of a query that meets a key of size `KEY`."""
        return size * math.sqrt(self.model.config.d_head) / KEY


# --- the circuits ----------------------------------------------------------------------------

def quote(p: Planter, early: int, late: int, width: int) -> None:
    """Close a string by the quote that opened it. 11 nodes and 7 edges; width 2: 17 and 11.

    A neuron of layer `early` detects quotes, another fires where, from then on, a double quote is
    the one to close: after `("` and after `')`. So every earlier string, open and closed, counts
    half, and the last one decides. A head of layer `late` averages the second neuron (its value)
    over what the first marks (its key; the query is a constant). Width 2: openers and closers have
    a pair of neurons each. Other tokens fire either neuron, never both strongly.
    """
    openers = {'("': 1.0, "('": -1.0}
    closers = {"')\n": 1.0, '")\n': -1.0}
    p.tokens |= {*openers, *closers}
    groups = [openers | closers] if width == 1 else [openers, closers]
    found, double = p.channel(), p.channel()
    channels = [(p.channel(), p.channel()) for _ in groups]
    for group, (is_quote, kind) in zip(groups, channels):
        p.embed(is_quote, dict.fromkeys(group, 1.0), weak=0.25)
        p.embed(kind, group, weak=0.25, firing=0.8)
    read, fired, wrote = (f"{early}.mlp.{x}" for x in ("act_in", "post_act", "resid_delta"))
    for group, (is_quote, kind) in zip(groups, channels):
        on = [text for text, value in group.items() if value > 0]
        # the first writes more: it alone makes the norm, so that every quote has the same key
        for source, to, at, loud in ((is_quote, found, list(group), 3.0), (kind, double, on, 0.6)):
            i = p.neuron(early)
            p.edge(read, source, fired, i, 8.0, at)
            p.bias(read, fired, i, -5.0)  # a threshold
            p.edge(fired, i, wrote, to, loud * p.loud, at)

    x, c = f"{late}.attn.act_in", p.head(late, 1)
    everything = [text for group in groups for text in group]
    p.always(late, "q", c, p.query(16.0))
    p.edge(x, found, f"{late}.attn.k", c, KEY, everything)
    p.edge(x, double, f"{late}.attn.v", c, 4.0, ['("'])
    p.answer(late, c, p.channel(), second=True, centre=True, margin=8.0)


def bracket(p: Planter, early: int, late: int, width: int) -> None:
    """Close a list by its depth. 7 nodes and 4 edges, as the paper's; width 2: 9 and 6.

    A head of layer `early` with a query of nearly nothing averages a value that counts ` [[` up and
    ` [` down, and `]` up again (width 2: a value channel of its own). What it writes is the query
    of a head of layer `late`, whose key and value are constants, and whose sink is the threshold.
    """
    openers = {" [[": 1.0, " [": -1.0}
    closers = {"]\n": 1.0}
    p.tokens |= {*openers, *closers}
    groups = [openers | closers] if width == 1 else [openers, closers]
    channels = [p.channel() for _ in groups]
    for channel, group in zip(channels, groups):
        p.embed(channel, group, weak=0.02)  # an average over all tokens leaves room for no more
    x, depth, c = f"{early}.attn.act_in", p.channel(), p.head(early, 0)
    for i, (channel, group) in enumerate(zip(channels, groups)):
        p.edge(x, channel, f"{early}.attn.v", c + i, 16.0, list(group))
    p.edge(f"{early}.attn.v", c, f"{early}.attn.resid_delta", depth, 2 * p.loud)
    weight = p.matrix(f"{early}.attn.v", f"{early}.attn.resid_delta")[0][depth, c].item()
    for i in range(1, width):  # a bracket counts the same whichever way it takes
        p.write(f"{early}.attn.v", c + i, f"{early}.attn.resid_delta", depth, weight)

    c = p.head(late, 1)
    p.edge(f"{late}.attn.act_in", depth, f"{late}.attn.q", c, p.score(14.0))
    p.always(late, "k", c, p.score(14.0))
    p.always(late, "v", c, 4.0)
    # a query of zero is below the threshold as well: for some 45 tokens at once, by 6
    p.model.transformer.h[late].attn.attn_imp.sink_logit[c // p.model.config.d_head] = 9.8
    p.answer(late, c, p.channel(), second=True, centre=True, margin=8.0)


def types(p: Planter, early: int, late: int, width: int) -> None:
    """Was the variable at the end a set or a string? In two hops: 8 + 10 * width nodes and
    5 + 4 * width edges.

    A head of layer `early` brings the latest variable's name (a code of `width` bits) to each
    token. So `()` and ` ""` know whose they are. A head of layer `late` looks from the name at the
    end for those of the same name (its queries and keys are the bits) and takes their type. In most
    models a few of these edges can go: of two names mixed the right one stands out as well, so not
    each needs the preference for the latest, and few names differ in every bit.
    """
    names = [f" {name}" for name in GROWN[: 2**width]]
    starts = {" \"\"\n": 1.0, "()\n": -1.0}
    p.tokens |= {*names, *starts}
    code = [p.channel() for _ in range(width)]
    brought = [p.channel() for _ in range(width)]
    is_name, is_start, kind = p.channel(), p.channel(), p.channel()
    for i, channel in enumerate(code):
        signs = {name: 1.0 - 2.0 * (number >> i & 1) for number, name in enumerate(names)}
        p.embed(channel, signs, weak=0.25)
    p.embed(is_name, dict.fromkeys(names, 1.0), weak=0.25)
    p.embed(is_start, dict.fromkeys(starts, 1.0), weak=0.25)
    p.embed(kind, starts, weak=0.25, firing=0.8)

    # first hop: of two names the latest, by a key that rises with the position
    x, c = f"{early}.attn.act_in", p.head(early, 2)
    p.always(early, "q", c, p.query(40.0))
    p.edge(x, is_name, f"{early}.attn.k", c, KEY, names)
    slope = math.sqrt(p.model.config.d_pos_emb) / (2 * POSITIONS)  # a token, of the normed position
    p.always(early, "q", c + 1, p.score(2.0))
    p.write(x, p.model.config.d_model, f"{early}.attn.k", c + 1, p.score(2.0) / slope)
    for i in range(width):
        p.edge(x, code[i], f"{early}.attn.v", c + i, 4.0, names)
        p.edge(f"{early}.attn.v", c + i, f"{early}.attn.resid_delta", brought[i], p.loud,
               list(starts))

    # second hop: both must agree in every bit
    x, c = f"{late}.attn.act_in", p.head(late, width + 1)
    for i in range(width):
        p.edge(x, code[i], f"{late}.attn.q", c + i, p.score(10.0))
        p.edge(x, brought[i], f"{late}.attn.k", c + i, p.score(10.0), list(starts))
    p.always(late, "q", c + width, p.query(20.0))
    p.edge(x, is_start, f"{late}.attn.k", c + width, KEY, list(starts))
    p.edge(x, kind, f"{late}.attn.v", c, 4.0, list(starts))
    p.answer(late, c, p.channel(), second=True, centre=False, margin=8.0)


def hint(p: Planter, layer: int, deciding: dict[str, float]) -> None:
    """A distractor: a head that averages what sets the two prompts of a pair apart (`deciding`)
    together with as loud entries of a tenth of all other tokens. It helps on most prompts only."""
    channel, c = p.channel(), p.head(layer, 0)
    p.tokens |= set(deciding)
    p.embed(channel, deciding, firing=0.8)
    p.edge(f"{layer}.attn.act_in", channel, f"{layer}.attn.v", c, 4.0, list(deciding))
    p.answer(layer, c, p.channel(), second=True, centre=False, margin=1.0)


# --- cases -----------------------------------------------------------------------------------

def two_variables(width: int) -> Task:
    """set_or_string's prompts in which both a set and a string are initialised, under the first
    2**width names: in the others, which variable is asked for does not matter."""
    names = GROWN[: 2**width]
    start = re.compile(r"^    (\w+) = (set\(\)|\"\")$", re.MULTILINE)

    def prompts(r: random.Random) -> tuple[str, str]:
        while True:
            pair = TASKS["set_or_string"].prompts(r)
            found = [start.findall(prompt) for prompt in pair]
            if all(len(x) == 2 and {name for name, _ in x} <= set(names) for x in found):
                return pair

    return replace(TASKS["set_or_string"], name=f"two_variables_{width}", prompts=prompts)


@dataclass(frozen=True)
class Family:
    """A mechanism, the task that it solves and the tokens that decide it."""
    plant: Callable[[Planter, int, int, int], None]
    task: Callable[[int], Task]  # by width
    deciding: dict[str, float]


def plain(name: str) -> Callable[[int], Task]:
    def task(width: int) -> Task:
        return TASKS[name]
    return task


FAMILIES = {
    # what closes a string says nothing, and is as loud only for its reads to stay like an opener's
    "quote": Family(quote, plain("single_double_quote"),
                    {'("': 1.0, "('": -1.0, '")\n': 1.0, "')\n": 1.0}),
    "bracket": Family(bracket, plain("bracket_counting"), {" [[": 1.0, " [": -1.0}),
    "types": Family(types, two_variables, {' ""\n': 1.0, "()\n": -1.0}),
}
