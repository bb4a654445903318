"""What a person and a program see of a run: log, progress bar, closing report, curves; and, before
a run, what it would need (--plan)."""

import json
import math
import os
import textwrap
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from kernels import library, multiply
from model import Transformer
from tokenizer import write_atomic


def plain_config(args):
    return {k: v for k, v in vars(args).items() if k not in ("given", "kept")}


class Log:
    """One JSON object an iteration into a file, the same scalars to TensorBoard and Weights &
    Biases where asked for, a progress bar and lines on the terminal. Silent but on rank 0."""

    def __init__(self, args, name, first, resumed, rank):
        self.master, self.path = rank == 0, Path(args.out_dir) / name
        self.file = self.board = self.wandb = None
        self.steps, self.last, self.pace = 0, 0.0, 0.0  # how many, the last one's end, mean seconds
        quiet = None if self.master else True  # None: shown on a terminal only
        self.bar = tqdm(total=args.max_iters - first, unit="it", disable=quiet,
                        dynamic_ncols=True, smoothing=0.05, leave=False)  # fmt: skip
        if not self.master:
            return
        kept = []  # a resumed run continues its log, without the iterations that it does again
        if resumed and self.path.exists():
            for line in self.path.read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                    if json.loads(line)["iter"] < first:
                        kept.append(line + "\n")
        with write_atomic(self.path, "w") as f:
            f.writelines(kept)
        self.file = open(self.path, "a")
        try:
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(args.out_dir)
            if args.wandb_log:
                import wandb

                self.wandb = wandb.init(project=args.wandb_project, name=args.wandb_run_name,
                                        config=plain_config(args))  # fmt: skip
        except ImportError as e:
            raise ValueError(f"{e}: pip install tensorboard, or wandb for --wandb_log") from None

    def scalars(self, iteration, stats):
        if not self.master:
            return
        stats = {k: v if math.isfinite(v) else None for k, v in stats.items()}  # JSON has no NaN
        try:
            self.file.write(json.dumps({"iter": iteration, **stats}) + "\n")
            self.file.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None
        for k, v in stats.items():
            if self.board and v is not None:
                self.board.add_scalar(k, v, iteration)
        if self.wandb:
            self.wandb.log({"iter": iteration, **stats}, step=iteration)

    def text(self, iteration, name, text):
        if self.board:
            self.board.add_text(name, text.replace("\n", "  \n"), iteration)

    def line(self, text):
        if self.master:
            self.bar.clear()
            print(text, flush=True)

    def left(self, steps):
        """After a step: how long `steps` more will take, evaluations between them included, for its line.
        Nobody knows after the first, which warms up; of the others the last 50 count most."""
        self.steps += 1
        now = time.perf_counter()
        if self.steps > 1:
            self.pace += (now - self.last - self.pace) / min(self.steps - 1, 50)
        self.last = now
        return f" | left {timedelta(seconds=round(self.pace * steps))}" if self.steps > 1 else ""

    def close(self):
        self.bar.close()
        for x in filter(None, (self.file, self.board)):
            with suppress(OSError):
                x.close()


def matmul_roof(device, dtype):
    """Measured operations a second of a large matrix product: what MFU is held against."""
    # A GPU takes many products at a time: to start one and to wait for it costs as much as itself.
    n, times, tries = (4096, 20, 4) if device.startswith("cuda") else (1024, 1, 20)
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(tries):
        t = time.perf_counter()
        for _ in range(times):
            product = multiply(a, a)  # as the model multiplies
        product[0, 0].item()  # waits for the device
        best = min(best, (time.perf_counter() - t) / times)
    return 2 * n**3 / best


def print_report(found):
    """What PPO changed, held against the roof: a table, lengths as a histogram, a story each."""
    before, after = found["before"], found["after"]
    n = len(before["lengths"])
    print(f"\nPPO on {n} held-out prompts, beta = {found['beta']:g}" + " " * 8 + "before     after")
    rows = [
        ("J = reward - beta KL", "objective", "8.3f"), ("reward", "reward", "8.3f"),
        ("KL to the reference, nats", "kl", "8.2f"), ("mean length, tokens", "length_mean", "8.1f"),
        ("its standard deviation", "length_std", "8.1f"), ("ended by themselves", "ended", "8.0%"),
        ("reference's loss on the samples", "ref_loss", "8.3f"),
        ("loss on validation text", "val_loss", "8.3f"),
    ]  # fmt: skip
    for title, key, form in (row for row in rows if row[1] in before):
        print(f"  {title:<40}{before[key]:{form}}  {after[key]:{form}}")
    roof, error = found["roof"]
    gap = roof - before["objective"]
    closed = (after["objective"] - before["objective"]) / gap if gap > 0 else float("nan")
    print(f"  roof J*: {roof:.3f} ±{error:.3f} (95 %, from reference samples); "
          f"{closed:.0%} of the gap closed")  # fmt: skip
    print("\n  tokens     before" + " " * 26 + "after")
    every = before["lengths"] + after["lengths"]
    for low in range(min(every) // 20 * 20, max(every) + 1, 20):
        bars = []
        for x in (before, after):
            share = sum(low <= length < low + 20 for length in x["lengths"]) / n
            bars.append(f"{'█' * round(share * 30):<22.22} {share:4.0%}")
        print(f"  {low:3d}-{low + 19:3d}    {bars[0]}     {bars[1]}")
    for title, x in (("before", before), ("after", after)):
        if x["story"]:
            story = textwrap.indent(textwrap.fill(x["story"], 96), "    ")
            print(f"\n  a story {title} PPO:\n{story}")
    print()


# ----------------------------------------------------------------------------
# --plot


def plot(out_dir):
    """Draws the logs in a run's folder into out_dir/NAME.png, or on the terminal where matplotlib
    is not installed: losses, PPO's objective below its roof, and the gradient's norm, whose spikes tell
    of trouble. Raises FileNotFoundError."""
    drawn = {
        "log": ("loss, nats a token", ("loss/train", "loss/val")),
        "sft_log": ("loss, nats a token of the replies", ("loss/train", "loss/val")),
        "rm_log": ("loss, nats a pair", ("loss/train", "loss/val")),
        "dpo_log": ("loss, nats a pair", ("loss/train", "loss/val")),
        "ppo_log": ("J = reward - beta KL", ("ppo/objective", "ppo/objective_roof")),
    }
    found = [n for n in drawn if (Path(out_dir) / f"{n}.jsonl").exists()]
    if not found:
        raise FileNotFoundError(f"{out_dir} has no log to draw: train.py writes log.jsonl there")
    for name in found:
        path, (label, keys) = Path(out_dir) / f"{name}.jsonl", drawn[name]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        curves = {
            k: [(r["iter"], r[k]) for r in rows if r.get(k) is not None] for k in (*keys, "grad_norm")
        }
        curves = {k: points for k, points in curves.items() if points}
        if not curves:
            continue
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print(f"{path} ({label}; pip install matplotlib for a picture)")
            for k, points in curves.items():
                print(f"  {k}\n{textwrap.indent(terminal_curve(points), '    ')}")
            continue
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        above.set_ylabel(label)
        below.set(xlabel="iteration", ylabel="gradient norm")
        for k, points in curves.items():
            axes = below if k == "grad_norm" else above
            axes.plot(*zip(*points), label=k, linewidth=1, marker="." if len(points) < 50 else "")
        above.legend()
        for axes in (above, below):
            axes.grid(alpha=0.3)
        with write_atomic(path.with_suffix(".png")) as f:
            figure.savefig(f, format="png", dpi=120)
        print(f"wrote {path.with_suffix('.png')}")


def terminal_curve(points, width=72, height=12):
    """Points (x, y) as lines of text: in each of `width` columns the mean of its y."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    columns = [[] for _ in range(min(width, len(points)))]
    for i, (_, y) in enumerate(points):
        columns[i * len(columns) // len(points)].append(y)
    step = (high - low) / (height - 1) or 1.0
    level = [round((sum(c) / len(c) - low) / step) for c in columns]
    lines = [
        f"{low + row * step:9.3f} |" + "".join("*" if x == row else " " for x in level).rstrip()
        for row in reversed(range(height))
    ]
    return "\n".join([*lines, " " * 10 + f"iterations {points[0][0]} to {points[-1][0]}"])


# ----------------------------------------------------------------------------
# --plan

GPUS = {  # makers' figures: dense bf16 operations a second, bytes, bytes a second between cards
    "h200": (989e12, 141e9, 450e9),
    "h100": (989e12, 80e9, 450e9),
    "a100": (312e12, 80e9, 300e9),
    "4090": (165e12, 24e9, 32e9),
    "cpu": None,  # this machine, as it is measured
}
NODE, NETWORK = 8, 50e9  # cards a node; bytes a second and card between nodes (400 Gb/s)
STATE_BYTES = 16  # a parameter: fp32 weight and gradient, AdamW's two moments


def saved_bytes(args, batch, seq_len, dtype, here=False):
    """Bytes that the forward pass of a Transformer keeps for the backward pass: of everything, of
    one layer, and of one layer's input. Found by running it on tensors without memory, as a GPU
    would, or `here`, where kernels.c keeps less."""
    totals = []
    for n_layers in (1, 2):
        with nullcontext() if here else FakeTensorMode():
            model, kept = Transformer(replace(args, n_layers=n_layers)), {}
            weights = {p.untyped_storage()._cdata for p in model.parameters()}

            def keep(t):
                if t.untyped_storage()._cdata not in weights:
                    kept[t.untyped_storage()._cdata] = t  # alive, so that the address is its own
                return t

            tokens = torch.zeros(batch, seq_len, dtype=torch.long)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    model(tokens, tokens)
            totals.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    layer = totals[1] - totals[0]
    return totals[0] + (args.n_layers - 1) * layer, layer, 4 * batch * seq_len * args.dim


def plan(args, model_args):
    """Prints memory a card, tokens/s and time for 1 to 256 cards: with DDP (everything on each) and
    with --fsdp (state sharded, activations computed again). One forward and backward pass of
    --batch_size sequences a card and step, in --dtype; compute at --plan_mfu of the maker's figure;
    communication overlaps with it, so that the slower of the two counts. --plan_gpu=cpu is this
    machine as one card, at --plan_mfu of the matrix product measured on it, as in a run's log."""
    cpu = args.plan_gpu == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
    if cpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak, room, link = matmul_roof("cpu", dtype), memory, math.inf
    else:
        peak, room, link = GPUS[args.plan_gpu]
        peak = peak if dtype != torch.float32 else peak / 16  # without tensor cores
    with FakeTensorMode():
        model = Transformer(model_args)
        flops = model.flops_per_token(args.max_seq_len)
        P = sum(p.numel() for p in model.parameters())
        in_layer = sum(p.numel() for p in model.layers[0].parameters())
    B, T = args.batch_size, args.max_seq_len
    few = min(B, 256 // T + 1) if cpu else B  # really run, and enough for the kernels that B takes
    saved = saved_bytes(model_args, few, T, dtype, cpu)
    everything, layer, layer_input = (x * B / few for x in saved)
    # The backward pass begins with the gradients of log-probabilities and logits, (B, T, V) in fp32.
    native = cpu and dtype == torch.float32 and library() is not None
    everything += (4 if native else 8) * B * T * model_args.vocab_size
    print(f"{P:,} parameters, {B} x {T} tokens a card and step, {str(dtype)[6:]}, "
          f"{args.plan_gpu} at {args.plan_mfu:.0%} of {peak / 1e12:,.3g} TFLOP/s")  # fmt: skip
    print(f"{'cards':>6}{'':4}{'':4}{'GB a card':>10}{'of':>5}{'tokens/s':>14}"
          f"{'waits for':>11}{'hours a billion tokens':>24}")  # fmt: skip
    rows = []
    for cards in (1,) if cpu else (1, 2, 4, 8, 16, 64, 256):
        wire = link if cards <= NODE else min(link, NETWORK)
        for kind in ("ddp", "fsdp") if cards > 1 else ("ddp",):
            if kind == "ddp":
                bytes_a_card = STATE_BYTES * P + everything
                moved, again = 2 * 4 * P, 1.0  # ring all-reduce of fp32 gradients
            else:  # two layers' weights are whole at a time, in dtype, and the embeddings
                activations = everything - model_args.n_layers * (layer - layer_input) + layer
                whole = P - max(model_args.n_layers - 2, 0) * in_layer
                whole *= 2 if dtype != torch.float32 else 4
                bytes_a_card = STATE_BYTES * P / cards + whole + activations
                moved, again = 2 * 2 * P + 4 * P, 4 / 3  # weights twice, gradients once
            compute = B * T * flops * again / (peak * args.plan_mfu)
            network = moved * (cards - 1) / cards / wire
            rate = cards * B * T / max(compute, network)
            waits = "network" if network > compute else "compute"
            fits = "" if bytes_a_card < 0.92 * room else "  does not fit"
            rows.append((cards, kind, bytes_a_card, rate))
            print(f"{cards:6d}{'':4}{kind:4}{bytes_a_card / 1e9:10.2f}{room / 1e9:5.0f}{rate:14,.0f}"
                  f"{waits:>11}{1e9 / rate / 3600:24.2f}{fits}")  # fmt: skip
    return rows
