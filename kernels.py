"""Faster versions of the modules of model.py; `accelerate(model)` replaces the modules.

kernels.c is compiled on first use and called through ctypes; large matrix products go to oneDNN.
Both compute in fp32 without autocast. Each fast class is a subclass of the plain one and has the
same parameters; for a shape, device or dtype that the kernels do not support it runs its parent's
code. PyTorch's functions are used without a C compiler, and while torch.compile traces.

    specification (plain PyTorch)    fast version: functions of kernels.c    compared by
    nn.Linear                        FastLinear: multiply, weight_gradient   test_products_*
    model.RMSNorm                    FastRMSNorm: rms_norm_*                 test_rms_norm
    model.TransformerBlock           FastTransformerBlock: norm_qkv,         test_norm_and_*,
                                     feed_forward                            test_feed_forward
    model.Attention.attend           FastAttention: attention_*              test_native_attention_*
    model.Transformer.loss           FastTransformer: token_terms            test_loss_of_a_model
    model.Transformer.hidden         FastTransformer: decode_hidden          test_cached_steps_*
    model.Transformer.sample_tokens  FastTransformer: decode_tokens          test_tokens_drawn_*
    model.KVCache                    FastKVCache: different memory layout    test_cached_steps_*
    model.Transformer.forward        FastTransformer: token_terms            test_large_vocabulary_*
    ppo.logprob_entropy_kl           TokenTerms: token_terms                 test_token_terms_*
    model.Transformer                accelerate: all of these together       test_accelerated_*

On a GPU there are no kernels of our own. Generation has fixed shapes, so that torch.compile can
replay it (StaticKVCache), packed attention is PyTorch's varlen_attn (varlen_attention), and fewer
kernels are launched (attend_on_gpu); test_decoding.py compares them with the plain versions.

NATIVE_KERNELS=0 in the environment turns `accelerate` and all kernels off. CC names the compiler.
The letters in shapes are those of model.py.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Optional
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from model import (
    Attention,
    Batch,
    FeedForward,
    KVCache,
    Layout,
    RMSNorm,
    Transformer,
    TransformerBlock,
    TransformerWithValueHead,
    apply_rope,
)

# oneDNN and PyTorch each cache the last 1,024 matrix products that they compiled, one per number of
# rows. Packed batches hardly ever repeat a number of rows: after hundreds of PPO iterations the
# caches took 5 GB, fragmentation included. The variables are read at the first product.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "128")


def switched_on():
    return os.environ.get("NATIVE_KERNELS") != "0"


@functools.cache
def library():
    """The compiled kernels.c, or None if PyTorch's kernels are used: with NATIVE_KERNELS=0 in the
    environment, on Windows, and, with the reason on stderr, if it cannot be compiled."""
    if not switched_on() or sys.platform == "win32":
        return None
    try:
        loaded = ctypes.CDLL(str(compiled(Path(__file__).with_name("kernels.c"))))
    except (OSError, ValueError) as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            reason = " ".join(str(e).split())
            print(
                f"note: kernels.c is not used: {reason}; using PyTorch's kernels", file=sys.stderr
            )
        return None
    keep_memory()
    return loaded


def compiled(source):
    """Compiles `source` if needed and returns the path of the library. Its name contains a hash of
    the source, the compiler, its flags and the processor, because code for -march=native may not
    run on another machine that shares the folder. The file is renamed into place, because several
    processes may compile it at once. Raises OSError or ValueError."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    compiler = shutil.which(command[0])
    if compiler is None:
        raise ValueError(f"there is no C compiler {command[0]}: install one, or name one by CC=...")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    command += ["-O3", "-march=native", "-shared", "-fPIC", *openmp]
    version = os.stat(compiler)
    parts = [
        source.read_bytes().hex(),
        *command,
        os.path.realpath(compiler),
        platform.machine(),
        version.st_size,
        version.st_mtime_ns,
        platform.processor(),
    ]
    with suppress(OSError):  # exists on Linux only; repeats its lines for each core
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = "model name", "flags", "Features", "CPU part"
        parts += sorted({line for line in lines if line.startswith(names)})
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    target = private_folder(source.parent) / f"kernels-{key}.so"
    with suppress(FileNotFoundError):
        if is_private(target, stat.S_ISREG):
            return target
    temporary = target.with_suffix(f".{os.getpid()}")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("compiling kernels.c; this is done once", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            [*command, str(source), "-o", str(temporary), "-lm"], capture_output=True
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines()
            message = next(
                (line for line in lines if "error" in line), f"exit status {done.returncode}"
            )
            raise ValueError(f"{command[0]} cannot compile it ({message[:200]})")
        temporary.chmod(0o700)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def private_folder(beside):
    """A folder for compiled code that no other user can write to: build/ in the folder `beside`,
    else a folder in the user's cache, else one in the temporary directory. Raises OSError."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    temporary = os.path.join(tempfile.gettempdir(), f"fable-{os.getuid()}")
    folders = [beside / "build", Path(cache) / "fable", Path(temporary)]
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            parent = os.stat(folder.parent)  # other users must not be able to replace the folder
            safe = not parent.st_mode & 0o022 or parent.st_mode & stat.S_ISVTX
            if (
                is_private(folder, stat.S_ISDIR)
                and parent.st_uid in (0, os.getuid())
                and safe
                and os.access(folder, os.W_OK)
            ):
                return folder
    raise OSError(
        f"none of {', '.join(map(str, folders))} is a folder of this user that others cannot "
        "write to"
    )


def is_private(path, kind):
    """Whether path is a file of this `kind` (stat.S_ISREG or S_ISDIR), not a symbolic link, is
    owned by this user and not writable by others."""
    status = os.lstat(path)
    return kind(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def keep_memory():
    """Makes glibc keep large buffers that PyTorch frees. By default it returns them to the system,
    and the page faults of the next allocation take a tenth of a training step of a small model."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):
            pass  # another C library


def struct(name, tensors, ints, floats=""):
    """The ctypes version of a struct of kernels.c: pointers, ints, floats. kernels.c documents the
    shapes."""
    kinds = (tensors, ctypes.c_void_p), (ints, ctypes.c_int), (floats, ctypes.c_float)
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


ATTENTION = struct("Attention", "out softmax q k v starts cosine sine dout dq dk dv", "S H K E")
FEED_FORWARD = struct("FeedForward", "out x norm w1 w3 w2 g dx dnorm dw1 dw3 dw2", "N D F", "eps")
NORM_QKV = struct(
    "NormQKV", "q k v x norm wq wk wv dq dk dv dx dnorm dwq dwk dwv", "N D Q K", "eps"
)
DECODING = struct(
    "Decoding",
    "weights cosine sine keys values positions x embedding norm output "
    "tokens probabilities lengths current uniform prompt stop_ids survival",
    "B capacity L F H K E T steps V max_new n_stops context",
    "eps temperature",
)
STRUCTS = {  # the struct that each of these functions of kernels.c takes
    "attention_forward": ATTENTION,
    "attention_backward": ATTENTION,
    "feed_forward": FEED_FORWARD,
    "feed_forward_backward": FEED_FORWARD,
    "norm_qkv": NORM_QKV,
    "norm_qkv_backward": NORM_QKV,
    "decode_hidden": DECODING,
    "decode_tokens": DECODING,
}


def call(name, *args, **fields):
    """Calls a function of kernels.c with its arguments, or with the fields of its struct; missing
    fields are NULL or 0. Tensors, fp32 or int64, become pointers to their first element; all are
    contiguous, except that the rows of a KV cache may be its last ones. None becomes NULL.
    `args` and `fields` must live until the function returns, because they may hold the only
    reference to a tensor. Raises MemoryError, ValueError or IndexError."""
    numbers = {int: ctypes.c_int, float: ctypes.c_float}
    values = [
        numbers[type(x)](x)
        if type(x) in numbers
        else ctypes.c_void_p(x.data_ptr())
        if x is not None
        else None
        for x in args
    ]
    if fields:
        members = {k: x.data_ptr() if isinstance(x, torch.Tensor) else x for k, x in fields.items()}
        values.append(ctypes.byref(STRUCTS[name](**members)))
    failed = getattr(library(), name)(*values)
    if failed:
        raise {
            -1: MemoryError("no memory for a kernel"),
            -2: ValueError("the KV cache is full"),
            -3: IndexError("a target is outside the vocabulary"),
        }[failed]


def plain(x):
    """Whether kernels.c and oneDNN support x: fp32 on a CPU, outside of tracing and autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )  # train.py --plan uses FakeTensors, which have no memory


def native(x, multiple=16):
    """Whether kernels.c supports x (..., D). D must be a multiple of the lanes of a vector."""
    return plain(x) and x.shape[-1] % multiple == 0 and library() is not None


def to_device(x, device):
    """Copies a tensor to a device. A copy from the CPU to a GPU goes through pinned memory, so that
    Python does not wait for it."""
    pinned = torch.device(device).type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


def is_sharded(x):
    """Whether a tensor is a DTensor, of which each process holds a part (--fsdp)."""
    return hasattr(x, "full_tensor")  # to import the class takes a second


# ----------------------------------------------------------------------------
# over all processes


def all_sum(*values):
    """The sum of each tensor's elements on all processes, as floats."""
    values = [torch.as_tensor(v).detach() for v in values]
    sums = [(v if v.is_cuda else v.cpu()).double().sum() for v in values]  # MPS has no float64
    device = next((s.device for s in sums if s.is_cuda), "cpu")
    packed = torch.stack([to_device(s, device) for s in sums])  # one copy from a GPU, not many
    if dist.is_initialized():
        packed = packed.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(packed)
    return packed.tolist()


def full(x):
    """A tensor without its shards: with --fsdp each process holds a part of it."""
    return x.full_tensor() if is_sharded(x) else x


def mean_and_variance(x, weight=None):
    """Mean and variance of a tensor's elements, with a weight each, on all processes, as floats."""
    x = x.detach().cpu()  # one transfer from a GPU, not one per sum; MPS has no float64
    weight = torch.ones_like(x) if weight is None else weight.cpu()
    n, total = all_sum(weight, x * weight)
    return total / n, all_sum((x.double() - total / n).square() * weight)[0] / n


BUCKET = 2**24  # numbers per all_reduce, 64 MB in fp32, except for a larger tensor


def add_up_over_ranks(tensors):
    """Adds up each tensor over all processes, in place, with one all_reduce for many of them."""
    start, size = 0, 0
    for i, x in enumerate(tensors):
        size += x.numel()
        if size < BUCKET and i + 1 < len(tensors):
            continue
        part = tensors[start : i + 1]
        flat = torch.cat([t.flatten() for t in part])
        dist.all_reduce(flat)
        pieces = flat.split([t.numel() for t in part])
        torch._foreach_copy_(part, [p.view_as(t) for p, t in zip(pieces, part)])
        start, size = i + 1, 0


# ----------------------------------------------------------------------------
# products

# With fewer rows PyTorch's products are as fast, and they need no compilation per number of rows.
MIN_ROWS = 256


def multiply(x, w):
    """x (..., K) times the transpose of w (N, K): (..., N)."""
    if not plain(x) or not plain(w) or not torch.backends.mkldnn.is_available():
        return F.linear(x, w)
    rows = x.numel() // x.shape[-1]
    if rows < MIN_ROWS:
        return F.linear(x, w)
    flat = x.reshape(rows, -1)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return Product.apply(flat, w).view(*x.shape[:-1], -1)
    # oneDNN compiles code per number of rows, and the batch of a generation shrinks row by row.
    out = onednn(F.pad(flat, (0, 0, 0, -rows % 64)), w)[:rows]
    return out.view(*x.shape[:-1], -1)


def onednn(x, w):
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


class Product(torch.autograd.Function):
    """x (M, K) times the transpose of w (N, K), (M, N), computed by oneDNN. PyTorch uses MKL for
    fp32 products, which does not use AVX-512 on AMD processors; oneDNN is twice as fast there
    (doc/speed.md)."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return onednn(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, w), grad = ctx.saved_tensors, grad.contiguous()
        need_x, need_w = ctx.needs_input_grad
        dx = onednn(grad, w.T) if need_x else None
        dw = transposed_product(grad, x) if need_w else None
        return dx, dw


def transposed_product(g, x):
    """The transpose of g (M, N) times x (M, K): (N, K). oneDNN transposes both in memory first,
    which takes half of the time if one of them is narrow; kernels.c does not."""
    (rows, n), k = g.shape, x.shape[1]
    if k <= 128 and native(x):
        out = x.new_empty(n, k)
        call("weight_gradient", out, g.contiguous(), x.contiguous(), rows, n, k)
        return out
    if n <= 128 and native(g):
        return transposed_product(x, g).T
    return onednn(g.T, x.T)


# ----------------------------------------------------------------------------
# RMSNorm, and layers fused with the RMSNorm before them


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last dimension."""
    if native(x) and plain(weight):
        return FusedRMSNorm.apply(x.contiguous(), weight.contiguous(), eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        call("rms_norm_forward", out, inverse, x, weight, inverse.numel(), x.shape[-1], float(eps))
        ctx.save_for_backward(x, inverse, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inverse, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        sizes = inverse.numel(), x.shape[-1]
        call("rms_norm_backward", dx, dw, grad.contiguous(), x, inverse, weight, *sizes)
        return dx, dw, None


def native_layer(x, *weights):
    """Whether FusedFeedForward and FusedQKV support x (..., D) and are faster: x has enough rows
    for many tiles, and the weights are narrow enough to leave room for a tile in the cache."""
    if x.shape[-1] > 288 or not native(x) or not all(plain(w) for w in weights):
        return False
    return x.numel() // x.shape[-1] >= MIN_ROWS  # last: torch.compile would make a graph for each


FF_INPUTS = "x", "norm", "w1", "w2", "w3"
QKV_INPUTS = "x", "norm", "wq", "wk", "wv"


class FusedFeedForward(torch.autograd.Function):
    """w2 (silu(w1 n) * w3 n) with n = rms_norm(x, norm, eps): x (..., D), w1 and w3 (F, D),
    w2 (D, F)."""

    @staticmethod
    def forward(ctx, x, norm, w1, w2, w3, eps):
        inputs = [t.contiguous() for t in (x, norm, w1, w2, w3)]
        out = torch.empty_like(inputs[0])
        N, D = x.numel() // x.shape[-1], x.shape[-1]
        ctx.sizes = dict(N=N, D=D, F=len(w1), eps=float(eps))
        call("feed_forward", out=out, **dict(zip(FF_INPUTS, inputs)), **ctx.sizes)
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Under recomputation (--fsdp) saved_tensors can be read only once.
        inputs = dict(zip(FF_INPUTS, ctx.saved_tensors))
        grads = {"d" + name: torch.empty_like(x) for name, x in inputs.items()}
        call("feed_forward_backward", g=grad.contiguous(), **inputs, **grads, **ctx.sizes)
        return *grads.values(), None


class FusedQKV(torch.autograd.Function):
    """wq n, wk n and wv n, n = rms_norm(x, norm, eps): x (..., D), wq (Q, D), wk and wv (K, D)."""

    @staticmethod
    def forward(ctx, x, norm, wq, wk, wv, eps):
        inputs = [t.contiguous() for t in (x, norm, wq, wk, wv)]
        out = [x.new_empty(*x.shape[:-1], len(w)) for w in (wq, wk, wv)]
        N, D = x.numel() // x.shape[-1], x.shape[-1]
        ctx.sizes = dict(N=N, D=D, Q=len(wq), K=len(wk), eps=float(eps))
        call("norm_qkv", **dict(zip("qkv", out)), **dict(zip(QKV_INPUTS, inputs)), **ctx.sizes)
        ctx.save_for_backward(*inputs)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *of):
        inputs = dict(zip(QKV_INPUTS, ctx.saved_tensors))
        grads = {"d" + name: torch.empty_like(x) for name, x in inputs.items()}
        of = {name: g.contiguous() for name, g in zip(("dq", "dk", "dv"), of)}
        call("norm_qkv_backward", **of, **inputs, **grads, **ctx.sizes)
        return *grads.values(), None


# ----------------------------------------------------------------------------
# distributions over the vocabulary


class TokenTerms(torch.autograd.Function):
    """Three terms of each token's distribution π = softmax(logits), logits (A, V): log π of the
    target (A,), 0 where the target is -1; the entropy of π; and KL(π ‖ ref), ref =
    softmax(ref_logits), 0 if ref_logits is None. Each is (A,) in fp32.

    With H the entropy and D the KL, the gradients with respect to logit v are
        1[v = target] − π_v,    −π_v (log π_v + H),    π_v (log π_v − log ref_v − D).
    The explicit backward pass makes one pass over (A, V); autograd would make a dozen."""

    @staticmethod
    def forward(ctx, logits, target, ref_logits=None):
        A, V = ctx.sizes = logits.shape
        terms, norms = logits.new_zeros(3, A, dtype=torch.float32), None
        if native(logits) and (ref_logits is None or plain(ref_logits)):
            norms, logits, target = logits.new_empty(A, 4), logits.contiguous(), target.contiguous()
            ref_logits = None if ref_logits is None else ref_logits.contiguous()
            call("token_terms", *terms, norms, logits, ref_logits, target, A, V)
        else:  # logits become log-probabilities
            logits = logits.float().log_softmax(-1)
            p = logits.exp()
            terms[0] = logits.gather(1, target.clamp(min=0)[:, None])[:, 0] * (target >= 0)
            with torch.autocast(p.device.type, enabled=False):  # vecdot would be in half precision
                terms[1] = -torch.linalg.vecdot(p, logits)
                if ref_logits is not None:
                    ref_logits = ref_logits.float().log_softmax(-1)
                    terms[2] = torch.linalg.vecdot(p, logits - ref_logits)
        ctx.save_for_backward(logits, ref_logits, target, norms, *terms[1:])
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, *of_terms):
        logits, ref_logits, target, norms, entropy, kl = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if norms is not None:
            of_terms = [x.contiguous() for x in of_terms]
            inputs = norms, logits, ref_logits, target
            call("token_terms_backward", grad, *of_terms, entropy, kl, *inputs, *ctx.sizes)
            return grad, None, None
        of_logprob, of_entropy, of_kl = of_terms
        of_logprob = of_logprob * (target >= 0)
        constant = -of_logprob - of_entropy * entropy
        if ref_logits is not None:
            constant -= of_kl * kl
            of_entropy = of_entropy - of_kl
        torch.mul(logits, -of_entropy[:, None], out=grad)
        if ref_logits is not None:
            grad.addcmul_(ref_logits, of_kl[:, None], value=-1)
        grad.add_(constant[:, None]).mul_(logits.exp())
        grad.scatter_add_(1, target.clamp(min=0)[:, None], of_logprob[:, None])
        return grad, None, None


# ----------------------------------------------------------------------------
# large vocabularies: logits exist for a few tokens at a time

# The logits of 15,000 tokens and 32,000 words take 2 GB in fp32, and functions of them copy them.
LARGE_VOCABULARY = 16384
CHUNK = 2048  # tokens


def in_chunks(function, vocab_size, *inputs):
    """function(*inputs) for `inputs` (A, ...), tensors or None, where the function computes logits
    (A, V) and returns tensors (A,). With a large vocabulary it is called for CHUNK tokens at a
    time, and once more in the backward pass, so that no more logits exist at a time."""
    if vocab_size < LARGE_VOCABULARY or len(inputs[0]) <= CHUNK or not switched_on():
        return function(*inputs)
    parts = zip(*(repeat(None) if x is None else x.split(CHUNK) for x in inputs))
    # Autocast would convert the output layer's weight once, and add up its gradient in half.
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        options = dict(use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled():
            function = partial(recompute_in_backward, function, **options)
        return tuple(torch.cat(x) for x in zip(*(function(*part) for part in parts)))
    finally:
        torch.set_autocast_cache_enabled(cache)


def cross_entropy(hidden, weight, targets):
    """Mean cross-entropy over the targets (N,) that are not -1 of logits hidden @ weight.T, from
    hidden (N, D) and weight (V, D), in the dtype of autocast."""
    kind = hidden.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    needs = [x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight)]
    total = torch.ops.fable.linear_cross_entropy(hidden, weight, targets, half, *needs)[0]
    return total / (targets != -1).sum()


@torch.library.custom_op("fable::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cross-entropy summed over the targets, and its gradients with respect to hidden (N, D)
    and weight (V, D), empty if not needed. Products are in dtype, and so are the logits, of which
    CHUNK x V exist at a time; sums are in fp32 or more. The gradients are computed together with
    the loss, because the backward pass would have to compute the logits again. The operator is
    opaque to torch.compile, which would unroll the loop. On a CPU, tokens without a target, such as
    those of prompts, have no logits; a GPU would have to wait for their number."""
    total, dh, dw = (
        x.zero_()
        for x in linear_cross_entropy_shapes(
            hidden, weight, targets, dtype, needs_hidden, needs_weight
        )
    )
    w = weight.to(dtype)
    if targets.is_cpu and (targets == -1).any():
        parts = (targets != -1).nonzero()[:, 0].split(CHUNK)
    else:
        parts = [slice(i, i + CHUNK) for i in range(0, len(hidden), CHUNK)]
    with torch.autocast(hidden.device.type, enabled=False):
        for part in parts:
            h, t = hidden[part].to(dtype), targets[part]
            fast = len(h) >= MIN_ROWS and plain(h) and torch.backends.mkldnn.is_available()
            product = onednn if fast else F.linear
            loss, g = summed_cross_entropy(product(h, w), t, needs_hidden or needs_weight)
            total += loss
            if needs_hidden:
                dh[part] = product(g, w.T).to(dh.dtype)
            if needs_weight:
                dw += transposed_product(g, h) if fast else g.T @ h
    return total, dh, dw


@linear_cross_entropy.register_fake
def linear_cross_entropy_shapes(hidden, weight, targets, dtype, needs_hidden, needs_weight):
    sums = torch.promote_types(dtype, torch.float32)
    dh = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    shape = weight.shape if needs_weight else 0
    return hidden.new_empty((), dtype=sums), dh, weight.new_empty(shape, dtype=sums)


def save_gradients(ctx, inputs, output):
    ctx.needs, ctx.dtype = inputs[-2:], inputs[1].dtype
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, grad, *_):
    if torch.is_grad_enabled():  # by create_graph=True; the saved gradients are constants
        raise RuntimeError("the loss of a large vocabulary cannot be differentiated twice")
    dh, dw = ctx.saved_tensors
    dh = dh * grad.to(dh.dtype) if ctx.needs[0] else None
    return dh, (dw * grad).to(ctx.dtype) if ctx.needs[1] else None, None, None, None, None


linear_cross_entropy.register_autograd(scale_gradients, setup_context=save_gradients)


def summed_cross_entropy(logits, targets, gradient):
    """The cross-entropy of logits (n, V) summed over the targets (n,) that are not -1, and its
    gradient (n, V) in the dtype of the logits, or None."""
    n, V = logits.shape
    if native(logits):
        (logprob, *others), norms = logits.new_zeros(3, n), logits.new_empty(n, 4)
        targets, grad = targets.contiguous(), torch.empty_like(logits) if gradient else None
        call("token_terms", logprob, *others, norms, logits, None, targets, n, V)
        if gradient:
            of_terms = logits.new_tensor([-1.0, 0.0, 0.0]).repeat_interleave(n).view(3, n)
            read = norms, logits, None, targets
            call("token_terms_backward", grad, *of_terms, *others, *read, n, V)
        return -logprob.sum(), grad
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    at, known = targets.clamp(min=0)[:, None], (targets != -1)[:, None]
    total = -(logp.gather(1, at) * known).sum()
    if not gradient:
        return total, None
    grad = logp.exp_().scatter_add_(1, at, logp.new_full((), -1.0).expand(n, 1)).mul_(known)
    return total, grad.to(logits.dtype)


# ----------------------------------------------------------------------------
# attention


def native_attention(x):
    """Whether kernels.c computes attention for a tensor like x (..., E): E must be small."""
    return x.shape[-1] <= 16 and native(x, 2)


ATTENTION_INPUTS = "out", "softmax", "q", "k", "v", "starts", "cosine", "sine"


class FusedAttention(torch.autograd.Function):
    """Rotary embedding and causal attention of packed sequences: q (N, H, E), k and v (N, K, E),
    starts (S + 1) int64, cos and sin (N, E/2) -> (N, H, E)."""

    @staticmethod
    def forward(ctx, q, k, v, starts, cos, sin):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, softmax = torch.empty_like(q), q.new_empty(*q.shape[:2], 2)
        ctx.sizes = dict(S=len(starts) - 1, H=q.shape[1], K=k.shape[1], E=q.shape[2])
        saved = out, softmax, q, k, v, starts, cos, sin
        call("attention_forward", **dict(zip(ATTENTION_INPUTS, saved)), **ctx.sizes)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        saved = dict(zip(ATTENTION_INPUTS, ctx.saved_tensors))
        grads = {"d" + name: torch.empty_like(saved[name]) for name in "qkv"}
        call("attention_backward", dout=dout.contiguous(), **saved, **grads, **ctx.sizes)
        return *grads.values(), None, None, None


# ----------------------------------------------------------------------------
# on a GPU

MULTIPLE = 64  # attention on a GPU is compiled or planned per shape: lengths are rounded up to this
WINDOW = 32  # tokens per row between two looks at which rows have ended
SMALLEST = 64  # rows of the smallest batch of a generation step, if the cache has as many


def on_gpu(x):
    return x.device.type == "cuda"


@functools.cache
def has_varlen(device):
    """Whether PyTorch's varlen_attn has a kernel here."""
    built = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def takes_varlen(q):
    """Whether that kernel takes q (N, H, E): half precision, and E not above 256."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def varlen_attention(q, k, v, layout):
    """Layout.attention without padding."""
    from torch.nn.attention import varlen  # imports torch.compile, which takes seconds

    ends = (
        layout.starts32,
        layout.starts32,
        layout.width,
        layout.width,
    )  # width: at least the longest
    gqa = q.shape[1] != k.shape[1]
    return varlen.varlen_attn(q, k, v, *ends, window_size=(-1, 0), enable_gqa=gqa)  # causal


def rotate(x, cosine, sine):
    """model.apply_rope in three kernels, with tables in which each number is there for both halves
    of a pair: x (N, heads, E), cosine (N, 1, E), sine (N, 1, E) with alternating signs."""
    turned = x.float().unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cosine, turned, sine).type_as(x)


def cast_once(x):
    """x in autocast's type where no gradient is needed: on a GPU each of the products that follow
    would launch a kernel to convert it."""
    kind = x.device.type
    if on_gpu(x) and torch.is_autocast_enabled(kind) and not x.requires_grad:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@dataclass
class GPULayout(Layout):
    """A Layout with what all layers of a forward pass on a GPU share."""

    cosine: torch.Tensor = None  # (N, 1, E), see `rotate`
    sine: torch.Tensor = None
    starts32: Optional[torch.Tensor] = None  # (S + 1,) for varlen_attn, if it can be used


def attend_on_gpu(attention, q, k, v, layout):
    """Attention.attend with few kernels: queries and keys are rotated together."""
    E, H = attention.head_dim, q.shape[-1] // attention.head_dim
    qk = torch.cat([q, k], -1).unflatten(-1, (-1, E))
    q, k = rotate(qk, layout.cosine, layout.sine).tensor_split([H], 1)
    v = v.unflatten(-1, (-1, E))
    if layout.cache is not None:
        layout.cache.append(attention.layer, layout, k, v)
    if layout.mask is not None:
        out = layout.cache.attention(attention.layer, layout, q)
    elif layout.starts32 is not None and takes_varlen(q):
        out = varlen_attention(q, k, v, layout)
    else:
        if q.dtype == torch.float32:  # in which PyTorch's fused kernels do not share key heads
            k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        out = layout.attention(q, k, v)
    return attention.wo(out.flatten(1))


class StaticKVCache(KVCache):
    """A KVCache on a GPU that generates with fixed shapes. A generation step launches hundreds of
    kernels, which takes Python longer than the GPU. torch.compile fuses most of them and replays
    the step as one CUDA graph, if all tensors keep their shapes and addresses. So R rows are
    generated as a batch of the next power of two; the batch has its own tensors, with a row for
    each row of the cache instead of each prompt; and positions are rounded up to MULTIPLE."""

    kept = WeakKeyDictionary()  # the cache of each model with compiled decoding, for its next batch

    def __init__(self, model, batch, max_len, dtype):
        device = model.output.weight.device
        super().__init__(model.args, 0, max_len, dtype, device)
        # A tensor for each layer: torch.compile would copy the layer's part of a common one.
        shape = batch, *self.k.shape[2:]
        layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in (*self.k, *self.v)]
        self.k, self.v = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        self.all = [x[None] for x in layers]
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self.compiled, self.batches = model.compiled_decoding, {}
        self.fixed(*layers, self.length)

    @classmethod
    def of(cls, model, batch, max_len, dtype):
        """An empty cache: with compiled decoding the previous one, if it has the same size."""
        max_len = -(-max_len // MULTIPLE) * MULTIPLE
        if not model.compiled_decoding:
            return cls(model, batch, max_len, dtype)
        cache = cls.kept.get(model)
        size = batch, max_len, dtype, model.output.weight.device
        if cache is None or size != cache.size:
            cls.kept.pop(model, None)  # before there is another
            cache = cls.kept[model] = cls(model, batch, max_len, dtype)
            cache.size = size
        cache.rows = 0
        for x in (*cache.all, cache.length):
            x.zero_()
        return cache

    def fixed(self, *tensors):
        """Promises torch.compile that these tensors keep their addresses."""
        if self.compiled:
            for x in tensors:
                torch._dynamo.mark_static_address(x)

    def batch(self, b):
        """The Batch for the rows of b, with space for WINDOW tokens, and a bool for each row."""
        device, stops = self.length.device, len(b.stop_ids)
        P = min(max(1 << (len(b.prompt) - 1).bit_length(), SMALLEST), len(self.length))
        if (P, stops) not in self.batches:
            shapes = (P,), (P,), (P, WINDOW), (P, WINDOW), (P,), (P,), (P, WINDOW), (stops,), (P,)
            kinds = [torch.long] * 3 + [torch.float] + [torch.long] * 2 + [torch.float, torch.long]
            kinds = zip((*shapes, (P,)), [*kinds, torch.float, torch.bool])
            tensors = [torch.zeros(shape, dtype=kind, device=device) for shape, kind in kinds]
            tensors[0] += torch.arange(P, device=device)  # row r is its own prompt
            self.fixed(*tensors)
            self.batches[P, stops] = tensors
        *tensors, survival, active = self.batches[P, stops]
        survival = None if b.survival is None else survival
        return Batch(self, *tensors, b.sampling, survival), active

    def sample_tokens(self, model, b, steps):
        """Transformer.sample_tokens: copies the state of each row of the Batch b into a batch of
        fixed size, makes at most WINDOW steps with it, and copies the results back."""
        row, R, steps = b.prompt, len(b.prompt), min(steps, WINDOW, b.tokens.shape[1])
        fixed, active = self.batch(b)
        before = b.lengths[row, None]  # (R, 1)
        window = torch.arange(WINDOW, device=row.device)
        last = b.tokens.shape[1] - 1
        fixed.uniform[:R] = b.uniform[row].gather(1, (before + window).clamp_max(last))
        fixed.limits[:R] = b.limits[row] - b.lengths[row]
        fixed.current[:R] = b.current
        fixed.lengths.zero_()
        if b.survival is not None:
            fixed.survival[:R] = b.survival[row]
        fixed.stop_ids.copy_(b.stop_ids)
        active.copy_(fixed.prompt < R)
        self.length[R : len(active)].clamp_(min=1)  # a row that is not in use attends to something
        for _ in range(steps):
            self.step(model, fixed, active)
        at = torch.arange(last + 1, device=row.device) - before  # (R, max_new_tokens)
        new = (at >= 0) & (at < fixed.lengths[:R, None])
        at = at.clamp(0, WINDOW - 1)
        for x, y in (b.tokens, fixed.tokens), (b.probabilities, fixed.probabilities):
            x[row] = torch.where(new, y[:R].gather(1, at), x[row])
        b.lengths[row] += fixed.lengths[:R]
        if b.survival is not None:
            b.survival[row] = fixed.survival[:R]
        b.current = fixed.current[:R].clone()

    def step(self, model, batch, active):
        """Transformer.sample_step, compiled if the model wants that and it succeeds."""
        if not self.compiled:
            return model.sample_step(batch, active)
        try:
            if on_gpu(active):
                torch.compiler.cudagraph_mark_step_begin()
            compiled_step()(model, batch, active)
        except torch._dynamo.exc.TorchDynamoException as e:  # before anything has been changed
            reason = " ".join(str(e).split())[:200]
            print(f"note: generation is not compiled: {reason}", file=sys.stderr)
            self.compiled = model.compiled_decoding = False
            model.sample_step(batch, active)


@functools.cache
def compiled_step():
    how = dict(mode="reduce-overhead", dynamic=False)  # one graph for each size of the batch
    return torch.compile(
        Transformer.sample_step, **how, isolate_recompiles=True, recompile_limit=64
    )


@functools.cache
def compiled_specification():
    """Transformer.hidden through torch.compile. Models share the code, so the limit of graphs is
    high; each needs a graph for sequences of equal and of unequal lengths, with and without
    gradients."""
    how = dict(dynamic=True, isolate_recompiles=True, recompile_limit=64)
    return torch.compile(Transformer.hidden, **how)


def compiled_pass(model, tokens, lengths, lower):
    """Transformer.hidden without a cache, compiled if that succeeds. The Layout is made outside,
    because the lengths differ from batch to batch, and a graph cannot depend on them."""
    layout = lengths if isinstance(lengths, Layout) else model.layout(tokens, lengths)
    try:
        return compiled_specification()(model, tokens, layout, None, lower)
    except torch._dynamo.exc.TorchDynamoException as e:
        reason = " ".join(str(e).split())[:200]
        print(f"note: the forward pass is not compiled: {reason}", file=sys.stderr)
        model.compiled_hidden = False
        return model.hidden(tokens, layout, lower=lower)


# ----------------------------------------------------------------------------
# the modules


class FastLinear(nn.Linear):
    def forward(self, x):
        if self.bias is not None:
            return F.linear(x, self.weight, self.bias)
        return multiply(x, self.weight)


class FastRMSNorm(RMSNorm):
    def forward(self, x):
        return rms_norm(x.float(), self.weight.float(), self.eps).type_as(x)


class FastAttention(Attention):
    """Attention of packed sequences in one kernel, on a CPU with the rotary embedding."""

    def attend(self, q, k, v, layout):
        if isinstance(layout, GPULayout):
            return attend_on_gpu(self, q, k, v, layout)
        heads = [x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v)]
        if layout.mask is not None or not native_attention(heads[0]):
            return super().attend(q, k, v, layout)
        q, k, v = heads
        if layout.cache is not None:
            layout.cache.append(self.layer, layout, apply_rope(k, layout.cos, layout.sin), v)
        out = FusedAttention.apply(q, k, v, layout.starts, layout.cos, layout.sin)
        return self.wo(out.flatten(1))


class FastTransformerBlock(TransformerBlock):
    """Each norm is fused with the products after it; SwiGLU is one function."""

    def forward(self, x, layout):
        a, f = self.attention, self.feed_forward
        if fusible(x, self.attention_norm, a.wq, a.wk, a.wv):
            qkv = apply_fused(FusedQKV, x, self.attention_norm, a.wq, a.wk, a.wv)
            out = a.attend(*qkv, layout)
        else:
            out = a(cast_once(self.attention_norm(x)), layout)
        x = x + self.dropout(out)
        if fusible(x, self.ffn_norm, f.w1, f.w2, f.w3):
            out = apply_fused(FusedFeedForward, x, self.ffn_norm, f.w1, f.w2, f.w3)
        else:
            out = f(cast_once(self.ffn_norm(x)))
        return x + self.dropout(out)


def fusible(x, norm, *linears):
    """Whether a norm of x and the linear layers that follow it can be one function: an RMSNorm, and
    no adapters."""
    if not isinstance(norm, FastRMSNorm) or not all(type(w) is FastLinear for w in linears):
        return False
    return native_layer(x, norm.weight, *(linear.weight for linear in linears))


def apply_fused(function, x, norm, *linears):
    return function.apply(x, norm.weight, *(linear.weight for linear in linears), norm.eps)


class FastKVCache(KVCache):
    """A KVCache in the memory layout of the decoding functions of kernels.c. W adjacent positions,
    as many as a vector has lanes, are contiguous: k and v are (L, B, K, T / W, E, W). The cache
    also has a copy of the weights of all layers, in the order of kernels.c, with adapters
    merged."""

    def __init__(self, model, batch, max_len):
        a, self.width = model.args, library().attention_lanes()
        self.capacity = -(-max_len // self.width) * self.width
        super().__init__(a, batch, self.capacity, torch.float32, "cpu")
        blocks = self.capacity // self.width, a.head_dim, self.width
        self.k, self.v = (x.view(*x.shape[:3], *blocks) for x in (self.k, self.v))
        self.weights = decode_weights(model)
        self.sizes = dict(
            capacity=batch,
            L=a.n_layers,
            F=a.ffn_dim,
            H=a.n_heads,
            K=a.n_kv_heads,
            E=a.head_dim,
            T=self.capacity,
            eps=float(a.norm_eps),
        )

    def append(self, layer, layout, k, v):
        block, lane = layout.positions // self.width, layout.positions % self.width
        self.k[layer][layout.rows, :, block, :, lane] = k
        self.v[layer][layout.rows, :, block, :, lane] = v


# Prompts are computed by generation steps if they need at most FEW_STEPS of them: the length of the
# longest prompt times the number of groups of W rows. The limit is for D <= 64. It shrinks by the
# factor (64 / D)² beyond, because the time of a step grows by D²: with D = 256 and one prompt of 8
# tokens, steps take 2.9 times as long as the ordinary pass.
FEW_STEPS = 16


class FastTransformer(Transformer):
    """Computes the cross-entropy in one pass over the logits, or with a large vocabulary without
    storing them, and one or several generation steps in one call. On a CPU, groups of W rows go
    through all layers and sampling while they stay in the processor's cache. On a GPU, the steps
    have fixed shapes (`StaticKVCache`)."""

    compiled_decoding = False  # whether generation on a GPU goes through torch.compile
    compiled_hidden = False  # whether `hidden` does, except in generation

    def forward(self, tokens, targets=None, lengths=None, cache=None):
        standard = type(self.output) in (nn.Linear, FastLinear)
        if targets is None or self.args.vocab_size < LARGE_VOCABULARY or not standard:
            return super().forward(tokens, targets, lengths, cache)
        hidden = self.hidden(tokens, lengths, cache).flatten(0, -2)
        return cross_entropy(hidden, self.output.weight, targets.flatten())

    def loss(self, logits, targets):
        if not native(logits):
            return super().loss(logits, targets)
        return -TokenTerms.apply(logits, targets)[0].sum() / (targets != -1).sum()

    def new_cache(self, batch, max_len):
        a, standard = self.args, all(map(is_standard, self.layers))
        one_head = self.output.weight.new_empty(0, a.head_dim)
        if native_attention(one_head) and standard and a.n_heads * a.head_dim == a.dim:
            return FastKVCache(self, batch, max_len)
        dtype = super().new_cache(0, 0).k.dtype
        if on_gpu(one_head):
            return StaticKVCache.of(self, batch, max_len, dtype)
        return super().new_cache(batch, max_len)

    def layout(self, tokens, lengths=None, cache=None, multiple=1):
        if not on_gpu(tokens):
            return super().layout(tokens, lengths, cache, multiple)
        plain = super().layout(tokens, lengths, cache, MULTIPLE)
        cosine = torch.stack([plain.cos, plain.cos], -1).flatten(-2).unsqueeze(1)
        sine = torch.stack([-plain.sin, plain.sin], -1).flatten(-2).unsqueeze(1)
        varlen = plain.padded is not None and has_varlen(tokens.device)
        return GPULayout(
            **vars(plain), cosine=cosine, sine=sine, starts32=plain.starts.int() if varlen else None
        )

    def hidden(self, tokens, lengths=None, cache=None, lower=None):
        if self.compiled_hidden and cache is None and not torch.compiler.is_compiling():
            return compiled_pass(self, tokens, lengths, lower)
        if isinstance(cache, FastKVCache) and isinstance(lengths, list):
            steps = max([0, *lengths]) * -(-len(lengths) // cache.width)
            if steps <= FEW_STEPS * min(1, 64 / self.args.dim) ** 2:
                return hidden_in_steps(self, tokens, lengths, cache)
        if lengths is not None or not isinstance(cache, FastKVCache):
            return super().hidden(tokens, lengths, cache, lower)
        x = self.dropout(self.tok_embeddings(tokens)).clone(memory_format=torch.contiguous_format)
        call("decode_hidden", x=x, B=len(x), steps=1, **decoding_fields(self, cache))
        cache.length[: len(x)] += 1
        return self.norm(x)

    def sample_tokens(self, batch, steps):
        b, cache, V = batch, batch.cache, self.args.vocab_size
        temperature, top_k, top_p = b.sampling
        restricted = 0 < top_k < V or 0 < top_p < 1
        standard = isinstance(self.norm, FastRMSNorm) and type(self.output) is FastLinear
        fast = standard and isinstance(cache, FastKVCache)
        if isinstance(cache, StaticKVCache):
            return cache.sample_tokens(self, batch, min(steps, WINDOW))
        if temperature == 0 or restricted or not fast:
            return super().sample_tokens(batch, steps)
        call(
            "decode_tokens",
            embedding=self.tok_embeddings.weight.contiguous(),
            norm=self.norm.weight.contiguous(),
            output=self.output.weight.contiguous(),
            tokens=b.tokens,
            probabilities=b.probabilities,
            lengths=b.lengths,
            current=b.current,
            uniform=b.uniform,
            prompt=b.prompt,
            stop_ids=b.stop_ids,
            survival=b.survival,
            B=len(b.prompt),
            V=V,
            steps=steps,
            max_new=b.tokens.shape[1],
            n_stops=len(b.stop_ids),
            context=self.args.max_seq_len,
            temperature=float(temperature),
            **decoding_fields(self, cache),
        )


class FastTransformerWithValueHead(FastTransformer, TransformerWithValueHead):
    pass


def decoding_fields(model, cache):
    """The fields of the struct Decoding that a model and its cache determine."""
    return dict(
        weights=cache.weights,
        cosine=model.freqs_cos,
        sine=model.freqs_sin,
        keys=cache.k,
        values=cache.v,
        positions=cache.length,
        **cache.sizes,
    )


def hidden_in_steps(model, tokens, lengths, cache):
    """`hidden` of a few short sequences that fill new rows of a FastKVCache, by generation steps,
    which are 1.3 to 6 times as fast for stories260K and at least 1.1 times for wider models. What
    they write beyond a sequence is overwritten later."""
    first, S, T, ends = cache.rows, len(lengths), max([0, *lengths]), torch.tensor(lengths)
    inside = torch.arange(T) < ends[:, None]  # (S, T)
    order = inside.nonzero().flip(1).unbind(1)  # where the packed tokens are in x
    x = model.output.weight.new_zeros(T, S, model.args.dim)
    x[order] = model.dropout(model.tok_embeddings(tokens))
    fields = decoding_fields(model, cache)
    fields |= dict(keys=cache.k[:, first:], values=cache.v[:, first:], positions=0 * ends)
    call("decode_hidden", x=x, B=S, steps=T, **fields)
    cache.length[first : first + S] = ends
    cache.rows += S
    return model.norm(x[order])


def is_standard(layer):
    """Whether a layer computes what kernels.c's decoding does: no module was replaced by another
    kind. Adapters are merged into the weights."""
    norms = layer.attention_norm, layer.ffn_norm
    return (
        isinstance(layer, FastTransformerBlock)
        and isinstance(layer.attention, FastAttention)
        and type(layer.feed_forward) is FeedForward
        and all(isinstance(norm, FastRMSNorm) for norm in norms)
    )


def decode_weights(model):
    """The weights of all layers as one flat tensor, in the order of the struct Decoding, with
    adapters merged."""
    parts = []
    for layer in model.layers:
        a, f = layer.attention, layer.feed_forward
        for w in (layer.attention_norm, a.wq, a.wk, a.wv, a.wo, layer.ffn_norm, f.w1, f.w3, f.w2):
            weight = w.merged() if hasattr(w, "merged") else w.weight
            parts.append(weight.detach().flatten())
    return torch.cat(parts)


FAST = {
    nn.Linear: FastLinear,
    RMSNorm: FastRMSNorm,
    Attention: FastAttention,
    TransformerBlock: FastTransformerBlock,
    Transformer: FastTransformer,
    TransformerWithValueHead: FastTransformerWithValueHead,
}


def accelerate(model):
    """Replaces the modules of a model in place by faster ones with the same parameters, and
    returns the model. Results are equal up to rounding. LoRA adapters and FSDP must be applied
    afterwards."""
    if switched_on():
        for module in model.modules():
            module.__class__ = FAST.get(type(module), type(module))
    return model
