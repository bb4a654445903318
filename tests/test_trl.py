"""Losses, gradients, advantages and KL estimates equal to those of TRL on the same batches. TRL
computes them on padded batches of a transformers model, with its trainers' own code."""

import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install -r tests/requirements.txt")
import datasets
import transformers
import trl
from test_align import VOCAB, home, stage_of  # noqa: F401

import export
import formats
import ppo
import preferences
import sft
from checkpoint import checkpoint_args, save_checkpoint
from kernels import accelerate
from model import ModelArgs, Transformer

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
COMMON = dict(use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False)


def as_hf(model, home, folder):  # noqa: F811
    """A Transformer as transformers loads it from the files of export.py, and its tokenizer."""
    parts = {"model": model.state_dict(), "model_args": checkpoint_args(model.args)}
    folder.mkdir()
    save_checkpoint(folder / "ckpt.pt", parts)
    flags = [f"--checkpoint={folder / 'ckpt.pt'}", f"--tokenizer={home}/tok{VOCAB}.model"]
    export.main([str(folder / "hf"), *flags, "--format=hf"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    tokenizer.pad_token = "<unk>"
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder / "hf", dtype=torch.float32), tokenizer


def moved(model, seed=0, size=0.05):
    """The model, after a random step away from where it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def assert_same_gradients(model, peer, scale=1.0):
    grads = {k: p.grad * scale for k, p in model.named_parameters()}
    expected = {k: p.grad for k, p in peer.named_parameters()}
    grads = formats.hf_tensors(model.args, grads)
    assert expected.keys() <= grads.keys()
    for k, g in expected.items():
        torch.testing.assert_close(grads[k], g, atol=1e-5, rtol=1e-4)


def test_sft_is_trls(home, tmp_path):  # noqa: F811
    stage, batch = stage_of(sft.FineTuning, home, tmp_path, sft=True)
    peer, tokenizer = as_hf(stage.model, home, tmp_path / "a")
    samples = stage.train.samples.batch(0, 8)
    rows = [
        {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask)]}
        for ids, mask in samples
    ]
    config = trl.SFTConfig(output_dir=str(tmp_path / "trl"), **COMMON)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(peer, config, train_dataset=data, processing_class=tokenizer)
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()
    loss, _, logged = stage.loss(stage.model, batch)
    loss.backward()
    mean = logged["loss/train"][0]
    torch.testing.assert_close(mean, expected.detach(), atol=1e-5, rtol=1e-5)
    # Ours is over the expected number of targets per batch.
    assert_same_gradients(stage.model, trainer.model, float(mean / loss.detach()))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_trls(home, tmp_path, smoothing):  # noqa: F811
    flags = dict(dpo_label_smoothing=smoothing, dpo_beta=0.3)
    stage, batch = stage_of(preferences.DPO, home, tmp_path, dpo=True, **flags)
    reference, tokenizer = as_hf(stage.reference, home, tmp_path / "reference")
    peer, _ = as_hf(moved(stage.model), home, tmp_path / "policy")
    # TRL has this label smoothing in the loss "aot", which sorts a batch: here it has one pair.
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.3,
        loss_type="aot" if smoothing else "sigmoid",
        label_smoothing=smoothing,
        **COMMON,
    )
    text = datasets.Dataset.from_list([{"prompt": "say", "chosen": "a", "rejected": "b"}])
    trainer = trl.DPOTrainer(
        peer, reference, config, train_dataset=text, processing_class=tokenizer
    )
    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, (chosen, rejected) in batch
    ]
    parts = [[row] for row in rows] if smoothing else [rows]
    losses = [trainer.compute_loss(trainer.model, trainer.data_collator(part)) for part in parts]
    expected = sum(losses) / len(losses)
    expected.backward()
    loss = stage.loss(stage.model, batch)[0]
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(stage.model, trainer.model)


def rollouts_of(policy, prompts, responses):
    """The responses as if the policy had sampled them."""
    batch = ppo.pack(prompts, responses, "cpu")
    logits = policy.output(policy.hidden(batch.tokens, batch.lengths)[batch.state_ends])
    logprobs = ppo.logprob_entropy_kl(logits, batch.actions)[0]
    ended = torch.tensor([r[-1] == 1 for r in responses])
    return ppo.Rollouts(prompts, responses, ended, logprobs)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_advantages_and_loss_are_trls(home, tmp_path, kind):  # noqa: F811
    """Two prompts with four responses each, policy and reference apart: TRL's KL estimates (k1 in
    the rewards of RLOO, k3 in the loss of GRPO), advantages, and GRPO's clipped loss."""
    beta, scores = 0.3, torch.randn(8)
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8, max_seq_len=64)
    args = ModelArgs(vocab_size=VOCAB, **sizes)
    policy, reference = (accelerate(moved(Transformer(args), seed, 0.3)) for seed in (1, 2))
    hf_policy, tokenizer = as_hf(policy, home, tmp_path / "policy")
    as_hf(reference, home, tmp_path / "reference")
    tokenizer.eos_token, tokenizer.padding_side = "<s>", "left"
    prompts = [p for p in ([1, 5, 9], [1, 7, 8, 9, 300]) for _ in range(4)]
    responses = [torch.randint(3, VOCAB, (n,)).tolist() + [1] for n in (3, 9, 1, 6, 5, 2, 8, 4)]

    Config, Trainer = (
        (trl.GRPOConfig, trl.GRPOTrainer) if kind == "grpo" else (trl.RLOOConfig, trl.RLOOTrainer)
    )

    class Fixed(Trainer):
        def _generate(self, *prompts_and_more):
            texts = tokenizer.batch_decode(responses)
            if kind == "rloo":
                return prompts, responses, texts
            return prompts, responses, None, texts, None, {}, None, None

    config = Config(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=8,
        num_generations=4,
        beta=beta,
        max_completion_length=20,
        **COMMON | (dict(use_bias_correction_kl=False) if kind == "grpo" else {}),
    )
    hf_policy.config._name_or_path = str(tmp_path / "reference/hf")  # where TRL loads it from
    rows = [{"prompt": "x"}] * 8
    trainer = Fixed(
        hf_policy,
        lambda **columns: scores.tolist(),
        config,
        datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    with torch.no_grad():
        theirs = trainer._generate_and_score_completions(rows)

    c = ppo.PPOConfig(
        init_kl_coef=beta,
        advantage=kind,
        group_size=4,
        rollouts=8,
        whiten_advantages=False,
        kl_penalty="kl",
        kl_in="reward",
    )
    frozen = [None] * 2  # no critic, and no optimizers: nothing is updated
    trainer_here = ppo.PPOTrainer(c, policy, reference, None, *frozen, torch.no_grad, stop_ids={1})
    trainer_here.iteration = 1  # the reference is another model
    ours = rollouts_of(policy, prompts, responses)
    trainer_here.evaluate(ours)
    if kind == "grpo":  # TRL has the KL in the loss, not in the rewards
        c.kl_in_rewards = False
    trainer_here.compute_rewards(ours, scores.tolist(), beta)
    trainer_here.compute_advantages(ours, beta)
    first = ours.counts.cumsum(0) - ours.counts
    # TRL's GRPO divides by the standard deviation + 1e-4, ours by it + 1e-6.
    torch.testing.assert_close(ours.advantages[first], theirs["advantages"], atol=1e-5, rtol=5e-4)
    assert ours.kl.abs().max() > 0.1 and ours.advantages.abs().max() > 0.1
    if kind == "rloo":
        old = ppo.sum_per_rollout(ours.old_logprobs, ours.counts)
        torch.testing.assert_close(old, theirs["old_logps"], atol=1e-4, rtol=1e-5)
        return
    # The ratio must not be 1, so the reference's log-probabilities stand in for the old ones.
    theirs["old_per_token_logps"] = theirs["ref_per_token_logps"]
    expected = trainer._compute_loss(trainer.model, theirs)
    advantages = ppo.expand(theirs["advantages"], ours.counts)
    surrogate, clipped = ppo.policy_loss(ours.old_logprobs, ours.ref_logprobs, advantages, 0.2, 0.2)
    k3 = ppo.kl_estimate(ours.old_logprobs, ours.ref_logprobs, "k3")
    assert clipped.any() and not clipped.all()
    loss = (surrogate + beta * k3).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
