"""How much reward for how much KL: PPO against the best that is possible.

    python tests/frontier.py --checkpoint=stories260K/ckpt.pt --data=data/tok512 --out=assets
    python tests/frontier.py ... --quick            # a few minutes, noisy

Draws, for the length reward and held-out prompts:
    the exact frontier   (E[r], KL) of π* ∝ π_ref exp(r/β) for all β, by weighting reference samples
    best of n            n = 2, 4, 16, 64, from the same samples
    PPO                  a run for each β; RLOO and GRPO with as many rollouts at β = 0.2
    FullLLM              the published run of the project that this one grew out of
and writes frontier.csv, and frontier.png where matplotlib is installed.
"""

import argparse
import csv
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402
from model import (  # noqa: E402
    TransformerWithValueHead,
    load_checkpoint,
    model_from_checkpoint,
)
from tinystories import Prompts  # noqa: E402

PUBLISHED = dict(kind="FullLLM, 49 x 400", reward=-0.367, kl=7.25)


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


class Lab:
    """The model, the prompts and the reward, and what is done with them."""

    def __init__(self, a):
        self.args, self.checkpoint = a, load_checkpoint(a.checkpoint)
        self.reference = model_from_checkpoint(self.checkpoint).requires_grad_(False)
        vocab = self.reference.args.vocab_size
        self.train = Prompts(a.data, "train", 30, vocab, seed=a.seed)
        self.held_out = Prompts(a.data, "val", 30, vocab, seed=99)
        self.reward = ppo.LengthReward(200)

    def trainer(self, **settings):
        """A trainer whose learning rates rise for 10 steps and then fall to 0 along a line."""
        a = self.args
        config = ppo.PPOConfig(rollouts=a.rollouts, mini_batch_size=50, **settings)
        policy, critic = model_from_checkpoint(self.checkpoint), None
        if config.advantage == "gae":
            critic = model_from_checkpoint(self.checkpoint, TransformerWithValueHead)
        rates = [(policy, a.learning_rate), (critic, a.value_learning_rate)]
        optimizers = [
            m and torch.optim.Adam(m.parameters(), lr=rate, betas=(0.9, 0.99)) for m, rate in rates
        ]
        return ppo.PPOTrainer(config, policy, self.reference, critic, *optimizers, nullcontext)

    def align(self, iters, **settings):
        """One PPO run; returns reward and exact KL of the result on held-out prompts."""
        t0, trainer = time.time(), self.trainer(**settings)
        steps, c = 0, trainer.config
        peaks = self.args.learning_rate, self.args.value_learning_rate

        def schedule(*_):
            nonlocal steps
            steps += 1
            scale = min(1.0, steps / 10) * (1 - trainer.iteration / iters)
            for o, peak in zip((trainer.optimizer, trainer.critic_optimizer), peaks):
                for group in o.param_groups if o else ():
                    group["lr"] = peak * scale

        trainer.optimizer.register_step_pre_hook(schedule)
        for i in range(iters):
            n = c.rollouts // c.group_size
            prompts = [p for p in self.train.batch(i * n, n) for _ in range(c.group_size)]
            queries, responses, logprobs, ended = trainer.rollout(prompts, self.args.seed + i)
            scores = self.reward(queries, responses, ended)
            trainer.step(queries, responses, logprobs, scores, ended)
        reward, kl = self.measure(trainer)
        print(f"{settings}: reward {reward:.3f}, KL {kl:.2f}, {time.time() - t0:.0f} s", flush=True)
        return reward, kl

    @torch.no_grad()
    def measure(self, trainer):
        n, size, kl = self.args.evaluate, 64, 0.0
        prompts = self.held_out.batch(0, n)
        queries, responses, _, ended = trainer.rollout(prompts, seed=4242)
        for i in range(0, n, size):
            p = ppo.pack(queries[i : i + size], responses[i : i + size], "cpu")
            logp, ref = (
                m(p.tokens, lengths=p.lengths)[p.action].log_softmax(-1)
                for m in (trainer.policy, self.reference)
            )
            kl += float(ppo.exact_kl(logp, ref).sum()) / n
        return sum(self.reward(queries, responses, ended)) / n, kl

    def reference_scores(self, prompts, samples):
        """Scores (prompts, samples) of reference samples."""
        trainer = self.trainer(advantage="reinforce")
        batch = [p for p in self.held_out.batch(0, prompts) for _ in range(samples)]
        queries, responses, _, ended = trainer.rollout(batch, seed=1)
        scores = torch.tensor(self.reward(queries, responses, ended), dtype=torch.float64)
        return scores.view(prompts, samples)


def draw(rows, path):
    """The plot, where matplotlib is installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [r for r in rows if r["kind"] == kind]
        x, y = [r["kl"] for r in mine], [r["reward"] for r in mine]
        axes.plot(x, y, "-" if kind == "frontier" else "o", label=kind)
        for r in mine if kind != "frontier" else ():
            name = f"n={r['n']}" if r.get("n") else f"β={r['beta']}" if r.get("beta") else ""
            axes.annotate(name, (r["kl"], r["reward"]), fontsize=7, xytext=(3, -8),
                          textcoords="offset points")  # fmt: skip
    axes.set(xlabel="KL to the reference, nats a story", ylabel="reward", xlim=(0, 8))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="stories260K/ckpt.pt")
    parser.add_argument("--data", default="data/tok512", help="folder of pretokenized shards")
    parser.add_argument("--out", default="assets")
    parser.add_argument("--betas", default="0.5,0.2,0.1,0.05,0.02")
    parser.add_argument("--iters", type=int, default=40)
    parser.add_argument("--rollouts", type=int, default=200, help="an iteration")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--value_learning_rate", type=float, default=1e-3)
    parser.add_argument("--evaluate", type=int, default=1024, help="held-out rollouts")
    parser.add_argument("--prompts", type=int, default=64, help="held out, for the frontier")
    parser.add_argument("--samples", type=int, default=256, help="of the reference for each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="2 betas, 10 iterations")
    a = parser.parse_args()
    if a.quick:
        a.betas, a.iters, a.evaluate, a.prompts = "0.2,0.05", 10, 256, 16
    lab, rows = Lab(a), []
    scores = lab.reference_scores(a.prompts, a.samples)
    for beta in torch.logspace(1, -2, 60).tolist():
        reward, kl = tilted(scores, beta)
        rows.append(dict(kind="frontier", beta=round(beta, 4), reward=reward, kl=kl))
    for n in (2, 4, 16, 64):
        reward, kl = best_of(scores, n)
        rows.append(dict(kind="best of n", n=n, reward=reward, kl=kl))
    rows.append(PUBLISHED)
    for beta in map(float, a.betas.split(",")):
        reward, kl = lab.align(a.iters, init_kl_coef=beta)
        rows.append(dict(kind="PPO", beta=beta, reward=reward, kl=kl))
    for kind in ("rloo", "grpo"):
        reward, kl = lab.align(a.iters, init_kl_coef=0.2, advantage=kind, group_size=4)
        rows.append(dict(kind=kind.upper(), beta=0.2, reward=reward, kl=kl))
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "frontier.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["kind", "beta", "n", "reward", "kl"])
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows
        )
    draw(rows, out / "frontier.png")
    print(f"wrote {out / 'frontier.csv'}")


if __name__ == "__main__":
    main()
