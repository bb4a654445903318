"""serve.py compared with `generate`: tokens per second of clients that ask at the same time.

    python bench/bench_serve.py --checkpoint=stories260K/ckpt.pt

`generate` continues one prompt in as many rows as there are clients. The server receives the same
prompt from clients in this process; each client sends its next request when it has the response to
the last one. The server is measured with whole responses and with streams. The three measurements
take turns, --repeat times. Equal seeds give equal tokens, so that all three do the same work. CPU
time is that of all threads of the process that generates. The table has medians.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_args, positive, run_main  # noqa: E402  (first: it reports missing packages)

# isort: split
import torch  # noqa: E402

from checkpoint import load_checkpoint, model_from_checkpoint  # noqa: E402
from model import generate  # noqa: E402
from tokenizer import own_tokenizer, stop_ids  # noqa: E402

PROMPT, REQUESTS = "Once upon a time", 20  # requests per client and measurement


class Generate:
    """`generate` on the rows of one request per client at a time, in this process."""

    def __init__(self, a):
        checkpoint = load_checkpoint(a.checkpoint)
        tokenizer = own_tokenizer(checkpoint, a.checkpoint, "")
        self.model = model_from_checkpoint(checkpoint, dropout=0.0).eval()
        self.prompts = [tokenizer.encode(PROMPT, bos=True, eos=False)] * a.clients
        self.stops, self.tokens = stop_ids(tokenizer, None, checkpoint.get("end_ids")), a.tokens

    def __call__(self):
        n = 0
        for i in range(REQUESTS):
            seeds = range(i * len(self.prompts), (i + 1) * len(self.prompts))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            uniform = torch.stack([torch.rand(self.tokens, generator=g) for g in generators])
            how = dict(stop_ids=self.stops, uniform=uniform)
            n += int(generate(self.model, self.prompts, self.tokens, **how).lengths.sum())
        return n

    def cpu(self):
        return time.process_time()


class Server:
    """serve.py in a process of its own, and its clients in threads of this one."""

    def __init__(self, a):
        command = [sys.executable, ROOT / "serve.py", f"--checkpoint={a.checkpoint}", "--port=0"]
        command += ["--device=cpu", f"--max_batch={a.clients}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.clients, self.tokens = a.clients, a.tokens

    def wait(self):
        """Waits for the line with the port."""
        if not (found := re.search(r":(\d+)/", self.process.stdout.readline())):
            raise ValueError("serve.py did not start")
        self.port = int(found[1])

    def client(self, k, stream):
        connection, n = http.client.HTTPConnection("127.0.0.1", self.port), 0
        for i in range(REQUESTS):
            body = dict(prompt=PROMPT, max_tokens=self.tokens, seed=i * self.clients + k)
            body |= dict(stream=stream, stream_options={"include_usage": True}) if stream else {}
            connection.request("POST", "/v1/completions", json.dumps(body))
            text = connection.getresponse().read()
            if stream:  # the last event but [DONE] has the usage
                text = text.split(b"\n\n")[-3].removeprefix(b"data: ")
            n += json.loads(text)["usage"]["completion_tokens"]
        return n

    def __call__(self, stream):
        with ThreadPoolExecutor(self.clients) as pool:
            return sum(pool.map(lambda k: self.client(k, stream), range(self.clients)))

    def cpu(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="out/demo/ckpt.pt")
    parser.add_argument("--clients", type=positive, default=16, help="clients at a time")
    parser.add_argument(
        "--tokens", type=positive, default=256, help="new tokens per request at most"
    )
    parser.add_argument("--repeat", type=positive, default=7, help="measurements of each")
    a = parse_args(parser, argv)
    here, server = Generate(a), Server(a)
    ways = {
        "generate": (here, here),
        "serve.py, whole responses": (server, lambda: server(False)),
        "serve.py, streams": (server, lambda: server(True)),
    }
    found, counts = {name: [] for name in ways}, {}
    try:
        server.wait()
        for i in range(a.repeat + 1):
            for name, (who, work) in ways.items():
                start, cpu = time.perf_counter(), who.cpu()
                counts[name] = n = work()
                if i:  # the first one warms up
                    seconds = time.perf_counter() - start
                    found[name].append((n / seconds, (who.cpu() - cpu) / n * 1e6))
    finally:
        server.process.terminate()
        server.process.wait()
    if len(set(counts.values())) > 1:
        raise ValueError(f"the numbers of tokens differ: {counts}")
    middle = {name: [statistics.median(x) for x in zip(*xs)] for name, xs in found.items()}
    for name, (speed, cpu) in middle.items():
        least, most = min(found[name])[0], max(found[name])[0]
        print(
            f"{name:<26}{speed:8,.0f} tokens/s ({least:,.0f} to {most:,.0f}) | "
            f"{speed / middle['generate'][0]:4.0%} of generate | {cpu:.1f} CPU microseconds/token"
        )


if __name__ == "__main__":
    run_main(main)
