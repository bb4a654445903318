"""Speed of pretokenization: python bench/bench_data.py [--data_dir=data] [--vocab_size=512]

The time is that of the whole command `tinystories.py pretokenize`, from the start of Python to the
last shard, on all cores, the best of --repeat runs. --peer names a folder with llama2.c; its
command then runs alternately with ours on the same text and vocabulary and must give the same
tokens.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import parse_args, positive, run_main  # noqa: E402
from tinystories import story_files  # noqa: E402
from tokenizer import find_tokenizer  # noqa: E402


def measure(script, home, vocab_size):
    """Seconds of one run that writes all shards to home/data, and the contents of the shards."""
    t = time.perf_counter()
    command = [sys.executable, script, "pretokenize", f"--vocab_size={vocab_size}"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    seconds = time.perf_counter() - t
    shards = sorted((home / "data" / f"tok{vocab_size}").glob("*.bin"))
    if done.returncode or not shards:
        raise ValueError(f"{script} failed: {done.stderr.strip()[-300:]}")
    tokens = [path.read_bytes() for path in shards]
    for path in shards:
        path.unlink()
    return seconds, tokens


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench_data.py", description=__doc__)
    parser.add_argument("--data_dir", default="data", help="folder of stories")
    parser.add_argument("--vocab_size", type=positive, default=512, help="tokens in the vocabulary")
    parser.add_argument(
        "--tokenizer", default="", help="default: tok<vocab_size>.model in data_dir"
    )
    parser.add_argument("--peer", default="", help="folder with llama2.c's tinystories.py")
    parser.add_argument("--repeat", type=positive, default=3, help="runs, of which the best counts")
    args = parse_args(parser, argv)
    files = story_files(args.data_dir)
    if args.peer:  # it reads no other kind
        files = [path for path in files if path.endswith(".json")]
    tokenizer = args.tokenizer or find_tokenizer(args.vocab_size, args.data_dir)
    size = sum(map(os.path.getsize, files)) / 1e6
    scripts = {"here": ROOT / "tinystories.py"}
    if args.peer:
        scripts["llama2.c"] = Path(args.peer).resolve() / "tinystories.py"
    best, found = dict.fromkeys(scripts, float("inf")), {}
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        (home / "data/TinyStories_all_data").mkdir(parents=True)
        for path in files:
            (home / "data/TinyStories_all_data" / Path(path).name).symlink_to(Path(path).resolve())
        (home / f"data/tok{args.vocab_size}.model").symlink_to(Path(tokenizer).resolve())
        for name, script in [*scripts.items()] * args.repeat:
            seconds, found[name] = measure(script, home, args.vocab_size)
            best[name] = min(best[name], seconds)
    tokens = sum(map(len, found["here"])) // 2
    print(f"pretokenizing {size:.1f} MB, vocabulary {args.vocab_size}, {os.cpu_count()} cores")
    print(f"{'':<10} {'seconds':>8} {'MB/s':>8} {'tokens/s':>12}")
    for name, seconds in best.items():
        print(f"{name:<10} {seconds:8.2f} {size / seconds:8.1f} {tokens / seconds:12,.0f}")
    if args.peer:
        same = "the same tokens" if found["here"] == found["llama2.c"] else "OTHER TOKENS"
        print(f"ratio {best['llama2.c'] / best['here']:.1f}, {same}")


if __name__ == "__main__":
    run_main(main)
