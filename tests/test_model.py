"""The model against independent oracles: PyTorch autograd in float64, one sequence at a time,
exact distributions."""

import ctypes
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import functions_of
from torch.utils.checkpoint import checkpoint as recompute

import kernels
import model as M
from checkpoint import (
    checkpoint_args,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
)
from kernels import FastLinear, accelerate
from model import (
    ModelArgs,
    Transformer,
    TransformerWithValueHead,
    generate,
    sampling_probabilities,
)
from sft import add_lora, merged_state

END = (1, 2)  # llama2.c's BOS and EOS


def small(seed=0, **kw):
    """A little random model whose logits are far from uniform."""
    torch.manual_seed(seed)
    args = dict(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, multiple_of=4, max_seq_len=64
    )
    model = Transformer(ModelArgs(**(args | kw)))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.25)
    return accelerate(model.eval())


def naive_logits(model, tokens):
    """One sequence (T,) through the Llama equations, in float64, with nothing of model.py's forward
    but its weights. Oracle for everything else."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    a, T = model.args, len(tokens)
    H, K, E = a.n_heads, a.n_kv_heads, a.head_dim

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + a.norm_eps).sqrt() * weight

    def rope(x):  # (T, heads, E)
        out = x.clone()
        for t in range(T):
            for i in range(0, E, 2):
                angle = t / a.rope_theta ** (i / E)
                c, s = math.cos(angle), math.sin(angle)
                out[t, :, i] = x[t, :, i] * c - x[t, :, i + 1] * s
                out[t, :, i + 1] = x[t, :, i] * s + x[t, :, i + 1] * c
        return out

    x = w["tok_embeddings.weight"][tokens]
    for i in range(a.n_layers):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (h @ w[p + f"attention.w{n}.weight"].T for n in "qkv")
        q, k, v = rope(q.view(T, H, E)), rope(k.view(T, K, E)), v.view(T, K, E)
        heads = []
        for head in range(H):
            kv = head // (H // K)
            scores = q[:, head] @ k[:, kv].T / math.sqrt(E)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, kv])
        x = x + torch.cat(heads, -1) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate = h @ w[p + "feed_forward.w1.weight"].T
        up = h @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


NARROW = {"8 lanes": "-mno-avx512f", "4 lanes": "-mno-avx"}  # kernels.c for lesser processors
BACKENDS = ["native", *NARROW, "torch", "plain"]


@functools.cache
def narrow_library(flag):
    """kernels.c with narrower vectors than this processor's, or None where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.so"
        command = [os.environ.get("CC", "cc"), "-O1", "-march=native", flag, "-shared", "-fPIC"]
        command += [str(Path(kernels.__file__).with_name("kernels.c")), "-o", str(target), "-lm"]
        done = subprocess.run(command, capture_output=True)
        return None if done.returncode else ctypes.CDLL(str(target))


def use_backend(name, monkeypatch):
    library = narrow_library(NARROW[name]) if name in NARROW else kernels.library()
    if name == "plain":
        monkeypatch.setenv("NATIVE_KERNELS", "0")  # `accelerate` does nothing
    if name in ("torch", "plain"):
        library = None
    elif library is None:
        pytest.skip("kernels.c cannot be compiled so here")
    monkeypatch.setattr(kernels, "library", lambda: library)
    return name


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs a test with kernels.c, of all widths of vectors, with the fast classes where kernels.c
    is missing, and with model.py alone."""
    return use_backend(request.param, monkeypatch)


@pytest.fixture(params=["native", *NARROW])
def native(request, monkeypatch):
    """Runs a test with kernels.c, of all widths of vectors."""
    return use_backend(request.param, monkeypatch)


SHAPES = [  # heads, kv heads, head dim: all the cases of kernels.c, and one beyond it
    (4, 4, 8),
    (4, 2, 8),
    (6, 2, 4),
    (8, 1, 16),
    (3, 1, 6),
    (2, 2, 2),
    (4, 2, 12),
    (2, 1, 20),
]


@pytest.mark.parametrize("H,K,E", SHAPES)
def test_forward_is_the_llama_equations(backend, H, K, E):
    model = small(dim=H * E, n_heads=H, n_kv_heads=K)
    tokens = torch.randint(0, 48, (37,))
    expected = naive_logits(model, tokens)
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("H,K,E", [(4, 2, 16), (2, 1, 4), (3, 1, 20)])
def test_heads_that_are_wider_or_narrower_than_dim(backend, monkeypatch, H, K, E):
    """head_dim != dim / n_heads, as in Mistral-Nemo: logits, gradients and generated tokens."""
    model = small(n_heads=H, n_kv_heads=K, head_dim=E)
    assert model.layers[0].attention.wo.weight.shape == (32, H * E)
    tokens = torch.randint(3, 48, (2, 19))
    expected = torch.stack([naive_logits(model, row) for row in tokens])
    twin = Transformer(model.args).double()
    twin.load_state_dict(model.state_dict())
    twin(tokens, tokens.roll(-1, 1)).backward()
    for min_rows in 256, 1:  # with 1, whole layers are computed by one kernel
        monkeypatch.setattr(kernels, "MIN_ROWS", min_rows)
        model.zero_grad()
        torch.testing.assert_close(model(tokens).double(), expected, atol=1e-4, rtol=1e-4)
        model(tokens, tokens.roll(-1, 1)).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-5, rtol=1e-4)
    ids = tokens[0, :5].tolist()
    [new] = generate(model, [ids], 8, temperature=0, stop_ids=()).responses()
    for i, token in enumerate(new):
        assert naive_logits(model, torch.tensor(ids + new[:i]))[-1].argmax() == token
    drawn = dict(uniform=torch.rand(1, 20), stop_ids=())
    got = generate(model, [ids], 20, **drawn)
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert got.responses() == generate(model, [ids], 20, **drawn).responses()


def test_untied_classifier_and_theta(backend):
    model = small(tied=False, rope_theta=500.0)
    tokens = torch.randint(0, 48, (20,))
    expected = naive_logits(model, tokens)
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("H,K,E", [s for s in SHAPES if s[2] <= 16])
def test_native_attention_gradients(native, H, K, E):
    """Outputs and all gradients against autograd through PyTorch's attention in float64, for
    lengths around the vector width."""
    lengths = [1, 15, 16, 17, 33, 2]
    N = sum(lengths)
    q, k, v = (torch.randn(N, h, E, requires_grad=True) for h in (H, K, K))
    angles = torch.outer(torch.arange(40.0), 1e4 ** -(torch.arange(0, E, 2) / E))
    turned = torch.cat([angles[:n] for n in lengths])  # the angles of each token
    starts = torch.tensor([0, *lengths]).cumsum(0)
    out = kernels.FusedAttention.apply(q, k, v, starts, turned.cos(), turned.sin())
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    q2, k2, v2 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = []
    for i, n in enumerate(lengths):
        s = slice(starts[i], starts[i + 1])
        c, si = angles[:n].double().cos(), angles[:n].double().sin()

        # apply_rope works in fp32; this is its formula in complex numbers, in float64
        def turn(x):
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(z * torch.complex(c, si)[:, None]).flatten(-2)

        a, b = turn(q2[s]).transpose(0, 1), turn(k2[s]).repeat_interleave(H // K, 1).transpose(0, 1)
        vv = v2[s].repeat_interleave(H // K, 1).transpose(0, 1)
        expected.append(F.scaled_dot_product_attention(a, b, vv, is_causal=True).transpose(0, 1))
    expected = torch.cat(expected)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    oracle = torch.autograd.grad((expected * weight.double()).sum(), (q2, k2, v2))
    for got, want in zip(grads, oracle):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)


def test_native_attention_extreme_scores(native):
    """Scores of ±1e4 neither overflow nor lose the softmax."""
    q = torch.tensor([[[1e4, 0.0]], [[1e4, 0.0]]])
    k, v = torch.tensor([[[1.0, 0]], [[-1.0, 0]]]), torch.tensor([[[3.0, 4]], [[5.0, 6]]])
    one, zero = torch.ones(2, 1), torch.zeros(2, 1)
    out = kernels.FusedAttention.apply(q, k, v, torch.tensor([0, 2]), one, zero)
    torch.testing.assert_close(out, torch.tensor([[[3.0, 4]], [[3.0, 4]]]))


def test_no_gradient_is_subnormal(native):
    """Processors of Intel compute with subnormal numbers ten times more slowly. A probability that
    is too small to change a sum is 0, and so are the gradients that it would scale."""
    q = torch.tensor([[[1e3, 0.0]], [[1e3, 0.0]]])
    k, v = torch.tensor([[[1.0, 0]], [[-1.0, 0]]]), torch.tensor([[[3.0, 4]], [[5.0, 6]]])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    one, zero = torch.ones(2, 1), torch.zeros(2, 1)
    out = kernels.FusedAttention.apply(*inputs, torch.tensor([0, 2]), one, zero)
    grads = [*torch.autograd.grad(out, inputs, torch.full_like(out, 1e-6))]
    logits = torch.linspace(-200, 0, 48).repeat(8, 1).requires_grad_()
    terms = kernels.TokenTerms.apply(logits, torch.full((8,), 47), logits.detach() / 2)
    grads += torch.autograd.grad(terms, logits, [torch.full((8,), 1e-6)] * 3)
    assert grads[2][1].eq(0).all() and grads[3][:, 0].eq(0).all()
    least = torch.finfo(torch.float32).tiny
    assert not any(bool(((x != 0) & (x.abs() < least)).any()) for x in grads)


def test_a_nan_is_not_hidden_and_stays_in_its_place(native):
    """A key that is not a number spoils all queries that see it, and none before it."""
    q, k, v = torch.randn(3, 40, 2, 8)
    k[20, 0] = math.nan
    angles = torch.ones(40, 4)
    out = kernels.FusedAttention.apply(q, k, v, torch.tensor([0, 40]), angles, angles)
    spoilt = torch.zeros(40, 2, 8, dtype=torch.bool)
    spoilt[20:, 0] = True
    assert torch.equal(out.isnan(), spoilt)


def against_float64(function, oracle, *inputs):
    """Values and gradients of a function of fp32 tensors, and of its oracle in float64."""
    found = []
    for f, dtype in (function, torch.float32), (oracle, torch.float64):
        x = [i.to(dtype).requires_grad_() for i in inputs]
        out = f(*x)
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * weight).sum(), x)])
    for got, want in zip(*found):
        atol = 5e-5 + 2e-6 * float(
            want.detach().abs().max()
        )  # sums of large terms that all but cancel
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 300, 1025])
@pytest.mark.parametrize("width", [16, 64, 48, 20])  # the last is left to PyTorch
def test_rms_norm(native, rows, width):
    x, weight = torch.randn(rows, width) * 3, torch.randn(width)
    x[0] *= 1e-3  # eps matters

    def equation(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    against_float64(lambda x, w: kernels.rms_norm(x, w, 1e-5), equation, x, weight)


def test_rms_norm_takes_a_whole_number_for_eps(native):
    x, weight = torch.randn(3, 16), torch.randn(16)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1), F.rms_norm(x, (16,), weight, 1.0))


@pytest.mark.parametrize("width,hidden", [(16, 5), (32, 48), (48, 172)])
@pytest.mark.parametrize(
    "rows", [256, 700]
)  # whole tiles, and the last one neither full nor of whole vectors
def test_feed_forward(native, rows, width, hidden):
    """Also where the sigmoid is all but 0 or 1, and e^-x would overflow."""
    x, norm = torch.randn(rows, width) * 3, torch.randn(width)
    x[0] *= 1e-3  # eps matters
    w1, w2, w3 = (torch.randn(*s) / 8 for s in ((hidden, width), (width, hidden), (hidden, width)))
    w1[0], w2[:, 0] = 60 * w1[0], w2[:, 0] / 60

    def equation(x, norm, w1, w2, w3):
        n = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
        gate = n @ w1.T
        return (gate / (1 + (-gate).exp()) * (n @ w3.T)) @ w2.T

    assert kernels.native_layer(x, norm, w1, w2, w3)
    against_float64(
        lambda *i: kernels.FusedFeedForward.apply(*i, 1e-5), equation, x, norm, w1, w2, w3
    )


@pytest.mark.parametrize("width,q,k", [(16, 5, 3), (32, 32, 16), (48, 48, 48)])
@pytest.mark.parametrize("rows", [256, 1100])
def test_norm_and_products_of_attention(native, rows, width, q, k):
    x, norm = torch.randn(rows, width) * 3, torch.randn(width)
    weights = [torch.randn(n, width) / 8 for n in (q, k, k)]

    def equation(x, norm, *weights):
        n = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
        return torch.cat([n @ w.T for w in weights], 1)

    def layer(*inputs):
        return torch.cat(kernels.FusedQKV.apply(*inputs, 1e-5), 1)

    against_float64(layer, equation, x, norm, *weights)


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("vocabulary", [48, 7])  # the last is left to PyTorch
def test_token_terms_and_their_gradients(backend, vocabulary, with_reference):
    """Log-probability, entropy and KL of each token, and the gradients of any mix of them, against
    autograd through the definitions in float64."""
    logits, ref = torch.randn(2, 70, vocabulary) * 3
    logits[0, 0], ref[1, 3] = 40.0, 120.0  # distributions that are all but certain
    target, mix = torch.randint(0, vocabulary, (70,)), torch.randn(3, 70)
    target[5] = -1  # none
    x, x64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = kernels.TokenTerms.apply(x, target, ref if with_reference else None)
    logp, logr = x64.log_softmax(-1), ref.double().log_softmax(-1)
    want = [
        logp[range(70), target],
        -(logp.exp() * logp).sum(-1),
        (logp.exp() * (logp - logr)).sum(-1),
    ]
    want[0] = torch.where(target < 0, 0, want[0])
    if not with_reference:
        want[2] = want[2].detach() * 0
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    (torch.stack(got) * mix).sum().backward()
    (torch.stack(want) * mix).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-5, rtol=1e-5)


def test_loss_of_a_model(backend):
    """The mean over the targets that are there, and its gradient; a target that is no token is
    refused."""
    model, tokens = small(), torch.randint(0, 48, (2, 40))
    targets = torch.where(torch.rand(2, 40) < 0.3, -1, tokens.roll(-1, 1))
    logits = model(tokens).detach().requires_grad_()
    model.output.forward = lambda hidden: logits
    loss = model(tokens, targets)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    each = -exact.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    each[targets >= 0].mean().backward()
    torch.testing.assert_close(loss.double(), each[targets >= 0].mean())
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)
    for wrong in (48, -2):
        targets[1, 2] = wrong
        with pytest.raises(IndexError):
            model(tokens, targets)


@pytest.mark.parametrize("rows", [1, 511, 1300])
@pytest.mark.parametrize(
    "n,k", [(4, 16), (20, 48), (36, 80), (172, 64), (64, 172), (10, 64), (12, 12)]
)
def test_gradient_of_a_weight(native, rows, n, k):
    """As it lies, with the two operands exchanged, and left to oneDNN where neither fits."""
    g, x = torch.randn(rows, n), torch.randn(rows, k)
    want = g.double().T @ x.double()
    torch.testing.assert_close(
        kernels.transposed_product(g, x).double(), want, atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :64],
        lambda x: x[:1, :64].expand(300, 64),
        lambda x: x.view(64, 600)[:, :300].T,
    ],
)
def test_gradient_of_a_weight_from_a_view(native, view):
    """Rows that do not lie one after the other in memory."""
    x, w = view(torch.randn(300, 128)), torch.randn(32, 64, requires_grad=True)
    g = torch.randn(300, 32)
    kernels.multiply(x, w).backward(g)
    torch.testing.assert_close(w.grad.double(), g.double().T @ x.double(), atol=1e-4, rtol=1e-5)


def test_arguments_of_a_kernel_live_until_it_returns(monkeypatch):
    """Also a tensor that nobody but the call knows."""
    alive = []

    class Library:
        def kernel(self, pointer, number=None):
            alive.append(temporary() is not None)

        attention_forward = kernel

    def tensor():
        nonlocal temporary
        x = torch.zeros(4)
        temporary = weakref.ref(x)
        return x

    temporary = None
    monkeypatch.setattr(kernels, "library", Library)
    kernels.call("kernel", tensor(), 3)
    kernels.call("attention_forward", q=tensor(), S=3)
    assert alive == [True, True]


def test_structs_are_those_of_kernels_c():
    """The same fields of the same types in the same order."""
    source = Path(kernels.__file__).with_name("kernels.c").read_text()
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.S)
    kinds = {"int": ctypes.c_int, "float": ctypes.c_float}
    for name, struct in kernels.STRUCTS.items():
        assert re.search(rf"^int {name}\(const {struct.__name__} \*\w+\)", source, re.M)
        (body,) = re.findall(r"typedef struct {([^}]*)} " + struct.__name__ + ";", source)
        fields = []
        for declaration in body.split(";")[:-1]:
            kind, names = re.fullmatch(r"\s*((?:const )?\w+) (.*)", declaration, re.S).groups()
            for field in names.split(","):
                pointer = field.strip().startswith("*")
                assert pointer or kind in kinds
                fields.append((field.strip(" *\n"), ctypes.c_void_p if pointer else kinds[kind]))
        assert fields == struct._fields_


def test_packed_equals_one_at_a_time(backend, rows):
    model = small()
    lengths = [5, 1, 30, 17]
    tokens = torch.randint(0, 48, (sum(lengths),))
    packed = model(tokens, lengths=lengths).split(lengths)
    for part, logits in zip(tokens.split(lengths), packed):
        torch.testing.assert_close(logits, model(part[None])[0], atol=2e-5, rtol=1e-4)


def test_gradients_agree_between_backends(rows, monkeypatch):
    """The whole model's gradient with kernels.c is that with PyTorch's attention."""
    if kernels.library() is None:
        pytest.skip("kernels.c cannot be compiled here")
    model = small()
    lengths, tokens = [9, 20], torch.randint(0, 48, (29,))

    def gradient():
        model.zero_grad()
        model(tokens, tokens.roll(-1), lengths).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    native = gradient()
    monkeypatch.setattr(kernels, "library", lambda: None)
    for name, grad in gradient().items():
        torch.testing.assert_close(native[name], grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("adapters", ["", "q,v", "up"])
def test_gradients_when_activations_are_computed_again(backend, rows, adapters):
    """Of every kernel, as --fsdp computes each layer again: the gradients are those without."""
    model, tokens = small(dropout=0.0), torch.randint(0, 48, (2, 20))
    if adapters:
        add_lora(model, rank=2, layers=adapters)
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        loss = model(tokens, tokens.roll(-1))
        if kernels.library() is not None and kernels.MIN_ROWS == 1 and not adapters:
            fast = {
                f"{name}Backward"
                for name in ("FusedQKV", "FusedFeedForward", "FusedAttention", "TokenTerms")
            }
            assert fast | {"ProductBackward", "FusedRMSNormBackward"} <= functions_of(loss)
        return torch.autograd.grad(loss, trained)

    plain = gradients()
    for layer in model.layers:
        layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b) and a.any()
    whole = torch.autograd.grad(
        recompute(lambda: model(tokens, tokens.roll(-1)), use_reentrant=False), trained
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))


def test_cached_steps_equal_full_forward(backend):
    """Ragged prompts, some of them empty but for the current token, then ten steps."""
    model = small()
    rows = [torch.randint(0, 48, (n + 10,)) for n in (0, 3, 16, 31)]
    starts = [len(r) - 10 for r in rows]
    cache = model.new_cache(4, 41)
    with torch.no_grad():
        model.hidden(torch.cat([r[:n] for r, n in zip(rows, starts)]), starts, cache)
        for step in range(10):
            now = torch.stack([r[n + step] for r, n in zip(rows, starts)])
            logits = model(now, cache=cache)
            for i, (r, n) in enumerate(zip(rows, starts)):
                full = model(r[None, : n + step + 1])[0, -1]
                torch.testing.assert_close(logits[i], full, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("H,K,E", SHAPES)
def test_cached_steps_of_many_rows(backend, H, K, E):
    """More rows than a vector has lanes, of all lengths; widths that fill no vector; with
    adapters."""
    model = small(dim=H * E, n_heads=H, n_kv_heads=K, multiple_of=1, n_layers=1)
    add_lora(model, rank=2, layers="q,v,o,gate")
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p)
    rows = [torch.randint(0, 48, (n + 2,)) for n in range(19)]
    cache = model.new_cache(21, 21)
    with torch.no_grad():
        model.hidden(torch.cat([r[:-2] for r in rows]), [len(r) - 2 for r in rows], cache)
        for step in (-2, -1):
            logits = model(torch.stack([r[step] for r in rows]), cache=cache)
            for got, r in zip(logits, rows):
                full = model(r[None, : len(r) + step + 1])[0, -1]
                torch.testing.assert_close(got, full, atol=1e-4, rtol=1e-3)


def test_a_full_cache_is_refused(native):
    model = small()
    cache = model.new_cache(1, 3)
    model.hidden(torch.zeros(cache.capacity, dtype=torch.long), [cache.capacity], cache)
    with pytest.raises(ValueError, match="full"):
        model(torch.tensor([1]), cache=cache)
    zero = torch.zeros(1, dtype=torch.long)
    batch = M.Batch(
        cache=cache,
        prompt=zero,
        current=zero + 1,
        tokens=zero.repeat(1, 4),
        lengths=zero.clone(),
        probabilities=torch.ones(1, 4),
        limits=zero + 4,
        uniform=torch.rand(1, 4),
        stop_ids=zero[:0],
        sampling=(1.0, 0, 1.0),
    )
    with pytest.raises(ValueError, match="full"):
        model.sample_tokens(batch, 4)
    assert batch.tokens.tolist() == [[0] * 4] and batch.lengths.tolist() == [0]


def test_cache_rows_can_leave(backend):
    """`keep` keeps the others' contents, in the order it returns."""
    model = small()
    rows = [torch.randint(0, 48, (6,)) for _ in range(6)]
    cache = model.new_cache(6, 8)
    alive = torch.tensor([False, True, False, False, True, True])
    with torch.no_grad():
        model.hidden(torch.cat([r[:4] for r in rows]), [4] * 6, cache)
        order = cache.keep(alive)
        assert sorted(order.tolist()) == [1, 4, 5] and cache.rows == 3
        logits = model(torch.stack([rows[i][4] for i in order]), cache=cache)
        for got, i in zip(logits, order):
            torch.testing.assert_close(got, model(rows[i][None, :5])[0, -1], atol=3e-5, rtol=1e-4)


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="65 tokens .* 64"):
        small()(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="64 tokens"):
        generate(small(), [[1] * 64], 5, stop_ids=END)
    with pytest.raises(ValueError, match="0 tokens"):
        generate(small(), [[1], []], 5, stop_ids=END)


def test_padding_on_the_right_changes_nothing(backend):
    model = small()
    tokens = torch.randint(0, 48, (1, 20))
    padded = torch.cat([tokens, torch.randint(0, 48, (1, 9))], 1)
    torch.testing.assert_close(model(padded)[:, :20], model(tokens), atol=1e-5, rtol=1e-4)


def test_loss_ignores_minus_one():
    model = small()
    x, y = torch.randint(0, 48, (2, 8)), torch.randint(0, 48, (2, 8))
    y[0, 3:] = -1
    logp = model(x).log_softmax(-1)
    expected = -torch.stack(
        [logp[b, t, y[b, t]] for b in range(2) for t in range(8) if y[b, t] >= 0]
    )
    torch.testing.assert_close(model(x, y), expected.mean())


# ---- sampling


def chi_square(counts, p):
    """The p-value-free test: the statistic is below its mean plus 5 standard deviations."""
    expected = p * counts.sum()
    seen = p > 0
    assert counts[~seen].sum() == 0
    x = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    degrees = int(seen.sum()) - 1
    assert x < degrees + 5 * math.sqrt(2 * degrees) + 1e-9, (x, degrees)


def exact_distribution(logits, temperature, top_k, top_p):
    """Sampling probabilities, by sorting in plain Python."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    total = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i] / total
        if 0 < top_p <= mass:
            break
    total = sum(p[i] for i in kept)
    return torch.tensor([p[i] / total if i in kept else 0.0 for i in range(len(p))])


@pytest.mark.parametrize(
    "temperature,top_k,top_p",
    [
        (1, 0, 1),
        (0.5, 0, 1),
        (1.7, 0, 1),
        (1, 5, 1),
        (1, 0, 0.6),
        (0.8, 10, 0.9),
        (1, 999, 1),
        (1, 0, 0.0),
    ],
)
def test_sampling_frequencies(temperature, top_k, top_p):
    """20,000 first tokens of `generate` against the exact distribution."""
    model, n = small(), 20_000
    expected = exact_distribution(
        model(torch.tensor([[1, 7]]))[0, -1].detach(), temperature, top_k, top_p
    )
    out = generate(model, [[1, 7]] * n, 1, temperature, top_k, top_p, stop_ids=(), max_batch=n)
    chi_square(torch.bincount(out.tokens[:, 0], minlength=48).double(), expected.double())
    seen = out.tokens[:, 0]
    torch.testing.assert_close(
        out.logprobs[:, 0].exp(), expected[seen].float(), atol=1e-5, rtol=1e-4
    )


def test_sampling_edges():
    logits = torch.tensor([[0.0, 3.0, 1.0, -math.inf]])
    for kw in (dict(top_k=1), dict(top_p=1e-9)):
        assert sampling_probabilities(logits, **kw).tolist() == [[0, 1, 0, 0]]
    for top_p in (0.0, 1.0):  # llama2.c takes either for all, and so does run.c (test_run.py)
        torch.testing.assert_close(
            sampling_probabilities(logits, top_k=4, top_p=top_p), logits.softmax(-1)
        )
    assert generate(small(), [[1]], 0, stop_ids=END).lengths.tolist() == [0]
    assert generate(small(), [], 5, stop_ids=END).tokens.shape == (0, 5)


def test_top_p_keeps_as_few_tokens_as_have_the_mass():
    found = sampling_probabilities(torch.zeros(1, 8), top_p=0.25)  # each has exactly 1 / 8
    assert sorted(found[0].tolist()) == [0] * 6 + [0.5] * 2


def test_greedy_is_argmax(backend):
    """Log-probabilities are the model's."""
    model = small()
    out = generate(model, [[1, 5, 9]], 12, temperature=0, stop_ids=())
    tokens = [1, 5, 9]
    for t, logprob in zip(out.responses()[0], out.logprobs[0]):
        logits = naive_logits(model, torch.tensor(tokens))[-1]
        assert t == int(logits.argmax())
        expected = logits.log_softmax(-1)[t].float()
        torch.testing.assert_close(logprob, expected, atol=1e-4, rtol=1e-4)
        tokens.append(t)


@pytest.mark.parametrize("top_k", [0, 3])
def test_uniform_numbers_at_the_ends(backend, top_k):
    """0 and the largest numbers below 1 draw tokens of positive probability, also the one that is 1
    in single precision."""
    model = small()
    for u in (0.0, 1 - 2**-24, 1 - 2**-40):
        uniform = torch.full((1, 4), u, dtype=torch.double)
        out = generate(model, [[1]], 4, top_k=top_k, uniform=uniform, stop_ids=())
        assert torch.isfinite(out.logprobs).all() and out.logprobs.exp().min() > 1e-8


def test_generation_goes_on_past_possible_ends(backend):
    """Token by token: drawn from the distribution without ends, until it is unlikely that there
    would not have been one; then from that of the ends. Probabilities are those of the model."""
    model, n, ends = small(), 12, [2, 5, 40]
    uniform = torch.rand(n, 30)
    out = generate(model, [[1, 3 + i] for i in range(n)], 30, 0.7, stop_ids=ends, uniform=uniform,
                   survival_limit=0.4, max_batch=5)  # fmt: skip
    for i, (row, logprobs) in enumerate(zip(out.responses(), out.logprobs)):
        p = (naive_logits(model, torch.tensor([1, 3 + i, *row])) / 0.7).softmax(-1)[1:]
        survival = 1.0
        for t, token in enumerate(row):
            survival *= 1 - float(p[t, ends].sum())
            allowed = torch.zeros(48, dtype=torch.bool).index_fill(0, torch.tensor(ends), True)
            share = p[t] * (allowed == (survival < 0.4))
            above = share.cumsum(0)[token] / share.sum()
            below = above - share[token] / share.sum()
            assert below - 1e-5 < uniform[i, t] < above + 1e-5
            assert float(logprobs[t]) == pytest.approx(float(p[t, token].log()), abs=1e-4)
            assert (token in ends) == (survival < 0.4) == (t == len(row) - 1 and bool(out.ended[i]))
    assert out.ended.any() and len(set(out.lengths.tolist())) > 3


def test_a_very_low_temperature_is_greedy(backend):
    """Differences of thousands between logits overflow nothing."""
    prompts = [[1, i] for i in range(3, 23)]
    greedy, cold = (generate(small(), prompts, 9, temperature=t, stop_ids=()) for t in (0, 1e-4))
    assert torch.equal(greedy.tokens, cold.tokens) and cold.logprobs.abs().max() < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_uniform_numbers_draw_by_the_distribution_function(backend, temperature):
    """A number just below the sum of the first tokens' probabilities draws the last of them, one
    just above it the next."""
    model = small()
    p = exact_distribution(naive_logits(model, torch.tensor([1, 7]))[-1], temperature, 0, 1)
    ids = [i for i in range(47) if p[i] > 1e-3 and p[i + 1] > 1e-3]
    sums = p.cumsum(0)[ids].float()
    uniform = torch.stack([sums - 1e-4, sums + 1e-4], 1).view(-1, 1)
    out = generate(model, [[1, 7]] * len(uniform), 1, temperature, uniform=uniform, stop_ids=())
    assert len(ids) > 5 and out.tokens.view(-1, 2).tolist() == [[i, i + 1] for i in ids]


@pytest.mark.parametrize("H,K,E", SHAPES)
def test_tokens_drawn_many_at_a_time_are_those_of_pytorch(native, monkeypatch, H, K, E):
    """Rows of all lengths that end at a stop token, at the number asked for or at the context, each
    with its random numbers, with adapters: with kernels.c, with it a token at a time, and
    without."""
    kw = dict(dim=H * E, n_heads=H, n_kv_heads=K, multiple_of=1, tied=False)
    model = small(**kw)
    add_lora(model, rank=2, layers="k,down")
    for name, p in model.named_parameters():
        if name.endswith(("lora_b", "norm.weight")):
            torch.nn.init.normal_(p, std=0.5)
    prompts = [[1] + torch.randint(3, 48, (n,)).tolist() for n in range(33)]
    uniform = torch.rand(33, 45)
    args = model, prompts, 45, 0.8
    how = dict(uniform=uniform, stop_ids=END)
    many = generate(*args, **how, max_batch=21)
    single = generate(*args, **how, on_token=lambda row, token: None)
    monkeypatch.setattr(kernels, "library", lambda: None)
    oracle = generate(*args, **how)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on a GPU: rows that have ended idle
    blind = generate(*args, **how, max_batch=21)
    ends = [(len(p) + n, n) for p, n in zip(prompts, oracle.lengths.tolist())]
    assert (
        oracle.ended.any()
        and any(n == 45 for _, n in ends)
        and any(total == 65 for total, _ in ends)
    )
    for got in many, single, blind:
        assert got.responses() == oracle.responses() and torch.equal(got.ended, oracle.ended)
        assert torch.equal(got.tokens, oracle.tokens)
        torch.testing.assert_close(got.logprobs, oracle.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", [dict(temperature=0), dict(top_k=9), dict(top_p=0.8)])
def test_looking_for_ended_rows_less_often_changes_nothing(backend, how, monkeypatch):
    model = small(n_kv_heads=1)
    prompts = [[1] + torch.randint(3, 48, (n,)).tolist() for n in range(0, 60, 3)]
    how = dict(uniform=torch.rand(20, 40), max_batch=8, stop_ids=END, **how)
    often = generate(model, prompts, 40, **how, on_token=lambda row, token: None)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on a GPU: rows that have ended idle
    seldom = generate(model, prompts, 40, **how)
    assert often.responses() == seldom.responses() and torch.equal(often.ended, seldom.ended)
    torch.testing.assert_close(often.logprobs, seldom.logprobs)
    assert len({len(r) for r in often.responses()}) > 3, "rows end at different times"


def test_generating_with_a_nan_shows_it(backend):
    model = small()
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    out = generate(model, [[1, 7]] * 20, 3, stop_ids=())
    assert out.logprobs.isnan().all() and 0 <= int(out.tokens.min()) <= int(out.tokens.max()) < 48


def test_uniform_numbers_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\), not \(2, 4\)"):
        generate(small(), [[1], [2]], 5, uniform=torch.rand(2, 4), stop_ids=END)


def test_rows_are_independent(backend):
    """Each row's tokens are those that it gets alone with its own random numbers, whatever the
    others do and however many fit at once; log-probabilities are those of the full forward."""
    model = small()
    prompts = [[1] + torch.randint(3, 48, (n,)).tolist() for n in (0, 4, 11, 2, 30, 7, 1)]
    uniform = torch.rand(7, 25)
    alone = [
        generate(model, [p], 25, stop_ids=END, uniform=uniform[i : i + 1])
        for i, p in enumerate(prompts)
    ]
    for max_batch in (7, 3, 1):
        out = generate(model, prompts, 25, uniform=uniform, max_batch=max_batch, stop_ids=END)
        for i, single in enumerate(alone):
            assert out.responses()[i] == single.responses()[0]
            assert bool(out.ended[i]) == bool(single.ended[0])
    assert {len(r) for r in out.responses()} > {25}, "some rows stop by themselves"
    for p, r, lp in zip(prompts, out.responses(), out.logprobs):
        logp = model(torch.tensor([p + r])).log_softmax(-1)[0]
        expected = torch.stack([logp[len(p) - 1 + j, t] for j, t in enumerate(r)])
        torch.testing.assert_close(lp[: len(r)], expected, atol=1e-4, rtol=1e-4)
        assert not any(t in (1, 2) for t in r[:-1])


def test_generation_stops_at_the_context():
    model = small()
    out = generate(model, [[1] * 60], 50, temperature=0, stop_ids=())
    # 64 positions hold the prompt and what is fed back; the last token needs none
    assert out.lengths.tolist() == [5] and not out.ended.item()


def test_streaming_sees_every_token_in_order():
    seen = {0: [], 1: []}
    show = lambda row, token: seen[row].append(token)  # noqa: E731
    out = generate(small(), [[1], [1, 4]], 10, stop_ids=END, on_token=show)
    assert [seen[0], seen[1]] == out.responses()


# ---- LoRA


def test_lora_starts_as_the_model_and_merges(rows):
    model, x = small(), torch.randint(0, 48, (2, 11))
    before, frozen = model(x), {n: p.clone() for n, p in model.named_parameters()}
    add_lora(model, rank=4, alpha=8, layers="q,v,down")
    exact = kernels.MIN_ROWS > 1  # without adapters other kernels sum in another order
    torch.testing.assert_close(
        model(x), before, atol=0 if exact else 1e-5, rtol=0 if exact else 1e-4
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 3 and all(".lora_" in n for n in trained)
    assert frozen.keys() | trained == {n for n, _ in model.named_parameters()}
    for n, p in model.named_parameters():
        if n.endswith("lora_b"):
            torch.nn.init.normal_(p)
    plain = Transformer(model.args).eval()
    plain.load_state_dict(merged_state(model))
    assert not torch.allclose(model(x), before, atol=1e-3)
    torch.testing.assert_close(plain(x), model(x), atol=1e-4, rtol=1e-4)
    # by hand, for one matrix: W + alpha / R * B A
    wq = model.layers[0].attention.wq
    by_hand = frozen["layers.0.attention.wq.weight"] + 8 / 4 * wq.lora_b @ wq.lora_a
    torch.testing.assert_close(plain.layers[0].attention.wq.weight, by_hand)


def test_lora_gradient_is_that_of_the_product(rows):
    """dL/dB and dL/dA by the chain rule from the gradient of the merged matrix."""
    model, x, y = small(), torch.randint(0, 48, (1, 9)), torch.randint(0, 48, (1, 9))
    add_lora(model, rank=2, alpha=6, layers="o")
    layer = model.layers[1].attention.wo
    torch.nn.init.normal_(layer.lora_b)
    model(x, y).backward()
    plain = Transformer(model.args)
    plain.load_state_dict(merged_state(model))
    plain(x, y).backward()
    whole = plain.layers[1].attention.wo.weight.grad
    torch.testing.assert_close(layer.lora_b.grad, 3 * whole @ layer.lora_a.T, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(layer.lora_a.grad, 3 * layer.lora_b.T @ whole, atol=1e-5, rtol=1e-3)


def test_lora_unknown_layer():
    with pytest.raises(ValueError, match="unknown layer 'x'"):
        add_lora(small(), rank=2, layers="q,x")
    with pytest.raises(ValueError, match="'q' for LoRA is named twice"):
        add_lora(small(), rank=2, layers="q,v,q")


# ---- the real model


def test_stories260k_greedy_and_loss(stories260k_bin, tok512_model, real_stories, tmp_path):
    """The published model generates the known text and has the known validation loss."""
    import json

    from sentencepiece import SentencePieceProcessor

    import export

    export.main(
        [str(tmp_path / "ckpt.pt"), f"--llama2c={stories260k_bin}", f"--tokenizer={tok512_model}"]
    )
    model = model_from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt")).eval()
    sp = SentencePieceProcessor(model_file=str(tok512_model))
    text = sp.decode(generate(model, [[1]], 500, temperature=0, stop_ids=END).responses()[0])
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. "
        "She loved to play outside in the park. One day, she saw a big, red ball."
    )
    assert text.endswith('You are a good friend."')
    stories = json.load(open(real_stories / "data00.json"))
    ids = [t for s in stories for t in [1, *sp.encode(s["story"].strip())]]
    n = (len(ids) - 1) // 512
    windows = torch.tensor(ids[: n * 512 + 1])
    x, y = windows[:-1].view(n, 512), windows[1:].view(n, 512)
    with torch.no_grad():
        losses = [model(a, b).item() * len(a) for a, b in zip(x.split(32), y.split(32))]
    assert abs(sum(losses) / n - 1.3824) < 2e-3


# ---- checkpoints


def checkpoint_of(model):
    return {"model": model.state_dict(), "model_args": checkpoint_args(model.args)}


def test_checkpoint_round_trip(tmp_path):
    for kw in ({}, {"tied": False}, {"rope_theta": 1234.0, "rope_scaling": {"factor": 2.0}}):
        model = small(**kw)
        save_checkpoint(tmp_path / "c.pt", checkpoint_of(model))
        again = model_from_checkpoint(load_checkpoint(tmp_path / "c.pt"))
        x = torch.randint(0, 48, (1, 9))
        assert torch.equal(model(x), again.eval()(x))
        assert [p.name for p in tmp_path.iterdir()] == ["c.pt"], "nothing temporary is left"


def test_checkpoint_names_and_args_are_llama2c(tmp_path):
    """What llama2.c's ModelArgs(**model_args) and load_state_dict expect."""
    stored = checkpoint_of(small())
    known = "dim n_layers n_heads n_kv_heads vocab_size hidden_dim multiple_of norm_eps"
    known += " max_seq_len dropout"
    assert set(stored["model_args"]) == set(known.split())
    blocks = {k.split(".", 2)[2] for k in stored["model"] if k.startswith("layers.0.")}
    assert blocks == {
        "attention.wq.weight",
        "attention.wk.weight",
        "attention.wv.weight",
        "attention.wo.weight",
        "feed_forward.w1.weight",
        "feed_forward.w2.weight",
        "feed_forward.w3.weight",
        "attention_norm.weight",
        "ffn_norm.weight",
    }
    rest = {k for k in stored["model"] if not k.startswith("layers.")}
    assert rest == {"tok_embeddings.weight", "norm.weight", "output.weight"}


def test_compiled_prefix_is_stripped(tmp_path):
    stored = checkpoint_of(small())
    stored["model"] = {f"_orig_mod.{k}": v for k, v in stored["model"].items()}
    save_checkpoint(tmp_path / "c.pt", stored)
    model_from_checkpoint(load_checkpoint(tmp_path / "c.pt"))


def test_value_head_starts_at_zero_and_survives(tmp_path):
    model = model_from_checkpoint(checkpoint_of(small()), TransformerWithValueHead)
    h = model.hidden(torch.randint(0, 48, (1, 5)))
    assert torch.equal(model.values(h), torch.zeros(1, 5))
    torch.nn.init.normal_(model.value_head.weight)
    save_checkpoint(tmp_path / "v.pt", checkpoint_of(model))
    again = model_from_checkpoint(load_checkpoint(tmp_path / "v.pt"), TransformerWithValueHead)
    assert torch.equal(model.values(h), again.values(h))


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, checkpoint_of(small()))
    whole = path.read_bytes()
    for n in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no 'model'"):
        load_checkpoint(path)
    stored = checkpoint_of(small())
    stored["model_args"]["dim"] = 64
    with pytest.raises(ValueError, match="does not fit"):
        model_from_checkpoint(stored)
    stored = checkpoint_of(small())
    del stored["model"]["layers.1.attention.wq.weight"]
    with pytest.raises(ValueError, match="layers.1.attention.wq.weight"):
        model_from_checkpoint(stored)


class Bomb:
    def __reduce__(self):
        import os

        return os.system, ("touch BOMB",)


def test_hostile_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb(), "model_args": {}}, "c.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint("c.pt")
    assert not (tmp_path / "BOMB").exists()


def test_failed_save_keeps_the_old(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint_of(small()))
    before = path.read_bytes()
    with pytest.raises(Exception):
        save_checkpoint(path, {"model": lambda: None})  # cannot be pickled
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize(
    "kw",
    [
        dict(dim=30),
        dict(n_kv_heads=3),
        dict(dim=12, n_heads=4),
        dict(n_layers=0),
        dict(dropout=1.0),
        *(dict(head_dim=E) for E in (-2, 7, 2.0, True, 2**14 + 2)),
    ],
)
def test_impossible_args(kw):
    with pytest.raises(ValueError):
        ModelArgs(**(dict(dim=32, n_heads=4, n_kv_heads=2, n_layers=1) | kw))


def test_rope_scaling_is_the_papers():
    """Case by case in float64, as Llama 3.1's report and Chen et al. have them."""
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    base = dict(dim=128, n_heads=1, max_seq_len=8, rope_theta=5e5)
    got = M.rope_frequencies(ModelArgs(**base, rope_scaling=scaling)).tolist()
    kinds = set()
    for i, freq in enumerate(got):
        plain = 5e5 ** (-2 * i / 128)
        length = 2 * math.pi / plain  # of a whole turn, in tokens
        if length < 8192 / 4:
            want, kind = plain, "fast"
        elif length > 8192 / 1:
            want, kind = plain / 8, "slow"
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            want, kind = (1 - smooth) * plain / 8 + smooth * plain, "between"
        assert freq == pytest.approx(want, rel=1e-5)
        kinds.add(kind)
    assert kinds == {"fast", "slow", "between"}
    linear = M.rope_frequencies(ModelArgs(**base, rope_scaling={"factor": 4.0}))
    assert torch.equal(linear * 4, M.rope_frequencies(ModelArgs(**base)))
    for bad in (
        {},
        {"factor": 0.0},
        {"factor": 2.0, "type": "yarn"},
        8.0,
        scaling | {"high_freq_factor": 1.0},
        scaling | {"factor": math.inf},
    ):
        with pytest.raises(ValueError, match="rope_scaling"):
            ModelArgs(**base, rope_scaling=bad)


# ----------------------------------------------------------------------------
# products through oneDNN


def test_products_of_many_sizes_do_not_pile_up():
    """Packed batches hardly ever repeat a number of tokens, and oneDNN compiles a product for each:
    its cache must be bounded. Measured in a separate process."""
    program = """if True:
        import ctypes, sys
        import kernels, torch
        class Info(ctypes.Structure):  # struct mallinfo2 of glibc
            _fields_ = [(name, ctypes.c_size_t) for name in "a b c d e f g used i j".split()]
        info = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if info is None or not torch.backends.mkldnn.is_available():
            sys.exit(print("skip"))
        info.restype = Info
        def run(sizes):
            w = torch.randn(72, 64, requires_grad=True)
            for rows in sizes:
                kernels.multiply(torch.randn(rows, 64, requires_grad=True), w).sum().backward()
            return info().used
        before = run(range(1000, 1300))
        print(run(range(1300, 1900)) - before)
    """
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(kernels.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    if out.stdout.strip() == "skip":
        pytest.skip("no glibc that counts its memory, or no oneDNN")
    assert int(out.stdout) < 5e6


@pytest.mark.parametrize("shape", [(300, 64), (2, 151, 48)])
def test_products_and_their_gradients_against_float64(shape, monkeypatch):
    used = []
    product = kernels.onednn
    monkeypatch.setattr(kernels, "library", lambda: None)  # test_gradient_of_a_weight is its
    monkeypatch.setattr(kernels, "onednn", lambda *a: used.append(1) or product(*a))
    torch.manual_seed(1)
    layer = FastLinear(shape[-1], 72, bias=False)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 72)
    out = layer(x)
    out.backward(grad)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    exact = x64 @ w64.T
    exact.backward(grad.double())
    for mine, true in ((out, exact), (x.grad, x64.grad), (layer.weight.grad, w64.grad)):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    assert len(used) == 4  # forward, two gradients, and without gradients
    layer.weight.requires_grad_(False)  # a frozen layer under LoRA
    layer(x).sum().backward()
    assert layer.weight.grad is not None and len(used) == 6
    assert layer(x[..., :10, :] if x.dim() == 2 else x[:, :10]).shape[-1] == 72 and len(used) == 6


def replay(calls, compiler, emulator, tmp_path):
    """Compiles kernels.c into a program that makes the recorded calls, each tensor in memory of its
    own, and compares what they leave in the tensors."""
    body, given = "", b""
    for name, args, fields, before, _ in calls:
        sizes = [x.numel() * x.element_size() for x in before]
        given += b"".join(x.contiguous().numpy().tobytes() for x in before)
        places = iter(range(len(sizes)))

        def value(x):  # NULL is 0
            return f"t{next(places)}" if torch.is_tensor(x) else str(x or 0)

        values = [value(x) for x in args]
        if fields:
            members = ", ".join(f".{field} = {value(x)}" for field, x in fields.items())
            values.append(f"&({kernels.STRUCTS[name].__name__}){{{members}}}")
        body += "{" + "".join(f"void *t{i} = take({n});\n" for i, n in enumerate(sizes))
        body += f"if ({name}({', '.join(values)})) return 1;\n"
        body += (
            "".join(f"fwrite(t{i}, 1, {n}, stdout); free(t{i});\n" for i, n in enumerate(sizes))
            + "}"
        )
    source = Path(kernels.__file__).with_name("kernels.c")
    program = tmp_path / "replay.c"
    program.write_text(
        f"""#include "{source}"
        #include <stdio.h>
        static void *take(size_t n) {{
            void *p = malloc(n);
            if (fread(p, 1, n, stdin) != n) exit(2);
            return p;
        }}
        int main(void) {{ {body} return 0; }}"""
    )
    subprocess.run([*compiler, program, "-o", tmp_path / "replay", "-lm"], check=True)
    done = subprocess.run([*emulator, tmp_path / "replay"], input=given, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    got = done.stdout
    for name, _, _, _, after in calls:
        for want in after:
            size = want.numel() * want.element_size()
            found = torch.frombuffer(bytearray(got[:size] or b"0"), dtype=want.dtype).view_as(want)
            torch.testing.assert_close(
                found, want, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}"
            )
            got = got[size:]
    assert not got


def record_calls(monkeypatch, *models):
    """(name, arguments, fields, their tensors before and after) of all calls of kernels.c in
    training a model and generating with it."""
    calls, real = [], kernels.call

    def tensors(args):
        return [x.detach().clone() for x in args if torch.is_tensor(x)]

    def record(name, *args, **fields):
        every = *args, *fields.values()
        before = tensors(every)
        real(name, *args, **fields)
        calls.append((name, args, fields, before, tensors(every)))

    monkeypatch.setattr(kernels, "call", record)
    for model in models:
        tokens = torch.randint(0, 48, (5, 60))
        model(tokens, tokens.roll(-1, 1)).backward()
        for temperature in (0, 1):
            generate(model, [[1, 2], [3]] * 9, 4, temperature, stop_ids=END)
    assert {name for name, *_ in calls} == {
        "rms_norm_forward",
        "rms_norm_backward",
        "feed_forward",
        "feed_forward_backward",
        "norm_qkv",
        "norm_qkv_backward",
        "attention_forward",
        "attention_backward",
        "weight_gradient",
        "token_terms",
        "token_terms_backward",
        "decode_hidden",
        "decode_tokens",
    }
    return calls


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")),
    reason="needs gcc-aarch64-linux-gnu and qemu-user",
)
def test_kernels_on_arm64(tmp_path, monkeypatch):
    """All that training and generating call, with the same tensors, on an emulated arm64."""
    use_backend("4 lanes", monkeypatch)
    compiler = [
        "aarch64-linux-gnu-gcc",
        "-O2",
        "-static",
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    replay(record_calls(monkeypatch, small()), compiler, ["qemu-aarch64", "-cpu", "max"], tmp_path)


def test_kernels_under_sanitizers(native, tmp_path, monkeypatch):
    """The same, of two shapes, where a step outside a tensor, or an overflow, ends the program."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = [os.environ.get("CC", "cc"), *flags, "-x", "c", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input=b"int main(void) { return 0; }", capture_output=True).returncode:
        pytest.skip("this compiler has no -fsanitize=address,undefined")
    calls = record_calls(
        monkeypatch, small(), small(dim=48, n_heads=3, n_kv_heads=3, multiple_of=1)
    )
    compiler = [probe[0], "-O0", "-g", "-march=native", *flags]
    replay(calls, compiler + ([NARROW[native]] if native in NARROW else []), [], tmp_path)


def write_kinds(folder):
    """Files that are no checkpoints: {path: what the message says}."""
    import argparse
    import zipfile

    import numpy as np

    weights = {"model.embed_tokens.weight": torch.ones(2, 2)}
    kinds = {
        "GGUF": b"GGUF\3\0\0\0" + bytes(100),
        "model.bin for run.c": b"24ka\3\0\0\0" + bytes(300),
        "llama2.c model of version 0": np.int32([8, 16, 1, 2, 2, 9, 16]).tobytes() + bytes(99),
        "safetensors of Hugging Face": (40).to_bytes(8, "little") + b'{"a": 1}'.ljust(60),
        "SentencePiece": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2",
        "empty": b"",
        "gzip": b"\x1f\x8b\x08",
        "web page": b"<!DOCTYPE html>\n<html></html>",
        "JSON that begins": b'{"a": [1, 2]}',
        "a text that begins with 'Once upon": "Once upon a time, é".encode() * 300,
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid",
        "NumPy": b"\x93NUMPY\1\0v",
    }
    paths = {}
    for i, (says, data) in enumerate(kinds.items()):
        paths[folder / f"{i}.pt"] = says
        (folder / f"{i}.pt").write_bytes(data)
    with zipfile.ZipFile(folder / "zip.pt", "w") as z:
        z.writestr("thesis.txt", "x")
    torch.save(weights, folder / "hf.pt")
    torch.save({"lora": {}, "model_args": {}}, folder / "lora.pt")
    torch.save({"model": {}, "config": argparse.Namespace()}, folder / "namespace.pt")
    (folder / "folder").mkdir()
    (folder / "folder/config.json").write_text("{}")
    more = {
        "zip": "zip archive of something else",
        "hf": "weights of Hugging Face",
        "lora": "adapters",
        "namespace": "it holds argparse.Namespace",
    }
    paths |= {folder / f"{name}.pt": says for name, says in more.items()}
    return paths | {folder / "folder": "is a folder"}


def test_a_wrong_file_says_what_it_is(tmp_path):
    for path, says in write_kinds(tmp_path).items():
        for mmap in (False, True):
            with pytest.raises(ValueError) as error:
                load_checkpoint(path, mmap=mmap)
            text = str(error.value)
            assert says in text and str(path) in text and "\n" not in text and len(text) < 250
            assert "weights_only" not in text
