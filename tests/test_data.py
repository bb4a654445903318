"""
The pretraining data: downloads from an unreliable server, the grammar, shards compared with
encoding one story at a time, and sampling.
"""

import collections
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, data_file

import tinystories
from experiments import grammar
from tinystories import BOS, Prompts, Sampler, Windows, open_shards, permute
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Download, from a server with common faults

SMALL = "TinyStoriesV2-GPT4-valid.txt"
BIG = "TinyStories_all_data.tar.gz"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; closes the connection after each of `breaks` bytes; `mode` is a fault."""

    def __init__(self, files, breaks=(), mode=""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.mode, self.log = files, list(breaks), mode, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.log.append((self.path, asked))
        if server.mode == "silent":
            return time.sleep(3)
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path[6:])
            return self.end_headers()
        body = server.files.get(self.path[1:])
        if body is None:
            return self.send_error(404)
        start = int(asked[6:-1]) if asked and server.mode != "no range" else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.mode != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        n = server.breaks.pop(0) if server.breaks else len(body)
        self.wfile.write(body[start : start + n])
        self.close_connection = True


@pytest.fixture
def serve():
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()


TEXT = "".join(f"Story number {i} is about a cat.\n<|endoftext|>\n" for i in range(3000))


def stories_in(data_dir):
    return [
        [item["story"] for item in json.load(open(path))]
        for path in tinystories.story_files(str(data_dir))
    ]


def tar(names, link=None):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as f:
        for name in names:
            info = tarfile.TarInfo(name)
            body = json.dumps([{"story": name}]).encode()
            info.size = len(body)
            f.addfile(info, io.BytesIO(body))
        if link:
            info = tarfile.TarInfo("data09.json")
            info.type, info.linkname = tarfile.SYMTYPE, link
            f.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    "mode, breaks, ranges",
    [("", [], 0), ("", [50_000, 20_000], 2), ("no range", [50_000], 1), ("no length", [], 0)],
)
def test_download_small(serve, tmp_path, mode, breaks, ranges):
    server = serve({SMALL: TEXT.encode()}, breaks, mode)
    tinystories.download(str(tmp_path), server.url + "/moved", small=True)
    shards = stories_in(tmp_path)
    assert sum(shards, []) == [f"Story number {i} is about a cat." for i in range(3000)]
    assert len(shards) == 3 and len(shards[0]) == 150  # a small one first, for validation
    asked = [r for path, r in server.log if r and not path.startswith("/moved")]
    assert len(asked) == ranges
    if len(breaks) == 2:  # to the last whole chunk of 16 KiB
        assert asked == ["bytes=49152-", "bytes=65536-"]
    assert not list(tmp_path.rglob("*.part")) + list(tmp_path.rglob("*.tmp"))


def test_download_resumes_in_a_later_run(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(tinystories.time, "sleep", lambda s: None)
    server = serve({SMALL: TEXT.encode()}, [20_000] * 5)
    with pytest.raises(OSError, match="run the same command again"):
        tinystories.download(str(tmp_path), server.url, small=True)
    part = tmp_path / "download" / (SMALL + ".part")
    assert part.read_bytes() == TEXT.encode()[: 5 * 16384]
    assert not (tmp_path / "TinyStories_all_data").exists()
    tinystories.download(str(tmp_path), server.url, small=True)
    assert server.log[-1][1] == "bytes=81920-" and len(sum(stories_in(tmp_path), [])) == 3000


@pytest.mark.parametrize("left, fresh", [(len(TEXT), False), (len(TEXT) + 7, True)])
def test_download_with_a_complete_or_foreign_part(serve, tmp_path, left, fresh):
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / (SMALL + ".part")).write_text((TEXT + "x" * 9)[:left])
    server = serve({SMALL: TEXT.encode()})
    tinystories.download(str(tmp_path), server.url, small=True)
    assert len(sum(stories_in(tmp_path), [])) == 3000 and len(server.log) == 1 + fresh


def test_download_archive(serve, tmp_path, capsys):
    names = [f"./data{i:02d}.json" for i in range(3)] + ["./._data00.json", "README"]
    server = serve({BIG: tar(names)})
    tinystories.download(str(tmp_path), server.url)
    assert sorted(os.listdir(tmp_path / "TinyStories_all_data")) == [
        "data00.json",
        "data01.json",
        "data02.json",
    ]
    tinystories.download(str(tmp_path), server.url)  # not again
    assert "exists already" in capsys.readouterr().out and len(server.log) == 1


@pytest.mark.parametrize(
    "body, message",
    [
        (tar(["data00.json", "../evil.json"]), "not to be trusted"),
        (tar(["/tmp/evil.json"]), "not to be trusted"),
        (tar(["a\\..\\..\\evil.json"]), "not to be trusted"),
        (tar(["data00.json"], link="/etc/passwd"), "not to be trusted"),
        (tar(["data00.json"] * 50)[:-40], "damaged"),
        (b"no archive at all", "damaged"),
    ],
)
def test_malicious_or_damaged_archive(serve, tmp_path, body, message):
    server = serve({BIG: body})
    with pytest.raises(ValueError, match=message):
        tinystories.download(str(tmp_path / "in"), server.url)
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["download"]


def test_unreachable_server(serve, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="404 Not Found"):
        tinystories.download(str(tmp_path), serve({}).url)
    monkeypatch.setattr(tinystories, "CONNECT_TIMEOUT", 0.5)
    for url in (serve({}, mode="silent").url, "http://127.0.0.1:9", "http://no.such.host.invalid"):
        start = time.time()
        with pytest.raises(ConnectionError, match="tinystories.py synthesize"):
            tinystories.download(str(tmp_path), url)
        assert time.time() - start < 2
    assert not list(tmp_path.rglob("*.json"))


# -----------------------------------------------------------------------------
# The grammar


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A data folder of 3,000 synthesized stories with a vocabulary of 512 and its shards."""
    folder = tmp_path_factory.mktemp("synthetic")
    tinystories.synthesize(str(folder), 3000, seed=1)
    tinystories.train_vocab(str(folder), 512)
    tinystories.pretokenize(str(folder), 512)
    return folder


def test_synthesize(synthetic, tmp_path, capsys):
    shards = stories_in(synthetic)
    stories = sum(shards, [])
    assert len(set(stories)) == len(stories) == 3000 and len(shards[0]) == 150
    for name, seed in (("same", 1), ("other", 2)):
        tinystories.synthesize(str(tmp_path / name), 3000, seed)
    assert stories_in(tmp_path / "same") == shards
    assert not set(sum(stories_in(tmp_path / "other"), [])) & set(stories)
    # it never overwrites stories
    tinystories.synthesize(str(synthetic), 10, seed=3)
    assert "exists already" in capsys.readouterr().out and stories_in(synthetic) == shards


def test_grammar():
    assert len(grammar.PLANS) >= 30
    words = collections.Counter()
    rng = np.random.default_rng(0)
    used = set()

    def names(parts):
        for part in parts:
            if isinstance(part, tuple):
                used.update([part[1]] if part[0] == "$" else [])
                for option in part[1] if part[0] != "$" else []:
                    names(option)

    for text in [*grammar.PLANS, *grammar.RULES.values()]:
        names(text)
    assert used >= set(grammar.RULES) | set(grammar.SLOTS) - {"at"}  # no dead entry
    for _ in range(5000):
        story = grammar.generate_story(rng.random)
        # nothing of the notation is left; sentences begin and end as they should
        assert not re.search(
            r"[\[\]<>|$/{}]|  |\n\n| [.,!?\n]|\n |\.\.|,\.|\bi\b|\ba [aeiou]", story
        ), story
        assert re.match(r"[A-Z]", story) and re.search(r'[.!?]"?$', story), story
        assert not re.search(r'(?:^|\n|[.!?] )"?[a-z]', story), story
        assert story.count('"') % 2 == 0, story
        words.update(w.removesuffix("'s") for w in re.findall(r"[a-z']+", story.lower()))
    assert 600 < len(words) < 900


def test_story_lengths_vary(synthetic):
    ids = np.concatenate(open_shards(str(synthetic), "train", 512))
    lengths = np.diff(np.flatnonzero(ids == BOS))
    low, q1, q3, high = np.percentile(lengths, [1, 25, 75, 99])
    assert low < 120 and q1 < 200 < q3 and 420 < high and lengths.max() < 640


# -----------------------------------------------------------------------------
# Vocabulary and shards


def oracle(stories, model):
    """As llama2.c encodes: one call per story, with BOS before each."""
    t = Tokenizer(model)
    return np.array([i for s in stories for i in t.encode(s.strip(), True, False)], np.uint16)


def shard(path):
    return np.fromfile(path, "<u2")


def test_pretokenize_equals_encoding_one_by_one(synthetic):
    for path, stories in zip(sorted((synthetic / "tok512").iterdir()), stories_in(synthetic)):
        np.testing.assert_array_equal(shard(path), oracle(stories, synthetic / "tok512.model"))


def test_pretokenize_real_stories(real_stories, tok512_model, tmp_path):
    os.symlink(real_stories, tmp_path / "TinyStories_all_data")
    (tmp_path / "tok512.model").write_bytes(tok512_model.read_bytes())
    tinystories.pretokenize(str(tmp_path), 512)
    ids = shard(tmp_path / "tok512/data00.bin")
    assert len(ids) == 268_074  # as measured with llama2.c
    np.testing.assert_array_equal(ids, oracle(stories_in(tmp_path)[0], tok512_model))


ODD = [
    "  spaces  within   and around ",
    "한국어 😀",
    "tab\tand\nnewlines\n",
    "▁ ▁▁",
    "<s> </s>",
    "a",
    "x" * 300_000,
    "é " * 2000,
    "a b  c\u00a0d",
]


@pytest.mark.parametrize("by_word", [True, False])
@pytest.mark.parametrize(
    "model", ["synthetic", "stories260K/tok512.model", "llama2/tokenizer.model"]
)
def test_encoder(synthetic, model, by_word):
    path = synthetic / "tok512.model" if model == "synthetic" else data_file(model)
    encoder = tinystories.Encoder(path)
    assert encoder.by_word
    encoder.by_word = by_word
    stories = [s.strip() for s in ODD] + ["", "b  c", "\u2581b \u2581"]
    for _ in range(2):  # the second time from the cache
        np.testing.assert_array_equal(np.frombuffer(encoder(stories), "<u2"), oracle(stories, path))


@pytest.mark.parametrize("options", [dict(), dict(model_type="unigram")], ids=["bpe", "unigram"])
def test_encoder_of_a_vocabulary_without_a_space_in_front(tmp_path, options):
    """A SentencePiece model that puts no space in front of a text has other ids for a word alone
    than for the word after a space."""
    text = ["Once upon a time there was a cat.", "The  cat sat on   the mat."]
    model = io.BytesIO()
    options = dict(model_type="bpe", add_dummy_prefix=False, minloglevel=2) | options
    options |= dict(remove_extra_whitespaces=False, byte_fallback=True, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=300, **options
    )
    (tmp_path / "own.model").write_bytes(model.getvalue())
    ids = np.frombuffer(tinystories.Encoder(tmp_path / "own.model")(text), "<u2")
    np.testing.assert_array_equal(ids, oracle(text, tmp_path / "own.model"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
def test_user_text_files(tmp_path, kind):
    stories = ODD + [f"The {i}th story is short." for i in range(50)]
    if kind == "jsonl":
        text = "\n".join(json.dumps(s if i % 2 else {"text": s}) for i, s in enumerate(stories))
    elif kind == "json":
        text = json.dumps([{"story": s, "source": "me"} for s in stories])
    else:
        text = "\n<|endoftext|>\n".join(stories)
    path = tmp_path / f"mine.{kind}"
    path.write_text(text, encoding="utf-8")
    assert list(tinystories.read_stories(str(path))) == [s.strip() for s in stories]
    tinystories.train_vocab(str(tmp_path), 400)
    tinystories.pretokenize(str(tmp_path), 400)
    ids = shard(tmp_path / "tok400/mine.bin")
    np.testing.assert_array_equal(ids, oracle(stories, tmp_path / "tok400.model"))
    # a single file is split: training text first, then validation
    parts = [open_shards(str(tmp_path), split, 400) for split in ("train", "val")]
    np.testing.assert_array_equal(np.concatenate(sum(parts, [])), ids)
    assert parts[1][0][0] == BOS and 0 < len(parts[1][0]) < len(parts[0][0])


def test_a_validation_file_longer_than_the_training_files_is_named(tmp_path, capsys):
    """train.txt and valid.txt: by name, the first one is for validation."""
    for name, n in (("train.txt", 300), ("valid.txt", 100)):
        (tmp_path / name).write_text("\n\n".join(f"Tim had {i} red balls." for i in range(n)))
    for text in (f"note: {tmp_path}/train.txt, the first file by name, is for validation", ""):
        tinystories.train_vocab(str(tmp_path), 280)
        trained = capsys.readouterr().err
        tinystories.pretokenize(str(tmp_path), 280)
        for said in trained, capsys.readouterr().err:
            assert text in said and ("is for validation" in said) == bool(text)
        if text:
            (tmp_path / "valid.txt").rename(tmp_path / "a.txt")
            (tmp_path / "tok280/valid.bin").unlink()


def test_many_small_files_are_read_as_one(tmp_path, capsys):
    """A folder with a .txt file per text: no text fills a window, and the first one is too short
    for validation. Every token is in one of the two parts, and prompts begin at texts."""
    texts = [
        f"Tim had {i} red balls. He gave {i // 2} to Sue and lost the others." for i in range(300)
    ]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03}.txt").write_text(text)
    tinystories.train_vocab(str(tmp_path), 280)
    tinystories.pretokenize(str(tmp_path), 280)
    assert "the 300 small shards are read as one" in capsys.readouterr().out
    ids = oracle(texts, tmp_path / "tok280.model")
    [train], [val] = (open_shards(str(tmp_path), split, 280) for split in ("train", "val"))
    np.testing.assert_array_equal(np.concatenate([train, val]), ids)
    assert 0 < len(val) < len(train) and val[0] == BOS
    for split, part in ("train", train), ("val", val):
        assert len(Windows(str(tmp_path), split, 256, 280)) == (len(part) - 1) // 256 > 0
        assert len(Prompts(str(tmp_path), split, 30, 280)) == (part == BOS).sum() > 10
    for i in range(20, 300):  # few files: one shard each, the first for validation
        (tmp_path / f"tok280/{i:03}.bin").unlink()
    assert len(open_shards(str(tmp_path), "train", 280)) == 19


def test_every_story_file_is_trained_on_whatever_its_name(tmp_path):
    """Names that files for run.c have too, and names of tokenizers."""
    names = ("a", "language_model", "model", "tok7", "x")
    texts = {n: [f"{n} saw {i} red balls in the tree." for i in range(60)] for n in names}
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps([{"story": t} for t in texts[name]]))
    tinystories.train_vocab(str(tmp_path), 280)
    tinystories.pretokenize(str(tmp_path), 280)
    (tmp_path / "tok280/x.model").touch()
    shards = [ids for part in ("val", "train") for ids in open_shards(str(tmp_path), part, 280)]
    expected = [oracle(texts[n], tmp_path / "tok280.model") for n in names]
    for found, ids in zip(shards, expected, strict=True):
        np.testing.assert_array_equal(found, ids)
    (tmp_path / "tok280/old_model.bin").write_bytes(b"for run.c")  # no story file has this name
    assert len(open_shards(str(tmp_path), "train", 280)) == len(names) - 1


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '"one"\n\n{"text": "two\n"three"', r"line 3: not JSON: Unterminated string"),
        ("a.jsonl", '"one"\n{"text": null}\n', r'line 2: expected a string.* not {"text": null}'),
        ("a.jsonl", '"one"\n\n["two"]\n', r'line 3: expected a string.* not \["two"\]'),
        ("a.jsonl", '"one"\n"\udcff"\n', "line 2: .*utf-8"),
        ("a.jsonl", '"one"\n' + "[" * 100_000, "line 2: not JSON"),
        ("a.jsonl", '"one"\n{"text": "two", "text": "three"}', 'line 2: not JSON: .* "text" twice'),
        (
            "a.json",
            '["one",\n"two",\n{"texts": "three"}]',
            'line 3: .*"story" or "text", not {"texts"',
        ),
        ("a.json", '["one",\n\n"two" "three"]', "line 3: not JSON: expected , or ]"),
        (
            "a.json",
            '{"data": [{"text": "one"}, {"text": 2}]}',
            'item 2 of "data": expected a string',
        ),
        ("a.json", '{"data": ["one"]}', 'line 1: expected a string.* not {"data"'),
        ("a.txt", "one\n\ntwo\n\udcff", "line 4: not UTF-8"),
    ],
)
def test_mistakes_in_stories_name_the_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{name}, {message}") as e:
        list(tinystories.read_stories(str(path)))
    assert len(str(e.value)) < 250


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", '["One.", {"story": "Two."}]'),
        ("a.json", '"One."\n{"text": "Two."}\n'),
        ("a.json", '{"story": null, "text": "One."}{"text": "Two."}'),
        ("a.json", '{"n": 2, "data": [{"text": "One."},\n {"text": "Two."}]}'),
        ("a.jsonl", '"One."\n\n{"text": "Two."}'),
        ("a.txt", "One.\r\n\r\nTwo.\r\n"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_layouts_of_files_of_stories(tmp_path, name, text, mark):
    (tmp_path / name).write_bytes((mark + text).encode())
    assert list(tinystories.read_stories(str(tmp_path / name))) == ["One.", "Two."]


def test_long_lines_are_used_in_full(tmp_path):
    """SentencePiece ignores lines of more than a million bytes: the words that only these have are
    learnt all the same, and a corpus that is one line, as text8 is, works."""
    long = "quokka zebra jumps over my lazy wombat and wins a prize " * 20_000
    assert len(long) > 1 << 20
    for name, text in ("alone", long), ("among", f"A cat sat.\n{long}\nIt slept.\n" * 2):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.txt").write_text(text)
        tinystories.train_vocab(str(folder), 330)
        tinystories.pretokenize(str(folder), 330)
        t = Tokenizer(folder / "tok330.model")
        pieces = {t.sp.id_to_piece(i) for i in range(t.n_words)}
        assert {"\u2581quokka", "\u2581wombat", "\u2581zebra"} <= pieces
        ids = shard(folder / "tok330/a.bin")
        np.testing.assert_array_equal(ids, oracle([text], folder / "tok330.model"))


def test_a_vocabulary_is_trained_on_max_chars(tmp_path, capsys):
    """Also where one story is longer than that."""
    (tmp_path / "a.txt").write_text("ab ba " * 20_000 + "zz " * 20_000)
    tinystories.train_vocab(str(tmp_path), 266, max_chars=60_000)
    assert "on 60,000 characters" in capsys.readouterr().out
    t = Tokenizer(tmp_path / "tok266.model")
    assert "\u2581ab" in map(t.sp.id_to_piece, range(266))
    assert not any("z" in t.sp.id_to_piece(i) for i in range(266))


def test_short_lines():
    for line in (
        "",
        "ab",
        "ab cd  ef   ",
        "x" * 100,
        " x" * 50,
        " " * 80 + "y",
        "ab " * 33 + "x" * 30,
    ):
        pieces = list(tinystories.short_lines(line, 10))
        assert all(len(p) <= 10 for p in pieces)
        assert "".join(pieces).replace(" ", "") == line.replace(" ", "")
        whole = [w for w in line.split() if len(w) < 10]
        assert collections.Counter(whole) <= collections.Counter(" ".join(pieces).split())


def test_long_stories_are_encoded_word_by_word(synthetic, monkeypatch):
    """Also where spaces meet, so that memory does not grow with the length of a line."""
    encoder = tinystories.Encoder(synthetic / "tok512.model")
    encode, longest = encoder.tokenizer.encode, []

    def watched(text, *args, **kwargs):
        longest.append(len(text))
        return encode(text, *args, **kwargs)

    monkeypatch.setattr(encoder.tokenizer, "encode", watched)
    story = "A  cat   sat on the mat.  " * 1000 + "end"
    ids = np.frombuffer(encoder([story]), "<u2")
    np.testing.assert_array_equal(ids, oracle([story], synthetic / "tok512.model"))
    assert max(longest) < 10


def test_a_single_file_is_announced(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A cat sat on a mat.\n\n" * 300)
    tinystories.train_vocab(str(tmp_path), 275)
    tinystories.pretokenize(str(tmp_path), 275)
    assert "only one file" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("A dog ran.")
    tinystories.pretokenize(str(tmp_path), 275)
    assert "only one file" not in capsys.readouterr().out


def test_txt_without_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\nStill one.\n\nTwo.\n \n\nThree.\n")
    assert list(tinystories.read_stories(str(path))) == ["One.\nStill one.", "Two.", "Three."]


def test_vocabulary_of_many_characters(tmp_path):
    """More different characters than tokens: the rare ones fall back to their bytes."""
    text = "가나다라 마바사 " * 500 + "".join(chr(0xAC00 + i) for i in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tinystories.train_vocab(str(tmp_path), 300)
    t = Tokenizer(tmp_path / "tok300.model")
    assert t.n_words == 300 and t.decode(t.encode(text, True, False)) == text


def test_up_to_date_shards_are_kept(synthetic, tmp_path):
    os.symlink(synthetic / "TinyStories_all_data", tmp_path / "TinyStories_all_data")
    (tmp_path / "tok512.model").write_bytes((synthetic / "tok512.model").read_bytes())
    (tmp_path / "tok512").mkdir()
    # shards without a record are kept if they are newer and begin as the stories do
    start = oracle(stories_in(tmp_path)[0][:2], tmp_path / "tok512.model").tobytes()
    (tmp_path / "tok512/data00.bin").write_bytes(start)
    old = tmp_path / "tok512/data01.bin"
    old.write_bytes(b"old")
    os.utime(old, (1, 1))
    tinystories.pretokenize(str(tmp_path), 512)
    assert (tmp_path / "tok512/data00.bin").read_bytes() == start and len(shard(old)) > 1000
    os.remove(tmp_path / "tok512/shards.meta")
    (tmp_path / "tok512/data00.bin").write_bytes(start[:4] + start[2:])
    tinystories.pretokenize(str(tmp_path), 512)
    assert len(shard(tmp_path / "tok512/data00.bin")) > 1000


def test_models_in_the_data_folder_are_no_shards(synthetic):
    """One folder may be --data_dir and --out_dir: training writes model.bin there."""
    names = ["model.bin", "sft_model.bin", "tok512.bin", "tokenizer.bin", "tok512.0a1b2c3d.bin"]
    names += ["mine.bin", "mine.model"]  # which `tokenizer.py -t mine.model` has written
    shards = tinystories.shard_paths(str(synthetic), 512)
    try:
        for name in names:
            (synthetic / name).write_bytes(b"24ka" + bytes(60))
        assert tinystories.shard_paths(str(synthetic), 512) == shards != []
        assert tinystories.bin_files(str(synthetic)) == []
    finally:
        for name in names:
            (synthetic / name).unlink()


def test_interrupted_pretokenize_leaves_no_half_shard(tmp_path, synthetic, monkeypatch):
    (tmp_path / "tok512.model").write_bytes((synthetic / "tok512.model").read_bytes())
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("A cat sat.\n\n" * 100_000)
    real = tinystories.encode_files

    def interrupted(*args, **kwargs):
        for n, result in enumerate(real(*args, **kwargs)):
            if n == 7:  # within the second file
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(tinystories, "encode_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tinystories.pretokenize(str(tmp_path), 512)
    assert sorted(os.listdir(tmp_path / "tok512")) == ["a.bin", tinystories.META]
    assert (shard(tmp_path / "tok512/a.bin") == BOS).sum() == 100_000


def test_json_with_surrogates(tmp_path):
    (tmp_path / "a.json").write_text('["a \\ud800 b", {"story": "c"}]')
    assert list(tinystories.read_stories(str(tmp_path / "a.json"))) == ["a ? b", "c"]


def test_killed_worker(tmp_path, synthetic, monkeypatch):
    (tmp_path / "tok512.model").write_bytes((synthetic / "tok512.model").read_bytes())
    (tmp_path / "a.txt").write_text("A cat sat.")
    monkeypatch.setattr(tinystories.Encoder, "__call__", lambda self, stories: os._exit(9))
    with pytest.raises(OSError, match="run the same command again"):
        tinystories.pretokenize(str(tmp_path), 512)
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no stories"),
        ({"a.json": "[{]"}, "a.json"),
        ({"a.json": "5"}, "a.json"),
        ({"a.json": '[{"texts": "x"}]'}, 'an object with "story"'),
        ({"a.txt": " \n"}, "a.txt has no stories"),
        ({"a.txt": b"\xff\xfe"}, "a.txt"),
        ({"a.jsonl": '{"text": 5}'}, "a.jsonl"),
        ({"a.txt": "x", "a.json": '["x"]'}, "differ only"),
    ],
)
def test_bad_stories(synthetic, tmp_path, files, message):
    (tmp_path / "tok512.model").write_bytes((synthetic / "tok512.model").read_bytes())
    for name, body in files.items():
        (tmp_path / name).write_bytes(body if isinstance(body, bytes) else body.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tinystories.pretokenize(str(tmp_path), 512)
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.tmp"))


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("A cat sat.")
    with pytest.raises(ValueError, match="a.txt is a file: name the folder"):
        tinystories.train_vocab(str(tmp_path / "a.txt"), 300)
    with pytest.raises(ValueError, match="a.txt is a file: text is read from a folder; --sft"):
        tinystories.shards_tokenizer(str(tmp_path / "a.txt"), 300)


def test_commands(tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, str(ROOT / "tinystories.py"), *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    assert run("synthesize", "--stories=200").returncode == 0
    assert run("train_vocab", "--vocab_size=512").returncode == 0
    assert run("pretokenize", "--vocab_size=512").returncode == 0
    assert len(Windows(str(tmp_path / "data"), "train", 64, 512)) > 100
    for args, status, message in (
        ([], 2, "required: command, one of download, "),
        (["train_vocab"], 1, "needs --vocab_size"),
        (["train_vocab", "--vocab_size=20"], 1, "of 20: Vocabulary size is smaller than"),
        (["train_vocab", "--vocab_size=60000"], 1, "cannot train a vocabulary of 60000"),
        (["pretokenize"], 1, "tokenizer.model"),
        (["pretokenize", "--vocab_size=64"], 1, "train_vocab --vocab_size=64"),
        (["pretokenize", "--vocab_size=64", "--data_dir=nowhere"], 1, "nowhere"),
        (["synthesize", "--story=5"], 2, "did you mean --stories?"),
        (["download", "--data_dir=new", "--url=http://127.0.0.1:9"], 1, "synthesize"),
    ):
        r = run(*args)
        assert r.returncode == status and message in r.stderr, r.stderr
        assert r.stderr.count("\n") == 1, r.stderr
    assert "--vocab_size" in run("--help").stdout


# -----------------------------------------------------------------------------
# Sampling


def write(folder, *shards):
    folder.mkdir(parents=True, exist_ok=True)
    for i, ids in enumerate(shards):
        np.asarray(ids, "<u2").tofile(folder / f"data{i:02d}.bin")
    return str(folder)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 1000, 4097])
def test_permute_is_a_permutation(n):
    for key in (0, 1, 2**64 - 1):
        i = permute(np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64))
        assert sorted(i.tolist()) == list(range(n))


def test_permute_looks_random():
    """Over many keys each item lands everywhere equally often (chi-square, 99 degrees)."""
    i = np.tile(np.arange(10, dtype=np.uint64), 20_000)
    to = permute(i, 10, np.repeat(np.arange(20_000, dtype=np.uint64) * 7919, 10))
    counts = np.zeros((10, 10))
    np.add.at(counts, (i.astype(int), to.astype(int)), 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 125  # 81 free; mean 81, sd 13


def numbered(tmp_path):
    """Shards whose token ids identify the shard and the position."""
    return write(
        tmp_path / "n", range(100, 300), range(1000, 2003), range(3000, 3007), range(4000, 4517)
    )


def test_every_window_once_per_epoch(tmp_path):
    w = Windows(numbered(tmp_path), "train", seq_len=10, vocab_size=5000, seed=3)
    expected = [
        s + 10 * i for s, n in ((1000, 1003), (3000, 7), (4000, 517)) for i in range((n - 1) // 10)
    ]
    assert len(w) == len(expected) == 100 + 0 + 51
    orders = []
    for epoch in range(3):
        x, y = (t.numpy() for t in w.batch(epoch * len(w), len(w)))
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(x, x[:, :1] + np.arange(10))
        orders.append(x[:, 0].tolist())
        assert sorted(orders[-1]) == expected != orders[-1]
    assert orders[0] != orders[1] != orders[2]
    other = Windows(numbered(tmp_path), "train", 10, 5000, seed=4)
    assert other.batch(0, len(w))[0][:, 0].tolist() != orders[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_resume(tmp_path, world):
    """However the batches are cut and whenever the run was resumed, the same windows come."""
    folder = numbered(tmp_path)
    straight = Windows(folder, "train", 10, 5000).batch(0, 520)[0]
    for stop in (0, 24, 240):
        got = []
        for position in range(stop, 480, 8 * world):
            for rank in range(world):  # a new object each time: a process that was restarted
                w = Windows(folder, "train", 10, 5000)
                got += w.batch(position + rank * 8, 8)[0].tolist()
        assert got == straight[stop : stop + len(got)].tolist() and len(got) >= 480 - stop - 31


def test_validation_windows_are_the_same_for_each_seed(tmp_path):
    w = Windows(numbered(tmp_path), "val", 10, 5000)
    assert len(w) == 19
    every = w.batch(0, 19)[0]
    assert sorted(every[:, 0].tolist()) == list(range(100, 290, 10))
    other = Windows(numbered(tmp_path), "val", 10, 5000, seed=7)
    assert other.batch(0, 8)[0].tolist() == every[:8].tolist()


def test_weighted_folders(tmp_path):
    a, b = (write(tmp_path / n, [1], range(s, s + 1001)) for n, s in (("a", 1000), ("b", 3000)))
    w = Windows(f"{a}:0.7,{b}:0.3", "train", 10, 5000)
    first = w.batch(0, 1000)[0][:, 0]
    assert (first < 3000).sum() == 700
    for part in first.split(100):  # and evenly so
        assert abs((part < 3000).sum() - 70) <= 1
    assert len(w) == 142 and len(set(first[:142].tolist())) == 142  # then folder a starts over
    epoch = first[first < 3000][:100].tolist()
    assert sorted(epoch) == list(range(1000, 2000, 10))
    even = Windows(f"{a},{b}", "train", 10, 5000)
    assert (even.batch(0, 100)[0][:, 0] < 3000).sum() == 50
    again = Windows(f"{a}:0.7,{b}:0.3", "train", 10, 5000, seed=3)
    assert even.checksum() != w.checksum() == again.checksum()
    for bad in (f"{a}:0,{b}:1", f"{a}:-1,{b}:1", f"{a}:nan,{b}:1", f"{a}:0.0001,{b}:1"):
        with pytest.raises(ValueError, match="weight"):
            Windows(bad, "train", 10, 5000)


def test_sampler_shares():
    for weights in ([1.0], [1 / 3] * 3, [0.9985, 0.0015], [0.125, 0.25, 0.625]):
        s = Sampler([[100]] * len(weights), weights, 0)
        assert s.share.sum() == s.BLOCK and abs(s.share / s.BLOCK - weights).max() <= 1e-3


def test_prompts(tmp_path):
    stories = [[BOS] + [1000 + 50 * i + j for j in range(i % 40)] for i in range(200)]
    folder = write(tmp_path / "p", [BOS, 5], sum(stories, []))
    p = Prompts(folder, "train", start_len=30, vocab_size=12000, seed=0)
    assert len(p) == 200
    prompts = p.batch(0, 200)
    for prompt in prompts:
        assert any(prompt == story[: len(prompt)] for story in stories) and len(prompt) <= 30
    begun = [prompt[1] for prompt in prompts if len(prompt) > 1]
    assert len(begun) == len(set(begun))  # no story twice
    assert p.batch(37, 50) == prompts[37:87]
    assert Prompts(folder, "train", 30, 12000, seed=1).batch(0, 200) != prompts
    assert all(q == [BOS] for q in Prompts(folder, "train", 1, 12000).batch(0, 50))
    # lengths are uniform over 1 .. start_len where the story is long enough (chi-square)
    folder = write(tmp_path / "q", [BOS, 5], ([BOS] + [7] * 50) * 3000)
    lengths = [len(q) for q in Prompts(folder, "train", 30, 512).batch(0, 3000)]
    counts = np.bincount(lengths, minlength=31)[1:]
    assert len(counts) == 30 and ((counts - 100) ** 2 / 100).sum() < 60
    with pytest.raises(ValueError, match="start_len"):
        Prompts(folder, "train", 0, 512)
    with pytest.raises(ValueError, match="no beginning of a text"):
        Prompts(write(tmp_path / "r", [5], [6, 7]), "train", 30, 512)


def test_bad_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretokenize --vocab_size=512"):
        Windows(str(tmp_path), "train", 10, 512)
    folder = write(tmp_path / "bad", range(100), range(1000))
    with pytest.raises(ValueError, match="data01.bin has token 999.*another tokenizer"):
        Windows(folder, "train", 10, 512)
    Windows(folder, "val", 10, 512)
    with pytest.raises(
        ValueError, match="train part has the 1001 tokens of a window .*1000 tokens in all"
    ):
        Windows(folder, "train", 1000, 1000)
    for size in (0, 201):
        (tmp_path / "bad/data01.bin").write_bytes(b"\0" * size)
        with pytest.raises(ValueError, match=f"data01.bin has {size} bytes"):
            Windows(folder, "train", 10, 512)
