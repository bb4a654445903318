"""
The pretraining data: downloads stories, trains a vocabulary, tokenizes the stories into shards, and
samples windows and prompts from the shards.

    python tinystories.py download                        # the TinyStories data set, or:
    python tinystories.py synthesize                      # synthetic stories, offline
    python tinystories.py train_vocab --vocab_size=512    # writes data/tok512.model
    python tinystories.py pretokenize --vocab_size=512    # writes data/tok512/*.bin

Without --vocab_size, pretokenize uses Llama 2's vocabulary (tokenizer.model). To train on other
text, put .txt, .json or .jsonl files into a folder and name it with --data_dir. The first file by
name is for validation; a single file is split, and its end is for validation. JSON items are
strings, or objects with "story" or "text". Stories in a .txt file are separated by <|endoftext|>
or, if the file has none, by blank lines.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import tarfile
import threading
import time
import urllib.parse
import zlib

import common  # noqa: F401  first: it reports missing packages

# isort: split
import numpy as np
import sentencepiece
from tqdm import tqdm

from common import boolean, flags_of_others, note, parse_args, read_json, run_main, write_atomic
from experiments.grammar import generate_story
from tokenizer import Tokenizer, find_tokenizer, hashed_name, note_ordinary

META = "shards.meta"  # JSON file in the folder of the shards, see read_meta
BOS = 1  # id of the token before every story in a shard
END_OF_TEXT = "<|endoftext|>"

# -----------------------------------------------------------------------------
# Files of stories


def stories_folder(data_dir):
    """The folder of the stories: llama2.c's subfolder if `data_dir` has it, else `data_dir`."""
    folder = os.path.join(data_dir, "TinyStories_all_data")
    return folder if os.path.isdir(folder) else data_dir


def story_files(data_dir):
    """Paths of all story files in a data folder, sorted by name. Raises FileNotFoundError, or
    ValueError for a file."""
    folder = stories_folder(data_dir)
    files = sorted(
        path
        for path in glob.glob(glob.escape(folder) + "/*")
        if path.lower().endswith((".json", ".jsonl", ".txt"))
        and os.path.basename(path) not in ("tokenizer.json", "tokenizer_config.json")
    )
    if not files:
        if os.path.isfile(folder):
            raise ValueError(f"{folder} is a file: name the folder that it is in")
        if not os.path.isdir(folder):
            folder += ", which does not exist"
        raise FileNotFoundError(
            f"no stories (.json, .jsonl, .txt) in {folder}; get some with: "
            "python tinystories.py download, or offline: synthesize"
        )
    return files


def check_order(files):
    """Prints a line if the file for validation has more text than those for training."""
    first, *others = files
    if others and os.path.getsize(first) > sum(map(os.path.getsize, others)):
        note(
            f"{first}, the first file by name, is for validation, but it has more text than "
            "the other files together; rename it to train on it"
        )


def read_text(path):
    """
    The text of a file without the byte order mark. Raises ValueError that names the line that is
    not UTF-8.
    """
    with open(path, encoding="utf-8-sig") as f:
        try:
            return f.read()
        except UnicodeDecodeError as e:
            line = 1 + e.object.count(b"\n", 0, e.start)
            raise ValueError(f"{path}, line {line}: not UTF-8 text: {e}") from None


def items(path, keys):
    """
    Yields (position, value) of each item of a JSON or JSONL file, with positions such as "line 3",
    or "line 1, item 2" where items of a list share a line. The file is a list, a sequence of
    objects that may each span several lines, or a single object that has none of `keys` and
    contains the list, such as {"data": [...]}. Raises ValueError that names the line that is not
    JSON.
    """
    text = read_text(path)
    decoder, space = json.JSONDecoder(object_pairs_hook=unique_keys), re.compile(r"\s*")
    is_list = text.lstrip().startswith("[")
    end_mark = "]" if is_list else ""
    at = space.match(text, text.index("[") + 1 if is_list else 0).end()
    line, above, n = 1 + text.count("\n", 0, at), 0, 0
    try:
        while text[at : at + 1] != end_mark:
            start, (item, end) = at, decoder.raw_decode(text, at)
            at = space.match(text, end).end()
            names = lists_in(item, keys) if not is_list and at == len(text) else []
            if len(names) > 1:
                raise ValueError(
                    f"{path} has several lists, {quoted(names)}: write each to a file of its own"
                )
            if names:
                for i, inner in enumerate(item[names[0]], 1):
                    yield f"item {i} of {quoted(names)}", inner
                return
            n += 1
            yield f"line {line}" + f", item {n}" * (is_list and line == above), item
            above = line
            if is_list:
                comma = text[at : at + 1] == ","
                if not comma and text[at : at + 1] != "]":
                    raise json.JSONDecodeError("expected , or ] after an item", text, end)
                at = space.match(text, at + comma).end()
                if comma and text[at : at + 1] == "]":
                    raise json.JSONDecodeError("expected an item after the comma", text, at)
            line += text.count("\n", start, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("unexpected text after the list", text, at + 1)
    except json.JSONDecodeError as e:
        # the error may be in a later line than the start of the broken item
        noticed = f" (noticed in line {e.lineno})" if e.doc and e.lineno != line else ""
        raise ValueError(f"{path}, line {line}: not JSON: {e.msg}{noticed}") from None
    except RecursionError:
        raise ValueError(f"{path}, line {line}: not JSON: nested too deeply") from None


def unique_keys(pairs):
    """A JSON object as a dict. Raises JSONDecodeError if it has a key twice: json would silently
    drop the first value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = collections.Counter(k for k, _ in pairs).most_common(1)
        raise json.JSONDecodeError(f"an object has the key {quoted([key])} twice", "", 0)
    return value


def lists_in(item, keys):
    """The keys of all lists of objects in `item`, unless it has one of `keys`."""

    def has_objects(v):
        return isinstance(v, list) and v and all(isinstance(x, dict) for x in v)

    if not isinstance(item, dict) or keys & item.keys():
        return []
    return [k for k, v in item.items() if has_objects(v) and not {"role", "from"} & v[0].keys()]


def quoted(keys):
    """A list of keys for an error message, shortened to 12 keys."""
    keys = [json.dumps(k[:40], ensure_ascii=False) for k in keys]
    return ", ".join(keys[:12] + ["..."] * (len(keys) > 12)) or "no keys"


def story_items(path):
    """Yields (position, value) of each item of a story file; the position is "" in a .txt file."""
    if path.lower().endswith(".json"):
        yield from items(path, keys={"story", "text"})
    elif path.lower().endswith(".jsonl"):  # line by line, as the file may be larger than the memory
        with open(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    if line := line.decode("utf-8-sig").strip():
                        yield f"line {n}", json.loads(line, object_pairs_hook=unique_keys)
                except (ValueError, RecursionError) as e:
                    reason = getattr(e, "msg", e)  # `msg` has no line number
                    raise ValueError(f"{path}, line {n}: not JSON: {reason}") from None
    else:
        text = read_text(path)
        for story in text.split(END_OF_TEXT) if END_OF_TEXT in text else re.split(r"\n\s*\n", text):
            yield "", story


def read_stories(path):
    """
    Yields the stories of one file, stripped. Raises ValueError if the file has no stories or if an
    item is not text.
    """
    empty = True
    for position, item in story_items(path):
        story = item
        if isinstance(item, dict):
            story = next((item[k] for k in ("story", "text") if item.get(k) is not None), None)
        if not isinstance(story, str):
            shown = json.dumps(item, ensure_ascii=False)
            shown = shown[:50] + "..." * (len(shown) > 50)
            raise ValueError(
                f"{path}, {position}: expected a string or an object with "
                f'"story" or "text", not {shown}'
            )
        story = story.strip().encode(errors="replace").decode()  # JSON allows surrogates
        if story:
            empty = False
            yield story
    if empty:
        raise ValueError(f"{path} has no stories")


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that is renamed to `folder` on success and removed on an exception."""
    temporary = folder + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    os.makedirs(temporary)
    try:
        yield temporary
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_shards(folder, stories):
    """
    Write stories in the layout of TinyStories_all_data: data00.json, which is small and for
    validation, then data01.json and so on with 2,500 stories per file.
    """
    n_val = min(1000, max(1, len(stories) // 20))
    cuts = [0, *range(n_val, len(stories), 2500), len(stories)]
    with new_folder(folder) as temporary:
        for i, (start, end) in enumerate(zip(cuts, cuts[1:])):
            with open(os.path.join(temporary, f"data{i:02d}.json"), "w", encoding="utf-8") as f:
                json.dump([{"story": story} for story in stories[start:end]], f)
    print(f"wrote {len(stories):,} stories to {folder}, in {len(cuts) - 1} shards")


# -----------------------------------------------------------------------------
# The TinyStories data set

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
CONNECT_TIMEOUT = 10  # seconds


def connect(url, start):
    """The server's response for `url` from byte `start` on. Raises ConnectionError."""
    import requests  # here, because nothing else needs it

    responses = []

    def get():
        try:
            responses.append(
                requests.get(
                    url,
                    stream=True,
                    timeout=(CONNECT_TIMEOUT, 30),
                    headers={
                        "Accept-Encoding": "identity",
                        **({"Range": f"bytes={start}-"} if start else {}),
                    },
                )
            )
        except requests.RequestException:
            pass

    # A thread, because the timeout of `requests` does not limit name resolution and redirects.
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT)
    if not responses:
        raise ConnectionError(
            f"no connection to {urllib.parse.urlsplit(url).netloc or url}; "
            "for synthetic stories without a connection: python tinystories.py synthesize"
        )
    return responses[0]


def fetch(url, path):
    """
    Download `url` to `path`. The file is named path.part until it is complete; an interrupted
    transfer resumes from its end. Raises OSError.
    """
    import requests

    part = path + ".part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for attempt in range(5):
        time.sleep(attempt / 4)
        start = os.path.getsize(part) if os.path.exists(part) else 0
        with connect(url, start) as response:
            # "bytes 5-9/10", or "bytes */10" if the file has no bytes from `start` on
            span = re.match(r"bytes (\d+|\*).*/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code == 200:  # the complete file, even if a range was requested
                start, total = 0, int(response.headers.get("Content-Length", -1))
            elif response.status_code == 206 and span and span[1] == str(start):
                total = int(span[2])
            elif response.status_code in (206, 416) and start:
                if not (span and span[1] == "*" and int(span[2]) == start):
                    os.remove(part)  # part of another file: start over
                    continue
                total = start
            else:
                raise OSError(f"{url}: the server answers {response.status_code} {response.reason}")
            interrupted = False
            with (
                open(part, "ab" if start else "wb") as f,
                progress(os.path.basename(path), max(total, 0), initial=start) as bar,
            ):
                try:
                    for chunk in response.iter_content(1 << 14) if start != total else ():
                        f.write(chunk)
                        bar.update(len(chunk))
                except requests.RequestException:
                    interrupted = True
                f.flush()
                os.fsync(f.fileno())
        size = os.path.getsize(part)
        if size == total or total < 0 and not interrupted:
            return os.replace(part, path)
        if size > total >= 0:
            os.remove(part)
    raise OSError(
        f"{url}: the transfer was interrupted {attempt + 1} times; "
        "run the same command again to resume it"
    )


def unpack(archive, folder):
    """
    Extract the .json files of a tar archive into `folder`, without subfolders. Raises ValueError
    for a damaged archive and for links and paths that lead out of the archive.
    """
    try:
        with new_folder(folder) as temporary, tarfile.open(archive) as tar:
            for member in progress("unpacking", unit="file", items=tar):
                parts = member.name.replace("\\", "/").split("/")
                if (
                    member.name.startswith("/")
                    or ".." in parts
                    or not (member.isfile() or member.isdir())
                ):
                    raise ValueError(
                        f"{archive} is not to be trusted: {member.name!r} is a link or leads "
                        "out of the archive's folder; nothing was unpacked: delete the archive"
                    )
                if member.isfile() and re.fullmatch(r"[^.].*\.json", parts[-1]):
                    with open(os.path.join(temporary, parts[-1]), "wb") as f:
                        shutil.copyfileobj(tar.extractfile(member), f)
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise ValueError(f"{archive} is damaged ({e}); delete it and download it again") from None


def download(data_dir, url=URL, small=False):
    """
    Download the data set as llama2.c uses it (1.6 GB), or with `small` only the 22 MB of validation
    stories, which become training and validation shards.
    """
    folder = os.path.join(data_dir, "TinyStories_all_data")
    if os.path.isdir(folder):
        return print(f"{folder} exists already; delete it to download it again")
    name = "TinyStoriesV2-GPT4-valid.txt" if small else "TinyStories_all_data.tar.gz"
    path = os.path.join(data_dir, "download", name)
    if not os.path.exists(path):
        fetch(f"{url}/{name}", path)
    if small:
        write_shards(folder, list(read_stories(path)))
    else:
        unpack(path, folder)
        print(f"unpacked {len(story_files(data_dir))} shards to {folder}")


def progress(title, total=None, unit="B", items=None, **options):
    """A progress bar with rate and remaining time; it appears on a terminal only."""
    return tqdm(items, desc=title, total=total, unit=unit, unit_scale=True, disable=None, **options)


def synthesize(data_dir, n, seed):
    """
    Write n different synthetic stories; the same seed gives the same stories on every machine.
    """
    folder = os.path.join(data_dir, "TinyStories_all_data")
    if os.path.isdir(folder):
        return print(f"{folder} exists already; delete it to synthesize other stories")
    if n < 2:
        raise ValueError(f"--stories must be at least 2, not {n}")
    rand, stories = random.Random(seed).random, {}  # a dict is a set that keeps the order
    with progress("synthesizing", n, "story") as bar:
        while len(stories) < n:
            stories[generate_story(rand)] = True
            bar.update(len(stories) - bar.n)
    write_shards(folder, list(stories))


# -----------------------------------------------------------------------------
# Vocabulary and tokens


def short_lines(line, most=50_000):
    """
    Split a line at spaces into lines of at most `most` characters. SentencePiece ignores very long
    lines; training a vocabulary depends on words only, and no word is lost here.
    """
    start = 0
    while len(line) - start > most:
        end = line.rfind(" ", start + 1, start + most + 1)
        end = end if end > 0 else start + most
        yield line[start:end]
        start = end + (line[end] == " ")
    yield line[start:]


def train_vocab(data_dir, vocab_size, max_chars=100_000_000):
    """
    Train a SentencePiece BPE vocabulary on the first max_chars characters of the training stories
    and write tok<vocab_size>.model. More text hardly changes a small vocabulary.
    """
    if not 0 < vocab_size <= 65536:
        raise ValueError("train_vocab needs --vocab_size=N, at most 65536")
    files = story_files(data_dir)
    if not read_as_one(data_dir):
        check_order(files)
    stories = itertools.chain.from_iterable(map(read_stories, files[1:] or files))
    lines, chars = [], 0
    for story in stories:
        story = story[: max_chars - chars]
        lines += itertools.chain.from_iterable(map(short_lines, story.split("\n")))
        chars += len(story)
        if chars >= max_chars:
            break
    print(f"training a vocabulary of {vocab_size} on {chars:,} characters ...")
    # Each character is a token. If there are too many of them, as in Chinese, the most frequent get
    # half of the tokens that are left beside the 256 bytes; the others are encoded as bytes.
    counts = collections.Counter(itertools.chain.from_iterable(lines)).most_common()
    rare = {ord(c): " " for c, _ in counts[max(0, vocab_size - 259) // 2 :]}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.translate(rare) for line in lines) if rare else iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_surface=" \u2047 ",
            normalization_rule_name="identity",
            num_threads=os.cpu_count(),
            max_sentence_length=1 << 20,
            minloglevel=2,
            # llama2.c removes repeated spaces here; without the removal, decoding restores the
            # text exactly, and the encoder of run.c, which keeps the spaces, gives the same ids
            remove_extra_whitespaces=False,
        )
    except RuntimeError as e:
        reason = str(e).rpartition("] ")[2] or str(e)  # without the location in its source
        reason = reason.partition(" Increase vocab_size")[0]  # advice for its own program
        raise ValueError(
            f"SentencePiece cannot train a vocabulary of {vocab_size}: {reason}"
        ) from None
    path = os.path.join(data_dir, f"tok{vocab_size}.model")
    replace_vocabulary(path, model.getvalue())
    folder = os.path.join(data_dir, f"tok{vocab_size}")
    if (
        glob.glob(glob.escape(folder) + "/*.bin")
        and read_meta(folder).get("tokenizer") != Tokenizer(path).hash
    ):
        print(
            f"note: the shards in {folder} were made with another vocabulary; update them "
            f"with: {pretokenize_command(data_dir, vocab_size)}"
        )


def replace_vocabulary(path, data):
    """
    Write a SentencePiece model to `path`. A different one at this path is renamed (see
    tokenizer.hashed_name), because models that were trained with it still need it.
    """
    old = None
    with contextlib.suppress(OSError, ValueError):
        old = Tokenizer(path)
    with write_atomic(path + ".new") as f:  # complete before the old file is renamed
        f.write(data)
    if old and old.hash != Tokenizer(path + ".new").hash:
        os.replace(path, hashed_name(old))
        print(
            f"note: the previous vocabulary {path} is now {hashed_name(old)}; checkpoints that "
            "were trained with it still need it"
        )
    os.replace(path + ".new", path)
    print(f"wrote {path}")


def pretokenize_command(data_dir, vocab_size):
    """The command that makes the shards of a data folder, for messages."""
    flags = [f"--vocab_size={vocab_size}"] * (vocab_size != 32000)
    flags += [f"--data_dir={data_dir}"] * (data_dir != "data")
    return " ".join(["python tinystories.py pretokenize", *flags])


class Encoder(dict):
    """
    Encodes stories to the bytes of a shard, several times faster than SentencePiece alone: no token
    of the vocabulary spans two words, so this dict caches the encoding of each word.
    """

    def __init__(self, model_path):
        self.tokenizer = Tokenizer(model_path)
        sp, n_words = self.tokenizer.sp, self.tokenizer.n_words
        # True for the vocabularies of train_vocab and Llama 2, but not for every vocabulary: some
        # have tokens of several words, others put no space in front of a word that is alone.
        self.by_word = (
            sp is not None
            and not any("\u2581" in sp.id_to_piece(i).lstrip("\u2581") for i in range(n_words))
            and sp.encode("a a") == 2 * sp.encode("a")
        )

    def __missing__(self, text):
        ids = self.tokenizer.encode(text, bos=False, eos=False)
        packed = struct.pack(f"<{len(ids)}H", *ids)
        if len(text) < 50 and len(self) < 1_000_000:  # long texts do not repeat
            self[text] = packed
        return packed

    def __call__(self, stories):
        bos, shard = struct.pack("<H", BOS), []
        for story in stories:
            # A space is the first character of a word; SentencePiece adds one before the text.
            words = [story]
            if self.by_word and "\u2581" not in story:
                words = story.split(" ")
                if "" in words:  # repeated spaces may form one token, which ends before a word
                    words = re.findall("(?:^| )( *[^ ]*)", story)
            shard.append(bos)
            shard.extend(map(self.__getitem__, words))
        return b"".join(shard)


def start_worker(model_path):
    """Set up a process of the pool; it ends with its parent, which alone handles Ctrl-C."""
    global encoder
    encoder = Encoder(model_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_chunk(stories):
    """Runs in a process of the pool; `encoder` is the global of start_worker."""
    return encoder(stories)


def chunks(path, size=1 << 18):
    """Yields the stories of a file in lists of about `size` characters."""
    chunk, chars = [], 0
    for story in read_stories(path):
        chunk.append(story)
        chars += len(story)
        if chars >= size:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def encode_files(pool, paths, ahead):
    """Yields (path, stories, bytes) of all chunks in order; at most `ahead` chunks are pending."""
    pending = collections.deque()
    for path in paths:
        for chunk in chunks(path):
            pending.append((path, chunk, pool.submit(encode_chunk, chunk)))
            if len(pending) >= ahead:
                first_path, first_chunk, future = pending.popleft()
                yield first_path, first_chunk, future.result()
    for path, chunk, future in pending:
        yield path, chunk, future.result()


def read_meta(folder):
    """
    The origin of the shards in a folder, from its file META: {"tokenizer": hash, "sources": {name
    of the shard: SHA-256 of its story file}}. {} if there is no such file, as with llama2.c's
    shards. Raises ValueError if the file is damaged.
    """
    meta = read_json(os.path.join(folder, META))
    sources = meta.get("sources")
    if meta and not (isinstance(meta.get("tokenizer"), str) and isinstance(sources, dict)):
        raise ValueError(f"{folder}/{META} is damaged: delete it, and run pretokenize again")
    return meta


def write_meta(folder, meta):
    with write_atomic(os.path.join(folder, META), "w") as f:
        json.dump(meta, f, indent=1)


def begins_as(shard, path, tokenizer):
    """
    Whether a shard without META probably is the encoding of a story file with a tokenizer: the
    shard is newer than both and begins with the first story.
    """
    if os.path.getmtime(shard) < max(map(os.path.getmtime, (path, tokenizer.model_path))):
        return False
    ids = np.fromfile(shard, "<u2", count=100)
    story = next(read_stories(path))
    return [BOS, *tokenizer.encode(story, bos=False, eos=False)][: len(ids)] == ids.tolist()


def check_fits_shards(tokenizer, vocab_size):
    """Raises ValueError if shards cannot store the ids of a tokenizer, or for another size."""
    path, n_words = tokenizer.model_path, tokenizer.n_words
    if n_words > 65536:
        raise ValueError(f"{path} has {n_words} tokens: at most 65536 fit into a shard")
    if n_words != vocab_size:
        raise ValueError(f"{path} has {n_words} tokens, not {vocab_size}")
    if tokenizer.bos_id != BOS:
        raise ValueError(f"{path}: BOS is token {tokenizer.bos_id}, but shards need token {BOS}")


def planned_shards(data_dir, folder):
    """
    {story file: its shard in `folder`} for a data folder. Raises ValueError if two files have the
    same shard; a line on stdout names shards without a story file.
    """
    shards = {
        path: os.path.join(folder, os.path.splitext(os.path.basename(path))[0] + ".bin")
        for path in story_files(data_dir)
    }
    if len(set(shards.values())) < len(shards):
        raise ValueError(
            f"two files in {stories_folder(data_dir)} differ only in their extension: rename one"
        )
    for stray in sorted(set(bin_files(folder)) - set(shards.values())):
        print(f"note: {stray} belongs to no story file; delete it if it is obsolete")
    return shards


def pretokenize(data_dir, vocab_size=0, tokenizer_path=""):
    """
    Encode each story file to a shard of uint16 ids, with BOS before every story, on all cores. A
    shard is up to date if its file and tokenizer have not changed. A vocab_size of 0 selects Llama
    2's vocabulary, whose shards are in the folder of the stories, as in llama2.c.
    """
    model_path = tokenizer_path or find_tokenizer(vocab_size or 32000, data_dir)
    tokenizer = Tokenizer(model_path)
    check_fits_shards(tokenizer, vocab_size or 32000)
    note_ordinary(tokenizer.ordinary)
    folder = os.path.join(data_dir, f"tok{vocab_size}") if vocab_size else stories_folder(data_dir)
    shards = planned_shards(data_dir, folder)
    sums = {}
    for path in shards:
        with open(path, "rb") as f:
            digest = hashlib.sha256()
            while block := f.read(1 << 20):
                digest.update(block)
            sums[path] = digest.hexdigest()
    meta = read_meta(folder)
    if meta and meta["tokenizer"] != tokenizer.hash:
        print(f"{folder}: made with another tokenizer than {model_path}: all shards are replaced")

    def up_to_date(path, shard):
        if not meta:
            return begins_as(shard, path, tokenizer)
        return (
            meta["tokenizer"] == tokenizer.hash
            and meta["sources"].get(os.path.basename(shard)) == sums[path]
        )

    todo = [
        path
        for path, shard in shards.items()
        if not os.path.exists(shard) or not up_to_date(path, shard)
    ]
    # META lists a shard only once it is complete
    sources = {os.path.basename(shards[path]): sums[path] for path in shards if path not in todo}
    meta = {"tokenizer": tokenizer.hash, "sources": sources}
    if todo or read_meta(folder) != meta:
        write_meta(folder, meta)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    start, n_stories, n_tokens = time.time(), 0, 0
    try:
        with (
            concurrent.futures.ProcessPoolExecutor(
                cores, initializer=start_worker, initargs=(model_path,)
            ) as pool,
            progress("pretokenizing", sum(map(os.path.getsize, todo))) as bar,
        ):
            results = encode_files(pool, todo, ahead=4 * cores)
            for path, group in itertools.groupby(results, key=lambda result: result[0]):
                with write_atomic(shards[path]) as f:
                    for _, chunk, ids in group:
                        f.write(ids)
                        bar.update(sum(map(len, chunk)))
                        n_stories, n_tokens = n_stories + len(chunk), n_tokens + len(ids) // 2
                sources[os.path.basename(shards[path])] = sums[path]
                write_meta(folder, meta)
    except concurrent.futures.BrokenExecutor:
        raise OSError(
            "a process of the pool died (out of memory?); run the same command again "
            "to make the missing shards"
        ) from None
    print(
        f"{folder}: {len(todo)} shards written, {len(shards) - len(todo)} up to date;\n"
        f"    {n_stories:,} stories, {n_tokens:,} tokens in {time.time() - start:.1f} s; "
        f"tokenizer {model_path}"
    )
    if len(shards) == 1:
        print("note: there is only one file: the last twentieth of its shard is for validation")
    elif many_small([*shards.values()]):
        print(
            f"note: the {len(shards)} small shards are read as one, of which the last twentieth is "
            "for validation"
        )
    else:
        check_order([*shards])


# -----------------------------------------------------------------------------
# Shards: files of little-endian uint16 token ids without a header. The first is for validation.


def bin_files(folder):
    """
    Paths of the .bin files of a folder, by name, without the files for run.c, which are no shards:
    models, and the vocabularies that tokenizer.py writes beside X.model as X.bin. A file that META
    lists is a shard, whatever its name is.
    """
    listed = read_meta(folder).get("sources", {})
    for_run_c = re.compile(r"(tok\d+|tokenizer)(\.[0-9a-f]{8})?\.bin|(\w+_)?model\.bin")
    return [
        path
        for path in sorted(glob.glob(glob.escape(folder) + "/*.bin"))
        if os.path.basename(path) in listed
        or not for_run_c.fullmatch(os.path.basename(path))
        and not os.path.exists(path.removesuffix("bin") + "model")
    ]


def shard_paths(folder, vocab_size):
    """Paths of the shards of a folder (see open_shards), by name. Raises FileNotFoundError, or
    ValueError for a file."""
    if os.path.isfile(folder):
        raise ValueError(
            f"{folder} is a file: text is read from a folder; --sft, --rm, --dpo and --ppo read "
            ".json or .jsonl files of instructions or rankings"
        )
    folders = [folder, os.path.join(folder, f"tok{vocab_size}")]
    folders += [os.path.join(folder, "TinyStories_all_data")] * (vocab_size == 32000)
    for candidate in folders:
        if paths := bin_files(candidate):
            return paths
    raise FileNotFoundError(
        f"no .bin shards in {' or '.join(folders)}; make them with: "
        + pretokenize_command(folder, vocab_size)
    )


def shards_tokenizer(folder, vocab_size):
    """
    The folder of the shards of a data folder, and the hash of their tokenizer, "" if META is
    missing. Raises ValueError for a shard that META does not list.
    """
    paths = shard_paths(folder, vocab_size)
    folder = os.path.dirname(paths[0])
    meta = read_meta(folder)
    if not meta:
        return folder, ""
    for path in paths:
        if os.path.basename(path) not in meta["sources"]:
            raise ValueError(
                f"{path} is not from the last pretokenize in {folder}, which may have been "
                "interrupted: run it again, or delete the file"
            )
    return folder, meta["tokenizer"]


def many_small(paths):
    """Whether shards are too many and too small for windows of each, and for one for validation."""
    return len(paths) > 20 and sum(map(os.path.getsize, paths)) < 2 * 4096 * len(paths)


def read_as_one(data_dir):
    """
    Whether the files of a data folder are many and small (see open_shards): by its shards or,
    before pretokenize, by the story files.
    """
    folders = [stories_folder(data_dir), *glob.glob(glob.escape(data_dir) + "/tok*/")]
    shards = [bin_files(folder.rstrip("/")) for folder in folders]
    return any(map(many_small, filter(None, shards))) or (
        not any(shards) and many_small(story_files(data_dir))
    )


def open_shards(folder, split, vocab_size):
    """
    The shards of `split` ("train" or "val") as a list of memory-mapped uint16 arrays.

    `folder` contains *.bin, or is a data folder with the subfolder tok<vocab_size>/ (for 32000 also
    llama2.c's TinyStories_all_data/). The first shard by name is for validation, the others are for
    training; a single shard is split, and its last twentieth is for validation. Many small shards,
    such as those of a folder with a .txt file per text, are joined to a single one. Raises
    FileNotFoundError without shards, and ValueError for a damaged shard or another vocabulary.
    """
    paths = shard_paths(folder, vocab_size)
    join = many_small(paths)
    if len(paths) > 1 and not join:
        paths = paths[:1] if split == "val" else paths[1:]
        return [open_shard(path, vocab_size) for path in paths]
    shards = [open_shard(path, vocab_size) for path in paths]
    shard = np.concatenate(shards) if join else shards[0]
    cut = len(shard) - min(max(len(shard) // 20, 4096), len(shard) // 2)
    starts = np.flatnonzero(shard[cut:] == BOS)
    cut += starts[0] if len(starts) else 0  # at the start of a story
    return [shard[cut:] if split == "val" else shard[:cut]]


def open_shard(path, vocab_size):
    """One shard as a memory-mapped uint16 array (N,). Raises ValueError."""
    size = os.path.getsize(path)
    if size == 0 or size % 2:
        raise ValueError(
            f"{path} has {size} bytes, which is not a list of 2-byte tokens; delete it "
            "and run `python tinystories.py pretokenize` again"
        )
    shard = np.asarray(np.memmap(path, dtype="<u2", mode="r"))  # plain arrays slice faster
    largest = int(shard.max())  # reads the file once, so that errors appear before training
    if largest >= vocab_size:
        raise ValueError(
            f"{path} has token {largest}, but the vocabulary has only {vocab_size} tokens: the "
            "shard was made with another tokenizer; run `python tinystories.py pretokenize` again"
        )
    return shard


def parse_data(data):
    """
    The folders and weights of --data: "dirA:0.7,dirB:0.3" gives ["dirA", "dirB"], [0.7, 0.3]. A
    folder without a weight has weight 1; the weights are divided by their sum. Raises ValueError.
    """
    folders, weights = [], []
    for item in data.split(","):
        folder, _, weight = item.rpartition(":")
        try:
            folders, weights = folders + [folder or "."], weights + [float(weight)]
        except ValueError:  # no weight; the name may contain a colon
            folders, weights = folders + [item], weights + [1.0]
    if not all(0 < w < float("inf") for w in weights):
        raise ValueError(f"the weights in {data!r} must be positive numbers")
    return folders, [w / sum(weights) for w in weights]


# -----------------------------------------------------------------------------
# Sampling. A position is the number of items sampled so far. The item at a position depends only on
# the seed and the position: a checkpoint stores one integer, and processes share no state.


def mix(x):
    """A hash of uint64 (N,), the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)


def permute(i, n, key):
    """
    A pseudo-random permutation of range(n), applied to each of `i`: uint64 (N,) -> (N,). `key` (N,)
    selects the permutation. A Feistel network permutes the next larger 4^k numbers, and it is
    applied again to results outside range(n) (cycle walking; Black and Rogaway, 2002). There is no
    table: an epoch of a billion windows costs no memory, and resuming within it costs no time.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    i, todo = i.copy(), np.ones(len(i), bool)
    while todo.any():
        left, right = i[todo] >> half, i[todo] & mask
        for r in range(6):
            left, right = right, left ^ (mix(key[todo] + (right << 8) + np.uint64(r)) & mask)
        i[todo] = left << half | right
        todo = i >= n
    return i


class Sampler:
    """
    Samples the items of several folders in proportion to their weights. Each folder has its own
    epochs: every item occurs once per epoch, in an order that changes from epoch to epoch.
    `items[k][s]` is the number of items in shard s of folder k.
    """

    BLOCK = 1000  # weights are rounded to 1/BLOCK; the order of folders repeats every BLOCK items

    def __init__(self, items, weights, seed):
        self.offsets = [np.cumsum([0, *shards]) for shards in items]  # items before each shard
        self.sizes = [int(offsets[-1]) for offsets in self.offsets]
        self.seed = np.uint64(seed % 2**64)
        # items per block of each folder; the largest remainders are rounded up
        exact = np.multiply(weights, self.BLOCK)
        self.share = np.floor(exact).astype(int)
        self.share[np.argsort(self.share - exact)[: self.BLOCK - self.share.sum()]] += 1
        if not self.share.all():
            raise ValueError(
                f"a data folder has less than 1/{self.BLOCK} of the sum of the weights: "
                "increase its weight"
            )
        # an even spread: item j of a folder's c items is at (j + 0.5) / c of the block
        places = np.concatenate([(np.arange(c) + 0.5) / c for c in self.share])
        order = np.argsort(places, kind="stable")
        self.folder = np.repeat(np.arange(len(items)), self.share)[order]  # (BLOCK,)
        self.nth = np.concatenate([np.arange(c) for c in self.share])[order]  # (BLOCK,)
        # number of items before any folder begins its second epoch
        self.epoch = min(n * self.BLOCK // int(c) for n, c in zip(self.sizes, self.share))

    def locate(self, position, n):
        """The items at n positions from `position` on: folder, shard, index in the shard (N,)."""
        block, place = np.divmod(np.arange(position, position + n), self.BLOCK)
        folder = self.folder[place]
        nth = block * self.share[folder] + self.nth[place]  # items of this folder before this one
        shard, item = np.empty_like(nth), np.empty_like(nth)
        for k in np.unique(folder):
            rows = folder == k
            epoch, i = np.divmod(nth[rows].astype(np.uint64), np.uint64(self.sizes[k]))
            key = mix(mix(epoch + self.seed) + np.uint64(k))
            i = permute(i, self.sizes[k], key).astype(np.int64)
            shard[rows] = np.searchsorted(self.offsets[k], i, side="right") - 1
            item[rows] = i - self.offsets[k][shard[rows]]
        return folder, shard, item


def checksum(x, value=0):
    """The CRC-32 of an array, or of the arrays in nested lists and tuples."""
    if isinstance(x, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(x), value)
    return functools.reduce(lambda value, part: checksum(part, value), x, value)


class Windows:
    """
    Samples windows of seq_len tokens and their targets, for training and validation.

        train = Windows("data/tok512", "train", seq_len=256, vocab_size=512, seed=1337)
        x, y = train.batch(position, 16)  # int64 (B,T), (B,T); y is x shifted by one
        position += 16                    # an integer that the checkpoint stores

    A shard is a sequence of adjacent windows. Every window occurs once per epoch (`len(train)`
    windows), in an order that depends on the seed alone. With W processes, rank r calls
    batch(position + r * B, B) and all add W * B to the position, so that no two processes get the
    same window.

    `data` may name several folders with weights: "dirA:0.7,dirB:0.3". `len` is then the number of
    windows before any folder begins its second epoch. Raises ValueError and FileNotFoundError.
    """

    def __init__(self, data, split, seq_len, vocab_size, seed=1337):
        folders, weights = parse_data(data)
        self.seq_len, self.weights = seq_len, weights
        self.shards = [open_shards(folder, split, vocab_size) for folder in folders]
        windows = [[(len(ids) - 1) // seq_len for ids in shards] for shards in self.shards]
        for folder, shards, n in zip(folders, self.shards, windows):
            if sum(n) == 0:
                raise ValueError(
                    f"{folder}: no file of its {split} part has the {seq_len + 1} tokens of a "
                    f"window and the token after it ({sum(map(len, shards))} tokens in all); use a "
                    "smaller --max_seq_len or longer files"
                )
        # validation windows do not depend on the seed of the run
        self.sampler = Sampler(windows, weights, seed if split == "train" else 0)

    def __len__(self):
        return self.sampler.epoch

    def checksum(self):
        """A number that identifies the text, and in which shares its folders are read."""
        return checksum([np.array(self.weights, float), self.shards])

    def batch(self, position, batch_size):
        """The batch_size windows from `position` on: x and y, int64 (B,T)."""
        import torch  # here, because the commands of this file start faster without it

        T = self.seq_len
        out = np.empty((batch_size, T + 1), np.int64)
        for row, k, s, i in zip(out, *self.sampler.locate(position, batch_size)):
            row[:] = self.shards[k][s][i * T : i * T + T + 1]
        out = torch.from_numpy(out)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()


class Prompts:
    """
    Samples beginnings of stories as prompts for PPO: BOS and the first 0 to start_len - 1 tokens of
    a story, as lists of ids. With bos=False, for models whose text does not begin with BOS, only
    prompts that would otherwise be empty have BOS.

        prompts = Prompts("data/tok512", "train", start_len=30, vocab_size=512, seed=1337)
        prompts.batch(position, 4)        # [[1, 403, 407], [1], [1, 317, ...], [1, 403]]

    Every story occurs once per epoch (`len(prompts)` stories); positions are as in Windows. Raises
    ValueError and FileNotFoundError.
    """

    def __init__(self, data, split, start_len, vocab_size, seed=1337, bos=True):
        if start_len < 1:
            raise ValueError(f"start_len must be at least 1 (BOS alone), not {start_len}")
        folders, weights = parse_data(data)
        self.skip = int(not bos)
        self.start_len, self.seed = start_len, np.array([seed % 2**64], np.uint64)
        self.shards = [open_shards(folder, split, vocab_size) for folder in folders]
        self.starts = [[np.flatnonzero(ids == BOS) for ids in shards] for shards in self.shards]
        for folder, starts in zip(folders, self.starts):
            if not sum(map(len, starts)):
                raise ValueError(
                    f"{folder}: its {split} part has no beginning of a text, which prompts are "
                    "made of; in a .txt file, a line <|endoftext|> separates texts"
                )
        self.sampler = Sampler([list(map(len, starts)) for starts in self.starts], weights, seed)

    def __len__(self):
        return self.sampler.epoch

    def batch(self, position, n):
        """The n prompts from `position` on, lists of ids."""
        positions = np.arange(position, position + n, dtype=np.uint64)
        lengths = 1 + mix(positions + mix(self.seed)) % self.start_len
        prompts = []
        for k, s, i, length in zip(*self.sampler.locate(position, n), lengths.tolist()):
            start = self.starts[k][s][i]
            tokens = self.shards[k][s][start : start + length].tolist()
            tokens = tokens[: (tokens + [BOS]).index(BOS, 1)]  # up to the next story
            prompts.append(tokens[self.skip :] or tokens)
        return prompts


# -----------------------------------------------------------------------------

COMMANDS = {  # the flags of each command
    "download": ["data_dir", "small", "url"],
    "synthesize": ["data_dir", "stories", "seed"],
    "train_vocab": ["data_dir", "vocab_size"],
    "pretokenize": ["data_dir", "vocab_size", "tokenizer"],
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "command",
        choices=[*COMMANDS],
        help="command; `tinystories.py download --help` shows the flags of download",
    )
    parser.add_argument(
        "--data_dir", "--data", default="data", help="folder of stories, vocabulary and shards"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=0, help="vocabulary size; 0 means Llama 2's, 32000"
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        help="tokenizer file; default: the one in data_dir or data/ that has vocab_size tokens",
    )
    parser.add_argument(
        "--small",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="download only the 22 MB of validation stories and split them into shards",
    )
    parser.add_argument("--url", default=URL, help="base URL of the data set")
    parser.add_argument("--stories", type=int, default=20000, help="number of stories")
    parser.add_argument("--seed", type=int, default=1337, help="random seed")
    args = parse_args(parser, argv, lambda args: flags_of_others(args.command, COMMANDS))
    if args.command == "download":
        download(args.data_dir, args.url, args.small)
    elif args.command == "synthesize":
        synthesize(args.data_dir, args.stories, args.seed)
    elif args.command == "train_vocab":
        train_vocab(args.data_dir, args.vocab_size)
    else:
        pretokenize(args.data_dir, args.vocab_size, args.tokenizer)


if __name__ == "__main__":
    run_main(main)
