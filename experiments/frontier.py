"""Reward against KL: PPO compared with the best achievable frontier.

    python experiments/frontier.py --checkpoint=stories260K/ckpt.pt  # 30 minutes or more, 2 cores
    python experiments/frontier.py --checkpoint=... --betas=0.2,0.05,0:200 --seeds=5 --group=
    python experiments/frontier.py --draw                            # frontier.png alone, no runs

For the length reward, on held-out prompts:
    optimum     (KL, E[r]) of π* ∝ π_ref exp(r/β) for many β, from weighted reference samples
    best of n   n = 2, 4, 16, 64, from the same samples
    PPO         runs of train.py, per β and seed; RLOO and GRPO with the same rollouts at β = 0.2
Other projects are in assets/frontier_peers.csv: the published run of FullLLM, and TRL. Each run has
a folder in --out_dir with its command. A run that already exists with the same command is reused;
one with another command is moved aside. The script prints a table and writes frontier.csv and, if
matplotlib is installed, frontier.png to --assets.
"""

import argparse
import csv
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_args, run_main, write_atomic  # noqa: E402  (first: it reports missing packages)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

import rlhf  # noqa: E402
from checkpoint import load_checkpoint, model_from_checkpoint  # noqa: E402
from model import generate  # noqa: E402
from report import BLUE, GREEN, GREY, ORANGE, SKY  # noqa: E402
from tinystories import Prompts  # noqa: E402
from tokenizer import stop_ids  # noqa: E402

PEERS = ROOT / "assets/frontier_peers.csv"
FLAGS = """--ppo --batch_size=50 --rollouts=200 --learning_rate=3e-4 --value_learning_rate=1e-3
    --beta2=0.99 --weight_decay=0 --averaging=0.95 --eval_interval=1000 --report_rollouts=6144
    --device=cpu""".split()


def tilted(scores, beta):
    """E[r] and KL of π* ∝ π_ref exp(r/β), means over prompts; scores (prompts, samples)."""
    logw = (scores / beta).log_softmax(1)
    w = logw.exp()
    kl = (w * (logw + math.log(scores.shape[1]))).sum(1)
    return float((w * scores).sum(1).mean()), float(kl.mean())


def best_of(scores, n):
    """E[r] and KL of the best of n samples, means over prompts; ties are broken at random. The best
    sample has score r with probability F(r)^n − F(r−)^n, where F is the distribution function of
    one sample's score. Among responses of equal score the distribution is the reference model's, so
    the KL is that of the scores alone."""
    rewards, kls = [], []
    for row in scores:
        values, count = row.unique(return_counts=True)
        p = count.double() / len(row)
        F = p.cumsum(0).clamp(max=1)
        best = F**n - (F - p).clamp(min=0) ** n
        rewards.append(float((best * values).sum()))
        kls.append(float(torch.special.xlogy(best, best / p).sum()))
    return sum(rewards) / len(rewards), sum(kls) / len(kls)


def reference_scores(a):
    """Scores (prompts, samples) of the length reward on samples of the reference model."""
    model = model_from_checkpoint(load_checkpoint(a.checkpoint))
    prompts = Prompts(a.data, "val", 30, model.args.vocab_size, seed=99).batch(0, a.prompts)
    batch = [p for p in prompts for _ in range(a.samples)]
    uniform = torch.rand(len(batch), 300, generator=torch.Generator().manual_seed(1))
    out = generate(model, batch, 300, stop_ids=stop_ids(None), uniform=uniform, max_batch=512)
    scores = rlhf.LengthReward(200)(batch, out.responses(), out.ended)
    return torch.tensor(scores, dtype=torch.float64).view(a.prompts, a.samples)


def run(a, beta, iters, seed, kind="PPO"):
    """Runs train.py, unless the same command has already been run; returns a row of the table."""
    # With β = 0, a short horizon ends texts too early before the critic has learned, and without an
    # entropy bonus a text repeats the same few words. Without a critic the gradient is noisier, so
    # the learning rate is lower.
    flags = [f"--freeze_layers={a.freeze_layers}"] if a.freeze_layers else []
    flags += [] if a.sampled_end else ["--exact_end", "--lam=0.85"]
    common = FLAGS
    if not beta:
        flags = "--batch_size=25 --lam=0.95 --lam_value=1 --entropy_coef=0.002".split()
    elif kind != "PPO":
        rate = "3e-5" if kind == "GRPO" else "5e-5"
        flags = [f"--advantage={kind.lower()}", "--batch_size=100", f"--learning_rate={rate}"]
        flags += [f"--group_size={a.group_size}"]
        common = [f for f in FLAGS if not f.startswith("--value_learning_rate")]
    folder = Path(a.out_dir) / f"{kind}-{beta:g}-{seed}".lower()
    report, saved = folder / "ppo_report.json", folder / "command.txt"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *common,
        f"--out_dir={folder}",
        f"--init_from={a.checkpoint}",
        f"--data={a.data}",
        f"--ppo_iters={iters}",
        f"--init_kl_coef={beta:g}",
        f"--seed={seed}",
        *flags,
    ]
    line = " ".join(command[2:])
    if report.exists() and (not saved.exists() or saved.read_text() != line):
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{folder} was run with other flags: it is now {aside}")
        folder.rename(aside)
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        saved.write_text(line)
        print(f"{folder}: {iters} iterations, see {folder / 'output.txt'}", flush=True)
        with open(folder / "output.txt", "w") as f:
            failed = subprocess.run(command, stdout=f, stderr=f).returncode
        if failed:
            *_, last = ["", *(folder / "output.txt").read_text().splitlines()]
            raise ValueError(f"the run failed, see {folder / 'output.txt'}: {last}")
    found = json.loads(report.read_text())
    done = len((folder / "ppo_log.jsonl").read_text().splitlines())
    row = dict(
        kind=kind,
        beta=beta,
        seed=seed,
        rollouts=200 * done,
        roof=found["roof"][0],
        start=found["before"]["objective"],
    )
    names = ("objective", "reward", "kl", "length_mean", "length_std", "ended", "ref_loss")
    return row | {name: found["after"][name] for name in names}


def print_table(rows):
    print(
        f"\n{'':8}{'beta':>6}{'seed':>6}{'rollouts':>10}{'J before':>10}{'J after':>9}{'J*':>8}"
        f"{'reward':>9}{'KL':>9}{'length':>12}{'ended':>7}{'ref loss':>10}"
    )
    for r in rows:
        print(
            f"{r['kind']:8}{r['beta']:6g}{r['seed']:6d}{r['rollouts']:10,}{r['start']:10.3f}"
            f"{r['objective']:9.3f}{r['roof']:8.3f}{r['reward']:9.4f}{r['kl']:9.2f}"
            f"{r['length_mean']:7.1f} ±{r['length_std']:3.0f}{r['ended']:7.0%}"
            f"{r['ref_loss']:10.3f}"
        )


def read_rows(path):
    """The rows of a CSV file as dictionaries without empty fields; numbers are floats."""
    text = {"kind", "source"}
    with open(path, newline="", encoding="utf-8") as f:
        return [
            {k: v if k in text else float(v) for k, v in row.items() if v}
            for row in csv.DictReader(f)
        ]


def frontier_figure(rows, peers):
    """The picture of reward against KL as a matplotlib Figure. A peer without reward and KL is the
    line of all points with its J = reward - β KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5), layout="constrained")
    axes = figure.add_subplot()
    width, bottom = 8.0, -1.08
    best = [r for r in rows if r["kind"] == "optimum"]
    x, y = [r["kl"] for r in best], [r["reward"] for r in best]
    axes.plot(x, y, color=GREEN, linewidth=2)
    axes.fill_between([0, *x, width], [y[0], *y, y[-1]], 0.05, color=GREEN, alpha=0.1, linewidth=0)

    def write(text, point, place=(8, -4), colour="black", **how):
        background = dict(facecolor="white", edgecolor="none", pad=0.6, alpha=0.8)
        how = {"xytext": place, "textcoords": "offset points", "color": colour, **how}
        axes.annotate(text, point, fontsize=9, bbox=background, **how)

    def title(kind, group):
        objective = sum(r["objective"] for r in group) / len(group)
        seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
        return f"{kind}, β = {group[0]['beta']:g}: J = {objective:.3f}{seeds}".replace("-", "−")

    axes.text(2.2, -0.045, "not achievable", color=GREEN, fontsize=9, style="italic")
    write("best achievable reward\nat each KL (π*)", (x[-1], y[-1]), (8, -26), GREEN)
    write("model before PPO", (0, -1.01), (8, -3))
    axes.plot(0, -1.01, "s", color="black", markersize=6, clip_on=False, zorder=3)
    chosen = [r for r in rows if r["kind"] == "best of n"]
    axes.plot(*zip(*((r["kl"], r["reward"]) for r in chosen)), "D", color=GREY, markersize=5)
    for r in chosen:
        write(f"best of {r['n']:.0f}", (r["kl"], r["reward"]), (8, -5), "#666666")
    runs = [r for r in rows if r["kind"] == "PPO" and r["beta"]]
    for beta in dict.fromkeys(r["beta"] for r in runs):
        group = [r for r in runs if r["beta"] == beta]
        points = [(r["kl"], r["reward"]) for r in group]
        axes.plot(*zip(*points), "o", color=BLUE, markersize=6)
        right = max(kl for kl, _ in points), sum(reward for _, reward in points) / len(points)
        write(title("PPO", group), right, (8, -3), BLUE, weight="bold")
    for r in (r for r in rows if r["kind"] in ("RLOO", "GRPO")):
        axes.plot(r["kl"], r["reward"], "^", color=SKY, markersize=7)
        write(title(r["kind"], [r]), (r["kl"], r["reward"]), (8, -6), SKY)
    for r in peers:
        name = title(r["kind"], [r])
        if "kl" in r:
            axes.plot(r["kl"], r["reward"], "X", color=ORANGE, markersize=8, zorder=1)
            left = r["kl"] > 0.7 * width
            leader = dict(arrowstyle="-", color=ORANGE, linewidth=0.8, relpos=(0, 1))
            how = dict(ha="right") if left else dict(arrowprops=leader)
            place = (8, -20 if left else -34)  # below our own labels
            write(name, (r["kl"], r["reward"]), place, ORANGE, **how)
            continue
        kl = [i / 100 for i in range(241)]
        line = [r["objective"] + r["beta"] * k for k in kl]
        below = [(k, v) for k, v in zip(kl, line) if v <= float(np.interp(k, [0, *x], [y[0], *y]))]
        axes.plot(*zip(*below), "--", color=ORANGE, linewidth=1.2, zorder=0)
        point = 0.4, r["objective"] + r["beta"] * 0.4
        leader = dict(arrowstyle="-", color=ORANGE, linewidth=0.8, relpos=(0, 0.5))
        write(f"{name}, somewhere on this line", point, (60, -22), ORANGE, arrowprops=leader)
    axes.annotate(
        "better: more reward, less KL",
        (5.0, -0.62),
        xytext=(5.5, -0.8),
        fontsize=10,
        arrowprops=dict(arrowstyle="-|>", linewidth=1.8, color="black"),
    )
    axes.set(
        xlabel="KL divergence from the model before PPO, nats per story (less is closer to it)",
        ylabel="reward per story, −|200 − length in tokens| / 100",
        xlim=(0, width),
        ylim=(bottom, 0.05),
    )
    axes.set_title(
        "Reward against KL (stories260K, length reward); J = reward − β KL",
        loc="left",
        weight="bold",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure


def draw(rows, path):
    """Draws the plot, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: pip install matplotlib")
        return
    frontier_figure(rows, read_rows(PEERS)).savefig(path, dpi=130)
    print(f"wrote {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="stories260K/ckpt.pt")
    parser.add_argument("--data", default="data", help="folder with the pretokenized stories")
    parser.add_argument("--out_dir", default="out/frontier", help="folder for the runs")
    parser.add_argument("--assets", default="assets", help="folder for frontier.csv and .png")
    parser.add_argument(
        "--betas",
        default="0.5,0.2,0.1,0.05,0.02",
        help="values of β; BETA:ITERS sets the iterations of one: 0.2,0:200",
    )
    parser.add_argument(
        "--group",
        default="RLOO,GRPO",
        help="methods without a critic, run at β = 0.2; may be empty",
    )
    parser.add_argument("--group_size", type=int, default=4, help="rollouts per prompt for --group")
    parser.add_argument("--seeds", type=int, default=1, help="runs per β")
    parser.add_argument("--iters", type=int, default=50, help="iterations of 200 rollouts")
    parser.add_argument(
        "--freeze_layers", type=int, default=2, help="lower layers that PPO freezes, if β > 0"
    )
    parser.add_argument(
        "--sampled_end", action="store_true", help="PPO without --exact_end --lam=0.85"
    )
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts for the optimum")
    parser.add_argument("--samples", type=int, default=256, help="reference samples per prompt")
    parser.add_argument(
        "--draw", action="store_true", help="draw frontier.png from frontier.csv, and exit"
    )
    a = parse_args(parser, argv)
    if a.draw:
        return draw(read_rows(Path(a.assets) / "frontier.csv"), Path(a.assets) / "frontier.png")
    seeds = range(1, a.seeds + 1)
    each = [beta.partition(":") for beta in a.betas.split(",")]
    each = [(float(beta), int(iters or a.iters)) for beta, _, iters in each]
    rows = [run(a, *beta_and_iters, seed) for beta_and_iters in each for seed in seeds]
    rows += [run(a, 0.2, a.iters, 1, kind) for kind in a.group.split(",") if kind]
    print_table(rows)
    scores = reference_scores(a)
    names = ("reward", "kl")
    for beta in torch.logspace(1, -2, 60).tolist():
        rows.append(dict(kind="optimum", beta=beta) | dict(zip(names, tilted(scores, beta))))
    for n in (2, 4, 16, 64):
        rows.append(dict(kind="best of n", n=n) | dict(zip(names, best_of(scores, n))))
    out = Path(a.assets)
    with write_atomic(out / "frontier.csv", "w") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
        writer.writeheader()
        for r in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()})
    draw(rows, out / "frontier.png")
    print(f"wrote {out / 'frontier.csv'}")


if __name__ == "__main__":
    run_main(main)
