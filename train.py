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
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import common  # first: it reports missing packages

# isort: split
import torch
import torch.distributed as dist

import ppo
from checkpoint import (
    check_generates,
    checkpoint_args,
    choose_device,
    load_checkpoint,
    save_checkpoint,
)
from common import (
    add_flags,
    flag,
    flag_names,
    flags_of_others,
    note,
    parse_args,
    run_main,
    write_atomic,
)
from experiments.plan import plan
from export import write_v3
from model import ModelArgs
from preferences import DPO, RewardModel
from pretraining import MODEL_FLAGS, Pretraining
from report import Log, load_boards, plain_config, plot, print_report, terminal_columns
from rlhf import RLHF, is_instruction_file
from sample import out_of_memory
from sft import FineTuning
from tinystories import parse_data, shards_tokenizer
from tokenizer import (
    Tokenizer,
    check_place,
    copy_tokenizer,
    data_folders,
    open_tokenizer,
    tokenizers_in,
)

# The stages by their flags; without one the run is Pretraining.
STAGES = {"sft": FineTuning, "rm": RewardModel, "dpo": DPO, "ppo": RLHF}
# Flags that may differ between a run and its continuation without making it another run.
FREE_FLAGS = (
    "out_dir",
    "plot",
    "plan",
    "plan_gpu",
    "plan_mfu",
    "eval_interval",
    "eval_iters",
    "log_interval",
    "eval_only",
    "init_from",
    "device",
    "always_save_checkpoint",
    "tensorboard",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "tokenizer",
    "compile",
    "fsdp",
    "max_iters",
    "ppo_iters",
    "ppo_debug",
    "report_rollouts",
    "roof_prompts",
    "roof_samples",
    *MODEL_FLAGS,
)

# ----------------------------------------------------------------------------
# flags


@dataclass
class StageFlags:
    """stage (default: pretraining)"""

    sft: bool = flag(False, "fine-tune the checkpoint in out_dir (or --init_from) on instructions")
    rm: bool = flag(False, "train a reward model from rankings of replies (--data=FILE.jsonl)")
    dpo: bool = flag(False, "train on rankings directly, without reward model or samples")
    ppo: bool = flag(False, "align the checkpoint in out_dir (or --init_from) with PPO")


@dataclass
class OutputFlags:
    """output"""

    out_dir: str = flag("out", "folder for checkpoints and logs")
    init_from: str = flag(
        "scratch", "scratch, resume (from out_dir), or a checkpoint whose weights to start from"
    )
    eval_interval: int = flag(2000, "iterations between evaluations; each saves a checkpoint")
    eval_only: bool = flag(False, "evaluate, print and exit (PPO: print the report)")
    log_interval: int = flag(1, "iterations between printed lines; log.jsonl has every iteration")
    always_save_checkpoint: bool = flag(False, "accepted; each evaluation saves ckpt.pt anyway")
    tensorboard: bool = flag(False, "also log to TensorBoard, in out_dir")
    wandb_log: bool = flag(
        False, "also log to Weights & Biases (--wandb_project, --wandb_run_name)"
    )
    wandb_project: str = flag("llamac", "project in Weights & Biases")
    wandb_run_name: str = flag(
        time.strftime("run%Y_%m_%d_%H_%M_%S"), "name of the run in Weights & Biases"
    )


@dataclass
class DataFlags:
    """data"""

    data: str = flag(
        "data",
        "data folder, or several with weights: dirA:0.7,dirB:0.3; for instructions and rankings "
        "JSON or JSONL files: a.jsonl,b.json",
        also=("data_dir",),
    )
    batch_size: int = flag(
        128, "sequences per forward pass (PPO: rollouts, --rm and --dpo: rankings)"
    )
    tokenizer: str = flag(
        "", "SentencePiece model or tokenizer.json; default: that of out_dir or data/"
    )


@dataclass
class OptimizerFlags:
    """optimizer"""

    learning_rate: float = flag(5e-4, "peak learning rate of AdamW")
    gradient_accumulation_steps: int = flag(1, "forward passes per step, over all processes")
    max_iters: int = flag(100000, "iterations in total, the checkpoint's included")
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices")
    beta1: float = flag(0.9, "Adam β1, decay of the first moment")
    beta2: float = flag(0.95, "Adam β2, decay of the second moment")
    adam_eps: float = flag(1e-8, "Adam ε, added to the root of the second moment")
    grad_clip: float = flag(1.0, "maximum gradient norm; 0: no clipping")
    decay_lr: bool = flag(True, "decay the learning rate to 0 at max_iters")
    schedule: str = flag("cosine", "shape of this decay", ("cosine", "linear"))


@dataclass
class SystemFlags:
    """system"""

    device: str = flag("", "cpu, cuda, cuda:1 or mps; default: the best there is")
    dtype: str = flag(
        "", "default: bfloat16 on cuda, else float32", ("", "float32", "bfloat16", "float16")
    )
    seed: int = flag(1337, "random seed of initialization, data order and samples")


COMMON = StageFlags, OutputFlags, DataFlags, OptimizerFlags, SystemFlags
EPILOG = """\
A stage has more flags: train.py --sft --help, --rm --help, --dpo --help, --ppo --help.
This help shows the flags that have an effect beside the others on the command line: with
--optimizer=muon it shows --muon_learning_rate too.
"""


def flags(argv=None):
    """The command line as a namespace; `args.given` holds the names of the flags on it."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, epilog=EPILOG)
    for group in (*COMMON, *(g for stage in (Pretraining, *STAGES.values()) for g in stage.flags)):
        add_flags(parser, group)
    return parse_args(parser, argv, unused)


def unused(args):
    """The flags without effect beside the others: {name: why}, or None for why if they are accepted
    all the same."""
    stage = stage_class(args)
    stages = {"pretraining": Pretraining, **{f"--{name}": other for name, other in STAGES.items()}}
    names = {k: [n for group in s.flags for n in flag_names(group)] for k, s in stages.items()}
    out = flags_of_others(next(k for k, s in stages.items() if s is stage), names)
    if not args.decay_lr:
        out["schedule"] = "has no effect with --decay_lr=False"
    if not args.wandb_log:
        out |= dict.fromkeys(
            ["wandb_project", "wandb_run_name"], "has no effect without --wandb_log"
        )
    for names, why in stage.unused(args):
        out = dict.fromkeys(names, why) | out
    hidden = {
        "always_save_checkpoint",
        *stage.accepted,
    }  # (what the former asks for is always done)
    if stage is not Pretraining:  # two stages are an error of their own
        hidden |= {name for name, other in STAGES.items() if other is not stage}
    return out | dict.fromkeys(hidden)


def setup(args):
    """Checks flags, chooses device and dtype, joins the other processes. Returns rank, world."""
    if args.vocab_source == "llama2" and args.vocab_size != 32000:
        raise ValueError("--vocab_size needs --vocab_source=custom: llama2 has 32000 tokens")
    for name in (
        "batch_size",
        "max_iters",
        "eval_interval",
        "eval_iters",
        "log_interval",
        "gradient_accumulation_steps",
        "roof_prompts",
        "roof_samples",
        "report_rollouts",
        "start_len",
        "reference_samples",
    ):
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
    kind = args.device.partition(":")[0]
    args.dtype = args.dtype or ("bfloat16" if kind == "cuda" else "float32")
    stage_class(args).check(args)
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
    names = (
        "model.py",
        "lora.py",
        "checkpoint.py",
        "kernels.py",
        "kernels.c",
        "ppo.py",
        "train.py",
        "pretraining.py",
        "sft.py",
        "preferences.py",
        "rlhf.py",
        "tinystories.py",
        "instruct.py",
        "tokenizer.py",
    )
    return hashlib.sha256(b"".join((folder / n).read_bytes() for n in names)).hexdigest()[:12]


def save(args, stage, iter_num, best_val_loss, improved, rank):
    """Writes the stage's checkpoint and model for ./run, on rank 0. The checkpoint before stays as
    .prev.pt; best.pt is a link to the one with the lowest validation loss."""
    state = stage.state()  # on all ranks: with --fsdp they put it together
    if rank:
        return
    path = Path(args.out_dir) / f"{stage.prefix}ckpt.pt"
    if stage.tokenizer:
        copy_tokenizer(stage.tokenizer, args.out_dir, replace=True)
    if path.exists():
        link(path, path.with_suffix(".prev.pt"))
    save_checkpoint(
        path,
        {
            "model_args": checkpoint_args(stage.model.args),
            "iter_num": iter_num,
            "best_val_loss": best_val_loss,
            "config": plain_config(args),
            "code_version": code_version(),
            "run_id": os.environ.get("TORCHELASTIC_RUN_ID"),
            **args.kept,
            **state,
        },
    )
    if "lora" in state:
        kept = {
            "model_args": checkpoint_args(stage.model.args),
            **{k: (args.kept | state)[k] for k in ("lora", "template", "tokenizer_hash")},
        }
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
    names = now.keys() & then.keys() - set(FREE_FLAGS) - unused(args).keys()
    names = [k for k in names if now[k] != then[k]]
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
        state = weights_alone(load_checkpoint(args.init_from), args.init_from, args)
        state |= {"iter_num": 0, "best_val_loss": 1e9}
    elif not args.ppo:
        if args.init_from == "resume" and mine != base and mine.exists():
            return newest(mine), True
        if args.init_from == "resume" and mine == base:
            state = newest(base)
            return weights_alone(state, base, args) if another_stage(state) else state, True
        state = None
        if mine != base:  # another stage starts from the pretrained model beside it
            state = weights_alone(newest(base), base, args) | {"iter_num": 0, "best_val_loss": 1e9}
    else:
        if args.init_from == "resume" and mine.exists():
            state = newest(mine)
            changed = differences(args, state)
            if not changed:
                return state, True
            if rank == 0:
                print(f"the PPO run there had other flags ({changed}): a new one starts")
        state = weights_alone(newest(base), base, args)
    return state, False


def another_stage(state):
    """Whether a checkpoint was written by a stage after pretraining."""
    written_by = state.get("config") or {}
    return any(k in state for k in ("ppo", "dpo", "reward")) or bool(written_by.get("sft"))


def weights_alone(state, path, args):
    """What a new run takes from a checkpoint: all but the state of the run that wrote it, so that the
    reference of this run is the checkpoint's model. Raises ValueError for a reward model, but as the
    start of another one."""
    if not args.rm:
        check_generates(state, path)
    run = (
        "ppo",
        "dpo",
        "reward",
        "position",
        "tokens",
        "bad_steps",
        "optimizer",
        "optimizers",
        "scaler",
        "unmerged",
        "lora",
    )
    return {k: v for k, v in state.items() if k not in run}


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


def shard_folders(args):
    """The folders of shards that the run reads."""
    data = [args.data] if stage_class(args) in (Pretraining, RLHF) else []
    data += [args.ptx_data or args.data] if args.ppo and args.ptx_coef else []
    return dict.fromkeys(f for d in data if not is_instruction_file(d) for f in parse_data(d)[0])


def load_tokenizer(args, checkpoint, vocab_size):
    """The run's tokenizer; its hash, "" if it is not known; and lines that say what is assumed. The
    tokenizer is None where there is none: pretraining needs it only to show text. Raises ValueError
    where the tokenizers of the checkpoint, of the shards and of --tokenizer are not the same."""
    other = args.init_from not in ("scratch", "resume")
    path = args.init_from if other else os.path.join(args.out_dir, "ckpt.pt")
    folder = os.path.dirname(os.path.abspath(path))
    made = [(path, checkpoint.get("tokenizer_hash"))] if checkpoint else []
    made += [shards_tokenizer(f, vocab_size) for f in shard_folders(args)]
    known = [(name, found) for name, found in made if found]
    owner, wanted = known[0] if known else ("", "")
    for name, found in known:
        if found != wanted:
            raise ValueError(
                f"{name} was made with another tokenizer ({found[:16]}) than {owner} "
                f"({wanted[:16]}): make shards of the same text with that tokenizer (pretokenize)"
            )
    if checkpoint and wanted and owner != path and not args.tokenizer:
        beside = tokenizers_in(folder, vocab_size)  # which are thought to be the checkpoint's
        if beside and wanted not in (Tokenizer(t).hash for t in beside):
            raise ValueError(
                f"{beside[0]}, which is beside {path}, is another tokenizer than that of {owner}: "
                "name the right one with --tokenizer, or make the shards again with it"
            )
    data = data_folders(args.data)
    folders = [folder, args.out_dir, *data] if checkpoint else [*data, args.out_dir]
    tokenizer = open_tokenizer(vocab_size, folders, wanted, args.tokenizer, owner, required=False)
    assumed = [
        f"{name} does not say which tokenizer it was made with: assuming {tokenizer.model_path}"
        for name, found in made
        if tokenizer and not found
    ]
    return tokenizer, tokenizer.hash if tokenizer else wanted, assumed


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
    tokenizer, tokenizer_hash, assumed = load_tokenizer(args, checkpoint, vocab_size)
    if tokenizer and not args.eval_only and (resumed or stage_class(args) is not Pretraining):
        check_place(tokenizer, args.out_dir)  # a new run of pretraining moves another one aside
    # What a checkpoint says of its text and dialogues goes into those that are made from it.
    kept = "template", "end_ids", "bos"
    args.kept = {k: checkpoint[k] for k in kept if k in (checkpoint or ())}
    args.kept["tokenizer_hash"] = tokenizer_hash
    stage = stage_class(args)(args, checkpoint, rank, world, context, tokenizer)
    if resumed:
        stage.resume(checkpoint)
    if args.ppo:
        args.max_iters = last_iteration(args, stage.first)
    for line in assumed:  # only now, so that a mistake in the flags ends in one line
        note(line)
    if rank == 0:
        count = sum(p.numel() for p in stage.model.parameters())
        how = f"{args.device}, {args.dtype}" + (f", {world} processes" if world > 1 else "")
        print(f"{count:,} parameters; iterations {iter_num} to {args.max_iters}; {how}")
        changed = differences(args, checkpoint) if resumed else ""
        if changed:
            print(f"resumed with other flags than the checkpoint's; the flags count: {changed}")
        then, now = checkpoint.get("code_version") if resumed else None, code_version()
        if then not in (None, now):
            print(
                f"code was {then}, is {now}: the numbers may not be those of a run without a pause"
            )
        if iter_num >= args.max_iters:
            print("nothing to do: the checkpoint has reached --max_iters")
    if args.ppo:
        j_star, error = stage.estimate_j_star()
        if rank == 0:
            print(f"best achievable J* = {j_star:.3f} ±{error:.3f} (95 %), from reference samples")
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
            log.line(
                f"step {iter_num}: train loss {losses['loss/train_eval']:.4f}, "
                f"val loss {losses['loss/val']:.4f}{''.join(more)}"
            )
            log.scalars(iter_num, losses)
        story = stage.story() if rank == 0 else ""
        if story:
            width = min(96, terminal_columns())
            log.line(textwrap.fill(story, width, initial_indent="  | ", subsequent_indent="  | "))
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
            except ppo.RewardError as e:  # raised before any weight has changed
                if world > 1 or iter_num == first:
                    raise
                save(args, stage, iter_num, best_val_loss, False, rank)
                raise ValueError(
                    f"{e}; iteration {iter_num} is saved: when it is mended, go on with "
                    "the same command and --init_from=resume"
                ) from None
            log.scalars(iter_num, stats)
            left = log.left(args.max_iters - iter_num - 1)
            if iter_num % args.log_interval == 0:
                log.line(stage.line(iter_num, stats) + ("" if args.ppo_debug else left))
            iter_num += 1
            log.bar.update()
            number = interrupt.pending()
            if number:
                save(args, stage, iter_num, best_val_loss, False, rank)
                log.line(
                    f"interrupted: saved iteration {iter_num}; "
                    "go on with the same command and --init_from=resume"
                )
                return 128 + number if number == signal.SIGTERM else 0
        evaluate_and_save()
    except (FloatingPointError, ppo.Mismatch) as e:
        # Mismatch is raised before an iteration has changed any weight.
        if isinstance(e, ppo.Mismatch) and iter_num > (first if saved is None else saved):
            save(args, stage, iter_num, best_val_loss, False, rank)
            saved = iter_num
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
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise OSError(
                f"out of memory on {args.device}: take a smaller --batch_size than {args.batch_size} "
                "(with more --gradient_accumulation_steps a step has as many tokens), or a smaller model"
            ) from None
        if world == 1 or "onnection" not in str(e):
            raise
        raise OSError(f"rank {rank}: another process of this run has gone: {e}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
