"""RLHF as a stage of the training loop (train.py --ppo): models, prompts, rewards, the best
achievable objective J*, and the final report. The algorithm is in ppo.py.

J has an upper bound that can be computed: the optimal policy π*(y|x) ∝ π_ref(y|x) exp(r(x, y) / β)
reaches J*(x) = β log E_ref[exp(r / β)]. `best_achievable_objective` estimates J* from samples of
the reference model. The gap between J and J* measures the quality of a run.
"""

import hashlib
import importlib.util
import inspect
import json
import math
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import ppo
from checkpoint import (
    checkpoint_args,
    choose_device,
    halve_frozen,
    load_checkpoint,
    model_from_checkpoint,
)
from common import flag, flag_names, printable, read_json, write_atomic
from instruct import Instructions, InstructPrompts, OptionalInstructions
from kernels import full, to_device
from model import Transformer, TransformerWithValueHead, generate
from preferences import kl_to_reference, score
from pretraining import (
    MODEL_FLAGS,
    AdamW,
    CompileFlags,
    MemoryFlags,
    MemoryPlanFlags,
    Stage,
    ToolFlags,
    flags_decide,
    gathered,
    place,
    schedule,
    sharded,
    sharded_state,
    unused_plan_flags,
    whole,
)
from report import print_report
from sft import (
    FreezeFlags,
    InstructionFlags,
    LoRAFlags,
    Packed,
    add_lora,
    freeze_layers,
    frozen_layers_in_common,
    instructions,
    merged_state,
    note_of_frozen,
)
from tinystories import Prompts, Windows
from tokenizer import check_same_tokenizer, stop_ids


@dataclass
class RLHFFlags:
    """PPO: prompts, reward and report"""

    ppo_iters: int = flag(
        0,
        "PPO iterations; 0 means until max_iters, which includes the iterations of the checkpoint",
    )
    reward: str = flag(
        "length",
        "length (--target_len), FILE.py:FUNCTION with the parameters (prompts, responses), or the "
        "checkpoint of a reward model (.pt, --reward_device)",
    )
    target_len: int = flag(
        200, "total length of prompt and response, in tokens, that the length reward prefers"
    )
    reward_device: str = flag("", "device of the reward model; default: --device")
    ref_device: str = flag("", "device of the frozen reference model; default: --device")
    offload: bool = flag(
        False,
        "move reference and reward model to CPU memory while they are unused (with --fsdp the "
        "reward model alone: the reference is sharded)",
    )
    start_len: int = flag(30, "prompts are BOS and the first 0 to start_len - 1 tokens of a text")
    value_learning_rate: float = flag(
        0.0, "learning rate of a separate critic; 0 means learning_rate"
    )
    ppo_warmup_steps: int = flag(10, "optimizer steps of linear warm-up")
    ptx_data: str = flag("", "pretraining text for --ptx_coef, a folder or file; default: --data")
    roof_prompts: int = flag(32, "prompts for the estimate of the best achievable J (J*)")
    roof_samples: int = flag(128, "samples of the reference model per prompt for J*")
    report_rollouts: int = flag(512, "rollouts per model in the final report")
    ppo_debug: bool = flag(False, "print all statistics of each iteration")


# Flags that the report of a run depends on, besides its checkpoint.
MEASUREMENT_FLAGS = (
    *("data", "val_data", "template", "tokenizer", "start_len", "seed", "max_gen_len"),
    *("temperature", "reward", "target_len", "init_kl_coef", "report_rollouts"),
    *("roof_prompts", "roof_samples"),
)


def is_instruction_file(data):
    """Whether --data names a file of instructions, not a folder of text."""
    return data.partition(",")[0].endswith((".json", ".jsonl"))


def ppo_config(args):
    """The PPOConfig of a command line. Raises ValueError for values that do not fit together."""
    return ppo.PPOConfig(
        mini_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.grad_clip,
        **{name: getattr(args, name) for name in flag_names(ppo.PPOConfig)},
    )


@contextmanager
def on_device(model, device, offload):
    """A context with a frozen model on its device. With offload the model is moved there from CPU
    memory, and back at the end."""
    if offload:
        model.to(device)
    try:
        yield model
    finally:
        if offload:
            model.to("cpu")


def share_weights(model, other):
    """Makes the parameters of a model those of `other`, which has modules of the same names."""
    for name, module in model.named_modules():
        module._parameters.update(
            {k: other.get_submodule(name)._parameters[k] for k in module._parameters}
        )


# ----------------------------------------------------------------------------
# rewards: f(prompts, responses, ended) -> one number per response, or a list with one per token


class LengthReward:
    """The reward −|target_len − tokens| / 100 of the original implementation, where tokens counts
    prompt and response including the end token."""

    def __init__(self, target_len=200):
        self.target_len = target_len

    def __call__(self, prompts, responses, ended):
        return [-abs(self.target_len - len(p) - len(r)) / 100 for p, r in zip(prompts, responses)]


def load_reward(spec, target_len, decode):
    """Returns the reward function that --reward=spec names: `length`, or FILE.py:FUNCTION. FUNCTION
    is called with (prompts, responses), two lists of strings, or of lists of token ids if it has
    the attribute `tokens = True`. It returns one number per response, or per response one list with
    one number per token. An exception of FUNCTION is raised as RewardError with the line of the
    file."""
    if spec == "length":
        return LengthReward(target_len)
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(
            f"--reward={spec}: expected `length`, FILE.pt or FILE.py:FUNCTION, such as calm.py:calm"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward={spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location("reward_file", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where a dataclass looks for its annotations
    sys.path.append(str(Path(path).resolve().parent))  # for what it imports from its own folder

    def call(code):  # an error in the user's code becomes one line with its location
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # which it may switch off
                return code()
        except Exception as e:
            frames = traceback.extract_tb(e.__traceback__)
            lines = [f", line {f.lineno}" for f in frames if f.filename == module_spec.origin]
            line = lines[-1] if lines else ""
            raise ppo.RewardError(f"--reward={spec}{line}: {type(e).__name__}: {e}") from e

    largest = torch.finfo(torch.float32).max
    call(lambda: module_spec.loader.exec_module(module))
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward={spec}: {path} has no function {name}")

    def plain(x):  # rewards may be tensors or arrays
        return x.tolist() if hasattr(x, "tolist") else x

    def reward(prompts, responses, ended):
        read = list if getattr(function, "tokens", False) else decode  # copies: it may change them
        texts = [[read(x) for x in xs] for xs in (prompts, responses)]
        scores = call(lambda: function(*texts))
        if scores is None:
            raise ppo.RewardError(
                f"--reward={spec}: {name} returned None, not one number per response: a `return` "
                "is missing"
            )
        scores = call(lambda: plain(scores))
        if isinstance(scores, (dict, set, str, int, float)):
            raise ppo.RewardError(
                f"--reward={spec}: {name} returned {type(scores).__name__}, not a list with one "
                "number per response"
            )
        scores = call(lambda: [plain(x) for x in scores])
        if len(scores) != len(prompts):
            raise ppo.RewardError(
                f"--reward={spec} returned {len(scores)} scores for {len(prompts)} responses"
            )
        for x in (plain(x) for s in scores for x in (s if isinstance(s, (list, tuple)) else [s])):
            if not isinstance(x, (int, float)) or not abs(x) <= largest:
                x = "a number beyond float32" if isinstance(x, int) else repr(x)[:40]
                raise ppo.RewardError(
                    f"--reward={spec} returned {x} as a score, not a finite number"
                )
        return scores

    return reward


def load_reward_model(path, policy_args, template):
    """Loads the checkpoint of a reward model (--rm) and folds its gain and bias into the value
    head, whose output is then the normalized reward. Raises ValueError if the checkpoint is not a
    reward model, or if its vocabulary, context or template does not fit the policy's ModelArgs and
    template."""
    checkpoint = load_checkpoint(path)
    found = checkpoint.get("reward")
    if not isinstance(found, dict) or not {"gain", "bias"} <= found.keys():
        raise ValueError(f"{path} is not a reward model: train one with --rm")
    args = checkpoint["model_args"]
    if args["vocab_size"] != policy_args.vocab_size:
        raise ValueError(
            f"the reward model {path} has a vocabulary of {args['vocab_size']} tokens, the policy "
            f"has {policy_args.vocab_size}: train a reward model from the policy's checkpoint"
        )
    if args["max_seq_len"] < policy_args.max_seq_len:
        raise ValueError(
            f"the reward model {path} has a context of {args['max_seq_len']} tokens, the policy "
            f"has {policy_args.max_seq_len}: the context of the reward model must not be shorter"
        )
    if template != checkpoint.get("template"):
        raise ValueError(
            f"the reward model {path} was trained with the template {checkpoint.get('template')}, "
            f"the policy has {template}: both need the same template"
        )
    gain, bias = checkpoint["reward"]["gain"], checkpoint["reward"]["bias"]
    state = checkpoint["model"]
    state["value_head.weight"] = gain * state["value_head.weight"]
    state["value_head.bias"] = gain * state["value_head.bias"] + bias
    return checkpoint


class ModelReward:
    """The reward function of a reward model: one score per response."""

    def __init__(self, checkpoint, device, offload, batch_size, autocast, dtype=torch.float32):
        model = model_from_checkpoint(checkpoint, TransformerWithValueHead, dropout=0.0)
        halve_frozen([model.requires_grad_(False)], dtype)
        self.model = model.eval().to("cpu" if offload else device)
        self.device, self.offload, self.size, self.autocast = device, offload, batch_size, autocast

    @torch.no_grad()
    def __call__(self, prompts, responses, ended):
        texts = [p + r for p, r in zip(prompts, responses)]
        with on_device(self.model, self.device, self.offload) as model, self.autocast():
            parts = [
                score(model, texts[i : i + self.size]) for i in range(0, len(texts), self.size)
            ]
        return torch.cat(parts).tolist()


# ----------------------------------------------------------------------------
# the best achievable objective


def best_achievable_objective(scores, beta):
    """Estimates J*, the mean over prompts of β log E_ref[exp(r / β)]. `scores` (prompts, samples)
    are the rewards of samples of the reference. Returns J* and half the width of its 95 %
    confidence interval. For β = 0, J* is the mean of each prompt's highest score.

    The logarithm of a mean of n samples is biased: to first order it is too low by half the
    relative variance of the mean, (Σ w² − 1/n) / 2 with w = softmax(r / β), and the estimate adds
    this term. With 128 samples of stories260K, J* was too low by 0.008, 0.017 and 0.026 at β = 0.2,
    0.05 and 0.02 without the correction, and by 0.000, 0.007 and 0.019 with it."""
    scores, n = scores.double(), scores.shape[1]
    per_prompt, variance = scores.max(1).values, torch.zeros(1)
    if beta:
        variance = (scores / beta).softmax(1).square().sum(1) - 1 / n
        per_prompt = beta * ((scores / beta).logsumexp(1) - math.log(n) + variance / 2)
    # The spread over prompts includes the sampling error. A single prompt has no spread, so that
    # its sampling error is used.
    spread = per_prompt.std() if len(per_prompt) > 1 else beta * variance[0].sqrt()
    return per_prompt.mean().item(), 1.96 * spread.item() / math.sqrt(len(per_prompt))


# ----------------------------------------------------------------------------
# the stage


class RLHF(Stage):
    """PPO against a reward; one training iteration is one iteration of ppo.PPOTrainer."""

    prefix = "ppo_"
    flags = (
        RLHFFlags,
        ppo.PPOConfig,
        MemoryFlags,
        CompileFlags,
        InstructionFlags,
        FreezeFlags,
        LoRAFlags,
        MemoryPlanFlags,
        ToolFlags,
    )
    # Published commands for PPO contain flags of pretraining. Those that describe the model are
    # compared with the checkpoint; the others are ignored.
    accepted = (
        *(name for name in MODEL_FLAGS if name != "head_dim"),  # which no published command has
        "vocab_source",
        "dropout",
        "warmup_iters",
        "eval_iters",
    )

    @staticmethod
    def unused(args):
        yield from unused_plan_flags(args)
        from_file, ptx_file = (
            is_instruction_file(d) for d in (args.data, args.ptx_data or args.data)
        )
        if args.reward != "length":
            yield ["target_len"], "has no effect without --reward=length"
        if not args.reward.endswith(".pt"):
            yield ["reward_device"], "has no effect without a reward model, --reward=FILE.pt"
        if not args.ptx_coef:
            yield ["ptx_data"], "has no effect without --ptx_coef"
        if not from_file:
            yield ["val_data"], "has no effect without --data=FILE.json or .jsonl"
        else:
            yield ["start_len"], "has no effect with --data=FILE.json or .jsonl"
        if not from_file and not (args.ptx_coef and ptx_file):
            yield ["template"], "has no effect without --data=FILE.json or .jsonl"
        if not args.adap_kl_ctrl:
            yield ["target", "horizon"], "has no effect without --adap_kl_ctrl"
        if args.kl_in != "reward":
            yield ["whiten_rewards"], "has no effect without --kl_in=reward"
        if not args.lora_rank:
            yield ["lora_alpha", "lora_layers"], "has no effect without --lora_rank"
        elif args.advantage != "gae" or args.value_model == "shared":
            yield ["freeze_layers"], "has no effect on adapters, only on a separate critic"
        if args.fsdp:
            yield ["checkpoint_activations"], "is part of --fsdp"
            yield ["ref_device"], "has no effect with --fsdp, which shards the reference"
        critic = (
            "value_model",
            "lam",
            "lam_value",
            "vf_coef",
            "critic_warmup",
            "value_learning_rate",
        )
        if args.advantage != "gae":
            yield critic, "has no effect without --advantage=gae"
        elif args.value_model == "shared":
            yield critic[-2:], "has no effect with --value_model=shared"
        else:
            yield ["vf_coef"], "has no effect without --value_model=shared"
        if args.advantage in ("rloo", "grpo"):
            yield ["gamma"], f"has no effect with --advantage={args.advantage}"

    # Kernel launches take most of the time of these models, not arithmetic.
    fp32_dim = 288
    positive = "roof_prompts", "roof_samples", "report_rollouts", "start_len"
    signed = "entropy_coef", "missing_eos_penalty"
    continues_count = True
    resumes_same_flags_only = True
    evaluates_its_checkpoint = True
    input_errors = (ppo.RewardError,)
    check_errors = (ppo.Mismatch,)

    @classmethod
    def check(cls, run):
        super().check(run)
        for device in run.args.ref_device, run.args.reward_device:
            choose_device(device)
        if run.args.fsdp and run.args.ptx_coef and run.args.batch_size < 8 * run.world:
            raise ValueError(
                f"--ptx_coef with --fsdp on {run.world} processes needs a text for each of them: "
                f"--batch_size={8 * run.world} or more"
            )
        if run.compile and run.rank == 0 and (run.args.fsdp or not run.device.startswith("cuda")):
            print("note: --compile is ignored: PPO compiles only on cuda, and not with --fsdp")
        names = "reward_scale", "reward_clip", "missing_eos_penalty"
        flags = ", ".join(f"--{name}" for name in names if getattr(run.args, name))
        if run.rank == 0 and flags:
            print(
                f"note: {flags}: PPO trains on changed rewards; J and J* are of the original ones"
            )
        source = run.args.init_from
        if run.args.eval_only and source not in ("scratch", "resume"):
            raise ValueError(f"--eval_only evaluates {run.args.out_dir}/ppo_ckpt.pt, not {source}")
        if run.args.averaging >= 1:
            raise ValueError(f"--averaging must be below 1, not {run.args.averaging}")

    @staticmethod
    def shard_folders(args):
        data = [args.data, *([args.ptx_data or args.data] if args.ptx_coef else [])]
        return [d for d in data if not is_instruction_file(d)]

    @staticmethod
    def uses_template(args):
        ptx = args.ptx_data or args.data
        return is_instruction_file(args.data) or bool(args.ptx_coef) and is_instruction_file(ptx)

    @staticmethod
    def end_iteration(args, checkpoint):
        resumed = "ppo" in checkpoint
        first = checkpoint["ppo"]["first"] if resumed else checkpoint["iter_num"]
        if not resumed and not args.ppo_iters and args.max_iters <= first:
            raise ValueError(
                f"--max_iters={args.max_iters} includes the {first} iterations of the checkpoint, "
                "so that none is left: --ppo_iters=N runs N iterations of PPO"
            )
        return first + args.ppo_iters if args.ppo_iters else args.max_iters

    @staticmethod
    def show_report(run):
        """Prints the report of a run. Returns False if there is none of the newest checkpoint with
        the flags given."""
        args, path = run.args, Path(run.args.out_dir) / "ppo_report.json"
        report, checkpoint = read_json(path), path.with_name("ppo_ckpt.pt")
        if not {"flags", "beta", "roof", "before", "after"} <= report.keys():
            return False  # none, or one of an earlier version
        names = set(MEASUREMENT_FLAGS) & set(getattr(args, "given", ()))
        if any(report["flags"].get(k) != getattr(args, k) for k in names):
            return False
        if checkpoint.exists() and path.stat().st_mtime < checkpoint.stat().st_mtime:
            return False  # a run has gone on since then
        if run.rank == 0:
            print_report(report)
        return True

    def __init__(self, run, checkpoint):
        args = run.args
        self.run, self.args, self.tokenizer = run, args, run.tokenizer
        self.rank, self.world = run.rank, run.world
        config = ppo_config(args)
        weights = checkpoint["ppo"]["reference"] if "ppo" in checkpoint else checkpoint["model"]
        start = {"model": weights, "model_args": checkpoint["model_args"]}

        def build(source, kind):
            return model_from_checkpoint(source, kind, dropout=0.0)

        shared = config.value_model == "shared"
        self.model = build(start, TransformerWithValueHead if shared else Transformer)
        reference = build(start, Transformer).requires_grad_(False)
        if args.lora_rank:
            add_lora(self.model, args.lora_rank, args.lora_alpha, 0.0, args.lora_layers)
            if shared:
                self.model.value_head.requires_grad_(True)
        else:
            freeze_layers(self.model, args.freeze_layers)
        self.ref_device = args.ref_device or run.device
        self.offload = args.offload and not args.fsdp
        if args.fsdp:
            place(reference, run)
        else:
            if args.lora_rank and not self.offload and self.ref_device == run.device:
                share_weights(reference, self.model)  # the model without its adapters
            # In float16 the update, and so the model that is partly frozen, is in fp32.
            partly_frozen = args.lora_rank or args.freeze_layers
            update_in_fp32 = partly_frozen and run.dtype == torch.float16
            half = [self.model]
            if run.dtype_on(self.ref_device) == run.dtype:
                half.append(reference)
            halve_frozen(half, torch.float32 if update_in_fp32 else run.dtype)
            reference.to("cpu" if self.offload else self.ref_device)
        place(self.model, run)
        self.load_texts(config)
        self.optimizers = [self.make_optimizer(self.model, args.learning_rate)]
        critic = None
        if config.advantage == "gae" and not shared:
            source, path = start, config.value_model
            if config.value_model != "separate" and not path.endswith(".pt"):
                raise ValueError(f"--value_model={path}: expected separate, shared or FILE.pt")
            if path != "separate":
                source = load_checkpoint(path)
                if "reward" in source:
                    source = self.load_reward_model(path)
                else:
                    self.check_tokenizer(path, source)
            critic = freeze_layers(build(source, TransformerWithValueHead), args.freeze_layers)
            if critic.args.vocab_size != self.model.args.vocab_size:
                raise ValueError(
                    f"--value_model={path} has a vocabulary of {critic.args.vocab_size} tokens, "
                    f"the policy has {self.model.args.vocab_size}"
                )
            if critic.args.max_seq_len < self.model.args.max_seq_len:
                raise ValueError(
                    f"--value_model={path} has a context of {critic.args.max_seq_len} tokens, "
                    f"the policy has {self.model.args.max_seq_len}"
                )
            if not args.fsdp and run.dtype != torch.float16:  # in which the update is in fp32
                halve_frozen([critic], run.dtype)
            place(critic, run)
            rate = args.value_learning_rate or args.learning_rate
            self.optimizers.append(self.make_optimizer(critic, rate))
        models = self.model, reference, critic
        self.trainer = ppo.PPOTrainer(
            config,
            self.model,
            reference,
            critic,
            self.optimizers[0],
            self.optimizers[1] if critic else None,
            run.autocast,
            self.ptx_batch,
            stop_ids=tuple(sorted(self.stop_ids)),
            common_layers=0 if args.fsdp else frozen_layers_in_common(*models),
        )
        if args.reward.endswith(".pt"):
            device = args.reward_device or run.device
            checkpoint_of_reward = self.load_reward_model(args.reward)
            options = args.offload, args.batch_size, run.autocast, run.dtype_on(device)
            self.reward = ModelReward(checkpoint_of_reward, device, *options)
        else:
            self.reward = load_reward(args.reward, args.target_len, self.decode)
        if run.compile and not args.fsdp and run.device.startswith("cuda"):
            models = self.model, reference, critic, getattr(self.reward, "model", None)
            for model in filter(None, models):
                model.compiled_hidden = True
        self.position = self.ptx_position = 0
        self.first, self.j_star = checkpoint["iter_num"], None

    def load_reward_model(self, path):
        """The function load_reward_model, with a check of the tokenizer."""
        checkpoint = load_reward_model(path, self.model.args, self.run.metadata.get("template"))
        self.check_tokenizer(path, checkpoint)
        return checkpoint

    def check_tokenizer(self, path, checkpoint):
        """Raises ValueError if the tokenizer of the checkpoint at path is not the policy's."""
        hashes = self.run.metadata.get("tokenizer_hash"), checkpoint.get("tokenizer_hash")
        check_same_tokenizer("the policy", hashes[0], path, hashes[1])

    def load_texts(self, config):
        """Sets self.prompts (for training) and self.held_out (for the report), which are the first
        tokens of texts, or instructions if --data names a file of them; self.text, on which the
        report measures forgetting; self.ptx_text, the pretraining text of PPO-ptx; and
        self.stop_ids."""
        args, vocab = self.args, self.model.args.vocab_size
        context_length = self.model.args.max_seq_len
        template, end_ids = self.run.template, self.run.metadata.get("end_ids")
        texts, ptx = (self.tokenizer, template), args.ptx_data or args.data
        self.stop_ids = stop_ids(self.tokenizer, end_ids=end_ids)
        if is_instruction_file(args.data):
            self.stop_ids = stop_ids(self.tokenizer, template, end_ids)
            max_prompt = context_length - min(config.max_gen_len, context_length // 2)
            self.prompts, self.held_out = (
                instructions(InstructPrompts, args, split, *texts, max_prompt)
                for split in ("train", "val")
            )
            self.text = None  # without answers there is no text to measure the loss on
            if self.held_out.answered:
                kind = OptionalInstructions
                self.text = Packed(instructions(kind, args, "val", *texts, context_length))
            if self.rank == 0:
                print(f"train: {self.prompts.summary()}\nval: {self.held_out.summary()}")
        else:
            if args.start_len >= context_length:
                raise ValueError(
                    f"--start_len={args.start_len}: prompts must be shorter than the model's "
                    f"context of {context_length} tokens"
                )
            bos = self.run.metadata.get("bos", True)
            self.prompts = Prompts(args.data, "train", args.start_len, vocab, args.seed, bos)
            # The held-out data do not depend on --seed, so that runs can be compared.
            self.held_out = Prompts(args.data, "val", args.start_len, vocab, bos=bos)
            self.text = Windows(args.data, "val", min(context_length, 256), vocab)
        if config.ptx_coef:
            if is_instruction_file(ptx):
                # Without --val_data, 10 % of --data are held out; --ptx_data may have them too.
                held_out = is_instruction_file(args.data) and not args.val_data
                split = "train" if held_out else "all"
                samples = Instructions(ptx, split, *texts, context_length, args.seed + 1)
                self.ptx_text = Packed(samples)
                if self.rank == 0:
                    print(f"ptx: {samples.summary()}")
            else:
                self.ptx_text = Windows(ptx, "train", context_length, vocab, args.seed + 1)

    def ptx_batch(self):
        """This rank's part of the next batch of pretraining text. Returns (weight, tokens, targets)
        and, for packed text, the lengths. `weight` is the weight of the part's mean loss in the
        mean over all tokens of the batch; a rank without a part returns (0.0,)."""
        n, device = max(self.args.batch_size // 8, 1), self.run.device
        first, last = (n * r // self.world for r in (self.rank, self.rank + 1))
        position, self.ptx_position = self.ptx_position + first, self.ptx_position + n
        if first == last:
            return (0.0,)
        x, y, *packed = self.ptx_text.batch(position, last - first)
        expected = (packed[1] if packed else y.numel()) * n / (last - first)
        weight = int((y >= 0).sum()) / expected
        lengths = packed[:1]
        return weight, to_device(x, device), to_device(y, device), *lengths

    def make_optimizer(self, model, rate):
        """AdamW with weight decay on matrices only and a linear warm-up of the learning rate. The
        parameter groups count the steps, so that checkpoints contain the count."""
        a = self.args
        params = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": a.weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, rate, (a.beta1, a.beta2), a.adam_eps, fused=True)
        for g in optimizer.param_groups:
            g.update(peak_lr=rate, scale=1.0, steps=0)

        def warm_up(optimizer, args, kwargs):
            for g in optimizer.param_groups:
                g["steps"] += 1
                warm = min(1.0, g["steps"] / max(a.ppo_warmup_steps, 1))
                g["lr"] = g["peak_lr"] * g["scale"] * warm

        optimizer.register_step_pre_hook(warm_up)
        return optimizer

    def decode(self, ids):
        if self.tokenizer is None:
            raise ValueError(
                "the reward function needs the tokenizer of the model: name it with --tokenizer"
            )
        return self.tokenizer.decode(ids)

    def sample(self, model, prompts):
        """Samples a response of `model` to each prompt, with the same random numbers in every call.
        Returns the responses, lists of token ids, and whether each ended with an end token (B,)."""
        c = self.trainer.config
        random = torch.Generator().manual_seed(self.args.seed)
        uniform = torch.rand(len(prompts), c.max_gen_len, generator=random)
        with self.trainer.autocast():
            out = generate(
                model,
                prompts,
                c.max_gen_len,
                c.temperature,
                stop_ids=self.stop_ids,
                uniform=uniform,
                max_batch=512,
            )
        return out.responses(), out.ended

    def scores(self, prompts, responses, ended):
        """One score per response (B,), the sum if the reward function returns one per token."""
        scores = self.reward(prompts, responses, ended)
        return torch.tensor([float(torch.as_tensor(s).sum()) for s in scores])

    @torch.no_grad()
    def measure(self, model, reference):
        """Statistics of a model for the report. Of its responses to held-out prompts: J, reward,
        exact KL to the reference in nats per response, lengths, the share that ended with an end
        token, and the loss of the reference in nats per token. Of held-out text: the loss of the
        model."""
        t, n, size = self.trainer, self.args.report_rollouts, self.args.batch_size
        prompts = self.held_out.batch(0, n)
        responses, ended = self.sample(model, prompts)
        scores = self.scores(prompts, responses, ended)
        with t.autocast():
            kl, ref = kl_to_reference(
                model, reference, prompts, responses, size, t.config.temperature
            )
        kl = float(kl.mean())
        lengths = torch.tensor([len(q) + len(r) for q, r in zip(prompts, responses)]).float()
        return {
            "objective": float(scores.mean()) - t.config.init_kl_coef * kl,
            "reward": float(scores.mean()),
            "kl": kl,
            "length_mean": float(lengths.mean()),
            "length_std": float(lengths.std(correction=min(1, len(lengths) - 1))),
            "ended": float(ended.float().mean()),
            "ref_loss": -float(ref.sum()) / sum(map(len, responses)),
            **({"val_loss": self.text_loss(model)} if self.text else {}),
            "scores": scores.tolist(),
            "lengths": lengths.int().tolist(),
            "texts": [q + r for q, r in zip(prompts[:64], responses)],
        }

    def text_loss(self, model):
        """The loss on the first 64 samples of held-out text, in nats per token. An increase shows
        forgetting."""
        total, count, device = 0.0, 0, model.output.weight.device
        n_samples = min(64, len(self.text))
        for i in range(0, n_samples, 16):
            x, y, *packed = self.text.batch(i, min(16, n_samples - i))
            n = int((y >= 0).sum())
            with self.trainer.autocast():
                total += n * float(model(x.to(device), y.to(device), *packed[:1]))
            count += n
        return total / count

    def without_effect(self):
        # Published commands contain these flags, so that they are no errors.
        given = getattr(self.args, "given", ())
        ignored = ["warmup_iters", "eval_iters", *(["dropout"] if self.args.dropout else [])]
        lines = [f"--{name} has no effect with --ppo" for name in ignored if name in given]
        if "max_iters" in given and self.args.ppo_iters:
            lines.append("--max_iters has no effect with --ppo_iters")
        if "target_kl" in given and self.args.ppo_epochs == 1:
            lines.append("--target_kl has no effect with --ppo_epochs=1")
        trained = self.trainer.critic if self.args.lora_rank else self.model
        return [*lines, *note_of_frozen(trained, self.args.freeze_layers)]

    def begin(self):
        """Estimates J*. A resumed run removes the report, which is of an earlier policy; that of an
        earlier run is moved aside with its checkpoints."""
        j_star, error = self.estimate_j_star()
        if self.rank == 0:
            scores = self.reference_scores
            known = f"±{error:.3f} (95 %), from reference samples"
            interval = known if scores.numel() > 1 else "from one reference sample"
            print(f"best achievable J* = {j_star:.3f} {interval}")
            if scores.numel() >= 16 and scores.min() == scores.max():
                print(
                    f"note: the reward of all {scores.numel()} samples is {scores[0, 0]:g}, so "
                    "that PPO has nothing to learn\n    from; choose a reward that differs between "
                    "samples of this model"
                )
            if self.run.resumed and not self.args.eval_only:
                (Path(self.args.out_dir) / "ppo_report.json").unlink(missing_ok=True)

    def end(self):
        states = gathered([self.trainer.reference.state_dict(), self.result()], self.rank == 0)
        if self.rank == 0:
            self.report(*states)

    def report(self, *states):
        """Measures the reference and the result, of which `states` has the weights, with the same
        prompts and random numbers. Prints the report, with the first response that PPO changed, and
        writes it to ppo_report.json, unless --eval_only has found the report of the run there."""
        models = []
        for state in states:
            state = {k: w for k, w in state.items() if not k.startswith("value_head.")}
            source = {"model": state, "model_args": checkpoint_args(self.model.args)}
            model = model_from_checkpoint(source, dropout=0.0).requires_grad_(False).eval()
            halve_frozen([model], self.run.dtype_on(self.ref_device))
            models.append(model.to(self.ref_device))
        before, after = (self.measure(model, models[0]) for model in models)
        pairs = list(zip(before.pop("texts"), after.pop("texts")))
        changed = next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])
        for measured, ids in zip((before, after), changed):
            measured["story"] = self.decode(ids) if self.tokenizer else ""
        report = {
            "beta": self.trainer.config.init_kl_coef,
            "reward": self.args.reward,
            "flags": {name: getattr(self.args, name) for name in MEASUREMENT_FLAGS},
            "prompts": min(self.args.report_rollouts, len(self.held_out)),
            "roof": self.j_star,
            "before": before,
            "after": after,
        }
        path = Path(self.args.out_dir) / "ppo_report.json"
        if not (self.args.eval_only and path.exists()):
            with write_atomic(path, "w") as f:
                json.dump(report, f)
        print_report(report)

    def estimate_j_star(self):
        """J* and half the width of its 95 % confidence interval, from scores of samples of the
        reference. The scores are cached in out_dir/roof.json; the key of the cache has everything
        that they depend on."""
        a, c = self.args, self.trainer.config
        reference, names = self.trainer.reference, dict(self.trainer.reference.named_parameters())
        tensors = [full(p) for k, p in reference.state_dict().items() if k in names]
        weights = float(sum(p.cpu().double().abs().sum() for p in tensors))
        # Prompts that are drawn twice would count as independent in the error of J*.
        prompts = self.held_out.batch(0, n_prompts := min(a.roof_prompts, len(self.held_out)))
        key = [a.reward, a.target_len, prompts, a.roof_samples, a.seed, sorted(self.stop_ids)]
        key += [c.max_gen_len, c.temperature, weights]
        # The reward may have changed under the same name: the file, or the code of a built-in one.
        path = a.reward if a.reward.endswith(".pt") else a.reward.rpartition(":")[0]
        code = Path(path).read_bytes() if path else inspect.getsource(type(self.reward)).encode()
        key.append(hashlib.sha256(code).hexdigest())
        path = Path(a.out_dir) / "roof.json"
        try:
            saved = json.loads(path.read_text())
            scores = torch.tensor(saved["scores"]) if saved["key"] == key else None
        except (OSError, ValueError, LookupError, TypeError):  # none, or another file
            scores = None
        if scores is None:
            if self.rank == 0:
                n = f"{n_prompts} × {a.roof_samples}"
                print(f"estimating J* from {n} responses of the reference model ...", flush=True)
            prompts = [p for p in prompts for _ in range(a.roof_samples)]
            reference = self.trainer.reference
            with on_device(reference, self.ref_device, self.offload), whole(reference):
                responses, ended = self.sample(reference, prompts)
            scores = self.scores(prompts, responses, ended).view(n_prompts, a.roof_samples)
            if self.rank == 0:
                with write_atomic(path, "w") as f:
                    json.dump({"key": key, "scores": scores.tolist()}, f)
        self.reference_scores = scores  # (prompts, samples)
        self.j_star = best_achievable_objective(scores, c.init_kl_coef)
        return self.j_star

    def step(self, iteration):
        a, c, t0 = self.args, self.trainer.config, time.perf_counter()
        for g in (g for o in self.optimizers for g in o.param_groups):
            g["scale"] = schedule(iteration, a, self.first, self.run.end_iteration, warmup=0)
        n_prompts = c.rollouts // c.group_size
        prompts = self.prompts.batch(self.position, n_prompts)
        prompts = [p for p in prompts for _ in range(c.group_size)]
        policy = self.trainer.policy
        # Only here: the batch has the same size in each iteration. FSDP moves the weights.
        policy.compiled_decoding = self.run.compile and not a.fsdp
        with whole(self.model):
            rollouts = self.trainer.rollout(prompts, a.seed + iteration)
        policy.compiled_decoding = False
        t1 = time.perf_counter()
        scores = self.reward  # with exact_end the trainer calls it for each end
        if not c.exact_end:
            scores = self.reward(rollouts.queries, rollouts.responses, rollouts.ended)
        with on_device(self.trainer.reference, self.ref_device, self.offload):
            stats = self.trainer.step(rollouts, scores)
        response = rollouts.responses[0]
        if c.exact_end:  # it goes on past its ends
            end = int(rollouts.ending[: len(response)].argmax())
            response = response if end == len(response) - 1 else response[:end]
        self.last = rollouts.queries[0], response, rollouts.scores[0]
        t2 = time.perf_counter()
        # Advanced last, so that the prompts are used again after an error of the reward function.
        self.position += n_prompts
        # β may have changed since the last iteration.
        j_star, _ = best_achievable_objective(self.reference_scores, stats["ppo/kl_coef"])
        update = stats["time/ppo/optimize_step"] + stats["time/ppo/calc_stats"]
        return stats | {
            "ppo/objective_roof": j_star,
            "time/ppo/rollout": t1 - t0,
            "time/ppo/scoring": t2 - t1 - update,
            "time/ppo/iteration": t2 - t0,
        }

    def line(self, iteration, s):
        if self.args.ppo_debug:
            return json.dumps({"iter": iteration, **s}, indent=4)
        policy = "no policy step"  # --critic_warmup, or ratio_threshold skipped every step
        if "ppo/policy/entropy" in s:
            entropy, clipped = s["ppo/policy/entropy"], s["ppo/policy/clipfrac"]
            policy = f"entropy {entropy:.2f} | clip {clipped:5.1%}"
        return (
            f"{iteration:6d} | J {s['ppo/objective']:.3f} of {s['ppo/objective_roof']:.3f} | "
            f"reward {s['ppo/reward']:.3f} | KL {s['ppo/kl_ref']:.2f} | "
            f"length {s['ppo/length/mean']:3.0f} ±{s['ppo/length/std']:3.0f} | "
            f"ended {s['ppo/ended']:4.0%} | {policy} | "
            f"EV {s['ppo/val/explained_variance']:5.2f} | "
            f"norm {s.get('grad_norm', 0.0):.2f} | rollout {s['time/ppo/rollout']:.1f} s | "
            f"scoring {s['time/ppo/scoring']:.1f} s | update {s['time/ppo/optimize_step']:.1f} s"
        )

    def sample_texts(self):
        """The first rollout of the last iteration, and its reward. With exact_end the rollout is
        shown up to its most likely end, and the reward is the mean over its ends."""
        if self.tokenizer is None or not hasattr(self, "last"):
            return {}
        query, response, score = self.last
        score = float(torch.as_tensor(score).sum())
        texts = *(printable(self.decode(x)) for x in (query, response)), f"{score:.3f}"
        return dict(zip(("prompt", "response", "reward"), texts))

    def result(self):
        """The resulting weights: those of the policy, or their average with --averaging, with
        adapters merged."""
        return merged_state(self.model, self.trainer.average)

    def state(self):
        state = {
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
        return gathered(state, keep=self.rank == 0)

    def load_state(self, checkpoint):
        state, critic = checkpoint["ppo"], self.trainer.critic
        saved = checkpoint.get("config", {})
        names = "lora_rank", "lora_alpha", "lora_layers", "freeze_layers", "advantage"
        names += "value_model", "averaging"
        other = [k for k in names if k in saved and saved[k] != getattr(self.args, k)]
        if "averaging" in other and saved["averaging"] and self.args.averaging:
            other.remove("averaging")  # another decay of the same average
        if "value_model" in other and "shared" not in (saved["value_model"], self.args.value_model):
            other.remove("value_model")  # The checkpoint has the weights of a separate critic.
        if other:
            flags = " ".join(f"--{k}={saved[k]}" for k in other)
            raise ValueError(f"the run in {self.args.out_dir} had other flags: add {flags}")
        self.model.load_state_dict(sharded_state(self.model, state["policy"]))
        if critic is not None:
            state["critic"] = sharded_state(critic, state["critic"])
        if self.trainer.average is not None and state["average"] is not None:
            state["average"] = sharded_state(self.model, state["average"])
        models = (self.model, critic)
        names = "optimizer", "critic_optimizer"
        for name, model, optimizer in zip(names, models, self.optimizers):
            state[name] = sharded(two_groups(state[name], model), optimizer)
        with flags_decide(self.optimizers, counters=("steps", "scale")):
            self.trainer.load_state_dict(state)
        # The resumed weights decide: the file of --value_model may have changed since then.
        if self.trainer.common_layers:
            models = self.model, self.trainer.reference, critic
            self.trainer.common_layers = frozen_layers_in_common(*models)
        self.position, self.ptx_position = checkpoint["position"], state["ptx_position"]
        self.first = state["first"]


def two_groups(state, model):
    """Converts the optimizer state of an older checkpoint, which has one parameter group in the
    order of the model, to the two groups of RLHF.make_optimizer: matrices and vectors."""
    if len(state["param_groups"]) > 1:
        return state
    params = [p for p in model.parameters() if p.requires_grad]
    order = sorted(range(len(params)), key=lambda i: params[i].dim() < 2)  # matrices first
    matrices = sum(p.dim() > 1 for p in params)
    group, indices = state["param_groups"][0], list(range(len(params)))
    return {
        "state": {i: state["state"][j] for i, j in enumerate(order) if j in state["state"]},
        "param_groups": [group | {"params": x} for x in (indices[:matrices], indices[matrices:])],
    }
