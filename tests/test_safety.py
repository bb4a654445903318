"""What other users, other processes and the surroundings of a run can do to it: planted libraries and
links, a second run in one folder, a closed pipe, libraries that are not installed, examples of --help."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(kernels.__file__).parent
needs_cc = pytest.mark.skipif(not shutil.which("cc") or sys.platform == "win32", reason="needs a C compiler")

# ----------------------------------------------------------------------------
# kernels.c: where its library lies, and what is said when there is none


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder with a small kernels.c, in which no build/ can be made; the cache is tmp_path/cache."""
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
def test_library_goes_to_a_private_folder(code, tmp_path):
    assert load().answer() == 42
    folder = tmp_path / "cache/fable"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(list(folder.iterdir())) == 1
    (code / "build").unlink()
    assert load().answer() == 42
    assert compiled_name(code / "build") == compiled_name(folder)


@needs_cc
@pytest.mark.parametrize("attack", ["owner", "mode", "link", "file", "file link", "parent"])
def test_planted_library_is_not_loaded(code, tmp_path, attack, monkeypatch):
    """Another user puts a library where ours would be: its code must not run."""
    if attack in ("owner", "file") and os.getuid():
        pytest.skip("only root can give files away")
    kernels.compiled(code / "kernels.c")  # not loaded: a library that was stays, under its path
    folder = tmp_path / "cache/fable"
    evil, mark = folder / compiled_name(folder), tmp_path / "mark"
    source = tmp_path / "evil.c"
    source.write_text("#include <stdio.h>\n__attribute__((constructor)) static void run(void)"
                      f' {{ fclose(fopen("{mark}", "w")); }}\nint answer(void) {{ return 13; }}\n')  # fmt: skip
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
def test_library_changes_its_name_with_compiler_flags_and_processor(code, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("cc,says", [("no-such-cc", "there is no C compiler no-such-cc"),
                                     ("cc -no-such-flag", "cannot compile it"), (None, "cannot write to")])  # fmt: skip
def test_says_why_there_is_no_library(code, tmp_path, cc, says, monkeypatch, capsys):
    """One line, which is no error: PyTorch's kernels serve."""
    if cc:
        monkeypatch.setenv("CC", cc)
    for name in () if cc else ("cache", "temporary"):
        (tmp_path / name).write_text("not a folder")
    if cc != "no-such-cc" and not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    assert load() is None
    text = capsys.readouterr().err
    assert text.startswith("note: kernels.c is not used: ") and says in text and text.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun: one process says it
    assert load() is None
    monkeypatch.setenv("NATIVE_KERNELS", "0")  # asked for
    monkeypatch.delenv("LOCAL_RANK")
    assert load() is None and capsys.readouterr().err == ""
