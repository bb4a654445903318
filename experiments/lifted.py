"""
The effect of int8 on a model of 1.1 billion parameters: run.c's perplexity on real text, fp32 and
int8.

    python experiments/lifted.py --data=FOLDER           # needs 4.4 GB of disk and of memory

Random weights cannot be used, because any rounding changes their logits completely. Therefore a
trained model, stories260K, is lifted to TinyLlama's shape: other weights, the same function up to
rounding.

- The residual stream x of 64 numbers becomes U x of 2,048 numbers; U has orthonormal columns.
  RMSNorm is invariant to the rotation, but its mean square is 64/2048 of the original one. The
  matrices after the norm correct this factor and contain the gains of the norm.
- Heads of 8 become heads of 64. A pair that RoPE rotates is moved to the pair with the same
  frequency; values are rotated. Heads and hidden units are repeated.
- Most input directions of a matrix are then unused. Its weights for them are random and as large as
  the others. They multiply nothing but rounding errors, which int8 has in all directions, so that
  each product has the signal-to-error ratio of a full matrix.
- The 17 of 22 layers that the small model does not have are silent (wo and w2 are zero). With
  `--idle` they write errors: each is like a layer of the small model, `--idle` times as strong,
  without the part of wv and w3 that reads x. At full strength, 17 random layers in sequence change
  the logits completely again (doc/speed.md), which trained layers do not do. The right strength is
  unknown.
- Tokens above 511 have random embeddings and the classifier row of a byte that occurs in no story.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_args, positive, run_main  # noqa: E402  (first: it reports missing packages)

# isort: split
import torch  # noqa: E402

import export  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

TINYLLAMA = dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, hidden_dim=5632)
NEVER = 167  # <0xA4>, a byte in no story; its probability is at most e^-15


def random(name, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def orthonormal(name, rows, cols):
    return torch.linalg.qr(random(name, rows, cols).double())[0]


def spread(blocks, n):
    """Blocks (E', E) of R heads -> (R E', n E); each block is in the columns of the head it
    copies."""
    out = torch.zeros(len(blocks), blocks[0].shape[0], n, blocks[0].shape[1], dtype=torch.float64)
    for i, block in enumerate(blocks):
        out[i, :, i * n // len(blocks)] = block
    return out.flatten(2).flatten(0, 1)


class Lifted:
    """
    The weights of a small model, ModelArgs and state dict, in the shape of `changes`, which has as
    many kv heads: `args`, and tensors by name, each made when it is asked for, in the given dtype.
    """

    def __init__(self, small, weights, idle=0.0, **changes):
        self.small, self.weights, self.idle = small, weights, idle
        dtype = weights["norm.weight"].dtype
        self.args = large = replace(small, tied=False, head_dim=None, **changes)
        large.norm_eps = small.norm_eps * small.dim / large.dim
        E, K, ratio = small.head_dim, small.n_kv_heads, large.head_dim // small.head_dim
        turn = torch.zeros(large.head_dim // 2, 2, E // 2, 2, dtype=torch.float64)
        for i in range(E // 2):  # theta^(-2i / E) = theta^(-2 i ratio / (E ratio))
            turn[i * ratio, [0, 1], i, [0, 1]] = 1
        turn = turn.flatten(2).flatten(0, 1)
        values = [orthonormal(f"values {k}", large.head_dim, E) for k in range(K)]
        copied = [values[h * K // large.n_heads] for h in range(large.n_heads)]
        self.x = orthonormal("residual", large.dim, small.dim).to(dtype)  # (D, d)
        self.heads = spread(copied, small.n_heads).to(dtype)
        which = torch.arange(large.ffn_dim) % small.ffn_dim
        self.units = torch.eye(small.ffn_dim, dtype=dtype)[which]  # (F', F)
        # what makes the rows of a matrix, from those of the small one
        self.rows = {
            "attention.wq": ratio**0.5 * spread([turn] * large.n_heads, small.n_heads),
            "attention.wk": spread([turn] * K, K),
            "attention.wv": spread(values, K),
            "attention.wo": self.x,
            "feed_forward.w2": self.x,
            "feed_forward.w1": self.units,
            "feed_forward.w3": self.units,
        }
        self.rows = {name: w.to(dtype) for name, w in self.rows.items()}

    def fill(self, name, w, basis, used=True):
        """
        w (rows, d) -> (rows, D), which does to basis h what w does to h, and random things to what
        is orthogonal to that. Not `used`: nothing to basis h. basis has orthogonal columns.
        """
        square = basis.square().sum(0)
        inverse, size = (basis / square).T, w.square().mean(1, keepdim=True)
        size[size == 0] = size[size > 0].mean()  # rows for pairs that no RoPE of the small one has
        noise = random(name, len(w), len(basis)).to(w.dtype) * (size / square.mean()).sqrt()
        return used * w @ inverse + noise - noise @ basis @ inverse

    def __getitem__(self, name):
        a, b, scale = self.small, self.args, (self.small.dim / self.args.dim) ** 0.5
        if name.endswith("norm.weight"):
            return torch.ones(b.dim)
        if not name.startswith("layers"):
            ids = torch.arange(b.vocab_size)
            w = self.weights[name][ids.where(ids < a.vocab_size, NEVER)]
            if name == "output.weight":
                return scale * self.fill(name, w * self.weights["norm.weight"], self.x)
            w = w @ self.x.T
            w[a.vocab_size :] = random(name, *w[a.vocab_size :].shape).to(w.dtype) * w.std()
            return w
        _, layer, part, matrix, _ = name.split(".")
        n, matrix = int(layer), f"{part}.{matrix}"
        source = n * a.n_layers // b.n_layers
        used = source != (n - 1) * a.n_layers // b.n_layers
        w = self.weights[f"layers.{source}.{matrix}.weight"]
        if matrix[-2:] in ("wo", "w2"):
            if not used and not self.idle:
                return torch.zeros(b.dim, b.dim if matrix[-2:] == "wo" else b.ffn_dim)
            basis = self.heads if part == "attention" else self.units
            return (1 if used else self.idle) * self.fill(name, self.x @ w, basis)
        norm = "attention_norm" if part == "attention" else "ffn_norm"
        gain = self.weights[f"layers.{source}.{norm}.weight"]
        return scale * self.fill(
            name, self.rows[matrix] @ (w * gain), self.x, used or matrix[-2:] not in ("wv", "w3")
        )


def read_by_c(data, folder, program, fmt, stories, threads=1, **changes):
    """
    (loss, perplexity, tokens) of run.c, the `program`, on the first `stories` of data00, by
    stories260K lifted to `changes`, or as it is where there are none. ValueError if it fails.
    """
    folder, data = Path(folder), Path(data)
    told = json.loads((data / "TinyStories_all_data/data00.json").read_text())[:stories]
    (folder / "text").write_text("<|endoftext|>".join(s["story"].strip() for s in told))
    args, weights = export.read_v0(data / "stories260K/stories260K.bin")
    if changes:
        weights = Lifted(args, weights, **changes)
        args = weights.args
    Tokenizer(data / "stories260K/tok512.model").export(folder / "tok.bin")
    with open(folder / "tok.bin", "ab") as f:
        f.write(bytes(8 * (args.vocab_size - 512)))  # empty pieces, which no text has
    with open(folder / "model.bin", "wb") as f:
        export.write_v3(f, args, weights, fmt, None)
    done = subprocess.run(
        [
            program,
            folder / "model.bin",
            "-z",
            folder / "tok.bin",
            "-m",
            "perplexity",
            "-i",
            folder / "text",
            "-j",
            str(threads),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(done.stderr)
    found = re.search(r"loss ([\d.]+), perplexity ([\d.]+), (\d+) tokens", done.stdout)
    return float(found[1]), float(found[2]), int(found[3])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        default=os.environ.get("STORIES_DATA", "data"),
        help="folder with stories260K/ and TinyStories_all_data/",
    )
    parser.add_argument("--run", default=str(ROOT / "run"), help="the program to measure")
    parser.add_argument("--stories", type=positive, default=10, help="number of stories")
    parser.add_argument(
        "--idle",
        type=float,
        default=0.0,
        help="strength of the layers that only write errors; 1: as strong as the other layers",
    )
    parser.add_argument("--threads", type=positive, default=2, help="threads of run.c")
    parser.add_argument("--dir", help="temporary folder with 4.4 GB free; default: the system's")
    options = parse_args(parser, argv)
    for name, changes in (
        ("stories260K", {}),
        ("lifted to 1.1B", {"idle": options.idle, **TINYLLAMA}),
    ):
        perplexity = {}
        for fmt in ("q8_0", "fp32"):
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                loss, perplexity[fmt], n = read_by_c(
                    options.data,
                    folder,
                    options.run,
                    fmt,
                    options.stories,
                    options.threads,
                    **changes,
                )
            print(
                f"{name}, {fmt}: loss {loss:.5f}, perplexity {perplexity[fmt]:.4f}, {n} tokens",
                flush=True,
            )
        change = perplexity["q8_0"] / perplexity["fp32"] - 1
        print(f"{name}: perplexity in int8 {100 * change:+.3f} %", flush=True)


if __name__ == "__main__":
    run_main(main)
