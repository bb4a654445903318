"""PPO as a stage of the training loop: prompts, models, reward, and what came of it.

The algorithm is in ppo.py; here it gets its models and optimizers, its prompts and its roof J*.
"""

import hashlib
import json
import math
import time
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import torch

import ppo
from model import Transformer, TransformerWithValueHead, add_lora, generate, load_checkpoint
from model import merged_state, model_from_checkpoint
from report import print_report
from stages import schedule
from tinystories import Prompts, Windows
from tokenizer import write_atomic


class Alignment:
    """PPO against a reward; see ppo.py."""

    prefix = "ppo_"

    def __init__(self, args, checkpoint, rank, world, context, tokenizer):
        self.args, self.rank, self.world, self.tokenizer = args, rank, world, tokenizer
        values = {f.name: getattr(args, f.name, None) for f in fields(ppo.PPOConfig)}
        values |= dict(mini_batch_size=args.batch_size, max_grad_norm=args.grad_clip)
        config = ppo.PPOConfig(**values)
        weights = checkpoint["ppo"]["reference"] if "ppo" in checkpoint else checkpoint["model"]
        start = {"model": weights, "model_args": checkpoint["model_args"]}

        def build(source, kind):
            return model_from_checkpoint(source, kind, dropout=0.0).to(args.device)

        shared = config.value_model == "shared"
        self.model = build(start, TransformerWithValueHead if shared else Transformer)
        reference = build(start, Transformer).requires_grad_(False)
        if args.lora_rank:
            add_lora(self.model, args.lora_rank, args.lora_alpha, 0.0, args.lora_layers)
            if shared:
                self.model.value_head.requires_grad_(True)
            frozen = dict(self.model.named_parameters())
            for name, p in reference.named_parameters():
                p.data = frozen[name].data  # the reference is the model without its adapters
        self.optimizers = [self.adam(self.model, args.learning_rate)]
        critic = None
        if config.advantage == "gae" and not shared:
            source = config.value_model
            source = start if source == "separate" else load_checkpoint(source)
            critic = build(source, TransformerWithValueHead)
            rate = args.value_learning_rate or args.learning_rate
            self.optimizers.append(self.adam(critic, rate))
        vocab = self.model.args.vocab_size
        self.prompts = Prompts(args.data, "train", args.start_len, vocab, args.seed)
        self.held_out = Prompts(args.data, "val", args.start_len, vocab, args.seed)
        seq_len = self.model.args.max_seq_len
        self.text = Windows(args.data, "val", min(seq_len, 256), vocab, args.seed)
        if config.ptx_coef:
            if world > 1:
                raise ValueError("--ptx_coef works with one process only")
            self.ptx_windows = Windows(args.data, "train", seq_len, vocab, args.seed + 1)
        self.trainer = ppo.PPOTrainer(
            config, self.model, reference, critic, self.optimizers[0],
            self.optimizers[1] if critic else None, context, self.ptx_batch,
        )  # fmt: skip
        self.reward = ppo.load_reward(args.reward, args.target_len, self.decode)
        self.position = self.ptx_position = 0
        self.first, self.roof = checkpoint["iter_num"], None

    def ptx_batch(self):
        n = max(self.args.batch_size // 8, 1)
        batch = self.ptx_windows.batch(self.ptx_position, n)
        self.ptx_position += n
        return (x.to(self.args.device) for x in batch)

    def adam(self, model, rate):
        """Adam whose first steps are short: its second moments are rough estimates then. The count
        of steps lies in the parameter group, and so in the checkpoint."""
        a = self.args
        params = [p for p in model.parameters() if p.requires_grad]
        betas = a.beta1, a.beta2
        optimizer = torch.optim.AdamW(params, rate, betas, weight_decay=a.weight_decay, fused=True)
        optimizer.param_groups[0].update(peak_lr=rate, scale=1.0, steps=0)

        def warm_up(optimizer, args, kwargs):
            g = optimizer.param_groups[0]
            g["steps"] += 1
            g["lr"] = g["peak_lr"] * g["scale"] * min(1.0, g["steps"] / max(a.ppo_warmup_steps, 1))

        optimizer.register_step_pre_hook(warm_up)
        return optimizer

    def decode(self, ids):
        if self.tokenizer is None:
            raise ValueError("this needs the model's tokenizer: give --tokenizer")
        return self.tokenizer.decode(ids)

    def sample(self, model, prompts):
        """Responses of a model to prompts, the same at every call."""
        c = self.trainer.config
        random = torch.Generator().manual_seed(self.args.seed)
        uniform = torch.rand(len(prompts), c.max_gen_len, generator=random)
        with self.trainer.context():
            out = generate(
                model, prompts, c.max_gen_len, c.temperature, uniform=uniform, max_batch=512
            )
        return out.responses(), out.ended

    def scores(self, prompts, responses, ended):
        """One score a rollout (B,), also where the reward gives one for each token."""
        each = self.reward(prompts, responses, ended)
        return torch.tensor([float(torch.as_tensor(s).sum()) for s in each])

    @torch.no_grad()
    def measure(self, model):
        """How a model does on held-out prompts: reward, exact KL to the reference, J, lengths, the
        share that ended by itself, and the reference's loss on the samples, in nats a token."""
        t, n, size = self.trainer, self.args.report_rollouts, self.args.batch_size
        prompts = self.held_out.batch(0, n)
        responses, ended = self.sample(model, prompts)
        scores = self.scores(prompts, responses, ended)
        kl = loss = 0.0
        for i in range(0, n, size):
            p = ppo.pack(prompts[i : i + size], responses[i : i + size], self.args.device)
            with t.context():
                logp, ref = (
                    t.log_softmax(m(p.tokens, lengths=p.lengths)[p.action])
                    for m in (model, t.reference)
                )
            kl += float(ppo.exact_kl(logp, ref).sum()) / n
            loss -= float(ref.gather(1, p.target[:, None]).sum())
        lengths = torch.tensor([len(q) + len(r) for q, r in zip(prompts, responses)]).float()
        return {
            "objective": float(scores.mean()) - t.config.init_kl_coef * kl,
            "reward": float(scores.mean()),
            "kl": kl,
            "length_mean": float(lengths.mean()),
            "length_std": float(lengths.std()),
            "ended": float(ended.float().mean()),
            "ref_loss": loss / sum(map(len, responses)),
            "val_loss": self.text_loss(model),
            "lengths": lengths.int().tolist(),
            "story": self.decode(prompts[0] + responses[0]) if self.tokenizer else "",
        }

    def text_loss(self, model):
        """The loss on 64 fixed windows of validation text, nats a token: does PPO forget?"""
        losses = [
            (float(model(x.to(self.args.device), y.to(self.args.device))), len(x))
            for x, y in self.text.fixed(64, 16)
        ]
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def report(self):
        """Measures reference and result on the same prompts and random numbers, and prints."""
        result = deepcopy(self.trainer.reference)
        result.load_state_dict(self.result(), strict=False)  # a shared value head stays behind
        found = {
            "beta": self.trainer.config.init_kl_coef,
            "roof": self.roof,
            "before": self.measure(self.trainer.reference),
            "after": self.measure(result),
        }
        with write_atomic(Path(self.args.out_dir) / "ppo_report.json", "w") as f:
            json.dump(found, f)
        print_report(found)

    def estimate_roof(self):
        """J* and its standard error, from scores of reference samples that are kept in out_dir."""
        a, c = self.args, self.trainer.config
        reference = self.trainer.reference.parameters()
        weights = float(sum(p.cpu().double().abs().sum() for p in reference))
        key = [a.reward, a.target_len, a.start_len, a.roof_prompts, a.roof_samples, a.seed, a.data]
        key += [c.max_gen_len, c.temperature, weights]
        if ":" in a.reward:  # FILE.py:FUNCTION: the file may change under its name
            key.append(hashlib.sha256(Path(a.reward.rpartition(":")[0]).read_bytes()).hexdigest())
        path = Path(a.out_dir) / "roof.json"
        try:
            kept = json.loads(path.read_text())
            scores = torch.tensor(kept["scores"]) if kept["key"] == key else None
        except (OSError, ValueError, KeyError):
            scores = None
        if scores is None:
            prompts = self.held_out.batch(0, a.roof_prompts)
            prompts = [p for p in prompts for _ in range(a.roof_samples)]
            responses, ended = self.sample(self.trainer.reference, prompts)
            scores = self.scores(prompts, responses, ended).view(a.roof_prompts, a.roof_samples)
            if self.rank == 0:
                with write_atomic(path, "w") as f:
                    json.dump({"key": key, "scores": scores.tolist()}, f)
        self.roof = ppo.objective_roof(scores, c.init_kl_coef)
        return self.roof

    def step(self, iteration):
        a, c, t0 = self.args, self.trainer.config, time.perf_counter()
        for o in self.optimizers:
            o.param_groups[0]["scale"] = schedule(iteration, a, self.first, warmup=0)
        prompts = self.prompts.batch(self.position, c.rollouts // c.group_size)
        self.position += len(prompts)
        prompts = [p for p in prompts for _ in range(c.group_size)]
        queries, responses, logprobs, ended = self.trainer.rollout(prompts, a.seed + iteration)
        t1 = time.perf_counter()
        scores = self.reward(queries, responses, ended)
        self.last = queries[0], responses[0], scores[0]
        return self.trainer.step(queries, responses, logprobs, scores, ended) | {
            "ppo/objective_roof": self.roof[0],
            "time/ppo/rollout": t1 - t0,
            "time/ppo/iteration": time.perf_counter() - t0,
        }

    def line(self, iteration, s):
        if self.args.ppo_debug:
            return json.dumps({"iter": iteration, **s}, indent=4)
        return (
            f"{iteration:6d} | J {s['ppo/objective']:.3f} of {self.roof[0]:.3f} | "
            f"reward {s['ppo/reward']:.3f} | KL {s['ppo/kl_ref']:.2f} | "
            f"length {s['ppo/length/mean']:3.0f} ±{s['ppo/length/std']:3.0f} | "
            f"ended {s['ppo/ended']:4.0%} | entropy {s.get('ppo/policy/entropy', math.nan):.2f} | "
            f"clip {s.get('ppo/policy/clipfrac', math.nan):5.1%} | "
            f"EV {s['ppo/val/explained_variance']:5.2f} | "
            f"norm {s['grad_norm']:.2f} | {s['time/ppo/rollout']:.1f} + {s['time/ppo/total']:.1f} s"
        )

    def evaluate(self):
        return {}

    def story(self):
        """The last iteration's first rollout and its score."""
        if self.tokenizer is None or not hasattr(self, "last"):
            return ""
        query, response, score = self.last
        return f"{self.decode(query)} >>> {self.decode(query + response)} (score {score})"

    def result(self):
        """The weights to keep: the average of the policy's where one is made, adapters merged."""
        if not self.args.lora_rank:
            return self.trainer.average or self.model.state_dict()
        kept = deepcopy(self.model)
        kept.load_state_dict(self.trainer.average or self.model.state_dict())
        return merged_state(kept)

    def state(self):
        return {
            "model": self.result(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "position": self.position,
            "ppo": {
                **self.trainer.state_dict(),
                "policy": self.model.state_dict(),
                "reference": self.trainer.reference.state_dict(),
                "ptx_position": self.ptx_position,
                "first": self.first,
            },
        }

    def resume(self, checkpoint):
        state = checkpoint["ppo"]
        self.model.load_state_dict(state["policy"])
        self.trainer.load_state_dict(state)
        self.position, self.ptx_position = checkpoint["position"], state["ptx_position"]
        self.first = state["first"]
