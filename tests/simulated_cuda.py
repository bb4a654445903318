"""A simulated CUDA device, so that scripts run with --device=cuda where there is no GPU.

    python tests/simulated_cuda.py train.py --device=cuda --compile=False ...

A tensor of the device is a `CudaTensor`: PyTorch sees device cuda:0 and takes CUDA's branches
(autocast, autograd, GradScaler, fused AdamW), while the numbers are in a CPU tensor inside.
Operations raise what CUDA raises for tensors on two devices, `.numpy()` and pinning. Four things
are counted, for the line of the program that causes them:

    kernels     kernel launches, one per operation that is not a view or an allocation
    waits       operations in which Python waits until the device is idle: .item(), copies from the
                device, copies of unpinned memory to it, nonzero, indexing with a mask, synchronize
    attention   the kernel that PyTorch 2.13 chooses for scaled_dot_product_attention on a GPU
                without cuDNN attention (A100, RTX 4090), and calls of varlen_attn
    peak        bytes of the tensors on the device at the peak, without the temporary memory of an
                operation

step_waits and step_peak are those within the functions `step` of training stages.

Not simulated: time, limits of CUDA's kernels (shapes, rounding, non-determinism), torch.compile,
CUDA graphs, streams, NCCL and several devices. The module must be imported before torch, which
needs to be a CPU build on Linux; the first use compiles simulated_cuda.cpp in 15 s. With --serve,
test_cuda.py sends it commands.
"""

import collections
import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def unavailable():
    """Why the device cannot be simulated here, in one line; "" if it can."""
    version = Path(importlib.util.find_spec("torch").origin).with_name("version.py").read_text()
    if sys.platform != "linux" or "cuda: Optional[str] = None" not in version:
        return "the simulated CUDA device needs a CPU build of PyTorch on Linux"
    try:
        compiled_guard()
    except (OSError, subprocess.CalledProcessError) as e:
        reason = " ".join((getattr(e, "stderr", "") or str(e)).split())[:200]
        return f"the simulated CUDA device cannot be compiled: {reason}"
    return ""


def compiled_guard():
    """The path of the library made of simulated_cuda.cpp. Raises OSError, CalledProcessError."""
    source = Path(__file__).with_suffix(".cpp")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256(
        source.read_bytes() + (torch_folder / "version.py").read_bytes()
    ).hexdigest()
    library = ROOT / "build" / f"simulated-cuda-{key[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        words = [
            os.environ.get("CXX", "c++"),
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            source,
            "-o",
            part,
        ]
        words += [
            f"-I{torch_folder}/include",
            f"-L{torch_folder}/lib",
            f"-Wl,-rpath,{torch_folder}/lib",
        ]
        words += ["-lc10", "-ltorch_cpu"]
        subprocess.run([*map(str, words)], check=True, capture_output=True, text=True)
        part.rename(library)  # several processes may compile at once
    return library


if "torch" not in sys.modules:  # test_cuda.py only asks whether the device is unavailable
    ctypes.CDLL(str(compiled_guard()))  # before PyTorch, which asks once for the hooks
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # it runs the functions as they are

import torch  # noqa: E402
import torch.nn.attention.varlen  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._foreach_utils import _foreach_supported_types  # noqa: E402

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
aten, varlen = torch.ops.aten, torch.ops.torch_attn

# ----------------------------------------------------------------------------
# counters


COUNTS = "kernels", "waits", "step_waits", "attention"


class Counters:
    """What the program has done on the device, by line of the program."""

    def __init__(self):
        self.storages = collections.Counter()  # number of tensors per storage, by address
        self.now, self.lock, self.enabled = 0, threading.RLock(), True
        self.reset()

    def reset(self):
        for name in COUNTS:
            setattr(self, name, collections.Counter())
        self.base = self.peak = self.step_peak = self.now
        self.peak_line = ""

    def wait(self, kind):
        place = f"{line()}: {kind}"
        self.waits[place] += 1
        self.step_waits[place] += in_step()

    def allocate(self, key, size):
        with self.lock:
            if not self.storages[key]:
                self.now += size
                self.peak = max(self.peak, self.now)
                if self.now > self.step_peak and in_step():
                    self.step_peak, self.peak_line = self.now, line()
            self.storages[key] += 1

    def free(self, key, size):
        with self.lock:
            self.storages[key] -= 1
            if not self.storages[key]:
                del self.storages[key]
                self.now -= size

    def report(self):
        """The counts since the last reset, and the memory beyond what was there at the reset."""
        counts = {name: dict(getattr(self, name)) for name in COUNTS}
        peaks = {name: getattr(self, name) - self.base for name in ("peak", "step_peak")}
        return counts | peaks | {"peak_line": self.peak_line}


def program_frames():
    """The frames of the program that is being executed, innermost first, without libraries."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path[0] == "/" and path != __file__ and "/lib/python" not in path:
            yield frame
        frame = frame.f_back


def line():
    """The innermost line of the program that is being executed, as file:line function; "backward"
    where autograd runs its own code."""
    for f in program_frames():
        return f"{os.path.basename(f.f_code.co_filename)}:{f.f_lineno} {f.f_code.co_name}"
    return "backward"


def in_step():
    """Whether the program is within a function `step`, or autograd is at work."""
    names = [f.f_code.co_name for f in program_frames()]
    return not names or "step" in names


counters = Counters()

# ----------------------------------------------------------------------------
# tensors


class CudaTensor(torch.Tensor):
    """A tensor of the device; `held` is the CPU tensor with its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        t = cls._make_subclass(cls, meta, False, dispatch_device=True, device_for_backend_keys=CUDA)
        t.hold(held)
        return t

    def __init__(self, held):
        pass

    def hold(self, held):
        if hasattr(self, "release"):
            self.release()
        storage = held.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        counters.allocate(key, size)
        self.held, self.storage_held = held, storage
        self.release = weakref.finalize(self, counters.free, key, size)
        self.release.atexit = False

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    @property
    def device(self):
        return CUDA

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        assert isinstance(other, CudaTensor) and other.shape == self.shape
        self.hold(other.held)

    def __repr__(self):
        return f"CudaTensor({self.held})"

    def tolist(self):
        counters.wait("tolist")
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def cuda(self, *args, **kwargs):
        return self

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def pin_memory(self, device=None):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )

    def __reduce_ex__(self, protocol):  # torch.save
        counters.wait("save")
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = CudaTensor(self.held.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            copy = torch.nn.Parameter(copy) if is_parameter else copy
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]


INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
COPIES = {aten.copy_.default, aten._to_copy.default}
DYNAMIC_SHAPES = "nonzero", "masked_select", "unique", "_unique"


def is_free(func, cache={}):  # noqa: B006
    """Whether an operation launches no kernel: it returns a view, or memory as it is."""
    if func not in cache:
        name = func.name().removeprefix("aten::")
        aliases = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in aliases)
        cache[func] = view or name.partition(".")[0] in ALLOCATIONS
    return cache[func]


ALLOCATIONS = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
)


def leaves(*values):
    """The values in nested lists, tuples and dicts (torch.utils._pytree takes 10 times as long)."""
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from leaves(*x)
        elif isinstance(x, dict):
            yield from leaves(*x.values())
        else:
            yield x


def convert(x, function):
    """x with `function` applied to its leaves."""
    if isinstance(x, (list, tuple)):
        return type(x)([convert(y, function) for y in x])
    return function(x)


def execute(func, args, kwargs):
    """Runs an operation of the device on the CPU tensors inside, checks it and counts it."""
    if func is torch.ops.prim.device.default:
        return CUDA
    tensors = [x for x in leaves(args, kwargs) if isinstance(x, torch.Tensor)]
    check_devices(func, args, tensors)
    target = kwargs.get("device")
    on_device = any(isinstance(x, CudaTensor) for x in tensors)
    if target is not None:
        on_device = torch.device(target).type == "cuda"
    reason = why_python_waits(func, args, kwargs, on_device)
    if reason:
        counters.wait(reason)
    if not is_free(func):
        counters.kernels[f"{line()}: {func.name().removeprefix('aten::')}"] += 1
    same = {id(x.held): x for x in tensors if isinstance(x, CudaTensor)}  # operations in place

    def unwrap(x):
        if isinstance(x, CudaTensor):
            return x.held
        return CPU if isinstance(x, torch.device) else x

    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, CudaTensor):
            return x
        if id(x) not in same:
            return CudaTensor(x)
        assert same[id(x)].shape == x.shape, f"{func} resizes a tensor: not simulated"
        return same[id(x)]

    inner = {name: convert(x, unwrap) for name, x in kwargs.items()}
    if inner.get("pin_memory"):
        inner["pin_memory"] = False
    out = SPECIAL.get(func, func)(*convert(args, unwrap), **inner)
    if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
        return args[0]
    return convert(out, wrap) if on_device else out


def check_devices(func, args, tensors):
    """Raises RuntimeError for a tensor of the CPU beside one of the device, except a scalar."""
    others = [x for x in tensors if not isinstance(x, CudaTensor) and x.dim()]
    if not others or len(others) == len(tensors) or func in COPIES:
        return
    if func in INDEXING:
        if not isinstance(args[0], CudaTensor):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        others = [x for x in others if not any(x is y for y in args[1])]
    if others:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and {others[0].device}! ({func}, a tensor {tuple(others[0].shape)})"
        )


def why_python_waits(func, args, kwargs, on_device):
    """The reason why Python waits for the device in this operation, or ""."""
    name = func.name().removeprefix("aten::").partition(".")[0]
    if func is aten._local_scalar_dense.default:
        return "item"
    if name in ("equal", "is_nonzero") or name.startswith(DYNAMIC_SHAPES):
        return name
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if func in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if any(not isinstance(x, CudaTensor) for x in indices):
            return "index on the CPU"
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            # x[mask] = number is masked_fill_, and the number is a scalar of the CPU
            number = len(args) > 2 and not isinstance(args[2], CudaTensor) and args[2].numel() == 1
            return "" if number else "index with a mask"
    if func is aten.copy_.default:
        to, source = args[:2]
        asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
        if isinstance(to, CudaTensor) and not isinstance(source, CudaTensor):
            pinned = getattr(source, "pinned", False)
            return "" if pinned and asynchronous else "copy to the device"
        if isinstance(source, CudaTensor) and not isinstance(to, CudaTensor):
            return "copy from the device"
    if func is aten._to_copy.default and not on_device:
        return "copy from the device"
    return ""


# ----------------------------------------------------------------------------
# operations that a CPU computes differently, or does not have


def rms_norm(x, shape, weight, eps):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    r = torch.rsqrt(x.float().square().mean([*range(-len(shape), 0)], keepdim=True) + eps)
    y = (x.float() * r).to(x.dtype)
    return (y if weight is None else y * weight), r


def rms_norm_backward(grad, x, shape, r, weight, wanted):
    grad, n = grad.float(), len(shape)
    normed = x.float() * r
    scaled = grad if weight is None else grad * weight.float()
    dx = r * (scaled - normed * (scaled * normed).mean([*range(-n, 0)], keepdim=True))
    dw = (grad * normed).flatten(0, -n - 1).sum(0).to(weight.dtype) if wanted[1] else None
    return dx.to(x.dtype) if wanted[0] else None, dw


def attention_weights(q, k, causal, mask, scale):
    """The softmax of the scores (..., H, T, S) in fp32, 0 in a row that sees nothing, and its
    log-sum-exp."""
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if causal:
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if mask is not None:
        scores += mask
    return scores.softmax(-1).nan_to_num(), scores.logsumexp(-1)


def fused_attention(q, k, v, causal, mask=None, scale=None, grad=None):
    """q (..., H, T, E), k and v (..., K, S, E) -> output (..., H, T, E) and log-sum-exp.
    With `grad`, the gradient of the output, it returns the gradients of q, k and v."""
    groups, scale = q.shape[-3] // k.shape[-3], q.shape[-1] ** -0.5 if scale is None else scale
    wide_k, wide_v = (x.float().repeat_interleave(groups, dim=-3) for x in (k, v))
    weights, lse = attention_weights(q, wide_k, causal, mask, scale)
    if grad is None:
        return (weights @ wide_v).to(q.dtype), lse
    grad = grad.float()
    d_weights = grad @ wide_v.transpose(-1, -2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
    wide = d_scores.transpose(-1, -2) @ q.float(), weights.transpose(-1, -2) @ grad
    dk, dv = (x.unflatten(-3, (-1, groups)).sum(-3) for x in wide)
    return (d_scores @ wide_k).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def flash(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    assert not dropout_p, "dropout in attention is not simulated"
    return fused_attention(q, k, v, is_causal, attn_mask, scale)


def flash_backward(grad, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    return fused_attention(q, k, v, is_causal, attn_mask, scale, grad)


def packed_attention(q, k, v, starts, causal, scale, grad=None):
    """`fused_attention` for packed sequences: q (N, H, E), k and v (M, K, E). `starts` has two
    tensors, where the sequences begin in q and in k; tokens after the last sequence give 0."""
    starts_q, starts_k = (x.tolist() for x in starts)
    inputs = (q, k, v) if grad is None else (q, k, v, grad)
    results = [torch.zeros_like(x) for x in (inputs[:3] if grad is not None else (q,))]
    sums = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    for bounds in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
        in_q, in_k = slice(*bounds[:2]), slice(*bounds[2:])
        parts = [x[i].transpose(0, 1) for x, i in zip(inputs, (in_q, in_k, in_k, in_q))]
        out = fused_attention(*parts[:3], causal, None, scale, *parts[3:])
        if grad is None:
            sums[:, in_q] = out[1]
        for result, i, x in zip(results, (in_q, in_k, in_k), out):
            result[i] = x.transpose(0, 1)
    return (results[0], sums) if grad is None else tuple(results)


def varlen_forward(
    q, k, v, starts_q, starts_k, max_q, max_k, is_causal=False, scale=None, window_size=None,
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if starts_q.dtype != torch.int32:
        raise RuntimeError("cu_seqlens_q must have dtype int32")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RuntimeError(
            "FlashAttention needs a head size that is a multiple of 8 and at most 256"
        )
    assert seqused_k is None and block_table is None, "a paged cache is not simulated"
    counters.attention[f"varlen {str(q.dtype)[6:]}: {line()}"] += 1
    starts = starts_q, starts_q if starts_k is None else starts_k
    out, sums = packed_attention(q, k, v, starts, is_causal, scale)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    grad, q, k, v, out, lse, starts_q, starts_k, max_q, max_k, is_causal, rng, scale=None,
    window_size=None,
):  # fmt: skip
    return packed_attention(q, k, v, (starts_q, starts_k), is_causal, scale, grad)


def matrix_product(a, b):
    """Products that are large enough to measure a GPU's speed are not computed."""
    huge = a.shape[0] * a.shape[1] * b.shape[1] > 1e10
    return a.new_empty(a.shape[0], b.shape[1]) if huge else aten.mm.default(a, b)


def normal_(x, *args, **kwargs):
    return x if x.numel() > 1e7 else aten.normal_.default(x, *args, **kwargs)


SPECIAL = {
    aten.mm.default: matrix_product,
    aten.normal_.default: normal_,
    aten._fused_rms_norm.default: rms_norm,
    aten._fused_rms_norm_backward.default: rms_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_backward,
}


def attention_kernel(q, k, mask):
    """The kernel that PyTorch 2.13 chooses on a GPU without cuDNN attention
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
    half, E, gqa = q.dtype in (torch.float16, torch.bfloat16), q.shape[-1], q.shape[1] != k.shape[1]
    if not (q.shape[2] and k.shape[2]):
        return "math"
    if half and mask is None and E <= 256:
        return "flash"
    if not gqa and E * q.element_size() % 16 == 0:
        return "efficient"
    return "math"


plain_attention = F.scaled_dot_product_attention


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """scaled_dot_product_attention that records the kernel that CUDA would use. A fused kernel is
    one launch and keeps no scores."""
    q, k, v = query, key, value
    if not isinstance(q, CudaTensor):
        return plain_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise RuntimeError(
            "key and query have different numbers of heads, which needs enable_gqa=True"
        )
    kernel = attention_kernel(q, k, attn_mask)
    if q.numel():
        counters.attention[f"{kernel} {str(q.dtype)[6:]}: {line()}"] += 1
    if kernel == "math":
        return plain_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


# ----------------------------------------------------------------------------
# installation


def move(module, *args, **kwargs):
    """Module.to. PyTorch keeps the Parameter objects and exchanges their data, which cannot change
    its device here: the Parameters are new objects, and tied ones stay tied."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    moved = {}
    for m in module.modules():
        for members in (m._parameters, m._buffers):
            for name, x in members.items():
                if x is None:
                    continue
                if id(x) not in moved:
                    with torch.no_grad():
                        new = x.to(device or x.device, dtype if x.is_floating_point() else None)
                    if new is not x and members is m._parameters:
                        new = torch.nn.Parameter(new, x.requires_grad)
                    moved[id(x)] = x, new
                members[name] = moved[id(x)][1]
    return module


def pin_memory(x, device=None):
    x = x.clone()
    x.pinned = True
    return x


libraries = []  # PyTorch forgets their kernels when they are deleted


def install():
    """Makes torch.cuda report one device, and runs its factories and tensors in this module."""
    libraries.extend(torch.library.Library(*x) for x in (("_", "IMPL"), ("aten", "IMPL")))
    fallback, overrides = libraries
    fallback.fallback(lambda func, *args, **kwargs: execute(func, args, kwargs), "CUDA")
    # PyTorch has kernels of these that serve all devices, or none, but do not work here.
    rms = "_fused_rms_norm", "_fused_rms_norm_backward"
    for name in ("copy_", "arange", "arange.start", "arange.start_step", *rms):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        overrides.impl(name, lambda *args, func=func, **kwargs: execute(func, args, kwargs), "CUDA")
    for op, kernel in (
        (varlen._varlen_attn, varlen_forward),
        (varlen._varlen_attn_backward, varlen_backward),
    ):
        SPECIAL[op.default] = kernel
    _foreach_supported_types.append(CudaTensor)
    F.scaled_dot_product_attention = attention
    torch.nn.Module.to = move
    torch.nn.Module.cuda = lambda module, device=None: move(module, "cuda")
    torch.nn.Module.cpu = lambda module: move(module, "cpu")
    torch.Tensor.pin_memory = pin_memory
    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda._lazy_init = cuda.empty_cache = lambda: None
    cuda.set_device = cuda.manual_seed_all = lambda x: None
    cuda._is_in_bad_fork = lambda: False
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    cuda.get_device_capability = lambda device=None: (8, 0)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    cuda.get_device_name = lambda device=None: "simulated device"
    cuda.synchronize = lambda device=None: counters.wait("synchronize")
    cuda.max_memory_allocated = lambda device=None: counters.peak
    cuda.memory_allocated = lambda device=None: counters.now
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False


# ----------------------------------------------------------------------------
# running programs


def run(argv):
    """Runs a script as the main program; its exit status."""
    sys.argv = [*argv]
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    return 0


def serve():
    """Answers each line of JSON, (words of a command, its input), with a line of JSON: counts, exit
    status, and what the command has printed. Runs draw no pictures, see conftest.py."""
    import report

    report.plot_at_end = lambda path: None
    requests, answers = sys.stdin, sys.stdout
    for request in requests:
        gc.collect()
        counters.reset()
        start = time.process_time()
        argv, text_in = json.loads(request)
        sys.stdin, text = io.StringIO(text_in), io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                status = run(argv)
            except BaseException:
                traceback.print_exc()
                status = "traceback"
        answer = counters.report() | {"status": status, "output": text.getvalue()}
        answer["seconds"] = time.process_time() - start
        print(json.dumps(answer), file=answers, flush=True)


def main():
    install()
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:] == ["--serve"]:
        return serve()
    sys.path[0] = str(Path(sys.argv[1]).resolve().parent)
    status = run(sys.argv[1:])
    report = counters.report()
    for name in COUNTS:
        print(f"{name}: {sum(report[name].values()):,}", file=sys.stderr)
        for place, n in collections.Counter(report[name]).most_common(20):
            print(f"  {n:8,d}  {place}", file=sys.stderr)
    step = f"{report['step_peak'] / 1e6:.1f} MB in a step, at {report['peak_line']}"
    print(f"peak: {report['peak'] / 1e6:.1f} MB; {step}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.modules["simulated_cuda"] = sys.modules["__main__"]
    sys.exit(main())
