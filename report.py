"""What a person and a program see of a run: log, progress bar, closing report."""

import json
import math
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from tokenizer import write_atomic


def plain_config(args):
    return {k: v for k, v in vars(args).items() if k not in ("given", "kept")}


class Log:
    """One JSON object an iteration into a file, the same scalars to TensorBoard and Weights &
    Biases where asked for, a progress bar and lines on the terminal. Silent but on rank 0."""

    def __init__(self, args, name, first, resumed, rank):
        self.master, self.path = rank == 0, Path(args.out_dir) / name
        self.file = self.board = self.wandb = None
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

    def close(self):
        self.bar.close()
        for x in filter(None, (self.file, self.board)):
            with suppress(OSError):
                x.close()


def matmul_roof(device, dtype):
    """Measured operations a second of a large matrix product: what MFU is held against."""
    n = 4096 if device.startswith("cuda") else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(4):
        t = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - t)
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
    for title, key, form in rows:
        print(f"  {title:<40}{before[key]:{form}}  {after[key]:{form}}")
    roof, error = found["roof"]
    gap = roof - before["objective"]
    closed = (after["objective"] - before["objective"]) / gap if gap > 0 else float("nan")
    print(f"  roof J*: {roof:.3f} ±{error:.3f} (from reference samples); {closed:.0%} of the gap closed")
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
