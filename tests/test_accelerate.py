"""kernels.accelerate: the fast model has the results of the plain one, and its fast path runs where
it should, also with adapters, copies, autocast, DDP, FSDP and torch.compile."""

import ast
import inspect
import re
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import kernels
import model as M
import ppo
import pretraining
from checkpoint import checkpoint_args, model_from_checkpoint
from kernels import FAST, FastKVCache, accelerate
from model import ModelArgs, Transformer, TransformerWithValueHead, generate
from sft import LoRALinear, add_lora

LAYER = {"norm_qkv", "attention_forward", "feed_forward"}
LAYER_BACKWARD = {"norm_qkv_backward", "attention_backward", "feed_forward_backward"}
LOSS = {"token_terms", "token_terms_backward"}
RAGGED = [5, 1, 60, 33, 64, 2, 64, 47]  # tokens of packed sequences, 276 in all


def small(cls=Transformer, **changes):
    torch.manual_seed(0)
    args = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, max_seq_len=64)
    model = cls(ModelArgs(**{**args, "multiple_of": 4, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.25)
    return model


def both(cls=Transformer, **changes):
    plain = small(cls, **changes)
    return plain, accelerate(deepcopy(plain))


def text(*shape):
    return torch.randint(3, 48, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions of kernels.c that are called."""
    if kernels.library() is None:
        pytest.skip("kernels.c cannot be compiled here")
    names, real = [], kernels.call

    def call(name, *args, **fields):
        names.append(name)
        return real(name, *args, **fields)

    monkeypatch.setattr(kernels, "call", call)
    return names


def results(model, tokens, lengths=None):
    """Loss and gradients, by name."""
    model.zero_grad()
    loss = model(tokens, tokens.roll(-1, -1), lengths)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{n: g.clone() for n, g in found.items()}}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        scale = float(want.detach().abs().max())
        torch.testing.assert_close(found[name], want, atol=1e-5 * max(scale, 1), rtol=1e-5)


# ----------------------------------------------------------------------------
# model.py is a file of its own


def sources():
    return {p.stem: p.read_text() for p in ROOT.glob("*.py")}


def imported(source):
    """The modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_model_needs_pytorch_alone():
    names = {name.partition(".")[0] for name in imported(sources()["model"])}
    assert names == {"math", "dataclasses", "typing", "torch"}


def test_model_can_be_read_in_one_go():
    lines = sources()["model"].splitlines()
    assert len(lines) <= 500 and max(map(len, lines)) <= 100
    assert not re.search(r"kernels\.(?!accelerate)|native|fmt: skip", sources()["model"])


def test_no_module_imports_itself_through_others():
    source = sources()
    graph = {
        name: {i.partition(".")[0] for i in imported(text)} & set(source)
        for name, text in source.items()
    }
    while leaves := [name for name, needs in graph.items() if not needs]:
        graph = {name: needs - set(leaves) for name, needs in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {graph}"


def test_the_map_of_fast_twins_names_what_is_there():
    """Each row of the table in kernels.py: specification, fast twin, test."""
    rows = [
        re.split(r"  +", line.strip()) for line in kernels.__doc__.splitlines() if "test_" in line
    ]
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    modules = {"model": M, "ppo": ppo, "nn": torch.nn}
    assert len(rows) >= 10
    for specification, twin, test in (row for row in rows if len(row) == 3):
        found = modules.get(specification.partition(".")[0])
        for name in specification.split(".")[1:]:
            found = getattr(found, name)
        assert callable(found), specification
        assert twin == "accelerate" or hasattr(kernels, twin.partition(":")[0])
        assert re.search(rf"def {test.rstrip(',').replace('*', '')}", tests), test


def test_each_fast_class_has_the_methods_of_the_plain_one():
    """A fast class overrides methods of the plain one, with as many parameters, and adds none."""
    for plain, fast in (*FAST.items(), (M.KVCache, FastKVCache)):
        assert issubclass(fast, plain)
        for name, function in vars(fast).items():
            if inspect.isfunction(function) and name != "__init__":
                of_plain = inspect.signature(getattr(plain, name)).parameters
                assert len(inspect.signature(function).parameters) == len(of_plain)


# ----------------------------------------------------------------------------
# the same numbers


@pytest.mark.parametrize("cls", [Transformer, TransformerWithValueHead])
def test_accelerated_dense_and_packed(calls, cls):
    plain, fast = both(cls)
    assert fast.state_dict().keys() == plain.state_dict().keys() and isinstance(fast, cls)
    for tokens, lengths in ((text(8, 40), None), (text(sum(RAGGED)), RAGGED)):
        want = results(plain, tokens, lengths)
        assert not calls
        assert_same(results(fast, tokens, lengths), want)
        assert LAYER | LAYER_BACKWARD | LOSS | {"rms_norm_forward"} <= set(calls)
        assert calls.count("feed_forward") == calls.count("norm_qkv") == 2
        with torch.no_grad():
            assert_same({"": fast(tokens, None, lengths)}, {"": plain(tokens, None, lengths)})
        if cls is TransformerWithValueHead:
            hidden = plain.hidden(tokens, lengths)
            assert_same({"": fast.values(hidden)}, {"": plain.values(hidden)})
        calls.clear()


def test_an_empty_batch_has_no_gradients(calls):
    model = both()[1]
    state = model.hidden(torch.zeros(0, dtype=torch.long), [])
    state.sum().backward()
    assert state.shape == (0, 32) and {"rms_norm_forward", "rms_norm_backward"} <= set(calls)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_strided_parameters(calls):
    """As load_state_dict(assign=True) leaves those that are views."""
    plain, fast = both(tied=False)
    state = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in plain.state_dict().items()}
    fast.load_state_dict(state, assign=True)
    assert not fast.norm.weight.is_contiguous()
    tokens = text(3, 40)
    assert_same(results(fast, tokens), results(plain, tokens))
    uniform = torch.rand(2, 20)
    drawn = [
        generate(m.eval(), [[1, 5], [1]], 20, stop_ids={2}, uniform=uniform) for m in (plain, fast)
    ]
    assert drawn[0].responses() == drawn[1].responses() and "decode_tokens" in calls


def test_accelerated_prefill_and_decode(calls):
    plain, fast = both(max_seq_len=80)
    caches = [model.eval().new_cache(8, 80) for model in (plain, fast)]
    assert type(caches[0]) is M.KVCache and type(caches[1]) is FastKVCache
    with torch.no_grad():
        want, got = (m.hidden(text(sum(RAGGED)), RAGGED, c) for m, c in zip((plain, fast), caches))
        assert_same({"": got}, {"": want})
        assert set(calls) == LAYER | {"rms_norm_forward"}
        for token in text(10, 8):
            want, got = (m.hidden(token, None, c) for m, c in zip((plain, fast), caches))
            assert_same({"": got}, {"": want})
        assert calls.count("decode_hidden") == 10
    assert all(c.length.tolist() == [n + 10 for n in RAGGED] for c in caches)


@pytest.mark.parametrize("lengths", [[3], [1, 0, 5, 2], [0], [2] * 20, [kernels.FEW_STEPS]])
def test_few_short_prompts_are_cached_in_steps(calls, lengths):
    """One call of kernels.c, after rows that are in use, with the numbers of the plain pass."""
    plain, fast = both(max_seq_len=80)
    caches = [model.eval().new_cache(2 + len(lengths), 40) for model in (plain, fast)]
    tokens, results = text(sum(lengths)), []
    with torch.no_grad():
        for model, cache in zip((plain, fast), caches):
            model.hidden(text(6), [4, 2], cache)
            calls.clear()
            hidden = [model.hidden(tokens, lengths, cache)]
            names = list(calls)
            for token in text(3 * len(cache.length)).view(3, -1):
                hidden.append(model.hidden(token, None, cache))
            results.append(torch.cat(hidden))
        assert names == ["decode_hidden", "rms_norm_forward"]
    assert_same({"": results[1]}, {"": results[0]})
    assert all(c.length.tolist() == [n + 3 for n in [4, 2, *lengths]] for c in caches)


@pytest.mark.parametrize("dim, most", [(32, 16), (64, 16), (96, 7), (128, 4), (256, 1), (512, 0)])
def test_steps_of_prompts_for_wider_models(calls, dim, most):
    """A step takes time in proportion to dim²: the ordinary pass is faster sooner."""
    fast = accelerate(small(dim=dim, n_heads=dim // 8, n_layers=1)).eval()
    with torch.no_grad():
        for n in most, most + 1:
            calls.clear()
            fast.hidden(text(n), [n], fast.new_cache(1, 40))
            assert ("decode_hidden" in calls) == (n == most)


PROMPTS = [[1] + text(n).tolist() for n in range(40)]


@pytest.mark.parametrize(
    "how, function",
    [
        (dict(temperature=0), "decode_hidden"),
        (dict(temperature=0.7), "decode_tokens"),
        (dict(top_k=5), "decode_hidden"),
        (dict(top_p=0.8), "decode_hidden"),
        (dict(temperature=0.7, survival_limit=0.3), "decode_tokens"),
        (dict(top_k=40, survival_limit=0.3), "decode_hidden"),
    ],
)
def test_accelerated_generation(calls, how, function):
    uniform = torch.rand(40, 30)
    want, got = (
        generate(model, PROMPTS, 30, stop_ids=(1, 2), uniform=uniform, max_batch=17, **how)
        for model in both()
    )
    assert got.responses() == want.responses() and torch.equal(got.ended, want.ended)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-4, rtol=1e-4)
    assert function in calls and len({len(r) for r in got.responses()}) > 3


def test_log_probability_entropy_and_kl(calls, monkeypatch):
    """The specification in ppo.py and its fast twin: values, and the gradient of any mix of
    them."""
    logits, ref, mix = torch.randn(70, 48) * 3, torch.randn(70, 48), torch.randn(3, 70)
    target = torch.randint(-1, 48, (70,))

    def values(reference):
        x = logits.clone().requires_grad_()
        out = torch.stack(ppo.logprob_entropy_kl(x, target, reference))
        (out * mix).sum().backward()
        return {"values": out.detach(), "gradient": x.grad}

    for reference in (ref, None):
        fast = values(reference)
        assert calls == ["token_terms", "token_terms_backward"]
        with monkeypatch.context() as m:
            m.setenv("NATIVE_KERNELS", "0")
            assert_same(fast, values(reference))
        assert len(calls) == 2
        calls.clear()


# ----------------------------------------------------------------------------
# what else is done with a model


def test_fast_paths_can_be_switched_off(calls, monkeypatch):
    monkeypatch.setenv("NATIVE_KERNELS", "0")
    plain, same = both()
    assert [type(m) for m in same.modules()] == [type(m) for m in plain.modules()]
    tokens = text(8, 40)
    want = results(plain, tokens)
    assert all(torch.equal(v, want[n]) for n, v in results(same, tokens).items())
    generate(same, PROMPTS, 3, stop_ids=(1, 2))
    assert not calls


def test_models_that_are_built_for_use_are_fast():
    plain = small()
    saved = {"model": plain.state_dict(), "model_args": checkpoint_args(plain.args)}
    for cls in (Transformer, TransformerWithValueHead):
        assert type(model_from_checkpoint(saved, cls)) is FAST[cls]
    sizes = {name: getattr(plain.args, name) for name in pretraining.MODEL_FLAGS}
    stage = SimpleNamespace(args=SimpleNamespace(**sizes, dropout=0.0))
    assert type(pretraining.Pretraining.build(stage, None)) is FAST[Transformer]


@pytest.mark.parametrize(
    "changes, absent",
    [
        (dict(n_heads=1, n_kv_heads=1), {"attention_forward"}),  # a head of 32
        (dict(dim=40, multiple_of=3), {"norm_qkv", "feed_forward", "rms_norm_forward"}),
        (dict(vocab_size=50), {"token_terms"}),
    ],
)
def test_shapes_that_do_not_fit_are_left_to_the_plain_class(calls, changes, absent):
    plain, fast = both(**changes)
    assert_same(results(fast, text(8, 40)), results(plain, text(8, 40)))
    assert calls and not absent & set(calls)


class OtherNorm(M.RMSNorm):
    """Another norm with the parameters of RMSNorm, as a reader of the code may try one."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize("place", ["attention_norm", "ffn_norm", "norm"])
def test_a_replaced_norm_is_not_passed_over(calls, place):
    plain = small(max_seq_len=80)
    owner = plain if place == "norm" else plain.layers[1]
    setattr(owner, place, OtherNorm(32, 1e-5))
    fast = accelerate(deepcopy(plain))
    assert_same(results(fast, text(8, 40), None), results(plain, text(8, 40), None))
    uniform = torch.rand(40, 30)
    want, got = (
        generate(model, PROMPTS, 30, stop_ids=(1, 2), uniform=uniform, temperature=0.7)
        for model in (plain, fast)
    )
    assert got.responses() == want.responses()


def test_other_dtypes_are_left_to_the_plain_classes(calls):
    plain, fast = (model.double() for model in both())
    assert_same(results(fast, text(8, 40)), results(plain, text(8, 40)))
    options = dict(stop_ids=(1, 2), uniform=torch.rand(40, 5))
    assert generate(fast, PROMPTS, 5, **options).tokens.equal(
        generate(plain, PROMPTS, 5, **options).tokens
    )
    assert set(calls) == {"rms_norm_forward", "rms_norm_backward"}  # the norms are in fp32 anyway


def test_autocast_is_left_to_the_plain_classes(calls):
    plain, fast = both()
    with torch.autocast("cpu", torch.bfloat16):
        want = results(plain, text(8, 40))
        assert all(torch.equal(v, want[n]) for n, v in results(fast, text(8, 40)).items())
        assert fast.new_cache(2, 8).k.dtype == torch.bfloat16
        generate(fast, PROMPTS, 3, stop_ids=(1, 2))
    assert not calls
    results(fast, text(8, 40))
    assert LAYER <= set(calls)  # after it the fast path is back


def test_fake_tensors_run_the_plain_classes(calls):
    with FakeTensorMode():
        loss = accelerate(small())(torch.zeros(8, 40, dtype=torch.long), torch.zeros(8, 40).long())
        loss.backward()
    assert not calls and loss.shape == ()


def test_a_copy_is_as_fast(calls):
    plain, fast = both()
    copy = deepcopy(fast)
    assert [type(m) for m in copy.modules()] == [type(m) for m in fast.modules()]
    assert_same(results(copy, text(8, 40)), results(plain, text(8, 40)))
    assert LAYER | LAYER_BACKWARD | LOSS <= set(calls)
    assert accelerate(copy) is copy and type(copy) is FAST[Transformer]  # once more changes nothing


ADAPTERS = {  # layers with adapters: what is no longer one function
    "q,v": {"norm_qkv", "norm_qkv_backward"},
    "o": set(),
    "gate,down": {"feed_forward", "feed_forward_backward"},
}


@pytest.mark.parametrize("layers", ADAPTERS)
@pytest.mark.parametrize("late", [False, True])
def test_adapters(calls, layers, late):
    """Adapters on a fast model, or on one that becomes fast afterwards; alone and in a copy; merged
    in the fast KV cache."""
    plain = add_lora(small(), 3, 6.0, 0.0, layers)
    fast = (
        accelerate(add_lora(small(), 3, 6.0, 0.0, layers))
        if late
        else add_lora(accelerate(small()), 3, 6.0, 0.0, layers)
    )
    for p in (p for n, p in plain.named_parameters() if ".lora_" in n):
        torch.nn.init.normal_(p, std=0.3)
    fast.load_state_dict(plain.state_dict())
    fast = deepcopy(fast)
    want = results(plain, text(8, 40))
    assert not calls and all(n == "loss" or ".lora_" in n for n in want)
    assert_same(results(fast, text(8, 40)), want)
    assert (LAYER | LAYER_BACKWARD | LOSS) - ADAPTERS[layers] <= set(calls)
    assert not ADAPTERS[layers] & set(calls)
    assert sum(type(m) is LoRALinear for m in fast.modules()) == 2 * len(layers.split(","))
    options = dict(stop_ids=(1, 2), uniform=torch.rand(40, 30))
    want, got = (generate(m, PROMPTS, 30, 0.8, **options) for m in (plain, fast))
    assert got.responses() == want.responses() and "decode_tokens" in calls


def test_products_under_adapters_are_fast(monkeypatch):
    """A frozen matrix is multiplied as the layer below would, and by no gradient of its own."""
    shapes, onednn = [], kernels.onednn
    monkeypatch.setattr(kernels, "onednn", lambda x, w: shapes.append(w.shape) or onednn(x, w))
    model = add_lora(accelerate(small()), 2, layers="q")
    results(model, text(8, 40))
    assert shapes.count((32, 32)) >= 2  # wq of two layers


@contextmanager
def one_process(folder):
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_ddp(calls, tmp_path):
    plain, fast = both()
    want = results(plain, text(8, 40))
    with one_process(tmp_path):
        found = results(DistributedDataParallel(fast, broadcast_buffers=False), text(8, 40))
    assert_same({n.removeprefix("module."): v for n, v in found.items()}, want)
    assert LAYER | LAYER_BACKWARD | LOSS <= set(calls)


def test_fsdp_with_activations_computed_again(calls, tmp_path):
    plain, fast = both()
    want = results(plain, text(8, 40))
    with one_process(tmp_path):
        pretraining.shard(pretraining.checkpoint_activations(fast), "cpu", torch.float32)
        found = {
            n: v.full_tensor() if hasattr(v, "full_tensor") else v
            for n, v in results(fast, text(8, 40)).items()
        }
    assert_same(found, want)
    assert LAYER | LAYER_BACKWARD | LOSS <= set(calls)
    assert all(calls.count(name) == 4 for name in LAYER)  # each of two layers twice


def test_compiled(calls):
    """torch.compile traces the plain functions in one piece; around it the fast path stays."""
    plain, fast = both()
    tokens = text(8, 40)
    want = results(plain, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    found = results(compiled, tokens)
    assert_same({n.removeprefix("_orig_mod."): v for n, v in found.items()}, want)
    assert not calls
    other = results(compiled, text(5, 60)), results(plain, text(5, 60))  # now with dynamic shapes
    assert_same({n.removeprefix("_orig_mod."): v for n, v in other[0].items()}, other[1])
    assert not calls
    results(fast, tokens)
    assert LAYER | LAYER_BACKWARD | LOSS <= set(calls)
