"""Times one PPO iteration, part by part: python bench/bench_ppo.py --checkpoint=... --data=...

The work is that of the published run: 400 rollouts of at most 300 tokens after prompts of 1 to 30
tokens, 4 epochs in minibatches of 50. The first iteration, which compiles kernels.c and warms
the allocator, is not counted.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import parse_args, run_main  # noqa: E402  (first: it reports missing packages)

# isort: split
import torch  # noqa: E402

import ppo  # noqa: E402
from checkpoint import load_checkpoint, model_from_checkpoint  # noqa: E402
from model import Transformer, TransformerWithValueHead  # noqa: E402
from rlhf import LengthReward  # noqa: E402
from tinystories import Prompts  # noqa: E402
from tokenizer import stop_ids  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="out/demo/ckpt.pt")
    parser.add_argument("--data", default="data")
    parser.add_argument("--rollouts", type=int, default=400)
    parser.add_argument("--ppo_epochs", type=int, default=4)
    parser.add_argument("--value_model", default="separate", choices=("separate", "shared"))
    parser.add_argument("--iterations", type=int, default=2, help="timed ones")
    a = parse_args(parser)
    checkpoint = load_checkpoint(a.checkpoint)
    shared = a.value_model == "shared"  # one model for policy and values, as in the original
    policy = model_from_checkpoint(checkpoint, TransformerWithValueHead if shared else Transformer)
    reference = model_from_checkpoint(checkpoint).requires_grad_(False)
    critic = None if shared else model_from_checkpoint(checkpoint, TransformerWithValueHead)
    config = ppo.PPOConfig(
        rollouts=a.rollouts,
        ppo_epochs=a.ppo_epochs,
        early_stopping=False,
        critic_warmup=0,
        value_model=a.value_model,
    )
    optimizers = [m and torch.optim.Adam(m.parameters(), lr=1e-4) for m in (policy, critic)]
    models, ends = (config, policy, reference, critic), stop_ids(None)
    trainer = ppo.PPOTrainer(*models, *optimizers, nullcontext, stop_ids=ends)
    prompts = Prompts(a.data, "train", 30, policy.args.vocab_size)
    reward = LengthReward(200)
    print(f"{torch.get_num_threads()} threads")
    for i in range(a.iterations + 1):
        t0 = time.perf_counter()
        batch = prompts.batch(i * a.rollouts, a.rollouts)
        rollouts = trainer.rollout(batch, seed=i)
        t1 = time.perf_counter()
        scores = reward(rollouts.queries, rollouts.responses, rollouts.ended)
        s = trainer.step(rollouts, scores)
        if not i:
            continue
        tokens = len(rollouts.actions)
        update = s["time/ppo/optimize_step"]
        print(
            f"iteration {time.perf_counter() - t0:.2f} s | rollout {t1 - t0:.2f} s, "
            f"{tokens / (t1 - t0):,.0f} tokens/s | scoring {s['time/ppo/forward_pass']:.2f} s | "
            f"update {update:.2f} s, {tokens * a.ppo_epochs / update:,.0f} tokens/s"
        )


if __name__ == "__main__":
    run_main(main)
