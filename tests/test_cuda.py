"""Every stage with --device=cuda, on the simulated device of simulated_cuda.py. Its counts are
asserted, so that a change that makes a GPU wait, or take a slow kernel, fails without a GPU."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import simulated_cuda
import torch

import tinystories
from checkpoint import checkpoint_args, load_checkpoint, save_checkpoint
from model import ModelArgs, Transformer

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 320  # 256 bytes, 3 control tokens, letters
SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16, max_seq_len=64)


@pytest.fixture(scope="module")
def card():
    """Runs commands on the simulated device, in one process. card("train.py", input, name=value)
    returns their counts as attributes: kernels, waits, attention (Counters), peak, output."""
    reason = simulated_cuda.unavailable()
    if reason:
        pytest.skip(reason)
    process = subprocess.Popen(
        [sys.executable, simulated_cuda.__file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )

    def run(script, text="", **flags):
        words = [str(ROOT / script), "--device=cuda", *(f"--{k}={v}" for k, v in flags.items())]
        process.stdin.write(json.dumps([words, text]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process of the simulated device has died: {process.poll()}"
        result = SimpleNamespace(**json.loads(answer))
        assert result.status == 0, result.output
        for name in "kernels", "waits", "attention":
            setattr(result, name, Counter(getattr(result, name)))
        return result

    yield run
    process.stdin.close()
    assert process.wait(20) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with stories, a vocabulary, a random model, instructions and preferences."""
    folder, rng = tmp_path_factory.mktemp("home"), random.Random(1)
    tinystories.synthesize(folder, 60, 2)
    tinystories.train_vocab(folder, VOCAB)
    tinystories.pretokenize(folder, VOCAB)
    torch.manual_seed(1)
    net = Transformer(ModelArgs(vocab_size=VOCAB, **SHAPE))
    parts = {"model": net.state_dict(), "model_args": checkpoint_args(net.args), "iter_num": 7}
    save_checkpoint(folder / "ckpt.pt", parts)
    words = "please thank you kindly it is so and".split()
    with open(folder / "sft.jsonl", "w") as sft, open(folder / "pairs.jsonl", "w") as pairs:
        for i in range(60):
            prompt, *texts = (" ".join(rng.choices(words, k=rng.randint(2, 6))) for _ in range(3))
            sft.write(json.dumps({"prompt": prompt, "response": texts[0]}) + "\n")
            pairs.write(json.dumps({"prompt": f"say {i}", "completions": texts}) + "\n")
    return folder


def flags(home, out, **more):
    """The flags of a tiny run that starts from the random model."""
    return (
        dict(
            out_dir=out,
            init_from=home / "ckpt.pt",
            data=home,
            batch_size=4,
            max_iters=2,
            eval_interval=2,
            eval_iters=1,
            learning_rate=1e-3,
        )
        | more
    )


PPO = dict(ppo=True, ppo_iters=2, rollouts=8, max_gen_len=16, start_len=6, target_len=10)
PPO |= dict(eval_interval=1, roof_prompts=2, roof_samples=4, report_rollouts=8)


def test_pretraining(card, home, tmp_path):
    new = dict(vocab_source="custom", vocab_size=VOCAB, compile=False, init_from="scratch")
    run = card("train.py", **flags(home, tmp_path, **new, **SHAPE))
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 2
    assert any(k.startswith("flash") for k in run.attention) and run.peak > 0


def test_ppo(card, home, tmp_path):
    card("train.py", **flags(home, tmp_path, **PPO))
    assert load_checkpoint(tmp_path / "ppo_ckpt.pt")["iter_num"] == 2


@pytest.mark.parametrize("dtype,most", [("float32", 20), ("bfloat16", 24)])
def test_decoding(card, home, tmp_path, dtype, most):
    """Kernels per layer and token of generation, without torch.compile; one wait per 32 tokens;
    not the math kernel of attention, which copies keys and values for each head."""
    runs = {}
    for layers, tokens in (1, 4), (1, 8), (2, 4), (2, 8), (1, 32), (1, 64):
        torch.manual_seed(1)
        net = Transformer(ModelArgs(vocab_size=VOCAB, **SHAPE | dict(n_layers=layers)))
        torch.nn.init.zeros_(net.output.weight)  # the most likely token is 0, which ends no text
        parts = {"model": net.state_dict(), "model_args": checkpoint_args(net.args)}
        save_checkpoint(tmp_path / "ckpt.pt", parts)
        how = dict(checkpoint=tmp_path / "ckpt.pt", tokenizer=home / f"tok{VOCAB}.model")
        how |= dict(temperature=0, dtype=dtype, num_samples=4, max_new_tokens=tokens)
        runs[layers, tokens] = card("sample.py", **how)
        assert f"{4 * tokens} tokens" in runs[layers, tokens].output
    kernels, waits = (
        {k: getattr(run, name).total() for k, run in runs.items()} for name in ("kernels", "waits")
    )
    one, two = (kernels[layers, 8] - kernels[layers, 4] for layers in (1, 2))
    assert two - one == 4 * most and one - 4 * most <= 4 * 50
    assert waits[1, 64] - waits[1, 32] == 1 and waits[1, 8] == waits[1, 4]
    assert not any(name.startswith("math") for run in runs.values() for name in run.attention)
