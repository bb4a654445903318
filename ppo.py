"""Proximal Policy Optimization of a language model, without padding and without guesses.

The objective for a prompt x and responses y is J(π) = E_π[r(x, y)] − β KL(π ‖ π_ref), in which r
scores a finished response and the KL keeps the policy near the model it started from. Generating a
response is an episode: each token is an action, the text so far is the state, and the score
arrives with the last token. PPO (Schulman et al., 2017) improves π by gradient steps on

    E[min(ratio · A, clip(ratio) · A)],   ratio = π(token | state) / π_old(token | state)

where π_old drew the tokens and A says how much better each was than the critic expected.

J has a roof that can be computed: π*(y|x) ∝ π_ref(y|x) exp(r/β) reaches J*(x) = β log E_ref[exp(r/β)].
`objective_roof` estimates it from samples of the reference. A run is as good as J is close to J*.

Everything per token is flat: the A actions (response tokens) of a batch of B rollouts, one
rollout after the other. Letters as in model.py: B rollouts, N packed tokens, V vocabulary.
"""

import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import BOS_ID, EOS_ID, generate

# ----------------------------------------------------------------------------
# configuration


@dataclass
class PPOConfig:
    """What PPO can be told; train.py makes a flag of each. Published names where there are any."""

    # the objective
    init_kl_coef: float = 0.2  # β
    kl_penalty: str = "full"  # kl (k1) | abs | mse (k2) | k3 | full (exact, over the vocabulary)
    kl_in: str = "both"  # reward | loss | both: where the penalty acts
    adap_kl_ctrl: bool = False  # steer β so that the KL of a rollout stays near `target`
    target: float = 6.0
    horizon: float = 10000.0  # rollouts over which β would change by a factor e at full error
    # rollouts
    rollouts: int = 0  # an iteration; 0: 8 * mini_batch_size
    max_gen_len: int = 300
    temperature: float = 1.0
    missing_eos_penalty: float = 0.0  # subtracted from the score of a response cut at max_gen_len
    # advantages
    advantage: str = "gae"  # gae | rloo | grpo | reinforce
    group_size: int = 1  # responses a prompt; rloo and grpo compare within the group
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    reward_clip: float = 0.0  # scores are clipped to ±this; 0: not
    reward_scale: bool = False  # divide scores by their standard deviation in the batch
    # the update
    ppo_epochs: int = 4
    mini_batch_size: int = 50  # rollouts a forward pass
    gradient_accumulation_steps: int = 1  # forward passes an optimizer step
    cliprange: float = 0.2
    cliprange_high: float = 0.0  # upper bound where it differs (clip-higher); 0: cliprange
    cliprange_value: float = 0.2  # 0: no clipping
    loss_aggregation: str = "token"  # token | sequence: what has equal weight
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    early_stopping: bool = True  # end the epochs when the policy has moved 1.5 * target_kl
    target_kl: float = 0.1
    ratio_threshold: float = 10.0  # skip a step whose mean ratio is above it
    ptx_coef: float = 0.0  # weight of the pretraining loss mixed in (PPO-ptx, InstructGPT)
    # the critic
    value_model: str = "separate"  # separate | shared | the path of a checkpoint
    vf_coef: float = 0.5
    value_epochs: int = 0  # critic-only epochs before the policy's, each iteration
    critic_warmup: int = 0  # first iterations that train the critic alone
    averaging: float = 0.0  # the result is an average of the policy's weights with this decay

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
        if self.advantage in ("rloo", "grpo") and self.group_size < 2:
            raise ValueError(f"advantage={self.advantage} compares responses: group_size must be >= 2")
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
    """−|target − tokens| / 100 over prompt plus response, end token included: the original's task."""

    def __init__(self, target_len=200):
        self.target_len = target_len

    def __call__(self, prompts, responses, ended):
        return [-abs(self.target_len - len(p) - len(r)) / 100 for p, r in zip(prompts, responses)]


def load_reward(spec, target_len, decode):
    """`length`, or FILE.py:FUNCTION, called as FUNCTION(prompts, responses) with lists of strings; a
    function with an attribute `tokens = True` gets lists of ids. It returns one number a response,
    or for each response a list of numbers, one a token of it. Raises ValueError, OSError."""
    if spec == "length":
        return LengthReward(target_len)
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--reward={spec}: expected `length` or FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward={spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location("reward", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward={spec}: {path} has no function {name}")

    def reward(prompts, responses, ended):
        if not getattr(function, "tokens", False):
            prompts, responses = ([decode(x) for x in xs] for xs in (prompts, responses))
        return function(prompts, responses)

    return reward


# ----------------------------------------------------------------------------
# the pieces, each a function of flat tensors


class AdaptiveKLController:
    """β that follows the KL of the rollouts (Ziegler et al., 2019, section 2.2)."""

    def __init__(self, value, target, horizon):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl, rollouts):
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * rollouts / self.horizon


class FixedKLController:
    def __init__(self, value):
        self.value = value

    def update(self, kl, rollouts):
        pass


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


def exact_kl(logp, ref_logp):
    """KL(π ‖ ref) of whole distributions: log-probabilities (A, V) -> (A,)."""
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def sum_by_rollout(x, counts):
    """Sums of a flat (A,) over each rollout: counts (B,) -> (B,)."""
    rollout = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts.to(x.device))
    return x.new_zeros(len(counts)).index_add(0, rollout, x)


def gae(rewards, values, counts, gamma, lam):
    """Generalized advantage estimation (Schulman et al., 2016, equation 16) for episodes that end
    with their last action: A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t.
    rewards, values flat (A,), counts (B,) -> advantages (A,), returns (A,) = advantages + values."""
    B, T = len(counts), int(counts.max())
    inside = torch.arange(T) < counts.cpu()[:, None]
    r, v = torch.zeros(2, B, T + 1)
    r[:, :T][inside], v[:, :T][inside] = rewards.cpu(), values.cpu()
    adv = torch.zeros(B, T + 1)  # the loop runs on the CPU: T tiny steps, no matter where the model is
    for t in reversed(range(T)):
        delta = r[:, t] + gamma * v[:, t + 1] - v[:, t]
        adv[:, t] = delta + gamma * lam * adv[:, t + 1]
        adv[:, t] *= inside[:, t]
    adv = adv[:, :T][inside].to(values.device)
    return adv, adv + values


def group_advantages(scores, group_size, kind):
    """One advantage a rollout (B,), from scores (B,) of groups of adjacent rollouts of one prompt.
    rloo: score minus the mean of the others (Ahmadian et al., 2024). grpo: standardised in the
    group (Shao et al., 2024)."""
    groups = scores.view(-1, group_size)
    if kind == "rloo":
        others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
        return (groups - others).flatten()
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def all_sum(*values):
    """Sums of tensors over all processes."""
    packed = torch.stack([torch.as_tensor(v, dtype=torch.float64).sum().cpu() for v in values])
    if dist.is_initialized():
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        packed = packed.to(where)
        dist.all_reduce(packed)
    return packed.tolist()


def whiten(x, shift_mean=True):
    """x with variance 1, and mean 0 unless told otherwise, over the batch of all processes."""
    n, s = all_sum(torch.tensor(x.numel()), x)
    mean = s / n
    var = all_sum((x.double() - mean).square())[0] / n
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
    """J* = mean over prompts of β log E_ref[exp(r/β)], and its standard error over prompts, from
    scores (prompts, samples) of reference samples. β = 0: the best sample of each prompt."""
    scores = scores.double()
    if beta == 0:
        per_prompt = scores.max(1).values
    else:
        per_prompt = beta * ((scores / beta).logsumexp(1) - math.log(scores.shape[1]))
    error = per_prompt.std() / math.sqrt(len(per_prompt)) if len(per_prompt) > 1 else torch.tensor(0.0)
    return per_prompt.mean().item(), error.item()


# ----------------------------------------------------------------------------
# the trainer


class Packed(NamedTuple):
    """Some rollouts as one packed input. tokens (N,) without each rollout's last token, lengths list;
    action (A,) positions in N whose *next* token is a response token, target (A,) those tokens."""

    tokens: torch.Tensor
    lengths: list
    action: torch.Tensor
    target: torch.Tensor


def pack(queries, responses, device):
    tokens, lengths, action, target = [], [], [], []
    for q, r in zip(queries, responses):
        first = len(tokens) + len(q) - 1  # this position predicts the first response token
        action.extend(range(first, first + len(r)))
        target.extend(r)
        tokens.extend(q)
        tokens.extend(r[:-1])
        lengths.append(len(q) + len(r) - 1)
    tokens, action, target = (
        torch.tensor(x, dtype=torch.long, device=device) for x in (tokens, action, target)
    )
    return Packed(tokens, lengths, action, target)


class PPOTrainer:
    """Runs PPO iterations: `rollout` draws responses, `step` learns from them.

    policy     a Transformer; with value_model "shared", a TransformerWithValueHead
    reference  a frozen Transformer
    critic     a TransformerWithValueHead of its own, or None (shared, or an estimator without critic)
    optimizer, critic_optimizer  the latter None where critic is None
    context    what to run forward passes in (autocast), a zero-argument callable
    ptx        a zero-argument callable giving (tokens, targets) of pretraining data, or None
    """

    def __init__(self, config, policy, reference, critic, optimizer, critic_optimizer, context, ptx=None):
        self.config, self.policy, self.reference, self.critic = config, policy, reference, critic
        self.optimizer, self.critic_optimizer = optimizer, critic_optimizer
        self.context, self.ptx = context, ptx
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.iteration = 0
        c = config
        self.kl_ctl = (
            AdaptiveKLController(c.init_kl_coef, c.target, c.horizon)
            if c.adap_kl_ctrl
            else FixedKLController(c.init_kl_coef)
        )
        self.uses_values = c.advantage == "gae"
        self.average = None
        if c.averaging:
            self.average = {k: v.detach().clone() for k, v in policy.state_dict().items()}

    @property
    def device(self):
        return self.policy.output.weight.device

    # ---- rollouts

    def rollout(self, prompts, seed, model=None):
        """One response for each of `prompts` (lists of ids), the same for any number of processes:
        the random numbers are those of the whole batch. This rank keeps every world-th group.
        Returns queries, responses, old_logprobs (list of (n,) tensors) and ended (B,)."""
        c = self.config
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), c.max_gen_len, generator=generator)
        mine = [i for i in range(len(prompts)) if i // c.group_size % self.world == self.rank]
        queries = [prompts[i] for i in mine]
        with self.context():
            out = generate(
                model or self.policy,
                queries,
                c.max_gen_len,
                temperature=c.temperature,
                uniform=uniform[mine],
                stop_ids=(BOS_ID, EOS_ID),
                max_batch=512,
            )
        logprobs = [lp[:n] for lp, n in zip(out.logprobs, out.lengths.tolist())]
        return queries, out.responses(), logprobs, out.ended

    @property
    def half(self):
        with self.context():
            return torch.is_autocast_enabled(self.device.type)

    @property
    def tolerance(self):
        """How far two ways to compute a log-probability may be apart."""
        return 0.3 if self.half else 5e-3

    # ---- forward passes over chunks of rollouts

    def chunks(self, queries, responses):
        size = self.config.mini_batch_size
        for i in range(0, len(queries), size):
            yield pack(queries[i : i + size], responses[i : i + size], self.device)

    def log_softmax(self, logits):
        return (logits.float() / self.config.temperature).log_softmax(-1)

    @torch.no_grad()
    def score(self, queries, responses):
        """What the frozen models say of the rollouts: the reference's final hidden states (A, D),
        from which its logits are one product away, and its log-probabilities (A,); old values (A,)."""
        hidden, ref_logprobs, values = [], [], []
        for p in self.chunks(queries, responses):
            with self.context():
                h = self.reference.hidden(p.tokens, p.lengths)[p.action]
                logp = self.log_softmax(self.reference.output(h))
                hidden.append(h)
                ref_logprobs.append(logp.gather(1, p.target[:, None]).squeeze(1))
                if self.uses_values:
                    values.append(self.value(p))
        empty = torch.zeros(sum(map(len, responses)), device=self.device)
        return torch.cat(hidden), torch.cat(ref_logprobs), torch.cat(values) if values else empty

    def value(self, p):
        model = self.critic or self.policy
        return model.values(model.hidden(p.tokens, p.lengths)[p.action])

    # ---- one iteration

    def step(self, queries, responses, old_logprobs, scores, ended):
        """Learns from a batch of rollouts of this rank; see `rollout`. scores: one a rollout, or one
        list a rollout with a number for each of its tokens. Returns the statistics of the iteration;
        raises FloatingPointError or RuntimeError where continuing would be silently wrong."""
        c, t0 = self.config, time.time()
        for model in filter(None, (self.policy, self.critic, self.reference)):
            model.eval()  # no dropout: the ratio must be 1 before the first step
        counts = torch.tensor([len(r) for r in responses])
        old = torch.cat(old_logprobs).float()
        check_rollouts(queries, responses, ended, old)
        if self.half:
            old = self.training_logprobs(queries, responses)
        ref_hidden, ref_logprobs, old_values = self.score(queries, responses)
        t1 = time.time()
        token_scores, raw = self.token_scores(scores, counts, ended)
        kl = self.penalty(queries, responses, old, ref_logprobs, ref_hidden)
        if self.iteration == 0 and float(kl.abs().max()) > self.tolerance:
            raise RuntimeError(
                f"before the first update the policy's KL to the reference is {float(kl.abs().max()):.3g} "
                "at some token: it must be 0"
            )
        beta = self.kl_ctl.value
        rewards = token_scores.clone()
        if c.kl_in != "loss":
            rewards = rewards - beta * kl
        if c.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        advantages, returns = self.advantages(rewards, old_values, counts)
        t2 = time.time()
        data = dict(
            queries=queries, responses=responses, counts=counts, old=old, values=old_values,
            advantages=advantages, returns=returns, ref_hidden=ref_hidden, ref=ref_logprobs,
        )  # fmt: skip
        stats = self.update(data)
        t3 = time.time()
        n, score_sum, penalty_sum, sampled = all_sum(torch.tensor(len(raw)), raw, kl, old - ref_logprobs)
        unbiased = c.kl_penalty in ("full", "kl", "k3")
        reward, kl_mean = score_sum / n, (penalty_sum if unbiased else sampled) / n
        self.kl_ctl.update(kl_mean, n)
        lengths = torch.tensor([len(q) + len(r) for q, r in zip(queries, responses)]).double()
        length_sum, square, done, cut = all_sum(lengths, lengths**2, ended, ~ended)
        stats |= {
            "ppo/reward": reward,
            "ppo/kl_ref": kl_mean,
            "ppo/kl_coef": beta,
            "ppo/objective": reward - beta * kl_mean,
            "ppo/reward_all": reward - beta * penalty_sum / n,
            "ppo/length/mean": length_sum / n,
            "ppo/length/std": math.sqrt(max(square / n - (length_sum / n) ** 2, 0)),
            "ppo/ended": done / n,
            "ppo/truncated": cut / n,
            "ppo/ref_loss": -all_sum(ref_logprobs)[0] / all_sum(counts)[0],
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            "time/ppo/forward_pass": t1 - t0,
            "time/ppo/compute_advantages": t2 - t1,
            "time/ppo/optimize_step": t3 - t2,
            "time/ppo/total": t3 - t0,
        }
        self.iteration += 1
        return stats

    def token_scores(self, scores, counts, ended):
        """Scores as a flat (A,) reward for each token, one score a rollout on its last token; and
        the plain score of each rollout (B,) before clipping, scaling and penalties."""
        per_token = any(isinstance(s, (list, tuple, torch.Tensor)) for s in scores)
        flat = torch.zeros(int(counts.sum()))
        last = counts.cumsum(0) - 1
        if per_token:
            for s, n in zip(scores, counts.tolist()):
                if len(s) != n:
                    raise ValueError(f"the reward gave {len(s)} numbers for a response of {n} tokens")
            flat = torch.cat([torch.as_tensor(s, dtype=torch.float32) for s in scores])
            raw = sum_by_rollout(flat, counts)
        else:
            raw = torch.as_tensor(scores, dtype=torch.float32)
            if raw.shape != counts.shape:
                raise ValueError(f"the reward gave {len(raw)} scores for {len(counts)} responses")
            flat[last] = raw
        if not torch.isfinite(flat).all():
            raise FloatingPointError("the reward gave a score that is not a finite number")
        c = self.config
        shaped = flat
        if c.reward_scale:
            n, s, sq = all_sum(torch.tensor(len(raw)), raw, raw.double() ** 2)
            shaped = shaped / math.sqrt(max(sq / n - (s / n) ** 2, 1e-12))
        if c.reward_clip:
            shaped = shaped.clamp(-c.reward_clip, c.reward_clip)
        penalty = torch.zeros_like(shaped)
        penalty[last] = c.missing_eos_penalty * (~ended.cpu()).float()
        return (shaped - penalty).to(self.device), raw

    @torch.no_grad()
    def training_logprobs(self, queries, responses):
        """Log-probabilities (A,) as the update computes them. In half precision a rollout's own, from
        another order of summation, would be off by more than a policy step."""
        out = []
        for p in self.chunks(queries, responses):
            with self.context():
                logp = self.log_softmax(self.policy(p.tokens, lengths=p.lengths)[p.action])
            out.append(logp.gather(1, p.target[:, None]).squeeze(1))
        return torch.cat(out)

    @torch.no_grad()
    def penalty(self, queries, responses, old, ref_logprobs, ref_hidden):
        """The KL penalty of each action (A,) under the policy that drew it."""
        kind = self.config.kl_penalty
        if kind != "full":
            return kl_estimate(old, ref_logprobs, kind)
        kl, at = [], 0
        for p in self.chunks(queries, responses):
            n = len(p.action)
            with self.context():
                logp = self.log_softmax(self.policy(p.tokens, lengths=p.lengths)[p.action])
                ref = self.log_softmax(self.reference.output(ref_hidden[at : at + n]))
            kl.append(exact_kl(logp, ref))
            at += n
        return torch.cat(kl)

    def advantages(self, rewards, values, counts):
        c = self.config
        if c.advantage == "gae":
            advantages, returns = gae(rewards, values, counts, c.gamma, c.lam)
        elif c.advantage == "reinforce":  # what is still to come, against the batch's mean
            advantages, returns = gae(rewards, torch.zeros_like(rewards), counts, c.gamma, 1.0)
        else:
            totals = sum_by_rollout(rewards, counts)
            each = group_advantages(totals, c.group_size, c.advantage)
            advantages = torch.repeat_interleave(each, counts.to(each.device))
            returns = torch.repeat_interleave(totals, counts.to(each.device))
        self.kl_scale = 1.0
        if c.whiten_advantages:
            # The KL in the loss and the advantages are two halves of one gradient: same scale.
            n, total, square = all_sum(torch.tensor(len(advantages)), advantages, advantages**2)
            self.kl_scale = 1 / math.sqrt(square / n - (total / n) ** 2 + 1e-8)
            advantages = whiten(advantages)
        return advantages, returns

    def update(self, data):
        """The PPO epochs. Minibatches are drawn from the rollouts of all ranks, and every rank works
        on those of its own, so that the steps do not depend on the number of processes."""
        c = self.config
        queries, counts = data["queries"], data["counts"]
        total = int(all_sum(torch.tensor(len(queries)))[0])
        per_step = c.mini_batch_size * c.gradient_accumulation_steps
        order = torch.Generator().manual_seed(1_000_003 * self.iteration + 7)
        mine = [i for i in range(total) if i // c.group_size % self.world == self.rank]
        local = {g: i for i, g in enumerate(mine)}
        starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).tolist()
        sums, steps, skipped, stopped = {}, 0, 0, False
        train_policy = self.iteration >= c.critic_warmup
        epochs = c.value_epochs + c.ppo_epochs if train_policy else c.ppo_epochs
        for epoch in range(epochs):
            policy_epoch = train_policy and epoch >= (c.value_epochs if self.uses_values else 0)
            perm = torch.randperm(total, generator=order).tolist()
            for first in range(0, total, per_step):
                rollouts = [local[g] for g in perm[first : first + per_step] if g in local]
                n_tokens, n_rollouts = all_sum(counts[rollouts], torch.tensor(len(rollouts)))
                step_stats = {}
                for i in range(0, len(rollouts), c.mini_batch_size):
                    part = rollouts[i : i + c.mini_batch_size]
                    span = torch.cat([torch.arange(starts[j], starts[j + 1]) for j in part])
                    loss = self.loss(data, part, span, n_tokens, n_rollouts, policy_epoch, step_stats)
                    loss.backward()
                names = ["ratio", "approx_kl", "max_log_ratio"]
                ratio, approx_kl, worst = all_sum(*(step_stats.get(k, torch.zeros(())) for k in names))
                if policy_epoch and not steps and worst > self.tolerance:
                    raise RuntimeError(
                        f"before the first step a token's log-probability differs by {worst:.3g} from that "
                        "of the rollout: sampling and training do not agree on the policy"
                    )
                if policy_epoch and ratio > c.ratio_threshold:
                    skipped += 1
                    self.zero_grad()
                    continue
                grad_norm = self.optimize(policy_epoch)
                steps += policy_epoch
                step_stats["grad_norm"] = torch.tensor(grad_norm / self.world)
                for k, v in step_stats.items():
                    sums.setdefault(k, []).append(float(v))
            if policy_epoch and c.early_stopping and approx_kl > 1.5 * c.target_kl:
                stopped = True
                break
        return self.summary(sums, data, epoch + 1, skipped, stopped)

    def loss(self, data, part, span, n_tokens, n_rollouts, policy_epoch, stats):
        """The loss of some rollouts (`part`, whose actions are `span`), a share of the loss of the
        whole optimizer step: dividing by that step's totals makes it independent of the split into
        forward passes and processes. Adds its statistics, shares too, to `stats`."""
        c, dev = self.config, self.device
        p = pack([data["queries"][i] for i in part], [data["responses"][i] for i in part], dev)
        span = span.to(dev)
        counts = data["counts"][part].to(dev)
        if c.loss_aggregation == "token":
            weight = torch.full((len(span),), 1 / n_tokens, device=dev)
        else:
            weight = torch.repeat_interleave(1 / (n_rollouts * counts), counts)

        def mean(x):
            return (x.float() * weight).sum()

        def record(**values):
            for k, v in values.items():
                stats[k] = stats.get(k, 0) + v.detach()

        total = torch.zeros((), device=dev)
        hidden = None
        with self.context():
            if policy_epoch or self.critic is None:
                hidden = self.policy.hidden(p.tokens, p.lengths)[p.action]
            if policy_epoch:
                logp = self.log_softmax(self.policy.output(hidden))  # (A, V)
        if policy_epoch:
            logprobs = logp.gather(1, p.target[:, None]).squeeze(1)
            old, adv = data["old"][span], data["advantages"][span]
            high = c.cliprange_high or c.cliprange
            losses, clipped = policy_loss(logprobs, old, adv, c.cliprange, high)
            entropy = -(logp.exp() * logp).sum(-1)
            total = total + mean(losses) - c.entropy_coef * mean(entropy)
            if c.kl_in != "reward":
                if c.kl_penalty == "full":
                    with torch.no_grad(), self.context():
                        ref = self.log_softmax(self.reference.output(data["ref_hidden"][span]))
                    kl = exact_kl(logp, ref)
                else:
                    kl = kl_estimate(logprobs, data["ref"][span], c.kl_penalty)
                total = total + self.kl_scale * self.kl_ctl.value * mean(kl)
            log_ratio = (logprobs - old).detach()
            record(
                policy=mean(losses), entropy=mean(entropy), clipfrac=mean(clipped),
                ratio=mean(log_ratio.exp()), approx_kl=mean(kl_estimate(-log_ratio, 0, "k3")),
                max_log_ratio=log_ratio.abs().max(),
            )  # fmt: skip
        if self.uses_values:
            with self.context():
                values = self.policy.values(hidden) if self.critic is None else self.value(p)
            returns = data["returns"][span]
            losses, clipped = value_loss(values, data["values"][span], returns, c.cliprange_value)
            total = total + (c.vf_coef if self.critic is None else 1.0) * mean(losses)
            record(
                value=mean(losses), value_clipfrac=mean(clipped), vpred=mean(values),
                error=mean((values - returns) ** 2),
            )  # fmt: skip
        if policy_epoch and c.ptx_coef and self.ptx is not None:
            tokens, targets = self.ptx()
            share = len(part) / n_rollouts
            with self.context():
                ptx = self.policy(tokens, targets)
            total = total + c.ptx_coef * share * ptx
            record(ptx=share * ptx)
        record(total=total)
        return total

    def optimize(self, policy_epoch):
        """One optimizer step of each model from the gradients summed over all ranks, each clipped by
        itself. Returns the policy's gradient norm."""
        norm = 0.0
        pairs = [(self.policy, self.optimizer)] if policy_epoch or self.critic is None else []
        if self.critic is not None:
            pairs.append((self.critic, self.critic_optimizer))
        for model, optimizer in pairs:
            params = [p for p in model.parameters() if p.requires_grad]
            for p in params:  # a rank without rollouts in this step has none
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if dist.is_initialized():
                flat = torch.cat([p.grad.flatten() for p in params])
                dist.all_reduce(flat)
                for p, g in zip(params, flat.split([p.numel() for p in params])):
                    p.grad.copy_(g.view_as(p))
            size = torch.nn.utils.clip_grad_norm_(params, self.config.max_grad_norm or math.inf)
            if not torch.isfinite(size):
                raise FloatingPointError("a gradient is not finite")
            norm = float(size) if model is self.policy else norm
            optimizer.step()
        self.zero_grad()
        if self.average is not None and policy_epoch:
            with torch.no_grad():
                for k, v in self.policy.state_dict().items():
                    self.average[k].lerp_(v, 1 - self.config.averaging)
        return norm

    def zero_grad(self):
        for optimizer in filter(None, (self.optimizer, self.critic_optimizer)):
            optimizer.zero_grad(set_to_none=True)

    def summary(self, sums, data, epochs, skipped, stopped):
        """Means over the optimizer steps, under the names that users of the original know."""
        names = {
            "policy": "ppo/loss/policy", "value": "ppo/loss/value", "total": "ppo/loss/total",
            "ptx": "ppo/loss/ptx", "entropy": "ppo/policy/entropy", "approx_kl": "ppo/policy/policykl",
            "clipfrac": "ppo/policy/clipfrac", "ratio": "ppo/policy/ratio", "grad_norm": "grad_norm",
            "vpred": "ppo/val/vpred", "error": "ppo/val/error", "value_clipfrac": "ppo/val/clipfrac",
        }  # fmt: skip
        stats = {}
        for k in sorted(sums.keys() & names.keys()):
            stats[names[k]] = all_sum(torch.tensor(sums[k]))[0] / len(sums[k])
        a, r, v = data["advantages"], data["returns"].double(), data["values"].double()
        n, sa, sr, sv, sr2, sv2, se, se2 = all_sum(
            torch.tensor(len(r)), a, r, v, r**2, v**2, r - v, (r - v) ** 2
        )
        variance = sr2 / n - (sr / n) ** 2
        stats |= {
            "ppo/policy/advantages_mean": sa / n,
            "ppo/returns/mean": sr / n,
            "ppo/returns/var": variance,
            "ppo/val/mean": sv / n,
            "ppo/val/var": sv2 / n - (sv / n) ** 2,
            "ppo/val/explained_variance": 1 - (se2 / n - (se / n) ** 2) / max(variance, 1e-12),
            "ppo/epochs": epochs,
            "ppo/skipped_steps": skipped,
            "ppo/early_stop": float(stopped),
        }
        return stats

    # ---- resuming

    def state_dict(self):
        """All that an iteration changes, but the policy itself."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict() if self.critic is not None else None,
            "critic_optimizer": self.critic_optimizer.state_dict() if self.critic is not None else None,
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


def check_rollouts(queries, responses, ended, logprobs):
    """What must hold of rollouts whatever the configuration; raises RuntimeError."""
    if not len(queries) == len(responses) == len(ended):
        raise RuntimeError(f"{len(queries)} prompts, {len(responses)} responses, {len(ended)} end flags")
    if logprobs.numel() != sum(map(len, responses)):
        raise RuntimeError("rollouts must have one log-probability for each response token")
    for r, done in zip(responses, ended.tolist()):
        if not r:
            raise RuntimeError("a response is empty: the end token must be part of it, to be trained")
        if done != (r[-1] in (BOS_ID, EOS_ID)):
            raise RuntimeError("a response that ended lacks its end token, or one that was cut has it")
    if not bool(torch.isfinite(logprobs).all()) or float(logprobs.max()) > 1e-4:
        raise RuntimeError("a rollout's log-probability is not that of a token")
