"""What a run writes for people and programs: log, progress bar, PPO's report, plots."""

import functools
import importlib.util
import json
import math
import shutil
import sys
import textwrap
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import note, printable, write_atomic
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

    def __init__(self, run, prefix):
        args, first = run.args, run.start_iteration
        self.master, self.path = run.rank == 0, Path(args.out_dir) / f"{prefix}log.jsonl"
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
        if not args.eval_only:  # which may read the folder while another run writes to it
            with write_atomic(self.path, "w") as f:
                f.writelines(lines)
            self.file = open(self.path, "a")
        SummaryWriter, wandb = load_boards(args)
        stage = prefix.rstrip("_") or "pretraining"
        if SummaryWriter:
            # One folder per stage and run. A resumed run continues the folder of the interrupted
            # one, and TensorBoard then discards what was logged from the iteration `first` on.
            boards = Path(args.out_dir) / "tensorboard"
            runs = [p.name.rpartition("-")[2] for p in boards.glob(f"{stage}-*")]
            last = max((int(n) for n in runs if n.isdigit()), default=0)
            same = last and (run.resumed or args.eval_only)
            number = last if same else last + 1
            self.board = SummaryWriter(
                boards / f"{stage}-{number}", purge_step=first if run.resumed else None
            )
        if wandb:
            name = args.wandb_run_name
            self.wandb = wandb.init(
                project=args.wandb_project,
                name=name if "wandb_run_name" in args.given else f"{stage}-{name}",
                group=Path(args.out_dir).name,
                job_type=stage,
                config=run.config,
            )
            self.table = wandb.Table

    def scalars(self, iteration, stats):
        """Logs {name: number}. Raises OSError, which names the log, if it cannot be written."""
        if not self.master:
            return
        stats = {k: v if math.isfinite(v) else None for k, v in stats.items()}  # JSON has no NaN
        try:
            if self.file:
                self.file.write(json.dumps({"iter": iteration, **stats}) + "\n")
                self.file.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None
        for k, v in stats.items():
            if self.board and v is not None:
                self.board.add_scalar(k, v, iteration)
        if self.wandb:
            self.wandb.log({"iter": iteration, **stats}, step=iteration)

    def texts(self, iteration, texts):
        """Logs a sample, {name: text} such as a prompt, its response and the reward, to TensorBoard
        as one text, to Weights & Biases as a table with one row."""
        if self.board:
            parts = [f"**{k}**\n\n" + v.replace("\n", "  \n") for k, v in texts.items()]
            self.board.add_text("sample", "\n\n".join(parts), iteration)
        if self.wandb:
            row = [str(iteration), *texts.values()]
            table = self.table(columns=["iteration", *texts], data=[row])
            self.wandb.log({"sample": table}, step=iteration)

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


@functools.cache
def peak_matmul_flops(device, dtype):
    """Measured FLOP/s of a large matrix product, the denominator of MFU."""
    # On a GPU many products are timed together, because launching one and waiting for it would take
    # as long as the product itself.
    n, times, tries = (4096, 20, 4) if device.startswith("cuda") else (1024, 1, 8)
    generator = torch.Generator().manual_seed(0)  # the run's random numbers stay as they are
    a, best = torch.randn(n, n, generator=generator).to(device, dtype), math.inf
    for _ in range(tries):
        t = time.perf_counter()
        for _ in range(times):
            product = multiply(a, a)  # as the model multiplies
        product[0, 0].item()  # synchronizes with the device
        best = min(best, (time.perf_counter() - t) / times)
    return 2 * n**3 / best


def measured_on(found):
    """What ppo_report.json was measured on, in words."""
    n = len(found["before"]["lengths"])
    prompts = found.get("prompts", n)  # reports of earlier versions have no number of prompts
    responses = "" if prompts == n else f"{n} responses to "
    return f"{responses}{prompts} held-out prompts"


def print_report(found):
    """Prints what PPO changed: a table beside J*, histograms of lengths, one response before and
    after. `found` is ppo_report.json: {"beta", "roof": (J*, error), "before", "after"}."""
    before, after = found["before"], found["after"]
    n, columns = len(before["lengths"]), terminal_columns()
    title = f"PPO on {measured_on(found)}, beta = {found['beta']:g}"
    print(f"\n{title:<43} before     after")
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
    change = after["objective"] - before["objective"]
    closed = "J was as high before PPO, within the error of J*"
    if gap > error:
        closed = f"{round(change / gap, 2) + 0:.0%} of the gap closed"  # + 0: no -0%
    if change < -max(0.01 * abs(gap), error):
        closed = f"J fell by {-change:.3f}: try a smaller --learning_rate or more --rollouts"
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
# pictures of the logs: at the end of a run if matplotlib is installed, and with --plot

# Colours of Okabe and Ito, which people with colour blindness can distinguish. In all pictures blue
# is the model in training, orange is held-out data, green is the best achievable value, and grey is
# the model before the run.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#3394cc", "#D55E00", "#009E73"
GREY, RED = "#8c8c8c", "#CC0000"
TRAIN, VAL = ("training", BLUE), ("validation", ORANGE)
# rcParams of all pictures.
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 0.8,
    "legend.handletextpad": 0.5,
}


class Panel(NamedTuple):
    """One diagram of a picture. Panels without any value in the log are left out."""

    title: str
    unit: str  # label of the y axis
    curves: dict  # {name in the log: (label, colour)}
    percent: bool = False  # the values are shares
    spread: str = ""  # name of the standard deviation of the only curve, drawn as a band
    low: float = -math.inf  # lower values are cut off
    noisy: bool = True  # a long curve is drawn as its moving average over the pale values


GRADIENT = Panel("gradient norm", "before clipping", {"grad_norm": TRAIN})
RATE = Panel("learning rate", "of AdamW", {"lr": TRAIN}, noisy=False)
SPEED = Panel("speed", "tokens per second", {"tokens_per_s": TRAIN})


def losses(unit):
    return Panel("loss", unit, {"loss/train": TRAIN, "loss/val": VAL})


def comparisons(stage):
    """Accuracy and margin of a reward model (stage "rm") or of DPO ("dpo")."""
    return (
        Panel(
            "accuracy",
            "right order; guessing: 50%",
            {f"{stage}/accuracy": TRAIN, f"{stage}/val/accuracy": VAL},
            percent=True,
        ),
        Panel(
            "margin",
            "better − worse reward",
            {f"{stage}/margin": TRAIN, f"{stage}/val/margin": VAL},
        ),
    )


# For each log, {name: (title, panels)}.
PICTURES = {
    "log": ("Pretraining", [losses("nats per token"), RATE, SPEED, GRADIENT]),
    "sft_log": ("SFT", [losses("nats per reply token"), RATE, SPEED, GRADIENT]),
    "rm_log": ("Reward model", [losses("nats per pair"), *comparisons("rm"), GRADIENT]),
    "dpo_log": (
        "DPO",
        [
            losses("nats per pair"),
            *comparisons("dpo"),
            Panel(
                "reward",
                "β log(policy / reference)",
                {"dpo/better": ("better", BLUE), "dpo/worse": ("worse", GREY)},
            ),
            Panel("KL to the reference", "nats per reply", {"dpo/val/kl_ref": VAL}),
            GRADIENT,
        ],
    ),
    "ppo_log": (
        "PPO",
        [
            Panel(
                "objective J",
                "J = reward − β KL; best: J*",
                {"ppo/objective": ("J", BLUE), "ppo/objective_roof": ("J*", GREEN)},
            ),
            Panel("reward", "score per response", {"ppo/reward": TRAIN}),
            Panel("KL to the reference", "nats per response", {"ppo/kl_ref": TRAIN}),
            Panel(
                "length",
                "tokens, ± standard deviation",
                {"ppo/length/mean": TRAIN},
                spread="ppo/length/std",
            ),
            Panel(
                "responses that end", "share of the rollouts", {"ppo/ended": TRAIN}, percent=True
            ),
            Panel("entropy", "nats per token", {"ppo/policy/entropy": TRAIN}),
            Panel("clip fraction", "share of tokens", {"ppo/policy/clipfrac": TRAIN}, percent=True),
            Panel(
                "explained variance",
                "of the critic; 1 is perfect",
                {"ppo/val/explained_variance": TRAIN},
                low=-1,
            ),
            GRADIENT,
        ],
    ),
}


def values_of(rows, name):
    """The iterations and the values of a name in the records of a log, each (n,). A value that was
    not finite is NaN."""
    points = [(r["iter"], math.nan if r[name] is None else r[name]) for r in rows if name in r]
    return np.array(points, dtype=float).reshape(-1, 2).T


def moving_average(values, width):
    """The mean of up to `width` values around each of the values (n,); NaN does not count."""
    finite, i = np.isfinite(values), np.arange(len(values))
    total, count = (np.cumsum(np.append(0, x)) for x in (np.where(finite, values, 0), finite))
    low, high = (i - width // 2).clip(0), (i + width // 2 + 1).clip(max=len(values))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def number(value, percent=False):
    """A value as pictures show it: 0.0001, 2.345, 51,400, 84%."""
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return (f"{100 * value:.3g}%" if percent else text).replace("-", "−")


def draw_panel(axes, panel, rows):
    """Draws one Panel. A legend beside the title, where it covers nothing, has the last value of
    each curve, or the first and last value of a single curve. Values that are not finite leave gaps
    and are marked on the x axis."""
    from matplotlib.ticker import MaxNLocator

    curves = {k: v for k, v in panel.curves.items() if any(k in r for r in rows)}
    handles, highest, steps, bad = [], -math.inf, set(), set()
    for name, (label, colour) in curves.items():
        x, y = values_of(rows, name)
        steps |= set(x)
        bad |= set(x[np.isnan(y)])
        smooth = moving_average(y, len(x) // 50 * 2 + 1) if panel.noisy and len(x) > 100 else y
        if smooth is not y:
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.6)
        marker = "." if len(x) <= 60 and colour != GREEN or len(x) == 1 else ""
        dashes = "--" if colour == GREEN else "-"
        (line,) = axes.plot(x, smooth, dashes, color=colour, marker=marker, markersize=4)
        if panel.spread:
            std = values_of(rows, panel.spread)[1]
            axes.fill_between(x, y - std, y + std, color=colour, alpha=0.15, linewidth=0)
        finite = smooth[np.isfinite(smooth)]
        if len(finite):
            ends = [number(v, panel.percent) for v in (finite[0], finite[-1])]
            many = len(curves) > 1
            text = f"{label} {ends[1]}" if many else " → ".join(ends[: len(finite)])
            handles.append((line if many else axes.plot([], [], " ")[0], text))
            highest = max(highest, finite.max())
    if bad:
        edge = axes.get_xaxis_transform()
        y = [0.03] * len(bad)
        (line,) = axes.plot(sorted(bad), y, "x", color=RED, markersize=5, transform=edge)
        handles.append((line, f"{len(bad)} not finite"))
    axes.legend(
        *zip(*handles),
        loc="lower right",
        bbox_to_anchor=(1.01, 0.99),
        ncols=len(handles),
        borderaxespad=0,
    )
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, position: number(value, panel.percent))
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, max(steps) + 1)
    if axes.get_ylim()[0] < panel.low < highest:
        axes.set_ylim(panel.low, highest + 0.05 * (highest - panel.low))


def log_figure(path):
    """The picture of a log as a matplotlib Figure; None if the log has no values to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    title, panels = PICTURES[path.stem]
    rows = read_log(path)
    panels = [p for p in panels if any(name in r for r in rows for name in p.curves)]
    if not panels:
        return None
    columns = 3 if len(panels) > 4 else min(len(panels), 2)
    with matplotlib.rc_context(STYLE):
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(4.3 * columns, 2.5 * lines + 0.4), layout="constrained")
        figure.suptitle(f"{title}: {path.parent}", fontsize=11)
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for panel, place in zip(panels, axes):
            draw_panel(place, panel, rows)
        for place in axes[len(panels) :]:
            place.set_visible(False)
        for place in axes[max(len(panels) - columns, 0) : len(panels)]:
            place.set_xlabel("iteration")
    return figure


def report_figure(path):
    """The picture of ppo_report.json as a matplotlib Figure: histograms of rewards and lengths of
    the responses to held-out prompts, before and after PPO."""
    import matplotlib
    from matplotlib.figure import Figure

    found = json.loads(path.read_text())
    before, after = found["before"], found["after"]
    # Reports of earlier versions have no scores.
    kinds = [
        ("scores", "reward", "score per response"),
        ("lengths", "length", "tokens of prompt and response"),
    ]
    kinds = [kind for kind in kinds if kind[0] in before]
    n = len(before["lengths"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * len(kinds), 3.4), layout="constrained")
        figure.suptitle(
            f"PPO on {measured_on(found)}, β = {found['beta']:g}: "
            f"J {number(before['objective'])} → {number(after['objective'])}, "
            f"best achievable {number(found['roof'][0])}",
            fontsize=11,
        )
        for axes, (key, title, unit) in zip(
            figure.subplots(1, len(kinds), squeeze=False)[0], kinds
        ):
            low, high = (f(f(before[key]), f(after[key])) for f in (min, max))
            bins = [low + (high - low) * i / 30 for i in range(31)] if high > low else 1
            for label, part, colour in (("before", before, GREY), ("after", after, BLUE)):
                mean = sum(part[key]) / n
                share = [1 / n] * n
                axes.hist(part[key], bins, weights=share, color=colour, alpha=0.45)
                axes.hist(part[key], bins, weights=share, color=colour, histtype="step")
                axes.axvline(mean, color=colour, linestyle="--", linewidth=1.2)
                axes.plot([], [], color=colour, linewidth=5, label=f"{label}, mean {number(mean)}")
            axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=2, borderaxespad=0)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set(xlabel=unit, ylabel="share of responses")
            axes.yaxis.set_major_formatter(lambda value, position: number(value, True))
    return figure


def draw(path):
    """Draws a log, or ppo_report.json, into a PNG file of the same name. Needs matplotlib."""
    figure = report_figure(path) if path.suffix == ".json" else log_figure(path)
    if figure:
        with write_atomic(path.with_suffix(".png")) as f:
            figure.savefig(f, format="png", dpi=120)
        print(f"wrote {path.with_suffix('.png')}")


def plot(out_dir):
    """Draws the logs in a run's folder, and PPO's report, into PNG files there; without matplotlib
    the first panel of each log and the gradient norm, whose spikes show instabilities, are drawn on
    the terminal. Raises FileNotFoundError if the folder has no log with an iteration."""
    paths = [Path(out_dir) / f"{name}.jsonl" for name in PICTURES]
    paths = [path for path in paths if path.exists() and read_log(path)]
    if not paths:
        raise FileNotFoundError(
            f"{out_dir} has no log to draw: train.py writes log.jsonl there, a line per iteration"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        for path in paths:
            first = PICTURES[path.stem][1][0]
            rows = read_log(path)
            print(f"{path} ({first.title}, {first.unit}; pip install matplotlib for a picture)")
            for name in (*first.curves, "grad_norm"):
                points = [(r["iter"], r[name]) for r in rows if r.get(name) is not None]
                if points:
                    print(f"  {name}\n{textwrap.indent(terminal_curve(points), '    ')}")
        return
    report = Path(out_dir) / "ppo_report.json"
    for path in (*paths, report) if report.exists() else paths:
        draw(path)


def plot_at_end(path):
    """Draws the log of a run that has ended, and PPO's report, if matplotlib is installed. The run
    is complete, so that an error here is only a note."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    try:
        draw(path)
        report = path.with_name("ppo_report.json")
        if path.stem == "ppo_log" and report.exists():
            draw(report)
    except Exception as e:  # matplotlib does not fit numpy, the disk is full, ...
        note(f"no picture of {path}: {type(e).__name__}: {e}")


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
