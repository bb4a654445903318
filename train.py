"""The training loop: pretraining, and with --sft, --rm, --dpo or --ppo the stages after it.

    python train.py --vocab_source=custom --vocab_size=512 --dim=64 --n_layers=5 --n_heads=8
    python train.py --sft --data=data/task/sft.jsonl          # fine-tunes out/ckpt.pt
    python train.py --out_dir=out --init_from=resume --ppo    # aligns out/ckpt.pt
    torchrun --standalone --nproc_per_node=4 train.py         # DDP, on one or several nodes

Pretraining reads shards made by tinystories.py and writes into --out_dir:
    ckpt.pt        the newest checkpoint
    ckpt.prev.pt   the checkpoint before it
    best.pt        the checkpoint with the lowest validation loss
    model.bin      the model for ./run
    log.jsonl      one JSON object per iteration
The other stages write the same files with a prefix: sft_ckpt.pt, ppo_ckpt.pt, ... A reward model
has no model.bin, and PPO no best.pt, but ppo_report.json, ppo_report.png and roof.json. With
--lora_rank, --sft also writes sft_lora.pt, which holds the adapters alone.

A checkpoint is complete: --init_from=resume with the same flags continues the run as if it had
never been interrupted. Ctrl-C finishes the step, saves a checkpoint, and prints how to resume. Only
one run at a time can write to --out_dir. The environment variable NATIVE_KERNELS=0 turns the CPU
kernels of kernels.c off; CC names their compiler.
"""

import argparse
import hashlib
import math
import os
import signal
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import common  # imported first, because it reports missing packages

# isort: split
import torch
import torch.distributed as dist

from checkpoint import (
    checkpoint_args,
    choose_device,
    link,
    move_aside,
    save_checkpoint,
    start_has_changed,
    starting_point,
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
from export import write_v3
from instruct import find_template
from preferences import DPO, RewardModel
from pretraining import MODEL_FLAGS, Pretraining, Run
from report import Log, load_boards, plot, plot_at_end, terminal_columns
from rlhf import RLHF
from sample import out_of_memory
from sft import FineTuning
from tinystories import parse_data, shards_tokenizer
from tokenizer import check_place, copy_tokenizer, load_tokenizer

# The stage that each flag selects; without such a flag the stage is Pretraining.
STAGES = {"sft": FineTuning, "rm": RewardModel, "dpo": DPO, "ppo": RLHF}
# Flags that may change when a run is resumed, without making it a different run.
FREE_FLAGS = {
    *("out_dir", "init_from", "tokenizer", "device", "compile", "max_iters", "ppo_iters"),
    *("eval_interval", "eval_iters", "eval_only", "log_interval", "always_save_checkpoint"),
    *("fsdp", "checkpoint_activations", "offload", "ref_device", "reward_device"),
    *("tensorboard", "wandb_log", "wandb_project", "wandb_run_name", "ppo_debug"),
    *("roof_prompts", "roof_samples", "report_rollouts"),
    *("plot", "plan", "plan_gpu", "plan_mfu", "vocab_source"),
    *MODEL_FLAGS,
}

# ----------------------------------------------------------------------------
# flags


@dataclass
class StageFlags:
    """stage (default: pretraining)"""

    sft: bool = flag(False, "supervised fine-tuning of the checkpoint in out_dir (or --init_from)")
    rm: bool = flag(False, "train a reward model from rankings of replies (--data=FILE.jsonl)")
    dpo: bool = flag(False, "train on rankings directly, without reward model or samples")
    ppo: bool = flag(False, "align the checkpoint in out_dir (or --init_from) with PPO")


@dataclass
class OutputFlags:
    """output"""

    out_dir: str = flag("out", "folder for checkpoints and logs")
    init_from: str = flag(
        "scratch",
        "scratch, resume (from out_dir), or a checkpoint with the initial weights; the stages "
        "after pretraining start from out_dir/ckpt.pt with scratch, and with resume if out_dir has "
        "no later checkpoint",
    )
    eval_interval: int = flag(2000, "iterations between evaluations; each saves a checkpoint")
    eval_only: bool = flag(False, "evaluate, print and exit (PPO: print the report)")
    log_interval: int = flag(
        1, "iterations between printed lines; log.jsonl records every iteration"
    )
    always_save_checkpoint: bool = flag(False, "ignored: every evaluation saves ckpt.pt")
    tensorboard: bool = flag(
        False, "also log to TensorBoard: one folder per run in out_dir/tensorboard"
    )
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
        "", "SentencePiece model or tokenizer.json; default: the one in out_dir or data/"
    )


@dataclass
class OptimizerFlags:
    """optimizer"""

    learning_rate: float = flag(5e-4, "peak learning rate of AdamW")
    gradient_accumulation_steps: int = flag(1, "forward passes per step, over all processes")
    max_iters: int = flag(
        100000, "iterations in total; a resumed run counts on from its checkpoint"
    )
    weight_decay: float = flag(0.1, "decoupled weight decay, applied to matrices only")
    beta1: float = flag(0.9, "Adam β1, decay of the first moment")
    beta2: float = flag(0.95, "Adam β2, decay of the second moment")
    adam_eps: float = flag(1e-8, "Adam ε, added to the square root of the second moment")
    grad_clip: float = flag(1.0, "maximum gradient norm; 0: no clipping")
    decay_lr: bool = flag(True, "decay the learning rate to 0 at max_iters")
    schedule: str = flag("cosine", "shape of the learning-rate decay", ("cosine", "linear"))


@dataclass
class SystemFlags:
    """system"""

    device: str = flag("", "cpu, cuda, cuda:1 or mps; default: the fastest available")
    dtype: str = flag(
        "",
        "default: bfloat16 on cuda, except for PPO of models up to width 288; else float32",
        ("", "float32", "bfloat16", "float16"),
    )
    seed: int = flag(1337, "random seed of initialization, data order and samples")


COMMON = StageFlags, OutputFlags, DataFlags, OptimizerFlags, SystemFlags
EPILOG = """\
Each stage has flags of its own: train.py --sft --help, --rm --help, --dpo --help, --ppo --help.
The help lists only flags that have an effect in combination with the other flags on the command
line: --muon_learning_rate, for example, is listed with --optimizer=muon --help.
"""


def flags(argv=None):
    """Parses the command line into a namespace; `args.given` holds the names of the flags on it."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, epilog=EPILOG)
    for group in (*COMMON, *(g for stage in (Pretraining, *STAGES.values()) for g in stage.flags)):
        add_flags(parser, group)
    return parse_args(parser, argv, unused)


def unused(args):
    """Flags that have no effect in combination with the other flags: {name: reason}. The reason is
    None for a flag that is accepted and ignored."""
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
    hidden = {"always_save_checkpoint", *stage.accepted}  # evaluations always save
    if stage is not Pretraining:  # stage_class reports a second stage with its own message
        hidden |= {name for name, other in STAGES.items() if other is not stage}
    return out | dict.fromkeys(hidden)


def stage_class(args):
    """The stage that the flags select. Raises ValueError if they select two stages."""
    chosen = [name for name in STAGES if getattr(args, name)]
    if len(chosen) > 1:
        raise ValueError(f"one stage at a time, not {' and '.join('--' + n for n in chosen)}")
    return STAGES[chosen[0]] if chosen else Pretraining


# ----------------------------------------------------------------------------
# setup


def check_ranges(args):
    """Raises ValueError for flags out of range, also with --plan."""
    stage = stage_class(args)
    at_least_one = (
        *("batch_size", "max_iters", "eval_interval", "eval_iters", "log_interval"),
        *("gradient_accumulation_steps", *stage.positive),
    )
    for name in at_least_one:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value < 0 and name not in stage.signed:
            raise ValueError(f"--{name} must not be negative, not {value}")
    if stage is Pretraining and args.max_seq_len < 2:
        raise ValueError(f"--max_seq_len must be at least 2, not {args.max_seq_len}")
    for name in ("beta1", "beta2", "lora_dropout"):
        if getattr(args, name) >= 1:
            raise ValueError(f"--{name} must be below 1, not {getattr(args, name)}")
    if args.lora_rank and not args.lora_alpha:
        raise ValueError("--lora_alpha must be above 0: with 0, the adapters learn nothing")
    if args.seed >= 2**32:  # of larger ones, the products that seed an iteration exceed 64 bits
        raise ValueError(f"--seed must be below 2^32, not {args.seed}")
    if args.plan and not args.plan_mfu:
        raise ValueError("--plan_mfu must be above 0")
    if args.vocab_source == "llama2" and args.vocab_size != 32000:
        raise ValueError("--vocab_size needs --vocab_source=custom: llama2 has 32000 tokens")


def setup(args):
    """Checks the flags, chooses device and dtype, and initializes the process group. Returns a Run
    without the fields that depend on a checkpoint; `start` sets those. Raises ValueError for flags
    out of range."""
    check_ranges(args)
    stage = stage_class(args)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = choose_device(args.device)
    cuda = device.partition(":")[0] == "cuda"
    if cuda and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    compile = cuda if args.compile is None else args.compile
    run = Run(args, rank, world, device, dtype, compile)
    stage.check(run)
    if world > 1:
        if cuda:
            torch.cuda.set_device(device)
        join_processes("nccl" if cuda else "gloo", rank, world)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(args.seed)
    return run


def join_processes(backend, rank, world):
    """Calls init_process_group. After a restart by torchrun --max-restarts on one node, the store
    still holds the addresses of the dead processes (PyTorch 2.13), so each restart uses its own key
    prefix. Several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment
    instead."""
    env, options = os.environ, {}
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart != "0" and env.get("GROUP_WORLD_SIZE") == "1":
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, False)
        options = {"store": dist.PrefixStore(f"restart{restart}", store)}
    dist.init_process_group(backend, rank=rank, world_size=world, **options)


class Interrupt:
    """Records SIGINT and SIGTERM, so that the loop can finish the current step first. A second
    signal more than one second later raises KeyboardInterrupt. The delay is needed because torchrun
    forwards a Ctrl-C that its workers have already received from the terminal."""

    def __init__(self):
        self.signal, self.time = 0, math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if time.monotonic() > self.time + 1:
            raise KeyboardInterrupt
        self.signal, self.time = int(number), min(self.time, time.monotonic())

    def pending(self):
        """The number of the signal received by any rank, or 0; the same on every rank."""
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            number = number.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


# ----------------------------------------------------------------------------
# the start of a run


def check_fits(args, model_args):
    """Raises ValueError if flags on the command line contradict the model of the checkpoint."""
    heads = model_args["n_heads"]
    usual = {"head_dim": model_args["dim"] // heads, "n_kv_heads": heads}  # the meaning of 0
    model_args = usual | model_args
    values = {n: getattr(args, n) or usual.get(n, 0) for n in MODEL_FLAGS if n in args.given}
    wrong = [
        f"{n} is {model_args[n]} in the checkpoint, --{n}={getattr(args, n)} on the command line"
        for n, value in values.items()
        if model_args.get(n) not in (None, value)
    ]
    if wrong:
        raise ValueError("the checkpoint does not fit the flags: " + "; ".join(wrong))


def with_dtype(run, checkpoint):
    """The run with the default dtype for the model of a checkpoint: on cuda, float32 for a small
    model, if the stage has such a default."""
    largest, dtype = stage_class(run.args).fp32_dim, run.args.dtype
    small = checkpoint is not None and checkpoint["model_args"]["dim"] <= largest
    on_cuda = run.device.partition(":")[0] == "cuda"
    return replace(run, dtype=torch.float32) if small and on_cuda and not dtype else run


def differences(run, checkpoint):
    """A description of the flags that differ from those of the checkpoint and make this a different
    run; "" if there are none."""
    ignored = {*FREE_FLAGS, *unused(run.args), *stage_class(run.args).kept_flags}
    return changes(run, checkpoint, run.config.keys() - ignored)


def changes(run, checkpoint, names):
    """A description of the flags among `names` that differ from those of the checkpoint."""
    saved, current = checkpoint.get("config", {}), with_dtype(run, checkpoint).config
    names = current.keys() & saved.keys() & set(names)
    names = [k for k in names if current[k] != saved[k]]
    return ", ".join(f"{k} was {saved[k]}, is {current[k]}" for k in sorted(names))


def code_version():
    """A hash of the source files that determine the results; checkpoints record it."""
    folder = Path(__file__).parent
    names = (
        *("model.py", "checkpoint.py", "kernels.py", "kernels.c", "tokenizer.py"),
        *("tinystories.py", "instruct.py", "train.py", "pretraining.py", "sft.py"),
        *("preferences.py", "rlhf.py", "ppo.py"),
    )
    return hashlib.sha256(b"".join((folder / n).read_bytes() for n in names)).hexdigest()[:12]


def start(run):
    """Loads the checkpoint and the tokenizer, completes the Run, and builds the stage. Returns the
    stage, ready for its first step."""
    args, kind = run.args, stage_class(run.args)
    checkpoint, resumed = starting_point(run, kind, differences)
    start_iteration, best_val_loss, vocab_size = 0, 1e9, args.vocab_size
    default, run = run.dtype, with_dtype(run, checkpoint)
    if run.dtype is not default:
        torch.backends.cuda.matmul.allow_tf32 = False
        width = checkpoint["model_args"]["dim"]
        note(
            f"a model of width {width} runs in float32 without TF32; --dtype=bfloat16 changes this"
        )
    if checkpoint is not None:
        check_fits(args, checkpoint["model_args"])
        start_iteration = checkpoint.setdefault("iter_num", 0)
        best_val_loss = checkpoint.get("best_val_loss", 1e9)
        vocab_size = checkpoint["model_args"]["vocab_size"]
    folders = [f for data in kind.shard_folders(args) for f in parse_data(data)[0]]
    shards = [shards_tokenizer(f, vocab_size) for f in dict.fromkeys(folders)]
    tokenizer, tokenizer_hash, assumed = load_tokenizer(args, checkpoint, shards, vocab_size)
    if tokenizer and not args.eval_only and (resumed or not kind.from_scratch):
        # A new pretraining run is not checked: it moves the old files in out_dir aside.
        check_place(tokenizer, args.out_dir)
    # The new checkpoints inherit the description of the text from the initial checkpoint.
    names = "template", "end_ids", "bos", "started_from", "started_id"
    metadata = {k: checkpoint[k] for k in names if k in (checkpoint or ())}
    metadata["tokenizer_hash"] = tokenizer_hash
    template = None
    if kind.uses_template(args):
        if tokenizer is None:
            raise ValueError("dialogues need the tokenizer of the model: name it with --tokenizer")
        template = find_template(args.template, metadata, tokenizer, "plain", assumed.append)
        metadata["template"] = template._asdict()
    run = replace(
        run,
        resumed=resumed,
        start_iteration=start_iteration,
        end_iteration=kind.end_iteration(args, checkpoint),
        best_val_loss=best_val_loss,
        tokenizer=tokenizer,
        template=template,
        metadata=metadata,
    )
    stage = kind(run, checkpoint)
    if resumed:
        stage.load_state(checkpoint)
    for line in assumed:  # after all checks, so that a wrong flag prints only its error
        note(line)
    if run.rank == 0:
        describe(stage, checkpoint)
    stage.begin()
    return stage


def describe(stage, checkpoint):
    """Prints the size of the model, the iterations and the device; for a resumed run also the flags
    and the code version that differ from those of its checkpoint."""
    run = stage.run
    count = sum(p.numel() for p in stage.model.parameters())
    iterations = f"iterations {run.start_iteration} to {run.end_iteration}"
    machine = f"{run.device}, {run.config['dtype']}"
    machine += f", {run.world} processes" if run.world > 1 else ""
    print(f"{count:,} parameters; {iterations}; {machine}")
    if "started_from" in run.metadata and not run.resumed:
        print(f"a new run, which starts from {run.metadata['started_from']}")
    if run.resumed and start_has_changed(checkpoint, f"{run.args.out_dir}/{stage.prefix}ckpt.pt"):
        start = run.metadata["started_from"]
        note(f"{start} has changed since this run started; --init_from={start} starts a new run")
    changed = differences(run, checkpoint) if run.resumed else ""
    if changed:
        print(f"resumed with other flags than the checkpoint's, which now apply: {changed}")
    for line in stage.without_effect():
        note(line)
    if "always_save_checkpoint" in run.args.given and not run.args.always_save_checkpoint:
        note("--always_save_checkpoint=False has no effect: every evaluation saves")
    ineffective = changes(run, checkpoint, stage.kept_flags) if run.resumed else ""
    if ineffective:
        print(f"note: no effect on a resumed run: {ineffective}")
    saved, current = checkpoint.get("code_version") if run.resumed else None, code_version()
    if saved not in (None, current):
        print(
            f"code version was {saved}, is {current}: the results may differ from those of an "
            "uninterrupted run"
        )
    if run.start_iteration >= run.end_iteration:
        print("nothing to do: the checkpoint has all iterations of the run")


# ----------------------------------------------------------------------------
# the loop


def save(stage, iteration, best_val_loss, improved):
    """Writes the stage's checkpoint and its model for ./run, on rank 0. The previous checkpoint is
    kept as .prev.pt; best.pt is a link to the checkpoint with the lowest validation loss."""
    run, state = stage.run, stage.state()  # with --fsdp all ranks gather the state
    if run.rank:
        return
    path = Path(run.args.out_dir) / f"{stage.prefix}ckpt.pt"
    if run.tokenizer:
        copy_tokenizer(run.tokenizer, run.args.out_dir, replace=True)
    if path.exists():
        link(path, path.with_suffix(".prev.pt"))
    model_args = checkpoint_args(stage.model.args)
    checkpoint = {
        "model_args": model_args,
        "iter_num": iteration,
        "best_val_loss": best_val_loss,
        "config": run.config,
        "code_version": code_version(),
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID"),
        **run.metadata,
        **state,
    }
    save_checkpoint(path, checkpoint)
    if improved:
        link(path, path.with_name(f"{stage.prefix}best.pt"))
    write_results(stage, state)


def write_results(stage, state):
    """Writes the parts of a checkpoint that are for other programs, on rank 0: the adapters, and
    the model for ./run."""
    run, prefix = stage.run, os.path.join(stage.run.args.out_dir, stage.prefix)
    parts = run.metadata | state | {"model_args": checkpoint_args(stage.model.args)}
    if "lora" in state:
        names = "model_args", "lora", "template", "tokenizer_hash", "started_from", "started_id"
        save_checkpoint(f"{prefix}lora.pt", {k: parts[k] for k in names if k in parts})
    if not stage.writes_text:
        return
    names = "template", "end_ids", "bos", "tokenizer_hash"  # what a model.bin has room for
    metadata = {k: run.metadata[k] for k in names if k in run.metadata}
    try:
        with write_atomic(f"{prefix}model.bin") as f:
            write_v3(f, stage.model.args, state["model"], "fp32", run.tokenizer, **metadata)
    except ValueError as e:  # run.c does not support the tokenizer: training continues
        print(f"warning: no {stage.prefix}model.bin: {e}", file=sys.stderr)


def train(run):
    """Trains. Evaluates and saves every --eval_interval iterations and at the end; also saves after
    an interrupt. Returns the exit status of an interrupted run, else None."""
    stage = start(run)
    run, args = stage.run, run.args
    iteration, best_val_loss = run.start_iteration, run.best_val_loss
    saved = iteration if run.resumed else None  # the iteration of the newest checkpoint
    path = Path(args.out_dir) / f"{stage.prefix}ckpt.pt"
    # Old files are moved after all checks, so that a wrong flag moves nothing.
    if not run.resumed and not args.eval_only:
        move_aside(path, run.rank)
    if run.rank == 0 and not args.eval_only:
        common.remove_temporaries(args.out_dir)  # left by a run that was killed while writing
    interrupt = Interrupt()
    log = Log(run, stage.prefix)

    def evaluate_and_save():
        nonlocal best_val_loss, saved
        losses = stage.evaluate()
        val = losses.get("loss/val", math.inf)
        improved = val < best_val_loss
        # The newest checkpoint is the best one, but a kill may have come before the link to it.
        unlinked = run.resumed and iteration == run.start_iteration and val == best_val_loss
        if unlinked and run.rank == 0 and not args.eval_only:
            # A damaged newest checkpoint was renamed: the run continues from the one before it.
            loaded = path if path.exists() else path.with_suffix(".prev.pt")
            link(loaded, path.with_name(f"{stage.prefix}best.pt"))
        best_val_loss = val if improved else best_val_loss  # min() would take a NaN
        if losses:
            others = [f", {k} {v:.4g}" for k, v in losses.items() if not k.startswith("loss/")]
            log.line(
                f"step {iteration}: train loss {losses['loss/train_eval']:.4f}, "
                f"val loss {losses['loss/val']:.4f}{''.join(others)}"
            )
            log.scalars(iteration, losses)
        texts = stage.sample_texts() if run.rank == 0 else {}
        for name, text in texts.items():
            text = text.strip() or "(empty)"
            text = text if len(texts) == 1 else f"{name}: {text}"
            width = min(96, terminal_columns())
            log.line(textwrap.fill(text, width, initial_indent="  | ", subsequent_indent="  | "))
        if texts:
            log.texts(iteration, texts)
        if not args.eval_only and (iteration > run.start_iteration or improved and run.resumed):
            save(stage, iteration, best_val_loss, improved)
            saved = iteration
        elif run.resumed and not args.eval_only and iteration >= run.end_iteration:
            state = stage.state()  # the run may have been killed after its last checkpoint
            if run.rank == 0:
                write_results(stage, state)

    try:
        while iteration < run.end_iteration and not args.eval_only:
            if iteration % args.eval_interval == 0:
                evaluate_and_save()
            try:
                stats = stage.step(iteration)
            except stage.input_errors as e:
                if run.world > 1 or iteration == run.start_iteration:
                    raise
                save(stage, iteration, best_val_loss, False)
                raise ValueError(
                    f"{e}; iteration {iteration} is saved: fix this, then rerun with "
                    "--init_from=resume"
                ) from None
            log.scalars(iteration, stats)
            time_left = log.left(run.end_iteration - iteration - 1)
            if iteration % args.log_interval == 0:
                line = stage.line(iteration, stats)
                log.line(line if "\n" in line else line + time_left)
            iteration += 1
            log.bar.update()
            number = interrupt.pending()
            if number:
                save(stage, iteration, best_val_loss, False)
                log.line(
                    f"interrupted: saved iteration {iteration}; to resume, run the same command "
                    "with --init_from=resume"
                )
                return 128 + number
        evaluate_and_save()
    except (FloatingPointError, *stage.check_errors) as e:
        unchanged = isinstance(e, stage.check_errors)
        if (
            unchanged
            and stage.saves_alone()
            and iteration > (run.start_iteration if saved is None else saved)
        ):
            save(stage, iteration, best_val_loss, False)
            saved = iteration
        where = f"{path} has iteration {saved}" if saved else "none"
        raise ValueError(f"{e}; the last good checkpoint: {where}") from None
    finally:
        log.close()
    stage.end()
    if run.rank == 0 and not args.eval_only:
        plot_at_end(log.path)


def main(argv=None):
    args = flags(argv)
    if args.plot:
        return plot(args.out_dir)
    if args.plan:
        check_ranges(args)
        stage_class(args).plan(args)
        return None
    load_boards(args)  # reports a missing package before the run starts
    run = setup(args)
    folder = Path(args.out_dir)
    if folder.is_file():
        raise ValueError(f"--out_dir={folder} is a file: name a folder")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if args.eval_only and stage_class(args).show_report(run):
        return None
    # --plot and --eval_only only read, so they need no lock while another run writes.
    writes = run.rank == 0 and not args.eval_only
    try:
        with common.lock_folder(args.out_dir) if writes else nullcontext():
            with common.unbreakable_output():
                return train(run)
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise OSError(
                f"out of memory on {run.device}: use a smaller --batch_size than "
                f"{args.batch_size} (and more --gradient_accumulation_steps for the same number of "
                "tokens per step), or a smaller model"
            ) from None
        if run.world == 1 or "onnection" not in str(e):
            raise
        raise OSError(f"rank {run.rank}: another process of this run has ended: {e}") from None
    finally:
        if new and run.rank == 0:  # after a failed command nothing is in it
            common.remove_unused(folder)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
