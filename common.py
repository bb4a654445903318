"""What all commands share and Python alone can do: files that are never half-written, one run in a
folder at a time, output whose reader may leave, and a hint where a package is not installed. Every
command imports it first."""

import contextlib
import glob
import importlib.util
import os
import platform
import secrets
import stat
import sys

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

NEEDED = "torch", "numpy", "sentencepiece", "requests", "tqdm"
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name)]
if MISSING:
    sys.exit(f"error: {sys.executable} has no {' and no '.join(MISSING)}: activate the environment "
             "(. .venv/bin/activate), or pip install -r requirements.txt")  # fmt: skip


def try_lock(fd):
    """Locks an open file until it is closed, also by the end of the process, however that comes. False
    if another process holds it; where a file system has no locks, OSError."""
    if fcntl is None:
        raise OSError("no locks on this system")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


# ----------------------------------------------------------------------------
# files


@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """Opens `path` for writing so that it is the old file or the whole new one, never a part: a temporary
    file beside it, flushed to the disk, then renamed; removed if anything fails, and by the next write of
    `path` if this process is killed. Its name is new, so that no link there is followed and two
    processes do not share it. Where `path` is a symbolic link, the file takes the link's place.
    Raises OSError that names `path`."""
    path = os.path.abspath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a folder, /dev/null, a link to one
        raise OSError(f"{path} is not a regular file")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    remove_temporaries(os.path.dirname(path), os.path.basename(path))
    f = open_temporary(path, mode.replace("w", "x"))
    try:
        with f:
            yield f
            f.flush()
            os.fsync(f.fileno())
            if fcntl is None:
                f.close()  # Windows renames no open file
            os.replace(f.name, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(f.name)
        if isinstance(e, OSError) and e.filename in (None, f.name):
            e.filename = path  # a full disk names no file; and nobody knows the temporary one
        raise


def open_temporary(path, mode):
    """A new file .NAME.*.tmp beside `path`, locked while it is open."""
    folder, name = os.path.split(path)
    while True:
        temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
        try:
            f = open(temporary, mode, encoding=None if "b" in mode else "utf-8")
        except OSError as e:
            e.filename = path
            raise
        with contextlib.suppress(OSError):
            try_lock(f.fileno())
        if os.path.exists(temporary):  # else removed as if of a dead process, before it was locked
            return f
        f.close()


def remove_temporaries(folder, name="*"):
    """Removes what write_atomic has left in a folder where its process was killed: files of this user
    that no process has locked."""
    pattern = f".{name if name == '*' else glob.escape(name)}.*.tmp"
    for path in glob.glob(os.path.join(glob.escape(folder), pattern)) if fcntl else ():
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(fd)
                mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
                if mine and try_lock(fd):
                    os.remove(path)
            finally:
                os.close(fd)


@contextlib.contextmanager
def lock_folder(folder):
    """Keeps other runs out of a folder, where they would overwrite this run's files, until this process
    ends in whatever way. Raises ValueError, with the process that is there, if there is one."""
    path, mine = os.path.join(folder, "run.lock"), False
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        try:
            mine = try_lock(fd)
        except OSError as e:
            print(f"note: {folder} is not locked: {e}", file=sys.stderr)
        else:
            if not mine:
                who = " ".join(os.read(fd, 200).decode(errors="replace").split())
                raise ValueError(f"another run writes to {folder}{who and f' ({who})'}: wait for its end, "
                                 "or choose another --out_dir")  # fmt: skip
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        if mine:
            os.ftruncate(fd, 0)
        os.close(fd)


# ----------------------------------------------------------------------------
# output


class Unbreakable:
    """A stream whose reader may leave (train.py | head): what is written after that goes nowhere, and
    the run goes on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.guarded(self.stream.write, text)

    def flush(self):
        return self.guarded(self.stream.flush)

    def guarded(self, function, *args):
        try:
            return function(*args)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def unbreakable_output():
    """Makes sys.stdout and sys.stderr Unbreakable, where there are any."""
    out, err = (stream and Unbreakable(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
