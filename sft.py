"""Supervised fine-tuning (train.py --sft) on packed instructions, optionally with LoRA."""

from dataclasses import dataclass

import torch

from checkpoint import model_from_checkpoint
from common import flag
from instruct import Instructions
from lora import adapter_state, add_lora, merged_state
from model import generate
from pretraining import CompileFlags, Pretraining, TextFlags
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
# data


def instructions(kind, args, split, tokenizer, template, max_len):
    """The samples of a split of the instruction data that the flags name. `kind` is one of the
    sample classes of instruct.py."""
    path, seed = args.data, args.seed
    if args.val_data:
        if split == "val":  # the order must not depend on the seed of the run
            path, seed = args.val_data, 0
        split = "all"
    return kind(path, split, tokenizer, template, max_len, seed)


class Packed:
    """Batches of instructions as packed tensors: the samples are concatenated, and attention does
    not cross their borders. A target of -1 is ignored by the loss."""

    def __init__(self, samples):
        self.samples = samples
        self.mean_targets = sum(int(mask.sum()) for _, mask in samples.samples) / len(samples)

    def __len__(self):
        return len(self.samples)

    def batch(self, position, n):
        """n samples from `position` on: tokens (N,), targets (N,), the lengths of the samples, and
        the expected number of targets in a batch of n samples."""
        tokens, targets, lengths = [], [], []
        for ids, mask in self.samples.batch(position, n):
            tokens += ids[:-1]
            targets += [i if learn else -1 for i, learn in zip(ids[1:], mask[1:])]
            lengths.append(len(ids) - 1)
        return torch.tensor(tokens), torch.tensor(targets), lengths, n * self.mean_targets


# ----------------------------------------------------------------------------
# the stage


class InstructionStage(Pretraining):
    """Base class of the stages that train on instructions or rankings. They start from a checkpoint
    and need its tokenizer and template."""

    from_scratch = False
    compiles = False  # the shape differs from batch to batch

    @staticmethod
    def shard_folders(args):
        return ()

    @staticmethod
    def uses_template(args):
        return True

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
    flags = TextFlags, CompileFlags, InstructionFlags, LoRAFlags, FineTuningFlags
    accepted = ("plot",)

    def build(self, checkpoint):
        a = self.args
        model = model_from_checkpoint(checkpoint, dropout=a.dropout)
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
        tokens, targets, lengths, expected = batch
        tokens, targets = tokens.to(self.run.device), targets.to(self.run.device)
        mean, count = model(tokens, targets, lengths=lengths), int((targets >= 0).sum())
        share = count / expected if self.model.training else 1
        return mean * share, len(tokens), {"loss/train": mean.detach().expand(count)}

    def weight(self, batch, rows):
        """The number of targets, over which the loss is the mean."""
        return int((batch[1] >= 0).sum()) if rows else 0

    def line(self, iteration, s):
        return super().line(iteration, s).replace(f" | mfu {s['mfu']:5.1%}", "")

    def sample_text(self):
        """The reply to the first held-out prompt, with the same random numbers at every call."""
        ids, mask = self.val.samples.batch(0, 1)[0]
        end = len(ids) - 1 - mask[::-1].index(False)  # the last token of the prompt
        prompt, room = ids[: end + 1], self.model.args.max_seq_len - end - 1
        uniform = torch.rand(1, room, generator=torch.Generator().manual_seed(self.args.seed))
        stops = self.stop_ids()
        with self.run.autocast():
            out = generate(self.model, [prompt], room, 0.7, stop_ids=stops, uniform=uniform)
        text = f"{self.tokenizer.decode(prompt)} >>> {self.tokenizer.decode(out.responses()[0])}"
        return "".join(c if c.isprintable() else " " for c in text)

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
            state |= {
                "model": merged_state(self.model),
                "unmerged": self.model.state_dict(),
                "lora": self.adapters(),
            }
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
            self.model.load_state_dict(checkpoint["unmerged"])
        super().load_state(checkpoint)
