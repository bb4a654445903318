"""Generates text from a checkpoint.

python sample.py --checkpoint=out/ckpt.pt --start="Once upon a time"
python sample.py --checkpoint=out/ckpt.pt --start=FILE:prompts.txt --num_samples=3
python sample.py --checkpoint=out/ckpt.pt --interactive
python sample.py --checkpoint=out/sft_ckpt.pt --chat --system="Write short texts."
"""

import argparse
import sys
import time
from contextlib import nullcontext

import common  # noqa: F401  first: it reports missing packages

# isort: split
import torch

import kernels
from checkpoint import check_generates, choose_device, load_checkpoint, model_from_checkpoint
from common import boolean, parse_args, printable, run_main
from instruct import find_template
from model import generate
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
    if args.temperature < 0 or not 0 <= args.top_p <= 1 or args.top_k < 0:
        raise ValueError("temperature and top_k must not be negative, top_p must be in [0, 1]")
    if args.num_samples < 1 or args.max_new_tokens < 1:
        raise ValueError("num_samples and max_new_tokens must be at least 1")
    if args.chat and (args.interactive or args.start or args.num_samples > 1):
        raise ValueError("--chat cannot be combined with --interactive, --start or --num_samples")
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


class Stream:
    """Prints the text of a growing sequence of tokens. The bytes of an incomplete character are
    held back until the rest of them is generated."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.tokens, self.shown = tokenizer, list(prompt), ""

    def __call__(self, row, token):
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)  # BOS and EOS decode to nothing
        if not text.endswith("\ufffd"):  # the replacement character: a character is incomplete
            self.show(text)

    def show(self, text):
        print(printable(text[len(self.shown) :]), end="", flush=True)
        self.shown = text

    def close(self):
        """Prints the rest, which may end in an incomplete character, and ends the line."""
        self.show(self.tokenizer.decode(self.tokens))
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
    how = args.temperature, args.top_k, args.top_p
    stops = stop_ids(tokenizer, end_ids=end_ids)
    out = generate(model, tokens, args.max_new_tokens, *how, stop_ids=stops, on_token=stream)
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
    context, how = model.args.max_seq_len, (args.temperature, args.top_k, args.top_p)
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
        out = generate(model, [prompt], args.max_new_tokens, *how, stop_ids=stops, on_token=stream)
        stream.close()
        [reply], [ended] = out.responses(), out.ended.tolist()
        if not ended:
            full = len(prompt) + len(reply) >= context
            why = f"the context of {context} tokens is full" if full else "--max_new_tokens"
            print(f"(cut short: {why})", file=sys.stderr)
        turns = [*fitting[:-1], (user, reply[:-1] if ended else reply)]
    print()


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
    if args.compile:
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
