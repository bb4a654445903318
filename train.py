"""The training loop: pretraining, and with --sft, --rm, --dpo or --ppo the stages after it.

    python train.py --vocab_source=custom --vocab_size=512 --dim=64 --n_layers=5 --n_heads=8
    python train.py --sft --data=data/task/sft.jsonl              # out/ckpt.pt learns to obey
    python train.py --out_dir=out --init_from=resume --ppo        # aligns out/ckpt.pt
    torchrun --standalone --nproc_per_node=4 train.py             # DDP, on one node or many

It reads shards made by tinystories.py and writes into --out_dir:
    ckpt.pt        the newest state; ckpt.prev.pt the one before
    best.pt        the state with the lowest validation loss
    model.bin      the model for ./run
    log.jsonl      one JSON object an iteration
and those of the other stages with their name before: sft_ckpt.pt, ppo_ckpt.pt, ...; sft_lora.pt
has the adapters of --sft --lora_rank alone.

A checkpoint is complete: --init_from=resume with the same flags goes on as if the run had never
been interrupted. Ctrl-C finishes the step, saves, and says how to go on. One run at a time has --out_dir.
NATIVE_KERNELS=0 in the environment turns the CPU kernels of kernels.c off; CC names their compiler.
"""

import argparse
import hashlib
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
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path

import common  # noqa: I001  first: it says what to do where a package is not installed

import torch
import torch.distributed as dist

import ppo
from alignment import Alignment
from checkpoint import checkpoint_args, load_checkpoint, save_checkpoint
from experiments.plan import GPUS, plan
from export import write_v3
from model import ModelArgs
from report import Log, load_boards, plain_config, plot, print_report
from sample import choose_device
from stages import DPO, MODEL_FLAGS, FineTuning, Pretraining, RewardModel
from tokenizer import Tokenizer, boolean, find_tokenizer, parse_args, run_main, write_atomic

# The stages by their flags; without one the run is Pretraining.
STAGES = {"sft": FineTuning, "rm": RewardModel, "dpo": DPO, "ppo": Alignment}
# Flags that may differ between a run and its continuation without making it another run.
FREE_FLAGS = (
    "out_dir", "plot", "plan", "plan_gpu", "plan_mfu", "eval_interval", "eval_iters",
    "log_interval", "eval_only", "init_from", "device",
    "always_save_checkpoint", "tensorboard", "wandb_log", "wandb_project", "wandb_run_name",
    "tokenizer", "compile", "fsdp", "max_iters", "ppo_iters", "ppo_debug", "report_rollouts",
    "roof_prompts", "roof_samples",
    *MODEL_FLAGS,
)  # fmt: skip

# ----------------------------------------------------------------------------
# flags


def flags(argv=None):
    """The command line as a namespace; `args.given` holds the names that were on it."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)

    def group(title):
        g = parser.add_argument_group(title)

        def add(name, default, help, choices=None):
            kind, more = type(default), {}
            if kind is bool or default is None:
                kind, more = boolean, dict(nargs="?", const=True)
            g.add_argument(
                f"--{name}", default=default, type=kind, help=help, choices=choices, **more
            )

        return add

    add = group("output")
    add("out_dir", "out", "folder for checkpoints and logs")
    add("eval_interval", 2000, "iterations between evaluations; each saves a checkpoint")
    add("eval_iters", 100, "batches an evaluation")
    add("log_interval", 1, "iterations between printed lines; log.jsonl has them all")
    add("eval_only", False, "evaluate, print, and leave (with --ppo: the report)")
    add("plot", False, "draw the logs in out_dir, and leave")
    add("plan", False, "print memory, tokens/s and hours for these shapes on GPUs, and leave")
    add("plan_gpu", "h100", "which GPUs; cpu: this machine", tuple(GPUS))
    add("plan_mfu", 0.4, "share of their arithmetic that training will use; a run's log has its own")
    add("always_save_checkpoint", False, "accepted; each evaluation saves ckpt.pt anyway")
    add("init_from", "scratch", "scratch, resume (from out_dir), or a checkpoint: its weights")
    add("tensorboard", False, "also log to TensorBoard, in out_dir")
    add("wandb_log", False, "also log to Weights & Biases")
    add("wandb_project", "llamac", "its project")
    add("wandb_run_name", time.strftime("run%Y_%m_%d_%H_%M_%S"), "its run")

    add = group("data")
    add("data", "data", "data folder, or several with weights: dirA:0.7,dirB:0.3; with --sft a "
        "JSON or JSONL file of instructions, or several: a.jsonl,b.json")
    add("val_data", "", "held-out instructions; default: a tenth of --data")
    add("batch_size", 128, "sequences a forward pass (micro-batch)")
    add("max_seq_len", 256, "tokens a sequence, the model's context")
    add("vocab_source", "llama2", "llama2 (32000 tokens) or custom", ("llama2", "custom"))
    add("vocab_size", 32000, "tokens in the vocabulary")
    add("tokenizer", "", "SentencePiece model, if not tok<vocab_size>.model in out_dir or data/")

    add = group("model")
    add("dim", 288, "width")
    add("n_layers", 6, "layers")
    add("n_heads", 6, "query heads")
    add("n_kv_heads", 0, "key/value heads, which query heads share; 0: as many as query heads")
    add("multiple_of", 32, "the feed-forward width is rounded up to a multiple of it")
    add("dropout", 0.0, "dropout rate")

    add = group("optimizer")
    add("optimizer", "adamw", "muon: Muon for matrices, AdamW for the rest", ("adamw", "muon"))
    add("gradient_accumulation_steps", 1, "forward passes a step, over all processes")
    add("learning_rate", 5e-4, "highest learning rate (of AdamW, where Muon is used too)")
    add("muon_learning_rate", 0.02, "highest learning rate of Muon")
    add("max_iters", 100000, "iterations in all, those of the checkpoint included")
    add("weight_decay", 0.1, "decoupled weight decay of matrices")
    add("beta1", 0.9, "Adam's first decay")
    add("beta2", 0.95, "Adam's second decay")
    add("adam_eps", 1e-8, "Adam's epsilon, which keeps small gradients from large steps")
    add("grad_clip", 1.0, "largest gradient norm; 0: no clipping")
    add("decay_lr", True, "let the learning rate fall to 0 at max_iters")
    add("schedule", "cosine", "how it falls", ("cosine", "linear"))
    add("warmup_iters", 1000, "iterations of linear warm-up")

    add = group("system")
    add("device", "", "cpu, cuda, cuda:1, mps; default: the best there is")
    add("dtype", "", "default: bfloat16 on cuda, else float32",
        ("", "float32", "bfloat16", "float16"))  # fmt: skip
    add("compile", None, "use torch.compile; default: on cuda")
    add("fsdp", False, "shard model, gradients and optimizer over the processes of torchrun")
    add("seed", 1337, "of initialisation, data order and rollouts")

    add = group("instructions")
    add("sft", False, "fine-tune the checkpoint in out_dir (or --init_from) on instructions")
    add("template", "", "how a dialogue is written: plain, llama2, or a file {\"turn\": ..., "
        "\"system\": ...}; default: the checkpoint's, else plain")

    add = group("LoRA, with --sft and --ppo")
    add("lora_rank", 0, "train adapters of this rank (LoRA) instead of the weights; 0: all weights")
    add("lora_alpha", 16.0, "their scale is lora_alpha / lora_rank")
    add("lora_layers", "q,v", "matrices that get one, of q,k,v,o,gate,down,up")
    add("lora_dropout", 0.0, "dropout rate before them (--sft)")
    add("lora_4bit", False, "keep these matrices in 4 bits (QLoRA, --sft); needs bitsandbytes")

    add = group("preferences (--batch_size is the rankings a forward pass)")
    add("rm", False, "train a reward model from rankings (--data=FILE.json or .jsonl)")
    add("freeze_layers", 0, "--rm: embeddings and this many of the first layers stay as they are")
    add("reference_samples", 256, "replies to held-out prompts: --rm gives those of the model it "
        "starts from mean 0 and variance 1, --dpo estimates its KL")  # fmt: skip
    add("dpo", False, "learn from rankings without reward model or samples")
    add("dpo_beta", 0.1, "price of the distance from the model at the start")
    add("dpo_label_smoothing", 0.0, "share of pairs whose order is thought to be wrong")
    add("dpo_reference_free", False, "as if the model at the start found all replies alike")

    add = group("PPO (--batch_size is the rollouts a forward pass, --grad_clip applies)")
    add("ppo", False, "align the checkpoint in out_dir (or --init_from) with PPO")
    add("ppo_iters", 0, "PPO iterations; 0: up to max_iters, those of the checkpoint included")
    add("reward", "length", "length, FILE.py:FUNCTION of lists of prompts and responses, or a "
        "reward model (.pt) of --rm")  # fmt: skip
    add("ref_device", "", "where the frozen reference is; default: as --device")
    add("reward_device", "", "where the reward model is; default: as --device")
    add("ptx_data", "", "text that --ptx_coef mixes in: folder or file; default: as --data")
    add("offload", False, "keep reference and reward model in the CPU's memory while unused")
    add("target_len", 200, "tokens of prompt and response that the length reward wants")
    add("start_len", 30, "prompts: BOS and the first 0 to start_len - 1 tokens of a story")
    add("value_learning_rate", 0.0, "the critic's learning rate; 0: as the policy's")
    add("ppo_warmup_steps", 10, "optimizer steps of linear warm-up")
    add("ppo_debug", False, "print every statistic of every iteration")
    add("roof_prompts", 32, "prompts from which the roof J* is estimated")
    add("roof_samples", 128, "reference samples for each of them")
    add("report_rollouts", 512, "rollouts before and after, for the report")
    taken = {a.dest for a in parser._actions} | {"mini_batch_size", "max_grad_norm"}
    # the help of a PPO flag is the comment behind its field
    notes = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(ppo.PPOConfig), re.M))
    for f in fields(ppo.PPOConfig):
        if f.name not in taken:
            add(f.name, f.default, notes.get(f.name, f"see PPOConfig.{f.name}").replace("%", "%%"))
    args = parse_args(parser, argv)
    words = sys.argv[1:] if argv is None else argv
    args.given = {w.lstrip("-").partition("=")[0] for w in words}
    return args


def setup(args):
    """Checks flags, chooses device and dtype, joins the other processes. Returns rank, world."""
    if args.vocab_source == "llama2" and args.vocab_size != 32000:
        raise ValueError("--vocab_size needs --vocab_source=custom: llama2 has 32000 tokens")
    for name in ("batch_size", "max_iters", "eval_interval", "eval_iters", "log_interval",
                 "gradient_accumulation_steps", "roof_prompts", "roof_samples", "report_rollouts",
                 "start_len", "reference_samples"):  # fmt: skip
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name, value in vars(args).items():
        signed = name in ("entropy_coef", "missing_eos_penalty")
        if isinstance(value, (int, float)) and value < 0 and not signed:
            raise ValueError(f"--{name} must not be negative, not {value}")
    for name in ("beta1", "beta2", "averaging"):
        if getattr(args, name) >= 1:
            raise ValueError(f"--{name} must be below 1, not {getattr(args, name)}")
    args.device = choose_device(args.device)
    for name in (args.ref_device, args.reward_device):
        choose_device(name)
    kind = args.device.partition(":")[0]
    args.dtype = args.dtype or ("bfloat16" if kind == "cuda" else "float32")
    if args.lora_rank and (args.rm or args.dpo):
        raise ValueError("--lora_rank is for --sft and --ppo")
    if not 0 <= args.dpo_label_smoothing < 0.5:
        raise ValueError("--dpo_label_smoothing must be from 0 to below 0.5: a half says nothing")
    if args.dpo_beta <= 0:
        raise ValueError(f"--dpo_beta must be above 0, not {args.dpo_beta}")
    if args.lora_4bit and not (args.lora_rank and args.sft):
        raise ValueError("--lora_4bit is for --sft with --lora_rank")
    pretraining = stage_class(args) is Pretraining
    # the other stages' batches change their shape
    args.compile = kind == "cuda" and pretraining if args.compile is None else args.compile
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.fsdp and (world == 1 or not pretraining or args.dtype == "float16"):
        raise ValueError("--fsdp is for pretraining with torchrun, in float32 or bfloat16")
    if world > 1:
        if kind == "cuda":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(args.device)
        join_processes("nccl" if kind == "cuda" else "gloo", rank, world)
    steps = args.gradient_accumulation_steps
    if not args.ppo and steps > 1 and steps % world:
        raise ValueError(f"{world} processes cannot share --gradient_accumulation_steps={steps}")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(args.seed)
    return rank, world


def join_processes(backend, rank, world):
    """init_process_group. After torchrun --max-restarts on one node the store still holds the dead
    processes' addresses (PyTorch 2.13), so each restart has names of its own in it; several nodes
    need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment instead."""
    env, more = os.environ, {}
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart != "0" and env.get("GROUP_WORLD_SIZE") == "1":
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, False)
        more = {"store": dist.PrefixStore(f"restart{restart}", store)}
    dist.init_process_group(backend, rank=rank, world_size=world, **more)


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop ends after a whole step. One more, a second later,
    ends at once: torchrun sends its workers Ctrl-C again, which the terminal has sent already."""

    def __init__(self):
        self.signal, self.time = 0, math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if time.monotonic() > self.time + 1:
            raise KeyboardInterrupt
        self.signal, self.time = int(number), min(self.time, time.monotonic())

    def pending(self):
        """The signal, or 0: the same answer on every rank."""
        mine = torch.tensor(self.signal)
        if dist.is_initialized():
            mine = mine.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        return int(mine)


# ----------------------------------------------------------------------------
# checkpoints


def code_version():
    """Changes with the code that computes; kept in checkpoints."""
    folder = Path(__file__).parent
    names = ("model.py", "lora.py", "checkpoint.py", "kernels.py", "kernels.c", "ppo.py", "train.py",
             "stages.py", "alignment.py", "tinystories.py", "instruct.py")  # fmt: skip
    return hashlib.sha256(b"".join((folder / n).read_bytes() for n in names)).hexdigest()[:12]


def save(args, stage, iter_num, best_val_loss, improved, rank):
    """Writes the stage's checkpoint and model for ./run, on rank 0. The checkpoint before stays as
    .prev.pt; best.pt is a link to the one with the lowest validation loss."""
    state = stage.state()  # on all ranks: with --fsdp they put it together
    if rank:
        return
    path = Path(args.out_dir) / f"{stage.prefix}ckpt.pt"
    if path.exists():
        link(path, path.with_suffix(".prev.pt"))
    save_checkpoint(path, {
        "model_args": checkpoint_args(stage.model.args),
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": plain_config(args),
        "code_version": code_version(),
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID"),
        **args.kept,
        **state,
    })  # fmt: skip
    if "lora" in state:
        kept = {"model_args": checkpoint_args(stage.model.args),
                **{k: state[k] for k in ("lora", "template")}}  # fmt: skip
        save_checkpoint(path.with_name(f"{stage.prefix}lora.pt"), kept)
    if improved:
        link(path, path.with_name(f"{stage.prefix}best.pt"))
    if args.rm:
        return  # it tells nothing
    try:
        with write_atomic(path.with_name(f"{stage.prefix}model.bin")) as f:
            write_v3(f, stage.model.args, state["model"], "fp32", stage.tokenizer, **args.kept)
    except ValueError as e:  # a tokenizer that run.c has not: no reason to stop training
        print(f"warning: no {stage.prefix}model.bin: {e}", file=sys.stderr)


def link(old, new):
    """Makes `new` another name of the file `old`, replacing what was there in one step."""
    temporary = new.with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(old, temporary)
    except OSError:  # a file system without hard links
        with open(old, "rb") as source, write_atomic(temporary) as f:
            shutil.copyfileobj(source, f)
    os.replace(temporary, new)


def newest(path):
    """The checkpoint at path or, if it is damaged, the one before it, saying so. The damaged one is
    moved aside, lest the next save takes it for a good one and lets it replace the other."""
    try:
        return load_verified(path)
    except (ValueError, FileNotFoundError) as e:
        previous = path.with_suffix(".prev.pt")
        if not previous.exists():
            raise
        print(f"warning: {e}; going on from {previous}", file=sys.stderr)
        state = load_verified(previous)
        with suppress(FileNotFoundError):
            os.replace(path, path.with_suffix(".damaged.pt"))
        return state


def load_verified(path):
    """load_checkpoint, which does not notice flipped bits, after the checksums of the archive."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile
    except (zipfile.BadZipFile, EOFError, RuntimeError):
        raise ValueError(f"{path} is damaged: a checksum is wrong") from None
    return load_checkpoint(path)


def check_fits(args, model_args):
    """Raises ValueError naming each flag on the command line that the checkpoint contradicts."""
    wrong = [
        f"{n} is {model_args[n]} there, --{n}={getattr(args, n)} here"
        for n in MODEL_FLAGS
        if n in args.given and model_args.get(n) not in (None, getattr(args, n))
    ]
    if wrong:
        raise ValueError("the checkpoint does not fit the flags: " + "; ".join(wrong))


def differences(args, checkpoint):
    """The flags that make this another run than the checkpoint's, for a person to read."""
    then, now = checkpoint.get("config", {}), plain_config(args)
    names = [k for k in now.keys() & then.keys() - set(FREE_FLAGS) if now[k] != then[k]]
    return ", ".join(f"{k} was {then[k]}, is {now[k]}" for k in sorted(names))


def starting_point(args, rank):
    """The checkpoint that the run starts from, or None; and whether it is this run, interrupted."""
    base = Path(args.out_dir) / "ckpt.pt"
    mine = base.with_name(f"{stage_class(args).prefix}ckpt.pt")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and mine.exists():
        state = newest(mine)  # torchrun --max-restarts has started this very run again
        if state.get("run_id") == os.environ.get("TORCHELASTIC_RUN_ID"):
            return state, True
    if args.ppo and args.eval_only:
        return newest(mine), True
    if args.init_from not in ("scratch", "resume"):
        state = {**load_checkpoint(args.init_from), "iter_num": 0, "best_val_loss": 1e9}
        for name in ("ppo", "dpo", "reward", "position", "optimizer"):  # its weights alone
            state.pop(name, None)
    elif not args.ppo:
        if args.init_from == "resume" and (mine == base or mine.exists()):
            return newest(mine), True
        state = None
        if mine != base:  # another stage starts from the pretrained model beside it
            state = {**newest(base), "iter_num": 0, "best_val_loss": 1e9}
    else:
        if args.init_from == "resume" and mine.exists():
            state = newest(mine)
            changed = differences(args, state)
            if not changed:
                return state, True
            if rank == 0:
                print(f"the PPO run there had other flags ({changed}): a new one starts")
        state = newest(base)
    return state, False


def move_aside(path, rank):
    """Keeps the checkpoint of an earlier run, where a new run would write its own."""
    there = path.exists()
    if dist.is_initialized():
        dist.barrier()  # all have looked
    if there and rank == 0:
        os.replace(path, path.with_suffix(".replaced.pt"))
        print(f"{path} of an earlier run is now {path.with_suffix('.replaced.pt')}")


def stage_class(args):
    """What the flags make of the run. Raises ValueError for two stages at a time."""
    chosen = [name for name in STAGES if getattr(args, name)]
    if len(chosen) > 1:
        raise ValueError(f"one stage at a time, not {' and '.join('--' + n for n in chosen)}")
    return STAGES[chosen[0]] if chosen else Pretraining


def last_iteration(args, first):
    return first + args.ppo_iters if args.ppo and args.ppo_iters else args.max_iters


# ----------------------------------------------------------------------------
# the loop


def load_tokenizer(args, vocab_size):
    """The model's tokenizer; None if there is none: training needs it only to show text."""
    try:
        folders = args.out_dir, os.path.dirname(os.path.abspath(args.init_from))
        tokenizer = Tokenizer(args.tokenizer or find_tokenizer(vocab_size, *folders))
    except FileNotFoundError:
        if args.tokenizer:
            raise
        return None
    if tokenizer.n_words != vocab_size:
        raise ValueError(
            f"{tokenizer.model_path} has {tokenizer.n_words} tokens, the model {vocab_size}: "
            "it is not this model's tokenizer"
        )
    return tokenizer


def start(args, rank, world):
    """The stage, ready for its first step; its iteration, the best loss so far, and whether it
    takes up an interrupted run."""
    checkpoint, resumed = starting_point(args, rank)
    if checkpoint is not None:
        check_fits(args, checkpoint["model_args"])
    iter_num, best_val_loss = 0, 1e9
    if checkpoint is not None:
        iter_num = checkpoint.setdefault("iter_num", 0)
        best_val_loss = checkpoint.get("best_val_loss", 1e9)
    dtype = getattr(torch, args.dtype)

    def context():
        half = dtype is not torch.float32
        return torch.autocast(args.device.partition(":")[0], dtype) if half else nullcontext()

    vocab_size = checkpoint["model_args"]["vocab_size"] if checkpoint else args.vocab_size
    tokenizer = load_tokenizer(args, vocab_size)
    # What a checkpoint says of its text and dialogues goes into those that are made from it.
    kept = "template", "end_ids", "bos"
    args.kept = {k: checkpoint[k] for k in kept if k in (checkpoint or ())}
    stage = stage_class(args)(args, checkpoint, rank, world, context, tokenizer)
    if resumed:
        stage.resume(checkpoint)
    if args.ppo:
        args.max_iters = last_iteration(args, stage.first)
    if rank == 0:
        count = sum(p.numel() for p in stage.model.parameters())
        how = f"{args.device}, {args.dtype}" + (f", {world} processes" if world > 1 else "")
        print(f"{count:,} parameters; iterations {iter_num} to {args.max_iters}; {how}")
        changed = differences(args, checkpoint) if resumed else ""
        if changed:
            print(f"going on with other flags: {changed}")
        then, now = checkpoint.get("code_version") if resumed else None, code_version()
        if then not in (None, now):
            print(f"code was {then}, is {now}: the numbers may not be those of a run without a pause")
        if iter_num >= args.max_iters:
            print("nothing to do: the checkpoint has reached --max_iters")
    if args.ppo:
        roof, error = stage.estimate_roof()
        if rank == 0:
            print(f"roof J* = {roof:.3f} ±{error:.3f} (95 %), the highest J there is, "
                  "from reference samples")  # fmt: skip
    return stage, iter_num, best_val_loss, resumed


def train(args, rank, world):
    stage, iter_num, best_val_loss, resumed = start(args, rank, world)
    first, report = iter_num, Path(args.out_dir) / "ppo_report.json"
    if args.ppo and args.eval_only:
        return stage.report() if rank == 0 else None
    if not resumed and not args.eval_only:  # only now: a mistake in the flags loses nothing
        move_aside(Path(args.out_dir) / f"{stage.prefix}ckpt.pt", rank)
    if args.ppo and not resumed and rank == 0:
        report.unlink(missing_ok=True)  # of another run
    if rank == 0 and not args.eval_only:
        common.remove_temporaries(args.out_dir)  # of a run that was killed while it wrote
    interrupt = Interrupt()
    log = Log(args, f"{stage.prefix}log.jsonl", iter_num, resumed, rank)
    saved = iter_num if resumed else None

    def evaluate_and_save():
        nonlocal best_val_loss, saved
        losses = stage.evaluate()
        val = losses.get("loss/val", math.inf)
        improved, best_val_loss = val < best_val_loss, min(val, best_val_loss)
        if losses:
            more = [f", {k} {v:.4g}" for k, v in losses.items() if not k.startswith("loss/")]
            log.line(f"step {iter_num}: train loss {losses['loss/train_eval']:.4f}, "
                     f"val loss {losses['loss/val']:.4f}{''.join(more)}")  # fmt: skip
            log.scalars(iter_num, losses)
        story = stage.story() if rank == 0 else ""
        if story:
            log.line(textwrap.fill(story, 96, initial_indent="  | ", subsequent_indent="  | "))
            log.text(iter_num, "story", story)
        if not args.eval_only and (iter_num > first or improved and resumed):
            save(args, stage, iter_num, best_val_loss, improved, rank)
            saved = iter_num

    try:
        while iter_num < args.max_iters and not args.eval_only:
            if iter_num % args.eval_interval == 0:
                evaluate_and_save()
            try:
                stats = stage.step(iter_num)
            except ValueError as e:  # a mistake in the user's reward, before any weight has changed
                if world > 1 or iter_num == first:
                    raise
                save(args, stage, iter_num, best_val_loss, False, rank)
                raise ValueError(f"{e}; iteration {iter_num} is saved: when it is mended, go on with "
                                 "the same command and --init_from=resume") from None  # fmt: skip
            log.scalars(iter_num, stats)
            left = log.left(args.max_iters - iter_num - 1)
            if iter_num % args.log_interval == 0:
                log.line(stage.line(iter_num, stats) + ("" if args.ppo_debug else left))
            iter_num += 1
            log.bar.update()
            number = interrupt.pending()
            if number:
                save(args, stage, iter_num, best_val_loss, False, rank)
                log.line(f"interrupted: saved iteration {iter_num}; "
                         "go on with the same command and --init_from=resume")  # fmt: skip
                return 128 + number if number == signal.SIGTERM else 0
        evaluate_and_save()
    except (FloatingPointError, ppo.Mismatch) as e:
        where = f"{args.out_dir}/{stage.prefix}ckpt.pt has iteration {saved}" if saved else "none"
        raise ValueError(f"{e}; the last good checkpoint: {where}") from None
    finally:
        log.close()
    if args.ppo and rank == 0:
        stage.report()


def main(argv=None):
    args = flags(argv)
    if args.plot:
        return plot(args.out_dir)
    if args.plan:
        plan(args, ModelArgs(**{name: getattr(args, name) for name in MODEL_FLAGS}))
        return None
    load_boards(args)  # only to see that they are there, before an hour of work
    rank, world = setup(args)
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    report = Path(args.out_dir) / "ppo_report.json"
    if args.ppo and args.eval_only and report.exists():
        return print_report(json.loads(report.read_text())) if rank == 0 else None
    # --plot and --eval_only only read, so that a run can be looked at while it goes on.
    alone = common.lock_folder(args.out_dir) if rank == 0 and not args.eval_only else nullcontext()
    try:
        with alone, common.unbreakable_output():
            return train(args, rank, world)
    except RuntimeError as e:
        if world == 1 or "onnection" not in str(e):
            raise
        raise OSError(f"rank {rank}: another process of this run has gone: {e}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
