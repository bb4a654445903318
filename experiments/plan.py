"""Memory per card, tokens/s and hours of a training run, computed before it: `train.py --plan`.

The memory is counted by running the forward pass on tensors without storage; arithmetic and links
are the makers' figures, or for --plan_gpu=cpu those measured on this machine.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import CHUNK, LARGE_VOCABULARY, accelerate, library
from model import Transformer
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
    """Prints memory per card, tokens/s and time for 1 to 256 cards, with DDP (a full copy per card)
    and with --fsdp (sharded state, activations recomputed). A step is one forward and backward pass
    of --batch_size sequences per card in --dtype. Arithmetic runs at --plan_mfu of the maker's
    figure. Communication overlaps with it, so that the slower of the two counts. --plan_gpu=cpu is
    this machine as one card, with the speed of a measured matrix product, as in a run's log.
    Returns rows (cards, "ddp" or "fsdp", bytes per card, tokens/s)."""
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
        flops = flops_per_token(model, args.max_seq_len)
        P = sum(p.numel() for p in model.parameters())
        in_layer = sum(p.numel() for p in model.layers[0].parameters())
    B, T = args.batch_size, args.max_seq_len
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
        f"{'cards':>6}{'':4}{'':4}{'GB/card':>10}{'of':>5}{'tokens/s':>14}"
        f"{'waits for':>11}{'hours per billion tokens':>25}"
    )
    rows = []
    for cards in (1,) if cpu else (1, 2, 4, 8, 16, 64, 256):
        wire = link if cards <= NODE else min(link, NETWORK)
        for kind in ("ddp", "fsdp") if cards > 1 else ("ddp",):
            if kind == "ddp":
                card_bytes = STATE_BYTES * P + everything
                moved, again = 2 * 4 * P, 1.0  # ring all-reduce of fp32 gradients
            else:  # the embeddings and two layers at a time are unsharded, in dtype
                activations = everything - model_args.n_layers * (layer - layer_input) + layer
                whole = P - max(model_args.n_layers - 2, 0) * in_layer
                whole *= 2 if dtype != torch.float32 else 4
                card_bytes = STATE_BYTES * P / cards + whole + activations
                moved, again = 2 * 2 * P + 4 * P, 4 / 3  # weights twice, gradients once
            compute = B * T * flops * again / (peak * args.plan_mfu)
            network = moved * (cards - 1) / cards / wire
            rate = cards * B * T / max(compute, network)
            waits = "network" if network > compute else "compute"
            fits = "" if card_bytes < 0.92 * room else "  does not fit"
            rows.append((cards, kind, card_bytes, rate))
            print(
                f"{cards:6d}{'':4}{kind:4}{card_bytes / 1e9:10.2f}{room / 1e9:5.0f}{rate:14,.0f}"
                f"{waits:>11}{1e9 / rate / 3600:25.2f}{fits}"
            )
    return rows
