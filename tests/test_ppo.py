"""PPO against independent oracles: loops written from the papers, brute force over every sequence
of a tiny vocabulary, and a padded trainer that works one rollout at a time."""

import csv
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
import ppo
from experiments import endings, frontier
from kernels import accelerate
from model import ModelArgs, Transformer, TransformerWithValueHead
from ppo import Mismatch, PPOConfig, PPOTrainer, Rollouts
from preferences import kl_to_reference
from rlhf import LengthReward, best_achievable_objective, load_reward
from sft import add_lora, freeze_layers, frozen_layers_in_common
from tokenizer import BOS_ID, EOS_ID

END = (BOS_ID, EOS_ID)

ROOT = Path(__file__).resolve().parent.parent


def args(**kw):
    defaults = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=12, multiple_of=8)
    return ModelArgs(**{**defaults, "max_seq_len": 32, "tied": False, **kw})


def make_trainer(seed=0, lr=1e-2, a=None, optimizer=torch.optim.Adam, ptx=None, freeze=0, **config):
    """A trainer of a random model whose logits are far from uniform."""
    torch.manual_seed(seed)
    a = a or args()
    settings = dict(rollouts=16, mini_batch_size=4, max_gen_len=10, cliprange_value=0.0)
    config = PPOConfig(**{**settings, "critic_warmup": 0, **config})
    shared = config.value_model == "shared"
    policy = accelerate((TransformerWithValueHead if shared else Transformer)(a))
    with torch.no_grad():
        policy.output.weight.mul_(25)
    reference = accelerate(Transformer(a)).requires_grad_(False)
    reference.load_state_dict(policy.state_dict(), strict=False)
    critic = None
    if config.advantage == "gae" and not shared:
        critic = accelerate(TransformerWithValueHead(a))
        critic.load_state_dict(policy.state_dict(), strict=False)
    for model in filter(None, (policy, critic)):
        freeze_layers(model, freeze)
    return PPOTrainer(
        config,
        policy,
        reference,
        critic,
        optimizer(policy.parameters(), lr=lr),
        critic and optimizer(critic.parameters(), lr=lr),
        nullcontext,
        ptx,
        stop_ids=END,
        common_layers=frozen_layers_in_common(policy, reference, critic),
    )


def sample(trainer, prompts, seed):
    """Step 1, as lists: prompts, responses and log-probabilities (n,) of each; and ended (B,)."""
    r = trainer.rollout(prompts, seed)
    return r.queries, r.responses, list(r.old_logprobs.split(r.counts.tolist())), r.ended


def step(trainer, queries, responses, old_logprobs, scores, ended):
    """Steps 2 to 5, from lists."""
    return trainer.step(Rollouts(queries, responses, ended, torch.cat(old_logprobs)), scores)


def iterate(trainer, iterations=1, reward=None, prompt=(BOS_ID,)):
    reward = reward or LengthReward(6)
    c, stats = trainer.config, None
    for _ in range(iterations):
        prompts = [list(prompt)] * c.rollouts
        queries, responses, logprobs, ended = sample(trainer, prompts, trainer.iteration)
        scores = reward if c.exact_end else reward(queries, responses, ended)
        stats = step(trainer, queries, responses, logprobs, scores, ended)
    return stats


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def capture_gradient(trainer):
    """The policy's gradient at the first optimizer step, before clipping."""
    trainer.config.max_grad_norm = 0.0
    kept = []

    def keep(optimizer, args, kwargs):
        kept.append(torch.cat([p.grad.flatten().clone() for p in trainer.policy.parameters()]))

    trainer.optimizer.register_step_pre_hook(keep)
    return kept


# ----------------------------------------------------------------------------
# the pieces


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_equation_16(gamma, lam):
    counts = torch.tensor([3, 1, 5])
    rewards, values = torch.randn(9), torch.randn(9)
    advantages, returns = ppo.gae(rewards, values, counts, gamma, lam)
    expected, start = [], 0
    for n in counts.tolist():
        r, v = rewards[start : start + n].tolist(), values[start : start + n].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected.append(sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)))
        start += n
    torch.testing.assert_close(advantages, torch.tensor(expected))
    torch.testing.assert_close(returns, torch.tensor(expected) + values)


@pytest.mark.parametrize("times", [[1, 1, 1, 1], [2, 1, 3, 0]])
def test_whitening(times):
    """A number with weight n counts as often as n equal numbers."""
    x = [1.0, 2.0, 4.0, 9.0]
    every = [a for a, n in zip(x, times) for _ in range(n)]
    mean, std = statistics.mean(every), statistics.pstdev(every)
    white, scale = ppo.whiten(torch.tensor(x), torch.tensor(times).float())
    torch.testing.assert_close(white, torch.tensor([(a - mean) / std for a in x]))
    assert scale == pytest.approx(1 / std)
    for equal in (torch.full((4,), 3.0), torch.tensor([-2.0])):  # a variance of 0
        white, scale = ppo.whiten(equal)
        assert white.tolist() == [0.0] * len(equal) and math.isfinite(scale)


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "k3", "full"])
def test_kl_estimates_of_a_small_distribution(kind):
    """Expectations over all five tokens, so there is no sampling error: which estimates have the
    exact KL for their value, and which of their gradients, taken as losses, have its gradient."""
    theta = torch.randn(5, requires_grad=True)
    ref = torch.randn(5).log_softmax(0)
    p = theta.log_softmax(0)
    kl = sum(p[i].exp() * (p[i] - ref[i]) for i in range(5))
    gradient = torch.autograd.grad(kl, theta, retain_graph=True)[0]
    if kind == "full":
        value = kernels.TokenTerms.apply(theta[None], torch.tensor([0]), ref[None])[2]
        torch.testing.assert_close(value[0], kl)
        torch.testing.assert_close(torch.autograd.grad(value, theta)[0], gradient)
        return
    each = ppo.kl_estimate(p, ref, kind)
    log_ratio = (p - ref).tolist()
    by_hand = {
        "kl": log_ratio,
        "abs": [abs(x) for x in log_ratio],
        "mse": [x * x / 2 for x in log_ratio],
        "k3": [math.exp(-x) - 1 + x for x in log_ratio],
    }[kind]
    torch.testing.assert_close(each, torch.tensor(by_hand))
    expected_value = (p.exp() * each).sum()
    assert torch.isclose(expected_value, kl, atol=1e-6) == (kind in ("kl", "k3"))
    expected_gradient = torch.autograd.grad((p.exp().detach() * each).sum(), theta)[0]
    if kind == "mse":  # Tang and Munos, 2025: k2 is the one whose gradient is right
        torch.testing.assert_close(expected_gradient, gradient)
    elif kind == "kl":
        torch.testing.assert_close(expected_gradient, torch.zeros(5))
    else:
        assert not torch.allclose(expected_gradient, gradient, atol=1e-3)


def test_clipped_policy_loss():
    ratios, advantages = [0.5, 0.9, 1.0, 1.1, 1.25, 1.5], [1.0, -2.0]
    for ratio, a in itertools.product(ratios, advantages):
        logp = torch.tensor([math.log(ratio)], requires_grad=True)
        losses, clipped = ppo.policy_loss(logp, torch.zeros(1), torch.tensor([a]), 0.2, 0.3)
        bounded = min(max(ratio, 0.8), 1.3)
        assert losses.item() == pytest.approx(-min(ratio * a, bounded * a), rel=1e-5)
        gradient = torch.autograd.grad(losses.sum(), logp)[0].item()
        stopped = (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.8)
        assert clipped.item() == stopped
        assert gradient == pytest.approx(0 if stopped else -ratio * a, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_clipped_value_loss(clip):
    for v, old, target in itertools.product([-1.0, 0.1, 0.5], [0.0], [-0.4, 0.3, 1.0]):
        x = torch.tensor([v])
        losses, clipped = ppo.value_loss(x, torch.tensor([old]), torch.tensor([target]), clip)
        plain = (v - target) ** 2
        bounded = (min(max(v, old - clip), old + clip) - target) ** 2 if clip else plain
        assert losses.item() == pytest.approx(0.5 * max(plain, bounded), rel=1e-5)
        assert clipped.item() == (bounded > plain + 1e-7)


def test_group_advantages():
    scores = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    rloo = [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3 - 0]
    torch.testing.assert_close(ppo.group_advantages(scores, 3, "rloo"), torch.tensor(rloo))
    grpo = []
    for group in scores.view(2, 3).tolist():
        mean = sum(group) / 3
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / 2)
        grpo += [(x - mean) / std for x in group]
    found = ppo.group_advantages(scores, 3, "grpo")
    torch.testing.assert_close(found, torch.tensor(grpo), atol=1e-4, rtol=1e-4)


def test_adaptive_kl_controller():
    """Ziegler et al., 2019: the error is clipped to ±0.2, β moves by a share of n / horizon."""
    for kl, error in [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2)]:
        controller = ppo.KLController(0.2, target=6.0, horizon=10000.0)
        controller.update(kl, 400)
        assert controller.value == pytest.approx(0.2 * (1 + error * 400 / 10000))
        fixed = ppo.KLController(0.2, target=6.0, horizon=math.inf)
        fixed.update(kl, 400)
        assert fixed.value == 0.2


def test_rewards_of_length_and_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert LengthReward(5)([[1], [1, 4]], [[7, 2], [7, 8, 9, 1]], None) == [-0.02, -0.01]
    file = tmp_path / "mine.py"
    file.write_text(
        "def words(prompts, responses):\n    return [len(r.split()) for r in responses]\n"
        "def ids(prompts, responses):\n    return [[0.5] * len(r) for r in responses]\n"
        "ids.tokens = True\n"
    )
    annotated = tmp_path / "annotated.py"
    annotated.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Bonus:\n    size: float = 2.0\n"
        "def f(prompts, responses):\n    return [Bonus().size for _ in responses]\n"
    )
    assert load_reward(f"{annotated}:f", 0, str)([[1]], [[3, 4]], None) == [2.0]
    (tmp_path / "two.py").write_text("from annotated import f\n")  # from the folder of the file
    assert load_reward(f"{tmp_path}/two.py:f", 0, str)([[1]], [[3, 4]], None) == [2.0]
    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    assert load_reward(f"{file}:words", 0, decode)([[1]], [[3, 4]], None) == [2]
    assert load_reward(f"{file}:ids", 0, decode)([[1]], [[3, 4]], None) == [[0.5, 0.5]]
    for wrong in ("size", f"{file}:none", f"{tmp_path}/no.py:f"):
        with pytest.raises((ValueError, FileNotFoundError)):
            load_reward(wrong, 0, decode)


@pytest.mark.parametrize(
    "body, says",
    [
        ("return [1 / 0 for r in responses]", "line 2: ZeroDivisionError: division by zero"),
        ("pass", "returned None, not one number per response: a `return` is missing"),
        ("return [1.0]", "returned 1 scores for 2 responses"),
        ("return ['good', 'bad']", "returned 'good' as a score, not a finite number"),
        ("return [1.0, float('nan')]", "returned nan as a score, not a finite number"),
        ("return [[1.0, 2.0], [0.0, None]]", "returned None as a score, not a finite number"),
        ("return [1.0, 10**5000]", "returned a number beyond float32 as a score, not a finite"),
        ("return [1.0, 1e39]", "returned 1e+39 as a score, not a finite number"),
        ("return {0: 1.0, 1: 2.0}", "f returned dict, not a list with one number per response"),
        ("return 1.0", "f returned float, not a list with one number per response"),
        ("(", "SyntaxError: '(' was never closed"),
    ],
)
def test_mistakes_in_a_reward_are_one_line(tmp_path, body, says):
    file = tmp_path / "mine.py"
    file.write_text(f"def f(prompts, responses):\n    {body}\n")
    with pytest.raises(ValueError) as error:
        load_reward(f"{file}:f", 0, str)([[1], [1]], [[3, 4], [5]], None)
    assert str(error.value).startswith(f"--reward={file}:f") and says in str(error.value)


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_the_loop_over_rollouts(seed):
    """A minibatch of rollouts against a loop, token by token."""
    g = random.Random(seed)
    texts = [[g.randrange(3, 50) for _ in range(g.randint(1, 6))] for _ in range(18)]
    rollouts = ppo.Rollouts(texts[:9], texts[9:], torch.ones(9), torch.empty(0))
    rollouts.old_logprobs = torch.arange(float(len(rollouts.actions)))
    rollouts.ref_hidden = torch.randn(len(rollouts.actions), 3)
    which = g.sample(range(9), 5)
    tokens, state_ends, actions, lengths, numbers = [], [], [], [], []
    for i in which:
        query, response = texts[i], texts[9 + i]
        for t, token in enumerate([*query, *response]):
            if t >= len(query):
                state_ends.append(len(tokens) - 1)
                actions.append(token)
                numbers.append(sum(map(len, texts[9 : 9 + i])) + t - len(query))
            if t < len(query) + len(response) - 1:
                tokens.append(token)
        lengths.append(len(query) + len(response) - 1)
    batch = rollouts.minibatch(which)
    assert batch.tokens.tolist() == tokens and batch.state_ends.tolist() == state_ends
    assert batch.actions.tolist() == actions and batch.lengths == lengths
    assert batch.counts.tolist() == [len(texts[9 + i]) for i in which]
    assert batch.old_logprobs.tolist() == numbers and batch.values is None
    assert torch.equal(batch.ref_hidden, rollouts.ref_hidden[numbers])


@pytest.mark.parametrize("sizes, calls", [([3, 4, 5, 90], 1), ([99, 3, 1, 120, 4, 60, 70], 3)])
def test_few_reductions_add_up_many_tensors(sizes, calls, monkeypatch):
    """At most as many as there are buckets, of 100 numbers or of one larger tensor."""
    reduced = []
    monkeypatch.setattr(kernels, "BUCKET", 100)
    monkeypatch.setattr(kernels.dist, "all_reduce", lambda x: reduced.append(x.mul_(3)))
    tensors = [torch.randn(n, 1) for n in sizes]
    want = [3 * x for x in tensors]
    kernels.add_up_over_ranks(tensors)
    assert all(map(torch.equal, tensors, want)) and len(reduced) == calls


def test_scores_become_token_rewards():
    trainer = make_trainer(missing_eos_penalty=0.5, reward_clip=2.0)
    responses, ended = [[4, EOS_ID], [4, 5, 6]], torch.tensor([True, False])
    rollouts = Rollouts([[BOS_ID]] * 2, responses, ended, torch.zeros(5), kl=torch.zeros(5))

    def rewards(scores, beta=0.3):
        trainer.compute_rewards(rollouts, scores, beta)
        return rollouts.rewards.tolist(), rollouts.scores.tolist()

    assert rewards([3.0, 1.0]) == ([0, 2, 0, 0, 0.5], [3, 1])
    assert rewards([[1.0, 2.0], [1.0, 0.0, -1.0]]) == ([1, 2, 1, 0, -1.5], [3, 0])
    with pytest.raises(ValueError, match="one per response or one per token"):
        rewards([[1.0], [1.0, 0.0]])
    with pytest.raises(FloatingPointError):
        rewards([1.0, math.nan])
    rollouts.kl = torch.tensor([0.0, 2.0, 0.0, 4.0, 0.0])  # on every token, and not clipped
    assert rewards([3.0, 1.0], beta=0.5) == ([0, 1, 0, -2, 0.5], [3, 1])


def test_scores_are_scaled_before_they_are_clipped():
    """The standard deviation of 6, 0, 0, 0 is 2.6: 6 becomes 2.3, which is clipped to 1.5."""
    trainer, zeros = make_trainer(reward_scale=True, reward_clip=1.5), torch.zeros(8)
    responses, ended = [[4, EOS_ID]] * 4, torch.ones(4).bool()
    r = Rollouts([[BOS_ID]] * 4, responses, ended, zeros, kl=zeros)
    trainer.compute_rewards(r, [6.0, 0.0, 0.0, 0.0], beta=0.2)
    assert r.rewards.tolist() == [0, 1.5, 0, 0, 0, 0, 0, 0]
    assert r.scores.tolist() == [6, 0, 0, 0]
    trainer.compute_rewards(r, [1.0] * 4, beta=0.2)  # no scale: the critic would learn it
    assert r.rewards.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


# ----------------------------------------------------------------------------
# the objective, by brute force over every sequence


def tiny(longest=3, **config):
    """Vocabulary 4, of which two end a response; responses of at most 3 tokens: 30 sequences."""
    a = args(vocab_size=4, dim=8, n_heads=2, n_kv_heads=2, max_seq_len=8)
    trainer = make_trainer(a=a, max_gen_len=longest, optimizer=torch.optim.SGD, lr=0.0, **config)
    with torch.no_grad():  # away from the reference
        for p in trainer.policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    trainer.iteration = 1  # it is no longer the first
    return trainer


def all_sequences(vocab=4, longest=3):
    out = []
    for n in range(1, longest + 1):
        for s in itertools.product(range(vocab), repeat=n):
            inner, last = s[:-1], s[-1]
            if not any(t in END for t in inner) and (last in END or n == longest):
                out.append(list(s))
    return out


def log_distributions(model, response):
    """(n, V): the model's log-probabilities before each token of the response, prompt [BOS]."""
    return model(torch.tensor([[BOS_ID, *response[:-1]]]))[0].log_softmax(-1)


def score(response):
    return math.sin(sum((i + 2) * (t + 1) for i, t in enumerate(response)))


def objective(policy, reference, config, score=score):
    """J, summed over all sequences: differentiable. The sampled penalties are constants that a
    reward has, but for k1, whose expectation is the KL; in the loss alone, a penalty is the KL of
    each state's distribution, and where the states come from is not its business."""
    c, total = config, 0
    for s in all_sequences():
        logp, ref = (log_distributions(m, s) for m in (policy, reference))
        at = torch.arange(len(s)), torch.tensor(s)
        x = logp[at] - ref[at]
        p, per_state = logp[at].sum().exp(), (logp.exp() * (logp - ref)).sum()
        k = {"kl": x, "full": x, "mse": x**2 / 2, "abs": x.abs(), "k3": (-x).exp() - 1 + x}
        if c.kl_in == "loss":
            total = total + p * score(s) - c.init_kl_coef * p.detach() * per_state
        else:
            k = k[c.kl_penalty].sum()
            k = k if c.kl_penalty in ("kl", "full") else k.detach()
            total = total + p * (score(s) - c.init_kl_coef * k)
    return total


@pytest.mark.parametrize(
    "config",
    [
        dict(kl_penalty="full", kl_in="both"),
        dict(kl_penalty="kl", kl_in="reward"),
        dict(kl_penalty="abs", kl_in="reward"),
        dict(kl_penalty="mse", kl_in="reward"),
        dict(kl_penalty="k3", kl_in="both"),
        dict(kl_penalty="mse", kl_in="loss"),
        dict(kl_penalty="full", kl_in="loss"),
        dict(kl_penalty="full", kl_in="both", advantage="reinforce"),
        dict(kl_penalty="full", kl_in="both", value_model="shared", vf_coef=0.0),
    ],
)
def test_expected_gradient_is_that_of_the_objective(config):
    """Every sequence once, weighted by its probability through the rollout it stands for: with
    λ = 1 the trainer's expected gradient is exactly that of J, whatever the critic says."""
    trainer = tiny(lam=1.0, whiten_advantages=False, init_kl_coef=0.3, ppo_epochs=1, **config)
    sequences = all_sequences()
    J = objective(trainer.policy, trainer.reference, trainer.config)
    exact = flat_gradient(J, trainer.policy)
    kept = capture_gradient(trainer)
    if trainer.config.uses_values:  # a critic that is wrong everywhere, and must not matter
        torch.nn.init.normal_((trainer.critic or trainer.policy).value_head.weight)
    mean = torch.zeros_like(exact)
    total = 0.0
    for s in sequences:
        p = learn_from(trainer, [s])
        # the loss is a mean over the tokens of the batch, here of this rollout
        mean += p * len(s) * kept.pop()
        total += p
    assert total == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(-mean, exact, atol=2e-5, rtol=1e-3)


def flat_gradient(x, model):
    params = list(model.parameters())
    grads = torch.autograd.grad(x, params, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def learn_from(trainer, sequences):
    """A step from these responses to [BOS]; returns their probability."""
    with torch.no_grad():
        logps = [log_distributions(trainer.policy, s)[range(len(s)), s] for s in sequences]
    ended = torch.tensor([s[-1] in END for s in sequences])
    scores = [score(s) for s in sequences]
    step(trainer, [[BOS_ID]] * len(sequences), sequences, logps, scores, ended)
    trainer.iteration = 1
    return float(torch.cat(logps).sum().exp())


def score_of_any_end(response):
    """A score that does not depend on which end token ends the response."""
    return score([EOS_ID if token in END else token for token in response])


def every_story(trainer):
    """With exact_end, an iteration with each response that has no end, 8 of 3 tokens, alone. Yields
    the probability of its tokens given that they are not ends, its expected number of tokens, and
    the statistics. The reward has seen the response and its ends."""
    for tokens in itertools.product([t for t in range(4) if t not in END], repeat=3):
        with torch.no_grad():
            logp = log_distributions(trainer.policy, tokens)
        chosen, stay = logp[range(3), tokens], 1 - logp[:, END].exp().sum(1)
        seen, size = [], float(1 + stay[0] + stay[0] * stay[1])
        reward = lambda q, r, ended: seen.append((q, r, ended)) or [*map(score_of_any_end, r)]  # noqa: E731
        r = Rollouts([[BOS_ID]], [list(tokens)], torch.tensor([False]), chosen)
        stats = trainer.step(r, reward)
        ((queries, responses, ended),) = seen
        assert queries == [[BOS_ID]] * 4 and ended.tolist() == [False, True, True, True]
        assert [x[:-1] for x in responses] == [list(tokens[:n]) for n in (2, 0, 1, 2)]
        likely = [END[i] for i in logp[:, END].argmax(1).tolist()]
        assert responses[0] == list(tokens) and [x[-1] for x in responses[1:]] == likely
        yield float((chosen.sum() - stay.log().sum()).exp()), size, stats


@pytest.mark.parametrize("value_model", ["separate", "shared"])
def test_expected_gradient_with_exact_ends(value_model):
    """Every response without an end, weighted by its probability: the expected gradient, and the
    means of the statistics, are those of all sequences."""
    config = dict(exact_end=True, value_model=value_model, vf_coef=0.0)
    trainer = tiny(lam=1.0, whiten_advantages=False, init_kl_coef=0.3, ppo_epochs=1, **config)
    J = objective(trainer.policy, trainer.reference, trainer.config, score_of_any_end)
    exact = flat_gradient(J, trainer.policy)
    kept, mean, found = capture_gradient(trainer), torch.zeros_like(exact), {}
    torch.nn.init.normal_((trainer.critic or trainer.policy).value_head.weight)
    for p, size, stats in every_story(trainer):
        mean += p * size * kept.pop()
        for name in "objective reward length/mean ended".split():
            found[name] = found.get(name, 0) + p * stats[f"ppo/{name}"]
        found["square"] = found.get("square", 0) + p * (
            stats["ppo/length/std"] ** 2 + stats["ppo/length/mean"] ** 2
        )
    torch.testing.assert_close(-mean, exact, atol=2e-5, rtol=1e-3)
    want = dict.fromkeys(found, 0.0) | {"objective": J.item()}
    for s in all_sequences():
        with torch.no_grad():
            p = float(log_distributions(trainer.policy, s)[range(len(s)), s].sum().exp())
        want["reward"] += p * score_of_any_end(s)
        want["length/mean"] += p * (1 + len(s))
        want["square"] += p * (1 + len(s)) ** 2
        want["ended"] += p * (s[-1] in END)
    assert found == pytest.approx(want, abs=1e-5)


def test_advantages_with_exact_ends():
    """Of three responses, one of which was made to end, against a recursion over the two things
    that can happen in a state: an end, or the action."""
    c = dict(lam=0.8, lam_value=0.9, gamma=0.97, init_kl_coef=0.3, missing_eos_penalty=0.25)
    trainer = tiny(exact_end=True, reward_clip=0.9, longest=4, **c)
    responses = [[0, 3, 0, 3], [3, 0, EOS_ID], [3, 3, 0, 0]]
    ended = torch.tensor([False, True, False])
    with torch.no_grad():
        logps = [log_distributions(trainer.policy, r) for r in responses]
        refs = [log_distributions(trainer.reference, r) for r in responses]
        old = torch.cat([x[range(len(r)), r] for x, r in zip(logps, responses)])
    torch.nn.init.normal_(trainer.critic.value_head.weight)
    r = Rollouts([[BOS_ID]] * 3, responses, ended, old)
    trainer.step(r, lambda q, responses, ended: [*map(score_of_any_end, responses)])

    values, at = r.values.tolist(), 0
    clip = lambda x: max(-0.9, min(0.9, x))  # noqa: E731
    weights, end_weights, pairs, returns = [], [], [], []
    for response, logp, ref, done in zip(responses, logps, refs, ended.tolist()):
        n, v = len(response), values[at : at + len(response)]
        kl = (logp.exp() * (logp - ref)).sum(1).tolist()
        p = logp[:, END].exp().sum(1).tolist()
        final = clip(score_of_any_end(response)) - (0 if done else 0.25)
        ends = [clip(score_of_any_end(response[:t] + [EOS_ID])) for t in range(n)]

        def both(t, lam):
            """The returns of an end and of the action in state t."""
            if t == n - 1:
                return ends[t] - 0.3 * kl[t], final - 0.3 * kl[t]
            e, a = both(t + 1, lam)
            later = (1 - lam) * v[t + 1] + lam * (p[t + 1] * e + (1 - p[t + 1]) * a)
            return ends[t] - 0.3 * kl[t], 0.97 * later - 0.3 * kl[t]

        alive = 1.0
        for t in range(n):
            e, a = both(t, 0.8)
            weights.append(alive)
            end_weights.append(p[t])
            pairs.append((e - v[t], a - v[t]))
            e, a = both(t, 0.9)
            returns.append(p[t] * e + (1 - p[t]) * a)
            alive *= 1 - p[t]
        at += n
    torch.testing.assert_close(r.survival, torch.tensor(weights))
    torch.testing.assert_close(r.end_probability, torch.tensor(end_weights))
    torch.testing.assert_close(r.returns, torch.tensor(returns), atol=1e-5, rtol=1e-4)
    shares = [(w * p, w * (1 - p)) for w, p in zip(weights, end_weights)]
    flat = [(share, x) for both in zip(shares, pairs) for share, x in zip(*both)]
    mean = sum(w * x for w, x in flat) / sum(weights)
    std = math.sqrt(sum(w * (x - mean) ** 2 for w, x in flat) / sum(weights))
    for i, (e, a) in enumerate(pairs):
        assert float(r.end_advantages[i]) == pytest.approx((e - mean) / std, abs=1e-4)
        assert float(r.advantages[i]) == pytest.approx((a - mean) / std, abs=1e-4)
    assert r.kl_weight == pytest.approx(0.3 / std, rel=1e-5)
    means = ppo.rollout_statistics(r, 0.3, "full")
    assert means["ppo/policy/advantages_mean"] == pytest.approx(0, abs=1e-5)


def test_statistics_of_the_update_count_ends():
    """Where a step has moved the end tokens alone: the mean ratio is 1, the KL to the policy that
    sampled is that of the two distributions, and clipped ends are counted."""
    trainer = tiny(exact_end=True, whiten_advantages=False)
    responses = [[0, 3, 0], [3, 3, 0], [0, 0, 3], [3, 0, 3]]
    with torch.no_grad():
        before = [log_distributions(trainer.policy, r) for r in responses]
        old = torch.cat([x[range(3), r] for x, r in zip(before, responses)])
    r = Rollouts([[BOS_ID]] * 4, responses, torch.zeros(4).bool(), old)
    trainer.step(r, lambda q, responses, ended: [*map(score_of_any_end, responses)])
    with torch.no_grad():
        trainer.policy.output.weight[list(END)] *= 1.6
        after = [log_distributions(trainer.policy, r) for r in responses]
    stats = trainer.backward(r, [0, 1, 2, 3], True)
    total, clipped, weight = 0.0, 0.0, float(r.survival.sum())
    at = iter(range(12))
    for x, y, response in zip(before, after, responses):
        for t, token in enumerate(response):
            i = next(at)
            p, q = x[t, END].logsumexp(0).exp(), y[t, END].logsumexp(0).exp()
            moved = (y[t, token] - x[t, token]).exp(), q / p
            A = r.advantages[i], r.end_advantages[i]
            beyond = [float(m * a > m.clamp(0.8, 1.2) * a) for m, a in zip(moved, A)]
            w = float(r.survival[i]) / weight
            total += w * float((1 - p) * (moved[0] - 1 - moved[0].log()))
            total += w * float(p * (moved[1] - 1 - moved[1].log()))
            clipped += w * float((1 - p) * beyond[0] + p * beyond[1])
    assert stats["ppo/policy/policykl"] == pytest.approx(total, rel=1e-3)
    assert stats["ppo/policy/clipfrac"] == pytest.approx(clipped, rel=1e-3) and clipped > 0


def test_an_end_that_is_nearly_certain_has_a_gradient():
    """A policy whose responses end at once can learn that longer ones are better."""
    trainer = tiny(exact_end=True, init_kl_coef=0.0, whiten_advantages=False)
    with torch.no_grad():
        hidden = trainer.policy.hidden(torch.tensor([[BOS_ID]]))[0, 0]
        trainer.policy.output.weight[EOS_ID] += 12 * hidden / hidden.square().sum()
        p = log_distributions(trainer.policy, [EOS_ID])[0].exp()
    assert p[EOS_ID] > 0.99
    kept = capture_gradient(trainer)
    trainer.step(
        trainer.rollout([[BOS_ID]] * 16, seed=1),
        lambda q, responses, ended: [float(len(r)) for r in responses],
    )
    trainer.iteration = 1
    assert kept[0].norm() > 1e-4


def test_rare_ends_do_not_count(monkeypatch):
    trainer, seen = tiny(exact_end=True), []
    with torch.no_grad():
        p = log_distributions(trainer.policy, [0, 3, 0])[:, END].exp().sum(1).tolist()
        old = log_distributions(trainer.policy, [0, 3, 0])[range(3), [0, 3, 0]]
    between = sum(sorted(p)[:2]) / 2
    monkeypatch.setattr(ppo, "RARE", between * trainer.config.max_gen_len)
    r = Rollouts([[BOS_ID]], [[0, 3, 0]], torch.tensor([False]), old)
    trainer.step(r, lambda q, responses, ended: seen.extend(responses) or [0.0] * len(q))
    common = [i for i in range(3) if p[i] > between]
    assert len(common) == 2 and len(seen) == 3
    assert [i for i in range(3) if r.end_probability[i] > 0] == common


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_expected_gradient_of_groups(kind):
    """Every pair of responses, 100 of them, as a group: RLOO's expected gradient is that of J;
    GRPO's is that of the share of pairs which a response wins, over √2."""
    beta = 0.3
    trainer = tiny(
        advantage=kind,
        group_size=2,
        whiten_advantages=False,
        init_kl_coef=beta,
        ppo_epochs=1,
        rollouts=2,
        longest=2,
    )
    sequences, kept = all_sequences(longest=2), capture_gradient(trainer)
    logps, kls = [], []
    for s in sequences:
        logp, ref = (log_distributions(m, s) for m in (trainer.policy, trainer.reference))
        logps.append(logp[range(len(s)), s].sum())
        kls.append((logp.exp() * (logp - ref)).sum())
    p = torch.stack(logps).exp()
    scores, kls = torch.tensor([score(s) for s in sequences]), torch.stack(kls)
    if kind == "rloo":
        exact = (p * (scores - beta * kls)).sum()
    else:  # each pair's KL is in the loss once more, for the present state
        totals = (scores - beta * kls).detach()
        wins = (totals[:, None] - totals).sign() @ p.detach() / math.sqrt(2)
        exact = (p * wins).sum() - beta * (p.detach() * kls).sum()
    exact, mean, total = flat_gradient(exact, trainer.policy), 0, 0
    for pair in itertools.product(sequences, repeat=2):
        both = learn_from(trainer, list(pair))
        mean += both * sum(map(len, pair)) / 2 * kept.pop()
        total += both
    assert total == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(-mean, exact, atol=2e-5, rtol=1e-3)


def test_best_achievable_objective_against_brute_force():
    trainer, beta = tiny(), 0.3
    with torch.no_grad():
        logprobs = torch.stack(
            [
                log_distributions(trainer.reference, s)[torch.arange(len(s)), torch.tensor(s)].sum()
                for s in all_sequences()
            ]
        )
    scores = torch.tensor([score(s) for s in all_sequences()])
    j_star = beta * (logprobs + scores / beta).logsumexp(0)
    best = (logprobs + scores / beta).softmax(0)
    kl = (best * (best.log() - logprobs)).sum()
    assert float((best * scores).sum() - beta * kl) == pytest.approx(float(j_star), abs=1e-5)
    # an exact sample: each sequence as often as it is likely
    often = (logprobs.exp() * 200_000).round().long()
    samples = scores.repeat_interleave(often)
    found, error = best_achievable_objective(samples[None], beta)
    assert found == pytest.approx(float(j_star), abs=1e-3) and 0 < error < 0.01
    two, error = best_achievable_objective(torch.stack([samples, samples - 0.1]), beta)
    assert two == pytest.approx(found - 0.05, abs=1e-6)
    assert error == pytest.approx(1.96 * 0.05, abs=1e-6)
    # few samples: nearly no bias is left, and the interval holds J* as often as it says
    beta, P, S = 1.0, 32, 32
    j_star = beta * (logprobs + scores / beta).logsumexp(0)
    draws = torch.multinomial(logprobs.exp(), 500 * P * S, replacement=True)
    draws = scores[draws].view(500, P, S)
    plain = beta * ((draws / beta).logsumexp(2) - math.log(S)).mean()
    found, error = map(torch.tensor, zip(*(best_achievable_objective(d, beta) for d in draws)))
    assert abs(found.mean() - j_star) < 0.35 * abs(plain - j_star)
    assert 0.91 < float(((found - j_star).abs() < error).float().mean()) < 0.98
    one = draws.view(500, 1, P * S)  # prompt
    found, error = map(torch.tensor, zip(*(best_achievable_objective(d, beta) for d in one)))
    assert 0.85 < float(((found - j_star).abs() < error).float().mean()) < 0.99
    assert best_achievable_objective(samples[None], 0.0)[0] == pytest.approx(float(samples.max()))


# ----------------------------------------------------------------------------
# the trainer


def by_hand(trainer, queries, responses, scores, ended, texts, rate):
    """One iteration from the papers' definitions: each rollout alone and padded on the right, plain
    numbers but for what autograd needs, all rollouts in every step, SGD written out. Returns the
    weights of policy and critic, and statistics."""
    c, B, eps = trainer.config, len(queries), 1e-8
    policy, critic = deepcopy(trainer.policy), deepcopy(trainer.critic)

    def at_response(model, q, r):
        hidden = model.hidden(torch.tensor([q + r + [0] * 4]))
        return hidden[0, len(q) - 1 : len(q) + len(r) - 1]

    def logps(model, q, r):  # (n, V)
        return (model.output(at_response(model, q, r)) / c.temperature).log_softmax(-1)

    def values(q, r):
        return (critic or policy).values(at_response(critic or policy, q, r))

    def moments(x):
        mean = sum(x) / len(x)
        return mean, sum((a - mean) ** 2 for a in x) / len(x)

    def penalties(logp, ref, r):
        x = logp[range(len(r)), r] - ref[range(len(r)), r]
        return {
            "kl": x,
            "abs": x.abs(),
            "mse": x * x / 2,
            "k3": (-x).exp() - 1 + x,
            "full": (logp.exp() * (logp - ref)).sum(1),
        }[c.kl_penalty]

    def discounted(x, factor):
        return [sum(factor ** (u - t) * x[u] for u in range(t, len(x))) for t in range(len(x))]

    std = math.sqrt(moments(scores)[1]) if c.reward_scale else 1.0
    old, ref, rewards, v = [], [], [], []
    for q, r, s, done in zip(queries, responses, scores, ended.tolist()):
        with torch.no_grad():
            old.append(logps(policy, q, r))
            ref.append(logps(trainer.reference, q, r))
            v.append(values(q, r).tolist() if c.advantage == "gae" else [0.0] * len(r))
        s = s / std
        s = max(min(s, c.reward_clip), -c.reward_clip) if c.reward_clip else s
        k = penalties(old[-1], ref[-1], r).tolist()
        rewards.append([-c.init_kl_coef * x if c.kl_in != "loss" else 0.0 for x in k])
        rewards[-1][-1] += s - (0 if done else c.missing_eos_penalty)
    if c.whiten_rewards:
        var = moments(sum(rewards, []))[1]
        rewards = [[x / math.sqrt(var + eps) for x in row] for row in rewards]

    advantages, returns = [], []
    for i, (row, value) in enumerate(zip(rewards, v)):
        if c.advantage in ("rloo", "grpo"):
            first = i // c.group_size * c.group_size
            group = [sum(x) for x in rewards[first : first + c.group_size]]
            others = [x for j, x in enumerate(group) if j != i - first]
            mean, var = moments(group)
            a = sum(row) - sum(others) / len(others)
            if c.advantage == "grpo":
                a = (sum(row) - mean) / math.sqrt(var * c.group_size / (c.group_size - 1))
            advantages.append([a] * len(row))
            returns.append([sum(row)] * len(row))
            continue
        delta = [x + c.gamma * n - y for x, n, y in zip(row, value[1:] + [0.0], value)]
        advantages.append(discounted(delta, c.gamma * c.lam))
        targets = discounted(delta, c.gamma * c.lam_value)
        returns.append([x + y for x, y in zip(targets, value)])
        if c.advantage == "reinforce":
            advantages[-1] = returns[-1] = discounted(row, c.gamma)
    mean, var = moments(sum(advantages, []))
    scale = 1 / math.sqrt(var + eps)
    advantages = [torch.tensor([(a - mean) * scale for a in row]) for row in advantages]

    n_tokens, steps = sum(map(len, responses)), []
    high = c.cliprange_high or c.cliprange
    for _ in range(c.ppo_epochs):
        total, step = (
            0,
            dict.fromkeys(
                "policy entropy clipfrac policykl value error vclip vpred ptx".split(), 0.0
            ),
        )
        for i, (q, r) in enumerate(zip(queries, responses)):
            w = 1 / n_tokens if c.loss_aggregation == "token" else 1 / B / len(r)
            logp, n = logps(policy, q, r), len(r)
            moved = logp[range(n), r] - old[i][range(n), r]
            A, ratio = advantages[i], moved.exp()
            surrogate = torch.minimum(A * ratio, A * ratio.clamp(1 - c.cliprange, 1 + high))
            entropy = -(logp.exp() * logp).sum()
            kl = penalties(logp, ref[i], r).sum()
            in_loss = c.kl_in == "loss" or c.kl_in == "both" and c.kl_penalty == "full"
            total = total + w * (-surrogate.sum() - c.entropy_coef * entropy)
            total = total + w * scale * c.init_kl_coef * kl * in_loss
            found = dict(
                policy=-surrogate.sum(),
                entropy=entropy,
                clipfrac=(surrogate < A * ratio).sum(),
                policykl=(ratio - 1 - moved).sum(),
            )
            if c.advantage == "gae":
                new, target, before = values(q, r), torch.tensor(returns[i]), torch.tensor(v[i])
                error = (new - target) ** 2
                near = before + (new - before).clamp(-c.cliprange_value, c.cliprange_value)
                worse = (near - target) ** 2 if c.cliprange_value else error
                loss = 0.5 * torch.maximum(error, worse).sum()
                total = total + w * loss * (1.0 if critic else c.vf_coef)
                found |= dict(
                    value=loss, error=error.sum(), vclip=(worse > error).sum(), vpred=new.sum()
                )
            for name, x in found.items():
                step[name] += w * x.item()
        if c.ptx_coef:
            for x, y in texts:
                nll = -policy(x).log_softmax(-1).gather(2, y[..., None]).mean() / len(texts)
                total = total + c.ptx_coef * nll
                step["ptx"] += nll.item()
        step["total"] = total.item()
        for model in filter(None, (policy, critic)):
            model.zero_grad()
        total.backward()
        for model in filter(None, (policy, critic)):
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
            step.setdefault("norm", norm)  # the policy's
            for p in model.parameters():
                if p.grad is not None:
                    p.data -= rate * p.grad * min(1.0, c.max_grad_norm / norm)
        steps.append(step)
    flat = lambda rows: [x for row in rows for x in row]  # noqa: E731
    stats = {k: sum(s[k] for s in steps) / len(steps) for k in steps[0]}
    variance = moments(flat(returns))[1]
    stats["ev"] = 1 - moments([a - b for a, b in zip(flat(returns), flat(v))])[1] / variance
    stats["ref"] = -sum(float(x[range(len(r)), r].sum()) for x, r in zip(ref, responses)) / n_tokens
    return policy, critic, stats


def count_calls(model, name):
    """A list that grows by one with each call of a method."""
    calls, method = [], getattr(model, name)
    setattr(model, name, lambda *args, **more: calls.append(1) or method(*args, **more))
    return calls


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(advantage="reinforce", gamma=0.9, init_kl_coef=0.0),
        dict(advantage="rloo", group_size=4, cliprange_high=0.3),
        dict(advantage="grpo", group_size=4, temperature=0.7),
        dict(kl_penalty="kl", lam_value=0.5, gamma=0.95),
        dict(kl_penalty="abs", reward_scale=True),
        dict(kl_penalty="k3", reward_clip=0.03, missing_eos_penalty=0.5),
        dict(kl_penalty="mse", kl_in="reward", whiten_rewards=True),
        dict(kl_penalty="mse", kl_in="loss", cliprange_high=0.3),
        dict(kl_in="loss", cliprange_value=0.02),
        dict(loss_aggregation="sequence"),
        dict(entropy_coef=0.3),
        dict(value_model="shared", vf_coef=2.0),
        dict(ptx_coef=0.5),
        dict(max_grad_norm=0.1),
    ],
)
@pytest.mark.parametrize("epochs", [3, 1])
def test_an_iteration_is_that_of_the_definitions(config, epochs, rows):
    """Weights after three epochs, or after one step with the forward pass of `evaluate`, and
    statistics, against `by_hand`."""
    trainer = make_trainer(
        mini_batch_size=8 if epochs > 1 else 16,
        gradient_accumulation_steps=2,
        ppo_epochs=epochs,
        optimizer=torch.optim.SGD,
        lr=0.3,
        ptx=lambda: (1.0, *next(batches)),
        **dict(max_grad_norm=1e9, cliprange=0.1, early_stopping=False) | config,
    )
    with torch.no_grad():  # away from the reference, and a critic with an opinion
        for p in trainer.policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if trainer.config.uses_values:
        head = (trainer.critic or trainer.policy).value_head
        torch.nn.init.normal_(head.weight, std=0.1)
    trainer.iteration = 1
    texts = [(x[:, :-1], x[:, 1:]) for x in torch.randint(12, (2, 3, 9))]
    batches = itertools.cycle(texts)
    queries, responses, logprobs, ended = sample(trainer, [[BOS_ID, 5], [BOS_ID]] * 8, seed=1)
    scores = LengthReward(6)(queries, responses, ended)
    scores = [s + i % 3 / 10 for i, s in enumerate(scores)]
    policy, critic, want = by_hand(trainer, queries, responses, scores, ended, texts, rate=0.3)
    before, passes = weights(trainer.policy), count_calls(trainer.policy, "hidden")
    s = step(trainer, queries, responses, logprobs, scores, ended)
    # One forward pass of the evaluation is the update's.
    assert len(passes) == (2 + 2 * epochs - 1 if epochs > 1 else 1) or "ptx_coef" in config
    names = {
        "policy": "ppo/loss/policy",
        "total": "ppo/loss/total",
        "value": "ppo/loss/value",
        "ptx": "ppo/loss/ptx",
        "entropy": "ppo/policy/entropy",
        "clipfrac": "ppo/policy/clipfrac",
        "policykl": "ppo/policy/policykl",
        "error": "ppo/val/error",
        "vclip": "ppo/val/clipfrac",
        "vpred": "ppo/val/vpred",
        "ev": "ppo/val/explained_variance",
        "norm": "grad_norm",
        "ref": "ppo/ref_loss",
    }
    for short, name in names.items():
        assert s.get(name, 0) == pytest.approx(want[short], abs=2e-5, rel=1e-3), name
    torch.testing.assert_close(weights(trainer.policy), weights(policy), atol=2e-5, rtol=1e-3)
    assert float((weights(policy) - before).norm()) > 0.01
    if critic:
        torch.testing.assert_close(weights(trainer.critic), weights(critic), atol=2e-5, rtol=1e-3)
    if epochs > 1:
        assert want["clipfrac"] > 0 or "max_grad_norm" in config, "nothing was clipped"
        assert want["vclip"] > 0 or not trainer.config.cliprange_value


@pytest.mark.parametrize(
    "aggregation, exact",
    [("token", False), ("sequence", False), ("token", True), ("sequence", True)],
)
def test_split_into_forward_passes_does_not_matter(aggregation, exact, rows):
    found = []
    for size, accumulate in [(16, 1), (4, 4), (2, 8)]:
        trainer = make_trainer(
            mini_batch_size=size,
            gradient_accumulation_steps=accumulate,
            ppo_epochs=2,
            loss_aggregation=aggregation,
            exact_end=exact,
            optimizer=torch.optim.SGD,
            lr=0.1,
        )
        stats = iterate(trainer, 2)
        found.append((weights(trainer.policy), weights(trainer.critic), stats))
    for policy, critic, stats in found[1:]:
        torch.testing.assert_close(policy, found[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(critic, found[0][1], atol=1e-5, rtol=1e-4)
        for k in ("ppo/loss/policy", "ppo/val/error", "ppo/objective", "ppo/policy/entropy"):
            assert stats[k] == pytest.approx(found[0][2][k], abs=1e-5)


def test_every_epoch_of_every_iteration_has_an_order_of_its_own():
    trainer, orders = make_trainer(), []
    responses = [[4, EOS_ID]] * 16
    r = Rollouts([[BOS_ID]] * 16, responses, torch.ones(16).bool(), torch.zeros(32))
    for trainer.iteration in (0, 1, 2):
        epochs = trainer.epochs(r)
        orders += [tuple(sum(next(epochs), [])) for _ in range(2)]
    assert all(sorted(order) == list(range(16)) for order in orders) and len(set(orders)) == 6


@pytest.mark.parametrize(
    "config",
    [
        dict(advantage="reinforce", reward_scale=True),
        dict(advantage="rloo"),
        dict(advantage="grpo", whiten_advantages=False),
    ],
)
def test_a_reward_that_is_always_the_same_teaches_nothing(config):
    """All advantages are equal: they become 0, not NaN, and the weights stay."""
    settings = dict(optimizer=torch.optim.SGD, init_kl_coef=0.0, group_size=4)
    trainer = make_trainer(**settings, **config)
    before = weights(trainer.policy)
    iterate(trainer, reward=lambda queries, responses, ended: [1.0] * len(responses))
    assert torch.equal(weights(trainer.policy), before)


def test_logged_numbers():
    """Reward, length, KL and objective against sums over the rollouts; and β follows that KL."""
    trainer = make_trainer(init_kl_coef=0.4, ppo_epochs=1, lr=0.05)
    iterate(trainer, 2)
    queries, responses, logprobs, ended = sample(trainer, [[BOS_ID, 4]] * 16, seed=9)
    scores = LengthReward(6)(queries, responses, ended)
    kl = 0.0
    for q, r in zip(queries, responses):
        with torch.no_grad():
            p, ref = (
                m(torch.tensor([q + r[:-1]]))[0, len(q) - 1 :].log_softmax(-1)
                for m in (trainer.policy, trainer.reference)
            )
        kl += float((p.exp() * (p - ref)).sum()) / 16
    # The KL is a tenth above the target, which is within the ±0.2 of the controller.
    trainer.kl_controller = ppo.KLController(0.4, target=kl / 1.1, horizon=100)
    s = step(trainer, queries, responses, logprobs, scores, ended)
    assert kl > 0.1
    assert trainer.kl_controller.value == pytest.approx(0.4 * (1 + 0.1 * 16 / 100), rel=1e-5)
    assert s["ppo/kl_coef"] == 0.4
    assert s["ppo/kl_ref"] == pytest.approx(kl, rel=1e-4)
    assert s["ppo/reward"] == pytest.approx(sum(scores) / 16, abs=1e-6)
    assert s["ppo/objective"] == pytest.approx(sum(scores) / 16 - 0.4 * kl, abs=1e-5)
    lengths = torch.tensor([2.0 + len(r) for r in responses])
    assert s["ppo/length/mean"] == pytest.approx(float(lengths.mean()), abs=1e-4)
    assert s["ppo/length/std"] == pytest.approx(float(lengths.std(unbiased=False)), abs=1e-4)
    assert s["ppo/ended"] == pytest.approx(float(ended.float().mean()))


def test_means_over_rollouts_by_hand():
    """Two rollouts, of three actions and of one. The KL estimates abs and mse are biased: J has
    the unbiased one, and ppo/reward_all has the penalty of the rewards."""
    ended, old = torch.tensor([True, False]), torch.tensor([-1.0, -2.0, -0.5, -3.0])
    r = Rollouts([[BOS_ID, 5], [BOS_ID]], [[4, 5, EOS_ID], [7]], ended, old)
    r.ref_logprobs, r.scores = torch.tensor([-1.5, -1.0, -1.0, -2.0]), torch.tensor([2.0, 1.0])
    r.ending = torch.tensor([0.0, 0.0, 1.0, 1.0])
    r.kl, r.advantages = torch.tensor([0.3, 0.1, 0.0, 0.4]), torch.tensor([0.5, -1.0, 2.0, 0.1])
    values, returns = [1.0, 2.0, 3.0, 4.0], [2.0, 0.0, 3.0, 5.5]
    r.values, r.returns = torch.tensor(values), torch.tensor(returns)
    residual = statistics.pvariance([a - b for a, b in zip(returns, values)])
    want = {
        "ppo/reward": 1.5,
        "ppo/kl_coef": 0.5,
        "ppo/length/mean": 3.5,
        "ppo/length/std": 1.5,
        "ppo/ended": 0.5,
        "ppo/truncated": 0.5,
        "ppo/ref_loss": 5.5 / 4,
        "ppo/policy/advantages_mean": 0.4,
        "ppo/returns/mean": statistics.mean(returns),
        "ppo/returns/var": statistics.pvariance(returns),
        "ppo/val/mean": 2.5,
        "ppo/val/var": 1.25,
        "ppo/val/explained_variance": 1 - residual / statistics.pvariance(returns),
    }
    for kind, kl in [("full", 0.4), ("kl", 0.4), ("k3", 0.4), ("abs", -0.5), ("mse", -0.5)]:
        want |= {"ppo/kl_ref": kl, "ppo/objective": 1.5 - 0.5 * kl, "ppo/reward_all": 1.3}
        assert ppo.rollout_statistics(r, 0.5, kind) == pytest.approx(want, abs=1e-6), kind


def test_explosive_steps_are_skipped():
    """Nor is their gradient left to the next step."""
    trainer = make_trainer(ratio_threshold=0.5, ppo_epochs=2)
    before = weights(trainer.policy)
    assert iterate(trainer)["ppo/skipped_steps"] == 8
    assert torch.equal(weights(trainer.policy), before)
    parameters = itertools.chain(trainer.policy.parameters(), trainer.critic.parameters())
    assert all(p.grad is None or not p.grad.any() for p in parameters)


@pytest.mark.parametrize("moved, epochs", [(0.14, 3), (0.16, 1)])
def test_epochs_end_beyond_one_and_a_half_times_the_target(moved, epochs, monkeypatch):
    trainer, backward = make_trainer(target_kl=0.1, ppo_epochs=3), PPOTrainer.backward
    found = {"ppo/policy/policykl": moved}
    monkeypatch.setattr(PPOTrainer, "backward", lambda *a, **kw: backward(*a, **kw) | found)
    stats = iterate(trainer)
    assert stats["ppo/epochs"] == epochs and stats["ppo/early_stop"] == (epochs == 1)


@pytest.mark.parametrize(
    "config",
    [
        dict(reward_scale=True),
        dict(reward_clip=0.5),
        dict(missing_eos_penalty=3.0),
        dict(kl_penalty="kl", kl_in="reward", whiten_rewards=True),
        dict(value_model="shared", reward_scale=True),
    ],
)
def test_the_critic_starts_at_the_mean_of_what_it_learns(config):
    """Of the rewards after scaling, clipping and penalties, not of the scores."""
    trainer = make_trainer(**config)
    head, seen = (trainer.critic or trainer.policy).value_head, []
    for p in head.parameters():
        torch.nn.init.zeros_(p)
    trainer.update = lambda r: seen.append(r) or {}
    step(trainer, **rollouts(trainer, scores=[100.0 + i for i in range(16)]))
    (r,) = seen
    totals = ppo.sum_per_rollout(r.rewards, r.counts)
    torch.testing.assert_close(r.values, totals.mean().expand_as(r.values))


def test_the_critic_starts_at_the_mean_over_the_ends():
    trainer, seen = make_trainer(exact_end=True, missing_eos_penalty=3.0), []
    for p in trainer.critic.value_head.parameters():
        torch.nn.init.zeros_(p)
    trainer.update = lambda r: seen.append(r) or {}
    trainer.step(trainer.rollout([[BOS_ID]] * 16, seed=3), LengthReward(6))
    (r,) = seen
    assert 0.01 < float(r.truncated.mean()) < 1 and float(r.survival.min()) < 0.5
    mean = (r.scores - 3 * r.truncated).mean()
    torch.testing.assert_close(r.values, mean.expand_as(r.values), atol=1e-4, rtol=1e-4)


def test_the_exact_end_refuses_one_score_per_token():
    trainer = make_trainer(exact_end=True)
    with pytest.raises(ppo.RewardError, match=r"for \d+ responses: .* one per response with exact"):
        iterate(trainer, reward=lambda queries, responses, _: [[0.5] * len(r) for r in responses])


def test_a_critic_that_has_learned_starts_where_it_is():
    trainer, seen = make_trainer(), []
    torch.nn.init.constant_(trainer.critic.value_head.bias, 0.75)
    trainer.update = lambda r: seen.append(r.values) or {}
    step(trainer, **rollouts(trainer))
    assert trainer.critic.value_head.bias.item() == 0.75 and set(seen[0].tolist()) == {0.75}


def test_the_first_loss_of_the_critic_is_of_the_mean_that_it_starts_at():
    """Where every value is the mean m, only the last δ is not 0: k tokens before the end of a
    response with the score s, return − value is λ^k (s − m)."""
    trainer = make_trainer(mini_batch_size=16, ppo_epochs=1, lam_value=0.8)
    given = rollouts(trainer)
    loss = step(trainer, **given)["ppo/loss/value"]
    m = statistics.mean(given["scores"])
    errors = [
        0.8**k * (s - m) for s, r in zip(given["scores"], given["responses"]) for k in range(len(r))
    ]
    assert loss == pytest.approx(statistics.mean(e * e for e in errors) / 2, rel=1e-3)


def test_critic_warm_up_leaves_the_policy_alone():
    trainer = make_trainer(critic_warmup=3)
    before = weights(trainer.policy)
    assert iterate(trainer)["ppo/epochs"] == 3
    assert torch.equal(weights(trainer.policy), before)
    assert trainer.critic.value_head.bias.item() < -0.005  # it left 0 for the scores
    iterate(trainer)
    assert float((weights(trainer.policy) - before).norm()) > 0.1


FROZEN = [
    dict(ppo_epochs=2),
    dict(critic_warmup=2, temperature=0.7),
    dict(value_model="shared"),
    dict(advantage="rloo", group_size=4, mini_batch_size=8, gradient_accumulation_steps=2),
    dict(advantage="rloo", group_size=4, mini_batch_size=16),  # one optimizer step per iteration
]


@pytest.mark.parametrize("config", FROZEN)
def test_frozen_layers_are_computed_once_for_all_models(config, monkeypatch):
    """The numbers are those of models that compute all of their layers."""
    passes, found = [], []
    for common in (True, False):
        if not common:
            monkeypatch.setitem(globals(), "frozen_layers_in_common", lambda *models: 0)
        sgd = dict(
            optimizer=torch.optim.SGD, lr=0.1
        )  # Adam enlarges the rounding of tiny gradients
        trainer = make_trainer(a=args(n_layers=3), freeze=2, **sgd, **config)
        assert trainer.common_layers == (2 if common else 0)
        counts = [0, 0, 0]
        for model in filter(None, (trainer.policy, trainer.reference, trainer.critic)):
            for i, layer in enumerate(model.layers):
                layer.register_forward_hook(
                    lambda m, x, y, i=i: counts.__setitem__(i, counts[i] + 1)
                )
        prompts = [[BOS_ID, 5], [BOS_ID]] * 8
        if "group_size" in config:
            prompts = [[BOS_ID, 5]] * 8 + [[BOS_ID]] * 8
        for i in range(3):
            queries, *rollouts, ended = sample(trainer, prompts, i)
            before = list(counts)
            scores = LengthReward(6)(queries, rollouts[0], ended)
            stats = step(trainer, queries, *rollouts, scores, ended)
        passes.append([b - a for a, b in zip(before, counts)])
        stats = {k: v for k, v in stats.items() if not k.startswith("time")}
        models = filter(None, (trainer.policy, trainer.critic))
        found.append((torch.cat([weights(model) for model in models]), stats))
    (w, stats), (plain_w, plain_stats) = found
    torch.testing.assert_close(w, plain_w, atol=1e-6, rtol=1e-5)
    assert stats == pytest.approx(plain_stats, abs=1e-5, rel=1e-4)
    once = 16 // config.get("mini_batch_size", 4)  # passes over the rollouts in the evaluation
    assert passes[0] == [once, once, passes[1][2]]
    assert passes[1][0] == passes[1][2] > once


def test_memory_of_the_kept_graph():
    """While the evaluation keeps a graph for the update, it makes no other forward pass."""
    trainer, during, forward = make_trainer(rollouts=16), [], ppo.PPOTrainer.hidden
    queries, responses, logprobs, ended = sample(trainer, [[BOS_ID, 5], [BOS_ID]] * 8, seed=1)
    rollouts = Rollouts(queries, responses, ended, torch.cat(logprobs))
    trainer.iteration = 1
    trainer.hidden = lambda *args: during.append(rollouts.graph) or forward(trainer, *args)
    trainer.evaluate(rollouts)
    assert during == [None] * 12  # 4 minibatches, 3 models
    assert rollouts.graph[0].requires_grad and not rollouts.kl.requires_grad


def test_layers_in_common():
    def trainer(change=None, freeze=2):
        made = make_trainer(a=args(n_layers=3), freeze=freeze)
        models = [made.policy, made.reference, made.critic]
        if change:
            change(*models)
        return frozen_layers_in_common(*models)

    def other_weights(policy, reference, critic):
        critic.layers[1].feed_forward.w1.weight[0, 0] += 1e-3

    def other_embeddings(policy, reference, critic):
        critic.tok_embeddings.weight[0, 0] += 1e-3

    def other_norm(policy, reference, critic):
        critic.args = replace(critic.args, norm_eps=1e-3)

    def other_dtype(policy, reference, critic):
        critic.layers[0].bfloat16()

    def trained(policy, reference, critic):
        policy.layers[1].attention_norm.weight.requires_grad_(True)

    def adapters(policy, reference, critic):
        add_lora(policy, 2, 4, 0.0, "q")

    with torch.no_grad():
        assert [trainer(freeze=n) for n in (0, 1, 2, 3)] == [0, 1, 2, 3]
        assert trainer(other_weights) == trainer(trained) == 1
        assert trainer(other_dtype) == trainer(adapters) == 0
        assert trainer(other_embeddings) == trainer(other_norm) == 0


def test_average_of_weights():
    trainer = make_trainer(averaging=0.5, rollouts=8, mini_batch_size=4, ppo_epochs=1)
    kept = [weights(trainer.policy)]
    trainer.optimizer.register_step_post_hook(lambda *a: kept.append(weights(trainer.policy)))
    iterate(trainer)
    expected = 0.25 * kept[0] + 0.25 * kept[1] + 0.5 * kept[2]
    found = torch.cat([trainer.average[n].flatten() for n, _ in trainer.policy.named_parameters()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("advantage, exact", [("gae", False), ("rloo", False), ("gae", True)])
def test_resume_to_the_bit(advantage, exact, tmp_path):
    config = dict(advantage=advantage, group_size=4, averaging=0.9, adap_kl_ctrl=True)
    config |= dict(exact_end=exact)
    whole = make_trainer(**config)
    iterate(whole, 4)
    first = make_trainer(**config)
    iterate(first, 2)
    torch.save({"policy": first.policy.state_dict(), **first.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = make_trainer(seed=5, **config)
    second.reference.load_state_dict(first.reference.state_dict())
    second.policy.load_state_dict(state["policy"])
    second.load_state_dict(state)
    iterate(second, 2)
    assert torch.equal(weights(second.policy), weights(whole.policy))
    assert second.kl_controller.value == whole.kl_controller.value != first.kl_controller.value
    for k, v in whole.average.items():
        assert torch.equal(second.average[k], v)
    if advantage == "gae":
        assert torch.equal(weights(second.critic), weights(whole.critic))


SPLIT = {
    "early stop": dict(ppo_epochs=4, target_kl=0.2),
    "exact end": dict(exact_end=True, reward_scale=False),
    "grpo": dict(advantage="grpo", group_size=3),
    # Rank 1 has one pass, whose graph it keeps; rank 0 has two.
    "rloo": dict(advantage="rloo", group_size=4, mini_batch_size=6, gradient_accumulation_steps=2),
    "frozen layer": dict(a=args(n_layers=2), freeze=1),
}
WORKER = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
import test_ppo
torch.set_num_threads(1)
rank, meet, file = sys.argv[1:]
dist.init_process_group("gloo", init_method="file://" + meet, world_size=2, rank=int(rank))
torch.save([test_ppo.three_iterations(config) for config in test_ppo.SPLIT.values()], file)
dist.barrier()
# The numbers are out. PyTorch 2.13 now and then aborts while an interpreter that used gloo shuts
# down ("terminate called without an active exception"), which is not what this test is about.
os._exit(0)
"""


def three_iterations(config):
    """The policy's weights after three iterations, and the statistics of the last."""
    common = dict(optimizer=torch.optim.SGD, lr=0.1, rollouts=12, mini_batch_size=4)
    trainer = make_trainer(**common | dict(adap_kl_ctrl=True, reward_scale=True) | config)
    stats = iterate(trainer, 3)
    stats = {k: v for k, v in stats.items() if not k.startswith("time")}
    return weights(trainer.policy), stats


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """three_iterations of each setting of SPLIT, on each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    command = [sys.executable, folder / "worker.py"]
    files = [folder / f"{rank}.pt" for rank in range(2)]
    workers = [
        subprocess.Popen([*command, str(rank), folder / "meet", file])
        for rank, file in enumerate(files)
    ]
    assert [w.wait(timeout=300) for w in workers] == [0, 0]
    return [dict(zip(SPLIT, torch.load(file))) for file in files]


@pytest.mark.parametrize("name", SPLIT)
def test_two_processes_give_the_numbers_of_one(name, two_ranks):
    """Weights on both ranks, and statistics; where the epochs stop early, they do on both."""
    expected, one = three_iterations(SPLIT[name])
    if name == "early stop":
        assert 1 < one["ppo/epochs"] < 4 and one["ppo/early_stop"] == 1
    for rank in two_ranks:
        found, stats = rank[name]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert stats.keys() == one.keys()
        for k, v in one.items():
            assert stats[k] == pytest.approx(v, abs=1e-4, rel=1e-3), k


@pytest.mark.parametrize(
    "aggregation, want",
    [
        ("token", [1 / 12] * 6),
        ("sequence", [1 / 12, 1 / 12, 1 / 6, 1 / 18, 1 / 18, 1 / 18]),
    ],
)
def test_weights_of_actions_are_shares_of_the_rollouts_of_all_ranks(aggregation, want, monkeypatch):
    """Another rank has as many rollouts, of the same lengths: those of this rank weigh a half."""
    trainer, seen = make_trainer(loss_aggregation=aggregation), []
    responses = [[4, EOS_ID], [EOS_ID], [4, 5, EOS_ID]]
    r = Rollouts([[BOS_ID]] * 3, responses, torch.ones(3).bool(), torch.zeros(6))
    nothing = torch.zeros((), requires_grad=True)
    trainer.loss = lambda batch, weight, *rest: seen.extend(weight.tolist()) or (nothing, {})
    doubled = lambda *values: [2 * float(torch.as_tensor(v).sum()) for v in values]  # noqa: E731
    monkeypatch.setattr(ppo, "all_sum", doubled)
    trainer.backward(r, [0, 1, 2], True)
    assert seen == pytest.approx(want)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_pass_without_rollouts_has_no_gradient(aggregation):
    """As with --fsdp on a rank that takes part in a pass for the sake of the others alone."""
    trainer = make_trainer(loss_aggregation=aggregation)
    r = trainer.rollout([[BOS_ID]] * 16, seed=1)
    trainer.evaluate(r)
    trainer.compute_rewards(r, LengthReward(6)(r.queries, r.responses, r.ended), 0.2)
    trainer.compute_advantages(r, 0.2)
    trainer.passes = lambda which: [[]]
    trainer.backward(r, [0, 1], True)
    models = (trainer.policy, trainer.critic)
    assert not any(p.grad.any() for m in models for p in m.parameters() if p.grad is not None)


def test_refuses_more_processes_than_groups(monkeypatch):
    monkeypatch.setattr(ppo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ppo.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ppo.dist, "get_world_size", lambda: 5)
    make_trainer(rollouts=15, group_size=3, advantage="rloo")
    with pytest.raises(ValueError, match="5 processes need at least 15 rollouts"):
        make_trainer(rollouts=12, group_size=3, advantage="rloo")


# ----------------------------------------------------------------------------
# it refuses to be silently wrong


def rollouts(trainer, prompts=[[BOS_ID, 4, 5]] * 16, **replaced):
    queries, responses, logprobs, ended = sample(trainer, prompts, seed=3)
    scores = LengthReward(6)(queries, responses, ended)
    given = dict(
        queries=queries, responses=responses, old_logprobs=logprobs, scores=scores, ended=ended
    )
    return {**given, **replaced}


def test_refuses_rollouts_of_unequal_numbers():
    trainer = make_trainer()
    given = rollouts(trainer)
    with pytest.raises(Mismatch, match="1 prompts, 16 responses, 16 end flags"):
        step(trainer, **given | dict(queries=given["queries"][:1]))


@pytest.mark.parametrize("kind,factor", [("full", 1.1), ("kl", 1.0005)])
def test_refuses_a_policy_that_is_not_the_reference(kind, factor):
    trainer = make_trainer(kl_penalty=kind)
    given = rollouts(trainer)
    with torch.no_grad():
        trainer.reference.norm.weight.mul_(factor)
    with pytest.raises(Mismatch, match="policy and reference differ"):
        step(trainer, **given)


@pytest.mark.parametrize("kind", ["full", "kl", "k3"])
def test_refuses_a_reference_that_is_near_at_each_token_only(kind):
    """The reference is off by 0.1 nats per response, but by too little at each token."""
    trainer = make_trainer(kl_penalty=kind)
    given = rollouts(trainer)
    with torch.no_grad():
        trainer.reference.norm.weight.mul_(1.25)
        far = kl_to_reference(
            trainer.policy, trainer.reference, given["queries"], given["responses"], 16
        )[0]
    assert 0.02 < float(far.mean()) < 0.19
    checks = trainer.checks
    checks.token_limit = checks.mean_limit = checks.bias_limit = 1.0  # of a token
    with pytest.raises(Mismatch, match="policy and reference differ"):
        step(trainer, **given)


@pytest.mark.parametrize("factor", [1.1, 1.0005])  # 0.5 and 0.002 nats off
def test_refuses_log_probabilities_of_another_policy(factor):
    trainer = make_trainer()
    given = rollouts(trainer)
    with torch.no_grad():
        for model in (trainer.policy, trainer.reference):
            model.norm.weight.mul_(factor)
    with pytest.raises(Mismatch, match="of sampling and training differ"):
        step(trainer, **given)


@pytest.mark.parametrize("kind,scale", [("tf32", 6e-4), ("half", 0.0134)])
def test_checks_distinguish_rounding_from_mistakes(kind, scale, monkeypatch):
    """Rounding errors have long tails: of 60,000 tokens some are off by 60 times the mean. An error
    at one token of each response, or a small bias at each token, must be detected."""
    monkeypatch.setitem(ppo.LIMITS, "float32", ppo.LIMITS[kind])
    checks, n = make_trainer().checks, 60_000

    def check(error):
        checks.near_zero("x", ppo.all_sum(*checks.error_sums(error)))

    def check_ratio(error, clipped):
        checks.ratio_is_one({k: float(x) for k, x in checks.ratio_sums(error, clipped).items()})

    off = scale * torch.randn(n) / 0.8
    off[:30] = 60 * scale
    check(off)
    check_ratio(off, off > math.log(1.2))
    check(off[29:150])  # one of few is more than a thousandth
    one_of_150 = off.clone()
    one_of_150[::150] = 80 * scale
    both_signs = 0.7 * checks.token_limit * (-1.0) ** torch.arange(n)
    shifted, unknown = off.abs() + 2 * scale, torch.full((n,), math.nan)
    for wrong in (one_of_150, both_signs, shifted, off * 12, unknown):
        with pytest.raises(Mismatch, match="^x by "):
            check(wrong)
    with pytest.raises(Mismatch, match="0.20% of the tokens are clipped"):
        check_ratio(off, torch.arange(n) < n // 500)


def test_a_low_temperature_enlarges_the_rounding_errors_that_are_allowed():
    """Logits that are off by 0.004 are at temperature 0.1 off by 0.04: rounding, not a mistake."""
    for temperature, allowed in [(1.0, 0.004), (0.1, 0.04), (2.0, 0.004)]:
        checks = make_trainer(temperature=temperature).checks
        checks.near_zero("x", ppo.all_sum(*checks.error_sums(torch.tensor([allowed] + [0.0] * 99))))
        with pytest.raises(Mismatch):
            checks.near_zero("x", ppo.all_sum(*checks.error_sums(torch.tensor([2 * allowed]))))


def round_as(kind, monkeypatch):
    """Products that round as those of a GPU do, in another order in every call."""
    noise = torch.Generator().manual_seed(0)

    def tf32(x):
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            cast = tf32 if kind == "tf32" else lambda x: x.bfloat16().float()
            y = torch.nn.functional.linear(cast(x.detach()), cast(w.detach()))
            y = y * (1 + 1e-6 * torch.randn(y.shape, generator=noise))
            return y if kind == "tf32" else y.bfloat16().float()

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad @ w, grad.T @ x

    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels, "multiply", lambda x, w: Rounded.apply(x, w))
    monkeypatch.setitem(ppo.LIMITS, "float32", ppo.LIMITS["half" if kind == "bf16" else kind])


@pytest.mark.parametrize(
    "fault", ["none", "policy", "top_k", "temperature", "top_p", "ratio", "reference"]
)
@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_mistakes_are_seen_through_the_rounding_of_a_gpu(kind, fault, monkeypatch):
    round_as(kind, monkeypatch)
    trainer = make_trainer(rollouts=64, mini_batch_size=16)
    if fault == "none":
        assert math.isfinite(iterate(trainer, 4)["ppo/loss/total"])
        return
    sampling = dict(top_k=dict(top_k=5), temperature=dict(temperature=0.8), top_p=dict(top_p=0.9))
    if fault in sampling:
        plain = ppo.generate
        changed = lambda *a, **kw: plain(*a[:3], **{"temperature": 1.0, **kw, **sampling[fault]})  # noqa: E731
        monkeypatch.setattr(ppo, "generate", changed)
    given = rollouts(trainer, [[BOS_ID, 4, 5]] * 64)
    models = dict(policy=(trainer.policy, trainer.reference), reference=(trainer.reference,))

    def drift(*which):
        with torch.no_grad():
            for model in which:
                model.norm.weight.mul_(1.1 if fault != "reference" else 1.5)

    if fault == "ratio":
        backward = PPOTrainer.backward
        drifted = lambda self, *a, **kw: drift(self.policy) or backward(self, *a, **kw)  # noqa: E731
        monkeypatch.setattr(PPOTrainer, "backward", drifted)
    else:
        drift(*models.get(fault, ()))
    says = dict(
        ratio="the ratio of the first minibatch is not 1", reference="policy and reference differ"
    )
    with pytest.raises(Mismatch, match=says.get(fault, "of sampling and training differ")):
        step(trainer, **given)


def test_refuses_a_share_of_no_text():
    with pytest.raises(ValueError, match="ptx_coef needs text"):
        make_trainer(ptx_coef=0.1)


@pytest.mark.parametrize("changed", [dict(top_k=5), dict(temperature=0.8), dict(top_p=0.9)])
def test_refuses_sampling_from_another_support(changed, monkeypatch):
    trainer = make_trainer()

    def truncated(*a, **kw):
        a = a[:3]
        return generate(*a, **{"temperature": 1.0, **kw, **changed})

    generate = ppo.generate
    monkeypatch.setattr(ppo, "generate", truncated)
    with pytest.raises(Mismatch, match="of sampling and training differ"):
        step(trainer, **rollouts(trainer))


def test_refuses_a_ratio_that_does_not_start_at_one(monkeypatch):
    trainer = make_trainer()
    given = rollouts(trainer)
    backward = PPOTrainer.backward

    def drifted(self, *a, **kw):
        with torch.no_grad():
            self.policy.norm.weight.mul_(1.1)
        return backward(self, *a, **kw)

    monkeypatch.setattr(PPOTrainer, "backward", drifted)
    with pytest.raises(Mismatch, match="the ratio of the first minibatch is not 1"):
        step(trainer, **given)


def test_refuses_dropout_in_the_ratio(monkeypatch):
    """The trainer turns dropout off; were it left on, the first minibatch would show it."""
    trainer = make_trainer(a=args(dropout=0.3))
    stats = iterate(trainer)
    assert stats["ppo/policy/clipfrac"] < 1 and not trainer.policy.training
    trainer = make_trainer(a=args(dropout=0.3))
    monkeypatch.setattr(Transformer, "eval", lambda self: self.train())
    with pytest.raises(Mismatch, match="log-probabilities of sampling|policy and reference"):
        iterate(trainer)


def test_refuses_an_end_token_outside_the_response():
    trainer = make_trainer()
    given = rollouts(trainer)
    i = int(given["ended"].nonzero()[0])
    given["responses"][i] = given["responses"][i][:-1] + [7]
    with pytest.raises(Mismatch, match="lacks its end token"):
        step(trainer, **given)


def test_refuses_responses_and_log_probabilities_that_do_not_match():
    trainer = make_trainer()
    given = rollouts(trainer)
    given["old_logprobs"][0] = given["old_logprobs"][0][:-1]
    with pytest.raises(Mismatch, match="one log-probability per"):
        step(trainer, **given)


def test_refuses_an_empty_response():
    trainer = make_trainer()
    given = rollouts(trainer)
    given["responses"][3] = []
    given["old_logprobs"][3] = given["old_logprobs"][3][:0]
    with pytest.raises(Mismatch, match="a response is empty"):
        step(trainer, **given)


def test_refuses_a_probability_above_one():
    trainer = make_trainer()
    given = rollouts(trainer)
    given["old_logprobs"][0][0] = 0.1
    with pytest.raises(Mismatch, match="is not that of a token"):
        step(trainer, **given)


@pytest.mark.parametrize("first", [True, False])
def test_refuses_a_score_that_is_not_on_the_last_token(first, monkeypatch):
    """On the first, or on every one."""
    trainer = make_trainer()
    given = rollouts(trainer)

    def misplaced(scores, counts):
        out = ppo.expand(scores, counts)
        if first:
            out = torch.zeros_like(out)
            out[counts.cumsum(0) - counts] = scores
        return out

    monkeypatch.setattr(ppo, "on_last_action", misplaced)
    with pytest.raises(Mismatch, match="not on the last token"):
        step(trainer, **given)


def test_refuses_a_mask_that_reaches_into_the_prompt(monkeypatch):
    trainer = make_trainer()
    given = rollouts(trainer)
    pack = ppo.pack

    def one_early(queries, responses, device):
        p = pack(queries, responses, device)
        return replace(p, state_ends=p.state_ends - 1, actions=p.tokens[p.state_ends])

    def in_the_update(self, *a, **kw):
        monkeypatch.setattr(ppo, "pack", one_early)
        return backward(self, *a, **kw)

    backward = PPOTrainer.backward
    monkeypatch.setattr(PPOTrainer, "backward", in_the_update)
    with pytest.raises(Mismatch, match="not the response tokens"):
        step(trainer, **given)


@pytest.mark.parametrize("when", ["scoring", "update"])
def test_refuses_a_mask_without_the_end_token(when, monkeypatch):
    trainer = make_trainer()
    given = rollouts(trainer)
    pack, function = ppo.pack, dict(scoring="evaluate", update="backward")[when]

    def without_end(queries, responses, device):
        p = pack(queries, responses, device)
        kept = torch.tensor([i < len(r) - 1 for r in responses for i in range(len(r))])
        return replace(p, state_ends=p.state_ends[kept], actions=p.actions[kept])

    def then(self, *a, **kw):
        monkeypatch.setattr(ppo, "pack", without_end)
        return original(self, *a, **kw)

    original = getattr(PPOTrainer, function)
    monkeypatch.setattr(PPOTrainer, function, then)
    with pytest.raises(Mismatch, match="not the response tokens"):
        step(trainer, **given)


def test_no_gradient_from_the_prompt(rows, monkeypatch):
    """The loss reaches the classifier from the positions that predict a response token alone."""
    check_no_gradient_from_the_prompt(monkeypatch)


def test_no_gradient_from_the_prompt_without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    check_no_gradient_from_the_prompt(monkeypatch)


def check_no_gradient_from_the_prompt(monkeypatch):
    trainer = make_trainer(ppo_epochs=1, mini_batch_size=16)
    given = rollouts(trainer, [[BOS_ID, 5, 6], [BOS_ID], [BOS_ID, 7, 8, 9]] * 5 + [[BOS_ID]])
    grads, packed = [], []
    minibatch = Rollouts.minibatch

    def watch(module, inputs, output):
        if output.requires_grad:
            output.register_hook(grads.append)

    def remember(self, which):
        packed[:] = [(len(self.queries[i]), len(self.responses[i])) for i in which]
        return minibatch(self, which)

    monkeypatch.setattr(Rollouts, "minibatch", remember)
    trainer.policy.norm.register_forward_hook(watch)
    step(trainer, **given)
    want = []  # a prompt's last token predicts the response's first; its last predicts nothing
    for prompt, response in packed:
        want += [False] * (prompt - 1) + [True] * response
    assert False in want and len(grads) == 1
    assert ((grads[0] != 0).any(1) == torch.tensor(want)).all()


def test_no_gradient_from_padding(monkeypatch):
    """Without kernels.c attention is padded: the gradient of responses of any length together is
    the sum of those of each alone, where nothing is padded."""
    monkeypatch.setattr(kernels, "library", lambda: None)
    trainer = make_trainer(mini_batch_size=16)
    given = rollouts(trainer, [[BOS_ID], [BOS_ID, 7, 8, 9]] * 8)
    assert len({len(q) + len(r) for q, r in zip(given["queries"], given["responses"])}) > 3
    loss, minibatch, found, calls = trainer.loss, Rollouts.minibatch, [], []

    def remember(self, which):
        calls.append((self, which))
        return minibatch(self, which)

    def both(batch, weight, *rest):
        rollouts, which = calls[-1]
        each = zip(which, weight.split([len(rollouts.responses[i]) for i in which]))
        alone = sum(loss(minibatch(rollouts, [i]), w, *rest)[0] for i, w in each)
        together = loss(batch, weight, *rest)[0]
        found.extend(flat_gradient(x, trainer.policy) for x in (alone, together))
        return loss(batch, weight, *rest)

    monkeypatch.setattr(Rollouts, "minibatch", remember)
    trainer.loss = both
    step(trainer, **given)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-3)


def test_refuses_numbers_that_are_not_finite():
    trainer = make_trainer()
    given = rollouts(trainer, scores=[math.inf] * 16)
    with pytest.raises(FloatingPointError, match="not a finite number"):
        step(trainer, **given)
    trainer = make_trainer()
    given = rollouts(trainer, scores=[1e38] * 8 + [-1e38] * 8)
    with pytest.raises((FloatingPointError, RuntimeError)):
        step(trainer, **given)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(kl_penalty="k4"),
        dict(advantage="rloo"),
        dict(temperature=0.0),
        dict(target_kl=0.0),
        dict(lam=1.5),
        dict(gamma=-0.1),
        dict(rollouts=10, group_size=4, advantage="grpo"),
        dict(kl_in="loss", kl_penalty="kl"),
        dict(kl_in="loss", kl_penalty="abs"),
        dict(kl_in="loss", kl_penalty="k3"),
        dict(kl_in="reward", kl_penalty="full"),
        dict(critic_warmup=1, value_model="shared"),
        dict(critic_warmup=1, advantage="reinforce"),
        dict(whiten_rewards=True),
        dict(ppo_epochs=0),
        dict(group_size=0),
        dict(max_gen_len=0),
        dict(mini_batch_size=0),
        dict(exact_end=True, advantage="rloo", group_size=4),
        dict(exact_end=True, kl_penalty="kl", kl_in="reward"),
        dict(exact_end=True, kl_in="loss"),
        dict(exact_end=True, reward_scale=True),
    ],
)
def test_refuses_settings(wrong):
    with pytest.raises(ValueError, match=list(wrong)[0]):
        PPOConfig(**wrong)


def test_rollouts_are_eight_batches_by_default():
    assert PPOConfig(mini_batch_size=7).rollouts == 56
    assert PPOConfig(mini_batch_size=7, rollouts=21).rollouts == 21


# ----------------------------------------------------------------------------
# the frontier that the results are drawn beside


def test_tilted_samples_reach_the_best_achievable_objective():
    scores = -torch.rand(5, 64, generator=torch.Generator().manual_seed(1)).double()
    for beta in (0.05, 0.2, 1.0):
        reward, kl = frontier.tilted(scores, beta)
        j_star = beta * ((scores / beta).logsumexp(1) - math.log(64)).mean()
        assert reward - beta * kl == pytest.approx(float(j_star))


def test_best_of_n_against_all_draws():
    scores = torch.tensor([[0.0, 1.0, 1.0, 3.0]])  # ties: 1 has probability 1/2
    reward, kl = frontier.best_of(scores, 3)
    best = [max(draw) for draw in itertools.product(scores[0].tolist(), repeat=3)]
    p = {v: best.count(v) / len(best) for v in set(best)}
    assert reward == pytest.approx(sum(v * q for v, q in p.items()))
    ref = {0.0: 1 / 4, 1.0: 1 / 2, 3.0: 1 / 4}
    assert kl == pytest.approx(sum(q * math.log(q / ref[v]) for v, q in p.items()))


def test_end_probability_against_counting_tokens():
    """Every token of every story is visited one by one; some stories are truncated."""
    random = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 40, (200,), generator=random)
    ended = torch.rand(200, generator=random) < 0.7
    weights = torch.rand(200, generator=random).double()
    edges = [5, 10, 12, 30]
    ends, tokens = [0.0] * 3, [0.0] * 3
    for n, has_end, weight in zip(lengths.tolist(), ended.tolist(), weights.tolist()):
        for position in range(1, n + 1):
            for i in range(3):
                if edges[i] <= position < edges[i + 1]:
                    tokens[i] += weight
                    ends[i] += weight * (has_end and position == n)
    expected = [e / t for e, t in zip(ends, tokens)]
    assert endings.end_probability(lengths, ended, weights, edges) == pytest.approx(expected)


def test_optimum_weights_against_the_closed_form():
    """A sample holds each of four stories as often as the policy's probability says."""
    policy = torch.tensor([1, 2, 3, 4]).double() / 10
    reference = torch.tensor([0.4, 0.1, 0.3, 0.2]).double()
    scores, beta = torch.tensor([-1.0, 0.0, -0.3, -2.0]).double(), 0.5
    story = torch.arange(4).repeat_interleave((20 * policy).round().int())
    log_ratio = (policy / reference).log()
    weights, log_sums = endings.optimum_weights(scores[story][None], log_ratio[story][None], beta)
    expected = reference * (scores / beta).exp()
    found = torch.zeros(4).double().index_add(0, story, weights[0])
    torch.testing.assert_close(found, expected / expected.sum())
    assert float(log_sums[0]) == pytest.approx(math.log(20 * float(expected.sum())))


def test_frontier_keeps_the_runs_of_its_command(tmp_path, monkeypatch):
    """Runs are not done twice, but with other iterations they are; β = 0 is in the table."""
    done = []

    def fake(command, **_):
        flags = dict(word[2:].split("=") for word in command if "=" in word)
        done.append((flags["init_kl_coef"], flags["ppo_iters"]))
        folder = Path(flags["out_dir"])
        after = dict.fromkeys(
            ("objective", "reward", "kl", "length_mean", "length_std", "ended", "ref_loss"),
            float(flags["ppo_iters"]),
        )
        report = dict(roof=(-0.5, 0.1), before=dict(objective=-1.0), after=after)
        (folder / "ppo_report.json").write_text(json.dumps(report))
        (folder / "ppo_log.jsonl").write_text("{}\n" * int(flags["ppo_iters"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(frontier, "reference_scores", lambda a: -torch.rand(2, 64).double())
    monkeypatch.setattr(frontier, "draw", lambda *_: None)
    folders = [f"--out_dir={tmp_path / 'runs'}", f"--assets={tmp_path}", "--group="]
    for betas, new in [
        ("0.2,0:7", [("0.2", "3"), ("0", "7")]),
        ("0.2,0:7", []),
        ("0:8,0.2", [("0", "8")]),
    ]:
        done.clear()
        frontier.main([*folders, "--iters=3", f"--betas={betas}"])
        assert done == new
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    found = [(r["beta"], r["rollouts"], r["reward"]) for r in rows if r["kind"] == "PPO"]
    assert found == [("0", "1600", "8"), ("0.2", "600", "3")]
    assert len(list((tmp_path / "runs").iterdir())) == 3  # what was redone is kept aside


# ----------------------------------------------------------------------------
# it learns


def pretrained(seed):
    """A model pretrained on text in which each token ends a response with probability 1/25, so that
    a target length of 10 differs clearly from its mean length."""
    torch.manual_seed(seed)
    a = args(vocab_size=8, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=48, tied=True)
    model = accelerate(Transformer(a))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        x = torch.randint(3, 8, (32, 40))
        x[torch.rand(x.shape) < 1 / 25] = BOS_ID
        x[:, 0] = BOS_ID
        optimizer.zero_grad()
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns(seed):
    model, beta, reward = pretrained(seed), 0.1, LengthReward(10)
    state = model.state_dict()
    config = PPOConfig(
        init_kl_coef=beta, rollouts=128, mini_batch_size=32, max_gen_len=36, ppo_epochs=2
    )
    policy, reference = Transformer(model.args), Transformer(model.args).requires_grad_(False)
    critic = TransformerWithValueHead(model.args)
    for m in (policy, reference, critic):
        accelerate(m).load_state_dict(state, strict=False)
    trainer = PPOTrainer(
        config,
        policy,
        reference,
        critic,
        torch.optim.Adam(policy.parameters(), lr=1e-3),
        torch.optim.Adam(critic.parameters(), lr=5e-3),
        nullcontext,
        stop_ids=END,
    )
    queries, responses, _, ended = sample(trainer, [[BOS_ID]] * 2000, seed=77)
    scores = torch.tensor(reward(queries, responses, ended))
    start, (j_star, _) = float(scores.mean()), best_achievable_objective(scores[None], beta)
    history = [iterate(trainer, reward=reward) for _ in range(25)]
    objectives = [s["ppo/objective"] for s in history]
    reached = sum(objectives[-3:]) / 3
    closed = (reached - start) / (j_star - start)
    variances = torch.tensor([s["ppo/val/explained_variance"] for s in history])
    fives = variances.unfold(0, 5, 1).mean(1)
    explained, at_the_end = float(fives.max()), float(fives[-1])
    print(
        f"J {start:.3f} -> {reached:.3f} of {j_star:.3f}: {closed:.0%}, EV {explained:.2f}, "
        f"{at_the_end:.2f} at the end"
    )
    assert closed >= 0.6
    assert explained > 0.3 and at_the_end > 0.2  # little is left to explain of the best policy
    assert min(objectives) > start - 0.25 * (j_star - start)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"target": 0.0}, "adap_kl_ctrl needs a target and an init_kl_coef above 0"),
        ({"init_kl_coef": 0.0}, "adap_kl_ctrl needs a target and an init_kl_coef above 0"),
        ({"rollouts": 200, "horizon": 199.0}, "horizon must be at least the 200 rollouts"),
    ],
)
def test_a_kl_controller_can_adapt_beta_and_keeps_it_positive(flags, message):
    """Otherwise beta would stay 0, or become negative, which would reward the KL."""
    with pytest.raises(ValueError, match=message):
        ppo.PPOConfig(adap_kl_ctrl=True, **flags)
    controller = ppo.KLController(0.2, target=6.0, horizon=200.0)
    for _ in range(3):
        controller.update(kl=0.0, rollouts=200)
    assert controller.value == pytest.approx(0.2 * 0.8**3)


def test_scores_of_two_kinds_are_refused():
    with pytest.raises(ppo.RewardError, match="numbers for some responses and lists for others"):
        ppo.token_scores([1.0, [0.0, 2.0]], torch.tensor([1, 2]))
