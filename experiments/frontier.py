"""How much reward for how much KL: PPO against the best that is possible.

    python experiments/frontier.py --checkpoint=stories260K/ckpt.pt            # half an hour or more, 2 cores
    python experiments/frontier.py --checkpoint=... --betas=0.2,0.05,0:200 --seeds=5 --group=   # five seeds

For the length reward, on held-out prompts:
    optimum     (KL, E[r]) of π* ∝ π_ref exp(r/β) for all β, by weighting reference samples
    best of n   n = 2, 4, 16, 64, from the same samples
    PPO         runs of train.py, for each β and seed; RLOO and GRPO with as many rollouts at β = 0.2
    FullLLM     the published run of the project that this one grew out of
The runs lie in --out_dir, each with its command; one that is there already with the same command
is not done again, one with another is moved aside. A table is printed;
frontier.csv, and frontier.png where matplotlib is installed, are written to --assets.
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
    """E[r] and KL of the best of n samples, ties broken at random, means over prompts. The best has
    score r with probability F(r)^n − F(r−)^n, F the distribution of one sample's score; among
    responses of equal score the choice is that of the reference, so this alone makes the KL."""
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
    """Scores (prompts, samples) of the length reward on samples of the reference."""
    model = model_from_checkpoint(load_checkpoint(a.checkpoint))
    prompts = Prompts(a.data, "val", 30, model.args.vocab_size, seed=99).batch(0, a.prompts)
    batch = [p for p in prompts for _ in range(a.samples)]
    uniform = torch.rand(len(batch), 300, generator=torch.Generator().manual_seed(1))
    out = generate(model, batch, 300, stop_ids=stop_ids(None), uniform=uniform, max_batch=512)
    scores = rlhf.LengthReward(200)(batch, out.responses(), out.ended)
    return torch.tensor(scores, dtype=torch.float64).view(a.prompts, a.samples)


def run(a, beta, iters, seed, kind="PPO"):
    """One run of train.py, unless its very command was run already; its report as a row of the
    table."""
    # Without a reference to stay near, a short horizon would end stories too early, each alike, before
    # the critic knows better; and without some entropy a story becomes the same few words again and
    # again, which can end only where these do. Without a critic a step is noisier, so it is shorter.
    flags, common = [], FLAGS
    if not beta:
        flags = "--batch_size=25 --lam=0.95 --lam_value=1 --entropy_coef=0.002".split()
    elif kind != "PPO":
        rate = "3e-5" if kind == "GRPO" else "5e-5"
        flags = [f"--advantage={kind.lower()}", "--batch_size=100", f"--learning_rate={rate}"]
        flags += [f"--group_size={a.group_size}"]
        common = [f for f in FLAGS if not f.startswith("--value_learning_rate")]
    folder = Path(a.out_dir) / f"{kind}-{beta:g}-{seed}".lower()
    report, kept = folder / "ppo_report.json", folder / "command.txt"
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
    if report.exists() and (not kept.exists() or kept.read_text() != line):
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{folder} was run with other flags: it is now {aside}")
        folder.rename(aside)
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(line)
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
    """The plot, where matplotlib is installed."""
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
        seen = set()  # of several seeds only one is named
        for r in mine if kind != "optimum" else ():
            name = f"n={r['n']}" if "n" in r else f"β={r['beta']:g}" if "beta" in r else ""
            if name in seen:
                continue
            seen.add(name)
            axes.annotate(
                name, (r["kl"], r["reward"]), fontsize=7, xytext=(3, -8), textcoords="offset points"
            )
    axes.set(xlabel="KL to the reference, nats a story", ylabel="reward", xlim=(0, 8))
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
        help="one may name its own iterations: 0.2,0:200",
    )
    parser.add_argument(
        "--group", default="RLOO,GRPO", help="critic-free, at beta 0.2; may be empty"
    )
    parser.add_argument("--group_size", type=int, default=4, help="rollouts a prompt of theirs")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each beta")
    parser.add_argument("--iters", type=int, default=50, help="of 200 rollouts each")
    parser.add_argument("--prompts", type=int, default=64, help="held out, for the optimum")
    parser.add_argument("--samples", type=int, default=256, help="of the reference for each")
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
