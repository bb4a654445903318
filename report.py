"""Output of a run for people and programs: log, progress bar, closing report, curves."""

import json
import math
import textwrap
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from common import printable, write_atomic
from kernels import multiply


def plain_config(args):
    return {k: v for k, v in vars(args).items() if k not in ("given", "kept")}


def load_boards(args):
    """TensorBoard's SummaryWriter and the wandb module, each None where the flags do not ask for it.
    Raises ValueError where it is not installed."""
    SummaryWriter = wandb = None
    try:
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
        if args.wandb_log:
            import wandb
    except ImportError as e:
        package = "wandb" if SummaryWriter or not args.tensorboard else "tensorboard"
        flag = "wandb_log" if package == "wandb" else package
        raise ValueError(f"--{flag} needs: pip install {package} ({e})") from None
    return SummaryWriter, wandb


def read_log(path):
    """The records of a log; a line that is cut short, by a crash or because it is being written, is none."""
    records = []
    for line in Path(path).read_text().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            records.append({**record, "iter": int(record["iter"])})
    return records


class Log:
    """One JSON object an iteration into a file, the same scalars to TensorBoard and Weights &
    Biases where asked for, a progress bar and lines on the terminal. Silent but on rank 0."""

    def __init__(self, args, name, first, resumed, rank):
        self.master, self.path = rank == 0, Path(args.out_dir) / name
        self.file = self.board = self.wandb = None
        self.steps, self.last, self.pace = 0, 0.0, 0.0  # how many, the last one's end, mean seconds
        quiet = None if self.master else True  # None: shown on a terminal only
        self.bar = tqdm(
            total=args.max_iters - first,
            unit="it",
            disable=quiet,
            dynamic_ncols=True,
            smoothing=0.05,
            leave=False,
        )
        if not self.master:
            return
        # A resumed run continues its log, without the iterations that it does again.
        old = read_log(self.path) if resumed and self.path.exists() else []
        kept = [json.dumps(record) + "\n" for record in old if record["iter"] < first]
        if not args.eval_only:  # which may look at a run that goes on
            with write_atomic(self.path, "w") as f:
                f.writelines(kept)
        self.file = open(self.path, "a")
        SummaryWriter, wandb = load_boards(args)
        if SummaryWriter:
            self.board = SummaryWriter(args.out_dir)
        if wandb:
            self.wandb = wandb.init(
                project=args.wandb_project, name=args.wandb_run_name, config=plain_config(args)
            )

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
        ("J = reward - beta KL", "objective", "8.3f"),
        ("reward", "reward", "8.3f"),
        ("KL to the reference, nats", "kl", "8.2f"),
        ("mean length, tokens", "length_mean", "8.1f"),
        ("its standard deviation", "length_std", "8.1f"),
        ("ended by themselves", "ended", "8.0%"),
        ("reference's loss on the samples", "ref_loss", "8.3f"),
        ("loss on validation text", "val_loss", "8.3f"),
    ]
    for title, key, form in (row for row in rows if row[1] in before):
        print(f"  {title:<40}{before[key]:{form}}  {after[key]:{form}}")
    roof, error = found["roof"]
    gap = roof - before["objective"]
    closed = "J was as high before PPO, within the error of both"
    if gap > 0:
        closed = f"{(after['objective'] - before['objective']) / gap:.0%} of the gap closed"
    print(f"  roof J*: {roof:.3f} ±{error:.3f} (95 %, from reference samples); {closed}")
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
            story = textwrap.indent(textwrap.fill(printable(x["story"]), 96), "    ")
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
        rows = read_log(path)
        curves = {
            k: [(r["iter"], r[k]) for r in rows if r.get(k) is not None]
            for k in (*keys, "grad_norm")
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
