"""run.c: kernels against plain arithmetic, logits against PyTorch, the program against its manual.

The C code is tested from both sides: as a library (run.c without its main, and the wrappers below,
through ctypes), and as the program that a user runs.
"""

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import make_bpe
from test_export import balanced

import export
from checkpoint import checkpoint_args
from common import printable
from instruct import Template
from model import ModelArgs, Transformer
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_START = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside "
    "in the park. One day, she saw a big, red ball."
)
GOLDEN_END = "You are a good friend."

WRAPPERS = r"""
#include "tests/run_lib.h"
static const Kernels *isa_kernels[3];
const char *isa_name(int i) {
    int n = 0;
    isa_kernels[n++] = &kernels;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) isa_kernels[n++] = &kernels_avx2;
    if (pick_kernels() == &kernels_avx512) isa_kernels[n++] = &kernels_avx512;
#endif
    return i < n ? isa_kernels[i]->name : NULL;
}
int half_of(float x) { return to_half(x); }
float of_half(int h) { return from_half((uint16_t)h); }
// x (n,) has room for a multiple of 16
float exps_of(int isa, float *x, int n) { return isa_kernels[isa]->exps(x, pad(x, n), 1, 0); }
float above_of(int isa, float *x, int n, float least) {
    return isa_kernels[isa]->above(x, pad(x, n), least);
}
float maximum_of(int isa, float *x, int n) { return isa_kernels[isa]->maximum(x, pad(x, n)); }

// f or f_isa(...), for the instruction set of that number
#ifdef __x86_64__
#define DO(f, ...) (isa_kernels[isa] == &kernels ? f(__VA_ARGS__) \
                    : isa_kernels[isa] == &kernels_avx2 ? f##_avx2(__VA_ARGS__) \
                    : f##_avx512(__VA_ARGS__))
#else
#define DO(f, ...) f(__VA_ARGS__)
#endif

// out (B, padded rows) = x (B, cols) @ w (rows, cols)^T; seen: w and x as the kernel has them
void product_of(int isa, int format, int G, float *w, int rows, int cols, float *x, int B,
             float *out, float *seen_w, float *seen_x) {
    Model m = {.c = {.format = format, .group = G, .dim = cols, .norm_eps = 1e-5f}};
    Matrix a;
    open_matrix(&m, &a, NULL, rows, cols);
    for (int r = 0; r < rows; r++) pack_row(&m.c, &a, r, w + r * cols, cols, NULL);
    int64_t width = round_up(a.cols, 64) + 64;
    Input in = {.width = width, .high = zeros(B * width), .low = zeros(B * width),
                .s = zeros(B * width), .bias = zeros(B * width)};
    float *padded = zeros(4 * B * width);
    for (int b = 0; b < B; b++) memcpy(padded + b * width, x + b * cols, 4 * cols);
    State s = {.m = &m, .team = team_of(1), .in = &in};
    DO(product, &s, 0, out, a.tiles * 16, false, padded, B, NULL, &a, 1);
    for (int r = 0; r < rows && format == Q8_0; r++)
        embed_row(seen_w + r * cols, &a, r, cols, G);
    for (int b = 0; b < B && format == Q8_0; b++)
        for (int i = 0; i < cols; i++)
            seen_x[b * cols + i] = in.s[b * (width / 4) + i / G]
                                   * (128 * in.high[b * width + i] + in.low[b * width + i]);
    free_all();
}

// x has room for a multiple of 16, zero beyond n
void norm_of(int isa, float *to, float *x, float *weight, int n, float eps) {
    DO(normalize, to, x, weight, n, eps);
}
float softmax_of(int isa, float *x, int n) { return DO(softmax, x, n); }
// out (F,) = silu(gate) * value, both (F,)
void swiglu_of(int isa, float *gate, float *value, int F, float *out) {
    Model m = {.c = {.dim = 2, .hidden_dim = F, .n_layers = 1, .n_heads = 1, .n_kv_heads = 1,
                     .head_dim = 2, .kv_dim = 2, .group = 32, .vocab_size = 1}};
    State s;
    state_open(&s, &m, team_of(1), 1, 1, 1);
    s.B = 1;
    for (int i = 0; i < F; i++) {
        s.h13[i / 16 * 32 + i % 16] = gate[i];
        s.h13[i / 16 * 32 + 16 + i % 16] = value[i];
    }
    DO(swiglu, &s, 0, round_up(F, 16) / 16);
    memcpy(out, s.h, sizeof(float) * (size_t)F);
    free_all();
}
// out (H, E): attention of the last of n positions; q (H, E), scaled; keys, values (K, n, E)
void attention_of(int isa, int half, float *q, float *keys, float *values, int H, int K, int E,
                  int n, float *out) {
    Model m = {.c = {.dim = H * E, .hidden_dim = 4, .n_layers = 2, .n_heads = H, .n_kv_heads = K,
                     .head_dim = E, .kv_dim = K * E, .group = 32, .vocab_size = 1, .format = half}};
    State s;
    state_open(&s, &m, team_of(1), 2, n, 1);
    Row row = {0, n - 1, 1}; // in the second layer of the second sequence
    s.row = &row, s.B = 1;
    memcpy(s.qkv, q, sizeof(float) * (size_t)(H * E));
    for (int i = 0; i < K * n * E; i++) {
        int64_t head = 3 * K + i / (n * E), t = i / E % n, e = i % E;
        int64_t at = head * s.T * E + t / 16 * 16 * E + e * 16 + t % 16;
        if (half) {
            ((uint16_t *)s.keys)[at] = to_half(keys[i]);
            ((uint16_t *)s.values)[at] = to_half(values[i]);
        } else ((float *)s.keys)[at] = keys[i], ((float *)s.values)[at] = values[i];
    }
    DO(attention, &s, 1, (Range){0, H}, s.scores);
    memcpy(out, s.att, sizeof(float) * (size_t)(H * E));
    free_all();
}

// logits (n, V) of one sequence, `block` rows at a time, on so many threads; `cache`: the format
// whose KV cache it has. 0, or 1 if that fails
int logits_of(const char *path, int isa, int threads, int block, int cache, int *ids, int n,
              float *out) {
    static Model m;
    static State s;
    static Span file;
    int failed = setjmp(died);
    if (!failed) {
        model_open(&m, file = map_file(path), path);
        const int format = m.c.format;
        m.c.format = cache < 0 ? format : cache;
        state_open(&s, &m, team_of(threads), 1, n, block);
        m.c.format = format;
        for (int i = 0; i < n; i += block) {
            Row rows[64];
            int B = n - i < block ? n - i : block;
            for (int b = 0; b < B; b++) rows[b] = (Row){ids[i + b], i + b, 0};
            set_rows(&s, rows, B, B);
            team_run(s.team, isa_kernels[isa]->forward, &s);
            for (int b = 0; b < B; b++)
                memcpy(out + (i + b) * m.c.vocab_size, s.logits + b * s.v_width,
                       4 * m.c.vocab_size);
        }
        munmap((void *)file.data, (size_t)file.size);
    }
    free_all();
    return failed;
}

static Tokenizer tokenizer;
int open_tok(const uint8_t *data, int size, int kind, int n, int squeeze) {
    const Config c = {.kind = kind, .vocab_size = n, .bos = 1, .eos = 2, .squeeze = squeeze};
    free_all();
    int failed = setjmp(died);
    if (!failed) tokenizer_open(&tokenizer, (Span){data, size}, &c, "test");
    return failed;
}
int encode_into(const char *text, int len, int bos, int *out) {
    size_t n = 0;
    int *ids = encode(&tokenizer, text, (size_t)len, bos, NULL, &n);
    memcpy(out, ids, sizeof *ids * n);
    free(ids);
    return (int)n;
}
// the ids of a chat's exchanges, the last without its reply; *stop: what ends a reply
int chat_into(const char *path, char *system, int n, char **users, int **replies, int *sizes,
              int *out, int *stop) {
    static Run run;
    Turn turn[8];
    int count = -1;
    run = (Run){.system = system, .stop = -1};
    if (!setjmp(died)) {
        model_open(&run.model, map_file(path), path);
        tokenizer_of(&run.tokenizer, &run.model);
        open_templates(&run);
        for (int i = 0; i < n; i++) turn[i] = (Turn){users[i], replies[i], sizes[i]};
        int *ids = render_all(&run, turn, 0, n - 1, &count);
        memcpy(out, ids, sizeof *ids * (size_t)count);
        *stop = run.stop;
        free(ids);
    }
    free_all();
    return count;
}
// the residual stream (D,) after one token, without the classifier, whose rows may be many
int stream_of(const char *path, int token, float *out) {
    static Model m;
    static State s;
    static Span file;
    int failed = setjmp(died);
    if (!failed) {
        model_open(&m, file = map_file(path), path);
        state_open(&s, &m, team_of(1), 1, 1, 1);
        set_rows(&s, &(Row){token, 0, 0}, 1, 0);
        team_run(s.team, isa_kernels[0]->forward, &s);
        memcpy(out, s.x, sizeof(float) * (size_t)m.c.dim);
        munmap((void *)file.data, (size_t)file.size);
    }
    free_all();
    return failed;
}
int bytes_of(int id, uint8_t *out) {
    memcpy(out, tokenizer.piece[id].text, tokenizer.piece[id].len);
    return (int)tokenizer.piece[id].len;
}
void samples(float *logits, int n, float t, int k, float p, int seed, int *out, int count) {
    Sampler s = {t, k, p, seed_rng((uint64_t)seed)};
    float *x = malloc(sizeof *x * (size_t)(n + 15));
    for (int i = 0; i < count; i++) {
        memcpy(x, logits, sizeof *x * (size_t)n);
        out[i] = sample(&s, pick_kernels(), x, n);
    }
    free(x);
}
"""

# -----------------------------------------------------------------------------
# What the tests share: the library, the program, models, tokenizers


def compile_c(source, output, *flags, cc=None):
    done = subprocess.run(
        [
            cc or os.environ.get("CC", "cc"),
            *flags,
            str(source),
            "-o",
            str(output),
            "-I",
            str(ROOT),
            "-lm",
            "-pthread",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def lib(build):
    (build / "lib.c").write_text(WRAPPERS)
    so = compile_c(build / "lib.c", build / "lib.so", "-O2", "-shared", "-fPIC")
    library = ctypes.CDLL(str(so))
    library.isa_name.restype = ctypes.c_char_p
    for name in ("of_half", "exps_of", "above_of", "maximum_of", "softmax_of"):
        getattr(library, name).restype = ctypes.c_float
    library.isas = []
    while library.isa_name(len(library.isas)):
        library.isas.append(library.isa_name(len(library.isas)).decode())
    return library


@pytest.fixture(scope="session")
def program(build):
    return compile_c(
        ROOT / "run.c", build / "run", "-O3", "-Wall", "-Wextra", "-Wpedantic", "-Werror"
    )


def call(program, *args, stdin="", env=None, ok=0, raw=False):
    done = subprocess.run(
        [str(a) for a in (program, *args)],
        input=stdin.encode(),
        capture_output=True,
        env={**os.environ, **(env or {})},
        timeout=100,
    )
    assert ok is None or done.returncode == ok, (done.returncode, done.stderr[-2000:])
    done.text = done.stdout if raw else done.stdout.decode(errors="replace")
    done.err = done.stderr.decode(errors="replace")
    return done


def floats(a):
    return np.ascontiguousarray(a, np.float32)


def pointer(a):
    return a.ctypes.data_as(ctypes.c_void_p)


SHAPES = {  # every way in which a model can be odd
    "plain": dict(
        dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, hidden_dim=172, max_seq_len=64
    ),
    "odd": dict(
        dim=36,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        vocab_size=77,
        hidden_dim=52,
        max_seq_len=40,
        tied=False,
        rope_theta=5e4,
        norm_eps=1e-6,
    ),
    "one": dict(
        dim=20, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=17, hidden_dim=4, max_seq_len=33
    ),
    "wide": dict(
        dim=288, n_layers=1, n_heads=6, n_kv_heads=1, vocab_size=300, hidden_dim=768, max_seq_len=48
    ),
    "wide heads": dict(
        dim=36, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=90, max_seq_len=40, head_dim=22
    ),
    "narrow heads": dict(
        dim=60, n_layers=2, n_heads=3, n_kv_heads=1, vocab_size=90, max_seq_len=40, head_dim=2
    ),
}
SHAPES["wide heads"]["hidden_dim"] = SHAPES["narrow heads"]["hidden_dim"] = 20
ONLY_V3 = ("odd", "wide heads", "narrow heads")  # llama2.c's versions cannot hold them


def make(shape, **changes):
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**{**SHAPES[shape], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms that matter, weights that make sharp attention
            p.copy_(1 + 0.2 * torch.randn_like(p) if p.ndim == 1 else 4 * p)
    return model


def save(model, path, version, fmt="q8_0", tokenizer=None):
    with open(path, "wb") as f:
        if version == 3:
            export.write_v3(f, model.args, model.state_dict(), fmt, tokenizer)
        else:
            {0: export.write_v0, 2: export.write_v2}[version](f, model.args, model.state_dict())
    return path


def dequantized(model, group, dtype):
    """The model with the weights that the int8 file really holds."""
    twin, source = Transformer(model.args).eval(), Transformer(model.args)
    version_3 = dtype == "<f2" and group > 16
    source.load_state_dict(balanced(model, group) if version_3 else model.state_dict())
    with torch.no_grad():
        for p, q in zip(source.parameters(), twin.parameters()):
            if p.ndim == 1:
                q.copy_(p)
                continue
            w = export.pad(p.detach().numpy(), 1, group)
            ints, scale = export.quantize(w, group, dtype)
            w = ints.reshape(len(w), -1, group) * scale.astype(np.float32)[..., None]
            q.copy_(torch.from_numpy(w.reshape(len(w), -1)[:, : p.shape[1]]))
    return twin


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).reshape(-1, len(ids), model.args.vocab_size)[0].numpy()


def c_logits(lib, path, ids, vocab, isa=-1, threads=1, block=64, cache=-1):
    out = np.zeros((len(ids), vocab), np.float32)
    isa = isa % len(lib.isas)
    failed = lib.logits_of(
        str(path).encode(),
        isa,
        threads,
        block,
        cache,
        pointer(np.array(ids, np.int32)),
        len(ids),
        pointer(out),
    )
    assert not failed
    return out


@pytest.fixture(scope="session")
def stories(build, stories260k_bin, tok512_model):
    """stories260K in every version: {"v0": path, ...}, with the tokenizer where there is room."""
    args, weights = export.read_v0(stories260k_bin)
    tokenizer = Tokenizer(tok512_model)
    tokenizer.export(build / "tok512.bin")
    paths = {"v0": stories260k_bin}
    writers = {
        "v2": lambda f: export.write_v2(f, args, weights),
        "v3": lambda f: export.write_v3(f, args, weights, "q8_0", tokenizer),
        "v3_fp32": lambda f: export.write_v3(f, args, weights, "fp32", tokenizer),
    }
    for name, write in writers.items():
        paths[name] = build / f"stories_{name}.bin"
        with open(paths[name], "wb") as f:
            write(f)
    return paths


@pytest.fixture(scope="session")
def own(build):
    """A model and a tokenizer made here, for what needs no real one: (path, Tokenizer)."""
    import sentencepiece

    text = build / "text.txt"
    rng = np.random.default_rng(0)
    syllables = ["ba", "lo", "mi", "tu", "ra", "sen", "dor", "ki", "pa", "él", "한", "글"]
    text.write_text(
        "\n".join(
            " ".join("".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(12))
            for _ in range(300)
        ),
        encoding="utf-8",
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(build / "own"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    tokenizer = Tokenizer(build / "own.model")
    torch.manual_seed(3)
    model = Transformer(
        ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=400, hidden_dim=64, max_seq_len=64)
    )
    return save(model, build / "own.bin", 3, tokenizer=tokenizer), tokenizer


# -----------------------------------------------------------------------------
# Kernels


def test_half_is_ieee(lib):
    every = np.arange(65536, dtype=np.uint16)
    every = every[np.isfinite(every.view(np.float16))]
    back = np.array([lib.of_half(int(h)) for h in every], np.float32)
    assert np.array_equal(back, every.view(np.float16).astype(np.float32))
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    x *= 10.0 ** np.random.default_rng(1).integers(-9, 4, 4000).astype(np.float32)
    got = np.array([lib.half_of(ctypes.c_float(v)) for v in x], np.uint16)
    assert np.array_equal(got, x.astype(np.float16).view(np.uint16))
    assert lib.half_of(ctypes.c_float(1e9)) == np.float16(65504).view(np.uint16)


def test_exp_sum_and_maximum(lib):
    for isa in range(len(lib.isas)):
        for n in (1, 3, 16, 63, 64, 65, 1000):
            padded = floats(np.random.default_rng(n).uniform(-30, 5, n + 15))
            x = padded[:n]
            want = np.exp(x.astype(np.float64))
            assert lib.maximum_of(isa, pointer(padded), n) == x.max()
            total = lib.exps_of(isa, pointer(padded), n)
            assert np.abs(x / want - 1).max() < 3e-7
            assert abs(total / want.sum() - 1) < 1e-5 and not padded[n : -(-n // 16) * 16].any()
            least = float(np.median(x))
            above = lib.above_of(isa, pointer(padded), n, ctypes.c_float(least))
            assert abs(above - x[x > np.float32(least)].sum(dtype=np.float64)) < 1e-5 * want.sum()
        x = floats([1, np.nan, -np.inf, 2] * 12)
        assert lib.maximum_of(isa, pointer(x), len(x)) == 2
        lib.exps_of(isa, pointer(x), len(x))
        assert x[1] == 0 and x[2] < 1e-37 and abs(x[3] - np.exp(2)) < 1e-5


@pytest.mark.parametrize("group", [4, 8, 12, 16, 32, 64, 128])
def test_q8_product(lib, group):
    """Every instruction set, odd sizes, one row, group edges: the exact product of what was
    quantized, and each row the same whether alone or in a block."""
    rng = np.random.default_rng(group)
    for rows, cols, B in [
        (1, 4, 1),
        (15, group, 2),
        (16, 2 * group, 9),
        (17, 172, 8),
        (33, 3 * group + 1, 5),
        (40, 67, 17),
    ]:
        w, x = floats(rng.normal(size=(rows, cols))), floats(rng.normal(size=(B, cols)))
        w[0, : cols // 2] *= 50
        for isa in range(len(lib.isas)):
            out = np.zeros((B, -(-rows // 16) * 16), np.float32)
            seen_w, seen_x = np.zeros_like(w), np.zeros_like(x)
            lib.product_of(
                isa,
                1,
                group,
                pointer(w),
                rows,
                cols,
                pointer(x),
                B,
                pointer(out),
                pointer(seen_w),
                pointer(seen_x),
            )
            want = seen_x.astype(np.float64) @ seen_w.astype(np.float64).T
            size = np.abs(seen_x) @ np.abs(seen_w).T + 1e-6
            assert (np.abs(out[:, :rows] - want) / size).max() < 1e-6
            assert (out[:, rows:] == 0).all()
            error = np.abs(seen_x - x).max() / np.abs(x).max()
            assert error < 1 / 16256 and np.abs(seen_w - w).max() < 0.502 * np.abs(w).max() / 127
            for b in (0, B - 1):
                one = np.zeros((1, out.shape[1]), np.float32)
                lib.product_of(
                    isa,
                    1,
                    group,
                    pointer(w),
                    rows,
                    cols,
                    pointer(x[b : b + 1].copy()),
                    1,
                    pointer(one),
                    pointer(seen_w),
                    pointer(seen_x[:1].copy()),
                )
                assert np.array_equal(one[0], out[b])


def test_fp32_product(lib):
    rng = np.random.default_rng(0)
    for rows, cols, B in [(1, 1, 1), (15, 3, 2), (16, 64, 9), (17, 172, 8), (40, 67, 5)]:
        w, x = floats(rng.normal(size=(rows, cols))), floats(rng.normal(size=(B, cols)))
        want = x.astype(np.float64) @ w.astype(np.float64).T
        for isa in range(len(lib.isas)):
            out = np.zeros((B, -(-rows // 16) * 16), np.float32)
            lib.product_of(
                isa, 0, 32, pointer(w), rows, cols, pointer(x), B, pointer(out), None, None
            )
            assert np.abs(out[:, :rows] - want).max() < 1e-5 * cols**0.5


def test_normalize(lib):
    rng = np.random.default_rng(2)
    for n in (1, 2, 7, 16, 36, 67, 288):
        x, weight, out = (
            np.zeros(n + 15, np.float32),
            floats(rng.normal(size=n)),
            np.zeros(n + 1, np.float32),
        )
        x[:n] = rng.normal(size=n) * 10.0 ** rng.integers(-3, 3)
        wide = x[:n].astype(np.float64)
        want = weight * wide / np.sqrt(np.square(wide).mean() + np.float32(1e-5))
        for isa in range(len(lib.isas)):
            lib.norm_of(isa, pointer(out), pointer(x), pointer(weight), n, ctypes.c_float(1e-5))
            assert np.abs(out[:n] - want).max() < 2e-6 * np.abs(want).max() and out[n] == 0


def test_softmax(lib):
    rng = np.random.default_rng(3)
    for n in (1, 3, 15, 16, 17, 64, 100, 333):
        for isa in range(len(lib.isas)):
            x = floats(rng.normal(size=n + 15) * 20)
            want = np.exp(x[:n].astype(np.float64) - x[:n].max())
            total = lib.softmax_of(isa, pointer(x), n)
            assert abs(total / want.sum() - 1) < 1e-6 and np.abs(x[:n] - want).max() < 1e-6
            assert (x[n : -(-n // 16) * 16] < 1e-37).all()  # they have no weight
            x[:n], x[n // 2] = 1, np.nan
            assert np.isnan(lib.softmax_of(isa, pointer(x), n))


def test_swiglu(lib):
    rng = np.random.default_rng(4)
    for F in (1, 4, 16, 52, 172):
        gate, value, out = (
            floats(rng.normal(size=F) * 4),
            floats(rng.normal(size=F)),
            np.zeros(F, np.float32),
        )
        gate[:4] = np.array([-200, 200, -88.5, 0])[:F]
        wide = gate.astype(np.float64)
        want = wide / (1 + np.exp(-wide)) * value
        for isa in range(len(lib.isas)):
            lib.swiglu_of(isa, pointer(gate), pointer(value), F, pointer(out))
            assert np.abs(out - want).max() < 1e-6 * np.abs(want).max() + 1e-30


@pytest.mark.parametrize("half", [0, 1])
def test_attention(lib, half):
    """Scores, softmax and the mix of values, in the tiles of a cache, beside numpy."""
    rng = np.random.default_rng(5)
    for H, K, E, n in [
        (1, 1, 2, 1),
        (8, 4, 8, 17),
        (6, 2, 6, 15),
        (2, 1, 20, 16),
        (3, 3, 48, 33),
        (4, 1, 64, 100),
    ]:
        q, keys, values = (floats(rng.normal(size=size)) for size in ((H, E), (K, n, E), (K, n, E)))
        if half:  # numbers that the cache holds exactly
            keys, values = (floats(a.astype(np.float16)) for a in (keys, values))
        scores = np.einsum("hge,hte->hgt", q.reshape(K, H // K, E).astype(np.float64), keys)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        want = np.einsum("hgt,hte->hge", p / p.sum(-1, keepdims=True), values).reshape(H, E)
        for isa in range(len(lib.isas)):
            out = np.zeros((H, E), np.float32)
            lib.attention_of(
                isa, half, pointer(q), pointer(keys), pointer(values), H, K, E, n, pointer(out)
            )
            assert np.abs(out - want).max() < 4e-6


# -----------------------------------------------------------------------------
# The forward pass


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_pytorchs(lib, build, shape):
    model = make(shape)
    V, n = model.args.vocab_size, model.args.max_seq_len
    ids = np.random.default_rng(3).integers(0, V, n).tolist()
    want = torch_logits(model, ids)
    for version in (3,) if shape in ONLY_V3 else (0, 3):
        path = save(model, build / f"{shape}_fp32_{version}.bin", version, "fp32")
        for isa in range(len(lib.isas)):
            assert np.abs(c_logits(lib, path, ids, V, isa) - want).max() < 1e-4
    for version in (3,) if shape in ONLY_V3 else (2, 3):
        path = save(model, build / f"{shape}_q8_{version}.bin", version)
        if version == 2:  # repacked with fp16 scales
            group = struct.unpack_from("<i", path.read_bytes(), 37)[0]
            twin, tolerance = dequantized(model, group, "<f4"), 1e-2
        else:
            group = struct.unpack_from("<i", path.read_bytes(), 40)[0]
            twin, tolerance = dequantized(model, group, "<f2"), 4e-3
        want = torch_logits(twin, ids)
        for isa in range(len(lib.isas)):
            got = c_logits(lib, path, ids, V, isa)
            assert np.abs(got - want).max() < tolerance * max(1, np.abs(want).max())


@pytest.mark.parametrize("group", [32, 64])
def test_groups_that_straddle_rows(lib, build, group):
    """Where the hidden size, 172, is no multiple of the group, as llama2.c may write version 2."""
    model = make("plain")
    twin, V = Transformer(model.args).eval(), model.args.vocab_size
    state, data = dict(model.state_dict()), save(model, build / "straddle.bin", 2).read_bytes()
    data = patched(data[:256], 37, "<i", group)
    data += b"".join(export.floats(w).tobytes() for w in export.norms(model.args, state))
    for name, w in model.named_parameters():
        if w.ndim == 2:
            q, scale = export.quantize(w.detach().numpy().reshape(1, -1), group, "<f4")
            state[name] = torch.from_numpy(
                (q.reshape(-1, group) * scale.reshape(-1, 1)).reshape(w.shape)
            )
    twin.load_state_dict(state)
    for w in export.matrices(model.args, model.state_dict()):
        q, scale = export.quantize(export.floats(w).reshape(1, -1), group, "<f4")
        data += q.tobytes() + scale.tobytes()
    (build / "straddle.bin").write_bytes(data)
    ids = np.random.default_rng(5).integers(0, V, 40).tolist()
    want = torch_logits(twin, ids)
    wrong = c_logits(lib, build / "straddle.bin", ids, V) - want
    # Quantized anew, row by row: an error of the size of that of the file's own quantization.
    assert np.square(wrong).mean() < 4 * np.square(want - torch_logits(model, ids)).mean()


def test_threads_and_blocks_change_nothing(lib, build):
    for shape, fmt in [(s, "q8_0") for s in SHAPES if s != "one"] + [("plain", "fp32")]:
        model = make(shape)
        path = save(model, build / f"same_{shape}_{fmt}.bin", 3, fmt)
        V, n = model.args.vocab_size, model.args.max_seq_len
        ids = np.random.default_rng(4).integers(0, V, n).tolist()
        want = c_logits(lib, path, ids, V)
        for threads, block in [(1, 1), (1, 7), (2, 64), (2, 9), (3, 5), (4, 64)]:
            assert np.array_equal(c_logits(lib, path, ids, V, -1, threads, block), want)
        assert np.array_equal(c_logits(lib, path, ids[:20], V), want[:20])


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 64,
}


@pytest.mark.parametrize("scaling", [{"factor": 4.0}, LLAMA3_ROPE])
def test_rope_scaling(lib, build, scaling):
    model = make("plain", rope_scaling=scaling, max_seq_len=200)
    ids = np.random.default_rng(3).integers(0, 512, 200).tolist()
    path = save(model, build / "scaled.bin", 3, "fp32")
    numbers = ([*scaling.values()] + [0, 0, 0])[:4]
    path.write_bytes(patched(path.read_bytes(), 112, "<3fi", *numbers[:3], int(numbers[3])))
    want = torch_logits(model, ids)
    assert np.abs(c_logits(lib, path, ids, 512) - want).max() < 1e-4
    path.write_bytes(patched(path.read_bytes(), 112, "<3fi", 0, 0, 0, 0))
    assert np.abs(c_logits(lib, path, ids, 512) - want).max() > 0.1


def test_file_of_more_than_4_gib(lib, build):
    """A classifier of its own, of 2^22 rows, puts the embedding's end and all layers beyond."""
    model = make("one", dim=260, tied=False)
    small, huge, D, V = build / "small.bin", build / "huge.bin", 260, 1 << 22
    data = save(model, small, 3, "fp32").read_bytes()
    row = 4 * D  # bytes; the header, 32 rows (17 padded), the layers, as many rows
    head = patched(patched(data, 28, "<i", V), 80, "<Q", len(data) + 2 * row * (V - 32))
    head = patched(head, 64, "<Q", len(data) + 2 * row * (V - 32))[:256]
    try:
        with open(huge, "wb") as f:  # what is not written is a hole, and reads as zero
            f.write(head)
            f.seek(256 + row * (V - 32))
            f.write(data[256 : len(data) - 32 * row])  # the last 32 rows are those of the small one
            f.truncate(len(data) + 2 * row * (V - 32))
        if os.stat(huge).st_blocks * 512 > 1 << 30:
            pytest.skip("this file system writes holes")
        for token in range(17):
            a, b = np.zeros(D, np.float32), np.zeros(D, np.float32)
            assert lib.stream_of(str(small).encode(), token, pointer(a)) == 0
            assert lib.stream_of(str(huge).encode(), V - 32 + token, pointer(b)) == 0
            assert a.any() and np.array_equal(a, b)
    finally:
        huge.unlink(missing_ok=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_long_context_takes_no_memory_until_it_is_used(program, own, build):
    """The caches of 2^20 positions would take 268 MB and their angles 33; one turn takes little."""
    path = build / "long.bin"
    path.write_bytes(patched(own[0].read_bytes(), 32, "<i", 1 << 20))
    with subprocess.Popen(
        [program, path, "-m", "chat", "-i", "balo", "-n", "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        while not child.stdout.readline().startswith(b"Assistant:"):
            pass  # after it the program waits for the next turn
        status = Path(f"/proc/{child.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 20_000
    assert int(re.search(r"VmPeak:\s+(\d+) kB", status)[1]) > 290_000


def test_more_end_ids(program, own, lib, build):
    args = ["-t", 0, "-n", 30, "-i", "balo mi"]
    whole = call(program, own[0], *args)
    ids = own[1].encode("balo mi", True, False)
    story = []
    for _ in range(20):
        story.append(int(c_logits(lib, own[0], ids + story, 400)[-1].argmax()))
    last = max(map(story.index, story))  # of the tokens that are no repetition
    assert last > 1
    for slot in range(4):
        path = build / "ends.bin"
        path.write_bytes(patched(own[0].read_bytes(), 128 + 4 * slot, "<i", story[last]))
        done = call(program, path, *args)
        told = int(re.search(r"story: (\d+) tokens", done.err)[1])
        assert told == last + 1 and whole.text.startswith(done.text[:-1])


def test_golden_story(program, lib, stories, build):
    """The known greedy story, letter for letter: fp32, int8, all versions, and all instruction sets
    that this processor has."""
    texts = set()
    for name, path in stories.items():
        for isa in lib.isas:
            tokenizer = ["-z", build / "tok512.bin"] if name in ("v0", "v2") else []
            args = [path, *tokenizer, "-t", 0, "-n", 500]
            texts.add(call(program, *args, env={"RUN_ISA": isa}).text)
    (text,) = texts
    assert text.startswith(GOLDEN_START) and text.endswith(GOLDEN_END + '"\n')


def test_what_an_fp16_cache_costs(lib, stories, tok512_model, real_stories):
    """Of int8's error: the same int8 weights with an fp16 and with an fp32 cache. What it adds is a
    tenth of what the weights cost (0.0033 beside 0.053 when this was written)."""
    told = json.loads((real_stories / "data00.json").read_text())[0]["story"]
    ids = Tokenizer(tok512_model).encode(told, True, False)[:400]
    exact, int8, both = (
        c_logits(lib, stories[name], ids, 512, cache=cache)
        for name, cache in (("v3_fp32", 0), ("v3", 0), ("v3", 1))
    )

    def rms(x):
        return float(np.sqrt(np.square(x).mean()))

    assert 0 < rms(both - int8) < 0.1 * rms(int8 - exact)
    assert np.array_equal(both, c_logits(lib, stories["v3"], ids, 512))


def test_perplexity(program, stories, build, stories260k_bin, real_stories, tok512_model):
    from checkpoint import model_from_checkpoint

    told = json.loads((real_stories / "data00.json").read_text())[:40]
    text = build / "stories.txt"
    text.write_text("<|endoftext|>\n".join(s["story"].strip() + "\n" for s in told))
    tokenizer = Tokenizer(tok512_model)
    ids = sum((tokenizer.encode(s["story"].strip(), True, False) for s in told), [])
    args, weights = export.read_v0(stories260k_bin)
    model = model_from_checkpoint({"model": weights, "model_args": checkpoint_args(args)}).eval()
    loss = 0
    for i in range(0, len(ids) - 1, 512):
        window = ids[i : i + 513]
        logits = torch.from_numpy(torch_logits(model, window[:-1]))
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum")
    loss = float(loss) / (len(ids) - 1)
    found = {
        name: call(program, stories[name], "-m", "perplexity", "-i", text).text.split()
        for name in ("v3", "v3_fp32")
    }
    assert int(found["v3"][4]) == len(ids) - 1
    fp32, int8 = (float(found[name][1].rstrip(",")) for name in ("v3_fp32", "v3"))
    assert abs(fp32 - loss) < 1e-3
    assert abs(int8 - fp32) < 0.005


# -----------------------------------------------------------------------------
# The tokenizer

ODD = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  a  b  ",
    "\n",
    "\n\n\t",
    "é",
    "한국어 문장",
    "👍🏽 emoji 👨‍👩‍👧",
    "▁",
    "▁▁x▁",
    "x▁",
    "<s>",
    "</s> <unk> <0x41>",
    "\x00",
    "a\x00b",
    "日本語テキスト",
    "ﬁ ligature",
    "A" * 300,
    "1234567890",
    "'quoted' \"text\"",
    "\u00a0nbsp",
    "mixed 한 é 👍 <0xE2>",
    "e\u0301",
    "\r\n",
]


def piece_bytes(lib, token):
    buffer = ctypes.create_string_buffer(4096)
    n = lib.bytes_of(token, buffer)
    return buffer.raw[:n]


def check_tokenizer(lib, tokenizer, strings, flags=(-1,)):
    """C's ids are SentencePiece's; and their bytes are the text again."""
    blob = export.tokenizer_blob(tokenizer)
    squeeze = tokenizer.encode(" a  b ", False, False) == tokenizer.encode("a b", False, False)
    for flag in {int(squeeze), *flags}:  # told by the header, or guessed
        assert lib.open_tok(blob, len(blob), 0, tokenizer.n_words, flag) == 0
        for text in strings:
            data = text.encode()
            out = np.zeros(len(data) + 3, np.int32)
            n = lib.encode_into(data, len(data), 1, pointer(out))
            assert out[:n].tolist() == tokenizer.encode(text, True, False), text
    not_utf8 = [b"\xff\xfe", b"a\x80\xc3", b"\xed\xa0\x80 x"]
    for data in [s.encode() for s in strings[:200]] + not_utf8:
        if squeeze and (data.strip() != data or b"  " in data or b"\xe2\x96\x81" in data):
            continue
        out = np.zeros(len(data) + 3, np.int32)
        n = lib.encode_into(data, len(data), 1, pointer(out))
        back = b"".join(piece_bytes(lib, int(i)) for i in out[1:n])
        assert back == (b" " + data.replace(b"\xe2\x96\x81", b" ") if data else b"")


def random_strings(n, seed=0):
    rng = np.random.default_rng(seed)
    alphabet = list("abcdefghij klmnop qrstuvwxyz ABC ,.!?'\"\n  012") + list("éüñ한글日本👍▁ß…")
    return ["".join(rng.choice(alphabet, rng.integers(1, 60))) for _ in range(n)]


def test_encode_is_sentencepieces(lib, tok512_model, real_stories):
    told = json.loads((real_stories / "data00.json").read_text())
    strings = ODD + [s["story"][:400] for s in told[:600]] + random_strings(400)
    assert len(strings) > 1000
    check_tokenizer(lib, Tokenizer(tok512_model), strings)
    llama = real_stories.parent / "llama2/tokenizer.model"
    if llama.exists():
        check_tokenizer(lib, Tokenizer(llama), strings)


def test_encode_with_own_vocabulary(lib, own):
    check_tokenizer(lib, own[1], ODD + random_strings(300, 5), ())


def test_a_piece_of_two_spaces_says_that_text_is_not_squeezed(lib, own):
    """Where the model file does not say it, as for a tokenizer of -z."""
    text, n, found = b"balo  mi", own[1].n_words, {}
    blob = export.tokenizer_blob(own[1]) + struct.pack("<fI", -1e9, 2) + b"  "
    for squeeze in -1, 0, 1:
        assert lib.open_tok(blob, len(blob), 0, n + 1, squeeze) == 0
        out = np.zeros(64, np.int32)
        found[squeeze] = out[: lib.encode_into(text, len(text), 1, pointer(out))].tolist()
    assert found[-1] == found[0] != found[1]


def test_a_vocabulary_without_byte_fallback(lib, build):
    """Neighbouring unknown characters are one unknown token, and of equal pairs that overlap the
    first is merged, as in SentencePiece."""
    import sentencepiece

    (build / "few.txt").write_text("abc cab\nbca abcab ccc\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(build / "few.txt"),
        model_prefix=str(build / "few"),
        model_type="bpe",
        vocab_size=16,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = Tokenizer(build / "few.model")
    blob = export.tokenizer_blob(tokenizer)
    assert lib.open_tok(blob, len(blob), 0, tokenizer.n_words, 1) == 0
    unknown = ("x", "é", "日本 abc", "abcxyz cab", "é é", "xa日b日", "cab 한글x", "<0x41>")
    for text in (*unknown, "ccc", "abccccc", "b" + "c" * 9):
        out = np.zeros(64, np.int32)
        n = lib.encode_into(text.encode(), len(text.encode()), 1, pointer(out))
        assert out[:n].tolist() == tokenizer.encode(text, True, False), text


# Byte-level BPE, beside the library `tokenizers`

SCRIPTS = {  # (first, last) code points
    "latin": (0xC0, 0x24F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "armenian": (0x530, 0x58F),
    "hebrew": (0x591, 0x5F4),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "tamil": (0xB80, 0xBFF),
    "thai": (0xE01, 0xE5B),
    "georgian": (0x10A0, 0x10FF),
    "ethiopic": (0x1200, 0x137F),
    "khmer": (0x1780, 0x17F9),
    "kana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "gothic": (0x10330, 0x1034A),
    "emoji": (0x1F300, 0x1F6FF),
    "spaces": (0x1FFE, 0x2031),
    "letters in numbers": (0x2150, 0x218B),
    "fullwidth": (0xFF01, 0xFF5E),
}
SPECIAL = ["<|begin|>", "<|end|>", "<|start_header|>", "<|end_header|>", "<|eot|>", "<|e"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def scripts_text(n, seed=0):
    """n strings of words, numbers, punctuation and white space, each mostly in one script."""
    rng = np.random.default_rng(seed)
    marks = list(" .,!?'\"\n\r\t-–…()0123456789") + [
        "  ",
        "\r\n",
        "\n\n ",
        "\u00a0",
        "\u3000",
        "'s",
        "'LL",
        "'ſ",
        "'rE",
        "'d",
        " 't",
        "\x00",
        "\x85",
        "½",
        "²",
        "٣",
        "ⅷ",
        "_",
        "e\u0301",
        "\u200d",
    ]

    def word(first, last):
        letters = "".join(map(chr, rng.integers(first, last + 1, rng.integers(1, 8))))
        return letters if rng.random() < 0.8 else rng.choice(["don't", "I'll", "A1b22", "x" * 40])

    return [
        "".join(
            word(*span) + "".join(rng.choice(marks, rng.integers(0, 5)))
            for _ in range(rng.integers(1, 12))
        )
        for _, span in zip(range(n), list(SCRIPTS.values()) * n)
    ]


def class_ranges(tokenizers):
    """The Unicode ranges of letters, numbers and white space, as the library's own regex has it."""
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    spans = []
    for kind, others in enumerate((r"\P{L}+", r"\P{N}+", r"\S+"), 1):
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(others), "removed")
        spans += [(ord(run[0]), ord(run[-1]), kind) for run, _ in split.pre_tokenize_str(every)]
    assert all(hi - lo < 0x20000 for lo, hi, _ in spans) and len(spans) > 700
    return sorted(spans)


def byte_level_blob(tk, ranges, pattern, flags):
    """A tokenizer of kind 1, as run.c describes it."""
    from tokenizers import pre_tokenizers

    data = json.loads(tk.to_str())
    known = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in known}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in known)}
    assert set(byte_of) == set(pre_tokenizers.ByteLevel.alphabet())
    vocab, special = data["model"]["vocab"], {t["content"] for t in data["added_tokens"]}
    pieces = sorted(
        {**vocab, **{t["content"]: t["id"] for t in data["added_tokens"]}}.items(),
        key=lambda item: item[1],
    )
    assert [i for _, i in pieces] == list(range(len(pieces)))
    blob = struct.pack("<I", len(ranges)) + b"".join(struct.pack("<3I", *r) for r in ranges)
    merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
    blob += struct.pack("<3I", pattern, flags, len(merges))
    blob += b"".join(struct.pack("<3I", vocab[a], vocab[b], vocab[a + b]) for a, b in merges)
    for text, _ in pieces:
        raw = text.encode() if text in special else bytes(byte_of[c] for c in text)
        blob += struct.pack("<I", len(raw) << 1 | (text in special)) + raw
    return blob, len(pieces)


@pytest.fixture(scope="session")
def byte_level(build):
    """{name: (library's tokenizer, blob, size)} of every kind, trained on text made here."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    ranges, made = class_ranges(tokenizers), {}
    level, bare = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    llama = [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"), bare]
    digits = pre_tokenizers.Digits(individual_digits=True)
    prefix = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for name, parts, pattern, flags in [
        ("GPT-2", [level], 0, 0),
        ("Llama 3", llama, 1, 1),
        ("SmolLM2", [digits, level], 0, 2),
        ("prefix", [prefix], 0, 4),
        ("digits, prefix", [digits, prefix], 0, 6),
        ("not cut", [bare], 2, 0),
    ]:
        tk = tokenizers.Tokenizer(models.BPE(ignore_merges=bool(flags & 1)))
        tk.pre_tokenizer = pre_tokenizers.Sequence(parts)
        texts = [t for t in scripts_text(600, 1)] + [GOLDEN_START * 3] * 20
        tk.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=1500,
                initial_alphabet=level.alphabet(),
                special_tokens=SPECIAL,
                show_progress=False,
            ),
        )
        if name == "Llama 3":  # every split of every piece, as its tokenizer.json has it
            data = json.loads(tk.to_str())
            vocab = data["model"]["vocab"]
            data["model"]["merges"] = [
                [piece[:i], piece[i:]]
                for piece, rank in sorted(vocab.items(), key=lambda x: x[1])
                if piece not in SPECIAL and rank % 9  # some are reached as whole words only
                for i in sorted(range(1, len(piece)), key=lambda i: vocab.get(piece[:i], 0))
                if piece[:i] in vocab and piece[i:] in vocab
            ]
            tk = tokenizers.Tokenizer.from_str(json.dumps(data))
        made[name] = (tk, *byte_level_blob(tk, ranges, pattern, flags))
    return made


def byte_level_ids(lib, data):
    out = np.zeros(2 * len(data) + 2, np.int32)
    return out[: lib.encode_into(data, len(data), 0, pointer(out))].tolist()


def test_byte_level_ids_are_the_librarys(lib, byte_level):
    """1,000 strings in 20 scripts and the odd ones; and their bytes are the text again."""
    strings = (
        ODD
        + scripts_text(1000, 2)
        + [
            GOLDEN_START,
            "x'ſab 'LLab 'Llab 'vEab 'llab 'tab",
            "a\r\n \n  b \t\tc!\r\n\n",
            "12345 1234567",
            " \n",
        ]
    )
    for name, (tk, blob, n) in byte_level.items():
        assert lib.open_tok(blob, len(blob), 1, n, 0) == 0
        for text in strings:
            data, want = text.encode(), tk.encode(text, add_special_tokens=False).ids
            if any(s in text for s in SPECIAL):
                continue
            got = byte_level_ids(lib, data)
            assert got == want, (name, text)
            if name in ("GPT-2", "Llama 3", "SmolLM2", "not cut"):
                assert b"".join(piece_bytes(lib, i) for i in got) == data
        for data in (
            b"\xff\xfe",
            b"a\x80\xc3",
            b"\xed\xa0\x80 x",
            b"\xf4\xbf\xbf\xbf",
            bytes(range(256)),
        ):
            got = byte_level_ids(lib, data)  # not UTF-8
            assert "prefix" in name or b"".join(piece_bytes(lib, i) for i in got) == data


# Chat templates


def render_like_the_manual(encode, special, template, exchanges, system, bos, eos):
    """The ids of a dialogue, from the description: cut at tokens, then insert, then encode."""
    named = {"{bos}": bos, "{eos}": eos, **special}
    cut = "|".join(map(re.escape, sorted([*named, "{reply}"], key=len, reverse=True)))
    ids, ends = [], []
    for i, (user, reply) in enumerate(exchanges):
        text = (
            template.get("next", template["turn"])
            if i
            else template["system" if system else "turn"]
        )
        for part in re.split(f"({cut})", text):
            if part == "{reply}":
                ends.append(len(ids))
                ids += reply
            elif part in named:
                ids.append(named[part])
            elif part:
                parts = re.split(r"(\{user\}|\{system\})", part)
                ids += encode(
                    "".join({"{user}": user, "{system}": system}.get(p, p) for p in parts)
                )
    return ids[: ends[-1]], ids[ends[-1] + len(exchanges[-1][1]) :]


LLAMA2_CHAT = {
    "turn": "{bos}[INST] {user} [/INST]{reply}{eos}",
    "system": "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]{reply}{eos}",
}
HEADERS = (
    "<|start_header|>user<|end_header|>\n\n{user}<|eot|><|start_header|>assistant"
    "<|end_header|>\n\n{reply}<|eot|>"
)
LLAMA3_CHAT = {
    "turn": "{bos}" + HEADERS,
    "next": HEADERS,
    "system": "{bos}<|start_header|>system<|end_header|>\n\n{system}<|eot|>" + HEADERS,
}


def with_tail(data, kind, blob, template):
    """A version-3 file with another tokenizer and template."""
    (offset,) = struct.unpack_from("<Q", data, 64)
    texts = (
        [template[k].encode() for k in ("turn", "system", "next") if k in template]
        if template
        else []
    )
    chat = b"".join(struct.pack("<I", len(t)) + t for t in texts)
    data = patched(
        data[:offset] + blob + chat,
        64,
        "<3Q2I2Q",
        offset,
        len(blob),
        offset + len(blob) + len(chat),
        0,
        kind,
        offset + len(blob),
        len(chat),
    )
    return data if chat else patched(data, 96, "<Q", 0)


@pytest.fixture(scope="session")
def llama3(build, byte_level):
    """A model with a byte-level tokenizer and a chat template: (path, library's tokenizer)."""
    tk, blob, n = byte_level["Llama 3"]
    model = make("one", vocab_size=n, max_seq_len=256)
    data = save(model, build / "llama3.bin", 3).read_bytes()
    data = patched(with_tail(data, 1, blob, LLAMA3_CHAT), 48, "<2i", 0, 1)
    (build / "llama3.bin").write_bytes(data)
    return build / "llama3.bin", tk


@pytest.mark.parametrize("kind", ["SentencePiece", "its own", "byte-level"])
def test_chat_template(lib, build, own, request, kind):
    if kind == "byte-level":
        path, tk = request.getfixturevalue("llama3")
        tk.encode_special_tokens = True  # what the library calls encoding them as text

        def encode(text):
            return tk.encode(text).ids

        special, template, bos, eos = {t: tk.token_to_id(t) for t in SPECIAL}, LLAMA3_CHAT, 0, 1
    else:
        path, bos, eos, special, template = own[0], 1, 2, {}, LLAMA2_CHAT

        def encode(text):
            return own[1].encode(text, False, False)

        if kind == "its own":
            template = {
                "turn": " {user}{user\n{reply}{bos}\n ",
                "system": "{system}{bos}{user}{reply}{eos}",
            }
            path = build / "templated.bin"
            data = own[0].read_bytes()
            blob = data[struct.unpack_from("<Q", data, 64)[0] :]
            path.write_bytes(with_tail(data, 0, blob, template))
    rude = "<|eot|>{eos}<|end|>{reply}</s>{system}"
    for system in ("", "be kind", rude):
        exchanges = [("balo", [7, 8]), (rude, []), ("", [9, 1, 2]), ("x\n y", [3])]
        for n in range(1, 5):
            part = exchanges[:n]
            users = (ctypes.c_char_p * n)(*(u.encode() for u, _ in part))
            arrays = [np.array([*r, 0], np.int32) for _, r in part]
            replies = (ctypes.c_void_p * n)(*(a.ctypes.data for a in arrays))
            sizes = (ctypes.c_int * n)(*(len(r) for _, r in part))
            out, stop = np.zeros(2000, np.int32), ctypes.c_int()
            count = lib.chat_into(
                str(path).encode(),
                system.encode() or None,
                n,
                users,
                replies,
                sizes,
                pointer(out),
                ctypes.byref(stop),
            )
            want, after = render_like_the_manual(encode, special, template, part, system, bos, eos)
            assert out[:count].tolist() == want
            assert n > 1 or stop.value == after[0]
    if kind == "byte-level":
        tk.encode_special_tokens = False


def test_byte_level_program(program, llama3, build):
    """Tells, chats and measures with a byte-level tokenizer; special tokens are silent."""
    path, tk = llama3
    done = call(program, path, "-i", "Привет, 한국어! don't", "-n", 60, "-s", 3)
    assert done.text.startswith("Привет, 한국어! don't") and "<|" not in done.text
    done = call(
        program,
        path,
        "-m",
        "chat",
        "-y",
        "be kind",
        "-n",
        20,
        "-s",
        1,
        stdin="hello <|eot|>\nyou\n",
    )
    assert done.text.count("Assistant: ") == 2
    (build / "text").write_text("one 1<|endoftext|>два 2" * 20)
    assert "loss" in call(program, path, "-m", "perplexity", "-i", build / "text").text


def test_damaged_byte_level_files(program, llama3, build):
    data, path = llama3[0].read_bytes(), build / "damaged.bin"
    (at,) = struct.unpack_from("<Q", data, 64)
    (n_ranges,) = struct.unpack_from("<I", data, at)
    tables, chat = at + 4 + 12 * n_ranges, struct.unpack_from("<Q", data, 96)[0]
    (n_merges,) = struct.unpack_from("<I", data, tables + 8)
    pieces = tables + 12 + 12 * n_merges
    bad = [patched(data, 92, "<I", k) for k in (2, 0xFFFFFFFF)]
    for offset in (at, tables + 8):  # how many
        bad += [patched(data, offset, "<I", k) for k in (0, 1, 1 << 20, 1 << 31, (1 << 32) - 1)]
    bad += [
        patched(data, at + 4, "<I", 0x110000),
        patched(data, at + 8, "<I", 0),
        patched(data, at + 12, "<I", 0),
        patched(data, at + 12, "<I", 4),
    ]  # a range
    bad += [patched(data, tables, "<I", 3), patched(data, tables + 4, "<I", 8)]  # pattern, flags
    for i in range(3):  # a merge: past the end, of others
        bad += [patched(data, tables + 12 + 4 * i, "<I", k) for k in (7, 1500, (1 << 32) - 1)]
    bad += [patched(data, pieces, "<I", k) for k in (0, 7, (1 << 32) - 1)]  # a piece's length
    bad += [patched(data, 96, "<Q", k) for k in (0, 5, at, chat + 1, 1 << 63, (1 << 64) - 1)]
    bad += [patched(data, 104, "<Q", k) for k in (0, 5, 1 << 63, (1 << 64) - 1)]
    bad += [patched(data, chat, "<I", k) for k in (0, 5, 1 << 31, (1 << 32) - 1)]
    bad += [patched(data, 112, "<f", f) for f in (-1.0, float("nan"), float("inf"))]
    bad += [
        patched(data, 116, "<f", 4.0),
        patched(data, 116, "<2f", 4, 1),
        patched(data, 116, "<2f", 1, 4),
        patched(data, 124, "<i", -1),
    ]  # no original context
    bad += [patched(data, 128 + 4 * i, "<i", k) for i in range(4) for k in (-1, 1500, 1 << 30)]
    for k, mutant in enumerate(bad):
        path.write_bytes(mutant)
        done = call(program, path, "-n", 2, "-j", 1, ok=None)
        assert done.returncode == 1 and done.err.startswith("error: "), (k, done.err)
        assert done.err.count("\n") == 1, k
    for template, says in (
        ({"turn": "{user}", "system": ""}, "{reply}"),
        ({"turn": "{reply}", "system": ""}, "{user}"),
        ({"turn": "{system}{user}{reply}{eos}", "system": ""}, "{system}"),
        ({"turn": "{user}{user}{reply}{eos}", "system": ""}, "{user}"),
        ({"turn": "{user}{reply} .", "system": ""}, "no token after"),
    ):
        blob = data[at:chat]
        path.write_bytes(with_tail(data, 1, blob, template))
        assert says in call(program, path, "-m", "chat", ok=1).err
    path.write_bytes(with_tail(data, 1, data[at:chat], {"turn": "{user}{reply}", "system": ""}))
    assert "{system}" in call(program, path, "-m", "chat", "-y", "be", ok=1).err
    call(program, path, "-m", "chat", "-n", 3, "-i", "x")
    done = call(program, path, "-m", "chat", "-n", 1000, "-s", 1, "-i", "", stdin="x\n")
    assert "(the message has 0 tokens" in done.err and done.text.count("Assistant:") == 1


# -----------------------------------------------------------------------------
# The sampler


def nucleus(logits, t, k, p):
    """The exact distribution: softmax of logits / t, cut to the k most probable, and to the
    smallest set of these that exceeds p."""
    q = np.exp((logits - logits.max()) / t)
    if k:
        q[q < np.sort(q)[-k]] = 0
    q /= q.sum()
    if 0 < p < 1:
        order = np.argsort(-q, kind="stable")
        more = np.cumsum(q[order]) - q[order]  # what the more probable ones sum to
        q[order[more > p]] = 0
    return q / q.sum()


@pytest.mark.parametrize(
    "t,k,p",
    [
        (1, 0, 1),
        (1, 0, 0),
        (0.7, 0, 0.9),
        (1.5, 0, 0.5),
        (1, 0, 0.01),
        (0.3, 0, 0.99),
        (1, 1, 1),
        (1.2, 7, 1),
        (1.2, 150, 0),
        (2, 20, 0.6),
        (1, 299, 0.9),
        (1, 300, 1),
    ],
)
def test_sampling_is_exact(lib, t, k, p):
    """Chi-square against the exact distribution, at a fixed seed."""
    logits = floats(np.random.default_rng(8).normal(size=300) * 2)
    want, count = nucleus(logits.astype(np.float64), t, k, p), 20000
    out = np.zeros(count, np.int32)
    lib.samples(
        pointer(logits), 300, ctypes.c_float(t), k, ctypes.c_float(p), 7, pointer(out), count
    )
    seen = np.bincount(out, minlength=300)
    assert seen[want == 0].sum() == 0
    often = want * count >= 5
    chi2 = ((seen - want * count) ** 2 / np.where(often, want * count, 1))[often].sum()
    freedom = max(1, often.sum() - 1)
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_sampling_edges(lib):
    def draw(logits, t, p, count=200, k=0):
        out, logits = np.zeros(count, np.int32), floats(logits)
        lib.samples(
            pointer(logits),
            len(logits),
            ctypes.c_float(t),
            k,
            ctypes.c_float(p),
            1,
            pointer(out),
            count,
        )
        return set(out.tolist())

    nan, inf = float("nan"), float("inf")
    assert draw([1, 3, 3, 2], 0, 0.9) == {1}  # the first of equals
    assert draw([1, 9, 3], 1, 1e-9) == {1}  # p < 1 / n leaves one
    assert draw([0] * 50, 1, 1e-9, 3000) == set(range(50))  # equals stay together
    assert draw([nan, 1, nan], 1, 0.9) == {1} == draw([nan, 1, nan], 0, 0.9)
    assert draw([-inf, 1, -inf], 1, 1) == {1}
    assert draw([nan, nan], 1, 0.9) == {-1} == draw([inf, 1], 1, 0.9)
    assert draw([5], 1, 0.5) == {0} == draw([5], 1, 1, k=1) == draw([5], 1, 1, k=9)
    assert draw([2, 1, 2, 2, 0], 1, 1, k=2) == {0, 2, 3}  # equals stay together
    assert draw([-inf, 1, nan, -80, -90], 3, 1, 9999, k=3) == {1}  # fewer are at all possible


def test_random_numbers_are_xorshift(lib):
    """Vigna's xorshift64*, seeded by his splitmix64: of 256 equal logits, a token is 8 of its bits.
    A seed must give the same text in each version of run.c."""
    bits, seed = 2**64 - 1, 11
    z = seed + 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & bits
    z = (z ^ z >> 27) * 0x94D049BB133111EB & bits
    x, want, out = (z ^ z >> 31) | 1, [], np.zeros(500, np.int32)
    for _ in out:
        x ^= x >> 12
        x = x ^ x << 25 & bits
        x ^= x >> 27
        want.append((x * 0x2545F4914F6CDD1D & bits) >> 56)
    one = ctypes.c_float(1)
    lib.samples(pointer(floats([0] * 256)), 256, one, 0, one, seed, pointer(out), len(out))
    assert out.tolist() == want


# -----------------------------------------------------------------------------
# The program


def test_batch_tells_the_stories_that_its_seeds_tell(program, own):
    common = [own[0], "-n", 30, "-i", "balo mi", "-t", 0.9]
    alone = [call(program, *common, "-s", seed).text for seed in range(5, 10)]
    assert len(set(alone)) > 1
    assert call(program, *common, "-s", 5, "-b", 5).text == "\n".join(alone)
    assert call(program, *common, "-s", 5, "-b", 5, "-j", 2).text == "\n".join(alone)


def test_chat(program, own):
    done = call(
        program, own[0], "-m", "chat", "-y", "be kind", "-n", 6, "-s", 1, stdin="balo\nmi\n\nra tu"
    )
    assert done.text.count("User: ") == 5 and done.text.count("Assistant:") == 4
    assert "forgetting" in done.err  # 64 tokens of context are soon full
    done = call(program, own[0], "-m", "chat", "-n", 3, "-i", "tu", stdin="balo " * 200 + "\nmi\n")
    assert "the context is 64: too long" in done.err and done.text.count("Assistant:") == 2


def test_a_message_that_is_too_long_does_not_end_the_chat(program, own, build):
    """The turns before it are not forgotten."""
    model = make("plain", vocab_size=400, max_seq_len=300)
    path = save(model, build / "room_for_three.bin", 3, tokenizer=own[1])
    args, long = [path, "-m", "chat", "-n", 5, "-t", 0], "balo " * 400 + "\n"
    replies = [
        call(program, *args, stdin=text).text.replace("User: ", "")
        for text in ("balo mi\nra\n", f"balo mi\n{long}ra\n", "ra\n")
    ]
    assert replies[0] == replies[1]
    assert not replies[0].endswith(replies[2])  # the reply depends on the turn before


def test_characters_that_move_the_cursor_are_left_out(program, own):
    text = "a\x9bb\x85c\rd\ve\ff\x1bg\x7fh\u00b5i\u00c2j\tk\nl"
    done = call(program, own[0], "-i", text, "-n", 60, "-t", 0, raw=True)
    assert done.text.startswith(printable(text).encode()) and len(printable(text)) == len(text) - 7


@pytest.mark.parametrize("bos", [True, False])
def test_n_limits_the_tokens_without_bos(program, own, build, bos):
    path = build / "first_token.bin"
    with open(path, "wb") as f:
        model = make("plain", vocab_size=400)
        export.write_v3(f, model.args, model.state_dict(), "q8_0", own[1], bos=bos)
    done = call(program, path, "-t", 0, "-n", 9, "-i", "balo mi")
    prompt, story = (
        int(re.search(rf"{what}: (\d+) tokens", done.err)[1]) for what in ("prompt", "story")
    )
    assert prompt + story == 9 + bos and prompt > 1


def test_a_prompt_may_fill_the_limit_or_the_context(program, own, build):
    """One token follows, as BOS is not counted; with one place less, the prompt is an error."""
    text, path = "balo mi ra tu", build / "narrow.bin"
    n = len(own[1].encode(text, True, False))
    for places in n, n - 1:
        path.write_bytes(patched(own[0].read_bytes(), 32, "<i", places))
        for args, what in (
            ([own[0], "-n", places], f"the limit (-n) is {places}"),
            ([path], f"the model's context is {places}"),
            ([path, "-n", 0], f"the model's context is {places}"),
        ):
            done = call(program, *args, "-t", 0, "-i", text, ok=int(places < n))
            if places < n:
                assert f"the prompt has {n} tokens, {what}" in done.err
            else:
                assert f"prompt: {n} tokens" in done.err and "story: 1 tokens" in done.err
    done = call(program, own[0], "-n", 999, "-t", 0, "-i", text)  # its context is 64
    assert "stopping at 64" in done.err and f"story: {65 - n} tokens" in done.err


def test_a_dialogue_may_leave_room_for_one_token(program, own, build):
    """In a context with one place less, the first turn is forgotten, or the message refused."""

    def chat(context, *args, stdin="balo mi\n"):
        path = build / "narrow.bin"
        path.write_bytes(patched(own[0].read_bytes(), 32, "<i", context))
        return call(program, path, "-m", "chat", "-t", 0, *args, stdin=stdin).err

    n = int(re.search(r"the message has (\d+) tokens", chat(4))[1])
    assert f"the message has {n} tokens, the context is {n}: too long" in chat(n)
    err = chat(n + 1, "-n", 2)  # the second token of the reply needs no place
    assert f"the context of {n + 1} tokens is full" in err and "cut short" not in err
    two, stdin = n + 1 + 1 + n, "balo mi\n" * 2  # message, reply of one token, EOS, message
    err = chat(two + 1, "-n", 1, stdin=stdin)
    assert err.count("(cut short: -n 1)") == 2 and "forgetting" not in err
    err = chat(two, "-n", 1, stdin=stdin)
    assert err.count("(cut short: -n 1)") == 2 and "forgetting the first 1 turns" in err
    long = "balo mi tu " * 3
    long_n = int(re.search(r"the message has (\d+) tokens", chat(4, stdin=long))[1])
    err = chat(long_n + 2 + n, "-n", 1, stdin=f"{long}\n" + stdin)  # which fits without it
    assert err.count("(cut short: -n 1)") == 3 and err.count("forgetting") == 1


def test_llama_2s_template_as_it_is_used(program, own, build):
    """Without BOS where text does not begin with it; an empty system prompt is none."""

    def size(no_bos, *args):
        path = build / "narrow.bin"
        path.write_bytes(patched(patched(own[0].read_bytes(), 32, "<i", 4), 152, "<i", no_bos))
        err = call(program, path, "-m", "chat", *args, stdin="balo mi\n").err
        return int(re.search(r"the message has (\d+) tokens", err)[1])

    assert size(True) == size(False) - 1
    assert size(False, "-y", "") == size(False) < size(False, "-y", "x")


def test_a_reply_ends_at_the_token_after_it_in_the_template(program, build):
    """Which is neither EOS nor among the end ids of the file."""
    model, t = make("plain", vocab_size=600, tied=False), Tokenizer(make_bpe(build / "ends"))
    form, stop = "<|start_header_id|>{user}{reply}<|eom_id|>", t.special["<|eom_id|>"]
    prompt = Template(form).prompt(t, [("hello", None)])
    with torch.no_grad():
        h = model.norm(model.hidden(torch.tensor([prompt])))[0, -1]
        model.output.weight[stop] = 10 * h
    with open(build / "ends.bin", "wb") as f:
        export.write_v3(f, model.args, model.state_dict(), "fp32", t, {"turn": form})
    args = [build / "ends.bin", "-m", "chat", "-t", 0, "-n", 3]
    done = call(program, *args, "-i", "hello")
    assert "cut short" not in done.err and done.text.startswith("Assistant: \n")


def test_chat_replies_go_on_to_the_end_of_the_context(program, own, build):
    """By default, past 256 tokens; -n limits each reply."""
    path = build / "roomy.bin"
    path.write_bytes(patched(own[0].read_bytes(), 32, "<i", 700))
    args = [path, "-m", "chat", "-t", 0, "-i", "balo"]
    done = call(program, *args)  # greedy, this model never ends
    assert "(the context of 700 tokens is full)" in done.err and len(done.text) > 1000
    cut = call(program, *args, "-n", 4, stdin="mi\n")
    assert cut.err.count("(cut short: -n 4)") == 2 and "full" not in cut.err
    assert "each reply" in call(program, "--help").text


def test_story_arrives_while_it_is_told(program, own, build):
    path = build / "endless.bin"
    path.write_bytes(patched(own[0].read_bytes(), 32, "<i", 1 << 20))
    with subprocess.Popen(
        [program, path, "-t", "0", "-n", "0", "-i", "balo mi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        text = os.read(child.stdout.fileno(), 1 << 16)
        text += os.read(child.stdout.fileno(), 1 << 16)  # more than the prompt
        running = child.poll() is None  # with hours to go
        child.kill()
    assert running and text.startswith(b"balo mi") and len(text) > 20


def test_byte_tokens_are_printed(program, own):
    """Those above 0x7f too, which llama2.c loses."""
    text = "日本 ÿ þ \U0001f44d"
    bytes_of = {own[1].sp.piece_to_id(f"<0x{b:02X}>") for b in range(128, 256)}
    assert len(bytes_of & set(own[1].encode(text, True, False))) > 5
    done = call(program, own[0], "-i", text, "-n", 60, "-t", 0, raw=True)
    assert done.text.startswith(text.encode())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks Linux for its cores")
def test_threads_by_default(program, own, build):
    """All cores, but one for a model that fits a cache, unless it tells many stories."""
    cores = len(os.sched_getaffinity(0))
    all_cores = f"{cores} thread" + "s" * (cores > 1) + ")"

    def threads(*args):
        return re.search(r"\d+ threads?\)", call(program, *args, "-n", 4, "-s", 1).err)[0]

    assert threads(own[0]) == threads(own[0], "-b", 3) == "1 thread)"
    assert threads(own[0], "-b", 4) == all_cores == threads(own[0], "-j", cores)
    path = save(make("one", dim=288, vocab_size=14000), build / "4MB.bin", 3)
    blob = export.tokenizer_blob(own[1]) + bytes(8 * (14000 - 400))  # empty pieces
    (build / "14000.bin").write_bytes(blob)
    assert threads(path, "-z", build / "14000.bin") == all_cores


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(program, own, build):
    (build / "some_text").write_text("balo mi " * 20)
    for args in (
        ["-n", 30],
        ["-b", 3],
        ["-m", "chat", "-i", "balo", "-n", 5],
        ["-m", "perplexity", "-i", build / "some_text"],
        ["-m", "bench", "-n", 1],
    ):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [program, own[0], *map(str, args)],
                stdout=full,
                timeout=100,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        last = done.stderr.splitlines()[-1]  # a chat says first that the model has no template
        assert done.returncode == 1 and last.startswith("error: cannot write"), args
    with open("/dev/full", "wb") as full:
        assert subprocess.run([program, "-h"], stdout=full, stderr=subprocess.PIPE).returncode == 1
    # A reader that has seen enough ends the program by a signal, quietly.
    with subprocess.Popen(
        [program, own[0], "-m", "chat", "-n", "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        child.stdout.close()
        assert b"error" not in child.communicate(b"balo\n")[1]
    assert child.returncode != 0


def test_bench_prints_its_roof(program, own):
    done = call(program, own[0], "-m", "bench", "-n", 16)
    for words in ("read bandwidth", "prompt", "decode", "% of decoding"):
        assert words in done.text

    def roof(isa):
        done = call(program, own[0], "-m", "bench", "-n", 1, "-j", 1, env={"RUN_ISA": isa})
        return float(re.search(r"bandwidth ([\d.]+) GB/s", done.text)[1])

    # it is the memory's, not the arithmetic's; a machine with much else to do gets three tries
    assert any(roof("portable") > 0.4 * roof("") for _ in range(3))


BAD_CALLS = [
    (["-n", "12x"], 2, "-n 12x"),
    (["-n", "-3"], 2, "-n -3"),
    (["-t", "nan"], 2, "-t nan"),
    (["-t", ""], 2, "-t"),
    (["-p", "1.5"], 2, "-p 1.5"),
    (["-k", "-1"], 2, "-k -1"),
    (["-s", "1.5"], 2, "-s 1.5"),
    (["-b", "0"], 2, "-b 0"),
    (["-q", "1"], 2, "no such option"),
    (["-n"], 2, "value is missing"),
    (["--steps", "5"], 2, "no such option"),
    (["-m", "sing"], 2, "generate, chat"),
    (["-n", " 8"], 2, "-n  8"),
    (["-n", "0x10"], 2, "-n 0x10"),
    (["-n", "+8"], 2, "-n +8"),
    (["-n", "8 "], 2, "-n 8 "),
    (["-n", "8."], 2, "-n 8."),
    (["-n", "1e1"], 2, "-n 1e1"),
    (["-t", "1e0"], 2, "-t 1e0"),
    (["-t", "inf"], 2, "-t inf"),
    (["-t", "."], 2, "-t ."),
    (["-p", "0x1p-1"], 2, "-p 0x1p-1"),
    (["-n", "--3"], 2, "-n --3"),
    (["-y", "be"], 2, "-y is not for -m generate"),
    (["-m", "chat", "-b", "3"], 2, "-b is not for -m chat"),
    (["-n", "5", "-m", "perplexity", "-i", "x"], 2, "-n is not for -m perplexity"),
    *(
        (["-m", "perplexity", "-i", "x", f"-{flag}", "1"], 2, f"-{flag} is not for -m perplexity")
        for flag in "tkpsby"
    ),
    *((["-m", "bench", f"-{flag}", "1"], 2, f"-{flag} is not for -m bench") for flag in "bizy"),
    (["-i", "balo " * 300], 1, "context is 64"),
    (["-n", "3", "-i", "balo mi tu ra"], 1, "limit (-n) is 3"),
    (["-z", "/nowhere/tok.bin"], 1, "/nowhere/tok.bin"),
    (["-m", "perplexity"], 1, "needs a text file: -i FILE"),
    (["-m", "perplexity", "-i", "/nowhere"], 1, "/nowhere"),
]


@pytest.mark.parametrize("args,status,says", BAD_CALLS)
def test_bad_calls(program, own, args, status, says):
    done = call(program, own[0], *args, ok=status)
    assert says in done.err and done.err.startswith("error:")
    assert status == 2 or done.err.count("\n") == 1


def patched(data, offset, fmt, *values):
    return data[:offset] + struct.pack(fmt, *values) + data[offset + struct.calcsize(fmt) :]


def mutants(data):
    """(name, bytes) of damaged version-3 files."""
    for field, offset in {
        "dim": 8,
        "hidden": 12,
        "layers": 16,
        "heads": 20,
        "kv heads": 24,
        "vocab": 28,
        "seq": 32,
        "format": 36,
        "group": 40,
        "tied": 44,
        "bos": 48,
        "eos": 52,
        "head": 144,
    }.items():
        for value in (-1, 0, 2, 3, 7, 1 << 20, (1 << 31) - 1, -(1 << 31)):
            if value != struct.unpack_from("<i", data, offset)[0]:
                yield f"{field} {value}", patched(data, offset, "<i", value)
    for field, offset in {"tokenizer offset": 64, "tokenizer size": 72, "file size": 80}.items():
        for value in (0, 1, 255, 1 << 40, (1 << 64) - 1):
            yield f"{field} {value}", patched(data, offset, "<Q", value)
    for offset, value in ((56, float("nan")), (56, 0.0), (60, float("inf")), (60, -1.0)):
        yield f"float {offset} {value}", patched(data, offset, "<f", value)
    for n in (0, 3, 4, 27, 100, 255, 256, len(data) // 2, len(data) - 1):
        yield f"first {n} bytes", data[:n]
    yield "longer", data + b"x"
    yield "version 1", data[:4] + struct.pack("<i", 1) + data[8:]
    yield "magic", b"GGUF" + data[4:]


def test_damaged_files(program, own, build, lib):
    """Whatever is wrong: one line, exit status 1, and no crash."""
    path, data = build / "damaged.bin", own[0].read_bytes()
    harmless = {
        "eos 0",
        "eos 3",
        "eos 7",
        "bos 0",
        "bos 2",
        "bos 3",
        "bos 7",
        "seq 2",
        "seq 3",
        "seq 7",
        "seq 1048576",
    }
    for name, mutant in mutants(data):
        path.write_bytes(mutant)
        done = call(program, path, "-n", 2, "-j", 1, ok=None)
        if name in harmless:
            assert done.returncode == 0, (name, done.err)
            continue
        assert done.returncode == 1 and done.err.startswith("error: "), (name, done)
        assert done.err.count("\n") == 1, name


def test_tensors_fill_their_span(program, own, build):
    """A header that asks for less than there is would tell another model's story."""
    path, data = build / "less.bin", own[0].read_bytes()
    for offset, value in ((16, 1), (12, 48), (28, 384), (8, 16)):  # layers, hidden, vocabulary, dim
        path.write_bytes(patched(data, offset, "<i", value))
        done = call(program, path, "-m", "bench", "-n", 1, ok=1)
        assert "the tensors do not fill" in done.err and done.err.count("\n") == 1
    for version, at in ((0, 0), (2, 8)):  # which have a fixed size each
        data = save(make("plain"), path, version).read_bytes()
        for field, value in ((2, 1), (1, 160), (5, 511), (0, 32)):
            path.write_bytes(patched(data, at + 4 * field, "<i", value))
            assert "its header says" in call(program, path, "-m", "bench", "-n", 1, ok=1).err


def test_damaged_old_files(program, build):
    model = make("one")
    for version, offset in ((0, 0), (2, 8)):
        data = save(model, build / "old.bin", version).read_bytes()
        bad = [data[:-1], data + b"\0" * 4, data[:40]]
        for i in range(7):
            for value in (0, -5, 1 << 30, -(1 << 31)):
                bad.append(patched(data, offset + 4 * i, "<i", value))
        if version == 2:
            bad += [patched(data, 37, "<i", g) for g in (0, -1, 7, 1 << 30)]
        for mutant in bad:
            (build / "old_bad.bin").write_bytes(mutant)
            done = call(program, build / "old_bad.bin", "-n", 2, ok=1)
            assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_tokenizer_of_another_model(program, own, build):
    blob = export.tokenizer_blob(own[1])
    path = build / "other.bin"
    for bad, says in (
        (blob[:-1], "ends within"),
        (blob + b"x", "another model"),
        (b"", "empty"),
        (blob[:100], "ends within"),
        (struct.pack("<IfI", 1, 0, 0xFFFFFFF0), "ends"),
    ):
        path.write_bytes(bad)
        done = call(program, own[0], "-z", path, ok=1)
        assert says in done.err and done.err.count("\n") == 1


def test_missing_file_and_help(program, build):
    assert "cannot open" in call(program, build / "none.bin", ok=1).err
    assert "not a regular file" in call(program, build, ok=1).err
    torch.save({"model": {}}, build / "ckpt.pt")
    assert "is a checkpoint: export.py" in call(program, build / "ckpt.pt", ok=1).err
    assert "usage" in call(program, "--help").text and "usage" in call(program, ok=2).text


def test_a_file_of_another_kind_is_named(program, own, build):
    """What people have beside models: one line that says what the file is, and what to do."""
    model = make("plain")
    torch.save({"model": {}}, build / "kind.pt")
    torch.save({"model": {}}, build / "kind_old.pt", _use_new_zipfile_serialization=False)
    own[1].export(build / "kind_tok.bin")
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    whole = {v: save(model, build / f"kind_v{v}.bin", v).read_bytes() for v in (0, 2, 3)}
    cases = {
        "a text file": (ROOT / "README.md").read_bytes(),
        "a text file, not": "Été: 日本語".encode(),
        "a text file, ": b"<!DOCTYPE html><html>404 Not Found</html>",
        "is a checkpoint: export.py": (build / "kind.pt").read_bytes(),
        "a checkpoint: export.py": (build / "kind_old.pt").read_bytes(),
        "a GGUF file": b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64),
        "export.py --hf=": struct.pack("<Q", len(header)) + header + bytes(4),
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
        "a gzip archive": b"\x1f\x8b\x08\x00" + bytes(40),
        "a program": program.read_bytes(),
        "UTF-16": "a story ".encode("utf-16"),
        "all zeros": bytes(9000),
        "a tokenizer, not a model: give it with -z": (build / "kind_tok.bin").read_bytes(),
        "a SentencePiece model": (build / "own.model").read_bytes(),
        "version 1, this program reads": whole[2][:4] + struct.pack("<i", 1) + whole[2][8:],
        "not a model file": bytes(range(7, 250)) * 9,
    }
    for data in whole.values():
        for part in (len(data) // 2, len(data) - 1):
            cases[f"its header says {len(data)}: it is cut short" + " " * (part % 7)] = data[:part]
    for says, data in cases.items():
        (build / "kind").write_bytes(data)
        done = call(program, build / "kind", ok=1)
        assert done.err.startswith(f"error: {build / 'kind'}") and done.err.count("\n") == 1, (
            done.err
        )
        assert says.strip() in done.err, (says, done.err)
    for file, says in (
        ("own.model", "a SentencePiece model: tokenizer.py"),
        ("kind.pt", "a checkpoint"),
        ("kind_v3.bin", "a model, not a tokenizer"),
    ):
        done = call(program, own[0], "-z", build / file, ok=1)
        assert says in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_at_once(program, own, build):
    """To open one waits for a writer, who may never come."""
    os.mkfifo(build / "fifo")
    for args in (
        [build / "fifo"],
        [own[0], "-z", build / "fifo"],
        [own[0], "-m", "perplexity", "-i", build / "fifo"],
    ):
        done = subprocess.run([program, *args], capture_output=True, timeout=20, text=True)
        assert done.returncode == 1 and "fifo is not a regular file" in done.stderr


@pytest.mark.parametrize("stdin", ["<&-", "</"])
def test_chat_ends_where_its_input_cannot_be_read(program, own, stdin):
    """A closed standard input, and a folder."""
    done = subprocess.run(
        f"'{program}' '{own[0]}' -m chat -n 5 {stdin} | head -c 99",
        shell=True,
        capture_output=True,
        timeout=20,
        text=True,
    )
    assert done.stderr.startswith("error: cannot read the input: ") and done.stderr.count("\n") == 1


def test_a_byte_order_mark_is_no_text(program, own, build):
    (build / "plain").write_bytes(b"balo mi tu ra<|endoftext|>balo")
    (build / "bom").write_bytes(b"\xef\xbb\xbf" + (build / "plain").read_bytes())

    def loss(name):
        text = call(program, own[0], "-m", "perplexity", "-i", build / name).text
        return re.match(r"loss [\d.]+, perplexity [\d.]+, \d+ tokens", text)[0]

    assert loss("bom") == loss("plain")
    said = [
        call(program, own[0], "-m", "chat", "-s", 1, "-n", 9, stdin=f"{bom}balo mi\ntu\n").text
        for bom in ("", "\ufeff")
    ]
    assert said[0] == said[1]
    (build / "utf16").write_bytes("balo mi".encode("utf-16"))
    assert "UTF-16" in call(program, own[0], "-m", "perplexity", "-i", build / "utf16", ok=1).err


def test_documents_after_the_first_begin_with_bos(program, own, build):
    """In perplexity, also of a model whose text does not begin with BOS."""
    (build / "two").write_text("balo mi<|endoftext|>tu ra")
    texts = [own[1].encode(x, False, False) for x in ("balo mi", "tu ra")]
    for no_bos in 0, 1:
        path = build / "no_bos.bin"
        path.write_bytes(patched(own[0].read_bytes(), 152, "<i", no_bos))
        done = call(program, path, "-m", "perplexity", "-i", build / "two")
        assert f" {sum(map(len, texts)) + 1 - no_bos} tokens" in done.text


def test_top_p_0_samples_from_all(program, own):
    """As in llama2.c; sample.py's --top_p=0 means the same (test_model.py)."""
    args = [own[0], "-n", 40, "-s", 3, "-t", 1.5]
    assert call(program, *args, "-p", 0).text == call(program, *args, "-p", 1).text
    assert call(program, *args, "-p", 0).text != call(program, *args, "-p", 0.1).text


def test_an_unknown_instruction_set_is_an_error(program, own):
    done = call(program, own[0], "-n", 3, env={"RUN_ISA": "AVX1024"}, ok=2)
    assert "RUN_ISA=AVX1024" in done.err and "portable" in done.err and done.err.count("\n") == 1
    assert "RUN_ISA" in call(program, "--help").text


def test_model_that_is_not_a_number(program, build, own):
    data = bytearray(own[0].read_bytes())
    start = len(data) - struct.unpack_from("<Q", data, 72)[0] - 64  # the last norm is in front
    for i in range(64, 200, 4):
        data[start - i : start - i + 4] = struct.pack("<f", float("nan"))
    (build / "nan.bin").write_bytes(data)
    assert "not a number" in call(program, build / "nan.bin", ok=1).err
    (build / "text").write_text("balo mi tu " * 9)
    done = call(program, build / "nan.bin", "-m", "perplexity", "-i", build / "text", ok=1)
    assert "not a number" in done.err and done.err.count("\n") == 1 and not done.text


def test_one_score_that_is_not_a_number_does_not_vanish(lib, build):
    """Token 5's key is infinite; turned by its position, 0, it is NaN. Its value is a number."""
    model = make("one")
    with torch.no_grad():
        model.tok_embeddings.weight[:, 0] = 0
        model.tok_embeddings.weight[5] = torch.eye(20)[0]
        model.layers[0].attention.wk.weight[0] = 3e38 * torch.eye(20)[0]
    path = save(model, build / "nan_score.bin", 3, "fp32")
    for isa in range(len(lib.isas)):
        assert np.isfinite(c_logits(lib, path, [4, 1, 2, 3], 17, isa)).all()
        assert np.isnan(c_logits(lib, path, [5, 1, 2, 3], 17, isa)).all()


# -----------------------------------------------------------------------------
# Compilers, sanitizers, the other architecture, the fuzz target


def works(*command):
    try:
        return (
            subprocess.run(
                command, input=b"int main(void) { return 0; }", timeout=60, capture_output=True
            ).returncode
            == 0
        )
    except OSError:
        return False


@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
def test_clang_has_nothing_to_say(build):
    targets = (
        [[]]
        if not Path("/usr/aarch64-linux-gnu/include").exists()
        else [[], ["--target=aarch64-linux-gnu", "-I/usr/aarch64-linux-gnu/include"]]
    )
    for target in targets:
        compile_c(
            ROOT / "run.c",
            build / "syntax",
            "-fsyntax-only",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-Wno-unused-command-line-argument",
            *target,
            cc="clang",
        )


@pytest.mark.skipif(not shutil.which("x86_64-w64-mingw32-gcc"), reason="needs mingw-w64")
def test_windows_builds(build):
    compile_c(
        ROOT / "run.c", build / "run.exe", "-O0", "-Wall", "-Werror", cc="x86_64-w64-mingw32-gcc"
    )


@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_sanitizers(build, own, kind):
    flags = [f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    if not works("cc", *flags, "-x", "c", "-", "-o", str(build / "probe")):
        pytest.skip(f"this compiler has no -fsanitize={kind}")
    program = compile_c(ROOT / "run.c", build / f"run_{kind[:3]}", "-O0", "-g", *flags)
    common = [own[0], "-n", 20, "-j", 2]
    call(program, *common, "-i", "balo mi", "-b", 3, "-s", 1)
    call(program, *common, "-m", "chat", "-s", 1, stdin="balo\nmi\ntu\n")
    if kind == "thread":
        return
    call(program, *common, "-b", 2, env={"RUN_ISA": "portable"})
    (build / "text").write_text("balo mi<|endoftext|>tu ra" * 20)
    call(program, own[0], "-m", "perplexity", "-i", build / "text")
    (build / "own_tok.bin").write_bytes(export.tokenizer_blob(own[1]))
    for shape in SHAPES:
        for version in (3,) if shape == "wide heads" or shape == "narrow heads" else (0, 2, 3):
            path = save(make(shape, vocab_size=400), build / "sanitize.bin", version)
            call(program, path, "-z", build / "own_tok.bin", "-n", 17, "-i", "balo")


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")),
    reason="needs gcc-aarch64-linux-gnu and qemu-user",
)
def test_arm64(build, program, own):
    """Cross-compiled and emulated: NEON and portable C tell the story that x86 tells."""
    arm = compile_c(
        ROOT / "run.c",
        build / "run_arm",
        "-O2",
        "-static",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        cc="aarch64-linux-gnu-gcc",
    )
    args = [own[0], "-t", 0, "-n", 30, "-i", "balo mi"]
    want = call(program, *args).text
    for isa in ("NEON", "portable"):
        done = call("qemu-aarch64", "-cpu", "max", arm, *args, env={"RUN_ISA": isa})
        assert done.text == want and isa in done.err


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-user")
def test_kernels_are_those_that_the_processor_has(build, own):
    x86 = compile_c(ROOT / "run.c", build / "run_static", "-O2", "-static")

    def isa(cpu):
        return call("qemu-x86_64", "-cpu", cpu, x86, own[0], "-n", 3).err

    if "AVX2" not in isa("max"):
        pytest.skip("this qemu has no AVX2")
    for without in ("avx2", "fma", "f16c"):
        assert "portable C" in isa(f"max,-{without}")


@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
def test_fuzz_a_little(build):
    flags = ["-O0", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
    (build / "empty.c").write_text("int LLVMFuzzerTestOneInput(void) { return 0; }")
    if not works("clang", *flags, build / "empty.c", "-o", build / "empty"):
        pytest.skip("libFuzzer does not link here")
    target = compile_c(ROOT / "tests/fuzz_run.c", build / "fuzz", *flags, cc="clang")
    (build / "corpus").mkdir()
    call(
        target,
        "-runs=20000",
        "-seed=1",
        "-max_len=8192",
        "-max_total_time=6",
        "-close_fd_mask=3",
        # libFuzzer takes the peak of getrusage, which begins with that of the process of the tests.
        "-rss_limit_mb=0",
        "-malloc_limit_mb=2048",
        build / "corpus",
        ROOT / "tests/fuzz_corpus",
    )
