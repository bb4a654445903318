"""The training loop: pretraining, and PPO with --ppo.

    python train.py --vocab_source=custom --vocab_size=512 --dim=64 --n_layers=5 --n_heads=8
    python train.py --out_dir=out --init_from=resume --ppo        # aligns out/ckpt.pt
    torchrun --standalone --nproc_per_node=4 train.py             # DDP, on one node or many

It reads shards made by tinystories.py and writes into --out_dir:
    ckpt.pt        the newest state (ppo_ckpt.pt with --ppo); ckpt.prev.pt the one before
    best.pt        the state with the lowest validation loss
    model.bin      the model for ./run (ppo_model.bin with --ppo)
    log.jsonl      one JSON object an iteration (ppo_log.jsonl with --ppo)

A checkpoint is complete: --init_from=resume with the same flags goes on as if the run had never
been interrupted. Ctrl-C finishes the step, saves, and says how to go on.
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
from copy import deepcopy
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

import ppo
from export import write_v3
from model import BOS_ID, ModelArgs, Transformer, TransformerWithValueHead, add_lora, generate
from model import checkpoint_args, load_checkpoint, merged_state, model_from_checkpoint
from model import native_attention, save_checkpoint
from sample import choose_device
from tinystories import Prompts, Windows
from tokenizer import Tokenizer, boolean, find_tokenizer, parse_args, run_main, write_atomic

MODEL_FLAGS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len",
)  # fmt: skip
# Flags that may differ between a run and its continuation without making it another run.
FREE_FLAGS = (
    "out_dir", "eval_interval", "eval_iters", "log_interval", "eval_only", "init_from", "device",
    "always_save_checkpoint", "tensorboard", "wandb_log", "wandb_project", "wandb_run_name",
    "tokenizer", "compile", "fsdp", "max_iters", "ppo_iters", "ppo_debug", "report_rollouts",
    *MODEL_FLAGS,
)  # fmt: skip
MAX_BAD_STEPS = 20  # in a row, before a run ends; float16 may need a few to find its loss scale

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
    add("always_save_checkpoint", False, "accepted; each evaluation saves ckpt.pt anyway")
    add("init_from", "scratch", "scratch, resume (from out_dir), or a checkpoint: its weights")
    add("tensorboard", False, "also log to TensorBoard, in out_dir")
    add("wandb_log", False, "also log to Weights & Biases")
    add("wandb_project", "llamac", "its project")
    add("wandb_run_name", time.strftime("run%Y_%m_%d_%H_%M_%S"), "its run")

    add = group("data")
    add("data", "data", "data folder, or several with weights: dirA:0.7,dirB:0.3")
    add("batch_size", 128, "sequences a forward pass (micro-batch)")
    add("max_seq_len", 256, "tokens a sequence, the model's context")
    add("vocab_source", "llama2", "llama2 (32000 tokens) or custom", ("llama2", "custom"))
    add("vocab_size", 32000, "tokens in the vocabulary")
    add("tokenizer", "", "SentencePiece model, if not tok<vocab_size>.model in out_dir or data/")

    add = group("model")
    add("dim", 288, "width")
    add("n_layers", 6, "layers")
    add("n_heads", 6, "query heads")
    add("n_kv_heads", 6, "key/value heads; query heads share them")
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

    add = group("PPO (--batch_size is the rollouts a forward pass, --grad_clip applies)")
    add("ppo", False, "align the checkpoint in out_dir (or --init_from) with PPO")
    add("ppo_iters", 0, "PPO iterations; 0: up to max_iters, those of the checkpoint included")
    add("reward", "length", "length, or FILE.py:FUNCTION of lists of prompts and responses")
    add("target_len", 200, "tokens of prompt and response that the length reward wants")
    add("start_len", 30, "prompts: BOS and the first 0 to start_len - 1 tokens of a story")
    add("value_learning_rate", 0.0, "the critic's learning rate; 0: as the policy's")
    add("ppo_warmup_steps", 10, "optimizer steps of linear warm-up")
    add("lora_rank", 0, "train adapters of this rank (LoRA) instead of the weights; 0: all weights")
    add("lora_alpha", 16.0, "their scale is lora_alpha / lora_rank")
    add("lora_layers", "q,v", "matrices that get one, of q,k,v,o,gate,down,up")
    add("ppo_debug", False, "print every statistic of every iteration")
    add("roof_prompts", 16, "prompts from which the roof J* is estimated")
    add("roof_samples", 64, "reference samples for each of them")
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
                 "start_len"):  # fmt: skip
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    args.device = choose_device(args.device)
    kind = args.device.partition(":")[0]
    args.dtype = args.dtype or ("bfloat16" if kind == "cuda" else "float32")
    if args.lora_rank < 0:
        raise ValueError(f"--lora_rank must not be negative, not {args.lora_rank}")
    args.compile = kind == "cuda" if args.compile is None else args.compile
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.fsdp and (world == 1 or args.ppo or args.dtype == "float16"):
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


# ----------------------------------------------------------------------------
# optimizer and schedule


class Muon(torch.optim.Muon):
    """torch.optim.Muon to the bit, four times as fast for small models: matrices of one shape go
    through the Newton-Schulz iteration together. It brings each update U S V' near U V'."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # a tall matrix goes with the wide ones of its transposed shape
            for p in group["params"]:
                alike.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in alike.values():
                updates = torch.stack([self.momentum(p, group) for p in params]).bfloat16()
                updates /= updates.norm(dim=(1, 2), keepdim=True).clamp_min(group["eps"])
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):
                    gram = updates @ updates.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
                    updates = torch.baddbmm(updates, gram, updates, beta=a)
                for p, update in zip(params, updates):
                    rows, columns = p.shape
                    scale = math.sqrt(max(1, rows / columns))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.T if rows > columns else update, alpha=-group["lr"] * scale)

    def momentum(self, p, group):
        """The update of one matrix before the iteration (Nesterov's momentum), made wide."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(buffer, group["momentum"])
        return update.T if p.shape[0] > p.shape[1] else update


def make_optimizers(model, args):
    """AdamW, with weight decay on matrices only; with --optimizer=muon, Muon (Jordan et al., 2024)
    takes the matrices inside the layers and AdamW the rest. Each parameter group remembers its
    highest learning rate."""
    muon = args.optimizer == "muon"
    inner, outer, vectors = [], [], []
    for name, p in model.named_parameters():
        kind = vectors if p.dim() < 2 else inner if muon and name.startswith("layers.") else outer
        kind.append(p)
    groups = [
        {"params": outer, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = args.beta1, args.beta2
    optimizers = [torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, fused=True)]
    if muon:
        kind = torch.optim.Muon if args.fsdp else Muon  # torch.stack knows no sharded tensors
        rate, decay = args.muon_learning_rate, args.weight_decay
        optimizers.append(kind(inner, lr=rate, weight_decay=decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step, args, first=0, warmup=None):
    """The learning rate at an iteration, as a fraction of the highest: linear warm-up, then a
    cosine or a line down to 0 at max_iters; without --decay_lr always 1."""
    if not args.decay_lr:
        return 1.0
    warmup = min(args.warmup_iters if warmup is None else warmup, args.max_iters - first)
    if step - first < warmup:
        return (step - first + 1) / (warmup + 1)
    done = min((step - first - warmup) / max(args.max_iters - first - warmup, 1), 1.0)
    return 1 - done if args.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# ----------------------------------------------------------------------------
# what a person and a program see


class Log:
    """One JSON object an iteration into a file, the same scalars to TensorBoard and Weights &
    Biases where asked for, a progress bar and lines on the terminal. Silent but on rank 0."""

    def __init__(self, args, name, first, resumed, rank):
        self.master, self.path = rank == 0, Path(args.out_dir) / name
        self.file = self.board = self.wandb = None
        quiet = None if self.master else True  # None: shown on a terminal only
        self.bar = tqdm(total=args.max_iters - first, unit="it", disable=quiet,
                        dynamic_ncols=True, smoothing=0.05, leave=False)  # fmt: skip
        if not self.master:
            return
        kept = []  # a resumed run continues its log, without the iterations that it does again
        if resumed and self.path.exists():
            for line in self.path.read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                    if json.loads(line)["iter"] < first:
                        kept.append(line + "\n")
        with write_atomic(self.path, "w") as f:
            f.writelines(kept)
        self.file = open(self.path, "a")
        try:
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(args.out_dir)
            if args.wandb_log:
                import wandb

                self.wandb = wandb.init(project=args.wandb_project, name=args.wandb_run_name,
                                        config=plain_config(args))  # fmt: skip
        except ImportError as e:
            raise ValueError(f"{e}: pip install tensorboard, or wandb for --wandb_log") from None

    def scalars(self, iteration, stats):
        if not self.master:
            return
        stats = {k: v if math.isfinite(v) else None for k, v in stats.items()}  # JSON has no NaN
        try:
            self.file.write(json.dumps({"iter": iteration, **stats}) + "\n")
            self.file.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None
        for k, v in stats.items():
            if self.board and v is not None:
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
            with suppress(OSError):
                x.close()


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


def matmul_roof(device, dtype):
    """Measured operations a second of a large matrix product: what MFU is held against."""
    n = 4096 if device.startswith("cuda") else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(4):
        t = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best


# ----------------------------------------------------------------------------
# checkpoints


def plain_config(args):
    return {k: v for k, v in vars(args).items() if k != "given"}


def code_version():
    """Changes with the code that computes; kept in checkpoints."""
    folder = Path(__file__).parent
    names = ("model.py", "attention.c", "ppo.py", "train.py", "tinystories.py")
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
        **state,
    })  # fmt: skip
    if improved:
        link(path, path.with_name(f"{stage.prefix}best.pt"))
    with write_atomic(path.with_name(f"{stage.prefix}model.bin")) as f:
        write_v3(f, stage.model.args, state["model"], "fp32", stage.tokenizer)


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
    base, mine = (Path(args.out_dir) / n for n in ("ckpt.pt", "ppo_ckpt.pt"))
    mine = mine if args.ppo else base
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and mine.exists():
        state = newest(mine)  # torchrun --max-restarts has started this very run again
        if state.get("run_id") == os.environ.get("TORCHELASTIC_RUN_ID"):
            return state, True
    if args.ppo and args.eval_only:
        return newest(mine), True
    if args.init_from not in ("scratch", "resume"):
        state = {**load_checkpoint(args.init_from), "iter_num": 0, "best_val_loss": 1e9}
        state.pop("ppo", None)  # its weights alone
    elif not args.ppo:
        if args.init_from == "resume":
            return newest(base), True
        state = None
    else:
        if args.init_from == "resume" and mine.exists():
            state = newest(mine)
            changed = differences(args, state)
            if not changed:
                return state, True
            if rank == 0:
                print(f"the PPO run there had other flags ({changed}): a new one starts")
        state = newest(base)
    if not args.eval_only:
        move_aside(mine, rank)
    return state, False


def move_aside(path, rank):
    """Keeps the checkpoint of an earlier run, where a new run would write its own."""
    there = path.exists()
    if dist.is_initialized():
        dist.barrier()  # all have looked
    if there and rank == 0:
        os.replace(path, path.with_suffix(".replaced.pt"))
        print(f"{path} of an earlier run is now {path.with_suffix('.replaced.pt')}")


def last_iteration(args, first):
    return first + args.ppo_iters if args.ppo and args.ppo_iters else args.max_iters


# ----------------------------------------------------------------------------
# --fsdp: every process holds a part of each tensor (FSDP2; Zhao et al., 2023)


def shard(model, dtype):
    """Shards a model in place, layer by layer: parameters come together for the layer at work,
    whose activations are computed again in the backward pass; products are in dtype."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False)
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def gathered(x):
    """A nested state with each sharded tensor made whole, on the CPU; all ranks must take part."""
    if isinstance(x, DTensor):
        return x.full_tensor().cpu()
    if isinstance(x, dict):
        return {k: gathered(v) for k, v in x.items()}
    return [gathered(v) for v in x] if isinstance(x, (list, tuple)) else x


def reshard(optimizer):
    """After load_state_dict: cuts the whole tensors of the state as their parameters are cut."""
    for p, state in optimizer.state.items():
        for k, v in state.items():
            if isinstance(p, DTensor) and v.shape == p.shape and not isinstance(v, DTensor):
                state[k] = distribute_tensor(v, p.device_mesh, p.placements)


# ----------------------------------------------------------------------------
# the stages: what one iteration is


class Pretraining:
    """Next-token prediction on windows of stories."""

    prefix = ""

    def __init__(self, args, checkpoint, rank, world, context, tokenizer):
        self.args, self.rank, self.world, self.context = args, rank, world, context
        self.tokenizer = tokenizer
        if checkpoint is None:
            values = {n: getattr(args, n) for n in (*MODEL_FLAGS, "dropout")}
            self.model = Transformer(ModelArgs(**values))
        else:
            self.model = model_from_checkpoint(checkpoint, dropout=args.dropout)
        self.model.to(args.device).train()
        self.flops = self.model.flops_per_token(self.model.args.max_seq_len)
        dtype = getattr(torch, args.dtype)
        self.roof = matmul_roof(args.device, dtype) * world
        if args.fsdp:
            shard(self.model, dtype)
        seq_len, vocab = self.model.args.max_seq_len, self.model.args.vocab_size
        self.train = Windows(args.data, "train", seq_len, vocab, args.seed)
        self.val = Windows(args.data, "val", seq_len, vocab, args.seed)
        self.position = 0  # windows dealt so far
        self.micro_steps = max(args.gradient_accumulation_steps // world, 1)
        self.optimizers = make_optimizers(self.model, args)
        kind = args.device.partition(":")[0]
        self.scaler = torch.amp.GradScaler(kind, enabled=args.dtype == "float16")
        self.bad_steps = 0
        with context():
            head = self.model.output.weight.new_empty(1, self.model.args.head_dim)
            native = native_attention(head)
        if args.compile and native:
            args.compile = False
            if rank == 0:
                print("not compiled: here attention.c is faster than what torch.compile makes")
        self.forward = torch.compile(self.model) if args.compile else self.model
        if world > 1 and not args.fsdp:
            self.forward = DistributedDataParallel(self.forward)

    def step(self, iteration):
        """One optimizer step; returns its statistics."""
        a, t0 = self.args, time.perf_counter()
        # Dropout depends on the iteration and the rank alone, so that a resumed run repeats it.
        torch.manual_seed((a.seed * 1_000_003 + iteration) * 1009 + self.rank)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["peak_lr"] * schedule(iteration, a)
        loss_sum = 0.0
        for micro in range(self.micro_steps):
            x, y = self.train.batch(self.position + self.rank * a.batch_size, a.batch_size)
            self.position += self.world * a.batch_size
            with self.synchronised(micro == self.micro_steps - 1):
                with self.context():
                    loss = self.forward(x.to(a.device), y.to(a.device)) / self.micro_steps
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        for o in self.optimizers:
            self.scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), a.grad_clip or math.inf)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        loss = ppo.all_sum(loss_sum)[0] / self.world
        self.bad_steps = 0 if math.isfinite(norm + loss) else self.bad_steps + 1
        for o in self.optimizers:
            if not self.bad_steps:
                self.scaler.step(o)
            o.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.bad_steps >= MAX_BAD_STEPS:
            raise FloatingPointError(
                f"iteration {iteration}: the loss or its gradient has not been finite for "
                f"{MAX_BAD_STEPS} steps"
            )
        seconds = time.perf_counter() - t0
        rate = x.numel() * self.micro_steps * self.world / seconds
        return {
            "loss/train": loss,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": norm,
            "bad_steps": self.bad_steps,
            "tokens": self.position * x.shape[1],
            "tokens_per_s": rate,
            "mfu": rate * self.flops / self.roof,
            "ms": seconds * 1e3,
        }

    def synchronised(self, last):
        """The context of a backward pass: processes exchange gradients in the last of a step."""
        if self.args.fsdp:
            self.model.set_requires_gradient_sync(last)
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp and not last else nullcontext()

    def line(self, iteration, s):
        bad = "" if not s["bad_steps"] else f" | not finite, skipped ({s['bad_steps']} in a row)"
        return (
            f"{iteration:6d} | loss {s['loss/train']:.4f} | lr {s['lr']:.2e} | "
            f"norm {s['grad_norm']:5.2f} | {s['ms']:7.1f} ms | {s['tokens_per_s']:9,.0f} tok/s | "
            f"mfu {s['mfu']:5.1%}{bad}"
        )

    def evaluate(self):
        """The mean loss over fixed windows of each split, the same for any number of processes."""
        a, out = self.args, {}
        self.model.eval()
        for name, windows in (("loss/train_eval", self.train), ("loss/val", self.val)):
            n, total = min(a.eval_iters * a.batch_size, len(windows)), 0.0
            for i in range(0, n, self.world * a.batch_size):
                start = i + self.rank * a.batch_size
                rows = max(min(a.batch_size, n - start), 0)
                x, y = windows.batch(start, max(rows, 1))  # with --fsdp all must take part
                with torch.no_grad(), self.context():
                    total += float(self.model(x.to(a.device), y.to(a.device))) * rows
            out[name] = ppo.all_sum(torch.tensor(total, dtype=torch.float64))[0] / n
        self.model.train()
        return out

    def story(self):
        """What the model tells now, always with the same random numbers."""
        if self.tokenizer is None or self.args.fsdp:
            return ""
        n = min(100, self.model.args.max_seq_len - 1)
        uniform = torch.rand(1, n, generator=torch.Generator().manual_seed(self.args.seed))
        with self.context():
            out = generate(self.model, [[BOS_ID]], n, temperature=0.7, uniform=uniform)
        text = self.tokenizer.decode(out.responses()[0])
        return "".join(c if c.isprintable() else " " for c in text)  # bytes of a young model

    def state(self):
        optimizers = [o.state_dict() for o in self.optimizers]
        return gathered({
            "model": self.model.state_dict(),
            "optimizer": optimizers[0],
            "optimizers": optimizers[1:],
            "scaler": self.scaler.state_dict(),
            "position": self.position,
            "bad_steps": self.bad_steps,
        })  # fmt: skip

    def resume(self, checkpoint):
        """Takes up an interrupted run; a foreign checkpoint gives its weights alone."""
        self.position = checkpoint.get("position", 0)
        self.bad_steps = checkpoint.get("bad_steps", 0)
        states = [checkpoint.get("optimizer"), *checkpoint.get("optimizers", [])]
        peaks = [[g["peak_lr"] for g in o.param_groups] for o in self.optimizers]
        try:
            if len(states) != len(self.optimizers):
                raise ValueError
            for o, state, rates in zip(self.optimizers, states, peaks):
                o.load_state_dict(state)
                reshard(o)
                for g, rate in zip(o.param_groups, rates):
                    g["peak_lr"] = rate  # the flags decide, not the checkpoint
        except (ValueError, TypeError, KeyError, AttributeError):
            print("the checkpoint's optimizer is another one: it starts anew", file=sys.stderr)
            self.optimizers = make_optimizers(self.model, self.args)
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])


class Alignment:
    """PPO against a reward; see ppo.py."""

    prefix = "ppo_"

    def __init__(self, args, checkpoint, rank, world, context, tokenizer):
        self.args, self.rank, self.world, self.tokenizer = args, rank, world, tokenizer
        values = {f.name: getattr(args, f.name, None) for f in fields(ppo.PPOConfig)}
        values |= dict(mini_batch_size=args.batch_size, max_grad_norm=args.grad_clip)
        config = ppo.PPOConfig(**values)
        weights = checkpoint["ppo"]["reference"] if "ppo" in checkpoint else checkpoint["model"]
        start = {"model": weights, "model_args": checkpoint["model_args"]}

        def build(source, kind):
            return model_from_checkpoint(source, kind, dropout=0.0).to(args.device)

        shared = config.value_model == "shared"
        self.model = build(start, TransformerWithValueHead if shared else Transformer)
        reference = build(start, Transformer).requires_grad_(False)
        if args.lora_rank:
            add_lora(self.model, args.lora_rank, args.lora_alpha, 0.0, args.lora_layers)
            if shared:
                self.model.value_head.requires_grad_(True)
            frozen = dict(self.model.named_parameters())
            for name, p in reference.named_parameters():
                p.data = frozen[name].data  # the reference is the model without its adapters
        self.optimizers = [self.adam(self.model, args.learning_rate)]
        critic = None
        if config.advantage == "gae" and not shared:
            source = config.value_model
            source = start if source == "separate" else load_checkpoint(source)
            critic = build(source, TransformerWithValueHead)
            rate = args.value_learning_rate or args.learning_rate
            self.optimizers.append(self.adam(critic, rate))
        vocab = self.model.args.vocab_size
        self.prompts = Prompts(args.data, "train", args.start_len, vocab, args.seed)
        self.held_out = Prompts(args.data, "val", args.start_len, vocab, args.seed)
        seq_len = self.model.args.max_seq_len
        self.text = Windows(args.data, "val", min(seq_len, 256), vocab, args.seed)
        if config.ptx_coef:
            if world > 1:
                raise ValueError("--ptx_coef works with one process only")
            self.ptx_windows = Windows(args.data, "train", seq_len, vocab, args.seed + 1)
        self.trainer = ppo.PPOTrainer(
            config, self.model, reference, critic, self.optimizers[0],
            self.optimizers[1] if critic else None, context, self.ptx_batch,
        )  # fmt: skip
        self.reward = ppo.load_reward(args.reward, args.target_len, self.decode)
        self.position = self.ptx_position = 0
        self.first, self.roof = checkpoint["iter_num"], None

    def ptx_batch(self):
        n = max(self.args.batch_size // 8, 1)
        batch = self.ptx_windows.batch(self.ptx_position, n)
        self.ptx_position += n
        return (x.to(self.args.device) for x in batch)

    def adam(self, model, rate):
        """Adam whose first steps are short: its second moments are rough estimates then. The count
        of steps lies in the parameter group, and so in the checkpoint."""
        a = self.args
        params = [p for p in model.parameters() if p.requires_grad]
        betas = a.beta1, a.beta2
        optimizer = torch.optim.AdamW(params, rate, betas, weight_decay=a.weight_decay, fused=True)
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
            out = generate(
                model, prompts, c.max_gen_len, c.temperature, uniform=uniform, max_batch=512
            )
        return out.responses(), out.ended

    def scores(self, prompts, responses, ended):
        """One score a rollout (B,), also where the reward gives one for each token."""
        each = self.reward(prompts, responses, ended)
        return torch.tensor([float(torch.as_tensor(s).sum()) for s in each])

    @torch.no_grad()
    def measure(self, model):
        """How a model does on held-out prompts: reward, exact KL to the reference, J, lengths, the
        share that ended by itself, and the reference's loss on the samples, in nats a token."""
        t, n, size = self.trainer, self.args.report_rollouts, self.args.batch_size
        prompts = self.held_out.batch(0, n)
        responses, ended = self.sample(model, prompts)
        scores = self.scores(prompts, responses, ended)
        kl = loss = 0.0
        for i in range(0, n, size):
            p = ppo.pack(prompts[i : i + size], responses[i : i + size], self.args.device)
            with t.context():
                logp, ref = (
                    t.log_softmax(m(p.tokens, lengths=p.lengths)[p.action])
                    for m in (model, t.reference)
                )
            kl += float(ppo.exact_kl(logp, ref).sum()) / n
            loss -= float(ref.gather(1, p.target[:, None]).sum())
        lengths = torch.tensor([len(q) + len(r) for q, r in zip(prompts, responses)]).float()
        return {
            "objective": float(scores.mean()) - t.config.init_kl_coef * kl,
            "reward": float(scores.mean()),
            "kl": kl,
            "length_mean": float(lengths.mean()),
            "length_std": float(lengths.std()),
            "ended": float(ended.float().mean()),
            "ref_loss": loss / sum(map(len, responses)),
            "val_loss": self.text_loss(model),
            "lengths": lengths.int().tolist(),
            "story": self.decode(prompts[0] + responses[0]) if self.tokenizer else "",
        }

    def text_loss(self, model):
        """The loss on 64 fixed windows of validation text, nats a token: does PPO forget?"""
        losses = [
            (float(model(x.to(self.args.device), y.to(self.args.device))), len(x))
            for x, y in self.text.fixed(64, 16)
        ]
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def report(self):
        """Measures reference and result on the same prompts and random numbers, and prints."""
        result = deepcopy(self.trainer.reference)
        result.load_state_dict(self.result(), strict=False)  # a shared value head stays behind
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
        reference = self.trainer.reference.parameters()
        weights = float(sum(p.cpu().double().abs().sum() for p in reference))
        key = [a.reward, a.target_len, a.start_len, a.roof_prompts, a.roof_samples, a.seed, a.data]
        key += [c.max_gen_len, c.temperature, weights]
        if ":" in a.reward:  # FILE.py:FUNCTION: the file may change under its name
            key.append(hashlib.sha256(Path(a.reward.rpartition(":")[0]).read_bytes()).hexdigest())
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

    def step(self, iteration):
        a, c, t0 = self.args, self.trainer.config, time.perf_counter()
        for o in self.optimizers:
            o.param_groups[0]["scale"] = schedule(iteration, a, self.first, warmup=0)
        prompts = self.prompts.batch(self.position, c.rollouts // c.group_size)
        self.position += len(prompts)
        prompts = [p for p in prompts for _ in range(c.group_size)]
        queries, responses, logprobs, ended = self.trainer.rollout(prompts, a.seed + iteration)
        t1 = time.perf_counter()
        scores = self.reward(queries, responses, ended)
        self.last = queries[0], responses[0], scores[0]
        return self.trainer.step(queries, responses, logprobs, scores, ended) | {
            "ppo/objective_roof": self.roof[0],
            "time/ppo/rollout": t1 - t0,
            "time/ppo/iteration": time.perf_counter() - t0,
        }

    def line(self, iteration, s):
        if self.args.ppo_debug:
            return json.dumps({"iter": iteration, **s}, indent=4)
        return (
            f"{iteration:6d} | J {s['ppo/objective']:.3f} of {self.roof[0]:.3f} | "
            f"reward {s['ppo/reward']:.3f} | KL {s['ppo/kl_ref']:.2f} | "
            f"length {s['ppo/length/mean']:3.0f} ±{s['ppo/length/std']:3.0f} | "
            f"ended {s['ppo/ended']:4.0%} | entropy {s.get('ppo/policy/entropy', math.nan):.2f} | "
            f"clip {s.get('ppo/policy/clipfrac', math.nan):5.1%} | "
            f"EV {s['ppo/val/explained_variance']:5.2f} | "
            f"norm {s['grad_norm']:.2f} | {s['time/ppo/rollout']:.1f} + {s['time/ppo/total']:.1f} s"
        )

    def evaluate(self):
        return {}

    def story(self):
        """The last iteration's first rollout and its score."""
        if self.tokenizer is None or not hasattr(self, "last"):
            return ""
        query, response, score = self.last
        return f"{self.decode(query)} >>> {self.decode(query + response)} (score {score})"

    def result(self):
        """The weights to keep: the average of the policy's where one is made, adapters merged."""
        if not self.args.lora_rank:
            return self.trainer.average or self.model.state_dict()
        kept = deepcopy(self.model)
        kept.load_state_dict(self.trainer.average or self.model.state_dict())
        return merged_state(kept)

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
    """What PPO changed, held against the roof: a table, lengths as a histogram, a story each."""
    before, after = found["before"], found["after"]
    n = len(before["lengths"])
    print(f"\nPPO on {n} held-out prompts, beta = {found['beta']:g}" + " " * 8 + "before     after")
    rows = [
        ("J = reward - beta KL", "objective", "8.3f"), ("reward", "reward", "8.3f"),
        ("KL to the reference, nats", "kl", "8.2f"), ("mean length, tokens", "length_mean", "8.1f"),
        ("its standard deviation", "length_std", "8.1f"), ("ended by themselves", "ended", "8.0%"),
        ("reference's loss on the samples", "ref_loss", "8.3f"),
        ("loss on validation text", "val_loss", "8.3f"),
    ]  # fmt: skip
    for title, key, form in rows:
        print(f"  {title:<40}{before[key]:{form}}  {after[key]:{form}}")
    roof, error = found["roof"]
    gap = roof - before["objective"]
    closed = (after["objective"] - before["objective"]) / gap if gap > 0 else float("nan")
    print(f"  roof J*: {roof:.3f} ±{error:.3f} (from reference samples); {closed:.0%} of the gap closed")
    print("\n  tokens     before" + " " * 26 + "after")
    every = before["lengths"] + after["lengths"]
    for low in range(min(every) // 20 * 20, max(every) + 1, 20):
        bars = []
        for x in (before, after):
            share = sum(low <= length < low + 20 for length in x["lengths"]) / n
            bars.append(f"{'█' * round(share * 30):<22.22} {share:4.0%}")
        print(f"  {low:3d}-{low + 19:3d}    {bars[0]}     {bars[1]}")
    for title, x in (("before", before), ("after", after)):
        if x["story"]:
            story = textwrap.indent(textwrap.fill(x["story"], 96), "    ")
            print(f"\n  a story {title} PPO:\n{story}")
    print()


# ----------------------------------------------------------------------------
# the loop


def load_tokenizer(args, vocab_size):
    """The model's tokenizer; None if there is none: training needs it only to show text."""
    try:
        tokenizer = Tokenizer(args.tokenizer or find_tokenizer(vocab_size, args.out_dir))
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
    kind = Alignment if args.ppo else Pretraining
    stage = kind(args, checkpoint, rank, world, context, tokenizer)
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
        if iter_num >= args.max_iters:
            print("nothing to do: the checkpoint has reached --max_iters")
    if args.ppo:
        roof, error = stage.estimate_roof()
        if rank == 0:
            print(f"roof J* = {roof:.3f} ±{error:.3f}, the highest J there is, from reference samples")
    return stage, iter_num, best_val_loss, resumed


def train(args, rank, world):
    stage, iter_num, best_val_loss, resumed = start(args, rank, world)
    first, report = iter_num, Path(args.out_dir) / "ppo_report.json"
    if args.ppo and args.eval_only:
        return stage.report() if rank == 0 else None
    if args.ppo and not resumed and rank == 0:
        report.unlink(missing_ok=True)  # of another run
    for left in Path(args.out_dir).glob(".*ckpt.pt.*.tmp") if rank == 0 else ():
        left.unlink()  # a checkpoint that was being written when the run was killed
    interrupt = Interrupt()
    log = Log(args, f"{stage.prefix}log.jsonl", iter_num, resumed, rank)
    saved = iter_num if resumed else None

    def evaluate_and_save():
        nonlocal best_val_loss, saved
        losses = stage.evaluate()
        val = losses.get("loss/val", math.inf)
        improved, best_val_loss = val < best_val_loss, min(val, best_val_loss)
        if losses:
            log.line(f"step {iter_num}: train loss {losses['loss/train_eval']:.4f}, "
                     f"val loss {losses['loss/val']:.4f}")  # fmt: skip
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
            stats = stage.step(iter_num)
            log.scalars(iter_num, stats)
            if iter_num % args.log_interval == 0:
                log.line(stage.line(iter_num, stats))
            iter_num += 1
            log.bar.update()
            number = interrupt.pending()
            if number:
                save(args, stage, iter_num, best_val_loss, False, rank)
                log.line(f"interrupted: saved iteration {iter_num}; "
                         "go on with the same command and --init_from=resume")  # fmt: skip
                return 128 + number if number == signal.SIGTERM else 0
        evaluate_and_save()
    except FloatingPointError as e:
        where = f"{args.out_dir}/{stage.prefix}ckpt.pt has iteration {saved}" if saved else "none"
        raise ValueError(f"{e}; the last good checkpoint: {where}") from None
    finally:
        log.close()
    if args.ppo and rank == 0:
        stage.report()


def main(argv=None):
    args = flags(argv)
    rank, world = setup(args)
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    report = Path(args.out_dir) / "ppo_report.json"
    if args.ppo and args.eval_only and report.exists():
        return print_report(json.loads(report.read_text())) if rank == 0 else None
    try:
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
