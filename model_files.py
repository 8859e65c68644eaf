"""A model's directory: which files it has, which keys its config may hold, its weights' hash.

The two published layouts, as the authors' store and the hub have them; model.py's `GPT.load` and
`GPT.save` read and write both by what stands here.
"""
import hashlib
import json
import os
import zipfile
from functools import partial

import torch
from torch import Tensor

from config import write_atomic

# The two layouts of a model directory: config, weights.
LAYOUTS = {
    "store": ("beeg_config.json", "final_model.pt"),
    "hub": ("config.json", "model.safetensors"),
}
HUB_PREFIX = "circuit_model."  # before each weight's name there
# What the hub's own loader goes by.
HUB_FIELDS = {"architectures": ["CircuitGPTForCausalLM"], "model_type": "circuitgpt",
              "dtype": "float32"}
# What stands before a name for no reason of ours, as wrappers leave it, in any order.
PREFIXES = ("module.", "_orig_mod.", HUB_PREFIX)

# What a config may hold besides the fields of GPTConfig, in this order:
# 1. What is off (null, false, 0, empty) changes nothing, whatever it is, and passes.
# 2. What would make another forward pass than ours, NOT_COMPUTED, is refused by name.
# 3. What speaks of training or of kernels, by a word of TRAINING, passes: a forward pass does not
#    know how its weights came about.
# 4. What `transformers` writes into every config.json, OTHER_PROGRAMS, passes.
# 5. Any other key is refused by name: it may be a misspelt one, or change what is computed.
NOT_COMPUTED = (
    "afrac_approx", "rtopk",        # an AbsTopK that keeps other channels than the largest
    "mup", "mup_width_multiplier",  # other scales of attention and logits
    "scale_invariance", "enable_fp8_linear",  # other products
    "use_tied_aux_matrix", "unembed_rank", "bigram_table_rank",  # other matrices
)
TRAINING = set("""adam anneal batch beta1 beta2 checkpoint checkpointing debug decay dropout epochs
    expansion grad impl init kernels learning loss lr optimizer pdrop pfrac run schedule seed ste
    steps train training wandb warmup""".split())
OTHER_PROGRAMS = set("""architectures attn_implementation auto_map bos_token_id dtype eos_token_id
    head_dim hidden_act hidden_size id2label initializer_range intermediate_size is_decoder
    label2id length_penalty max_length max_position_embeddings model_type n_ctx n_inner n_positions
    num_attention_heads num_beam_groups num_beams num_hidden_layers num_key_value_heads
    num_return_sequences pad_token_id repetition_penalty return_dict sep_token_id temperature
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    transformers_version typical_p use_cache""".split())
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "d_model")  # never null
RENAMED_KEYS = {"n_mlp": "d_mlp", "n_embd": "d_model"}  # old name -> ours


def known_fields(raw: dict, kinds: dict[str, tuple[type, ...]]) -> dict:
    """Of the dict of a published config, the fields that a model is made of, {name: value}; `kinds`
    has the types of each. Old names are understood, a null is as if the key were not there, and
    other keys pass or not by the rule above.

    ValueError that names the keys which are refused, of another type, or contradict each other.
    """
    given = {}
    refused = []
    unknown = []
    for key, value in raw.items():
        name = RENAMED_KEYS.get(key, key)
        if name in kinds:
            if value is None:
                continue
            # JSON has 0 for 0.0; type(), because true is an int as well
            if type(value) not in kinds[name] and not (type(value) is int and float in kinds[name]):
                wanted = kinds[name][0].__name__
                raise ValueError(f"{key} must be of type {wanted}, not {value!r}")
            if given.setdefault(name, value) != value:
                raise ValueError(f"{key} is {value}, but another name of it says {given[name]}")
        elif not value:
            continue
        elif key in NOT_COMPUTED:
            refused.append(key)
        elif TRAINING.isdisjoint(key.split("_")) and key not in OTHER_PROGRAMS and key[:1] != "_":
            unknown.append(key)  # a leading underline: private to the program that wrote it
    if refused:
        raise ValueError(f"{', '.join(sorted(refused))}: no published code computes what this "
                         "changes in the forward pass")
    if unknown:
        raise ValueError(f"unknown config keys: {', '.join(sorted(unknown))}; take them out if the "
                         "forward pass does without")
    for name in SIZES:
        if name not in given and any(RENAMED_KEYS.get(key, key) == name for key in raw):
            raise ValueError(f"{name} is null")
    return given


def layout_of(directory: str) -> str:
    """`store` or `hub`, by the config that is there. ValueError where there is none."""
    for layout, (config, _) in LAYOUTS.items():
        if os.path.exists(os.path.join(directory, config)):
            return layout
    raise ValueError(f"{directory} is not a model directory: beeg_config.json is missing, and so "
                     "is the hub's config.json")


def config_path(directory: str) -> str:
    """The config's file of a model directory. ValueError where there is none."""
    return os.path.join(directory, LAYOUTS[layout_of(directory)][0])


def weights_files(directory: str) -> list[str]:
    """The file of a model directory's weights, or the several of a large snapshot. ValueError where
    one is missing."""
    layout = layout_of(directory)
    names = [LAYOUTS[layout][1]]
    index = os.path.join(directory, "model.safetensors.index.json")
    if layout == "hub" and os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as f:
                names = sorted(set(json.load(f)["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise ValueError(f"{index} is not an index of weights ({type(e).__name__})") from None
    for name in names:
        if not os.path.exists(os.path.join(directory, name)):
            raise ValueError(f"{directory} is not a model directory: {name} is missing")
    return [os.path.join(directory, name) for name in names]


def weights_hash(directory: str) -> str:
    """sha256 of a model directory's weights file, by which a circuit knows its model; of several
    files, that of their hashes. It reads all of it: about 0.7 s a GB."""
    # of the file, not of the tensors: any tool can check it
    hashes = []
    for file in weights_files(directory):
        with open(file, "rb") as f:
            hashes.append(hashlib.file_digest(f, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_weights(file: str) -> dict[str, Tensor]:
    """A state dict on the CPU, mapped into memory and read where it is used. ValueError where the
    file is no such thing."""
    if file.endswith(".safetensors"):
        load = _safetensors().load_file
    else:
        # copied on write, so that the file stays as it is; files of old PyTorch cannot be mapped
        mapped = zipfile.is_zipfile(file)
        load = partial(torch.load, map_location="cpu", weights_only=True, mmap=mapped)
    try:
        return load(file)
    except Exception as e:  # both raise many kinds on a truncated or foreign file
        raise ValueError(f"{file} is truncated or not a weights file "
                         f"({type(e).__name__})") from None


def plain_name(name: str) -> str:
    """A weight's name without what wrappers and the hub put before it."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def write_model(directory: str, layout: str, config: dict, state: dict[str, Tensor]) -> None:
    """Config and weights of a model, each file atomically. ValueError for an unknown layout, or
    where the hub's lacks the package safetensors."""
    if layout not in LAYOUTS:
        raise ValueError(f"format must be {' or '.join(LAYOUTS)}, not {layout!r}")
    weights = partial(torch.save, state)
    if layout == "hub":
        config = config | HUB_FIELDS
        weights = _as_safetensors(state)
    config_name, weights_name = LAYOUTS[layout]
    os.makedirs(directory, exist_ok=True)
    write_atomic(os.path.join(directory, config_name), json.dumps(config, indent=1).encode())
    write_atomic(os.path.join(directory, weights_name), weights)


def _as_safetensors(state: dict[str, Tensor]) -> bytes:
    # copies, because the format knows no two names of one tensor
    tensors = {HUB_PREFIX + name: t.detach().cpu().clone() for name, t in state.items()}
    return _safetensors().save(tensors, {"format": "pt"})  # the hub's programs look for this mark


def _safetensors():
    """safetensors.torch, which only the hub's layout needs."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("model.safetensors needs the package safetensors: "
                         "pip install -r requirements-extra.txt") from None
    return safetensors.torch
