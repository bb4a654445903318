"""Where stories end: the end probability by position of the reference, a policy, and the optimum.

    python experiments/endings.py --checkpoint=stories260K/ckpt.pt --policy=out/ppo_ckpt.pt

The end probability at a position is the share of the stories which have reached the position that
end there, for the length reward on held-out prompts. The optimum π* ∝ π_ref exp(r/β) is estimated
from the policy's samples y with the weights π_ref(y) exp(r/β) / π(y), normalized per prompt. The
script prints J, J* and the effective share of the samples, and writes endings.csv and, if
matplotlib is installed, endings.png to --assets.
"""

import argparse
import csv
import importlib.util
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_args, run_main, write_atomic  # noqa: E402  (first: it reports missing packages)

# isort: split
import torch  # noqa: E402

import rlhf  # noqa: E402
from checkpoint import load_checkpoint, model_from_checkpoint  # noqa: E402
from model import generate  # noqa: E402
from preferences import kl_to_reference  # noqa: E402
from report import BLUE, GREEN, GREY  # noqa: E402
from tinystories import Prompts  # noqa: E402
from tokenizer import stop_ids  # noqa: E402

LINES = (
    ("reference", GREY, "-", "model before PPO"),
    ("PPO", BLUE, "-", "after PPO"),
    ("optimum", GREEN, "--", "best achievable policy π*"),
)


def end_probability(lengths, ended, weights, edges):
    """The probability of ending per token between `edges` (n + 1 positions), a list of n numbers:
    the weight of the ends in [edges[i], edges[i + 1]) over the weight of all tokens there. lengths,
    ended, weights (B,): tokens per story, whether it ended with its last token, and its weight."""
    out = []
    for low, high in zip(edges, edges[1:]):
        ends = ended & (lengths >= low) & (lengths < high)
        tokens = (lengths.clamp(max=high - 1) - low + 1).clamp(min=0)
        out.append(float((weights * ends).sum() / (weights * tokens).sum()))
    return out


def optimum_weights(scores, log_ratios, beta):
    """The weights (prompts, samples) with which samples of a policy π stand for π*, and the log of
    their sum per prompt, from scores r and log-ratios log π(y) − log π_ref(y)."""
    logw = scores / beta - log_ratios
    return logw.softmax(1), logw.logsumexp(1)


def sample(model, prompts, seed):
    """Responses, lengths of prompt and response, whether they ended, and log π (B,) of each."""
    uniform = torch.rand(len(prompts), 300, generator=torch.Generator().manual_seed(seed))
    out = generate(model, prompts, 300, stop_ids=stop_ids(None), uniform=uniform, max_batch=512)
    lengths = torch.tensor([len(p) for p in prompts]) + out.lengths
    return out.responses(), lengths, out.ended, out.logprobs.double().sum(1)


def endings_figure(rows):
    """The picture of end probability against position as a matplotlib Figure."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8.2, 4.5), layout="constrained")).add_subplot()
    x = [float(r["position"]) for r in rows]
    for kind, colour, dashes, label in LINES:
        y = [float(r[kind]) for r in rows]
        axes.plot(x, y, dashes, color=colour, linewidth=2, label=label)
    axes.axvline(200, color=GREY, linewidth=1, linestyle=":")
    axes.annotate("highest reward", (200, 1e-4), (4, 4), textcoords="offset points", color=GREY)
    axes.set(
        xlabel="position in the story, tokens",
        ylabel="end probability per token",
        yscale="log",
        xlim=(min(x), max(x)),
    )
    axes.set_title("Where stories end (length reward, target of 200 tokens)", loc="left")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure


def draw(path):
    """Draws endings.png beside the CSV file at path, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: pip install matplotlib")
        return
    with open(path, newline="", encoding="utf-8") as f:
        figure = endings_figure(list(csv.DictReader(f)))
    figure.savefig(path.with_suffix(".png"), dpi=130)
    print(f"wrote {path.with_suffix('.png')}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="stories260K/ckpt.pt", help="the reference model")
    parser.add_argument("--policy", default="out/ppo_ckpt.pt", help="the policy that PPO trained")
    parser.add_argument("--data", default="data", help="folder with the pretokenized stories")
    parser.add_argument("--assets", default="assets", help="folder for endings.csv and .png")
    parser.add_argument("--beta", type=float, default=0.2, help="β of the optimum")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=128, help="samples per prompt and model")
    parser.add_argument(
        "--draw", action="store_true", help="draw endings.png from endings.csv, and exit"
    )
    a = parse_args(parser, argv)
    path = Path(a.assets) / "endings.csv"
    if a.draw:
        return draw(path)
    reference, policy = (
        model_from_checkpoint(load_checkpoint(path)).eval() for path in (a.checkpoint, a.policy)
    )
    prompts = Prompts(a.data, "val", 30, reference.args.vocab_size, seed=99).batch(0, a.prompts)
    prompts = [p for p in prompts for _ in range(a.samples)]
    _, lengths, ended, _ = sample(reference, prompts, 1)
    edges, equal = range(100, 301, 10), torch.ones(len(prompts), dtype=torch.double)
    columns = {"reference": end_probability(lengths, ended, equal, edges)}
    responses, lengths, ended, logprobs = sample(policy, prompts, 2)
    columns["PPO"] = end_probability(lengths, ended, equal, edges)
    scores = torch.tensor(rlhf.LengthReward(200)(prompts, responses, ended)).double()
    _, ref_logprobs = kl_to_reference(policy, reference, prompts, responses, 50)
    log_ratio = logprobs - ref_logprobs.double()
    shape = a.prompts, a.samples
    weights, log_sums = optimum_weights(scores.view(shape), log_ratio.view(shape), a.beta)
    columns["optimum"] = end_probability(lengths, ended, weights.flatten(), edges)
    j_star = a.beta * float((log_sums - math.log(a.samples)).mean())
    share = float((1 / weights.square().sum(1)).mean() / a.samples)
    objective = float((scores - a.beta * log_ratio).mean())
    print(f"J {objective:.3f}, J* {j_star:.3f}; effective share of the samples {share:.0%}")
    rows = [
        {"position": low + 5} | {kind: f"{p[i]:.4g}" for kind, p in columns.items()}
        for i, low in enumerate(edges[:-1])
    ]
    with write_atomic(path, "w") as f:
        writer = csv.DictWriter(f, ["position", *columns])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
    draw(path)


if __name__ == "__main__":
    run_main(main)
