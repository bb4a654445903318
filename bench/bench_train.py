"""Speed of a pretraining step, without peers:

    python bench/bench_train.py [--threads=2] [--device=cpu] [--seconds=5]

Each line is the real training step of train.py (data, forward, backward, clipping, optimizer) for
one shape, on random tokens. MFU is relative to a matrix product measured on the same machine;
"data" is the share of the time that reading windows takes. doc/speed.md says how to time llama2.c.
"""

import argparse
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import parse_args, positive, run_main  # noqa: E402  (first: it reports missing packages)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402

SMALL = "--dim=64 --n_layers=5 --n_heads=8 --n_kv_heads=4 --multiple_of=4 --vocab_size=512"
LARGE = "--dim=288 --n_layers=6 --n_heads=6 --n_kv_heads=6 --vocab_size=32000"
HUGE = "--dim=768 --n_layers=12 --n_heads=12 --n_kv_heads=12 --vocab_size=32000"
ADAMW, MUON = "--optimizer=adamw", "--optimizer=muon"
SHAPES = [  # title, flags of train.py, whether the CPU is too slow for it
    ("260K 16 x 256, AdamW", f"{SMALL} --batch_size=16 --max_seq_len=256 {ADAMW}", False),
    ("260K 16 x 256, Muon", f"{SMALL} --batch_size=16 --max_seq_len=256 {MUON}", False),
    ("260K 8 x 256, Muon", f"{SMALL} --batch_size=8 --max_seq_len=256 {MUON}", False),
    ("260K 8 x 512, Muon", f"{SMALL} --batch_size=8 --max_seq_len=512 {MUON}", False),
    (
        "260K 32 x 512, dropout 0.05",
        f"{SMALL} --batch_size=32 --max_seq_len=512 --dropout=0.05",
        False,
    ),
    (
        "260K 128 x 512, dropout 0.05",
        f"{SMALL} --batch_size=128 --max_seq_len=512 --dropout=0.05",
        True,
    ),
    ("15M 2 x 256, AdamW", f"{LARGE} --batch_size=2 --max_seq_len=256 {ADAMW}", False),
    ("15M 128 x 256, AdamW", f"{LARGE} --batch_size=128 --max_seq_len=256 {ADAMW}", True),
    ("110M 32 x 1024, AdamW", f"{HUGE} --batch_size=32 --max_seq_len=1024 {ADAMW}", True),
]


def measure(flags, seconds):
    """Tokens per second, MFU, the share of data loading, milliseconds per step, peak FLOP/s."""
    args = train.flags(flags)
    with redirect_stdout(StringIO()):
        stage = train.Pretraining(train.setup(args), None)
    loading = 0.0
    batch = stage.train.batch

    def timed(*args):
        nonlocal loading
        t = time.perf_counter()
        out = batch(*args)
        loading += time.perf_counter() - t
        return out

    stage.train.batch = timed
    for i in range(3):
        stage.step(i)
    loading, times, start = 0.0, [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        times.append(stage.step(3 + len(times))["ms"])
    share = loading / (time.perf_counter() - start)
    ms = sorted(times)[len(times) // 2]  # the median: others may use the machine
    rate = args.batch_size * args.max_seq_len / ms * 1e3
    return rate, rate * stage.flops / stage.peak_flops, share, ms, stage.peak_flops


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench_train.py", description=__doc__)
    parser.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="CPU threads"
    )
    parser.add_argument("--device", default="", help="as in train.py")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per shape")
    args = parse_args(parser, argv)
    torch.set_num_threads(args.threads)
    device = train.choose_device(args.device)
    print(f"device {device}, {args.threads} threads, PyTorch {torch.__version__}")
    print(f"{'shape':<32} {'tokens/s':>10} {'ms/step':>9} {'MFU':>7} {'data':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for vocab in (512, 32000):
            path = Path(folder) / f"tok{vocab}"
            path.mkdir()
            ids = np.random.default_rng(0).integers(3, vocab, 2_000_000).astype("<u2")
            for shard in ("data00.bin", "data01.bin"):
                ids.tofile(path / shard)
        for title, flags, slow in SHAPES:
            if slow and device == "cpu":
                continue
            more = [f"--data={folder}", f"--out_dir={folder}", "--vocab_source=custom"]
            more += [f"--device={device}", "--eval_iters=1", "--warmup_iters=10"]
            rate, mfu, share, ms, peak_flops = measure([*flags.split(), *more], args.seconds)
            print(f"{title:<32} {rate:10,.0f} {ms:9.1f} {mfu:7.1%} {share:6.1%}", flush=True)
    print(f"peak: {peak_flops / 1e9:,.0f} GFLOP/s, a square matrix product in the same precision")
    if device == "cpu":
        print("larger shapes and bf16 are left out: they need a GPU")


if __name__ == "__main__":
    run_main(main)
