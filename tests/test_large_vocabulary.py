"""Large vocabularies: losses of a few tokens at a time have the values and gradients of the plain
functions, and the logits of all tokens are never stored."""

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import one_process
from test_flags import BASE, COMMON, home, outcome  # noqa: F401
from torch.distributed.tensor import DTensor

import kernels
import pretraining
from kernels import accelerate
from model import ModelArgs, Transformer
from ppo import logprob_entropy_kl


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Every vocabulary is large, and a chunk has 16 tokens."""
    monkeypatch.setattr(kernels, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(kernels, "CHUNK", 16)


def model_of(vocab, **changes):
    torch.manual_seed(0)
    args = dict(dim=16, n_layers=1, n_heads=2, max_seq_len=64, multiple_of=8)
    return Transformer(ModelArgs(vocab_size=vocab, **args | changes))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("n", [1, 16, 50])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("hidden", "weight")])
def test_large_vocabulary_loss_is_that_of_pytorch(tiny_chunks, monkeypatch, native, n, frozen):
    """Against F.cross_entropy in float64, without some targets and without some gradients."""
    monkeypatch.setattr(kernels, "MIN_ROWS", 8)
    if not native:
        monkeypatch.setattr(kernels, "library", lambda: None)
    hidden, weight, targets = torch.randn(n, 16), torch.randn(48, 16), torch.randint(-1, 48, (n,))
    targets[0] = 3

    def results(function, dtype):
        inputs = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
        inputs = {k: v.clone().requires_grad_(k not in frozen) for k, v in inputs.items()}
        loss = function(*inputs.values())
        if len(frozen) < 2:
            (3 * loss).backward()  # a gradient other than 1
        return [loss.detach().double(), *(x.grad for x in inputs.values() if x.grad is not None)]

    found = results(lambda h, w: kernels.cross_entropy(h, w, targets), torch.float32)
    want = results(lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=-1), torch.float64)
    assert len(found) == len(want) == 3 - len(frozen)
    for x, y in zip(found, want):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


def test_large_vocabulary_has_no_logits_of_tokens_without_a_target(tiny_chunks, monkeypatch):
    sizes, summed = [], kernels.summed_cross_entropy

    def watched(logits, targets, gradient):
        sizes.append(len(logits))
        return summed(logits, targets, gradient)

    monkeypatch.setattr(kernels, "summed_cross_entropy", watched)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(48, 16)
    targets = torch.full((50,), -1)
    targets[[0, *range(7, 45, 2)]] = 5
    loss = kernels.cross_entropy(hidden, weight, targets)
    loss.backward()
    assert sizes == [16, 4]
    learned = targets != -1
    assert hidden.grad[learned].any(1).all() and not hidden.grad[~learned].any()
    expected = F.cross_entropy(hidden[learned] @ weight.T, targets[learned])
    torch.testing.assert_close(loss, expected)


def test_large_vocabulary_gradients_by_finite_differences(tiny_chunks):
    hidden, weight = torch.randn(20, 4).double(), torch.randn(9, 4).double()
    ref, targets = torch.randn(20, 9).double(), torch.randint(-1, 9, (20,))

    def terms(hidden, targets, ref):  # logprob_entropy_kl in float64
        logp, ref = (hidden @ weight.T).log_softmax(-1), ref.log_softmax(-1)
        logprob = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
        return logprob, -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - ref)).sum(-1)

    inputs = [x.requires_grad_() for x in (hidden, weight)]
    torch.autograd.gradcheck(lambda h, w: kernels.cross_entropy(h, w, targets), inputs)
    torch.autograd.gradcheck(lambda h, w: kernels.in_chunks(terms, 9, h, targets, ref), inputs)
    loss = kernels.cross_entropy(*inputs, targets)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, inputs[1], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_vocabulary_model_is_the_plain_one(tiny_chunks, dtype):
    """Loss and gradients, also under autocast, within its rounding; and without targets."""
    plain, fast = model_of(48), accelerate(model_of(48))
    tokens = torch.randint(48, (3, 50))
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(3, 50) < 0.2, -1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = [model(tokens, targets) for model in (plain, fast)]
        for loss in losses:
            loss.backward()
        assert torch.isnan(fast(tokens, targets * 0 - 1))  # as the mean of no numbers
    far = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(*losses, rtol=far, atol=0)
    for a, b in zip(plain.parameters(), fast.parameters()):
        assert float((a.grad - b.grad).norm() / a.grad.norm()) < 10 * far


@pytest.mark.parametrize("autocast", [False, True])
def test_large_vocabulary_terms_are_those_of_one_chunk(tiny_chunks, monkeypatch, autocast):
    model, ref = accelerate(model_of(48)), torch.randn(50, 48)
    hidden, actions, mix = torch.randn(50, 16), torch.randint(48, (50,)), torch.randn(3, 50)

    def results():
        model.zero_grad()
        x = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = kernels.in_chunks(
                lambda h, a, r: logprob_entropy_kl(model.output(h), a, r), 48, x, actions, ref
            )
        (torch.stack(out) * mix).sum().backward()
        return [*out, x.grad, model.output.weight.grad.clone()]

    found = results()
    assert found[0].grad_fn.name() == "CatBackward0"
    monkeypatch.setattr(kernels, "CHUNK", 50)
    for x, y in zip(found, results()):
        torch.testing.assert_close(
            x, y, rtol=2**-7 if autocast else 1e-5, atol=1e-2 * autocast + 1e-6
        )


def peak_bytes(function):
    """The largest number of bytes that `function` has allocated at a time, from the profiler's
    record of each allocation and release."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    used = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("what", ["loss", "evaluation", "terms"])
def test_large_vocabulary_memory(monkeypatch, what, autocast):
    """No more than the logits of a few chunks and the output layer's weight and gradient, however
    many tokens there are; the plain functions store the logits of all tokens several times."""
    V, N, D, chunk = 16384, 1024, 16, 64
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    model = accelerate(model_of(V))
    hidden, tokens = torch.randn(N, D), torch.randint(V, (16, 64))
    ref = torch.randn(N, D)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if what == "evaluation":
                with torch.no_grad():
                    return model(tokens, tokens)
            if what == "loss":
                return model(tokens, tokens).backward()
            out = kernels.in_chunks(
                lambda h, a, r: logprob_entropy_kl(
                    model.output(h), a, model.output(r).detach()
                ),
                V, hidden.requires_grad_(), tokens.flatten(), ref,
            )  # fmt: skip
        torch.stack(out).sum().backward()

    found = peak_bytes(run)
    monkeypatch.setattr(kernels, "LARGE_VOCABULARY", V + 1)
    plain = peak_bytes(run)
    logits, layer = 4 * chunk * V, 4 * V * D
    assert found < {"loss": 3, "evaluation": 3, "terms": 6}[what] * logits + 4 * layer
    assert plain > 4 * N * V > found


STAGES = {
    "sft": BASE["--sft"],
    "sft, adapters": dict(BASE["--sft"], lora_rank=2),
    "ppo": BASE["--ppo"],
    "ppo, shared": dict(BASE["--ppo"], value_model="shared", ptx_coef=0.1, temperature=0.8),
    "dpo": dict(COMMON, dpo=True, max_iters=2, eval_iters=1, warmup_iters=0, max_gen_len=4)
    | dict(reference_samples=2, data="{}/pairs.jsonl", learning_rate=1e-3),
}


@pytest.mark.parametrize("stage", STAGES)
def test_large_vocabulary_stages(home, tmp_path, capsys, monkeypatch, stage):  # noqa: F811
    """Every number in the log of a run is that of a run that stores the logits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "peak_matmul_flops", lambda *_: 1e12)

    def log():
        found = outcome(home, tmp_path / "out", capsys, monkeypatch, **STAGES[stage])
        assert found["error"] == ""
        (records,) = (v for k, v in found.items() if k.endswith(".jsonl"))
        return records

    want, chunks = log(), []
    monkeypatch.setattr(kernels, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(kernels, "CHUNK", 16)
    for name in ("recompute_in_backward", "summed_cross_entropy"):
        real = getattr(kernels, name)
        watched = lambda *a, real=real, **k: chunks.append(1) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(kernels, name, watched)
    for a, b in zip(log(), want, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-4), k
    assert len(chunks) > 4


def test_large_vocabulary_with_fsdp(tiny_chunks, tmp_path):
    """The output layer is used outside of the sharded model's forward pass, also when the backward
    pass computes the logits again."""
    tokens = torch.randint(48, (3, 20))

    def results(model):
        hidden = model.hidden(tokens).flatten(0, 1)
        terms = kernels.in_chunks(
            lambda h, a: logprob_entropy_kl(model.output(h), a), 48, hidden, tokens.flatten()
        )
        loss = model(tokens, tokens) + torch.stack(terms).sum()
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        return [loss, *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)]

    want, sharded = results(model_of(48)), accelerate(model_of(48))
    with one_process(tmp_path):
        pretraining.shard(sharded, "cpu", torch.float32)
        for x, y in zip(results(sharded), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
