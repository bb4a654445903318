"""Pretraining: next-token prediction on stories, with AdamW or Muon, a learning-rate schedule, and FSDP.

A stage owns its model, data and optimizers. The loop in train.py asks it for `step` (one optimizer
step, returning statistics), `line` (them for a person), `evaluate`, `story`, and `state` and
`resume` for checkpoints. The stages after pretraining are in sft.py, preferences.py and rlhf.py.
"""

import math
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import ppo
from checkpoint import model_from_checkpoint
from common import flag
from experiments.plan import GPUS
from kernels import accelerate, library, native_attention
from model import ModelArgs, Transformer, generate
from report import flops_per_token, matmul_roof
from tinystories import Windows
from tokenizer import BOS_ID, stop_ids

MODEL_FLAGS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "max_seq_len",
)
MAX_BAD_STEPS = 20  # in a row, before a run ends; float16 may need a few to find its loss scale


# ----------------------------------------------------------------------------
# flags


@dataclass
class PretrainingFlags:
    """pretraining"""

    vocab_source: str = flag("llama2", "llama2 (32000 tokens) or custom", ("llama2", "custom"))
    vocab_size: int = flag(32000, "tokens in the vocabulary")
    max_seq_len: int = flag(256, "tokens per sequence, the context length of the model")
    dim: int = flag(288, "width of the model")
    n_layers: int = flag(6, "transformer layers")
    n_heads: int = flag(6, "query heads")
    n_kv_heads: int = flag(0, "key/value heads, shared by query heads; 0 means n_heads")
    multiple_of: int = flag(32, "the feed-forward width is rounded up to a multiple of this number")
    fsdp: bool = flag(
        False, "shard model, gradients and optimizer over the processes of torchrun (FSDP2)"
    )


@dataclass
class TextFlags:
    """training on text"""

    eval_iters: int = flag(100, "batches per evaluation, of each split")
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
class CompileFlags:
    """compilation"""

    compile: bool = flag(None, "use torch.compile; default: in pretraining on cuda")


@dataclass
class ToolFlags:
    """instead of training"""

    plot: bool = flag(False, "draw the logs in out_dir, and exit")
    plan: bool = flag(
        False,
        "print memory, tokens/s and hours of this run on GPUs (--plan_gpu, --plan_mfu), and exit",
    )
    plan_gpu: str = flag("h100", "GPU to plan for; cpu is this machine", tuple(GPUS))
    plan_mfu: float = flag(
        0.4, "assumed share of the GPU's peak arithmetic (MFU); the log of a run has its own"
    )


# ----------------------------------------------------------------------------
# optimizer and schedule


class Muon(torch.optim.Muon):
    """torch.optim.Muon to the bit, four times as fast for small models: matrices of one shape go
    through the Newton-Schulz iteration together. It brings each update U S V' near U V'. With --fsdp
    momentum is sharded, and updates are put together for the iteration, one after the other."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # a tall matrix goes with the wide ones of its transposed shape
            for p in group["params"]:
                alone = (id(p),) if isinstance(p, DTensor) else ()
                alike.setdefault((*sorted(p.shape), *alone), []).append(p)
            for params in alike.values():
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
                    update = cut_as(p, update) if isinstance(p, DTensor) else update
                    p.add_(update, alpha=-group["lr"] * scale)

    def momentum(self, p, group):
        """The update of one matrix before the iteration (Nesterov's momentum), whole, made wide."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(buffer, group["momentum"]).bfloat16()
        update = update.full_tensor() if isinstance(update, DTensor) else update
        return update.T if p.shape[0] > p.shape[1] else update


def make_optimizers(model, args):
    """AdamW, with weight decay on matrices only; with --optimizer=muon, Muon (Jordan et al., 2024)
    takes the matrices inside the layers and AdamW the rest. Each parameter group remembers its
    highest learning rate."""
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
    optimizers = [torch.optim.AdamW(groups, lr=args.learning_rate, **adam)]
    if muon:
        rate, decay = args.muon_learning_rate, args.weight_decay
        optimizers.append(Muon(inner, lr=rate, weight_decay=decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


@contextmanager
def flags_decide(optimizers, counters=()):
    """Optimizers that get the state of a checkpoint inside keep the hyperparameters of the flags; only
    the `counters` in their parameter groups are those of the checkpoint."""
    groups = [
        [{k: v for k, v in g.items() if k not in ("params", *counters)} for g in o.param_groups]
        for o in optimizers
    ]
    yield
    for o, kept in zip(optimizers, groups):
        for group, values in zip(o.param_groups, kept):
            group.update(values)


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
# --fsdp: each process holds a part of every tensor (FSDP2; Zhao et al., 2023)


def shard(model, device, dtype):
    """Shards a model in place, from the CPU's memory to the devices, layer by layer: none of them
    ever holds more than a layer as a whole, or the embeddings. Parameters come together for the
    layer at work, whose activations are computed again in the backward pass; products are in dtype."""
    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def gathered(x, keep):
    """A nested state with each sharded tensor made whole, one after the other, on the CPU of the
    process that is to `keep` it; all processes must take part, the others get None."""
    if isinstance(x, DTensor):
        whole = x.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(x, dict):
        return {k: gathered(v, keep) for k, v in x.items()}
    return [gathered(v, keep) for v in x] if isinstance(x, (list, tuple)) else x


def cut_as(p, whole):
    """A tensor that every process has, cut as the sharded parameter p is."""
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def sharded(state, optimizer):
    """A state of the optimizer whose tensors are whole, with each cut as its parameter is."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    cut = {
        i: {
            k: cut_as(params[i], v) if isinstance(params[i], DTensor) and v.dim() else v
            for k, v in tensors.items()
        }
        for i, tensors in state["state"].items()
    }
    return state | {"state": cut}


# ----------------------------------------------------------------------------
# the stage


class Pretraining:
    """Next-token prediction on windows of stories. A stage that learns from other text is this one
    with another `build`, `data` and `loss`, and maybe a `summary` of its evaluation."""

    prefix = ""
    flags = PretrainingFlags, TextFlags, CompileFlags, ToolFlags
    accepted = ()  # flags of other stages that this one accepts and does not use
    ddp = True  # `loss` calls the model as a whole: DistributedDataParallel sees it

    def __init__(self, args, checkpoint, rank, world, context, tokenizer):
        self.args, self.rank, self.world, self.context = args, rank, world, context
        self.tokenizer = tokenizer
        self.model = self.build(checkpoint).train()
        self.flops = flops_per_token(self.model, self.model.args.max_seq_len)
        dtype = getattr(torch, args.dtype)
        if args.device == "cpu":
            library()  # compiled now, if ever, not in the first step, whose time is taken
        self.roof = matmul_roof(args.device, dtype) * world
        if args.fsdp:
            shard(self.model, args.device, dtype)
        else:
            self.model.to(args.device)
        self.train, self.val = self.data("train"), self.data("val")
        self.position = self.tokens = 0  # windows, or other samples, dealt so far, and their tokens
        self.ahead = None, None  # the position after these, and the samples there
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
                print("not compiled: here kernels.c is faster than what torch.compile makes")
        self.forward = torch.compile(self.model) if args.compile else self.model
        if world > 1 and self.ddp and not args.fsdp:
            # the only buffers, the tables of angles, never change
            self.forward = DistributedDataParallel(self.forward, broadcast_buffers=False)

    @staticmethod
    def unused(args):
        """The stage's flags that have no effect beside the others: pairs of names and the reason."""
        if args.optimizer != "muon":
            yield ["muon_learning_rate"], "has no effect without --optimizer=muon"
        if not args.decay_lr:
            yield ["warmup_iters"], "has no effect with --decay_lr=False"
        if not args.plan:
            yield ["plan_gpu", "plan_mfu"], "has no effect without --plan"
        if not args.lora_rank:
            names = "lora_alpha", "lora_layers", "lora_dropout", "lora_4bit"
            yield names, "has no effect without --lora_rank"

    @staticmethod
    def check(args):
        """Raises ValueError for values of the stage's flags that make no sense."""

    def build(self, checkpoint):
        """The model to train, on the CPU, with the checkpoint's weights where there is one."""
        if checkpoint is not None:
            return model_from_checkpoint(checkpoint, dropout=self.args.dropout)
        values = {n: getattr(self.args, n) for n in (*MODEL_FLAGS, "dropout")}
        return accelerate(Transformer(ModelArgs(**values)))

    def data(self, split):
        """The samples of "train" or "val": they have a length, and batch(position, n)."""
        model = self.model.args
        return Windows(self.args.data, split, model.max_seq_len, model.vocab_size, self.args.seed)

    def loss(self, model, batch):
        """The mean loss of a batch of samples; how many tokens it has; and what else is logged of
        it, {name: (n,) tensor}. `model` is self.model, maybe compiled or in DDP."""
        x, y = (t.to(self.args.device) for t in batch)
        return model(x, y), x.numel(), {}

    def step(self, iteration):
        """One optimizer step; returns its statistics."""
        a, t0 = self.args, time.perf_counter()
        # Dropout depends on the iteration and the rank alone, so that a resumed run repeats it.
        torch.manual_seed((a.seed * 1_000_003 + iteration) * 1009 + self.rank)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["peak_lr"] * schedule(iteration, a)
        loss_sum, tokens, seen = 0.0, 0, []
        for micro in range(self.micro_steps):
            batch = self.read(self.position)
            self.position += self.world * a.batch_size
            with self.synchronised(micro == self.micro_steps - 1):
                with self.context():
                    loss, n, found = self.loss(self.forward, batch)
                    loss = loss / self.micro_steps
                self.scaler.scale(loss).backward()
            self.ahead = self.position, self.read(self.position)
            loss_sum += loss.detach()
            tokens += n
            seen.append(found)
        if self.world > 1 and not self.ddp:
            self.average_gradients()
        for o in self.optimizers:
            self.scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), a.grad_clip or math.inf)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        loss, tokens = ppo.all_sum(loss_sum, torch.tensor(tokens))
        loss /= self.world
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
        self.roof = max(self.roof, rate)  # measured while the machine was busy
        return {
            "loss/train": loss,
            **{k: ppo.mean_and_variance(torch.cat([f[k] for f in seen]))[0] for k in seen[0]},
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": norm,
            "bad_steps": self.bad_steps,
            "tokens": self.tokens,
            "tokens_per_s": tokens / seconds,
            "mfu": rate / self.roof,
            "ms": seconds * 1e3,
        }

    def read(self, position):
        """This rank's samples from a position on; a GPU still works on those before when the next
        ones are read, and sent from pinned memory."""
        there, batch = self.ahead
        if there != position:
            n, device = self.args.batch_size, self.args.device
            batch = self.train.batch(position + self.rank * n, n)
            if device.startswith("cuda"):
                batch = [
                    t.pin_memory().to(device, non_blocking=True) if torch.is_tensor(t) else t
                    for t in batch
                ]
        return batch

    def synchronised(self, last):
        """The context of a backward pass: processes exchange gradients in the last of a step."""
        if self.args.fsdp:
            self.model.set_requires_gradient_sync(last)
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp and not last else nullcontext()

    def average_gradients(self):
        """Over the processes, where DistributedDataParallel does not do it."""
        for p in self.model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= self.world

    def line(self, iteration, s):
        bad = "" if not s["bad_steps"] else f" | not finite, skipped ({s['bad_steps']} in a row)"
        return (
            f"{iteration:6d} | loss {s['loss/train']:.4f}{bad} | lr {s['lr']:.2e} | "
            f"norm {s['grad_norm']:5.2f} | {s['ms']:7.1f} ms | {s['tokens_per_s']:9,.0f} tok/s | "
            f"mfu {s['mfu']:5.1%}"
        )

    def evaluate(self):
        """The mean loss over fixed samples of each split, the same for any number of processes, and
        the `summary` of those that are held out."""
        a, out = self.args, {}
        self.model.eval()
        for name, windows in (("loss/train_eval", self.train), ("loss/val", self.val)):
            n, seen = min(a.eval_iters * a.batch_size, len(windows)), []
            total, weights = 0.0, 0.0
            for i in range(0, n, self.world * a.batch_size):
                start = i + self.rank * a.batch_size
                rows = max(min(a.batch_size, n - start), 0)
                batch = windows.batch(start, max(rows, 1))  # with --fsdp all must take part
                with torch.no_grad(), self.context():
                    loss, _, found = self.loss(self.model, batch)
                weight = self.weight(batch, rows)
                if weight:
                    total, weights = total + float(loss) * weight, weights + weight
                seen.append({k: v if rows else v[:0] for k, v in found.items()})
            total, weights = ppo.all_sum(*torch.tensor([total, weights], dtype=torch.float64))
            out[name] = total / weights
        out |= self.summary(seen)
        self.model.train()
        return out

    def weight(self, batch, rows):
        """What the loss of a batch counts in the mean of an evaluation: its number of samples, `rows`.
        It is 0 for the batch of a process that has no samples left."""
        return rows

    def summary(self, seen):
        """More numbers of an evaluation, {name: number}, from what `loss` found in each held-out
        batch of this rank."""
        return {}

    def story(self):
        """What the model tells now, always with the same random numbers."""
        if self.tokenizer is None or self.args.fsdp:
            return ""
        n = min(100, self.model.args.max_seq_len - 1)
        uniform = torch.rand(1, n, generator=torch.Generator().manual_seed(self.args.seed))
        stops = stop_ids(self.tokenizer, end_ids=self.args.kept.get("end_ids"))
        with self.context():
            out = generate(self.model, [[BOS_ID]], n, 0.7, stop_ids=stops, uniform=uniform)
        text = self.tokenizer.decode(out.responses()[0])
        return "".join(c if c.isprintable() else " " for c in text)  # bytes of a young model

    def state(self):
        optimizers = [o.state_dict() for o in self.optimizers]
        return gathered(
            {
                "model": self.model.state_dict(),
                "optimizer": optimizers[0],
                "optimizers": optimizers[1:],
                "scaler": self.scaler.state_dict(),
                "position": self.position,
                "tokens": self.tokens,
                "bad_steps": self.bad_steps,
            },
            keep=self.rank == 0,
        )

    def resume(self, checkpoint):
        """Takes up an interrupted run; a foreign checkpoint gives its weights alone."""
        self.position, self.tokens = checkpoint.get("position", 0), checkpoint.get("tokens", 0)
        self.bad_steps = checkpoint.get("bad_steps", 0)
        states = [checkpoint.get("optimizer"), *checkpoint.get("optimizers", [])]
        try:
            if len(states) != len(self.optimizers):
                raise ValueError
            with flags_decide(self.optimizers):
                for o, state in zip(self.optimizers, states):
                    o.load_state_dict(sharded(state, o))
        except (ValueError, TypeError, LookupError, AttributeError):
            print("the checkpoint's optimizer is another one: it starts anew", file=sys.stderr)
            self.optimizers = make_optimizers(self.model, self.args)
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
