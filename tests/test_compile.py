"""torch.compile in the stages after pretraining: one graph without breaks, few graphs for batches
of many lengths, and the numbers of the plain functions."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_flags import BASE, COMMON, home, outcome  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend

import kernels
import ppo
import pretraining
import train
from kernels import accelerate
from model import ModelArgs, Transformer, TransformerWithValueHead
from sft import add_lora


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile with a backend that counts graphs and runs their operations as they are, and an
    error instead of a graph break. kernels.c is off, as on a GPU."""
    compile, counter = torch.compile, CompileCounterWithBackend("eager")

    def counted(function, **how):
        return compile(function, backend=counter, fullgraph=True, **how)

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(kernels, "library", lambda: None)
    for cache in kernels.compiled_specification, ppo.compiled_terms:
        cache.cache_clear()
    torch._dynamo.reset()
    yield counter
    for cache in kernels.compiled_specification, ppo.compiled_terms:
        cache.cache_clear()
    torch._dynamo.reset()


def model_of(cls=Transformer, **changes):
    torch.manual_seed(0)
    args = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, max_seq_len=64)
    return accelerate(cls(ModelArgs(**args | changes, multiple_of=4)))


def ragged(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 64, (int(torch.randint(2, 9, (), generator=g)),), generator=g)
    return torch.randint(3, 48, (int(lengths.sum()),), generator=g), lengths.tolist()


@pytest.mark.parametrize("dtype, adapters", [(torch.float32, False), (torch.bfloat16, True)])
def test_few_graphs_for_many_lengths(graphs, dtype, adapters):
    """50 packed batches make at most 2 graphs of the forward pass, with equal values and
    gradients; the log-probabilities, entropies and KLs of 50 batches at most 2 more."""
    plain, fast = (model_of(TransformerWithValueHead) for _ in range(2))
    if adapters:
        add_lora(plain, 2), add_lora(fast, 2)
        fast.load_state_dict(plain.state_dict())
    fast.compiled_hidden = True

    def results(model, tokens, lengths):
        model.zero_grad()
        ref = torch.randn(len(tokens), 48, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model.hidden(tokens, lengths)
            terms = ppo.terms_of(model)(model.output(hidden), tokens.roll(-1), ref)
        torch.stack(terms).mean().backward()
        return [hidden, *terms, *(p.grad for p in model.parameters() if p.grad is not None)]

    for seed in range(50):
        batch = ragged(seed)
        found = results(fast, *batch)
        if seed % 10 == 0:
            far = 1e-5 if dtype == torch.float32 else 0.03
            for x, y in zip(found, results(plain, *batch), strict=True):
                torch.testing.assert_close(x, y, rtol=far, atol=far)
    assert 2 <= graphs.frame_count <= 4


def test_no_graph_for_each_model(graphs):
    """Policy, reference and critic, with and without gradients, stay below the limit of graphs."""
    policy, reference = model_of(n_layers=1), model_of(n_layers=1).requires_grad_(False)
    critic = model_of(TransformerWithValueHead, n_layers=1)
    for seed in range(4):
        for model in policy, reference, critic:
            model.compiled_hidden = True
            with torch.set_grad_enabled(seed % 2 == 0):
                model.hidden(*ragged(seed))
    assert graphs.frame_count <= 6


def test_layers_above_known_ones(graphs):
    plain, fast = model_of(), model_of()
    fast.compiled_hidden = True
    for seed in range(4):
        tokens, lengths = ragged(seed)
        batch = SimpleNamespace(tokens=tokens, lengths=lengths)
        lower = 1, ppo.lower_layers(plain, batch, 1)
        found = fast.hidden(tokens, lengths, lower=lower)
        torch.testing.assert_close(found, plain.hidden(tokens, lengths))
    assert graphs.frame_count == 1


def test_what_cannot_be_compiled_runs_as_it_is(capsys, monkeypatch):
    def fails(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(kernels, "compiled_specification", lambda: fails)
    plain, fast = model_of(), model_of()
    fast.compiled_hidden = True
    tokens, lengths = ragged(0)
    for _ in range(2):
        assert torch.equal(fast.hidden(tokens, lengths), plain.hidden(tokens, lengths))
    assert capsys.readouterr().err == "note: the forward pass is not compiled: no compiler\n"


STAGES = {
    "sft": dict(BASE["--sft"], compile=True),
    "sft, adapters": dict(BASE["--sft"], lora_rank=2, compile=True),
    "rm": dict(COMMON, rm=True, compile=True),
    "dpo": dict(COMMON, dpo=True, compile=True, learning_rate=1e-3),
    "ppo": BASE["--ppo"],
}
RANKED = dict(max_iters=3, eval_iters=1, warmup_iters=0, max_gen_len=4, reference_samples=2)


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_stages(home, tmp_path, capsys, monkeypatch, graphs, stage):  # noqa: F811
    """Every number in the log of a run is that of a run without torch.compile. (PPO compiles on
    cuda alone: here it is told to.)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "peak_matmul_flops", lambda *_: 1e12)
    flags = STAGES[stage]
    if stage in ("rm", "dpo"):
        flags = flags | RANKED | {"data": "{}/pairs.jsonl"}

    def log(**more):
        found = outcome(home, tmp_path / "out", capsys, monkeypatch, **flags | more)
        assert found["error"] == ""
        (records,) = (v for k, v in found.items() if k.endswith(".jsonl"))
        return records

    want = log(**{"compile": False} if "compile" in flags else {})
    assert graphs.frame_count == 0
    if stage == "ppo":
        monkeypatch.setattr(kernels.FastTransformer, "compiled_hidden", True)
    for a, b in zip(log(), want, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-4), k
    assert graphs.frame_count >= 1


def test_ddp_is_inside_of_the_compiled_function(home, monkeypatch):  # noqa: F811
    """Around DDP torch.compile splits the graph where DDP reduces gradients."""
    monkeypatch.setattr(pretraining, "peak_matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(pretraining, "DistributedDataParallel", lambda model, **_: ["ddp", model])
    monkeypatch.setattr(torch, "compile", lambda function: ["compiled", function])
    monkeypatch.setattr(kernels, "library", lambda: None)
    flags = f"--data={home} --vocab_source=custom --vocab_size=320 --dim=16 --n_layers=1"
    flags += " --n_heads=2 --max_seq_len=32 --device=cpu --compile"
    run = train.setup(train.flags(flags.split()))
    stage = train.Pretraining(replace(run, world=2), None)
    assert stage.forward == ["compiled", ["ddp", stage.model]]
