"""On a real GPU: the numbers are those of the CPU. bench/gpu.sh runs these tests (-m gpu), which
skip without a GPU; GPU_TEST_DEVICE=cpu tries them without one."""

import os

import pytest
import torch
import torch.nn.functional as F
from test_flags import BASE, COMMON, home, outcome  # noqa: F401

import kernels
from kernels import accelerate
from model import ModelArgs, Transformer, generate

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
LENGTHS = [40, 1, 64, 23]


@pytest.fixture(autouse=True)
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = True


def models(**changes):
    """The same random model on the CPU and on the GPU."""
    args = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=64)
    out = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        out.append(accelerate(Transformer(ModelArgs(**args | changes, multiple_of=16))).to(device))
    return out


def loss_and_gradients(model, tokens, lengths=None, dtype=torch.float32):
    tokens = tokens.to(next(model.parameters()).device)
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(tokens, tokens.roll(-1, -1), lengths=lengths)
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("vocab", [512, kernels.LARGE_VOCABULARY])
def test_loss_and_gradients(dtype, lengths, vocab):
    shape = (2, 64) if lengths is None else (sum(LENGTHS),)
    tokens, (plain, fast) = torch.randint(512, shape), models(vocab_size=vocab)
    want = loss_and_gradients(plain, tokens, lengths)
    found = loss_and_gradients(fast, tokens, lengths, dtype)
    for x, y in zip(found, want, strict=True):
        assert float((x - y).norm() / y.norm()) < (1e-4 if dtype == torch.float32 else 0.03)


def test_generation():
    """Greedy tokens, and the log-probabilities of sampled ones."""
    cpu, gpu = models()
    prompts = [[1, *range(3, 3 + n)] for n in (0, 5, 20, 2)]
    greedy = [generate(m, prompts, 30, 0.0, stop_ids=[2]).responses() for m in (cpu, gpu)]
    assert greedy[0] == greedy[1]
    out = generate(gpu, prompts, 30, stop_ids=[2], uniform=torch.rand(4, 30))
    for prompt, response, logprobs in zip(prompts, out.responses(), out.logprobs.cpu()):
        logits = cpu(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        want = -F.cross_entropy(logits, torch.tensor(response), reduction="none")
        torch.testing.assert_close(logprobs[: len(want)], want.detach(), rtol=1e-3, atol=1e-3)


RUNS = {
    "sft": BASE["--sft"],
    "sft, adapters": dict(BASE["--sft"], lora_rank=2),
    "ppo": BASE["--ppo"],
    "ppo, bfloat16": dict(BASE["--ppo"], dtype="bfloat16"),
    "ppo, exact end": dict(BASE["--ppo"], exact_end=True),
    "dpo": dict(COMMON, dpo=True, max_iters=2, eval_iters=1, warmup_iters=0, max_gen_len=4)
    | dict(reference_samples=2, data="{}/pairs.jsonl", learning_rate=1e-3),
}


@pytest.mark.parametrize("stage", RUNS)
def test_stages(home, tmp_path, capsys, monkeypatch, stage):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    flags = RUNS[stage] | {"device": DEVICE}
    found = outcome(home, tmp_path / "out", capsys, monkeypatch, **flags)
    assert found["error"] == ""
    (records,) = (v for k, v in found.items() if k.endswith("log.jsonl"))
    assert len(records) >= 2
