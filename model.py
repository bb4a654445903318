"""The Llama language model in plain PyTorch, and text generation with it.

Parameter names, shapes and mathematics are those of llama2.c: its published checkpoints load here,
and ours load there. This file needs nothing but PyTorch and can be copied alone. For speed,
`kernels.accelerate(model)` replaces the modules by faster ones with the same parameters.

There is one forward pass, `Transformer.hidden`. Its N tokens are those of S sequences without
padding, see `Layout`: a (B, T) batch is B sequences, a generation step one token of R sequences.
Letters: B batch, T time, S sequences, N packed tokens, D dim, H query heads, K key/value heads,
E head dim, V vocabulary, L layers, R rows of the KV cache in use.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelArgs:
    """The hyperparameters of a model. The defaults are those of llama2.c (Llama 7B)."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: Optional[int] = None  # default: n_heads
    head_dim: Optional[int] = None  # default: dim // n_heads
    vocab_size: int = 32000
    hidden_dim: Optional[int] = None  # default: 8/3 of dim, rounded up to a multiple of multiple_of
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    dropout: float = 0.0
    rope_theta: float = 10000.0
    tied: bool = True  # the output layer shares the weight of the token embedding
    rope_scaling: Optional[dict] = None  # see rope_frequencies

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        for name, most in LARGEST.items():
            value = getattr(self, name)
            unset = name == "hidden_dim" and value is None
            if not unset and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value!r}")
        for name, largest in ("norm_eps", 1), ("rope_theta", 1e30), ("dropout", 1):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < largest:
                raise ValueError(f"{name} must be in [0, {largest}), not {value!r}")
        H, K = self.n_heads, self.n_kv_heads
        if not self.head_dim and self.dim % (2 * H):
            raise ValueError(f"dim ({self.dim}) must be an even multiple of n_heads ({H})")
        self.head_dim = E = self.head_dim or self.dim // H
        if type(E) is not int or E % 2 or not 2 <= E <= 2**16 // H:  # run.c has this limit
            raise ValueError(f"head_dim must be an even number from 2 to {2**16 // H}, not {E!r}")
        if H % K:
            raise ValueError(f"n_heads ({H}) must be a multiple of n_kv_heads ({K})")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)

    @property
    def ffn_dim(self):
        """Width of the feed-forward layer: hidden_dim, or Llama's rule."""
        return self.hidden_dim or -(-int(8 * self.dim / 3) // self.multiple_of) * self.multiple_of


LARGEST = dict(dim=2**16, n_layers=2**10, n_heads=2**14, n_kv_heads=2**14, vocab_size=2**22)
LARGEST |= dict(hidden_dim=2**20, multiple_of=2**20, max_seq_len=2**22)  # run.c has these limits
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")


def check_rope_scaling(scaling):
    """Raises ValueError unless `scaling` is {"factor": f} or has the keys of LLAMA3_SCALING."""
    ok = isinstance(scaling, dict) and set(scaling) in ({"factor"}, set(LLAMA3_SCALING))
    if not ok or not all(type(x) in (int, float) and 0 < x < math.inf for x in scaling.values()):
        keys = f"factor or {', '.join(LLAMA3_SCALING)}"
        raise ValueError(f"rope_scaling needs a positive number for {keys}: {scaling}")
    if len(scaling) > 1 and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor must be below high_freq_factor")


# ----------------------------------------------------------------------------
# where tokens are: rotary embeddings, packed sequences, keys and values of earlier tokens


def rope_frequencies(args):
    """The angle in radians per position of each pair of a head, theta^(-2i / E): (E/2,).
    Models whose context was extended after pretraining set rope_scaling. {"factor": f} divides all
    frequencies by f (Chen et al., 2023). In Llama 3, pairs that make more than high_freq_factor
    turns within the original context keep their frequency, pairs that make fewer turns than
    low_freq_factor are divided by f, and pairs in between are interpolated."""
    freqs = args.rope_theta ** -(torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    s = args.rope_scaling
    if s is None:
        return freqs
    if len(s) == 1:
        return freqs / s["factor"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_seq_len"] * freqs / (2 * math.pi)
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: divided
    return freqs * (unscaled + (1 - unscaled) / s["factor"])


def apply_rope(x, cos, sin):
    """Rotates the pairs (x0, x1), (x2, x3), ... of each head (Su et al., 2021), interleaved as in
    llama2.c: x (N, heads, E), cos and sin (N, E/2) -> (N, heads, E)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


@dataclass
class Layout:
    """Where the N tokens of one forward pass lie: in S sequences, one after the other."""

    positions: torch.Tensor  # (N,) of each token in its sequence
    cos: torch.Tensor  # (N, E/2) RoPE angles of these positions
    sin: torch.Tensor
    starts: Optional[torch.Tensor] = None  # (S + 1,) 0, then where each sequence ends
    width: int = 0  # T: tokens per sequence, or at least those of the longest if padded
    padded: Optional[torch.Tensor] = None  # (N,) index in a (S, T) grid, if lengths differ
    cache: Optional["KVCache"] = None  # where keys and values are appended
    rows: Optional[torch.Tensor] = None  # (N,) sequence, or cache row, of each token
    mask: Optional[torch.Tensor] = None  # (R, 1, 1, T) in a generation step: 0, or -inf beyond it

    def attention(self, q, k, v):
        """Causal attention within each sequence: q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
        S, T, i, gqa = len(self.starts) - 1, self.width, self.padded, q.shape[1] != k.shape[1]
        if i is not None:  # padding comes after every token, so it changes no result
            q, k, v = (x.new_zeros(S * T, *x.shape[1:]).index_copy(0, i, x) for x in (q, k, v))
        q, k, v = (x.unflatten(0, (S, T)).transpose(1, 2) for x in (q, k, v))  # (S, heads, T, E)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        out = out.transpose(1, 2).flatten(0, 1)
        return out if i is None else out[i]


class KVCache:
    """Rotated keys and values of up to B sequences that grow during generation, one row each."""

    def __init__(self, args, batch, max_len, dtype, device):
        shape = args.n_layers, batch, args.n_kv_heads, max_len, args.head_dim
        self.k, self.v = self.all = [torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"]
        self.length = torch.zeros(batch, dtype=torch.long, device=device)  # tokens in each row
        self.rows = 0  # R: rows 0 to R - 1 are in use

    def append(self, layer, layout, k, v):
        """Stores the keys and values (N, K, E) of one layer."""
        self.k[layer][layout.rows, :, layout.positions] = k.to(self.k[0].dtype)
        self.v[layer][layout.rows, :, layout.positions] = v.to(self.v[0].dtype)

    def attention(self, layer, layout, q):
        """The newest token of each row attends to the whole row: q (R, H, E) -> (R, H, E)."""
        k, v = self.k[layer][: len(q)], self.v[layer][: len(q)]  # (R, K, T, E)
        q = q.unflatten(1, (k.shape[1], -1))  # the H/K query heads of a key head, as H/K queries
        return F.scaled_dot_product_attention(q, k, v, layout.mask).flatten(1, 2)

    def keep(self, remaining):
        """Drops all rows but `remaining` (R,); returns the previous index of each row in use."""
        n, R = int(remaining.sum()), len(remaining)  # the only number that the CPU waits for
        order = torch.arange(n, device=remaining.device)
        gaps = remaining[:n].argsort(stable=True)[: R - n]  # first those that must be filled
        moved = n + remaining[n:].argsort(stable=True, descending=True)[:n]
        moved = torch.where(remaining[moved], moved, gaps)  # the others stay where they are
        order[gaps] = moved
        for x in (*self.all, self.length[None]):
            x[:, gaps] = x[:, moved]
        self.rows = n
        return order


# ----------------------------------------------------------------------------
# the model


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads."""

    def __init__(self, args, layer):
        super().__init__()
        self.layer, self.head_dim = layer, args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, layout):
        return self.attend(self.wq(x), self.wk(x), self.wv(x), layout)

    def attend(self, q, k, v, layout):
        """From the projections q (N, H E), k and v (N, K E) to the output (N, D)."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        q, k = apply_rope(q, layout.cos, layout.sin), apply_rope(k, layout.cos, layout.sin)
        if layout.cache is not None:
            layout.cache.append(self.layer, layout, k, v)
        step = layout.mask is not None
        out = layout.cache.attention(self.layer, layout, q) if step else layout.attention(q, k, v)
        return self.wo(out.flatten(1))  # out (N, H, E)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """x (N, D) -> (N, D): attention and feed-forward, each normalized before and added to x."""

    def __init__(self, args, layer):
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, layout):
        x = x + self.dropout(self.attention(self.attention_norm(x), layout))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """The Llama language model. `model(tokens)` returns logits, `model(tokens, targets)` the mean
    cross-entropy in nats over the targets that are not -1. `hidden` lists the shapes of tokens."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(TransformerBlock(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tied:
            self.tok_embeddings.weight = self.output.weight
        angles = torch.outer(torch.arange(args.max_seq_len).float(), rope_frequencies(args))
        self.register_buffer("freqs_cos", angles.cos(), persistent=False)  # (max_seq_len, E/2)
        self.register_buffer("freqs_sin", angles.sin(), persistent=False)
        # With llama2.c's 0.02 layers of width 64 start nearly silent and learn less (doc/speed.md).
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[1]) if "layers." in name else 0.02)

    def hidden(self, tokens, lengths=None, cache=None, lower=None):
        """The forward pass up to the final norm: the input of the output layer and the value head.

        tokens   (B, T); or packed (N,) with `lengths`; or the next token (R,) of each cache row
        lengths  number of tokens of each packed sequence, a list with sum N; or its Layout
        cache    a KVCache; with `lengths` the sequences fill new rows of it
        lower    (n, x) if the output x (N, D) of the first n layers is known
        Returns (B, T, D), (N, D) or (R, D). Raises ValueError if a sequence exceeds max_seq_len."""
        layout = lengths if isinstance(lengths, Layout) else self.layout(tokens, lengths, cache)
        n, x = lower or (0, self.dropout(self.tok_embeddings(tokens.flatten())))  # (N, D)
        for layer in self.layers[n:]:
            x = layer(x, layout)
        return self.norm(x).view(*tokens.shape, self.args.dim)

    def layout(self, tokens, lengths=None, cache=None, multiple=1):
        """The Layout of a forward pass, which models with equal rotary embeddings can share. The
        rows of `cache` grow. Sequences of unequal lengths are padded to a `multiple` of tokens."""
        device, N, limit = tokens.device, tokens.numel(), self.args.max_seq_len
        T, ragged, starts, padded, rows, mask = 0, False, None, None, None, None
        if lengths is None and cache is not None:  # a generation step
            positions, rows = cache.length[:N].clone(), torch.arange(N, device=device)
            cache.length[:N] += 1
            seen = torch.arange(cache.k[0].shape[2], device=device) <= positions[:, None]  # (R, T)
            mask = torch.where(seen, 0.0, -math.inf).to(cache.k[0].dtype)[:, None, None]
        elif (T := tokens.shape[-1] if lengths is None else max([0, *lengths])) > limit:
            raise ValueError(f"a sequence of {T} tokens does not fit the model's {limit}")
        elif lengths is None:
            positions = torch.arange(T, device=device).repeat(len(tokens))
            starts = T * torch.arange(len(tokens) + 1, device=device)
        else:  # computed on the CPU, where the lengths are, and copied at once
            S, starts = len(lengths), torch.tensor([0, *lengths]).cumsum(0)
            rows = torch.arange(S).repeat_interleave(starts.diff(), output_size=N)
            positions, ragged = torch.arange(N) - starts[rows], N < S * T
            T = -(-T // multiple) * multiple if ragged else T
            parts = torch.cat([starts, positions, rows, positions + T * rows]).to(device)
            starts, positions, rows, padded = parts.split([S + 1, N, N, N])
            if cache is not None:
                rows = rows + cache.rows
                cache.length[cache.rows : cache.rows + S] = starts.diff()
                cache.rows += S
        cos, sin = self.freqs_cos[positions], self.freqs_sin[positions]
        return Layout(positions, cos, sin, starts, T, padded if ragged else None, cache, rows, mask)

    def forward(self, tokens, targets=None, lengths=None, cache=None):
        logits = self.output(self.hidden(tokens, lengths, cache))
        return logits if targets is None else self.loss(logits.flatten(0, -2), targets.flatten())

    def loss(self, logits, targets):
        """Mean cross-entropy over the targets (N,) that are not -1, of logits (N, V)."""
        return F.cross_entropy(logits.float(), targets, ignore_index=-1)

    def new_cache(self, batch, max_len):
        """An empty KVCache for `batch` sequences of up to `max_len` tokens."""
        weight, kind = self.output.weight, self.output.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(self.args, batch, max_len, dtype, weight.device)

    def sample_tokens(self, batch, steps):
        """Samples up to `steps` tokens per row of a Batch, in place; on a CPU until a row ends."""
        active = torch.ones_like(batch.prompt, dtype=torch.bool)  # (R,)
        for _ in range(steps):
            self.sample_step(batch, active)
            if active.is_cpu and not active.all():  # Python would wait for a GPU to know this
                break

    def sample_step(self, b, active):
        """Samples a token for each `active` row (R,) of a Batch, in place and with fixed shapes."""
        b.cache.length[: len(active)] -= (~active).long()
        logits, share = self(b.current, cache=b.cache), 1.0  # (R, V)
        if b.survival is not None:
            p = sampling_probabilities(logits, *b.sampling)[:, b.stop_ids].sum(-1)  # of an end
            b.survival[b.prompt] *= 1 - active * p
            over = b.survival[b.prompt] < 1
            ends = torch.zeros_like(logits, dtype=torch.bool).index_fill(1, b.stop_ids, True)
            logits = logits.masked_fill(ends != over[:, None], -math.inf)
            share = torch.where(over, p, 1 - p)
        at = b.prompt, b.lengths[b.prompt].clamp_max(b.tokens.shape[1] - 1)
        token, probability = choose_tokens(logits, b.uniform[at], *b.sampling)
        b.tokens[at] = torch.where(active, token, b.tokens[at])
        b.probabilities[at] = torch.where(active, probability * share, b.probabilities[at])
        b.lengths[b.prompt] += active
        b.current.copy_(torch.where(active, token, b.current))
        active &= ~b.ended()


class TransformerWithValueHead(Transformer):
    """A Transformer with a scalar head on its final hidden state: PPO's critic, or a reward model.
    The head starts at zero: the same value everywhere. It computes in fp32, also under autocast."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.value_head = nn.Linear(args.dim, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def values(self, hidden):  # (..., D) -> (...)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)


# ----------------------------------------------------------------------------
# generation


def sampling_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution (R, V) that tokens are sampled from: softmax(logits / temperature) over the
    top_k most likely tokens (0: all), of these the smallest set whose probability reaches top_p (0
    or 1: all, as in llama2.c; never less than the most likely token). temperature > 0."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if 0 < top_p < 1:
        ordered, index = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of more likely tokens
        outside = (before >= top_p).index_fill(-1, torch.tensor([0], device=logits.device), False)
        logits = logits.masked_fill(outside.scatter(-1, index, outside), -math.inf)
    return logits.softmax(-1)


def choose_tokens(logits, uniform, temperature, top_k, top_p):
    """The next token of each row and its probability, (R,) each, from logits (R, V): the most
    likely one if temperature is 0, else by inverse transform sampling from `uniform` (R,)."""
    if temperature == 0:
        distribution, token = logits.float().softmax(-1), logits.argmax(-1)
    else:
        distribution = sampling_probabilities(logits, temperature, top_k, top_p)
        mass = distribution.cumsum(-1)
        token = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)[:, 0]
        token = token.clamp_max(logits.shape[-1] - 1)  # rounding may lead beyond the sum
    return token, distribution.gather(1, token[:, None])[:, 0]


class Generation(NamedTuple):
    """The result of `generate` for n prompts."""

    tokens: torch.Tensor  # (n, max_new_tokens), -1 after a row's end
    lengths: torch.Tensor  # (n,) number of tokens, the end token included
    logprobs: torch.Tensor  # (n, max_new_tokens) as sampled (temperature 0: the model's), else 0
    ended: torch.Tensor  # (n,) True where a row has one of stop_ids

    def responses(self):
        """The generated ids as lists, each with its end token if it has one."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]


@dataclass
class Batch:
    """The state of `generate`: R rows of a KV cache that are being generated, for n prompts."""

    cache: KVCache  # its row r continues prompt number prompt[r]
    prompt: torch.Tensor  # (R,)
    current: torch.Tensor  # (R,) each row's newest token, which is not in the cache yet
    tokens: torch.Tensor  # (n, max_new_tokens) sampled so far, -1 elsewhere
    probabilities: torch.Tensor  # (n, max_new_tokens) of these tokens, 1 elsewhere
    lengths: torch.Tensor  # (n,) number of tokens sampled so far
    limits: torch.Tensor  # (n,) number of tokens that max_new_tokens and the context allow
    uniform: torch.Tensor  # (n, max_new_tokens) a random number in [0, 1) for each token
    stop_ids: torch.Tensor  # (number of ids,)
    sampling: tuple  # temperature, top_k, top_p
    survival: torch.Tensor = None  # (n,) the probability in `generate`, over survival_limit

    def stopped(self):
        """(R,) whether a row's newest token is one of stop_ids."""
        return torch.isin(self.current, self.stop_ids)

    def ended(self):
        """(R,) whether a row has stopped or reached its limit."""
        return self.stopped() | (self.lengths >= self.limits)[self.prompt]


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    *,
    stop_ids,
    uniform=None,
    max_batch=256,
    on_token=None,
    survival_limit=0.0,
):
    """Continues each of `prompts`, lists of token ids that may differ in length. Rows do not depend
    on each other: each has its own random numbers, and the next prompt takes its place when it has
    one of stop_ids or max_new_tokens tokens, or fills the model's context. temperature 0 is greedy.
    uniform    (n, max_new_tokens) random numbers in [0, 1); default: from PyTorch's generator
    max_batch  number of rows that are generated at a time
    on_token   on_token(row, token) is called for each token as soon as it is sampled
    survival_limit  if above 0, a row goes on without an end until the probability that none would
               have been sampled is below the limit; then it ends. Not with top_k or top_p
    Returns a Generation. Raises ValueError for a prompt that is empty or leaves no room."""
    device, context, n = model.output.weight.device, model.args.max_seq_len, len(prompts)
    if wrong := [len(p) for p in prompts if not 0 < len(p) < context]:
        raise ValueError(f"a prompt has {wrong[0]} tokens; the context holds 1 to {context - 1}")
    if uniform is None:
        uniform = (torch.rand if temperature > 0 else torch.zeros)(n, max_new_tokens)
    if uniform.shape != (n, max_new_tokens):
        raise ValueError(f"uniform must be {(n, max_new_tokens)}, not {tuple(uniform.shape)}")
    uniform = uniform.to(device, torch.float32).clamp(max=1 - 2**-24).contiguous()  # never 1.0
    max_batch, longest = min(max_batch, n), max(map(len, prompts), default=0)
    long = dict(dtype=torch.long, device=device)
    batch = Batch(
        cache=model.new_cache(max_batch, min(longest + max_new_tokens, context)),
        prompt=torch.empty(0, **long),
        current=torch.empty(0, **long),
        tokens=torch.full((n, max_new_tokens), -1, device=device),
        probabilities=torch.ones(n, max_new_tokens, device=device),
        lengths=torch.zeros(n, **long),
        limits=torch.tensor([min(max_new_tokens, context + 1 - len(p)) for p in prompts], **long),
        uniform=uniform,
        stop_ids=torch.tensor(sorted(stop_ids), **long),
        sampling=(temperature, top_k, top_p),
        survival=torch.full((n,), 1 / survival_limit, device=device) if survival_limit else None,
    )
    begun, was_training = 0, model.training  # begun: number of prompts that have been started
    model.eval()
    while max_new_tokens and (len(batch.prompt) or begun < n):
        free = max_batch - len(batch.prompt)
        if begun < n and (free >= max_batch / 8 or not len(batch.prompt)):
            new = prompts[begun : begun + free]
            tokens = torch.tensor([t for p in new for t in p[:-1]], **long)
            model.hidden(tokens, [len(p) - 1 for p in new], batch.cache)
            batch.prompt = torch.cat([batch.prompt, torch.arange(begun, begun + len(new), **long)])
            batch.current = torch.cat([batch.current, torch.tensor([p[-1] for p in new], **long)])
            begun += len(new)
        model.sample_tokens(batch, 1 if on_token else 32)  # then rows that have ended leave
        if on_token:
            for row, token in zip(batch.prompt.tolist(), batch.current.tolist()):
                on_token(row, token)
        order = batch.cache.keep(~batch.ended())
        batch.prompt, batch.current = batch.prompt[order], batch.current[order]
    model.train(was_training)
    ended = torch.isin(batch.tokens, batch.stop_ids).any(1)
    return Generation(batch.tokens, batch.lengths, batch.probabilities.log(), ended)
