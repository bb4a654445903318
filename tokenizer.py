"""
The tokenizer: SentencePiece for Python, and its export for C. Below it, the few helpers
that every command of the project shares: flags, errors, and files that are never half-written.

    python tokenizer.py --tokenizer-model=data/tok512.model    # writes data/tok512.bin
"""

import argparse
import contextlib
import difflib
import os
import struct
import sys

from sentencepiece import SentencePieceProcessor

# -----------------------------------------------------------------------------
# Tokenizer

class Tokenizer:
    """
    Text to token ids and back.

        t = Tokenizer("data/tok512.model")
        t.encode("Once upon a time", bos=True, eos=False)  # [1, 403, 407, 261, 378]
        t.decode([1, 403, 407, 261, 378])                  # "Once upon a time"

    `n_words` is the size of the vocabulary; `bos_id`, `eos_id`, `pad_id` are its special ids
    (-1: there is none). A missing file raises OSError, a corrupt one ValueError.
    """

    def __init__(self, model_path):
        self.model_path = str(model_path)
        with open(self.model_path, "rb") as f:
            proto = f.read()
        self.sp = SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(proto)
        except RuntimeError:
            raise ValueError(f"{self.model_path} is not a SentencePiece model, or is cut short")
        self.n_words = self.sp.vocab_size()
        self.bos_id = self.sp.bos_id()
        self.eos_id = self.sp.eos_id()
        self.pad_id = self.sp.pad_id()

    def encode(self, s, bos, eos):
        """The ids of one string; or of a list of strings, as a list of lists, which is faster."""
        try:
            return self.sp.encode(s, add_bos=bos, add_eos=eos)
        except RuntimeError:  # SentencePiece's own message says nothing to a person
            raise ValueError("only text that UTF-8 can write can be encoded")

    def decode(self, ids):
        """The text of a sequence of ids; BOS and EOS are silent."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(f"token {i} is outside the vocabulary of {self.model_path} "
                                 f"({self.n_words}): is it another model's tokenizer?")
        return self.sp.decode(ids)

    def export(self, path):
        """
        Write llama2.c's tok.bin: uint32 max_token_length, then for each token float32 score,
        uint32 length, bytes; little-endian. Pieces for raw bytes keep SentencePiece's spelling
        (<0x0A>): the reader in C unescapes them.
        """
        pieces = [self.sp.id_to_piece(i) for i in range(self.n_words)]
        if self.bos_id >= 0:
            pieces[self.bos_id] = "\n<s>\n"  # the newlines keep text from ever matching these two
        if self.eos_id >= 0:
            pieces[self.eos_id] = "\n</s>\n"
        pieces = [p.replace("\u2581", " ").encode() for p in pieces]  # ▁ is how a space is spelt
        with write_atomic(path) as f:
            f.write(struct.pack("<I", max(map(len, pieces))))
            for i, piece in enumerate(pieces):
                f.write(struct.pack("<fI", self.sp.get_score(i), len(piece)) + piece)

def find_tokenizer(vocab_size, *folders):
    """
    Path of the SentencePiece model for `vocab_size`: tok<vocab_size>.model in one of `folders`
    (None is skipped), in data/ or here; for 32000 Meta's tokenizer.model will do as well.
    """
    names = [f"tok{vocab_size}.model"] + ["tokenizer.model"] * (vocab_size == 32000)
    paths = [os.path.join(d, n) for d in (*folders, "data", "") if d is not None for n in names]
    for path in paths:
        if os.path.isfile(path):
            return path
    remedy = "download Llama 2's tokenizer.model" if vocab_size == 32000 else \
             f"make it with: python tinystories.py train_vocab --vocab_size={vocab_size}"
    raise FileNotFoundError(f"no tokenizer with {vocab_size} tokens "
                            f"(looked for {', '.join(dict.fromkeys(paths))}); {remedy}")

# -----------------------------------------------------------------------------
# What the commands share: flags, errors, files

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description; shows every default that is worth showing."""
    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)

def parse_args(parser, argv=None):
    """
    parser.parse_args, kinder: no abbreviations, defaults in --help, and a mistake ends in one
    line (exit status 2) that names the flag which was probably meant.
    """
    def error(message):
        parser.exit(2, f"error: {message} (see {parser.prog} --help)\n")
    parser.allow_abbrev, parser.formatter_class, parser.error = False, HelpFormatter, error
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = {o.lstrip("-"): o for a in parser._actions for o in a.option_strings}
        near = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), known, n=1, cutoff=0.5)
        hint = f", did you mean {known[near[0]]}?" if near else ""
        parser.error(f"unknown argument {flag}{hint}")
    return args

def boolean(text):
    """
    The type of a flag that may be --x, --x=True or --x=False:
    parser.add_argument("--x", type=boolean, nargs="?", const=True, default=False)
    """
    value = {"true": True, "1": True, "yes": True,
             "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return value

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

@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """
    Open `path` for writing so that it is the old file or the whole new one, never a part:
    a temporary file beside it, flushed to the disk, then renamed; removed if anything fails.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = path + ".tmp"  # always the same, so that a run that was killed leaves only one
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(e, OSError) and e.filename in (None, temporary):
            e.filename = path  # a full disk names no file; and nobody knows the temporary one
        raise

# -----------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-t", "--tokenizer-model", "--tokenizer_model", default="tokenizer.model",
                        help="SentencePiece model; the .bin is written beside it")
    args = parse_args(parser, argv)
    tokenizer = Tokenizer(args.tokenizer_model)
    path = os.path.splitext(args.tokenizer_model)[0] + ".bin"
    if path == args.tokenizer_model:
        raise ValueError(f"{path} would overwrite itself: rename it to end in .model")
    tokenizer.export(path)
    print(f"wrote {path} ({tokenizer.n_words} tokens, {os.path.getsize(path):,} bytes)")

if __name__ == "__main__":
    run_main(main)
