"""export.py: what is written is what was there, in the layout that run.c documents."""

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import DATA, ROOT, make_bpe

import export
from model import (ModelArgs, Transformer, TransformerWithValueHead, add_lora, checkpoint_args,
                   load_checkpoint, model_from_checkpoint, save_checkpoint)
from tokenizer import Tokenizer, run_main

ARGS = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=52,
            max_seq_len=40)

def checkpoint(path, cls=Transformer, **changes):
    torch.manual_seed(0)
    model = cls(ModelArgs(**{**ARGS, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_checkpoint(path, {"model": model.state_dict(), "optimizer": None, "iter_num": 3,
                           "model_args": checkpoint_args(model.args), "best_val_loss": 1.0,
                           "config": {}})
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
    h["theta"], h["eps"], h["tok_at"], h["tok_size"], h["size"], h["squeeze"] = \
        struct.unpack_from("<2f3QI", data, 56)
    assert h["size"] == len(data) == h["tok_at"] + h["tok_size"] and not any(data[92:256])
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
    kv = D // h["heads"] * h["kv_heads"]
    w = {"tok_embeddings": matrix(V, D)}
    for i in range(h["layers"]):
        name = f"layers.{i}."
        w[name + "attention_norm"] = take("<f4", D)
        qkv = matrix(D + 2 * kv, D)
        for key, part in zip("qkv", np.split(qkv, [D, D + kv])):
            w[f"{name}attention.w{key}"] = part
        w[name + "attention.wo"] = matrix(D, D)
        w[name + "ffn_norm"] = take("<f4", D)
        pairs = matrix(2 * (-(-F // 16) * 16), D).reshape(-1, 2, 16, D)
        w[name + "feed_forward.w1"], w[name + "feed_forward.w3"] = \
            (pairs[:, k].reshape(-1, D)[:F] for k in (0, 1))
        w[name + "feed_forward.w2"] = matrix(D, F)
    w["norm"] = take("<f4", D)
    if not h["tied"]:
        w["output"] = matrix(V, D)
    assert at == h["tok_at"]
    return h, w

@pytest.mark.parametrize("changes", [{}, {"tied": False, "rope_theta": 5e5, "norm_eps": 1e-6},
                                     {"dim": 20, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 4},
                                     {"dim": 288, "vocab_size": 33, "hidden_dim": 768},
                                     {"dim": 128, "n_heads": 4, "hidden_dim": 129}])
def test_version_3_holds_the_model(tmp_path, changes):
    model = checkpoint(tmp_path / "ckpt.pt", **changes)
    for fmt in ("fp32", "q8_0"):
        run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/ckpt.pt", f"--format={fmt}")
        h, got = read_v3(tmp_path / "m.bin")
        a = model.args
        assert (h["magic"], h["version"], h["theta"], h["tied"]) == (
            0x616B3432, 3, np.float32(a.rope_theta), int(a.tied))
        assert abs(h["eps"] - a.norm_eps) < 1e-12 and h["seq"] == a.max_seq_len
        for name, w in got.items():
            want = model.state_dict()[f"{name}.weight"].numpy()
            if fmt == "fp32" or w.ndim == 1:
                assert np.array_equal(w, want), name
            else:  # half a step of the coarsest scale, and what the search trades at the edges
                assert np.abs(w - want).max() < 0.07 * np.abs(want).max(), name
                assert np.square(w - want).mean() ** 0.5 < 0.004 * np.abs(want).max(), name

def test_quantize_is_no_worse_than_the_largest_weights_scale():
    w = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    w[3, :64] = 0
    for group, dtype in ((16, "<f2"), (32, "<f4"), (64, "<f2"), (4, "<f4")):
        q, scale = export.quantize(w, group, dtype)
        got = q.reshape(64, -1, group) * scale.astype(np.float32)[..., None]
        plain = np.abs(w.reshape(64, -1, group)).max(-1, keepdims=True) / 127
        n = np.rint(w.reshape(64, -1, group) / np.maximum(plain, 1e-30))
        best, simple = (np.square(x - w.reshape(64, -1, group)).sum() for x in (got, n * plain))
        assert best <= simple * 1.01 and np.abs(q).max() <= 127
        assert (got[3].reshape(-1)[:64] == 0).all() and np.isfinite(got).all()

def test_group_makes_the_smaller_file():
    def group(**changes):
        return export.best_group(ModelArgs(**{**ARGS, "n_kv_heads": None, **changes}))
    assert group(dim=288, hidden_dim=768, vocab_size=32000) == 32  # 288 is no multiple of 64
    assert group(dim=768, n_heads=12, hidden_dim=2048, vocab_size=32000) == 64
    assert group(dim=64, n_heads=8, hidden_dim=172) == 16  # small enough for the cache

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
            assert torch.equal(model.eval()(ids), again.eval()(ids))
        data = (tmp_path / "m.bin").read_bytes()
        run(tmp_path / "again.bin", "--version=0", "--checkpoint", tmp_path / "back.pt")
        assert (tmp_path / "again.bin").read_bytes() == data

def test_stories260k_becomes_a_checkpoint(tmp_path, stories260k_bin, tok512_model):
    run(tmp_path / "ckpt.pt", f"--llama2c={stories260k_bin}", f"--tokenizer={tok512_model}",
        "--iter_num=98000")
    saved = load_checkpoint(tmp_path / "ckpt.pt")
    args = model_from_checkpoint(saved).args
    assert (args.ffn_dim, args.multiple_of, args.max_seq_len, args.n_kv_heads) == (172, 4, 512, 4)
    assert saved["model_args"].get("hidden_dim") is None  # the commands say --multiple_of=4
    assert (tmp_path / "tok512.model").read_bytes() == Path(tok512_model).read_bytes()
    done = run(tmp_path / "m.bin", "--checkpoint", tmp_path / "ckpt.pt")  # finds it there
    assert "tok512.model" in done.stdout
    data, size = (tmp_path / "m.bin").read_bytes(), struct.unpack_from(
        "<Q", (tmp_path / "m.bin").read_bytes(), 72)[0]
    Tokenizer(tok512_model).export(tmp_path / "tok512.bin")
    assert data[-size:] == (tmp_path / "tok512.bin").read_bytes()
    assert struct.unpack_from("<2i", data, 48) == (1, 2) and data[88] == 1
    run(tmp_path / "m0.bin", "--version=0", "--checkpoint", tmp_path / "ckpt.pt")
    ours, theirs = (tmp_path / "m0.bin").read_bytes(), Path(stories260k_bin).read_bytes()
    tables = 4 * 512 * 8  # RoPE, at the end, which nobody reads
    assert ours[:-tables] == theirs[:-tables] and len(ours) == len(theirs)

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
    (tmp_path / "broken.pt").write_bytes(ckpt.read_bytes()[:500])
    for status, says, args in [
            (2, "either", []), (2, "either", ["--checkpoint", ckpt, "--llama2c", ckpt]),
            (2, "--version", ["--checkpoint", ckpt, "--versoin=2"]),
            (2, "invalid choice", ["--checkpoint", ckpt, "--version=5"]),
            (1, "is for version 3", ["--checkpoint", ckpt, "--version=0", "--format=q8_0"]),
            (1, "nowhere.pt", ["--checkpoint", tmp_path / "nowhere.pt"]),
            (1, "broken.pt", ["--checkpoint", tmp_path / "broken.pt"]),
            (1, "nowhere.model", ["--checkpoint", ckpt, "--tokenizer", "nowhere.model"]),
            (1, "short.bin", ["--llama2c", tmp_path / "short.bin"])]:
        done = run(out, *args, ok=status)
        assert says in done.stderr and done.stderr.startswith("error:"), done.stderr
        assert done.stderr.count("\n") == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("m.bin")]  # nothing left behind
    assert "no tokenizer found" in run(out, "--checkpoint", ckpt).stdout

# -----------------------------------------------------------------------------
# Hugging Face

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {  # of Llama; what differs from a small model with 4 heads
    "llama2": dict(num_key_value_heads=4, rms_norm_eps=1e-5),
    "tinyllama": dict(num_key_value_heads=2, rms_norm_eps=1e-5, dtype="bfloat16"),
    "llama3.1": dict(num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama3.2": dict(num_key_value_heads=1, tie_word_embeddings=True, dtype="bfloat16",
                     rope_parameters=LLAMA3 | {"factor": 32.0}),
    "smollm2": dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=130000.0),
    "linear": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                   dtype="float16")}

def hugging_face(folder, kind, size="1GB", vocab_size=600, **changes):
    """A random model of a kind in `folder`, made by transformers, which it returns."""
    transformers = pytest.importorskip("transformers")
    changes = {**KINDS[kind], **changes}
    dtype = changes.pop("dtype", "float32")
    changes.setdefault("rope_parameters", {"rope_type": "default",
                                           "rope_theta": changes.pop("rope_theta", 1e4)})
    config = transformers.LlamaConfig(**{**dict(
        hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=vocab_size, max_position_embeddings=128, initializer_range=0.15), **changes})
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
    theirs, again = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="float32")
                     for name in ("in", "out"))
    want, model = logits(theirs), ours(tmp_path / "ckpt.pt")
    assert want.std() > 0.3  # there is something to compare
    assert (logits(model) - want).abs().max() < 1e-4
    assert torch.equal(logits(again), want)

@pytest.mark.parametrize("changes", [
    {}, {"tied": False, "rope_theta": 5e5, "norm_eps": 1e-6, "n_kv_heads": 6},
    {"rope_scaling": dict(zip(export.LLAMA3_SCALING, (8.0, 1.0, 4.0, 16)))},
    {"rope_scaling": {"factor": 2.0}, "n_kv_heads": 1}])
def test_our_model_in_transformers(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model = checkpoint(tmp_path / "ckpt.pt", **changes).eval()
    for dtype in (None, "bfloat16"):
        run(tmp_path / "out", f"--checkpoint={tmp_path}/ckpt.pt", "--format=hf",
            *([f"--dtype={dtype}"] if dtype else []))  # also over the one before
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert str(theirs.dtype) == f"torch.{dtype or 'float32'}"
        error = (logits(theirs, 40, 77) - logits(model, 40, 77)).abs().max()
        assert error < (1e-4 if dtype is None else 0.1)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "out"]  # nothing temporary is left
