"""What a run shows: its lines, --plot, and --plan against the memory that training takes."""

import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import kernels
import report
import tinystories
import train
from checkpoint import (
    checkpoint_args,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
)
from experiments import endings, frontier, story_task
from experiments.plan import MODELS, Bytes, plan, plan_stage, saved_bytes
from model import ModelArgs, Transformer, generate

ROOT = Path(report.__file__).parent
PEERS = frontier.PEERS.stem
ARGS = ModelArgs(dim=48, n_layers=3, n_heads=2, vocab_size=96, multiple_of=8, max_seq_len=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_what_a_real_forward_pass_keeps(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)  # as on a GPU
    model, kept = Transformer(ARGS), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    tokens = torch.randint(96, (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(tokens, tokens)
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    everything, layer, layer_input = saved_bytes(ARGS, 4, 32, dtype)
    assert everything == real
    assert layer_input == 4 * 32 * 48 * 4 < layer < everything / 3


def plan_rows(*flags):
    args = train.flags(["--plan", "--vocab_source=custom", "--vocab_size=96", *flags])
    return args, plan(args, ModelArgs(**{n: getattr(args, n) for n in train.MODEL_FLAGS}))


def test_plan_counts_the_state_that_training_has(capsys):
    _, rows = plan_rows("--batch_size=1", "--max_seq_len=2", "--dim=192", "--dtype=float32")
    model = Transformer(ModelArgs(dim=192, n_layers=6, n_heads=6, vocab_size=96, multiple_of=32))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)).backward()
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *state]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held < rows[0][2] < 1.05 * held  # two tokens' activations are all that comes on top
    assert rows[0][:2] == (1, "ddp")
    assert capsys.readouterr().out.count("ddp") == 7  # 1, 2, 4, 8, 16, 64, 256 cards


PEAK = """
import contextlib, io, sys
sys.path.insert(0, sys.argv[1])
import torch
import kernels, report, train
from experiments.plan import plan
kernels.keep_memory = lambda: None  # else freed memory counts too
from model import ModelArgs
torch.set_num_threads(1)
def stage(*flags):
    source = [f"--data={sys.argv[2]}", "--vocab_source=custom", "--vocab_size=4096", "--plan"]
    args = train.flags([*source, *flags])
    return args, train.Pretraining(train.setup(args), None)
small = "--dim=32 --n_layers=1 --n_heads=2 --n_kv_heads=2 --batch_size=2 --max_seq_len=32"
# The first step loads and compiles what is not part of the model.
stage("--device=cpu", *small.split())[1].step(0)
before = int(open("/proc/self/statm").read().split()[1]) * 4096
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
args, run = stage(*sys.argv[3:])
for i in range(2):
    run.step(i)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
with contextlib.redirect_stdout(io.StringIO()):
    rows = plan(args, ModelArgs(**{n: getattr(args, n) for n in train.MODEL_FLAGS}))
print(int(peak.split()[1]) * 1024 - before, rows[0][2], rows[0][3], len(rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("native", ["0", "1"])
def test_plan_for_this_machine_is_what_training_takes(tmp_path, native):
    """Memory within 15 % of the peak of two real steps, without and with kernels.c."""
    (tmp_path / "tok4096").mkdir()
    ids = np.random.default_rng(0).integers(3, 4096, 20_000).astype("<u2")
    ids.tofile(tmp_path / "tok4096/data00.bin")
    shape = [
        "--dim=256",
        "--n_layers=4",
        "--n_heads=8",
        "--n_kv_heads=8",
        "--max_seq_len=256",
        "--batch_size=6",
        "--device=cpu",
        "--dtype=float32",
        "--plan_gpu=cpu",
    ]
    env = {**os.environ, "NATIVE_KERNELS": native, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, Path(report.__file__).parent, tmp_path, *shape]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    measured, planned, rate, rows = map(float, done.stdout.split())
    assert rows == 1 and rate > 0
    assert 1 / 1.15 < planned / measured < 1.15, (planned, measured)


def test_plan_of_many_cards(capsys):
    shape = ["--dim=2048", "--n_layers=4", "--n_heads=32", "--n_kv_heads=4", "--dtype=bfloat16"]
    args, rows = plan_rows(*shape, "--batch_size=4", "--max_seq_len=512", "--plan_mfu=0.5")
    rows = {(cards, kind): (memory, rate) for cards, kind, memory, rate in rows}
    ffn = -(-int(2 * 4 * 2048 / 3) // 32) * 32
    layer = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * ffn + 2 * 2048
    P = 4 * layer + 2048 + 96 * 2048
    for cards in (2, 4, 8):
        assert rows[cards, "ddp"][0] == rows[1, "ddp"][0]
        assert rows[cards, "ddp"][1] == pytest.approx(cards * rows[1, "ddp"][1])
    assert rows[2, "fsdp"][0] - rows[8, "fsdp"][0] == pytest.approx(16 * P * (1 / 2 - 1 / 8))
    assert rows[1, "ddp"][1] == pytest.approx(0.5 * 989e12 / (6 * P + 12 * 4 * 2048 * 512))
    _, wide = plan_rows(*shape, "--batch_size=4", "--max_seq_len=512", "--head_dim=128")
    more = 4 * (2 * 2048 * 2048 + 2 * 2048 * 256)  # heads of 64 become twice as wide
    assert wide[0][2] - rows[1, "ddp"][0] > 16 * more
    assert wide[0][3] == pytest.approx(0.4 * 989e12 / (6 * (P + more) + 12 * 4 * 4096 * 512))
    # a step of few tokens over slow wires takes as long as its gradients travel
    _, rows = plan_rows(*shape, "--batch_size=1", "--max_seq_len=8", "--plan_gpu=4090")
    rate = next(r[3] for r in rows if r[:2] == (8, "ddp"))
    assert rate == pytest.approx(8 * 8 / (2 * 4 * P * 7 / 8 / 32e9))
    assert re.search(r" 8 +ddp .* network", capsys.readouterr().out)
    _, rows = plan_rows("--dim=8192", "--n_layers=80", "--n_heads=64", "--n_kv_heads=8")
    assert "does not fit" in capsys.readouterr().out.splitlines()[2]  # a 70B model on one card


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer with 320 tokens."""
    folder = tmp_path_factory.mktemp("words")
    tinystories.synthesize(folder, 100, 1)
    tinystories.train_vocab(folder, 320)
    return folder / "tok320.model"


@pytest.mark.parametrize(
    "flags",
    [
        dict(sft=True),
        dict(sft=True, dtype="bfloat16", checkpoint_activations=True),
        dict(sft=True, dtype="bfloat16", lora_rank=4),
        dict(rm=True, freeze_layers=2),
        dict(dpo=True, dtype="bfloat16"),
        dict(ppo=True),
        dict(ppo=True, freeze_layers=2),
        dict(ppo=True, dtype="bfloat16", value_model="shared", checkpoint_activations=True),
    ],
    ids=lambda flags: ", ".join(flags),
)
def test_plan_of_a_stage_is_what_its_step_takes(words, tmp_path, monkeypatch, flags, capsys):
    """The planned bytes are those of the models and the optimizer, and of the tensors that exist at
    a time in a real step with samples of one length."""
    monkeypatch.setattr(checkpoint, "accelerate", lambda model: model)  # as on a GPU
    shape = dict(dim=64, n_layers=5, n_heads=4, vocab_size=320, multiple_of=8, max_seq_len=96)
    model = Transformer(ModelArgs(**shape))
    parts = {"model": model.state_dict(), "model_args": shape, "iter_num": 0}
    save_checkpoint(tmp_path / "ckpt.pt", parts)
    reply = {"response": "it is so " * 8}
    if flags.keys() & {"rm", "dpo"}:
        reply = {"completions": ["it is so " * 8, "so is it " * 8]}
    records = [json.dumps({"prompt": f"say it {i} times", **reply}) for i in range(10, 50)]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    more = dict(max_iters=9, warmup_iters=1, eval_iters=1)
    if flags.get("ppo"):
        more = dict(rollouts=8, max_gen_len=60, roof_prompts=1, roof_samples=1, ppo_iters=9)
    if flags.get("rm") or flags.get("dpo"):
        more |= dict(reference_samples=1, max_gen_len=60)
    more |= dict(batch_size=8, device="cpu", data=tmp_path / "a.jsonl", out_dir=tmp_path)
    more |= dict(init_from=tmp_path / "ckpt.pt", tokenizer=words, **flags)
    args = train.flags([f"--{k}={v}" for k, v in more.items()])
    stage = train.start(train.setup(args))
    stage.step(0)  # after which AdamW has its state
    if flags.get("ppo"):
        stage.trainer.stop_ids = (999,)  # so that all responses have the same length
        with Bytes() as step:
            rollouts = stage.trainer.rollout(stage.prompts.batch(0, 8), 1)
            stage.trainer.step(rollouts, [1.0, -1.0] * 4)
        lengths = [len(q) + len(r) for q, r in zip(rollouts.queries, rollouts.responses)]
        models = [stage.model, stage.trainer.critic, stage.trainer.reference]
    else:
        with Bytes() as step:
            stage.step(1)
        lengths = [len(ids) for ids, *_ in stage.train.samples.samples] if flags.get("sft") else []
        for prompt, completions in stage.train.samples if not lengths else ():
            lengths += [len(prompt) + len(c) for c in completions]
        models = [stage.model, *([stage.reference] if flags.get("dpo") else [])]
    weights = {id(p): p for m in models if m is not None for p in m.parameters()}.values()
    moments = [t for o in stage.optimizers for s in o.state.values() for t in s.values()]
    held = sum(t.numel() * t.element_size() for t in [*weights, *moments])
    length = round(sum(lengths) / len(lengths))
    more = dict(dtype="float32", plan=True, plan_len=length) | more
    args = train.flags([f"--{k}={v}" for k, v in more.items()])
    capsys.readouterr()
    rows = plan_stage(args, ModelArgs(**shape))
    assert rows[0][:2] == (1, "ddp") and [row[0] for row in rows] == [1, 2, 4, 8]
    assert rows[0][2] == pytest.approx(held + step.peak, rel=0.1)
    assert rows[0][2] > rows[1][2] > rows[2][2] > rows[3][2]
    assert "most in" in capsys.readouterr().out


def test_plan_of_large_models(capsys):
    """7B in bfloat16: two bytes per frozen weight, 16 per trained one, divided by FSDP."""

    def rows(*flags):
        args = train.flags([*flags, "--plan", "--batch_size=1", "--plan_len=64"])
        shape = MODELS["llama2-7b"] | dict(n_layers=3)  # quicker
        return plan_stage(args, ModelArgs(**shape)), ModelArgs(**shape)

    full, shape = rows("--sft")
    with torch.device("meta"):
        model = Transformer(shape)
    P, embedding = sum(p.numel() for p in model.parameters()), model.tok_embeddings.weight.numel()
    assert 16 * P < full[0][2] < 20 * P
    assert full[2][2] - full[3][2] == pytest.approx(12 * P * (1 / 4 - 1 / 8), rel=1e-3)
    lora, _ = rows("--sft", "--lora_rank=8")
    assert 2 * P + 2 * embedding < lora[0][2] < 2.5 * P + 2 * embedding
    four = rows("--ppo", "--reward=x.pt")[0]
    assert four[0][2] - 2 * full[0][2] == pytest.approx(2 * (2 * P + 2 * embedding), rel=0.2)
    offload = rows("--ppo", "--reward=x.pt", "--offload")[0]
    assert four[0][2] - offload[0][2] == pytest.approx(2 * P + 2 * embedding, rel=0.01)


def test_plan_checks_its_flags(tmp_path):
    """As a run does: nothing is divided by 0, and no model is planned that cannot be trained."""
    custom, stage = "--vocab_source=custom", ["--sft", "--plan_model=260k"]
    for flags, message in (
        ([custom, "--plan_mfu=0"], "--plan_mfu must be above 0"),
        ([custom, "--batch_size=0"], "--batch_size must be at least 1"),
        ([*stage, "--batch_size=0"], "--batch_size must be at least 1"),
        ([*stage, "--plan_len=-1"], "--plan_len must not be negative"),
        (["--vocab_size=600"], "--vocab_size needs --vocab_source=custom"),
        (["--init_from=x.pt"], "x.pt: there is no such checkpoint"),
        (["--init_from=resume"], "ckpt.pt: there is no such checkpoint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.main([*flags, "--plan", f"--out_dir={tmp_path}"])


def test_plan_of_a_checkpoint_is_that_of_its_sizes(tmp_path, capsys):
    shape = dict(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=32)
    shape["max_seq_len"] = 32
    net = Transformer(ModelArgs(**shape))
    state = {"model": net.state_dict(), "model_args": checkpoint_args(net.args)}
    save_checkpoint(tmp_path / "ckpt.pt", state)
    shown = []
    for flags in (
        ["--vocab_source=custom", *(f"--{k}={v}" for k, v in shape.items())],
        ["--init_from=resume", f"--out_dir={tmp_path}"],
        [f"--init_from={tmp_path / 'ckpt.pt'}"],
    ):
        train.main([*flags, "--plan", "--batch_size=2"])
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1 and f"{sum(p.numel() for p in net.parameters()):,} " in shown[0]


def test_plan_counts_activations_that_are_computed_again(capsys):
    """As with --fsdp: of the layers their inputs alone are kept, for a third more arithmetic."""
    shape = "--dim=192", "--n_layers=8", "--batch_size=4", "--max_seq_len=512"
    _, kept = plan_rows(*shape)
    _, again = plan_rows(*shape, "--checkpoint_activations")
    assert again[0][2] < 0.6 * kept[0][2]
    assert again[0][3] == pytest.approx(0.75 * kept[0][3])
    assert [r for r in again if r[1] == "fsdp"] == [r for r in kept if r[1] == "fsdp"]


def test_plan_needs_a_model(tmp_path, capsys):
    for flags, message in (
        (["--sft"], "needs --plan_model, or a checkpoint"),
        (["--dpo", "--plan_model=9b"], "must be one of 260k, "),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            train.main([*flags, "--plan", f"--out_dir={tmp_path}"])
    train.main(["--rm", "--plan", "--plan_model=260k", "--batch_size=2"])
    assert "h100 (80)" in capsys.readouterr().out


class Letters:
    """A tokenizer for a vocabulary of 96."""

    bos_id, eos_id = 1, 2

    def decode(self, ids):
        return "".join(chr(256 + i) for i in ids if i > 2)


def test_what_a_run_shows(tmp_path, monkeypatch, capsys):
    """Each line but the first has the time left, each evaluation has a text of the model, and
    TensorBoard and Weights & Biases receive the same numbers. The progress bar arrives."""
    board, logged, tables, bars, tqdm = {}, [], [], [], report.tqdm

    def shown(**options):
        bars.append(tqdm(**options | dict(disable=False, file=io.StringIO())))
        return bars[-1]

    monkeypatch.setattr(report, "tqdm", shown)
    writer = types.SimpleNamespace(
        add_scalar=lambda k, v, i: board.setdefault(k, {}).update({i: v}),
        add_text=lambda k, v, i: board.setdefault(k, {}).update({i: v}),
        close=lambda: board.update(closed=True),
    )
    wandb = types.SimpleNamespace(
        init=lambda project, name, group, job_type, config: (
            logged.append((project, name, group, job_type, config["dim"]))
            or types.SimpleNamespace(
                log=lambda x, step: (tables if "sample" in x else logged).append((step, x))
            )
        ),
        Table=lambda columns, data: dict(zip(columns, *data)),
    )
    tensorboard = types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: board.update(folder=folder) or writer
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(train, "load_tokenizer", lambda *_: (Letters(), "", []))
    for name in ("write_v3", "copy_tokenizer"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    monkeypatch.setattr(train, "plot_at_end", report.plot_at_end)
    (tmp_path / "tok96").mkdir()
    ids = np.random.default_rng(0).integers(3, 96, 9_000).astype("<u2")
    ids.tofile(tmp_path / "tok96/data00.bin")
    train.main(
        [
            f"--data={tmp_path}",
            f"--out_dir={tmp_path}/out",
            "--vocab_source=custom",
            "--vocab_size=96",
            "--dim=16",
            "--n_layers=1",
            "--n_heads=2",
            "--n_kv_heads=2",
            "--max_seq_len=32",
            "--batch_size=2",
            "--max_iters=4",
            "--eval_interval=2",
            "--eval_iters=2",
            "--warmup_iters=1",
            "--device=cpu",
            "--tensorboard",
            "--wandb_log",
            "--wandb_project=p",
            "--wandb_run_name=n",
        ]
    )
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "tok/s" in line]
    assert len(lines) == 4 and "left" not in lines[0]
    assert all(re.search(r"\| left \d+:\d\d:\d\d$", line) for line in lines[1:])
    assert lines[-1].endswith("| left 0:00:00")
    assert [(bar.n, bar.total) for bar in bars] == [(4, 4)]
    # the story of the last evaluation is the checkpoint's model's
    model = model_from_checkpoint(load_checkpoint(tmp_path / "out/ckpt.pt"))
    uniform = torch.rand(1, 31, generator=torch.Generator().manual_seed(1337))
    story = Letters().decode(
        generate(model, [[1]], 31, 0.7, stop_ids=(1, 2), uniform=uniform).responses()[0]
    )
    pictures = importlib.util.find_spec("matplotlib") is not None
    if pictures:
        out = out.removesuffix(f"wrote {tmp_path}/out/log.png\n")
    assert (tmp_path / "out/log.png").exists() == pictures
    assert story and out.rstrip().endswith("  | " + story.strip())
    records = [json.loads(line) for line in (tmp_path / "out/log.jsonl").open()]
    assert [step for step, _ in logged[1:]] == [r["iter"] for r in records]
    assert [scalars for _, scalars in logged[1:]] == records and logged[0] == (
        "p",
        "n",
        "out",
        "pretraining",
        16,
    )
    for key in ("loss/train", "loss/val", "grad_norm"):
        assert board[key] == {r["iter"]: r[key] for r in records if key in r}
    assert board["sample"][4] == f"**text**\n\n{story}" and sorted(board["sample"]) == [0, 2, 4]
    assert board["closed"] and board["folder"] == tmp_path / "out/tensorboard/pretraining-1"
    assert tables[-1] == (4, {"sample": {"iteration": "4", "text": story}}) and len(tables) == 3


def test_every_run_has_its_own_tensorboard_folder(tmp_path, monkeypatch):
    """A new run has a new number, a resumed one continues its folder, and stages are apart."""
    opened = []

    def writer(folder, purge_step):
        folder.mkdir(parents=True, exist_ok=True)
        opened.append((folder.name, purge_step))
        return types.SimpleNamespace(close=lambda: None)

    tensorboard = types.SimpleNamespace(SummaryWriter=writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    new = train.setup(train.flags([f"--out_dir={tmp_path}", "--tensorboard"]))
    look = train.setup(train.flags([f"--out_dir={tmp_path}", "--tensorboard", "--eval_only"]))
    again = replace(new, resumed=True, start_iteration=7)
    for run, prefix in [(new, ""), (again, ""), (new, "ppo_"), (new, ""), (again, ""), (look, "")]:
        report.Log(run, prefix).close()
    assert opened == [
        ("pretraining-1", None),
        ("pretraining-1", 7),
        ("ppo-1", None),
        ("pretraining-2", None),
        ("pretraining-2", 7),
        ("pretraining-2", None),
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


STATS = {
    "loss/train": 12.3456,
    "lr": 1e-3,
    "grad_norm": 123.45,
    "bad_steps": 0,
    "ms": 123456.7,
    "tokens_per_s": 1234567,
    "mfu": 1.0,
    "ppo/objective": -12.345,
    "ppo/objective_roof": -10.123,
    "ppo/reward": -12.345,
    "ppo/kl_ref": 123.45,
    "ppo/length/mean": 1234.0,
    "ppo/length/std": 123.0,
    "ppo/ended": 1.0,
    "ppo/val/explained_variance": -1.23,
    "time/ppo/rollout": 123.4,
    "time/ppo/scoring": 123.4,
    "time/ppo/optimize_step": 1234.5,
}


@pytest.mark.parametrize("columns", [80, 132])
def test_lines_fit_the_terminal(tmp_path, monkeypatch, columns):
    """A line has as many of its first fields as fit; a sentence is wrapped; a file has it all."""
    args = types.SimpleNamespace(ppo_debug=False)
    fields = [
        train.stage_class(train.flags(flags)).line(types.SimpleNamespace(args=args), 123456, STATS)
        + " | left 10:00:00"
        for flags in ([], ["--ppo"])
    ]
    numbers = [f"rm/val/number_{i} {i}.123" for i in range(6)]
    lines = [*fields, "step 100: train loss 0.3153, val loss 0.3505, " + ", ".join(numbers)]
    log = report.Log(train.setup(train.flags([f"--out_dir={tmp_path}"])), "")
    monkeypatch.setenv("COLUMNS", str(columns))
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stdout", kind())
        for line in lines:
            log.line(line)
        shown = sys.stdout.getvalue()
        if kind is io.StringIO:
            assert shown == "\n".join(lines) + "\n"
            continue
        rows = shown.splitlines()
        assert max(map(len, rows)) <= columns
        for row, line in zip(rows, fields):
            assert (line + " | ").startswith(row + " | ")
            assert len(row) > columns - 30
        assert " ".join(shown.split()).endswith(lines[2]) and rows[3].startswith("    ")
    log.close()


def test_a_skipped_step_is_the_first_thing_in_its_line():
    stats = STATS | {"bad_steps": 2}
    line = train.Pretraining.line(types.SimpleNamespace(), 123456, stats)
    assert "not finite, skipped (2 in a row)" in report.fit_line(line, 80)


def test_the_report_fits_the_terminal(monkeypatch):
    part = dict.fromkeys(("objective", "reward", "kl", "length_mean", "length_std"), -123.0)
    part |= {"ended": 1.0, "ref_loss": 9.0, "val_loss": 9.0, "story": "A long text. " * 30}
    before, after = part | {"lengths": [1000] * 9}, part | {"lengths": [1020] * 9, "objective": 0.0}
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Terminal())
    for best in (-100.0, -140.0):
        report.print_report(dict(beta=0.05, roof=(best, 0.123), before=before, after=after))
    rows = sys.stdout.getvalue().splitlines()
    assert len(rows) > 40 and max(map(len, rows)) <= 80, max(rows, key=len)


def measured(objective, lengths=(9, 10)):
    """One half of a report."""
    names = "reward", "kl", "length_mean", "length_std", "ended", "ref_loss", "val_loss"
    part = dict.fromkeys(names, 1.0)
    return part | {"objective": objective, "lengths": list(lengths), "story": ""}


def test_report_without_any_change(capsys):
    before, after = measured(-1.0), measured(-1.001)
    report.print_report(dict(beta=0.1, roof=(-0.5, 0.01), before=before, after=after))
    assert " 0% of the gap closed" in capsys.readouterr().out


def test_each_length_is_in_one_row_of_the_report(capsys):
    """Rows of 20 tokens; the shares of a column add up to 100 %."""
    before, after = measured(-1.0, [19, 20, 20, 39]), measured(-0.9, [40, 40, 59, 60])
    report.print_report(dict(beta=0.1, roof=(-0.5, 0.01), before=before, after=after))
    row = re.compile(r"^ +(\d+)- *(\d+) +█* +(\d+)% +█* +(\d+)%$", re.MULTILINE)
    assert [tuple(map(int, found)) for found in row.findall(capsys.readouterr().out)] == [
        (0, 19, 25, 0),
        (20, 39, 75, 0),
        (40, 59, 0, 75),
        (60, 79, 0, 25),
    ]


def test_time_left(tmp_path, monkeypatch):
    """From the steps after the first, by the clock, so that what lies between them counts. Early
    steps are forgotten: after n fast steps, 0.98**n of the pace of many slow ones is left."""
    log = report.Log(train.setup(train.flags([f"--out_dir={tmp_path}"])), "")
    clock = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])

    def after(seconds, steps):
        clock[0] += seconds
        return log.left(steps)

    assert after(100, 10) == ""
    assert after(2, 1800) == " | left 1:00:00"
    assert after(4, 20) == " | left 0:01:00"
    for seconds in [10] * 500 + [0] * 50:
        after(seconds, 1)
    assert log.pace == pytest.approx(10 * 0.98**50, rel=1e-4)
    log.close()


def test_a_line_that_is_being_written_is_no_line(tmp_path, capsys):
    """--plot may look at a run that goes on, or has crashed."""
    whole = "".join(json.dumps(r) + "\n" for r in LOG)
    for end in ("", '{"iter": 41, "lo', "null\n", '{"loss/train": 3}\n'):
        (tmp_path / "log.jsonl").write_text(whole + end)
        assert report.read_log(tmp_path / "log.jsonl") == LOG
        report.plot(tmp_path)


LOG = [{"iter": i, "loss/train": 5 - i * 0.1} for i in range(41)]


@pytest.mark.parametrize(
    "roof,j,error,says",
    [
        (-0.5, -0.8, 0.01, "40% of the gap closed"),
        (-1.0, -0.8, 0.01, "as high before PPO"),
        (-1.2, -0.8, 0.01, "as high before PPO"),
        # a gap of half the error
        (-0.995, -0.999, 0.01, "as high before PPO, within the error of J*"),
        (-0.995, -1.1, 0.01, "J fell by 0.100"),
        (-0.5, -1.1, 0.01, "J fell by 0.100"),
        # A fall is named if it exceeds the error and a hundredth of the gap, which is 1.
        (0.0, -1.02, 0.01, "J fell by 0.020"),
        (0.0, -1.02, 0.03, "-2% of the gap closed"),
        (0.0, -1.009, 0.001, "-1% of the gap closed"),
        (0.0, -1.011, 0.001, "J fell by 0.011"),
    ],
)
def test_report_without_a_gap_or_with_a_fall(capsys, roof, j, error, says):
    found = dict(beta=0.1, roof=(roof, error), before=measured(-1.0), after=measured(j))
    report.print_report(found)
    out = capsys.readouterr().out
    assert says in out and "nan" not in out and "PPO on 2 held-out prompts, beta = 0.1" in out
    report.print_report(found | {"prompts": 1})
    assert "PPO on 2 responses to 1 held-out prompts, beta = 0.1" in capsys.readouterr().out


def test_plot_on_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in LOG))
    train.main(["--plot", f"--out_dir={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    curve = [line for line in lines if "|" in line]
    assert curve[0].split("|") == ["        5.000 ", "**"]  # a line from the upper left ...
    assert curve[-1].split("|") == ["        1.000 ", " " * 39 + "**"]  # ... to the lower right
    assert sum(line.count("*") for line in curve) == 41
    assert "iterations 0 to 40" in lines[-1]
    rows = [r | {"grad_norm": 9.0 if r["iter"] == 20 else 1.0} for r in LOG]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train.main(["--plot", f"--out_dir={tmp_path}"])
    text = capsys.readouterr().out
    curve = [
        line.split("|")[1] for line in text.partition("grad_norm")[2].splitlines() if "|" in line
    ]
    assert curve[0] == " " * 20 + "*" and curve[-1] == "*" * 20 + " " + "*" * 20  # the spike


def test_columns_of_a_terminal_curve_are_means():
    """Eight points in four columns of four rows: pairs with the means 0, 1, 2 and 3."""
    points = [(i, y) for i, y in enumerate([0, 0, 0, 2, 1, 3, 3, 3])]
    *rows, axis = report.terminal_curve(points, width=4, height=4).splitlines()
    assert [row.partition("|")[2] for row in rows] == ["   *", "  *", " *", "*"]
    assert [float(row.partition("|")[0]) for row in rows] == [3, 2, 1, 0]
    assert axis.strip() == "iterations 0 to 7"


def records(prefix, n, missing=()):
    """A log of n iterations, with an evaluation every ten, of all names in the stage's picture. The
    values at the iterations in `missing` are not finite."""
    names = {k for panel in report.PICTURES[f"{prefix}log"][1] for k in panel.curves}
    names |= {panel.spread for panel in report.PICTURES[f"{prefix}log"][1]} - {""}
    for i in range(n):
        if i % 10 == 0:
            yield {"iter": i, **{k: 0.5 + i / n for k in names if "val" in k}}
        row = {k: 0.123456 + (i * 7 % 11) / 13 + i / n for k in names if "/val" not in k}
        yield {"iter": i} | (dict.fromkeys(row) if i in missing else row)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


PREFIXES = [name.removesuffix("log") for name in report.PICTURES]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_pictures_show_the_values_of_the_log(tmp_path, prefix):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    rows = list(records(prefix, 30, missing=(4, 21)))
    figure = report.log_figure(write(tmp_path / f"{prefix}log.jsonl", rows))
    panels = report.PICTURES[f"{prefix}log"][1]
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in shown] == [panel.title for panel in panels]
    for axes, panel in zip(shown, panels):
        assert axes.get_ylabel() == panel.unit and panel.unit
        curves = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "x"]
        assert len(curves) == len(panel.curves)
        for line, name in zip(curves, panel.curves):
            own = [r for r in rows if name in r]
            assert list(line.get_xdata()) == [r["iter"] for r in own]
            values = np.array([np.nan if r[name] is None else r[name] for r in own])
            np.testing.assert_array_equal(line.get_ydata(), values)
        marks = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"]
        gaps = any(r.get(name, 0) is None for r in rows for name in panel.curves)
        assert marks == ([[4, 21]] if gaps else [])


def texts_of(figure):
    """(text, its box in pixels) of everything that is written in a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            outside = [t for t in axis.get_major_ticks() if not low <= t.get_loc() <= high]
            hidden |= {id(label) for t in outside for label in (t.label1, t.label2)}
        hidden |= {id(t) for t in axes.findobj(Text)} if not axes.get_visible() else set()
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    # Text.get_window_extent leaves the arrow of an annotation out.
    return [(t.get_text(), Text.get_window_extent(t)) for t in texts if id(t) not in hidden]


def disjoint(texts):
    """Whether no two boxes of `texts_of` overlap."""
    return not any(
        box.padded(-1).overlaps(other.padded(-1))
        for i, (_, box) in enumerate(texts)
        for _, other in texts[:i]
    )


@pytest.mark.parametrize(
    "prefix, n, missing",
    [
        ("", 2, ()),
        ("ppo_", 1, ()),
        ("ppo_", 1000, (3, 4)),
        ("dpo_", 300, (7,)),
        ("", 20, range(20)),
    ],
)
def test_no_texts_of_a_picture_overlap(tmp_path, prefix, n, missing):
    """Runs of 1 iteration, of 2 and of many; with some or all values not finite."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    rows = records(prefix, n, missing)
    figure = report.log_figure(write(tmp_path / f"{prefix}log.jsonl", rows))
    texts = texts_of(figure)
    assert len(texts) > 20 and disjoint(texts)
    whole = figure.bbox
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= whole.x1 and b.y1 <= whole.y1 for _, b in texts)


def test_a_panel_without_values_is_left_out(tmp_path):
    """RLOO and GRPO have no critic, so that there is no explained variance."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    rows = [{k: v for k, v in r.items() if "variance" not in k} for r in records("ppo_", 5)]
    figure = report.log_figure(write(tmp_path / "ppo_log.jsonl", rows))
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_visible()]
    assert len(titles) == 8 and "explained variance" not in titles
    assert report.log_figure(write(tmp_path / "ppo_log.jsonl", [{"iter": 3, "ms": 1}])) is None


def test_moving_average():
    values = np.random.default_rng(0).normal(size=50)
    values[[3, 4, 20]] = np.nan
    values[30:40] = np.nan
    for width in (1, 5, 9):
        near = [values[max(i - width // 2, 0) : i + width // 2 + 1] for i in range(50)]
        means = [v[v == v].mean() if (v == v).any() else np.nan for v in near]
        np.testing.assert_allclose(report.moving_average(values, width), means, atol=1e-12)


@pytest.mark.parametrize("n", [100, 101, 400])
def test_long_curves_are_drawn_as_moving_averages(tmp_path, n):
    """Over the pale values of the log, from 101 points on."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    values, half = [float(i * 7 % 11) for i in range(n)], n // 50
    rows = [{"iter": i, "grad_norm": y} for i, y in enumerate(values)]
    axes = report.log_figure(write(tmp_path / "log.jsonl", rows)).axes[0]
    curves = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == n]
    near = [values[max(i - half, 0) : i + half + 1] for i in range(n)]
    smooth = [sum(x) / len(x) for x in near]
    assert curves == [pytest.approx(y) for y in ([values] if n <= 100 else [values, smooth])]


def test_a_legend_has_the_last_value_of_each_curve(tmp_path):
    """Of a single curve the first value too."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    rows = [{"iter": i, "loss/train": 5.0 - i, "lr": 1 + i / 4} for i in range(3)]
    rows += [{"iter": 1, "loss/val": 4.5}]
    loss, rate, *_ = report.log_figure(write(tmp_path / "log.jsonl", rows)).axes
    texts = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in (loss, rate)]
    assert texts == [["training 3", "validation 4.5"], ["1 → 1.5"]]


def test_the_band_of_a_curve_is_one_standard_deviation(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    rows = list(records("ppo_", 5))
    figure = report.log_figure(write(tmp_path / "ppo_log.jsonl", rows))
    (axes,) = (a for a in figure.axes if a.get_title("left") == "length")
    y = axes.collections[0].get_paths()[0].vertices[:, 1]
    own = [(r["ppo/length/mean"], r["ppo/length/std"]) for r in rows if "ppo/length/mean" in r]
    assert min(y) == pytest.approx(min(mean - std for mean, std in own))
    assert max(y) == pytest.approx(max(mean + std for mean, std in own))


def test_numbers_of_pictures():
    numbers = [0.0, -0.84391, 2.0, 0.0001, 51234.5, -1e-5]
    shown = ["0", "−0.8439", "2", "0.0001", "51,234", "−1e−05"]
    assert [report.number(x) for x in numbers] == shown
    assert [report.number(x, True) for x in (0.5, 0.98765)] == ["50%", "98.8%"]


@pytest.mark.parametrize("lengths", [[190, 210, 200, 300], [7, 7, 7, 7]])
def test_histograms_before_and_after_ppo(tmp_path, lengths):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    parts = [
        {"objective": j, "lengths": lengths, "scores": [j, j + 0.5, j + 0.5, j + 1]}
        for j in (-1.25, -0.75)
    ]
    found = {"beta": 0.2, "roof": [-0.5, 0.01], "before": parts[0], "after": parts[1]}
    (tmp_path / "ppo_report.json").write_text(json.dumps(found))
    figure = report.report_figure(tmp_path / "ppo_report.json")
    assert [axes.get_title("left") for axes in figure.axes] == ["reward", "length"]
    assert (
        "4 held-out prompts" in figure.get_suptitle() and "−1.25 → −0.75" in figure.get_suptitle()
    )
    texts = texts_of(figure)
    assert disjoint(texts)
    for axes, key in zip(figure.axes, ("scores", "lengths")):
        means = [sum(part[key]) / 4 for part in parts]
        vertical = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert vertical == pytest.approx(means)
        labels = [t.get_text() for t in axes.get_legend().get_texts()]
        assert labels == [
            f"{name}, mean {report.number(m)}" for name, m in zip(("before", "after"), means)
        ]
        bars = [p.get_height() for p in axes.patches if hasattr(p, "get_height")]
        assert sum(bars) == pytest.approx(2)  # the shares of each histogram add up to 1
    for part in parts:  # as earlier versions wrote it
        del part["scores"]
    (tmp_path / "ppo_report.json").write_text(json.dumps(found))
    assert len(report.report_figure(tmp_path / "ppo_report.json").axes) == 1


def test_plot_as_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot draws on the terminal without matplotlib")
    write(tmp_path / "ppo_log.jsonl", records("ppo_", 9))
    train.main(["--plot", f"--out_dir={tmp_path}"])
    picture = (tmp_path / "ppo_log.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"
    assert capsys.readouterr().out == f"wrote {tmp_path / 'ppo_log.png'}\n"
    with pytest.raises(FileNotFoundError, match="no log to draw"):
        train.main(["--plot", f"--out_dir={tmp_path / 'empty'}"])
    (tmp_path / "ppo_log.jsonl").write_text("")  # of a run in its first iteration
    with pytest.raises(FileNotFoundError, match="no log to draw"):
        train.main(["--plot", f"--out_dir={tmp_path}"])


def test_a_picture_that_fails_is_a_note(tmp_path, capsys, monkeypatch):
    """The run is complete: a broken matplotlib must not end it in an error."""
    write(tmp_path / "log.jsonl", LOG)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.plot_at_end(tmp_path / "log.jsonl")  # not installed
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace())
    report.plot_at_end(tmp_path / "log.jsonl")
    text = capsys.readouterr().err
    assert text.startswith(f"note: no picture of {tmp_path / 'log.jsonl'}: ")
    assert text.count("\n") == 1 and not (tmp_path / "log.png").exists()


def test_the_frontier_is_drawn_from_the_committed_numbers():
    """A peer with a KL is a point; one of which only J is known is a line below the frontier."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    rows, peers = (frontier.read_rows(ROOT / f"assets/{n}.csv") for n in ("frontier", PEERS))
    assert {"FullLLM", "TRL RLOO"} == {r["kind"] for r in peers}
    best = [(r["kl"], r["reward"]) for r in rows if r["kind"] == "optimum"]
    ours = [r for r in rows if r["kind"] != "optimum"]
    assert len(ours) >= 20
    figure = frontier.frontier_figure(rows, peers)
    lines = figure.axes[0].lines
    points = {tuple(p) for line in lines for p in zip(line.get_xdata(), line.get_ydata())}
    assert {(r["kl"], r["reward"]) for r in (*ours, *peers)} <= points
    assert set(best) <= points and not any(x.get_linestyle() == "--" for x in lines)
    texts = texts_of(figure)
    assert disjoint(texts) and {"not achievable", "model before PPO"} <= dict(texts).keys()
    for r in (*peers, *(r for r in ours if r["kind"] in ("RLOO", "GRPO"))):
        name = f"{r['kind']}, β = 0.2: J = −{-r['objective']:.3f}"
        assert any(text.startswith(name) for text, _ in texts), name
    hidden = [{k: v for k, v in r.items() if k not in ("kl", "reward")} for r in peers[1:]]
    figure = frontier.frontier_figure(rows, [peers[0], *hidden])
    (line,) = (x for x in figure.axes[0].lines if x.get_linestyle() == "--")
    kl, reward = line.get_data()
    np.testing.assert_allclose(
        np.array(reward) - 0.2 * np.array(kl), peers[1]["objective"], atol=1e-12
    )
    assert all(np.interp(kl, *zip((0, best[0][1]), *best)) >= reward) and len(kl) > 100
    assert disjoint(texts_of(figure))


def test_endings_are_drawn_from_the_committed_numbers():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    with open(ROOT / "assets/endings.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 20
    lines = endings.endings_figure(rows).axes[0].lines[:3]
    for line, (kind, *_) in zip(lines, endings.LINES, strict=True):
        assert list(line.get_xdata()) == [float(r["position"]) for r in rows]
        assert list(line.get_ydata()) == [float(r[kind]) for r in rows]


def test_overoptimisation_is_drawn_from_the_committed_numbers():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    curves = json.loads((ROOT / "assets/overoptimisation.json").read_text())["curves"]
    figure = story_task.overoptimisation_figure(curves)
    expected = [c["best_of"] for c in curves] + [c["ppo"] for c in curves if c["ppo"]]
    assert len(figure.axes) == len(expected) == 4
    for axes, shown in zip(figure.axes, expected):
        proxy, gold = axes.lines[:2]
        assert list(proxy.get_ydata()) == [p["proxy"] for p in shown]
        assert list(gold.get_ydata()) == [p["gold"] for p in shown]
    assert disjoint(texts_of(figure))


@pytest.mark.parametrize("script", [endings, frontier, story_task])
def test_draw_without_numbers_names_the_file(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    folder = f"--{'out' if script is story_task else 'assets'}={tmp_path}"
    monkeypatch.setattr("sys.argv", ["script.py", "--draw", folder])
    with pytest.raises(FileNotFoundError) as e:
        script.main()
    assert Path(e.value.filename).parent == tmp_path
