"""
The tokenizer: a SentencePiece model or the byte-level BPE of a tokenizer.json, its export for
run.c, and the search for the tokenizer of a model.

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

BOS_ID, EOS_ID = 1, 2  # ids in llama2.c's tokenizers


def stop_ids(tokenizer, template=None, end_ids=()):
    """
    The set of ids at which generation stops, for all commands: EOS and BOS of the tokenizer (BOS
    because the next text would begin with it), with a chat `template` also the token that ends a
    reply, and `end_ids`, the ids in a checkpoint. A tokenizer of None stands for llama2.c's ids.
    """
    ids = (BOS_ID, EOS_ID) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    ends = () if template is None else (template.end(tokenizer),)
    return {i for i in (*ids, *ends, *(end_ids or ())) if i >= 0}


class Tokenizer:
    """
    Converts text to token ids and back.

        t = Tokenizer("data/tok512.model")
        t.encode("Once upon a time", bos=True, eos=False)  # [1, 403, 407, 261, 378]
        t.decode([1, 403, 407, 261, 378])                  # "Once upon a time"

    The file is a SentencePiece model or, if its name ends in .json, a byte-level BPE tokenizer.json
    such as Llama 3's, which needs the tokenizers library.

        n_words                  size of the vocabulary
        bos_id, eos_id, pad_id   special ids, -1 where the tokenizer has none
        special                  {text: id} of the other control tokens; for a tokenizer.json, of
                                 all of them
        ordinary                 texts of those that a tokenizer.json does not call special

    Encoding never turns text into a control token, and decoding omits control tokens. Raises
    OSError for a missing file and ValueError for a corrupt one.
    """

    def __init__(self, model_path):
        self.model_path = str(model_path)
        with open(self.model_path, "rb") as f:
            self.data = data = f.read()
        self.special, self.sp, self.bpe, self.config, self.ordinary = {}, None, None, {}, []
        if self.model_path.endswith(".json"):
            self._open_json(data)
            return
        self.sp = SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(data)
        except RuntimeError:
            raise ValueError(
                f"{self.model_path} is not a SentencePiece model, or is cut short"
            ) from None
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
        Read a tokenizer.json. The file does not identify BOS and EOS: tokenizer_config.json in the
        same folder does; without that file, the usual names of these tokens identify them.
        """
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{self.model_path} needs the tokenizers library: pip install tokenizers"
            ) from None
        try:
            self.json = json.loads(data)
            added = self.json.get("added_tokens") or []
            ordinary = [token["content"] for token in added if token.get("special") is False]
            for token in added:
                token["special"] = True
            plain = {**self.json, "truncation": None, "padding": None}
            check_prefix(self.json["model"])
            self.bpe = tokenizers.Tokenizer.from_str(json.dumps(plain))
            ids = {t["content"]: self.bpe.token_to_id(t["content"]) for t in added}
            self.special = {t: i for t, i in ids.items() if i is not None}  # an empty text has none
            check_post_processor(self.json.get("post_processor") or {})
        except Exception as e:  # the library raises no narrower class
            raise ValueError(
                f"{self.model_path} is not a tokenizer.json, or is cut short ({e})"
            ) from None
        self.bpe.encode_special_tokens = True  # encode their spelling as ordinary text
        self.n_words = max(self.bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        folder = os.path.dirname(self.model_path)
        self.config = read_json(os.path.join(folder, "tokenizer_config.json"))

        def find(key, *usual_names):
            name = self.config.get(key)
            name = name.get("content") if isinstance(name, dict) else name
            names = [name] if isinstance(name, str) else usual_names
            return next((self.special[name] for name in names if name in self.special), -1)

        self.bos_id = find("bos_token", "<|begin_of_text|>", "<s>", "<|endoftext|>")
        self.eos_id = find("eos_token", "<|end_of_text|>", "</s>", "<|endoftext|>")
        self.pad_id = find("pad_token")
        named = -1, self.bos_id, self.eos_id, self.pad_id, find("unk_token")
        self.ordinary = [text for text in ordinary if self.special.get(text, -1) not in named]

    @property
    def adds_bos(self):
        """Whether the post-processor of a tokenizer.json puts BOS in front of the text."""
        first = self.bpe.encode("a", add_special_tokens=True).ids[:1] if self.bpe else []
        return self.bos_id >= 0 and first == [self.bos_id]

    def encode(self, s, bos, eos):
        """
        The ids of a string, or a list of lists of ids for a list of strings, which is faster than
        string by string. `bos` and `eos` add these tokens. Raises ValueError for text with
        surrogates, which UTF-8 cannot represent.
        """
        try:
            if self.sp:
                return self.sp.encode(s, add_bos=bos, add_eos=eos)
            texts = [s] if isinstance(s, str) else s
            for text in texts:
                text.encode()  # raises UnicodeEncodeError; the library's error has no cause
        except (RuntimeError, UnicodeEncodeError):
            raise ValueError(
                "the text has characters that UTF-8 cannot represent: remove them"
            ) from None
        head = [self.bos_id] if bos and self.bos_id >= 0 else []
        tail = [self.eos_id] if eos and self.eos_id >= 0 else []
        ids = [head + e.ids + tail for e in self.bpe.encode_batch(texts, add_special_tokens=False)]
        return ids[0] if isinstance(s, str) else ids

    def decode(self, ids):
        """
        The text of a sequence of ids, without control tokens. Raises ValueError for an id that is
        outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(
                    f"token {i} is outside the vocabulary of {self.model_path} "
                    f"({self.n_words} tokens): is this another model's tokenizer?"
                )
        return self.sp.decode(ids) if self.sp else self.bpe.decode(ids)

    @functools.cached_property
    def control(self):
        """{id: text} of the control tokens; BOS and EOS without a text are <s> and </s>."""
        names = {self.bos_id: "<s>", self.eos_id: "</s>"}
        return names | {i: text for text, i in self.special.items()}

    def token_text(self, i):
        """The text of one token within a text, or the name of a control token."""
        if i in self.control or not 0 <= i < self.n_words:
            return self.control.get(i, f"<{i}>")
        before = self.encode("a", bos=False, eos=False)
        return self.decode([*before, i])[len(self.decode(before)) :]

    @functools.cached_property
    def hash(self):
        """
        64 hexadecimal digits that identify the tokenizer. The first 56 are from a SHA-256 of
        everything that determines ids and text: saving a vocabulary again keeps the hash, training
        it again changes the hash. For a SentencePiece model, the last 8 are the CRC-32 of
        llama2.c's tok.bin, with which run.c checks the file of its option -z; for a tokenizer.json
        they are 0.
        """
        identity = sentencepiece_identity(self.data) if self.sp else json_identity(self.json)
        identity += [self.bos_id, self.eos_id]
        text = json.dumps(identity, sort_keys=True, ensure_ascii=True)
        crc = zlib.crc32(self.for_llama2c()) if self.sp else 0
        return f"{hashlib.sha256(text.encode()).hexdigest()[:56]}{crc:08x}"

    def export(self, path):
        """Write llama2.c's tok.bin. Raises ValueError for a tokenizer.json, and for a SentencePiece
        model that run.c does not support."""
        data = self.for_llama2c()
        check_plain_bpe(self, "run.c", prefix=True)
        with write_atomic(path) as f:
            f.write(data)

    def for_llama2c(self):
        """
        The bytes of llama2.c's tok.bin: uint32 max_token_length, then for each token float32 score,
        uint32 length, bytes; little-endian. Pieces for raw bytes keep SentencePiece's notation
        (<0x0A>), which run.c decodes. Raises ValueError for a tokenizer.json, which export.py
        stores in the model file.
        """
        if not self.sp:
            raise ValueError(
                f"{self.model_path} is not a SentencePiece model: llama2.c cannot read it"
            )
        pieces = [self.sp.id_to_piece(i) for i in range(self.n_words)]
        if self.bos_id >= 0:
            pieces[self.bos_id] = "\n<s>\n"  # no text matches BOS or EOS, because of the newlines
        if self.eos_id >= 0:
            pieces[self.eos_id] = "\n</s>\n"
        control = set(self.special.values())  # a score of -inf: text never becomes these tokens
        pieces = [p.replace("\u2581", " ").encode() for p in pieces]  # ▁ stands for a space
        scores = [-math.inf if i in control else self.sp.get_score(i) for i in range(len(pieces))]
        return struct.pack("<I", max(map(len, pieces))) + b"".join(
            struct.pack("<fI", score, len(piece)) + piece for score, piece in zip(scores, pieces)
        )


def note_ordinary(texts):
    """Prints a note about added tokens that text can become where the tokenizer comes from."""
    if texts:
        names = ", ".join(map(repr, texts[:5])) + f" and {len(texts) - 5} more" * (len(texts) > 5)
        note(
            f"added tokens that are not special become control tokens here: {names}. Text never "
            "becomes one of them, and decoding leaves them out"
        )


def check_prefix(model):
    """Raises ValueError if a merge lacks the prefix that continues a word, which the tokenizers
    library would cut off all the same: between the bytes of a character, the process would end."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges") or () if prefix else ():
        if not (merge if isinstance(merge, list) else merge.split(" "))[1].startswith(prefix):
            raise ValueError(f"its merge {merge!r} lacks the prefix {prefix!r}")


def check_post_processor(process):
    """Raises ValueError if the post-processor of a tokenizer.json uses a token that it does not
    define: the tokenizers library would panic when it encodes."""
    for step in process.get("processors", [process]):
        parts = [part for name in ("single", "pair") for part in step.get(name, ())]
        used = {part["SpecialToken"]["id"] for part in parts if "SpecialToken" in part}
        if unknown := sorted(used - step.get("special_tokens", {}).keys()):
            raise ValueError(f"its post-processor does not define {unknown[0]!r}")


# -----------------------------------------------------------------------------
# The identity of a tokenizer


def protobuf_fields(data):
    """
    Yields (field number, value) for each field of a protobuf message; the value is an int for a
    varint and bytes for every other wire type. Groups, which no message here has, are skipped.
    """
    position = groups = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        wire_type = key & 7
        if wire_type in (3, 4):  # a group begins or ends
            groups += 1 if wire_type == 3 else -1
            continue
        if wire_type == 0:
            value = varint()
        else:
            size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            value = data[position : position + size]
            position += size
        if not groups:
            yield key >> 3, value


def protobuf_message(data, **kinds):
    """{name: value} of the fields of a protobuf message that have the number and the type in kinds,
    {name: (number, type)}. Like any other unknown field, one of another type is ignored."""
    numbers = {number: (name, kind) for name, (number, kind) in kinds.items()}
    found = ((*numbers.get(number, ("", None)), value) for number, value in protobuf_fields(data))
    return {name: value for name, kind, value in found if type(value) is kind}


def sentencepiece_identity(data):
    """
    The parts of a SentencePiece model that determine ids and text: pieces, scores and types, the
    model type and the normalizer, without the names and statistics of its training.
    """
    NORMAL, UNIGRAM = 1, 1
    pieces, trainer, normalizer = [], {}, {}
    for field, value in protobuf_fields(data):
        if not isinstance(value, bytes):
            continue
        if field == 1:
            piece = protobuf_message(value, text=(1, bytes), score=(2, bytes), type=(3, int))
            text, score = piece.get("text", b""), piece.get("score", bytes(4))
            pieces.append([text.hex(), score.hex(), piece.get("type", NORMAL)])
        elif field == 2:
            trainer |= protobuf_message(
                value, model_type=(3, int), space_after=(24, int), unk_surface=(44, bytes)
            )
        elif field == 3:
            normalizer |= protobuf_message(
                value, charsmap=(2, bytes), prefix=(3, int), squeeze=(4, int), escape=(5, int)
            )
    return [
        "sentencepiece",
        pieces,
        trainer.get("model_type", UNIGRAM),
        trainer.get("space_after", 0),  # treat_whitespace_as_suffix
        trainer.get("unk_surface", " \u2047 ".encode()).hex(),
        hashlib.sha256(normalizer.get("charsmap", b"")).hexdigest(),  # precompiled_charsmap
        # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
        *(normalizer.get(name, 1) for name in ("prefix", "squeeze", "escape")),
    ]


def check_plain_bpe(tokenizer, program, prefix=False):
    """
    Raises ValueError, which names the feature, if a SentencePiece model does more than merge pieces
    in the order of their scores. `program`, for the message, would compute other ids than we do.
    With `prefix`, the program always puts a space in front of a text.
    """
    _, pieces, kind, suffix, _, charsmap, space, _, escape = sentencepiece_identity(tokenizer.data)
    kinds = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
    features = {
        f"the model type {kinds.get(kind, kind)}, only BPE": kind != 2,
        "a normalization rule other than identity": charsmap != hashlib.sha256(b"").hexdigest(),
        "user-defined symbols": any(piece[2] == 4 for piece in pieces),
        "spaces after words (treat_whitespace_as_suffix)": suffix,
        "spaces that are not escaped (escape_whitespaces=false)": not escape,
        "text without a space in front (add_dummy_prefix=false)": prefix and not space,
    }
    for feature, present in features.items():
        if present:
            raise ValueError(f"{tokenizer.model_path}: {program} does not support {feature}")


def json_identity(config):
    """
    The parts of a tokenizer.json that determine ids and text. Different notations of the same
    tokenizer, such as merges as strings or as pairs, give the same result.
    """
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
# Byte-level BPE for run.c, which has no Unicode tables and no regular expressions: it implements
# two splitting patterns and reads the character classes that they need from the model file.

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet():
    """GPT-2's mapping of printable characters to bytes, {character: byte}; Ġ is a space."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


@functools.cache
def character_classes(digits):
    """
    Ranges of Unicode code points, [(first, last, class)] in ascending order, with class 1 for
    letters, 2 for numbers and 3 for white space. They come from the tokenizers library itself,
    because versions of Unicode differ. With `digits`, the numbers are the characters that the
    library's Digits pre-tokenizer splits off.
    """
    from tokenizers import Regex, pre_tokenizers

    points = [
        c for c in range(0x40000) if not 0xD800 <= c < 0xE000
    ]  # higher planes have none of the three classes
    text, ranges = "".join(map(chr, points)), []
    for kind, pattern in ((1, r"\p{L}+"), (2, r"\p{N}+"), (3, r"\s+")):
        split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
        pieces = [(points[a], points[b - 1]) for _, (a, b) in split.pre_tokenize_str(text)]
        if digits and kind == 2:  # between \0 characters, each digit is a piece of its own
            pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(
                "".join(f"\0{c}" for c in text)
            )
            pieces = [(ord(c), ord(c)) for c, _ in pieces if len(c) == 1 and c != "\0"]
        ranges += [(a, b, kind) for a, b in pieces]
    return sorted(ranges)


def byte_level_blob(tokenizer):
    """
    The bytes of a tokenizer.json in version 3 of model.bin; run.c documents the layout. Raises
    ValueError that names any feature of the tokenizer that run.c does not support.
    """
    config, path = tokenizer.json, tokenizer.model_path

    def refuse(feature):
        raise ValueError(f"{path}: run.c does not support {feature}")

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
                refuse(f"the token {text!r}, which is not made of byte-level characters")
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
# Hugging Face's chat templates are untrusted programs (Jinja): they run in a process of their own,
# in a sandbox and with limits on time and memory.

RENDER_SECONDS, RENDER_BYTES, RENDER_CHARACTERS = 5, 1 << 30, 1 << 20


def render_chats(source, chats):
    """
    Render the chat template `source` once for each of `chats`, dicts of template variables.
    Returns a list of pairs (text, error), one of which is "". Raises ValueError if the template
    cannot be compiled or exceeds the limits.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("chat templates need the jinja2 library: pip install jinja2")
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
        rendered, error = json.loads(done.stdout) if done.returncode == 0 else (None, None)
    except subprocess.TimeoutExpired:
        done, error = None, None
    if error:
        raise ValueError(error)
    if done and done.returncode == 1:
        raise ValueError(done.stderr.strip().split("\n")[-1])
    if done is None or done.returncode:
        raise ValueError(f"it needs more than {RENDER_SECONDS} seconds or {RENDER_BYTES >> 20} MB")
    return rendered


def render_child():
    """The child process of render_chats: renders as transformers does, in Jinja's sandbox."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (RENDER_BYTES, RENDER_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (RENDER_SECONDS, RENDER_SECONDS))
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks trained text, which stays unchanged."""

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

    def reason(e):  # a template can raise any exception, with any message
        if isinstance(e, MemoryError):
            return f"it needs more than {RENDER_BYTES >> 20} MB"
        return " ".join(str(e).split())[:200] or type(e).__name__

    rendered, error = [], ""
    try:
        program = env.from_string(source)
    except Exception as e:
        chats, error = [], reason(e)
    for chat in chats:
        try:
            text = program.render(**chat)
            if len(text) > RENDER_CHARACTERS:
                raise ValueError(f"it writes more than {RENDER_CHARACTERS:,} characters")
            rendered.append((text, ""))
        except Exception as e:
            rendered.append(("", reason(e)))
    json.dump([rendered, error], sys.stdout)


# -----------------------------------------------------------------------------
# The search for tokenizers


def find_tokenizer(vocab_size, *folders, wanted="", owner=""):
    """
    The path of a tokenizer in one of `folders` (None is skipped), data/ or the current folder.

        wanted  hash of the tokenizer; "" selects the first folder that has a tok<vocab_size>.model,
                tokenizer.model or tokenizer.json of this vocabulary size
        owner   the model or data that was made with the tokenizer, for the messages; "" if nothing
                was made with it

    Raises FileNotFoundError if there is no tokenizer of this size, and ValueError if none of them
    has the wanted hash or if the tokenizers of a folder disagree.
    """
    folders = list(dict.fromkeys(d for d in (*folders, "data", "") if d is not None))
    others = []
    for folder in folders:
        paths = tokenizers_in(folder, vocab_size)
        if not wanted:
            for other in paths[1:]:
                if disagree(paths[0], other):
                    raise ValueError(
                        f"{paths[0]} and {other} disagree: name one of them with "
                        "--tokenizer, or move the other one away"
                    )
            if paths:
                return paths[0]
            continue
        for path in dict.fromkeys(paths + all_tokenizers_in(folder)):
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
    if owner:  # a newly trained vocabulary would not be the same
        remedy = f"copy the tokenizer of {owner} into its folder, or name it with --tokenizer"
    elif vocab_size == 32000:
        remedy = "name your vocabulary with --vocab_size, or download Llama 2's tokenizer.model"
    else:
        remedy = f"train one with: {train} (for an existing model, copy the model's own instead)"
    raise FileNotFoundError(f"no tokenizer with {vocab_size} tokens (searched {places}); {remedy}")


def names_of(vocab_size):
    return f"tok{vocab_size}.model", "tokenizer.model", "tokenizer.json"


def tokenizers_in(folder, vocab_size):
    """Paths of the tokenizers in a folder that have a usual name and this vocabulary size."""
    certain = [f"tok{vocab_size}.model"] + ["tokenizer.model"] * (vocab_size == 32000)
    paths = [(name, os.path.join(folder, name)) for name in names_of(vocab_size)]
    return [
        path
        for name, path in paths
        if os.path.isfile(path) and (name in certain or size_of(path) == vocab_size)
    ]


def all_tokenizers_in(folder):
    """Paths of all tokenizers in a folder, including those that hashed_name has renamed."""
    names = "tok*.model", "tokenizer*.json"
    paths = [p for name in names for p in glob.glob(os.path.join(glob.escape(folder), name))]
    return [path for path in sorted(paths) if not path.endswith("tokenizer_config.json")]


def size_of(path):
    """Vocabulary size of a tokenizer file; 0 if it is damaged or lists no vocabulary."""
    if path.endswith(".json"):
        return max(json_vocabulary(path).values(), default=-1) + 1
    try:
        return Tokenizer(path).n_words
    except ValueError:
        return 0


def json_vocabulary(path):
    """{token: id} of a tokenizer.json; {} if it is damaged or lists no vocabulary."""
    try:
        config = read_json(path)
        added = {token["content"]: int(token["id"]) for token in config.get("added_tokens") or []}
        return {**{token: int(i) for token, i in config["model"]["vocab"].items()}, **added}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def disagree(one, other):
    """
    Whether the tokenizers at two paths differ. A tokenizer.json agrees with a SentencePiece model
    if it has all of the model's tokens under the same ids; it may have additional tokens.
    """
    if one.endswith(".json") == other.endswith(".json"):
        return Tokenizer(one).hash != Tokenizer(other).hash
    model, config = (other, one) if one.endswith(".json") else (one, other)
    sp, vocabulary = Tokenizer(model).sp, json_vocabulary(config)
    return any(vocabulary.get(sp.id_to_piece(i)) != i for i in range(sp.vocab_size()))


def data_folders(data):
    """The folders to search for the tokenizer of train.py's --data, which is `data`."""
    folders = []
    for item in str(data).split(","):
        path = next((p for p in (item, item.rpartition(":")[0]) if p and os.path.exists(p)), None)
        if path and os.path.isfile(path):  # such as mystories/task/sft.jsonl
            path = os.path.dirname(os.path.abspath(path))
            folders += [path, os.path.dirname(path)]
        elif path:
            shards = glob.glob(os.path.join(glob.escape(path), "*.bin"))  # such as mystories/tok512
            folders += [path] + [os.path.dirname(os.path.abspath(path))] * bool(shards)
    return folders


def open_tokenizer(vocab_size, folders, wanted="", given="", owner="", required=True):
    """
    The Tokenizer of a model: the file `given`, or else the result of find_tokenizer, which has the
    same arguments and errors. If `required` is False, a tokenizer that is not found is None. Raises
    ValueError if the tokenizer has another vocabulary size or another hash than wanted. If neither
    a hash nor a file is given, a line on stderr names the tokenizer that is assumed.
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
    The Tokenizer of the checkpoint that was read from `path`: the file `given`, or else the one in
    the checkpoint's folder, in `folders` or in the data folder of its training.
    """
    folders = [os.path.dirname(os.path.abspath(path)), *folders]
    folders += data_folders((checkpoint.get("config") or {}).get("data", ""))
    wanted, n = checkpoint.get("tokenizer_hash", ""), checkpoint["model_args"]["vocab_size"]
    return open_tokenizer(n, folders, wanted, given, path, required)


def load_tokenizer(args, checkpoint, shards, vocab_size):
    """The run's tokenizer; its hash, "" if it is not known; and lines that say what is assumed. The
    tokenizer is None where there is none: pretraining needs it only to show text. Raises ValueError
    where the tokenizers of the checkpoint, of the shards and of --tokenizer are not the same."""
    other = args.init_from not in ("scratch", "resume")
    path = args.init_from if other else os.path.join(args.out_dir, "ckpt.pt")
    folder = os.path.dirname(os.path.abspath(path))
    made = [(path, checkpoint.get("tokenizer_hash"))] if checkpoint else []
    made += shards
    known = [(name, found) for name, found in made if found]
    owner, wanted = known[0] if known else ("", "")
    for name, found in known:
        if found != wanted:
            raise ValueError(
                f"{name} was made with another tokenizer ({found[:16]}) than {owner} "
                f"({wanted[:16]}): make shards of the same text with that tokenizer (pretokenize)"
            )
    if checkpoint and wanted and owner != path and not args.tokenizer:
        beside = tokenizers_in(folder, vocab_size)  # which are thought to be the checkpoint's
        if beside and wanted not in (Tokenizer(t).hash for t in beside):
            raise ValueError(
                f"{beside[0]}, which is beside {path}, is another tokenizer than that of {owner}: "
                "name the right one with --tokenizer, or make the shards again with it"
            )
    data = data_folders(args.data)
    folders = [folder, args.out_dir, *data] if checkpoint else [*data, args.out_dir]
    tokenizer = open_tokenizer(vocab_size, folders, wanted, args.tokenizer, owner, required=False)
    assumed = [
        f"{name} does not say which tokenizer it was made with: assuming {tokenizer.model_path}"
        for name, found in made
        if tokenizer and not found
    ]
    return tokenizer, tokenizer.hash if tokenizer else wanted, assumed


def check_same_tokenizer(owner, owner_hash, other, other_hash):
    """
    Compare the tokenizer hashes of two models or data sets, which `owner` and `other` name in the
    messages. Raises ValueError if the hashes differ; prints a line on stderr if `other` has none.
    """
    if owner_hash and other_hash and owner_hash != other_hash:
        raise ValueError(
            f"{other} was made with another tokenizer ({other_hash[:16]}) than {owner} "
            f"({owner_hash[:16]})"
        )
    if not other_hash:
        note(f"{other} does not say which tokenizer it was made with: assuming that of {owner}")


def mismatch(path, owner, wanted):
    """The message for a tokenizer whose hash is not the wanted one."""
    remedy = (
        "run `python tinystories.py pretokenize` again"
        if os.path.isdir(owner)
        else f"copy the right one into the folder of {owner}"
    )
    return (
        f"{path} is not the tokenizer of {owner}, whose hash is {wanted[:16]}: {remedy}, or "
        "name the right one with --tokenizer"
    )


def destination(tokenizer, folder):
    """
    The path to which copy_tokenizer writes, and the Tokenizer that this path holds already: None
    if the file does not exist or is damaged.
    """
    name = f"tok{tokenizer.n_words}.model" if tokenizer.sp else "tokenizer.json"
    path = os.path.join(folder, name)
    try:
        return path, Tokenizer(path)
    except (OSError, ValueError):
        return path, None


def check_place(tokenizer, folder):
    """Raises ValueError if copy_tokenizer would have to replace another tokenizer."""
    path, present = destination(tokenizer, folder)
    if present and present.hash != tokenizer.hash:
        raise ValueError(
            f"{path} is another tokenizer than {tokenizer.model_path}: choose another "
            f"folder for the output, or move {path} away"
        )


def copy_tokenizer(tokenizer, folder, config=None, replace=False):
    """
    Copy a tokenizer into a folder under the name that find_tokenizer expects: tok<n_words>.model,
    or tokenizer.json with a tokenizer_config.json that holds `config`. Returns the path, or None if
    the folder has this tokenizer already. If another tokenizer has this name, `replace` renames it
    (see hashed_name); without `replace` it raises ValueError.
    """
    if not replace:
        check_place(tokenizer, folder)
    path, present = destination(tokenizer, folder)
    if present and present.hash == tokenizer.hash:
        return None
    if present:
        os.replace(path, hashed_name(present))
        note(f"{path} was another tokenizer and has been renamed to {hashed_name(present)}")
    config = config or tokenizer.config
    if tokenizer.bpe and config:
        with write_atomic(os.path.join(folder, "tokenizer_config.json"), "w") as f:
            json.dump(config, f, indent=2, ensure_ascii=False)
            f.write("\n")
    with write_atomic(path) as f:
        f.write(tokenizer.data)
    return path


def hashed_name(tokenizer):
    """
    The path of a tokenizer file with part of its hash: data/tok512.model becomes
    data/tok512.1a2b3c4d.model.
    """
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
        help="SentencePiece model; the .bin file is written to the same folder",
    )
    args = parse_args(parser, argv)
    if not os.path.exists(args.tokenizer_model):
        raise ValueError(
            f"{args.tokenizer_model}: there is no such file; name a SentencePiece model with "
            "--tokenizer-model"
        )
    tokenizer = Tokenizer(args.tokenizer_model)
    path = os.path.splitext(args.tokenizer_model)[0] + ".bin"
    if path == args.tokenizer_model:
        raise ValueError(f"{path} would be overwritten: rename the model to end in .model")
    tokenizer.export(path)
    print(f"wrote {path} ({tokenizer.n_words} tokens, {os.path.getsize(path):,} bytes)")


if __name__ == "__main__":
    run_main(main)
