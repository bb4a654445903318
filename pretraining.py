"""Pretraining: next-token prediction, with AdamW or Muon, a learning-rate schedule, and FSDP.

`Stage` is the interface of all stages to the loop in train.py. The stages after pretraining are in
sft.py, preferences.py and rlhf.py.
"""

import argparse
import inspect
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from checkpoint import halve_frozen, load_checkpoint, model_from_checkpoint
from common import flag, note
from experiments.plan import GPUS, MODELS, plan, plan_stage
from instruct import Template
from kernels import (
    accelerate,
    add_up_over_ranks,
    all_sum,
    full,
    is_sharded,
    library,
    native_attention,
    to_device,
)
from model import ModelArgs, Transformer, generate
from report import flops_per_token, peak_matmul_flops
from tinystories import Windows
from tokenizer import BOS_ID, Tokenizer, stop_ids

MODEL_FLAGS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "vocab_size",
    "multiple_of",
    "max_seq_len",
)
# A run ends after this number of consecutive non-finite steps. float16 may need a few of them until
# its loss scale fits.
MAX_BAD_STEPS = 20


# ----------------------------------------------------------------------------
# flags


@dataclass
class PretrainingFlags:
    """pretraining"""

    vocab_source: str = flag("llama2", "llama2 (32000 tokens) or custom", ("llama2", "custom"))
    vocab_size: int = flag(32000, "tokens in the vocabulary")
    max_seq_len: int = flag(256, "tokens per sequence, which is the context length of the model")
    dim: int = flag(288, "width of the model")
    n_layers: int = flag(6, "transformer layers")
    n_heads: int = flag(6, "query heads")
    n_kv_heads: int = flag(0, "key/value heads, shared by query heads; 0 means n_heads")
    head_dim: int = flag(0, "width of a head; 0 means dim / n_heads")
    multiple_of: int = flag(32, "the feed-forward width is rounded up to a multiple of this number")


@dataclass
class TextFlags:
    """training on text"""

    eval_iters: int = flag(100, "batches per split in an evaluation")
    dropout: float = flag(0.0, "dropout rate")
    optimizer: str = flag(
        "adamw",
        "adamw; or muon: Muon for the matrices inside the layers (--muon_learning_rate), AdamW for "
        "the rest",
        ("adamw", "muon"),
    )
    muon_learning_rate: float = flag(0.02, "peak learning rate of Muon")
    warmup_iters: int = flag(1000, "iterations of linear warm-up")


@dataclass
class MemoryFlags:
    """memory"""

    checkpoint_activations: bool = flag(
        False,
        "keep only the input of each layer for the backward pass and compute the rest again: less "
        "memory, a third more arithmetic; --fsdp always does",
    )
    fsdp: bool = flag(
        False, "shard model, gradients and optimizer over the processes of torchrun (FSDP2)"
    )


@dataclass
class CompileFlags:
    """compilation"""

    compile: bool = flag(
        None,
        "use torch.compile (with --ppo only on cuda); default: true on cuda, else false",
    )


@dataclass
class ToolFlags:
    """instead of training"""

    plot: bool = flag(False, "plot the logs in out_dir, and exit")
    plan: bool = flag(
        False,
        "print the memory that this run needs on GPUs (for pretraining also tokens/s and hours), "
        "and exit",
    )


@dataclass
class SpeedPlanFlags:
    """plan"""

    plan_gpu: str = flag("h100", "GPU to plan for; cpu means this machine", tuple(GPUS))
    plan_mfu: float = flag(
        0.4,
        "assumed MFU, the share of the GPU's peak FLOP/s; a training log records the measured one",
    )


@dataclass
class MemoryPlanFlags:
    """plan"""

    plan_model: str = flag(
        "", f"published model to plan for: {', '.join(MODELS)}; default: the checkpoint"
    )
    plan_len: int = flag(
        0, "tokens per sample, for PPO of prompt and response; 0 means the context of the model"
    )


# ----------------------------------------------------------------------------
# optimizer and schedule


class Uncompiled:
    """Methods of torch.optim.Optimizer without the wrappers that keep torch.compile out of them:
    these import it, which takes two seconds, and nothing here compiles an optimizer."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Uncompiled, torch.optim.AdamW):
    """torch.optim.AdamW that does not import torch.compile."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(Uncompiled, torch.optim.Muon):
    """Bitwise equal to torch.optim.Muon (Jordan et al., 2024), and four times as fast for small
    models, because matrices of one shape go through the Newton-Schulz iteration as a batch. The
    iteration replaces each update U S V' by approximately U V'. With --fsdp the momentum is
    sharded; the updates are gathered for the iteration, one at a time."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}  # a tall matrix is transposed and batched with the wide ones
            for p in group["params"]:
                own_batch = (id(p),) if is_sharded(p) else ()
                batches.setdefault((*sorted(p.shape), *own_batch), []).append(p)
            for params in batches.values():
                updates = torch.stack([self.momentum(p, group) for p in params])
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
                    update = update.T if rows > columns else update
                    update = shard_like(p, update) if is_sharded(p) else update
                    p.add_(update, alpha=-group["lr"] * scale)

    def momentum(self, p, group):
        """Nesterov momentum of one matrix (rows, columns), before the iteration: unsharded, and
        transposed if it is tall, so that rows <= columns."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(buffer, group["momentum"]).bfloat16()
        update = full(update)
        return update.T if p.shape[0] > p.shape[1] else update


def make_optimizers(model, args):
    """AdamW, with weight decay on matrices only; with --optimizer=muon, Muon (Jordan et al., 2024)
    trains the matrices inside the layers and AdamW the rest. Each parameter group stores its peak
    learning rate as "peak_lr"."""
    muon = args.optimizer == "muon"
    inner, outer, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = vectors if p.dim() < 2 else inner if muon and name.startswith("layers.") else outer
        kind.append(p)
    groups = [
        {"params": outer, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    optimizers = [AdamW(groups, lr=args.learning_rate, **adam)]
    if inner:  # --freeze_layers may leave no matrix to train
        rate, decay = args.muon_learning_rate, args.weight_decay
        optimizers.append(Muon(inner, lr=rate, weight_decay=decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


@contextmanager
def flags_decide(optimizers, counters=()):
    """A context in which `optimizers` load the state of a checkpoint without its hyperparameters,
    which keep the values of the flags. Of the parameter groups only the `counters` are loaded."""
    groups = [
        [{k: v for k, v in g.items() if k not in ("params", *counters)} for g in o.param_groups]
        for o in optimizers
    ]
    yield
    for o, before in zip(optimizers, groups):
        for group, values in zip(o.param_groups, before):
            group.update(values)


def schedule(step, args, first=0, last=None, warmup=None):
    """The learning rate at an iteration, as a fraction of the peak: linear warm-up, followed by a
    cosine or linear decay to 0 at iteration `last` (default: max_iters). Without --decay_lr it is
    always 1."""
    if not args.decay_lr:
        return 1.0
    steps = (args.max_iters if last is None else last) - first
    warmup = min(args.warmup_iters if warmup is None else warmup, steps)
    if step - first < warmup:
        return (step - first + 1) / (warmup + 1)
    done = min((step - first - warmup) / max(steps - warmup, 1), 1.0)
    return 1 - done if args.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# ----------------------------------------------------------------------------
# memory: --checkpoint_activations, and --fsdp, with which each process holds a part of every tensor
# (FSDP2; Zhao et al., 2023)


def checkpoint_activations(model):
    """Makes the layers of a model keep only their input for the backward pass, which then computes
    the layer again (Chen et al., 2016), in place. Returns the model."""
    for layer in model.layers:
        layer.forward = partial(computed_again, layer.forward)
    return model


def computed_again(forward, x, layout):
    if not torch.is_grad_enabled():
        return forward(x, layout)
    return recompute_in_backward(forward, x, layout, use_reentrant=False)


def place(model, run):
    """Moves a model that is in CPU memory to the device of the run, in place; with --fsdp its part
    of each parameter alone. Returns the model."""
    if run.args.checkpoint_activations or run.args.fsdp:
        checkpoint_activations(model)
    if not run.args.fsdp:
        return model.to(run.device)
    shard(model, run.device, run.dtype)
    return model


def shard(model, device, dtype):
    """Moves a model from CPU memory to the devices, sharded in place, layer by layer: no device
    ever holds more than one complete layer, or the embeddings. The parameters of a layer are
    gathered when it runs, and matrix products are in dtype."""
    # Here, because these imports take a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if hasattr(model, "value_head"):  # it computes in fp32
        fully_shard(model.value_head, mesh=mesh)
    # Nothing writes into the view that `hidden` returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # The stages that need hidden states do not call the model itself, but this method. The weights
    # outside the layers stay gathered until the backward pass, so that model.output can follow.
    register_fsdp_forward_method(model, "hidden")


@contextmanager
def whole(*models):
    """A context in which every process holds all parameters of sharded models, so that it can
    generate text independently of the other processes. All processes must enter it."""
    parts = [m for model in models for m in model.modules() if hasattr(m, "unshard")]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in parts:
        module.reshard()
        module.set_reshard_after_forward(module not in models, recurse=False)


def sharded_state(model, state):
    """A state_dict of a model, with tensors that every process holds in full, as load_state_dict
    needs it: this process's part of each tensor that is sharded in the model."""
    return state | {
        name: shard_like(w, state[name])
        for name, w in model.state_dict().items()
        if is_sharded(w) and name in state
    }


def gathered(x, keep):
    """A nested state with each sharded tensor gathered, one at a time, on the CPU of the processes
    with `keep`; the other processes get None for it. All processes must call it."""
    if is_sharded(x):
        full = x.full_tensor()
        return full.cpu() if keep else None
    if isinstance(x, dict):
        return {k: gathered(v, keep) for k, v in x.items()}
    return [gathered(v, keep) for v in x] if isinstance(x, (list, tuple)) else x


def shard_like(p, full):
    """Shards a tensor that every process holds in full like the sharded parameter p."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def sharded(state, optimizer):
    """Shards the tensors of an optimizer state like the parameters that they belong to."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    tensors_of = {
        i: {
            k: shard_like(params[i], v) if is_sharded(params[i]) and v.dim() else v
            for k, v in tensors.items()
        }
        for i, tensors in state["state"].items()
    }
    return state | {"state": tensors_of}


# ----------------------------------------------------------------------------
# the interface between train.py and the stages


@dataclass(frozen=True)
class Run:
    """A training run: its flags, and the values derived from them, from the machine and from the
    initial checkpoint. train.py's `setup` and `start` create it; a stage reads it as self.run."""

    args: argparse.Namespace  # the flags as they were parsed; nothing writes to them
    rank: int  # number of this process, from 0
    world: int  # number of processes
    device: str  # of this process: cpu, cuda, cuda:1, mps
    dtype: torch.dtype  # of matrix products; parameters are float32
    compile: bool  # whether the model goes through torch.compile
    resumed: bool = False  # whether the run continues an interrupted one
    start_iteration: int = 0
    end_iteration: int = 0
    best_val_loss: float = 1e9  # the lowest validation loss so far
    tokenizer: Tokenizer | None = None  # pretraining works without one, but prints no samples
    template: Template | None = None  # chat template; None for a stage without dialogues
    # The description of the text in a checkpoint: tokenizer_hash ("" if it is unknown), and
    # optionally template, end_ids and bos, which load_checkpoint documents.
    metadata: dict = field(default_factory=dict)

    def autocast(self):
        """A new autocast context, in which matrix products are in dtype."""
        half = self.dtype is not torch.float32
        return torch.autocast(self.device.partition(":")[0], self.dtype) if half else nullcontext()

    def dtype_on(self, device):
        """The dtype of matrix products on a device: `autocast` does not act on other types."""
        same = torch.device(device).type == torch.device(self.device).type
        return self.dtype if same else torch.float32

    @property
    def config(self):
        """The flags as checkpoints and Weights & Biases record them. Flags that leave a choice open
        have the chosen values."""
        flags = {name: value for name, value in vars(self.args).items() if name != "given"}
        return flags | {
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": self.compile,
            "max_iters": self.end_iteration or self.args.max_iters,
        }


def unused_plan_flags(args):
    """See Stage.unused."""
    if not args.plan:
        names = "plan_gpu", "plan_mfu", "plan_model", "plan_len"
        yield names, "has no effect without --plan"


def planned_model(args):
    """The ModelArgs for which a stage after pretraining is planned."""
    if args.plan_model:
        if args.plan_model not in MODELS:
            raise ValueError(f"--plan_model must be one of {', '.join(MODELS)}")
        return ModelArgs(**MODELS[args.plan_model])
    path = initial_checkpoint(args)
    if not os.path.exists(path):
        raise FileNotFoundError(f"--plan needs --plan_model, or a checkpoint: there is no {path}")
    return checkpoint_model(path)


def initial_checkpoint(args):
    """The file whose model --plan plans for, with --init_from=resume or a file."""
    named = args.init_from not in ("scratch", "resume")
    return args.init_from if named else os.path.join(args.out_dir, "ckpt.pt")


def checkpoint_model(path):
    """The ModelArgs of a checkpoint file."""
    known = {f.name for f in fields(ModelArgs)}
    model_args = load_checkpoint(path, mmap=True, verify=False)["model_args"]
    return ModelArgs(**{k: v for k, v in model_args.items() if k in known})


class Stage:
    """The interface of a training stage: the methods that the loop in train.py calls. A stage owns
    its model, data and optimizers. Subclasses set `run`, `model` and `tokenizer`.

    The class attributes and static methods describe the stage before a model exists:
    """

    prefix = ""  # prefix of the names of its files in out_dir
    flags = ()  # dataclasses of its flags; the flags that all stages share are in train.py
    accepted = ()  # flags of other stages that it accepts and ignores
    positive = ()  # flags that must be at least 1
    signed = ()  # flags that may be negative
    from_scratch = False  # whether a run can start without a checkpoint
    fp32_dim = 0  # largest width of a model for which --dtype is float32 by default on cuda
    writes_text = True  # whether its model generates text: ./run can use it, PPO can train it
    continues_count = False  # whether its iterations continue those of the initial checkpoint
    resumes_same_flags_only = False  # whether other flags make --init_from=resume a new run
    kept_flags = ()  # flags without effect on a resumed run: the checkpoint has their result
    evaluates_its_checkpoint = False  # whether --eval_only needs the checkpoint of an earlier run
    # Exceptions that step() raises before it changes any weight:
    input_errors = ()  # mistakes of the user
    check_errors = ()  # failed checks

    @staticmethod
    def unused(args):
        """Pairs (names of flags, reason) of the stage's flags that have no effect in combination
        with the other flags."""
        return ()

    @classmethod
    def check(cls, run):
        """Raises ValueError for flags that are invalid, in combination or on this machine."""
        if run.args.fsdp and (run.world == 1 or run.dtype == torch.float16):
            raise ValueError("--fsdp is for several processes (torchrun), in float32 or bfloat16")

    @staticmethod
    def shard_folders(args):
        """The data folders whose shards the stage reads, in the format of --data."""
        return ()

    @staticmethod
    def plan(args):
        """Prints what a run with these flags would need, for --plan."""
        plan_stage(args, planned_model(args))

    @staticmethod
    def uses_template(args):
        """Whether the data are dialogues, which need a tokenizer and a chat template."""
        return False

    @staticmethod
    def end_iteration(args, checkpoint):
        """The iteration at which a run that starts from this checkpoint (or None) ends."""
        return args.max_iters

    @staticmethod
    def show_report(run):
        """Prints the report that an earlier run has written, for --eval_only. Returns False if
        there is none."""
        return False

    def without_effect(self):
        """Lines that name flags of the command line that have no effect, or not the usual one."""
        return ()

    def begin(self):
        """Called once before the first iteration, after all checks."""

    def step(self, iteration):
        """Runs one iteration and returns its statistics, {name: number}."""
        raise NotImplementedError

    def line(self, iteration, stats):
        """The statistics of an iteration, formatted for the terminal."""
        raise NotImplementedError

    def evaluate(self):
        """Evaluates the model. Returns {name: number} with at least loss/train_eval and loss/val,
        or {} for a stage without an evaluation."""
        return {}

    def sample_texts(self):
        """A sample of the current model, printed and logged after an evaluation: {name: text}, for
        example a prompt and its response; {} for none."""
        return {}

    def state(self):
        """The state that a checkpoint stores: model, optimizers, counters. All ranks call it."""
        raise NotImplementedError

    def load_state(self, checkpoint):
        """Restores a state that `state` returned, so that the run continues as if it had not been
        interrupted."""
        raise NotImplementedError

    def saves_alone(self):
        """Whether a process can save after an error that the other processes may not have."""
        return not self.args.fsdp

    def end(self):
        """Called after the last iteration, or after the evaluation of --eval_only."""


# ----------------------------------------------------------------------------
# pretraining


class Pretraining(Stage):
    """Next-token prediction on windows of text. The stages in sft.py and preferences.py override
    `build`, `data`, `loss` and, for further evaluation results, `summary`."""

    flags = PretrainingFlags, TextFlags, MemoryFlags, CompileFlags, ToolFlags, SpeedPlanFlags
    from_scratch = True
    packed = False  # whether the length differs from sample to sample, and from batch to batch
    ddp = True  # `loss` calls the whole model, as DistributedDataParallel requires

    def __init__(self, run, checkpoint):
        self.run, self.args, self.tokenizer = run, run.args, run.tokenizer
        args, device = run.args, run.device
        self.model = self.build(checkpoint).train()
        self.flops = flops_per_token(self.model, self.model.args.max_seq_len)
        if device == "cpu":
            library()  # compiles kernels.c before the first step, whose time is measured
        self.peak_flops = peak_matmul_flops(device, run.dtype) * run.world
        if not args.fsdp:  # which shards fp32 weights and gathers them in half precision
            halve_frozen([self.model], run.dtype)
        place(self.model, run)
        self.train, self.val = self.data("train"), self.data("val")
        self.val_checksum = self.val.checksum()
        self.position = self.tokens = 0  # samples, and tokens, read so far by all processes
        self.ahead = None, None  # the next position, and the batch that was prefetched for it
        self.micro_steps = max(args.gradient_accumulation_steps // run.world, 1)
        self.optimizers = make_optimizers(self.model, args)
        half = run.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=half)
        self.bad_steps = 0
        with run.autocast():
            head = self.model.output.weight.new_empty(1, self.model.args.head_dim)
            native = native_attention(head)
        if run.compile and native and run.rank == 0:
            print("note: --compile is ignored: kernels.c is faster than torch.compile on this CPU")
        elif run.compile and args.fsdp and self.packed and args.compile and run.rank == 0:
            print("note: --compile is ignored: of the stages with --fsdp only pretraining compiles")
        compiled = run.compile and not native
        self.forward = self.replicas = self.model
        if run.world > 1 and self.ddp and not args.fsdp:
            # Buffers never change: the tables of rotary angles, 4-bit weights.
            self.replicas = DistributedDataParallel(self.model, forward_sync_buffers=False)
            self.forward = self.replicas
        if compiled and not self.packed:  # around DDP: it splits the graph at DDP's reductions
            self.forward = torch.compile(self.forward)
        elif compiled and not args.fsdp:
            self.model.compiled_hidden = True

    @staticmethod
    def unused(args):
        if args.optimizer != "muon":
            yield ["muon_learning_rate"], "has no effect without --optimizer=muon"
        if not args.decay_lr:
            yield ["warmup_iters"], "has no effect with --decay_lr=False"
        if args.fsdp:
            yield ["checkpoint_activations"], "is part of --fsdp"
        yield from unused_plan_flags(args)
        if not args.lora_rank:
            names = "lora_alpha", "lora_layers", "lora_dropout", "lora_4bit"
            yield names, "has no effect without --lora_rank"
        else:
            yield ["freeze_layers"], "has no effect with --lora_rank: adapters alone are trained"

    @classmethod
    def check(cls, run):
        super().check(run)
        world, steps = run.world, run.args.gradient_accumulation_steps
        if steps > 1 and steps % world:
            raise ValueError(
                f"{world} processes cannot share --gradient_accumulation_steps={steps}"
            )

    @staticmethod
    def plan(args):
        if args.init_from == "scratch":
            return plan(args, ModelArgs(**{name: getattr(args, name) for name in MODEL_FLAGS}))
        return plan(args, checkpoint_model(initial_checkpoint(args)))

    @staticmethod
    def shard_folders(args):
        return (args.data,)

    def build(self, checkpoint):
        """The model to train, on the CPU, with the weights of the checkpoint if it is not None."""
        if checkpoint is not None:
            return model_from_checkpoint(checkpoint, dropout=self.args.dropout)
        values = {n: getattr(self.args, n) for n in (*MODEL_FLAGS, "dropout")}
        return accelerate(Transformer(ModelArgs(**values)))

    def data(self, split):
        """The samples of a split, "train" or "val", with __len__, batch(position, n) and
        checksum()."""
        model = self.model.args
        return Windows(self.args.data, split, model.max_seq_len, model.vocab_size, self.args.seed)

    def without_effect(self):
        a = self.args
        if a.decay_lr and a.max_iters <= a.warmup_iters and not a.eval_only:
            yield (
                f"the learning rate rises until the end, because --warmup_iters={a.warmup_iters} "
                f"is not below --max_iters={a.max_iters}"
            )

    def loss(self, model, batch):
        """Returns the mean loss of a batch, its number of tokens, and values to log,
        {name: (n,) tensor}. `model` is self.model, possibly compiled or wrapped in DDP."""
        x, y = (t.to(self.run.device) for t in batch)
        return model(x, y), x.numel(), {}

    def step(self, iteration):
        """Runs one optimizer step and returns its statistics. Raises FloatingPointError after
        MAX_BAD_STEPS consecutive steps whose loss or gradient is not finite."""
        a, t0 = self.args, time.perf_counter()
        # Dropout depends on the iteration and the rank alone, so that a resumed run repeats it.
        torch.manual_seed((a.seed * 1_000_003 + iteration) * 1009 + self.run.rank)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["peak_lr"] * schedule(iteration, a)
        loss_sum, tokens, logged = 0.0, 0, []
        for micro in range(self.micro_steps):
            batch = self.read(self.position)
            self.position += self.run.world * a.batch_size
            with self.synchronised(micro == self.micro_steps - 1):
                with self.run.autocast():
                    loss, n, values = self.loss(self.forward, batch)
                    loss = loss / self.micro_steps
                self.scaler.scale(loss).backward()
            self.ahead = self.position, self.read(self.position)
            loss_sum += loss.detach()
            tokens += n
            logged.append(values)
        if self.run.world > 1 and not self.ddp and not a.fsdp:
            self.average_gradients()
        for o in self.optimizers:
            self.scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), a.grad_clip or math.inf)
        norm = full(norm)
        # All numbers of the step at once, because each transfer makes Python wait for a GPU.
        values = [torch.cat([x[k] for x in logged]) for k in logged[0]]
        counts = [torch.tensor(x.numel()) for x in values]
        tokens = torch.tensor(tokens)
        loss, norm, tokens, *sums = all_sum(loss_sum, norm, tokens, *values, *counts)
        loss, norm = loss / self.run.world, norm / self.run.world
        means = [x / n for x, n in zip(sums, sums[len(values) :])]
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
        self.tokens += int(tokens)
        rate = tokens / seconds * self.flops
        # The first measurement is too low if the machine was busy.
        self.peak_flops = max(self.peak_flops, rate)
        return {
            "loss/train": loss,
            **dict(zip(logged[0], means)),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": norm,
            "bad_steps": self.bad_steps,
            "tokens": self.tokens,
            "tokens_per_s": tokens / seconds,
            "mfu": rate / self.peak_flops,
            "ms": seconds * 1e3,
        }

    def read(self, position):
        """This rank's batch of the samples from `position` on. `step` prefetches the next batch
        while a GPU still works on the current one; pinned memory makes the copy asynchronous."""
        next_position, batch = self.ahead
        if next_position != position:
            n, device = self.args.batch_size, self.run.device
            batch = self.train.batch(position + self.run.rank * n, n)
            if device.startswith("cuda"):
                batch = [to_device(t, device) if torch.is_tensor(t) else t for t in batch]
        return batch

    def synchronised(self, last):
        """The context of a backward pass. Gradients are reduced in the `last` one of a step."""
        if self.args.fsdp:
            self.model.set_requires_gradient_sync(last)
        ddp = isinstance(self.replicas, DistributedDataParallel)
        return self.replicas.no_sync() if ddp and not last else nullcontext()

    def average_gradients(self):
        """Averages the gradients over the processes for stages without DistributedDataParallel."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        add_up_over_ranks(grads)
        torch._foreach_div_(grads, self.run.world)

    def line(self, iteration, s):
        bad = "" if not s["bad_steps"] else f" | not finite, skipped ({s['bad_steps']} in a row)"
        return (
            f"{iteration:6d} | loss {s['loss/train']:.4f}{bad} | lr {s['lr']:.2e} | "
            f"norm {s['grad_norm']:5.2f} | {s['ms']:7.1f} ms | {s['tokens_per_s']:9,.0f} tok/s | "
            f"mfu {s['mfu']:5.1%}"
        )

    def evaluate(self):
        """The mean loss over fixed samples of each split, independent of the number of processes,
        and the `summary` of the held-out samples."""
        a, out = self.args, {}
        self.model.eval()
        for name, windows in (("loss/train_eval", self.train), ("loss/val", self.val)):
            n, logged = min(a.eval_iters * a.batch_size, len(windows)), []
            total, weights = 0.0, 0.0
            for i in range(0, n, self.run.world * a.batch_size):
                start = i + self.run.rank * a.batch_size
                rows = max(min(a.batch_size, n - start), 0)
                batch = windows.batch(start, max(rows, 1))  # with --fsdp all ranks must run
                with torch.no_grad(), self.run.autocast():
                    loss, _, values = self.loss(self.model, batch)
                weight = self.weight(batch, rows)
                if weight:
                    total, weights = total + float(loss) * weight, weights + weight
                logged.append({k: v if rows else v[:0] for k, v in values.items()})
            total, weights = all_sum(*torch.tensor([total, weights], dtype=torch.float64))
            out[name] = total / weights
        out |= self.summary(logged)
        self.model.train()
        return out

    def weight(self, batch, rows):
        """The weight of a batch in the mean loss of an evaluation: its number of samples, `rows`,
        which is 0 on a process without samples left."""
        return rows

    def summary(self, logged):
        """Further results of an evaluation, {name: number}. `logged` has the values to log that
        `loss` returned for each held-out batch of this rank."""
        return {}

    def sample_texts(self):
        """A continuation of BOS, sampled with the same random numbers at every call."""
        if self.tokenizer is None or self.args.fsdp:
            return {}
        n = min(100, self.model.args.max_seq_len - 1)
        uniform = torch.rand(1, n, generator=torch.Generator().manual_seed(self.args.seed))
        stops = stop_ids(self.tokenizer, end_ids=self.run.metadata.get("end_ids"))
        with self.run.autocast():
            out = generate(self.model, [[BOS_ID]], n, 0.7, stop_ids=stops, uniform=uniform)
        text = self.tokenizer.decode(out.responses()[0])
        return {
            "text": "".join(c if c.isprintable() else " " for c in text)
        }  # no control characters

    def state(self):
        optimizers = [o.state_dict() for o in self.optimizers]
        return gathered(
            {
                "model": self.model.state_dict(),
                "optimizer": optimizers[0],
                "optimizers": optimizers[1:],
                "scaler": self.scaler.state_dict(),
                "position": self.position,
                "data_size": [len(self.train), len(self.val)],
                "val_checksum": self.val_checksum,
                "tokens": self.tokens,
                "bad_steps": self.bad_steps,
            },
            keep=self.run.rank == 0,
        )

    def load_state(self, checkpoint):
        """See Stage.load_state. Of a llama2.c checkpoint only the weights are used."""
        self.position, self.tokens = checkpoint.get("position", 0), checkpoint.get("tokens", 0)
        sizes = [len(self.train), len(self.val)]
        saved = checkpoint.get("data_size", sizes)
        other = checkpoint.get("val_checksum", self.val_checksum) != self.val_checksum
        if saved != sizes and self.run.rank == 0:
            note(
                f"the data have changed since the checkpoint, from {saved} to {sizes} samples for "
                "training and validation: the samples now have a different order"
            )
        elif other and self.run.rank == 0:
            note("the validation data have changed since the checkpoint: best.pt is chosen anew")
        if other or saved[1] != sizes[1]:  # its losses say nothing about those on other samples
            self.run = replace(self.run, best_val_loss=1e9)
        self.bad_steps = checkpoint.get("bad_steps", 0)
        states = [checkpoint.get("optimizer"), *checkpoint.get("optimizers", [])]
        try:
            if len(states) != len(self.optimizers):
                raise ValueError
            with flags_decide(self.optimizers):
                for o, state in zip(self.optimizers, states):
                    o.load_state_dict(sharded(state, o))
        except (ValueError, TypeError, LookupError, AttributeError):
            print(
                "the checkpoint was trained with a different optimizer: its state is reset",
                file=sys.stderr,
            )
            self.optimizers = make_optimizers(self.model, self.args)
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
