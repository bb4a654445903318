"""export.py: what is written is what was there, in the layout that run.c documents."""

import base64
import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, LLAMA3_TOKENS, ROOT, llama_cpp, llama_cpp_greedy, make_bpe

import export
import formats
from checkpoint import checkpoint_args, load_checkpoint, model_from_checkpoint, save_checkpoint
from common import run_main
from experiments import lifted
from model import ModelArgs, Transformer, TransformerWithValueHead
from sft import add_lora
from tokenizer import Tokenizer

ARGS = dict(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=52, max_seq_len=40
)


def checkpoint(path, cls=Transformer, **changes):
    torch.manual_seed(0)
    model = cls(ModelArgs(**{**ARGS, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "optimizer": None,
            "iter_num": 3,
            "model_args": checkpoint_args(model.args),
            "best_val_loss": 1.0,
            "config": {},
        },
    )
    return model


def run(*args, ok=0):
    """The command, in this process: importing torch for each would take most of the time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: export.main([str(a) for a in args]))
    done = types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
    assert (end.value.code or 0) == ok, done.stderr
    return done


def read_v3(path):
    """A reader of version 3, written from run.c's comment: ({field: value}, {name: array})."""
    data = Path(path).read_bytes()
    names = "magic version dim hidden layers heads kv_heads vocab seq format group tied bos eos"
    h = dict(zip(names.split(), struct.unpack_from("<14i", data)))
    h["theta"], h["eps"], h["tok_at"], h["tok_size"], h["size"], h["squeeze"] = struct.unpack_from(
        "<2f3QI", data, 56
    )
    assert h["size"] == len(data) == h["tok_at"] + h["tok_size"]
    assert not any(data[92:144]) and not any(data[148:256])
    h["head_dim"] = struct.unpack_from("<i", data, 144)[0]
    at = 256

    def take(dtype, *shape):
        nonlocal at
        at += -at % 64
        array = np.frombuffer(data, dtype, int(np.prod(shape)), at).reshape(shape)
        at += array.nbytes
        return array

    def matrix(rows, cols):
        tiles = -(-rows // 16)
        if h["format"] == 0:
            return take("<f4", tiles, cols, 16).transpose(0, 2, 1).reshape(-1, cols)[:rows]
        G, width = h["group"], -(-cols // h["group"]) * h["group"]
        q = take(np.uint8, tiles, width // 4, 16, 4).transpose(0, 2, 1, 3).reshape(-1, width)
        s = take("<f2", tiles, width // G, 16).transpose(0, 2, 1).reshape(-1, width // G)
        w = (q.astype(np.float32) - 128) * np.repeat(s.astype(np.float32), G, 1)
        assert (w[rows:] == 0).all() and (w[:, cols:] == 0).all()  # padding
        return w[:rows, :cols]

    D, F, V = h["dim"], h["hidden"], h["vocab"]
    E = h["head_dim"] or D // h["heads"]
    q, kv = E * h["heads"], E * h["kv_heads"]
    w = {"tok_embeddings": matrix(V, D)}
    for i in range(h["layers"]):
        name = f"layers.{i}."
        w[name + "attention_norm"] = take("<f4", D)
        qkv = matrix(q + 2 * kv, D)
        for key, part in zip("qkv", np.split(qkv, [q, q + kv])):
            w[f"{name}attention.w{key}"] = part
        w[name + "attention.wo"] = matrix(D, q)
        w[name + "ffn_norm"] = take("<f4", D)
        pairs = matrix(2 * (-(-F // 16) * 16), D).reshape(-1, 2, 16, D)
        w[name + "feed_forward.w1"], w[name + "feed_forward.w3"] = (
            pairs[:, k].reshape(-1, D)[:F] for k in (0, 1)
        )
        w[name + "feed_forward.w2"] = matrix(D, F)
    w["norm"] = take("<f4", D)
    if not h["tied"]:
        w["output"] = matrix(V, D)
    assert at == h["tok_at"]
    return h, w


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "rope_theta": 5e5, "norm_eps": 1e-6},
        {"dim": 20, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 4},
        {"dim": 288, "vocab_size": 33, "hidden_dim": 768},
        {"dim": 128, "n_heads": 4, "hidden_dim": 129},
        {"head_dim": 22},
        {"head_dim": 2},
    ],
)
def test_version_3_holds_the_model(tmp_path, changes):
    model = checkpoint(tmp_path / "ckpt.pt", **changes)
    for fmt in ("fp32", "q8_0"):
        run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/ckpt.pt", f"--format={fmt}")
        h, got = read_v3(tmp_path / "m.bin")
        a = model.args
        assert (h["magic"], h["version"], h["theta"], h["tied"]) == (
            0x616B3432,
            3,
            np.float32(a.rope_theta),
            int(a.tied),
        )
        assert abs(h["eps"] - a.norm_eps) < 1e-12 and h["seq"] == a.max_seq_len
        assert h["head_dim"] == changes.get("head_dim", 0)  # so that most files stay as they were
        rounded = fmt == "q8_0" and h["group"] > 16
        state = balanced(model, h["group"]) if rounded else model.state_dict()
        for name, w in got.items():
            want = state[f"{name}.weight"].numpy()
            if fmt == "fp32" or w.ndim == 1:
                assert np.array_equal(w, want), name
            else:  # half a step of the coarsest scale, and what the search trades at the edges
                assert np.abs(w - want).max() < 0.07 * np.abs(want).max(), name
                assert np.square(w - want).mean() ** 0.5 < 0.004 * np.abs(want).max(), name


def balanced(model, group):
    """The state dict with balanced layers, which int8 files with groups above 16 hold, rounded."""
    state = {name: w.clone() for name, w in model.state_dict().items()}
    for i, layer in enumerate(export.balanced_layers(model.args, state, group)):
        for name in state:
            if name.startswith(f"layers.{i}."):
                state[name] = torch.from_numpy(layer[name.split(".")[-2]])
    return state


@pytest.mark.parametrize("changes", [{}, {"head_dim": 10, "hidden_dim": 41}, {"max_seq_len": 3}])
def test_a_balanced_model_computes_the_same(tmp_path, changes):
    """It loses less by int8 where a few inputs of each matrix are much larger than the others."""
    model = checkpoint(tmp_path / "c.pt", **changes).eval()
    with torch.no_grad():
        for layer in model.layers:
            for norm in layer.attention_norm, layer.ffn_norm:
                norm.weight[::11] *= 12
            layer.attention.wv.weight[::7] *= 8
            layer.feed_forward.w3.weight[::9] *= 8
    n = min(40, model.args.max_seq_len)
    want, group, error = logits(model, n, 77), export.best_group(model.args), {}
    twin = Transformer(model.args).eval()
    for name, state in ("plain", model.state_dict()), ("balanced", balanced(model, group)):
        twin.load_state_dict(state)
        assert (logits(twin, n, 77) - want).abs().max() < 1e-4 * want.abs().max()
        for key, w in state.items():
            if key.startswith("layers") and w.ndim == 2:
                q, scale = export.quantize(export.pad(w.numpy(), 1, group), group, "<f2")
                q = q.reshape(len(q), -1, group) * scale.astype(np.float32)[..., None]
                w = torch.from_numpy(q.reshape(len(q), -1)[:, : w.shape[1]])
            twin.state_dict()[key].copy_(w)
        error[name] = (logits(twin, n, 77) - want).square().mean()
    assert error["balanced"] < 0.7 * error["plain"]


def test_a_model_that_is_not_finite_is_not_balanced(tmp_path):
    model = checkpoint(tmp_path / "c.pt")
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight[3, 5] = float("nan")
    state = balanced(model, 16)
    assert torch.equal(state["layers.1.attention.wo.weight"], model.layers[1].attention.wo.weight)
    assert state["layers.0.feed_forward.w2.weight"].isnan().sum() == 1


def test_quantize_is_no_worse_than_the_largest_weights_scale():
    w = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    w[3, :64] = 0
    for group, dtype in ((16, "<f2"), (32, "<f4"), (64, "<f2"), (4, "<f4")):
        q, scale = export.quantize(w, group, dtype)
        got = q.reshape(64, -1, group) * scale.astype(np.float32)[..., None]
        plain = np.abs(w.reshape(64, -1, group)).max(-1, keepdims=True) / 127
        n = np.rint(w.reshape(64, -1, group) / np.maximum(plain, 1e-30))
        best, simple = (np.square(x - w.reshape(64, -1, group)).sum() for x in (got, n * plain))
        assert best <= simple * 1.01 and q.min() == -127 and q.max() == 127
        assert (got[3].reshape(-1)[:64] == 0).all() and np.isfinite(got).all()


def test_group_makes_the_smaller_file():
    def group(**changes):
        return export.best_group(ModelArgs(**{**ARGS, "n_kv_heads": None, **changes}))

    assert group(dim=288, hidden_dim=768, vocab_size=32000) == 32  # 288 is no multiple of 64
    assert group(dim=768, n_heads=12, hidden_dim=2048, vocab_size=32000) == 64
    assert group(dim=64, n_heads=8, hidden_dim=172) == 16  # small enough for the cache
    chosen = set()
    for dim, hidden, heads in itertools.product((128, 192, 288), (160, 320, 352, 384), (2, 3)):
        changes = dict(dim=dim, hidden_dim=hidden, n_heads=heads, head_dim=32, multiple_of=4)
        args = ModelArgs(**{**ARGS, "n_kv_heads": None, "vocab_size": 64, **changes})
        shapes = [p.shape for p in Transformer(args).parameters() if p.dim() == 2]
        sizes = {g: sum(rows * -(-cols // g) * (g + 2) for rows, cols in shapes) for g in (64, 32)}
        assert export.best_group(args) == min(sizes, key=sizes.get)
        chosen.add(export.best_group(args))
    assert chosen == {32, 64}


def test_version_0_and_back(tmp_path):
    for changes in ({}, {"tied": False}, {"hidden_dim": None, "multiple_of": 4}):
        model = checkpoint(tmp_path / "ckpt.pt", **changes)
        run(tmp_path / "m.bin", "--version=0", "--checkpoint", tmp_path / "ckpt.pt")
        run(tmp_path / "back.pt", "--llama2c", tmp_path / "m.bin", "--iter_num=98000")
        back = load_checkpoint(tmp_path / "back.pt")
        assert back["iter_num"] == 98000
        assert back["config"]["vocab_size"] == 77 and back["config"]["vocab_source"] == "custom"
        again = model_from_checkpoint(back)
        for (name, p), q in zip(model.state_dict().items(), again.state_dict().values()):
            assert torch.equal(p, q), name
        ids = torch.arange(20)[None]
        with torch.no_grad():
            first = model_from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt"))
            assert torch.equal(first.eval()(ids), again.eval()(ids))
        data = (tmp_path / "m.bin").read_bytes()
        run(tmp_path / "again.bin", "--version=0", "--checkpoint", tmp_path / "back.pt")
        assert (tmp_path / "again.bin").read_bytes() == data


def test_stories260k_becomes_a_checkpoint(tmp_path, stories260k_bin, tok512_model):
    run(
        tmp_path / "ckpt.pt",
        f"--llama2c={stories260k_bin}",
        f"--tokenizer={tok512_model}",
        "--iter_num=98000",
    )
    saved = load_checkpoint(tmp_path / "ckpt.pt")
    args = model_from_checkpoint(saved).args
    assert (args.ffn_dim, args.multiple_of, args.max_seq_len, args.n_kv_heads) == (172, 4, 512, 4)
    assert saved["model_args"].get("hidden_dim") is None  # the commands say --multiple_of=4
    assert (tmp_path / "tok512.model").read_bytes() == Path(tok512_model).read_bytes()
    done = run(tmp_path / "m.bin", "--checkpoint", tmp_path / "ckpt.pt")  # finds it there
    assert "tok512.model" in done.stdout
    data, size = (
        (tmp_path / "m.bin").read_bytes(),
        struct.unpack_from("<Q", (tmp_path / "m.bin").read_bytes(), 72)[0],
    )
    Tokenizer(tok512_model).export(tmp_path / "tok512.bin")
    assert data[-size:] == (tmp_path / "tok512.bin").read_bytes()
    assert struct.unpack_from("<2i", data, 48) == (1, 2) and data[88] == 1
    run(tmp_path / "m0.bin", "--version=0", "--checkpoint", tmp_path / "ckpt.pt")
    ours, theirs = (tmp_path / "m0.bin").read_bytes(), Path(stories260k_bin).read_bytes()
    tables = 4 * 512 * 8  # RoPE, at the end, which nobody reads
    assert ours[:-tables] == theirs[:-tables] and len(ours) == len(theirs)


def test_a_tokenizer_of_another_size_is_not_padding(tmp_path):
    """512 is a power of two, and yet the size of a vocabulary and not a padded 400."""
    checkpoint(tmp_path / "c.pt", vocab_size=512)
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--version=0")
    path = make_bpe(tmp_path / "t", "smollm2", 400)
    done = run(tmp_path / "o.pt", f"--llama2c={tmp_path}/m.bin", f"--tokenizer={path}", ok=1)
    assert "has 400 tokens, the model has 512" in done.stderr
    hugging_face(tmp_path / "in", "smollm2", vocab_size=512)
    done = run(tmp_path / "o.pt", f"--hf={tmp_path}/in", f"--tokenizer={path}", ok=1)
    assert "has 400 tokens, the model has 512" in done.stderr
    assert not (tmp_path / "o.pt").exists()
    for n, rows in (32000, 32064), (128256, 128320), (49152, 49280), (32001, 32128), (300, 320):
        assert export.is_padding(n, rows) and export.is_padding(n, rows, named=True)
    assert export.is_padding(32003, 32768) and not export.is_padding(30000, 32768)
    assert not export.is_padding(151_000, 2**18) and not export.is_padding(50257, 2**16)


def test_version_2_is_llama2cs(tmp_path):
    """Read as llama2.c's runq reads it: whole groups in each row."""
    model = checkpoint(tmp_path / "ckpt.pt", hidden_dim=40)
    run(tmp_path / "m.bin", "--version", "2", "--checkpoint", tmp_path / "ckpt.pt")
    data = (tmp_path / "m.bin").read_bytes()
    magic, version, *dims = struct.unpack_from("<Ii7i", data)
    tied, group = struct.unpack_from("<Bi", data, 36)
    assert (magic, version, dims) == (0x616B3432, 2, [48, 40, 2, 6, 2, 77, 40])
    assert tied == 1 and group == 8  # the largest power of two in 48 and 40
    at = 256 + 4 * 5 * 48
    q = np.frombuffer(data, np.int8, 77 * 48, at).reshape(-1, group)
    scale = np.frombuffer(data, "<f4", len(q), at + q.size)
    want = model.tok_embeddings.weight.detach().numpy()
    assert np.abs((q * scale[:, None]).reshape(77, 48) - want).max() < 0.07 * np.abs(want).max()


def test_ppo_checkpoint_exports_its_policy(tmp_path):
    checkpoint(tmp_path / "plain.pt")
    checkpoint(tmp_path / "ppo.pt", TransformerWithValueHead)
    a = load_checkpoint(tmp_path / "plain.pt")["model"]
    b = load_checkpoint(tmp_path / "ppo.pt")
    b["model"].update(a)
    save_checkpoint(tmp_path / "ppo.pt", b)
    for name in ("plain", "ppo"):
        run(tmp_path / f"{name}.bin", "--checkpoint", tmp_path / f"{name}.pt")
    assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "ppo.bin").read_bytes()


def test_what_a_user_can_get_wrong(tmp_path):
    checkpoint(tmp_path / "ckpt.pt")
    ckpt, out = tmp_path / "ckpt.pt", tmp_path / "m.bin"
    (tmp_path / "short.bin").write_bytes(b"\1\0\0\0" * 9)
    checkpoint(tmp_path / "wide.pt", head_dim=10)
    (tmp_path / "broken.pt").write_bytes(ckpt.read_bytes()[:500])
    for status, says, args in [
        (2, "either", []),
        (2, "either", ["--checkpoint", ckpt, "--llama2c", ckpt]),
        (2, "--version", ["--checkpoint", ckpt, "--versoin=2"]),
        (2, "invalid choice", ["--checkpoint", ckpt, "--version=5"]),
        (1, "is for version 3", ["--checkpoint", ckpt, "--version=0", "--format=q8_0"]),
        *(
            (1, "have 10: use version 3", ["--checkpoint", tmp_path / "wide.pt", f"--version={v}"])
            for v in (0, 1, 2)
        ),
        (1, "--format needs --checkpoint", ["--llama2c", ckpt, "--format=gguf"]),
        (1, "--merge_lora needs", ["--hf", tmp_path, "--merge_lora", ckpt]),
        (2, "--max_seq_len is for imports", ["--checkpoint", ckpt, "--max_seq_len=8"]),
        (2, "--max_seq_len is for imports", ["--llama2c", ckpt, "--max_seq_len=8"]),
        (2, "--iter_num is for imports", ["--checkpoint", ckpt, "--iter_num=8"]),
        (2, "--version is for --checkpoint", ["--llama2c", ckpt, "--version=2"]),
        (2, "--base is for --format=peft", ["--checkpoint", ckpt, "--base=x"]),
        (
            2,
            "--tokenizer is for models",
            ["--checkpoint", ckpt, "--format=peft", "--tokenizer=x.model"],
        ),
        (1, "nowhere.pt", ["--checkpoint", tmp_path / "nowhere.pt"]),
        (1, "broken.pt", ["--checkpoint", tmp_path / "broken.pt"]),
        (1, "nowhere.model", ["--checkpoint", ckpt, "--tokenizer", "nowhere.model"]),
        (1, "short.bin", ["--llama2c", tmp_path / "short.bin"]),
    ]:
        done = run(out, *args, ok=status)
        assert says in done.stderr and done.stderr.startswith("error:"), done.stderr
        assert done.stderr.count("\n") == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("m.bin")]  # nothing left behind
    assert "no tokenizer found" in run(out, "--checkpoint", ckpt).stdout


# -----------------------------------------------------------------------------
# Hugging Face

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {  # of Llama; what differs from a small model with 4 heads
    "llama2": dict(num_key_value_heads=4, rms_norm_eps=1e-5),
    "tinyllama": dict(num_key_value_heads=2, rms_norm_eps=1e-5, dtype="bfloat16"),
    "llama3.1": dict(num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama3.2": dict(
        num_key_value_heads=1,
        tie_word_embeddings=True,
        dtype="bfloat16",
        rope_parameters=LLAMA3 | {"factor": 32.0},
    ),
    "smollm2": dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=130000.0),
    "nemo": dict(num_key_value_heads=2, head_dim=24, rope_theta=1e6),
    "narrow": dict(num_key_value_heads=1, head_dim=6, tie_word_embeddings=True),
    "linear": dict(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, dtype="float16"
    ),
}


def hugging_face(folder, kind, size="1GB", vocab_size=600, **changes):
    """A random model of a kind in `folder`, made by transformers, which it returns."""
    transformers = pytest.importorskip("transformers")
    changes = {**KINDS[kind], **changes}
    dtype = changes.pop("dtype", "float32")
    changes.setdefault(
        "rope_parameters", {"rope_type": "default", "rope_theta": changes.pop("rope_theta", 1e4)}
    )
    config = transformers.LlamaConfig(
        **{
            **dict(
                hidden_size=64,
                intermediate_size=88,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=vocab_size,
                max_position_embeddings=128,
                initializer_range=0.15,
            ),
            **changes,
        }
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=size)
    return model


def ours(path):
    return model_from_checkpoint(load_checkpoint(path)).eval()


def logits(model, n=100, vocab_size=600):
    ids = torch.randint(0, vocab_size, (2, n), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.float()(ids)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_both_ways(tmp_path, kind):
    """Logits are equal to 1e-4, tensors to the bit, and a model that went both ways is the same."""
    transformers = pytest.importorskip("transformers")
    theirs = hugging_face(tmp_path / "in", kind, size="40KB" if kind == "llama3.1" else "1GB")
    run(tmp_path / "ckpt.pt", f"--hf={tmp_path}/in")
    stored = load_checkpoint(tmp_path / "ckpt.pt")["model"]
    assert {w.dtype for w in stored.values()} == {theirs.dtype}  # as in the file
    run(tmp_path / "out", f"--checkpoint={tmp_path}/ckpt.pt", "--format=hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is transformers.LlamaForCausalLM and again.dtype == theirs.dtype
    assert (tmp_path / "in/model.safetensors.index.json").exists() == (kind == "llama3.1")
    for (name, w), v in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(w, v), name
    run(tmp_path / "again.pt", f"--hf={tmp_path}/out/model.safetensors")
    back = load_checkpoint(tmp_path / "again.pt")
    assert back["model_args"] == load_checkpoint(tmp_path / "ckpt.pt")["model_args"]
    assert all(torch.equal(w, stored[name]) for name, w in back["model"].items())
    # loaded in fp32: .float() would leave the frequencies of RoPE rounded to the half type
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, again = (load(tmp_path / name, dtype="float32") for name in ("in", "out"))
    want, model = logits(theirs), ours(tmp_path / "ckpt.pt")
    assert want.std() > 0.3  # there is something to compare
    assert (logits(model) - want).abs().max() < (1e-5 if "head_dim" in KINDS[kind] else 1e-4)
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "rope_theta": 5e5, "norm_eps": 1e-6, "n_kv_heads": 6},
        {"rope_scaling": dict(zip(export.LLAMA3_SCALING, (8.0, 1.0, 4.0, 16)))},
        {"rope_scaling": {"factor": 2.0}, "n_kv_heads": 1},
        {"head_dim": 14},
    ],
)
def test_our_model_in_transformers(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model = checkpoint(tmp_path / "ckpt.pt", **changes).eval()
    for dtype in (None, "bfloat16"):
        run(
            tmp_path / "out",
            f"--checkpoint={tmp_path}/ckpt.pt",
            "--format=hf",
            *([f"--dtype={dtype}"] if dtype else []),
        )  # also over the one before
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert str(theirs.dtype) == f"torch.{dtype or 'float32'}"
        error = (logits(theirs, 40, 77) - logits(model, 40, 77)).abs().max()
        assert error < (1e-4 if dtype is None else 0.1)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "out"]  # nothing temporary is left


TEXTS = [
    "Once upon a time, there was a girl.",
    "It's 12345 o'clock!\n\n  Yes, SHE'LL do",
    "안녕 мир é",
]


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "smollm2"])
def test_a_tokenizer_json_goes_both_ways(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    hugging_face(tmp_path / "in", "smollm2")
    path = make_bpe(tmp_path / "in", kind)
    names = "tokenizer.json", "tokenizer_config.json"
    given = [(path.parent / name).read_text() for name in names]
    assert "tokenizer.json" in run(tmp_path / "a/ckpt.pt", f"--hf={tmp_path}/in").stdout
    run(tmp_path / "out", f"--checkpoint={tmp_path}/a/ckpt.pt", "--format=hf")
    assert given[0] == (tmp_path / "out/tokenizer.json").read_text()
    assert json.loads(given[1]) == json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    t = Tokenizer(tmp_path / "a/tokenizer.json")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (t.bos_id, t.eos_id)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == t.encode(text, False, False)


def sentencepiece_model(folder, name):
    """tok512 squeezes spaces, Llama 2's keeps them; "made" is trained as train_vocab does."""
    if name == "made":
        import tinystories

        tinystories.synthesize(str(folder), 300, seed=1)
        tinystories.train_vocab(str(folder), 512)
        return folder / "tok512.model"
    names = {"tok512": "stories260K/tok512.model", "llama2": "llama2/tokenizer.model"}
    path = DATA and DATA / names[name]
    if path is None or not path.exists():
        pytest.skip(f"needs {name}: set STORIES_DATA to a folder that has it")
    return path


@pytest.mark.parametrize("name", ["made", "tok512", "llama2"])
def test_a_sentencepiece_model_goes_both_ways(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    path = sentencepiece_model(tmp_path / "data", name)
    t = Tokenizer(path)
    checkpoint(tmp_path / "ckpt.pt", vocab_size=t.n_words)
    run(tmp_path / "out", f"--checkpoint={tmp_path}/ckpt.pt", "--format=hf", f"--tokenizer={path}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    if name == "made":
        named = transformers.LlamaTokenizerFast.from_pretrained(tmp_path / "out")
        assert [named.encode(x) for x in TEXTS] == [t.encode(x, True, False) for x in TEXTS]
    for text in [*TEXTS, " a  b ", "x  \n\n y", "<0x0A> ▁"]:
        ids = t.encode(text, True, False)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids, skip_special_tokens=True).strip() == t.decode(ids).strip()
    run(tmp_path / "b/again.pt", f"--hf={tmp_path}/out")
    assert (tmp_path / f"b/tok{t.n_words}.model").read_bytes() == Path(path).read_bytes()


@pytest.mark.parametrize(
    "says, changes",
    [
        ("the model type unigram, only BPE", dict(model_type="unigram")),
        ("a normalization rule other than identity", dict(normalization_rule_name="nmt_nfkc")),
        ("user-defined symbols", dict(user_defined_symbols=["<gene>"])),
        ("spaces after words", dict(treat_whitespace_as_suffix=True)),
        ("text without a space in front", dict(add_dummy_prefix=False)),
    ],
)
def test_a_sentencepiece_model_that_is_more_than_bpe_is_refused(tmp_path, says, changes):
    """Other programs would compute other ids than Python. Only run.c lacks the last of these."""
    import sentencepiece

    pytest.importorskip("gguf"), pytest.importorskip("safetensors")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    options = dict(model_type="bpe", normalization_rule_name="identity", hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "t"),
        vocab_size=300,
        byte_fallback=True,
        minloglevel=3,
        **{**options, **changes},
    )
    t = Tokenizer(tmp_path / "t.model")
    checkpoint(tmp_path / "c.pt", vocab_size=t.n_words)
    flags = f"--checkpoint={tmp_path}/c.pt", f"--tokenizer={tmp_path}/t.model"
    everywhere = "add_dummy_prefix" not in changes
    for out, *more in ("m.bin",), ("hf", "--format=hf"), ("m.gguf",):
        refused = everywhere or out == "m.bin"
        done = run(tmp_path / out, *flags, *more, ok=int(refused))
        assert not refused or f"t.model: {'run.c' * (out == 'm.bin')}" in done.stderr
        assert not refused or f"does not support {says}" in done.stderr, done.stderr
        assert (tmp_path / out).exists() != refused
    with pytest.raises(ValueError, match="run.c does not support"):
        t.export(tmp_path / "tok.bin")


def test_the_pipeline_serves_a_folder(tmp_path):
    """transformers' own text generation, greedy, tells what ours does."""
    transformers = pytest.importorskip("transformers")
    from model import generate

    path = sentencepiece_model(tmp_path / "data", "made")
    model = checkpoint(tmp_path / "ckpt.pt", vocab_size=512).eval()
    run(tmp_path / "out", f"--checkpoint={tmp_path}/ckpt.pt", "--format=hf", f"--tokenizer={path}")
    t = Tokenizer(path)
    ids = t.encode("Once upon", True, False)
    want = ids + generate(model, [ids], 20, temperature=0, stop_ids=(1, 2)).responses()[0]
    tell = transformers.pipeline("text-generation", str(tmp_path / "out"), device="cpu")
    got = tell("Once upon", max_new_tokens=20, do_sample=False, return_tensors=True)
    assert got[0]["generated_token_ids"] == want and len(set(want)) > 5


# -----------------------------------------------------------------------------
# Ways to chat

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "Be kind.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = "
    "messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}"
    "[INST] {% if loop.first and s %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COUNTS = "{% for m in messages %}{{ loop.index }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    "source, turn, system, later",
    [
        (
            CHATML,
            "{bos}system\nBe kind.{eos}\n{bos}user\n{user}{eos}\n{bos}assistant\n{reply}{eos}\n",
            "{bos}system\n{system}{eos}\n{bos}user\n{user}{eos}\n{bos}assistant\n{reply}{eos}\n",
            "{bos}user\n{user}{eos}\n{bos}assistant\n{reply}{eos}\n",
        ),
        (
            INST,
            "{bos}[INST] {user} [/INST]{reply}{eos}",
            "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]{reply}{eos}",
            "",
        ),
        (
            NO_SYSTEM,
            "<|user|>\n{user}{eos}\n<|assistant|>\n{reply}{eos}\n",
            "<|user|>\n{system}\n\n{user}{eos}\n<|assistant|>\n{reply}{eos}\n",
            "",
        ),
    ],
)
def test_chat_templates(source, turn, system, later):
    """From Jinja to strings and back; what both write is compared with transformers' renderer."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    bos, eos = ("<|im_start|>", "<|im_end|>") if source is CHATML else ("<s>", "</s>")
    template = formats.template_from_jinja(source, bos, eos)
    assert template == {"turn": turn, "system": system, "next": later}
    back = formats.template_to_jinja(template)
    assert formats.template_from_jinja(back, bos, eos) == template
    turns = [("Hi {user}", "I am"), ('A\n"b"', "ok"), ("And?", None)]
    for brief in (None, "Be brief.") if source is not NO_SYSTEM else (None,):
        messages = [{"role": "system", "content": brief}] if brief else []
        for user, reply in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        written = [
            utils.render_jinja_template(
                [messages[:-1]],
                chat_template=text,
                bos_token=bos,
                eos_token=eos,
                add_generation_prompt=True,
            )[0][0]
            for text in (source, back)
        ]
        assert written[0].replace("] ", "]").replace(" <", "<") == written[1].replace(
            "] ", "]"
        ).replace(" <", "<")
        if source is not INST:  # which has spaces around its replies
            assert written[0] == written[1]


def test_stories_end_where_they_end_here(tmp_path):
    """A story ends with the BOS of the next one: transformers and llama.cpp are told so. A chat
    template says itself where a reply ends."""
    transformers, gguf = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    from model import generate
    from tokenizer import stop_ids

    path = sentencepiece_model(tmp_path / "d", "made")
    t = Tokenizer(path)
    model = checkpoint(tmp_path / "c.pt", vocab_size=t.n_words, tied=False).eval()
    prompt = t.encode("Once upon a time", True, False)[:8]
    story = generate(model, [prompt], 9, temperature=0, stop_ids=[]).responses()[0]
    with torch.no_grad():  # BOS has the largest logit after the story
        h = model.hidden(torch.tensor([prompt + story]))[0, -1]
        model.output.weight[t.bos_id] = h * 2 * model.output(h).max() / h.square().sum()
    saved = load_checkpoint(tmp_path / "c.pt")
    save_checkpoint(tmp_path / "c.pt", saved | {"model": model.state_dict()})
    ours = generate(model, [prompt], 20, temperature=0, stop_ids=stop_ids(t)).responses()[0]
    assert ours[-1] == t.bos_id and len(ours) < 12
    flags = [f"--checkpoint={tmp_path}/c.pt", f"--tokenizer={path}", "--dtype=float32"]
    run(tmp_path / "hf", "--format=hf", *flags)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    assert out[0].tolist() == prompt + ours
    run(tmp_path / "m.gguf", "--format=gguf", *flags)
    field = gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.eot_token_id")
    assert field.contents() == t.bos_id
    if importlib.util.find_spec("xllamacpp"):
        assert llama_cpp_greedy(llama_cpp(tmp_path / "m.gguf", 40), prompt, 20) == ours
    for out in "hf", "m.gguf":  # and back: BOS ends a text here in any case
        run(tmp_path / "b.pt", f"--{'hf' if out == 'hf' else 'gguf'}={tmp_path}/{out}")
        assert stop_ids(t, None, load_checkpoint(tmp_path / "b.pt").get("end_ids")) == stop_ids(t)

    saved["template"] = {"turn": "{bos}Q: {user} A: {reply}{eos}"}
    save_checkpoint(tmp_path / "c.pt", saved)
    run(tmp_path / "chat", "--format=hf", *flags)
    config = json.loads((tmp_path / "chat/generation_config.json").read_text())
    assert config["eos_token_id"] == t.eos_id


def test_a_reply_ends_in_other_programs_where_it_ends_here(tmp_path):
    """A template may end replies with another token than EOS: both formats list it as an end."""
    transformers, gguf = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    path = make_bpe(tmp_path / "t", "smollm2")
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    model = checkpoint(tmp_path / "c.pt", vocab_size=600, tied=False)
    with torch.no_grad():  # after any token, the next one is the most likely
        for name, p in model.named_parameters():
            p.zero_() if "layers" in name else p.fill_(1)
        model.tok_embeddings.weight.copy_(torch.eye(600, 48))
        model.output.weight.copy_(torch.eye(600, 48).roll(1, 0))
    turn = "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
    saved = load_checkpoint(tmp_path / "c.pt") | {"template": {"turn": turn}}
    save_checkpoint(tmp_path / "c.pt", saved | {"model": model.state_dict(), "end_ids": [7]})
    flags = f"--checkpoint={tmp_path}/c.pt", f"--tokenizer={path}"
    run(tmp_path / "hf", "--format=hf", *flags)
    for name in "config.json", "generation_config.json":
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == [0, 2, 7]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    out = theirs.generate(torch.tensor([[5, 1]]), max_new_tokens=5, do_sample=False)
    assert out.tolist() == [[5, 1, 2]]
    run(tmp_path / "m.gguf", *flags)
    field = gguf.GGUFReader(tmp_path / "m.gguf").get_field
    assert [field(f"tokenizer.ggml.{x}_token_id").contents() for x in ("eos", "eot", "eom")] == [
        *(0, 2, 7)
    ]
    assert list(field("fable.end_ids").contents()) == [2, 7]


def test_llama_3s_template_and_one_that_strings_cannot_say():
    template = formats.template_from_jinja(HEADERS, "<|begin_of_text|>", "<|eot_id|>")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    exchange = f"{head.format('user')}{{user}}{{eos}}{head.format('assistant')}{{reply}}{{eos}}"
    assert template == {
        "turn": "{bos}" + exchange,
        "next": exchange,
        "system": f"{{bos}}{head.format('system')}{{system}}{{eos}}{exchange}",
    }
    for source, says in (
        (COUNTS, "not its generation prompt"),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", "generation"),
        ("{% if %}", "."),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("", "left out"),
    ):
        with pytest.raises(ValueError, match=says):
            formats.template_from_jinja(source, "<s>", "</s>")


def test_chat_settings_come_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    hugging_face(tmp_path / "in", "smollm2", eos_token_id=[0, 2, 5])
    (tmp_path / "in/generation_config.json").unlink(missing_ok=True)
    config = make_bpe(tmp_path / "in", "smollm2").parent / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": CHATML}))
    done = run(tmp_path / "ckpt.pt", f"--hf={tmp_path}/in")
    assert "with its chat template" in done.stdout
    saved = load_checkpoint(tmp_path / "ckpt.pt")
    assert saved["end_ids"] == [0, 5]  # 2 is the tokenizer's EOS
    run(tmp_path / "out", f"--checkpoint={tmp_path}/ckpt.pt", "--format=hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == CHATML
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/ckpt.pt")
    data = (tmp_path / "m.bin").read_bytes()
    kind, at, size = struct.unpack_from("<I2Q", data, 92)
    texts = [saved["template"][name].encode() for name in ("turn", "system", "next")]
    assert kind == 1 and data[at:] == b"".join(struct.pack("<I", len(x)) + x for x in texts)
    assert at + size == len(data) and struct.unpack_from("<4i", data, 128) == (5, 0, 0, 0)
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": COUNTS}))
    assert "template was dropped" in run(tmp_path / "b.pt", f"--hf={tmp_path}/in").stdout
    saved["template"]["turn"] = "{bos}Q: {user} A: {reply}{eos}"  # as fine-tuning may have it
    save_checkpoint(tmp_path / "tuned.pt", saved)
    run(tmp_path / "tuned", f"--checkpoint={tmp_path}/tuned.pt", "--format=hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert (
        theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        == "<|im_start|>Q: Hi A: "
    )


# -----------------------------------------------------------------------------
# PEFT, GGUF, Meta, llama2.c's version 1


@pytest.mark.parametrize(
    "layers, stage, head_dim",
    [("q,v", "sft", None), ("q,k,v,o,gate,down,up", "ppo", None), ("q,o", "sft", 10)],
)
def test_peft_loads_adapters(tmp_path, layers, stage, head_dim):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = checkpoint(tmp_path / "ckpt.pt", head_dim=head_dim).eval()
    run(tmp_path / "base", f"--checkpoint={tmp_path}/ckpt.pt", "--format=hf")
    add_lora(model, 4, 8.0, 0.0, layers).eval()
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)
    adapters = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    lora = {"rank": 4, "alpha": 8.0, "layers": layers}
    saved = (
        {"lora": {**lora, "four_bit": False, "state": adapters}}
        if stage == "sft"
        else {
            "ppo": {"policy": model.state_dict()},
            "config": {f"lora_{k}": v for k, v in lora.items()},
        }
    )
    torch.save({**saved, "model_args": checkpoint_args(model.args)}, tmp_path / "lora.pt")
    run(
        tmp_path / "adapter",
        f"--checkpoint={tmp_path}/lora.pt",
        "--format=peft",
        f"--base={tmp_path}/base",
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base, 30, 77)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert (logits(theirs, 30, 77) - logits(model, 30, 77)).abs().max() < 1e-4
    assert (logits(theirs, 30, 77) - plain).abs().max() > 1e-2
    assert theirs.peft_config["default"].base_model_name_or_path == f"{tmp_path}/base"
    done = run(tmp_path / "x", f"--checkpoint={tmp_path}/ckpt.pt", "--format=peft", ok=1)
    assert "has no LoRA adapters" in done.stderr


def test_adapters_that_do_not_fit_are_one_line(tmp_path):
    def save_to(folder, value):
        torch.save(value, folder / "lora.pt")
        return folder / "lora.pt"

    model = checkpoint(tmp_path / "ckpt.pt")
    add_lora(model, 4, 8.0, 0.0, "q,v")
    state = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    lora, sizes = dict(rank=4, alpha=8.0, layers="q,v", state=state), checkpoint_args(model.args)
    good, first = {"lora": lora, "model_args": sizes}, next(iter(state))
    run(tmp_path / "x", f"--checkpoint={save_to(tmp_path, good)}", "--format=peft")
    for wrong in (
        dict(lora=[3]),
        dict(lora=lora | dict(rank=8)),
        dict(lora=lora | dict(rank="4")),
        dict(lora=lora | dict(alpha=None)),
        dict(lora=lora | dict(layers=None)),
        dict(lora=lora | dict(layers="q,o")),
        dict(lora=lora | dict(state=[3])),
        dict(lora=lora | dict(state=torch.zeros(3))),
        dict(lora=lora | dict(state=state | {first: [3]})),
        dict(lora=lora | dict(state={"x.lora_a": torch.zeros(4, 4)})),
        dict(model_args=None),
        dict(model_args={"a": 1}),
        dict(ppo={}),  # of another program, or without its policy
    ):
        path = save_to(tmp_path, good | wrong)
        done = run(tmp_path / "y", f"--checkpoint={path}", "--format=peft", ok=1)
        assert f"{path} has no LoRA adapters" in done.stderr, wrong
        assert done.stderr.count("\n") == 1 and not (tmp_path / "y").exists()


def test_gguf_holds_the_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    for tokenizer, changes in (
        ("smollm2", {"hidden_dim": 52}),
        (
            "llama3",
            {"rope_scaling": dict(zip(export.LLAMA3_SCALING, (8.0, 1.0, 4.0, 16))), "tied": False},
        ),
        ("made", {"rope_scaling": {"factor": 4.0}, "vocab_size": 512}),
    ):
        path = (
            sentencepiece_model(tmp_path / "d", "made")
            if tokenizer == "made"
            else make_bpe(tmp_path / tokenizer, tokenizer)
        )
        model = checkpoint(tmp_path / "c.pt", **{"dim": 96, "vocab_size": 600, **changes})
        for dtype in ("float32", "q8_0"):
            run(
                tmp_path / "m.gguf",
                f"--checkpoint={tmp_path}/c.pt",
                "--format=gguf",
                f"--dtype={dtype}",
                f"--tokenizer={path}",
            )
            reader = gguf.GGUFReader(tmp_path / "m.gguf")

            def field(name, reader=reader):
                return reader.get_field(name).contents()

            assert field("general.architecture") == "llama"
            names = (
                "embedding_length block_count context_length feed_forward_length "
                "attention.head_count attention.head_count_kv"
            )
            assert [field(f"llama.{n}") for n in names.split()] == [96, 2, 40, 52, 6, 2]
            tensors = {t.name: t for t in reader.tensors}
            for name, w in model.state_dict().items():
                if name == "output.weight" and model.args.tied:
                    assert "output.weight" not in tensors
                    continue
                t = tensors.pop(formats.gguf_name(name))
                got = gguf.quants.dequantize(t.data, t.tensor_type).reshape(w.shape)
                whole = dtype == "float32" or w.ndim == 1 or w.shape[1] % 32
                assert t.tensor_type == (
                    gguf.GGMLQuantizationType.F32 if whole else gguf.GGMLQuantizationType.Q8_0
                )
                error = np.abs(got - w.numpy()).max()
                assert error == 0 if whole else error < np.abs(w.numpy()).max() / 200
            vocabulary, t = field("tokenizer.ggml.tokens"), Tokenizer(path)
            assert len(vocabulary) == model.args.vocab_size
            assert (field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")) == (
                t.bos_id,
                t.eos_id,
            )
            if tokenizer == "llama3":
                assert tensors.pop("rope_freqs.weight").data.tolist()[-1] == 8
                assert field("tokenizer.ggml.pre") == "llama-bpe"
            elif tokenizer == "made":
                assert field("llama.rope.scaling.factor") == 4
            assert not tensors


@pytest.mark.parametrize("kind", ["made", "llama3", "smollm2", "gpt2", "heads of 16"])
def test_llama_cpp_tells_the_same_story(tmp_path, kind):
    """llama.cpp reads our GGUF file: the same ids of each text, and the same greedy story, to its
    end."""
    from model import generate
    from tokenizer import stop_ids

    changes = {"head_dim": 16} if kind == "heads of 16" else {}
    kind = "made" if changes else kind
    path = sentencepiece_model(tmp_path / "d", kind) if kind == "made" else make_bpe(tmp_path, kind)
    scaling = dict(zip(export.LLAMA3_SCALING, (8.0, 1.0, 4.0, 16)))
    if kind in ("llama3", "gpt2"):
        changes["rope_scaling"] = scaling if kind == "llama3" else {"factor": 2.0}
    t = Tokenizer(path)
    model = checkpoint(tmp_path / "c.pt", vocab_size=t.n_words, **changes).eval()
    run(
        tmp_path / "m.gguf",
        f"--checkpoint={tmp_path}/c.pt",
        "--format=gguf",
        "--dtype=float32",
        f"--tokenizer={path}",
    )
    post, lengths = llama_cpp(tmp_path / "m.gguf", 40), []
    ends = set(stop_ids(t))
    if kind == "llama3":  # llama.cpp ends at these names, whatever the model's end tokens are
        first = t.n_words - len(LLAMA3_TOKENS)
        ends |= {first + LLAMA3_TOKENS.index(name) for name in ("end_of_text", "eom_id")}
    for text in TEXTS:
        ids = t.encode(text, True, False)
        if kind != "gpt2":  # llama.cpp knows no add_prefix_space there
            assert post("tokenize", content=text, add_special=True, parse_special=False) == {
                "tokens": ids
            }
        ids = ids[:10]
        want = generate(model, [ids], 25, temperature=0, stop_ids=ends).responses()[0]
        assert llama_cpp_greedy(post, ids, 25) == want
        lengths.append(len(want))
    assert sum(lengths) > 25


@pytest.mark.parametrize(
    "n, vocab, changes",
    [
        (1, 77, {"tied": False}),
        (2, 78, {"tied": False, "dim": 96, "hidden_dim": 104}),
        (2, 128256, {"tied": False, "n_layers": 1, "dim": 48}),
        (2, 78, {"tied": False, "head_dim": 10}),
    ],
)
def test_meta_shards_are_put_together(tmp_path, n, vocab, changes):
    """Columns of wo, w2 and, up to Llama 2, the embedding are cut; of the others rows."""
    model = checkpoint(tmp_path / "want.pt", vocab_size=vocab, **changes)
    state, a = model.state_dict(), model.args
    (tmp_path / "in").mkdir()
    for i in range(n):
        shard = {"rope.freqs": torch.zeros(4)}
        for name, w in state.items():
            by_columns = name.endswith(("wo.weight", "w2.weight")) or (
                "tok_emb" in name and vocab < 100000
            )
            shard[name] = w if w.ndim == 1 else w.chunk(n, int(by_columns))[i].clone()
        torch.save(shard, tmp_path / f"in/consolidated.{i:02}.pth")
    params = {
        "dim": a.dim,
        "n_layers": a.n_layers,
        "n_heads": 6,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": -1,
        "multiple_of": 4,
    }
    if vocab > 100000:
        params |= {"rope_theta": 500000.0, "use_scaled_rope": True}
    if "head_dim" in changes:
        params["head_dim"] = changes["head_dim"]
    (tmp_path / "in/params.json").write_text(json.dumps(params))
    run(tmp_path / "ckpt.pt", f"--meta={tmp_path}/in", "--max_seq_len=40")
    got = ours(tmp_path / "ckpt.pt")
    assert all(torch.equal(w, state[name]) for name, w in got.state_dict().items())
    assert (got.args.ffn_dim, got.args.rope_scaling is not None) == (a.ffn_dim, vocab > 100000)
    if n > 1:
        (tmp_path / "in/consolidated.00.pth").rename(tmp_path / "in/consolidated.02.pth")
        done = run(tmp_path / "x.pt", f"--meta={tmp_path}/in", ok=1)
        assert "consolidated.00.pth is missing" in done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "run"
    done = subprocess.run(
        [
            os.environ.get("CC", "cc"),
            "-O2",
            str(ROOT / "run.c"),
            "-o",
            str(path),
            "-lm",
            "-pthread",
        ],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return path


def llama3_folder(folder, ranks, **params):
    """A model as Meta has Llama 3, with tiktoken's tokenizer.model of these tokens, in order."""
    model = checkpoint(folder / "model.pt", vocab_size=len(ranks) + 256).eval()
    (folder / "in").mkdir()
    torch.save(
        {k: w for k, w in model.state_dict().items() if not k.startswith("output")},
        folder / "in/consolidated.00.pth",
    )
    (folder / "in/params.json").write_text(
        json.dumps(
            {
                "dim": 48,
                "n_layers": 2,
                "n_heads": 6,
                "n_kv_heads": 2,
                "norm_eps": 1e-5,
                "vocab_size": len(ranks) + 256,
                **params,
            }
        )
    )
    (folder / "in/tokenizer.model").write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
    )
    return model


ODD = [
    "Once upon a time, there was a girl.",
    "안녕",
    "It's 12345 o'clock!\n\n  SHE'LL do\r\n\t it",
    "안녕하세요 мир é 你好，世界",
    "नमस्ते ١٢٣٤ שלום สวัสดี",
    "   ",
    "xq" * 70,
    "👩‍👩‍👧 a\u0301 \x00 <|eot_id|> aaaaaaaaaaaaa",
    "x = [i**2 for i in range(10)]  # 1e-5",
]


@pytest.mark.parametrize("kind", ["trained", "shuffled"])
def test_metas_llama_3_tokenizer(tmp_path, kind, program):
    """
    A tokenizer.model of ranks gives tiktoken's ids, in Python and in C: with ranks as training
    gives them and, since a rank alone decides there, with ranks in any order.
    """
    tiktoken = pytest.importorskip("tiktoken")
    transformers = pytest.importorskip("transformers")
    from tiktoken.load import load_tiktoken_bpe
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocab = json.loads(make_bpe(tmp_path / "bpe").read_text())["model"]["vocab"]
    byte = formats.byte_alphabet()
    ranks = [bytes(byte[c] for c in text) for text in vocab] + ["안녕".encode()]  # in no merge
    rng = np.random.default_rng(0)
    if kind == "shuffled":  # nearly all that two letters can spell
        ranks += [bytes(x) for n in (2, 3, 4, 5) for x in itertools.product(b"xq", repeat=n)]
        ranks = [ranks[i] for i in rng.permutation(len(ranks))]
    model = llama3_folder(tmp_path, ranks, use_scaled_rope=kind == "trained", rope_theta=1e4)
    n = len(ranks)
    run(tmp_path / "out/ckpt.pt", f"--meta={tmp_path}/in", "--max_seq_len=40")
    t = Tokenizer(tmp_path / "out/tokenizer.json")
    pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
    loaded = load_tiktoken_bpe(str(tmp_path / "in/tokenizer.model"))
    oracle = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=loaded, special_tokens={})
    texts = ODD + ["".join(x) for x in rng.choice(["x", "q"], (100, 30))]
    for text in texts:
        ids = t.encode(text, False, False)
        assert ids == oracle.encode_ordinary(text) and t.decode(ids) == text
    assert (t.n_words, t.bos_id, t.eos_id) == (n + 256, n, n + 1)
    names = {"<|start_header_id|>": 6, "<|eot_id|>": 9, "<|reserved_special_token_1|>": 3}
    names |= (
        {"<|python_tag|>": 10, "<|reserved_special_token_247|>": 255}
        if kind == "trained"
        else {"<|reserved_special_token_4|>": 8, "<|reserved_special_token_250|>": 255}
    )
    assert {name: t.special[name] - n for name in names} == names and len(t.special) == 256
    ends = [n + 9, n + 8] if kind == "trained" else [n + 9]
    assert load_checkpoint(tmp_path / "out/ckpt.pt")["end_ids"] == ends
    run(tmp_path / "hf", f"--checkpoint={tmp_path}/out/ckpt.pt", "--format=hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode(ODD[1]) == t.encode(ODD[1], True, False)

    model = ours(tmp_path / "out/ckpt.pt")  # C says its loss of these texts: that of tiktoken's ids
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/out/ckpt.pt", "--format=fp32")
    texts = [text.strip(" \n") for text in texts if text.strip(" \n")]
    (tmp_path / "text").write_bytes("<|endoftext|>".join(texts).encode())
    done = subprocess.run(
        [program, tmp_path / "m.bin", "-m", "perplexity", "-i", tmp_path / "text", "-j", "1"],
        capture_output=True,
        text=True,
    )
    ids = torch.tensor([i for text in texts for i in (n, *oracle.encode_ordinary(text))])
    with torch.no_grad():
        parts = zip(ids[:-1].split(40), ids[1:].split(40))
        loss = sum(float(model(x[None], y[None])) * len(x) for x, y in parts) / (len(ids) - 1)
    told = re.search(r"loss ([\d.]+).* (\d+) tokens in", done.stdout)
    assert int(told[2]) == len(ids) - 1 and abs(float(told[1]) - loss) < 1e-4


@pytest.mark.parametrize(
    "says, damage",
    [
        ("its line 1 is not a token in base64", lambda data: b"\x0a" + data[1:]),
        ("its line 301 is not a token in base64", lambda data: data[: data.index(b" 300\n") + 1]),
        ("its line 3 is not a token in base64", lambda data: data.replace(b" 2\n", b" two\n")),
        (
            "lacks ranks, or is cut short",
            lambda data: data[: data.index(b" 299\n") + 5] + b"YXp5 301\n",
        ),
        ("lacks ranks, or is cut short", lambda data: b"".join(data.splitlines(True)[:200])),
        (
            "has 300 tokens and 256 special ones, the model has 560",
            lambda data: data[: data.index(b" 299\n") + 5],
        ),
    ],
)
def test_what_can_be_wrong_with_ranks(tmp_path, says, damage):
    llama3_folder(tmp_path, [bytes([b]) for b in range(256)] + [b"a%02d" % i for i in range(48)])
    path = tmp_path / "in/tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    done = run(tmp_path / "out.pt", f"--meta={tmp_path}/in", ok=1)
    assert says in done.stderr and f"{path}" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["in", "model.pt"]


def test_version_1_is_llama2cs(tmp_path):
    for tied in (True, False):
        model = checkpoint(tmp_path / "ckpt.pt", tied=tied)
        run(tmp_path / "m.bin", "--version=1", "--checkpoint", tmp_path / "ckpt.pt")
        data = (tmp_path / "m.bin").read_bytes()
        assert struct.unpack_from("<Ii7iB", data) == (0x616B3432, 1, 48, 52, 2, 6, 2, 77, 40, tied)
        norms = [f"layers.{i}.{n}_norm" for n in ("attention", "ffn") for i in (0, 1)] + ["norm"]
        rest = [f"layers.{i}.{n}" for n in export.MATRICES for i in (0, 1)]
        at = 256
        for name in [*norms, "tok_embeddings", *rest, *["output"] * (not tied)]:
            w = model.state_dict()[f"{name}.weight"].numpy()
            assert np.array_equal(np.frombuffer(data, "<f4", w.size, at).reshape(w.shape), w), name
            at += w.nbytes
        assert at == len(data)
    checkpoint(tmp_path / "ckpt.pt", rope_theta=5e5)
    for version in (0, 1, 2):
        done = run(tmp_path / "x", f"--version={version}", f"--checkpoint={tmp_path}/ckpt.pt", ok=1)
        assert "llama2.c computes with rope_theta 10000" in done.stderr


def test_version_3_says_how_rope_is_scaled(tmp_path):
    for scaling, want in (
        (None, (0, 0, 0, 0)),
        ({"factor": 4.0}, (4, 0, 0, 0)),
        (dict(zip(export.LLAMA3_SCALING, (8, 1.0, 4.0, 8192))), (8, 1, 4, 8192)),
    ):
        checkpoint(tmp_path / "c.pt", rope_scaling=scaling)
        run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt")
        assert struct.unpack_from("<3fi", (tmp_path / "m.bin").read_bytes(), 112) == want


# -----------------------------------------------------------------------------
# A trained model in another shape: lifted.py

WIDER = dict(dim=256, n_layers=7, n_heads=16, n_kv_heads=4, vocab_size=600, hidden_dim=512)


def test_a_lifted_model_computes_what_it_was(stories260k_bin):
    """Other heads, more of them, other norms and RoPE pairs, and still the same logits."""
    args, weights = export.read_v0(stories260k_bin)
    weights = {name: w.double() for name, w in weights.items()}
    source = lifted.Lifted(args, weights, idle=1.0, **WIDER)
    large, small = Transformer(source.args).double().eval(), Transformer(args).double().eval()
    large.load_state_dict({name: source[name] for name in formats.model_shapes(source.args)})
    small.load_state_dict(weights)
    ids = torch.randint(0, 512, (2, 400))
    with torch.no_grad():
        got, want = large(ids), small(ids)
        assert want.std() > 5 and (got[..., :512] - want).abs().max() < 1e-4
        assert (got[..., 512:] - want[..., lifted.NEVER, None]).abs().max() < 1e-4
        w = large.get_parameter("layers.1.attention.wv.weight")  # of a layer that adds nothing
        assert torch.linalg.matrix_rank(w) == 64  # but is full, and passes on what is wrong
        w += 0.1 * w.std() * torch.randn_like(w)
        assert (large(ids)[..., :512] - want).abs().max() > 1e-2


def test_int8_of_a_lifted_model(tmp_path, program, monkeypatch, stories260k_bin, real_stories):
    """Its perplexity in run.c is within 0.5 % of fp32's; with 5 bits it is not."""
    monkeypatch.setattr(export, "SEARCH_LIMIT", 0)  # as for large matrices

    def perplexity(fmt, **shape):
        return lifted.read_by_c(DATA, tmp_path, program, fmt, 12, **shape)[1]

    exact = perplexity("fp32", **WIDER)
    assert exact == pytest.approx(perplexity("fp32"), rel=1e-4) and 3 < exact < 4
    assert perplexity("q8_0", **WIDER) == pytest.approx(exact, rel=0.005)
    quantize = export.quantize

    def coarse(w, group, dtype):
        q, scale = quantize(w, group, dtype)
        return np.clip(np.rint(q / 8), -15, 15).astype(np.int8) * 8, scale

    monkeypatch.setattr(export, "quantize", coarse)
    assert perplexity("q8_0", **WIDER) > 1.005 * exact


# -----------------------------------------------------------------------------
# Memory and mistakes


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured by /proc")
@pytest.mark.parametrize("source", ["hf", "meta", "llama2c"])
def test_peak_memory_is_about_the_models(tmp_path, source):
    """In bf16, 100 million weights, of which a third is the embedding; in fp32, half as many."""
    torch_save = pytest.importorskip("safetensors.torch").save_file
    args = ModelArgs(
        dim=1024,
        n_layers=2 if source == "llama2c" else 6,
        n_heads=16,
        n_kv_heads=16,
        vocab_size=32000,
        hidden_dim=2816,
        max_seq_len=64,
    )
    folder = tmp_path / "in"
    folder.mkdir()
    half, shapes = torch.bfloat16, formats.model_shapes(args)
    kind = torch.float32 if source == "llama2c" else half
    weights = {name: torch.zeros(shape, dtype=kind) for name, shape in shapes.items()}
    size = sum(w.nbytes for w in weights.values())
    if source == "llama2c":
        with open(tmp_path / "m.bin", "wb") as f:
            export.write_v0(f, args, weights)
        folder = tmp_path / "m.bin"
    elif source == "hf":
        (folder / "config.json").write_text(json.dumps(formats.hf_config(args, half, 1, [2])))
        torch_save(
            {formats.hf_name(n): w for n, w in weights.items()}, folder / "model.safetensors"
        )
    else:
        torch.save(weights, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(
            json.dumps({"dim": 1024, "n_layers": 6, "n_heads": 16, "norm_eps": 1e-5})
        )
    del weights
    code = (
        "import re, sys; sys.path.insert(0, sys.argv[1]); import export, formats\n"
        "import safetensors.torch\n"  # libraries count for nothing, nor what they first load
        "formats.model_shapes(export.ModelArgs(dim=8, n_heads=1, n_layers=1))\n"
        "def memory(name):\n"  # not getrusage's, which begins with that of the parent process
        "    status = open('/proc/self/status').read()\n"
        "    return 1024 * int(re.search(name + r':\\s*(\\d+) kB', status)[1])\n"
        "before = memory('VmRSS')\n"
        "export.main(sys.argv[2:])\n"
        "print('PEAK', memory('VmHWM') - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path / "ckpt.pt"), f"--{source}={folder}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("PEAK")[1]) < 1.2 * size
    assert (tmp_path / "ckpt.pt").stat().st_size < 1.01 * size


def change(folder, name="config.json", **values):
    config = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v is not Ellipsis}))


def shorten(path, n):
    path.write_bytes(path.read_bytes()[:n])


def replace_tensors(folder, f):
    torch_io = pytest.importorskip("safetensors.torch")
    path = folder / "model.safetensors"
    torch_io.save_file(f(torch_io.load_file(path)), path)


def index_instead(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CONFIG_MISTAKES = {  # what config.json asks for, and what is said of it
    "the architecture MixtralForCausalLM": dict(architectures=["MixtralForCausalLM"]),
    "attention_bias true": dict(attention_bias=True),
    "mlp_bias true": dict(mlp_bias=True),
    "hidden_act gelu": dict(hidden_act="gelu"),
    "sliding_window 4096": dict(sliding_window=4096),
    "self_attn.q_proj.weight has shape (64, 64), not (128, 64)": dict(head_dim=32),
    "head_dim must be an even number from 2 to 16384, not 15": dict(head_dim=15),
    "head_dim must be an even number from 2 to 16384, not 100000": dict(head_dim=100000),
    "head_dim must be a whole number above 0, not 0": dict(head_dim=0),
    "head_dim must be a whole number above 0, not -16": dict(head_dim=-16),
    'head_dim must be a whole number above 0, not "16"': dict(head_dim="16"),
    "the RoPE scaling yarn": dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
    'quantization_config {"bits": 4}': dict(quantization_config={"bits": 4}),
    "does not say factor": dict(rope_parameters={"rope_type": "linear"}),
    "factor 4.0 with the RoPE scaling default": dict(rope_parameters={"factor": 4.0}),
    "factor 4 with the RoPE scaling default": dict(rope_parameters=..., rope_scaling={"factor": 4}),
    "which differs from layer to layer": dict(
        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 2.0}}
    ),
    "rope_parameters must be an object, not [2]": dict(rope_parameters=[2]),
    'rope_scaling must be an object, not "linear"': dict(rope_scaling="linear"),
    'factor of RoPE must be a number above 0, not "two"': dict(
        rope_parameters={"rope_type": "linear", "factor": "two"}
    ),
    "factor of RoPE must be a number above 0, not true": dict(
        rope_parameters={"rope_type": "linear", "factor": True}
    ),
    "rope_type linear in rope_scaling but default": dict(
        rope_scaling={"type": "linear", "factor": 2.0}
    ),
    'rope_scaling {"type": ["linear"]}, which': dict(rope_scaling={"type": ["linear"]}),
    "rope_theta 20000.0 beside 130000.0 in rope_parameters": dict(rope_theta=2e4),
    'rope_theta must be a number above 0, not "x"': dict(rope_parameters={"rope_theta": "x"}),
    "low_freq_factor must be below high": dict(rope_parameters=LLAMA3 | {"low_freq_factor": 8.0}),
    "num_hidden_layers must be a whole number above 0, not 2.0": dict(num_hidden_layers=2.0),
    "num_hidden_layers must be a whole number above 0, not true": dict(num_hidden_layers=True),
    "n_layers must be a whole number from 1 to 1024": dict(num_hidden_layers=10**9),
    "dim must be a whole number from 1 to 65536": dict(hidden_size=10**12, head_dim=None),
    "hidden_dim must be a whole number": dict(intermediate_size=10**9),
    "vocab_size must be a whole number from": dict(vocab_size=10**10),
    "max_seq_len must be a whole number": dict(max_position_embeddings=10**12),
    "num_key_value_heads must be a whole number above 0, not 0": dict(num_key_value_heads=0),
    "num_attention_heads must be a whole number above 0, not []": dict(num_attention_heads=[]),
    "norm_eps must be in [0, 1), not '1e-5'": dict(rms_norm_eps="1e-5"),
    "norm_eps must be in [0, 1), not nan": dict(rms_norm_eps=float("nan")),
    "tie_word_embeddings must be true or false": dict(tie_word_embeddings="no"),
    'the architecture "LlamaForCausalLM"': dict(architectures="LlamaForCausalLM"),
    "does not say hidden_size": dict(hidden_size=...),
    "has a wrong value": dict(hidden_size="big"),
    "n_heads (4) must be a multiple": dict(num_key_value_heads=3),
    "model.embed_tokens.weight has shape (600, 64), not (601, 64)": dict(vocab_size=601),
    "lacks model.layers.2.self_attn.q_proj.weight and 8 more": dict(num_hidden_layers=3),
    "has model.layers.1.": dict(num_hidden_layers=1),
    "lacks lm_head.weight": dict(tie_word_embeddings=False),
}
MISTAKES = {
    **{
        says: lambda d, values=values: change(d, **values)
        for says, values in CONFIG_MISTAKES.items()
    },
    "config.json is missing": lambda d: (d / "config.json").unlink(),
    "config.json is not JSON": lambda d: shorten(d / "config.json", 40),
    "model.safetensors cannot be read, or is cut short": lambda d: shorten(
        d / "model.safetensors", 20000
    ),
    "there is no model.safetensors": lambda d: (d / "model.safetensors").unlink(),
    "00002-of-00002.safetensors is missing": lambda d: index_instead(
        d, {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    ),
    "has no weight_map": lambda d: index_instead(d, {}),
    "has two sets of weights: name one of": lambda d: (
        d / "model.safetensors.index.json"
    ).write_text("{}"),
    "'state_dict' is not the name of a tensor": lambda d: (
        (d / "model.safetensors").unlink(),
        torch.save({"state_dict": {"a": torch.zeros(2)}}, d / "pytorch_model.bin"),
    ),
    "'3' is not the name of a tensor": lambda d: (
        (d / "model.safetensors").unlink(),
        torch.save({3: torch.zeros(2)}, d / "pytorch_model.bin"),
    ),
    "pytorch_model.bin is damaged: a checksum is wrong": lambda d: (
        (d / "model.safetensors").unlink(),
        torch.save({"a": torch.full((50,), 3.0)}, d / "pytorch_model.bin"),
        (d / "pytorch_model.bin").write_bytes(
            (d / "pytorch_model.bin").read_bytes().replace(b"@@\0\0" * 9, b"@C\0\0" * 9)
        ),
    ),
    "generation_config.json is not JSON": lambda d: (d / "generation_config.json").write_text(
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    ),
    "its post-processor does not define '<X>'": lambda d: change(
        make_bpe(d, "llama3").parent,
        "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<X>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
            "special_tokens": {},
        },
    ),
    "is torch.int8": lambda d: replace_tensors(
        d, lambda t: {k: w.to(torch.int8) for k, w in t.items()}
    ),
    "has x.bias, for which the model has no place": lambda d: replace_tensors(
        d, lambda t: t | {"x.bias": torch.zeros(3)}
    ),
    "tokenizer.json has 500 tokens, the model has 600": lambda d: make_bpe(d, "llama3", 500),
    "is not a tokenizer.json": lambda d: shorten(make_bpe(d, "llama3"), 5000),
}


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    hugging_face(folder, "smollm2")
    return folder


@pytest.mark.parametrize("says", MISTAKES)
def test_what_can_be_wrong_with_a_model(tmp_path, small_llama, says):
    shutil.copytree(small_llama, tmp_path / "in")
    MISTAKES[says](tmp_path / "in")
    done = run(tmp_path / "ckpt.pt", f"--hf={tmp_path}/in", ok=1)
    assert says in done.stderr and done.stderr.startswith("error:"), done.stderr
    assert done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr
    assert os.listdir(tmp_path) == ["in"]


def test_values_of_metas_files_must_be_tensors(tmp_path):
    params = {"dim": 32, "n_layers": 2, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": 64}
    (tmp_path / "params.json").write_text(json.dumps(params))
    for value, says in ({"a": torch.zeros(2)}, "name of a tensor"), (torch.ones(2).int(), "int32"):
        torch.save({"x": value}, tmp_path / "consolidated.00.pth")
        assert says in run(tmp_path / "c.pt", f"--meta={tmp_path}", ok=1).stderr


def test_a_huge_id_is_not_allocated(tmp_path, small_llama, monkeypatch):
    """A tokenizer.json that looks like SentencePiece's, with one token of a huge id."""
    folder = tmp_path / "in"
    shutil.copytree(small_llama, folder)
    t = {"added_tokens": [], "normalizer": {"type": "Prepend", "prepend": "\u2581"}}
    vocab = {"<unk>": 0, "\u2581": 1, "a": 4294967290}
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, **t}))
    monkeypatch.setattr(export, "json_to_sentencepiece", lambda t: 1 / 0)  # before it is called
    done = run(tmp_path / "c.pt", f"--hf={folder}", ok=1)
    assert "has 4294967291 tokens, the model has 600" in done.stderr


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_layers", 10**9),
        ("n_layers", 3),
        ("dim", 10**9),
        ("dim", 96),
        ("vocab_size", 10**9),
        ("vocab_size", 10**6),
        ("hidden_dim", 10**9),
        ("hidden_dim", 10**5),
        ("max_seq_len", 10**12),
        ("n_heads", 2.0),
        ("head_dim", 10**9),
        ("head_dim", 12),
        ("head_dim", 7),
        ("head_dim", -8),
        ("head_dim", "8"),
        ("n_layers", "2"),
        ("rope_theta", "big"),
        ("norm_eps", None),
    ],
)
def test_sizes_are_checked_before_a_model_is_built(tmp_path, monkeypatch, name, value):
    """model_args of a checkpoint, and params.json for what it says."""
    checkpoint(tmp_path / "c.pt")
    state = load_checkpoint(tmp_path / "c.pt")
    state["model_args"][name] = value
    save_checkpoint(tmp_path / "c.pt", state)
    (tmp_path / "in").mkdir()
    torch.save(state["model"], tmp_path / "in/consolidated.00.pth")
    (tmp_path / "in/params.json").write_text(json.dumps(state["model_args"]))
    built = []
    monkeypatch.setattr("torch.nn.Linear.__init__", lambda *_, **__: built.append(1) or 1 / 0)
    with pytest.raises(ValueError, match=name if value not in (12, 96, 10**5, 10**6) else "shape"):
        model_from_checkpoint(load_checkpoint(tmp_path / "c.pt"))
    assert not built
    monkeypatch.undo()
    in_params = "n_layers", "dim", "vocab_size", "n_heads", "head_dim", "rope_theta", "norm_eps"
    if name in in_params:
        done = run(tmp_path / "x.pt", f"--meta={tmp_path}/in", ok=1)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_suffix_says_what_is_written(tmp_path):
    gguf = pytest.importorskip("gguf")
    checkpoint(tmp_path / "c.pt")
    run(tmp_path / "m.gguf", f"--checkpoint={tmp_path}/c.pt")
    done = run(tmp_path / "m.gguf", f"--checkpoint={tmp_path}/c.pt", "--dtype=float32")
    assert "gguf, float32" in done.stdout
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors
    for name, *flags in (
        ("m.pt", "--merge_lora=a.pt", "--format=hf", "--dtype=bfloat16"),
        ("m.pt", "--merge_lora=a.pt", "--format=q8_0"),
        ("m.pt", "--merge_lora=a.pt", "--version=2"),
        ("m.pt", "--format=peft"),
        ("m.gguf", "--format=q8_0"),
        ("m.gguf", "--version=2"),
        ("m.pt",),
        ("m.safetensors",),
        ("m.bin", "--format=gguf"),
        ("m.bin", "--format=hf"),
    ):
        done = run(tmp_path / "new" / name, f"--checkpoint={tmp_path}/c.pt", *flags, ok=1)
        assert f"{name}: this command writes" in done.stderr and done.stderr.count("\n") == 1
    hugging_face(tmp_path / "in", "smollm2")
    done = run(tmp_path / "new/m.bin", f"--hf={tmp_path}/in", ok=1)
    assert "this command writes a checkpoint (.pt)" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line(tmp_path):
    """With a limit on the size of files, smaller than the weights: nothing is half-written."""
    resource = pytest.importorskip("resource")
    for name in "safetensors.torch", "gguf", "transformers":  # importing may write caches
        pytest.importorskip(name)
    model = checkpoint(tmp_path / "c.pt")
    add_lora(model, 16, 8.0, 0.0, "q,k,v,o,gate,down,up")
    state = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    lora = {"rank": 16, "alpha": 8.0, "layers": "q,k,v,o,gate,down,up", "state": state}
    torch.save({"lora": lora, "model_args": checkpoint_args(model.args)}, tmp_path / "lora.pt")
    before = sorted(os.listdir(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for out, source, *flags in (
        ("hf", "c.pt", "--format=hf"),
        ("adapter", "lora.pt", "--format=peft"),
        ("m.gguf", "c.pt"),
        ("m.bin", "c.pt", "--format=fp32"),
    ):
        for limit in 20000, 300, 0:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                done = run(tmp_path / out, f"--checkpoint={tmp_path}/{source}", *flags, ok=1)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert done.stderr.startswith(f"error: {tmp_path}/{out}: "), done.stderr
            assert re.search("File too large|disk is full", done.stderr), done.stderr
            assert done.stderr.count("\n") == 1 and ".tmp" not in done.stderr
            assert sorted(os.listdir(tmp_path)) == before


def test_temporary_folders_of_killed_processes_are_removed(tmp_path):
    """The folder that one of them was replacing comes back; those of a running process stay."""
    path = tmp_path / "a[b]"

    def killed(after):
        if not (child := os.fork()):
            try:
                with formats.write_folder(path, ["x"]) as folder:
                    after(folder)
            finally:
                os._exit(9)
        os.waitpid(child, 0)

    with formats.write_folder(path, ["x"]) as folder:
        (Path(folder) / "x").write_text("old")
    killed(lambda folder: os._exit(9))
    killed(lambda folder: (os.rename(path, Path(folder).with_name("old")), os._exit(9)))
    assert len(os.listdir(tmp_path)) == 1 and not path.exists()
    with formats.write_folder(path, ["x"]) as outer:
        assert (path / "x").read_text() == "old"
        with formats.write_folder(path, ["x"]):
            assert os.path.isdir(outer)
    assert os.listdir(tmp_path) == [path.name]


def test_a_checkpoint_that_was_there_is_kept(tmp_path, small_llama):
    """An import, and a merge of adapters, over a trained model. No source is overwritten."""
    model = checkpoint(tmp_path / "base.pt")
    add_lora(model, 2, 8.0, 0.0, "q,v")
    state = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    lora = {"rank": 2, "alpha": 8.0, "layers": "q,v", "four_bit": False, "state": state}
    torch.save({"lora": lora, "model_args": checkpoint_args(model.args)}, tmp_path / "lora.pt")
    merge = f"--checkpoint={tmp_path}/base.pt", f"--merge_lora={tmp_path}/lora.pt"
    path, kept = tmp_path / "out/ckpt.pt", tmp_path / "out/ckpt.replaced.pt"
    path.parent.mkdir()
    for flags in [f"--hf={small_llama}"], merge:
        kept.unlink(missing_ok=True)
        path.write_bytes(b"trained")
        done = run(path, "--hf=nowhere", ok=1)
        assert path.read_bytes() == b"trained" and not kept.exists()
        done = run(path, *flags)
        assert f"{path} was there before and is now {kept}" in done.stdout
        assert kept.read_bytes() == b"trained" and load_checkpoint(path)["model"]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.pt")}
    for out, *flags in (
        (tmp_path / "lora.pt", *merge),
        (kept, *merge, f"--tokenizer={kept}"),
        (kept, f"--hf={small_llama}", f"--tokenizer={kept}"),
    ):
        assert "would overwrite what is read" in run(out, *flags, ok=1).stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.pt")} == before
    run(path, *merge)  # the first one that was kept stays
    assert kept.read_bytes() == b"trained"
    assert (tmp_path / "out/ckpt.replaced2.pt").read_bytes() == before[path]


def test_files_follow_the_umask(tmp_path):
    pytest.importorskip("safetensors")
    model = checkpoint(tmp_path / "c.pt")
    add_lora(model, 2, 8.0, 0.0, "q,v")
    state = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    torch.save(
        {
            "lora": {"rank": 2, "alpha": 8.0, "layers": "q,v", "four_bit": False, "state": state},
            "model_args": checkpoint_args(model.args),
        },
        tmp_path / "lora.pt",
    )
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            run(tmp_path / "hf", f"--checkpoint={tmp_path}/c.pt", "--format=hf")
            run(tmp_path / "peft", f"--checkpoint={tmp_path}/lora.pt", "--format=peft")
        finally:
            os.umask(before)
        for path in [*(tmp_path / "hf").iterdir(), *(tmp_path / "peft").iterdir()]:
            assert path.stat().st_mode & 0o777 == mode, path


def test_id_0_ends_a_text(tmp_path, program):
    """In model.bin and Hugging Face's config, beside four other ids, and run.c stops there."""
    model = checkpoint(tmp_path / "c.pt", vocab_size=512)
    path = sentencepiece_model(tmp_path / "data", "made")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # all logits are equal: the most likely token is the first, 0
    state = load_checkpoint(tmp_path / "c.pt") | {"model": model.state_dict()}
    for ends, tokens in (([], 8), ([0], 1), ([5, 6, 0, 7, 8], 1)):
        save_checkpoint(tmp_path / "c.pt", state | {"end_ids": ends})
        run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", f"--tokenizer={path}")
        data = (tmp_path / "m.bin").read_bytes()
        assert struct.unpack_from("<i", data, 156) == (int(0 in ends),)
        done = subprocess.run(
            [program, tmp_path / "m.bin", "-t", "0", "-n", "8"], capture_output=True, text=True
        )
        assert re.search(r"story: (\d+) tokens", done.stderr)[1] == str(tokens), done.stderr
    run(tmp_path / "hf", f"--checkpoint={tmp_path}/c.pt", "--format=hf", f"--tokenizer={path}")
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == [
        2,
        5,
        6,
        0,
        7,
        8,
    ]


@pytest.mark.parametrize("kind", ["made", "llama3"])
def test_the_tokens_that_end_a_text_in_c(tmp_path, program, kind):
    """A model that always writes one token stops at once if that is BOS, EOS or an end id."""
    if kind == "made":
        path, size, ends = sentencepiece_model(tmp_path / "data", kind), 512, {1, 2, 7}
    else:  # its BOS and EOS are not 1 and 2
        path, size = make_bpe(tmp_path / "data"), 600
        t = Tokenizer(path)
        ends = {t.bos_id, t.eos_id, 7}
    model = checkpoint(tmp_path / "c.pt", vocab_size=size, tied=False)
    state = load_checkpoint(tmp_path / "c.pt") | {"end_ids": [7]}
    for written in {1, 2, 7, 8, *ends}:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            model.tok_embeddings.weight.fill_(1)
            model.norm.weight.fill_(1)
            model.output.weight[written] = 1
        save_checkpoint(tmp_path / "c.pt", state | {"model": model.state_dict()})
        run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", f"--tokenizer={path}")
        done = subprocess.run(
            [program, tmp_path / "m.bin", "-t", "0", "-n", "8"], capture_output=True, text=True
        )
        tokens = re.search(r"story: (\d+) tokens", done.stderr)[1]
        assert tokens == ("1" if written in ends else "8"), (written, done.stderr)


def test_an_empty_source_is_no_source(tmp_path):
    for flags in (["--checkpoint="], [], ["--checkpoint=a.pt", "--hf=b"]):
        assert "give either --checkpoint" in run(tmp_path / "m.bin", *flags, ok=2).stderr


def test_what_can_be_wrong_with_a_folder(tmp_path, monkeypatch):
    checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    ckpt = f"--checkpoint={tmp_path}/ckpt.pt"
    assert "something else (thesis.txt)" in run(tmp_path / "mine", ckpt, "--format=hf", ok=1).stderr
    file = tmp_path / "file"
    file.touch()
    assert "it is no folder" in run(file, ckpt, "--format=hf", ok=1).stderr
    file.unlink()
    for flags in (
        ["--format=hf", "--dtype=q8_0"],
        ["--dtype=float32"],
        ["--format=gguf", "--dtype=bfloat16"],
    ):
        assert "is not for this format" in run(tmp_path / "x", ckpt, *flags, ok=1).stderr
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert "would overwrite what is read" in run(tmp_path / "ckpt.pt", ckpt, ok=1).stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    rename = os.rename

    def interrupted(old, new):
        if os.path.basename(old) == "new":
            raise KeyboardInterrupt
        rename(old, new)

    for name in "folder.old", "folder.tmp":  # folders of the user
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("years")
    kept = sorted(os.listdir(tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "rename", interrupted)
        with formats.write_folder(folder, ["config.json"]):
            pass
    assert os.listdir(folder) == ["config.json"]  # the old one is back
    with formats.write_folder(folder, ["config.json"]):
        pass
    shutil.rmtree(folder)
    assert sorted(os.listdir(tmp_path)) == kept
    for name in "folder.old", "folder.tmp":
        assert (tmp_path / name / "notes.txt").read_text() == "years"
        shutil.rmtree(tmp_path / name)

    def full(*_):
        raise OSError(28, "No space left on device", "x")

    for name in ("safetensors.torch", "gguf", "transformers"):  # importing costs the time
        pytest.importorskip(name)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr(formats, "floats", full)
    for fmt in ("hf", "gguf"):
        assert "No space left" in run(tmp_path / "x", ckpt, f"--format={fmt}", ok=1).stderr
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "mine"]
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert (
        "this needs the gguf library: pip install gguf"
        in run(tmp_path / "x", ckpt, "--format=gguf", ok=1).stderr
    )
