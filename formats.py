"""
Formats of other projects: Hugging Face (transformers, PEFT), Meta and GGUF, for which export.py has
the commands; and OpenAI's API, for serve.py.

The formats have the same tensors under other names; Hugging Face also orders the rows of wq and wk
differently. An imported model is read in parts of tensors, so that it is in memory only once. A
setting that the model here does not support is an error that names the setting. The libraries
safetensors and gguf are needed for their formats only.
"""

import base64
import contextlib
import gc
import glob
import importlib
import itertools
import json
import mmap
import os
import re
import secrets
import shutil
import struct
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from checkpoint import kind_of_file, verify_archive
from common import Refused, name_file, note, read_json, try_lock
from instruct import Template, ended
from model import LLAMA3_SCALING, ModelArgs, Transformer, rope_frequencies
from tokenizer import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    Tokenizer,
    byte_alphabet,
    byte_level_blob,
    check_plain_bpe,
    note_ordinary,
    render_chats,
    sentencepiece_identity,
)

# -----------------------------------------------------------------------------
# Shared by all formats


def floats(w):
    """A tensor as a little-endian fp32 array."""
    return w.detach().to("cpu", torch.float32).numpy().astype("<f4")


def special_ids(tokenizer, end_ids, template=None):
    """
    (id of BOS, id of EOS, ids of the other tokens that end a text). If a tokenizer has only one of
    BOS and EOS, that token is both; without a tokenizer they are llama2.c's 1 and 2. With
    `template`, the token that ends a reply in it is among the others; run.c finds it by itself.
    """
    if template and tokenizer:
        end = Template(**template).check(tokenizer).end(tokenizer)
        end_ids = [end, *(i for i in end_ids if i != end)]
    bos, eos = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (1, -1)
    if eos < 0:
        eos = end_ids[0] if end_ids else bos if tokenizer and bos >= 0 else 2
    if bos < 0:
        bos = eos
    return bos, eos, [i for i in end_ids if i != eos]


def ends_for_others(bos, ends, begin, template):
    """`ends`, ids that end a text, as other programs need them. BOS, with which the next text would
    begin, always ends a text here, but not elsewhere: it is added for a model of plain text. With a
    chat template, a reply has an end of its own."""
    return [*ends, bos] if begin and not template and bos not in ends else ends


def begins_with_bos(tokenizer, bos):
    """Whether plain text begins with BOS: the checkpoint's `bos`, False if the tokenizer has no
    BOS."""
    return bos and not (tokenizer and tokenizer.bos_id < 0)


# -----------------------------------------------------------------------------
# Hugging Face and Meta: names, rows, numbers

HF_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
HF_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
ROTATED = ("attention.wq", "attention.wk")


def renamed(name, names, layers, in_layer):
    """
    The name of a tensor in another format: layers.0.attention.wq.weight -> `layers`.0.q.weight with
    in_layer = {"attention.wq": "q"}; `names` has the names outside of layers.
    """
    stem = name.removesuffix(".weight")
    if stem in names:
        return f"{names[stem]}.weight"
    _, layer, matrix = stem.split(".", 2)
    return f"{layers}.{layer}.{in_layer[matrix]}.weight"


def hf_name(name):
    return renamed(name, HF_NAMES, "model.layers", HF_LAYER)


# RoPE rotates pairs of a head's E numbers. Here and in Meta's files the pairs are adjacent, (0, 1),
# (2, 3), ...; in Hugging Face's files the two numbers of a pair are E / 2 apart, which is the order
# of the rows of wq and wk.


def neighbours(w, head_dim):
    """Rows (H * E, ...) from Hugging Face's order to ours."""
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def halves(w, head_dim):
    """Rows (H * E, ...) from our order to Hugging Face's."""
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def need(package):
    """An optional module. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ValueError(f"this needs the {name} library: pip install {name}") from None


def model_shapes(args):
    """{name: shape} of a model's tensors; a tied model has no output.weight."""
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in Transformer(args).state_dict().items()}
    if args.tied:
        del shapes["output.weight"]
    return shapes


def hf_args(config, path, max_seq_len=None):
    """ModelArgs from a Hugging Face config.json. Raises ValueError for every setting that the
    model here does not support, because ignoring it would give a model that runs but computes
    something else.
    """

    def refuse(what):
        raise ValueError(f"{path}: {what} is not supported")

    def wrong(name, value, expected):
        value = json.dumps(value)[:60]
        raise ValueError(f"{path} has a wrong value: {name} must be {expected}, not {value}")

    def size(name, default=None):
        value = config[name] if default is None else config.get(name)
        value = default if value is None and default is not None else value
        if type(value) is not int or value < 1:
            wrong(name, value, "a whole number above 0")
        return value

    kinds = config.get("architectures") or [config.get("model_type")]
    if not isinstance(kinds, list) or kinds[0] not in ("LlamaForCausalLM", "llama"):
        refuse(f"the architecture {kinds[0] if isinstance(kinds, list) else json.dumps(kinds)}")
    for name in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"):
        if config.get(name):
            refuse(f"{name} {json.dumps(config[name])}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse(f"hidden_act {config['hidden_act']}")
    tied = config.get("tie_word_embeddings", False)
    if tied not in (True, False, None):
        wrong("tie_word_embeddings", tied, "true or false")
    try:
        heads, dim = size("num_attention_heads"), size("hidden_size")
        head_dim = None if config.get("head_dim") is None else size("head_dim")
        theta, scaling = hf_rope(config, refuse, wrong)
        return ModelArgs(
            dim=dim,
            n_layers=size("num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=size("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=size("vocab_size"),
            hidden_dim=size("intermediate_size"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            max_seq_len=max_seq_len or size("max_position_embeddings", 2048),
            rope_theta=theta,
            tied=bool(tied),
            rope_scaling=scaling,
        )
    except KeyError as e:
        raise ValueError(f"{path} does not say {e.args[0]}") from None
    except ValueError as e:
        raise ValueError(str(e) if str(path) in str(e) else f"{path}: {e}") from None


ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (*LLAMA3_SCALING[:3], "original_max_position_embeddings"),
}


def hf_rope(config, refuse, wrong):
    """
    (rope_theta, rope_scaling of ModelArgs) from a config.json, which has them in rope_parameters
    (transformers 5) or in rope_theta and rope_scaling. Every entry must be understood, because RoPE
    with another scaling than in training gives a model that runs but computes something else.
    """
    rope, factor = {}, config.get("partial_rotary_factor")
    for name in "rope_scaling", "rope_parameters":
        part = config.get(name)
        if not isinstance(part or {}, dict):
            wrong(name, part, "an object")
        if any(isinstance(value, (dict, list)) for value in (part or {}).values()):
            refuse(f"{name} {json.dumps(part)[:80]}, which differs from layer to layer,")
        part = {
            "rope_type" if key == "type" and "rope_type" not in part else key: value
            for key, value in (part or {}).items()
            if value is not None
        }
        for key in rope.keys() & part.keys():
            if rope[key] != part[key]:
                refuse(f"{key} {rope[key]} in rope_scaling but {part[key]} in rope_parameters")
        rope |= part
    kind = rope.pop("rope_type", "default")
    if kind not in ROPE_KINDS or rope.pop("type", kind) != kind:
        refuse(f"the RoPE scaling {kind}")
    if rope.pop("partial_rotary_factor", 1 if factor is None else factor) != 1:
        refuse("partial_rotary_factor")
    other = config.get("rope_theta")
    theta = rope.pop("rope_theta", other)
    if other not in (None, theta):
        refuse(f"rope_theta {other} beside {theta} in rope_parameters")
    theta = 10000.0 if theta is None else theta
    if type(theta) not in (int, float) or not theta > 0:
        wrong("rope_theta", theta, "a number above 0")
    numbers = [rope[key] for key in ROPE_KINDS[kind]]
    for key, value in rope.items():
        if key not in (*ROPE_KINDS[kind], "original_max_position_embeddings") and not (
            key == "factor" and value == 1
        ):
            refuse(f"{key} {json.dumps(value)} with the RoPE scaling {kind}")
        if type(value) not in (int, float) or not value > 0:
            wrong(f"{key} of RoPE", value, "a number above 0")
    return float(theta), dict(zip(LLAMA3_SCALING, numbers)) or None


def hf_config(args, dtype, bos, ends):
    """The config.json of a model. rope_parameters is for transformers 5, rope_scaling for earlier
    ones."""
    rope, s = {"rope_type": "default"}, args.rope_scaling
    if s:
        rope = {"rope_type": "llama3" if len(s) > 1 else "linear", "factor": s["factor"]}
    if s and len(s) > 1:
        rope |= {name: s[name] for name in LLAMA3_SCALING[1:3]}
        rope["original_max_position_embeddings"] = s["original_max_seq_len"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope if s else None,
        "rope_parameters": {**rope, "rope_theta": args.rope_theta},
        "tie_word_embeddings": args.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": bos,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    }


def meta_args(params, path, shapes, n_shards, max_seq_len=None):
    """ModelArgs from a Meta params.json and {name: shape} of the first shard. params.json has no
    context length: it is 2048, 4096, 8192 or 131072, as in Llama 1, 2, 3 and 3.1, unless
    max_seq_len is given.
    """
    scaled = params.get("use_scaled_rope", False)
    vocab = params.get("vocab_size", -1)
    if type(vocab) is not int or type(scaled) is not bool:
        raise ValueError(
            f"{path}: vocab_size must be a whole number, use_scaled_rope true or false"
        )
    tied = "output.weight" not in shapes
    try:
        if vocab < 1:
            vocab = (
                shapes["tok_embeddings.weight"][0]
                if tied
                else shapes["output.weight"][0] * n_shards
            )
        context = (
            131072
            if scaled
            else 8192
            if vocab > 100000
            else 4096
            if params["norm_eps"] == 1e-5
            else 2048
        )
        # Llama 3.2's small models have another factor, which only Hugging Face's config states.
        factor = params.get("rope_scaling_factor", 32.0 if params["dim"] < 4096 else 8.0)
        return ModelArgs(
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            head_dim=params.get("head_dim"),
            vocab_size=vocab,
            hidden_dim=shapes["layers.0.feed_forward.w1.weight"][0] * n_shards,
            norm_eps=params["norm_eps"],
            max_seq_len=max_seq_len or context,
            tied=tied,
            rope_theta=float(params.get("rope_theta", 10000.0)),
            rope_scaling=dict(zip(LLAMA3_SCALING, (factor, 1.0, 4.0, 8192))) if scaled else None,
        )
    except KeyError as e:
        raise ValueError(f"{path}: there is no {e.args[0]}") from None
    except (TypeError, ValueError, IndexError) as e:
        raise ValueError(f"{path}: {e}") from None


# -----------------------------------------------------------------------------
# Reading weights, a part of a tensor at a time

PART = 1 << 24  # numbers copied at a time


def open_tensors(path):
    """
    {name: tensor} of a .safetensors, .bin or .pth file. The file is mapped into memory until the
    dictionary is deleted; a part is read when it is used. Raises OSError, or ValueError if the file
    is not of such a kind.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        if str(path).endswith(".safetensors"):
            with need("safetensors").safe_open(path, "pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}
        gc.collect(1)  # torch.load leaves reference cycles, which keep earlier files mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(tensors, dict):
            raise ValueError("it holds no tensors by name")
        return tensors
    except Exception as e:  # each library raises its own kinds
        if isinstance(e, ValueError) and "pip install" in str(e):
            raise
        reason = str(e).strip().split("\n")[0][:120]
        if what := kind_of_file(path, but=os.path.splitext(path)[1]):
            raise ValueError(f"{path} cannot be read: it seems to be {what}") from None
        raise ValueError(f"{path} cannot be read, or is cut short ({reason})") from None


def tensor_shapes(path):
    """{name: shape} of the weights in a file for open_tensors. A file of torch.save is read as a
    whole, to verify its checksums. Raises ValueError, which names the file, if one is wrong, or for
    a value that is not a tensor of floating-point numbers."""
    tensors = open_tensors(path)
    verify_archive(path)
    for name, w in tensors.items():
        if not isinstance(w, torch.Tensor) or not isinstance(name, str):
            raise ValueError(f"{path}: {str(name)[:60]!r} is not the name of a tensor")
        if w.layout is not torch.strided or not w.is_floating_point() or w.element_size() < 2:
            raise ValueError(f"{path}: {name} is {w.dtype}: only fp32, bf16 and fp16 can be read")
    return {name: tuple(w.shape) for name, w in tensors.items()}


def gather(args, read, dtype=None, part=PART):
    """
    The state dict of a model. read(name, a, b) returns rows a to b of a tensor, where b - a is a
    multiple of the head size, or all rows. Besides the result, at most a few parts of `part`
    numbers are in memory.
    """
    weights = {}
    for name, shape in model_shapes(args).items():
        out, step = None, max(1, part // (shape[-1] * args.head_dim)) * args.head_dim
        for a in range(0, shape[0], step):
            b = min(a + step, shape[0])
            rows = read(name, a, b)
            if out is None:
                out = torch.empty(shape, dtype=dtype or rows.dtype)
            out[a:b] = rows
        weights[name] = out
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return weights


def check_shapes(args, have, where, rename=lambda name: name):
    """
    Raises ValueError unless `have`, {name: shape}, has the tensors of the model with these args.
    rename(name) is the name of a tensor in `have`.
    """
    need = {rename(name): shape for name, shape in model_shapes(args).items()}
    missing = [name for name in need if name not in have]
    spare = [
        name
        for name in have
        if name not in need
        and not (
            name.endswith(("inv_freq", "rope.freqs"))
            or args.tied
            and name == rename("output.weight")
        )
    ]
    if missing:
        raise ValueError(
            f"{where} lacks {missing[0]}"
            + f" and {len(missing) - 1} more tensors" * (len(missing) > 1)
        )
    if spare:
        raise ValueError(f"{where} has {spare[0]}, for which the model has no place")
    for name, shape in need.items():
        if tuple(have[name]) != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(have[name])}, not {shape}")


def hf_files(path):
    """
    (the folder of a model, its weights): the weights are {tensor: file} if there is an index, else
    one file. Raises FileNotFoundError or ValueError.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    names = [os.path.basename(path)] if os.path.isfile(path) else []
    for single in "model.safetensors", "pytorch_model.bin":
        both = f"{single}.index.json", single
        found = [name for name in both if os.path.isfile(os.path.join(folder, name))]
        if not names and len(found) > 1:
            raise ValueError(f"{path} has two sets of weights: name one of {' and '.join(found)}")
        names = names or found
    for name in names:
        file = os.path.join(folder, name)
        if os.path.isfile(file) and name.endswith(".json"):
            index = read_json(file).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(x, str) for x in index.values()):
                raise ValueError(f"{file} has no weight_map")
            files = {tensor: os.path.join(folder, part) for tensor, part in index.items()}
            for part in sorted(set(files.values())):
                if not os.path.isfile(part):
                    raise FileNotFoundError(f"{part} is missing, which {file} names")
            return folder, files
        if os.path.isfile(file):
            return folder, file
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such folder: download the model first")
    raise FileNotFoundError(f"{path}: there is no model.safetensors and no index of its parts")


def read_hf(path, dtype=None, max_seq_len=None):
    """Reads a Hugging Face folder or file: (ModelArgs, state dict, the folder)."""
    folder, files = hf_files(path)
    config = os.path.join(folder, "config.json")
    if not os.path.isfile(config):
        raise FileNotFoundError(f"{config} is missing: it says what the weights are")
    args = hf_args(read_json(config), config, max_seq_len)
    parts = [files] if isinstance(files, str) else sorted(set(files.values()))
    shapes, where = {}, {}
    for part in parts:
        found = tensor_shapes(part)
        shapes |= found
        where |= dict.fromkeys(found, part)
    check_shapes(args, shapes, path, hf_name)

    def read(name, a, b):
        theirs = hf_name(name)
        w = open_tensors(where[theirs])[theirs][a:b]
        rotated = name.removesuffix(".weight").endswith(ROTATED)
        return neighbours(w, args.head_dim) if rotated else w

    return args, gather(args, read, dtype), folder


def read_meta(folder, dtype=None, max_seq_len=None):
    """Reads a Meta folder, whose tensors may be split over several files; returns as read_hf."""
    path = os.path.join(folder, "params.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: it says what the weights are")
    files = sorted(
        os.path.join(folder, f)
        for f in os.listdir(folder)
        if f.startswith("consolidated.") and f.endswith(".pth")
    )
    if not files:
        raise FileNotFoundError(f"{folder}: there is no consolidated.00.pth")
    for i, file in enumerate(files):
        if os.path.basename(file) != f"consolidated.{i:02}.pth":
            raise FileNotFoundError(f"{folder}: consolidated.{i:02}.pth is missing")
    shards = [tensor_shapes(f) for f in files]
    args = meta_args(read_json(path), path, shards[0], len(files), max_seq_len)
    want, whole, cut = model_shapes(args), {}, {}
    for name in shards[0]:  # every file has all norms; matrices are split by rows or by columns
        parts = [shard.get(name) for shard in shards]
        if None in parts:
            raise ValueError(f"{files[parts.index(None)]} lacks {name}")
        whole[name] = parts[0]
        if len(files) > 1 and len(parts[0]) == 2 and name in want:
            cut[name] = 0 if parts[0][1] == want[name][1] else 1
            total = sum(part[cut[name]] for part in parts)
            whole[name] = (total, parts[0][1]) if cut[name] == 0 else (parts[0][0], total)
    check_shapes(args, whole, folder)

    def read(name, a, b):
        if name not in cut:
            return open_tensors(files[0])[name][a:b]
        parts, at = [], 0
        for file, shard in zip(files, shards):
            w, rows = open_tensors(file)[name], shard[name][0]
            parts.append(w[a:b] if cut[name] else w[max(0, a - at) : max(0, b - at)])
            at += rows
        return torch.cat(parts, cut[name])

    return args, gather(args, read, dtype), folder


# -----------------------------------------------------------------------------
# Chat templates: Hugging Face's are programs (Jinja), ours are strings


def write_dialogue(template, turns, system, bos, eos):
    """
    The text of a dialogue in our template. turns: [(user, reply)]; the last reply may be None, and
    the text is then a prompt.
    """
    text = ""
    for i, (user, reply) in enumerate(turns):
        form = template["turn"] if i == 0 else template.get("next") or template["turn"]
        if i == 0 and system:
            form = template["system"]
        if reply is None:
            form, reply = form[: form.index("{reply}")], ""
        for name, value in (
            ("bos", bos),
            ("eos", eos),
            ("system", system or ""),
            ("user", user),
            ("reply", reply),
        ):
            form = form.replace(f"{{{name}}}", value)
        text += form
    return text


def template_from_jinja(source, bos, eos):
    """Converts a Jinja template to our strings: the Jinja template renders dialogues of marker
    texts, which are then split at the markers. If nothing follows a reply, {eos} is added, so that
    the model can end it. The result must render a dialogue of three exchanges like the original,
    except for spaces around replies, which the tokenizer handles here. Raises ValueError with the
    reason if it does not.
    """
    if isinstance(source, str) and len(source) > 1 << 20:
        raise ValueError("it is longer than a megabyte")
    one, two, system = ("USER-1", "REPLY-1"), ("USER-2", "REPLY-2"), "SYSTEM-1"
    turns = [("Who are you?", "I am\n\na model."), ("Ünïcödé {x}", "<b>"), ("And?", "No.")]
    said = [((one,), None), ((one, two), None), ((one,), system)]
    said += [(tuple(turns[:n]), brief) for n, brief in ((1, None), (3, None), (3, "Be brief."))]
    said += [((*t[:-1], (t[-1][0], None)), brief) for t, brief in said]
    chats = []
    for chat, brief in said:
        messages = [{"role": "system", "content": brief}] if brief else []
        for user, reply in chat:
            messages.append({"role": "user", "content": user})
            if reply is not None:
                messages.append({"role": "assistant", "content": reply})
        chats.append(
            {
                "messages": messages,
                "bos_token": bos,
                "eos_token": eos,
                "tools": None,
                "add_generation_prompt": chat[-1][1] is None,
            }
        )
    written = dict(zip(said, render_chats(source, chats)))

    def render(turns, system=None):
        text, error = written[tuple(turns), system or None]
        if error:
            raise ValueError(error)
        return text

    def form(turn, system=None, before=()):
        start = render(before, system) if before else ""
        prompt = render([*before, (turn[0], None)], system)
        whole = render([*before, turn], system)
        if not (prompt.startswith(start) and whole.startswith(start)):
            raise ValueError("it changes earlier replies")
        reply = whole.removeprefix(prompt.rstrip()).lstrip()  # the same text, if it has another
        if turn[1] in reply and not reply.startswith(turn[1]):
            raise ValueError("what it writes before a reply is not its generation prompt")
        prompt, tail = prompt[len(start) :], whole.rpartition(turn[1])[2]
        return prompt + "{reply}" + (tail.lstrip(" ") if tail.strip() else tail)

    template = {"turn": form(one), "next": form(two, None, [one])}
    with contextlib.suppress(ValueError):  # a template without a system prompt may raise
        template["system"] = form(one, system)
    knows_system = system in template.get("system", "")
    if not knows_system:
        template["system"] = template["turn"].replace(one[0], f"{system}\n\n{one[0]}")
    for name, text in template.items():
        for mark, value in (
            (eos, "{eos}"),
            (bos, "{bos}"),
            (system, "{system}"),
            (one[0], "{user}"),
            (two[0], "{user}"),
        ):
            text = text.replace(mark, value) if mark else text
        template[name] = text
        if text.count("{user}") != 1 or text.count("{reply}") != 1:
            raise ValueError("a text is left out, or written twice")
    if template["next"] == template["turn"]:
        template["next"] = ""

    def bare(text):
        for _, reply in turns:
            text = text.replace(f" {reply}", reply).replace(f"{reply} ", reply)
        return text

    for n, brief in ((1, ""), (3, ""), (3, "Be brief."))[: 2 + knows_system]:
        for last in (turns[n - 1][1], None):
            chat = [*turns[: n - 1], (turns[n - 1][0], last)]
            ours = write_dialogue(template, chat, brief, bos, eos)
            if bare(render(chat, brief)) != bare(ours):
                raise ValueError("a longer dialogue comes out otherwise")
    return {name: ended(text) for name, text in template.items()}


def template_to_jinja(template):
    """The Jinja template that renders the same text as our strings."""

    def expression(text):
        names = {
            "{bos}": "bos_token",
            "{eos}": "eos_token",
            "{system}": "ns.system",
            "{user}": "m['content']",
        }
        parts = [p for p in re.split(r"(\{(?:bos|eos|system|user)\})", text) if p]
        return " ~ ".join(names.get(p) or json.dumps(p, ensure_ascii=False) for p in parts) or "''"

    first = template["turn"]
    forms = [template.get("system") or first, first, template.get("next") or first]
    which = ("{%- if ns.n == 0 and ns.system -%}", "{%- elif ns.n == 0 -%}", "{%- else -%}")

    def cases(side):
        parts = [
            f"{test}{{{{- {expression(form.split('{reply}')[side])} -}}}}"
            for test, form in zip(which, forms)
        ]
        return "".join(parts) + "{%- endif -%}"

    return (
        "{%- set ns = namespace(system='', n=0) -%}{%- for m in messages -%}"
        "{%- if m['role'] == 'system' -%}{%- set ns.system = m['content'] -%}"
        f"{{%- elif m['role'] == 'user' -%}}{cases(0)}"
        "{%- elif m['role'] == 'assistant' -%}{{- m['content'] -}}"
        f"{cases(1)}{{%- set ns.n = ns.n + 1 -%}}{{%- endif -%}}{{%- endfor -%}}"
    )


# -----------------------------------------------------------------------------
# Folders for transformers and PEFT


def lock_scratch(folder):
    """Locks a temporary folder of this user until the result, a file descriptor, is closed or the
    process ends. None where there are no locks, or if another process has locked it."""
    if os.name == "nt":
        return None
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):
            if os.fstat(fd).st_uid == os.getuid() and try_lock(fd):
                return fd
        os.close(fd)


def remove_scratch(path):
    """Removes the temporary folders of killed processes that wrote the folder `path`. If one was
    killed between its two renames, the old folder is put back."""
    parent, name = map(glob.escape, os.path.split(path))
    for scratch in glob.glob(os.path.join(parent, f".{name}.*.tmp")):
        if (lock := lock_scratch(scratch)) is not None:
            with contextlib.suppress(OSError):
                if not os.path.exists(path):
                    os.rename(os.path.join(scratch, "old"), path)
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


@contextlib.contextmanager
def write_folder(path, known):
    """A context in which a folder is written so that `path` is at any time the old folder or the
    complete new one: a temporary folder beside it is renamed at the end. Raises ValueError if the
    old folder has a file that is not in `known`, because it is then something else.
    """
    path = os.path.abspath(path)
    if os.path.exists(path):
        files = os.listdir(path) if os.path.isdir(path) else ["it is no folder"]
        others = sorted(set(files) - set(known))
        if others:
            raise ValueError(f"{path} is something else ({others[0]}): name a new folder")
    # Of this call alone: PATH.tmp or PATH.old could be a folder of the user.
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    remove_scratch(path)
    scratch = tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent)
    lock = lock_scratch(scratch)
    temporary, old = os.path.join(scratch, "new"), os.path.join(scratch, "old")
    try:
        os.makedirs(temporary)
        yield temporary
        os.umask(mask := os.umask(0))
        for name in os.listdir(temporary):  # libraries create some files for their owner only
            os.chmod(os.path.join(temporary, name), 0o666 & ~mask)
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(temporary, path)
    except OSError as e:
        name_file(e, path, scratch)
        raise
    finally:
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)  # interrupted between the two renames
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def write_bytes(path, data):
    """Writes a file and returns its path."""
    with open(path, "wb") as f:
        f.write(data)
    return path


def save_tensors(tensors, path, metadata=None):
    """Writes {name: tensor} as .safetensors, with metadata {name: text}. Raises OSError."""
    try:
        need("safetensors.torch").save_file(tensors, path, {"format": "pt"} | (metadata or {}))
    except need("safetensors").SafetensorError as e:
        raise OSError(str(e)) from None


HF_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def hf_tensors(args, weights, dtype=None):
    """{Hugging Face name: tensor}, contiguous, as safetensors needs them."""
    tensors = {}
    for name in model_shapes(args):
        w = weights[name].detach().to("cpu", dtype or weights[name].dtype)
        if name.removesuffix(".weight").endswith(ROTATED):
            w = halves(w, args.head_dim)
        tensors[hf_name(name)] = w.contiguous()
    return tensors


def piece_type(sp, i):
    """SentencePiece's type of a piece: 1 text, 2 unknown, 3 control, 5 unused, 6 byte."""
    return (
        2
        if sp.is_unknown(i)
        else 3
        if sp.is_control(i)
        else 5
        if sp.is_unused(i)
        else 6
        if sp.is_byte(i)
        else 1
    )


def sentencepiece_json(tokenizer, begin=True):
    """
    Converts a SentencePiece BPE model to a tokenizer.json. SentencePiece gives each piece a score;
    tokenizer.json ranks merges. All pairs of pieces that form a piece become consecutive merges, in
    the order of the scores. `begin` says whether text begins with BOS. Raises ValueError for a
    model that does more than merge pieces.
    """
    check_plain_bpe(tokenizer, "our tokenizer.json")
    sp = tokenizer.sp
    pieces = {sp.id_to_piece(i): i for i in range(tokenizer.n_words)}
    text = {piece: i for piece, i in pieces.items() if piece_type(sp, i) == 1}
    merges = [
        (-sp.get_score(i), text[piece[:k]], text[piece[k:]], [piece[:k], piece[k:]])
        for piece, i in text.items()
        for k in range(1, len(piece))
        if piece[:k] in text and piece[k:] in text
    ]
    prefix = sp.encode("a", out_type=str)[0].startswith("\u2581")
    replace = [
        {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
        for pattern, content in (("\u2581", " "), (r"\A +| +\z", ""), (" {2,}", " "))
    ]
    squeezes = sp.encode(" a  b ") == sp.encode("a b")
    special = {piece: i for piece, i in pieces.items() if piece_type(sp, i) in (2, 3)}
    bos = sp.id_to_piece(sp.bos_id()) if begin and sp.bos_id() >= 0 else None
    normalizer = {
        "type": "Sequence",
        "normalizers": replace * squeezes
        + [{"type": "Prepend", "prepend": "\u2581"}] * prefix
        + [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}],
    }
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
    }
    return tokenizer_json(
        special,
        bos,
        normalizer,
        None,
        decoder,
        unk_token=sp.id_to_piece(sp.unk_id()),
        fuse_unk=True,
        byte_fallback=any(map(sp.is_byte, pieces.values())),
        ignore_merges=False,
        vocab=pieces,
        merges=[pair for *_, pair in sorted(merges)],
    )


def bos_first(bos, i):
    """The post-processor of a tokenizer.json that puts the token `bos` with id i before text."""
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] * bool(bos)
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*first, a],
        "pair": [*first, a, b],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}} if bos else {},
    }


def tokenizer_json(special, bos, normalizer, pre_tokenizer, decoder, **model):
    """The contents of a tokenizer.json for the BPE `model` with control tokens {text: id}. `bos` is
    the text of the token that begins a text, or None."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": True} for text, i in special.items()
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": bos_first(bos, special.get(bos)),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }


# A SentencePiece model is a protocol buffer. Appended messages are merged with the first one:
# repeated fields are extended, other fields are replaced.


def field(number, value):
    """One field of a protocol buffer, as bytes; value is text, bytes, a float, a bool or an int."""

    def varint(n):
        n &= (1 << 64) - 1
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes(out) + bytes([n])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_pieces(pieces):
    """Pieces (text, score, piece_type) as bytes that can be appended to a SentencePiece model."""
    return b"".join(
        field(1, field(1, text) + field(2, float(score)) + field(3, kind))
        for text, score, kind in pieces
    )


def sentencepiece_names(**names):
    """The texts of the pieces unk, bos and eos as bytes that can be appended likewise."""
    numbers = {"unk": 45, "bos": 46, "eos": 47}
    return field(2, b"".join(field(numbers[key], text) for key, text in names.items() if text))


NORMALIZERS = ("Prepend", "Replace", "Sequence", "Metaspace")  # can come from SentencePiece
PROBES = (
    "Once upon a time,  there was a girl. ",
    "I'm 12345\n\n\tyears <old>",
    "안녕 мир é 😀",
    "x" * 40,
    "ﬁ ＡＢ① É E\u0301 İ",
    "<s> </s> <0x0A>",
    "a\u2581b",
)


def json_to_sentencepiece(tokenizer):
    """Converts a tokenizer.json that was made from a SentencePiece model, such as Llama 2's as
    saved by transformers, back to a SentencePiece model with the same encoding, as bytes. The ranks
    of merges become scores of pieces. None for another kind of tokenizer.
    """
    config, n = tokenizer.json, tokenizer.n_words
    model = config["model"]

    def kinds(part):
        steps = (part or {}).get("normalizers", (part or {}).get("pretokenizers", []))
        return [(part or {}).get("type", "Sequence"), *(k for s in steps for k in kinds(s))]

    text = (
        {t: i for t, i in model.get("vocab", {}).items() if t not in tokenizer.special}
        if isinstance(model.get("vocab"), dict)
        else {}
    )
    unk, ignored = (
        model.get("unk_token") or "<unk>",
        ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"),
    )
    if (
        model.get("type", "BPE") != "BPE"
        or any(map(model.get, ignored))
        or "\u2581" not in text
        or tokenizer.bpe.token_to_id(unk) is None
        or not set(NORMALIZERS).issuperset(
            kinds(config.get("normalizer")) + kinds(config.get("pre_tokenizer"))
        )
    ):
        return None
    # All pairs of pieces that form a piece must be merges, and these must be consecutive.
    score, ways, last = {}, {}, None
    for a, b in (m if isinstance(m, list) else m.split(" ") for m in model["merges"]):
        if a + b != last and a + b in score:
            return None
        last = a + b
        score[last] = -len(score)
        ways[last] = ways.get(last, 0) + 1
    byte_fallback, pieces = bool(model.get("byte_fallback")), [None] * n
    for piece, i in text.items():
        is_byte = byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
        parts = sum(piece[:k] in text and piece[k:] in text for k in range(1, len(piece)))
        if not is_byte and parts != ways.get(piece, 0):
            return None
        pieces[i] = piece, score.get(piece, 0), 6 if is_byte else 1
    for piece, i in tokenizer.special.items():
        pieces[i] = piece, 0, 3
    pieces[tokenizer.bpe.token_to_id(unk)] = unk, 0, 2
    pieces = [p or (f"[unused {i}]", 0, 5) for i, p in enumerate(pieces)]
    name = {i: t for t, i in tokenizer.special.items()}
    # model_type BPE, byte_fallback; SentencePiece looks for <s> and </s> where no name is given
    trainer = field(3, 2) + field(35, byte_fallback)
    names = {
        "unk": unk,
        "bos": name.get(tokenizer.bos_id, "[no BOS]"),
        "eos": name.get(tokenizer.eos_id, "[no EOS]"),
    }
    body = sentencepiece_pieces(pieces) + field(2, trainer) + sentencepiece_names(**names)
    for prefix, squeeze in ((1, 0), (0, 0), (1, 1), (0, 1)):
        data = body + field(3, field(3, prefix) + field(4, squeeze) + field(5, 1))
        sp = SentencePieceProcessor()
        try:
            sp.LoadFromSerializedProto(data)
        except RuntimeError:  # SentencePiece refuses these pieces
            return None
        if all(sp.encode(t) == tokenizer.encode(t, False, False) for t in PROBES):
            return data
    return None


# Llama 3's control tokens by position; the others are reserved. LLAMA3_NAMES are in all versions.
LLAMA3_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    9: "eot_id",
}
LLAMA31_NAMES = {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def ranks_to_json(path, vocab_size, version_31):
    """Converts Meta's tokenizer.model of Llama 3 to a tokenizer.json. The file is in tiktoken's
    format: one token per line, in base64, and its rank. tiktoken merges any two neighbours that
    form a token, lowest rank first; tokenizer.json lists the merges. Raises ValueError if the file
    is of another kind or size.
    """
    ranks = {}
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(
                    f"{path} is not a SentencePiece model, and its line {number} is not "
                    "a token in base64 and its rank"
                ) from None
    single = all(bytes([b]) in ranks for b in range(256))
    if not single or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} lacks ranks, or is cut short")
    if len(ranks) + 256 != vocab_size:
        raise ValueError(
            f"{path} has {len(ranks)} tokens and 256 special ones, the model has {vocab_size}"
        )

    def parts(token):
        """The pieces from which the last BPE merge forms a token; more than two if no merge
        does."""
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            rank, i = min(
                (ranks.get(a + b, vocab_size), i)
                for i, (a, b) in enumerate(zip(pieces, pieces[1:]))
            )
            if rank == vocab_size:
                break
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces

    letter = {b: c for c, b in byte_alphabet().items()}

    def spell(token):
        return "".join(letter[b] for b in token)

    tokens = sorted(ranks, key=ranks.get)
    pairs = [pair for pair in map(parts, tokens) if len(pair) == 2]
    names = LLAMA3_NAMES | (LLAMA31_NAMES if version_31 else {})
    spare = (f"reserved_special_token_{i}" for i in itertools.count())
    special = {f"<|{names.get(i) or next(spare)}|>": len(ranks) + i for i in range(256)}
    return tokenizer_json(
        special,
        "<|begin_of_text|>",
        None,
        {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": LLAMA3_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        unk_token=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=True,
        vocab={spell(token): i for i, token in enumerate(tokens)},
        merges=[[spell(a), spell(b)] for a, b in pairs],
    )


def write_hf_tokenizer(folder, tokenizer, template, max_seq_len, begin):
    """Writes the files of a tokenizer and a tokenizer_config.json to a Hugging Face folder."""
    beside = os.path.join(os.path.dirname(tokenizer.model_path), "tokenizer_config.json")
    config = {"model_max_length": max_seq_len, "clean_up_tokenization_spaces": False}
    if tokenizer.sp:
        shutil.copyfile(tokenizer.model_path, os.path.join(folder, "tokenizer.model"))
        write_json(os.path.join(folder, "tokenizer.json"), sentencepiece_json(tokenizer, begin))
        piece = tokenizer.sp.id_to_piece
        # Not LlamaTokenizer, which in transformers 5 treats a leading space differently
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "legacy": True,
            "add_bos_token": begin,
            "add_eos_token": False,
            "unk_token": piece(tokenizer.sp.unk_id()),
        }
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        config |= {key: piece(i) for key, i in names.items() if i >= 0}
    else:
        path = os.path.join(folder, "tokenizer.json")
        if tokenizer.adds_bos == begin:
            shutil.copyfile(tokenizer.model_path, path)
        else:  # transformers uses the post-processor only
            bos = next(t for t, i in tokenizer.special.items() if i == tokenizer.bos_id)
            process = bos_first(bos if begin else None, tokenizer.bos_id)
            write_json(path, tokenizer.json | {"post_processor": process})
        text = {i: text for text, i in tokenizer.special.items()}
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key: text[i] for key, i in names.items() if i >= 0},
        }
        config = read_json(beside) or config
        config |= {"add_bos_token": begin} if config.get("add_bos_token", begin) != begin else {}
    if template and not same_template(config, template):
        config["chat_template"] = template_to_jinja(template)
    write_json(os.path.join(folder, "tokenizer_config.json"), config)


def token_text(config, name):
    """A special token of a tokenizer_config.json, where it is a string or an object; "" if
    missing."""
    value = config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def same_template(config, template):
    """Whether the chat template of a tokenizer_config.json renders the same text as ours."""
    try:
        texts = token_text(config, "bos_token"), token_text(config, "eos_token")
        ours = template_from_jinja(config["chat_template"], *texts)
    except (KeyError, ValueError):
        return False
    return {k: v for k, v in ours.items() if v} == {k: v for k, v in template.items() if v}


def write_hf(path, args, weights, dtype, tokenizer, template, end_ids, bos=True, tokenizer_hash=""):
    """Writes a folder that transformers loads; returns the number types of its weights."""
    need("safetensors.torch")  # before the work begins
    tensors = hf_tensors(args, weights, getattr(torch, dtype) if dtype else None)
    kinds = sorted({w.dtype for w in tensors.values()}, key=lambda kind: kind.itemsize)
    begin = begins_with_bos(tokenizer, bos)
    bos, eos, ends = special_ids(tokenizer, end_ids, template)
    with write_folder(path, HF_FILES) as folder:
        config = hf_config(args, kinds[-1], bos, [eos, *ends])
        config |= {"tokenizer_hash": tokenizer_hash} if tokenizer_hash else {}
        write_json(os.path.join(folder, "config.json"), config)
        ends = ends_for_others(bos, [eos, *ends], begin, template)
        write_json(
            os.path.join(folder, "generation_config.json"),
            {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends},
        )
        save_tensors(tensors, os.path.join(folder, "model.safetensors"))
        if tokenizer:
            write_hf_tokenizer(folder, tokenizer, template, args.max_seq_len, begin)
    return ", ".join(str(kind).removeprefix("torch.") for kind in kinds)


def read_adapters(path):
    """
    ({"rank", "alpha", "layers"}, {PEFT's name: lora_a or lora_b}, the tokenizer's hash or None) of
    a checkpoint of --sft or --ppo with --lora_rank, or of a file of adapters. Raises ValueError if
    it has no adapters, if they do not fit what it says of them, or if it is damaged.
    """
    checkpoint = open_tensors(path)
    verify_archive(path)
    try:
        lora = checkpoint.get("lora", checkpoint)
        config, adapters = checkpoint.get("config", {}), lora.get("state", {})
        if "ppo" in checkpoint:
            policy = checkpoint["ppo"].get("average") or checkpoint["ppo"]["policy"]
            adapters = {k: w for k, w in policy.items() if ".lora_" in k}
            lora = {name: config.get(f"lora_{name}") for name in ("rank", "alpha", "layers")}
        if not len(adapters) or not {"rank", "alpha", "layers"} <= lora.keys():
            raise ValueError(f"{path} has no LoRA adapters")
        if "model_args" not in checkpoint:
            raise ValueError(
                f"{path} does not say which model it is for: give the checkpoint beside it"
            )
        head_dim = ModelArgs(**checkpoint["model_args"]).head_dim
        tensors, rank, names = {}, lora["rank"], set()
        for name, w in adapters.items():  # layers.0.attention.wq.lora_a
            matrix, _, letter = name.rpartition(".lora_")
            if type(rank) is not int or w.shape[{"a": 0, "b": 1}[letter]] != rank:
                raise TypeError(f"{name} is not of rank {str(rank)[:40]}")
            if letter == "b" and matrix.endswith(ROTATED):
                w = halves(w, head_dim)
            stem = hf_name(f"{matrix}.weight").removesuffix(".weight")
            tensors[f"base_model.model.{stem}.lora_{letter.upper()}.weight"] = w.contiguous()
            names.add(stem.rpartition(".")[2].removesuffix("_proj"))
        if {*lora["layers"].split(",")} != names or type(lora["alpha"]) not in (int, float):
            raise TypeError("they are of other layers, or have no alpha")
        tokenizer_hash = checkpoint.get("tokenizer_hash")
        return lora, tensors, tokenizer_hash if isinstance(tokenizer_hash, str) else None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if str(path) in str(e):
            raise
        reason = " ".join(str(e).split())[:120]
        raise ValueError(f"{path} has no LoRA adapters, or is damaged ({reason})") from None


def export_peft(args):
    """Writes the adapters of a checkpoint as a folder for peft.PeftModel.from_pretrained."""
    need("safetensors.torch")  # before the work begins
    lora, tensors, tokenizer_hash = read_adapters(args.checkpoint)
    targets = [f"{name}_proj" for name in lora["layers"].split(",")]
    with write_folder(args.output, ("adapter_config.json", "adapter_model.safetensors")) as folder:
        write_json(
            os.path.join(folder, "adapter_config.json"),
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "inference_mode": True,
                "bias": "none",
                "base_model_name_or_path": args.base,
                "r": lora["rank"],
                "lora_alpha": lora["alpha"],
                "lora_dropout": 0.0,
                "fan_in_fan_out": False,
                "target_modules": targets,
            },
        )
        metadata = {"tokenizer_hash": tokenizer_hash} if tokenizer_hash else {}
        save_tensors(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata)
    n = sum(w.numel() for w in tensors.values())
    print(
        f"wrote {args.output}: LoRA adapters of rank {lora['rank']} for {lora['layers']}, "
        f"{n:,} parameters"
    )


# -----------------------------------------------------------------------------
# GGUF, llama.cpp's format: out

GGUF_FILE, GGUF_HASH = "fable.tokenizer", "fable.tokenizer_hash"
GGUF_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
GGUF_LAYER = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def gguf_name(name):  # RoPE rotates adjacent numbers in GGUF as well, so rows keep their order
    return renamed(name, GGUF_NAMES, "blk", GGUF_LAYER)


def gguf_tokenizer(writer, tokenizer, template, end_ids, begin):
    """Writes the vocabulary of a tokenizer to a GGUFWriter."""
    bos, eos, ends = special_ids(tokenizer, end_ids, template)
    if tokenizer.sp:
        check_plain_bpe(tokenizer, "GGUF")
        sp, ids = tokenizer.sp, range(tokenizer.n_words)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([sp.id_to_piece(i) for i in ids])
        writer.add_token_scores([sp.get_score(i) for i in ids])
        pieces = sentencepiece_identity(tokenizer.data)[1]
        writer.add_token_types([kind for *_, kind in pieces])
        writer.add_unk_token_id(sp.unk_id())
        prefix = sp.encode("a", out_type=str)[0].startswith("\u2581")
        writer.add_add_space_prefix(prefix)
        writer.add_remove_extra_whitespaces(sp.encode(" a  b ") == sp.encode("a b"))
    else:
        blob = byte_level_blob(tokenizer)  # also checks that the kind is one of those below
        pattern, flags = struct.unpack_from("<2I", blob, 4 + 12 * struct.unpack_from("<I", blob)[0])
        model = tokenizer.json["model"]
        tokens = [f"[PAD{i}]" for i in range(tokenizer.n_words)]
        types = [5] * tokenizer.n_words
        for texts, type_ in (model["vocab"], 1), (tokenizer.special, 3):
            for text, i in texts.items():
                tokens[i], types[i] = text, type_
        writer.add_tokenizer_model("gpt2")
        kind = "llama-bpe" if pattern == 1 else "smollm" if flags & 2 else "gpt-2"
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    others = [i for i in ends_for_others(bos, ends, begin, template) if i != eos]
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), others):
        add(i)
    if ends:
        writer.add_array("fable.end_ids", ends)
    # The file itself, since the fields above leave out some of it: the decoder, flags of tokens.
    writer.add_array(GGUF_FILE, tokenizer.data)
    writer.add_add_bos_token(begin)


def write_gguf(
    path, args, weights, dtype, tokenizer, template, end_ids, bos=True, tokenizer_hash=""
):
    """Writes a model to `path`, tensor by tensor. With dtype "q8_0", matrices are int8 in groups
    of 32 columns; norms, and matrices whose columns are not a multiple of 32, are fp32. The other
    dtype is "float32".
    """
    gguf = need("gguf")
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("llama")
    for add, value in (
        (writer.add_context_length, args.max_seq_len),
        (writer.add_vocab_size, args.vocab_size),
        (writer.add_embedding_length, args.dim),
        (writer.add_block_count, args.n_layers),
        (writer.add_feed_forward_length, args.ffn_dim),
        (writer.add_head_count, args.n_heads),
        (writer.add_head_count_kv, args.n_kv_heads),
        (writer.add_rope_freq_base, args.rope_theta),
        (writer.add_rope_dimension_count, args.head_dim),
        (writer.add_layer_norm_rms_eps, args.norm_eps),
    ):
        add(value)
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_Q8_0 if dtype == "q8_0" else gguf.LlamaFileType.ALL_F32
    )
    if args.head_dim * args.n_heads != args.dim:
        writer.add_key_length(args.head_dim)
        writer.add_value_length(args.head_dim)
    extra = {}
    if args.rope_scaling and len(args.rope_scaling) == 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(args.rope_scaling["factor"])
    elif args.rope_scaling:  # the factor by which each frequency is divided
        plain = rope_frequencies(replace(args, rope_scaling=None))
        extra["rope_freqs.weight"] = (plain / rope_frequencies(args)).numpy()
    if tokenizer:
        begin = begins_with_bos(tokenizer, bos)
        gguf_tokenizer(writer, tokenizer, template, end_ids, begin)
    if tokenizer_hash:
        writer.add_string(GGUF_HASH, tokenizer_hash)
    if template:
        writer.add_chat_template(template_to_jinja(template))

    def as_type(w):
        return types.Q8_0 if dtype == "q8_0" and len(w) > 1 and w[-1] % 32 == 0 else types.F32

    shapes = model_shapes(args)
    for name, w in extra.items():
        writer.add_tensor_info(name, w.shape, w.dtype, w.nbytes)
    for name, shape in shapes.items():
        kind, n = as_type(shape), int(np.prod(shape))
        nbytes = n // 32 * 34 if kind == types.Q8_0 else 4 * n
        writer.add_tensor_info(gguf_name(name), shape, np.dtype("f4"), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for w in extra.values():
        writer.write_tensor_data(w)
    for name, shape in shapes.items():
        w = floats(weights[name])
        if as_type(shape) == types.Q8_0:
            w = gguf.quants.quantize(w, types.Q8_0)
        writer.write_tensor_data(w)
    writer.close()


# -----------------------------------------------------------------------------
# GGUF in: the header is read here, since the library trusts its sizes; numbers are dequantized by
# the library

GGUF_NUMBERS = dict(enumerate("u1 i1 <u2 <i2 <u4 <i4 <f4 ?".split())) | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_PART = 1 << 20  # numbers that are dequantized at a time
GGUF_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list of strings",
    np.ndarray: "a list of numbers",
}


class GGUFHeader:
    """
    The header of a GGUF file, which may be damaged or hostile: every size is compared with the
    size of the file before it is used. ValueError says what is wrong.

    fields   {key: int, float, bool, str, list of str or array of numbers}
    tensors  {name: (shape, number type of the gguf library, offset in the file, bytes)}
    """

    def __init__(self, path, gguf):
        self.fields, self.tensors, self.at = {}, {}, 0
        self.size = os.path.getsize(path)
        with open(path, "rb") as f:
            if f.read(4) != b"GGUF":
                raise ValueError("it is no GGUF file")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
                self.read(gguf)

    def take(self, n):
        """The next n bytes."""
        if n > self.size - self.at:
            raise ValueError("it is damaged, or cut short")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, size):
        return int.from_bytes(self.take(size), "little")

    def string(self):
        return self.take(self.number(8)).decode()

    def name(self):
        name = self.string()
        if not name.isprintable() or len(name) > 200:
            raise ValueError("it is damaged: a name in its header is no text")
        return name

    def value(self, kind):
        if kind == GGUF_STRING:
            return self.string()
        if kind == GGUF_ARRAY:
            kind, n = self.number(4), self.number(8)
            if kind == GGUF_STRING:
                if n > (self.size - self.at) // 8:  # each has 8 bytes for its length
                    raise ValueError("it is damaged, or cut short")
                return [self.string() for _ in range(n)]
        else:
            n = None
        if kind not in GGUF_NUMBERS:
            raise ValueError(f"it is damaged: its header has values of type {kind}")
        kind = np.dtype(GGUF_NUMBERS[kind])
        numbers = np.frombuffer(self.take(kind.itemsize * (1 if n is None else n)), kind)
        if n is not None:
            return numbers
        # 1e-5 was rounded to fp32 there: str gives the shortest number that is rounded to the same
        return float(str(numbers[0])) if kind == np.float32 else numbers[0].item()

    def read(self, gguf):
        self.at = 4
        version, n_tensors, n_fields = self.number(4), self.number(8), self.number(8)
        if version not in (2, 3):
            raise ValueError(f"version {version} of GGUF is not supported: 2 and 3 are")
        for _ in range(n_fields):
            name = self.name()
            if name in self.fields:
                raise ValueError(f"it is damaged: it has {name} twice")
            self.fields[name] = self.value(self.number(4))
        infos = []
        for _ in range(n_tensors):
            name, n_dims = self.name(), self.number(4)
            if n_dims > 4:
                raise ValueError(f"it is damaged: {name} has {n_dims} dimensions")
            dims = [self.number(8) for _ in range(n_dims)]
            infos.append((name, tuple(reversed(dims)), self.number(4), self.number(8)))
        align = self.get("general.alignment", int, 32)
        if not 0 < align <= 1 << 20:
            raise ValueError(f"general.alignment must not be {align}")
        start = -(-self.at // align) * align
        for name, shape, number, offset in infos:
            if name in self.tensors:
                raise ValueError(f"it is damaged: it has {name} twice")
            kind, block, block_bytes = gguf_type(gguf, number, name)
            count = int(np.prod(shape, dtype=object))
            if not shape or count < 1 or shape[-1] % block or (block > 1 and len(shape) < 2):
                raise ValueError(f"{name} of type {kind.name} cannot have the shape {shape}")
            nbytes = count // block * block_bytes
            if start + offset + nbytes > self.size:
                raise ValueError(f"it is damaged, or cut short: {name} lies beyond its end")
            self.tensors[name] = shape, kind, start + offset, nbytes

    def get(self, key, kind, default=None):
        """
        The field `key`, of a type of GGUF_KINDS; its default, if that is not None, where it is
        missing. ValueError if it has another type.
        """
        value = self.fields.get(key, default)
        if value is None:
            raise ValueError(f"it does not say {key}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{key} must be {GGUF_KINDS[kind]}, not {str(value)[:60]!r}")
        return value


def gguf_type(gguf, number, name):
    """(type, numbers per block, bytes per block) of a GGUF number type; ValueError if unknown."""
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        return kind, block, nbytes
    except (ValueError, KeyError, NotImplementedError):
        known = number in list(gguf.GGMLQuantizationType)
        what = gguf.GGMLQuantizationType(number).name if known else number
        raise ValueError(f"the number type {what} of {name} is not supported") from None


# Of the fields llama.*, those that are understood, or say nothing more about the model
GGUF_KNOWN = """context_length embedding_length block_count feed_forward_length vocab_size
    attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon
    attention.key_length attention.value_length rope.freq_base rope.dimension_count
    rope.scale_linear rope.scaling.type rope.scaling.factor rope.scaling.finetuned
    rope.scaling.original_context_length tensor_data_layout expert_count
    expert_used_count""".split()


def gguf_args(header, rope_factors=None, max_seq_len=None):
    """
    ModelArgs from the header of a GGUF file. rope_factors, (E/2,), is its tensor of numbers by
    which RoPE's frequencies are divided. ValueError, naming it, for what the model here does not
    do.
    """

    def refuse(what):
        raise ValueError(f"{what} is not supported")

    def get(name, kind=int, default=None):
        return header.get(f"llama.{name}", kind, default)

    architecture = header.get("general.architecture", str)
    if architecture != "llama":
        refuse(f"the architecture {architecture[:40]!r}")
    if (parts := header.get("split.count", int, 0)) > 1:
        refuse(f"a model in {parts} files: join them with llama-gguf-split --merge, as it")
    for key, value in header.fields.items():
        name = key.removeprefix("llama.")
        if name != key and name not in GGUF_KNOWN and np.any(value):
            refuse(f"{key} {str(value)[:60]}")
    if get("expert_count", int, 0):
        refuse("a mixture of experts")
    dim, heads, layers = get("embedding_length"), get("attention.head_count"), get("block_count")
    if heads < 1:
        raise ValueError(f"llama.attention.head_count must not be {heads}")
    head_dim = get("attention.key_length", int, dim // heads)
    for name, usual in ("attention.value_length", dim // heads), ("rope.dimension_count", head_dim):
        if get(name, int, usual) != head_dim:
            refuse(f"llama.{name} {get(name, int, usual)}, not attention.key_length {head_dim},")
    if gguf_name(f"layers.{layers - 1}.attention.wq.weight") not in header.tensors:
        raise ValueError(f"it lacks tensors of its {layers} layers")
    embedding = gguf_name("tok_embeddings.weight")
    if embedding not in header.tensors:
        raise ValueError(f"it lacks {embedding}")
    kind = get("rope.scaling.type", str, "none")
    factor = get("rope.scaling.factor", float, get("rope.scale_linear", float, 1.0))
    if kind not in ("none", "linear"):
        refuse(f"the RoPE scaling {kind[:40]!r}")
    linear = (kind == "linear" or "llama.rope.scale_linear" in header.fields) and factor != 1
    args = ModelArgs(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=get("attention.head_count_kv", int, heads),
        head_dim=head_dim if "llama.attention.key_length" in header.fields else None,
        vocab_size=header.tensors[embedding][0][0],
        hidden_dim=get("feed_forward_length"),
        norm_eps=get("attention.layer_norm_rms_epsilon", float),
        max_seq_len=max_seq_len or get("context_length"),
        rope_theta=get("rope.freq_base", float, 10000.0),
        tied=gguf_name("output.weight") not in header.tensors,
        rope_scaling={"factor": factor} if linear else None,
    )
    if rope_factors is None:
        return args
    if linear:
        refuse("RoPE scaling both linear and by rope_freqs.weight")
    return replace(args, rope_scaling=llama3_scaling(args, rope_factors))


def llama3_scaling(args, factors):
    """
    Llama 3's four numbers whose scaling divides RoPE's frequencies by `factors`, (E/2,). The lowest
    frequencies are divided by the whole factor, and its low and high limits are 1 and 4 in all
    models. ValueError if there are none.
    """
    plain = rope_frequencies(args)
    if factors.shape == plain.shape and bool((factors > 0).all() and factors.isfinite().all()):
        factor = round(factors.max().item(), 4)
        for original in (1 << n for n in range(2, 23)):
            scaling = dict(zip(LLAMA3_SCALING, (factor, 1.0, 4.0, original)))
            scaled = rope_frequencies(replace(args, rope_scaling=scaling))
            if torch.allclose(plain / factors, scaled, rtol=1e-5, atol=0):
                return scaling
    raise ValueError("RoPE scaling by rope_freqs.weight other than Llama 3's is not supported")


def read_gguf(path, folder, dtype=None, max_seq_len=None):
    """
    A GGUF file -> (ModelArgs, state dict). Its tokenizer and what belongs to it goes to `folder`,
    as the files that a folder of Hugging Face's has.
    """
    gguf = need("gguf")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    os.makedirs(folder)
    try:
        header = GGUFHeader(path, gguf)
        shapes = {name: shape for name, (shape, *_) in header.tensors.items()}

        def rows(name, a, b):
            shape, kind, offset, nbytes = header.tensors[name]
            row = nbytes // shape[0]
            data = np.fromfile(path, np.uint8, (b - a) * row, offset=offset + a * row)
            data = data.reshape(b - a, row)
            if kind.name in ("F16", "BF16"):
                numbers = torch.from_numpy(data.view(np.int16)).view(
                    torch.float16 if kind.name == "F16" else torch.bfloat16
                )
            else:
                numbers = torch.from_numpy(gguf.quants.dequantize(data, kind))
            return numbers.view(b - a, *shape[1:])

        factors = None
        if "rope_freqs.weight" in shapes:
            factors = rows("rope_freqs.weight", 0, shapes.pop("rope_freqs.weight")[0]).float()
        args = gguf_args(header, factors, max_seq_len)
        check_shapes(args, shapes, "its header", gguf_name)
        read_gguf_tokenizer(header, folder, args.vocab_size)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None

    def read(name, a, b):
        return rows(gguf_name(name), a, b)

    return args, gather(args, read, dtype, GGUF_PART)


def read_gguf_tokenizer(header, folder, vocab_size):
    """
    Writes tokenizer.model or tokenizer.json, tokenizer_config.json and generation_config.json of
    the tokenizer in a GGUF file, if there is one. ValueError for a kind that is not known.
    """
    kind = header.get("tokenizer.ggml.model", str, "none")
    pre = header.get("tokenizer.ggml.pre", str, "default")
    if kind in ("none", "no_vocab"):
        return
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"the tokenizer {kind[:40]!r} is not supported: llama and gpt2 are")
    tokens = header.get("tokenizer.ggml.tokens", list)
    ones = np.ones(len(tokens), int)
    types = header.get("tokenizer.ggml.token_type", np.ndarray, ones).tolist()
    if len(tokens) != vocab_size or len(types) != vocab_size:
        raise ValueError(
            f"it has {len(tokens)} tokens with {len(types)} types, the embedding has {vocab_size}"
        )

    def special(name, default=-1):
        i = header.get(f"tokenizer.ggml.{name}_token_id", int, default)
        return i if 0 <= i < vocab_size else -1

    usual = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    ids = {n: special(n, usual.get(n, -1)) for n in ("bos", "eos", "unknown", "padding")}
    ends = [ids["eos"], *header.get("fable.end_ids", np.ndarray, np.array([], int)).tolist()]
    ends = [i for i in [*ends, special("eot"), special("eom")] if 0 <= i < vocab_size]
    for i in ids["bos"], ids["eos"]:
        if i >= 0 and types[i] != 2:
            types[i] = 3
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": header.get(
            "tokenizer.ggml.add_bos_token", bool, kind == "llama" or pre == "llama-bpe"
        ),
    }
    names = {"bos": ids["bos"], "eos": ids["eos"], "pad": ids["padding"]}
    settings |= {f"{name}_token": tokens[i] for name, i in names.items() if i >= 0}
    if "tokenizer.chat_template" in header.fields:
        settings["chat_template"] = header.get("tokenizer.chat_template", str)
    write_json(os.path.join(folder, "tokenizer_config.json"), settings)
    write_json(
        os.path.join(folder, "generation_config.json"), {"eos_token_id": list(dict.fromkeys(ends))}
    )
    wanted = header.get(GGUF_HASH, str, "")
    path = os.path.join(folder, "tokenizer.model" if kind == "llama" else "tokenizer.json")
    if wanted and GGUF_FILE in header.fields:  # our own, unless its vocabulary was changed
        write_bytes(path, header.get(GGUF_FILE, np.ndarray).tobytes())
        with contextlib.suppress(ValueError):
            if Tokenizer(path).hash == wanted:
                return
    if kind == "llama":
        write_bytes(path, gguf_to_sentencepiece(header, tokens, types, ids))
    else:
        write_json(path, gguf_to_json(header, tokens, types, pre))
        note_ordinary([text for text, kind in zip(tokens, types) if kind == 4])
    try:
        tokenizer = Tokenizer(path)
    except ValueError as e:
        missing = "pip install" in str(e)
        raise ValueError(str(e) if missing else "its tokenizer is damaged") from None
    if wanted and tokenizer.hash != wanted:
        note(
            "the tokenizer in this GGUF file is not quite the one that it was exported with "
            f"({wanted[:16]}), which --tokenizer can name"
        )


def gguf_to_sentencepiece(header, tokens, types, ids):
    """The SentencePiece model, as bytes, whose pieces and scores a GGUF file has."""
    scores = header.get("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise ValueError("its tokenizer is damaged: tokenizer.ggml.scores")
    types = [types[i] if i != ids["unknown"] else 2 for i in range(len(types))]
    unk = next((i for i, kind in enumerate(types) if kind == 2), -1)
    pieces = zip(tokens, scores.tolist(), (k if k in range(1, 7) else 1 for k in types))
    # model_type BPE, byte_fallback; SentencePiece looks for <s> and </s> where no name is given
    trainer = field(3, 2) + field(35, 6 in types)
    names = {
        "unk": tokens[unk] if unk >= 0 else "<unk>",
        "bos": tokens[ids["bos"]] if ids["bos"] >= 0 else "[no BOS]",
        "eos": tokens[ids["eos"]] if ids["eos"] >= 0 else "[no EOS]",
    }
    prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    squeeze = header.get("tokenizer.ggml.remove_extra_whitespaces", bool, False)
    normalizer = field(3, int(prefix)) + field(4, int(squeeze)) + field(5, 1)
    return (
        sentencepiece_pieces(pieces)
        + field(2, trainer)
        + sentencepiece_names(**names)
        + field(3, normalizer)
    )


# llama.cpp's pre-tokenizers, which split text before BPE, as a tokenizer.json has them


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex, add_prefix_space=False):
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


GGUF_PRE = {
    "gpt-2": [byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
    "llama-bpe": [split_by(LLAMA3_PATTERN), byte_level(False)],
    "default": [
        *map(
            split_by,
            (
                r"[\p{P}\$\+<=>\^~\|]+",
                GPT2_PATTERN.removesuffix(r"|\s+"),
                r"\p{N}+",
                "[0-9][0-9][0-9]",
            ),
        ),
        byte_level(False),
    ],
}


def gguf_to_json(header, tokens, types, pre):
    """The tokenizer.json of byte-level BPE whose vocabulary and merges a GGUF file has."""
    if pre not in GGUF_PRE:
        raise ValueError(
            f"the pre-tokenizer {pre[:40]!r} is not supported: {', '.join(GGUF_PRE)} are"
        )
    used = [i for i, kind in enumerate(types) if kind != 5]
    if len({tokens[i] for i in used}) < len(used):
        raise ValueError("its tokenizer is damaged: it has a token twice")
    special = {tokens[i]: i for i in used if types[i] in (3, 4)}
    # Control tokens after all others are added to the vocabulary, as in Llama 3; others are in it.
    last = max((i for i in used if types[i] not in (3, 4)), default=-1)
    if sum(i > last for i in used) < (used or [0])[-1] - last:
        last = used[-1]  # added tokens would be numbered without gaps
    vocab = {tokens[i]: i for i in range(last + 1)}
    if len(vocab) <= last:
        raise ValueError("its tokenizer is damaged: it has a token twice")
    merges = [tuple(m.split(" ")) for m in header.get("tokenizer.ggml.merges", list)]
    for pair in merges:
        if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}:
            raise ValueError(f"its tokenizer is damaged: the merge {' '.join(pair)[:60]!r}")
    steps = GGUF_PRE[pre]
    return tokenizer_json(
        special,
        None,
        None,
        {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        byte_level(True, add_prefix_space=True),
        unk_token=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=pre == "llama-bpe",
        vocab=vocab,
        merges=[list(pair) for pair in merges],
    )


# -----------------------------------------------------------------------------
# OpenAI's API, for serve.py

# Parameters: default, of the type that is expected, lowest and highest value
KINDS = dict(temperature=(1.0, 0, 100), top_k=(0, 0, 2**31), top_p=(1.0, 0, 1), n=(1, 1, 128))
KINDS |= dict(max_tokens=(0, 1, 2**31), stream=(False, 0, 1), return_token_ids=(False, 0, 1))
STORY = KINDS | dict(logprobs=(-1, 0, 20))
CHAT = KINDS | dict(logprobs=(False, 0, 1), top_logprobs=(0, 0, 20))
CHAT |= dict(max_completion_tokens=(0, 1, 2**31))
OTHERS = {"model", "seed", "stop", "stream_options"}  # and "messages" of a chat, else "prompt"
STREAM_OPTIONS = {"include_usage", "include_obfuscation"}  # the second has no effect
NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Parameters that are accepted with the value that has no effect
NEUTRAL = dict(best_of=1, echo=False, suffix="", frequency_penalty=0, presence_penalty=0, tools=[])
NEUTRAL |= dict(tool_choice="none", parallel_tool_calls=True)  # OpenAI's defaults without tools
NEUTRAL |= dict(logit_bias={}, response_format={"type": "text"}, modalities=["text"])


def api_value(body, name, default, low=0, high=1):
    """The value of a parameter. Raises Refused unless it has the type of `default` and is from
    `low` to `high`."""
    x, kind = body.get(name), type(default)
    if x is None:
        return default
    if type(x) not in ((int, float) if kind is float else (kind,)) or not low <= x <= high:
        number = f"a {'whole ' if kind is int else ''}number from {low} to {high}"
        what = "true or false" if kind is bool else number
        raise Refused(400, f"{name} must be {what}", param=name)
    return kind(x)


def api_parameters(body, chat, limit=2**31, models=(None,)):
    """The parameters of a request as a namespace, checked. limit: the largest max_tokens; models:
    the accepted names, of which the first is the default."""
    kinds, stop = CHAT if chat else STORY, body.get("stop")
    stop = [] if stop is None or stop == "" else stop
    kinds = kinds | {name: (0, 1, limit) for name in kinds if name.startswith("max_")}
    source = "messages" if chat else "prompt"
    for name in body.keys() - kinds.keys() - OTHERS - NO_EFFECT - {source}:
        if body[name] is not None and body[name] != NEUTRAL.get(name):
            raise Refused(400, f"the parameter {name[:40]!r} is not supported", param=name[:40])
    stop, options = [stop] if isinstance(stop, str) else stop, body.get("stream_options")
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object", param="stream_options")
    for name in options.keys() - STREAM_OPTIONS:
        if options[name] is not None:
            why = f"the stream option {name[:40]!r} is not supported"
            raise Refused(400, why, param="stream_options")
    if not chat and not isinstance(body.get("prompt", ""), (str, list, type(None))):
        raise Refused(400, "prompt must be text or token ids, or a list of them", param="prompt")
    if not isinstance(stop, list) or len(stop) > 4:
        raise Refused(400, "stop must be a string or up to 4 strings", param="stop")
    if not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stop):
        raise Refused(400, "stop: expected strings of 1 to 200 characters", param="stop")
    p = SimpleNamespace(
        chat=chat, stop=stop, rows=[], usage=api_value(options, "include_usage", False)
    )
    vars(p).update({name: api_value(body, name, *kind) for name, kind in kinds.items()})
    for name, other in ("top_logprobs", "logprobs"), ("stream_options", "stream"):
        if body.get(name) and not body.get(other):
            raise Refused(400, f"{name} has no effect without {other}", param=name)
    if 0 < p.temperature < 1e-6:  # as in sample.py: logits divided by less are not finite
        why = "temperature must be 0, which is greedy, or at least 1e-6"
        raise Refused(400, why, param="temperature")
    p.seed = api_value(body, "seed", secrets.randbelow(2**31), -(2**63), 2**63 - 1)
    if chat:
        p.logprobs = p.top_logprobs if p.logprobs else -1
        p.max_tokens = p.max_completion_tokens or p.max_tokens
    p.model = models[0] if body.get("model") in (None, "") else body["model"]
    api_models(models, p.model)  # raises Refused
    return p


def api_models(names, name=None):
    """The answer to GET /v1/models, or to GET /v1/models/{name}. Raises Refused for a name that is
    not one of `names`."""
    if name is not None and name not in names:
        raise Refused(404, f"model must be one of: {', '.join(names)}", "model_not_found", "model")
    data = [dict(id=x, object="model", created=0, owned_by="fable") for x in names]
    return {"object": "list", "data": data} if name is None else data[list(names).index(name)]


def api_error(e):
    """The answer to a request that is refused, in OpenAI's format."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(e.status)
    kind = kind or ("server_error" if e.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(e), "type": kind, "param": e.param, "code": e.code}}


def api_token(text, logprob, top=None):
    """A token in the log-probabilities of a chat."""
    made = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
    return made if top is None else {**made, "top_logprobs": [api_token(*x) for x in top]}


def api_usage(p, items):
    """The usage of a request; `items` has the tokens of each response."""
    prompt, n = sum(map(len, p.prompts)), sum(map(len, items))
    return {"prompt_tokens": prompt, "completion_tokens": n, "total_tokens": prompt + n}


def api_choice(p, tokenizer, i, text, items, reason, offset=0, first=True):
    """An element of `choices`: new text of response i and its tokens, (text, id, log-probability,
    [(id, log-probability) of alternatives]). `offset` is the number of characters of the tokens
    that a stream sent earlier, `first` says whether the element is the first of its response."""
    content, logprobs = {"text": text}, None
    if p.chat:
        role = {"role": "assistant"} if first else {}
        content = {"delta" if p.stream else "message": {**role, "content": text}}
    if p.logprobs >= 0:
        words, _, chosen, likely = zip(*items)
        likely = [[(tokenizer.token_text(t), q) for t, q in top] for top in likely]
        logprobs = {"content": list(map(api_token, words, chosen, likely))}
        if not p.chat:
            offsets = list(itertools.accumulate(map(len, words), initial=offset))[:-1]
            logprobs = {"tokens": words, "token_logprobs": chosen, "text_offset": offsets}
            logprobs["top_logprobs"] = list(map(dict, likely))
    ids = {"token_ids": [x[1] for x in items]} if p.return_token_ids else {}
    if ids and first:
        ids["prompt_token_ids"] = p.rows[i].prompt
    return {"index": i, **content, "logprobs": logprobs, "finish_reason": reason, **ids}


def api_head(p):
    """What all parts of an answer have in common."""
    kind = "chat.completion" + ".chunk" * p.stream if p.chat else "text_completion"
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
    return {**head, "model": p.model}


async def api_stream(p, tokenizer, pieces):
    """A streamed answer: server-sent events, from an asynchronous generator of the arguments of
    api_choice, (i, text, items, reason)."""
    head, offsets, items = api_head(p), [0] * len(p.rows), [[] for _ in p.rows]
    try:
        async for i, text, new, reason in pieces:
            choice = api_choice(p, tokenizer, i, text, new, reason, offsets[i], not items[i])
            offsets[i] += sum(len(word) for word, *_ in new)  # not len(text): stops hold text back
            items[i] += new
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        if p.usage:
            last = {**head, "choices": [], "usage": api_usage(p, items)}
            yield f"data: {json.dumps(last)}\n\n"
        yield "data: [DONE]\n\n"
    except Refused as e:
        yield f"data: {json.dumps(api_error(e))}\n\n"
    finally:
        await pieces.aclose()
