"""Learning from rankings of replies: the reward model (train.py --rm) and DPO (--dpo)."""

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ppo
from checkpoint import model_from_checkpoint
from common import flag
from instruct import InstructPrompts, Rankings
from model import TransformerWithValueHead, generate
from pretraining import TextFlags
from sft import InstructionFlags, InstructionStage

# ----------------------------------------------------------------------------
# flags


@dataclass
class PreferenceFlags:
    """responses"""

    reference_samples: int = flag(
        256,
        "replies to held-out prompts: --rm gives the rewards of the initial model's replies mean 0 "
        "and variance 1, --dpo estimates its KL with its own",
    )
    max_gen_len: int = flag(300, "tokens per response, at most")


@dataclass
class RewardModelFlags:
    """reward model"""

    freeze_layers: int = flag(
        0, "number of first layers that stay as they are, together with the embeddings"
    )


@dataclass
class DPOFlags:
    """DPO"""

    dpo_beta: float = flag(0.1, "DPO β, the strength of the KL constraint")
    dpo_label_smoothing: float = flag(0.0, "assumed share of pairs in the wrong order")
    dpo_reference_free: bool = flag(
        False, "leave the reference model out of the loss, as if it were uniform"
    )


# ----------------------------------------------------------------------------
# functions of rankings, scores and log-probabilities


def pairs(sizes):
    """All pairs (better, worse) of rankings of `sizes` completions, best first, as indices into all
    completions one after the other: [2, 3] -> [0, 2, 2, 3], [1, 3, 4, 4]; and the weight of each,
    with which those of a ranking make up 1 / len(sizes)."""
    better, worse, weight, first = [], [], [], 0
    for k in sizes:
        for i, j in itertools.combinations(range(first, first + k), 2):
            better.append(i)
            worse.append(j)
            weight.append(2 / (k * (k - 1) * len(sizes)))
        first += k
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weight)


def score(model, sequences):
    """What a TransformerWithValueHead says at the last token of each of `sequences`, lists of ids:
    (n,) in fp32, from one forward pass without padding. What exceeds the context is not read: of a
    reply that has filled it, that is the last token."""
    sequences = [s[: model.args.max_seq_len] for s in sequences]
    device, lengths = model.value_head.weight.device, [len(s) for s in sequences]
    tokens = torch.tensor([t for s in sequences for t in s], device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    return model.values(model.hidden(tokens, lengths)[last])


def response_logprobs(model, queries, responses, device):
    """log p(response | query) of each pair of lists of ids: (n,), from one forward pass."""
    p = ppo.pack(queries, responses, device)
    logits = model.output(model.hidden(p.tokens, p.lengths)[p.state_ends])
    return ppo.sum_per_rollout(ppo.logprob_entropy_kl(logits, p.actions)[0], p.counts)


def calibration_error(margins, bins=10):
    """Expected calibration error of the probabilities sigmoid(margin) of pairs (n,): the mean of
    |share in the right order - mean confidence| over bins of confidence (Guo et al., 2017)."""
    confidence, right = margins.abs().sigmoid(), (margins.sign() + 1) / 2
    bin = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(right - confidence)[bin == b].sum().abs() for b in range(bins)]
    return float(sum(gaps)) / len(margins)


def gathered_over_ranks(x):
    """The parts (n,) of all processes, one after the other."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


# ----------------------------------------------------------------------------
# the stages


class Preferences(InstructionStage):
    """What reward model and DPO share: rankings for data, and replies to held-out prompts."""

    ddp = False
    positive = ("reference_samples",)

    def __init__(self, run, checkpoint):
        super().__init__(run, checkpoint)
        context = self.model.args.max_seq_len
        room = context - min(run.args.max_gen_len, context // 2)
        prompts = self.samples(InstructPrompts, "val", room)
        self.prompts = prompts.batch(0, min(run.args.reference_samples, len(prompts)))

    def data(self, split):
        samples = self.samples(Rankings, split, self.model.args.max_seq_len)
        if self.run.rank == 0:
            print(f"{split}: {samples.summary()}")
        return samples

    def replies(self, model):
        """A model's replies to held-out prompts, the same at every call."""
        n = min(self.args.max_gen_len, self.model.args.max_seq_len)
        random = torch.Generator().manual_seed(self.args.seed)
        uniform = torch.rand(len(self.prompts), n, generator=random)
        with self.run.autocast():
            out = generate(model, self.prompts, n, stop_ids=self.stop_ids(), uniform=uniform)
        return out.responses()


class RewardModel(Preferences):
    """A scalar for a whole reply, from rankings: the loss is -log sigmoid(better - worse), over all
    pairs of a ranking (Ouyang et al., 2022, equation 1). As a checkpoint it comes with the gain and
    bias that give the replies of the model it started from mean 0 and variance 1."""

    prefix = "rm_"
    flags = TextFlags, InstructionFlags, PreferenceFlags, RewardModelFlags
    accepted = ("plot",)
    writes_text = False

    def __init__(self, run, checkpoint):
        super().__init__(run, checkpoint)
        if "reward" in checkpoint:
            self.samples = checkpoint["reward"]["samples"]
        else:
            self.samples = [q + r for q, r in zip(self.prompts, self.replies(self.model))]

    def build(self, checkpoint):
        model = model_from_checkpoint(
            checkpoint, TransformerWithValueHead, dropout=self.args.dropout
        )
        n = self.args.freeze_layers
        if not 0 <= n <= len(model.layers):
            raise ValueError(f"--freeze_layers={n}: the model has {len(model.layers)} layers")
        if n:
            model.tok_embeddings.requires_grad_(False)
        for layer in model.layers[:n]:
            layer.requires_grad_(False)
        return model

    def loss(self, model, batch):
        better, worse, weight = (t.to(self.run.device) for t in pairs([len(c) for _, c in batch]))
        sequences = [prompt + c for prompt, completions in batch for c in completions]
        scores = score(self.model, sequences)
        margins = scores[better] - scores[worse]
        lengths = [float(len(c)) for _, completions in batch for c in completions]
        return (
            -(F.logsigmoid(margins) * weight).sum(),
            sum(map(len, sequences)),
            {
                "rm/margin": margins.detach(),
                "rm/accuracy": (margins.detach().sign() + 1) / 2,  # a tie is half a hit
                "rm/score": scores.detach(),
                "rm/length": torch.tensor(lengths),
            },
        )

    def summary(self, logged):
        """Of the held-out pairs: share in the right order, mean margin, error of the probabilities
        that the margins stand for, correlation of score and length of a completion."""
        names = "rm/margin", "rm/accuracy", "rm/score", "rm/length"
        margins, right, scores, lengths = (
            gathered_over_ranks(torch.cat([x[k].float().cpu() for x in logged])) for k in names
        )
        both = torch.stack([scores, lengths])
        return {
            "rm/val/accuracy": float(right.mean()),
            "rm/val/margin": float(margins.mean()),
            "rm/val/calibration_error": calibration_error(margins),
            "rm/val/length_correlation": float(both.corrcoef()[0, 1]) if both.std(1).all() else 0.0,
        }

    def sample_text(self):
        """A held-out prompt with its best and its worst completion, and their scores."""
        ((prompt, completions),) = self.val.batch(0, 1)
        ends = completions[0], completions[-1]
        with torch.no_grad(), self.run.autocast():
            scores = score(self.model, [prompt + c for c in ends]).tolist()
        text = [f"{s:+.2f} {self.tokenizer.decode(c)}" for s, c in zip(scores, ends)]
        return f"{self.tokenizer.decode(prompt)}\nbest: {text[0]}\nworst: {text[1]}"

    @torch.no_grad()
    def state(self):
        self.model.eval()
        with self.run.autocast():
            size = 2 * self.args.batch_size
            parts = range(0, len(self.samples), size)
            scores = torch.cat([score(self.model, self.samples[i : i + size]) for i in parts])
        self.model.train()
        std = float(scores.std(correction=0)) or 1.0
        reward = {"gain": 1 / std, "bias": -float(scores.mean()) / std, "samples": self.samples}
        return super().state() | {"reward": reward}


class DPO(Preferences):
    """Direct preference optimization (Rafailov et al., 2023): the reward that a policy stands for,
    beta log(policy / reference), is trained on pairs as a reward model is."""

    prefix = "dpo_"
    flags = TextFlags, InstructionFlags, PreferenceFlags, DPOFlags
    accepted = ("plot",)

    @classmethod
    def check(cls, run):
        super().check(run)
        args = run.args
        if not 0 <= args.dpo_label_smoothing < 0.5:
            raise ValueError(
                "--dpo_label_smoothing must be from 0 to below 0.5: a half says nothing"
            )
        if args.dpo_beta <= 0:
            raise ValueError(f"--dpo_beta must be above 0, not {args.dpo_beta}")

    def build(self, checkpoint):
        weights = checkpoint["dpo"]["reference"] if "dpo" in checkpoint else checkpoint["model"]
        reference = {"model": weights, "model_args": checkpoint["model_args"]}
        self.reference = model_from_checkpoint(reference, dropout=0.0).requires_grad_(False)
        self.reference.to(self.run.device)
        return super().build(checkpoint)

    def loss(self, model, batch):
        a = self.args
        better, worse, weight = (t.to(self.run.device) for t in pairs([len(c) for _, c in batch]))
        queries = [prompt for prompt, completions in batch for _ in completions]
        responses = [c for _, completions in batch for c in completions]
        rewards = response_logprobs(self.model, queries, responses, self.run.device)
        if not a.dpo_reference_free:
            with torch.no_grad():
                ref = response_logprobs(self.reference, queries, responses, self.run.device)
            rewards = rewards - ref
        rewards = a.dpo_beta * rewards
        margins = rewards[better] - rewards[worse]
        each = -(1 - a.dpo_label_smoothing) * F.logsigmoid(margins)
        each = each - a.dpo_label_smoothing * F.logsigmoid(-margins)
        return (
            (each * weight).sum(),
            sum(map(len, queries + responses)),
            {
                "dpo/margin": margins.detach(),
                "dpo/accuracy": (margins.detach().sign() + 1) / 2,
                "dpo/better": rewards.detach()[better],
                "dpo/worse": rewards.detach()[worse],
            },
        )

    def summary(self, logged):
        """Of the held-out pairs: mean margin of the rewards and share in the right order; and the
        KL to the reference, nats a reply, exact at each token of the model's own replies."""
        out = {}
        for name in ("margin", "accuracy"):
            each = torch.cat([x[f"dpo/{name}"].float().cpu() for x in logged])
            out[f"dpo/val/{name}"] = float(gathered_over_ranks(each).mean())
        self.held_out_replies = self.replies(self.model)
        with self.run.autocast():
            kl, _ = ppo.kl_to_reference(
                self.model,
                self.reference,
                self.prompts,
                self.held_out_replies,
                self.args.batch_size,
            )
        return out | {"dpo/val/kl_ref": float(kl.mean())}

    def sample_text(self):
        """The reply to the first held-out prompt, from the evaluation before."""
        return self.tokenizer.decode(self.prompts[0] + self.held_out_replies[0])

    def state(self):
        return super().state() | {"dpo": {"reference": self.reference.state_dict()}}
