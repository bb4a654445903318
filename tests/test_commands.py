"""The commands that people come with from llama2.c and from the original of the PPO part: each runs
with its own flags, and a few more that make it small. And bad input: one line, no traceback."""

import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_file

import export
import sample
import tinystories
import tokenizer
import train
from checkpoint import load_checkpoint
from common import run_main

ROOT = Path(train.__file__).parent
COMMANDS = {
    "train.py": train,
    "sample.py": sample,
    "export.py": export,
    "tokenizer.py": tokenizer,
    "tinystories.py": tinystories,
}

PRETRAIN = """python train.py --out_dir="outmini" --batch_size=128 --max_seq_len=512
    --gradient_accumulation_steps=1 --vocab_source="custom" --vocab_size=512 --dim=64 --n_layers=5
    --n_heads=8 --n_kv_heads=4 --multiple_of=4 --learning_rate=1e-3 --dropout=0.05
    --weight_decay=0.01 --max_iters=100000 --beta2=0.99 --warmup_iters=1000 --eval_interval=2000
    --eval_iters=100 --compile=True"""
PPO = """python train.py --out_dir="stories260K" --batch_size=50 --max_seq_len=512
    --gradient_accumulation_steps=1 --vocab_source="custom" --vocab_size=512 --dim=64 --n_layers=5
    --n_heads=8 --n_kv_heads=4 --multiple_of=4 --learning_rate=1e-4 --dropout=0.00
    --weight_decay=0.01 --max_iters=98049 --beta2=0.99 --warmup_iters=1000 --eval_interval=20
    --eval_iters=5 --compile=True --device=cuda --eval_only=False --init_from="resume" --ppo=True
    --decay_lr=False --always_save_checkpoint=True --start_len=30"""
PPO_CPU = """python train.py --out_dir="stories260K" --batch_size=20 --max_seq_len=512
    --gradient_accumulation_steps=1 --vocab_source="custom" --vocab_size=512 --dim=64 --n_layers=5
    --n_heads=8 --n_kv_heads=4 --multiple_of=4 --learning_rate=1e-4 --dropout=0.00
    --weight_decay=0.01 --max_iters=200000 --beta2=0.99 --warmup_iters=1000 --eval_interval=20
    --eval_iters=5 --compile=False --device=cpu --eval_only=False --init_from="resume" --ppo=True
    --decay_lr=False --always_save_checkpoint=True"""

# What makes a command small; a flag that comes twice counts as it is given last.
CPU = "--device=cpu --compile=False"
SMALL = f"{CPU} --max_iters=2 --eval_interval=1 --eval_iters=1 --batch_size=2"
SMALL_MODEL = f"{SMALL} --dim=16 --n_layers=1 --n_heads=2 --n_kv_heads=1 --max_seq_len=32"
SMALL_PPO = f"""{CPU} --batch_size=4 --rollouts=4 --max_gen_len=12 --roof_prompts=1 --roof_samples=2
    --report_rollouts=4 --ppo_epochs=1"""


def run(line, more=""):
    """Runs `python SCRIPT.py ...` in this process; returns the exit status."""
    _, script, *argv = shlex.split(f"{line} {more}")
    return COMMANDS[script].main(argv)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The working folder: stories, their vocabulary of 512, and shards of three vocabularies."""
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(folder)
    run("python tinystories.py synthesize --stories=600")
    run("python tinystories.py train_vocab --vocab_size=512")
    run("python tinystories.py pretokenize --vocab_size=512")
    for name in ("tok4096", "TinyStories_all_data"):  # any ids below 512 do
        os.makedirs(f"data/{name}", exist_ok=True)
        for shard in Path("data/tok512").glob("*.bin"):
            shutil.copy(shard, f"data/{name}")
    yield folder
    os.chdir(before)


def test_tokenizer(home):
    run("python tokenizer.py --tokenizer-model=data/tok512.model")
    assert struct.unpack("I", Path("data/tok512.bin").read_bytes()[:4])[0] < 100


def test_download_uses_data_dir(home, monkeypatch):
    """(That it downloads is tested in test_data.py.)"""
    asked = []
    monkeypatch.setattr(tinystories, "download", lambda *args: asked.append(args))
    run("python tinystories.py download")
    assert asked == [("data", tinystories.URL, False)]


def test_pretokenize_for_llama2(home, tmp_path):
    shutil.copytree(
        "data/TinyStories_all_data",
        tmp_path / "data/TinyStories_all_data",
        ignore=shutil.ignore_patterns("*.bin"),
    )
    shutil.copy(data_file("llama2/tokenizer.model"), tmp_path / "data")
    run("python tinystories.py pretokenize", f"--data_dir={tmp_path / 'data'}")
    shards = sorted((tmp_path / "data/TinyStories_all_data").glob("*.bin"))
    assert shards and all(np.fromfile(s, "<u2").max() > 4096 for s in shards)


def test_pretraining(home):
    run(PRETRAIN, f"{SMALL} --max_seq_len=64")
    state = load_checkpoint("outmini/ckpt.pt")
    assert state["iter_num"] == 2 and state["config"]["dropout"] == 0.05
    args = dict(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=4)
    assert args.items() <= state["model_args"].items()
    assert (
        sum(w.numel() for k, w in state["model"].items() if k != "tok_embeddings.weight") == 260_032
    )


def test_pretraining_with_defaults(home):
    run("python train.py --vocab_source=custom --vocab_size=4096", SMALL_MODEL)
    config = load_checkpoint("out/ckpt.pt")["config"]
    defaults = dict(  # of llama2.c
        learning_rate=5e-4,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        grad_clip=1.0,
        decay_lr=True,
        warmup_iters=1000,
        dropout=0.0,
        optimizer="adamw",
        schedule="cosine",
        multiple_of=32,
    )
    assert defaults.items() <= config.items()
    args = train.flags([])
    assert (args.dim, args.n_layers, args.n_heads, args.batch_size) == (288, 6, 6, 128)
    assert (args.max_iters, args.max_seq_len, args.vocab_size) == (100000, 256, 32000)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(flags, more):
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(flags), ROOT / "train.py"]
    return subprocess.Popen(
        [*words, *shlex.split(more)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_torchrun(home, tmp_path):
    child = torchrun("--standalone --nproc_per_node=4", f"{SMALL_MODEL} --out_dir={tmp_path}")
    text = child.communicate(timeout=300)[0]
    assert child.returncode == 0 and "4 processes" in text, text
    state = load_checkpoint(tmp_path / "ckpt.pt")
    assert state["position"] == 2 * 2 * 4 and state["model_args"]["vocab_size"] == 32000


def test_torchrun_on_two_nodes(home, tmp_path):
    """Both nodes are this machine; on two machines only --master_addr differs."""
    address = f"--nproc_per_node=1 --nnodes=2 --master_addr=127.0.0.1 --master_port={free_port()}"
    nodes = [
        torchrun(f"{address} --node_rank={r}", f"{SMALL_MODEL} --out_dir={tmp_path}")
        for r in (0, 1)
    ]
    for node in nodes:
        text = node.communicate(timeout=300)[0]
        assert node.returncode == 0, text
    assert load_checkpoint(tmp_path / "ckpt.pt")["position"] == 2 * 2 * 2


@pytest.fixture(scope="module")
def stories260k(home, stories260k_bin, tok512_model):
    """The published model where the commands look for it."""
    os.makedirs("stories260K", exist_ok=True)
    shutil.copy(stories260k_bin, "stories260K/stories260K.bin")
    for name in ("ckpt.pt", "stories260K.pt"):
        export.main(
            [
                f"stories260K/{name}",
                f"--llama2c={stories260k_bin}",
                "--iter_num=98000",
                f"--tokenizer={tok512_model}",
            ]
        )
    run("python tokenizer.py --tokenizer-model=stories260K/tok512.model")
    # the model reads its own tokens; home's vocabulary of the same size has others
    shutil.copy("stories260K/tok512.model", "data")
    run("python tinystories.py pretokenize --vocab_size=512")


@pytest.mark.parametrize(
    "line,more,iterations,start_len",
    [
        (PPO, "--max_iters=98001", 1, 30),
        (PPO, "--start_len=1 --init_kl_coef=0.0 --max_iters=98001", 1, 1),
        (PPO_CPU, "--ppo_iters=1", 1, 30),
    ],
)
def test_ppo(stories260k, line, more, iterations, start_len):
    """--max_iters counts on from the 98,000 of the checkpoint."""
    run(line, f"{SMALL_PPO} {more}")
    state = load_checkpoint("stories260K/ppo_ckpt.pt")
    assert state["iter_num"] == 98000 + iterations
    assert state["config"]["start_len"] == start_len and state["config"]["learning_rate"] == 1e-4
    assert len(Path("stories260K/ppo_log.jsonl").read_text().splitlines()) == iterations


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_ppo_needs_cuda(home, capsys):
    assert exit_of(lambda: run(PPO)) == 1
    text = capsys.readouterr().err
    assert text == "error: --device=cuda: there is no such device here; use --device=cpu\n"


def test_sampling(stories260k, capsys):
    line = "python sample.py --checkpoint=stories260K/{} --tokenizer=stories260K/tok512.model"
    run(f"{line.format('stories260K.pt')} --temperature=0.0 --max_new_tokens=500")
    text = capsys.readouterr().out
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play"
    )
    assert text.endswith('"Thank you, Lily! You are a good friend."\n')
    shutil.copy("stories260K/ckpt.pt", "stories260K/ppo_ckpt.pt")
    run(f"{line.format('ppo_ckpt.pt')} --temperature=0.4 --max_new_tokens=500")
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_export_and_run(stories260k, tmp_path):
    """run.c reads an exported model of 4,096 tokens; both samplers generate the same text."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    subprocess.run([compiler, "-O1", "-o", "run", ROOT / "run.c", "-lm", "-pthread"], check=True)
    run("python train.py --vocab_source=custom --vocab_size=4096", SMALL_MODEL)
    with open("data/tok4096.bin", "wb") as f:  # a vocabulary of that size, in llama2.c's format
        pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]
        pieces += [b"w%d" % i for i in range(4096 - len(pieces))]
        f.write(struct.pack("<I", max(map(len, pieces))))
        for piece in pieces:
            f.write(struct.pack("<fI", 0.0, len(piece)) + piece)

    def c(line, **kw):
        done = subprocess.run(shlex.split(line), capture_output=True, timeout=60, **kw)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode(errors="replace")

    assert c("./run out/model.bin -z data/tok4096.bin")
    run("python export.py model.bin --checkpoint out/ckpt.pt")
    assert Path("model.bin").read_bytes()[:8] == struct.pack("<II", 0x616B3432, 3)
    run("python export.py model.bin --version 2 --checkpoint out/ckpt.pt")
    assert Path("model.bin").read_bytes()[:8] == struct.pack("<II", 0x616B3432, 2)
    story = c(
        "./run stories260K/stories260K.bin -z stories260K/tok512.bin -t 0.8 -p 0.9 -n 256 "
        '-i "One day, Lily met a Shoggoth" -s 1 -m generate'
    )
    assert story.startswith("One day, Lily met a Shoggoth")
    greedy = c("./run stories260K/stories260K.bin -z stories260K/tok512.bin -t 0 -n 500")
    assert greedy.rstrip().endswith('"Thank you, Lily! You are a good friend."')
    run("python export.py model.bin --checkpoint stories260K/stories260K.pt")
    assert c("./run model.bin -m chat", input=b"\nHello\n\n")


def test_make_run():
    """`make run` compiles the C program; here it is only asked what it would do."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(["make", "-n", "-B", "run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "-o run run.c" in done.stdout


# ----------------------------------------------------------------------------
# bad input


def exit_of(f):
    with pytest.raises(SystemExit) as e:
        run_main(f)
    return e.value.code


def test_errors(home, tmp_path, capsys):
    """Every mistake: its exit status, and one line that says what is wrong."""
    run(
        "python train.py --vocab_source=custom --vocab_size=512",
        f"{SMALL_MODEL} --out_dir={tmp_path / 'good'}",
    )
    blob = (tmp_path / "good/ckpt.pt").read_bytes()
    for name, content in (("short", blob[:1000]), ("noise", os.urandom(5000)), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ckpt.pt").write_bytes(content)
    (tmp_path / "nothing").mkdir()
    for name, ids in (("large", [1, 5, 600] * 100), ("odd", None), ("few", [1, 2, 3])):
        (tmp_path / f"{name}/tok512").mkdir(parents=True)
        shard = tmp_path / f"{name}/tok512/data00.bin"
        shard.write_bytes(b"abc" if ids is None else np.array(ids, "<u2").tobytes())
    v512 = f"--vocab_source=custom --vocab_size=512 {SMALL_MODEL} --out_dir={tmp_path / 'out'}"
    resume = f"{v512} --init_from=resume"
    cases = [
        (f"{resume} --out_dir={tmp_path / 'nothing'}", 1, "there is no such checkpoint"),
        (f"{resume} --out_dir={tmp_path / 'short'}", 1, "is damaged|not a readable checkpoint"),
        (f"{resume} --out_dir={tmp_path / 'noise'}", 1, "not a readable checkpoint"),
        (f"{resume} --out_dir={tmp_path / 'empty'}", 1, "not a readable checkpoint"),
        (
            f"{resume} --out_dir={tmp_path / 'good'} --n_layers=2",
            1,
            "n_layers is 1 in the checkpoint, --n_layers=2 on the command line",
        ),
        (f"{v512} --init_from=none.pt", 1, "none.pt: there is no such checkpoint"),
        (
            f"{v512} --ppo --out_dir={tmp_path / 'nothing'}",
            1,
            "there is no such checkpoint; train a model first (train.py)",
        ),
        (f"{v512} --init_from={tmp_path / 'good/x.pt'}", 1, f"; {tmp_path / 'good'} has ckpt.pt"),
        (f"{v512} --init_from={tmp_path / 'x.pt'}", 1, "no such checkpoint; there is "),
        (f"{v512} --eval_only --out_dir={tmp_path / 'x'}", 1, "x/ckpt.pt: there is no such check"),
        (f"{v512} --ppo --beta=1", 2, "unknown argument --beta, did you mean --init_kl_coef?"),
        (f"{v512} --lr=1", 2, "unknown argument --lr, did you mean --learning_rate?"),
        (f"{v512} data", 2, "unknown argument data: a value follows the name of its flag"),
        (f"{v512} --dtype=fp16", 2, "(choose from 'float32', "),
        (f"{v512} --data={tmp_path / 'nothing'}", 1, "no .bin shards in"),
        (f"{v512} --data=nowhere", 1, "no .bin shards in"),
        (
            f"{v512} --data={tmp_path / 'large'}",
            1,
            "has token 600, but the vocabulary has only 512",
        ),
        (f"{v512} --data={tmp_path / 'odd'}", 1, "not a list of 2-byte tokens"),
        (f"{v512} --data={tmp_path / 'few'}", 1, "no file of its train part has the"),
        (f"{v512} --tokenizer=none.model", 1, "none.model: No such file"),
        (
            f"{v512} --vocab_size=4096 --tokenizer=data/tok512.model",
            1,
            "has 512 tokens, the model 4096",
        ),
        ("--vocab_size=512", 1, "needs --vocab_source=custom"),
        (f"{v512} --learnin_rate=1", 2, "did you mean --learning_rate?"),
        (f"{v512} --max_iter=1", 2, "did you mean --max_iters?"),
        (f"{v512} --dim=wide", 2, "invalid int value"),
        (f"{v512} --optimizer=sgd", 2, "invalid choice"),
        (f"{v512} --ppo=perhaps", 2, "expected True or False"),
        (f"{v512} --batch_size=0", 1, "--batch_size must be at least 1"),
        (f"{v512} --weight_decay=nan", 2, "--weight_decay: expected a finite number, not nan"),
        (f"{v512} --learning_rate=inf", 2, "--learning_rate: expected a finite number, not inf"),
        (f"{v512} --warmup_iters=-1", 1, "--warmup_iters must not be negative, not -1"),
        (f"{v512} --seed={2**32}", 1, f"--seed must be below 2^32, not {2**32}"),
        (
            f"{v512} --optimizer=muon --muon_learning_rate=-0.1",
            1,
            "--muon_learning_rate must not be negative",
        ),
        (f"{v512} --beta2=1", 1, "--beta2 must be below 1, not 1.0"),
        (f"{v512} --n_heads=3", 1, "must be an even multiple of n_heads"),
        (f"{v512} --n_heads=4 --n_kv_heads=3", 1, "must be a multiple of n_kv_heads"),
        (f"{v512} --dropout=1.5", 1, "dropout must be in"),
        (f"{v512} --device=tpu", 1, "expected cpu, cuda"),
        (f"{v512} --fsdp", 1, "--fsdp is for several processes"),
        (f"{v512} --out_dir={tmp_path / 'good/ckpt.pt'}", 1, "is a file: name a folder"),
        (f"{v512} --out_dir=/proc/none", 1, "/proc/none: "),
        (
            f"{v512} --ppo --init_from={tmp_path / 'good/ckpt.pt'} --reward=none.py:f",
            1,
            "no file none.py",
        ),
        (
            f"{v512} --ppo --init_from={tmp_path / 'good/ckpt.pt'} --start_len=0",
            1,
            "start_len must be",
        ),
    ]
    if not torch.cuda.is_available():
        cases.append((f"{v512} --device=cuda", 1, "there is no such device here; use --device=cpu"))
    for words, status, message in cases:
        capsys.readouterr()
        argv = shlex.split(words)
        code = exit_of(lambda argv=argv: train.main(argv))
        text = capsys.readouterr().err
        assert code == status and any(m in text for m in message.split("|")), (words, code, text)
        assert text.startswith("error: ") and text.count("\n") == 1, (words, text)


def test_help(capsys):
    for name, module in COMMANDS.items():
        assert exit_of(lambda module=module: module.main(["--help"])) == 0
        text = capsys.readouterr().out
        assert "usage:" in text and name.removesuffix(".py") in text.lower(), name


@pytest.mark.parametrize("folder", ["bench", "experiments"])
def test_help_of_scripts(folder):
    """In one process, because each would import PyTorch."""
    scripts = [p for p in (ROOT / folder).glob("*.py") if "__main__" in p.read_text()]
    assert scripts
    code = """import runpy, sys
for script in sys.argv[1:]:
    sys.argv, sys.path[0] = [script, "--help"], script.rpartition("/")[0]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        print("status", e.code or 0, script)
"""
    command = [sys.executable, "-c", code, *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True)
    for script in scripts:
        assert f"usage: {script.name}" in done.stdout, (script, done.stderr)
        assert f"status 0 {script}\n" in done.stdout, (script, done.stderr)


def test_an_environment_that_is_not_active_is_one_line():
    """Every program, started with a Python that has no packages (-S)."""
    scripts = [p for f in (".", "bench", "experiments") for p in (ROOT / f).glob("*.py")]
    scripts = [p for p in scripts if "\n    run_main(main)\n" in p.read_text()]
    assert len(scripts) > 10
    for script in scripts:
        done = subprocess.run([sys.executable, "-S", script], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, (script, done.stderr)
        assert "has no torch and no numpy" in done.stderr and "activate the env" in done.stderr
    code = "import sys; sys.version_info = (3, 9, 6); import common"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.endswith("3.10 or later is needed\n")
