"""Half precision: what stays in fp32 under autocast, and weights that are kept in half precision."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import ppo
from checkpoint import model_from_checkpoint
from model import ModelArgs, Transformer, TransformerWithValueHead
from preferences import score


def small(cls=Transformer, **changes):
    torch.manual_seed(0)
    args = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, max_seq_len=64)
    model = cls(ModelArgs(**{**args, "multiple_of": 4, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.25)
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
    code = f"import common, os, sys; print('torch' in sys.modules, [os.environ.get(n) for n in {sorted(names)}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    want = (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        if given is None
        else {given: "backend:native"}
    )
    assert done.stdout == f"False {[want.get(n) for n in sorted(names)]}\n", done.stderr
