"""export.py --hf: models of Hugging Face's, made here by transformers, write the same text in
Python and in C as in transformers."""

import contextlib
import functools
import inspect
import io
import json
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from test_export import program, run  # noqa: F401

import export
import formats
import sample
import tinystories
import tokenizer
from checkpoint import load_checkpoint
from common import run_main
from instruct import find_template
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

PROMPTS = ["The dog", "I said hello to a", "3 friends ran"]
TEXT = [f"The dog number {i} ran to the park and said hello to a friend." for i in range(300)]


def llama(folder, vocab, never=(), **changes):
    """A random model, whose greedy text has none of the tokens `never`: here bytes, since half
    characters are decoded differently by each library."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes}))
    with torch.no_grad():
        model.lm_head.weight[list(never)] = 0
    model.save_pretrained(folder)
    return model.eval()


def settings(folder, **values):
    path = folder / "tokenizer_config.json"
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|go|>",
        "eos_token": "<|stop|>",
        **values,
    }
    path.write_text(json.dumps(values))


def bpe_folder(folder, begin, rows=None, changes=None, **values):
    """A byte-level BPE, whose post-processor puts BOS before text if `begin`, and a model whose
    embedding has so many rows."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|stop|>", "<|go|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if begin:
        t.post_processor = processors.TemplateProcessing(
            single="<|go|> $A", pair="<|go|> $A $B", special_tokens=[("<|go|>", 1)]
        )
    size = t.get_vocab_size()
    never = [i for text, i in t.get_vocab().items() if i < 2 or not text.isascii()]
    model = llama(
        folder, rows or size, never, **{"bos_token_id": 1, "eos_token_id": 0, **(changes or {})}
    )
    t.save(str(folder / "tokenizer.json"))
    settings(folder, **values)
    return model, size


@functools.cache
def sentencepiece_vocabulary():
    """{piece: id}, merges, and the file's bytes of a SentencePiece model with 512 tokens."""
    from sentencepiece import SentencePieceProcessor
    from transformers.convert_slow_tokenizer import generate_merges

    import tinystories

    with tempfile.TemporaryDirectory() as data:
        tinystories.synthesize(data, 300, seed=1)
        tinystories.train_vocab(data, 512)
        file = Path(data, "tok512.model").read_bytes()
    sp = SentencePieceProcessor(model_proto=file)
    vocab = {sp.id_to_piece(i): i for i in range(512)}
    merges = generate_merges(vocab, {p: sp.get_score(i) for p, i in vocab.items()})
    return vocab, merges, file


def sentencepiece_folder(folder, begin, tokens=(), rows=None, **changes):
    """Llama 2's kind of tokenizer as transformers 5 saves it: a tokenizer.json alone, made of a
    SentencePiece model by transformers' own rule for merges, with more tokens after its own."""
    vocab, merges, _ = sentencepiece_vocabulary()
    t = transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=begin)
    t.add_special_tokens({"extra_special_tokens": list(tokens)})
    model = llama(folder, rows or 512 + len(tokens), range(259), **changes)
    t.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return model, 512 + len(tokens)


def their_text(folder, prompt, n=12):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    [ids] = model.generate(**given, do_sample=False, max_new_tokens=n, pad_token_id=0).tolist()
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def our_text(checkpoint, prompt, *flags, n=12):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        sample.main(
            [
                f"--checkpoint={checkpoint}",
                f"--start={prompt}",
                "--temperature=0",
                f"--max_new_tokens={n}",
                *flags,
            ]
        )
    return out.getvalue().strip()


def c_text(executable, path, prompt, *flags, n=12):
    done = subprocess.run([executable, path, "-i", prompt, "-t", "0", *flags], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="replace").strip()


def plain(text):  # run.c leaves control characters out
    return "".join(c for c in text if c >= " " or c in "\n\t\r")


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("begin", [True, False])
def test_plain_text_begins_as_in_transformers(tmp_path, program, kind, begin):  # noqa: F811
    """With BOS or without, as the tokenizer's post-processor says: in sample.py, in run.c, in GGUF
    and in the folder that is exported again."""
    folder = tmp_path / "in"
    make = bpe_folder if kind == "bpe" else sentencepiece_folder
    make(folder, begin)
    run(tmp_path / "c.pt", f"--hf={folder}")
    assert load_checkpoint(tmp_path / "c.pt")["bos"] is begin
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    assert struct.unpack_from("<i", (tmp_path / "m.bin").read_bytes(), 152) == (int(not begin),)
    run(tmp_path / "out", f"--checkpoint={tmp_path}/c.pt", "--format=hf")
    texts = []
    for prompt in PROMPTS:
        want = their_text(folder, prompt)
        assert our_text(tmp_path / "c.pt", prompt) == want
        assert their_text(tmp_path / "out", prompt) == want
        length = len(transformers.AutoTokenizer.from_pretrained(folder).encode(prompt)) + 12
        got = c_text(program, tmp_path / "m.bin", prompt, "-n", str(length))
        assert plain(want).startswith(got[:-6]) and len(got) > len(prompt) + 6
        texts.append(want)
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config.get("add_bos_token", begin) is begin
    gguf = pytest.importorskip("gguf")
    run(tmp_path / "m.gguf", f"--checkpoint={tmp_path}/c.pt", "--format=gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is begin
    # the flag matters: with the other one the model writes something else
    state = load_checkpoint(tmp_path / "c.pt")
    torch.save(state | {"bos": not begin}, tmp_path / "c.pt")
    assert [our_text(tmp_path / "c.pt", p) for p in PROMPTS] != texts


def test_an_empty_prompt_begins_with_bos(tmp_path, program):  # noqa: F811
    bpe_folder(tmp_path / "in", False)
    run(tmp_path / "c.pt", f"--hf={tmp_path}/in")
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    ids = model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    want = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert our_text(tmp_path / "c.pt", "") == want
    assert plain(want).startswith(c_text(program, tmp_path / "m.bin", "", "-n", "13")[:-6])


def test_a_tokenizer_without_bos(tmp_path, program):  # noqa: F811
    """Its text begins with nothing, also if the checkpoint does not say so; EOS, here id 0, stands
    for BOS where there must be a token, and no template has one."""
    folder = tmp_path / "in"
    bpe_folder(folder, False, changes={"bos_token_id": None}, bos_token=None)
    want = [their_text(folder, prompt) for prompt in PROMPTS]
    run(tmp_path / "c.pt", f"--hf={folder}")
    state = load_checkpoint(tmp_path / "c.pt")
    for bos in False, True:
        torch.save(state | {"bos": bos}, tmp_path / "c.pt")
        run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
        data = (tmp_path / "m.bin").read_bytes()
        assert struct.unpack_from("<2i", data, 48) == (0, 0)
        assert struct.unpack_from("<2i", data, 152) == (1, 0)
        assert [our_text(tmp_path / "c.pt", prompt) for prompt in PROMPTS] == want
        got = c_text(program, tmp_path / "m.bin", PROMPTS[0], "-n", "15")
        assert want[0].startswith(got[:-6]) and len(got) > len(PROMPTS[0]) + 6
    t = Tokenizer(tmp_path / "tokenizer.json")
    assert (t.bos_id, t.eos_id) == (-1, 0) and tokenizer.stop_ids(t) == {0} and not t.adds_bos
    plain_ids = t.encode("The dog", False, False)
    assert t.encode("The dog", True, True) == [*plain_ids, 0]
    assert sample.encode_prompt(t, "") == [0] and sample.encode_prompt(t, "The dog") == plain_ids
    for name in "plain", "llama2":
        template = find_template(name, {}, t)
        ids, _ = template.dialogue(t, [("The dog", "ran"), ("to", "the park")], "")
        assert min(ids) == 0 and ids.count(0) == 2 and ids[0] > 0


def test_perplexity_without_bos_is_transformers_loss(tmp_path, program):  # noqa: F811
    model, _ = bpe_folder(tmp_path / "in", False)
    run(tmp_path / "c.pt", f"--hf={tmp_path}/in")
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    text = "The dog ran to the park.\nHello, friend number 7!"
    (tmp_path / "text.txt").write_text(text)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")(text, return_tensors="pt")
    want = model(ids["input_ids"], labels=ids["input_ids"]).loss.item()
    done = subprocess.run(
        [program, tmp_path / "m.bin", "-m", "perplexity", "-i", tmp_path / "text.txt"],
        capture_output=True,
        text=True,
    )
    assert float(done.stdout.split()[1].rstrip(",")) == pytest.approx(want, abs=1e-3)


def test_ppo_prompts_of_a_model_without_bos(tmp_path):
    """They are those of a model with BOS, without it; only an empty prompt is BOS."""
    import tinystories

    (tmp_path / "tok512").mkdir()
    ids = torch.randint(3, 512, (40, 9))
    ids[:, 0] = tinystories.BOS
    for i in range(2):
        ids.short().numpy().tofile(tmp_path / f"tok512/data{i:02}.bin")
    args = str(tmp_path / "tok512"), "train", 8, 512
    with_bos = tinystories.Prompts(*args).batch(0, 40)
    without = tinystories.Prompts(*args, bos=False).batch(0, 40)
    assert (
        without == [p[1:] or [tinystories.BOS] for p in with_bos] and [tinystories.BOS] in without
    )


def test_training_keeps_the_flag_and_the_end_ids(tmp_path):
    import train

    bpe_folder(tmp_path / "in", False)
    run(tmp_path / "c.pt", f"--hf={tmp_path}/in")
    torch.save(load_checkpoint(tmp_path / "c.pt") | {"end_ids": [9, 7]}, tmp_path / "c.pt")
    lines = [json.dumps({"prompt": f"the dog {i}", "response": f"ran {i}"}) for i in range(60)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    train.main(
        [
            "--sft",
            f"--init_from={tmp_path}/c.pt",
            f"--out_dir={tmp_path}/out",
            f"--data={tmp_path}/d.jsonl",
            "--max_iters=1",
            "--batch_size=4",
            "--device=cpu",
            "--eval_iters=1",
        ]
    )
    state = load_checkpoint(tmp_path / "out/sft_ckpt.pt")
    assert state["bos"] is False and state["end_ids"] == [9, 7]
    data = (tmp_path / "out/sft_model.bin").read_bytes()
    assert struct.unpack_from("<4i", data, 128) == (9, 7, 0, 0)
    assert struct.unpack_from("<i", data, 152) == (1,)


@pytest.mark.parametrize(
    "kind, tokens, rows",
    [
        ("bpe", 0, 64),
        ("bpe", 0, 128),
        ("sentencepiece", 0, 0),
        ("sentencepiece", 1, 0),
        ("sentencepiece", 1, 64),
        ("sentencepiece", 0, 64),
    ],
)
def test_vocabularies_that_are_padded_or_have_more_tokens(tmp_path, program, kind, tokens, rows):  # noqa: F811
    """Padded rows are left out, so that nothing can sample them, although they are the likeliest
    here; all the rest writes the same text as transformers, where they are suppressed."""
    folder = tmp_path / "in"
    more = [f"<|more{i}|>" for i in range(tokens)]
    size = 300 if kind == "bpe" else 512 + tokens
    rows = -(-(size + 1) // rows) * rows if rows else size
    if kind == "bpe":
        model, _ = bpe_folder(folder, True, rows)
    else:
        model, _ = sentencepiece_folder(folder, True, more, rows)
    with torch.no_grad():
        model.lm_head.weight[size:] *= 3
    model.save_pretrained(folder)
    done = run(tmp_path / "c.pt", f"--hf={folder}")
    assert (f"without the {rows - size} rows" in done.stdout) == (rows > size)
    assert load_checkpoint(tmp_path / "c.pt")["model_args"]["vocab_size"] == size
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        [out] = model.generate(
            ids,
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            suppress_tokens=list(range(size, rows)) or None,
        ).tolist()
        want = tokenizer.decode(out, skip_special_tokens=True).strip()
        assert our_text(tmp_path / "c.pt", prompt) == want
        got = c_text(program, tmp_path / "m.bin", prompt, "-n", str(len(out)))
        assert plain(want).startswith(got[:-6]) and len(got) > len(prompt)
    gguf = pytest.importorskip("gguf")
    run(tmp_path / "m.gguf", f"--checkpoint={tmp_path}/c.pt", "--format=gguf")
    names = gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.tokens").contents()
    assert len(names) == size and names[size - tokens :] == more
    run(tmp_path / "out", f"--checkpoint={tmp_path}/c.pt", "--format=hf")
    for prompt in PROMPTS:
        assert their_text(tmp_path / "out", prompt) == our_text(tmp_path / "c.pt", prompt)
    run(tmp_path / "d/c.pt", f"--hf={folder}", f"--tokenizer={folder}/tokenizer.json")
    assert our_text(tmp_path / "d/c.pt", "The dog") == our_text(tmp_path / "c.pt", "The dog")


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_tokens_that_are_added_to_a_sentencepiece_model(tmp_path, where):
    """Older folders have tokenizer.model and name the added tokens elsewhere, EOS among them."""
    folder = tmp_path / "in"
    llama(folder, 576)
    (folder / "tokenizer.model").write_bytes(sentencepiece_vocabulary()[2])
    more = {"<|pad|>": 512, "<|im_end|>": 513}
    values = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": False}
    if where == "tokenizer_config.json":
        decoder = {str(i): {"content": text} for text, i in more.items()}
        values["added_tokens_decoder"] = decoder
    elif where == "added_tokens.json":
        (folder / where).write_text(json.dumps(more))
    else:
        sentencepiece_folder(tmp_path / "json", False, more)
        (folder / where).write_bytes((tmp_path / "json" / where).read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    run(tmp_path / "c/c.pt", f"--hf={folder}")
    state = load_checkpoint(tmp_path / "c/c.pt")
    assert state["model_args"]["vocab_size"] == 514 and state["bos"] is False
    t = Tokenizer(next((tmp_path / "c").glob("*.model")))
    assert (t.n_words, t.bos_id, t.eos_id) == (514, 1, 513) and t.special["<|pad|>"] == 512
    assert t.encode("the <|pad|>", False, False)[-1] != 512
    values["added_tokens_decoder"] = {"514": {"content": "<|late|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if where == "added_tokens.json":
        (folder / where).write_text("{}")
        done = run(tmp_path / "x.pt", f"--hf={folder}", ok=1)
        assert "ids of the added tokens are not those after" in done.stderr


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_added_tokens_that_are_not_special_are_named(tmp_path, kind, capsys):
    """transformers finds them in text; here they are control tokens, and an import says so."""
    folder = tmp_path / "in"
    if kind == "bpe":
        bpe_folder(folder, True, 304)
    else:
        sentencepiece_folder(folder, True, ["<|pad|>"], 576)
    path = folder / "tokenizer.json"
    t = tokenizers.Tokenizer.from_file(str(path))
    size = t.add_tokens(["<gene>", "<think>"]) and t.get_vocab_size()
    t.save(str(path))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    done = run(tmp_path / "c/c.pt", f"--hf={folder}")
    assert "not special become control tokens here: '<gene>', '<think>'. Text" in done.stderr
    assert done.stderr.count("\n") == 1
    [path] = [p for p in (tmp_path / "c").glob("tok*") if "config" not in p.name]
    ours = Tokenizer(path)
    assert size - 2 in theirs.encode("a <gene>") and ours.special["<gene>"] == size - 2
    assert size - 2 not in ours.encode("a <gene>", True, False)
    if kind == "bpe":  # and so does the command that makes shards
        (tmp_path / "a.txt").write_text("a <gene>")
        capsys.readouterr()
        tinystories.pretokenize(str(tmp_path), size, str(path))
        assert "control tokens here: '<gene>', '<think>'. Text" in capsys.readouterr().err
    run(tmp_path / "out", f"--checkpoint={tmp_path}/c/c.pt", "--format=hf")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.convert_tokens_to_ids("<think>") == size - 1


# ----------------------------------------------------------------------------
# chat templates

TALK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + 'Q: ' + m['content'] + "
    "'\nA:' }}{% elif m['role'] == 'assistant' %}REPLY{% endif %}{% endfor %}"
)
NO_END = TALK.replace("REPLY", "{{ ' ' + m['content'] + '\n' }}")
MARKED = TALK.replace(
    "REPLY", "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
)


def chat_lines(checkpoint, monkeypatch, *users, flags=(), n=12):
    """What sample.py --chat says to the users, and the prompts that it gives to the model."""
    prompts, lines, out, err = [], [*users, None], io.StringIO(), io.StringIO()
    generate = sample.generate

    def watched(model, given, *args, **kw):
        prompts.append(given[0])
        return generate(model, given, *args, **kw)

    with monkeypatch.context() as m:
        m.setattr(sample, "generate", watched)
        m.setattr(sample, "read_line", lambda _: lines.pop(0))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sample.main(
                [
                    f"--checkpoint={checkpoint}",
                    "--chat",
                    "--temperature=0",
                    f"--max_new_tokens={n}",
                    *flags,
                ]
            )
    return out.getvalue().split("Assistant: ")[1:], err.getvalue(), prompts


@pytest.mark.parametrize("source", [NO_END, MARKED], ids=["no end", "generation"])
@pytest.mark.parametrize("begin", [True, False])
def test_chat_is_transformers(tmp_path, program, monkeypatch, source, begin):  # noqa: F811
    """Greedy replies through a template are transformers' in Python and C, whether BOS is before
    plain text or not: in a chat the template says it."""
    model, _ = bpe_folder(tmp_path / "in", begin, chat_template=source)
    done = run(tmp_path / "c.pt", f"--hf={tmp_path}/in")
    assert "with its chat template" in done.stdout
    turn = load_checkpoint(tmp_path / "c.pt")["template"]["turn"]
    assert turn == "{bos}Q: {user}\nA:{reply}{eos}" + "\n" * (source is NO_END)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    said = [{"role": "user", "content": "Hello dog"}]
    ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)["input_ids"]
    [out] = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0).tolist()
    want = tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
    [reply], err, [prompt] = chat_lines(tmp_path / "c.pt", monkeypatch, "Hello dog")
    assert prompt == ids[0].tolist() and reply.strip() == want.strip() and "note" not in err
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    done = subprocess.run(
        [program, tmp_path / "m.bin", "-m", "chat", "-i", "Hello dog", "-t", "0", "-n", "12"],
        capture_output=True,
        text=True,
        input="",
    )
    assert done.returncode == 0 and "note" not in done.stderr
    reply = done.stdout.removeprefix("Assistant:").split("\n\n")[0].removesuffix("\nUser:")
    assert reply.split("\nUser")[0].strip() == plain(want).strip()


def test_a_template_without_an_end_is_trained_and_replaced(tmp_path, monkeypatch):
    """EOS ends replies: --sft teaches it; --template=llama2 replaces the template and says so."""
    import train

    bpe_folder(tmp_path / "in", False, chat_template=NO_END)
    run(tmp_path / "c.pt", f"--hf={tmp_path}/in")
    lines = [json.dumps({"prompt": f"the dog {i}", "response": f"ran {i}"}) for i in range(60)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    common = [
        "--sft",
        f"--init_from={tmp_path}/c.pt",
        f"--data={tmp_path}/d.jsonl",
        "--max_iters=1",
        "--batch_size=4",
        "--device=cpu",
        "--eval_iters=1",
    ]
    train.main([*common, f"--out_dir={tmp_path}/a"])
    kept = load_checkpoint(tmp_path / "a/sft_ckpt.pt")["template"]["turn"]
    assert kept == "{bos}Q: {user}\nA:{reply}{eos}\n"
    train.main([*common, f"--out_dir={tmp_path}/b", "--template=llama2"])
    kept = load_checkpoint(tmp_path / "b/sft_ckpt.pt")["template"]["turn"]
    assert kept == "[INST] {user} [/INST]{reply}{eos}"  # plain text does not begin with BOS
    _, err, [prompt] = chat_lines(tmp_path / "c.pt", monkeypatch, "Hi", flags=["--template=llama2"])
    assert "--template=llama2 replaces the checkpoint's template" in err and prompt[0] != 1


BAD_TEMPLATES = {  # what import says of them
    "such as {eos}, must follow {reply}": TALK.replace("REPLY", "{{ m.content + ' [END]' }}"),
    "has no token <|end|>": TALK.replace("REPLY", "{{ m.content + '<|end|>' }}"),
    "it needs more than 1024 MB": "{{ 'a'*3000000000 }}",
    "it needs more than 5 seconds": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "or 1024 MB": "{{ 10 ** (10 ** 10) }}",
    "it writes more than": "{{ 'a' * 2000000 }}",
    "Unexpected end of template": "{% generation %}x",
    "Can't compile": 5,
}


@pytest.mark.parametrize("says", BAD_TEMPLATES)
def test_a_template_that_is_dropped(tmp_path, program, monkeypatch, says):  # noqa: F811
    """Import names the reason; the commands say which template they use instead, Python's and C's
    the same one."""
    bpe_folder(tmp_path / "in", False, chat_template=BAD_TEMPLATES[says])
    done = run(tmp_path / "c.pt", f"--hf={tmp_path}/in")
    assert "chat template was dropped" in done.stdout and says in done.stdout
    assert "template" not in load_checkpoint(tmp_path / "c.pt")
    if says != "Can't compile":
        return
    _, err, [prompt] = chat_lines(tmp_path / "c.pt", monkeypatch, "Hi")
    assert "note: the checkpoint has no chat template: using llama2" in err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    assert prompt == tokenizer.encode("[INST] Hi [/INST]")
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    done = subprocess.run(
        [program, tmp_path / "m.bin", "-m", "chat", "-i", "Hi", "-t", "0", "-n", "5"],
        capture_output=True,
        text=True,
        input="",
    )
    assert done.returncode == 0 and "note: this model has no chat template" in done.stderr


@pytest.mark.parametrize(
    "says, turn",
    [
        ("", "{bos}Q: {user}A: {reply}"),
        ("", "{user} {reply}\n \n"),
        ("", "{user} {reply}{bos}x"),
        ("{reply}", "{bos}Q: {user}A: {reply}\n{eos}"),
        ("{user}", "{reply}{eos}"),
        ("{reply}", "{user}{reply}{reply}{eos}"),
        ("{system}", "{system}{user}{reply}{eos}"),
        ("<|im_end|>", "{user}<|im_end|>{reply}{eos}"),
    ],
)
def test_python_and_c_have_one_rule(tmp_path, program, monkeypatch, says, turn):  # noqa: F811
    bpe_folder(tmp_path / "in", True)
    run(tmp_path / "c.pt", f"--hf={tmp_path}/in")
    state = load_checkpoint(tmp_path / "c.pt")
    torch.save(state | {"template": {"turn": turn, "system": "", "next": ""}}, tmp_path / "c.pt")
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    done = subprocess.run(
        [program, tmp_path / "m.bin", "-m", "chat", "-i", "Hi", "-t", "0", "-n", "5"],
        capture_output=True,
        text=True,
        input="",
    )
    assert done.returncode == bool(says) and says in done.stderr
    if says:
        with pytest.raises(ValueError, match=says.replace("|", "\\|")):
            chat_lines(tmp_path / "c.pt", monkeypatch, "Hi")
    else:
        assert len(chat_lines(tmp_path / "c.pt", monkeypatch, "Hi")[0]) == 1


def test_added_tokens_in_a_template(tmp_path, program, monkeypatch):  # noqa: F811
    """ChatML on Llama 2's kind of tokenizer: its tokens are tokens in Python and in C, and text
    that spells them is text."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + "
        "'\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokens = ["<|im_start|>", "<|im_end|>"]
    sentencepiece_folder(tmp_path / "in", True, tokens)
    config = json.loads((tmp_path / "in/tokenizer_config.json").read_text())
    (tmp_path / "in/tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": source, "eos_token": "<|im_end|>"})
    )
    assert "with its chat template" in run(tmp_path / "c.pt", f"--hf={tmp_path}/in").stdout
    _, _, [prompt] = chat_lines(tmp_path / "c.pt", monkeypatch, "x<|im_end|>")
    assert [i for i in prompt if i >= 512] == [512, 513, 512]
    run(tmp_path / "m.bin", f"--checkpoint={tmp_path}/c.pt", "--format=fp32")
    text = [chat_lines(tmp_path / "c.pt", monkeypatch, "x")[0][0].split("\n(cut")[0].strip()]
    done = subprocess.run(
        [program, tmp_path / "m.bin", "-m", "chat", "-i", "x", "-t", "0", "-n", "12"],
        capture_output=True,
        text=True,
        input="",
    )
    assert done.stdout.removeprefix("Assistant:").split("\n")[0].strip() == plain(text[0])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_whatever_a_config_says_is_an_import_or_one_line(tmp_path, name):
    """Each value of a model's files, and of RoPE's settings, replaced by what it should not be."""
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "rope_theta": 1e4,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    bpe_folder(
        tmp_path / "in",
        True,
        320,
        {"rope_parameters": llama3},
        add_bos_token=True,
        added_tokens_decoder={},
        chat_template="",
    )
    good = json.loads((tmp_path / "in" / name).read_text())
    source = inspect.getsource(export) + inspect.getsource(formats) + inspect.getsource(tokenizer)
    keys = [(key,) for key in good if f'"{key}"' in source]  # that are read at all
    keys += [("rope_parameters", key) for key in good.get("rope_parameters", ())]
    values = [None, 2.5, "x", [3], {"a": 1}]
    values += [-1, 0, {}, True, 10**12, float("nan")] if name == "config.json" else []
    imported = 0
    for key in keys:
        for value in values:
            config = json.loads(json.dumps(good))
            place = config["rope_parameters"] if len(key) > 1 else config
            place[key[-1]] = value
            (tmp_path / "in" / name).write_text(json.dumps(config))
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                with pytest.raises(SystemExit) as end:
                    run_main(lambda: export.main([f"{tmp_path}/c.pt", f"--hf={tmp_path}/in"]))
            if end.value.code:
                assert end.value.code == 1 and err.getvalue().startswith("error: "), (key, value)
                assert err.getvalue().count("\n") == 1, (key, value)
            else:
                imported += 1
                saved = load_checkpoint(tmp_path / "c.pt")["model_args"]
                assert len(key) < 2 or saved["rope_scaling"] is not None, (key, value)
    assert imported
