"""
The speed of run.c compared with its peers: the table of doc/speed.md.

    python bench/bench_run.py                                    # run.c alone
    python bench/bench_run.py --llama2c=DIR --llama_bench=FILE   # and llama2.c, llama.cpp

The models have random weights of the published shapes (the 260K model is the real one if it is
available). DIR is a checkout of llama2.c, which the script builds with -Ofast -march=native, and
with OpenMP for two threads; FILE is llama.cpp's llama-bench, for which the models are written with
the package `gguf` (pip install gguf). All programs run alternately, because the speed of a shared
machine changes from minute to minute; the table has the best of --repeat. llama-bench, like -m
bench of run.c, times forward passes alone. llama2.c can only time complete stories, so it is
compared with a complete story of run.c: one process, greedy, sampling and printing included, each
position for the first time. On a shared machine, `chrt -f 10` before the command helps.
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_args, positive, run_main  # noqa: E402  (first: it reports missing packages)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

import export  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402

#            dim, layers, heads, kv heads, vocabulary, hidden, context, threads
SHAPES = {
    "260K": (64, 5, 8, 4, 512, 172, 512, 1),
    "15M": (288, 6, 6, 6, 32000, 768, 256, 2),
    "42M": (512, 8, 8, 8, 32000, 1376, 1024, 2),
    "110M": (768, 12, 12, 12, 32000, 2048, 1024, 2),
    "1.1B": (2048, 22, 32, 4, 32000, 5632, 2048, 2),
}
TOKENS = 256


def model_args(shape):
    dim, n_layers, n_heads, n_kv_heads, vocab, hidden, seq_len, _ = SHAPES[shape]
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab,
        hidden_dim=hidden,
        max_seq_len=seq_len,
        tied=shape != "1.1B",
    )


def write_gguf(path, args, weights):
    """The same model for llama.cpp, Q8_0. It rotates halves where Llama rotates pairs; with random
    weights that changes no speed, so the rows stay as they are."""
    import gguf

    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(args.max_seq_len)
    w.add_embedding_length(args.dim)
    w.add_block_count(args.n_layers)
    w.add_feed_forward_length(args.ffn_dim)
    w.add_head_count(args.n_heads)
    w.add_head_count_kv(args.n_kv_heads)
    w.add_layer_norm_rms_eps(args.norm_eps)
    w.add_rope_dimension_count(args.head_dim)
    w.add_vocab_size(args.vocab_size)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_tokenizer_model("no_vocab")
    names = {
        "tok_embeddings": "token_embd",
        "norm": "output_norm",
        "output": "output",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "attention_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
    }
    for key, tensor in weights.items():
        if key == "output.weight" and args.tied:
            continue
        layer = re.match(r"layers\.(\d+)\.(.*)\.weight", key)
        name = f"blk.{layer[1]}.{names[layer[2]]}" if layer else names[key.removesuffix(".weight")]
        array = tensor.numpy().astype(np.float32)
        if array.ndim == 1 or array.shape[1] % 32:
            w.add_tensor(name + ".weight", array)
        else:
            q8 = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            w.add_tensor(name + ".weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def make_models(shape, folder, options):
    """Writes the files of a shape that are not there yet; returns their common prefix."""
    prefix, args = Path(folder) / shape, model_args(shape)
    want = (
        [".v3.bin"]
        + ([".v0.bin", ".v2.bin"][shape == "1.1B" :] if options.llama2c else [])
        + ([".gguf"] if options.llama_bench else [])
    )
    if all(Path(f"{prefix}{end}").exists() for end in want):
        return prefix
    real = os.environ.get("STORIES_DATA", ROOT / "data")
    real = Path(real) / "stories260K/stories260K.bin"
    if shape == "260K" and real.exists():
        args, weights = export.read_v0(real)
    else:
        torch.manual_seed(0)
        weights = Transformer(args).state_dict()
    export.SEARCH = np.ones(1, np.float32)  # the best scales are no faster than others
    for end in want:
        if end == ".gguf":
            write_gguf(f"{prefix}{end}", args, weights)
            continue
        with open(f"{prefix}{end}", "wb") as f:
            if end == ".v3.bin":
                export.write_v3(f, args, weights, "q8_0", None)
            else:
                (export.write_v0 if end == ".v0.bin" else export.write_v2)(f, args, weights)
    return prefix


def run(command, env=None):
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        timeout=900,
    )
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command))}: {done.stderr.strip()[-300:]}")
    return done.stdout + done.stderr


def measure(shape, prefix, options):
    """{name: (decode tokens/s, prompt tokens/s or None)}; of run.c also the roof and sampling."""
    threads, n = SHAPES[shape][-1], min(TOKENS, model_args(shape).max_seq_len)
    text = run(
        [
            options.run,
            f"{prefix}.v3.bin",
            "-m",
            "bench",
            "-n",
            n,
            "-j",
            threads,
            "-t",
            0.8,
            "-p",
            0.9,
        ]
    )
    found = re.search(
        r"bandwidth ([\d.]+).*?prompt.*?: ([\d.]+).*?decode.*?: ([\d.]+) tokens/s, "
        r"([\d.]+) GB/s.*?([\d.]+) us per token, ([\d.]+) %",
        text,
        re.S,
    )
    roof, prompt, decode, gbs, _, sampling = map(float, found.groups())
    # any pieces will do
    tokenizer, vocab = Path(options.dir) / f"{shape}.tok.bin", model_args(shape).vocab_size
    tokenizer.write_bytes(
        struct.pack("<I", 7)
        + b"".join(struct.pack("<fI", -i, 7) + b"%7d" % i for i in range(vocab))
    )
    text = run([options.run, f"{prefix}.v3.bin", "-t", 0, "-n", n, "-z", tokenizer, "-j", threads])
    story = float(re.search(r"story: \d+ tokens at (\d+)", text)[1])
    result = {
        "run.c": (decode, prompt),
        "roof": (roof, gbs),
        "sampling": (sampling, None),
        "run.c, a story": (story, None),
    }
    if options.llama2c:
        for name, end in (("run", ".v0.bin"), ("runq", ".v2.bin")):
            if shape == "1.1B" and name == "run":
                continue  # 4.4 GB of fp32
            program = Path(options.dir) / f"llama2c_{name}{threads}"
            if not program.exists():
                run(
                    [
                        "cc",
                        "-Ofast",
                        "-march=native",
                        *["-fopenmp"] * (threads > 1),
                        "-o",
                        program,
                        Path(options.llama2c) / f"{name}.c",
                        "-lm",
                    ]
                )
            text = run(
                [program, f"{prefix}{end}", "-t", 0, "-n", n, "-z", tokenizer],
                {"OMP_NUM_THREADS": str(threads)},
            )
            result[f"llama2.c {name}"] = float(re.search(r"tok/s: ([\d.]+)", text)[1]), None
    if options.llama_bench:
        text = run(
            [
                options.llama_bench,
                "-m",
                f"{prefix}.gguf",
                "-t",
                threads,
                "-p",
                n,
                "-n",
                n,
                "-r",
                3,
                "-o",
                "jsonl",
            ]
        )
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        speed = {row["n_gen"]: max(row["samples_ts"]) for row in rows}
        result["llama.cpp Q8_0"] = speed[n], speed[0]
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default=str(ROOT / "run"), help="the program to measure")
    parser.add_argument("--shapes", default="260K,15M,42M,110M", help=",".join(SHAPES))
    parser.add_argument("--dir", default="/tmp/bench_run", help="where the models are kept")
    parser.add_argument("--llama2c", help="checkout of llama2.c")
    parser.add_argument("--llama_bench", help="llama.cpp's llama-bench")
    parser.add_argument(
        "--repeat", type=positive, default=1, help="rounds, of which the best counts"
    )
    options = parse_args(parser, argv)
    os.makedirs(options.dir, exist_ok=True)
    for shape in options.shapes.split(","):
        if shape not in SHAPES:
            raise ValueError(f"there is no shape {shape}: choose from {', '.join(SHAPES)}")
        prefix, best = make_models(shape, options.dir, options), {}
        for _ in range(options.repeat):
            for name, values in measure(shape, prefix, options).items():
                old = best.get(name, values)
                best[name] = tuple(v and max(o, v) for o, v in zip(old, values))
        (roof, gbs), (sampling, _) = best.pop("roof"), best.pop("sampling")
        (decode, prompt), (story, _) = best["run.c"], best["run.c, a story"]
        print(
            f"{shape}, {SHAPES[shape][-1]} thread(s): {gbs:.1f} GB/s of weights and cache, "
            f"memory delivers {roof:.1f}; sampling is {sampling:.1f} % of decoding"
        )
        for name, (d, p) in best.items():
            ours = story if name.startswith("llama2.c") else decode
            ratio = "" if name.startswith("run.c") else f"  run.c is {ours / d:5.2f} x"
            line = f"  {name:15} decode {d:10,.1f} tokens/s{ratio:18}"
            if p:
                line += f"  prompt {p:10,.1f} tokens/s"
                line += f"  run.c is {prompt / p:5.2f} x" if name != "run.c" else ""
            print(line.rstrip(), flush=True)
    if not options.llama2c and not options.llama_bench:
        print(
            "beside other programs: bench/bench_run.py --llama2c=DIR --llama_bench=FILE; "
            "--help says what they are"
        )


if __name__ == "__main__":
    run_main(main)
