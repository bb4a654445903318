"""Proximal Policy Optimization (PPO) of a language model.

For a prompt x, the objective is J(π) = E[r(x, y)] − β KL(π ‖ π_ref): the expected reward r of a
response y sampled from the policy π, minus a penalty for the distance from the reference model
π_ref, the model that training starts from. Each token of a response is an action, the text before
it is the state, and the reward arrives with the last token. One iteration has five steps:

    1. rollout      sample responses from π_old, the policy before the update
    2. evaluate     log-probabilities of policy and reference, their KL, values V(state)
    3. rewards      r on the last token of a response, −β KL on every token
    4. advantages   A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t; returns R = A + V
    5. update       optimizer steps on minibatches of rollouts; the loss is the mean over actions of

        −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)  +  β KL(π ‖ π_ref)  −  c_H H(π)  +  c_V ½ (V − R)²

                    with the ratio ρ = π(action | state) / π_old(action | state) and the entropy H

The KL is exact, a sum over the vocabulary. Its gradient through the distribution of the current
token is in the loss, its effect on later tokens is in the rewards. (A KL that is estimated from the
sampled tokens is in the rewards alone.) With exact_end, no end is sampled: in each state, the end
and the sampled token count with their probabilities (score_ends). References: Schulman et al., 2016
(GAE); Schulman et al., 2017 (PPO); Ouyang et al., 2022 (PPO of language models, InstructGPT).

Letters in shapes: B rollouts, each a prompt and its response; A actions, which are the response
tokens of all B rollouts, one rollout after the other; N packed tokens; V vocabulary; D dim.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from common import Stopwatch, flag
from kernels import (
    TokenTerms,
    add_up_over_ranks,
    all_sum,
    full,
    in_chunks,
    is_sharded,
    mean_and_variance,
    switched_on,
    to_device,
)
from model import generate

# ----------------------------------------------------------------------------
# hyperparameters


@dataclass
class PPOConfig:
    """PPO: hyperparameters

    A field with `flag` is a flag of train.py, the others are not: three of them are set from
    --batch_size, --gradient_accumulation_steps and --grad_clip. Names follow the original
    implementation."""

    # the objective
    init_kl_coef: float = flag(0.2, "β, the weight of the KL penalty in J")
    kl_penalty: str = flag("full", "estimate of the KL: kl (k1), abs, mse (k2), k3; full: exact")
    kl_in: str = flag(
        "both",
        "where the KL penalty acts: reward (any estimate but full), loss (full or mse), or both "
        "(full in both; the other estimates in the reward alone)",
    )
    adap_kl_ctrl: bool = flag(False, "adapt β so that the KL per rollout stays near --target")
    target: float = flag(6.0, "KL that adap_kl_ctrl aims at, nats per rollout")
    horizon: float = flag(10000.0, "rollouts in which adap_kl_ctrl changes β by at most 1.22 times")
    # rollouts
    rollouts: int = flag(0, "rollouts per iteration; 0 means 8 × batch_size")
    max_gen_len: int = flag(300, "tokens per response, at most")
    temperature: float = flag(1.0, "temperature of the policy, in rollouts and in training")
    missing_eos_penalty: float = flag(0.0, "subtracted from the score of a response without an end")
    exact_end: bool = flag(False, "average over possible ends of a response; do not sample one")
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
    whiten_rewards: bool = flag(False, "divide the tokens' rewards by their standard deviation")
    whiten_advantages: bool = flag(True, "scale and shift advantages to variance 1 and mean 0")
    reward_clip: float = flag(0.0, "bound to which scores are clipped, ±reward_clip; 0: none")
    reward_scale: bool = flag(False, "divide scores by their standard deviation in the batch")
    # the update
    ppo_epochs: int = flag(1, "passes over the rollouts")
    mini_batch_size: int = 50  # rollouts per forward pass
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    cliprange: float = flag(0.2, "PPO clip range ε of the ratio")
    cliprange_high: float = flag(0.0, "upper clip range (clip-higher); 0 means cliprange")
    cliprange_value: float = 0.0  # largest change of a value per iteration; 0: no clipping
    loss_aggregation: str = flag("token", "unit with equal weight in the loss: token or sequence")
    entropy_coef: float = flag(0.0, "weight of the entropy bonus")
    max_grad_norm: float = 1.0  # of policy and critic separately
    early_stopping: bool = True  # end the epochs when the policy has moved 1.5 * target_kl
    target_kl: float = flag(0.1, "epochs end when the policy has moved 1.5 × this, nats per token")
    ratio_threshold: float = 10.0  # skip a step whose mean ratio is above it
    ptx_coef: float = flag(0.0, "weight of the loss on --ptx_data that is mixed in (PPO-ptx)")
    # the critic
    value_model: str = flag(
        "separate",
        "separate, shared (a value head on the policy, --vf_coef), or the checkpoint that a "
        "separate critic starts from",
    )
    vf_coef: float = flag(0.5, "weight of the value loss of a shared critic")
    critic_warmup: int = flag(0, "epochs of the first iteration, which train the critic alone")
    averaging: float = flag(
        0.0, "decay of the moving average of the policy's weights, which is saved; 0: no average"
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
        # The exact KL does not depend on the sampled token: in the reward it has no gradient.
        wrong = {"loss": ("kl", "abs", "k3"), "reward": ("full",), "both": ()}[self.kl_in]
        if self.kl_penalty in wrong:
            raise ValueError(
                f"kl_in={self.kl_in} with kl_penalty={self.kl_penalty} has another gradient than "
                "the KL: take kl_in=both, or another kl_penalty"
            )
        if self.critic_warmup and (self.advantage != "gae" or self.value_model == "shared"):
            raise ValueError("critic_warmup is for a critic of its own: advantage=gae, not shared")
        if self.whiten_rewards and self.kl_in != "reward":  # it scales the KL in the rewards
            raise ValueError("whiten_rewards needs kl_in=reward, with kl_penalty=kl for example")
        exact = (self.advantage, self.kl_penalty, self.kl_in) == ("gae", "full", "both")
        if self.exact_end and (not exact or self.reward_scale):
            raise ValueError("exact_end needs gae, kl_penalty=full, kl_in=both, no reward_scale")
        if self.advantage in ("rloo", "grpo") and self.group_size < 2:
            raise ValueError(f"advantage={self.advantage} needs group_size=2 or more")
        if self.adap_kl_ctrl and min(self.target, self.init_kl_coef) <= 0:
            raise ValueError("adap_kl_ctrl needs a target and an init_kl_coef above 0")
        for name in ("temperature", "target_kl"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        self.rollouts = self.rollouts or 8 * self.mini_batch_size
        if self.rollouts % self.group_size:
            raise ValueError(
                f"rollouts ({self.rollouts}) must be a multiple of group_size ({self.group_size})"
            )
        if self.adap_kl_ctrl and self.horizon < self.rollouts:  # β could become negative
            raise ValueError(f"horizon must be at least the {self.rollouts} rollouts per iteration")
        self.uses_values = self.advantage == "gae"
        self.exact_kl = self.kl_penalty == "full"
        # A KL estimate in the rewards has the whole gradient, the current token's part included.
        self.kl_in_rewards = self.kl_in != "loss"
        self.kl_in_loss = self.kl_in == "loss" or self.exact_kl


# ----------------------------------------------------------------------------
# numbers over all processes; numbers per rollout (B,) and per action (A,)


def whiten(x, weight=None):
    """x with mean 0 and variance 1, over all processes, and the factor that it was scaled by."""
    mean, variance = mean_and_variance(x, weight)
    scale = 1 / math.sqrt(variance + 1e-8)
    return (x - mean) * scale, scale


def expand(x, counts):
    """One number per rollout (B,) -> one per action (A,): [5, 7], counts [2, 1] -> [5, 5, 7]."""
    size = int(counts.sum())  # which a GPU would make Python wait for
    return x.repeat_interleave(to_device(counts, x.device), output_size=size)


def spans(starts, counts):
    """The indices start, start + 1, ... of spans of different lengths: [0, 7], [3, 2] ->
    [0, 1, 2, 7, 8]."""
    return torch.arange(int(counts.sum())) + expand(starts - counts.cumsum(0) + counts, counts)


def sum_per_rollout(x, counts):
    """One number per action (A,) -> their sum per rollout (B,)."""
    rollout = expand(torch.arange(len(counts), device=x.device), counts)
    return x.new_zeros(len(counts)).index_add(0, rollout, x)


def on_last_action(x, counts):
    """One number per rollout (B,) -> one per action (A,), which is 0 except for the last one."""
    out = x.new_zeros(int(counts.sum()))
    out[counts.cumsum(0) - 1] = x
    return out


# ----------------------------------------------------------------------------
# rollouts, and the minibatches that are made of them


@dataclass
class Rollouts:
    """B rollouts with A actions in total, and the tensors that later steps of an iteration add."""

    # step 1
    queries: list  # B lists of token ids: the prompts
    responses: list  # B lists of token ids, each with its end token if it has one
    ended: torch.Tensor  # (B,) bool: the response ended with an end token; if not, it is truncated
    old_logprobs: torch.Tensor  # (A,) log π_old(action | state)
    # step 2
    ref_logprobs: torch.Tensor = None  # (A,) log π_ref(action | state)
    ref_hidden: torch.Tensor = None  # (A, D) the reference's hidden states, which give its logits
    lower: torch.Tensor = None  # (N, D) output of the frozen layers that all models have in common
    kl: torch.Tensor = None  # (A,) KL penalty in nats
    end_logprobs: torch.Tensor = None  # (A, end tokens) log π_old(end | state), with exact_end
    values: torch.Tensor = None  # (A,) V(state) of the critic before the update; 0 without a critic
    graph: tuple = None  # PPOTrainer.forward's result for the first minibatch of the update
    # step 3
    scores: torch.Tensor = None  # (B,) the reward of each response before scaling and penalties
    rewards: torch.Tensor = None  # (A,) the reward of each action, KL penalty included
    survival: torch.Tensor = None  # (A,) the weight of the state: 1, or as score_ends explains
    ending: torch.Tensor = None  # (A,) the probability that this action is the last one
    truncated: torch.Tensor = None  # (B,) the probability that the response is truncated
    end_probability: torch.Tensor = None  # (A,) of an end in place of the action, with exact_end
    end_scores: torch.Tensor = None  # (A,) its reward
    # step 4
    advantages: torch.Tensor = None  # (A,)
    end_advantages: torch.Tensor = None  # (A,) of an end in place of the action, with exact_end
    returns: torch.Tensor = None  # (A,) targets of the critic
    kl_weight: float = 0.0  # weight of the KL in the loss

    def __post_init__(self):
        self.counts = torch.tensor([len(r) for r in self.responses])  # (B,) actions per rollout
        self.actions = torch.tensor([token for r in self.responses for token in r])  # (A,) ids
        self.survival, self.truncated = torch.ones(len(self.actions)), 1 - self.ended.cpu().float()

    def minibatch(self, which):
        """The rollouts with the indices `which`, as a Minibatch."""
        queries, responses = ([x[i] for i in which] for x in (self.queries, self.responses))
        batch, (span, packed) = pack(queries, responses, "cpu"), self.places(which)
        check_actions(batch, self.actions[span])
        for name in "tokens state_ends actions".split():
            setattr(batch, name, to_device(getattr(batch, name), self.old_logprobs.device))
        names = "old_logprobs ref_logprobs ref_hidden values advantages returns survival "
        for name in (names + "end_logprobs end_probability end_advantages").split():
            x = getattr(self, name)
            setattr(batch, name, None if x is None else x[to_device(span, x.device)])
        if self.lower is not None:
            batch.lower = self.lower[to_device(packed, self.lower.device)]
        return batch

    def places(self, which):
        """The indices in A and in N of the rollouts with the indices `which`."""
        sizes = self.counts + torch.tensor([len(q) - 1 for q in self.queries])  # (B,) packed tokens
        return [spans((n.cumsum(0) - n)[which], n[which]) for n in (self.counts, sizes)]

    def collect(self, results, which, found):
        """Puts tensors of the rollouts `which`, (A, ...) or `lower` (N, D), into those of all."""
        places = self.places(which)
        for name, x in ((k, x) for k, x in found.items() if x is not None):
            i = int(name == "lower")
            if name not in results:
                results[name] = x.new_empty(len(self.places(slice(None))[i]), *x.shape[1:])
            results[name][to_device(places[i], x.device)] = x.detach()


@dataclass
class Minibatch:
    """B rollouts packed for one forward pass: prompts and responses one after the other without
    padding, each response without its last token, which predicts nothing."""

    tokens: torch.Tensor  # (N,) token ids
    state_ends: torch.Tensor  # (A,) index in N of the last token of each state
    actions: torch.Tensor  # (A,) token ids, which the states are to predict
    lengths: list  # B numbers that sum to N: tokens per rollout
    counts: torch.Tensor  # (B,) actions per rollout
    lower: torch.Tensor = None  # (N, D) from here on as in Rollouts
    old_logprobs: torch.Tensor = None  # (A,)
    ref_logprobs: torch.Tensor = None  # (A,)
    ref_hidden: torch.Tensor = None  # (A, D)
    values: torch.Tensor = None  # (A,)
    advantages: torch.Tensor = None  # (A,)
    returns: torch.Tensor = None  # (A,)
    survival: torch.Tensor = None  # (A,)
    end_logprobs: torch.Tensor = None  # (A, end tokens)
    end_probability: torch.Tensor = None  # (A,)
    end_advantages: torch.Tensor = None  # (A,)


def pack(queries, responses, device):
    """B prompts and B responses, lists of token ids, as a Minibatch."""
    text = torch.tensor([token for pair in zip(queries, responses) for x in pair for token in x])
    counts, asked = (torch.tensor([len(x) for x in xs]) for xs in (responses, queries))
    ends = (counts + asked).cumsum(0)
    at = spans(ends - counts, counts)  # (A,) index of the actions in the text
    inputs = torch.ones(len(text), dtype=torch.bool).index_fill(0, ends - 1, False)
    state_ends = at - 1 - expand(torch.arange(len(counts)), counts)  # without these last tokens
    tensors = (to_device(x, device) for x in (text[inputs], state_ends, text[at]))
    lengths = (counts + asked - 1).tolist()
    return Minibatch(*tensors, lengths, counts)


def lower_layers(model, batch, n):
    """The output (N, D) of the first n layers of a model, without dropout."""
    layout, x = model.layout(batch.tokens, batch.lengths), model.tok_embeddings(batch.tokens)
    for layer in model.layers[:n]:
        x = layer(x, layout)
    return x


# ----------------------------------------------------------------------------
# equations of steps 2, 4 and 5


def logprob_entropy_kl(logits, actions, ref_logits=None):
    """log π(action), the entropy of π, and KL(π ‖ ref), (A,) each in fp32, of the distributions
    π = softmax(logits) and ref = softmax(ref_logits), (A, V) both. The log-probability of an action
    −1 is 0, and the KL without ref_logits. The fast twin is kernels.TokenTerms, or this function
    through torch.compile. With a large vocabulary it is called in kernels.in_chunks."""
    if not torch.compiler.is_compiling() and switched_on():
        return TokenTerms.apply(logits, actions, ref_logits)
    logp = logits.float().log_softmax(-1)
    ref_logp = logp if ref_logits is None else ref_logits.float().log_softmax(-1)
    logprobs = logp.gather(1, actions.clamp(min=0)[:, None])[:, 0] * (actions >= 0)
    entropy = -(logp.exp() * logp).sum(-1)
    return logprobs, entropy, (logp.exp() * (logp - ref_logp)).sum(-1)


@functools.cache
def compiled_terms():
    return torch.compile(logprob_entropy_kl, dynamic=True)


def terms_of(model):
    """logprob_entropy_kl, compiled if the forward pass of the model is."""
    return compiled_terms() if getattr(model, "compiled_hidden", False) else logprob_entropy_kl


def gae(rewards, values, counts, gamma, lam):
    """Generalized advantage estimation (Schulman et al., 2016, equation 16) of episodes that end
    with their last action: A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t.
    rewards, values (A,), counts (B,) -> advantages (A,), returns (A,) = advantages + values.
    gamma is a number, or one per action (A,)."""
    B, T = len(counts), int(counts.max())
    inside = torch.arange(T + 1) < counts.cpu()[:, None]
    r, v, g, adv = torch.zeros(4, B, T + 1)  # on the CPU: T tiny steps, on any device of the model
    r[inside], v[inside], g[inside] = rewards.cpu(), values.cpu(), torch.as_tensor(gamma).cpu()
    for t in reversed(range(T)):
        delta = r[:, t] + g[:, t] * v[:, t + 1] - v[:, t]
        adv[:, t] = (delta + g[:, t] * lam * adv[:, t + 1]) * inside[:, t]
    adv = adv[inside].to(values.device)
    return adv, adv + values


def policy_loss(logprobs, old_logprobs, advantages, low, high):
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) of each action (A,), and where clipping removed its
    gradient, (A,) bool."""
    ratio = (logprobs - old_logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values, old_values, returns, clip):
    """½ (V − R)² of each action (A,), and where clipping changed it, (A,) bool. If clip is not 0,
    V is kept within `clip` of its old value where that makes the loss larger (OpenAI's code)."""
    unclipped = (values - returns).square()
    if not clip:
        return 0.5 * unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (bounded - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


# ----------------------------------------------------------------------------
# the five steps


@dataclass(eq=False)
class PPOTrainer:
    """PPO iterations: `rollout` is step 1, `step` is steps 2 to 5."""

    config: PPOConfig
    policy: nn.Module  # a Transformer; with value_model "shared", a TransformerWithValueHead
    reference: nn.Module  # a frozen Transformer, which may be on a device of its own
    critic: nn.Module  # a TransformerWithValueHead of its own; None if shared, or without a critic
    optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer  # None if critic is None
    autocast: Callable  # () -> the context of a forward pass
    # () -> this rank's part of a batch of text: its weight in the mean over the batch (0: nothing
    # follows), tokens, targets, and lengths where samples are packed
    ptx: Callable = None
    stop_ids: tuple = field(kw_only=True)  # tokens that end a response
    # number of lower layers that are equal in all models and frozen: their output is computed once
    common_layers: int = field(default=0, kw_only=True)

    def __post_init__(self):
        c = self.config
        if c.ptx_coef and self.ptx is None:
            raise ValueError("ptx_coef needs text: a callable as ptx")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if c.rollouts // c.group_size < self.world:
            raise ValueError(
                f"{self.world} processes need at least {self.world * c.group_size} rollouts per "
                f"iteration, a group of {c.group_size} for each, not {c.rollouts}"
            )
        weight = self.policy.output.weight
        self.device, self.sharded = weight.device, is_sharded(weight)
        self.checks = Checks(self.device.type, self.autocast, c.temperature)
        # In float16 the gradients of such small losses vanish, so the update is in float32.
        self.update_autocast = nullcontext if self.checks.float16 else self.autocast
        # Shards have parts of the layers, and in float16 the update is in another precision.
        if self.sharded or self.checks.float16:
            self.common_layers = 0
        # The state that an iteration changes, besides the models and optimizers:
        self.iteration = 0
        horizon = c.horizon if c.adap_kl_ctrl else math.inf
        self.kl_controller = KLController(c.init_kl_coef, c.target, horizon)
        self.average = None  # of the policy's weights
        if c.averaging:
            self.average = {k: v.detach().clone() for k, v in self.policy.state_dict().items()}

    # ---- step 1

    def rollout(self, prompts, seed):
        """Samples a response to each of this rank's share of `prompts`, lists of token ids. Random
        numbers are those of the whole batch, so that the number of processes does not matter."""
        c, which = self.config, self.rollouts_of_rank(len(prompts))
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), c.max_gen_len, generator=generator)[which]
        queries = [prompts[i] for i in which]
        options = dict(stop_ids=self.stop_ids, uniform=uniform, max_batch=512)
        options["survival_limit"] = SURVIVAL_LIMIT if c.exact_end else 0.0
        with self.autocast():
            out = generate(self.policy, queries, c.max_gen_len, c.temperature, **options)
        logprobs = torch.cat([row[:n] for row, n in zip(out.logprobs, out.lengths.tolist())])
        return Rollouts(queries, out.responses(), out.ended, logprobs.float())

    def step(self, rollouts, scores):
        """Steps 2 to 5 with this rank's rollouts. scores: one number per response, or one list per
        response with a number per token; with exact_end the reward function itself. Returns
        statistics over all ranks; raises Mismatch or FloatingPointError where to continue would be
        silently wrong."""
        watch, beta = Stopwatch("time/ppo/total"), self.kl_controller.value
        for model in filter(None, (self.policy, self.critic, self.reference)):
            model.eval()  # no dropout: the ratio must be 1 before the first optimizer step
        check_rollouts(rollouts, self.stop_ids)
        self.evaluate(rollouts)
        watch.lap("time/ppo/forward_pass")
        self.compute_rewards(rollouts, scores, beta)
        watch.lap("time/ppo/compute_rewards")
        self.compute_advantages(rollouts, beta)
        watch.lap("time/ppo/compute_advantages")
        stats = self.update(rollouts)
        watch.lap("time/ppo/optimize_step")
        stats |= rollout_statistics(rollouts, beta, self.config.kl_penalty)
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        n_rollouts = all_sum(torch.tensor(len(rollouts.queries)))[0]
        self.kl_controller.update(stats["ppo/kl_ref"], n_rollouts)
        self.iteration += 1
        watch.lap("time/ppo/calc_stats")
        return stats | watch.seconds

    # ---- step 2

    def evaluate(self, rollouts):
        """Sets ref_logprobs, ref_hidden, kl and values; checks old_logprobs. One forward pass is
        also the first one of the update, with the same weights: its graph is kept."""
        c, (step, *later), results = self.config, next(self.epochs(rollouts)), {}
        # A rank may have no part in the first step. The first iteration changes the critic's bias.
        keep_graph = bool(step and self.iteration) and not (self.sharded or self.checks.float16)
        first, *passes = self.passes(step) if keep_graph else [None]
        passes += self.passes(sum(later, [] if keep_graph else step))
        for which in passes + [first] * keep_graph:  # no other pass runs while it holds memory
            batch, keep = rollouts.minibatch(which or [0]), which is first
            with self.autocast(), torch.set_grad_enabled(keep):
                if self.common_layers:
                    batch.lower = lower_layers(self.policy, batch, self.common_layers)
                ref_hidden = self.hidden(self.reference, batch)
                hidden = self.hidden(self.policy, batch)
                values = self.values(batch, hidden)
                *terms, ref_logprobs = in_chunks(
                    self.compare, self.policy.args.vocab_size, hidden, batch.actions, ref_hidden
                )
            rollouts.graph = (*terms, values) if keep else None
            logprobs, _, kl, *ends = terms
            kl = kl if c.exact_kl else kl_estimate(logprobs, ref_logprobs, c.kl_penalty)
            found = dict(logprobs=logprobs, kl=kl, values=values, ref_logprobs=ref_logprobs)
            found |= dict(ref_hidden=ref_hidden, lower=batch.lower)
            found |= dict(end_logprobs=torch.stack(ends, 1) if ends else None)
            if which:
                rollouts.collect(results, which, found)
        logprobs = results.pop("logprobs")
        vars(rollouts).update(results)
        self.checks.sampled_by_policy(rollouts, logprobs)
        if self.checks.half:  # sampling rounds differently, by as much as an optimizer step changes
            rollouts.old_logprobs = logprobs
        if self.iteration == 0:
            self.checks.policy_is_reference(rollouts, c.exact_kl)

    def epochs(self, rollouts):
        """For each epoch, without an end, this rank's rollouts, indices, of each optimizer step. A
        step is drawn from those of all ranks: the number of processes does not matter."""
        total = int(all_sum(torch.tensor(len(rollouts.queries)))[0])
        per_step = self.config.mini_batch_size * self.config.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(1_000_003 * self.iteration + 7)
        local = {rollout: i for i, rollout in enumerate(self.rollouts_of_rank(total))}
        while True:
            steps = torch.randperm(total, generator=generator).split(per_step)
            yield [[local[i] for i in step.tolist() if i in local] for step in steps]

    def passes(self, which):
        """The rollouts `which`, indices, of each forward pass. With sharded models all ranks need
        the same number of passes: a pass of a rank without rollouts left is []."""
        size = self.config.mini_batch_size
        n = -(-len(which) // size)
        if self.sharded:
            most = torch.tensor(n, device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            n = int(most)
        return [list(which[i * size : (i + 1) * size]) for i in range(n)]

    def hidden(self, model, batch):
        """Hidden states (A, D) at the ends of the states, from which the actions are predicted."""
        device = model.output.weight.device  # of the reference it may be another one
        lower = (self.common_layers, batch.lower) if self.common_layers else None
        hidden = model.hidden(batch.tokens.to(device), batch.lengths, lower=lower)
        return hidden[batch.state_ends.to(device)]

    def logits(self, model, hidden):
        """Logits (A, V) from hidden states, on the policy's device, over the temperature."""
        logits, temperature = model.output(hidden), self.config.temperature
        logits = logits if temperature == 1 else logits.float() / temperature
        return logits.to(self.device)

    def compare(self, hidden, actions, ref_hidden):
        """logprob_entropy_kl and log π_ref (A,) of actions, from the hidden states of both."""
        logits, ref_logits = (
            self.logits(model, x)
            for model, x in ((self.policy, hidden), (self.reference, ref_hidden))
        )
        terms = self.policy_terms(logits, actions, ref_logits)
        return *terms, terms_of(self.policy)(ref_logits, actions)[0]

    def policy_terms(self, logits, actions, ref_logits):
        """logprob_entropy_kl, and with exact_end log π of each end token, (A,) each."""
        terms = terms_of(self.policy)(logits, actions, ref_logits)
        if not self.config.exact_end:
            return terms
        ends = to_device(torch.tensor(self.stop_ids), logits.device).expand(len(actions), -1)
        chosen, *ends = logits.gather(1, torch.cat([actions[:, None], ends], 1)).float().unbind(1)
        return *terms, *(terms[0] + end - chosen for end in ends)

    def values(self, batch, hidden):
        """V(state) (A,) of the critic; of a shared one from the policy's hidden states."""
        if not self.config.uses_values:
            return torch.zeros(len(batch.actions), device=self.device)
        if self.critic is None:
            return self.policy.values(hidden)
        return self.critic.values(self.hidden(self.critic, batch))

    # ---- step 3

    def compute_rewards(self, rollouts, scores, beta):
        """Sets scores and rewards."""
        c, counts = self.config, rollouts.counts
        if c.exact_end:
            rewards = score_ends(rollouts, scores, self.stop_ids, c)
        else:
            rewards = token_scores(scores, counts)  # (A,), on the last action unless one per token
            rollouts.scores = sum_per_rollout(rewards, counts)
            rewards = adjust_rewards(rewards, rollouts, c)
            rollouts.ending = on_last_action(torch.ones(len(counts)), counts)
        rewards = rewards.to(self.device)
        if c.kl_in_rewards:
            rewards = rewards - beta * rollouts.kl
        rollouts.rewards = rewards * whiten(rewards)[1] if c.whiten_rewards else rewards

    # ---- step 4

    def compute_advantages(self, rollouts, beta):
        """Sets advantages, returns and kl_weight."""
        c, rewards, counts = self.config, rollouts.rewards, rollouts.counts
        p, weight, kl_scale = rollouts.end_probability, rollouts.survival, 1.0
        if c.uses_values and self.iteration == 0:
            totals = sum_per_rollout(to_device(weight, self.device) * rewards, counts)
            rollouts.values += self.start_values_at(totals)
        if c.uses_values:
            gamma = c.gamma * (1 - p) if c.exact_end else c.gamma
            advantages, rollouts.returns = gae(rewards, rollouts.values, counts, gamma, c.lam)
            if c.lam_value != c.lam:
                rollouts.returns = gae(rewards, rollouts.values, counts, gamma, c.lam_value)[1]
        else:
            advantages, rollouts.returns = advantages_without_critic(rewards, counts, c)
        if c.exact_end:  # they are means over the end and the action, of which both are trained
            end = rollouts.end_scores.to(self.device) - beta * rollouts.kl - rollouts.values
            q = to_device(p, self.device)
            action = (advantages - q * end) / (1 - q).clamp(min=1e-6)
            advantages, weight = torch.cat([action, end]), torch.cat([weight * (1 - p), weight * p])
        if c.whiten_advantages:  # The KL in the loss must have the scale of the KL in the rewards.
            advantages, kl_scale = whiten(advantages, weight)
        halves = *advantages.split(len(rewards)), None  # the second one is None without exact_end
        rollouts.advantages, rollouts.end_advantages = halves[:2]
        rollouts.kl_weight = kl_scale * beta

    # ---- step 5

    def update(self, rollouts):
        """The PPO epochs."""
        c, epochs = self.config, self.epochs(rollouts)
        warmup = self.iteration == 0 and self.critic is not None and c.critic_warmup > 0
        history, skipped = [], 0
        for epoch in range(c.critic_warmup if warmup else c.ppo_epochs):
            for step, which in enumerate(next(epochs)):
                stats = self.backward(rollouts, which, train_policy=not warmup)
                if not warmup and epoch == step == 0:
                    self.checks.ratio_is_one(stats)
                if stats.get("ppo/policy/ratio", 0) > c.ratio_threshold:
                    skipped += 1
                    self.zero_grad()
                    continue
                stats["grad_norm"] = self.optimizer_step(train_policy=not warmup)
                history.append(stats)
            stopped = c.early_stopping and stats.get("ppo/policy/policykl", 0) > 1.5 * c.target_kl
            if stopped:
                break
        return update_statistics(history, epoch + 1, skipped, stopped)

    def backward(self, rollouts, which, train_policy):
        """Adds up the gradients of one optimizer step on the rollouts with the indices `which`, in
        forward passes of mini_batch_size rollouts. Returns statistics over all ranks."""
        c = self.config
        sizes = sum_per_rollout(rollouts.survival, rollouts.counts)  # (B,) actions, weighted
        n_actions, n_rollouts = all_sum(sizes[which], torch.tensor(len(which)))
        names = ["ppo/loss/total", *POLICY_STATISTICS * train_policy]
        sums = dict.fromkeys([*names, *VALUE_STATISTICS * c.uses_values], 0.0)
        for part in self.passes(which):
            batch = rollouts.minibatch(part or [0])
            weight = torch.full((len(batch.counts),), 1 / n_actions)
            if c.loss_aggregation == "sequence":
                weight = 1 / (n_rollouts * sizes[part or [0]])
            if not part:  # this rank takes part for the sake of the others alone
                weight = torch.zeros_like(weight)
            weight = to_device(expand(weight, batch.counts) * batch.survival, self.device)
            kl_weight, graph, rollouts.graph = rollouts.kl_weight, rollouts.graph, None
            loss, stats = self.loss(batch, weight, kl_weight, train_policy, graph)
            loss.backward()
            for name, x in stats.items():
                sums[name] = sums[name] + x.detach()
        if train_policy and c.ptx_coef:
            self.ptx_backward(sums)
        return dict(zip(sums, all_sum(*sums.values())))

    def forward(self, batch, train_policy):
        """logprob_entropy_kl of the policy, which are None if train_policy is False, and values,
        (A,) each, with their graph."""
        c, hidden, terms = self.config, None, (None, None, None)
        ref_hidden = batch.ref_hidden if c.kl_in_loss and c.exact_kl else None
        with self.update_autocast():
            if train_policy:
                hidden = self.hidden(self.policy, batch)  # (A, D)
                terms = in_chunks(
                    self.terms, self.policy.args.vocab_size, hidden, batch.actions, ref_hidden
                )
            return *terms, self.values(batch, hidden)

    def loss(self, batch, weight, kl_weight, train_policy, graph=None):
        """The loss of a minibatch, and statistics. weight (A,): of each action in the mean over the
        whole optimizer step, so that the sum over minibatches and ranks does not depend on the
        split. If train_policy is False, it is the critic's part alone. graph: the result of
        `forward` on this minibatch, if it is known."""
        c, loss, stats = self.config, 0.0, {}
        logprobs, entropy, kl, *ends, values = graph or self.forward(batch, train_policy)

        def mean(x):  # of numbers per action, or with exact_end per action and then per end
            x = x.float() if len(x) == len(weight) else torch.lerp(*x.float().chunk(2), p)
            return (x * weight).sum()

        if train_policy:
            clip = c.cliprange, c.cliprange_high or c.cliprange
            new, old, advantages = logprobs, batch.old_logprobs, batch.advantages
            if c.exact_end:
                p = to_device(batch.end_probability, self.device)
                new = torch.cat([new, torch.stack(ends, 1).logsumexp(1)])
                old = torch.cat([old, batch.end_logprobs.logsumexp(1)])
                advantages = torch.cat([advantages, batch.end_advantages])
            surrogate, clipped = policy_loss(new, old, advantages, *clip)
            loss = mean(surrogate) - c.entropy_coef * mean(entropy)
            if c.kl_in_loss:
                if not c.exact_kl:
                    kl = kl_estimate(logprobs, batch.ref_logprobs, c.kl_penalty)
                loss = loss + kl_weight * mean(kl)
            log_ratio = (new - old).detach()
            stats |= policy_statistics(mean, surrogate, entropy, clipped, log_ratio)
            stats |= self.checks.ratio_sums(log_ratio, clipped)
        if c.uses_values:
            squares, clipped = value_loss(values, batch.values, batch.returns, c.cliprange_value)
            loss = loss + (c.vf_coef if self.critic is None else 1.0) * mean(squares)
            stats |= value_statistics(mean, squares, clipped, values, batch.returns)
        return loss, stats | {"ppo/loss/total": loss}

    def rollouts_of_rank(self, total):
        """Indices of the rollouts, of `total`, that this rank has: every world-th group."""
        return [i for i in range(total) if i // self.config.group_size % self.world == self.rank]

    def terms(self, hidden, actions, ref_hidden):
        """logprob_entropy_kl of actions, from the hidden states of policy and reference (or None),
        of which the policy's have a gradient."""
        logits, ref_logits = self.logits(self.policy, hidden), None  # (A, V)
        if ref_hidden is not None:
            with torch.no_grad(), self.autocast():
                ref_logits = self.logits(self.reference, ref_hidden)
        return self.policy_terms(logits, actions, ref_logits)

    def ptx_backward(self, sums):
        """Adds the gradient of the pretraining loss (PPO-ptx, Ouyang et al., 2022), and its value
        to the sums of statistics."""
        c = self.config
        for _ in range(c.gradient_accumulation_steps):
            weight, *text = self.ptx()
            if weight:
                with self.update_autocast():
                    loss = weight / c.gradient_accumulation_steps * self.policy(*text)
                (c.ptx_coef * loss).backward()
                sums["ppo/loss/ptx"] += loss.detach()
                sums["ppo/loss/total"] += c.ptx_coef * loss.detach()

    def optimizer_step(self, train_policy):
        """Sums the gradients over all ranks, clips those of policy and critic separately, and takes
        an optimizer step. Returns the policy's gradient norm."""
        models = [(self.policy, self.optimizer)] * train_policy
        models += [(self.critic, self.critic_optimizer)] * (self.critic is not None)
        norms = {}
        for model, _ in models:
            params = [p for p in model.parameters() if p.requires_grad]
            for p in params:  # a rank without rollouts in this step has no gradients
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if self.sharded:
                    p.grad *= self.world  # the backward pass has averaged it
            if dist.is_initialized() and not self.sharded:
                add_up_over_ranks([p.grad for p in params])
            limit = self.config.max_grad_norm or math.inf
            norms[model] = full(torch.nn.utils.clip_grad_norm_(params, limit))
        # One transfer for both models, because each makes Python wait for a GPU.
        norms = dict(zip(norms, torch.stack([*norms.values()]).tolist()))
        if not all(map(math.isfinite, norms.values())):
            raise FloatingPointError("a gradient is not finite")
        for _, optimizer in models:
            optimizer.step()
        self.zero_grad()
        if self.average is not None and train_policy:
            frozen = {k for k, p in self.policy.named_parameters() if not p.requires_grad}
            with torch.no_grad():
                for k, v in self.policy.state_dict().items():
                    if k not in frozen:
                        self.average[k].lerp_(v, 1 - self.config.averaging)
        return norms.get(self.policy, 0.0)

    def zero_grad(self):
        for optimizer in filter(None, (self.optimizer, self.critic_optimizer)):
            optimizer.zero_grad(set_to_none=True)

    def start_values_at(self, totals):
        """If the value head is all 0, sets its bias to the mean of totals (B,); returns it."""
        model = self.critic or self.policy
        if self.sharded:
            model.reshard()
        if any(bool(full(p).any()) for p in model.value_head.parameters()):
            return 0.0
        mean = mean_and_variance(totals)[0]
        torch.nn.init.constant_(model.value_head.bias, mean)
        return mean

    # ---- resuming

    def state_dict(self):
        """All that an iteration changes, except the policy's weights."""
        critic = self.critic is not None
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict() if critic else None,
            "critic_optimizer": self.critic_optimizer.state_dict() if critic else None,
            "average": self.average,
            "kl_coef": self.kl_controller.value,
            "iteration": self.iteration,
        }

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if self.average is not None and state["average"] is not None:
            self.average = {k: v.to(self.average[k].device) for k, v in state["average"].items()}
        self.kl_controller.value, self.iteration = state["kl_coef"], state["iteration"]


# ----------------------------------------------------------------------------
# variants of the steps


def kl_estimate(logprobs, ref_logprobs, kind):
    """KL(π ‖ ref) per token, estimated from the log-probabilities (A,) of tokens sampled from π
    (Schulman, "Approximating KL divergence", 2020). kl (k1): unbiased. abs, mse (k2): biased, with
    a low variance. k3: unbiased and never negative."""
    log_ratio = logprobs - ref_logprobs
    if kind == "kl":
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind == "mse":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio  # k3


def adjust_rewards(rewards, rollouts, config):
    """Scores per token (A,), scaled, clipped, and with the penalty of truncated responses."""
    if config.reward_scale:
        variance = mean_and_variance(rollouts.scores)[1]  # equal scores stay as they are
        rewards = rewards / math.sqrt(variance if variance > 1e-12 else 1.0)
    if config.reward_clip:
        rewards = rewards.clamp(-config.reward_clip, config.reward_clip)
    truncated = (~rollouts.ended.cpu()).float()
    return rewards - on_last_action(config.missing_eos_penalty * truncated, rollouts.counts)


SURVIVAL_LIMIT = 0.02  # exact_end: a response stops below this probability of not having ended
RARE = 0.03  # exact_end: ends that are less likely than this / max_gen_len do not count


def score_ends(r, score, stop_ids, config):
    """With exact_end, the expected reward of each action (A,), the probability of an end times its
    score. `score`, the reward function, is called once, for all responses and all ends. Sets
    end_probability; survival, the probability that a response has not ended before an action, which
    is the weight of its state; scores, means over the ends; end_scores, truncated and ending."""
    p, likely = r.end_logprobs.cpu().exp().sum(1), r.end_logprobs.argmax(1).tolist()
    last, ended = r.counts.cumsum(0) - 1, r.ended.cpu()
    p[p < RARE / config.max_gen_len] = 0.0
    at = p.index_fill(0, last[ended], 0).nonzero()[:, 0].tolist()  # those are scored as they are
    places = [(i, n) for i, count in enumerate(r.counts.tolist()) for n in range(count)]
    queries = r.queries + [r.queries[places[a][0]] for a in at]
    responses = [r.responses[i][:n] + [stop_ids[likely[a]]] for a in at for i, n in [places[a]]]
    responses, certain = r.responses + responses, torch.ones(len(at), dtype=torch.bool)
    scores = score(queries, responses, torch.cat([ended, certain]))
    one_each = torch.ones(len(responses), dtype=torch.long)
    scores = token_scores(scores, one_each, " with exact_end")
    whole, ends = scores[: len(ended)], torch.zeros_like(p)
    ends[at], ends[last[ended]] = scores[len(ended) :], whole[ended]
    stay = (1 - p).clamp(min=1e-30).double().log()  # log probabilities
    before = stay.cumsum(0) - stay
    r.survival = (before - expand(before[last - r.counts + 1], r.counts)).exp().float()
    goes_on = (r.survival * (1 - p))[last]  # of no end before, or in place of, the last action
    r.end_probability, r.truncated = p, goes_on * ~ended
    r.ending = r.survival * p + on_last_action(goes_on, r.counts)
    r.scores = sum_per_rollout(r.survival * p * ends, r.counts) + goes_on * whole
    limit = config.reward_clip or math.inf
    r.end_scores = ends.clamp(-limit, limit)
    whole = whole.clamp(-limit, limit) - config.missing_eos_penalty * ~ended
    return p * r.end_scores + on_last_action((1 - p)[last] * whole, r.counts)


def advantages_without_critic(rewards, counts, config):
    """Advantages and returns (A,) of REINFORCE, RLOO and GRPO, from rewards (A,). Of REINFORCE they
    are the discounted rewards to come, whose mean is the baseline if advantages are whitened."""
    c = config
    if c.advantage == "reinforce":
        return gae(rewards, torch.zeros_like(rewards), counts, c.gamma, 1.0)
    totals = sum_per_rollout(rewards, counts)
    advantages = group_advantages(totals, c.group_size, c.advantage)
    return expand(advantages, counts), expand(totals, counts)


def group_advantages(rewards, group_size, kind):
    """Advantages (B,) from total rewards (B,) of rollouts of which each group_size neighbours have
    the same prompt. rloo: reward minus the mean of the others in the group (Ahmadian et al., 2024).
    grpo: reward minus the group's mean, over its standard deviation (Shao et al., 2024)."""
    groups = rewards.view(-1, group_size)
    if kind == "rloo":
        others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
        return (groups - others).flatten()
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


class KLController:
    """β that keeps the KL per rollout near a target (Ziegler et al., 2019, section 2.2). With an
    infinite horizon β is constant."""

    def __init__(self, value, target, horizon):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl, rollouts):
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * rollouts / self.horizon


# ----------------------------------------------------------------------------
# checks: an iteration raises an error instead of continuing with silently wrong results


class Mismatch(RuntimeError):
    """Policy, reference, rollouts or scores do not belong together."""


class RewardError(ValueError):
    """The user's reward function failed or returned something that is not a score. Like Mismatch it
    is raised before the iteration changes any weight."""


# Largest differences that rounding can explain between two computations of one log-probability: the
# share of the tokens beyond the limit per token; this limit; the limits of the mean absolute
# difference, of the mean difference, and of the mean KL per rollout, in nats. GPUs use TF32.
# For stories260K the mean absolute difference is 3e-6, 6e-4 and 0.013, and the largest of 60,000
# tokens is 3e-5, 0.01 and 0.32. In half precision nothing bounds the largest: the share is bounded.
LIMITS = {
    "float32": (0.0, 5e-3, 3e-4, 3e-4, 0.03),
    "tf32": (1e-3, 0.03, 5e-3, 1e-3, 0.15),
    "half": (1e-3, 0.3, 0.1, 0.02, 3.0),
}


class Checks:
    """Checks that log-probabilities agree within the LIMITS of the forward passes' precision."""

    def __init__(self, device_type, autocast, temperature):
        with autocast():
            self.half = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if self.half else torch.float32
        self.float16 = dtype is torch.float16
        exact = device_type == "cpu" or not torch.backends.cuda.matmul.allow_tf32
        precision = "half" if self.half else "float32" if exact else "tf32"
        self.far_share, *limits = LIMITS[precision]
        limits = [x / min(temperature, 1.0) for x in limits]  # the logits are over the temperature
        self.token_limit, self.mean_limit, self.bias_limit, self.kl_limit = limits

    def sampled_by_policy(self, rollouts, logprobs):
        """Checks that the policy to train is the one that sampled the rollouts."""
        sums = self.error_sums(logprobs - rollouts.old_logprobs)
        self.near_zero("log-probabilities of sampling and training differ", all_sum(*sums))

    def policy_is_reference(self, rollouts, exact_kl):
        """Checks that policy and reference agree before the first update: their KL is 0."""
        kl = rollouts.kl if exact_kl else rollouts.old_logprobs - rollouts.ref_logprobs
        n_rollouts = torch.tensor(len(rollouts.counts))
        kl, n_rollouts, *sums = all_sum(kl, n_rollouts, *self.error_sums(rollouts.kl))
        problem = "policy and reference differ before the first update"
        self.near_zero(problem, sums, kl / n_rollouts)

    def ratio_is_one(self, stats):
        """Checks that the ratio is 1 in the first minibatch, which precedes any update."""
        n, *sums, clipped = (stats[name] for name in RATIO_SUMS)
        problem = "the ratio of the first minibatch is not 1: "
        self.near_zero(problem + "log-probabilities differ", (n, *sums))
        if clipped > self.far_allowed(n):
            raise Mismatch(problem + f"{clipped / n:.2%} of the tokens are clipped")

    def ratio_sums(self, log_ratio, clipped):
        """The statistics of a minibatch that ratio_is_one needs."""
        return dict(zip(RATIO_SUMS, (*self.error_sums(log_ratio), clipped.sum())))

    def error_sums(self, error):
        """The sums over errors (A,) that near_zero needs; they add up over minibatches and ranks:
        number, absolute values, values, and number of errors above the limit per token."""
        far = error.abs() > self.token_limit
        return torch.tensor(len(error)), error.abs().sum(), error.sum(), far.sum()

    def far_allowed(self, n):
        """The number of n tokens that may be above the limit per token: a share of n, plus one."""
        return 1 + self.far_share * n if self.far_share else 0

    def near_zero(self, problem, sums, kl=0.0):
        """Raises Mismatch unless rounding explains the errors and the KL per rollout. In the mean
        of the errors and in the KL, rounding errors cancel, but not the bias of a truncated
        distribution."""
        n, total, signed, far = sums
        n = max(n, 1)
        near = total <= self.mean_limit * n and abs(signed) <= self.bias_limit * n
        if not (near and far <= self.far_allowed(n) and abs(kl) <= self.kl_limit):
            raise Mismatch(
                f"{problem} by {max(total / n, abs(kl)):.3g} nats on average, and at {far / n:.2%} "
                f"of the tokens by more than {self.token_limit:.2g}: sampling, training and "
                "reference do not agree on model, mask or temperature"
            )


def check_rollouts(r, stop_ids):
    """Raises Mismatch unless prompts, responses, ends and log-probabilities belong together."""
    sizes = len(r.queries), len(r.responses), len(r.ended)
    if len(set(sizes)) > 1:
        raise Mismatch("{} prompts, {} responses, {} end flags".format(*sizes))
    if r.old_logprobs.numel() != len(r.actions):
        raise Mismatch("rollouts must have one log-probability per response token")
    for response, ended in zip(r.responses, r.ended.tolist()):
        if not response:
            raise Mismatch("a response is empty: it must contain at least its end token")
        if ended != (response[-1] in stop_ids):
            raise Mismatch("a response that ended lacks its end token, or a truncated one has it")
    if not bool(torch.isfinite(r.old_logprobs).all()) or float(r.old_logprobs.max()) > 1e-4:
        raise Mismatch("a rollout's log-probability is not that of a token")


def check_actions(batch, actions):
    """Raises Mismatch unless a minibatch trains these tokens (A,), all response tokens."""
    if not torch.equal(batch.actions, actions):
        raise Mismatch("the mask is wrong: the trained tokens are not the response tokens")


def token_scores(scores, counts, other=" or one per token"):
    """Scores, one per response or one list per response with a number per token, as one number per
    action (A,); a response's score is on its last action. Raises RewardError or FloatingPointError
    where scores are anything else."""
    several = [isinstance(score, (list, tuple, torch.Tensor)) for score in scores]
    if any(several) and not all(several):
        raise RewardError("the reward returned numbers for some responses and lists for others")
    if any(several):
        sizes = [len(score) for score in scores]
        flat = torch.cat([torch.as_tensor(score, dtype=torch.float32) for score in scores])
    else:
        sizes = [1] * len(scores)
        flat = torch.as_tensor(scores, dtype=torch.float32)
    if sizes not in ([1] * len(counts), counts.tolist()):
        tokens = f" of {int(counts.sum())} tokens" if counts.max() > 1 else ""
        numbers = f"{len(flat)} numbers for {len(counts)} responses{tokens}"
        raise RewardError(f"the reward returned {numbers}: it must be one per response{other}")
    if not torch.isfinite(flat).all():
        raise FloatingPointError("the reward returned a score that is not a finite number")
    if sizes == counts.tolist():
        return flat
    rewards, expected = on_last_action(flat, counts), []
    for score, n in zip(flat.tolist(), counts.tolist()):
        expected += [0.0] * (n - 1) + [score]
    if rewards.tolist() != expected:
        raise Mismatch("a score is not on the last token of its response, or not there alone")
    return rewards


# ----------------------------------------------------------------------------
# statistics, by their names in the log, which are those of the original implementation

RATIO_SUMS = ("check/tokens", "check/absolute", "check/signed", "check/far", "check/clipped")
POLICY_STATISTICS = (
    "ppo/loss/policy",
    "ppo/policy/entropy",
    "ppo/policy/clipfrac",
    "ppo/policy/ratio",
    "ppo/policy/policykl",
    "ppo/loss/ptx",
    *RATIO_SUMS,
)
VALUE_STATISTICS = ("ppo/loss/value", "ppo/val/clipfrac", "ppo/val/vpred", "ppo/val/error")


def policy_statistics(mean, surrogate, entropy, clipped, log_ratio):
    """Of a minibatch, from numbers per action (A,) and their weighted mean, a function. log_ratio
    is log π − log π_old."""
    return {
        "ppo/loss/policy": mean(surrogate),
        "ppo/policy/entropy": mean(entropy),
        "ppo/policy/clipfrac": mean(clipped),
        "ppo/policy/ratio": mean(log_ratio.exp()),
        "ppo/policy/policykl": mean(kl_estimate(-log_ratio, 0, "k3")),
    }


def value_statistics(mean, squares, clipped, values, returns):
    return {
        "ppo/loss/value": mean(squares),
        "ppo/val/clipfrac": mean(clipped),
        "ppo/val/vpred": mean(values),
        "ppo/val/error": mean((values - returns).square()),
    }


def update_statistics(history, epochs, skipped, stopped):
    """Means over the optimizer steps of an iteration (`history`), and the number of epochs."""
    names = [name for name in (history[0] if history else ()) if name not in RATIO_SUMS]
    return {name: sum(stats[name] for stats in history) / len(history) for name in names} | {
        "ppo/epochs": epochs,
        "ppo/skipped_steps": skipped,
        "ppo/early_stop": float(stopped),
    }


def rollout_statistics(r, beta, kl_penalty):
    """Means over the rollouts of all ranks."""
    weight, counts = r.survival.double(), r.counts
    actions = sum_per_rollout(weight, counts)  # (B,) expected numbers
    asked = torch.tensor([float(len(query)) for query in r.queries]).double()
    lengths = expand(asked + counts - counts.cumsum(0), counts) + torch.arange(1, len(weight) + 1)
    length, length_variance = mean_and_variance(lengths, r.ending)
    reward, truncated, actions = (mean_and_variance(x)[0] for x in (r.scores, r.truncated, actions))
    penalty = kl = actions * mean_and_variance(r.kl, weight)[0]
    if kl_penalty in ("abs", "mse"):  # These are biased; the log has the unbiased estimate.
        kl = actions * mean_and_variance(r.old_logprobs - r.ref_logprobs)[0]
    returns, returns_variance = mean_and_variance(r.returns, weight)
    value, value_variance = mean_and_variance(r.values, weight)
    residual = mean_and_variance(r.returns - r.values, weight)[1]
    advantages, p = r.advantages.cpu(), r.end_probability
    advantages = advantages if p is None else advantages.lerp(r.end_advantages.cpu(), p)
    return {
        "ppo/reward": reward,
        "ppo/kl_ref": kl,
        "ppo/kl_coef": beta,
        "ppo/objective": reward - beta * kl,
        "ppo/reward_all": reward - beta * penalty,
        "ppo/length/mean": length,
        "ppo/length/std": math.sqrt(length_variance),
        "ppo/ended": 1 - truncated,
        "ppo/truncated": truncated,
        "ppo/ref_loss": -mean_and_variance(r.ref_logprobs, weight)[0],
        "ppo/policy/advantages_mean": mean_and_variance(advantages, weight)[0],
        "ppo/returns/mean": returns,
        "ppo/returns/var": returns_variance,
        "ppo/val/mean": value,
        "ppo/val/var": value_variance,
        "ppo/val/explained_variance": 1 - residual / max(returns_variance, 1e-12),
    }
