"""The effect of each stage of `make rlhf`, and the over-optimisation of a reward model.

    python experiments/story_task.py out/rlhf                     # the table: start, SFT, PPO, DPO
    python experiments/story_task.py out/rlhf --overoptimise      # gold and proxy rewards
    python experiments/story_task.py --draw                       # overoptimisation.png alone

The gold reward is the rule of instruct.py's story task; the proxy is the reward model. The second
command trains reward models on few and on many rankings and optimises against them, by best of n
and by PPO without a KL penalty (Gao et al., "Scaling laws for reward model overoptimization",
2022). It writes overoptimisation.json and, if matplotlib is installed, the plot.
"""

import argparse
import importlib.util
import json
import math
import random
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import parse_args, run_main, write_atomic  # noqa: E402  (first: it reports missing packages)

# isort: split
import torch  # noqa: E402

import instruct  # noqa: E402
import rlhf  # noqa: E402
import train  # noqa: E402
from checkpoint import load_checkpoint, model_from_checkpoint  # noqa: E402
from model import generate  # noqa: E402
from preferences import kl_to_reference  # noqa: E402
from report import BLUE, GREY, ORANGE  # noqa: E402
from tokenizer import Tokenizer, find_tokenizer, stop_ids  # noqa: E402


class Lab:
    """Held-out prompts, the SFT model as the reference model, the gold reward and a proxy."""

    def __init__(self, a):
        self.args, self.folder = a, Path(a.folder)
        self.checkpoint = load_checkpoint(self.folder / "sft_ckpt.pt")
        self.reference = model_from_checkpoint(self.checkpoint).eval()
        vocab = self.reference.args.vocab_size
        self.tokenizer = Tokenizer(find_tokenizer(vocab, a.folder))
        self.template = instruct.find_template("", self.checkpoint, self.tokenizer)
        texts = [r.turns[-1][0] for r in instruct.read(f"{a.task}/val.jsonl")]
        self.texts = list(dict.fromkeys(texts))[: a.prompts]

    def proxy(self, path):
        """A reward model as a function of lists of prompts and responses, both ids."""
        template = self.checkpoint["template"]
        scorer = rlhf.load_reward_model(path, self.reference.args, template)
        model = rlhf.ModelReward(scorer, "cpu", False, 64, nullcontext)
        return lambda prompts, responses: torch.tensor(model(prompts, responses, None))

    def sample(self, model, n=1):
        """n replies per prompt: (prompt texts, prompt ids, response ids, whether each ended)."""
        texts = [t for t in self.texts for _ in range(n)]
        prompts = [self.template.prompt(self.tokenizer, [(t, None)]) for t in texts]
        random_numbers = torch.Generator().manual_seed(self.args.seed)
        room = model.args.max_seq_len - max(map(len, prompts))
        uniform = torch.rand(len(prompts), room, generator=random_numbers)
        stop = stop_ids(self.tokenizer, self.template, self.checkpoint.get("end_ids"))
        out = generate(model, prompts, room, stop_ids=stop, uniform=uniform)
        return texts, prompts, out.responses(), out.ended

    def gold(self, texts, responses):
        replies = [self.tokenizer.decode(r).strip() for r in responses]
        return torch.tensor(instruct.gold(texts, replies)), replies

    def table(self):
        """One row of results on the held-out prompts per model. Errors are standard errors over
        prompts, because the replies to one prompt are not independent of each other."""
        proxy, rows = self.proxy(self.folder / "rm_ckpt.pt"), []
        means = {}  # model -> mean gold reward of the replies to each prompt
        for name in ("", "sft_", "ppo_", "dpo_"):
            path = self.folder / f"{name}ckpt.pt"
            if not path.exists():
                continue
            model = model_from_checkpoint(load_checkpoint(path)).eval()
            texts, prompts, responses, ended = self.sample(model, self.args.replies)
            gold, replies = self.gold(texts, responses)
            means[name] = gold.view(len(self.texts), -1).mean(1)
            kl, _ = kl_to_reference(model, self.reference, prompts, responses, 64)
            parts = [instruct.judge(t, r) for t, r in zip(texts, replies)]
            n = len(texts)
            rows.append(
                {
                    "model": {"": "start", "sft_": "SFT", "ppo_": "PPO", "dpo_": "DPO"}[name],
                    "all_words": sum(p[0] == 1 for p in parts) / n,
                    "words": sum(p[0] for p in parts) / n,
                    "ending": sum(p[1] for p in parts) / n,
                    "length": sum(p[2] for p in parts) / n,
                    "gold": float(gold.mean()),
                    "gold_error": standard_error(means[name]),
                    "proxy": float(proxy(prompts, responses).mean()),
                    "kl": float(kl.mean()),
                    "ended": float(ended.float().mean()),
                    "story": f"{texts[0]}\n{replies[0]}",
                }
            )
        for row, x in zip(rows, means.values()):
            gain = x - means["sft_"]  # with the error of the difference: the prompts are the same
            row |= {"gain": float(gain.mean()), "gain_error": standard_error(gain)}
        return rows


def standard_error(x):
    return float(x.std()) / math.sqrt(len(x))


def print_table(rows, folder, n, replies):
    log = [json.loads(line) for line in open(Path(folder) / "rm_log.jsonl")]
    right = [r["rm/val/accuracy"] for r in log if "rm/val/accuracy" in r][-1]
    print(
        f"\n{n} held-out prompts, {replies} replies to each; the reward model agrees with the gold "
        f"rule on {right:.1%} of the held-out pairs\n"
    )
    print(
        "         all words   words  ending  length    gold           over SFT        proxy   "
        "KL to SFT  ended"
    )
    for r in rows:
        print(
            f"  {r['model']:6} {r['all_words']:9.1%} {r['words']:7.1%} {r['ending']:7.1%} "
            f"{r['length']:7.1%}   {r['gold']:.3f} ±{r['gold_error']:.3f}  {r['gain']:+.3f} "
            f"±{r['gain_error']:.3f}  {r['proxy']:6.2f} {r['kl']:10.2f}  {r['ended']:6.1%}"
        )
    for r in rows[1:]:
        print(f"\n  {r['model']}: " + " ".join(r["story"].split()))
    print()


# ----------------------------------------------------------------------------
# over-optimisation


def best_of(proxy, gold, n):
    """Mean proxy and gold scores of the sample with the best proxy score of n. From scores
    (prompts, N), each sample is the best of n with probability (rank^n - (rank - 1)^n) / N^n."""
    order = proxy.argsort(1)
    N = proxy.shape[1]
    rank = torch.arange(1, N + 1, dtype=torch.float64) / N
    weight = rank**n - (rank - 1 / N) ** n
    return [float((x.double().gather(1, order) * weight).sum(1).mean()) for x in (proxy, gold)]


def reward_model(lab, pairs):
    """Trains a reward model on `pairs` rankings (0: all of them); returns its path."""
    a, out = lab.args, lab.folder / f"rm{pairs}"
    path, records = out / "rm_ckpt.pt", (lab.folder / "pairs.jsonl").read_text().splitlines(True)
    random.Random(a.seed).shuffle(records)
    chosen = records[200:][: pairs or None]
    iterations = max(len(chosen) // 2, 100)
    if not (path.exists() and load_checkpoint(path)["iter_num"] == iterations):
        out.mkdir(exist_ok=True)
        (out / "pairs.jsonl").write_text("".join(chosen))
        (out / "val.jsonl").write_text("".join(records[:200]))
        status = train.main(
            [
                "--rm",
                f"--out_dir={out}",
                f"--init_from={lab.folder}/sft_ckpt.pt",
                "--device=cpu",
                f"--data={out}/pairs.jsonl",
                f"--val_data={out}/val.jsonl",
                "--batch_size=8",
                f"--max_iters={iterations}",
                "--eval_interval=1000",
                "--optimizer=muon",
                "--learning_rate=1e-3",
                "--muon_learning_rate=3e-3",
                "--beta2=0.99",
                "--weight_decay=0.1",
                "--warmup_iters=10",
                "--eval_iters=20",
                "--log_interval=50",
            ]
        )
        if status:  # interrupted
            sys.exit(status)
    return path


def push(lab, path, iterations):
    """PPO without a KL penalty: KL, proxy and gold score of each iteration's rollouts."""
    a = lab.args
    args = train.flags(
        [
            "--ppo",
            f"--out_dir={path.parent}",
            f"--init_from={lab.folder}/sft_ckpt.pt",
            f"--data={a.task}/sft.jsonl",
            f"--val_data={a.task}/val.jsonl",
            f"--reward={path}",
            f"--value_model={path}",
            "--device=cpu",
            "--batch_size=50",
            "--rollouts=200",
            f"--ppo_iters={iterations}",
            "--init_kl_coef=0",
            "--learning_rate=1e-3",
            "--value_learning_rate=1e-3",
            "--beta2=0.99",
            "--weight_decay=0",
            "--decay_lr=False",
            "--roof_prompts=1",
            "--roof_samples=1",
            "--target_kl=1",
            "--max_gen_len=440",
        ]
    )
    stage = train.start(train.setup(args))
    proxy, points = stage.reward, []

    def both(prompts, responses, ended):
        asked = [stage.decode(p).strip() for p in prompts]
        points.append({"gold": float(lab.gold(asked, responses)[0].mean())})
        return proxy(prompts, responses, ended)

    stage.reward = both
    for i in range(iterations):
        stats = stage.step(i)
        points[-1] |= {"kl": stats["ppo/kl_ref"], "proxy": stats["ppo/reward"]}
        print(
            f"{i:4d} | KL {stats['ppo/kl_ref']:6.2f} | proxy {stats['ppo/reward']:.3f} | "
            f"gold {points[-1]['gold']:.3f}",
            flush=True,
        )
    return points


def overoptimise(lab):
    a = lab.args
    texts, prompts, responses, _ = lab.sample(lab.reference, a.samples)
    gold = lab.gold(texts, responses)[0].view(-1, a.samples)
    mean, std = float(gold.mean()), float(gold.std()) or 1.0
    curves = []
    for pairs in a.pairs:
        path = reward_model(lab, pairs)
        log = [json.loads(line) for line in open(path.with_name("rm_log.jsonl"))]
        proxy = lab.proxy(path)(prompts, responses).view(-1, a.samples)
        found = []
        for n in (2**i for i in range(a.samples.bit_length())):
            p, g = best_of(proxy, gold, n)
            kl = math.log(n) - (n - 1) / n
            found.append({"n": n, "kl": kl, "proxy": p, "gold": (g - mean) / std})
        pushed = push(lab, path, a.iterations) if pairs == a.pairs[0] else []
        for p in pushed:
            p["gold"] = (p["gold"] - mean) / std
        accuracy = [r["rm/val/accuracy"] for r in log if "rm/val/accuracy" in r][-1]
        curves.append({"rankings": pairs, "accuracy": accuracy, "best_of": found, "ppo": pushed})
        print(f"{pairs} rankings: {accuracy:.1%} of the held-out pairs")
    out = Path(a.out)
    with write_atomic(out / "overoptimisation.json", "w") as f:
        json.dump({"gold_mean": mean, "gold_std": std, "curves": curves}, f, indent=1)
    draw(curves, out / "overoptimisation.png")


def overoptimisation_figure(curves):
    """The picture of overoptimisation.json as a matplotlib Figure: one diagram per reward model for
    best of n, and one for PPO. In all of them the proxy reward is orange and gold is blue."""
    from matplotlib.figure import Figure

    ppo = [c for c in curves if c["ppo"]]
    n = len(curves) + len(ppo)
    figure = Figure(figsize=(3.1 * n + 0.4, 3.6), layout="constrained")
    every = figure.subplots(1, n, sharey=True, squeeze=False)[0]

    def draw_pair(axes, x, points, title):
        for name, colour, style in (("proxy", ORANGE, "--"), ("gold", BLUE, "-")):
            y = [p[name] for p in points]
            axes.plot(x, y, style, color=colour, linewidth=1.8)
            kind = "proxy: the reward model" if name == "proxy" else "gold: the true rule"
            # Beside the right half of the curve; below it where gold has fallen.
            right = y[len(y) // 2 :]
            low = name == "gold" and y[-1] < 0
            height, side = (min(right) - 0.08, "top") if low else (max(right) + 0.08, "bottom")
            axes.text(x[-1], height, kind, color=colour, fontsize=9, ha="right", va=side)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)

    for axes, c in zip(every, curves):
        points = c["best_of"]
        title = (
            f"best of n, {c['rankings'] or 'all'} rankings\n{c['accuracy']:.0%} of new pairs right"
        )
        draw_pair(axes, range(len(points)), points, title)
        axes.set_xticks(range(len(points)), [p["n"] for p in points])
        axes.set_xlabel("n, samples per prompt")
    for axes, c in zip(every[len(curves) :], ppo):
        points = c["ppo"]
        draw_pair(
            axes,
            range(len(points)),
            points,
            f"PPO without KL penalty,\nreward model of {c['rankings'] or 'all'} rankings",
        )
        best = max(range(len(points)), key=lambda i: points[i]["gold"])
        for i in sorted({best, len(points) - 1}):
            axes.plot(i, points[i]["gold"], "o", color=BLUE, markersize=5)
            axes.annotate(
                f"KL {points[i]['kl']:.0f} nats",
                (i, points[i]["gold"]),
                xytext=(6 if i == best else 0, 6 if i == best else 9),
                textcoords="offset points",
                color=BLUE,
                fontsize=8,
                ha="left" if i == best else "right",
            )
        axes.set_xlabel("PPO iteration")
    low, high = every[0].get_ylim()
    every[0].set_ylim(low - 0.25, high + 0.3)  # room for the names of the curves
    every[0].set_ylabel("score, standard deviations above SFT")
    return figure


def draw(curves, path):
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: pip install matplotlib")
        return
    overoptimisation_figure(curves).savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "folder", nargs="?", default="out/rlhf", help="output folder of `make rlhf`"
    )
    parser.add_argument("--task", default="data/task", help="folder of the story task")
    parser.add_argument(
        "--prompts", type=int, default=500, help="maximum number of held-out prompts"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--overoptimise", action="store_true")
    parser.add_argument(
        "--pairs",
        type=lambda s: [int(x) for x in s.split(",")],
        default=[100, 400, 1600],
        help="numbers of rankings, one reward model each; PPO runs against the first",
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="samples of the SFT model per prompt"
    )
    parser.add_argument(
        "--replies", type=int, default=8, help="replies of each model per prompt, in the table"
    )
    parser.add_argument("--iterations", type=int, default=40, help="PPO iterations")
    parser.add_argument("--out", default="assets", help="folder for the results of --overoptimise")
    parser.add_argument(
        "--draw", action="store_true", help="draw overoptimisation.png from its .json, and exit"
    )
    args = parse_args(parser)
    if args.draw:
        found = json.loads((Path(args.out) / "overoptimisation.json").read_text())
        return draw(found["curves"], Path(args.out) / "overoptimisation.png")
    lab = Lab(args)
    torch.set_grad_enabled(lab.args.overoptimise)
    if lab.args.overoptimise:
        return overoptimise(lab)
    rows = lab.table()
    with write_atomic(lab.folder / "rlhf.json", "w") as f:
        json.dump(rows, f, indent=1)
    print_table(rows, lab.folder, len(lab.texts), args.replies)


if __name__ == "__main__":
    run_main(main)
