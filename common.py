"""
Utilities that all commands share: atomic writes, a lock per output folder, output that survives a
closed pipe, command-line flags, error messages and JSON.

This module needs only the standard library, and every command imports it first, so that a package
that is not installed ends in one line that says what to do.
"""

import argparse
import contextlib
import dataclasses
import difflib
import glob
import importlib.util
import json
import math
import os
import platform
import re
import secrets
import stat
import sys
import time

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

# PyTorch's allocator on CUDA reads this before its first allocation. Batches differ in length, and
# fixed segments would become too fragmented to hold the next one.
ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
    os.environ[ALLOCATOR[0]] = "expandable_segments:True"

if sys.version_info < (3, 10):
    sys.exit(f"error: this is Python {platform.python_version()}; 3.10 or later is needed")
NEEDED = "torch", "numpy", "sentencepiece", "requests", "tqdm"
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name)]
if MISSING:
    sys.exit(
        f"error: {sys.executable} has no {' and no '.join(MISSING)}: activate the environment "
        "(. .venv/bin/activate), or pip install -r requirements.txt"
    )


def try_lock(fd):
    """
    Lock an open file until it is closed or the process ends. Returns False if another process holds
    the lock. Raises OSError where the system or the file system has no locks.
    """
    if fcntl is None:
        raise OSError("no locks on this system")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


# ----------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """
    Open `path` for writing so that it always holds either the old or the complete new content.

    The data goes to a temporary file in the same folder, which is flushed to the disk and renamed.
    The temporary file is removed if anything fails; if this process is killed, the next write of
    `path` removes it. Its name is random, so that no existing link is followed and two processes
    never share it. If `path` is a symbolic link, the new file replaces the link. Raises OSError
    that names `path`.
    """
    path = os.path.abspath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a folder, /dev/null
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
                f.close()  # Windows cannot rename an open file
            os.replace(f.name, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(f.name)
        name_file(e, path, f.name)
        raise


def name_file(e, path, temporary):
    """Replaces the name of `temporary`, or of a file in it, by `path` in an OSError."""
    if not isinstance(e, OSError) or not str(e.filename or temporary).startswith(temporary):
        return
    if e.errno is None:  # as NumPy's tofile raises it
        full = f"cannot be written, perhaps because the disk is full ({e})"
        raise OSError(f"{path}: {full}") from None
    e.filename = path


def open_temporary(path, mode):
    """Create the file .NAME.*.tmp in the folder of `path`; it is locked while it is open."""
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
        if os.path.exists(temporary):  # remove_temporaries may have come before the lock
            return f
        f.close()


def remove_temporaries(folder, name="*"):
    """
    Remove the temporary files of killed processes from a folder: those of write_atomic that belong
    to this user and that no process has locked.
    """
    pattern = f".{name if name == '*' else glob.escape(name)}.*.tmp"
    for path in glob.glob(os.path.join(glob.escape(folder), pattern)) if fcntl else ():
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                own = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
                if own and try_lock(fd):
                    os.remove(path)
            finally:
                os.close(fd)


LOCK = "run.lock"


@contextlib.contextmanager
def lock_folder(folder):
    """
    Keep other runs from writing to a folder until the block or the process ends. Raises ValueError,
    which names the other process, if another run holds the folder.
    """
    path, locked = os.path.join(folder, LOCK), False
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        try:
            locked = try_lock(fd)
        except OSError as e:
            print(f"note: {folder} is not locked: {e}", file=sys.stderr)
        else:
            if not locked:
                owner = " ".join(os.read(fd, 200).decode(errors="replace").split())
                raise ValueError(
                    f"another run writes to {folder}{owner and f' ({owner})'}: wait until it ends, "
                    "or choose another --out_dir"
                )
            with contextlib.suppress(OSError):  # the disk may be full
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        if locked:
            os.ftruncate(fd, 0)
        os.close(fd)


def remove_unused(folder):
    """Remove a folder that has nothing but the lock file of lock_folder."""
    with contextlib.suppress(OSError):
        if not set(os.listdir(folder)) - {LOCK}:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, LOCK))
            os.rmdir(folder)


# ----------------------------------------------------------------------------
# Output


class Unbreakable:
    """
    A stream that survives a closed pipe (train.py | head): later output is discarded, and the run
    continues.
    """

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
    """Make sys.stdout and sys.stderr Unbreakable; either may be None."""
    out, err = (stream and Unbreakable(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


# ----------------------------------------------------------------------------
# Flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description and shows every default that is not empty."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def flag(default, help, choices=None, also=()):
    """
    A dataclass field that add_flags turns into a command-line flag; `also` lists its aliases.

        @dataclass
        class Flags:
            "output"                       # title of the group in --help
            out_dir: str = flag("out", "folder for checkpoints and logs")
    """
    metadata = {"help": help, "choices": choices, "also": also}
    return dataclasses.field(default=default, metadata=metadata)


def flag_names(kind):
    """Names of the fields of a dataclass that are flags."""
    return [f.name for f in dataclasses.fields(kind) if "help" in f.metadata]


def add_flags(parser, kind):
    """Add the flags of a dataclass to a parser as one group; flags that it has are skipped."""
    group = parser.add_argument_group(kind.__doc__.partition("\n")[0])
    known = {a.dest for a in parser._actions}
    for f in dataclasses.fields(kind):
        if f.name in flag_names(kind) and f.name not in known:
            options = {"type": type(f.default), "choices": f.metadata["choices"]}
            if f.default is None or isinstance(f.default, bool):
                options = {"type": boolean, "nargs": "?", "const": True}
            words = [f"--{name}" for name in (f.name, *f.metadata["also"])]
            group.add_argument(
                *words, default=f.default, help=f.metadata["help"].replace("%", "%%"), **options
            )


def flags_of_others(mine, commands):
    """
    The flags that only commands other than `mine` have, as {name: reason}. `commands` maps each
    command to the names of its flags.

        flags_of_others("b", {"a": ["x", "y"], "b": ["y"]})      # {"x": "is a flag of a"}
    """
    owners = {}
    for command, names in commands.items():
        for name in names:
            owners.setdefault(name, []).append(command)
    reasons = {}
    for name, others in owners.items():
        if mine not in others:
            *first, last = others
            listed = f"{', '.join(first)} and {last}" if first else last
            reasons[name] = f"is a flag of {listed}"
    return reasons


# Names of flags in other projects, and of the flags here that the error message then suggests.
SYNONYMS = {
    "beta": ("init_kl_coef", "dpo_beta"),
    "kl_coef": ("init_kl_coef",),
    "lr": ("learning_rate",),
    "prompt": ("start",),
    "epochs": ("ppo_epochs", "max_iters"),
    "num_generations": ("group_size",),
    "max_completion_length": ("max_gen_len",),
    "per_device_train_batch_size": ("batch_size",),
}


def parse_args(parser, argv=None, unused=None):
    """
    parser.parse_args without abbreviations, with defaults in --help, and with one-line errors (exit
    status 2) that suggest the closest flag. `args.given` lists the names of the flags that are on
    the command line.

    unused(args) returns the flags that have no effect in combination with the others, as {name:
    reason}. --help hides them. On the command line such a flag is an error that states the reason,
    unless the reason is None.
    """

    def error(message):
        if "arguments are required" in message and positionals and positionals[0].choices:
            message += f", one of {', '.join(positionals[0].choices)}"
        message = message.replace("(choose from '', ", "(choose from ")
        parser.exit(2, f"error: {message} (see {parser.prog} --help)\n")

    parser.allow_abbrev, parser.formatter_class, parser.error = False, HelpFormatter, error
    words = sys.argv[1:] if argv is None else list(argv)
    help_wanted = {"-h", "--help"} & set(words)
    words = [w for w in words if w not in ("-h", "--help")]
    positionals = [a for a in parser._actions if not a.option_strings and a.nargs is None]
    required = [a for a in parser._actions if a.option_strings and a.required]
    if help_wanted:  # --help alone is valid
        for action in positionals:
            action.nargs = "?"
        for action in required:
            action.required = False
    args, unknown = parser.parse_known_args(words)
    hidden = unused(args) if unused else {}
    if help_wanted:
        for action in positionals:
            action.nargs = None
        for action in required:
            action.required = True
        for action in parser._actions:
            action.help = argparse.SUPPRESS if action.dest in hidden else action.help
        parser.print_help()
        parser.exit()
    if unknown:
        word = unknown[0].partition("=")[0]
        known = {
            o.lstrip("-"): o
            for a in parser._actions
            for o in a.option_strings
            if a.dest not in hidden
        }
        name = word.lstrip("-").replace("-", "_")
        near = [n for n in SYNONYMS.get(name, ()) if n in known]
        near = near or difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {known[near[0]]}?" if near else ""
        if not word.startswith("-"):
            hint = ": a value follows the name of its flag, --name=value"
        parser.error(f"unknown argument {word}{hint}")
    actions = {o: a for a in parser._actions for o in a.option_strings}
    options = (word.partition("=")[0] for word in words)
    args.given = list(dict.fromkeys(actions[o].dest for o in options if o in actions))
    for name in args.given:
        if hidden.get(name):
            parser.error(f"--{name} {hidden[name]}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name}: expected a finite number, not {value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            parser.error(f"--{name}: {value} is too large")
    return args


def positive(text):
    """argparse type of a flag that must be a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, not {text!r}")
    return int(text)


def boolean(text):
    """
    argparse type of a flag that may be written --x, --x=True or --x=False:
    parser.add_argument("--x", type=boolean, nargs="?", const=True, default=False)
    """
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
        text.lower()
    )
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return value


# ----------------------------------------------------------------------------
# Errors and JSON


def run_main(main):
    """
    Run the command `main` and exit; `main` may return an exit status. Errors that a user can cause
    (OSError, ValueError) print one line and exit with status 1, Ctrl-C exits with 130. Every other
    exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that the terminal lacks become "?"
        if getattr(stream, "errors", "") == "strict":
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output (head, less) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError) as e:
        named = isinstance(e, OSError) and e.strerror and e.filename
        message = f"{e.filename}: {e.strerror}" if named else str(e)
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(1)


class Refused(Exception):
    """An answer to a request that is not served; `status` is that of HTTP, `param` the field that
    the message is about."""

    def __init__(self, status, message, code=None, param=None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def note(message):
    """Print a line on stderr, in the process of rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr)


def printable(text):
    """
    Text without the control characters that could move a terminal's cursor: DEL, C1, and C0 except
    newline and tab. run.c removes the same characters.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def read_json(path):
    """The object in a JSON file, or {} if the file does not exist. Raises ValueError otherwise."""
    try:
        with open(path, "rb") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{path} is not JSON, or is cut short: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


class Stopwatch:
    """Seconds from one lap to the next, and in total."""

    def __init__(self, total):
        self.total, self.seconds = total, {}
        self.start = self.last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
        self.seconds[self.total] = now - self.start
