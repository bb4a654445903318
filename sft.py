"""Supervised fine-tuning (train.py --sft): instructions as packed samples, and LoRA."""

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

    val_data: str = flag("", "file of held-out instructions; default: a tenth of --data")
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
    lora_alpha: float = flag(16.0, "the adapters' scale is lora_alpha / lora_rank")
    lora_layers: str = flag("q,v", "matrices with an adapter, of q,k,v,o,gate,down,up")


@dataclass
class FineTuningFlags:
    """supervised fine-tuning"""

    lora_dropout: float = flag(0.0, "dropout rate before the adapters")
    lora_4bit: bool = flag(
        False, "keep the matrices below the adapters in 4 bits (QLoRA); needs bitsandbytes"
    )


# ----------------------------------------------------------------------------
# data


def instructions(kind, args, split, tokenizer, template, max_len):
    """Samples of the instruction data that the flags name, in one of instruct.py's forms."""
    path, seed = args.data, args.seed
    if args.val_data:
        if split == "val":  # the same whatever the seed of the run
            path, seed = args.val_data, 0
        split = "all"
    return kind(path, split, tokenizer, template, max_len, seed)


class Packed:
    """Instructions as packed tensors: samples one after the other, none of which sees another, and
    the targets, -1 where nothing is to be learnt."""

    def __init__(self, samples):
        self.samples = samples
        self.learnt = sum(int(mask.sum()) for _, mask in samples.samples) / len(samples)

    def __len__(self):
        return len(self.samples)

    def batch(self, position, n):
        """tokens and targets (N,), the lengths of n samples, and how many targets are to be
        expected in n of them."""
        tokens, targets, lengths = [], [], []
        for ids, mask in self.samples.batch(position, n):
            tokens += ids[:-1]
            targets += [i if learn else -1 for i, learn in zip(ids[1:], mask[1:])]
            lengths.append(len(ids) - 1)
        return torch.tensor(tokens), torch.tensor(targets), lengths, n * self.learnt


# ----------------------------------------------------------------------------
# the stage


class InstructionStage(Pretraining):
    """What the stages that read instructions or rankings share: they start from a checkpoint, whose
    tokenizer and template they need."""

    from_scratch = False
    compiles = False  # batches change their shape

    @staticmethod
    def shard_folders(args):
        return ()

    @staticmethod
    def uses_template(args):
        return True

    def samples(self, kind, split, max_len):
        """Samples of the instruction data, in one of instruct.py's forms."""
        run = self.run
        return instructions(kind, run.args, split, run.tokenizer, run.template, max_len)

    def stop_ids(self):
        """The ids at which a reply ends."""
        return stop_ids(self.tokenizer, self.run.template, self.run.metadata.get("end_ids"))


class FineTuning(InstructionStage):
    """Supervised fine-tuning on instructions: the loss is on replies and their end tokens. With
    --lora_rank adapters are trained; the checkpoint has the weights with them merged, for whoever
    reads it, and as they are, to go on; the adapters alone are in a file beside it."""

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
        """What is trained is the sum over the targets, divided by how many there are on average,
        not in this batch: each token counts the same however the samples are split into batches
        and processes. What is shown is the mean over the targets."""
        tokens, targets, lengths, expected = batch
        tokens, targets = tokens.to(self.run.device), targets.to(self.run.device)
        mean, count = model(tokens, targets, lengths=lengths), int((targets >= 0).sum())
        share = count / expected if self.model.training else 1
        return mean * share, len(tokens), {"loss/train": mean.detach().expand(count)}

    def weight(self, batch, rows):
        """The tokens that the loss is the mean of."""
        return int((batch[1] >= 0).sum()) if rows else 0

    def line(self, iteration, s):
        return super().line(iteration, s).replace(f" | mfu {s['mfu']:5.1%}", "")

    def sample_text(self):
        """The reply to the first held-out prompt, always with the same random numbers."""
        ids, mask = self.val.samples.batch(0, 1)[0]
        end = len(ids) - 1 - mask[::-1].index(False)  # the last token that is not of the reply
        prompt, room = ids[: end + 1], self.model.args.max_seq_len - end - 1
        uniform = torch.rand(1, room, generator=torch.Generator().manual_seed(self.args.seed))
        stops = self.stop_ids()
        with self.run.autocast():
            out = generate(self.model, [prompt], room, 0.7, stop_ids=stops, uniform=uniform)
        text = f"{self.tokenizer.decode(prompt)} >>> {self.tokenizer.decode(out.responses()[0])}"
        return "".join(c if c.isprintable() else " " for c in text)

    def adapters(self):
        """What a file of adapters holds."""
        a = self.args
        how = {"rank": a.lora_rank, "alpha": a.lora_alpha, "layers": a.lora_layers}
        return {**how, "four_bit": a.lora_4bit, "state": adapter_state(self.model)}

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
        saved, mine = checkpoint.get("lora"), self.adapters() if self.args.lora_rank else None
        for lora in filter(None, (saved, mine)):
            del lora["state"]
        if saved != mine:
            raise ValueError(f"the run there has other adapters: {saved}, not {mine}")
        if mine:
            self.model.load_state_dict(checkpoint["unmerged"])
        super().load_state(checkpoint)
