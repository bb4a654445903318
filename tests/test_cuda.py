"""Every stage with --device=cuda, on the simulated device of simulated_cuda.py. Its counts are
asserted, so that a change that makes a GPU wait, or take a slow kernel, fails without a GPU."""

import json
import math
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
import train
from checkpoint import checkpoint_args, save_checkpoint
from experiments.plan import plan, plan_stage
from model import ModelArgs, Transformer
from pretraining import Pretraining

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 320  # 256 bytes, 3 control tokens, letters
SHAPE = dict(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, multiple_of=16, max_seq_len=40)


@pytest.fixture(scope="module")
def card():
    """Runs commands on the simulated device, in one process. card("train.py", input, name=value)
    returns their counts as attributes: kernels, waits, attention (Counters), peak, output. It fails
    for a command that fails, and where attention takes the math kernel."""
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
        flags = {"device": "cuda"} | flags
        words = [str(ROOT / script), *(f"--{k}={v}" for k, v in flags.items())]
        process.stdin.write(json.dumps([words, text]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process of the simulated device has died: {process.poll()}"
        result = SimpleNamespace(**json.loads(answer))
        assert result.status == 0, result.output
        for name in simulated_cuda.COUNTS:
            setattr(result, name, Counter(getattr(result, name)))
        slow = [place for place in result.attention if place.startswith("math")]
        assert not slow, f"attention takes the math kernel, which stores all scores: {slow}"
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
            prompt, *texts = (" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(3))
            sft.write(json.dumps({"prompt": prompt, "response": texts[0]}) + "\n")
            pairs.write(json.dumps({"prompt": f"say {i}", "completions": texts}) + "\n")
    return folder


NEW = dict(vocab_source="custom", vocab_size=VOCAB, compile=False, init_from="scratch", **SHAPE)
PPO = dict(ppo=True, rollouts=8, max_gen_len=16, start_len=6, target_len=10, roof_prompts=2)
PPO |= dict(roof_samples=4, report_rollouts=8)
# Flags of each stage, and how often at most Python may wait for the device per iteration, logging
# included. In a PPO iteration that are two optimizer steps on eight rollouts.
UPDATE_WAITS = 4  # per PPO optimizer step: statistics, gradient norms, one per forward pass
STAGES = {
    "pretraining": (NEW, 1),
    "pretraining, Muon": (NEW | dict(optimizer="muon", gradient_accumulation_steps=2), 1),
    "pretraining, float16": (NEW | dict(dtype="float16"), 2),
    "SFT": (dict(sft=True, data="sft.jsonl"), 2),
    "LoRA": (dict(sft=True, data="sft.jsonl", lora_rank=2), 2),
    "reward model": (dict(rm=True, data="pairs.jsonl"), 2),
    "DPO": (dict(dpo=True, data="pairs.jsonl"), 3),
    "PPO": (PPO, 47),
    "PPO, float16": (PPO | dict(dtype="float16"), 47),
    "PPO, exact end": (PPO | dict(exact_end=True), 49),
    "PPO, shared critic": (PPO | dict(value_model="shared"), 43),
    "PPO, no critic": (PPO | dict(advantage="rloo", group_size=2), 36),
    "PPO, averaged": (PPO | dict(averaging=0.9, ptx_coef=0.1, lora_rank=2), 47),
    "PPO, offload": (PPO | dict(offload=True), 73),
    "PPO, reference on the CPU": (PPO | dict(ref_device="cpu"), 53),
}


def stage_flags(home, out, name, iterations, **more):
    """The flags of a tiny run of a stage, which starts from the random model."""
    special = STAGES[name][0]
    flags = dict(out_dir=out, init_from=home / "ckpt.pt", batch_size=4, learning_rate=1e-3)
    flags |= (
        dict(dtype="bfloat16", max_iters=iterations, eval_interval=1000, eval_iters=1)
        | special
        | more
    )
    if "ppo" in special:
        flags["ppo_iters"] = flags.pop("max_iters")
    return flags | {"data": home / special.get("data", "")}


def log_of(folder):
    """The numbers of a run's log, without those that measure time: a list of dicts."""
    (path,) = Path(folder).glob("*log.jsonl")
    times = "ms", "mfu", "tokens_per_s", "time/"
    records = [json.loads(line) for line in path.open()]
    return [{k: v for k, v in r.items() if not k.startswith(times)} for r in records]


def most(counter):
    """The lines with the largest counts, for messages."""
    return "; ".join(f"{k} {v}" for k, v in counter.most_common(12))


def planned_bytes(options):
    """The memory of one card that --plan estimates for a command."""
    args = train.flags([f"--{k}={v}" for k, v in options.items()])
    estimate = plan if train.stage_class(args) is Pretraining else plan_stage
    return estimate(args, ModelArgs(vocab_size=VOCAB, **SHAPE))[0][2]


@pytest.mark.parametrize("name", STAGES)
def test_stages(card, home, tmp_path, name):
    """Two iterations: the numbers are finite, Python waits rarely, the memory is that of --plan."""
    options = stage_flags(home, tmp_path, name, 2)
    run, planned = card("train.py", **options), planned_bytes(options)
    numbers = [x for record in log_of(tmp_path) for x in record.values() if isinstance(x, float)]
    assert len(numbers) > 5 and all(map(math.isfinite, numbers))
    assert run.step_waits.total() / 2 <= STAGES[name][1], most(run.step_waits)
    assert run.step_peak <= planned, run.peak_line


def test_an_update_of_ppo_waits_rarely(card, home, tmp_path):
    """The waits per optimizer step, from runs with one epoch and with three."""
    one, three = (
        card("train.py", **stage_flags(home, tmp_path / n, "PPO", 1, ppo_epochs=n, target_kl=9))
        for n in "13"
    )
    waits = three.step_waits - one.step_waits
    assert waits.total() / 4 <= UPDATE_WAITS, most(waits)


@pytest.mark.parametrize("name", ["pretraining", "SFT", "DPO", "PPO"])
def test_the_device_computes_what_the_cpu_does(card, home, tmp_path, name):
    logs = []
    for device in "cuda", "cpu":
        options = stage_flags(home, tmp_path / device, name, 2, dtype="float32", device=device)
        card("train.py", **options)
        logs.append(log_of(tmp_path / device))
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", ["pretraining, Muon", "PPO, averaged"])
def test_a_resumed_run_is_the_same_run(card, home, tmp_path, name):
    for out, iterations in (("whole", 2), ("parts", 1)):
        card("train.py", **stage_flags(home, tmp_path / out, name, iterations, decay_lr=False))
    again = dict(init_from="resume", decay_lr=False)
    resumed = tmp_path / "parts"
    card("train.py", **stage_flags(home, resumed, name, 2) | again)
    whole, parts = log_of(tmp_path / "whole"), log_of(resumed)
    assert [whole[0], whole[-1]] == [parts[0], parts[-1]]


def test_sampling_chat_and_evaluation(card, home, tmp_path):
    checkpoint = dict(checkpoint=home / "ckpt.pt", tokenizer=home / f"tok{VOCAB}.model")
    run = card("sample.py", start="One day", max_new_tokens=20, top_k=20, top_p=0.9, **checkpoint)
    assert "One day" in run.output
    run = card("sample.py", "Hello\nAgain\n", chat=True, **checkpoint)
    assert run.kernels
    card("train.py", **stage_flags(home, tmp_path, "pretraining", 1))
    more = dict(init_from="resume", eval_only=True)
    run = card("train.py", **stage_flags(home, tmp_path, "pretraining", 1) | more)
    assert "val loss" in run.output
    card("train.py", **stage_flags(home, tmp_path, "PPO", 1) | dict(init_from="resume"))
    run = card("train.py", **stage_flags(home, tmp_path, "PPO", 1) | more)
    assert "after PPO" in run.output


@pytest.mark.parametrize("dtype,per_layer", [("float32", 20), ("bfloat16", 24)])
def test_decoding(card, home, tmp_path, dtype, per_layer):
    """Kernels per layer and token of generation, without torch.compile; one wait per 32 tokens;
    not the math kernel of attention, which copies keys and values for each head."""
    runs = {}
    for layers, tokens in (1, 4), (1, 8), (2, 4), (2, 8), (1, 32), (1, 64):
        torch.manual_seed(1)
        net = Transformer(
            ModelArgs(vocab_size=VOCAB, **SHAPE | dict(n_layers=layers, max_seq_len=64))
        )
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
    assert two - one == 4 * per_layer and one - 4 * per_layer <= 4 * 50
    assert waits[1, 64] - waits[1, 32] == 1 and waits[1, 8] == waits[1, 4]
    assert not any(name.startswith("math") for run in runs.values() for name in run.attention)


def test_packed_attention(card, home, tmp_path):
    """In half precision varlen_attn, and neither padding nor the math kernel."""
    run = card("train.py", **stage_flags(home, tmp_path, "SFT", 1, dtype="bfloat16"))
    kinds = Counter()
    for name, n in run.attention.items():
        kinds[name.split()[0]] += n
    assert kinds["varlen"] > 0 and kinds["math"] == 0, run.attention
    assert not any("index_copy" in name for name in run.kernels)


def test_the_plan_is_close_where_batches_are_large(card, home, tmp_path):
    options = stage_flags(home, tmp_path, "pretraining", 2, batch_size=32)
    run, planned = card("train.py", **options), planned_bytes(options)
    assert 0.8 * planned < run.step_peak <= planned, (run.step_peak, planned, run.peak_line)


EVEN = """
def score(prompts, responses):
    return [[0.3 * (i % 2 == 0) for i in ids] for ids in responses]  # per token


score.tokens = True
"""


def test_ppo_learns_in_half_precision(card, home, tmp_path):
    """On the CPU, with autocast: J, a reward of 0.3 for each even token, rises as in fp32."""
    (tmp_path / "even.py").write_text(EVEN)
    rises = {}
    for dtype in "float32", "bfloat16", "float16":
        options = stage_flags(home, tmp_path / dtype, "PPO", 6, dtype=dtype, device="cpu")
        options |= dict(rollouts=32, batch_size=8, learning_rate=1e-2, ppo_warmup_steps=1)
        options |= dict(reward=f"{tmp_path}/even.py:score", gamma=0.5, init_kl_coef=0.02)
        del options["target_len"]
        card("train.py", **options)
        J = [r["ppo/objective"] for r in log_of(tmp_path / dtype) if "ppo/objective" in r]
        assert all(map(math.isfinite, J))
        rises[dtype] = J[-1] - J[0]
    assert min(rises.values()) > 1, rises
    assert rises == pytest.approx(dict.fromkeys(rises, rises["float32"]), rel=0.3)


# ----------------------------------------------------------------------------
# the simulated device itself

DEVICE = """
import torch, torch.nn.functional as F
import simulated_cuda

counters = simulated_cuda.counters
x, y = torch.randn(3, 4), torch.randn(3, 4)
device = x.to("cuda")


def refused(function):
    try:
        function()
    except (RuntimeError, TypeError):
        return True


def counted(name, function):
    counters.reset()
    function()
    return getattr(counters, name).total()


wrong = [
    lambda: device + y,
    lambda: torch.stack([device, y]),
    lambda: F.linear(device, y),
    lambda: x[device.argmax(0)],
    lambda: device.numpy(),
    lambda: device.pin_memory(),
]
assert all(map(refused, wrong))
right = lambda: device + torch.tensor(2.0), lambda: device[torch.tensor([0])]
assert not any(map(refused, right))

waiting = [
    lambda: device.sum().item(),
    lambda: float(device[0, 0]),
    lambda: bool((device > 9).any()),
    lambda: device.cpu(),
    lambda: device.tolist(),
    lambda: device.nonzero(),
    lambda: device[device > 0],
    lambda: x.to("cuda"),
    lambda: torch.tensor([1], device="cuda"),
    lambda: torch.cuda.synchronize(),
]
assert [counted("waits", f) for f in waiting] == [1] * len(waiting)


def fill_masked():
    device[device > 0] = 0.0


not_waiting = [
    fill_masked,
    lambda: device @ device.T,
    lambda: torch.where(device > 0, device, 0.0),
    lambda: torch.zeros(3, device="cuda"),
    lambda: x.pin_memory().to("cuda", non_blocking=True),
]
assert [counted("waits", f) for f in not_waiting] == [0] * len(not_waiting)
assert counted("kernels", lambda: (device * 2).T.view(-1, 3)[:2]) == 1
assert counted("kernels", lambda: torch.empty(3, device="cuda")) == 0

before = counters.now
z = torch.zeros(1000, device="cuda")
view = z[:10]
assert counters.now == before + 4000
del z
assert counters.now == before + 4000
del view
assert counters.now == before

mask = torch.ones(5, 5, dtype=torch.bool, device="cuda")
cases = [
    ("flash", 2, dict(is_causal=True, enable_gqa=True), torch.bfloat16),
    ("efficient", 4, dict(attn_mask=mask), torch.bfloat16),
    ("math", 2, dict(attn_mask=mask, enable_gqa=True), torch.bfloat16),
    ("efficient", 4, dict(is_causal=True), torch.float32),
]
for kernel, n_kv_heads, options, dtype in cases:
    counters.reset()
    inputs = [
        torch.randn(2, n, 5, 16, device="cuda", dtype=dtype, requires_grad=True)
        for n in (4, n_kv_heads, n_kv_heads)
    ]
    out = F.scaled_dot_product_attention(*inputs, **options)
    (place,) = counters.attention
    assert place.startswith(kernel), (place, kernel)
    out.float().square().sum().backward()
    copies = [x.detach().cpu().float().requires_grad_() for x in inputs]
    options = {key: x.cpu() if torch.is_tensor(x) else x for key, x in options.items()}
    F.scaled_dot_product_attention(*copies, **options).square().sum().backward()
    for ours, theirs in zip(inputs, copies):
        torch.testing.assert_close(ours.grad.cpu().float(), theirs.grad, rtol=0.1, atol=0.1)
print("checked")
"""


def test_the_simulated_device_raises_and_counts_what_cuda_does(card, tmp_path):
    (tmp_path / "device.py").write_text(DEVICE)
    assert "checked" in card(tmp_path / "device.py").output
