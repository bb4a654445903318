"""The training loop: pretraining, and PPO with --ppo.

    python train.py --vocab_source=custom --vocab_size=512 --dim=64 --n_layers=5 --n_heads=8
    python train.py --out_dir=out --init_from=resume --ppo        # aligns out/ckpt.pt
    torchrun --standalone --nproc_per_node=4 train.py             # DDP, on one node or many

It reads shards made by tinystories.py and writes into --out_dir:
    ckpt.pt        the newest state (ppo_ckpt.pt with --ppo); ckpt.prev.pt the one before
    best.pt        the state with the lowest validation loss
    model.bin      the model for ./run (ppo_model.bin with --ppo)
    log.jsonl      one JSON object an iteration (ppo_log.jsonl with --ppo)

A checkpoint is complete: --init_from=resume after an interruption gives the run that was not
interrupted. Ctrl-C finishes the step, saves, and says how to go on.
"""

import argparse
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ppo
from export import write_v3
from model import (
    ModelArgs,
    Transformer,
    TransformerWithValueHead,
    checkpoint_args,
    generate,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
)
from tinystories import Prompts, Windows
from tokenizer import Tokenizer, boolean, find_tokenizer, parse_args, run_main, write_atomic

# ----------------------------------------------------------------------------
# flags


def flags(argv=None):
    """The command line as a namespace; `args.given` holds the names that were on it."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)

    def group(title):
        g = parser.add_argument_group(title)

        def add(name, default, help, **kw):
            kind = type(default)
            if kind is bool:
                kw |= dict(type=boolean, nargs="?", const=True)
            g.add_argument(f"--{name}", **{"default": default, "type": kind, "help": help, **kw})

        return add

    add = group("output")
    add("out_dir", "out", "folder for checkpoints and logs")
    add("eval_interval", 2000, "iterations between evaluations; each saves a checkpoint")
    add("eval_iters", 100, "batches an evaluation")
    add("log_interval", 1, "iterations between printed lines; log.jsonl has them all")
    add("eval_only", False, "evaluate, print, and leave (with --ppo: the report of a finished run)")
    add("always_save_checkpoint", False, "accepted; every evaluation saves ckpt.pt, the best best.pt")
    add("init_from", "scratch", "scratch, resume (from out_dir), or a checkpoint's path: its weights")
    add("tensorboard", False, "also log to TensorBoard, in out_dir")
    add("wandb_log", False, "also log to Weights & Biases")
    add("wandb_project", "llamac", "its project")
    add("wandb_run_name", time.strftime("run%Y_%m_%d_%H_%M_%S"), "its run")

    add = group("data")
    add("data", "data", "data folder, or several with weights: dirA:0.7,dirB:0.3")
    add("batch_size", 128, "sequences a forward pass (micro-batch); with --ppo, rollouts")
    add("max_seq_len", 256, "tokens a sequence, the model's context")
    add("vocab_source", "llama2", "llama2 (32000 tokens) or custom", choices=("llama2", "custom"))
    add("vocab_size", 32000, "tokens in the vocabulary")
    add("tokenizer", "", "SentencePiece model, if not data/tok<vocab_size>.model")

    add = group("model")
    add("dim", 288, "width")
    add("n_layers", 6, "layers")
    add("n_heads", 6, "query heads")
    add("n_kv_heads", 6, "key/value heads; query heads share them")
    add("multiple_of", 32, "the feed-forward width is rounded up to a multiple of it")
    add("dropout", 0.0, "dropout rate")

    add = group("optimizer")
    add("optimizer", "adamw", "adamw, or muon: Muon for matrices, AdamW for the rest",
        choices=("adamw", "muon"))  # fmt: skip
    add("gradient_accumulation_steps", 1, "forward passes an optimizer step, over all processes")
    add("learning_rate", 5e-4, "highest learning rate (of AdamW, where Muon is used too)")
    add("muon_learning_rate", 0.02, "highest learning rate of Muon")
    add("max_iters", 100000, "iterations in all, those of the checkpoint included")
    add("weight_decay", 0.1, "decoupled weight decay of matrices")
    add("beta1", 0.9, "Adam's first decay")
    add("beta2", 0.95, "Adam's second decay")
    add("grad_clip", 1.0, "largest gradient norm; 0: no clipping")
    add("decay_lr", True, "decay the learning rate to 0 at max_iters, along a cosine")
    add("warmup_iters", 1000, "iterations of linear warm-up")

    add = group("system")
    add("device", "", "cpu, cuda, cuda:1, mps; default: the best there is")
    add("dtype", "", "float32, bfloat16 or float16; default: bfloat16 on cuda, else float32",
        choices=("", "float32", "bfloat16", "float16"))  # fmt: skip
    add("compile", None, "use torch.compile; default: on cuda", type=boolean, nargs="?", const=True)
    add("seed", 1337, "of initialisation, data order and rollouts")

    add = group("PPO")
    add("ppo", False, "align the checkpoint in out_dir (or --init_from) with PPO")
    add("ppo_iters", 0, "PPO iterations, instead of max_iters less the checkpoint's")
    add("reward", "length", "length, or FILE.py:FUNCTION of lists of prompts and responses")
    add("target_len", 200, "tokens of prompt and response that the length reward wants")
    add("start_len", 30, "prompts are BOS and the first 0 to start_len - 1 tokens of a story")
    add("value_learning_rate", 0.0, "the critic's learning rate; 0: as the policy's")
    add("ppo_warmup_steps", 10, "optimizer steps of linear warm-up")
    add("ppo_debug", False, "print every statistic of every iteration")
    add("roof_prompts", 16, "prompts from which the roof J* is estimated")
    add("roof_samples", 64, "reference samples for each of them")
    add("report_rollouts", 512, "rollouts before and after, for the report")
    taken = {a.dest for a in parser._actions}
    # the help of a PPO flag is the comment behind its field
    notes = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(ppo.PPOConfig), re.M))
    for f in fields(ppo.PPOConfig):
        if f.name not in taken and f.name not in ("mini_batch_size", "max_grad_norm"):
            add(f.name, f.default, notes.get(f.name, f"see PPOConfig.{f.name}"))
    args = parse_args(parser, argv)
    words = sys.argv[1:] if argv is None else argv
    args.given = {w.lstrip("-").partition("=")[0] for w in words}
    return args


def setup(args):
    """Checks the flags, chooses device and dtype, joins the other processes. Returns rank, world."""
    if args.vocab_source == "llama2" and args.vocab_size != 32000:
        raise ValueError("--vocab_source=llama2 has 32000 tokens; --vocab_size needs --vocab_source=custom")
    for name in ("batch_size", "max_iters", "gradient_accumulation_steps", "eval_iters", "log_interval"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    mps = torch.backends.mps.is_available()
    best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    args.device = args.device or best
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device={args.device}: there is no CUDA device here; use --device=cpu")
    if args.device == "mps" and not mps:
        raise ValueError("--device=mps: there is no MPS device here; use --device=cpu")
    if args.device.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device={args.device}: expected cpu, cuda, cuda:N or mps")
    on_cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    args.compile = on_cuda if args.compile is None else args.compile
    if world > 1:
        if on_cuda:
            args.device = f"cuda:{local}"
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if on_cuda else "gloo")
    shared, rest = divmod(args.gradient_accumulation_steps, world)
    if rest and shared:
        raise ValueError(
            f"--gradient_accumulation_steps={args.gradient_accumulation_steps} cannot be shared by "
            f"{world} processes: use a multiple"
        )
    args.gradient_accumulation_steps = max(shared, 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(args.seed)
    return rank, world


# ----------------------------------------------------------------------------
# optimizer and schedule


def make_optimizers(model, args, learning_rate):
    """AdamW, with weight decay on matrices only; with --optimizer=muon, Muon (Jordan et al., 2024)
    takes the matrices inside the layers and AdamW the rest. Each parameter group remembers its
    highest learning rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in named if p.dim() == 2 and n.startswith("layers.")]
    muon = muon if args.optimizer == "muon" else []
    chosen = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=learning_rate, betas=(args.beta1, args.beta2), fused=True)
    optimizers = [adam]
    if muon:
        optimizers.append(
            torch.optim.Muon(muon, lr=args.muon_learning_rate, weight_decay=args.weight_decay)
        )
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step, args, first=0, warmup=None):
    """The learning rate at an iteration, as a fraction of the highest: linear warm-up, then a cosine
    down to 0 at max_iters; without --decay_lr always 1."""
    if not args.decay_lr:
        return 1.0
    warmup = min(args.warmup_iters if warmup is None else warmup, args.max_iters - first)
    if step - first < warmup:
        return (step - first + 1) / (warmup + 1)
    done = (step - first - warmup) / max(args.max_iters - first - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


# ----------------------------------------------------------------------------
# what a person and a program see


class Log:
    """One JSON object an iteration into a file, the same scalars to TensorBoard and Weights & Biases
    where asked for, a progress bar and aligned lines on the terminal. Silent but on rank 0."""

    def __init__(self, args, name, first, total, resumed, rank):
        self.path = Path(args.out_dir) / name
        self.master = rank == 0
        self.file = self.board = self.wandb = None
        self.bar = tqdm(
            total=total - first, unit="it", disable=None if self.master else True,
            dynamic_ncols=True, smoothing=0.05, leave=False,
        )  # fmt: skip
        if not self.master:
            return
        kept = []
        if resumed and self.path.exists():  # a resumed run continues its log, without what is redone
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["iter"] < first:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    pass  # a line cut short by a crash
        self.file = open(self.path, "w")
        self.file.writelines(kept)
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(args.out_dir)
        if args.wandb_log:
            try:
                import wandb
            except ImportError:
                raise ValueError("--wandb_log needs a package: pip install wandb") from None
            config = {k: v for k, v in vars(args).items() if k != "given"}
            wandb.init(project=args.wandb_project, name=args.wandb_run_name, config=config)
            self.wandb = wandb

    def scalars(self, iteration, stats):
        if not self.master:
            return
        self.file.write(json.dumps({"iter": iteration, **stats}) + "\n")
        self.file.flush()
        if self.board:
            for k, v in stats.items():
                self.board.add_scalar(k, v, iteration)
        if self.wandb:
            self.wandb.log({"iter": iteration, **stats}, step=iteration)

    def text(self, iteration, name, text):
        if self.board:
            self.board.add_text(name, text.replace("\n", "  \n"), iteration)

    def line(self, text):
        if self.master:
            self.bar.clear()
            print(text, flush=True)

    def close(self):
        self.bar.close()
        for x in filter(None, (self.file, self.board)):
            x.close()


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop ends after a whole step; a second one ends at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def pending(self):
        """The same answer on every rank."""
        mine = torch.tensor(0 if self.signal is None else int(self.signal))
        if dist.is_initialized():
            mine = mine.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        return int(mine)


def matmul_roof(device, dtype):
    """Measured floating-point operations a second of a large matrix product: what MFU is held against."""
    n = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        t = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best


# ----------------------------------------------------------------------------
# checkpoints


def save(args, stage, iter_num, best_val_loss, improved, tokenizer):
    """Writes the stage's checkpoint and model for ./run, on rank 0. The checkpoint before stays as
    .prev.pt; best.pt is a link to the one with the lowest validation loss."""
    path = Path(args.out_dir) / f"{stage.prefix}ckpt.pt"
    checkpoint = {
        "model_args": checkpoint_args(stage.model.args),
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": {k: v for k, v in vars(args).items() if k != "given"},
        **stage.state(),
    }
    if path.exists():
        link(path, path.with_suffix(".prev.pt"))
    save_checkpoint(path, checkpoint)
    if improved:
        link(path, path.with_name(f"{stage.prefix}best.pt"))
    with write_atomic(path.with_name(f"{stage.prefix}model.bin")) as f:
        write_v3(f, stage.model.args, checkpoint["model"], "fp32", tokenizer)


def link(old, new):
    """Makes `new` another name of the file `old`, replacing what was there in one step."""
    temporary = new.with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(old, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(old, temporary)
    os.replace(temporary, new)


def newest(path):
    """The checkpoint at path or, if that is damaged, the one before it, saying so."""
    try:
        return load_checkpoint(path)
    except ValueError as e:
        previous = path.with_suffix(".prev.pt")
        if not previous.exists():
            raise
        print(f"warning: {e}; going on from {previous}", file=sys.stderr)
        return load_checkpoint(previous)


def check_fits(args, model_args):
    """Raises ValueError naming each flag on the command line that the checkpoint contradicts."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
    wrong = [
        f"{n} is {model_args[n]} there, --{n}={getattr(args, n)} here"
        for n in names
        if n in args.given and n in model_args and model_args[n] not in (None, getattr(args, n))
    ]
    if wrong:
        raise ValueError("the checkpoint does not fit the flags: " + "; ".join(wrong))


# ----------------------------------------------------------------------------
# the stages: what one iteration is


class Pretraining:
    """Next-token prediction on windows of stories."""

    prefix = ""

    def __init__(self, args, checkpoint, rank, world, context):
        self.args, self.rank, self.world, self.context = args, rank, world, context
        if checkpoint is None:
            names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of")
            values = {n: getattr(args, n) for n in (*names, "max_seq_len", "dropout")}
            self.model = Transformer(ModelArgs(**values))
        else:
            self.model = model_from_checkpoint(checkpoint, dropout=args.dropout)
        self.model.to(args.device).train()
        seq_len, vocab = self.model.args.max_seq_len, self.model.args.vocab_size
        self.train = Windows(args.data, "train", seq_len, vocab, args.seed)
        self.val = Windows(args.data, "val", seq_len, vocab, args.seed)
        self.position = 0  # windows dealt so far
        self.optimizers = make_optimizers(self.model, args, args.learning_rate)
        self.scaler = torch.amp.GradScaler(args.device.partition(":")[0], enabled=args.dtype == "float16")
        self.flops = self.model.flops_per_token(seq_len)
        dtype = torch.float32 if args.dtype == "float32" else getattr(torch, args.dtype)
        self.roof = matmul_roof(args.device, dtype) * world
        self.skipped = 0
        self.forward = torch.compile(self.model) if args.compile else self.model
        if world > 1:
            devices = [torch.device(args.device)] if args.device.startswith("cuda") else None
            self.forward = DistributedDataParallel(self.forward, device_ids=devices)

    def step(self, iteration):
        """One optimizer step; returns its statistics."""
        a, t0 = self.args, time.perf_counter()
        # Dropout depends on the iteration and the rank alone, so that a resumed run repeats it.
        torch.manual_seed((a.seed * 1_000_003 + iteration) * 1009 + self.rank)
        scale = schedule(iteration, a)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["peak_lr"] * scale
        loss_sum = 0.0
        for micro in range(a.gradient_accumulation_steps):
            x, y = self.train.batch(self.position + self.rank * a.batch_size, a.batch_size)
            self.position += self.world * a.batch_size
            last = micro == a.gradient_accumulation_steps - 1
            with nullcontext() if self.world == 1 or last else self.forward.no_sync():
                with self.context():
                    loss = self.forward(x.to(a.device), y.to(a.device)) / a.gradient_accumulation_steps
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        for o in self.optimizers:
            self.scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), a.grad_clip or math.inf)
        if self.scaler.is_enabled() or torch.isfinite(norm):
            for o in self.optimizers:
                self.scaler.step(o)  # with float16 it skips a step that overflowed by itself
            self.skipped = 0
        else:
            self.skipped += 1
        self.scaler.update()
        for o in self.optimizers:
            o.zero_grad(set_to_none=True)
        if self.skipped >= 10:
            raise FloatingPointError(
                f"iteration {iteration}: the loss or its gradient has not been finite for 10 steps"
            )
        loss = ppo.all_sum(loss_sum)[0] / self.world  # also waits for the device
        dt = time.perf_counter() - t0
        tokens = x.numel() * a.gradient_accumulation_steps * self.world
        return {
            "loss/train": loss,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(norm),
            "tokens": self.position * x.shape[1],
            "tokens_per_s": tokens / dt,
            "mfu": tokens / dt * self.flops / self.roof,
            "ms": dt * 1e3,
        }

    def line(self, iteration, s):
        return (
            f"{iteration:6d} | loss {s['loss/train']:.4f} | lr {s['lr']:.2e} | norm {s['grad_norm']:5.2f} | "
            f"{s['ms']:7.1f} ms | {s['tokens_per_s']:9,.0f} tok/s | mfu {s['mfu']:5.1%}"
        )

    def evaluate(self):
        """The mean loss over fixed windows of each split, the same for any number of processes."""
        self.model.eval()
        out = {}
        for name, windows in (("train", self.train), ("val", self.val)):
            losses, rows = 0.0, 0
            n = self.args.eval_iters * self.args.batch_size
            for x, y in windows.fixed(n, self.args.batch_size, self.rank, self.world):
                with torch.no_grad(), self.context():
                    losses += float(self.model(x.to(self.args.device), y.to(self.args.device))) * len(x)
                rows += len(x)
            losses, rows = ppo.all_sum(torch.tensor(losses, dtype=torch.float64), torch.tensor(rows))
            out[f"loss/{name}_eval" if name == "train" else "loss/val"] = losses / rows
        self.model.train()
        return out

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizers[0].state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers[1:]],
            "scaler": self.scaler.state_dict(),
            "position": self.position,
        }

    def resume(self, checkpoint):
        """Takes up the state of an interrupted run; a foreign checkpoint gives its weights alone."""
        self.position = checkpoint.get("position", 0)
        states = [checkpoint.get("optimizer"), *checkpoint.get("optimizers", [])]
        if len(states) != len(self.optimizers) or not states[0]:
            print("the checkpoint has no state for this optimizer: it starts anew", file=sys.stderr)
            return
        for o, state in zip(self.optimizers, states):
            peaks = [g["peak_lr"] for g in o.param_groups]
            try:
                o.load_state_dict(state)
            except ValueError:
                print("the checkpoint's optimizer is another one: it starts anew", file=sys.stderr)
            for g, peak in zip(o.param_groups, peaks):
                g["peak_lr"] = peak  # the flags decide, not the checkpoint
        self.scaler.load_state_dict(checkpoint.get("scaler", {}) or self.scaler.state_dict())


class Alignment:
    """PPO against a reward; see ppo.py."""

    prefix = "ppo_"

    def __init__(self, args, checkpoint, rank, world, context, tokenizer):
        self.args, self.rank, self.world = args, rank, world
        config = ppo.PPOConfig(
            mini_batch_size=args.batch_size,
            max_grad_norm=args.grad_clip,
            **{
                f.name: getattr(args, f.name)
                for f in fields(ppo.PPOConfig)
                if f.name not in ("mini_batch_size", "max_grad_norm")
            },
        )
        start = checkpoint["ppo"]["reference"] if "ppo" in checkpoint else checkpoint["model"]
        start = {"model": start, "model_args": checkpoint["model_args"]}
        shared = config.value_model == "shared"
        kind = TransformerWithValueHead if shared else Transformer
        self.model = model_from_checkpoint(start, kind, dropout=0.0).to(args.device)
        reference = model_from_checkpoint(start, dropout=0.0).to(args.device).requires_grad_(False)
        critic = critic_optimizer = None
        if config.advantage == "gae" and not shared:
            path = config.value_model
            source = start if path == "separate" else load_checkpoint(path)
            critic = model_from_checkpoint(source, TransformerWithValueHead, dropout=0.0).to(args.device)
            rate = args.value_learning_rate or args.learning_rate
            critic_optimizer = self.adam(critic, rate)
        vocab = self.model.args.vocab_size
        self.prompts = Prompts(args.data, "train", args.start_len, vocab, args.seed)
        self.held_out = Prompts(args.data, "val", args.start_len, vocab, args.seed)
        ptx = Windows(args.data, "train", self.model.args.max_seq_len, vocab, args.seed + 1)
        self.ptx_position = 0

        def ptx_batch():
            n = max(args.batch_size // 8, 1)
            batch = ptx.batch(self.ptx_position + rank * n, n)
            self.ptx_position += world * n
            return (x.to(args.device) for x in batch)

        self.trainer = ppo.PPOTrainer(
            config, self.model, reference, critic, self.adam(self.model, args.learning_rate),
            critic_optimizer, context, ptx_batch,
        )  # fmt: skip
        self.optimizers = [o for o in (self.trainer.optimizer, critic_optimizer) if o is not None]
        self.tokenizer = tokenizer
        self.reward = ppo.load_reward(args.reward, args.target_len, self.decode)
        self.position, self.first = 0, checkpoint["iter_num"]
        self.roof = None

    def adam(self, model, rate):
        """Adam whose first steps are short: its second moments are rough estimates then. The count
        of steps lies in the parameter group, and so in the checkpoint."""
        a = self.args
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            params, lr=rate, betas=(a.beta1, a.beta2), weight_decay=a.weight_decay, fused=True
        )
        optimizer.param_groups[0].update(peak_lr=rate, scale=1.0, steps=0)

        def warm_up(optimizer, args, kwargs):
            g = optimizer.param_groups[0]
            g["steps"] += 1
            g["lr"] = g["peak_lr"] * g["scale"] * min(1.0, g["steps"] / max(a.ppo_warmup_steps, 1))

        optimizer.register_step_pre_hook(warm_up)
        return optimizer

    def decode(self, ids):
        if self.tokenizer is None:
            raise ValueError("this needs the model's tokenizer: give --tokenizer")
        return self.tokenizer.decode(ids)

    def sample(self, model, prompts):
        """Responses of a model to prompts, the same at every call."""
        c = self.trainer.config
        random = torch.Generator().manual_seed(self.args.seed)
        uniform = torch.rand(len(prompts), c.max_gen_len, generator=random)
        with self.trainer.context():
            out = generate(model, prompts, c.max_gen_len, c.temperature, uniform=uniform, max_batch=512)
        return out.responses(), out.ended

    def scores(self, prompts, responses, ended):
        """One score a rollout (B,), also where the reward gives one for each token."""
        each = self.reward(prompts, responses, ended)
        return torch.tensor([float(torch.as_tensor(s).sum()) for s in each])

    @torch.no_grad()
    def measure(self, model):
        """How a model does on held-out prompts: reward, exact KL to the reference, J, lengths, the share
        that ended by itself, and the reference's loss on the samples, in nats a token."""
        t, n = self.trainer, self.args.report_rollouts
        prompts = self.held_out.batch(0, n)
        responses, ended = self.sample(model, prompts)
        scores = self.scores(prompts, responses, ended)
        kl = loss = 0.0
        for i in range(0, n, self.args.batch_size):
            part = slice(i, i + self.args.batch_size)
            p = ppo.pack(prompts[part], responses[part], self.args.device)
            with t.context():
                logp, ref = (
                    (m(p.tokens, lengths=p.lengths)[p.action].float() / t.config.temperature).log_softmax(-1)
                    for m in (model, t.reference)
                )
            kl += float(ppo.exact_kl(logp, ref).sum())
            loss -= float(ref.gather(1, p.target[:, None]).sum())
        lengths = torch.tensor([len(q) + len(r) for q, r in zip(prompts, responses)]).float()
        reward, kl = float(scores.mean()), kl / n
        return {
            "objective": reward - t.config.init_kl_coef * kl,
            "objective_error": float(scores.std()) / math.sqrt(n),
            "reward": reward,
            "kl": kl,
            "length_mean": float(lengths.mean()),
            "length_std": float(lengths.std()),
            "ended": float(ended.float().mean()),
            "ref_loss": loss / sum(map(len, responses)),
            "lengths": lengths.int().tolist(),
            "story": self.decode(prompts[0] + responses[0]) if self.tokenizer else "",
        }

    def report(self):
        """Measures reference and result on the same prompts and random numbers; keeps and prints it."""
        result = deepcopy(self.model)
        result.load_state_dict(self.result())
        found = {
            "beta": self.trainer.config.init_kl_coef,
            "roof": self.roof,
            "before": self.measure(self.trainer.reference),
            "after": self.measure(result),
        }
        with write_atomic(Path(self.args.out_dir) / "ppo_report.json", "w") as f:
            json.dump(found, f)
        print_report(found)

    def estimate_roof(self):
        """J* and its standard error, from scores of reference samples that are kept in out_dir."""
        a, c = self.args, self.trainer.config
        key = [a.reward, a.target_len, a.start_len, a.roof_prompts, a.roof_samples, a.seed, a.data]
        key += [c.max_gen_len, c.temperature, self.fingerprint()]
        path = Path(a.out_dir) / "roof.json"
        try:
            kept = json.loads(path.read_text())
            scores = torch.tensor(kept["scores"]) if kept["key"] == key else None
        except (OSError, ValueError, KeyError):
            scores = None
        if scores is None:
            prompts = self.held_out.batch(0, a.roof_prompts)
            prompts = [p for p in prompts for _ in range(a.roof_samples)]
            responses, ended = self.sample(self.trainer.reference, prompts)
            scores = self.scores(prompts, responses, ended).view(a.roof_prompts, a.roof_samples)
            if self.rank == 0:
                with write_atomic(path, "w") as f:
                    json.dump({"key": key, "scores": scores.tolist()}, f)
        self.roof = ppo.objective_roof(scores, c.init_kl_coef)
        return self.roof

    def fingerprint(self):
        """A number that changes with the reference's weights."""
        return float(sum(p.double().abs().sum() for p in self.trainer.reference.parameters()))

    def step(self, iteration):
        a, c, t0 = self.args, self.trainer.config, time.perf_counter()
        scale = schedule(iteration, a, self.first, warmup=0)
        for o in self.optimizers:
            o.param_groups[0]["scale"] = scale
        prompts = self.prompts.batch(self.position, c.rollouts // c.group_size)
        self.position += len(prompts)
        prompts = [p for p in prompts for _ in range(c.group_size)]
        queries, responses, logprobs, ended = self.trainer.rollout(prompts, a.seed + iteration)
        t1 = time.perf_counter()
        scores = self.reward(queries, responses, ended)
        self.last = queries, responses, scores
        stats = self.trainer.step(queries, responses, logprobs, scores, ended)
        stats |= {
            "ppo/objective_roof": self.roof[0],
            "time/ppo/rollout": t1 - t0,
            "time/ppo/iteration": time.perf_counter() - t0,
        }
        return stats

    def line(self, iteration, s):
        if self.args.ppo_debug:
            return json.dumps({"iter": iteration, **s}, indent=4)
        return (
            f"{iteration:6d} | J {s['ppo/objective']:.3f} of {self.roof[0]:.3f} | "
            f"reward {s['ppo/reward']:.3f} | KL {s['ppo/kl_ref']:.2f} | "
            f"length {s['ppo/length/mean']:3.0f} ±{s['ppo/length/std']:3.0f} | ended {s['ppo/ended']:4.0%} | "
            f"entropy {s['ppo/policy/entropy']:.2f} | clip {s['ppo/policy/clipfrac']:5.1%} | "
            f"EV {s['ppo/val/explained_variance']:5.2f} | norm {s['grad_norm']:.2f} | "
            f"{s['time/ppo/rollout']:.1f} + {s['time/ppo/total']:.1f} s"
        )

    def evaluate(self):
        return {}

    def result(self):
        """The weights to keep: the average of the policy's where one is made."""
        return self.trainer.average or self.model.state_dict()

    def state(self):
        return {
            "model": self.result(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "position": self.position,
            "ppo": {
                **self.trainer.state_dict(),
                "policy": self.model.state_dict(),
                "reference": self.trainer.reference.state_dict(),
                "ptx_position": self.ptx_position,
                "first": self.first,
            },
        }

    def resume(self, checkpoint):
        state = checkpoint["ppo"]
        self.model.load_state_dict(state["policy"])
        self.trainer.load_state_dict(state)
        self.position, self.ptx_position = checkpoint["position"], state["ptx_position"]
        self.first = state["first"]


def print_report(found):
    """What PPO changed, held against the roof: a table, the lengths as a histogram, a story each."""
    before, after = found["before"], found["after"]
    n = len(before["lengths"])
    print(f"\nPPO on {n} held-out prompts, beta = {found['beta']:g}" + " " * 8 + "before     after")
    rows = [
        ("J = reward - beta KL", "objective", "8.3f"), ("reward", "reward", "8.3f"),
        ("KL to the reference, nats", "kl", "8.2f"), ("mean length, tokens", "length_mean", "8.1f"),
        ("its standard deviation", "length_std", "8.1f"), ("ended by themselves", "ended", "8.0%"),
        ("reference's loss on the samples", "ref_loss", "8.3f"),
    ]  # fmt: skip
    for title, key, form in rows:
        print(f"  {title:<40}{before[key]:{form}}  {after[key]:{form}}")
    roof, error = found["roof"]
    gap = roof - before["objective"]
    closed = (after["objective"] - before["objective"]) / gap if gap > 0 else float("nan")
    print(f"  roof J*: {roof:.3f} ±{error:.3f} (no policy can do better); {closed:.0%} of the gap closed")
    print("\n  tokens     before" + " " * 26 + "after")
    edges = range(0, max(before["lengths"] + after["lengths"]) + 1, 20)
    for low in edges:
        bars = []
        for lengths in (before["lengths"], after["lengths"]):
            share = sum(low <= x < low + 20 for x in lengths) / n
            bars.append(f"{'█' * round(share * 30):<22.22} {share:4.0%}")
        print(f"  {low:3d}-{low + 19:3d}    {bars[0]}     {bars[1]}")
    for title, x in (("before", before), ("after", after)):
        if x["story"]:
            print(f"\n  a story {title} PPO:\n" + textwrap.indent(textwrap.fill(x["story"], 96), "    "))
    print()


# ----------------------------------------------------------------------------
# the loop


def starting_point(args):
    """The checkpoint that the run starts from, or None; and whether it is this run, interrupted."""
    folder = Path(args.out_dir)
    if args.init_from == "scratch" and not args.ppo:
        return None, False
    if args.init_from not in ("scratch", "resume"):
        return {**load_checkpoint(args.init_from), "iter_num": 0}, False
    if not args.ppo:
        return newest(folder / "ckpt.pt"), True
    mine = folder / "ppo_ckpt.pt"
    base = newest(folder / "ckpt.pt")
    if args.init_from == "resume" and mine.exists():
        state = newest(mine)
        same = all(
            state["config"].get(k) == v
            for k, v in vars(args).items()
            if k in PPO_IDENTITY and k in state["config"]
        )
        unfinished = state["iter_num"] < last_iteration(args, state["ppo"]["first"])
        if "ppo" in state and same and (unfinished or args.eval_only):
            return state, True
    return base, False


PPO_IDENTITY = {f.name for f in fields(ppo.PPOConfig)} | {
    "learning_rate", "value_learning_rate", "reward", "target_len", "start_len", "batch_size", "seed",
    "data", "beta1", "beta2", "weight_decay", "ppo_warmup_steps", "decay_lr", "max_iters", "ppo_iters",
}  # fmt: skip


def last_iteration(args, first):
    return first + args.ppo_iters if args.ppo and args.ppo_iters else args.max_iters


def main(argv=None):
    args = flags(argv)
    rank, world = setup(args)
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    if args.ppo and args.eval_only and (Path(args.out_dir) / "ppo_report.json").exists():
        return print_report(json.loads((Path(args.out_dir) / "ppo_report.json").read_text()))
    checkpoint, resumed = starting_point(args)
    if checkpoint is not None:
        check_fits(args, checkpoint["model_args"])
    on_cpu = args.device == "cpu"
    dtype = getattr(torch, args.dtype)
    half = dtype is not torch.float32

    def context():
        return torch.autocast(args.device.partition(":")[0], dtype) if half else nullcontext()

    vocab_size = checkpoint["model_args"]["vocab_size"] if checkpoint else args.vocab_size
    try:
        tokenizer = Tokenizer(args.tokenizer or find_tokenizer(vocab_size, args.out_dir))
    except FileNotFoundError:
        if args.tokenizer:
            raise
        tokenizer = None  # training needs none; samples of text and model.bin's vocabulary do
    if tokenizer and tokenizer.n_words != vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_words} tokens, the model {vocab_size}: not its own"
        )
    if args.ppo:
        stage = Alignment(args, checkpoint, rank, world, context, tokenizer)
        args.max_iters = last_iteration(args, stage.first if not resumed else checkpoint["ppo"]["first"])
    else:
        stage = Pretraining(args, checkpoint, rank, world, context)
    iter_num, best_val_loss = 0, 1e9
    if checkpoint is not None:
        iter_num, best_val_loss = checkpoint["iter_num"], checkpoint.get("best_val_loss", 1e9)
        if resumed:
            stage.resume(checkpoint)
    if rank == 0:
        parameters = sum(p.numel() for p in stage.model.parameters())
        how = f"{args.device}, {args.dtype}" + (f", {world} processes" if world > 1 else "")
        print(f"{parameters:,} parameters; iterations {iter_num} to {args.max_iters}; {how}")
        if iter_num >= args.max_iters:
            print("nothing to do: the checkpoint has reached --max_iters")
    if args.ppo:
        roof, error = stage.estimate_roof()
        if rank == 0:
            print(f"roof J* = {roof:.3f} ±{error:.3f}, which no policy can exceed at this beta")
    interrupt = Interrupt()
    log = Log(args, f"{stage.prefix}log.jsonl", iter_num, args.max_iters, resumed, rank)
    start = iter_num

    def evaluate_and_save(iter_num):
        nonlocal best_val_loss
        losses = stage.evaluate()
        val = losses.get("loss/val")
        improved = val is not None and val < best_val_loss
        best_val_loss = val if improved else best_val_loss
        if rank == 0:
            if losses:
                log.line(f"step {iter_num}: train loss {losses['loss/train_eval']:.4f}, val loss {val:.4f}")
                log.scalars(iter_num, losses)
            if iter_num > start and not args.eval_only:
                save(args, stage, iter_num, best_val_loss, improved, tokenizer)

    try:
        if args.eval_only:
            evaluate_and_save(iter_num)
            return
        while iter_num < args.max_iters:
            if iter_num % args.eval_interval == 0 and not (resumed and iter_num == start):
                evaluate_and_save(iter_num)
            stats = stage.step(iter_num)
            log.scalars(iter_num, stats)
            if iter_num % args.log_interval == 0:
                log.line(stage.line(iter_num, stats))
            iter_num += 1
            log.bar.update()
            number = interrupt.pending()
            if number:
                if rank == 0:
                    save(args, stage, iter_num, best_val_loss, False, tokenizer)
                    log.line(f"interrupted: saved iteration {iter_num}; go on with --init_from=resume")
                return 143 if number == signal.SIGTERM else 0
        evaluate_and_save(iter_num)
        if args.ppo and rank == 0:
            stage.report()
    finally:
        log.close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
