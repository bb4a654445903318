"""Generates text from a checkpoint.

python sample.py --checkpoint=out/ckpt.pt --start="Once upon a time"
python sample.py --checkpoint=out/ckpt.pt --start=FILE:prompts.txt --num_samples=3
python sample.py --checkpoint=out/ckpt.pt --interactive
python sample.py --checkpoint=out/sft_ckpt.pt --chat --system="Write short texts."
"""

import argparse
import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field

import common  # noqa: F401  first: it reports missing packages

# isort: split
import torch

import kernels
from checkpoint import check_generates, choose_device, load_checkpoint, model_from_checkpoint
from common import Refused, boolean, parse_args, printable, run_main
from instruct import find_template
from model import Batch, choose_tokens, generate
from tokenizer import own_tokenizer, stop_ids


def flags(argv=None):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="checkpoint (.pt) to load")
    add(
        "--tokenizer",
        default="",
        help="tokenizer file; default: the one beside the checkpoint or in data/",
    )
    add("--start", default="", help="prompt, or FILE:NAME, a file with one prompt per line")
    add(
        "--interactive",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="read prompts from standard input, one per line",
    )
    add(
        "--chat",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="chat on standard input, one line per turn; earlier turns stay in the context",
    )
    add("--system", default="", help="system prompt for --chat")
    add(
        "--template",
        default="",
        help="template for --chat: plain, llama2 or a JSON file; "
        "default: the checkpoint's, else llama2",
    )
    add("--num_samples", type=int, default=1, help="samples per prompt")
    add("--max_new_tokens", type=int, default=256, help="maximum number of generated tokens")
    add("--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding")
    add("--top_k", type=int, default=0, help="sample from the k most probable tokens; 0: from all")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the most probable tokens with this total probability; 0 or 1: from all",
    )
    add("--seed", type=int, default=1337, help="random seed")
    add("--device", default="", help="cpu, cuda, cuda:1 or mps; default: the best available")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="number type of the arithmetic",
    )
    add("--compile", type=boolean, nargs="?", const=True, default=False, help="use torch.compile")
    args = parse_args(parser, argv)
    for name in ("temperature", "top_k"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative, not {getattr(args, name)}")
    if not 0 <= args.top_p <= 1:
        raise ValueError(f"--top_p must be from 0 to 1, not {args.top_p}")
    if args.num_samples < 1 or args.max_new_tokens < 1:
        raise ValueError("num_samples and max_new_tokens must be at least 1")
    if args.chat and (args.interactive or args.start or args.num_samples > 1):
        raise ValueError("--chat cannot be combined with --interactive, --start or --num_samples")
    if args.interactive and args.start:
        raise ValueError("--interactive reads the prompts: it cannot be combined with --start")
    if 0 < args.temperature < 1e-6:
        raise ValueError("temperature must be 0, which is greedy, or at least 1e-6")
    if (args.system or args.template) and not args.chat:
        raise ValueError("--system and --template need --chat")
    if (args.chat or args.interactive) and sys.stdin is None:  # closed, as by <&-
        raise ValueError("there is no standard input to read from")
    return args


def out_of_memory(error):
    """Whether an exception means that the GPU or the CPU ran out of memory."""
    words = ("out of memory", "not enough memory", "DefaultCPUAllocator")
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or any(w in str(error) for w in words)


def read_prompts(start):
    """The prompts of --start: the text itself, or the lines of FILE:NAME. Raises OSError, or
    ValueError if the file is not UTF-8 or has no prompt."""
    if not start.startswith("FILE:"):
        return [start]
    path = start.removeprefix("FILE:")
    with open(path, encoding="utf-8-sig") as f:
        try:
            prompts = [line for line in f.read().splitlines() if line.strip()]
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text: {e}") from None
    if not prompts:
        raise ValueError(f"{path} has no prompt: write one per line")
    return prompts


class Text:
    """The text of a growing sequence of tokens that begins with `prompt`, piece by piece. A
    character is held back until all tokens of its bytes are added. `show` also holds back what may
    be the beginning of one of the strings `stops`, and cuts the text before the first of them."""

    def __init__(self, tokenizer, prompt, stops=()):
        self.decode, self.ids = tokenizer.decode, list(prompt)
        self.start, self.end = 0, len(prompt)  # the text up to `end` has been returned
        self.stops, self.held, self.stopped = stops, "", False

    def add(self, *tokens, last=False):
        """The text that tokens add, "" if it ends in an incomplete character, unless it is the
        `last` that is added."""
        self.ids.extend(tokens)
        text = self.decode(self.ids[self.start :])
        if text.endswith("\ufffd") and not last:  # the replacement character
            return ""
        text = text[len(self.decode(self.ids[self.start : self.end])) :]
        if text.strip():  # a sequence loses its leading spaces; BOS and EOS decode to nothing
            self.start = self.end
        self.end = len(self.ids)
        return text

    def show(self, text, last):
        """The text that can be shown after `text` was added, which is the `last` or not."""
        text = self.held + text
        ends = [(text.index(s) + len(s), text.index(s)) for s in self.stops if s in text]
        begun = [n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])]
        n = min(ends)[1] if ends else len(text) - (0 if last else max(begun, default=0))
        self.held, self.stopped = text[n:], bool(ends)
        return text[:n]


class Stream:
    """Prints the text of a growing sequence of tokens."""

    def __init__(self, tokenizer, prompt):
        self.text, self.prompt = Text(tokenizer, prompt), tokenizer.decode(prompt)

    def __call__(self, row, token):
        self.show(self.text.add(token))

    def show(self, text):
        print(printable(self.prompt + text), end="", flush=True)
        self.prompt = ""

    def close(self):
        """Prints the rest of the text and ends the line."""
        self.show(self.text.add(last=True))
        print()


def encode_prompt(tokenizer, text, bos=True):
    """The ids of a prompt. `bos` says whether the model was trained on text that begins with BOS.
    An empty prompt becomes BOS in any case, or EOS if the tokenizer has no BOS."""
    ids = tokenizer.encode(text, bos=bos, eos=False)
    first = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
    return ids or [first] * (first >= 0)


def print_samples(model, tokenizer, prompts, args, end_ids=(), bos=True):
    """Generates and prints num_samples continuations per prompt; returns the number of tokens."""
    tokens = [encode_prompt(tokenizer, p, bos) for p in prompts]
    tokens = [t for t in tokens for _ in range(args.num_samples)]
    stream = None
    if len(tokens) == 1:  # a single sample is streamed; several are printed when all have ended
        stream = Stream(tokenizer, tokens[0])
    sampling = args.temperature, args.top_k, args.top_p
    stops = stop_ids(tokenizer, end_ids=end_ids)
    out = generate(model, tokens, args.max_new_tokens, *sampling, stop_ids=stops, on_token=stream)
    if stream is None:
        for prompt, response in zip(tokens, out.responses()):
            print(printable(tokenizer.decode(prompt + response)))
            print("-" * 15)
    else:
        stream.close()
    return int(out.lengths.sum())


def read_line(prompt):
    """A line of standard input, without a byte order mark; None at the end of input."""
    try:
        return input(prompt if sys.stdin.isatty() else "").removeprefix("\ufeff")
    except EOFError:
        return None


def chat(model, tokenizer, template, end_ids, args):
    """Runs a dialogue on standard input. When the context is full, the oldest turns are dropped.
    The model's replies are kept as ids, because encoding their text again might give other ids."""
    context, sampling = model.args.max_seq_len, (args.temperature, args.top_k, args.top_p)
    if args.system and not template.system:
        raise ValueError(f"the template {template.turn!r} has no place for a system prompt")
    stops = stop_ids(tokenizer, template, end_ids)
    turns, dropped = [], 0
    while (user := read_line("User: ")) is not None:
        if not user.strip():
            continue
        try:
            fitting = template.fit(tokenizer, [*turns, (user, None)], args.system, context - 1)
        except ValueError as e:  # text that cannot be encoded as UTF-8
            print(f"error: {e}", file=sys.stderr)
            continue
        if not fitting:
            print(f"(that is too long for the context of {context} tokens)", file=sys.stderr)
            continue
        if len(fitting) <= len(turns):
            dropped += len(turns) + 1 - len(fitting)
            full = f"the context of {context} tokens is full"
            print(f"({full}: forgetting the first {dropped} turns)", file=sys.stderr)
        prompt = template.prompt(tokenizer, fitting, args.system)
        print("Assistant: ", end="", flush=True)
        stream = Stream(tokenizer, [])
        settings = args.max_new_tokens, *sampling
        out = generate(model, [prompt], *settings, stop_ids=stops, on_token=stream)
        stream.close()
        [reply], [ended] = out.responses(), out.ended.tolist()
        if not ended:
            full = len(prompt) + len(reply) > context  # the last token is not fed back
            why = f"the context of {context} tokens is full" if full else "--max_new_tokens"
            print(f"(cut short: {why})", file=sys.stderr)
        turns = [*fitting[:-1], (user, reply[:-1] if ended else reply)]
    print()


# ----------------------------------------------------------------------------
# requests that share a batch (serve.py)

CALLS = 0.02  # seconds per step for functions that clients call; then the rows get their turn


@dataclass
class Row:
    """One response that is being generated."""

    index: int  # of the response in its request
    prompt: list  # token ids
    uniform: torch.Tensor  # (limit,) a random number in [0, 1) for each token
    sampling: tuple  # temperature, top_k, top_p
    alternatives: int  # number of most likely tokens reported with each token; -1: nothing
    receive: object  # receive((row, new tokens, their details, finish reason or None))
    pause: float = 0.0  # seconds between two calls of `receive` at least, except for the last one
    length: int = 0  # number of tokens so far
    sent: int = 0  # number of tokens that were passed to `receive`
    details: list = field(default_factory=list)  # of the tokens that were not passed yet
    last: float = 0.0  # time of the last call of `receive`
    cancelled: bool = False


class Lane:
    """A model and the Batch that requests share: rows join as others end. Slot i holds the row that
    is the Batch's prompt number i."""

    def __init__(self, model, stops, slots):
        self.model, self.stops, self.slots, self.waiting = model, stops, [None] * slots, deque()
        self.device, self.steps, self.batch = model.output.weight.device, 1, None

    def busy(self):
        return bool(self.waiting) or any(self.slots)

    def fail(self, why):
        """Drops the batch and the queue. Returns the arguments of the rows' `receive`: each row is
        in a slot or waits until its last event, also when `admit` or `advance` raises."""
        rows = [row for row in self.slots if row]
        rows += [self.waiting.popleft() for _ in range(len(self.waiting))]
        self.slots, self.batch = [None] * len(self.slots), None
        return [(row, [], [], Refused(503, why)) for row in rows]

    def new_batch(self):
        n, context, on = len(self.slots), self.model.args.max_seq_len, dict(device=self.device)
        ids = torch.zeros(n, dtype=torch.long, **on)
        return Batch(
            cache=self.model.new_cache(n, context),
            prompt=ids[:0],
            current=ids[:0],
            tokens=torch.full((n, context), -1, **on),
            probabilities=torch.ones(n, context, **on),
            lengths=ids.clone(),
            limits=ids.clone(),
            uniform=torch.zeros(n, context, **on),
            stop_ids=torch.tensor(sorted(self.stops), dtype=torch.long, **on),
            sampling=(1.0, 0, 1.0),
        )

    def admit(self):
        """Starts waiting rows in free slots, with one forward pass over their prompts."""
        self.batch = b = self.batch or self.new_batch()
        free, new, size = [i for i, row in enumerate(self.slots) if row is None], [], 0
        while self.waiting and len(new) < len(free) and size < 4096:
            row = self.waiting.popleft()
            if not row.cancelled:
                new, size = [*new, row], size + len(row.prompt)
        if new:
            for i, row in zip(free, new):  # before the copies, which may raise: see `fail`
                self.slots[i] = row
            prompts, ends = [row.prompt for row in new], [len(row.uniform) for row in new]
            for i, row in zip(free, new):
                b.uniform[i, : len(row.uniform)] = row.uniform
            on = dict(dtype=torch.long, device=self.device)
            slots, last = torch.tensor(free[: len(new)], **on), [p[-1] for p in prompts]
            b.lengths[slots], b.limits[slots] = 0, torch.tensor(ends, **on)
            tokens = torch.tensor([t for p in prompts for t in p[:-1]], **on)
            self.model.hidden(tokens, [len(p) - 1 for p in prompts], b.cache)
            b.prompt = torch.cat([b.prompt, slots])
            b.current = torch.cat([b.current, torch.tensor(last, **on)])

    def advance(self):
        """Generates the next tokens of all rows. Returns the arguments of their `receive`."""
        self.admit()
        b, slots = self.batch, self.batch.prompt.tolist()
        rows, events, remaining = [self.slots[i] for i in slots], [], []
        if not rows:
            return []
        t0, details = time.perf_counter(), [[]] * len(rows)
        if len({row.sampling for row in rows}) == 1 and all(row.alternatives < 0 for row in rows):
            b.sampling, first = rows[0].sampling, min(len(r.uniform) - r.length for r in rows)
            self.model.sample_tokens(b, min(self.steps, first))
        else:
            details = self.one_token(rows)
        lengths, newest = b.lengths.tolist(), b.current.tolist()  # waits for a GPU
        t1, made = time.perf_counter(), max(lengths[i] - row.length for i, row in zip(slots, rows))
        if t1 - t0 > 0.08:  # 20 to 80 ms per call: text appears smoothly
            self.steps = max(1, made // 2)
        elif t1 - t0 < 0.02 and made == self.steps:  # fewer steps do not show how long these take
            self.steps = min(128, 2 * made)
        for i, row, token, detail in zip(slots, rows, newest, details):
            row.length = lengths[i]
            row.details.extend(detail)
            reason = "length" if row.length == len(row.uniform) else None
            reason = "stop" if token in self.stops else reason
            if reason or t1 >= row.last + row.pause:
                new = b.tokens[i, row.sent : row.length].tolist()
                events.append((row, new, row.details, reason))
                row.sent, row.details, row.last = row.length, [], t1
            remaining.append(not reason and not row.cancelled)
        if not all(remaining):
            order = b.cache.keep(torch.tensor(remaining, device=self.device))
            b.prompt, b.current = b.prompt[order], b.current[order]
            for i, remains in zip(slots, remaining):  # after `keep`, which may raise: see `fail`
                self.slots[i] = self.slots[i] if remains else None
        return events

    def one_token(self, rows):
        """Generates one token for each row with the row's own sampling. Returns for each row
        [(log-probability of the token, [(id, log-probability) of the alternatives])], both under
        the model itself, at temperature 1."""
        b, logits = self.batch, self.model(self.batch.current, cache=self.batch.cache)  # (R, V)
        at, token = (b.prompt, b.lengths[b.prompt]), torch.empty_like(b.current)
        for sampling in {row.sampling for row in rows}:
            i = torch.tensor([row.sampling == sampling for row in rows], device=self.device)
            token[i], _ = choose_tokens(logits[i], b.uniform[at][i], *sampling)
        b.tokens[at] = b.current = token
        b.lengths[b.prompt] += 1
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, token[:, None])[:, 0].tolist()
        most = max(0, *(row.alternatives for row in rows))
        top = logprobs.topk(min(most, logits.shape[1]))
        top = [list(zip(*pair)) for pair in zip(top.indices.tolist(), top.values.tolist())]
        k = [row.alternatives for row in rows]
        return [[(p, t[:n])] if n >= 0 else [] for n, p, t in zip(k, chosen, top)]


class Engine:
    """Advances lanes, and calls other functions between their steps, in a thread of its own. It and
    the event loop, from which `score` and `submit` are called, do not wait for each other."""

    def __init__(self, lanes, max_queue, autocast):
        self.lanes, self.max_queue, self.autocast = lanes, max_queue, autocast
        self.calls, self.changed = deque(), threading.Event()  # set when there is something to do

    def check(self, waiting, kind):
        if self.server.should_exit:
            raise Refused(503, "the server is shutting down")
        if waiting > self.max_queue:
            raise Refused(429, f"{self.max_queue} {kind} are waiting already: try again later")

    async def score(self, function, *args):
        """The result of a function that the thread calls. Raises Refused if too many wait."""
        self.check(len(self.calls), "scores")  # one of which, or this one, is made next
        self.calls.append((future := Future(), function, args))
        self.changed.set()
        return await asyncio.shield(asyncio.wrap_future(future))  # never cancelled

    def submit(self, lane, rows):
        """Queues rows for generation. Raises Refused if too many are waiting."""
        self.check(len(lane.waiting) + len(rows) - lane.slots.count(None), "responses")
        lane.waiting.extend(rows)
        self.changed.set()

    def allocate(self):
        """Allocates the memory of the batches. Raises OSError if there is not enough."""
        try:
            with torch.inference_mode(), self.autocast():
                for lane in self.lanes:
                    lane.admit()
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            n, context = len(lane.slots), lane.model.args.max_seq_len
            raise OSError(
                f"out of memory: {n} KV caches of {context} tokens do not fit: take a smaller "
                "--max_batch, or import the model again with a smaller --max_seq_len (export.py)"
            ) from None

    def run(self):
        """Computes until the server shuts down, which it does after an error here."""
        try:
            self.allocate()  # nothing if it was called before
            with torch.inference_mode(), self.autocast():
                while not self.server.should_exit:
                    self.changed.wait()
                    self.changed.clear()
                    while not self.server.should_exit and self.step():
                        pass
        finally:
            self.server.should_exit = True
            self.loop.call_soon_threadsafe(self.close)

    def step(self):
        """Makes calls that wait and advances the lanes. Returns whether there is more to do."""
        start = time.monotonic()
        while self.calls and time.monotonic() < start + CALLS:
            future, function, args = self.calls.popleft()
            try:
                future.set_result(function(*args))
            except Exception as e:
                future.set_exception(e)
        events = []
        for lane in self.lanes:
            try:
                events += lane.advance()
            except Exception as e:
                if not out_of_memory(e):
                    traceback.print_exc()
                events += lane.fail("out of memory" if out_of_memory(e) else "internal error")
        if events:
            self.loop.call_soon_threadsafe(self.deliver, events)
        return bool(self.calls) or any(lane.busy() for lane in self.lanes)

    def deliver(self, events):
        for event in events:
            event[0].receive(event)

    def close(self):
        """Fails what is waiting, when the thread has ended."""
        for lane in self.lanes:
            self.deliver(lane.fail("the server is shutting down"))
        for future, *_ in self.calls:
            future.set_exception(Refused(503, "the server is shutting down"))

    async def texts(self, rows, texts, events):
        """Yields (index of a row, new text, its tokens, finish reason or None) as tokens of `rows`
        arrive in the queue `events`; a token is (text, id, log-probability, alternatives). `texts`
        has the Text of each row. Cancels the rows when it is closed. Raises Refused."""
        remaining = len(rows)
        try:
            while remaining:
                row, tokens, details, reason = await events.get()
                if isinstance(reason, Refused):
                    raise reason
                if row.cancelled:
                    continue
                text, items, shown = texts[row.index], [], ""
                if not details and not text.stops:  # all at once, which is faster
                    shown = text.add(*tokens, last=bool(reason))
                    items, tokens = [("", token, None, []) for token in tokens], []
                for j, token in enumerate(tokens):
                    last = bool(reason) and j == len(tokens) - 1
                    piece = text.add(token, last=last)
                    items.append((piece, token, *(details[j] if details else (None, []))))
                    shown += text.show(piece, last)
                    if text.stopped:
                        reason, row.cancelled = "stop", True
                        break
                remaining -= bool(reason)
                yield row.index, shown, items, reason
        finally:
            for row in rows:
                row.cancelled = True


def token_report(models, critic, tokenizer, prompt, response, top=10):
    """What models, of which the last is the reference, and a critic say of each token of a
    response, from plain forward passes. One dict per token: the log-probabilities under the models;
    KL(first || last) of the next-token distributions, in nats; the value of the state before the
    token; and the most likely tokens under each model, (text, its log-probabilities)."""
    device = models[0].output.weight.device
    ids, states = (
        torch.tensor([prompt + response[:-1]], device=device),
        slice(len(prompt) - 1, None),
    )
    hidden = [m.hidden(ids)[0, states] for m in models]
    values = critic.values(critic.hidden(ids)[0, states]).tolist() if critic else None
    report = []
    for n in range(0, len(response), 32):  # logits of few tokens at a time
        logits = [m.output(h[n : n + 32]).float() for m, h in zip(models, hidden)]
        p = torch.stack(logits, 1).log_softmax(-1)  # (tokens, models, V)
        kl = (p[:, 0].exp() * (p[:, 0] - p[:, -1])).sum(-1).tolist()
        likely = p.topk(min(top, p.shape[2])).indices.tolist()
        for i, token in enumerate(response[n : n + 32]):
            likely[i] = [
                [(tokenizer.token_text(t), *p[i, :, t].tolist()) for t in x] for x in likely[i]
            ]
            report.append({"id": token, "name": tokenizer.token_text(token), "kl": kl[i]})
            report[-1] |= {"logprobs": p[i, :, token].tolist(), "top": likely[i]}
            report[-1]["value"] = values and values[n + i]
    return report


def main(argv=None):
    args = flags(argv)
    try:
        return run(args)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise OSError(
            f"out of memory: take fewer samples (--num_samples={args.num_samples}) or prompts at a "
            f"time, or a smaller --max_new_tokens than {args.max_new_tokens}"
        ) from None


def run(args):
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    check_generates(checkpoint, args.checkpoint)
    model = model_from_checkpoint(checkpoint, dropout=0.0).to(device).eval()
    torch.manual_seed(args.seed)  # after the model, whose initial weights use random numbers
    tokenizer = own_tokenizer(checkpoint, args.checkpoint, args.tokenizer)
    if args.compile and device.startswith("cuda") and isinstance(model, kernels.FastTransformer):
        model.compiled_decoding = True
    elif args.compile and device == "cpu" and kernels.library():
        print("note: --compile is ignored: kernels.c is faster than torch.compile", file=sys.stderr)
    elif args.compile:
        model.compile()
    dtype = getattr(torch, args.dtype)
    half = dtype is not torch.float32
    context = torch.autocast(device.partition(":")[0], dtype) if half else nullcontext()
    end_ids, bos = checkpoint.get("end_ids") or (), checkpoint.get("bos", True)
    with context:
        if args.chat:
            template = find_template(args.template, checkpoint, tokenizer)
            return chat(model, tokenizer, template, end_ids, args)
        if args.interactive:
            while (prompt := read_line("> ")) is not None:
                try:
                    print_samples(model, tokenizer, [prompt], args, end_ids, bos)
                except ValueError as e:  # a prompt that is too long must not end the session
                    print(f"error: {e}", file=sys.stderr)
            return
        if device == "cpu":
            kernels.library()  # compiles kernels.c on first use, outside the measured time
        t0 = time.perf_counter()
        prompts = read_prompts(args.start)
        n = print_samples(model, tokenizer, prompts, args, end_ids, bos)
        seconds = time.perf_counter() - t0
        print(f"{n} tokens, {n / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
