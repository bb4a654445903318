"""LoRA: adapters on the linear layers of a model, in full precision or over 4-bit weights (QLoRA).

`add_lora` adds adapters to a model, `merged_state` merges them into the weights, and
`adapter_state` and `load_adapters` write and read files that hold adapters alone.
"""

import logging
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


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

    def merged(self):
        """The weight (out, in) with the adapter added."""
        return self.weight + self.scale * self.lora_b @ self.lora_a


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

    def merged(self):
        return self.dequantized() + self.scale * self.lora_b @ self.lora_a


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
    same. Raises ValueError for a name that is not in LORA_LAYERS."""
    model.requires_grad_(False)
    kind = FourBitLoRALinear if four_bit else LoRALinear
    for name in layers.split(","):
        if name not in LORA_LAYERS:
            raise ValueError(
                f"unknown layer {name!r} for LoRA: choose from {','.join(LORA_LAYERS)}"
            )
        module, attribute = LORA_LAYERS[name].split(".")
        for block in model.layers:
            parent = getattr(block, module)
            setattr(parent, attribute, kind(getattr(parent, attribute), rank, alpha, dropout))
    return model


def merged_state(model):
    """The state_dict of a model with its adapters, if there are any, merged into its weights."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            for key in module.state_dict():
                del state[f"{name}.{key}"]
            state[f"{name}.weight"] = module.merged().detach()
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
