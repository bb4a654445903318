"""
The tokenizer: SentencePiece, or the byte-level BPE of a tokenizer.json, for Python, and its
export for C.

    python tokenizer.py --tokenizer-model=data/tok512.model    # writes data/tok512.bin
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import zlib

# First, because it reports missing packages:
from common import note, parse_args, read_json, run_main, write_atomic

# isort: split
from sentencepiece import SentencePieceProcessor

# -----------------------------------------------------------------------------
# Tokenizer

BOS_ID, EOS_ID = 1, 2  # of llama2.c's tokenizers


def stop_ids(tokenizer, template=None, end_ids=()):
    """The set of ids at which generated text ends, defined here for all commands: EOS and BOS of the
    tokenizer (llama2.c's where there is none), because the next text would begin with BOS; with a
    chat `template` also the token that ends a reply; and those that the checkpoint names, `end_ids`.
    """
    ids = (BOS_ID, EOS_ID) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    ends = () if template is None else (template.end(tokenizer),)
    return {i for i in (*ids, *ends, *(end_ids or ())) if i >= 0}


class Tokenizer:
    """
    Text to token ids and back.

        t = Tokenizer("data/tok512.model")
        t.encode("Once upon a time", bos=True, eos=False)  # [1, 403, 407, 261, 378]
        t.decode([1, 403, 407, 261, 378])                  # "Once upon a time"

    A SentencePiece model or, by its name, a tokenizer.json of Llama 3's kind, for which it needs
    the tokenizers library. `n_words` is the size of the vocabulary; `bos_id`, `eos_id`, `pad_id`
    are its special ids (-1: there is none); `special` are the other control tokens, of a
    tokenizer.json all of them, {text: id}. They are never found in text that is encoded, and they
    are silent when decoded.
    A missing file raises OSError, a corrupt one ValueError.
    """

    def __init__(self, model_path):
        self.model_path = str(model_path)
        with open(self.model_path, "rb") as f:
            self.data = data = f.read()
        self.special, self.sp, self.bpe, self.config = {}, None, None, {}
        if self.model_path.endswith(".json"):
            self._open_json(data)
            return
        self.sp = SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(data)
        except RuntimeError:
            raise ValueError(f"{self.model_path} is not a SentencePiece model, or is cut short")
        self.n_words = self.sp.vocab_size()
        self.bos_id = self.sp.bos_id()
        self.eos_id = self.sp.eos_id()
        self.pad_id = self.sp.pad_id()
        control = [i for i in range(self.n_words) if self.sp.is_control(i)]
        self.special = {
            self.sp.id_to_piece(i): i for i in control if i not in (self.bos_id, self.eos_id)
        }

    def _open_json(self, data):
        """
        A tokenizer.json. It does not say which of its tokens are BOS and EOS: that is in the
        tokenizer_config.json beside it; without one they are known by their usual names.
        """
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{self.model_path} needs the tokenizers library: pip install tokenizers"
            )
        try:
            self.json = json.loads(data)
            added = self.json.get("added_tokens") or []
            for token in added:
                token["special"] = True
            plain = {**self.json, "truncation": None, "padding": None}
            self.bpe = tokenizers.Tokenizer.from_str(json.dumps(plain))
            self.special = {t["content"]: self.bpe.token_to_id(t["content"]) for t in added}
        except Exception as e:  # the library raises nothing more special
            raise ValueError(f"{self.model_path} is not a tokenizer.json, or is cut short ({e})")
        self.bpe.encode_special_tokens = True  # as ordinary text, that is
        self.n_words = max(self.bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = read_json(os.path.join(os.path.dirname(self.model_path), "tokenizer_config.json"))
        self.config = named

        def find(key, *usual):
            given = named.get(key)
            given = given.get("content") if isinstance(given, dict) else given
            names = [given] if isinstance(given, str) else usual
            return next((self.special[name] for name in names if name in self.special), -1)

        self.bos_id = find("bos_token", "<|begin_of_text|>", "<s>", "<|endoftext|>")
        self.eos_id = find("eos_token", "<|end_of_text|>", "</s>", "<|endoftext|>")
        self.pad_id = find("pad_token")

    @property
    def adds_bos(self):
        """Whether the post-processor of a tokenizer.json puts BOS before text."""
        first = self.bpe.encode("a", add_special_tokens=True).ids[:1] if self.bpe else []
        return self.bos_id >= 0 and first == [self.bos_id]

    def special_id(self, text):
        """The id of a control token of a tokenizer.json by its spelling, such as <|eot_id|>."""
        if text not in self.special:
            raise ValueError(f"{self.model_path} has no special token {text}")
        return self.special[text]

    def encode(self, s, bos, eos):
        """The ids of one string; or of a list of strings, as a list of lists, which is faster."""
        try:
            if self.sp:
                return self.sp.encode(s, add_bos=bos, add_eos=eos)
            texts = [s] if isinstance(s, str) else s
            for text in texts:
                text.encode()  # the library would not name the mistake
        except (RuntimeError, UnicodeEncodeError):  # their own messages say nothing to a person
            raise ValueError("only text that UTF-8 can write can be encoded")
        head = [self.bos_id] if bos and self.bos_id >= 0 else []
        tail = [self.eos_id] if eos and self.eos_id >= 0 else []
        ids = [head + e.ids + tail for e in self.bpe.encode_batch(texts, add_special_tokens=False)]
        return ids[0] if isinstance(s, str) else ids

    def decode(self, ids):
        """The text of a sequence of ids; BOS and EOS are silent."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(
                    f"token {i} is outside the vocabulary of {self.model_path} "
                    f"({self.n_words}): is it another model's tokenizer?"
                )
        return self.sp.decode(ids) if self.sp else self.bpe.decode(ids)

    @functools.cached_property
    def hash(self):
        """
        64 hexadecimal digits that identify the tokenizer: a SHA-256 of everything that decides ids
        and text. A vocabulary that was saved again has the same hash; a vocabulary that was trained
        again has another one. The last 8 digits are, for a SentencePiece model, the CRC-32 of
        llama2.c's tok.bin, by which run.c checks the file of its option -z; else 0.
        """
        identity = sentencepiece_identity(self.data) if self.sp else json_identity(self.json)
        identity += [self.bos_id, self.eos_id]
        text = json.dumps(identity, sort_keys=True, ensure_ascii=True)
        crc = zlib.crc32(self.for_llama2c()) if self.sp else 0
        return f"{hashlib.sha256(text.encode()).hexdigest()[:56]}{crc:08x}"

    def export(self, path):
        """Write llama2.c's tok.bin. ValueError for a tokenizer.json."""
        data = self.for_llama2c()
        with write_atomic(path) as f:
            f.write(data)

    def for_llama2c(self):
        """
        The bytes of llama2.c's tok.bin: uint32 max_token_length, then for each token float32 score,
        uint32 length, bytes; little-endian. Pieces for raw bytes keep SentencePiece's spelling
        (<0x0A>): the reader in C unescapes them. Not for a tokenizer.json, which export.py puts
        into the model file: ValueError.
        """
        if not self.sp:
            raise ValueError(
                f"{self.model_path} is no SentencePiece model: llama2.c cannot read it"
            )
        pieces = [self.sp.id_to_piece(i) for i in range(self.n_words)]
        if self.bos_id >= 0:
            pieces[self.bos_id] = "\n<s>\n"  # the newlines keep text from ever matching these two
        if self.eos_id >= 0:
            pieces[self.eos_id] = "\n</s>\n"
        control = set(self.special.values())  # never found in text: -inf
        pieces = [p.replace("\u2581", " ").encode() for p in pieces]  # ▁ is how a space is spelt
        scores = [-math.inf if i in control else self.sp.get_score(i) for i in range(len(pieces))]
        return struct.pack("<I", max(map(len, pieces))) + b"".join(
            struct.pack("<fI", score, len(piece)) + piece for score, piece in zip(scores, pieces)
        )


# -----------------------------------------------------------------------------
# What identifies a tokenizer


def protobuf_fields(data):
    """Yield (field number, value) of a protobuf message; value is an int, or the field's bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, data[at : at + size]
        at += size


def sentencepiece_identity(data):
    """
    What of a SentencePiece model decides ids and text: pieces, scores and types, the kind of
    model, the normalizer. The names and the statistics of its training do not.
    """
    NORMAL, UNIGRAM = 1, 1
    pieces, trainer, normalizer = [], {}, {}
    for field, value in protobuf_fields(data):
        if field == 1:
            piece = dict(protobuf_fields(value))  # 1 the text, 2 the score, 3 the type
            pieces.append(
                [piece.get(1, b"").hex(), piece.get(2, bytes(4)).hex(), piece.get(3, NORMAL)]
            )
        elif field == 2:
            trainer |= dict(protobuf_fields(value))
        elif field == 3:
            normalizer |= dict(protobuf_fields(value))
    return [
        "sentencepiece",
        pieces,
        trainer.get(3, UNIGRAM),  # model_type
        trainer.get(24, 0),  # treat_whitespace_as_suffix
        trainer.get(44, " \u2047 ".encode()).hex(),  # unk_surface
        hashlib.sha256(normalizer.get(2, b"")).hexdigest(),  # precompiled_charsmap
        *(normalizer.get(i, 1) for i in (3, 4, 5)),
    ]  # dummy prefix, spaces


def json_identity(config):
    """What of a tokenizer.json decides ids and text, in one spelling of the library's several."""
    model = {k: v for k, v in config["model"].items() if v is not None and v is not False}
    model["type"] = model.get("type", "BPE")
    if "merges" in model:
        model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return [plain(v) for v in value] if isinstance(value, list) else value

    parts = [plain(config.get(k)) for k in ("normalizer", "pre_tokenizer", "decoder")]
    added = sorted(config.get("added_tokens") or [], key=lambda token: token["id"])
    return ["json", model, *parts, plain(added)]


# -----------------------------------------------------------------------------
# Byte-level BPE for C. run.c has no Unicode tables and no regular expressions: it gets the classes
# of characters that the splitting needs, and knows two patterns.

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet():
    """GPT-2's spelling of bytes as printable characters, {character: byte}: a space is Ġ."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


@functools.cache
def character_classes(digits):
    """
    [(first, last, class)] of Unicode code points, ascending: 1 letter, 2 number, 3 white space.
    Asked of the library's own engine, since versions of Unicode differ. With `digits`, numbers
    are what its Digits step takes for one, which is what they are split by there.
    """
    from tokenizers import Regex, pre_tokenizers

    points = [c for c in range(0x40000) if not 0xD800 <= c < 0xE000]  # beyond there are none
    text, ranges = "".join(map(chr, points)), []
    for kind, pattern in ((1, r"\p{L}+"), (2, r"\p{N}+"), (3, r"\s+")):
        split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
        pieces = [(points[a], points[b - 1]) for _, (a, b) in split.pre_tokenize_str(text)]
        if digits and kind == 2:  # a digit between two others is a piece of its own
            pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(
                "".join(f"\0{c}" for c in text)
            )
            pieces = [(ord(c), ord(c)) for c, _ in pieces if len(c) == 1 and c != "\0"]
        ranges += [(a, b, kind) for a, b in pieces]
    return sorted(ranges)


def byte_level_blob(tokenizer):
    """
    The tokenizer of a tokenizer.json for version 3 of model.bin; run.c has it byte by byte.
    ValueError, naming it, for whatever run.c does not do.
    """
    config, path = tokenizer.json, tokenizer.model_path

    def refuse(what):
        raise ValueError(f"{path}: run.c does not know {what}")

    model, decoder = config["model"], config.get("decoder") or {}
    if model.get("type", "BPE") != "BPE" or decoder.get("type") != "ByteLevel":
        refuse(
            f"this kind of tokenizer ({model.get('type')}, decoder {decoder.get('type')}): "
            "only byte-level BPE"
        )
    if config.get("normalizer"):
        refuse(f"the normalizer {config['normalizer'].get('type')}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            refuse(f"{name}={model[name]!r}")
    pre = config.get("pre_tokenizer") or {}
    pattern, digits, prefix = 2, False, False
    for step in pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]:
        kind = step.get("type")
        if kind == "Digits" and step.get("individual_digits") and pattern == 2:
            digits = True
        elif kind == "ByteLevel":
            if step.get("use_regex", True):
                pattern = 0 if pattern == 2 else refuse("two patterns")
            prefix = step.get("add_prefix_space", True)
        elif (
            kind == "Split"
            and step.get("pattern") in ({"Regex": LLAMA3_PATTERN}, {"Regex": GPT2_PATTERN})
            and step.get("behavior") == "Isolated"
            and not step.get("invert")
            and pattern == 2
        ):
            pattern = int(step["pattern"]["Regex"] == LLAMA3_PATTERN)
        else:
            refuse(f"the pre-tokenizer {kind} {step.get('pattern', '')}")
    if (digits and pattern == 1) or (prefix and digits):
        refuse("this combination of pre-tokenizers")
    alphabet, vocab = byte_alphabet(), model["vocab"]
    pieces = [(b"", 0)] * tokenizer.n_words
    for text, i in vocab.items():
        if text not in tokenizer.special:
            try:
                pieces[i] = bytes(alphabet[c] for c in text), 0
            except KeyError:
                refuse(f"the token {text!r}, which is not spelt in bytes")
    for text, i in tokenizer.special.items():
        pieces[i] = text.encode(), 1
    ranges = character_classes(digits)
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    flags = bool(model.get("ignore_merges")) | digits << 1 | prefix << 2
    return b"".join(
        [
            struct.pack("<I", len(ranges)),
            *(struct.pack("<3I", *r) for r in ranges),
            struct.pack("<3I", pattern, flags, len(merges)),
            *(struct.pack("<3I", vocab[a], vocab[b], vocab[a + b]) for a, b in merges),
            *(struct.pack("<I", len(b) << 1 | special) + b for b, special in pieces),
        ]
    )


# -----------------------------------------------------------------------------
# Chat templates of Hugging Face's are programs (Jinja) of strangers: a process runs them that has
# little time and memory.

RENDER_SECONDS, RENDER_BYTES, RENDER_CHARACTERS = 5, 1 << 30, 1 << 20


def render_chats(source, chats):
    """
    What a chat template writes for each of `chats`, the variables it can use: pairs (text, error),
    one of which is "". ValueError if the template as a whole fails or exceeds the limits.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("this needs the jinja2 library: pip install jinja2")
    folder = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path.insert(0, {folder!r}); import tokenizer; tokenizer.render_child()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps([source, chats]),
            capture_output=True,
            text=True,
            timeout=2 * RENDER_SECONDS,
        )
        written, error = json.loads(done.stdout) if done.returncode == 0 else (None, None)
    except subprocess.TimeoutExpired:
        done, error = None, None
    if error:
        raise ValueError(error)
    if done and done.returncode == 1:
        raise ValueError(done.stderr.strip().split("\n")[-1])
    if done is None or done.returncode:
        raise ValueError(f"it needs more than {RENDER_SECONDS} seconds or {RENDER_BYTES >> 20} MB")
    return written


def render_child():
    """The process of render_chats: as transformers runs chat templates, and in a sandbox."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (RENDER_BYTES, RENDER_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (RENDER_SECONDS, RENDER_SECONDS))
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what transformers trains: the text stays."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message):
        raise ValueError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = refuse
    source, chats = json.load(sys.stdin)

    def reason(e):  # a stranger's program fails as it likes
        if isinstance(e, MemoryError):
            return f"it needs more than {RENDER_BYTES >> 20} MB"
        return " ".join(str(e).split())[:200] or type(e).__name__

    written, error = [], ""
    try:
        program = env.from_string(source)
    except Exception as e:
        chats, error = [], reason(e)
    for chat in chats:
        try:
            text = program.render(**chat)
            if len(text) > RENDER_CHARACTERS:
                raise ValueError(f"it writes more than {RENDER_CHARACTERS:,} characters")
            written.append((text, ""))
        except Exception as e:
            written.append(("", reason(e)))
    json.dump([written, error], sys.stdout)


# -----------------------------------------------------------------------------
# Where tokenizers are


def find_tokenizer(vocab_size, *folders, wanted="", owner=""):
    """
    Path of a tokenizer in one of `folders` (None is skipped), in data/ or here.

    wanted  its hash: the search is for a file with this hash. Without it, the search is for the
            first folder with a tok<vocab_size>.model, tokenizer.model or tokenizer.json of this size
    owner   what was made with the tokenizer, for the messages; "": nothing was yet

    Raises FileNotFoundError where there is none, ValueError where there are only others than the
    wanted one, or where the tokenizers of a folder disagree.
    """
    folders = list(dict.fromkeys(d for d in (*folders, "data", "") if d is not None))
    others = []
    for folder in folders:
        found = tokenizers_in(folder, vocab_size)
        if not wanted:
            for other in found[1:]:
                if disagree(found[0], other):
                    raise ValueError(
                        f"{found[0]} and {other} disagree: name one of them with "
                        "--tokenizer, or move the other one away"
                    )
            if found:
                return found[0]
            continue
        for path in dict.fromkeys(found + all_tokenizers_in(folder)):
            try:
                tokenizer = Tokenizer(path)
            except (OSError, ValueError):
                continue
            if tokenizer.hash == wanted:
                return path
            if tokenizer.n_words == vocab_size:
                others.append(path)
    if others:
        raise ValueError(mismatch(others[0], owner, wanted))
    places = ", ".join(os.path.join(d, name) for d in folders for name in names_of(vocab_size))
    train = f"python tinystories.py train_vocab --vocab_size={vocab_size}"
    if owner:  # a new vocabulary would have other words
        remedy = f"copy the one that {owner} was made with beside it, or name it with --tokenizer"
    elif vocab_size == 32000:
        remedy = "download Llama 2's tokenizer.model"
    else:
        remedy = f"make it with: {train} (for a model that exists, copy the model's own instead)"
    raise FileNotFoundError(
        f"no tokenizer with {vocab_size} tokens (looked for {places}); {remedy}"
    )


def names_of(vocab_size):
    return f"tok{vocab_size}.model", "tokenizer.model", "tokenizer.json"


def tokenizers_in(folder, vocab_size):
    """Paths of the tokenizers of this size in a folder, under their usual names."""
    certain = [f"tok{vocab_size}.model"] + ["tokenizer.model"] * (vocab_size == 32000)
    paths = [(name, os.path.join(folder, name)) for name in names_of(vocab_size)]
    return [
        path
        for name, path in paths
        if os.path.isfile(path) and (name in certain or size_of(path) == vocab_size)
    ]


def all_tokenizers_in(folder):
    """Paths of all tokenizers in a folder, those with a hash in their names included."""
    names = "tok*.model", "tokenizer*.json"
    paths = [p for name in names for p in glob.glob(os.path.join(glob.escape(folder), name))]
    return [path for path in sorted(paths) if not path.endswith("tokenizer_config.json")]


def size_of(path):
    """How many tokens a tokenizer has; 0 if it is damaged, or of a kind without a list."""
    if path.endswith(".json"):
        return max(json_vocabulary(path).values(), default=-1) + 1
    try:
        return Tokenizer(path).n_words
    except ValueError:
        return 0


def json_vocabulary(path):
    """{token: id} of a tokenizer.json; {} if it is damaged, or of a kind without a list."""
    try:
        config = read_json(path)
        added = {token["content"]: int(token["id"]) for token in config.get("added_tokens") or []}
        return {**{token: int(i) for token, i in config["model"]["vocab"].items()}, **added}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def disagree(one, other):
    """
    Whether two tokenizers differ, by their paths. A tokenizer.json agrees with a SentencePiece
    model whose tokens it has; it may have more.
    """
    if one.endswith(".json") == other.endswith(".json"):
        return Tokenizer(one).hash != Tokenizer(other).hash
    model, config = (other, one) if one.endswith(".json") else (one, other)
    sp, vocabulary = Tokenizer(model).sp, json_vocabulary(config)
    return any(vocabulary.get(sp.id_to_piece(i)) != i for i in range(sp.vocab_size()))


def data_folders(data):
    """The folders where the tokenizer of some data may lie; `data` is as in train.py's --data."""
    folders = []
    for item in str(data).split(","):
        path = next((p for p in (item, item.rpartition(":")[0]) if p and os.path.exists(p)), None)
        if path and os.path.isfile(path):  # mystories/task/sft.jsonl
            path = os.path.dirname(os.path.abspath(path))
            folders += [path, os.path.dirname(path)]
        elif path:
            shards = glob.glob(os.path.join(glob.escape(path), "*.bin"))  # mystories/tok512
            folders += [path] + [os.path.dirname(os.path.abspath(path))] * bool(shards)
    return folders


def open_tokenizer(vocab_size, folders, wanted="", given="", owner="", required=True):
    """
    The Tokenizer of a model: the file that `given` names, else the one that find_tokenizer finds,
    with its arguments and errors; None where there is none and none is required. Raises ValueError
    also where the given one is not the wanted one. Where no tokenizer is wanted or given, a line on
    stderr says which one the owner is assumed to have.
    """
    try:
        path = given or find_tokenizer(vocab_size, *folders, wanted=wanted, owner=owner)
    except FileNotFoundError:
        if required:
            raise
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.n_words != vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.n_words} tokens, the model {vocab_size}: "
            "it is not this model's tokenizer"
        )
    if wanted and tokenizer.hash != wanted:
        raise ValueError(mismatch(path, owner, wanted))
    if owner and not wanted and not given:
        note(f"{owner} does not say which tokenizer it was made with: assuming {path}")
    return tokenizer


def own_tokenizer(checkpoint, path, given="", *folders, required=True):
    """
    The Tokenizer of the checkpoint that was read from `path`: the file that `given` names, else
    the one beside the checkpoint, in `folders` or in the data folder of its training.
    """
    folders = [os.path.dirname(os.path.abspath(path)), *folders]
    folders += data_folders((checkpoint.get("config") or {}).get("data", ""))
    wanted, n = checkpoint.get("tokenizer_hash", ""), checkpoint["model_args"]["vocab_size"]
    return open_tokenizer(n, folders, wanted, given, path, required)


def check_same_tokenizer(owner, wanted, other, found):
    """
    Compare the hashes `wanted` and `found` of the tokenizers of two things, named for the messages.
    ValueError where they differ; a line on stderr where the other one's is not known.
    """
    if wanted and found and wanted != found:
        raise ValueError(
            f"{other} was made with another tokenizer ({found[:16]}) than {owner} ({wanted[:16]})"
        )
    if not found:
        note(f"{other} does not say which tokenizer it was made with: assuming that of {owner}")


def mismatch(path, owner, wanted):
    remedy = (
        "run `python tinystories.py pretokenize` again"
        if os.path.isdir(owner)
        else f"copy that one beside {owner}"
    )
    return (
        f"{path} is not the tokenizer of {owner}, whose hash is {wanted[:16]}: {remedy}, or "
        "name the right one with --tokenizer"
    )


def place_of(tokenizer, folder):
    """
    Where copy_tokenizer puts a tokenizer, and the Tokenizer that is there already: None where there
    is none, or a damaged one.
    """
    name = f"tok{tokenizer.n_words}.model" if tokenizer.sp else "tokenizer.json"
    path = os.path.join(folder, name)
    try:
        return path, Tokenizer(path)
    except (OSError, ValueError):
        return path, None


def check_place(tokenizer, folder):
    """ValueError where a folder has another tokenizer under the name that copy_tokenizer uses."""
    path, there = place_of(tokenizer, folder)
    if there and there.hash != tokenizer.hash:
        raise ValueError(
            f"{path} is another tokenizer than {tokenizer.model_path}: choose another "
            "folder for what is made with the latter, or move the former away"
        )


def copy_tokenizer(tokenizer, folder, config=None, replace=False):
    """
    Put a tokenizer into a folder as find_tokenizer looks for it: tok<n_words>.model, or
    tokenizer.json with tokenizer_config.json, which holds `config`. Returns its path, or None if
    it is there already. Another tokenizer that is there under this name gets its hash into its
    name with `replace`; without, it is a ValueError.
    """
    if not replace:
        check_place(tokenizer, folder)
    path, there = place_of(tokenizer, folder)
    if there and there.hash == tokenizer.hash:
        return None
    if there:
        os.replace(path, hashed_name(there))
        note(f"{path} was another tokenizer, which is now {hashed_name(there)}")
    config = config or tokenizer.config
    if tokenizer.bpe and config:
        with write_atomic(os.path.join(folder, "tokenizer_config.json"), "w") as f:
            json.dump(config, f, indent=2, ensure_ascii=False)
            f.write("\n")
    with write_atomic(path) as f:
        f.write(tokenizer.data)
    return path


def hashed_name(tokenizer):
    """The path of a tokenizer with its hash in it: data/tok512.model -> data/tok512.1a2b3c4d.model"""
    stem, ending = os.path.splitext(tokenizer.model_path)
    return f"{stem}.{tokenizer.hash[:8]}{ending}"


# -----------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "-t",
        "--tokenizer-model",
        "--tokenizer_model",
        default="tokenizer.model",
        help="SentencePiece model; the .bin is written beside it",
    )
    args = parse_args(parser, argv)
    tokenizer = Tokenizer(args.tokenizer_model)
    path = os.path.splitext(args.tokenizer_model)[0] + ".bin"
    if path == args.tokenizer_model:
        raise ValueError(f"{path} would overwrite itself: rename it to end in .model")
    tokenizer.export(path)
    print(f"wrote {path} ({tokenizer.n_words} tokens, {os.path.getsize(path):,} bytes)")


if __name__ == "__main__":
    run_main(main)
