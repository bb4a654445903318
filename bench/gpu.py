"""Speed on a GPU, one section per call; bench/gpu.sh runs all sections within 15 minutes.

    python bench/gpu.py pretraining --shape=110M [--llama2c=FOLDER]
    python bench/gpu.py ppo                          # one iteration of 400 rollouts, 4 epochs
    python bench/gpu.py rollouts --shape=1.1B        # sampling alone
    python bench/gpu.py lora                         # a step of LoRA on 1.1B parameters

Weights and tokens are random, so nothing has to be downloaded. FOLDER is a checkout of llama2.c,
whose train.py is then timed on the same tokens and shape. With --quick the shapes are tiny and the
figures meaningless, and --device=cpu, or the simulated device of the tests, can run every section.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import parse_args, run_main  # noqa: E402  imported before torch

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_train import measure  # noqa: E402

import ppo  # noqa: E402
from checkpoint import choose_device, halve_frozen  # noqa: E402
from kernels import accelerate  # noqa: E402
from model import ModelArgs, Transformer, TransformerWithValueHead, generate  # noqa: E402
from sft import add_lora  # noqa: E402

SHAPES = {
    "260K": dict(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=4),
    "15M": dict(dim=288, n_layers=6, n_heads=6, n_kv_heads=6, vocab_size=32000, multiple_of=32),
    "110M": dict(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, vocab_size=32000, multiple_of=32),
    "1.1B": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000)
    | dict(multiple_of=256, hidden_dim=5632),
}
BATCHES = {"260K": (128, 512), "15M": (128, 256), "110M": (32, 1024)}  # sequences, tokens each


def model_args(options, context):
    """The ModelArgs of --shape; with --quick two layers of width 64."""
    args = ModelArgs(**SHAPES[options.shape], max_seq_len=context)
    few = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=512)
    return replace(args, **few) if options.quick else args


def build(options, context, cls=Transformer):
    """A model with random weights, as fast as in a run, on the CPU."""
    torch.manual_seed(0)
    return accelerate(cls(model_args(options, context)))


def compiled(options, model, decoding=False):
    """Sets what a run compiles by default on cuda: forward passes, and generation if `decoding`."""
    on = options.device != "cpu" and options.compile != "False"
    model.compiled_hidden, model.compiled_decoding = on, on and decoding
    return model


def autocast(options):
    """That of a run with the default --dtype: PPO of small models is in float32."""
    small = SHAPES[options.shape]["dim"] <= 288 or options.device == "cpu"
    kind = options.device.partition(":")[0]
    return nullcontext() if small else torch.autocast(kind, torch.bfloat16)


def clock(options):
    """Seconds, after all work of the GPU is done."""
    if options.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(options, name, figure, peer=""):
    """Prints one row of the table."""
    gpu = options.device != "cpu"
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if gpu else ""
    print(f"{name:<34} {figure:<44} {memory:>10} {peer}".rstrip(), flush=True)


# ----------------------------------------------------------------------------
# sections


def pretraining(options):
    """Tokens/s and MFU of train.py, and tokens/s of llama2.c's train.py."""
    batch, length = (2, 32) if options.quick else BATCHES[options.shape]
    args = model_args(options, length)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "data" / f"tok{args.vocab_size}"
        shards.mkdir(parents=True)
        ids = np.random.default_rng(0).integers(3, args.vocab_size, 2_000_000).astype("<u2")
        for name in ("data00.bin", "data01.bin"):
            ids.tofile(shards / name)
        names = "dim n_layers n_heads n_kv_heads vocab_size".split()
        flags = [f"--{n}={getattr(args, n)}" for n in names]
        flags += [f"--max_seq_len={length}", f"--batch_size={batch}", "--vocab_source=custom"]
        flags += [f"--multiple_of={SHAPES[options.shape]['multiple_of']}", "--eval_iters=1"]
        ours = [*flags, f"--device={options.device}", f"--data={folder}/data"]
        ours += [f"--out_dir={folder}/out", "--warmup_iters=10"]
        ours += [] if options.compile is None else [f"--compile={options.compile}"]
        rate, mfu, _, ms, peak = measure(ours, 0.1 if options.quick else 10)
        peer = llama2c(options, folder, flags, batch * length) if options.llama2c else None
    beside = f"llama2.c {peer:,.0f} tokens/s, ratio {rate / peer:.2f}" if peer else ""
    figure = f"{rate:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:,.3g} TFLOP/s"
    show(options, f"pretraining {options.shape}, {batch} x {length}", figure, beside)


def llama2c(options, folder, flags, tokens):
    """Tokens/s of llama2.c's train.py, from the median of the times that it prints."""
    home = Path(options.llama2c).resolve()
    if not (home / "train.py").exists():
        raise ValueError(f"--llama2c={home}: there is no train.py")
    for path in home.glob("*.py"):  # it reads data/ in the working directory
        (Path(folder) / path.name).symlink_to(path)
    gpu, steps = options.device != "cpu", 8 if options.quick else 60
    flags = [*flags, f"--device={options.device}", f"--dtype={'bfloat16' if gpu else 'float32'}"]
    flags += [f"--compile={gpu and options.compile != 'False'}", f"--max_iters={steps}"]
    flags += ["--out_dir=peer", "--eval_interval=100000", "--log_interval=1"]
    flags += ["--gradient_accumulation_steps=1", "--always_save_checkpoint=False"]
    done = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=folder, capture_output=True, text=True
    )
    times = [float(x) for x in re.findall(r"\| ([\d.]+)ms", done.stdout)][steps // 2 :]
    if done.returncode or not times:
        raise ValueError(f"llama2.c's train.py failed: {done.stderr.strip()[-300:]}")
    return tokens / sorted(times)[len(times) // 2] * 1e3


def prompts(options, n):
    """n prompts of BOS and 0 to 29 random tokens, as PPO has."""
    g = np.random.default_rng(0)
    vocab = model_args(options, 64).vocab_size
    return [[1, *g.integers(3, vocab, g.integers(0, 30)).tolist()] for _ in range(n)]


def rollouts(options):
    """Responses/s of `generate`; random weights do not end a response."""
    length, n = (
        (8, 4) if options.quick else (256, {"1.1B": 64, "110M": 256}.get(options.shape, 512))
    )
    model = build(options, 512).requires_grad_(False)
    if options.device != "cpu":
        halve_frozen(
            [model], torch.bfloat16 if SHAPES[options.shape]["dim"] > 288 else torch.float32
        )
    compiled(options, model.to(options.device).eval(), decoding=True)
    for _ in range(2):  # the first compiles
        start = clock(options)
        with autocast(options):
            out = generate(model, prompts(options, n), length, stop_ids=[], max_batch=512)
        seconds = clock(options) - start
    tokens = int(out.lengths.sum())
    figure = f"{n / seconds:,.1f} rollouts/s, {tokens / seconds:,.0f} tokens/s"
    show(options, f"rollouts {options.shape}, {n} x {length} tokens", figure)


def ppo_iteration(options):
    """Seconds of a PPO iteration of the published run: 400 rollouts of up to 300 tokens, 4 epochs
    in minibatches of 50, a separate critic."""
    n, length = (4, 8) if options.quick else (400, 300)
    torch.backends.cuda.matmul.allow_tf32 = False
    policy, reference = (build(options, 512).to(options.device) for _ in range(2))
    critic = build(options, 512, TransformerWithValueHead).to(options.device)
    config = ppo.PPOConfig(rollouts=n, ppo_epochs=4, early_stopping=False, max_gen_len=length)
    config.mini_batch_size = min(50, n)
    for model in policy, reference, critic:
        compiled(options, model, decoding=model is policy)
    optimizers = (torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (policy, critic))
    models = policy, reference.requires_grad_(False), critic, *optimizers
    trainer = ppo.PPOTrainer(config, *models, lambda: autocast(options), stop_ids=(1, 2))
    for i in range(2 if options.quick else 4):
        start = clock(options)
        batch = trainer.rollout(prompts(options, n), seed=i)
        middle = clock(options)
        stats = trainer.step(batch, [-abs(200 - len(r)) / 100 for r in batch.responses])
        seconds = clock(options) - start
    update = stats["time/ppo/optimize_step"]
    figure = f"{seconds:.2f} s, rollout {middle - start:.2f} s, update {update:.2f} s"
    show(options, f"PPO {options.shape}, {n} rollouts", figure)


def lora(options):
    """Milliseconds of a LoRA step on packed text, and the memory that it takes."""
    options.shape = "1.1B"
    S, T, steps = (2, 16, 2) if options.quick else (8, 512, 8)
    model = add_lora(build(options, 512), 8)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    halve_frozen([model], dtype)
    compiled(options, model.to(options.device).train())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    lengths = [T - i % 8 for i in range(S)]
    tokens = torch.randint(3, model.args.vocab_size, (sum(lengths),)).to(options.device)
    times = []
    for _ in range(steps):
        start = clock(options)
        with autocast(options):
            model(tokens, tokens, lengths=lengths).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock(options) - start)
    ms = sorted(times)[len(times) // 2] * 1e3
    figure = f"{ms:,.0f} ms, {sum(lengths) / ms * 1e3:,.0f} tokens/s"
    show(options, f"LoRA step 1.1B, {S} x {T}", figure)


SECTIONS = dict(pretraining=pretraining, rollouts=rollouts, ppo=ppo_iteration, lora=lora)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("section", choices=SECTIONS, help="what to measure")
    parser.add_argument("--shape", default="260K", choices=SHAPES, help="size of the model")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument(
        "--llama2c", default=os.environ.get("LLAMA2C", ""), help="checkout of llama2.c"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the script")
    parser.add_argument("--compile", default=None, choices=("True", "False"), help="as in train.py")
    options = parse_args(parser, argv)
    options.device = choose_device(options.device)
    if options.section == "pretraining" and options.shape not in BATCHES:
        raise ValueError(f"pretraining has the shapes {', '.join(BATCHES)}")
    SECTIONS[options.section](options)


if __name__ == "__main__":
    run_main(main)
