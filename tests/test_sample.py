"""sample.py: the known story letter for letter, streaming, files of prompts, bad input."""

import io
import os
import sys
import types

import pytest
import torch

import export
import sample
from checkpoint import checkpoint_args, load_checkpoint, save_checkpoint
from common import run_main
from model import ModelArgs, Transformer
from tokenizer import Tokenizer

# What stories260K tells when it always takes the likeliest token, as in llama2.c's README.
GOLDEN = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One \
day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, \
"I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom \
said, "Don't worry, Lily. We can help you."
Lily and her mom went to the park to play. They played together and had fun. After a while, Lily's \
mom came into the room and saw the park. She was so happy and said, "Thank you, Lily! You are a \
good friend."
"""


@pytest.fixture(scope="module")
def stories260k(stories260k_bin, tok512_model, tmp_path_factory):
    """The published model as a checkpoint, its tokenizer beside it."""
    path = tmp_path_factory.mktemp("stories260K") / "ckpt.pt"
    export.main([str(path), f"--llama2c={stories260k_bin}", f"--tokenizer={tok512_model}"])
    return path


def tell(checkpoint, *flags, **kw):
    return sample.main([f"--checkpoint={checkpoint}", "--device=cpu", *flags], **kw)


def test_known_story(stories260k, tok512_model, capsys):
    tell(stories260k, "--temperature=0.0", "--max_new_tokens=500", f"--tokenizer={tok512_model}")
    out = capsys.readouterr()
    assert out.out == GOLDEN
    assert out.err.startswith("346 tokens")  # it ended by itself


def test_stops_at_the_limit(stories260k, capsys):
    tell(stories260k, "--temperature=0", "--max_new_tokens=40")
    out = capsys.readouterr()
    assert GOLDEN.startswith(out.out.rstrip("\n")) and out.err.startswith("40 tokens")


def test_several_samples_are_those_of_one_at_a_time(stories260k, capsys, tmp_path):
    """Greedily, each prompt of a file has the story that it has alone; streamed or not, a text is
    the same."""
    prompts = ["Once upon a time", "Tom and Sue", 'She said, "I']
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts) + "\n")
    flags = ("--temperature=0", "--max_new_tokens=60")
    alone = []
    for p in prompts:
        tell(stories260k, f"--start={p}", *flags)  # streamed
        alone.append(capsys.readouterr().out)
        assert alone[-1].startswith(p)
    tell(stories260k, f"--start=FILE:{tmp_path / 'prompts.txt'}", "--num_samples=2", *flags)
    together = capsys.readouterr().out.split("-" * 15 + "\n")
    assert together == [s for s in alone for _ in range(2)] + [""]


def test_top_k_and_top_p_of_one_token_are_greedy(stories260k, capsys):
    texts = []
    for flag in "--temperature=0", "--top_k=1", "--top_p=0.000001", "--top_k=3":
        tell(stories260k, flag, "--seed=4", "--max_new_tokens=60", "--start=One")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_seeds(stories260k, capsys):
    texts = []
    for seed in (1, 1, 2):
        tell(stories260k, "--num_samples=2", f"--seed={seed}", "--max_new_tokens=30")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    one, two, _ = texts[0].split("-" * 15 + "\n")
    assert one != two


def test_interactive(stories260k, capsys, monkeypatch):
    """A session: each line has its story; one that is too long for the model does not end it."""
    lines = ["Once upon a time", "x" * 2000, "", "Tom"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    tell(stories260k, "--interactive", "--temperature=0", "--max_new_tokens=400")
    out = capsys.readouterr()
    assert out.out.startswith(GOLDEN) and out.out.count(GOLDEN) == 2  # with the prompt and without
    assert "\nTom" in out.out and "xxx" not in out.out
    assert out.err.startswith("error: a prompt has") and out.err.count("\n") == 1


# ----------------------------------------------------------------------------
# streaming


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time",
        "안녕하세요, 토끼!",
        "a 🦊 and a 👩‍👩‍👧",
        "é",
        "\ufffd",
        "tab\tnewline\n",
        "",
    ],
)
def test_streaming_shows_whole_characters_only(tok512_model, capsys, text):
    """The small vocabulary spells Korean and emoji by bytes: none is shown before its last."""
    tokenizer = Tokenizer(tok512_model)
    prompt, *rest = [
        tokenizer.encode("So", bos=True, eos=False),
        *tokenizer.encode(text, False, False),
    ]
    stream, shown = sample.Stream(tokenizer, prompt), ""
    for token in rest:
        stream(0, token)
        shown += capsys.readouterr().out
        assert "\ufffd" not in shown.rstrip("\ufffd") or "\ufffd" in text
        assert tokenizer.decode(prompt + rest).startswith(shown)
    stream.close()
    assert shown + capsys.readouterr().out == tokenizer.decode(prompt + rest) + "\n"


def test_streaming_of_bytes_that_are_no_text(tok512_model, capsys):
    """Half characters inside and at the end: what is streamed is what is printed at once."""
    tokenizer = Tokenizer(tok512_model)
    a, b, c = (3 + x for x in "한".encode())  # ids of bytes follow the three special ones
    for ids in ([a], [a, b], [a, b, c], [a, b, 403], [a, a, b, c], [c, 403, a, b]):
        stream = sample.Stream(tokenizer, [1])
        for token in ids:
            stream(0, token)
        stream.close()
        assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_control_characters_are_left_out(tok512_model, monkeypatch, capsys):
    """Generated escape sequences must not reach a terminal: streamed, printed at once, in a
    prompt."""
    tokenizer = Tokenizer(tok512_model)
    text = "a\tb\nc" + "".join(map(chr, [*range(32), *range(127, 160)])) + "\x1b[2J\u009b31m é한"
    expected = "a\tb\nc\t\n[2J31m é한\n"
    tokens = tokenizer.encode(text, bos=False, eos=False)
    stream = sample.Stream(tokenizer, [1])
    for token in tokens:
        stream(0, token)
    stream.close()
    assert capsys.readouterr().out == expected

    class Out:
        lengths = torch.tensor([len(tokens)] * 2)

        def responses(self):
            return [tokens] * 2

    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: Out())
    args = types.SimpleNamespace(num_samples=1, max_new_tokens=9, temperature=0, top_k=0, top_p=1)
    sample.print_samples(None, tokenizer, ["\x1b[H", "\x07b"], args)
    assert capsys.readouterr().out == "".join(s + expected + "-" * 15 + "\n" for s in ("[H ", "b "))


def test_streams_while_it_works(stories260k, monkeypatch, capsys):
    """A text appears token by token, not at the end."""
    shown = []
    step = sample.Stream.__call__

    def watched(self, row, token):
        step(self, row, token)
        shown.append(len(capsys.readouterr().out))

    monkeypatch.setattr(sample.Stream, "__call__", watched)
    tell(stories260k, "--temperature=0", "--max_new_tokens=20")
    assert len(shown) == 20 and sum(n > 0 for n in shown) >= 18


# ----------------------------------------------------------------------------
# bad input: one line, exit status 1 or 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "ckpt.pt"
    model = Transformer(
        ModelArgs(dim=8, n_layers=1, n_heads=2, vocab_size=48, multiple_of=4, max_seq_len=16)
    )
    save_checkpoint(path, {"model": model.state_dict(), "model_args": checkpoint_args(model.args)})
    return path


def error_of(capsys, *flags):
    with pytest.raises(SystemExit) as e:
        run_main(lambda: sample.main(list(flags)))
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return e.value.code, text


def test_errors(tiny, tmp_path, capsys, tok512_model):
    here, tok = f"--checkpoint={tiny}", f"--tokenizer={tok512_model}"
    blob = tiny.read_bytes()
    (tmp_path / "short.pt").write_bytes(blob[: len(blob) // 2])
    (tmp_path / "noise.pt").write_bytes(os.urandom(1000))
    weights = load_checkpoint(tiny)["model"]["norm.weight"].numpy().tobytes()
    flipped = weights[:-1] + bytes([weights[-1] ^ 64])
    (tmp_path / "flipped.pt").write_bytes(blob.replace(weights, flipped))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe\x00")
    cases = [
        ((f"--checkpoint={tmp_path / 'none.pt'}",), 1, "there is no such checkpoint"),
        (
            (f"--checkpoint={tmp_path / 'short.pt'}",),
            1,
            "not a readable checkpoint, or is cut short",
        ),
        ((f"--checkpoint={tmp_path / 'noise.pt'}",), 1, "not a readable checkpoint"),
        ((f"--checkpoint={tmp_path / 'flipped.pt'}",), 1, "is damaged: a checksum is wrong"),
        ((here, tok), 1, "has 512 tokens, the model 48: it is not this model's tokenizer"),
        ((here,), 1, "no tokenizer with 48 tokens"),
        ((here, "--tokenizer=none.model"), 1, "none.model: No such file"),
        ((here, f"--tokenizer={tiny}"), 1, "not a SentencePiece model"),
        ((here, "--temprature=1"), 2, "did you mean --temperature?"),
        ((here, "--temperature=warm"), 2, "invalid float value"),
        ((here, "--temperature=-1"), 1, "must not be negative"),
        ((here, "--temperature=1e-39"), 1, "must be 0, which is greedy, or at least 1e-6"),
        ((here, f"--max_new_tokens={10**20}"), 2, f"--max_new_tokens: {10**20} is too large"),
        ((here, "--interactive", "--start=One day"), 1, "cannot be combined with --start"),
        ((here, "--temperature=nan"), 2, "--temperature: expected a finite number"),
        ((here, "--top_p=1.5"), 1, "--top_p must be from 0 to 1, not 1.5"),
        ((here, "--num_samples=0"), 1, "at least 1"),
        ((here, "--device=tpu"), 1, "expected cpu, cuda"),
    ]
    if not torch.cuda.is_available():
        cases.append(((here, "--device=cuda"), 1, "there is no such device here; use --device=cpu"))
    for flags, status, message in cases:
        found = error_of(capsys, *flags)
        assert found[0] == status and message in found[1], (flags, found)


def test_errors_of_prompts(stories260k, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe\x00")
    for start, message in (
        ("FILE:none.txt", "none.txt: No such file"),
        (f"FILE:{tmp_path / 'empty.txt'}", "has no prompt"),
        (f"FILE:{tmp_path / 'noise.txt'}", "noise.txt"),
        ("x" * 2000, "context holds"),
    ):
        status, text = error_of(capsys, f"--checkpoint={stories260k}", f"--start={start}")
        assert status == 1 and message in text, text


def test_a_byte_order_mark_is_no_text(stories260k, tmp_path, monkeypatch, capsys):
    """In a file of prompts, and in a file that is the standard input."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffOne day\nLily\n".encode())
    assert sample.read_prompts(f"FILE:{tmp_path / 'prompts.txt'}") == ["One day", "Lily"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffOne day\n"))
    tell(stories260k, "--interactive", "--temperature=0", "--max_new_tokens=5")
    assert capsys.readouterr().out.startswith("One day")


@pytest.mark.parametrize("how", ["--interactive", "--chat"])
def test_without_standard_input(stories260k, how, monkeypatch, capsys):
    """Closed by <&-, Python has none."""
    monkeypatch.setattr("sys.stdin", None)
    status, text = error_of(capsys, f"--checkpoint={stories260k}", how)
    assert status == 1 and "no standard input" in text


@pytest.mark.parametrize("how", ["cpu", "cuda"])
def test_too_many_samples_for_the_memory_are_one_line(stories260k, monkeypatch, capsys, how):
    def too_much(*_, **__):
        if how == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.empty(10**17)

    monkeypatch.setattr(sample, "generate", too_much)
    with pytest.raises(SystemExit):
        run_main(lambda: tell(stories260k, "--num_samples=9"))
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: take fewer samples (--num_samples=9)")
    assert error.count("\n") == 1


def test_compiling_is_not_in_the_tokens_per_second(stories260k, monkeypatch, capsys):
    times, clock = [], [0.0]
    library = sample.kernels.library
    monkeypatch.setattr(sample.kernels, "library", lambda: times.append(clock[0]) or library())

    def now():
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(sample.time, "perf_counter", now)
    tell(stories260k, "--max_new_tokens=3")
    assert times[0] == 0 and "3 tokens, 3 tokens/s" in capsys.readouterr().err
