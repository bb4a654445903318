"""Training on rankings of replies: the reward model (train.py --rm) and DPO (--dpo)."""

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ppo
from checkpoint import halve_frozen, model_from_checkpoint
from common import flag, note, printable
from instruct import InstructPrompts, Rankings
from kernels import in_chunks, to_device
from model import TransformerWithValueHead, generate
from pretraining import (
    CompileFlags,
    MemoryFlags,
    MemoryPlanFlags,
    TextFlags,
    ToolFlags,
    gathered,
    place,
    whole,
)
from sft import FreezeFlags, InstructionFlags, InstructionStage

# ----------------------------------------------------------------------------
# flags


@dataclass
class PreferenceFlags:
    """responses"""

    reference_samples: int = flag(
        256,
        "sampled replies to held-out prompts: --rm normalizes its rewards to mean 0 and variance 1 "
        "on replies of the initial model, --dpo estimates its KL on replies of the policy",
    )
    max_gen_len: int = flag(300, "tokens per response, at most")


@dataclass
class DPOFlags:
    """DPO"""

    dpo_beta: float = flag(0.1, "DPO β, the strength of the KL constraint")
    dpo_label_smoothing: float = flag(
        0.0, "assumed share of pairs that are ranked in the wrong order"
    )
    dpo_reference_free: bool = flag(
        False, "omit the reference model from the loss, as if it were uniform"
    )


# ----------------------------------------------------------------------------
# functions of rankings, scores and log-probabilities


def pairs(sizes):
    """All pairs (better, worse) of a batch of rankings. `sizes` has the number of completions of
    each ranking; the completions are ordered best first and concatenated. Returns three tensors
    (P,): the index of the better completion, the index of the worse one, and the weight of the
    pair. The pairs of one ranking have equal weights with the sum 1 / len(sizes). Example:
    [2, 3] -> [0, 2, 2, 3], [1, 3, 4, 4], [1/2, 1/6, 1/6, 1/6]."""
    better, worse, weight, first = [], [], [], 0
    for k in sizes:
        for i, j in itertools.combinations(range(first, first + k), 2):
            better.append(i)
            worse.append(j)
            weight.append(2 / (k * (k - 1) * len(sizes)))
        first += k
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weight)


def score(model, sequences):
    """The value of a TransformerWithValueHead at the last token of each of `sequences`, lists of
    token ids: (n,) in fp32, from one forward pass without padding. Tokens beyond the context are
    ignored; a reply that fills the context exceeds it by one token."""
    sequences = [s[: model.args.max_seq_len] for s in sequences]
    device, lengths = model.value_head.weight.device, [len(s) for s in sequences]
    tokens = to_device(torch.tensor([t for s in sequences for t in s]), device)
    last = to_device(torch.tensor(lengths).cumsum(0) - 1, device)
    return model.values(model.hidden(tokens, lengths)[last])


def token_logprobs(model, batch):
    """log p of each token of the responses of a ppo.Minibatch: (A,)."""
    hidden = model.hidden(batch.tokens, batch.lengths)[batch.state_ends]

    def logprobs(hidden, actions):
        return (ppo.terms_of(model)(model.output(hidden), actions)[0],)

    return in_chunks(logprobs, model.args.vocab_size, hidden, batch.actions)[0]


def response_logprobs(model, queries, responses, device):
    """log p(response | query) for n pairs of lists of token ids: (n,), from one forward pass."""
    batch = ppo.pack(queries, responses, device)
    return ppo.sum_per_rollout(token_logprobs(model, batch), batch.counts)


def calibration_error(margins, bins=10):
    """Expected calibration error of the probabilities sigmoid(margins), margins (n,): the mean of
    |accuracy - mean confidence| over bins of confidence (Guo et al., 2017)."""
    confidence, right = margins.abs().sigmoid(), (margins.sign() + 1) / 2
    bin = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(right - confidence)[bin == b].sum().abs() for b in range(bins)]
    return float(sum(gaps)) / len(margins)


def gathered_over_ranks(x):
    """Concatenates the tensors x (n,) of all processes, in the order of the ranks."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


# ----------------------------------------------------------------------------
# the stages


class Preferences(InstructionStage):
    """Base class of reward model and DPO: the data are rankings, and replies to held-out prompts
    are sampled."""

    flags = (
        TextFlags,
        MemoryFlags,
        CompileFlags,
        InstructionFlags,
        FreezeFlags,
        PreferenceFlags,
        MemoryPlanFlags,
        ToolFlags,
    )
    ddp = False
    positive = "reference_samples", "max_gen_len"

    def __init__(self, run, checkpoint):
        super().__init__(run, checkpoint)
        context = self.model.args.max_seq_len
        room = context - min(run.args.max_gen_len, context // 2)
        prompts = self.samples(InstructPrompts, "val", room)
        self.prompts = prompts.batch(0, min(run.args.reference_samples, len(prompts)))
        if hasattr(self, "reference"):
            self.reference.compiled_hidden = getattr(self.model, "compiled_hidden", False)

    def data(self, split):
        samples = self.samples(Rankings, split, self.model.args.max_seq_len)
        if self.run.rank == 0:
            print(f"{split}: {samples.summary()}")
        return samples

    def replies(self, model):
        """Samples a reply to each of self.prompts, with the same random numbers at every call.
        Returns lists of token ids."""
        n = min(self.args.max_gen_len, self.model.args.max_seq_len)
        random = torch.Generator().manual_seed(self.args.seed)
        uniform = torch.rand(len(self.prompts), n, generator=random)
        with self.run.autocast(), whole(model):
            out = generate(model, self.prompts, n, stop_ids=self.stop_ids(), uniform=uniform)
        return out.responses()


class RewardModel(Preferences):
    """A reward model: one scalar per reply, trained on rankings. The loss is
    -log sigmoid(score of better - score of worse), averaged over the pairs of each ranking (Ouyang
    et al., 2022, equation 1). The checkpoint also stores a gain and a bias that normalize the
    scores to mean 0 and variance 1 on replies of the initial model, or, if that is a reward model
    itself, on the replies in its checkpoint."""

    prefix = "rm_"
    writes_text = False
    kept_flags = "reference_samples", "max_gen_len"  # of the samples in the checkpoint
    model_class = TransformerWithValueHead

    def __init__(self, run, checkpoint):
        super().__init__(run, checkpoint)
        if "reward" in checkpoint:
            self.samples = checkpoint["reward"]["samples"]
            if not run.resumed and run.rank == 0:
                n = len(self.samples)
                note(f"rewards are normalized on the {n} samples of the initial reward model")
        else:
            self.samples = [q + r for q, r in zip(self.prompts, self.replies(self.model))]

    def loss(self, model, batch):
        sizes, device = [len(c) for _, c in batch], self.run.device
        better, worse, weight = (to_device(t, device) for t in pairs(sizes))
        sequences = [prompt + c for prompt, completions in batch for c in completions]
        scores = score(self.model, sequences)
        margins = scores[better] - scores[worse]
        lengths = [float(len(c)) for _, completions in batch for c in completions]
        return (
            -(F.logsigmoid(margins) * weight).sum(),
            sum(map(len, sequences)),
            {
                "rm/margin": margins.detach(),
                "rm/accuracy": (margins.detach().sign() + 1) / 2,  # a tie counts as 1/2
                "rm/score": scores.detach(),
                "rm/length": torch.tensor(lengths),
            },
        )

    def summary(self, logged):
        """Results on the held-out pairs: accuracy, mean margin, expected calibration error, and the
        correlation of a completion's score with its length."""
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

    def sample_texts(self):
        """A held-out prompt with its best and worst completion, and the scores of both."""
        if self.args.fsdp:
            return {}
        ((prompt, completions),) = self.val.batch(0, 1)
        ends = completions[0], completions[-1]
        with torch.no_grad(), self.run.autocast():
            scores = score(self.model, [prompt + c for c in ends]).tolist()
        texts = [f"{s:+.2f} {self.tokenizer.decode(c)}" for s, c in zip(scores, ends)]
        texts = map(printable, (self.tokenizer.decode(prompt), *texts))
        return dict(zip(("prompt", "best", "worst"), texts))

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
    """Direct preference optimization (Rafailov et al., 2023, equation 7): the implicit reward of
    the policy, β log(policy / reference), is trained on pairs like the scores of a reward model."""

    prefix = "dpo_"
    flags = (*Preferences.flags, DPOFlags)

    @classmethod
    def check(cls, run):
        super().check(run)
        args = run.args
        if not 0 <= args.dpo_label_smoothing < 0.5:
            raise ValueError(
                "--dpo_label_smoothing must be at least 0 and below 0.5: "
                "at 0.5 the rankings carry no information"
            )
        if args.dpo_beta <= 0:
            raise ValueError(f"--dpo_beta must be above 0, not {args.dpo_beta}")

    def build(self, checkpoint):
        weights = checkpoint["dpo"]["reference"] if "dpo" in checkpoint else checkpoint["model"]
        reference = {"model": weights, "model_args": checkpoint["model_args"]}
        self.reference = model_from_checkpoint(reference, dropout=0.0).requires_grad_(False)
        if not self.args.fsdp:
            halve_frozen([self.reference], self.run.dtype)
        place(self.reference, self.run)
        return super().build(checkpoint)

    def loss(self, model, batch):
        a = self.args
        sizes, device = [len(c) for _, c in batch], self.run.device
        better, worse, weight = (to_device(t, device) for t in pairs(sizes))
        queries = [prompt for prompt, completions in batch for _ in completions]
        responses = [c for _, completions in batch for c in completions]
        rewards = response_logprobs(self.model, queries, responses, self.run.device)
        if not a.dpo_reference_free:
            with torch.no_grad():
                ref = response_logprobs(self.reference, queries, responses, self.run.device)
            rewards = rewards - ref
        rewards = a.dpo_beta * rewards
        margins = rewards[better] - rewards[worse]
        losses = -(1 - a.dpo_label_smoothing) * F.logsigmoid(margins)
        losses = losses - a.dpo_label_smoothing * F.logsigmoid(-margins)
        return (
            (losses * weight).sum(),
            sum(map(len, queries + responses)),
            {
                "dpo/margin": margins.detach(),
                "dpo/accuracy": (margins.detach().sign() + 1) / 2,
                "dpo/better": rewards.detach()[better],
                "dpo/worse": rewards.detach()[worse],
            },
        )

    def summary(self, logged):
        """Results on the held-out pairs: mean margin of the rewards and accuracy; and the KL
        divergence from the reference in nats per reply, computed over the whole vocabulary at each
        token of the policy's own replies."""
        out = {}
        for name in ("margin", "accuracy"):
            values = torch.cat([x[f"dpo/{name}"].float().cpu() for x in logged])
            out[f"dpo/val/{name}"] = float(gathered_over_ranks(values).mean())
        self.held_out_replies = self.replies(self.model)
        with self.run.autocast():
            kl, _ = kl_to_reference(
                self.model,
                self.reference,
                self.prompts,
                self.held_out_replies,
                self.args.batch_size,
            )
        return out | {"dpo/val/kl_ref": float(kl.mean())}

    def sample_texts(self):
        """The reply to the first held-out prompt, from the latest evaluation."""
        texts = self.prompts[0], self.held_out_replies[0]
        texts = (printable(self.tokenizer.decode(x)) for x in texts)
        return dict(zip(("prompt", "response"), texts))

    def state(self):
        reference = gathered(self.reference.state_dict(), keep=self.run.rank == 0)
        return super().state() | {"dpo": {"reference": reference}}


@torch.no_grad()
def kl_to_reference(policy, reference, queries, responses, batch_size, temperature=1.0):
    """KL(policy ‖ reference) of each response in nats, exact over the vocabulary at each token, and
    the reference's log-probability of each response, (B,) both."""
    kls, ref_logprobs = [], []
    for i in range(0, len(queries), batch_size):
        part, states = slice(i, i + batch_size), []
        for model in (reference, policy):
            batch = ppo.pack(queries[part], responses[part], model.output.weight.device)
            states.append(model.hidden(batch.tokens, batch.lengths)[batch.state_ends])

        def compare(ref_hidden, hidden, actions):
            logits = policy.output(hidden).float() / temperature
            ref_logits = (reference.output(ref_hidden).float() / temperature).to(logits.device)
            ref_logprobs = ppo.logprob_entropy_kl(ref_logits, actions)[0]
            return ppo.logprob_entropy_kl(logits, actions, ref_logits)[2], ref_logprobs

        terms = in_chunks(compare, policy.args.vocab_size, *states, batch.actions)
        for results, x in zip((kls, ref_logprobs), terms):
            results.append(ppo.sum_per_rollout(x, batch.counts))
    return torch.cat(kls), torch.cat(ref_logprobs)
