"""
Exports checkpoints to other formats, and imports models from other formats.

    python export.py model.bin --checkpoint=out/ckpt.pt                # int8 for run.c, the default
    python export.py model.bin --checkpoint=out/ckpt.pt --format=fp32  # fp32 for run.c
    python export.py model.bin --checkpoint=out/ckpt.pt --version=2    # llama2.c's runq; 0, 1: fp32
    python export.py folder --checkpoint=out/ckpt.pt --format=hf       # Hugging Face transformers
    python export.py model.gguf --checkpoint=out/ckpt.pt --format=gguf # llama.cpp
    python export.py folder --checkpoint=out/sft_ckpt.pt --format=peft # LoRA adapters
    python export.py model.bin --checkpoint=out/ckpt.pt --merge_lora=out/sft_lora.pt  # or all.pt

    python export.py ckpt.pt --hf=Llama-3.2-1B          # a folder with config.json and safetensors
    python export.py ckpt.pt --meta=llama-2-7b          # a folder with params.json and *.pth
    python export.py ckpt.pt --gguf=SmolLM2.Q8_0.gguf   # llama.cpp's format, any number type
    python export.py ckpt.pt --llama2c=stories260K.bin --tokenizer=tok512.model

An imported model of Hugging Face or Meta keeps the number types of its file, so that bf16 weights
stay half the size of fp32. Nothing is lost, because every program that reads a checkpoint computes
in fp32. --dtype converts. The tokenizer and the chat template are imported with the model. A
setting that the model here does not support is an error that names the setting.

Version 3 is the format of run.c, whose comment on the model file describes it byte by byte. Every
tensor has the order and shape in which run.c uses it and is aligned to 64 bytes, so that the file
can be mapped into memory and used without a copy. Rows are zero-padded to tiles of 16 and columns
to whole groups; the padding is exact, because a zero weight adds nothing. (llama2.c's exporter lets
a group cross the end of a row if the hidden size is not a multiple of the group, and its reader
then silently drops weights.)
"""

import argparse
import contextlib
import os
import struct
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import common  # noqa: F401  first: it reports missing packages

# isort: split
import numpy as np
import torch

from checkpoint import (
    check_generates,
    checkpoint_args,
    link,
    load_checkpoint,
    model_from_checkpoint,
    recorded_start,
    replaced_names,
    save_checkpoint,
    verify_archive,
    weights_id,
)
from common import parse_args, read_json, run_main, write_atomic
from formats import (
    begins_with_bos,
    export_peft,
    floats,
    json_to_sentencepiece,
    model_shapes,
    open_tensors,
    ranks_to_json,
    read_gguf,
    read_hf,
    read_meta,
    sentencepiece_names,
    sentencepiece_pieces,
    special_ids,
    template_from_jinja,
    token_text,
    write_bytes,
    write_gguf,
    write_hf,
    write_json,
)
from instruct import Template
from model import LLAMA3_SCALING, ModelArgs, Transformer
from sft import load_adapters, merged_state
from tokenizer import (
    Tokenizer,
    byte_level_blob,
    check_plain_bpe,
    check_same_tokenizer,
    copy_tokenizer,
    disagree,
    note_ordinary,
    own_tokenizer,
)

MAGIC = 0x616B3432  # "ak42"
TILE = 16  # rows that version 3 interleaves
FORMATS = {"fp32": 0, "q8_0": 1}

# -----------------------------------------------------------------------------
# Sizes and tensors of a model


def header_ints(args):
    """The seven int32 that the headers of all versions share, as bytes."""
    return struct.pack(
        "<7i",
        args.dim,
        args.ffn_dim,
        args.n_layers,
        args.n_heads,
        args.n_kv_heads,
        args.vocab_size,
        args.max_seq_len,
    )


def per_layer(weights, args, name):
    """The tensor `name` of every layer, in order: per_layer(weights, args, "attention.wq")."""
    return [weights[f"layers.{i}.{name}.weight"] for i in range(args.n_layers)]


MATRICES = [
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
]

# -----------------------------------------------------------------------------
# Version 3: the file that run.c maps into memory

SEARCH = np.linspace(0.94, 1.02, 41, dtype=np.float32)  # scales to try, around max / 127
SEARCH_LIMIT = 1 << 20  # weights per matrix; for larger ones the search would take minutes


def quantize(w, group, dtype):
    """Symmetric int8 quantization by groups of `group` columns: w (rows, cols) is approximated by
    q * scale, with q (rows, cols) int8 in [-127, 127] and scale (rows, cols / group) of `dtype`.
    cols must be a multiple of group. Several scales near max|w| / 127 are tried, and the one with
    the least squared error is used; that error is about 10 % smaller than with max|w| / 127.
    """
    q, scale = np.empty(w.shape, np.int8), np.empty((w.shape[0], w.shape[1] // group), dtype)
    factors = SEARCH if w.size <= SEARCH_LIMIT else np.ones(1, np.float32)
    rows = max(1, 65536 // w.shape[1])  # rows per step, few enough to stay in the cache
    for i in range(0, len(w), rows):
        g = w[i : i + rows].reshape(-1, group)
        top, least = np.abs(g).max(1, keepdims=True) / np.float32(127), None
        for factor in factors:
            s = (top * factor).astype(dtype).astype(np.float32)
            n = np.clip(np.rint(g * np.divide(1, s, out=np.zeros_like(s), where=s > 0)), -127, 127)
            error = np.square(n * s - g).sum(1, keepdims=True)
            if least is None:
                least, best_n, best_s = error, n, s
            better = error < least
            best_n, best_s = np.where(better, n, best_n), np.where(better, s, best_s)
            least = np.minimum(error, least)
        q[i : i + rows] = best_n.reshape(-1, w.shape[1])
        scale[i : i + rows] = best_s.reshape(-1, scale.shape[1])
    return q, scale


PROBES = 8, 16  # sequences and random tokens of each, which show how large the inputs are
POWERS = [(a, b) for a in (0, 0.25, 0.5) for b in (0, 0.5, 1)]  # of the column scales to try


def plain_layers(args, weights):
    """Yields {"wq": array, ..., "attention_norm": array} of each layer, in fp32."""
    for i in range(args.n_layers):
        names = (*MATRICES, "attention_norm", "ffn_norm")
        yield {n.split(".")[-1]: floats(weights[f"layers.{i}.{n}.weight"]) for n in names}


@np.errstate(over="ignore", invalid="ignore")  # of a model that is not finite
def column_scales(w, squares, group, heads=None):
    """Scales c (cols,) for the columns of w (rows, cols), whose int8 form in groups then has the
    least error in the output: scales of the form x^a / s^b, where x is the input's root mean
    square, from `squares` (cols,), and s that of a column. An input that is divided by c takes
    1 / c^2 of the rounding error of its column, and a group's error grows with the largest
    c |w|. With `heads`, (K, H / K, E), the H / K heads that share a kv head have the same scales.
    Ones if nothing is better, or if a number is not finite."""
    w = np.abs(w[:: max(1, len(w) // 512)])  # a sample of the rows
    s, squares = np.sqrt(np.square(w).mean(0)) + 1e-8, squares + np.float32(1e-12)
    best, scales = np.inf, np.ones(w.shape[1], np.float32)
    for a, b in POWERS:
        log = a / 2 * np.log(squares) - b * np.log(s)
        if heads:
            log = np.broadcast_to(log.reshape(heads).mean(1, keepdims=True), heads).reshape(-1)
        c = np.exp(np.clip(log - log.mean(), -4, 4)).astype(np.float32)
        wide, rest = pad(w * c, 1, group), pad((squares / np.square(c))[None], 1, group)
        largest = wide.reshape(len(w), -1, group).max(2)
        error = (np.square(largest).sum(0) * rest.reshape(-1, group).sum(1)).sum()
        if error < best and np.isfinite(c).all():
            best, scales = error, c
    return scales


@torch.no_grad()
def balanced_layers(args, weights, group):
    """
    plain_layers of a model that computes the same and loses less by int8. Columns of a matrix are
    multiplied by column_scales, and the norm or the rows that produce its input are divided by
    them (activation-aware scaling: Lin et al., 2023; cross-layer equalization: Nagel et al., 2019).
    The sizes of the inputs come from random tokens, so that no data is needed: what matters most
    are the few activations that are very large in every text, above all at its first token.
    """
    rows, length = PROBES[0], min(PROBES[1], args.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(args.vocab_size, (rows, length), generator=generator)
    one = Transformer(replace(args, n_layers=1, vocab_size=1, max_seq_len=length, dropout=0.0))
    block, layout, seen = one.layers[0], one.layout(tokens, None, None), {}
    long = {n.split(".")[-1]: n for n in (*MATRICES, "attention_norm", "ffn_norm")}
    for name in ("wq", "wo", "w1", "w2"):
        block.get_submodule(long[name]).register_forward_pre_hook(
            lambda _, x, name=name: seen.update({name: x[0].square().mean(0).numpy()})
        )
    x = torch.from_numpy(floats(weights["tok_embeddings.weight"][tokens.flatten()]))
    heads = args.n_kv_heads, args.n_heads // args.n_kv_heads, args.head_dim
    for w in plain_layers(args, weights):
        state = {f"{long[name]}.weight": torch.from_numpy(array) for name, array in w.items()}
        block.load_state_dict(state, assign=True)
        x = block(x, layout)
        qkv, gates = (
            np.concatenate([w[n] for n in n3]) for n3 in (("wq", "wk", "wv"), ("w1", "w3"))
        )
        c, c_ffn = column_scales(qkv, seen["wq"], group), column_scales(gates, seen["w1"], group)
        c_out = column_scales(w["wo"], seen["wo"], group, heads)
        c_down = column_scales(w["w2"], seen["w2"], group)
        c_v = c_out.reshape(heads)[:, 0].reshape(-1, 1)  # (K * E, 1), of the rows of wv
        yield {
            "attention_norm": w["attention_norm"] / c,
            "wq": w["wq"] * c,
            "wk": w["wk"] * c,
            "wv": w["wv"] * c / c_v,
            "wo": w["wo"] * c_out,
            "ffn_norm": w["ffn_norm"] / c_ffn,
            "w1": w["w1"] * c_ffn,
            "w3": w["w3"] * c_ffn / c_down[:, None],
            "w2": w["w2"] * c_down,
        }


def pad(w, rows, cols):
    """w zero-padded, so that its sizes are multiples of rows and cols."""
    return np.pad(w, ((0, -w.shape[0] % rows), (0, -w.shape[1] % cols)))


def tiles(w, width):
    """(rows, cols) -> (rows / 16, cols / width, 16, width): 16 rows side by side."""
    return w.reshape(w.shape[0] // TILE, TILE, -1, width).transpose(0, 2, 1, 3)


def matrix_blobs(w, fmt, group):
    """The bytes of a matrix (rows, cols) in version 3: [weights], or [weights, scales] for int8."""
    if fmt == "fp32":
        return [tiles(pad(w, TILE, 1), 1).tobytes()]
    q, scale = quantize(pad(w, TILE, group), group, "<f2")
    q = (q.astype(np.int16) + 128).astype(np.uint8)  # run.c multiplies unsigned by signed bytes
    return [tiles(q, 4).tobytes(), tiles(scale, 1).tobytes()]


def best_group(args):
    """
    The group size, 64 or 32, that gives the smaller file: a scale costs 2 bytes per group, a
    dimension that is not a multiple of the group costs padding. It is 16 for models that fit into
    the L2 cache, where bytes cost little time and small models need the precision.
    """
    if args.dim < 128:
        return 16

    def row(cols, group):
        return -(-cols // group) * (group + 2)

    def size(group):
        E, H, K, D, F = args.head_dim, args.n_heads, args.n_kv_heads, args.dim, args.ffn_dim
        rows = (H + 2 * K) * E + 2 * F
        per_layer = rows * row(D, group) + D * row(H * E, group) + D * row(F, group)
        return args.n_layers * per_layer + args.vocab_size * row(D, group)

    return min((64, 32), key=size)


def interleave(w1, w3):
    """Alternating tiles of 16 rows of w1 and of w3, the order in which run.c computes SwiGLU."""
    w1, w3 = (pad(w, TILE, 1).reshape(-1, TILE, w.shape[1]) for w in (w1, w3))
    return np.stack([w1, w3], 1).reshape(-1, w1.shape[-1])


def tensors_v3(args, weights, group=None):
    """
    Yields the tensors in file order, as numpy arrays: norms (D,), matrices (rows, cols). For int8
    in groups of `group`, layers are balanced.
    """
    yield floats(weights["tok_embeddings.weight"])
    layers = balanced_layers(args, weights, group) if group else plain_layers(args, weights)
    for w in layers:
        yield w["attention_norm"]
        yield np.concatenate([w["wq"], w["wk"], w["wv"]])
        yield w["wo"]
        yield w["ffn_norm"]
        yield interleave(w["w1"], w["w3"])
        yield w["w2"]
    yield floats(weights["norm.weight"])
    if not args.tied:
        yield floats(weights["output.weight"])


def tokenizer_blob(tokenizer):
    """The tokenizer as bytes: in llama2.c's format, or for byte-level BPE in byte_level_blob's.
    Raises ValueError if run.c does not support it."""
    if tokenizer.bpe:
        return byte_level_blob(tokenizer)
    check_plain_bpe(tokenizer, "run.c", prefix=True)
    return tokenizer.for_llama2c()


def template_blob(template):
    """The template {"turn", "system", "next"} as bytes: for each, its length (uint32) and UTF-8."""
    texts = [(template.get(name) or "").encode() for name in ("turn", "system", "next")]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def rope_numbers(scaling):
    """RoPE scaling in the header, three floats and an int32; zeros mean none, or linear scaling."""
    s = scaling or {}
    numbers = [s.get(name, 0) for name in LLAMA3_SCALING]
    return struct.pack("<3fi", *numbers[:3], int(numbers[3]))


def hash_bytes(tokenizer, tokenizer_hash=""):
    """The 32 bytes at the end of a header: the hash of the model's tokenizer, zeros if unknown."""
    return bytes.fromhex(tokenizer.hash if tokenizer else tokenizer_hash).rjust(32, b"\0")


def write_v3(
    f, args, weights, fmt, tokenizer, template=None, end_ids=(), bos=True, tokenizer_hash=""
):
    """
    Writes a model in version 3 to an open file: header, tensors, tokenizer, template. `fmt` is one
    of FORMATS. Raises ValueError if more than four ids besides EOS end a text.
    """
    group = best_group(args)
    f.write(bytes(256))
    # Small models have groups of 16, which need no balance, and no such large activations.
    balance = group if fmt == "q8_0" and group > 16 else None
    for w in tensors_v3(args, weights, balance):
        for blob in [w.tobytes()] if w.ndim == 1 else matrix_blobs(w, fmt, group):
            f.write(bytes(-f.tell() % 64))
            f.write(blob)
    offset = f.tell()
    blob, squeeze, kind = b"", 0, 0
    if tokenizer:
        blob, kind = tokenizer_blob(tokenizer), int(tokenizer.sp is None)
        spaced, plain = (tokenizer.encode(s, False, False) for s in (" a  b ", "a b"))
        squeeze = int(spaced == plain)
    no_bos = not begins_with_bos(tokenizer, bos)
    bos, eos, ends = special_ids(tokenizer, end_ids)
    end_zero, ends = 0 in ends, [i for i in ends if 0 < i < args.vocab_size]
    if len(ends) > 4:
        raise ValueError(f"a model file holds at most 4 end ids besides EOS ({eos}), not {ends}")
    ends += [0] * 4
    bos, eos = (min(i, args.vocab_size - 1) for i in (bos, eos))
    chat = template_blob(template) if template else b""
    f.write(blob + chat)
    f.seek(0)
    f.write(struct.pack("<Ii", MAGIC, 3) + header_ints(args))
    f.write(
        struct.pack(
            "<5i2f3Q2I2Q",
            FORMATS[fmt],
            group,
            int(args.tied),
            bos,
            eos,
            args.rope_theta,
            args.norm_eps,
            offset,
            len(blob),
            offset + len(blob) + len(chat),
            squeeze,
            kind,
            offset + len(blob) if chat else 0,
            len(chat),
        )
    )
    f.write(rope_numbers(args.rope_scaling) + struct.pack("<4i", *ends[:4]))
    own_size = args.head_dim if args.head_dim * args.n_heads != args.dim else 0
    f.write(struct.pack("<4i", own_size, 0, no_bos, end_zero))
    f.seek(256 - 32)
    f.write(hash_bytes(tokenizer, tokenizer_hash))


# -----------------------------------------------------------------------------
# llama2.c's versions


def write_v0(f, args, weights):
    """fp32, without a magic number; a negative vocabulary size means an untied classifier."""
    head = bytearray(header_ints(args))
    if not args.tied:
        struct.pack_into("<i", head, 20, -args.vocab_size)
    f.write(head)
    order = [
        [weights["tok_embeddings.weight"]],
        per_layer(weights, args, "attention_norm"),
        *(per_layer(weights, args, m) for m in MATRICES[:4]),
        per_layer(weights, args, "ffn_norm"),
        *(per_layer(weights, args, m) for m in MATRICES[4:]),
        [weights["norm.weight"]],
    ]
    for tensor in sum(order, []):
        f.write(floats(tensor).tobytes())
    f.write(bytes(4 * args.max_seq_len * args.head_dim))  # RoPE tables, which no reader uses
    if not args.tied:
        f.write(floats(weights["output.weight"]).tobytes())


def norms(args, weights):
    """The norms in the order of versions 1 and 2."""
    return [
        *per_layer(weights, args, "attention_norm"),
        *per_layer(weights, args, "ffn_norm"),
        weights["norm.weight"],
    ]


def matrices(args, weights):
    """The matrices in the order of versions 1 and 2."""
    return [
        weights["tok_embeddings.weight"],
        *sum((per_layer(weights, args, name) for name in MATRICES), []),
        *([] if args.tied else [weights["output.weight"]]),
    ]


def write_v1(f, args, weights, tokenizer_hash=""):
    """A header of 256 bytes, then fp32 weights."""
    f.write(
        (struct.pack("<Ii", MAGIC, 1) + header_ints(args) + struct.pack("<B", args.tied)).ljust(
            224, b"\0"
        )
        + hash_bytes(None, tokenizer_hash)
    )
    for tensor in norms(args, weights) + matrices(args, weights):
        f.write(floats(tensor).tobytes())


def write_v2(f, args, weights, tokenizer_hash=""):
    """
    int8 weights with fp32 scales. The group size is the largest power of two up to 64 that divides
    every row.
    """
    group = 64
    while args.dim % group or args.ffn_dim % group:
        group //= 2
    f.write(
        (
            struct.pack("<Ii", MAGIC, 2) + header_ints(args) + struct.pack("<Bi", args.tied, group)
        ).ljust(224, b"\0")
        + hash_bytes(None, tokenizer_hash)
    )
    for tensor in norms(args, weights):
        f.write(floats(tensor).tobytes())
    for tensor in matrices(args, weights):
        q, scale = quantize(floats(tensor), group, "<f4")
        f.write(q.tobytes() + scale.tobytes())


def read_v0(path):
    """Reads a version-0 file: (ModelArgs, state dict). Raises ValueError if the file is of another
    kind or its length does not match its header.
    """
    with open(path, "rb") as f:
        head, size = f.read(28), os.fstat(f.fileno()).st_size
    if size < 28 or struct.unpack_from("<I", head)[0] == MAGIC:
        raise ValueError(f"{path} is not a llama2.c file of version 0 (fp32)")
    dim, ffn, n_layers, n_heads, n_kv_heads, vocab, seq_len = struct.unpack("<7i", head)
    if min(dim, ffn, n_layers, n_heads, n_kv_heads, abs(vocab), seq_len) < 1 or dim % n_heads:
        raise ValueError(f"{path} is not a llama2.c file of version 0 (fp32)")
    L, V, E, kv = n_layers, abs(vocab), dim // n_heads, dim // n_heads * n_kv_heads
    shapes = {
        "tok_embeddings": (V, dim),
        "attention_norm": (L, dim),
        "attention.wq": (L, dim, dim),
        "attention.wk": (L, kv, dim),
        "attention.wv": (L, kv, dim),
        "attention.wo": (L, dim, dim),
        "ffn_norm": (L, dim),
        "feed_forward.w1": (L, ffn, dim),
        "feed_forward.w2": (L, dim, ffn),
        "feed_forward.w3": (L, ffn, dim),
        "norm": (dim,),
        "rope": (seq_len, E),
    }
    if vocab < 0:
        shapes["output"] = (V, dim)
    want = 28 + 4 * sum(int(np.prod(s, dtype=object)) for s in shapes.values())
    if size != want:
        raise ValueError(f"{path} is {size} bytes long, its header says {want}")
    weights = {}
    with open(path, "rb") as f:
        f.seek(28)

        def read(*shape):
            return torch.from_numpy(np.fromfile(f, "<f4", int(np.prod(shape))).reshape(shape))

        for name, shape in shapes.items():
            if name in ("tok_embeddings", "norm", "output"):
                weights[f"{name}.weight"] = read(*shape)
            elif name == "rope":
                f.seek(4 * seq_len * E, os.SEEK_CUR)
            else:  # layer by layer, so that the model is in memory only once
                weights |= {f"layers.{i}.{name}.weight": read(*shape[1:]) for i in range(L)}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    # Llama's rule derives the hidden size from multiple_of. If no multiple_of gives this hidden
    # size, hidden_dim states it.
    args = dict(
        dim=dim,
        n_layers=L,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=V,
        max_seq_len=seq_len,
        tied=vocab > 0,
    )
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if ModelArgs(**args, multiple_of=multiple).ffn_dim == ffn:
            return ModelArgs(**args, multiple_of=multiple), weights
    return ModelArgs(**args, hidden_dim=ffn), weights


# -----------------------------------------------------------------------------
# The commands


def open_model(path):
    """
    Opens a checkpoint: (ModelArgs, {name: tensor}, the checkpoint). Tensors are read from the file
    when they are used. Raises ValueError if names or shapes do not fit.
    """
    checkpoint = load_checkpoint(path, mmap=True)
    check_generates(checkpoint, path)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that meta tensors are not filled
        config = model_from_checkpoint(checkpoint).args
    weights = checkpoint["model"]
    if config.tied:
        one = weights.get("tok_embeddings.weight", weights.get("output.weight"))
        weights |= {"tok_embeddings.weight": one, "output.weight": one}
    return config, weights, checkpoint


def open_merged(path, adapters):
    """
    Like open_model, with adapters merged into the weights and their chat template. A line on stderr
    says so if they were trained on other weights. Raises ValueError if the checkpoint has adapters
    merged already.
    """
    checkpoint, lora = load_checkpoint(path), open_tensors(adapters)
    verify_archive(adapters)
    check_generates(checkpoint, path)
    if "lora" in checkpoint or "unmerged" in checkpoint:
        base = recorded_start(checkpoint) or os.path.join(os.path.dirname(path), "ckpt.pt")
        raise ValueError(
            f"{path} has adapters merged already: give the model that they were trained on"
            f"{f', {base}' * os.path.isfile(base)}, or leave out --merge_lora"
        )
    if not isinstance(lora.get("lora"), dict):
        raise ValueError(f"{adapters} has no adapters of train.py --sft: give its sft_lora.pt")
    model = load_adapters(model_from_checkpoint(checkpoint), lora["lora"])
    check_same_tokenizer(
        path, checkpoint.get("tokenizer_hash"), adapters, lora.get("tokenizer_hash")
    )
    if lora.get("started_id") not in (None, weights_id(checkpoint)):
        start = lora.get("started_from")
        common.note(f"{adapters} was trained on other weights ({start}) than {path} has now")
    checkpoint.setdefault("tokenizer_hash", lora.get("tokenizer_hash") or "")
    checkpoint = {
        k: checkpoint[k]
        for k in ("model_args", "config", "end_ids", "bos", "tokenizer_hash")
        if k in checkpoint
    }
    checkpoint |= {
        "model": merged_state(model),
        "optimizer": None,
        "iter_num": 0,
        "best_val_loss": 1e9,
        "template": lora.get("template"),
    }
    return model.args, checkpoint["model"], checkpoint


def folder_of(path):
    return os.path.dirname(os.path.abspath(path))


def write_checkpoint(path, checkpoint):
    """save_checkpoint, which keeps a file that was there under another name, with a line that says
    so: it may be a trained model."""
    replaced = replaced_names([Path(path)])[0] if os.path.isfile(path) else None
    if replaced:
        link(path, replaced)
    save_checkpoint(path, checkpoint)
    if replaced:
        print(f"{path} was there before and is now {replaced}")


def export_model(args):
    """Writes a checkpoint in the format that --format and --version name."""
    config, weights, checkpoint = (
        open_merged(args.checkpoint, args.merge_lora)
        if args.merge_lora
        else open_model(args.checkpoint)
    )
    tokenizer = None
    if args.version == 3 or args.tokenizer:
        tokenizer = own_tokenizer(
            checkpoint, args.checkpoint, args.tokenizer, folder_of(args.output), required=False
        )
    tokenizer_hash = tokenizer.hash if tokenizer else checkpoint.get("tokenizer_hash") or ""
    if args.merge_lora and args.output.endswith(".pt"):
        if tokenizer:
            copy_tokenizer(tokenizer, folder_of(args.output))
        write_checkpoint(args.output, checkpoint | {"tokenizer_hash": tokenizer_hash})
        return print(f"wrote {args.output}: {args.checkpoint} with the adapters {args.merge_lora}")
    how = {
        "template": checkpoint.get("template"),
        "end_ids": checkpoint.get("end_ids") or [],
        "bos": checkpoint.get("bos", True),
        "tokenizer_hash": tokenizer_hash,
    }
    fmt = args.format or ("q8_0" if args.version == 3 else {2: "int8"}.get(args.version, "fp32"))
    kind, size = fmt, args.output
    if fmt == "hf":
        kind = write_hf(args.output, config, weights, args.dtype, tokenizer, **how)
        size = os.path.join(args.output, "model.safetensors")
    elif fmt == "gguf":
        kind = args.dtype or "q8_0"
        with write_atomic(args.output) as f:  # the gguf library opens the file by name
            write_gguf(f.name, config, weights, kind, tokenizer, **how)
    elif args.version == 3:
        with write_atomic(args.output) as f:
            write_v3(f, config, weights, fmt, tokenizer, **how)
    else:
        if (config.rope_theta, config.norm_eps, config.rope_scaling) != (10000, 1e-5, None):
            raise ValueError(
                "llama2.c computes with rope_theta 10000, norm_eps 1e-5 and no RoPE "
                f"scaling; {args.checkpoint} has others: use version 3"
            )
        if config.head_dim * config.n_heads != config.dim:
            raise ValueError(
                f"llama2.c's heads have dim / n_heads numbers; those of {args.checkpoint} have "
                f"{config.head_dim}: use version 3"
            )
        with write_atomic(args.output) as f:
            if args.version == 0:  # its header has no room for the hash
                write_v0(f, config, weights)
            else:
                {1: write_v1, 2: write_v2}[args.version](f, config, weights, tokenizer_hash)
    name = f"version {args.version}" if fmt not in ("hf", "gguf") else fmt
    n = sum(int(np.prod(shape)) for shape in model_shapes(config).values())
    note = f", tokenizer {tokenizer.model_path}" if tokenizer and args.version == 3 else ""
    if args.version == 3 and not tokenizer:
        note = ", no tokenizer found: give --tokenizer" + ", or ./run needs -z" * (fmt in FORMATS)
    print(
        f"wrote {args.output}: {name}, {kind}, {n:,} parameters,\n"
        f"    {os.path.getsize(size):,} bytes (fp32: {4 * n:,}){note}"
    )


def is_padding(n, rows, named=False):
    """
    Whether an embedding of `rows` rows can be that of n tokens, padded to a multiple of a power of
    two, up to 256. With another model's tokenizer, the difference is rarely so small. If the user
    has `named` the tokenizer, a power of two counts as a size and not as padding.
    """
    step = rows & -rows
    padded = rows % 8 == 0 and n < rows < min(n + 4 * min(step, 256), 2 * n)
    return n == rows or padded and not (named and step == rows)


def imported_tokenizer(args, folder, rows, scratch):
    """
    The tokenizer of an imported model whose embedding has `rows` rows: that of --tokenizer, or the
    one in the model's folder; None if there is none. It may have fewer tokens, if the embedding is
    padded, which llama2.c's never are. A tokenizer.json that was converted from a SentencePiece
    model is converted back, in the folder `scratch`. Raises ValueError if the sizes do not fit or
    two tokenizers disagree.
    """
    names = [args.tokenizer] if args.tokenizer else ["tokenizer.model", "tokenizer.json"]
    paths = [os.path.join(folder, name) for name in names]
    if (
        len(paths) == 2
        and all(map(os.path.isfile, paths))
        and not meta_ranks(paths[0])
        and disagree(*paths)
    ):
        raise ValueError(f"{paths[0]} and {paths[1]} disagree: name one of them with --tokenizer")
    sizes, settings = [], read_json(os.path.join(folder, "tokenizer_config.json"))
    for path in (os.path.join(folder, name) for name in names) if not args.tokenizer else names:
        if not os.path.isfile(path) and not args.tokenizer:
            continue
        try:
            tokenizer = Tokenizer(path)
        except ValueError:
            if path.endswith(".model") and not args.tokenizer:
                continue  # Llama 3's tokenizer.model is not a SentencePiece model
            raise
        data = None
        if tokenizer.bpe and tokenizer.n_words <= rows:
            data = json_to_sentencepiece(tokenizer)
        elif tokenizer.sp and not args.tokenizer:
            data = add_pieces(tokenizer, folder, rows, settings)
        if data:
            tokenizer = Tokenizer(write_bytes(os.path.join(scratch, "tokenizer.model"), data))
        exact = tokenizer.n_words == rows
        if exact or not args.llama2c and is_padding(tokenizer.n_words, rows, args.tokenizer):
            return tokenizer
        sizes.append(f"{path} has {tokenizer.n_words} tokens")
    if sizes:
        raise ValueError(f"{sizes[-1]}, the model has {rows}: name its tokenizer with --tokenizer")
    return None


def add_pieces(tokenizer, folder, rows, settings):
    """
    A SentencePiece model, as bytes, extended by the control tokens, BOS and EOS that the JSON files
    beside it define. Tokens for which the embedding has no row are left out. None if there is
    nothing to add. Raises ValueError if the ids of the added tokens are not consecutive.
    """
    n = tokenizer.n_words
    decoder = settings.get("added_tokens_decoder")
    added = {
        int(i): token_text({"": t}, "")
        for i, t in (decoder.items() if isinstance(decoder, dict) else ())
        if i.isdecimal()
    }
    texts = read_json(os.path.join(folder, "added_tokens.json"))
    added |= {i: text for text, i in texts.items() if isinstance(i, int)}
    tokens = read_json(os.path.join(folder, "tokenizer.json")).get("added_tokens") or []
    if isinstance(tokens, list):
        added |= {t.get("id"): t.get("content") for t in tokens if isinstance(t, dict)}
    new = {i: text for i, text in added.items() if isinstance(i, int) and n <= i < rows}
    if sorted(new) != list(range(n, n + len(new))) or not all(
        isinstance(text, str) and text for text in new.values()
    ):
        raise ValueError(
            f"{folder}: the ids of the added tokens are not those after the "
            f"{n} of {tokenizer.model_path}: {sorted(new)[:5]}"
        )
    names, known = {}, {text: i for i, text in new.items()} | tokenizer.special
    for key, i in ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id):
        text = token_text(settings, f"{key}_token")
        if text in known and known[text] != i:
            names[key] = text
    if not new and not names:
        return None
    with open(tokenizer.model_path, "rb") as f:
        data = f.read()
    return (
        data
        + sentencepiece_pieces((new[i], 0, 3) for i in sorted(new))
        + sentencepiece_names(**names)
    )


def ordinary_tokens(tokenizer, folder, settings):
    """Texts of the control tokens of `tokenizer` that the JSON files in the folder of its model
    call added tokens, but not special ones."""
    tokens = read_json(os.path.join(folder, "tokenizer.json")).get("added_tokens")
    tokens = tokens if isinstance(tokens, list) else []
    decoder = settings.get("added_tokens_decoder")
    tokens = tokens + (list(decoder.values()) if isinstance(decoder, dict) else [])
    tokens = [t for t in tokens if isinstance(t, dict) and t.get("special") is False]
    named = {token_text(settings, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    texts = dict.fromkeys(token_text({"": t}, "") for t in tokens)
    return [text for text in texts if text in tokenizer.special and text not in named]


def trim_vocabulary(config, weights, n):
    """The model (ModelArgs; weights in place) without the embedding rows after its n tokens."""
    for name in "tok_embeddings.weight", "output.weight":
        if len(weights[name]) > n:
            rows = weights[name][:n].clone()
            weights |= (
                dict.fromkeys(("tok_embeddings.weight", "output.weight"), rows)
                if config.tied
                else {name: rows}
            )
    return replace(config, vocab_size=n)


def text_begins_with_bos(folder, settings):
    """
    Whether plain text begins with BOS in a Hugging Face model: as the post-processor of its
    tokenizer.json says, which is what transformers uses, else add_bos_token, else True.
    """
    path = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(path):
        with contextlib.suppress(ValueError):  # unreadable, but there may be a tokenizer.model
            return Tokenizer(path).adds_bos
    return settings.get("add_bos_token") is not False


def meta_ranks(path):
    """The path, if it is a tokenizer.model in the format of Llama 3 and not SentencePiece's."""
    if path.endswith(".json") or not os.path.isfile(path):
        return None
    try:
        Tokenizer(path)
    except ValueError:
        return path


def check_suffix(args):
    """Raises ValueError if the suffix of the output file belongs to another format."""
    imports = not args.checkpoint
    fits = {
        ".gguf": args.format == "gguf",
        ".pt": imports or args.merge_lora and not args.format and args.version == 3,
        ".safetensors": False,
        ".onnx": False,
        ".bin": not imports and args.format not in ("gguf", "hf", "peft"),
    }
    if not fits.get(os.path.splitext(args.output)[1], True):
        kinds = {"gguf": "GGUF (.gguf)", "hf": "a folder", "peft": "a folder"}
        written = "a checkpoint (.pt)" if imports else kinds.get(args.format, "a model.bin")
        raise ValueError(f"{args.output}: this command writes {written}: choose another name")


def import_model(args, scratch):
    """Imports a model in one of the other formats; `scratch` is a folder for temporary files."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    folder = None
    if args.llama2c:
        config, weights = read_v0(args.llama2c)
        check_suffix(args)
    elif args.gguf:
        folder = os.path.join(scratch, "gguf")
        config, weights = read_gguf(args.gguf, folder, dtype, args.max_seq_len)
    else:
        read = read_hf if args.hf else read_meta
        config, weights, folder = read(args.hf or args.meta, dtype, args.max_seq_len)
    checkpoint = {}
    tokenizer, settings, note, rows = None, {}, "", config.vocab_size
    ranks = args.meta and meta_ranks(args.tokenizer or os.path.join(folder, "tokenizer.model"))
    if ranks:
        args.tokenizer = os.path.join(scratch, "tokenizer.json")
        version_31 = config.rope_scaling is not None
        write_json(args.tokenizer, ranks_to_json(ranks, config.vocab_size, version_31))
    if folder or args.tokenizer:
        tokenizer = imported_tokenizer(args, folder or ".", rows, scratch)
    if tokenizer and tokenizer.n_words < rows:
        config = trim_vocabulary(config, weights, tokenizer.n_words)
        note = f", without the {rows - config.vocab_size} rows that its tokenizer does not use"
    if folder:
        settings = read_json(os.path.join(folder, "tokenizer_config.json"))
        if tokenizer:
            note_ordinary(ordinary_tokens(tokenizer, folder, settings))
        note += chat_settings(checkpoint, folder, settings, tokenizer, config.vocab_size)
        if args.hf:
            checkpoint["bos"] = text_begins_with_bos(folder, settings)
        elif "add_bos_token" in settings and args.gguf:
            checkpoint["bos"] = settings["add_bos_token"]
    if ranks:  # Meta's programs end a text at these tokens as well
        ends = ("<|eot_id|>", "<|eom_id|>")
        checkpoint["end_ids"] = [tokenizer.special[t] for t in ends if t in tokenizer.special]
    source = "llama2" if config.vocab_size == 32000 else "custom"
    checkpoint |= {
        "model": weights,
        "optimizer": None,
        "model_args": checkpoint_args(config),
        "iter_num": args.iter_num,
        "best_val_loss": 1e9,
        "config": {"vocab_source": source, "vocab_size": config.vocab_size},
    }
    os.makedirs(folder_of(args.output), exist_ok=True)
    beside = None
    if tokenizer:
        # The settings define BOS and EOS.
        if tokenizer.bpe and settings not in ({}, tokenizer.config):
            own = os.path.join(scratch, "own")
            tokenizer = Tokenizer(copy_tokenizer(tokenizer, own, settings))
        beside = copy_tokenizer(tokenizer, folder_of(args.output))
        checkpoint["tokenizer_hash"] = tokenizer.hash
    write_checkpoint(args.output, checkpoint)
    print(
        f"wrote {args.output}: {config.dim} dim, {config.n_layers} layers, "
        f"vocabulary {config.vocab_size}, iteration {args.iter_num}{note}"
    )
    if beside:
        print(f"wrote {beside}")


def chat_settings(checkpoint, folder, settings, tokenizer, vocab_size):
    """Copies chat template and end ids of a Hugging Face model to a checkpoint; returns a note."""
    generation = read_json(os.path.join(folder, "generation_config.json"))
    ends = generation.get(
        "eos_token_id", read_json(os.path.join(folder, "config.json")).get("eos_token_id")
    )
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    ends = [
        i
        for i in ends
        if type(i) is int and 0 <= i < vocab_size and (not tokenizer or i != tokenizer.eos_id)
    ]
    if ends:
        checkpoint["end_ids"] = ends
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            settings["chat_template"] = f.read()
    source = settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if not source:
        return ""
    try:
        texts = token_text(settings, "bos_token"), token_text(settings, "eos_token")
        template = template_from_jinja(source, *texts)
        if tokenizer:
            Template(**template).check(tokenizer)
        checkpoint["template"] = template
        return ", with its chat template"
    except ValueError as e:
        return f"; its chat template was dropped ({e}): --template of other commands names another"


def unused(args):
    """The flags that have no effect on this export or import, with the reason: {name: reason}."""
    out, foreign = {}, bool(args.hf or args.meta or args.gguf)
    if args.checkpoint or args.llama2c:
        out["max_seq_len"] = "is for imports with --hf, --meta and --gguf"
    if args.checkpoint:
        out["iter_num"] = "is for imports, which write a .pt"
    if foreign or args.llama2c:
        out["version"] = "is for --checkpoint: an import writes a .pt"
    if foreign or args.llama2c or args.checkpoint and args.format != "peft":
        out["base"] = "is for --format=peft"
    if args.format == "peft":
        out["tokenizer"] = "is for models: --format=peft writes adapters alone"
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="file or folder to write")
    parser.add_argument("--checkpoint", help="checkpoint (.pt) to export")
    parser.add_argument(
        "--version",
        type=int,
        choices=(0, 1, 2, 3),
        default=3,
        help="version of the model.bin: 3 for run.c; 0 or 2 for run.c and llama2.c's programs; 1 "
        "for programs that read fp32 with a header, as llama2.c's export.py writes it",
    )
    parser.add_argument(
        "--format",
        choices=(*FORMATS, "hf", "gguf", "peft"),
        help="fp32 or q8_0 (int8 weights with fp16 scales, the default) for run.c; hf for "
        "transformers, gguf for llama.cpp, peft for LoRA adapters",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        help="number type of the weights with --format=hf and in imports (default: as in the "
        "source) and with --format=gguf (default: q8_0)",
    )
    parser.add_argument(
        "--tokenizer",
        help="SentencePiece model or tokenizer.json to embed, or to put beside the .pt (with "
        "--meta also Llama 3's tokenizer.model); default: tok<V>.model or tokenizer.json beside "
        "the checkpoint or in data/, or the one of the imported model",
    )
    parser.add_argument(
        "--merge_lora",
        help="adapters (sft_lora.pt) to merge into the checkpoint's weights; the output may then "
        "also be a .pt",
    )
    parser.add_argument(
        "--base",
        default="",
        help="with --format=peft: folder or name of the model that the adapters belong to",
    )
    parser.add_argument("--hf", help="Hugging Face folder or .safetensors to import")
    parser.add_argument(
        "--meta", help="Meta folder to import, with params.json and consolidated.*.pth"
    )
    parser.add_argument("--gguf", help="GGUF file to import, quantized or not")
    parser.add_argument("--llama2c", help="llama2.c file of version 0 to import")
    parser.add_argument(
        "--max_seq_len",
        type=int,
        help="context length of the imported model (--hf, --meta, --gguf); default: the model's "
        "own, whose RoPE tables may be large",
    )
    parser.add_argument(
        "--iter_num", type=int, default=0, help="iteration number to store in an imported .pt"
    )
    args = parse_args(parser, argv, unused)
    sources = [args.checkpoint, args.hf, args.meta, args.gguf, args.llama2c]
    if sum(map(bool, sources)) != 1:
        parser.error("give either --checkpoint, or one of --hf, --meta, --gguf and --llama2c")
    wrong = [f"--{name}" for name in ("format", "merge_lora") if getattr(args, name)]
    if wrong and not args.checkpoint:
        raise ValueError(f"{wrong[0]} needs --checkpoint: an import writes a .pt")
    if args.merge_lora and args.format == "peft":
        raise ValueError("--format=peft writes adapters alone: it has no --merge_lora")
    if args.version != 3 and args.format:
        raise ValueError(f"version {args.version} has one format, --format is for version 3")
    read = [path for path in (*sources, args.merge_lora, args.tokenizer) if path]
    for path in read if os.path.exists(args.output) else ():
        if os.path.exists(path) and os.path.samefile(args.output, path):
            raise ValueError(f"{args.output} would overwrite what is read: name another file")
    if args.output.endswith(".gguf") and args.checkpoint and args.version == 3:
        args.format = args.format or "gguf"
    allowed = {"gguf": ("float32", "q8_0"), "hf": ("float32", "bfloat16", "float16")}.get(
        "hf" if args.hf or args.meta or args.gguf else args.format, ()
    )
    if args.dtype and args.dtype not in allowed:
        raise ValueError(
            f"--dtype={args.dtype} is not for this format"
            + f": choose from {', '.join(allowed)}" * bool(allowed)
        )
    if not args.llama2c:
        check_suffix(args)
    if args.format == "peft":
        return export_peft(args)
    if args.checkpoint:
        return export_model(args)
    with tempfile.TemporaryDirectory() as scratch:
        return import_model(args, scratch)


if __name__ == "__main__":
    run_main(main)
