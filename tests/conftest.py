"""Fixtures shared by all tests: where the real model and the real stories are, if they are here.

The environment variable STORIES_DATA names a folder with stories260K/ and TinyStories_all_data/;
without it, shared/data in or beside the checkout is tried. Tests that need it skip without it.
"""

import json
import os
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

# One thread: the models here are too small to share, and tests may run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402

with suppress(OSError, ValueError):  # so that no test sees the line that announces it
    kernels.compiled(Path(kernels.__file__).with_name("kernels.c"))

_candidates = [os.environ.get("STORIES_DATA"), ROOT / "shared/data", ROOT.parent / "shared/data"]
DATA = next((Path(p) for p in _candidates if p and (Path(p) / "stories260K").is_dir()), None)


def data_file(name):
    if DATA is None or not (DATA / name).exists():
        pytest.skip(f"needs {name}: set STORIES_DATA to a folder that has it")
    return DATA / name


@pytest.fixture(scope="session")
def stories260k_bin():
    """The published stories260K model, a llama2.c version-0 file."""
    return data_file("stories260K/stories260K.bin")


@pytest.fixture(scope="session")
def tok512_model():
    """The SentencePiece model that stories260K was trained with."""
    return data_file("stories260K/tok512.model")


@pytest.fixture(scope="session")
def real_stories():
    """A folder of real TinyStories shards, data00.json (validation) and on."""
    return data_file("TinyStories_all_data")


def llama_cpp(path, context):
    """llama.cpp with a GGUF file: a function (endpoint, **query) -> the answer of its server."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, 1
    server = xllamacpp.Server(params)

    def post(endpoint, **query):
        url, body = f"{server.listening_address}/{endpoint}", json.dumps(query).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    return post


def llama_cpp_greedy(post, ids, n):
    """The ids that llama.cpp adds to `ids`: at most n, with the one that ends the text."""
    options = dict(temperature=0, top_k=1, repeat_penalty=1.0, return_tokens=True)
    return post("completion", prompt=ids, n_predict=n, cache_prompt=False, **options)["tokens"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """A run draws its log at its end, which takes a second; test_report.py tests that."""
    if "train" in sys.modules:
        monkeypatch.setattr(sys.modules["train"], "plot_at_end", lambda path: None)


@pytest.fixture(params=["few rows", "many rows"])
def rows(request, monkeypatch):
    """Runs a test as it is, and with the kernels of whole layers, which otherwise take more rows
    than the tests' batches have; it fails where these kernels were not used."""
    if request.param == "few rows":
        yield
        return
    if kernels.library() is None:
        pytest.skip("kernels.c cannot be compiled here")
    call, called = kernels.call, set()

    def watched(name, *args, **fields):
        called.add(name)
        return call(name, *args, **fields)

    monkeypatch.setattr(kernels, "MIN_ROWS", 1)
    monkeypatch.setattr(kernels, "call", watched)
    yield
    # library() would be remembered as a test with NATIVE_KERNELS=0 sees it, for all later tests.
    if os.environ.get("NATIVE_KERNELS") != "0":
        assert {"norm_qkv", "feed_forward"} & called


def functions_of(result):
    """The names of the autograd functions that a tensor was computed with."""
    names, seen, waiting = set(), set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [n for n, _ in node.next_functions]
    return names


LLAMA3_TOKENS = (
    "begin_of_text end_of_text reserved_special_token_0 finetune_right_pad_id "
    "start_header_id end_header_id eom_id eot_id"
).split()


def make_bpe(folder, kind="llama3", size=600):
    """A small tokenizer.json, with its tokenizer_config.json, such as a Llama 3 (kind "llama3"), a
    GPT-2 ("gpt2") or a SmolLM2 ("smollm2") has; its path. Trained on real stories where they are
    here; bytes that the text has not are tokens too."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import Regex, pre_tokenizers

    from tokenizer import LLAMA3_PATTERN

    lib = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=kind == "gpt2", use_regex=kind != "llama3"
    )
    first = {
        "llama3": [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")],
        "smollm2": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt2": [],
    }[kind]
    lib.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    lib.decoder = tokenizers.decoders.ByteLevel()
    names = {
        "llama3": [f"<|{name}|>" for name in LLAMA3_TOKENS],
        "gpt2": ["<|endoftext|>"],
        "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }[kind]
    text = [
        "It's the year 2026, isn't it?\n\n  I'LL say: naïve café, 12345!",
        "Привет, мир! 안녕하세요 你好",
    ]
    if DATA is not None:
        text += (DATA / "TinyStories_all_data/data00.json").read_text()[:300_000].split("\\n")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - len(names) * (kind != "smollm2"),
        special_tokens=names if kind == "smollm2" else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lib.train_from_iterator(text, trainer)
    while lib.get_vocab_size() < size - len(names) * (kind != "smollm2"):  # the text was too short
        lib.add_tokens([f"<|unused_{lib.get_vocab_size()}|>"])
    lib.add_special_tokens(names)
    bos, eos = {"llama3": (names[0], "<|eot_id|>"), "gpt2": names * 2, "smollm2": names[1:]}[kind]
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder) / "tokenizer.json"
    lib.save(str(path))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    assert lib.get_vocab_size() == size
    return path
