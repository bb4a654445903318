"""A Llama in one file: the Transformer, its KV cache, and `generate`.

Parameter names, shapes and maths are those of llama2.c, so that the published tinyllamas
checkpoints load here and ours load there. There is one forward pass, `Transformer.hidden`, used by
pretraining, PPO, scoring and generation. It takes tokens in one of three shapes:

    dense   (B, T)                    B sequences of equal length: pretraining
    packed  (N,) and their lengths    ragged sequences one after the other, no padding: PPO
    cached  (B,) and a KVCache        the next token of each of B sequences: generation

Letters in the comments: B batch, T time, N packed tokens, D dim, H heads, K kv heads, E head dim,
V vocabulary, L layers.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels

BOS_ID, EOS_ID = 1, 2


# ----------------------------------------------------------------------------
# the model


@dataclass
class ModelArgs:
    """The numbers that define a model. Defaults are those of llama2.c (Llama 7B)."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: Optional[int] = None  # None: as many as n_heads
    vocab_size: int = 32000
    hidden_dim: Optional[int] = None  # None: 8/3 of dim, rounded up to multiple_of
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    dropout: float = 0.0
    rope_theta: float = 10000.0
    tied: bool = True  # the classifier is the embedding
    rope_scaling: Optional[dict] = None  # see rope_frequencies

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if name == "hidden_dim" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= largest:
                range_ = "at least 1" if value == 0 else f"a whole number from 1 to {largest}"
                raise ValueError(f"{name} must be {range_}, not {value!r}")
        for name, largest in ("norm_eps", 1), ("rope_theta", 1e30), ("dropout", 1):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < largest:
                raise ValueError(f"{name} must be in [0, {largest}), not {value!r}")
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(
                f"dim ({self.dim}) must be an even multiple of n_heads ({self.n_heads})"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def ffn_dim(self):
        """Width of the feed-forward layer: hidden_dim, or Llama's rule."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return -(-int(2 * (4 * self.dim) / 3) // self.multiple_of) * self.multiple_of


LARGEST = {  # run.c has the same limits
    "dim": 1 << 16,
    "n_layers": 1 << 10,
    "n_heads": 1 << 14,
    "n_kv_heads": 1 << 14,
    "vocab_size": 1 << 22,
    "hidden_dim": 1 << 20,
    "multiple_of": 1 << 20,
    "max_seq_len": 1 << 22,
}
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")


def check_rope_scaling(scaling):
    """Raises ValueError unless it is {"factor": f} (linear) or has the four of LLAMA3_SCALING."""
    if not isinstance(scaling, dict) or set(scaling) not in ({"factor"}, set(LLAMA3_SCALING)):
        raise ValueError(
            f"rope_scaling needs factor, or {', '.join(LLAMA3_SCALING)}: not {scaling}"
        )
    for name, value in scaling.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"rope_scaling: {name} must be a positive number, not {value!r}")
    if len(scaling) > 1 and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor must be below high_freq_factor")


def rope_frequencies(args):
    """Radians a position by which each pair of a head turns: theta^(-2i / E), (E/2,).

    A model whose context was lengthened after pretraining has rope_scaling. {"factor": f} divides
    all frequencies by f (Chen et al., 2023). With Llama 3's four numbers only the slow ones are:
    pairs that make more than high_freq_factor turns in the original context keep their frequency,
    those that make fewer than low_freq_factor are divided, in between it goes over linearly."""
    exponents = torch.arange(0, args.head_dim, 2).float() / args.head_dim
    freqs = args.rope_theta**-exponents
    s = args.rope_scaling
    if s is None:
        return freqs
    if len(s) == 1:
        return freqs / s["factor"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_seq_len"] * freqs / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / s["factor"])


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 whatever the input (Zhang and Sennrich, 2019)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return kernels.rms_norm(x.float(), self.weight.float(), self.eps).type_as(x)


class Linear(nn.Linear):
    """nn.Linear without bias, whose product is kernels.py's."""

    def forward(self, x):
        return kernels.multiply(x, self.weight)


def layer_is_native(x, norm, parts):
    """Whether kernels.py has, as one function, a norm of x and the linear layers that follow it."""
    if not all(type(w) is Linear for w in parts):  # adapters
        return False
    return kernels.native_layer(x, norm.weight, *(w.weight for w in parts))


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads. Rotary embeddings and the
    softmax happen in `attend`, which knows how the sequences lie in memory."""

    def __init__(self, args):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, norm, attend):
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.products(x, norm))
        return self.wo(attend(q, k, v).flatten(-2))  # (..., H, E) -> (..., D)

    def products(self, x, norm):
        parts = self.wq, self.wk, self.wv
        if layer_is_native(x, norm, parts):
            return kernels.NormQKV.apply(x, norm.weight, *(w.weight for w in parts), norm.eps)
        x = norm(x)
        return [w(x) for w in parts]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020) of the normalized x: w2(silu(w1 n) * w3 n)."""

    def __init__(self, args):
        super().__init__()
        self.w1 = Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x, norm):
        parts = self.w1, self.w2, self.w3
        if layer_is_native(x, norm, parts):
            return kernels.FeedForward.apply(x, norm.weight, *(w.weight for w in parts), norm.eps)
        x = norm(x)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, attend):
        x = x + self.dropout(self.attention(x, self.attention_norm, attend))
        return x + self.dropout(self.feed_forward(x, self.ffn_norm))


class Transformer(nn.Module):
    """The Llama language model.

    `model(tokens)` gives logits, `model(tokens, targets)` the mean cross-entropy in nats over the
    targets that are not -1; see `hidden` for the shapes of tokens.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size, bias=False)
        if args.tied:
            self.tok_embeddings.weight = self.output.weight
        angles = torch.outer(torch.arange(args.max_seq_len).float(), rope_frequencies(args))
        self.register_buffer("freqs_cos", angles.cos(), persistent=False)  # (max_seq_len, E/2)
        self.register_buffer("freqs_sin", angles.sin(), persistent=False)
        # By the number of inputs: llama2.c's 0.02 suits wide models, but in one of width 64 the layers
        # begin nearly silent, and learn less from the same text (doc/speed.md).
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.5 / math.sqrt(p.shape[1]) if name.startswith("layers.") else 0.02
                )

    def hidden(self, tokens, lengths=None, cache=None):
        """The forward pass up to the final norm: what the classifier and the value head read.

        tokens   (B, T), or packed (N,) with `lengths`, or with `cache` alone the next token (B,)
        lengths  of the packed sequences, a list with sum N, each at most max_seq_len
        cache    a KVCache; with `lengths` it is filled from empty rows, else it grows by a token
        Returns (B, T, D), (N, D) or (B, D). Raises ValueError if a sequence exceeds max_seq_len.
        """
        cos, sin = self.freqs_cos, self.freqs_sin
        longest = max(lengths, default=0) if lengths is not None else tokens.shape[-1]
        if (lengths is not None or cache is None) and longest > self.args.max_seq_len:
            raise ValueError(
                f"a sequence of {longest} tokens does not fit the model's {self.args.max_seq_len}"
            )
        if lengths is not None:
            attend = packed_attention(lengths, cos, sin)
        elif cache is not None:
            attend = None
        else:
            attend = functools.partial(dense_attention, cos=cos, sin=sin)
        x = self.dropout(self.tok_embeddings(tokens))
        if lengths is None and cache is not None and cache.native:
            x = cache.decode(x, cos, sin)
            cache.advance()
            return self.norm(x)
        for i, layer in enumerate(self.layers):
            if cache is None:
                x = layer(x, attend)
            elif lengths is None:
                x = layer(x, functools.partial(cache.step, i, cos, sin))
            else:
                x = layer(x, functools.partial(cache.prefill, i, lengths, attend, cos, sin))
        if cache is not None:
            cache.advance(lengths)
        return self.norm(x)

    def forward(self, tokens, targets=None, lengths=None, cache=None):
        logits = self.output(self.hidden(tokens, lengths, cache))
        if targets is None:
            return logits
        logits, targets = logits.flatten(0, -2), targets.flatten()
        if kernels.native(logits):
            return -kernels.TokenTerms.apply(logits, targets)[0].sum() / (targets != -1).sum()
        return F.cross_entropy(logits.float(), targets, ignore_index=-1)

    def flops_per_token(self, seq_len):
        """Floating-point operations of forward and backward for one token (PaLM, appendix B)."""
        a = self.args
        weights = sum(p.numel() for p in self.parameters())
        return 6 * weights + 12 * a.n_layers * a.dim * seq_len


class TransformerWithValueHead(Transformer):
    """A Transformer with a scalar head on its final hidden state: the critic of PPO, or a reward
    model. The head starts at zero, so that an untrained critic predicts no advantage anywhere."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.value_head = nn.Linear(args.dim, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def values(self, hidden):
        """hidden (..., D) -> (...) in fp32"""
        return self.value_head(hidden).squeeze(-1).float()


# ----------------------------------------------------------------------------
# attention, for each way that sequences lie in memory


def apply_rope(x, cos, sin):
    """Rotates the pairs (x0, x1), (x2, x3), ... of x (..., heads, E) by their position's angles
    cos, sin (..., E/2): rotary position embeddings (Su et al., 2021), interleaved as in llama2.c."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def dense_attention(q, k, v, cos, sin):
    """q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E), causal."""
    B, T, H, E = q.shape
    if kernels.native_attention(q):
        starts = torch.arange(0, B * T + 1, T)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return kernels.Attention.apply(q, k, v, starts, cos, sin).view(B, T, H, E)
    q, k = (apply_rope(x, cos[:T], sin[:T]) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, E)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def packed_attention(lengths, cos, sin):
    """The attend function of packed sequences: q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    B, T = len(lengths), max(lengths, default=0)

    def attend(q, k, v):
        if kernels.native_attention(q):
            return kernels.Attention.apply(q, k, v, starts, cos, sin)
        # Padding on the right is after everything in the causal order, so it changes no number.
        at = padded_index(lengths, T).to(q.device)  # (N,) into B * T
        q, k, v = (x.new_zeros(B * T, *x.shape[1:]).index_copy(0, at, x) for x in (q, k, v))
        out = dense_attention(*(x.unflatten(0, (B, T)) for x in (q, k, v)), cos, sin)
        return out.flatten(0, 1)[at]

    return attend


def padded_index(lengths, T):
    """Where packed tokens lie in a padded (B * T,): [2, 1], T=3 -> [0, 1, 3]."""
    return torch.cat([torch.arange(n) + b * T for b, n in enumerate(lengths)])


class KVCache:
    """Rotated keys and values of the first `rows` of B sequences that grow by one token a step.

    k, v    (L, B, K, T, E), or where kernels.c runs (L, B, K, T / W, E, W): blocks of as many tokens
            W as its vectors are wide
    length  (B,) tokens held by each row; rows may differ
    """

    def __init__(self, model, batch, max_len):
        a, weight = model.args, model.output.weight
        self.native = kernels.native_attention(weight.new_empty(0, 1, a.head_dim))
        self.width = kernels.library().attention_lanes() if self.native else 1
        self.capacity = -(-max_len // self.width) * self.width
        blocks = self.capacity // self.width, a.head_dim, self.width
        last = blocks if self.native else (self.capacity, a.head_dim)
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        self.k, self.v = (
            torch.zeros(a.n_layers, batch, a.n_kv_heads, *last, dtype=dtype, device=weight.device)
            for _ in "kv"
        )
        self.length = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.rows = 0
        self.weights = kernels.decode_weights(model) if self.native else None
        sizes = a.n_layers, a.ffn_dim, a.n_heads, a.n_kv_heads, a.head_dim, self.capacity
        self.sizes = batch, *sizes, float(a.norm_eps)  # as kernels.c wants them

    def prefill(self, layer, lengths, attend, cos, sin, q, k, v):
        """Appends len(lengths) new rows, packed, and attends within each."""
        new = self.rows + torch.repeat_interleave(torch.tensor(lengths))
        pos = torch.cat([torch.arange(n) for n in lengths])
        new, pos = new.to(q.device), pos.to(q.device)
        for store, x in (self.k, apply_rope(k, cos[pos], sin[pos])), (self.v, v):
            if self.native:
                store[layer][new, :, pos // self.width, :, pos % self.width] = x  # (N, K, E)
            else:
                store[layer][new, :, pos] = x.to(store.dtype)
        return attend(q, k, v)

    def step(self, layer, cos, sin, q, k, v):
        """q (B, H, E), k and v (B, K, E) of the next token of every row -> (B, H, E)"""
        B, H, E = q.shape
        keys, values = self.k[layer, :B], self.v[layer, :B]
        pos = self.length[:B]
        q, k = (apply_rope(x, cos[pos], sin[pos]) for x in (q, k))
        row = torch.arange(B, device=q.device)
        keys[row, :, pos], values[row, :, pos] = k.to(keys.dtype), v.to(keys.dtype)
        mask = torch.arange(self.capacity, device=q.device) <= pos[:, None]  # (B, T)
        gqa = H != keys.shape[1]
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, attn_mask=mask[:, None, None], enable_gqa=gqa
        )
        return out.squeeze(2)

    def decode(self, x, cos, sin):
        """What all layers make of x (B, D), the next token of every row; where kernels.c runs."""
        x = x.clone(memory_format=torch.contiguous_format)
        args = self.k, self.v, self.length, self.weights, cos, sin
        kernels.call("decode_hidden", x, *args, len(x), *self.sizes)
        return x

    def draw(
        self,
        model,
        steps,
        tokens,
        probabilities,
        lengths,
        current,
        uniform,
        row,
        stops,
        temperature,
    ):
        """Draws up to `steps` tokens for every row, in place, and appends all but each row's newest to
        the cache; the tensors are generate's. Where kernels.c runs, and no token is cut off. LANES
        rows stay in the processor's cache for all steps: twice as fast as a step of all rows each."""
        args = (
            tokens,
            probabilities,
            lengths,
            current,
            self.length,
            uniform,
            row,
            stops,
            self.k,
            self.v,
        )
        weights = model.tok_embeddings.weight, self.weights, model.norm.weight, model.output.weight
        angles = model.freqs_cos, model.freqs_sin
        sizes = (
            len(row),
            steps,
            tokens.shape[1],
            len(stops),
            model.args.max_seq_len,
            len(weights[-1]),
        )
        kernels.call(
            "decode_tokens", *args, *weights, *angles, *sizes, *self.sizes, float(temperature)
        )

    def advance(self, lengths=None):
        """After a forward pass: `lengths` is that of a prefill, None that of a step."""
        if lengths is None:
            self.length[: self.rows] += 1
        else:
            new = slice(self.rows, self.rows + len(lengths))
            self.length[new] = torch.tensor(lengths, device=self.length.device)
            self.rows += len(lengths)

    def drop(self, alive):
        """Keeps the rows where alive (rows,) is True. Only as many rows are copied as leave: the
        last ones move into the holes. Returns (rows,) -> which old row is now at each new place."""
        n = int(alive.sum())
        order = torch.arange(n, device=alive.device)
        holes = (~alive[:n]).nonzero().squeeze(1)
        movers = n + alive[n:].nonzero().squeeze(1)
        order[holes] = movers
        for x in (self.k, self.v):
            x[:, holes] = x[:, movers]
        self.length[holes] = self.length[movers]
        self.rows = n
        return order


# ----------------------------------------------------------------------------
# generation


def sampling_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (B, V) that tokens are drawn with: logits / temperature, cut to the top_k most
    likely (0: all) and to the smallest set with probability above top_p (0 or 1: all, as in llama2.c),
    the most likely token always in it; normalised. temperature > 0."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if 0 < top_p < 1:
        ordered, index = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of likelier tokens
        outside = (before >= top_p).index_fill(-1, torch.tensor([0], device=logits.device), False)
        logits = logits.masked_fill(outside.scatter(-1, index, outside), -math.inf)
    return logits.softmax(-1)


class Generation(NamedTuple):
    """tokens (B, max_new_tokens) with -1 after each row's end, lengths (B,) counting the end token,
    logprobs (B, max_new_tokens) of each token in the distribution it was drawn from (greedy: in the
    model's), 0 after the end; ended (B,) True where the row stopped by itself."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    logprobs: torch.Tensor
    ended: torch.Tensor

    def responses(self):
        """The generated ids as lists, each with its end token if it has one."""
        lengths = self.lengths.tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths)]


def draw(
    model,
    cache,
    steps,
    tokens,
    probabilities,
    lengths,
    current,
    uniform,
    row,
    stops,
    temperature,
    top_k,
    top_p,
):
    """KVCache.draw for every device and all ways of sampling, in place, on the tensors of generate. A row
    that has ended runs along with the others, unseen, until the steps are over: nothing here waits for
    an answer of the device."""
    alive = torch.ones_like(row, dtype=torch.bool)  # (A,)
    for _ in range(steps):
        cache.length[: len(row)] -= (~alive).long()  # those write over their last place again
        logits = model(current, cache=cache)  # (A, V)
        at = lengths[row].clamp_max(tokens.shape[1] - 1)
        if temperature == 0:
            distribution = logits.float().softmax(-1)
            drawn = logits.argmax(-1)
        else:
            distribution = sampling_probabilities(logits, temperature, top_k, top_p)
            # Inverse of the distribution function; the last token of positive probability catches
            # a number that rounding left above the sum.
            mass = distribution.cumsum(-1)
            drawn = torch.searchsorted(mass, uniform[row, at, None] * mass[:, -1:], right=True)
            drawn = drawn.squeeze(1).clamp_max(logits.shape[-1] - 1)
        probability = distribution.gather(1, drawn[:, None]).squeeze(1)
        tokens[row, at] = torch.where(alive, drawn, tokens[row, at])
        probabilities[row, at] = torch.where(alive, probability, probabilities[row, at])
        lengths[row] += alive
        current.copy_(torch.where(alive, drawn, current))
        full = (lengths[row] >= tokens.shape[1]) | (
            cache.length[: len(row)] >= model.args.max_seq_len
        )
        alive &= ~(torch.isin(current, stops) | full)


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_ids=(BOS_ID, EOS_ID),
    uniform=None,
    max_batch=256,
    on_token=None,
    ahead=0,
):
    """Continues each of `prompts`, lists of token ids that may differ in length.

    Rows are independent: each has its own random numbers, so its text does not depend on the rows
    beside it, and each leaves the batch when it has drawn one of stop_ids, max_new_tokens tokens,
    or filled the model's context; the next prompt takes its place, at most max_batch at a time.
    temperature 0 is greedy. `uniform` (B, max_new_tokens) are the random numbers in [0, 1), drawn
    from PyTorch's default generator if not given. on_token(row, token) is called for each token.
    ahead: how many tokens are drawn before rows that have ended are looked for; 0: what is fast here.
    Returns a Generation. Raises ValueError for an empty prompt or one that leaves no room.
    """
    device, context = model.output.weight.device, model.args.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens; the model's context holds 1 to {context - 1} "
                "and one more to generate"
            )
    n = len(prompts)
    tokens = torch.full((n, max_new_tokens), -1, device=device)
    probabilities = torch.ones(n, max_new_tokens, device=device)  # of the drawn tokens
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    ended = torch.zeros(n, dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    if uniform is None and temperature > 0:  # drawn before any row is known to end
        uniform = torch.rand(n, max_new_tokens)
    if uniform is not None:
        if uniform.shape != tokens.shape:
            raise ValueError(f"uniform must be {tuple(tokens.shape)}, not {tuple(uniform.shape)}")
        below_1 = 1 - 2**-24  # what a double nearer to 1 would not be
        uniform = uniform.to(device, torch.float32).clamp(max=below_1).contiguous()
    was_training = model.training
    model.eval()
    longest = max((len(p) for p in prompts), default=0) + max_new_tokens
    batch = min(max_batch, n)
    cache = KVCache(model, batch, min(longest, context))
    uncut = temperature > 0 and not 0 < top_k < model.args.vocab_size and not 0 < top_p < 1
    # Where it costs to see which rows have ended, it is looked up every 32 tokens: a call of kernels.c
    # has to return, a GPU would wait for Python.
    steps = (
        1 if on_token else ahead or (32 if device.type != "cpu" or uncut and cache.native else 1)
    )
    row = torch.empty(
        0, dtype=torch.long, device=device
    )  # (A,) which prompt each cache row continues
    current = row  # (A,) the newest token of each, not yet in the cache
    waiting = 0  # prompts[waiting:] have not started
    while max_new_tokens and (len(row) or waiting < n):
        free = batch - len(row)
        if waiting < n and (free >= batch / 8 or not len(row)):
            new = prompts[waiting : waiting + free]
            head = [t for p in new for t in p[:-1]]
            model.hidden(
                torch.tensor(head, dtype=torch.long, device=device),
                [len(p) - 1 for p in new],
                cache,
            )
            row = torch.cat([row, torch.arange(waiting, waiting + len(new), device=device)])
            current = torch.cat([current, torch.tensor([p[-1] for p in new], device=device)])
            waiting += len(new)
        text = tokens, probabilities, lengths, current
        if uncut and cache.native:
            cache.draw(model, steps, *text, uniform, row, stops, temperature)
        else:
            draw(model, cache, steps, *text, uniform, row, stops, temperature, top_k, top_p)
        if on_token is not None:
            for r, token in zip(row.tolist(), current.tolist()):
                on_token(r, token)
        stopped = torch.isin(current, stops)
        ended[row] = stopped
        full = (lengths[row] >= max_new_tokens) | (cache.length[: len(row)] >= context)
        alive = ~(stopped | full)
        if not alive.all():
            order = cache.drop(alive)
            row, current = row[order], current[order]
    model.train(was_training)
    return Generation(tokens, lengths, probabilities.log(), ended)
