"""Reward models, DPO, and PPO against a reward model, held against formulas and loops written from
the papers, on models of a few thousand parameters."""

import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import finish, processes

import export
import formats
import instruct
import kernels
import ppo
import preferences
import pretraining
import rlhf
import sample
import tinystories
import train
from checkpoint import checkpoint_args, load_checkpoint, model_from_checkpoint, save_checkpoint
from common import printable, run_main
from experiments import preference_data, story_task
from instruct import Template
from kernels import accelerate
from model import ModelArgs, Transformer, TransformerWithValueHead
from tokenizer import Tokenizer

VOCAB = 320  # 256 bytes, 3 control tokens, letters
ARGS = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=8, max_seq_len=64)
NICE, RUDE = "please thank you kindly".split(), "stupid awful hate bad".split()


def reply(words, rng):
    return " ".join(rng.choices(words + ["it", "is", "so", "and"], k=rng.randrange(3, 7)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a vocabulary, a model with random weights, and preferences for nice words."""
    folder, rng = tmp_path_factory.mktemp("home"), random.Random(1)
    tinystories.synthesize(folder, 300, 1)
    tinystories.train_vocab(folder, VOCAB)
    torch.manual_seed(1)
    net = Transformer(ModelArgs(vocab_size=VOCAB, **ARGS))
    with torch.no_grad():
        net.output.weight.mul_(10)
    parts = {"model": net.state_dict(), "model_args": checkpoint_args(net.args), "iter_num": 7}
    save_checkpoint(folder / "ckpt.pt", parts)
    for name, k in (("pairs", 2), ("rankings", 3)):
        with open(folder / f"{name}.jsonl", "w") as f:
            for i in range(150):
                best, worst = (reply(words, rng) for words in (NICE + NICE, RUDE + RUDE))
                middle = ["it is so", "and it is", "so it is"][: k - 2]
                record = {"prompt": f"say {i}", "completions": [best, *middle, worst]}
                f.write(json.dumps(record) + "\n")
    return folder


def argv(home, out, **flags):
    values = dict(
        init_from=home / "ckpt.pt",
        out_dir=out,
        data=home / "pairs.jsonl",
        max_iters=40,
        batch_size=8,
        eval_interval=20,
        eval_iters=4,
        learning_rate=1e-2,
        warmup_iters=3,
        weight_decay=0,
        device="cpu",
        log_interval=100,
        tokenizer=home / f"tok{VOCAB}.model",
    )
    if not flags.get("decay_lr", True):
        del values["warmup_iters"]
    if any(flags.get(stage) for stage in ("rm", "dpo", "ppo")):
        values["max_gen_len"] = 12
    if flags.get("rm") or flags.get("dpo"):
        values["reference_samples"] = 16
    values |= flags
    return [f"--{k}={v}" for k, v in values.items()]


def run(home, out, **flags):
    train.main(argv(home, out, **flags))
    return out


@pytest.fixture(scope="module")
def rm(home, tmp_path_factory):
    return run(home, tmp_path_factory.mktemp("rm"), rm=True)


def records(folder, name, key):
    lines = [json.loads(line) for line in (folder / name).open()]
    return [r[key] for r in lines if key in r]


def stage_of(kind, home, out, **flags):
    """A stage that has not begun, and its first batch."""
    args = train.flags(argv(home, out, **flags))
    stage = train.start(train.setup(args))
    assert isinstance(stage, kind)
    return stage, stage.train.batch(0, args.batch_size)


def error_of(capsys, *line):
    with pytest.raises(SystemExit) as e:
        run_main(lambda: train.main(*line))
    assert e.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    [text] = [line for line in lines if not line.startswith("note: ")]  # which template is used
    return text


def sequences(n, seed, longest=30):
    rng = random.Random(seed)
    return [
        [1] + [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] + [2]
        for _ in range(n)
    ]


def critic(seed=0):
    torch.manual_seed(seed)
    net = accelerate(TransformerWithValueHead(ModelArgs(vocab_size=VOCAB, **ARGS)))
    torch.nn.init.normal_(net.value_head.weight)
    torch.nn.init.normal_(net.value_head.bias)
    return net.eval()


def move(model, size):
    """Adds random numbers to all weights, so that the model is no longer the reference."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn_like(p))


# ----------------------------------------------------------------------------
# the reward model


@pytest.mark.parametrize("native", [True, False])
def test_score_does_not_depend_on_the_batch_or_on_padding(native, rows, monkeypatch):
    """Alone, beside others of any length, and at the end of a dense row: the same score, which is
    that of the last token."""
    if not native:
        monkeypatch.setattr(kernels, "native_attention", lambda x: False)
    net, texts = critic(), sequences(9, 1)
    together = preferences.score(net, texts)
    alone = torch.cat([preferences.score(net, [t]) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        preferences.score(net, texts[::-1]).flip(0), together, atol=1e-5, rtol=0
    )
    for text, s in zip(texts, together):
        padded = torch.tensor([text + [0] * 20])
        dense = net.values(net.hidden(padded))[0, len(text) - 1]
        torch.testing.assert_close(dense, s, atol=1e-5, rtol=0)
    assert together.std() > 0.1


def test_score_of_a_reply_that_fills_the_context():
    """`generate` leaves one token more than a forward pass can read."""
    text = sequences(1, 1, 9)[0] + list(range(3, 70))
    net = critic()
    torch.testing.assert_close(
        preferences.score(net, [text[:65]]), preferences.score(net, [text[:64]])
    )


def test_pairs_of_rankings():
    better, worse, weight = preferences.pairs([2, 3])
    assert list(zip(better.tolist(), worse.tolist())) == [(0, 1), (2, 3), (2, 4), (3, 4)]
    torch.testing.assert_close(weight, torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def test_ranking_loss_is_the_loop_over_pairs(home, tmp_path, rows):
    """Value and gradient, against one forward pass a completion and a Python loop."""
    data = home / "rankings.jsonl"
    stage, batch = stage_of(preferences.RewardModel, home, tmp_path, rm=True, data=data)
    torch.nn.init.normal_(stage.model.value_head.weight)
    loss, tokens, found = stage.loss(stage.model, batch)
    loss.backward()
    gradient = [p.grad.clone() for p in stage.model.parameters() if p.grad is not None]
    stage.model.zero_grad()
    total, margins, all_scores = 0.0, [], []
    for prompt, completions in batch:
        assert len(completions) == 3
        scores = []
        for c in completions:
            x = torch.tensor([prompt + c])
            scores.append(stage.model.value_head(stage.model.hidden(x))[0, -1, 0])
        all_scores += [s.item() for s in scores]
        for a, b in itertools.combinations(scores, 2):
            total = total - torch.log(torch.sigmoid(a - b)) / 3 / len(batch)
            margins.append((a - b).item())
    total.backward()
    torch.testing.assert_close(loss, total)
    for p, g in zip((p for p in stage.model.parameters() if p.grad is not None), gradient):
        torch.testing.assert_close(p.grad, g, atol=1e-5, rtol=1e-4)
    for name, values in (("rm/margin", margins), ("rm/score", all_scores)):
        torch.testing.assert_close(found[name], torch.tensor(values), atol=1e-5, rtol=1e-4)
    assert found["rm/length"].tolist() == [len(c) for _, completions in batch for c in completions]
    assert tokens == sum(len(p) + len(c) for p, cs in batch for c in cs)


def test_calibration_error():
    """Margins drawn so that sigmoid(margin) is true have none; the same, doubled, have some."""
    torch.manual_seed(0)
    size = torch.randn(100_000).abs() * 2
    sign = torch.where(torch.rand(100_000) < size.sigmoid(), 1.0, -1.0)
    assert preferences.calibration_error(size * sign) < 0.01
    assert preferences.calibration_error(3 * size * sign) > 0.05
    # by hand, with bins of equal width from 1/2 to 1
    margins = (torch.randn(300) * 3).tolist()
    confidence = [1 / (1 + math.exp(-abs(m))) for m in margins]
    for bins in (10, 4):
        gaps = [0.0] * bins
        for m, c in zip(margins, confidence):
            gaps[min(int((c - 0.5) * 2 * bins), bins - 1)] += (m > 0) - c
        expected = sum(map(abs, gaps)) / 300
        found = preferences.calibration_error(torch.tensor(margins), bins)
        assert found == pytest.approx(expected, rel=1e-4)


def test_results_on_held_out_pairs():
    """Accuracy, margin, calibration, and the correlation of score and length with its sign; it is
    0 where all scores are equal."""
    margins = torch.tensor([3.0, -1.0])
    for score, correlation in ([1.0, 3.0], 1), ([-1.0, -3.0], -1), ([2.0, 2.0], 0):
        logged = {
            "rm/margin": margins,
            "rm/accuracy": torch.tensor([1.0, 0.0]),
            "rm/score": torch.tensor(score),
            "rm/length": torch.tensor([9.0, 12.0]),
        }
        assert preferences.RewardModel.summary(None, [logged]) == {
            "rm/val/accuracy": 0.5,
            "rm/val/margin": 1.0,
            "rm/val/calibration_error": preferences.calibration_error(margins),
            "rm/val/length_correlation": pytest.approx(correlation),
        }


def test_more_processes_than_held_out_rankings(home, tmp_path, monkeypatch):
    """A process without samples in the evaluation has empty tensors of all logged values."""
    stage, _ = stage_of(preferences.RewardModel, home, tmp_path, rm=True, batch_size=8)
    monkeypatch.setattr(stage, "summary", lambda seen: seen[0])
    seen = {}
    monkeypatch.setattr(type(stage.val), "__len__", lambda self: 5)
    # The sums of both processes, of whom each sees the other's part alone here.
    monkeypatch.setattr(pretraining, "all_sum", lambda *values: [float(v) + 1 for v in values])
    for rank in (0, 1):
        stage.run = replace(stage.run, rank=rank, world=2)
        seen[rank] = stage.evaluate()
    assert len(seen[0]["rm/score"]) == 10 and len(seen[1]["rm/score"]) == 0


def test_rewards_are_normalised_without_dropout(home, tmp_path):
    """And equal scores, such as those of a value head that is still 0, are not divided by 0."""
    stage, _ = stage_of(preferences.RewardModel, home, tmp_path, rm=True, dropout=0.5)
    reward = stage.state()["reward"]
    assert reward["gain"] == 1 and reward["bias"] == 0
    torch.nn.init.normal_(stage.model.value_head.weight)
    one, two = (stage.state()["reward"] for _ in range(2))
    assert one["gain"] == two["gain"] and one["bias"] == two["bias"] and stage.model.training


def test_reward_model_learns_and_is_normalised(home, rm):
    accuracy = records(rm, "rm_log.jsonl", "rm/val/accuracy")
    assert accuracy[0] == 0.5 and accuracy[-1] >= 0.9  # all scores are equal at the start
    checkpoint = load_checkpoint(rm / "rm_ckpt.pt")
    # the logged results against the model of the checkpoint, one held-out completion at a time
    model = model_from_checkpoint(checkpoint, TransformerWithValueHead).eval()
    tokenizer = Tokenizer(str(home / f"tok{VOCAB}.model"))
    template = Template(**checkpoint["template"])
    val = instruct.Rankings(str(home / "pairs.jsonl"), "val", tokenizer, template, 64)
    scores, lengths = [], []
    with torch.no_grad():
        for prompt, completions in val.batch(0, len(val)):
            lengths += [float(len(c)) for c in completions]
            hidden = (model.hidden(torch.tensor([prompt + c]))[0, -1] for c in completions)
            scores += [model.value_head(h).item() for h in hidden]
    margins = torch.tensor(scores[::2]) - torch.tensor(scores[1::2])
    want = {
        "margin": float(margins.mean()),
        "calibration_error": preferences.calibration_error(margins),
        "length_correlation": statistics.correlation(scores, lengths),
    }
    found = {name: records(rm, "rm_log.jsonl", f"rm/val/{name}")[-1] for name in want}
    assert found == pytest.approx(want, rel=1e-3, abs=1e-4) and found["margin"] > 0
    samples = checkpoint["reward"]["samples"]
    assert len(samples) == 16 and not (rm / "rm_model.bin").exists()
    template = checkpoint["template"]
    like = ModelArgs(vocab_size=VOCAB, **ARGS)
    scorer = rlhf.load_reward_model(rm / "rm_ckpt.pt", like, template)
    reward = rlhf.ModelReward(scorer, "cpu", False, 4, nullcontext)
    scores = torch.tensor(reward([[]] * len(samples), samples, None))
    assert scores.mean().abs() < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4


def sft_data(home, folder):
    """Replies of different lengths, in a file."""
    folder.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (home / "pairs.jsonl").open()]
    rows = [
        {"prompt": r["prompt"], "response": " ".join(r["completions"] * (i % 3 == 0) + ["it"])}
        for i, r in enumerate(rows)
    ]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "sft.jsonl"


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_frozen_layers_stay(home, tmp_path, stage):
    """(test_ppo_in_shards tests PPO.)"""
    data = sft_data(home, tmp_path) if stage == "sft" else home / "pairs.jsonl"
    run(home, tmp_path, freeze_layers=1, max_iters=4, data=data, **{stage: True})
    before = load_checkpoint(home / "ckpt.pt")["model"]
    after = load_checkpoint(tmp_path / f"{stage}_ckpt.pt")["model"]
    frozen = {k for k in before if torch.equal(before[k], after[k])}
    first = {k for k in before if k.startswith(("layers.0.", "tok_embeddings", "output"))}
    assert frozen == first


@pytest.mark.parametrize(
    "extra, trained",
    [
        (dict(rm=True), "norm.weight, value_head.weight, value_head.bias"),
        (dict(ppo=True, ppo_iters=1, max_gen_len=4), "norm.weight"),
        (
            dict(ppo=True, ppo_iters=1, max_gen_len=4, lora_rank=2),
            "norm.weight, value_head.weight, value_head.bias",
        ),
    ],
    ids=["rm", "ppo", "critic"],
)
def test_what_is_trained_if_all_layers_are_frozen_is_named(home, tmp_path, capsys, extra, trained):
    run(home, tmp_path, freeze_layers=2, max_iters=1, data=home / "pairs.jsonl", **extra)
    line = f"note: --freeze_layers=2 freezes all layers: only {trained} will be trained\n"
    assert line in capsys.readouterr().err


def test_a_resumed_reward_model_keeps_its_samples(home, tmp_path, capsys):
    """Its gain and bias are of the samples in the checkpoint, and the line says so."""
    flags = dict(rm=True, eval_iters=1)
    run(home, tmp_path, max_iters=1, reference_samples=4, **flags)
    more = flags | dict(init_from="resume", max_iters=2, reference_samples=8, max_gen_len=9)
    capsys.readouterr()
    run(home, tmp_path, learning_rate=1e-3, **more)
    output = capsys.readouterr().out
    assert len(load_checkpoint(tmp_path / "rm_ckpt.pt")["reward"]["samples"]) == 4
    assert "which now apply: learning_rate was 0.01, is 0.001\n" in output
    assert "note: no effect on a resumed run: max_gen_len was " in output
    assert "is 9, reference_samples was 4, is 8\n" in output


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_resumes_to_the_bit(home, tmp_path, stage):
    flags = {stage: True, "eval_interval": 3, "dropout": 0.1, "decay_lr": False}
    run(home, tmp_path / "whole", max_iters=6, **flags)
    run(home, tmp_path / "parts", max_iters=3, **flags)
    run(home, tmp_path / "parts", max_iters=6, **flags | {"init_from": "resume"})
    whole, parts = (load_checkpoint(tmp_path / d / f"{stage}_ckpt.pt") for d in ("whole", "parts"))
    for part in ("model", "optimizer", "reward", "dpo", "position", "tokens", "iter_num"):
        assert str(whole.get(part)) == str(parts.get(part)), part
    for k, v in whole["model"].items():
        assert torch.equal(v, parts["model"][k]), k
    if stage == "dpo":
        start = load_checkpoint(home / "ckpt.pt")["model"]
        assert all(torch.equal(v, start[k]) for k, v in parts["dpo"]["reference"].items())


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("extra", [{}, dict(lora_rank=2)], ids=["", "lora"])
def test_activations_computed_again_change_nothing(home, tmp_path, stage, extra):
    """The flag reaches each layer in each training step, and in no evaluation."""
    if extra and stage != "sft":
        pytest.skip("LoRA is for SFT and PPO")
    flags = {stage: True, "max_iters": 3, "eval_interval": 3, "dropout": 0.1, **extra}
    flags["data"] = sft_data(home, tmp_path) if stage == "sft" else home / "rankings.jsonl"
    calls, found = [], []
    again = pretraining.recompute_in_backward
    for activations in False, True:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(
                pretraining,
                "recompute_in_backward",
                lambda *a, **k: (calls.append(1), again(*a, **k))[1],
            )
            run(home, tmp_path / str(activations), checkpoint_activations=activations, **flags)
        found.append(load_checkpoint(tmp_path / str(activations) / f"{stage}_ckpt.pt"))
        assert len(calls) == activations * ARGS["n_layers"] * flags["max_iters"]
    for name, w in found[0]["model"].items():
        assert torch.equal(w, found[1]["model"][name]), name


@pytest.mark.parametrize(
    "stage, extra, fsdp",
    [
        ("rm", {}, False),
        ("dpo", {}, False),
        ("sft", {}, True),
        ("sft", dict(lora_rank=2), True),
        ("rm", dict(freeze_layers=1), True),
        ("dpo", {}, True),
    ],
)
def test_two_processes_learn_the_same(home, tmp_path, stage, extra, fsdp):
    """Training and the evaluation on held-out rankings equal those of one process. What a sharded
    run has saved is an ordinary checkpoint, which one process can resume."""
    flags = {
        stage: True,
        "max_iters": 6,
        "eval_interval": 3,
        "batch_size": 16 if fsdp else 4,  # 16: rows enough for the kernels of whole layers
        "dropout": 0.0,
        "gradient_accumulation_steps": 2,
        "decay_lr": False,
        "learning_rate": 3e-3,
        "data": sft_data(home, tmp_path) if stage == "sft" else home / "rankings.jsonl",
        **extra,
    }

    def timeless(folder):
        timing = "ms", "mfu", "tokens_per_s"
        lines = [json.loads(line) for line in (tmp_path / folder / f"{stage}_log.jsonl").open()]
        return [{k: v for k, v in r.items() if k not in timing} for r in lines]

    def same():
        for a, b in zip(timeless("one"), timeless("two"), strict=True):
            assert a == pytest.approx(b, abs=2e-5, rel=1e-4)
        one, two = (load_checkpoint(tmp_path / d / f"{stage}_ckpt.pt") for d in ("one", "two"))
        assert one.keys() == two.keys() and one["model"].keys() == two["model"].keys()
        for name, w in one["model"].items():
            torch.testing.assert_close(two["model"][name], w, atol=2e-4, rtol=1e-3)

    run(home, tmp_path / "one", **flags)
    both = processes(2, argv(home, tmp_path / "two", fsdp=fsdp, **flags), tmp_path)
    assert [finish(p) for p in both] == [0, 0], (tmp_path / "rank0.txt").read_text()
    same()
    assert timeless("one")[0]["loss/val"] > timeless("one")[-1]["loss/val"]
    if fsdp:
        flags |= dict(init_from="resume", max_iters=8)
        for folder in "one", "two":
            run(home, tmp_path / folder, **flags)
        same()
    if "lora_rank" in extra:  # and back to shards, whose weights are not those of the file
        flags |= dict(max_iters=9, fsdp=True)
        both = processes(2, argv(home, tmp_path / "two", **flags), tmp_path)
        assert [finish(p) for p in both] == [0, 0], (tmp_path / "rank0.txt").read_text()
        run(home, tmp_path / "one", **flags | dict(fsdp=False))
        same()


@pytest.mark.parametrize(
    "extra",
    [
        dict(averaging=0.5, freeze_layers=1, ptx_coef=0.1, batch_size=16),
        dict(value_model="shared", lora_rank=2, averaging=0.5, ppo_epochs=2),
        dict(advantage="rloo", group_size=3, kl_penalty="kl", kl_in="reward", rollouts=15),
    ],
    ids=["critic", "lora", "rloo"],
)
def test_ppo_in_shards(home, tmp_path, extra):
    """PPO of sharded models on two processes has the statistics and the weights of one process,
    also where one rank has fewer rollouts, and more forward passes, than the other. The checkpoint
    resumes on one process, and in shards."""
    flags = {
        "ppo": True,
        "ppo_iters": 2,
        "rollouts": 20,
        "batch_size": 4,
        "ppo_warmup_steps": 1,
        "learning_rate": 1e-3,
        "decay_lr": False,
        "roof_prompts": 2,
        "roof_samples": 2,
        "report_rollouts": 4,
        "reward": f"{home}/reward.py:f",
        **extra,
    }
    (home / "reward.py").write_text(
        "def f(prompts, responses):\n    return [r.count('e') - len(r) / 9 for r in responses]\n"
    )

    def line(folder, **more):
        values = argv(home, tmp_path / folder, **flags | more)
        names = "--max_iters", "--eval_iters", "--warmup_iters"
        return [v for v in values if not v.startswith(names)]

    def both(**more):
        two = processes(2, line("two", fsdp=True, **more), tmp_path)
        assert [finish(p) for p in two] == [0, 0], (tmp_path / "rank0.txt").read_text()

    def same():
        logs = ([json.loads(x) for x in (tmp_path / d / "ppo_log.jsonl").open()] for d in names)
        for a, b in zip(*logs, strict=True):
            a, b = ({k: v for k, v in r.items() if not k.startswith("time/")} for r in (a, b))
            assert a == pytest.approx(b, abs=1e-4, rel=1e-3)
        one, two = (load_checkpoint(tmp_path / d / "ppo_ckpt.pt") for d in names)
        for part in ("model", ("ppo", "critic"), ("ppo", "average"), ("ppo", "reference")):
            a, b = (x[part] if part == "model" else x[part[0]][part[1]] for x in (one, two))
            assert (a is None) == (b is None)
            for name, w in (a or {}).items():
                torch.testing.assert_close(b[name], w, atol=1e-4, rtol=1e-3)
        reports = [json.loads((tmp_path / d / "ppo_report.json").read_text()) for d in names]
        for name in ("objective", "kl", "ref_loss"):
            found = [r["after"][name] for r in reports]
            assert found[0] == pytest.approx(found[1], abs=1e-3)

    names = "one", "two"
    train.main(line("one"))
    both()
    same()
    frozen = "layers.0.attention.wq.weight"
    start, end = (load_checkpoint(p) for p in (home / "ckpt.pt", tmp_path / "two/ppo_ckpt.pt"))
    assert torch.equal(start["model"][frozen], end["model"][frozen]) == ("freeze_layers" in extra)
    more = dict(init_from="resume", ppo_iters=3)
    for folder in names:
        train.main(line(folder, **more))
    same()
    more["ppo_iters"] = 4
    train.main(line("one", **more))
    both(**more)
    same()


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_shards_in_bfloat16(home, tmp_path, stage):
    """The value head is sharded too, and computes in fp32 as without shards."""
    flags = {
        stage: True,
        "dtype": "bfloat16",
        "max_iters": 2,
        "eval_interval": 2,
        "decay_lr": False,
    }
    if stage == "ppo":
        flags = {
            "ppo": True,
            "dtype": "bfloat16",
            "ppo_iters": 2,
            "rollouts": 16,
            "decay_lr": False,
        }
        flags |= {"roof_prompts": 2, "roof_samples": 2, "report_rollouts": 4}

    def line(folder, **more):
        values = argv(home, tmp_path / folder, batch_size=16, **flags | more)
        unused = ("--max_iters", "--eval_iters", "--warmup_iters") if stage == "ppo" else ()
        return [v for v in values if not v.startswith(unused)]

    train.main(line("one"))
    both = processes(2, line("two", fsdp=True), tmp_path)
    assert [finish(p) for p in both] == [0, 0], (tmp_path / "rank0.txt").read_text()
    key = "loss/train" if stage == "rm" else "ppo/loss/value"
    one, two = (records(tmp_path / d, f"{stage}_log.jsonl", key) for d in ("one", "two"))
    assert len(one) == 2 and two == pytest.approx(one, rel=0.05)


@pytest.mark.parametrize("stage", ["rm", "dpo", "sft"])
def test_evaluation_does_not_depend_on_the_batch_size(home, tmp_path, stage, capsys):
    """Nor does it depend on the number of processes. The samples differ in length."""
    flags = {
        stage: True,
        "max_iters": 2,
        "eval_interval": 2,
        "data": home / "rankings.jsonl",
        "eval_iters": 150,
        "learning_rate": 3e-2,
        "warmup_iters": 0,
    }
    if stage == "sft":
        flags["data"] = sft_data(home, tmp_path)
    run(home, tmp_path / "run", batch_size=8, **flags)
    flags |= {"init_from": "resume", "eval_only": True}
    found, log = [], tmp_path / "run" / f"{stage}_log.jsonl"
    logged = log.read_text()
    for size, n in ((1, 1), (4, 1), (7, 1), (50, 1), (50, 0), (4, 2)):
        line = argv(home, tmp_path / "run", batch_size=size, **flags)
        if n == 0:  # it is of the stage's own checkpoint without the flag too
            line, n = [x for x in line if not x.startswith("--init_from")], 1
        if n == 1:
            capsys.readouterr()
            train.main(line)
            output = capsys.readouterr().out
        else:
            both = processes(n, line, tmp_path)
            ended = [finish(p) for p in both]
            output = (tmp_path / "rank0.txt").read_text()
            assert ended == [0, 0], output
        numbers = re.search(r"^step 2: train loss (.*)", output, re.MULTILINE)[1]
        found.append([float(x.split()[-1]) for x in numbers.split(", ")])
    assert len(found[0]) == {"rm": 6, "dpo": 5, "sft": 2}[stage]
    # The loss has four decimals, the other numbers have four digits.
    assert found == [pytest.approx(found[0], rel=1e-3, abs=1.1e-4)] * 6
    assert log.read_text() == logged


# ----------------------------------------------------------------------------
# DPO


@pytest.mark.parametrize("smoothing,free", [(0.0, False), (0.2, False), (0.0, True)])
def test_dpo_is_equation_7(home, tmp_path, smoothing, free, rows):
    """Loss, gradient and logged rewards of Rafailov et al., with the policy away from the
    reference, written out: one sequence at a time, one token at a time."""
    flags = dict(dpo_label_smoothing=smoothing, dpo_reference_free=free, dpo_beta=0.3)
    stage, batch = stage_of(preferences.DPO, home, tmp_path, dpo=True, **flags)
    move(stage.model, 0.05)
    stage.loss(stage.model, batch)[0].backward()
    gradient = {k: p.grad.clone() for k, p in stage.model.named_parameters()}
    stage.model.zero_grad()

    def logp(net, prompt, completion):
        logits = net(torch.tensor([prompt + completion]))[0].log_softmax(-1)
        return sum(logits[len(prompt) - 1 + i, t] for i, t in enumerate(completion))

    total, rewards = 0.0, []
    for prompt, (chosen, rejected) in batch:
        ratio = []
        for c in (chosen, rejected):
            against = 0.0 if free else logp(stage.reference, prompt, c)
            ratio.append(logp(stage.model, prompt, c) - against)
        rewards.append([0.3 * x.item() for x in ratio])
        h = 0.3 * (ratio[0] - ratio[1])
        each = (1 - smoothing) * torch.log(1 / (1 + torch.exp(-h)))
        each = each + smoothing * torch.log(1 / (1 + torch.exp(h)))
        total = total - each / len(batch)
    total.backward()
    loss, _, found = stage.loss(stage.model, batch)
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    better, worse = torch.tensor(rewards).unbind(1)
    logged = {"dpo/better": better, "dpo/worse": worse, "dpo/margin": better - worse}
    for name, want in logged.items():
        torch.testing.assert_close(found[name], want, atol=1e-4, rtol=1e-3)
    assert found["dpo/accuracy"].tolist() == (better > worse).float().tolist()
    for k, p in stage.model.named_parameters():
        torch.testing.assert_close(p.grad, gradient[k], atol=2e-5, rtol=1e-3)
    assert all(p.grad is None for p in stage.reference.parameters())


def test_dpo_measures_the_kl_of_the_policy_from_the_reference(home, tmp_path):
    """Not that of the reference from the policy: token by token of the policy's own replies."""
    stage, _ = stage_of(preferences.DPO, home, tmp_path, dpo=True)
    move(stage.model, 0.1)
    nothing = {"dpo/margin": torch.zeros(1), "dpo/accuracy": torch.zeros(1)}
    with torch.no_grad():
        found, kl = stage.summary([nothing])["dpo/val/kl_ref"], 0.0
        replies = stage.replies(stage.model)
        for q, r in zip(stage.prompts, replies):
            x, at = torch.tensor([q + r[:-1]]), slice(len(q) - 1, None)
            p, ref = (net(x)[0, at].log_softmax(-1) for net in (stage.model, stage.reference))
            kl += float((p.exp() * (p - ref)).sum()) / len(replies)
    assert found == pytest.approx(kl, rel=1e-3)


def test_dpo_learns(home, tmp_path):
    run(home, tmp_path, dpo=True, learning_rate=3e-3)
    assert records(tmp_path, "dpo_log.jsonl", "loss/val")[0] == pytest.approx(math.log(2))
    accuracy = records(tmp_path, "dpo_log.jsonl", "dpo/val/accuracy")
    margin = records(tmp_path, "dpo_log.jsonl", "dpo/val/margin")
    kl = records(tmp_path, "dpo_log.jsonl", "dpo/val/kl_ref")
    assert accuracy[0] == 0.5 and accuracy[-1] > 0.9 and margin[-1] > 0.5
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 0.01
    assert load_checkpoint(tmp_path / "dpo_ckpt.pt")["template"]["turn"]


# ----------------------------------------------------------------------------
# PPO against a reward model

PPO = dict(
    ppo=True,
    ppo_iters=3,
    rollouts=16,
    target_kl=10,
    roof_prompts=2,
    roof_samples=4,
    report_rollouts=16,
    learning_rate=1e-3,
    eval_interval=2,
)


def ppo_stage(home, out, **flags):
    return train.start(train.setup(train.flags(argv(home, out, **PPO | flags))))


FUNCTION = """
import sys
import torch
import rlhf
from checkpoint import load_checkpoint
from model import ModelArgs
like = ModelArgs(**{args!r})
checkpoint = load_checkpoint({path!r})
from contextlib import nullcontext
scorer = rlhf.load_reward_model({path!r}, like, checkpoint["template"])
model = rlhf.ModelReward(scorer, "cpu", False, 8, nullcontext)
def reward(prompts, responses):
    return model(prompts, responses, None)
reward.tokens = True
"""


def same(one, two):
    a, b = (load_checkpoint(d / "ppo_ckpt.pt") for d in (one, two))
    assert a["model"].keys() == b["model"].keys()
    for k in a["model"]:
        assert torch.equal(a["model"][k], b["model"][k]), k
    for key in ("ppo/reward", "ppo/kl_ref", "ppo/loss/total"):
        assert records(one, "ppo_log.jsonl", key) == records(two, "ppo_log.jsonl", key)


def test_ppo_with_a_reward_model_is_ppo_with_its_scores(home, rm, tmp_path):
    """To the bit; and so are frozen models that are on another device, or swapped out."""
    path = str(rm / "rm_ckpt.pt")
    text = FUNCTION.format(args=dict(vocab_size=VOCAB, **ARGS), path=path)
    (tmp_path / "scores.py").write_text(text)
    flags = PPO | dict(value_model=path)
    run(home, tmp_path / "model", reward=path, **flags)
    run(home, tmp_path / "function", reward=f"{tmp_path}/scores.py:reward", **flags)
    same(tmp_path / "model", tmp_path / "function")
    there = dict(ref_device="cpu", reward_device="cpu", offload=True)
    run(home, tmp_path / "moved", reward=path, **flags, **there)
    same(tmp_path / "model", tmp_path / "moved")
    # the critic is the reward model, and its scores have the scale of the rewards
    head = load_checkpoint(tmp_path / "model/ppo_ckpt.pt")["ppo"]["critic"]["value_head.weight"]
    raw = load_checkpoint(path)
    folded = raw["reward"]["gain"] * raw["model"]["value_head.weight"]
    torch.testing.assert_close(head, folded, atol=0.05, rtol=0)
    assert load_checkpoint(tmp_path / "model/ppo_ckpt.pt")["template"] == raw["template"]


def test_ppo_raises_the_score_of_the_reward_model(home, rm, tmp_path):
    flags = PPO | dict(
        ppo_iters=12,
        rollouts=64,
        batch_size=32,
        init_kl_coef=0.02,
        learning_rate=1e-2,
        report_rollouts=128,
    )
    run(home, tmp_path, reward=rm / "rm_ckpt.pt", **flags)
    report = json.loads((tmp_path / "ppo_report.json").read_text())
    before, after = report["before"], report["after"]
    assert after["reward"] > before["reward"] + 0.3
    assert after["objective"] > before["objective"] + 0.2
    assert abs(before["reward"]) < 0.5  # normalised on such replies
    assert before["kl"] == pytest.approx(0, abs=1e-5)
    assert after["story"] != before["story"] and "texts" not in after  # one that PPO changed


def test_numbers_of_the_report_one_response_at_a_time(home, tmp_path):
    """With a reward per token, which adds up, and the flag's β, whatever it has adapted to."""
    stage = ppo_stage(home, tmp_path, report_rollouts=8, temperature=0.7, init_kl_coef=0.3)
    stage.trainer.kl_controller.value = 9.0
    move(stage.model, 0.1)
    reference = stage.trainer.reference
    stage.reward = lambda prompts, responses, ended: [[0.5] * len(r) for r in responses]
    found, prompts = stage.measure(stage.model, reference), stage.held_out.batch(0, 8)
    responses, ended = stage.sample(stage.model, prompts)
    uniform = torch.rand(8, 12, generator=torch.Generator().manual_seed(stage.args.seed))
    kl = loss = 0.0
    with torch.no_grad():
        for q, r, u, end in zip(prompts, responses, uniform, ended.tolist()):
            x, at = torch.tensor([q + r[:-1]]), slice(len(q) - 1, None)
            p, ref = ((m(x)[0, at] / 0.7).log_softmax(-1) for m in (stage.model, reference))
            # samples at that temperature: u is between the sums before and after each token
            after = p.exp().cumsum(-1)[range(len(r)), r] - u[: len(r)]
            before = after - p.exp()[range(len(r)), r]
            assert before.max() < 1e-5 and after.min() > -1e-5 and (end or len(r) == 12)
            kl += float((p.exp() * (p - ref)).sum()) / 8
            loss -= float(ref[range(len(r)), r].sum())
    n, sizes = sum(map(len, responses)), [len(q) + len(r) for q, r in zip(prompts, responses)]
    want = {
        "reward": 0.5 * n / 8,
        "kl": kl,
        "objective": 0.5 * n / 8 - 0.3 * kl,
        "ref_loss": loss / n,
        "length_mean": statistics.mean(sizes),
        "length_std": statistics.stdev(sizes),
        "ended": sum(ended.tolist()) / 8,
    }
    assert {k: found[k] for k in want} == pytest.approx(want, rel=1e-3)
    assert found["lengths"] == sizes and found["scores"] == [0.5 * len(r) for r in responses]


def test_the_report_shows_a_response_that_changed(home, tmp_path, monkeypatch):
    """It compares the model at the start with the result, the average of the weights."""
    stage = ppo_stage(home, tmp_path, averaging=0.5)
    for i in (0, 1):
        stage.step(i)
    texts, measured = iter(([[65], [66], [67]], [[65], [68], [69]])), []

    def measure(*models):
        measured.append([m.state_dict() for m in models])
        return {"texts": next(texts)}

    monkeypatch.setattr(stage, "measure", measure)
    monkeypatch.setattr(rlhf, "print_report", lambda report: None)
    stage.end()
    report = json.loads((tmp_path / "ppo_report.json").read_text())
    stories = [report[name]["story"] for name in ("before", "after")]
    assert stories == [stage.decode([66]), stage.decode([68])] and stories[0] != stories[1]
    start = load_checkpoint(home / "ckpt.pt")["model"]
    average = stage.state()["ppo"]["average"]
    for found, want in zip(measured, [(start, start), (average, start)], strict=True):
        for a, b in zip(found, want):
            assert a.keys() == b.keys() and all(torch.equal(w, b[k]) for k, w in a.items())
    policy = stage.model.state_dict()
    assert not any(torch.equal(average["norm.weight"], m["norm.weight"]) for m in (start, policy))


def test_iterations_have_random_numbers_of_their_own(home, tmp_path):
    stage, drawn = ppo_stage(home, tmp_path), []
    rollout = stage.trainer.rollout
    stage.trainer.rollout = lambda prompts, seed: drawn.append(seed) or rollout(prompts, seed)
    for i in (0, 1):
        stage.step(i)
    assert len(set(drawn)) == 2


def test_a_shared_critic_learns_beside_adapters(home, tmp_path):
    stage = ppo_stage(home, tmp_path, value_model="shared", lora_rank=2)
    before = stage.model.value_head.weight.detach().clone()
    for i in (0, 1):
        stage.step(i)
    assert not torch.equal(stage.model.value_head.weight, before)
    trained = {n for n, p in stage.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trained if ".lora_" not in n} == {"value_head"}


def test_the_result_is_the_average_of_the_weights(home, tmp_path):
    stage = ppo_stage(home, tmp_path, averaging=0.5)
    for i in (0, 1):
        stage.step(i)
    state = stage.state()
    policy, average = state["ppo"]["policy"], state["ppo"]["average"]
    assert all(torch.equal(w, average[k]) for k, w in state["model"].items())
    assert not all(torch.equal(w, policy[k]) for k, w in state["model"].items())


def test_the_adapters_that_are_exported_are_the_average(home, tmp_path):
    """As the model beside them in the checkpoint is."""
    stage = ppo_stage(home, tmp_path, averaging=0.5, lora_rank=2)
    for i in (0, 1):
        stage.step(i)
    state = stage.state()
    parts = {"model_args": checkpoint_args(stage.model.args), "config": stage.run.config}
    save_checkpoint(tmp_path / "ppo_ckpt.pt", state | parts)
    _, tensors, _ = formats.read_adapters(tmp_path / "ppo_ckpt.pt")
    b = tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    name = "layers.0.attention.wv.lora_b"
    policy, average = (state["ppo"][k][name] for k in ("policy", "average"))
    assert torch.equal(b, average) and not torch.equal(b, policy)


def test_frozen_models_are_moved_only_to_work(monkeypatch):
    moves = []

    class Moved(torch.nn.Linear):
        def to(self, device):
            moves.append(device)
            return self

    net = Moved(1, 1)
    with rlhf.on_device(net, "there", True):
        assert moves == ["there"]
    assert moves == ["there", "cpu"]
    with pytest.raises(KeyError), rlhf.on_device(net, "there", True):
        raise KeyError
    assert moves[-1] == "cpu"
    with rlhf.on_device(net, "there", False):
        assert len(moves) == 4


def test_replies_end_with_the_token_of_the_template(home, tmp_path):
    """The template ends replies with another token than EOS: rollouts stop at it and count as
    ended."""
    save_template(home, tmp_path, Template("{bos}{user}\n{reply}{eos}"))
    save_checkpoint(tmp_path / "a.pt", load_checkpoint(tmp_path / "ckpt.pt") | {"end_ids": [43]})
    stage = ppo_stage(home, tmp_path, init_from=tmp_path / "a.pt")
    assert {2, 43} <= stage.stop_ids == set(stage.trainer.stop_ids)
    stage.stop_ids = stage.trainer.stop_ids = (42,)
    with torch.no_grad():
        stage.model.output.weight[42] *= 4
    prompts = stage.prompts.batch(0, 32)
    rollouts = stage.trainer.rollout(prompts, 1)
    assert 0 < int(rollouts.ended.sum())
    for r, done in zip(rollouts.responses, rollouts.ended.tolist()):
        assert (r[-1] == 42) == done and 42 not in r[:-1]


def save_template(home, out, template, **changed):
    checkpoint = load_checkpoint(home / "ckpt.pt") | {"template": template._asdict()}
    checkpoint["model_args"] = checkpoint["model_args"] | changed
    save_checkpoint(out / "ckpt.pt", checkpoint)


def test_ppo_needs_prompts_alone(home, tmp_path, capsys):
    """Where a file has no reply, the report has no loss on text; where some have one, it has."""
    prompts = [{"prompt": f"say {i}", "mood": "glad"} for i in range(60)]
    messages = [{"messages": [{"role": "user", "content": f"say {i}"}]} for i in range(60)]
    answered = [{**r, "response": "please"} if i % 2 else r for i, r in enumerate(prompts)]
    empty = [{**r, "output": " "[: i % 2]} for i, r in enumerate(prompts)]
    files = dict(prompts=prompts, messages=messages, answered=answered, empty=empty)
    for name, rows in files.items():
        data, out = tmp_path / f"{name}.jsonl", tmp_path / name
        data.write_text("\n".join(map(json.dumps, rows)))
        run(home, out, **PPO | dict(ppo_iters=1, data=data, reward="length"))
        text = capsys.readouterr().out
        counts = [int(n) for n in re.findall(rf"(?:train|val): {data}: (\d+) samples", text)]
        assert len(counts) == 2 and sum(counts) == 60
        for n in counts:
            assert (f'({n} with "mood", which is ignored)' in text) == (name != "messages")
        assert ("loss on validation text" in text) == (name == "answered")
        report = json.loads((out / "ppo_report.json").read_text())
        assert ("val_loss" in report["after"]) == (name == "answered")


@pytest.mark.parametrize("n", [21, 150])
def test_loss_on_held_out_text_is_the_mean_over_its_tokens(home, tmp_path, n):
    """Of the first 64 replies, of different lengths, in several batches, or of all there are."""
    data, val = sft_data(home, tmp_path), tmp_path / "val.jsonl"
    val.write_text("\n".join(data.read_text().splitlines()[:n]))
    stage = ppo_stage(home, tmp_path / "out", data=data, val_data=val)
    assert len(stage.text) == n
    losses = []
    with torch.no_grad():
        for ids, mask in stage.text.samples.batch(0, min(n, 64)):
            logp = stage.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            losses += [-float(logp[i - 1, t]) for i, t in enumerate(ids) if mask[i]]
        found = stage.text_loss(stage.model)
    assert found == pytest.approx(statistics.mean(losses), rel=1e-5)


@pytest.mark.parametrize("stage", ["rm", "dpo", "ppo"])
def test_max_gen_len_that_leaves_no_room_for_prompts_is_named(home, tmp_path, capsys, stage):
    """And not the number of records."""
    data = tmp_path / "x.jsonl"
    rows = [{"prompt": f"say {i} {'a' * 36}", "chosen": "a", "rejected": "b"} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = {stage: True, "data": data, "val_data": data, "max_iters": 1}
    if stage == "ppo":
        flags = PPO | dict(data=data, val_data=data, reward="length", ppo_iters=1)
    text = error_of(capsys, argv(home, tmp_path / "out", **flags | dict(max_gen_len=60)))
    assert "40 left out: prompt too long" in text and "too few" not in text
    assert "--max_gen_len leaves 32 tokens of the context for a prompt: use a smaller one" in text
    run(home, tmp_path / "out", **flags | dict(max_gen_len=5))


def test_flags_of_ppo_without_effect_are_named(home, tmp_path, capsys):
    """--target_kl ends epochs early, and --ppo_iters replaces --max_iters. Both are no errors."""
    flags = PPO | dict(reward="length", ppo_iters=1)
    run(home, tmp_path / "a", **flags)
    text = capsys.readouterr().err
    for name in ("warmup_iters", "eval_iters"):
        assert text.count(f"note: --{name} has no effect with --ppo\n") == 1
    assert "--dropout" not in text  # it is 0
    assert "note: --target_kl has no effect with --ppo_epochs=1" in text
    assert "note: --max_iters has no effect with --ppo_iters" in text
    del flags["ppo_iters"]
    run(home, tmp_path / "b", **flags | dict(ppo_epochs=2, max_iters=1, dropout=0.5))
    text = capsys.readouterr().err
    assert "note: --dropout has no effect with --ppo\n" in text
    assert "--target_kl" not in text and "--max_iters" not in text


@pytest.mark.parametrize("flag", ["reward_scale", "reward_clip", "missing_eos_penalty", ""])
def test_rewards_that_differ_from_those_of_j_are_named(home, tmp_path, capsys, flag):
    train.setup(train.flags(argv(home, tmp_path, **PPO | ({flag: 1} if flag else {}))))
    text = capsys.readouterr().out
    assert ("; J and J* are of the original ones" in text) == bool(flag)
    assert not flag or f"note: --{flag}: PPO trains on changed rewards" in text


def test_iterations_that_the_checkpoint_has_already_are_an_error(home, tmp_path, capsys):
    """--max_iters of PPO includes the iterations of pretraining."""
    state = load_checkpoint(home / "ckpt.pt")
    torch.save(state | {"iter_num": 9}, tmp_path / "ckpt.pt")
    shutil.copy(home / f"tok{VOCAB}.model", tmp_path)
    flags = PPO | dict(reward="length", init_from="resume", ppo_iters=0, max_iters=9)
    line = argv(home, tmp_path, **flags)
    assert "--max_iters=9 includes the 9 iterations of the checkpoint" in error_of(capsys, line)


def test_a_failed_command_leaves_no_new_folder(home, tmp_path, capsys):
    flags = PPO | dict(reward="length", init_from="resume")
    line = argv(home, tmp_path / "a/mistyped", **flags)
    assert "there is no such checkpoint" in error_of(capsys, line)
    assert not (tmp_path / "a/mistyped").exists()
    (tmp_path / "a/mine").mkdir()
    (tmp_path / "a/mine/notes").touch()
    error_of(capsys, argv(home, tmp_path / "a/mine", **flags))
    assert (tmp_path / "a/mine/notes").exists()


def test_first_steps_are_short(home, rm, tmp_path):
    """Over 5 optimizer steps the rate rises to that of the schedule; Adam's first step, without
    weight decay, is rate * g / (|g| + eps); and the logged rate is that of the last step."""
    flags = PPO | dict(reward=rm / "rm_ckpt.pt", ppo_warmup_steps=5, ppo_epochs=4, batch_size=16)
    flags |= dict(adam_eps=1e-3, init_kl_coef=0)
    args = train.flags(argv(home, tmp_path, **flags))
    stage = train.start(train.setup(args))
    optimizer, p, rates, seen = stage.optimizers[0], stage.model.output.weight, [], []

    def note(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])
        seen.append(p.detach().clone())

    optimizer.register_step_pre_hook(lambda *_: seen.extend((p.detach().clone(), p.grad.clone())))
    optimizer.register_step_post_hook(note)
    stats = [stage.step(i) for i in (0, 1)]
    peak = [1e-3, 1e-3 * pretraining.schedule(1, args, last=stage.run.end_iteration, warmup=0)]
    assert 0 < peak[1] < 1e-3
    assert rates == pytest.approx([peak[k > 4] * min(k / 5, 1) for k in range(1, 9)])
    before, g, after = seen[:3]
    torch.testing.assert_close(after, before - peak[0] / 5 * g / (g.abs() + 1e-3))
    assert float(g.abs().max()) > 1e-3
    assert [s["ppo/learning_rate"] for s in stats] == [rates[3], rates[7]]


def test_pretraining_loss_is_mixed_in(home, rm, tmp_path):
    flags = PPO | dict(reward=rm / "rm_ckpt.pt", ptx_coef=0.5)
    run(home, tmp_path, **flags)
    assert all(x > 0 for x in records(tmp_path, "ppo_log.jsonl", "ppo/loss/ptx"))


def test_instructions_are_held_out_of_the_pretraining_text_once(home, rm, tmp_path, capsys):
    """With --val_data, which holds the others, or prompts from text, all of them are trained on."""
    data = sft_data(home, tmp_path)
    flags = dict(reward=rm / "rm_ckpt.pt", ptx_coef=0.5, ptx_data=data)
    n = len(data.read_text().splitlines())
    for val_data in dict(), dict(val_data=home / "pairs.jsonl"):
        stage = ppo_stage(home, tmp_path / "out", **flags, **val_data)
        assert len(stage.ptx_text) == n if val_data else 0.8 * n < len(stage.ptx_text) < n
        assert f"ptx: {data}: {len(stage.ptx_text):,} samples" in capsys.readouterr().out
    tinystories.synthesize(tmp_path / "text", 100, 1)
    tinystories.pretokenize(str(tmp_path / "text"), VOCAB, str(home / f"tok{VOCAB}.model"))
    text = tmp_path / f"text/tok{VOCAB}"
    stage = ppo_stage(home, tmp_path / "out", data=text, start_len=3, ptx_coef=0.5, ptx_data=data)
    assert len(stage.ptx_text) == n


def test_pretraining_text_is_split_over_ranks(home, rm, tmp_path):
    """The weighted losses of the parts of two or five ranks add up to the loss of the batch."""
    stage = ppo_stage(home, tmp_path, reward=rm / "rm_ckpt.pt", ptx_coef=0.5, batch_size=24)
    found = []
    for stage.world in (1, 2, 5):
        total = 0
        for stage.rank in range(stage.world):
            stage.ptx_position = 7
            share, *text = stage.ptx_batch()
            total += share * stage.model(*text).item() if share else 0
            assert stage.ptx_position == 10
        found.append(total)
    assert found == pytest.approx(found[:1] * 3, rel=1e-5)


# ----------------------------------------------------------------------------
# what one sees


def test_with_exact_end_the_response_shown_stops_at_its_most_likely_end(home, tmp_path):
    stage = ppo_stage(home, tmp_path, exact_end=True, lam=0.85, max_gen_len=24)
    stage.trainer.stop_ids = tuple(range(40))  # ends that are likely
    step, seen = stage.trainer.step, []
    stage.trainer.step = lambda r, scores: seen.append(r) or step(r, scores)
    lengths = []
    for i in range(4):
        stage.step(i)
        whole, ending = seen[-1].responses[0], seen[-1].ending.tolist()
        n = max(range(len(whole)), key=ending.__getitem__)  # actions before the end
        query, shown, score = stage.last
        assert shown == (whole[:n] if n < len(whole) - 1 else whole)
        assert (query, score) == (seen[-1].queries[0], seen[-1].scores[0])
        lengths.append((len(shown), len(whole)))
    assert any(a < b for a, b in lengths), lengths
    assert stage.sample_texts()["response"] == printable(stage.decode(shown))


def test_line_of_an_iteration(home, rm, tmp_path):
    """Every number of the line; J* belongs to the β that J was computed with."""
    flags = dict(reward=rm / "rm_ckpt.pt", adap_kl_ctrl=True, target=0.01, horizon=100)
    stage = ppo_stage(home, tmp_path, **flags)
    betas, j_stars = [], []
    for i in range(2):
        stats = stage.step(i)
        betas.append(stats["ppo/kl_coef"])
        j_stars.append(stats["ppo/objective_roof"])
    assert betas[0] == 0.2 and betas[1] < 0.2 * 0.98
    kept = torch.tensor(json.loads((tmp_path / "roof.json").read_text())["scores"])
    assert kept.shape == (2, 4) and j_stars[0] < j_stars[1]
    assert j_stars == [rlhf.best_achievable_objective(kept, beta)[0] for beta in betas]
    parts = stats["time/ppo/rollout"], stats["time/ppo/scoring"], stats["time/ppo/optimize_step"]
    assert min(parts) > 0
    for i, name in enumerate(("objective", "objective_roof", "reward", "kl_ref")):
        stats[f"ppo/{name}"] = -1 - i / 8
    for i, name in enumerate(("rollout", "scoring", "optimize_step")):
        stats[f"time/ppo/{name}"] = 1.5 + i
    stats |= {
        "ppo/length/mean": 211.2,
        "ppo/length/std": 34.6,
        "ppo/ended": 0.815,
        "ppo/policy/entropy": 1.234,
        "ppo/policy/clipfrac": 0.0567,
        "grad_norm": 0.4321,
        "ppo/val/explained_variance": 0.789,
    }
    assert stage.line(17, stats) == (
        "    17 | J -1.000 of -1.125 | reward -1.250 | KL -1.38 | length 211 ± 35 | ended  82% | "
        "entropy 1.23 | clip  5.7% | EV  0.79 | norm 0.43 | rollout 1.5 s | scoring 2.5 s | "
        "update 3.5 s"
    )
    # an iteration of which ratio_threshold skipped every optimizer step
    for name in ("grad_norm", "ppo/policy/entropy", "ppo/policy/clipfrac"):
        del stats[name]
    assert "| no policy step | EV  0.79 | norm 0.00 |" in stage.line(17, stats)


def test_all_statistics_of_an_iteration_are_json(home, tmp_path, capsys):
    debug = dict(reward="length", ppo_iters=2, ppo_debug=True, log_interval=1)
    run(home, tmp_path, **PPO | debug)
    objects = re.findall(r"^\{.*?^\}$", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    assert [json.loads(x)["iter"] for x in objects] == [0, 1]


def test_a_reward_that_is_always_the_same_is_named(home, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def same(prompts, responses):\n    return [2] * len(prompts)\n")
    many = PPO | {"ppo_iters": 1, "roof_prompts": 4, "roof_samples": 8}
    run(home, tmp_path / "out", **many | {"reward": f"{tmp_path / 'r.py'}:same"})
    assert "is 2, so that PPO has nothing to learn" in capsys.readouterr().out
    run(home, tmp_path / "length", **many)
    assert "nothing to learn" not in capsys.readouterr().out


def test_no_prompt_counts_twice_in_the_error_of_j_star(home, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(6)))
    flags = dict(roof_prompts=64, roof_samples=4, val_data=tmp_path / "p.jsonl")
    stage = ppo_stage(home, tmp_path / "out", **flags)
    assert stage.reference_scores.shape == (6, 4)


def test_tensorboard_has_scalars_and_samples(home, rm, tmp_path, monkeypatch):
    seen = {"scalars": [], "texts": []}

    class Writer:
        def __init__(self, folder, purge_step):
            assert Path(folder) == tmp_path / "tensorboard/ppo-1" and purge_step is None

        def add_scalar(self, name, value, step):
            seen["scalars"].append((name, step, value))

        def add_text(self, name, text, step):
            seen["texts"].append((step, text))

        def close(self):
            seen["closed"] = True

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(home, tmp_path, reward=rm / "rm_ckpt.pt", tensorboard=True, **PPO)
    for name in (
        "ppo/objective",
        "ppo/objective_roof",
        "ppo/kl_ref",
        "ppo/length/std",
        "ppo/ended",
        "ppo/policy/clipfrac",
        "ppo/val/explained_variance",
        "grad_norm",
    ):
        logged = [(step, value) for n, step, value in seen["scalars"] if n == name]
        assert logged == list(enumerate(records(tmp_path, "ppo_log.jsonl", name))), name
    assert [step for step, _ in seen["texts"]] == [2, 3] and seen["closed"]
    for _, text in seen["texts"]:
        title, *parts = re.split(r"\*\*(\w+)\*\*\n\n", text)
        assert not title and parts[::2] == ["prompt", "response", "reward"]
        assert parts[1].strip() and math.isfinite(float(parts[5]))


# ----------------------------------------------------------------------------
# what a checkpoint is for


@pytest.mark.parametrize("how", ["copied", "named"])
@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_a_new_run_takes_the_weights_of_its_checkpoint_as_reference(home, rm, tmp_path, stage, how):
    """A new run's reference is its initial checkpoint; a resumed run keeps its own."""
    flags = dict(dpo=True, max_iters=4, learning_rate=1e-2) if stage == "dpo" else PPO
    flags |= dict(reward=rm / "rm_ckpt.pt") if stage == "ppo" else {}
    name = f"{stage}_ckpt.pt"
    (tmp_path / "b").mkdir()
    run(home, tmp_path / "a", **flags)
    first = load_checkpoint(tmp_path / "a" / name)
    save_checkpoint(tmp_path / "b/ckpt.pt", first)  # its dpo_ckpt.pt, copied to go on from it
    again = flags | {"init_from": "resume" if how == "copied" else tmp_path / "a" / name}
    run(home, tmp_path / "b", **again)
    second = load_checkpoint(tmp_path / "b" / name)
    old, new = first[stage]["reference"], second[stage]["reference"]
    assert all(torch.equal(new[k], first["model"][k]) for k in new)
    assert not all(torch.equal(new[k], old[k]) for k in new)
    kl = {"ppo": "ppo/kl_ref", "dpo": "dpo/val/kl_ref"}[stage]
    assert records(tmp_path / "b", f"{stage}_log.jsonl", kl)[0] == pytest.approx(0, abs=1e-5)
    longer = {"ppo_iters": 5} if stage == "ppo" else {"max_iters": 6}
    run(home, tmp_path / "b", **flags | longer | {"init_from": "resume"})
    third = load_checkpoint(tmp_path / "b" / name)
    assert third["iter_num"] == second["iter_num"] + 2
    assert all(torch.equal(third[stage]["reference"][k], v) for k, v in new.items())


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_a_start_that_has_changed_is_named(home, tmp_path, capsys, stage):
    """With the README's commands PPO follows pretraining in one folder; after another pretraining
    the PPO run there is of the model before."""
    flags = {"max_iters": 1, "init_from": "resume"}
    if stage == "ppo":
        flags = PPO | dict(reward="length", ppo_iters=1, init_from="resume")
    else:
        flags["sft"] = True
    state = load_checkpoint(home / "ckpt.pt")
    save_checkpoint(tmp_path / "ckpt.pt", state)
    run(home, tmp_path, **flags)
    run(home, tmp_path, **flags)
    assert "has changed" not in capsys.readouterr().err
    state["model"]["norm.weight"][3] += 0.1
    save_checkpoint(tmp_path / "ckpt.pt", state)
    run(home, tmp_path, **flags)
    start = tmp_path / "ckpt.pt"
    line = f"note: {start} has changed since this run started; --init_from={start} starts a new run"
    assert line in capsys.readouterr().err


def test_a_new_run_names_the_model_that_it_starts_from(home, tmp_path, capsys):
    """A run that --init_from=resume cannot continue starts where the run of its own checkpoint
    started; where that is unknown and the folder has several models, it is an error."""
    out = tmp_path / "out"
    flags = PPO | dict(reward="length", ppo_iters=1)
    out.mkdir()
    save_checkpoint(out / "ckpt.pt", load_checkpoint(home / "ckpt.pt") | {"iter_num": 3})
    resume = {"init_from": "resume"}

    def start():
        state = load_checkpoint(out / "ppo_ckpt.pt")
        line = re.findall("a new run, which starts from (.*)", capsys.readouterr().out)
        return [state["started_from"]], line, state["ppo"]["first"]

    # with ckpt.pt alone, resume is the same as the default, and so it is when flags change
    for changed in {}, {"seed": 2}:
        run(home, out, **flags | resume | changed)
        assert start() == ([f"{out}/ckpt.pt"], [f"{out}/ckpt.pt"], 3)
    for name in "ppo_ckpt.replaced.pt", "ppo_log.replaced.jsonl", "ppo_report.replaced.json":
        assert (out / name).exists()
    run(home, out, **flags | dict(ppo_iters=2, seed=2, **resume))  # continues
    assert start() == ([f"{out}/ckpt.pt"], [], 3)
    (out / "ppo_ckpt.pt").unlink()
    # with an SFT model, resume is ambiguous where PPO has no checkpoint
    run(home, out, sft=True, max_iters=1, data=home / "pairs.jsonl")
    capsys.readouterr()
    text = error_of(capsys, argv(home, out, **flags | resume))
    assert "there is no such checkpoint" in text and f"{out}/sft_ckpt.pt" in text
    assert f"--init_from={out}/ckpt.pt" in text
    sft = {"init_from": out / "sft_ckpt.pt"}
    for changed in sft, resume | {"seed": 2}:
        run(home, out, **flags | changed)
        assert start() == ([f"{out}/sft_ckpt.pt"], [f"{out}/sft_ckpt.pt"], 0)
    # checkpoints of earlier versions: by their flags
    state = load_checkpoint(out / "ppo_ckpt.pt")
    del state["started_from"]
    save_checkpoint(out / "ppo_ckpt.pt", state)
    text = error_of(capsys, argv(home, out, **flags | resume | {"seed": 3}))
    assert "its start is unknown" in text
    state["config"]["init_from"] = f"{out}/sft_ckpt.pt"
    save_checkpoint(out / "ppo_ckpt.pt", state)
    capsys.readouterr()
    run(home, out, **flags | resume | {"seed": 3})
    assert start() == ([f"{out}/sft_ckpt.pt"], [f"{out}/sft_ckpt.pt"], 0)
    # a run that started from a file in the place of its own checkpoint
    run(home, out, **flags | {"init_from": out / "ppo_ckpt.pt"})
    text = error_of(capsys, argv(home, out, **flags | resume | {"seed": 4}))
    assert "started from an earlier file of this name" in text


def test_a_reward_model_is_no_policy(home, rm, tmp_path, capsys):
    path = rm / "rm_ckpt.pt"
    (tmp_path / "copy").mkdir()
    save_checkpoint(tmp_path / "copy/ckpt.pt", load_checkpoint(path))
    for flags in (
        dict(PPO),
        dict(sft=True),
        dict(dpo=True),
        dict(data=home, vocab_source="custom"),
    ):
        assert "is a reward model" in error_of(
            capsys, argv(home, tmp_path / "x", init_from=path, **flags)
        )
        copied = argv(home, tmp_path / "copy", init_from="resume", **flags)
        assert "is a reward model" in error_of(capsys, copied)
    assert [p.name for p in (tmp_path / "copy").glob("*.pt")] == ["ckpt.pt"]
    tokenizer = f"--tokenizer={home}/tok{VOCAB}.model"
    for main, line in (
        (sample.main, [f"--checkpoint={path}", tokenizer]),
        (export.main, [f"{tmp_path}/model.bin", f"--checkpoint={path}", tokenizer]),
    ):
        with pytest.raises(ValueError, match="rm_ckpt.pt is a reward model, made by --rm"):
            main(line)
    assert not (tmp_path / "model.bin").exists()
    # another reward model may start from it, with its samples: it cannot write others
    capsys.readouterr()
    run(home, tmp_path / "rm", init_from=path, rm=True, max_iters=2)
    one, two = (load_checkpoint(d / "rm_ckpt.pt")["reward"] for d in (rm, tmp_path / "rm"))
    assert one["samples"] == two["samples"] and one["bias"] != two["bias"]
    assert "normalized on the 16 samples of the initial reward model" in capsys.readouterr().err


# ----------------------------------------------------------------------------
# what can be wrong


def test_a_failed_check_is_one_line(home, rm, tmp_path, capsys, monkeypatch):
    """A failed check of the trainer prints one line with the last good checkpoint."""
    step = ppo.PPOTrainer.step

    def drifts(self, *a):
        if self.iteration == 1:
            self.policy.norm.weight.data *= 1.1
        return step(self, *a)

    monkeypatch.setattr(ppo.PPOTrainer, "step", drifts)
    flags = PPO | dict(reward=rm / "rm_ckpt.pt", eval_interval=100)
    text = error_of(capsys, argv(home, tmp_path, **flags))
    assert "log-probabilities of sampling and training differ" in text
    assert f"the last good checkpoint: {tmp_path}/ppo_ckpt.pt has iteration 1" in text
    assert load_checkpoint(tmp_path / "ppo_ckpt.pt")["iter_num"] == 1
    text = error_of(capsys, argv(home, tmp_path, **flags | {"init_from": "resume"}))
    assert f"{tmp_path}/ppo_ckpt.pt has iteration 1" in text  # and is not saved once more
    assert not (tmp_path / "ppo_ckpt.prev.pt").exists()


def test_refuses_a_reward_model_that_does_not_fit(home, rm, tmp_path, capsys):
    def ppo_with(path, **more):
        out = tmp_path / "out"
        return error_of(capsys, argv(home, out, **PPO | dict(reward=path) | more))

    assert "is not a reward model: train one with --rm" in ppo_with(home / "ckpt.pt")
    assert "there is no such checkpoint" in ppo_with(tmp_path / "none.pt")
    checkpoint = load_checkpoint(rm / "rm_ckpt.pt")

    def changed(name, **model_args):
        other = checkpoint | {"model_args": checkpoint["model_args"] | model_args}
        save_checkpoint(tmp_path / name, other)
        return tmp_path / name

    text = ppo_with(changed("vocabulary.pt", vocab_size=100))
    assert f"a vocabulary of 100 tokens, the policy has {VOCAB}" in text
    assert "has a context of 32 tokens" in ppo_with(changed("short.pt", max_seq_len=32))
    save_template(home, tmp_path, Template("{bos}Q: {user}\n{reply}{eos}"))
    text = ppo_with(rm / "rm_ckpt.pt", init_from=tmp_path / "ckpt.pt")
    assert "trained with the template" in text
    text = ppo_with(rm / "rm_ckpt.pt", value_model=changed("value.pt", vocab_size=100))
    assert "vocabulary" in text
    model = load_checkpoint(home / "ckpt.pt")
    short = {"model_args": model["model_args"] | {"max_seq_len": 32}}
    save_checkpoint(tmp_path / "short_model.pt", model | short)
    text = ppo_with(rm / "rm_ckpt.pt", value_model=tmp_path / "short_model.pt")
    assert "short_model.pt has a context of 32 tokens, the policy has 64" in text


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_refuses_data_that_ranks_nothing(home, tmp_path, capsys, stage):
    data = tmp_path / "x.jsonl"
    long = "so " * 200
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": long},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    line = argv(home, tmp_path, data=data, val_data=data, **{stage: True})
    text = error_of(capsys, line)
    for why in (
        "1 left out: chosen equal to rejected",
        "1 left out: empty response",
        "1 left out: too long",
    ):
        assert why in text
    # beside good ones they are counted
    good = (home / "pairs.jsonl").read_text()
    data.write_text("\n".join(map(json.dumps, rows)) + "\n" + good)
    line = argv(home, tmp_path, data=data, val_data=home / "pairs.jsonl", max_iters=2)
    train.main([*line, f"--{stage}"])
    assert "train: " in capsys.readouterr().out


def test_refuses_flags_that_make_no_sense(home, tmp_path, capsys):
    for flags, words in [
        (dict(rm=True, dpo=True), "one stage at a time"),
        (dict(rm=True, freeze_layers=5), "--freeze_layers=5: the model has 2 layers"),
        (dict(dpo=True, dpo_label_smoothing=0.6), "--dpo_label_smoothing"),
        (dict(dpo=True, dpo_beta=-1), "--dpo_beta"),
        (dict(rm=True, init_from="scratch"), "ckpt.pt"),
        (dict(rm=True, reference_samples=0), "--reference_samples"),
        (dict(rm=True, max_gen_len=0), "--max_gen_len"),
        (dict(rm=True, data=home), "is a folder"),
        (dict(rm=True, template="x.json"), "x.json"),
    ]:
        assert words in error_of(capsys, argv(home, tmp_path / "out", **flags))


def test_kl_to_reference_is_the_plain_sum():
    """KL and log-probability of each response, computed token by token."""
    torch.manual_seed(3)
    nets = [accelerate(Transformer(ModelArgs(vocab_size=VOCAB, **ARGS))) for _ in range(2)]
    queries, responses = sequences(5, 1, 9), sequences(5, 2, 9)
    kl, logp = preferences.kl_to_reference(*nets, queries, responses, 2, temperature=0.7)
    for i, (q, r) in enumerate(zip(queries, responses)):
        with torch.no_grad():
            p, ref = ((net(torch.tensor([q + r]))[0] / 0.7).log_softmax(-1) for net in nets)
        at = range(len(q) - 1, len(q) + len(r) - 1)
        by_hand = sum(float((p[t].exp() * (p[t] - ref[t])).sum()) for t in at)
        assert float(kl[i]) == pytest.approx(by_hand, rel=1e-4)
        by_hand = sum(float(ref[t, token]) for t, token in zip(at, r))
        assert float(logp[i]) == pytest.approx(by_hand, rel=1e-4)


# ----------------------------------------------------------------------------
# what the README's tables and plots are made with


def test_best_of_n_is_the_mean_over_all_draws():
    proxy = torch.tensor([[0.3, 0.1, 0.9, 0.5], [5.0, 7.0, 6.0, 8.0]])
    gold = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 2.0]])
    for n in (1, 2, 3):
        found, expected = story_task.best_of(proxy, gold, n), [0.0, 0.0]
        for p, g in zip(proxy.tolist(), gold.tolist()):
            for draw in itertools.product(range(4), repeat=n):
                best = max(draw, key=lambda i: p[i])
                expected[0] += p[best] / 4**n / 2
                expected[1] += g[best] / 4**n / 2
        assert found == pytest.approx(expected)


def test_table_and_overoptimisation_of_a_tiny_chain(home, tmp_path, capsys, monkeypatch):
    """The script of `make rlhf` on untrained models: SFT is the reference, so its KL is 0."""
    task, rng = tmp_path / "task", random.Random(2)
    task.mkdir()
    words = sorted(instruct.WORDS)
    for name in ("sft", "val"):
        rows = [{"prompt": f"Words: {rng.choice(words)}.", "response": "It."} for _ in range(60)]
        (task / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pairs.jsonl").write_text((home / "pairs.jsonl").read_text() * 2)
    run(home, tmp_path, sft=True, max_iters=1, data=task / "sft.jsonl", learning_rate=0)
    run(home, tmp_path, rm=True, max_iters=2, init_from=tmp_path / "sft_ckpt.pt")
    (tmp_path / f"tok{VOCAB}.model").write_bytes((home / f"tok{VOCAB}.model").read_bytes())
    line = ["story_task.py", str(tmp_path), f"--task={task}", "--prompts=8"]
    monkeypatch.setattr("sys.argv", line + ["--replies=3"])
    (tmp_path / "ckpt.pt").write_bytes((home / "ckpt.pt").read_bytes())
    scores, rng = [], random.Random(3)

    def gold(lab, texts, replies):
        scores.append([rng.random() for _ in texts])
        return torch.tensor(scores[-1]), [""] * len(texts)

    with monkeypatch.context() as patch:
        patch.setattr(story_task.Lab, "gold", gold)
        story_task.main()
    torch.set_grad_enabled(True)
    start, row = json.loads((tmp_path / "rlhf.json").read_text())
    assert row["model"] == "SFT" and row["kl"] == pytest.approx(0, abs=1e-4)
    # The replies to a prompt are neighbours; errors are over the prompts, of which there are 8.
    a, b = ([statistics.mean(x[i : i + 3]) for i in range(0, len(x), 3)] for x in scores)
    difference = [x - y for x, y in zip(a, b)]
    assert start["gold"] == pytest.approx(statistics.mean(a)) and len(a) == 8
    assert start["gold_error"] == pytest.approx(statistics.stdev(a) / 8**0.5)
    assert start["gain"] == pytest.approx(statistics.mean(difference), abs=1e-6)
    assert start["gain_error"] == pytest.approx(statistics.stdev(difference) / 8**0.5)
    assert row["gain"] == row["gain_error"] == 0
    assert "of the held-out pairs" in capsys.readouterr().out
    more = ["--overoptimise", "--pairs=8", "--samples=4", "--iterations=2", f"--out={tmp_path}"]
    monkeypatch.setattr("sys.argv", line + more)
    story_task.main()
    (curve,) = json.loads((tmp_path / "overoptimisation.json").read_text())["curves"]
    assert [p["n"] for p in curve["best_of"]] == [1, 2, 4] and len(curve["ppo"]) == 2
    # A reward model of an interrupted run is trained again, and Ctrl-C ends the script.
    path = tmp_path / "rm8/rm_ckpt.pt"
    save_checkpoint(path, load_checkpoint(path) | {"iter_num": 6})
    monkeypatch.setattr(train, "main", lambda flags: 130)
    with pytest.raises(SystemExit) as ended:
        story_task.main()
    assert ended.value.code == 130
    assert curve["ppo"][0]["kl"] == pytest.approx(0, abs=1e-4)


def test_the_baseline_has_the_pairs_of_the_reward_model(home, tmp_path):
    """Those that fit into its context."""
    path, tokenizer = tmp_path / "x.jsonl", Tokenizer(str(home / f"tok{VOCAB}.model"))
    rows = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in range(1, 40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    records = preference_data.usable(instruct.read(str(path)))
    found = preference_data.fitting(records, str(path), tokenizer, 20)
    template = instruct.TEMPLATES["plain"]
    assert len(found) == len(instruct.Rankings(str(path), "all", tokenizer, template, 20))
    assert 5 < len(found) < len(records) == 39 and found == records[: len(found)]


def test_bag_of_words_finds_the_words(home):
    records = instruct.read(home / "pairs.jsonl")
    assert preference_data.bag_of_words(records[:100], records[100:]) > 0.95
    flipped = [r._replace(completions=r.completions[::-1]) for r in records[100:]]
    assert preference_data.bag_of_words(records[:100], flipped) < 0.05
