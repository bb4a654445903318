"""Supervised fine-tuning (train.py --sft) on packed instructions, optionally with LoRA.

LoRA puts adapters on the linear layers of a model, in full precision or over 4-bit weights
(QLoRA). The other stages and export.py use it too: `add_lora` adds adapters to a model,
`merged_state` merges them into the weights, and `adapter_state` and `load_adapters` write and read
files that hold adapters alone.
"""

import itertools
import logging
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import model_from_checkpoint
from common import flag
from instruct import Instructions
from kernels import is_sharded
from model import Transformer, generate
from pretraining import (
    CompileFlags,
    MemoryFlags,
    MemoryPlanFlags,
    Pretraining,
    Stage,
    TextFlags,
    ToolFlags,
    gathered,
    shard_like,
    sharded_state,
)
from tokenizer import stop_ids

# ----------------------------------------------------------------------------
# flags


@dataclass
class InstructionFlags:
    """instructions"""

    val_data: str = flag("", "file of held-out instructions; default: 10 % of --data")
    template: str = flag(
        "",
        'chat template: plain, llama2, or a JSON file {"turn": ..., "system": ...}; default: the '
        "checkpoint's, else plain",
    )


@dataclass
class FreezeFlags:
    """frozen layers"""

    freeze_layers: int = flag(
        0,
        "number of lower layers to freeze, together with the embeddings (and the output layer, if "
        "it has their weight); 0 trains everything",
    )


@dataclass
class LoRAFlags:
    """LoRA"""

    lora_rank: int = flag(
        0,
        "rank of LoRA adapters, trained instead of the weights (--lora_alpha, --lora_layers); 0 "
        "trains all weights",
    )
    lora_alpha: float = flag(16.0, "LoRA α: the adapters are scaled by lora_alpha / lora_rank")
    lora_layers: str = flag(
        "q,v", "comma-separated matrices with an adapter, from q,k,v,o,gate,down,up"
    )


@dataclass
class FineTuningFlags:
    """supervised fine-tuning"""

    lora_dropout: float = flag(0.0, "dropout rate of the adapters' input")
    lora_4bit: bool = flag(
        False,
        "store the frozen matrices of the adapted layers in 4 bits (QLoRA); needs bitsandbytes",
    )


# ----------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Linear):
    """A frozen Linear plus a trained product of rank R: x Wᵀ + (alpha / R) x Aᵀ Bᵀ (Hu et al.,
    2021). B is initialized with zeros, so that the initial model equals the original one. weight
    (out, in), lora_a (R, in), lora_b (out, R)."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.linear = type(linear)  # nn.Linear, or the class that kernels.accelerate has put there
        self.weight = linear.weight
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(self.lora_dropout(x), self.lora_a)
        return self.product(x) + F.linear(low, self.lora_b) * self.scale

    def product(self, x):
        return self.linear.forward(self, x)

    def frozen(self):
        """The weight (out, in) without the adapter, in fp32."""
        return getattr(self, "master", self.weight).to(self.lora_b.device)  # see halve_frozen

    def merged(self, lora_a=None, lora_b=None):
        """The weight (out, in) with the adapter, or with another one of the same shape, added, in
        fp32."""
        a, b = (self.lora_a, self.lora_b) if lora_a is None else (lora_a, lora_b)
        return self.frozen() + self.scale * b @ a


class FourBitProduct(torch.autograd.Function):
    """x Wᵀ for a frozen 4-bit W, which is dequantized for each forward and each backward product
    and then discarded."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return F.linear(x, linear.dequantized(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.linear.dequantized(grad.dtype), None


class FourBitLoRALinear(LoRALinear):
    """LoRALinear whose frozen weight is stored in 4 bits: QLoRA (Dettmers et al., 2023), with the
    NF4 format of the bitsandbytes library. packed (out * in / 2,) uint8; absmax (out * in / 64,)
    fp32, one per block of 64 weights."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__(linear, rank, alpha, dropout)
        weight = linear.weight.detach().float().flatten()
        del self.weight
        # Each row is one block: on the CPU, bitsandbytes 0.50 is wrong for rows of partial blocks.
        blocks = F.pad(weight, (0, -len(weight) % 64)).view(-1, 64)
        packed, state = four_bit_library().quantize_4bit(blocks, blocksize=64, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", state.absmax)

    def dequantized(self, dtype=torch.float32):
        """The weight (out, in) that the 4-bit codes represent."""
        shape, functional = (len(self.absmax), 64), four_bit_library()
        state = functional.QuantState(
            self.absmax, shape, blocksize=64, quant_type="nf4", dtype=dtype
        )
        blocks = functional.dequantize_4bit(self.packed, state)
        size = self.out_features * self.in_features
        return blocks.flatten()[:size].view(self.out_features, self.in_features)

    def product(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return FourBitProduct.apply(x, self)

    def frozen(self):
        weight = self.dequantized()
        return shard_like(self.lora_b, weight) if is_sharded(self.lora_b) else weight


def four_bit_library():
    """The module bitsandbytes.functional. Raises ValueError if it is not installed."""
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing GPU kernels
        import bitsandbytes.functional
    except ImportError as e:
        raise ValueError(f"4-bit weights need: pip install bitsandbytes ({e})") from None
    return bitsandbytes.functional


LORA_LAYERS = {
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "o": "attention.wo",
    "gate": "feed_forward.w1",
    "down": "feed_forward.w2",
    "up": "feed_forward.w3",
}


def add_lora(model, rank, alpha=16.0, dropout=0.0, layers="q,v", four_bit=False):
    """Freezes the model and adds an adapter to the named matrices of every layer, in place. With
    `four_bit`, these matrices are stored in 4 bits. The names of all other parameters stay the
    same. Raises ValueError for a name that is not in LORA_LAYERS or is named twice."""
    model.requires_grad_(False)
    kind, names = FourBitLoRALinear if four_bit else LoRALinear, layers.split(",")
    for name in names:
        if name not in LORA_LAYERS:
            raise ValueError(
                f"unknown layer {name!r} for LoRA: choose from {','.join(LORA_LAYERS)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"the layer {name!r} for LoRA is named twice")
        module, attribute = LORA_LAYERS[name].split(".")
        for block in model.layers:
            parent = getattr(block, module)
            setattr(parent, attribute, kind(getattr(parent, attribute), rank, alpha, dropout))
    return model


def merged_state(model, state=None):
    """The state_dict of a model, or `state`, which is another one of it, with the adapters, if
    there are any, merged into the weights."""
    state = dict(model.state_dict() if state is None else state)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            own = {key: state.pop(f"{name}.{key}") for key in module.state_dict()}
            merged = module.merged(own["lora_a"], own["lora_b"]).detach()
            # A GPU has no room for the fp32 weights of all matrices.
            state[f"{name}.weight"] = merged if is_sharded(merged) else merged.cpu()
    return state


def adapter_state(model):
    """The part of the state_dict that belongs to the adapters."""
    return {k: v for k, v in model.state_dict().items() if ".lora_" in k}


def load_adapters(model, adapters):
    """Adds the adapters of a file to a model without adapters; `adapters` is {"rank", "alpha",
    "layers", "four_bit", "state"}. Raises ValueError if they do not fit the model."""
    try:
        rank, alpha, layers = adapters["rank"], adapters["alpha"], adapters["layers"]
        add_lora(model, rank, alpha, 0.0, layers, adapters["four_bit"])
        unknown = model.load_state_dict(adapters["state"], strict=False).unexpected_keys
        if unknown or adapter_state(model).keys() != adapters["state"].keys():
            raise ValueError("other layers")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"the adapters do not fit this model: {reason}") from None
    return model


def freeze_layers(model, n):
    """Freezes the embeddings and the lower n layers of a model, in place; 0 freezes nothing.
    Returns the model. Raises ValueError if it has fewer layers."""
    if not 0 <= n <= len(model.layers):
        raise ValueError(f"--freeze_layers={n}: the model has {len(model.layers)} layers")
    if n:
        model.tok_embeddings.requires_grad_(False)
    for layer in model.layers[:n]:
        layer.requires_grad_(False)
    return model


def note_of_frozen(model, n):
    """Yields a line that names what --freeze_layers=n trains, if it freezes all layers of a
    model."""
    if n and n == len(model.layers):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        yield f"--freeze_layers={n} freezes all layers: only {', '.join(names)} will be trained"


def frozen_layers_in_common(*models):
    """The number of lower layers that are frozen and equal in all models that are not None. It is 0
    unless the embeddings are so, too."""
    first, *others = models = [model for model in models if model is not None]
    if any(model.args != first.args for model in others):
        return 0
    modules = zip(*([model.tok_embeddings, *model.layers] for model in models))
    return max(len(list(itertools.takewhile(equal_and_frozen, modules))) - 1, 0)


def equal_and_frozen(modules):
    """Whether modules have equal parameters, on one device, and none of them is trained."""
    first, *others = ([*module.parameters()] for module in modules)
    kinds = {tuple((p.shape, p.dtype, p.device) for p in params) for params in (first, *others)}
    if len(kinds) > 1 or any(p.requires_grad for params in (first, *others) for p in params):
        return False
    return all(torch.equal(a, b) for params in others for a, b in zip(first, params))


# ----------------------------------------------------------------------------
# data


def instructions(kind, args, split, tokenizer, template, max_len):
    """The samples of a split of the instruction data that the flags name. `kind` is one of the
    sample classes of instruct.py."""
    name, seed = "data", args.seed
    if args.val_data:
        if split == "val":  # the order must not depend on the seed of the run
            name, seed = "val_data", 0
        split = "all"
    path = getattr(args, name)
    if folders := [x for x in path.split(",") if os.path.isdir(x)]:
        raise ValueError(
            f"{folders[0]} is a folder: name a JSON or JSONL file of instructions with --{name}"
        )
    return kind(path, split, tokenizer, template, max_len, seed)


class Packed:
    """Batches of instructions as packed tensors: the samples are concatenated, and attention does
    not cross their borders. A target of -1 is ignored by the loss."""

    def __init__(self, samples):
        self.samples = samples
        self.mean_targets = sum(int(mask.sum()) for _, mask in samples.samples) / len(samples)

    def __len__(self):
        return len(self.samples)

    def checksum(self):
        return self.samples.checksum()

    def batch(self, position, n):
        """n samples from `position` on: tokens (N,), targets (N,), the lengths of the samples, the
        expected number of targets in a batch of n samples, and their number in this one."""
        tokens, targets, lengths = [], [], []
        for ids, mask in self.samples.batch(position, n):
            tokens += ids[:-1]
            targets += [i if learn else -1 for i, learn in zip(ids[1:], mask[1:])]
            lengths.append(len(ids) - 1)
        tokens, targets = torch.tensor(tokens), torch.tensor(targets)
        return tokens, targets, lengths, n * self.mean_targets, int((targets >= 0).sum())


# ----------------------------------------------------------------------------
# the stage


class InstructionStage(Pretraining):
    """Base class of the stages that train on instructions or rankings. They start from a checkpoint
    and need its tokenizer and template."""

    from_scratch = False
    packed = True
    model_class = Transformer

    plan = Stage.plan  # of the memory alone

    @staticmethod
    def shard_folders(args):
        return ()

    @staticmethod
    def uses_template(args):
        return True

    def build(self, checkpoint):
        model = model_from_checkpoint(checkpoint, self.model_class, dropout=self.args.dropout)
        return freeze_layers(model, self.args.freeze_layers)

    def without_effect(self):
        yield from super().without_effect()
        yield from note_of_frozen(self.model, self.args.freeze_layers)

    def samples(self, kind, split, max_len):
        """The samples of a split as `kind`, one of the sample classes of instruct.py."""
        run = self.run
        return instructions(kind, run.args, split, run.tokenizer, run.template, max_len)

    def stop_ids(self):
        """The token ids that end a reply."""
        return stop_ids(self.tokenizer, self.run.template, self.run.metadata.get("end_ids"))


class FineTuning(InstructionStage):
    """Supervised fine-tuning on instructions, with the loss on replies and their end tokens only.
    With --lora_rank adapters are trained (Hu et al., 2022). The checkpoint then stores the weights
    with the adapters merged ("model") and not merged ("unmerged", for resuming); sft_lora.pt stores
    the adapters alone."""

    prefix = "sft_"
    flags = (
        *(TextFlags, MemoryFlags, CompileFlags, InstructionFlags),
        *(FreezeFlags, LoRAFlags, FineTuningFlags, MemoryPlanFlags, ToolFlags),
    )

    def build(self, checkpoint):
        a, model = self.args, super().build(checkpoint)
        if a.lora_rank:
            add_lora(model, a.lora_rank, a.lora_alpha, a.lora_dropout, a.lora_layers, a.lora_4bit)
        return model

    def data(self, split):
        samples = self.samples(Instructions, split, self.model.args.max_seq_len)
        if self.run.rank == 0:
            print(f"{split}: {samples.summary()}")
        return Packed(samples)

    def loss(self, model, batch):
        """The loss for training is the sum over the targets of the batch, divided by their expected
        number, so that each token has the same weight however the samples are split into batches
        and processes. The logged loss is the mean over the targets of the batch."""
        tokens, targets, lengths, expected, count = batch
        tokens, targets = tokens.to(self.run.device), targets.to(self.run.device)
        mean = model(tokens, targets, lengths=lengths)
        share = count / expected if self.model.training else 1
        return mean * share, len(tokens), {"loss/train": mean.detach().expand(count)}

    def weight(self, batch, rows):
        """The number of targets, over which the loss is the mean."""
        return batch[-1] if rows else 0

    def line(self, iteration, s):
        return super().line(iteration, s).replace(f" | mfu {s['mfu']:5.1%}", "")

    def sample_texts(self):
        """The reply to the first held-out prompt, with the same random numbers at every call."""
        if self.args.fsdp:
            return {}
        ids, mask = self.val.samples.batch(0, 1)[0]
        end = len(ids) - 1 - mask[::-1].index(False)  # the last token of the prompt
        prompt, room = ids[: end + 1], self.model.args.max_seq_len - end - 1
        uniform = torch.rand(1, room, generator=torch.Generator().manual_seed(self.args.seed))
        stops = self.stop_ids()
        with self.run.autocast():
            out = generate(self.model, [prompt], room, 0.7, stop_ids=stops, uniform=uniform)
        texts = self.tokenizer.decode(prompt), self.tokenizer.decode(out.responses()[0])
        texts = ("".join(c if c.isprintable() else " " for c in text) for text in texts)
        return dict(zip(("prompt", "response"), texts))

    def adapters(self):
        """The content of a file of adapters: hyperparameters and weights ("state")."""
        a = self.args
        return {
            "rank": a.lora_rank,
            "alpha": a.lora_alpha,
            "layers": a.lora_layers,
            "four_bit": a.lora_4bit,
            "state": adapter_state(self.model),
        }

    def state(self):
        state = super().state()
        if self.args.lora_rank:
            state |= gathered(
                {
                    "model": merged_state(self.model),
                    "unmerged": self.model.state_dict(),
                    "lora": self.adapters(),
                },
                keep=self.run.rank == 0,
            )
        return state

    def load_state(self, checkpoint):
        """See Stage.load_state. Raises ValueError if the adapters have other hyperparameters."""
        saved, current = checkpoint.get("lora"), self.adapters() if self.args.lora_rank else None
        for lora in filter(None, (saved, current)):
            del lora["state"]
        if saved != current:
            raise ValueError(
                f"the checkpoint has other adapters: {saved}, not {current}; resume with its flags "
                "(--lora_rank, ...)"
            )
        if current:
            self.model.load_state_dict(sharded_state(self.model, checkpoint["unmerged"]))
        super().load_state(checkpoint)
