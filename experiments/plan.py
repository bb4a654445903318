"""Memory per card, tokens/s and hours of a training run, computed before it: `train.py --plan`.

The memory is counted by running the forward pass on tensors without storage; arithmetic and links
are the makers' figures, or for --plan_gpu=cpu those measured on this machine.
"""

import math
import os
import weakref
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import CHUNK, LARGE_VOCABULARY, accelerate, library
from model import Transformer, TransformerWithValueHead
from report import flops_per_token, peak_matmul_flops

GPUS = {  # the makers' figures: dense bf16 FLOP/s, bytes of memory, bytes/s between GPUs
    "h200": (989e12, 141e9, 450e9),
    "h100": (989e12, 80e9, 450e9),
    "a100": (312e12, 80e9, 300e9),
    "4090": (165e12, 24e9, 32e9),
    "cpu": None,  # this machine, measured
}
NODE, NETWORK = 8, 50e9  # GPUs per node; bytes/s per GPU between nodes (400 Gb/s)
STATE_BYTES = 16  # per parameter: fp32 weight and gradient, AdamW's two moments


def saved_bytes(args, batch, seq_len, dtype, here=False):
    """Bytes that a forward pass of a Transformer saves for the backward pass: (in total, per layer,
    of a layer's input). They are counted in a forward pass on tensors without memory, as on a GPU;
    with `here`, in a real one on this CPU, for which kernels.c saves less."""
    totals = []
    for n_layers in (1, 2):
        with nullcontext() if here else FakeTensorMode():
            model, kept = accelerate(Transformer(replace(args, n_layers=n_layers))), {}
            weights = {p.untyped_storage()._cdata for p in model.parameters()}

            def keep(t, weights=weights, kept=kept):
                if t.untyped_storage()._cdata not in weights:
                    kept[t.untyped_storage()._cdata] = (
                        t  # kept alive, so that no other tensor gets its address
                    )
                return t

            tokens = torch.zeros(batch, seq_len, dtype=torch.long)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    model(tokens, tokens)
            totals.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    layer = totals[1] - totals[0]
    return totals[0] + (args.n_layers - 1) * layer, layer, 4 * batch * seq_len * args.dim


def plan(args, model_args):
    """Prints memory per card, tokens/s and time for 1 to 256 cards, with DDP (a full copy per card;
    activations recomputed with --checkpoint_activations) and with --fsdp (sharded state,
    activations recomputed). A step is one forward and backward pass of --batch_size sequences per
    card in --dtype. Arithmetic runs at --plan_mfu of the maker's figure. Communication overlaps
    with arithmetic, so that the slower of the two counts. --plan_gpu=cpu is this machine as one
    card, with the speed of a measured matrix product, as in a run's log. Returns rows (cards,
    "ddp" or "fsdp", bytes per card, tokens/s)."""
    cpu = args.plan_gpu == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
    if cpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak, room, link = peak_matmul_flops("cpu", dtype), memory, math.inf
    else:
        peak, room, link = GPUS[args.plan_gpu]
        peak = peak if dtype != torch.float32 else peak / 16  # without tensor cores
    with FakeTensorMode():
        model = Transformer(model_args)
        flops = flops_per_token(model, model_args.max_seq_len)
        P = sum(p.numel() for p in model.parameters())
        in_layer = sum(p.numel() for p in model.layers[0].parameters())
    B, T = args.batch_size, model_args.max_seq_len
    few = (
        min(B, 256 // T + 1) if cpu else B
    )  # run for real, and large enough for the kernels that B uses
    saved = saved_bytes(model_args, few, T, dtype, cpu)
    everything, layer, layer_input = (x * B / few for x in saved)
    # The backward pass begins with the gradients of log-probabilities and logits in fp32, (B, T, V)
    # or, with a large vocabulary, of a few tokens.
    native = cpu and dtype == torch.float32 and library() is not None
    rows = B * T if model_args.vocab_size < LARGE_VOCABULARY else min(B * T, CHUNK)
    everything += (4 if native else 8) * rows * model_args.vocab_size
    print(
        f"{P:,} parameters, {B} x {T} tokens per card and step, {str(dtype)[6:]}, "
        f"{args.plan_gpu} at {args.plan_mfu:.0%} of {peak / 1e12:,.3g} TFLOP/s"
    )
    print(
        f"{'cards':>6}{'':4}{'':4}{'GB/card':>10}{'card GB':>9}{'tokens/s':>14}"
        f"{'limited by':>12}{'hours per billion tokens':>25}"
    )
    # With activations that are computed again, those of one layer at a time exist.
    recomputed = everything - model_args.n_layers * (layer - layer_input) + layer
    rows = []
    for cards in (1,) if cpu else (1, 2, 4, 8, 16, 64, 256):
        wire = link if cards <= NODE else min(link, NETWORK)
        for kind in ("ddp", "fsdp") if cards > 1 else ("ddp",):
            recompute = kind == "fsdp" or args.checkpoint_activations
            activations, again = (recomputed, 4 / 3) if recompute else (everything, 1.0)
            if kind == "ddp":
                card_bytes = STATE_BYTES * P + activations
                moved = 2 * 4 * P  # ring all-reduce of fp32 gradients
            else:  # the embeddings and two layers at a time are unsharded, in dtype
                whole = P - max(model_args.n_layers - 2, 0) * in_layer
                whole *= 2 if dtype != torch.float32 else 4
                card_bytes = STATE_BYTES * P / cards + whole + activations
                moved = 2 * 2 * P + 4 * P  # weights twice, gradients once
            compute = B * T * flops * again / (peak * args.plan_mfu)
            network = moved * (cards - 1) / cards / wire
            rate = cards * B * T / max(compute, network)
            limit = "network" if network > compute else "compute"
            fits = "" if card_bytes < 0.92 * room else "  does not fit"
            rows.append((cards, kind, card_bytes, rate))
            print(
                f"{cards:6d}{'':4}{kind:4}{card_bytes / 1e9:10.2f}{room / 1e9:9.0f}{rate:14,.0f}"
                f"{limit:>12}{1e9 / rate / 3600:25.2f}{fits}"
            )
    return rows


# ----------------------------------------------------------------------------
# the other stages: memory alone


MODELS = {  # the shapes of published models
    "260k": dict(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, hidden_dim=172)
    | dict(max_seq_len=512),
    "15m": dict(dim=288, n_layers=6, n_heads=6, hidden_dim=768, max_seq_len=256),
    "110m": dict(dim=768, n_layers=12, n_heads=12, hidden_dim=2048, max_seq_len=1024),
    "smollm2-135m": dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=49152)
    | dict(hidden_dim=1536, max_seq_len=2048),
    "tinyllama-1.1b": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632)
    | dict(max_seq_len=2048, tied=False),
    "llama2-7b": dict(dim=4096, n_layers=32, n_heads=32, hidden_dim=11008, max_seq_len=4096)
    | dict(tied=False),
    "llama3-8b": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256)
    | dict(hidden_dim=14336, max_seq_len=8192, tied=False),
}


class Bytes(TorchDispatchMode):
    """A context that counts the bytes of the tensors that were created in it: those that exist
    (`now`) and the most that have existed at a time (`peak`)."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key)


def count(model, trained=True):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def stage_bytes(args, model_args, dtype, fsdp):
    """Peak bytes of fine-tuning, reward model, DPO or PPO: {phase: (on each card, divided among the
    cards)}. The optimizer step is counted in a forward and backward pass of the stage on tensors
    without memory. PPO also has the phase in which it generates the rollouts."""
    import ppo
    from preferences import token_logprobs
    from pretraining import checkpoint_activations
    from rlhf import ppo_config
    from sft import add_lora, freeze_layers

    T = min(args.plan_len or model_args.max_seq_len, model_args.max_seq_len)
    prompt = max(T - args.max_gen_len, 1) if args.ppo or args.dpo else 1
    half, V = dtype.itemsize, model_args.vocab_size
    shared = args.ppo and (args.value_model == "shared")

    def build(kind):
        return accelerate(kind(model_args))

    with FakeTensorMode(), Bytes() as memory:
        policy = build(TransformerWithValueHead if args.rm or shared else Transformer)
        if args.lora_rank:
            add_lora(policy, args.lora_rank, args.lora_alpha, 0.0, args.lora_layers)
        else:
            freeze_layers(policy, args.freeze_layers)
        critic = reference = reward = None
        if args.ppo and args.advantage == "gae" and not shared:
            critic = freeze_layers(build(TransformerWithValueHead), args.freeze_layers)
        if args.ppo or args.dpo:
            reference = build(Transformer).requires_grad_(False)
        if args.ppo and args.reward.endswith(".pt"):
            reward = build(TransformerWithValueHead).requires_grad_(False)
        models = [m for m in (policy, critic, reference, reward) if m is not None]
        state = {}  # of each model: bytes of weights and optimizer state
        for model in models:
            embedding = model.tok_embeddings.weight
            bytes_of = 12 * count(model)  # fp32 weight, AdamW's two moments; gradients are below
            for p in model.parameters():
                if not p.requires_grad:  # halve_frozen
                    fp32 = p.dim() < 2 or p is embedding or fsdp and model is not reward
                    bytes_of += p.numel() * (4 if fp32 else half)
                    p.data = p.data if fp32 or fsdp else p.data.to(dtype)
            state[model] = bytes_of
        if args.lora_rank and args.ppo and not (fsdp or args.offload or args.ref_device):
            state[reference] = 0  # it is the policy without its adapters
        elif args.ppo and args.ref_device and not fsdp:
            state[reference] = 0  # it is on another card
        if args.lora_rank and args.sft and args.lora_4bit:
            adapted = [m.weight for m in policy.modules() if hasattr(m, "lora_a")]
            saved = sum(w.numel() for w in adapted) * (half - 0.5 - 4 / 64)
            state[policy] -= saved - half * max(w.numel() for w in adapted)  # one is dequantized
        if args.checkpoint_activations or fsdp:
            for model in filter(None, (policy, critic)):
                checkpoint_activations(model)
        gathered = 0
        if fsdp:  # of each sharded model the embeddings and two layers are whole, and no gradients
            for model in (m for m in models if m is not reward):
                outside = count(model, False) - model_args.n_layers * count(model.layers[0], False)
                gathered += half * (outside + 2 * count(model.layers[0], False))
                for p in model.parameters():
                    if p.requires_grad:
                        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        before = memory.peak = memory.now

        def autocast():
            return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

        B = args.batch_size * (2 if args.rm or args.dpo else 1)
        A = B * (T - prompt)  # tokens of the responses
        batch = ppo.Minibatch(
            torch.ones(B * (T - 1), dtype=torch.long),
            *torch.ones(2, A, dtype=torch.long),
            lengths=[T - 1] * B,
            counts=torch.full((B,), T - prompt),
        )
        if args.ppo:
            config, three = replace(ppo_config(args), ptx_coef=0), (policy, reference, critic)
            apart = args.lora_rank or fsdp or args.offload or args.ref_device
            apart = apart or args.value_model not in ("separate", "shared")
            common = dict(common_layers=0 if apart else args.freeze_layers)
            trainer = ppo.PPOTrainer(config, *three, None, None, autocast, stop_ids=(1,), **common)
            if trainer.common_layers:
                batch.lower = torch.zeros(B * (T - 1), model_args.dim)
            batch.ref_hidden = torch.zeros(A, model_args.dim, dtype=dtype)
            names = "old_logprobs ref_logprobs values advantages returns end_probability"
            for name in (names + " end_advantages").split():
                setattr(batch, name, torch.zeros(A))
            batch.end_logprobs = torch.zeros(A, 1)
            loss, _ = trainer.loss(batch, torch.ones(A), 0.1, train_policy=True)
        else:
            with autocast():
                if args.rm:
                    hidden = policy.hidden(batch.tokens, batch.lengths)
                    loss = policy.values(hidden[batch.state_ends[:B]]).sum()
                elif args.dpo or V >= LARGE_VOCABULARY:  # the chunks are those of SFT
                    if args.dpo:
                        with torch.no_grad():
                            token_logprobs(reference, batch)
                    loss = token_logprobs(policy, batch).sum()
                else:
                    loss = policy(batch.tokens, batch.tokens, batch.lengths)
        loss.backward()
    parts = [model for model in models if fsdp and model is not reward]  # sharded
    whole = [model for model in models if model not in parts]
    unused = [reward] if args.offload else []  # in CPU memory during an optimizer step
    shards = sum(state[m] for m in parts)
    step = sum(state[m] for m in whole if m not in unused) + gathered + memory.peak - before
    peaks = {"an optimizer step": (step, shards)}
    if args.ppo:
        rollouts = args.rollouts or 8 * args.batch_size
        hidden = (T - prompt) * half + (T - 1) * 4 * bool(trainer.common_layers)
        shards += rollouts * hidden * model_args.dim  # ref_hidden and lower of all rollouts
        peaks["an optimizer step"] = step, shards
        unused += [reference] if args.offload and not fsdp else []
        rows = min(512, args.rollouts or 8 * args.batch_size)
        a, held = model_args, sum(state[m] for m in whole if m not in unused)
        cache = 2 * a.n_layers * rows * T * a.n_kv_heads * a.head_dim * half
        held += cache
        if args.compile is not False and not fsdp:  # compiled generation keeps its cache
            peaks["an optimizer step"] = step + cache, shards
        held += rows * V * (half + 4 * 3)  # logits, probabilities and their sums
        held += half * count(policy, trained=False) if fsdp else 0  # gathered
        peaks["the rollouts"] = held, shards
    return peaks


def plan_stage(args, model_args):
    """Prints the memory per card that a stage other than pretraining needs, for 1 to 8 cards, and
    the GPUs that have it. All samples have --plan_len tokens, the most that they can have by
    default. Returns rows (cards, "ddp" or "fsdp", bytes per card)."""
    dtype = getattr(torch, args.dtype or "bfloat16")
    with FakeTensorMode():
        P = count(Transformer(model_args), trained=False)
    T = min(args.plan_len or model_args.max_seq_len, model_args.max_seq_len)
    print(f"{P:,} parameters, {args.batch_size} x {T} tokens per forward pass, {str(dtype)[6:]}")
    print(f"{'cards':>6}{'':4}{'':4}{'GB/card':>10}  {'most in':18}  fits")
    rows, sizes = [], {gpu: figures[1] for gpu, figures in GPUS.items() if figures}
    for kind, numbers in ("ddp", [1]), ("fsdp", [2, 4, 8]):
        peaks = stage_bytes(args, model_args, dtype, kind == "fsdp")
        for cards in numbers:
            size, phase = max(
                (whole + parts / cards, name) for name, (whole, parts) in peaks.items()
            )
            fits = [f"{gpu} ({n / 1e9:.0f})" for gpu, n in sizes.items() if size < 0.92 * n]
            rows.append((cards, kind, size))
            print(
                f"{cards:6d}{'':4}{kind:4}{size / 1e9:10.2f}  {phase:18}  "
                f"{', '.join(fits) or 'none'}"
            )
    return rows
