"""The tokenizer against SentencePiece itself and a second reader of tok.bin; the shared helpers."""

import argparse
import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA, ROOT, make_bpe
from sentencepiece import SentencePieceProcessor

import tinystories
import tokenizer
from common import boolean, parse_args, run_main, write_atomic
from tokenizer import Tokenizer, find_tokenizer, stop_ids

ODD = [
    "",
    "a",
    " ",
    "  two  spaces ",
    "Once upon a time",
    "line\nbreak\ttab\r\n",
    "😀 emoji 👩‍👩‍👧",
    "한국어 이야기",
    "ünïcödé ½",
    "<s> </s> <0x0A> <unk>",
    "1234567890",
    "\x00\x01\x7f",
    "x" * 5000,
    "".join(map(chr, range(1, 0x300))),
]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A vocabulary of 512 as the project's own commands make it."""
    folder = tmp_path_factory.mktemp("made")
    tinystories.synthesize(str(folder), 500, seed=1)
    tinystories.train_vocab(str(folder), 512)
    return str(folder / "tok512.model")


@pytest.fixture(params=["made", "tok512", "llama2"])
def model(request):
    if request.param == "llama2":
        if DATA is None or not (DATA / "llama2/tokenizer.model").exists():
            pytest.skip("needs llama2/tokenizer.model: set STORIES_DATA to a folder that has it")
        return str(DATA / "llama2/tokenizer.model")
    return str(request.getfixturevalue("made" if request.param == "made" else "tok512_model"))


# -----------------------------------------------------------------------------
# Tokenizer


@pytest.mark.parametrize("text", ODD)
def test_encode_equals_sentencepiece_and_round_trips(model, text):
    t, sp = Tokenizer(model), SentencePieceProcessor(model_file=model)
    plain = sp.encode(text)
    assert t.encode(text, False, False) == plain
    assert t.encode(text, True, True) == [t.bos_id] + plain + [t.eos_id]
    assert t.encode([text, "b"], True, False)[0] == [t.bos_id] + plain
    # the published tok512.model drops doubled spaces; ours and Llama 2's lose nothing
    keeps = sp.encode("a  b") != sp.encode("a b")
    expected = text if keeps else re.sub(" +", " ", text).strip(" ")
    assert t.decode(t.encode(text, True, True)) == expected


def test_texts_of_tokens_keep_their_spaces(model):
    t = Tokenizer(model)
    ids = t.encode("The red ball", False, False)
    assert "".join(map(t.token_text, ids)) == " The red ball"  # a text begins with a space
    assert [t.token_text(i) for i in (1, 2, t.n_words)] == ["<s>", "</s>", f"<{t.n_words}>"]


def test_every_byte_and_every_token(model):
    t = Tokenizer(model)
    first = t.sp.piece_to_id("<0x00>")
    for byte in range(128):
        assert t.decode([first + byte]) == chr(byte)
    for text in ("é", "한", "😀"):  # spelt in bytes
        assert t.decode([first + b for b in text.encode()]) == text
    for i in range(t.n_words):
        assert isinstance(t.decode([i]), str)
    assert (t.bos_id, t.eos_id) == (1, 2) and t.decode([1, 2]) == ""


def test_unknown_fields_of_a_sentencepiece_model(made, tmp_path):
    """A group, and known numbers with another type, are unknown fields: SentencePiece ignores them,
    and so does the hash."""
    from formats import field

    t, data = Tokenizer(made), Path(made).read_bytes()
    for i, more in enumerate(
        (b"\x53\x54", b"\x53\x0a\x01a\x54", field(1, 7), field(2, field(3, "x")))
    ):
        (tmp_path / f"{i}.model").write_bytes(data + more)
        other = Tokenizer(tmp_path / f"{i}.model")
        assert other.encode("Once upon", True, True) == t.encode("Once upon", True, True)
        assert other.hash == t.hash


def read_tok_bin(path):
    """An independent reader, after the description of the format in llama2.c."""
    data = open(path, "rb").read()
    (longest,) = struct.unpack_from("<I", data)
    at, tokens = 4, []
    while at < len(data):
        score, n = struct.unpack_from("<fI", data, at)
        tokens.append((score, data[at + 8 : at + 8 + n]))
        assert len(tokens[-1][1]) == n
        at += 8 + n
    return longest, tokens


def test_export_is_read_back(model, tmp_path):
    t = Tokenizer(model)
    t.export(tmp_path / "tok.bin")
    longest, tokens = read_tok_bin(tmp_path / "tok.bin")
    assert len(tokens) == t.n_words and longest == max(len(b) for _, b in tokens)
    assert tokens[1][1] == b"\n<s>\n" and tokens[2][1] == b"\n</s>\n"
    for i, (score, piece) in enumerate(tokens):
        assert score == pytest.approx(t.sp.get_score(i))
        if i > 2:
            assert piece.decode() == t.sp.id_to_piece(i).replace("▁", " ")
    # greedy merging by score, as run.c does it, must give SentencePiece's ids
    ids = {piece: i for i, (_, piece) in enumerate(tokens)}
    text = "Once upon a time, there was a cat named Zoe. 한 😀"
    got = []
    for c in " " + text:
        b = c.encode()
        got += [ids[b]] if b in ids else [ids[f"<0x{x:02X}>".encode()] for x in b]
    while True:
        merges = [
            (tokens[ids[m]][0], -k)
            for k, (a, b) in enumerate(zip(got, got[1:]))
            if (m := tokens[a][1] + tokens[b][1]) in ids
        ]
        if not merges:
            break
        k = -max(merges)[1]
        got[k : k + 2] = [ids[tokens[got[k]][1] + tokens[got[k + 1]][1]]]
    assert got == t.encode(text, False, False)


def test_command_writes_bin_next_to_the_model(made):
    def run(*args):
        command = [sys.executable, str(ROOT / "tokenizer.py"), *args]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(f"--tokenizer-model={made}").returncode == 0
    assert os.path.getsize(made.replace(".model", ".bin")) > 4000
    r = run("--tokenizer-model=missing.model")
    assert r.returncode == 1 and r.stderr == (
        "error: missing.model: there is no such file; name a SentencePiece model with "
        "--tokenizer-model\n"
    )
    r = run("--tokeniser-model=x")
    assert r.returncode == 2 and "did you mean --tokenizer" in r.stderr
    assert r.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", [b"", b"junk" * 500, "truncated"])
def test_corrupt_model(made, tmp_path, damage):
    path = tmp_path / "bad.model"
    path.write_bytes(open(made, "rb").read()[:-100] if damage == "truncated" else damage)
    with pytest.raises(ValueError, match="bad.model is not a SentencePiece model"):
        Tokenizer(path)


def test_bad_ids_and_bad_text(made):
    t = Tokenizer(made)
    for i in (-1, 512):
        with pytest.raises(ValueError, match=f"token {i} is outside"):
            t.decode([i])
    with pytest.raises(ValueError):
        t.encode("\ud800", False, False)


def test_find_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data.tok64.model.*train_vocab --vocab_size=64"):
        find_tokenizer(64, None, "out")
    os.makedirs("data")
    for path in ("data/tok64.model", "tokenizer.model"):
        open(path, "w").close()
    assert find_tokenizer(64, "out") == "data/tok64.model"
    assert find_tokenizer(32000) == "tokenizer.model"


# -----------------------------------------------------------------------------
# tokenizer.json

SCRIPTS = """Once upon a time, they'LL say "it's 12345 o'clock"; we'd x=y+1...
Le café était fermé; où est l'été? | Größe, Straße, ẞ | Pożar w Łodzi, křeček
Жили-были дед да баба. Съешь ещё! | Μια φορά κι έναν καιρό ήταν 3 γουρουνάκια
كان يا ما كان في قديم الزمان ١٢٣٤٥ | היה היה פעם מלך אחד | एक समय की बात है, १२३ राजा था
從前有一個國王,他有三個女兒。第１２章 | むかしむかし、あるところに | 옛날 옛적에 호랑이가
กาลครั้งหนึ่งนานมาแล้ว ๑๒๓ | ერთხელ იყო და არა იყო რა | Կար չկար մի թագավոր | নীল আকাশ
ሀገር ውስጥ ፩፪፫ | ½ ² Ⅷ ① 𝟙𝟚 𒐀 | 👩‍👩‍👧 🇪🇺 e\u0301 a\u0300\u0323 \u200b\ufeff \U000e0001""".replace(
    "\n", " | "
)
PIECES = [
    *SCRIPTS.split(" | "),
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2028",
    "\u3000",
    "'s",
    "'S",
    "'\u017f",
    "'re'VE",
    "!",
    "?!\n",
    "_",
    "<|eot_id|>",
    "<|im_end|>",
    "\x00",
    "\x7f",
    "\ufffd",
    "1234567",
    "a1b2",
    " 7",
    "\U0001f600",
    "\U0010ffff",
    "\ud7ff\ue000",
]


def odd_texts(n=1000):
    """Real and odd strings: the pieces alone, and shuffled, cut and joined."""
    rng = random.Random(0)
    texts = ODD + PIECES
    while len(texts) < n:
        parts = [rng.choice(PIECES) for _ in range(rng.randint(1, 6))]
        parts = [p[rng.randint(0, len(p)) :] if rng.random() < 0.4 else p for p in parts]
        texts.append(rng.choice(["", " "]).join(parts))
    return texts


class Blob:
    """What is in byte_level_blob's bytes, read and used by its description alone."""

    def __init__(self, data):
        at = 0

        def take(form):
            nonlocal at
            at += struct.calcsize("<" + form)
            return struct.unpack_from("<" + form, data, at - struct.calcsize("<" + form))

        self.ranges = [take("3I") for _ in range(take("I")[0])]
        self.pattern, self.flags, n = take("3I")
        merges = [take("3I") for _ in range(n)]
        self.merges = {(a, b): (rank, i) for rank, (a, b, i) in enumerate(merges)}
        self.tokens = []
        while at < len(data):
            (n,) = take("I")
            self.tokens.append((data[at : at + (n >> 1)], n & 1))
            at += n >> 1
        assert at == len(data)
        self.ids = {b: i for i, (b, special) in enumerate(self.tokens) if not special}
        L, N, S = (
            "".join(
                f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b, k in self.ranges if k == kind
            )
            for kind in (1, 2, 3)
        )
        patterns = [
            f"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+",
            f"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n{L}{N}]?[{L}]+|[{N}]{{1,3}}"
            f"| ?[^{S}{L}{N}]+[\\r\\n]*|[{S}]*[\\r\\n]+|[{S}]+(?![^{S}])|[{S}]+",
        ]
        self.split = re.compile(patterns[self.pattern]).findall
        self.digits = re.compile(f"[{N}]|[^{N}]+").findall

    def encode(self, text):
        if self.flags & 4 and text and not text.startswith(" "):
            text = " " + text
        parts = self.digits(text) if self.flags & 2 else [text]
        return [i for part in parts for piece in self.split(part) for i in self.bpe(piece.encode())]

    def bpe(self, piece):
        if self.flags & 1 and piece in self.ids:
            return [self.ids[piece]]
        ids = [self.ids[piece[k : k + 1]] for k in range(len(piece))]
        while pairs := [
            (self.merges[p], k) for k, p in enumerate(zip(ids, ids[1:])) if p in self.merges
        ]:
            (_, merged), k = min(pairs)
            ids[k : k + 2] = [merged]
        return ids


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "smollm2"])
def test_byte_level_blob_equals_the_tokenizers_library(kind, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    t = Tokenizer(make_bpe(tmp_path / kind, kind))
    blob = Blob(tokenizer.byte_level_blob(t))
    assert len(blob.tokens) == t.n_words and blob.merges
    assert {b.decode(): i for i, (b, special) in enumerate(blob.tokens) if special} == t.special
    texts = odd_texts()
    for text, ids in zip(texts, t.encode(texts, False, False)):
        assert blob.encode(text) == ids, text
        assert b"".join(blob.tokens[i][0] for i in ids).decode() in (text, " " + text)
        assert t.decode(ids) in (text, " " + text)
    assert all(a <= b < c for (a, b, _), (c, _, _) in zip(blob.ranges, blob.ranges[1:]))
    high = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\p{L}\p{N}\s]"), "isolated")
    assert len(high.pre_tokenize_str("".join(map(chr, range(0x40000, 0x110000))))) == 1  # no more


def test_control_tokens_of_a_tokenizer_json(tmp_path):
    path = make_bpe(tmp_path / "a", "llama3")
    t = Tokenizer(path)
    assert t.bos_id == t.special["<|begin_of_text|>"] and t.eos_id == t.special["<|eot_id|>"]
    assert stop_ids(t) == {t.bos_id, t.eos_id}  # not 1 and 2, which are ordinary tokens here
    ids = t.encode("a<|eot_id|>b", True, True)
    assert ids[0] == t.bos_id and ids[-1] == t.eos_id and t.eos_id not in ids[1:-1]
    assert t.decode(ids) == "a<|eot_id|>b"  # as the text that it was
    assert t.encode(["a", "b"], True, False) == [t.encode(x, True, False) for x in "ab"]
    (tmp_path / "a/tokenizer_config.json").unlink()  # then by their usual names
    assert Tokenizer(path).eos_id == t.special["<|end_of_text|>"]
    with pytest.raises(ValueError, match="token 600 is outside"):
        t.decode([600])
    with pytest.raises(ValueError, match="UTF-8"):
        t.encode("\ud800", False, False)
    with pytest.raises(ValueError, match="llama2.c cannot read it"):
        t.export(tmp_path / "tok.bin")
    assert find_tokenizer(600, str(tmp_path / "a")) == str(path)
    with pytest.raises(FileNotFoundError):
        find_tokenizer(601, str(tmp_path / "a"))


def test_an_added_token_without_text_is_none(tmp_path):
    """The tokenizers library leaves it out."""
    path = make_bpe(tmp_path / "a")
    blob, config = tokenizer.byte_level_blob(Tokenizer(path)), json.loads(path.read_text())
    config["added_tokens"].append(config["added_tokens"][0] | {"id": 600, "content": ""})
    path.write_text(json.dumps(config))
    t = Tokenizer(path)
    assert "" not in t.special and tokenizer.byte_level_blob(t) == blob


def test_a_merge_without_its_prefix_is_refused(tmp_path):
    """The tokenizers library would end the process, so another one opens the file."""
    path = make_bpe(tmp_path / "a")
    config = json.loads(path.read_text())
    config["model"]["continuing_subword_prefix"] = "x"
    path.write_text(json.dumps(config))
    code = f"from tokenizer import Tokenizer; Tokenizer({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ValueError: ")
    assert "lacks the prefix 'x'" in done.stderr


@pytest.mark.parametrize(
    "change, says",
    [
        ({"normalizer": {"type": "NFC"}}, "does not support the normalizer NFC"),
        ({"decoder": {"type": "Fuse"}}, "only byte-level BPE"),
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            "does not support the pre-tokenizer Whitespace",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "a+"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "Split {'Regex': 'a+'}",
        ),
        ("cut", "is not a tokenizer.json, or is cut short"),
        ("[1]", "is not a tokenizer.json"),
    ],
)
def test_unsupported_features_of_a_tokenizer_json(change, says, tmp_path):
    path = make_bpe(tmp_path / "a")
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_text(path.read_text()[:-20] if change == "cut" else change)
    with pytest.raises(ValueError, match=re.escape(says)):
        tokenizer.byte_level_blob(Tokenizer(path))


def test_shards_refuse_unsuitable_tokenizers(tmp_path):
    path = make_bpe(tmp_path / "a")
    with pytest.raises(ValueError, match="BOS is token 592, but shards need token 1"):
        tinystories.pretokenize(str(tmp_path / "a"), 600)
    config = json.loads(path.read_text())
    config["added_tokens"] = []
    config["model"]["vocab"].update({f"u{i}": i for i in range(592, 65537)})
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has 65537 tokens: at most 65536 fit into a shard"):
        tinystories.pretokenize(str(tmp_path / "a"), 65537)


# -----------------------------------------------------------------------------
# What the commands share


def parser():
    p = argparse.ArgumentParser(prog="x.py")
    p.add_argument("--max_iters", type=int, default=5, help="steps")
    p.add_argument("--ppo", type=boolean, nargs="?", const=True, default=False, help="align")
    return p


def test_parse_args(capsys):
    assert parse_args(parser(), ["--max_iters=7"]).max_iters == 7
    for flag, value in (
        ("--ppo", True),
        ("--ppo=True", True),
        ("--ppo=False", False),
        ("--ppo=0", False),
    ):
        assert parse_args(parser(), [flag]).ppo is value
    for argv, hint in (
        (["--max_itres=7"], "did you mean --max_iters?"),
        (["--max-iters=7"], "did you mean --max_iters?"),
        (["--max=7"], "unknown argument --max"),  # no abbreviations
        (["--qqqqqq"], "unknown argument --qqqqqq (see"),
        (["--max_iters=many"], "invalid int value: 'many'"),
        (["--ppo=maybe"], "expected True or False, not 'maybe'"),
    ):
        with pytest.raises(SystemExit) as e:
            parse_args(parser(), argv)
        message = capsys.readouterr().err
        assert e.value.code == 2 and hint in message and message.count("\n") == 1
    with pytest.raises(SystemExit):
        parse_args(parser(), ["--help"])
    assert "(default: 5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("no\nsuch luck"), 1, "error: no such luck\n"),
        (FileNotFoundError(2, "No such file", "x.bin"), 1, "error: x.bin: No such file\n"),
        (OSError("in our words"), 1, "error: in our words\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_run_main(error, status, message, capsys):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as e:
        run_main(main)
    assert (e.value.code or 0) == status and capsys.readouterr().err == message
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_main(lambda: 1 / 0)


def test_write_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    with write_atomic(path) as f:
        f.write(b"old")
        assert not path.exists()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as e:
            with write_atomic(path) as f:
                f.write(b"half of the new")
                raise error
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]
        if isinstance(error, OSError):
            assert e.value.filename == str(path)
    with write_atomic(path, "w") as f:
        f.write("새")
    assert path.read_text(encoding="utf-8") == "새"
    monkeypatch.setattr(tokenizer.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "I/O")))
    with pytest.raises(OSError):
        with write_atomic(path) as f:
            f.write(b"lost")
    assert path.read_text(encoding="utf-8") == "새"
