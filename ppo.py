"""Proximal Policy Optimization of a language model, without padding and without guesses.

The objective for a prompt x and responses y is J(π) = E_π[r(x, y)] − β KL(π ‖ π_ref), in which r
scores a finished response and the KL keeps the policy near the model it started from. Generating a
response is an episode: each token is an action, the text so far is the state, and the score
arrives with the last token. PPO (Schulman et al., 2017) improves π by gradient steps on

    E[min(ratio · A, clip(ratio) · A)],   ratio = π(token | state) / π_old(token | state)

where π_old drew the tokens and A says how much better each was than a critic expected: a second
network that learns V(state), the score still to come. The KL's gradient is not sampled but exact:
that of the present token's distribution is in the loss, that of later ones in the rewards.

J has a roof that can be computed: π*(y|x) ∝ π_ref(y|x) exp(r/β) reaches
J*(x) = β log E_ref[exp(r/β)]. `objective_roof` estimates it from samples of the reference.
A run is as good as J is close to J*.

Everything per token is flat: the A actions (response tokens) of a batch of B rollouts, one
rollout after the other. Letters as in model.py: B rollouts, N packed tokens, V vocabulary.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from common import flag
from kernels import TokenTerms, switched_on
from model import generate

# ----------------------------------------------------------------------------
# configuration


@dataclass
class PPOConfig:
    """PPO: hyperparameters

    A field with `flag` is a flag of train.py, the others are not: three of them are set from
    --batch_size, --gradient_accumulation_steps and --grad_clip. Names follow the original
    implementation."""

    # the objective
    init_kl_coef: float = flag(0.2, "β, the weight of the KL penalty in J")
    kl_penalty: str = flag(
        "full",
        "estimate of the KL: kl (k1), abs, mse (k2), k3, or full (exact, over the vocabulary)",
    )
    kl_in: str = flag(
        "both",
        "where the KL penalty acts: reward (--whiten_rewards), loss (with full or mse), or both "
        "(with full; the other estimates act in the reward alone)",
    )
    adap_kl_ctrl: bool = flag(
        False, "adapt β so that the KL per rollout stays near --target (--horizon)"
    )
    target: float = flag(6.0, "KL that adap_kl_ctrl aims at, nats per rollout")
    horizon: float = flag(10000.0, "rollouts in which β changes by a factor of e at full error")
    # rollouts
    rollouts: int = flag(0, "rollouts per iteration; 0 means 8 × batch_size")
    max_gen_len: int = flag(300, "tokens per response, at most")
    temperature: float = flag(1.0, "temperature of the policy, in rollouts and in training")
    missing_eos_penalty: float = flag(
        0.0, "number subtracted from the score of a response that max_gen_len cut off"
    )
    # advantages
    advantage: str = flag(
        "gae",
        "gae (with a critic), or without a critic rloo, grpo (both compare within the group) "
        "or reinforce",
    )
    group_size: int = flag(1, "responses per prompt")
    gamma: float = flag(1.0, "discount per token")
    lam: float = flag(0.7, "GAE λ of the policy's advantages; low values reduce variance")
    lam_value: float = flag(0.95, "GAE λ of the critic's targets; 1 means plain returns")
    whiten_rewards: bool = flag(False, "scale the rewards of the tokens to variance 1")
    whiten_advantages: bool = flag(True, "scale and shift advantages to variance 1 and mean 0")
    reward_clip: float = flag(
        0.0, "bound to which scores are clipped, ±reward_clip; 0: no clipping"
    )
    reward_scale: bool = flag(False, "divide scores by their standard deviation in the batch")
    # the update
    ppo_epochs: int = flag(1, "passes over the rollouts")
    mini_batch_size: int = 50  # rollouts per forward pass
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    cliprange: float = flag(0.2, "PPO clip range ε of the ratio")
    cliprange_high: float = flag(
        0.0, "upper clip range where it differs (clip-higher); 0 means cliprange"
    )
    cliprange_value: float = 0.0  # how far a value may move in an iteration; 0: no clipping
    loss_aggregation: str = flag("token", "what has equal weight in the loss: token or sequence")
    entropy_coef: float = flag(0.0, "weight of the entropy bonus")
    max_grad_norm: float = 1.0  # of policy and critic, each by itself
    early_stopping: bool = True  # end the epochs when the policy has moved 1.5 * target_kl
    target_kl: float = flag(
        0.1, "the epochs end early when the policy has moved 1.5 × target_kl, nats per token"
    )
    ratio_threshold: float = 10.0  # skip a step whose mean ratio is above it
    ptx_coef: float = flag(
        0.0, "weight of the pretraining loss mixed in (PPO-ptx, InstructGPT; --ptx_data)"
    )
    # the critic
    value_model: str = flag(
        "separate",
        "separate, shared (a value head on the policy, --vf_coef), or the checkpoint that a "
        "separate critic starts from",
    )
    vf_coef: float = flag(0.5, "weight of the value loss of a shared critic")
    critic_warmup: int = flag(
        0, "epochs of the first iteration, in which a separate critic is trained alone"
    )
    averaging: float = flag(
        0.0, "decay of the average of the policy's weights that is the result; 0: no average"
    )

    def __post_init__(self):
        choices = {
            "kl_penalty": ("kl", "abs", "mse", "k3", "full"),
            "kl_in": ("reward", "loss", "both"),
            "advantage": ("gae", "rloo", "grpo", "reinforce"),
            "loss_aggregation": ("token", "sequence"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        for name in ("ppo_epochs", "group_size", "max_gen_len", "mini_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("gamma", "lam", "lam_value"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.kl_in == "loss" and self.kl_penalty not in ("full", "mse"):
            raise ValueError(
                f"kl_in=loss with kl_penalty={self.kl_penalty} has another gradient "
                "than the KL: take full or mse, or kl_in=reward"
            )
        if self.critic_warmup and (self.advantage != "gae" or self.value_model == "shared"):
            raise ValueError("critic_warmup is for a critic of its own: advantage=gae, not shared")
        if self.whiten_rewards and self.kl_in != "reward":
            raise ValueError("whiten_rewards scales the KL in the rewards: it needs kl_in=reward")
        if self.advantage in ("rloo", "grpo") and self.group_size < 2:
            raise ValueError(f"advantage={self.advantage} needs a group_size of 2 or more")
        if self.temperature <= 0:
            raise ValueError("rollouts need a temperature above 0")
        self.rollouts = self.rollouts or 8 * self.mini_batch_size
        if self.rollouts % self.group_size:
            raise ValueError(
                f"rollouts ({self.rollouts}) must be a multiple of group_size ({self.group_size})"
            )


# ----------------------------------------------------------------------------
# rewards: f(prompts, responses, ended) -> one score a rollout


class LengthReward:
    """−|target − tokens| / 100 over prompt plus response, end token included, as the original."""

    def __init__(self, target_len=200):
        self.target_len = target_len

    def __call__(self, prompts, responses, ended):
        return [-abs(self.target_len - len(p) - len(r)) / 100 for p, r in zip(prompts, responses)]


# ----------------------------------------------------------------------------
# the pieces, each a function of flat tensors


class KLController:
    """β that follows the KL of rollouts (Ziegler et al., 2019, section 2.2); an infinite horizon
    keeps it as it is."""

    def __init__(self, value, target, horizon):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl, rollouts):
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * rollouts / self.horizon


def kl_estimate(logprob, ref_logprob, kind):
    """Per-token estimates of KL(π ‖ ref) from log-probabilities of a token drawn from π (Schulman,
    "Approximating KL divergence", 2020). kl: unbiased in value. abs and mse: biased, low variance.
    k3: unbiased and never negative. Shapes (A,) -> (A,)."""
    log_ratio = logprob - ref_logprob
    if kind == "kl":
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind == "mse":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimate {kind!r}")


def logprob_entropy_kl(logits, target, ref_logits=None):
    """Of each token's distribution π = softmax(logits), logits (A, V): log π of the target (A,), 0 if
    that is -1; the entropy of π; and KL(π ‖ ref), ref = softmax(ref_logits), 0 without ref_logits.
    All (A,) in fp32. kernels.TokenTerms computes the same with less memory in the backward pass."""
    if switched_on():
        return TokenTerms.apply(logits, target, ref_logits)
    logp = logits.float().log_softmax(-1)
    logprob = logp.gather(1, target.clamp(min=0)[:, None])[:, 0] * (target >= 0)
    entropy = -(logp.exp() * logp).sum(-1)
    if ref_logits is None:
        return logprob, entropy, torch.zeros_like(entropy)
    return logprob, entropy, (logp.exp() * (logp - ref_logits.float().log_softmax(-1))).sum(-1)


def over_tokens(x, counts):
    """One number a rollout (B,) -> one an action (A,), counts (B,): [5, 7], [2, 1] -> [5, 5, 7]."""
    return x.repeat_interleave(counts.to(x.device))


def sum_by_rollout(x, counts):
    """The reverse, by sums: (A,) and counts (B,) -> (B,)."""
    rollout = over_tokens(torch.arange(len(counts), device=x.device), counts)
    return x.new_zeros(len(counts)).index_add(0, rollout, x)


def place_scores(scores, counts):
    """One score a rollout (B,) -> rewards (A,), each score on the last token of its response."""
    rewards = scores.new_zeros(int(counts.sum()))
    rewards[counts.cumsum(0) - 1] = scores
    return rewards


def gae(rewards, values, counts, gamma, lam):
    """Generalized advantage estimation (Schulman et al., 2016, equation 16) for episodes that end
    with their last action: A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t.
    rewards, values (A,), counts (B,) -> advantages (A,), returns (A,) = advantages + values."""
    B, T = len(counts), int(counts.max())
    inside = torch.arange(T + 1) < counts.cpu()[:, None]
    r, v, adv = torch.zeros(3, B, T + 1)  # on the CPU: T tiny steps, wherever the model is
    r[inside], v[inside] = rewards.cpu(), values.cpu()
    for t in reversed(range(T)):
        delta = r[:, t] + gamma * v[:, t + 1] - v[:, t]
        adv[:, t] = (delta + gamma * lam * adv[:, t + 1]) * inside[:, t]
    adv = adv[inside].to(values.device)
    return adv, adv + values


def group_advantages(scores, group_size, kind):
    """One advantage a rollout (B,), from scores (B,) of groups of neighbours with one prompt.
    rloo: score minus the mean of the others (Ahmadian et al., 2024). grpo: standardised in the
    group (Shao et al., 2024)."""
    groups = scores.view(-1, group_size)
    if kind == "rloo":
        others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
        return (groups - others).flatten()
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def all_sum(*values):
    """Sums of tensors over all processes."""
    # On the CPU first: MPS has no float64.
    packed = torch.stack([torch.as_tensor(v).detach().cpu().double().sum() for v in values])
    if dist.is_initialized():
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        packed = packed.to(where)
        dist.all_reduce(packed)
    return packed.tolist()


def mean_and_variance(x):
    """Of a tensor's numbers on all processes."""
    n, total = all_sum(torch.tensor(x.numel()), x)
    return total / n, all_sum((x.cpu().double() - total / n).square())[0] / n


def whiten(x, shift_mean=True):
    """x with variance 1, and mean 0 unless told otherwise, over the batch of all processes."""
    mean, var = mean_and_variance(x)
    out = (x - mean) / math.sqrt(var + 1e-8)
    return out if shift_mean else out + mean


def policy_loss(logprobs, old_logprobs, advantages, low, high):
    """PPO's clipped surrogate, negated, for each action (A,); and where the clip took the gradient
    away, (A,) bool. The ratio may go from 1 − low to 1 + high before it is clipped."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(values, old_values, returns, clip):
    """½ (V − R)² for each action (A,), V kept within `clip` of its old value unless clip is 0 (then
    the larger of both losses counts, as in OpenAI's code); and where the clip acted, (A,) bool."""
    plain = (values - returns).square()
    if not clip:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (bounded - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def objective_roof(scores, beta):
    """J* = mean over prompts of β log E_ref[exp(r/β)], and half its 95 % confidence interval, from
    scores (prompts, samples) of reference samples. β = 0: the best sample of each prompt.

    The logarithm of a mean of n samples is low by half its relative variance, to first order:
    that is added, Σ w² − 1/n with w = softmax(r/β). Of 128 samples of stories260K J* was low by
    0.008, 0.017 and 0.026 at β = 0.2, 0.05 and 0.02; so it is by 0.000, 0.007 and 0.019."""
    scores, n = scores.double(), scores.shape[1]
    per_prompt, variance = scores.max(1).values, torch.zeros(1)
    if beta:
        variance = (scores / beta).softmax(1).square().sum(1) - 1 / n
        per_prompt = beta * ((scores / beta).logsumexp(1) - math.log(n) + variance / 2)
    # Over the prompts, of which each adds its samples' error; of one prompt, that error alone.
    spread = per_prompt.std() if len(per_prompt) > 1 else beta * variance[0].sqrt()
    return per_prompt.mean().item(), 1.96 * spread.item() / math.sqrt(len(per_prompt))


# ----------------------------------------------------------------------------
# the trainer


# How far two computations of the log-probabilities of the same tokens may be apart (see check): what
# share of the tokens may be off by more than the limit of a token; that limit; the limits of the mean
# absolute difference, of the mean difference, and of the mean KL of a rollout. The products of GPUs are
# in TF32. For stories260K the mean absolute difference is 3e-6, 6e-4 and 0.013, and of 60,000 tokens
# the worst is off by 3e-5, 0.01 and 0.32: in half precision a maximum has no limit, a share has.
LIMITS = {
    "float32": (0.0, 5e-3, 3e-4, 3e-4, 0.03),
    "tf32": (1e-3, 0.03, 5e-3, 1e-3, 0.15),
    "half": (1e-3, 0.3, 0.1, 0.02, 3.0),
}


class RewardError(ValueError):
    """The user's reward failed, or gave something that is no score."""


class Mismatch(RuntimeError):
    """Models, rollouts, mask and scores do not belong together: going on would be silently wrong."""


class Packed(NamedTuple):
    """Some rollouts as one packed input: the prompts, and the responses but for their last token.
    tokens (N,), lengths list; action (A,) positions in N whose *next* token is a response token,
    target (A,) those tokens."""

    tokens: torch.Tensor
    lengths: list
    action: torch.Tensor
    target: torch.Tensor


def pack(queries, responses, device):
    tokens, lengths, action, target = [], [], [], []
    for q, r in zip(queries, responses):
        first = len(tokens) + len(q) - 1  # this position predicts the first response token
        action += range(first, first + len(r))
        target += r
        tokens += q + r[:-1]
        lengths.append(len(q) + len(r) - 1)
    tokens, action, target = (torch.tensor(x, device=device) for x in (tokens, action, target))
    return Packed(tokens, lengths, action, target)


@torch.no_grad()
def against_reference(policy, reference, queries, responses, size, temperature=1.0):
    """How far a policy is from a reference on its own responses, `size` at a time: of each response
    the KL in nats, exact over the vocabulary at each of its tokens, and the reference's
    log-probability, (B,) both."""
    kls, ref_logprobs = [], []
    for i in range(0, len(queries), size):
        both = []
        for model in (reference, policy):
            p = pack(queries[i : i + size], responses[i : i + size], model.output.weight.device)
            logits = model.output(model.hidden(p.tokens, p.lengths)[p.action]).float() / temperature
            both.append(logits.to(policy.output.weight.device))
        ref, logits = both
        counts = torch.tensor([len(r) for r in responses[i : i + size]])
        kls.append(sum_by_rollout(logprob_entropy_kl(logits, p.target, ref)[2], counts))
        ref_logprobs.append(sum_by_rollout(logprob_entropy_kl(ref, p.target)[0], counts))
    return torch.cat(kls), torch.cat(ref_logprobs)


def check_rollouts(queries, responses, ended, logprobs, stop_ids):
    """What must hold of rollouts whatever the configuration; raises Mismatch."""
    if not len(queries) == len(responses) == len(ended):
        sizes = len(queries), len(responses), len(ended)
        raise Mismatch("{} prompts, {} responses, {} end flags".format(*sizes))
    if logprobs.numel() != sum(map(len, responses)):
        raise Mismatch("rollouts must have one log-probability for each response token")
    for r, done in zip(responses, ended.tolist()):
        if not r:
            raise Mismatch("a response is empty: its end token is part of it, to be trained")
        if done != (r[-1] in stop_ids):
            raise Mismatch("a response that ended lacks its end token, or a cut one has it")
    if not bool(torch.isfinite(logprobs).all()) or float(logprobs.max()) > 1e-4:
        raise Mismatch("a rollout's log-probability is not that of a token")


class PPOTrainer:
    """Runs PPO iterations: `rollout` draws responses, `step` learns from them.

    policy     a Transformer; with value_model "shared", a TransformerWithValueHead
    reference  a frozen Transformer
    critic     a TransformerWithValueHead of its own, or None (shared, or no critic wanted)
    optimizer, critic_optimizer  the latter None where critic is None
    context    what to run forward passes in (autocast), a zero-argument callable
    ptx        a callable giving this rank's part of a batch of text: what its mean loss weighs in
               that of the batch (0: no more follows), tokens, targets, maybe lengths; or None
    stop_ids   the tokens that end a response
    """

    def __init__(
        self,
        config,
        policy,
        reference,
        critic,
        optimizer,
        critic_optimizer,
        context,
        ptx=None,
        *,
        stop_ids,
    ):
        c = self.config = config
        self.policy, self.reference, self.critic = policy, reference, critic
        self.optimizer, self.critic_optimizer = optimizer, critic_optimizer
        self.context, self.ptx, self.stop_ids = context, ptx, stop_ids
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.device = policy.output.weight.device
        with context():
            self.half = torch.is_autocast_enabled(self.device.type)
            float16 = self.half and torch.get_autocast_dtype(self.device.type) is torch.float16
        # In float16 the gradients of so small losses vanish: the update itself is in float32.
        self.update_context = nullcontext if float16 else context
        if c.ptx_coef and ptx is None:
            raise ValueError("ptx_coef needs text: a callable as ptx")
        kind = "half" if self.half else "float32" if self.device.type == "cpu" else "tf32"
        self.rare, *limits = LIMITS[kind]
        limits = (x / min(c.temperature, 1.0) for x in limits)  # the temperature divides the logits
        self.token_limit, self.mean_limit, self.bias_limit, self.kl_limit = limits
        self.iteration = 0
        horizon = c.horizon if c.adap_kl_ctrl else math.inf
        self.kl_ctl = KLController(c.init_kl_coef, c.target, horizon)
        self.uses_values = c.advantage == "gae"
        # A sampled penalty in the rewards already has the present token's share of the gradient.
        self.kl_in_reward = c.kl_in != "loss"
        self.kl_in_loss = c.kl_in == "loss" or (c.kl_in == "both" and c.kl_penalty == "full")
        self.average = None
        if c.averaging:
            self.average = {k: v.detach().clone() for k, v in policy.state_dict().items()}

    # ---- rollouts

    def rollout(self, prompts, seed, model=None):
        """One response for each of `prompts` (lists of ids), the same for any number of processes:
        the random numbers are those of the whole batch. This rank keeps every world-th group.
        Returns queries, responses, old_logprobs (list of (n,) tensors) and ended (B,)."""
        c = self.config
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), c.max_gen_len, generator=generator)
        mine = self.mine(len(prompts))
        queries = [prompts[i] for i in mine]
        model, temperature = model or self.policy, c.temperature
        with self.context():
            out = generate(
                model,
                queries,
                c.max_gen_len,
                temperature,
                stop_ids=self.stop_ids,
                uniform=uniform[mine],
                max_batch=512,
            )
        logprobs = [lp[:n] for lp, n in zip(out.logprobs, out.lengths.tolist())]
        return queries, out.responses(), logprobs, out.ended

    def mine(self, total):
        """Which of `total` rollouts are this rank's: whole groups, dealt in turn."""
        group = self.config.group_size
        return [i for i in range(total) if i // group % self.world == self.rank]

    def scaled(self, logits):
        return logits if self.config.temperature == 1 else logits.float() / self.config.temperature

    def packed(self, data, part):
        """Some rollouts of data (`part`, indices), and which of the actions are theirs (A,)."""
        counts, starts = data["counts"], data["counts"].cumsum(0) - data["counts"]
        span = torch.cat([torch.arange(starts[j], starts[j] + counts[j]) for j in part])
        p = pack(*([data[k][i] for i in part] for k in ("queries", "responses")), self.device)
        if not torch.equal(p.target, data["target"][span]):
            raise Mismatch("the mask is wrong: the trained tokens are not the response tokens")
        return p, span

    def values(self, p):
        model = self.critic or self.policy
        return model.values(model.hidden(p.tokens, p.lengths)[p.action])

    @torch.no_grad()
    def examine(self, data, sampled):
        """What all models say of the rollouts before the update, flat: `old` (A,) log-probabilities
        of the policy; `ref` (A,) those of the reference and `ref_hidden` (A, D), one product away
        from its logits; `kl` (A,) the penalty; `values` (A,). Raises Mismatch where the policy
        does not agree with the `sampled` (A,) log-probabilities of the rollouts."""
        found = {k: [] for k in ("old", "ref", "ref_hidden", "kl", "values")}
        counts, kind = data["counts"], self.config.kl_penalty
        for part in torch.arange(len(counts)).split(self.config.mini_batch_size):
            p, _ = self.packed(data, part)
            with self.context():
                where = self.reference.output.weight.device  # maybe another device
                hidden = self.reference.hidden(p.tokens.to(where), p.lengths)[p.action.to(where)]
                ref_logits = self.scaled(self.reference.output(hidden)).to(self.device)  # (A, V)
                logits = self.policy.output(self.policy.hidden(p.tokens, p.lengths)[p.action])
                values = self.values(p) if self.uses_values else torch.zeros(len(p.target))
            old, _, kl = logprob_entropy_kl(self.scaled(logits), p.target, ref_logits)
            ref = logprob_entropy_kl(ref_logits, p.target)[0]
            kl = kl if kind == "full" else kl_estimate(old, ref, kind)
            for k, x in zip(found, (old, ref, hidden, kl, values.to(self.device))):
                found[k].append(x)
        found = {k: torch.cat(v) for k, v in found.items()}
        self.check("the rollout's log-probability", found["old"] - sampled)
        if not self.half:  # otherwise the rollout's order of summation is off by a policy step
            found["old"] = sampled
        if self.iteration == 0:
            signed = found["kl"] if kind == "full" else found["old"] - found["ref"]
            kl, n = all_sum(signed, torch.tensor(len(counts)))
            self.check("a KL of 0 to the reference", found["kl"], kl / n)
        return found

    def allowed(self, n):
        """How many of n tokens may be far off: a share, and one, for a small n."""
        return 1 + self.rare * n if self.rare else 0

    def check(self, what, off, kl=0.0):
        """Refuses a policy whose log-probabilities are `off` (A,) from what they should be, over the
        tokens of all ranks: if |off| is above token_limit for more tokens than `allowed`, or if the
        mean of |off|, that of off or that of a rollout's `kl` is above its limit. Errors of rounding
        cancel in the last two; the bias of a truncated distribution does not."""
        far = off.abs() > self.token_limit
        n, total, signed, far = all_sum(torch.tensor(len(off)), off.abs(), off, far)
        n = max(n, 1)
        near = total <= self.mean_limit * n and abs(signed) <= self.bias_limit * n
        if not (near and far <= self.allowed(n) and abs(kl) <= self.kl_limit):
            raise Mismatch(
                f"before the first update the policy is {max(total / n, abs(kl)):.3g} from {what}, and "
                f"{far / n:.2%} of the tokens are off by more than {self.token_limit:.2g}: sampling, "
                "training and reference do not agree on model, mask or temperature"
            )

    # ---- one iteration

    def step(self, queries, responses, old_logprobs, scores, ended):
        """Learns from a batch of rollouts of this rank; see `rollout`. scores: one a rollout, or a
        list a rollout with a number for each of its tokens. Returns the iteration's statistics;
        raises FloatingPointError or Mismatch where going on would be silently wrong."""
        c, t0 = self.config, time.perf_counter()
        for model in filter(None, (self.policy, self.critic, self.reference)):
            model.eval()  # no dropout: the ratio must be 1 before the first step
        counts = torch.tensor([len(r) for r in responses])
        sampled = torch.cat(old_logprobs).float()
        check_rollouts(queries, responses, ended, sampled, self.stop_ids)
        data = dict(queries=queries, responses=responses, counts=counts)
        data["target"] = torch.tensor([t for r in responses for t in r], device=self.device)
        data |= self.examine(data, sampled)
        t1 = time.perf_counter()
        rewards, raw = self.token_rewards(scores, counts, ended)
        if self.uses_values and self.iteration == 0:
            data["values"] += self.start_values(raw)
        beta = self.kl_ctl.value
        if self.kl_in_reward:
            rewards = rewards - beta * data["kl"]
        if c.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        t2 = time.perf_counter()
        data["advantages"], data["returns"] = self.advantages(rewards, data["values"], counts)
        t3 = time.perf_counter()
        stats = self.update(data)
        t4 = time.perf_counter()
        stats |= self.statistics(data, raw, ended, beta)
        self.kl_ctl.update(stats["ppo/kl_ref"], all_sum(torch.tensor(len(raw)))[0])
        self.iteration += 1
        return stats | {
            "time/ppo/forward_pass": t1 - t0,
            "time/ppo/compute_rewards": t2 - t1,
            "time/ppo/compute_advantages": t3 - t2,
            "time/ppo/optimize_step": t4 - t3,
            "time/ppo/calc_stats": time.perf_counter() - t4,
            "time/ppo/total": time.perf_counter() - t0,
        }

    def start_values(self, raw):
        """Lets a value head that is all zero start at the mean score; returns the change."""
        head = (self.critic or self.policy).value_head
        if any(bool(p.any()) for p in head.parameters()):
            return 0.0
        total, n = all_sum(raw, torch.tensor(len(raw)))
        torch.nn.init.constant_(head.bias, total / n)
        return total / n

    def token_rewards(self, scores, counts, ended):
        """Scores as a flat (A,) reward for each token, one score a rollout on its last token; and
        the plain score of each rollout (B,) before clipping, scaling and penalties."""
        c = self.config
        if any(isinstance(s, (list, tuple, torch.Tensor)) for s in scores):
            sizes = [len(s) for s in scores]
            flat = torch.cat([torch.as_tensor(s, dtype=torch.float32) for s in scores])
        else:
            sizes = [1] * len(scores)
            flat = torch.as_tensor(scores, dtype=torch.float32)
        if sizes not in ([1] * len(counts), counts.tolist()):
            raise RewardError(
                f"the reward gave {len(flat)} numbers for {len(counts)} responses of "
                f"{int(counts.sum())} tokens: it must be one a response or one a token"
            )
        if not torch.isfinite(flat).all():
            raise FloatingPointError("the reward gave a score that is not a finite number")
        if sizes != counts.tolist():
            scores, flat = flat.tolist(), place_scores(flat, counts)
            placed = [x for s, n in zip(scores, counts.tolist()) for x in [0.0] * (n - 1) + [s]]
            if flat.tolist() != placed:
                raise Mismatch(
                    "a score is not on the last token of its response, or not there alone"
                )
        raw = sum_by_rollout(flat, counts)
        if c.reward_scale:
            flat = flat / math.sqrt(max(mean_and_variance(raw)[1], 1e-12))
        if c.reward_clip:
            flat = flat.clamp(-c.reward_clip, c.reward_clip)
        cut = c.missing_eos_penalty * (~ended.cpu()).float()
        return (flat - place_scores(cut, counts)).to(self.device), raw

    def advantages(self, rewards, values, counts):
        """Advantages and the critic's targets, (A,) each, of rewards and values (A,)."""
        c = self.config
        if c.advantage == "gae":
            advantages, returns = gae(rewards, values, counts, c.gamma, c.lam)
            if c.lam_value != c.lam:
                returns = gae(rewards, values, counts, c.gamma, c.lam_value)[1]
        elif c.advantage == "reinforce":  # what is still to come, against the batch's mean
            advantages, returns = gae(rewards, torch.zeros_like(rewards), counts, c.gamma, 1.0)
        else:
            totals = sum_by_rollout(rewards, counts)
            each = group_advantages(totals, c.group_size, c.advantage)
            advantages, returns = over_tokens(each, counts), over_tokens(totals, counts)
        self.kl_scale = 1.0
        if c.whiten_advantages:
            # The KL in the loss and the advantages are two halves of one gradient: same scale.
            self.kl_scale = 1 / math.sqrt(mean_and_variance(advantages)[1] + 1e-8)
            advantages = whiten(advantages)
        return advantages, returns

    # ---- the update

    def update(self, data):
        """The PPO epochs. Minibatches are drawn from the rollouts of all ranks, and every rank
        works on those of its own, so that the steps do not depend on the number of processes."""
        c, counts = self.config, data["counts"]
        total = int(all_sum(torch.tensor(len(counts)))[0])
        per_step = c.mini_batch_size * c.gradient_accumulation_steps
        order = torch.Generator().manual_seed(1_000_003 * self.iteration + 7)
        local = {g: i for i, g in enumerate(self.mine(total))}
        warming = self.iteration == 0 and self.critic is not None and c.critic_warmup > 0
        sums, skipped, stopped = {}, 0, 0.0
        for epoch in range(c.critic_warmup if warming else c.ppo_epochs):
            perm = torch.randperm(total, generator=order).tolist()
            for first in range(0, total, per_step):
                rollouts = [local[g] for g in perm[first : first + per_step] if g in local]
                step, *tokens = self.gradients(data, rollouts, not warming)
                if not warming and epoch == first == 0:
                    self.check_ratio(*tokens)
                if step.get("ratio", 0) > c.ratio_threshold:
                    skipped += 1
                    self.zero_grad()
                    continue
                step["grad_norm"] = self.optimize(not warming)
                for k, v in step.items():
                    sums.setdefault(k, []).append(v)
            if c.early_stopping and step.get("approx_kl", 0) > 1.5 * c.target_kl:
                stopped = 1.0
                break
        stats = {NAMES[k]: sum(v) / len(v) for k, v in sums.items() if k in NAMES}
        ran = {"ppo/epochs": epoch + 1, "ppo/skipped_steps": skipped, "ppo/early_stop": stopped}
        return stats | ran

    def check_ratio(self, moved, clipped):
        """Before the first step the policy is the one that drew the rollouts. moved, clipped (A,): what
        the first minibatch finds of each token."""
        n, clipped = all_sum(torch.tensor(len(moved)), clipped)
        try:
            self.check("the rollout's log-probability", moved)
            if clipped > self.allowed(n):
                raise Mismatch(f"{clipped / n:.2%} of the tokens are clipped")
        except Mismatch as e:
            raise Mismatch(f"at the first minibatch the ratio is not 1: {e}") from None

    def gradients(self, data, rollouts, policy):
        """Adds up the gradients of one optimizer step on some rollouts of this rank, in as many
        forward passes as memory wants; `policy`: not of the critic alone. Returns statistics, and of
        each token of this rank how its log-probability has moved and whether it was clipped."""
        c, counts = self.config, data["counts"]
        n_tokens, n_rollouts = all_sum(counts[rollouts], torch.tensor(len(rollouts)))
        names = ["total"]
        names += ["policy", "entropy", "clipfrac", "ratio", "approx_kl", "ptx"] * policy
        names += ["value", "value_clipfrac", "vpred", "error"] * self.uses_values
        stats, moved, clipped = dict.fromkeys(names, 0.0), [torch.zeros(0)], [torch.zeros(0)]
        for i in range(0, len(rollouts), c.mini_batch_size):
            part = rollouts[i : i + c.mini_batch_size]
            token = torch.full((len(part),), 1 / n_tokens)
            each = token if c.loss_aggregation == "token" else 1 / (n_rollouts * counts[part])
            weight = over_tokens(each, counts[part]).to(self.device)
            loss, found = self.loss(data, part, weight, policy)
            loss.backward()
            if policy:
                moved.append(found.pop("moved"))
                clipped.append(found.pop("clipped"))
            for k, v in found.items():
                stats[k] = stats[k] + v.detach()
        for _ in range(c.gradient_accumulation_steps if policy and c.ptx_coef else 0):
            share, *text = self.ptx()
            if share:
                with self.update_context():
                    loss = share / c.gradient_accumulation_steps * self.policy(*text)
                (c.ptx_coef * loss).backward()
                stats["ptx"] += loss.item()
                stats["total"] += c.ptx_coef * loss.item()
        # On the device, where there is any: nothing waits for them.
        moved, clipped = (torch.cat(x[1:] or x) for x in (moved, clipped))
        return dict(zip(names, all_sum(*stats.values()))), moved, clipped

    def loss(self, data, part, weight, policy):
        """The loss of some rollouts (`part`). `weight` (A,) is that of each of their actions in the
        loss of the whole optimizer step, so that the sum over forward passes and processes does
        not depend on the split. Returns it and statistics, weighted too."""
        c, stats = self.config, {}
        p, span = self.packed(data, part)

        def mean(x):
            return (x.float() * weight).sum()

        hidden, total = None, torch.zeros((), device=self.device)
        if policy:
            with self.update_context():
                hidden = self.policy.hidden(p.tokens, p.lengths)[p.action]
                logits = self.scaled(self.policy.output(hidden))  # (A, V)
            ref_logits = self.ref_logits(data, span) if self.kl_in_loss else None
            logprobs, entropy, kl = logprob_entropy_kl(logits, p.target, ref_logits)
            old = data["old"][span]
            high = c.cliprange_high or c.cliprange
            losses, clipped = policy_loss(
                logprobs, old, data["advantages"][span], c.cliprange, high
            )
            total = mean(losses) - c.entropy_coef * mean(entropy)
            if self.kl_in_loss:
                if c.kl_penalty != "full":
                    kl = kl_estimate(logprobs, data["ref"][span], c.kl_penalty)
                total = total + self.kl_scale * self.kl_ctl.value * mean(kl)
            moved = (logprobs - old).detach()
            stats |= dict(policy=mean(losses), entropy=mean(entropy), clipfrac=mean(clipped))
            stats |= dict(ratio=mean(moved.exp()), approx_kl=mean(kl_estimate(-moved, 0, "k3")))
            stats |= dict(moved=moved, clipped=clipped)
        if self.uses_values:
            with self.update_context():
                values = self.policy.values(hidden) if self.critic is None else self.values(p)
            returns = data["returns"][span]
            losses, clipped = value_loss(values, data["values"][span], returns, c.cliprange_value)
            total = total + (c.vf_coef if self.critic is None else 1.0) * mean(losses)
            stats |= dict(value=mean(losses), value_clipfrac=mean(clipped), vpred=mean(values))
            stats["error"] = mean((values - returns).square())
        return total, stats | {"total": total}

    def ref_logits(self, data, span):
        """The reference's logits (A, V) of some actions, None where the penalty is no exact KL."""
        if self.config.kl_penalty != "full":
            return None
        with torch.no_grad(), self.context():
            return self.scaled(self.reference.output(data["ref_hidden"][span])).to(self.device)

    def optimize(self, policy):
        """One optimizer step of each model from the gradients summed over all ranks, each clipped
        by itself. Returns the policy's gradient norm."""
        pairs = [(self.policy, self.optimizer)] * policy
        pairs += [(self.critic, self.critic_optimizer)] * (self.critic is not None)
        norms = {}
        for model, optimizer in pairs:
            params = [p for p in model.parameters() if p.requires_grad]
            for p in params:  # a rank without rollouts in this step has none
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if dist.is_initialized():
                    dist.all_reduce(p.grad)
            limit = self.config.max_grad_norm or math.inf
            norms[model] = torch.nn.utils.clip_grad_norm_(params, limit)
            if not torch.isfinite(norms[model]):
                raise FloatingPointError("a gradient is not finite")
            optimizer.step()
        self.zero_grad()
        if self.average is not None and policy:
            with torch.no_grad():
                for k, v in self.policy.state_dict().items():
                    self.average[k].lerp_(v, 1 - self.config.averaging)
        return float(norms.get(self.policy, 0.0))

    def zero_grad(self):
        for optimizer in filter(None, (self.optimizer, self.critic_optimizer)):
            optimizer.zero_grad(set_to_none=True)

    # ---- what is logged

    def statistics(self, data, raw, ended, beta):
        """Means over the rollouts of all ranks, under the names that users of the original know."""
        counts = data["counts"].double()
        lengths = torch.tensor([float(len(q)) for q in data["queries"]]).double() + counts
        (reward, _), (done, _), (tokens, _) = map(mean_and_variance, (raw, ended, counts))
        length, length_variance = mean_and_variance(lengths)
        ref, _ = mean_and_variance(data["ref"])
        penalty = tokens * mean_and_variance(data["kl"])[0]
        kl = penalty
        if self.config.kl_penalty in ("abs", "mse"):  # biased: the plain estimate instead
            kl = tokens * mean_and_variance(data["old"] - data["ref"])[0]
        returns, returns_variance = mean_and_variance(data["returns"])
        value, value_variance = mean_and_variance(data["values"])
        residual = mean_and_variance(data["returns"] - data["values"])[1]
        return {
            "ppo/reward": reward,
            "ppo/kl_ref": kl,
            "ppo/kl_coef": beta,
            "ppo/objective": reward - beta * kl,
            "ppo/reward_all": reward - beta * penalty,
            "ppo/length/mean": length,
            "ppo/length/std": math.sqrt(length_variance),
            "ppo/ended": done,
            "ppo/truncated": 1 - done,
            "ppo/ref_loss": -ref,
            "ppo/policy/advantages_mean": mean_and_variance(data["advantages"])[0],
            "ppo/returns/mean": returns,
            "ppo/returns/var": returns_variance,
            "ppo/val/mean": value,
            "ppo/val/var": value_variance,
            "ppo/val/explained_variance": 1 - residual / max(returns_variance, 1e-12),
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    # ---- resuming

    def state_dict(self):
        """All that an iteration changes, but the policy itself."""
        critic = self.critic is not None
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict() if critic else None,
            "critic_optimizer": self.critic_optimizer.state_dict() if critic else None,
            "average": self.average,
            "kl_coef": self.kl_ctl.value,
            "iteration": self.iteration,
        }

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if self.average is not None and state["average"] is not None:
            self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        self.kl_ctl.value, self.iteration = state["kl_coef"], state["iteration"]


NAMES = {  # of the statistics of an optimizer step
    "policy": "ppo/loss/policy",
    "value": "ppo/loss/value",
    "total": "ppo/loss/total",
    "ptx": "ppo/loss/ptx",
    "entropy": "ppo/policy/entropy",
    "approx_kl": "ppo/policy/policykl",
    "clipfrac": "ppo/policy/clipfrac",
    "ratio": "ppo/policy/ratio",
    "grad_norm": "grad_norm",
    "vpred": "ppo/val/vpred",
    "error": "ppo/val/error",
    "value_clipfrac": "ppo/val/clipfrac",
}
