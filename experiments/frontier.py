"""Reward against KL: PPO beside the best achievable frontier.

    python experiments/frontier.py --checkpoint=stories260K/ckpt.pt  # 30 minutes or more, 2 cores
    python experiments/frontier.py --checkpoint=... --betas=0.2,0.05,0:200 --seeds=5 --group=

For the length reward, on held-out prompts:
    optimum     (KL, E[r]) of π* ∝ π_ref exp(r/β) for many β, from weighted reference samples
    best of n   n = 2, 4, 16, 64, from the same samples
    PPO         runs of train.py, per β and seed; RLOO and GRPO with the same rollouts at β = 0.2
    FullLLM     the published run of the original project
Each run has a folder in --out_dir with its command. A run that already exists with the same command
is reused; one with another command is moved aside. The script prints a table and writes
frontier.csv and, if matplotlib is installed, frontier.png to --assets.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rlhf  # noqa: E402
from checkpoint import load_checkpoint, model_from_checkpoint  # noqa: E402
from common import parse_args, run_main, write_atomic  # noqa: E402
from model import generate  # noqa: E402
from tinystories import Prompts  # noqa: E402
from tokenizer import stop_ids  # noqa: E402

PUBLISHED = dict(kind="FullLLM, 49 x 400", reward=-0.367, kl=7.25)
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
    flags, common = [], FLAGS
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
            if subprocess.run(command, stdout=f, stderr=f).returncode:
                raise ValueError(f"the run failed, {folder / 'output.txt'} says why")
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


def draw(rows, path):
    """Draws the plot, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).add_subplot()
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [r for r in rows if r["kind"] == kind and r["kl"] < 8]
        style = "-" if kind == "optimum" else "o"
        axes.plot([r["kl"] for r in mine], [r["reward"] for r in mine], style, label=kind)
        seen = set()  # of several seeds, one is labelled
        for r in mine if kind != "optimum" else ():
            name = f"n={r['n']}" if "n" in r else f"β={r['beta']:g}" if "beta" in r else ""
            if name in seen:
                continue
            seen.add(name)
            axes.annotate(
                name, (r["kl"], r["reward"]), fontsize=7, xytext=(3, -8), textcoords="offset points"
            )
    axes.set(xlabel="KL to the reference, nats per story", ylabel="reward", xlim=(0, 8))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


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
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts for the optimum")
    parser.add_argument("--samples", type=int, default=256, help="reference samples per prompt")
    a = parse_args(parser, argv)
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
    rows.append(PUBLISHED)
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
