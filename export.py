"""
From and to other formats.

    python export.py model.bin --checkpoint=out/ckpt.pt                # int8 for run.c, the default
    python export.py model.bin --checkpoint=out/ckpt.pt --format=fp32  # fp32 for run.c
    python export.py model.bin --checkpoint=out/ckpt.pt --version=2    # llama2.c's runq (0: run)
    python export.py ckpt.pt --llama2c=stories260K.bin --tokenizer=tok512.model    # and back

Version 3 is laid out for run.c, whose comment on the model file has it byte by byte: every tensor
in the order and shape in which it is used, 64-byte aligned, so that the file is mapped and used
as it is. Rows are zero-padded to tiles of 16 and columns to whole groups, which is exact: a zero
weight adds nothing. (llama2.c's own exporter lets a group run over the end of a row when the
hidden size is no multiple of it, and its reader then silently drops weights.)
"""

import argparse
import os
import shutil
import struct
import tempfile

import numpy as np
import torch

from model import (ModelArgs, checkpoint_args, load_checkpoint, model_from_checkpoint,
                   save_checkpoint)
from tokenizer import Tokenizer, find_tokenizer, parse_args, run_main, write_atomic

MAGIC = 0x616B3432  # "ak42"
TILE = 16  # rows that version 3 interleaves
FORMATS = {"fp32": 0, "q8_0": 1}

# -----------------------------------------------------------------------------
# The numbers and tensors of a model

def header_ints(args):
    """The seven ints that all versions begin with."""
    return struct.pack("<7i", args.dim, args.ffn_dim, args.n_layers, args.n_heads,
                       args.n_kv_heads, args.vocab_size, args.max_seq_len)

def per_layer(weights, args, name):
    """One tensor of every layer, in order: per_layer(weights, args, "attention.wq")."""
    return [weights[f"layers.{i}.{name}.weight"] for i in range(args.n_layers)]

def floats(w):
    return w.detach().to("cpu", torch.float32).numpy().astype("<f4")

MATRICES = ["attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]

# -----------------------------------------------------------------------------
# Version 3: what run.c maps

SEARCH = np.linspace(0.94, 1.02, 41, dtype=np.float32)  # scales to try, around max / 127
SEARCH_LIMIT = 1 << 20  # weights of one matrix: above it the search would take minutes

def quantize(w, group, dtype):
    """
    Symmetric int8 by groups of `group` columns: w (rows, cols) is close to q * scale, with
    q (rows, cols) int8 in [-127, 127] and scale (rows, cols / group) of `dtype`. cols must be a
    multiple of group. Of the scales near max|w| / 127 it takes the one with the least square
    error, some 10 % less than that of max|w| / 127 itself.
    """
    q, scale = np.empty(w.shape, np.int8), np.empty((w.shape[0], w.shape[1] // group), dtype)
    factors = SEARCH if w.size <= SEARCH_LIMIT else np.ones(1, np.float32)
    rows = max(1, 65536 // w.shape[1])  # at a time, so that they stay in the cache
    for i in range(0, len(w), rows):
        g = w[i:i + rows].reshape(-1, group)
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
        q[i:i + rows] = best_n.reshape(-1, w.shape[1])
        scale[i:i + rows] = best_s.reshape(-1, scale.shape[1])
    return q, scale

def pad(w, rows, cols):
    """w with zeros added until its sizes are multiples of rows and cols."""
    return np.pad(w, ((0, -w.shape[0] % rows), (0, -w.shape[1] % cols)))

def tiles(w, width):
    """(rows, cols) -> (rows / 16, cols / width, 16, width): 16 rows side by side."""
    return w.reshape(w.shape[0] // TILE, TILE, -1, width).transpose(0, 2, 1, 3)

def matrix_blobs(w, fmt, group):
    """The one or two blocks of bytes that a matrix becomes."""
    if fmt == "fp32":
        return [tiles(pad(w, TILE, 1), 1).tobytes()]
    q, scale = quantize(pad(w, TILE, group), group, "<f2")
    q = (q.astype(np.int16) + 128).astype(np.uint8)  # run.c multiplies unsigned by signed bytes
    return [tiles(q, 4).tobytes(), tiles(scale, 1).tobytes()]

def best_group(args):
    """
    64 or 32, whichever makes the smaller file: a scale costs 2 bytes a group, a dimension that
    is no multiple of the group costs padding. 16 for models so small that they run from the L2
    cache, where bytes cost little, and have no precision to spare.
    """
    if args.dim < 128:
        return 16
    def row(cols, group):
        return -(-cols // group) * (group + 2)
    def size(group):
        per_layer = (2 * args.dim + 2 * args.n_kv_heads * args.head_dim + 2 * args.ffn_dim) \
            * row(args.dim, group) + args.dim * row(args.ffn_dim, group)
        return args.n_layers * per_layer + args.vocab_size * row(args.dim, group)
    return min((64, 32), key=size)

def interleave(w1, w3):
    """Tiles of 16 rows of w1 and of w3 in turn, for the SwiGLU."""
    w1, w3 = (pad(w, TILE, 1).reshape(-1, TILE, w.shape[1]) for w in (w1, w3))
    return np.stack([w1, w3], 1).reshape(-1, w1.shape[-1])

def tensors_v3(args, weights):
    """Yields the tensors in file order, as numpy arrays: norms (D,), matrices (rows, cols)."""
    yield floats(weights["tok_embeddings.weight"])
    for layer in range(args.n_layers):
        w = {name.split(".")[-1]: floats(weights[f"layers.{layer}.{name}.weight"])
             for name in (*MATRICES, "attention_norm", "ffn_norm")}
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
    """The tokenizer in llama2.c's format, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tok.bin")
        tokenizer.export(path)
        with open(path, "rb") as f:
            return f.read()

def write_v3(f, args, weights, fmt, tokenizer):
    group = best_group(args)
    f.write(bytes(256))
    for w in tensors_v3(args, weights):
        for blob in [w.tobytes()] if w.ndim == 1 else matrix_blobs(w, fmt, group):
            f.write(bytes(-f.tell() % 64))
            f.write(blob)
    offset = f.tell()
    blob, bos, eos, squeeze = b"", 1, 2, 0
    if tokenizer:
        blob = tokenizer_blob(tokenizer)
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        spaced, plain = (tokenizer.encode(s, False, False) for s in (" a  b ", "a b"))
        squeeze = int(spaced == plain)
    last = args.vocab_size - 1
    bos, eos = (min(i, last) if i >= 0 else min(d, last) for i, d in ((bos, 1), (eos, 2)))
    f.write(blob)
    f.seek(0)
    f.write(struct.pack("<Ii", MAGIC, 3) + header_ints(args))
    f.write(struct.pack("<5i2f3QI", FORMATS[fmt], group, int(args.tied), bos, eos, args.rope_theta,
                        args.norm_eps, offset, len(blob), offset + len(blob), squeeze))

# -----------------------------------------------------------------------------
# llama2.c's versions

def write_v0(f, args, weights):
    """fp32, no magic; the sign of the vocabulary size says whether the classifier is tied."""
    head = bytearray(header_ints(args))
    if not args.tied:
        struct.pack_into("<i", head, 20, -args.vocab_size)
    f.write(head)
    order = [[weights["tok_embeddings.weight"]], per_layer(weights, args, "attention_norm"),
             *(per_layer(weights, args, m) for m in MATRICES[:4]),
             per_layer(weights, args, "ffn_norm"),
             *(per_layer(weights, args, m) for m in MATRICES[4:]), [weights["norm.weight"]]]
    for tensor in sum(order, []):
        f.write(floats(tensor).tobytes())
    f.write(bytes(4 * args.max_seq_len * args.head_dim))  # RoPE tables, which nobody reads
    if not args.tied:
        f.write(floats(weights["output.weight"]).tobytes())

def write_v2(f, args, weights):
    """int8 with fp32 scales; the group is the largest power of two that divides every row."""
    group = 64
    while args.dim % group or args.ffn_dim % group:
        group //= 2
    f.write((struct.pack("<Ii", MAGIC, 2) + header_ints(args)
             + struct.pack("<Bi", args.tied, group)).ljust(256, b"\0"))
    norms = per_layer(weights, args, "attention_norm") + per_layer(weights, args, "ffn_norm")
    for tensor in norms + [weights["norm.weight"]]:
        f.write(floats(tensor).tobytes())
    matrices = [weights["tok_embeddings.weight"], *sum((per_layer(weights, args, m)
                                                        for m in MATRICES), [])]
    for tensor in matrices + ([] if args.tied else [weights["output.weight"]]):
        q, scale = quantize(floats(tensor), group, "<f4")
        f.write(q.tobytes() + scale.tobytes())

def read_v0(path):
    """A version-0 file -> (ModelArgs, state dict). ValueError if its length is not its header's."""
    with open(path, "rb") as f:
        data = f.read()
    if len(data) < 28 or struct.unpack_from("<I", data)[0] == MAGIC:
        raise ValueError(f"{path} is not a llama2.c file of version 0 (fp32)")
    dim, ffn, n_layers, n_heads, n_kv_heads, vocab, seq_len = struct.unpack_from("<7i", data)
    if min(dim, ffn, n_layers, n_heads, n_kv_heads, abs(vocab), seq_len) < 1 or dim % n_heads:
        raise ValueError(f"{path} is not a llama2.c file of version 0 (fp32)")
    L, V, E, kv = n_layers, abs(vocab), dim // n_heads, dim // n_heads * n_kv_heads
    shapes = {"tok_embeddings": (V, dim), "attention_norm": (L, dim),
              "attention.wq": (L, dim, dim), "attention.wk": (L, kv, dim),
              "attention.wv": (L, kv, dim), "attention.wo": (L, dim, dim), "ffn_norm": (L, dim),
              "feed_forward.w1": (L, ffn, dim), "feed_forward.w2": (L, dim, ffn),
              "feed_forward.w3": (L, ffn, dim), "norm": (dim,), "rope": (seq_len, E)}
    if vocab < 0:
        shapes["output"] = (V, dim)
    want = 28 + 4 * sum(int(np.prod(s, dtype=object)) for s in shapes.values())
    if len(data) != want:
        raise ValueError(f"{path} is {len(data)} bytes long, its header says {want}")
    weights, at = {}, 28
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        tensor = torch.from_numpy(np.frombuffer(data, "<f4", n, at).reshape(shape).copy())
        at += 4 * n
        if name in ("tok_embeddings", "norm", "output"):
            weights[f"{name}.weight"] = tensor
        elif name != "rope":
            weights.update({f"layers.{i}.{name}.weight": tensor[i].clone() for i in range(L)})
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    # Llama's rule gives the hidden size for some multiple_of; if for none, it is said outright.
    args = dict(dim=dim, n_layers=L, n_heads=n_heads, n_kv_heads=n_kv_heads, vocab_size=V,
                max_seq_len=seq_len, tied=vocab > 0)
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if ModelArgs(**args, multiple_of=multiple).ffn_dim == ffn:
            return ModelArgs(**args, multiple_of=multiple), weights
    return ModelArgs(**args, hidden_dim=ffn), weights

# -----------------------------------------------------------------------------

def open_tokenizer(path, vocab_size, folder):
    """
    The tokenizer of a model: the given one, which must fit, or the one that find_tokenizer
    finds. None if there is none to find.
    """
    try:
        found = path or find_tokenizer(vocab_size, folder)
    except FileNotFoundError:
        return None
    tokenizer = Tokenizer(found)
    if tokenizer.n_words != vocab_size:
        raise ValueError(f"{found} has {tokenizer.n_words} tokens, the model has {vocab_size}")
    return tokenizer

def export_bin(args):
    """.pt -> .bin"""
    if args.version != 3 and args.format:
        raise ValueError(f"version {args.version} has one format, --format is for version 3")
    model = model_from_checkpoint(load_checkpoint(args.checkpoint))
    config, weights = model.args, model.state_dict()
    note, fmt = "", args.format or "q8_0"
    if args.version == 3:
        folder = os.path.dirname(os.path.abspath(args.output))
        beside = os.path.dirname(os.path.abspath(args.checkpoint))
        tokenizer = open_tokenizer(args.tokenizer, config.vocab_size, beside) \
            or open_tokenizer(None, config.vocab_size, folder)
        note = f", tokenizer {tokenizer.model_path}" if tokenizer else \
               ", no tokenizer found: give --tokenizer, or ./run needs -z"
    with write_atomic(args.output) as f:
        if args.version == 3:
            write_v3(f, config, weights, fmt, tokenizer)
        elif args.version == 2:
            write_v2(f, config, weights)
        else:
            write_v0(f, config, weights)
    n = sum(p.numel() for p in model.parameters())
    fmt = {0: "fp32", 2: "int8", 3: fmt}[args.version]
    print(f"wrote {args.output}: version {args.version}, {fmt}, {n:,} parameters, "
          f"{os.path.getsize(args.output):,} bytes (fp32: {4 * n:,}){note}")

def import_llama2c(args):
    """.bin of version 0 -> .pt"""
    config, weights = read_v0(args.llama2c)
    tokenizer = args.tokenizer and open_tokenizer(args.tokenizer, config.vocab_size, None)
    source = "llama2" if config.vocab_size == 32000 else "custom"
    save_checkpoint(args.output, {
        "model": weights, "optimizer": None, "model_args": checkpoint_args(config),
        "iter_num": args.iter_num, "best_val_loss": 1e9,
        "config": {"vocab_source": source, "vocab_size": config.vocab_size}})
    print(f"wrote {args.output}: {config.dim} dim, {config.n_layers} layers, "
          f"vocabulary {config.vocab_size}, iteration {args.iter_num}")
    if tokenizer:
        beside = os.path.join(os.path.dirname(os.path.abspath(args.output)),
                              f"tok{config.vocab_size}.model")
        if not (os.path.exists(beside) and os.path.samefile(beside, tokenizer.model_path)):
            shutil.copyfile(tokenizer.model_path, beside)
            print(f"wrote {beside}")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="the file to write: .bin, or .pt with --llama2c")
    parser.add_argument("--checkpoint", help="the .pt to read")
    parser.add_argument("--version", type=int, choices=(0, 2, 3), default=3,
                        help="3: for run.c; 0 and 2: for llama2.c's run and runq as well")
    parser.add_argument("--format", choices=tuple(FORMATS),
                        help="of version 3; without it q8_0: int8 weights with fp16 scales")
    parser.add_argument("--tokenizer", help="SentencePiece model to embed (version 3) or to put "
                        "beside the .pt; without it tok<V>.model beside the checkpoint or in data/")
    parser.add_argument("--llama2c", help="a llama2.c file of version 0 to turn into a .pt")
    parser.add_argument("--iter_num", type=int, default=0, help="to record in that .pt")
    args = parse_args(parser, argv)
    if (args.checkpoint is None) == (args.llama2c is None):
        parser.error("give either --checkpoint or --llama2c")
    return export_bin(args) if args.checkpoint else import_llama2c(args)

if __name__ == "__main__":
    run_main(main)
