"""What all commands share, from the standard library alone: files that are never half-written, one run
per folder at a time, output whose reader may leave, flags, errors, and a hint where a package is not
installed. Every command imports this module first."""

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

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

NEEDED = "torch", "numpy", "sentencepiece", "requests", "tqdm"
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name)]
if MISSING:
    sys.exit(
        f"error: {sys.executable} has no {' and no '.join(MISSING)}: activate the environment "
        "(. .venv/bin/activate), or pip install -r requirements.txt"
    )


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
                raise ValueError(
                    f"another run writes to {folder}{who and f' ({who})'}: wait for its end, "
                    "or choose another --out_dir"
                )
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


# ----------------------------------------------------------------------------
# flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description; shows every default that is worth showing."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def flag(default, help, choices=None, also=()):
    """
    A field of a dataclass that add_flags makes a flag of (`also` are other names of it):

        @dataclass
        class Flags:
            "output"                       # the title in --help
            out_dir: str = flag("out", "folder for checkpoints and logs")
    """
    metadata = {"help": help, "choices": choices, "also": also}
    return dataclasses.field(default=default, metadata=metadata)


def flag_names(kind):
    """The fields of a dataclass that are flags."""
    return [f.name for f in dataclasses.fields(kind) if "help" in f.metadata]


def add_flags(parser, kind):
    """Add the flags of a dataclass to a parser, as one group, unless it has them already."""
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
    The flags that the command `mine` has not, of {command: names of its flags}, as {name: why}:

        flags_of_others("b", {"a": ["x", "y"], "b": ["y"]})      # {"x": "is a flag of a"}
    """
    owners = {}
    for command, names in commands.items():
        for name in names:
            owners.setdefault(name, []).append(command)
    return {
        name: f"is a flag of {' and '.join([', '.join(o[:-1]), o[-1]][len(o) < 2 :])}"
        for name, o in owners.items()
        if mine not in o
    }


def parse_args(parser, argv=None, unused=None):
    """
    parser.parse_args, kinder: no abbreviations, defaults in --help, and a mistake ends in one
    line (exit status 2) that names the flag which was probably meant. `args.given` holds the
    names of the flags on the command line.

    unused(args) returns the flags that have no effect beside the others, as {name: why}. --help
    does not show them; on the command line they are an error that says why, if `why` is not None.
    """

    def error(message):
        parser.exit(2, f"error: {message} (see {parser.prog} --help)\n")

    parser.allow_abbrev, parser.formatter_class, parser.error = False, HelpFormatter, error
    words = sys.argv[1:] if argv is None else list(argv)
    help_wanted = {"-h", "--help"} & set(words)
    words = [w for w in words if w not in ("-h", "--help")]
    positionals = [a for a in parser._actions if not a.option_strings and a.nargs is None]
    if help_wanted:
        for action in positionals:
            action.nargs = "?"  # a command is not needed to ask for help
    args, unknown = parser.parse_known_args(words)
    hidden = unused(args) if unused else {}
    if help_wanted:
        for action in positionals:
            action.nargs = None
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
        near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), known, n=1)
        hint = f", did you mean {known[near[0]]}?" if near else ""
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
    return args


def boolean(text):
    """
    The type of a flag that may be --x, --x=True or --x=False:
    parser.add_argument("--x", type=boolean, nargs="?", const=True, default=False)
    """
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
        text.lower()
    )
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return value


# ----------------------------------------------------------------------------
# errors and JSON


def run_main(main):
    """
    Run a command: what a user can get wrong (OSError, ValueError) ends in one line and exit
    status 1, Ctrl-C in 130; `main` may return an exit status. Anything else is a bug of ours
    and keeps its traceback.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError) as e:
        known = isinstance(e, OSError) and e.strerror and e.filename
        message = f"{e.filename}: {e.strerror}" if known else str(e)
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(1)


def note(message):
    """Print a line on stderr, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr)


def printable(text):
    """Generated text without control characters (C0 but newline and tab, DEL, C1), which could move
    a terminal's cursor or do worse; run.c leaves them out too."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def read_json(path):
    """The object in a JSON file; {} if there is no such file. ValueError if it holds no object."""
    try:
        with open(path, "rb") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError as e:  # also where it is not UTF-8
        raise ValueError(f"{path} is not JSON, or is cut short: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value
