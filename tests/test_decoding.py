"""Generation and packed attention as on a GPU, forced on a CPU: against the plain path, naive
attention, and a stand-in for varlen_attn; the number of graphs that torch.compile makes."""

import inspect
import math
import shutil

import pytest
import torch
from test_model import END, small
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import varlen

import kernels
from kernels import StaticKVCache
from model import Batch, KVCache, Layout, Transformer, apply_rope, generate
from sft import add_lora

SHAPES = [(4, 2, 8), (6, 2, 4), (8, 1, 16), (3, 3, 6), (2, 1, 20)]  # heads, kv heads, head dim


@pytest.fixture
def gpu(monkeypatch):
    """gpu(True) makes kernels.py take the paths of a GPU, gpu(False) those of model.py alone."""
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels, "SMALLEST", 16)

    def force(value):
        monkeypatch.setattr(kernels, "on_gpu", lambda x: value)

    force(False)
    return force


def prompts_of(n, generator=None):
    return [[1] + torch.randint(3, 48, (i,), generator=generator).tolist() for i in range(n)]


def agree(got, expected):
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.ended, expected.ended)
    assert torch.equal(got.lengths, expected.lengths)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)


HOW = [dict(temperature=0), dict(temperature=0.6, top_k=9), dict(top_p=0.8)]
HOW += [dict(survival_limit=0.3)]
CASES = [(*shape, {}) for shape in SHAPES] + [(4, 2, 8, how) for how in HOW]


@pytest.mark.parametrize("H,K,E,how", CASES)
def test_steps_of_fixed_shapes_are_the_plain_ones(gpu, H, K, E, how):
    """Rows that end at a stop token, at the limit and at the context, whose places others take, in
    batches of all sizes; a token at a time; with adapters."""
    model = small(dim=H * E, n_heads=H, n_kv_heads=K, multiple_of=1)
    add_lora(model, rank=2, layers="k,down")
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.5)
    prompts, options = prompts_of(18) + [[1] * 50], dict(stop_ids=END, **how)
    options["uniform"] = torch.rand(19, 40)
    plain = generate(model, prompts, 40, **options)
    gpu(True)
    for max_batch in (19, 7):
        agree(generate(model, prompts, 40, **options, max_batch=max_batch), plain)
    seen = [[] for _ in prompts]
    agree(generate(model, prompts, 40, **options, on_token=lambda i, t: seen[i].append(t)), plain)
    assert seen == plain.responses()
    lengths = plain.lengths.tolist()
    assert len(set(lengths)) > 3 and plain.ended.any() and not plain.ended.all()


def test_the_batch_shrinks_in_powers_of_two(gpu, monkeypatch):
    """The step sees few sizes, and no row that is not in use changes a result."""
    gpu(True)
    sizes, model, step = [], small(), Transformer.sample_step

    def spy(self, batch, active):
        sizes.append(len(active))
        assert (batch.cache.length[: len(active)] + active >= 1).all()  # all attend to something
        step(self, batch, active)
        assert not any(x.isnan().any() for x in batch.cache.all)

    monkeypatch.setattr(Transformer, "sample_step", spy)
    generate(model, [[1]] * 50, 63, stop_ids=(2,), uniform=torch.rand(50, 63))
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {50, 32}
    sizes.clear()
    out = generate(model, [[1]] * 50, 63, stop_ids=(2, 3, 4), uniform=torch.rand(50, 63))
    assert set(sizes) == {50, 16} and len(sizes) == 2 * kernels.WINDOW and out.ended.any()


def test_rows_that_were_never_used(gpu):
    """As in serve.py, whose cache is larger than the batch: no row attends to nothing, which gives
    NaN on some devices."""
    model, zero = small(), torch.zeros(1, dtype=torch.long)
    expected = generate(model, [[1]], 4, temperature=0, stop_ids=())
    gpu(True)
    cache, zeros = model.new_cache(8, 20), torch.zeros(1, 4)
    with torch.no_grad():
        model.hidden(zero[:0], [0], cache)
        state = zero, zero + 1, zeros.long(), zeros + 1, zero.clone(), zero + 4, zeros, zero[:0]
        batch = Batch(cache, *state, (0, 0, 1.0))
        model.sample_tokens(batch, 4)
    assert torch.equal(batch.tokens, expected.tokens) and batch.lengths.item() == 4
    assert cache.length.tolist() == [4] + [1] * 7


@pytest.mark.parametrize("survival_limit", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_steps(gpu, monkeypatch, backend, survival_limit):
    """Without a graph break; one graph per size of the batch; the next generation, whose cache has
    the same size, adds none and has the same numbers; so has one with another temperature."""
    counter = CompileCounterWithBackend(backend)
    compile_with(counter, monkeypatch)
    model = small(n_layers=1)
    prompts, options = prompts_of(33), dict(uniform=torch.rand(33, 45), stop_ids=END, max_batch=33)
    options["survival_limit"] = survival_limit
    plain = generate(model, prompts, 45, **options)
    gpu(True)
    model.compiled_decoding = True
    for _ in range(2):
        agree(generate(model, prompts, 45, **options), plain)
        assert counter.frame_count == 2 and model.compiled_decoding  # of 33 and 16 rows
    assert StaticKVCache.kept[model].compiled
    agree(generate(model, prompts[:9], 45, stop_ids=(), temperature=0), greedy(gpu, model, prompts))


def greedy(gpu, model, prompts):
    gpu(False)
    return generate(model, prompts[:9], 45, stop_ids=(), temperature=0)


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on a CPU")
def test_a_step_compiled_by_inductor_copies_no_cache(gpu, monkeypatch):
    """Keys and values are written in place: no buffer has the size of a layer's cache."""
    step = compile_with("inductor", monkeypatch)
    model, options = small(n_layers=1), dict(uniform=torch.rand(3, 5), stop_ids=END)
    plain = generate(model, [[1]] * 3, 5, **options)
    gpu(True)
    model.compiled_decoding = True
    out, [code] = run_and_get_code(generate, model, [[1]] * 3, 5, **options)
    agree(out, plain)
    assert model.compiled_decoding and step is kernels.compiled_step()
    assert "(3, 2, 64, 8)" in code and "empty_strided_cpu((3, 2, 64, 8)" not in code


def compile_with(backend, monkeypatch):
    how = dict(dynamic=False, fullgraph=True, isolate_recompiles=True, recompile_limit=64)
    step = torch.compile(Transformer.sample_step, backend=backend, **how)
    monkeypatch.setattr(kernels, "compiled_step", lambda: step)
    return step


def test_a_step_that_cannot_be_compiled_runs_as_it_is(gpu, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no Triton here")

    compile_with(broken, monkeypatch)
    model, uniform = small(n_layers=1), torch.rand(3, 9)
    plain = generate(model, [[1]] * 3, 9, stop_ids=END, uniform=uniform)
    gpu(True)
    model.compiled_decoding = True
    agree(generate(model, [[1]] * 3, 9, stop_ids=END, uniform=uniform), plain)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and notes[0].startswith("note:") and "no Triton here" in notes[0]


# ---- attention


@pytest.mark.parametrize("H,K,E", SHAPES)
def test_queries_that_share_a_key_equal_expanded_keys(H, K, E):
    torch.manual_seed(1)
    args = small(dim=H * E, n_heads=H, n_kv_heads=K, multiple_of=1, n_layers=1).args
    cache = KVCache(args, 5, 11, torch.double, "cpu")
    cache.k.normal_()
    cache.v.normal_()
    q, positions = torch.randn(4, H, E).double(), torch.tensor([0, 10, 3, 7])
    mask = torch.full((4, 11), -math.inf).double()
    for row, n in enumerate(positions):
        mask[row, : n + 1] = 0
    layout = Layout(positions, None, None, mask=mask[:, None, None])
    got = cache.attention(0, layout, q)
    for row, n in enumerate(positions.tolist()):
        for head in range(H):
            k, v = (x[0, row, head // (H // K), : n + 1] for x in (cache.k, cache.v))
            weights = (k @ q[row, head] / math.sqrt(E)).softmax(0)
            torch.testing.assert_close(got[row, head], weights @ v)


def test_rotation_in_three_kernels_is_apply_rope(gpu):
    model = small()
    gpu(True)
    tokens = torch.randint(0, 48, (70,))
    layout = model.layout(tokens, [5, 64, 1])
    x = torch.randn(70, 3, model.args.head_dim)
    expected = apply_rope(x, layout.cos, layout.sin)
    torch.testing.assert_close(kernels.rotate(x, layout.cosine, layout.sine), expected)


def naive_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What varlen_attn documents, one query at a time, and what its kernel demands."""
    N, H, E = query.shape
    assert (
        query.dtype in (torch.float16, torch.bfloat16) and key.dtype == value.dtype == query.dtype
    )
    assert E % 8 == 0 and E <= 256 and all(x.stride(-1) == 1 for x in (query, key, value))
    assert key.shape == value.shape and H % key.shape[1] == 0
    assert enable_gqa == (key.shape[1] != H) and window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.is_contiguous()
    ends = cu_seq_q.tolist()
    assert ends == cu_seq_k.tolist() and ends[0] == 0 and ends[-1] == N
    longest = max(b - a for a, b in zip(ends, ends[1:]))
    assert type(max_q) is int and longest <= max_q == max_k
    out = []
    for a, b in zip(ends, ends[1:]):
        for t in range(a, b):
            k, v = (x[a : t + 1].repeat_interleave(H // x.shape[1], 1) for x in (key, value))
            scores = torch.einsum("he,she->hs", query[t].float(), k.float()) / math.sqrt(E)
            out.append(torch.einsum("hs,she->he", scores.softmax(-1), v.float()))
    naive_varlen.calls += 1
    return torch.stack(out).to(query.dtype)


@pytest.fixture
def stand_in(monkeypatch):
    real = inspect.signature(varlen.varlen_attn).parameters
    for name, parameter in inspect.signature(naive_varlen).parameters.items():
        assert real[name].kind == parameter.kind
    naive_varlen.calls = 0
    monkeypatch.setattr(varlen, "varlen_attn", naive_varlen)
    monkeypatch.setattr(kernels, "has_varlen", lambda device: True)


LENGTHS = [5, 1, 33, 17]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_packed_attention_in_half_precision_is_varlen(gpu, stand_in, K, dtype):
    """Under autocast, and with weights in half precision; with and without a cache; gradients."""
    model = small(n_kv_heads=K)
    tokens = torch.randint(0, 48, (sum(LENGTHS),))
    exact = model(tokens, lengths=LENGTHS).detach()
    with torch.autocast("cpu", dtype):
        gpu(False)
        padded = model(tokens, lengths=LENGTHS)
        gpu(True)
        packed = model(tokens, lengths=LENGTHS)
        assert naive_varlen.calls == 2  # layers
        error, usual = ((x.float() - exact).abs().mean() for x in (packed, padded))
        assert 0 < error < 1.2 * usual
        packed.float().square().mean().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        cache = model.new_cache(4, 40)
        with torch.no_grad():
            model.hidden(tokens, LENGTHS, cache)
    assert naive_varlen.calls == 4 and cache.length.tolist() == LENGTHS
    half = small(n_kv_heads=K).to(dtype)
    with torch.no_grad():
        half(tokens, lengths=LENGTHS)
    assert naive_varlen.calls == 6


def test_packed_attention_elsewhere_is_padded(gpu, stand_in):
    """In fp32, for heads that the kernel does not take, and for sequences of equal length."""
    gpu(True)
    tokens = torch.randint(0, 48, (sum(LENGTHS),))
    with torch.no_grad():
        model = small()
        packed = model(tokens, lengths=LENGTHS).split(LENGTHS)
        for part, logits in zip(tokens.split(LENGTHS), packed):
            torch.testing.assert_close(logits, model(part[None])[0], atol=2e-5, rtol=1e-4)
        assert model.layout(tokens, LENGTHS).width == 64  # a multiple of 64
        with torch.autocast("cpu", torch.bfloat16):
            small(dim=24, n_heads=4)(tokens, lengths=LENGTHS)  # E = 6
            model(tokens[None])
            model(tokens[:40], lengths=[20, 20])
    assert naive_varlen.calls == 0


def test_compiled_graphs_do_not_multiply(gpu):
    """50 packed batches of different lengths, whose layouts are made outside: one graph, and no
    graph break; the same logits as without torch.compile."""
    gpu(True)
    model, counter = small(n_layers=1, max_seq_len=200), CompileCounter()
    how = dict(backend=counter, fullgraph=True, dynamic=True)
    compiled = torch.compile(lambda tokens, layout: model(tokens, lengths=layout), **how)
    generator = torch.Generator().manual_seed(0)
    for i in range(50):
        n = int(torch.randint(2, 9, (1,), generator=generator))
        lengths = torch.randint(1, 40 + 3 * i, (n,), generator=generator).tolist()
        tokens = torch.randint(0, 48, (sum(lengths),), generator=generator)
        logits = compiled(tokens, model.layout(tokens, lengths))
        if i % 16 == 0:
            expected = model(tokens, lengths=lengths)
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("force", [False, True])
def test_training_has_no_graph_break(gpu, force):
    """The loss of windows, and of packed text, with the layout made inside of the function; in half
    precision, for which a GPU has its own attention, and with the paths of a CPU."""
    gpu(force)
    model, tokens = small(n_layers=2).train(), torch.randint(0, 48, (2, 30))
    for arguments in (tokens, tokens), (tokens.flatten(), tokens.flatten(), [7, 33, 20]):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            found = torch._dynamo.explain(model)(*arguments)
        assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons
