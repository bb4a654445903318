"""What a run writes for people and programs: log, progress bar, PPO's report, plots."""

import json
import math
import shutil
import sys
import textwrap
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from common import printable, write_atomic
from kernels import multiply


def load_boards(args):
    """TensorBoard's SummaryWriter and the wandb module; each is None unless its flag is set.
    Raises ValueError if a package that is asked for is not installed."""
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
    """The records of a log. A line that is incomplete, because a run crashed or is writing it, is
    skipped."""
    records = []
    for line in Path(path).read_text().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            records.append({**record, "iter": int(record["iter"])})
    return records


def terminal_columns():
    """The width of the terminal on standard output; sys.maxsize if it is a file or a pipe."""
    if sys.stdout is None or not sys.stdout.isatty():
        return sys.maxsize
    return shutil.get_terminal_size().columns


def fit_line(text, columns):
    """One line of the log in at most `columns` columns where possible. A line of fields,
    "12 | loss 2.1 | lr 1e-3", loses its last fields; a sentence is wrapped with an indent of 4."""
    fields = text.split(" | ")
    if len(fields) == 1:
        wrapped = textwrap.wrap(text, columns, subsequent_indent="    ", break_on_hyphens=False)
        return text if len(text) <= columns else "\n".join(wrapped)
    while len(" | ".join(fields)) > columns and len(fields) > 1:
        fields.pop()
    return " | ".join(fields)


class Log:
    """Writes one JSON object per iteration to a file, the same scalars to TensorBoard and Weights &
    Biases if their flags are set, and shows a progress bar and lines on the terminal. Only rank 0
    writes."""

    def __init__(self, run, name):
        args, first = run.args, run.start_iteration
        self.master, self.path = run.rank == 0, Path(args.out_dir) / name
        self.file = self.board = self.wandb = None
        # The number of steps, the time at the end of the last one, mean seconds per step
        self.steps, self.last, self.pace = 0, 0.0, 0.0
        quiet = None if self.master else True  # None: tqdm draws the bar on terminals only
        self.bar = tqdm(
            total=run.end_iteration - first,
            unit="it",
            disable=quiet,
            dynamic_ncols=True,
            smoothing=0.05,
            leave=False,
        )
        if not self.master:
            return
        # A resumed run continues its log, without the iterations that it will repeat.
        old = read_log(self.path) if run.resumed and self.path.exists() else []
        lines = [json.dumps(record) + "\n" for record in old if record["iter"] < first]
        if not args.eval_only:  # --eval_only may read the folder while another run writes to it
            with write_atomic(self.path, "w") as f:
                f.writelines(lines)
        self.file = open(self.path, "a")
        SummaryWriter, wandb = load_boards(args)
        if SummaryWriter:
            self.board = SummaryWriter(args.out_dir)
        if wandb:
            self.wandb = wandb.init(
                project=args.wandb_project, name=args.wandb_run_name, config=run.config
            )

    def scalars(self, iteration, stats):
        """Logs {name: number}. Raises OSError, which names the log, if it cannot be written."""
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
        """Logs a text to TensorBoard; other logs have scalars only."""
        if self.board:
            self.board.add_text(name, text.replace("\n", "  \n"), iteration)

    def line(self, text):
        """Prints a line, or several, fitted to the terminal's width; files and pipes get all of it.
        (The progress bar shows the time left, which is a line's last field.)"""
        if self.master:
            self.bar.clear()
            columns = terminal_columns()
            print("\n".join(fit_line(row, columns) for row in text.split("\n")), flush=True)

    def left(self, steps):
        """Called after each step: a field with the time that `steps` further steps will take,
        evaluations included. It is empty after the first step, which includes warm-up; later steps
        are averaged, the last 50 with the most weight."""
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


def flops_per_token(model, seq_len):
    """Floating-point operations of forward and backward pass per token (PaLM, appendix B)."""
    a, weights = model.args, sum(p.numel() for p in model.parameters())
    return 6 * weights + 12 * a.n_layers * a.n_heads * a.head_dim * seq_len


def peak_matmul_flops(device, dtype):
    """Measured FLOP/s of a large matrix product, the denominator of MFU."""
    # On a GPU many products are timed together, because launching one and waiting for it would take
    # as long as the product itself.
    n, times, tries = (4096, 20, 4) if device.startswith("cuda") else (1024, 1, 20)
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(tries):
        t = time.perf_counter()
        for _ in range(times):
            product = multiply(a, a)  # as the model multiplies
        product[0, 0].item()  # synchronizes with the device
        best = min(best, (time.perf_counter() - t) / times)
    return 2 * n**3 / best


def print_report(found):
    """Prints what PPO changed: a table beside J*, histograms of lengths, one response before and
    after. `found` is ppo_report.json: {"beta", "roof": (J*, error), "before", "after"}."""
    before, after = found["before"], found["after"]
    n, columns = len(before["lengths"]), terminal_columns()
    print(f"\nPPO on {n} held-out prompts, beta = {found['beta']:g}" + " " * 8 + "before     after")
    rows = [
        ("J = reward - beta KL", "objective", "8.3f"),
        ("reward", "reward", "8.3f"),
        ("KL to the reference, nats", "kl", "8.2f"),
        ("mean length, tokens", "length_mean", "8.1f"),
        ("standard deviation of the length", "length_std", "8.1f"),
        ("share that ended", "ended", "8.0%"),
        ("reference model's loss on the responses", "ref_loss", "8.3f"),
        ("loss on validation text", "val_loss", "8.3f"),
    ]
    for title, key, form in (row for row in rows if row[1] in before):
        print(f"  {title:<40}{before[key]:{form}}  {after[key]:{form}}")
    best, error = found["roof"]
    gap = best - before["objective"]
    closed = "J was as high before PPO, within both errors"
    if gap > 0:
        closed = f"{(after['objective'] - before['objective']) / gap:.0%} of the gap closed"
    print(f"  {'best achievable J (J*), 95 % interval':<40}{best:8.3f} ±{error:.3f}\n  {closed}")
    print("\n  tokens     before" + " " * 26 + "after")
    lengths = before["lengths"] + after["lengths"]
    for low in range(min(lengths) // 20 * 20, max(lengths) + 1, 20):
        bars = []
        for part in (before, after):
            share = sum(low <= length < low + 20 for length in part["lengths"]) / n
            bars.append(f"{'█' * round(share * 30):<22.22} {share:4.0%}")
        print(f"  {low:3d}-{low + 19:3d}    {bars[0]}     {bars[1]}")
    for title, part in (("before", before), ("after", after)):
        if part["story"]:
            text = textwrap.fill(printable(part["story"]), min(96, columns - 4))
            print(f"\n  response {title} PPO:\n{textwrap.indent(text, '    ')}")
    print()


# ----------------------------------------------------------------------------
# --plot


def plot(out_dir):
    """Draws the logs in a run's folder into out_dir/NAME.png, or on the terminal if matplotlib is
    not installed: losses, PPO's J and J*, and the gradient norm, whose spikes show instabilities.
    Raises FileNotFoundError if the folder has no log."""
    drawn = {
        "log": ("loss, nats per token", ("loss/train", "loss/val")),
        "sft_log": ("loss, nats per reply token", ("loss/train", "loss/val")),
        "rm_log": ("loss, nats per pair", ("loss/train", "loss/val")),
        "dpo_log": ("loss, nats per pair", ("loss/train", "loss/val")),
        "ppo_log": ("J = reward - beta KL", ("ppo/objective", "ppo/objective_roof")),
    }
    names = [n for n in drawn if (Path(out_dir) / f"{n}.jsonl").exists()]
    if not names:
        raise FileNotFoundError(f"{out_dir} has no log to draw: train.py writes log.jsonl there")
    for name in names:
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
    """Points (x, y) as lines of text; each of the `width` columns shows the mean of its y."""
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
