"""Half precision: what stays in fp32 under autocast, and weights that are kept in half."""

import copy
import os
import subprocess
import sys

import pytest
import test_accelerate
import torch
from conftest import ROOT
from test_flags import BASE, COMMON, flat, home, outcome  # noqa: F401

import checkpoint
import ppo
import preferences
import pretraining
import rlhf
import train
from checkpoint import halve_frozen, model_from_checkpoint
from model import Transformer, TransformerWithValueHead
from preferences import score
from sft import add_lora, merged_state


def small(cls=Transformer, **changes):
    model = test_accelerate.small(cls, **changes)
    return model_from_checkpoint({"model": model.state_dict(), "model_args": vars(model.args)}, cls)


# ----------------------------------------------------------------------------
# fp32 under autocast


def test_values_and_scores_are_in_fp32_under_autocast():
    """The head's product is that of float64 to fp32 rounding; bfloat16 would be 2^-9 away."""
    model = small(TransformerWithValueHead)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(torch.arange(40)[None]).flatten(0, 1)
        values = model.values(hidden)
        last = score(model, [list(range(40))])
    assert hidden.dtype == values.dtype == torch.float32
    head = model.value_head
    want = hidden.double() @ head.weight[0].double() + head.bias.double()
    torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, values[-1:], rtol=1e-6, atol=1e-6)


def test_entropy_and_kl_are_in_fp32_under_autocast(monkeypatch):
    """Values and gradients of the specification, in which no operation is subject to autocast."""
    logits, ref, target = torch.randn(50, 48) * 3, torch.randn(50, 48), torch.randint(-1, 48, (50,))

    def terms():
        x = logits.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.stack(ppo.logprob_entropy_kl(x, target, ref.bfloat16()))
            out.square().sum().backward()
        return out.detach(), x.grad.float()

    found = terms()
    monkeypatch.setenv("NATIVE_KERNELS", "0")
    want = terms()
    torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], want[1], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("given", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux only")
def test_cuda_memory_has_expandable_segments_unless_the_user_decides(given):
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {given: "backend:native"} if given else {}
    code = "import common, os, sys; print('torch' in sys.modules, os.environ.get(sys.argv[1]))"
    command = sys.executable, "-c", code, given or "PYTORCH_ALLOC_CONF"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    want = "backend:native" if given else "expandable_segments:True"
    assert done.stdout == f"False {want}\n", done.stderr


# ----------------------------------------------------------------------------
# frozen weights in half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_halved_weights_give_the_numbers_of_autocast(dtype, tied):
    """To the bit, values and gradients; what is trained, embeds or is saved stays in fp32."""
    plain, halved = (add_lora(small(tied=tied), 2, layers="q,down") for _ in range(2))
    halved.load_state_dict(plain.state_dict())
    halve_frozen([halved], dtype)
    tokens = torch.randint(48, (3, 40))
    with torch.autocast("cpu", dtype):
        losses = [model(tokens, tokens) for model in (plain, halved)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, want), found in zip(plain.named_parameters(), halved.parameters()):
        assert (want.grad is None) == (found.grad is None) == (".lora_" not in name)
        assert want.grad is None or torch.equal(found.grad, want.grad)
        linear = ".lora_" not in name and "norm" not in name and "tok_" not in name
        assert found.dtype == (dtype if linear else torch.float32), name
    assert halved.output.weight.dtype == (torch.float32 if tied else dtype)
    assert flat(halved.state_dict()) == flat(plain.state_dict())
    assert flat(merged_state(halved)) == flat(merged_state(plain))


def test_halved_models_share_weights_and_load_states():
    one, other, trained = small(), small(), small()
    rlhf.share_weights(other, one)
    halve_frozen([m.requires_grad_(False) for m in (one, other)], torch.bfloat16)
    wq, same = (m.layers[0].attention.wq for m in (one, other))
    assert wq.weight is same.weight and wq.master is same.master
    for p in trained.parameters():
        torch.nn.init.normal_(p)
    other.load_state_dict(trained.state_dict())
    for model in (one, other, copy.deepcopy(other)):
        assert flat(model.state_dict()) == flat(trained.state_dict())
    trained.layers[0].attention.wq.weight.data.zero_()
    assert same.master.any() and torch.equal(same.weight, same.master.bfloat16())


OF_FILE = {k: v for k, v in BASE["--ppo"].items() if k != "start_len"}  # which is for stories
STAGES = {
    "sft": dict(BASE["--sft"], lora_rank=2),
    "ppo": BASE["--ppo"],
    "ppo, adapters, average": dict(BASE["--ppo"], lora_rank=2, averaging=0.5),
    "ppo, adapters, float16": dict(BASE["--ppo"], lora_rank=2, dtype="float16"),
    "ppo, frozen layers": dict(BASE["--ppo"], freeze_layers=1),
    "ppo, frozen layers, float16": dict(BASE["--ppo"], freeze_layers=1, dtype="float16"),
    "ppo, adapters, offload": dict(BASE["--ppo"], lora_rank=2, offload=True),
    "ppo, reward model": dict(OF_FILE, reward="{}/rm_ckpt.pt", data="{}/a.jsonl"),
    "dpo": dict(COMMON, dpo=True, max_iters=2, eval_iters=1, warmup_iters=0, max_gen_len=4)
    | dict(reference_samples=2, data="{}/pairs.jsonl", learning_rate=1e-3),
}


@pytest.mark.parametrize("stage", STAGES)
def test_runs_are_those_of_weights_in_fp32(home, tmp_path, capsys, monkeypatch, stage):  # noqa: F811
    """Every number that a run prints, logs and saves, to the bit; and those of a resumed run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "peak_matmul_flops", lambda *_: 1e12)
    flags = {"dtype": "bfloat16"} | STAGES[stage]
    if "rm_ckpt" in str(flags.get("reward")):
        more = dict(reference_samples=2, max_gen_len=4, data=home / "pairs.jsonl", eval_iters=1)
        more |= dict(rm=True, max_iters=2, **COMMON)
        found = outcome(home, tmp_path / "rm", capsys, monkeypatch, **more)
        checkpoint.save_checkpoint(home / "rm_ckpt.pt", found["rm_ckpt.pt"])
    halved = []

    def results(halve):
        for module in (pretraining, preferences, rlhf):
            monkeypatch.setattr(module, "halve_frozen", halve)
        found = outcome(home, tmp_path / "out", capsys, monkeypatch, **flags)
        assert found["error"] == ""
        return flat(found)

    def halve(models, dtype):
        halve_frozen(models, dtype)
        halved.extend(m for model in models for m in model.modules() if hasattr(m, "master"))

    assert results(lambda *_: None) == results(halve)
    assert halved  # in float16 those of the report alone: the update is in fp32


@pytest.mark.parametrize(
    "flags, device, dim, dtype",
    [
        ("--ppo", "cuda", 288, "float32"),
        ("--ppo", "cuda:1", 64, "float32"),
        ("--ppo", "cuda", 512, "bfloat16"),
        ("--ppo --dtype=bfloat16", "cuda", 64, "bfloat16"),
        ("--ppo --dtype=float16", "cuda", 64, "float16"),
        ("--sft", "cuda", 64, "bfloat16"),
        ("", "cuda", 64, "bfloat16"),
        ("--ppo", "cpu", 64, "float32"),
        ("--ppo --dtype=bfloat16", "cpu", 64, "bfloat16"),
    ],
)
def test_dtype_by_default(flags, device, dim, dtype, monkeypatch):
    """PPO of a small model is in float32 on cuda, which a resumed run knows before it compares its
    flags with those of the checkpoint."""
    monkeypatch.setattr(train, "choose_device", lambda name: device)
    run = train.setup(train.flags(flags.split()))
    saved = {"model_args": {"dim": dim}}
    current = train.with_dtype(run, saved)
    assert str(current.dtype) == f"torch.{dtype}"
    assert train.differences(run, saved | {"config": current.config}) == ""
    other = current.config | {"dtype": "other"}
    assert train.differences(run, saved | {"config": other}) == f"dtype was other, is {dtype}"
