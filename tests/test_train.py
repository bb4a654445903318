"""The training loop against oracles: a Markov chain of known entropy, an uninterrupted run, and a
run on one process."""

import errno
import faulthandler
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
import pretraining
import rlhf
import train
from checkpoint import load_checkpoint, move_aside, newest, save_checkpoint
from common import run_main
from kernels import FastTransformerBlock

VOCAB = 48
ROOT = Path(train.__file__).parent

# ----------------------------------------------------------------------------
# a language of known entropy: after BOS any of 45 letters; after a letter one of two, or the end


def successors(letter):
    return 3 + (2 * letter + 1) % 45, 3 + (3 * letter + 7) % 45


def chain(n, seed):
    """n tokens of the language."""
    rng, out = random.Random(seed), [1]
    while len(out) < n:
        a, b = successors(out[-1])
        u = rng.random()
        start = out[-1] == 1
        out.append(rng.randrange(3, VOCAB) if start else a if u < 0.6 else b if u < 0.9 else 1)
    return out


def true_loss(x, y):
    """The mean loss of the language's own probabilities on windows (B, T): the lowest
    expected loss of any model."""
    total = 0.0
    for s, t in zip(x.flatten().tolist(), y.flatten().tolist()):
        if s == 1:
            p = 1 / 45
        else:
            a, b = successors(s)
            p = 0.6 * (t == a) + 0.3 * (t == b) + 0.1 * (t == 1)
        total -= math.log(p)
    return total / x.numel()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / f"tok{VOCAB}").mkdir()
    for shard, n in enumerate((4_000, 20_000, 20_000)):
        ids = np.array(chain(n, shard), dtype="<u2")
        ids.tofile(folder / f"tok{VOCAB}" / f"data{shard:02d}.bin")
    return str(folder)


def command(data, out, **flags):
    """The flags of a tiny run."""
    values = (
        dict(
            data=data,
            out_dir=out,
            vocab_source="custom",
            vocab_size=VOCAB,
            dim=16,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            multiple_of=4,
            max_seq_len=32,
            batch_size=4,
            max_iters=12,
            eval_interval=4,
            eval_iters=3,
            learning_rate=1e-2,
            warmup_iters=3,
            device="cpu",
            log_interval=100,
        )
        | flags
    )
    if not values.get("decay_lr", True):
        del values["warmup_iters"]
    if "reward" in values:
        values.pop("target_len", None)
    return [f"--{k}={v}" for k, v in values.items()]


# everything that makes a state hard to keep: dropout, two optimizers, accumulated gradients
HARD = dict(dropout=0.1, optimizer="muon", gradient_accumulation_steps=2)
PPO = dict(
    ppo=True,
    ppo_iters=4,
    rollouts=16,
    batch_size=8,
    max_gen_len=16,
    start_len=6,
    target_len=10,
    eval_interval=1,
    roof_prompts=2,
    roof_samples=4,
    report_rollouts=16,
    averaging=0.5,
    ptx_coef=0.1,
    learning_rate=1e-3,
)


@pytest.fixture(autouse=True)
def keep_signals():
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def equal(a, b, where=""):
    """The names of the entries that are not bitwise equal in two nested states."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [d for k in a for d in equal(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in equal(x, y, f"{where}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def assert_same_run(one, two, prefix=""):
    """Asserts that two folders hold the same run: bitwise equal checkpoint, model file, log."""
    states = [load_checkpoint(Path(d) / f"{prefix}ckpt.pt") for d in (one, two)]
    for s in states:
        for name in ("out_dir", "init_from", "wandb_run_name"):
            del s["config"][name]
        del s["run_id"]
        s.pop("started_from", None)  # which is in another folder
    assert equal(*states) == []
    model = f"{prefix}model.bin"
    assert (Path(one) / model).read_bytes() == (Path(two) / model).read_bytes()
    logs = [read_log(d, prefix) for d in (one, two)]
    assert logs[0] == logs[1]


def read_log(folder, prefix=""):
    records = [json.loads(line) for line in (Path(folder) / f"{prefix}log.jsonl").open()]
    timing = ("ms", "mfu", "tokens_per_s", "time/")
    return [{k: v for k, v in r.items() if not k.startswith(timing)} for r in records]


# ----------------------------------------------------------------------------
# other processes: children of a server that has imported PyTorch once


def work(argv, log, env, hook):
    """Runs train.py in a child process with its output in a file; calls `hook` first."""
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    train.plot_at_end = lambda path: None  # see conftest.py
    if hook:
        hook[0](*hook[1:])
    run_main(lambda: train.main(argv))


server = multiprocessing.get_context("forkserver")
# The last two are what --fsdp imports, which takes longer than a short run.
server.set_forkserver_preload(["train", "torch.distributed.fsdp", "torch._dynamo"])


def spawn(argv, log, env=None, hook=None):
    child = server.Process(target=work, args=(argv, str(log), env or {}, hook), daemon=True)
    child.start()
    return child


def finish(child, seconds=300):
    child.join(seconds)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def processes(n, argv, folder, hooks=None):
    """The n processes of a distributed run, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
    return [
        spawn(
            argv,
            f"{folder}/rank{r}.txt",
            common | {"RANK": str(r), "LOCAL_RANK": str(r)},
            (hooks or {}).get(r),
        )
        for r in range(n)
    ]


def die_in_step(iteration, number=signal.SIGKILL):
    """A hook: the process gets a signal when it begins an iteration."""
    step = pretraining.Pretraining.step

    def mortal(self, i):
        if i == iteration:
            os.kill(os.getpid(), number)
        return step(self, i)

    pretraining.Pretraining.step = mortal


def die_at_file_operation(n, folder):
    """A hook: SIGKILL just before the n-th time that something is opened, linked, renamed or
    removed in the folder."""
    count = 0

    def watch(event, args):
        nonlocal count
        if event in ("open", "os.link", "os.rename", "os.remove") and folder in str(args[0]):
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def die_in_write(n, share):
    """A hook: SIGKILL when `share` of the n-th checkpoint is in its file."""
    import io

    save, count = torch.save, 0

    def partial_save(state, f):
        nonlocal count
        count += 1
        if count < n:
            return save(state, f)
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[: int(len(whole.getvalue()) * share)])
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = partial_save


def die_later(seconds):
    """A hook: SIGKILL after some time, at any point of the program."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    import threading

    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


# ----------------------------------------------------------------------------
# training


@pytest.mark.parametrize("flags", [dict(), dict(optimizer="muon", schedule="linear")])
def test_reaches_the_entropy_of_the_language(data, tmp_path, flags):
    train.main(
        command(
            data,
            tmp_path,
            dim=32,
            n_layers=1,
            batch_size=16,
            max_iters=150,
            eval_iters=100,
            eval_interval=150,
            learning_rate=2e-2,
            weight_decay=0.0,
            warmup_iters=10,
            **flags,
        )
    )
    val = pretraining.Windows(data, "val", 32, VOCAB)
    best = true_loss(*val.batch(0, len(val)))
    reached = [r["loss/val"] for r in read_log(tmp_path) if "loss/val" in r]
    assert reached[0] == pytest.approx(math.log(VOCAB), abs=0.05)  # knows nothing yet
    assert best - 0.01 < reached[-1] < best + 0.06


def test_ppo_raises_the_objective(data, tmp_path, capsys):
    """Aligned to shorter texts: J rises by a third of the way to J*, the KL is that of the
    report, and the reward in the log is the reward of the definition."""
    train.main(
        command(
            data,
            tmp_path,
            dim=32,
            n_layers=1,
            batch_size=16,
            max_iters=150,
            eval_interval=150,
            learning_rate=2e-2,
            warmup_iters=10,
        )
    )
    flags = PPO | dict(
        ppo_iters=25,
        rollouts=64,
        batch_size=32,
        max_gen_len=24,
        target_len=4,
        init_kl_coef=0.005,
        report_rollouts=256,
        learning_rate=5e-3,
        averaging=0,
        ptx_coef=0,
        eval_interval=50,
        target_kl=1.0,
        roof_prompts=16,
        roof_samples=64,
        dim=32,
        n_layers=1,
    )
    train.main(command(data, tmp_path, **flags))
    report = json.loads((tmp_path / "ppo_report.json").read_text())
    before, after, j_star = report["before"], report["after"], report["roof"][0]
    assert before["kl"] == pytest.approx(0, abs=1e-6)
    for part in (before, after):
        reward = -np.abs(4 - np.array(part["lengths"])).mean() / 100
        assert part["reward"] == pytest.approx(reward, abs=1e-6)
        assert part["objective"] == pytest.approx(reward - 0.005 * part["kl"], abs=1e-6)
        assert part["length_mean"] == pytest.approx(np.mean(part["lengths"]), abs=1e-3)
    closed = (after["objective"] - before["objective"]) / (j_star - before["objective"])
    assert 0.33 < closed < 1.2
    assert load_checkpoint(tmp_path / "ppo_ckpt.pt")["iter_num"] == 150 + 25
    capsys.readouterr()
    for n in 256, 16:  # the report of the run is printed; with another number it is measured
        look = dict(init_from="resume", eval_only=True, report_rollouts=n)
        train.main(command(data, tmp_path, **flags | look))
        assert f"PPO on {n} held-out prompts" in capsys.readouterr().out
        assert json.loads((tmp_path / "ppo_report.json").read_text()) == report


def test_layers_in_common_are_those_of_the_weights_that_are_resumed(data, tmp_path):
    train.main(command(data, tmp_path, max_iters=2))
    flags = PPO | dict(freeze_layers=1, ppo_iters=1)
    train.main(command(data, tmp_path, **flags))
    flags |= dict(init_from="resume", ppo_iters=2)
    path = tmp_path / "ppo_ckpt.pt"

    def resumed():
        stage = train.start(train.setup(train.flags(command(data, tmp_path, **flags))))
        return stage.trainer.common_layers

    assert resumed() == 1
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["ppo"]["critic"]["layers.0.ffn_norm.weight"][0] += 1e-3
    torch.save(checkpoint, path)
    assert resumed() == 0


def test_schedule():
    args = train.flags(["--max_iters=110", "--warmup_iters=10"])
    rates = [pretraining.schedule(i, args) for i in range(111)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1 and rates[110] == pytest.approx(0)
    assert rates[60] == pytest.approx(0.5)  # a cosine is at half its height half way
    assert rates[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    args.schedule = "linear"
    assert pretraining.schedule(35, args) == pytest.approx(0.75)
    args.decay_lr = False
    assert pretraining.schedule(0, args) == pretraining.schedule(109, args) == 1


def test_weights_start_with_the_standard_deviation_that_the_model_documents():
    """0.5 / sqrt(inputs) in the layers, 0.02 in the embedding; norms are 1."""
    model = pretraining.Transformer(
        pretraining.ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=300, multiple_of=4)
    )
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        std = 0.5 / p.shape[1] ** 0.5 if name.startswith("layers.") else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_dropout_differs_from_step_to_step_and_from_rank_to_rank(data, tmp_path):
    args = train.flags(command(data, tmp_path, dropout=0.5, learning_rate=0, weight_decay=0))
    stage, seen = train.start(train.setup(args)), set()
    stage.model.layers[0].dropout.register_forward_hook(
        lambda module, x, y: seen.add(tuple((y == 0).flatten()[:200].tolist()))
    )
    for rank in (0, 1):
        stage.run = replace(stage.run, rank=rank)
        for iteration in (0, 1):
            stage.position, stage.ahead = 0, (None, None)
            stage.step(iteration)
    assert len(seen) == 2 * 4  # the hook sees attention and feed-forward


def test_weight_decay_is_of_matrices_only(data, tmp_path):
    """With gradients of zero, AdamW and Muon shrink each matrix by 1 - rate * decay, and no
    vector."""
    args = train.flags(
        command(data, tmp_path, optimizer="muon", weight_decay=0.1, muon_learning_rate=0.02)
    )
    model = pretraining.Transformer(
        pretraining.ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=8, multiple_of=4)
    )
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for o in pretraining.make_optimizers(model, args):
        o.step()
    for name, p in model.named_parameters():
        factor = 1 if p.dim() == 1 else 1 - (0.02 if name.startswith("layers.") else 1e-2) * 0.1
        torch.testing.assert_close(p.detach(), before[name] * factor)


def ppo_stage(data, out, **flags):
    args = train.flags(command(data, out, init_from="resume", **PPO | flags))
    return train.start(train.setup(args))


@pytest.mark.parametrize(
    "flags", [dict(), dict(value_learning_rate=4e-3), dict(value_model="shared")]
)
def test_ppo_decays_matrices_only(data, tmp_path, flags):
    """With gradients of zero a step shrinks each matrix of policy and critic, each at its own rate,
    and no norm or bias."""
    train.main(command(data, tmp_path, max_iters=1))
    stage = ppo_stage(data, tmp_path, weight_decay=0.5, ppo_warmup_steps=1, **flags)
    models = [m for m in (stage.model, stage.trainer.critic) if m is not None]
    rates = (1e-3, flags.get("value_learning_rate", 1e-3))[: len(models)]
    for model, optimizer, rate in zip(models, stage.optimizers, rates, strict=True):
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            factor = 1 if p.dim() == 1 else 1 - rate * 0.5
            torch.testing.assert_close(p.detach(), before[name] * factor)


def test_ppo_counts_iterations_and_prompts_from_its_start(data, tmp_path):
    """The schedule begins where pretraining ended, and a group of rollouts has one prompt."""
    train.main(command(data, tmp_path, max_iters=5))
    stage = ppo_stage(data, tmp_path, schedule="linear", ppo_warmup_steps=1, group_size=2)
    rates = [stage.step(i)["ppo/learning_rate"] for i in range(5, 9)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert stage.position == 4 * 16 // 2


def test_ppo_resumes_checkpoints_with_one_parameter_group(data, tmp_path):
    """Which older versions wrote: the moments go to the parameters that they belong to."""
    train.main(command(data, tmp_path, max_iters=1))
    train.main(command(data, tmp_path, init_from="resume", **PPO | dict(ppo_iters=2)))
    state, new = (load_checkpoint(tmp_path / "ppo_ckpt.pt") for _ in "ab")
    stage = ppo_stage(data, tmp_path, ppo_iters=2)
    for name, model in (("optimizer", stage.model), ("critic_optimizer", stage.trainer.critic)):
        optimizer = stage.optimizers[name != "optimizer"]
        grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
        old = state["ppo"][name]
        moments = {i: old["state"][grouped.index(id(p))] for i, p in enumerate(model.parameters())}
        group = old["param_groups"][0] | {"params": list(range(len(moments))), "weight_decay": 0.3}
        state["ppo"][name] = {"state": moments, "param_groups": [group]}
    stage.load_state(state)
    found = {"optimizer": stage.optimizers[0], "critic_optimizer": stage.optimizers[1]}
    for name, optimizer in found.items():
        assert equal(optimizer.state_dict()["state"], new["ppo"][name]["state"]) == []
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0]
        assert [g["steps"] for g in optimizer.param_groups] == [4, 4]


def test_flags_decide_about_the_optimizer_of_a_resumed_run(data, tmp_path, capsys):
    """Holds for every stage and each hyperparameter; the changed flags are printed."""
    train.main(command(data, tmp_path, max_iters=2))
    train.main(command(data, tmp_path, init_from="resume", **PPO | dict(ppo_iters=1)))
    changed = dict(learning_rate=0.123, beta2=0.9, adam_eps=1e-3, weight_decay=0.03, max_iters=3)
    args = train.flags(command(data, tmp_path, init_from="resume", **changed))
    run = train.setup(args)
    capsys.readouterr()
    stage = train.start(run)
    assert "which now apply: adam_eps was 1e-08, is 0.001, beta2 was" in capsys.readouterr().out
    aligned = ppo_stage(data, tmp_path, **changed)  # a new run, which then gets the old one's state
    aligned.load_state(load_checkpoint(tmp_path / "ppo_ckpt.pt"))
    for optimizers in (stage.optimizers, aligned.optimizers):
        for optimizer in optimizers:
            assert optimizer.state, "the moments are the checkpoint's"
            assert [g["weight_decay"] for g in optimizer.param_groups] == [0.03, 0]
            for g in optimizer.param_groups:
                assert (g["peak_lr"], g["betas"][1], g["eps"]) == (0.123, 0.9, 1e-3)


def test_counters_continue_when_a_run_is_resumed(data, tmp_path):
    """Tokens, samples, and steps in a row that were not finite."""
    train.main(command(data, tmp_path, max_iters=4))
    state = load_checkpoint(tmp_path / "ckpt.pt")
    assert state["tokens"] == 4 * 4 * 32 and state["position"] == 16
    save_checkpoint(tmp_path / "ckpt.pt", state | {"bad_steps": 7})
    args = train.flags(command(data, tmp_path, max_iters=5, init_from="resume"))
    stage = train.start(train.setup(args))
    assert (stage.tokens, stage.position, stage.bad_steps) == (512, 16, 7)


def test_ppo_has_no_muon(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(command(data, tmp_path, optimizer="muon", **PPO))
    assert "--optimizer is a flag of pretraining" in capsys.readouterr().err


def test_adam_eps(data, tmp_path):
    """With gradients of 1, Adam's first step is rate / (1 + eps)."""
    args = train.flags(command(data, tmp_path, adam_eps=0.6, weight_decay=0))
    model = pretraining.Transformer(
        pretraining.ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=8)
    )
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for o in pretraining.make_optimizers(model, args):
        o.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 1e-2 / 1.6)


def test_muon_is_that_of_pytorch():
    """To the bit, over several steps, and in the state that it keeps."""
    shapes = [(16, 16), (16, 16), (8, 16), (16, 8), (44, 16), (16, 44), (8, 16)]
    both = []
    for kind in (torch.optim.Muon, pretraining.Muon):
        random = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=random)) for s in shapes]
        optimizer = kind(params, lr=0.02, weight_decay=0.1)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random)
            optimizer.step()
        both.append({"params": params, **optimizer.state_dict()})
    assert equal(*both) == []


def test_accumulated_steps_are_one_large_batch(data, tmp_path):
    for name, flags in (("one", dict(batch_size=8)), ("two", dict(gradient_accumulation_steps=2))):
        train.main(command(data, tmp_path / name, **flags))
    one, two = (
        [r["loss/train"] for r in read_log(tmp_path / n) if "loss/train" in r]
        for n in ("one", "two")
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


# ----------------------------------------------------------------------------
# it never loses a run


def interrupted(data, folder, at, number, **flags):
    """Runs until a signal arrives in iteration `at`; returns the exit status."""
    step = pretraining.Pretraining.step if not flags.get("ppo") else rlhf.RLHF.step
    stage = rlhf.RLHF if flags.get("ppo") else pretraining.Pretraining

    def signalled(self, i):
        if i == at:
            os.kill(os.getpid(), number)
        return step(self, i)

    stage.step = signalled
    try:
        return train.main(command(data, folder, **flags))
    finally:
        stage.step = step


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_resume_to_the_bit(data, tmp_path, capsys, number, status):
    train.main(command(data, tmp_path / "whole", **HARD))
    for at in (5, 7):  # 7: stopped just before the evaluation of iteration 8
        folder = tmp_path / f"stopped{at}"
        assert interrupted(data, folder, at, number, **HARD) == status
        assert f"saved iteration {at + 1}" in capsys.readouterr().out
        train.main(command(data, folder, init_from="resume", **HARD))
        assert_same_run(tmp_path / "whole", folder)


def test_a_second_signal_ends_the_run_at_once(monkeypatch):
    """If it comes more than a second after the first: torchrun forwards a Ctrl-C of the
    terminal."""
    clock = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    interrupt = train.Interrupt()
    assert interrupt.pending() == 0
    for clock[0], number in ((5.0, signal.SIGINT), (5.9, signal.SIGTERM)):
        signal.raise_signal(number)
        assert interrupt.pending() == number
    clock[0] = 6.1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_does_not_change_which_checkpoint_is_the_best(
    data, tmp_path, monkeypatch, capsys
):
    """The first evaluation saves nothing, an interruption saves what was not evaluated, and the
    evaluation that a resumed run begins with may make that the best checkpoint."""
    evaluate, values = pretraining.Pretraining.evaluate, iter((9.0, 5.0, 4.0, 6.0))

    def told(self):
        return evaluate(self) | {"loss/val": next(values)}

    monkeypatch.setattr(pretraining.Pretraining, "evaluate", told)
    paths = [tmp_path / f"{name}.pt" for name in ("ckpt", "ckpt.prev", "best")]

    def iterations():
        return [load_checkpoint(path)["iter_num"] for path in paths if path.exists()]

    assert interrupted(data, tmp_path, 0, signal.SIGINT) == 130
    assert iterations() == [1]
    resume = dict(init_from="resume", log_interval=3)
    capsys.readouterr()
    assert interrupted(data, tmp_path, 5, signal.SIGINT, **resume) == 130
    assert iterations() == [6, 4, 4] and load_checkpoint(paths[0])["best_val_loss"] == 5
    assert re.findall(r"^ +(\d+) \| loss", capsys.readouterr().out, re.MULTILINE) == ["3"]
    assert interrupted(data, tmp_path, 7, signal.SIGINT, **resume) == 130
    assert iterations() == [8, 6, 4]
    train.main(command(data, tmp_path, **resume))
    assert iterations() == [12, 8, 8] and load_checkpoint(paths[0])["best_val_loss"] == 4


def test_ppo_with_lora_changes_the_named_matrices_by_its_rank(data, tmp_path):
    """What differs from the start are wq and wv alone, by a matrix of rank 2; the KL is 0 at
    first."""
    train.main(command(data, tmp_path))
    flags = PPO | dict(averaging=0, ptx_coef=0, lora_rank=2, weight_decay=0)
    train.main(command(data, tmp_path, init_from="resume", **flags))
    before, after = (load_checkpoint(tmp_path / f"{n}ckpt.pt")["model"] for n in ("", "ppo_"))
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith(("wq.weight", "wv.weight")):
            sizes = torch.linalg.svdvals((after[name] - before[name]).double())
            assert sizes[1] > 1e-6 and sizes[2] < 1e-3 * sizes[1], (name, sizes)
        else:
            assert torch.equal(before[name], after[name]), name
    assert read_log(tmp_path, "ppo_")[0]["ppo/kl_ref"] == pytest.approx(0, abs=1e-6)


def test_ppo_from_an_aligned_checkpoint_starts_at_its_weights(data, tmp_path):
    train.main(command(data, tmp_path / "one"))
    train.main(command(data, tmp_path / "one", init_from="resume", **PPO))
    aligned = tmp_path / "one" / "ppo_ckpt.pt"
    train.main(command(data, tmp_path / "two", init_from=aligned, **PPO))
    first, second = (load_checkpoint(tmp_path / n / "ppo_ckpt.pt") for n in ("one", "two"))
    assert equal(second["ppo"]["reference"], first["model"]) == []


def test_ppo_keeps_an_earlier_run_and_extends_its_own(data, tmp_path, capsys):
    train.main(command(data, tmp_path))
    train.main(command(data, tmp_path, init_from="resume", **PPO))
    first = (tmp_path / "ppo_ckpt.pt").read_bytes()
    assert "nothing to do" not in capsys.readouterr().out
    train.main(command(data, tmp_path, init_from="resume", **PPO))  # the same: nothing is redone
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "ppo_ckpt.pt").read_bytes() == first
    more = PPO | dict(ppo_iters=6, init_from="resume", log_interval=2, report_rollouts=8)
    assert (tmp_path / "ppo_report.json").exists()
    assert interrupted(data, tmp_path, 16, signal.SIGINT, **more) == 130
    assert not (tmp_path / "ppo_report.json").exists()  # it was of an earlier policy
    train.main(command(data, tmp_path, **more))
    assert load_checkpoint(tmp_path / "ppo_ckpt.pt")["iter_num"] == 12 + 6
    longer = (tmp_path / "ppo_ckpt.pt").read_bytes()
    train.main(command(data, tmp_path, init_from="resume", **PPO | dict(target_len=5)))
    assert "target_len was 10, is 5" in capsys.readouterr().out
    assert (tmp_path / "ppo_ckpt.replaced.pt").read_bytes() == longer


def test_reference_scores_are_kept_until_the_text_or_a_flag_changes(data, tmp_path, monkeypatch):
    mine, out, calls = tmp_path / "data", tmp_path / "out", []
    shutil.copytree(data, mine)
    train.main(command(mine, out))
    sample = train.RLHF.sample
    count = lambda *args: calls.append(0) or sample(*args)  # noqa: E731
    monkeypatch.setattr(train.RLHF, "sample", count)

    flags, changed = {}, dict(temperature=0.7, max_gen_len=9, seed=5, roof_samples=5)
    changed |= dict(roof_prompts=3, target_len=5)

    def samples_of_a_start():
        calls.clear()
        ppo_stage(mine, out, **flags)
        return len(calls)

    assert [samples_of_a_start() for _ in range(2)] == [1, 0]
    for name, value in changed.items():
        flags[name] = value
        assert samples_of_a_start() == 1, name
    shutil.copy(mine / f"tok{VOCAB}" / "data01.bin", mine / f"tok{VOCAB}" / "data00.bin")
    assert samples_of_a_start() == 1
    state = load_checkpoint(out / "ckpt.pt")  # nor are they kept with other end ids or weights
    for change in {"end_ids": [5]}, {"model": {k: 1.01 * w for k, w in state["model"].items()}}:
        state |= change
        save_checkpoint(out / "ckpt.pt", state)
        assert [samples_of_a_start() for _ in range(2)] == [1, 0], change.keys()


def test_cached_j_star_depends_on_the_code_of_a_built_in_reward(data, tmp_path, monkeypatch):
    """An edit of the length reward invalidates the cached J*, as an edit of a reward file does."""
    train.main(command(data, tmp_path, max_iters=1))
    ppo_stage(data, tmp_path)
    sample, calls = train.RLHF.sample, []
    monkeypatch.setattr(train.RLHF, "sample", lambda *a: calls.append(0) or sample(*a))
    ppo_stage(data, tmp_path)
    assert not calls
    source = rlhf.inspect.getsource
    edited = lambda x: source(x).replace("/ 100", "/ 10")  # noqa: E731
    monkeypatch.setattr(rlhf.inspect, "getsource", edited)
    assert "/ 10 " in edited(rlhf.LengthReward)
    ppo_stage(data, tmp_path)
    assert calls


def test_only_errors_of_the_reward_are_reported_as_such(data, tmp_path, monkeypatch):
    """Both errors occur in the second iteration; the first iteration is saved if the error is the
    reward's."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "calls = []\ndef f(p, r):\n    calls.append(0)\n"
        "    if len(calls) > 3:\n        raise ValueError('mine')\n"
        "    return [0.0] * len(r)\nf.tokens = True\n"
    )
    train.main(command(data, tmp_path, max_iters=1))
    flags = PPO | dict(init_from="resume", eval_interval=100, ptx_coef=0)
    with pytest.raises(
        ValueError, match="line 5: ValueError: mine; iteration 3 is saved: fix this"
    ):
        train.main(command(data, tmp_path, reward=f"{reward}:f", **flags))
    step = rlhf.RLHF.step

    def fails(self, iteration):
        if iteration > self.first:
            raise ValueError("of another part")
        return step(self, iteration)

    monkeypatch.setattr(rlhf.RLHF, "step", fails)
    with pytest.raises(ValueError, match="^of another part$"):
        train.main(command(data, tmp_path, **flags))


@pytest.mark.parametrize("exact_end", [False, True])
def test_a_reward_may_change_its_arguments_and_pytorchs_mode(data, tmp_path, exact_end):
    """`p += r`, `r.pop()` and torch.set_grad_enabled(False) change nothing outside of the reward:
    the run is that of a reward which returns the same scores without them."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import torch\n"
        "def plain(prompts, responses):\n"
        "    return [float(len(p) + 2 * len(r)) for p, r in zip(prompts, responses)]\n"
        "def careless(prompts, responses):\n"
        "    torch.set_grad_enabled(False)\n"
        "    scores = []\n"
        "    while responses:\n"
        "        p, r = prompts.pop(0), responses.pop(0)\n"
        "        p += r\n"
        "        scores.append(float(len(p) + len(r)))\n"
        "        r.pop()\n"
        "    return scores\n"
        "plain.tokens = careless.tokens = True\n"
    )
    flags = PPO | dict(init_from="resume", ppo_iters=2, ptx_coef=0, exact_end=exact_end)
    for name in ("plain", "careless"):
        train.main(command(data, tmp_path / name, max_iters=1))
        train.main(command(data, tmp_path / name, reward=f"{reward}:{name}", **flags))
        assert torch.is_grad_enabled()
    models = [load_checkpoint(tmp_path / n / "ppo_ckpt.pt")["model"] for n in ("plain", "careless")]
    assert equal(*models) == []


def test_times_of_an_iteration_have_their_published_names(data, tmp_path):
    train.main(command(data, tmp_path, max_iters=1))
    train.main(command(data, tmp_path, init_from="resume", **PPO | dict(ppo_iters=1)))
    record = json.loads((tmp_path / "ppo_log.jsonl").read_text().splitlines()[0])
    names = "forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats"
    parts = [record[f"time/ppo/{name}"] for name in names]
    assert min(parts) > 0 and sum(parts) == pytest.approx(record["time/ppo/total"], abs=1e-3)


@pytest.mark.parametrize("ppo", [False, True])
@pytest.mark.parametrize("how", ["cpu", "cuda", "numpy"])
def test_a_batch_too_large_for_the_memory_is_one_line(
    data, tmp_path, monkeypatch, capsys, how, ppo
):
    def too_much(*_):
        if how == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        np.empty(10**17) if how == "numpy" else torch.empty(10**17)

    stage = rlhf.ppo.PPOTrainer if ppo else pretraining.Pretraining
    if ppo:
        train.main(command(data, tmp_path, max_iters=1))
    monkeypatch.setattr(stage, "loss", too_much)
    flags = PPO | dict(init_from="resume") if ppo else {}
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run_main(lambda: train.main(command(data, tmp_path, **flags)))
    error = [s for s in capsys.readouterr().err.splitlines() if not s.startswith("note: ")]
    assert e.value.code == 1 and len(error) == 1
    assert f"out of memory on cpu: use a smaller --batch_size than {8 if ppo else 4}" in error[0]


def test_mfu_is_at_most_all_of_the_machine(data, tmp_path, monkeypatch):
    """Holds also if the machine was busy while its peak was measured. kernels.c is compiled before
    the first step, whose tokens per second are measured."""
    monkeypatch.setattr(pretraining, "peak_matmul_flops", lambda *_: 1.0)
    args = train.flags(command(data, tmp_path, dim=96, n_heads=2))
    run = train.setup(args)
    compiled = []
    monkeypatch.setattr(pretraining, "library", lambda: compiled.append(0))
    stage = train.start(run)
    assert compiled
    rates = [stage.step(i) for i in range(3)]
    assert max(r["mfu"] for r in rates) == 1 and min(r["mfu"] for r in rates) > 0


def test_seeds_share_their_held_out_prompts(data, tmp_path):
    """Otherwise the J of two runs would differ by their prompts."""
    train.main(command(data, tmp_path))
    stages = []
    for seed in (1, 2):
        args = train.flags(command(data, tmp_path, init_from="resume", seed=seed, **PPO))
        stages.append(train.start(train.setup(args)))
    one, two = (stage.held_out.batch(0, 16) for stage in stages)
    assert one == two
    one, two = (stage.prompts.batch(0, 16) for stage in stages)
    assert one != two


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ppo_in_half_precision(data, tmp_path, dtype):
    """The first update sees a KL of 0 and nearly float32's entropy; the next ones stay finite."""
    train.main(command(data, tmp_path))
    flags = PPO | dict(averaging=0, ptx_coef=0, init_from="resume", report_rollouts=64)
    train.main(command(data, tmp_path, dtype=dtype, **flags))
    half = read_log(tmp_path, "ppo_")
    train.main(command(data, tmp_path, **flags))
    full = read_log(tmp_path, "ppo_")
    assert len(half) == len(full) == 4 and half[0]["ppo/kl_ref"] == pytest.approx(0, abs=1e-3)
    assert half[0]["ppo/policy/entropy"] == pytest.approx(full[0]["ppo/policy/entropy"], rel=0.05)
    assert all(math.isfinite(v) for record in half for v in record.values())


def test_ppo_critic_warm_up_and_a_reward_of_tensors(data, tmp_path, capsys):
    """The critic alone learns in the first iteration, and a reward may return a tensor."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import torch\ndef f(p, r):\n    return torch.tensor([float(len(x)) for x in r])\n"
        "f.tokens = True\ndef short(p, r):\n    return [0.0]\nshort.tokens = True\n"
    )
    train.main(command(data, tmp_path))
    flags = PPO | dict(critic_warmup=2, averaging=0, ptx_coef=0, ppo_iters=1, init_from="resume")
    flags |= dict(log_interval=1)
    train.main(command(data, tmp_path, reward=f"{reward}:f", **flags))
    states = [load_checkpoint(tmp_path / f"{n}ckpt.pt")["model"] for n in ("", "ppo_")]
    assert equal(*states) == []
    record = read_log(tmp_path, "ppo_")[0]
    assert record["ppo/reward"] > 0 and "ppo/loss/policy" not in record
    out = capsys.readouterr().out
    assert "| no policy step |" in out and "nan" not in out
    with pytest.raises(ValueError, match="returned 1 scores for 8 responses"):
        train.main(command(data, tmp_path, reward=f"{reward}:short", **flags))


@pytest.mark.parametrize("changed", [dict(), dict(averaging=0), dict(lora_rank=2, ptx_coef=0)])
def test_ppo_resumes_to_the_bit(data, tmp_path, changed):
    flags = PPO | changed
    for name in ("whole", "stopped"):
        train.main(command(data, tmp_path / name))
    train.main(command(data, tmp_path / "whole", init_from="resume", **flags))
    assert (
        interrupted(data, tmp_path / "stopped", 13, signal.SIGINT, init_from="resume", **flags)
        == 130
    )
    train.main(command(data, tmp_path / "stopped", init_from="resume", **flags))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", "ppo_")
    reports = [(tmp_path / n / "ppo_report.json").read_text() for n in ("whole", "stopped")]
    assert reports[0] == reports[1]


def test_a_mistake_in_the_reward_loses_no_iteration(data, tmp_path):
    """An error in the first iteration saves nothing. After the correction of one in the third
    iteration the run ends like a run without it."""
    reward = tmp_path / "reward.py"
    right = "def f(p, r):\n    return [float(len(x)) for x in r]\nf.tokens = True\n"
    flags = PPO | dict(reward=f"{reward}:f", init_from="resume", eval_interval=100)
    for name in ("whole", "stopped"):
        train.main(command(data, tmp_path / name))
    reward.write_text(right)
    train.main(command(data, tmp_path / "whole", **flags))
    for n, says in ((1, "$"), (3, "; iteration 14 is saved")):  # n calls, the first one for J*
        wrong = f"calls.append(1)\n    if len(calls) > {n}:\n        raise KeyError('a word')\n    "
        reward.write_text("calls = []\n" + right.replace("return", f"{wrong}return"))
        with pytest.raises(ValueError, match=f"line 5: KeyError: 'a word'{says}"):
            train.main(command(data, tmp_path / "stopped", **flags))
        assert (tmp_path / "stopped/ppo_ckpt.pt").exists() == (n == 3)
    reward.write_text(right)
    train.main(command(data, tmp_path / "stopped", **flags))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", "ppo_")
    assert not (tmp_path / "stopped/ppo_best.pt").exists()  # J is no validation loss


def test_killed_twenty_times(data, tmp_path):
    """SIGKILL before a random file operation, in the middle of writing a checkpoint, and at random
    times: the run that is started again each time ends as the run that was never killed."""
    flags = HARD | dict(max_iters=30, eval_interval=2)
    train.main(command(data, tmp_path / "whole", **flags))
    folder, rng, kills, where = tmp_path / "killed", random.Random(1), 0, []
    while kills < 20:
        kind = kills % 4
        hook = (
            (die_in_write, rng.randint(1, 2), rng.random())
            if kind == 0
            else (die_later, rng.uniform(0.05, 0.4))
            if kind == 1
            else (die_at_file_operation, rng.randint(8, 30), str(folder))
        )
        there = (folder / "ckpt.pt").exists() or (folder / "ckpt.prev.pt").exists()
        argv = command(data, folder, init_from="resume" if there else "scratch", **flags)
        status = finish(spawn(argv, tmp_path / "log.txt", hook=hook))
        assert status in (-signal.SIGKILL, 0), (tmp_path / "log.txt").read_text()
        if status == 0:  # finished before it could be killed: once more from nothing
            assert_same_run(tmp_path / "whole", folder)
            for f in folder.iterdir():
                f.unlink()
            continue
        kills += 1
        if (folder / "ckpt.pt").exists():
            where.append(load_checkpoint(folder / "ckpt.pt")["iter_num"])
    argv = command(data, folder, init_from="resume" if where else "scratch", **flags)
    assert finish(spawn(argv, tmp_path / "log.txt")) == 0
    assert_same_run(tmp_path / "whole", folder)
    assert len(set(where)) > 5  # it was killed in different places
    assert not list(folder.glob(".*"))  # and no rest of a write is left


def damage(path, how):
    blob = bytearray(path.read_bytes())
    if how == "flipped bit":  # of the largest tensor: one between two records damages nothing
        with zipfile.ZipFile(path) as f:
            record = max(f.infolist(), key=lambda x: x.file_size)
        name, extra = struct.unpack_from("<HH", blob, record.header_offset + 26)
        blob[record.header_offset + 30 + name + extra + record.file_size // 2] ^= 4
    elif how == "cut short":
        del blob[len(blob) // 2 :]
    elif how == "zeros":
        blob[4096:] = bytes(len(blob) - 4096)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "empty" else blob)


@pytest.mark.parametrize("how", ["flipped bit", "cut short", "zeros", "empty", "gone"])
def test_damaged_checkpoint_falls_back(data, tmp_path, capsys, how):
    train.main(command(data, tmp_path / "whole", **HARD))
    interrupted(data, tmp_path / "hit", 9, signal.SIGINT, **HARD)  # iterations 8 and 10 are there
    damage(tmp_path / "hit/ckpt.pt", how)
    capsys.readouterr()
    train.main(command(data, tmp_path / "hit", init_from="resume", **HARD))
    text = capsys.readouterr()
    assert "continuing from" in text.err and "iterations 8 to 12" in text.out
    assert_same_run(tmp_path / "whole", tmp_path / "hit")


def test_fallback_survives_a_kill_in_the_next_save(data, tmp_path):
    """The damaged newest must not take the place of the good one before it."""
    train.main(command(data, tmp_path / "whole", **HARD))
    interrupted(data, tmp_path / "hit", 9, signal.SIGINT, **HARD)
    damage(tmp_path / "hit/ckpt.pt", "flipped bit")
    argv = command(data, tmp_path / "hit", init_from="resume", **HARD)
    assert finish(spawn(argv, tmp_path / "log.txt", hook=(die_in_write, 1, 0.5))) == -signal.SIGKILL
    assert finish(spawn(argv, tmp_path / "log.txt")) == 0, (tmp_path / "log.txt").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "hit")


def test_fallback_of_a_stage_survives_a_look_and_a_kill(data, tmp_path, capsys, monkeypatch):
    """The damaged checkpoint of PPO was renamed before a new one was saved: the run continues all
    the same, and --eval_only renames nothing."""
    train.main(command(data, tmp_path, max_iters=2))
    train.main(command(data, tmp_path, **PPO | dict(ppo_iters=3)))  # saves iterations 3, 4 and 5
    (tmp_path / "ppo_report.json").unlink()
    damage(tmp_path / "ppo_ckpt.pt", "cut short")
    more = PPO | dict(ppo_iters=4, init_from="resume")
    train.main(command(data, tmp_path, **more, eval_only=True))
    assert (tmp_path / "ppo_ckpt.pt").exists() and not list(tmp_path.glob("*.damaged.pt"))

    class Killed(BaseException):
        pass

    def killed(self, iteration):
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(rlhf.RLHF, "step", killed)
        train.main(command(data, tmp_path, **more))
    assert not (tmp_path / "ppo_ckpt.pt").exists()
    capsys.readouterr()
    train.main(command(data, tmp_path, **more))
    assert "iterations 4 to 6" in capsys.readouterr().out


def test_each_flipped_bit_is_noticed(tmp_path):
    """In the directory of the archive, too, whose damage raises errors of other kinds."""
    sizes = dict(dim=4, n_layers=1, n_heads=1, vocab_size=8, max_seq_len=8)
    whole, path = {"model": {"a": torch.ones(3)}, "model_args": sizes}, tmp_path / "x.pt"
    torch.save(whole, path)
    shutil.copy(path, tmp_path / "x.prev.pt")
    blob = path.read_bytes()
    for i in range(len(blob) - 300, len(blob)):
        path.write_bytes(blob[:i] + bytes([blob[i] ^ 1 << i % 8]) + blob[i + 1 :])
        try:
            assert torch.equal(load_checkpoint(path)["model"]["a"], torch.ones(3))
        except ValueError as e:
            assert str(e).startswith(f"{path} is ")
        assert torch.equal(newest(path)["model"]["a"], torch.ones(3))


def test_a_file_without_checksums(tmp_path):
    """PyTorch has an option to write none."""
    sizes = dict(dim=4, n_layers=1, n_heads=1, vocab_size=8, max_seq_len=8)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"a": torch.ones(3)}, "model_args": sizes}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(tmp_path / "x.pt")["model"]["a"], torch.ones(3))


def test_contents_that_are_no_llama(data, tmp_path):
    """One line for a checkpoint of nanoGPT, whose keys are the same, and for other values."""
    train.main(command(data, tmp_path / "a", max_iters=2))
    good = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    sizes, norm = good["model_args"], good["model"]["norm.weight"]
    nano = dict(n_layer=2, n_head=2, n_embd=16, block_size=64, vocab_size=VOCAB)
    for says, other in (
        ("has no number 'dim'", dict(model_args=nano)),
        ("has no number 'dim'", dict(model_args=None)),
        ("has no number 'n_heads'", dict(model_args=sizes | dict(n_heads="4"))),
        ("'model' is not a dictionary", dict(model=[1, 2])),
        ("'model' is not a dictionary of names", dict(model={1: torch.zeros(2)})),
        ("its 'template' is llama2", dict(template="llama2")),
        ("its 'template' is {'turn': 3}", dict(template=dict(turn=3))),
        ("its 'template' is {'turn': ''}", dict(template=dict(turn=""))),
        ("its 'template' is {'system': 'x'}", dict(template=dict(system="x"))),
        ("its 'template' is {'turn': tensor", dict(template=dict(turn=torch.zeros(2)))),
        ("its 'template' is {'turn': 'x', 'last': 'y'}", dict(template=dict(turn="x", last="y"))),
        ("its 'end_ids' is 7", dict(end_ids=7)),
        (r"its 'end_ids' is \['7'\]", dict(end_ids=["7"])),
        (r"its 'end_ids' is \[-1\]", dict(end_ids=[-1])),
        (rf"its 'end_ids' is \[{VOCAB}\]", dict(end_ids=[VOCAB])),
        ("in model_args, tied is None", dict(model_args=sizes | dict(tied=None))),
        *(
            ("'norm.weight' is no tensor", dict(model=good["model"] | {"norm.weight": w}))
            for w in (norm.to_sparse(), norm.to("meta"), norm.int(), [1.0])
        ),
        ("its 'bos' is no", dict(bos="no")),
        ("its 'iter_num' is 1.5", dict(iter_num=1.5)),
        ("its 'config' is None, or so", dict(config="None, or so")),
    ):
        torch.save(good | other, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"is not a checkpoint of a Llama: .*{says}"):
            train.main(command(data, tmp_path / "b", init_from=tmp_path / "other.pt", **PPO))


def test_both_generations_damaged(data, tmp_path):
    train.main(command(data, tmp_path))
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        damage(tmp_path / name, "cut short")
    with pytest.raises(ValueError, match="ckpt.prev.pt is"):
        train.main(command(data, tmp_path, init_from="resume"))


def limit_file_size(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_full_disk_leaves_the_last_checkpoint(data, tmp_path):
    """The file size limit is below the size of a checkpoint: one line, exit status 1, and the old
    checkpoint is intact."""
    train.main(command(data, tmp_path, max_iters=8))
    before = (tmp_path / "ckpt.pt").read_bytes()
    argv, log = command(data, tmp_path, init_from="resume"), tmp_path / "log.txt"
    for limit in (len(before) // 2, 4096):
        assert finish(spawn(argv, log, hook=(limit_file_size, limit))) == 1
        error = [x for x in log.read_text().splitlines() if x.startswith("error")]
        assert (
            error
            == [
                f"error: {tmp_path}/ckpt.pt: cannot write the checkpoint: "
                f"{os.strerror(errno.EFBIG)}"
            ]
            and "Traceback" not in log.read_text()
        )
        assert (tmp_path / "ckpt.pt").read_bytes() == before
        log.unlink()
    assert not list(tmp_path.glob(".*tmp"))
    train.main(command(data, tmp_path / "whole"))
    train.main(argv)
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 12


def test_full_file_system(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        log = tmp_path / "log.txt"
        assert finish(spawn(command(data, disk), log)) == 1
        assert "No space left" in log.read_text() and "Traceback" not in log.read_text()
        for path in disk.glob("ckpt*.pt"):
            load_checkpoint(path)
        assert not list(disk.glob(".*tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folder_without_permission(data, tmp_path):
    (tmp_path / "file").write_text("")
    log = tmp_path / "log.txt"
    assert finish(spawn(command(data, tmp_path / "file/out"), log)) == 1
    if os.geteuid() == 0:
        hook = (os.setuid, 65534)  # nobody
        locked = "/root/out"
    else:
        hook, locked = None, tmp_path / "locked/out"
        (tmp_path / "locked").mkdir(mode=0o500)
    assert finish(spawn(command(data, locked), log, hook=hook)) == 1
    lines = log.read_text().splitlines()
    assert lines[-1] == f"error: {locked}: {os.strerror(errno.EACCES)}" and len(lines) == 2


def poison(monkeypatch, iterations, what):
    """In some iterations the loss, or the gradient alone, is not a number."""
    step, forward, state = (
        pretraining.Pretraining.step,
        pretraining.Transformer.forward,
        {"bad": False},
    )

    def watched(self, i):
        state["bad"] = i in iterations
        return step(self, i)

    def poisoned(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        if state["bad"] and self.training:
            return (
                loss * math.inf if what == "loss" else loss + (self.norm.weight[0] - 1).abs().sqrt()
            )
        return loss

    monkeypatch.setattr(pretraining.Pretraining, "step", watched)
    monkeypatch.setattr(pretraining.Transformer, "forward", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped(data, tmp_path, monkeypatch, what):
    """weight[0] - 1 is 0 in the first iteration, where the root has no finite slope."""
    poison(monkeypatch, {0}, what)
    train.main(command(data, tmp_path, max_iters=1))
    fresh = pretraining.Transformer  # the weights are still those of the seed
    torch.manual_seed(1337)
    same = fresh(
        pretraining.ModelArgs(**load_checkpoint(tmp_path / "ckpt.pt")["model_args"])
    ).state_dict()
    assert equal(same, load_checkpoint(tmp_path / "ckpt.pt")["model"]) == []
    record = [r for r in read_log(tmp_path) if "bad_steps" in r][0]
    assert record["bad_steps"] == 1 and record["grad_norm"] is None


def test_ends_after_many_bad_steps(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "MAX_BAD_STEPS", 3)
    poison(monkeypatch, {1, 2, 5, 6, 7}, "loss")
    with pytest.raises(ValueError, match=r"iteration 7: .* 3 steps; .*ckpt.pt has iteration 4"):
        train.main(command(data, tmp_path))
    counts = [r["bad_steps"] for r in read_log(tmp_path) if "bad_steps" in r]
    assert counts == [0, 1, 2, 0, 0, 1, 2]
    assert all(
        torch.isfinite(w).all() for w in load_checkpoint(tmp_path / "ckpt.pt")["model"].values()
    )


def test_checkpoint_that_does_not_fit_names_the_flags(data, tmp_path):
    train.main(command(data, tmp_path, max_iters=1))
    expected = "dim is 16 in the checkpoint, --dim=32 on the command line; n_layers is 2 in the"
    with pytest.raises(ValueError, match=expected):
        train.main(command(data, tmp_path, dim=32, n_layers=3, init_from="resume"))


def test_resumes_with_other_flags(data, tmp_path, capsys):
    train.main(command(data, tmp_path))
    train.main(
        command(data, tmp_path, init_from="resume", batch_size=2, max_iters=16, optimizer="muon")
    )
    text = capsys.readouterr()
    assert "batch_size was 4, is 2, optimizer was adamw, is muon" in text.out
    assert "its state is reset" in text.err
    state = load_checkpoint(tmp_path / "ckpt.pt")
    assert state["iter_num"] == 16 and state["position"] == 12 * 4 + 4 * 2


def test_resumes_with_other_code(data, tmp_path, capsys):
    train.main(command(data, tmp_path, max_iters=4))
    train.main(command(data, tmp_path, max_iters=5, init_from="resume"))
    assert "code version was" not in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "ckpt.pt")
    save_checkpoint(tmp_path / "ckpt.pt", state | {"code_version": "0123456789ab"})
    train.main(command(data, tmp_path, max_iters=6, init_from="resume"))
    assert f"code version was 0123456789ab, is {train.code_version()}: " in capsys.readouterr().out


def test_resumes_in_bfloat16(data, tmp_path, alone):
    """From a checkpoint in float32, with its optimizer: the losses stay near those of float32."""
    flags = dict(init_from="resume", dtype="bfloat16", max_iters=20, **MICRO)
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run/ckpt.prev.pt").replace(tmp_path / "run/ckpt.pt")  # iteration 10
    train.main(command(data, tmp_path / "run", **flags))
    state = load_checkpoint(tmp_path / "run/ckpt.pt")
    assert state["iter_num"] == 20 and state["config"]["dtype"] == "bfloat16"
    assert all(w.dtype == torch.float32 for w in state["model"].values())
    half, full = losses(tmp_path / "run"), losses(alone)
    np.testing.assert_allclose(half, full, atol=0.02)
    assert half[:10] == full[:10] and half[10:] != full[10:]


def test_weighted_folders_resume_to_the_bit(data, tmp_path):
    """--data=a:0.7,b:0.3, interrupted; and it is not the run on the first of them."""
    other = tmp_path / "other"
    (other / f"tok{VOCAB}").mkdir(parents=True)
    np.array(chain(9_000, 7), dtype="<u2").tofile(other / f"tok{VOCAB}" / "data00.bin")
    both = f"{data}:0.7,{other}:0.3"
    train.main(command(both, tmp_path / "whole"))
    assert interrupted(both, tmp_path / "stopped", 6, signal.SIGINT) == 130
    train.main(command(both, tmp_path / "stopped", init_from="resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    train.main(command(data, tmp_path / "first"))
    assert losses(tmp_path / "first") != losses(tmp_path / "whole")


@pytest.mark.parametrize("native", [False, True])
def test_compiled_is_the_same_model(data, tmp_path, monkeypatch, native):
    """Where kernels.c is not, as on a GPU, torch.compile traces the model in one piece; where it
    is, but heads are too wide for its attention, the compiled model is that of its other
    kernels."""
    flags, ran = dict(max_iters=4), []
    if native:
        flags |= dict(
            dim=64, n_heads=2, n_layers=1, batch_size=2, max_seq_len=kernels.MIN_ROWS // 2
        )
        call = kernels.call
        monkeypatch.setattr(kernels, "call", lambda *a, **b: ran.append(a[0]) or call(*a, **b))
    else:
        monkeypatch.setattr(kernels, "library", lambda: None)
    train.main(command(data, tmp_path / "plain", **flags))
    assert "feed_forward_backward" in ran or kernels.library() is None
    compile, calls = torch.compile, []

    def eager(module):
        calls.append(module)
        return compile(module, backend="aot_eager", fullgraph=True)

    ran.clear()
    monkeypatch.setattr(torch, "compile", eager)
    train.main(command(data, tmp_path / "compiled", compile=True, **flags))
    assert calls and "feed_forward_backward" not in ran
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), atol=1e-5)


def test_scratch_does_not_destroy_an_earlier_run(data, tmp_path, capsys):
    train.main(command(data, tmp_path))
    before = (tmp_path / "ckpt.pt").read_bytes()
    train.main(command(data, tmp_path, seed=1))
    assert (tmp_path / "ckpt.replaced.pt").read_bytes() == before
    assert "of an earlier run" in capsys.readouterr().out
    second = (tmp_path / "ckpt.pt").read_bytes()
    train.main(command(data, tmp_path, seed=2, max_iters=2))
    assert (tmp_path / "ckpt.replaced.pt").read_bytes() == before
    assert (tmp_path / "ckpt.replaced2.pt").read_bytes() == second
    there = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for mistake in (
        dict(max_seq_len=1),
        dict(learning_rate=-1.0),
        dict(data="nowhere"),
        dict(dim=15),
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            train.main(command(**dict(data=data, out=tmp_path) | mistake))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == there, mistake


def test_flags_of_pretraining_without_their_effect_are_named(data, tmp_path, capsys):
    flags = dict(max_iters=3, warmup_iters=3, always_save_checkpoint=False)
    train.main(command(data, tmp_path / "a", **flags))
    text = capsys.readouterr().err
    assert "because --warmup_iters=3 is not below --max_iters=3" in text
    rates = [r["lr"] for r in read_log(tmp_path / "a") if "lr" in r]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075])
    assert "--always_save_checkpoint=False has no effect" in text
    train.main(command(data, tmp_path / "b", max_iters=4, warmup_iters=3))
    train.main(command(data, tmp_path / "c", max_iters=3, decay_lr=False))
    assert "--warmup_iters" not in capsys.readouterr().err


def test_resuming_with_other_data_is_named(tmp_path, capsys):
    (tmp_path / f"tok{VOCAB}").mkdir()
    paths = [tmp_path / f"tok{VOCAB}/data0{i}.bin" for i in range(3)]
    for i, path in enumerate(paths):
        np.array(chain(2_000, i), dtype="<u2").tofile(path)
    train.main(command(tmp_path, tmp_path / "out", max_iters=2))
    resume = dict(init_from="resume", vocab_source="llama2", vocab_size=32000)
    line = [x for x in command(tmp_path, tmp_path / "out", **resume) if "vocab_size" not in x]
    train.main(line)
    output = capsys.readouterr()
    assert "the data have changed" not in output.err
    assert "vocab_source was" not in output.out  # the vocabulary is the checkpoint's
    paths[2].unlink()
    train.main([*line, "--max_iters=14"])
    n = (2_000 - 1) // 32
    assert f"from [{2 * n}, {n}] to [{n}, {n}] samples" in capsys.readouterr().err


@pytest.mark.parametrize("size", [2_000, 3_000], ids=["same size", "other size"])
def test_losses_on_other_validation_text_are_not_compared(tmp_path, capsys, size):
    """After a change of the validation text the best checkpoint is that of the lowest new loss."""
    (tmp_path / f"tok{VOCAB}").mkdir()
    easy, hard = chain(2_000, 0), np.random.default_rng(0).integers(3, VOCAB, size)
    for i, ids in enumerate((easy, chain(2_000, 1))):
        np.array(ids, dtype="<u2").tofile(tmp_path / f"tok{VOCAB}/data0{i}.bin")
    train.main(command(tmp_path, tmp_path / "out", max_iters=4))
    hard.astype("<u2").tofile(tmp_path / f"tok{VOCAB}/data00.bin")
    capsys.readouterr()
    train.main(command(tmp_path, tmp_path / "out", max_iters=8, init_from="resume"))
    what = "validation data" if size == 2_000 else "data"
    assert f"note: the {what} have changed since the checkpoint" in capsys.readouterr().err
    losses = {r["iter"]: r["loss/val"] for r in read_log(tmp_path / "out") if "loss/val" in r}
    assert losses[0] > losses[4] and min(losses[4], losses[8]) > 3
    best = load_checkpoint(tmp_path / "out/best.pt")
    assert best["data_size"] == [62, (size - 1) // 32]
    assert losses[best["iter_num"]] == best["best_val_loss"]


def test_a_kill_before_the_link_to_the_best_checkpoint(data, tmp_path, monkeypatch):
    """The next start links it; a loss that is NaN is never the best one."""
    train.main(command(data, tmp_path, max_iters=8))
    best, path = tmp_path / "best.pt", tmp_path / "ckpt.pt"
    assert best.samefile(path)
    best.unlink()
    os.link(tmp_path / "ckpt.prev.pt", best)  # as it was before the last link
    train.main(command(data, tmp_path, max_iters=8, init_from="resume", eval_only=True))
    assert not best.samefile(path)  # a look changes nothing
    train.main(command(data, tmp_path, max_iters=8, init_from="resume"))
    assert best.samefile(path)
    previous = load_checkpoint(tmp_path / "ckpt.prev.pt")
    assert previous["iter_num"] == 4  # the same loss is no better one: nothing is saved again
    evaluate, values = pretraining.Pretraining.evaluate, iter((math.nan, 5.0, 4.0))

    def told(self):
        return evaluate(self) | {"loss/val": next(values)}

    lowest = load_checkpoint(path)["best_val_loss"]
    monkeypatch.setattr(pretraining.Pretraining, "evaluate", told)
    train.main(command(data, tmp_path, max_iters=16, init_from="resume"))
    assert load_checkpoint(path)["best_val_loss"] == lowest < 4
    assert load_checkpoint(best)["iter_num"] == 8


def test_a_failure_after_the_last_checkpoint(data, tmp_path, monkeypatch):
    """The resumed run has nothing to train, but it writes the model for ./run."""
    train.main(command(data, tmp_path / "whole"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = dict(eval_interval=100)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(train, "write_v3", full)
        train.main(command(data, tmp_path / "full", **flags))
    train.main(command(data, tmp_path / "full", init_from="resume", **flags))
    whole, resumed = (tmp_path / name / "model.bin" for name in ("whole", "full"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_new_run_leaves_nothing_of_the_earlier_one_to_resume(data, tmp_path):
    """A run that is killed before its first save must not continue the run before it."""
    train.main(command(data, tmp_path, max_iters=4, eval_interval=2))
    assert all((tmp_path / f"{name}.pt").exists() for name in ("ckpt", "ckpt.prev", "best"))
    log = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "report.json").write_text("{}")  # PPO's has the name ppo_report.json
    move_aside(tmp_path / "ckpt.pt", 0)  # what a new run does before its first step
    assert (tmp_path / "log.replaced.jsonl").read_bytes() == log
    assert (tmp_path / "report.replaced.json").exists() and not (tmp_path / "log.jsonl").exists()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        newest(tmp_path / "ckpt.pt")
    (tmp_path / "log.jsonl").write_text("")  # of a run without checkpoints: replaces no other log
    move_aside(tmp_path / "ckpt.pt", 0)
    assert (tmp_path / "log.replaced.jsonl").read_bytes() == log
    replaced = [tmp_path / f"{name}.replaced.pt" for name in ("ckpt", "ckpt.prev", "best")]
    assert all(path.exists() for path in replaced) and not list(tmp_path.glob("best.pt"))


def test_hostile_pickle_is_refused(data, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken in"),)

    torch.save({"model": {}, "model_args": Hostile()}, tmp_path / "ckpt.pt")
    for init in ("resume", tmp_path / "ckpt.pt"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            train.main(command(data, tmp_path, init_from=init))
    assert not (tmp_path / "broken in").exists()


def test_weights_of_a_checkpoint_start_another_run(data, tmp_path):
    train.main(command(data, tmp_path / "a", max_iters=4))
    train.main(command(data, tmp_path / "b", max_iters=4, init_from=tmp_path / "a/ckpt.pt"))
    last = [r["loss/val"] for r in read_log(tmp_path / "a") if "loss/val" in r][-1]
    first = [r["loss/val"] for r in read_log(tmp_path / "b") if "loss/val" in r][0]
    assert first == pytest.approx(last, abs=1e-6)


# ----------------------------------------------------------------------------
# several processes


def losses(folder, key="loss/train"):
    return [r[key] for r in read_log(folder) if key in r]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Twenty steps of four micro-batches in one process, in this folder."""
    folder = tmp_path_factory.mktemp("alone")
    train.main(command(data, folder, max_iters=20, **MICRO))
    return folder


# As many rows per micro-batch as the kernels of whole layers need.
MICRO = dict(
    batch_size=2, max_seq_len=kernels.MIN_ROWS // 2, gradient_accumulation_steps=4, eval_interval=10
)


def count_messages(folder):
    """A hook: writes the number of each collective operation per step into a file."""
    step = pretraining.Pretraining.step

    def watched(self, i):
        if i != 3:
            return step(self, i)
        with torch.profiler.profile() as found:
            out = step(self, i)
        names = [
            e.name.removeprefix("c10d::") for e in found.events() if e.name.startswith("c10d::")
        ]
        counts = {name: names.count(name) for name in names}
        counts["fast"] = sum(e.name in ("FusedQKV", "FusedFeedForward") for e in found.events())
        Path(f"{folder}/counts.json").write_text(json.dumps(counts))
        return out

    pretraining.Pretraining.step = watched


@pytest.mark.parametrize(
    "n,flags",
    [
        (2, {}),
        (4, {}),
        (2, dict(fsdp=True)),
        (4, dict(fsdp=True)),
    ],
)
def test_any_number_of_processes_learns_the_same(data, tmp_path, alone, n, flags):
    """And they exchange gradients once per step, however many micro-batches it has: DDP in one
    bucket, FSDP layer by layer. One more all-reduce is of loss and tokens; FSDP needs one for the
    norm."""
    argv = command(data, tmp_path, max_iters=20, **MICRO, **flags)
    hooks = {0: (count_messages, str(tmp_path))}
    assert [finish(p) for p in processes(n, argv, tmp_path, hooks)] == [0] * n
    counts = json.loads((tmp_path / "counts.json").read_text())
    # Two a layer, two layers; FSDP computes each again.
    micro_steps, fast = 4 // n, kernels.library() is not None
    assert counts.pop("fast") == fast * 4 * micro_steps * (2 if flags else 1)
    if flags:
        assert counts.pop("_allgather_base_") > 3  # weights, for each micro-batch
    assert counts == ({"_reduce_scatter_base_": 3, "allreduce_": 2} if flags else {"allreduce_": 2})
    np.testing.assert_allclose(losses(tmp_path), losses(alone), atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path, "loss/val"), losses(alone, "loss/val"), atol=1e-5)


def test_validation_does_not_depend_on_the_number_of_processes(data, tmp_path, alone):
    shutil.copytree(alone, tmp_path / "copy")
    flags = MICRO | dict(gradient_accumulation_steps=1, init_from="resume", eval_only=True)
    for p in processes(3, command(data, tmp_path / "copy", max_iters=20, **flags), tmp_path):
        assert finish(p) == 0
    train_loss, val_loss = (losses(alone, key)[-1] for key in ("loss/train_eval", "loss/val"))
    expected = f"step 20: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
    assert expected in (tmp_path / "rank0.txt").read_text()
    assert read_log(tmp_path / "copy") == read_log(alone)


def test_evaluation_is_of_the_checkpoint_and_writes_nothing(data, tmp_path, capsys, monkeypatch):
    """Without --init_from too, with which a run would start from random weights."""
    line = command(data, tmp_path, max_iters=20)
    train.main(line)
    last = re.findall(r"^step 20: .*", capsys.readouterr().out, re.MULTILINE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    monkeypatch.setattr(train, "plot_at_end", lambda path: pytest.fail("a picture is drawn"))
    train.main([*line, "--eval_only"])
    assert re.findall(r"^step .*", capsys.readouterr().out, re.MULTILINE) == last != []
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_report_is_that_of_the_newest_checkpoint(data, tmp_path, capsys):
    """--eval_only of a run that goes on later; and with another beta than that of the report."""
    flags = PPO | dict(ppo_iters=1, report_rollouts=8, init_kl_coef=0.1, freeze_layers=1)
    look, path = dict(eval_only=True), tmp_path / "ppo_report.json"
    train.main(command(data, tmp_path, max_iters=2))
    train.main(command(data, tmp_path, **flags))
    (tmp_path / "ppo_report.json").unlink()  # of a run that was interrupted
    train.main(command(data, tmp_path, **flags, **look))
    first = json.loads(path.read_text())
    more = flags | dict(ppo_iters=3, init_from="resume")
    train.main(command(data, tmp_path, **more))
    report = json.loads(path.read_text())
    assert report["after"]["kl"] > 2 * first["after"]["kl"] > 0
    capsys.readouterr()
    train.main(command(data, tmp_path, **more | dict(init_kl_coef=0.7), **look))
    assert "beta = 0.7" in capsys.readouterr().out
    for other in (dict(max_gen_len=3), dict(target_len=40), dict(seed=9), dict(report_rollouts=4)):
        train.main(command(data, tmp_path, **more | other, **look))
        assert f"{report['before']['reward']:9.3f}" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.main(command("nowhere", tmp_path, **more, **look))
    train.main(command(data, tmp_path, **more, **look))
    assert f"{report['before']['reward']:9.3f}" in capsys.readouterr().out
    assert json.loads(path.read_text())["beta"] == 0.1
    with pytest.raises(ValueError, match="evaluates .*ppo_ckpt.pt, not x.pt"):
        train.main(command(data, tmp_path, **more | dict(init_from="x.pt"), **look))
    run = train.setup(train.flags(command(data, tmp_path, **more, **look)))
    assert rlhf.RLHF.show_report(run)
    os.utime(tmp_path / "ppo_ckpt.pt", (time.time() + 60,) * 2)  # a run has gone on since then
    assert not rlhf.RLHF.show_report(run)
    path.write_text('{"before": {}}')
    assert not rlhf.RLHF.show_report(run)
    path.unlink()
    (tmp_path / "roof.json").write_text("[]")
    for other in (dict(averaging=0), dict(lora_rank=2)):
        with pytest.raises(ValueError, match="had other flags: add --"):
            train.main(command(data, tmp_path, **more | other, **look))
    with pytest.raises(ValueError, match="had other flags: add --freeze_layers=1"):
        train.main(command(data, tmp_path, **more | dict(freeze_layers=0), **look))


def test_zero_heads_of_keys_mean_the_number_of_heads_when_resuming(data, tmp_path):
    flags = dict(n_heads=4, n_kv_heads=0, head_dim=0)
    train.main(command(data, tmp_path, max_iters=1, **flags))
    train.main(command(data, tmp_path, max_iters=2, init_from="resume", **flags))
    with pytest.raises(ValueError, match="n_kv_heads is 4 in the checkpoint, --n_kv_heads=2"):
        train.main(command(data, tmp_path, init_from="resume", **flags | dict(n_kv_heads=2)))
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["iter_num"] == 2 and checkpoint["model_args"]["n_kv_heads"] == 4


def test_fsdp_resumes_with_other_processes(data, tmp_path, alone):
    """Ten steps sharded over two processes, ten more over one, without --fsdp: one ordinary
    file."""
    for n, flags in (
        (2, dict(fsdp=True, max_iters=10)),
        (1, dict(init_from="resume", max_iters=20)),
    ):
        argv = command(data, tmp_path, **MICRO | flags | dict(decay_lr=False))
        for p in processes(n, argv, tmp_path) if n > 1 else [spawn(argv, tmp_path / "one.txt")]:
            assert finish(p) == 0
        assert (
            equal(
                {k: v.shape for k, v in load_checkpoint(tmp_path / "ckpt.pt")["model"].items()},
                {k: v.shape for k, v in load_checkpoint(alone / "ckpt.pt")["model"].items()},
            )
            == []
        )
    train.main(command(data, tmp_path / "whole", **MICRO | dict(max_iters=20, decay_lr=False)))
    np.testing.assert_allclose(losses(tmp_path), losses(tmp_path / "whole"), atol=1e-5)
    argv = command(
        data, tmp_path, init_from="resume", fsdp=True, decay_lr=False, **MICRO | dict(max_iters=24)
    )
    for p in processes(2, argv, tmp_path):  # and back to shards
        assert finish(p) == 0
    train.main(
        command(
            data,
            tmp_path / "whole",
            init_from="resume",
            decay_lr=False,
            **MICRO | dict(max_iters=24),
        )
    )
    np.testing.assert_allclose(losses(tmp_path)[20:], losses(tmp_path / "whole")[20:], atol=1e-4)


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    """A run on two processes whose state has every kind of entry, in this folder."""
    folder = tmp_path_factory.mktemp("pair")
    assert [finish(p) for p in processes(2, command(data, folder, **HARD), folder)] == [0, 0]
    return folder


def test_two_processes_resume_to_the_bit(data, tmp_path, pair):
    """SIGTERM reaches one process; both save and exit, and the resumed run is unaffected."""
    argv = command(data, tmp_path, **HARD)
    hooks = {1: (die_in_step, 5, signal.SIGTERM)}
    assert [finish(p) for p in processes(2, argv, tmp_path, hooks)] == [128 + signal.SIGTERM] * 2
    assert "saved iteration 6" in (tmp_path / "rank0.txt").read_text()
    argv = command(data, tmp_path, init_from="resume", **HARD)
    assert [finish(p) for p in processes(2, argv, tmp_path)] == [0, 0]
    assert_same_run(pair, tmp_path)


def test_muon_in_shards_is_muon(data, tmp_path, pair):
    """With --fsdp the bfloat16 Newton-Schulz iteration has the same inputs as without."""
    argv = command(data, tmp_path, fsdp=True, **HARD)
    assert [finish(p) for p in processes(2, argv, tmp_path)] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path), losses(pair), atol=1e-5)


def held(tensors):
    """The number of elements of some tensors, sharded or not, that this process holds."""
    return sum((t.to_local() if kernels.is_sharded(t) else t).numel() for t in tensors)


def watch_shards(folder):
    """A hook: each process with --fsdp records after each step what it holds and does."""
    found, block = {"forwards": 0}, FastTransformerBlock
    step, forward, state = (
        pretraining.Pretraining.step,
        block.forward,
        pretraining.Pretraining.state,
    )

    def whole_to_device(*args):
        raise AssertionError("a module is moved as a whole")

    def watched_forward(self, *args):
        found["forwards"] += 1
        found["dtypes"] = sorted({str(p.dtype) for p in self.parameters()})
        return forward(self, *args)

    def watched_step(self, i):
        found["forwards"] = 0
        out = step(self, i)
        found["parameters"] = held(self.model.parameters())
        moments = [
            t for o in self.optimizers for s in o.state.values() for t in s.values() if t.dim()
        ]
        found["moments"] = held(moments)
        Path(f"{folder}/rank{self.run.rank}.json").write_text(json.dumps(found))
        return out

    def watched_state(self):
        out = state(self)
        found["saved"] = sum(v is not None for v in out["model"].values())
        return out

    pretraining.Pretraining.step, block.forward = watched_step, watched_forward
    pretraining.Pretraining.state, torch.nn.Module.to = watched_state, whole_to_device


def test_fsdp_in_bfloat16(data, tmp_path, alone):
    """The losses of fp32, nearly; each process holds its half of weights and moments, runs each
    layer twice a micro-batch (activations are not kept), in bfloat16; only one puts the checkpoint
    together."""
    argv = command(data, tmp_path, max_iters=20, fsdp=True, dtype="bfloat16", **MICRO)
    hooks = {r: (watch_shards, str(tmp_path)) for r in range(2)}
    assert [finish(p) for p in processes(2, argv, tmp_path, hooks)] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path), losses(alone), atol=0.02)
    weights = load_checkpoint(tmp_path / "ckpt.pt")["model"]
    assert all(w.dtype == torch.float32 for w in weights.values())
    P = sum(w.numel() for k, w in weights.items() if k != "output.weight")  # tied
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["parameters"] < 0.52 * P and found["moments"] < 2 * 0.52 * P
        assert found["forwards"] == 2 * 2 * 2  # twice, micro-batches, layers
        assert found["dtypes"] == ["torch.bfloat16"]
        assert found["saved"] == (0 if rank else len(weights))


def test_dead_worker_ends_the_run(data, tmp_path):
    argv = command(data, tmp_path, max_iters=100_000, eval_interval=3)
    watched = faulthandler.dump_traceback_later, 15  # where it hangs, if it does
    both = processes(2, argv, tmp_path, hooks={0: watched, 1: (die_in_step, 5)})
    assert finish(both[1]) == -signal.SIGKILL
    t = time.time()
    both[0].join(20)
    assert both[0].exitcode == 1 and time.time() - t < 10, (tmp_path / "rank0.txt").read_text()
    assert "another process of this run has ended" in (tmp_path / "rank0.txt").read_text()
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 3


def test_torchrun_restarts_from_the_last_checkpoint(data, tmp_path):
    """With torchrun --max-restarts a worker that dies once does not change the result."""
    script = tmp_path / "mortal.py"
    script.write_text(
        f"import sys, os, pathlib; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import train, test_train\n"
        f"dead = pathlib.Path({str(tmp_path)!r}) / 'dead'\n"
        "if os.environ['RANK'] == '1' and not dead.exists():\n"
        "    dead.touch(); test_train.die_in_step(6)\n"
        "train.run_main(train.main)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = command(data, tmp_path / "out", **MICRO | dict(eval_interval=4))
    done = subprocess.run(
        [*torchrun, "--max-restarts=1", script, *argv], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "iterations 4 to 12" in done.stdout
    for p in processes(
        2, command(data, tmp_path / "whole", **MICRO | dict(eval_interval=4)), tmp_path
    ):
        assert finish(p) == 0
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(tmp_path / "whole"), atol=1e-6)


def test_ppo_with_two_processes(data, tmp_path):
    """Rollouts and pretraining text, three windows per step, are split; results are equal."""
    flags = PPO | dict(init_from=tmp_path / "ckpt.pt", batch_size=24, rollouts=24, ptx_coef=0.5)
    train.main(command(data, tmp_path))
    train.main(command(data, tmp_path / "one", **flags))
    for p in processes(2, command(data, tmp_path / "two", **flags), tmp_path):
        assert finish(p) == 0, (tmp_path / "rank0.txt").read_text()
    one, two = (read_log(tmp_path / d, "ppo_") for d in ("one", "two"))
    for key in ("ppo/objective", "ppo/loss/policy", "ppo/loss/value", "ppo/kl_ref", "ppo/loss/ptx"):
        np.testing.assert_allclose([r[key] for r in one], [r[key] for r in two], atol=1e-4)
    one, two = (load_checkpoint(tmp_path / d / "ppo_ckpt.pt")["model"] for d in ("one", "two"))
    for k, w in one.items():
        torch.testing.assert_close(two[k], w, atol=1e-4, rtol=1e-3)


def test_training_continues_if_run_c_does_not_support_the_tokenizer(
    data, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise ValueError("run.c knows no such tokenizer")

    monkeypatch.setattr(train, "write_v3", refuse)
    train.main(command(data, tmp_path))
    assert "warning: no model.bin: run.c knows no such tokenizer" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter_num"] > 0
    assert not list(tmp_path.glob("*.bin*"))
