"""Reward models on pairs ranked by people, compared with chance and a bag of words.

    python experiments/preference_data.py --data=PREFERENCES.json          # a tenth is held out
    python experiments/preference_data.py --data=train.jsonl --val_data=test.jsonl  # as in hh-rlhf

Trains a tokenizer and a small model on the training part alone, fine-tunes the model on the chosen
replies, trains the reward model, and runs a few steps of DPO and of PPO against it. The baseline is
a logistic regression on the differences of word counts and length within a pair. It is trained and
measured on the pairs of the reward model, which are those that fit into the context.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_args, run_main  # noqa: E402  (first: it reports missing packages)

# isort: split
import torch  # noqa: E402

import instruct  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def words(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bag_of_words(train, val, decay=1e-2):
    """Accuracy on held-out pairs of the regression sigmoid(w · (features of better - of worse))."""
    counts = collections.Counter(w for r in train for c in r.completions for w in words(c))
    index = {w: i for i, w in enumerate(w for w, n in counts.items() if n > 1)}

    def features(records):
        x = torch.zeros(len(records), len(index) + 1)
        for row, r in zip(x, records):
            for sign, text in zip((1, -1), (r.completions[0], r.completions[-1])):
                for word, n in collections.Counter(words(text)).items():
                    if word in index:
                        row[index[word]] += sign * n**0.5
                row[-1] += sign * len(words(text)) / 100
        return x

    x = features(train)
    w = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(x @ w).mean() + decay * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(((features(val) @ w.detach()).sign() + 1).mean() / 2)


def usable(records):
    """The records with two different, non-empty replies."""
    return [r for r in records if len(set(r.completions)) > 1 and all(r.completions)]


def fitting(records, path, tokenizer, max_len):
    """The records of the file `path` that a reward model with this context is trained on."""
    rankings = instruct.Rankings(path, "all", tokenizer, instruct.TEMPLATES["plain"], max_len)
    return [r for r in records if rankings.sample(r) is not None]


def command(*flags):
    print("$", *flags, flush=True)
    if status := subprocess.run([sys.executable, str(ROOT / flags[0]), *flags[1:]]).returncode:
        sys.exit(status)  # the command has said why


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="file of rankings")
    add("--val_data", default="")
    add("--out", default="out/reward")
    add("--vocab_size", type=int, default=1024)
    add("--dim", type=int, default=128)
    add("--max_seq_len", type=int, default=128)
    add("--pretrain_iters", type=int, default=200)
    add("--sft_iters", type=int, default=50)
    add("--rm_iters", type=int, default=300)
    add("--learning_rate", type=float, default=1e-3, help="reward model: learning rate")
    add("--muon_learning_rate", type=float, default=5e-3, help="reward model: Muon's, for matrices")
    add("--seed", type=int, default=1337, help="reward model: random seed")
    add("--dropout", type=float, default=0.2, help="reward model: dropout probability")
    a = parse_args(parser)
    records = instruct.read(a.data)
    held_out = usable(
        instruct.read(a.val_data) if a.val_data else [r for r in records if instruct.held_out(r)]
    )
    train = usable(records if a.val_data else [r for r in records if not instruct.held_out(r)])
    out = Path(a.out)
    stories = out / "TinyStories_all_data"
    stories.mkdir(parents=True, exist_ok=True)
    # With what was rejected: its words are those that the reward model has to know.
    texts = [
        "\n".join([*(x for turn in r.turns for x in turn if x), c])
        for r in train
        for c in r.completions
    ]
    (stories / "text.json").write_text(json.dumps([{"story": t} for t in texts]))
    command("tinystories.py", "train_vocab", f"--vocab_size={a.vocab_size}", f"--data_dir={out}")
    command("tinystories.py", "pretokenize", f"--vocab_size={a.vocab_size}", f"--data_dir={out}")
    tokenizer = Tokenizer(str(out / f"tok{a.vocab_size}.model"))
    train = fitting(train, a.data, tokenizer, a.max_seq_len)
    held_out = fitting(held_out, a.val_data or a.data, tokenizer, a.max_seq_len)
    common = [
        f"--out_dir={out}",
        "--device=cpu",
        "--eval_iters=50",
        "--log_interval=50",
        f"--tokenizer={out}/tok{a.vocab_size}.model",
    ]
    files = [f"--data={a.data}", f"--val_data={a.val_data}"]
    command(
        "train.py",
        *common,
        f"--data={out}",
        "--vocab_source=custom",
        "--n_layers=4",
        f"--vocab_size={a.vocab_size}",
        f"--dim={a.dim}",
        "--n_heads=8",
        "--n_kv_heads=4",
        f"--max_seq_len={a.max_seq_len}",
        "--batch_size=8",
        "--optimizer=muon",
        "--learning_rate=5e-3",
        "--warmup_iters=20",
        "--dropout=0.1",
        f"--max_iters={a.pretrain_iters}",
    )
    command(
        "train.py",
        "--sft",
        *common,
        *files,
        f"--init_from={out}/ckpt.pt",
        "--batch_size=16",
        "--learning_rate=5e-4",
        "--warmup_iters=20",
        f"--max_iters={a.sft_iters}",
    )
    sft = f"--init_from={out}/sft_ckpt.pt"
    command(
        "train.py",
        "--rm",
        *common,
        *files,
        sft,
        "--batch_size=16",
        "--warmup_iters=20",
        "--optimizer=muon",
        f"--learning_rate={a.learning_rate}",
        f"--muon_learning_rate={a.muon_learning_rate}",
        f"--max_iters={a.rm_iters}",
        f"--dropout={a.dropout}",
        f"--seed={a.seed}",
        "--eval_interval=100",
        "--reference_samples=64",
        "--max_gen_len=64",
    )
    command(
        "train.py",
        "--dpo",
        *common,
        *files,
        sft,
        "--batch_size=16",
        "--warmup_iters=5",
        "--learning_rate=3e-4",
        "--max_iters=20",
        "--eval_interval=20",
        "--reference_samples=64",
        "--max_gen_len=64",
    )
    command(
        "train.py",
        "--ppo",
        *common,
        *files,
        sft,
        f"--reward={out}/rm_ckpt.pt",
        f"--value_model={out}/rm_ckpt.pt",
        "--batch_size=16",
        "--rollouts=64",
        "--ppo_iters=5",
        "--learning_rate=3e-4",
        "--max_gen_len=64",
        "--roof_prompts=8",
        "--roof_samples=8",
        "--report_rollouts=64",
    )
    log = [json.loads(line) for line in open(out / "rm_log.jsonl")]
    found = [r["rm/val/accuracy"] for r in log if "rm/val/accuracy" in r]
    longer = sum(len(r.completions[0]) > len(r.completions[-1]) for r in held_out) / len(held_out)
    print(
        f"\n{len(held_out)} held-out pairs of {a.data}: reward model {found[-1]:.1%} (at most "
        f"{max(found):.1%}), bag of words {bag_of_words(train, held_out):.1%}, the longer reply "
        f"{longer:.1%}, chance 50 %"
    )


if __name__ == "__main__":
    run_main(main)
