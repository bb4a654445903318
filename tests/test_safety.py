"""
Robustness against other users, other processes and the environment: planted libraries and links, a
second run in one folder, a closed pipe, missing packages, and the documented commands.
"""

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import kernels
import train
from checkpoint import load_checkpoint, save_checkpoint
from common import write_atomic
from model import ModelArgs

ROOT = Path(kernels.__file__).parent
needs_cc = pytest.mark.skipif(
    not shutil.which("cc") or sys.platform == "win32", reason="needs a C compiler"
)

# ----------------------------------------------------------------------------
# The library of kernels.c: its folder, and the message without it


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder with a small kernels.c and no writable build/; the cache is tmp_path/cache."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "kernels.c").write_text("int answer(void) { return 42; }\n")
    (folder / "build").write_text("not a folder")
    monkeypatch.setattr(kernels, "__file__", str(folder / "kernels.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    for name in ("NATIVE_KERNELS", "CC", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return folder


def load():
    return kernels.library.__wrapped__()


def compiled_name(folder):
    [path] = folder.glob("kernels-*.so")
    return path.name


@needs_cc
def test_library_is_in_a_private_folder(code, tmp_path):
    assert load().answer() == 42
    folder = tmp_path / "cache/fable"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(list(folder.iterdir())) == 1
    (code / "build").unlink()
    assert load().answer() == 42
    assert compiled_name(code / "build") == compiled_name(folder)


@needs_cc
def test_compilation_is_announced_once(code, monkeypatch, capsys):
    kernels.compiled(code / "kernels.c")
    assert capsys.readouterr() == ("", "compiling kernels.c; this is done once\n")
    kernels.compiled(code / "kernels.c")
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of torchrun
    monkeypatch.setenv("CC", "cc -DX")
    kernels.compiled(code / "kernels.c")
    assert capsys.readouterr() == ("", "")


@needs_cc
@pytest.mark.parametrize("attack", ["owner", "mode", "link", "file", "file link", "parent"])
def test_planted_library_is_not_loaded(code, tmp_path, attack, monkeypatch):
    """Another user has put a library under the name of ours: its code must not run."""
    if attack in ("owner", "file") and os.getuid():
        pytest.skip("only root can give files away")
    kernels.compiled(code / "kernels.c")  # not loaded: a library that was stays, under its path
    folder = tmp_path / "cache/fable"
    evil, mark = folder / compiled_name(folder), tmp_path / "mark"
    source = tmp_path / "evil.c"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void run(void)"
        f' {{ fclose(fopen("{mark}", "w")); }}\nint answer(void) {{ return 13; }}\n'
    )
    evil.unlink()
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", evil], check=True)
    evil.chmod(0o700)
    if attack == "owner":
        os.chown(folder, 12345, 12345)
    elif attack == "mode":
        folder.chmod(0o777)
    elif attack == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif attack == "file":
        os.chown(evil, 12345, 12345)
    elif attack == "file link":
        evil.rename(tmp_path / "evil.so")
        evil.symlink_to(tmp_path / "evil.so")
    elif attack == "parent":
        (tmp_path / "cache").chmod(0o777)
    assert load().answer() == 42 and not mark.exists()


@needs_cc
def test_library_name_depends_on_compiler_flags_and_processor(code, tmp_path, monkeypatch):
    names = set()

    def note():
        names.add(kernels.compiled(code / "kernels.c").name)
        return len(names)

    assert note() == note() == 1
    (code / "kernels.c").write_text("int answer(void) { return 43; }\n")
    assert note() == 2
    monkeypatch.setenv("CC", "cc -DX")
    assert note() == 3
    wrapper = tmp_path / "bin/cc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("cc")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    assert note() == 4
    wrapper.write_text(wrapper.read_text() + "# another version\n")
    assert note() == 5
    monkeypatch.setattr(kernels.platform, "machine", lambda: "another")
    assert note() == 6


def test_an_empty_compiler_is_the_default(code, monkeypatch):
    monkeypatch.setenv("CC", " ")
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    assert load() is not None


@pytest.mark.parametrize(
    "cc,says",
    [
        ("no-such-cc", "there is no C compiler no-such-cc"),
        ("cc -no-such-flag", "cannot compile it"),
        (None, "cannot write to"),
    ],
)
def test_message_without_a_library(code, tmp_path, cc, says, monkeypatch, capsys):
    """One line, which is not an error: PyTorch's kernels are used."""
    if cc:
        monkeypatch.setenv("CC", cc)
    for name in () if cc else ("cache", "temporary"):
        (tmp_path / name).write_text("not a folder")
    if cc != "no-such-cc" and not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    assert load() is None
    text = capsys.readouterr().err.removeprefix("compiling kernels.c; this is done once\n")
    assert (
        text.startswith("note: kernels.c is not used: ") and says in text and text.count("\n") == 1
    )
    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun: one process says it
    assert load() is None
    monkeypatch.setenv("NATIVE_KERNELS", "0")  # asked for
    monkeypatch.delenv("LOCAL_RANK")
    assert load() is None and capsys.readouterr().err == ""


# ----------------------------------------------------------------------------
# Atomic writes


def hidden(folder):
    return sorted(p.name for p in folder.glob(".*"))


def test_temporary_names_are_unique(tmp_path):
    """Two concurrent writers of one path have two temporary files; the last to finish wins."""
    path = tmp_path / "file"
    with write_atomic(path) as first:
        with write_atomic(path) as second:
            assert first.name != second.name
            first.write(b"first")
            second.write(b"second")
            first.flush()
            second.flush()
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    """Neither under the former name, NAME.tmp, nor under a guessed name."""
    victim, path = tmp_path / "victim", tmp_path / "folder/file"
    victim.write_text("precious")
    path.parent.mkdir()
    names = iter(["guessed", "guessed", "another"])
    monkeypatch.setattr(common.secrets, "token_hex", lambda n: next(names))
    for name in ("file.tmp", ".file.guessed.tmp"):
        (path.parent / name).symlink_to(victim)
    with pytest.raises(FileExistsError) as e:
        with write_atomic(path) as f:
            f.write(b"mine")
    assert e.value.filename == str(path) and victim.read_text() == "precious"
    (path.parent / ".file.guessed.tmp").unlink()
    save_checkpoint(path, {"a": 1})
    assert torch.load(path) == {"a": 1} and victim.read_text() == "precious"


def test_a_link_is_replaced_and_a_special_file_is_refused(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    link.symlink_to(victim)
    with write_atomic(link, "w") as f:
        f.write("new")
    assert victim.read_text() == "precious" and link.read_text() == "new" and not link.is_symlink()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to a device").symlink_to("/dev/null")
    for name in ("fifo", "to a device", "."):
        with pytest.raises(OSError, match="is not a regular file"):
            with write_atomic(tmp_path / name):
                pass
    assert (
        stat.S_ISFIFO(os.lstat(tmp_path / "fifo").st_mode)
        and (tmp_path / "to a device").is_symlink()
    )


WRITER = """
import sys, time
sys.path.insert(0, {root!r})
from common import write_atomic
with write_atomic({path!r}) as f:
    f.write(b"half")
    f.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_the_next_write_removes_temporary_files_of_killed_processes_only(tmp_path):
    path = tmp_path / "file"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(root=str(ROOT), path=str(path))],
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline()
    [temporary] = hidden(tmp_path)
    with write_atomic(path) as f:
        f.write(b"mine")
    common.remove_temporaries(tmp_path)
    assert hidden(tmp_path) == [temporary] and path.read_bytes() == b"mine"
    child.kill()
    child.wait()
    with write_atomic(tmp_path / "another") as f:
        f.write(b"x")
    assert hidden(tmp_path) == [temporary]  # it is the other's
    with write_atomic(path) as f:
        f.write(b"again")
    assert hidden(tmp_path) == [] and path.read_bytes() == b"again"


# ----------------------------------------------------------------------------
# One run per folder

SMALL = (
    "--vocab_source=custom --vocab_size=96 --dim=16 --n_layers=1 --n_heads=2 --n_kv_heads=2 "
    "--max_seq_len=32 --batch_size=2 --eval_iters=1 --warmup_iters=1 --device=cpu"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "tok96").mkdir()
    np.random.default_rng(0).integers(3, 96, 9_000).astype("<u2").tofile(
        folder / "tok96/data00.bin"
    )
    return folder


def command(data, out, more=""):
    return [f"--data={data}", f"--out_dir={out}", *shlex.split(f"{SMALL} {more}")]


def test_a_second_run_in_the_folder_is_refused(data, tmp_path, capsys):
    """
    While the first run continues: one line that names folder and process. Evaluating its checkpoint
    is allowed, a kill releases the folder, and the first run has lost nothing.
    """
    out = tmp_path / "out"
    argv = command(data, out, "--max_iters=100000 --eval_interval=2")
    first = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *argv], stdout=subprocess.PIPE, text=True
    )
    try:
        lines = iter(first.stdout.readline, "")
        assert any(line.split("|")[0].strip() == "4" for line in lines)
        with pytest.raises(SystemExit) as e:
            common.run_main(lambda: train.main(command(data, out, "--max_iters=4")))
        text = capsys.readouterr().err
        assert e.value.code == 1 and text.startswith("error: ") and text.count("\n") == 1
        assert str(out) in text and f"process {first.pid}" in text
        train.main(command(data, out, "--init_from=resume --max_iters=100000 --eval_only"))
        train.main(["--plot", f"--out_dir={out}"])
        log = (out / "log.jsonl").stat()
        assert any(line.split("|")[0].strip().isdigit() for line in lines)
        assert (out / "log.jsonl").stat().st_ino == log.st_ino and first.poll() is None
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    done = load_checkpoint(out / "ckpt.pt")["iter_num"]
    train.main(command(data, out, f"--init_from=resume --eval_interval=2 --max_iters={done + 2}"))
    assert load_checkpoint(out / "ckpt.pt")["iter_num"] == done + 2
    iterations = [json.loads(line)["iter"] for line in (out / "log.jsonl").open()]
    assert sorted(set(iterations)) == list(range(done + 3))
    assert hidden(out) == []


def test_only_the_first_process_locks(data, tmp_path, monkeypatch):
    """The ranks of torchrun share one lock. (That a restart works is tested in test_train.py.)"""
    monkeypatch.setattr(train, "train", lambda run: run.rank)
    monkeypatch.setattr(train, "join_processes", lambda *_: None)
    with common.lock_folder(tmp_path):
        with pytest.raises(ValueError, match="another run writes to"):
            train.main(command(data, tmp_path))
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert train.main(command(data, tmp_path)) == 1
    monkeypatch.setenv("RANK", "0")
    assert train.main(command(data, tmp_path)) == 0


def test_the_lock_does_not_follow_links(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run.lock").symlink_to("victim")
    with pytest.raises(OSError):
        with common.lock_folder(tmp_path):
            pass
    assert (tmp_path / "victim").read_text() == "precious"


# ----------------------------------------------------------------------------
# Output to a closed pipe


def test_text_that_the_terminal_cannot_show_ends_no_command(tmp_path):
    script = "import common; common.run_main(lambda: print('a “word” or two'))"
    env = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a ?word? or two\n", b"")


@pytest.mark.parametrize("both", ["", "2>&1"])
def test_training_continues_when_the_pipe_is_closed(data, tmp_path, both):
    """train.py | head -1"""
    words = [
        sys.executable,
        str(ROOT / "train.py"),
        *command(data, tmp_path / "out", "--max_iters=400 --eval_interval=100 --log_interval=1"),
    ]
    line = f"({shlex.join(words)}; echo status $? >&3) {both} | head -1"
    done = subprocess.run(
        ["sh", "-c", f"exec 3>{tmp_path}/status; {line}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (tmp_path / "status").read_text() == "status 0\n", done.stderr
    assert (
        done.stdout.count("\n") == 1
        and "Traceback" not in done.stderr
        and "Broken" not in done.stderr
    )
    assert load_checkpoint(tmp_path / "out/ckpt.pt")["iter_num"] == 400
    iterations = {json.loads(line)["iter"] for line in (tmp_path / "out/log.jsonl").open()}
    assert iterations == set(range(401))


# ----------------------------------------------------------------------------
# Packages that are not installed


@pytest.mark.parametrize(
    "flag, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb_log", "wandb")]
)
def test_optional_packages_are_checked_first(tmp_path, flag, module, monkeypatch):
    """The check is before models are built and references sampled, which may take an hour."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(train, "setup", lambda args: pytest.fail("the run has begun"))
    with pytest.raises(
        ValueError, match=f"--{flag} needs: pip install {flag.removesuffix('_log')}"
    ):
        train.main([f"--{flag}", f"--out_dir={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


SCRIPTS = "train.py sample.py export.py instruct.py tinystories.py tokenizer.py".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_packages_are_one_line(script):
    """A Python without packages (-S: no site-packages): one line with the remedy."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", ROOT / script, "--help"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "no torch" in done.stderr
    assert ".venv/bin/activate" in done.stderr and "pip install -r requirements.txt" in done.stderr


COUNTS = {
    "bench/bench_data.py": "repeat",
    "bench/bench_run.py": "repeat",
    "bench/bench_serve.py": "repeat",
    "bench/bench_smollm2.py": "repeat",
    "bench/bench_train.py": "threads",
    "bench/bench_trl.py": "repeat",
    "experiments/lifted.py": "threads",
}


@pytest.mark.parametrize("value", ["0", "-1", "x"])
@pytest.mark.parametrize("script", COUNTS)
def test_counts_are_above_0(script, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, f"--{COUNTS[script]}={value}"])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    error = f"error: argument --{COUNTS[script]}: expected a whole number above 0, not {value!r}"
    assert capsys.readouterr().err.startswith(error)


def test_needed_packages_are_those_of_requirements_txt():
    required = re.findall(r"^(\w+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert set(common.NEEDED) == set(required) - {"pytest"}


# ----------------------------------------------------------------------------
# The commands in docstrings, README and doc/


def examples():
    """(file, words) of every command in the docstring of a command, README and doc/."""
    codes = [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("experiments/*.py")]
    texts = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in codes]
    texts += [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("doc/*.md"))]
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            found = re.search(
                r"^(?:.*: )? *(?:python|torchrun .*) ((?:\w+/)?\w+\.py)(?: (.*))?$", line
            )
            if found and not line.startswith("error: "):  # a quoted message
                # [--optional], a variable of the shell, and what comes after this command
                words = re.sub(r"[][]|\$\w+|\.\.\.$|&&.*", "", found[2] or "")
                words = shlex.split(words, comments=True)
                yield pytest.param(ROOT / found[1], words, id=f"{found[1]} {' '.join(words)}")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("path, words", list(examples()))
def test_documented_commands_are_valid(path, words, monkeypatch):
    """Every flag exists and has a valid value; a model to train has a valid shape."""
    if path.name == "train.py":
        args = train.flags(words)
        ModelArgs(**{name: getattr(args, name) for name in train.MODEL_FLAGS})
        train.stage_class(args)
        return
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def parse(parser, *more):
        raise Parsed(common.parse_args(parser, *more))

    monkeypatch.setattr(module, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with pytest.raises(Parsed):
        module.main()


def test_every_command_has_documented_examples():
    files = {p.values[0].name for p in examples()}
    assert files >= set(SCRIPTS) and len(list(examples())) > 25
